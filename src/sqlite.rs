//! SQLite files: connections with the settings that each role needs, checkpoints, and inserts. Knows no
//! tables.

mod copy;
mod database;
mod fault;
mod format;
mod log;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use deadpool_sqlite::rusqlite::config::DbConfig;
use deadpool_sqlite::rusqlite::{Connection, Error, OpenFlags, ffi};

pub use deadpool_sqlite::rusqlite;

pub(crate) use self::copy::{begin_snapshot, copy};
pub(crate) use self::database::{Database, DatabaseError};
pub(crate) use self::fault::{Fault, fault, is_full, is_full_code, read_through};
pub(crate) use self::format::{
    ContentError, Format, check_format, check_marks, mark_format, problems,
};
pub use self::log::Found;
pub(crate) use self::log::{Fresh, close};

use crate::files;
use crate::space::{CodeFormat, Place, Space};

/// 3.51.3 in SQLite's numbering. Older versions can corrupt a WAL when two connections checkpoint at once
/// (<https://sqlite.org/wal.html>, "The WAL-Reset Bug").
const VERSION_MIN: i32 = 3_051_003;

/// How long a connection waits for a lock of another process, such as the `sqlite3` shell.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

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
    // SQLite opens a file only for reading if the disk fails at that moment, and would refuse each later write.
    if connection.is_readonly("main")? {
        let read_only = ffi::Error::new(ffi::SQLITE_READONLY);
        let problem = "the file could be opened only for reading";
        return Err(Error::SqliteFailure(read_only, Some(problem.to_owned())));
    }
    connection.execute_batch(LIVE)
}

/// Opens an empty file for a build.
pub(crate) fn open_for_build(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.execute_batch(BUILD)?;
    Ok(connection)
}

/// Opens a file that is not being written, without touching its folder.
pub fn open_to_read(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    keep_log(&connection, true)?;
    Ok(connection)
}

/// Opens a file to check its format before its first change. Unlike a connection that only reads, this one can
/// roll back the journal of a crash during the first opening, which turned the new file to a write-ahead log.
pub(crate) fn open_to_check(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    keep_log(&connection, true)?;
    Ok(connection)
}

/// Opens a file in this process's locked folder to read it with its log. Changes neither, since the next
/// start needs them as the last process left them.
pub(crate) fn open_to_look(path: &Path) -> Result<Connection, Error> {
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
pub(crate) fn open_shared(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch(SHARED)?;
    Ok(connection)
}

/// Opens a file to read it while another process has it open.
pub(crate) fn open_beside(path: &Path) -> Result<Connection, Error> {
    let connection = open_to_read(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

/// Frames at which a log is long enough for a checkpoint: 4 MB, as SQLite's default.
pub const LOG_PAGES_MAX: usize = 1000;

/// The extent of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Checkpoint {
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
pub(crate) fn checkpoint(connection: &Connection, how_far: Checkpoint) -> Result<(), Error> {
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

/// Returns how many frames of the write-ahead log are not written back into the file.
pub(crate) fn log_backlog(connection: &Connection) -> Result<usize, Error> {
    connection.query_row("PRAGMA wal_checkpoint(NOOP)", [], |row| {
        // -1 if there is no log.
        let (frames, written_back): (i64, i64) = (row.get(1)?, row.get(2)?);
        Ok(usize::try_from(frames - written_back).unwrap_or(0))
    })
}

/// Sets whether closing the connection leaves the log for the next opening. If not, closing checkpoints the
/// log and removes it.
pub(crate) fn keep_log(connection: &Connection, keep: bool) -> Result<(), Error> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep).map(drop)
}

/// Returns the path of the write-ahead log of a file.
pub(crate) fn wal_of(path: &Path) -> PathBuf {
    files::beside(path, "-wal")
}

/// Returns SQL that shows a column of values as the texts that callers see. SQL can't compute a check character,
/// so codes that have one are shown as values.
pub(crate) fn number_column(column: &str, space: &Space) -> String {
    if let Some(format) = space.codes() {
        return if format.places().contains(&Place::Check) {
            column.to_owned()
        } else {
            code_column(column, format)
        };
    }
    let decimals = space.decimals();
    if decimals == 0 {
        return column.to_owned();
    }
    let scale = 10_i64.pow(decimals.into());
    format!(
        "iif({column} < 0, '-', '') || \
         format('%d.%0{decimals}d', abs({column}) / {scale}, abs({column}) % {scale})"
    )
}

/// Returns SQL that shows a column of values as codes without a check character.
fn code_column(column: &str, format: &CodeFormat) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let (symbols, size) = (quoted(format.symbols()), format.symbols().len() as u64);
    let mut scale = format.count();
    let mut parts = Vec::new();
    for place in format.places() {
        parts.push(match place {
            Place::Literal(literal) => quoted(&char::from(*literal).to_string()),
            Place::Symbol | Place::Check => {
                scale /= size;
                format!("substr({symbols}, {column} / {scale} % {size} + 1, 1)")
            }
        });
    }
    parts.join(" || ")
}

/// Rows to pass to [`insert`] at once: a few dozen save most of the fixed cost of a statement, and more save
/// no more.
pub(crate) const ROWS_AT_ONCE: usize = 64;

/// Inserts rows of integers with one statement: all or none. `into` is the SQL up to and including `VALUES`.
pub(crate) fn insert<const COLUMNS: usize>(
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
