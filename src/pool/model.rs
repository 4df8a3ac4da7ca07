//! The pool under shuttle: real buffers, slots, workers and rotation, with callers that take, reserve, wait and
//! disappear, in thousands of schedules. Only the files are [simulated](SimulatedFile), and so is the refiller,
//! which follows the real plan.
//!
//! `SCHEDULES=N` sets the number of schedules, and `SCHEDULES_SEED=N` selects them. A failure prints how to
//! replay its schedule.

mod file;

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use shuttle::future::{block_on, spawn, yield_now};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::RandomScheduler;

use self::file::{Content, SimulatedFile, disk};
use super::*;
use crate::batch::Generation;
use crate::config::{LeaseConfig, Recorded};
use crate::refill::plan;
use crate::shard::Row;

const SHARDS: u16 = 2;
const SHARD_SIZE: u32 = 5;
const SCHEDULES: u64 = 10_000;
/// Generations per shard, so that each shard is swapped often.
const GENERATIONS: u32 = 4;
/// Rows of all generations of all shards.
pub(crate) const RANGE: u32 = SHARDS as u32 * SHARD_SIZE * GENERATIONS;

const REFILL: RefillConfig = RefillConfig {
    low_water: 0.5,
    retry: Duration::from_millis(1),
    retry_limit: Duration::from_millis(1),
};

/// Runs a test in `count` schedules, unless the environment sets another number. The same seed gives the same
/// schedules.
pub(crate) fn schedules(count: u64, test: impl Fn() + Send + Sync + 'static) {
    let variable = |name, other| std::env::var(name).map_or(other, |value| value.parse().unwrap());
    let scheduler = RandomScheduler::new_from_seed(
        variable("SCHEDULES_SEED", 1),
        variable("SCHEDULES", count) as usize,
    );
    let mut config = shuttle::Config::new();
    config.silence_warnings = true;
    // A few thousand steps are usual. More mean that a task loops.
    config.max_steps = shuttle::MaxSteps::FailAfter(200_000);
    shuttle::Runner::new(scheduler, config).run(test);
}

/// The running pool and its results.
pub(crate) struct Model {
    pub(crate) pool: Arc<Pool>,
    handed_out: Mutex<BTreeSet<i64>>,
    /// Rows that a shard gave up although they were not handed out. A stop burns them.
    withheld: Mutex<BTreeSet<i64>>,
    /// The number of rows that were built.
    built: AtomicU32,
    stopping: AtomicBool,
    /// How many of four builds are followed by an import.
    imports_in: AtomicU32,
    /// Whether a request was told that nothing is left.
    ended: AtomicBool,
    /// Numbers whose import is complete.
    imported: Mutex<BTreeSet<i64>>,
    /// Numbers that were used when they should have been imported. A request that was dropped may have had them.
    conflicts: Mutex<BTreeSet<i64>>,
}

type Mutex<T> = std::sync::Mutex<T>;

impl Model {
    /// Runs `callers` on a pool, from empty shards to its stop.
    pub(crate) fn run<C: Future<Output = ()>>(callers: impl FnOnce(Arc<Self>) -> C) -> Arc<Self> {
        block_on(async {
            let (model, workers) = Self::start().await;
            let workers: Vec<_> = workers.into_iter().map(|worker| spawn(worker)).collect();
            let refiller = spawn(Arc::clone(&model).refill());
            callers(Arc::clone(&model)).await;
            model.stop();
            for task in workers.into_iter().chain([refiller]) {
                task.await.unwrap();
            }
            assert!(model.pool.health().alive);
            assert!(!model.pool.serves(), "a stopped pool says that it serves");
            model
        })
    }

