//! The links between processes, each through a proxy that a test can cut and heal. Knows nothing of what they
//! carry, except who sends to a peer of etcd.
//!
//! Proxies are used because network namespaces need root, which a machine that tests a change need not give.
//! A proxy can't leave a connection unopened: a link that refuses closes it at once, and a silent one opens
//! it and sends nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The size of one read; any size works.
const PIECE_BYTES: usize = 1 << 16;
/// The limit of a request's head. The heads of etcd have less than a kilobyte.
const HEAD_BYTES_MAX: usize = 1 << 14;
/// The header with the id of the sending peer, in each etcd request that carries consensus messages.
const SENDER: &str = "x-server-from:";

/// The fault of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Connections are closed, including new ones.
    Refused,
    /// No bytes arrive in either direction until the link is healed.
    Silent,
    /// Requests arrive, but responses are lost.
    Mute,
}

/// The sender and the receiver.
type Link = (String, String);
type Cuts = BTreeMap<Link, Cut>;

/// All proxies of a test, which end with it.
pub(crate) struct Links {
    cuts: watch::Sender<Cuts>,
    proxies: JoinSet<()>,
}

impl Links {
    pub(crate) fn new() -> Self {
        Self { cuts: watch::Sender::default(), proxies: JoinSet::new() }
    }

    /// Opens a link to the socket. Its sender is `from`; if there is none, the sender names itself.
    pub(crate) async fn open(
        &mut self,
        from: Option<&str>,
        to: &str,
        socket: PathBuf,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (from, to, cuts) = (from.map(str::to_owned), to.to_owned(), self.cuts.subscribe());
        self.proxies.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                // Removes connections that have ended.
                while connections.try_join_next().is_some() {}
                let (stream, _) = listener.accept().await.unwrap();
                let (from, to) = (from.clone(), to.clone());
                connections.spawn(connect(stream, from, to, socket.clone(), cuts.clone()));
            }
        });
        address
    }

    pub(crate) fn cut(&self, from: &str, to: &str, cut: Cut) {
        let link = (from.to_owned(), to.to_owned());
        self.cuts.send_modify(|cuts| {
            cuts.insert(link, cut);
        });
    }

    pub(crate) fn heal(&self, from: &str, to: &str) {
        let link = (from.to_owned(), to.to_owned());
        self.cuts.send_modify(|cuts| {
            cuts.remove(&link);
        });
    }
}

async fn connect(
    mut stream: TcpStream,
    from: Option<String>,
    to: String,
    socket: PathBuf,
    cuts: watch::Receiver<Cuts>,
) {
    let mut head = Vec::new();
    let from = match from {
        Some(from) => from,
        None => sender(&mut stream, &mut head).await,
    };
    let gate = Gate { link: (from, to), cuts };
    let refused = gate.clone();
    // However this ends, both connections end with it, and the test does not fail.
    tokio::select! {
        _ = refused.wait_for(|cut| cut == Some(Cut::Refused)) => {}
        _ = carry_both_ways(stream, &head, &socket, gate) => {}
    }
}

/// Decides what happens to the bytes of a connection.
#[derive(Clone)]
struct Gate {
    link: Link,
    cuts: watch::Receiver<Cuts>,
}

impl Gate {
    fn is_mute(&self) -> bool {
        self.cut(&self.cuts.borrow()) == Some(Cut::Mute)
    }

    /// Returns the fault of the link. A sender without a name may be any of them, so the first cut to the
    /// receiver applies to it.
    fn cut(&self, cuts: &Cuts) -> Option<Cut> {
        let (from, to) = &self.link;
        let ours = |link: &Link| link.1 == *to && (from.is_empty() || link.0 == *from);
        cuts.iter().find(|(link, _)| ours(link)).map(|(_, cut)| *cut)
    }

    /// Waits until bytes may pass.
    async fn open(&self) -> io::Result<()> {
        self.wait_for(|cut| matches!(cut, None | Some(Cut::Mute))).await
    }

    /// Waits until the link is in such a state. Fails when the links are gone.
    async fn wait_for(&self, holds: impl Fn(Option<Cut>) -> bool) -> io::Result<()> {
        let mut cuts = self.cuts.clone();
        let waited = cuts.wait_for(|cuts| holds(self.cut(cuts))).await;
        waited.map(drop).map_err(io::Error::other)
    }
}

/// Returns the sender named by the head of the first request. Returns an empty name if there is none: the
/// request is then a probe, but messages may follow it on the same connection.
async fn sender(stream: &mut TcpStream, head: &mut Vec<u8>) -> String {
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
        if !matches!(stream.read_buf(head).await, Ok(1..)) {
            break;
        }
    }
    let text = String::from_utf8_lossy(head).to_lowercase();
    text.lines().find_map(|line| line.strip_prefix(SENDER)).unwrap_or_default().trim().to_owned()
}

async fn carry_both_ways(
    stream: TcpStream,
    head: &[u8],
    socket: &Path,
    gate: Gate,
) -> io::Result<()> {
    gate.open().await?;
    let (asking, answered) = stream.into_split();
    let (answers, mut asked) = UnixStream::connect(socket).await?.into_split();
    asked.write_all(head).await?;
    let ask = carry(asking, asked, gate.clone(), false);
    tokio::try_join!(ask, carry(answers, answered, gate, true))?;
    Ok(())
}

/// Carries bytes in one direction while the link is open. Lost bytes of a stream can't be replaced, so after
/// a loss the next bytes end the connection.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    gate: Gate,
    are_answers: bool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut lost = false;
    loop {
        let length = from.read(&mut piece).await?;
        gate.open().await?;
        if length == 0 {
            return to.shutdown().await;
        }
        if are_answers && gate.is_mute() {
            lost = true;
        } else if lost {
            return Err(io::ErrorKind::ConnectionReset.into());
        } else {
            to.write_all(&piece[..length]).await?;
        }
    }
}
