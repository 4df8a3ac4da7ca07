//! Opening SQLite files: what a file's role asks of its connection, and what an error means for the
//! file. The only wrapper of deadpool-sqlite. Knows no table.

mod log;

use std::ffi::{OsString, c_int};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use deadpool_sqlite::rusqlite::backup::{Backup, StepResult};
use deadpool_sqlite::rusqlite::config::DbConfig;
use deadpool_sqlite::rusqlite::{Connection, Error, ErrorCode, OpenFlags, ffi};
use deadpool_sqlite::{Config, Hook, HookError, InteractError, Object, PoolConfig, Runtime};

pub use deadpool_sqlite::rusqlite;

pub use self::log::{check_log, secure_log};

use crate::files;

/// 3.51.3, as SQLite counts. Older ones can corrupt a WAL when two connections checkpoint at once
/// (<https://sqlite.org/wal.html>, "The WAL-Reset Bug").
const VERSION_MIN: i32 = 3_051_003;

/// A file that is served from or drawn from: another process may read it while it is in use.
/// FULL: a commit that power loss takes back would be handed out twice. The time-out, in
/// milliseconds, is for someone's `sqlite3` to let go of the file. No automatic checkpoints: these keep
/// their errors to themselves, and after a failed sync the next commit would follow what is lost.
const LIVE: &str = "
    PRAGMA busy_timeout = 5000;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA wal_autocheckpoint = 0;
    PRAGMA temp_store = MEMORY;
    PRAGMA trusted_schema = OFF;";

/// A file that nobody knows of until it is complete and synced: a crash just leaves a stray.
const BUILD: &str = "
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA cache_size = -8000;";

/// Whoever has the file is done in milliseconds.
const PATIENT: &str = "PRAGMA busy_timeout = 5000";

/// A file that several processes change, one after the other. EXTRA: FULL, and that the journal is gone
/// is synced too; one that came back with a power loss would undo the commit.
const SHARED: &str = "
    PRAGMA busy_timeout = 5000;
    PRAGMA journal_mode = DELETE;
    PRAGMA synchronous = EXTRA;
    PRAGMA trusted_schema = OFF;";

/// Why a connection could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// SQLite's own error.
    #[error(transparent)]
    Sqlite(#[from] Error),
    /// The work panicked or was cancelled: our bug, or the runtime is ending.
    #[error("the work on the file was aborted: {0}")]
    Aborted(String),
}

/// Refuses a SQLite that is known to lose data.
///
/// # Errors
/// A sentence for people.
pub fn check_version() -> Result<(), String> {
    if rusqlite::version_number() >= VERSION_MIN {
        return Ok(());
    }
    Err(format!("SQLite {} is too old: 3.51.3 or newer is needed", rusqlite::version()))
}

/// Opens an existing file for use.
///
/// # Errors
/// SQLite's error; a missing file is one, and an empty file is not a database.
pub fn open(path: &Path) -> Result<Connection, Error> {
    if files::length_bytes(path).is_ok_and(|length| length == Some(0)) {
        // SQLite would make a new database of it, over what a crash or a full disk left.
        let empty = ffi::Error::new(ffi::SQLITE_NOTADB);
        return Err(Error::SqliteFailure(empty, Some("the file is empty".to_owned())));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch(LIVE)?;
    Ok(connection)
}

/// Opens an empty file for a build.
///
/// # Errors
/// SQLite's error.
pub fn open_for_build(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.execute_batch(BUILD)?;
    Ok(connection)
}

/// What a file of ours is marked as.
#[derive(Debug)]
pub struct Format {
    /// What it is, with an article.
    pub name: &'static str,
    /// SQLite's `application_id`.
    pub application_id: i32,
    /// The version of its tables, SQLite's `user_version`.
    pub version: i32,
}

/// Marks a new file.
///
/// # Errors
/// SQLite's error.
pub fn mark_format(connection: &Connection, format: &Format) -> Result<(), Error> {
    connection.pragma_update(None, "application_id", format.application_id)?;
    connection.pragma_update(None, "user_version", format.version)
}

/// Why a file is not of a [`Format`].
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is ours, and of another version.
    #[error(
        "it has format {found}, this program knows {known}: another version of tombola wrote it, and \
         only that version can use it"
    )]
    OtherVersion {
        /// The file's.
        found: i64,
        /// This program's.
        known: i32,
    },
    /// It is of another kind, or not whole.
    #[error("{0}")]
    Damaged(String),
}

