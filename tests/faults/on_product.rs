//! The product on the simulated disk: a first look, for the crash tests proper to build on. The real
//! ledger, shards, leases, refills and swaps run, without HTTP.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tombola::config::{LeaseConfig, PoolConfig, PoolName, RefillConfig};
use tombola::folder::{Folder, PoolFiles};
use tombola::ledger::{Ledger, LedgerError};
use tombola::pool::{Pool, TakeError};
use tombola::refill::Refiller;
use tombola::space::{Space, Value};

use crate::cuts::survive;
use crate::disk::{Device, Disk};
use crate::recording::Recording;

const SHARD_SIZE: u32 = 300;

fn pool_config() -> PoolConfig {
    PoolConfig {
        name: PoolName::new("int").unwrap(),
        // Small enough for a repeat to show, large enough for no test to use it up.
        space: Space::new("0", "9999", 0).unwrap(),
        shards: 2,
        shard_size: SHARD_SIZE,
    }
}

/// Starts a pool, takes numbers one by one, tells `taken` of each, and stops in good order.
async fn serve(disk: &Disk, count: usize, mut taken: impl FnMut(i64)) -> Result<(), String> {
    let folder = Folder::open(&disk.path("shards")).map_err(|error| error.to_string())?;
    let config = pool_config();
    let files = folder.open_pool(&config).map_err(|error| error.to_string())?;
    let PoolFiles { paths, ledger, shards } = files;
    let refill = RefillConfig {
        low_water: 0.5,
        retry: Duration::from_millis(1),
        retry_limit: Duration::from_millis(10),
    };
    let (pool, workers) =
        Pool::open(&config, LeaseConfig { rows: 16 }, refill, &paths, &shards).await;
    let (stop, stopped) = watch::channel(false);
    let refiller = Refiller::new(ledger, paths, Arc::clone(&pool), refill, SHARD_SIZE, stopped);
    let refiller = tokio::spawn(refiller.run());

    let mut left = count;
    let mut tries = 0;
    while left > 0 && tries < 1_000 {
        match pool.take(NonZeroU32::MIN).await {
            Ok(number) => {
                number.parts.iter().flat_map(|(_, values)| values).for_each(|value| taken(value.0));
                left -= 1;
            }
            Err(TakeError::Refilling) => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    stop.send_replace(true);
    refiller.await.map_err(|error| error.to_string())?;
    pool.stop();
    for worker in workers {
        worker.await.map_err(|error| error.to_string())?;
    }
    drop(folder);
    if left == 0 { Ok(()) } else { Err(format!("{left} of {count} numbers never came")) }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// Two lives of a pool with several generations, the numbers noted as they are handed out.
fn record() -> Recording {
    crate::install();
    let disk = Disk::new();
    for _ in 0..2 {
        run(serve(&disk, 1_000, |number| disk.note(number.to_string()))).unwrap();
    }
    disk.recording()
}

/// What was handed out before the cut does not come again after it, and numbers come.
fn never_twice(disk: &Disk, handed_out: &[&str]) -> Result<(), String> {
    let mut seen: BTreeSet<i64> = handed_out.iter().map(|number| number.parse().unwrap()).collect();
    in_the_ledger(disk, &seen)?;
    let mut again = Vec::new();
    let count = 3 * SHARD_SIZE as usize;
    run(serve(disk, count, |number| again.extend((!seen.insert(number)).then_some(number))))?;
    match again.is_empty() {
        true => Ok(()),
        false => Err(format!("after {} numbers again: {again:?}", handed_out.len())),
    }
}

/// Says at once what draws would show sooner or later.
fn in_the_ledger(disk: &Disk, numbers: &BTreeSet<i64>) -> Result<(), String> {
    if numbers.is_empty() {
        return Ok(());
    }
    let say = |error: LedgerError| error.to_string();
    let path = disk.path("shards/used_numbers_int.db");
    let ledger = Ledger::open(&path, &pool_config().space).map_err(say)?;
    for &number in numbers {
        if !ledger.contains(Value(number)).map_err(say)? {
            return Err(format!("the ledger has forgotten {number}"));
        }
    }
    ledger.close().map_err(say)
}

#[test]
fn no_number_comes_again_after_a_power_loss() {
    survive("no_number_comes_again_after_a_power_loss", Device::PLAIN, 300, record, never_twice);
}
