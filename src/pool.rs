//! A pool's rotation of shards, and how a request takes numbers from it. Knows nothing of HTTP or of how
//! shards are filled, and only the refiller's reports of the ledger.
//!
//! Each shard has a slot with a lease buffer that requests take rows from, and a worker task. The worker
//! leases rows ahead of need, serves waiting requests, and installs the next generation. A row passes through
//! these states:
//! ```text
//! unused (in the file) -> ready (leased, in the buffer) -> on loan (with a request) -> handed out
//!     ^------------- stop -----------'   ^------- request gone -------'
//! ```
//! A crash burns the rows that are ready or on loan.

mod books;
mod buffer;
#[cfg_attr(test, path = "pool/model/file.rs")]
mod file;
#[cfg(test)]
mod model;
mod slot;
mod sync;
mod worker;

use std::error::Error;
use std::io::{self, ErrorKind};
use std::num::NonZeroU32;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rand::seq::{IndexedRandom, SliceRandom};
use tokio::sync::{MutexGuard, Notify};

use self::books::Books;
pub use self::books::{Figures, LastRefill, LedgerFigures, Outcome, ShardFigures, ShardState};
use self::buffer::Buffer;
use self::slot::{Loan, Slot};
use self::sync::{AtomicBool, AtomicU64, Mutex, Ordering};
use self::worker::Worker;
use crate::batch::{Generation, ShardIndex};
use crate::config::{LeaseConfig, PoolConfig, PoolName, RefillConfig};
use crate::events::{Events, Kind};
use crate::fleet::{Gate, Partitions};
use crate::folder::{PoolPaths, ShardFiles};
use crate::histogram::Histogram;
use crate::space::{Space, Value};
use crate::sqlite;

/// The reason that a request got no numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// No shard in rotation has enough numbers, but the refiller will provide them.
    #[error("no shard in rotation has enough numbers")]
    Refilling,
    /// The range does not have enough numbers and never will.
    #[error("{left} numbers are left")]
    Exhausted {
        /// The number of numbers that are left, which is less than the request's count.
        left: u64,
    },
}

/// Numbers for one request. They are durably marked as used, and no other request gets them.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// The values, grouped by the shard that they came from.
    pub parts: Vec<(ShardIndex, Vec<Value>)>,
}

/// A shard's supply, for the refiller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// The shard's index.
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

/// The health of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// The number of shards in rotation.
    pub in_rotation: usize,
    /// The number of shards.
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

/// See the [module](self).
#[derive(Debug)]
pub struct Pool {
    name: PoolName,
    space: Space,
    shard_size: u32,
    slots: Vec<Arc<Slot>>,
    /// Indexes into `slots`.
    rotation: ArcSwap<Vec<usize>>,
    /// Held by a request that collects from several shards. Two at the same time could wait for each other's
    /// rows.
    gather: tokio::sync::Mutex<()>,
    /// Numbers that a request collected from ended generations before it was dropped or failed.
    leftovers: Mutex<Vec<(ShardIndex, Value)>>,
    has_leftovers: AtomicBool,
    refill_wanted: Notify,
    /// Whether a request asked for more than the shards have. The next plan then ignores the low-water mark.
    starved: AtomicBool,
    refill_trouble: Mutex<Option<Trouble>>,
    /// The ledger has no free values left, and no build is in progress.
    exhausted: AtomicBool,
    /// Tasks that ended unexpectedly.
    dead_tasks: AtomicU64,
    /// The part of the numbers burned since the process started that the refiller has recorded.
    burned_noted: AtomicU64,
    events: Arc<Events>,
    /// The gate that leases must pass in a fleet.
    gate: Option<Gate>,
    /// Durations of refills, by [`Outcome`].
    refills: [Histogram; 2],
    books: Mutex<Books>,
}

