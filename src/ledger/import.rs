//! Adds values that were issued by other means, so that no draw chooses them.
//!
//! Such values are in a batch that belongs to no shard. A value that a draw added before may lie in a shard: the
//! caller marks it there, and then records it here.

use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::mpsc::{self, SyncSender};
use std::thread;

use rusqlite::{Connection, params};

use super::draw::{self, UPDATE_COUNT};
use super::strata::{self, Tallies};
use super::{IMPORTS, Ledger, LedgerError, State};
use crate::batch::BatchId;
use crate::space::Value;
use crate::sqlite::{self, ContentError, rusqlite};

/// Rows to insert at once.
const PORTION: usize = 1 << 12;
/// How many portions the search may be ahead of the inserts.
const PORTIONS_AHEAD: usize = 4;

/// Created by the first import, so a ledger without imports has the tables that it always had.
const CREATE_IMPORTED: &str =
    "CREATE TABLE IF NOT EXISTS imported ( -- values of draws that were marked in a shard
        batch      INTEGER NOT NULL,
        value      INTEGER NOT NULL,
        PRIMARY KEY (batch, value)
    ) STRICT, WITHOUT ROWID";
const HAS_IMPORTED: &str =
    "SELECT count(*) > 0 FROM sqlite_schema WHERE type = 'table' AND name = 'imported'";
const SELECT_IMPORTED: &str = "SELECT value FROM imported WHERE batch = ?1 ORDER BY value";
const SELECT_IS_IMPORTED: &str = "SELECT 1 FROM imported WHERE batch = ?1 AND value = ?2";
const INSERT_IMPORTED: &str = "INSERT OR IGNORE INTO imported VALUES (?1, ?2)";
const CREATE_ENTERED: &str =
    "CREATE TABLE IF NOT EXISTS entered ( -- partitions whose used values are in the ledger
        partition  INTEGER PRIMARY KEY
    ) STRICT";
const HAS_ENTERED: &str =
    "SELECT count(*) > 0 FROM sqlite_schema WHERE type = 'table' AND name = 'entered'";
const SELECT_ENTERED: &str = "SELECT partition FROM entered";
const INSERT_ENTERED: &str = "INSERT INTO entered VALUES (?1)";
const SELECT_NEXT_ID: &str = "SELECT coalesce(max(id), 0) + 1 FROM batches";
const SELECT_IMPORTS: &str = "SELECT id FROM batches WHERE shard = ?1";
/// No file is built from the batch, so it is retired from the beginning. It is closed by [`END_IMPORTS`].
const INSERT_IMPORT: &str = "INSERT INTO batches (id, shard, generation, count, drawn_at, retired_at)
    SELECT ?1, ?2, coalesce(max(generation), 0) + 1, ?3, strftime('%FT%TZ', 'now'), strftime('%FT%TZ', 'now')
    FROM batches WHERE shard = ?2";
const SELECT_ADDED: &str = "SELECT coalesce(sum(count), 0) FROM batches WHERE shard = ?1";
const HAS_OPEN_IMPORT: &str = "SELECT count(*) > 0 FROM batches WHERE shard = ?1 AND closed = 0";
const END_IMPORTS: &str = "UPDATE batches SET closed = 1 WHERE shard = ?1 AND closed = 0";

/// The outcome of adding values to the ledger.
#[derive(Debug, Default)]
pub(crate) struct Entered {
    /// The number of values that were in no shard and are in the ledger now.
    pub added: u64,
    /// The number of values that were given more than once, without the first time of each.
    pub repeated: u64,
    /// The number of values that an earlier import added or marked.
    pub known: u64,
    /// All other values, each with its batch, in ascending order. They were drawn for shards.
    pub drawn: Vec<(BatchId, Value)>,
    /// Whether an earlier import was interrupted.
    pub interrupted: bool,
}

