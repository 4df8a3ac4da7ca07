//! One shard file: a supply of values, built once, drained once, then replaced. Knows nothing of HTTP, async,
//! the ledger's file or other shards.
//!
//! Rows are in random order, in blocks of 256 rows, which take about a page each. A lease takes rows of
//! random blocks, so every unused row of the file is equally likely to be next.

mod audit;
mod imported;

use std::ops::ControlFlow;
use std::path::Path;

use rand::RngExt;
use rand::seq::SliceRandom;
use rusqlite::{Connection, Transaction, TransactionBehavior, params};
use siphasher::sip::SipHasher13;
use uuid::Uuid;

use crate::batch::{Batch, BatchId, Generation, Progress, ShardIndex, Token};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::space::{Space, Value};
use crate::sqlite::{self, Checkpoint, ContentError, Fault, Format, Found, Fresh, rusqlite};

pub(crate) use self::audit::{
    Audit, UnusedValues, audit, each_used, each_value, select_unused, twice,
};
pub(crate) use self::imported::{Sought, import_live, import_standby, seek};

/// The format of the tables below.
const SHARD_FILE: Format = Format { name: "a shard file", application_id: 0x5442_5348, version: 3 };

/// Rows per block: about as many as fit into a page of 4096 bytes, so that a lease writes few pages.
const BLOCK_ROWS: u32 = 256;

/// The pages that have space reserved in the write-ahead log of an open shard, or those of its file if there are
/// fewer: no transaction writes more pages than that. A lease of 1024 rows writes about ten.
const LOG_PAGES: u64 = 64;

const PAGE_BYTES: u64 = 4096;

/// The pages of an open shard that SQLite keeps in memory. Each lease reads about ten, most of them at random. With
/// more pages, a thousand small shards would be in memory as a whole.
const CACHE_PAGES: u32 = 8;

/// Rows between two calls of the [`Progress`].
const REPORTED_ROWS: usize = 1 << 14;

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
        in_use     INTEGER NOT NULL DEFAULT 0, -- a server has it open, or had it open when it crashed
        open_rows  INTEGER NOT NULL DEFAULT 0, -- upper bound of the rows leased but not handed out
        leases     INTEGER NOT NULL DEFAULT 0, -- in a fleet: reveals an older copy
        token      INTEGER NOT NULL DEFAULT 0, -- from the last start; the ledger has the same
        built_at   TEXT    NOT NULL
    ) STRICT;
    CREATE TABLE blocks (             -- so that opening a shard scans no numbers
        block      INTEGER PRIMARY KEY,
        unused     INTEGER NOT NULL,
        checksum   INTEGER NOT NULL   -- over the block's values
    ) STRICT;
    CREATE TABLE numbers (
        id         INTEGER PRIMARY KEY,
        value      INTEGER NOT NULL,
        used       INTEGER NOT NULL DEFAULT 0 -- 1: leased, 2: imported
    ) STRICT;";

const INSERT_SHARD: &str = "INSERT INTO shard
    (ledger_id, pool, idx, generation, batch, rows, block_rows, decimals, built_at)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, strftime('%FT%TZ', 'now'))";
const SELECT_SHARD: &str = "SELECT ledger_id, pool, idx, generation, batch, rows, block_rows,
    decimals, in_use, open_rows, leases, token FROM shard";
const BEGIN_USE: &str = "UPDATE shard SET in_use = 1";
const END_USE: &str = "UPDATE shard SET in_use = 0, open_rows = 0";
const TAKE_OVER: &str = "UPDATE shard SET in_use = 0, open_rows = 0, token = ?1";
const UPDATE_LEASES: &str = "UPDATE shard SET open_rows = ?1, leases = ?2";
const INSERT_NUMBERS: &str = "INSERT INTO numbers (id, value) VALUES";
const SELECT_NUMBERS: &str =
    "SELECT id, value, used FROM numbers WHERE id BETWEEN ?1 AND ?2 ORDER BY id";
const UPDATE_USED: &str = "UPDATE numbers SET used = ?4 WHERE id BETWEEN ?1 AND ?2 AND used = ?3";
const INSERT_BLOCK: &str = "INSERT INTO blocks VALUES (?1, ?2, ?3)";
const SELECT_BLOCK: &str = "SELECT unused, checksum FROM blocks WHERE block = ?1";
const SELECT_BLOCKS: &str = "SELECT block, unused FROM blocks WHERE unused > 0";
const UPDATE_UNUSED: &str = "UPDATE blocks SET unused = unused + ?2 WHERE block = ?1";

