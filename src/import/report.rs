//! The report of an import, as programs get it. Knows nothing of how numbers are marked.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Outcome;
use crate::config::PoolName;
use crate::space::{Space, Value};

/// The outcome of an import for programs. `marked`, `repeated`, `known` and `issued_before` add up to the numbers
/// that were given.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) pool: String,
    /// Those that could have been issued, and now can't.
    pub(crate) marked: u64,
    /// Those among `marked` that were in shards.
    pub(crate) marked_in_shards: u64,
    /// Those that were given more than once, without the first time of each.
    pub(crate) repeated: u64,
    /// Those that an earlier import has marked.
    pub(crate) known: u64,
    /// Those that this server had issued or burned before.
    pub(crate) issued_before: u64,
    /// Whether an earlier import was interrupted. If it was of the same numbers, it is complete now.
    pub(crate) interrupted: bool,
    /// The numbers of `issued_before`.
    pub(crate) conflicts: Vec<Conflict>,
}

/// A number that was issued before it was imported.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Conflict {
    /// A JSON number, or a code as a string.
    number: Box<RawValue>,
    /// The sequence number of its receipt, if there is one.
    receipt: Option<u64>,
}

impl Conflict {
    /// Returns the number or code as text.
    pub(crate) fn number(&self) -> String {
        let json = self.number.get();
        serde_json::from_str(json).unwrap_or_else(|_| json.to_owned())
    }

    /// Returns the sequence number of its receipt, if there is one.
    pub(crate) fn receipt(&self) -> Option<u64> {
        self.receipt
    }
}

impl Report {
    /// Creates the report. `receipt` returns the sequence number of a number's receipt, if there is one.
    pub(crate) fn new(
        pool: &PoolName,
        space: &Space,
        outcome: &Outcome,
        mut receipt: impl FnMut(Value) -> Option<u64>,
    ) -> Self {
        let conflict = |&value: &Value| {
            let mut json = String::new();
            space.number(value).push_json(&mut json);
            let number = RawValue::from_string(json).expect("a number's text is JSON");
            Conflict { number, receipt: receipt(value) }
        };
        Self {
            pool: pool.to_string(),
            marked: outcome.marked,
            marked_in_shards: outcome.in_shards,
            repeated: outcome.repeated,
            known: outcome.known,
            issued_before: outcome.issued.len() as u64,
            interrupted: outcome.interrupted,
            conflicts: outcome.issued.iter().map(conflict).collect(),
        }
    }

    /// Adds the report of other numbers.
    pub(crate) fn add(&mut self, other: Self) {
        self.marked += other.marked;
        self.marked_in_shards += other.marked_in_shards;
        self.repeated += other.repeated;
        self.known += other.known;
        self.issued_before += other.issued_before;
        self.interrupted |= other.interrupted;
        self.conflicts.extend(other.conflicts);
    }
}
