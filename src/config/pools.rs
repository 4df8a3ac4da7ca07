//! The pools: the keys under `pools`.

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::{ConfigError, LeaseConfig, RefillConfig};
use crate::space::{Space, SpaceError};

/// The most shards of one pool. Each is an open file and a task.
const SHARDS_MAX: u64 = 1024;

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
}

/// A pool's name, fit for a file name and for a URL: 1 to 32 of `a-z 0-9 _`, a letter first. No file of a
/// pool has the name of another pool's file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolName(String);

impl PoolName {
    /// Returns the name, if it is valid.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let fit = (1..=32).contains(&name.len())
            && name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            && !shares_file_names(name);
        fit.then(|| Self(name.to_owned()))
    }

    /// Returns the name as text.
    #[must_use]
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolKeys {
    #[serde(default = "enabled_by_default")]
    pub(super) enabled: bool,
    min: NumberText,
    max: NumberText,
    #[serde(default)]
    decimals: u8,
    #[serde(default)]
    shards: ShardCount,
    shard_size: Option<u64>,
}

fn enabled_by_default() -> bool {
    true
}

impl PoolKeys {
    pub(super) fn validate(
        &self,
        name: &str,
        (lease, refill): (LeaseConfig, RefillConfig),
        within: impl Fn(&str, u64, u64, u64) -> Result<u64, ConfigError>,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<PoolConfig, ConfigError> {
        let key = |field: &str| format!("pools.{name}.{field}");
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
            refused(&format!("pools.{name}"), problem.to_owned())
        })?;
        let space = Space::new(&self.min.0, &self.max.0, self.decimals).map_err(|error| {
            let field = match &error {
                SpaceError::Decimals(_) => "decimals",
                SpaceError::NotANumber(text)
                | SpaceError::TooManyDecimals { text, .. }
                | SpaceError::TooLarge { text, .. }
                    if *text == self.max.0 =>
                {
                    "max"
                }
                _ => "min",
            };
            let problem = format!(
                "{error}; allowed: min up to max, integers up to 2^53-1, or up to 15 significant \
                 digits with 1 to 14 decimals"
            );
            refused(&key(field), problem)
        })?;

        let shards = match self.shards {
            ShardCount::Auto => (num_cpus::get() as u64 / 2).max(2),
            ShardCount::Exactly(shards) if (1..=SHARDS_MAX).contains(&shards) => shards,
            ShardCount::Exactly(_) => {
                let problem = format!("allowed: \"auto\" and 1 to {SHARDS_MAX}");
                return Err(refused(&key("shards"), problem));
            }
        };
        let default_size = space.size().div_ceil(shards).min(SHARD_SIZE_DEFAULT);
        let size_max = space.size().min(SHARD_SIZE_MAX);
        let size = self.shard_size.unwrap_or(default_size);
        if size > space.size() {
            let problem = format!(
                "a shard of {size} is larger than the range of {} numbers; allowed: 1 to {size_max}",
                space.size()
            );
            return Err(refused(&key("shard_size"), problem));
        }
        let size = within(&key("shard_size"), size, 1, size_max)?;
        Ok(PoolConfig {
            name: pool_name,
            space,
            shards: u16::try_from(shards).expect("up to SHARDS_MAX was checked above"),
            shard_size: u32::try_from(size).expect("up to SHARD_SIZE_MAX was checked above"),
            lease,
            refill,
        })
    }
}

/// `shards = "auto"` or a number.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(from = "NumberText")]
enum ShardCount {
    #[default]
    Auto,
    Exactly(u64),
}

impl From<NumberText> for ShardCount {
    fn from(text: NumberText) -> Self {
        // Anything else becomes 0, which is refused.
        if text.0 == "auto" { Self::Auto } else { Self::Exactly(text.0.parse().unwrap_or(0)) }
    }
}

/// A number's text, whether a file has it as an integer, a float or a string. A TOML float is parsed as a
/// double, whose shortest text equals the file's if that has up to 15 digits.
struct NumberText(String);

impl<'de> Deserialize<'de> for NumberText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyNumber;

        impl Visitor<'_> for AnyNumber {
            type Value = NumberText;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a number")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<NumberText, E> {
                Ok(NumberText(number.to_string()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<NumberText, E> {
                Ok(NumberText(number.to_string()))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<NumberText, E> {
                Ok(NumberText(number.to_string()))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<NumberText, E> {
                Ok(NumberText(text.to_owned()))
            }
        }

        deserializer.deserialize_any(AnyNumber)
    }
}
