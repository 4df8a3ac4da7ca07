use std::collections::BTreeSet;
use std::ops::ControlFlow;

use proptest::prelude::*;
use rand::RngExt;

use super::*;

fn space(min: &str, max: &str) -> Space {
    Space::new(min, max, 0).unwrap()
}

fn new_ledger(folder: &Path, space: &Space) -> Ledger {
    Ledger::create(&folder.join("used_numbers_int.db"), space).unwrap()
}

/// Draws and commits.
fn draw(ledger: &mut Ledger, shard: u16, count: u64) -> Vec<Value> {
    let draw =
        ledger.draw(ShardIndex(shard), None, count, &mut |_| ControlFlow::Continue(())).unwrap();
    let values = draw.values().to_vec();
    draw.commit().unwrap();
    values
}

#[test]
fn a_range_is_drawn_to_its_last_value_each_once() {
    let ranges = [
        (1, 1),
        (2, 3),
        (10, 4),
        (1000, 1),
        (1000, 7),
        (1024, 1000),
        (100_000, 30_000),
        (1_000_000, 90_000),
        (1 << 20, 400_000),
        ((1 << 20) + 1, 99_999),
    ];
    for (size, batch) in ranges {
        let folder = tempfile::tempdir().unwrap();
        let space = space("1", &size.to_string());
        let mut ledger = new_ledger(folder.path(), &space);
        let mut seen = BTreeSet::new();
        while !ledger.is_exhausted() {
            for value in draw(&mut ledger, 0, batch) {
                assert!(seen.insert(value), "{value:?} was drawn twice from 1..={size}");
            }
        }
        assert!(seen.iter().map(|value| value.0).eq(1..=size), "1..={size} in draws of {batch}");
        assert_eq!(draw(&mut ledger, 0, batch), [], "an exhausted range has no more");
    }
}

#[test]
fn a_draw_that_is_not_committed_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("1", "100"));
    drop(ledger.draw(ShardIndex(0), None, 60, &mut |_| ControlFlow::Continue(())).unwrap());
    let cancelled = ledger.draw(ShardIndex(0), None, 60, &mut |_| ControlFlow::Break(()));
    assert!(matches!(cancelled, Err(LedgerError::Cancelled)));
    drop(cancelled);
    assert_eq!((ledger.count(), ledger.batches(ShardIndex(0)).unwrap()), (0, vec![]));
    assert_eq!(draw(&mut ledger, 0, 100).len(), 100);
}

#[test]
fn what_was_drawn_is_known_after_opening_again() {
    let folder = tempfile::tempdir().unwrap();
    let space = space("-500", "499");
    let mut ledger = new_ledger(folder.path(), &space);
    let (id, first) = (ledger.id(), draw(&mut ledger, 3, 400));
    ledger.add_burned(5).unwrap();
    ledger.close().unwrap();

    let mut ledger = Ledger::open(&folder.path().join("used_numbers_int.db"), &space).unwrap();
    assert_eq!((ledger.id(), ledger.count(), ledger.burned()), (id, 400, 5));
    assert!(first.iter().all(|&value| ledger.contains(value).unwrap()));
    let batch =
        Batch { id: BatchId(1), shard: ShardIndex(3), generation: Generation(1), count: 400 };
    assert_eq!(ledger.batch(BatchId(1)).unwrap(), Some(batch));
    let second = draw(&mut ledger, 3, 600);
    let all: BTreeSet<_> = first.iter().chain(&second).collect();
    assert_eq!(all.len(), 1000);
}

#[test]
fn a_draw_retires_all_generations_but_the_live_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("1", "1000"));
    let live = |ledger: &Ledger, shard| -> Vec<i64> {
        let batches = ledger.batches(ShardIndex(shard)).unwrap();
        batches.iter().map(|batch| batch.generation.0).collect()
    };
    draw(&mut ledger, 0, 10);
    draw(&mut ledger, 1, 10);
    let second = ledger
        .draw(ShardIndex(0), Some(Generation(1)), 10, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    second.commit().unwrap();
    assert_eq!((live(&ledger, 0), live(&ledger, 1)), (vec![1, 2], vec![1]));
    draw(&mut ledger, 0, 10);
    assert_eq!((live(&ledger, 0), live(&ledger, 1)), (vec![3], vec![1]));
    ledger.retire(ShardIndex(1), None).unwrap();
    assert!(live(&ledger, 1).is_empty());
}

