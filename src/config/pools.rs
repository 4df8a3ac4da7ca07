//! The pools: the keys under `pools`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::Value;

use super::values::{Integer, boolean, text};
use super::{LeaseConfig, Recorded, RefillConfig, RefusedKey};
use crate::space::{CodeFormat, DECIMALS_MAX, Space, SpaceError};

/// The most shards of one pool. Each is an open file and a task.
const SHARDS_MAX: u16 = 1024;

/// The most numbers in a shard. A build holds its values in memory, 8 bytes each.
const SHARD_SIZE_MAX: u64 = 100_000_000;

/// The default number of numbers in a shard, for pools that the built-in file does not have.
const SHARD_SIZE_DEFAULT: u64 = 2_500_000;

/// One pool.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// The `type` of a request, and the beginning of the file names.
    pub name: PoolName,
    /// The range of its numbers.
    pub space: Space,
    /// The number of shards, 1 to 1024.
    pub shards: u16,
    /// Numbers in one generation of a shard.
    pub shard_size: u32,
    /// How its shards lease rows.
    pub lease: LeaseConfig,
    /// When and how its shards are refilled.
    pub refill: RefillConfig,
    /// The responses that leave a receipt.
    pub receipts: Recorded,
    /// In a fleet, the file of the numbers that were issued by other means before the space was made.
    pub used_file: Option<PathBuf>,
}

/// A pool's name, fit for a file name and for a URL: 1 to 32 of `a-z 0-9 _`, a letter first. No file of a
/// pool has the name of another pool's file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolName(String);

impl PoolName {
    /// Returns the name, if it is valid.
    pub fn new(name: &str) -> Option<Self> {
        let fit = (1..=32).contains(&name.len())
            && name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            && !shares_file_names(name);
        fit.then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Returns whether the files of a pool of this name could be mistaken for those of another pool:
/// `used_numbers_shard_0.db` would be a shard of "used_numbers" and the ledger of "shard_0".
fn shares_file_names(name: &str) -> bool {
    name.contains("_shard_") || name == "used_numbers"
}

impl std::fmt::Display for PoolName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct PoolKeys {
    #[serde(default = "enabled", deserialize_with = "boolean")]
    enabled: bool,
    #[serde(serialize_with = "unquoted_if_set", skip_serializing_if = "Option::is_none")]
    min: Option<Value>,
    #[serde(serialize_with = "unquoted_if_set", skip_serializing_if = "Option::is_none")]
    max: Option<Value>,
    decimals: Option<Integer<0, { DECIMALS_MAX as u64 }>>,
    /// The format of the codes, in place of min, max and decimals.
    #[serde(default, deserialize_with = "text_if_set")]
    pattern: Option<String>,
    #[serde(default, deserialize_with = "text_if_set")]
    alphabet: Option<String>,
    #[serde(default, deserialize_with = "text_if_set")]
    check: Option<String>,
    #[serde(default = "auto", serialize_with = "unquoted")]
    shards: Value,
    shard_size: Option<Integer<1, SHARD_SIZE_MAX>>,
    #[serde(default)]
    receipts: Recorded,
    used_file: Option<PathBuf>,
}

fn enabled() -> bool {
    true
}

fn auto() -> Value {
    "auto".into()
}

fn unquoted_if_set<S: Serializer>(value: &Option<Value>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => unquoted(value, serializer),
        None => serializer.serialize_none(),
    }
}

fn text_if_set<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text(deserializer).map(Some)
}

/// Serializes a value that an environment variable or a flag gave as a text.
fn unquoted<S: Serializer>(value: &Value, serializer: S) -> Result<S::Ok, S::Error> {
    let plain = value.as_str().and_then(|text| text.parse::<Value>().ok());
    plain.as_ref().unwrap_or(value).serialize(serializer)
}

/// Returns the text of a value. A TOML float is a double, whose shortest text equals the file's if that has up
/// to 15 digits.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Float(number) => number.to_string(),
        other => other.to_string(),
    }
}

/// Validates all pools, and returns those that are enabled. `only` names the only one in use, if it is given.
pub(super) fn validate(
    pools: &mut BTreeMap<String, PoolKeys>,
    only: Option<&str>,
    supply: (LeaseConfig, RefillConfig),
) -> Result<Vec<PoolConfig>, RefusedKey> {
    let mut used = Vec::new();
    for (name, keys) in pools.iter_mut() {
        let pool = keys.validate(name, supply)?;
        if keys.enabled && only.is_none_or(|only| only == name) {
            used.push(pool);
        }
    }
    if used.is_empty() {
        let names: Vec<_> = pools.keys().map(String::as_str).collect();
        let problem = format!("no pool is left to serve; the known pools are {}", names.join(", "));
        return Err(RefusedKey::new(
            only.map_or("pools".into(), |o| format!("pools.{o}")),
            problem,
        ));
    }
    Ok(used)
}

