//! What a body says, and whether it is what was asked for. Pure; remembers nothing.
//!
//! Numbers stay the text that came: read into an `f64`, `9007199254740993` and `9007199254740992`
//! would be one, and `1` and `1.0` too.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

/// A shard is named after its file, and no file system takes longer names.
const SHARD_NAME_LIMIT_BYTES: usize = 255;

/// Exactly the numbers that were asked for.
#[derive(Debug)]
pub(crate) struct Answer<'body> {
    numbers: Numbers<'body>,
    shard: Cow<'body, str>,
    shards: BTreeMap<String, u64>,
}

/// Most answers hold one, which needs no allocation.
#[derive(Debug)]
enum Numbers<'body> {
    One(&'body RawValue),
    Many(Vec<&'body RawValue>),
}

impl<'body> Answer<'body> {
    /// Reads the body of a 200; `count` is what was asked for.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(crate) fn parse(body: &'body [u8], count: Option<u32>) -> Result<Self, String> {
        let text = std::str::from_utf8(body).map_err(|_| "the body is not UTF-8".to_owned())?;
        let wire: Wire<'body> =
            serde_json::from_str(text).map_err(|error| format!("not an answer: {error}"))?;
        let numbers = match (wire.number, wire.numbers, count) {
            (Some(number), None, None | Some(1)) => Numbers::One(number),
            (None, Some(numbers), Some(_)) => Numbers::Many(numbers),
            (Some(_), None, Some(count)) => return Err(format!("1 number for --count {count}")),
            (None, Some(_), None) => return Err("numbers, when one was asked for".to_owned()),
            (Some(_), Some(_), _) => return Err("both number and numbers".to_owned()),
            (None, None, _) => return Err("no number".to_owned()),
        };
        let answer = Self { numbers, shard: wire.shard, shards: wire.shards };
        answer.check(count.unwrap_or(1), wire.count)?;
        Ok(answer)
    }

    fn check(&self, asked: u32, claimed: Option<u64>) -> Result<(), String> {
        let held = self.raw().len() as u64;
        if held != u64::from(asked) {
            return Err(format!("{held} numbers for --count {asked}"));
        }
        if claimed.is_some_and(|claimed| claimed != held) {
            return Err("count is not how many numbers there are".to_owned());
        }
        if let Some(other) = self.numbers().find(|text| !text.starts_with(is_number_start)) {
            return Err(format!("not a number: {other}"));
        }
        if !self.shards.is_empty() && self.shards.values().try_fold(0, add) != Some(held) {
            return Err("shards do not add up to how many numbers there are".to_owned());
        }
        match self.shards().find(|(name, _)| !is_shard_name(name)) {
            Some((name, _)) => Err(format!("not the name of a shard: {name}")),
            None => Ok(()),
        }
    }

    /// The exact text of each number.
    pub(crate) fn numbers(&self) -> impl ExactSizeIterator<Item = &'body str> {
        self.raw().iter().map(|raw| raw.get())
    }

    /// Where they came from, and how many of them. Nothing when the answer does not say.
    pub(crate) fn shards(&self) -> impl Iterator<Item = (&str, u64)> {
        let one = (!self.shard.is_empty()).then_some((&*self.shard, 1));
        one.into_iter().chain(self.shards.iter().map(|(name, count)| (name.as_str(), *count)))
    }

    fn raw(&self) -> &[&'body RawValue] {
        match &self.numbers {
            Numbers::One(number) => std::slice::from_ref(number),
            Numbers::Many(numbers) => numbers,
        }
    }
}

/// True of an error body that says the range is used up, for good.
pub(crate) fn says_exhausted(body: &[u8]) -> bool {
    serde_json::from_slice::<WireError<'_>>(body).is_ok_and(|error| error.code == "exhausted")
}

/// The two shapes of DESIGN.md section 7 in one. Keys that we don't know are allowed: a server
/// newer than this tool may say more.
#[derive(Deserialize)]
struct Wire<'body> {
    #[serde(borrow)]
    number: Option<&'body RawValue>,
    #[serde(borrow)]
    numbers: Option<Vec<&'body RawValue>>,
    count: Option<u64>,
    #[serde(borrow, default)]
    shard: Cow<'body, str>,
    #[serde(default)]
    shards: BTreeMap<String, u64>,
}

#[derive(Deserialize)]
struct WireError<'body> {
    #[serde(borrow)]
    code: Cow<'body, str>,
}

/// A raw value is JSON already, and only its numbers begin like this.
fn is_number_start(first: char) -> bool {
    first == '-' || first.is_ascii_digit()
}

/// Names go on a line of the console and of the log, so they must not break one.
fn is_shard_name(name: &str) -> bool {
    let fits = (1..=SHARD_NAME_LIMIT_BYTES).contains(&name.len());
    fits && !name.contains(|each: char| each.is_control() || each.is_whitespace())
}

fn add(sum: u64, count: &u64) -> Option<u64> {
    sum.checked_add(*count)
}

#[cfg(test)]
mod tests {
    use super::*;

    type NumbersAndShards = (Vec<String>, Vec<(String, u64)>);

    fn read(body: &str, count: Option<u32>) -> Result<NumbersAndShards, String> {
        let answer = Answer::parse(body.as_bytes(), count)?;
        let numbers = answer.numbers().map(str::to_owned).collect();
        Ok((numbers, answer.shards().map(|(name, count)| (name.to_owned(), count)).collect()))
    }

    fn check(body: &str, count: Option<u32>, numbers: &[&str], shards: &[(&str, u64)]) {
        let (read_numbers, read_shards) = read(body, count).expect(body);
        let shards: Vec<_> = shards.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        assert_eq!(
            (read_numbers, read_shards),
            (numbers.iter().map(|&n| n.to_owned()).collect(), shards)
        );
    }

    #[test]
    fn both_shapes_of_an_answer_are_read() {
        check(
            r#"{"number": 4837201, "shard": "int_shard_1.db"}"#,
            None,
            &["4837201"],
            &[("int_shard_1.db", 1)],
        );
        check(r#"{"number":1.50}"#, None, &["1.50"], &[]);
        check(r#"{"number":-0.5e+3,"new":[{}]}"#, Some(1), &["-0.5e+3"], &[]);
        check(
            r#"{"count":3,"numbers":[1, 1.0 ,10],"shards":{"a":1,"\u0062":2}}"#,
            Some(3),
            &["1", "1.0", "10"],
            &[("a", 1), ("b", 2)],
        );
    }

    #[test]
    fn what_was_not_asked_for_is_refused() {
        for (body, count) in [
            ("", None),
            ("<html>", None),
            (r#"{"number": 1"#, None),
            (r#"{"number": 01}"#, None),
            (r#"{"number": 1} 2"#, None),
            (r#"{"number": "1"}"#, None),
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
            read(body, count).expect_err(body);
        }
        Answer::parse(b"{\"number\": 1, \"shard\": \"\xff\"}", None).expect_err("not UTF-8");
    }
}
