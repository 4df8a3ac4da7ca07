//! The index of numbers of a file of receipts: finds the receipt of a number without a scan. Knows nothing of
//! receipts but their numbers.
//!
//! A B-tree with a row for each number would write a page for each: values are random. So the index consists
//! of runs, each a sorted list of the numbers of some successive receipts, in blocks that fill a page. A
//! look-up searches each run, and the few receipts that are not in a run yet. Runs are short at first, and
//! are merged once they have [`RUN_NUMBERS`] numbers together. A run of that length is never written again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use super::super::record::Given;
use super::wrong;
use crate::batch::Tally;
use crate::space::Value;
use crate::sqlite::rusqlite;

/// The numbers after which a new run is written. Fewer would make more runs to search, and more would make
/// look-ups read more receipts.
const TAIL_NUMBERS: usize = 1 << 14;

/// The numbers of short runs after which these are merged into a long one: a tenth of a second of work.
const RUN_NUMBERS: u64 = 1 << 20;

/// The numbers that are read at once while the index catches up.
const STEP_NUMBERS: usize = 1 << 20;

/// Entries per block: as many as fit into a page of 4096 bytes.
const BLOCK_ENTRIES: usize = 330;

/// The bytes of an entry: the value, and the distance of its receipt from the first one of its run.
const ENTRY_BYTES: usize = 12;

