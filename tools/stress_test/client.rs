//! A client of the server, on one connection that stays open between requests. Reads no JSON, counts
//! nothing and repeats nothing.

use std::error::Error as _;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, HOST, RETRY_AFTER};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::args::Args;

/// Pause after a failed attempt to connect, so that a server that is down is not hammered.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a body for one number; the longest number has 17 characters.
const NUMBER_LIMIT_BYTES: usize = 32;
/// Bytes of a body for everything else: names of shards, or an error page.
const REST_LIMIT_BYTES: usize = 64 << 10;

const BROKEN: &str = "broken connection";
/// Also the kind of a 200 with other content.
pub(crate) const WRONG: &str = "wrong answer";

/// A whole response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// The header, if it is a number of seconds.
    pub(crate) retry_after: Option<Duration>,
    /// From sending the request on an open connection to the last byte of the body.
    pub(crate) latency: Duration,
    pub(crate) body: Bytes,
}

/// Why there is no whole response.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The kind of the attempt, in the summary.
    pub(crate) kind: &'static str,
    pub(crate) reason: String,
}

/// A connection, opened when it is needed.
#[derive(Debug)]
pub(crate) struct Client {
    args: &'static Args,
    connection: Option<SendRequest<Empty<Bytes>>>,
}

impl Client {
    pub(crate) fn new(args: &'static Args) -> Self {
        Self { args, connection: None }
    }

    /// Opens the connection.
    pub(crate) async fn connect(&mut self) -> anyhow::Result<()> {
        self.connection = Some(timeout(self.args.timeout, connect(self.args)).await??);
        Ok(())
    }

    /// Requests numbers of a pool.
    pub(crate) async fn get(&mut self, pool: &str) -> Result<Response, Failure> {
        let exchange = timeout(self.args.timeout, self.exchange(pool)).await;
        let result =
            exchange.unwrap_or_else(|_| failure("timed out", "no whole response within --timeout"));
        if result.is_err() {
            // A late response must not be taken for that of the next request.
            self.connection = None;
        }
        result
    }

    async fn exchange(&mut self, pool: &str) -> Result<Response, Failure> {
        let mut request = request(self.args, pool);
        loop {
            let is_new = self.connection.is_none();
            let connection = match &mut self.connection {
                Some(open) => open,
                None => match connect(self.args).await {
                    Ok(new) => self.connection.insert(new),
                    Err(error) => {
                        sleep(CONNECT_PAUSE).await;
                        return failure("no connection", error.to_string());
                    }
                },
            };
            if connection.ready().await.is_ok() {
                let sent = Instant::now();
                match connection.try_send_request(request).await {
                    Ok(response) => return read(response, sent, self.args).await,
                    Err(mut error) => match error.take_message() {
                        Some(unsent) => request = unsent,
                        None => return not_received(&error.into_error()),
                    },
                }
            }
            // A server may close a connection between two requests. This request was not sent, so that
            // a new connection repeats nothing.
            if is_new {
                return failure(BROKEN, "closed before a request was sent");
            }
            self.connection = None;
        }
    }
}

async fn connect(args: &Args) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(args.address()).await?;
    // A request is one small write: to wait for more would be all of the latency.
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with its sender, and its error reaches the request that it belongs to.
    tokio::spawn(connection);
    Ok(sender)
}

fn request(args: &Args, pool: &str) -> Request<Empty<Bytes>> {
    let mut request = Request::get(args.resource(pool)).header(HOST, args.authority());
    if let Some(authorization) = &args.authorization {
        request = request.header(AUTHORIZATION, authorization);
    }
    request.body(Empty::new()).expect("host, path and pool were checked with the arguments")
}

async fn read(
    response: hyper::Response<Incoming>,
    sent: Instant,
    args: &Args,
) -> Result<Response, Failure> {
    let status = response.status().as_u16();
    // The date form of RFC 9110 would be compared with this machine's clock, and no server of ours
    // sends it.
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| {
        let seconds = value.to_str().ok()?.parse().ok()?;
        Some(Duration::from_secs(seconds))
    });
    let limit_bytes = REST_LIMIT_BYTES + args.count.unwrap_or(1) as usize * NUMBER_LIMIT_BYTES;
    match Limited::new(response.into_body(), limit_bytes).collect().await {
        Ok(body) => {
            Ok(Response { status, retry_after, latency: sent.elapsed(), body: body.to_bytes() })
        }
        Err(error) if error.is::<LengthLimitError>() => {
            failure(WRONG, format!("the body is longer than {limit_bytes} bytes"))
        }
        Err(error) => failure(BROKEN, format!("cut off in the body: {error}")),
    }
}

fn not_received(error: &hyper::Error) -> Result<Response, Failure> {
    // hyper's own text says only where it failed, if there is a cause beneath.
    let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    match error.is_parse() {
        true => failure(WRONG, format!("not HTTP: {reason}")),
        false => failure(BROKEN, reason),
    }
}

fn failure(kind: &'static str, reason: impl Into<String>) -> Result<Response, Failure> {
    Err(Failure { kind, reason: reason.into() })
}
