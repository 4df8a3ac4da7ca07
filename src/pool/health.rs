//! A pool's health: whether it serves, and its problems.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use super::buffer::Buffer;
use super::sync::Ordering;
use super::{Pool, TakeError};
use crate::sqlite;

/// The health of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolHealth {
    /// The number of shards in rotation.
    pub in_rotation: usize,
    pub shards: usize,
    /// Whether the pool can hand out numbers.
    pub serves: bool,
    /// Whether the range is used up, or in a fleet the part that this instance may draw.
    pub exhausted: bool,
    /// Whether other instances draw from the range too.
    pub shared: bool,
    /// Whether the refiller and all workers are running.
    pub alive: bool,
    /// The problem that the pool has, if any.
    pub trouble: Option<Trouble>,
}

/// A problem of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The cause, for callers who may not see the details.
    pub cause: Cause,
    /// A description with files, addresses and errors.
    pub details: String,
}

/// The cause of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The disk has no space left.
    DiskFull,
    /// A shard can't be opened or leased from.
    Shard,
    /// A shard can't be refilled.
    Refill,
    /// In a fleet, a step of the fence fails.
    Fence,
    /// In a fleet, the folder was an old copy.
    Copy,
}

impl Trouble {
    /// Creates a problem from an error, which may reveal a more specific cause.
    pub(crate) fn new(cause: Cause, details: String, error: &(dyn Error + 'static)) -> Self {
        let is_full = |error: &(dyn Error + 'static)| {
            let file = error.downcast_ref::<io::Error>().map(io::Error::kind);
            matches!(file, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
                || error.downcast_ref().is_some_and(sqlite::is_full)
                || error.downcast_ref().is_some_and(sqlite::is_full_code)
        };
        let mut errors = std::iter::successors(Some(error), |&error| error.source());
        let cause = if errors.any(is_full) { Cause::DiskFull } else { cause };
        Self { cause, details }
    }
}

impl Pool {
    /// Returns whether the pool can hand out numbers. A shard that can't lease at the moment stays in
    /// rotation, because of its leased rows.
    pub fn serves(&self) -> bool {
        self.has_orphans.load(Ordering::Relaxed)
            || self.rotation.load().iter().any(|&at| self.slots[at].look(Buffer::can_serve))
    }

    pub fn health(&self) -> PoolHealth {
        let refill_trouble = self.refill_trouble.lock().expect("no holder of it panics").clone();
        let shard_trouble = self.slots.iter().find_map(|slot| slot.trouble());
        let fleet_trouble = self.gate.as_ref().and_then(|gate| {
            let (_, steps) = gate.figures();
            let cause = if steps { Cause::Copy } else { Cause::Fence };
            gate.trouble().map(|details| Trouble { cause, details })
        });
        PoolHealth {
            in_rotation: self.rotation.load().len(),
            shards: self.slots.len(),
            serves: self.serves(),
            shared: self.is_shared(),
            exhausted: self.nothing_left(1) != TakeError::Refilling,
            alive: self.dead_tasks.load(Ordering::Relaxed) == 0,
            trouble: shard_trouble.or(refill_trouble).or(fleet_trouble),
        }
    }

    /// Returns a guard that counts its task as dead unless [`TaskWatch::end`] is called.
    pub(crate) fn watch_task(self: &Arc<Self>) -> TaskWatch {
        TaskWatch { pool: Arc::clone(self), ended: false }
    }
}

/// Turns the pool's health red if its task ends unexpectedly.
#[derive(Debug)]
pub(crate) struct TaskWatch {
    pool: Arc<Pool>,
    ended: bool,
}

impl TaskWatch {
    /// Marks the end of the task as expected.
    pub(crate) fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for TaskWatch {
    fn drop(&mut self) {
        if !self.ended {
            self.pool.dead_tasks.fetch_add(1, Ordering::Relaxed);
        }
    }
}
