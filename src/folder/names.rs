//! The names of the files in a data folder, and the operations that rename them. Knows nothing of what the
//! files contain.
//!
//! A shard has up to three files: `.db` is live, `.db.next` is the standby generation, and `.db.tmp` is a
//! generation being built.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::batch::ShardIndex;
use crate::config::{Mode, PoolName};
use crate::files::{self, FileError};

/// The only file of the modes simple and json.
pub(crate) const JSON_STORE: &str = "used_numbers.json";

/// The only file of the mode sqlite.
pub(crate) const TABLE_STORE: &str = "random_numbers.db";

/// The folder's record of its place in a fleet.
pub(crate) const FLEET_RECORD: &str = "fleet.json";

/// The receipts of all pools.
pub(crate) const RECEIPTS: &str = "receipts.db";

/// An empty file that marks the receipts as those of an old copy, until they are opened.
pub(crate) const RECEIPTS_COPIED: &str = "receipts.db.copied";

/// Part of the folder in a clone of the repository. It contains no numbers.
pub(super) const README: &str = "README.md";

/// The paths of one pool's files.
#[derive(Clone, Debug)]
pub struct PoolPaths {
    folder: PathBuf,
    pool: PoolName,
}

/// The contents of a folder according to the file names alone.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Each pool that has a ledger or a shard, with the shards that have a file.
    pub pools: BTreeMap<PoolName, BTreeSet<ShardIndex>>,
    /// The store of a mode below sharded.
    pub store: Option<String>,
    /// Whether it has receipts.
    pub receipts: bool,
    /// Files that were set aside as damaged or as an old copy.
    pub set_aside: Vec<String>,
    /// Files that do not belong to this program.
    pub others: Vec<String>,
}

/// Sorts the files of a folder by their names.
pub(crate) fn survey(folder: &Path) -> Result<Survey, FileError> {
    let mut survey = Survey::default();
    for name in files::list(folder)? {
        if let Some((pool, index)) = parse_shard_file(&name) {
            survey.pools.entry(pool).or_default().insert(index);
            continue;
        }
        // A crash may leave the temporary copy of a file that was being replaced. A log belongs to the file
        // beside it.
        let file = name.strip_suffix(".tmp").unwrap_or(&name);
        let is_log = file.ends_with("-wal") || file.ends_with("-shm");
        let is_shard = parse_shard_file(file).is_some();
        if is_log
            || is_shard
            || [files::LOCK, FLEET_RECORD, RECEIPTS_COPIED, README].contains(&file)
        {
            continue;
        }
        if name.contains(".damaged-") || name.contains(".stale-") {
            survey.set_aside.push(name);
        } else if file == JSON_STORE || file == TABLE_STORE {
            if file == name {
                survey.store = Some(name);
            }
        } else if file == RECEIPTS {
            survey.receipts |= file == name;
        } else if let Some(pool) = parse_ledger_file(file) {
            if file == name {
                survey.pools.entry(pool).or_default();
            }
        } else {
            survey.others.push(name);
        }
    }
    Ok(survey)
}

impl PoolPaths {
    /// Returns the paths of a pool in a folder.
    pub fn new(folder: &Path, pool: &PoolName) -> Self {
        Self { folder: folder.to_owned(), pool: pool.clone() }
    }

    pub fn pool(&self) -> &PoolName {
        &self.pool
    }

    /// Returns the folder that contains all of the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the path of `used_numbers_<pool>.db`.
    pub fn ledger(&self) -> PathBuf {
        self.folder.join(format!("used_numbers_{}.db", self.pool))
    }

    /// Returns the name `<pool>_shard_<i>.db`, which responses contain as well.
    pub fn shard_name(&self, shard: ShardIndex) -> String {
        shard_name(&self.pool, shard)
    }

    /// Returns the path of the file that is served.
    pub fn live(&self, shard: ShardIndex) -> PathBuf {
        self.folder.join(self.shard_name(shard))
    }

    /// Returns the path of the next generation, which is complete and in the ledger.
    pub fn standby(&self, shard: ShardIndex) -> PathBuf {
        self.folder.join(format!("{}.next", self.shard_name(shard)))
    }

    /// Returns the path of a generation that is being built.
    pub fn unfinished(&self, shard: ShardIndex) -> PathBuf {
        self.folder.join(format!("{}.tmp", self.shard_name(shard)))
    }

    /// Moves the standby generation into the place of the live file, which must be used up and closed if it
    /// exists. Can be repeated after an error.
    pub fn install_standby(&self, shard: ShardIndex) -> Result<(), FileError> {
        let (live, standby) = (self.live(shard), self.standby(shard));
        if files::length_bytes(&standby)?.is_some() {
            // The file is removed before its log, which may contain the last leases. The log is removed
            // before another file gets the name, since SQLite would replay it into that file.
            files::remove(&live)?;
            files::sync_folder(&self.folder)?;
            self.remove_logs(&live)?;
            files::sync_folder(&self.folder)?;
            files::rename(&standby, &live)?;
        }
        files::sync_folder(&self.folder)
    }

    /// Renames a file that can't be trusted, with its logs, so that it is kept for inspection but never
    /// served. Returns its new path.
    pub fn set_aside(&self, file: &Path) -> Result<PathBuf, FileError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let aside = files::beside(file, &format!(".damaged-{}", now.as_millis()));
        for suffix in ["-wal", "-shm", ""] {
            let found = files::beside(file, suffix);
            if files::length_bytes(&found)?.is_some() {
                files::rename(&found, &files::beside(&aside, suffix))?;
            }
        }
        files::sync_folder(&self.folder)?;
        Ok(aside)
    }

    fn remove_logs(&self, file: &Path) -> Result<(), FileError> {
        for suffix in ["-wal", "-shm"] {
            files::remove(&files::beside(file, suffix))?;
        }
        Ok(())
    }
}

/// Returns the name `<pool>_shard_<i>.db`.
pub(crate) fn shard_name(pool: &PoolName, shard: ShardIndex) -> String {
    format!("{pool}_shard_{}.db", shard.0)
}

/// Returns the modes that a file of this name belongs to. The list is empty if the file is not a record of
/// numbers.
pub(super) fn owners_of_file(name: &str) -> &'static [Mode] {
    let is_ledger = name.starts_with("used_numbers_") && name.ends_with(".db");
    let is_shard = name.contains("_shard_") && (name.ends_with(".db") || name.ends_with(".next"));
    match name {
        FLEET_RECORD | RECEIPTS => &[Mode::Sharded],
        JSON_STORE => &[Mode::Json, Mode::Simple],
        TABLE_STORE => &[Mode::Sqlite],
        _ if is_ledger || is_shard => &[Mode::Sharded],
        _ => &[],
    }
}

/// Returns the pool and the index of the shard that a file of this name belongs to.
pub(crate) fn parse_shard_file(name: &str) -> Option<(PoolName, ShardIndex)> {
    let endings = [".db", ".db.next", ".db.tmp"];
    let shard = endings.iter().find_map(|ending| name.strip_suffix(ending))?;
    // Split from the right, because the pool's own name may end in "_shard".
    let (pool, digits) = shard.rsplit_once("_shard_")?;
    let index: u16 = digits.parse().ok()?;
    // A shard is never named "007" or "+7".
    (index.to_string() == digits).then_some((PoolName::new(pool)?, ShardIndex(index)))
}

/// Returns the pool whose ledger has this name.
fn parse_ledger_file(name: &str) -> Option<PoolName> {
    PoolName::new(name.strip_prefix("used_numbers_")?.strip_suffix(".db")?)
}

#[cfg(test)]
mod tests;
