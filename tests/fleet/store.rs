//! The stores that a test can be run on.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::etcd::{self, Cluster};
use crate::support::Config;

/// The space that the instances of these tests share.
pub(crate) const SPACE: &str = "raffle";

pub(crate) enum Store {
    /// A file beside the data folder.
    Witness {
        file: PathBuf,
        _folder: TempDir,
    },
    Etcd {
        cluster: Cluster,
        address: String,
    },
}

impl Store {
    pub(crate) fn witness() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::Witness { file: folder.path().join("witness.db"), _folder: folder }
    }

    /// Starts one node of etcd. Returns `None` if etcd can't be used here.
    pub(crate) async fn etcd() -> Option<Self> {
        if !etcd::is_there() {
            return None;
        }
        let mut cluster = Cluster::start(1).await;
        let address = cluster.address_for("all").await;
        Some(Self::Etcd { cluster, address })
    }

    /// Returns the settings of an instance that uses this store, without pools.
    pub(crate) fn config(&self) -> Config {
        let address = match self {
            Self::Witness { file, .. } => format!("file://{}", file.display()),
            Self::Etcd { address, .. } => address.clone(),
        };
        in_fleet(Config::new(), &address)
    }

    /// Copies everything in the store. No instance may write during the copy.
    pub(crate) async fn copy(&mut self) -> TempDir {
        match self {
            Self::Witness { file, .. } => {
                let copy = tempfile::tempdir().unwrap();
                replace_folder(file.parent().unwrap(), copy.path());
                copy
            }
            Self::Etcd { cluster, .. } => {
                cluster.kill(0).await;
                let copy = cluster.copy_data();
                cluster.begin(0);
                cluster.serves().await;
                copy
            }
        }
    }

    /// Restores a copy while instances are running.
    pub(crate) async fn restore(&mut self, copy: &Path) {
        match self {
            Self::Witness { file, .. } => replace_folder(copy, file.parent().unwrap()),
            Self::Etcd { cluster, .. } => {
                cluster.kill(0).await;
                cluster.restore_data(copy);
                cluster.begin(0);
                cluster.serves().await;
            }
        }
    }
}

pub(crate) fn in_fleet(config: Config, address: &str) -> Config {
    config.set("fleet.store", format!("'{address}'")).set("fleet.space", format!("'{SPACE}'"))
}

/// Copies a folder with all its files as they are at the moment.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").args([from, to]).status().unwrap();
    assert!(copied.success(), "cp -r {} {}", from.display(), to.display());
}

/// Replaces the files of one folder with those of another. A running instance uses one of them, and may remove
/// the journal of a step at any moment.
fn replace_folder(from: &Path, to: &Path) {
    let unless_gone = |done: io::Result<()>| match done {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        done => done.unwrap(),
    };
    for file in fs::read_dir(to).unwrap() {
        unless_gone(fs::remove_file(file.unwrap().path()));
    }
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        unless_gone(fs::copy(file.path(), to.join(file.file_name())).map(drop));
    }
}