#[test]
fn a_range_grows_and_does_not_shrink() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let mut ledger = new_ledger(folder.path(), &space("1", "10"));
    assert_eq!(draw(&mut ledger, 0, 10).len(), 10);
    ledger.close().unwrap();

    let error = Ledger::open(&path, &space("1", "9")).unwrap_err();
    assert!(matches!(error, LedgerError::OtherRange { .. }), "{error}");
    let error = Ledger::open(&path, &Space::new("1", "10", 2).unwrap()).unwrap_err();
    assert!(matches!(error, LedgerError::OtherRange { .. }), "{error}");
    let mut ledger = Ledger::open(&path, &space("1", "15")).unwrap();
    let mut fresh = draw(&mut ledger, 0, 10);
    fresh.sort_unstable();
    assert_eq!(fresh, [11, 12, 13, 14, 15].map(Value));
}

/// In a larger range every value has another index, so all rows move.
#[test]
fn a_ledger_of_a_range_that_grew_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let mut ledger = new_ledger(folder.path(), &space("0", "9999"));
    let mut known = draw(&mut ledger, 0, 3000);
    known.extend(draw(&mut ledger, 1, 2000));
    ledger.close().unwrap();

    // The growth refuses a changed row instead of moving it.
    let connection = Connection::open(&path).unwrap();
    let change = |by: i64| {
        let sql = format!(
            "UPDATE strata SET digest = digest + {by} WHERE stratum = (SELECT min(stratum) FROM strata)"
        );
        assert_eq!(connection.execute(&sql, []).unwrap(), 1);
    };
    change(1);
    let error = Ledger::open(&path, &space("-20000000", "20000000")).unwrap_err();
    assert!(error.to_string().contains("not all of them"), "{error}");
    change(-1);
    drop(connection);

    let mut ledger = Ledger::open(&path, &space("-20000000", "20000000")).unwrap();
    let batch = |value| ledger.batch_of(value).unwrap();
    assert!(known[..3000].iter().all(|&value| batch(value) == Some(BatchId(1))));
    assert!(known[3000..].iter().all(|&value| batch(value) == Some(BatchId(2))));
    known.extend(draw(&mut ledger, 2, 5000));
    let mut problems = Vec::new();
    ledger.audit(&mut |kind, problem| problems.push(format!("{kind}: {problem}"))).unwrap();
    assert_eq!(problems, Vec::<String>::new());
    known.sort_unstable();
    known.dedup();
    assert_eq!((known.len(), ledger.count()), (10_000, 10_000));
}

/// The partitions that a ledger does not need yet are left to other instances.
#[test]
fn a_ledger_opens_partitions_as_it_needs_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("0", "9007199254740991"));
    let mut check = |count: u64, expected: usize| {
        ledger.state.open_for(count);
        assert_eq!(ledger.state.open.len(), expected, "{count} values");
    };
    check(1, 1);
    check(20_000, 2);
    check(1_000_000, 62);
    check(67_000_000, 4090);
    check(1 << 40, 4096);
    let mut ledger = new_ledger(folder.path(), &space("0", "999999"));
    let mut check = |count: u64, expected: usize| {
        ledger.state.open_for(count);
        assert_eq!(ledger.state.open.len(), expected, "{count} values");
    };
    check(1000, 9);
    check(250_000, 2048);
    check(500_000, 4096);
}

