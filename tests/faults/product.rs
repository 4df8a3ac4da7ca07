//! The product on a simulated disk, without HTTP: the real folder, ledger, shards, workers and refillers of
//! some pools and the real receipts, with clients that take numbers and note them.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombola::internals::Space;
use tombola::internals::receipts::Receipts;
use tombola::internals::refill::{Builders, Refiller};
use tombola::internals::sqlite;
use tombola::internals::{Folder, PoolFiles};
use tombola::internals::{LeaseConfig, Mode, PoolConfig, PoolName, Recorded, RefillConfig};
use tombola::internals::{Pool, TakeError};

use crate::disk::Disk;

/// The bound of every wait. Only a product that hangs reaches it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The pause of a client that has to retry.
pub(crate) const COME_BACK: Duration = Duration::from_micros(300);

/// Retries are as quick as the shards are small.
pub(crate) const REFILL: RefillConfig = RefillConfig {
    low_water: 0.5,
    retry: Duration::from_millis(1),
    retry_limit: Duration::from_millis(5),
};

/// The configuration of the product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// 0 means strict.
    pub(crate) lease_rows: usize,
    pub(crate) pools: &'static [PoolSetting],
}

/// A pool of two shards.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolSetting {
    pub(crate) name: &'static str,
    /// The range is 0 to this, exclusive.
    pub(crate) range: usize,
    pub(crate) shard_size: u32,
}

pub(crate) const SHARDS: u16 = 2;

impl PoolSetting {
    pub(crate) fn config(&self, lease_rows: usize) -> PoolConfig {
        PoolConfig {
            name: PoolName::new(self.name).unwrap(),
            space: Space::new("0", &(self.range - 1).to_string(), 0).unwrap(),
            shards: SHARDS,
            shard_size: self.shard_size,
            lease: LeaseConfig { rows: lease_rows },
            refill: REFILL,
            receipts: Recorded::Keyed,
            used_file: None,
        }
    }
}

/// The numbers handed out.
#[derive(Clone, Debug, Default)]
pub(crate) struct HandedOut {
    pools: BTreeMap<String, BTreeSet<i64>>,
    /// The response of each idempotency key.
    keys: BTreeMap<String, Vec<i64>>,
}

impl HandedOut {
    pub(crate) fn of_notes(notes: &[&str]) -> Self {
        let mut handed_out = Self::default();
        for note in notes {
            let (pool, numbers) = note.split_once(' ').expect("a pool and its numbers");
            let (key, numbers) = match numbers.strip_prefix(KEY_MARK) {
                Some(keyed) => keyed.split_once(' ').expect("a key and its numbers"),
                None => ("", numbers),
            };
            let numbers: Vec<i64> =
                numbers.split(' ').map(|number| number.parse().expect("a number")).collect();
            match key {
                "" => handed_out.add(pool, &numbers),
                key => handed_out.add_keyed(pool, key, &numbers),
            }
            .expect("the recording itself has no repeat");
        }
        handed_out
    }

    /// Adds the response of a key.
    ///
    /// # Errors
    /// The key has another response, or one of the numbers was handed out before.
    pub(crate) fn add_keyed(
        &mut self,
        pool: &str,
        key: &str,
        numbers: &[i64],
    ) -> Result<(), String> {
        match self.keys.get(key) {
            Some(first) if first == numbers => Ok(()),
            Some(first) => Err(format!("{key} has two responses: {first:?} and {numbers:?}")),
            None => {
                self.keys.insert(key.to_owned(), numbers.to_vec());
                self.add(pool, numbers).map_err(|error| format!("{key}: {error}"))
            }
        }
    }

    /// Returns the responses of all keys.
    pub(crate) fn keys(&self) -> &BTreeMap<String, Vec<i64>> {
        &self.keys
    }

    /// Adds numbers.
    ///
    /// # Errors
    /// One of them was handed out before.
    pub(crate) fn add(&mut self, pool: &str, numbers: &[i64]) -> Result<(), String> {
        let seen = self.pools.entry(pool.to_owned()).or_default();
        let before = seen.len();
        let again: Vec<_> = numbers.iter().filter(|number| !seen.insert(**number)).collect();
        match again[..] {
            [] => Ok(()),
            _ => Err(format!("repeated after {before} numbers of {pool}: {again:?}")),
        }
    }

    pub(crate) fn has(&self, pool: &str, number: i64) -> bool {
        self.pools.get(pool).is_some_and(|seen| seen.contains(&number))
    }

