//! The response of `/status`. Fields that are not shown are not parsed, so that a newer server can send more.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Debug, Deserialize)]
pub(super) struct Page {
    pub(super) version: Text,
    pub(super) time: Moment,
    pub(super) uptime_seconds: f64,
    pub(super) status: Text,
    pub(super) connections: u64,
    pub(super) requests: Requests,
    pub(super) history: History,
    pub(super) pools: BTreeMap<Text, Pool>,
    pub(super) receipts: Receipts,
    pub(super) events: Vec<Event>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Requests {
    pub(super) total: u64,
    pub(super) per_second: f64,
    pub(super) p50_seconds: Option<f64>,
    pub(super) p99_seconds: Option<f64>,
    pub(super) p999_seconds: Option<f64>,
    pub(super) by_status: BTreeMap<Text, u64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct History {
    pub(super) step_seconds: f64,
    pub(super) numbers_per_second: Vec<Option<f64>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Pool {
    pub(super) status: Text,
    pub(super) reason: Option<Text>,
    pub(super) range: Range,
    pub(super) issued: u64,
    pub(super) pooled: u64,
    pub(super) free: u64,
    pub(super) burned: u64,
    pub(super) issued_per_second: f64,
    pub(super) seconds_until_used_up: Option<f64>,
    pub(super) guess_chance: f64,
    pub(super) shards: Vec<Shard>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Range {
    pub(super) min: Bound,
    pub(super) max: Bound,
}

/// An end of a range: a number with all its decimals, as in the response, or a code.
#[derive(Debug, Deserialize)]
#[serde(from = "Box<RawValue>")]
pub(super) struct Bound(Text);

impl From<Box<RawValue>> for Bound {
    fn from(value: Box<RawValue>) -> Self {
        let text = serde_json::from_str(value.get()).unwrap_or_else(|_| value.get().to_owned());
        Self(text.into())
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.0.as_str())
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Shard {
    pub(super) name: Text,
    pub(super) state: Text,
    pub(super) left: u64,
    pub(super) size: u64,
    pub(super) standby: bool,
    pub(super) progress: Option<f64>,
    pub(super) last_refill: Option<LastRefill>,
}

#[derive(Debug, Deserialize)]
pub(super) struct LastRefill {
    pub(super) at: Moment,
    pub(super) seconds: f64,
    pub(super) outcome: Text,
}

#[derive(Debug, Deserialize)]
pub(super) struct Receipts {
    pub(super) count: u64,
    pub(super) replayed: u64,
    pub(super) waiting: u64,
    pub(super) trouble: Option<Text>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Event {
    pub(super) at: Moment,
    pub(super) kind: Text,
    pub(super) pool: Option<Text>,
    pub(super) shard: Option<Text>,
    pub(super) message: Text,
}

/// A text that is safe to print: a server can't use it to control the terminal.
#[derive(Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(from = "String")]
pub(super) struct Text(String);

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(
            text.chars()
                .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
                .collect(),
        )
    }
}

impl Text {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A time of RFC 3339.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Moment(SystemTime);

impl TryFrom<String> for Moment {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = humantime::parse_rfc3339(&text);
        parsed.map(Self).map_err(|error| format!("{text:?} is not a time: {error}"))
    }
}

impl Moment {
    /// Returns the seconds from `earlier` to this, or 0 if `earlier` is later.
    pub(super) fn seconds_since(self, earlier: Self) -> f64 {
        self.0.duration_since(earlier.0).unwrap_or_default().as_secs_f64()
    }
}
