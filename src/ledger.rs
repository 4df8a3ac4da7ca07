//! The ledger of one pool: every value that ever entered a shard. It alone decides whether a value is unique.
//! Knows nothing of shard files, async or HTTP.
//!
//! A keyed permutation gives every value of the range an index, and a stratum is an interval of indexes. The
//! rows are kept in the order of (stratum, value). A draw chooses strata at random, as few as its own rows
//! fill. So it touches a part of the B-tree that is about as large as what it adds, however many values the
//! ledger has. Without the secret key, the values of a stratum can't be told from values chosen uniformly
//! from the range.

mod audit;
mod draw;
mod growth;
mod import;
mod permutation;
mod strata;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SysRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use siphasher::sip::SipHasher13;
use uuid::Uuid;

pub(crate) use self::audit::Drawn;
pub(crate) use self::import::Entered;
pub(crate) use self::strata::{PARTITIONS, StratumKey};
use self::strata::{Strata, Tallies};
use crate::batch::{Batch, BatchId, Generation, ShardIndex, Token};
use crate::files;
use crate::space::{CodeFormat, Space, Value};
use crate::sqlite::{self, Checkpoint, ContentError, Fault, Format, Found, rusqlite};

/// "TBLG", and the version of the tables below.
const LEDGER_FILE: Format = Format { name: "a ledger", application_id: 0x5442_4c47, version: 5 };

const CREATE: &str = "
    CREATE TABLE ledger (
        id         TEXT    NOT NULL, -- UUID; each shard records that of its ledger
        hash_key   BLOB    NOT NULL, -- 16 secret bytes, the key of the permutation
        min        INTEGER NOT NULL,
        max        INTEGER NOT NULL,
        decimals   INTEGER NOT NULL,
        pattern    TEXT,             -- with alphabet and check: the format of the codes, if they are codes
        alphabet   TEXT,
        code_check TEXT,
        count      INTEGER NOT NULL, -- number of rows in used_numbers
        burned     INTEGER NOT NULL, -- upper bound of the numbers lost to crashes and damage
        created_at TEXT    NOT NULL,
        checksum   INTEGER NOT NULL  -- over the id, the key and the range
    ) STRICT;
    CREATE TABLE strata (             -- strata with values
        stratum    INTEGER PRIMARY KEY,
        count      INTEGER NOT NULL, -- number of its values in used_numbers
        digest     INTEGER NOT NULL  -- sum of their hashes, modulo 2^64
    ) STRICT;
    CREATE TABLE batches (            -- the draws and the imports
        id         INTEGER PRIMARY KEY,
        shard      INTEGER NOT NULL, -- -1 for an import
        generation INTEGER NOT NULL,
        count      INTEGER NOT NULL,
        drawn_at   TEXT    NOT NULL,
        retired_at TEXT,              -- since then its file must not be served
        token      INTEGER NOT NULL DEFAULT 0, -- from the last start; the shard's file has the same
        next_token INTEGER,           -- from a start in progress; the file has this token or the last
        closed     INTEGER NOT NULL DEFAULT 0, -- 1 after a graceful stop, or once an import is complete
        UNIQUE (shard, generation)
    ) STRICT;
    CREATE INDEX served ON batches (shard) WHERE retired_at IS NULL;
    CREATE TABLE used_numbers (
        stratum    INTEGER NOT NULL,
        value      INTEGER NOT NULL,
        batch      INTEGER NOT NULL,
        PRIMARY KEY (stratum, value)
    ) STRICT, WITHOUT ROWID;";

/// The `shard` of the batches that were imported. No file is built from them.
const IMPORTS: i64 = -1;

/// Average rows per stratum at which a ledger that draws alone opens more partitions: 5 pages.
const STRATUM_ROWS: u64 = 1 << 10;

const INSERT_LEDGER: &str = "INSERT INTO ledger
    VALUES (?1, ?2, ?3, ?4, ?5, ?7, ?8, ?9, 0, 0, strftime('%FT%TZ', 'now'), ?6)";
const SELECT_LEDGER: &str = "SELECT id, hash_key, min, max, decimals, count, burned, checksum, pattern, alphabet, code_check FROM ledger";
const UPDATE_RANGE: &str = "UPDATE ledger SET min = ?1, max = ?2, checksum = ?3";
const ADD_BURNED: &str = "UPDATE ledger SET burned = burned + ?1";
const SELECT_BATCHES: &str = "SELECT id, generation, count FROM batches
    WHERE shard = ?1 AND retired_at IS NULL ORDER BY generation";
