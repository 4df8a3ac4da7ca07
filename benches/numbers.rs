//! The cost of a number at each step: drawn, built, leased, taken, and written as JSON. `tools/bench`
//! compares whole processes.
//!
//! Measuring a step uses up its numbers. So each step has a supply, which is replaced by a copy of a full one
//! before it is used up, outside the measured time.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use criterion::{BatchSize, Criterion, Throughput};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tombola::internals::Ledger;
use tombola::internals::Pool;
use tombola::internals::files;
use tombola::internals::shard::{self, Label, Left, Shard};
use tombola::internals::sqlite::rusqlite::Connection;
use tombola::internals::sqlite::{Found, LOG_PAGES_MAX};
use tombola::internals::{Batch, BatchId, Generation, ShardIndex};
use tombola::internals::{LeaseConfig, PoolConfig, PoolName, Recorded, RefillConfig};
use tombola::internals::{Number, Space, Value};
use tombola::internals::{PoolPaths, ShardFiles};
use uuid::Uuid;

/// The values in the ledger that is drawn into, and the rows of the shard that is leased from.
const SUPPLY: u64 = 1_000_000;

/// The rows of the shard that is built.
const BUILD_ROWS: usize = 100_000;

/// The rows of a lease, as by default.
const LEASE_ROWS: usize = 1024;

/// The rows that are leased before numbers are taken, 1 MB, so that few samples are interrupted.
const READY_ROWS: u32 = 1 << 16;

const SHARD: ShardIndex = ShardIndex(0);

fn main() -> Result<()> {
    // All benchmarks take less than a minute and a half, including copies of supplies: criterion plans by the
    // wall clock.
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(20)
        .configure_from_args();
    draw(&mut criterion)?;
    build(&mut criterion)?;
    lease(&mut criterion)?;
    take(&mut criterion)?;
    take_of_many(&mut criterion)?;
    json(&mut criterion);
    criterion.final_summary();
    Ok(())
}

/// Measures drawing fresh values into a ledger, durably.
fn draw(criterion: &mut Criterion) -> Result<()> {
    let full = folder()?;
    let mut ledger = Ledger::create(&paths(&full).ledger(), &space())?;
    draw_once(&mut ledger, SUPPLY);
    ledger.close()?;

    let mut group = criterion.benchmark_group("draw");
    // Each sample takes long.
    group.sample_size(10);
    for count in [10_000, 100_000] {
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("{count} into 1M"), |bencher| {
            bencher.iter_custom(|iterations| {
                // Each sample starts with the same ledger, and with a connection that has read it.
                let copy = copy_of(&full).expect("a ledger can be copied");
                let mut ledger =
                    Ledger::open_as_it_is(&paths(&copy).ledger()).expect("the copy is a ledger");
                draw_once(&mut ledger, count);
                let started = Instant::now();
                for _ in 0..iterations {
                    draw_once(&mut ledger, count);
                }
                started.elapsed()
            });
        });
    }
    group.finish();
    Ok(())
}

fn draw_once(ledger: &mut Ledger, count: u64) {
    let draw = ledger.draw(SHARD, None, count, &mut |_| ControlFlow::Continue(()));
    let batch = draw.and_then(|draw| draw.commit()).expect("the disk is writable");
    assert_eq!(batch.count, count);
}

/// Measures building a whole shard file, with the sync.
fn build(criterion: &mut Criterion) -> Result<()> {
    let folder = folder()?;
    let path = paths(&folder).unfinished(SHARD);
    let values = values(BUILD_ROWS);

    let mut group = criterion.benchmark_group("build");
    group.throughput(Throughput::Elements(BUILD_ROWS as u64));
    group.bench_function(format!("{BUILD_ROWS} rows"), |bencher| {
        bencher.iter_batched(
            || files::remove(&path).expect("the file can be removed"),
            |()| write_shard(&path, SHARD, &values).expect("the disk is writable"),
            BatchSize::PerIteration,
        );
    });
    group.finish();
    Ok(())
}

/// Measures marking rows of a live file as used, durably.
fn lease(criterion: &mut Criterion) -> Result<()> {
    let full = full_shard()?;
    let mut rng = rng();
    let mut group = criterion.benchmark_group("lease");
    for (name, rows, unserved) in
        [("1024 rows", LEASE_ROWS, Some(LEASE_ROWS / 2)), ("1 row, strict", 1, None)]
    {
        let mut open = OpenShard::copy_of(&full)?;
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut time = Duration::ZERO;
                for _ in 0..iterations {
                    if open.shard.left() < rows as u64 {
                        open = OpenShard::copy_of(&full).expect("a shard can be copied");
                    }
                    let OpenShard { shard, connection, .. } = &mut open;
                    let started = Instant::now();
                    let leased = shard.lease(connection, rows, unserved, &mut rng);
                    // Like the worker: leases pay for the checkpoints that they cause.
                    if shard.log_pages() >= LOG_PAGES_MAX {
                        shard.checkpoint(connection).expect("the disk is writable");
                    }
                    time += started.elapsed();
                    assert_eq!(leased.expect("the disk is writable").len(), rows);
                }
                time
            });
        });
    }
    group.finish();
    Ok(())
}

