//! A disk or a quota that is full while the server starts, serves and refills, and a process that may open
//! few files. All of these are temporary, and no number may be lost because of them.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use deadpool_sqlite::rusqlite::Connection;
use reqwest::Method;
use serde_json::Value;

use super::quota::with_quota;
use super::support::{
    Config, Health, Server, Site, assert_each_once, eventually, integers, random, run,
};
use super::volume::{FileSystem, SMALL_BYTES, Volume};

/// Far more numbers than any test here takes.
const LAST: i64 = 999_999_999;

/// Runs a test on each file system, one after the other.
async fn on_each(config: &Config, test: impl AsyncFn(&Site, &Volume)) {
    for kind in FileSystem::ALL {
        let site = Site::new(config);
        let Some(volume) = Volume::mount(kind, SMALL_BYTES, &site.data()) else {
            return;
        };
        println!("on {kind:?}");
        test(&site, &volume).await;
    }
}

/// Story: SQLite recognizes a full disk, but takes a used-up quota for a failing disk. Both shards of a pool
/// were given up within milliseconds, although the quota was raised seconds later.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_used_up_costs_no_more_than_a_crash() {
    const SHARDS: u16 = 2;
    const LEASE_ROWS: u64 = 256;
    let config = Config::new().pool("int", 0, LAST, SHARDS, 4_000).set("lease.rows", LEASE_ROWS);
    on_each(&config, async |site, volume| {
        let server = Server::start(with_quota(site)).await;
        is_ok(&server, SHARDS).await;
        let mut numbers = server.take("int", Some(100)).await;
        volume.fill(0);
        // The server may serve the numbers that it has, and then refuses requests.
        loop {
            let answer = server.get(&random("int", Some(50))).await;
            if answer.status != 200 {
                answer.assert_refilling();
                break;
            }
            numbers.extend(answer.numbers());
        }
        none_set_aside(site);
        volume.make_room();
        numbers.extend(server.take("int", Some(1_000)).await);
        is_ok(&server, SHARDS).await;
        none_set_aside(site);
        let burned = figure(&server, "burned").await;
        assert!(burned <= u64::from(SHARDS) * 2 * LEASE_ROWS, "{burned} numbers are burned");
        ends_whole(site, server, &numbers).await;
    })
    .await;
}

/// Story: a draw that failed on a full disk left its frames in the ledger's log, which was much longer than
/// the space that was freed then. Each retry copied the whole log, and the partial copy took up the freed
/// space.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_recovers_once_the_next_refill_has_space() {
    const SHARDS: u16 = 2;
    const SHARD_SIZE: u32 = 6_000;
    /// Much longer than the space that is freed.
    const LONG_LOG_BYTES: u64 = 2 << 20;
    /// The free space in addition to the next file of a shard, less than a draw adds to the log.
    const SPARE_BYTES: u64 = 64 << 10;
    /// How many refills fail before space is freed.
    const FAILURES: u64 = 5;
    /// A rename needs some space too: xfs refuses it unless about 40 blocks are free.
    const RENAME_BYTES: u64 = 256 << 10;
    let config = Config::new().pool("int", 0, LAST, SHARDS, SHARD_SIZE);
    on_each(&config, async |site, volume| {
        let server = site.start().await;
        is_ok(&server, SHARDS).await;
        let mut numbers = Vec::new();
        // A reader keeps the server from checkpointing the log.
        let reader = Connection::open(site.file("used_numbers_int.db")).unwrap();
        reader.execute_batch("BEGIN; SELECT count(*) FROM ledger").unwrap();
        let (mut log_bytes, mut draw_bytes) = (0, 0);
        while log_bytes < LONG_LOG_BYTES {
            numbers.extend(server.take("int", Some(500)).await);
            let longer = length(&site.file("used_numbers_int.db-wal"));
            draw_bytes = draw_bytes.max(longer.saturating_sub(log_bytes));
            log_bytes = longer;
        }
        is_ok(&server, SHARDS).await;
        let file_bytes = length(&site.file("int_shard_0.db"));
        volume.fill(usize::try_from(file_bytes + SPARE_BYTES).unwrap());
        drop(reader);
        eventually("refills that fail", async || {
            let answer = server.get(&random("int", Some(100))).await;
            if answer.status == 200 {
                numbers.extend(answer.numbers());
            }
            (refills(&server, "failed").await >= FAILURES).then_some(())
        })
        .await;
        let filled = refills(&server, "filled").await;
        println!("a file has {file_bytes} bytes, a draw at most {draw_bytes}, the log {log_bytes}");
        volume.free(file_bytes + draw_bytes + RENAME_BYTES);
        eventually("a refill", async || (refills(&server, "filled").await > filled).then_some(()))
            .await;
        none_set_aside(site);
        volume.make_room();
        is_ok(&server, SHARDS).await;
        numbers.extend(server.take("int", Some(SHARD_SIZE)).await);
        assert_eq!(figure(&server, "burned").await, 0, "a full disk must not burn numbers");
        ends_whole(site, server, &numbers).await;
    })
    .await;
}

