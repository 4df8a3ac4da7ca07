//! A SQLite file as the store, best on another volume than the folder: a witness of how far the folder
//! has come, which a restored backup of the folder does not take back. Several instances of one machine
//! can share it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::StoreError;
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

/// See the [module](self). The file is open only while it is asked: that is seldom, and others may wait.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
}

impl FileStore {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub(super) fn address(&self) -> String {
        format!("file://{}", self.path.display())
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<String>, StoreError> {
        let key = key.to_owned();
        self.ask(move |connection| connection.query_row(SELECT, [key], |row| row.get(0)).optional())
            .await
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<BTreeMap<String, String>, StoreError> {
        let prefix = prefix.to_owned();
        self.ask(move |connection| {
            let mut select = connection.prepare(SELECT_ALL)?;
            select.query_map([prefix], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })
        .await
    }

    pub(super) async fn create(&self, entries: &[(String, String)]) -> Result<(), StoreError> {
        let entries = entries.to_owned();
        self.ask(move |connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for (key, value) in entries {
                transaction.execute(INSERT, params![key, value])?;
            }
            transaction.commit()
        })
        .await
    }

    pub(super) async fn replace(
        &self,
        key: &str,
        from: &str,
        to: &str,
    ) -> Result<bool, StoreError> {
        let (key, from, to) = (key.to_owned(), from.to_owned(), to.to_owned());
        self.ask(move |connection| Ok(connection.execute(UPDATE, params![key, from, to])? == 1))
            .await
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let path = self.path.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let mut connection = open(&path)?;
            question(&mut connection).map_err(|error| error.to_string())
        });
        asked
            .await
            .expect("asking does not panic")
            .map_err(|problem| StoreError { address: self.address(), problem })
    }
}

/// Opens the file, and makes it where it is missing; never its folder: that of a volume which is not
/// mounted is not there.
fn open(path: &Path) -> Result<Connection, String> {
    let failed = |error: rusqlite::Error| error.to_string();
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
    sqlite::check_format(path, &connection, &WITNESS_FILE).map_err(|error| error.to_string())?;
    Ok(connection)
}
