//! The modes: what they all guarantee, and what `simple`, `json` and `sqlite` have of their own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deadpool_sqlite::rusqlite::Connection;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use support::{Bare, Config, Failure, One, Process, Server, Site, column, eventually, missing};

const MODES: [&str; 4] = ["simple", "json", "sqlite", "sharded"];
const RUNGS: [&str; 3] = ["simple", "json", "sqlite"];
const FILES: [&str; 2] = ["simple", "json"];

const JSON: &str = "used_numbers.json";
const TABLE: &str = "random_numbers.db";

/// Returns a config with the pool `int` of this range. Only the mode `sharded` uses the shards.
fn config(mode: &str, min: i64, max: i64) -> Config {
    let size = u32::try_from(max - min + 1).unwrap().min(1_000);
    Config::new().pool("int", min, max, 2, size).set("server.mode", format!("'{mode}'"))
}

/// Returns the same with a pool `float`.
fn config_of_two(mode: &str) -> Config {
    config(mode, 1, 1_000_000)
        .pool("float", "0.0", "9999.999999", 2, 1_000)
        .set("pools.float.decimals", 6)
}

/// The file of the modes `simple` and `json`, as other programs see it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    #[serde(rename = "format")]
    _format: String,
    #[serde(borrow)]
    pools: BTreeMap<String, DocumentPool<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DocumentPool<'a> {
    #[serde(borrow)]
    min: &'a RawValue,
    #[serde(borrow)]
    max: &'a RawValue,
    decimals: u8,
    #[serde(borrow)]
    numbers: Vec<&'a RawValue>,
}

/// Returns the numbers of a pool in the store of a simpler mode, as text.
fn kept(site: &Site, mode: &str, pool: &str) -> BTreeSet<String> {
    if mode == "sqlite" {
        let sql = format!("SELECT CAST(number AS TEXT) FROM used_numbers_{pool}");
        return column(&site.file(TABLE), &sql).into_iter().collect();
    }
    let text = std::fs::read_to_string(site.file(JSON)).unwrap();
    let document: Document<'_> = serde_json::from_str(&text).unwrap();
    let numbers = &document.pools[pool].numbers;
    let different: BTreeSet<_> = numbers.iter().map(|number| number.get().to_owned()).collect();
    assert_eq!(different.len(), numbers.len(), "a number is in the file twice");
    different
}

fn assert_kept(site: &Site, mode: &str, received: &[String]) {
    let kept = kept(site, mode, "int");
    let lost: Vec<_> = received.iter().filter(|number| !kept.contains(*number)).collect();
    assert!(lost.is_empty(), "{mode}: handed out but not in the store: {lost:?}");
}