/// The reason that a shard could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// SQLite's own error.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The content is inconsistent.
    #[error("{0}")]
    Damaged(String),
    /// The [`Progress`] stopped the build.
    #[error("the build was cancelled")]
    Cancelled,
}

impl From<ContentError> for ShardError {
    fn from(error: ContentError) -> Self {
        match error {
            ContentError::Sqlite(source) => source.into(),
            ContentError::File(error) => error.into(),
            problem => Self::Damaged(problem.to_string()),
        }
    }
}

impl ShardError {
    /// Returns what the error means for the file.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Sqlite(error) => sqlite::fault(error),
            Self::Damaged(_) => Fault::Content,
            // A sync may have failed.
            Self::File(_) => Fault::Io,
            Self::Cancelled => Fault::Passing,
        }
    }
}

/// The identity of a shard file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The ledger that has its values.
    pub ledger_id: Uuid,
    pub pool: PoolName,
    /// The index of the shard in its pool.
    pub index: ShardIndex,
    pub generation: Generation,
    /// The draw that its values came from.
    pub batch: BatchId,
    /// The number of values that it was built with.
    pub rows: u64,
    /// Digits after the point, for the view in the file.
    pub decimals: u8,
}

impl Label {
    /// Returns the label of the file that is built from a batch.
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

/// A leased number and the id of its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    id: u32,
    pub value: Value,
}

impl Row {
    /// Returns the block that the row is in.
    pub(crate) fn block(&self) -> u32 {
        self.id / BLOCK_ROWS
    }
}

/// The mark of a row, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Unused = 0,
    /// Leased. It becomes unused again if it is given back.
    Used = 1,
    /// Issued by other means. It stays so.
    Imported = 2,
}

impl Mark {
    fn read(mark: i64) -> Option<Self> {
        [Self::Unused, Self::Used, Self::Imported].into_iter().find(|known| *known as i64 == mark)
    }
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

/// An open shard: what is left in its file. The connection is passed to each call, so that the owner of both
/// chooses the thread.
#[derive(Debug)]
pub struct Shard {
    label: Label,
    block_rows: u32,
    /// Blocks with unused rows that are not in `loaded`.
    blocks: Vec<u32>,
    /// Unused rows of the blocks that were loaded for leases, in random order.
    loaded: Vec<Row>,
    /// Unused rows in the file.
    left: u64,
    /// `open_rows` as recorded in the file.
    open_rows: u64,
    /// The number of leases of this generation that were counted.
    leases: u64,
    counts_leases: bool,
    /// An estimate of the pages that leases wrote to the log since the last checkpoint.
    log_pages: usize,
}

/// Writes a complete shard file to `path`, which must be an empty file. The caller syncs it.
///
/// # Errors
/// Returns [`ShardError`]. The file is then useless.
pub fn build(
    path: &Path,
    label: &Label,
    space: &Space,
    values: &[Value],
    progress: Progress<'_>,
) -> Result<(), ShardError> {
    let mut connection = sqlite::open_for_build(path)?;
    let transaction = connection.transaction()?;
    transaction.execute_batch(CREATE)?;
    transaction.execute_batch(&number_view(space))?;
    sqlite::mark_format(&transaction, &SHARD_FILE)?;
    write_label(&transaction, label)?;
    write_numbers(&transaction, values, progress)?;
    write_blocks(&transaction, label.batch, values)?;
    transaction.commit()?;
    connection.close().map_err(|(_, error)| error.into())
}

/// Reads the label of a file without changing it.
///
/// # Errors
/// Returns [`ShardError::Damaged`] if it is not a complete shard file of this version.
pub(crate) fn read_label(path: &Path) -> Result<Label, ShardError> {
    read_header(&sqlite::open_to_read(path)?).map(|header| header.label)
}

/// Returns the generation of a file in this process's locked folder and the number of its counted leases.
/// Changes nothing.
pub(crate) fn progress(path: &Path) -> Result<(Generation, u64), ShardError> {
    let Header { label, leases, .. } = read_header(&sqlite::open_to_look(path)?)?;
    Ok((label.generation, leases))
}

/// Returns the number of rows of a file that can still be leased. Changes nothing.
pub fn unused_rows(path: &Path) -> Result<u64, ShardError> {
    Ok(read_blocks(&sqlite::open_to_look(path)?)?.1)
}

/// The state of a live file as the last process left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The label that it was built with.
    pub label: Label,
    /// The token of the last start that took it over.
    pub token: Token,
    /// Whether the last process did not stop gracefully.
    pub in_use: bool,
    /// An upper bound of the rows that were leased but not handed out. A crash has burned them.
    pub open_rows: u64,
    /// Rows that can still be leased.
    pub unused: u64,
    /// Whether there was a write-ahead log.
    pub had_log: bool,
}

