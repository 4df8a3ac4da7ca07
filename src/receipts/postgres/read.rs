//! Reads the receipts of a space while its instances append to it. Creates no tables: without them there are no
//! receipts.

use std::sync::{Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::super::chain::{Head, continues};
use super::super::file::{OpenError, Report};
use super::super::record::Receipt;
use super::super::store::{Filter, ReceiptReader, StoreError};
use super::heads::{self, SpaceState};
use super::rows::PAGE_BYTES;
use super::session::{BEGIN, COMMIT, Failure, Session};
use super::{index, rows};
use crate::config::{PoolName, StoreConfig};
use crate::space::Value;

/// The receipts that are checked at a time.
const STEP_RECEIPTS: usize = 1_000;

/// See the [module](self). All methods block the thread.
#[derive(Debug)]
pub(crate) struct PostgresReader {
    /// A connection of its own, so that reading does not delay requests. Readers take turns.
    session: Mutex<Session>,
    space: String,
}

impl PostgresReader {
    /// Reads the password and the certificates, and connects when it is used. `handle` is of a runtime that runs on
    /// other threads.
    pub(crate) fn new(
        config: &StoreConfig,
        space: &str,
        handle: Handle,
    ) -> Result<Self, OpenError> {
        let session = Session::new(config, handle)?;
        Ok(Self { session: Mutex::new(session), space: space.to_owned() })
    }

    /// Returns the head of the chain.
    pub(crate) fn head(&self) -> Result<Head, StoreError> {
        let head = self.read(async |_, state| Ok(state.head))?;
        Ok(head.unwrap_or(Head::START))
    }

    /// Reads all receipts, and checks the chain. Returns `None` if there is none.
    pub(crate) fn check(&self) -> Result<Option<Report>, StoreError> {
        // Instances may append while this reads.
        let newest = self.head()?;
        let mut head = Head::START;
        let mut problems = Vec::new();
        'pages: while head.seq < newest.seq {
            let page = self.page(&Filter { after: head.seq, label: None }, STEP_RECEIPTS)?;
            if page.is_empty() {
                break;
            }
            for receipt in page {
                if !continues(head, &receipt, &receipt.given.to_bytes()) {
                    problems.push(format!(
                        "receipt {} does not continue the chain after receipt {}: one of them was changed, or \
                         receipts between them were removed",
                        receipt.seq, head.seq
                    ));
                    break 'pages;
                }
                head = Head { seq: receipt.seq, digest: receipt.digest };
                if head.seq == newest.seq && head != newest {
                    problems.push(format!(
                        "tombola_heads has another digest of receipt {} than the receipt itself",
                        head.seq
                    ));
                }
            }
        }
        if problems.is_empty() && head.seq < newest.seq {
            problems.push(format!(
                "the receipts after receipt {} are missing: there were {}",
                head.seq, newest.seq
            ));
        }
        Ok((newest != Head::START).then_some(Report { head, problems }))
    }

    /// Removes a label from all of its receipts, and returns the number of these. Its text stays in the database's
    /// files until they are vacuumed.
    pub(crate) fn erase_label(&self, label: &str) -> Result<u64, StoreError> {
        let erased =
            self.read(async |client, _| rows::erase_label(client, &self.space, label).await)?;
        Ok(erased.unwrap_or(0))
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
    fn page(&self, filter: &Filter, limit: usize) -> Result<Vec<Receipt>, StoreError> {
        let page = self.read(async |client, _| {
            rows::after(client, &self.space, filter, limit, PAGE_BYTES).await
        })?;
        Ok(page.unwrap_or_default())
    }

    fn of_number(&self, pool: &PoolName, value: Value) -> Result<Option<Receipt>, StoreError> {
        let found = self.read(async |client, state| {
            index::find(client, &self.space, state, (pool, value)).await
        })?;
        Ok(found.flatten())
    }
}
