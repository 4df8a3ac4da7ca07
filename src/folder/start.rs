//! The recovery of a shard's files at a start: reads the files and the ledger, [decides](judge), and carries
//! out the plan. Knows nothing of ranges, requests or of how shards are filled.
//!
//! A file is set aside only if its content proves that it is damaged. A start is refused for a fault that may
//! pass, and for a file that may contain numbers that were already handed out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rand::RngExt;
use tracing::{info, warn};
use uuid::Uuid;

use super::{FolderError, PoolPaths, ShardFiles, Standby};
use crate::batch::{Batch, BatchId, Generation, ShardIndex, Token};
use crate::config::PoolName;
use crate::files;
use crate::ledger::{Ledger, LedgerError, Opening, RESTORE};
use crate::shard::{self, Label, Left, Seen, ShardError};
use crate::sqlite::{self, Fault};

/// The data read from a file, or the reason that its content is damaged.
type Content<T> = Result<T, String>;

/// The files of one shard. A field is `None` if there is no such file.
#[derive(Debug, Default)]
struct Found {
    unfinished: Option<Content<Label>>,
    standby: Option<Content<Label>>,
    live: Option<Content<Seen>>,
}

/// The ledger's records of one shard.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    ledger_id: Uuid,
    pool: PoolName,
    index: ShardIndex,
    /// Batches whose files may be served, oldest first.
    served: Vec<Batch>,
    /// Batches that the files name, whether they may be served or not.
    named: Vec<Batch>,
    /// The tokens that the live file may have.
    opening: Opening,
}

/// The decision about the files of one shard.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    unfinished: Option<Unfinished>,
    standby: Option<Content<Label>>,
    live: Option<Content<Seen>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unfinished {
    /// It is complete, and becomes the standby.
    Adopt,
    /// The ledger does not have its batch, so none of its values was ever served.
    Remove,
}

/// A file that must not be served, with the problem and what to do about it.
#[derive(Debug, PartialEq, Eq)]
struct Unexpected {
    file: File,
    problem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum File {
    Standby,
    Live,
}

impl Known {
    /// Reads the ledger's records of a shard and of the batches that its files name.
    pub(crate) fn of(
        ledger: &Ledger,
        pool: &PoolName,
        index: ShardIndex,
        named: &[BatchId],
        live: Option<BatchId>,
    ) -> Result<Self, LedgerError> {
        let mut batches = Vec::new();
        for &id in named {
            batches.extend(ledger.batch(id)?);
        }
        let opening = match live.filter(|&live| batches.iter().any(|batch| batch.id == live)) {
            Some(live) => ledger.opening(live)?,
            None => Opening::default(),
        };
        Ok(Self {
            ledger_id: ledger.id(),
            pool: pool.clone(),
            index,
            served: ledger.batches(index)?,
            named: batches,
            opening,
        })
    }

    /// Removes the batch of a damaged standby: the newest one, unless it is the live file's.
    fn without_standby(&self, live: Option<BatchId>) -> (Self, Option<Batch>) {
        let mut known = self.clone();
        let lost = known.served.pop_if(|batch| Some(batch.id) != live);
        (known, lost)
    }

    /// Checks that the ledger has the batch that a file was built from.
    fn has(&self, label: &Label) -> Result<(), String> {
        if label.ledger_id != self.ledger_id {
            return Err(format!(
                "it belongs to the ledger {}, but the ledger here is {}. Move it away, or restore its ledger",
                label.ledger_id, self.ledger_id
            ));
        }
        let Some(batch) = self.named.iter().find(|batch| batch.id == label.batch) else {
            return Err(format!(
                "the ledger does not have its batch {}: the ledger is an older copy. {RESTORE}",
                label.batch.0
            ));
        };
        let labelled = Batch {
            id: label.batch,
            shard: label.index,
            generation: label.generation,
            count: label.rows,
        };
        if *batch != labelled {
            return Err(format!("the ledger has another batch {}: {batch:?}", label.batch.0));
        }
        Ok(())
    }

