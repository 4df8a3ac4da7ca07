//! The file of a draw: the part that is written so far, the record beside it, and the name that it gets once it
//! is complete. Knows nothing of servers.
//!
//! `FILE.partial` has the chunks in order, and `FILE.draw` says which draw that is, and how many chunks were
//! written with which digest. A crash can leave more in the file than the record says, or less if the system
//! failed: the digest decides whether the recorded part is there, and what follows it is written again.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Draw, Key};
use crate::commands::exit::{Ended, Exit};
use crate::files;

/// The time between two records, which cost a sync each. A `kill -9` loses the chunks since the last one, and
/// they are drawn again with the same keys.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);

/// The bytes of one read when a file is checked.
const READ_BYTES: usize = 1 << 16;

/// The content of `FILE.draw`.
#[derive(Deserialize, Serialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) draw: Draw,
    #[serde(flatten)]
    written: Written,
}

/// The part of a file that is written.
#[derive(Default, Deserialize, Serialize)]
struct Written {
    chunks: u32,
    bytes: u64,
    /// In hexadecimal digits.
    sha256: String,
}

/// The paths of a draw's file.
#[derive(Debug)]
pub(super) struct Paths {
    /// The complete file.
    out: PathBuf,
    partial: PathBuf,
    record: PathBuf,
}

impl Paths {
    pub(super) fn new(out: &Path) -> Self {
        let (partial, record) = (files::beside(out, ".partial"), files::beside(out, ".draw"));
        Self { out: out.to_owned(), partial, record }
    }

    /// Returns the record of the existing file, or of an earlier run with this key whose file is gone.
    ///
    /// # Errors
    /// [`Exit::Settings`] if there is a file without a record.
    pub(super) fn record(&self, key: &Key) -> anyhow::Result<Option<Record>> {
        let existing = self.existing()?;
        let Some(content) = files::read(&self.record)? else {
            return match existing {
                Some(path) => Err(self.refusal("no draw is recorded for it", path)),
                None => Ok(None),
            };
        };
        let record: Record = serde_json::from_slice(&content).map_err(|error| {
            self.refusal(&format!("it is not the record of a draw ({error})"), &self.record)
        })?;
        Ok(Some(record).filter(|record| existing.is_some() || record.draw.key == *key))
    }

    /// Opens the file for the chunks that it lacks. Returns `None` if an earlier run of this draw completed it.
    ///
    /// # Errors
    /// [`Exit::Settings`] if there is a file that is not of this draw, [`Exit::InUse`] if another process writes
    /// it.
    pub(super) fn open(
        self,
        draw: &Draw,
        record: Option<Record>,
    ) -> anyhow::Result<Option<Output>> {
        if let Some(path) = self.existing()?
            && let Some(record) = &record
            && let Some(difference) = difference(&record.draw, draw)
        {
            return Err(self.refusal(&format!("it is of another draw: {difference}"), path));
        }
        let written = record.filter(|record| record.draw == *draw).map(|record| record.written);
        let written = written.filter(|written| written.chunks <= draw.chunks()).unwrap_or_default();
        if let Some(mut file) = open_to_read(&self.out)? {
            let is_whole = written.chunks == draw.chunks()
                && files::length_bytes(&self.out)? == Some(written.bytes)
                && hash(&mut file, &written)
                    .map_err(|error| files::failed("read", &self.out, error))?
                    .is_some();
            return match is_whole {
                true => Ok(None),
                false => {
                    Err(self.refusal("its content is not what this draw has written", &self.out))
                }
            };
        }
        let mut file = self.lock()?;
        let prepared = prepare(&mut file, written);
        let (sha256, written) =
            prepared.map_err(|error| files::failed("read", &self.partial, error))?;
        let mut output = Output {
            draw: draw.clone(),
            to: Box::new(file),
            paths: Some(self),
            sha256,
            written,
            recorded: Instant::now(),
        };
        output.record()?;
        Ok(Some(output))
    }

    /// Returns the complete file, or the partial one if there is anything in it.
    fn existing(&self) -> anyhow::Result<Option<&Path>> {
        if files::length_bytes(&self.out)?.is_some() {
            return Ok(Some(&self.out));
        }
        let partial_bytes = files::length_bytes(&self.partial)?.unwrap_or(0);
        Ok((partial_bytes > 0).then_some(&self.partial))
    }

    /// Opens the partial file, creates it if it is missing, and locks it for this process.
    fn lock(&self) -> anyhow::Result<File> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).mode(0o600).open(&self.partial);
        let file = file.map_err(|error| files::failed("create", &self.partial, error))?;
        let locked = match file.try_lock() {
            // Invariant: a process that had the lock until now may have renamed the file.
            Ok(()) => files::length_bytes(&self.out)?.is_none(),
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(error)) => {
                return Err(files::failed("lock", &self.partial, error).into());
            }
        };
        match locked {
            true => Ok(file),
            false => {
                let problem = format!(
                    "another process writes {}: wait until it ends, and run the command again",
                    self.partial.display()
                );
                Err(Ended::error(Exit::InUse, problem))
            }
        }
    }

    fn refusal(&self, problem: &str, path: &Path) -> anyhow::Error {
        let (path, out) = (path.display(), self.out.display());
        let message = format!(
            "{path} exists, and {problem}. Move {out}, {out}.partial and {out}.draw away, or choose another \
             file with --out"
        );
        Ended::error(Exit::Settings, message)
    }
}

