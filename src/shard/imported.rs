//! Marks the rows of values that were issued by other means, so that no lease takes them.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::{Mark, Row, Shard, ShardError, mark_rows};
use crate::files;
use crate::space::Value;
use crate::sqlite::{self, Found, rusqlite};

const SELECT_ROWS: &str = "SELECT id, value, used FROM numbers";
const SELECT_MARK: &str = "SELECT used FROM numbers WHERE id = ?1";

/// The rows that have one of the sought values, by their marks, each in the order of the file.
#[derive(Debug, Default)]
pub(crate) struct Sought {
    pub unused: Vec<Row>,
    pub used: Vec<Row>,
    pub imported: Vec<Row>,
}

impl Sought {
    fn len(&self) -> usize {
        self.unused.len() + self.used.len() + self.imported.len()
    }
}

/// Finds the rows of these values, which are in ascending order, by reading the file once.
///
/// # Errors
/// Returns [`ShardError::Damaged`] if a value is not in the file.
pub(crate) fn seek(connection: &Connection, values: &[Value]) -> Result<Sought, ShardError> {
    let mut sought = Sought::default();
    let mut select = connection.prepare(SELECT_ROWS)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let value = Value(row.get(1)?);
        if values.binary_search(&value).is_err() {
            continue;
        }
        let found = match Mark::read(row.get(2)?) {
            Some(Mark::Unused) => &mut sought.unused,
            Some(Mark::Used) => &mut sought.used,
            Some(Mark::Imported) => &mut sought.imported,
            None => return Err(ShardError::Damaged("a row has an invalid mark".to_owned())),
        };
        found.push(Row { id: row.get(0)?, value });
    }
    if sought.len() != values.len() {
        let problem = format!("it has {} of {} numbers of its batch", sought.len(), values.len());
        return Err(ShardError::Damaged(problem));
    }
    Ok(sought)
}

/// Marks the unused rows of these values as imported, in a live file that no process uses. Returns the rows as they
/// were before. The marks are durable once this returns.
///
/// # Errors
/// Returns [`ShardError`]. The rows may be marked then.
pub(crate) fn import_live(path: &Path, values: &[Value]) -> Result<Sought, ShardError> {
    let mut connection = Found::new(path).secure()?.open()?.into_connection();
    connection.set_transaction_behavior(TransactionBehavior::Immediate);
    let mut sought = seek(&connection, values)?;
    mark(&mut connection, &mut sought.unused)?;
    sqlite::close(connection)?;
    Ok(sought)
}

/// Does the same as [`import_live`] with a standby. It has no log, which would not get the name of the live file
/// with it, so a marked copy takes its place.
pub(crate) fn import_standby(path: &Path, values: &[Value]) -> Result<Sought, ShardError> {
    let mut sought = seek(&sqlite::open_to_read(path)?, values)?;
    if sought.unused.is_empty() {
        return Ok(sought);
    }
    let copy = files::unfinished(path);
    if let Err(error) = write_marked(path, &copy, &mut sought.unused) {
        // The copy would take space that a full disk does not have.
        let _ = files::remove(&copy);
        return Err(error);
    }
    files::rename_durably(&copy, path)?;
    Ok(sought)
}

/// Writes a copy of a file in which these rows are marked, durably except for its name.
fn write_marked(path: &Path, copy: &Path, rows: &mut [Row]) -> Result<(), ShardError> {
    files::copy(path, copy)?;
    let mut connection = sqlite::open_for_build(copy)?;
    mark(&mut connection, rows)?;
    connection.close().map_err(|(_, error)| error)?;
    Ok(files::sync_file(copy)?)
}

impl Shard {
    /// Marks those of the rows as imported, durably, that are unused or among `leased`, which no request gets any
    /// more. Returns all that are then marked as imported.
    ///
    /// # Errors
    /// Returns [`ShardError`], as [`lease`](Shard::lease) does.
    pub(crate) fn import(
        &mut self,
        connection: &mut Connection,
        rows: &[Row],
        leased: &BTreeSet<Row>,
    ) -> Result<Vec<Row>, ShardError> {
        let transaction = connection.transaction()?;
        let (mut unused, mut withdrawn, mut imported) = (Vec::new(), Vec::new(), Vec::new());
        let mut select = transaction.prepare_cached(SELECT_MARK)?;
        for row in rows {
            match Mark::read(select.query_row([row.id], |row| row.get(0))?) {
                Some(Mark::Unused) => unused.push(*row),
                Some(Mark::Used) if leased.contains(row) => withdrawn.push(*row),
                Some(Mark::Used) => {}
                Some(Mark::Imported) => imported.push(*row),
                None => return Err(ShardError::Damaged("a row has an invalid mark".to_owned())),
            }
        }
        drop(select);
        mark_rows(&transaction, &mut unused, Mark::Unused, Mark::Imported)?;
        mark_rows(&transaction, &mut withdrawn, Mark::Used, Mark::Imported)?;
        transaction.commit()?;
        self.left -= unused.len() as u64;
        // The rows are in the order of their ids.
        self.loaded.retain(|row| unused.binary_search(row).is_err());
        self.log_pages += 2 + rows.chunk_by(|row, next| row.block() == next.block()).count();
        imported.append(&mut unused);
        imported.append(&mut withdrawn);
        Ok(imported)
    }
}

fn mark(connection: &mut Connection, rows: &mut [Row]) -> Result<(), ShardError> {
    if rows.is_empty() {
        return Ok(());
    }
    let transaction = connection.transaction()?;
    mark_rows(&transaction, rows, Mark::Unused, Mark::Imported)?;
    Ok(transaction.commit()?)
}
