//! The meaning of SQLite's errors for the file.

use std::path::Path;

use deadpool_sqlite::rusqlite::{Error, ErrorCode, ffi};

use super::wal_of;
use crate::files;

/// The meaning of an error for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing was changed, and the connection is still usable, so the work is retried. Examples are a full
    /// disk, a lock, and a lack of memory or file descriptors.
    Passing,
    /// It is unknown what was changed, so the file is closed and opened again, as after a crash. Examples are
    /// a failed read, write or sync.
    Io,
    /// The content is wrong. SQLite reports the same for a page that the disk could not read, so a file
    /// counts as damaged only if the error occurs again after all of the file [was read](read_through).
    Content,
}

/// Returns what SQLite's error means for the file.
pub(crate) fn fault(error: &Error) -> Fault {
    let Error::SqliteFailure(failure, _) = error else {
        // A value's type differs from its column's, or a row is missing.
        return Fault::Content;
    };
    match failure.code {
        ErrorCode::DatabaseCorrupt
        | ErrorCode::NotADatabase
        | ErrorCode::ConstraintViolation
        | ErrorCode::TypeMismatch
        // An SQL error, because one of our tables or columns is missing.
        | ErrorCode::Unknown => Fault::Content,
        ErrorCode::DiskFull
        | ErrorCode::DatabaseBusy
        | ErrorCode::DatabaseLocked
        | ErrorCode::OutOfMemory
        | ErrorCode::OperationInterrupted
        | ErrorCode::PermissionDenied
        | ErrorCode::ReadOnly
        | ErrorCode::CannotOpen => Fault::Passing,
        // The log's index could not grow. This is also a full disk, and nothing was written.
        _ if failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE => Fault::Passing,
        _ => Fault::Io,
    }
}

/// Reads a file and its log to their ends. No connection of this process may have it open.
///
/// # Errors
/// Returns an error if the disk can't read them. SQLite's verdict on the content then proves nothing.
pub(crate) fn read_through(path: &Path) -> Result<(), files::FileError> {
    files::read_through(path)?;
    files::read_through(&wal_of(path))
}

/// Returns whether the error is a full disk.
pub(crate) fn is_full(error: &Error) -> bool {
    matches!(error, Error::SqliteFailure(failure, _) if is_full_code(failure))
}

/// Returns whether SQLite's code stands for a full disk, on which the index of a log can't grow either.
pub(crate) fn is_full_code(failure: &ffi::Error) -> bool {
    failure.code == ErrorCode::DiskFull || failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE
}
