//! Refilling ahead of need: 503 only when it must be, then 200 again, and nothing repeated.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use deadpool_sqlite::rusqlite::Connection;
use support::{Config, Health, One, Server, Site, assert_each_once, eventually, missing};

/// Far more than a test takes: no refill of such a range comes near its end.
const WIDE: i64 = 1_000_000_000;

/// Story: the refiller waits until a shard is empty, takes a full one out of rotation for the
/// swap, or the last shard tells 503 while it still has rows. One client that counts along knows
/// how much each shard has left: a 503 is only allowed when that is nothing, in every shard.
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

/// Story: forty clients empty the shards faster than the disk fills them. They may be told to
/// wait, in the agreed words (the clients of [`Server::load`] check each answer); they may not
/// be given a number twice; and when they let go the pool recovers by itself.
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

/// Story: the disk is full. What is on the shards still serves; then callers are told to wait,
/// and operators why; when there is room again, the refiller has not given up, and no number of
/// a build that failed is lost or repeated.
#[tokio::test(flavor = "multi_thread")]
async fn failing_refills_degrade_then_stop_service_then_heal() {
    let site = Site::new(&Config::new().pool("int", 1, 5_000, 2, 200));
    site.fill().await;
    let server = site.start().await;
    assert_health(&server, "ok", 200).await;
    site.block_refills("int", 2).await;

    // 100 of 400 are left: at least one shard is below its low water, and not both are empty.
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

/// Story: a stop while refills fail waits for the next try for ever, or burns what was left.
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

/// Story: on an empty folder the first caller waits for 2.5 million numbers to be drawn. The
/// pool has to begin with a small generation: the ledger tells which batch a number is from.
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
    // In the middle of the first large builds.
    server.stop().await;

    let ledger = site.file("used_numbers_int.db");
    let sql = format!(
        "SELECT count FROM batches JOIN used ON used.batch = batches.id
         WHERE CAST(number AS INTEGER) = {number}"
    );
    let starter: Vec<u32> = support::column(&ledger, &sql);
    assert_eq!(starter.len(), 1, "the ledger has {number} once");
    assert!(starter[0] < SHARD_SIZE, "the first batch had all {starter:?}");
}

/// Story: the next generation is only begun when the shard is empty, or is built and never
/// used. It has to lie ready as `.next` while the shard serves, and to take its place.
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

/// Story: somebody looks at a shard with `sqlite3` and leaves the window open. The swap renames
/// the new file over the one that is being read, the old `-wal` stays behind, and SQLite plays
/// it into the new generation; or the commits of the new one go to a file that nobody finds
/// after a crash. The reader may be refused (the file is locked); a number may not come twice.
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
    // An error is a refusal, which is as good.
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

/// Waits until `/health` tells this status for the pool `int` and as a whole, with its code, and
/// with a reason unless all is well.
async fn assert_health(server: &Server, status: &str, code: u16) {
    eventually(&format!("/health to tell {status}"), async || {
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

/// A file system of 8 MB in memory, which only the server sees and which ends with it: outside of its
/// mount namespace the folder is empty. What is written through here is written there.
struct SmallDisk {
    /// The data folder, as others reach it.
    folder: PathBuf,
}

impl SmallDisk {
    /// Starts a server on one. `None` where a test may not mount anything.
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
            eprintln!("skipped: a small file system can't be mounted here: {refusal}");
            return None;
        }
        let tombola = site.tombola();
        let mut command = unshare(&format!("{MOUNT} && exec \"$@\""));
        command.arg(tombola.get_program()).args(tombola.get_args()).current_dir(site.folder());
        let server = Server::start(command).await;
        // Both `unshare` and the shell give their process away.
        let root = PathBuf::from(format!("/proc/{}/root", server.process.id()));
        let folder = root.join(site.data().strip_prefix("/").unwrap());
        Some((server, Self { folder }))
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Takes the last byte.
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

/// Story: a log or a backup fills the disk. A server that stops, or marks its shards as damaged, takes
/// numbers away that lie ready; one that keeps quiet is found out when they are used up; one that
/// does not come back by itself needs somebody at night.
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
    // By then both shards have a log.
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
            // One shard at least is under its low water, and the other has numbers yet.
            reason = eventually("a health that tells", async || {
                let answer = health().await;
                answer.assert_status(200);
                let health = answer.parse::<Health>();
                (health.status == "degraded").then(|| health.pools["int"].reason.clone())
            })
            .await;
        }
    }
    let reason = reason.expect("degraded for a reason");
    assert!(reason.contains("full") || reason.contains("space"), "{reason}");
    assert_eq!(numbers.len(), 2 * SHARD_SIZE as usize, "all that lay ready");

    disk.make_room();
    eventually("a healthy server", async || {
        (health().await.parse::<Health>().status == "ok").then_some(())
    })
    .await;
    numbers.extend(server.drain("int", 2, &[None, Some(50)]).await);
    assert_each_once(&numbers, 0..=LAST);
    server.stop().await;
}
