//! `init-shards` fills every shard once, and continues where it was interrupted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::time::SystemTime;

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{Config, Finished, Process, Site, assert_each_once, eventually, refusal, run};

/// Returns a config with two pools of two shards each.
fn two_pools(shard_size: u32) -> Config {
    Config::new()
        .pool("int", 0, "9_007_199_254_740_991", 2, shard_size)
        .pool("float", "0.0", "9999.999999", 2, shard_size)
        .set("pools.float.decimals", 6)
}

/// Fails unless every shard is full and unused, and the ledger of each pool holds exactly the values of its
/// shards, each once.
fn assert_full(site: &Site, shard_size: u32) {
    for pool in ["int", "float"] {
        let mut values: Vec<i64> = Vec::new();
        for index in 0..2 {
            let shard = site.file(&format!("{pool}_shard_{index}.db"));
            let unused = "SELECT value FROM numbers WHERE used = 0";
            let unused: Vec<i64> = support::column(&shard, unused);
            assert_eq!(unused.len(), shard_size as usize, "{}", shard.display());
            values.extend(unused);
        }
        for standby in site.files(&format!("{pool}_shard_")) {
            if standby.ends_with(".next") {
                values.extend(support::column::<i64>(
                    &site.file(&standby),
                    "SELECT value FROM numbers",
                ));
            }
        }
        values.sort_unstable();
        let ledger = site.file(&format!("used_numbers_{pool}.db"));
        let sql = "SELECT value FROM used_numbers ORDER BY value";
        let in_ledger: Vec<i64> = support::column(&ledger, sql);
        assert!(in_ledger == values, "{pool}: the ledger differs from the shards");
        assert!(
            values.is_sorted_by(|left, right| left < right),
            "{pool}: a value is in two shards"
        );
    }
    assert_eq!(site.files(".db.tmp"), [""; 0]);
}

/// Returns the name, modification time and content of each file except the lock.
fn contents(site: &Site) -> Vec<(String, SystemTime, Vec<u8>)> {
    let names = site.files(".db").into_iter();
    let read = |name: String| {
        let file = site.file(&name);
        let modified = fs::metadata(&file).unwrap().modified().unwrap();
        (name, modified, fs::read(file).unwrap())
    };
    names.map(read).collect()
}

/// Story: a deploy script ran it twice. The second run discarded full shards or topped them up, and half of
/// the range was burned.
#[tokio::test(flavor = "multi_thread")]
async fn it_fills_all_tells_a_table_and_changes_nothing_the_second_time() {
    const SHARD_SIZE: u32 = 735;
    let site = Site::new(&two_pools(SHARD_SIZE));
    let Finished { status, stdout, .. } = run(site.init_shards()).await;
    assert_eq!(status.code(), Some(0));

    let table = stdout.to_lowercase();
    for column in ["shard", "rows", "ledger", "seconds"] {
        assert!(table.contains(column), "no {column} in:\n{stdout}");
    }
    for shard in ["int_shard_0.db", "int_shard_1.db", "float_shard_0.db", "float_shard_1.db"] {
        let mut lines = stdout.lines().filter(|line| line.contains(shard));
        let row = lines.any(|line| line.split_whitespace().any(|word| word == "735"));
        assert!(row, "no rows of {shard} in:\n{stdout}");
    }
    let before = contents(&site);

    let again = run(site.init_shards()).await;
    assert_eq!(again.status.code(), Some(0), "{}", again.stderr);
    assert!(contents(&site) == before, "the second run changed a file");
    assert_full(&site, SHARD_SIZE);
}

