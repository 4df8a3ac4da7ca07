//! Power loss and I/O errors, simulated: a disk in memory, used by SQLite and by the product's own file
//! operations.
//!
//! [`medium`] decides what a power loss leaves. [`disk`] is a running disk that can fail, and that records
//! its operations. A [`recording`] is such a history, and [`cuts`] cuts it at thousands of moments. [`vfs`]
//! makes SQLite use the disk, and [`files`] the product. `on_medium` and `on_sqlite` show that the simulation
//! catches what it should; the other tests use it.
//!
//! A crash test is a script that notes on the disk what it promises to clients, and a verdict on a disk that
//! lost its power after some of these promises:
//! ```text
//! fn record() -> Recording {
//!     install();
//!     let disk = Disk::new();
//!     ... the product on disk.path("shards"), disk.note(number) for each number handed out ...
//!     disk.recording()
//! }
//! survive("name_of_the_test", Device::PLAIN, 2_000, record, |disk, notes| ... Err("what is wrong"));
//! ```
//! [`cuts`] explains `FAULTS_CUTS`, `FAULTS_SEED` and `FAULTS_REPLAY`.
//!
//! A fault test runs its script once for each operation that can fail. It calls
//! `disk.fail(Plan::once(Fault::NoSpace, nth))` before the script, with `nth` from 0 until `disk.fired()` is
//! 0 afterwards. Then it calls `disk.heal()`, and checks both `disk.kill()` and
//! `Disk::boot(&disk.cut(seed))`.

mod cuts;
mod disk;
mod files;
mod medium;
#[cfg(test)]
mod on_errors;
#[cfg(test)]
mod on_full_disk;
#[cfg(test)]
mod on_import;
#[cfg(test)]
mod on_medium;
#[cfg(test)]
mod on_product;
#[cfg(test)]
mod on_receipts;
#[cfg(test)]
mod on_rungs;
#[cfg(test)]
mod on_sqlite;
#[cfg(test)]
mod product;
mod recording;
#[expect(unsafe_code, reason = "a VFS is a C interface; the product itself forbids unsafe code")]
mod vfs;

/// Makes SQLite and the product use simulated disks, for paths that are on one. Calling it again has no
/// effect. With `RUST_LOG`, the product's log is shown, for example that of a replayed cut.
pub(crate) fn install() {
    vfs::install();
    files::install();
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer();
        let _ = log.try_init();
    }
}
