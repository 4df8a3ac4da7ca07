//! A pool's figures, for display and metrics. Does not affect what is handed out.

use super::buffer::Buffer;
use super::slot::Slot;
use super::sync::Ordering;
use super::{LastRefill, LedgerFigures, Outcome, Pool};
use crate::batch::Generation;
use crate::fleet::Partitions;
use crate::histogram::Durations;

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
    pub state: ShardState,
    /// Rows of the live generation that are not handed out.
    pub left: u64,
    /// Rows that the live generation began with.
    pub rows: u64,
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
    pub leases: Durations,
}

/// The figures of a pool. Issued, pooled, burned and free add up to the numbers that this instance may draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Numbers ever handed out, or imported. All used rows of a file that was damaged at a start count as handed out.
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
    pub ledger: LedgerFigures,
    pub shards: Vec<ShardFigures>,
    pub refills: [(Outcome, Durations); 2],
}

impl Pool {
    /// Returns the pool's figures.
    pub fn figures(&self) -> Figures {
        // The ledger comes first: values that enter it after this are not in any shard yet.
        let (ledger, issued_before, burned_before) = {
            let books = self.books.lock().expect("no holder of it panics");
            (books.ledger, books.issued_before + books.imported(), books.burned_before)
        };
        let rotation = self.rotation.load();
        let mut in_rotation = vec![false; self.slots.len()];
        rotation.iter().for_each(|&position| in_rotation[position] = true);
        let shards = self.slots.iter().zip(in_rotation);
        let shards: Vec<_> =
            shards.map(|(slot, in_rotation)| shard_figures(slot, in_rotation)).collect();
        let handed_out = shards.iter().map(|shard| shard.issued).sum::<u64>();
        let issued = (issued_before + handed_out).saturating_sub(self.collected().not_handed_out());
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

    /// Returns the numbers ever handed out, without those that were imported since the start.
    pub fn issued(&self) -> u64 {
        let before = self.books.lock().expect("no holder of it panics").issued_before;
        let handed_out = self.slots.iter().map(|slot| slot.look(Buffer::handed_out)).sum::<u64>();
        (before + handed_out).saturating_sub(self.collected().not_handed_out())
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
        rows: buffer.rows(),
        generation: buffer.generation(),
        standby: buffer.standby(),
        progress: running.map(|(done, all)| done as f64 / all.max(1) as f64),
        last_refill: filling.last,
        issued: buffer.handed_out(),
        leases: slot.leases.durations(),
    })
}
