//! Numbers can't be guessed: the values, the order in which they are issued and their shards are uniform.
//!
//! With a true random source, each test passes with probability 1 - 10^-9, so it fails by chance once in a
//! billion runs. The defects that it guards against (sorted rows, a low-entropy seed, an uneven choice of
//! blocks) deviate by far more.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::cast_precision_loss, reason = "counts here are far below 2^53")]

mod support;

use statrs::distribution::{ChiSquared, ContinuousCDF, Normal};
use support::{Config, Many, One, Site, integers};

/// The probability that a test fails although there is no defect.
const ERROR_PROBABILITY: f64 = 1e-9;
/// The number of bins on each axis.
const BINS: usize = 16;

/// Story: values drawn modulo the range favoured the low ones, and a draw from few strata left visible gaps.
/// The test covers the whole default range, of which its sample is a tiny part.
#[tokio::test(flavor = "multi_thread")]
async fn values_are_uniform_over_a_wide_range() {
    const MAX: i64 = (1 << 53) - 1;
    let numbers = integers(&take(Config::new().pool("int", 0, MAX, 2, 20_000), 60_000).await);

    let mut counts = [0; BINS * BINS];
    for number in &numbers {
        counts[bin(*number, MAX + 1, BINS * BINS)] += 1;
    }
    assert_uniform("values", &counts, counts.len() - 1, 1.0);

    // The low bits reveal a scaling error that the high bits hide.
    let mut counts = [0; BINS * BINS];
    for number in &numbers {
        counts[bin(number % 65_521, 65_521, BINS * BINS)] += 1;
    }
    assert_uniform("values modulo a prime", &counts, counts.len() - 1, 1.0);
}

/// Story: in a small range, the first half issued revealed the second half: low values came first, or
/// neighbours came together. A sample without replacement varies less than one with replacement, so the
/// statistic is scaled by (N - 1) / (N - n), the finite population correction.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_half_of_a_small_range_is_a_uniform_half() {
    const RANGE: i64 = 25_600;
    let config = Config::new().pool("int", 0, RANGE - 1, 2, 1_000);
    let numbers = integers(&take(config, RANGE as usize / 2).await);

    let mut counts = [0; BINS * BINS];
    for number in &numbers {
        counts[bin(*number, RANGE, BINS * BINS)] += 1;
    }
    let correction = (RANGE - 1) as f64 / (RANGE as usize - numbers.len()) as f64;
    assert_uniform("first half", &counts, counts.len() - 1, correction);
}

/// Story: shards were filled in sorted order and drained from the front, so each number revealed the next.
/// When a whole range is issued, its values are known, and only their order is random: when a value is
/// issued, and which value follows it.
#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_issue_is_unrelated_to_the_value() {
    const RANGE: usize = 25_600;
    for lease_rows in [1024, 0] {
        let config =
            Config::new().pool("int", 0, RANGE - 1, 2, 1_000).set("lease.rows", lease_rows);
        let numbers = integers(&take(config, RANGE).await);
        let range = RANGE as i64;

        // Position against value. Both margins are fixed, as in any contingency table.
        let mut counts = [0; BINS * BINS];
        for (position, value) in numbers.iter().enumerate() {
            let row = position * BINS / RANGE;
            counts[row * BINS + bin(*value, range, BINS)] += 1;
        }
        let degrees = (BINS - 1) * (BINS - 1);
        assert_uniform("position and value", &counts, degrees, 1.0);

        // Pairs that do not overlap are independent draws.
        let mut counts = [0; BINS * BINS];
        for pair in numbers.chunks_exact(2) {
            let row = bin(pair[0], range, BINS);
            counts[row * BINS + bin(pair[1], range, BINS)] += 1;
        }
        assert_uniform("serial pairs", &counts, counts.len() - 1, 1.0);

        // In a random permutation of n, both coefficients are normal with variance 1 / (n - 1): Spearman's
        // against the position, and the serial one at lag 1.
        let positions: Vec<i64> = (0..range).collect();
        assert_uncorrelated("rank and position", &numbers, &positions);
        assert_uncorrelated("rank and next rank", &numbers[1..], &numbers[..RANGE - 1]);
    }
}

