//! Changed settings take effect without a restart: all of them, or none.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::Value;
use support::{
    Answer, Config, Failure, Finished, Health, Server, Site, Token, eventually, missing, run,
    with_tokens,
};
use tokio::task::JoinSet;

const CLIENTS: usize = 64;
const RELOADS: usize = 100;
const LAST: i64 = 100_000_000;
const USED: &str = "/pools/int/used";

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 20_000)
}

async fn reload(server: &Server) -> Answer {
    server.send(Method::POST, "/reload").await
}

/// Reloads, which has to succeed. Returns what changed.
async fn reloaded(server: &Server) -> String {
    let answer = reload(server).await;
    answer.assert_status(200);
    answer.parse::<Value>()["message"].as_str().unwrap().to_owned()
}

async fn status(server: &Server) -> Value {
    server.get("/status").await.parse()
}

/// Takes numbers of a pool that has just begun to serve.
async fn take(server: &Server, target: &str) -> Vec<String> {
    eventually("numbers", async || {
        let answer = server.get(target).await;
        if answer.status == 503 {
            return None;
        }
        answer.assert_status(200);
        Some(answer.numbers())
    })
    .await
}

/// Story: a new campaign needed a restart, so all shops had errors for a moment. Pools come, go and change while
/// clients draw from the others. The only requests that fail are those to a pool that ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_reloads_under_load_fail_only_requests_to_pools_that_ended() {
    // Enough that no shard runs dry, whatever the rate of the machine.
    let config = || Config::new().pool("int", 0, LAST, 2, 1_000_000);
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let ended = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for index in 0..CLIENTS {
        let (client, stop, ended) = (server.client(), Arc::clone(&stop), Arc::clone(&ended));
        // Every fourth client draws from the pool that comes and goes, and some use keys.
        let pool = if index % 4 == 0 { "gift" } else { "int" };
        clients.spawn(async move {
            let mut numbers = Vec::new();
            for request in 0.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let target = format!("/random?type={pool}&count={}", 1 + request % 7);
                let key = format!("{index}-{request}");
                let header = [("idempotency-key", &*key)];
                let headers = if index % 8 == 1 { &header[..] } else { &[] };
                let answer = client.send_with(Method::POST, &target, headers).await.unwrap();
                match answer.status {
                    200 => numbers.extend(answer.numbers()),
                    // The pool has just begun.
                    503 if pool == "gift" => answer.assert_refilling(),
                    400 if pool == "gift" => {
                        assert_eq!(answer.parse::<Failure>().code, "unknown_type");
                        ended.fetch_add(1, Ordering::SeqCst);
                    }
                    status => panic!("{status} of {pool}: {}", answer.body),
                }
            }
            (pool, numbers)
        });
    }
    // Neither the load balancer nor an import of numbers that were issued by other means notices.
    server.get("/ready").await.assert_status(200);
    let (client, stopped) = (server.client(), Arc::clone(&stop));
    let others = tokio::spawn(async move {
        let headers = [("content-type", "text/plain")];
        let mut imported = 0..;
        while !stopped.load(Ordering::SeqCst) {
            let lines = format!("{}\n", imported.next().unwrap());
            for (method, target, body) in [
                (Method::HEAD, "/random?type=int", ""),
                (Method::GET, "/ready", ""),
                (Method::POST, USED, &*lines),
            ] {
                let answer = client.send_body(method, target, &headers, body).await.unwrap();
                assert_eq!(answer.status, 200, "{target}: {}", answer.body);
            }
        }
    });
    let mut settings = config();
    for round in 0..RELOADS {
        settings = match round % 4 {
            0 => config().pool("gift", 0, LAST, 1, 20_000),
            1 => settings.set("pools.int.shards", 3 + round % 2),
            2 => settings.set("refill.low_water", "0.5").set("pools.int.shard_size", 900_000),
            _ => config(),
        };
        site.configure(&settings);
        let message = reloaded(&server).await;
        let words = ["new pools: gift", "opened again: int", "opened again: ", "ended: gift"];
        assert!(message.contains(words[round % 4]), "{message}");
    }
    stop.store(true, Ordering::SeqCst);
    others.await.unwrap();
    let (mut ints, mut gifts) = (Vec::new(), Vec::new());
    while let Some(client) = clients.join_next().await {
        let (pool, numbers) = client.unwrap();
        if pool == "int" { &mut ints } else { &mut gifts }.extend(numbers);
    }
    println!("{} int, {} gift, {} unknown", ints.len(), gifts.len(), ended.load(Ordering::SeqCst));
    assert!(ended.load(Ordering::SeqCst) > 0 && !gifts.is_empty(), "no pool came or went");
    // No number came twice, and nothing was burned.
    missing(&ints, 0..=LAST);
    missing(&gifts, 0..=LAST);
    let status = status(&server).await;
    assert_eq!(status["pools"]["int"]["burned"], 0);
    assert_eq!(status["pools"].as_object().unwrap().len(), 1);
    server.stop().await;
}

