//! Power loss under the product, at any moment and any number of times.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use tombola::internals::Ledger;
use tombola::internals::ShardIndex;
use tombola::internals::Space;

use crate::cuts::{cut_somewhere, survive};
use crate::disk::{Device, Disk};
use crate::medium::{Image, Op};
use crate::product::{
    CLIENTS, HandedOut, PoolSetting, SHARDS, Service, Setting, check_files, clients, drain,
    process, set_aside,
};
use crate::recording::Recording;

/// A pool whose shards have several blocks, and a pool whose shards last for a few leases.
const POOLS: &[PoolSetting] = &[
    PoolSetting { name: "large", range: 1_500, shard_size: 300 },
    PoolSetting { name: "small", range: 500, shard_size: 60 },
];
const LEASED: Setting = Setting { lease_rows: 8, pools: POOLS };
/// Here a generation lasts until its log is long enough for a checkpoint.
const STRICT: Setting = Setting {
    lease_rows: 0,
    pools: &[
        PoolSetting { name: "large", range: 1_500, shard_size: 600 },
        PoolSetting { name: "small", range: 400, shard_size: 60 },
    ],
};

/// The counts that clients ask for in turn.
const COUNTS: &[u32] = &[1, 1, 4, 1, 1, 1, 10, 1];
const COUNT_MAX: usize = 10;

/// Returns how many numbers of a pool one power loss may burn: two leases of each shard, and what was on the
/// way to clients.
fn burned_at_most(setting: &Setting) -> usize {
    usize::from(SHARDS) * (2 * setting.lease_rows + CLIENTS * COUNT_MAX)
}

/// How a run of the product ends.
#[derive(Clone, Copy)]
enum End {
    Stop,
    Kill,
}

/// Runs the product once, until this share of each range is handed out.
async fn live(disk: &Arc<Disk>, setting: &Setting, percent: usize, end: End) -> Result<(), String> {
    let service = Service::start(disk, setting).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for (pool, of) in service.pools.iter().zip(setting.pools) {
        let (disk, pool) = (Arc::clone(disk), Arc::clone(pool));
        let wanted = of.range * percent / 100;
        tasks.spawn(async move { clients(&disk, &pool, wanted, COUNTS).await });
    }
    tasks.join_all().await.into_iter().collect::<Result<(), _>>()?;
    match end {
        End::Stop => service.stop().await,
        End::Kill => {
            // Operations of tasks and connections that are dropped later have no effect.
            disk.power_off();
            Ok(())
        }
    }
}

/// Records three runs, from the first filling to the last swaps: one that is stopped, one that is killed, and
/// one more.
fn record(setting: &Setting) -> Recording {
    crate::install();
    let disk = Arc::new(Disk::new());
    process(live(&disk, setting, 40, End::Stop)).unwrap();
    process(live(&disk, setting, 25, End::Kill)).unwrap();
    let disk = Arc::new(disk.kill());
    process(live(&disk, setting, 25, End::Stop)).unwrap();
    disk.recording()
}

/// Checks the product after the power is back: no number is repeated, all others are handed out except the
/// few that a loss may burn, and all files are intact.
fn goes_on(setting: &Setting, losses: usize, disk: &Disk, notes: &[&str]) -> Result<(), String> {
    let mut handed_out = HandedOut::of_notes(notes);
    process(async {
        let service = Service::start(disk, setting).await?;
        for pool in &service.pools {
            drain(pool, &mut handed_out).await?;
        }
        service.stop().await
    })?;
    let aside = set_aside(disk);
    if !aside.is_empty() {
        return Err(format!("a power loss must not count as damage: {aside:?}"));
    }
    let noted: BTreeMap<String, u64> = check_files(disk, setting)?;
    for pool in setting.pools {
        let burned = pool.range - handed_out.count(pool.name);
        let on_the_way = losses * usize::from(SHARDS) * CLIENTS * COUNT_MAX;
        let noted = usize::try_from(noted[pool.name]).expect("few");
        if burned > losses * burned_at_most(setting) {
            return Err(format!("{burned} numbers of {} are burned", pool.name));
        }
        if burned > noted + on_the_way {
            let name = pool.name;
            return Err(format!("{burned} numbers of {name} are burned, the ledger says {noted}"));
        }
    }
    Ok(())
}

