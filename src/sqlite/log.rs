//! A write-ahead log from its discovery until its file can be written. The types enforce the order:
//! [`Found`], then [`Secured`], then [`Fresh`].
//!
//! The process that wrote a log may have died, or a sync may have failed, so commits in the log may not be on
//! the disk. SQLite would read them and write data that depends on them, and a power loss could then cut the
//! log where its sync failed. Therefore the committed part is copied and synced before SQLite reads it.
//!
//! The log's index (`-shm`) is not consulted. The kernel writes it to the disk at any time, so after a power
//! loss it may list frames that were checkpointed and truncated long ago.
//!
//! Format: <https://sqlite.org/fileformat2.html#the_write_ahead_log>.

use std::io::{self, BufReader, Read};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use deadpool_sqlite::rusqlite::{Connection, Error};

use super::{Checkpoint, ContentError, checkpoint, keep_log, open, wal_of};
use crate::files::{self, FileError};

const LOG_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// The log of a file that no connection has open, as the last process left it.
#[derive(Debug)]
pub struct Found(PathBuf);

/// A log whose commits are all on the disk.
#[derive(Debug)]
pub struct Secured {
    path: PathBuf,
    had_log: bool,
}

/// A connection whose next commit starts the log at its beginning. It is the only kind that can write. The name of
/// the log is durable.
///
/// The last commit of an older log may share a sector with data appended to it, and a power loss damages
/// whole sectors. SQLite fills up the sector when a commit succeeds, but the last commit may have failed.
#[derive(Debug)]
pub struct Fresh {
    connection: Connection,
    had_log: bool,
}

impl Found {
    /// Takes the log beside `path`, if there is one.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Makes every commit in the log durable.
    pub fn secure(self) -> Result<Secured, FileError> {
        let log = wal_of(&self.0);
        let had_log = files::length_bytes(&log)?.is_some_and(|bytes| bytes > 0);
        if had_log && let Some(content) = files::open_to_read(&log)? {
            match committed_bytes(content).map_err(|source| files::failed("read", &log, source))? {
                // SQLite reads nothing from it either.
                0 => {}
                bytes => files::rewrite(&log, bytes)?,
            }
        }
        Ok(Secured { path: self.0, had_log })
    }
}

impl Secured {
    /// Opens the file for use, and makes the name of its log durable.
    ///
    /// # Errors
    /// Returns SQLite's error, also if the file is missing or empty. If another process reads the log, the
    /// error is `SQLITE_BUSY`. Returns [`ContentError::File`] if the folder can't be synced.
    pub fn open(self) -> Result<Fresh, ContentError> {
        let connection = open(&self.path)?;
        checkpoint(&connection, Checkpoint::Restart)?;
        // SQLite syncs the name of a log that it creates, but ignores errors of that sync.
        files::sync_folder(files::parent(&self.path))?;
        Ok(Fresh { connection, had_log: self.had_log })
    }
}

impl Fresh {
    /// Returns the connection, for an owner that stores it in a field.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// Returns whether there was a log.
    pub fn had_log(&self) -> bool {
        self.had_log
    }

    /// See [`close`].
    pub(crate) fn close(self) -> Result<(), Error> {
        close(self.connection)
    }
}

impl Deref for Fresh {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl DerefMut for Fresh {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }
}

/// Closes a file after its log was written back, and removes the log. If that fails, the log stays for the
/// next opening.
pub(crate) fn close(connection: Connection) -> Result<(), Error> {
    keep_log(&connection, false)?;
    connection.close().map_err(|(_, error)| error)
}

