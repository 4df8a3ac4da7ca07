//! A fleet as it runs: several instances of the real binary, a store of real processes, and everything
//! that can happen to either. One thing is never allowed: a number that comes twice, from whomever.
//!
//! [`chaos`] is three of each, under all faults: [`etcd`] is its store, [`links`] what lies between it and
//! the instances, [`instance`] one of these with its clients, [`seen`] every number that came. The others
//! are one story each, on every [`store`], with numbers [taken](`taking`) from instances that may end.
//!
//! Clocks: those of instances are shifted while they run; etcd's are not. It is Go's, which asks the
//! kernel and no library, and a namespace of time has no wall clock: only the machine's could be set.

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
