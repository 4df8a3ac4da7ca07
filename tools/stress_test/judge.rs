//! What each ask came to, and the counts of it. The only place that decides what is a failure;
//! writes nothing itself.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hashbrown::HashMap;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;

use crate::answer::{Answer, says_exhausted};
use crate::args::{Args, Pools};
use crate::client::{Failure, Reply};
use crate::journal::{Journal, Progress};
use crate::load::{Ask, Batch};
use crate::seen::{Seen, Sighting};
use tombola::figures::time;

/// Repeated numbers that the summary names; the log names all.
const REPEATS_NAMED: usize = 10;
/// Shards that are counted by name, so that a server that makes them up fills no memory.
const SHARDS_NAMED: usize = 4_096;
/// What the rest is counted under.
const FURTHER_SHARDS: &str = "(further shards)";
/// What numbers are counted under whose answer names no shard.
const NO_SHARD: &str = "(no shard named)";
/// Characters of a body that nobody expected which are worth a line.
const EXCERPT_CHARS: usize = 120;
/// Three digits of each latency are kept, in about 300 KB.
const LATENCY_DIGITS: u8 = 3;

/// What became of an ask, in the order that the summary lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Numbers,
    Refilling,
    Busy,
    Exhausted,
    Status(u16),
    WrongAnswer,
    TimedOut,
    Broken,
    NoConnection,
}

impl Kind {
    /// Whether a healthy server may do this; `--help` has the same list.
    pub(crate) fn is_expected(self) -> bool {
        match self {
            Self::Numbers | Self::Refilling | Self::Busy | Self::Exhausted => true,
            Self::Status(_)
            | Self::WrongAnswer
            | Self::TimedOut
            | Self::Broken
            | Self::NoConnection => false,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Numbers => "200 with numbers",
            Self::Refilling => "503 with Retry-After",
            Self::Busy => "429 with Retry-After",
            Self::Exhausted => "410 exhausted",
            Self::Status(status) => return f.pad(&format!("status {status}")),
            Self::WrongAnswer => "wrong answer",
            Self::TimedOut => "timed out",
            Self::Broken => "broken connection",
            Self::NoConnection => "no connection",
        };
        f.pad(name)
    }
}

/// One ask, judged.
#[derive(Debug)]
pub(crate) struct Verdict<'body> {
    pub(crate) kind: Kind,
    /// With [`Kind::Numbers`].
    pub(crate) answer: Option<Answer<'body>>,
    /// Those of its numbers that had come before.
    pub(crate) repeats: Vec<(&'body str, Sighting)>,
    /// What else there is to say.
    pub(crate) detail: String,
}

/// Asks of one kind.
#[derive(Debug, Default)]
pub(crate) struct KindTally {
    pub(crate) count: u64,
    /// Of a failure, what the first one was.
    pub(crate) first: Option<String>,
}

/// What all asks came to.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) kinds: BTreeMap<Kind, KindTally>,
    /// Asks that were followed by the same request once more.
    pub(crate) asked_again: u64,
    /// Requests that had their last outcome.
    pub(crate) requests: u64,
    pub(crate) numbers: u64,
    /// Nanoseconds, of answers with numbers.
    pub(crate) latencies: Histogram<u64>,
    pub(crate) shards: HashMap<String, u64>,
    pub(crate) repeats: u64,
    pub(crate) first_repeats: Vec<String>,
    pub(crate) seen: Seen,
}

impl Tally {
    fn new(seen: Seen) -> Self {
        Self {
            kinds: BTreeMap::new(),
            asked_again: 0,
            requests: 0,
            numbers: 0,
            latencies: Histogram::new(LATENCY_DIGITS).expect("digits are 0 to 5"),
            shards: HashMap::new(),
            repeats: 0,
            first_repeats: Vec::new(),
            seen,
        }
    }

    pub(crate) fn failures(&self) -> u64 {
        self.kinds
            .iter()
            .filter(|(kind, _)| !kind.is_expected())
            .map(|(_, tally)| tally.count)
            .sum()
    }

    pub(crate) fn passed(&self) -> bool {
        self.repeats == 0 && self.failures() == 0
    }

    fn count(&mut self, ask: &Ask, pool: &str, verdict: &Verdict<'_>) {
        let kind = self.kinds.entry(verdict.kind).or_default();
        kind.count += 1;
        if kind.first.is_none() && !verdict.kind.is_expected() {
            kind.first = Some(format!("request {}: {}", ask.request, verdict.detail));
        }
        match ask.again_after {
            Some(_) => self.asked_again += 1,
            None => self.requests += 1,
        }
        if let (Some(answer), Ok(reply)) = (&verdict.answer, &ask.outcome) {
            self.numbers += answer.numbers().len() as u64;
            self.latencies += nanos(reply.latency);
            self.count_shards(answer);
        }
        for (number, sighting) in &verdict.repeats {
            self.repeats += 1;
            if self.first_repeats.len() < REPEATS_NAMED {
                let when = when(*sighting);
                self.first_repeats
                    .push(format!("{pool} {number}  request {}, {when}", ask.request));
            }
        }
    }

