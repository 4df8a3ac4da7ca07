//! One connection: its handshake, its requests, and how long the server waits for its client. Knows
//! nothing of other connections or of what the routes do.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{self, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Bytes, HttpBody};
use axum::http::HeaderValue;
use axum::http::header::CONNECTION;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use crate::http::{AnyResponse, IMPORT_MAX, LiveRoutes};
use crate::traffic::{OpenConnection, Route};

/// The largest request head in bytes, as in other servers. It also bounds the memory of a connection.
const HEAD_MAX: usize = 16 * 1024;

/// The most bytes of a refused body that are read and discarded after the response: as many as any body may have.
const DISCARDED_BYTES_MAX: usize = IMPORT_MAX;

/// Measures how long the server has been waiting for a client to send or to read.
#[derive(Debug)]
pub(super) struct ClientTimer {
    accepted: Instant,
    /// Milliseconds after `accepted` at which the wait began, or [`Self::PAUSED`].
    since_ms: AtomicU64,
}

impl ClientTimer {
    const PAUSED: u64 = u64::MAX;

    /// Creates a timer that runs from now on.
    pub(super) fn new() -> Self {
        Self { accepted: Instant::now(), since_ms: AtomicU64::new(0) }
    }

    /// Returns how long the client has kept the server waiting, or `None` while the server has to act.
    pub(super) fn waited(&self) -> Option<Duration> {
        match self.since_ms.load(Ordering::Relaxed) {
            Self::PAUSED => None,
            since => Some(self.accepted.elapsed().saturating_sub(Duration::from_millis(since))),
        }
    }

    /// Stops the timer: the server has to act.
    fn pause(&self) {
        self.since_ms.store(Self::PAUSED, Ordering::Relaxed);
    }

    /// Starts the timer from zero: the client has to act. Returns the time.
    fn restart(&self) -> Instant {
        let now = Instant::now();
        let since = u64::try_from((now - self.accepted).as_millis());
        self.since_ms.store(since.unwrap_or(Self::PAUSED - 1), Ordering::Relaxed);
        now
    }
}

/// The parts that all requests of a connection share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) routes: Arc<LiveRoutes>,
    /// The client's address.
    pub(super) peer: IpAddr,
    pub(super) timer: Arc<ClientTimer>,
    pub(super) counts: OpenConnection,
}

/// Serves one connection until it ends, or until `stop` is true and the request in flight is finished.
pub(super) async fn serve(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    context: Context,
    mut stop: watch::Receiver<bool>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "TCP_NODELAY could not be set");
    }
    let Some(tls) = tls else {
        return respond_all(stream, &context, stop).await;
    };
    let shaken = tokio::select! {
        shaken = tls.accept(stream) => shaken,
        () = told_to(&mut stop) => return,
    };
    match shaken {
        // Boxed, because otherwise a connection without TLS would be as large.
        Ok(stream) => Box::pin(respond_all(stream, &context, stop)).await,
        Err(error) => debug!(%error, "a TLS handshake failed"),
    }
}

async fn respond_all(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    context: &Context,
    mut stop: watch::Receiver<bool>,
) {
    let refused = AtomicBool::new(false);
    let stream = ClientStream {
        stream,
        timer: &context.timer,
        stalled: false,
        has_refused: &refused,
        discarded_bytes: 0,
    };
    let stream = TokioIo::new(stream);
    let service = service_fn(|request| respond(context, &refused, request));
    // Without hyper's timer, which would be set for each request. `Connections::cut_overdue` checks the
    // client's timer, which bounds the time for a head too.
    let connection = http1::Builder::new()
        .max_buf_size(HEAD_MAX)
        // One buffer: a vectored write costs the kernel more than copying a body of this size.
        .writev(false)
        .serve_connection(stream, service);
    let mut connection = std::pin::pin!(connection);
    let told = stop.clone();
    let mut stopped = std::pin::pin!(told_to(&mut stop));
    let mut listening = false;
    let ended = poll_fn(|context| {
        if let Poll::Ready(ended) = connection.as_mut().poll(context) {
            return Poll::Ready(Some(ended));
        }
        // One poll is enough to be woken: polling each time would cost every request a lock.
        if listening && told.has_changed().is_ok_and(|changed| !changed) {
            return Poll::Pending;
        }
        listening = true;
        stopped.as_mut().poll(context).map(|()| None)
    });
    let ended = match ended.await {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection ended in the middle");
    }
}

/// Waits until the server stops or is dropped.
async fn told_to(stop: &mut watch::Receiver<bool>) {
    let _stopped = stop.wait_for(|&stop| stop).await;
}

/// Handles a request after reading its body. If it drew a number first and the connection then closed before
/// the end of the body, the number would be lost.
async fn respond(
    context: &Context,
    has_refused: &AtomicBool,
    request: Request<Incoming>,
) -> Result<AnyResponse, axum::BoxError> {
    let (head, body) = request.into_parts();
    let body = match body.is_end_stream() {
        true => Ok(Bytes::new()),
        false => {
            let (limit, error) = context.routes.body_max(&head, context.peer);
            read(body, limit).await?.ok_or(error)
        }
    };
    let route = Route::of(head.uri.path());
    let asked = Instant::now();
    context.timer.pause();
    let response = match body {
        Ok(body) => context.routes.handle(Request::from_parts(head, body), context.peer).await,
        Err(error) => {
            has_refused.store(true, Ordering::Relaxed);
            let mut response = AnyResponse::from(error);
            // The rest of the body would be read as the next request.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            response
        }
    };
    let took = context.timer.restart() - asked;
    context.counts.answered(route, response.status().as_u16(), took);
    Ok(response)
}

/// Reads the body. Returns `None` if it is too large, in which case it is not read to its end.
async fn read(body: Incoming, limit: usize) -> Result<Option<Bytes>, axum::BoxError> {
    if body.size_hint().lower() > limit as u64 {
        return Ok(None);
    }
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(Some(body.to_bytes())),
        Err(error) if error.is::<LengthLimitError>() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A stream that gives its client more time when the client resumes reading after a pause, and that lets a client send
/// the rest of a refused body.
struct ClientStream<'a, S> {
    stream: S,
    timer: &'a ClientTimer,
    /// Whether the last write had to wait.
    stalled: bool,
    /// Whether a body was refused before its end.
    has_refused: &'a AtomicBool,
    discarded_bytes: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientStream<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S> ClientStream<'_, S> {
    fn note(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let stalled = written.is_pending();
        // With pipelined requests, the server may be working on the next response already.
        if self.stalled && !stalled && self.timer.waited().is_some() {
            let _now = self.timer.restart();
        }
        self.stalled = stalled;
        written
    }
}

impl<S: AsyncRead + Unpin> ClientStream<'_, S> {
    /// Reads what the client still sends, until it has received the response and closes the connection.
    fn poll_discard(&mut self, context: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        let mut space = [MaybeUninit::uninit(); 4096];
        while self.discarded_bytes < DISCARDED_BYTES_MAX {
            let mut buffer = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
            match buffer.filled().len() {
                0 => break,
                length => self.discarded_bytes += length,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientStream<'_, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<io::Result<()>> {
        if self.discarded_bytes == 0 {
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        }
        // If the connection were closed before the client has sent everything, the kernel would reset it, and the
        // client could lose the response.
        match self.has_refused.load(Ordering::Relaxed) {
            true => self.poll_discard(context),
            false => Poll::Ready(Ok(())),
        }
    }
}
