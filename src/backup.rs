//! Copies a folder, while a server uses it or not. A server can start on the copy. Changes nothing in the
//! folder.
//!
//! # The order
//! The shards of each pool are copied first, and its ledger last. A value enters the ledger before its shard
//! is served, so a ledger copied later has every value of the shards copied before. In the other order, a
//! shard filled in between would have values that the copied ledger lacks and could draw again.
//!
//! The receipts are copied before all shards, because a number is marked as used in its shard before its receipt
//! is saved. In the other order, a server on the copy would hand out numbers of copied receipts again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::RngExt;

use crate::batch::{Generation, ShardIndex, Token};
use crate::config::PoolName;
use crate::files::{self, FileError, LockError};
use crate::folder::{self, FLEET_RECORD, JSON_STORE, PoolPaths, RECEIPTS};
use crate::import::{self, ImportError};
use crate::ledger::{Ledger, LedgerError};
use crate::receipts;
use crate::shard::{self, Label, Left, ShardError};
use crate::sqlite;
use crate::sqlite::rusqlite::{self, Connection};
use crate::verify;

/// Attempts to copy a shard, which fail if the shard is replaced by its next generation at the same time.
/// Each takes about as long as reading the file, so only shards that are used up faster than this need more
/// than one.
const TRIES_MAX: u32 = 20;

/// The reason that there is no backup. Nothing of it is left then.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The target exists and is not empty.
    #[error("{0} is there already and not empty: name a folder that does not exist")]
    Exists(PathBuf),
    /// The target is inside the data folder.
    #[error(
        "{to} lies in the data folder {from} and would be lost with it. Name a folder elsewhere, \
         preferably on another disk"
    )]
    Inside { to: PathBuf, from: PathBuf },
    /// Another backup is running, or one was killed.
    #[error(
        "{0} is there already: another backup is being written, or one was interrupted; if none runs, \
         delete it"
    )]
    Unfinished(PathBuf),
    /// The folder has no files of tombola.
    #[error("there is nothing to back up in {0}: name the data folder with --data-dir")]
    Nothing(PathBuf),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file could not be copied.
    #[error("can't copy {path}: {source}")]
    Copy {
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A copied shard can't be used.
    #[error("the copy of {path} can't be used: {source}")]
    Shard { path: PathBuf, source: ShardError },
    /// A shard was replaced again and again while it was being copied.
    #[error(
        "{0} was replaced {TRIES_MAX} times while it was being copied. Try again with less load"
    )]
    Moving(PathBuf),
    /// A copied ledger can't be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// An import that was under way could not be completed in the copy.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The copied receipts can't be used.
    #[error("the copy of the receipts can't be used: {0}")]
    Receipts(receipts::OpenError),
    /// The copy has violations, so the folder probably has them too.
    #[error("the copy has violations, so {folder} probably has them too:\n{lines}")]
    NotWhole { folder: PathBuf, lines: String },
    /// The backup was cancelled.
    #[error("stopped; nothing of the backup is left")]
    Cancelled,
}

/// A finished backup.
#[derive(Debug)]
pub struct Summary {
    /// Names and lengths in bytes.
    pub files: Vec<(String, u64)>,
    /// For each pool, an upper bound of the unissued numbers that a server on the copy never hands out: those
    /// that were leased, or are in a generation that was finished while others were being copied.
    pub burned: Vec<(PoolName, u64)>,
    /// Files of the folder that are not in the copy: those that tombola does not know, and those that it set
    /// aside.
    pub left_out: Vec<String>,
    /// The result of checking the copy.
    pub findings: verify::Findings,
    /// How long the backup took.
    pub took: Duration,
}

