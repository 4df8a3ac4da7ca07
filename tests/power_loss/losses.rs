//! Power losses at random moments: under load, in a refill after a rest, and in a start.
//!
//! Story: the index of a log is a memory-mapped file, which the kernel writes back whenever it likes. A
//! refill after a rest began by truncating the ledger's log, and then the power was lost. The index on the
//! disk still listed the frames of the old log, and the next start took their absence for damage.
//!
//! `POWER_LOSSES=N` sets how many there are on each file system, `POWER_LOSSES_SEED=N` the seed of their
//! moments.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use reqwest::Method;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::support::keyed::{self, Keyed};
use super::support::{Client, Config, PATIENCE, Process, Server, Site, eventually, random, run};
use super::volume::{FileSystem, QuickWriteback, Switch, Volume};

/// Each pool, and the factor that turns its numbers into values.
const POOLS: [(&str, f64); 2] = [("int", 1.0), ("float", 1e6)];
const SHARDS: u16 = 2;
/// Few, so that shards are refilled and swapped continually.
const SHARD_SIZE: u32 = 8_000;
/// The default of `lease.rows`.
const LEASE_ROWS: u64 = 1_024;
/// The count of clients of each pool.
const CLIENTS: usize = 4;
/// The count of clients with idempotency keys, all of the pool int.
const KEYED_CLIENTS: usize = 3;
const COUNTS: &[Option<u32>] = &[None, Some(100), None, Some(1_000), Some(7)];
const COUNT_MAX: u64 = 1_000;
/// The largest value of each pool, far more than all rounds hand out.
const LAST: u64 = (1 << 29) - 1;

/// Enough for the ledgers of many power losses.
const IMAGE_BYTES: u64 = 8 << 30;

/// How many numbers of a pool may be on the way to clients when the power is lost.
const UNDERWAY_MAX: u64 = CLIENTS as u64 * COUNT_MAX + (KEYED_CLIENTS as u32 * keyed::COUNT) as u64;
/// How many numbers of a pool one power loss may burn: two leases of each shard, and leases for waiting
/// requests.
const BURNED_MAX: u64 = SHARDS as u64 * 2 * LEASE_ROWS + UNDERWAY_MAX;

/// A ledger's log of this length is checkpointed before the next draw.
const LOG_BYTES: u64 = 4 << 20;
/// The greatest duration of the load before a rest.
const LOAD_MAX: Duration = Duration::from_secs(1);

/// After a rest of this length, the kernel has written back the index of each log.
const REST: Duration = Duration::from_millis(1_700);

#[tokio::test(flavor = "multi_thread")]
async fn every_start_after_a_power_loss_serves_and_no_number_comes_twice() {
    let (losses, seed) = (variable("POWER_LOSSES", 20), variable("POWER_LOSSES_SEED", 1));
    let sites = FileSystem::ALL.map(|kind| {
        let site = Site::new(&config());
        let volume = Volume::mount(kind, IMAGE_BYTES, &site.data())?;
        Some(Lives::new(kind, site, volume, seed))
    });
    let [Some(ext4), Some(xfs)] = sites else {
        return;
    };
    let _writeback = QuickWriteback::begin();
    tokio::join!(ext4.lose_power(losses), xfs.lose_power(losses));
}

fn variable(name: &str, other: u64) -> u64 {
    std::env::var(name).map_or(other, |value| value.parse().unwrap())
}

fn config() -> Config {
    Config::new().int_and_float(LAST, SHARDS, SHARD_SIZE)
}

/// When the power is lost.
#[derive(Debug)]
enum Moment {
    /// This long after the load began.
    UnderLoad(Duration),
    /// This long after a refill has begun to build its file, the first one after a rest.
    InRefill(Duration),
    /// This long after the process was started.
    InStart(Duration),
}

impl Moment {
    fn random(rng: &mut ChaCha20Rng) -> Self {
        let within =
            |rng: &mut ChaCha20Rng, ms: u64| Duration::from_micros(rng.random_range(..ms * 1000));
        match rng.random_range(0..10) {
            0..3 => Self::UnderLoad(within(rng, 400)),
            3..8 => Self::InRefill(within(rng, 20)),
            _ => Self::InStart(within(rng, 150)),
        }
    }
}

