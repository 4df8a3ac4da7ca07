//! A server that hands out unique random numbers over HTTP, and never the same one twice.

pub mod batch;
pub mod config;
pub mod files;
pub mod folder;
pub mod ledger;
pub mod pool;
pub mod refill;
pub mod shard;
pub mod space;
pub mod sqlite;
