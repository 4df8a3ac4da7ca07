//! `tombola backup`: a copy of a folder, in use or not, that can be served.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use deadpool_sqlite::rusqlite::Connection;
use nix::sys::signal::Signal;
use reqwest::Method;
use support::{
    Config, Finished, Process, Server, Site, column, eventually, integers, missing, run,
};
use tokio::task::JoinSet;

const LAST: i64 = 59_999;

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 5_000).set("lease.rows", 64)
}

/// The stages of a backup.
const BEFORE: u64 = 0;
const DURING: u64 = 1;
const AFTER: u64 = 2;
const OVER: u64 = 3;

async fn backup(site: &Site, to: &Path) -> Finished {
    run(site.console(&["backup", to.to_str().unwrap()])).await
}

/// Returns a site whose data folder is the backup.
fn restored(backup: &Path, config: &Config) -> Site {
    let site = Site::new(config);
    fs::rename(backup, site.data()).unwrap();
    site
}

async fn assert_whole(site: &Site) {
    let finished = run(site.console(&["verify"])).await;
    assert!(finished.status.success(), "{}{}", finished.stdout, finished.stderr);
}

/// Returns how many numbers of the pool the backup says it burned.
fn burned(said: &str) -> usize {
    let line = said.lines().find(|line| line.contains("never served from this copy")).unwrap();
    line.split(' ').find_map(|word| word.parse().ok()).unwrap()
}

fn set(numbers: &[String]) -> BTreeSet<i64> {
    integers(numbers).into_iter().collect()
}

