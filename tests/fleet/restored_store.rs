//! A store that was restored from a copy lacks newer steps and claims. No instance continues until an
//! operator has restored these entries from the data folders.

use std::fs;
use std::path::Path;

use deadpool_sqlite::rusqlite::Connection;
use tempfile::TempDir;

use crate::store::Store;
use crate::support::{Finished, Server, Site, column, integers, run};
use crate::taking::{Came, NOT_OURS, take_some, take_until_not_ours};

const ENOUGH: usize = 1_500;

async fn no_instance_continues_before_the_store_is_reseeded(mut store: Store) {
    let config = store.config().pool("int", 0, 99_999, 2, 500).set("fleet.lease_rows", 32);
    let names = ["a running instance", "another running instance", "a stopped instance"];
    let sites = names.map(|_| Site::new(&config));
    let mut came = Came::default();
    let mut servers = Vec::new();
    for (site, name) in sites.iter().zip(names) {
        let mut server = site.start().await;
        came.note(take_some(&mut server, ENOUGH).await, name);
        servers.push(server);
    }
    let copy = store.copy().await;
    for (server, name) in servers.iter_mut().zip(names) {
        came.note(take_some(server, ENOUGH).await, name);
    }
    servers.pop().unwrap().stop().await;
    store.restore(copy.path()).await;

    // The running instances find out at their next step. Until then, they may hand out rows that they leased
    // before.
    for (server, name) in servers.into_iter().zip(names) {
        let stderr = take_until_not_ours(server, &mut came, name).await;
        assert!(stderr.contains("tombola fleet reseed"), "{stderr}");
    }
    for site in &sites {
        let Err(Finished { status, stderr, .. }) = Server::start_or_end(site.tombola()).await
        else {
            panic!("it started although the store lacks its entries");
        };
        assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
        assert!(stderr.contains("tombola fleet reseed"), "{stderr}");
        let status = run(site.console(&["fleet", "status"])).await;
        assert_ne!(status.status.code(), Some(0), "{}", status.stdout);
    }
    for site in &sites {
        let reseeded = run(site.console(&["fleet", "reseed"])).await;
        assert_eq!(reseeded.status.code(), Some(0), "{}", reseeded.stderr);
        let status = run(site.console(&["fleet", "status"])).await;
        assert_eq!(status.status.code(), Some(0), "{}{}", status.stdout, status.stderr);
    }
    for (site, name) in sites.iter().zip(names) {
        let mut server = site.start().await;
        assert!(site.files(".stale-").is_empty(), "no file may be set aside");
        came.note(take_some(&mut server, 2 * ENOUGH).await, name);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_instance_continues_before_a_restored_witness_is_reseeded() {
    no_instance_continues_before_the_store_is_reseeded(Store::witness()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_instance_continues_before_a_restored_etcd_is_reseeded() {
    if let Some(store) = Store::etcd().await {
        no_instance_continues_before_the_store_is_reseeded(store).await;
    }
}

/// The store is restored to a state before a claim that was followed by no step of a fence, so no fence
/// reveals that.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_a_restored_store_has_forgotten_is_not_drawn_from() {
    const LAST: u64 = 19_999;
    /// Enough numbers for twenty generations, each of which needs more partitions.
    const ALONE: usize = 2_000;
    let mut store = Store::witness();
    let Store::Witness { file, .. } = &store else { panic!("the store is a witness") };
    let file = file.clone();
    let entries = |file: &Path, like: &str| -> Vec<String> {
        let sql = format!("SELECT key || value FROM entries WHERE key LIKE '{like}' ORDER BY key");
        column(file, &sql)
    };
    let claims_and_fences =
        |file: &Path| (entries(file, "%/partitions/%"), entries(file, "%/fences/%"));
    let config = store.config().pool("int", 0, LAST, 1, 100).set("fleet.lease_rows", 50);
    let config = config.set("fleet.claim", 1);
    let (site, other) = (Site::new(&config), Site::new(&config));
    let mut came = Came::default();
    let mut server = site.start().await;
    // Takes one number at a time, until there was a claim but no step since the copy.
    let mut copied = None::<(_, TempDir)>;
    for _ in 0..ALONE {
        came.note(integers(&server.take("int", None).await), "the instance");
        let now = claims_and_fences(&file);
        let is_moment = |(claims, fences): &(_, _)| *claims != now.0 && *fences == now.1;
        if copied.as_ref().is_some_and(|(before, _)| is_moment(before)) {
            break;
        }
        let copy = store.copy().await;
        // A copy is useful only if the store did not change while it was made.
        copied = Some((now, copy)).filter(|(now, _)| *now == claims_and_fences(&file));
    }
    let Some((before, copy)) = copied else { return };
    let aside = copy.path().with_extension("aside");
    fs::rename(&file, &aside).unwrap();
    store.restore(copy.path()).await;
    let (claims, fences) = claims_and_fences(&aside);
    fs::remove_file(&aside).unwrap();
    if before.0 == claims || before.1 != fences {
        // Each claim was followed by a step at once. A store without the claim lacks that step as well, and
        // rows leased with it may be issued again, so there is nothing to test.
        return;
    }

    came.note(take_some(&mut server, 1_000).await, "the instance, since the store was restored");
    let mut beside = other.start().await;
    came.note(take_some(&mut beside, LAST as usize / 2).await, "another, which joined since");
}

/// Story: an instance had joined but claimed nothing yet when the store was lost and came back empty. Another
/// instance then created the space again, with another secret. Both served from partitions of different
/// secrets, which have values in common.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_ends_when_its_space_was_begun_again() {
    const LAST: u64 = 2_999;
    const COUNTS: &[Option<u32>] = &[None, Some(7)];
    let store = Store::witness();
    let Store::Witness { file, .. } = &store else { panic!("the store is a witness") };
    let config = store.config().pool("int", 0, LAST, 1, 100).set("fleet.lease_rows", 50);
    // The space exists already, so an instance joins without a write, and a read lock blocks its first claim.
    Site::new(&config).start().await.stop().await;
    let reader = Connection::open(file).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM entries").unwrap();
    let (site, other) = (Site::new(&config), Site::new(&config));
    let mut server = site.start().await;
    fs::remove_file(file).unwrap();
    let beside = other.start().await;
    beside.take("int", None).await;

    let mut came = Came::default();
    came.note(take_some(&mut server, LAST as usize / 2).await, "the instance that joined before");
    drop(reader);
    came.note(integers(&beside.drain("int", 4, COUNTS).await), "the instance that began it again");
    let Finished { status, stderr, .. } = server.process.finish().await;
    assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
    let Err(Finished { status, .. }) = Server::start_or_end(site.tombola()).await else {
        panic!("it started although the space is another one");
    };
    assert_eq!(status.code(), Some(NOT_OURS));
}