pub(super) const CREATE: &str = "
    CREATE TABLE runs (
        id        INTEGER PRIMARY KEY,
        first_seq INTEGER NOT NULL,
        numbers   INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE blocks (
        run       INTEGER NOT NULL REFERENCES runs,
        pool      INTEGER NOT NULL REFERENCES pools,
        first     INTEGER NOT NULL,   -- the smallest value of the block
        entries   BLOB    NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX blocks_by_value ON blocks (run, pool, first);";

const SELECT_INDEXED: &str = "SELECT indexed_to FROM state";
const UPDATE_INDEXED: &str = "UPDATE state SET indexed_to = ?1";
const SELECT_TAIL: &str = "SELECT seq, pool, numbers FROM receipts WHERE seq > ?1 ORDER BY seq";
const SELECT_RUNS: &str = "SELECT id, first_seq FROM runs ORDER BY id";
const SELECT_SHORT: &str = "SELECT id, first_seq, numbers FROM runs WHERE numbers < ?1 ORDER BY id";
const INSERT_RUN: &str = "INSERT INTO runs (first_seq, numbers) VALUES (?1, ?2)";
const DELETE_RUN: &str = "DELETE FROM runs WHERE id = ?1";
const SELECT_BLOCKS: &str = "SELECT pool, entries FROM blocks WHERE run = ?1";
const DELETE_BLOCKS: &str = "DELETE FROM blocks WHERE run = ?1";
const INSERT_BLOCK: &str = "INSERT INTO blocks (run, pool, first, entries) VALUES (?1, ?2, ?3, ?4)";
const SELECT_SORTED: &str = "
    SELECT blocks.rowid, first_seq, pool, first FROM blocks JOIN runs ON runs.id = run
    ORDER BY pool, first";
const SELECT_ENTRIES: &str = "SELECT entries FROM blocks WHERE rowid = ?1";
const SELECT_BLOCK: &str = "
    SELECT entries FROM blocks WHERE run = ?1 AND pool = ?2 AND first <= ?3
    ORDER BY first DESC LIMIT 1";

/// A number and its receipt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Entry {
    pub(super) pool: i64,
    pub(super) value: i64,
    pub(super) seq: u64,
}

/// The state of the index in the memory of its writer.
#[derive(Debug)]
pub(super) struct Index {
    /// Numbers of receipts that are not in a run.
    pub(super) waiting: usize,
    indexed_to: u64,
}

impl Index {
    pub(super) fn read(connection: &Connection) -> Result<Self, rusqlite::Error> {
        let indexed_to = indexed_to(connection)?;
        let (entries, _) = tail(connection, indexed_to, TAIL_NUMBERS)?;
        Ok(Self { waiting: entries.len(), indexed_to })
    }

    /// Writes a run if enough numbers wait for one.
    pub(super) fn extend(&mut self, connection: &mut Connection) -> Result<(), rusqlite::Error> {
        while self.waiting >= TAIL_NUMBERS {
            let transaction = connection.transaction()?;
            let (entries, last) = tail(&transaction, self.indexed_to, STEP_NUMBERS)?;
            write(&transaction, self.indexed_to + 1, entries)?;
            transaction.execute(UPDATE_INDEXED, [last])?;
            merge(&transaction)?;
            transaction.commit()?;
            self.indexed_to = last;
            // More may wait if the index has to catch up.
            let (rest, _) = tail(connection, last, TAIL_NUMBERS)?;
            self.waiting = rest.len();
        }
        Ok(())
    }
}

/// Returns the last receipt that is in a run.
pub(super) fn indexed_to(connection: &Connection) -> Result<u64, rusqlite::Error> {
    connection.query_row(SELECT_INDEXED, [], |row| row.get(0))
}

/// Returns the entries of the receipts after `after`, until there are `limit`, and the last of these receipts.
fn tail(
    connection: &Connection,
    after: u64,
    limit: usize,
) -> Result<(Vec<Entry>, u64), rusqlite::Error> {
    let (mut entries, mut last) = (Vec::new(), after);
    let mut select = connection.prepare_cached(SELECT_TAIL)?;
    let mut rows = select.query([after])?;
    while entries.len() < limit
        && let Some(row) = rows.next()?
    {
        entries.extend(entries_of(row)?);
        last = row.get(0)?;
    }
    Ok((entries, last))
}

/// Returns the entries of a receipt, a row of [`SELECT_TAIL`].
fn entries_of<'r>(row: &'r Row<'_>) -> Result<impl Iterator<Item = Entry> + 'r, rusqlite::Error> {
    let (seq, pool) = (row.get(0)?, row.get(1)?);
    let numbers = row.get_ref(2)?.as_blob().map_err(|_| wrong("the numbers of a receipt"))?;
    let values = Given::values_in(numbers).ok_or(wrong("the numbers of a receipt"))?;
    Ok(values.map(move |Value(value)| Entry { pool, value, seq }))
}

/// Writes a run of the receipts from `first_seq` on.
fn write(
    transaction: &Transaction<'_>,
    first_seq: u64,
    mut entries: Vec<Entry>,
) -> Result<(), rusqlite::Error> {
    entries.sort_unstable();
    transaction.execute(INSERT_RUN, (first_seq, entries.len()))?;
    let run = transaction.last_insert_rowid();
    let mut insert = transaction.prepare_cached(INSERT_BLOCK)?;
    let mut bytes = Vec::with_capacity(BLOCK_ENTRIES * ENTRY_BYTES);
    for pool in entries.chunk_by(|entry, next| entry.pool == next.pool) {
        let mut rest = pool;
        while let Some(first) = rest.first() {
            // Equal values are in one block, because a look-up reads only one.
            let full = rest.len().min(BLOCK_ENTRIES);
            let more = rest[full..].iter().take_while(|entry| entry.value == rest[full - 1].value);
            let (block, others) = rest.split_at(full + more.count());
            bytes.clear();
            for entry in block {
                let distance = u32::try_from(entry.seq - first_seq);
                let distance = distance.map_err(|_| wrong("a run of the index"))?;
                bytes.extend_from_slice(&entry.value.to_be_bytes());
                bytes.extend_from_slice(&distance.to_be_bytes());
            }
            insert.execute((run, first.pool, first.value, &bytes))?;
            rest = others;
        }
    }
    Ok(())
}

/// Merges the short runs into a long one if they have enough numbers.
fn merge(transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
    let mut select = transaction.prepare_cached(SELECT_SHORT)?;
    let runs = select
        .query_map([RUN_NUMBERS], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<Result<Vec<(i64, u64, u64)>, _>>()?;
    let numbers: u64 = runs.iter().map(|(_, _, numbers)| numbers).sum();
    let Some(&(_, first_seq, _)) = runs.first().filter(|_| numbers >= RUN_NUMBERS) else {
        return Ok(());
    };
    let mut entries = Vec::new();
    let mut select = transaction.prepare_cached(SELECT_BLOCKS)?;
    for &(run, first_seq, _) in &runs {
        let mut rows = select.query([run])?;
        while let Some(row) = rows.next()? {
            let pool = row.get(0)?;
            let block = row.get_ref(1)?.as_blob().map_err(|_| wrong("a block of the index"))?;
            entries.extend(parse(block, first_seq, pool));
        }
    }
    for (run, _, _) in runs {
        transaction.prepare_cached(DELETE_BLOCKS)?.execute([run])?;
        transaction.prepare_cached(DELETE_RUN)?.execute([run])?;
    }
    write(transaction, first_seq, entries)
}

/// Returns the entries of a block of a run, whose first receipt is `first_seq`.
fn parse(block: &[u8], first_seq: u64, pool: i64) -> impl Iterator<Item = Entry> {
    block.chunks_exact(ENTRY_BYTES).map(move |entry| {
        let (value, distance) = entry.split_at(8);
        let value = i64::from_be_bytes(value.try_into().expect("8 bytes"));
        let distance = u32::from_be_bytes(distance.try_into().expect("4 bytes"));
        Entry { pool, value, seq: first_seq.saturating_add(distance.into()) }
    })
}

/// Returns the latest receipt with a number of one of these pools. Searches all runs and all receipts that are
/// in no run, whether one is found or not.
pub(super) fn find(
    connection: &Connection,
    pools: &[i64],
    value: Value,
) -> Result<Option<u64>, rusqlite::Error> {
    let mut found = None;
    let mut select = connection.prepare_cached(SELECT_RUNS)?;
    let runs = select
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<Vec<(i64, u64)>, _>>()?;
    let mut select = connection.prepare_cached(SELECT_BLOCK)?;
    for (run, first_seq) in runs {
        for &pool in pools {
            let block: Option<Vec<u8>> =
                select.query_row((run, pool, value.0), |row| row.get(0)).optional()?;
            let entries = block.iter().flat_map(|block| parse(block, first_seq, pool));
            let hits = entries.filter(|entry| entry.value == value.0);
            found = found.max(hits.map(|entry| entry.seq).max());
        }
    }
    let mut select = connection.prepare_cached(SELECT_TAIL)?;
    let mut rows = select.query([indexed_to(connection)?])?;
    while let Some(row) = rows.next()? {
        let is_hit = |entry: &Entry| pools.contains(&entry.pool) && entry.value == value.0;
        found = found.max(entries_of(row)?.filter(is_hit).map(|entry| entry.seq).max());
    }
    Ok(found)
}

/// Calls `each` with the entries of all runs and those of `tail`, in the order of pools and values. Returns the
/// tally of the entries of the runs, by `hash`, and the number of blocks in which a look-up may not find a value.
pub(super) fn each(
    connection: &Connection,
    tail: Vec<Entry>,
    hash: &dyn Fn(Entry) -> u64,
    each: &mut dyn FnMut(Entry),
) -> Result<(Tally, u64), rusqlite::Error> {
    let (mut tally, mut unsorted) = (Tally::default(), 0);
    // The entries of a block wait here until the next block begins above them. At most one block of each run waits.
    let mut waiting: BinaryHeap<_> = tail.into_iter().map(Reverse).collect();
    let mut sorted = connection.prepare(SELECT_SORTED)?;
    let mut blocks = sorted.query([])?;
    let mut select = connection.prepare(SELECT_ENTRIES)?;
    loop {
        let block: Option<(i64, u64, i64, i64)> = match blocks.next()? {
            Some(row) => Some(row.try_into()?),
            None => None,
        };
        let is_below = |entry: &Entry| {
            block.is_none_or(|(_, _, pool, first)| (entry.pool, entry.value) < (pool, first))
        };
        while let Some(&Reverse(entry)) = waiting.peek()
            && is_below(&entry)
        {
            waiting.pop();
            each(entry);
        }
        let Some((id, first_seq, pool, first)) = block else { return Ok((tally, unsorted)) };
        let bytes: Vec<u8> = select.query_row([id], |row| row.get(0))?;
        let entries = || parse(&bytes, first_seq, pool);
        let is_sorted =
            entries().is_sorted() && entries().next().is_some_and(|entry| entry.value == first);
        unsorted += u64::from(!is_sorted);
        for entry in entries() {
            tally.add(hash(entry));
            waiting.push(Reverse(entry));
        }
    }
}