/// Refuses a file of another kind or version, and one that was cut off.
///
/// # Errors
/// [`FormatError`].
pub fn check_format(
    path: &Path,
    connection: &Connection,
    format: &Format,
) -> Result<(), FormatError> {
    let pragma = |name| {
        connection
            .pragma_query_value(None, name, |row| row.get::<_, i64>(0))
            .map_err(|error| FormatError::Damaged(error.to_string()))
    };
    if pragma("application_id")? != i64::from(format.application_id) {
        return Err(FormatError::Damaged(format!("it is not {}", format.name)));
    }
    let found = pragma("user_version")?;
    if found != i64::from(format.version) {
        return Err(FormatError::OtherVersion { found, known: format.version });
    }
    let whole = pragma("page_count")? * pragma("page_size")?;
    let length = |path: &Path| {
        files::length_bytes(path).map_err(|error| FormatError::Damaged(error.to_string()))
    };
    let found = length(path)?.unwrap_or(0);
    // A page that is still in the WAL may lie beyond the end of the file.
    let in_wal = length(&wal_of(path))?.is_some_and(|bytes| bytes > 0);
    if !in_wal && found < whole.unsigned_abs() {
        return Err(FormatError::Damaged(format!("it should have {whole} bytes and has {found}")));
    }
    Ok(())
}

/// Opens a file that nobody writes, without touching its folder.
///
/// # Errors
/// SQLite's error.
pub fn open_to_read(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(path, flags)
}

/// Opens a file of this process's locked folder to read it with its log, and changes neither: what the
/// last process left there is evidence for the next start.
///
/// # Errors
/// SQLite's error.
pub fn open_to_look(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if files::length_bytes(&wal_of(path)).is_ok_and(|length| length.unwrap_or(0) == 0) {
        // Without this, SQLite would create a log.
        let uri = immutable_uri(path);
        return Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI);
    }
    // The folder's lock is the only one that is needed, and the log's index is made in memory.
    let connection = Connection::open_with_flags_and_vfs(path, flags, c"unix-none")?;
    connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
    Ok(connection)
}

/// <https://sqlite.org/uri.html>
fn immutable_uri(path: &Path) -> PathBuf {
    let mut uri = b"file:".to_vec();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'%' | b'?' | b'#' => uri.extend(format!("%{byte:02x}").bytes()),
            _ => uri.push(byte),
        }
    }
    uri.extend(b"?immutable=1");
    PathBuf::from(OsString::from_vec(uri))
}

/// Opens a file that several processes may change, one after the other, and creates it where it is
/// missing. It has a journal only while it is changed: the file alone is all there is to keep.
///
/// # Errors
/// SQLite's error.
pub fn open_shared(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.execute_batch(SHARED)?;
    Ok(connection)
}

/// Opens a file that another process has open, to read it beside that process.
///
/// # Errors
/// SQLite's error.
pub fn open_beside(path: &Path) -> Result<Connection, Error> {
    let connection = open_to_read(path)?;
    connection.execute_batch(PATIENT)?;
    Ok(connection)
}

/// What SQLite finds wrong with the file, up to `limit` sentences; none when it is whole.
///
/// # Errors
/// SQLite's error.
pub fn problems(connection: &Connection, limit: usize) -> Result<Vec<String>, Error> {
    let mut check = connection.prepare(&format!("PRAGMA integrity_check({limit})"))?;
    let mut found: Vec<String> =
        check.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    found.retain(|problem| problem != "ok");
    Ok(found)
}

/// Pages that are copied between two looks whether to go on: 16 MB.
const COPY_PAGES: c_int = 4096;

/// Before a page that someone else has locked is tried again.
const COPY_RETRY: Duration = Duration::from_millis(10);

/// Keeps the connection on what is committed now, whatever others write.
///
/// # Errors
/// SQLite's error.
pub fn begin_snapshot(connection: &Connection) -> Result<(), Error> {
    connection.execute_batch("BEGIN")?;
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))
}

/// Copies the [snapshot](begin_snapshot) page by page to an empty file, which the caller syncs. Answers
/// whether it is complete: not when `go_on` said no.
///
/// # Errors
/// SQLite's error.
pub fn copy(from: &Connection, to: &Path, go_on: &dyn Fn() -> bool) -> Result<bool, Error> {
    let mut to = open_for_build(to)?;
    let copy = Backup::new(from, &mut to)?;
    // One snapshot throughout: without it, each commit of others would begin the copy anew.
    while go_on() {
        match copy.step(COPY_PAGES)? {
            StepResult::Done => return Ok(true),
            StepResult::More => {}
            _ => thread::sleep(COPY_RETRY),
        }
    }
    Ok(false)
}

/// Frames of a log that is long enough for a checkpoint, 4 MB: SQLite's own measure.
pub const LOG_PAGES_MAX: usize = 1000;

/// How far a checkpoint goes.
#[derive(Clone, Copy, Debug)]
pub enum Checkpoint {
    /// As far as it gets without waiting for anyone.
    Passive,
    /// To the end of the log, which stays.
    Full,
    /// To the end of the log, which is then empty.
    Truncate,
}

/// Puts the write-ahead log into the file.
///
/// # Errors
/// SQLite's error; when it is not [transient](is_transient), log and file must not be used any more.
pub fn checkpoint(connection: &Connection, how_far: Checkpoint) -> Result<(), Error> {
    let sql = match how_far {
        Checkpoint::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
        Checkpoint::Full => "PRAGMA wal_checkpoint(FULL)",
        Checkpoint::Truncate => "PRAGMA wal_checkpoint(TRUNCATE)",
    };
    connection.query_row(sql, [], |_| Ok(()))
}

