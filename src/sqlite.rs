//! SQLite files: opening them with the settings that each role needs, copying them, and what an error means
//! for the file. The only wrapper of deadpool-sqlite. Knows no tables.

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

pub use self::log::{Found, Fresh, Secured, close};

use crate::files;

/// 3.51.3 in SQLite's numbering. Older versions can corrupt a WAL when two connections checkpoint at once
/// (<https://sqlite.org/wal.html>, "The WAL-Reset Bug").
const VERSION_MIN: i32 = 3_051_003;

/// How long a connection waits for a lock of another process, such as the `sqlite3` shell.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A file that is served from or drawn from. Other processes may read it at the same time. FULL, because
/// numbers of a commit that a power loss undoes would be handed out twice. No automatic checkpoints, because
/// SQLite hides their errors, and after a failed sync the next commit would build on data that is lost.
const LIVE: &str = "
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA wal_autocheckpoint = 0;
    PRAGMA temp_store = MEMORY;
    PRAGMA trusted_schema = OFF;";

/// A file that no other code opens until it is complete and synced. A crash leaves only a stray file.
const BUILD: &str = "
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA cache_size = -8000;";

/// A file that several processes write, one after the other. EXTRA is FULL plus a sync of the journal's
/// removal: a journal that reappeared after a power loss would undo the commit.
const SHARED: &str = "
    PRAGMA journal_mode = DELETE;
    PRAGMA synchronous = EXTRA;
    PRAGMA trusted_schema = OFF;";

/// A failed operation on a connection.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// SQLite's own error.
    #[error(transparent)]
    Sqlite(#[from] Error),
    /// The work panicked (a bug) or was cancelled because the runtime is shutting down.
    #[error("the work on the file was aborted: {0}")]
    Aborted(String),
}

/// Refuses versions of SQLite that are known to lose data.
///
/// # Errors
/// Returns a sentence for people if the version is too old.
pub fn check_version() -> Result<(), String> {
    if rusqlite::version_number() >= VERSION_MIN {
        return Ok(());
    }
    Err(format!("SQLite {} is too old: 3.51.3 or newer is needed", rusqlite::version()))
}

/// Opens an existing file to read and write it.
fn open(path: &Path) -> Result<Connection, Error> {
    if files::length_bytes(path).is_ok_and(|length| length == Some(0)) {
        // SQLite would turn the remains of a crash or a full disk into a new database.
        let empty = ffi::Error::new(ffi::SQLITE_NOTADB);
        return Err(Error::SqliteFailure(empty, Some("the file is empty".to_owned())));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    prepare(&connection)?;
    Ok(connection)
}

/// Configures a connection to a live file before it reads anything.
fn prepare(connection: &Connection) -> Result<(), Error> {
    // This comes first: a connection that could not read its log because of a disk fault would treat the log
    // as empty and remove it on close.
    keep_log(connection, true)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch(LIVE)
}

/// Opens an empty file for a build.
///
/// # Errors
/// Returns SQLite's error.
pub fn open_for_build(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.execute_batch(BUILD)?;
    Ok(connection)
}

/// The identification of one of our file formats.
#[derive(Debug)]
pub struct Format {
    /// The name of the format, with an article.
    pub name: &'static str,
    /// SQLite's `application_id`.
    pub application_id: i32,
    /// The version of the tables, SQLite's `user_version`.
    pub version: i32,
}

/// Marks a new file with its format.
///
/// # Errors
/// Returns SQLite's error.
pub fn mark_format(connection: &Connection, format: &Format) -> Result<(), Error> {
    connection.pragma_update(None, "application_id", format.application_id)?;
    connection.pragma_update(None, "user_version", format.version)
}

/// The reason that a file is not of a [`Format`].
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is our file, but of another version.
    #[error(
        "it has format {found}, but this program knows {known}: another version of tombola wrote it, and \
         only that version can use it"
    )]
    OtherVersion {
        /// The version of the file.
        found: i64,
        /// The version of this program.
        known: i32,
    },
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

