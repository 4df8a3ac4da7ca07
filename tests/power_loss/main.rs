//! The real binary on real file systems, ext4 and xfs in loop devices, that lose their power or run full.
//!
//! The disk of `tests/faults` is simulated. It is harsher than a kernel, but it is our model of one. Here the
//! kernel itself decides what is on the disk, which error a failure is, and in which order the pages of a
//! memory-mapped file are written back.
//!
//! [`volume`] is a file system that a test may mount, fill and cut off, for which it has to be root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../support/mod.rs"]
mod support;

mod full;
mod losses;
mod quota;
mod volume;
