//! Accepts connections up to a limit, and ends them when the server stops. Knows nothing of HTTP.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use super::connection::{self, ClientTimer, Context};
use super::lanes::Lanes;
use super::tls::Tls;
use crate::http::LiveRoutes;

/// How long to wait for a connection to end if no more can be accepted.
const FULL_RETRY: Duration = Duration::from_millis(10);

/// Checks for overdue clients within one timeout. An overdue connection is cut at most 5 % late, a check
/// costs 10 ns per connection, and no request pays for a timer.
const LOOKS_PER_TIMEOUT: u32 = 20;

/// Connections examined to find one that has been idle for long. If most connections are idle, these almost
/// always include one.
const LOOKS: usize = 32;

/// Accepts connections, within limits that all of them share.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) routes: Arc<LiveRoutes>,
    pub(super) tls: Option<Arc<Tls>>,
    /// The most connections at once, which a reload changes.
    pub(super) connections_max: Arc<AtomicUsize>,
    pub(super) client_timeout: Duration,
    pub(super) drain: Duration,
}

impl Acceptor {
    /// Accepts and serves connections until `shutdown` completes, then waits for the requests in flight.
    pub(super) async fn run(
        self,
        listener: TcpListener,
        lanes: &Lanes,
        shutdown: impl Future<Output = ()>,
    ) {
        let mut connections = Connections::default();
        let (stop, stopped) = watch::channel(false);
        let mut shutdown = std::pin::pin!(shutdown);
        let mut look = tokio::time::interval(self.client_timeout / LOOKS_PER_TIMEOUT);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        // All connections may stay busy for any length of time.
                        tokio::select! {
                            () = connections.make_room(&self.connections_max) => {}
                            () = &mut shutdown => break,
                        }
                        let (lane, counts) = lanes.next();
                        let timer = Arc::new(ClientTimer::new());
                        let context = Context {
                            routes: Arc::clone(&self.routes),
                            peer: peer.ip(),
                            timer: Arc::clone(&timer),
                            counts: counts.open_connection(),
                        };
                        let serving = self.serve(stream, context, stopped.clone());
                        connections.spawn(serving, lane, timer);
                    }
                    // Most likely the process has no file descriptor left.
                    Err(error) => {
                        warn!(%error, "a connection could not be accepted");
                        connections.cut_one();
                        tokio::time::sleep(FULL_RETRY).await;
                    }
                },
                Some(()) = connections.ended() => {}
                _ = look.tick() => connections.cut_overdue(self.client_timeout),
                () = &mut shutdown => break,
            }
        }
        drop(listener);
        stop.send_replace(true);
        connections.drain(self.drain).await;
    }

    fn serve(
        &self,
        stream: TcpStream,
        context: Context,
        stop: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + use<> {
        let tls = self.tls.as_ref().map(|tls| tls.acceptor());
        let moved = stream.into_std();
        async move {
            // Registers the socket with the lane's runtime, which then wakes the task.
            match moved.and_then(TcpStream::from_std) {
                Ok(stream) => connection::serve(stream, tls, context, stop).await,
                Err(error) => warn!(%error, "a connection could not be handed to its thread"),
            }
        }
    }
}

/// The open connections.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    /// The connections in the order in which they are examined when one has to be cut.
    queue: VecDeque<Entry>,
}

struct Entry {
    timer: Arc<ClientTimer>,
    task: AbortHandle,
}

impl Connections {
    fn spawn(
        &mut self,
        serving: impl Future<Output = ()> + Send + 'static,
        lane: &Handle,
        timer: Arc<ClientTimer>,
    ) {
        let task = self.tasks.spawn_on(serving, lane);
        self.queue.push_back(Entry { timer, task });
        // Removes ended connections occasionally, so that the cost per connection is constant.
        if self.queue.len() > 2 * self.tasks.len() + LOOKS {
            self.queue.retain(|entry| !entry.task.is_finished());
        }
    }

    /// Cuts connections if necessary, and waits until there are fewer than `connections_max`.
    async fn make_room(&mut self, connections_max: &AtomicUsize) {
        while self.tasks.len() >= connections_max.load(Ordering::Relaxed) {
            self.cut_one();
            // If all of them wait for the server, none was cut: try again soon.
            let _ = tokio::time::timeout(FULL_RETRY, self.ended()).await;
        }
    }

    /// Waits until a connection has ended. Returns `None` at once if there is none.
    async fn ended(&mut self) -> Option<()> {
        self.tasks.join_next().await.map(drop)
    }

    /// Cuts the connections whose clients have kept the server waiting for `client_timeout`.
    fn cut_overdue(&mut self, client_timeout: Duration) {
        self.queue.retain(|entry| {
            let overdue = entry.timer.waited().is_some_and(|waited| waited >= client_timeout);
            if overdue && !entry.task.is_finished() {
                debug!("a connection is cut: its client took too long");
                entry.task.abort();
            }
            !overdue && !entry.task.is_finished()
        });
    }

    /// Cuts the connection that has kept the server waiting for longest among the first few of the queue, or
    /// none if all of these wait for the server. The others go to the end of the queue.
    fn cut_one(&mut self) {
        let mut first: Vec<_> = self.queue.drain(..LOOKS.min(self.queue.len())).collect();
        first.retain(|entry| !entry.task.is_finished());
        let waited =
            first.iter().enumerate().filter_map(|(i, entry)| Some((entry.timer.waited()?, i)));
        if let Some((waited, longest)) = waited.max() {
            debug!(waited_ms = waited.as_millis(), "a connection is cut: there can be no more");
            first.swap_remove(longest).task.abort();
        }
        self.queue.extend(first);
    }

    /// Waits until all connections have ended, and cuts the rest after `limit`.
    async fn drain(&mut self, limit: Duration) {
        let started = Instant::now();
        info!(connections = self.tasks.len(), "stopping: requests in flight are finished first");
        let all_ended = async { while self.ended().await.is_some() {} };
        if tokio::time::timeout(limit, all_ended).await.is_err() {
            warn!(
                after_ms = started.elapsed().as_millis(),
                connections = self.tasks.len(),
                "some connections are cut because they did not end in time"
            );
        }
        self.tasks.shutdown().await;
    }
}