/// Checks that a file has the right kind and version, and that it is not truncated.
///
/// # Errors
/// Returns [`FormatError`].
pub fn check_format(
    path: &Path,
    connection: &Connection,
    format: &Format,
) -> Result<(), FormatError> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    if pragma("application_id")? != i64::from(format.application_id) {
        return Err(FormatError::Damaged(format!("it is not {}", format.name)));
    }
    let found = pragma("user_version")?;
    if found != i64::from(format.version) {
        return Err(FormatError::OtherVersion { found, known: format.version });
    }
    let whole = pragma("page_count")? * pragma("page_size")?;
    let found = files::length_bytes(path)?.unwrap_or(0);
    // A page that is only in the WAL so far may be beyond the end of the file.
    let in_wal = files::length_bytes(&wal_of(path))?.is_some_and(|bytes| bytes > 0);
    if !in_wal && found < whole.unsigned_abs() {
        return Err(FormatError::Damaged(format!("it should have {whole} bytes but has {found}")));
    }
    Ok(())
}

/// Opens a file that is not being written, without touching its folder.
///
/// # Errors
/// Returns SQLite's error.
pub fn open_to_read(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    keep_log(&connection, true)?;
    Ok(connection)
}

/// Opens a file in this process's locked folder to read it with its log. Changes neither, since the next
/// start needs them as the last process left them.
///
/// # Errors
/// Returns SQLite's error.
pub fn open_to_look(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if files::length_bytes(&wal_of(path)).is_ok_and(|length| length.unwrap_or(0) == 0) {
        // Without this, SQLite would create a log.
        let uri = immutable_uri(path);
        return Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI);
    }
    // The folder's lock excludes other processes, and the log's index is built in memory.
    let connection = Connection::open_with_flags_and_vfs(path, flags, c"unix-none")?;
    keep_log(&connection, true)?;
    connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
    Ok(connection)
}

/// Returns the URI that opens a file as immutable, see <https://sqlite.org/uri.html>.
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

/// Opens a file that several processes may change, one after the other, and creates it if it is missing. It
/// has a journal only during a change, so otherwise a copy of the file alone is complete.
///
/// # Errors
/// Returns SQLite's error.
pub fn open_shared(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch(SHARED)?;
    Ok(connection)
}

/// Opens a file to read it while another process has it open.
///
/// # Errors
/// Returns SQLite's error.
pub fn open_beside(path: &Path) -> Result<Connection, Error> {
    let connection = open_to_read(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

/// Returns the faults that SQLite finds in the file, up to `limit` sentences. The list is empty if the file
/// is intact.
///
/// # Errors
/// Returns SQLite's error.
pub fn problems(connection: &Connection, limit: usize) -> Result<Vec<String>, Error> {
    let mut check = connection.prepare(&format!("PRAGMA integrity_check({limit})"))?;
    let mut found: Vec<String> =
        check.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    found.retain(|problem| problem != "ok");
    Ok(found)
}

/// Pages to copy between two checks of whether to go on: 16 MB.
const COPY_PAGES: c_int = 4096;

/// The pause before retrying a page that another connection has locked.
const COPY_RETRY: Duration = Duration::from_millis(10);

/// Fixes the connection's view to what is committed now, whatever other connections write.
///
/// # Errors
/// Returns SQLite's error.
pub fn begin_snapshot(connection: &Connection) -> Result<(), Error> {
    connection.execute_batch("BEGIN")?;
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))
}

/// Copies the [snapshot](begin_snapshot) page by page to an empty file, which the caller syncs. Returns
/// whether the copy is complete: it is not if `go_on` returned false.
///
/// # Errors
/// Returns SQLite's error.
pub fn copy(from: &Connection, to: &Path, go_on: &dyn Fn() -> bool) -> Result<bool, Error> {
    let mut to = open_for_build(to)?;
    let copy = Backup::new(from, &mut to)?;
    // The snapshot is held throughout. Without it, each commit of another connection would restart the copy.
    while go_on() {
        match copy.step(COPY_PAGES)? {
            StepResult::Done => return Ok(true),
            StepResult::More => {}
            _ => thread::sleep(COPY_RETRY),
        }
    }
    Ok(false)
}

/// Frames at which a log is long enough for a checkpoint: 4 MB, as SQLite's default.
pub const LOG_PAGES_MAX: usize = 1000;

