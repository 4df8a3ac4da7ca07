//! A pool's rotation, and how a request takes numbers from it. Knows nothing of HTTP or of how shards
//! are filled; of the ledger, what the refiller says of it.
//!
//! Each shard has a slot with a lease buffer that requests pop from, and a worker task that
//! leases the next rows ahead of need, serves those who wait, and puts the next generation in place.

mod books;
mod buffer;
#[cfg_attr(test, path = "pool/model/file.rs")]
mod file;
#[cfg(test)]
mod model;
mod slot;
mod sync;
mod worker;

use std::num::NonZeroU32;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rand::RngExt;
use rand::seq::SliceRandom;
use tokio::sync::{MutexGuard, Notify};
use tokio::task::JoinHandle;

use self::books::Books;
pub use self::books::{Figures, LastRefill, LedgerFigures, Outcome, ShardFigures, ShardState};
use self::buffer::Buffer;
use self::slot::{Loan, Slot};
use self::sync::{AtomicBool, AtomicU64, Mutex, Ordering};
use self::worker::Worker;
use crate::batch::{Generation, ShardIndex};
use crate::config::{LeaseConfig, PoolConfig, PoolName, RefillConfig};
use crate::events::{Events, Kind};
use crate::fleet::Gate;
use crate::folder::{PoolPaths, ShardFiles};
use crate::histogram::Histogram;
use crate::space::{Space, Value};

/// Why a request got no numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// No shard in rotation has as many; one will.
    #[error("no shard in rotation has as many")]
    Refilling,
    /// The range has no more, now or later.
    #[error("{left} numbers are left")]
    Exhausted {
        /// How many it still has: fewer than were asked for.
        left: u64,
    },
}

/// Numbers that are handed out: committed as used, and of no one else.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// The values, by the shard that they came from.
    pub parts: Vec<(ShardIndex, Vec<Value>)>,
}

/// A shard's supply, as the refiller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Which shard.
    pub index: ShardIndex,
    /// The live generation, where there is one.
    pub live: Option<Generation>,
    /// Numbers that can still be handed out.
    pub left: u64,
    /// Whether the next generation lies ready.
    pub standby: bool,
    /// Whether the shard is filled again when it is used up.
    pub refilled: bool,
}

/// Whether a pool can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Shards in rotation.
    pub in_rotation: usize,
    /// Shards in all.
    pub shards: usize,
    /// Whether numbers can be had.
    pub serves: bool,
    /// Whether the range is used up, or in a fleet what this instance may draw of it.
    pub exhausted: bool,
    /// Whether others draw from the range too.
    pub shared: bool,
    /// Whether the refiller and all workers run.
    pub alive: bool,
    /// What goes wrong, in the words of who met it.
    pub trouble: Option<String>,
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
    /// One request at a time collects from several shards: two could wait for each other's rows.
    gather: tokio::sync::Mutex<()>,
    /// Numbers of ended generations that a request held and could not use.
    leftovers: Mutex<Vec<(ShardIndex, Value)>>,
    has_leftovers: AtomicBool,
    refill_wanted: Notify,
    /// A request asked for more than the shards have now, whatever their low-water marks say.
    starved: AtomicBool,
    refill_trouble: Mutex<Option<String>>,
    /// The ledger has no free value left and no build is under way.
    exhausted: AtomicBool,
    /// Tasks that ended without being told to.
    dead_tasks: AtomicU64,
    /// Of the numbers burned in the life of the process, those that the refiller took note of.
    burned_noted: AtomicU64,
    events: Arc<Events>,
    /// What leases must pass, in a fleet.
    gate: Option<Gate>,
    /// How long refills took, by [`Outcome`].
    refills: [Histogram; 2],
    books: Mutex<Books>,
}

impl Pool {
    /// Opens the live files and starts a worker for each shard. The handles end after
    /// [`stop`](Self::stop), each when its shard is closed.
    pub async fn open(
        config: &PoolConfig,
        lease: LeaseConfig,
        refill: RefillConfig,
        paths: &PoolPaths,
        shards: &[ShardFiles],
        events: Arc<Events>,
        gate: Option<Gate>,
    ) -> (Arc<Self>, Vec<JoinHandle<()>>) {
        let (pool, workers) =
            Self::with_workers(config, lease, refill, paths, shards, events, gate).await;
        (pool, workers.into_iter().map(|worker| tokio::spawn(worker.run())).collect())
    }

    async fn with_workers(
        config: &PoolConfig,
        lease: LeaseConfig,
        refill: RefillConfig,
        paths: &PoolPaths,
        shards: &[ShardFiles],
        events: Arc<Events>,
        gate: Option<Gate>,
    ) -> (Arc<Self>, Vec<Worker>) {
        let low_water = refill.low_water_rows(config.shard_size);
        let slots: Vec<_> = shards
            .iter()
            .map(|files| {
                let refilled = files.index.0 < config.shards;
                let name = paths.shard_name(files.index);
                let mut buffer = Buffer::new(lease.rows, low_water, standby_rows(files));
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
                worker.open(standby_rows(files)).await;
            }
            workers.push(worker);
        }
        (pool, workers)
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// The pool's range.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Whether others of a fleet draw from the range too.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.gate.is_some()
    }

