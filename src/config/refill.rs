//! When and how shards are refilled: the keys under `refill`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::RefusedKey;
use super::values::{WaitMs, number};

/// When and how shards are refilled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RefillConfig {
    /// Share of the shard size below which the next generation is built, 0 to 1.
    pub low_water: f64,
    /// First wait after a failure.
    pub retry: Duration,
    /// Longest wait after failures in a row.
    pub retry_limit: Duration,
}

impl RefillConfig {
    /// Returns the number of rows below which a shard of this size gets its next generation, at least one.
    pub fn low_water_rows(&self, shard_size: u32) -> u64 {
        (self.low_water * f64::from(shard_size)).ceil() as u64
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RefillKeys {
    #[serde(deserialize_with = "number")]
    low_water: f64,
    retry_ms: WaitMs,
    retry_limit_ms: WaitMs,
}

impl RefillKeys {
    pub(super) fn validate(&self) -> Result<RefillConfig, RefusedKey> {
        if !(self.low_water > 0.0 && self.low_water <= 1.0) {
            return Err(RefusedKey::new("refill.low_water", "allowed: above 0 and up to 1"));
        }
        let (retry, limit) = (self.retry_ms.duration(), self.retry_limit_ms.duration());
        if retry > limit {
            let problem =
                format!("allowed: up to refill.retry_limit_ms ({})", self.retry_limit_ms.0);
            return Err(RefusedKey::new("refill.retry_ms", problem));
        }
        Ok(RefillConfig { low_water: self.low_water, retry, retry_limit: limit })
    }
}