    fn count_shards(&mut self, answer: &Answer<'_>) {
        let mut named = 0;
        for (shard, count) in answer.shards() {
            named += count;
            self.count_shard(shard, count);
        }
        if named == 0 {
            self.count_shard(NO_SHARD, answer.numbers().len() as u64);
        }
    }

    fn count_shard(&mut self, shard: &str, count: u64) {
        if let Some(numbers) = self.shards.get_mut(shard) {
            *numbers += count;
            return;
        }
        let name = if self.shards.len() < SHARDS_NAMED { shard } else { FURTHER_SHARDS };
        *self.shards.entry(name.to_owned()).or_default() += count;
    }
}

/// Takes asks in batches, judges them, and has each written down.
#[derive(Debug)]
pub(crate) struct Judge {
    pools: Pools,
    /// How many numbers were asked for at once.
    count: Option<u32>,
    tally: Tally,
    journal: Journal,
}

impl Judge {
    pub(crate) fn new(args: &Args, seen: Seen, journal: Journal) -> Self {
        Self { pools: args.pools.clone(), count: args.count, tally: Tally::new(seen), journal }
    }

    /// Judges until the other end is closed. Blocks: prints, and writes the log.
    pub(crate) fn run(mut self, mut batches: mpsc::Receiver<Batch>) -> (Tally, Journal) {
        while let Some(batch) = batches.blocking_recv() {
            for ask in &batch.asks {
                self.judge(ask, &batch.bodies[ask.body.clone()]);
            }
            self.journal.flush(&Progress {
                requests: self.tally.requests,
                elapsed: batch.asks.last().map_or(Duration::ZERO, |ask| ask.ended_after),
                numbers: self.tally.numbers,
                repeats: self.tally.repeats,
                failures: self.tally.failures(),
            });
        }
        (self.tally, self.journal)
    }

    fn judge(&mut self, ask: &Ask, body: &[u8]) {
        let mut verdict = judge(ask, body, self.count);
        if let Some(answer) = &verdict.answer {
            let seen = &mut self.tally.seen;
            let sightings = answer.numbers().map(|number| (number, seen.note(ask.pool, number)));
            verdict.repeats = sightings.filter(|(_, seen)| *seen != Sighting::New).collect();
        }
        let pool = self.pools.name(ask.pool);
        self.tally.count(ask, pool, &verdict);
        self.journal.write(ask, pool, &verdict);
    }
}

/// How a repeat is told.
pub(crate) fn when(sighting: Sighting) -> &'static str {
    match sighting {
        Sighting::New => "for the first time",
        Sighting::Again => "already in this run",
        Sighting::FromEarlierRun => "already in an earlier run",
    }
}

/// What an ask came to, its numbers aside.
fn judge<'body>(ask: &Ask, body: &'body [u8], count: Option<u32>) -> Verdict<'body> {
    let other = |kind, detail| Verdict { kind, answer: None, repeats: Vec::new(), detail };
    let reply = match &ask.outcome {
        Ok(reply) => reply,
        Err(Failure::TimedOut(limit)) => {
            return other(Kind::TimedOut, format!("no whole answer within {}", time(*limit)));
        }
        Err(Failure::NoConnection(reason)) => return other(Kind::NoConnection, reason.clone()),
        Err(Failure::Broken(reason)) => return other(Kind::Broken, reason.clone()),
        Err(Failure::Unreadable(reason)) => return other(Kind::WrongAnswer, reason.clone()),
    };
    match *reply {
        Reply { status: 200, .. } => match Answer::parse(body, count) {
            Ok(answer) => Verdict { answer: Some(answer), ..other(Kind::Numbers, String::new()) },
            Err(reason) => other(Kind::WrongAnswer, format!("{reason}: {}", excerpt(body))),
        },
        Reply { status: 503, retry_after: Some(wait), .. } => {
            other(Kind::Refilling, retry(wait, ask.again_after))
        }
        Reply { status: 429, retry_after: Some(wait), .. } => {
            other(Kind::Busy, retry(wait, ask.again_after))
        }
        Reply { status: 410, .. } if says_exhausted(body) => other(Kind::Exhausted, excerpt(body)),
        Reply { status, .. } => other(Kind::Status(status), excerpt(body)),
    }
}

fn retry(wait: Duration, again_after: Option<Duration>) -> String {
    match again_after {
        Some(_) => format!("Retry-After {}, so asking again", time(wait)),
        None => format!("Retry-After {}, not asked again", time(wait)),
    }
}

/// The beginning of a body, on one line.
fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let mut chars = text.chars();
    let mut excerpt: String = chars.by_ref().take(EXCERPT_CHARS).flat_map(on_one_line).collect();
    if chars.next().is_some() {
        excerpt.push('…');
    }
    if excerpt.is_empty() { "(empty body)".to_owned() } else { excerpt }
}

/// Control characters as their escapes: what a server sends must not steer the terminal.
fn on_one_line(each: char) -> impl Iterator<Item = char> {
    let escaped = each.is_control().then(|| each.escape_default());
    let plain = (!each.is_control()).then_some(each);
    escaped.into_iter().flatten().chain(plain)
}

fn nanos(latency: Duration) -> u64 {
    u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX)
}
