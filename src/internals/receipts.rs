//! Requests with an idempotency key, as `POST /random` makes them, and a check of the file that keeps their
//! receipts. Knows nothing of HTTP.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::config::{ReceiptStoreConfig, ReceiptsConfig, RefillConfig};
use crate::folder::RECEIPTS;
use crate::pool::{Pool, TakeError};
use crate::receipts::{
    self, Caller, FileReader, Filter, Given, Kept, KeyDigest, Origin, ReceiptReader, Request,
    Unavailable,
};
use crate::space::Value;

/// The receipts of a folder.
#[derive(Debug)]
pub struct Receipts(receipts::Receipts);

/// The numbers of a key.
#[derive(Debug)]
pub struct Response {
    pub numbers: Vec<Value>,
    /// Whether an earlier request had them.
    pub is_replayed: bool,
}

/// Why a request with a key got no numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the receipt can't be read or saved")]
    NotSaved,
    #[error(transparent)]
    NoNumbers(#[from] TakeError),
}

impl From<Unavailable> for Refusal {
    fn from(Unavailable: Unavailable) -> Self {
        Self::NotSaved
    }
}

impl Receipts {
    /// Opens the receipts of a folder, which the caller has locked. Also returns the work of the desk, which
    /// the caller runs on a blocking thread. It ends when the receipts are dropped.
    ///
    /// # Errors
    /// The message of a start that is refused.
    pub fn open(
        folder: &Path,
        refill: RefillConfig,
    ) -> Result<(Self, impl FnOnce() + Send + use<>), String> {
        let config = ReceiptsConfig {
            keep: Duration::from_secs(86_400),
            store: ReceiptStoreConfig::Folder,
            keys: true,
            lookups: Some(NonZeroU32::MIN),
        };
        let (store, reader) =
            receipts::open(&config, folder, None).map_err(|error| error.to_string())?;
        let backoff = Backoff::new(refill.retry, refill.retry_limit);
        let (receipts, desk) = receipts::Receipts::new(store, reader, Arc::default(), backoff);
        Ok((Self(receipts), desk))
    }

    /// Takes `count` numbers for a key, or returns those that the key has already.
    ///
    /// # Errors
    /// [`Refusal`]. The key then has no numbers, unless the store finds out later that they were saved.
    pub async fn take(
        &self,
        pool: &Arc<Pool>,
        key: &str,
        count: NonZeroU32,
    ) -> Result<Response, Refusal> {
        // As a request does.
        let mut first = self.0.begin(KeyDigest::new("", key)).await;
        let numbers = match pool.try_reserve(count) {
            Some(numbers) => numbers,
            None => match self.0.find(&mut first).await? {
                Some(receipt) => return Ok(response(&receipt.given, true)),
                None => pool.reserve(count).await?,
            },
        };
        let origin = Origin { pool: pool.name().clone(), space: pool.space().clone() };
        let request = Request {
            origin: Arc::new(origin),
            caller: Caller::default(),
            label: None,
            is_short: false,
        };
        Ok(match self.0.save(Some(first), numbers, request).await? {
            Kept::Given(given) => response(&given, false),
            Kept::Known(receipt) => response(&receipt.given, true),
        })
    }
}

fn response(given: &Given, is_replayed: bool) -> Response {
    Response { numbers: given.values().collect(), is_replayed }
}

/// Checks the receipts of a folder that no process uses. Returns the numbers of each receipt.
///
/// # Errors
/// The first problem, or the error of reading them.
pub fn check(folder: &Path) -> Result<Vec<Vec<Value>>, String> {
    let reader = FileReader::new(&folder.join(RECEIPTS), false);
    let mut problems = Vec::new();
    let checked = reader.check(&mut |_, _| None, &mut |kind, what| {
        problems.push(format!("{kind}: {what}"));
    });
    checked.map_err(|error| error.to_string())?;
    if let Some(problem) = problems.into_iter().next() {
        return Err(problem);
    }
    let (mut numbers, mut after) = (Vec::new(), 0);
    loop {
        let page = reader.page(&Filter { after, label: None }, 1_000);
        let page = page.map_err(|error| error.to_string())?;
        let Some(last) = page.last() else { return Ok(numbers) };
        after = last.seq;
        numbers.extend(page.iter().map(|receipt| receipt.given.values().collect()));
    }
}
