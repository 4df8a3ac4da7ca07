//! The data folder: who may use it, what its files are called, and what a start makes of what the
//! last process left. Knows nothing of requests or of filling shards.
//!
//! A shard has up to three files: `.db` is live, `.db.next` its standby generation, `.db.tmp` one
//! that is being built. A `.tmp` becomes a standby only if the ledger has its batch; a file that the
//! ledger does not expect where it lies is never served.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::{info, warn};

use crate::batch::{Batch, Generation, ShardIndex};
use crate::config::{Mode, PoolConfig, PoolName};
use crate::files::{self, FileError, Lock, LockError};
use crate::ledger::{Ledger, LedgerError, RESTORE, StratumKey};
use crate::shard::{self, Label, ShardError};

/// The one file of the modes simple and json.
pub const JSON_STORE: &str = "used_numbers.json";

/// The one file of the mode sqlite.
pub const TABLE_STORE: &str = "random_numbers.db";

/// What a folder knows of its place in a fleet.
pub const FLEET_RECORD: &str = "fleet.json";

/// Comes with the folder in a clone of the repository, and has no numbers.
const README: &str = "README.md";

/// Why a folder can't be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process uses it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another mode has handed out numbers from here.
    #[error(
        "{folder} holds {file} of the mode {owner}, and the mode {mode} can't know which numbers were \
         handed out from there: use another folder with --data-dir, or --mode {owner}"
    )]
    OtherMode {
        /// The folder.
        folder: PathBuf,
        /// The file.
        file: String,
        /// Whose file that is.
        owner: Mode,
        /// The mode that was to start.
        mode: Mode,
    },
    /// It takes part in a fleet.
    #[error(
        "{folder} takes part in a fleet ({FLEET_RECORD}), and nothing is said of one: what it holds may \
         be handed out elsewhere. Put [fleet] into the settings, or use another folder with --data-dir"
    )]
    InFleet {
        /// The folder.
        folder: PathBuf,
    },
    /// The ledger can't be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// There are shards and no ledger.
    #[error("the ledger {ledger} is missing, but its shards are here ({shard}). {RESTORE}")]
    LedgerMissing {
        /// Where it should be.
        ledger: PathBuf,
        /// One of the shards.
        shard: String,
    },
    /// A shard that may hold numbers which were handed out before.
    #[error("the shard {shard} can't be served: {problem}")]
    Unexpected {
        /// The file.
        shard: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A shard can't be read just now, for a cause that lies outside it.
    #[error("the shard {shard} can't be opened: {source}")]
    Shard {
        /// The file.
        shard: PathBuf,
        /// The cause.
        source: ShardError,
    },
}

/// What an instance of a fleet may draw from a pool.
#[derive(Debug)]
pub struct Share {
    /// The secret by which all of them sort values into strata.
    pub key: StratumKey,
    /// The strata that are this instance's.
    pub strata: Vec<u16>,
}

/// A data folder, held by this process until dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    _lock: Lock,
}

/// The files of one pool.
#[derive(Clone, Debug)]
pub struct PoolPaths {
    folder: PathBuf,
    pool: PoolName,
}

/// What a start found of a pool.
#[derive(Debug)]
pub struct PoolFiles {
    /// Where its files are.
    pub paths: PoolPaths,
    /// Its ledger.
    pub ledger: Ledger,
    /// Its shards: at least as many as are configured.
    pub shards: Vec<ShardFiles>,
}

/// What a start found of a shard.
#[derive(Debug)]
pub struct ShardFiles {
    /// Which one.
    pub index: ShardIndex,
    /// The live file's label; `None` where there is no live file.
    pub live: Option<Label>,
    /// The label of the standby generation, where one lies ready.
    pub standby: Option<Label>,
    /// Whether this start set its live file aside as damaged.
    pub damaged: bool,
}

