//! How shards lease rows: the keys under `lease`.

use serde::{Deserialize, Serialize};

use super::values::Integer;

/// A number of rows to lease. A crash can burn them, and each takes 16 bytes of memory.
pub(super) type LeaseRows = Integer<0, 1_000_000>;

/// How shards lease rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// Rows leased ahead of need: `fleet.lease_rows` in a fleet, otherwise `lease.rows`. 0 is strict.
    pub rows: usize,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct LeaseKeys {
    pub(super) rows: LeaseRows,
}

impl LeaseKeys {
    pub(super) fn validate(&self) -> LeaseConfig {
        LeaseConfig { rows: self.rows.0 as usize }
    }
}