/// Story: shards were chosen in turn, or the fullest always. A caller who saw a shard's name learned what the
/// other callers did, and one file wore out.
#[tokio::test(flavor = "multi_thread")]
async fn requests_are_spread_evenly_over_the_shards() {
    let site = Site::new(&Config::new().pool("int", 0, 1_000_000_000, 4, 10_000));
    site.fill().await;
    let server = site.start().await;
    let index = |name: &str| -> usize {
        let digits = name.strip_prefix("int_shard_").unwrap();
        digits.strip_suffix(".db").unwrap().parse().unwrap()
    };

    // No shard falls below half, so all stay in rotation.
    let mut singles = Vec::new();
    for _ in 0..6_000 {
        let answer = server.get("/random").await;
        singles.push(index(&answer.parse::<One<'_>>().shard));
    }
    let mut batches = Vec::new();
    for _ in 0..2_000 {
        let answer = server.get("/random?count=2").await;
        let many: Many<'_> = answer.parse();
        batches.extend(many.shards.keys().map(|name| index(name)));
    }
    server.stop().await;

    for (what, choices) in [("singles", &singles), ("batches", &batches)] {
        let mut counts = [0; 4];
        let mut pairs = [0; 16];
        for choice in choices {
            counts[*choice] += 1;
        }
        for pair in choices.chunks_exact(2) {
            pairs[pair[0] * 4 + pair[1]] += 1;
        }
        assert_uniform(what, &counts, 3, 1.0);
        assert_uniform(&format!("pairs of {what}"), &pairs, 15, 1.0);
    }
}

/// Story: the seed was fixed. Two new servers handed out the same numbers, and the owner of a third knew them
/// all. With true random draws, a common number has a probability of 10^6 / 2^53, about 10^-10.
#[tokio::test(flavor = "multi_thread")]
async fn two_fresh_servers_have_no_number_in_common() {
    let config = Config::new().pool("int", 0, (1i64 << 53) - 1, 1, 1_000);
    let first = take(config.clone(), 1_000).await;
    let second = take(config, 1_000).await;
    let common: Vec<_> = first.iter().filter(|n| second.contains(n)).collect();
    assert!(common.is_empty(), "{common:?}");
}

/// Takes `count` numbers from a new server with one client, and returns them in the order of their issue.
/// Half are taken one by one, half in batches; the order within a batch counts too.
async fn take(config: Config, count: usize) -> Vec<String> {
    const BATCH: usize = 50;
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    while numbers.len() < count {
        let left = count - numbers.len();
        let next = if left >= 2 * BATCH && numbers.len() % (2 * BATCH) == 0 {
            Some(BATCH as u32)
        } else {
            None
        };
        numbers.extend(server.take("int", next).await);
    }
    server.stop().await;
    numbers
}

/// Returns the bin of a value of `0..range`.
fn bin(value: i64, range: i64, bins: usize) -> usize {
    let bin = i128::from(value) * bins as i128 / i128::from(range);
    usize::try_from(bin).unwrap()
}

/// Tests for equal counts with Pearson's chi-square test, two-sided: counts that are too even are not random
/// either.
fn assert_uniform(what: &str, counts: &[u32], degrees: usize, correction: f64) {
    let total: u32 = counts.iter().sum();
    let expected = f64::from(total) / counts.len() as f64;
    let squares = counts.iter().map(|count| (f64::from(*count) - expected).powi(2));
    let statistic = correction * squares.sum::<f64>() / expected;
    let distribution = ChiSquared::new(degrees as f64).unwrap();
    let tail = distribution.sf(statistic).min(distribution.cdf(statistic));
    assert!(
        tail > ERROR_PROBABILITY / 2.0,
        "{what}: chi-square {statistic:.1} at {degrees} degrees has probability {tail:e}"
    );
}

/// Tests that two orders of ranks are as uncorrelated as random permutations.
fn assert_uncorrelated(what: &str, left: &[i64], right: &[i64]) {
    let count = left.len() as f64;
    let mean = |ranks: &[i64]| ranks.iter().sum::<i64>() as f64 / count;
    let (left_mean, right_mean) = (mean(left), mean(right));
    let (mut product, mut left_square, mut right_square) = (0.0, 0.0, 0.0);
    for (left, right) in left.iter().zip(right) {
        let (left, right) = (*left as f64 - left_mean, *right as f64 - right_mean);
        product += left * right;
        left_square += left * left;
        right_square += right * right;
    }
    let correlation = product / (left_square * right_square).sqrt();
    let deviations = correlation * (count - 1.0).sqrt();
    let tail = 2.0 * Normal::standard().sf(deviations.abs());
    assert!(
        tail > ERROR_PROBABILITY,
        "{what}: correlation {correlation:.4} has probability {tail:e}"
    );
}
