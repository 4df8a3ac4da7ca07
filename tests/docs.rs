//! The documents are correct: their links lead somewhere, the reference of the settings is complete, and the
//! example clients work.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use support::{Config, Site, skipped};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Returns the paths of the documents.
fn documents() -> Vec<PathBuf> {
    let docs = std::fs::read_dir(root().join("docs")).unwrap();
    let mut files: Vec<_> = docs
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    files.extend(["README.md", "CHANGELOG.md", "fuzz/README.md"].map(|file| root().join(file)));
    files
}

/// Returns the text without its code blocks.
fn prose(text: &str) -> String {
    let mut in_block = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        in_block ^= fence;
        !in_block && !fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the anchors of a document's headings, as Markdown renderers derive them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text);
    let headings = headings.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.collect::<String>().replace(' ', "-")
        })
        .collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut dead = Vec::new();
    let mut links = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in prose(&text).split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            links += 1;
            // A test can't ask other hosts, so a link to one is not followed.
            if link.starts_with("https://") || link.starts_with("http://127.0.0.1:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => document.clone(),
                file => document.parent().unwrap().join(file),
            };
            let there = target.exists()
                && (anchor.is_empty()
                    || anchors(&std::fs::read_to_string(&target).unwrap()).contains(anchor));
            if !there {
                dead.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(links > 20, "only {links} links were found");
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

/// Each key of `config.toml`, including those commented out, is in the reference, and each key in the
/// reference exists.
#[test]
fn the_reference_has_every_setting() {
    let mut keys = BTreeSet::new();
    let mut table = String::new();
    for line in read("config.toml").lines() {
        let line = line.trim_start_matches(['#', ' ']);
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.split(']').next()) {
            table = name.trim_start_matches('[').to_owned();
        } else if let Some((key, _)) = line.split_once(" = ")
            && key.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
        {
            let table = match table.as_str() {
                "pools.int" | "pools.float" | "pools.voucher" => "pools.NAME",
                table => table,
            };
            keys.insert(format!("{table}.{key}"));
        }
    }
    let mut described = BTreeSet::new();
    let reference = read("docs/configuration.md");
    let rows = reference.lines().skip_while(|line| !line.starts_with("| key |")).skip(2);
    for row in rows.take_while(|line| line.starts_with('|')) {
        let mut table = String::new();
        // A cell names one key, or several of one table: `pools.NAME.min`, `max`.
        for name in row.split('|').nth(1).unwrap().split(", ") {
            let name = name.trim().trim_matches('`');
            let key = match name.rsplit_once('.') {
                Some((of, key)) => {
                    of.clone_into(&mut table);
                    key
                }
                None => name,
            };
            described.insert(format!("{table}.{key}"));
        }
    }
    assert_eq!(keys, described);
}

/// Starts a server for `requests` requests. It responds to the first one with 503 and `Retry-After: 1`, and
/// to all others with the body `then`; if `then` is "exhausted", it responds to the first one with 410.
/// Returns its URL, and a thread that returns the time and the head of each request.
fn stub(
    then: &'static str,
    requests: usize,
) -> (String, thread::JoinHandle<Vec<(Instant, String)>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let serve = move || {
        let mut seen = Vec::new();
        for number in 0..requests {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<_> =
                lines.map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
            seen.push((Instant::now(), head.join("\n")));
            let busy = "{\"error\":\"Please retry.\",\"code\":\"refilling\"}";
            let (status, body) = match (number, then) {
                (0, "exhausted") => ("410 Gone", "{\"error\":\"used up\",\"code\":\"exhausted\"}"),
                (0, _) => ("503 Service Unavailable\r\nretry-after: 1", busy),
                _ => ("200 OK", then),
            };
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            )
            .unwrap();
        }
        seen
    };
    (url, thread::spawn(serve))
}

/// Returns the command of each client whose interpreter is installed.
fn clients() -> Vec<(&'static str, Vec<PathBuf>)> {
    let docs = root().join("docs/clients");
    let tests = std::env::current_exe().unwrap();
    let example = tests.parent().unwrap().parent().unwrap().join("examples/random");
    assert!(example.exists(), "build it first: cargo build --example random");
    [
        ("curl", vec!["sh".into(), docs.join("random.sh")]),
        ("python3", vec!["python3".into(), docs.join("random_number.py")]),
        ("node", vec!["node".into(), docs.join("random.mjs")]),
        ("", vec![example]),
    ]
    .into_iter()
    .filter(|(needs, _)| {
        let here = needs.is_empty() || Command::new(needs).arg("--version").output().is_ok();
        if !here {
            skipped(&format!("the client for {needs}, which is not installed"));
        }
        here
    })
    .collect()
}