/// Story: a service manager sets a soft limit of 1,024 open files, which the process can raise. The shards
/// were opened before the limit was raised, and those that could not be opened were set aside as damaged.
#[tokio::test(flavor = "multi_thread")]
async fn shards_beyond_the_soft_limit_of_open_files_are_served() {
    const SHARDS: u16 = 400;
    let site = Site::new(&Config::new().pool("int", 0, 39_999, SHARDS, 100));
    site.fill().await;
    let mut command = Command::new("prlimit");
    let tombola = site.tombola();
    command.args(["--nofile=1024:", "--"]).arg(tombola.get_program()).args(tombola.get_args());
    command.current_dir(site.folder());
    let server = Server::start(command).await;
    none_set_aside(&site);
    is_ok(&server, SHARDS).await;
    assert_eq!(figure(&server, "burned").await, 0);
    let numbers = server.drain("int", 4, &[Some(1_000)]).await;
    assert_each_once(&numbers, 0..=39_999);
    server.stop().await;
}

/// Story: with 140 kB free on the disk, a start opened one shard of three and set two aside, and 8,000 of
/// 12,000 numbers were lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_on_an_almost_full_disk_loses_nothing() {
    const ALL: i64 = 11_999;
    /// More space than three shards need to be opened.
    const ENOUGH_BYTES: u64 = 4 << 20;
    on_each(&Config::new().pool("int", 0, ALL, 3, 4_000), async |site, volume| {
        site.fill().await;
        volume.fill(0);
        // From no space to all the space that they need, so that each step of a start finds the disk full.
        for spare_bytes in [0, 40_000, 80_000, 140_000, 200_000, 260_000, 400_000] {
            volume.free(spare_bytes);
            // The server may refuse, if it starts once there is space.
            let started = Server::start_or_refusal(site.tombola()).await;
            println!(
                "{spare_bytes} bytes: it {}",
                if started.is_ok() { "serves" } else { "refuses" }
            );
            none_set_aside(site);
            volume.free(ENOUGH_BYTES);
            let server = match started {
                Ok(server) => server,
                Err(_) => site.start().await,
            };
            is_ok(&server, 3).await;
            server.stop().await;
            volume.fill(0);
        }
        volume.make_room();
        let server = site.start().await;
        let numbers = server.drain("int", 4, &[None, Some(100)]).await;
        assert_each_once(&numbers, 0..=ALL);
        server.stop().await;
    })
    .await;
}

/// Story: an update was meant to reserve space for a shard's leases in its log when the shard is opened, but
/// SQLite omitted it because it changed nothing. When the disk became full after that, the numbers in the
/// shards were not served.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_serves_all_numbers_that_can_be_leased() {
    const ALL: i64 = 11_999;
    // Larger than a log, so that the log is restarted more than once.
    on_each(&Config::new().pool("int", 0, ALL, 2, 6_000), async |site, volume| {
        site.fill().await;
        let server = site.start().await;
        is_ok(&server, 2).await;
        volume.fill(0);
        for index in 0..2 {
            let file = site.file(&format!("int_shard_{index}.db"));
            let log = site.file(&format!("int_shard_{index}.db-wal"));
            assert!(length(&log) >= length(&file), "{} has {} bytes", log.display(), length(&log));
        }
        let numbers = server.drain("int", 4, &[None, Some(100)]).await;
        assert_each_once(&numbers, 0..=ALL);
        none_set_aside(site);
        volume.make_room();
        server.stop().await;
    })
    .await;
}

