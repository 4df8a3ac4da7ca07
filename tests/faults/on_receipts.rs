//! Idempotency keys under power loss and errors: no key has two responses, no number is in two receipts, and
//! none of a receipt is handed out to another client.

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tombola::internals::receipts::{self, Receipts, Refusal};
use tombola::internals::sqlite;
use tombola::internals::{Pool, TakeError};

use crate::cuts::survive;
use crate::disk::{Device, Disk, Fault, Plan};
use crate::medium::Image;
use crate::product::{
    CLIENTS, COME_BACK, HandedOut, PATIENCE, PoolSetting, SHARDS, Service, Setting, check_files,
    clients, drain, note, process, set_aside, take,
};
use crate::recording::Recording;

const POOLS: &[PoolSetting] = &[PoolSetting { name: "int", range: 400, shard_size: 60 }];
const LEASED: Setting = Setting { lease_rows: 8, pools: POOLS };
const STRICT: Setting = Setting { lease_rows: 0, pools: POOLS };

/// The counts of requests, by key.
const COUNTS: [u32; 4] = [1, 3, 1, 2];
const COUNT_MAX: usize = 3;
/// One in `EVERY` operations fails, in a run of its own; `FAULTS_EVERY=1` fails each of them.
const EVERY: u64 = 9;

/// How often each kind of response came after a failure.
#[derive(Default)]
struct Tally {
    /// A request was lost, and its key got numbers of its own afterwards.
    fresh: AtomicU64,
    /// A response was lost, and its key got the same numbers.
    replayed: AtomicU64,
    refused: AtomicU64,
}

impl Tally {
    fn count(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }

    fn print(&self, test: &str) {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        println!(
            "{test}: of the lost requests, {} had no receipt and got fresh numbers, {} had one and got its \
             numbers; {} were refused",
            get(&self.fresh),
            get(&self.replayed),
            get(&self.refused),
        );
    }
}

fn key(index: usize) -> String {
    format!("k{index}")
}

/// Requests the numbers of a key once. Returns them, and whether an earlier request had them.
async fn ask(
    receipts: &Receipts,
    pool: &Arc<Pool>,
    index: usize,
) -> Result<(Vec<i64>, bool), Refusal> {
    let count = NonZeroU32::new(COUNTS[index % COUNTS.len()]).expect("more than none");
    let response = receipts.take(pool, &key(index), count).await?;
    let numbers: Vec<i64> = response.numbers.iter().map(|value| value.0).collect();
    assert_eq!(numbers.len(), count.get() as usize);
    Ok((numbers, response.is_replayed))
}

/// Requests the numbers of a key until it gets them, or until the range is used up.
async fn insist(
    receipts: &Receipts,
    pool: &Arc<Pool>,
    index: usize,
) -> Result<Option<(Vec<i64>, bool)>, String> {
    let started = Instant::now();
    loop {
        match ask(receipts, pool, index).await {
            Ok(response) => return Ok(Some(response)),
            Err(Refusal::NoNumbers(TakeError::Exhausted { .. })) => return Ok(None),
            Err(error) if started.elapsed() > PATIENCE => {
                return Err(format!("{}: {error}, without end", key(index)));
            }
            Err(_) => tokio::time::sleep(COME_BACK).await,
        }
    }
}

