//! SQLite on the simulated disk: the promises that it makes are kept through any cut, broken promises are
//! caught where it makes none, and disk errors reach the caller.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use deadpool_sqlite::rusqlite::{self, Connection, ErrorCode, OpenFlags, ffi};

use tombola::internals::files;

use crate::cuts::{cut_somewhere, failures, survive};
use crate::disk::{Device, Disk, Fault, Plan};
use crate::medium::{Image, Op};
use crate::recording::Recording;
use crate::vfs;

const FILE: &str = "numbers.db";

/// The length of a run: its sessions, each with a connection of its own, and the commits in each.
#[derive(Clone, Copy)]
struct Length {
    sessions: u32,
    commits: u32,
}

/// The seeds of cuts that must show a loss, many more than the first one needs.
const ENOUGH: Range<u64> = 0..4_000;

const LONG: Length = Length { sessions: 3, commits: 12 };
/// For scripts that are repeated once for each of their operations.
const SHORT: Length = Length { sessions: 2, commits: 6 };

/// How a database is opened, and on which device.
#[derive(Clone, Copy, Debug)]
struct Setup {
    journal_mode: &'static str,
    synchronous: &'static str,
    device: Device,
    /// Syncs the folder itself after SQLite has created its files, and checks the result.
    syncs_folder: bool,
}

const fn setup(journal_mode: &'static str, synchronous: &'static str) -> Setup {
    Setup { journal_mode, synchronous, device: Device::PLAIN, syncs_folder: false }
}

impl Setup {
    fn open(self, disk: &Disk) -> rusqlite::Result<Connection> {
        crate::install();
        let db = Connection::open(disk.path(FILE))?;
        // There is no other connection that could hold a lock, so a lock that stays is an error.
        db.busy_timeout(Duration::ZERO)?;
        db.pragma_update(None, "journal_mode", self.journal_mode)?;
        db.pragma_update(None, "synchronous", self.synchronous)?;
        // Small, so that a short script checkpoints and spills.
        db.pragma_update(None, "wal_autocheckpoint", 12)?;
        db.pragma_update(None, "cache_size", 8)?;
        Ok(db)
    }

    /// Runs several sessions of transactions, and notes each one that is committed. Continues after errors,
    /// and returns them.
    fn run(self, disk: &Disk, length: Length) -> Vec<rusqlite::Error> {
        let mut errors = Vec::new();
        for session in 0..length.sessions {
            let ids = session * length.commits..(session + 1) * length.commits;
            if let Err(error) = self.session(disk, ids, &mut errors) {
                errors.push(error);
            }
        }
        errors
    }

    fn session(
        self,
        disk: &Disk,
        ids: Range<u32>,
        errors: &mut Vec<rusqlite::Error>,
    ) -> rusqlite::Result<()> {
        let mut db = self.open(disk)?;
        db.execute_batch(
            "CREATE TABLE IF NOT EXISTS numbers(id INTEGER PRIMARY KEY, bytes BLOB NOT NULL);
             CREATE TABLE IF NOT EXISTS spare(bytes BLOB NOT NULL);
             CREATE TABLE IF NOT EXISTS total(count INTEGER NOT NULL);
             INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total);",
        )?;
        if self.syncs_folder {
            db.query_row("SELECT max(count) FROM total", [], |_| Ok(()))?;
            let synced = files::sync_folder(disk.root());
            synced.map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
        }
        for id in ids {
            match commit(&mut db, id) {
                Ok(()) => disk.note(id.to_string()),
                Err(error) => errors.push(error),
            }
        }
        db.close().map_err(|(_, error)| error)
    }

    fn record(self) -> Recording {
        let disk = Disk::boot_on(&Image::empty(), self.device);
        let errors = self.run(&disk, LONG);
        assert!(errors.is_empty(), "{errors:?}");
        disk.recording()
    }
}

