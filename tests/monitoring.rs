//! The reports of the server: `/status`, `/ready` and `/metrics`, and how `ops/` uses them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};

use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;
use support::{Config, Failure, Server, Site, eventually, run, skipped};

const LAST: u64 = 4_999;

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 500).set("lease.rows", 16)
}

async fn status(server: &Server) -> Value {
    let answer = server.get("/status").await;
    answer.assert_status(200);
    answer.parse()
}

/// Polls `/status` until `shows` accepts it.
async fn status_when(server: &Server, what: &str, shows: impl Fn(&Value) -> bool) -> Value {
    eventually(what, async || Some(status(server).await).filter(&shows)).await
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a count"))
}

/// Issued, pooled, burned and free always add up to the size of the range.
fn assert_adds_up(pool: &Value) {
    let parts = ["issued", "pooled", "burned", "free"].map(|part| count(&pool[part]));
    assert_eq!(parts.iter().sum::<u64>(), count(&pool["range"]["size"]), "{pool}");
}

fn kinds(status: &Value) -> BTreeSet<&str> {
    let events = status["events"].as_array().unwrap().iter();
    events.map(|event| event["kind"].as_str().unwrap()).collect()
}

fn states(status: &Value) -> Vec<&str> {
    let shards = status["pools"]["int"]["shards"].as_array().unwrap().iter();
    shards.map(|shard| shard["state"].as_str().unwrap()).collect()
}

/// Fails unless `value` has exactly these fields, in any order.
fn assert_fields(value: &Value, fields: &str) {
    let found: BTreeSet<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(found, fields.split(' ').collect(), "{value}");
}

/// Story: a page was written against a field that a later version renamed.
#[tokio::test(flavor = "multi_thread")]
async fn status_has_the_fields_that_pages_and_consoles_read() {
    let decimals =
        Config::new().pool("price", "0.0", "9.999", 2, 500).set("pools.price.decimals", 3);
    let site = Site::new(&decimals);
    let server = site.start().await;
    server.take("price", None).await;
    let status =
        status_when(&server, "a refill", |status| kinds(status).contains("refilled")).await;
    assert_fields(
        &status,
        "version time started_at uptime_seconds status connections requests history pools receipts \
         settings events",
    );
    assert_fields(
        &status["receipts"],
        "count head keys_known_since bytes keyed unkeyed replayed refused waiting trouble",
    );
    assert_fields(&status["settings"], "digest reload");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    for time in ["time", "started_at"] {
        let time = status[time].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && time.contains('T'), "{time}");
    }
    assert!(status["uptime_seconds"].as_f64().unwrap() > 0.0, "{status}");
    assert!(count(&status["connections"]) >= 1, "{status}");
    assert_fields(
        &status["requests"],
        "total per_second p50_seconds p99_seconds p999_seconds by_status",
    );
    assert_fields(
        &status["history"],
        "step_seconds requests_per_second numbers_per_second p50_seconds p99_seconds",
    );
    assert_eq!(status["history"]["step_seconds"], 5);
    let pool = &status["pools"]["price"];
    assert_fields(
        pool,
        "status reason range issued pooled free burned issued_per_second seconds_until_used_up \
         guess_chance partitions shards",
    );
    // Numbers have all of their decimals.
    let wire = server.get("/status").await.body;
    assert!(
        wire.contains(r#""range":{"min":0.000,"max":9.999,"decimals":3,"size":10000}"#),
        "{wire}"
    );
    assert_adds_up(pool);
    let shard = &pool["shards"][0];
    assert_fields(shard, "name state left rows size generation standby progress last_refill");
    assert_eq!(shard["name"], "price_shard_0.db");
    assert_eq!(shard["size"], 500);
    let refills = pool["shards"].as_array().unwrap().iter().map(|shard| &shard["last_refill"]);
    let refill = refills.clone().find(|refill| !refill.is_null()).unwrap();
    assert_fields(refill, "at seconds outcome");
    assert_eq!(refill["outcome"], "filled");
    assert_fields(&status["events"][0], "id at kind pool shard message");
    let ids: Vec<_> =
        status["events"].as_array().unwrap().iter().map(|event| count(&event["id"])).collect();
    assert!(ids.is_sorted_by(|newer, older| newer > older), "{ids:?}");
    server.stop().await;
}

