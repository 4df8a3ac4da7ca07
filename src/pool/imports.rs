//! Imports into a running pool: the requests that wait for the refiller, and the steps that take numbers from shards
//! and requests. Knows nothing of the ledger.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::buffer::Buffer;
pub(crate) use super::buffer::SwapInProgress;
use super::slot::Slot;
use super::{Collected, Pool};
use crate::batch::{Generation, ShardIndex};
use crate::import::{ImportError, Outcome};
use crate::shard::Row;
use crate::space::Value;

/// Imports that may wait at the same time. Each holds its values in memory.
const WAITING_MAX: usize = 4;

/// An import that waits for the refiller.
#[derive(Debug)]
pub(crate) struct ImportRequest {
    /// The values, which are in the range.
    pub(crate) values: Vec<Value>,
    pub(crate) reply: oneshot::Sender<Result<Outcome, ImportError>>,
}

/// The imports that wait for the refiller.
#[derive(Debug, Default)]
pub(super) struct Imports {
    waiting: VecDeque<ImportRequest>,
    /// The refiller has ended.
    closed: bool,
}

/// The right to change a shard's standby. Until this is dropped, the live file is not replaced.
#[derive(Debug)]
pub(crate) struct HeldStandby {
    slot: Arc<Slot>,
    /// The number of rows that can be leased, if there is a standby.
    unused: Option<u64>,
}

impl HeldStandby {
    /// Notes that rows of the standby can't be leased any more.
    pub(crate) fn marked(&mut self, rows: u64) {
        self.unused = self.unused.map(|unused| unused.saturating_sub(rows));
    }
}

impl Drop for HeldStandby {
    fn drop(&mut self) {
        let unused = self.unused;
        self.slot.signal(|buffer| buffer.release_standby(unused));
    }
}

impl Pool {
    /// Imports values, which must be in the range.
    ///
    /// # Errors
    /// Returns [`ImportError`]. A part of the values may be marked then.
    pub(crate) async fn import(&self, values: Vec<Value>) -> Result<Outcome, ImportError> {
        let (reply, outcome) = oneshot::channel();
        {
            let mut imports = self.imports.lock().expect("no holder of it panics");
            if imports.closed {
                return Err(ImportError::Stopped);
            }
            if imports.waiting.len() >= WAITING_MAX {
                return Err(ImportError::Busy);
            }
            imports.waiting.push_back(ImportRequest { values, reply });
        }
        self.refill_wanted.notify_one();
        outcome.await.unwrap_or(Err(ImportError::Stopped))
    }

    /// Returns the next import for the refiller.
    pub(crate) fn next_import(&self) -> Option<ImportRequest> {
        self.imports.lock().expect("no holder of it panics").waiting.pop_front()
    }

    /// Ends all imports that wait, because the refiller ends.
    pub(crate) fn close_imports(&self) {
        let mut imports = self.imports.lock().expect("no holder of it panics");
        imports.closed = true;
        imports.waiting.clear();
    }

    /// Prevents that values which requests hold, and that their shards gave up, are handed out to another request.
    pub(crate) fn withdraw(&self, values: impl Iterator<Item = Value>) {
        let mut collected = self.collected();
        collected.withdrawn.extend(values);
        let Collected { orphans, withdrawn, .. } = &mut *collected;
        orphans.retain(|(_, value)| !withdrawn.contains(value));
        self.note_orphans(&collected);
    }

    /// Forgets withdrawn values that no request can hold, since they are marked in their files.
    pub(crate) fn forget_withdrawn(&self, values: impl Iterator<Item = Value>) {
        let mut collected = self.collected();
        for value in values {
            collected.withdrawn.remove(&value);
        }
    }

    /// Takes the standby of a shard, unless it is about to replace the live file. Returns `None` if the pool does not
    /// have the shard.
    pub(crate) fn hold_standby(
        &self,
        shard: ShardIndex,
    ) -> Result<Option<HeldStandby>, SwapInProgress> {
        let Some(slot) = self.slots.iter().find(|slot| slot.index == shard) else {
            return Ok(None);
        };
        let unused = slot.update(Buffer::hold_standby)?;
        Ok(Some(HeldStandby { slot: Arc::clone(slot), unused }))
    }

    /// Marks rows of a shard's live generation as imported, and returns the values that are marked. All others were
    /// issued, or are lost.
    ///
    /// # Errors
    /// Returns [`ImportError::Away`] if the worker does not mark them.
    pub(crate) async fn import_rows(
        &self,
        shard: ShardIndex,
        generation: Generation,
        mut rows: Vec<Row>,
    ) -> Result<Vec<Value>, ImportError> {
        let Some(slot) = self.slots.iter().find(|slot| slot.index == shard) else {
            return Ok(Vec::new());
        };
        rows.sort_unstable();
        let mut marked = None;
        slot.signal(|buffer| {
            if buffer.generation() == Some(generation) {
                marked = Some(buffer.begin_import(rows));
            }
        });
        let Some(marked) = marked else {
            // The file was set aside.
            return Ok(Vec::new());
        };
        marked.await.map_err(|_| ImportError::Away { shard: slot.name.to_string() })
    }
}