/// Story: the limit of open files was raised at a start only, so a reload could not open the pools of the next
/// campaigns.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_raises_the_limit_of_open_files_for_its_pools() {
    const POOLS: usize = 100;
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let limit = ["--nofile=256:", &format!("--pid={}", server.process.id())].map(str::to_owned);
    assert!(Command::new("prlimit").args(limit).status().unwrap().success());
    let settings = (0..POOLS)
        .fold(config(), |config, pool| config.pool(&format!("campaign_{pool}"), 0, 99, 1, 10));
    site.configure(&settings);
    reloaded(&server).await;
    for pool in 0..POOLS {
        take(&server, &format!("/random?type=campaign_{pool}")).await;
    }
    server.stop().await;
}

/// Story: while a reload opened the only pool again, `/ready` told the load balancer to use another server, and an
/// import failed.
#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_while_their_pool_is_opened_again() {
    // The first pause is long enough to send the requests, and the last one is never reached.
    let config = || config().set("refill.retry_ms", 1_000).set("refill.retry_limit_ms", 60_000);
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let blocked = site.file("int_shard_7.db");
    std::fs::create_dir(&blocked).unwrap();
    site.configure(&config().set("pools.int.shard_size", 10_000));
    let client = server.client();
    let reload = tokio::spawn(async move { client.send(Method::POST, "/reload").await.unwrap() });
    server.process.says("the pool can't be opened again").await;
    let mut requests = JoinSet::new();
    for (method, target, body) in [
        (Method::GET, "/random", ""),
        (Method::HEAD, "/random", ""),
        (Method::GET, "/health", ""),
        (Method::GET, "/ready", ""),
        (Method::POST, USED, "1\n2\n"),
    ] {
        let client = server.client();
        requests.spawn(async move {
            let headers = [("content-type", "text/plain")];
            let answer = client.send_body(method.clone(), target, &headers, body).await.unwrap();
            (format!("{method} {target}"), answer)
        });
    }
    // Each request has a connection of its own, and so have the reload and this one.
    let connections = requests.len() + 2;
    eventually("all requests to wait", async || {
        if let Some(ended) = requests.try_join_next() {
            let (request, answer) = ended.unwrap();
            panic!("{request} did not wait: {} {}", answer.status, answer.body);
        }
        (status(&server).await["connections"] == connections).then_some(())
    })
    .await;
    std::fs::remove_dir(blocked).unwrap();
    assert_eq!(reload.await.unwrap().status, 422);
    for (request, answer) in requests.join_all().await {
        assert_eq!(answer.status, 200, "{request}: {}", answer.body);
    }
    server.stop().await;
}

