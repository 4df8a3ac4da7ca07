//! Decides which shards to fill next, and how far. Pure.

use crate::batch::{Generation, ShardIndex};
use crate::pool::Level;

/// Numbers in a generation that is built while requests wait: well under a second of work. A generation of no more
/// numbers takes less time to build than to make durable.
pub(crate) const STARTER_ROWS: u64 = 1 << 16;

/// Numbers in all such generations, if many pools wait: about a second of work.
const STARTER_ROWS_OF_ALL: u64 = 1 << 19;

/// The fewest numbers in such a generation: as many as a lease has by default.
const STARTER_ROWS_MIN: u64 = 1 << 10;

/// A planned refill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refill {
    pub shard: ShardIndex,
    /// The live generation, which stays valid.
    pub live: Option<Generation>,
    /// The number of rows to build.
    pub rows: u64,
}

/// Returns the refills that are due, most urgent first: those of configured shards below the low-water mark
/// that have no standby. They have `starter` rows at most while no shard has numbers or a standby.
pub(crate) fn plan(levels: &[Level], low_water: u64, shard_size: u64, starter: u64) -> Vec<Refill> {
    let rows = if is_dry(levels) { shard_size.min(starter) } else { shard_size };
    let mut due: Vec<&Level> = levels
        .iter()
        .filter(|level| level.refilled && !level.standby && level.left < low_water)
        .collect();
    due.sort_by_key(|level| (level.left, level.index));
    due.iter().map(|level| Refill { shard: level.index, live: level.live, rows }).collect()
}

/// Returns the numbers in a generation that is built while requests wait, as they do at `others` other pools.
pub(super) fn starter_rows(others: usize) -> u64 {
    (STARTER_ROWS_OF_ALL / (others as u64 + 1)).clamp(STARTER_ROWS_MIN, STARTER_ROWS)
}

/// Returns whether no shard has numbers or a standby.
pub(super) fn is_dry(levels: &[Level]) -> bool {
    levels.iter().all(|level| level.left == 0 && !level.standby)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn level(index: u16, left: u64, standby: bool, refilled: bool) -> Level {
        Level { index: ShardIndex(index), live: None, left, standby, refilled }
    }

    #[test]
    fn plans() {
        let check = |levels: &[Level], expected: &[(u16, u64)]| {
            let found: Vec<_> = plan(levels, 500_000, 1_000_000, STARTER_ROWS)
                .iter()
                .map(|refill| (refill.shard.0, refill.rows))
                .collect();
            assert_eq!(found, expected, "{levels:?}");
        };
        check(&[], &[]);
        // Full shards need nothing.
        check(&[level(0, 1_000_000, false, true), level(1, 500_000, false, true)], &[]);
        // The emptiest shard comes first.
        check(
            &[
                level(0, 400_000, false, true),
                level(1, 0, false, true),
                level(2, 900_000, false, true),
            ],
            &[(1, 1_000_000), (0, 1_000_000)],
        );
        // A standby is enough, and a shard beyond the configured number is not refilled.
        check(&[level(0, 0, true, true), level(1, 10, false, false)], &[]);
        // While requests wait, a few numbers soon are better than many later.
        check(&[level(0, 0, false, true), level(1, 0, false, true)], &[(0, 65_536), (1, 65_536)]);
    }

    #[test]
    fn a_few_pools_begin_with_as_many_numbers_as_one_and_a_thousand_share() {
        let rows = [0, 1, 7, 15, 99, 999, 100_000].map(starter_rows);
        assert_eq!(rows, [65_536, 65_536, 65_536, 32_768, 5_242, 1_024, 1_024]);
    }

    proptest! {
        #[test]
        fn every_low_shard_is_planned_once_and_no_other(
            shards in proptest::collection::vec((0..200_u64, any::<bool>(), any::<bool>()), 0..20),
            low_water in 1..=200_u64,
        ) {
            let levels: Vec<_> = (0..)
                .zip(&shards)
                .map(|(index, &(left, standby, refilled))| level(index, left, standby, refilled))
                .collect();
            let mut planned: Vec<_> =
                plan(&levels, low_water, 200, STARTER_ROWS).iter().map(|refill| refill.shard).collect();
            let lefts: Vec<_> = planned.iter().map(|shard| levels[usize::from(shard.0)].left).collect();
            prop_assert!(lefts.is_sorted());
            planned.sort_unstable();
            let due: Vec<_> = levels
                .iter()
                .filter(|l| l.refilled && !l.standby && l.left < low_water)
                .map(|l| l.index)
                .collect();
            prop_assert_eq!(planned, due);
        }
    }
}
