//! Accepts connections up to a limit, and ends them when the server stops. Knows nothing of HTTP.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use super::connection::{self, Door, Turn};
use super::lanes::Lanes;
use super::tls::Tls;
use crate::http::Front;
use crate::traffic;

/// How long to wait for a connection to end if no more can be accepted.
const FULL_RETRY: Duration = Duration::from_millis(10);

/// Checks for overdue clients within one timeout. An overdue connection is cut at most 5 % late, a check
/// costs 10 ns per connection, and no request pays for a timer.
const LOOKS_PER_TIMEOUT: u32 = 20;

/// Connections examined to find one that has been idle for long. If most connections are idle, these almost
/// always include one.
const LOOKS: usize = 32;

/// The routes and limits that all connections share.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) front: Front,
    pub(super) tls: Option<Arc<Tls>>,
    /// The most connections at once.
    pub(super) connections: usize,
    pub(super) client_timeout: Duration,
    pub(super) drain: Duration,
}

/// Accepts and serves connections until `shutdown` completes, then waits for the requests in flight.
pub(super) async fn serve(
    listener: TcpListener,
    terms: Terms,
    lanes: &mut Lanes,
    shutdown: impl Future<Output = ()>,
) {
    let mut crowd = Crowd::default();
    let (stop, stopped) = watch::channel(false);
    let mut shutdown = std::pin::pin!(shutdown);
    let mut look = tokio::time::interval(terms.client_timeout / LOOKS_PER_TIMEOUT);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // All connections may stay busy for any length of time.
                    tokio::select! {
                        () = crowd.make_room(terms.connections) => {}
                        () = &mut shutdown => break,
                    }
                    crowd.admit(stream, peer.ip(), &terms, lanes.next(), stopped.clone());
                }
                // Most likely the process has no file descriptor left.
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    crowd.send_one_away();
                    tokio::time::sleep(FULL_RETRY).await;
                }
            },
            Some(()) = crowd.ended() => {}
            _ = look.tick() => crowd.cut_overdue(terms.client_timeout),
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    let started = Instant::now();
    info!(connections = crowd.connections.len(), "stopping: requests in flight are finished first");
    stop.send_replace(true);
    let all_ended = async { while crowd.ended().await.is_some() {} };
    if tokio::time::timeout(terms.drain, all_ended).await.is_err() {
        warn!(
            after_ms = started.elapsed().as_millis(),
            connections = crowd.connections.len(),
            "some connections are cut because they did not end in time"
        );
    }
    crowd.connections.shutdown().await;
}

/// The connections, in the order in which they are examined when one has to be cut.
#[derive(Default)]
struct Crowd {
    connections: JoinSet<()>,
    line: VecDeque<Place>,
}

struct Place {
    turn: Arc<Turn>,
    connection: AbortHandle,
}

impl Crowd {
    fn admit(
        &mut self,
        stream: TcpStream,
        peer: IpAddr,
        terms: &Terms,
        (lane, counts): (&Handle, &Arc<traffic::Lane>),
        stop: watch::Receiver<bool>,
    ) {
        let turn = Arc::new(Turn::new());
        let acceptor = terms.tls.as_ref().map(|tls| tls.acceptor());
        let counts = counts.open_connection();
        let door = Door { front: terms.front.clone(), peer, turn: Arc::clone(&turn), counts };
        let moved = stream.into_std();
        let serving = async move {
            // Registers the socket with the lane's runtime, which then wakes the task.
            match moved.and_then(TcpStream::from_std) {
                Ok(stream) => connection::serve(stream, acceptor, door, stop).await,
                Err(error) => warn!(%error, "a connection could not be handed to its thread"),
            }
        };
        let connection = self.connections.spawn_on(serving, lane);
        self.line.push_back(Place { turn, connection });
        // Removes ended connections occasionally, so that the cost per connection is constant.
        if self.line.len() > 2 * self.connections.len() + LOOKS {
            self.line.retain(|place| !place.connection.is_finished());
        }
    }

    /// Cuts connections if necessary, and waits until there are fewer than `connections`.
    async fn make_room(&mut self, connections: usize) {
        while self.connections.len() >= connections {
            self.send_one_away();
            // If all of them wait for the server, none was cut: try again soon.
            let _ = tokio::time::timeout(FULL_RETRY, self.ended()).await;
        }
    }

    /// Waits until a connection has ended. Returns `None` at once if there is none.
    async fn ended(&mut self) -> Option<()> {
        self.connections.join_next().await.map(drop)
    }

    /// Cuts the connections whose clients have kept the server waiting for `client_timeout`.
    fn cut_overdue(&mut self, client_timeout: Duration) {
        self.line.retain(|place| {
            let overdue = place.turn.waited().is_some_and(|waited| waited >= client_timeout);
            if overdue && !place.connection.is_finished() {
                debug!("a connection is cut: its client took too long");
                place.connection.abort();
            }
            !overdue && !place.connection.is_finished()
        });
    }

    /// Cuts the connection that has kept the server waiting for longest among the first few of the line, or
    /// none if all of these wait for the server. The others go to the end of the line.
    fn send_one_away(&mut self) {
        let mut first: Vec<_> = self.line.drain(..LOOKS.min(self.line.len())).collect();
        first.retain(|place| !place.connection.is_finished());
        let waited =
            first.iter().enumerate().filter_map(|(i, place)| Some((place.turn.waited()?, i)));
        if let Some((waited, longest)) = waited.max() {
            debug!(waited_ms = waited.as_millis(), "a connection is cut: there can be no more");
            first.swap_remove(longest).connection.abort();
        }
        self.line.extend(first);
    }
}
