//! Adds values that were issued by other means, so that no draw chooses them.
//!
//! Such values are in a batch that belongs to no shard. A value that a draw added before may lie in a shard: the
//! caller marks it there, and then records it here.

use std::collections::BTreeSet;
use std::ops::Range;

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::draw::{self, UPDATE_COUNT};
use super::strata::Tallies;
use super::{IMPORTS, Ledger, LedgerError, State};
use crate::batch::BatchId;
use crate::space::Value;
use crate::sqlite::{ContentError, rusqlite};

/// Rows to insert at once.
const PORTION: usize = 1 << 14;

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
        let path = state.path.clone();
        let failed = |error| LedgerError::from_content(&path, error);
        let transaction = connection.transaction().map_err(|source| state.failed(source))?;
        let mut import = Import::begin(&transaction, state).map_err(failed)?;
        // The order of the rows is that of the indexes, except within a stratum.
        let strata = &state.strata;
        let stratum = |index: &u64| strata.stratum_of(*index);
        for indexes in indexes.chunk_by(|index, next| stratum(index) == stratum(next)) {
            import.enter(stratum(&indexes[0]), indexes).map_err(failed)?;
        }
        let Import { entered, changed, .. } = import.end().map_err(failed)?;
        end(&transaction).map_err(|source| state.failed(source))?;
        transaction.commit().map_err(|source| state.failed(source))?;
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

/// An import in progress.
struct Import<'i> {
    transaction: &'i Transaction<'i>,
    state: &'i State,
    batch: BatchId,
    /// The batches of earlier imports.
    earlier: BTreeSet<BatchId>,
    /// The tallies of the strata that get values.
    changed: Tallies,
    /// Rows that are not inserted yet.
    rows: Vec<[i64; 3]>,
    entered: Entered,
}

impl<'i> Import<'i> {
    fn begin(transaction: &'i Transaction<'i>, state: &'i State) -> Result<Self, ContentError> {
        transaction.execute(CREATE_IMPORTED, [])?;
        let batch = transaction.query_row(SELECT_NEXT_ID, [], |row| row.get(0).map(BatchId))?;
        let interrupted = transaction.query_row(HAS_OPEN_IMPORT, [IMPORTS], |row| row.get(0))?;
        let mut select = transaction.prepare(SELECT_IMPORTS)?;
        let earlier = select.query_map([IMPORTS], |row| row.get(0).map(BatchId))?;
        Ok(Self {
            transaction,
            state,
            batch,
            earlier: earlier.collect::<Result<_, _>>()?,
            changed: Tallies::default(),
            rows: Vec::with_capacity(PORTION),
            entered: Entered { interrupted, ..Entered::default() },
        })
    }

    /// Adds the values of a stratum that have these indexes, unless the ledger has them.
    ///
    /// Invariant: before a stratum changes, all its rows are compared with what was drawn into it. So a row that
    /// changed on the disk ends the import instead of making a used value look free.
    fn enter(&mut self, stratum: u64, indexes: &[u64]) -> Result<(), ContentError> {
        let State { strata, tallies, .. } = self.state;
        let mut values: Vec<Value> = indexes.iter().map(|&index| strata.value(index)).collect();
        values.sort_unstable();
        let mut tally = tallies.get(stratum).unwrap_or_default();
        let mut wanted = values.iter().copied().peekable();
        let mut fresh = Vec::with_capacity(values.len());
        let (earlier, entered) = (&self.earlier, &mut self.entered);
        strata.compare(self.transaction, stratum, tally, |value, batch| {
            fresh.extend(std::iter::from_fn(|| wanted.next_if(|&wanted| wanted < value)));
            if wanted.next_if_eq(&value).is_some() {
                match earlier.contains(&batch) {
                    true => entered.known += 1,
                    false => entered.drawn.push((batch, value)),
                }
            }
            Ok(())
        })?;
        fresh.extend(wanted);
        if fresh.is_empty() {
            return Ok(());
        }
        for value in fresh {
            tally.add(strata.key().hash(value));
            self.rows.push([stratum.cast_signed(), value.0, self.batch.0]);
            self.entered.added += 1;
        }
        self.changed.set(stratum, tally);
        if self.rows.len() >= PORTION {
            self.insert()?;
        }
        Ok(())
    }

    fn insert(&mut self) -> Result<(), rusqlite::Error> {
        draw::insert(self.transaction, &self.rows)?;
        self.rows.clear();
        Ok(())
    }

    /// Inserts the last rows, and looks up which of the drawn values were marked by an earlier import.
    fn end(mut self) -> Result<Self, ContentError> {
        self.insert()?;
        let mut drawn = std::mem::take(&mut self.entered.drawn);
        drawn.sort_unstable();
        let mut select = self.transaction.prepare(SELECT_IS_IMPORTED)?;
        for (batch, value) in drawn {
            let known = select.query_row([batch.0, value.0], |_| Ok(())).optional()?;
            match known {
                Some(()) => self.entered.known += 1,
                None => self.entered.drawn.push((batch, value)),
            }
        }
        drop(select);
        self.changed.save(self.transaction)?;
        let Entered { added, ref drawn, .. } = self.entered;
        if added > 0 || !drawn.is_empty() {
            self.transaction.execute(INSERT_IMPORT, params![self.batch.0, IMPORTS, added])?;
            self.transaction.execute(UPDATE_COUNT, [self.state.count + added])?;
        }
        Ok(self)
    }
}
