//! Who asks what, and when: so many connections, each asking again as soon as it is answered.
//! Looks into no body; what an answer is worth is the judge's to say.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use http_body_util::Empty;
use hyper::header::{AUTHORIZATION, HOST, HeaderValue};
use hyper::http::Uri;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::args::{Args, PoolIndex, Pools};
use crate::client::{AskError, Connection, Failure, Question, Reply};
use crate::interrupts::Interrupts;

/// Asks that go to the judge together: waking it for each would cost more than judging it.
pub(crate) const BATCH_ASKS: usize = 128;
/// Bodies that go to the judge together at most, but for the last one.
pub(crate) const BATCH_BODY_BYTES: usize = 256 << 10;
/// Longest that an outcome waits for its batch to fill: to the eye, it is printed as it comes.
const BATCH_WAIT: Duration = Duration::from_millis(20);
/// How long answers under way may take after Ctrl-C.
const GRACE: Duration = Duration::from_secs(1);
/// Between two tries to connect, so that a server that is down is not hammered.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// The longest `Retry-After` that is waited for: a worker asleep for longer loads nothing.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(60);
/// Room in a body for a number and what stands around it; the longest is 17 characters.
const NUMBER_LIMIT_BYTES: usize = 32;
/// Room in a body for everything but numbers: shard names, an error page.
const HEAD_LIMIT_BYTES: usize = 64 << 10;

/// One request as it was made once; a repetition is an ask of its own.
#[derive(Debug)]
pub(crate) struct Ask {
    /// From 1, in the order of beginning.
    pub(crate) request: u64,
    /// From 1.
    pub(crate) attempt: u32,
    pub(crate) pool: PoolIndex,
    /// When its outcome was known, from the start of the run.
    pub(crate) ended_after: Duration,
    pub(crate) outcome: Result<Reply, Failure>,
    /// Set when the request will be repeated.
    pub(crate) again_after: Option<Duration>,
    /// Where its body lies in the batch.
    pub(crate) body: Range<usize>,
}

/// Asks with their bodies.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) asks: Vec<Ask>,
    pub(crate) bodies: Vec<u8>,
}

/// How the load ended.
#[derive(Debug)]
pub(crate) struct LoadEnd {
    pub(crate) elapsed: Duration,
    /// How long of it the load waited for the judge, and so asked less than it could.
    pub(crate) held_up: Duration,
    pub(crate) connections: u64,
    /// Begun, and still without a final outcome when Ctrl-C's grace was over.
    pub(crate) unfinished: u64,
    pub(crate) interrupted: bool,
}

/// Loads the server until the requests or the time are used up, or an interrupt comes. Every ask
/// that ended goes into `batches`, whose other end is told of the end by its closing.
pub(crate) async fn run(
    args: &Args,
    address: SocketAddr,
    first: Connection,
    batches: mpsc::Sender<Batch>,
    interrupts: &mut Interrupts,
) -> LoadEnd {
    let load = Rc::new(Load::new(args, address, batches));
    LocalSet::new().run_until(load.run(first, args.concurrency, interrupts)).await
}

/// What the workers share. All of them live on one thread, so none of it is locked.
struct Load {
    address: SocketAddr,
    host: HeaderValue,
    authorization: Option<HeaderValue>,
    /// What to ask, by pool.
    questions: Vec<Uri>,
    pools: Pools,
    timeout: Duration,
    retries: u32,
    body_limit_bytes: usize,
    tickets: Tickets,
    outbox: Outbox,
}

impl Load {
    fn new(args: &Args, address: SocketAddr, batches: mpsc::Sender<Batch>) -> Self {
        let question = |name: &String| args.url.question(name, args.count);
        let numbers = args.count.map_or(1, |count| count as usize);
        Self {
            address,
            host: args.url.authority().clone(),
            authorization: args.authorization.clone(),
            questions: args.pools.names().iter().map(question).collect(),
            pools: args.pools.clone(),
            timeout: args.timeout,
            retries: args.retry,
            body_limit_bytes: HEAD_LIMIT_BYTES + numbers * NUMBER_LIMIT_BYTES,
            tickets: Tickets::new(args),
            outbox: Outbox::new(batches),
        }
    }

