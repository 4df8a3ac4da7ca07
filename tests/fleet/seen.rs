//! All numbers that all instances handed out, as one bit each, so that half an hour of numbers fits into
//! memory.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The last number of the range. 2^28 numbers take 32 MiB, and hours of this test hand out fewer.
pub(crate) const LAST: u64 = (1 << 28) - 1;

/// How many repeats are kept for the failure message.
const REPEATS_SHOWN: usize = 10;

pub(crate) struct Seen {
    bits: Vec<AtomicU64>,
    count: AtomicU64,
    repeats: Mutex<Vec<String>>,
}

impl Seen {
    pub(crate) fn new() -> Self {
        let mut bits = Vec::new();
        bits.resize_with((LAST / 64 + 1) as usize, AtomicU64::default);
        Self { bits, count: AtomicU64::new(0), repeats: Mutex::new(Vec::new()) }
    }

    /// Records a number as it was sent, with at most `decimals` digits after the point, and the instance
    /// `whose` it is.
    pub(crate) fn note(&self, text: &str, decimals: usize, whose: &str) {
        let number = scaled(text, decimals);
        assert!(number <= LAST, "{text} of {whose} is outside the range");
        let bit = 1 << (number % 64);
        let before = self.bits[(number / 64) as usize].fetch_or(bit, Ordering::SeqCst);
        self.count.fetch_add(1, Ordering::SeqCst);
        if before & bit != 0 {
            let mut repeats = self.repeats.lock().unwrap();
            if repeats.len() < REPEATS_SHOWN {
                repeats.push(format!("{text}, the second time by {whose}"));
            }
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    pub(crate) fn assert_no_repeats(&self) {
        let repeats = self.repeats.lock().unwrap();
        assert!(repeats.is_empty(), "numbers issued twice: {repeats:?} ...");
    }
}

/// Returns the number as a scaled integer: 1.5 with 6 decimals is 1500000.
fn scaled(text: &str, decimals: usize) -> u64 {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    assert!(fraction.len() <= decimals, "{text} has more than {decimals} decimals");
    format!("{whole}{fraction:0<decimals$}").parse().unwrap_or_else(|_| panic!("{text}"))
}
