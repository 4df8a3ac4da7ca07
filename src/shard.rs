//! One shard file: a pre-generated supply of values, built once, drained once, then replaced.
//! Knows nothing of HTTP, async, the ledger's file or other shards.
//!
//! Rows lie in random order, in blocks of 256, about a page each. A lease takes rows of random
//! blocks, so any unused row of the file is as likely as any other to be next.

mod audit;

use std::ops::ControlFlow;
use std::path::Path;

use rand::RngExt;
use rand::seq::SliceRandom;
use rusqlite::{Connection, Transaction, TransactionBehavior, params};
use siphasher::sip::SipHasher13;
use uuid::Uuid;

use crate::batch::{Batch, BatchId, Generation, ShardIndex, Step};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::space::Value;
use crate::sqlite::{self, Checkpoint, FormatError, rusqlite};

pub use self::audit::{Audit, audit, each_value, twice};

/// Marks a SQLite file as a shard: "TBSH".
const APPLICATION_ID: i32 = 0x5442_5348;

/// The version of the tables below.
const FORMAT: i32 = 2;

/// Rows of a block: about as many as fit a page of 4096 bytes, so that a lease writes few pages.
const BLOCK_ROWS: u32 = 256;

/// Pages that an open shard's write-ahead log has space for, whatever happens to the disk: a lease of
/// 1024 rows writes about ten.
const LOG_PAGES: u32 = 64;

/// Rows between two calls of the [`Step`].
const STEP: usize = 1 << 14;

const CREATE: &str = "
    CREATE TABLE shard (
        ledger_id  TEXT    NOT NULL,
        pool       TEXT    NOT NULL,
        idx        INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        batch      INTEGER NOT NULL,
        rows       INTEGER NOT NULL,
        block_rows INTEGER NOT NULL,
        decimals   INTEGER NOT NULL,
        in_use     INTEGER NOT NULL DEFAULT 0, -- a server has it open, or had when it crashed
        open_rows  INTEGER NOT NULL DEFAULT 0, -- leased and not handed out, at most
        leases     INTEGER NOT NULL DEFAULT 0, -- in a fleet: tells an older copy from a newer one
        built_at   TEXT    NOT NULL
    ) STRICT;
    CREATE TABLE blocks (             -- opening a shard costs no scan of numbers
        block      INTEGER PRIMARY KEY,
        unused     INTEGER NOT NULL,
        checksum   INTEGER NOT NULL   -- of the block's values
    ) STRICT;
    CREATE TABLE numbers (
        id         INTEGER PRIMARY KEY,
        value      INTEGER NOT NULL,
        used       INTEGER NOT NULL DEFAULT 0
    ) STRICT;";

const INSERT_SHARD: &str = "INSERT INTO shard
    (ledger_id, pool, idx, generation, batch, rows, block_rows, decimals, built_at)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, strftime('%FT%TZ', 'now'))";
const SELECT_SHARD: &str = "SELECT ledger_id, pool, idx, generation, batch, rows, block_rows,
    decimals, in_use, open_rows, leases FROM shard";
const UPDATE_IN_USE: &str = "UPDATE shard SET in_use = ?1, open_rows = 0";
const UPDATE_LEASES: &str = "UPDATE shard SET open_rows = ?1, leases = ?2";
const INSERT_NUMBERS: &str = "INSERT INTO numbers (id, value) VALUES";
const SELECT_NUMBERS: &str =
    "SELECT id, value, used FROM numbers WHERE id BETWEEN ?1 AND ?2 ORDER BY id";
const UPDATE_USED: &str =
    "UPDATE numbers SET used = ?3 WHERE id BETWEEN ?1 AND ?2 AND used = 1 - ?3";