    async fn run(
        self: Rc<Self>,
        first: Connection,
        concurrency: u32,
        interrupts: &mut Interrupts,
    ) -> LoadEnd {
        let mut workers = JoinSet::new();
        let mut connection = Some(first);
        let connections = self.tickets.left().min(u64::from(concurrency));
        for _ in 0..connections {
            workers.spawn_local(Rc::clone(&self).work(connection.take()));
        }
        let mut batch_due = interval(BATCH_WAIT);
        batch_due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut interrupted_at = None;
        loop {
            tokio::select! {
                ended = workers.join_next() => match ended {
                    Some(Ok(())) => {}
                    Some(Err(died)) => std::panic::resume_unwind(died.into_panic()),
                    None => break,
                },
                () = interrupts.recv() => {
                    self.tickets.close();
                    interrupted_at = Some(Instant::now());
                }
                _ = batch_due.tick() => {
                    self.outbox.try_flush();
                    if interrupted_at.is_some_and(|at| at.elapsed() >= GRACE) {
                        break;
                    }
                }
            }
        }
        workers.shutdown().await;
        let end = LoadEnd {
            elapsed: self.tickets.started.elapsed(),
            held_up: self.outbox.held_up.get(),
            connections,
            unfinished: self.tickets.unfinished(),
            interrupted: interrupted_at.is_some(),
        };
        interrupts.meanwhile(self.outbox.flush()).await;
        end
    }

    /// One connection's life: asks until there is nothing left to ask.
    async fn work(self: Rc<Self>, mut connection: Option<Connection>) {
        let mut body = Vec::new();
        while let Some(request) = self.tickets.take() {
            let pool = self.pools.draw();
            for attempt in 1.. {
                let outcome = self.ask(&mut connection, pool, &mut body).await;
                let again_after = self.again_after(&outcome, attempt);
                if again_after.is_none() {
                    self.tickets.give_back();
                }
                let unreachable = matches!(outcome, Err(Failure::NoConnection(_)));
                let ended_after = self.tickets.started.elapsed();
                let ask =
                    Ask { request, attempt, pool, ended_after, outcome, again_after, body: 0..0 };
                self.outbox.put(ask, &body).await;
                if unreachable {
                    sleep(CONNECT_PAUSE).await;
                }
                match again_after {
                    Some(wait) => sleep(wait).await,
                    None => break,
                }
            }
        }
    }

    async fn ask(
        &self,
        connection: &mut Option<Connection>,
        pool: PoolIndex,
        body: &mut Vec<u8>,
    ) -> Result<Reply, Failure> {
        body.clear();
        let outcome = timeout(self.timeout, self.ask_on(connection, pool, body))
            .await
            .unwrap_or(Err(Failure::TimedOut(self.timeout)));
        if outcome.is_err() {
            // At once: its answer may still come, and belongs to no request of ours.
            *connection = None;
        }
        outcome
    }

    async fn ask_on(
        &self,
        connection: &mut Option<Connection>,
        pool: PoolIndex,
        body: &mut Vec<u8>,
    ) -> Result<Reply, Failure> {
        if let Some(open) = connection {
            match open.ask(self.question(pool), body, self.body_limit_bytes).await {
                Ok(reply) => return Ok(reply),
                Err(AskError::Failed(failure)) => return Err(failure),
                // A server may close a connection between two requests: that fails nothing.
                Err(AskError::NeverSent) => {}
            }
        }
        let fresh = connection.insert(Connection::open(self.address).await?);
        match fresh.ask(self.question(pool), body, self.body_limit_bytes).await {
            Ok(reply) => Ok(reply),
            Err(AskError::Failed(failure)) => Err(failure),
            Err(AskError::NeverSent) => {
                Err(Failure::Broken("closed before anything could be asked".to_owned()))
            }
        }
    }

    fn question(&self, pool: PoolIndex) -> Question {
        let mut question = Question::new(Empty::new());
        *question.uri_mut() = self.questions[usize::from(pool.0)].clone();
        let headers = question.headers_mut();
        headers.insert(HOST, self.host.clone());
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        question
    }