fn bytes(id: u32) -> Vec<u8> {
    // From less than a page to several pages.
    vec![
        u8::try_from(id % 251).expect("below 251");
        100 + 700 * usize::try_from(id % 13).expect("small")
    ]
}

fn commit(db: &mut Connection, id: u32) -> rusqlite::Result<()> {
    let transaction = db.transaction()?;
    transaction.execute("INSERT INTO numbers VALUES (?1, ?2)", (id, bytes(id)))?;
    transaction.execute("UPDATE total SET count = count + 1", [])?;
    if id % 5 == 4 {
        // More than fits into the cache. Pages are freed and used again, too.
        transaction.execute("DELETE FROM spare", [])?;
        transaction.execute("INSERT INTO spare SELECT zeroblob(3000) FROM numbers", [])?;
    }
    transaction.commit()
}

/// Checks that the database is intact and that each transaction is there completely or not at all. Returns
/// those that are there.
fn whole(db: &Connection) -> Result<BTreeSet<u32>, String> {
    let say = |error: rusqlite::Error| format!("broken: {error}");
    let check: String =
        db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(say)?;
    if check != "ok" {
        return Err(format!("broken: {check}"));
    }
    let tables: u32 = db
        .query_row(
            "SELECT count(*) FROM sqlite_schema WHERE name IN ('numbers', 'total')",
            [],
            |row| row.get(0),
        )
        .map_err(say)?;
    if tables < 2 {
        return Ok(BTreeSet::new());
    }
    let mut select = db.prepare("SELECT id, bytes FROM numbers").map_err(say)?;
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get::<_, Vec<u8>>(1)?)));
    let rows: Vec<(u32, Vec<u8>)> = rows.and_then(Iterator::collect).map_err(say)?;
    let total: Option<u32> =
        db.query_row("SELECT max(count) FROM total", [], |row| row.get(0)).map_err(say)?;
    let total = total.unwrap_or(0);
    if usize::try_from(total) != Ok(rows.len()) {
        return Err(format!("broken: {total} counted, {} there", rows.len()));
    }
    if let Some((id, _)) = rows.iter().find(|(id, found)| *found != bytes(*id)) {
        return Err(format!("broken: {id} has other bytes"));
    }
    Ok(rows.into_iter().map(|(id, _)| id).collect())
}

/// Checks that each promised transaction is there, and at most one more, which was in progress.
fn kept(setup: Setup) -> impl Fn(&Disk, &[&str]) -> Result<(), String> + Sync {
    move |disk, promised| {
        let db = setup.open(disk).map_err(|error| format!("broken: {error}"))?;
        let there = whole(&db)?;
        let promised = promised.len();
        if there.len() < promised {
            return Err(format!("lost: {promised} promised, {} there", there.len()));
        }
        let first = 0..u32::try_from(there.len()).expect("few");
        if there.len() > promised + 1 || !there.iter().copied().eq(first) {
            return Err(format!("strange: {promised} promised, {there:?} there"));
        }
        Ok(())
    }
}

/// Cuts a run many times. Returns how many cuts lost a transaction, and how many broke the database.
fn losses(setup: Setup) -> (usize, usize) {
    let failures = failures(&setup.record(), setup.device, ENOUGH, kept(setup));
    let starting = |word| failures.iter().filter(|failure| failure.why.starts_with(word)).count();
    let (lost, broken) = (starting("lost"), starting("broken"));
    println!("{setup:?}: {lost} lost, {broken} broken");
    assert_eq!(lost + broken, failures.len(), "{}", failures[0]);
    (lost, broken)
}

fn keeps_every_promise(test: &str, setup: Setup) {
    survive(test, setup.device, 2_000, || setup.record(), kept(setup));
}

#[test]
fn wal_full_keeps_every_promise() {
    keeps_every_promise("wal_full_keeps_every_promise", setup("wal", "full"));
}

#[test]
fn wal_full_keeps_every_promise_as_linux_runs_it() {
    let setup = Setup { device: Device::LINUX, ..setup("wal", "full") };
    keeps_every_promise("wal_full_keeps_every_promise_as_linux_runs_it", setup);
}

