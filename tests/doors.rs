//! Access control: addresses, tokens, quotas, cross-site requests, and file permissions.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use reqwest::Method;
use support::{
    Answer, Client, Config, Failure, Finished, Server, Site, Token, eventually, run, with_tokens,
};

const MODES: [&str; 4] = ["simple", "json", "sqlite", "sharded"];

/// Returns a config with a range that no test uses up in any mode.
fn config(mode: &str) -> Config {
    Config::new().pool("int", 1, 100_000, 2, 1_000).set("server.mode", format!("'{mode}'"))
}

/// Sets a quota that allows `burst` numbers at once, and then one number in 1000 s, which is longer than any
/// test.
fn with_quota(config: Config, burst: u32) -> Config {
    config.set("quota.numbers_per_second", 0.001).set("quota.burst", burst)
}

async fn ask(client: &Client, target: &str, headers: &[(&str, &str)]) -> Answer {
    client.send_with(Method::GET, target, headers).await.unwrap()
}

/// Sends the request until the status is not 503, since the first filling may still be running.
async fn ask_when_filled(client: &Client, target: &str, headers: &[(&str, &str)]) -> Answer {
    eventually("a status other than 503", async || {
        let answer = ask(client, target, headers).await;
        (answer.status != 503).then_some(answer)
    })
    .await
}

/// Fails unless the response has this status and reveals nothing else to a caller without access.
fn assert_refused(answer: &Answer, status: u16, what: &str) {
    assert_eq!(answer.status, status, "{what}: {}", answer.body);
    let scope = if what.contains("/random") { "draw" } else { "observe" };
    let expected = match status {
        401 => r#"{"error":"A valid token is required.","code":"unauthorized"}"#.to_owned(),
        _ => format!(
            r#"{{"error":"The token lacks the scope {scope}, which this path requires.","code":"forbidden"}}"#
        ),
    };
    assert_eq!(answer.body, expected, "{what}");
    let challenge = (status == 401).then_some("Bearer");
    assert_eq!(answer.header("www-authenticate"), challenge, "{what}");
    assert_eq!(answer.header("allow"), None, "{what}");
}

/// Checks that the response is a 429, and returns the seconds of its `Retry-After`.
fn assert_over_quota(answer: &Answer) -> u64 {
    assert_eq!(answer.status, 429, "{}", answer.body);
    assert_eq!(answer.parse::<Failure>().code, "over_quota");
    answer.header("retry-after").expect("Retry-After with a 429").parse().unwrap()
}

/// Story: a server was started on 0.0.0.0 for a test, kept running, and handed its numbers to the internet.
#[tokio::test(flavor = "multi_thread")]
async fn a_reachable_address_needs_an_authentication_setting() {
    let token = Token::new("shop", "draw").await;
    for mode in MODES {
        let site = Site::new(&config(mode));
        for address in ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0", "203.0.113.1:1"] {
            let open = config(mode).set("server.listen", format!("'{address}'"));
            // An empty list of tokens counts as none.
            for open in [open.clone(), open.set("auth.tokens", "[]")] {
                site.configure(&open);
                let refusal = site.refusal().await;
                for words in [address, "tombola token new", "mode = \"none\"", "127.0.0.1"] {
                    assert!(refusal.contains(words), "{mode} {words}: {refusal}");
                }
                assert_eq!(site.files(""), [""; 0], "{mode} {address}");
            }
        }

        let anywhere = config(mode).set("server.listen", "'0.0.0.0:0'");
        let loopback = config(mode).set("server.listen", "'127.0.0.2:0'");
        for (config, warned) in [
            (with_tokens(anywhere.clone(), &[&token]), true),
            (anywhere.set("auth.mode", "'none'"), false),
            (with_tokens(loopback.clone(), &[&token]), false),
            (loopback, false),
        ] {
            site.configure(&config);
            let mut server = site.start().await;
            let guarded = server.get("/random").await.status == 401;
            server.process.signal(Signal::SIGTERM);
            let Finished { status, stdout, stderr } = server.process.finish().await;
            assert_eq!(status.code(), Some(0), "{stderr}");
            // The suggested command works.
            assert_eq!(stdout.contains("Bearer"), guarded, "{mode}: {stdout}");
            assert_eq!(stderr.contains("in plain text"), warned, "{mode}: {stderr}");
            assert!(guarded || !warned, "{mode}: no token is required");
        }
    }
}

