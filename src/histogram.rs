//! Durations counted in buckets, in constant memory. Knows nothing of what the durations measure.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const BOUNDS: usize = 28;

// A constant, not `BOUNDS_NANOS.len() + 1`: an optimised build evaluates types before the function that
// computes the array.
const BUCKETS: usize = BOUNDS + 1;

/// Upper ends of the buckets in nanoseconds: 1, 2 and 5 of each decade from 1 µs, which is shorter than any
/// request, to 1000 s, which is longer than any refill. One more bucket counts longer durations.
pub(crate) const BOUNDS_NANOS: [u64; BOUNDS] = bounds();

const fn bounds() -> [u64; BOUNDS] {
    let mut bounds = [0; BOUNDS];
    let (mut decade, mut index) = (1_000, 0);
    while index < bounds.len() {
        bounds[index] = decade * [1, 2, 5][index % 3];
        index += 1;
        if index % 3 == 0 {
            decade *= 10;
        }
    }
    bounds
}

/// Counts durations. One thread or task writes at a time, and any may read. Counting is a plain load and
/// store, which is cheaper than an atomic addition.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_nanos: AtomicU64,
}

impl Histogram {
    /// Counts a duration.
    pub(crate) fn record(&self, duration: Duration) {
        // A `u64` holds 584 years.
        let nanos = duration.as_nanos() as u64;
        // Almost all durations are in the first few buckets, so no search is faster than a linear one.
        let bucket = BOUNDS_NANOS.iter().position(|&bound| nanos <= bound);
        add(&self.buckets[bucket.unwrap_or(BUCKETS - 1)], 1);
        add(&self.sum_nanos, nanos);
    }

    /// Returns the durations counted so far.
    pub(crate) fn durations(&self) -> Durations {
        Durations {
            buckets: std::array::from_fn(|index| self.buckets[index].load(Ordering::Relaxed)),
            sum_nanos: self.sum_nanos.load(Ordering::Relaxed),
        }
    }
}

/// Adds to a count that only one thread or task writes at a time.
pub(crate) fn add(count: &AtomicU64, more: u64) {
    count.store(count.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// The durations that one or more [`Histogram`]s counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Durations {
    buckets: [u64; BUCKETS],
    sum_nanos: u64,
}

impl Durations {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Returns the sum of the durations in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_nanos as f64 / 1e9
    }

    /// Yields the upper end of each bucket in seconds, and the number of durations up to it.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut below = 0;
        BOUNDS_NANOS.iter().zip(&self.buckets).map(move |(&bound, count)| {
            below += count;
            (bound as f64 / 1e9, below)
        })
    }

    /// Returns the durations of both.
    pub fn with(mut self, other: &Self) -> Self {
        for (count, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *count += more;
        }
        self.sum_nanos += other.sum_nanos;
        self
    }

    /// Returns the durations that were counted after `earlier`, an earlier state of the same histogram.
    pub fn since(&self, earlier: &Self) -> Self {
        let buckets =
            std::array::from_fn(|index| self.buckets[index].saturating_sub(earlier.buckets[index]));
        Self { buckets, sum_nanos: self.sum_nanos.saturating_sub(earlier.sum_nanos) }
    }

    /// Returns the duration in seconds that the given share of the durations does not exceed, on the
    /// assumption that the durations of a bucket are spread evenly over it. Returns `None` if there are no
    /// durations.
    pub fn quantile_seconds(&self, share: f64) -> Option<f64> {
        let rank = share * self.count() as f64;
        let mut below = 0;
        let mut lower = 0.0;
        for (upper, up_to) in self.cumulative() {
            if up_to > below && up_to as f64 >= rank {
                let part = (rank - below as f64).max(0.0) / (up_to - below) as f64;
                return Some(lower + (upper - lower) * part);
            }
            (below, lower) = (up_to, upper);
        }
        // The result is above the longest bound, so this is the best known lower limit.
        (self.count() > 0).then_some(lower)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_micros(micros: impl IntoIterator<Item = u64>) -> Durations {
        let histogram = Histogram::default();
        micros.into_iter().for_each(|micros| histogram.record(Duration::from_micros(micros)));
        histogram.durations()
    }

    #[test]
    fn bounds_are_one_two_and_five_of_each_decade() {
        assert_eq!(BOUNDS_NANOS[..4], [1_000, 2_000, 5_000, 10_000]);
        assert_eq!(BOUNDS_NANOS.last(), Some(&1_000_000_000_000));
        assert!(BOUNDS_NANOS.is_sorted());
    }

    #[test]
    fn a_duration_counts_in_each_bucket_that_it_fits() {
        let found: Vec<_> = of_micros([1, 2, 3, 7]).cumulative().take(5).collect();
        assert_eq!(found, [(1e-6, 1), (2e-6, 2), (5e-6, 3), (1e-5, 4), (2e-5, 4)]);
        assert_eq!(of_micros([1, 2, 3, 7]).sum_seconds(), 13e-6);
        // 28 hours: above the last bound, but counted.
        assert_eq!(of_micros([100_000_000_000]).count(), 1);
    }

    #[test]
    fn quantiles_lie_where_they_should() {
        let check = |micros: Vec<u64>, share, expected: Option<f64>| {
            let found = of_micros(micros.clone()).quantile_seconds(share);
            let near = match (found, expected) {
                (Some(found), Some(expected)) => (found - expected).abs() < 1e-9,
                (found, expected) => found == expected,
            };
            assert!(near, "{share} of {micros:?} is {found:?}, not {expected:?}");
        };
        check(vec![], 0.5, None);
        // In the middle of the bucket from 10 to 20 µs.
        check(vec![15, 15], 0.5, Some(15e-6));
        check(vec![15, 15], 1.0, Some(20e-6));
        check([vec![15; 99], vec![3_000]].concat(), 0.99, Some(20e-6));
        check([vec![15; 99], vec![3_000]].concat(), 0.999, Some(4.7e-3));
        check(vec![100_000_000_000], 0.5, Some(1_000.0));
    }

    #[test]
    fn what_came_since_is_the_rest() {
        let (before, after) = (of_micros([3, 80]), of_micros([3, 80, 80, 900]));
        assert_eq!(after.since(&before), of_micros([80, 900]));
        assert_eq!(before.clone().with(&after.since(&before)), after);
    }
}
