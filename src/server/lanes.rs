//! The threads that answer. Each has a runtime of its own, so that a connection stays on one thread and
//! wakes no other one: half of what a request costs is the kernel's, and much of that is waking.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::traffic::{self, Traffic};

/// See the [module](self). They end when dropped.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    next: usize,
}

#[derive(Debug)]
struct Lane {
    runtime: Handle,
    counts: Arc<traffic::Lane>,
    /// Dropped, it ends the thread.
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Lanes {
    /// One thread less than there are cores: what leases and builds must not have to wait.
    pub(super) fn count() -> usize {
        num_cpus::get().saturating_sub(1).max(1)
    }

    /// A thread for each block of counts.
    pub(super) fn start(traffic: &Traffic) -> io::Result<Self> {
        let lanes = traffic.lanes().iter().enumerate();
        let lanes = lanes.map(|(number, counts)| Lane::start(number, Arc::clone(counts)));
        let lanes = lanes.collect::<io::Result<_>>()?;
        Ok(Self { lanes, next: 0 })
    }

    /// The runtime for the next connection, and the counts of its thread: in turn.
    pub(super) fn next(&mut self) -> (&Handle, &Arc<traffic::Lane>) {
        self.next = (self.next + 1) % self.lanes.len();
        let lane = &self.lanes[self.next];
        (&lane.runtime, &lane.counts)
    }
}

impl Lane {
    fn start(number: usize, counts: Arc<traffic::Lane>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || runtime.block_on(async { stopped.await.unwrap_or(()) });
        let thread = thread::Builder::new().name(format!("lane-{number}")).spawn(run)?;
        Ok(Self { runtime: handle, counts, stop, thread })
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for Lane { stop, thread, .. } in self.lanes.drain(..) {
            drop(stop);
            thread.join().expect("a lane only runs tasks, and a task's panic stays its own");
        }
    }
}
