//! A server that hands out unique random numbers, integers and floats, over HTTP, and never the same
//! one twice: not across requests, threads, restarts, crashes or instances.
//!
//! # The way of a number
//! ```text
//! config -> space -> ledger.draw -> shard.build -> rotation -> lease -> take -> JSON
//!                      (refill, ahead of need)            (request path)
//! ```
//! One direction. A request never touches the ledger; the refiller never touches a request.
//!
//! # The modules, in reading order
//! - [`space`]: a pool's range; a number is kept as a scaled integer, a [`space::Value`]
//! - [`config`]: the settings, parsed and validated once
//! - [`auth`]: tokens: made, kept as their SHA-256, recognised
//! - [`batch`]: the names that ledger and shards share
//! - [`histogram`], [`traffic`], [`events`]: what is counted and noted on the way, for those who watch
//! - [`files`]: what is done to files outside SQLite; [`sqlite`]: how SQLite files are opened;
//!   [`pem`]: how certificates are read
//! - [`ledger`]: every value that ever entered a shard: uniqueness is decided here
//! - [`shard`]: one file of pre-generated values, leased block by block
//! - [`folder`]: what a start finds on the disk, and what it refuses
//! - [`fleet`]: with whom the numbers are shared out, and what proves that ours are
//! - [`pool`]: the rotation of shards, and how a request takes numbers from it
//! - [`refill`]: builds the next generation of a shard before the live one is used up
//! - [`rungs`]: what the pool server is better than: numbers drawn when they are asked for
//! - [`monitor`]: what all of these counted, now and in the last minutes
//! - [`http`]: who may ask, routes, wire types, status codes
//! - [`server`]: opens, spawns, serves, drains, joins; [`telemetry`]: logs
//! - [`verify`]: whether a folder is what it should be; [`backup`]: a copy of one, whoever uses it
//! - [`figures`]: counts and times as people read them
//! - [`commands`]: what the console does
//!
//! Imports point up this list only. `ledger` and `shard` know nothing of async, HTTP or each
//! other, `http` nothing of SQLite.
//!
//! # The ladder
//! Four [modes](config::Mode) of one server. All keep the promise; each pays less for it.
//! ```text
//! simple    config -> space -> rungs (JSON file)         -> http -> server::blocking
//! json      config -> space -> rungs (JSON file)         -> http -> server
//! sqlite    config -> space -> rungs (table)             -> http -> server
//! sharded   config -> space -> ledger -> shard -> pool   -> http -> server
//! ```
//!
//! # Invariants
//! 1. A value enters a shard's file only if this very insert put it into the ledger.
//! 2. A shard's file is complete and durable before its batch is in the ledger, and bears a name that
//!    is served only after it: a crash in between loses a file that nobody served.
//! 3. A row is marked used, durably, before it is handed out.
//! 4. A row never outlives its generation: what is leased from a file ends with the file.
//! 5. A file that the ledger does not expect where it lies is never served.
//! 6. Before anything is drawn from a stratum, all its rows were read once in this process and held
//!    against the count and the digest of what was drawn into it.
//! 7. A log (`-wal`) is not believed before it is known to be on the disk: one left by a process that
//!    died is written anew and synced first.
//! 8. In a fleet, a lease is handed out only after a step of the instance's fence that covers it, and
//!    values are drawn only in strata that the instance holds.
//! 9. In the modes below sharded, a number is durable in the store before its answer is written.

#![forbid(unsafe_code)]

pub mod auth;
pub mod backup;
pub mod batch;
pub mod commands;
pub mod config;
pub mod events;
pub mod figures;
pub mod files;
pub mod fleet;
pub mod folder;
pub mod histogram;
pub mod http;
pub mod ledger;
pub mod monitor;
pub mod pem;
pub mod pool;
pub mod refill;
pub mod rungs;
pub mod server;
pub mod shard;
pub mod space;
pub mod sqlite;
pub mod telemetry;
pub mod traffic;
pub mod verify;
