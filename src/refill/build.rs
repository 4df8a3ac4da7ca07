//! Builds a shard's next generation. Numbers are drawn nowhere else.

use std::path::Path;

use crate::batch::{Batch, Progress};
use crate::files::{self, FileError};
use crate::fleet::store::FleetStoreError;
use crate::folder::{FolderError, PoolPaths, adopt};
use crate::ledger::{Ledger, LedgerError};
use crate::refill::Refill;
use crate::shard::{self, Label, ShardError};
use crate::sqlite::Fault;

/// The reason that a generation was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The values could not be drawn.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The file could not be written.
    #[error("the next generation can't be written: {0}")]
    Shard(#[from] ShardError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// No partitions to draw from could be claimed.
    #[error(transparent)]
    Store(#[from] FleetStoreError),
    /// An earlier build could not be examined.
    #[error(transparent)]
    Folder(#[from] FolderError),
}

impl BuildError {
    /// Returns whether the [`Progress`] stopped the build.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Ledger(LedgerError::Cancelled) | Self::Shard(ShardError::Cancelled))
    }

    /// Returns whether the ledger can still be used.
    pub fn spares_ledger(&self) -> bool {
        match self {
            Self::Ledger(error) | Self::Folder(FolderError::Ledger(error)) => {
                error.fault() == Fault::Passing
            }
            Self::Shard(_) | Self::File(_) | Self::Store(_) | Self::Folder(_) => true,
        }
    }
}

/// The result of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Built {
    /// The standby is ready, with this batch.
    Batch(Batch),
    /// An earlier build was complete, and is now the standby.
    Adopted,
    /// The range has no free values left.
    Exhausted,
}

/// Builds the next generation of a shard beside the live one, as its standby. `progress` counts each value twice:
/// when it is drawn and when it is written.
///
/// # Errors
/// Returns [`BuildError`]. No value of this build is served then, unless the build is complete and is adopted
/// later.
pub fn build(
    ledger: &mut Ledger,
    paths: &PoolPaths,
    refill: &Refill,
    progress: Progress<'_>,
) -> Result<Built, BuildError> {
    let built = build_or_adopt(ledger, paths, refill, progress);
    if built.as_ref().err().is_none_or(BuildError::spares_ledger)
        // This grows the ledger's file while the disk has space, and frees the log space of a failed draw.
        && let Err(error) = ledger.cut_log()
        && error.fault() != Fault::Passing
    {
        return Err(error.into());
    }
    built
}

fn build_or_adopt(
    ledger: &mut Ledger,
    paths: &PoolPaths,
    refill: &Refill,
    progress: Progress<'_>,
) -> Result<Built, BuildError> {
    if adopt(paths, ledger, refill.shard)? {
        return Ok(Built::Adopted);
    }
    let standby = paths.standby(refill.shard);
    if files::length_bytes(&standby)?.is_some() {
        // An earlier build got its name, but making it durable failed.
        files::sync_folder(paths.folder())?;
        return Ok(Built::Adopted);
    }
    let unfinished = paths.unfinished(refill.shard);
    let batch = match draw_and_write(ledger, paths, refill, &unfinished, progress) {
        Ok(Drawn::Committed(batch)) => batch,
        Ok(Drawn::Nothing) => return Ok(Built::Exhausted),
        Err(error) => {
            // Otherwise the ledger may have the batch, so the next build adopts or removes the file.
            if error.spares_ledger() {
                files::remove(&unfinished)?;
            }
            return Err(error);
        }
    };
    files::rename_durably(&unfinished, &standby)?;
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
    progress: Progress<'_>,
) -> Result<Drawn, BuildError> {
    let (ledger_id, space) = (ledger.id(), ledger.space().clone());
    let draw = ledger.draw(refill.shard, refill.live, refill.rows, progress)?;
    if draw.values().is_empty() {
        return Ok(Drawn::Nothing);
    }
    let label = Label::new(ledger_id, paths.pool(), space.decimals(), draw.batch());
    files::create(unfinished)?;
    shard::build(unfinished, &label, &space, draw.values(), progress)?;
    files::sync_file(unfinished)?;
    files::sync_folder(paths.folder())?;
    // Invariant: the file is complete and durable before the ledger knows its values, and its name is not
    // served until after that.
    Ok(Drawn::Committed(draw.commit()?))
}
