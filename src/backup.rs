//! A copy of a folder that can be served, taken while a server uses the folder or while none does.
//! Changes nothing in the folder.
//!
//! # The order
//! Of each pool the shards first, the ledger last. A value enters the ledger before its shard is served,
//! so a ledger that is copied later has every value of the shards that were copied before. The other
//! way round, a shard filled in between would have values that the copied ledger lacks: it could draw
//! them again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::batch::{Generation, ShardIndex};
use crate::config::PoolName;
use crate::files::{self, FileError, LockError};
use crate::folder::{self, FLEET_RECORD, JSON_STORE, PoolPaths};
use crate::ledger::{Ledger, LedgerError};
use crate::shard::{self, Label, ShardError};
use crate::sqlite;
use crate::sqlite::rusqlite::{self, Connection};
use crate::verify;

/// Tries to copy a shard that is replaced by its next generation meanwhile. Each takes about as long as
/// reading the file, so that only shards that are used up faster than they are read need a second.
const TRIES_MAX: u32 = 20;

/// Why there is no backup. Nothing of it is left then.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is something where it should come to be.
    #[error("{0} is there already and not empty: name a folder that does not exist")]
    Exists(PathBuf),
    /// What befalls the folder would befall its copy.
    #[error(
        "{to} lies in the data folder {from}, and would be lost with it: name a folder elsewhere, \
         best on another disk"
    )]
    Inside {
        /// The copy.
        to: PathBuf,
        /// The data folder.
        from: PathBuf,
    },
    /// Someone else's, or a process that was killed.
    #[error(
        "{0} is there already: another backup is being written, or one was cut off; if none runs, \
         delete it"
    )]
    Unfinished(PathBuf),
    /// No file of tombola's.
    #[error("there is nothing to back up in {0}: name the data folder with --data-dir")]
    Nothing(PathBuf),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file could not be copied.
    #[error("can't copy {path}: {source}")]
    Copy {
        /// The file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A copied shard is not whole.
    #[error("the copy of {path} can't be used: {source}")]
    Shard {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ShardError,
    },
    /// A shard was replaced again and again while it was copied.
    #[error(
        "{0} was replaced {TRIES_MAX} times while it was being copied: try again with less load"
    )]
    Moving(PathBuf),
    /// A copied ledger is not whole.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The copy is not what it should be: nor, then, is the folder.
    #[error("the copy is not whole, so neither may {folder} be:\n{lines}")]
    NotWhole {
        /// The data folder.
        folder: PathBuf,
        /// The violations.
        lines: String,
    },
    /// It was told to stop.
    #[error("stopped; nothing of the backup is left")]
    Cancelled,
}

/// A finished backup.
#[derive(Debug)]
pub struct Summary {
    /// Names and lengths in bytes.
    pub files: Vec<(String, u64)>,
    /// Each pool, and how many numbers a server on the copy never hands out though they were not
    /// issued: leased, or in a generation that was finished while the others were copied; at most.
    pub burned: Vec<(PoolName, u64)>,
    /// What the reading of the copy found worth knowing.
    pub findings: verify::Findings,
    /// How long it took.
    pub took: Duration,
}

/// Copies what `from` holds to `to`, which must not exist or be empty. Asks `go_on` every 16 MB.
///
/// # Errors
/// [`BackupError`]; nothing is left at `to`.
pub fn run(from: &Path, to: &Path, go_on: &dyn Fn() -> bool) -> Result<Summary, BackupError> {
    let started = Instant::now();
    if files::lies_in(to, from)? {
        return Err(BackupError::Inside { to: to.to_owned(), from: from.to_owned() });
    }
    if files::length_bytes(to)?.is_some() && !files::list(to)?.is_empty() {
        return Err(BackupError::Exists(to.to_owned()));
    }
    // Until it is whole it bears another name.
    let partial = files::beside(to, ".partial");
    if files::length_bytes(&partial)?.is_some() {
        return Err(BackupError::Unfinished(partial));
    }
    // Of a folder that nobody uses, files are read without a trace, and nobody may begin to use it.
    let lock = match files::lock(from) {
        Ok(lock) => Some(lock),
        Err(LockError::Held { .. }) => None,
        Err(LockError::File(error)) => return Err(error.into()),
    };
    files::create_folder(&partial)?;
    let copying = Copying { from, to: &partial, in_use: lock.is_none(), go_on };
    let done = copying.all().and_then(|(burned, findings)| {
        files::rename(&partial, to)?;
        files::sync_folder(files::parent(to))?;
        Ok((burned, findings))
    });
    let (burned, findings) = match done {
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
    Ok(Summary { files: copied, burned, findings, took: started.elapsed() })
}

/// The work.
struct Copying<'b> {
    from: &'b Path,
    to: &'b Path,
    /// By another process.
    in_use: bool,
    go_on: &'b dyn Fn() -> bool,
}

