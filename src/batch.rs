//! What ledger and shards call the same thing: which shard, which filling of it, which draw. Pure.

use std::ops::ControlFlow;

/// Which shard of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardIndex(pub u16);

/// Which filling of a shard, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub i64);

/// Which draw from a ledger, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchId(pub i64);

/// One draw, as the ledger has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its number.
    pub id: BatchId,
    /// The shard that it was drawn for.
    pub shard: ShardIndex,
    /// The filling of that shard.
    pub generation: Generation,
    /// How many values.
    pub count: u64,
}

/// What a set of values comes to, in any order: no value can change, come or go unnoticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many.
    pub count: u64,
    /// The sum of their hashes under the ledger's secret key, modulo 2^64.
    pub digest: u64,
}

impl Tally {
    /// Counts the value of this hash.
    pub fn add(&mut self, hash: u64) {
        self.count += 1;
        self.digest = self.digest.wrapping_add(hash);
    }
}

/// Told of each violation that a full reading finds: its kind, and what was found.
pub type Report<'r> = &'r mut dyn FnMut(&'static str, String);

/// Told how many values of a draw or build are done; `Break` ends it.
pub type Step<'s> = &'s mut dyn FnMut(u64) -> ControlFlow<()>;
