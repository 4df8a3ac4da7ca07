//! The synchronisation primitives of the pool's tasks. The crate's unit tests use shuttle's instead, so that
//! `model` can run the pool through thousands of schedules. Tokio's `Notify`, `oneshot` and `Mutex` are the
//! same in both.

pub(super) use self::system::*;

#[cfg(not(test))]
mod system {
    pub(in crate::pool) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(in crate::pool) use std::sync::{Mutex, MutexGuard};

    pub(in crate::pool) use rand::rng;
    pub(in crate::pool) use tokio::time::timeout;
}

#[cfg(test)]
mod system {
    use std::time::Duration;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    pub(in crate::pool) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(in crate::pool) use shuttle::sync::{Mutex, MutexGuard};

    /// Randomness from the schedule, so that a schedule can be replayed.
    pub(in crate::pool) fn rng() -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng()))
    }

    /// Time passes whenever the schedule says so.
    pub(in crate::pool) async fn timeout<T>(
        _: Duration,
        wait: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::select! { biased;
            done = wait => Some(done),
            () = shuttle::future::yield_now() => None,
        }
    }
}
