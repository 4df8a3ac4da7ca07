//! Building a shard's next generation: the one way in which numbers come into being.

use std::path::Path;

use crate::batch::{Batch, Step};
use crate::files::{self, FileError};
use crate::fleet::store::StoreError;
use crate::folder::{FolderError, PoolPaths, adopt};
use crate::ledger::{Ledger, LedgerError};
use crate::refill::Refill;
use crate::shard::{self, Label, ShardError};

/// Why a generation was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The values could not be drawn.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The file could not be written.
    #[error("the next generation can't be written: {0}")]
    Shard(#[from] ShardError),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// No strata to draw in could be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An earlier build could not be made sense of.
    #[error(transparent)]
    Folder(#[from] FolderError),
}

impl BuildError {
    /// Whether the [`Step`] ended it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Ledger(LedgerError::Cancelled) | Self::Shard(ShardError::Cancelled))
    }
}

/// How a build ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Built {
    /// The standby lies ready: this batch.
    Batch(Batch),
    /// An earlier build was complete, and is the standby now.
    Adopted,
    /// The range has no free value left.
    Exhausted,
}

/// Builds the next generation of a shard beside the live one, as its standby. `step` is told of each
/// value twice: when it is drawn and when it is written.
///
/// # Errors
/// [`BuildError`]; then no value of this build is ever served, but it may be complete and be adopted
/// later.
pub fn build(
    ledger: &mut Ledger,
    paths: &PoolPaths,
    refill: &Refill,
    step: Step<'_>,
) -> Result<Built, BuildError> {
    if adopt(paths, ledger, refill.shard)? {
        return Ok(Built::Adopted);
    }
    let standby = paths.standby(refill.shard);
    if files::length_bytes(&standby)?.is_some() {
        // An earlier build got its name, and failed at making it durable.
        files::sync_folder(paths.folder())?;
        return Ok(Built::Adopted);
    }
    let unfinished = paths.unfinished(refill.shard);
    let batch = match draw_and_write(ledger, paths, refill, &unfinished, step) {
        // The ledger may or may not have it: that is found out before the next build.
        Ok(Drawn::Committed(batch)) => batch,
        Ok(Drawn::Nothing) => return Ok(Built::Exhausted),
        Err(error) => {
            if !matches!(error, BuildError::Ledger(LedgerError::Sqlite { .. })) {
                files::remove(&unfinished)?;
            }
            return Err(error);
        }
    };
    files::rename(&unfinished, &standby)?;
    files::sync_folder(paths.folder())?;
    Ok(Built::Batch(batch))
}

enum Drawn {
    Committed(Batch),
    Nothing,
}

fn draw_and_write(
    ledger: &mut Ledger,
    paths: &PoolPaths,
    refill: &Refill,
    unfinished: &Path,
    step: Step<'_>,
) -> Result<Drawn, BuildError> {
    let (ledger_id, decimals) = (ledger.id(), ledger.space().decimals());
    let draw = ledger.draw(refill.shard, refill.live, refill.rows, step)?;
    if draw.values().is_empty() {
        return Ok(Drawn::Nothing);
    }
    let label = Label::new(ledger_id, paths.pool(), decimals, draw.batch());
    files::create(unfinished)?;
    shard::build(unfinished, &label, draw.values(), step)?;
    files::sync_file(unfinished)?;
    files::sync_folder(paths.folder())?;
    // Invariant: the file is complete and durable before the ledger knows its values, and bears a
    // name that is served only after it.
    Ok(Drawn::Committed(draw.commit()?))
}
