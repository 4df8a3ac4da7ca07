//! Idempotency keys and receipts, through the front door (`docs/receipts.md`). The tests of what happens to them
//! when something fails are in `keys_crash.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;

use deadpool_sqlite::rusqlite::Connection;
use reqwest::header::{ACCEPT, HeaderMap};
use reqwest::{Method, Response};
use serde_json::Value;
use support::{Config, Server, Site};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Returns a config with two pools.
fn config() -> Config {
    Config::new().int_and_float(99_999, 2, 5_000)
}

/// The status, the body and whether the response is a replay.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    status: u16,
    replayed: bool,
    body: String,
}

impl Seen {
    async fn of(response: Response) -> Self {
        let status = response.status().as_u16();
        let replayed = response.headers().get("idempotent-replayed").is_some();
        Self { status, replayed, body: response.text().await.unwrap() }
    }

    fn code(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap();
        body["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// A client of one server.
struct Client {
    url: String,
    http: reqwest::Client,
    token: Option<String>,
}

impl Client {
    fn new(server: &Server) -> Self {
        Self {
            url: format!("http://{}", server.address()),
            http: reqwest::Client::new(),
            token: None,
        }
    }

    fn with(server: &Server, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..Self::new(server) }
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        request.send().await.unwrap()
    }

    /// Sends `POST /random` with a key.
    async fn draw(&self, query: &str, key: &str) -> Seen {
        let headers = [("idempotency-key", key)];
        Seen::of(self.send(Method::POST, &format!("/random{query}"), &headers).await).await
    }

    async fn get(&self, path: &str) -> Seen {
        Seen::of(self.send(Method::GET, path, &[]).await).await
    }

    /// Returns the receipts of `/receipts` with these parameters.
    async fn receipts(&self, query: &str) -> Vec<Value> {
        let seen = self.get(&format!("/receipts{query}")).await;
        assert_eq!(seen.status, 200, "{seen:?}");
        seen.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    async fn status(&self) -> Value {
        serde_json::from_str::<Value>(&self.get("/status").await.body).unwrap()["receipts"].take()
    }
}

#[tokio::test]
async fn a_repeated_request_gets_the_same_response_byte_for_byte() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    for (index, query) in
        ["", "?count=1", "?type=float", "?type=float&count=25", "?count=2000&label=x"]
            .into_iter()
            .enumerate()
    {
        let key = format!("key-{index}");
        let first = client.draw(query, &key).await;
        assert_eq!((first.status, first.replayed), (200, false), "{first:?}");
        for key in [key.clone(), format!("\"{key}\"")] {
            let again = client.draw(query, &key).await;
            assert_eq!((again.status, again.replayed), (200, true), "{query}");
            assert_eq!(again.body, first.body, "{query}");
        }
        let other = client.draw(query, &format!("other-{index}")).await;
        assert_ne!(other.body, first.body, "another key gets other numbers");
    }
    // The parameters in a body are the same request as those in the URL.
    let request = client.http.post(format!("http://{}/random", server.address()));
    let request = request.header("idempotency-key", "key-3");
    let response = request.json(&serde_json::json!({"type": "float", "count": 25})).send().await;
    assert!(Seen::of(response.unwrap()).await.replayed);
    server.stop().await;
}

#[tokio::test]
async fn keys_survive_a_restart() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let first = Client::new(&server).draw("?count=3", "a").await;
    server.stop().await;
    let server = site.start().await;
    let client = Client::new(&server);
    assert_eq!(client.draw("?count=3", "a").await, Seen { replayed: true, ..first });
    let _ = client.draw("", "b").await;
    assert_eq!(client.receipts("").await.len(), 2);
    server.stop().await;
}

#[tokio::test]
async fn a_key_for_another_request_is_refused_with_what_it_was_used_for() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    assert_eq!(client.draw("?type=int&count=3&label=order%2017", "a").await.status, 200);
    for query in [
        "?type=float&count=3&label=order%2017",
        "?type=int&count=4&label=order%2017",
        "?type=int&label=order%2017",
        "?type=int&count=3",
        "?type=int&count=3&label=order%2018",
    ] {
        let refused = client.draw(query, "a").await;
        assert_eq!((refused.status, &*refused.code()), (422, "key_reused"), "{query}");
        assert!(refused.body.contains("type=int, count=3"), "{refused:?}");
        assert!(refused.body.contains("order 17"), "{refused:?}");
    }
    assert_eq!(client.receipts("").await.len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_key_that_is_malformed_or_on_a_get_is_refused() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let long = "x".repeat(256);
    for key in ["", "\"\"", "a b", "\"a", "a\"", &long] {
        let refused = client.draw("", key).await;
        assert_eq!((refused.status, &*refused.code()), (400, "bad_key"), "{key:?}");
    }
    let twice = client.send(Method::POST, "/random", &[("idempotency-key", "a"); 2]).await;
    assert_eq!(Seen::of(twice).await.code(), "bad_key");
    let get = client.send(Method::GET, "/random", &[("idempotency-key", "a")]).await;
    assert_eq!(Seen::of(get).await.code(), "key_needs_post");
    for label in ["", "a%0Ab", &"x".repeat(129)] {
        let refused = client.draw(&format!("?label={label}"), "a").await;
        assert_eq!((refused.status, &*refused.code()), (400, "bad_label"), "{label:?}");
    }
    let allowed = client.draw(&format!("?label={}", "%C3%B6".repeat(64)), &"x".repeat(255)).await;
    assert_eq!(allowed.status, 200, "{allowed:?}");
    server.stop().await;
}

#[tokio::test]
async fn an_error_leaves_its_key_free() {
    // One number in all, so that the range is soon used up.
    let site = Site::new(&Config::new().pool("int", 1, 4, 1, 4));
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    assert_eq!(client.draw("?count=5", "a").await.status, 410);
    assert_eq!(client.draw("?count=0", "a").await.status, 400);
    let first = client.draw("?count=4", "a").await;
    assert_eq!((first.status, first.replayed), (200, false));
    assert_eq!(client.draw("?count=1", "b").await.status, 410);
    // A replay needs no numbers.
    assert_eq!(client.draw("?count=4", "a").await, Seen { replayed: true, ..first });
    server.stop().await;
}

#[tokio::test]
async fn a_replay_costs_no_quota() {
    let quota = config().set("quota.numbers_per_second", 0.001).set("quota.burst", 5);
    let site = Site::new(&quota);
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    assert_eq!(client.draw("?count=5", "a").await.status, 200);
    for _ in 0..5 {
        assert!(client.draw("?count=5", "a").await.replayed);
    }
    assert_eq!(client.draw("?count=1", "b").await.status, 429);
    server.stop().await;
}

#[tokio::test]
async fn requests_with_one_key_at_the_same_time_get_one_response() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    for round in 0..20 {
        let key = format!("round-{round}");
        let mut requests = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (client, key) = (Client::new(&server), key.clone());
            requests.spawn(async move { client.draw("?count=2", &key).await });
        }
        let seen = requests.join_all().await;
        let bodies: BTreeSet<_> = seen.iter().map(|seen| &seen.body).collect();
        assert_eq!(bodies.len(), 1, "{seen:?}");
        assert_eq!(seen.iter().filter(|seen| !seen.replayed).count(), 1, "{seen:?}");
    }
    let receipts = Client::new(&server).receipts("").await;
    assert_eq!(receipts.len(), 20);
    server.stop().await;
}

