//! The ledger of one pool: every value that ever entered a shard. Uniqueness is decided here and
//! nowhere else. Knows nothing of shard files, async or HTTP.
//!
//! Values are classed into strata by a keyed hash, and kept in the order of (stratum, value). A draw
//! takes its values from a random part of the strata, so that a batch lands in a part of the B-tree
//! and costs the same however many values the ledger has. Nobody outside can tell strata apart: the
//! key is secret, and the values of a stratum are uniform over the range.

mod audit;
mod draw;
mod strata;

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::rngs::SysRng;
use rand_chacha::ChaCha20Rng;
use rusqlite::types::Type;
use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};
use siphasher::sip::SipHasher13;
use uuid::Uuid;

pub use self::audit::Drawn;
pub use self::draw::{Draw, Draws};
use self::strata::OpenStrata;
pub use self::strata::{STRATA, StratumKey};
use crate::batch::{Batch, BatchId, Generation, ShardIndex, Step};
use crate::files;
use crate::space::{Space, Value};
use crate::sqlite::{self, Checkpoint, Format, FormatError, rusqlite};

/// "TBLG", and the version of the tables below.
const LEDGER_FILE: Format = Format { name: "a ledger", application_id: 0x5442_4c47, version: 2 };

/// A log that is longer is checkpointed before the next draw, 4 MB.
const LOG_BYTES_MAX: u64 = 4096 * sqlite::LOG_PAGES_MAX as u64;

const CREATE: &str = "
    CREATE TABLE ledger (
        id         TEXT    NOT NULL, -- UUID; each shard names the ledger that it belongs to
        hash_key   BLOB    NOT NULL, -- of the strata, 16 secret bytes
        min        INTEGER NOT NULL,
        max        INTEGER NOT NULL,
        decimals   INTEGER NOT NULL,
        count      INTEGER NOT NULL, -- rows of used_numbers
        burned     INTEGER NOT NULL, -- numbers lost to crashes and damage, at most
        created_at TEXT    NOT NULL,
        checksum   INTEGER NOT NULL  -- of the id, the key and the range
    ) STRICT;
    CREATE TABLE strata (             -- where this ledger may draw
        stratum    INTEGER PRIMARY KEY,
        opened_at  TEXT    NOT NULL,
        count      INTEGER NOT NULL, -- of its values in used_numbers
        digest     INTEGER NOT NULL  -- the sum of their hashes, modulo 2^64
    ) STRICT;
    CREATE TABLE batches (            -- which build drew what, and when
        id         INTEGER PRIMARY KEY,
        shard      INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        count      INTEGER NOT NULL,
        drawn_at   TEXT    NOT NULL,
        retired_at TEXT,              -- its file must not be served any more
        UNIQUE (shard, generation)
    ) STRICT;
    CREATE TABLE used_numbers (
        stratum    INTEGER NOT NULL,
        value      INTEGER NOT NULL,
        batch      INTEGER NOT NULL,
        PRIMARY KEY (stratum, value)
    ) STRICT, WITHOUT ROWID;";

const INSERT_LEDGER: &str = "INSERT INTO ledger
    VALUES (?1, ?2, ?3, ?4, ?5, 0, 0, strftime('%FT%TZ', 'now'), ?6)";
const SELECT_LEDGER: &str =
    "SELECT id, hash_key, min, max, decimals, count, burned, checksum FROM ledger";
const UPDATE_RANGE: &str = "UPDATE ledger SET min = ?1, max = ?2, checksum = ?3";
const ADD_BURNED: &str = "UPDATE ledger SET burned = burned + ?1";
const SELECT_BATCHES: &str = "SELECT id, generation, count FROM batches
    WHERE shard = ?1 AND retired_at IS NULL ORDER BY generation";
const SELECT_BATCH: &str = "SELECT shard, generation, count FROM batches WHERE id = ?1";
const RETIRE_BATCHES: &str = "UPDATE batches SET retired_at = strftime('%FT%TZ', 'now')
    WHERE shard = ?1 AND retired_at IS NULL AND generation IS NOT ?2";