/// Story: half of a change was in effect, and no operator knew which half.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_takes_all_changes_or_none() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let before = status(&server).await["settings"]["digest"].clone();
    let more = || config().pool("gift", 0, 9, 1, 5).set("server.count_limit", 7);
    let cases = [
        (more().set("server.listen", "'127.0.0.1:1'"), "server.listen can't change"),
        (more().set("server.drain_ms", 77), "server.drain_ms can't change"),
        (more().set("pools.int.max", LAST + 1), "pools.int.max can't change"),
        (more().set("server.mode", "'sqlite'"), "server.mode can't change"),
        (more().set("receipts.keep", "'1h'"), "receipts.keep can't change"),
        (
            more().set("fleet.store", "'file:///srv/store.db'").set("fleet.space", "'raffle'"),
            "fleet.space, fleet.store can't change",
        ),
        (more().set("pools.int.shards", 0), "pools.int.shards = 0"),
        (more().set("colour", "'red'"), "colour"),
    ];
    for (wrong, words) in cases {
        site.configure(&wrong);
        let answer = reload(&server).await;
        assert_eq!(answer.status, 422, "{}", answer.body);
        assert_eq!(answer.parse::<Failure>().code, "not_reloaded");
        assert!(answer.body.contains(words), "{words}: {}", answer.body);
        let status = status(&server).await;
        assert_eq!(status["settings"]["digest"], before);
        assert_eq!(status["settings"]["reload"]["applied"], false);
        assert!(status["settings"]["reload"]["message"].as_str().unwrap().contains(words));
        assert_eq!(status["events"][0]["kind"], "reloaded");
        let event = status["events"][0]["message"].as_str().unwrap();
        assert!(event.starts_with("The settings were not reloaded: "), "{event}");
        assert!(event.contains(words), "{words}: {event}");
        server.get("/random?count=8").await.assert_status(200);
        server.get("/random?type=gift").await.assert_status(400);
    }

    // The configuration sets the folder of a site, so this case edits the file.
    site.configure(&more());
    let file = site.folder().join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(file, text.replace("/data'", "/other'")).unwrap();
    let answer = reload(&server).await;
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("storage.dir can't change"), "{}", answer.body);

    // A new pool can't be opened: another one changed in the same reload.
    site.configure(&more().set("pools.int.shards", 1));
    std::fs::create_dir(site.file("used_numbers_gift.db")).unwrap();
    let answer = reload(&server).await;
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert_eq!(status(&server).await["pools"]["int"]["shards"].as_array().unwrap().len(), 2);
    server.get("/random?count=8").await.assert_status(200);
    std::fs::remove_dir(site.file("used_numbers_gift.db")).unwrap();

    // The second of two pools that change can't be opened again, so the first one goes on as before. The second one
    // can't be opened with its settings from before either, and is down.
    let two = |shards: u16| {
        let size = 15_000 + 1_000 * u32::from(shards);
        config().pool("ticket", 0, 9, shards, 1).set("pools.int.shard_size", size)
    };
    let size = async || status(&server).await["pools"]["int"]["shards"][0]["size"].clone();
    site.configure(&two(1));
    reloaded(&server).await;
    let mut tickets = take(&server, "/random?type=ticket").await;
    let blocked = site.file("ticket_shard_7.db");
    std::fs::create_dir(&blocked).unwrap();
    site.configure(&two(2));
    let answer = reload(&server).await;
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("ticket_shard_7.db"), "{}", answer.body);
    assert!(answer.body.contains("ticket is down until a reload opens it"), "{}", answer.body);
    assert_eq!(size().await, 16_000);
    take(&server, "/random?count=8").await;
    server.get("/random?type=ticket").await.assert_refilling();
    let health = server.get("/health").await;
    health.assert_status(503);
    let ticket = &health.parse::<Health>().pools["ticket"];
    assert_eq!((&*ticket.status, ticket.shards_in_rotation), ("down", 0));
    assert_eq!(ticket.reason.as_deref(), Some("a shard can't be used"));
    let shown = status(&server).await["pools"]["ticket"]["reason"].clone();
    assert!(shown.as_str().unwrap().contains("ticket_shard_7.db"), "{shown}");
    assert!(server.get("/metrics").await.body.contains("pool=\"ticket\""));
    // So it is after a reload that has another problem.
    site.configure(&two(1).set("server.drain_ms", 77));
    assert_eq!(reload(&server).await.status, 422);
    server.get("/random?type=ticket").await.assert_refilling();
    site.configure(&two(2));
    // The next reload opens it.
    std::fs::remove_dir(blocked).unwrap();
    let message = reloaded(&server).await;
    assert!(message.contains("pools.int.shard_size"), "{message}");
    assert_eq!(size().await, 17_000);
    let status = status(&server).await;
    assert_ne!(status["settings"]["digest"], before);
    assert_eq!(status["settings"]["reload"]["applied"], true);
    tickets.extend(take(&server, "/random?type=ticket&count=9").await);
    assert_eq!(missing(&tickets, 0..=9), 0);
    server.stop().await;
}

