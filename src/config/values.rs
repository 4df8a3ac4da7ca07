//! How the value of one setting is read. A file has it as TOML; an environment variable or a flag has it as a
//! text, which is read by the type of the setting.

use std::str::FromStr;
use std::time::{Duration, SystemTime};

use serde::de::{self, DeserializeOwned, Deserializer};
use serde::{Deserialize, Serialize};
use toml::Value;

/// The error for a name that [`is_name`] refuses.
pub(super) const NAME_ALLOWED: &str =
    "allowed: 1 to 64 characters of a-z, A-Z, 0-9, '.', '_' and '-'";

/// The longest wait in milliseconds: an hour.
const WAIT_MS_MAX: u64 = 3_600_000;

/// An integer of at least `MIN` and at most `MAX`.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Integer<const MIN: u64, const MAX: u64>(pub(super) u64);

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Integer<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let integer = scalar(deserializer).filter(|integer| (MIN..=MAX).contains(integer));
        let problem = || de::Error::custom(format!("allowed: an integer, {MIN} to {MAX}"));
        integer.map(Self).ok_or_else(problem)
    }
}

/// A wait in milliseconds.
pub(super) type WaitMs = Integer<1, WAIT_MS_MAX>;

impl WaitMs {
    pub(super) fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

/// Deserializes a number.
pub(super) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    scalar(deserializer).ok_or_else(|| de::Error::custom("allowed: a number"))
}

/// Deserializes a boolean.
pub(super) fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    scalar(deserializer).ok_or_else(|| de::Error::custom("allowed: true or false"))
}

/// Deserializes a number or a boolean, which may be given as a text.
fn scalar<'de, T: DeserializeOwned + FromStr>(deserializer: impl Deserializer<'de>) -> Option<T> {
    match Value::deserialize(deserializer).ok()? {
        Value::String(text) => text.parse().ok(),
        value => value.try_into().ok(),
    }
}

/// Deserializes a text. A number is refused, because `2.10` would become the text `2.1`.
pub(super) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(text),
        other => Err(de::Error::custom(format!(
            "a value of the type {} instead of a text; allowed: a text in quotes",
            other.type_str()
        ))),
    }
}

/// Deserializes the text of a date or a time, which TOML also has without quotes.
pub(super) fn time_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(Some(text)),
        other => Ok(Some(other.to_string())),
    }
}

/// Parses a date, which stands for its beginning, or a time, both in UTC.
pub(crate) fn parse_time(text: &str) -> Result<SystemTime, &'static str> {
    let is_date = !text.contains(':');
    let time = if is_date { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let problem = "allowed: a date or a time in UTC, such as 2027-01-31 or 2027-01-31T12:00:00Z";
    humantime::parse_rfc3339(&time).map_err(|_| problem)
}

/// Returns whether this is a name for people, fit for a config file, a log and a key of any store.
pub(super) fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}
