//! Power loss and errors during an import: once it has succeeded, none of its numbers is handed out. If it was
//! interrupted, running it again completes it.

use std::sync::Arc;
use std::time::Duration;

use tombola::internals::{Folder, Mode, Outcome, Value, import};

use crate::cuts::survive;
use crate::disk::{Device, Disk, Fault, Plan};
use crate::medium::Image;
use crate::product::{
    CLIENTS, HandedOut, PoolSetting, SHARDS, Service, Setting, check_files, clients, drain,
    process, set_aside,
};
use crate::recording::Recording;

const RANGE: usize = 900;
const SETTING: Setting =
    Setting { lease_rows: 8, pools: &[PoolSetting { name: "int", range: RANGE, shard_size: 200 }] };

/// The numbers below which a shard gets a standby.
const LOW_WATER: u64 = 100;

/// The note that an import has succeeded.
const IMPORTED: &str = "imported";

/// How a run of the product ends before the import.
#[derive(Clone, Copy, Debug)]
enum End {
    Stop,
    Kill,
}

/// Hands out so many numbers that one shard has a standby, and the live files have unused rows.
async fn live(disk: &Arc<Disk>, end: End) -> Result<(), String> {
    let service = Service::start(disk, &SETTING).await?;
    let pool = &service.pools[0];
    clients(disk, pool, 230, &[1, 2, 7]).await?;
    while !pool.levels().iter().any(|level| level.standby) {
        // A shard that served alone may have been replaced already, so that no other one is due.
        if pool.levels().iter().all(|level| level.left >= LOW_WATER) {
            clients(disk, pool, 10, &[1]).await?;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    match end {
        End::Stop => service.stop().await,
        End::Kill => {
            disk.power_off();
            Ok(())
        }
    }
}

/// Returns whether a number is imported.
fn is_imported(number: usize) -> bool {
    !number.is_multiple_of(3)
}

/// Imports two of three numbers of the range.
fn run_import(disk: &Disk) -> Result<Outcome, String> {
    let folder = Folder::open(&disk.path("shards"), Mode::Sharded, false, Duration::ZERO);
    let folder = folder.map_err(|error| error.to_string())?;
    let numbers = (0..RANGE).filter(|&number| is_imported(number));
    let values = numbers.map(|number| Value(number.try_into().unwrap())).collect();
    import(&folder, &SETTING.pools[0].config(SETTING.lease_rows), values)
        .map_err(|error| error.to_string())
}

/// Records a run of the product, and an import into its folder.
fn record(end: End, device: Device) -> Recording {
    crate::install();
    let disk = Arc::new(Disk::boot_on(&Image::empty(), device));
    process(live(&disk, end)).unwrap();
    let disk = match end {
        End::Stop => disk,
        End::Kill => Arc::new(disk.kill()),
    };
    let outcome = run_import(&disk).unwrap();
    assert!(outcome.in_shards > 100 && outcome.marked > outcome.in_shards, "{outcome:?}");
    disk.note(IMPORTED.to_owned());
    disk.recording()
}

/// Checks the folder after a failure: the import completes if it had not, and then all numbers come except those
/// that were imported, the ones that were handed out before, and a few that the failure burned.
fn goes_on(disk: &Disk, notes: &[&str], losses: usize) -> Result<(), String> {
    let (imported, notes): (Vec<&str>, Vec<&str>) =
        notes.iter().partition(|note| **note == IMPORTED);
    let before = HandedOut::of_notes(&notes);
    if imported.is_empty() {
        run_import(disk)?;
    }
    let mut after = before.clone();
    process(async {
        let service = Service::start(disk, &SETTING).await?;
        drain(&service.pools[0], &mut after).await?;
        service.stop().await
    })?;
    let has = |numbers: &HandedOut, number: usize| numbers.has("int", number.try_into().unwrap());
    let issued = (0..RANGE).filter(|&n| is_imported(n) && has(&after, n) && !has(&before, n));
    let issued: Vec<usize> = issued.collect();
    if !issued.is_empty() {
        return Err(format!("imported numbers were handed out: {issued:?}"));
    }
    let burned = (0..RANGE).filter(|&number| !is_imported(number) && !has(&after, number)).count();
    if burned > losses * usize::from(SHARDS) * (2 * SETTING.lease_rows + 7 * CLIENTS) {
        return Err(format!("{burned} numbers are burned"));
    }
    let aside = set_aside(disk);
    if !aside.is_empty() {
        return Err(format!("a failure must not count as damage: {aside:?}"));
    }
    check_files(disk, &SETTING).map(drop)
}

fn survives(test: &str, end: End, device: Device) {
    let verdict = |disk: &Disk, notes: &[&str]| goes_on(disk, notes, 2);
    survive(test, device, 300, || record(end, device), verdict);
}

#[test]
fn no_imported_number_comes_after_a_power_loss() {
    survives("no_imported_number_comes_after_a_power_loss", End::Stop, Device::PLAIN);
}

#[test]
fn no_imported_number_comes_after_a_power_loss_when_the_server_was_killed() {
    let test = "no_imported_number_comes_after_a_power_loss_when_the_server_was_killed";
    survives(test, End::Kill, Device::LINUX);
}

/// Each operation of an import fails once. The import is then run again, after a power loss or without one.
#[test]
fn an_import_in_which_any_operation_fails_can_be_run_again() {
    crate::install();
    let disk = Arc::new(Disk::boot_on(&Image::empty(), Device::LINUX));
    process(live(&disk, End::Stop)).unwrap();
    let recording = disk.recording();
    let notes = recording.notes(recording.len());
    disk.power_off();
    let image = disk.kill().after_cut(0);
    let faults =
        [Fault::Io, Fault::NoSpace, Fault::FailedSync, Fault::FailedFolderSync, Fault::ShortWrite];
    for fault in faults {
        let mut failed = 0;
        for nth in 0.. {
            let disk = Disk::boot_on(&image, Device::LINUX);
            disk.fail(Plan { seed: nth, ..Plan::once(fault, nth) });
            let outcome = run_import(&disk);
            if disk.fired() == 0 {
                outcome.unwrap();
                break;
            }
            disk.heal();
            failed += u32::from(outcome.is_err());
            // Every moment of a power loss after each failure would take minutes.
            let mut notes = notes.clone();
            if outcome.is_ok() {
                notes.push(IMPORTED);
            }
            let cut = Disk::boot_on(&disk.after_cut(nth), Device::LINUX);
            for next in [disk.kill(), cut] {
                if let Err(error) = goes_on(&next, &notes, 1) {
                    panic!("operation {nth} failed with {fault:?}: {error}");
                }
            }
        }
        println!("{fault:?}: {failed} imports failed");
        assert!(failed > 0, "{fault:?}");
    }
}
