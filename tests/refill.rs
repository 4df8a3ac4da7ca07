//! Refills ahead of need: 503 only if it can't be avoided, then 200 again, and no number is repeated.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use deadpool_sqlite::rusqlite::Connection;
use support::{Config, Health, One, Server, Site, assert_each_once, eventually, missing, skipped};

/// Far more numbers than a test takes, so no refill comes near the end of the range.
const WIDE: i64 = 1_000_000_000;

/// Story: the refiller waited until a shard was empty, or took a full one out of rotation for the swap, or
/// the last shard caused a 503 while it still had rows. A single client counts how many rows each shard has
/// left, and allows a 503 only if all are empty.
#[tokio::test(flavor = "multi_thread")]
async fn refilling_is_told_only_when_every_shard_is_empty() {
    const SHARD_SIZE: u32 = 50;
    let site = Site::new(&Config::new().pool("int", 1, WIDE, 2, SHARD_SIZE));
    site.fill().await;
    let server = site.start().await;

    let mut numbers = Vec::new();
    let mut taken: BTreeMap<String, u32> = BTreeMap::new();
    while numbers.len() < 3_000 {
        let answer = eventually("numbers instead of 503", async || {
            let answer = server.get("/random").await;
            if answer.status == 200 {
                return Some(answer);
            }
            answer.assert_refilling();
            assert!(
                taken.values().all(|count| count % SHARD_SIZE == 0),
                "503 with rows left in a shard: {taken:?} taken"
            );
            None
        })
        .await;
        *taken.entry(answer.parse::<One<'_>>().shard).or_default() += 1;
        numbers.extend(answer.numbers());
    }

    missing(&numbers, 1..=WIDE);
    server.stop().await;
}

/// Story: forty clients empty the shards faster than the disk fills them. The server may tell them to wait,
/// with the documented message (the clients of [`Server::load`] check each response), but must not repeat a
/// number. When the load ends, the pool recovers without help.
#[tokio::test(flavor = "multi_thread")]
async fn depletion_under_load_ends_in_numbers_again() {
    let site = Site::new(&Config::new().pool("int", 1, WIDE, 2, 200));
    let server = site.start().await;

    let counts = &[None, Some(1), Some(50), Some(200)];
    let mut load = server.load("int", 40, counts);
    load.reach(40_000).await;
    let after = server.take("int", None).await;
    server.stop().await;

    let numbers = [after, load.join_numbers().await].concat();
    missing(&numbers, 1..=WIDE);
}

/// Story: the disk is full. The numbers in the shards are still served. Then callers are told to wait, and
/// operators are told why. When there is space again, refills continue, and no number of a failed build is
/// lost or repeated.
#[tokio::test(flavor = "multi_thread")]
async fn failing_refills_degrade_then_stop_service_then_heal() {
    let site = Site::new(&Config::new().pool("int", 1, 5_000, 2, 200));
    site.fill().await;
    let server = site.start().await;
    assert_health(&server, "ok", 200).await;
    site.block_refills("int", 2).await;

    // 100 of 400 numbers are left, so at least one shard is below its low water, and at least one is not
    // empty.
    let mut numbers = Vec::new();
    for _ in 0..300 {
        numbers.extend(server.take("int", None).await);
    }
    assert_health(&server, "degraded", 200).await;

    for _ in 0..100 {
        let answer = server.get("/random").await;
        assert_eq!(answer.status, 200, "rows are left: {}", answer.body);
        numbers.extend(answer.numbers());
    }
    for target in ["/random", "/random?count=10"] {
        server.get(target).await.assert_refilling();
    }
    assert_health(&server, "down", 503).await;
    server.get("/random").await.assert_refilling();

    site.unblock_refills("int", 2);
    numbers.extend(server.take("int", None).await);
    assert_health(&server, "ok", 200).await;
    numbers.extend(server.drain("int", 8, &[None, Some(50)]).await);
    assert_each_once(&numbers, 1..=5_000);
    server.stop().await;
}

/// Story: a refill for a request that was turned away failed once. It was never tried again, because the shards were
/// above their low-water mark, so the pool stayed degraded with space on the disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_refill_for_a_request_that_was_turned_away_is_tried_again() {
    let config = Config::new().pool("int", 1, WIDE, 2, 500).set("refill.low_water", 0.01);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    site.block_refills("int", 2).await;
    // More than both shards together have, although each is above its mark.
    server.take("int", Some(100)).await;
    server.get("/random?count=950").await.assert_refilling();
    assert_health(&server, "degraded", 200).await;
    site.unblock_refills("int", 2);
    assert_health(&server, "ok", 200).await;
    server.take("int", Some(950)).await;
    server.stop().await;
}