/// Copies the data of `from` to `to`, which must be empty or not exist. Calls `go_on` every 16 MB, and stops
/// if it returns false.
///
/// # Errors
/// Returns [`BackupError`]. Nothing is left at `to`.
pub fn run(from: &Path, to: &Path, go_on: &dyn Fn() -> bool) -> Result<Summary, BackupError> {
    let started = Instant::now();
    if files::lies_in(to, from)? {
        return Err(BackupError::Inside { to: to.to_owned(), from: from.to_owned() });
    }
    if files::length_bytes(to)?.is_some() && !files::list(to)?.is_empty() {
        return Err(BackupError::Exists(to.to_owned()));
    }
    // The copy has another name until it is complete.
    let partial = files::beside(to, ".partial");
    if files::length_bytes(&partial)?.is_some() {
        return Err(BackupError::Unfinished(partial));
    }
    // If no process uses the folder, its files are read without a trace, and the lock keeps other processes
    // out.
    let lock = match files::lock(from, Duration::ZERO) {
        Ok(lock) => Some(lock),
        Err(LockError::Held { .. }) => None,
        Err(LockError::File(error)) => return Err(error.into()),
    };
    files::create_folder(&partial)?;
    let copying = Copying { from, to: &partial, in_use: lock.is_none(), go_on };
    let done = copying.all().and_then(|done| {
        files::rename_durably(&partial, to)?;
        Ok(done)
    });
    let Copied { burned, left_out, findings } = match done {
        Ok(done) => done,
        Err(error) => {
            files::remove_folder(&partial)?;
            return Err(error);
        }
    };
    let mut copied = Vec::new();
    for name in files::list(to)? {
        let bytes = files::length_bytes(&to.join(&name))?.unwrap_or(0);
        copied.push((name, bytes));
    }
    Ok(Summary { files: copied, burned, left_out, findings, took: started.elapsed() })
}

/// A backup in progress.
struct Copying<'b> {
    from: &'b Path,
    to: &'b Path,
    /// Whether another process uses the folder.
    in_use: bool,
    go_on: &'b dyn Fn() -> bool,
}

/// The parts of a [`Summary`] that come from copying.
struct Copied {
    burned: Vec<(PoolName, u64)>,
    left_out: Vec<String>,
    findings: verify::Findings,
}

