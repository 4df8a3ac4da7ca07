//! Reads a whole ledger and checks it. Changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{OptionalExtension, Row, params};

use super::import::has_imported;
use super::strata::Tallies;
use super::{IMPORTS, Ledger, LedgerError};
use crate::batch::{BatchId, Generation, Report, ShardIndex, Tally};
use crate::space::Value;
use crate::sqlite::{self, rusqlite};

const SELECT_ALL: &str = "SELECT stratum, value, batch FROM used_numbers ORDER BY stratum, value";
const SELECT_BATCHES: &str = "SELECT id, shard, generation, count FROM batches ORDER BY id";
const SELECT_IMPORTED: &str = "SELECT batch, value FROM imported ORDER BY batch, value";
const SELECT_BATCH_OF: &str = "SELECT batch FROM used_numbers WHERE stratum = ?1 AND value = ?2";

/// The maximum number of SQLite's own messages about a file.
const PROBLEMS_MAX: usize = 10;

/// A draw or an import, with the tally of its values in the ledger.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    /// The number of the batch.
    pub id: BatchId,
    /// The number of values as recorded.
    pub count: u64,
    /// The shard and generation that were drawn for, or `None` for an import.
    pub file: Option<(ShardIndex, Generation)>,
    /// The tally of its rows.
    pub tally: Tally,
    /// The tally of the values that were marked as imported in the file.
    pub marked: Tally,
}

impl Ledger {
    /// Returns the value's hash under the ledger's key, for a [`Tally`].
    pub fn hash(&self, value: Value) -> u64 {
        self.state.strata.key().hash(value)
    }

    /// Returns the batch that the value belongs to, or `None` if the value is not in the ledger.
    pub fn batch_of(&self, value: Value) -> Result<Option<BatchId>, LedgerError> {
        let Some(stratum) = self.state.strata.stratum(value) else {
            return Ok(None);
        };
        self.connection
            .prepare_cached(SELECT_BATCH_OF)
            .and_then(|mut select| {
                select
                    .query_row(params![stratum, value.0], |row| row.get(0).map(BatchId))
                    .optional()
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Calls `each` with every value and its batch, in the order of the file.
    pub fn each<E: From<rusqlite::Error>>(
        &self,
        each: &mut dyn FnMut(Value, BatchId) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut select = self.connection.prepare(SELECT_ALL)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            each(Value(row.get(1)?), BatchId(row.get(2)?))?;
        }
        Ok(())
    }

    /// Reads every row and reports each violation. Returns the batches in the order of their ids.
    ///
    /// # Errors
    /// Returns [`LedgerError`] if the ledger can't be read to its end.
    pub fn audit(&self, report: Report<'_>) -> Result<Vec<Drawn>, LedgerError> {
        self.read_all(report).map_err(|source| self.state.failed(source))
    }

    fn read_all(&self, report: Report<'_>) -> Result<Vec<Drawn>, rusqlite::Error> {
        for problem in sqlite::problems(&self.connection, PROBLEMS_MAX)? {
            report("SQLite finds it damaged", problem);
        }
        let mut batches = self.read_batches()?;
        let mut found = Tallies::default();
        let mut last = None;
        let mut select = self.connection.prepare(SELECT_ALL)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let (stratum, value, batch): (i64, _, i64) =
                (row.get(0)?, Value(row.get(1)?), row.get(2)?);
            let hash = self.hash(value);
            let number = self.state.space().number(value);
            let belongs = self.state.strata.stratum(value);
            if belongs.is_some_and(|belongs| belongs != stratum.cast_unsigned()) {
                report("a number in another stratum", format!("{number} is in stratum {stratum}"));
            }
            if last >= Some((stratum, value)) {
                report("a number out of order", format!("{number} is out of order"));
            }
            if belongs.is_none() {
                report("a number out of range", format!("{number} is not in its range"));
            }
            last = Some((stratum, value));
            found.add(stratum.cast_unsigned(), hash);
            match batches.get_mut(&batch) {
                Some(drawn) => drawn.tally.add(hash),
                None => {
                    report(
                        "a number of an unknown batch",
                        format!("{number} is of the unknown batch {batch}"),
                    );
                }
            }
        }
        let drawn_from = self.state.tallies.iter().map(|(stratum, _)| stratum);
        let strata: BTreeSet<u64> =
            found.iter().map(|(stratum, _)| stratum).chain(drawn_from).collect();
        for stratum in strata {
            let found = found.get(stratum).unwrap_or_default();
            let drawn = self.state.tallies.get(stratum).unwrap_or_default();
            if found != drawn {
                let what = format!(
                    "stratum {stratum} has {} values, but they differ from the {} that were drawn",
                    found.count, drawn.count
                );
                report("a stratum that is not what was drawn", what);
            }
        }
        for Drawn { id: BatchId(id), count, tally, .. } in batches.values() {
            if *count != tally.count {
                let what = format!("batch {id} has {} values, but {count} were drawn", tally.count);
                report("a batch that is not what was drawn", what);
            }
        }
        self.read_imported(&mut batches, report)?;
        Ok(batches.into_values().collect())
    }

    /// Adds the values that were marked as imported to the tallies of their batches.
    fn read_imported(
        &self,
        batches: &mut BTreeMap<i64, Drawn>,
        report: Report<'_>,
    ) -> Result<(), rusqlite::Error> {
        if !has_imported(&self.connection)? {
            return Ok(());
        }
        let mut select = self.connection.prepare(SELECT_IMPORTED)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let (batch, value): (i64, _) = (row.get(0)?, Value(row.get(1)?));
            match batches.get_mut(&batch).filter(|drawn| drawn.file.is_some()) {
                Some(drawn) => drawn.marked.add(self.hash(value)),
                None => {
                    let number = self.state.space().number(value);
                    let what =
                        format!("{number} was marked in a shard of the unknown batch {batch}");
                    report("an imported number of an unknown batch", what);
                }
            }
        }
        Ok(())
    }

    fn read_batches(&self) -> Result<BTreeMap<i64, Drawn>, rusqlite::Error> {
        let mut select = self.connection.prepare(SELECT_BATCHES)?;
        let rows = select.query_map([], |row| read_batch(row).map(|drawn| (drawn.id.0, drawn)))?;
        rows.collect()
    }
}

fn read_batch(row: &Row<'_>) -> Result<Drawn, rusqlite::Error> {
    let is_import = row.get::<_, i64>(1)? == IMPORTS;
    Ok(Drawn {
        id: BatchId(row.get(0)?),
        count: row.get(3)?,
        file: match is_import {
            true => None,
            false => Some((ShardIndex(row.get(1)?), Generation(row.get(2)?))),
        },
        tally: Tally::default(),
        marked: Tally::default(),
    })
}