/// The number of shards, and the level at which the next generation of a shard is built.
#[tokio::test(flavor = "multi_thread")]
async fn shards_are_added_and_refilled_earlier_after_a_reload() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let shards =
        async || status(&server).await["pools"]["int"]["shards"].as_array().unwrap().clone();
    // A shard with three quarters of its numbers needs no other generation at first.
    server.take("int", Some(5_000)).await;
    assert!(shards().await.iter().all(|shard| shard["standby"] == false));
    site.configure(&config().set("refill.low_water", "0.9"));
    assert!(reloaded(&server).await.contains("changed: refill.low_water; pools opened again: int"));
    eventually("a standby of the shard below 0.9", async || {
        shards().await.iter().any(|shard| shard["standby"] == true).then_some(())
    })
    .await;
    site.configure(&config().set("refill.low_water", "0.9").set("pools.int.shards", 3));
    reloaded(&server).await;
    eventually("three shards in rotation", async || {
        let shards = shards().await;
        assert_eq!(shards.len(), 3);
        shards.iter().all(|shard| shard["state"] == "in_rotation").then_some(())
    })
    .await;
    server.stop().await;
}

/// Story: the log said that settings were reloaded, and no operator could tell which.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_is_one_line_of_the_log_with_its_settings() {
    let site = Site::new(&config());
    let mut server = site.start().await;
    let settings = async || status(&server).await["settings"].clone();
    assert_eq!(settings().await["reload"], Value::Null);
    let mut lines = Vec::new();
    for (drain_ms, outcome) in [(10_000, "The settings were reloaded"), (77, "were not reloaded")] {
        site.configure(&config().set("server.drain_ms", drain_ms).set("server.count_limit", 7));
        let before = SystemTime::now();
        reload(&server).await;
        let settings = settings().await;
        let at = settings["reload"]["at"].as_str().unwrap();
        let at = humantime::parse_rfc3339(at).unwrap();
        // The time is in milliseconds.
        assert!(before - Duration::from_millis(1) <= at && at <= SystemTime::now());
        lines.push((outcome, settings["digest"].as_str().unwrap().to_owned()));
    }
    // Nothing changed the second time.
    assert_eq!(lines[0].1, lines[1].1);
    server.process.signal(Signal::SIGTERM);
    let log = server.process.finish().await.stderr;
    for (outcome, digest) in lines {
        let found: Vec<_> = log.lines().filter(|line| line.contains(outcome)).collect();
        assert!(found.len() == 1 && found[0].contains(&digest), "{found:?}");
    }
}

/// Story: a rotated token worked only after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_rotated_by_reloads_and_its_keys_stay() {
    let admin = Token::new("admin", "admin").await;
    let (old, new) = (Token::new("shop", "draw").await, Token::new("shop", "draw").await);
    let hash = |token: &Token| token.entry.split('"').nth_back(1).unwrap().to_owned();
    let both = Token {
        text: String::new(),
        entry: old.entry.replace(" }", &format!(", next_sha256 = \"{}\" }}", hash(&new))),
    };
    let site = Site::new(&with_tokens(config(), &[&old, &admin]));
    site.fill().await;
    let server = site.start().await;
    let draw = async |token: &Token| {
        let (header, key) = (token.header(), ("idempotency-key", "order-17"));
        let headers = [("authorization", &*header), key];
        server.client().send_with(Method::POST, "/random", &headers).await.unwrap()
    };
    let first = draw(&old).await;
    first.assert_status(200);
    for (tokens, accepted) in [
        ([&old, &admin], [true, false]),
        ([&both, &admin], [true, true]),
        ([&new, &admin], [false, true]),
    ] {
        site.configure(&with_tokens(config(), &tokens));
        let header = admin.header();
        let headers = [("authorization", &*header)];
        let answer = server.client().send_with(Method::POST, "/reload", &headers).await.unwrap();
        answer.assert_status(200);
        for (token, accepted) in [&old, &new].into_iter().zip(accepted) {
            let answer = draw(token).await;
            assert_eq!(answer.status, if accepted { 200 } else { 401 }, "{}", answer.body);
            assert!(!accepted || answer.body == first.body, "{}", answer.body);
        }
    }
    // Others may not reload.
    let header = new.header();
    let headers = [("authorization", &*header)];
    let answer = server.client().send_with(Method::POST, "/reload", &headers).await.unwrap();
    answer.assert_status(403);
    server.stop().await;
}