/// What to do about a ledger that is lost.
pub const RESTORE: &str = "Without its ledger nobody can tell which numbers were issued: restore it \
    from a backup together with the shards of the same time, or move this pool's shards away and start \
    a new number space under another pool name";

const SELECT_NEWEST: &str = "SELECT max(generation) FROM batches WHERE shard = ?1";
const REINSTATE_BATCH: &str =
    "UPDATE batches SET retired_at = NULL WHERE shard = ?1 AND generation = ?2";
const SELECT_SHARDS: &str = "SELECT DISTINCT shard FROM batches ORDER BY shard";
const SELECT_LATER: &str =
    "SELECT coalesce(sum(count), 0) FROM batches WHERE shard = ?1 AND generation > ?2";

/// Why a ledger could not be opened or drawn from.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// SQLite's own error.
    #[error("ledger {path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The error.
        source: rusqlite::Error,
    },
    /// The file system refused.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// The file is not a ledger of this version, or not whole.
    #[error("ledger {path} is damaged: {problem}. {RESTORE}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        problem: String,
    },
    /// Another version of tombola wrote it.
    #[error(
        "ledger {path} is of another version: {problem}. Start that version, or use another folder \
         with --data-dir and another range: a new ledger does not know which numbers were issued"
    )]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Which versions these are.
        problem: FormatError,
    },
    /// The ledger holds numbers that the configured range does not have.
    #[error(
        "ledger {path} is for {ledger}, the configuration says {configured}: a range can grow, but \
         not shrink or change its decimals; use another pool name or another folder"
    )]
    OtherRange {
        /// The file.
        path: PathBuf,
        /// The ledger's range.
        ledger: String,
        /// The configured range.
        configured: String,
    },
    /// The [`Step`] ended the draw. Nothing was changed.
    #[error("the draw was cancelled")]
    Cancelled,
}

/// An open ledger.
#[derive(Debug)]
pub struct Ledger {
    connection: Connection,
    state: State,
}

/// All that a draw needs but the connection.
#[derive(Debug)]
struct State {
    path: PathBuf,
    id: Uuid,
    key: StratumKey,
    space: Space,
    count: u64,
    burned: u64,
    open: OpenStrata,
    /// Others draw from the same space: only what is [held](Ledger::hold) is open.
    shared: bool,
    /// Every value of a shared ledger's strata is in it.
    used_up: bool,
    rng: ChaCha20Rng,
    draws: Draws,
}

impl Ledger {
    /// Creates an empty ledger with an id and a hash key of its own.
    ///
    /// # Errors
    /// [`LedgerError`] when the file can't be written. A half-made ledger is never left at `path`.
    pub fn create(path: &Path, space: &Space) -> Result<Self, LedgerError> {
        Self::create_with(path, space, StratumKey::random())
    }

    /// Creates an empty ledger that sorts values into strata as others with this key do.
    ///
    /// # Errors
    /// As for [`create`](Self::create).
    pub fn create_with(path: &Path, space: &Space, key: StratumKey) -> Result<Self, LedgerError> {
        let unfinished = path.with_extension("db.tmp");
        files::create(&unfinished)?;
        sqlite::open_for_build(&unfinished)
            .and_then(|mut connection| fill_empty(&mut connection, space, key))
            .map_err(|source| LedgerError::Sqlite { path: unfinished.clone(), source })?;
        files::sync_file(&unfinished)?;
        files::rename(&unfinished, path)?;
        files::sync_folder(path.parent().expect("a ledger lies in a folder"))?;
        Self::open(path, space)
    }

