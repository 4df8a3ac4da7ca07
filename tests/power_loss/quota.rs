//! A used-up quota, imitated by a full disk that reports a quota error.

use std::path::PathBuf;
use std::process::Command;

use super::support::Site;

/// Returns the server's command line with a quota that is used up whenever the disk is full.
pub(crate) fn with_quota(site: &Site) -> Command {
    let library = site.folder().join("quota.so");
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/power_loss/quota.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-Wall", "-shared", "-fPIC", "-o"]).arg(&library).arg(source);
    assert!(compiler.status().unwrap().success(), "{compiler:?}");
    let mut command = site.tombola();
    command.env("LD_PRELOAD", library);
    command
}