    /// In a fleet: steps of the fence since the start, and whether the next one can be made.
    #[must_use]
    pub fn fence(&self) -> Option<(u64, bool)> {
        self.gate.as_ref().map(Gate::figures)
    }

    /// Rows of a full generation.
    #[must_use]
    pub fn shard_size(&self) -> u64 {
        self.shard_size.into()
    }

    /// The name of a shard's live file.
    #[must_use]
    pub fn shard_name(&self, shard: ShardIndex) -> &str {
        let slot = self.slots.iter().find(|slot| slot.index == shard);
        slot.map_or("", |slot| &slot.name)
    }

    /// Takes one number if a random shard in rotation has one leased: the common case, without
    /// waiting.
    #[must_use]
    pub fn try_take_one(&self) -> Option<(&str, Value)> {
        let rotation = self.rotation.load();
        if rotation.is_empty() || self.has_leftovers.load(Ordering::Relaxed) {
            return None;
        }
        let slot = &self.slots[rotation[sync::rng().random_range(..rotation.len())]];
        slot.pop().map(|value| (&*slot.name, value))
    }

    /// Takes `count` numbers from one random shard in rotation, from others too when it runs short;
    /// all or none.
    ///
    /// # Errors
    /// [`TakeError`]; nothing is taken then. The same when the returned future is dropped.
    pub async fn take(&self, count: NonZeroU32) -> Result<Taken, TakeError> {
        let count = count.get() as usize;
        let order = self.random_order();
        if self.has_leftovers.load(Ordering::Acquire) {
            return self.gather(count, &order).await;
        }
        // A request for one number holds nothing while it waits: no need to collect alone.
        let candidates = if count == 1 { &order[..] } else { &order[..1] };
        for slot in candidates {
            if let Some(loan) = slot.take(count, false).await {
                return Ok(Taken { parts: vec![loan.settle()] });
            }
        }
        if count > 1 {
            return self.gather(count, &order).await;
        }
        let alone = match self.exhausted.load(Ordering::Acquire) {
            true => Some(self.gather.lock().await),
            false => None,
        };
        Err(self.turn_away(1, alone))
    }

