//! A server with many small pools: what each occupies, and how many are built at once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Config, Finished, Health, Process, Server, Site, eventually, missing, run};

const POOLS: usize = 100;
const SHARD_SIZE: u32 = 5_000;
const LAST: i64 = 999_999_999;

/// The memory that a pool may occupy.
const POOL_KB: u64 = 500;

/// The memory of a server without pools, of a development build.
const SERVER_KB: u64 = 25_000;

fn name(pool: usize) -> String {
    format!("campaign_{pool}")
}

fn config(pools: usize, shards: u16, shard_size: u32) -> Config {
    (0..pools)
        .fold(Config::new(), |config, pool| config.pool(&name(pool), 0, LAST, shards, shard_size))
}

/// Returns a figure of `/proc/PID/status`.
fn figure(process: &Process, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Returns the names of the files of the data folder that a process has open.
fn open_files(process: &Process, site: &Site) -> Vec<String> {
    let files = fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap();
    let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    let ours = links.filter(|link| link.parent() == Some(&site.data()));
    ours.map(|link| link.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

/// Waits until every ledger is closed, which is so once no pool needs a refill.
async fn all_rest(server: &Server, site: &Site) {
    eventually("closed ledgers", async || {
        let files = open_files(&server.process, site);
        (!files.iter().any(|file| file.starts_with("used_numbers_"))).then_some(())
    })
    .await;
}

/// Story: 200 pools took 325 MB, 1,440 open files and 517 threads.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_takes_little_memory_and_few_files() {
    let site = Site::new(&config(POOLS, 2, SHARD_SIZE));
    site.fill().await;
    let server = site.start().await;
    for pool in 0..POOLS {
        server.get(&support::random(&name(pool), None)).await.assert_status(200);
    }
    all_rest(&server, &site).await;
    let shards = open_files(&server.process, &site);
    let shards: Vec<_> = shards.iter().filter(|file| file.contains("_shard_")).collect();
    // Each shard has a file, a log and the log's index.
    assert!(shards.len() <= 6 * POOLS, "{} files of shards are open", shards.len());
    let memory = figure(&server.process, "VmRSS:");
    println!("{memory} kB");
    assert!(memory < SERVER_KB + POOLS as u64 * POOL_KB, "{POOLS} pools take {memory} kB");
    server.stop().await;
}

/// Story: at a start, each pool had a thread for its build and one for each of its shards.
#[tokio::test(flavor = "multi_thread")]
async fn builds_and_threads_are_bounded() {
    let cores = num_cpus::get();
    let site = Site::new(&config(POOLS, 2, 500));
    let mut command = site.tombola();
    command.env("RUST_LOG", "tombola=debug");
    let server = Server::start(command).await;
    let mut most_threads = 0;
    for pool in 0..POOLS {
        most_threads = most_threads.max(figure(&server.process, "Threads:"));
        server.take(&name(pool), None).await;
    }
    // A ledger may be closed between the builds of its shards, so that all rest is not enough.
    eventually("built shards", async || {
        let status: Value = server.get("/status").await.parse();
        let mut pools = status["pools"].as_object().unwrap().values();
        let serves = |shard: &Value| shard["state"] == "in_rotation";
        pools.all(|pool| pool["shards"].as_array().unwrap().iter().all(serves)).then_some(())
    })
    .await;
    all_rest(&server, &site).await;
    let Finished { stderr, .. } = end(server).await;

    assert!(most_threads < 128 + 8 * cores as u64, "{most_threads} threads");
    let (mut building, mut most_building, mut built) = (0, 0, 0);
    for line in stderr.lines() {
        if line.contains("the next generation of a shard is begun") {
            building += 1;
            most_building = most_building.max(building);
        } else if line.contains("the next generation of a shard is written") {
            building -= 1;
            built += 1;
        }
    }
    assert!(built >= 2 * POOLS, "{built} generations were built");
    assert!(most_building <= cores, "{most_building} builds at once on {cores} cores");
}

/// Stops a server, and returns its output.
async fn end(mut server: Server) -> Finished {
    server.process.signal(Signal::SIGTERM);
    let finished = server.process.finish().await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    finished
}

/// Story: the ledgers are closed while nothing is built. A stop has to open them once more, because they record
/// that the shards were closed; and the numbers of all sessions differ.
#[tokio::test(flavor = "multi_thread")]
async fn ledgers_that_rest_know_of_a_stop() {
    const POOLS: usize = 20;
    let site = Site::new(&config(POOLS, 1, 500));
    let mut numbers = vec![Vec::new(); POOLS];
    for _ in 0..3 {
        let server = site.start().await;
        for (pool, numbers) in numbers.iter_mut().enumerate() {
            numbers.extend(server.take(&name(pool), Some(200)).await);
        }
        all_rest(&server, &site).await;
        server.stop().await;
        for pool in 0..POOLS {
            let live = site.file(&format!("{}_shard_0.db", name(pool)));
            let batch = support::column::<i64>(&live, "SELECT batch FROM shard")[0];
            let ledger = site.file(&format!("used_numbers_{}.db", name(pool)));
            let sql = format!("SELECT closed FROM batches WHERE id = {batch}");
            let closed: Vec<i64> = support::column(&ledger, &sql);
            assert_eq!(closed, [1], "the live file of {} was closed", name(pool));
        }
    }
    for numbers in &numbers {
        missing(numbers, 0..=LAST);
        assert_eq!(numbers.len(), 600);
    }
    let verified = run(site.console(&["verify"])).await;
    assert!(verified.status.success(), "{}{}", verified.stdout, verified.stderr);
}

/// Story: the ledger was restored from a copy while the server ran and had it closed. The next build would have
/// drawn numbers again that the copy does not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_lost_values_while_it_rested_is_not_drawn_from() {
    const SHARD_SIZE: u32 = 100;
    let site = Site::new(&Config::new().pool("int", 1, 2_000, 1, SHARD_SIZE));
    site.fill().await;
    let ledger = site.file("used_numbers_int.db");
    let copy = fs::read(&ledger).unwrap();
    let server = site.start().await;
    let mut numbers = server.take("int", Some(60)).await;
    let standby = site.file("int_shard_0.db.next");
    eventually("a standby", async || standby.exists().then_some(())).await;
    all_rest(&server, &site).await;
    let current = fs::read(&ledger).unwrap();
    assert!(!site.file("used_numbers_int.db-wal").exists(), "a log would be lost");

    fs::write(&ledger, copy).unwrap();
    // The standby is swapped in, and a build is due.
    numbers.extend(server.take("int", Some(100)).await);
    server.process.says("it has 100 values, and had 200 before").await;
    let health = eventually("a degraded pool", async || {
        let health = server.get("/health").await;
        (health.parse::<Health>().status == "degraded").then_some(health)
    })
    .await;
    health.assert_status(200);
    assert!(!standby.exists());

    fs::write(&ledger, current).unwrap();
    numbers.extend(server.drain("int", 4, &[None, Some(20)]).await);
    server.stop().await;
    support::assert_each_once(&numbers, 1..=2_000);
}

/// Story: a pool of one shard, as small campaigns have, turned callers away while its next generation was put in
/// place.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_one_shard_swaps_without_turning_callers_away() {
    let config = Config::new().pool("int", 1, LAST, 1, 100).set("refill.low_water", 1.0);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    // Most requests go over the end of a generation, and none of them ends at it.
    for _ in 0..30 {
        let answer = server.get(&support::random("int", Some(61))).await;
        answer.assert_status(200);
        numbers.extend(answer.numbers());
        eventually("a standby", async || {
            let status: Value = server.get("/status").await.parse();
            (status["pools"]["int"]["shards"][0]["standby"] == true).then_some(())
        })
        .await;
    }
    missing(&numbers, 1..=LAST);
    server.stop().await;
}
