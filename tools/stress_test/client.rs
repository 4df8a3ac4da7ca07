//! One keep-alive connection to the server. Reads no JSON, counts nothing and retries nothing.

use std::error::Error as _;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::RETRY_AFTER;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::args::Target;

/// A request as every connection sends it.
pub(crate) type Question = Request<Empty<Bytes>>;

/// Head of an answer; its body is in the buffer that was lent.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Only when it is there and a number of seconds.
    pub(crate) retry_after: Option<Duration>,
    /// From handing over the request, on an open connection, to the last byte of the answer.
    pub(crate) latency: Duration,
}

/// Why there is no whole answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// None within this time.
    TimedOut(Duration),
    /// The connection could not be made.
    NoConnection(String),
    /// The connection ended before the answer did.
    Broken(String),
    /// What came is no HTTP, or longer than any right answer.
    Unreadable(String),
}

/// Why [`Connection::ask`] has no answer.
#[derive(Debug)]
pub(crate) enum AskError {
    /// The connection had ended before the request left, so that asking elsewhere is no repetition.
    NeverSent,
    /// The server may have had the request.
    Failed(Failure),
}

/// What moves bytes between the socket and those who ask.
type Driver = http1::Connection<TokioIo<TcpStream>, Empty<Bytes>>;

/// An open connection, driven by whoever asks: there is no task behind it.
pub(crate) struct Connection {
    sender: http1::SendRequest<Empty<Bytes>>,
    /// None once the connection has ended.
    driver: Option<Pin<Box<Driver>>>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("open", &self.driver.is_some()).finish_non_exhaustive()
    }
}

/// Finds the server, and proves it with an open connection.
///
/// # Errors
/// In words, when the name is not known or no address of it takes a connection.
pub(crate) async fn reach(
    target: &Target,
    patience: Duration,
) -> Result<(SocketAddr, Connection), String> {
    let addresses = timeout(patience, tokio::net::lookup_host(target.host_and_port()))
        .await
        .map_err(|_| "looking up its name timed out".to_owned())?
        .map_err(|error| error.to_string())?;
    let mut last = "its name has no address".to_owned();
    for address in addresses {
        match timeout(patience, Connection::open(address)).await {
            Ok(Ok(connection)) => return Ok((address, connection)),
            Ok(Err(Failure::NoConnection(reason) | Failure::Broken(reason))) => last = reason,
            Ok(Err(other)) => last = format!("{other:?}"),
            Err(_) => last = "connecting timed out".to_owned(),
        }
    }
    Err(last)
}

impl Connection {
    /// Connects. The caller bounds the wait.
    ///
    /// # Errors
    /// [`Failure::NoConnection`]
    pub(crate) async fn open(address: SocketAddr) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| Failure::NoConnection(error.to_string()))?;
        // Requests are one small write each: waiting to fill a packet would be all of the latency.
        stream.set_nodelay(true).map_err(|error| Failure::NoConnection(error.to_string()))?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Failure::NoConnection(reason(&error)))?;
        Ok(Self { sender, driver: Some(Box::pin(driver)) })
    }

    /// Asks, and adds the answer's body to `body`. The caller bounds the wait; when it gives up it
    /// must drop the connection, or the late answer is taken for the next one's.
    ///
    /// # Errors
    /// [`AskError`]; after any, the connection is of no use.
    pub(crate) async fn ask(
        &mut self,
        question: Question,
        body: &mut Vec<u8>,
        body_limit_bytes: usize,
    ) -> Result<Reply, AskError> {
        let driver = &mut self.driver;
        let drive = async {
            if let Some(open) = driver {
                // Its error reaches the exchange as well, and belongs to what was asked there.
                let _ = open.as_mut().await;
                *driver = None;
            }
            // What has arrived is still to be read: only the exchange says when it is over.
            std::future::pending().await
        };
        tokio::select! {
            biased;
            reply = exchange(&mut self.sender, question, body, body_limit_bytes) => reply,
            never = drive => match never {},
        }
    }
}

async fn exchange(
    sender: &mut http1::SendRequest<Empty<Bytes>>,
    question: Question,
    body: &mut Vec<u8>,
    body_limit_bytes: usize,
) -> Result<Reply, AskError> {
    sender.ready().await.map_err(|_| AskError::NeverSent)?;
    let sent = Instant::now();
    let mut response = sender.try_send_request(question).await.map_err(|mut error| match error
        .take_message()
    {
        Some(_unsent) => AskError::NeverSent,
        None => AskError::Failed(failure(&error.into_error())),
    })?;
    while let Some(frame) = response.body_mut().frame().await {
        let frame = frame.map_err(|error| {
            let cut = format!("cut off {} bytes into the body: {}", body.len(), reason(&error));
            AskError::Failed(Failure::Broken(cut))
        })?;
        if let Some(bytes) = frame.data_ref() {
            if body.len() + bytes.len() > body_limit_bytes {
                let long = format!("the body is longer than {body_limit_bytes} bytes");
                return Err(AskError::Failed(Failure::Unreadable(long)));
            }
            body.extend_from_slice(bytes);
        }
    }
    Ok(Reply {
        status: response.status().as_u16(),
        retry_after: retry_after(&response),
        latency: sent.elapsed(),
    })
}

fn failure(error: &hyper::Error) -> Failure {
    match error.is_parse() {
        true => Failure::Unreadable(format!("not HTTP: {}", reason(error))),
        false => Failure::Broken(reason(error)),
    }
}

/// Seconds only: the date form of RFC 9110 would be read against this machine's clock, and no
/// server of ours sends it.
fn retry_after<B>(response: &Response<B>) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// hyper's own `Display` says only where it struck, when there is a reason beneath.
fn reason(error: &hyper::Error) -> String {
    match error.source() {
        Some(reason) => reason.to_string(),
        None => error.to_string(),
    }
}
