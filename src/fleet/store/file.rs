//! A SQLite file as the store, best on another volume than the data folder: a witness of the folder's
//! progress that is not reverted when a backup of the folder is restored. Several instances of one machine
//! can share it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::{FleetStore, FleetStoreError, Reply};
use crate::files;
use crate::sqlite::{self, Format, rusqlite};

/// "TBWT", and the version of the table below.
const WITNESS_FILE: Format = Format { name: "a witness", application_id: 0x5442_5754, version: 1 };

const CREATE: &str = "CREATE TABLE IF NOT EXISTS entries (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID";
const SELECT: &str = "SELECT value FROM entries WHERE key = ?1";
const SELECT_ALL: &str = "SELECT key, value FROM entries WHERE substr(key, 1, length(?1)) = ?1";
const INSERT: &str = "INSERT OR IGNORE INTO entries VALUES (?1, ?2)";
const UPDATE: &str = "UPDATE entries SET value = ?3 WHERE key = ?1 AND value = ?2";

/// The access to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Reads it. It must exist.
    Look,
    /// Reads and changes it. Creates it if it is missing.
    Change,
}

/// See the [module](self). The file is open only during a request: requests are rare, and other processes may
/// wait for it.
#[derive(Debug)]
pub(super) struct FileStore {
    path: PathBuf,
    access: Access,
}

impl FleetStore for FileStore {
    fn address(&self) -> String {
        format!("file://{}", self.path.display())
    }

    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<String>> {
        let key = key.to_owned();
        Box::pin(self.ask(move |connection| {
            connection.query_row(SELECT, [key], |row| row.get(0)).optional()
        }))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, BTreeMap<String, String>> {
        let prefix = prefix.to_owned();
        Box::pin(self.ask(move |connection| {
            let mut select = connection.prepare(SELECT_ALL)?;
            select.query_map([prefix], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        }))
    }

    fn create_where<'a>(
        &'a self,
        given: &'a [(String, String)],
        entries: &'a [(String, String)],
    ) -> Reply<'a, bool> {
        let (given, entries) = (given.to_owned(), entries.to_owned());
        Box::pin(self.ask(move |connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for (key, value) in given {
                let found: Option<String> =
                    transaction.query_row(SELECT, [key], |row| row.get(0)).optional()?;
                if found != Some(value) {
                    return Ok(false);
                }
            }
            let mut all = true;
            for (key, value) in entries {
                all &= transaction.execute(INSERT, params![key, value])? == 1;
            }
            transaction.commit()?;
            Ok(all)
        }))
    }

    fn replace<'a>(&'a self, key: &'a str, from: &'a str, to: &'a str) -> Reply<'a, bool> {
        let (key, from, to) = (key.to_owned(), from.to_owned(), to.to_owned());
        Box::pin(
            self.ask(
                move |connection| Ok(connection.execute(UPDATE, params![key, from, to])? == 1),
            ),
        )
    }
}

impl FileStore {
    pub(super) fn new(path: &Path, access: Access) -> Self {
        Self { path: path.to_owned(), access }
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, FleetStoreError> {
        let (path, access) = (self.path.clone(), self.access);
        let asked = tokio::task::spawn_blocking(move || {
            let mut connection = match access {
                Access::Look => open_to_look(&path)?,
                Access::Change => open(&path)?,
            };
            question(&mut connection).map_err(|error| error.to_string())
        });
        asked.await.expect("asking does not panic").map_err(|problem| self.error(&problem))
    }
}

/// Opens the file, and creates it if it is missing. Does not create its folder, which is missing if the
/// volume is not mounted.
fn open(path: &Path) -> Result<Connection, String> {
    let failed = |error: rusqlite::Error| error.to_string();
    // Created here, because SQLite would let all users read it, and it contains the secrets of the space.
    files::create_if_absent(path).map_err(|error| error.to_string())?;
    let mut connection = sqlite::open_shared(path).map_err(failed)?;
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(failed)?;
    if tables == 0 {
        let make = |connection: &mut Connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(CREATE)?;
            sqlite::mark_format(&transaction, &WITNESS_FILE)?;
            transaction.commit()
        };
        make(&mut connection).map_err(failed)?;
    }
    checked(path, connection)
}

fn open_to_look(path: &Path) -> Result<Connection, String> {
    let connection = sqlite::open_beside(path).map_err(|error| error.to_string())?;
    checked(path, connection)
}

fn checked(path: &Path, connection: Connection) -> Result<Connection, String> {
    sqlite::check_format(path, &connection, &WITNESS_FILE).map_err(|error| error.to_string())?;
    Ok(connection)
}
