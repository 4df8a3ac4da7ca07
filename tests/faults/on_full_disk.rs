//! The product on a disk without a free byte: it continues as soon as the space for its next step is free.

use std::time::Instant;

use tombola::internals::TakeError;
use tombola::internals::files;

use crate::disk::{Disk, Fault, Plan};
use crate::product::{
    COME_BACK, HandedOut, PATIENCE, PoolSetting, Service, Setting, check_files, drain, process,
    set_aside, take,
};

const POOLS: &[PoolSetting] = &[PoolSetting { name: "int", range: 20_000, shard_size: 1_000 }];
const SETTING: Setting = Setting { lease_rows: 100, pools: POOLS };

/// How many numbers are taken before the disk is full.
const BEFORE: usize = 8_000;

/// How many refills have to fail for each amount of space that is too small.
const FAILURES: u64 = 3;

/// The tolerance for a few more pages, since each draw is different.
const SLACK_BYTES: usize = 48 * 4096;

/// Takes numbers until there are `wanted`, or the pool has none left.
async fn take_up_to(
    wanted: usize,
    service: &Service,
    handed_out: &mut HandedOut,
) -> Result<(), String> {
    let pool = &service.pools[0];
    let started = Instant::now();
    let is_full = |handed_out: &HandedOut| handed_out.count("int") >= wanted;
    while !is_full(handed_out) && (wanted < usize::MAX || !is_dry(service)) {
        match take(pool, 1).await {
            Ok(numbers) => handed_out.add("int", &numbers)?,
            Err(TakeError::Refilling) if started.elapsed() < PATIENCE => {
                tokio::time::sleep(COME_BACK).await;
            }
            Err(error) => return Err(format!("{error}: {:?}", pool.health())),
        }
    }
    Ok(())
}

/// Takes all numbers that are left while builds can't write their files. A build whose file was already
/// written may still complete and add more. The refiller runs one build at a time, so none is left once two
/// more were denied.
async fn use_up(disk: &Disk, service: &Service, handed_out: &mut HandedOut) -> Result<(), String> {
    loop {
        take_up_to(usize::MAX, service, handed_out).await?;
        let denied = disk.fired();
        while disk.fired() < denied + 2 {
            tokio::time::sleep(COME_BACK).await;
        }
        if is_dry(service) {
            return Ok(());
        }
    }
}

fn is_dry(service: &Service) -> bool {
    service.pools[0].levels().iter().all(|level| level.left == 0 && !level.standby)
}

/// Waits until `failures` refills found no space, or one succeeds. Returns whether one did.
async fn refill(disk: &Disk, service: &Service, failures: u64) -> Result<bool, String> {
    let started = Instant::now();
    while is_dry(service) {
        if disk.denied() >= failures {
            return Ok(false);
        }
        if started.elapsed() > PATIENCE {
            return Err(format!(
                "{} bytes used, {:?}",
                disk.used_bytes(),
                service.pools[0].health()
            ));
        }
        tokio::time::sleep(COME_BACK).await;
    }
    Ok(true)
}

/// Story: a draw failed for lack of space. Its frames stayed at the end of the log. The ledger was opened
/// again with a copy of the whole log, and the copy, truncated where the disk was full, stayed too. Each try
/// used up whatever space was freed.
#[test]
fn a_refill_succeeds_once_what_it_needs_is_free() {
    crate::install();
    process(async {
        let disk = Disk::new();
        let mut handed_out = HandedOut::default();
        let service = Service::start(&disk, &SETTING).await?;
        take_up_to(BEFORE, &service, &mut handed_out).await?;
        // A refill needs its file and the frames of its commit. A draw writes each page of the ledger once at
        // most.
        let frames = length(&disk, "used_numbers_int.db");
        let need = length(&disk, "int_shard_0.db") + frames;
        disk.fail(Plan::from_then_on(Fault::NoSpace, 0).only(".db.tmp"));
        use_up(&disk, &service, &mut handed_out).await?;
        // The last build that succeeds leaves an empty log, or none if the ledger was closed after it.
        let log = disk.path("shards/used_numbers_int.db-wal");
        while files::length_bytes(&log).unwrap().is_some_and(|bytes| bytes > 0) {
            tokio::time::sleep(COME_BACK).await;
        }
        let used = disk.used_bytes();
        for eighth in 0..8 {
            disk.set_capacity(used + need * eighth / 8);
            disk.heal();
            let refilled = refill(&disk, &service, FAILURES).await?;
            assert!(eighth > 0 || !refilled, "a refill succeeded without space");
            if refilled {
                break;
            }
        }
        disk.set_capacity(used + need + SLACK_BYTES);
        refill(&disk, &service, u64::MAX).await?;
        disk.set_capacity(usize::MAX);
        drain(&service.pools[0], &mut handed_out).await?;
        service.stop().await?;
        assert_eq!(handed_out.count("int"), POOLS[0].range, "a full disk must not burn numbers");
        assert!(set_aside(&disk).is_empty());
        let strays = disk.shared.list("shards").map_err(|error| error.to_string())?;
        assert!(!strays.iter().any(|name| name.ends_with(".tmp")), "{strays:?}");
        check_files(&disk, &SETTING).map(drop)
    })
    .unwrap();
}

fn length(disk: &Disk, name: &str) -> usize {
    let path = disk.path(&format!("shards/{name}"));
    let bytes = files::length_bytes(&path).unwrap().expect("the file exists");
    usize::try_from(bytes).expect("it fits in memory")
}