/// Story: numbers that were leased ahead were shown as issued, a restart reset the count to zero, and no
/// figure accounted for the numbers lost in a crash.
#[tokio::test(flavor = "multi_thread")]
async fn issued_numbers_are_counted_one_by_one_and_for_good() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let pool = &status(&server).await["pools"]["int"];
    assert_eq!((count(&pool["issued"]), count(&pool["pooled"])), (0, 1_000));
    assert!(pool["seconds_until_used_up"].is_null() && pool["status"] == "ok", "{pool}");

    let mut taken = 0;
    for asked in [None, Some(1), Some(70), Some(600), None] {
        taken += server.take("int", asked).await.len() as u64;
        let pool = &status(&server).await["pools"]["int"];
        assert_eq!(count(&pool["issued"]), taken, "after {asked:?}");
        assert_adds_up(pool);
    }
    let shown = status(&server).await;
    let pool = &shown["pools"]["int"];
    assert_eq!(pool["guess_chance"].as_f64().unwrap(), taken as f64 / 5_000.0);
    let rate = pool["issued_per_second"].as_f64().unwrap();
    assert!(rate > 0.0, "{pool}");
    let seconds = pool["seconds_until_used_up"].as_f64().unwrap();
    let left = count(&pool["pooled"]) + count(&pool["free"]);
    assert!((seconds * rate - left as f64).abs() < 1.0, "{pool}");
    let requests = &shown["requests"];
    let by_status = requests["by_status"].as_object().unwrap();
    assert_eq!(by_status.values().map(count).sum::<u64>(), count(&requests["total"]));
    assert_eq!(count(&by_status["200"]), 5, "{requests}");
    assert!(requests["p50_seconds"].as_f64().unwrap() > 0.0, "{requests}");
    server.stop().await;

    let server = site.start().await;
    let pool = &status(&server).await["pools"]["int"];
    assert_eq!((count(&pool["issued"]), count(&pool["burned"])), (taken, 0));
    assert_adds_up(pool);
    taken += server.take("int", None).await.len() as u64;
    server.kill().await;

    let server = site.start().await;
    let pool = &status(&server).await["pools"]["int"];
    let burned = count(&pool["burned"]);
    assert!((1..=2 * 2 * 16).contains(&burned), "{pool}");
    // After a crash, all rows that were leased count as burned, although some of them were issued.
    assert!(count(&pool["issued"]) + burned >= taken && count(&pool["issued"]) <= taken, "{pool}");
    assert_adds_up(pool);
    server.stop().await;
}

/// Story: a standby generation that was complete at a stop was shown as issued after the next start.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_available_at_a_start_do_not_count_as_issued() {
    let site = Site::new(&config());
    let taken = site.stop_with_standby(500).await.len() as u64;
    let server = site.start().await;
    let pool = &status(&server).await["pools"]["int"];
    assert_eq!(count(&pool["issued"]), taken, "{pool}");
    assert_adds_up(pool);
    server.stop().await;
}