/// A folder on a volume, and the numbers received from all servers that ran on it.
struct Lives {
    // Declared first, so that it is unmounted before the folder is removed.
    volume: Volume,
    site: Site,
    kind: FileSystem,
    rng: ChaCha20Rng,
    pools: [Received; 2],
    keyed: Keyed,
    losses: u64,
    /// The count of power losses before the last successful start.
    losses_seen: u64,
    longest_start: Duration,
}

/// The numbers received from a pool.
struct Received {
    name: &'static str,
    scale: f64,
    /// One bit for each value.
    seen: Vec<u64>,
    count: u64,
    /// How many numbers are burned, according to the last server.
    burned: u64,
}

impl Lives {
    fn new(kind: FileSystem, site: Site, volume: Volume, seed: u64) -> Self {
        Self {
            volume,
            site,
            kind,
            rng: ChaCha20Rng::seed_from_u64(seed),
            pools: POOLS.map(|(name, scale)| Received::new(name, scale)),
            keyed: Keyed::new(POOLS[0].0),
            losses: 0,
            losses_seen: 0,
            longest_start: Duration::ZERO,
        }
    }

    async fn lose_power(mut self, losses: u64) {
        for loss in 1..=losses {
            let moment = Moment::random(&mut self.rng);
            println!("{:?} {loss}: {moment:?}", self.kind);
            match moment {
                Moment::InStart(moment) => {
                    let switch = self.volume.switch();
                    let process = Process::spawn(self.site.tombola());
                    tokio::time::sleep(moment).await;
                    cut(process, switch).await;
                }
                moment => self.serve_and_lose_power(&moment).await,
            }
            self.volume.boot();
            self.losses = loss;
        }
        let server = self.start().await;
        self.keyed.finish(&server).await;
        server.stop().await;
        let keyed = self.keyed.numbers();
        self.pools[0].add(&keyed);
        self.look_whole().await;
        let [int, float] = &self.pools;
        println!(
            "{:?}: {losses} power losses, {} numbers, none twice, {} of them with keys; burned {}; longest start \
             {:?}",
            self.kind,
            int.count + float.count,
            keyed.len(),
            int.burned + float.burned,
            self.longest_start,
        );
    }

    async fn serve_and_lose_power(&mut self, moment: &Moment) {
        let switch = self.volume.switch();
        let server = self.start().await;
        let (work, working) = watch::channel(true);
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS * POOLS.len() {
            let counts = COUNTS.iter().copied().cycle().skip(client);
            let pool = client % POOLS.len();
            clients.spawn(take_until_gone(server.client(), pool, counts, working.clone()));
        }
        let keyed = self.keyed.load(&server, KEYED_CLIENTS, &working);
        match moment {
            Moment::InRefill(moment) => {
                let pool = self.log_is_long().await;
                work.send_replace(false);
                tokio::time::sleep(REST).await;
                work.send_replace(true);
                self.builds(pool).await;
                tokio::time::sleep(*moment).await;
            }
            Moment::UnderLoad(moment) | Moment::InStart(moment) => {
                tokio::time::sleep(*moment).await
            }
        }
        cut(server.process, switch).await;
        drop(work);
        keyed.join().await;
        for (pool, numbers) in clients.join_all().await {
            self.pools[pool].add(&numbers);
        }
    }

    /// Starts a server, which has to serve both pools, and compares its figures with the numbers received.
    async fn start(&mut self) -> Server {
        let started = Instant::now();
        let server = match Server::start_or_end(self.site.tombola()).await {
            Ok(server) => server,
            Err(end) => {
                panic!("{:?}: the start was refused, {}: {}", self.kind, end.status, end.stderr)
            }
        };
        let status = server.get("/status").await;
        status.assert_status(200);
        let status: Value = serde_json::from_str(&status.body).unwrap();
        let mut keyed = self.keyed.numbers().len() as u64;
        for pool in &mut self.pools {
            let received = pool.count + std::mem::take(&mut keyed);
            let new_losses = self.losses - self.losses_seen;
            pool.compare(&status["pools"][pool.name], received, self.losses, new_losses);
            pool.add(&server.take(pool.name, None).await);
        }
        self.losses_seen = self.losses;
        self.longest_start = self.longest_start.max(started.elapsed());
        let set_aside = self.site.files(".damaged-");
        assert!(set_aside.is_empty(), "{:?}: files were set aside: {set_aside:?}", self.kind);
        server
    }

