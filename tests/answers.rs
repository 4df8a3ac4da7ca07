//! The shape of every response, to the digit (`docs/http.md`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;

use reqwest::redirect::Policy;
use reqwest::{Method, Url};
use support::{
    Config, Failure, Health, Many, One, Site, Token, assert_each_once, eventually, with_tokens,
};

/// Story: a field was renamed or a number was put in quotes, and every client broke at once.
#[tokio::test(flavor = "multi_thread")]
async fn one_number_comes_with_its_shard_by_get_and_by_post() {
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 1, 100));
    site.fill().await;
    let server = site.start().await;

    let mut numbers = Vec::new();
    for method in [Method::GET, Method::POST] {
        // `int` is the default type.
        for target in ["/random", "/random?type=int"] {
            let answer = server.send(method.clone(), target).await;
            assert_eq!(answer.status, 200, "{}", answer.body);
            let one: One<'_> = answer.parse();
            assert_eq!(one.shard, "int_shard_0.db");
            numbers.push(one.number.get().to_owned());
        }
    }

    assert_eq!(support::missing(&numbers, 1..=1_000), 996);
    server.stop().await;
}

/// Story: a response listed fewer numbers than the request took, or named the wrong shards, and could not be
/// audited. All numbers of a request come from one random shard as long as that shard has enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_count_is_answered_with_so_many_numbers_of_one_shard() {
    let site = Site::new(&Config::new().pool("int", 1, 100_000, 2, 1_000));
    site.fill().await;
    let server = site.start().await;

    let mut numbers = Vec::new();
    for count in [1, 2, 50, 100] {
        for method in [Method::GET, Method::POST] {
            let answer = server.send(method, &format!("/random?count={count}")).await;
            assert_eq!(answer.status, 200, "{}", answer.body);
            let many: Many<'_> = answer.parse();
            assert_eq!((many.count, many.numbers.len()), (count, count));
            let shards: Vec<_> = many.shards.into_iter().collect();
            assert_eq!(shards.len(), 1, "{shards:?}");
            let (shard, taken) = &shards[0];
            assert!(["int_shard_0.db", "int_shard_1.db"].contains(&shard.as_str()));
            assert_eq!(*taken, count);
            numbers.extend(answer.numbers());
        }
    }

    assert_eq!(support::missing(&numbers, 1..=100_000), 100_000 - 306);
    server.stop().await;
}

/// Story: a caller mistyped a parameter, the server ignored it, and `int` numbers were spent instead of
/// `float` numbers. A request that the server does not understand is refused with a message that names what
/// is allowed, and takes no number.
#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_with_what_is_allowed_and_takes_nothing() {
    const TYPES: &[&str] = &["int", "ticket"];
    const COUNTS: &[&str] = &["1", "10000"];
    const PARAMETERS: &[&str] = &["type", "count"];
    let cases: &[(&str, &str, &[&str])] = &[
        ("type=nope", "unknown_type", TYPES),
        ("type=", "unknown_type", TYPES),
        ("type=int%20", "unknown_type", TYPES),
        ("type=..%2Fint", "unknown_type", TYPES),
        // The config leaves it out.
        ("type=float", "unknown_type", TYPES),
        ("count=0", "bad_count", COUNTS),
        ("count=-1", "bad_count", COUNTS),
        ("count=", "bad_count", COUNTS),
        ("count=abc", "bad_count", COUNTS),
        ("count=1.5", "bad_count", COUNTS),
        ("count=1e3", "bad_count", COUNTS),
        ("count=0x10", "bad_count", COUNTS),
        ("count=%201", "bad_count", COUNTS),
        ("count=10001", "bad_count", COUNTS),
        ("count=4294967297", "bad_count", COUNTS),
        ("count=99999999999999999999", "bad_count", COUNTS),
        ("colour=red", "unknown_parameter", PARAMETERS),
        ("Type=int", "unknown_parameter", PARAMETERS),
        ("type=int&colour=red", "unknown_parameter", PARAMETERS),
        ("type=int&type=int", "unknown_parameter", PARAMETERS),
        ("count=1&count=2", "unknown_parameter", PARAMETERS),
    ];
    let config = Config::new().pool("int", 1, 10, 1, 5).pool("ticket", 1, 10, 1, 5);
    let site = Site::new(&config);
    let server = site.start().await;

    for (query, code, allowed) in cases {
        for method in [Method::GET, Method::POST] {
            let answer = server.send(method, &format!("/random?{query}")).await;
            assert_eq!(answer.status, 400, "{query}: {}", answer.body);
            let failure: Failure = answer.parse();
            assert_eq!(failure.code, *code, "{query}: {}", failure.error);
            let error = failure.error.replace([',', '_'], "");
            for word in *allowed {
                assert!(error.contains(word), "{query}: {word} not in {error:?}");
            }
        }
    }

    for pool in ["int", "ticket"] {
        assert_each_once(&server.drain(pool, 2, &[None]).await, 1..=10);
    }
    server.stop().await;
}