    async fn start() -> (Arc<Self>, Vec<impl Future<Output = ()> + Send + use<>>) {
        let config = PoolConfig {
            name: PoolName::new("int").unwrap(),
            space: Space::new("0", &(RANGE - 1).to_string(), 0).unwrap(),
            shards: SHARDS,
            shard_size: SHARD_SIZE,
            // Strict, or a few leases per generation.
            lease: LeaseConfig { rows: if thread_rng().r#gen() { 2 } else { 0 } },
            refill: REFILL,
            receipts: Recorded::Keyed,
            used_file: None,
        };
        let paths = PoolPaths::new(Path::new("nowhere"), &config.name);
        let mut shards: Vec<_> = (0..SHARDS)
            .map(|index| ShardFiles {
                index: ShardIndex(index),
                live: None,
                connection: None,
                standby: None,
                damaged: false,
            })
            .collect();
        let pool = Arc::new(Pool::new(&config, &paths, &shards, Arc::default(), None));
        let workers = pool.open_shards::<SimulatedFile>(REFILL, &paths, &mut shards).await;
        let model = Self {
            pool,
            handed_out: Mutex::default(),
            withheld: Mutex::default(),
            built: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            imports_in: AtomicU32::new(0),
            ended: AtomicBool::new(false),
            imported: Mutex::default(),
            conflicts: Mutex::default(),
        };
        (Arc::new(model), workers)
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.pool.stop();
        self.pool.refill_wanted.notify_one();
    }

    /// Builds what the plan says until the range is used up.
    async fn refill(self: Arc<Self>) {
        while !self.stopping.load(Ordering::SeqCst) {
            let low_water = match self.pool.take_starved() {
                true => u64::MAX,
                false => REFILL.low_water_rows(SHARD_SIZE),
            };
            let due = plan(&self.pool.levels(), low_water, SHARD_SIZE.into(), SHARD_SIZE.into());
            let first = self.built.load(Ordering::SeqCst);
            self.pool.set_exhausted(first == RANGE);
            let Some(next) = due.first().filter(|_| first < RANGE) else {
                self.pool.refill_wanted().await;
                continue;
            };
            yield_now().await;
            let rows = first..first + SHARD_SIZE;
            let unused = rows.clone().map(Row::for_test).collect();
            self.built.store(first + SHARD_SIZE, Ordering::SeqCst);
            let generation = Generation(i64::from(first) + 1);
            let imported = BTreeSet::new();
            let content = Content { generation, rows, unused, imported, in_use: false };
            disk().standby.insert(next.shard, content);
            yield_now().await;
            self.pool.standby_ready(next.shard, SHARD_SIZE.into());
            if thread_rng().gen_ratio(self.imports_in.load(Ordering::SeqCst), 4) {
                self.import(ShardIndex(thread_rng().gen_range(0..SHARDS))).await;
            }
        }
    }

    /// Imports some numbers of a shard, as the refiller does.
    async fn import(&self, shard: ShardIndex) {
        let held = loop {
            match self.pool.hold_standby(shard) {
                Ok(held) => break held,
                Err(SwapInProgress) if self.stopping.load(Ordering::SeqCst) => return,
                Err(SwapInProgress) => yield_now().await,
            }
        };
        let mut held = held.expect("the pool has the shard");
        let is_chosen = |_: &u32| thread_rng().gen_ratio(1, 3);
        let choose = |content: &Content| -> Vec<Row> {
            content.rows.clone().filter(is_chosen).map(Row::for_test).collect()
        };
        let standby = disk().standby.get(&shard).map(choose);
        let live = disk().live.get(&shard).map(|live| (live.generation, choose(live)));
        let rows = standby.iter().flatten().chain(live.iter().flat_map(|(_, rows)| rows));
        self.pool.withdraw(rows.map(|row| row.value));
        yield_now().await;
        if let Some(rows) = standby {
            if let Some(content) = disk().standby.get_mut(&shard) {
                content.unused.retain(|row| !rows.contains(row));
            }
            held.marked(rows.len() as u64);
            self.note_import(&rows, rows.iter().map(|row| row.value).collect());
        }
        yield_now().await;
        if let Some((generation, rows)) = live
            && let Ok(marked) = self.pool.import_rows(shard, generation, rows.clone()).await
        {
            self.note_import(&rows, marked);
        }
    }

    /// Notes which of the rows are imported.
    fn note_import(&self, rows: &[Row], marked: Vec<Value>) {
        // No schedule switches tasks while this is locked.
        {
            let handed_out = self.handed_out.lock().unwrap();
            for value in &marked {
                assert!(
                    !handed_out.contains(&value.0),
                    "{value:?} was handed out and then imported"
                );
            }
        }
        self.imported.lock().unwrap().extend(marked.iter().map(|value| value.0));
        let used = rows.iter().map(|row| row.value).filter(|value| !marked.contains(value));
        self.conflicts.lock().unwrap().extend(used.map(|value| value.0));
        self.pool.forget_withdrawn(marked.into_iter());
    }

    /// Takes `count` numbers as `GET /random` does.
    pub(crate) async fn take(&self, count: u32) -> Result<Vec<Value>, TakeError> {
        let ended = self.ended.load(Ordering::SeqCst);
        let one = if count == 1 { self.pool.try_take_one() } else { None };
        let values = match one {
            Some((_, value)) => vec![value],
            None => {
                let taken = self.pool.take(NonZeroU32::new(count).unwrap()).await;
                self.note_end(taken.as_ref().err());
                values(taken?.parts)
            }
        };
        assert!(!ended, "numbers came after the range was used up");
        assert_eq!(values.len(), count as usize);
        self.hand_out(&values);
        Ok(values)
    }

    /// Reserves `count` numbers as a keyed request does.
    pub(crate) async fn reserve(&self, count: u32) -> Result<Reservation, TakeError> {
        let ended = self.ended.load(Ordering::SeqCst);
        let reserved = self.pool.reserve(NonZeroU32::new(count).unwrap()).await;
        self.note_end(reserved.as_ref().err());
        assert!(!ended || reserved.is_err(), "numbers came after the range was used up");
        reserved
    }

    fn note_end(&self, error: Option<&TakeError>) {
        if error == Some(&TakeError::Exhausted { left: 0 }) {
            self.ended.store(true, Ordering::SeqCst);
        }
    }

    /// Notes that a caller got these numbers.
    pub(crate) fn hand_out(&self, values: &[Value]) {
        let mut handed_out = self.handed_out.lock().unwrap();
        let imported = self.imported.lock().unwrap();
        for value in values {
            assert!(!imported.contains(&value.0), "{value:?} came after its import");
            assert!(handed_out.insert(value.0), "{value:?} came twice");
        }
    }

    /// Returns how many numbers callers got.
    pub(crate) fn handed_out(&self) -> usize {
        self.handed_out.lock().unwrap().len()
    }

    /// Takes numbers until there are no more or the pool is stopped.
    async fn take_all(self: Arc<Self>, count: u32) {
        loop {
            match self.take(count).await {
                Ok(_) => {}
                Err(TakeError::Exhausted { .. }) => break,
                Err(TakeError::Refilling) if self.stopping.load(Ordering::SeqCst) => break,
                Err(TakeError::Refilling) => yield_now().await,
            }
        }
    }

    /// Sends a few requests and drops each after a random time.
    async fn vanish(self: Arc<Self>, count: u32) {
        for _ in 0..6 {
            let patience = thread_rng().gen_range(0..6);
            tokio::select! { biased;
                _ = self.take(count) => {}
                () = async { for _ in 0..patience { yield_now().await } } => {}
            }
        }
    }

    /// Reserves numbers a few times. Each time, holds them while other tasks run, as a request does while its
    /// receipt is saved, and then hands them out or gives them back.
    async fn hold(self: Arc<Self>, count: u32) {
        for _ in 0..6 {
            let Ok(mut reserved) = self.reserve(count).await else {
                yield_now().await;
                continue;
            };
            let parts = reserved.parts();
            for _ in 0..thread_rng().gen_range(0..6) {
                yield_now().await;
            }
            if thread_rng().gen_ratio(1, 3) {
                self.withheld.lock().unwrap().extend(values(parts.clone()).iter().map(|v| v.0));
                reserved.withhold();
                yield_now().await;
            }
            if thread_rng().r#gen() {
                let taken = reserved.settle();
                assert_eq!(taken.parts, parts);
                self.hand_out(&values(parts));
            }
        }
    }