const REWRITE_PAGES: &str = "UPDATE numbers SET used = used WHERE id < ?1 AND id % ?2 = 0";
const INSERT_BLOCK: &str = "INSERT INTO blocks VALUES (?1, ?2, ?3)";
const SELECT_BLOCK: &str = "SELECT unused, checksum FROM blocks WHERE block = ?1";
const SELECT_BLOCKS: &str = "SELECT block, unused FROM blocks WHERE unused > 0";
const UPDATE_UNUSED: &str = "UPDATE blocks SET unused = unused + ?2 WHERE block = ?1";

const LOG_GONE: &str = "it was in use and its write-ahead log is gone";

/// Why a shard could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// SQLite's own error.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The content contradicts itself.
    #[error("{0}")]
    Damaged(String),
    /// The [`Step`] ended the build.
    #[error("the build was cancelled")]
    Cancelled,
}

impl ShardError {
    /// Whether the file is as trustworthy as before, so that trying again makes sense.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Sqlite(error) => sqlite::is_transient(error),
            Self::File(_) => true,
            Self::Damaged(_) | Self::Cancelled => false,
        }
    }
}

/// What a shard file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The ledger that knows its values.
    pub ledger_id: Uuid,
    /// The pool's name.
    pub pool: PoolName,
    /// Which shard of the pool.
    pub index: ShardIndex,
    /// Which filling of the shard.
    pub generation: Generation,
    /// The draw that its values came from.
    pub batch: BatchId,
    /// How many values it was built with.
    pub rows: u64,
    /// Digits after the point, for its view.
    pub decimals: u8,
}

impl Label {
    /// The label of the file that is built from a batch.
    #[must_use]
    pub fn new(ledger_id: Uuid, pool: &PoolName, decimals: u8, batch: Batch) -> Self {
        Self {
            ledger_id,
            pool: pool.clone(),
            index: batch.shard,
            generation: batch.generation,
            batch: batch.id,
            rows: batch.count,
            decimals,
        }
    }
}

/// A leased number and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    id: u32,
    /// The number.
    pub value: Value,
}

#[cfg(test)]
impl Row {
    pub(crate) fn for_test(id: u32) -> Self {
        Self { id, value: Value(id.into()) }
    }

    pub(crate) fn id_for_test(&self) -> u32 {
        self.id
    }
}

/// An open shard: what is left in its file. The connection is passed in, so that whoever owns both
/// decides on which thread it is used.
#[derive(Debug)]
pub struct Shard {
    label: Label,
    block_rows: u32,
    /// Blocks with unused rows, none of them in `loaded`.
    blocks: Vec<u32>,
    /// Unused rows of the blocks that leases have begun, in random order.
    loaded: Vec<Row>,
    /// Unused rows in the file.
    left: u64,
    /// `open_rows` as the file has it.
    open_rows: u64,
    /// Leases of this generation, as far as they are counted.
    leases: u64,
    counts_leases: bool,
    /// About as many pages as leases wrote to the log since the last checkpoint.
    log_pages: usize,
}

/// Writes a complete shard file to `path`, which must be an empty file. The caller syncs it.
///
/// # Errors
/// [`ShardError`]; the file is then of no use.
pub fn build(
    path: &Path,
    label: &Label,
    values: &[Value],
    step: Step<'_>,
) -> Result<(), ShardError> {
    let mut connection = sqlite::open_for_build(path)?;
    let transaction = connection.transaction()?;
    transaction.execute_batch(CREATE)?;
    transaction.execute_batch(&view_for_people(label.decimals))?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", FORMAT)?;
    write_label(&transaction, label)?;
    write_numbers(&transaction, values, step)?;
    write_blocks(&transaction, label.batch, values)?;
    transaction.commit()?;
    connection.close().map_err(|(_, error)| error.into())
}

/// Reads what a file says of itself, without changing it.
///
/// # Errors
/// [`ShardError::Damaged`] when it is not a whole shard file of this version.
pub fn read_label(path: &Path) -> Result<Label, ShardError> {
    read_header(&sqlite::open_to_read(path)?).map(|header| header.label)
}