const SELECT_BATCH: &str =
    "SELECT shard, generation, count FROM batches WHERE id = ?1 AND shard >= 0";
const SELECT_OPENING: &str = "SELECT token, next_token, closed FROM batches WHERE id = ?1";
const BEGIN_OPENING: &str = "UPDATE batches SET token = ?2, next_token = ?3 WHERE id = ?1";
const END_OPENINGS: &str = "UPDATE batches SET token = next_token, next_token = NULL, closed = 0
    WHERE next_token IS NOT NULL AND retired_at IS NULL";
const SET_TOKEN: &str =
    "UPDATE batches SET token = ?2, next_token = NULL, closed = 0 WHERE id = ?1";
const SET_CLOSED: &str = "UPDATE batches SET closed = 1 WHERE shard = ?1 AND generation = ?2";
const RETIRE_BATCHES: &str = "UPDATE batches SET retired_at = strftime('%FT%TZ', 'now')
    WHERE shard = ?1 AND retired_at IS NULL AND generation IS NOT ?2";

/// The advice for a lost ledger.
pub(crate) const RESTORE: &str = "Without the ledger, it is unknown which numbers were issued: restore it \
    from a backup together with the shards of the same time, or move this pool's shards away and start \
    a new number space under another pool name";

const SELECT_NEWEST: &str = "SELECT max(generation) FROM batches WHERE shard = ?1";
const REINSTATE_BATCH: &str =
    "UPDATE batches SET retired_at = NULL WHERE shard = ?1 AND generation = ?2";
const SELECT_SHARDS: &str = "SELECT DISTINCT shard FROM batches WHERE shard >= 0 ORDER BY shard";
const SELECT_LATER: &str =
    "SELECT coalesce(sum(count), 0) FROM batches WHERE shard = ?1 AND generation > ?2";

/// The reason that a ledger could not be opened or drawn from.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// SQLite's own error.
    #[error("ledger {path}: {source}")]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// The file is not a ledger, or is incomplete or inconsistent.
    #[error("ledger {path} is damaged: {problem}. {RESTORE}")]
    Damaged { path: PathBuf, problem: String },
    /// Another version of tombola wrote it.
    #[error(
        "ledger {path} is of another version: {problem}. Start that version, or use another folder \
         with --data-dir and another range: a new ledger does not know which numbers were issued"
    )]
    OtherVersion {
        path: PathBuf,
        /// The file's version and this program's.
        problem: ContentError,
    },
    /// The ledger has numbers that are not in the configured range.
    #[error(
        "ledger {path} is for {ledger}, but the configuration says {configured}. A range can grow, but \
         not shrink or change its decimals or codes: use another pool name or another folder"
    )]
    OtherRange { path: PathBuf, ledger: String, configured: String },
    /// The [`Progress`](crate::batch::Progress) callback stopped the draw. Nothing was changed.
    #[error("the draw was cancelled")]
    Cancelled,
}

/// The ledger's record of the last opening of a batch's live file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// The token of the last start.
    pub token: Token,
    /// The token of a start that did not complete. The file may already have it.
    pub next: Option<Token>,
    /// Whether the file was closed gracefully after the last start.
    pub closed: bool,
}

impl Opening {
    /// Returns whether a file is the one that was opened last, as opposed to an older copy of it.
    pub fn admits(&self, token: Token, in_use: bool) -> bool {
        Some(token) == self.next || (token == self.token && !(self.closed && in_use))
    }
}

/// An open ledger.
#[derive(Debug)]
pub struct Ledger {
    connection: Connection,
    state: State,
}

/// Everything that a draw needs except the connection.
#[derive(Debug)]
struct State {
    path: PathBuf,
    id: Uuid,
    strata: Strata,
    tallies: Tallies,
    count: u64,
    burned: u64,
    /// The partitions to draw from. A ledger that draws alone opens them as it needs them, and leaves the
    /// others to instances that may join later.
    open: BTreeSet<u16>,
    /// Whether other instances draw from the same range. If so, only the partitions that it
    /// [holds](Ledger::hold) are open.
    shared: bool,
    /// The indexes of the values that must be [entered](Ledger::set_used) before a draw, in ascending order.
    used: Vec<u64>,
    /// The partitions whose used values are entered.
    entered: BTreeSet<u16>,
    /// The number of imported values that were in no shard.
    imported: u64,
    rng: ChaCha20Rng,
}