/// Story: a client sent its parameters as JSON, as to all its other services, and got an `int` instead of three
/// tickets: the body was ignored.
#[tokio::test(flavor = "multi_thread")]
async fn a_post_takes_its_parameters_from_a_json_body() {
    const JSON: &[(&str, &str)] = &[("content-type", "application/json; charset=utf-8")];
    let site = Site::new(&Config::new().pool("int", 1, 10, 1, 10).pool("ticket", 1, 10, 1, 10));
    site.fill().await;
    let server = site.start().await;
    let client = server.client();
    let send = async |method: Method, target: &str, headers: &[(&str, &str)], body: &str| {
        client.send_body(method, target, headers, body).await.unwrap()
    };

    let mut tickets = Vec::new();
    for (target, body) in [
        ("/random", r#"{"type": "ticket", "count": 3}"#),
        ("/random?type=ticket", r#"{"count": 2.0}"#),
        ("/random?count=1", r#"{"type": "ticket"}"#),
        ("/random?type=ticket&count=1", "{}"),
    ] {
        let answer = send(Method::POST, target, JSON, body).await;
        assert_eq!(answer.status, 200, "{target} {body}: {}", answer.body);
        tickets.extend(answer.numbers());
    }
    for (target, body, status, code) in [
        ("/random?count=1", r#"{"count": 1}"#, 400, "unknown_parameter"),
        ("/random?type=int", r#"{"type": "int"}"#, 400, "unknown_parameter"),
        ("/random", r#"{"type": "ticket", "colour": "red"}"#, 400, "bad_body"),
        ("/random", r#"{"count": 1, "count": 2}"#, 400, "bad_body"),
        ("/random", r#"{"count": "1"}"#, 400, "bad_body"),
        ("/random", r#"{"count": null}"#, 400, "bad_body"),
        ("/random", r#"{"count": 1.5}"#, 400, "bad_body"),
        ("/random", r#"{"type": true}"#, 400, "bad_body"),
        ("/random", "[]", 400, "bad_body"),
        ("/random", "{\"count\": 1", 400, "bad_body"),
        ("/random", r#"{"count": 0}"#, 400, "bad_count"),
        ("/random", r#"{"type": "nope"}"#, 400, "unknown_type"),
    ] {
        let answer = send(Method::POST, target, JSON, body).await;
        assert_eq!(answer.status, status, "{target} {body}: {}", answer.body);
        assert_eq!(answer.parse::<Failure>().code, code, "{target} {body}");
    }
    for headers in [&[][..], &[("content-type", "application/x-www-form-urlencoded")]] {
        let answer = send(Method::POST, "/random", headers, "type=ticket").await;
        assert_eq!((answer.status, &*answer.parse::<Failure>().code), (415, "not_json"));
    }
    // The body of a GET has no meaning.
    let answer = send(Method::GET, "/random?type=ticket&count=1", &[], "type=int").await;
    tickets.extend(answer.numbers());

    assert_eq!(support::missing(&tickets, 1..=10), 2);
    assert_eq!(server.drain("int", 1, &[None]).await.len(), 10, "an error took a number");
    server.stop().await;
}

/// Story: a browser loaded a link ahead of a click, and the number of that response was shown to no one.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_takes_no_number() {
    for mode in ["sharded", "simple"] {
        let site = Site::new(
            &Config::new().pool("int", 1, 4, 1, 4).set("server.mode", format!("'{mode}'")),
        );
        let server = site.start().await;
        for header in
            [("sec-purpose", "prefetch;prerender"), ("purpose", "Prefetch"), ("x-moz", "prefetch")]
        {
            for method in [Method::GET, Method::HEAD, Method::POST] {
                let answer = server.client().send_with(method, "/random", &[header]).await.unwrap();
                assert_eq!(answer.status, 403, "{mode} {header:?}: {}", answer.body);
            }
        }
        let header = [("sec-purpose", "something-else")];
        let taken = eventually("a number", async || {
            let answer = server.client().send_with(Method::GET, "/random", &header).await.unwrap();
            (answer.status == 200).then_some(answer)
        })
        .await;
        assert_eq!(taken.numbers().len(), 1, "{mode}");
        server
            .client()
            .send_with(Method::GET, "/health", &[("purpose", "prefetch")])
            .await
            .unwrap()
            .assert_status(200);
        server.stop().await;
    }
}

/// Story: with `[pools.int] enabled = false`, a request without a type got numbers of whichever pool came
/// first.
#[tokio::test(flavor = "multi_thread")]
async fn no_type_means_int_even_when_there_is_no_int() {
    let site = Site::new(&Config::new().pool("ticket", 1, 10, 1, 5));
    let server = site.start().await;

    let answer = server.get("/random").await;
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert_eq!(answer.parse::<Failure>().code, "unknown_type");

    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_paths_and_wrong_methods_are_answered_in_json() {
    let site = Site::new(&Config::new().pool("int", 1, 10, 1, 5));
    let server = site.start().await;

    for path in ["/nope", "/random/int", "/randomly", "/%00", "//random"] {
        for method in [Method::GET, Method::POST] {
            let answer = server.send(method, path).await;
            assert_eq!(answer.status, 404, "{path}: {}", answer.body);
            assert_eq!(answer.parse::<Failure>().code, "not_found");
        }
    }
    for (path, method, allowed) in [
        ("/random", Method::PUT, ["GET", "POST"].as_slice()),
        ("/random", Method::DELETE, &["GET", "POST"]),
        ("/random", Method::PATCH, &["GET", "POST"]),
        ("/health", Method::DELETE, &["GET"]),
    ] {
        let answer = server.send(method.clone(), path).await;
        assert_eq!(answer.status, 405, "{method} {path}: {}", answer.body);
        assert_eq!(answer.parse::<Failure>().code, "method_not_allowed");
        let allow = answer.header("allow").expect("Allow with a 405");
        let names: Vec<&str> = allow.split(',').map(str::trim).collect();
        for method in allowed {
            assert!(names.contains(method), "{path}: Allow: {allow}");
        }
        assert!(!names.contains(&method.as_str()), "{path}: Allow: {allow}");
    }

    assert_each_once(&server.drain("int", 2, &[None]).await, 1..=10);
    server.stop().await;
}

/// Story: a visitor typed `/docs/`, and was told to check the path.
#[tokio::test(flavor = "multi_thread")]
async fn a_slash_at_the_end_leads_to_the_path_without_it() {
    let token = Token::new("shop", "draw").await;
    let http = reqwest::Client::builder().no_proxy().redirect(Policy::none()).build().unwrap();
    let config = || Config::new().pool("int", 1, 10, 1, 5);
    for (config, import_bytes) in [
        (config(), 1 << 20),
        (with_tokens(config(), &[&token]), 1 << 14),
        (config().set("server.mode", "'json'"), 1 << 14),
    ] {
        let site = Site::new(&config);
        let server = site.start().await;
        let address = server.address();
        for (path, location, leads_to) in [
            ("/docs/", "../docs", "/docs"),
            ("/docs//", "../../docs", "/docs"),
            ("/status/", "../status", "/status"),
            ("/receipts/int/5/?a=b/", "../5?a=b/", "/receipts/int/5?a=b/"),
            ("/pools/int/used/", "../used", "/pools/int/used"),
            ("/nope/", "../nope", "/nope"),
            ("//evil.test/", "../evil.test", "//evil.test"),
        ] {
            let url = Url::parse(&format!("http://{address}{path}")).unwrap();
            assert_eq!(url.join(location).unwrap().as_str(), format!("http://{address}{leads_to}"));
            let body = vec![b'5'; if path.ends_with("/used/") { import_bytes } else { 1 << 14 }];
            for request in [http.get(url.clone()), http.post(url).body(body)] {
                let answer = request.send().await.unwrap();
                assert_eq!(answer.status(), 308, "{path}");
                assert_eq!(answer.headers()["location"], location, "{path}");
                assert_eq!(answer.text().await.unwrap(), "");
            }
        }
        // Without a name, there is no path to lead to.
        let status = server.get("//").await.status;
        assert!([401, 404].contains(&status), "{status}");
        server.stop().await;
    }
}

/// Story: a link preview or a monitor sent HEAD. The framework ran the GET handler and discarded the body,
/// and a number with it.
#[tokio::test(flavor = "multi_thread")]
async fn head_takes_no_number() {
    let site = Site::new(&Config::new().pool("int", 1, 10, 1, 5));
    site.fill().await;
    let server = site.start().await;

    for target in ["/random", "/random?type=int", "/random?count=5"] {
        for _ in 0..10 {
            let answer = server.send(Method::HEAD, target).await;
            assert_eq!(answer.status, 200, "{target}");
            assert_eq!(answer.body, "");
        }
    }

    assert_each_once(&server.drain("int", 2, &[None]).await, 1..=10);
    server.stop().await;
}

/// Story: a caller could not tell "used up" from "come back later", and retried endlessly.
#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_range_is_told_from_one_being_refilled() {
    let config = Config::new().pool("int", 1, 10, 1, 5).pool("ticket", 1, 1_000_000, 1, 10);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;

    server.drain("int", 2, &[None]).await;
    for target in ["/random", "/random?count=1", "/random?count=7"] {
        for method in [Method::GET, Method::POST] {
            server.send(method, target).await.assert_exhausted();
        }
    }

    site.block_refills("ticket", 1).await;
    eventually("the ticket pool to run dry", async || {
        let answer = server.get("/random?type=ticket").await;
        (answer.status != 200).then_some(())
    })
    .await;
    for target in ["/random?type=ticket", "/random?type=ticket&count=2"] {
        for method in [Method::GET, Method::POST] {
            server.send(method, target).await.assert_refilling();
        }
    }
    site.unblock_refills("ticket", 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_names_every_pool() {
    let config = Config::new().pool("int", 1, 1_000, 1, 100).pool("ticket", 1, 1_000, 2, 100);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;

    let answer = server.get("/health").await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let health: Health = answer.parse();
    assert_eq!(health.status, "ok");
    assert!(health.pools.keys().eq(["int", "ticket"]), "{}", answer.body);
    for pool in health.pools.values() {
        assert_eq!(pool.status, "ok");
        assert_eq!(pool.reason, None);
        assert!(!answer.body.contains("reason"), "{}", answer.body);
    }
    server.stop().await;
}

/// Story: 0.1 + 0.2. A value that went through a binary float was printed as 0.30000000000000004, or as 5.1
/// instead of 5.100000, or two values got the same text. Here each of the 10^6 texts of a range is handed out
/// once, with exactly six decimals.
#[tokio::test(flavor = "multi_thread")]
async fn a_million_floats_are_exact_to_the_digit() {
    let config =
        Config::new().pool("float", "0.0", "0.999999", 2, 200_000).set("pools.float.decimals", 6);
    let site = Site::new(&config);
    let server = site.start().await;

    let numbers = server.drain("float", 8, &[None, Some(10_000), Some(1), Some(999)]).await;
    server.stop().await;

    let expected = (0..1_000_000).map(|value| format!("0.{value:06}"));
    assert_texts_once(numbers, expected);
}

/// Story: -0.05 was split into 0 and 5 hundredths and lost its sign, so 0.05 was handed out twice.
#[tokio::test(flavor = "multi_thread")]
async fn negative_floats_are_exact_to_the_digit() {
    let config = Config::new()
        .pool("temperature", "-20.5", "20.49", 2, 500)
        .set("pools.temperature.decimals", 2);
    let site = Site::new(&config);
    let server = site.start().await;

    let numbers = server.drain("temperature", 8, &[None, Some(1), Some(33)]).await;
    server.stop().await;

    let expected = (-2050i32..=2049).map(|value| {
        let sign = if value < 0 { "-" } else { "" };
        let (whole, hundredths) = (value.abs() / 100, value.abs() % 100);
        format!("{sign}{whole}.{hundredths:02}")
    });
    assert_texts_once(numbers, expected);
}

/// Story: integers at both ends of the range went through a double, and two of them became one.
#[tokio::test(flavor = "multi_thread")]
async fn the_ends_of_what_json_can_hold_are_exact() {
    const END: i64 = (1 << 53) - 1;
    let config = Config::new()
        .pool("top", END - 99, END, 1, 50)
        .pool("bottom", -END, -END + 99, 1, 50)
        .pool("digits", "9.99999999999900", "9.99999999999999", 1, 50)
        .set("pools.digits.decimals", 14);
    let site = Site::new(&config);
    let server = site.start().await;

    let counts = &[None, Some(7)];
    assert_each_once(&server.drain("top", 4, counts).await, END - 99..=END);
    assert_each_once(&server.drain("bottom", 4, counts).await, -END..=-END + 99);
    let expected = (0..100).map(|value| format!("9.999999999999{value:02}"));
    assert_texts_once(server.drain("digits", 4, counts).await, expected);
    server.stop().await;
}

/// Story: a shop added `[pools.ticket]`, and its numbers came from the shards of the pool `int`.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_the_users_own_has_its_own_range_and_shards() {
    let config = Config::new().pool("int", 1, 100, 1, 50).pool("ticket", 1, 100, 1, 50);
    let site = Site::new(&config);
    let server = site.start().await;

    let numbers = server.take("ticket", None).await;
    let answer = server.get("/random?type=ticket&count=1").await;
    let many: Many<'_> = answer.parse();
    assert!(many.shards.keys().eq(["ticket_shard_0.db"]));

    // The same numbers exist in both pools, and each is unique within its own.
    let rest = server.drain("ticket", 4, &[None]).await;
    assert_each_once(&[numbers, answer.numbers(), rest].concat(), 1..=100);
    assert_each_once(&server.drain("int", 4, &[None]).await, 1..=100);
    server.stop().await;
}

/// Story: an auditor opened a shard with `sqlite3` and found other numbers than the customers had. After a
/// stop, the used rows of the view are exactly the numbers that were handed out.
#[tokio::test(flavor = "multi_thread")]
async fn the_files_tell_what_was_handed_out() {
    let config = Config::new().pool("float", "-5.0", "5.0", 1, 500).set("pools.float.decimals", 3);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut handed_out = server.take("float", Some(100)).await;
    handed_out.extend(server.take("float", None).await);
    server.stop().await;

    let shard = site.file("float_shard_0.db");
    let sql = "SELECT CAST(number AS REAL) FROM pool WHERE used = 1 ORDER BY 1";
    let used: Vec<f64> = support::column(&shard, sql);
    let mut expected: Vec<f64> = handed_out.iter().map(|text| text.parse().unwrap()).collect();
    expected.sort_by(f64::total_cmp);
    assert_eq!(used, expected);

    let ledger = site.file("used_numbers_float.db");
    let sql = "SELECT CAST(number AS REAL) FROM used ORDER BY 1";
    let in_ledger: Vec<f64> = support::column(&ledger, sql);
    let sql = "SELECT CAST(number AS REAL) FROM pool ORDER BY 1";
    let in_shard: Vec<f64> = support::column(&shard, sql);
    assert_eq!(in_ledger, in_shard);
}

/// Fails unless `numbers` are exactly the expected texts, each once.
fn assert_texts_once(numbers: Vec<String>, expected: impl Iterator<Item = String>) {
    let count = numbers.len();
    let received: BTreeSet<String> = numbers.into_iter().collect();
    let expected: BTreeSet<String> = expected.collect();
    let wrong: Vec<_> = received.symmetric_difference(&expected).take(10).collect();
    assert!(wrong.is_empty(), "missing or outside the range: {wrong:?}");
    assert_eq!(count, received.len(), "some were handed out twice");
}
