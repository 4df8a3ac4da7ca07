//! The identifiers that ledger and shards share: of a shard, a generation, a draw. Pure.

use std::ops::ControlFlow;

/// The index of a shard in its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardIndex(pub u16);

/// The number of a shard's generation, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub i64);

/// The number of a draw from a ledger, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BatchId(pub i64);

/// Identifies the last opening of a shard's live file. It is drawn at random at each start and noted in the
/// file and in the ledger, so that an older copy of the file is recognised. 0 before the first start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Token(pub i64);

/// One draw, as recorded in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The number of the draw.
    pub id: BatchId,
    /// The shard that it was drawn for.
    pub shard: ShardIndex,
    /// The generation of that shard.
    pub generation: Generation,
    /// The number of values drawn.
    pub count: u64,
}

/// The count and digest of a set of values, whose order does not matter. A changed, missing or additional
/// value changes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The number of values.
    pub count: u64,
    /// The sum of the values' hashes under the ledger's secret key, modulo 2^64.
    pub digest: u64,
}

impl Tally {
    /// Adds the value with this hash.
    pub fn add(&mut self, hash: u64) {
        self.count += 1;
        self.digest = self.digest.wrapping_add(hash);
    }
}

/// Called for each violation that a full check finds, with its kind and a description.
pub(crate) type Report<'r> = &'r mut dyn FnMut(&'static str, String);

/// Called with the number of values that a draw or build has completed. `Break` stops it.
pub(crate) type Progress<'p> = &'p mut dyn FnMut(u64) -> ControlFlow<()>;
