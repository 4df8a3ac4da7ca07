//! Sharing one number space with others: which strata are ours, and whether what we lease is. Knows
//! nothing of shards' files or HTTP; the store agrees, and is asked neither by requests nor, while it
//! serves, more than a few times for a million numbers.

#[cfg(test)]
mod model;
pub mod protocol;
pub mod store;
