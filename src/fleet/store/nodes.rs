//! Sends a request to one of several nodes, in bounded time, and to the next one if it does not respond.
//! Knows nothing of any engine.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::FleetStoreError;
use crate::config::StoreConfig;

/// The time limit for one node. A node that is cut off from the others accepts connections and never
/// responds. A healthy node responds within milliseconds, or a few hundred from another part of the world.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The time limit for all nodes. If two nodes are cut off, the third one responds in time, also if the store
/// takes a second or two to elect a leader. The leased numbers last for longer than this limit.
const LIMIT: Duration = Duration::from_secs(5);

/// Connects to one node of an engine.
pub(super) trait Connect {
    /// A connection. Its clones share it.
    type Connection: Clone + Send;

    /// Connects, and checks that the user has access.
    fn connect(
        &self,
        endpoint: &str,
    ) -> impl Future<Output = Result<Self::Connection, String>> + Send;

    /// Returns whether a connection is known to be broken. A connection may be broken without being known to
    /// be.
    fn is_broken(connection: &Self::Connection) -> bool;
}

/// The reaction to a node that does not respond, although it may have received the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// Send the request to another node: repeating it does no harm.
    AskAgain,
    /// Return the error: the caller finds out whether the change was made.
    GiveUp,
}

/// The nodes of a store, with a connection to at most one of them.
pub(super) struct Nodes<E: Connect> {
    engine: E,
    pub(super) address: String,
    endpoints: Vec<String>,
    current: Mutex<Current<E::Connection>>,
}

struct Current<C> {
    /// The position of the endpoint.
    index: usize,
    connection: Option<C>,
}

impl<E: Connect> Nodes<E> {
    pub(super) fn new(engine: E, config: &StoreConfig, endpoints: &[String]) -> Self {
        Self {
            engine,
            address: config.address.to_string(),
            endpoints: endpoints.to_owned(),
            current: Mutex::new(Current { index: 0, connection: None }),
        }
    }

    /// Sends a request to a node, and to others if it does not respond.
    pub(super) async fn ask<T, F>(
        &self,
        unanswered: Unanswered,
        question: impl Fn(E::Connection) -> F,
    ) -> Result<T, FleetStoreError>
    where
        F: Future<Output = Result<T, String>>,
    {
        let deadline = Instant::now() + LIMIT;
        let mut problems = BTreeMap::<String, Vec<&str>>::new();
        // One try more than there are nodes, because the kept connection may have broken long ago.
        for _ in 0..=self.endpoints.len() {
            let until = deadline.min(Instant::now() + ATTEMPT);
            let (index, connected) = match self.kept() {
                (index, Some(connection)) => (index, Ok(connection)),
                (index, None) => {
                    let connecting = self.engine.connect(&self.endpoints[index]);
                    (index, timeout_at(until, connecting).await.unwrap_or_else(|_| silence()))
                }
            };
            let (asked, answer) = match connected {
                Ok(connection) => {
                    self.keep(index, &connection);
                    let answer = timeout_at(until, question(connection)).await;
                    (true, answer.unwrap_or_else(|_| silence()))
                }
                Err(problem) => (false, Err(problem)),
            };
            let problem = match answer {
                Ok(answer) => return Ok(answer),
                Err(problem) => problem,
            };
            self.leave(index);
            let endpoints = problems.entry(problem).or_default();
            let endpoint = self.endpoints[index].as_str();
            if !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
            if (asked && unanswered == Unanswered::GiveUp) || Instant::now() >= deadline {
                break;
            }
        }
        let problems = problems
            .into_iter()
            .map(|(problem, endpoints)| format!("{}: {problem}", endpoints.join(", ")))
            .collect::<Vec<_>>();
        Err(FleetStoreError { address: self.address.clone(), problem: problems.join("; ") })
    }

    fn kept(&self) -> (usize, Option<E::Connection>) {
        let mut current = self.current();
        if current.connection.as_ref().is_some_and(E::is_broken) {
            current.connection = None;
        }
        (current.index, current.connection.clone())
    }

    fn keep(&self, index: usize, connection: &E::Connection) {
        let mut current = self.current();
        if current.index == index && current.connection.is_none() {
            current.connection = Some(connection.clone());
        }
    }

    /// Switches to the next node, unless another request has done so already.
    fn leave(&self, index: usize) {
        let mut current = self.current();
        if current.index == index {
            current.index = (index + 1) % self.endpoints.len();
            current.connection = None;
        }
    }

    fn current(&self) -> MutexGuard<'_, Current<E::Connection>> {
        self.current.lock().expect("nothing panics while it holds this")
    }
}

/// Omits the engine, which contains passwords.
impl<E: Connect> fmt::Debug for Nodes<E> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Nodes").field("address", &self.address).finish_non_exhaustive()
    }
}

fn silence<T>() -> Result<T, String> {
    Err(format!("no answer within {} s", ATTEMPT.as_secs()))
}

/// Returns the error for settings that can't be used.
pub(super) fn unusable(config: &StoreConfig, problem: impl Into<String>) -> FleetStoreError {
    FleetStoreError { address: config.address.to_string(), problem: problem.into() }
}
