//! Who may ask: the address, tokens, quotas, and who may read the files.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use reqwest::Method;
use support::{
    Answer, Client, Config, Failure, Finished, Server, Site, Token, eventually, run, with_tokens,
};

const MODES: [&str; 4] = ["simple", "json", "sqlite", "sharded"];

/// A range that no test uses up, in whatever mode.
fn config(mode: &str) -> Config {
    Config::new().pool("int", 1, 100_000, 2, 1_000).set("server.mode", format!("'{mode}'"))
}

/// Buckets that let `burst` go, and then one number in 1000 s: no test takes that long.
fn with_quota(config: Config, burst: u32) -> Config {
    config.set("quota.numbers_per_second", 0.001).set("quota.burst", burst)
}

async fn ask(client: &Client, target: &str, headers: &[(&str, &str)]) -> Answer {
    client.send_with(Method::GET, target, headers).await.unwrap()
}

/// Asks until there is another answer than 503: a first filling may be on its way.
async fn ask_when_filled(client: &Client, target: &str, headers: &[(&str, &str)]) -> Answer {
    eventually("another answer than 503", async || {
        let answer = ask(client, target, headers).await;
        (answer.status != 503).then_some(answer)
    })
    .await
}

/// What a caller who is not let in gets to know: nothing.
fn assert_refused(answer: &Answer, status: u16, what: &str) {
    assert_eq!(answer.status, status, "{what}: {}", answer.body);
    let expected = match status {
        401 => r#"{"error":"A valid token is needed.","code":"unauthorized"}"#,
        _ => r#"{"error":"The token is not for this.","code":"forbidden"}"#,
    };
    assert_eq!(answer.body, expected, "{what}");
    let challenge = (status == 401).then_some("Bearer");
    assert_eq!(answer.header("www-authenticate"), challenge, "{what}");
    assert_eq!(answer.header("allow"), None, "{what}");
}

/// A 429, and the seconds that it promises.
fn assert_over_quota(answer: &Answer) -> u64 {
    assert_eq!(answer.status, 429, "{}", answer.body);
    assert_eq!(answer.parse::<Failure>().code, "over_quota");
    answer.header("retry-after").expect("Retry-After with a 429").parse().unwrap()
}

/// Story: the server came up on 0.0.0.0 for a test, stayed, and handed its numbers to the internet.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_others_reach_needs_a_word_on_who_may_ask() {
    let token = Token::new("shop", "draw").await;
    for mode in MODES {
        let site = Site::new(&config(mode));
        for address in ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0", "203.0.113.1:1"] {
            let open = config(mode).set("server.listen", format!("'{address}'"));
            // No tokens are none.
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
            // What to try works.
            assert_eq!(stdout.contains("Bearer"), guarded, "{mode}: {stdout}");
            assert_eq!(stderr.contains("in plain text"), warned, "{mode}: {stderr}");
            assert!(guarded || !warned, "{mode}: tokens are asked for");
        }
    }
}

/// Story: a route was added, and the check for the token forgotten there. No door is open but
/// `/health` and the page (`tests/page.rs`), and nobody learns without a token what there is.
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
            ("/health/", Method::GET),
            ("/metrics", Method::GET),
            ("/status", Method::GET),
            ("/ready/", Method::GET),
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

/// Story: the new token was entered in place of the old, and every shop was shut out until the last
/// had it. Both are good while both stand there; one that has gone opens nothing.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_rotated_one_beside_the_other() {
    let old = Token::new("old", "draw").await;
    let new = Token::new("new", "draw").await;
    // The new one is for both: a second entry says so.
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

/// Story: the console of a server, its log, went to a collector that everyone could read.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_shown_once_and_never_by_the_server() {
    let token = Token::new("shop", "draw").await;
    let secret = token.text.strip_prefix("tombola_").unwrap();
    assert_eq!(secret.len(), 64, "256 bits in hexadecimal");
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

    // Nor when it stands where it does not belong.
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
        (&["token", "new", "--name", "shop", "--scope", "all"], "draw, observe"),
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

/// Story: one client in a loop emptied the pool for all. What is refused takes no number, and what
/// asks for none is not counted.
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

/// Story: a count of 10,000 was charged as one.
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
            // Four when three are left: one is to come; two when one is left: one.
            429 => assert!((500..=1_000).contains(&assert_over_quota(&answer)), "{count}"),
            _ => {
                let head = server.send(Method::HEAD, &format!("/random?count={count}")).await;
                assert_eq!(head.status, 400, "what HEAD says is what GET would have said");
                let failure: Failure = answer.parse();
                assert_eq!(failure.code, "above_burst");
                assert!(failure.error.contains("11") && failure.error.contains("up to 10"));
            }
        }
    }
    let seconds = assert_over_quota(&server.get("/random?count=10").await);
    assert!((9_500..=10_000).contains(&seconds), "{seconds}");
    server.stop().await;

    // What was refused took nothing.
    site.configure(&Config::new().pool("int", 1, 100, 1, 50));
    let server = site.start().await;
    numbers.extend(server.drain("int", 2, &[None]).await);
    support::assert_each_once(&numbers, 1..=100);
    server.stop().await;
}

/// Story: behind the proxy all callers were one, so its word was taken, from anyone: each request
/// brought an address of its own.
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
                // A machine of its own, which is a proxy in the second round only.
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

/// Story: the error page of one status lacked what all others had, and was framed. `send` asserts the
/// headers of each answer; here is one of each.
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

/// Story: the numbers still to be issued could be read by every user of the machine.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_writes_is_for_its_user_alone_whatever_the_umask() {
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
        // A build may have been renamed by now.
        if let Ok(metadata) = fs::metadata(site.file(&name)) {
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{when}: {name}");
        }
    }
}

/// Story: files restored from a backup were open to all, and nobody noticed.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_may_read_is_named_at_the_start_and_left_as_it_is() {
    for mode in MODES {
        let site = Site::new(&config(mode));
        let server = site.start().await;
        server.take("int", None).await;
        server.stop().await;
        let file = site.file(&site.files("numbers").remove(0));
        // As in a clone of the repository.
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
            // The file of the modes simple and json is written anew.
            let expected = if file.ends_with("used_numbers.json") { 0o600 } else { bits };
            assert_eq!(mode_of(&file), expected, "{mode}");
        }
    }
}