    pub(crate) fn count(&self, pool: &str) -> usize {
        self.pools.get(pool).map_or(0, BTreeSet::len)
    }
}

/// Returns the note that clients make on the disk when they receive numbers.
pub(crate) fn note(pool: &str, key: Option<&str>, numbers: &[i64]) -> String {
    let begin = match key {
        Some(key) => format!("{pool} {KEY_MARK}{key}"),
        None => pool.to_owned(),
    };
    numbers.iter().fold(begin, |text, number| format!("{text} {number}"))
}

/// Stands before the key in a note.
const KEY_MARK: &str = "key=";

/// Runs the product in something like a process of its own: tasks that are still running at the end are
/// dropped.
pub(crate) fn process<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE * 3, work).await.expect("the product must not hang")
    })
}

/// The running pools.
pub(crate) struct Service {
    pub(crate) pools: Vec<Arc<Pool>>,
    workers: Vec<JoinHandle<()>>,
    refillers: Vec<JoinHandle<Refiller>>,
    stop_refillers: DropGuard,
    pub(crate) receipts: Arc<Receipts>,
    desk: JoinHandle<()>,
    folder: Folder,
}

impl Service {
    /// Starts the product with the same steps as `Server::start`.
    ///
    /// # Errors
    /// The product refuses to start.
    pub(crate) async fn start(disk: &Disk, setting: &Setting) -> Result<Self, String> {
        let path = disk.path("shards");
        let receipts_path = path.clone();
        let configs = setting.pools.iter().map(|pool| pool.config(setting.lease_rows));
        let configs: Vec<PoolConfig> = configs.collect();
        let pools = configs.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let folder = Folder::open(&path, Mode::Sharded, false, Duration::ZERO)?;
            let found = folder.shards()?;
            let shards = |pool: &PoolConfig| found.get(&pool.name).cloned().unwrap_or_default();
            let opened: Result<Vec<PoolFiles>, _> = pools
                .iter()
                .map(|pool| folder.open_pool(pool, &shards(pool), None, true))
                .collect();
            opened.map(|opened| (folder, opened))
        });
        let (folder, found) =
            opened.await.expect("no panic").map_err(|error| format!("refused: {error}"))?;
        let opened = tokio::task::spawn_blocking(move || Receipts::open(&receipts_path, REFILL));
        let (receipts, desk) =
            opened.await.expect("no panic").map_err(|error| format!("refused: {error}"))?;
        let (receipts, desk) = (Arc::new(receipts), tokio::task::spawn_blocking(desk));
        let (stop, builders) = (CancellationToken::new(), Arc::new(Builders::default()));
        let (mut pools, mut workers, mut refillers) = (Vec::new(), Vec::new(), Vec::new());
        for (config, mut files) in configs.iter().zip(found) {
            let PoolFiles { paths, shards, .. } = &mut files;
            let (pool, tasks) = Pool::open(config, paths, shards, Arc::default(), None).await;
            let refiller =
                Refiller::new(files, Arc::clone(&pool), config, None, Arc::clone(&builders));
            refillers.push(tokio::spawn(refiller.run(stop.clone())));
            workers.extend(tasks.into_iter().map(tokio::spawn));
            pools.push(pool);
        }
        let stop_refillers = stop.drop_guard();
        Ok(Self { pools, workers, refillers, stop_refillers, receipts, desk, folder })
    }

    /// Stops the product with the same steps as the end of `Server::run`.
    ///
    /// # Errors
    /// A task panicked or ended too early.
    pub(crate) async fn stop(self) -> Result<(), String> {
        let alive = self.pools.iter().all(|pool| pool.health().alive);
        drop(self.stop_refillers);
        let mut refillers = Vec::new();
        for task in self.refillers {
            refillers.push(task.await.map_err(|error| format!("a refiller: {error}"))?);
        }
        drop(self.receipts);
        self.desk.await.map_err(|error| format!("the desk: {error}"))?;
        for pool in &self.pools {
            pool.stop();
        }
        for task in self.workers {
            task.await.map_err(|error| format!("a worker: {error}"))?;
        }
        for refiller in refillers {
            refiller.close().await;
        }
        drop(self.folder);
        if alive { Ok(()) } else { Err("a task ended by itself".to_owned()) }
    }
}