/// Returns the first part in which two draws differ.
fn difference(recorded: &Draw, draw: &Draw) -> Option<String> {
    let parts = |draw| match serde_json::to_value(draw) {
        Ok(Value::Object(parts)) => parts,
        _ => unreachable!("a draw is an object"),
    };
    let (recorded, draw) = (parts(recorded), parts(draw));
    let mut parts =
        recorded.iter().filter_map(|(name, value)| Some((name, value, draw.get(name)?)));
    let (name, recorded, wanted) = parts.find(|(_, recorded, wanted)| recorded != wanted)?;
    Some(format!("{name} was {recorded}, not {wanted}"))
}

fn open_to_read(path: &Path) -> anyhow::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(files::failed("open", path, error).into()),
    }
}

/// Truncates a partial file to the written part, or to nothing if its content is another one. Returns the state
/// of the hash, and the part that is left.
fn prepare(file: &mut File, written: Written) -> io::Result<(Sha256, Written)> {
    let (sha256, written) = match hash(file, &written)? {
        Some(sha256) => (sha256, written),
        None => (Sha256::new(), Written::default()),
    };
    file.set_len(written.bytes)?;
    file.seek(SeekFrom::End(0))?;
    Ok((sha256, written))
}

/// Reads the written part from the beginning of a file. Returns the state of the hash, or `None` if the content
/// is another one.
fn hash(file: &mut File, written: &Written) -> io::Result<Option<Sha256>> {
    let mut sha256 = Sha256::new();
    let mut rest = BufReader::with_capacity(READ_BYTES, file.take(written.bytes));
    loop {
        let piece = rest.fill_buf()?;
        if piece.is_empty() {
            break;
        }
        sha256.update(piece);
        let length = piece.len();
        rest.consume(length);
    }
    let same = hex::encode(sha256.clone().finalize()) == written.sha256;
    Ok(same.then_some(sha256))
}

/// The place that the numbers are written to.
pub(super) struct Output {
    draw: Draw,
    to: Box<dyn Write>,
    /// `None` for standard output.
    paths: Option<Paths>,
    /// The hash of the written part.
    sha256: Sha256,
    written: Written,
    /// When the last record was written.
    recorded: Instant,
}

impl Output {
    pub(super) fn stdout(draw: Draw) -> Self {
        Self {
            draw,
            to: Box::new(io::stdout()),
            paths: None,
            sha256: Sha256::new(),
            written: Written::default(),
            recorded: Instant::now(),
        }
    }

    pub(super) fn is_stdout(&self) -> bool {
        self.paths.is_none()
    }

    /// Returns the first chunk that is not written yet.
    pub(super) fn next_chunk(&self) -> u32 {
        self.written.chunks + 1
    }

    /// Returns how many numbers are not written yet.
    pub(super) fn missing(&self) -> u32 {
        self.draw.count - self.draw.count_before(self.next_chunk())
    }

    /// Returns what to do after an error.
    pub(super) fn rerun(&self) -> &'static str {
        match self.is_stdout() {
            true => "the same command writes all of them from the beginning",
            false => "the same command continues the draw",
        }
    }

    /// Writes the next chunk.
    pub(super) fn append(&mut self, lines: Vec<u8>) -> anyhow::Result<()> {
        let part = self.draw.part(self.next_chunk(), lines);
        let written = self.to.write_all(&part).and_then(|()| self.to.flush());
        written.map_err(|error| match &self.paths {
            Some(paths) => files::failed("write", &paths.partial, error).into(),
            None => anyhow::anyhow!("can't write to standard output: {error}"),
        })?;
        self.sha256.update(&part);
        self.written.chunks += 1;
        self.written.bytes += part.len() as u64;
        match self.recorded.elapsed() >= RECORD_INTERVAL {
            true => self.record(),
            false => Ok(()),
        }
    }

    /// Writes the record of the chunks that are written.
    pub(super) fn record(&mut self) -> anyhow::Result<()> {
        let Some(paths) = &self.paths else {
            return Ok(());
        };
        self.written.sha256 = hex::encode(self.sha256.clone().finalize());
        let record = RecordOf { draw: &self.draw, written: &self.written };
        let mut content = serde_json::to_vec_pretty(&record).expect("texts and numbers");
        content.push(b'\n');
        files::replace(&paths.record, &content)?;
        self.recorded = Instant::now();
        Ok(())
    }

    /// Makes the complete file durable, and gives it its name.
    pub(super) fn finish(&mut self) -> anyhow::Result<()> {
        let Some(paths) = &self.paths else {
            return Ok(());
        };
        let (partial, out) = (paths.partial.clone(), paths.out.clone());
        files::sync_file(&partial)?;
        // Invariant: recorded as complete before it gets its name, so that a rerun knows the file.
        self.record()?;
        Ok(files::rename_durably(&partial, &out)?)
    }
}

/// A [`Record`] that is written.
#[derive(Serialize)]
struct RecordOf<'a> {
    #[serde(flatten)]
    draw: &'a Draw,
    #[serde(flatten)]
    written: &'a Written,
}

impl fmt::Display for Output {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.paths {
            Some(paths) => paths.out.display().fmt(formatter),
            None => formatter.write_str("standard output"),
        }
    }
}
