//! A pool in figures, for those who watch. Changes nothing of what is handed out.

use std::time::{Duration, SystemTime};

use super::Pool;
use super::buffer::Buffer;
use super::slot::Slot;
use crate::batch::{Generation, ShardIndex};
use crate::events::Kind;
use crate::histogram::Durations;
use crate::ledger::Draws;

/// What the refiller, the only one who may look, says of the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerFigures {
    /// Values in it: all that ever entered a shard.
    pub values: u64,
    /// Numbers that it has noted as burned.
    pub burned: u64,
    /// Its file and its log on the disk.
    pub bytes: u64,
}

/// What is known of the ledger, and what was issued before this process.
#[derive(Debug, Default)]
pub(super) struct Books {
    ledger: LedgerFigures,
    draws: Draws,
    /// Of the values in the ledger at the start.
    issued_before: u64,
    burned_before: u64,
}

/// How a refill ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The next generation lies ready.
    Filled,
    /// It is tried again.
    Failed,
}

impl Outcome {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Filled, Self::Failed];

    /// A word for programs.
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
    /// When it ended.
    pub at: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// How it ended.
    pub outcome: Outcome,
}

/// Where a shard is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// Requests draw from it.
    InRotation,
    /// Used up, and its next generation is being built or put in place.
    Refilling,
    /// Used up, and nothing is being built for it.
    Depleted,
    /// Its file was set aside, and the next generation does not serve yet.
    Damaged,
}

impl ShardState {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::InRotation, Self::Refilling, Self::Depleted, Self::Damaged];

    /// A word for programs.
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

/// A shard in figures.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardFigures {
    /// The name of its live file.
    pub name: String,
    /// Where it is in its life.
    pub state: ShardState,
    /// Rows of the live generation that are not handed out.
    pub left: u64,
    /// The live generation, where there is one.
    pub generation: Option<Generation>,
    /// Rows of the next generation, where it lies ready.
    pub standby: Option<u64>,
    /// The share of the next generation that is built, while a build runs.
    pub progress: Option<f64>,
    /// The last refill in the life of the process.
    pub last_refill: Option<LastRefill>,
    /// Numbers handed out in the life of the process.
    pub issued: u64,
    /// How long its leases took.
    pub leases: Durations,
}

/// A pool in figures. Issued, pooled, burned and free are the whole range.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Numbers ever handed out; with them, of files that were damaged at a start, what nobody can tell.
    pub issued: u64,
    /// Numbers that lie ready: in live shards, in leases and in standbys.
    pub pooled: u64,
    /// Numbers that were lost and never come, at most.
    pub burned: u64,
    /// Numbers that never entered a shard.
    pub free: u64,
    /// The ledger.
    pub ledger: LedgerFigures,
    /// The ledger's draws in the life of the process.
    pub draws: Draws,
    /// The shards.
    pub shards: Vec<ShardFigures>,
    /// How long refills took, by their outcome.
    pub refills: [(Outcome, Durations); 2],
}

impl Pool {
    /// The pool in figures.
    #[must_use]
    pub fn figures(&self) -> Figures {
        // First the ledger: what enters it meanwhile is not in any shard then.
        let (ledger, draws, issued_before, burned_before) = {
            let books = self.books.lock().expect("nothing panics with it");
            (books.ledger, books.draws, books.issued_before, books.burned_before)
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
        Figures {
            issued,
            pooled: ledger.values.saturating_sub(issued + burned),
            burned,
            free: self.space.size().saturating_sub(ledger.values),
            ledger,
            draws,
            shards,
            refills: Outcome::ALL
                .map(|outcome| (outcome, self.refills[outcome as usize].durations())),
        }
    }

    /// Numbers ever handed out, as in [`figures`](Self::figures).
    #[must_use]
    pub fn issued(&self) -> u64 {
        let before = self.books.lock().expect("nothing panics with it").issued_before;
        let handed_out = self.slots.iter().map(|slot| slot.look(Buffer::issued)).sum::<u64>();
        (before + handed_out).saturating_sub(self.leftovers())
    }

    /// Numbers that left their shard with a request whose caller went away: the next one's.
    fn leftovers(&self) -> u64 {
        self.leftovers.lock().expect("nothing panics with it").len() as u64
    }

    /// What the refiller finds in the ledger before anything is handed out.
    pub(crate) fn open_books(&self, ledger: LedgerFigures) {
        let in_slot = |buffer: &Buffer<_>| buffer.left() + buffer.standby().unwrap_or(0);
        let pooled: u64 = self.slots.iter().map(|slot| slot.look(in_slot)).sum();
        let mut books = self.books.lock().expect("nothing panics with it");
        books.ledger = ledger;
        books.burned_before = ledger.burned;
        books.issued_before = ledger.values.saturating_sub(pooled + ledger.burned);
    }

    /// What the refiller finds in the ledger after a draw, and what was drawn for it.
    pub(crate) fn note_ledger(&self, ledger: LedgerFigures, draws: Draws) {
        let mut books = self.books.lock().expect("nothing panics with it");
        books.ledger = ledger;
        books.draws += draws;
    }

    /// A build of so many rows began.
    pub(crate) fn refill_began(&self, shard: ShardIndex, rows: u64) {
        // Each value is drawn, and then written.
        self.on_slot(shard, |slot| slot.filling_began(2 * rows));
    }

    /// So many values more were drawn or written.
    pub(crate) fn refill_advanced(&self, shard: ShardIndex, values: u64) {
        self.on_slot(shard, |slot| slot.filling_advanced(values));
    }

    /// The build is over; without an outcome it was given up, or had nothing to build from.
    pub(crate) fn refill_ended(&self, shard: ShardIndex, outcome: Option<Outcome>, took: Duration) {
        self.on_slot(shard, |slot| slot.filling_ended(outcome, took));
        if let Some(outcome) = outcome {
            self.refills[outcome as usize].record(took);
        }
    }

    /// Tells those who watch.
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
