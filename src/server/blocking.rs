//! Rung 1: synchronous, and one thread that answers one request after the other. Has no async runtime
//! and knows no signals.
//!
//! The HTTP crate below reads each connection on a thread of its own; nothing else happens there.
//! What it read waits in one line for the thread that draws, saves and answers.
//!
//! What that crate does not offer: its time-out is for each read and write, so that a client who
//! sends or reads a byte at a time keeps its connection; at the limit newcomers wait; bodies have no
//! limit (none is kept); and of requests in a pipeline only the first is answered.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;
use std::time::Duration;

use axum::http::{Method, Uri};
use oxhttp::model::{Body, Request, Response};
use tracing::{info, warn};

use super::{ServerError, check_door};
use crate::config::{Config, ServerConfig};
use crate::folder::Folder;
use crate::http::{Account, Answer, Guard, Routes, Step, stopping};
use crate::rungs::{JsonStore, Numbers};

/// The most connections at once, each with a thread: half of the file descriptors that a process
/// usually has.
const CONNECTIONS_MAX: usize = 512;

/// A server that listens and has opened its store.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    drain: Duration,
    line: Receiver<Event>,
    stop: Sender<Event>,
    routes: Routes,
    numbers: Numbers<JsonStore>,
    /// Held until the store is closed.
    folder: Folder,
}

/// What happens to the thread that answers.
#[derive(Debug)]
enum Event {
    Asked(Question),
    Stop,
}

/// A request that was read, and where its answer goes.
#[derive(Debug)]
struct Question {
    method: Method,
    uri: Uri,
    account: Option<Account>,
    answer: SyncSender<Answer>,
}

impl Server {
    /// Opens the store and listens. Requests are answered by [`run`](Self::run).
    ///
    /// # Errors
    /// [`ServerError`], with what to do about it.
    pub fn start(config: &Config) -> Result<Self, ServerError> {
        check_door(config)?;
        let guard = Guard::new(&config.auth, config.quota.as_ref());
        let (stop, line) = mpsc::channel();
        let address = listen(&config.server, guard, stop.clone())
            .map_err(|source| ServerError::Listen { address: config.server.listen, source })?;
        let (folder, numbers) = Numbers::open(config)?;
        let routes = Routes::new(config.pools.clone());
        let drain = config.server.drain;
        Ok(Self { address, drain, line, stop, routes, numbers, folder })
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends [`run`](Self::run), from any thread.
    pub fn stopper(&self) -> impl FnOnce() + Send + 'static {
        let stop = self.stop.clone();
        // Fails only when nobody runs any more.
        move || stop.send(Event::Stop).unwrap_or(())
    }

    /// Serves until it is stopped; then answers what is in flight, and closes.
    pub fn run(self) {
        let Self { drain, line, routes, mut numbers, folder, .. } = self;
        // Each answer holds a sender until it is written: when all are gone, all are written.
        let (unwritten, all_written) = mpsc::channel();
        let mut answer = |Question { method, uri, account, answer }| {
            let (method, path, query) = (method.as_str(), uri.path(), uri.query());
            let health = numbers.health();
            let mut made = match routes.step(method, path, query, account.as_ref(), &health) {
                Step::Draw(pool) => routes.number(pool, numbers.draw(pool)),
                Step::Done(made) => made,
            };
            made.extensions_mut().insert::<Sender<()>>(unwritten.clone());
            answer.send(made).unwrap_or(());
        };
        while let Ok(Event::Asked(question)) = line.recv() {
            answer(question);
        }
        // What has come by now and no more, so that clients who go on asking don't hold up the end.
        let in_flight: Vec<_> = line.try_iter().collect();
        drop(line);
        info!(requests = in_flight.len(), "stopping: what is in flight is answered first");
        for event in in_flight {
            if let Event::Asked(question) = event {
                answer(question);
            }
        }
        drop(unwritten);
        if all_written.recv_timeout(drain) == Err(mpsc::RecvTimeoutError::Timeout) {
            warn!(
                after_ms = drain.as_millis(),
                "some connections are cut: they did not end in time"
            );
        }
        numbers.close();
        drop(folder);
        info!("stopped");
    }
}

/// Accepts from now on, and puts what it reads and the guard lets in into the line.
fn listen(
    config: &ServerConfig,
    guard: Option<Arc<Guard>>,
    line: Sender<Event>,
) -> std::io::Result<SocketAddr> {
    let read = move |request: &mut Request<Body>| {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let head = method == Method::HEAD;
        let admitted = guard
            .as_ref()
            .map_or(Ok(None), |guard| guard.admit(uri.path(), request.headers(), peer()));
        let answer = match admitted {
            Ok(account) => {
                let (answer, answered) = mpsc::sync_channel(1);
                let asked = line.send(Event::Asked(Question { method, uri, account, answer })).ok();
                asked.and_then(|()| answered.recv().ok()).unwrap_or_else(stopping)
            }
            Err(refusal) => refusal.into(),
        };
        response(answer, head)
    };
    // The crate does not tell which port it got for port 0.
    let address = match config.listen.port() {
        0 => TcpListener::bind(config.listen)?.local_addr()?,
        _ => config.listen,
    };
    oxhttp::Server::new(read)
        .bind(address)
        .with_global_timeout(config.client_timeout)
        .with_max_concurrent_connections(config.connections.min(CONNECTIONS_MAX))
        .spawn()?;
    Ok(address)
}

/// Who is at the other end: the crate tells it in the name of the connection's thread only, as in
/// `127.0.0.1:4711: responding thread of OxHTTP`. Should that change, all share one address.
fn peer() -> IpAddr {
    let thread = thread::current();
    let address = thread.name().and_then(|name| name.split_once(": "));
    let address = address.and_then(|(address, _)| address.parse::<SocketAddr>().ok());
    address.map_or(Ipv4Addr::UNSPECIFIED.into(), |address| address.ip())
}

/// The crate writes a body even to `HEAD`.
fn response(answer: Answer, head: bool) -> Response<Body> {
    answer.map(|body| if head { Body::empty() } else { Body::from(body) })
}