/// Story: a stop while refills failed waited endlessly for the next try, or burned the remaining numbers.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_refills_fail_burns_nothing() {
    let site = Site::new(&Config::new().pool("int", 1, 2_000, 2, 200));
    site.fill().await;
    let server = site.start().await;
    site.block_refills("int", 2).await;
    let mut numbers = server.take("int", Some(150)).await;
    numbers.extend(server.take("int", Some(150)).await);
    assert_health(&server, "degraded", 200).await;
    server.stop().await;
    site.unblock_refills("int", 2);

    let server = site.start().await;
    numbers.extend(server.drain("int", 8, &[None, Some(50)]).await);
    assert_each_once(&numbers, 1..=2_000);
    server.stop().await;
}

/// Story: on an empty folder, the first caller waited until 2.5 million numbers were drawn. The pool has to
/// begin with a small generation; the ledger tells the batch of a number, and the size of the batch.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_folder_serves_from_a_starter_generation() {
    const SHARD_SIZE: u32 = 2_500_000;
    let config = Config::new()
        .pool("int", 0, "9_007_199_254_740_991", 2, SHARD_SIZE)
        .pool("float", "0.0", "9999.999999", 2, SHARD_SIZE)
        .set("pools.float.decimals", 6);
    let site = Site::new(&config);
    let server = site.start().await;
    let number = server.take("int", None).await.remove(0);
    server.take("float", None).await;
    // The first large builds are still running.
    server.stop().await;

    let ledger = site.file("used_numbers_int.db");
    let sql = format!(
        "SELECT count FROM batches JOIN used ON used.batch = batches.id
         WHERE CAST(number AS INTEGER) = {number}"
    );
    let starter: Vec<u32> = support::column(&ledger, &sql);
    assert_eq!(starter.len(), 1, "{number} has to be in the ledger once");
    assert!(starter[0] < SHARD_SIZE, "the first batch is a full shard: {starter:?}");
}

/// Story: the next generation was begun only when the shard was empty, or was built and never used. It has to
/// be complete as `.next` while the shard serves, and then to replace it.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_built_ahead_and_swapped_in() {
    let generation = "SELECT generation FROM shard";
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 1, 100));
    site.fill().await;
    let shard = site.file("int_shard_0.db");
    let first: Vec<i64> = support::column(&shard, generation);

    let server = site.start().await;
    let mut numbers = server.take("int", Some(60)).await;
    eventually("a standby generation", async || {
        site.file("int_shard_0.db.next").exists().then_some(())
    })
    .await;
    numbers.extend(server.take("int", Some(40)).await);
    numbers.extend(server.take("int", Some(10)).await);
    server.stop().await;

    let second: Vec<i64> = support::column(&shard, generation);
    assert!(second > first, "generation {second:?} after {first:?}");
    let unused = "SELECT count(*) FROM numbers WHERE used = 0";
    assert_eq!(support::column::<i64>(&shard, unused), [90]);

    let server = site.start().await;
    numbers.extend(server.drain("int", 4, &[None, Some(30)]).await);
    assert_each_once(&numbers, 1..=1_000);
    assert_eq!(site.files(".db.tmp"), [""; 0]);
    server.stop().await;
}

/// Story: an operator looked at a shard with `sqlite3` and left it open. The swap renamed the new file over
/// the one being read, the old `-wal` remained, and SQLite applied it to the new generation. Or commits to
/// the new file went to a log that was not found after a crash. The reader may be refused (the file is
/// locked), but no number may be repeated.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_a_shard_makes_no_number_repeat() {
    let config = Config::new().pool("int", 1, 3_000, 1, 200).set("lease.rows", 16);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut numbers = server.take("int", Some(20)).await;

    let reader = Connection::open(site.file("int_shard_0.db")).unwrap();
    reader.busy_timeout(Duration::ZERO).unwrap();
    reader.execute_batch("BEGIN").unwrap();
    let count = "SELECT count(*) FROM numbers";
    // If the file is locked, this fails, which is fine too.
    let _ = reader.query_row(count, (), |row| row.get::<_, i64>(0));
    for _ in 0..10 {
        numbers.extend(server.take("int", Some(100)).await);
    }
    drop(reader);
    numbers.extend(server.take("int", Some(30)).await);
    server.kill().await;

    let server = site.start().await;
    numbers.extend(server.drain("int", 4, &[None, Some(30)]).await);
    let burned = missing(&numbers, 1..=3_000);
    assert!(burned <= 2 * 16, "{burned} burned");
    server.stop().await;
}

