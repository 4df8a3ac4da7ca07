//! What stands where in the store: its keys, and the values that all instances must agree on. Pure.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{PoolName, SpaceName};
use crate::ledger::{STRATA, StratumKey};
use crate::space::{Space, Value};

/// The version of all that is said here.
const FORMAT: u32 = 1;

/// The keys of one space. Stratum 7 of the pool int is `tombola/NAME/strata/int/0007`.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    space: SpaceName,
}

impl Keys {
    pub(super) fn new(space: &SpaceName) -> Self {
        Self { space: space.clone() }
    }

    /// Who the space is: a [`SpaceRecord`].
    pub(super) fn space(&self) -> String {
        format!("tombola/{}/space", self.space)
    }

    /// What a pool's numbers are: a [`PoolRecord`].
    pub(super) fn pool(&self, pool: &PoolName) -> String {
        format!("{}{pool}", self.pools())
    }

    /// The beginning of all pools' keys.
    pub(super) fn pools(&self) -> String {
        format!("tombola/{}/pools/", self.space)
    }

    /// Who holds a stratum: an instance's UUID.
    pub(super) fn stratum(&self, pool: &PoolName, stratum: u16) -> String {
        format!("{}{stratum:04}", self.strata(pool))
    }

    /// The beginning of the keys of a pool's strata.
    pub(super) fn strata(&self, pool: &PoolName) -> String {
        format!("tombola/{}/strata/{pool}/", self.space)
    }

    /// How far an instance has come: a [`Fence`](super::protocol::Fence).
    pub(super) fn fence(&self, instance: Uuid) -> String {
        format!("{}{instance}", self.fences())
    }

    /// The beginning of all fences' keys.
    pub(super) fn fences(&self) -> String {
        format!("tombola/{}/fences/", self.space)
    }
}

/// Who a space is. Another UUID is another space, whatever its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SpaceRecord {
    format: u32,
    pub(super) uuid: Uuid,
    strata: usize,
}

impl SpaceRecord {
    pub(super) fn of(uuid: Uuid) -> Self {
        Self { format: FORMAT, uuid, strata: STRATA }
    }

    /// Whether this program sorts values as those who made the space did.
    pub(super) fn is_understood(&self) -> bool {
        (self.format, self.strata) == (FORMAT, STRATA)
    }
}

/// What a pool's numbers are, the same for all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PoolRecord {
    /// The ends of the range, as scaled integers.
    min: i64,
    max: i64,
    decimals: u8,
    /// The secret that sorts values into strata, in hexadecimal digits.
    hash_key: String,
}

impl PoolRecord {
    pub(super) fn of(space: &Space, key: StratumKey) -> Self {
        let (min, max, decimals) = (space.min().0, space.max().0, space.decimals());
        Self { min, max, decimals, hash_key: hex::encode(key.to_bytes()) }
    }

    pub(super) fn space(&self) -> Space {
        Space::from_values(Value(self.min), Value(self.max), self.decimals)
    }

    /// The key, if it can be one.
    pub(super) fn key(&self) -> Option<StratumKey> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(&self.hash_key, &mut bytes).ok()?;
        Some(StratumKey::from_bytes(bytes))
    }
}
