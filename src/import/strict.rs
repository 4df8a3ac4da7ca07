//! Checks that a CSV keeps to RFC 4180. Knows nothing of what its cells mean.
//!
//! The csv crate finds a parse for every text. If a quotation mark is not closed, that parse has all lines up to the
//! next quotation mark in one cell, so their numbers would not be imported.

use std::io::{self, Read};

/// The longest record in bytes. The csv crate holds a record in memory.
const RECORD_BYTES_MAX: usize = 1 << 20;

/// A record that breaks the rules.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub(super) struct BrokenRecord {
    /// The line in which the record begins.
    pub(super) line: u64,
    pub(super) problem: &'static str,
}

/// Passes a CSV on up to the first record that breaks the rules, and then fails with [`BrokenRecord`].
pub(super) struct Strict<R> {
    from: R,
    place: Place,
    line: u64,
    record_line: u64,
    record_bytes: usize,
    found: Option<BrokenRecord>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// At the start of a cell.
    Start,
    /// In a cell without quotation marks.
    Bare,
    /// Between quotation marks.
    Quoted,
    /// After a quotation mark that ends a cell, or that is the first of two that stand for one.
    Closed,
    /// After a carriage return that is not between quotation marks.
    Return,
}

impl<R> Strict<R> {
    pub(super) fn new(from: R) -> Self {
        let place = Place::Start;
        Self { from, place, line: 1, record_line: 1, record_bytes: 0, found: None }
    }

    fn step(&mut self, byte: u8) -> Result<(), &'static str> {
        self.place = self.place.after(byte)?;
        self.line += u64::from(byte == b'\n');
        self.record_bytes += 1;
        if byte == b'\n' && self.place == Place::Start {
            (self.record_line, self.record_bytes) = (self.line, 0);
        }
        match self.record_bytes {
            0..=RECORD_BYTES_MAX => Ok(()),
            _ => Err("its record is longer than 1 MiB; a quotation mark may not be closed"),
        }
    }

    fn broken(&self, problem: &'static str) -> BrokenRecord {
        BrokenRecord { line: self.record_line, problem }
    }
}

impl Place {
    fn after(self, byte: u8) -> Result<Self, &'static str> {
        match (self, byte) {
            (Self::Quoted, b'"') => Ok(Self::Closed),
            (Self::Quoted, _) | (Self::Start | Self::Closed, b'"') => Ok(Self::Quoted),
            (_, b'\n') => Ok(Self::Start),
            (_, b'\r') => Ok(Self::Return),
            (Self::Return, _) => Err("a carriage return is not at the end of a line"),
            (_, b',') => Ok(Self::Start),
            (Self::Closed, _) => Err("text follows a closing quotation mark"),
            (Self::Bare, b'"') => Err("a quotation mark is in a cell that does not begin with one"),
            (Self::Start | Self::Bare, _) => Ok(Self::Bare),
        }
    }
}

impl<R: Read> Read for Strict<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(broken) = self.found {
            return Err(io::Error::other(broken));
        }
        let length = self.from.read(buffer)?;
        if length == 0 && self.place == Place::Quoted {
            return Err(io::Error::other(self.broken("a quotation mark is not closed")));
        }
        let mut bytes = buffer[..length].iter();
        let problem = bytes.find_map(|&byte| self.step(byte).err());
        self.found = problem.map(|problem| self.broken(problem));
        // The last of these bytes, which may be wrong, never ends a record. The records before it are read.
        Ok(length - bytes.len())
    }
}
