//! The numbers that ever came, in this run and in earlier ones, as exact text. Knows nothing of
//! requests or answers.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use hashbrown::HashSet;
use serde_json::value::RawValue;

use crate::args::{PoolIndex, is_pool_name};

/// Far beyond any line that was written here: what is longer is some other file.
const LINE_LIMIT_BYTES: u64 = 1 << 10;

/// Whether a number came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sighting {
    New,
    /// Earlier in this run.
    Again,
    /// In a run that `--seen` remembers.
    FromEarlierRun,
}

/// All numbers, by pool.
#[derive(Debug)]
pub(crate) struct Seen {
    pools: Vec<SeenPool>,
}

#[derive(Debug)]
struct SeenPool {
    name: String,
    earlier: Texts,
    now: Texts,
}

impl Seen {
    pub(crate) fn new(pools: &[String]) -> Self {
        Self { pools: pools.iter().map(|name| SeenPool::new(name)).collect() }
    }

    /// Remembers a number, and tells whether it came before.
    pub(crate) fn note(&mut self, pool: PoolIndex, number: &str) -> Sighting {
        let pool = &mut self.pools[usize::from(pool.0)];
        if pool.earlier.contains(number) {
            Sighting::FromEarlierRun
        } else if pool.now.insert(number) {
            Sighting::New
        } else {
            Sighting::Again
        }
    }

    /// How many numbers earlier runs have left.
    pub(crate) fn earlier_count(&self) -> u64 {
        self.pools.iter().map(|pool| pool.earlier.len()).sum()
    }

    /// How many different numbers this run has added.
    pub(crate) fn new_count(&self) -> u64 {
        self.pools.iter().map(|pool| pool.now.len()).sum()
    }

    /// A number of an earlier run; false when it is there already.
    fn recall(&mut self, pool: &str, number: &str) -> bool {
        let place = match self.pools.iter().position(|known| known.name == pool) {
            Some(place) => place,
            None => {
                self.pools.push(SeenPool::new(pool));
                self.pools.len() - 1
            }
        };
        self.pools[place].earlier.insert(number)
    }
}

impl SeenPool {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), earlier: Texts::default(), now: Texts::default() }
    }
}

/// The file of `--seen`: a line each, `type number`.
#[derive(Debug)]
pub(crate) struct SeenFile {
    file: File,
}

impl SeenFile {
    /// Reads what earlier runs left; a file that is not there yet is made.
    ///
    /// # Errors
    /// It cannot be opened for reading and appending, another run has it, or a line of it is
    /// broken.
    pub(crate) fn open(path: &Path, seen: &mut Seen) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            // Two runs at once would not see each other's numbers, and both add them.
            Err(TryLockError::WouldBlock) => bail!("another run is using it"),
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock it"),
        }
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        for place in 1_u64.. {
            line.clear();
            if reader.by_ref().take(LINE_LIMIT_BYTES).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let (pool, number) = parse_line(&line).with_context(|| format!("line {place}"))?;
            // Only what was new is ever added, so this file is not as we left it.
            ensure!(seen.recall(pool, number), "line {place}: {pool} {number} is in it twice");
        }
        Ok(Self { file })
    }

    /// Adds the new numbers of this run, durably.
    pub(crate) fn save(self, seen: &Seen) -> anyhow::Result<()> {
        let mut writer = BufWriter::new(&self.file);
        for pool in &seen.pools {
            pool.now.try_for_each(|number| writeln!(writer, "{} {number}", pool.name))?;
        }
        writer.flush()?;
        drop(writer);
        self.file.sync_all()?;
        Ok(())
    }
}

fn parse_line(line: &[u8]) -> anyhow::Result<(&str, &str)> {
    let text = std::str::from_utf8(line).context("not UTF-8")?;
    // A line that was cut off could still read as a number, but as another one.
    let text = text.strip_suffix('\n').context("has no end; was the file cut off?")?;
    let broken = || format!("{text:?} is not \"type number\"");
    let (pool, number) = text.split_once(' ').with_context(broken)?;
    let raw = serde_json::from_str::<&RawValue>(number).with_context(broken)?;
    let exact = raw.get().len() == number.len();
    let is_number = number.starts_with(|first: char| first == '-' || first.is_ascii_digit());
    ensure!(is_pool_name(pool) && exact && is_number, broken());
    Ok((pool, number))
}

