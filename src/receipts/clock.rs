//! Decides when expired idempotency keys may be removed. Knows nothing of keys.

use std::time::{Duration, Instant, SystemTime};

use tracing::warn;

/// Buckets in the time for which keys are kept.
pub(super) const BUCKETS: u32 = 4;

/// The longest pause between two looks at the clock. A bucket may end at one look and be dropped at another, so
/// these two make keys expire up to an hour later.
const LOOK_MAX: Duration = Duration::from_secs(1_800);

/// Decides whether the system's clock can be trusted: a clock that jumped ahead would make all keys expire at
/// once. Pure.
#[derive(Debug)]
pub(super) struct Clock {
    /// The length of a bucket. A longer jump is not trusted, until the clock has run for as long after it.
    bucket: Duration,
    /// The system's clock and the steady one at the last look.
    last: (SystemTime, Instant),
    /// Until when the system's clock is not trusted.
    distrusted: Option<Instant>,
}

impl Clock {
    /// `trusted` is the last time that was trusted, of an earlier process.
    pub(super) fn new(
        bucket: Duration,
        trusted: SystemTime,
        now: SystemTime,
        steady: Instant,
    ) -> Self {
        let mut clock = Self { bucket, last: (trusted, steady), distrusted: None };
        clock.look(now, steady);
        clock
    }

    /// Returns whether it is time for another look.
    pub(super) fn is_due(&self, steady: Instant) -> bool {
        steady - self.last.1 >= (self.bucket / 4).min(LOOK_MAX)
    }

    /// Looks at the clock. Returns whether it can be trusted.
    pub(super) fn look(&mut self, now: SystemTime, steady: Instant) -> bool {
        let (last, last_steady) = self.last;
        let ahead = now.duration_since(last).unwrap_or_default();
        let jump = ahead.saturating_sub(steady - last_steady);
        if jump > self.bucket {
            warn!(
                jump = %humantime::format_duration(Duration::from_secs(jump.as_secs())),
                postponed = %humantime::format_duration(self.bucket),
                "the clock is far ahead of when the server last saw it, so the expiry of idempotency keys is \
                 postponed; correct the clock if it is wrong"
            );
            self.distrusted = Some(steady + self.bucket);
        } else if now < last {
            // It was corrected.
            self.distrusted = None;
        }
        self.last = (now, steady);
        if self.distrusted.is_some_and(|until| steady >= until) {
            self.distrusted = None;
        }
        self.distrusted.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::from_millis;
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_clock_that_jumps_ahead_by_more_than_a_bucket_is_trusted_after_a_bucket() {
        let (start, steady) = (from_millis(1_000_000_000_000), Instant::now());
        let mut clock = Clock::new(HOUR, start, start, steady);
        assert!(clock.look(start + HOUR, steady + HOUR));
        // A jump of a day.
        let ahead = |hours: u32| start + HOUR * (24 + hours);
        assert!(!clock.look(ahead(2), steady + 2 * HOUR));
        assert!(!clock.look(ahead(2) + HOUR / 2, steady + 2 * HOUR + HOUR / 2));
        assert!(clock.look(ahead(3), steady + 3 * HOUR));
    }

    #[test]
    fn a_corrected_clock_is_trusted_at_once() {
        let (start, steady) = (from_millis(1_000_000_000_000), Instant::now());
        let mut clock = Clock::new(HOUR, start, start + 24 * HOUR, steady);
        assert!(!clock.look(start + 24 * HOUR, steady));
        assert!(clock.look(start, steady));
    }

    #[test]
    fn a_small_jump_and_a_jump_back_are_trusted() {
        let (start, steady) = (from_millis(1_000_000_000_000), Instant::now());
        let mut clock = Clock::new(HOUR, start, start + HOUR, steady);
        assert!(clock.look(start + HOUR, steady));
        assert!(clock.look(start - 10 * HOUR, steady + HOUR));
    }
}
