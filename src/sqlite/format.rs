//! The formats of our files: how a new file is marked, and how a found one is checked.

use std::path::Path;

use deadpool_sqlite::rusqlite::{Connection, Error};

use super::wal_of;
use crate::files;

/// The identification of one of our file formats.
#[derive(Debug)]
pub(crate) struct Format {
    /// The name of the format, with an article.
    pub name: &'static str,
    /// SQLite's `application_id`.
    pub application_id: i32,
    /// The version of the tables, SQLite's `user_version`.
    pub version: i32,
}

/// Marks a new file with its format.
pub(crate) fn mark_format(connection: &Connection, format: &Format) -> Result<(), Error> {
    connection.pragma_update(None, "application_id", format.application_id)?;
    connection.pragma_update(None, "user_version", format.version)
}

/// The reason that a file's content can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// It is our file, but of another version.
    #[error(
        "it has format {found}, but this program knows {known}: another version of tombola wrote it, and \
         only that version can use it"
    )]
    OtherVersion { found: i64, known: i32 },
    /// It is of another kind, or incomplete.
    #[error("{0}")]
    Damaged(String),
    /// It could not be read.
    #[error(transparent)]
    Sqlite(#[from] Error),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] files::FileError),
}

/// Checks that a file has the right kind and version.
pub(crate) fn check_marks(connection: &Connection, format: &Format) -> Result<(), ContentError> {
    if pragma(connection, "application_id")? != i64::from(format.application_id) {
        return Err(ContentError::Damaged(format!("it is not {}", format.name)));
    }
    let found = pragma(connection, "user_version")?;
    if found != i64::from(format.version) {
        return Err(ContentError::OtherVersion { found, known: format.version });
    }
    Ok(())
}

fn pragma(connection: &Connection, name: &str) -> Result<i64, Error> {
    connection.pragma_query_value(None, name, |row| row.get(0))
}

/// Checks that a file has the right kind and version, and that it is not truncated.
pub(crate) fn check_format(
    path: &Path,
    connection: &Connection,
    format: &Format,
) -> Result<(), ContentError> {
    check_marks(connection, format)?;
    let whole = pragma(connection, "page_count")? * pragma(connection, "page_size")?;
    let found = files::length_bytes(path)?.unwrap_or(0);
    // A page that is only in the WAL so far may be beyond the end of the file.
    let in_wal = files::length_bytes(&wal_of(path))?.is_some_and(|bytes| bytes > 0);
    if !in_wal && found < whole.unsigned_abs() {
        return Err(ContentError::Damaged(format!("it should have {whole} bytes but has {found}")));
    }
    Ok(())
}

/// Returns the faults that SQLite finds in the file, up to `limit` sentences. The list is empty if the file
/// is intact.
pub(crate) fn problems(connection: &Connection, limit: usize) -> Result<Vec<String>, Error> {
    let mut check = connection.prepare(&format!("PRAGMA integrity_check({limit})"))?;
    let mut found: Vec<String> =
        check.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    found.retain(|problem| problem != "ok");
    Ok(found)
}
