//! Moves the rows of a ledger to a larger range, in which every value has another index.

use rusqlite::{Connection, params};

use super::strata::{Strata, Tallies};
use crate::sqlite::{ContentError, rusqlite};

const CREATE_MOVED: &str =
    "CREATE TEMP TABLE moved (stratum INTEGER, value INTEGER, batch INTEGER)";
const INSERT_MOVED: &str = "INSERT INTO moved VALUES (?1, ?2, ?3)";
const REPLACE_ROWS: &str = "
    DELETE FROM strata;
    DELETE FROM used_numbers;
    INSERT INTO used_numbers SELECT stratum, value, batch FROM moved ORDER BY stratum, value;
    DROP TABLE moved";

/// Moves all values of the strata `from` into the strata `to`, and returns the new tallies. The change is
/// durable when the caller's transaction commits.
///
/// # Errors
/// Returns SQLite's error, and [`ContentError::Damaged`] if the rows differ from what was drawn.
pub(super) fn grow(
    connection: &Connection,
    from: &Strata,
    tallies: &Tallies,
    to: &Strata,
) -> Result<Tallies, ContentError> {
    connection.execute_batch(CREATE_MOVED)?;
    let mut moved = Tallies::default();
    let mut insert = connection.prepare(INSERT_MOVED)?;
    for (stratum, tally) in tallies.iter() {
        from.read(connection, stratum, tally, |_, value, batch| {
            let stratum =
                to.stratum(value).expect("the larger range has the values of the smaller one");
            moved.add(stratum, to.key().hash(value));
            insert.execute(params![stratum, value.0, batch.0]).map(drop)
        })?;
    }
    drop(insert);
    connection.execute_batch(REPLACE_ROWS)?;
    moved.save(connection)?;
    Ok(moved)
}
