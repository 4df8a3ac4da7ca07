//! The console as operators and service managers use it: exit codes, explained settings, the status of a
//! running server, completions and man pages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

use nix::sys::signal::Signal;
use rcgen::generate_simple_self_signed;
use support::{Config, Finished, PATIENCE, Process, Site, run};

const TOMBOLA: &str = env!("CARGO_BIN_EXE_tombola");
const INIT_SHARDS: &str = env!("CARGO_BIN_EXE_init-shards");
const STATUS: &str = include_str!("status.json");

fn config() -> Config {
    Config::new().pool("int", 1, 1_000, 1, 500)
}

/// A server that sends canned responses, one for each connection, and then ends.
struct Canned {
    url: String,
    heads: JoinHandle<Vec<String>>,
}

impl Canned {
    fn new(answers: &[(u16, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answers: Vec<(u16, String)> =
            answers.iter().map(|(status, body)| (*status, (*body).to_owned())).collect();
        let heads = std::thread::spawn(move || {
            let answer = |(status, body): (u16, String)| {
                let (mut stream, _) = listener.accept().unwrap();
                let head = read_head(&mut stream);
                write!(
                    stream,
                    "HTTP/1.1 {status} Canned\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                )
                .unwrap();
                head
            };
            answers.into_iter().map(answer).collect()
        });
        Self { url, heads }
    }

    /// Waits for all requests and returns their heads.
    fn heads(self) -> Vec<String> {
        self.heads.join().unwrap()
    }
}

fn read_head(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// Runs `tombola status` against a server that sends this response.
async fn status_of(site: &Site, answer: (u16, &str), flags: &[&str]) -> Finished {
    let server = Canned::new(&[answer]);
    let mut command = site.bare(TOMBOLA, &["status", "--url", &server.url]);
    command.args(flags).env("COLUMNS", "110");
    let finished = run(command).await;
    server.heads();
    finished
}

/// Returns a URL on which no server listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn the_exit_code_tells_settings_folder_and_network_apart() {
    let site = Site::new(&config());
    let check = async |command: Command, code: i32, parts: &[&str]| {
        let shown = format!("{command:?}");
        let Finished { status, stdout, stderr } = run(command).await;
        assert_eq!(status.code(), Some(code), "{shown}\n{stdout}\n{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{shown}\nsaid {stderr:?}\nwithout {part:?}");
        }
    };
    let tombola = |words: &[&str]| site.bare(TOMBOLA, words);

    check(tombola(&["--version"]), 0, &[]).await;
    check(tombola(&["sevre"]), 2, &["sevre", "serve"]).await;
    check(tombola(&["--config", "none.toml"]), 2, &["none.toml", "No such file"]).await;
    check(tombola(&["verify", "--config", "none.toml"]), 2, &["none.toml"]).await;
    check(tombola(&["--listen", "here"]), 2, &["server.listen = here", "address"]).await;
    check(tombola(&["--listen", "0.0.0.0:0"]), 2, &["0.0.0.0:0", "tombola token new"]).await;
    check(tombola(&["check-config", "--listen", "0.0.0.0:0"]), 2, &["tombola token new"]).await;
    check(site.bare(INIT_SHARDS, &["--pool", "nope"]), 2, &["pools.nope", "int"]).await;
    let nowhere = nobody();
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listening.local_addr().unwrap().to_string();
    check(tombola(&["--listen", &address]), 1, &[&address, "--listen"]).await;
    check(tombola(&["verify"]), 1, &["there is no folder", "--data-dir"]).await;
    check(tombola(&["status", "--url", &nowhere]), 4, &[&nowhere, "refused", "--url"]).await;
    check(tombola(&["health", "--url", &nowhere]), 4, &[&nowhere, "refused", "--url"]).await;

    let server = site.start().await;
    check(tombola(&[]), 6, &["in use", "LOCK"]).await;
    check(tombola(&["verify"]), 6, &["in use", "LOCK"]).await;
    check(site.bare(INIT_SHARDS, &[]), 6, &["in use", "LOCK"]).await;
    server.stop().await;
    check(tombola(&["--mode", "json"]), 3, &["of the mode sharded", "--data-dir"]).await;
    std::fs::remove_file(site.file("used_numbers_int.db")).unwrap();
    check(tombola(&[]), 3, &["used_numbers_int.db is missing"]).await;

    let help = run(tombola(&["--help"])).await.stdout;
    for code in [
        "0  done",
        "1  failed",
        "2  the arguments",
        "3  the data folder",
        "4  no server",
        "6  another process",
    ] {
        assert!(help.contains(code), "{help}");
    }
}

#[tokio::test]
async fn settings_are_shown_with_where_they_come_from() {
    let site = Site::new(&config());
    let text = "# mine\n[server]\ncount_limit = 77\n\n[pools.ticket]\nmax = 99\nmin = 10\n\
                [[auth.tokens]]\nname = 'shop'\nscope = 'draw'\nsha256 = \
                'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'\n";
    std::fs::write(site.folder().join("config.toml"), text).unwrap();
    let show = async |file: &str, flags: &[&str]| {
        let mut command = site.bare(TOMBOLA, &["check-config", "--config", file]);
        command.args(flags).env("TOMBOLA_LEASE__ROWS", "0").env("TOMBOLA_TOKEN", "no setting");
        let finished = run(command).await;
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
        finished.stdout
    };
    let shown = show("config.toml", &["--data-dir", "elsewhere"]).await;
    for (setting, origin) in [
        ("count_limit = 77", "config.toml, line 3"),
        ("max = 99", "config.toml, line 6"),
        ("min = 10", "config.toml, line 7"),
        ("decimals = 0", "default"),
        ("shard_size = 45", "default"),
        ("[[auth.tokens]]", "config.toml, line 8"),
        ("rows = 0", "environment TOMBOLA_LEASE__ROWS"),
        ("dir = \"elsewhere\"", "--data-dir"),
        ("listen = \"127.0.0.1:8000\"", "default of the mode sharded"),
        ("drain_ms = 10000", "default"),
        ("max = 9999.999999", "default"),
        ("shards = \"auto\"", "default, "),
    ] {
        let line = |line: &&str| line.starts_with(setting) && line.contains(&format!("# {origin}"));
        assert!(shown.lines().any(|l| line(&l)), "no {setting} of {origin} in\n{shown}");
    }

    // The printed settings are a valid settings file with the same values.
    std::fs::write(site.folder().join("printed.toml"), &shown).unwrap();
    let values = |shown: &str| -> Vec<String> {
        shown.lines().map(|line| line.split('#').next().unwrap().trim().to_owned()).collect()
    };
    assert_eq!(values(&show("printed.toml", &[]).await), values(&shown));
}

#[tokio::test]
async fn wrong_settings_are_refused_as_the_server_refuses_them() {
    let site = Site::new(&config().set("lease.rows", -1));
    let checked = run(site.console(&["check-config"])).await;
    assert_eq!(checked.status.code(), Some(2));
    assert_eq!(checked.stdout, "");
    assert!(checked.stderr.contains("lease.rows = -1"), "{}", checked.stderr);
    assert!(site.refusal().await.contains(checked.stderr.trim()));

    let site =
        Site::new(&config().set("server.tls.cert", "'c.pem'").set("server.tls.key", "'k.pem'"));
    let checked = run(site.console(&["check-config"])).await;
    assert_eq!(checked.status.code(), Some(2));
    assert!(checked.stderr.contains("c.pem: can't be read"), "{}", checked.stderr);
}

#[tokio::test]
async fn status_is_one_table_that_fits() {
    let site = Site::new(&config());
    let shown = status_of(&site, (200, STATUS), &[]).await;
    assert_eq!((shown.status.code(), &*shown.stderr), (Some(0), ""));
    for part in [
        ": degraded, up 60 min, 1,200 connections",
        "1,201 requests/s, p50 100 µs, p99 400 µs, p99.9 -; 123,456 in all (200: 123,400, 503: 56)",
        "numbers/s over 15 s, up to 1,000: ▁▅█",
        "receipts: 1,234, replayed 5, waiting 0\n",
        "float: degraded, 0.000000 to 9999.999900",
        "the last refill of float_shard_1.db failed: no space left",
        "5,000,000 issued, 12.3/s; 2,500,000 pooled, 9,992,499,901 free, 1,024 burned",
        "used up in 26 years at this rate; one guess in 2,000 hits an issued number",
        "never used up at this rate; nothing issued that a guess could hit",
        "42 % built",
        "5 min ago, took 1.2 s",
        "failed 8 s ago",
        "refill failed  float_shard_1.db  no space left\u{fffd}[31m on the disk",
        "tombola 0.1.0 started",
        "receipts failed    Receipts can't be saved: disk full",
    ] {
        assert!(shown.stdout.contains(part), "no {part:?} in\n{}", shown.stdout);
    }
    let row = |name: &str| shown.stdout.lines().find(|line| line.starts_with(name)).unwrap();
    let half = row("float_shard_0.db");
    assert!(half.contains("in rotation  1,234,567  █") && half.contains("█░"), "{half}");
    assert!(row("float_shard_1.db").contains("depleted             0  ░░"), "{}", shown.stdout);
    assert!(!row("int_shard_0.db").contains('░'), "{}", shown.stdout);
    assert!(row("int_shard_0.db").contains("ready"), "{}", shown.stdout);

    // Burned numbers are never issued, so a range can be used up before all of its numbers were issued.
    let burned = [
        ("\"pooled\": 2500000", "\"pooled\": 0"),
        ("\"free\": 9992499901, \"burned\": 1024", "\"free\": 0, \"burned\": 9994999901"),
        ("\"seconds_until_used_up\": 810000000.0", "\"seconds_until_used_up\": null"),
    ];
    let ended = burned.into_iter().fold(STATUS.to_owned(), |status, (from, to)| {
        assert_eq!(status.matches(from).count(), 1, "{from}");
        status.replace(from, to)
    });
    let shown = status_of(&site, (200, &ended), &[]).await.stdout;
    assert!(shown.contains("\n  used up; one guess in 2,000 hits"), "{shown}");

    let away = STATUS.replace("\"trouble\": null", "\"trouble\": \"disk full\"");
    let shown = status_of(&site, (200, &away), &[]).await.stdout;
    assert!(shown.contains("waiting 0; can't be saved: disk full\n"), "{shown}");
    let none = STATUS.replace("\"receipts\": {\"count\": 1234", "\"receipts\": {\"count\": 0");
    let shown = status_of(&site, (200, &none), &[]).await.stdout;
    assert!(!shown.contains("receipts:"), "{shown}");

    for columns in [20, 44, 60, 80, 200] {
        let server = Canned::new(&[(200, STATUS)]);
        let mut command = site.bare(TOMBOLA, &["status", "--url", &server.url]);
        command.env("COLUMNS", columns.to_string());
        let shown = run(command).await.stdout;
        server.heads();
        let longest = shown.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= columns, "{columns}:\n{shown}");
        assert!(shown.lines().any(|line| line.starts_with("float_shard_0.db")), "{shown}");
        assert!(columns < 60 || shown.contains("1,234,567  █"), "{columns}:\n{shown}");
        assert!(!shown.contains('\x1b'), "colours without a terminal:\n{shown}");
    }
}

/// The console understands the status of a real server.
#[tokio::test]
async fn status_reads_what_a_server_says() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    server.take("int", Some(300)).await;
    let url = format!("http://{}", server.address());
    let shown = run(site.bare(TOMBOLA, &["status", "--url", &url])).await;
    assert_eq!((shown.status.code(), &*shown.stderr), (Some(0), ""));
    for part in ["int: ok, 1 to 1000", "int_shard_0.db", "in rotation", "200: 1", "in all"] {
        assert!(shown.stdout.contains(part), "no {part:?} in\n{}", shown.stdout);
    }
    server.stop().await;