    /// Opens a ledger for a range, which may have grown since.
    ///
    /// # Errors
    /// [`LedgerError::Damaged`] when it is not a whole ledger, [`LedgerError::OtherRange`] when it
    /// holds numbers that the range does not have.
    pub fn open(path: &Path, space: &Space) -> Result<Self, LedgerError> {
        // Invariant: what is read from the ledger is on the disk. A batch whose sync failed, served and
        // gone after the next power loss, would be drawn again.
        sqlite::secure_log(path)?.map_err(|problem| damaged(path, problem))?;
        let failed = |source| not_opened(path, source);
        let mut connection = sqlite::open(path).map_err(failed)?;
        // After a failure the log is read anew, sum by sum, and not put into the file unseen.
        sqlite::keep_log(&connection, true).map_err(failed)?;
        sqlite::checkpoint(&connection, Checkpoint::Full).map_err(failed)?;
        let mut state = read_state(path, &connection)?;
        if state.space != *space {
            if !space.covers(&state.space) {
                return Err(LedgerError::OtherRange {
                    path: path.to_owned(),
                    ledger: state.space.to_string(),
                    configured: space.to_string(),
                });
            }
            let checksum = checksum(state.id, state.key, space);
            connection
                .execute(UPDATE_RANGE, [space.min().0, space.max().0, checksum])
                .map_err(|source| LedgerError::Sqlite { path: path.to_owned(), source })?;
            state.space = *space;
        }
        connection.set_transaction_behavior(TransactionBehavior::Immediate);
        // SQLite syncs the name of a log that it creates, but ignores that this failed.
        files::sync_folder(path.parent().expect("a ledger lies in a folder"))?;
        Ok(Self { connection, state })
    }

