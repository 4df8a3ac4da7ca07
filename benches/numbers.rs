//! What a number costs at each step of its way: drawn, built, leased, taken, written as JSON. Whole
//! processes are compared by `tools/bench.rs`.
//!
//! To measure a step is to use its numbers up. So each has a supply that is replaced by a copy of a
//! full one before it runs dry, outside the time that counts.

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
use tombola::batch::{Batch, BatchId, Generation, ShardIndex};
use tombola::config::{LeaseConfig, PoolConfig, PoolName, RefillConfig};
use tombola::files;
use tombola::folder::{PoolPaths, ShardFiles};
use tombola::ledger::Ledger;
use tombola::pool::Pool;
use tombola::shard::{self, Label, Shard};
use tombola::space::{Number, Space, Value};
use tombola::sqlite::rusqlite::Connection;
use tombola::sqlite::{self, LOG_PAGES_MAX};
use uuid::Uuid;

/// Values in the ledger that is drawn into, and rows of the shard that is leased from.
const SUPPLY: u64 = 1_000_000;

/// Rows of the shard that is built.
const BUILD_ROWS: usize = 100_000;

/// Rows of a lease, as by default.
const LEASE_ROWS: usize = 1024;

/// Rows that lie leased before numbers are taken, 1 MB: so that few samples are made of parts.
const READY_ROWS: u32 = 1 << 16;

const SHARD: ShardIndex = ShardIndex(0);

fn main() -> Result<()> {
    // All of it in under a minute and a half, copies of supplies included: criterion plans by the
    // clock on the wall.
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(20)
        .configure_from_args();
    draw(&mut criterion)?;
    build(&mut criterion)?;
    lease(&mut criterion)?;
    take(&mut criterion)?;
    json(&mut criterion);
    criterion.final_summary();
    Ok(())
}