/// A receipt that can't be saved costs no number, and its key stays free. Requests without a key are served.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_keys_and_burns_nothing() {
    const COUNT: u32 = 1_000;
    /// More requests than receipts that fit into the space that their log has already.
    const REQUESTS: usize = 400;
    on_each(&Config::new().pool("int", 0, LAST, 2, 300_000), async |site, volume| {
        site.fill().await;
        let server = site.start().await;
        is_ok(&server, 2).await;
        let client = server.client();
        let keyed = async |key: &str| {
            let header = [("idempotency-key", key)];
            let target = random("int", Some(COUNT));
            client.send_with(Method::POST, &target, &header).await.unwrap()
        };
        let first = keyed("first").await;
        first.assert_status(200);
        let mut numbers = first.numbers();
        volume.fill(0);
        let mut refused = None;
        for index in 0..REQUESTS {
            let key = format!("key-{index}");
            let answer = keyed(&key).await;
            if answer.status == 503 {
                assert!(answer.body.contains("receipt_not_saved"), "{}", answer.body);
                refused = Some(key);
                break;
            }
            numbers.extend(answer.numbers());
        }
        let refused = refused.expect("a receipt that did not fit");
        assert_eq!(keyed("first").await.body, first.body, "known keys stay known");
        let without_key = server.get(&random("int", Some(COUNT))).await;
        without_key.assert_status(200);
        numbers.extend(without_key.numbers());
        volume.make_room();
        let answer = eventually("a receipt that is saved", async || {
            let answer = keyed(&refused).await;
            (answer.status == 200).then_some(answer)
        })
        .await;
        assert_eq!(keyed(&refused).await.body, answer.body);
        numbers.extend(answer.numbers());
        assert_eq!(figure(&server, "burned").await, 0, "a full disk must not burn numbers");
        assert_eq!(figure(&server, "issued").await, numbers.len() as u64);
        ends_whole(site, server, &numbers).await;
    })
    .await;
}

/// Waits until the server is healthy and all shards are in rotation.
async fn is_ok(server: &Server, shards: u16) {
    eventually("a healthy server", async || {
        let answer = server.get("/health").await;
        let health = answer.parse::<Health>();
        let in_rotation = health.pools["int"].shards_in_rotation;
        (health.status == "ok" && in_rotation == usize::from(shards)).then_some(())
    })
    .await;
}

fn none_set_aside(site: &Site) {
    let set_aside = site.files(".damaged-");
    assert!(set_aside.is_empty(), "files were set aside without damage: {set_aside:?}");
}

async fn figure(server: &Server, name: &str) -> u64 {
    let status: Value = serde_json::from_str(&server.get("/status").await.body).unwrap();
    status["pools"]["int"][name].as_u64().unwrap()
}

/// Returns how many refills had this outcome.
async fn refills(server: &Server, outcome: &str) -> u64 {
    let metrics = server.get("/metrics").await.body;
    let mut lines = metrics.lines().filter_map(|line| line.rsplit_once(' '));
    let (_, count) = lines
        .find(|(name, _)| {
            name.starts_with("tombola_refill_duration_seconds_count{") && name.contains(outcome)
        })
        .unwrap();
    count.parse().unwrap()
}

async fn ends_whole(site: &Site, server: Server, numbers: &[String]) {
    server.stop().await;
    let numbers = integers(numbers);
    let different: HashSet<_> = numbers.iter().collect();
    assert_eq!(different.len(), numbers.len(), "a number was issued twice");
    let finished = run(site.console(&["verify"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}{}", finished.stdout, finished.stderr);
}

fn length(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |file| file.len())
}