/// Takes numbers as `GET /random` does.
pub(crate) async fn take(pool: &Arc<Pool>, count: u32) -> Result<Vec<i64>, TakeError> {
    if count == 1
        && let Some((_, value)) = pool.try_take_one()
    {
        return Ok(vec![value.0]);
    }
    let taken = pool.take(NonZeroU32::new(count).expect("more than none")).await?;
    Ok(taken.parts.iter().flat_map(|(_, values)| values).map(|value| value.0).collect())
}

/// Takes at least `wanted` numbers of a pool with several clients at once, and notes them on the disk.
///
/// # Errors
/// No numbers are available for too long.
pub(crate) async fn clients(
    disk: &Arc<Disk>,
    pool: &Arc<Pool>,
    wanted: usize,
    counts: &'static [u32],
) -> Result<(), String> {
    let total = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let (disk, pool, total) = (Arc::clone(disk), Arc::clone(pool), Arc::clone(&total));
        tasks.spawn(async move {
            let started = Instant::now();
            for &count in counts.iter().cycle().skip(client) {
                if total.load(std::sync::atomic::Ordering::Relaxed) >= wanted {
                    break;
                }
                match take(&pool, count).await {
                    Ok(numbers) => {
                        disk.note(note(pool.name().as_str(), None, &numbers));
                        total.fetch_add(numbers.len(), std::sync::atomic::Ordering::Relaxed);
                        tokio::task::yield_now().await;
                    }
                    Err(TakeError::Refilling) if started.elapsed() < PATIENCE => {
                        tokio::time::sleep(COME_BACK).await;
                    }
                    Err(TakeError::Exhausted { .. }) => break,
                    Err(TakeError::Refilling) => return Err("numbers stay unavailable".to_owned()),
                }
            }
            Ok(())
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// The count of clients of a pool.
pub(crate) const CLIENTS: usize = 3;

/// Takes all remaining numbers of a pool, up to the end of its range.
///
/// # Errors
/// A number is repeated, or the end is not reached.
pub(crate) async fn drain(pool: &Arc<Pool>, handed_out: &mut HandedOut) -> Result<(), String> {
    let mut started = Instant::now();
    let mut count = 24;
    loop {
        match take(pool, count).await {
            Ok(numbers) => {
                handed_out.add(pool.name().as_str(), &numbers)?;
                started = Instant::now();
            }
            Err(TakeError::Exhausted { .. }) if count > 1 => count /= 2,
            Err(TakeError::Exhausted { left: 0 }) => return Ok(()),
            Err(error) if started.elapsed() > PATIENCE => {
                return Err(format!("{error}, without end: {:?}", pool.health()));
            }
            Err(_) => tokio::time::sleep(COME_BACK).await,
        }
    }
}

/// Checks that each database of the folder, except those set aside, is intact. Returns how many numbers the
/// ledgers count as burned, by pool.
///
/// # Errors
/// A database is damaged or can't be read.
pub(crate) fn check_files(disk: &Disk, setting: &Setting) -> Result<BTreeMap<String, u64>, String> {
    for name in disk.shared.list("shards").map_err(|error| error.to_string())? {
        if name.ends_with(".db") || name.ends_with(".next") {
            check_file(disk, &name).map_err(|error| format!("{name}: {error}"))?;
        }
    }
    let burned = |pool: &PoolSetting| {
        let path = disk.path(&format!("shards/used_numbers_{}.db", pool.name));
        let ledger = sqlite::open_to_read(&path).map_err(|error| error.to_string())?;
        let burned = ledger.query_row("SELECT burned FROM ledger", [], |row| row.get(0));
        Ok((pool.name.to_owned(), burned.map_err(|error| error.to_string())?))
    };
    setting.pools.iter().map(burned).collect()
}

fn check_file(disk: &Disk, name: &str) -> Result<(), String> {
    let check = || {
        let file = sqlite::open_to_read(&disk.path(&format!("shards/{name}")))?;
        file.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0))
    };
    match check().map_err(|error| error.to_string())?.as_str() {
        "ok" => Ok(()),
        problem => Err(problem.to_owned()),
    }
}

/// Returns the names of the files that the product set aside as damaged.
pub(crate) fn set_aside(disk: &Disk) -> Vec<String> {
    let names = disk.shared.list("shards").unwrap_or_default();
    names
        .into_iter()
        .filter(|name| name.contains(".damaged-"))
        .filter(|name| !name.ends_with("-wal") && !name.ends_with("-shm"))
        .collect()
}
