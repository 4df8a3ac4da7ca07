//! The data folder: its lock, and the opening of a pool's files. Knows nothing of requests or of filling
//! shards.

mod names;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

pub use self::names::PoolPaths;
pub(crate) use self::names::{
    FLEET_RECORD, JSON_STORE, RECEIPTS, RECEIPTS_COPIED, TABLE_STORE, parse_shard_file, shard_name,
    survey,
};
use self::names::{README, owners_of_file};
pub(crate) use self::start::{Known, adopt};
use crate::batch::ShardIndex;
use crate::config::{Mode, PoolConfig, PoolName};
use crate::files::{self, FileError, Lock, LockError};
use crate::ledger::{Ledger, LedgerError, RESTORE, StratumKey};
use crate::shard::{Label, Seen, ShardError};
use crate::space::Value;
use crate::sqlite::{self, Fault, Fresh};

/// How long a starting server waits for the lock of its folder, which a `verify`, a backup or the previous
/// server may be about to release. It is shorter than a service manager's limit for a start.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The reason that a folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process uses it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another mode has handed out numbers from this folder.
    #[error(
        "{folder} contains {file} of the mode {owner}, and the mode {mode} can't know which numbers it \
         handed out. Use another folder with --data-dir, or --mode {owner}"
    )]
    OtherMode {
        folder: PathBuf,
        file: String,
        /// The mode that the file belongs to.
        owner: Mode,
        mode: Mode,
    },
    /// The folder belongs to an instance of a fleet.
    #[error(
        "{folder} belongs to a fleet ({FLEET_RECORD}), but the settings have no [fleet], so others may \
         hand out the same numbers. Put [fleet] into the settings, or use another folder with --data-dir"
    )]
    InFleet { folder: PathBuf },
    /// The ledger can't be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// There are shards but no ledger.
    #[error("the ledger {ledger} is missing, but its shards are here ({shard}). {RESTORE}")]
    LedgerMissing {
        /// The expected path of the ledger.
        ledger: PathBuf,
        /// One of the shards.
        shard: String,
    },
    /// A shard file that may contain numbers that were already handed out.
    #[error("the shard {shard} can't be served: {problem}")]
    Unexpected {
        shard: PathBuf,
        /// The problem, and what to do.
        problem: String,
    },
    /// A shard can't be read at the moment, for a reason outside the file.
    #[error(
        "the shard {shard} can't be opened at the moment: {source}. No data is lost; start again when the \
         cause is gone"
    )]
    Shard { shard: PathBuf, source: ShardError },
}

/// The part of a pool that an instance of a fleet may draw from.
#[derive(Debug)]
pub struct Share {
    /// The secret key of the permutation that all instances share.
    pub key: StratumKey,
    /// The partitions that the instance holds.
    pub partitions: Vec<u16>,
    /// The values that were issued by other means before the space was made.
    pub used: Arc<[Value]>,
}

/// A data folder. This process holds its lock until it is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    _lock: Lock,
}

/// The files of a pool, as a start found or recovered them.
#[derive(Debug)]
pub struct PoolFiles {
    /// The paths of its files.
    pub paths: PoolPaths,
    pub ledger: Ledger,
    /// Its shards: at least as many as are configured.
    pub shards: Vec<ShardFiles>,
}

/// The files of a shard, as a start found or recovered them.
#[derive(Debug)]
pub struct ShardFiles {
    pub index: ShardIndex,
    /// The state of the live file, or `None` if there is no live file.
    pub live: Option<Seen>,
    /// The connection to the live file, if this start has taken it over and it was not closed since.
    pub connection: Option<Fresh>,
    /// The standby generation, if there is one.
    pub standby: Option<Standby>,
    /// Whether this start set its live file aside as damaged.
    pub damaged: bool,
}

impl ShardFiles {
    /// Closes the live file that was taken over.
    ///
    /// # Errors
    /// Returns SQLite's error. The log then stays for the next opening.
    pub(crate) fn close(&mut self) -> Result<(), ShardError> {
        Ok(self.connection.take().map_or(Ok(()), Fresh::close)?)
    }
}

/// A standby generation.
#[derive(Debug)]
pub struct Standby {
    pub label: Label,
    /// The number of rows that can be leased: all except those that were imported.
    pub unused: u64,
}

