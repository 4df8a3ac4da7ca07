//! The verdict on each attempt, and the counts. No other module decides what a failure is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tombola::internals::time;

use crate::args::Args;
use crate::client::{Failure, Response, WRONG};
use crate::journal::{Journal, Verdict};
use crate::load::Attempt;
use crate::numbers::{Numbers, is_exhausted};
use crate::seen::Seen;

/// Attempts that are judged before their lines are written out together.
const BATCH: usize = 128;
/// Duplicates that the summary lists; the log has all.
const DUPLICATES_LISTED: usize = 10;
/// Characters of an unexpected body that are shown.
const EXCERPT_CHARS: usize = 120;

/// The counts of a run. Its memory grows by 16 bytes a request, less than that of the numbers.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Attempts by kind. Those that begin with a status are expected, and sort before the failures.
    pub(crate) kinds: BTreeMap<Cow<'static, str>, KindTally>,
    /// Attempts whose request was repeated.
    pub(crate) retried: u64,
    /// Requests that had their last attempt.
    pub(crate) requests: u64,
    pub(crate) failures: u64,
    pub(crate) numbers: u64,
    /// Numbers by shard.
    pub(crate) shards: BTreeMap<String, u64>,
    /// One for each response with numbers.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) duplicates: u64,
    pub(crate) first_duplicates: Vec<String>,
}

#[derive(Debug, Default)]
pub(crate) struct KindTally {
    pub(crate) count: u64,
    pub(crate) first_failure: Option<String>,
}

/// Judges attempts until their channel is closed. Blocks, since it prints and writes the log.
pub(crate) fn judge(
    args: &Args,
    mut attempts: mpsc::Receiver<Attempt>,
    seen: &mut Seen,
    journal: &mut Journal,
) -> Tally {
    let mut tally = Tally::default();
    let mut batch = Vec::with_capacity(BATCH);
    while attempts.blocking_recv_many(&mut batch, BATCH) > 0 {
        for attempt in batch.drain(..) {
            let mut verdict = verdict(&attempt, args.count);
            for &number in &verdict.numbers.texts {
                if let Some(first) = seen.add(attempt.pool, number) {
                    verdict.duplicates.push((number, first));
                }
            }
            tally.count(&attempt, &verdict);
            journal.write(&attempt, &verdict);
        }
        journal.flush();
    }
    tally
}

/// Judges an attempt without looking for duplicates.
fn verdict(attempt: &Attempt, count: Option<u32>) -> Verdict<'_> {
    let new = |kind: Cow<'static, str>, is_failure, detail| Verdict {
        kind,
        is_failure,
        numbers: Numbers::default(),
        duplicates: Vec::new(),
        detail,
    };
    let Response { status, retry_after, body, .. } = match &attempt.result {
        Ok(response) => response,
        Err(Failure { kind, reason }) => return new((*kind).into(), true, reason.clone()),
    };
    match (status, retry_after) {
        (200, _) => match Numbers::parse(body, count) {
            Ok(numbers) => {
                Verdict { numbers, ..new("200 with numbers".into(), false, String::new()) }
            }
            Err(reason) => new(WRONG.into(), true, format!("{reason}: {}", excerpt(body))),
        },
        (429 | 503, Some(wait)) => {
            let kind = format!("{status} with Retry-After");
            new(kind.into(), false, format!("after {}", time(*wait)))
        }
        (410, _) if is_exhausted(body) => new("410 exhausted".into(), false, excerpt(body)),
        _ => new(format!("status {status}").into(), true, excerpt(body)),
    }
}

/// Returns the beginning of a body on one line. Control characters are escaped, so that a response
/// can't steer the terminal.
fn excerpt(body: &[u8]) -> String {
    let mut excerpt = String::new();
    for c in String::from_utf8_lossy(body).chars().take(EXCERPT_CHARS) {
        match c.is_control() {
            true => excerpt.extend(c.escape_default()),
            false => excerpt.push(c),
        }
    }
    excerpt
}

impl Tally {
    fn count(&mut self, attempt: &Attempt, verdict: &Verdict<'_>) {
        let request = attempt.request;
        let kind = self.kinds.entry(verdict.kind.clone()).or_default();
        kind.count += 1;
        if verdict.is_failure {
            self.failures += 1;
            kind.first_failure
                .get_or_insert_with(|| format!("request {request}: {}", verdict.detail));
        }
        match attempt.is_retried {
            true => self.retried += 1,
            false => self.requests += 1,
        }
        if let (Ok(response), false) = (&attempt.result, verdict.numbers.texts.is_empty()) {
            self.latencies.push(response.latency);
        }
        self.numbers += verdict.numbers.texts.len() as u64;
        for (shard, count) in &verdict.numbers.shards {
            *self.shards.entry(shard.clone()).or_default() += count;
        }
        for (number, first) in &verdict.duplicates {
            self.duplicates += 1;
            if self.first_duplicates.len() < DUPLICATES_LISTED {
                let pool = attempt.pool;
                self.first_duplicates.push(format!("{pool} {number}  request {request}, {first}"));
            }
        }
    }
}
