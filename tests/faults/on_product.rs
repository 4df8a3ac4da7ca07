//! Power loss under the product: at any moment of its life, however often.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cuts::{cut_somewhere, survive};
use crate::disk::{Device, Disk};
use crate::product::{
    CLIENTS, HandedOut, PoolSetting, SHARDS, Service, Setting, check_files, clients, drain,
    process, set_aside,
};
use crate::recording::Recording;

/// One pool whose shards have several blocks, and one whose shards last for a few leases.
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

/// What clients ask for in turn.
const COUNTS: &[u32] = &[1, 1, 4, 1, 1, 1, 10, 1];
const COUNT_MAX: usize = 10;

/// Numbers that one power loss may burn of a pool: of each shard two leases, and what was on the way
/// to clients.
fn burned_at_most(setting: &Setting) -> usize {
    usize::from(SHARDS) * (2 * setting.lease_rows + CLIENTS * COUNT_MAX)
}

/// How a life of the product ends.
#[derive(Clone, Copy)]
enum End {
    Stop,
    Kill,
}

/// One life of the product, which hands out this share of each range.
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
            // Whatever its tasks and connections do when they are dropped, they do in vain.
            disk.power_off();
            Ok(())
        }
    }
}

/// From the first filling to the last swaps: a life that ends in good order, one that is killed, and
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

/// After the power is back: no number comes again, every other one comes, but for the few that a loss
/// may burn, and all files are whole.
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
        return Err(format!("a power loss is no damage: {aside:?}"));
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

/// A machine that fails again and again, also while the product recovers.
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