impl Pool {
    /// Opens the live files. Returns the pool and a worker for each shard. The caller spawns the workers on
    /// threads that serve connections, since a worker there wakes waiting requests without a system call.
    /// Each worker ends after [`stop`](Self::stop), when its shard is closed.
    pub async fn open(
        config: &PoolConfig,
        lease: LeaseConfig,
        refill: RefillConfig,
        paths: &PoolPaths,
        shards: &[ShardFiles],
        events: Arc<Events>,
        gate: Option<Gate>,
    ) -> (Arc<Self>, Vec<impl Future<Output = ()> + Send + use<>>) {
        let low_water = refill.low_water_rows(config.shard_size);
        let slots: Vec<_> = shards
            .iter()
            .map(|files| {
                let refilled = files.index.0 < config.shards;
                let name = paths.shard_name(files.index);
                let live = files.live.as_ref().map(|live| (live.label.generation, live.unused));
                let standby = files.standby.as_ref().map(|label| label.rows);
                let mut buffer = Buffer::new(lease.rows, low_water, live, standby);
                if files.damaged {
                    buffer.found_damaged();
                    let message = format!("{name} was found damaged at the start and set aside");
                    events.add(Kind::Damaged, Some(&config.name), Some(&name), message);
                }
                Arc::new(Slot::new(files.index, &name, refilled, buffer))
            })
            .collect();
        let pool = Arc::new(Self {
            name: config.name.clone(),
            space: config.space,
            shard_size: config.shard_size,
            slots,
            rotation: ArcSwap::default(),
            gather: tokio::sync::Mutex::new(()),
            leftovers: Mutex::new(Vec::new()),
            has_leftovers: AtomicBool::new(false),
            refill_wanted: Notify::new(),
            starved: AtomicBool::new(false),
            refill_trouble: Mutex::new(None),
            exhausted: AtomicBool::new(false),
            dead_tasks: AtomicU64::new(0),
            burned_noted: AtomicU64::new(0),
            events,
            gate,
            refills: [Histogram::default(), Histogram::default()],
            books: Mutex::default(),
        });
        let mut workers = Vec::new();
        for (position, files) in shards.iter().enumerate() {
            let mut worker = Worker::new(Arc::clone(&pool), position, paths.clone(), refill);
            if files.live.is_some() {
                worker.open().await;
            }
            workers.push(worker.run());
        }
        (pool, workers)
    }

