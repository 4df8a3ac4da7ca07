//! Numbers that were issued before the space was made: no instance hands them out.

use std::collections::BTreeSet;
use std::fs;

use crate::store::Store;
use crate::support::{Config, Site, column, integers, missing, run};

const LAST: i64 = 19_999;
const COUNTS: &[Option<u32>] = &[None, Some(40), None, Some(7)];
/// The exit codes for settings that are wrong, and for a folder that can't be used.
const SETTINGS: i32 = 2;
const FOLDER: i32 = 3;

fn is_used(number: i64) -> bool {
    number % 3 == 0
}

fn used() -> String {
    (0..=LAST).filter(|&number| is_used(number)).map(|number| format!("{number}\n")).collect()
}

fn pool(config: Config) -> Config {
    config.pool("int", 0, LAST, 2, 400).set("fleet.lease_rows", 32)
}

/// Returns a site whose pool has a file of used numbers.
fn site(store: &Store, used: &str) -> Site {
    let site = Site::new(&pool(store.config()).set("pools.int.used_file", "'used.txt'"));
    fs::write(site.folder().join("used.txt"), used).unwrap();
    site
}

async fn refusal(site: &Site) -> (i32, String) {
    let finished = run(site.tombola()).await;
    (finished.status.code().unwrap(), finished.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_instance_hands_out_a_number_that_was_used_before_the_space_was_made() {
    let store = Store::witness();
    let lines: Vec<_> = used().lines().rev().map(|line| format!("{line}\n\n")).collect();
    // The same numbers in another order.
    let (one, other) = (site(&store, &used()), site(&store, &lines.concat()));
    let (server, beside) = (one.start().await, other.start().await);
    let mut numbers = Vec::new();
    for _ in 0..20 {
        numbers.extend(server.take("int", Some(40)).await);
        numbers.extend(beside.take("int", Some(40)).await);
    }
    let status: serde_json::Value = server.get("/status").await.parse();
    let figures = &status["pools"]["int"];
    assert!(figures["issued"].as_u64().unwrap() > 800, "{figures}");
    server.stop().await;
    let server = one.start().await;
    numbers.extend(server.drain("int", 4, COUNTS).await);
    numbers.extend(beside.drain("int", 4, COUNTS).await);
    server.stop().await;
    beside.stop().await;
    let unused = missing(&numbers, 0..=LAST);
    assert!(integers(&numbers).into_iter().all(|number| !is_used(number)));
    assert_eq!(unused, used().lines().count(), "all other numbers came");
    for site in [&one, &other] {
        let finished = run(site.console(&["verify"])).await;
        assert_eq!(finished.status.code(), Some(0), "{}{}", finished.stdout, finished.stderr);
    }
    let entered = |site: &Site| -> BTreeSet<i64> {
        column(&site.file("used_numbers_int.db"), "SELECT partition FROM entered")
            .into_iter()
            .collect()
    };
    assert_eq!(entered(&one).intersection(&entered(&other)).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_with_other_used_numbers_is_refused() {
    let store = Store::witness();
    let first = site(&store, "1\n2\n");
    first.start().await.stop().await;
    for wrong in ["1\n3\n", "1\n", ""] {
        let (code, said) = refusal(&site(&store, wrong)).await;
        assert_eq!(code, SETTINGS, "{said}");
        assert!(said.contains("pools.int.used_file has numbers of the SHA-256"), "{said}");
    }
    let (code, said) = refusal(&Site::new(&pool(store.config()))).await;
    assert_eq!(code, SETTINGS, "{said}");
    assert!(said.contains("pools.int.used_file has no numbers here"), "{said}");
    let (code, said) = refusal(&site(&store, "1\nx\n")).await;
    assert_eq!(code, SETTINGS, "{said}");
    assert!(said.contains("used.txt: 1 line is wrong"), "{said}");
    // Also an instance that has the only file.
    let without = Store::witness();
    Site::new(&pool(without.config())).start().await.stop().await;
    let (code, said) = refusal(&site(&without, "1\n2\n")).await;
    assert_eq!(code, SETTINGS, "{said}");
    assert!(said.contains("but no numbers in the space"), "{said}");
    // Also the first instance, later.
    fs::write(first.folder().join("used.txt"), "1\n2\n3\n").unwrap();
    let (code, said) = refusal(&first).await;
    assert_eq!(code, SETTINGS, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_served_alone_can_not_join_a_pool_with_used_numbers() {
    let store = Store::witness();
    let site = site(&store, "1\n2\n");
    let alone = Config::new().pool("int", 0, LAST, 2, 400);
    site.configure(&alone);
    site.start().await.stop().await;
    site.configure(&pool(store.config()).set("pools.int.used_file", "'used.txt'"));
    let (code, said) = refusal(&site).await;
    assert_eq!(code, FOLDER, "{said}");
    assert!(said.contains("has drawn numbers before"), "{said}");
    site.configure(&alone.set("pools.int.used_file", "'used.txt'"));
    let (code, said) = refusal(&site).await;
    assert_eq!(code, SETTINGS, "{said}");
    assert!(said.contains("import the file with tombola import"), "{said}");
}
