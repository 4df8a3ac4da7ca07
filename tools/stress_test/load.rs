//! The load: clients that make one request after the other. Reads no body.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::args::Args;
use crate::client::{Client, Failure, Response};

/// How long requests under way may take after Ctrl-C.
const GRACE: Duration = Duration::from_secs(1);
/// The longest `Retry-After` that a client waits for: one that sleeps for longer is no load.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(60);

/// One attempt of a request.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// From 1, in the order of their first attempts.
    pub(crate) request: u64,
    /// From 1.
    pub(crate) number: u32,
    pub(crate) pool: &'static str,
    /// From the start of the run.
    pub(crate) ended_after: Duration,
    pub(crate) result: Result<Response, Failure>,
    /// Whether the request will be repeated.
    pub(crate) is_retried: bool,
}

/// How the load ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) elapsed: Duration,
    pub(crate) clients: u64,
    /// Requests that were begun.
    pub(crate) begun: u64,
    /// Whether Ctrl-C ended it.
    pub(crate) is_early: bool,
}

/// Loads the server until the requests or the time are used up, or `interrupt` is notified. Sends every
/// attempt to the judge.
pub(crate) async fn run(
    args: &'static Args,
    first: Client,
    attempts: mpsc::Sender<Attempt>,
    interrupt: &Notify,
) -> End {
    let load = Arc::new(Load::new(args));
    let clients = load.request_limit.min(args.concurrency.into());
    let mut running = JoinSet::new();
    running.spawn(Arc::clone(&load).make_requests(first, attempts.clone()));
    for _ in 1..clients {
        running.spawn(Arc::clone(&load).make_requests(Client::new(args), attempts.clone()));
    }
    let is_early = tokio::select! {
        () = join(&mut running) => false,
        () = interrupt.notified() => {
            load.is_closed.store(true, Ordering::Relaxed);
            // Those that hang are ended below.
            let _ = timeout(GRACE, join(&mut running)).await;
            true
        }
    };
    running.shutdown().await;
    // Each client has also tried to begin one request beyond the limit.
    let begun = load.begun.load(Ordering::Relaxed).min(load.request_limit);
    End { elapsed: load.started.elapsed(), clients, begun, is_early }
}

async fn join(clients: &mut JoinSet<()>) {
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client does not panic");
    }
}

/// The state that the clients share.
struct Load {
    args: &'static Args,
    started: Instant,
    deadline: Option<Instant>,
    request_limit: u64,
    begun: AtomicU64,
    is_closed: AtomicBool,
}

impl Load {
    fn new(args: &'static Args) -> Self {
        let started = Instant::now();
        Self {
            args,
            started,
            deadline: args.duration.map(|duration| started + duration),
            request_limit: if args.duration.is_some() { u64::MAX } else { args.requests },
            begun: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
        }
    }

    async fn make_requests(self: Arc<Self>, mut client: Client, attempts: mpsc::Sender<Attempt>) {
        while let Some(request) = self.begin() {
            let pool = self.args.pick_pool();
            for number in 1.. {
                // Reserved before the request: a client that Ctrl-C ends loses no number that came.
                let Ok(place) = attempts.reserve().await else { return };
                let result = client.get(pool).await;
                let ended_after = self.started.elapsed();
                let wait = self.wait_before_retry(&result, number);
                let is_retried = wait.is_some();
                place.send(Attempt { request, number, pool, ended_after, result, is_retried });
                match wait {
                    Some(wait) => sleep(wait).await,
                    None => break,
                }
            }
        }
    }

    /// Returns the number of the next request, unless the run is over.
    fn begin(&self) -> Option<u64> {
        if !self.is_open_after(Duration::ZERO) {
            return None;
        }
        let request = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        (request <= self.request_limit).then_some(request)
    }

    fn wait_before_retry(
        &self,
        result: &Result<Response, Failure>,
        attempt: u32,
    ) -> Option<Duration> {
        let Ok(Response { status: 429 | 503, retry_after: Some(wait), .. }) = result else {
            return None;
        };
        let is_repeated =
            attempt <= self.args.retry && *wait <= RETRY_AFTER_LIMIT && self.is_open_after(*wait);
        is_repeated.then_some(*wait)
    }

    /// Returns whether requests are still made after this wait.
    fn is_open_after(&self, wait: Duration) -> bool {
        let is_in_time = self.deadline.is_none_or(|deadline| Instant::now() + wait < deadline);
        is_in_time && !self.is_closed.load(Ordering::Relaxed)
    }
}
