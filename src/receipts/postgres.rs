//! Keeps the receipts of a fleet in a PostgreSQL database, for which all its instances append in turn. Knows nothing
//! of requests.
//!
//! A space has the fleet's name, and its [head](heads) is the lock under which its receipts are saved. The
//! [receipts](rows) are the truth, and the [keys] and the [index] of numbers are derived from them.
//! Prepares no statements, because there may be a connection pooler in between.

mod heads;
mod index;
mod keys;
mod read;
mod rows;
mod session;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::join;
use tokio::runtime::Handle;
use tokio_postgres::Client;
use tracing::{error, info, warn};

pub(crate) use self::read::PostgresReader;
use self::session::{BEGIN, COMMIT, Failure, Session, transact};
use super::OpenStore;
use super::chain::{Head, Link};
use super::clock::Clock;
use super::file::OpenError;
use super::record::{Draft, KeyDigest, Receipt};
use super::store::{ReceiptStore, Saved, StoreError, Summary};
use crate::config::{SpaceName, StoreConfig};

/// The name of the space of a server that is in no fleet.
const ALONE: &str = "default";

/// The pause between two looks at the clock and the size of the tables.
const TIDY_INTERVAL: Duration = Duration::from_secs(60);

/// How long the index is extended before requests are served again, if many numbers are not in it.
const INDEX_TURN: Duration = Duration::from_millis(200);

/// The numbers after which the index is extended. A look-up reads all receipts that are not in it.
const INDEX_NUMBERS: usize = 1_024;

/// Sent first, because creating a table that exists may be forbidden.
const MISSING: &str = "SELECT to_regclass('tombola_numbers') IS NULL";

/// Instances that create the tables at the same moment would fail, so they take turns. The number is arbitrary.
const LOCK_TABLES: &str = "SELECT pg_advisory_xact_lock(7243114921)";

const SELECT_BYTES: &str = "
    SELECT (sum(pg_total_relation_size(relid)) + pg_total_relation_size('tombola_receipts')
        + pg_total_relation_size('tombola_numbers'))::bigint
    FROM pg_partition_tree('tombola_keys')";

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct PostgresReceipts {
    database: Database,
    has_index: bool,
    /// The newest receipt that this instance has seen.
    head: Head,
    known_since: SystemTime,
    bytes: u64,
    clock: Option<Clock>,
    tidied: Option<Instant>,
    /// The numbers of this instance since the index had all numbers.
    unindexed: usize,
    /// The last save, if it is unknown whether it is committed.
    undecided: Option<Undecided>,
}

fn space_name(space: Option<&SpaceName>) -> String {
    space.map_or(ALONE, SpaceName::as_str).to_owned()
}

/// A space of the database.
#[derive(Debug)]
struct Database {
    session: Session,
    space: String,
    keep: Duration,
}

/// A save that is being committed.
#[derive(Debug)]
struct Undecided {
    /// The head that it makes.
    head: Head,
    saved: Vec<Saved>,
}

impl PostgresReceipts {
    /// Returns the store and the reader of a fleet's space, or of a server that is in no fleet. They connect when they
    /// are used. Reads the password and the certificates. `handle` is of a runtime that runs on other threads than
    /// those that use the store.
    ///
    /// # Errors
    /// [`OpenError`] if the password or a certificate can't be read or used.
    pub(crate) fn open(
        config: &StoreConfig,
        space: Option<&SpaceName>,
        keep: Duration,
        has_index: bool,
        handle: Handle,
    ) -> Result<OpenStore, OpenError> {
        if config.shows_password() {
            warn!(
                store = %config.address,
                "the password for the receipts crosses the network in plain text: set receipts.tls"
            );
        }
        let reader = PostgresReader::new(config, space, handle.clone())?;
        let session = Session::new(config, handle)?;
        let store = Self {
            database: Database { session, space: space_name(space), keep },
            has_index,
            head: Head::START,
            known_since: SystemTime::now(),
            bytes: 0,
            clock: None,
            tidied: None,
            unindexed: 0,
            undecided: None,
        };
        Ok((Box::new(store), Arc::new(reader)))
    }

    /// Extends the index.
    fn index(&mut self) -> Result<(), String> {
        let Self { database, .. } = self;
        let began = Instant::now();
        while let Some(batch) = database.work(index::next)? {
            for numbers in batch.numbers.chunks(index::INSERT_NUMBERS) {
                database.work(async |client, space| index::insert(client, space, numbers).await)?;
            }
            database.work(async |client, space| index::finish(client, space, &batch).await)?;
            if began.elapsed() >= INDEX_TURN {
                // Goes on after the next requests.
                self.unindexed = INDEX_NUMBERS;
                return Ok(());
            }
        }
        self.unindexed = 0;
        Ok(())
    }
}

impl Database {
    /// Does `work` on a connection, in bounded time. All tables exist, and the space has a bucket for keys.
    fn work<T>(
        &mut self,
        work: impl AsyncFnOnce(&Client, &str) -> Result<T, Failure>,
    ) -> Result<T, String> {
        let Self { session, space, keep } = self;
        session.work(async |client, is_new| {
            if is_new {
                create_tables(client).await?;
                heads::create(client, space).await?;
                keys::begin_bucket(client, space, *keep).await?;
            }
            work(client, space).await
        })
    }
}

async fn create_tables(client: &Client) -> Result<(), Failure> {
    if !client.query_typed_one(MISSING, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(());
    }
    let tables = [heads::CREATE, rows::CREATE, keys::CREATE, index::CREATE].concat();
    client.batch_execute(&format!("{BEGIN}; {LOCK_TABLES}; {tables} {COMMIT}")).await?;
    info!("the tables of the receipts are created");
    Ok(())
}

