//! `/openapi.json` and `/docs` describe what the server does.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::Value;
use support::{Answer, Config, Server, Site, Token, eventually, run, skipped, with_tokens};

/// The path of a receipt.
const RECEIPT: &str = "/receipts/{pool}/{number}";

/// The path that imports numbers.
const USED: &str = "/pools/{pool}/used";

/// Returns a config with two pools, both of which the description has to name, with enough numbers for a
/// test. One keeps no receipts.
fn config() -> Config {
    Config::new()
        .pool("int", 1, 1_000_000, 2, 5_000)
        .pool("price", "0.01", "999.99", 1, 5_000)
        .set("pools.price.decimals", 2)
        .set("pools.price.receipts", "'off'")
        .set("server.count_limit", 40)
}

/// The content of `/openapi.json`.
struct Description(Value);

/// An example in the description.
#[derive(Debug)]
struct Example {
    path: String,
    method: Method,
    status: u16,
    /// The name of the example: the query or the path to send, the method `DELETE`, or the situation in
    /// words.
    when: String,
    headers: BTreeMap<String, Value>,
    body: Value,
}

impl Description {
    async fn of(server: &Server) -> Self {
        let answer = server.get("/openapi.json").await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        Self(answer.parse())
    }

    /// Returns the path, method and description of each operation.
    fn operations(&self) -> Vec<(&str, Method, &Value)> {
        let paths = self.0["paths"].as_object().unwrap();
        let operations = paths.iter().flat_map(|(path, item)| {
            item.as_object().unwrap().iter().map(|(method, operation)| {
                (path.as_str(), method.to_uppercase().parse().unwrap(), operation)
            })
        });
        operations.collect()
    }

    fn examples(&self) -> Vec<Example> {
        let mut examples = Vec::new();
        for (path, method, operation) in self.operations() {
            for (status, response) in operation["responses"].as_object().unwrap() {
                let headers = response["headers"].as_object().into_iter().flatten();
                let headers: BTreeMap<_, _> = headers
                    .map(|(name, header)| (name.clone(), header["example"].clone()))
                    .collect();
                let all = response["content"]["application/json"]["examples"].as_object();
                examples.extend(all.into_iter().flatten().map(|(when, example)| Example {
                    path: path.to_owned(),
                    method: method.clone(),
                    status: status.parse().unwrap(),
                    when: when.clone(),
                    headers: headers.clone(),
                    body: example["value"].clone(),
                }));
            }
        }
        examples
    }

    /// Returns the examples that `when` selects. There has to be at least one.
    fn when(&self, when: impl Fn(&Example) -> bool) -> Vec<Example> {
        let examples: Vec<_> = self.examples().into_iter().filter(when).collect();
        assert!(!examples.is_empty());
        examples
    }
}

impl Example {
    fn name(&self) -> String {
        format!("{} {} {} {}", self.method, self.path, self.status, self.when)
    }

    /// Fails unless the response is exactly the example, except for the numbers handed out.
    fn assert_is(&self, status: u16, headers: &HeaderMap, body: &str) {
        let name = self.name();
        assert_eq!(status, self.status, "{name}: {body}");
        for (header, example) in self.headers.iter().filter(|_| !headers.is_empty()) {
            let found = headers.get(header).unwrap_or_else(|| panic!("{name}: no {header}"));
            let example = example.as_str().map_or_else(|| example.to_string(), str::to_owned);
            // With a quota, the seconds to wait differ each time.
            if status != 429 {
                assert_eq!(found.to_str().unwrap(), example, "{name}: {header}");
            }
        }
        let body: Value = serde_json::from_str(body).unwrap();
        match status {
            200 if ["/random", RECEIPT, USED].contains(&&*self.path) => {
                assert_eq!(shape(&body), shape(&self.body), "{name}");
            }
            // The figures in the example are those of a server that has just started.
            200 if self.path == "/status" => {
                let names =
                    |body: &Value| body.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
                assert_eq!(names(&body), names(&self.body), "{name}");
            }
            429 => assert_eq!(body["code"], self.body["code"], "{name}"),
            _ => assert_eq!(body, self.body, "{name}"),
        }
    }

    fn assert_answered(&self, answer: &Answer) {
        self.assert_is(answer.status, &answer.headers, &answer.body);
    }
}