type Burned = Vec<(PoolName, u64)>;

impl Copying<'_> {
    fn all(&self) -> Result<(Burned, verify::Findings), BackupError> {
        let survey = folder::survey(self.from)?;
        if survey.pools.is_empty() && survey.store.is_none() {
            return Err(BackupError::Nothing(self.from.to_owned()));
        }
        // Invariant: before the shards. A step of the fence after this makes the copy an old one.
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
        Ok((burned, findings))
    }

    /// Copies a pool, and answers with how many of its numbers the copy has burned.
    fn pool(&self, pool: &PoolName, shards: &BTreeSet<ShardIndex>) -> Result<u64, BackupError> {
        let (from, to) = (PoolPaths::new(self.from, pool), PoolPaths::new(self.to, pool));
        let mut labels = Vec::new();
        let mut burned = 0;
        for &index in shards {
            let (found, leased) = self.shard(&from, &to, index)?;
            labels.extend(found);
            burned += leased;
        }
        // Invariant: after its shards. See the head of this file.
        self.database(&from.ledger(), &to.ledger())?;
        let mut ledger = Ledger::open_as_it_is(&to.ledger())?;
        for index in ledger.shards()? {
            let kept: Vec<Generation> = labels
                .iter()
                .filter(|label| label.index == index)
                .map(|label| label.generation)
                .collect();
            burned += ledger.keep_only(index, &kept)?;
        }
        if burned > 0 {
            ledger.add_burned(burned)?;
        }
        ledger.close()?;
        Ok(burned)
    }

    /// Copies the generations of a shard, and answers with their labels and how many numbers were
    /// leased.
    fn shard(
        &self,
        from: &PoolPaths,
        to: &PoolPaths,
        index: ShardIndex,
    ) -> Result<(Vec<Label>, u64), BackupError> {
        let failed = |path: PathBuf| move |source| BackupError::Shard { path, source };
        for _ in 0..TRIES_MAX {
            let live = from.live(index);
            let before = files::identity(&live)?;
            if before.is_some() && !self.database_unmoved(&live, &to.live(index))? {
                continue;
            }
            let standby = self.standby(from, to, index)?;
            // A swap in between: the live copy is the one before, or the standby was missed.
            if files::identity(&live)? != before {
                files::remove(&to.live(index))?;
                files::remove(&to.standby(index))?;
                continue;
            }
            let mut labels = Vec::new();
            let mut leased = 0;
            if before.is_some() {
                let copy = to.live(index);
                let (label, open_rows) = shard::end_copy(&copy).map_err(failed(copy))?;
                labels.push(label);
                leased = open_rows;
            }
            if standby {
                let copy = to.standby(index);
                labels.push(shard::read_label(&copy).map_err(failed(copy))?);
            }
            return Ok((labels, leased));
        }
        Err(BackupError::Moving(from.live(index)))
    }

    /// Copies the standby, which nobody writes while it bears this name. Answers whether there is one.
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
            // Replaced as a whole at each write: what is read is the state of one moment.
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

    /// Copies a database as it is at one moment. Not, and answers so, when its name came to stand for
    /// another file before that moment: its log could then be the other's.
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

    /// Opens a file and fixes what is seen of it.
    fn open(&self, path: &Path) -> Result<Connection, rusqlite::Error> {
        let source =
            if self.in_use { sqlite::open_beside(path) } else { sqlite::open_to_look(path) }?;
        sqlite::begin_snapshot(&source)?;
        Ok(source)
    }
}