impl Folder {
    /// Creates the folder where it is missing, and locks it.
    ///
    /// # Errors
    /// [`FolderError::Lock`]; [`FolderError::OtherMode`] when it is another mode's;
    /// [`FolderError::InFleet`] when it is a fleet's, and `in_fleet` is not.
    pub fn open(path: &Path, mode: Mode, in_fleet: bool) -> Result<Self, FolderError> {
        let lock = files::lock(path)?;
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

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a pool's ledger, or creates one in a folder without shards, and makes sense of the
    /// shards' files: adopts or removes unfinished builds, ends what a crash left in use, sets
    /// damaged files aside. With a share, the ledger draws from nothing else.
    ///
    /// # Errors
    /// [`FolderError`] when a file is there that could lead to a repeat.
    pub fn open_pool(
        &self,
        config: &PoolConfig,
        share: Option<&Share>,
    ) -> Result<PoolFiles, FolderError> {
        let paths = PoolPaths::new(&self.path, &config.name);
        let found: Vec<ShardIndex> = files::list(&self.path)?
            .iter()
            .filter_map(|name| shard_of_file(&config.name, name))
            .collect();
        let mut ledger = open_ledger(&paths, config, found.first(), share)?;
        if let Some(share) = share {
            ledger.hold(&share.strata)?;
        }
        let mut indexes: Vec<ShardIndex> =
            (0..config.shards).map(ShardIndex).chain(found).collect();
        indexes.sort_unstable();
        indexes.dedup();
        let shards = indexes
            .into_iter()
            .map(|index| open_shard(&paths, &mut ledger, index))
            .collect::<Result<_, _>>()?;
        Ok(PoolFiles { paths, ledger, shards })
    }

    /// Renames all of the folder's data, so that it is kept for people and never served. `fleet.json`, which
    /// says so, is renamed last: a start after a crash in between does the rest.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn set_all_aside(&self, ending: &str) -> Result<(), FileError> {
        let is_data = |name: &String| {
            let file = name.trim_end_matches("-wal").trim_end_matches("-shm");
            !owners_of_file(file).is_empty() || file.ends_with(".db.tmp")
        };
        let mut names: Vec<String> = files::list(&self.path)?.into_iter().filter(is_data).collect();
        names.sort_unstable_by_key(|name| name == FLEET_RECORD);
        for name in names {
            // A log stays its file's.
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

/// What the names in a folder say, before any file is opened.
#[derive(Debug, Default)]
pub struct Survey {
    /// Each pool that has a ledger or a shard, with the shards that have a file.
    pub pools: BTreeMap<PoolName, BTreeSet<ShardIndex>>,
    /// The store of a mode below sharded.
    pub store: Option<String>,
    /// Files that were set aside as damaged, or as an old copy.
    pub set_aside: Vec<String>,
    /// Files that are no data of ours.
    pub others: Vec<String>,
}

/// Sorts the files of a folder by their names.
///
/// # Errors
/// [`FileError`].
pub fn survey(folder: &Path) -> Result<Survey, FileError> {
    let mut survey = Survey::default();
    for name in files::list(folder)? {
        // What belongs to a file beside it.
        let is_beside = name.ends_with("-wal") || name.ends_with("-shm");
        if name == files::LOCK || name == FLEET_RECORD || is_beside {
            continue;
        }
        let ledger = name.strip_prefix("used_numbers_").and_then(|rest| rest.split_once('.'));
        let shard = name.split_once("_shard_").and_then(|(pool, _)| PoolName::new(pool));
        if name.contains(".damaged-") || name.contains(".stale-") {
            survey.set_aside.push(name);
        } else if name == JSON_STORE || name == TABLE_STORE {
            survey.store = Some(name);
        } else if let Some((pool, "db")) = ledger
            && let Some(pool) = PoolName::new(pool)
        {
            survey.pools.entry(pool).or_default();
        } else if let Some(pool) = shard
            && let Some(index) = shard_of_file(&pool, &name)
        {
            survey.pools.entry(pool).or_default().insert(index);
        } else {
            survey.others.push(name);
        }
    }
    Ok(survey)
}

impl PoolPaths {
    /// Those of a pool in a folder.
    #[must_use]
    pub fn new(folder: &Path, pool: &PoolName) -> Self {
        Self { folder: folder.to_owned(), pool: pool.clone() }
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &PoolName {
        &self.pool
    }

    /// The folder that all of them lie in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// `used_numbers_<pool>.db`
    #[must_use]
    pub fn ledger(&self) -> PathBuf {
        self.folder.join(format!("used_numbers_{}.db", self.pool))
    }

    /// `<pool>_shard_<i>.db`, which is also what callers see.
    #[must_use]
    pub fn shard_name(&self, shard: ShardIndex) -> String {
        format!("{}_shard_{}.db", self.pool, shard.0)
    }

    /// The file that is served.
    #[must_use]
    pub fn live(&self, shard: ShardIndex) -> PathBuf {
        self.folder.join(self.shard_name(shard))
    }

    /// The next generation, complete and in the ledger.
    #[must_use]
    pub fn standby(&self, shard: ShardIndex) -> PathBuf {
        self.folder.join(format!("{}.next", self.shard_name(shard)))
    }

    /// A generation that is being built.
    #[must_use]
    pub fn unfinished(&self, shard: ShardIndex) -> PathBuf {
        self.folder.join(format!("{}.tmp", self.shard_name(shard)))
    }

    /// Takes the standby generation into the live file's place. The live file, if any, is closed.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn install_standby(&self, shard: ShardIndex) -> Result<(), FileError> {
        let live = self.live(shard);
        // A log that outlived its file would be replayed into the next one.
        self.remove_logs(&live)?;
        files::sync_folder(&self.folder)?;
        match files::rename(&self.standby(shard), &live) {
            // An earlier try got that far, and failed later. If not, the file that is there is still
            // marked as in use, and is not opened.
            Err(error) if error.source.kind() == ErrorKind::NotFound => {}
            other => other?,
        }
        files::sync_folder(&self.folder)
    }

    /// Renames a file that can't be trusted, with its logs, so that it is kept for people and never
    /// served. Answers with its new name.
    ///
    /// # Errors
    /// [`FileError`].
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

/// Says what others on this machine may read, and leaves it so: somebody may have meant it.
fn warn_of_wide_modes(folder: &Path, names: &[String]) {
    let shown = folder.display();
    if let Some(mode) = files::wide_mode(folder) {
        warn!(
            folder = %shown, mode = format!("{mode:04o}"),
            "others than its owner may use the data folder; to end that: chmod 700 {shown}"
        );
    }
    let paths = names.iter().filter(|&name| name != README).map(|name| folder.join(name));
    let wide: Vec<_> = paths.filter_map(|path| Some((files::wide_mode(&path)?, path))).collect();
    if let [(mode, first), others @ ..] = &*wide {
        warn!(
            file = %first.display(), mode = format!("{mode:04o}"), and_others = others.len(),
            "others than their owner may use files with numbers; to end that: chmod 600 {shown}/*"
        );
    }
}

/// The modes that know which numbers a file of this name stands for; none when it stands for none.
fn owners_of_file(name: &str) -> &'static [Mode] {
    let is_ledger = name.starts_with("used_numbers_") && name.ends_with(".db");
    let is_shard = name.contains("_shard_") && (name.ends_with(".db") || name.ends_with(".next"));
    match name {
        FLEET_RECORD => &[Mode::Sharded],
        JSON_STORE => &[Mode::Json, Mode::Simple],
        TABLE_STORE => &[Mode::Sqlite],
        _ if is_ledger || is_shard => &[Mode::Sharded],
        _ => &[],
    }
}

/// The shard that a file of this name belongs to, be it live, standby or unfinished.
fn shard_of_file(pool: &PoolName, name: &str) -> Option<ShardIndex> {
    let rest = name.strip_prefix(pool.as_str())?.strip_prefix("_shard_")?;
    let (index, ending) = rest.split_once('.')?;
    let ours = matches!(ending, "db" | "db.next" | "db.tmp");
    index.parse().ok().filter(|_| ours).map(ShardIndex)
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

fn open_shard(
    paths: &PoolPaths,
    ledger: &mut Ledger,
    index: ShardIndex,
) -> Result<ShardFiles, FolderError> {
    adopt(paths, ledger, index)?;
    let standby = open_standby(paths, ledger, index)?;
    let found = files::length_bytes(&paths.live(index))?.is_some();
    let live = open_live(paths, ledger, index, standby.as_ref())?;
    if let Some(live) = &live {
        refuse_stale(paths, ledger, live, standby.as_ref())?;
    }
    let damaged = found && live.is_none();
    Ok(ShardFiles { index, live, standby, damaged })
}

/// Makes an unfinished build the shard's standby if the ledger has its batch, and removes it if not.
///
/// # Errors
/// [`FolderError`] when that could not be found out or done.
pub fn adopt(paths: &PoolPaths, ledger: &Ledger, index: ShardIndex) -> Result<bool, FolderError> {
    let unfinished = paths.unfinished(index);
    if files::length_bytes(&unfinished)?.is_none() {
        return Ok(false);
    }
    // Invariant: a build is complete and synced before its batch is in the ledger.
    let label = shard::read_label(&unfinished).ok();
    let known = match &label {
        Some(label) => expected(ledger, label)?.is_ok(),
        None => false,
    };
    let free = files::length_bytes(&paths.standby(index))?.is_none();
    if known && free {
        files::rename(&unfinished, &paths.standby(index))?;
        info!(pool = %paths.pool, shard = %paths.shard_name(index), "a complete build was adopted");
    } else {
        files::remove(&unfinished)?;
        info!(pool = %paths.pool, shard = %paths.shard_name(index), "an unfinished build was removed");
    }
    files::sync_folder(&paths.folder)?;
    Ok(known && free)
}

fn open_standby(
    paths: &PoolPaths,
    ledger: &mut Ledger,
    index: ShardIndex,
) -> Result<Option<Label>, FolderError> {
    let path = paths.standby(index);
    if files::length_bytes(&path)?.is_none() {
        return Ok(None);
    }
    match shard::read_label(&path) {
        Ok(label) => {
            refuse_unexpected(paths, ledger, index, &path, &label)?;
            Ok(Some(label))
        }
        Err(error) if error.is_transient() => {
            Err(FolderError::Shard { shard: path, source: error })
        }
        Err(error) => {
            // Its batch is the newest; one before it is the live file's.
            let batches = ledger.batches(index)?;
            let live = batches.first().filter(|_| batches.len() > 1);
            ledger.retire(index, live.map(|batch| batch.generation))?;
            give_up(paths, &path, &error)?;
            Ok(None)
        }
    }
}

fn open_live(
    paths: &PoolPaths,
    ledger: &mut Ledger,
    index: ShardIndex,
    standby: Option<&Label>,
) -> Result<Option<Label>, FolderError> {
    let path = paths.live(index);
    if files::length_bytes(&path)?.is_none() {
        return Ok(None);
    }
    match shard::recover(&path) {
        Ok((label, burned)) => {
            refuse_unexpected(paths, ledger, index, &path, &label)?;
            if burned > 0 {
                // First here, then there: a crash in between counts them twice, never not at all.
                ledger.add_burned(burned)?;
                warn!(
                    pool = %paths.pool, shard = %paths.shard_name(index), burned_at_most = burned,
                    "the last process did not stop gracefully: what it had leased and not handed \
                     out is burned"
                );
            }
            shard::end_use(&path).map_err(|source| FolderError::Shard { shard: path, source })?;
            Ok(Some(label))
        }
        Err(error) if error.is_transient() => {
            Err(FolderError::Shard { shard: path, source: error })
        }
        Err(error) => {
            ledger.retire(index, standby.map(|label| label.generation))?;
            give_up(paths, &path, &error)?;
            Ok(None)
        }
    }
}

fn give_up(paths: &PoolPaths, file: &Path, error: &ShardError) -> Result<(), FolderError> {
    let aside = paths.set_aside(file)?;
    warn!(
        pool = %paths.pool, shard = %file.display(), kept_as = %aside.display(), %error,
        "a damaged shard was set aside; its numbers will not come again"
    );
    Ok(())
}

/// The batch that a label speaks of, or why the ledger does not expect it.
fn expected(ledger: &Ledger, label: &Label) -> Result<Result<Batch, String>, LedgerError> {
    if label.ledger_id != ledger.id() {
        return Ok(Err(format!(
            "it belongs to the ledger {}, and the one here is {}. Move it away, or bring its ledger",
            label.ledger_id,
            ledger.id()
        )));
    }
    let Some(batch) = ledger.batch(label.batch)? else {
        return Ok(Err(format!(
            "the ledger does not have its batch {}: the ledger is an older copy. {RESTORE}",
            label.batch.0
        )));
    };
    let labelled = Batch {
        id: label.batch,
        shard: label.index,
        generation: label.generation,
        count: label.rows,
    };
    if batch != labelled {
        return Ok(Err(format!("the ledger has another batch {}: {batch:?}", label.batch.0)));
    }
    Ok(Ok(batch))
}

/// Refuses a file that the ledger does not expect where it lies.
///
/// # Errors
/// [`FolderError::Unexpected`], with what to do.
pub fn refuse_unexpected(
    paths: &PoolPaths,
    ledger: &Ledger,
    index: ShardIndex,
    path: &Path,
    label: &Label,
) -> Result<(), FolderError> {
    let refuse = |problem| Err(FolderError::Unexpected { shard: path.to_owned(), problem });
    if let Err(problem) = expected(ledger, label)? {
        return refuse(problem);
    }
    if label.pool != paths.pool || label.index != index {
        return refuse(format!(
            "it is shard {} of the pool {}, renamed or copied: two shards of one batch would hand out \
             the same numbers. Move it away",
            label.index.0, label.pool
        ));
    }
    if !ledger.batches(index)?.iter().any(|batch| batch.id == label.batch) {
        return refuse(old_copy(label.generation));
    }
    Ok(())
}

/// A live file is the newest generation, or the newest lies beside it as a standby. If it is
/// neither, the file was replaced before, and this is a copy from then.
///
/// # Errors
/// [`FolderError::Unexpected`], with what to do.
pub fn refuse_stale(
    paths: &PoolPaths,
    ledger: &Ledger,
    live: &Label,
    standby: Option<&Label>,
) -> Result<(), FolderError> {
    let newest = ledger.batches(live.index)?.last().map(|batch| batch.generation);
    let here = standby.unwrap_or(live).generation;
    // A standby that was put in place is gone: one that is still there was copied before.
    let follows = standby.is_none_or(|standby| standby.generation > live.generation);
    if newest == Some(here) && follows {
        return Ok(());
    }
    let shard = paths.live(live.index);
    Err(FolderError::Unexpected { shard, problem: old_copy(live.generation) })
}

fn old_copy(generation: Generation) -> String {
    format!(
        "it is generation {}, which the ledger knows to be replaced: an old copy does not know which \
         of its numbers were issued since. Delete this file; a fresh one will be built",
        generation.0
    )
}
