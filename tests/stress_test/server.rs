//! A server that answers every request as a test tells it to, and rather badly. Knows nothing of
//! the tool that asks it.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Far longer than any test runs: only a test that hangs ever meets it.
const READ_LIMIT: Duration = Duration::from_secs(120);

/// A request that was received.
#[derive(Debug)]
pub(crate) struct Request {
    /// From 0, over all connections, in the order of coming.
    pub(crate) place: u64,
    /// Path and query.
    pub(crate) path: String,
    /// The value of `Authorization`.
    pub(crate) authorization: Option<String>,
}

impl Request {
    /// The `type` that was asked for.
    pub(crate) fn pool(&self) -> &str {
        let (_, query) = self.path.split_once("?type=").expect("a type in the query");
        query.split('&').next().expect("at least one part")
    }
}

/// A response to send.
#[derive(Debug)]
pub(crate) enum Reply {
    /// 200 with a body; the connection is kept.
    Json(String),
    /// Status and headers (each with its `\r\n`) and a body; the connection is kept.
    Status(u16, &'static str, &'static str),
    /// A 200 that announces the end of its connection, and keeps the word.
    Last(String),
    /// Just these bytes; then the connection is cut.
    Cut(&'static str),
    /// Just these bytes; then nothing, until the client gives up.
    Hang(&'static str),
}

/// A server on a port of its own, stopped when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves what `reply` says to each request.
    pub(crate) fn start(reply: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let stopped = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let connections = Arc::new(AtomicU64::new(0));
        let reply = Arc::new(reply);
        let accepting = std::thread::spawn({
            let (stopped, requests) = (Arc::clone(&stopped), Arc::clone(&requests));
            let connections = Arc::clone(&connections);
            move || {
                for stream in listener.incoming() {
                    if stopped.load(Ordering::SeqCst) {
                        break;
                    }
                    connections.fetch_add(1, Ordering::SeqCst);
                    let (reply, requests) = (Arc::clone(&reply), Arc::clone(&requests));
                    let stream = stream.expect("an accepted connection");
                    // Ends with the client's process, which every test waits for.
                    std::thread::spawn(move || serve(&stream, &requests, &*reply));
                }
            }
        });
        Self { address, stopped, requests, connections, accepting: Some(accepting) }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many requests have come so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    /// How many connections have been made so far.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees that it is to stop.
        let _ = TcpStream::connect(self.address);
        let died = self.accepting.take().is_some_and(|accepting| accepting.join().is_err());
        assert!(!died || std::thread::panicking(), "the server's accepting thread died");
    }
}

/// One connection. Errors end it: the client may leave whenever it likes.
fn serve(stream: &TcpStream, requests: &AtomicU64, reply: &dyn Fn(&Request) -> Reply) {
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(READ_LIMIT));
    let mut reader = BufReader::new(stream);
    while let Some((path, authorization)) = read_head(&mut reader) {
        let place = requests.fetch_add(1, Ordering::SeqCst);
        let request = Request { place, path, authorization };
        let (bytes, then) = match reply(&request) {
            Reply::Json(body) => (http(200, "", &body), Then::Next),
            Reply::Status(status, headers, body) => (http(status, headers, body), Then::Next),
            Reply::Last(body) => (http(200, "Connection: close\r\n", &body), Then::Cut),
            Reply::Cut(bytes) => (bytes.to_owned(), Then::Cut),
            Reply::Hang(bytes) => (bytes.to_owned(), Then::Hang),
        };
        let mut writer = stream;
        if writer.write_all(bytes.as_bytes()).is_err() {
            return;
        }
        match then {
            Then::Next => {}
            Then::Cut => return,
            Then::Hang => {
                let _ = reader.read(&mut [0]);
                return;
            }
        }
    }
}

enum Then {
    Next,
    Cut,
    Hang,
}

/// Reads one request, its path and its `Authorization`; none when the client has left.
fn read_head(reader: &mut impl BufRead) -> Option<(String, Option<String>)> {
    let (mut path, mut authorization) = (None, None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            return Some((path?, authorization));
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            authorization = Some(value.trim().to_owned());
        }
        path = path.or_else(|| line.split(' ').nth(1).map(str::to_owned));
    }
}

fn http(status: u16, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status} x\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}