/// Keeps the server from saving receipts until it is dropped.
struct Held {
    _connection: Connection,
}

impl Held {
    fn new(site: &Site) -> Self {
        let connection = Connection::open(site.file("receipts.db")).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        Self { _connection: connection }
    }

    async fn until_waiting(&self, client: &Client, requests: u64) {
        support::eventually("waiting requests", async || {
            (client.status().await["waiting"] == requests).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_waits_for_the_first_request() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let _ = client.draw("", "other").await;
    let held = Held::new(&site);
    let mut requests = tokio::task::JoinSet::new();
    for waiting in 1..=3 {
        let repetition = Client::new(&server);
        requests.spawn(async move { repetition.draw("?count=7", "a").await });
        held.until_waiting(&client, waiting).await;
    }
    drop(held);
    let seen = requests.join_all().await;
    assert!(seen.iter().all(|one| one.status == 200 && one.body == seen[0].body), "{seen:?}");
    assert_eq!(seen.iter().filter(|one| !one.replayed).count(), 1, "{seen:?}");
    assert_eq!(client.receipts("").await.len(), 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_leaves_its_receipt() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let _ = client.draw("", "other").await;
    let held = Held::new(&site);
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let head = format!(
        "POST /random?count=7 HTTP/1.1\r\nHost: {}\r\nIdempotency-Key: a\r\n\r\n",
        server.address()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    held.until_waiting(&client, 1).await;
    drop(stream);
    // The server has noticed that the client is gone.
    held.until_waiting(&client, 0).await;
    drop(held);
    let receipts = support::eventually("the receipt", async || {
        let receipts = client.receipts("?after=1").await;
        (!receipts.is_empty()).then_some(receipts)
    })
    .await;
    let retry = client.draw("?count=7", "a").await;
    assert!(retry.replayed, "{retry:?}");
    let numbers = serde_json::from_str::<Value>(&retry.body).unwrap()["numbers"].clone();
    assert_eq!(receipts[0]["numbers"], numbers);
    assert_eq!(client.receipts("").await.len(), 2);
    server.stop().await;
}

#[tokio::test]
async fn lines_are_replayed_in_any_format() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let lines = async |accept: &str| {
        let headers = [("idempotency-key", "a"), (ACCEPT.as_str(), accept)];
        Seen::of(client.send(Method::POST, "/random?type=float&count=5", &headers).await).await
    };
    let first = lines("text/csv").await;
    assert_eq!(first.body.lines().count(), 5);
    assert_eq!(lines("text/csv").await, Seen { replayed: true, body: first.body.clone(), ..first });
    assert_eq!(lines("application/x-ndjson").await.body, first.body);
    let json: Value =
        serde_json::from_str(&client.draw("?type=float&count=5", "a").await.body).unwrap();
    assert_eq!(json["numbers"].as_array().unwrap().len(), 5);
    server.stop().await;
}

#[tokio::test]
async fn pools_choose_which_responses_leave_a_receipt() {
    let site = Site::new(
        &config()
            .pool("none", 0, 9_999, 2, 100)
            .set("pools.none.receipts", "'off'")
            .pool("every", 0, 9_999, 2, 100)
            .set("pools.every.receipts", "'all'"),
    );
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    for path in ["/random", "/random?count=2", "/random?type=none"] {
        assert_eq!(client.get(path).await.status, 200);
    }
    assert_eq!(client.receipts("").await.len(), 0);
    assert!(site.files("receipts").is_empty(), "the file is made for the first receipt");
    assert_eq!(client.draw("?type=none", "a").await.code(), "keys_off");
    assert_eq!(client.get("/random?type=none&label=x").await.code(), "keys_off");

    assert_eq!(client.get("/random?type=every").await.status, 200);
    assert_eq!(client.get("/random?label=x").await.status, 200);
    let receipts = client.receipts("").await;
    assert_eq!(receipts.len(), 2);
    assert_eq!((&receipts[0]["pool"], &receipts[0]["key_digest"]), (&"every".into(), &Value::Null));
    assert_eq!((&receipts[1]["pool"], &receipts[1]["label"]), (&"int".into(), &"x".into()));
    server.stop().await;
}

#[tokio::test]
async fn modes_below_sharded_refuse_keys() {
    let site = Site::new(&config().set("server.mode", "'json'"));
    let server = site.start().await;
    assert_eq!(Client::new(&server).draw("", "a").await.code(), "keys_off");
    server.stop().await;
    let site = Site::new(&config().set("server.mode", "'json'").set("pools.int.receipts", "'all'"));
    assert!(site.refusal().await.contains("pools.int.receipts"));
}

#[tokio::test]
async fn receipts_are_listed_in_order_after_a_cursor_and_by_label() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    for index in 0..10 {
        let label = if index % 2 == 0 { "even" } else { "odd" };
        assert_eq!(
            client.draw(&format!("?count=2&label={label}"), &format!("k{index}")).await.status,
            200
        );
    }
    let seqs = |receipts: &[Value]| -> Vec<u64> {
        receipts.iter().map(|receipt| receipt["seq"].as_u64().unwrap()).collect()
    };
    assert_eq!(seqs(&client.receipts("").await), (1..=10).collect::<Vec<_>>());
    assert_eq!(seqs(&client.receipts("?after=7").await), [8, 9, 10]);
    assert_eq!(seqs(&client.receipts("?after=3&limit=2").await), [4, 5]);
    assert_eq!(seqs(&client.receipts("?label=odd&after=5").await), [6, 8, 10]);
    assert_eq!(client.receipts("?label=neither").await.len(), 0);
    assert_eq!(client.receipts("?limit=0").await.len(), 0);
    for query in ["?after=x", "?limit=-1", "?after=+1", "?after=99999999999999999999"] {
        assert_eq!(client.get(&format!("/receipts{query}")).await.code(), "bad_number", "{query}");
    }
    assert_eq!(client.get("/receipts?colour=red").await.code(), "unknown_parameter");
    let receipt = &client.receipts("?limit=1").await[0];
    assert_eq!(receipt["count"], 2);
    assert_eq!(receipt["numbers"].as_array().unwrap().len(), 2);
    assert_eq!(receipt["key_digest"].as_str().unwrap().len(), 32);
    server.stop().await;
}

/// A reader that follows the receipts with a cursor while others are written sees each of them once.
#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_skips_nothing_while_receipts_are_written() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let client = Client::new(&server);
        writers.spawn(async move {
            for index in 0..50 {
                let seen = client.draw("", &format!("{writer}-{index}")).await;
                assert_eq!(seen.status, 200, "{seen:?}");
            }
        });
    }
    let client = Client::new(&server);
    let (mut seen, mut after, mut ended) = (Vec::new(), 0, false);
    loop {
        let page = client.receipts(&format!("?after={after}&limit=7")).await;
        if page.is_empty() && ended {
            break;
        }
        for receipt in page {
            after = receipt["seq"].as_u64().unwrap();
            seen.push(after);
        }
        while let Some(written) = writers.try_join_next() {
            written.unwrap();
        }
        ended = writers.is_empty();
    }
    assert_eq!(seen, (1..=400).collect::<Vec<_>>());
    server.stop().await;
}

#[tokio::test]
async fn many_receipts_are_streamed() {
    let site = Site::new(&config().set("pools.int.receipts", "'all'").set("lease.rows", 4_096));
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let client = Client::new(&server);
        requests.spawn(async move {
            for _ in 0..160 {
                assert_eq!(client.get("/random").await.status, 200);
            }
        });
    }
    requests.join_all().await;
    let receipts = client.receipts("").await;
    assert_eq!(receipts.len(), 2_560);
    let numbers: BTreeSet<_> =
        receipts.iter().map(|receipt| receipt["numbers"][0].as_u64()).collect();
    assert_eq!(numbers.len(), 2_560);
    let status = client.status().await;
    assert_eq!((&status["count"], &status["unkeyed"]), (&2_560.into(), &2_560.into()));
    assert_eq!(status["head"], receipts.last().unwrap()["digest"]);
    server.stop().await;
}

