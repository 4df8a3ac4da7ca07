//! Requests the chunks of a draw, several at a time, and returns them in order. Repeats the requests that may
//! succeed later: with its key, a chunk has the same numbers each time. Knows nothing of files.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use axum::http::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderName, HeaderValue, Method, Request};
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::Draw;
use crate::backoff::Backoff;
use crate::commands::client::{Client, Connection, HttpResponse};
use crate::commands::exit::{Ended, Exit};
use crate::config::TOKEN_VARIABLE;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The chunks that are requested at the same time, each on its own connection. While one is written to the
/// file, the server works on the others.
const CONNECTIONS: usize = 3;

/// The most bytes of a line: a code of 64 characters that are all escaped, two quotes and the line break.
const LINE_BYTES_MAX: usize = 131;

/// The most bytes of other responses: the description of a server with many pools has some 100 kB.
const OTHER_BYTES_MAX: usize = 4 << 20;

/// The pauses between tries while the server does not respond. A restart takes a second.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LIMIT: Duration = Duration::from_secs(2);

/// The pause if a response says to retry later, but not when.
const PAUSE_DEFAULT: Duration = Duration::from_secs(1);

/// The lines of a chunk, and the connection for the next request if it is still open.
type Received = (Vec<u8>, Option<Connection>);

/// The way to the server, and how long to keep trying.
pub(super) struct Requests {
    server: Client,
    credentials: Option<HeaderValue>,
    patience: Duration,
    /// When a request succeeded last.
    progress: Mutex<Instant>,
}

impl Requests {
    pub(super) fn new(
        server: Client,
        credentials: Option<HeaderValue>,
        patience: Duration,
    ) -> Self {
        Self { server, credentials, patience, progress: Mutex::new(Instant::now()) }
    }

    /// Returns the most numbers that the server hands out at once, as it describes itself.
    pub(super) async fn count_limit(&self) -> anyhow::Result<NonZeroU32> {
        let request =
            self.server.request(Method::GET, "/openapi.json", None).body(Full::default())?;
        let response = self.exchange(&mut None, &request, OTHER_BYTES_MAX).await?;
        let description: Value = serde_json::from_slice(&response.body).unwrap_or_default();
        let parameters = description["paths"]["/random"]["get"]["parameters"].as_array();
        let count = parameters.into_iter().flatten().find(|parameter| parameter["name"] == "count");
        let limit = count.and_then(|count| count["schema"]["maximum"].as_u64());
        limit.and_then(|limit| u32::try_from(limit).ok()?.try_into().ok()).ok_or_else(|| {
            let problem = format!(
                "{}: its /openapi.json does not say how many numbers it hands out at once, as servers of the \
                 mode sharded do. Name another server with --url, or set --chunk",
                self.server
            );
            Ended::error(Exit::Unreachable, problem)
        })
    }

    /// Requests a chunk, on this connection if it is still open.
    async fn chunk(
        self: Arc<Self>,
        draw: Draw,
        chunk: u32,
        mut connection: Option<Connection>,
    ) -> anyhow::Result<Received> {
        let count = draw.count_of(chunk) as usize;
        let request = self
            .server
            .request(Method::POST, &target(&draw, count), self.credentials.as_ref())
            .header(ACCEPT, draw.format.media_type())
            .header(IDEMPOTENCY_KEY, format!("\"{}\"", draw.key_of(chunk)))
            .body(Full::default());
        let request = request.map_err(|error| {
            let problem = format!("the request would be malformed: {error}. Use a shorter --label");
            Ended::error(Exit::Settings, problem)
        })?;
        let limit_bytes = OTHER_BYTES_MAX.max(count * LINE_BYTES_MAX);
        let response = self.exchange(&mut connection, &request, limit_bytes).await?;
        if response.status != 200 {
            let refusal = format!("{} refused chunk {chunk}: {}", self.server, reason(&response));
            return Err(Ended::error(exit(response.status), refusal));
        }
        verify(&response, count, draw.format.media_type()).map_err(|problem| {
            anyhow!("{}: its response to chunk {chunk} is wrong: {problem}", self.server)
        })?;
        Ok((response.body, connection))
    }