    let lower = Site::new(&config().set("server.mode", "'json'"));
    let server = lower.start().await;
    let url = format!("http://{}", server.address());
    let shown = run(lower.bare(TOMBOLA, &["status", "--url", &url])).await;
    assert_eq!(shown.status.code(), Some(4), "{}", shown.stderr);
    assert!(shown.stderr.contains("mode sharded"), "{}", shown.stderr);
    server.stop().await;
}

#[tokio::test]
async fn status_passes_json_on_and_refuses_what_is_none() {
    let site = Site::new(&config());
    let shown = status_of(&site, (200, STATUS), &["--json"]).await;
    assert_eq!(shown.stdout, STATUS);
    for (answer, code, parts) in [
        ((401, "{}"), 1, &["token", "observe", "--token-file", "TOMBOLA_TOKEN"][..]),
        ((403, "{}"), 1, &["observe"]),
        ((404, "{}"), 4, &["/status", "sharded"]),
        ((500, "no\x1b[31m"), 1, &["500: no[31m"]),
        ((200, "<html>"), 4, &["is not a /status", "--url"]),
        ((200, "{}"), 4, &["version"]),
    ] {
        let shown = status_of(&site, answer, &[]).await;
        assert_eq!(shown.status.code(), Some(code), "{answer:?}: {}", shown.stderr);
        for part in parts {
            assert!(shown.stderr.contains(part), "{answer:?} gave {:?}", shown.stderr);
        }
    }
}

