//! The threads that serve connections. Each has a runtime of its own, so that a connection stays on one
//! thread and wakes no other: half of the cost of a request is the kernel's, and much of that is waking
//! threads. The workers of the shards run there too, since a worker wakes all requests that wait for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::traffic::{self, Traffic};

/// The blocking threads of all lanes together, on which the workers wait for the disk. More leases at once are
/// not faster, since the disk completes syncs in groups.
const BLOCKING_THREADS: usize = 32;

/// The blocking threads of each lane, if there are many lanes.
const BLOCKING_THREADS_MIN: usize = 4;

/// See the [module](self). Dropping them ends the threads.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    next: AtomicUsize,
}

#[derive(Debug)]
struct Lane {
    runtime: Handle,
    counts: Arc<traffic::Lane>,
    /// Ends the thread when dropped, and the thread; none if the runtime is the caller's.
    thread: Option<(oneshot::Sender<()>, thread::JoinHandle<()>)>,
}

impl Lanes {
    /// Returns the number of threads: one fewer than there are cores, so that leases and builds don't have to
    /// wait for a core, and at least one.
    pub(super) fn count() -> usize {
        num_cpus::get().saturating_sub(1).max(1)
    }

    /// Returns one lane that is the runtime of the caller, with a block of counts.
    pub(super) fn of_caller(traffic: &Traffic) -> Self {
        let counts = Arc::clone(&traffic.lanes()[0]);
        Self {
            lanes: vec![Lane { runtime: Handle::current(), counts, thread: None }],
            next: AtomicUsize::new(0),
        }
    }

    /// Starts a thread for each block of counts.
    pub(super) fn start(traffic: &Traffic) -> io::Result<Self> {
        let lanes = traffic.lanes();
        let blocking = (BLOCKING_THREADS / lanes.len()).max(BLOCKING_THREADS_MIN);
        let lanes = lanes.iter().enumerate();
        let lanes = lanes.map(|(number, counts)| Lane::start(number, Arc::clone(counts), blocking));
        let lanes = lanes.collect::<io::Result<_>>()?;
        Ok(Self { lanes, next: AtomicUsize::new(0) })
    }

    /// Returns the runtime for the next connection and the counts of its thread. The threads take turns.
    pub(super) fn next(&self) -> (&Handle, &Arc<traffic::Lane>) {
        let lane = &self.lanes[self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len()];
        (&lane.runtime, &lane.counts)
    }

    /// Runs a task on the next thread.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.next().0.spawn(task)
    }
}

impl Lane {
    fn start(number: usize, counts: Arc<traffic::Lane>, blocking: usize) -> io::Result<Self> {
        let runtime =
            Builder::new_current_thread().enable_all().max_blocking_threads(blocking).build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || runtime.block_on(async { stopped.await.unwrap_or(()) });
        let thread = thread::Builder::new().name(format!("lane-{number}")).spawn(run)?;
        Ok(Self { runtime: handle, counts, thread: Some((stop, thread)) })
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for (stop, thread) in self.lanes.drain(..).filter_map(|lane| lane.thread) {
            drop(stop);
            thread.join().expect("a lane only runs tasks, and a task's panic stays its own");
        }
    }
}