    /// Collects from all shards in turn. A shard that has fewer numbers than anyone asks for would
    /// never be used up: so where its next generation lies ready, what it has is taken for good, and
    /// the shard is asked again.
    async fn gather(&self, count: usize, order: &[&Arc<Slot>]) -> Result<Taken, TakeError> {
        let alone = self.gather.lock().await;
        let mut held = Held { pool: self, parts: self.take_leftovers(count) };
        let mut loans: Vec<Loan> = Vec::new();
        for _pass in 0..2 {
            for slot in order {
                let missing = count - held.len() - loans.iter().map(Loan::len).sum::<usize>();
                // A shard does not end its generation while a loan of it is out: to wait for that
                // with the loan in hand would be for ever.
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
        // All or none: the loans go back, what is held is for the next request.
        drop((loans, held));
        Err(self.turn_away(count as u64, Some(alone)))
    }

    /// Up to `count` numbers that an earlier request held and could not use.
    fn take_leftovers(&self, count: usize) -> Vec<(ShardIndex, Vec<Value>)> {
        if !self.has_leftovers.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut leftovers = self.leftovers.lock().expect("nothing panics with it");
        let keep = leftovers.len().saturating_sub(count);
        let mut taken = leftovers.split_off(keep);
        self.has_leftovers.store(!leftovers.is_empty(), Ordering::Release);
        taken.sort_unstable_by_key(|&(shard, _)| shard);
        taken
            .chunk_by(|(shard, _), (next, _)| shard == next)
            .map(|part| (part[0].0, part.iter().map(|&(_, value)| value).collect()))
            .collect()
    }

    /// The shards in rotation in random order, then the others: one of these may be about to return.
    fn random_order(&self) -> Vec<&Arc<Slot>> {
        let rotation = self.rotation.load();
        let mut order: Vec<_> = rotation.iter().map(|&position| &self.slots[position]).collect();
        order.shuffle(&mut sync::rng());
        let others = (0..self.slots.len()).filter(|position| !rotation.contains(position));
        order.extend(others.map(|position| &self.slots[position]));
        order
    }

    /// Says why `count` numbers did not come, and sees to it that they will.
    ///
    /// Invariant: that nothing is left is said only when nobody else collects: what they hold is in no
    /// shard, and comes back when they vanish.
    fn turn_away(&self, count: u64, alone: Option<MutexGuard<'_, ()>>) -> TakeError {
        let why = alone.map_or(TakeError::Refilling, |_alone| self.nothing_left(count));
        if why == TakeError::Refilling {
            self.starved.store(true, Ordering::Release);
            self.refill_wanted.notify_one();
        }
        why
    }

    /// Why `count` numbers did not come.
    fn nothing_left(&self, count: u64) -> TakeError {
        let levels = self.levels();
        let is_last =
            self.exhausted.load(Ordering::Acquire) && levels.iter().all(|level| !level.standby);
        let leftovers = self.leftovers.lock().expect("nothing panics with it").len() as u64;
        let left = leftovers + levels.iter().map(|level| level.left).sum::<u64>();
        // Numbers that are left and don't come are those of a shard that fails for now.
        if is_last && left < count { TakeError::Exhausted { left } } else { TakeError::Refilling }
    }

    /// The supply of every shard.
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

    /// Whether numbers can be had: a shard that can't be leased from for now stays in rotation, for what
    /// is leased of it.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.has_leftovers.load(Ordering::Relaxed)
            || self.rotation.load().iter().any(|&at| self.slots[at].look(Buffer::can_serve))
    }

    /// Whether the pool can serve, and what goes wrong.
    #[must_use]
    pub fn health(&self) -> Health {
        let refill_trouble = self.refill_trouble.lock().expect("nothing panics with it").clone();
        let shard_trouble = self.slots.iter().find_map(|slot| slot.trouble());
        Health {
            in_rotation: self.rotation.load().len(),
            shards: self.slots.len(),
            serves: self.serves(),
            shared: self.is_shared(),
            exhausted: self.nothing_left(1) != TakeError::Refilling,
            alive: self.dead_tasks.load(Ordering::Relaxed) == 0,
            trouble: shard_trouble
                .or(refill_trouble)
                .or_else(|| self.gate.as_ref().and_then(Gate::trouble)),
        }
    }

    /// Ends all workers: each gives back what it leased and did not hand out, and closes its shard.
    pub fn stop(&self) {
        let leftovers =
            std::mem::take(&mut *self.leftovers.lock().expect("nothing panics with it"));
        if !leftovers.is_empty() {
            tracing::warn!(
                pool = %self.name, burned = leftovers.len(),
                "numbers that a request held and could not use are burned: their shard files are gone"
            );
        }
        for slot in &self.slots {
            slot.signal(Buffer::stop);
        }
    }

    /// Waits until a shard may want a refill.
    pub(crate) async fn refill_wanted(&self) {
        self.refill_wanted.notified().await;
    }

    /// Whether a request was turned away since this was last called.
    pub(crate) fn take_starved(&self) -> bool {
        self.starved.swap(false, Ordering::AcqRel)
    }

    /// A shard's next generation of so many rows lies ready.
    pub(crate) fn standby_ready(&self, shard: ShardIndex, rows: u64) {
        for slot in self.slots.iter().filter(|slot| slot.index == shard) {
            slot.signal(|buffer| buffer.standby_ready(rows));
        }
    }

    /// What goes wrong with refilling, or nothing. Answers whether that is new.
    pub(crate) fn set_refill_trouble(&self, trouble: Option<String>) -> bool {
        let mut current = self.refill_trouble.lock().expect("nothing panics with it");
        let is_new = *current != trouble;
        *current = trouble;
        is_new
    }

    /// Says whether the ledger can give no value any more. Answers whether that is new.
    pub(crate) fn set_exhausted(&self, exhausted: bool) -> bool {
        self.exhausted.swap(exhausted, Ordering::AcqRel) != exhausted
    }

    /// Numbers burned in the life of the process that the ledger does not know of.
    pub(crate) fn burned_to_note(&self) -> u64 {
        let burned: u64 = self.slots.iter().map(|slot| slot.look(Buffer::burned)).sum();
        burned - self.burned_noted.load(Ordering::Relaxed)
    }

    /// The ledger knows of so many more now. Only the refiller says so.
    pub(crate) fn burned_noted(&self, count: u64) {
        self.burned_noted.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts a task as dead when dropped before it is told that the task ends as it should.
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

fn standby_rows(files: &ShardFiles) -> Option<u64> {
    files.standby.as_ref().map(|label| label.rows)
}

/// Numbers that their shards gave for good, to a request that is still collecting. If it ends
/// without them, they are the next request's.
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
        self.pool.leftovers.lock().expect("nothing panics with it").extend(each);
        self.pool.has_leftovers.store(true, Ordering::Release);
    }
}

/// Turns the pool's health red when a task ends that should not.
#[derive(Debug)]
pub(crate) struct TaskWatch {
    pool: Arc<Pool>,
    ended: bool,
}

impl TaskWatch {
    /// The task ends as it should.
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