impl Folder {
    /// Creates the folder if it is missing, and locks it. While another process holds the lock, waits for up
    /// to `patience`.
    ///
    /// # Errors
    /// Returns [`FolderError::Lock`], [`FolderError::OtherMode`] if the folder has files of another mode, and
    /// [`FolderError::InFleet`] if it belongs to a fleet and `in_fleet` is false.
    pub fn open(
        path: &Path,
        mode: Mode,
        in_fleet: bool,
        patience: Duration,
    ) -> Result<Self, FolderError> {
        let lock = files::lock(path, patience)?;
        let names = files::list(path)?;
        warn_of_wide_modes(path, &names);
        if !in_fleet && names.iter().any(|name| name == FLEET_RECORD) {
            return Err(FolderError::InFleet { folder: path.to_owned() });
        }
        for file in names {
            match owners_of_file(&file) {
                [owner, ..] if !owners_of_file(&file).contains(&mode) => {
                    let folder = path.to_owned();
                    return Err(FolderError::OtherMode { folder, file, owner: *owner, mode });
                }
                _ => {}
            }
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the shards of each pool that have a file.
    pub fn shards(&self) -> Result<BTreeMap<PoolName, BTreeSet<ShardIndex>>, FileError> {
        Ok(survey(&self.path)?.pools)
    }

    /// Opens a pool's ledger, or creates one in a folder without shards, and recovers the shards' files:
    /// adopts or removes unfinished builds, takes over files that a crash left in use, and sets damaged files
    /// aside. `found` are its [shards](Self::shards) that have a file. With a share, the ledger draws only from its
    /// partitions. Takes over live files only if `to_serve` is true.
    ///
    /// # Errors
    /// Returns [`FolderError`] if there is a file that could lead to repeated numbers.
    pub fn open_pool(
        &self,
        config: &PoolConfig,
        found: &BTreeSet<ShardIndex>,
        share: Option<&Share>,
        to_serve: bool,
    ) -> Result<PoolFiles, FolderError> {
        match self.open_pool_once(config, found, share, to_serve) {
            // SQLite finds wrong content also if the disk can't read it. Other errors are final.
            Err(FolderError::Ledger(error @ LedgerError::Sqlite { .. }))
                if error.fault() == Fault::Content =>
            {
                sqlite::read_through(&PoolPaths::new(&self.path, &config.name).ledger())?;
                self.open_pool_once(config, found, share, to_serve).map_err(|error| match error {
                    FolderError::Ledger(error) => error.proven().into(),
                    other => other,
                })
            }
            opened => opened,
        }
    }

    fn open_pool_once(
        &self,
        config: &PoolConfig,
        found: &BTreeSet<ShardIndex>,
        share: Option<&Share>,
        to_serve: bool,
    ) -> Result<PoolFiles, FolderError> {
        let paths = PoolPaths::new(&self.path, &config.name);
        let mut ledger = open_ledger(&paths, config, found.first(), share)?;
        if let Some(share) = share {
            ledger.hold(&share.partitions);
            ledger.set_used(&share.used)?;
        }
        let mut indexes: BTreeSet<ShardIndex> = (0..config.shards).map(ShardIndex).collect();
        indexes.extend(found);
        match start::open_shards(&paths, &mut ledger, indexes, to_serve) {
            Ok(shards) => Ok(PoolFiles { paths, ledger, shards }),
            Err(error) => {
                // Moves the records of this start from the ledger's log into its file, which may be moved.
                let _ = ledger.close();
                Err(error)
            }
        }
    }

    /// Renames all data of the folder except its receipts, which are marked as a copy. The data is then kept for
    /// inspection but never served. `fleet.json`, which records that this is in progress, is renamed last, so
    /// that a start after a crash can complete it.
    pub fn set_all_aside(&self, ending: &str) -> Result<(), FileError> {
        let is_data = |name: &String| {
            let file = name.trim_end_matches("-wal").trim_end_matches("-shm");
            let is_ours = !owners_of_file(file).is_empty() || file.ends_with(".db.tmp");
            is_ours && !file.starts_with(RECEIPTS)
        };
        if files::length_bytes(&self.path.join(RECEIPTS))?.is_some() {
            // Its name is synced before `fleet.json` is renamed.
            files::create(&self.path.join(RECEIPTS_COPIED))?;
        }
        let mut names: Vec<String> = files::list(&self.path)?.into_iter().filter(is_data).collect();
        names.sort_unstable_by_key(|name| name == FLEET_RECORD);
        for name in names {
            // A log keeps the name of its file.
            let (file, log) = match name.rfind("-wal").or_else(|| name.rfind("-shm")) {
                Some(at) => name.split_at(at),
                None => (&*name, ""),
            };
            if name == FLEET_RECORD {
                files::sync_folder(&self.path)?;
            }
            files::rename(&self.path.join(&name), &self.path.join(format!("{file}{ending}{log}")))?;
        }
        files::sync_folder(&self.path)
    }
}

/// Logs a warning about files that other users of this machine may access. It does not change their modes,
/// which may be intended.
fn warn_of_wide_modes(folder: &Path, names: &[String]) {
    let shown = folder.display();
    if let Some(mode) = files::wide_mode(folder) {
        warn!(
            folder = %shown, mode = format!("{mode:04o}"),
            "other users may access the data folder; to prevent this, run: chmod 700 {shown}"
        );
    }
    let paths = names.iter().filter(|&name| name != README).map(|name| folder.join(name));
    let wide: Vec<_> = paths.filter_map(|path| Some((files::wide_mode(&path)?, path))).collect();
    if let [(mode, first), others @ ..] = &*wide {
        warn!(
            file = %first.display(), mode = format!("{mode:04o}"), and_others = others.len(),
            "other users may access files with numbers; to prevent this, run: chmod 600 {shown}/*"
        );
    }
}

fn open_ledger(
    paths: &PoolPaths,
    config: &PoolConfig,
    shard: Option<&ShardIndex>,
    share: Option<&Share>,
) -> Result<Ledger, FolderError> {
    let path = paths.ledger();
    if files::length_bytes(&path)?.is_some() {
        return Ok(Ledger::open(&path, &config.space)?);
    }
    if let Some(&shard) = shard {
        return Err(FolderError::LedgerMissing { ledger: path, shard: paths.shard_name(shard) });
    }
    info!(pool = %config.name, ledger = %path.display(), "a new ledger is created");
    Ok(match share {
        Some(share) => Ledger::create_with(&path, &config.space, share.key),
        None => Ledger::create(&path, &config.space),
    }?)
}