/// Story: each reload gave every caller a full quota again.
#[tokio::test(flavor = "multi_thread")]
async fn quotas_and_limits_change_and_what_was_used_stays_used() {
    let quota =
        |burst: u32| config().set("quota.numbers_per_second", "0.001").set("quota.burst", burst);
    let site = Site::new(&quota(5));
    site.fill().await;
    let server = site.start().await;
    server.get("/random?count=5").await.assert_status(200);
    site.configure(&quota(5).set("server.count_limit", 3));
    assert!(reloaded(&server).await.contains("server.count_limit"));
    server.get("/random").await.assert_status(429);
    server.get("/random?count=4").await.assert_status(400);
    site.configure(&quota(2));
    reloaded(&server).await;
    server.get("/random?count=2").await.assert_status(200);
    site.configure(&config());
    reloaded(&server).await;
    server.get("/random?count=4").await.assert_status(200);
    server.stop().await;
}

/// Story: a response was lost and the limit was lowered before the retry, which then got 400 instead of its numbers.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_gets_its_numbers_although_the_limit_is_lower_by_then() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let draw = async |key: &str, count: u32| {
        let (target, headers) = (format!("/random?count={count}"), [("idempotency-key", key)]);
        server.client().send_with(Method::POST, &target, &headers).await.unwrap()
    };
    let drawn = draw("first", 9).await.numbers();
    site.configure(&config().set("server.count_limit", 3));
    reloaded(&server).await;
    let retried = draw("first", 9).await;
    assert_eq!(retried.header("idempotent-replayed"), Some("true"));
    assert_eq!(retried.numbers(), drawn);
    draw("second", 9).await.assert_status(400);
    // A client that splits a draw learns the limit so, before it repeats the parts.
    draw("first", 8).await.assert_status(400);
    draw("first", 2).await.assert_status(422);
    server.stop().await;
}

/// A server without a network is reloaded by a signal, and by the console.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_and_the_console_reload_in_each_mode() {
    for mode in ["sharded", "sqlite", "json", "simple"] {
        let site = Site::new(&config().set("server.mode", format!("'{mode}'")));
        let server = site.start().await;
        let more = |rate: u32| {
            let config = config().set("server.mode", format!("'{mode}'"));
            config.set("quota.numbers_per_second", rate)
        };
        site.configure(&more(5));
        server.process.signal(Signal::SIGHUP);
        server.process.says("changed: quota.burst, quota.numbers_per_second").await;

        site.configure(&more(7));
        let url = format!("http://{}", server.address());
        let Finished { status, stdout, stderr } =
            run(site.bare(env!("CARGO_BIN_EXE_tombola"), &["reload", "--url", &url])).await;
        assert_eq!(status.code(), Some(0), "{mode}: {stderr}");
        assert!(stdout.contains("changed: quota.burst, quota.numbers_per_second"), "{stdout}");

        site.configure(&more(7).set("server.drain_ms", 77));
        let Finished { status, stderr, .. } =
            run(site.bare(env!("CARGO_BIN_EXE_tombola"), &["reload", "--url", &url])).await;
        assert_eq!(status.code(), Some(2), "{mode}: {stderr}");
        assert!(stderr.contains("server.drain_ms can't change"), "{stderr}");
        if mode != "sharded" {
            site.configure(&more(7).pool("gift", 0, 9, 1, 5));
            let answer = reload(&server).await;
            assert_eq!(answer.status, 422, "{}", answer.body);
            assert!(answer.body.contains("restart the server"), "{}", answer.body);
        }
        server.stop().await;
    }
}

/// The files of a pool that ended stay, and it goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_ended_goes_on_where_it_was() {
    let all = || config().pool("gift", 0, 99, 1, 100);
    let site = Site::new(&all());
    site.fill().await;
    let server = site.start().await;
    let mut numbers = server.take("gift", Some(40)).await;
    site.configure(&all().set("pools.gift.enabled", "false"));
    assert!(reloaded(&server).await.contains("ended: gift"));
    server.get("/random?type=gift").await.assert_status(400);
    let metrics = server.get("/metrics").await;
    assert!(!metrics.body.contains("gift"), "{}", metrics.body);
    // The server stays ready while a new pool fills.
    site.configure(&all());
    assert!(reloaded(&server).await.contains("new pools: gift"));
    assert_eq!(server.get("/ready").await.status, 200);
    numbers.extend(take(&server, "/random?type=gift&count=60").await);
    assert_eq!(missing(&numbers, 0..=99), 0);
    server.get("/random?type=gift").await.assert_status(410);
    server.stop().await;
}