/// Story: a route was added without the token check. Only `/health`, `/ready`, the page (`tests/page.rs`) and
/// the description (`tests/api.rs`) are open. Without a token, the responses don't reveal which paths exist.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_its_own_doors_and_no_others() {
    let draw = Token::new("shop", "draw").await;
    let observe = Token::new("monitor", "observe").await;
    let stranger = Token::new("stranger", "draw").await;
    for mode in MODES {
        let site = Site::new(&with_tokens(config(mode), &[&draw, &observe]));
        let server = site.start().await;
        let client = server.client();

        for (path, method) in [
            ("/random", Method::GET),
            ("/random", Method::POST),
            ("/random?type=nope", Method::GET),
            ("/random", Method::DELETE),
            ("/nope", Method::GET),
            ("/random/", Method::GET),
            ("//health", Method::GET),
            ("/random//", Method::GET),
            ("/metrics", Method::GET),
            ("/status", Method::GET),
            ("/status//", Method::GET),
        ] {
            for headers in [
                &[][..],
                &[("authorization", &*stranger.header())],
                &[("authorization", "Bearer")],
                &[("authorization", "Bearer ")],
                &[("authorization", &draw.text)],
                &[("authorization", &format!("Basic {}", draw.text))],
                &[("authorization", &format!("Bearer{}", draw.text))],
                &[("authorization", &format!("Bearer {},{}", draw.text, draw.text))],
                &[("authorization", &format!("Bearer {}", draw.text.to_uppercase()))],
                &[("authorization", &draw.header()), ("authorization", &draw.header())],
                &[("authorization", &draw.header()), ("authorization", "Basic YTpi")],
                &[("x-authorization", &draw.header()), ("cookie", &draw.text)],
            ] {
                let answer = client.send_with(method.clone(), path, headers).await.unwrap();
                assert_refused(&answer, 401, &format!("{mode} {method} {path} {headers:?}"));
            }
        }
        for target in ["token", "access_token", "authorization"] {
            let target = format!("/random?{target}={}", draw.text);
            assert_refused(&server.get(&target).await, 401, &target);
        }
        let head = server.send(Method::HEAD, "/random").await;
        assert_eq!((head.status, head.body.as_str()), (401, ""), "{mode}");

        let draw = draw.header();
        for header in [draw.clone(), draw.replace("Bearer ", "bEARER "), draw.replace(' ', "  ")] {
            let answer = ask_when_filled(&client, "/random", &[("authorization", &header)]).await;
            assert_eq!(answer.status, 200, "{mode}: {}", answer.body);
        }
        for (token, target, status, code) in [
            (&draw, "/random?type=nope", 400, "unknown_type"),
            (&observe.header(), "/nope", 404, "not_found"),
        ] {
            let answer = ask(&client, target, &[("authorization", token)]).await;
            assert_eq!(answer.status, status, "{mode} {target}: {}", answer.body);
            assert_eq!(answer.parse::<Failure>().code, code);
        }
        for (token, target) in [
            (&observe.header(), "/random"),
            (&observe.header(), "/random?type=nope"),
            (&draw, "/nope"),
            (&draw, "/metrics"),
            (&draw, "/status"),
        ] {
            let answer = ask(&client, target, &[("authorization", token)]).await;
            assert_refused(&answer, 403, &format!("{mode} {target}"));
        }
        for headers in [&[][..], &[("authorization", "Bearer nonsense")]] {
            assert_eq!(ask(&client, "/health", headers).await.status, 200, "{mode}");
            assert_eq!(ask(&client, "/ready", headers).await.status, 200, "{mode}");
        }
        assert_eq!(server.send(Method::DELETE, "/health").await.status, 405, "{mode}");
        server.stop().await;
    }
}