/// A draw finds a row that changed on the disk before it could draw the value again.
#[test]
fn a_row_that_changed_ends_the_draws() {
    const SIZE: i64 = 200_000;
    let change = |sql: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("used_numbers_int.db");
        let space = space("1", &SIZE.to_string());
        let mut ledger = new_ledger(folder.path(), &space);
        draw(&mut ledger, 0, 100_000);
        ledger.close().unwrap();
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        let mut ledger = match Ledger::open(&path, &space) {
            Ok(ledger) => ledger,
            Err(error) => return error.to_string(),
        };
        // This many values go into all strata.
        let draw = ledger.draw(ShardIndex(0), None, 90_000, &mut |_| ControlFlow::Continue(()));
        draw.map(|_| ()).unwrap_err().to_string()
    };
    let check = |sql: &str, expected: &str| {
        let error = change(sql);
        assert!(error.contains(expected), "{sql}: {error}");
    };
    let one = "(stratum, value) = (SELECT stratum, value FROM used_numbers LIMIT 1)";
    check(&format!("DELETE FROM used_numbers WHERE {one}"), "not all of them");
    check(
        &format!("UPDATE used_numbers SET value = 1 - value WHERE {one}"),
        "is not where it belongs",
    );
    check(&format!("UPDATE used_numbers SET stratum = 4096 WHERE {one}"), "not all of them");
    check("UPDATE strata SET count = count + 1 WHERE stratum = 7", "its strata have 100001");
    check("UPDATE strata SET count = 1000 WHERE stratum = 7", "more values than there can be");
    check("UPDATE strata SET digest = digest + 1 WHERE stratum = 7", "from stratum 7");
    check("UPDATE strata SET stratum = 4096 WHERE stratum = 7", "a stratum 4096 of 4096");
    check("DELETE FROM strata WHERE count > 0", "its strata have 0");
    check("UPDATE ledger SET count = count - 1", "it has 99999 values");
    check("UPDATE ledger SET hash_key = zeroblob(16)", "is not what it was created with");
    check("UPDATE ledger SET max = max - 1", "is not what it was created with");
}

/// Story: a bit that flipped at rest in a page of the ledger made it forget a value, which was drawn again.
/// `LEDGER_FLIPS=N` sets the number of bits to try, each in its own copy.
#[test]
fn a_bit_that_flips_anywhere_is_noticed_or_harmless() {
    let flips = std::env::var("LEDGER_FLIPS").map_or(100, |value| value.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("1", "30000");
    let mut ledger = new_ledger(folder.path(), &space);
    let mut known: BTreeSet<Value> = draw(&mut ledger, 0, 15_000).into_iter().collect();
    known.extend(draw(&mut ledger, 1, 7000));
    ledger.close().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let (mut noticed, mut harmless) = (0, 0);
    for seed in 0..flips {
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let mut bytes = whole.clone();
        bytes[random.random_range(..whole.len())] ^= 1 << random.random_range(0..8);
        for suffix in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(files::beside(&path, suffix));
        }
        std::fs::write(&path, bytes).unwrap();
        match drain(&path, &space, &known) {
            Ok(Err(_)) => noticed += 1,
            Ok(Ok(())) => harmless += 1,
            Err(value) => panic!("flip {seed}: {value:?} was drawn again"),
        }
    }
    println!("{flips} flips: {noticed} noticed, {harmless} harmless");
}

/// Draws everything that is left in three parts, each from a newly opened ledger.
fn drain(path: &Path, space: &Space, known: &BTreeSet<Value>) -> Result<Result<(), String>, Value> {
    let mut seen = known.clone();
    for part in 0..3 {
        let drawn = Ledger::open(path, space).and_then(|mut ledger| {
            let mut go_on = |_| ControlFlow::Continue(());
            let draw = ledger.draw(ShardIndex(part), None, 4000, &mut go_on)?;
            let values = draw.values().to_vec();
            draw.commit()?;
            Ok(values)
        });
        match drawn {
            Ok(values) => {
                for value in values {
                    if !seen.insert(value) {
                        return Err(value);
                    }
                }
            }
            Err(error) => return Ok(Err(error.to_string())),
        }
    }
    Ok(Ok(()))
}

