//! Tests of a fleet: several instances of the real binary, a store of real processes, and all faults that can
//! happen to them. No number may be issued twice, whichever instances it comes from.
//!
//! [`chaos`] runs three instances under all faults. Its stores are in [`etcd`] and [`postgres`]; [`links`]
//! connect the instances to a store; [`instance`] is one of them with its clients; and [`seen`] keeps all
//! numbers that were received. The other modules tell one story each, on every [`store`], with numbers
//! [taken](`taking`) from instances that may end.
//!
//! The clocks of instances are shifted while they run; those of etcd are not. It is written in Go, which asks
//! the kernel for the time and no library, and a time namespace has no wall clock, so only the clock of the
//! whole machine could be set.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../support/mod.rs"]
mod support;

mod chaos;
mod copies;
mod etcd;
mod exhaustion;
mod figures;
mod instance;
mod joining;
mod links;
mod postgres;
mod promotion;
mod reload;
mod restored_store;
mod seen;
mod store;
mod taking;
mod used;
mod witness;
