//! The slot of one shard in a pool: its lease buffer, shared by requests and the shard's worker. Knows
//! nothing of the file.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

use super::buffer::{Buffer, Delivery, Take, Task};
use super::sync::{Mutex, MutexGuard};
use super::{LastRefill, Outcome, Trouble};
use crate::batch::{Generation, ShardIndex};
use crate::histogram::Histogram;
use crate::shard::Row;
use crate::space::Value;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) index: ShardIndex,
    /// The live file's name, which responses contain.
    pub(super) name: Arc<str>,
    /// Whether the shard is refilled when it is used up. A shard beyond the configured number is not.
    pub(super) refilled: bool,
    buffer: Mutex<Buffer<Loan>>,
    /// Wakes the shard's worker.
    wake: Notify,
    /// The problem that keeps the shard from leasing, for `/health`.
    trouble: Mutex<Option<Trouble>>,
    /// Durations of its leases.
    pub(super) leases: Histogram,
    filling: Mutex<Filling>,
}

/// The progress of a shard's next generation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filling {
    /// The completed steps and all steps of a running build.
    pub(super) running: Option<(u64, u64)>,
    pub(super) last: Option<LastRefill>,
}

impl Slot {
    pub(super) fn new(index: ShardIndex, name: &str, refilled: bool, buffer: Buffer<Loan>) -> Self {
        Self {
            index,
            name: name.into(),
            refilled,
            buffer: Mutex::new(buffer),
            wake: Notify::new(),
            trouble: Mutex::new(None),
            leases: Histogram::default(),
            filling: Mutex::default(),
        }
    }

    /// Takes one leased row.
    pub(super) fn pop(&self) -> Option<Value> {
        let mut buffer = self.lock();
        let row = buffer.pop();
        self.release(buffer);
        row.map(|row| row.value)
    }

    /// Takes `count` rows if they are leased.
    pub(super) fn try_take(self: &Arc<Self>, count: usize) -> Option<Loan> {
        let mut buffer = self.lock();
        let taken = buffer.try_take(count);
        self.release(buffer);
        taken.map(|(rows, generation)| self.loan(rows, generation))
    }

    /// Takes `count` rows, or up to that many if `partial` is set, and waits until the worker has leased
    /// them. Returns `None` if this generation has too few.
    pub(super) async fn take(self: &Arc<Self>, count: usize, partial: bool) -> Option<Loan> {
        let taken = {
            let mut buffer = self.lock();
            let taken = buffer.take(count, partial);
            self.release(buffer);
            taken
        };
        match taken {
            Take::Rows(rows, generation) => Some(self.loan(rows, generation)),
            Take::Wait(reply) => reply.await.ok(),
            Take::Short => None,
        }
    }

    /// Serves the waiting requests, and returns the worker's next task.
    pub(super) fn next(self: &Arc<Self>) -> Task {
        let mut deliveries = Vec::new();
        let task = self.lock().next(&mut deliveries);
        // The lock is free here, since a loan whose request is gone takes it to return its rows.
        for Delivery { rows, generation, reply } in deliveries {
            let _ = reply.send(self.loan(rows, generation));
        }
        task
    }

    /// Changes the buffer.
    pub(super) fn update<R>(&self, change: impl FnOnce(&mut Buffer<Loan>) -> R) -> R {
        change(&mut self.lock())
    }

    /// Changes the buffer, then wakes the worker.
    pub(super) fn signal(&self, change: impl FnOnce(&mut Buffer<Loan>)) {
        self.update(change);
        self.wake.notify_one();
    }

    /// Reads the buffer.
    pub(super) fn look<R>(&self, look: impl FnOnce(&Buffer<Loan>) -> R) -> R {
        look(&self.lock())
    }

    /// Waits until there may be something to do.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Returns the problem that keeps the shard from leasing.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().expect(NO_PANIC).clone()
    }

    pub(super) fn set_trouble(&self, trouble: Option<Trouble>) {
        *self.trouble.lock().expect(NO_PANIC) = trouble;
    }

    /// Returns the progress of the next generation.
    pub(super) fn filling(&self) -> Filling {
        *self.filling.lock().expect(NO_PANIC)
    }

    /// Notes that a build of `steps` steps began.
    pub(super) fn filling_began(&self, steps: u64) {
        self.filling.lock().expect(NO_PANIC).running = Some((0, steps));
    }

    pub(super) fn filling_advanced(&self, steps: u64) {
        if let Some((done, _)) = &mut self.filling.lock().expect(NO_PANIC).running {
            *done += steps;
        }
    }

    /// Notes that the build ended. Without an outcome it was cancelled.
    pub(super) fn filling_ended(&self, outcome: Option<Outcome>, took: Duration) {
        let mut filling = self.filling.lock().expect(NO_PANIC);
        filling.running = None;
        if let Some(outcome) = outcome {
            filling.last = Some(LastRefill { at: SystemTime::now(), took, outcome });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer<Loan>> {
        self.buffer.lock().expect(NO_PANIC)
    }

    /// Wakes the worker if the last change requires it.
    fn release(&self, mut buffer: MutexGuard<'_, Buffer<Loan>>) {
        let calls = buffer.calls_worker();
        drop(buffer);
        if calls {
            self.wake.notify_one();
        }
    }

    fn loan(self: &Arc<Self>, rows: Vec<Row>, generation: Generation) -> Loan {
        Loan { slot: Arc::clone(self), rows, generation, settled: false }
    }
}

/// A poisoned lock means that the buffer's own code panicked.
const NO_PANIC: &str = "the buffer's code does not panic";

/// Rows that a request holds but has not handed out. If it is dropped, the rows go back, so a request whose
/// caller is gone takes nothing.
#[derive(Debug)]
pub(super) struct Loan {
    slot: Arc<Slot>,
    rows: Vec<Row>,
    generation: Generation,
    settled: bool,
}

impl Loan {
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn is_of(&self, slot: &Arc<Slot>) -> bool {
        Arc::ptr_eq(&self.slot, slot)
    }

    /// Returns whether the shard can go on to its next generation once these rows are handed out.
    pub(super) fn can_end_generation(&self) -> bool {
        self.slot.look(|buffer| buffer.has_standby() && buffer.left() == 0)
    }

    /// Returns the shard's name and the values.
    pub(super) fn part(&self) -> (Arc<str>, Vec<Value>) {
        (Arc::clone(&self.slot.name), self.rows.iter().map(|row| row.value).collect())
    }

    /// Hands out the rows. Returns the shard's name and the values.
    pub(super) fn settle(mut self) -> (Arc<str>, Vec<Value>) {
        self.settled = true;
        self.part()
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut buffer = self.slot.lock();
        if self.settled {
            buffer.loan_settled(self.rows.len());
        } else {
            let burned = buffer.loan_returned(&mut self.rows, self.generation);
            if burned > 0 {
                tracing::warn!(
                    shard = %self.slot.name, burned,
                    "numbers on loan are burned: their shard file is no longer the live one"
                );
            }
        }
        self.slot.release(buffer);
    }
}