/// Returns a body without its numbers and strings.
fn shape(body: &Value) -> Value {
    match body {
        Value::Object(map) => map
            .iter()
            .map(|(name, value)| (name.replace(|c: char| c.is_ascii_digit(), "N"), shape(value)))
            .collect(),
        Value::Array(all) => all.iter().map(shape).collect(),
        Value::Number(_) => 0.into(),
        Value::String(_) => "".into(),
        other => other.clone(),
    }
}

/// Sends the requests that the examples name, and returns the names of the examples that were sent.
async fn replay(
    server: &Server,
    description: &Description,
    token: impl Fn(&str) -> String,
) -> Vec<String> {
    let mut sent = Vec::new();
    for example in description.examples() {
        let (method, target) = match example.when.as_str() {
            query if query.starts_with('?') => {
                (example.method.clone(), format!("{}{query}", example.path))
            }
            path if path.starts_with('/') => (example.method.clone(), path.to_owned()),
            "DELETE" => (Method::DELETE, example.path.clone()),
            _ => continue,
        };
        let header = [("authorization", &*token(&example.path))];
        let answer = server.client().send_with(method, &target, &header).await.unwrap();
        example.assert_answered(&answer);
        sent.push(example.name());
    }
    sent
}

/// Story: a route was added without a description. Another was renamed, and the page kept offering the old
/// one.
#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_described_and_every_described_route_is_there() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let drawn = server.send(Method::POST, "/random?label=order-17").await;
    let receipt = format!("/receipts/int/{}", drawn.parse::<Value>()["number"]);
    let description = Description::of(&server).await;
    assert!(description.0["openapi"].as_str().unwrap().starts_with("3.1."));
    assert_eq!(description.0["info"]["version"], env!("CARGO_PKG_VERSION"));

    let mut methods: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut operation_ids = BTreeSet::new();
    for (path, method, operation) in description.operations() {
        let name = format!("{method} {path}");
        for text in ["summary", "description"] {
            assert_ne!(operation[text].as_str().unwrap(), "", "{name} has no {text}");
        }
        assert!(operation_ids.insert(operation["operationId"].as_str().unwrap()), "{name}");
        let responses = operation["responses"].as_object().unwrap();
        for status in ["200", "405", "413", "431"] {
            assert!(responses.contains_key(status), "{name} does not describe {status}");
        }
        for (status, response) in responses {
            assert_ne!(response["description"], "", "{name} {status}");
            let content = response["content"].as_object();
            assert_eq!(
                content.is_none(),
                method == Method::HEAD || status == "431",
                "{name} {status}"
            );
            let json = content.and_then(|content| content.get("application/json"));
            let examples = json.map(|json| json["examples"].as_object().unwrap());
            assert!(examples.is_none_or(|examples| !examples.is_empty()), "{name} {status}");
        }

        let mut target = if path == RECEIPT { receipt.clone() } else { path.to_owned() };
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let value = &parameter["schema"]["enum"][0];
            let place = format!("{{{}}}", parameter["name"].as_str().unwrap());
            target = target.replace(&place, value.as_str().unwrap_or_default());
        }
        let url = format!("http://{}{target}", server.address());
        let answer = reqwest::Client::new().request(method.clone(), url).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{name}");
        let found = answer.headers()["content-type"].to_str().unwrap();
        let described = responses["200"]["content"].as_object();
        assert!(
            described.is_none_or(|all| all.contains_key(found) || all.contains_key("*/*")),
            "{name} {found}"
        );
        methods.entry(path).or_default().insert(method.to_string());
    }

    // A route for GET serves HEAD too.
    for (path, mut methods) in methods {
        if methods.contains("GET") {
            methods.insert("HEAD".to_owned());
        }
        let answer = server.send(Method::DELETE, &path.replace("{file}", "index.css")).await;
        answer.assert_status(405);
        let allowed = answer.header("allow").unwrap().split(", ").map(str::to_owned).collect();
        assert_eq!(methods, allowed, "{path}");
    }

    // Each route that the reference names is described.
    let reference = include_str!("../docs/http.md");
    for part in reference.split("`GET /").skip(1) {
        let path = format!("/{}", part.split(['`', '?']).next().unwrap());
        let path = path.replace("POOL", "{pool}").replace("NUMBER", "{number}");
        assert!(description.0["paths"].get(&path).is_some(), "{path}");
    }
    server.stop().await;
}