#[tokio::test]
async fn status_shows_the_token_that_it_was_given() {
    let site = Site::new(&config());
    std::fs::write(site.folder().join("token"), "tombola_file\n").unwrap();
    for (flags, variable, expected) in [
        (&[][..], None, None),
        (&[], Some("tombola_variable"), Some("Bearer tombola_variable")),
        (&["--token-file", "token"], Some("tombola_variable"), Some("Bearer tombola_file")),
    ] {
        let server = Canned::new(&[(200, STATUS)]);
        let mut command = site.bare(TOMBOLA, &["status", "--url", &server.url]);
        command.args(flags).envs(variable.map(|text| ("TOMBOLA_TOKEN", text)));
        assert_eq!(run(command).await.status.code(), Some(0));
        let head = server.heads().remove(0);
        let found = head.lines().find_map(|line| line.strip_prefix("authorization: "));
        assert_eq!(found, expected, "{head}");
    }
    let mut command = site.bare(TOMBOLA, &["status", "--url", &nobody()]);
    command.env("TOMBOLA_TOKEN", "two words");
    let finished = run(command).await;
    assert_eq!(finished.status.code(), Some(2));
    let stderr = finished.stderr;
    assert!(stderr.contains("TOMBOLA_TOKEN: ") && !stderr.contains("two"), "{stderr}");
}

