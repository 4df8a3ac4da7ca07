//! Reads a file of receipts. Changes nothing.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};

use super::super::chain::Head;
use super::super::record::{Caller, Receipt};
use super::super::store::{Filter, ReceiptReader, StoreError};
use super::check::{self, Checked, Unused};
use super::{
    Known, OpenError, RECEIPTS_FILE, SELECT_AFTER, SELECT_HEAD, SELECT_RECEIPT, index, read_receipt,
};
use crate::batch::Report;
use crate::config::PoolName;
use crate::space::Value;
use crate::sqlite::{self, rusqlite};

/// The most bytes of numbers in a page of receipts. A page has at least one receipt.
const PAGE_BYTES: usize = 1 << 20;

const SELECT_CALLER: &str = "SELECT caller FROM receipts WHERE seq = ?1";
const SELECT_LABELLED: &str = "
    SELECT seq, at, pool, caller, label, label_salt, label_digest, key_digest, numbers, digest
    FROM receipts WHERE seq > ?1 AND label = ?3 ORDER BY seq LIMIT ?2";

/// Reads the file at this path, while its writer uses it. There are no receipts if it does not exist.
#[derive(Debug)]
pub(crate) struct FileReader {
    path: PathBuf,
    /// Whether another connection may write to the file.
    in_use: bool,
}

impl FileReader {
    pub(crate) fn new(path: &Path, in_use: bool) -> Self {
        Self { path: path.to_owned(), in_use }
    }

    /// Reads the whole file and reports each violation. Returns `None` if there is no file.
    pub(crate) fn check(
        &self,
        unused: Unused<'_>,
        report: Report<'_>,
    ) -> Result<Option<Checked>, OpenError> {
        self.read(|connection| check::check(connection, unused, report))
    }

    fn read<R>(
        &self,
        read: impl FnOnce(&Connection) -> Result<R, rusqlite::Error>,
    ) -> Result<Option<R>, OpenError> {
        if crate::files::length_bytes(&self.path)?.is_none() {
            return Ok(None);
        }
        let connection = match self.in_use {
            true => sqlite::open_beside(&self.path),
            false => sqlite::open_to_look(&self.path),
        };
        let failed = |source| OpenError::new(&self.path, source);
        let connection = connection.map_err(failed)?;
        let marks = sqlite::check_marks(&connection, &RECEIPTS_FILE);
        marks.map_err(|error| OpenError::of_content(&self.path, error))?;
        // One view of the file for all that is read.
        sqlite::begin_snapshot(&connection).map_err(failed)?;
        read(&connection).map(Some).map_err(failed)
    }
}

impl From<OpenError> for StoreError {
    fn from(error: OpenError) -> Self {
        Self::Passing(error.to_string())
    }
}

impl ReceiptReader for FileReader {
    fn head(&self) -> Result<Head, StoreError> {
        Ok(self.read(head)?.unwrap_or(Head::START))
    }

    fn page(&self, filter: &Filter, limit: usize) -> Result<Vec<Receipt>, StoreError> {
        let page = self.read(|connection| page(connection, filter, limit))?;
        Ok(page.unwrap_or_default())
    }

    fn of_number(
        &self,
        pool: &PoolName,
        value: Value,
        owner: Option<&str>,
    ) -> Result<Option<Receipt>, StoreError> {
        let found = self.read(|connection| {
            let known = Known::read(connection)?;
            let pools = known.pools.iter().filter(|(_, origin)| origin.pool == *pool);
            let pools: Vec<_> = pools.map(|(id, _)| *id).collect();
            let found = index::find(connection, &pools, value)?;
            // If there is no receipt, another one's owner is read, so that this takes as long.
            let seq = found.unwrap_or(head(connection)?.seq);
            let is_allowed = is_of(connection, &known, seq, owner)?;
            match found.filter(|_| is_allowed) {
                Some(seq) => receipt(connection, &known, seq),
                None => Ok(None),
            }
        })?;
        Ok(found.flatten())
    }
}

/// Returns the head of the chain.
pub(super) fn head(connection: &Connection) -> Result<Head, rusqlite::Error> {
    let head = connection
        .query_row(SELECT_HEAD, [], |row| Ok(Head { seq: row.get(0)?, digest: row.get(1)? }))
        .optional()?;
    Ok(head.unwrap_or(Head::START))
}

/// Returns whether a receipt is this owner's, or any owner's if none is given.
fn is_of(
    connection: &Connection,
    known: &Known,
    seq: u64,
    owner: Option<&str>,
) -> Result<bool, rusqlite::Error> {
    let mut select = connection.prepare(SELECT_CALLER)?;
    let id: Option<i64> = select.query_row([seq], |row| row.get(0)).optional()?;
    let is_caller = |(caller, other): (&Caller, &i64)| {
        Some(*other) == id && owner.is_none_or(|owner| *owner == *caller.owner)
    };
    Ok(known.callers.iter().any(is_caller))
}

/// Returns a receipt.
pub(super) fn receipt(
    connection: &Connection,
    known: &Known,
    seq: u64,
) -> Result<Option<Receipt>, rusqlite::Error> {
    let mut select = connection.prepare_cached(SELECT_RECEIPT)?;
    let receipt = select.query_row([seq], |row| read_receipt(row, known)).optional()?;
    Ok(receipt.map(|(receipt, _)| receipt))
}

fn page(
    connection: &Connection,
    filter: &Filter,
    limit: usize,
) -> Result<Vec<Receipt>, rusqlite::Error> {
    let known = Known::read(connection)?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let (mut select, mut rows);
    match &filter.label {
        None => {
            select = connection.prepare(SELECT_AFTER)?;
            rows = select.query((filter.after, limit))?;
        }
        Some(label) => {
            select = connection.prepare(SELECT_LABELLED)?;
            rows = select.query((filter.after, limit, label))?;
        }
    }
    let (mut page, mut bytes) = (Vec::new(), 0);
    while bytes < PAGE_BYTES
        && let Some(row) = rows.next()?
    {
        let (receipt, numbers) = read_receipt(row, &known)?;
        bytes += numbers.len();
        page.push(receipt);
    }
    Ok(page)
}