/// Fresh values into a ledger, durably.
fn draw(criterion: &mut Criterion) -> Result<()> {
    let full = folder()?;
    let mut ledger = Ledger::create(&paths(&full).ledger(), &space())?;
    draw_once(&mut ledger, SUPPLY);
    ledger.close()?;

    let mut group = criterion.benchmark_group("draw");
    // Each sample takes a while.
    group.sample_size(10);
    for count in [10_000, 100_000] {
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("{count} into 1M"), |bencher| {
            bencher.iter_custom(|iterations| {
                // Each sample begins with the same ledger, and with a connection that has read it.
                let copy = copy_of(&full).expect("a ledger can be copied");
                let mut ledger =
                    Ledger::open_as_it_is(&paths(&copy).ledger()).expect("it was just made");
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
    let batch = draw.and_then(|draw| draw.commit()).expect("the disk takes it");
    assert_eq!(batch.count, count);
}

/// A whole shard file, synced.
fn build(criterion: &mut Criterion) -> Result<()> {
    let folder = folder()?;
    let path = paths(&folder).unfinished(SHARD);
    let values = values(BUILD_ROWS);

    let mut group = criterion.benchmark_group("build");
    group.throughput(Throughput::Elements(BUILD_ROWS as u64));
    group.bench_function(format!("{BUILD_ROWS} rows"), |bencher| {
        bencher.iter_batched(
            || files::remove(&path).expect("it is ours"),
            |()| write_shard(&path, &values).expect("the disk takes it"),
            BatchSize::PerIteration,
        );
    });
    group.finish();
    Ok(())
}

/// Rows of a live file, marked as used, durably.
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
                    // As its worker does: leases pay for the checkpoints that they bring about.
                    if shard.log_pages() >= LOG_PAGES_MAX {
                        shard.checkpoint(connection).expect("the disk takes it");
                    }
                    time += started.elapsed();
                    assert_eq!(leased.expect("the disk takes it").len(), rows);
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
    /// After the connection: it has files there.
    _folder: TempDir,
}

impl OpenShard {
    fn copy_of(full: &TempDir) -> Result<Self> {
        let folder = copy_of(full)?;
        let mut connection = sqlite::open(&paths(&folder).live(SHARD))?;
        Ok(Self { shard: Shard::open(&mut connection)?, connection, _folder: folder })
    }
}

/// Leased numbers out of a pool, as a request takes them.
fn take(criterion: &mut Criterion) -> Result<()> {
    let full = full_shard()?;
    // One thread, which is in this code while the time counts: nothing is leased meanwhile.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut supply = runtime.block_on(OpenPool::copy_of(&full))?;

    let mut group = criterion.benchmark_group("take");
    group.throughput(Throughput::Elements(1));
    group.bench_function("one", |bencher| {
        bencher.iter_custom(|iterations| {
            supply.time(&runtime, &full, iterations, 1, |pool, times| {
                for _ in 0..times {
                    black_box(pool.try_take_one().expect("it lies leased"));
                }
            })
        });
    });
    let count = NonZeroU32::new(100).expect("it is not 0");
    group.throughput(Throughput::Elements(count.get().into()));
    group.bench_function(format!("{count}"), |bencher| {
        bencher.iter_custom(|iterations| {
            supply.time(&runtime, &full, iterations, count.get(), |pool, times| {
                runtime.block_on(async {
                    for _ in 0..times {
                        black_box(pool.take(count).await.expect("they lie leased"));
                    }
                });
            })
        });
    });
    group.finish();
    runtime.block_on(supply.close());
    Ok(())
}

/// A pool of one shard, which nobody refills.
struct OpenPool {
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    /// Rows that lie leased.
    ready: u32,
    _folder: TempDir,
}

impl OpenPool {
    async fn copy_of(full: &TempDir) -> Result<Self> {
        let folder = copy_of(full)?;
        let paths = paths(&folder);
        let live = shard::read_label(&paths.live(SHARD))?;
        let config = PoolConfig {
            name: paths.pool().clone(),
            space: space(),
            shards: 1,
            shard_size: SUPPLY as u32,
        };
        let lease = LeaseConfig { rows: READY_ROWS as usize };
        let refill =
            RefillConfig { low_water: 0.0, retry: Duration::ZERO, retry_limit: Duration::ZERO };
        let files = [ShardFiles { index: SHARD, live: Some(live), standby: None, damaged: false }];
        let (pool, workers) =
            Pool::open(&config, lease, refill, &paths, &files, Arc::default(), None).await;
        Ok(Self { pool, workers, ready: 0, _folder: folder })
    }

    /// The time of as many takes of `count` numbers, done by `takes` from what lies leased.
    fn time(
        &mut self,
        runtime: &Runtime,
        full: &TempDir,
        mut iterations: u64,
        count: u32,
        takes: impl Fn(&Pool, u32),
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

    /// Sees to it that rows lie leased.
    async fn lease(&mut self, full: &TempDir) {
        if self.pool.levels()[0].left <= 2 * u64::from(READY_ROWS) {
            let next = Self::copy_of(full).await.expect("a shard can be copied");
            std::mem::replace(self, next).close().await;
        }
        // One more than there is has to wait for the next lease, and leaves the rest of it.
        let more = NonZeroU32::MIN.saturating_add(self.ready);
        self.pool.take(more).await.expect("the shard has as many");
        self.ready = READY_ROWS - 1;
    }

    async fn close(self) {
        self.pool.stop();
        for worker in self.workers {
            worker.await.expect("a worker does not panic");
        }
    }
}

/// Numbers as text, and the bodies that they go out in.
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
            // As the server puts it together.
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

/// The body of an answer to `count`, as the server has it.
#[derive(Serialize)]
struct Many<'a> {
    count: usize,
    numbers: Vec<Number>,
    shards: BTreeMap<&'a str, usize>,
}

fn text(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("it has no maps with odd keys")
}

/// The range of `int` by default.
fn space() -> Space {
    Space::new("1", "9007199254740991", 0).expect("it is one by default")
}

/// A folder beside what is compiled: the system's own for temporary files may be no disk at all.
fn folder() -> Result<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

fn paths(folder: &TempDir) -> PoolPaths {
    PoolPaths::new(folder.path(), &PoolName::new("int").expect("it is one by default"))
}

/// A folder with the same files, which nobody has open, on the disk.
fn copy_of(full: &TempDir) -> Result<TempDir> {
    let copy = folder()?;
    for name in files::list(full.path())? {
        let file: PathBuf = copy.path().join(&name);
        std::fs::copy(full.path().join(&name), &file)?;
        // Else the first sync that is measured would write it.
        files::sync_file(&file)?;
    }
    Ok(copy)
}

/// A folder with a live file that has all its rows.
fn full_shard() -> Result<TempDir> {
    let folder = folder()?;
    write_shard(&paths(&folder).live(SHARD), &values(SUPPLY as usize))?;
    Ok(folder)
}

fn write_shard(path: &Path, values: &[Value]) -> Result<()> {
    let count = values.len() as u64;
    let batch = Batch { id: BatchId(1), shard: SHARD, generation: Generation(1), count };
    let pool = PoolName::new("int").expect("it is one by default");
    let label = Label::new(Uuid::nil(), &pool, space().decimals(), batch);
    files::create(path)?;
    shard::build(path, &label, values, &mut |_| ControlFlow::Continue(()))?;
    Ok(files::sync_file(path)?)
}

fn values(count: usize) -> Vec<Value> {
    let (space, mut rng) = (space(), rng());
    (0..count).map(|_| Value(rng.random_range(space.min().0..=space.max().0))).collect()
}

/// The same in each run, so that two runs can be compared.
fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(7)
}