impl Ledger {
    /// Adds the values that it does not have, durably and with one transaction. They must be in the range. Until
    /// [`end_import`](Self::end_import), the import counts as interrupted.
    ///
    /// # Errors
    /// Returns [`LedgerError`]. Nothing is changed then.
    pub(crate) fn import(&mut self, values: Vec<Value>) -> Result<Entered, LedgerError> {
        let given = values.len() as u64;
        // The list of indexes takes the place of the list of values in memory.
        let strata = &self.state.strata;
        let mut indexes: Vec<u64> = values
            .into_iter()
            .map(|value| strata.index(value).expect("the caller checked the range"))
            .collect();
        indexes.sort_unstable();
        indexes.dedup();
        let repeated = given - indexes.len() as u64;
        let entered = self.import_indexes(&indexes, |_| Ok(()))?;
        Ok(Entered { repeated, ..entered })
    }

    /// Sets the values that no draw may choose, although other instances may draw from the same range. They are
    /// entered as imported before the first draw from their partitions.
    pub(crate) fn set_used(&mut self, used: &[Value]) -> Result<(), LedgerError> {
        let State { strata, .. } = &self.state;
        let mut indexes: Vec<u64> = used.iter().filter_map(|&value| strata.index(value)).collect();
        indexes.sort_unstable();
        let entered = read_entered(&self.connection).map_err(|source| self.state.failed(source))?;
        (self.state.used, self.state.entered) = (indexes, entered);
        Ok(())
    }

    /// Enters the used values of the open partitions.
    ///
    /// Invariant: they are entered before anything is drawn from these partitions.
    pub(super) fn enter_used(&mut self) -> Result<(), LedgerError> {
        if self.state.used.is_empty() {
            return Ok(());
        }
        let State { strata, used, entered, open, .. } = &self.state;
        let partitions: Vec<u16> = open.difference(entered).copied().collect();
        let indexes = partitions.iter().flat_map(|&partition| {
            let Range { start, end } = strata.indexes(strata.of_partition(partition));
            let place = |end| used.partition_point(|&index| index < end);
            &used[place(start)..place(end)]
        });
        let indexes: Vec<u64> = indexes.copied().collect();
        if !partitions.is_empty() {
            let end = |connection: &Connection| {
                connection.execute(CREATE_ENTERED, [])?;
                let mut insert = connection.prepare(INSERT_ENTERED)?;
                partitions
                    .iter()
                    .try_for_each(|partition| insert.execute([partition]).map(drop))?;
                connection.execute(END_IMPORTS, [IMPORTS]).map(drop)
            };
            let Entered { drawn, .. } = self.import_indexes(&indexes, end)?;
            if !drawn.is_empty() {
                let path = self.state.path.clone();
                let count = drawn.len();
                let problem = format!("it has drawn {count} numbers of pools.NAME.used_file");
                return Err(LedgerError::Damaged { path, problem });
            }
        }
        self.state.entered.extend(partitions);
        Ok(())
    }

    /// Adds the values with these indexes, which are in ascending order, in the transaction that `end` ends.
    fn import_indexes(
        &mut self,
        indexes: &[u64],
        end: impl FnOnce(&Connection) -> Result<(), rusqlite::Error>,
    ) -> Result<Entered, LedgerError> {
        let Self { connection, state } = self;
        let (entered, changed) = add(connection, state, indexes, end)
            .map_err(|error| LedgerError::from_content(&state.path, error))?;
        state.count += entered.added;
        state.imported += entered.added;
        state.tallies.update(changed);
        Ok(entered)
    }

    /// Records values of draws that are durably marked as imported in their shards, and that all imports up to
    /// now are complete.
    pub(crate) fn end_import(&mut self, marked: &[(BatchId, Value)]) -> Result<(), LedgerError> {
        let Self { connection, state } = self;
        let mut end = || {
            let transaction = connection.transaction()?;
            let mut insert = transaction.prepare(INSERT_IMPORTED)?;
            for (batch, value) in marked {
                insert.execute([batch.0, value.0])?;
            }
            drop(insert);
            transaction.execute(END_IMPORTS, [IMPORTS])?;
            transaction.commit()
        };
        end().map_err(|source| state.failed(source))
    }