/// All rows of a stratum are read every time before a draw, not only the first time.
#[test]
fn a_row_that_changes_under_an_open_ledger_ends_the_next_draw() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("1", "200000"));
    draw(&mut ledger, 0, 100_000);
    let other = Connection::open(folder.path().join("used_numbers_int.db")).unwrap();
    other
        .execute("DELETE FROM used_numbers WHERE value = (SELECT min(value) FROM used_numbers)", [])
        .unwrap();
    let error =
        ledger.draw(ShardIndex(0), None, 90_000, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("not all of them"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn draws_of_any_size_never_repeat(
        size in 1..5000_i64,
        counts in proptest::collection::vec(1..1500_u64, 1..8),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let space = space("1", &size.to_string());
        let mut ledger = new_ledger(folder.path(), &space);
        let mut seen = BTreeSet::new();
        for count in counts {
            let expected = count.min(size as u64 - seen.len() as u64);
            let values = draw(&mut ledger, 0, count);
            prop_assert_eq!(values.len() as u64, expected);
            for value in values {
                prop_assert!(space.contains(value) && seen.insert(value));
            }
        }
    }
}

/// Ledgers that share a range, each with some of its partitions, draw every value once.
#[test]
fn shared_ledgers_draw_every_value_once_in_all() {
    let space = space("1", "5000");
    let key = StratumKey::random();
    let all: Vec<u16> = (0..PARTITIONS as u16).collect();
    let mut values = Vec::new();
    for held in all.chunks(1500) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("used_numbers_int.db");
        let mut ledger = Ledger::create_with(&path, &space, key).unwrap();
        ledger.hold(&held[..held.len() / 2]);
        let mut holds_all = false;
        let mut generation = 0;
        loop {
            let live = (generation > 0).then_some(Generation(generation));
            let draw =
                ledger.draw(ShardIndex(0), live, 700, &mut |_| ControlFlow::Continue(())).unwrap();
            values.extend_from_slice(draw.values());
            if !draw.values().is_empty() {
                draw.commit().unwrap();
                generation += 1;
            } else {
                drop(draw);
                assert!(ledger.is_exhausted());
                if std::mem::replace(&mut holds_all, true) {
                    break;
                }
                ledger.hold(held);
                assert!(!ledger.is_exhausted());
            }
        }
    }
    values.sort_unstable();
    assert_eq!(values, (1..=5000).map(Value).collect::<Vec<_>>());
}

#[test]
fn partitions_are_wanted_before_those_held_are_half_used() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("1", "4096000"));
    ledger.hold(&[]);
    // 1000 values in each partition: two draws of 1000 fill half of four partitions.
    assert_eq!(ledger.partitions_wanted(1000), 4);
    ledger.hold(&[7, 8, 9]);
    assert_eq!(ledger.partitions_wanted(1000), 1);
    ledger.hold(&[10, 7, 8, 9]);
    assert_eq!(ledger.partitions_wanted(1000), 0);
}

/// In a range with fewer values than partitions, most partitions have none.
#[test]
fn partitions_without_values_want_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("1", "10"));
    let strata = &ledger.state.strata;
    let (empty, not_empty): (Vec<u16>, Vec<u16>) = (0..PARTITIONS as u16)
        .partition(|&partition| strata.indexes(strata.of_partition(partition)).is_empty());
    assert_eq!(not_empty.len(), 10);
    ledger.hold(&empty);
    assert!(ledger.is_exhausted());
    assert!(ledger.partitions_wanted(1) > 0);
    ledger.hold(&not_empty);
    assert!(!ledger.is_exhausted());
    assert_eq!(draw(&mut ledger, 0, 100).len(), 10);
}

/// Story: other instances held all partitions, and the refiller tried nine quadrillion values to find a free
/// one.
#[test]
fn without_a_partition_there_is_nothing_to_draw() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("0", "9007199254740991"));
    ledger.hold(&[]);
    let draw = ledger.draw(ShardIndex(0), None, 10, &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(draw.values(), []);
    drop(draw);
    assert!(ledger.is_exhausted());
}

