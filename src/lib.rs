//! A server that hands out unique random numbers, integers, floats and codes, over HTTP. It never hands out a
//! number twice: not across requests, threads, restarts, crashes or instances.
//!
//! # From settings to response
//! ```text
//! config -> space -> ledger.draw -> shard.build -> rotation -> lease -> take -> [receipt] -> response
//!                      (refill, ahead of need)            (request path)
//! ```
//! 1. The settings name the pools. Each pool is a range of numbers, stored as integers: its [`space`].
//! 2. A pool's [`ledger`] records every value that was ever drawn. The refiller draws random values that are
//!    not in the ledger, and adds them to it.
//! 3. From these values the refiller builds a [`shard`]: a SQLite file with a row for each value.
//! 4. The shards that requests may take from are the [`pool`]'s rotation. Each shard has a worker, which
//!    leases rows: it marks them as used in the file, and then puts them into a buffer in memory.
//! 5. A request takes numbers from the buffer of a random shard, and gets them as JSON.
//! 6. If the request has a key or a label, or if its pool records all responses, its [receipt](receipts) is
//!    saved before it gets the numbers.
//! 7. When a shard runs low, the refiller builds its next generation, which replaces the file once it is used
//!    up.
//!
//! Numbers move in this direction only. A request never touches the ledger, and the refiller never touches a
//! request. `docs/architecture.md` defines all terms and gives the reasons.
//!
//! # The modules, in reading order
//! - [`space`]: a pool's range, and the scaled integer that stands for a number or a code, a [`space::Value`]
//! - [`config`]: the settings, parsed and validated once
//! - [`auth`]: tokens, of which only the SHA-256 is stored
//! - [`batch`]: the identifiers that ledger and shards share
//! - [`backoff`]: pauses between the tries of an operation that fails
//! - [`histogram`], [`traffic`], [`events`]: durations, requests and recent events, for monitoring
//! - [`files`]: file operations outside SQLite; [`sqlite`]: SQLite files and the meaning of their errors;
//!   [`pem`]: certificates and keys; `remote`: stores on other machines
//! - [`ledger`]: every value that ever entered a shard; decides whether a value is unique
//! - [`shard`]: one file of values made ahead of need, from which blocks of rows are leased
//! - [`folder`]: the data folder, and the recovery of its files at a start
//! - [`import`]: numbers that were issued by other means, which are never handed out
//! - [`fleet`]: instances that share one number space, and the fence that proves which leases are valid
//! - [`pool`]: the rotation of shards, and how a request takes numbers from it
//! - [`receipts`]: which numbers a response contained, and the idempotency keys
//! - [`refill`]: builds the next generation of a shard before the live one is used up
//! - [`on_demand`]: the simpler modes, which draw a number when it is requested
//! - [`reload`]: what changed settings mean for a running server
//! - [`monitor`]: all counts, now and over the last minutes
//! - [`http`]: access control, routes, wire types, status codes
//! - [`server`]: opens the folder, starts the tasks, serves, and stops in order; [`telemetry`]: logs
//! - [`verify`]: checks a folder; [`backup`]: copies a folder, also while a server uses it
//! - [`figures`]: formats counts and times for people
//! - [`commands`]: the commands of the console; [`internals`]: the door for tools and tests
//!
//! A module imports only modules above it in this list, except in tests. `ledger` and `shard` know nothing of
//! async, HTTP or each other, and `http` knows nothing of SQLite.
//!
//! # The ladder
//! One server has four [modes](config::Mode). All of them hand out each number once, and each is faster than
//! the one above it.
//! ```text
//! simple    config -> space -> on_demand (JSON file)     -> http -> server, on one thread
//! json      config -> space -> on_demand (JSON file)     -> http -> server
//! sqlite    config -> space -> on_demand (table)         -> http -> server
//! sharded   config -> space -> ledger -> shard -> pool   -> http -> server
//! ```
//!
//! # Invariants
//! Comments that begin with `Invariant:` mark the lines that enforce them.
//! 1. A value enters a shard's file only if the insert of the same draw added it to the ledger.
//! 2. A shard's file is complete and durable before its batch is committed to the ledger, and its name is
//!    served only after that. A crash in between loses a file that was never served.
//! 3. A row is marked as used, durably, before it is handed out.
//! 4. A row never outlives its generation: leased rows are not handed out once their file is replaced.
//! 5. A file is never served if the ledger does not expect it in its place.
//! 6. Before anything is drawn from a stratum or imported into it, all its rows are read, in the same
//!    transaction, and compared with the count and the digest of what was drawn into it.
//! 7. A log (`-wal`) is read only after its commits are known to be on the disk: the committed part of a log
//!    that an earlier process left is first copied and synced.
//! 8. In a fleet, a lease is handed out only after a step of the instance's fence that covers it, and values
//!    are drawn only in partitions that the instance holds.
//! 9. In the modes below sharded, a number is durable in the store before its response is written.
//! 10. A receipt is durable before its numbers are handed out.

#![forbid(unsafe_code)]

mod auth;
mod backoff;
mod backup;
mod batch;
mod commands;
mod config;
mod events;
mod figures;
mod files;
mod fleet;
mod folder;
mod histogram;
mod http;
mod import;
pub mod internals;
mod ledger;
mod monitor;
mod on_demand;
mod pem;
mod pool;
mod receipts;
mod refill;
mod reload;
#[cfg(any(feature = "etcd", feature = "postgres"))]
mod remote;
mod server;
mod shard;
mod space;
mod sqlite;
mod telemetry;
mod traffic;
mod verify;

pub use commands::{Arguments, Exit};
