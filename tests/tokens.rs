//! Tokens for some pools, tokens that expire, and two tokens of one entry.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use support::{Answer, Config, Failure, Server, Site, Token, eventually, with_tokens};

const MODES: [&str; 4] = ["sharded", "sqlite", "json", "simple"];

fn config() -> Config {
    Config::new()
        .pool("int", 1, 1_000_000, 1, 1_000)
        .pool("ticket", 1, 1_000_000, 1, 1_000)
        .pool("voucher", 1, 1_000_000, 1, 1_000)
}

async fn ask(server: &Server, method: Method, target: &str, token: Option<&Token>) -> Answer {
    let header = token.map(|token| token.header());
    let headers: Vec<_> = header.iter().map(|header| ("authorization", &**header)).collect();
    server.client().send_with(method, target, &headers).await.unwrap()
}

async fn get(server: &Server, target: &str, token: &Token) -> Answer {
    ask(server, Method::GET, target, Some(token)).await
}

/// Draws a number with a token, as soon as its pool has one.
async fn draw(server: &Server, target: &str, token: &Token) -> Answer {
    eventually("a number", async || {
        let answer = ask(server, Method::POST, target, Some(token)).await;
        (answer.status != 503).then_some(answer)
    })
    .await
}

fn assert_refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{}", answer.body);
    assert_eq!(answer.parse::<Failure>().code, code, "{}", answer.body);
}

/// Returns the names in `pools` of a response.
fn pools(answer: &Answer) -> Vec<String> {
    answer.parse::<Value>()["pools"].as_object().unwrap().keys().cloned().collect()
}