/// Story: when few values were free, a draw looked at every value of the range, which would take three years
/// for 2^53. Now a draw reads only the rows of the strata that it goes into.
#[test]
fn the_end_of_a_huge_range_costs_no_more_than_its_middle() {
    let folder = tempfile::tempdir().unwrap();
    // 4096 values in a partition, 256 in a stratum: the smallest range with as many strata as the largest
    // has.
    let mut ledger = new_ledger(folder.path(), &space("0", "16777215"));
    ledger.hold(&[7]);
    let mut steps = 0;
    let mut seen = BTreeSet::new();
    for shard in 0.. {
        let draw = ledger
            .draw(ShardIndex(shard), None, 100, &mut |_| {
                steps += 1;
                ControlFlow::Continue(())
            })
            .unwrap();
        seen.extend(draw.values().iter().copied());
        if draw.values().is_empty() {
            break;
        }
        draw.commit().unwrap();
    }
    assert_eq!((seen.len(), ledger.count()), (4096, 4096));
    assert!(ledger.is_exhausted());
    // A step is a stratum that was read, or rows that were inserted: 41 draws, from 16 strata at most.
    assert!(steps <= 42 * (16 + 1), "{steps} steps");

    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("0", "9007199254740991"));
    ledger.hold(&[4095]);
    let mut steps = 0;
    let step = &mut |_| {
        steps += 1;
        ControlFlow::Continue(())
    };
    let draw = ledger.draw(ShardIndex(0), None, 100, step).unwrap();
    assert_eq!(draw.values().len(), 100);
    drop(draw);
    assert!(steps <= 17, "{steps} steps");
}

/// Compares the counts with equal ones by Pearson's chi-square test, on both sides. A random source passes
/// with a probability of 1 - 10^-9.
fn assert_uniform(what: &str, counts: &[u64], correction: f64) {
    assert_uniform_within(what, counts, correction, 1.0);
}

/// Does the same for counts that depend on each other, so that the statistic has a distribution that is `spread`
/// times as wide.
fn assert_uniform_within(what: &str, counts: &[u64], correction: f64, spread: f64) {
    use statrs::distribution::{ChiSquared, ContinuousCDF};
    let expected = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
    let squares: f64 = counts.iter().map(|&count| (count as f64 - expected).powi(2)).sum();
    let degrees = (counts.len() - 1) as f64;
    let statistic = degrees + (correction * squares / expected - degrees) / spread;
    let distribution = ChiSquared::new(degrees).unwrap();
    let tail = distribution.sf(statistic).min(distribution.cdf(statistic));
    assert!(tail > 5e-10, "{what}: chi-square {statistic:.1} of {} bins: {tail:e}", counts.len());
}

/// Every pair of values of a small range is equally often drawn first, as if the range was shuffled.
#[test]
fn a_small_range_is_drawn_as_if_it_were_shuffled() {
    const LEDGERS: u64 = 1500;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let mut counts = [0; 30];
    for _ in 0..LEDGERS {
        let mut ledger = new_ledger(folder.path(), &space("0", "5"));
        let first = draw(&mut ledger, 0, 2);
        let (first, second) = (first[0].0, first[1].0);
        counts[(first * 5 + second - i64::from(second > first)) as usize] += 1;
        ledger.close().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
    assert_uniform("first pairs", &counts, 1.0);
}

/// With one value in a hundred left, each of them is equally likely to be drawn next.
#[test]
fn what_is_left_at_the_end_is_uniform() {
    const LEFT: usize = 10_000;
    let folder = tempfile::tempdir().unwrap();
    // A draw goes into one stratum of 4096.
    let mut ledger = new_ledger(folder.path(), &space("0", "1048576"));
    let used: BTreeSet<Value> = draw(&mut ledger, 0, 1_048_577 - LEFT as u64).into_iter().collect();
    let left: Vec<Value> =
        (0..=1_048_576).map(Value).filter(|value| !used.contains(value)).collect();
    assert_eq!(left.len(), LEFT);
    let mut counts = [0; 50];
    for _ in 0..2000 {
        // The draw is not committed, so that each one finds the same state.
        let draw = ledger.draw(ShardIndex(0), None, 1, &mut |_| ControlFlow::Continue(())).unwrap();
        let place = left.binary_search(&draw.values()[0]).expect("it was free");
        counts[place / (LEFT / 50)] += 1;
    }
    assert_uniform("the next of the last", &counts, 1.0);
}

/// The strata of values that are issued one after another are unrelated.
#[test]
fn neighbours_in_a_batch_are_of_unrelated_strata() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("0", "9007199254740991"));
    ledger.hold(&[3]);
    let values = draw(&mut ledger, 0, 64_000);
    let stratum = |value: &Value| ledger.state.strata.stratum(*value).unwrap() as usize % 16;
    let mut counts = [0; 16 * 16];
    for pair in values.chunks_exact(2) {
        counts[stratum(&pair[0]) * 16 + stratum(&pair[1])] += 1;
    }
    assert_uniform("strata of neighbours", &counts, 1.0);
}

