//! Reads the receipts of a space while its instances append to it. Creates no tables: without them there are no
//! receipts.

use std::io;
use std::sync::{Mutex, PoisonError};

use tokio::runtime::{self, Handle, Runtime};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::super::chain::{Head, broken, continues};
use super::super::file::{Checked, OpenError};
use super::super::record::Receipt;
use super::super::store::{Filter, ReceiptReader, StoreError};
use super::heads::{self, SpaceState};
use super::rows::PAGE_BYTES;
use super::session::{BEGIN, COMMIT, Failure, Session};
use super::{index, rows, space_name};
use crate::batch::Report;
use crate::config::{PoolName, SpaceName, StoreConfig};
use crate::space::Value;

/// The receipts that are checked at a time.
const STEP_RECEIPTS: usize = 1_000;

/// See the [module](self). All methods block the thread.
#[derive(Debug)]
pub(crate) struct PostgresReader {
    /// A connection of its own, so that reading does not delay requests. Readers take turns.
    session: Mutex<Session>,
    space: String,
    /// The runtime of the connection, if there is no other one.
    _runtime: Option<Runtime>,
}

impl PostgresReader {
    /// Reads the password and the certificates, and connects when it is used. `handle` is of a runtime that runs on
    /// other threads.
    pub(super) fn new(
        config: &StoreConfig,
        space: Option<&SpaceName>,
        handle: Handle,
    ) -> Result<Self, OpenError> {
        let session = Mutex::new(Session::new(config, handle)?);
        Ok(Self { session, space: space_name(space), _runtime: None })
    }

    /// Returns a reader for a process that has no runtime.
    pub(crate) fn alone(
        config: &StoreConfig,
        space: Option<&SpaceName>,
    ) -> Result<Self, OpenError> {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error: io::Error| OpenError::Database {
            address: config.address.to_string(),
            problem: format!("can't start the runtime: {error}"),
        })?;
        let reader = Self::new(config, space, runtime.handle().clone())?;
        Ok(Self { _runtime: Some(runtime), ..reader })
    }

    /// Reads all receipts, and reports each violation of the chain.
    pub(crate) fn check(&self, report: Report<'_>) -> Result<Checked, StoreError> {
        // Instances may append while this reads.
        let newest = self.head()?;
        let mut checked = Checked { head: Head::START, receipts: 0, numbers: 0, not_compared: 0 };
        while checked.head.seq < newest.seq {
            let filter = Filter { after: checked.head.seq, label: None };
            let page = self.page(&filter, STEP_RECEIPTS)?;
            if page.is_empty() {
                break;
            }
            for receipt in page {
                let next = Head { seq: receipt.seq, digest: receipt.digest };
                if !continues(checked.head, &receipt, &receipt.given.to_bytes()) {
                    report("a broken chain", broken(checked.head, next));
                }
                if next.seq == newest.seq && next != newest {
                    let what = format!("tombola_heads has another digest of receipt {}", next.seq);
                    report("a broken chain", what);
                }
                checked.head = next;
                checked.receipts += 1;
                checked.numbers += receipt.given.values().count() as u64;
            }
        }
        let last = checked.head.seq;
        if last < newest.seq {
            let what = format!("the receipts {} to {} are missing", last + 1, newest.seq);
            report("a broken chain", what);
        }
        Ok(checked)
    }

    /// Removes a label from all of its receipts, and returns the number of these. Its text stays in the database's
    /// files until they are vacuumed.
    pub(crate) fn erase_label(&self, label: &str) -> Result<usize, StoreError> {
        let erased =
            self.read(async |client, _| rows::erase_label(client, &self.space, label).await)?;
        Ok(erased.unwrap_or(0) as usize)
    }

    /// Returns the result of `work`, or `None` if the space does not exist. The transaction commits like a write: see
    /// [`heads::confirm`].
    fn read<T>(
        &self,
        work: impl AsyncFnOnce(&Client, SpaceState) -> Result<T, Failure>,
    ) -> Result<Option<T>, StoreError> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let read = session.work(async |client, _| {
            client.batch_execute(BEGIN).await?;
            let state = match heads::confirm(client, &self.space).await {
                Err(Failure::Database(error))
                    if error.code() == Some(&SqlState::UNDEFINED_TABLE) =>
                {
                    client.batch_execute("ROLLBACK").await?;
                    return Ok(None);
                }
                state => state?,
            };
            let found = match state {
                Some(state) => Some(work(client, state).await?),
                None => None,
            };
            client.batch_execute(COMMIT).await?;
            Ok(found)
        });
        read.map_err(StoreError::Passing)
    }
}

impl ReceiptReader for PostgresReader {
    fn head(&self) -> Result<Head, StoreError> {
        let head = self.read(async |_, state| Ok(state.head))?;
        Ok(head.unwrap_or(Head::START))
    }

    fn page(&self, filter: &Filter, limit: usize) -> Result<Vec<Receipt>, StoreError> {
        let page = self.read(async |client, _| {
            rows::after(client, &self.space, filter, limit, PAGE_BYTES).await
        })?;
        Ok(page.unwrap_or_default())
    }

    fn of_number(
        &self,
        pool: &PoolName,
        value: Value,
        owner: Option<&str>,
    ) -> Result<Option<Receipt>, StoreError> {
        let found = self.read(async |client, state| {
            index::find(client, &self.space, state, (pool, value), owner).await
        })?;
        Ok(found.flatten())
    }
}
