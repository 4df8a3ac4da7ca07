//! I/O errors under the product: each operation of its life fails once, or all do from then on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tombola::batch::BatchId;
use tombola::pool::{Pool, TakeError};
use tombola::{shard, sqlite};

use crate::cuts::survive;
use crate::disk::{Device, Disk, Fault, Plan};
use crate::medium::Image;
use crate::product::{
    HandedOut, PATIENCE, PoolSetting, SHARDS, Service, Setting, check_files, clients, drain,
    process, set_aside, take,
};

const POOLS: &[PoolSetting] = &[PoolSetting { name: "int", range: 150, shard_size: 30 }];
const LEASED: Setting = Setting { lease_rows: 4, pools: POOLS };
const STRICT: Setting = Setting { lease_rows: 0, pools: POOLS };

/// Numbers that the script takes while operations fail: several leases, a refill and a swap.
const WANTED: usize = 50;
/// Refusals in a row after which the script waits no more for the fault to pass.
const REFUSALS_MAX: usize = 30;
/// One in so many operations fails in a run of its own; `FAULTS_EVERY=1` for each.
const EVERY: usize = 7;
const COME_BACK: Duration = Duration::from_micros(300);

/// A disk to begin on, and what was handed out of it.
struct Beginning {
    image: Image,
    handed_out: HandedOut,
}

impl Beginning {
    fn empty() -> Self {
        Self { image: Image::empty(), handed_out: HandedOut::default() }
    }

    /// A process was killed in the midst of its work.
    fn killed(setting: &Setting) -> Self {
        let disk = Disk::new();
        let mut handed_out = HandedOut::default();
        process(async {
            let service = Service::start(&disk, setting).await?;
            take_some(&service.pools[0], 45, &mut handed_out).await?;
            disk.power_off();
            Ok::<_, String>(())
        })
        .unwrap();
        Self { image: disk.kill().after_cut(0), handed_out }
    }
}

/// Takes up to `wanted` numbers, fewer where the pool goes on refusing. Says how many.
async fn take_some(
    pool: &Pool,
    wanted: usize,
    handed_out: &mut HandedOut,
) -> Result<usize, String> {
    let (mut taken, mut refusals) = (0, 0);
    while taken < wanted && refusals < REFUSALS_MAX {
        let count = if taken % 3 == 2 { 3 } else { 1 };
        let answer = tokio::time::timeout(PATIENCE, take(pool, count)).await;
        match answer.map_err(|_| "no answer: it hangs".to_owned())? {
            Ok(numbers) => {
                handed_out.add(pool.name().as_str(), &numbers)?;
                (taken, refusals) = (taken + numbers.len(), 0);
            }
            Err(TakeError::Exhausted { .. }) => break,
            Err(TakeError::Refilling) => {
                refusals += 1;
                tokio::time::sleep(COME_BACK).await;
            }
        }
    }
    Ok(taken)
}

/// Numbers come again, without a new start.
async fn recovers(pool: &Pool, handed_out: &mut HandedOut) -> Result<(), String> {
    // By the clock, not by tries: on a busy machine many tries pass before a build gets to run.
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let all_gone = pool.health().exhausted;
        if take_some(pool, 5, handed_out).await? >= 5 || all_gone {
            return Ok(());
        }
    }
    Err(format!("no numbers although the fault is gone: {:?}", pool.health()))
}

/// One life in which operations fail, and the next one.
fn run(setting: &Setting, beginning: &Beginning, plan: &Plan) -> Result<u64, String> {
    let disk = Disk::boot(&beginning.image);
    let mut handed_out = beginning.handed_out.clone();
    disk.fail(plan.clone());
    process(async {
        let service = match Service::start(&disk, setting).await {
            Ok(service) => service,
            Err(_) => {
                disk.heal();
                Service::start(&disk, setting).await?
            }
        };
        take_some(&service.pools[0], WANTED, &mut handed_out).await?;
        disk.heal();
        recovers(&service.pools[0], &mut handed_out).await?;
        service.stop().await
    })?;
    let fired = disk.fired();
    if fired > 0 {
        let cut = Disk::boot(&disk.after_cut(plan.nth));
        for (after, disk) in [("a stop", disk.kill()), ("a power loss", cut)] {
            let nothing_is_lost = matches!(plan.fault, Fault::NoSpace | Fault::ShortWrite);
            goes_on(setting, nothing_is_lost, &disk, handed_out.clone())
                .map_err(|error| format!("after {after}: {error}"))?;
        }
    }
    Ok(fired)
}

/// The rest of the range comes, but for what was in files that were set aside.
fn goes_on(
    setting: &Setting,
    nothing_is_lost: bool,
    disk: &Disk,
    mut handed_out: HandedOut,
) -> Result<(), String> {
    process(async {
        let service = Service::start(disk, setting).await?;
        drain(&service.pools[0], &mut handed_out).await?;
        service.stop().await
    })?;
    check_files(disk, setting)?;
    let pool = &setting.pools[0];
    let burned = pool.range - handed_out.count(pool.name);
    let aside = set_aside(disk).len();
    let leases = usize::from(SHARDS) * (2 * setting.lease_rows + 3) * 2;
    // A file that can't be read or synced may be given up before it got its name.
    let given_up = if nothing_is_lost { 0 } else { 3 };
    let aside = aside + given_up;
    if burned > leases + aside * pool.shard_size as usize {
        return Err(format!("{burned} numbers are burned, {aside} files were set aside"));
    }
    Ok(())
}