/// A shard in use.
struct OpenShard {
    shard: Shard,
    connection: Connection,
    /// Declared after the connection, which has files in it.
    _folder: TempDir,
}

impl OpenShard {
    fn copy_of(full: &TempDir) -> Result<Self> {
        let folder = copy_of(full)?;
        let path = paths(&folder).live(SHARD);
        let mut connection = Found::new(&path).secure()?.open()?;
        let shard = Shard::open(&path, &mut connection)?;
        Ok(Self { shard, connection: connection.into_connection(), _folder: folder })
    }
}

/// Measures taking leased numbers from a pool, as a request does.
fn take(criterion: &mut Criterion) -> Result<()> {
    let full = full_shard()?;
    // The only thread is busy with this code while time is measured, so nothing is leased in that time.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut supply = runtime.block_on(OpenPool::copy_of(&full))?;

    let mut group = criterion.benchmark_group("take");
    group.throughput(Throughput::Elements(1));
    group.bench_function("one", |bencher| {
        bencher.iter_custom(|iterations| {
            supply.time(&runtime, &full, iterations, 1, |pool, times| {
                for _ in 0..times {
                    black_box(pool.try_take_one().expect("a row is leased"));
                }
            })
        });
    });
    let count = NonZeroU32::new(100).expect("not 0");
    group.throughput(Throughput::Elements(count.get().into()));
    group.bench_function(format!("{count}"), |bencher| {
        bencher.iter_custom(|iterations| {
            supply.time(&runtime, &full, iterations, count.get(), |pool, times| {
                runtime.block_on(async {
                    for _ in 0..times {
                        black_box(pool.take(count).await.expect("enough rows are leased"));
                    }
                });
            })
        });
    });
    group.finish();
    runtime.block_on(supply.close());
    Ok(())
}

/// Measures taking two numbers of one shard among few and among many. The cost must not grow with the number
/// of shards.
fn take_of_many(criterion: &mut Criterion) -> Result<()> {
    let two = NonZeroU32::new(2).expect("not 0");
    rlimit::increase_nofile_limit(1 << 14)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;

    let mut group = criterion.benchmark_group("take 2");
    group.sample_size(10);
    group.throughput(Throughput::Elements(two.get().into()));
    // The rows of all shards together allow one lease to take all that each shard has.
    for (shards, rows) in [(2, READY_ROWS), (1024, 512)] {
        let full = folder()?;
        for index in 0..shards {
            let path = paths(&full).live(ShardIndex(index));
            write_shard(&path, ShardIndex(index), &values(rows as usize))?;
        }
        let mut supply = runtime.block_on(OpenPool::leased(&full, shards, rows))?;
        group.bench_function(format!("of {shards} shards"), |bencher| {
            bencher.iter_custom(|mut iterations| {
                let mut time = Duration::ZERO;
                while iterations > 0 {
                    if supply.ready < two.get() {
                        let next = runtime.block_on(OpenPool::leased(&full, shards, rows));
                        let next = next.expect("shards can be copied");
                        runtime.block_on(std::mem::replace(&mut supply, next).close());
                    }
                    let times = iterations.min((supply.ready / two).into());
                    let started = Instant::now();
                    runtime.block_on(async {
                        for _ in 0..times {
                            black_box(supply.pool.take(two).await.expect("enough rows are leased"));
                        }
                    });
                    time += started.elapsed();
                    supply.ready -= times as u32 * two.get();
                    iterations -= times;
                }
                time
            });
        });
        runtime.block_on(supply.close());
    }
    group.finish();
    Ok(())
}

/// A pool without a refiller.
struct OpenPool {
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    /// The count of leased rows.
    ready: u32,
    _folder: TempDir,
}

impl OpenPool {
    /// Opens a pool with one shard.
    async fn copy_of(full: &TempDir) -> Result<Self> {
        Self::open(full, 1, SUPPLY as u32).await
    }

    /// Opens a pool and leases all rows of all shards. Half of them are counted as ready: the rest allows for
    /// the uneven outcome of random choices.
    async fn leased(full: &TempDir, shards: u16, rows: u32) -> Result<Self> {
        let mut open = Self::open(full, shards, rows).await?;
        while open.pool.figures().shards.iter().any(|shard| shard.leases.count() == 0) {
            tokio::task::yield_now().await;
        }
        open.ready = u32::from(shards) * rows / 2;
        Ok(open)
    }

    async fn open(full: &TempDir, shards: u16, shard_size: u32) -> Result<Self> {
        let folder = copy_of(full)?;
        let paths = paths(&folder);
        let config = PoolConfig {
            name: paths.pool().clone(),
            space: space(),
            shards,
            shard_size,
            lease: LeaseConfig { rows: READY_ROWS as usize },
            refill: RefillConfig {
                low_water: 0.0,
                retry: Duration::ZERO,
                retry_limit: Duration::ZERO,
            },
            receipts: Recorded::Keyed,
            used_file: None,
        };
        let files = (0..shards).map(ShardIndex).map(|index| {
            let live = Some(Left::open(&paths.live(index))?.seen);
            Ok(ShardFiles { index, live, connection: None, standby: None, damaged: false })
        });
        let mut files: Vec<_> = files.collect::<Result<_>>()?;
        let (pool, workers) = Pool::open(&config, &paths, &mut files, Arc::default(), None).await;
        let workers = workers.into_iter().map(tokio::spawn).collect();
        Ok(Self { pool, workers, ready: 0, _folder: folder })
    }