    /// Returns the pool's name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// Returns the pool's range.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Returns whether other instances of a fleet draw from the range too.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.gate.is_some()
    }

    /// Returns, in a fleet, the number of fence steps since the start and whether the next step can be made.
    #[must_use]
    pub fn fence(&self) -> Option<(u64, bool)> {
        self.gate.as_ref().map(Gate::figures)
    }

    /// Returns, in a fleet, the partitions that this instance holds and those that it may claim.
    #[must_use]
    pub fn partitions(&self) -> Option<Partitions> {
        self.gate.as_ref().map(|gate| gate.partitions(&self.name))
    }

    /// Returns the number of rows in a full generation.
    #[must_use]
    pub fn shard_size(&self) -> u64 {
        self.shard_size.into()
    }

    /// Returns the name of a shard's live file.
    #[must_use]
    pub fn shard_name(&self, shard: ShardIndex) -> &str {
        let slot = self.slots.iter().find(|slot| slot.index == shard);
        slot.map_or("", |slot| &slot.name)
    }

    /// Takes one number if a random shard in rotation has one ready. This is the common case, which never
    /// waits.
    #[must_use]
    pub fn try_take_one(&self) -> Option<(&str, Value)> {
        if self.has_leftovers.load(Ordering::Relaxed) {
            return None;
        }
        let slot = self.random_slot()?;
        slot.pop().map(|value| (&*slot.name, value))
    }

    /// Takes `count` numbers from one random shard in rotation, and from others if it does not have enough.
    /// Takes either all or none.
    ///
    /// # Errors
    /// Returns [`TakeError`]. Nothing is taken then, nor if the returned future is dropped.
    pub async fn take(&self, count: NonZeroU32) -> Result<Taken, TakeError> {
        let count = count.get() as usize;
        if self.has_leftovers.load(Ordering::Acquire) {
            return self.gather(count, &self.random_order()).await;
        }
        // The common case: one shard has all of them.
        if let Some(slot) = self.random_slot()
            && let Some(loan) = slot.take(count, false).await
        {
            return Ok(Taken { parts: vec![loan.settle()] });
        }
        let order = self.random_order();
        if count > 1 {
            return self.gather(count, &order).await;
        }
        // A request for one number holds nothing while it waits, so it does not need the lock.
        for slot in order {
            if let Some(loan) = slot.take(1, false).await {
                return Ok(Taken { parts: vec![loan.settle()] });
            }
        }
        let alone = match self.exhausted.load(Ordering::Acquire) {
            true => Some(self.gather.lock().await),
            false => None,
        };
        Err(self.turn_away(1, alone))
    }

    /// Collects from all shards in turn. A shard with fewer numbers than any request wants would never be
    /// used up. So if its next generation is ready, its remaining numbers are taken for good, and the shard
    /// is asked again.
    async fn gather(&self, count: usize, order: &[&Arc<Slot>]) -> Result<Taken, TakeError> {
        let alone = self.gather.lock().await;
        let mut held = Held { pool: self, parts: self.take_leftovers(count) };
        let mut loans: Vec<Loan> = Vec::new();
        for _pass in 0..2 {
            for slot in order {
                let missing = count - held.len() - loans.iter().map(Loan::len).sum::<usize>();
                // A shard keeps its generation while rows of it are on loan, so waiting for its next one here
                // would never end.
                let lent = loans.iter().any(|loan| loan.is_of(slot));
                if missing > 0
                    && !lent
                    && let Some(loan) = slot.take(missing, true).await
                {
                    loans.push(loan);
                }
            }
            if held.len() + loans.iter().map(Loan::len).sum::<usize>() == count {
                loans.into_iter().for_each(|loan| held.keep(loan));
                return Ok(Taken { parts: std::mem::take(&mut held.parts) });
            }
            let (ending, lasting) = loans.into_iter().partition(Loan::can_end_generation);
            loans = lasting;
            Vec::into_iter(ending).for_each(|loan| held.keep(loan));
        }
        // All or none: the loans go back to their shards, and the collected numbers go to the next request.
        drop((loans, held));
        Err(self.turn_away(count as u64, Some(alone)))
    }

    /// Takes up to `count` numbers that an earlier request collected but did not hand out.
    fn take_leftovers(&self, count: usize) -> Vec<(ShardIndex, Vec<Value>)> {
        if !self.has_leftovers.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut leftovers = self.leftovers.lock().expect("no holder of it panics");
        let keep = leftovers.len().saturating_sub(count);
        let mut taken = leftovers.split_off(keep);
        self.has_leftovers.store(!leftovers.is_empty(), Ordering::Release);
        taken.sort_unstable_by_key(|&(shard, _)| shard);
        taken
            .chunk_by(|(shard, _), (next, _)| shard == next)
            .map(|part| (part[0].0, part.iter().map(|&(_, value)| value).collect()))
            .collect()
    }

    /// Returns a random shard in rotation.
    fn random_slot(&self) -> Option<&Arc<Slot>> {
        let rotation = self.rotation.load();
        let position = rotation.choose(&mut sync::rng())?;
        Some(&self.slots[*position])
    }

    /// Returns the shards in rotation in random order, followed by the others, which may be about to return.
    fn random_order(&self) -> Vec<&Arc<Slot>> {
        let rotation = self.rotation.load();
        let mut order: Vec<_> = rotation.iter().map(|&position| &self.slots[position]).collect();
        order.shuffle(&mut sync::rng());
        let mut is_other = vec![true; self.slots.len()];
        rotation.iter().for_each(|&position| is_other[position] = false);
        order.extend(
            self.slots.iter().zip(is_other).filter_map(|(slot, other)| other.then_some(slot)),
        );
        order
    }

    /// Returns the reason that `count` numbers could not be taken, and asks the refiller for more.
    ///
    /// Invariant: a request is told that nothing is left only while no other request collects. Numbers that
    /// such a request collected are in no shard, and come back if it is dropped.
    fn turn_away(&self, count: u64, alone: Option<MutexGuard<'_, ()>>) -> TakeError {
        let why = alone.map_or(TakeError::Refilling, |_alone| self.nothing_left(count));
        if why == TakeError::Refilling {
            self.starved.store(true, Ordering::Release);
            self.refill_wanted.notify_one();
        }
        why
    }

    /// Returns the reason that `count` numbers could not be taken.
    fn nothing_left(&self, count: u64) -> TakeError {
        // Invariant: read before the shards. The last generation is ready before the range counts as
        // exhausted.
        let is_exhausted = self.exhausted.load(Ordering::Acquire);
        // Invariant: rows on loan count as left. They come back if their request is dropped.
        let shards = self.slots.iter().map(|slot| slot.look(Buffer::not_issued));
        let leftovers = self.leftovers.lock().expect("no holder of it panics").len() as u64;
        let left = leftovers + shards.sum::<u64>();
        // If enough numbers are left, they are in a shard that fails at the moment.
        if is_exhausted && left < count {
            TakeError::Exhausted { left }
        } else {
            TakeError::Refilling
        }
    }

    /// Returns the supply of every shard.
    #[must_use]
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

    /// Returns whether the pool can hand out numbers. A shard that can't lease at the moment stays in
    /// rotation, because of its leased rows.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.has_leftovers.load(Ordering::Relaxed)
            || self.rotation.load().iter().any(|&at| self.slots[at].look(Buffer::can_serve))
    }

    /// Returns the pool's health.
    #[must_use]
    pub fn health(&self) -> Health {
        let refill_trouble = self.refill_trouble.lock().expect("no holder of it panics").clone();
        let shard_trouble = self.slots.iter().find_map(|slot| slot.trouble());
        let fleet_trouble = self.gate.as_ref().and_then(|gate| {
            let (_, steps) = gate.figures();
            let cause = if steps { Cause::Copy } else { Cause::Fence };
            gate.trouble().map(|details| Trouble { cause, details })
        });
        Health {
            in_rotation: self.rotation.load().len(),
            shards: self.slots.len(),
            serves: self.serves(),
            shared: self.is_shared(),
            exhausted: self.nothing_left(1) != TakeError::Refilling,
            alive: self.dead_tasks.load(Ordering::Relaxed) == 0,
            trouble: shard_trouble.or(refill_trouble).or(fleet_trouble),
        }
    }

    /// Ends all workers. Each one returns the leased rows that it has not handed out, and closes its shard.
    pub fn stop(&self) {
        let leftovers =
            std::mem::take(&mut *self.leftovers.lock().expect("no holder of it panics"));
        if !leftovers.is_empty() {
            tracing::warn!(
                pool = %self.name, burned = leftovers.len(),
                "numbers that were collected for a dropped request are burned: their shard files are gone"
            );
        }
        for slot in &self.slots {
            slot.signal(Buffer::stop);
        }
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

    /// Returns a guard that counts its task as dead unless [`TaskWatch::end`] is called.
    pub(crate) fn watch_task(self: &Arc<Self>) -> TaskWatch {
        TaskWatch { pool: Arc::clone(self), ended: false }
    }

    fn enter_rotation(&self, position: usize) {
        self.rotation.rcu(|rotation| {
            let mut next: Vec<usize> = rotation.to_vec();
            if !next.contains(&position) {
                next.push(position);
            }
            next
        });
    }

    fn leave_rotation(&self, position: usize) {
        self.rotation.rcu(|rotation| -> Vec<usize> {
            rotation.iter().copied().filter(|&other| other != position).collect()
        });
    }
}

/// Numbers that their shards gave up for good, to a request that is still collecting. If the request ends
/// without them, the next request gets them.
struct Held<'p> {
    pool: &'p Pool,
    parts: Vec<(ShardIndex, Vec<Value>)>,
}

impl Held<'_> {
    fn len(&self) -> usize {
        self.parts.iter().map(|(_, values)| values.len()).sum()
    }

    fn keep(&mut self, loan: Loan) {
        let (shard, mut values) = loan.settle();
        match self.parts.iter_mut().find(|(other, _)| *other == shard) {
            Some((_, others)) => others.append(&mut values),
            None => self.parts.push((shard, values)),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.parts.is_empty() {
            return;
        }
        let parts = std::mem::take(&mut self.parts);
        let each = parts
            .into_iter()
            .flat_map(|(shard, values)| values.into_iter().map(move |value| (shard, value)));
        self.pool.leftovers.lock().expect("no holder of it panics").extend(each);
        self.pool.has_leftovers.store(true, Ordering::Release);
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
