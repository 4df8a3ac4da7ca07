//! The engines that can be a fleet's store keep the same promises, and recover from failures without help.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(unused_imports, reason = "which are used is a matter of the features")]
mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tombola::internals::fleet::{FleetStore, open_store};
use tombola::internals::{StoreAddress, StoreConfig};

/// The bound of an operation, plus what a busy machine may add.
const BOUND: Duration = Duration::from_secs(8);

type Store = Arc<dyn FleetStore>;

fn open(address: StoreAddress) -> Store {
    open_store(&StoreConfig { address, password_file: None, tls: None }).unwrap()
}

fn entry(key: &str, value: &str) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

/// Checks all promises of a store, through two instances that share nothing else.
async fn keeps_its_promises(one: &Store, other: &Store) {
    let value = async |key: &str| other.get(key).await.unwrap();

    // The store is empty.
    assert_eq!(value("p/a").await, None);
    assert!(one.list("p/").await.unwrap().is_empty());
    assert!(!one.replace("p/a", "", "x").await.unwrap(), "a missing key has no value");
    assert_eq!(value("p/a").await, None);

    // The first value of a key stays.
    assert!(one.create(&[entry("p/a", "1"), entry("p/b", "")]).await.unwrap());
    let some = [entry("p/a", "2"), entry("p/b", "2"), entry("p/c", "2")];
    assert!(!other.create(&some).await.unwrap(), "two of the keys existed");
    assert!(one.create(&[]).await.unwrap());
    assert_eq!(value("p/a").await.as_deref(), Some("1"));
    assert_eq!(value("p/b").await.as_deref(), Some(""));
    assert_eq!(value("p/c").await.as_deref(), Some("2"));

    // `create_where` creates entries only if all the given ones are as stated.
    let given = [entry("p/a", "1"), entry("p/b", "")];
    for wrong in [entry("p/a", "2"), entry("p/b", "1"), entry("p/none", "")] {
        let given = [&given[..], &[wrong]].concat();
        assert!(!one.create_where(&given, &[entry("p/d", "1")]).await.unwrap(), "{given:?}");
    }
    assert_eq!(value("p/d").await, None);
    assert!(one.create_where(&given, &[entry("p/d", "1"), entry("p/e", "1")]).await.unwrap());
    assert!(!other.create_where(&given, &[entry("p/d", "2")]).await.unwrap(), "the key existed");
    assert_eq!(value("p/d").await.as_deref(), Some("1"));

    // `replace` works only from the current value.
    assert!(!one.replace("p/a", "2", "3").await.unwrap());
    assert_eq!(value("p/a").await.as_deref(), Some("1"));
    assert!(one.replace("p/a", "1", "3").await.unwrap());
    assert!(!one.replace("p/a", "1", "4").await.unwrap());
    assert_eq!(value("p/a").await.as_deref(), Some("3"));
    assert!(one.replace("p/b", "", "full").await.unwrap());
    assert!(one.replace("p/b", "full", "").await.unwrap());
    assert_eq!(value("p/b").await.as_deref(), Some(""));

    // `list` selects by prefix, and no character is a wildcard.
    let keys = ["q%/a", "q_/a", "qx/a", "q/a", "q%", "Q%/a", "q%0", "q%/ü€"];
    one.create(&keys.map(|key| entry(key, key))).await.unwrap();
    let listed =
        async |prefix: &str| other.list(prefix).await.unwrap().into_keys().collect::<Vec<_>>();
    assert_eq!(listed("q%/").await, ["q%/a", "q%/ü€"]);
    assert_eq!(listed("q%/ü").await, ["q%/ü€"]);
    assert_eq!(listed("q_").await, ["q_/a"]);
    assert_eq!(listed("q_/a").await, ["q_/a"], "the key itself is listed too");
    assert_eq!(listed("q/a/").await, [""; 0]);
    assert_eq!(other.list("q%/a").await.unwrap()["q%/a"], "q%/a");

    // A value of 100 kB that does not compress.
    let long: String = (0..100_000_u64).map(|i| char::from(b'0' + (i * i % 75) as u8)).collect();
    one.create(&[entry("long", &long)]).await.unwrap();
    assert_eq!(value("long").await.as_ref(), Some(&long));
    assert!(one.replace("long", &long, &long.replace('1', "'")).await.unwrap());
    assert_eq!(value("long").await, Some(long.replace('1', "'")));

    // As many entries as there are partitions, some of which exist already.
    let partitions = |holder: &str| -> Vec<_> {
        (0..4096).map(|i| (format!("s/partitions/int/{i:04}"), format!("{holder}-{i}"))).collect()
    };
    other.create(&partitions("first")[1000..1200]).await.unwrap();
    one.create(&partitions("second")).await.unwrap();
    let found = other.list("s/partitions/int/").await.unwrap();
    assert_eq!(found.len(), 4096);
    for (i, (key, value)) in found.into_iter().enumerate() {
        let holder = if (1000..1200).contains(&i) { "first" } else { "second" };
        assert_eq!((key, value), partitions(holder)[i]);
    }

    // Exactly one of two concurrent operations succeeds.
    one.create(&[entry("race", "start")]).await.unwrap();
    let mut from = "start".to_owned();
    for round in 0..100 {
        let (a, b) = (format!("a{round}"), format!("b{round}"));
        let (a_won, b_won) =
            tokio::join!(one.replace("race", &from, &a), other.replace("race", &from, &b));
        assert!(a_won.unwrap() != b_won.unwrap(), "round {round}");
        let stands = value("race").await.unwrap();
        assert!(stands == a || stands == b, "round {round}: {stands}");
        from = stands;
        let entries = |value: &str| [entry(&format!("claim/{round}"), value)];
        let (a_claims, b_claims) = (entries("a"), entries("b"));
        let (a, b) = tokio::join!(one.create(&a_claims), other.create(&b_claims));
        assert!(a.unwrap() != b.unwrap(), "round {round}: one of them created it");
        assert!(one.get(&format!("claim/{round}")).await.unwrap().is_some());
    }
}

