use std::collections::BTreeSet;
use std::ops::ControlFlow;

use proptest::prelude::*;

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