/// Story: a client for one mode could not parse the responses of another.
#[tokio::test(flavor = "multi_thread")]
async fn every_mode_answers_in_the_same_shapes() {
    for mode in MODES {
        let site = Site::new(&config_of_two(mode));
        let server = site.start().await;

        let mut taken = Vec::new();
        for method in [Method::GET, Method::POST] {
            for target in ["/random", "/random?type=int", "/random?type=float"] {
                let answer = eventually("a number", async || {
                    let answer = server.send(method.clone(), target).await;
                    (answer.status != 503).then_some(answer)
                })
                .await;
                assert_eq!(answer.status, 200, "{mode} {target}: {}", answer.body);
                let number = if mode == "sharded" {
                    answer.parse::<One<'_>>().number
                } else {
                    answer.parse::<Bare<'_>>().number
                };
                let decimals = number.get().split_once('.').map_or(0, |(_, digits)| digits.len());
                assert_eq!(decimals, if target.ends_with("float") { 6 } else { 0 }, "{number}");
                taken.push(number.get().to_owned());
            }
        }
        for (target, status) in
            [("/random", 200), ("/random?type=float", 200), ("/random?type=x", 400), ("/x", 404)]
        {
            let answer = server.send(Method::HEAD, target).await;
            assert_eq!((answer.status, answer.body.as_str()), (status, ""), "{mode} {target}");
        }

        for (method, target, status, code) in [
            (Method::GET, "/random?type=nope", 400, "unknown_type"),
            (Method::POST, "/random?type=", 400, "unknown_type"),
            (Method::GET, "/random?colour=red", 400, "unknown_parameter"),
            (Method::GET, "/random?type=int&type=int", 400, "unknown_parameter"),
            (Method::GET, "/nope", 404, "not_found"),
            (Method::POST, "/nope", 404, "not_found"),
            (Method::GET, "//random", 404, "not_found"),
            (Method::PUT, "/random", 405, "method_not_allowed"),
            (Method::DELETE, "/random?type=nope", 405, "method_not_allowed"),
            (Method::POST, "/health", 405, "method_not_allowed"),
        ] {
            let answer = server.send(method.clone(), target).await;
            assert_eq!(answer.status, status, "{mode} {method} {target}: {}", answer.body);
            assert_eq!(answer.parse::<Failure>().code, code, "{mode} {method} {target}");
            let allowed = answer.header("allow").unwrap_or_default();
            assert_eq!(allowed.contains("GET, HEAD"), status == 405, "{mode} {target}: {allowed}");
        }

        let health = server.get("/health").await;
        assert_eq!(health.status, 200, "{}", health.body);
        let health: serde_json::Value = serde_json::from_str(&health.body).unwrap();
        assert_eq!(health["status"], "ok", "{mode}");
        for pool in ["int", "float"] {
            assert_eq!(health["pools"][pool]["status"], "ok", "{mode}");
            assert_eq!(health["pools"][pool]["shards"].is_null(), mode != "sharded", "{mode}");
        }

        server.stop().await;
        if mode != "sharded" {
            // HEAD and refused requests took no numbers.
            let kept: BTreeSet<_> =
                ["int", "float"].iter().flat_map(|pool| kept(&site, mode, pool)).collect();
            assert_eq!(kept, taken.into_iter().collect(), "{mode}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rungs_offer_no_count_and_say_what_they_offer() {
    for mode in RUNGS {
        let site = Site::new(&config(mode, 1, 10));
        let server = site.start().await;
        for query in ["count=1", "type=int&count=5", "count=x"] {
            let answer = server.get(&format!("/random?{query}")).await;
            assert_eq!(answer.status, 400, "{}", answer.body);
            let Failure { error, code } = answer.parse();
            assert_eq!(code, "unknown_parameter");
            assert!(error.contains("count") && error.contains("Allowed: type."), "{error}");
        }
        server.stop().await;
    }
}

/// Story: the response was sent before the file was in place, and the next process did not know the number.
#[tokio::test(flavor = "multi_thread")]
async fn no_number_comes_twice_to_64_clients_and_across_kills_in_every_mode() {
    for mode in MODES {
        let site = Site::new(&config(mode, 1, 20_000));
        let mut received = Vec::new();
        for _ in 0..4 {
            let server = site.start().await;
            let mut load = server.load("int", 64, &[None]);
            load.reach(200).await;
            server.kill().await;
            received.extend(load.join_numbers().await);
            missing(&received, 1..=20_000);
            if mode != "sharded" {
                assert_kept(&site, mode, &received);
            }
        }
        site.start().await.stop().await;
    }
}

/// Story: SIGTERM closed the store while the last requests were still using it, or did not end the server
/// under load.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_under_load_ends_in_order_and_releases_the_folder() {
    for mode in MODES {
        let site = Site::new(&config(mode, 1, 1_000_000));
        let server = site.start().await;
        let mut load = server.load("int", 16, &[None]);
        load.reach(50).await;
        server.stop().await;
        let received = load.join_numbers().await;
        missing(&received, 1..=1_000_000);
        if mode != "sharded" {
            assert_kept(&site, mode, &received);
        }
        assert_eq!(site.files("-wal"), [""; 0], "{mode}");
        site.start().await.stop().await;
    }
}

/// Story: the last number of a range was issued again instead of refusing the request.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_fifty_comes_out_once_each_and_then_the_tries_run_out() {
    for mode in RUNGS {
        let site = Site::new(&config(mode, 1, 50));
        let server = site.start().await;
        let mut received = Vec::new();
        // If one of fifty numbers is left, 100 tries miss it in about one request of seven.
        eventually("the last of the range", async || {
            let answers = ask_at_once(&server, 8).await;
            for answer in answers {
                match answer.status {
                    200 => received.extend(answer.numbers()),
                    _ => answer.assert_unavailable("out_of_tries"),
                }
            }
            (missing(&received, 1..=50) == 0).then_some(())
        })
        .await;

        for method in [Method::GET, Method::POST] {
            let answer = server.send(method, "/random").await;
            answer.assert_unavailable("out_of_tries");
            assert!(answer.parse::<Failure>().error.contains("100 tries"), "{}", answer.body);
        }
        assert_eq!(server.get("/health").await.status, 200, "the server itself is healthy");
        server.stop().await;

        let again = site.start().await;
        again.get("/random").await.assert_unavailable("out_of_tries");
        again.stop().await;
    }
}

/// Sends `count` requests at the same time.
async fn ask_at_once(server: &Server, count: usize) -> Vec<support::Answer> {
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..count {
        let client = server.client();
        requests.spawn(async move { client.send(Method::GET, "/random").await.unwrap() });
    }
    requests.join_all().await
}

/// Story: a file that could not be read was taken for an empty one and overwritten, so all issued numbers
/// were free again.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_whole_or_not_ours_is_refused_and_left_as_it_is() {
    let site = Site::new(&config("json", 1, 1_000));
    let server = site.start().await;
    for _ in 0..20 {
        server.take("int", None).await;
    }
    server.stop().await;
    let whole = std::fs::read_to_string(site.file(JSON)).unwrap();
    let number = kept(&site, "json", "int").first().unwrap().clone();
    let in_list = |text: &str| whole.replacen("\"numbers\":[", &format!("\"numbers\":[{text},"), 1);

    let damaged = [
        (String::new(), "whole"),
        ("{}".to_owned(), "format"),
        ("null".to_owned(), "whole"),
        ("[1,2,3]".to_owned(), "whole"),
        ("numbers: 1 2 3".to_owned(), "whole"),
        ("{\"format\":\"mine\",\"pools\":{}}".to_owned(), "mine"),
        (whole.replace("version 1", "version 2"), "version 2"),
        (whole[..whole.len() / 2].to_owned(), "whole"),
        (whole[..whole.len() - 1].to_owned(), "whole"),
        (format!("{whole}{whole}"), "trailing"),
        (in_list("1001"), "1001"),
        (in_list("1.5"), "1.5"),
        (in_list("\"7\""), "7"),
        (in_list("007"), "whole"),
        (in_list(&number), "twice"),
        (whole.replace("\"decimals\":0", "\"decimals\":99"), "99"),
    ];
    for mode in FILES {
        site.configure(&config(mode, 1, 1_000));
        for (text, word) in &damaged {
            std::fs::write(site.file(JSON), text).unwrap();
            let refusal = site.refusal().await;
            assert!(refusal.contains(JSON) && refusal.contains(word), "{word}: {refusal}");
            assert!(refusal.contains("left as it is"), "{refusal}");
            assert_eq!(std::fs::read_to_string(site.file(JSON)).unwrap(), *text);
        }
    }
    std::fs::write(site.file(JSON), &whole).unwrap();
    site.start().await.stop().await;
    assert_eq!(std::fs::read_to_string(site.file(JSON)).unwrap(), whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_ours_is_refused_and_left_as_it_is() {
    let site = Site::new(&config("sqlite", 1, 1_000));
    std::fs::create_dir(site.data()).unwrap();
    let file = site.file(TABLE);
    Connection::open(&file).unwrap().execute_batch("CREATE TABLE random_numbers (a, b)").unwrap();
    let foreign = std::fs::read(&file).unwrap();
    for content in [foreign, b"random numbers".repeat(100), Vec::new()] {
        std::fs::write(&file, &content).unwrap();
        let refusal = site.refusal().await;
        assert!(refusal.contains(TABLE), "{refusal}");
        assert_eq!(std::fs::read(&file).unwrap(), content);
    }
}

/// Story: a user switched to the next mode, and the numbers of the previous one were issued again.
#[tokio::test(flavor = "multi_thread")]
async fn simple_and_json_read_each_others_file() {
    let site = Site::new(&config("simple", 1, 300));
    let mut received = Vec::new();
    for mode in ["simple", "json", "simple", "json"] {
        site.configure(&config(mode, 1, 300));
        let server = site.start().await;
        let mut load = server.load("int", 4, &[None]);
        load.reach(50).await;
        server.kill().await;
        received.extend(load.join_numbers().await);
        missing(&received, 1..=300);
        assert_kept(&site, mode, &received);
    }
}

/// Story: the file was modified in place, and a backup copied it half-written.
#[tokio::test(flavor = "multi_thread")]
async fn the_json_file_is_whole_at_every_moment() {
    for mode in FILES {
        let site = Site::new(&config_of_two(mode));
        let server = site.start().await;
        let done = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (file, done) = (site.file(JSON), Arc::clone(&done));
            move || read_until(&file, &done)
        });
        let mut load = server.load("int", 32, &[None]);
        load.reach(400).await;
        server.kill().await;
        load.join().await;
        done.store(true, Ordering::Relaxed);
        let (reads, most) = reader.join().unwrap();
        assert!(reads > 10 && most > 10, "{mode}: {reads} reads, up to {most} numbers");
    }
}