/// Fails each operation in turn, until the script gets through without meeting the fault.
fn every_operation_fails(fault: Fault) {
    crate::install();
    // All of them take minutes.
    let every = std::env::var("FAULTS_EVERY").map_or(EVERY, |every| every.parse().unwrap());
    let (mut failures, mut runs) = (Vec::new(), 0);
    for setting in [LEASED, STRICT] {
        for beginning in [Beginning::empty(), Beginning::killed(&setting)] {
            for from_then_on in [false, true] {
                for nth in (0..).step_by(every) {
                    let plan = Plan { from_then_on, ..Plan::once(fault, nth) };
                    runs += 1;
                    match run(&setting, &beginning, &plan) {
                        Ok(0) => break,
                        Ok(_) => {}
                        Err(error) => failures.push(format!(
                            "lease {}, from then on {from_then_on}, operation {nth}: {error}",
                            setting.lease_rows
                        )),
                    }
                }
            }
        }
    }
    println!("{fault:?}: {runs} runs");
    let some = &failures[..failures.len().min(12)];
    assert!(failures.is_empty(), "{} of {runs} runs failed:\n{some:#?}", failures.len());
}

#[test]
fn an_io_error_anywhere_repeats_nothing() {
    every_operation_fails(Fault::Io);
}

#[test]
fn a_full_disk_anytime_repeats_nothing() {
    every_operation_fails(Fault::NoSpace);
}

#[test]
fn a_short_write_anywhere_repeats_nothing() {
    every_operation_fails(Fault::ShortWrite);
}

#[test]
fn a_failed_sync_anywhere_repeats_nothing() {
    every_operation_fails(Fault::FailedSync);
}

/// Story: a ledger whose log could not be synced was opened again, its log put into the file and begun
/// anew. The power loss after that brought the log back up to where its sync had failed: older pages
/// over newer ones, and a count that did not fit the values.
#[test]
fn a_power_loss_after_a_failed_sync_of_a_log_repeats_nothing() {
    crate::install();
    let verdict =
        |disk: &Disk, notes: &[&str]| goes_on(&LEASED, false, disk, HandedOut::of_notes(notes));
    let test = "a_power_loss_after_a_failed_sync_of_a_log_repeats_nothing";
    // What a failed sync let through is drawn for each run.
    for seed in 0..8 {
        for nth in 0.. {
            let disk = Arc::new(Disk::new());
            let plan = Plan::once(Fault::FailedSync, nth).only("used_numbers_int.db-wal");
            disk.fail(Plan { seed, ..plan });
            process(async {
                let service = Service::start(&disk, &LEASED).await?;
                clients(&disk, &service.pools[0], 110, &[1, 1, 3]).await?;
                service.stop().await
            })
            .unwrap();
            if disk.fired() == 0 {
                break;
            }
            survive(test, Device::PLAIN, 60, || disk.recording(), verdict);
        }
    }
}

#[test]
fn a_failed_folder_sync_anywhere_repeats_nothing() {
    every_operation_fails(Fault::FailedFolderSync);
}

/// Story: the commit of a lease fails at its sync. The kernel takes what was unsynced for written and
/// may forget it, so the next sync of that file says yes and means nothing. A server that tried again
/// would hand out rows whose marks a power loss undoes.
#[test]
fn after_a_failed_sync_nothing_of_that_file_is_handed_out() {
    crate::install();
    for setting in [LEASED, STRICT] {
        for nth in 0..8 {
            let plan = Plan::once(Fault::FailedSync, nth).only("int_shard_0.db-wal");
            give_up_the_file(&setting, plan).unwrap_or_else(|error| {
                panic!("lease {}, sync {nth}: {error}", setting.lease_rows)
            });
        }
    }
}

fn give_up_the_file(setting: &Setting, plan: Plan) -> Result<(), String> {
    let disk = Disk::new();
    let mut before = HandedOut::default();
    process(async {
        let service = Service::start(&disk, setting).await?;
        let pool = &service.pools[0];
        disk.fail(plan);
        while set_aside(&disk).is_empty() {
            if take_some(pool, 1, &mut before).await? == 0 && pool.health().exhausted {
                return Err(format!("used to its end, {} syncs failed", disk.fired()));
            }
        }
        let [aside] = &set_aside(&disk)[..] else {
            return Err(format!("one file failed: {:?}", set_aside(&disk)));
        };
        let file = disk.path(&format!("shards/{aside}"));
        let batch = shard::read_label(&file).map_err(|error| error.to_string())?.batch;
        let mut after = before.clone();
        drain(pool, &mut after).await?;
        service.stop().await?;
        let of_file = values(&disk, batch)?;
        let came = |numbers: &HandedOut| {
            of_file.iter().filter(|number| numbers.has("int", **number)).count()
        };
        match came(&after) - came(&before) {
            0 => Ok(()),
            late => Err(format!("{late} numbers of the file came after it failed")),
        }
    })
}

/// The values of a batch, by the ledger: the file itself may have lost them.
fn values(disk: &Disk, batch: BatchId) -> Result<Vec<i64>, String> {
    let read = || {
        let ledger = sqlite::open_to_read(&disk.path("shards/used_numbers_int.db"))?;
        let mut query = ledger.prepare("SELECT value FROM used_numbers WHERE batch = ?")?;
        query.query_map([batch.0], |row| row.get(0))?.collect::<Result<_, _>>()
    };
    read().map_err(|error: sqlite::rusqlite::Error| error.to_string())
}