impl Ledger {
    /// Creates an empty ledger with its own id and key.
    ///
    /// # Errors
    /// Returns [`LedgerError`] if the file can't be written. An incomplete ledger never appears at `path`.
    pub fn create(path: &Path, space: &Space) -> Result<Self, LedgerError> {
        Self::create_with(path, space, StratumKey::random())
    }

    /// Creates an empty ledger with the given key, and therefore with the same strata as other ledgers with
    /// this key.
    pub fn create_with(path: &Path, space: &Space, key: StratumKey) -> Result<Self, LedgerError> {
        let unfinished = path.with_extension("db.tmp");
        files::create(&unfinished)?;
        sqlite::open_for_build(&unfinished)
            .and_then(|mut connection| fill_empty(&mut connection, space, key))
            .map_err(|source| LedgerError::Sqlite { path: unfinished.clone(), source })?;
        files::sync_file(&unfinished)?;
        files::rename_durably(&unfinished, path)?;
        Self::open(path, space)
    }

    /// Opens a ledger for a range, which may be larger than the ledger's. The ledger then grows.
    ///
    /// # Errors
    /// Returns [`LedgerError::Damaged`] if the file is not an intact ledger, and [`LedgerError::OtherRange`]
    /// if the ledger's range is not part of `space`.
    pub fn open(path: &Path, space: &Space) -> Result<Self, LedgerError> {
        match Self::open_once(path, space) {
            Err(LedgerError::Damaged { .. }) => {
                sqlite::read_through(path)?;
                Self::open_once(path, space)
            }
            opened => opened,
        }
    }

    fn open_once(path: &Path, space: &Space) -> Result<Self, LedgerError> {
        // Invariant: what is read from the ledger is on the disk. Otherwise a batch whose sync failed could
        // be served, disappear in the next power loss, and be drawn again.
        let failed = |error| LedgerError::from_content(path, error).proven();
        let mut connection = Found::new(path).secure()?.open().map_err(failed)?.into_connection();
        let mut state = read_state(path, &connection)?;
        connection.set_transaction_behavior(TransactionBehavior::Immediate);
        if state.space() != space {
            if !space.covers(state.space()) {
                return Err(LedgerError::OtherRange {
                    path: path.to_owned(),
                    ledger: state.space().to_string(),
                    configured: space.to_string(),
                });
            }
            state.grow(&mut connection, space)?;
        }
        Ok(Self { connection, state })
    }

    /// Opens a ledger for its own range.
    pub fn open_as_it_is(path: &Path) -> Result<Self, LedgerError> {
        let space = Self::open_to_look(path)?.space().clone();
        Self::open(path, &space)
    }

    /// Opens a ledger in this process's locked folder, for its own range and only to read it.
    ///
    /// # Errors
    /// Returns [`LedgerError::Damaged`] if the file is not an intact ledger.
    pub fn open_to_look(path: &Path) -> Result<Self, LedgerError> {
        let connection =
            sqlite::open_to_look(path).map_err(|source| LedgerError::from_sqlite(path, source))?;
        let state = read_state(path, &connection)?;
        Ok(Self { connection, state })
    }

    /// Returns the ledger's id, which its shards record.
    pub fn id(&self) -> Uuid {
        self.state.id
    }

    /// Returns the range that the ledger draws from.
    pub fn space(&self) -> &Space {
        self.state.space()
    }

    /// Returns the secret key of the permutation.
    pub fn key(&self) -> StratumKey {
        self.state.strata.key()
    }

    /// Returns the partitions that contain values of the ledger, in ascending order.
    pub fn partitions(&self) -> Vec<u16> {
        let State { tallies, strata, .. } = &self.state;
        let mut partitions: Vec<u16> =
            tallies.iter().map(|(stratum, _)| strata.partition_of(stratum)).collect();
        partitions.dedup();
        partitions
    }

    /// Restricts draws to these partitions, since other instances draw from the rest of the range.
    pub fn hold(&mut self, partitions: &[u16]) {
        self.state.open = partitions.iter().copied().collect();
        self.state.shared = true;
    }