/// Reads the file as fast as possible. It has to be complete each time and must never shrink.
fn read_until(file: &Path, done: &AtomicBool) -> (usize, usize) {
    let (mut reads, mut most) = (0, 0);
    while !done.load(Ordering::Relaxed) {
        let text = std::fs::read_to_string(file).unwrap();
        let document: Document<'_> = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("after {reads} reads: {error} in {text:?}"));
        let float = &document.pools["float"];
        let range = (float.min.get(), float.max.get(), float.decimals);
        assert_eq!(range, ("0.000000", "9999.999999", 6));
        let numbers = document.pools["int"].numbers.len();
        assert!(numbers >= most, "numbers were forgotten");
        (reads, most) = (reads + 1, numbers);
    }
    (reads, most)
}

/// Story: while the disk was full, each try burned a number until the range was used up, or a number that
/// could not be saved was handed out.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_saved_is_not_handed_out_and_not_lost() {
    for mode in FILES {
        let site = Site::new(&config(mode, 1, 50));
        let server = site.start().await;
        let before = server.take("int", None).await;
        // A folder takes the path where the write creates its file.
        let blocked = site.file(&format!("{JSON}.tmp"));
        eventually("a moment without a write", async || std::fs::create_dir(&blocked).ok()).await;
        for _ in 0..60 {
            server.get("/random").await.assert_unavailable("not_saved");
        }
        server.send(Method::HEAD, "/random").await.assert_status(503);
        let health = server.get("/health").await;
        assert_eq!(health.status, 503);
        assert!(health.body.contains("numbers can't be saved"), "{}", health.body);
        assert!(
            health.body.contains("\"down\"") && !health.body.contains(".tmp"),
            "the path is in the response"
        );
        server.process.says(".tmp").await;

        std::fs::remove_dir(&blocked).unwrap();
        let mut received = before;
        while received.len() < 40 {
            received.extend(server.take("int", None).await);
        }
        assert_eq!(missing(&received, 1..=50), 10);
        assert_eq!(server.get("/health").await.status, 200);
        server.stop().await;
        assert_eq!(kept(&site, mode, "int"), received.into_iter().collect());
    }
}