/// Story: the page documented an error code that the server had long since renamed. This test provokes each
/// example, and lists those that it can't provoke.
#[tokio::test(flavor = "multi_thread")]
async fn each_example_is_what_the_server_answers() {
    let mut answered: BTreeSet<String> = BTreeSet::new();
    let mut described = BTreeMap::new();
    let mut codes = BTreeSet::new();
    let mut statuses = BTreeSet::new();
    let mut remember = |description: &Description| {
        for example in description.examples() {
            if let Some(code) = example.body["code"].as_str() {
                codes.insert(code.to_owned());
                statuses.insert((example.status, code.to_owned()));
            }
            described.insert(example.name(), example.when);
        }
    };

    // With default settings.
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let description = Description::of(&server).await;
    remember(&description);
    answered.extend(replay(&server, &description, |_| String::new()).await);
    for example in description.when(|example| example.when.starts_with("a body of ")) {
        let size = example.when.split(' ').nth(3).unwrap().parse().unwrap();
        if example.path == USED {
            // The server responds to the head, so a client that sends all of it might not read the response.
            let head = format!(
                "POST {USED} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n\r\n"
            );
            let mut stream = TcpStream::connect(server.address()).unwrap();
            stream.write_all(head.replace(['{', '}'], "").as_bytes()).unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).unwrap();
            let (head, body) = response.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
            example.assert_is(413, &HeaderMap::new(), body);
            answered.insert(example.name());
            continue;
        }
        let url = format!("http://{}{}", server.address(), example.path.replace("{file}", "a"));
        let request = reqwest::Client::new().request(example.method.clone(), url);
        let answer = request.body(vec![b'x'; size]).send().await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        example.assert_is(status, &headers, &answer.text().await.unwrap());
        answered.insert(example.name());
    }
    for when in ["every shard serves", "every pool serves", "at the start"] {
        for example in description.when(|example| example.when == when) {
            example.assert_answered(&server.get(&example.path).await);
            answered.insert(example.name());
        }
    }
    for (when, header) in [
        ("a web page of another site", ("sec-fetch-site", "cross-site")),
        ("another name in `Host`", ("host", "evil.example")),
        ("a prefetch of a browser", ("sec-purpose", "prefetch;prerender")),
    ] {
        for example in description.when(|example| example.when == when) {
            let (method, client) = (example.method.clone(), server.client());
            let answer = client.send_with(method, &example.path, &[header]).await.unwrap();
            example.assert_answered(&answer);
            answered.insert(example.name());
        }
    }
    for example in description.when(|example| example.when.starts_with("the body ")) {
        let body = example.when.strip_prefix("the body ").unwrap();
        let header = [("content-type", "application/json")];
        let sent = server.client().send_body(Method::POST, &example.path, &header, body).await;
        example.assert_answered(&sent.unwrap());
        answered.insert(example.name());
    }
    for example in description.when(|example| example.when == "a body that is not JSON") {
        let sent = server.client().send_body(Method::POST, &example.path, &[], "count=1").await;
        example.assert_answered(&sent.unwrap());
        answered.insert(example.name());
    }

    // Receipts and keys.
    let mut assert_of = |path: Option<&str>, when: &str, answer: &Answer| {
        let is_it = |example: &Example| {
            example.when == when && path.is_none_or(|path| example.path == path)
        };
        for example in description.when(is_it) {
            example.assert_answered(answer);
            answered.insert(example.name());
        }
    };
    let keyed = async |method, target: &str, key: &str| {
        let header = [("idempotency-key", key)];
        server.client().send_with(method, target, &header).await.unwrap()
    };
    // The receipts can be neither made nor read.
    let blocked = ["receipts.db.tmp", "receipts.db"].map(|name| site.file(name));
    std::fs::create_dir(&blocked[0]).unwrap();
    assert_of(
        Some("/random"),
        "the disk is full",
        &keyed(Method::POST, "/random", "order-1").await,
    );
    std::fs::create_dir(&blocked[1]).unwrap();
    let away = server.get("/receipts").await;
    assert_of(None, "the store of the receipts is away", &away);
    for folder in blocked {
        std::fs::remove_dir(folder).unwrap();
    }
    let number = eventually("a receipt", async || {
        let answer = keyed(Method::POST, "/random", "order-2").await;
        (answer.status == 200).then(|| answer.parse::<Value>()["number"].clone())
    })
    .await;
    assert_of(None, "a number", &server.get(&format!("/receipts/int/{number}")).await);
    let free = if number == 1 { 2 } else { 1 };
    let free = server.get(&format!("/receipts/int/{free}")).await;
    assert_of(None, "a number that was not given to this caller", &free);
    assert_of(None, "a key", &keyed(Method::GET, "/random", "order-3").await);
    assert_of(None, "an empty key", &keyed(Method::POST, "/random", "\"\"").await);
    assert_of(
        None,
        "a pool without receipts",
        &keyed(Method::POST, "/random?type=price", "order-3").await,
    );
    keyed(Method::POST, "/random?count=5", "order-3").await.assert_status(200);
    let other = keyed(Method::POST, "/random", "order-3").await;
    assert_of(None, "the key of another request", &other);

    // Imports.
    let import = async |pool: &str, content_type: &str, body: &str| {
        let (target, header) = (format!("/pools/{pool}/used"), [("content-type", content_type)]);
        server.client().send_body(Method::POST, &target, &header, body).await.unwrap()
    };
    let imported = import("int", "text/plain", &format!("{number}\n")).await;
    assert_of(None, "an import", &imported);
    let unknown = import("none", "text/plain", "1").await;
    assert_of(None, "a pool that does not exist", &unknown);
    let wrong = import("int", "text/plain", "1\n2\nx\n").await;
    assert_of(None, "a line that is no number", &wrong);
    assert_of(None, "a body that is not text", &import("int", "application/json", "1").await);
    // The ledger is closed while no build is due, and can't be opened again.
    let (ledger, away) = (site.file("used_numbers_price.db"), site.file("away"));
    let failed = eventually("an import that fails", async || {
        std::fs::rename(&ledger, &away).unwrap();
        let answer = import("price", "text/plain", "0.01").await;
        let _ = std::fs::remove_file(&ledger);
        std::fs::rename(&away, &ledger).unwrap();
        (answer.status == 503).then_some(answer)
    })
    .await;
    assert_of(Some(USED), "the disk is full", &failed);

    // Reloads.
    assert_of(None, "nothing changed", &server.send(Method::POST, "/reload").await);
    site.configure(&config().set("server.listen", "'127.0.0.1:1'"));
    let refused = server.send(Method::POST, "/reload").await;
    assert_of(None, "a setting that can't change", &refused);
    server.stop().await;

    // Without look-ups.
    site.configure(&config().set("receipts.lookups", "false"));
    std::fs::remove_file(site.file("receipts.db")).unwrap();
    let server = site.start().await;
    let description = Description::of(&server).await;
    remember(&description);
    for example in description.when(|example| example.when == "no index is kept") {
        example.assert_answered(&server.get("/receipts/int/1").await);
        answered.insert(example.name());
    }
    server.stop().await;

    // With tokens and a quota.
    let draw = Token::new("shop", "draw").await;
    let observe = Token::new("monitor", "observe").await;
    let (lookup, audit) = (Token::new("desk", "lookup").await, Token::new("audit", "audit").await);
    let admin = Token::new("admin", "admin").await;
    let past = Token::with("past", "observe", &["--expires", "2026-01-31"]).await;
    let guarded = config().set("quota.numbers_per_second", 0.001).set("quota.burst", 20);
    let guarded = guarded.set("receipts.lookups_per_second", 1);
    site.configure(&with_tokens(guarded, &[&draw, &observe, &lookup, &audit, &admin, &past]));
    let server = site.start().await;
    let description = Description::of(&server).await;
    remember(&description);
    let header = [("authorization", &*draw.header())];
    let right = |path: &str| match path {
        "/random" => draw.header(),
        "/receipts" => audit.header(),
        RECEIPT => lookup.header(),
        "/reload" | USED => admin.header(),
        _ => observe.header(),
    };
    answered.extend(replay(&server, &description, right).await);
    let spent = eventually("the quota to be used up", async || {
        let answer = server.client().send_with(Method::GET, "/random", &header).await.unwrap();
        (answer.status == 429).then_some(answer)
    })
    .await;
    for example in description.when(|example| example.status == 429) {
        example.assert_answered(&spent);
        answered.insert(example.name());
    }
    for example in description.when(|example| example.when == "a token that has expired") {
        // It is the same for each scope.
        answered.insert(example.name());
        if ["/status", "/metrics"].contains(&&*example.path) {
            let header = [("authorization", &*past.header())];
            let client = server.client();
            let answer = client.send_with(Method::GET, &example.path, &header).await.unwrap();
            example.assert_answered(&answer);
        }
    }
    let is_of_token = |example: &Example| {
        example.when != "a token that has expired"
            && (example.status == 401 || example.body["code"] == "forbidden")
    };
    for example in description.when(is_of_token) {
        let wrong = if example.path == "/random" { &observe } else { &draw };
        let header = [("authorization", &*wrong.header())];
        let headers = if example.status == 403 { &header[..] } else { &[] };
        let method = example.method.clone();
        let answer = server.client().send_with(method, &example.path, headers).await.unwrap();
        example.assert_answered(&answer);
        answered.insert(example.name());
    }
    server.stop().await;

    // With tokens for some pools.
    let draw = Token::with("shop", "draw", &["--pool", "int"]).await;
    let lookup = Token::with("desk", "lookup", &["--pool", "int"]).await;
    let admin = Token::with("admin", "admin", &["--pool", "int"]).await;
    let with_tickets = config().pool("tickets", 1, 1_000, 1, 100);
    site.configure(&with_tokens(with_tickets, &[&draw, &lookup, &admin]));
    let server = site.start().await;
    let description = Description::of(&server).await;
    remember(&description);
    let is_of_pools = |example: &Example| {
        ["a pool of other tokens", "a token for some pools"].contains(&&*example.when)
    };
    let mut refused = BTreeSet::new();
    for example in description.when(is_of_pools) {
        let (token, target) = match &*example.path {
            "/random" => (&draw, "/random?type=tickets"),
            RECEIPT => (&lookup, "/receipts/tickets/1"),
            USED => (&admin, "/pools/tickets/used"),
            _ => (&admin, "/reload"),
        };
        let (header, method) = ([("authorization", &*token.header())], example.method.clone());
        let answer = server.client().send_with(method, target, &header).await.unwrap();
        example.assert_answered(&answer);
        answered.insert(example.name());
        refused.insert(example.path);
    }
    assert_eq!(refused, BTreeSet::from(["/random", RECEIPT, USED, "/reload"].map(str::to_owned)));
    server.stop().await;

    // When a range is used up.
    let site = Site::new(&Config::new().pool("int", 1, 10, 1, 10));
    site.fill().await;
    let server = site.start().await;
    let description = Description::of(&server).await;
    remember(&description);
    server.get("/random?count=7").await.assert_status(200);
    let few = server.get("/random?count=5").await;
    server.get("/random?count=3").await.assert_status(200);
    let none = server.get("/random").await;
    let health = eventually("the end of the rotation", async || {
        let answer = server.get("/health").await;
        (answer.status == 503).then_some(answer)
    })
    .await;
    let ready = server.get("/ready").await;
    for (when, answer) in [
        ("3 numbers are left", few),
        ("the range is used up", none),
        ("the ranges are used up", health),
        ("all ranges are used up", ready),
    ] {
        for example in description.when(|example| example.when == when) {
            example.assert_answered(&answer);
            answered.insert(example.name());
        }
    }
    server.stop().await;

    // When an instance of a fleet has used up its part of the range.
    let witness = tempfile::tempdir().unwrap();
    let store = format!("'file://{}'", witness.path().join("witness.db").display());
    let alone = Config::new().pool("int", 1, 10, 1, 10).set("fleet.store", store);
    let site = Site::new(&alone.set("fleet.space", "'raffle'").set("fleet.claim", 4096));
    let server = site.start().await;
    let description = Description::of(&server).await;
    eventually("ten numbers", async || {
        (server.get("/random?count=10").await.status == 200).then_some(())
    })
    .await;
    let none = eventually("the end of its strata", async || {
        let answer = server.get("/random").await;
        (answer.status == 410).then_some(answer)
    })
    .await;
    for example in
        description.when(|example| example.when == "other instances of the fleet may have some")
    {
        example.assert_answered(&none);
        answered.insert(example.name());
    }
    let imported = server.client().send_body(Method::POST, "/pools/int/used", &[], "1").await;
    for example in description.when(|example| example.when == "an instance of a fleet") {
        example.assert_answered(imported.as_ref().unwrap());
        answered.insert(example.name());
    }
    server.stop().await;

    // When refills fail.
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 1, 10));
    site.fill().await;
    let server = site.start().await;
    site.block_refills("int", 1).await;
    let description = Description::of(&server).await;
    remember(&description);
    let refilling = eventually("a shard that is used up", async || {
        let answer = server.get("/random").await;
        (answer.status == 503).then_some(answer)
    })
    .await;
    for example in description.when(|example| example.body["code"] == "refilling") {
        example.assert_answered(&refilling);
        answered.insert(example.name());
    }
    let unready = eventually("a pool that does not serve", async || {
        let answer = server.get("/ready").await;
        (answer.status == 503).then_some(answer)
    })
    .await;
    for example in description.when(|example| example.when == "no pool serves") {
        example.assert_answered(&unready);
        answered.insert(example.name());
    }
    site.unblock_refills("int", 1);
    server.stop().await;

    described.retain(|name, _| !answered.contains(name));
    let left: BTreeSet<_> = described.into_values().collect();
    // The first example takes luck to provoke, and /openapi.json is an example itself.
    assert_eq!(
        left,
        BTreeSet::from(["demand exceeds the refill rate".to_owned(), "shortened".to_owned()])
    );

    // Each code of the table is described, except for those of the simpler modes.
    let table = description.0["components"]["schemas"]["Code"]["enum"].as_array().unwrap();
    let mut missing: BTreeSet<_> =
        table.iter().map(|code| code.as_str().unwrap().to_owned()).collect();
    missing.retain(|code| !codes.contains(code));
    assert_eq!(missing, ["not_saved", "out_of_tries"].map(str::to_owned).into());

    // The reference lists each code with the same status.
    let reference = include_str!("../docs/http.md");
    for (status, code) in statuses {
        let mut rows = reference.lines().filter(|line| line.contains(&format!("`{code}`")));
        assert!(rows.any(|row| row.contains(&status.to_string())), "{status} {code}");
    }
}