/// The extent of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub enum Checkpoint {
    /// As far as possible without waiting for readers.
    Passive,
    /// To the end of the log. The next commit starts the log at its beginning.
    Restart,
    /// To the end of the log, which is then truncated to zero.
    Truncate,
}

/// Writes the write-ahead log back into the file.
///
/// # Errors
/// Returns SQLite's error. Unless its fault is [passing](Fault::Passing), the connection must be closed. A
/// reader of the log makes every checkpoint except a passive one fail with `SQLITE_BUSY`.
pub fn checkpoint(connection: &Connection, how_far: Checkpoint) -> Result<(), Error> {
    let sql = match how_far {
        Checkpoint::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
        Checkpoint::Restart => "PRAGMA wal_checkpoint(RESTART)",
        Checkpoint::Truncate => "PRAGMA wal_checkpoint(TRUNCATE)",
    };
    // SQLite reports a blocked checkpoint in the first column, and calls it a success.
    let held_up: bool = connection.query_row(sql, [], |row| row.get(0))?;
    match how_far {
        Checkpoint::Restart | Checkpoint::Truncate if held_up => {
            let busy = ffi::Error::new(ffi::SQLITE_BUSY);
            Err(Error::SqliteFailure(busy, Some("the log is being read".to_owned())))
        }
        _ => Ok(()),
    }
}

/// Sets whether closing the connection leaves the log for the next opening. If not, closing checkpoints the
/// log and removes it.
///
/// Returns SQLite's error.
/// SQLite's error.
pub fn keep_log(connection: &Connection, keep: bool) -> Result<(), Error> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep).map(drop)
}

/// Returns the path of the write-ahead log of a file.
#[must_use]
pub fn wal_of(path: &Path) -> PathBuf {
    files::beside(path, "-wal")
}

/// Returns SQL that shows a column of scaled integers as the numbers that callers see, digit by digit.
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

/// Rows to pass to [`insert`] at once: a few dozen save most of the fixed cost of a statement, and more save
/// no more.
pub const ROWS_AT_ONCE: usize = 64;

/// Inserts rows of integers with one statement: all or none. `into` is the SQL up to and including `VALUES`.
///
/// # Errors
/// Returns SQLite's error.
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
#[must_use]
pub fn fault(error: &Error) -> Fault {
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
pub fn read_through(path: &Path) -> Result<(), files::FileError> {
    files::read_through(path)?;
    files::read_through(&wal_of(path))
}

/// Returns whether the error is a full disk.
#[must_use]
pub fn is_full(error: &Error) -> bool {
    matches!(error, Error::SqliteFailure(failure, _) if is_full_code(failure))
}

/// Returns whether SQLite's code stands for a full disk.
#[must_use]
pub fn is_full_code(failure: &ffi::Error) -> bool {
    failure.code == ErrorCode::DiskFull
}

/// The connection to one live file, usable from async code. Work runs on the blocking threads, one piece at a
/// time.
#[derive(Debug)]
pub struct Database {
    connection: Object,
}

impl Database {
    /// Opens a file for use. See [`Fresh`].
    ///
    /// # Errors
    /// Returns SQLite's error, or [`DatabaseError::Aborted`].
    pub async fn open(log: &Secured) -> Result<Self, DatabaseError> {
        let mut config = Config::new(log.path());
        config.pool = Some(PoolConfig::new(1));
        let pool = config
            .builder(Runtime::Tokio1)
            .unwrap_or_else(|never| match never {})
            .post_create(Hook::async_fn(|connection, _| {
                Box::pin(async move {
                    connection
                        .interact(|connection| {
                            prepare(connection)?;
                            checkpoint(connection, Checkpoint::Restart)
                        })
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
    /// Returns [`DatabaseError::Aborted`] if the work panicked.
    pub async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> R + Send + 'static,
    ) -> Result<R, DatabaseError> {
        self.connection.interact(work).await.map_err(|error| match error {
            InteractError::Panic(_) => DatabaseError::Aborted("it panicked".to_owned()),
            InteractError::Cancelled => DatabaseError::Aborted("it was cancelled".to_owned()),
        })
    }

    /// Closes the file immediately, and leaves the log to the next opening.
    ///
    /// # Errors
    /// Returns SQLite's error. The connection is closed in any case.
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
