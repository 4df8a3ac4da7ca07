//! Keeps all numbers in one SQLite table, whose UNIQUE constraint decides which are fresh. Knows nothing of
//! requests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};

use super::{Candidate, OpenError, Store, StoreError, check_range};
use crate::config::PoolConfig;
use crate::files;
use crate::folder::TABLE_STORE;
use crate::space::{Space, Value};
use crate::sqlite::{self, Checkpoint, ContentError, Fault, Format, Found, rusqlite};

/// "TBRN", and the version of the tables below.
const TABLE_FILE: Format =
    Format { name: "a table of tombola's", application_id: 0x5442_524e, version: 1 };

const CREATE: &str = "
    CREATE TABLE pools (
        id       INTEGER PRIMARY KEY,
        name     TEXT    NOT NULL UNIQUE,
        min      INTEGER NOT NULL,
        max      INTEGER NOT NULL,
        decimals INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE random_numbers (    -- what was handed out, scaled by 10^decimals
        id       INTEGER PRIMARY KEY,
        pool     INTEGER NOT NULL REFERENCES pools,
        value    INTEGER NOT NULL,
        UNIQUE (pool, value)
    ) STRICT;";

const SELECT_POOL: &str = "SELECT id, min, max, decimals FROM pools WHERE name = ?1";
const INSERT_POOL: &str = "INSERT INTO pools (name, min, max, decimals) VALUES (?1, ?2, ?3, ?4)";
const UPDATE_POOL: &str = "UPDATE pools SET min = ?2, max = ?3 WHERE id = ?1";
const INSERT_NUMBER: &str =
    "INSERT INTO random_numbers (pool, value) VALUES (?1, ?2) ON CONFLICT DO NOTHING";

/// The open file.
#[derive(Debug)]
pub struct TableStore {
    connection: Connection,
    /// `pools.id` of each pool of the settings, in their order.
    ids: Vec<i64>,
    /// Numbers in the log, each about a page of the constraint's index.
    log_numbers: usize,
}

impl Store for TableStore {
    // With 100 tries, another program such as `sqlite3` may keep the file locked for half a second.
    const RETRY_DELAY: Duration = Duration::from_millis(5);

    fn open(folder: &Path, pools: &[PoolConfig]) -> Result<Self, OpenError> {
        let path = folder.join(TABLE_STORE);
        if files::length_bytes(&path)?.is_none() {
            create(&path)?;
        }
        let sqlite = |source| failed(&path, source);
        let log = Found::new(&path).secure()?;
        // Checked without a write, so that a file that is not tombola's stays unchanged.
        let connection = sqlite::open_to_check(&path).map_err(sqlite)?;
        let failed = |problem| match problem {
            ContentError::Sqlite(source) => sqlite(source),
            ContentError::File(error) => error.into(),
            problem => OpenError::Damaged { path: path.clone(), problem: problem.to_string() },
        };
        sqlite::check_format(&path, &connection, &TABLE_FILE).map_err(failed)?;
        drop(connection);

        let mut connection = log.open().map_err(failed)?.into_connection();
        // A wait here would delay all requests. The tries replace it.
        connection.busy_timeout(Duration::ZERO).map_err(sqlite)?;
        connection.set_transaction_behavior(TransactionBehavior::Immediate);
        let transaction = connection.transaction().map_err(sqlite)?;
        let ids = pools
            .iter()
            .map(|pool| open_pool(&path, &transaction, pool))
            .collect::<Result<_, _>>()?;
        transaction.commit().map_err(sqlite)?;
        Ok(Self { connection, ids, log_numbers: 0 })
    }

    fn insert(&mut self, candidates: &[Candidate]) -> Result<Vec<bool>, StoreError> {
        let fresh = insert(&mut self.connection, &self.ids, candidates)?;
        self.log_numbers += candidates.len();
        if self.log_numbers > sqlite::LOG_PAGES_MAX {
            sqlite::checkpoint(&self.connection, Checkpoint::Passive)?;
            self.log_numbers = 0;
        }
        Ok(fresh)
    }

    fn close(self) -> Result<(), StoreError> {
        Ok(sqlite::close(self.connection)?)
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked,
            _ => Self::Failed(error.to_string()),
        }
    }
}

fn insert(
    connection: &mut Connection,
    ids: &[i64],
    candidates: &[Candidate],
) -> Result<Vec<bool>, rusqlite::Error> {
    let transaction = connection.transaction()?;
    let mut insert = transaction.prepare_cached(INSERT_NUMBER)?;
    let fresh = candidates
        .iter()
        .map(|candidate| {
            let rows = insert.execute(params![ids[candidate.pool.0], candidate.value.0])?;
            Ok(rows == 1)
        })
        .collect::<Result<_, rusqlite::Error>>()?;
    drop(insert);
    transaction.commit()?;
    Ok(fresh)
}

/// Creates the file under another name and renames it, so that an incomplete file never has the name.
fn create(path: &Path) -> Result<(), OpenError> {
    let unfinished = files::unfinished(path);
    files::create(&unfinished)?;
    sqlite::open_for_build(&unfinished)
        .and_then(|connection| {
            connection.execute_batch(CREATE)?;
            sqlite::mark_format(&connection, &TABLE_FILE)
        })
        .map_err(|source| OpenError::Sqlite { path: unfinished.clone(), source })?;
    files::sync_file(&unfinished)?;
    Ok(files::rename_durably(&unfinished, path)?)
}

/// Adds the pool to the file if it is missing, and returns its id.
fn open_pool(path: &Path, connection: &Connection, pool: &PoolConfig) -> Result<i64, OpenError> {
    let PoolConfig { name, space, .. } = pool;
    let sqlite = |source| failed(path, source);
    let found = connection
        .query_row(SELECT_POOL, [name.as_str()], |row| {
            let space = Space::from_values(Value(row.get(1)?), Value(row.get(2)?), row.get(3)?);
            Ok((row.get(0)?, space))
        })
        .optional()
        .map_err(sqlite)?;
    let (min, max) = (space.min().0, space.max().0);
    let Some((id, stored)): Option<(_, Option<Space>)> = found else {
        connection
            .execute(INSERT_POOL, params![name.as_str(), min, max, space.decimals()])
            .map_err(sqlite)?;
        let id = connection.last_insert_rowid();
        connection.execute_batch(&number_view(id, pool)).map_err(sqlite)?;
        return Ok(id);
    };
    let Some(stored) = stored else {
        let problem = format!("its range for the pool {name} is invalid");
        return Err(OpenError::Damaged { path: path.to_owned(), problem });
    };
    check_range(path, name.as_str(), &stored, space)?;
    if stored != *space {
        connection.execute(UPDATE_POOL, [id, min, max]).map_err(sqlite)?;
    }
    Ok(id)
}

fn number_view(id: i64, pool: &PoolConfig) -> String {
    let number = sqlite::number_column("value", &pool.space);
    format!(
        "CREATE VIEW used_numbers_{} (id, number) AS
         SELECT id, {number} FROM random_numbers WHERE pool = {id};",
        pool.name
    )
}

fn failed(path: &Path, source: rusqlite::Error) -> OpenError {
    let path: PathBuf = path.to_owned();
    match sqlite::fault(&source) {
        Fault::Content => OpenError::Damaged { path, problem: source.to_string() },
        Fault::Passing | Fault::Io => OpenError::Sqlite { path, source },
    }
}