/// A batch comes from few strata, and an observer without the key must not be able to tell. A weak
/// permutation could reveal it, because all values of a stratum come from indexes with the same upper bits.
/// With two rounds, the upper halves of values from two partitions differ by the same pattern more often than
/// by others.
#[test]
fn a_batch_of_few_strata_looks_like_one_of_all() {
    const LEDGERS: usize = 24;
    const HALF: usize = 1 << 12;
    const BATCH: usize = 1 << 14;
    let (mut halves, mut patterns) = (Vec::new(), Vec::new());
    let mut gaps = [0; 64];
    for _ in 0..LEDGERS {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = new_ledger(folder.path(), &space("0", "16777215"));
        let mut values = draw(&mut ledger, 0, BATCH as u64);
        // The values are half of those in 128 of the 65,536 strata.
        assert_eq!(ledger.state.open.len(), 8);
        let (mut upper, mut lower) = (vec![0_u64; HALF], vec![0_u64; HALF]);
        for value in &values {
            upper[value.0 as usize / HALF] += 1;
            lower[value.0 as usize % HALF] += 1;
        }
        for counts in [upper, lower] {
            // Pairs of values whose halves differ by each pattern.
            let pairs = |pattern: usize| -> u64 {
                let both = |at: usize| counts[at] * counts[at ^ pattern];
                (0..HALF).map(both).sum::<u64>() / 2
            };
            patterns.extend((1..HALF).map(pairs));
            halves.extend(counts);
        }
        // The gaps between values in ascending order are geometric.
        values.sort_unstable();
        for pair in values.windows(2) {
            // Spread over the unit below it, a gap is exponential.
            let gap = (pair[1].0 - pair[0].0) as f64 - ledger.state.rng.random::<f64>();
            let below = 1.0 - (-gap * BATCH as f64 / (HALF * HALF) as f64).exp();
            gaps[(below * 64.0) as usize] += 1;
        }
    }
    // Without replacement, the counts vary a little less.
    let correction = (HALF * HALF - 1) as f64 / (HALF * HALF - BATCH) as f64;
    assert_uniform("halves", &halves, correction);
    // A value is in many pairs. In 160 runs, the statistic was up to nine deviations from its mean, instead of three.
    assert_uniform_within("patterns", &patterns, 1.0, 3.0);
    assert_uniform("gaps", &gaps, 1.0);
}

/// Imports values and ends the import, as if all drawn ones were marked.
fn import(ledger: &mut Ledger, values: impl Iterator<Item = i64>) -> Entered {
    let entered = ledger.import(values.map(Value).collect()).unwrap();
    ledger.end_import(&entered.drawn).unwrap();
    entered
}

