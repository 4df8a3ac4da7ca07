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
    for (size, batch) in [(1, 1), (2, 3), (1000, 1), (1000, 7), (100_000, 30_000)] {
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

/// The strata of a ledger that has used little stay closed: they may be someone else's.
#[test]
fn a_large_range_is_drawn_from_an_eighth_of_its_strata_at_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("0", "9007199254740991"));
    let values = draw(&mut ledger, 0, 20_000);
    let strata: BTreeSet<_> = values.iter().map(|&value| ledger.state.key.stratum(value)).collect();
    assert_eq!(strata.len(), 512);
    assert_eq!(ledger.state.open.len(), 512);
}

/// A ledger that has outgrown its strata opens more, so that a draw touches a smaller share of it.
#[test]
fn a_ledger_that_grows_opens_more_strata() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = new_ledger(folder.path(), &space("0", "9007199254740991"));
    draw(&mut ledger, 0, 100);
    let mut check = |count: u64, expected: usize| {
        // As if it had drawn them.
        ledger.state.count = count;
        draw(&mut ledger, 0, 100);
        assert_eq!(ledger.state.open.len(), expected, "{count} values");
    };
    check(8_000_000, 512);
    check(10_000_000, 1024);
    check(50_000_000, 4096);
}

/// A row that changed on the disk is not drawn again: the draw finds it before.
#[test]
fn a_row_that_changed_ends_the_draws() {
    const SIZE: i64 = 2000;
    let change = |sql: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("used_numbers_int.db");
        let space = space("1", &SIZE.to_string());
        let mut ledger = new_ledger(folder.path(), &space);
        draw(&mut ledger, 0, 1000);
        ledger.close().unwrap();
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        let mut ledger = match Ledger::open(&path, &space) {
            Ok(ledger) => ledger,
            Err(error) => return error.to_string(),
        };
        // Of this many, some part has a stratum that is not as it was.
        let draw = ledger.draw(ShardIndex(0), None, 1000, &mut |_| ControlFlow::Continue(()));
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
    check("UPDATE strata SET count = count + 1 WHERE stratum = 7", "its strata have 1001");
    check("UPDATE strata SET digest = digest + 1 WHERE stratum = 7", "from stratum 7");
    check("UPDATE strata SET stratum = 4096 WHERE stratum = 7", "a stratum 4096 of 4096");
    check("DELETE FROM strata WHERE count > 0", "its strata have 0");
    check("UPDATE ledger SET count = count - 1", "it has 999 values");
    check("UPDATE ledger SET hash_key = zeroblob(16)", "is not what it was created with");
    check("UPDATE ledger SET max = max - 1", "is not what it was created with");
}