    /// Sends a request again until it succeeds or is refused for good, or until nothing succeeds for as long as
    /// the patience lasts.
    async fn exchange(
        &self,
        connection: &mut Option<Connection>,
        request: &Request<Full<Bytes>>,
        limit_bytes: usize,
    ) -> anyhow::Result<HttpResponse> {
        let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_LIMIT);
        let mut failing_since = None;
        loop {
            let sent = self.try_once(connection, request.clone(), limit_bytes).await;
            let (pause, failure) = match sent {
                Ok(response) => match pause(&response) {
                    None => {
                        *self.progress.lock().expect("no holder of it panics") = Instant::now();
                        return Ok(response);
                    }
                    Some(pause) => (pause, anyhow!("{}: {}", self.server, reason(&response))),
                },
                Err(problem) => {
                    *connection = None;
                    (backoff.next(), self.server.unreachable(&problem))
                }
            };
            // Another chunk may have succeeded since this one began to fail, and writing a chunk may have taken
            // long.
            let progress = *self.progress.lock().expect("no holder of it panics");
            let since = progress.max(*failing_since.get_or_insert_with(Instant::now));
            if since.elapsed().saturating_add(pause) > self.patience {
                return Err(failure);
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(1.0..1.25))).await;
        }
    }

    async fn try_once(
        &self,
        connection: &mut Option<Connection>,
        request: Request<Full<Bytes>>,
        limit_bytes: usize,
    ) -> Result<HttpResponse, String> {
        let open = connection.take().filter(Connection::is_open);
        let connection = connection.insert(match open {
            Some(open) => open,
            None => self.server.connect().await?,
        });
        connection.send(request, limit_bytes).await
    }
}

/// Returns the path and query of the request for a chunk.
fn target(draw: &Draw, count: usize) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("type", &draw.pool).append_pair("count", &count.to_string());
    if let Some(label) = &draw.label {
        query.append_pair("label", label);
    }
    format!("/random?{}", query.finish())
}

/// Returns how long to wait before the next try, if a later one may succeed. A proxy responds with 502 or 504
/// while the server restarts.
fn pause(response: &HttpResponse) -> Option<Duration> {
    if !matches!(response.status, 429 | 502..=504) {
        return None;
    }
    let seconds =
        response.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Some(seconds.map_or(PAUSE_DEFAULT, Duration::from_secs).max(PAUSE_FIRST))
}

fn exit(status: u16) -> Exit {
    match status {
        // The key, the pool, the count or the label.
        400 | 422 => Exit::Settings,
        _ => Exit::Failed,
    }
}

/// Returns why the server refused a request, in its own words.
fn reason(response: &HttpResponse) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
        code: String,
    }
    let status = response.status;
    let reason = match serde_json::from_slice(&response.body) {
        Ok(Refusal { error, code }) => {
            let error = error.replace(char::is_control, " ");
            format!("{status} {}: {error}", code.escape_default())
        }
        Err(_) => format!("{status}: {}", response.excerpt()),
    };
    match status {
        401 | 403 => {
            format!(
                "{reason} Give a token of the scope draw with --token-file or in {TOKEN_VARIABLE}."
            )
        }
        _ => reason,
    }
}

/// Checks that a response has the lines that were asked for.
fn verify(response: &HttpResponse, count: usize, media_type: &str) -> Result<(), String> {
    let content_type = response.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or("nothing");
    if content_type.split(';').next() != Some(media_type) {
        return Err(format!("it is {content_type:?} instead of {media_type:?}"));
    }
    let lines = response.body.iter().filter(|&&byte| byte == b'\n').count();
    if lines != count || response.body.last() != Some(&b'\n') {
        return Err(format!("it has {lines} lines instead of {count}"));
    }
    Ok(())
}

/// The chunks of a draw, in order. Besides the one that was returned last, up to [`CONNECTIONS`] chunks are in
/// memory.
pub(super) struct Chunks {
    requests: Arc<Requests>,
    draw: Draw,
    /// The next chunk to request.
    next: u32,
    in_flight: VecDeque<JoinHandle<anyhow::Result<Received>>>,
}

impl Chunks {
    /// Returns the chunks from `first` on, and requests the first ones.
    pub(super) fn new(requests: Requests, draw: Draw, first: u32) -> Self {
        let requests = Arc::new(requests);
        let mut chunks = Self { requests, draw, next: first, in_flight: VecDeque::new() };
        for _ in 0..CONNECTIONS {
            chunks.request(None);
        }
        chunks
    }

    /// Returns the lines of the next chunk, or `None` after the last one.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(chunk) = self.in_flight.pop_front() else {
            return Ok(None);
        };
        let (lines, connection) = chunk.await.expect("a request does not panic")?;
        self.request(connection);
        Ok(Some(lines))
    }

    /// Requests the next chunk on this connection, if there is one.
    fn request(&mut self, connection: Option<Connection>) {
        if self.next <= self.draw.chunks() {
            let requests = Arc::clone(&self.requests);
            let requested = requests.chunk(self.draw.clone(), self.next, connection);
            self.in_flight.push_back(tokio::spawn(requested));
            self.next += 1;
        }
    }
}
