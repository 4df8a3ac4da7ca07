//! A pool's figures, for display and metrics. Does not affect what is handed out.

use std::time::{Duration, SystemTime};

use super::Pool;
use super::buffer::Buffer;
use super::slot::Slot;
use super::sync::Ordering;
use crate::batch::{Generation, ShardIndex};
use crate::events::Kind;
use crate::fleet::Partitions;
use crate::histogram::Durations;

/// The ledger's figures, as reported by the refiller, the only task that may read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerFigures {
    /// Values in the ledger: all that ever entered a shard.
    pub values: u64,
    /// Numbers that the ledger has recorded as burned.
    pub burned: u64,
    /// The size of its file and its log.
    pub bytes: u64,
}

/// The ledger's figures, and the numbers that were issued before this process started.
#[derive(Debug, Default)]
pub(super) struct Books {
    ledger: LedgerFigures,
    /// Numbers issued before the start.
    issued_before: u64,
    burned_before: u64,
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
    #[must_use]
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
    /// Its outcome.
    pub outcome: Outcome,
}

/// The state of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// Requests take numbers from it.
    InRotation,
    /// It is used up, and its next generation is being built or installed.
    Refilling,
    /// It is used up, and nothing is being built for it.
    Depleted,
    /// Its file was set aside, and the next generation is not serving yet.
    Damaged,
}

impl ShardState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::InRotation, Self::Refilling, Self::Depleted, Self::Damaged];

    /// Returns the state's name for programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InRotation => "in_rotation",
            Self::Refilling => "refilling",
            Self::Depleted => "depleted",
            Self::Damaged => "damaged",
        }
    }
}

/// The figures of one shard.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardFigures {
    /// The name of its live file.
    pub name: String,
    /// Its state.
    pub state: ShardState,
    /// Rows of the live generation that are not handed out.
    pub left: u64,
    /// The live generation, if there is one.
    pub generation: Option<Generation>,
    /// The number of rows in the next generation, if it is ready.
    pub standby: Option<u64>,
    /// The completed share of a running build.
    pub progress: Option<f64>,
    /// The last refill since the process started.
    pub last_refill: Option<LastRefill>,
    /// Numbers handed out since the process started.
    pub issued: u64,
    /// Durations of its leases.
    pub leases: Durations,
}

/// The figures of a pool. Issued, pooled, burned and free add up to the numbers that this instance may draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Numbers ever handed out. All used rows of a file that was damaged at a start count as handed out.
    pub issued: u64,
    /// Numbers that are available: in live shards, in leases and in standbys.
    pub pooled: u64,
    /// An upper bound of the numbers that are lost.
    pub burned: u64,
    /// Numbers that this instance may draw and that never entered a shard.
    pub free: u64,
    /// Numbers that this instance has drawn or may draw: the whole range. In a fleet, the average number of
    /// values in its partitions and in those that it may claim.
    pub drawable: u64,
    /// The partitions, in a fleet.
    pub partitions: Option<Partitions>,
    /// The ledger's figures.
    pub ledger: LedgerFigures,
    /// The shards' figures.
    pub shards: Vec<ShardFigures>,
    /// Durations of refills, by outcome.
    pub refills: [(Outcome, Durations); 2],
}

impl Pool {
    /// Returns the pool's figures.
    #[must_use]
    pub fn figures(&self) -> Figures {
        // The ledger comes first: values that enter it after this are not in any shard yet.
        let (ledger, issued_before, burned_before) = {
            let books = self.books.lock().expect("no holder of it panics");
            (books.ledger, books.issued_before, books.burned_before)
        };
        let rotation = self.rotation.load();
        let mut in_rotation = vec![false; self.slots.len()];
        rotation.iter().for_each(|&position| in_rotation[position] = true);
        let shards = self.slots.iter().zip(in_rotation);
        let shards: Vec<_> =
            shards.map(|(slot, in_rotation)| shard_figures(slot, in_rotation)).collect();
        let handed_out = shards.iter().map(|shard| shard.issued).sum::<u64>();
        let issued = (issued_before + handed_out).saturating_sub(self.leftovers());
        let burned_now: u64 = self.slots.iter().map(|slot| slot.look(Buffer::burned)).sum();
        let burned = burned_before + burned_now;
        let partitions = self.partitions();
        let drawable = match partitions {
            None => self.space.size(),
            // Its partitions may have slightly more or fewer values than average.
            Some(_) if self.exhausted.load(Ordering::Acquire) => ledger.values,
            Some(partitions) => partitions.share_of(self.space.size()).max(ledger.values),
        };
        Figures {
            issued,
            pooled: ledger.values.saturating_sub(issued + burned),
            burned,
            free: drawable.saturating_sub(ledger.values),
            drawable,
            partitions,
            ledger,
            shards,
            refills: Outcome::ALL
                .map(|outcome| (outcome, self.refills[outcome as usize].durations())),
        }
    }

    /// Returns the numbers ever handed out, as in [`figures`](Self::figures).
    #[must_use]
    pub fn issued(&self) -> u64 {
        let before = self.books.lock().expect("no holder of it panics").issued_before;
        let handed_out = self.slots.iter().map(|slot| slot.look(Buffer::issued)).sum::<u64>();
        (before + handed_out).saturating_sub(self.leftovers())
    }

    /// Returns how many numbers were collected for a request that is gone. The next request gets them.
    fn leftovers(&self) -> u64 {
        self.leftovers.lock().expect("no holder of it panics").len() as u64
    }

    /// Sets the ledger's figures before anything is handed out.
    pub(crate) fn open_books(&self, ledger: LedgerFigures) {
        let in_slot = |buffer: &Buffer<_>| buffer.left() + buffer.standby().unwrap_or(0);
        let pooled: u64 = self.slots.iter().map(|slot| slot.look(in_slot)).sum();
        let mut books = self.books.lock().expect("no holder of it panics");
        books.ledger = ledger;
        books.burned_before = ledger.burned;
        books.issued_before = ledger.values.saturating_sub(pooled + ledger.burned);
    }

    /// Updates the ledger's figures after a draw.
    pub(crate) fn note_ledger(&self, ledger: LedgerFigures) {
        let mut books = self.books.lock().expect("no holder of it panics");
        books.ledger = ledger;
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

fn shard_figures(slot: &Slot, in_rotation: bool) -> ShardFigures {
    let filling = slot.filling();
    let running = filling.running;
    slot.look(|buffer| ShardFigures {
        name: slot.name.to_string(),
        state: match in_rotation {
            true => ShardState::InRotation,
            false if buffer.is_damaged() => ShardState::Damaged,
            false if running.is_some() || buffer.has_standby() => ShardState::Refilling,
            false => ShardState::Depleted,
        },
        left: buffer.left(),
        generation: buffer.generation(),
        standby: buffer.standby(),
        progress: running.map(|(done, all)| done as f64 / all.max(1) as f64),
        last_refill: filling.last,
        issued: buffer.issued(),
        leases: slot.leases.durations(),
    })
}