/// A set of number texts, in about 16 bytes each.
///
/// A JSON number is written in 15 symbols, so with four bits a symbol 16 of them fit into a `u64`,
/// exactly. The server's numbers have at most 16 significant digits and a point; the few that are
/// longer, below zero say, are kept as they are.
#[derive(Debug, Default)]
struct Texts {
    short: HashSet<u64>,
    long: HashSet<Box<str>>,
}

impl Texts {
    /// False when it is there already.
    fn insert(&mut self, text: &str) -> bool {
        match pack(text) {
            Some(packed) => self.short.insert(packed),
            None if self.long.contains(text) => false,
            None => self.long.insert(text.into()),
        }
    }

    fn contains(&self, text: &str) -> bool {
        match pack(text) {
            Some(packed) => self.short.contains(&packed),
            None => self.long.contains(text),
        }
    }

    fn len(&self) -> u64 {
        self.short.len() as u64 + self.long.len() as u64
    }

    fn try_for_each<E>(&self, mut visit: impl FnMut(&str) -> Result<(), E>) -> Result<(), E> {
        let mut text = String::with_capacity(PACKED_LIMIT_SYMBOLS);
        for packed in &self.short {
            unpack(*packed, &mut text);
            visit(&text)?;
        }
        self.long.iter().try_for_each(|text| visit(text))
    }
}

/// Everything that a JSON number is written in. A symbol's code is its place here plus one, so that
/// no text is another one with zeros before it.
const SYMBOLS: &[u8; 15] = b"0123456789.-+eE";
const SYMBOL_BITS: u32 = 4;
const PACKED_LIMIT_SYMBOLS: usize = (u64::BITS / SYMBOL_BITS) as usize;

/// The code of each byte; 0 for those that are no symbol.
const CODES: [u8; 256] = {
    let mut codes = [0; 256];
    let mut place = 0;
    while place < SYMBOLS.len() {
        codes[SYMBOLS[place] as usize] = place as u8 + 1;
        place += 1;
    }
    codes
};

/// None when the text is too long, or no number.
fn pack(text: &str) -> Option<u64> {
    if text.len() > PACKED_LIMIT_SYMBOLS {
        return None;
    }
    text.bytes().try_fold(0, |packed, byte| match CODES[usize::from(byte)] {
        0 => None,
        code => Some(packed << SYMBOL_BITS | u64::from(code)),
    })
}

fn unpack(packed: u64, text: &mut String) {
    text.clear();
    for place in (0..PACKED_LIMIT_SYMBOLS).rev() {
        match packed >> (place as u32 * SYMBOL_BITS) & 0xf {
            0 => {}
            code => text.push(char::from(SYMBOLS[code as usize - 1])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_keeps_the_exact_text(text in "[0-9.eE+-]{1,16}") {
            let mut back = String::new();
            unpack(pack(&text).expect("16 symbols fit"), &mut back);
            prop_assert_eq!(back, text);
        }
    }

    #[test]
    fn texts_of_any_length_are_found_again() {
        let mut texts = Texts::default();
        let all = ["0", "00", "-0", "0.0", "9007199254740991", "-9007199254740991", "1e9", "1E9"];
        for text in all {
            assert!(texts.insert(text), "{text} is new");
        }
        for text in all {
            assert!(!texts.insert(text) && texts.contains(text), "{text} is known");
        }
        assert_eq!(texts.len(), all.len() as u64);
    }

    #[test]
    fn only_whole_lines_of_type_and_number_are_read() {
        assert_eq!(parse_line(b"float -1.50\n").expect("a good line"), ("float", "-1.50"));
        let broken: [&[u8]; 10] = [
            b"\n",
            b"int\n",
            b"int 1",
            b"int 1 \n",
            b"int  1\n",
            b" int 1\n",
            b"int x\n",
            b"int \"1\"\n",
            b"int 1 2\n",
            b"in\xfft 1\n",
        ];
        for line in broken {
            parse_line(line).expect_err("a broken line");
        }
    }
}