/// The promise after a restore: numbers issued before the backup began are never repeated. Numbers issued
/// after it ended are repeated, except for those that the backup reports as burned.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_repeats_exactly_what_was_issued_since() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    // Each number is noted with the stage of the backup when it was requested and when it arrived.
    let stage = Arc::new(AtomicU64::new(BEFORE));
    let count = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..64 {
        let (client, stage, count) = (server.client(), Arc::clone(&stage), Arc::clone(&count));
        clients.spawn(async move {
            let mut taken = Vec::new();
            loop {
                let asked = stage.load(Ordering::SeqCst);
                if asked == OVER {
                    return taken;
                }
                let answer = client.send(Method::GET, "/random").await.unwrap();
                if answer.status == 200 {
                    let came = stage.load(Ordering::SeqCst);
                    taken.push((asked, came, integers(&answer.numbers())[0]));
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
    let reach = async |more: u64| {
        let enough = count.load(Ordering::SeqCst) + more;
        let reached = async || (count.load(Ordering::SeqCst) >= enough).then_some(());
        eventually("numbers", reached).await;
    };
    reach(9_000).await;
    let to = site.folder().join("copy");
    stage.store(DURING, Ordering::SeqCst);
    let finished = backup(&site, &to).await;
    assert!(finished.status.success(), "{}", finished.stderr);
    stage.store(AFTER, Ordering::SeqCst);
    reach(9_000).await;
    stage.store(OVER, Ordering::SeqCst);
    let taken = clients.join_all().await;
    server.kill().await;
    let (mut issued_before, mut issued_after, mut issued) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (asked, came, number) in taken.into_iter().flatten() {
        assert!(issued.insert(number), "{number} was issued twice before the restore");
        if came == BEFORE {
            issued_before.insert(number);
        }
        if asked >= AFTER {
            issued_after.insert(number);
        }
    }
    assert!(issued_before.len() > 8_000 && issued_after.len() > 8_000);

    let copy = restored(&to, &config());
    assert_whole(&copy).await;
    let server = copy.start().await;
    let numbers = server.drain("int", 4, &[Some(300), None]).await;
    server.stop().await;
    missing(&numbers, 0..=LAST);
    let again = set(&numbers);
    let repeats: Vec<_> = issued_before.intersection(&again).collect();
    assert!(
        repeats.is_empty(),
        "issued before the backup and again after the restore: {repeats:?}"
    );

    let burned = burned(&finished.stdout);
    let since_and_not_again = issued_after.difference(&again).count();
    let never = (0..=LAST).filter(|n| !issued.contains(n) && !again.contains(n)).count();
    assert!(since_and_not_again + never <= burned, "{since_and_not_again} + {never} > {burned}");
    assert!(
        issued_after.intersection(&again).count() > 0,
        "the copy can't know which numbers were issued later"
    );
    assert_whole(&copy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_an_unused_folder_is_private_and_complete() {
    let site = Site::new(&config());
    let taken = site.stop_with_standby(5_000).await;
    let to = site.folder().join("copy");
    let before: Vec<_> = site.files("").iter().map(|f| fs::read(site.file(f)).unwrap()).collect();
    let finished = backup(&site, &to).await;
    assert!(finished.status.success(), "{}", finished.stderr);
    assert!(finished.stdout.contains("does not know the numbers"), "{}", finished.stdout);
    assert_eq!(burned(&finished.stdout), 0);
    let after: Vec<_> = site.files("").iter().map(|f| fs::read(site.file(f)).unwrap()).collect();
    // The lock is first and contains the process id, so it may differ.
    assert!(before[1..] == after[1..], "a file was changed");

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&to), 0o700);
    for entry in fs::read_dir(&to).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        assert!(!path.to_string_lossy().ends_with("-wal"), "{}", path.display());
    }
    // A backup does not overwrite an existing one.
    let again = backup(&site, &to).await;
    assert_eq!(again.status.code(), Some(1));
    assert!(again.stderr.contains("is there already and not empty"), "{}", again.stderr);

    let copy = restored(&to, &config());
    assert_whole(&copy).await;
    let server = copy.start().await;
    let mut numbers = server.drain("int", 2, &[Some(300)]).await;
    server.stop().await;
    numbers.extend(taken);
    assert_eq!(missing(&numbers, 0..=LAST), 0);
}

/// The leases of a killed server are recorded only in its logs, and `backup` leaves these in place.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_killed_folder_has_its_logs() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    // Each request fits into a lease. A larger one could burn more if the kill came before the next lease is
    // noted.
    for _ in 0..40 {
        numbers.extend(server.take("int", Some(50)).await);
    }
    server.kill().await;
    let to = site.folder().join("copy");
    let finished = backup(&site, &to).await;
    assert!(finished.status.success(), "{}", finished.stderr);
    assert!(!site.files("-wal").is_empty());
    let burned = burned(&finished.stdout);
    assert!(burned <= 2 * 2 * 64, "{burned}");
    assert_whole(&site).await;

    let copy = restored(&to, &config());
    let server = copy.start().await;
    numbers.extend(server.drain("int", 2, &[Some(300)]).await);
    server.stop().await;
    assert!(missing(&numbers, 0..=LAST) <= burned);
    let noted: i64 = column(&copy.file("used_numbers_int.db"), "SELECT burned FROM ledger")[0];
    assert_eq!(noted, i64::try_from(burned).unwrap());
}

/// The shards are replaced every few milliseconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_swap_in_the_midst_of_a_backup_does_not_hurt() {
    let config = Config::new().pool("int", 0, 199_999, 2, 400).set("lease.rows", 16);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut load = server.load("int", 2, &[None]);
    for round in 0..10 {
        load.reach(300 * (round + 1)).await;
        let to = site.folder().join(format!("copy{round}"));
        let finished = backup(&site, &to).await;
        assert!(finished.status.success(), "{}", finished.stderr);
        let copy = restored(&to, &config);
        assert_whole(&copy).await;
        Server::start(copy.tombola()).await.stop().await;
        assert!(copy.files(".damaged-").is_empty());
    }
    server.kill().await;
    load.join_numbers().await;
}

/// Story: a shard was swapped after its live file had been copied and before its standby was. The copy had
/// the used-up generation but not the new one, which was burned.
#[tokio::test(flavor = "multi_thread")]
async fn a_swap_between_the_files_of_a_shard_burns_no_generation() {
    let site = Site::new(&config());
    site.stop_with_standby(5_000).await;
    let standby = site.file(&site.files(".db.next")[0]);
    let live = standby.with_extension("");
    let to = site.folder().join("copy");
    let begun = site.folder().join("copy.partial").join(live.file_name().unwrap());
    // `backup::run` calls this before each piece that it copies, so the swap happens while the live file is
    // copied.
    let swap = || {
        if begun.exists() && standby.exists() {
            fs::rename(&standby, &live).unwrap();
        }
        true
    };
    let summary = tombola::internals::backup::run(&site.data(), &to, &swap).unwrap();
    assert!(!standby.exists(), "it was not swapped");
    assert_eq!(summary.burned[0].1, 0);
    let unused = |folder: &Path| {
        let shard = folder.join(live.file_name().unwrap());
        column::<i64>(&shard, "SELECT count(*) FROM numbers WHERE NOT used")
    };
    assert_eq!(unused(&to), [5_000]);
    assert_whole(&restored(&to, &config())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_or_stopped_leaves_nothing() {
    let site = Site::new(&config());
    let to = site.folder().join("copy");
    let finished = backup(&site, &to).await;
    assert!(finished.stderr.contains("there is no folder"), "{}", finished.stderr);
    fs::create_dir(site.data()).unwrap();
    let finished = backup(&site, &to).await;
    assert!(finished.stderr.contains("there is nothing to back up"), "{}", finished.stderr);
    site.fill().await;

    // A copy inside the data folder, under any path to it, would be lost with the folder.
    let link = site.folder().join("link");
    std::os::unix::fs::symlink(site.data(), &link).unwrap();
    let before = site.files("");
    for inside in [site.data(), site.file("a/copy"), link.join("copy"), link.join("../data/copy")] {
        let finished = backup(&site, &inside).await;
        assert_eq!(finished.status.code(), Some(1));
        assert!(finished.stderr.contains("lies in the data folder"), "{}", finished.stderr);
    }
    assert_eq!(site.files(""), before);
    let beside = backup(&site, &site.data().join("../data-copy")).await;
    assert!(beside.status.success(), "{}", beside.stderr);

    // A folder whose ledger lacks a number of a shard must not be restored, so it is not copied.
    let ledger = site.file("used_numbers_int.db");
    let connection = Connection::open(&ledger).unwrap();
    let sql = "DELETE FROM used_numbers WHERE value = (SELECT value FROM used_numbers LIMIT 1)";
    connection.execute_batch(sql).unwrap();
    drop(connection);
    let finished = backup(&site, &to).await;
    assert_eq!(finished.status.code(), Some(1));
    assert!(finished.stderr.contains("is not in the ledger"), "{}", finished.stderr);
    assert!(!to.exists() && !site.folder().join("copy.partial").exists());

    fs::create_dir(site.folder().join("copy.partial")).unwrap();
    let finished = backup(&site, &to).await;
    assert!(finished.stderr.contains("if none runs, delete it"), "{}", finished.stderr);
}

/// Story: an interrupted backup left half a copy that looked complete.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_in_the_midst_leaves_nothing() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let site = Site::new(&config());
        site.fill().await;
        let to = site.folder().join("copy");
        let partial = site.folder().join("copy.partial");
        // As if a server used the folder. It also locks the ledger, the last file to be copied.
        let lock = fs::File::create(site.file("LOCK")).unwrap();
        lock.lock().unwrap();
        let ledger = Connection::open(site.file("used_numbers_int.db")).unwrap();
        ledger.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();

        let mut process = Process::spawn(site.console(&["backup", to.to_str().unwrap()]));
        let copied = partial.join("int_shard_1.db");
        eventually("the copy of a shard", async || copied.exists().then_some(())).await;
        process.signal(signal);
        drop(ledger);
        let finished = process.finish().await;

        assert_eq!(finished.status.code(), Some(1));
        assert!(finished.stderr.contains("nothing of the backup is left"), "{}", finished.stderr);
        assert!(!to.exists() && !partial.exists());
    }
}

/// Story: the shards of a pool whose name ends in `_shard` were taken for another pool's. The backup was
/// reported as complete without them, and the restored folder never handed out their numbers.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_any_allowed_name_is_copied() {
    let names = ["a_shard", "shard_0", "used_numbers_a", "db"];
    let config = names.iter().fold(Config::new(), |config, name| config.pool(name, 0, 99, 2, 40));
    let site = Site::new(&config);
    site.fill().await;
    fs::write(site.file("notes.txt"), "x").unwrap();
    fs::write(site.file("db_shard_0.db.damaged-1"), "x").unwrap();
    let to = site.folder().join("copy");
    let finished = backup(&site, &to).await;
    assert!(finished.status.success(), "{}", finished.stderr);
    for name in ["notes.txt", "db_shard_0.db.damaged-1"] {
        let note = format!("note: {name} is not in the copy");
        assert!(finished.stdout.contains(&note), "{}", finished.stdout);
    }
    let notes = finished.stdout.lines().filter(|line| line.starts_with("note: ")).count();
    assert_eq!(notes, 2, "{}", finished.stdout);

    let copy = restored(&to, &config);
    assert_whole(&copy).await;
    let server = copy.start().await;
    for name in names {
        let numbers = server.drain(name, 2, &[None]).await;
        assert_eq!(missing(&numbers, 0..=99), 0, "{name}");
    }
    server.stop().await;
}

/// The simpler modes keep everything in one file.
#[tokio::test(flavor = "multi_thread")]
async fn the_stores_of_the_other_modes_are_copied_too() {
    for mode in ["json", "sqlite"] {
        let config =
            Config::new().pool("int", 0, 99, 1, 10).set("server.mode", format!("'{mode}'"));
        let site = Site::new(&config);
        let server = site.start().await;
        let mut numbers = Vec::new();
        for _ in 0..20 {
            numbers.extend(server.take("int", None).await);
        }
        let to = site.folder().join("copy");
        let finished = backup(&site, &to).await;
        assert!(finished.status.success(), "{}", finished.stderr);
        assert!(finished.stdout.contains("was not checked"), "{}", finished.stdout);
        server.stop().await;
        let copy = restored(&to, &config);
        let server = copy.start().await;
        for _ in 0..20 {
            numbers.extend(server.take("int", None).await);
        }
        server.stop().await;
        assert_eq!(missing(&numbers, 0..=99), 60, "{mode}");
    }
}