/// Story: the disk was full and the pool ran dry, and only the callers noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_runs_dry_is_seen_and_so_is_its_return() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let ready = server.get("/ready").await;
    ready.assert_status(200);
    assert_eq!(ready.body, r#"{"ready":true,"pools":{"int":true}}"#);
    site.block_refills("int", 2).await;
    while server.get("/random").await.status == 200 {}
    let dry = status_when(&server, "two empty shards", |status| {
        states(status).iter().all(|&state| state != "in_rotation")
            && kinds(status).is_superset(&["depleted", "refill_failed"].into())
    })
    .await;
    assert_eq!((&dry["status"], &dry["pools"]["int"]["status"]), (&"down".into(), &"down".into()));
    assert!(dry["pools"]["int"]["reason"].is_string(), "{dry}");
    let failed = status_when(&server, "a refill that failed", |status| {
        let shards = status["pools"]["int"]["shards"].as_array().unwrap();
        shards.iter().any(|shard| shard["last_refill"]["outcome"] == "failed")
    });
    assert_adds_up(&failed.await["pools"]["int"]);
    let ready = server.get("/ready").await;
    ready.assert_status(503);
    assert_eq!(ready.body, r#"{"ready":false,"pools":{"int":false}}"#);
    // A lasting failure is one event, or it would displace all others.
    let failures = |status: &Value| {
        let events = status["events"].as_array().unwrap().iter();
        events.filter(|event| event["kind"] == "refill_failed").count()
    };
    let metrics = |text: &str| sample(text, "tombola_refill_duration_seconds_count", "failed");
    let before = failures(&status(&server).await);
    let tries = metrics(&scrape(&server).await);
    eventually("three more tries", async || {
        (metrics(&scrape(&server).await) >= tries + 3.0).then_some(())
    })
    .await;
    assert!(failures(&status(&server).await) <= before + 2, "each try is an event");

    site.unblock_refills("int", 2);
    status_when(&server, "the return", |status| {
        status["status"] == "ok"
            && kinds(status).contains("refilled")
            && states(status) == ["in_rotation"; 2]
    })
    .await;
    server.get("/ready").await.assert_status(200);
    server.stop().await;
}

/// Story: a file was set aside and the log said so, but no operator read the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_shard_is_seen_until_its_next_generation_serves() {
    // In the first range, no numbers are left to build another generation from.
    for (last, serves_again) in [(999, false), (LAST, true)] {
        let site = Site::new(&Config::new().pool("int", 0, last, 2, 500));
        site.fill().await;
        fs::write(site.file("int_shard_0.db"), "not a shard").unwrap();
        let server = site.start().await;
        let seen =
            status_when(&server, "the damage", |status| kinds(status).contains("damaged")).await;
        assert_adds_up(&seen["pools"]["int"]);
        let events = seen["events"].as_array().unwrap().iter();
        let shards: Vec<_> =
            events.filter(|e| e["kind"] == "damaged").map(|e| &e["shard"]).collect();
        assert_eq!(shards, ["int_shard_0.db"]);
        let expected = if serves_again { "in_rotation" } else { "damaged" };
        status_when(&server, expected, |status| states(status) == [expected, "in_rotation"]).await;
        server.stop().await;
    }
}

/// Story: the range was used up during the night, and in the morning it was not known since when.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_used_up_is_seen() {
    let site = Site::new(&config());
    let server = site.start().await;
    server.drain("int", 4, &[None, Some(50)]).await;
    let status =
        status_when(&server, "the end", |status| kinds(status).contains("exhausted")).await;
    let pool = &status["pools"]["int"];
    assert_eq!(count(&pool["issued"]), LAST + 1);
    assert_eq!((count(&pool["pooled"]), count(&pool["free"])), (0, 0));
    assert_eq!(pool["guess_chance"], 1.0);
    // Another server could not do better: it returns 410 as well. So this one stays ready.
    let ready = server.get("/ready").await;
    ready.assert_status(200);
    assert_eq!(ready.body, r#"{"ready":true,"pools":{"int":false}}"#);
    server.stop().await;
}