/// How far a file of this process's locked folder has come: its generation, and how many leases of it
/// were counted. Changes nothing.
///
/// # Errors
/// [`ShardError`].
pub fn progress(path: &Path) -> Result<(Generation, u64), ShardError> {
    sqlite::check_log(path)?.map_err(ShardError::Damaged)?;
    let log_bytes = files::length_bytes(&sqlite::wal_of(path))?.unwrap_or(0);
    let Header { label, in_use, leases, .. } = read_header(&sqlite::open_to_look(path)?)?;
    if in_use && log_bytes == 0 {
        // As for `recover`, which decides whether it is served.
        return Err(ShardError::Damaged(LOG_GONE.to_owned()));
    }
    Ok((label.generation, leases))
}

/// Ends the use of a live file whose process is gone, so that it can be opened again. Answers with
/// its label, and how many numbers that process may have leased and not handed out.
///
/// # Errors
/// [`ShardError::Damaged`] when the file is not whole, or was in use and its write-ahead log is gone:
/// it may then have forgotten what it handed out.
pub fn recover(path: &Path) -> Result<(Label, u64), ShardError> {
    // Opening creates a log where there is none, and an empty one may come of that.
    let log_bytes = files::length_bytes(&sqlite::wal_of(path))?.unwrap_or(0);
    sqlite::secure_log(path)?.map_err(ShardError::Damaged)?;
    let connection = sqlite::open(path)?;
    // The log stays until `end_use` has cleared the mark: a crash in between would look like its loss.
    sqlite::keep_log(&connection, true)?;
    let Header { label, in_use, open_rows, .. } = read_header(&connection)?;
    // A file that is used up by its own word has nothing to forget: its swap was under way.
    if in_use && log_bytes == 0 && read_blocks(&connection)?.1 > 0 {
        return Err(ShardError::Damaged(LOG_GONE.to_owned()));
    }
    Ok((label, open_rows))
}

/// Notes in the file that nobody has it open any more and nothing of it is leased.
///
/// # Errors
/// [`ShardError`].
pub fn end_use(path: &Path) -> Result<(), ShardError> {
    let connection = sqlite::open(path)?;
    sqlite::checkpoint(&connection, Checkpoint::Full)?;
    connection.execute(UPDATE_IN_USE, [false])?;
    connection.close().map_err(|(_, error)| error.into())
}

/// Makes a copy of a live file one that nobody uses. Answers with its label, and how many numbers were
/// leased from the original and not handed out at that moment, at most: the copy does not have them.
///
/// # Errors
/// [`ShardError`].
pub fn end_copy(path: &Path) -> Result<(Label, u64), ShardError> {
    let connection = sqlite::open(path)?;
    let Header { label, open_rows, .. } = read_header(&connection)?;
    connection.execute(UPDATE_IN_USE, [false])?;
    connection.close().map_err(|(_, error)| error)?;
    Ok((label, open_rows))
}

/// How many rows of a file can still be leased.
///
/// # Errors
/// [`ShardError`].
pub fn unused_rows(path: &Path) -> Result<u64, ShardError> {
    let connection = sqlite::open(path)?;
    let (_, left) = read_blocks(&connection)?;
    connection.close().map_err(|(_, error)| error)?;
    Ok(left)
}

impl Shard {
    /// Takes a live file into use.
    ///
    /// # Errors
    /// [`ShardError::Damaged`] when the file is not whole, or in use: [`recover`] comes first.
    pub fn open(connection: &mut Connection) -> Result<Self, ShardError> {
        connection.set_transaction_behavior(TransactionBehavior::Immediate);
        let Header { label, block_rows, in_use, leases, .. } = read_header(connection)?;
        if in_use {
            return Err(ShardError::Damaged("it is in use".to_owned()));
        }
        let (blocks, left) = read_blocks(connection)?;
        if left > label.rows {
            return Err(ShardError::Damaged(format!("{left} of {} rows are unused", label.rows)));
        }
        // Invariant: the mark is in the file itself before the first lease is in its log, and as long
        // as it is there the log is not empty.
        let transaction = connection.transaction()?;
        transaction.execute(UPDATE_IN_USE, [true])?;
        transaction.execute(REWRITE_PAGES, [LOG_PAGES * block_rows, block_rows])?;
        transaction.commit()?;
        sqlite::checkpoint(connection, Checkpoint::Full)?;
        Ok(Self {
            label,
            block_rows,
            blocks,
            loaded: Vec::new(),
            left,
            open_rows: 0,
            leases,
            counts_leases: false,
            log_pages: 0,
        })
    }