#[tokio::test]
async fn watching_outlives_the_server_and_ends_on_ctrl_c() {
    let site = Site::new(&config());
    let server = Canned::new(&[(200, STATUS), (200, &STATUS.replace("1200,", "77,"))]);
    let command = site.bare(TOMBOLA, &["status", "--watch", "--url", &server.url]);
    let mut process = Process::spawn(command);
    process.prints("1,200 connections").await;
    process.prints("77 connections").await;
    process.prints("does not respond").await;
    assert!(process.is_running());
    process.signal(Signal::SIGINT);
    let finished = process.finish().await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    assert_eq!(server.heads().len(), 2);
}

#[tokio::test]
async fn health_is_an_exit_code() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let url = format!("http://{}", server.address());
    let finished = run(site.bare(TOMBOLA, &["health", "--url", &url])).await;
    assert_eq!((finished.status.code(), &*finished.stdout), (Some(0), "ok\n"));
    server.stop().await;

    let down = (503, r#"{"status":"down","pools":{"int":{"reason":"why"}}}"#);
    let unready = (503, r#"{"ready":false,"pools":{"int":false}}"#);
    // Another pool serves, or all are used up.
    let server = Canned::new(&[down, (200, r#"{"ready":true,"pools":{"int":false}}"#)]);
    let finished = run(site.bare(TOMBOLA, &["health", "--url", &server.url])).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    assert!(finished.stdout.contains("ready") && finished.stdout.contains("why"));
    assert!(server.heads()[1].starts_with("GET /ready "));
    for (answers, code, part) in
        [(&[down, unready][..], 1, "why"), (&[(200, "<html>")], 4, "not the /health")]
    {
        let server = Canned::new(answers);
        let finished = run(site.bare(TOMBOLA, &["health", "--url", &server.url])).await;
        assert_eq!(finished.status.code(), Some(code), "{}", finished.stderr);
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
        server.heads();
    }

    // JSON can't contain a literal ESC. It can contain U+009B, which terminals interpret as ESC [.
    let long = format!("{{\"status\":\"down\",\n\"pools\":\"\u{9b}31m{}\"}}", "x".repeat(1_000));
    let server = Canned::new(&[(503, &long), unready]);
    let finished = run(site.bare(TOMBOLA, &["health", "--url", &server.url])).await;
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    let said = finished.stderr.trim_end();
    assert!(said.contains(r#""down","pools":"31mxxx"#), "{said}");
    assert!(!said.contains(char::is_control) && said.len() < 400, "{said}");
    server.heads();
}

#[tokio::test]
async fn a_server_with_a_certificate_is_asked_by_its_name() {
    let config = config().set("server.tls.cert", "'cert.pem'").set("server.tls.key", "'key.pem'");
    let site = Site::new(&config);
    let pair = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(site.folder().join("cert.pem"), pair.cert.pem()).unwrap();
    std::fs::write(site.folder().join("key.pem"), pair.signing_key.serialize_pem()).unwrap();
    let other = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(site.folder().join("other.pem"), other.cert.pem()).unwrap();
    site.fill().await;
    let server = site.start().await;
    let port = server.address().rsplit_once(':').unwrap().1.to_owned();
    let check = async |url: String, ca: &[&str], code: i32, parts: &[&str]| {
        let mut command = site.bare(TOMBOLA, &["health", "--url", &url]);
        command.args(ca);
        let Finished { status, stdout, stderr } = run(command).await;
        assert_eq!(status.code(), Some(code), "{url} {ca:?}: {stderr}");
        for part in parts {
            assert!((stdout.clone() + &stderr).contains(part), "{url} {ca:?}: {stderr}");
        }
    };
    let named = format!("https://localhost:{port}");
    check(named.clone(), &["--ca", "cert.pem"], 0, &["ok"]).await;
    check(named.clone(), &["--ca", "other.pem"], 4, &["certificate", "--ca"]).await;
    check(named.clone(), &[], 2, &["--ca FILE"]).await;
    check(named, &["--ca", "key.pem"], 2, &["key.pem", "no certificate"]).await;
    let unnamed = format!("https://127.0.0.1:{port}");
    check(unnamed, &["--ca", "cert.pem"], 4, &["127.0.0.1", "--url has to name"]).await;
    check(format!("http://127.0.0.1:{port}"), &[], 4, &["https://"]).await;
    server.stop().await;
}

/// All commands.
const COMMANDS: [&str; 15] = [
    "serve",
    "check-config",
    "draw",
    "status",
    "reload",
    "health",
    "token",
    "fleet",
    "backup",
    "verify",
    "export",
    "import",
    "receipts",
    "completions",
    "man",
];

#[tokio::test]
async fn shells_complete_every_command() {
    let site = Site::new(&config());
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = run(site.bare(TOMBOLA, &["completions", shell])).await.stdout;
        for word in COMMANDS.into_iter().chain(["--watch", "--token-file"]) {
            let word = if shell == "fish" { word.trim_start_matches("--") } else { word };
            assert!(script.contains(word), "{shell} knows no {word}");
        }
        if shell == "bash" {
            let path = site.folder().join("tombola.bash");
            std::fs::write(&path, &script).unwrap();
            let finished = run(complete_in_bash(&path)).await;
            assert_eq!(finished.stdout, "status\n", "{}", finished.stderr);
        }
    }
    let unknown = run(site.bare(TOMBOLA, &["completions", "cmd"])).await;
    assert_eq!(unknown.status.code(), Some(2), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("zsh"), "{}", unknown.stderr);
}

/// Returns a command that lets bash complete `tombola stat<Tab>`.
fn complete_in_bash(script: &Path) -> Command {
    let mut command = Command::new("bash");
    command.args(["--norc", "-c"]).arg(format!(
        "source '{}'; COMP_WORDS=(tombola stat); COMP_CWORD=1; _tombola tombola stat tombola; \
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display()
    ));
    command
}

#[tokio::test]
async fn man_has_a_page_for_every_command() {
    let site = Site::new(&config());
    let page = run(site.bare(TOMBOLA, &["man"])).await.stdout;
    assert!(page.contains(".TH tombola 1"), "{page}");
    for part in ["Exit codes", "3  the data folder", "TOMBOLA_SERVER"] {
        assert!(page.contains(part), "no {part:?} in\n{page}");
    }
    let finished = run(site.bare(TOMBOLA, &["man", "--dir", "pages"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    for command in COMMANDS.into_iter().chain(["token-new"]) {
        let path = site.folder().join(format!("pages/tombola-{command}.1"));
        let page = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{command}: {e}"));
        assert!(page.contains(&format!("tombola-{command}").replace('-', "\\-")), "{page}");
    }
    assert!(site.folder().join("pages/tombola.1").exists());
}