impl PoolKeys {
    /// Validates the keys, and sets those that are not set.
    fn validate(
        &mut self,
        name: &str,
        (lease, refill): (LeaseConfig, RefillConfig),
    ) -> Result<PoolConfig, RefusedKey> {
        let refused =
            |field: &str, problem| RefusedKey::new(format!("pools.{name}.{field}"), problem);
        let pool_name = PoolName::new(name).ok_or_else(|| {
            let problem = match shares_file_names(name) {
                true => {
                    "its files could be mistaken for those of another pool, as used_numbers_shard_0.db is \
                     the ledger of a pool shard_0; choose a name without \"_shard_\" that is not \
                     used_numbers"
                }
                false => {
                    "not valid in a file name; allowed: 1 to 32 characters of a-z, 0-9 and _, \
                     starting with a letter and without \"_shard_\""
                }
            };
            RefusedKey::new(format!("pools.{name}"), problem)
        })?;
        let space = self.space(name)?;
        let shards = match &*text_of(&self.shards) {
            "auto" => (num_cpus::get() / 2).clamp(2, SHARDS_MAX.into()) as u16,
            // Any other text becomes 0, which is refused.
            text => text.parse().unwrap_or(0),
        };
        if !(1..=SHARDS_MAX).contains(&shards) {
            return Err(refused("shards", format!("allowed: \"auto\" and 1 to {SHARDS_MAX}")));
        }
        let default_size = space.size().div_ceil(shards.into()).min(SHARD_SIZE_DEFAULT);
        let size = self.shard_size.get_or_insert(Integer(default_size)).0;
        if size > space.size() {
            let problem = format!(
                "a shard of {size} is larger than the range of {} numbers; allowed: 1 to {}",
                space.size(),
                space.size().min(SHARD_SIZE_MAX)
            );
            return Err(refused("shard_size", problem));
        }
        let shard_size = u32::try_from(size).expect("its type allows up to SHARD_SIZE_MAX");
        let (receipts, used_file) = (self.receipts, self.used_file.clone());
        let name = pool_name;
        Ok(PoolConfig { name, space, shards, shard_size, lease, refill, receipts, used_file })
    }

    /// Validates the keys of the range: all codes of a pattern, or the numbers from min to max.
    fn space(&mut self, name: &str) -> Result<Space, RefusedKey> {
        let refused =
            |field: &str, problem| Err(RefusedKey::new(format!("pools.{name}.{field}"), problem));
        if let Some(pattern) = &self.pattern {
            let numeric = [
                ("min", self.min.is_some()),
                ("max", self.max.is_some()),
                ("decimals", self.decimals.is_some()),
            ];
            if let Some((field, _)) = numeric.iter().find(|(_, is_set)| *is_set) {
                let problem = "not allowed beside pattern, whose codes are the range; int and float have a range by default, so \
                     give a pool of codes another name";
                return refused(field, problem.to_owned());
            }
            let alphabet = self.alphabet.get_or_insert("digits".to_owned());
            let check = self.check.get_or_insert("none".to_owned());
            return match CodeFormat::new(pattern, alphabet, check) {
                Ok(format) => Ok(Space::of_codes(format)),
                Err(error) => refused(error.setting(), error.to_string()),
            };
        }
        for (field, is_set) in
            [("alphabet", self.alphabet.is_some()), ("check", self.check.is_some())]
        {
            if is_set {
                return refused(field, "allowed only beside pattern".to_owned());
            }
        }
        let (Some(min), Some(max)) = (&self.min, &self.max) else {
            let field = if self.min.is_none() { "min" } else { "max" };
            let problem = "is missing: a pool needs min and max, or a pattern";
            return refused(field, problem.to_owned());
        };
        let (min, max) = (text_of(min), text_of(max));
        let decimals = self.decimals.get_or_insert(Integer(0)).0 as u8;
        Space::new(&min, &max, decimals).or_else(|error| {
            let field = match &error {
                SpaceError::NotANumber(text)
                | SpaceError::TooManyDecimals { text, .. }
                | SpaceError::TooLarge { text, .. }
                    if *text == max =>
                {
                    "max"
                }
                _ => "min",
            };
            let problem = format!(
                "{error}; allowed: min up to max, integers up to 2^53-1, or up to 15 significant \
                 digits with 1 to 14 decimals"
            );
            refused(field, problem)
        })
    }
}