    /// What the file says of itself.
    #[must_use]
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// From now on each lease is counted in the file, at the price of a page where nothing else is
    /// noted there.
    pub fn count_leases(&mut self) {
        self.counts_leases = true;
    }

    /// How many leases of this generation were counted.
    #[must_use]
    pub fn leases(&self) -> u64 {
        self.leases
    }

    /// Rows that can still be leased.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Marks up to `count` random unused rows as used, durably, and returns them in random order;
    /// fewer only when the file has no more. `unserved` of the rows leased before are not handed out
    /// yet: with these they are what a crash would burn. Nothing keeps that for a strict lease.
    ///
    /// # Errors
    /// After one that [is transient](ShardError::is_transient) nothing has changed; after any other
    /// the file must not be used any more.
    pub fn lease(
        &mut self,
        connection: &mut Connection,
        count: usize,
        unserved: Option<usize>,
        rng: &mut impl RngExt,
    ) -> Result<Vec<Row>, ShardError> {
        self.load(connection, count, rng)?;
        let mut rows = self.loaded.split_off(self.loaded.len().saturating_sub(count));
        // In a fleet the rows of a strict lease wait for a step, which may be long.
        let open_rows = match unserved {
            None if !self.counts_leases => 0,
            unserved => (unserved.unwrap_or(0) + rows.len()) as u64,
        };
        let marked = match self.mark_used(connection, &mut rows, open_rows) {
            Err(ShardError::Sqlite(error)) if sqlite::is_full(&error) => {
                // The log has space of its own: from its beginning it needs no more of the disk.
                sqlite::checkpoint(connection, Checkpoint::Full)
                    .map_err(ShardError::from)
                    .and_then(|()| self.mark_used(connection, &mut rows, open_rows))
            }
            marked => marked,
        };
        match marked {
            // Invariant: committed before handed out.
            Ok(()) => {
                self.left -= rows.len() as u64;
                rows.shuffle(rng);
                Ok(rows)
            }
            Err(error) => {
                self.loaded.append(&mut rows);
                Err(error)
            }
        }
    }

    /// Ends the use of the file: leased rows that were not handed out become unused again, and its
    /// log goes into the file. The caller closes the connection.
    ///
    /// # Errors
    /// [`ShardError`]; the rows are then burned.
    pub fn give_back(
        self,
        connection: &mut Connection,
        mut rows: Vec<Row>,
    ) -> Result<(), ShardError> {
        let transaction = connection.transaction()?;
        mark_rows(&transaction, self.block_rows, &mut rows, false)?;
        transaction.execute(UPDATE_IN_USE, [false])?;
        transaction.commit()?;
        Ok(sqlite::checkpoint(connection, Checkpoint::Truncate)?)
    }

    /// About as many pages as leases wrote to the log since the last [checkpoint](Self::checkpoint).
    #[must_use]
    pub fn log_pages(&self) -> usize {
        self.log_pages
    }

    /// Puts the log into the file, so that it does not grow for ever.
    ///
    /// # Errors
    /// As for [`lease`](Self::lease).
    pub fn checkpoint(&mut self, connection: &Connection) -> Result<(), ShardError> {
        sqlite::checkpoint(connection, Checkpoint::Passive)?;
        self.log_pages = 0;
        Ok(())
    }