    /// Measures `iterations` takes of `count` numbers each, which `takes` performs on leased rows.
    fn time(
        &mut self,
        runtime: &Runtime,
        full: &TempDir,
        mut iterations: u64,
        count: u32,
        takes: impl Fn(&Arc<Pool>, u32),
    ) -> Duration {
        let mut time = Duration::ZERO;
        while iterations > 0 {
            if self.ready < count {
                runtime.block_on(self.lease(full));
            }
            let times = u32::try_from(iterations).unwrap_or(u32::MAX).min(self.ready / count);
            let started = Instant::now();
            takes(&self.pool, times);
            time += started.elapsed();
            self.ready -= times * count;
            iterations -= u64::from(times);
        }
        time
    }

    /// Makes sure that rows are leased.
    async fn lease(&mut self, full: &TempDir) {
        if self.pool.levels()[0].left <= 2 * u64::from(READY_ROWS) {
            let next = Self::copy_of(full).await.expect("a shard can be copied");
            std::mem::replace(self, next).close().await;
        }
        // A request for one number more than are leased waits for the next lease, and leaves the rest of it.
        let more = NonZeroU32::MIN.saturating_add(self.ready);
        self.pool.take(more).await.expect("the shard has enough rows");
        self.ready = READY_ROWS - 1;
    }

    async fn close(self) {
        self.pool.stop();
        for worker in self.workers {
            worker.await.expect("a worker does not panic");
        }
    }
}

/// Measures formatting numbers as text, and the response bodies.
fn json(criterion: &mut Criterion) {
    let space = space();
    let values = values(1000);
    let shard = "int_shard_0.db";

    let mut group = criterion.benchmark_group("json");
    group.throughput(Throughput::Elements(1));
    group.bench_function("text of a number", |bencher| {
        bencher.iter(|| black_box(space.number(black_box(values[0]))).as_str().len());
    });
    group.bench_function("answer to one", |bencher| {
        bencher.iter(|| {
            let number = space.number(black_box(values[0]));
            // The way in which the server composes it.
            ["{\"number\":", number.as_str(), ",\"shard\":\"", shard, "\"}"].concat()
        });
    });
    group.throughput(Throughput::Elements(values.len() as u64));
    group.bench_function("answer to count=1000", |bencher| {
        bencher.iter(|| {
            let numbers: Vec<_> =
                black_box(&values).iter().map(|&value| space.number(value)).collect();
            let shards = BTreeMap::from([(shard, numbers.len())]);
            text(&Many { count: numbers.len(), numbers, shards })
        });
    });
    group.finish();
}

/// The body of a response to `count`, as in the server.
#[derive(Serialize)]
struct Many<'a> {
    count: usize,
    numbers: Vec<Number>,
    shards: BTreeMap<&'a str, usize>,
}

fn text(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("all keys are strings")
}

/// Returns the default range of `int`.
fn space() -> Space {
    Space::new("1", "9007199254740991", 0).expect("the default range is valid")
}

/// Returns a new folder in the target folder: the system's folder for temporary files may not be on a disk.
fn folder() -> Result<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

fn paths(folder: &TempDir) -> PoolPaths {
    PoolPaths::new(folder.path(), &PoolName::new("int").expect("a valid name"))
}

/// Copies a folder whose files are not open, and syncs the copy.
fn copy_of(full: &TempDir) -> Result<TempDir> {
    let copy = folder()?;
    for name in files::list(full.path())? {
        let file: PathBuf = copy.path().join(&name);
        std::fs::copy(full.path().join(&name), &file)?;
        // Otherwise the first measured sync would write it.
        files::sync_file(&file)?;
    }
    Ok(copy)
}

/// Returns a folder with a live file of which no rows are used.
fn full_shard() -> Result<TempDir> {
    let folder = folder()?;
    write_shard(&paths(&folder).live(SHARD), SHARD, &values(SUPPLY as usize))?;
    Ok(folder)
}

fn write_shard(path: &Path, shard: ShardIndex, values: &[Value]) -> Result<()> {
    let count = values.len() as u64;
    let batch = Batch { id: BatchId(1), shard, generation: Generation(1), count };
    let pool = PoolName::new("int").expect("a valid name");
    let label = Label::new(Uuid::nil(), &pool, space().decimals(), batch);
    files::create(path)?;
    shard::build(path, &label, &space(), values, &mut |_| ControlFlow::Continue(()))?;
    Ok(files::sync_file(path)?)
}

fn values(count: usize) -> Vec<Value> {
    let (space, mut rng) = (space(), rng());
    (0..count).map(|_| Value(rng.random_range(space.min().0..=space.max().0))).collect()
}

/// Returns the same generator in each run, so that two runs can be compared.
fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(7)
}
