//! Whether a write-ahead log still has every commit that its process saw succeed.
//!
//! SQLite reads a log up to the first frame that is not as it was written, and drops the rest without
//! a word: right after a power loss, when that is what was never synced, and wrong when the frame was
//! damaged later, since the rest are leases that were handed out. The process that died has left the
//! answer beside the log: its index (`-shm`) says how many frames were committed, and SQLite writes it
//! after the log was synced, so that even an index which a power loss threw back claims only frames that
//! are on the disk.
//!
//! Formats: <https://sqlite.org/fileformat2.html#the_write_ahead_log>,
//! <https://sqlite.org/walformat.html#the_wal_index_file_format>.

use std::io::{self, BufReader, Read};
use std::path::Path;

use super::wal_of;
use crate::files::{self, FileError};

/// Bytes of one of the two equal headers of an index, and of its whole beginning.
const INDEX_HEADER: usize = 48;
const INDEX: usize = 2 * INDEX_HEADER + 4;
const LOG_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
/// In both headers: the one version of the formats.
const VERSION: u32 = 3_007_000;

/// Checks the log of a file that nobody has open, and makes it durable. Comes before SQLite opens the
/// file, as [`check_log`] does.
///
/// The log may have commits whose sync failed, in this process or one before. SQLite would read them,
/// write what follows them, and put them into the file; after a power loss the log would end where its
/// sync had failed. So all of it is written anew.
///
/// Whoever is the first to write to the file has to [checkpoint](super::checkpoint) the log before, on
/// the same connection, so that it is begun anew: its last commit may share a sector with what would be
/// appended, and a power loss spoils sectors whole. SQLite fills the sector when a commit succeeds, and
/// here one may not have.
///
/// # Errors
/// The file system refused, or (inside) what the log lacks.
pub fn secure_log(path: &Path) -> Result<Result<(), String>, FileError> {
    let checked = check_log(path)?;
    if checked.is_ok() {
        files::write_anew(&wal_of(path))?;
    }
    Ok(checked)
}

/// Compares the log of a file that nobody has open with its index. SQLite rebuilds the index when it
/// opens the file: ask before.
///
/// # Errors
/// The file system refused, or (inside) what the log lacks.
pub fn check_log(path: &Path) -> Result<Result<(), String>, FileError> {
    let Some(mut file) = files::open_to_read(&files::beside(path, "-shm"))? else {
        return Ok(Ok(()));
    };
    let mut index = [0; INDEX];
    // An index that can't be read or is being written says nothing.
    let index = file.read_exact(&mut index).ok().and_then(|()| Index::parse(&index));
    let Some(index) = index.filter(|index| index.frames > index.in_file) else {
        return Ok(Ok(()));
    };
    let frames = match files::open_to_read(&wal_of(path))? {
        Some(log) => whole_frames(log, &index).unwrap_or(0),
        None => 0,
    };
    if frames >= index.frames {
        return Ok(Ok(()));
    }
    let committed = index.frames;
    Ok(Err(format!("its write-ahead log had {committed} frames, of which {frames} are whole")))
}

/// What the last process knew of its log.
struct Index {
    /// Committed, from the first.
    frames: u32,
    /// As many of them are in the file itself.
    in_file: u32,
    salt: [u8; 8],
}

impl Index {
    fn parse(bytes: &[u8; INDEX]) -> Option<Self> {
        let (header, copy) = (&bytes[..INDEX_HEADER], &bytes[INDEX_HEADER..2 * INDEX_HEADER]);
        let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let sums = checksum((0, 0), &header[..40], u32::from_ne_bytes);
        let valid = header == copy && number(0) == VERSION && sums == (number(40), number(44));
        let salt = header[32..40].try_into().expect("8 bytes");
        valid.then(|| Self { frames: number(16), in_file: number(2 * INDEX_HEADER), salt })
    }
}

/// How many frames from the first are as they were written; all where the log is a later one than the
/// index knows.
fn whole_frames(log: impl Read, index: &Index) -> io::Result<u32> {
    let mut log = BufReader::new(log);
    let mut header = [0; LOG_HEADER];
    log.read_exact(&mut header)?;
    let number = |bytes: &[u8], at: usize| {
        u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
    };
    // The lowest bit of the magic number tells in which order the sums take the bytes.
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
    if header[16..24] != index.salt {
        // Begun anew, which happens only when all of the old one is in the file.
        return Ok(index.frames);
    }
    let mut frame = vec![0; FRAME_HEADER + page_bytes as usize];
    for whole in 0..index.frames {
        if log.read_exact(&mut frame).is_err() {
            return Ok(whole);
        }
        sums = checksum(sums, &frame[..8], order);
        sums = checksum(sums, &frame[FRAME_HEADER..], order);
        let stands = (number(&frame, 16), number(&frame, 20));
        if frame[8..16] != index.salt || sums != stands {
            return Ok(whole);
        }
    }
    Ok(index.frames)
}

/// SQLite's running sums over pairs of words.
fn checksum(sums: (u32, u32), bytes: &[u8], order: fn([u8; 4]) -> u32) -> (u32, u32) {
    bytes.chunks_exact(8).fold(sums, |(first, second), pair| {
        let word = |at: usize| order(pair[at..at + 4].try_into().expect("4 bytes"));
        let first = first.wrapping_add(word(0)).wrapping_add(second);
        (first, second.wrapping_add(word(4)).wrapping_add(first))
    })
}