/// Waits until `/health` has this status for the pool `int` and as a whole. Fails unless the HTTP status is
/// `code`, and a reason is given exactly if the status is not `ok`.
async fn assert_health(server: &Server, status: &str, code: u16) {
    eventually(&format!("/health to be {status}"), async || {
        let answer = server.get("/health").await;
        let health: Health = answer.parse();
        let pool = &health.pools["int"];
        if health.status != status || pool.status != status {
            return None;
        }
        assert_eq!(answer.status, code, "{}", answer.body);
        assert_eq!(pool.reason.is_some(), status != "ok", "{}", answer.body);
        Some(())
    })
    .await;
}

/// A file system of 8 MB in memory that only the server sees and that ends with it. Outside the server's
/// mount namespace the folder is empty; [`Self::folder`] leads into that namespace.
struct SmallDisk {
    /// The path of the data folder for other processes.
    folder: PathBuf,
}

impl SmallDisk {
    /// Starts a server on a new file system. Returns `None` if the test may not mount anything.
    async fn start(site: &Site) -> Option<(Server, Self)> {
        const MOUNT: &str = "mount -t tmpfs -o size=8m,mode=700 tmpfs \"$0\"";
        let unshare = |script: &str| {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", script]).arg(site.data());
            command
        };
        std::fs::create_dir(site.data()).unwrap();
        let refusal = match unshare(MOUNT).output() {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(refusal) = refusal {
            skipped(&format!("a small file system can't be mounted here: {refusal}"));
            return None;
        }
        let tombola = site.tombola();
        let mut command = unshare(&format!("{MOUNT} && exec \"$@\""));
        command.arg(tombola.get_program()).args(tombola.get_args()).current_dir(site.folder());
        let server = Server::start(command).await;
        // `unshare` and the shell both `exec` the next program, so this is the server's process.
        let root = PathBuf::from(format!("/proc/{}/root", server.process.id()));
        let folder = root.join(site.data().strip_prefix("/").unwrap());
        Some((server, Self { folder }))
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Fills the disk to the last byte.
    fn fill(&self) {
        let mut filler = File::create(self.filler()).unwrap();
        for size in [1 << 16, 1] {
            let full = loop {
                if let Err(error) = filler.write_all(&vec![b'x'; size]) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

/// Story: a log or a backup filled the disk. A server that stops or marks its shards as damaged withholds
/// numbers that it could still serve. If it reports nothing, operators find out when the numbers are used up.
/// If it does not recover without help, someone has to intervene at night.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_degrades_serves_all_there_is_and_heals() {
    const SHARD_SIZE: u32 = 2_000;
    const LAST: i64 = 14_999;
    let config = Config::new().pool("int", 0, LAST, 2, SHARD_SIZE).set("lease.rows", 64);
    let site = Site::new(&config.set("refill.retry_limit_ms", 200));
    let Some((server, disk)) = SmallDisk::start(&site).await else {
        return;
    };
    let health = async || server.get("/health").await;
    eventually("two full shards", async || {
        let answer = health().await;
        let pools = answer.parse::<Health>().pools;
        (answer.status == 200 && pools["int"].shards_in_rotation == 2).then_some(())
    })
    .await;
    let mut numbers = Vec::new();
    // Both shards have a log after this.
    for _ in 0..200 {
        numbers.extend(server.take("int", None).await);
    }
    disk.fill();

    let mut reason = None;
    loop {
        let answer = server.get("/random").await;
        if answer.status != 200 {
            answer.assert_refilling();
            break;
        }
        numbers.extend(answer.numbers());
        if numbers.len() == SHARD_SIZE as usize * 3 / 2 {
            // At least one shard is below its low water, and the other still has numbers.
            reason = eventually("/health to be degraded", async || {
                let answer = health().await;
                answer.assert_status(200);
                let health = answer.parse::<Health>();
                (health.status == "degraded").then(|| health.pools["int"].reason.clone())
            })
            .await;
        }
    }
    let reason = reason.expect("a reason for the degraded state");
    assert!(reason.contains("full") || reason.contains("space"), "{reason}");
    assert_eq!(numbers.len(), 2 * SHARD_SIZE as usize, "all numbers in the shards are served");

    disk.make_room();
    eventually("a healthy server", async || {
        (health().await.parse::<Health>().status == "ok").then_some(())
    })
    .await;
    numbers.extend(server.drain("int", 2, &[None, Some(50)]).await);
    assert_each_once(&numbers, 0..=LAST);
    server.stop().await;
}