#[test]
fn truncated_journal_full_keeps_every_promise() {
    keeps_every_promise("truncated_journal_full_keeps_every_promise", setup("truncate", "full"));
}

#[test]
fn persistent_journal_full_keeps_every_promise() {
    keeps_every_promise("persistent_journal_full_keeps_every_promise", setup("persist", "full"));
}

#[test]
fn deleted_journal_extra_keeps_every_promise() {
    keeps_every_promise("deleted_journal_extra_keeps_every_promise", setup("delete", "extra"));
}

/// SQLite syncs the folder after it deletes a journal only with EXTRA. With FULL, the journal of a committed
/// transaction can be back after a power loss, and roll the transaction back.
#[test]
fn deleted_journal_full_is_caught_losing_but_breaks_nothing() {
    let (lost, broken) = losses(setup("delete", "full"));
    assert!(lost > 0);
    assert_eq!(broken, 0);
}

#[test]
fn wal_normal_is_caught_losing_but_breaks_nothing() {
    let (lost, broken) = losses(setup("wal", "normal"));
    assert!(lost > 0);
    assert_eq!(broken, 0);
}

#[test]
fn synchronous_off_is_caught() {
    for journal_mode in ["wal", "truncate", "delete"] {
        let (lost, broken) = losses(setup(journal_mode, "off"));
        assert!(lost > 0 && broken > 0, "{journal_mode}");
    }
}

/// If a disk claims to write in order, SQLite omits syncs. The simulated disk does not keep order, so the
/// tests above would show little if it made that claim.
#[test]
fn a_disk_that_promises_order_is_caught() {
    let characteristics = ffi::SQLITE_IOCAP_ATOMIC
        | ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
        | ffi::SQLITE_IOCAP_SAFE_APPEND
        | ffi::SQLITE_IOCAP_SEQUENTIAL;
    let device = Device { sector_bytes: 4096, characteristics };
    let syncs = |setup: Setup| {
        let recording = setup.record();
        recording.ops().iter().filter(|op| matches!(op, Op::SyncFile { .. })).count()
    };
    for honest in [setup("wal", "full"), setup("truncate", "full")] {
        let (some, all) = (syncs(Setup { device, ..honest }), syncs(honest));
        assert!(some < all, "{some} syncs of {all}");
    }
    let (lost, broken) = losses(Setup { device, ..setup("truncate", "full") });
    assert!(lost + broken > 0);
}

/// A machine that fails repeatedly, even while it recovers.
#[test]
fn promises_are_kept_through_a_hundred_lives() {
    for setup in [setup("wal", "full"), setup("truncate", "full")] {
        let mut disk = Disk::new();
        let mut promised = BTreeSet::new();
        let mut next = 0;
        for life in 0..100 {
            let mut errors = Vec::new();
            setup.session(&disk, next..next + 6, &mut errors).unwrap();
            assert!(errors.is_empty(), "{errors:?}");
            // Transactions that were tried but not promised may be there, so their ids are not used again.
            next += 6;
            let (after, notes) = cut_somewhere(&disk, life);
            promised.extend(notes.iter().map(|id| id.parse::<u32>().unwrap()));
            let there = whole(&setup.open(&after).unwrap()).unwrap();
            assert!(there.is_superset(&promised), "life {life}: {promised:?} {there:?}");
            disk = after;
        }
    }
}

/// A database is built beside the live one and swapped in; each field can omit a step.
///
/// Story: the machine failed right after the next generation of a shard was renamed over the live one.
struct Swap {
    sync_file: bool,
    sync_folder_before: bool,
    sync_folder_after: bool,
}