/// Story: a program was written from the description, which did not list the values of a shard's state.
#[tokio::test(flavor = "multi_thread")]
async fn the_words_of_the_status_are_described() {
    let site = Site::new(&config());
    let server = site.start().await;
    let description = Description::of(&server).await;
    let schemas = &description.0["components"]["schemas"];
    for (schema, field, words) in [
        ("ShardStatus", "state", "in_rotation refilling depleted damaged"),
        ("RefillStatus", "outcome", "filled failed"),
        (
            "EventStatus",
            "kind",
            "started depleted refilled refill_failed damaged exhausted receipts_failed reloaded imported",
        ),
    ] {
        let described = schemas[schema]["properties"][field]["enum"].as_array().unwrap().iter();
        let described: Vec<_> = described.map(|word| word.as_str().unwrap()).collect();
        assert_eq!(described, words.split(' ').collect::<Vec<_>>(), "{schema}");
        let required = schemas[schema]["required"].as_array().unwrap();
        assert!(required.iter().any(|name| name == field), "{schema}: {field}");
    }
    server.stop().await;
}

/// Story: the description was of a server in general, and callers asked this one for what it did not have.
#[tokio::test(flavor = "multi_thread")]
async fn the_description_is_of_this_very_server() {
    let parameter = |description: &Description, name: &str| {
        let parameters = description.0["paths"]["/random"]["get"]["parameters"].as_array().unwrap();
        parameters.iter().find(|parameter| parameter["name"] == name).unwrap().clone()
    };
    let site = Site::new(&config());
    let server = site.start().await;
    let description = Description::of(&server).await;
    let type_ = parameter(&description, "type");
    assert_eq!(type_["schema"]["enum"], serde_json::json!(["int", "price"]));
    assert_eq!(type_["schema"]["default"], "int");
    for range in ["1 to 1000000", "0.01 to 999.99"] {
        assert!(type_["description"].as_str().unwrap().contains(range), "{type_}");
    }
    assert_eq!(type_["required"], false);
    let count = parameter(&description, "count");
    assert_eq!((&count["schema"]["minimum"], &count["schema"]["maximum"]), (&1.into(), &40.into()));
    assert!(description.0["components"].get("securitySchemes").is_none());
    let codes = description.examples();
    let codes = codes.iter().filter(|example| [401, 403, 429].contains(&example.status));
    let codes: BTreeSet<_> = codes.map(|example| example.body["code"].as_str().unwrap()).collect();
    // Look-ups always have a quota.
    assert_eq!(codes, BTreeSet::from(["cross_site", "over_quota", "prefetch"]));
    server.stop().await;

    let token = Token::new("shop", "draw").await;
    let strict = Config::new().pool("ticket", 1, 1_000, 1, 100).set("quota.numbers_per_second", 5);
    site.configure(&with_tokens(strict.set("quota.burst", 20), &[&token]));
    let server = site.start().await;
    let description = Description::of(&server).await;
    // Without a pool `int`, the parameter has no default.
    assert_eq!(parameter(&description, "type")["required"], true);
    assert_eq!(parameter(&description, "count")["schema"]["maximum"], 20);
    assert_eq!(description.0["components"]["securitySchemes"]["token"]["scheme"], "bearer");
    for (path, _, operation) in description.operations() {
        let needs = operation.get("security").map(|all| all[0]["token"][0].as_str().unwrap());
        let target = path.replace("{file}", "index.css");
        let url = format!("http://{}{target}", server.address());
        let status = reqwest::get(url).await.unwrap().status();
        assert_eq!(needs.is_some(), status == 401, "{path}");
        assert_eq!(needs == Some("draw"), path == "/random", "{path}");
    }
    // The description is public, so it shows nothing that requires the scope `observe`.
    let examples = description.examples();
    let status = examples.iter().find(|example| example.path == "/status").unwrap();
    assert_eq!(status.body["pools"], serde_json::json!({}));
    assert!(!description.0.to_string().contains("process_"));
    server.stop().await;
}

