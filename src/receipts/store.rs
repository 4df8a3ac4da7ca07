//! The interface between the desk and a store of receipts. Knows nothing of requests.

use std::fmt::Debug;
use std::time::SystemTime;

use super::chain::Head;
use super::record::{Draft, KeyDigest, Receipt};
use crate::config::PoolName;
use crate::space::Value;

/// Why a store did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Nothing was changed, and the store can be used again.
    #[error("{0}")]
    Passing(String),
    /// It is unknown whether the change was made. [`ReceiptStore::recover`] finds it out.
    #[error("{0}")]
    Unknown(String),
}

/// The outcome for a draft.
#[derive(Debug)]
pub(crate) enum Saved {
    /// It is a receipt now.
    New,
    /// Another instance saved a receipt with its key first.
    #[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "a file has one instance"))]
    Known(Box<Receipt>),
}

/// The state of a store, for people.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary {
    pub(crate) head: Head,
    /// All keys that were used since then are known, unless they expired.
    pub(crate) known_since: SystemTime,
    /// The size on the disk, including the log.
    pub(crate) bytes: u64,
}

/// A store of receipts. One thread owns it, and may block in it.
pub(crate) trait ReceiptStore: Debug + Send {
    /// Returns the receipt of each of these keys, in the order of the keys.
    fn find(&mut self, keys: &[KeyDigest]) -> Result<Vec<Option<Receipt>>, StoreError>;

    /// Saves all drafts, durably before this returns, with one commit. Their keys differ.
    fn save(&mut self, drafts: &[&Draft]) -> Result<Vec<Saved>, StoreError>;

    /// Opens the store again after [`StoreError::Unknown`]. Returns the outcome of the last
    /// [`save`](Self::save) for each of these drafts, with which it was called, or `None` for those that were
    /// not saved.
    fn recover(&mut self, drafts: &[&Draft]) -> Result<Vec<Option<Saved>>, StoreError>;

    /// Does what is due besides saving: writes the log back, extends the index, removes expired keys.
    fn tidy(&mut self) -> Result<(), StoreError>;

    /// Returns the state of the store, or `None` if it has no receipts yet.
    fn summary(&self) -> Option<Summary>;

    /// Closes the store.
    fn close(self: Box<Self>) -> Result<(), StoreError>;
}

/// The receipts to read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// Only those after this sequence number.
    pub(crate) after: u64,
    /// Only those with this label.
    pub(crate) label: Option<String>,
}

/// Reads the receipts of a store while it is used.
pub(crate) trait ReceiptReader: Debug + Send + Sync {
    /// Returns the head of the chain.
    fn head(&self) -> Result<Head, StoreError>;

    /// Returns the next receipts in the order of their sequence numbers: up to `limit`, or fewer if they are
    /// large. There are no more only if the list is empty.
    fn page(&self, filter: &Filter, limit: usize) -> Result<Vec<Receipt>, StoreError>;

    /// Returns the receipt of a number if it is this owner's, or any owner's if none is given. It is the latest one
    /// if a restored backup issued the number twice. Takes about the same time whether there is no receipt or that
    /// of another owner.
    fn of_number(
        &self,
        pool: &PoolName,
        value: Value,
        owner: Option<&str>,
    ) -> Result<Option<Receipt>, StoreError>;
}