/// The index has runs of 16,384 numbers, so these numbers are in several runs and in the receipts after them.
#[tokio::test]
async fn every_number_is_found_wherever_it_is_in_the_index() {
    let site =
        Site::new(&Config::new().pool("int", 0, 999_999, 2, 60_000).pool("x", -5, 999_999, 1, 500));
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let mut numbers = Vec::new();
    for index in 0..12 {
        let count = [5_000, 1, 9_999][index % 3];
        let drawn = client.draw(&format!("?count={count}"), &format!("{index}")).await;
        let drawn: Value = serde_json::from_str(&drawn.body).unwrap();
        let drawn = drawn["numbers"].as_array().unwrap();
        numbers.push((index + 1, drawn[0].clone(), drawn[drawn.len() - 1].clone()));
    }
    server.stop().await;
    let site_again = site.start().await;
    let client = Client::new(&site_again);
    // The quota of look-ups is ten a second.
    for (seq, first, last) in numbers {
        for number in [first, last] {
            let path = format!("/receipts/int/{number}");
            let seen = support::eventually("the quota", async || {
                let seen = client.get(&path).await;
                (seen.status != 429).then_some(seen)
            });
            let seen: Value = serde_json::from_str(&seen.await.body).unwrap();
            assert_eq!(seen["seq"], seq, "{number}");
        }
    }
    site_again.stop().await;
}