/// Story: the new token replaced the old one, and each shop was locked out until it had the new one. While
/// both are configured, both are accepted; a token that was removed is not.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_rotated_one_beside_the_other() {
    let old = Token::new("old", "draw").await;
    let new = Token::new("new", "draw").await;
    // A second entry gives the new token both scopes.
    let (hash, end) = new.entry.split_once("draw").unwrap();
    let both = Token {
        text: new.text.clone(),
        entry: format!("{}observe{end}", hash.replace("\"new\"", "\"new.observe\"")),
    };
    let site = Site::new(&with_tokens(config("sharded"), &[&old]));
    for (tokens, opened) in [
        (vec![&old], [200, 401, 401]),
        (vec![&old, &new], [200, 200, 403]),
        (vec![&new, &both], [401, 200, 404]),
    ] {
        site.configure(&with_tokens(config("sharded"), &tokens));
        let server = site.start().await;
        for ((token, target), status) in
            [(&old, "/random"), (&new, "/random"), (&new, "/nope")].into_iter().zip(opened)
        {
            let headers = [("authorization", &*token.header())];
            let answer = ask_when_filled(&server.client(), target, &headers).await;
            assert_eq!(answer.status, status, "{target}: {}", answer.body);
        }
        server.stop().await;
    }
}

/// Story: a page that was opened on the server's machine contained `<img src=".../random?count=10000">`, and
/// used up a range. Another page had a name that resolved to 127.0.0.1, and read the numbers.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_others_take_nothing_where_there_are_no_tokens() {
    const SITE: &str = "sec-fetch-site";
    let token = Token::new("both", "draw").await;
    for mode in MODES {
        let hosts = config(mode).set("server.hosts", "['Numbers.example']");
        let site = Site::new(&hosts);
        let server = site.start().await;
        let client = server.client();
        let own = format!("http://{}", server.address());
        let port = server.address().rsplit_once(':').unwrap().1;
        let local = format!("localhost:{port}");
        assert_eq!(ask_when_filled(&client, "/random", &[]).await.status, 200);
        let refused: &[&[(&str, &str)]] = &[
            &[(SITE, "cross-site")],
            // Another port of this machine. A request for an image has no Origin.
            &[(SITE, "same-site")],
            &[(SITE, "cross-site"), ("origin", &own)],
            &[("origin", "null")],
            &[("origin", "https://evil.example")],
            &[("origin", "http://127.0.0.1:1")],
            &[("origin", "http://localhost")],
            &[("origin", &format!("{own}.evil.example"))],
            &[("host", "evil.example")],
            &[("host", &format!("evil.example:{port}"))],
            &[("host", "localhost.evil.example")],
            &[("host", "127.0.0.1.evil.example")],
            &[("host", "numbers.example.evil.example")],
            &[("host", "evil.example"), (SITE, "same-origin")],
            &[("host", "evil.example"), ("origin", "http://evil.example")],
        ];
        for headers in refused {
            for method in [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS] {
                for path in ["/random", "/random?count=7", "/status", "/metrics", "/nope"] {
                    let answer = client.send_with(method.clone(), path, headers).await.unwrap();
                    assert_eq!(answer.status, 403, "{mode} {method} {path} {headers:?}");
                    if method != Method::HEAD {
                        assert_eq!(answer.parse::<Failure>().code, "cross_site", "{headers:?}");
                    }
                }
            }
            for path in ["/health", "/ready"] {
                assert_eq!(ask(&client, path, headers).await.status, 200, "{mode} {headers:?}");
            }
        }
        let admitted: &[&[(&str, &str)]] = &[
            &[],
            &[(SITE, "none")],
            &[(SITE, "same-origin")],
            &[("origin", &own)],
            &[("origin", &format!("http://{local}")), ("host", &local)],
            &[("host", "LOCALHOST")],
            &[("host", "127.0.0.1")],
            &[("host", "[::1]")],
            &[("host", "[::1]:8000")],
            &[("host", "192.0.2.7:80")],
            &[("host", "numbers.EXAMPLE")],
            &[("host", "numbers.example:8443"), ("origin", "https://numbers.example:8443")],
            // A proxy whose `Host` is the address of this server, not the host that the client asked for.
            &[("origin", "https://numbers.example")],
            &[("origin", "https://elsewhere.example"), (SITE, "same-origin")],
        ];
        for headers in admitted {
            for method in [Method::GET, Method::POST, Method::HEAD] {
                let answer = client.send_with(method.clone(), "/random", headers).await.unwrap();
                assert_eq!(answer.status, 200, "{mode} {method} {headers:?} {}", answer.body);
            }
        }
        server.stop().await;

        // A page can't add a token to a request for another site.
        site.configure(&with_tokens(config(mode), &[&token]));
        let server = site.start().await;
        for headers in refused {
            let mut headers = headers.to_vec();
            let token = token.header();
            headers.push(("authorization", &token));
            let answer = ask(&server.client(), "/random", &headers).await;
            assert_eq!(answer.status, 200, "{mode} {headers:?}");
        }
        server.stop().await;
    }
}

