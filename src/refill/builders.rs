//! Limits how many generations are built at once, over all pools of a server. Knows nothing of files.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// See the [module](self).
#[derive(Debug)]
pub struct Builders {
    turns: Arc<Semaphore>,
    /// Held by the one build ahead of need that waits for a turn. All others wait for this.
    next_standby: Semaphore,
    /// The pools that have nothing to serve and wait for a turn.
    dry: AtomicUsize,
}

/// The right to build, until it is dropped.
pub(super) type Turn = OwnedSemaphorePermit;

impl Default for Builders {
    /// Allows as many builds at once as there are cores, since a build keeps a core busy.
    fn default() -> Self {
        Self::new(num_cpus::get())
    }
}

impl Builders {
    fn new(count: usize) -> Self {
        let turns = Arc::new(Semaphore::new(count));
        Self { turns, next_standby: Semaphore::new(1), dry: AtomicUsize::new(0) }
    }

    /// Waits for the turn of a pool that has nothing to serve. It overtakes all builds ahead of need, except one.
    pub(super) async fn urgent(&self) -> Turn {
        self.dry.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.dry);
        self.turn().await
    }

    /// Returns the turn of a pool that builds ahead of need, if there is one at once.
    pub(super) fn free(&self) -> Option<Turn> {
        Arc::clone(&self.turns).try_acquire_owned().ok()
    }

    /// Waits for the turn of a pool that builds ahead of need. If it runs dry before that, it waits for an
    /// [urgent](Self::urgent) one.
    pub(super) async fn ahead_of_need(&self, runs_dry: impl Future<Output = ()>) -> Turn {
        let turn = async {
            let _next = self.next_standby.acquire().await.expect(NEVER_CLOSED);
            self.turn().await
        };
        // Its place in the line is given up before it gets another one: a turn that it got there would be lost.
        let turn = tokio::select! {
            turn = turn => Some(turn),
            () = runs_dry => None,
        };
        match turn {
            Some(turn) => turn,
            None => self.urgent().await,
        }
    }

    /// Returns the number of pools that have nothing to serve and wait for a turn.
    pub(super) fn dry(&self) -> usize {
        self.dry.load(Ordering::Relaxed)
    }

    async fn turn(&self) -> Turn {
        Arc::clone(&self.turns).acquire_owned().await.expect(NEVER_CLOSED)
    }
}

/// A pool that waits.
struct Waiting<'b>(&'b AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const NEVER_CLOSED: &str = "the semaphores are never closed";

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::*;

    /// Story: each of a thousand pools waited behind the standbys of all pools before it.
    #[tokio::test]
    async fn a_pool_that_has_nothing_overtakes_builds_ahead_of_need() {
        let builders = Arc::new(Builders::new(1));
        let running = builders.urgent().await;
        let built = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for name in ["standby 1", "standby 2", "standby 3", "urgent 1", "urgent 2"] {
            let (builders, built) = (Arc::clone(&builders), Arc::clone(&built));
            tasks.push(tokio::spawn(async move {
                let _turn = match name.starts_with("urgent") {
                    true => builders.urgent().await,
                    false => builders.ahead_of_need(pending()).await,
                };
                built.lock().unwrap().push(name);
            }));
            // The task waits from here on.
            yield_now().await;
        }
        assert_eq!(*built.lock().unwrap(), [""; 0], "one build at a time");
        assert_eq!(builders.dry(), 2);
        drop(running);
        for task in tasks {
            task.await.unwrap();
        }
        let expected = ["standby 1", "urgent 1", "urgent 2", "standby 2", "standby 3"];
        assert_eq!(*built.lock().unwrap(), expected);
        assert_eq!(builders.dry(), 0);
    }

    /// Story: a pool that ran dry while it waited kept its place as a build ahead of need. The turn that came to this
    /// place was never used, so no pool was filled any more.
    #[tokio::test]
    async fn a_pool_that_runs_dry_while_it_waits_loses_no_turn() {
        let builders = Arc::new(Builders::new(1));
        let running = builders.urgent().await;
        let (runs_dry, ran_dry) = oneshot::channel();
        let waiting = tokio::spawn({
            let builders = Arc::clone(&builders);
            async move { drop(builders.ahead_of_need(async { ran_dry.await.unwrap() }).await) }
        });
        yield_now().await;
        runs_dry.send(()).unwrap();
        yield_now().await;
        assert_eq!(builders.dry(), 1);
        drop(running);
        timeout(Duration::from_secs(10), waiting).await.expect("it gets the turn").unwrap();
        assert!(builders.free().is_some(), "the turn is free again");
    }
}
