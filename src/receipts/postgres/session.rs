//! A connection to the database, opened when it is needed, and work on it in bounded time. Knows nothing of
//! tables.

use std::time::{Duration, Instant};

use tokio::join;
use tokio::runtime::Handle;
use tokio::time::{error::Elapsed, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::super::file::OpenError;
use crate::config::StoreConfig;
use crate::remote::postgres::{self, Connector};

/// The part of the settings that tells how to reach the database.
const SECTION: &str = "receipts";

/// The time limit for work. A healthy database takes milliseconds, or some hundreds if its standby is far away. A
/// request with a key waits as long for a database that does not respond.
const LIMIT: Duration = Duration::from_secs(5);

/// The time limit for connecting to a host. If two hosts don't respond, the third one is still reached in time.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Begins a transaction in which each statement sees all commits before it, also those that it waited for. Its
/// commit waits until it is on the disk, and on the synchronous standby if there is one. The server ends the
/// transaction of a client that is cut off, and a wait for its locks, before [`LIMIT`] has passed.
pub(super) const BEGIN: &str = "
    BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
    SET LOCAL synchronous_commit = on;
    SET LOCAL statement_timeout = '4s';
    SET LOCAL idle_in_transaction_session_timeout = '4s'";
pub(super) const COMMIT: &str = "COMMIT";

/// Why work failed. The connection is closed then, which ends an open transaction.
#[derive(Debug)]
pub(super) enum Failure {
    /// The error of the server or the connection.
    Database(Error),
    /// A row whose content is impossible.
    Damaged(&'static str),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

impl Failure {
    fn describe(&self) -> String {
        let error = match self {
            Self::Damaged(what) => return format!("{what} is damaged"),
            Self::Database(error) => error,
        };
        let problem = postgres::problem(SECTION, error);
        match error.code() {
            Some(code) if *code == SqlState::INSUFFICIENT_PRIVILEGE => format!(
                "{problem}: the user of receipts.store has to own the tables of the receipts, and to be allowed \
                 to create tables"
            ),
            _ => problem,
        }
    }
}

/// Runs statements as a transaction, all of which is sent at once. `statements` has to send all of its own when it is
/// first polled, as one statement or a `join!` of several does: the commit follows them.
pub(super) async fn transact<T>(
    client: &Client,
    statements: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let (begun, done, committed) =
        join!(biased; client.batch_execute(BEGIN), statements, client.batch_execute(COMMIT));
    begun?;
    let done = done?;
    committed?;
    Ok(done)
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Session {
    connector: Connector,
    /// The address, as in the settings.
    address: String,
    /// The position of the host that is used, or tried next.
    host: usize,
    client: Option<Client>,
    /// The problem of a database that can't be reached, and until when no work is tried.
    away: Option<(String, Instant)>,
    handle: Handle,
}

impl Session {
    /// Reads the password and the certificates.
    pub(super) fn new(config: &StoreConfig, handle: Handle) -> Result<Self, OpenError> {
        let address = config.address.to_string();
        let connector = Connector::open(config, SECTION)
            .map_err(|problem| OpenError::Database { address: address.clone(), problem })?;
        Ok(Self { connector, address, host: 0, client: None, away: None, handle })
    }

    /// Does `work`, which is told whether the connection is new, within [`LIMIT`]. Blocks the thread.
    pub(super) fn work<T>(
        &mut self,
        work: impl AsyncFnOnce(&Client, bool) -> Result<T, Failure>,
    ) -> Result<T, String> {
        let began = Instant::now();
        if let Some((problem, until)) = &self.away
            && began < *until
        {
            return Err(problem.clone());
        }
        let handle = self.handle.clone();
        let done = handle.block_on(async { timeout(LIMIT, self.attempt(work)).await });
        let (problem, is_away) = match done {
            Ok(Ok(done)) => {
                self.away = None;
                return Ok(done);
            }
            Ok(Err(Trouble::Unreachable(problem))) => (problem, true),
            Ok(Err(Trouble::Failed(failure))) => (failure.describe(), false),
            Err(Elapsed { .. }) => (format!("no answer within {} s", LIMIT.as_secs()), true),
        };
        self.client = None;
        self.host = (self.host + 1) % self.connector.endpoints().len();
        let problem = format!("the database {}: {problem}", self.address);
        // A database that does not respond takes half of the time at most. Requests fail at once in the other half.
        self.away = is_away.then(|| (problem.clone(), Instant::now() + began.elapsed()));
        Err(problem)
    }

    async fn attempt<T>(
        &mut self,
        work: impl AsyncFnOnce(&Client, bool) -> Result<T, Failure>,
    ) -> Result<T, Trouble> {
        let kept = self.client.take().filter(|client| !client.is_closed());
        let is_new = kept.is_none();
        let client = match kept {
            Some(client) => client,
            None => self.connect().await.map_err(Trouble::Unreachable)?,
        };
        let done = work(&client, is_new).await.map_err(Trouble::Failed)?;
        self.client = Some(client);
        Ok(done)
    }

    /// Connects to the first host that responds and can be written to.
    async fn connect(&mut self) -> Result<Client, String> {
        let mut problems = Vec::new();
        for _ in self.connector.endpoints() {
            let endpoint = &self.connector.endpoints()[self.host];
            let problem = match timeout(CONNECT_LIMIT, self.connector.connect(endpoint)).await {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(problem)) => problem,
                Err(Elapsed { .. }) => format!("no answer within {} s", CONNECT_LIMIT.as_secs()),
            };
            problems.push(format!("{endpoint}: {problem}"));
            self.host = (self.host + 1) % self.connector.endpoints().len();
        }
        Err(problems.join("; "))
    }
}

enum Trouble {
    /// No host can be connected to.
    Unreachable(String),
    Failed(Failure),
}
