//! Accepts connections, up to a limit, and ends them at a stop. Knows nothing of what is said on them.

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

/// How long to wait for a connection to end when there can be no more.
const FULL_RETRY: Duration = Duration::from_millis(10);

/// How often it is looked who is overdue: cut 5 % late at most, at 10 ns a connection, and no request
/// pays for a timer.
const LOOKS_PER_TIMEOUT: u32 = 20;

/// Connections looked at to find one that has been idle for long: enough that one of the many is among
/// them, whoever the few are.
const LOOKS: usize = 32;

/// What every connection is served with.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) front: Front,
    pub(super) tls: Option<Arc<Tls>>,
    /// The most connections at once.
    pub(super) connections: usize,
    pub(super) client_timeout: Duration,
    pub(super) drain: Duration,
}

/// Accepts and answers until `shutdown` completes, then waits for the answers in flight.
pub(super) async fn serve(
    listener: TcpListener,
    terms: Terms,
    mut lanes: Lanes,
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
                    while crowd.connections.len() >= terms.connections {
                        crowd.send_one_away();
                        // All may be busy with answers just now: then look again soon.
                        let _ = tokio::time::timeout(FULL_RETRY, crowd.ended()).await;
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
    info!(connections = crowd.connections.len(), "stopping: what is in flight is answered first");
    stop.send_replace(true);
    let all_ended = async { while crowd.ended().await.is_some() {} };
    if tokio::time::timeout(terms.drain, all_ended).await.is_err() {
        warn!(
            after_ms = started.elapsed().as_millis(),
            connections = crowd.connections.len(),
            "some connections are cut: they did not end in time"
        );
    }
    crowd.connections.shutdown().await;
}

/// The connections, in the order in which they are looked at when one has to go.
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
            // The socket becomes the lane's, which wakes the task when it is ready.
            match moved.and_then(TcpStream::from_std) {
                Ok(stream) => connection::serve(stream, acceptor, door, stop).await,
                Err(error) => warn!(%error, "a connection could not be handed to its thread"),
            }
        };
        let connection = self.connections.spawn_on(serving, lane);
        self.line.push_back(Place { turn, connection });
        // Those that ended are cleared away now and then: a constant cost for each connection.
        if self.line.len() > 2 * self.connections.len() + LOOKS {
            self.line.retain(|place| !place.connection.is_finished());
        }
    }

    /// Completes when a connection has ended, with nothing when there is none.
    async fn ended(&mut self) -> Option<()> {
        self.connections.join_next().await.map(drop)
    }

    /// Cuts the connections whose clients keep the server waiting for longer than they may.
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

    /// Cuts the connection that has kept the server waiting for longest, of the first few in the line;
    /// none when all of these wait for the server. The others go to the end of the line.
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