#[test]
fn an_imported_value_is_never_drawn_and_the_ledger_stays_whole() {
    for (size, before, after) in [(100, 30, 20), (1000, 300, 100), (200_000, 50_000, 30_000)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("used_numbers_int.db");
        let space = space("1", &size.to_string());
        let mut ledger = new_ledger(folder.path(), &space);
        let drawn: BTreeSet<_> = draw(&mut ledger, 0, before).into_iter().collect();
        let half = size / 2;
        let entered = import(&mut ledger, (1..=half).chain([1, half]));
        let in_half: Vec<_> = drawn.iter().filter(|value| value.0 <= half).copied().collect();
        assert_eq!((entered.repeated, entered.known), (2, 0));
        assert!(entered.drawn.iter().map(|(_, value)| *value).eq(in_half.iter().copied()));
        assert_eq!(entered.added, half as u64 - in_half.len() as u64);
        assert_eq!(ledger.imported(BatchId(1)).unwrap(), in_half);
        let later = draw(&mut ledger, 1, after);
        assert!(later.iter().all(|value| value.0 > half && !drawn.contains(value)));
        ledger.close().unwrap();

        let mut ledger = Ledger::open(&path, &space).unwrap();
        let again = import(&mut ledger, 1..=half);
        assert_eq!((again.added, again.known, again.drawn.len()), (0, half as u64, 0));
        assert_eq!(ledger.shards().unwrap(), [ShardIndex(0), ShardIndex(1)]);
        assert_eq!((ledger.batch(BatchId(2)).unwrap(), again.interrupted), (None, false));
        let mut problems = Vec::new();
        let batches = ledger.audit(&mut |kind, what| problems.push(format!("{kind}: {what}")));
        assert_eq!(problems, Vec::<String>::new());
        let batches = batches.unwrap();
        assert_eq!((batches[1].file, batches[1].count), (None, entered.added));
        assert_eq!(batches[0].marked.count, in_half.len() as u64);
        let rest = draw(&mut ledger, 2, size as u64);
        assert!(ledger.is_exhausted());
        let used = drawn.len() + later.len() + rest.len() + entered.added as usize;
        assert_eq!(used, size as usize);
    }
}

#[test]
fn a_row_that_changed_ends_an_import() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("1", "1000");
    let mut ledger = new_ledger(folder.path(), &space);
    draw(&mut ledger, 0, 500);
    ledger.close().unwrap();
    let sql = "DELETE FROM used_numbers WHERE value = (SELECT min(value) FROM used_numbers)";
    assert_eq!(Connection::open(&path).unwrap().execute(sql, []).unwrap(), 1);
    let mut ledger = Ledger::open(&path, &space).unwrap();
    let error = ledger.import((1..=1000).map(Value).collect()).unwrap_err();
    assert!(error.to_string().contains("not all of them"), "{error}");
    assert_eq!((ledger.count(), ledger.has_open_import().unwrap()), (500, false));
}

/// The used values of a partition are entered before the first draw from it, once.
#[test]
fn used_values_are_not_drawn_from_partitions_that_are_held_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("1", "50000");
    let mut ledger = new_ledger(folder.path(), &space);
    let used: Vec<Value> = (1..=50_000).step_by(7).map(Value).collect();
    let mut seen = BTreeSet::new();
    for end in [1000, 2500, 4096] {
        ledger.hold(&(0..end).collect::<Vec<_>>());
        ledger.set_used(&used).unwrap();
        seen.extend(draw(&mut ledger, 0, 3_000));
        ledger.close().unwrap();
        ledger = Ledger::open(&path, &space).unwrap();
    }
    ledger.hold(&(0..PARTITIONS as u16).collect::<Vec<_>>());
    ledger.set_used(&used).unwrap();
    seen.extend(draw(&mut ledger, 0, 50_000));
    assert!(ledger.is_exhausted());
    assert!(used.iter().all(|value| !seen.contains(value)));
    assert_eq!(seen.len() + used.len(), 50_000);
    let imports = "SELECT count(*) FROM batches WHERE shard = -1";
    let imports: i64 = ledger.connection.query_row(imports, [], |row| row.get(0)).unwrap();
    assert_eq!(imports, 3);
}
