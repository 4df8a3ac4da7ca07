//! Simulates the shards' files for the model: the same operations on a disk in memory, each in two steps, so
//! that anything can happen between its effect and its result.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use shuttle::future::yield_now;
use shuttle::rand::{Rng, thread_rng};

use crate::batch::{Generation, ShardIndex};
use crate::folder::PoolPaths;
use crate::pool::file::{ShardFile, WorkError};
use crate::shard::Row;
use crate::sqlite::rusqlite::{Error, ffi};
use crate::sqlite::{DatabaseError, Fault, Fresh, LOG_PAGES_MAX};

/// One generation of a shard.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) generation: Generation,
    /// The ids of its rows, which no other generation has.
    pub(super) rows: Range<u32>,
    pub(super) unused: Vec<Row>,
    pub(super) imported: BTreeSet<Row>,
    pub(super) in_use: bool,
}

/// The simulated disk. Shuttle creates a new one for each schedule.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) live: BTreeMap<ShardIndex, Content>,
    pub(super) standby: BTreeMap<ShardIndex, Content>,
    /// One of this many operations fails. 0 means none.
    pub(super) fault_in: u32,
}

/// Returns the disk. No schedule switches tasks while it is locked.
pub(super) fn disk() -> MutexGuard<'static, Disk> {
    shuttle::lazy_static! {
        static ref DISK: Mutex<Disk> = Mutex::default();
    }
    DISK.lock().expect("a panic ends the schedule")
}

/// Lets other tasks run, and fails in one of these ways if the schedule says so.
async fn step(faults: &[Fault]) -> Result<(), WorkError> {
    yield_now().await;
    let fault_in = disk().fault_in;
    if fault_in > 0 && thread_rng().gen_range(0..fault_in) == 0 {
        return Err(error(faults[thread_rng().gen_range(0..faults.len())]));
    }
    Ok(())
}

/// Returns an error that means this fault.
fn error(fault: Fault) -> WorkError {
    let code = match fault {
        Fault::Passing => ffi::SQLITE_BUSY,
        Fault::Io => ffi::SQLITE_IOERR,
        Fault::Content => ffi::SQLITE_CORRUPT,
    };
    let error = Error::SqliteFailure(ffi::Error::new(code), None);
    WorkError::Database(DatabaseError::Sqlite(error))
}

/// Faults that are possible before anything was changed, and after.
const BEFORE: &[Fault] = &[Fault::Passing, Fault::Io, Fault::Content];
const AFTER: &[Fault] = &[Fault::Io, Fault::Content];

/// A file on the simulated disk.
pub(super) struct SimulatedFile {
    index: ShardIndex,
    generation: Generation,
    log_pages: usize,
}

impl ShardFile for SimulatedFile {
    async fn open(_: &PoolPaths, index: ShardIndex, _: Option<Fresh>) -> Result<Self, WorkError> {
        step(BEFORE).await?;
        let Some(generation) = disk().live.get_mut(&index).map(|content| {
            content.in_use = true;
            content.generation
        }) else {
            return Err(error(Fault::Content));
        };
        // A repeated swap may find the file already marked as in use.
        step(AFTER).await?;
        Ok(Self { index, generation, log_pages: 0 })
    }

    async fn install_standby(_: &PoolPaths, index: ShardIndex) -> Result<(), WorkError> {
        step(BEFORE).await?;
        {
            let mut disk = disk();
            // An earlier attempt may have completed this step.
            if let Some(next) = disk.standby.remove(&index) {
                disk.live.insert(index, next);
            }
        }
        step(BEFORE).await
    }

    async fn read_through(_: &PoolPaths, _: ShardIndex) -> Result<(), WorkError> {
        step(&[Fault::Io]).await
    }

    async fn set_aside(_: &PoolPaths, index: ShardIndex) -> Result<PathBuf, WorkError> {
        step(BEFORE).await?;
        disk().live.remove(&index);
        Ok(PathBuf::from("aside"))
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    /// Does nothing: the model has no fleet.
    fn count_leases(&mut self) {}

    /// See [`count_leases`](Self::count_leases).
    fn leases(&self) -> u64 {
        0
    }

    fn left(&self) -> u64 {
        self.content(|content| content.unused.len() as u64)
    }

    fn log_pages(&self) -> usize {
        self.log_pages
    }

    async fn lease(&mut self, rows: usize, _leased: Option<usize>) -> Result<Vec<Row>, WorkError> {
        step(BEFORE).await?;
        let leased = self.content(|content| {
            let kept = content.unused.len().saturating_sub(rows);
            content.unused.split_off(kept)
        });
        self.log_pages += thread_rng().gen_range(0..=4 * LOG_PAGES_MAX);
        step(AFTER).await?;
        Ok(leased)
    }

    async fn import(
        &mut self,
        rows: Vec<Row>,
        leased: BTreeSet<Row>,
    ) -> Result<Vec<Row>, WorkError> {
        step(BEFORE).await?;
        let marked = self.content(|content| {
            let is_unused = |row: &Row| content.unused.contains(row);
            let marks = |row: &&Row| {
                is_unused(row) || leased.contains(row) || content.imported.contains(row)
            };
            let marked: Vec<Row> = rows.iter().filter(marks).copied().collect();
            content.unused.retain(|row| !marked.contains(row));
            content.imported.extend(&marked);
            marked
        });
        step(AFTER).await?;
        Ok(marked)
    }

    async fn checkpoint(&mut self) -> Result<(), WorkError> {
        step(BEFORE).await?;
        self.log_pages = 0;
        step(AFTER).await
    }

    async fn give_back(self, mut rows: Vec<Row>) -> Result<(), WorkError> {
        step(BEFORE).await?;
        self.content(|content| {
            let own = |row: &Row| content.rows.contains(&row.id_for_test());
            assert!(rows.iter().all(own), "a row outlived its generation: {rows:?}");
            content.unused.append(&mut rows);
            content.in_use = false;
        });
        step(BEFORE).await
    }

    async fn close(self) -> Result<(), WorkError> {
        step(BEFORE).await
    }
}

impl SimulatedFile {
    fn content<R>(&self, work: impl FnOnce(&mut Content) -> R) -> R {
        let mut disk = disk();
        let content = disk.live.get_mut(&self.index).expect("no open file is renamed");
        assert_eq!(content.generation, self.generation, "no open file is replaced");
        work(content)
    }
}