/// Returns the length of a log up to the end of its last commit, in bytes, or 0 if it has none. Like SQLite,
/// it stops at the first frame whose salt or checksum is wrong.
fn committed_bytes(log: impl Read) -> io::Result<u64> {
    let mut log = BufReader::new(log);
    let mut header = [0; LOG_HEADER];
    if !fill(&mut log, &mut header)? {
        return Ok(0);
    }
    let number = |bytes: &[u8], at: usize| {
        u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
    };
    // The lowest bit of the magic number gives the byte order of the checksums.
    let order = match number(&header, 0) {
        0x377f_0682 => u32::from_le_bytes,
        0x377f_0683 => u32::from_be_bytes,
        _ => return Ok(0),
    };
    let mut sums = checksum((0, 0), &header[..24], order);
    let page_bytes = number(&header, 8);
    if sums != (number(&header, 24), number(&header, 28)) || !(512..=65_536).contains(&page_bytes) {
        return Ok(0);
    }
    let mut frame = vec![0; FRAME_HEADER + page_bytes as usize];
    let (mut bytes, mut committed) = (LOG_HEADER as u64, 0);
    while fill(&mut log, &mut frame)? {
        sums = checksum(sums, &frame[..8], order);
        sums = checksum(sums, &frame[FRAME_HEADER..], order);
        if frame[8..16] != header[16..24] || sums != (number(&frame, 16), number(&frame, 20)) {
            break;
        }
        bytes += frame.len() as u64;
        // The size of the database in pages. It is 0 in all frames of a commit except the last.
        if number(&frame, 4) > 0 {
            committed = bytes;
        }
    }
    Ok(committed)
}

/// Fills the buffer. Returns false if the input ends first.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns SQLite's running checksum over pairs of words.
fn checksum(sums: (u32, u32), bytes: &[u8], order: fn([u8; 4]) -> u32) -> (u32, u32) {
    bytes.chunks_exact(8).fold(sums, |(first, second), pair| {
        let word = |at: usize| order(pair[at..at + 4].try_into().expect("4 bytes"));
        let first = first.wrapping_add(word(0)).wrapping_add(second);
        (first, second.wrapping_add(word(4)).wrapping_add(first))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::open_for_build;
    use super::*;

    fn file_with_rows(folder: &Path) -> std::path::PathBuf {
        let path = folder.join("file.db");
        let connection = open_for_build(&path).unwrap();
        connection.execute_batch("CREATE TABLE rows (id INTEGER PRIMARY KEY, text)").unwrap();
        connection.close().unwrap();
        path
    }

    #[test]
    fn a_log_is_secured_up_to_its_last_commit_and_no_further() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with_rows(folder.path());
        let connection = Found::new(&path).secure().unwrap().open().unwrap();
        connection.execute_batch("INSERT INTO rows VALUES (1, 'committed')").unwrap();
        let committed = fs::metadata(wal_of(&path)).unwrap().len();
        // A transaction that exceeds its cache spills into the log before it commits.
        connection
            .execute_batch(
                "PRAGMA cache_size = 10;
                 BEGIN;
                 WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
                 INSERT INTO rows SELECT i, 'never committed' FROM n;",
            )
            .unwrap();
        let copy = folder.path().join("copy.db");
        fs::copy(&path, &copy).unwrap();
        fs::copy(wal_of(&path), wal_of(&copy)).unwrap();
        assert!(fs::metadata(wal_of(&copy)).unwrap().len() > 10 * committed, "it did not spill");

        let secured = Found::new(&copy).secure().unwrap();
        assert_eq!(fs::metadata(wal_of(&copy)).unwrap().len(), committed);
        assert!(!files::unfinished(&wal_of(&copy)).exists());
        let connection = secured.open().unwrap();
        let rows: i64 =
            connection.query_row("SELECT count(*) FROM rows", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 1);
    }

    #[test]
    fn a_log_that_another_process_reads_is_not_begun_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with_rows(folder.path());
        let writer = Found::new(&path).secure().unwrap().open().unwrap();
        writer.execute_batch("INSERT INTO rows VALUES (1, '')").unwrap();
        let reader = super::super::open_beside(&path).unwrap();
        super::super::begin_snapshot(&reader).unwrap();
        writer.execute_batch("INSERT INTO rows VALUES (2, '')").unwrap();

        writer.busy_timeout(std::time::Duration::ZERO).unwrap();
        let error = checkpoint(&writer, Checkpoint::Restart).unwrap_err();
        assert_eq!(super::super::fault(&error), super::super::Fault::Passing, "{error}");
        drop(reader);
        checkpoint(&writer, Checkpoint::Restart).unwrap();
    }
}