fn survives(test: &str, setting: Setting) {
    let verdict = |disk: &Disk, notes: &[&str]| goes_on(&setting, 2, disk, notes);
    survive(test, Device::PLAIN, 1_000, || record(&setting), verdict);
}

#[test]
fn no_number_comes_again_after_a_power_loss() {
    survives("no_number_comes_again_after_a_power_loss", LEASED);
}

#[test]
fn no_number_comes_again_after_a_power_loss_when_strict() {
    survives("no_number_comes_again_after_a_power_loss_when_strict", STRICT);
}

/// Story: a kernel may write the index of a log to the disk only every half minute. A server was stopped,
/// which empties its logs and removes their indexes, and then the power was lost. The disk had an empty log,
/// and an index that listed many frames. The next start took them for lost, and advised to restore a backup
/// of a ledger that was intact.
#[test]
fn an_index_that_is_older_than_its_log_is_no_damage() {
    let test = "an_index_that_is_older_than_its_log_is_no_damage";
    const SMALL: Setting = Setting {
        lease_rows: 8,
        pools: &[PoolSetting { name: "small", range: 200, shard_size: 60 }],
    };
    let record = || {
        crate::install();
        let disk = Arc::new(Disk::boot_on(&Image::empty(), Device::LINUX));
        process(live(&disk, &SMALL, 40, End::Stop)).unwrap();
        disk.recording()
    };
    let verdict = |disk: &Disk, notes: &[&str]| goes_on(&SMALL, 1, disk, notes);
    survive(test, Device::LINUX, 200, record, verdict);
}

/// The same without a stop: a build ends with a checkpoint of the log and its truncation.
#[test]
fn a_power_loss_after_a_build_cut_off_the_log_is_no_damage() {
    crate::install();
    let space = Space::new("0", "9999999", 0).unwrap();
    let disk = Disk::boot_on(&Image::empty(), Device::LINUX);
    let mut ledger = Ledger::create(&disk.path("ledger.db"), &space).unwrap();
    let cut_off = |op: &Op| matches!(op, Op::SetLength { length: 0, .. });
    for _ in 0..4 {
        let step = &mut |_| ControlFlow::Continue(());
        ledger.draw(ShardIndex(0), None, 20_000, step).unwrap().commit().unwrap();
        ledger.cut_log().unwrap();
    }
    let point = disk.recording().moments(cut_off).into_iter().max();
    let recording = disk.recording();
    for seed in 0..100 {
        let moment = (point.expect("found") + seed % 4).min(recording.len());
        let image = recording.cut(moment, seed as u64, Device::LINUX);
        let disk = Disk::boot_on(&image, Device::LINUX);
        let ledger = Ledger::open(&disk.path("ledger.db"), &space);
        assert_eq!(ledger.unwrap().count() % 20_000, 0, "seed {seed}");
    }
}

/// A machine that fails repeatedly, even while the product recovers.
#[test]
fn no_number_comes_again_in_a_chain_of_power_losses() {
    crate::install();
    const LOSSES: usize = 12;
    for (chain, setting) in [LEASED, STRICT, LEASED].iter().enumerate() {
        let mut disk = Arc::new(Disk::new());
        let mut notes: Vec<String> = Vec::new();
        for loss in 0..LOSSES {
            process(live(&disk, setting, 5, End::Kill)).unwrap();
            let (after, noted) = cut_somewhere(&disk, (chain * LOSSES + loss) as u64);
            notes.extend(noted);
            disk = Arc::new(after);
        }
        let notes: Vec<&str> = notes.iter().map(String::as_str).collect();
        goes_on(setting, LOSSES, &disk, &notes).unwrap();
    }
}