impl Swap {
    fn record(&self) -> Recording {
        crate::install();
        let disk = Disk::new();
        let build = |name: &str, generation: u32| {
            let db = Connection::open(disk.path(name)).unwrap();
            db.execute_batch(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
                 BEGIN; CREATE TABLE numbers(value INTEGER NOT NULL, used INTEGER NOT NULL);",
            )
            .unwrap();
            // Several pages.
            for value in 0..2000 {
                db.execute("INSERT INTO numbers VALUES (?1, 0)", [10_000 * generation + value])
                    .unwrap();
            }
            db.execute_batch("COMMIT").unwrap();
        };
        build("a.tmp", 1);
        files::sync_file(&disk.path("a.tmp")).unwrap();
        files::rename(&disk.path("a.tmp"), &disk.path("a.db")).unwrap();
        files::sync_folder(disk.root()).unwrap();
        let db = open_live(&disk).unwrap();
        db.execute("UPDATE numbers SET used = 1 WHERE value < 10_100", []).unwrap();
        drop(db);

        build("a.next", 2);
        if self.sync_file {
            files::sync_file(&disk.path("a.next")).unwrap();
        }
        if self.sync_folder_before {
            files::sync_folder(disk.root()).unwrap();
        }
        files::rename(&disk.path("a.next"), &disk.path("a.db")).unwrap();
        if self.sync_folder_after {
            files::sync_folder(disk.root()).unwrap();
        }
        disk.note("swapped");
        disk.recording()
    }

    fn failures(&self) -> usize {
        let failures = failures(&self.record(), Device::PLAIN, ENOUGH, swapped);
        failures.first().inspect(|first| println!("{} of {ENOUGH:?}: {first}", failures.len()));
        failures.len()
    }
}

fn open_live(disk: &Disk) -> rusqlite::Result<Connection> {
    let db = Connection::open(disk.path("a.db"))?;
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")?;
    Ok(db)
}

