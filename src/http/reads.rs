//! Reads for responses, of figures and receipts, on blocking threads. Knows nothing of what is read.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};

/// The most reads at once. A read may hold its thread until a database responds, and must not take the threads
/// that builds need.
const READS_MAX: usize = 16;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Reads {
    runtime: Handle,
    turns: Arc<Semaphore>,
}

impl Reads {
    /// Runs reads on the caller's runtime. The lanes have threads for leases only.
    pub(super) fn new() -> Self {
        Self { runtime: Handle::current(), turns: Arc::new(Semaphore::new(READS_MAX)) }
    }

    /// Starts a read, which waits for its turn.
    pub(super) fn start<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let turns = Arc::clone(&self.turns);
        self.runtime.spawn(async move {
            let _turn = turns.acquire().await.expect("the semaphore is never closed");
            spawn_blocking(read).await.expect("reading does not panic")
        })
    }
}