    /// Runs callers of each kind to their end.
    async fn callers(self: Arc<Self>) {
        let callers = [
            spawn(Arc::clone(&self).take_all(1)),
            spawn(Arc::clone(&self).take_all(1)),
            spawn(Arc::clone(&self).take_all(3)),
            spawn(Arc::clone(&self).vanish(1)),
            spawn(Arc::clone(&self).vanish(4)),
            spawn(Arc::clone(&self).hold(1)),
            spawn(Arc::clone(&self).hold(3)),
        ];
        for caller in callers {
            caller.await.unwrap();
        }
    }
}

fn values(parts: Vec<(Arc<str>, Vec<Value>)>) -> Vec<Value> {
    parts.into_iter().flat_map(|(_, values)| values).collect()
}

#[test]
fn every_number_is_handed_out_once_with_waiting_holding_and_vanishing_requests() {
    schedules(SCHEDULES, || {
        let model = Model::run(Model::callers);
        assert_eq!(model.handed_out(), RANGE as usize);
    });
}

/// Runs callers of each kind, and an import after each build.
async fn callers_beside_imports(model: Arc<Model>) {
    model.imports_in.store(4, Ordering::SeqCst);
    model.callers().await;
}

#[test]
fn no_imported_number_is_handed_out_and_no_other_is_lost() {
    schedules(SCHEDULES, || {
        let model = Model::run(callers_beside_imports);
        let handed_out = model.handed_out.lock().unwrap();
        let (imported, conflicts) =
            (model.imported.lock().unwrap(), model.conflicts.lock().unwrap());
        let lost = (0..i64::from(RANGE)).filter(|number| {
            ![&handed_out, &imported, &conflicts].iter().any(|numbers| numbers.contains(number))
        });
        assert_eq!(lost.collect::<Vec<i64>>(), Vec::<i64>::new());
    });
}