/// Story: a user's `sqlite3` held the file, and requests hung or failed permanently.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_table_is_tried_again_and_then_refused() {
    let site = Site::new(&config("sqlite", 1, 1_000));
    let server = site.start().await;
    let other = Connection::open(site.file(TABLE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    server.get("/random").await.assert_unavailable("out_of_tries");

    // A request that is waiting when the lock is released is served.
    let client = server.client();
    let waits = tokio::spawn(async move { client.send(Method::GET, "/random").await.unwrap() });
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(waits.await.unwrap().status, 200);
    assert_eq!(server.take("int", None).await.len(), 1);
    server.stop().await;
}

/// Story: a narrower range was accepted without a warning, and 5.10 and 5.1000 were two numbers.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_may_grow_and_not_shrink_or_change_its_decimals() {
    for mode in RUNGS {
        let site = Site::new(&config(mode, 1, 100));
        let server = site.start().await;
        let number = server.take("int", None).await;
        server.stop().await;

        for other in [
            config(mode, 1, 99),
            config(mode, 2, 100),
            config(mode, 1, 100).set("pools.int.decimals", 2),
        ] {
            site.configure(&other);
            let refusal = site.refusal().await;
            assert!(refusal.contains("int") && refusal.contains("1 to 100"), "{mode}: {refusal}");
        }

        // A pool that is disabled keeps its numbers.
        site.configure(
            &config(mode, -50, 100).set("pools.int.enabled", false).pool("x", 1, 9, 1, 9),
        );
        site.start().await.stop().await;
        site.configure(&config(mode, -50, 100));
        let server = site.start().await;
        assert!(!server.take("int", None).await.contains(&number[0]));
        server.stop().await;
        let kept = kept(&site, mode, "int");
        assert!(kept.contains(&number[0]) && kept.len() == 2, "{mode}: {kept:?}");
    }
}

