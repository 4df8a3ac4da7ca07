//! The permissions of the witness file, and which commands create it.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::store::Store;
use crate::support::{Site, run};

/// Story: the file had the mode 0644 with the usual umask, and `tombola fleet status` created one if there
/// was none.
#[tokio::test(flavor = "multi_thread")]
async fn the_witness_is_private_and_looking_does_not_make_one() {
    let store = Store::witness();
    let Store::Witness { file, .. } = &store else { panic!("the store is a witness") };
    let site = Site::new(&store.config().pool("int", 0, 999, 1, 100));
    let looked = run(site.console(&["fleet", "status"])).await;
    assert_ne!(looked.status.code(), Some(0), "{}", looked.stdout);
    assert!(looked.stderr.contains("witness.db"), "{}", looked.stderr);
    assert!(!file.exists(), "`fleet status` created a witness");

    site.start().await.stop().await;
    let mode = fs::metadata(file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    let before = fs::read(file).unwrap();
    let looked = run(site.console(&["fleet", "status"])).await;
    assert_eq!(looked.status.code(), Some(0), "{}", looked.stderr);
    assert_eq!(fs::read(file).unwrap(), before);
}
