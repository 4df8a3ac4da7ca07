//! The reports between a pool and its refiller: the shards' levels, the outcomes of refills, and the ledger's
//! figures. Knows nothing of requests.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::buffer::Buffer;
use super::slot::Slot;
use super::sync::Ordering;
use super::{Pool, Trouble};
use crate::batch::{Generation, ShardIndex};
use crate::events::Kind;

/// A shard's supply, for the refiller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    pub index: ShardIndex,
    /// The live generation, if there is one.
    pub live: Option<Generation>,
    /// Numbers that can still be handed out.
    pub left: u64,
    /// Whether the next generation is ready.
    pub standby: bool,
    /// Whether the shard is refilled when it is used up.
    pub refilled: bool,
}

/// The ledger's figures, as reported by the refiller, the only task that may read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerFigures {
    /// Values in the ledger: all that ever entered a shard.
    pub values: u64,
    /// Numbers that the ledger has recorded as burned.
    pub burned: u64,
    /// Numbers that were imported and were in no shard.
    pub imported: u64,
    /// The size of its file and its log.
    pub bytes: u64,
}

/// The ledger's figures, and the numbers that were issued before this process started.
#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) ledger: LedgerFigures,
    /// Numbers issued before the start.
    pub(super) issued_before: u64,
    pub(super) burned_before: u64,
    /// Numbers that were imported before the start, and were in no shard.
    pub(super) imported_before: u64,
    /// Numbers in shards that were imported since the start.
    pub(super) imported_in_shards: u64,
}

impl Books {
    /// Returns the numbers that were imported since the start and could have been issued.
    pub(super) fn imported(&self) -> u64 {
        self.ledger.imported - self.imported_before + self.imported_in_shards
    }
}

/// The outcome of a refill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The next generation is ready.
    Filled,
    /// The refill failed and will be tried again.
    Failed,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 2] = [Self::Filled, Self::Failed];

    /// Returns the outcome's name for programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Filled => "filled",
            Self::Failed => "failed",
        }
    }
}

/// The last refill of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRefill {
    /// The time at which it ended.
    pub at: SystemTime,
    /// How long it took.
    pub took: Duration,
    pub outcome: Outcome,
}

impl Pool {
    /// Returns the supply of every shard.
    pub fn levels(&self) -> Vec<Level> {
        let level = |slot: &Arc<Slot>| {
            slot.look(|buffer| Level {
                index: slot.index,
                live: buffer.generation(),
                left: buffer.left(),
                standby: buffer.has_standby(),
                refilled: slot.refilled,
            })
        };
        self.slots.iter().map(level).collect()
    }

    /// Waits until a shard may need a refill.
    pub(crate) async fn refill_wanted(&self) {
        self.refill_wanted.notified().await;
    }

    /// Returns whether a request was turned away since the last call.
    pub(crate) fn take_starved(&self) -> bool {
        self.starved.swap(false, Ordering::AcqRel)
    }

    /// Reports that a shard's next generation, of `rows` rows, is ready.
    pub(crate) fn standby_ready(&self, shard: ShardIndex, rows: u64) {
        for slot in self.slots.iter().filter(|slot| slot.index == shard) {
            slot.signal(|buffer| buffer.standby_ready(rows));
        }
    }

    /// Sets the refiller's problem, or clears it. Returns whether it changed.
    pub(crate) fn set_refill_trouble(&self, trouble: Option<Trouble>) -> bool {
        let mut current = self.refill_trouble.lock().expect("no holder of it panics");
        let is_new = *current != trouble;
        *current = trouble;
        is_new
    }

    /// Sets whether the ledger has no more values to draw. Returns whether it changed.
    pub(crate) fn set_exhausted(&self, exhausted: bool) -> bool {
        self.exhausted.swap(exhausted, Ordering::AcqRel) != exhausted
    }

    /// Returns how many numbers were burned since the process started that the ledger does not know of.
    pub(crate) fn burned_to_note(&self) -> u64 {
        let burned: u64 = self.slots.iter().map(|slot| slot.look(Buffer::burned)).sum();
        burned - self.burned_noted.load(Ordering::Relaxed)
    }

    /// Adds `count` to the burned numbers that the ledger knows of. Only the refiller calls it.
    pub(crate) fn burned_noted(&self, count: u64) {
        self.burned_noted.fetch_add(count, Ordering::Relaxed);
    }

    /// Returns the generations whose files were closed gracefully, after all workers have ended.
    pub(crate) fn closed_files(&self) -> Vec<(ShardIndex, Generation)> {
        let closed = |slot: &Arc<Slot>| Some((slot.index, slot.look(Buffer::closed_generation)?));
        self.slots.iter().filter_map(closed).collect()
    }

    /// Sets the ledger's figures before anything is handed out.
    pub(crate) fn open_books(&self, ledger: LedgerFigures) {
        let in_slot = |buffer: &Buffer<_>| buffer.left() + buffer.standby().unwrap_or(0);
        let pooled: u64 = self.slots.iter().map(|slot| slot.look(in_slot)).sum();
        let mut books = self.books.lock().expect("no holder of it panics");
        books.ledger = ledger;
        books.burned_before = ledger.burned;
        books.imported_before = ledger.imported;
        books.issued_before = ledger.values.saturating_sub(pooled + ledger.burned);
    }

    /// Updates the ledger's figures after a draw.
    pub(crate) fn note_ledger(&self, ledger: LedgerFigures) {
        let mut books = self.books.lock().expect("no holder of it panics");
        books.ledger = ledger;
    }

    /// Notes that `count` numbers in shards were imported.
    pub(crate) fn note_imported(&self, count: u64) {
        self.books.lock().expect("no holder of it panics").imported_in_shards += count;
    }

    /// Notes that a build of `rows` rows began.
    pub(crate) fn refill_began(&self, shard: ShardIndex, rows: u64) {
        // Each value is drawn and then written.
        self.on_slot(shard, |slot| slot.filling_began(2 * rows));
    }

    /// Notes that `values` more values were drawn or written.
    pub(crate) fn refill_advanced(&self, shard: ShardIndex, values: u64) {
        self.on_slot(shard, |slot| slot.filling_advanced(values));
    }

    /// Notes that the build ended. Without an outcome it was cancelled, or had no values to build from.
    pub(crate) fn refill_ended(&self, shard: ShardIndex, outcome: Option<Outcome>, took: Duration) {
        self.on_slot(shard, |slot| slot.filling_ended(outcome, took));
        if let Some(outcome) = outcome {
            self.refills[outcome as usize].record(took);
        }
    }

    /// Adds an event.
    pub(crate) fn tell(&self, kind: Kind, shard: Option<ShardIndex>, message: String) {
        let shard = shard.map(|shard| self.shard_name(shard));
        self.events.add(kind, Some(&self.name), shard, message);
    }

    fn on_slot(&self, shard: ShardIndex, change: impl FnOnce(&Slot)) {
        if let Some(slot) = self.slots.iter().find(|slot| slot.index == shard) {
            change(slot);
        }
    }
}