#[test]
fn no_imported_number_is_handed_out_when_files_fail() {
    schedules(SCHEDULES, || {
        disk().fault_in = 20;
        Model::run(callers_beside_imports);
    });
}

#[test]
fn no_number_repeats_and_no_request_hangs_when_files_fail() {
    schedules(SCHEDULES, || {
        disk().fault_in = 20;
        Model::run(Model::callers);
    });
}

#[test]
fn a_stop_ends_all_tasks_and_returns_unused_rows() {
    schedules(SCHEDULES, || {
        let model = Model::run(|model| async move {
            let callers = spawn(Arc::clone(&model).callers());
            for _ in 0..thread_rng().gen_range(0..200) {
                yield_now().await;
            }
            model.stop();
            callers.await.unwrap();
        });
        let (handed_out, files) = (model.handed_out.lock().unwrap(), disk());
        let withheld = model.withheld.lock().unwrap();
        for file in files.live.values().chain(files.standby.values()) {
            assert!(!file.in_use || file.unused.is_empty(), "{file:?} is still in use");
            if file.unused.is_empty() {
                // Rows of a used-up shard that a dropped request had collected are burned.
                continue;
            }
            let unused: BTreeSet<_> = file.unused.iter().map(|row| row.id_for_test()).collect();
            for row in file.rows.clone() {
                let (kept, out) = (unused.contains(&row), handed_out.contains(&row.into()));
                let burned = !kept && !out && withheld.contains(&row.into());
                assert!(kept != out || burned, "{row}, kept: {kept}, handed out: {out}");
            }
        }
    });
}
