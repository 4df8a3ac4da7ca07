//! A pool's rotation of shards. Knows nothing of HTTP or of how shards are filled.
//!
//! Each shard has a slot with a lease buffer, from which requests [take](Pool::take) rows, and a worker task.
//! The worker leases rows ahead of need, serves waiting requests, and installs the next generation. A row is
//! in one of these states:
//!
//! | state | where the row is | what can happen next |
//! | --- | --- | --- |
//! | unused | in the file | a lease marks it as used: leased |
//! | leased | in the buffer of its slot, or among the pool's orphans once its shard gave it up | a request takes it: on loan. At a stop, a row in a buffer becomes unused again |
//! | on loan | with a request that waits for more rows or for its receipt, or may still go away | the response is made: handed out. The request is dropped or fails: leased |
//! | handed out | in a response | none |
//! | imported | in the file, or in a file that was replaced | none |
//!
//! An unused or leased row becomes imported if its number is imported: no request gets it. A row on loan at that
//! time does not come back.
//!
//! A crash burns the rows that are leased or on loan: their file says that they are used, but no response had
//! them.

mod buffer;
mod figures;
mod file;
mod health;
mod imports;
#[cfg(test)]
pub(crate) mod model;
mod slot;
mod supply;
mod sync;
mod take;
mod worker;

use std::collections::HashSet;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use self::buffer::{Buffer, Live};
pub(crate) use self::figures::{Figures, ShardFigures, ShardState};
use self::file::{OpenFile, ShardFile};
pub(crate) use self::health::{Cause, PoolHealth, Trouble};
use self::imports::Imports;
pub(crate) use self::imports::{HeldStandby, ImportRequest, SwapInProgress};
use self::slot::Slot;
use self::supply::Books;
pub(crate) use self::supply::{LastRefill, LedgerFigures, Level, Outcome};
use self::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard};
pub(crate) use self::take::Reservation;
pub use self::take::TakeError;
use self::worker::Worker;
use crate::batch::ShardIndex;
use crate::config::{PoolConfig, PoolName, RefillConfig};
use crate::events::{Events, Kind};
use crate::fleet::{Gate, Partitions};
use crate::folder::{PoolPaths, ShardFiles};
use crate::histogram::Histogram;
use crate::space::{Space, Value};

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
    collected: Mutex<Collected>,
    has_orphans: AtomicBool,
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
    /// Imports that wait for the refiller.
    imports: Mutex<Imports>,
}

/// Leased rows that their shards gave up for good, because a request collected them.
#[derive(Debug, Default)]
struct Collected {
    /// How many of them requests hold.
    held: u64,
    /// Those of requests that were dropped or failed, each with the name of its shard. The next request gets
    /// them.
    orphans: Vec<(Arc<str>, Value)>,
    /// Values that were imported when requests may have held them. They don't become orphans.
    withdrawn: HashSet<Value>,
}

impl Collected {
    /// Returns how many of them may still be handed out.
    fn not_handed_out(&self) -> u64 {
        self.held + self.orphans.len() as u64
    }
}

impl Pool {
    /// Takes the live files into use. Returns the pool and a worker for each shard. The caller spawns the workers on
    /// threads that serve connections, since a worker there wakes waiting requests without a system call.
    /// Each worker ends after [`stop`](Self::stop), when its shard is closed.
    pub async fn open(
        config: &PoolConfig,
        paths: &PoolPaths,
        shards: &mut [ShardFiles],
        events: Arc<Events>,
        gate: Option<Gate>,
    ) -> (Arc<Self>, Vec<impl Future<Output = ()> + Send + use<>>) {
        let pool = Arc::new(Self::new(config, paths, shards, events, gate));
        let workers = pool.open_shards::<OpenFile>(config.refill, paths, shards).await;
        (pool, workers)
    }

    fn new(
        config: &PoolConfig,
        paths: &PoolPaths,
        shards: &[ShardFiles],
        events: Arc<Events>,
        gate: Option<Gate>,
    ) -> Self {
        let low_water = config.refill.low_water_rows(config.shard_size);
        let slot = |files: &ShardFiles| {
            let refilled = files.index.0 < config.shards;
            let name = paths.shard_name(files.index);
            let live = files.live.as_ref().map(|live| Live {
                generation: live.label.generation,
                rows: live.label.rows,
                unused: live.unused,
            });
            let standby = files.standby.as_ref().map(|standby| standby.unused);
            let mut buffer = Buffer::new(config.lease.rows, low_water, live, standby);
            if files.damaged {
                buffer.found_damaged();
                let message = format!("{name} was found damaged at the start and set aside");
                events.add(Kind::Damaged, Some(&config.name), Some(&name), message);
            }
            Arc::new(Slot::new(files.index, &name, refilled, buffer))
        };
        let slots = shards.iter().map(slot).collect();
        Self {
            name: config.name.clone(),
            space: config.space.clone(),
            shard_size: config.shard_size,
            slots,
            rotation: ArcSwap::default(),
            gather: tokio::sync::Mutex::new(()),
            collected: Mutex::default(),
            has_orphans: AtomicBool::new(false),
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
            imports: Mutex::default(),
        }
    }

    /// Creates the worker of each shard, and opens the live files.
    async fn open_shards<F: ShardFile>(
        self: &Arc<Self>,
        refill: RefillConfig,
        paths: &PoolPaths,
        shards: &mut [ShardFiles],
    ) -> Vec<impl Future<Output = ()> + Send + use<F>> {
        let mut workers = Vec::new();
        for (position, files) in shards.iter_mut().enumerate() {
            let mut worker = Worker::<F>::new(Arc::clone(self), position, paths.clone(), refill);
            if files.live.is_some() {
                worker.open(files.connection.take()).await;
            }
            workers.push(worker.run());
        }
        workers
    }

    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// Returns the pool's range.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Returns whether other instances of a fleet draw from the range too.
    pub fn is_shared(&self) -> bool {
        self.gate.is_some()
    }

    /// Returns, in a fleet, the number of fence steps since the start and whether the next step can be made.
    pub fn fence(&self) -> Option<(u64, bool)> {
        self.gate.as_ref().map(Gate::figures)
    }

    /// Returns, in a fleet, the partitions that this instance holds and those that it may claim.
    pub fn partitions(&self) -> Option<Partitions> {
        self.gate.as_ref().map(|gate| gate.partitions(&self.name))
    }

    /// Returns the number of rows in a full generation.
    pub fn shard_size(&self) -> u64 {
        self.shard_size.into()
    }

    /// Returns the name of a shard's live file.
    pub fn shard_name(&self, shard: ShardIndex) -> &str {
        let slot = self.slots.iter().find(|slot| slot.index == shard);
        slot.map_or("", |slot| &slot.name)
    }

    /// Ends all workers. Each one returns the leased rows to its shard and closes it.
    pub fn stop(&self) {
        let mut collected = self.collected();
        let orphans = std::mem::take(&mut collected.orphans);
        self.note_orphans(&collected);
        drop(collected);
        if !orphans.is_empty() {
            tracing::warn!(
                pool = %self.name, burned = orphans.len(),
                "numbers that were collected for a dropped request are burned: their shards gave them up"
            );
        }
        for slot in &self.slots {
            slot.signal(Buffer::stop);
        }
    }

    fn collected(&self) -> MutexGuard<'_, Collected> {
        self.collected.lock().expect("no holder of it panics")
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