fn run(command: &[PathBuf], url: &str) -> Output {
    Command::new(&command[0])
        .args(&command[1..])
        .args([url, "float"])
        .env("TOMBOLA_TOKEN", "tombola_test")
        .output()
        .unwrap()
}

#[test]
fn each_client_prints_a_code_as_it_is() {
    for (name, command) in clients() {
        let (url, served) = stub("{\"code\":\"A-007\",\"shard\":\"float_shard_0.db\"}", 2);
        let output = run(&command, &url);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "A-007\n", "{name}: {complaint}");
        served.join().unwrap();
    }
}

/// Story: a client got a 503, sent its request again with a new key, and the server took two numbers.
#[test]
fn each_client_waits_as_long_as_it_is_told_and_keeps_its_key() {
    let mut keys = BTreeSet::new();
    let clients = clients();
    for (name, command) in &clients {
        let (url, served) = stub("{\"number\":5.100000,\"shard\":\"float_shard_0.db\"}", 2);
        let output = run(command, &url);
        let said = String::from_utf8(output.stdout).unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, "5.100000\n", "{name}: {complaint}");
        let seen = served.join().unwrap();
        let waited = seen[1].0 - seen[0].0;
        assert!(waited >= Duration::from_millis(990), "{name} retried after {waited:?}");
        let mut sent = BTreeSet::new();
        for (_, head) in seen {
            assert!(head.starts_with("POST /random?type=float HTTP/1.1"), "{name}: {head}");
            let head = head.to_lowercase();
            assert!(head.contains("authorization: bearer tombola_test"), "{name}: {head}");
            let key = head.lines().find_map(|line| line.strip_prefix("idempotency-key: "));
            let key = key.unwrap_or_else(|| panic!("{name} sent no key: {head}"));
            assert!(key.len() >= 32, "{name} may choose the key {key} twice");
            sent.insert(key.to_owned());
        }
        assert_eq!(sent.len(), 1, "{name} changed its key: {sent:?}");
        keys.append(&mut sent);
    }
    assert_eq!(keys.len(), clients.len());
}

#[test]
fn no_client_asks_again_for_what_is_used_up() {
    for (name, command) in clients() {
        let (url, served) = stub("exhausted", 1);
        let output = run(&command, &url);
        assert!(!output.status.success(), "{name}");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(complaint.contains("exhausted") && output.stdout.is_empty(), "{name}: {complaint}");
        served.join().unwrap();
    }
}

/// Forwards two requests to a server, each on a connection of its own, and drops the first response once it is
/// complete. Returns its URL, and a thread that returns the second response.
fn losing_one(server: &str) -> (String, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = server.to_owned();
    let forward = move || {
        let pass = || {
            let (client, _) = listener.accept().unwrap();
            let mut server = TcpStream::connect(&server).unwrap();
            server.write_all(read_message(&client).as_bytes()).unwrap();
            let response = read_message(&server);
            (client, response)
        };
        drop(pass());
        let (mut client, response) = pass();
        client.write_all(response.as_bytes()).unwrap();
        response
    };
    (url, thread::spawn(forward))
}

/// Reads a request or a response, whose body is as long as `Content-Length` says.
fn read_message(stream: &TcpStream) -> String {
    let mut reader = BufReader::new(stream);
    let (mut message, mut length) = (String::new(), 0);
    while !message.ends_with("\r\n\r\n") {
        let start = message.len();
        assert!(
            reader.read_line(&mut message).unwrap() > 0,
            "the message is incomplete: {message}"
        );
        if let Some(text) = message[start..].to_lowercase().strip_prefix("content-length:") {
            length = text.trim().parse().unwrap();
        }
    }
    reader.take(length).read_to_string(&mut message).unwrap();
    message
}

/// Story: the connection broke after the server had taken a number, and the retry got another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_response_is_lost_gets_the_same_number() {
    let site = Site::new(&Config::new().int_and_float(9_999, 1, 1_000));
    let server = site.start().await;
    server.take("float", None).await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let receipts = format!("http://{}/receipts", server.address());
    for (index, (name, command)) in clients().iter().enumerate() {
        let (url, forwarded) = losing_one(server.address());
        let output = run(command, &url);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {complaint}");
        assert!(forwarded.join().unwrap().contains("idempotent-replayed: true"), "{name}");
        let number = String::from_utf8(output.stdout).unwrap();
        let receipts = http.get(&receipts).send().await.unwrap().text().await.unwrap();
        let last = receipts.lines().next_back().unwrap_or_default();
        assert!(last.contains(&format!("\"numbers\":[{}]", number.trim())), "{name}: {receipts}");
        assert_eq!(receipts.lines().count(), index + 1, "{name} left several receipts: {receipts}");
    }
    server.stop().await;
}