impl Copying<'_> {
    fn all(&self) -> Result<Copied, BackupError> {
        let survey = folder::survey(self.from)?;
        if survey.pools.is_empty() && survey.store.is_none() && !survey.receipts {
            return Err(BackupError::Nothing(self.from.to_owned()));
        }
        if survey.receipts {
            self.receipts()?;
        }
        // Invariant: copied before the shards. A step of the fence after this makes the copy a stale one.
        if let Some(record) = files::read(&self.from.join(FLEET_RECORD))? {
            files::replace(&self.to.join(FLEET_RECORD), &record)?;
        }
        let mut burned = Vec::new();
        for (pool, shards) in survey.pools {
            let count = self.pool(&pool, &shards)?;
            burned.push((pool, count));
        }
        if let Some(store) = survey.store {
            self.store(&store)?;
        }
        for name in files::list(self.to)? {
            files::sync_file(&self.to.join(name))?;
        }
        files::sync_folder(self.to)?;
        let findings = verify::check(self.to)?;
        if findings.violation_count() > 0 {
            let lines = findings.violation_lines().join("\n");
            return Err(BackupError::NotWhole { folder: self.from.to_owned(), lines });
        }
        let left_out = [survey.others, survey.set_aside].concat();
        Ok(Copied { burned, left_out, findings })
    }

    /// Copies the receipts.
    fn receipts(&self) -> Result<(), BackupError> {
        let copy = self.to.join(RECEIPTS);
        // Invariant: copied before the shards, in which the numbers of all copied receipts are then marked as used.
        self.database(&self.from.join(RECEIPTS), &copy)?;
        receipts::mark_copy(&copy).map_err(BackupError::Receipts)
    }

    /// Copies a pool. Returns how many of its numbers are burned in the copy.
    fn pool(&self, pool: &PoolName, shards: &BTreeSet<ShardIndex>) -> Result<u64, BackupError> {
        let (from, to) = (PoolPaths::new(self.from, pool), PoolPaths::new(self.to, pool));
        // Only the copied ledger has this token, so the original ledger refuses a copied shard.
        let token = Token(rand::rng().random());
        let (mut labels, mut live, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        // The counts of a damaged file may be too large for a sum.
        let mut burned = 0_u64;
        for &index in shards {
            let (found, standby, leased) = self.shard(&from, &to, index, token)?;
            live.extend(found.iter().map(|label| label.batch));
            copies.extend(found.iter().map(|label| (label.batch, to.live(index), true)));
            copies.extend(standby.iter().map(|label| (label.batch, to.standby(index), false)));
            labels.extend(found.into_iter().chain(standby));
            burned = burned.saturating_add(leased);
        }
        // Invariant: copied after its shards. See the head of this file.
        self.database(&from.ledger(), &to.ledger())?;
        let mut ledger = Ledger::open_as_it_is(&to.ledger())?;
        // The ledger may know of marks that were made after a shard was copied.
        for (batch, path, is_live) in copies {
            import::complete(&ledger, batch, &path, is_live)?;
        }
        for index in ledger.shards()? {
            let kept: Vec<Generation> = labels
                .iter()
                .filter(|label| label.index == index)
                .map(|label| label.generation)
                .collect();
            burned = burned.saturating_add(ledger.keep_only(index, &kept)?);
        }
        for batch in live {
            ledger.set_token(batch, token)?;
        }
        if burned > 0 {
            ledger.add_burned(burned)?;
        }
        ledger.close()?;
        Ok(burned)
    }

    /// Copies the generations of a shard. Returns the labels of the live one and of the standby, and how many
    /// numbers were leased.
    fn shard(
        &self,
        from: &PoolPaths,
        to: &PoolPaths,
        index: ShardIndex,
        token: Token,
    ) -> Result<(Option<Label>, Option<Label>, u64), BackupError> {
        let failed = |path: PathBuf| move |source| BackupError::Shard { path, source };
        for _ in 0..TRIES_MAX {
            let live = from.live(index);
            let before = files::identity(&live)?;
            if before.is_some() && !self.database_unmoved(&live, &to.live(index))? {
                continue;
            }
            let standby = self.standby(from, to, index)?;
            // A swap happened in between, so the copy is of the previous live file, or lacks the standby.
            if files::identity(&live)? != before {
                files::remove(&to.live(index))?;
                files::remove(&to.standby(index))?;
                continue;
            }
            let (mut live, mut leased) = (None, 0);
            if before.is_some() {
                let copy = to.live(index);
                let left = Left::open(&copy).map_err(failed(copy.clone()))?;
                live = Some(left.seen.label.clone());
                leased = left.seen.open_rows;
                left.take_over(token).and_then(|taken| Ok(taken.close()?)).map_err(failed(copy))?;
            }
            let copy = to.standby(index);
            let standby = match standby {
                true => Some(shard::read_label(&copy).map_err(failed(copy))?),
                false => None,
            };
            return Ok((live, standby, leased));
        }
        Err(BackupError::Moving(from.live(index)))
    }

    /// Copies the standby, which is not written while it has this name. Returns whether there is one.
    fn standby(
        &self,
        from: &PoolPaths,
        to: &PoolPaths,
        index: ShardIndex,
    ) -> Result<bool, BackupError> {
        let (standby, copy) = (from.standby(index), to.standby(index));
        let before = files::identity(&standby)?;
        if before.is_none() {
            return Ok(false);
        }
        if !self.database_unmoved(&standby, &copy)? {
            files::remove(&copy)?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Copies the store of a mode below sharded.
    fn store(&self, name: &str) -> Result<(), BackupError> {
        if name == JSON_STORE {
            // Each write replaces the whole file, so what is read is one consistent state.
            let content = files::read(&self.from.join(name))?.unwrap_or_default();
            return Ok(files::replace(&self.to.join(name), &content)?);
        }
        self.database(&self.from.join(name), &self.to.join(name))
    }

    fn database(&self, from: &Path, to: &Path) -> Result<(), BackupError> {
        if self.database_unmoved(from, to)? {
            Ok(())
        } else {
            Err(BackupError::Moving(from.into()))
        }
    }

    /// Copies a database as it is at one moment. Returns false if its name was given to another file before
    /// that moment, since the log could then be the other file's.
    fn database_unmoved(&self, from: &Path, to: &Path) -> Result<bool, BackupError> {
        let failed = |source| BackupError::Copy { path: from.to_owned(), source };
        let before = files::identity(from)?;
        if before.is_none() {
            return Ok(false);
        }
        let source = match self.open(from) {
            Ok(source) => source,
            Err(_) if files::identity(from)? != before => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        if files::identity(from)? != before {
            return Ok(false);
        }
        files::create(to)?;
        match sqlite::copy(&source, to, self.go_on).map_err(failed)? {
            true => Ok(true),
            false => Err(BackupError::Cancelled),
        }
    }

    /// Opens a file, and fixes the connection's view to its current content.
    fn open(&self, path: &Path) -> Result<Connection, rusqlite::Error> {
        let source =
            if self.in_use { sqlite::open_beside(path) } else { sqlite::open_to_look(path) }?;
        sqlite::begin_snapshot(&source)?;
        Ok(source)
    }
}
