//! Imports into a running server. Knows nothing of the settings of its pools.

use std::fmt::Write as _;
use std::io::BufRead;
use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Method};
use http_body_util::Full;
use hyper::body::Bytes;

use crate::commands::client::{Client, HttpResponse};
use crate::commands::exit::{Ended, Exit};
use crate::config::TOKEN_VARIABLE;
use crate::import::{Layout, LinesError, Report, WrongLines, read_texts};

/// The most bytes of a request: less than the 16 MiB that the server reads, so that a slow connection can send them in
/// time.
const PART_BYTES_MAX: usize = 1 << 20;

/// The most bytes of a response: every number of a part may be a conflict.
const RESPONSE_BYTES_MAX: usize = 256 << 20;

/// How long to wait for a response. The server may first have to finish a build, and then imports as long as its
/// shards take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Some lines of a file.
pub(super) struct Part {
    /// The number of the first line.
    first_line: u64,
    text: String,
}

/// A running server.
pub(super) struct Remote {
    pub(super) server: Client,
    pub(super) credentials: Option<HeaderValue>,
    pub(super) pool: String,
}

/// Reads lines and splits them into parts. Blank lines take the place of those without a number, so that the server
/// counts the lines as the file does. Also returns the lines that no pool can have.
pub(super) fn parts(
    from: impl BufRead,
    layout: &Layout,
) -> Result<(Vec<Part>, WrongLines), LinesError> {
    let mut parts: Vec<Part> = Vec::new();
    let mut next_line = 1;
    let read = read_texts(from, layout, |line, text| {
        let length = text.len() + usize::try_from(line - next_line).unwrap_or(usize::MAX);
        let is_full = |part: &Part| part.text.len().saturating_add(length) >= PART_BYTES_MAX;
        if parts.last().is_none_or(is_full) {
            parts.push(Part { first_line: line, text: String::new() });
            next_line = line;
        }
        if let Some(part) = parts.last_mut() {
            for _ in next_line..line {
                part.text.push('\n');
            }
            let _ = writeln!(part.text, "{text}");
        }
        next_line = line + 1;
        Ok(())
    });
    match read {
        Ok(()) => Ok((parts, WrongLines::default())),
        Err(LinesError::Wrong(wrong)) => Ok((parts, wrong)),
        Err(error) => Err(error),
    }
}

impl Remote {
    /// Imports all parts, or nothing if a line is wrong. `wrong` are those that are known.
    pub(super) async fn import(
        &self,
        parts: Vec<Part>,
        mut wrong: WrongLines,
    ) -> anyhow::Result<Report> {
        if parts.len() > 1 || !wrong.is_empty() {
            for part in &parts {
                if let Err(others) = self.send(part, true).await? {
                    wrong.add(others);
                }
            }
        }
        if !wrong.is_empty() {
            return Err(LinesError::from(wrong).into());
        }
        let empty = Part { first_line: 1, text: String::new() };
        let mut parts = parts.into_iter();
        let first = parts.next().unwrap_or(empty);
        let mut sum = self.send(&first, false).await?.map_err(LinesError::from)?;
        for part in parts {
            sum.add(self.send(&part, false).await?.map_err(LinesError::from)?);
        }
        Ok(sum)
    }

    async fn send(
        &self,
        part: &Part,
        only_check: bool,
    ) -> anyhow::Result<Result<Report, WrongLines>> {
        let Part { first_line, text } = part;
        let target = format!("/pools/{}/used?line={first_line}&check={only_check}", self.pool);
        let request = self
            .server
            .request(Method::POST, &target, self.credentials.as_ref())
            .header(CONTENT_TYPE, "text/plain")
            .body(Full::new(Bytes::from(text.clone())));
        let request = request.map_err(|_| {
            Ended::error(Exit::Settings, format!("{:?} can't be the name of a pool", self.pool))
        })?;
        let exchange = async {
            let connection = self.server.connect().await?;
            connection.with_patience(PATIENCE).send(request, RESPONSE_BYTES_MAX).await
        };
        let response: HttpResponse =
            exchange.await.map_err(|problem| self.server.unreachable(&problem))?;
        if response.status != 200 {
            return self.refusal(&response).map(Err);
        }
        serde_json::from_slice(&response.body).map(Ok).map_err(|_| {
            let problem = format!("{}: its response is no report of an import", self.server);
            Ended::error(Exit::Unreachable, problem)
        })
    }

    /// Returns the wrong lines if the server refused the import because of them.
    fn refusal(&self, response: &HttpResponse) -> anyhow::Result<WrongLines> {
        let body: serde_json::Value = serde_json::from_slice(&response.body).unwrap_or_default();
        let reason = body["error"].as_str().map_or_else(|| response.excerpt(), printable);
        let (exit, advice) = match response.status {
            422 => match reason.trim_end_matches('.').parse() {
                Ok(wrong) => return Ok(wrong),
                Err(()) => (Exit::Settings, String::new()),
            },
            401 | 403 => (
                Exit::Settings,
                format!(" Use a token of the scope admin, in {TOKEN_VARIABLE} or --token-file."),
            ),
            400 | 404 | 409 => (Exit::Settings, String::new()),
            _ => (Exit::Failed, String::new()),
        };
        let status = response.status;
        let problem = format!("{} refused the import: {status} {reason}{advice}", self.server);
        Err(Ended::error(exit, problem))
    }
}

/// Returns a text of the server, safe to print.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}