    /// How long to wait before the same request once more, if it is to be repeated at all.
    fn again_after(&self, outcome: &Result<Reply, Failure>, attempt: u32) -> Option<Duration> {
        let Ok(Reply { status: 429 | 503, retry_after: Some(wait), .. }) = outcome else {
            return None;
        };
        let repeat =
            attempt <= self.retries && *wait <= RETRY_AFTER_LIMIT && self.tickets.open_after(*wait);
        repeat.then_some(*wait)
    }
}

/// Who may begin a request, and until when.
struct Tickets {
    started: Instant,
    deadline: Option<Instant>,
    limit: u64,
    taken: Cell<u64>,
    given_back: Cell<u64>,
    closed: Cell<bool>,
}

impl Tickets {
    fn new(args: &Args) -> Self {
        let started = Instant::now();
        Self {
            started,
            deadline: args.duration.map(|duration| started + duration),
            limit: if args.duration.is_some() { u64::MAX } else { args.requests },
            taken: Cell::new(0),
            given_back: Cell::new(0),
            closed: Cell::new(false),
        }
    }

    /// The next request's id, if there is to be one.
    fn take(&self) -> Option<u64> {
        if self.left() == 0 || !self.open_after(Duration::ZERO) {
            return None;
        }
        self.taken.set(self.taken.get() + 1);
        Some(self.taken.get())
    }

    fn left(&self) -> u64 {
        self.limit - self.taken.get()
    }

    /// Whether asking is still allowed so much later, as far as one can tell.
    fn open_after(&self, wait: Duration) -> bool {
        let in_time = self.deadline.is_none_or(|deadline| Instant::now() + wait < deadline);
        in_time && !self.closed.get()
    }

    fn give_back(&self) {
        self.given_back.set(self.given_back.get() + 1);
    }

    fn unfinished(&self) -> u64 {
        self.taken.get() - self.given_back.get()
    }

    fn close(&self) {
        self.closed.set(true);
    }
}

/// Collects asks into batches.
struct Outbox {
    batch: RefCell<Batch>,
    batches: mpsc::Sender<Batch>,
    /// Workers that wait for the judge, and since when there are any.
    waiting: Cell<u32>,
    waiting_since: Cell<Instant>,
    held_up: Cell<Duration>,
}

impl Outbox {
    fn new(batches: mpsc::Sender<Batch>) -> Self {
        Self {
            batch: RefCell::default(),
            batches,
            waiting: Cell::new(0),
            waiting_since: Cell::new(Instant::now()),
            held_up: Cell::default(),
        }
    }

    /// Waits when the judge is behind.
    async fn put(&self, mut ask: Ask, body: &[u8]) {
        let full = {
            let mut batch = self.batch.borrow_mut();
            let begin = batch.bodies.len();
            batch.bodies.extend_from_slice(body);
            ask.body = begin..batch.bodies.len();
            batch.asks.push(ask);
            batch.asks.len() >= BATCH_ASKS || batch.bodies.len() >= BATCH_BODY_BYTES
        };
        if full {
            self.flush().await;
        }
    }

    async fn flush(&self) {
        self.try_flush();
        if self.batch.borrow().asks.is_empty() {
            return;
        }
        if self.waiting.replace(self.waiting.get() + 1) == 0 {
            self.waiting_since.set(Instant::now());
        }
        // The batch stays here until there is room, so that a worker that is stopped while it waits
        // loses nothing. The judge hangs up only by dying; whoever joins it reports that.
        if let Ok(place) = self.batches.reserve().await {
            place.send(self.batch.take());
        }
        self.waiting.set(self.waiting.get() - 1);
        if self.waiting.get() == 0 {
            self.held_up.set(self.held_up.get() + self.waiting_since.get().elapsed());
        }
    }

    /// Leaves everything where it is when the judge is behind.
    fn try_flush(&self) {
        if !self.batch.borrow().asks.is_empty()
            && let Ok(place) = self.batches.try_reserve()
        {
            place.send(self.batch.take());
        }
    }
}
