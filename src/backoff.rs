//! The pauses between the tries of an operation that fails. Knows nothing of the operation.

use std::time::Duration;

/// Pauses that double from the first one up to a limit.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    limit: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, limit: Duration) -> Self {
        Self { first, limit, next: first }
    }

    /// Returns the pause before the next try, and doubles the one after it.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.limit);
        pause
    }

    /// Starts over with the first pause, after a try that succeeded.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_limit_until_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(3), Duration::from_millis(10));
        let mut pauses_ms = || [(); 4].map(|()| backoff.next().as_millis());
        assert_eq!(pauses_ms(), [3, 6, 10, 10]);
        backoff.reset();
        assert_eq!(backoff.next().as_millis(), 3);
    }
}
