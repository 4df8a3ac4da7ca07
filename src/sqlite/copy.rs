//! Copies of files that may be in use.

use std::ffi::c_int;
use std::path::Path;
use std::thread;
use std::time::Duration;

use deadpool_sqlite::rusqlite::backup::{Backup, StepResult};
use deadpool_sqlite::rusqlite::{Connection, Error};

use super::open_for_build;

/// Pages to copy between two checks of whether to go on: 16 MB.
const COPY_PAGES: c_int = 4096;

/// The pause before retrying a page that another connection has locked.
const COPY_RETRY: Duration = Duration::from_millis(10);

/// Fixes the connection's view to what is committed now, whatever other connections write.
pub(crate) fn begin_snapshot(connection: &Connection) -> Result<(), Error> {
    connection.execute_batch("BEGIN")?;
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))
}

/// Copies the [snapshot](begin_snapshot) page by page to an empty file, which the caller syncs. Returns
/// whether the copy is complete: it is not if `go_on` returned false.
pub(crate) fn copy(from: &Connection, to: &Path, go_on: &dyn Fn() -> bool) -> Result<bool, Error> {
    let mut to = open_for_build(to)?;
    let copy = Backup::new(from, &mut to)?;
    // The snapshot is held throughout. Without it, each commit of another connection would restart the copy.
    while go_on() {
        match copy.step(COPY_PAGES)? {
            StepResult::Done => return Ok(true),
            StepResult::More => {}
            _ => thread::sleep(COPY_RETRY),
        }
    }
    Ok(false)
}
