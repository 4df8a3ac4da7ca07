//! A reload of an instance: tokens and limits change while it runs, and its pools don't.

use reqwest::Method;

use crate::store::Store;
use crate::support::{Config, Site};

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_does_not_change_the_pools_of_an_instance() {
    let store = Store::witness();
    let config = || store.config().pool("int", 0, 9_999, 1, 400).set("fleet.lease_rows", 32);
    let site = Site::new(&config());
    let server = site.start().await;
    let reload = async |config: Config| {
        site.configure(&config);
        let answer = server.send(Method::POST, "/reload").await;
        (answer.status, answer.body)
    };
    let pools = "pools of a fleet can't change while an instance runs";
    for (wrong, words) in [
        (config().set("fleet.claim", 7), "fleet.claim can't change"),
        (config().pool("gift", 0, 99, 1, 10), pools),
        (config().set("pools.int.shards", 2), pools),
        (config().set("pools.int.max", 19_999), "pools.int.max can't change"),
    ] {
        let (status, body) = reload(wrong).await;
        assert!(status == 422 && body.contains(words), "{words}: {status} {body}");
    }
    for (right, words) in [
        (config().set("server.count_limit", 7), "changed: server.count_limit"),
        (config().set("pools.int.receipts", "'off'"), "changed: pools.int.receipts"),
    ] {
        let (status, body) = reload(right).await;
        assert!(status == 200 && body.contains(words), "{words}: {status} {body}");
    }
    server.take("int", None).await;
    server.stop().await;
}
