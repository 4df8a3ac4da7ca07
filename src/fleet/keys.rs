//! The keys of the store's entries, and the values that all instances must agree on. Pure.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{PoolName, SpaceName};
use crate::ledger::{PARTITIONS, StratumKey};
use crate::space::{CodeFormat, Space, Value};

/// The version of these keys and values.
const FORMAT: u32 = 3;

/// The keys of one space. Partition 7 of the pool int is `tombola/NAME/partitions/int/0007`.
#[derive(Clone, Debug)]
pub(super) struct SpaceKeys {
    space: SpaceName,
}

impl SpaceKeys {
    pub(super) fn new(space: &SpaceName) -> Self {
        Self { space: space.clone() }
    }

    pub(super) fn name(&self) -> &str {
        self.space.as_str()
    }

    /// Returns the key of the [`SpaceRecord`].
    pub(super) fn space(&self) -> String {
        format!("tombola/{}/space", self.space)
    }

    /// Returns the key of a pool's [`PoolRecord`].
    pub(super) fn pool(&self, pool: &PoolName) -> String {
        format!("{}{pool}", self.pools())
    }

    /// Returns the prefix of all pools' keys.
    pub(super) fn pools(&self) -> String {
        format!("tombola/{}/pools/", self.space)
    }

    /// Returns the key of a partition. Its value is the UUID of the instance that holds the partition.
    pub(super) fn partition(&self, pool: &PoolName, partition: u16) -> String {
        format!("{}{partition:04}", self.partitions(pool))
    }

    /// Returns the prefix of the keys of a pool's partitions.
    pub(super) fn partitions(&self, pool: &PoolName) -> String {
        format!("tombola/{}/partitions/{pool}/", self.space)
    }

    /// Returns the key of an instance's [`Fence`](super::protocol::Fence).
    pub(super) fn fence(&self, instance: Uuid) -> String {
        format!("{}{instance}", self.fences())
    }

    /// Returns the prefix of all fences' keys.
    pub(super) fn fences(&self) -> String {
        format!("tombola/{}/fences/", self.space)
    }
}

/// The identity of a space. A space with another UUID is another space, even if it has the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SpaceRecord {
    format: u32,
    pub(super) uuid: Uuid,
    partitions: usize,
}

impl SpaceRecord {
    pub(super) fn of(uuid: Uuid) -> Self {
        Self { format: FORMAT, uuid, partitions: PARTITIONS }
    }

    /// Returns the UUID if this program gives values the same indexes as the program that created the space.
    pub(super) fn understood_uuid(&self) -> Option<Uuid> {
        ((self.format, self.partitions) == (FORMAT, PARTITIONS)).then_some(self.uuid)
    }
}

/// A pool's range and secret, the same for all instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PoolRecord {
    /// The ends of the range, as scaled integers.
    min: i64,
    max: i64,
    decimals: u8,
    /// Pattern, symbols and check of its codes, if it has codes.
    codes: Option<[String; 3]>,
    /// The secret that gives values their indexes, in hexadecimal digits.
    hash_key: String,
    /// The digest of the numbers that were issued by other means before the space was made, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used: Option<String>,
}

impl PoolRecord {
    pub(super) fn of(space: &Space, key: StratumKey, used: Option<String>) -> Self {
        let (min, max, decimals) = (space.min().0, space.max().0, space.decimals());
        let texts = |format: &CodeFormat| {
            [format.pattern(), format.symbols(), format.check()].map(str::to_owned)
        };
        let (codes, hash_key) = (space.codes().map(texts), hex::encode(key.to_bytes()));
        Self { min, max, decimals, codes, hash_key, used }
    }

    /// Returns the digest of the numbers that were issued by other means.
    pub(super) fn used(&self) -> Option<&str> {
        self.used.as_deref()
    }

    /// Returns the range and the secret, if they are valid.
    pub(super) fn range_and_key(&self) -> Option<(Space, StratumKey)> {
        let range = match &self.codes {
            None => Space::from_values(Value(self.min), Value(self.max), self.decimals)?,
            Some([pattern, alphabet, check]) => {
                Space::of_codes(CodeFormat::new(pattern, alphabet, check).ok()?)
            }
        };
        let mut bytes = [0; 16];
        hex::decode_to_slice(&self.hash_key, &mut bytes).ok()?;
        Some((range, StratumKey::from_bytes(bytes)))
    }
}
