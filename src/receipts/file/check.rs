//! Checks a whole file of receipts. Changes nothing, and knows nothing of shards. Reads each row once and keeps only
//! sums: keys are looked up one by one only if the sums of a bucket and of its receipts differ.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use rusqlite::Connection;

use super::super::chain::{Head, broken, continues};
use super::super::record::{KeyDigest, Origin, Receipt};
use super::index::{self, Entry};
use super::keys::{self, Bucket};
use super::{Known, SELECT_AFTER, read_receipt};
use crate::batch::{Report, Tally};
use crate::space::Value;
use crate::sqlite::{self, rusqlite};

/// The maximum number of SQLite's own messages about the file.
const PROBLEMS_MAX: usize = 10;

/// The most numbers that are not in the index and are compared all the same: 24 MB. The same holds for keys that are
/// in no bucket.
const TAIL_MAX: usize = 1 << 20;

/// Returns the name of the shard that has a value of a pool unused. It is called with the values of a pool in
/// ascending order.
pub(crate) type Unused<'u> = &'u mut dyn FnMut(&Origin, Value) -> Option<String>;

/// The result of checking a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked {
    pub(crate) head: Head,
    pub(crate) receipts: u64,
    /// The numbers of all receipts.
    pub(crate) numbers: u64,
    /// The numbers that were not compared with others, because the index does not have them.
    pub(crate) not_compared: u64,
}

impl fmt::Display for Checked {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { head, receipts, numbers, .. } = self;
        write!(formatter, "receipts: {receipts} receipts, {numbers} numbers, head {head}")
    }
}

/// A check in progress.
struct Check<'c> {
    connection: &'c Connection,
    known: Known,
    /// Newest first.
    buckets: Vec<Bucket>,
    /// The last receipt whose key is in a bucket.
    keyed_to: u64,
    /// The last receipt that is in the index.
    indexed_to: u64,
    hash: RandomState,
}

/// The sums of all receipts.
struct Sums {
    checked: Checked,
    /// The keys of each bucket's receipts.
    keys: Vec<Tally>,
    /// The keys that are in no bucket yet, with their receipts.
    recent: HashMap<KeyDigest, u64>,
    /// The numbers that the index should have.
    indexed: Tally,
    /// The first of the other numbers.
    tail: Vec<Entry>,
}

/// Reads all receipts, and checks the chain, the keys and the numbers.
pub(super) fn check(
    connection: &Connection,
    unused: Unused<'_>,
    report: Report<'_>,
) -> Result<Checked, rusqlite::Error> {
    for problem in sqlite::problems(connection, PROBLEMS_MAX)? {
        report("SQLite finds it damaged", problem);
    }
    let check = Check {
        connection,
        known: Known::read(connection)?,
        buckets: keys::buckets(connection)?,
        keyed_to: keys::keyed_to(connection)?,
        indexed_to: index::indexed_to(connection)?,
        hash: RandomState::new(),
    };
    let Sums { checked, keys, recent, indexed, tail } = check.receipts(report)?;
    check.keys(&keys, &recent, report)?;
    check.numbers(indexed, tail, unused, report)?;
    Ok(checked)
}

