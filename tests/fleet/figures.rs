//! The figures of an instance are those of its part of the range, not of the whole range.

use serde_json::Value;

use crate::store::Store;
use crate::support::{Server, Site, eventually};

const LAST: u64 = 29_999;
const PARTITIONS: u64 = 4096;
const COUNTS: &[Option<u32>] = &[None, Some(40)];

async fn pool(server: &Server) -> Value {
    let status: Value = server.get("/status").await.parse();
    status["pools"]["int"].clone()
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a count"))
}

async fn metric(server: &Server, name: &str) -> f64 {
    let text = server.get("/metrics").await.body;
    let line = text.lines().find(|line| line.starts_with(&format!("{name}{{")));
    line.unwrap_or_else(|| panic!("no {name}")).rsplit(' ').next().unwrap().parse().unwrap()
}

/// Story: two instances had used up the whole range, and each reported that half of it was left.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_free_is_what_this_instance_may_draw() {
    let store = Store::witness();
    let config = store.config().pool("int", 0, LAST, 1, 400).set("fleet.lease_rows", 32);
    let sites = [Site::new(&config), Site::new(&config)];
    let [one, two] = [sites[0].start().await, sites[1].start().await];
    one.take("int", None).await;
    two.take("int", None).await;
    let begun = pool(&one).await;
    let (held, unclaimed) =
        (count(&begun["partitions"]["held"]), count(&begun["partitions"]["unclaimed"]));
    assert!(held > 0 && held + unclaimed <= PARTITIONS, "{begun}");
    let may_draw = (LAST + 1) * (held + unclaimed) / PARTITIONS;
    let drawn = count(&begun["issued"]) + count(&begun["pooled"]);
    assert_eq!(count(&begun["free"]), may_draw - drawn, "{begun}");
    assert_eq!(count(&begun["range"]["size"]), LAST + 1);
    assert_eq!(metric(&one, "tombola_range_numbers").await, may_draw as f64);
    assert_eq!(metric(&one, "tombola_fleet_partitions_held").await, held as f64);
    assert_eq!(metric(&one, "tombola_fleet_partitions_unclaimed").await, unclaimed as f64);

    one.drain("int", 4, COUNTS).await;
    two.drain("int", 4, COUNTS).await;
    for server in [&one, &two] {
        eventually("nothing left", async || {
            let pool = pool(server).await;
            let left = count(&pool["pooled"]) + count(&pool["free"]);
            (left == 0 && pool["partitions"]["unclaimed"] == 0).then_some(())
        })
        .await;
        assert_eq!(metric(server, "tombola_range_numbers_left").await, 0.0);
        assert_eq!(metric(server, "tombola_fleet_partitions_unclaimed").await, 0.0);
    }
    let held = [pool(&one).await, pool(&two).await].map(|pool| count(&pool["partitions"]["held"]));
    assert_eq!(held.iter().sum::<u64>(), PARTITIONS);
}