    /// Returns the values of a draw that were marked as imported in its shard, in ascending order.
    pub(crate) fn imported(&self, batch: BatchId) -> Result<Vec<Value>, LedgerError> {
        let select = || {
            if !has_imported(&self.connection)? {
                return Ok(Vec::new());
            }
            let mut select = self.connection.prepare_cached(SELECT_IMPORTED)?;
            select.query_map([batch.0], |row| row.get(0).map(Value))?.collect()
        };
        select().map_err(|source| self.state.failed(source))
    }

    /// Returns whether an import was interrupted.
    pub(crate) fn has_open_import(&self) -> Result<bool, LedgerError> {
        self.connection
            .query_row(HAS_OPEN_IMPORT, [IMPORTS], |row| row.get(0))
            .map_err(|source| self.state.failed(source))
    }
}

/// See [`Ledger::import_indexes`]. Also returns the tallies of the strata that got values.
fn add(
    connection: &mut Connection,
    state: &State,
    indexes: &[u64],
    end: impl FnOnce(&Connection) -> Result<(), rusqlite::Error>,
) -> Result<(Entered, Tallies), ContentError> {
    let reader = sqlite::open_beside(&state.path)?;
    let transaction = connection.transaction()?;
    let (portions, found) = mpsc::sync_channel(PORTIONS_AHEAD);
    let search = Search::new(&transaction, reader, state, portions)?;
    let batch = search.batch;
    let (mut entered, changed) = thread::scope(|scope| {
        let search = scope.spawn(|| search.find(indexes));
        // If an insert fails, the search ends too, since its portions are not received.
        found.into_iter().try_for_each(|rows| draw::insert(&transaction, &rows))?;
        search.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    entered.take_known(&transaction)?;
    changed.save(&transaction)?;
    if entered.added > 0 || !entered.drawn.is_empty() {
        transaction.execute(INSERT_IMPORT, params![batch.0, IMPORTS, entered.added])?;
        transaction.execute(UPDATE_COUNT, [state.count + entered.added])?;
    }
    end(&transaction)?;
    transaction.commit()?;
    Ok((entered, changed))
}

/// Returns the number of imported values that were in no shard.
pub(super) fn added(connection: &Connection) -> Result<u64, rusqlite::Error> {
    connection.query_row(SELECT_ADDED, [IMPORTS], |row| row.get(0))
}

/// Returns whether there is the table of the values that were marked in shards.
pub(super) fn has_imported(connection: &Connection) -> Result<bool, rusqlite::Error> {
    connection.query_row(HAS_IMPORTED, [], |row| row.get(0))
}

/// Returns the partitions whose used values are in the ledger.
fn read_entered(connection: &Connection) -> Result<BTreeSet<u16>, rusqlite::Error> {
    if !connection.query_row(HAS_ENTERED, [], |row| row.get(0))? {
        return Ok(BTreeSet::new());
    }
    let mut select = connection.prepare(SELECT_ENTERED)?;
    select.query_map([], |row| row.get(0))?.collect()
}

impl Entered {
    /// Moves the drawn values that an earlier import marked to the known ones.
    fn take_known(&mut self, connection: &Connection) -> Result<(), rusqlite::Error> {
        let mut select = connection.prepare(SELECT_IS_IMPORTED)?;
        let mut drawn = Vec::new();
        for (batch, value) in std::mem::take(&mut self.drawn) {
            match select.exists([batch.0, value.0])? {
                true => self.known += 1,
                false => drawn.push((batch, value)),
            }
        }
        drawn.sort_unstable();
        self.drawn = drawn;
        Ok(())
    }
}

/// The search for those of the values that the ledger does not have.
///
/// It has a connection and a thread of its own, since reading the rows of a stratum takes as long as inserting. It
/// sees the ledger as it was before the import.
struct Search<'s> {
    reader: Connection,
    state: &'s State,
    /// The batch of the import.
    batch: BatchId,
    /// The batches of earlier imports.
    earlier: BTreeSet<BatchId>,
    portions: SyncSender<Vec<[i64; 3]>>,
    /// Rows to insert that are not sent yet.
    rows: Vec<[i64; 3]>,
    /// The tallies of the strata that get values.
    changed: Tallies,
    entered: Entered,
}

impl<'s> Search<'s> {
    fn new(
        transaction: &Connection,
        reader: Connection,
        state: &'s State,
        portions: SyncSender<Vec<[i64; 3]>>,
    ) -> Result<Self, rusqlite::Error> {
        transaction.execute(CREATE_IMPORTED, [])?;
        let batch = transaction.query_row(SELECT_NEXT_ID, [], |row| row.get(0).map(BatchId))?;
        let interrupted = transaction.query_row(HAS_OPEN_IMPORT, [IMPORTS], |row| row.get(0))?;
        let mut select = transaction.prepare(SELECT_IMPORTS)?;
        let earlier = select.query_map([IMPORTS], |row| row.get(0).map(BatchId))?;
        Ok(Self {
            reader,
            state,
            batch,
            earlier: earlier.collect::<Result<_, _>>()?,
            portions,
            rows: Vec::new(),
            changed: Tallies::default(),
            entered: Entered { interrupted, ..Entered::default() },
        })
    }

    /// Finds the rows to insert for the values with these indexes, and sends them in the order of the table.
    fn find(mut self, indexes: &[u64]) -> Result<(Entered, Tallies), ContentError> {
        // The order of the rows is that of the indexes, except within a stratum.
        let stratum = |index: &u64| self.state.strata.stratum_of(*index);
        for indexes in indexes.chunk_by(|index, next| stratum(index) == stratum(next)) {
            self.find_in(stratum(&indexes[0]), indexes)?;
            if self.rows.len() >= PORTION && !self.send() {
                break;
            }
        }
        self.send();
        Ok((self.entered, self.changed))
    }

    /// Finds those of the values of a stratum with these indexes that the ledger does not have.
    ///
    /// Invariant: before a stratum changes, all its rows are compared with what was drawn into it. So a row that
    /// changed on the disk ends the import instead of making a used value look free.
    fn find_in(&mut self, stratum: u64, indexes: &[u64]) -> Result<(), ContentError> {
        let State { strata, tallies, .. } = self.state;
        let mut values: Vec<Value> = indexes.iter().map(|&index| strata.value(index)).collect();
        values.sort_unstable();
        let mut tally = tallies.get(stratum).unwrap_or_default();
        let mut wanted = values.iter().copied().peekable();
        let mut fresh = Vec::with_capacity(values.len());
        let (earlier, entered) = (&self.earlier, &mut self.entered);
        strata.compare(&self.reader, stratum, tally, |value, row| {
            fresh.extend(std::iter::from_fn(|| wanted.next_if(|&wanted| wanted < value)));
            if wanted.next_if_eq(&value).is_some() {
                let batch = strata::batch_of(row)?;
                match earlier.contains(&batch) {
                    true => entered.known += 1,
                    false => entered.drawn.push((batch, value)),
                }
            }
            Ok(())
        })?;
        fresh.extend(wanted);
        if !fresh.is_empty() {
            entered.added += fresh.len() as u64;
            fresh.iter().for_each(|&value| tally.add(strata.key().hash(value)));
            self.changed.set(stratum, tally);
            let row = |value: Value| [stratum.cast_signed(), value.0, self.batch.0];
            self.rows.extend(fresh.into_iter().map(row));
        }
        Ok(())
    }

    /// Sends the rows. Returns whether they are received.
    fn send(&mut self) -> bool {
        self.portions.send(std::mem::take(&mut self.rows)).is_ok()
    }
}
