//! Power loss and I/O errors, simulated: a disk in memory under SQLite and under the product's own
//! file operations.
//!
//! [`medium`] decides what a power loss leaves; [`disk`] is the disk that runs, fails and records;
//! [`recording`] is what a run leaves behind; [`cuts`] cuts it at thousands of moments; [`vfs`] puts
//! SQLite on it and [`files`] the product. `on_medium` and `on_sqlite` show that the simulation catches
//! what it should, `on_product` uses it.
//!
//! A crash test is a script that notes on the disk what it promises to the outside, and a verdict on
//! a disk that lost its power after some of the promises:
//! ```text
//! fn record() -> Recording {
//!     install();
//!     let disk = Disk::new();
//!     ... the product on disk.path("shards"), disk.note(number) for each number handed out ...
//!     disk.recording()
//! }
//! survive("name_of_the_test", Device::PLAIN, 2_000, record, |disk, notes| ... Err("what is wrong"));
//! ```
//! `FAULTS_CUTS`, `FAULTS_SEED` and `FAULTS_REPLAY` are in [`cuts`].
//!
//! A fault test runs the script once for each operation that can fail:
//! `disk.fail(Plan::once(Fault::NoSpace, nth))` before it, with `nth` from 0 until `disk.fired()` is 0
//! after it; then `disk.heal()`, and the verdict on `disk.kill()` and on `Disk::boot(&disk.cut(seed))`.

mod cuts;
mod disk;
mod files;
mod medium;
#[cfg(test)]
mod on_errors;
#[cfg(test)]
mod on_medium;
#[cfg(test)]
mod on_product;
#[cfg(test)]
mod on_sqlite;
#[cfg(test)]
mod product;
mod recording;
#[expect(unsafe_code, reason = "a VFS is a C interface; the product itself forbids unsafe code")]
mod vfs;

/// Puts simulated disks under SQLite and under the product, for the paths that lie on one. Again
/// does nothing. `RUST_LOG` shows what the product says, of a replayed cut for one.
pub(crate) fn install() {
    vfs::install();
    files::install();
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer();
        let _ = log.try_init();
    }
}