    /// Checks that the ledger expects a file in its place.
    ///
    /// # Errors
    /// Returns the reason and what to do, if the ledger does not expect it.
    pub(crate) fn expects(&self, label: &Label) -> Result<(), String> {
        self.has(label)?;
        if label.pool != self.pool || label.index != self.index {
            return Err(format!(
                "it is shard {} of the pool {}, renamed or copied: two shards of one batch would hand \
                 out the same numbers. Move the file away",
                label.index.0, label.pool
            ));
        }
        if !self.served.iter().any(|batch| batch.id == label.batch) {
            return Err(old_copy(label.generation));
        }
        Ok(())
    }

    /// Checks that a live file is the one that was opened last, and that the newest generation is its own or
    /// that of the standby. If not, the file is a copy from before it was replaced.
    ///
    /// # Errors
    /// Returns the reason and what to do, if the file is not current.
    pub(crate) fn is_current(
        &self,
        live: &Label,
        token: Token,
        in_use: bool,
        standby: Option<&Label>,
    ) -> Result<(), String> {
        let newest = self.served.last().map(|batch| batch.generation);
        let here = standby.unwrap_or(live).generation;
        // An installed standby no longer has its own name. If the file still exists, it is a copy from
        // before.
        let follows = standby.is_none_or(|standby| standby.generation > live.generation);
        if newest != Some(here) || !follows {
            return Err(old_copy(live.generation));
        }
        if !self.opening.admits(token, in_use) {
            return Err(format!(
                "it is an older copy of generation {}: it does not know which of its numbers were issued \
                 since it was copied. Restore the file that was here, or delete this one, and a new shard \
                 will be built",
                live.generation.0
            ));
        }
        Ok(())
    }
}

fn old_copy(generation: Generation) -> String {
    format!(
        "it is generation {}, which has been replaced: an old copy does not know which of its numbers \
         were issued since. Delete this file, and a new shard will be built",
        generation.0
    )
}

/// Decides what to do with a shard's files. Pure.
fn judge(found: Found, known: &Known) -> Result<Plan, Unexpected> {
    let mut plan = Plan { standby: found.standby, ..Plan::default() };
    let is_free = plan.standby.is_none();
    plan.unfinished = found.unfinished.as_ref().map(|found| unfinished(found, known, is_free));
    if let (Some(Unfinished::Adopt), Some(label)) = (plan.unfinished, found.unfinished) {
        plan.standby = Some(label);
    }
    if let Some(Ok(label)) = &plan.standby {
        known.expects(label).map_err(|problem| Unexpected { file: File::Standby, problem })?;
    }
    plan.live = found.live.map(|live| live.and_then(|seen| seen.problem().map_or(Ok(seen), Err)));
    if let Some(Ok(seen)) = &plan.live {
        let (standby, known) = match &plan.standby {
            Some(Ok(standby)) => (Some(standby), known.clone()),
            Some(Err(_)) => (None, known.without_standby(Some(seen.label.batch)).0),
            None => (None, known.clone()),
        };
        known
            .expects(&seen.label)
            .and_then(|()| known.is_current(&seen.label, seen.token, seen.in_use, standby))
            .map_err(|problem| Unexpected { file: File::Live, problem })?;
    }
    Ok(plan)
}

/// Decides what to do with an unfinished build. The ledger has its batch only if the build is complete and
/// synced. `is_free`: there is no standby.
fn unfinished(found: &Content<Label>, known: &Known, is_free: bool) -> Unfinished {
    match found {
        Ok(label) if is_free && known.has(label).is_ok() => Unfinished::Adopt,
        _ => Unfinished::Remove,
    }
}

/// Reads the files of shards as the last process left them, and recovers them. If `to_serve` is true, takes over
/// the live files, which are otherwise only read.
///
/// # Errors
/// Returns [`FolderError`] if a file could lead to repeated numbers, or can't be read because of a fault.
pub(super) fn open_shards(
    paths: &PoolPaths,
    ledger: &mut Ledger,
    indexes: BTreeSet<ShardIndex>,
    to_serve: bool,
) -> Result<Vec<ShardFiles>, FolderError> {
    let opened = indexes.into_iter().map(|index| open_shard(paths, ledger, index, to_serve));
    let (mut shards, left): (Vec<_>, Vec<_>) =
        opened.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    let found: Vec<_> =
        left.iter().flatten().map(|left| (left.seen.label.batch, left.seen.token)).collect();
    let token = Token(rand::rng().random());
    if !found.is_empty() {
        let burned = left.iter().flatten().map(|left| left.seen.open_rows).sum();
        // The ledger comes first: a crash in between then counts burned numbers twice rather than never.
        ledger.begin_openings(&found, token, burned)?;
    }
    for (files, left) in shards.iter_mut().zip(left) {
        if let Some(left) = left {
            take_over(files, left, paths, token)?;
        }
    }
    if to_serve {
        ledger.end_openings()?;
    }
    Ok(shards)
}

/// Ends the last process's use of a live file.
fn take_over(
    files: &mut ShardFiles,
    left: Left,
    paths: &PoolPaths,
    token: Token,
) -> Result<(), FolderError> {
    let seen = left.seen.clone();
    if seen.open_rows > 0 {
        warn!(
            pool = %paths.pool(), shard = %paths.shard_name(files.index),
            burned_at_most = seen.open_rows,
            "the last process did not stop gracefully: the rows that it had leased but not handed out are burned"
        );
    }
    let failed = |source| FolderError::Shard { shard: paths.live(files.index), source };
    files.connection = Some(left.take_over(token).map_err(failed)?);
    files.live = Some(Seen { token, in_use: false, open_rows: 0, ..seen });
    Ok(())
}

/// Reads a shard's files as the last process left them, and recovers them. If `to_serve` is true, also returns
/// the live file to take over.
fn open_shard(
    paths: &PoolPaths,
    ledger: &mut Ledger,
    index: ShardIndex,
    to_serve: bool,
) -> Result<(ShardFiles, Option<Left>), FolderError> {
    let (mut found, mut left) = (Found::default(), None);
    found.unfinished = content(paths.unfinished(index), shard::read_label)?;
    found.standby = content(paths.standby(index), shard::read_label)?;
    found.live = match to_serve {
        true => match content(paths.live(index), Left::open)? {
            Some(Ok(live)) => Some(Ok(left.insert(live).seen.clone())),
            Some(Err(damage)) => Some(Err(damage)),
            None => None,
        },
        false => content(paths.live(index), shard::look)?,
    };
    let label = |found: &Option<Content<Label>>| found.as_ref()?.as_ref().ok().map(|l| l.batch);
    let live = found.live.as_ref().and_then(|live| Some(live.as_ref().ok()?.label.batch));
    let named: Vec<BatchId> =
        [label(&found.unfinished), label(&found.standby), live].into_iter().flatten().collect();
    let known = Known::of(ledger, paths.pool(), index, &named, live)?;
    let plan = judge(found, &known).map_err(|Unexpected { file, problem }| {
        let shard = match file {
            File::Standby => paths.standby(index),
            File::Live => paths.live(index),
        };
        FolderError::Unexpected { shard, problem }
    })?;
    // A damaged file is closed before it is set aside.
    let left = left.filter(|_| matches!(plan.live, Some(Ok(_))));
    Ok((carry_out(plan, paths, ledger, &known)?, left))
}

/// Makes an unfinished build the shard's standby if the ledger has its batch, and removes it otherwise.
/// Returns whether it became the standby.
///
/// # Errors
/// Returns [`FolderError`] if a file can't be read or renamed.
pub(crate) fn adopt(
    paths: &PoolPaths,
    ledger: &Ledger,
    index: ShardIndex,
) -> Result<bool, FolderError> {
    let Some(found) = content(paths.unfinished(index), shard::read_label)? else {
        return Ok(false);
    };
    let named: Vec<BatchId> = found.as_ref().map(|label| label.batch).into_iter().collect();
    let known = Known::of(ledger, paths.pool(), index, &named, None)?;
    let is_free = files::length_bytes(&paths.standby(index))?.is_none();
    let plan = unfinished(&found, &known, is_free);
    finish(plan, paths, index)?;
    Ok(plan == Unfinished::Adopt)
}

/// Reads a file, if it exists. A fault outside its content is an error.
fn content<T>(
    path: PathBuf,
    read: impl Fn(&Path) -> Result<T, ShardError>,
) -> Result<Option<Content<T>>, FolderError> {
    if files::length_bytes(&path)?.is_none() {
        return Ok(None);
    }
    let mut found = read(&path);
    if found.as_ref().is_err_and(|error| error.fault() == Fault::Content) {
        sqlite::read_through(&path)?;
        found = read(&path);
    }
    match found {
        Ok(found) => Ok(Some(Ok(found))),
        Err(error) if error.fault() == Fault::Content => Ok(Some(Err(error.to_string()))),
        Err(source) => Err(FolderError::Shard { shard: path, source }),
    }
}

fn carry_out(
    plan: Plan,
    paths: &PoolPaths,
    ledger: &mut Ledger,
    known: &Known,
) -> Result<ShardFiles, FolderError> {
    let index = known.index;
    let mut files =
        ShardFiles { index, live: None, connection: None, standby: None, damaged: false };
    // An import that was interrupted may have left it.
    files::remove(&files::unfinished(&paths.standby(index)))?;
    if let Some(unfinished) = plan.unfinished {
        finish(unfinished, paths, index)?;
    }
    match plan.standby {
        Some(Ok(label)) => {
            // If the count can't be read, opening the file will tell why.
            let unused = shard::unused_rows(&paths.standby(index)).unwrap_or(label.rows);
            files.standby = Some(Standby { label, unused });
        }
        Some(Err(damage)) => {
            let live = plan.live.as_ref().and_then(|live| Some(live.as_ref().ok()?.label.batch));
            let (rest, lost) = known.without_standby(live);
            ledger.retire(index, rest.served.last().map(|batch| batch.generation))?;
            let lost = lost.map_or(0, |batch| batch.count);
            set_aside(paths, ledger, &paths.standby(index), lost, &damage)?;
        }
        None => {}
    }
    match plan.live {
        Some(Ok(seen)) => files.live = Some(seen),
        Some(Err(damage)) => {
            let standby = files.standby.as_ref().map(|standby| standby.label.generation);
            let batch = known.served.iter().rfind(|batch| Some(batch.generation) != standby);
            let live = paths.live(index);
            // The count of unused rows is more precise, if it can still be read.
            let lost =
                shard::unused_rows(&live).unwrap_or_else(|_| batch.map_or(0, |batch| batch.count));
            ledger.retire(index, standby)?;
            set_aside(paths, ledger, &live, lost, &damage)?;
            files.damaged = true;
        }
        None => {}
    }
    Ok(files)
}

fn finish(plan: Unfinished, paths: &PoolPaths, index: ShardIndex) -> Result<(), FolderError> {
    let (pool, shard, unfinished) =
        (paths.pool(), paths.shard_name(index), paths.unfinished(index));
    match plan {
        Unfinished::Adopt => {
            files::rename(&unfinished, &paths.standby(index))?;
            info!(%pool, %shard, "a complete build was adopted");
        }
        Unfinished::Remove => {
            files::remove(&unfinished)?;
            info!(%pool, %shard, "an unfinished build was removed");
        }
    }
    Ok(files::sync_folder(paths.folder())?)
}

/// Sets a damaged file aside. Up to `lost` of its numbers were not handed out.
fn set_aside(
    paths: &PoolPaths,
    ledger: &mut Ledger,
    file: &Path,
    lost: u64,
    damage: &str,
) -> Result<(), FolderError> {
    ledger.add_burned(lost)?;
    let aside = paths.set_aside(file)?;
    warn!(
        pool = %paths.pool(), shard = %file.display(), kept_as = %aside.display(), damage,
        burned_at_most = lost, "a damaged shard was set aside; its numbers are never handed out"
    );
    Ok(())
}

#[cfg(test)]
mod tests;
