//! The numbers in the body of a response. Remembers nothing.
//!
//! Numbers and codes stay the JSON that came: as `f64`, `9007199254740993` and `9007199254740992` would be equal,
//! and `1` and `1.0` too.

use std::collections::BTreeMap;

use anyhow::{bail, ensure};
use serde::Deserialize;
use serde_json::value::RawValue;

/// The name under which numbers are counted if the response names no shard.
const NO_SHARD: &str = "(no shard named)";

/// As many numbers as were asked for.
#[derive(Debug, Default)]
pub(crate) struct Numbers<'body> {
    /// The exact text of each.
    pub(crate) texts: Vec<&'body str>,
    /// How many of them each shard gave.
    pub(crate) shards: BTreeMap<String, u64>,
}

/// Both forms of a body: one number, and the numbers for `--count`. Unknown keys are allowed, since a
/// newer server may send more.
#[derive(Deserialize)]
struct Body<'body> {
    #[serde(borrow)]
    number: Option<&'body RawValue>,
    #[serde(borrow)]
    numbers: Option<Vec<&'body RawValue>>,
    #[serde(borrow)]
    code: Option<&'body RawValue>,
    #[serde(borrow)]
    codes: Option<Vec<&'body RawValue>>,
    count: Option<u64>,
    shard: Option<String>,
    #[serde(default)]
    shards: BTreeMap<String, u64>,
}

impl<'body> Numbers<'body> {
    /// Reads the body of a 200 for a request of `count` numbers.
    ///
    /// # Errors
    /// The body is not what was requested.
    pub(crate) fn parse(body: &'body [u8], count: Option<u32>) -> anyhow::Result<Self> {
        let body: Body<'body> = serde_json::from_slice(body)?;
        let has_codes = body.code.is_some() || body.codes.is_some();
        let raw = match (body.number.xor(body.code), body.numbers.xor(body.codes), count) {
            (Some(number), None, None | Some(1)) => vec![number],
            (None, Some(numbers), Some(_)) => numbers,
            _ => bail!("expected one number, or numbers for --count"),
        };
        let texts: Vec<&str> = raw.into_iter().map(RawValue::get).collect();
        let mut shards = body.shards;
        shards.extend(body.shard.map(|name| (name, 1)));
        if shards.is_empty() {
            shards.insert(NO_SHARD.to_owned(), texts.len() as u64);
        } else if let Some(name) = shards.keys().find(|name| name.contains(breaks_a_line)) {
            bail!("not the name of a shard: {name:?}");
        }
        let is_good = if has_codes { is_code } else { is_number };
        if let Some(other) = texts.iter().find(|text| !is_good(text)) {
            bail!("not a number or a code: {other}");
        }
        let (found, asked) = (texts.len() as u64, count.unwrap_or(1));
        ensure!(found == u64::from(asked), "{found} numbers for --count {asked}");
        ensure!(body.count.is_none_or(|count| count == found), "count is not that of numbers");
        let sum = shards.values().try_fold(0_u64, |sum, &count| sum.checked_add(count));
        ensure!(sum == Some(found), "shards do not add up to the count of numbers");
        Ok(Self { texts, shards })
    }
}

/// Returns whether a text is a JSON string.
pub(crate) fn is_code(text: &str) -> bool {
    text.starts_with('"') && serde_json::from_str::<String>(text).is_ok()
}

/// Returns whether a text is a JSON number and nothing else, not even a space around it.
pub(crate) fn is_number(text: &str) -> bool {
    // No other value in JSON begins like this.
    text.starts_with(|first: char| first == '-' || first.is_ascii_digit())
        && serde_json::from_str::<&RawValue>(text).is_ok_and(|raw| raw.get().len() == text.len())
}

/// Returns true for the body of an error that says the range is used up.
pub(crate) fn is_exhausted(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Error {
        code: String,
    }
    serde_json::from_slice::<Error>(body).is_ok_and(|error| error.code == "exhausted")
}

fn breaks_a_line(c: char) -> bool {
    c.is_control() || c.is_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, count: Option<u32>, texts: &[&str], shards: &[(&str, u64)]) {
        let numbers = Numbers::parse(body.as_bytes(), count).expect(body);
        assert_eq!(numbers.texts, texts);
        assert_eq!(numbers.shards, shards.iter().map(|&(name, n)| (name.into(), n)).collect());
    }

    #[test]
    fn both_forms_of_a_body_are_read() {
        check(
            r#"{"number": 4837201, "shard": "int_shard_1.db"}"#,
            None,
            &["4837201"],
            &[("int_shard_1.db", 1)],
        );
        check(r#"{"code":"A\"1","shard":"a"}"#, None, &[r#""A\"1""#], &[("a", 1)]);
        check(r#"{"count":1,"codes":["1"]}"#, Some(1), &[r#""1""#], &[(NO_SHARD, 1)]);
        check(r#"{"number":1.50}"#, None, &["1.50"], &[(NO_SHARD, 1)]);
        check(r#"{"number":-0.5e+3,"new":[{}]}"#, Some(1), &["-0.5e+3"], &[(NO_SHARD, 1)]);
        check(
            r#"{"count":3,"numbers":[1, 1.0 ,10],"shards":{"a":1,"\u0062":2}}"#,
            Some(3),
            &["1", "1.0", "10"],
            &[("a", 1), ("b", 2)],
        );
    }

    #[test]
    fn everything_else_is_refused() {
        for (body, count) in [
            ("", None),
            ("<html>", None),
            (r#"{"number": 1"#, None),
            (r#"{"number": 01}"#, None),
            (r#"{"number": 1} 2"#, None),
            (r#"{"number": "1"}"#, None),
            (r#"{"code": 1}"#, None),
            (r#"{"number": 1, "code": "1"}"#, None),
            (r#"{"number": null}"#, None),
            (r#"{"number": true}"#, None),
            (r#"{"number": NaN}"#, None),
            (r#"{"numbers": [1]}"#, None),
            (r#"{"number": 1, "numbers": [1]}"#, Some(1)),
            (r#"{"number": 1}"#, Some(2)),
            (r#"{"numbers": [1]}"#, Some(2)),
            (r#"{"numbers": [1, 2, 3]}"#, Some(2)),
            (r#"{"numbers": [1, "2"]}"#, Some(2)),
            (r#"{"count": 3, "numbers": [1, 2]}"#, Some(2)),
            (r#"{"numbers": [1, 2], "shards": {"a": 1}}"#, Some(2)),
            (r#"{"number": 1, "shard": "a\nb"}"#, None),
        ] {
            Numbers::parse(body.as_bytes(), count).expect_err(body);
        }
        Numbers::parse(b"{\"number\": 1, \"shard\": \"\xff\"}", None).expect_err("not UTF-8");
    }
}