    /// Opens a ledger for the range that it has.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn open_as_it_is(path: &Path) -> Result<Self, LedgerError> {
        let space = *Self::open_to_look(path)?.space();
        Self::open(path, &space)
    }

    /// Opens a ledger of this process's locked folder to read it, for the range that it has. It can't
    /// be drawn from.
    ///
    /// # Errors
    /// [`LedgerError::Damaged`] when it is not a whole ledger.
    pub fn open_to_look(path: &Path) -> Result<Self, LedgerError> {
        sqlite::check_log(path)?.map_err(|problem| damaged(path, problem))?;
        let connection = sqlite::open_to_look(path).map_err(|source| not_opened(path, source))?;
        let state = read_state(path, &connection)?;
        Ok(Self { connection, state })
    }

    /// The ledger's own id, which its shards bear.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.state.id
    }

    /// The range it draws from.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.state.space
    }

    /// The secret that sorts its values into strata.
    #[must_use]
    pub fn key(&self) -> StratumKey {
        self.state.key
    }

    /// The strata that it has opened.
    #[must_use]
    pub fn strata(&self) -> &[u16] {
        self.state.open.members()
    }

    /// Shares the space with others: opens these strata, which nobody else draws from, and from now on
    /// no other unless it is held too. Durable.
    ///
    /// # Errors
    /// [`LedgerError`]; nothing is changed then.
    pub fn hold(&mut self, strata: &[u16]) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        let mut open = state.open.clone();
        connection
            .transaction()
            .and_then(|transaction| {
                open.open_these(strata, &transaction)?;
                transaction.commit()
            })
            .map_err(|source| state.failed(source))?;
        state.used_up &= open.len() == state.open.len();
        state.open = open;
        state.shared = true;
        Ok(())
    }

    /// How many strata more should be held, so that those held are at most half used after this draw
    /// and another one like it: claimed ahead of need. At least one when those held are used up, which
    /// may hold fewer values than their share.
    #[must_use]
    pub fn strata_wanted(&self, rows: u64) -> usize {
        let State { count, open, space, used_up, .. } = &self.state;
        let values = 2 * (u128::from(*count) + 2 * u128::from(rows));
        let strata = (values * STRATA as u128).div_ceil(space.size().into());
        (strata.clamp(1, STRATA as u128) as usize)
            .saturating_sub(open.len())
            .max(usize::from(*used_up))
    }

    /// How many values ever entered a shard.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.state.count
    }

    /// How many numbers crashes and damage have burned, at most.
    #[must_use]
    pub fn burned(&self) -> u64 {
        self.state.burned
    }

    /// The random draws since this was last called.
    pub fn take_draws(&mut self) -> Draws {
        std::mem::take(&mut self.state.draws)
    }

    /// Its file and its log, in bytes.
    ///
    /// # Errors
    /// [`files::FileError`].
    pub fn size_bytes(&self) -> Result<u64, files::FileError> {
        let path = &self.state.path;
        let log = files::length_bytes(&sqlite::wal_of(path))?.unwrap_or(0);
        Ok(files::length_bytes(path)?.unwrap_or(0) + log)
    }

    /// Whether every value that it may draw is in the ledger.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.state.used_up || self.state.count >= self.state.space.size()
    }

    /// Draws up to `count` fresh values for the next generation of a shard, uniformly from what is
    /// free, in random order; fewer when the range has no more. They enter the ledger when the draw
    /// is committed, and generations of the shard other than `live` are retired with it.
    ///
    /// # Errors
    /// [`LedgerError`]; nothing is changed then.
    pub fn draw(
        &mut self,
        shard: ShardIndex,
        live: Option<Generation>,
        count: u64,
        step: Step<'_>,
    ) -> Result<Draw<'_>, LedgerError> {
        let log_bytes = files::length_bytes(&sqlite::wal_of(&self.state.path))?.unwrap_or(0);
        if log_bytes > LOG_BYTES_MAX {
            sqlite::checkpoint(&self.connection, Checkpoint::Truncate)
                .map_err(|source| self.state.failed(source))?;
        }
        Draw::begin(&mut self.connection, &mut self.state, shard, live, count, step)
    }

    /// The batch of that number.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
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

    /// The batches of a shard whose files may still be served, oldest first.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
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

    /// The newest generation of a shard, whatever became of its file.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
    pub fn newest(&self, shard: ShardIndex) -> Result<Option<Generation>, LedgerError> {
        self.connection
            .query_row(SELECT_NEWEST, [shard.0], |row| row.get(0))
            .map(|newest: Option<i64>| newest.map(Generation))
            .map_err(|source| self.state.failed(source))
    }

    /// Forbids the files of all generations of a shard but `live`.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
    pub fn retire(
        &mut self,
        shard: ShardIndex,
        live: Option<Generation>,
    ) -> Result<(), LedgerError> {
        retire(&self.connection, shard, live).map_err(|source| self.state.failed(source))
    }

    /// The shards that were ever filled.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn shards(&self) -> Result<Vec<ShardIndex>, LedgerError> {
        self.connection
            .prepare(SELECT_SHARDS)
            .and_then(|mut select| {
                select.query_map([], |row| row.get(0).map(ShardIndex))?.collect()
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Of a shard's generations, allows the files of these and forbids all others: what a copy of the
    /// shard has, and not what became of it before the ledger was copied. Answers with how many values
    /// later generations have.
    ///
    /// # Errors
    /// [`LedgerError`].
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

    /// Notes that up to `count` numbers were lost.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
    pub fn add_burned(&mut self, count: u64) -> Result<(), LedgerError> {
        self.connection.execute(ADD_BURNED, [count]).map_err(|source| self.state.failed(source))?;
        self.state.burned += count;
        Ok(())
    }

    /// Whether the value ever entered a shard.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
    pub fn contains(&self, value: Value) -> Result<bool, LedgerError> {
        const SELECT: &str = "SELECT 1 FROM used_numbers WHERE stratum = ?1 AND value = ?2";
        self.connection
            .prepare_cached(SELECT)
            .and_then(|mut select| select.exists(params![self.state.key.stratum(value), value.0]))
            .map_err(|source| self.state.failed(source))
    }

    /// Closes the file; its WAL is checkpointed and gone.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
    pub fn close(self) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        sqlite::checkpoint(&connection, Checkpoint::Truncate)
            .and_then(|()| sqlite::keep_log(&connection, false))
            .map_err(|source| state.failed(source))?;
        connection.close().map_err(|(_, source)| state.failed(source))
    }
}