/// Story: a container listened on all addresses, and clients used a name that the server could not know.
#[tokio::test(flavor = "multi_thread")]
async fn other_names_are_refused_on_loopback_or_when_names_are_set() {
    for (listen, hosts, status) in [
        ("127.0.0.1:0", "[]", 403),
        ("[::1]:0", "[]", 403),
        ("0.0.0.0:0", "[]", 200),
        ("0.0.0.0:0", "['other.example']", 403),
        ("0.0.0.0:0", "['numbers.example']", 200),
    ] {
        let config = config("sqlite").set("server.listen", format!("'{listen}'"));
        let config = config.set("auth.mode", "'none'").set("server.hosts", hosts);
        let server = Site::new(&config);
        let server = server.start().await;
        let headers = [("host", "numbers.example")];
        let answer = ask(&server.client(), "/random", &headers).await;
        assert_eq!(answer.status, status, "{listen} {hosts}: {}", answer.body);
        if status == 403 {
            assert!(answer.body.contains("server.hosts"), "{}", answer.body);
        }
        let foreign = [("sec-fetch-site", "cross-site")];
        assert_eq!(ask(&server.client(), "/random", &foreign).await.status, 403, "{listen}");
        server.stop().await;
    }
}

/// Sends these bytes and returns the response.
fn exchange(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Story: a request without `Host` was served as if it came from this machine.
#[tokio::test(flavor = "multi_thread")]
async fn http_1_1_has_one_host() {
    for mode in MODES {
        let site = Site::new(&config(mode));
        let server = site.start().await;
        for target in ["/random", "/health"] {
            for hosts in ["", "Host: localhost\r\nHost: localhost\r\n"] {
                let request = format!("GET {target} HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n");
                let answer = exchange(server.address(), &request);
                assert!(answer.starts_with("HTTP/1.1 400 "), "{mode} {target} {hosts}: {answer}");
            }
        }
        // HTTP/1.0 does not require a host.
        let answer = exchange(server.address(), "GET /nope HTTP/1.0\r\n\r\n");
        assert!(answer.contains(" 404 "), "{mode}: {answer}");
        server.stop().await;
    }
}

/// Story: the console output of a server, which is its log, went to a collector that everyone could read.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_shown_once_and_never_by_the_server() {
    let token = Token::new("shop", "draw").await;
    let secret = token.text.strip_prefix("tombola_").unwrap();
    assert_eq!(secret.len(), 64, "a token has 256 bits in hexadecimal");
    assert!(!token.entry.contains(secret));
    for mode in MODES {
        let site = Site::new(&with_tokens(with_quota(config(mode), 1), &[&token]));
        let mut command = site.tombola();
        command.env("RUST_LOG", "trace");
        let mut server = Server::start(command).await;
        for target in ["/random", "/random?count=2", "/nope"] {
            for _ in 0..2 {
                ask(&server.client(), target, &[("authorization", &token.header())]).await;
            }
            ask(&server.client(), target, &[("authorization", &token.text)]).await;
        }
        server.process.signal(Signal::SIGTERM);
        let Finished { stdout, stderr, .. } = server.process.finish().await;
        assert!(!stdout.contains(secret) && !stderr.contains(secret), "{mode}: {stderr}");
    }

    // A token in the wrong place of the config is not shown either.
    let site = Site::new(&config("json"));
    for (key, value) in [
        ("auth.tokens", format!("[{{ name = 'a', scope = 'draw', sha256 = '{}' }}]", token.text)),
        ("auth.tokens", format!("[{{ name = 'a', scope = 'draw', token = '{}' }}]", token.text)),
        ("auth.tokens", format!("['{}']", token.text)),
        ("auth.tokens", format!("'{}'", token.text)),
        ("auth.token", format!("'{}'", token.text)),
        ("auth", format!("'{}'", token.text)),
    ] {
        site.configure(&config("json").set(key, &value));
        let refusal = site.refusal().await;
        assert!(!refusal.contains(secret), "{refusal}");
        for words in ["auth", "sha256", "token new"] {
            let words =
                if value.contains("sha256") && words == "sha256" { "SHA-256" } else { words };
            assert!(refusal.contains(words), "{value}: {words}: {refusal}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_needs_a_name_and_a_scope() {
    for (arguments, words) in [
        (&["token"][..], "new"),
        (&["token", "new"], "--name"),
        (&["token", "new", "--name", "shop"], "--scope"),
        (
            &["token", "new", "--name", "shop", "--scope", "all"],
            "draw, lookup, audit, admin, observe",
        ),
        (&["token", "new", "--name", "the shop", "--scope", "draw"], "a-z"),
        (&["token", "new", "--name", "", "--scope", "draw"], "a-z"),
        (&["token", "new", "--name", "a\"\nb", "--scope", "draw"], "a-z"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tombola"));
        command.args(arguments);
        let Finished { status, stderr, .. } = run(command).await;
        assert_eq!(status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("tombola_"), "{stderr}");
    }
}

/// Story: one client in a loop emptied the pool for all others. A refused request takes no number, and
/// requests for no number are not charged.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_each_tokens_own() {
    let one = Token::new("one", "draw").await;
    let two = Token::new("two", "draw").await;
    for mode in MODES {
        let site = Site::new(&with_tokens(with_quota(config(mode), 3), &[&one, &two]));
        if mode == "sharded" {
            site.fill().await;
        }
        let server = site.start().await;
        let client = server.client();
        for token in [one.header(), two.header()] {
            let headers = [("authorization", &*token)];
            for _ in 0..5 {
                for target in ["/random?type=nope", "/nope", "/health"] {
                    ask(&client, target, &headers).await;
                }
                for (method, status) in [(Method::HEAD, 200), (Method::DELETE, 405)] {
                    let answer = client.send_with(method, "/random", &headers).await.unwrap();
                    assert_eq!(answer.status, status, "{mode}");
                }
            }
            for method in [Method::GET, Method::POST, Method::GET] {
                let answer = client.send_with(method, "/random", &headers).await.unwrap();
                assert_eq!(answer.status, 200, "{mode}: {}", answer.body);
            }
            for method in [Method::GET, Method::POST] {
                let answer = client.send_with(method, "/random", &headers).await.unwrap();
                let seconds = assert_over_quota(&answer);
                assert!((500..=1_000).contains(&seconds), "{mode}: {seconds}");
            }
            assert_eq!(server.get("/health").await.status, 200, "{mode}");
        }
        server.stop().await;
    }
}

/// Story: a request for 10,000 numbers was charged as one.
#[tokio::test(flavor = "multi_thread")]
async fn a_count_is_charged_by_its_size() {
    let site = Site::new(&with_quota(Config::new().pool("int", 1, 100, 1, 50), 10));
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    for (count, status) in [(11, 400), (7, 200), (4, 429), (2, 200), (2, 429), (1, 200), (1, 429)] {
        let answer = server.get(&format!("/random?count={count}")).await;
        assert_eq!(answer.status, status, "{count}: {}", answer.body);
        match status {
            200 => numbers.extend(answer.numbers()),
            // Four were asked for when three were left, two when one was left, and one when none was: each
            // time one number is missing, which takes 1000 s.
            429 => assert!((500..=1_000).contains(&assert_over_quota(&answer)), "{count}"),
            _ => {
                let head = server.send(Method::HEAD, &format!("/random?count={count}")).await;
                assert_eq!(head.status, 400, "HEAD has the status of GET");
                let failure: Failure = answer.parse();
                assert_eq!(failure.code, "above_burst");
                assert!(failure.error.contains("11") && failure.error.contains("up to 10"));
            }
        }
    }
    let seconds = assert_over_quota(&server.get("/random?count=10").await);
    assert!((9_500..=10_000).contains(&seconds), "{seconds}");
    server.stop().await;

    // Refused requests took no numbers.
    site.configure(&Config::new().pool("int", 1, 100, 1, 50));
    let server = site.start().await;
    numbers.extend(server.drain("int", 2, &[None]).await);
    support::assert_each_once(&numbers, 1..=100);
    server.stop().await;
}

/// Story: behind a proxy all callers had one address, so `X-Forwarded-For` was trusted from any client, and a
/// client could claim another address in each request.
#[tokio::test(flavor = "multi_thread")]
async fn without_tokens_an_address_has_a_quota_and_only_a_named_proxy_speaks_for_others() {
    const ONE: (&str, &str) = ("x-forwarded-for", "9.9.9.9, 198.51.100.1");
    const SAME: (&str, &str) = ("x-forwarded-for", "8.8.8.8, 198.51.100.1");
    const OTHER: (&str, &str) = ("forwarded", "for=198.51.100.2;proto=https");
    for mode in MODES {
        for (proxies, statuses) in [
            ("[]", [200, 429, 429, 429, 200, 429]),
            ("['127.0.0.2']", [200, 429, 429, 429, 200, 200]),
            ("['127.0.0.0/31', '2001:db8::/32']", [200, 200, 429, 200, 200, 429]),
        ] {
            let config = with_quota(config(mode), 1).set("quota.trusted_proxies", proxies);
            let site = Site::new(&config);
            if mode == "sharded" {
                site.fill().await;
            }
            let server = site.start().await;
            let (client, second) = (server.client(), server.client().at("127.0.0.2"));
            for (step, ((client, headers), status)) in [
                (&client, &[][..]),
                (&client, &[ONE]),
                (&client, &[SAME]),
                (&client, &[OTHER]),
                // Another address, which counts as a proxy in the second round only.
                (&second, &[]),
                (&second, &[OTHER]),
            ]
            .into_iter()
            .zip(statuses)
            .enumerate()
            {
                let answer = ask(client, "/random", headers).await;
                assert_eq!(answer.status, status, "{mode} {proxies} {step}: {}", answer.body);
            }
            server.stop().await;
        }
    }
}

/// Story: the error page of one status lacked headers that all others had, and was framed. `send` checks the
/// headers of each response; this test produces one of each status.
#[tokio::test(flavor = "multi_thread")]
async fn every_route_and_status_has_the_headers_of_all() {
    let draw = Token::new("shop", "draw").await;
    for mode in MODES {
        let site = Site::new(&config(mode));
        let server = site.start().await;
        let mut statuses = Vec::new();
        let mut note = |answer: Answer| statuses.push(answer.status);
        note(ask_when_filled(&server.client(), "/random", &[]).await);
        for target in ["/health", "/random?type=nope", "/random?count=0", "/nope", "/openapi.json"]
        {
            for method in [Method::GET, Method::HEAD, Method::POST, Method::OPTIONS] {
                note(server.send(method, target).await);
            }
        }
        server.stop().await;

        site.configure(&with_tokens(with_quota(config(mode), 1), &[&draw]));
        let server = site.start().await;
        for (target, headers) in [
            ("/random", &[][..]),
            ("/nope", &[("authorization", &*draw.header())]),
            ("/random", &[("authorization", &draw.header())]),
            ("/random", &[("authorization", &draw.header())]),
        ] {
            note(ask(&server.client(), target, headers).await);
        }
        server.stop().await;

        let small = Config::new().pool("int", 1, 2, 1, 2).set("server.mode", format!("'{mode}'"));
        let site = Site::new(&small);
        let server = site.start().await;
        for _ in 0..8 {
            note(server.get("/random").await);
        }
        note(server.get("/health").await);
        server.stop().await;
        for status in [200, 400, 401, 403, 404, 405, 429] {
            assert!(statuses.contains(&status), "{mode}: {status} is not in {statuses:?}");
        }
        assert!(statuses.contains(&410) || statuses.contains(&503), "{mode}: {statuses:?}");
    }
}

/// Story: every user of the machine could read the numbers that were still to be issued.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_private_to_the_user_whatever_the_umask() {
    for mode in MODES {
        for umask in ["000", "022", "077"] {
            let site = Site::new(&config(mode));
            let tombola = site.tombola();
            let mut command = Command::new("sh");
            command.current_dir(tombola.get_current_dir().unwrap());
            command.args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"]);
            command.arg(tombola.get_program()).args(tombola.get_args());
            let mut server = Server::start(command).await;
            for _ in 0..5 {
                server.take("int", None).await;
            }
            let files = site.files("");
            let has_log = files.iter().any(|name| name.ends_with("-wal"));
            assert_eq!(has_log, ["sqlite", "sharded"].contains(&mode), "{files:?}");
            assert_private(&site, &format!("{mode} {umask}"));
            server.process.signal(Signal::SIGTERM);
            let Finished { stderr, .. } = server.process.finish().await;
            assert!(!stderr.contains("chmod"), "{stderr}");
            assert_private(&site, &format!("{mode} {umask}, stopped"));
        }
    }
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn assert_private(site: &Site, when: &str) {
    assert_eq!(mode_of(&site.data()), 0o700, "{when}");
    for name in site.files("") {
        // A build may have been renamed in the meantime.
        if let Ok(metadata) = fs::metadata(site.file(&name)) {
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{when}: {name}");
        }
    }
}

/// Story: files restored from a backup were readable by all users, and the server did not warn.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_may_read_is_named_at_the_start_and_left_as_it_is() {
    for mode in MODES {
        let site = Site::new(&config(mode));
        let server = site.start().await;
        server.take("int", None).await;
        server.stop().await;
        let file = site.file(&site.files("numbers").remove(0));
        // A file like the one in a clone of the repository.
        fs::write(site.data().join("README.md"), "About this folder.").unwrap();
        for (folder, bits, warnings) in
            [(0o700, 0o600, 0), (0o755, 0o600, 1), (0o700, 0o640, 1), (0o770, 0o604, 2)]
        {
            fs::set_permissions(site.data(), Permissions::from_mode(folder)).unwrap();
            fs::set_permissions(&file, Permissions::from_mode(bits)).unwrap();
            let mut server = site.start().await;
            server.process.signal(Signal::SIGTERM);
            let Finished { stderr, .. } = server.process.finish().await;
            let lines: Vec<_> = stderr.lines().filter(|line| line.contains("chmod")).collect();
            assert_eq!(lines.len(), warnings, "{mode} {folder:o} {bits:o}: {stderr}");
            let data = site.data().display().to_string();
            if folder != 0o700 {
                let words = [format!("{folder:04o}"), format!("chmod 700 {data}")];
                assert!(words.iter().all(|word| lines[0].contains(word)), "{stderr}");
            }
            if bits != 0o600 {
                let path = file.display().to_string();
                let words = [path, format!("{bits:04o}"), format!("chmod 600 {data}/*")];
                assert!(words.iter().all(|word| lines[warnings - 1].contains(word)), "{stderr}");
            }
            assert_eq!(mode_of(&site.data()), folder, "{mode}");
            // The file of the modes `simple` and `json` is replaced at each write.
            let expected = if file.ends_with("used_numbers.json") { 0o600 } else { bits };
            assert_eq!(mode_of(&file), expected, "{mode}");
        }
    }
}