impl Seen {
    fn read(connection: &Connection, had_log: bool) -> Result<Self, ShardError> {
        let Header { label, in_use, open_rows, token, .. } = read_header(connection)?;
        let (_, unused) = read_blocks(connection)?;
        Ok(Self { label, token, in_use, open_rows, unused, had_log })
    }

    /// Returns the reason not to trust the file, if there is one.
    pub fn problem(&self) -> Option<String> {
        lost_log(self.in_use, self.had_log, self.unused).err()
    }
}

/// Reads the state of a live file in this process's locked folder. Changes nothing.
pub(crate) fn look(path: &Path) -> Result<Seen, ShardError> {
    let had_log = files::length_bytes(&sqlite::wal_of(path))?.is_some_and(|bytes| bytes > 0);
    Seen::read(&sqlite::open_to_look(path)?, had_log)
}

/// A live file left by the last process and opened by this one.
#[derive(Debug)]
pub struct Left {
    /// The state of the file.
    pub seen: Seen,
    connection: Fresh,
}

impl Left {
    /// Opens a file that no process uses, after making its log durable.
    pub fn open(path: &Path) -> Result<Self, ShardError> {
        let connection = Found::new(path).secure()?.open()?;
        Ok(Self { seen: Seen::read(&connection, connection.had_log())?, connection })
    }

    /// Ends the last process's use of the file, durably. Its open rows are burned. Returns the connection, with
    /// which [`Shard::open`] can take the file into use.
    pub fn take_over(self, token: Token) -> Result<Fresh, ShardError> {
        self.connection.execute(TAKE_OVER, [token.0])?;
        Ok(self.connection)
    }
}

/// Returns the size of a log of `pages` pages, each with its header.
fn log_bytes(pages: u64) -> u64 {
    32 + pages * (24 + PAGE_BYTES)
}

/// Refuses a file that was in use but has lost its log, which may have contained leases. A file that is used
/// up has no more leases to lose: it was about to be replaced.
fn lost_log(in_use: bool, had_log: bool, unused: u64) -> Result<(), String> {
    if in_use && !had_log && unused > 0 {
        return Err("it was in use and its write-ahead log is gone".to_owned());
    }
    Ok(())
}

impl Shard {
    /// Takes a live file into use, also again after a disk fault.
    ///
    /// # Errors
    /// Returns [`ShardError`]. The connection must be closed, and the file can be opened again unless the
    /// fault is in its content.
    pub fn open(path: &Path, connection: &mut Fresh) -> Result<Self, ShardError> {
        connection.set_transaction_behavior(TransactionBehavior::Immediate);
        connection.pragma_update(None, "cache_size", CACHE_PAGES)?;
        let Header { label, block_rows, in_use, open_rows, leases, .. } = read_header(connection)?;
        let (blocks, left) = read_blocks(connection)?;
        lost_log(in_use, connection.had_log(), left).map_err(ShardError::Damaged)?;
        if left > label.rows {
            return Err(ShardError::Damaged(format!(
                "{left} of its {} rows are unused",
                label.rows
            )));
        }
        // Invariant: the log's name and space are durable before the mark is in the file, and the mark is in
        // the file before the first lease is in the log. So a file with the mark but no log has lost it.
        let pages = files::length_bytes(path)?.unwrap_or(0).div_ceil(PAGE_BYTES);
        files::reserve(&sqlite::wal_of(path), log_bytes(pages.min(LOG_PAGES)))?;
        connection.execute(BEGIN_USE, [])?;
        sqlite::checkpoint(connection, Checkpoint::Restart)?;
        Ok(Self {
            label,
            block_rows,
            blocks,
            loaded: Vec::new(),
            left,
            open_rows,
            leases,
            counts_leases: false,
            log_pages: 0,
        })
    }

    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Counts each lease in the file from now on. This costs a page write for leases that would not change
    /// that row otherwise.
    pub fn count_leases(&mut self) {
        self.counts_leases = true;
    }

