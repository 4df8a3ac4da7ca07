//! A fleet as it runs: several instances of the real binary, a store of real processes, and everything
//! that can happen to either. One thing is never allowed: a number that comes twice, from whomever.
//!
//! [`etcd`] is the store, [`links`] what lies between it and the instances, [`instance`] one of these,
//! [`seen`] every number that came. The rest are the tests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../support/mod.rs"]
mod support;

mod chaos;
mod copies;
mod etcd;
mod exhaustion;
mod instance;
mod joining;
mod links;
mod restored_store;
mod seen;
mod store;
mod taking;