/// Story: the mode `sharded` was started on the folder of the mode `sqlite`, found no ledger, and created an
/// empty one, so numbers were issued again.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_another_mode_is_refused() {
    for owner in ["json", "sqlite", "sharded"] {
        let site = Site::new(&config(owner, 1, 1_000));
        let server = site.start().await;
        server.take("int", None).await;
        server.stop().await;
        for mode in MODES {
            if mode == owner || (FILES.contains(&owner) && FILES.contains(&mode)) {
                continue;
            }
            site.configure(&config(mode, 1, 1_000));
            let before = site.files("");
            let refusal = site.refusal().await;
            for words in [owner, mode, "--data-dir"] {
                assert!(refusal.contains(words), "{owner} {mode}: {refusal}");
            }
            assert_eq!(site.files(""), before);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_in_use_is_refused_in_every_mode() {
    let refuse = async |mode| {
        let site = Site::new(&config(mode, 1, 1_000));
        let server = site.start().await;
        let finished = support::run(site.tombola()).await;
        assert_eq!(finished.status.code(), Some(6), "{mode}: {}", finished.stderr);
        let waits = finished.stderr.matches("waiting until it is free").count();
        assert_eq!(waits, 1, "{mode}: {}", finished.stderr);
        let says = format!("in use: process {} holds its LOCK", server.process.id());
        assert!(finished.stderr.contains(&says), "{mode}: {}", finished.stderr);
        server.stop().await;
    };
    // Each server waits for ten seconds, so they run in parallel.
    tokio::join!(refuse(MODES[0]), refuse(MODES[1]), refuse(MODES[2]), refuse(MODES[3]));
}

/// Story: the service was restarted during a `verify`, gave up on the folder, and stayed down.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_free_again_is_served_in_every_mode() {
    for mode in MODES {
        let site = Site::new(&config(mode, 1, 1_000));
        site.start().await.stop().await;
        let lock = File::options().write(true).open(site.file("LOCK")).unwrap();
        lock.lock().unwrap();
        let process = Process::spawn(site.tombola());
        process.says("waiting until it is free").await;
        drop(lock);
        let server = Server::of(process).await;
        server.take("int", None).await;
        server.stop().await;
    }
}

/// Story: an idle connection kept the server from stopping.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_every_mode_though_a_client_stays_connected() {
    for mode in MODES {
        let site = Site::new(&config(mode, 1, 1_000));
        let mut server = site.start().await;
        server.take("int", None).await;
        let idle = std::net::TcpStream::connect(server.address()).unwrap();
        server.process.signal(Signal::SIGINT);
        let finished = server.process.finish().await;
        assert_eq!(finished.status.code(), Some(0), "{mode}: {}", finished.stderr);
        drop(idle);
    }
}

/// The concurrency check: 100 requests, 8 at a time, each for `int` or `float` at random.
#[tokio::test(flavor = "multi_thread")]
async fn the_stress_test_passes_against_every_mode() {
    for mode in MODES {
        let site = Site::new(&config_of_two(mode));
        if mode == "sharded" {
            site.fill().await;
        }
        let server = site.start().await;
        let mut stress = Command::new(env!("CARGO_BIN_EXE_stress-test"));
        stress.args(["--requests", "100", "--concurrency", "8", "--type", "mix", "--no-log"]);
        stress.args(["--url", &format!("http://{}", server.address())]);
        let finished = support::run(stress).await;
        assert!(finished.status.success(), "{mode}: {}", finished.stdout);
        assert!(finished.stdout.contains("100 different numbers"), "{mode}: {}", finished.stdout);
        server.stop().await;
    }
}
