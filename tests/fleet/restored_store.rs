//! A store that was restored from a copy has forgotten steps and claims: nobody goes on before an
//! operator has put back what each folder knows.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::store::Store;
use crate::support::{Finished, Server, Site, column, integers, run};
use crate::taking::{Came, Takers, take_some};

/// Exit code of a folder that the store does not bear out.
const NOT_OURS: i32 = 5;

const ENOUGH: usize = 1_500;

async fn nobody_goes_on_before_the_store_is_reseeded(mut store: Store) {
    let config = store.config().pool("int", 0, 99_999, 2, 500).set("fleet.lease_rows", 32);
    let names = ["one that runs", "another that runs", "one that is stopped"];
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

    // Those that run find it out at their next step. They may hand out what they leased before.
    for (mut server, name) in servers.into_iter().zip(names) {
        let takers = Takers::start(&server);
        takers.reach(usize::MAX, &mut server).await;
        came.note(takers.stop().await, name);
        let Finished { status, stderr, .. } = server.process.finish().await;
        assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
        assert!(stderr.contains("tombola fleet reseed"), "{stderr}");
    }
    for site in &sites {
        let Err(Finished { status, stderr, .. }) = Server::start_or_end(site.tombola()).await
        else {
            panic!("it started with a store that has forgotten it");
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
        assert!(site.files(".stale-").is_empty(), "what it had is its own again");
        came.note(take_some(&mut server, 2 * ENOUGH).await, name);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_goes_on_before_a_restored_witness_is_reseeded() {
    nobody_goes_on_before_the_store_is_reseeded(Store::witness()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_goes_on_before_a_restored_etcd_is_reseeded() {
    if let Some(store) = Store::etcd().await {
        nobody_goes_on_before_the_store_is_reseeded(store).await;
    }
}

/// The store goes back to before a claim that no step of a fence has followed: no fence tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_a_restored_store_has_forgotten_is_not_drawn_from() {
    const LAST: u64 = 19_999;
    /// Numbers of twenty generations, each of which needs more strata.
    const ALONE: usize = 2_000;
    let mut store = Store::witness();
    let Store::Witness { file, .. } = &store else { panic!("it is one") };
    let file = file.clone();
    let entries = |file: &Path, like: &str| -> Vec<String> {
        let sql = format!("SELECT key || value FROM entries WHERE key LIKE '{like}' ORDER BY key");
        column(file, &sql)
    };
    let claims_and_fences =
        |file: &Path| (entries(file, "%/strata/%"), entries(file, "%/fences/%"));
    let config = store.config().pool("int", 0, LAST, 1, 100).set("fleet.lease_rows", 50);
    let config = config.set("fleet.claim", 1);
    let (site, other) = (Site::new(&config), Site::new(&config));
    let mut came = Came::default();
    let mut server = site.start().await;
    // One at a time, until there is a claim and no step since the copy.
    let mut copied = None::<(_, TempDir)>;
    for _ in 0..ALONE {
        came.note(integers(&server.take("int", None).await), "the instance");
        let now = claims_and_fences(&file);
        let is_moment = |(claims, fences): &(_, _)| *claims != now.0 && *fences == now.1;
        if copied.as_ref().is_some_and(|(before, _)| is_moment(before)) {
            break;
        }
        let copy = store.copy().await;
        // Of one moment, or of no use.
        copied = Some((now, copy)).filter(|(now, _)| *now == claims_and_fences(&file));
    }
    let Some((before, copy)) = copied else { return };
    let aside = copy.path().with_extension("aside");
    fs::rename(&file, &aside).unwrap();
    store.restore(copy.path()).await;
    let (claims, fences) = claims_and_fences(&aside);
    fs::remove_file(&aside).unwrap();
    if before.0 == claims || before.1 != fences {
        // Every claim was followed by a step at once: a store without the one is behind the other, and what
        // was leased by that step may come again.
        return;
    }

    came.note(take_some(&mut server, 1_000).await, "the instance, since the store was restored");
    let mut beside = other.start().await;
    came.note(take_some(&mut beside, LAST as usize / 2).await, "another, which joined since");
}