/// Returns the error of an operation that can't succeed, and checks that it came within the bound.
async fn refusal(store: &Store) -> String {
    let began = Instant::now();
    let error = store.get("key").await.unwrap_err().to_string();
    assert!(began.elapsed() < BOUND, "{:?}: {error}", began.elapsed());
    assert!(!error.contains("secret"), "{error}");
    error
}

fn password_file(folder: &TempDir, password: &str) -> std::path::PathBuf {
    let path = folder.path().join("password");
    std::fs::write(&path, format!("{password}\nnot this\n")).unwrap();
    path
}

fn file(folder: &Path) -> Store {
    open(StoreAddress::File(folder.join("witness.db")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_keeps_its_promises() {
    let folder = tempfile::tempdir().unwrap();
    keeps_its_promises(&file(folder.path()), &file(folder.path())).await;
}

#[cfg(feature = "etcd")]
mod etcd {
    use nix::sys::signal::Signal;
    use tombola::internals::StoreTls;

    use super::support::engines::{Etcd, Pki};
    use super::support::eventually;
    use super::*;

    fn address(etcd: &Etcd) -> StoreAddress {
        StoreAddress::Etcd { user: None, endpoints: etcd.endpoints() }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn keeps_its_promises() {
        let Some(etcd) = Etcd::start(1).await else { return };
        let stores = [open(address(&etcd)), open(address(&etcd))];
        super::keeps_its_promises(&stores[0], &stores[1]).await;
    }

    #[tokio::test]
    async fn lets_in_by_password() {
        let Some(etcd) = Etcd::start(1).await else { return };
        let folder = tempfile::tempdir().unwrap();
        let endpoints = etcd.endpoints();
        let with = |user: Option<&str>, password: Option<&str>| {
            let user = user.map(str::to_owned);
            let address = StoreAddress::Etcd { user, endpoints: endpoints.clone() };
            let password_file = password.map(|password| password_file(&folder, password));
            open_store(&StoreConfig { address, password_file, tls: None })
        };
        let early = refusal(&with(Some("tombola"), Some("secret")).unwrap()).await;
        assert!(early.contains("leave out USER@ in fleet.store"), "{early}");
        for words in [
            &["user", "add", "root:secret"][..],
            &["user", "grant-role", "root", "root"],
            &["user", "add", "tombola:secret"],
            &["auth", "enable"],
        ] {
            etcd.ctl(None, words);
        }
        let store = with(Some("tombola"), Some("secret")).unwrap();
        let forbidden = refusal(&store).await;
        assert!(forbidden.contains("etcdctl role grant-permission"), "{forbidden}");
        for words in [
            &["role", "add", "tombola"][..],
            &["role", "grant-permission", "tombola", "--prefix=true", "readwrite", "tombola/"],
            &["user", "grant-role", "tombola", "tombola"],
        ] {
            etcd.ctl(Some("root:secret"), words);
        }
        store.create(&[entry("tombola/a", "1")]).await.unwrap();
        assert!(store.replace("tombola/a", "1", "2").await.unwrap());
        assert_eq!(store.list("tombola/").await.unwrap().len(), 1);
        // Etcd forgets its tokens, as it does after five idle minutes. After a kill it would recover the
        // newest one from its log.
        etcd.ctl(Some("root:secret"), &["auth", "disable"]);
        etcd.ctl(None, &["auth", "enable"]);
        assert!(store.replace("tombola/a", "2", "3").await.unwrap());

        let wrong = refusal(&with(Some("tombola"), Some("another-secret")).unwrap()).await;
        assert!(wrong.contains("fleet.password_file"), "{wrong}");
        assert!(wrong.contains(&format!("etcd://tombola@{}", endpoints[0])), "{wrong}");
        let nobody = refusal(&with(None, None).unwrap()).await;
        assert!(nobody.contains("put USER@ before the first host"), "{nobody}");
        let none = with(Some("tombola"), None).unwrap_err().to_string();
        assert!(none.contains("set fleet.password_file"), "{none}");
        let empty = with(Some("tombola"), Some("")).unwrap_err().to_string();
        assert!(empty.contains("there is no password in its first line"), "{empty}");
    }

    #[tokio::test]
    async fn speaks_tls_with_whom_it_trusts() {
        let pki = Pki::new();
        let Some(etcd) = Etcd::start_tls(&pki).await else { return };
        let with = |ca: &str, client: Option<(&str, &str)>| {
            let identity = client.map(|(cert, key)| (pki.path(cert), pki.path(key)));
            let tls = Some(StoreTls { ca: pki.path(ca), identity });
            let address = address(&etcd);
            open_store(&StoreConfig { address, password_file: None, tls })
        };
        let client = Some(("client.pem", "client.key"));
        let store = with("ca.pem", client).unwrap();
        store.create(&[entry("a", "1")]).await.unwrap();
        assert_eq!(store.get("a").await.unwrap().as_deref(), Some("1"));

        let untrusted = refusal(&with("other-ca.pem", client).unwrap()).await;
        assert!(untrusted.contains("fleet.tls.ca does not lead to"), "{untrusted}");
        let anonymous = refusal(&with("ca.pem", None).unwrap()).await;
        assert!(anonymous.contains("fleet.tls.cert"), "{anonymous}");
        let plain = refusal(&open(address(&etcd))).await;
        assert!(plain.contains(&etcd.endpoints()[0]), "{plain}");
        let missing = with("nowhere.pem", client).unwrap_err().to_string();
        assert!(missing.contains("nowhere.pem: can't be read"), "{missing}");
        let mixed = with("ca.pem", Some(("client.key", "client.pem"))).unwrap_err().to_string();
        assert!(mixed.contains("there is no certificate in it"), "{mixed}");
    }

    /// One of three nodes is killed and restarted, then another is stopped, and the remaining two serve. With
    /// two nodes stopped, each operation fails within its bound; once one of them is back, the same store
    /// works again.
    #[tokio::test]
    async fn outlives_its_nodes() {
        let Some(mut etcd) = Etcd::start(3).await else { return };
        let store = open(address(&etcd));
        store.create(&[entry("a", "0")]).await.unwrap();
        // The first node is the one that the store uses.
        etcd.kill(0).await;
        eventually("another node to answer", async || store.get("a").await.ok()).await;
        etcd.run(0);
        etcd.serves(0).await;

        // A stopped node accepts connections and never responds. The outcome of a `replace` sent to it is
        // unknown, so it is not retried on another node; other operations are.
        let two =
            open(StoreAddress::Etcd { user: None, endpoints: etcd.endpoints()[1..].to_vec() });
        assert_eq!(two.get("a").await.unwrap().as_deref(), Some("0"));
        etcd.pause(1);
        let began = Instant::now();
        let unknown = two.replace("a", "0", "lost").await.unwrap_err().to_string();
        assert!(began.elapsed() < BOUND, "{:?}: {unknown}", began.elapsed());
        assert!(unknown.contains("no answer within 2 s"), "{unknown}");
        // The stopped node may have been the leader.
        let value = eventually("another node to answer", async || two.get("a").await.ok()).await;
        assert_eq!(value.as_deref(), Some("0"), "no other node received the replacement");
        assert!(two.replace("a", "0", "1").await.unwrap());
        let fresh =
            open(StoreAddress::Etcd { user: None, endpoints: etcd.endpoints()[1..].to_vec() });
        assert_eq!(fresh.get("a").await.unwrap().as_deref(), Some("1"), "it skips a silent node");
        eventually("a node that answers", async || store.get("a").await.ok()).await;

        // The last node trusts its leader for another second, in which its data may be out of date.
        let last =
            open(StoreAddress::Etcd { user: None, endpoints: etcd.endpoints()[..1].to_vec() });
        eventually("the last node to answer", async || last.get("a").await.ok()).await;
        etcd.pause(2);
        let (value, values) = tokio::join!(last.get("a"), last.list("a"));
        value.expect_err("one node of three does not know the newest value");
        values.expect_err("one node of three does not know the newest values");
        let away = refusal(&store).await;
        assert!(away.contains("no answer within 2 s") || away.contains("no leader"), "{away}");
        let began = Instant::now();
        store.replace("a", "1", "2").await.unwrap_err();
        store.create(&[entry("b", "1")]).await.unwrap_err();
        assert!(began.elapsed() < 2 * BOUND);
        etcd.signal(1, Signal::SIGCONT);
        let entries = [entry("c", "1")];
        eventually("two nodes to answer", async || store.create(&entries).await.ok()).await;
        assert_eq!(store.get("c").await.unwrap().as_deref(), Some("1"));
        etcd.signal(2, Signal::SIGCONT);

        // All nodes fail at once, as in a power cut.
        for node in 0..3 {
            etcd.kill(node).await;
        }
        let gone = refusal(&store).await;
        assert!(gone.contains("onnection refused"), "{gone}");
        for node in 0..3 {
            etcd.run(node);
        }
        let back = eventually("the cluster to be back", async || store.get("c").await.ok()).await;
        assert_eq!(back.as_deref(), Some("1"));
    }
}

#[cfg(feature = "postgres")]
mod postgres {
    use nix::sys::signal::Signal;
    use tombola::internals::StoreTls;

    use super::support::engines::{Pki, Postgres, free_address};
    use super::support::eventually;
    use super::*;

    /// Opens a store as `user` with this password.
    fn store(servers: &[&Postgres], user: &str, password: &str) -> Store {
        let folder = tempfile::tempdir().unwrap();
        let address = address(servers, user, "postgres");
        let password_file = Some(password_file(&folder, password));
        open_store(&StoreConfig { address, password_file, tls: None }).unwrap()
    }

    fn address(servers: &[&Postgres], user: &str, database: &str) -> StoreAddress {
        StoreAddress::Postgres {
            user: Some(user.to_owned()),
            endpoints: servers.iter().map(|server| server.endpoint()).collect(),
            database: database.to_owned(),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn keeps_its_promises() {
        let Some(server) = Postgres::start(&[], None).await else { return };
        let stores = [(); 2].map(|()| store(&[&server], "tombola", "secret"));
        // Both find that there is no table.
        let (one, other) = tokio::join!(stores[0].get("a"), stores[1].get("a"));
        assert_eq!((one.unwrap(), other.unwrap()), (None, None));
        super::keeps_its_promises(&stores[0], &stores[1]).await;

        // Another user is first refused, and then uses the table that the first user created.
        let guest = store(&[&server], "guest", "guest-secret");
        let unknown = refusal(&guest).await;
        assert!(unknown.contains("fleet.password_file"), "{unknown}");
        server.sql("CREATE ROLE guest LOGIN PASSWORD 'guest-secret'").await;
        let forbidden = refusal(&guest).await;
        assert!(forbidden.contains("needs SELECT, INSERT and UPDATE"), "{forbidden}");
        server.sql("GRANT SELECT, INSERT, UPDATE ON tombola TO guest").await;
        guest.create(&[entry("guest", "1")]).await.unwrap();
        assert!(guest.replace("guest", "1", "2").await.unwrap());
        server.sql("DROP TABLE tombola").await;
        let missing = refusal(&guest).await;
        assert!(missing.contains("CREATE TABLE IF NOT EXISTS tombola"), "{missing}");

        let wrong = refusal(&store(&[&server], "tombola", "another-secret")).await;
        assert!(wrong.contains("fleet.password_file"), "{wrong}");
        let at = format!("postgres://tombola@{}/postgres", server.endpoint());
        assert!(wrong.contains(&at), "{wrong}");
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = open_store(&StoreConfig {
            address: address(&[&server], "tombola", "nowhere"),
            password_file: Some(password_file(&folder, "secret")),
            tls: None,
        });
        let elsewhere = refusal(&elsewhere.unwrap()).await;
        assert!(elsewhere.contains("create the database"), "{elsewhere}");
    }

    #[tokio::test]
    async fn speaks_tls_with_whom_it_trusts() {
        let pki = Pki::new();
        let Some(server) = Postgres::start(&[], Some(&pki)).await else { return };
        let folder = tempfile::tempdir().unwrap();
        let with = |ca: &str, client: Option<(&str, &str)>| {
            let identity = client.map(|(cert, key)| (pki.path(cert), pki.path(key)));
            open_store(&StoreConfig {
                address: address(&[&server], "tombola", "postgres"),
                password_file: Some(password_file(&folder, "secret")),
                tls: Some(StoreTls { ca: pki.path(ca), identity }),
            })
        };
        let client = Some(("client.pem", "client.key"));
        let store = with("ca.pem", client).unwrap();
        store.create(&[entry("a", "1")]).await.unwrap();
        assert_eq!(store.get("a").await.unwrap().as_deref(), Some("1"));

        let untrusted = refusal(&with("other-ca.pem", client).unwrap()).await;
        assert!(untrusted.contains("fleet.tls.ca does not lead to"), "{untrusted}");
        let anonymous = refusal(&with("ca.pem", None).unwrap()).await;
        assert!(anonymous.contains("the certificate in fleet.tls"), "{anonymous}");
        let plain = refusal(&super::postgres::store(&[&server], "tombola", "secret")).await;
        assert!(plain.contains("no encryption"), "{plain}");
        let mixed = with("ca.pem", Some(("server.pem", "client.key"))).unwrap_err().to_string();
        assert!(mixed.contains("server.pem and "), "{mixed}");
    }

    /// The server is restarted, then down, then silent. Each operation ends within its bound, and the store
    /// recovers without help. With several hosts, the store uses the one that accepts writes.
    #[tokio::test]
    async fn outlives_its_hosts() {
        let Some(mut server) = Postgres::start(&[], None).await else { return };
        let Some(copy) = Postgres::start(&["default_transaction_read_only=on"], None).await else {
            return;
        };
        let alone = store(&[&server], "tombola", "secret");
        let store = store(&[&copy, &server], "tombola", "secret");
        // The table of a standby that lags behind.
        copy.sql(
            "BEGIN READ WRITE; CREATE TABLE tombola (key text PRIMARY KEY, value text NOT NULL); \
             INSERT INTO tombola VALUES ('a', 'old'); COMMIT",
        )
        .await;
        assert_eq!(store.get("a").await.unwrap(), None, "the read-only server was asked");
        store.create(&[entry("a", "1")]).await.unwrap();
        assert_eq!(alone.get("a").await.unwrap().as_deref(), Some("1"));

        // Even a `replace` succeeds, because the store has noticed long before that the connection was lost.
        server.stop().await;
        server.run().await;
        assert!(store.replace("a", "1", "2").await.unwrap());
        assert_eq!(alone.get("a").await.unwrap().as_deref(), Some("2"));

        server.stop().await;
        let away = refusal(&alone).await;
        assert!(away.contains("onnection refused"), "{away}");
        let read_only = refusal(&store).await;
        assert!(read_only.contains("give the host that can be written to"), "{read_only}");
        server.run().await;
        assert_eq!(alone.get("a").await.unwrap().as_deref(), Some("2"));
        assert!(store.replace("a", "2", "3").await.unwrap());

        // The current sessions fall silent, as if the host had vanished. New ones respond.
        server.signal_sessions(Signal::SIGSTOP);
        assert_eq!(alone.get("a").await.unwrap().as_deref(), Some("3"));

        // A stopped server accepts connections and never responds, neither on the open one nor on a new one.
        // The outcome of a `replace` is unknown, so it is not retried on another host.
        server.signal(Signal::SIGSTOP);
        let began = Instant::now();
        let unknown = store.replace("a", "3", "4").await.unwrap_err().to_string();
        assert!(began.elapsed() < BOUND);
        assert!(unknown.contains("no answer within 2 s"), "{unknown}");
        assert!(!unknown.contains("can be written to"), "the other host was asked: {unknown}");
        let silent = refusal(&alone).await;
        assert!(silent.contains("no answer within 2 s"), "{silent}");
        server.signal(Signal::SIGCONT);
        let value = eventually("a response of the server", async || alone.get("a").await.ok())
            .await
            .unwrap();
        assert!(["3", "4"].contains(&value.as_str()), "either outcome: {value}");

        // A silent host is skipped. The `replace` from before may still be executed later.
        alone.create(&[entry("b", "1")]).await.unwrap();
        copy.signal(Signal::SIGSTOP);
        let fresh = super::postgres::store(&[&copy, &server], "tombola", "secret");
        assert_eq!(fresh.get("b").await.unwrap().as_deref(), Some("1"));
        // The bound holds for all five silent hosts together.
        let many = super::postgres::store(&[&copy; 5], "tombola", "secret");
        assert!(refusal(&many).await.contains("no answer within 2 s"));
        let nobody = StoreAddress::Postgres {
            user: None,
            endpoints: vec![free_address().to_string()],
            database: "postgres".to_owned(),
        };
        assert!(refusal(&open(nobody)).await.contains("onnection refused"));
    }
}