    /// Loads random blocks until `count` unused rows are at hand, or all.
    fn load(
        &mut self,
        connection: &Connection,
        count: usize,
        rng: &mut impl RngExt,
    ) -> Result<(), ShardError> {
        while self.loaded.len() < count && !self.blocks.is_empty() {
            let at = rng.random_range(..self.blocks.len());
            let mut rows = self.read_block(connection, self.blocks[at])?;
            rows.shuffle(rng);
            self.blocks.swap_remove(at);
            self.loaded.append(&mut rows);
        }
        Ok(())
    }

    /// The unused rows of a block, whose values and marks are held against the block's record.
    fn read_block(&self, connection: &Connection, block: u32) -> Result<Vec<Row>, ShardError> {
        let (first, last) = (block * self.block_rows, (block + 1) * self.block_rows - 1);
        let mut values = Vec::with_capacity(self.block_rows as usize);
        let mut unused = Vec::with_capacity(self.block_rows as usize);
        let mut select = connection.prepare_cached(SELECT_NUMBERS)?;
        let mut rows = select.query([first, last])?;
        while let Some(row) = rows.next()? {
            let value = Value(row.get(1)?);
            values.push(value);
            if row.get::<_, i64>(2)? == 0 {
                unused.push(Row { id: row.get(0)?, value });
            }
        }
        let (expected, sum): (u32, i64) = connection
            .prepare_cached(SELECT_BLOCK)?
            .query_row([block], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if sum != checksum(self.label.batch, block, &values) || unused.len() != expected as usize {
            let problem = format!("the rows of block {block} are not those that it was built with");
            return Err(ShardError::Damaged(problem));
        }
        Ok(unused)
    }

    /// One transaction: the rows' marks, their blocks' counts, and what a crash would burn.
    fn mark_used(
        &mut self,
        connection: &mut Connection,
        rows: &mut [Row],
        open_rows: u64,
    ) -> Result<(), ShardError> {
        let transaction = connection.transaction()?;
        mark_rows(&transaction, self.block_rows, rows, true)?;
        let leases = self.leases + u64::from(self.counts_leases);
        if (self.open_rows, self.leases) != (open_rows, leases) {
            transaction.prepare_cached(UPDATE_LEASES)?.execute([open_rows, leases])?;
        }
        transaction.commit()?;
        self.open_rows = open_rows;
        self.leases = leases;
        let block = |row: &Row| row.id / self.block_rows;
        // A block of rows is about a page, and two more have the counts.
        self.log_pages += 2 + rows.chunk_by(|row, next| block(row) == block(next)).count();
        Ok(())
    }
}

/// Sets the marks of rows, and counts them in their blocks.
fn mark_rows(
    transaction: &Transaction<'_>,
    block_rows: u32,
    rows: &mut [Row],
    used: bool,
) -> Result<(), ShardError> {
    rows.sort_unstable_by_key(|row| row.id);
    let mut update = transaction.prepare_cached(UPDATE_USED)?;
    for run in rows.chunk_by(|row, next| row.id + 1 == next.id) {
        let (first, last) = (run[0].id, run[run.len() - 1].id);
        let marked = update.execute(params![first, last, used])?;
        if marked != run.len() {
            let problem = format!("{marked} of rows {first} to {last} had the other mark");
            return Err(ShardError::Damaged(problem));
        }
    }
    let mut update = transaction.prepare_cached(UPDATE_UNUSED)?;
    for run in rows.chunk_by(|row, next| row.id / block_rows == next.id / block_rows) {
        let count = run.len() as i64;
        update.execute(params![run[0].id / block_rows, if used { -count } else { count }])?;
    }
    Ok(())
}

/// SipHash-1-3 of a block's values: finds what SQLite does not, a page that changed on the disk.
fn checksum(batch: BatchId, block: u32, values: &[Value]) -> i64 {
    let mut bytes = Vec::with_capacity(values.len() * 8);
    for value in values {
        bytes.extend_from_slice(&value.0.to_le_bytes());
    }
    let key = SipHasher13::new_with_keys(batch.0.cast_unsigned(), block.into());
    key.hash(&bytes).cast_signed()
}

fn view_for_people(decimals: u8) -> String {
    let number = sqlite::number_column("value", decimals);
    format!("CREATE VIEW pool (id, number, used) AS SELECT id, {number}, used FROM numbers;")
}

fn write_label(transaction: &Transaction<'_>, label: &Label) -> Result<(), ShardError> {
    transaction.execute(
        INSERT_SHARD,
        params![
            label.ledger_id.to_string(),
            label.pool.as_str(),
            label.index.0,
            label.generation.0,
            label.batch.0,
            label.rows,
            BLOCK_ROWS,
            label.decimals
        ],
    )?;
    Ok(())
}

fn write_numbers(
    transaction: &Transaction<'_>,
    values: &[Value],
    step: Step<'_>,
) -> Result<(), ShardError> {
    let mut ids = 0_i64..;
    for chunk in values.chunks(STEP) {
        for values in chunk.chunks(sqlite::ROWS_AT_ONCE) {
            let rows: Vec<_> =
                values.iter().zip(&mut ids).map(|(value, id)| [id, value.0]).collect();
            sqlite::insert(transaction, INSERT_NUMBERS, &rows)?;
        }
        if let ControlFlow::Break(()) = step(chunk.len() as u64) {
            return Err(ShardError::Cancelled);
        }
    }
    Ok(())
}

fn write_blocks(
    transaction: &Transaction<'_>,
    batch: BatchId,
    values: &[Value],
) -> Result<(), ShardError> {
    let mut insert = transaction.prepare(INSERT_BLOCK)?;
    for (block, values) in (0..).zip(values.chunks(BLOCK_ROWS as usize)) {
        insert.execute(params![block, values.len(), checksum(batch, block, values)])?;
    }
    Ok(())
}

/// The one row of the table `shard`.
struct Header {
    label: Label,
    block_rows: u32,
    in_use: bool,
    open_rows: u64,
    leases: u64,
}

fn read_header(connection: &Connection) -> Result<Header, ShardError> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    if pragma("application_id")? != APPLICATION_ID {
        return Err(ShardError::Damaged("it is not a shard file".to_owned()));
    }
    let format = pragma("user_version")?;
    if format != FORMAT {
        let problem = FormatError::OtherVersion { found: format.into(), known: FORMAT };
        return Err(ShardError::Damaged(problem.to_string()));
    }
    connection.query_row(SELECT_SHARD, [], |row| {
        let ledger_id: String = row.get(0)?;
        let pool: String = row.get(1)?;
        let (Ok(ledger_id), Some(pool)) = (Uuid::parse_str(&ledger_id), PoolName::new(&pool))
        else {
            return Ok(Err(ShardError::Damaged("it names no ledger or pool".to_owned())));
        };
        let label = Label {
            ledger_id,
            pool,
            index: ShardIndex(row.get(2)?),
            generation: Generation(row.get(3)?),
            batch: BatchId(row.get(4)?),
            rows: row.get(5)?,
            decimals: row.get(7)?,
        };
        let block_rows = row.get(6)?;
        if block_rows == 0 {
            return Ok(Err(ShardError::Damaged("its blocks have no rows".to_owned())));
        }
        let (in_use, open_rows, leases) = (row.get(8)?, row.get(9)?, row.get(10)?);
        Ok(Ok(Header { label, block_rows, in_use, open_rows, leases }))
    })?
}

/// The blocks that have unused rows, and how many rows these are.
fn read_blocks(connection: &Connection) -> Result<(Vec<u32>, u64), ShardError> {
    let mut select = connection.prepare(SELECT_BLOCKS)?;
    let mut rows = select.query([])?;
    let (mut blocks, mut left) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        blocks.push(row.get(0)?);
        left += u64::from(row.get::<_, u32>(1)?);
    }
    Ok((blocks, left))
}

#[cfg(test)]
mod tests;
