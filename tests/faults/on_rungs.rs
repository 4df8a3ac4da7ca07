//! The store of the mode `sqlite` under failed syncs and power loss.

use tombola::internals::files;
use tombola::internals::on_demand::{Candidate, OpenError, PoolIndex, Store, TableStore};
use tombola::internals::{LeaseConfig, PoolConfig, PoolName, Recorded};
use tombola::internals::{Space, Value};

use crate::cuts::survive;
use crate::disk::{Device, Disk, Fault, Plan};
use crate::product::REFILL;

/// How many power losses are tried after each fault.
const CUTS: u64 = 8;

fn open(disk: &Disk) -> Result<TableStore, OpenError> {
    let pool = PoolConfig {
        name: PoolName::new("int").unwrap(),
        space: Space::new("0", "99", 0).unwrap(),
        shards: 1,
        shard_size: 1,
        lease: LeaseConfig { rows: 0 },
        refill: REFILL,
        receipts: Recorded::Keyed,
        used_file: None,
    };
    files::create_folder(&disk.path("shards"))?;
    TableStore::open(&disk.path("shards"), &[pool])
}

fn insert(store: &mut TableStore, numbers: [i64; 3]) -> usize {
    let candidates = numbers.map(|number| Candidate { pool: PoolIndex(0), value: Value(number) });
    store.insert(&candidates).map_or(0, |fresh| fresh.iter().filter(|fresh| **fresh).count())
}

/// Story: SQLite ignored that it could not sync the folder of its new log. The log was durable but its name
/// was not, and the numbers in it were handed out again after a power loss.
#[test]
fn a_log_whose_name_was_not_synced_repeats_nothing() {
    crate::install();
    for nth in 0.. {
        let disk = Disk::new();
        disk.fail(Plan::once(Fault::FailedFolderSync, nth));
        // A start that fails is tried again.
        let mut store = open(&disk).or_else(|_| open(&disk)).unwrap();
        assert_eq!(insert(&mut store, [1, 2, 3]), 3);
        for seed in 0..CUTS {
            let mut again = open(&Disk::boot(&disk.after_cut(seed))).unwrap();
            assert_eq!(insert(&mut again, [1, 2, 3]), 0, "folder sync {nth}, cut {seed}");
        }
        if disk.fired() == 0 {
            assert!(nth > 3, "no folder was synced");
            return;
        }
    }
}

/// Story: the first opening of a new file was interrupted by a power loss. The journal that it left was rolled
/// back only by a connection that may write, and the first connection of a start may not, so each start was
/// refused.
#[test]
fn a_power_loss_during_the_first_opening_does_not_prevent_the_next() {
    crate::install();
    let test = "a_power_loss_during_the_first_opening_does_not_prevent_the_next";
    let record = || {
        let disk = Disk::new();
        open(&disk).unwrap();
        disk.recording()
    };
    let opens = |disk: &Disk, _: &[&str]| open(disk).map(drop).map_err(|error| error.to_string());
    survive(test, Device::PLAIN, 200, record, opens);
}
