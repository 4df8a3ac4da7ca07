//! Receipts: which numbers a response contained, who it was for, and under which idempotency key. Knows nothing
//! of HTTP or of how numbers are made.
//!
//! A request that leaves a receipt [reserves](crate::pool::Reservation) its numbers, which are durably marked as
//! used already. The [desk] saves the receipt, and only then hands out the numbers:
//! ```text
//! wait for those under way with the same key -> look for its receipt -> reserve -> save -> respond
//! ```
//! So a repetition of a request gets the numbers of the receipt, whatever failed in between. The desk owns
//! the [store], a [file](mod@file) or a PostgreSQL database.

mod chain;
mod clock;
mod desk;
mod file;
mod flights;
#[cfg(feature = "postgres")]
mod postgres;
mod record;
mod store;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::SystemTime;

use tokio::sync::oneshot;

pub(crate) use self::chain::Head;
use self::desk::{Desk, Outcome, Question, Save, Waiter};
pub(crate) use self::file::{Checked, FileReader, OpenError, ReceiptFile, erase_label, mark_copy};
use self::flights::{Flight, Flights};
#[cfg(feature = "postgres")]
pub(crate) use self::postgres::PostgresReader;
#[cfg(feature = "postgres")]
use self::postgres::PostgresReceipts;
pub(crate) use self::record::{
    Caller, Given, KEY_BYTES_MAX, KeyDigest, LABEL_BYTES_MAX, Label, Origin, Receipt,
};
use self::record::{Draft, Labelled};
pub(crate) use self::store::{Filter, ReceiptReader, ReceiptStore, StoreError, Summary};
use crate::backoff::Backoff;
use crate::config::{ReceiptStoreConfig, ReceiptsConfig, SpaceName};
use crate::events::Events;
use crate::files;
use crate::folder::{RECEIPTS, RECEIPTS_COPIED};
use crate::pool::Reservation;

/// The receipt can't be read or saved at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unavailable;

/// The handle by which requests read and save receipts.
#[derive(Debug)]
pub(crate) struct Receipts {
    questions: mpsc::Sender<Question>,
    flights: Arc<Flights>,
    counts: Arc<Counts>,
    reader: Arc<dyn ReceiptReader>,
}

/// The only request with a key that is under way. Repetitions wait until this is dropped or its receipt is saved.
#[derive(Debug)]
pub(crate) struct First {
    key: KeyDigest,
    flight: Flight,
    /// Whether the key is known to have no receipt.
    is_new: bool,
}

/// The response to a request that asked for a receipt.
#[derive(Debug)]
pub(crate) enum Kept {
    /// The receipt is saved, and the numbers are handed out.
    Given(Given),
    /// The key had a receipt already.
    Known(Box<Receipt>),
}

/// An open store, and its reader.
pub(crate) type OpenStore = (Box<dyn ReceiptStore>, Arc<dyn ReceiptReader>);

/// Opens the store of the settings. `folder` is the data folder, which this process has locked, and `space` is that
/// of its fleet. Has to be called on a thread of a runtime, to which it blocks.
///
/// # Errors
/// [`OpenError`], with what to do about it.
pub(crate) fn open(
    config: &ReceiptsConfig,
    folder: &Path,
    space: Option<&SpaceName>,
) -> Result<OpenStore, OpenError> {
    match &config.store {
        ReceiptStoreConfig::Folder => {
            let path = folder.join(RECEIPTS);
            let copied = folder.join(RECEIPTS_COPIED);
            if files::length_bytes(&copied)?.is_some() {
                mark_copy(&path)?;
                files::remove(&copied)?;
            }
            let file = ReceiptFile::open(&path, config.keep, config.lookups.is_some())?;
            Ok((Box::new(file), Arc::new(FileReader::new(&path, true))))
        }
        #[cfg(feature = "postgres")]
        ReceiptStoreConfig::Postgres(store) => {
            let handle = tokio::runtime::Handle::current();
            PostgresReceipts::open(store, space, config.keep, config.lookups.is_some(), handle)
        }
        #[cfg(not(feature = "postgres"))]
        ReceiptStoreConfig::Postgres(store) => {
            unreachable!("refused by the settings: {}, {space:?}", store.address)
        }
    }
}

impl Receipts {
    /// Returns the handle for requests and the work of the desk, which the caller runs on a blocking thread. It
    /// ends when the handle is dropped.
    pub(crate) fn new(
        store: Box<dyn ReceiptStore>,
        reader: Arc<dyn ReceiptReader>,
        events: Arc<Events>,
        backoff: Backoff,
    ) -> (Self, impl FnOnce() + Send) {
        let (sender, questions) = mpsc::channel();
        let counts = Arc::new(Counts::default());
        // Before the desk's thread runs, because /status may be requested before that.
        counts.tell(store.summary());
        let desk = Desk::new(store, questions, Arc::clone(&counts), events, backoff);
        let receipts = Self { questions: sender, flights: Arc::default(), counts, reader };
        (receipts, move || desk.run())
    }

