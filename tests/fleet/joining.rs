//! Which folders may join a space, and which are refused.

#[cfg(feature = "etcd")]
use crate::store::in_fleet;
use crate::store::{Store, copy_folder};
use crate::support::{Config, Server, Site, assert_each_once, run};

const LAST: i64 = 19_999;
const COUNTS: &[Option<u32>] = &[None, Some(40), None, Some(7)];

/// Adds the pool of these tests for an instance of a fleet.
fn pool(config: Config) -> Config {
    config.pool("int", 0, LAST, 2, 400).set("fleet.lease_rows", 32)
}

fn alone() -> Config {
    Config::new().pool("int", 0, LAST, 2, 400)
}

async fn take(server: &Server, numbers: usize) -> Vec<String> {
    let mut taken = Vec::new();
    while taken.len() < numbers {
        taken.extend(server.take("int", Some(10)).await);
    }
    taken
}

/// Returns a site that has served without a fleet, and the numbers that it handed out.
async fn served_alone() -> (Site, Vec<String>) {
    let site = Site::new(&alone());
    let server = site.start().await;
    let numbers = take(&server, 1_000).await;
    server.stop().await;
    (site, numbers)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_served_alone_joins_with_all_that_it_has() {
    let store = Store::witness();
    let (site, mut numbers) = served_alone().await;
    site.configure(&pool(store.config()));
    let server = site.start().await;
    let other = Site::new(&pool(store.config()));
    let beside = other.start().await;
    numbers.extend(take(&server, 1_000).await);
    numbers.extend(take(&beside, 1_000).await);
    numbers.extend(server.drain("int", 4, COUNTS).await);
    numbers.extend(beside.drain("int", 4, COUNTS).await);
    // All stops were graceful, so no number is burned, and the folder kept all numbers from before it joined.
    assert_each_once(&numbers, 0..=LAST);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_folder_that_served_alone_is_refused() {
    let store = Store::witness();
    let (first, _) = served_alone().await;
    first.configure(&pool(store.config()));
    first.start().await.stop().await;
    let (second, _) = served_alone().await;
    second.configure(&pool(store.config()));
    let said = second.refusal().await;
    assert!(said.contains("raffle"), "the message does not name the space: {said}");
    // Without a fleet, it works as before.
    second.configure(&alone());
    second.start().await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_folder_that_joined_is_refused() {
    let store = Store::witness();
    let (site, _) = served_alone().await;
    let copy = Site::new(&pool(store.config()));
    copy_folder(&site.data(), &copy.data());
    site.configure(&pool(store.config()));
    site.start().await.stop().await;
    let said = copy.refusal().await;
    assert!(said.contains("held") || said.contains("holds"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_a_fleet_is_served_in_its_fleet_only() {
    let store = Store::witness();
    let site = Site::new(&pool(store.config()));
    site.start().await.stop().await;
    site.configure(&alone());
    let said = site.refusal().await;
    assert!(said.contains("[fleet]"), "{said}");
    site.configure(&pool(store.config()).set("fleet.space", "'other'"));
    site.refusal().await;
    site.configure(&pool(store.config()));
    site.start().await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_are_not_those_of_the_space_are_refused() {
    let store = Store::witness();
    let site = Site::new(&pool(store.config()));
    site.start().await.stop().await;
    let others = [
        ("pools.int.min", "-1"),
        ("pools.int.max", "20000"),
        ("pools.int.max", "1000"),
        ("pools.int.decimals", "1"),
    ];
    for (key, value) in others {
        let other = Site::new(&pool(store.config()).set(key, value));
        let said = other.refusal().await;
        assert!(said.contains("int") && said.contains("raffle"), "{key} = {value}: {said}");
    }
    // Settings that don't concern other instances may differ.
    let other = Site::new(&pool(store.config()).set("pools.int.shard_size", 100));
    other.start().await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn init_shards_fills_those_of_a_fleet() {
    let store = Store::witness();
    let sites = [0, 1].map(|_| Site::new(&pool(store.config())));
    for site in &sites {
        site.fill().await;
    }
    let mut numbers = Vec::new();
    for site in &sites {
        let server = site.start().await;
        numbers.extend(server.drain("int", 4, COUNTS).await);
        server.stop().await;
    }
    // The first instance took all numbers except those of the partitions that the second one held.
    assert_each_once(&numbers, 0..=LAST);
}

/// The exit code for a temporary failure.
const MAY_PASS: i32 = 1;

#[tokio::test(flavor = "multi_thread")]
async fn without_its_store_it_does_not_start_and_does_when_it_is_back() {
    let store = Store::witness();
    let site = Site::new(&pool(store.config()));
    site.start().await.stop().await;
    let Store::Witness { file, .. } = &store else { unreachable!() };
    let (folder, away) = (file.parent().unwrap(), file.parent().unwrap().with_extension("away"));
    std::fs::rename(folder, &away).unwrap();
    let finished = run(site.tombola()).await;
    std::fs::rename(&away, folder).unwrap();
    assert_eq!(finished.status.code(), Some(MAY_PASS), "{}", finished.stderr);
    assert!(finished.stderr.contains("witness.db"), "{}", finished.stderr);
    site.start().await.stop().await;
}

/// 0.0.0.0 is not a loopback address, but reaches a closed port of this machine.
#[cfg(feature = "etcd")]
#[tokio::test(flavor = "multi_thread")]
async fn a_password_for_the_store_in_plain_text_is_warned_of() {
    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "secret\n").unwrap();
    let warning = "the password for the store crosses the network in plain text";
    for (host, is_warned) in [("0.0.0.0:1", true), ("127.0.0.1:1", false), ("[::1]:1", false)] {
        let config = in_fleet(Config::new(), &format!("etcd://tombola@{host}"))
            .pool("int", 0, LAST, 1, 400)
            .set("fleet.password_file", format!("'{}'", password.path().display()));
        let finished = run(Site::new(&config).tombola()).await;
        assert_eq!(finished.status.code(), Some(MAY_PASS), "{}", finished.stderr);
        assert_eq!(finished.stderr.contains(warning), is_warned, "{host}: {}", finished.stderr);
    }
}
