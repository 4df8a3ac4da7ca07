//! The stores that a test can be run on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::etcd::{self, Cluster};
use crate::support::Config;

/// What the instances of these tests share.
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

    /// One node of etcd, where there is etcd.
    pub(crate) async fn etcd() -> Option<Self> {
        if !etcd::is_there() {
            return None;
        }
        let mut cluster = Cluster::start(1).await;
        let address = cluster.address_for("all").await;
        Some(Self::Etcd { cluster, address })
    }

    /// Settings of whoever shares its numbers here. Pools are yet to be added.
    pub(crate) fn config(&self) -> Config {
        let address = match self {
            Self::Witness { file, .. } => format!("file://{}", file.display()),
            Self::Etcd { address, .. } => address.clone(),
        };
        in_fleet(Config::new(), &address)
    }

    /// A copy of all that it knows, for later; taken while nobody writes.
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

    /// Goes back to a copy, while instances run.
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

/// A copy of a folder with all that is in it, its files as they are at the moment.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").args([from, to]).status().unwrap();
    assert!(copied.success(), "cp -r {} {}", from.display(), to.display());
}

/// Makes the files of the one folder those of the other.
fn replace_folder(from: &Path, to: &Path) {
    for file in fs::read_dir(to).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}
