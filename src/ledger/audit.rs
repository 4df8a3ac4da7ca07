//! Reading all of a ledger, to see whether it is what it should be. Changes nothing.

use std::collections::BTreeMap;

use rusqlite::OptionalExtension;

use super::strata::{STRATA, stratum_of};
use super::{Ledger, LedgerError};
use crate::batch::{Batch, BatchId, Generation, Report, ShardIndex, Tally};
use crate::space::Value;
use crate::sqlite::{self, rusqlite};

const SELECT_ALL: &str = "SELECT stratum, value, batch FROM used_numbers ORDER BY stratum, value";
const SELECT_BATCHES: &str = "SELECT id, shard, generation, count FROM batches ORDER BY id";
const SELECT_BATCH_OF: &str = "SELECT batch FROM used_numbers WHERE stratum = ?1 AND value = ?2";

/// SQLite's own sentences about a file, at most.
const PROBLEMS_MAX: usize = 10;

/// A batch, and what the ledger has of it.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    /// As it was noted.
    pub batch: Batch,
    /// Its values.
    pub tally: Tally,
}

impl Ledger {
    /// The value's hash under the ledger's key, for a [`Tally`].
    #[must_use]
    pub fn hash(&self, value: Value) -> u64 {
        self.state.key.hash(value)
    }

    /// Which batch the value entered a shard with, if it did.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn batch_of(&self, value: Value) -> Result<Option<BatchId>, LedgerError> {
        let stratum = self.state.key.stratum(value);
        self.connection
            .prepare_cached(SELECT_BATCH_OF)
            .and_then(|mut select| {
                select
                    .query_row([stratum.into(), value.0], |row| row.get(0).map(BatchId))
                    .optional()
            })
            .map_err(|source| self.state.failed(source))
    }

    /// Reads every row, reports what is not as it should be, and answers with the batches in order.
    ///
    /// # Errors
    /// [`LedgerError`] when it can't be read to its end.
    pub fn audit(&self, report: Report<'_>) -> Result<Vec<Drawn>, LedgerError> {
        self.read_all(report).map_err(|source| self.state.failed(source))
    }

    fn read_all(&self, report: Report<'_>) -> Result<Vec<Drawn>, rusqlite::Error> {
        for problem in sqlite::problems(&self.connection, PROBLEMS_MAX)? {
            report("SQLite finds it damaged", problem);
        }
        let mut batches = self.read_batches()?;
        let mut found = vec![Tally::default(); STRATA];
        let mut last = None;
        let mut select = self.connection.prepare(SELECT_ALL)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let (stratum, value, batch): (u64, _, i64) =
                (row.get(0)?, Value(row.get(1)?), row.get(2)?);
            let hash = self.hash(value);
            let number = self.state.space.number(value);
            if stratum != u64::from(stratum_of(hash)) {
                report("a number in another stratum", format!("{number} is in stratum {stratum}"));
            }
            if last >= Some((stratum, value)) {
                report("a number out of order", format!("{number} is out of order"));
            }
            if !self.state.space.contains(value) {
                report("a number out of range", format!("{number} is not in its range"));
            }
            last = Some((stratum, value));
            if let Some(tally) = found.get_mut(stratum as usize) {
                tally.add(hash);
            }
            match batches.get_mut(&batch) {
                Some(drawn) => drawn.tally.add(hash),
                None => {
                    report(
                        "a number of no batch",
                        format!("{number} is of batch {batch}, unknown"),
                    );
                }
            }
        }
        for (stratum, found) in (0..).zip(found) {
            let drawn = self.state.open.tally(stratum);
            if found != drawn {
                let what = format!(
                    "stratum {stratum} has {} values, not those {} that were drawn",
                    found.count, drawn.count
                );
                report("a stratum that is not what was drawn", what);
            }
        }
        for Drawn { batch, tally } in batches.values() {
            if batch.count != tally.count {
                let (id, count) = (batch.id.0, batch.count);
                let what = format!("batch {id} has {} values, and {count} were drawn", tally.count);
                report("a batch that is not what was drawn", what);
            }
        }
        Ok(batches.into_values().collect())
    }

    fn read_batches(&self) -> Result<BTreeMap<i64, Drawn>, rusqlite::Error> {
        let mut select = self.connection.prepare(SELECT_BATCHES)?;
        let rows = select.query_map([], |row| {
            let batch = Batch {
                id: BatchId(row.get(0)?),
                shard: ShardIndex(row.get(1)?),
                generation: Generation(row.get(2)?),
                count: row.get(3)?,
            };
            Ok((batch.id.0, Drawn { batch, tally: Tally::default() }))
        })?;
        rows.collect()
    }
}