/// Checks that the file is one complete generation, and the next one if that was promised.
fn swapped(disk: &Disk, notes: &[&str]) -> Result<(), String> {
    if files::length_bytes(&disk.path("a.db")).map_err(|error| error.to_string())?.is_none() {
        return if notes.is_empty() { Ok(()) } else { Err("no file".to_owned()) };
    }
    let say = |error: rusqlite::Error| error.to_string();
    let db = open_live(disk).map_err(say)?;
    let check: String =
        db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(say)?;
    if check != "ok" {
        return Err(check);
    }
    let (least, most, used): (u32, u32, u32) = db
        .query_row("SELECT min(value), max(value), max(used) FROM numbers", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .map_err(say)?;
    match (least, most, used, notes) {
        (10_000, 11_999, _, []) | (20_000, 21_999, 0, _) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

#[test]
fn a_swap_survives_any_cut() {
    let steps = Swap { sync_file: true, sync_folder_before: true, sync_folder_after: true };
    survive("a_swap_survives_any_cut", Device::PLAIN, 2_000, || steps.record(), swapped);
}

#[test]
fn a_swap_without_a_folder_sync_after_the_rename_is_caught() {
    let steps = Swap { sync_file: true, sync_folder_before: true, sync_folder_after: false };
    assert!(steps.failures() > 0);
}

#[test]
fn a_swap_without_a_sync_of_the_new_file_is_caught() {
    let steps = Swap { sync_file: false, sync_folder_before: true, sync_folder_after: true };
    assert!(steps.failures() > 0);
}

/// SQLite removes the WAL of a file that it closes, and does not sync that. The rename can reach the disk
/// before the removal; then the old WAL is beside the new file, and is applied to it.
#[test]
fn a_swap_beside_an_old_wal_that_may_come_back_is_caught() {
    let steps = Swap { sync_file: true, sync_folder_before: false, sync_folder_after: true };
    assert!(steps.failures() > 0);
}

/// Fails each operation of a script that can fail like this, in a run for each. Counts the runs that showed
/// an error and those that did not, and lists those that broke a promise.
struct Sweep {
    surfaced: usize,
    silent: usize,
    broken: Vec<String>,
}

impl Sweep {
    fn run(setup: Setup, fault: Fault, from_then_on: bool) -> Self {
        let mut sweep = Self { surfaced: 0, silent: 0, broken: Vec::new() };
        let mut codes = BTreeSet::new();
        // The part that reaches the disk despite a failed sync is random.
        let seeds = if fault == Fault::FailedSync { 8 } else { 1 };
        for (nth, seed) in (0..).flat_map(|nth| (0..seeds).map(move |seed| (nth, seed))) {
            let case =
                format!("{setup:?}, {fault:?} at {nth}, from then on: {from_then_on}, seed {seed}");
            let disk = Disk::boot_on(&Image::empty(), setup.device);
            disk.fail(Plan { from_then_on, seed, ..Plan::once(fault, nth) });
            let (disk, errors) = in_time(&case, move || {
                let errors = setup.run(&disk, SHORT);
                (disk, errors)
            });
            if disk.fired() == 0 {
                assert!(errors.is_empty(), "{case}: {errors:?}");
                break;
            }
            let code =
                |error: &rusqlite::Error| error.sqlite_error().map(|error| error.extended_code);
            codes.extend(errors.iter().map(code));
            match errors.is_empty() {
                true => sweep.silent += 1,
                false => sweep.surfaced += 1,
            }
            sweep.broken.extend(broken_promise(setup, &disk).map(|why| format!("{case}: {why}")));
        }
        let Self { surfaced, silent, broken } = &sweep;
        println!(
            "{} {}, {fault:?}, from then on: {from_then_on}: {surfaced} surfaced, {silent} silent, \
             {} broken, codes {codes:?}",
            setup.journal_mode,
            setup.device.sector_bytes,
            broken.len(),
        );
        sweep
    }
}

/// Returns what is missing or damaged after the fault is gone, and the process or the power was lost.
fn broken_promise(setup: Setup, disk: &Disk) -> Option<String> {
    let recording = disk.recording();
    let notes = recording.notes(recording.len());
    let promised: BTreeSet<u32> = notes.iter().map(|id| id.parse().unwrap()).collect();
    let killed = disk.kill();
    let mut after: Vec<Disk> =
        (0..3).map(|seed| Disk::boot_on(&killed.after_cut(seed), setup.device)).collect();
    after.push(killed);
    after.iter().find_map(|disk| {
        let db = setup.open(disk).map_err(|error| error.to_string());
        match db.and_then(|db| whole(&db)) {
            Ok(there) if there.is_superset(&promised) => None,
            Ok(there) => Some(format!("{promised:?} promised, {there:?} there")),
            // If the very first transaction can't be synced, SQLite empties the file, takes an empty file as
            // proof that the journal is stale, and removes the journal, synced or not.
            Err(_) if promised.is_empty() => None,
            Err(why) => Some(why),
        }
    })
}

/// Runs a case with a time limit.
///
/// # Panics
/// The time limit is exceeded.
fn in_time<T: Send + 'static>(case: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(run()));
    result
        .recv_timeout(Duration::from_secs(30))
        .unwrap_or_else(|error| panic!("{case}: hangs or panics: {error}"))
}

fn no_error_breaks_a_promise(journal_mode: &'static str, faults: &[Fault]) {
    let setup = Setup { device: Device::LINUX, ..setup(journal_mode, "full") };
    for &fault in faults {
        for from_then_on in [false, true] {
            let sweep = Sweep::run(setup, fault, from_then_on);
            assert!(sweep.broken.is_empty(), "{:#?}", sweep.broken);
            assert!(sweep.surfaced > sweep.silent);
        }
    }
}

/// SQLite syncs the folder after it has created a WAL, and ignores the result. It then promises commits in a
/// file whose name may be lost, or may lead to the previous WAL.
#[test]
fn a_failed_folder_sync_is_caught_unless_the_caller_syncs_the_folder_too() {
    let setup = Setup { device: Device::LINUX, ..setup("wal", "full") };
    for from_then_on in [false, true] {
        let sweep = Sweep::run(setup, Fault::FailedFolderSync, from_then_on);
        assert!(!sweep.broken.is_empty() && sweep.surfaced == 0);
        let careful = Setup { syncs_folder: true, ..setup };
        let sweep = Sweep::run(careful, Fault::FailedFolderSync, from_then_on);
        assert!(sweep.broken.is_empty(), "{:#?}", sweep.broken);
    }
}

#[test]
fn no_error_breaks_a_promise_of_wal() {
    let faults = [
        Fault::Io,
        Fault::NoSpace,
        Fault::Quota,
        Fault::ShortWrite,
        Fault::FilesOfProcess,
        Fault::NoMemory,
        Fault::FailedSync,
    ];
    no_error_breaks_a_promise("wal", &faults);
}

#[test]
fn no_error_but_a_failed_sync_breaks_a_promise_of_a_truncated_journal() {
    let faults = [Fault::Io, Fault::NoSpace, Fault::ShortWrite];
    no_error_breaks_a_promise("truncate", &faults);
}

/// The journal of the transaction whose sync failed is back half overwritten.
#[test]
fn a_journal_that_is_used_after_a_failed_sync_is_caught() {
    let setup = Setup { device: Device::LINUX, ..setup("truncate", "full") };
    assert!(!Sweep::run(setup, Fault::FailedSync, true).broken.is_empty());
}

/// If overwrites are not powersafe, SQLite pads the WAL after each commit, and leaves part of the padding
/// unsynced. If the sync at the beginning of a checkpoint fails and drops the padding, an automatic
/// checkpoint does not report that, and the next commit is appended to lost data.
#[test]
fn a_failed_sync_that_sqlite_keeps_to_itself_is_caught() {
    let sweep = Sweep::run(setup("wal", "full"), Fault::FailedSync, false);
    assert!(!sweep.broken.is_empty());
}

/// Opens two connections to a database on one disk.
fn pair(journal_mode: &'static str) -> (Disk, Connection, Connection) {
    let disk = Disk::new();
    let open = || setup(journal_mode, "full").open(&disk).unwrap();
    let (a, b) = (open(), open());
    a.execute_batch("CREATE TABLE t(n); INSERT INTO t VALUES (1)").unwrap();
    (disk, a, b)
}

fn sum(db: &Connection) -> rusqlite::Result<u32> {
    db.query_row("SELECT sum(n) FROM t", [], |row| row.get(0))
}

fn is_busy<T: std::fmt::Debug>(result: rusqlite::Result<T>) -> bool {
    result.unwrap_err().sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
}

#[test]
fn connections_keep_each_other_out_as_on_a_real_disk() {
    for journal_mode in ["wal", "truncate", "delete"] {
        let (_disk, a, b) = pair(journal_mode);
        a.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (2)").unwrap();
        assert!(is_busy(b.execute_batch("BEGIN IMMEDIATE")), "{journal_mode}");
        assert_eq!(sum(&b).unwrap(), 1, "{journal_mode}: not committed");
        a.execute_batch("COMMIT").unwrap();
        assert_eq!(sum(&b).unwrap(), 3, "{journal_mode}: committed");

        b.execute_batch("BEGIN").unwrap();
        assert_eq!(sum(&b).unwrap(), 3);
        let insert = a.execute_batch("INSERT INTO t VALUES (3)");
        if journal_mode == "wal" {
            insert.unwrap();
            assert_eq!(sum(&b).unwrap(), 3, "a snapshot");
        } else {
            assert!(is_busy(insert), "{journal_mode}: a reader must block commits");
        }
        b.execute_batch("COMMIT").unwrap();
    }
}

#[test]
fn the_last_connection_takes_the_wal_and_its_index_along() {
    let (disk, a, b) = pair("wal");
    let names = || disk.shared.list("").unwrap();
    a.close().unwrap();
    assert_eq!(names(), ["numbers.db", "numbers.db-shm", "numbers.db-wal"]);
    b.close().unwrap();
    assert_eq!(names(), ["numbers.db"]);
}

#[test]
fn pools_on_many_threads_lose_nothing() {
    let disk = Arc::new(Disk::new());
    let path = disk.path(FILE);
    let db = setup("wal", "full").open(&disk).unwrap();
    db.execute_batch("CREATE TABLE t(n INTEGER PRIMARY KEY)").unwrap();
    drop(db);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let pool = deadpool_sqlite::Config::new(&path)
            .create_pool(deadpool_sqlite::Runtime::Tokio1)
            .unwrap();
        let mut writers = Vec::new();
        for writer in 0..4 {
            let (pool, disk) = (pool.clone(), disk.clone());
            writers.push(tokio::spawn(async move {
                let connection = pool.get().await.unwrap();
                for n in 0..50 {
                    let id = writer * 50 + n;
                    let insert =
                        move |db: &mut Connection| db.execute("INSERT INTO t VALUES (?1)", [id]);
                    connection.interact(insert).await.unwrap().unwrap();
                    disk.note(id.to_string());
                }
            }));
        }
        for writer in writers {
            writer.await.unwrap();
        }
    });
    let recording = disk.recording();
    assert_eq!(recording.notes(recording.len()).len(), 200);
    let verdict = |disk: &Disk, promised: &[&str]| {
        let db = Connection::open(disk.path(FILE)).map_err(|error| error.to_string())?;
        for id in promised {
            db.query_row("SELECT n FROM t WHERE n = ?1", [id], |_| Ok(()))
                .map_err(|error| format!("{id}: {error}"))?;
        }
        Ok(())
    };
    survive("pools_on_many_threads_lose_nothing", Device::PLAIN, 500, || recording, verdict);
}