    /// Waits until no other request with the key is under way.
    pub(crate) async fn begin(&self, key: KeyDigest) -> First {
        let _waiting = self.counts.wait();
        First { key, flight: self.flights.begin(key).await, is_new: false }
    }

    /// Returns the receipt of the request's key, if it has one. Without this, [`save`](Self::save) looks it up.
    pub(crate) async fn find(&self, first: &mut First) -> Result<Option<Receipt>, Unavailable> {
        let (reply, found) = oneshot::channel();
        self.ask(Question::Find { key: first.key, reply })?;
        let found = found.await.unwrap_or(Err(Unavailable))?;
        first.is_new = found.is_none();
        Ok(found)
    }

    /// Saves the receipt of these numbers and hands them out. They go back if the receipt can't be saved, or if the
    /// key has one already. The receipt is saved even if the returned future is dropped.
    pub(crate) async fn save(
        &self,
        first: Option<First>,
        numbers: Reservation,
        request: Request,
    ) -> Result<Kept, Unavailable> {
        let Request { origin, caller, label, is_short } = request;
        let given = Given { is_short, parts: numbers.parts() };
        let looks_up = first.as_ref().is_some_and(|first| !first.is_new);
        let (key, flight) = first.map(|first| (first.key, first.flight)).unzip();
        let draft = Draft {
            at: SystemTime::now(),
            origin,
            caller,
            label: label.map(Labelled::new),
            key,
            is_short,
            numbers: given.to_bytes(),
            count: given.values().count(),
        };
        let (reply, outcome) = oneshot::channel();
        let waiter = Some(Waiter { flight, reply });
        self.ask(Question::Save(Box::new(Save { draft, numbers, waiter, looks_up })))?;
        let _waiting = self.counts.wait();
        match outcome.await.unwrap_or(Err(Unavailable))? {
            Outcome::Given(given) => Ok(Kept::Given(given)),
            Outcome::Known(receipt) => Ok(Kept::Known(receipt)),
        }
    }

    /// Returns the reader, for blocking threads.
    pub(crate) fn reader(&self) -> Arc<dyn ReceiptReader> {
        Arc::clone(&self.reader)
    }

    /// Returns the counts, which outlive the handle.
    pub(crate) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    fn ask(&self, question: Question) -> Result<(), Unavailable> {
        // This fails only if the desk's thread died.
        self.questions.send(question).map_err(|_| Unavailable)
    }
}

/// The parts of a receipt that come from its request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) origin: Arc<Origin>,
    pub(crate) caller: Caller,
    pub(crate) label: Option<Label>,
    /// Whether the request had no `count`.
    pub(crate) is_short: bool,
}

/// Counts since the start, and the state of the store.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    keyed: AtomicU64,
    unkeyed: AtomicU64,
    replayed: AtomicU64,
    refused: AtomicU64,
    waiting: AtomicU64,
    state: Mutex<State>,
}

/// The state of the store as the desk last saw it.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    /// `None` if there are no receipts yet.
    pub(crate) summary: Option<Summary>,
    /// Why receipts can't be saved.
    pub(crate) trouble: Option<String>,
}

/// The values of [`Counts`].
#[derive(Clone, Debug)]
pub(crate) struct ReceiptFigures {
    /// Receipts with a key.
    pub(crate) keyed: u64,
    /// Receipts without one.
    pub(crate) unkeyed: u64,
    /// Requests that got the response of an earlier one.
    pub(crate) replayed: u64,
    /// Requests with a key that were refused because of it, or because the receipt could not be saved.
    pub(crate) refused: u64,
    /// Requests that wait for a receipt or for an earlier request with their key.
    pub(crate) waiting: u64,
    pub(crate) state: State,
}

impl Counts {
    /// Returns all values.
    pub(crate) fn figures(&self) -> ReceiptFigures {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ReceiptFigures {
            keyed: get(&self.keyed),
            unkeyed: get(&self.unkeyed),
            replayed: get(&self.replayed),
            refused: get(&self.refused),
            waiting: get(&self.waiting),
            state: self.state().clone(),
        }
    }

    /// Counts a request that gets the response of an earlier one.
    pub(crate) fn replayed(&self) {
        add(&self.replayed);
    }

    /// Counts a request that is refused.
    pub(crate) fn refused(&self) {
        add(&self.refused);
    }

    fn saved(&self, draft: &Draft) {
        add(if draft.key.is_some() { &self.keyed } else { &self.unkeyed });
    }

    /// Counts a waiting request until the returned value is dropped.
    fn wait(&self) -> Waiting<'_> {
        add(&self.waiting);
        Waiting(&self.waiting)
    }

    fn tell(&self, summary: Option<Summary>) {
        self.state().summary = summary;
    }

    /// Notes that the store works.
    fn worked(&self) {
        self.state().trouble = None;
    }

    /// Notes that the store fails. Returns whether it worked before.
    fn failed(&self, error: &StoreError) -> bool {
        self.state().trouble.replace(error.to_string()).is_none()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of it panics")
    }
}

/// A waiting request.
struct Waiting<'c>(&'c AtomicU64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}