/// Story: without a network the page stayed blank, because its scripts were on another host. In a browser, it
/// shows each route.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_needs_nothing_from_elsewhere() {
    let site = Site::new(&config());
    let server = site.start().await;
    let url = format!("http://{}/docs", server.address());
    let answer = reqwest::get(&url).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/html; charset=utf-8");
    let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("default-src 'none'") && !policy.contains("http"), "{policy}");
    let page = answer.text().await.unwrap();
    let targets = page.split(['"']).filter(|part| part.contains('.') && !part.contains([' ', '>']));
    let mut files = 0;
    for target in targets {
        assert!(!target.contains("//"), "{target}");
        let url = format!("http://{}/{target}", server.address());
        let answer = reqwest::get(&url).await.unwrap();
        assert_eq!(answer.status(), 200, "{target}");
        files += usize::from(target.starts_with("docs/"));
    }
    assert_eq!(files, 6);
    let initializer = format!("{url}/swagger-initializer.js");
    let initializer = reqwest::get(initializer).await.unwrap().text().await.unwrap();
    for words in ["\"url\": \"openapi.json\"", "\"validatorUrl\": \"none\""] {
        assert!(initializer.contains(words), "{initializer}");
    }

    let description = Description::of(&server).await;
    let browser = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|browser| {
        Command::new(browser).arg("--version").output().is_ok_and(|output| output.status.success())
    });
    match browser {
        None => skipped("Chromium is not installed (Debian package chromium)"),
        Some(browser) => {
            let mut command = Command::new(browser);
            command.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
            command.arg(format!("--user-data-dir={}", site.folder().join("browser").display()));
            command.args(["--virtual-time-budget=20000", &url]);
            let shown = run(command).await.stdout;
            for (path, method, operation) in description.operations() {
                let id = operation["operationId"].as_str().unwrap();
                let tag = operation["tags"][0].as_str().unwrap();
                assert!(
                    shown.contains(&format!("operations-{tag}-{id}")),
                    "{method} {path}: {shown}"
                );
            }
        }
    }
    server.stop().await;
}

/// The simpler modes have no description of themselves; `docs/http.md` says what they serve.
#[tokio::test(flavor = "multi_thread")]
async fn the_modes_below_have_no_description() {
    for mode in ["simple", "json", "sqlite"] {
        let site = Site::new(
            &Config::new().pool("int", 1, 1_000, 1, 100).set("server.mode", format!("'{mode}'")),
        );
        let server = site.start().await;
        for path in ["/openapi.json", "/docs", "/docs/index.css"] {
            server.get(path).await.assert_status(404);
        }
        server.stop().await;
    }
}