impl Check<'_> {
    /// Reads all receipts, and checks the chain.
    fn receipts(&self, report: Report<'_>) -> Result<Sums, rusqlite::Error> {
        let checked = Checked { head: Head::START, receipts: 0, numbers: 0, not_compared: 0 };
        let keys = vec![Tally::default(); self.buckets.len()];
        let (recent, indexed, tail) = Default::default();
        let mut sums = Sums { checked, keys, recent, indexed, tail };
        let mut select = self.connection.prepare(SELECT_AFTER)?;
        let mut rows = select.query((0, -1))?;
        while let Some(row) = rows.next()? {
            let head = sums.checked.head;
            let next = Head { seq: row.get("seq")?, digest: row.get("digest")? };
            match read_receipt(row, &self.known) {
                Ok((receipt, numbers)) => {
                    if !continues(head, &receipt, &numbers) {
                        report("a broken chain", broken(head, next));
                    }
                    self.add(row.get("pool")?, &receipt, &mut sums, report);
                }
                Err(error) => {
                    let what = format!("receipt {} can't be read: {error}", next.seq);
                    report("a receipt that can't be read", what);
                }
            }
            sums.checked.head = next;
            sums.checked.receipts += 1;
        }
        let seq = sums.checked.head.seq;
        if self.indexed_to > seq {
            let what = format!(
                "the index has the receipts up to {}, but the last one is {seq}: the receipts after it were \
                 removed",
                self.indexed_to
            );
            report("an index of other receipts", what);
        }
        Ok(sums)
    }

    fn add(&self, pool: i64, receipt: &Receipt, sums: &mut Sums, report: Report<'_>) {
        let seq = receipt.seq;
        match receipt.key {
            Some(key) if seq <= self.keyed_to => {
                // The keys of earlier receipts have expired.
                if let Some(at) = self.buckets.iter().position(|bucket| bucket.first_seq <= seq) {
                    sums.keys[at].add(self.hash.hash_one((key, seq)));
                }
            }
            Some(key) if sums.recent.len() < TAIL_MAX => {
                if let Some(other) = sums.recent.insert(key, seq) {
                    report("a key twice", twice(key, other, seq));
                }
            }
            _ => {}
        }
        for Value(value) in receipt.given.values() {
            let entry = Entry { pool, value, seq };
            sums.checked.numbers += 1;
            if seq <= self.indexed_to {
                sums.indexed.add(self.hash.hash_one(entry));
            } else if sums.tail.len() < TAIL_MAX {
                sums.tail.push(entry);
            } else {
                sums.checked.not_compared += 1;
            }
        }
    }

    /// Compares the keys with those of the receipts.
    fn keys(
        &self,
        expected: &[Tally],
        recent: &HashMap<KeyDigest, u64>,
        report: Report<'_>,
    ) -> Result<(), rusqlite::Error> {
        let mut found = vec![Tally::default(); self.buckets.len()];
        let mut last = None;
        keys::each(self.connection, &self.buckets, &mut |bucket, key, seq| {
            if let Some((other, other_seq)) = last.replace((key, seq))
                && other == key
            {
                report("a key twice", twice(key, other_seq, seq));
            }
            let is_recent = seq > self.keyed_to;
            match recent.get(&key) {
                Some(&recent) if recent != seq => report("a key twice", twice(key, seq, recent)),
                None if is_recent && recent.len() < TAIL_MAX => {
                    let what = format!(
                        "the key {key:?} belongs to receipt {seq}, which has another or none"
                    );
                    report("a key of another receipt", what);
                }
                _ => {}
            }
            if !is_recent {
                found[bucket].add(self.hash.hash_one((key, seq)));
            }
        })?;
        let mut end = self.keyed_to + 1;
        for ((bucket, found), expected) in self.buckets.iter().zip(found).zip(expected) {
            if found != *expected {
                let what = format!(
                    "{} keys are kept for the receipts {} to {}, but they differ from the {} of these receipts",
                    found.count,
                    bucket.first_seq,
                    end - 1,
                    expected.count
                );
                report("keys that are not those of the receipts", what);
                keys::look_up_each(self.connection, *bucket, end, report)?;
            }
            end = bucket.first_seq;
        }
        Ok(())
    }

    /// Checks that the index has the numbers of the receipts, that none is in two receipts, and that each was
    /// handed out.
    fn numbers(
        &self,
        expected: Tally,
        tail: Vec<Entry>,
        unused: Unused<'_>,
        report: Report<'_>,
    ) -> Result<(), rusqlite::Error> {
        let mut last: Option<Entry> = None;
        let mut compare = |entry: Entry| {
            // The sums differ if the index has an unknown pool.
            let Some(origin) = self.known.origin(entry.pool) else { return };
            let (seq, value) = (entry.seq, Value(entry.value));
            let number = || format!("{} of the pool {}", origin.space.number(value), origin.pool);
            if let Some(last) = last.replace(entry)
                && (last.pool, last.value) == (entry.pool, entry.value)
            {
                let what = format!("{} is in the receipts {} and {seq}", number(), last.seq);
                report("a number twice", what);
            }
            if let Some(shard) = unused(origin, value) {
                let what = format!("{} is in receipt {seq}, but unused in {shard}", number());
                report("a number that was not handed out", what);
            }
        };
        let hash = |entry| self.hash.hash_one(entry);
        let (found, unsorted) = index::each(self.connection, tail, &hash, &mut compare)?;
        if unsorted > 0 {
            let what = format!("{unsorted} blocks of the index are out of order");
            report("an index out of order", what);
        }
        if found != expected {
            let what = format!(
                "the index has {} numbers, but they differ from the {} of the receipts up to {}",
                found.count, expected.count, self.indexed_to
            );
            report("an index of other receipts", what);
        }
        Ok(())
    }
}

fn twice(key: KeyDigest, one: u64, other: u64) -> String {
    format!("the key {key:?} belongs to the receipts {one} and {other}")
}