/// Story: each shop had a token, and could empty, watch and look up the pools of the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_some_pools_draws_looks_up_and_sees_only_these() {
    let flags = ["--pool", "voucher", "--pool", "ticket", "--owner", "shop"];
    let shop = Token::with("shop", "draw", &flags).await;
    let lookup = Token::with("shop.lookup", "lookup", &flags).await;
    let audit = Token::with("shop.audit", "audit", &flags).await;
    let observe = Token::with("shop.observe", "observe", &flags).await;
    let admin = Token::with("shop.admin", "admin", &flags).await;
    let owner = ["--owner", "shop"];
    let everything = [
        Token::with("all", "draw", &owner).await,
        Token::new("all.observe", "observe").await,
        Token::new("all.audit", "audit").await,
    ];
    let [all, all_observe, all_audit] = &everything;
    let tokens = [&shop, &lookup, &audit, &observe, &admin, all, all_observe, all_audit];
    let site = Site::new(&with_tokens(config(), &tokens));
    site.fill().await;
    let server = site.start().await;

    // It draws only from its pools.
    for pool in ["voucher", "ticket"] {
        draw(&server, &format!("/random?type={pool}&label=mine"), &shop).await.assert_status(200);
    }
    let other = draw(&server, "/random?type=int&label=other", all).await;
    other.assert_status(200);
    for method in [Method::GET, Method::POST] {
        for target in ["/random", "/random?type=int", "/random?type=int&count=2"] {
            let answer = ask(&server, method.clone(), target, Some(&shop)).await;
            assert_refused(&answer, 403, "forbidden");
        }
    }
    let head = ask(&server, Method::HEAD, "/random?type=int", Some(&shop)).await;
    assert_eq!(head.status, 403);
    let unknown = get(&server, "/random?type=gift", &shop).await;
    assert_refused(&unknown, 400, "unknown_type");
    assert!(unknown.body.contains("Allowed: ticket, voucher."), "{}", unknown.body);
    let unknown = get(&server, "/random?type=gift", all).await;
    assert!(unknown.body.contains("Allowed: int, ticket, voucher."), "{}", unknown.body);

    // A key is its owner's. If it was used for another pool, the token does not learn which one.
    let keyed = async |target: &str, token: &Token| {
        let header = token.header();
        let headers = [("authorization", &*header), ("idempotency-key", "order-17")];
        server.client().send_with(Method::POST, target, &headers).await.unwrap()
    };
    keyed("/random?label=keyed", all).await.assert_status(200);
    let reused = keyed("/random?type=voucher", &shop).await;
    assert_refused(&reused, 422, "key_reused");
    for hidden in ["int", "keyed"] {
        assert!(!reused.body.contains(hidden), "{}", reused.body);
    }
    let reused = keyed("/random?type=voucher", all).await;
    assert!(reused.body.contains("type=int, label=\\\"keyed\\\""), "{}", reused.body);

    // It looks up only numbers of its pools, although the other has the same owner.
    let number = other.parse::<Value>()["number"].clone();
    let target = format!("/receipts/int/{number}");
    assert_refused(&get(&server, &target, &lookup).await, 403, "forbidden");
    get(&server, &target, all_audit).await.assert_status(200);
    let labels = |answer: Answer| -> Vec<String> {
        answer.assert_status(200);
        let lines = answer.body.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|receipt| receipt["label"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(labels(get(&server, "/receipts", &audit).await), ["mine", "mine"]);
    assert_eq!(labels(get(&server, "/receipts?limit=1", &audit).await), ["mine"]);
    assert_eq!(labels(get(&server, "/receipts?after=1&limit=5", &audit).await), ["mine"]);
    assert_eq!(labels(get(&server, "/receipts?label=other", &audit).await), [""; 0]);
    assert_eq!(
        labels(get(&server, "/receipts", all_audit).await),
        ["mine", "mine", "other", "keyed"]
    );

    // It sees only its pools.
    let its = ["ticket", "voucher"];
    let status = get(&server, "/status", &observe).await;
    assert_eq!(pools(&status), its);
    assert_eq!(pools(&get(&server, "/status", all_observe).await), ["int", "ticket", "voucher"]);
    let metrics = get(&server, "/metrics", &observe).await;
    for (path, answer) in [("/status", &status), ("/metrics", &metrics)] {
        assert!(!answer.body.contains("\"int"), "{path}: {}", answer.body);
        assert!(answer.body.contains("voucher"), "{path}: {}", answer.body);
    }
    for (token, seen) in [(Some(&shop), &its[..]), (None, &[])] {
        for path in ["/health", "/ready"] {
            let answer = ask(&server, Method::GET, path, token).await;
            answer.assert_status(200);
            assert_eq!(pools(&answer), seen, "{path}");
        }
        let described = ask(&server, Method::GET, "/openapi.json", token).await.parse::<Value>();
        let type_ = &described["paths"]["/random"]["get"]["parameters"][0]["schema"];
        let names = if seen.is_empty() { Value::Null } else { json!(seen) };
        assert_eq!(type_["enum"], names, "{type_}");
        for hidden in ["int_shard", "`int`"] {
            let shows = described["paths"]["/random"].to_string().contains(hidden);
            assert_eq!(shows, token.is_none() && hidden == "int_shard", "{hidden}");
        }
    }
    // It imports only into its pools.
    let imported = ask(&server, Method::POST, "/pools/int/used", Some(&admin)).await;
    assert_refused(&imported, 403, "forbidden");
    ask(&server, Method::POST, "/pools/ticket/used", Some(&admin)).await.assert_status(200);
    // The settings name all pools.
    let reload = ask(&server, Method::POST, "/reload", Some(&admin)).await;
    assert_refused(&reload, 403, "forbidden");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simpler_modes_know_tokens_for_some_pools() {
    let shop = Token::with("shop", "draw", &["--pool", "ticket"]).await;
    for mode in &MODES[1..] {
        let config = with_tokens(config(), &[&shop]).set("server.mode", format!("'{mode}'"));
        let site = Site::new(&config);
        let server = site.start().await;
        get(&server, "/random?type=ticket", &shop).await.assert_status(200);
        assert_refused(&get(&server, "/random", &shop).await, 403, "forbidden");
        assert_eq!(pools(&get(&server, "/health", &shop).await), ["ticket"]);
        assert_eq!(pools(&server.get("/ready").await), [""; 0]);
        server.stop().await;
    }
}

/// Story: a token was to end with a campaign, and the operator forgot to remove it.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_refused_once_it_has_expired_and_reported_in_its_last_week() {
    let day = Duration::from_secs(86_400);
    let time = |after: Duration| humantime::format_rfc3339_seconds(SystemTime::now() + after);
    let soon = Token::with("soon", "draw", &["--expires", &time(day).to_string()]).await;
    let later = Token::with("later", "draw", &["--expires", &time(30 * day).to_string()]).await;
    let past = Token::with("past", "draw", &["--expires", "2026-01-31"]).await;
    for mode in MODES {
        let tokens = with_tokens(config(), &[&soon, &later, &past]);
        let site = Site::new(&tokens.set("server.mode", format!("'{mode}'")));
        let mut server = site.start().await;
        server.process.says("The token soon expires at").await;
        server.process.says("The token past expired at 2026-01-31T00:00:00Z and is refused").await;
        for token in [&soon, &later] {
            draw(&server, "/random", token).await.assert_status(200);
        }
        let refused = get(&server, "/random", &past).await;
        assert_refused(&refused, 401, "unauthorized");
        assert!(refused.body.contains("expired"), "{}", refused.body);
        server.process.signal(Signal::SIGTERM);
        let stderr = server.process.finish().await.stderr;
        assert!(!stderr.contains("token later"), "{stderr}");
    }
}

/// Wrong settings of tokens are named.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_of_a_token_are_refused() {
    let token = Token::new("shop", "draw").await;
    let other = Token::new("other", "draw").await;
    let with = |rest: &str| Token {
        text: String::new(),
        entry: token.entry.replace(" }", &format!(", {rest} }}")),
    };
    let hash_of = |token: &Token| token.entry.split('"').nth_back(1).unwrap().to_owned();
    let cases = [
        (vec![with("pools = ['gift']")], "no pool is called \"gift\""),
        (vec![with("pools = []")], "at least one pool"),
        (vec![with("expires = 'tomorrow'")], "2027-01-31"),
        (vec![with("expires = 5")], "2027-01-31"),
        (vec![with("next_sha256 = 'abc'")], "64 hexadecimal digits"),
        (vec![with(&format!("next_sha256 = '{}'", hash_of(&token)))], "the same as sha256"),
        (
            vec![other.clone(), with(&format!("next_sha256 = '{}'", hash_of(&other)))],
            "this is the token other again",
        ),
    ];
    for (tokens, words) in cases {
        let tokens: Vec<_> = tokens.iter().collect();
        let refusal = Site::new(&with_tokens(config(), &tokens)).refusal().await;
        assert!(refusal.contains(words), "{words}: {refusal}");
    }
    // A date without quotes, and a pool that is off for now.
    let fine = with("expires = 2100-01-31, pools = ['ticket'], next_sha256 = ''");
    let entry = fine.entry.replace("''", &format!("'{}'", hash_of(&other)));
    let config = config().set("pools.ticket.enabled", "false");
    let site = Site::new(&with_tokens(config, &[&Token { text: String::new(), entry }]));
    site.start().await.stop().await;
}