impl ReceiptStore for PostgresReceipts {
    fn find(&mut self, keys: &[KeyDigest]) -> Result<Vec<Option<Receipt>>, StoreError> {
        let found = self
            .database
            .work(async |client, space| transact(client, keys::find(client, space, keys)).await);
        let mut found = found.map_err(StoreError::Passing)?;
        Ok(keys.iter().map(|key| found.remove(key)).collect())
    }

    fn save(&mut self, drafts: &[&Draft]) -> Result<Vec<Saved>, StoreError> {
        let Self { database, undecided, head: last, known_since, .. } = self;
        *undecided = None;
        let keys: Vec<_> = drafts.iter().filter_map(|draft| draft.key).collect();
        let done = database.work(async |client, space| {
            let (begun, state, has_last, known) = join!(
                biased;
                client.batch_execute(BEGIN),
                heads::lock(client, space),
                rows::exists(client, space, *last),
                keys::find(client, space, &keys),
            );
            begun?;
            let (state, has_last, known) = (state?, has_last?, known?);
            *known_since = state.known_since;
            if !has_last {
                heads::forget_earlier_keys(client, space).await?;
                error!(
                    seq = last.seq,
                    "the database has lost the last receipt that this server saw: it was restored, or a standby \
                     without it took over; repetitions of lost requests get new numbers"
                );
            }
            let plan = Plan::new(state.head, drafts, known);
            let (receipts, keys, head) = join!(
                biased;
                rows::insert(client, space, &plan.receipts),
                keys::insert(client, space, &plan.keys),
                heads::update(client, space, plan.head),
            );
            receipts.and(keys).and(head)?;
            *undecided = Some(Undecided { head: plan.head, saved: plan.saved });
            // Invariant: saved, durably, before its numbers are handed out.
            client.batch_execute(COMMIT).await?;
            Ok(undecided.take().expect("it was set above"))
        });
        let Undecided { head, saved } = done.map_err(|problem| match self.undecided {
            None => StoreError::Passing(problem),
            Some(_) => StoreError::Unknown(problem),
        })?;
        self.head = head;
        self.unindexed += drafts.iter().map(|draft| draft.count).sum::<usize>();
        Ok(saved)
    }

    fn recover(&mut self, drafts: &[&Draft]) -> Result<Vec<Option<Saved>>, StoreError> {
        let none = || drafts.iter().map(|_| None).collect();
        let Some(Undecided { head, .. }) = self.undecided else { return Ok(none()) };
        let is_saved = self.database.work(async |client, space| {
            let statements = async {
                // The lock waits for the transaction of the save, if it is not over yet.
                let (locked, is_saved) = join!(
                    biased;
                    heads::lock(client, space),
                    rows::exists(client, space, head),
                );
                locked.and(is_saved)
            };
            transact(client, statements).await
        });
        // A save is one commit: all or none.
        match (is_saved.map_err(StoreError::Unknown)?, self.undecided.take()) {
            (true, Some(Undecided { head, saved })) => {
                self.head = head;
                Ok(saved.into_iter().map(Some).collect())
            }
            _ => Ok(none()),
        }
    }

    fn tidy(&mut self) -> Result<(), StoreError> {
        let is_due = self.tidied.is_none_or(|tidied| tidied.elapsed() >= TIDY_INTERVAL);
        if self.has_index && (is_due || self.unindexed >= INDEX_NUMBERS) {
            self.index().map_err(StoreError::Passing)?;
        }
        if !is_due {
            return Ok(());
        }
        self.tidied = Some(Instant::now());
        let Self { database, clock, .. } = self;
        let keep = database.keep;
        let tidied = database.work(async |client, space| {
            keys::begin_bucket(client, space, keep).await?;
            keys::expire(client, space, keep, clock).await?;
            let bytes: i64 = client.query_typed_one(SELECT_BYTES, &[]).await?.try_get(0)?;
            Ok((bytes, transact(client, heads::confirm(client, space)).await?))
        });
        let (bytes, state) = tidied.map_err(StoreError::Passing)?;
        self.bytes = bytes.try_into().unwrap_or(0);
        if let Some(state) = state {
            (self.head, self.known_since) = (state.head, state.known_since);
        }
        Ok(())
    }

    fn summary(&self) -> Option<Summary> {
        let Self { head, known_since, bytes, .. } = *self;
        (head != Head::START).then_some(Summary { head, known_since, bytes })
    }

    fn close(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}

/// The rows that a save inserts.
struct Plan<'d> {
    receipts: Vec<(Head, &'d Draft)>,
    keys: Vec<(KeyDigest, u64)>,
    /// The head after them.
    head: Head,
    saved: Vec<Saved>,
}

impl<'d> Plan<'d> {
    /// Appends the drafts to the chain after `head`, except those whose keys are known.
    fn new(head: Head, drafts: &[&'d Draft], mut known: HashMap<KeyDigest, Receipt>) -> Self {
        let mut plan = Self { receipts: Vec::new(), keys: Vec::new(), head, saved: Vec::new() };
        for &draft in drafts {
            if let Some(receipt) = draft.key.and_then(|key| known.remove(&key)) {
                plan.saved.push(Saved::Known(Box::new(receipt)));
                continue;
            }
            plan.head = Link::of(draft).append(plan.head);
            plan.receipts.push((plan.head, draft));
            plan.keys.extend(draft.key.map(|key| (key, plan.head.seq)));
            plan.saved.push(Saved::New);
        }
        plan
    }
}