    /// Returns the number of additional partitions that should be claimed ahead of need, so that at most half
    /// of the held values are used after this draw of `rows` values and another one like it. Returns at least
    /// one if everything is used.
    pub fn partitions_wanted(&self, rows: u64) -> usize {
        let wanted =
            self.state.partitions_for(self.state.count.saturating_add(rows.saturating_mul(2)));
        wanted.saturating_sub(self.state.open.len()).max(usize::from(self.is_exhausted()))
    }

    /// Returns the number of values that ever entered a shard.
    pub fn count(&self) -> u64 {
        self.state.count
    }

    /// Returns the number of imported values that were in no shard.
    pub(crate) fn imported_count(&self) -> u64 {
        self.state.imported
    }

    /// Returns an upper bound of the numbers that crashes and damage have burned.
    pub fn burned(&self) -> u64 {
        self.state.burned
    }

    /// Returns the size of the ledger's file and log in bytes.
    pub fn size_bytes(&self) -> Result<u64, files::FileError> {
        let path = &self.state.path;
        let log = files::length_bytes(&sqlite::wal_of(path))?.unwrap_or(0);
        Ok(files::length_bytes(path)?.unwrap_or(0) + log)
    }

    /// Returns whether the ledger contains every value that it may draw.
    pub fn is_exhausted(&self) -> bool {
        let State { count, shared, .. } = self.state;
        count >= if shared { self.state.open_values() } else { self.state.space().size() }
    }