    /// Returns the number of leases of this generation that were counted.
    pub fn leases(&self) -> u64 {
        self.leases
    }

    /// Returns the number of rows that can still be leased.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Marks up to `count` random unused rows as used, durably, and returns them in random order. There are
    /// fewer only if the file has no more. `leased` is the number of rows of earlier leases that are not
    /// handed out yet. The file records the sum of both as the rows that a crash would burn. A strict lease
    /// (`None`) records nothing.
    ///
    /// # Errors
    /// Returns [`ShardError`]. After a [passing](Fault::Passing) fault nothing has changed. After any other
    /// fault the connection must be closed.
    pub fn lease(
        &mut self,
        connection: &mut Connection,
        count: usize,
        leased: Option<usize>,
        rng: &mut impl RngExt,
    ) -> Result<Vec<Row>, ShardError> {
        self.load(connection, count, rng)?;
        let mut rows = self.loaded.split_off(self.loaded.len().saturating_sub(count));
        // At most a block is left of those that were loaded for this lease.
        self.loaded.shrink_to_fit();
        // In a fleet the rows of a strict lease wait for a step of the fence, which may take long.
        let open_rows = match leased {
            None if !self.counts_leases => 0,
            unserved => (unserved.unwrap_or(0) + rows.len()) as u64,
        };
        let marked = match self.mark_used(connection, &mut rows, open_rows) {
            Err(ShardError::Sqlite(error)) if sqlite::is_full(&error) => {
                // The log has reserved space: if it restarts at its beginning, it needs no more of the disk.
                sqlite::checkpoint(connection, Checkpoint::Restart)
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

    /// Ends the use of the file. The given rows, which were leased but not handed out, become unused again.
    /// The caller closes the connection, which writes the log back into the file.
    ///
    /// # Errors
    /// Returns [`ShardError`]. The rows are then burned.
    pub fn give_back(
        self,
        connection: &mut Connection,
        mut rows: Vec<Row>,
    ) -> Result<(), ShardError> {
        let transaction = connection.transaction()?;
        mark_rows(&transaction, &mut rows, Mark::Used, Mark::Unused)?;
        transaction.execute(END_USE, [])?;
        transaction.commit()?;
        Ok(sqlite::keep_log(connection, false)?)
    }

    /// Returns an estimate of the pages that leases wrote to the log since the last
    /// [checkpoint](Self::checkpoint).
    pub fn log_pages(&self) -> usize {
        self.log_pages
    }

    /// Writes the log back into the file, which bounds the log's size.
    pub fn checkpoint(&mut self, connection: &Connection) -> Result<(), ShardError> {
        sqlite::checkpoint(connection, Checkpoint::Passive)?;
        self.log_pages = 0;
        Ok(())
    }

    /// Loads random blocks until `count` unused rows are loaded, or all.
    fn load(
        &mut self,
        connection: &Connection,
        count: usize,
        rng: &mut impl RngExt,
    ) -> Result<(), ShardError> {
        while self.loaded.len() < count && !self.blocks.is_empty() {
            let at = rng.random_range(..self.blocks.len());
            let mut rows = self.read_block(connection, self.blocks[at])?;
            // Start at a random row, so that a lease marks consecutive rows, with one statement.
            let first = rng.random_range(..rows.len().max(1));
            rows.rotate_left(first);
            self.blocks.swap_remove(at);
            self.loaded.append(&mut rows);
        }
        Ok(())
    }

    /// Returns the unused rows of a block after checking its values and marks against the block's record.
    fn read_block(&self, connection: &Connection, block: u32) -> Result<Vec<Row>, ShardError> {
        // 64 bits, since a damaged file may contain any block number.
        let first = u64::from(block) * u64::from(self.block_rows);
        let last = first + u64::from(self.block_rows) - 1;
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

    /// Commits the rows' marks, their blocks' counts, and the number of rows that a crash would burn, in one
    /// transaction.
    fn mark_used(
        &mut self,
        connection: &mut Connection,
        rows: &mut [Row],
        open_rows: u64,
    ) -> Result<(), ShardError> {
        let transaction = connection.transaction()?;
        mark_rows(&transaction, rows, Mark::Unused, Mark::Used)?;
        let leases = self.leases + u64::from(self.counts_leases);
        if (self.open_rows, self.leases) != (open_rows, leases) {
            transaction.prepare_cached(UPDATE_LEASES)?.execute([open_rows, leases])?;
        }
        transaction.commit()?;
        self.open_rows = open_rows;
        self.leases = leases;
        let block = |row: &Row| row.id / self.block_rows;
        // A block of rows is about a page, and the counts take two more.
        self.log_pages += 2 + rows.chunk_by(|row, next| block(row) == block(next)).count();
        Ok(())
    }
}

/// Changes the marks of rows and updates the counts of their blocks.
fn mark_rows(
    transaction: &Transaction<'_>,
    rows: &mut [Row],
    from: Mark,
    to: Mark,
) -> Result<(), ShardError> {
    rows.sort_unstable_by_key(|row| row.id);
    let mut update = transaction.prepare_cached(UPDATE_USED)?;
    for run in rows.chunk_by(|row, next| row.id + 1 == next.id) {
        let (first, last) = (run[0].id, run[run.len() - 1].id);
        let marked = update.execute(params![first, last, from as i64, to as i64])?;
        if marked != run.len() {
            let problem = format!("only {marked} of the rows {first} to {last} could be marked");
            return Err(ShardError::Damaged(problem));
        }
    }
    let mut update = transaction.prepare_cached(UPDATE_UNUSED)?;
    let unused = |mark| i64::from(mark == Mark::Unused);
    for run in rows.chunk_by(|row, next| row.id / BLOCK_ROWS == next.id / BLOCK_ROWS) {
        let change = (unused(to) - unused(from)) * run.len() as i64;
        update.execute(params![run[0].id / BLOCK_ROWS, change])?;
    }
    Ok(())
}

/// Returns SipHash-1-3 of a block's values. It detects what SQLite does not: a page that changed on the disk.
fn checksum(batch: BatchId, block: u32, values: &[Value]) -> i64 {
    let mut bytes = Vec::with_capacity(values.len() * 8);
    for value in values {
        bytes.extend_from_slice(&value.0.to_le_bytes());
    }
    let key = SipHasher13::new_with_keys(batch.0.cast_unsigned(), block.into());
    key.hash(&bytes).cast_signed()
}

fn number_view(space: &Space) -> String {
    let number = sqlite::number_column("value", space);
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
    progress: Progress<'_>,
) -> Result<(), ShardError> {
    let mut ids = 0_i64..;
    for chunk in values.chunks(REPORTED_ROWS) {
        for values in chunk.chunks(sqlite::ROWS_AT_ONCE) {
            let rows: Vec<_> =
                values.iter().zip(&mut ids).map(|(value, id)| [id, value.0]).collect();
            sqlite::insert(transaction, INSERT_NUMBERS, &rows)?;
        }
        if let ControlFlow::Break(()) = progress(chunk.len() as u64) {
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

/// The only row of the table `shard`.
struct Header {
    label: Label,
    block_rows: u32,
    in_use: bool,
    open_rows: u64,
    leases: u64,
    token: Token,
}

fn read_header(connection: &Connection) -> Result<Header, ShardError> {
    sqlite::check_marks(connection, &SHARD_FILE)?;
    connection.query_row(SELECT_SHARD, [], |row| {
        let ledger_id: String = row.get(0)?;
        let pool: String = row.get(1)?;
        let (Ok(ledger_id), Some(pool)) = (Uuid::parse_str(&ledger_id), PoolName::new(&pool))
        else {
            return Ok(Err(ShardError::Damaged(
                "it has no valid ledger id or pool name".to_owned(),
            )));
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
        if block_rows != BLOCK_ROWS {
            let problem = format!("its blocks have {block_rows} rows, not {BLOCK_ROWS}");
            return Ok(Err(ShardError::Damaged(problem)));
        }
        let (in_use, open_rows, leases) = (row.get(8)?, row.get(9)?, row.get(10)?);
        let token = Token(row.get(11)?);
        Ok(Ok(Header { label, block_rows, in_use, open_rows, leases, token }))
    })?
}

/// Returns the blocks that have unused rows, and the number of these rows.
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
