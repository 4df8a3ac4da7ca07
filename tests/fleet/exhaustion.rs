//! Three instances share a range up to its last number.

use crate::store::Store;
use crate::support::{Site, assert_each_once, eventually, missing};

const LAST: i64 = 29_999;
/// One for each instance.
const SHARD_SIZES: [u32; INSTANCES] = [400, 150, 900];
const INSTANCES: usize = 3;
const COUNTS: &[Option<u32>] = &[None, Some(40), None, Some(7)];

async fn every_number_comes_once_of_three(store: Store) {
    let site = |shard_size| {
        let config = store.config().pool("int", 0, LAST, 1, shard_size);
        Site::new(&config.set("fleet.lease_rows", 32))
    };
    let sites = SHARD_SIZES.map(site);
    let mut servers = Vec::new();
    let mut numbers = Vec::new();
    for site in &sites {
        let server = site.start().await;
        // Take one number from each, so that all hold partitions before the first instance takes the rest.
        numbers.extend(server.take("int", None).await);
        servers.push(server);
    }
    let mut held = Vec::new();
    for (index, server) in servers.iter().enumerate() {
        let drained = server.drain("int", 4, COUNTS).await;
        assert!(!drained.is_empty(), "instance {index} had no numbers");
        held.push(drained.len());
        numbers.extend(drained);
        // The last number is handed out a moment before its shard leaves the rotation.
        let health = eventually("the end of the rotation", async || {
            let answer = server.get("/health").await;
            (answer.status == 503).then_some(answer)
        })
        .await;
        assert!(health.body.contains("used up"), "{}", health.body);
        let left = missing(&numbers, 0..=LAST);
        assert_eq!(left == 0, index + 1 == INSTANCES, "{left} numbers are left");
    }
    println!("after one number from each, drained in turn: {held:?}");
    for server in servers {
        server.stop().await;
    }
    // Exhaustion is permanent: no instance claims a partition of another one, not even after a restart.
    for site in &sites {
        let server = site.start().await;
        // It has to ask the store first.
        let exhausted = async || {
            let answer = server.get("/random").await;
            (answer.status != 503).then(|| answer.assert_exhausted())
        };
        eventually("the end of the range", exhausted).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_number_comes_once_of_three_with_a_witness() {
    every_number_comes_once_of_three(Store::witness()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_number_comes_once_of_three_with_etcd() {
    if let Some(store) = Store::etcd().await {
        every_number_comes_once_of_three(store).await;
    }
}

/// All instances drain at the same time and compete for claims.
#[tokio::test(flavor = "multi_thread")]
async fn every_number_comes_once_of_three_that_race() {
    let store = Store::witness();
    let config = store.config().pool("int", 0, LAST, 2, 300).set("fleet.lease_rows", 32);
    let config = config.set("fleet.claim", 7);
    let sites: Vec<_> = (0..INSTANCES).map(|_| Site::new(&config)).collect();
    let (one, two, three) = tokio::join!(sites[0].start(), sites[1].start(), sites[2].start());
    let (a, b, c) = tokio::join!(
        one.drain("int", 4, COUNTS),
        two.drain("int", 4, COUNTS),
        three.drain("int", 4, COUNTS),
    );
    let numbers = [a, b, c].concat();
    assert_each_once(&numbers, 0..=LAST);
}
