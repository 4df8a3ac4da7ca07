//! Reads a whole shard file and checks it. Changes nothing.

use rusqlite::{Connection, Rows, Statement};

use super::{Header, Label, Mark, ShardError, checksum, read_header};
use crate::batch::{Report, Tally, Token};
use crate::space::Value;
use crate::sqlite::{self, rusqlite};

const SELECT_ALL: &str = "SELECT id, value, used FROM numbers ORDER BY id";
const SELECT_USED: &str = "SELECT value FROM numbers WHERE used <> 0";
const SELECT_UNUSED: &str = "SELECT value FROM numbers WHERE used = 0 ORDER BY value";
const SELECT_BLOCKS: &str = "SELECT block, unused, checksum FROM blocks ORDER BY block";
const SELECT_TWICE: &str =
    "SELECT value FROM numbers GROUP BY value HAVING count(*) > 1 ORDER BY value LIMIT ?1";

/// The maximum number of SQLite's own messages about a file.
const PROBLEMS_MAX: usize = 10;

/// The result of reading a whole shard file.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    pub label: Label,
    /// Rows that can still be leased.
    pub unused: u64,
    /// The token of the last start that took the file over.
    pub token: Token,
    /// Whether the last process that used the file did not stop gracefully.
    pub in_use: bool,
    /// An upper bound of the rows that were leased but not handed out.
    pub open_rows: u64,
    /// The tally of all values, used or not.
    pub tally: Tally,
    /// The tally of the values that are marked as imported.
    pub imported: Tally,
}

/// The rows of one block.
struct Block {
    values: Vec<Value>,
    unused: u64,
}

/// Reads every row, reports each violation, and returns what the file contains.
///
/// # Errors
/// Returns [`ShardError`] if the file is not a shard, or can't be read to its end.
pub(crate) fn audit(
    connection: &Connection,
    hash: impl Fn(Value) -> u64,
    report: Report<'_>,
) -> Result<Audit, ShardError> {
    let Header { label, block_rows, token, in_use, open_rows, .. } = read_header(connection)?;
    for problem in sqlite::problems(connection, PROBLEMS_MAX)? {
        report("SQLite finds it damaged", problem);
    }
    let mut blocks = connection.prepare(SELECT_BLOCKS)?;
    let mut blocks = blocks.query([])?;
    let mut select = connection.prepare(SELECT_ALL)?;
    let mut rows = select.query([])?;
    let (mut tally, mut imported, mut unused, mut index) =
        (Tally::default(), Tally::default(), 0, 0);
    loop {
        let mut block = Block { values: Vec::with_capacity(block_rows as usize), unused: 0 };
        while block.values.len() < block_rows as usize
            && let Some(row) = rows.next()?
        {
            let (id, value, used): (i64, _, i64) = (row.get(0)?, Value(row.get(1)?), row.get(2)?);
            if id.cast_unsigned() != tally.count {
                report("a row out of order", format!("row {id} is at place {}", tally.count));
            }
            let hash = hash(value);
            match Mark::read(used) {
                Some(Mark::Unused) => block.unused += 1,
                Some(Mark::Used) => {}
                Some(Mark::Imported) => imported.add(hash),
                None => report("an invalid mark", format!("row {id} is marked {used}")),
            }
            tally.add(hash);
            block.values.push(value);
        }
        unused += block.unused;
        let noted = match blocks.next()? {
            Some(row) => Some((row.get(0)?, row.get(1)?, row.get(2)?)),
            None => None,
        };
        if block.values.is_empty() && noted.is_none() {
            break;
        }
        check_block(&label, index, &block, noted, report);
        index += 1;
    }
    if tally.count != label.rows {
        let what = format!("it has {} rows, but was built with {}", tally.count, label.rows);
        report("a wrong number of rows", what);
    }
    Ok(Audit { label, unused, token, in_use, open_rows, tally, imported })
}

/// Compares a block's rows with its record: its number, its unused rows and its checksum.
fn check_block(
    label: &Label,
    index: u32,
    block: &Block,
    noted: Option<(i64, u64, i64)>,
    report: Report<'_>,
) {
    let Some((number, unused, sum)) = noted.filter(|noted| noted.0 == i64::from(index)) else {
        report("a block without a record", format!("block {index} has no record"));
        return;
    };
    if sum != checksum(label.batch, index, &block.values) {
        let what = format!("the values of block {number} are not those that it was built with");
        report("a block with other values", what);
    }
    if unused != block.unused {
        let what = format!(
            "block {number} has {} unused rows, but its record says {unused}",
            block.unused
        );
        report("a block whose count is wrong", what);
    }
}

/// Calls `with` for each value of the file and its mark, if the mark is valid.
pub(crate) fn each_value(
    connection: &Connection,
    mut with: impl FnMut(Value, Option<Mark>),
) -> Result<(), ShardError> {
    let mut select = connection.prepare(SELECT_ALL)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        with(Value(row.get(1)?), Mark::read(row.get(2)?));
    }
    Ok(())
}

/// Calls `each` with the value of every row that was leased or imported.
pub(crate) fn each_used<E: From<rusqlite::Error>>(
    connection: &Connection,
    each: &mut dyn FnMut(Value) -> Result<(), E>,
) -> Result<(), E> {
    let mut select = connection.prepare(SELECT_USED)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        each(Value(row.get(0)?))?;
    }
    Ok(())
}

/// Returns the values that are in more than one row, up to `limit`.
pub(crate) fn twice(connection: &Connection, limit: usize) -> Result<Vec<Value>, ShardError> {
    let mut select = connection.prepare(SELECT_TWICE)?;
    let values = select.query_map([limit], |row| row.get(0).map(Value))?;
    Ok(values.collect::<Result<_, _>>()?)
}

/// Prepares to read the [unused values](UnusedValues) of a file.
pub(crate) fn select_unused(connection: &Connection) -> Result<Statement<'_>, ShardError> {
    Ok(connection.prepare(SELECT_UNUSED)?)
}

/// The unused values of a file. SQLite sorts them when the first one is needed.
pub(crate) struct UnusedValues<'s> {
    rows: Rows<'s>,
    /// The value that was read last.
    last: Option<Value>,
}

impl<'s> UnusedValues<'s> {
    /// `select` is the statement of [`select_unused`].
    pub(crate) fn new(select: &'s mut Statement<'_>) -> Result<Self, ShardError> {
        Ok(Self { rows: select.query([])?, last: None })
    }

    /// Returns whether a value is unused. It must not be smaller than that of an earlier call.
    pub(crate) fn has(&mut self, value: Value) -> Result<bool, ShardError> {
        while self.last.is_none_or(|last| last < value) {
            match self.rows.next()? {
                Some(row) => self.last = Some(Value(row.get(0)?)),
                None => return Ok(false),
            }
        }
        Ok(self.last == Some(value))
    }
}
