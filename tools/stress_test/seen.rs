//! The numbers of this run and of earlier ones, as exact text. Knows nothing of requests.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};

use crate::args::is_pool_name;
use crate::numbers::{is_code, is_number};

/// Far beyond any line of this tool: a longer one shows that the file is another one.
const LINE_LIMIT_BYTES: u64 = 1 << 10;

/// The run in which a number came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    This,
    Earlier,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::This => "already in this run",
            Self::Earlier => "already in an earlier run",
        })
    }
}

/// All numbers, each as `type number`, which is also its line in the file of `--seen`.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    numbers: HashMap<Box<str>, Run>,
    /// How many of them are of earlier runs.
    pub(crate) earlier: u64,
    file: Option<File>,
}

impl Seen {
    /// Reads the numbers of earlier runs, and creates the file if it is missing.
    ///
    /// # Errors
    /// The file can't be opened for reading and appending, another run uses it, or a line is broken.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            // Two runs at once would not see each other's numbers, and both would append them.
            Err(TryLockError::WouldBlock) => bail!("another run is using it"),
            Err(TryLockError::Error(error)) => return Err(error).context("can't lock it"),
        }
        let mut seen = Self::default();
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        while reader.by_ref().take(LINE_LIMIT_BYTES).read_until(b'\n', &mut line)? > 0 {
            let place = seen.earlier + 1;
            let number = parse_line(&line).with_context(|| format!("line {place}"))?;
            // Only new numbers are appended, so something else has changed this file.
            let is_new = seen.numbers.insert(number.into(), Run::Earlier).is_none();
            ensure!(is_new, "line {place}: {number} is in it twice");
            seen.earlier += 1;
            line.clear();
        }
        seen.file = Some(file);
        Ok(seen)
    }

    /// Adds a number, or returns the run in which it came before.
    pub(crate) fn add(&mut self, pool: &str, number: &str) -> Option<Run> {
        match self.numbers.entry(format!("{pool} {number}").into()) {
            Entry::Occupied(known) => Some(*known.get()),
            Entry::Vacant(free) => {
                free.insert(Run::This);
                None
            }
        }
    }

    /// Returns how many different numbers are of this run.
    pub(crate) fn new_count(&self) -> u64 {
        self.numbers.len() as u64 - self.earlier
    }

    /// Appends the numbers of this run to the file and syncs it.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut writer = BufWriter::new(file);
        for (number, _) in self.numbers.iter().filter(|(_, run)| **run == Run::This) {
            writeln!(writer, "{number}")?;
        }
        writer.flush()?;
        Ok(file.sync_all()?)
    }
}

fn parse_line(line: &[u8]) -> anyhow::Result<&str> {
    let text = std::str::from_utf8(line).context("not UTF-8")?;
    // The rest of a line that was cut off could be a number, but another one.
    let text = text.strip_suffix('\n').context("has no end; was the file cut off?")?;
    let parts = text.split_once(' ');
    let is_good = parts
        .is_some_and(|(pool, number)| is_pool_name(pool) && (is_number(number) || is_code(number)));
    ensure!(is_good, "{text:?} is not \"type number\"");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_any_length_are_found_again() {
        let mut seen = Seen::default();
        let all = ["0", "00", "-0", "0.0", "9007199254740991", "-9007199254740991", "1e9", "1E9"];
        for text in all {
            assert_eq!(seen.add("int", text), None, "{text} is new");
        }
        for text in all {
            assert_eq!(seen.add("int", text), Some(Run::This), "{text} is known");
        }
        assert_eq!(seen.new_count(), all.len() as u64);
    }

    #[test]
    fn only_whole_lines_of_type_and_number_are_read() {
        assert_eq!(parse_line(b"float -1.50\n").expect("a good line"), "float -1.50");
        let broken: [&[u8]; 10] = [
            b"\n",
            b"int\n",
            b"int 1",
            b"int 1 \n",
            b"int  1\n",
            b" int 1\n",
            b"int x\n",
            b"int \"1\n",
            b"int 1 2\n",
            b"in\xfft 1\n",
        ];
        for line in broken {
            parse_line(line).expect_err("a broken line");
        }
    }
}