/// Story: it refilled a shard in use, because it took "not full" for "not finished".
#[tokio::test(flavor = "multi_thread")]
async fn it_leaves_shards_in_use_alone_and_fills_those_that_are_empty() {
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 2, 200));
    site.fill().await;
    let server = site.start().await;
    let mut numbers = server.take("int", Some(50)).await;
    server.stop().await;

    site.fill().await;

    let server = site.start().await;
    numbers.extend(server.drain("int", 4, &[None, Some(20)]).await);
    server.stop().await;
    assert_each_once(&numbers, 1..=1_000);
    // The range is used up, which is no error.
    site.fill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_choose_the_pool_the_shards_and_the_size() {
    let site = Site::new(&two_pools(300));
    let mut command = site.init_shards();
    command.args(["--pool", "int", "--shards", "3", "--size", "100"]);
    let finished = run(command).await;
    assert!(finished.status.success(), "{}", finished.stderr);

    for index in 0..3 {
        let shard = site.file(&format!("int_shard_{index}.db"));
        let rows: Vec<i64> = support::column(&shard, "SELECT count(*) FROM numbers");
        assert_eq!(rows, [100]);
    }
    assert!(!site.file("int_shard_3.db").exists());
    assert_eq!(site.files("float_shard_"), [""; 0]);

    let mut command = site.init_shards();
    command.args(["--pool", "nope"]);
    let message = refusal(command).await;
    for word in ["nope", "int", "float"] {
        assert!(message.contains(word), "{word} is not in {message}");
    }
    for impossible in [["--size", "0"], ["--shards", "0"]] {
        let mut command = site.init_shards();
        command.args(impossible);
        let Finished { status, stderr, .. } = run(command).await;
        assert!(!status.success());
        assert!(stderr.contains('0'), "{stderr}");
    }
}

/// Story: an operator filled a folder by hand while the server refilled it. Both built the same shard, and
/// the one that renamed its file last burned the other's numbers.
#[tokio::test(flavor = "multi_thread")]
async fn it_refuses_a_folder_that_a_server_holds() {
    let site = Site::new(&two_pools(100));
    let server = site.start().await;
    let message = refusal(site.init_shards()).await;
    for word in ["process", "LOCK"] {
        assert!(message.contains(word), "{word} is not in {message}");
    }
    server.take("int", Some(10)).await;
    server.stop().await;
}

/// Story: the machine went down during the first filling, which took an hour. The next run discarded values
/// that the ledger had as used (burned), or kept values that the ledger did not have (repeated), or failed on
/// a partial file. The process is killed at random file sizes, so the test does not depend on the machine's
/// speed. The seed is fixed.
#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_it_goes_on_and_fills_all() {
    const SHARD_SIZE: u32 = 60_000;
    const KILLS: usize = 12;
    let reference = Site::new(&two_pools(SHARD_SIZE));
    reference.fill().await;
    let full = folder_size(&reference);

    let mut random = ChaCha8Rng::seed_from_u64(2);
    for _round in 0..3 {
        let site = Site::new(&two_pools(SHARD_SIZE));
        for _ in 0..KILLS {
            let size = folder_size(&site);
            let moment = random.random_range(size..=full.max(size + 1));
            let mut process = Process::spawn(site.init_shards());
            eventually("the folder to grow, or the end", async || {
                (folder_size(&site) >= moment || !process.is_running()).then_some(())
            })
            .await;
            if process.is_running() {
                process.signal(Signal::SIGKILL);
            }
            process.finish().await;
        }
        site.fill().await;
        assert_full(&site, SHARD_SIZE);
    }
}

/// Story: Ctrl-C left a file that the next run took for a full shard, or had no effect until the batch was
/// done.
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_it_and_the_next_run_goes_on() {
    const SHARD_SIZE: u32 = 200_000;
    let site = Site::new(&two_pools(SHARD_SIZE));
    let mut process = Process::spawn(site.init_shards());
    eventually("the first build", async || site.files("_shard_").first().map(drop)).await;
    process.signal(Signal::SIGINT);
    let Finished { status, stderr, .. } = process.finish().await;
    assert!(status.code().is_some(), "it was killed by a signal: {status}");
    assert!(!stderr.contains("panicked"), "{stderr}");

    site.fill().await;
    assert_full(&site, SHARD_SIZE);
}

/// Returns the size of all files in the data folder in bytes.
fn folder_size(site: &Site) -> u64 {
    let names = site.files("").into_iter();
    // A file may be renamed after it was listed.
    let size = |name: String| fs::metadata(site.file(&name)).map_or(0, |file| file.len());
    names.map(size).sum()
}
