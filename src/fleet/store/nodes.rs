//! One of several nodes is asked, in bounded time, and the next one when it does not answer. Knows no
//! engine.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::StoreError;
use crate::config::StoreConfig;

/// For one node. A node that is cut off from the others accepts connections and never answers; one that
/// is well answers within milliseconds, in another part of the world within a few hundred.
const ATTEMPT: Duration = Duration::from_secs(2);

/// In all. Two nodes may be cut off, and the third answers; a store that elects a leader just then takes
/// a second or two. Who asks has numbers to serve from for longer than that.
const LIMIT: Duration = Duration::from_secs(5);

/// How an engine is reached at one node.
pub(super) trait Connect {
    /// A connection; its clones are the same one.
    type Connection: Clone + Send;

    /// Connects, and finds out whether who asks is let in.
    fn connect(
        &self,
        endpoint: &str,
    ) -> impl Future<Output = Result<Self::Connection, String>> + Send;

    /// Whether it is known to be broken. One that is not may be.
    fn is_broken(connection: &Self::Connection) -> bool;
}

/// What may be done when a node did not answer, which may have heard all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// Ask another: twice is as good as once.
    AskAgain,
    /// Nothing: who asked finds out what became of it.
    GiveUp,
}

/// The nodes of a store, one of which is connected to, or about to be.
pub(super) struct Nodes<E: Connect> {
    engine: E,
    address: String,
    endpoints: Vec<String>,
    current: Mutex<Current<E::Connection>>,
}

struct Current<C> {
    /// Which endpoint.
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

    pub(super) fn address(&self) -> String {
        self.address.clone()
    }

    /// Asks a node, and others when it does not answer.
    pub(super) async fn ask<T, F>(
        &self,
        unanswered: Unanswered,
        question: impl Fn(E::Connection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, String>>,
    {
        let deadline = Instant::now() + LIMIT;
        let mut problems = BTreeMap::<String, Vec<&str>>::new();
        // Once more than there are nodes: the connection that was kept may have broken long ago.
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
        Err(StoreError { address: self.address.clone(), problem: problems.join("; ") })
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

    /// The next one is asked from now on, unless others have found so before.
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

/// Without the engine, which knows passwords.
impl<E: Connect> fmt::Debug for Nodes<E> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Nodes").field("address", &self.address).finish_non_exhaustive()
    }
}

fn silence<T>() -> Result<T, String> {
    Err(format!("no answer within {} s", ATTEMPT.as_secs()))
}

/// `HOST:PORT` as the host alone, which certificates are for, and the port.
pub(super) fn host_and_port(endpoint: &str) -> (&str, &str) {
    let (host, port) = endpoint.rsplit_once(':').expect("the settings add the port");
    (host.trim_start_matches('[').trim_end_matches(']'), port)
}

/// The password of the user, where one is set.
pub(super) fn password(config: &StoreConfig) -> Result<Option<String>, StoreError> {
    let Some(path) = &config.password_file else { return Ok(None) };
    let unfit = |problem: String| unusable(config, format!("{}: {problem}", path.display()));
    let text = std::fs::read_to_string(path)
        .map_err(|error| unfit(format!("the password can't be read: {error}")))?;
    match text.lines().next() {
        Some(password) if !password.is_empty() => Ok(Some(password.to_owned())),
        _ => Err(unfit("there is no password in its first line".to_owned())),
    }
}

/// The settings can't be used.
pub(super) fn unusable(config: &StoreConfig, problem: impl Into<String>) -> StoreError {
    StoreError { address: config.address.to_string(), problem: problem.into() }
}

/// What an error says with all that it stems from, and what to mend where that is known.
pub(super) fn describe(error: &(dyn Error + 'static)) -> String {
    let mut texts = Vec::<String>::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if texts.last().is_none_or(|last| !last.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    let mut text = texts.join(": ");
    const UNTRUSTED: &str = "fleet.tls.ca does not lead to its certificate";
    const UNENCRYPTED: &str = "it does not speak TLS there: leave out [fleet.tls], or mend it";
    let advice = [
        ("invalid peer certificate: UnknownIssuer", UNTRUSTED),
        // A root of the same name, but another one.
        ("invalid peer certificate: BadSignature", UNTRUSTED),
        ("invalid peer certificate", "its certificate is not for this host, or not for now"),
        ("received fatal alert", "it wants a certificate that it trusts: fleet.tls.cert and .key"),
        ("InvalidContentType", UNENCRYPTED),
        ("does not support TLS", UNENCRYPTED),
    ];
    if let Some((_, advice)) = advice.iter().find(|(sign, _)| text.contains(sign)) {
        text = format!("{text}: {advice}");
    }
    text
}
