//! Stands in for the files of the shards under the model: the same operations on a disk in memory,
//! each in two steps, so that anything can happen between its effect and its answer.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use shuttle::future::yield_now;
use shuttle::rand::{Rng, thread_rng};

use crate::batch::{Generation, ShardIndex};
use crate::folder::PoolPaths;
use crate::shard::Row;
use crate::sqlite::LOG_PAGES_MAX;

/// A failure that the schedule chose.
#[derive(Debug, thiserror::Error)]
#[error("a fault")]
pub(in crate::pool) struct WorkError {
    transient: bool,
}

impl WorkError {
    pub(in crate::pool) fn is_transient(&self) -> bool {
        self.transient
    }
}

/// One generation of a shard.
#[derive(Debug)]
pub(in crate::pool) struct Content {
    pub(in crate::pool) generation: Generation,
    /// The ids of its rows, which no other generation has.
    pub(in crate::pool) rows: Range<u32>,
    pub(in crate::pool) unused: Vec<Row>,
}

/// What lies on the disk: shuttle makes a new one for each schedule.
#[derive(Debug, Default)]
pub(in crate::pool) struct Disk {
    pub(in crate::pool) live: BTreeMap<ShardIndex, Content>,
    pub(in crate::pool) standby: BTreeMap<ShardIndex, Content>,
    /// One operation in so many fails; 0 for none.
    pub(in crate::pool) fault_in: u32,
}

/// No schedule switches tasks while it is held.
pub(in crate::pool) fn disk() -> MutexGuard<'static, Disk> {
    shuttle::lazy_static! {
        static ref DISK: Mutex<Disk> = Mutex::default();
    }
    DISK.lock().expect("a panic ends the schedule")
}

/// Lets the others go on, and fails if the schedule says so.
async fn step(may_be_transient: bool) -> Result<(), WorkError> {
    yield_now().await;
    let fault_in = disk().fault_in;
    if fault_in > 0 && thread_rng().gen_range(0..fault_in) == 0 {
        return Err(WorkError { transient: may_be_transient && thread_rng().r#gen() });
    }
    Ok(())
}

pub(in crate::pool) struct OpenFile {
    index: ShardIndex,
    generation: Generation,
    log_pages: usize,
}

impl OpenFile {
    pub(in crate::pool) async fn open(_: &PoolPaths, index: ShardIndex) -> Result<Self, WorkError> {
        step(true).await?;
        let Some(generation) = disk().live.get(&index).map(|content| content.generation) else {
            return Err(WorkError { transient: false });
        };
        Ok(Self { index, generation, log_pages: 0 })
    }

    pub(in crate::pool) fn generation(&self) -> Generation {
        self.generation
    }

    /// Of the fleet, which this model is not of.
    pub(in crate::pool) fn count_leases(&mut self) {}

    /// See [`count_leases`](Self::count_leases).
    pub(in crate::pool) fn leases(&self) -> u64 {
        0
    }

    pub(in crate::pool) fn left(&self) -> u64 {
        self.content(|content| content.unused.len() as u64)
    }

    pub(in crate::pool) fn log_pages(&self) -> usize {
        self.log_pages
    }

    pub(in crate::pool) async fn lease(
        &mut self,
        rows: usize,
        _unserved: Option<usize>,
    ) -> Result<Vec<Row>, WorkError> {
        step(true).await?;
        let leased = self.content(|content| {
            let kept = content.unused.len().saturating_sub(rows);
            content.unused.split_off(kept)
        });
        self.log_pages += thread_rng().gen_range(0..=4 * LOG_PAGES_MAX);
        step(false).await?;
        Ok(leased)
    }

    pub(in crate::pool) async fn checkpoint(&mut self) -> Result<(), WorkError> {
        step(true).await?;
        self.log_pages = 0;
        step(false).await
    }

    pub(in crate::pool) async fn give_back(self, mut rows: Vec<Row>) -> Result<(), WorkError> {
        step(true).await?;
        self.content(|content| {
            let own = |row: &Row| content.rows.contains(&row.id_for_test());
            assert!(rows.iter().all(own), "a row outlived its generation: {rows:?}");
            content.unused.append(&mut rows);
        });
        step(true).await
    }

    pub(in crate::pool) async fn close(self) -> Result<(), WorkError> {
        step(true).await
    }

    fn content<R>(&self, work: impl FnOnce(&mut Content) -> R) -> R {
        let mut disk = disk();
        let content = disk.live.get_mut(&self.index).expect("no open file is renamed");
        assert_eq!(content.generation, self.generation, "no open file is replaced");
        work(content)
    }
}

pub(in crate::pool) async fn install_standby(
    _: &PoolPaths,
    index: ShardIndex,
) -> Result<(), WorkError> {
    step(true).await?;
    {
        let mut disk = disk();
        // An earlier try may have got that far.
        if let Some(next) = disk.standby.remove(&index) {
            disk.live.insert(index, next);
        }
    }
    step(true).await
}

pub(in crate::pool) async fn set_aside(
    _: &PoolPaths,
    index: ShardIndex,
) -> Result<&'static std::path::Path, WorkError> {
    step(true).await?;
    disk().live.remove(&index);
    Ok(std::path::Path::new("aside"))
}