/// Whether closing the connection checkpoints the log and removes it, whatever comes of it, or leaves
/// it to whoever opens the file next.
///
/// # Errors
/// SQLite's error.
pub fn keep_log(connection: &Connection, keep: bool) -> Result<(), Error> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep).map(drop)
}

/// The write-ahead log that lies beside a file in use.
#[must_use]
pub fn wal_of(path: &Path) -> PathBuf {
    files::beside(path, "-wal")
}

/// SQL that shows a column of scaled integers as the numbers that callers see, digit by digit.
#[must_use]
pub fn number_column(column: &str, decimals: u8) -> String {
    if decimals == 0 {
        return column.to_owned();
    }
    let scale = 10_i64.pow(decimals.into());
    format!(
        "iif({column} < 0, '-', '') || \
         format('%d.%0{decimals}d', abs({column}) / {scale}, abs({column}) % {scale})"
    )
}

/// Rows that [`insert`] is best given at once: a few dozen save most of what a statement costs beside
/// its rows, and more save no more.
pub const ROWS_AT_ONCE: usize = 64;

/// Inserts rows of integers with one statement: all, or none. `into` is SQL up to and with `VALUES`.
///
/// # Errors
/// SQLite's error.
pub fn insert<const COLUMNS: usize>(
    connection: &Connection,
    into: &str,
    rows: &[[i64; COLUMNS]],
) -> Result<(), Error> {
    let row = format!("({})", ["?"; COLUMNS].join(","));
    let sql = format!("{into} {}", vec![&*row; rows.len()].join(","));
    let mut insert = connection.prepare_cached(&sql)?;
    for (index, value) in (1..).zip(rows.as_flattened()) {
        insert.raw_bind_parameter(index, value)?;
    }
    insert.raw_execute().map(drop)
}

/// Whether an error leaves the file as trustworthy as before, so that trying again makes sense.
/// A full disk, a lock or a lack of memory is; a failed read or sync, or a damaged page, is not.
#[must_use]
pub fn is_transient(error: &Error) -> bool {
    let Error::SqliteFailure(failure, _) = error else {
        return false;
    };
    match failure.code {
        ErrorCode::DiskFull
        | ErrorCode::DatabaseBusy
        | ErrorCode::DatabaseLocked
        | ErrorCode::OutOfMemory
        | ErrorCode::OperationInterrupted
        | ErrorCode::CannotOpen => true,
        // The WAL index could not grow: that is a full disk too, and nothing was written.
        _ => failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE,
    }
}

/// Whether the disk had no space for it.
#[must_use]
pub fn is_full(error: &Error) -> bool {
    matches!(error, Error::SqliteFailure(failure, _) if failure.code == ErrorCode::DiskFull)
}

/// One live file's connection, usable from async code. Work runs on the blocking threads, one piece
/// at a time.
#[derive(Debug)]
pub struct Database {
    connection: Object,
}

impl Database {
    /// Opens an existing file for use.
    ///
    /// # Errors
    /// SQLite's error, or [`DatabaseError::Aborted`].
    pub async fn open(path: &Path) -> Result<Self, DatabaseError> {
        let mut config = Config::new(path);
        config.pool = Some(PoolConfig::new(1));
        let pool = config
            .builder(Runtime::Tokio1)
            .unwrap_or_else(|never| match never {})
            .post_create(Hook::async_fn(|connection, _| {
                Box::pin(async move {
                    connection
                        .interact(|connection| connection.execute_batch(LIVE))
                        .await
                        .map_err(|error| HookError::message(error.to_string()))?
                        .map_err(HookError::Backend)
                })
            }))
            .build()
            .map_err(|error| DatabaseError::Aborted(error.to_string()))?;
        let connection = pool.get().await.map_err(|error| match error {
            deadpool_sqlite::PoolError::Backend(error)
            | deadpool_sqlite::PoolError::PostCreateHook(HookError::Backend(error)) => {
                DatabaseError::Sqlite(error)
            }
            other => DatabaseError::Aborted(other.to_string()),
        })?;
        Ok(Self { connection })
    }

    /// Runs one piece of work on the connection.
    ///
    /// # Errors
    /// [`DatabaseError::Aborted`] when the work panicked.
    pub async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> R + Send + 'static,
    ) -> Result<R, DatabaseError> {
        self.connection.interact(work).await.map_err(|error| match error {
            InteractError::Panic(_) => DatabaseError::Aborted("it panicked".to_owned()),
            InteractError::Cancelled => DatabaseError::Aborted("it was cancelled".to_owned()),
        })
    }

    /// Closes the file now: once this returns, its WAL is checkpointed and gone.
    ///
    /// # Errors
    /// SQLite's error; the connection is closed all the same.
    pub async fn close(self) -> Result<(), DatabaseError> {
        self.call(|connection| {
            // Dropping the pool's object would close the file at some later time.
            let open = std::mem::replace(connection, Connection::open_in_memory()?);
            open.close().map_err(|(_, error)| error)
        })
        .await?
        .map_err(DatabaseError::Sqlite)
    }
}