#[tokio::test]
async fn a_look_up_tells_nothing_about_numbers_of_others() {
    let (mut entries, mut tokens) = (Vec::new(), Vec::new());
    for (name, owner, scopes) in [
        ("shop", "shop", &["draw", "lookup"][..]),
        ("shop2", "shop", &["draw", "lookup"]),
        ("rival", "rival", &["draw", "lookup"]),
        ("auditor", "auditor", &["audit"]),
        ("watcher", "watcher", &["observe"]),
    ] {
        let (entry, token) = entry(name, owner, scopes);
        entries.push(entry);
        tokens.push(token);
    }
    let config = config()
        .set("auth.tokens", format!("[{}]", entries.join(", ")))
        .set("receipts.lookups_per_second", 1000);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let [shop, shop2, rival, auditor, watcher] =
        [0, 1, 2, 3, 4].map(|index| Client::with(&server, &tokens[index]));

    let drawn = shop.draw("", "a").await;
    let number = serde_json::from_str::<Value>(&drawn.body).unwrap()["number"].clone();
    let path = format!("/receipts/int/{number}");
    for client in [&shop, &shop2, &auditor] {
        let seen = client.get(&path).await;
        assert_eq!(seen.status, 200, "{seen:?}");
        let receipt: Value = serde_json::from_str(&seen.body).unwrap();
        assert_eq!((&receipt["owner"], &receipt["token"]), (&"shop".into(), &"shop.draw".into()));
    }
    // A token of the same owner finds its keys, and another owner's key is another key.
    assert_eq!(shop2.draw("", "a").await, Seen { replayed: true, ..drawn });
    let rivals = rival.draw("", "a").await;
    assert_eq!((rivals.status, rivals.replayed), (200, false));

    // Foreign, without a receipt, free, out of the range, malformed, of no pool: all the same.
    let unkeyed = shop.send(Method::POST, "/random", &[]).await.json::<Value>().await.unwrap();
    let paths = [
        path.clone(),
        format!("/receipts/int/{}", unkeyed["number"]),
        "/receipts/int/5".to_owned(),
        "/receipts/int/-1".to_owned(),
        "/receipts/int/100000".to_owned(),
        "/receipts/int/seven".to_owned(),
        "/receipts/float/0.1234567".to_owned(),
        "/receipts/nowhere/5".to_owned(),
        "/receipts/int/%ff".to_owned(),
    ];
    let mut responses = BTreeSet::new();
    for path in paths {
        let response = rival.send(Method::GET, &path, &[]).await;
        let status = response.status().as_u16();
        let mut headers: HeaderMap = response.headers().clone();
        headers.remove("date");
        responses.insert((status, format!("{headers:?}"), response.text().await.unwrap()));
    }
    assert_eq!(responses.len(), 1, "{responses:#?}");
    assert_eq!(responses.first().unwrap().0, 404);

    for (client, path, status) in [
        (&shop, "/receipts", 403),
        (&watcher, "/receipts", 403),
        (&watcher, &*path, 403),
        (&auditor, "/receipts", 200),
        (&auditor, "/status", 403),
        (&auditor, "/random", 403),
    ] {
        assert_eq!(client.get(path).await.status, status, "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn look_ups_have_a_quota_of_their_own() {
    let site = Site::new(&config().set("receipts.lookups_per_second", 3));
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    let mut statuses = Vec::new();
    for _ in 0..8 {
        statuses.push(client.get("/receipts/int/5").await.status);
    }
    assert!(statuses.contains(&429), "{statuses:?}");
    assert_eq!(client.get("/random").await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn without_look_ups_there_is_no_index() {
    let site =
        Site::new(&config().set("receipts.lookups", false).set("server.count_limit", 60_000));
    site.fill().await;
    let server = site.start().await;
    let client = Client::new(&server);
    assert_eq!(client.draw("?count=2000", "a").await.status, 200);
    assert_eq!(client.get("/receipts/int/5").await.code(), "lookups_off");
    assert_eq!(client.receipts("").await.len(), 1);
    server.stop().await;
}

/// Returns the entries of a token for the settings, and the token.
fn entry(name: &str, owner: &str, scopes: &[&str]) -> (String, String) {
    use sha2::{Digest, Sha256};
    let token = format!("tombola_{name}");
    let hash = hex::encode(Sha256::digest(&token));
    let entries = scopes.iter().map(|scope| {
        format!(
            "{{ name = '{name}.{scope}', owner = '{owner}', scope = '{scope}', sha256 = '{hash}' }}"
        )
    });
    (entries.collect::<Vec<_>>().join(", "), token)
}