/// Sends requests with these keys from several clients at once, so that each key is requested by all of them.
async fn keyed_clients(
    disk: &Arc<Disk>,
    service: &Service,
    keys: Range<usize>,
) -> Result<(), String> {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (disk, keys) = (Arc::clone(disk), keys.clone());
        let (receipts, pool) = (Arc::clone(&service.receipts), Arc::clone(&service.pools[0]));
        tasks.spawn(async move {
            for index in keys {
                disk.note(format!("ask {index}"));
                if let Some((numbers, _)) = insist(&receipts, &pool, index).await? {
                    disk.note(note("int", Some(&key(index)), &numbers));
                }
            }
            Ok(())
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// How a run of the product ends.
#[derive(Clone, Copy)]
enum End {
    Stop,
    Kill,
}

/// Runs the product once with these keys, and with clients that have none.
async fn live(
    disk: &Arc<Disk>,
    setting: &Setting,
    keys: Range<usize>,
    end: End,
) -> Result<(), String> {
    let service = Service::start(disk, setting).await?;
    let (keyed, others) = tokio::join!(
        keyed_clients(disk, &service, keys),
        clients(disk, &service.pools[0], 40, &[1, 1, 2])
    );
    keyed.and(others)?;
    match end {
        End::Stop => service.stop().await,
        End::Kill => {
            disk.power_off();
            Ok(())
        }
    }
}

/// The number of keys that a recording uses.
const KEYS: usize = 40;

/// Records three runs with keys that overlap: one that is stopped, one that is killed, and one more.
fn record(setting: &Setting, device: Device) -> Recording {
    crate::install();
    let disk = Arc::new(Disk::boot_on(&Image::empty(), device));
    process(live(&disk, setting, 0..16, End::Stop)).unwrap();
    process(live(&disk, setting, 8..28, End::Kill)).unwrap();
    let disk = Arc::new(disk.kill());
    process(live(&disk, setting, 20..KEYS, End::Stop)).unwrap();
    disk.recording()
}

/// Checks the product after a failure: each key gets its one response, all other numbers are handed out except
/// `burned_at_most`, and the receipts are those of the keys. `asked` tells whether a key was requested before.
fn goes_on(
    setting: &Setting,
    disk: &Disk,
    mut handed_out: HandedOut,
    burned_at_most: usize,
    keys: Range<usize>,
    mut retried: impl FnMut(usize, bool),
) -> Result<(), String> {
    process(async {
        let service = Service::start(disk, setting).await?;
        for index in keys {
            let is_known = handed_out.keys().contains_key(&key(index));
            let Some((numbers, is_replayed)) =
                insist(&service.receipts, &service.pools[0], index).await?
            else {
                continue;
            };
            if is_known && !is_replayed {
                return Err(format!("the receipt of {} is lost", key(index)));
            }
            if !is_known {
                retried(index, is_replayed);
            }
            handed_out.add_keyed("int", &key(index), &numbers)?;
        }
        drain(&service.pools[0], &mut handed_out).await?;
        service.stop().await
    })?;
    let aside = set_aside(disk);
    if !aside.is_empty() {
        return Err(format!("a failure must not count as damage: {aside:?}"));
    }
    check_files(disk, setting)?;
    let mut receipts: Vec<Vec<i64>> = receipts::check(&disk.path("shards"))?
        .iter()
        .map(|numbers| numbers.iter().map(|value| value.0).collect())
        .collect();
    let mut responses: Vec<Vec<i64>> = handed_out.keys().values().cloned().collect();
    receipts.sort_unstable();
    responses.sort_unstable();
    if receipts != responses {
        return Err(format!("the receipts {receipts:?} are not the responses {responses:?}"));
    }
    let burned = setting.pools[0].range - handed_out.count("int");
    match burned <= burned_at_most {
        true => Ok(()),
        false => Err(format!("{burned} numbers are burned, at most {burned_at_most} may be")),
    }
}

/// Returns how many numbers one power loss may burn: two leases of each shard, and what was on the way to
/// clients.
fn burned_by_loss(setting: &Setting) -> usize {
    usize::from(SHARDS) * 2 * setting.lease_rows + 2 * CLIENTS * COUNT_MAX
}

fn survives(test: &str, setting: Setting, device: Device) {
    let tally = Tally::default();
    let verdict = |disk: &Disk, notes: &[&str]| {
        let (asked, noted): (Vec<&str>, Vec<&str>) =
            notes.iter().partition(|note| note.starts_with("ask "));
        let retried = |index, is_replayed| {
            if asked.contains(&&*format!("ask {index}")) {
                Tally::count(if is_replayed { &tally.replayed } else { &tally.fresh });
            }
        };
        let handed_out = HandedOut::of_notes(&noted);
        goes_on(&setting, disk, handed_out, 2 * burned_by_loss(&setting), 0..KEYS, retried)
    };
    survive(test, device, 200, || record(&setting, device), verdict);
    tally.print(test);
}

#[test]
fn no_key_has_two_responses_after_a_power_loss() {
    survives("no_key_has_two_responses_after_a_power_loss", LEASED, Device::PLAIN);
}

#[test]
fn no_key_has_two_responses_after_a_power_loss_when_strict() {
    survives("no_key_has_two_responses_after_a_power_loss_when_strict", STRICT, Device::LINUX);
}

/// The state of the receipts before an error.
struct Beginning {
    name: &'static str,
    image: Image,
    handed_out: HandedOut,
}

impl Beginning {
    /// There is no file of receipts yet.
    fn without() -> Self {
        let (name, handed_out) = ("without receipts", HandedOut::default());
        Self { name, image: Image::empty(), handed_out }
    }

    /// A process was killed, so that the file has a log.
    fn killed() -> Self {
        let disk = Arc::new(Disk::boot_on(&Image::empty(), Device::LINUX));
        process(live(&disk, &SMALL, 0..4, End::Kill)).unwrap();
        let recording = disk.recording();
        let mut notes = recording.notes(recording.len());
        notes.retain(|note| !note.starts_with("ask "));
        let handed_out = HandedOut::of_notes(&notes);
        Self { name: "after a kill", image: disk.kill().after_cut(0), handed_out }
    }
}

/// How a run goes on after an operation failed.
#[derive(Clone, Copy, Debug)]
enum After {
    /// The fault passes, and the process is stopped later.
    Healing,
    /// The process is killed while the fault lasts.
    Kill,
    /// The power is lost while the fault lasts.
    PowerLoss,
}

/// Shards that are used up quickly.
const SMALL: Setting =
    Setting { lease_rows: 4, pools: &[PoolSetting { name: "int", range: 150, shard_size: 30 }] };
/// The keys of a run with an error. The first ones were used by a run before, in which the process was killed.
const ERROR_KEYS: Range<usize> = 0..9;
/// The count of numbers that clients without a key take after an error. It is more than two shards have, so that
/// numbers that went back are handed out, and shards have to be replaced.
const OTHERS: usize = 70;

/// Runs the product while operations on the file of receipts fail. Returns how many did.
fn run(beginning: &Beginning, plan: &Plan, after: After, tally: &Tally) -> Result<u64, String> {
    let disk = Disk::boot_on(&beginning.image, Device::LINUX);
    let mut handed_out = beginning.handed_out.clone();
    process(async {
        disk.fail(plan.clone());
        let service = match Service::start(&disk, &SMALL).await {
            Ok(service) => service,
            Err(refusal) if refusal.contains("can't be used") => {
                return Err(format!("an error is taken for damage: {refusal}"));
            }
            Err(_) => {
                disk.heal();
                Service::start(&disk, &SMALL).await?
            }
        };
        let pool = &service.pools[0];
        for index in ERROR_KEYS {
            let asked = tokio::time::timeout(PATIENCE, ask(&service.receipts, pool, index));
            match asked.await.map_err(|_| format!("{}: no response", key(index)))? {
                Ok((numbers, _)) => handed_out.add_keyed("int", &key(index), &numbers)?,
                Err(Refusal::NotSaved) => Tally::count(&tally.refused),
                Err(Refusal::NoNumbers(_)) => tokio::time::sleep(COME_BACK).await,
            }
        }
        match after {
            After::Healing => {
                disk.heal();
                for index in ERROR_KEYS {
                    let retried = insist(&service.receipts, pool, index).await?;
                    let (numbers, _) = retried.ok_or("the range is used up")?;
                    handed_out.add_keyed("int", &key(index), &numbers)?;
                }
                take_others(pool, 10, &mut handed_out).await?;
                service.stop().await
            }
            After::Kill | After::PowerLoss => {
                take_others(pool, OTHERS, &mut handed_out).await?;
                disk.power_off();
                Ok(())
            }
        }
    })?;
    disk.heal();
    let fired = disk.fired();
    let crashed = !beginning.handed_out.keys().is_empty();
    let (next, losses) = match after {
        After::Healing => (disk.kill(), usize::from(crashed)),
        After::Kill => (disk.kill(), usize::from(crashed) + 1),
        After::PowerLoss => {
            let image = disk.after_cut(plan.seed);
            (Disk::boot_on(&image, Device::LINUX), usize::from(crashed) + 1)
        }
    };
    let retried = |_, is_replayed| {
        Tally::count(if is_replayed { &tally.replayed } else { &tally.fresh });
    };
    let burned_at_most = losses * burned_by_loss(&SMALL);
    goes_on(&SMALL, &next, handed_out, burned_at_most, ERROR_KEYS, retried)?;
    Ok(fired)
}

/// Takes numbers without a key, which must not wait for the receipts.
async fn take_others(
    pool: &Arc<Pool>,
    wanted: usize,
    handed_out: &mut HandedOut,
) -> Result<(), String> {
    let started = Instant::now();
    for _ in 0..wanted {
        loop {
            let taken = tokio::time::timeout(PATIENCE, take(pool, 1)).await;
            match taken.map_err(|_| "a request without a key hangs".to_owned())? {
                Ok(numbers) => break handed_out.add("int", &numbers)?,
                Err(TakeError::Refilling) if started.elapsed() < PATIENCE => {
                    tokio::time::sleep(COME_BACK).await;
                }
                Err(error) => return Err(format!("{error}: {:?}", pool.health())),
            }
        }
    }
    Ok(())
}

/// Fails each operation on the file of receipts in turn, until the script ends without meeting the fault.
fn every_operation_fails(fault: Fault) {
    crate::install();
    let every = std::env::var("FAULTS_EVERY").map_or(EVERY, |every| every.parse().unwrap());
    let (tally, mut runs, mut failures) = (Tally::default(), 0, Vec::new());
    for beginning in [Beginning::without(), Beginning::killed()] {
        for from_then_on in [false, true] {
            if from_then_on && fault == Fault::Interrupted {
                // An interrupted operation is retried, and succeeds in the end.
                continue;
            }
            for after in [After::Healing, After::Kill, After::PowerLoss] {
                // Each sweep begins with a different operation, so that together they cover more of them.
                for nth in (runs % every..).step_by(every as usize) {
                    let plan = Plan { from_then_on, ..Plan::once(fault, nth) }.only("receipts.db");
                    runs += 1;
                    match run(&beginning, &plan, after, &tally) {
                        Ok(0) => break,
                        Ok(_) => {}
                        Err(error) => failures.push(format!(
                            "{}, operation {nth}, from then on {from_then_on}, then {after:?}: {error}",
                            beginning.name
                        )),
                    }
                    assert!(failures.len() < 8, "{runs} runs of {fault:?}: {failures:#?}");
                }
            }
        }
    }
    assert!(failures.is_empty(), "{runs} runs of {fault:?}: {failures:#?}");
    tally.print(&format!("{fault:?} in {runs} runs"));
}

#[test]
fn no_key_has_two_responses_after_io_errors() {
    every_operation_fails(Fault::Io);
}

#[test]
fn no_key_has_two_responses_after_a_full_disk() {
    every_operation_fails(Fault::NoSpace);
}

#[test]
fn no_key_has_two_responses_after_a_used_up_quota() {
    every_operation_fails(Fault::Quota);
}

#[test]
fn no_key_has_two_responses_after_short_writes() {
    every_operation_fails(Fault::ShortWrite);
}

#[test]
fn no_key_has_two_responses_after_a_lack_of_memory() {
    every_operation_fails(Fault::NoMemory);
}

#[test]
fn no_key_has_two_responses_after_failed_syncs() {
    every_operation_fails(Fault::FailedSync);
}

#[test]
fn no_key_has_two_responses_after_failed_syncs_of_the_folder() {
    every_operation_fails(Fault::FailedFolderSync);
}

#[test]
fn no_key_has_two_responses_after_interrupted_calls() {
    every_operation_fails(Fault::Interrupted);
}

#[test]
fn no_key_has_two_responses_after_a_lack_of_file_descriptors() {
    every_operation_fails(Fault::FilesOfProcess);
}

/// Story: the sync of a commit failed while a reader had the file open. The reader kept the index of the log,
/// which did not list the commit, so the commit counted as failed. But the log still had it, and after a power
/// loss it was a receipt, with numbers that another client had got by then.
#[test]
fn a_commit_that_failed_does_not_come_back_when_a_reader_keeps_the_index() {
    crate::install();
    let tally = Tally::default();
    for seed in 0..8 {
        let disk = Disk::boot_on(&Image::empty(), Device::LINUX);
        let mut handed_out = HandedOut::default();
        process(async {
            let service = Service::start(&disk, &SMALL).await?;
            let pool = &service.pools[0];
            let (numbers, _) = insist(&service.receipts, pool, 0).await?.ok_or("used up")?;
            handed_out.add_keyed("int", &key(0), &numbers)?;
            let reader = sqlite::open_to_read(&disk.path("shards/receipts.db")).unwrap();
            let count = |sql| reader.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
            assert_eq!(count("SELECT count(*) FROM receipts"), 1);
            // The desk has tidied the file after the first request once it serves this one.
            insist(&service.receipts, pool, 0).await?;
            disk.fail(Plan { seed, ..Plan::once(Fault::FailedSync, 0) }.only("receipts.db-wal"));
            assert_eq!(ask(&service.receipts, pool, 1).await, Err(Refusal::NotSaved));
            assert_eq!(disk.fired(), 1);
            // The store is open again once this key has its numbers.
            insist(&service.receipts, pool, 0).await?;
            take_others(pool, OTHERS, &mut handed_out).await?;
            disk.power_off();
            Ok::<_, String>(())
        })
        .unwrap();
        for next in [disk.kill(), Disk::boot_on(&disk.after_cut(seed), Device::LINUX)] {
            let retried = |_, is_replayed| {
                Tally::count(if is_replayed { &tally.replayed } else { &tally.fresh });
            };
            let burned_at_most = burned_by_loss(&SMALL);
            goes_on(&SMALL, &next, handed_out.clone(), burned_at_most, 0..2, retried).unwrap();
        }
    }
    tally.print("a reader keeps the index");
}

/// A disk without space for receipts costs no number, and the keys get theirs once there is space.
#[test]
fn a_full_disk_burns_no_number_of_a_key() {
    crate::install();
    let disk = Disk::boot_on(&Image::empty(), Device::LINUX);
    let mut handed_out = HandedOut::default();
    process(async {
        let service = Service::start(&disk, &SMALL).await?;
        let pool = &service.pools[0];
        for index in 0..20 {
            match index % 4 {
                1 => disk
                    .fail(Plan::from_then_on(Fault::NoSpace, index as u64 / 4).only("receipts.db")),
                3 => disk.heal(),
                _ => {}
            }
            if let Ok((numbers, _)) = ask(&service.receipts, pool, index).await {
                handed_out.add_keyed("int", &key(index), &numbers)?;
            }
            take_others(pool, 1, &mut handed_out).await?;
        }
        assert!(handed_out.keys().len() < 20, "the disk was not full");
        service.stop().await
    })
    .unwrap();
    goes_on(&SMALL, &disk.kill(), handed_out, 0, 0..20, |_, _| {}).unwrap();
}
