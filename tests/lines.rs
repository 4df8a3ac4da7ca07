//! Numbers and codes as lines of CSV or JSON, which `Accept` selects (`docs/http.md`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::Value;
use support::{Answer, Config, Failure, Many, Server, Site, assert_each_once};

const CSV: (&str, &str) = ("text/csv", "text/csv; charset=utf-8");
const NDJSON: (&str, &str) = ("application/x-ndjson", "application/x-ndjson");
const JSON: &str = "application/json";

/// Sends a request with this `Accept`.
async fn send(server: &Server, method: Method, target: &str, accept: &str) -> Answer {
    let url = format!("http://{}{target}", server.address());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let response = client.request(method, url).header("accept", accept).send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Answer { status, headers, body: response.text().await.unwrap() }
}

/// Returns the lines of a response, which has to be whole and of this content type.
fn lines<'a>(answer: &'a Answer, content_type: &str) -> Vec<&'a str> {
    answer.assert_status(200);
    assert_eq!(answer.header("content-type"), Some(content_type), "{}", answer.body);
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    let length = answer.header("content-length").map(|length| length.parse().unwrap());
    assert!(length.is_none_or(|length: usize| length == answer.body.len()), "{length:?}");
    answer.body.strip_suffix('\n').expect("each line ends").split('\n').collect()
}

/// Story: a slice of a large response ended in the middle of a line, and one number became two. A range is
/// handed out in responses of many slices.
#[tokio::test(flavor = "multi_thread")]
async fn every_number_is_on_one_line_once() {
    const LAST: i64 = 59_999;
    let site = Site::new(&Config::new().pool("int", 0, LAST, 2, 30_000));
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    for (accept, content_type) in [CSV, NDJSON] {
        for (method, count) in
            [(Method::GET, 1), (Method::POST, 2), (Method::POST, 9_997), (Method::GET, 10_000)]
        {
            let target = format!("/random?count={count}");
            let answer = send(&server, method, &target, accept).await;
            let lines = lines(&answer, content_type);
            assert_eq!(lines.len(), count);
            numbers.extend(lines.into_iter().map(str::to_owned));
        }
    }
    numbers.extend(server.drain("int", 4, &[Some(1_000), None]).await);
    assert_each_once(&numbers, 0..=LAST);
    server.stop().await;
}

/// Story: a line said 5.1, and the table of the winners had 5.100000.
#[tokio::test(flavor = "multi_thread")]
async fn a_number_has_all_of_its_decimals() {
    let config =
        Config::new().pool("price", "-0.001", "0.998", 1, 1_000).set("pools.price.decimals", 3);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut taken = BTreeSet::new();
    for (accept, content_type) in [CSV, NDJSON] {
        let answer = send(&server, Method::POST, "/random?type=price&count=500", accept).await;
        taken.extend(lines(&answer, content_type).into_iter().map(str::to_owned));
    }
    let numbers = (0..999).map(|value| format!("0.{value:03}")).chain(["-0.001".to_owned()]);
    assert_eq!(taken, numbers.collect());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_is_escaped_as_its_format_needs() {
    let config = Config::new().set("pools.code.pattern", "'A ,#'").set("pools.code.shards", 1);
    let config = config.set("pools.code.alphabet", r#"'x"\'"#).set("pools.code.shard_size", 3);
    for (accept, expected) in [
        (CSV, [r#""A ,x""#, r#""A ,""""#, r#""A ,\""#]),
        (NDJSON, [r#""A ,x""#, r#""A ,\"""#, r#""A ,\\""#]),
    ] {
        let site = Site::new(&config);
        site.fill().await;
        let server = site.start().await;
        let answer = send(&server, Method::GET, "/random?type=code&count=3", accept.0).await;
        let lines = BTreeSet::from_iter(lines(&answer, accept.1));
        assert_eq!(lines, BTreeSet::from(expected));
        server.stop().await;
    }
    let plain = config.set("pools.code.pattern", "'No #=;'").set("pools.code.alphabet", "'abc'");
    let site = Site::new(&plain);
    site.fill().await;
    let server = site.start().await;
    let answer = send(&server, Method::GET, "/random?type=code&count=3", CSV.0).await;
    let lines = BTreeSet::from_iter(lines(&answer, CSV.1));
    assert_eq!(lines, BTreeSet::from(["No a=;", "No b=;", "No c=;"]));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accept_selects_the_format_by_its_weights() {
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 1, 1_000));
    site.fill().await;
    let server = site.start().await;
    for (accept, content_type) in [
        ("text/csv;q=0.5, application/x-ndjson;q=0.6", NDJSON.1),
        ("application/json;q=0.4, text/*;q=0.5", CSV.1),
        ("application/json, text/csv", JSON),
        ("text/csv;q=0.9, */*", JSON),
        ("*/*", JSON),
        ("text/html", JSON),
        ("text/csv;q=0", JSON),
        ("\u{e9}", JSON),
    ] {
        let answer = send(&server, Method::GET, "/random?count=2", accept).await;
        answer.assert_status(200);
        assert_eq!(answer.header("content-type"), Some(content_type), "{accept}");
        match content_type {
            JSON => assert_eq!(answer.parse::<Many<'_>>().count, 2),
            _ => assert_eq!(lines(&answer, content_type).len(), 2),
        }
    }
    server.stop().await;
}

/// Story: a script saved an error as the list of its winners. Errors are JSON, and so is a number without a
/// count.
#[tokio::test(flavor = "multi_thread")]
async fn errors_and_single_numbers_stay_json() {
    let site = Site::new(&Config::new().pool("int", 1, 10, 1, 10));
    site.fill().await;
    let server = site.start().await;
    for (accept, _) in [CSV, NDJSON] {
        for (target, status, code) in [
            ("/random?count=0", 400, "bad_count"),
            ("/random?type=nope&count=1", 400, "unknown_type"),
            ("/random?count=11", 410, "exhausted"),
        ] {
            let answer = send(&server, Method::POST, target, accept).await;
            assert_eq!((answer.status, answer.header("content-type")), (status, Some(JSON)));
            assert_eq!(answer.parse::<Failure>().code, code);
        }
        let answer = send(&server, Method::POST, "/random", accept).await;
        assert_eq!(answer.header("content-type"), Some(JSON));
        assert_eq!(answer.numbers().len(), 1);
    }
    assert_eq!(server.drain("int", 1, &[None]).await.len(), 8, "an error took a number");
    server.stop().await;
}

/// The description has an example for each pool and format, with the shape of the response.
#[tokio::test(flavor = "multi_thread")]
async fn the_description_has_the_lines() {
    let config = Config::new().pool("int", 1, 100_000, 1, 1_000);
    let config = config.set("pools.code.pattern", "'A,###'").set("pools.code.shard_size", 100);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let description: Value = server.get("/openapi.json").await.parse();
    for method in [Method::GET, Method::POST] {
        let operation = &description["paths"]["/random"][method.as_str().to_lowercase()];
        for (accept, content_type) in [CSV, NDJSON] {
            let examples = &operation["responses"]["200"]["content"][content_type]["examples"];
            let examples = examples.as_object().unwrap();
            assert_eq!(examples.len(), 2, "{examples:?}");
            for (query, example) in examples {
                let target = format!("/random{query}");
                let answer = send(&server, method.clone(), &target, accept).await;
                lines(&answer, content_type);
                let shape = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
                assert_eq!(shape(&answer.body), shape(example["value"].as_str().unwrap()));
            }
        }
    }
    server.stop().await;
}
