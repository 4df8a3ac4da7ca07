//! Numbers that were issued by other means: marks them, so that none of them is ever handed out. Knows nothing of
//! requests.
//!
//! # The order
//! 1. All [lines] are read. If one of them is wrong, nothing is changed.
//! 2. One transaction of the ledger adds the values that it does not have. No draw chooses them from then on.
//! 3. All other values were drawn for a shard. Those that are unused in the file of a shard are marked there,
//!    durably. An insert into the ledger would not stop them.
//! 4. One transaction of the ledger records the values that were marked, and that the import is complete.
//!
//! A crash in between leaves an import of which a part is marked, and which the ledger and `tombola verify` call
//! interrupted. Running it again marks the rest.

mod lines;
mod report;
mod strict;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tracing::info;

pub(crate) use self::lines::{Column, Layout, LinesError, WrongLines, read, read_texts};
pub(crate) use self::report::Report;
use crate::batch::BatchId;
use crate::config::PoolConfig;
use crate::folder::{Folder, FolderError, PoolFiles};
use crate::ledger::{Entered, Ledger, LedgerError};
use crate::shard::{self, ShardError, Sought};
use crate::space::Value;

/// The reason that an import is not complete.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The ledger can't be changed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Rows of a shard could not be marked.
    #[error(
        "numbers in the shard {shard} could not be marked: {source}. Run the import again when the cause is gone; \
         tombola verify tells whether the shard is damaged"
    )]
    Shard { shard: PathBuf, source: ShardError },
    /// The worker of a shard could not mark its rows.
    #[error(
        "the shard {shard} can't be changed at the moment. Run the import again when the cause is gone"
    )]
    Away { shard: String },
    /// Too many imports wait.
    #[error("other imports are under way. Run the import again when they are complete")]
    Busy,
    /// The server stopped.
    #[error("the server stopped before the import was complete. Run it again")]
    Stopped,
}

/// The outcome of an import. Without `in_shards`, the counts add up to the numbers that were given.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The number of those that could have been issued, and now can't.
    pub marked: u64,
    /// The number of those among `marked` that were in shards.
    pub in_shards: u64,
    /// The number of those that were given more than once, without the first time of each.
    pub repeated: u64,
    /// The number of those that an earlier import has marked.
    pub known: u64,
    /// Those that were issued or burned before the import, in ascending order.
    pub issued: Vec<Value>,
    /// Whether an earlier import was interrupted.
    pub interrupted: bool,
}

/// Marks the rows of values in a shard's file, and returns the rows as they were before.
type MarkRows = fn(&Path, &[Value]) -> Result<Sought, ShardError>;

/// Imports values, which must be in the range of the pool, into a folder that no server uses. The folder gets a
/// ledger of the pool if it has none.
///
/// # Errors
/// Returns [`ImportError`]. A part of the values may be marked then.
pub fn import(
    folder: &Folder,
    config: &PoolConfig,
    values: Vec<Value>,
) -> Result<Outcome, ImportError> {
    // The live files are taken over as by a start: what a crashed process had leased is burned, and is not given
    // back later.
    let mut shards = folder.shards().map_err(FolderError::from)?;
    let found = shards.remove(&config.name).unwrap_or_default();
    let mut files = folder.open_pool(config, &found, None, true)?;
    for shard in &mut files.shards {
        let path = files.paths.live(shard.index);
        shard.close().map_err(|source| ImportError::Shard { shard: path, source })?;
    }
    let outcome = mark_all(&mut files, values)?;
    files.ledger.close()?;
    let Outcome { marked, repeated, known, .. } = outcome;
    info!(
        pool = %config.name, marked, repeated, known, issued_before = outcome.issued.len(),
        "numbers were imported"
    );
    Ok(outcome)
}

fn mark_all(files: &mut PoolFiles, values: Vec<Value>) -> Result<Outcome, ImportError> {
    let Entered { added, repeated, known, drawn, interrupted } = files.ledger.import(values)?;
    let mut outcome = Outcome { marked: added, repeated, known, interrupted, ..Outcome::default() };
    let places = places(files);
    let mut marked = Vec::new();
    for drawn in drawn.chunk_by(|(batch, _), (next, _)| batch == next) {
        let batch = drawn[0].0;
        let values: Vec<Value> = drawn.iter().map(|&(_, value)| value).collect();
        // Invariant: no file of another batch has these values, and this batch gets no file again.
        let Some((path, mark_rows)) = places.get(&batch) else {
            outcome.issued.extend(values);
            continue;
        };
        let found = mark_rows(path, &values)
            .map_err(|source| ImportError::Shard { shard: path.clone(), source })?;
        outcome.in_shards += found.unused.len() as u64;
        outcome.known += found.imported.len() as u64;
        outcome.issued.extend(found.used.iter().map(|row| row.value));
        let rows = found.unused.iter().chain(&found.imported);
        marked.extend(rows.map(|row| (batch, row.value)));
    }
    outcome.marked += outcome.in_shards;
    outcome.issued.sort_unstable();
    // Invariant: the marks are durable before the ledger counts on them.
    files.ledger.end_import(&marked)?;
    Ok(outcome)
}

/// Returns the file of each batch that may be served, and how its rows are marked.
fn places(files: &PoolFiles) -> BTreeMap<BatchId, (PathBuf, MarkRows)> {
    let mut places: BTreeMap<BatchId, (PathBuf, MarkRows)> = BTreeMap::new();
    for shard in &files.shards {
        if let Some(live) = &shard.live {
            places.insert(
                live.label.batch,
                (files.paths.live(shard.index), shard::import_live as MarkRows),
            );
        }
        if let Some(standby) = &shard.standby {
            let path = files.paths.standby(shard.index);
            places.insert(standby.label.batch, (path, shard::import_standby as MarkRows));
        }
    }
    places
}

/// Marks the values in a copied file that the ledger, which was copied later, knows to be marked.
pub(crate) fn complete(
    ledger: &Ledger,
    batch: BatchId,
    path: &Path,
    is_live: bool,
) -> Result<(), ImportError> {
    let values = ledger.imported(batch)?;
    if values.is_empty() {
        return Ok(());
    }
    let mark_rows = if is_live { shard::import_live } else { shard::import_standby };
    mark_rows(path, &values)
        .map(drop)
        .map_err(|source| ImportError::Shard { shard: path.to_owned(), source })
}