impl State {
    fn failed(&self, source: rusqlite::Error) -> LedgerError {
        LedgerError::from_sqlite(&self.path, source)
    }

    fn damaged(&self, problem: String) -> LedgerError {
        LedgerError::Damaged { path: self.path.clone(), problem }
    }
}

impl LedgerError {
    /// What an error of an open ledger means for the file.
    fn from_sqlite(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) | None => {
                Self::Damaged { path, problem: source.to_string() }
            }
            Some(_) => Self::Sqlite { path, source },
        }
    }
}

/// SipHash-1-3 of what a ledger says of itself. With another key or range, nothing else would be what
/// it is.
fn checksum(id: Uuid, key: StratumKey, space: &Space) -> i64 {
    let range = [space.min().0, space.max().0, space.decimals().into()].map(i64::to_le_bytes);
    let bytes = [id.as_bytes(), &key.to_bytes(), range.as_flattened()].concat();
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
    transaction.execute_batch(&view_for_people(space.decimals()))?;
    sqlite::mark_format(&transaction, &LEDGER_FILE)?;
    transaction.execute(
        INSERT_LEDGER,
        params![
            id.to_string(),
            key.to_bytes(),
            space.min().0,
            space.max().0,
            space.decimals(),
            checksum(id, key, space)
        ],
    )?;
    transaction.commit()
}

fn view_for_people(decimals: u8) -> String {
    let number = sqlite::number_column("value", decimals);
    format!(
        "CREATE VIEW used (number, batch, drawn_at) AS
         SELECT {number}, batch, drawn_at FROM used_numbers JOIN batches ON batches.id = batch;"
    )
}

fn damaged(path: &Path, problem: String) -> LedgerError {
    LedgerError::Damaged { path: path.to_owned(), problem }
}

/// What an error of a file that is being opened means.
fn not_opened(path: &Path, source: rusqlite::Error) -> LedgerError {
    let path = path.to_owned();
    match source {
        rusqlite::Error::SqliteFailure(..) if sqlite::is_transient(&source) => {
            LedgerError::Sqlite { path, source }
        }
        other => LedgerError::Damaged { path, problem: other.to_string() },
    }
}

fn read_state(path: &Path, connection: &Connection) -> Result<State, LedgerError> {
    let damaged = |problem| damaged(path, problem);
    let failed = |source| not_opened(path, source);
    sqlite::check_format(path, connection, &LEDGER_FILE).map_err(|problem| match problem {
        FormatError::OtherVersion { .. } => {
            LedgerError::OtherVersion { path: path.to_owned(), problem }
        }
        FormatError::Damaged(problem) => damaged(problem),
    })?;
    let (id, key, space, count, burned, sum) = connection
        .query_row(SELECT_LEDGER, [], |row| {
            let id: Uuid = row.get::<_, String>(0)?.parse().map_err(|error: uuid::Error| {
                rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error.into())
            })?;
            let key = StratumKey::from_bytes(row.get(1)?);
            let space = Space::from_values(Value(row.get(2)?), Value(row.get(3)?), row.get(4)?);
            Ok((id, key, space, row.get(5)?, row.get(6)?, row.get::<_, i64>(7)?))
        })
        .map_err(failed)?;
    if sum != checksum(id, key, &space) {
        return Err(damaged("its id, key or range is not what it was created with".to_owned()));
    }
    let open = OpenStrata::read(connection).map_err(failed)?.map_err(damaged)?;
    if open.count() != count {
        let strata = open.count();
        return Err(damaged(format!("it has {count} values, and its strata have {strata}")));
    }
    let rng = ChaCha20Rng::try_from_rng(&mut SysRng).expect("the operating system has randomness");
    Ok(State {
        path: path.to_owned(),
        id,
        key,
        space,
        count,
        burned,
        open,
        shared: false,
        used_up: false,
        rng,
        draws: Draws::default(),
    })
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