#[test]
fn a_database_is_reached_by_plain_path_by_name_and_by_uri() {
    crate::install();
    let disk = Disk::new();
    let path = disk.path(FILE);
    let flags = OpenFlags::default();
    let uri = format!("file:{}?vfs={}", path.display(), vfs::NAME.to_str().unwrap());
    let open: [&dyn Fn() -> rusqlite::Result<Connection>; 3] = [
        &|| Connection::open(&path),
        &|| Connection::open_with_flags_and_vfs(&path, flags, vfs::NAME),
        &|| Connection::open(&uri),
    ];
    for (version, write) in (1u32..).zip(open) {
        write().unwrap().pragma_update(None, "user_version", version).unwrap();
        for read in open {
            let read = read().unwrap();
            let found = read.pragma_query_value(None, "user_version", |row| row.get(0));
            assert_eq!(found, Ok(version));
        }
    }
    assert!(!path.exists(), "a file is on the real disk");
}

#[test]
fn real_files_stay_real() {
    crate::install();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("real.db");
    let db = Connection::open(&path).unwrap();
    let mode: String = db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
    db.execute_batch("CREATE TABLE t(n); CREATE TEMP TABLE u(n); INSERT INTO u VALUES (1)")
        .unwrap();
    assert!(
        path.metadata().unwrap().len()
            + folder.path().join("real.db-wal").metadata().unwrap().len()
            > 0
    );
}

#[test]
fn a_connection_that_outlives_its_machine_reaches_no_other() {
    for journal_mode in ["wal", "truncate"] {
        let (disk, a, b) = pair(journal_mode);
        a.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (2)").unwrap();
        let next = Disk::boot(&disk.cut(1));
        assert!(a.execute_batch("COMMIT").is_err());
        assert!(b.execute_batch("INSERT INTO t VALUES (4)").is_err());
        drop(a);
        let before = next.recording().len();
        drop((b, disk));
        assert_eq!(next.recording().len(), before);
        let db = setup(journal_mode, "full").open(&next).unwrap();
        assert_eq!(sum(&db).unwrap(), 1);
    }
}