    /// Waits until a ledger's log is long, up to a time limit. Returns the pool with the longest log.
    async fn log_is_long(&self) -> &'static str {
        let deadline = Instant::now() + LOAD_MAX;
        loop {
            let length = |name| self.site.file(&format!("used_numbers_{name}.db-wal"));
            let length = |name| std::fs::metadata(length(name)).map_or(0, |file| file.len());
            let (length, name) =
                POOLS.map(|(name, _)| (length(name), name)).into_iter().max().unwrap();
            if length > LOG_BYTES || Instant::now() >= deadline {
                return name;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until a refill of a pool is in progress. It takes only milliseconds, so this polls without a
    /// pause.
    async fn builds(&self, pool: &str) {
        let deadline = Instant::now() + PATIENCE;
        let is_built = |name: &String| name.starts_with(pool) && name.ends_with(".db.tmp");
        while !self.site.files(".db.tmp").iter().any(is_built) {
            assert!(Instant::now() < deadline, "gave up waiting for a refill");
            tokio::task::yield_now().await;
        }
    }

    async fn look_whole(&self) {
        let finished = run(self.site.console(&["verify"])).await;
        assert_eq!(finished.status.code(), Some(0), "{}{}", finished.stdout, finished.stderr);
    }
}

impl Received {
    fn new(name: &'static str, scale: f64) -> Self {
        Self { name, scale, seen: vec![0; (LAST / 64 + 1) as usize], count: 0, burned: 0 }
    }

    fn add(&mut self, numbers: &[String]) {
        for number in numbers {
            // Numbers of nine digits are exact after rounding.
            let value = (number.parse::<f64>().unwrap() * self.scale).round() as usize;
            let (word, bit) = (&mut self.seen[value / 64], 1 << (value % 64));
            assert_eq!(*word & bit, 0, "{} {number} was issued twice", self.name);
            *word |= bit;
        }
        self.count += numbers.len() as u64;
    }

    /// Compares the figures of a server at its start with the count of numbers received. `new_losses` of the `losses`
    /// happened after the last successful start.
    fn compare(&mut self, status: &Value, received: u64, losses: u64, new_losses: u64) {
        let figure = |name| status[name].as_u64().unwrap();
        let (issued, burned) = (figure("issued"), figure("burned"));
        let newly_burned = burned - self.burned;
        let Self { name, .. } = self;
        assert!(newly_burned <= new_losses * BURNED_MAX, "{name}: {newly_burned} newly burned");
        // A power loss in a start may count burned numbers twice. Such numbers then don't count as issued.
        assert!(
            issued + burned >= received,
            "{name}: {received} were received, {issued} issued, {burned} burned"
        );
        assert!(
            issued <= received + losses * UNDERWAY_MAX,
            "{name}: {received} were received, {issued} issued"
        );
        self.burned = burned;
    }
}

/// Takes numbers of a pool while there is `work`, until the server is gone.
async fn take_until_gone(
    client: Client,
    pool: usize,
    mut counts: impl Iterator<Item = Option<u32>>,
    mut work: watch::Receiver<bool>,
) -> (usize, Vec<String>) {
    let mut numbers = Vec::new();
    loop {
        // An error means that the round is over, and the server gone too.
        let _ = work.wait_for(|work| *work).await;
        let count = counts.next().unwrap();
        match client.send(Method::GET, &random(POOLS[pool].0, count)).await {
            Ok(answer) if answer.status == 200 => numbers.extend(answer.numbers()),
            Ok(answer) => answer.assert_refilling(),
            Err(_) => return (pool, numbers),
        }
    }
}

/// Cuts the power of a running process.
///
/// The process is stopped first: until the ioctl is complete, ext4 can report success for a sync that never
/// reaches the disk. A real power loss can't do that, and the process would be blamed for what it does next.
async fn cut(mut process: Process, switch: Switch) {
    process.signal(Signal::SIGSTOP);
    eventually("a stopped process", async || is_stopped(process.id()).then_some(())).await;
    switch.cut();
    process.signal(Signal::SIGKILL);
    let end = process.finish().await;
    assert_eq!(end.status.signal(), Some(9), "it ended by itself, {}: {}", end.status, end.stderr);
}

/// Returns whether no thread of a process can continue by itself. A thread that waits for the disk, maybe in
/// a sync, stops when the call returns.
fn is_stopped(process: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads.map(|thread| thread.unwrap().path().join("stat")).all(|stat| {
        // A thread that is gone can't continue either.
        let stat = std::fs::read_to_string(stat).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        matches!(state, None | Some('T' | 'D' | 'Z' | 'X'))
    })
}