/// Story: the range of one pool was used up, and the load balancer removed all replicas permanently, so the
/// other pool could not be reached either.
#[tokio::test(flavor = "multi_thread")]
async fn one_pool_that_does_not_serve_makes_no_server_unready() {
    let site = Site::new(&config().pool("few", 1, 10, 1, 10));
    site.fill().await;
    let server = site.start().await;
    let ready = async |server: &Server, status: u16, body: &str| {
        eventually(body, async || {
            let answer = server.get("/ready").await;
            (answer.body == body).then(|| answer.assert_status(status))
        })
        .await;
    };
    ready(&server, 200, r#"{"ready":true,"pools":{"few":true,"int":true}}"#).await;

    server.drain("few", 2, &[None]).await;
    ready(&server, 200, r#"{"ready":true,"pools":{"few":false,"int":true}}"#).await;
    let url = format!("http://{}", server.address());
    let health = async || {
        let words = ["health", "--url", &url];
        run(site.bare(env!("CARGO_BIN_EXE_tombola"), &words)).await.status.code()
    };
    assert_eq!(health().await, Some(0));

    // The other pool runs dry and recovers.
    site.block_refills("int", 2).await;
    while server.get("/random").await.status == 200 {}
    ready(&server, 503, r#"{"ready":false,"pools":{"few":false,"int":false}}"#).await;
    assert_eq!(health().await, Some(1));
    site.unblock_refills("int", 2);
    ready(&server, 200, r#"{"ready":true,"pools":{"few":false,"int":true}}"#).await;
    server.stop().await;

    let server = site.start().await;
    ready(&server, 200, r#"{"ready":true,"pools":{"few":false,"int":true}}"#).await;
    server.stop().await;
}

/// Story: any client that could reach the server could read its paths and the address of the fleet's store.
#[tokio::test(flavor = "multi_thread")]
async fn health_says_in_words_what_the_status_says_in_full() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    site.block_refills("int", 2).await;
    while server.get("/random").await.status == 200 {}
    let path = site.data().display().to_string();
    let told = status_when(&server, "the path", |status| {
        status["pools"]["int"]["reason"].as_str().is_some_and(|reason| reason.contains(&path))
    });
    told.await;
    let health = server.get("/health").await;
    health.assert_status(503);
    assert!(health.body.contains(r#""reason":"a shard can't be refilled""#), "{}", health.body);
    assert!(!health.body.contains('/') && !health.body.contains(".db"), "{}", health.body);
    site.unblock_refills("int", 2);
    server.stop().await;
}

/// Takes five seconds: one step of the history.
#[tokio::test(flavor = "multi_thread")]
async fn the_history_grows_without_requests_for_it() {
    let site = Site::new(&config());
    let server = site.start().await;
    server.take("int", Some(100)).await;
    // On a slow machine, the numbers may not be in the first step.
    let step = |status: &Value| {
        let rates = status["history"]["numbers_per_second"].as_array().unwrap();
        rates.iter().position(|rate| rate.as_f64().unwrap() > 0.0)
    };
    let status =
        status_when(&server, "the step of the numbers", |status| step(status).is_some()).await;
    let step = step(&status).unwrap();
    for row in ["requests_per_second", "numbers_per_second", "p50_seconds", "p99_seconds"] {
        let value = &status["history"][row][step];
        assert!(value.as_f64().unwrap() > 0.0, "{row}: {status}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_tells_something_answers_to_get_and_head() {
    let site = Site::new(&config());
    let server = site.start().await;
    server.take("int", None).await;
    for path in ["/ready", "/status", "/metrics"] {
        let head = server.send(Method::HEAD, path).await;
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
        for method in [Method::POST, Method::PUT, Method::DELETE] {
            let answer = server.send(method, path).await;
            assert_eq!(answer.status, 405, "{path}");
            assert_eq!(answer.parse::<Failure>().code, "method_not_allowed");
            assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{path}");
        }
    }
    server.stop().await;

    // The simpler modes report only whether they serve.
    for mode in ["simple", "json", "sqlite"] {
        let site = Site::new(&config().set("server.mode", format!("'{mode}'")));
        let server = site.start().await;
        let ready = server.get("/ready").await;
        assert_eq!(ready.body, r#"{"ready":true,"pools":{"int":true}}"#, "{mode}");
        assert_eq!(server.send(Method::POST, "/ready").await.status, 405, "{mode}");
        for path in ["/status", "/metrics"] {
            assert_eq!(server.get(path).await.status, 404, "{mode} {path}");
        }
        server.stop().await;
    }
}

async fn scrape(server: &Server) -> String {
    let answer = server.get("/metrics").await;
    answer.assert_status(200);
    answer.body
}

/// Returns the sum of a metric's samples whose labels contain `label`.
fn sample(text: &str, name: &str, label: &str) -> f64 {
    let lines = text.lines().filter_map(|line| line.strip_prefix(name));
    lines
        .filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
        .map(|rest| rest.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_happened() {
    let site = Site::new(&config().pool("other", 1, 1_000, 2, 100));
    site.fill().await;
    let server = site.start().await;
    for asked in [None, None, Some(100)] {
        server.get(&format!("/random?count={}", asked.unwrap_or(1))).await.assert_status(200);
    }
    server.get("/random?type=nope").await.assert_status(400);
    server.get("/nope").await.assert_status(404);
    let text = scrape(&server).await;
    let check = |name, label, expected: f64| {
        assert_eq!(sample(&text, name, label), expected, "{name} {label}: {text}");
    };
    check("tombola_http_requests_total", "route=\"/random\",status=\"200\"", 3.0);
    check("tombola_http_requests_total", "route=\"/random\",status=\"400\"", 1.0);
    check("tombola_http_requests_total", "route=\"/random\",status=\"503\"", 0.0);
    check("tombola_http_requests_total", "route=\"other\",status=\"404\"", 1.0);
    check("tombola_http_request_duration_seconds_count", "/random", 4.0);
    check("tombola_http_request_duration_seconds_bucket", "route=\"/random\",le=\"+Inf\"", 4.0);
    check("tombola_numbers_issued_total", "pool=\"int\"", 102.0);
    check("tombola_numbers_issued_total", "pool=\"other\"", 0.0);
    check("tombola_shard_numbers_left", "pool=\"int\"", 898.0);
    check("tombola_shard_numbers_left", "pool=\"other\"", 200.0);
    check("tombola_shard_size", "pool=\"int\"", 1_000.0);
    check("tombola_shard_in_rotation", "pool=\"int\"", 2.0);
    check("tombola_range_numbers", "pool=\"int\"", 5_000.0);
    check("tombola_range_numbers_left", "pool=\"int\"", 4_898.0);
    check("tombola_ledger_values", "pool=\"int\"", 1_000.0);
    check("tombola_numbers_burned_total", "pool=\"int\"", 0.0);
    check("tombola_build_info", &format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1.0);
    assert!(sample(&text, "tombola_lease_duration_seconds_count", "pool=\"int\"") >= 2.0, "{text}");
    assert!(sample(&text, "tombola_lease_duration_seconds_sum", "pool=\"int\"") > 0.0, "{text}");
    assert!(sample(&text, "tombola_ledger_size_bytes", "pool=\"int\"") > 1_000.0, "{text}");
    assert!(sample(&text, "tombola_http_open_connections", "") >= 1.0, "{text}");

    // 450 more numbers put at least one shard below its low water, so that it is refilled.
    server.take("int", Some(450)).await;
    eventually("a refill in the metrics", async || {
        let text = scrape(&server).await;
        let filled = sample(&text, "tombola_refill_duration_seconds_count", "filled");
        let values = sample(&text, "tombola_ledger_values", "pool=\"int\"");
        (filled >= 1.0 && values > 1_000.0).then_some(())
    })
    .await;
    // CPU time is in whole seconds and may still be 0 here.
    #[cfg(target_os = "linux")]
    for (name, least) in [
        ("process_cpu_seconds_total", 0.0),
        ("process_resident_memory_bytes", 1e6),
        ("process_open_fds", 5.0),
    ] {
        assert!(text.contains(&format!("\n{name} ")) && sample(&text, name, "") >= least, "{name}");
    }
    server.stop().await;
}

/// Story: a request that was refused because its key was used for another one was counted as replayed.
#[tokio::test(flavor = "multi_thread")]
async fn receipts_are_counted_by_the_outcome_of_their_requests() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = server.client();
    for (target, key, expected) in [
        ("/random", "a", 200),
        ("/random", "a", 200),
        ("/random?count=2", "a", 422),
        ("/random", "b", 200),
    ] {
        let sent = client.send_with(Method::POST, target, &[("idempotency-key", key)]).await;
        sent.unwrap().assert_status(expected);
    }
    server.get("/random?label=x").await.assert_status(200);
    server.get("/random").await.assert_status(200);
    let shown = status_when(&server, "3 receipts", |status| status["receipts"]["count"] == 3).await;
    let counts = ["keyed", "unkeyed", "replayed", "refused", "waiting"];
    assert_eq!(counts.map(|name| count(&shown["receipts"][name])), [2, 1, 1, 1, 0], "{shown}");
    let text = scrape(&server).await;
    for (name, label, expected) in [
        ("tombola_receipts", "", 3.0),
        ("tombola_receipts_saved_total", "key=\"yes\"", 2.0),
        ("tombola_receipts_saved_total", "key=\"no\"", 1.0),
        ("tombola_requests_replayed_total", "", 1.0),
        ("tombola_keyed_requests_refused_total", "", 1.0),
        ("tombola_keyed_requests_waiting", "", 0.0),
        ("tombola_receipts_can_be_saved", "", 1.0),
    ] {
        assert_eq!(sample(&text, name, label), expected, "{name} {label}: {text}");
    }
    server.stop().await;
}

/// Runs promtool, or reports that it is missing.
fn promtool(arguments: &[&str], input: &str) -> Option<(bool, String)> {
    let spawned = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skipped("promtool is missing (Debian package prometheus)");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8(said).unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_as_prometheus_wants_them() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    server.take("int", Some(600)).await;
    let text = scrape(&server).await;
    if let Some((passed, said)) = promtool(&["check", "metrics"], &text) {
        assert!(passed && said.trim().is_empty(), "{said}\n{text}");
    }
    server.stop().await;
}

#[test]
fn each_alert_fires_when_it_should() {
    let ops = concat!(env!("CARGO_MANIFEST_DIR"), "/ops/");
    for (command, file) in [("check", "alerts.yml"), ("test", "alerts_test.yml")] {
        let file = format!("{ops}{file}");
        if let Some((passed, said)) = promtool(&[command, "rules", &file], "") {
            assert!(passed, "{said}");
        }
    }
    let tests = fs::read_to_string(format!("{ops}alerts_test.yml")).unwrap();
    let rules = fs::read_to_string(format!("{ops}alerts.yml")).unwrap();
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        // Each alert fires in the test of an instance in which nothing is well.
        let fires = tests.split_once("nothing is well").unwrap().1;
        assert!(fires.contains(&format!("alertname: {alert}\n")), "{alert} is not tested");
    }
}

/// Returns the names of the metrics in a file: `tombola_...` and `process_...`.
fn names(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("tombola_") || word.starts_with("process_"))
        .collect()
}

#[derive(Deserialize)]
struct Dashboard {
    panels: Vec<Panel>,
    templating: Templating,
}

#[derive(Deserialize)]
struct Panel {
    #[serde(default)]
    targets: Vec<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
struct Templating {
    list: Vec<BTreeMap<String, Value>>,
}

/// Story: a metric was renamed. Its panel was empty from then on, and its alert never fired.
#[tokio::test(flavor = "multi_thread")]
async fn dashboard_and_alerts_use_what_there_is_and_the_dashboard_all_of_it() {
    let witness = tempfile::tempdir().unwrap();
    let store = format!("\"file://{}\"", witness.path().join("witness.db").display());
    let site = Site::new(&config().set("fleet.store", store).set("fleet.space", "\"test\""));
    let server = site.start().await;
    server.take("int", None).await;
    let text = scrape(&server).await;
    assert!(sample(&text, "tombola_fleet_steps_total", "") >= 1.0, "{text}");
    assert_eq!(sample(&text, "tombola_fleet_store_answers", ""), 1.0, "{text}");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let there: BTreeSet<_> = samples.map(|line| line.split(['{', ' ']).next().unwrap()).collect();

    let ops = concat!(env!("CARGO_MANIFEST_DIR"), "/ops/");
    let json = fs::read_to_string(format!("{ops}grafana-dashboard.json")).unwrap();
    let dashboard: Dashboard = serde_json::from_str(&json).unwrap();
    assert!(dashboard.templating.list.iter().any(|variable| variable["type"] == "datasource"));
    let targets: Vec<_> = dashboard.panels.iter().flat_map(|panel| &panel.targets).collect();
    let expressions: Vec<_> =
        targets.iter().map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(targets.iter().all(|target| target["datasource"]["uid"] == "${datasource}"));
    let shown: BTreeSet<_> = expressions.iter().flat_map(|expression| names(expression)).collect();
    let rules = fs::read_to_string(format!("{ops}alerts.yml")).unwrap();
    let tests = fs::read_to_string(format!("{ops}alerts_test.yml")).unwrap();
    for (file, used) in
        [("the dashboard", &shown), ("alerts", &names(&rules)), ("their tests", &names(&tests))]
    {
        let missing: Vec<_> = used.difference(&there).collect();
        assert!(missing.is_empty(), "{file}: {missing:?} is not in /metrics");
    }
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE tombola_"));
    for family in families.map(|line| format!("tombola_{}", line.split(' ').next().unwrap())) {
        let is_shown = shown.iter().any(|name| name.starts_with(&family));
        assert!(is_shown, "{family} is in no panel");
    }
    server.stop().await;
}