    /// Writes the log back into the file and truncates it, so that its space is freed, including that of a
    /// draw that was not committed.
    ///
    /// # Errors
    /// Returns [`LedgerError`], for example if another process is reading the ledger. It does not wait for
    /// that process.
    pub fn cut_log(&mut self) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        let cut = connection
            .busy_timeout(Duration::ZERO)
            .and_then(|()| sqlite::checkpoint(connection, Checkpoint::Truncate));
        connection
            .busy_timeout(sqlite::BUSY_TIMEOUT)
            .and(cut)
            .map_err(|source| state.failed(source))
    }

    /// Returns the draw with this id. An import is none.
    pub fn batch(&self, id: BatchId) -> Result<Option<Batch>, LedgerError> {
        self.connection
            .prepare_cached(SELECT_BATCH)
            .and_then(|mut select| {
                select
                    .query_row([id.0], |row| {
                        Ok(Batch {
                            id,
                            shard: ShardIndex(row.get(0)?),
                            generation: Generation(row.get(1)?),
                            count: row.get(2)?,
                        })
                    })
                    .optional()
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Returns the batches of a shard whose files may still be served, oldest first.
    pub fn batches(&self, shard: ShardIndex) -> Result<Vec<Batch>, LedgerError> {
        self.connection
            .prepare_cached(SELECT_BATCHES)
            .and_then(|mut select| {
                select
                    .query_map([shard.0], |row| {
                        Ok(Batch {
                            id: BatchId(row.get(0)?),
                            shard,
                            generation: Generation(row.get(1)?),
                            count: row.get(2)?,
                        })
                    })?
                    .collect()
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Returns the newest generation of a shard, whether its file still exists or not.
    pub fn newest(&self, shard: ShardIndex) -> Result<Option<Generation>, LedgerError> {
        self.connection
            .query_row(SELECT_NEWEST, [shard.0], |row| row.get(0))
            .map(|newest: Option<i64>| newest.map(Generation))
            .map_err(|source| self.state.failed(source))
    }

    /// Marks all generations of a shard except `live` as retired, so that their files are never served again.
    pub fn retire(
        &mut self,
        shard: ShardIndex,
        live: Option<Generation>,
    ) -> Result<(), LedgerError> {
        retire(&self.connection, shard, live).map_err(|source| self.state.failed(source))
    }

    /// Returns the shards that were ever filled.
    pub fn shards(&self) -> Result<Vec<ShardIndex>, LedgerError> {
        self.connection
            .prepare(SELECT_SHARDS)
            .and_then(|mut select| {
                select.query_map([], |row| row.get(0).map(ShardIndex))?.collect()
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Allows the files of the given generations of a shard, and retires all others. This makes a copied
    /// ledger fit the copies of the shards, which are older. Returns the number of values in generations
    /// later than these.
    pub fn keep_only(
        &mut self,
        shard: ShardIndex,
        generations: &[Generation],
    ) -> Result<u64, LedgerError> {
        let newest = generations.iter().max().map_or(0, |generation| generation.0);
        retire(&self.connection, shard, None)
            .and_then(|()| {
                for generation in generations {
                    self.connection.execute(REINSTATE_BATCH, params![shard.0, generation.0])?;
                }
                self.connection.query_row(SELECT_LATER, params![shard.0, newest], |row| row.get(0))
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Returns the tokens that a batch's live file may have.
    pub fn opening(&self, id: BatchId) -> Result<Opening, LedgerError> {
        self.connection
            .prepare_cached(SELECT_OPENING)
            .and_then(|mut select| {
                select.query_row([id.0], |row| {
                    let (token, next): (_, Option<i64>) = (row.get(0)?, row.get(1)?);
                    Ok(Opening { token: Token(token), next: next.map(Token), closed: row.get(2)? })
                })
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Records that a start takes over the live files of these batches, each with the token that it has. They will
    /// get the token `next`. The last process burned up to `burned` of their numbers. If this process crashes
    /// before [`end_openings`](Self::end_openings), the next start may count them again.
    ///
    /// # Errors
    /// Returns [`LedgerError`]. The files must not be taken over then.
    pub fn begin_openings(
        &mut self,
        found: &[(BatchId, Token)],
        next: Token,
        burned: u64,
    ) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        let mut begin = || {
            let transaction = connection.transaction()?;
            for (id, found) in found {
                transaction.execute(BEGIN_OPENING, [id.0, found.0, next.0])?;
            }
            transaction.execute(ADD_BURNED, [burned])?;
            transaction.commit()
        };
        begin().map_err(|source| state.failed(source))?;
        state.burned += burned;
        Ok(())
    }

    /// Invalidates the tokens from before this start. All files that were taken over have their new tokens.
    pub fn end_openings(&mut self) -> Result<(), LedgerError> {
        self.connection
            .execute(END_OPENINGS, [])
            .map(drop)
            .map_err(|source| self.state.failed(source))
    }

    /// Makes `token` the only valid one for a batch's file.
    pub fn set_token(&mut self, id: BatchId, token: Token) -> Result<(), LedgerError> {
        self.connection
            .execute(SET_TOKEN, params![id.0, token.0])
            .map(drop)
            .map_err(|source| self.state.failed(source))
    }

    /// Records that the files of these generations were closed gracefully. From then on, a file that is
    /// marked as in use is recognised as an older copy.
    pub fn note_closed(&mut self, files: &[(ShardIndex, Generation)]) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        connection
            .transaction()
            .and_then(|transaction| {
                for (shard, generation) in files {
                    transaction.execute(SET_CLOSED, params![shard.0, generation.0])?;
                }
                transaction.commit()
            })
            .map_err(|source| state.failed(source))
    }

    /// Adds up to `count` lost numbers to the burned ones.
    pub fn add_burned(&mut self, count: u64) -> Result<(), LedgerError> {
        self.connection.execute(ADD_BURNED, [count]).map_err(|source| self.state.failed(source))?;
        self.state.burned += count;
        Ok(())
    }

    /// Returns whether the value ever entered a shard.
    pub fn contains(&self, value: Value) -> Result<bool, LedgerError> {
        self.batch_of(value).map(|batch| batch.is_some())
    }

    /// Checks that the ledger has this id and at least as many values: that it is the one that was open before,
    /// and not an older copy of it.
    ///
    /// # Errors
    /// Returns [`LedgerError::Damaged`] if it is not.
    pub fn check_continues(&self, id: Uuid, values: u64) -> Result<(), LedgerError> {
        let State { id: found, count, path, .. } = &self.state;
        if *found != id {
            return Err(damaged(
                path,
                format!("it is the ledger {found} now, and was {id} before"),
            ));
        }
        if *count < values {
            let problem = format!("it has {count} values, and had {values} before");
            return Err(damaged(path, problem));
        }
        Ok(())
    }

    /// Closes the file for a while: after its log was cut, so that the next opening has no log to copy. Returns the
    /// ledger if another process reads the log, which then can't be cut.
    pub fn rest(mut self) -> Option<Self> {
        match self.cut_log() {
            // An error is ignored, because everything is in the file, and the next opening reads it.
            Ok(()) => drop(self.close()),
            Err(error) if error.fault() == Fault::Passing => return Some(self),
            Err(_) => {}
        }
        None
    }

    /// Closes the file, after its log was written back and removed.
    pub fn close(self) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        sqlite::close(connection).map_err(|source| state.failed(source))
    }
}

impl State {
    fn space(&self) -> &Space {
        self.strata.space()
    }

    /// Returns the number of partitions that have twice as many values as `values`, on average.
    fn partitions_for(&self, values: u64) -> usize {
        let partitions =
            (2 * u128::from(values) * PARTITIONS as u128).div_ceil(self.space().size().into());
        partitions.clamp(1, PARTITIONS as u128) as usize
    }

    /// Opens partitions for a draw of `count` values if the ledger draws alone: enough that half of their
    /// values stay free and that each of their strata has few rows.
    fn open_for(&mut self, count: u64) {
        let used = self.count + count;
        let by_rows = used.div_ceil(STRATUM_ROWS * self.strata.per_partition());
        let target = self.partitions_for(used).max(by_rows.min(PARTITIONS as u64) as usize);
        if self.shared || self.open.len() >= target {
            return;
        }
        let mut closed: Vec<u16> =
            (0..PARTITIONS as u16).filter(|partition| !self.open.contains(partition)).collect();
        let (opened, _) = closed.partial_shuffle(&mut self.rng, target - self.open.len());
        self.open.extend(&*opened);
    }

    /// Opens all partitions if the ledger draws alone. Returns whether any were closed before.
    fn open_all(&mut self) -> bool {
        if self.shared || self.open.len() == PARTITIONS {
            return false;
        }
        self.open = (0..PARTITIONS as u16).collect();
        true
    }

    /// Returns the number of values in the open partitions, used or not.
    fn open_values(&self) -> u64 {
        let values = |&partition: &u16| {
            let indexes = self.strata.indexes(self.strata.of_partition(partition));
            indexes.end - indexes.start
        };
        self.open.iter().map(values).sum()
    }

    /// Grows the range, durably.
    fn grow(&mut self, connection: &mut Connection, space: &Space) -> Result<(), LedgerError> {
        let strata = Strata::new(space.clone(), self.strata.key());
        let mut grow = || {
            let transaction = connection.transaction()?;
            let tallies = growth::grow(&transaction, &self.strata, &self.tallies, &strata)?;
            let checksum = checksum(self.id, strata.key(), space);
            transaction.execute(UPDATE_RANGE, [space.min().0, space.max().0, checksum])?;
            transaction.commit()?;
            Ok(tallies)
        };
        let tallies = grow().map_err(|error| LedgerError::from_content(&self.path, error))?;
        (self.strata, self.tallies) = (strata, tallies);
        self.open_those_used();
        Ok(())
    }

    /// Opens the partitions that have values in the ledger.
    fn open_those_used(&mut self) {
        let partitions = self.tallies.iter().map(|(stratum, _)| self.strata.partition_of(stratum));
        self.open = partitions.collect();
    }

    fn failed(&self, source: rusqlite::Error) -> LedgerError {
        LedgerError::Sqlite { path: self.path.clone(), source }
    }
}

impl LedgerError {
    /// Returns the error as damage if it is about the content. Call it only after the whole file could be
    /// read.
    pub fn proven(self) -> Self {
        match self {
            Self::Sqlite { path, source } => Self::from_sqlite(&path, source),
            other => other,
        }
    }

    /// Converts an error that occurred while a ledger was opened.
    fn from_content(path: &Path, error: ContentError) -> Self {
        match error {
            ContentError::OtherVersion { .. } => {
                Self::OtherVersion { path: path.to_owned(), problem: error }
            }
            ContentError::Damaged(problem) => damaged(path, problem),
            ContentError::Sqlite(source) => Self::Sqlite { path: path.to_owned(), source },
            ContentError::File(error) => error.into(),
        }
    }

    fn from_sqlite(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match sqlite::fault(&source) {
            Fault::Content => Self::Damaged { path, problem: source.to_string() },
            Fault::Passing | Fault::Io => Self::Sqlite { path, source },
        }
    }

    /// Returns what the error means for the file.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Sqlite { source, .. } => sqlite::fault(source),
            Self::File(_) => Fault::Io,
            Self::Cancelled => Fault::Passing,
            Self::Damaged { .. } | Self::OtherVersion { .. } | Self::OtherRange { .. } => {
                Fault::Content
            }
        }
    }
}

/// Returns SipHash-1-3 of the ledger's id, key and range. It detects a changed key or range, which would move
/// every value to another stratum.
fn checksum(id: Uuid, key: StratumKey, space: &Space) -> i64 {
    let range = [space.min().0, space.max().0, space.decimals().into()].map(i64::to_le_bytes);
    let mut bytes = [id.as_bytes(), &key.to_bytes(), range.as_flattened()].concat();
    if let Some(format) = space.codes() {
        bytes.extend(format.to_string().bytes());
    }
    SipHasher13::new().hash(&bytes).cast_signed()
}

fn fill_empty(
    connection: &mut Connection,
    space: &Space,
    key: StratumKey,
) -> Result<(), rusqlite::Error> {
    let id = Uuid::new_v4();
    let transaction = connection.transaction()?;
    transaction.execute_batch(CREATE)?;
    transaction.execute_batch(&number_view(space))?;
    sqlite::mark_format(&transaction, &LEDGER_FILE)?;
    let codes = space.codes();
    transaction.execute(
        INSERT_LEDGER,
        params![
            id.to_string(),
            key.to_bytes(),
            space.min().0,
            space.max().0,
            space.decimals(),
            checksum(id, key, space),
            codes.map(CodeFormat::pattern),
            codes.map(CodeFormat::alphabet),
            codes.map(CodeFormat::check)
        ],
    )?;
    transaction.commit()
}

fn number_view(space: &Space) -> String {
    let number = sqlite::number_column("value", space);
    format!(
        "CREATE VIEW used (number, batch, drawn_at) AS
         SELECT {number}, batch, drawn_at FROM used_numbers JOIN batches ON batches.id = batch;"
    )
}

fn damaged(path: &Path, problem: String) -> LedgerError {
    LedgerError::Damaged { path: path.to_owned(), problem }
}

fn read_state(path: &Path, connection: &Connection) -> Result<State, LedgerError> {
    let damaged = |problem| damaged(path, problem);
    let failed = |source| LedgerError::from_sqlite(path, source);
    let unusable = |error| LedgerError::from_content(path, error).proven();
    sqlite::check_format(path, connection, &LEDGER_FILE).map_err(unusable)?;
    let (id, key, space, count, burned, sum): (_, _, _, u64, _, _) = connection
        .query_row(SELECT_LEDGER, [], |row| {
            let id: Uuid = row.get::<_, String>(0)?.parse().map_err(|error: uuid::Error| {
                rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error.into())
            })?;
            let key = StratumKey::from_bytes(row.get(1)?);
            let space = match row.get::<_, Option<String>>(8)? {
                None => Space::from_values(Value(row.get(2)?), Value(row.get(3)?), row.get(4)?),
                Some(pattern) => {
                    let (alphabet, check): (String, String) = (row.get(9)?, row.get(10)?);
                    CodeFormat::new(&pattern, &alphabet, &check).ok().map(Space::of_codes)
                }
            };
            Ok((id, key, space, row.get(5)?, row.get(6)?, row.get::<_, i64>(7)?))
        })
        .map_err(failed)?;
    let Some(space) = space.filter(|space| sum == checksum(id, key, space)) else {
        return Err(damaged("its id, key or range is not what it was created with".to_owned()));
    };
    let strata = Strata::new(space, key);
    let tallies = Tallies::read(connection, &strata).map_err(unusable)?;
    if tallies.count() != count {
        let in_strata = tallies.count();
        return Err(damaged(format!("it has {count} values, but its strata have {in_strata}")));
    }
    let rng = ChaCha20Rng::try_from_rng(&mut SysRng).expect("the operating system has randomness");
    let mut state = State {
        path: path.to_owned(),
        id,
        strata,
        tallies,
        count,
        burned,
        open: BTreeSet::new(),
        shared: false,
        used: Vec::new(),
        entered: BTreeSet::new(),
        imported: import::added(connection).map_err(failed)?,
        rng,
    };
    state.open_those_used();
    Ok(state)
}

fn retire(
    connection: &Connection,
    shard: ShardIndex,
    live: Option<Generation>,
) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached(RETIRE_BATCHES)?
        .execute(params![shard.0, live.map(|generation| generation.0)])
        .map(drop)
}

#[cfg(test)]
mod tests;
