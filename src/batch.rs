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

/// Told how many values of a draw or build are done; `Break` ends it.
pub type Step<'s> = &'s mut dyn FnMut(u64) -> ControlFlow<()>;