/// Story: a bit that flipped in a page of the ledger at rest made it forget a value, which was drawn
/// again. `LEDGER_FLIPS=N` sets how many bits are tried, each in a copy of its own.
#[test]
fn a_bit_that_flips_anywhere_is_noticed_or_harmless() {
    let flips = std::env::var("LEDGER_FLIPS").map_or(100, |value| value.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("1", "3000");
    let mut ledger = new_ledger(folder.path(), &space);
    let mut known: BTreeSet<Value> = draw(&mut ledger, 0, 1500).into_iter().collect();
    known.extend(draw(&mut ledger, 1, 700));
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

/// Draws all that is left in three parts, each in a process of its own as far as the ledger knows.
fn drain(path: &Path, space: &Space, known: &BTreeSet<Value>) -> Result<Result<(), String>, Value> {
    let mut seen = known.clone();
    for part in 0..3 {
        let drawn = Ledger::open(path, space).and_then(|mut ledger| {
            let mut go_on = |_| ControlFlow::Continue(());
            let draw = ledger.draw(ShardIndex(part), None, 400, &mut go_on)?;
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

/// Each stratum is read once in the life of a process, before any is drawn from again.
#[test]
fn every_stratum_is_read_before_any_is_drawn_from_again() {
    let folder = tempfile::tempdir().unwrap();
    let space = space("0", "9007199254740991");
    let mut ledger = new_ledger(folder.path(), &space);
    draw(&mut ledger, 0, 100_000);
    ledger.close().unwrap();
    let mut ledger = Ledger::open(&folder.path().join("used_numbers_int.db"), &space).unwrap();
    let checked = |ledger: &Ledger| {
        let open = &ledger.state.open;
        (0..strata::STRATA as u16).filter(|&stratum| open.is_checked(stratum)).count()
    };
    for read in 1..=8 {
        // So few land in the smallest part, 64 of the 512 that are open.
        draw(&mut ledger, 0, 100);
        assert_eq!(checked(&ledger), 64 * read);
    }
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

/// Ledgers that share a space by its strata, each with some of them: what they draw is all of it, once.
#[test]
fn shared_ledgers_draw_every_value_once_in_all() {
    let space = space("1", "5000");
    let key = StratumKey::random();
    let all: Vec<u16> = (0..STRATA as u16).collect();
    let mut values = Vec::new();
    for held in all.chunks(1500) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("used_numbers_int.db");
        let mut ledger = Ledger::create_with(&path, &space, key).unwrap();
        ledger.hold(&held[..held.len() / 2]).unwrap();
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
                if ledger.strata().len() == held.len() {
                    break;
                }
                ledger.hold(held).unwrap();
                assert!(!ledger.is_exhausted());
            }
        }
    }
    values.sort_unstable();
    assert_eq!(values, (1..=5000).map(Value).collect::<Vec<_>>());
}

#[test]
fn strata_are_wanted_before_those_held_are_half_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("1", "4096000");
    let mut ledger = Ledger::create_with(&path, &space, StratumKey::random()).unwrap();
    ledger.hold(&[]).unwrap();
    // 1000 values each: two draws of 1000 fill half of four strata.
    assert_eq!(ledger.strata_wanted(1000), 4);
    ledger.hold(&[7, 8, 9]).unwrap();
    assert_eq!(ledger.strata_wanted(1000), 1);
    ledger.hold(&[10]).unwrap();
    assert_eq!(ledger.strata_wanted(1000), 0);
}

/// Whatever the estimate says: strata may hold fewer values than their share.
#[test]
fn a_share_that_is_used_up_wants_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("1", "4096000");
    let mut ledger = Ledger::create_with(&path, &space, StratumKey::random()).unwrap();
    ledger.hold(&[0, 1, 2, 3]).unwrap();
    assert_eq!(ledger.strata_wanted(0), 0);
    while !ledger.is_exhausted() {
        draw(&mut ledger, 0, 1000);
    }
    ledger.state.count = 0;
    assert_eq!(ledger.strata_wanted(0), 1);
}

/// Story: all strata were others', and the refiller went through nine quadrillion values to make sure.
#[test]
fn without_a_stratum_there_is_nothing_to_draw() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("0", "9007199254740991");
    let mut ledger = Ledger::create_with(&path, &space, StratumKey::random()).unwrap();
    ledger.hold(&[]).unwrap();
    let draw = ledger.draw(ShardIndex(0), None, 10, &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(draw.values(), []);
    drop(draw);
    assert!(ledger.is_exhausted());
}

/// Story: of one stratum in 4096, one draw in twenty met no value by bad luck, and went through the range.
#[test]
fn one_stratum_is_enough_for_one_value() {
    const DRAWS: u64 = 200;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used_numbers_int.db");
    let space = space("0", "9007199254740991");
    let mut ledger = Ledger::create_with(&path, &space, StratumKey::random()).unwrap();
    ledger.hold(&[7]).unwrap();
    for generation in 0..DRAWS as i64 {
        let live = (generation > 0).then_some(Generation(generation));
        // A round is a few steps; the range is a billion.
        let mut steps = 0;
        let step = &mut |_| {
            steps += 1;
            if steps < 100 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        ledger.draw(ShardIndex(0), live, 1, step).unwrap().commit().unwrap();
    }
    assert_eq!(ledger.count(), DRAWS);
}
