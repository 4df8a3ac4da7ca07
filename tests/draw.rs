//! `tombola draw`: a file of many numbers, complete and the same after any interruption. Most tests use a stub in
//! place of the server, which responds as the test says; those at the end use the real one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::signal::Signal;
use rcgen::generate_simple_self_signed;
use serde_json::Value;
use support::{
    Config, Finished, Process, Server, Site, Token, eventually, missing, run, skipped, with_tokens,
};

const TOMBOLA: &str = env!("CARGO_BIN_EXE_tombola");

/// The most numbers of a request, as the stub describes itself.
const LIMIT: usize = 10;

/// A request for a chunk.
struct Asked {
    chunk: usize,
    count: usize,
    /// How many requests had the same key before.
    before: usize,
    accept: String,
}

/// The stub's reaction to a request.
enum Reply {
    /// It sends the chunk's numbers.
    Lines,
    /// It sends this text, of this media type.
    Text(&'static str, String),
    /// It sends an error with this code and this `Retry-After`.
    Error(u16, &'static str, Option<u32>),
    /// It closes the connection in the middle of the body.
    Cut,
    /// It sends nothing until the client closes the connection.
    Silence,
}

/// A server that keeps its promise: a key always gets the same numbers. It serves until the test ends.
struct Stub {
    url: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Stub {
    fn new(reply: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (seen, reply) = (Arc::clone(&heads), Arc::new(reply));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, reply) = (Arc::clone(&seen), Arc::clone(&reply));
                // The client may be killed at any moment, which ends its connections.
                thread::spawn(move || serve(&stream.unwrap(), &seen, &*reply));
            }
        });
        Self { url, heads }
    }

    /// Returns the head of each request for a chunk.
    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }

    /// Returns the chunks that were requested, in order.
    fn chunks(&self) -> Vec<usize> {
        let mut chunks: Vec<_> = self.heads().iter().map(|head| chunk_of(head)).collect();
        chunks.sort_unstable();
        chunks
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn chunk_of(head: &str) -> usize {
    let key = header(head, "idempotency-key").unwrap();
    let (_, chunk) = key.strip_suffix('"').unwrap().rsplit_once('/').unwrap();
    chunk.parse().unwrap()
}

fn serve(
    mut stream: &TcpStream,
    seen: &Mutex<Vec<String>>,
    reply: &dyn Fn(&Asked) -> Reply,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if lines.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let send = |mut stream: &TcpStream, head: &str, body: &str, sent: usize| {
            let length = body.len();
            let body = &body[..sent];
            let response = format!("HTTP/1.1 {head}\r\ncontent-length: {length}\r\n\r\n{body}");
            // One write, because the second of two would wait for the client's acknowledgement.
            stream.write_all(response.as_bytes())
        };
        if head.starts_with("GET /openapi.json ") {
            let count = format!(r#"{{"name":"count","schema":{{"maximum":{LIMIT}}}}}"#);
            let body = format!(
                r#"{{"paths":{{"/random":{{"get":{{"parameters":[{{"name":"type"}},{count}]}}}}}}}}"#
            );
            send(stream, "200 OK\r\ncontent-type: application/json", &body, body.len())?;
            continue;
        }
        let count = head.split("count=").nth(1).unwrap().split(['&', ' ']).next().unwrap();
        let asked = {
            let mut seen = seen.lock().unwrap();
            let key = header(&head, "idempotency-key");
            let before = seen.iter().filter(|head| header(head, "idempotency-key") == key).count();
            seen.push(head.clone());
            let accept = header(&head, "accept").unwrap().to_owned();
            Asked { chunk: chunk_of(&head), count: count.parse().unwrap(), before, accept }
        };
        let ok = format!("200 OK\r\ncontent-type: {}; charset=utf-8", asked.accept);
        match reply(&asked) {
            Reply::Lines => {
                let body = numbers_of(asked.chunk, asked.count);
                send(stream, &ok, &body, body.len())?;
            }
            Reply::Text(media_type, body) => {
                let head = format!("200 OK\r\ncontent-type: {media_type}");
                send(stream, &head, &body, body.len())?;
            }
            Reply::Error(status, code, retry_after) => {
                let after = retry_after.map(|seconds| format!("\r\nretry-after: {seconds}"));
                let body = format!(r#"{{"error":"It is {code}.","code":"{code}"}}"#);
                let head = format!("{status} No{}", after.unwrap_or_default());
                send(stream, &head, &body, body.len())?;
            }
            Reply::Cut => {
                let body = numbers_of(asked.chunk, asked.count);
                return send(stream, &ok, &body, body.len() / 2);
            }
            Reply::Silence => {
                stream.read_to_end(&mut Vec::new())?;
                return Ok(());
            }
        }
    }
}

/// Returns the lines of a chunk of the stub.
fn numbers_of(chunk: usize, count: usize) -> String {
    (0..count).map(|number| format!("{}\n", chunk * 1_000 + number)).collect()
}

/// Returns the file of a draw of the stub's numbers.
fn expected(count: usize) -> String {
    (1..=count.div_ceil(LIMIT))
        .map(|chunk| numbers_of(chunk, LIMIT.min(count - (chunk - 1) * LIMIT)))
        .collect()
}

fn site() -> Site {
    Site::new(&Config::new().pool("int", 1, 1_000, 1, 500))
}

/// Returns the command that draws `count` numbers under the key `spring26` into a file.
fn draw(site: &Site, url: &str, count: usize, out: &str, more: &[&str]) -> Command {
    draw_of(site, url, ("int", "spring26"), count, out, more)
}

/// Returns the same for another pool and key.
fn draw_of(
    site: &Site,
    url: &str,
    (pool, key): (&str, &str),
    count: usize,
    out: &str,
    more: &[&str],
) -> Command {
    let count = count.to_string();
    let mut command = site.bare(TOMBOLA, &["draw", "--url", url, "--pool", pool, "--key", key]);
    command.args(["--count", &count, "--out", out]).args(more);
    command
}

/// Runs a command that has to end with this exit code, and returns its stderr.
async fn ends(command: Command, code: i32) -> String {
    let shown = format!("{command:?}");
    let Finished { status, stdout, stderr } = run(command).await;
    assert_eq!(status.code(), Some(code), "{shown}\n{stdout}\n{stderr}");
    stderr
}

fn read(site: &Site, name: &str) -> String {
    let path = site.folder().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Fails unless two files are the same.
fn assert_same(site: &Site, one: &str, other: &str) {
    let contents = [read(site, one), read(site, other)];
    let [one_lines, other_lines] = contents.each_ref().map(|content| content.lines());
    let different = one_lines.zip(other_lines).position(|(line, other)| line != other);
    assert_eq!(different, None, "the first line in which {one} and {other} differ");
    assert_eq!(contents[0].len(), contents[1].len(), "{one} and {other}");
}

/// Returns the names of the files that a draw left.
fn files(site: &Site) -> Vec<String> {
    let names = std::fs::read_dir(site.folder()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.contains("codes")).collect();
    names.sort();
    names
}

/// Waits until the file has this many bytes.
async fn has_bytes(path: &Path, bytes: usize) {
    eventually("bytes in the file", async || {
        let found = std::fs::metadata(path).map_or(0, |found| found.len());
        (found >= bytes as u64).then_some(())
    })
    .await;
}

#[tokio::test]
async fn each_chunk_is_a_request_with_a_key_of_its_own() {
    let (site, stub) = (site(), Stub::new(|_| Reply::Lines));
    let mut command = draw(&site, &stub.url, 25, "codes.csv", &["--label", "spring & co"]);
    command.env("TOMBOLA_TOKEN", "tombola_test");
    let stderr = ends(command, 0).await;
    assert!(stderr.starts_with("codes.csv is complete: 25 drawn from int in "), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert_eq!(read(&site, "codes.csv"), expected(25));
    assert_eq!(files(&site), ["codes.csv", "codes.csv.draw"]);
    for name in files(&site) {
        let mode = std::fs::metadata(site.folder().join(&name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let mut heads = stub.heads();
    heads.sort_by_key(|head| chunk_of(head));
    assert_eq!(heads.len(), 3);
    for (head, (chunk, count)) in heads.iter().zip([(1, 10), (2, 10), (3, 5)]) {
        assert_eq!(header(head, "idempotency-key"), Some(&*format!("\"spring26/{chunk}\"")));
        let target = format!("/random?type=int&count={count}&label=spring+%26+co");
        assert!(head.starts_with(&format!("POST {target} HTTP/1.1\r\n")), "{head}");
        assert_eq!(header(head, "accept"), Some("text/csv"));
        assert_eq!(header(head, "authorization"), Some("Bearer tombola_test"));
    }
    let record: Value = serde_json::from_str(&read(&site, "codes.csv.draw")).unwrap();
    for (name, value) in [
        ("pool", Value::from("int")),
        ("count", 25.into()),
        ("key", "spring26".into()),
        ("label", "spring & co".into()),
        ("format", "csv".into()),
        ("chunk", 10.into()),
        ("chunks", 3.into()),
        ("bytes", expected(25).len().into()),
    ] {
        assert_eq!(record[name], value, "{record}");
    }
}

#[tokio::test]
async fn the_format_is_that_of_the_files_name_unless_a_flag_says_another() {
    let (site, stub) = (site(), Stub::new(|_| Reply::Lines));
    let array = format!("[\n{}\n]\n", expected(25).trim_end().replace('\n', ",\n"));
    assert_eq!(serde_json::from_str::<Vec<u32>>(&array).unwrap().len(), 25);
    for (out, flags, content, accept) in [
        ("codes.csv", &[][..], &expected(25), "text/csv"),
        ("codes.txt", &[], &expected(25), "text/csv"),
        ("codes.ndjson", &[], &expected(25), "application/x-ndjson"),
        ("codes.json", &[], &array, "application/x-ndjson"),
        ("codes", &["--format", "json"], &array, "application/x-ndjson"),
        ("-", &[], &expected(25), "text/csv"),
        ("-", &["--format", "json"], &array, "application/x-ndjson"),
    ] {
        let before = stub.heads().len();
        let finished = run(draw(&site, &stub.url, 25, out, flags)).await;
        assert_eq!(finished.status.code(), Some(0), "{out} {flags:?}: {}", finished.stderr);
        let written = match out {
            "-" => finished.stdout,
            out => read(&site, out),
        };
        assert_eq!(written, *content, "{out} {flags:?}");
        for head in &stub.heads()[before..] {
            assert_eq!(header(head, "accept"), Some(accept), "{out} {flags:?}");
        }
    }
}

/// Story: a deployment restarted the server in the middle of a draw of an hour, and it had to begin again.
#[tokio::test]
async fn a_request_that_may_succeed_later_is_repeated_with_its_key() {
    let (site, stub) = (
        site(),
        Stub::new(|asked| match asked.before {
            0 => Reply::Cut,
            1 => Reply::Error(503, "refilling", Some(0)),
            2 => Reply::Error(429, "over_quota", Some(0)),
            3 => Reply::Error(502, "proxy", Some(0)),
            _ => Reply::Lines,
        }),
    );
    ends(draw(&site, &stub.url, 25, "codes.csv", &[]), 0).await;
    assert_eq!(read(&site, "codes.csv"), expected(25));
    let times = stub.chunks().into_iter().fold(BTreeMap::new(), |mut times, chunk| {
        *times.entry(chunk).or_insert(0) += 1;
        times
    });
    assert_eq!(times, BTreeMap::from([(1, 5), (2, 5), (3, 5)]));
}

#[tokio::test]
async fn a_draw_without_progress_ends_when_the_patience_does() {
    let site = site();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = format!("http://{nobody}");
    let stderr = ends(draw(&site, &nobody, 25, "codes.csv", &["--patience", "0"]), 4).await;
    assert!(stderr.contains("refused") && stderr.contains("--url"), "{stderr}");
    assert_eq!(files(&site), Vec::<String>::new());

    // The first chunk has numbers, the others don't.
    let stub = Stub::new(|asked| match asked.chunk {
        1 => Reply::Lines,
        _ => Reply::Error(503, "refilling", Some(3_600)),
    });
    let stderr = ends(draw(&site, &stub.url, 25, "codes.csv", &[]), 1).await;
    for part in ["503 refilling: It is refilling", "15 of 25 numbers are missing"] {
        assert!(stderr.contains(part), "{stderr}");
    }
    assert_eq!(read(&site, "codes.csv.partial"), expected(10));
}

#[tokio::test]
async fn a_refusal_ends_a_draw_at_once_with_the_servers_words() {
    for (status, code, exit) in [
        (400, "keys_off", 2),
        (400, "key_needs_post", 2),
        (422, "key_reused", 2),
        (401, "unauthorized", 1),
        (403, "forbidden", 1),
        (410, "exhausted", 1),
        (500, "internal", 1),
    ] {
        let site = site();
        let stub = Stub::new(move |asked| match asked.chunk {
            1 | 2 => Reply::Lines,
            _ => Reply::Error(status, code, None),
        });
        let stderr = ends(draw(&site, &stub.url, 45, "codes.csv", &[]), exit).await;
        assert!(stderr.contains(&format!("{status} {code}: It is {code}.")[..9]), "{stderr}");
        assert!(stderr.contains(&format!("It is {code}")), "{stderr}");
        let is_token = matches!(status, 401 | 403);
        assert_eq!(stderr.contains("--token-file"), is_token, "{stderr}");
        assert_eq!(stderr.contains("25 of 45 numbers are missing"), exit == 1, "{stderr}");
        let chunks = stub.chunks();
        assert!(chunks.iter().collect::<BTreeSet<_>>().len() == chunks.len(), "{chunks:?}");
        assert_eq!(read(&site, "codes.csv.partial"), expected(20));
        assert_eq!(files(&site), ["codes.csv.draw", "codes.csv.partial"]);
    }
}

/// Story: a proxy cut a response short and closed its body properly, and a draw lacked 40 codes.
#[tokio::test]
async fn a_response_that_is_not_the_chunk_is_not_written() {
    for (media_type, body, words) in [
        ("text/csv", numbers_of(2, 9), "9 lines instead of 10"),
        ("text/csv", numbers_of(2, 11), "11 lines instead of 10"),
        ("text/csv", format!("{}1", numbers_of(2, 10)), "10 lines instead of 10"),
        ("text/csv", String::new(), "0 lines"),
        ("application/json", numbers_of(2, 10), "application/json"),
    ] {
        let site = site();
        let stub = Stub::new(move |asked| match asked.chunk {
            2 => Reply::Text(media_type, body.clone()),
            _ => Reply::Lines,
        });
        let stderr = ends(draw(&site, &stub.url, 25, "codes.csv", &[]), 1).await;
        assert!(stderr.contains("chunk 2 is wrong") && stderr.contains(words), "{stderr}");
        assert_eq!(read(&site, "codes.csv.partial"), expected(10));
    }
}

/// Story: a draw was stopped with Ctrl-C, and its second run wrote the first codes once more at the end of the
/// file.
#[tokio::test]
async fn a_draw_that_was_interrupted_continues() {
    for (signal, code) in
        [(Signal::SIGINT, Some(130)), (Signal::SIGTERM, Some(130)), (Signal::SIGKILL, None)]
    {
        for out in ["codes.csv", "codes.json"] {
            let site = site();
            let stub = Stub::new(|asked| match (asked.chunk, asked.before) {
                (5, 0) => Reply::Silence,
                _ => Reply::Lines,
            });
            let array = format!("[\n{}\n]\n", expected(95).trim_end().replace('\n', ",\n"));
            let (whole, begun) = match out {
                "codes.csv" => (expected(95), expected(40).len()),
                _ => (array, "[\n".len() + expected(40).len() + 40 - 2),
            };
            let mut process = Process::spawn(draw(&site, &stub.url, 95, out, &[]));
            has_bytes(&site.folder().join(format!("{out}.partial")), begun).await;
            process.signal(signal);
            let Finished { status, stderr, .. } = process.finish().await;
            assert_eq!(status.code(), code, "{stderr}");
            if code.is_some() {
                assert!(stderr.contains("55 of 95 numbers are missing"), "{stderr}");
                assert!(stderr.contains("the same command continues"), "{stderr}");
            }
            let before = stub.heads().len();
            ends(draw(&site, &stub.url, 95, out, &[]), 0).await;
            assert_eq!(read(&site, out), whole, "{signal}");
            assert_eq!(files(&site), [out.to_owned(), format!("{out}.draw")]);
            if code.is_some() {
                let again = stub.heads()[before..].iter().map(|head| chunk_of(head)).min();
                assert_eq!(again, Some(5), "complete chunks are kept");
            }
        }
    }
}

/// Returns a site on which a draw of 45 numbers has written two chunks.
async fn half_drawn() -> Site {
    let site = site();
    let stub = Stub::new(|asked| match asked.chunk {
        1 | 2 => Reply::Lines,
        _ => Reply::Error(410, "exhausted", None),
    });
    ends(draw(&site, &stub.url, 45, "codes.csv", &[]), 1).await;
    assert_eq!(read(&site, "codes.csv.partial"), expected(20));
    site
}

/// Story: after a power loss the end of the partial file was zeros, and the rerun kept them.
#[tokio::test]
async fn a_partial_file_is_only_kept_as_far_as_it_is_intact() {
    let stub = Stub::new(|_| Reply::Lines);
    let whole = expected(20);
    for (content, first_drawn) in [
        (whole.clone(), 3),
        // More than is recorded, up to the middle of a line.
        (whole.clone() + "3000\n30", 3),
        // Less than is recorded, other content, or nothing.
        (whole[..whole.len() - 1].to_owned(), 1),
        (whole.replacen('1', "7", 1), 1),
        (whole[..50].to_owned() + &"\0".repeat(whole.len() - 50), 1),
        (String::new(), 1),
    ] {
        let site = half_drawn().await;
        std::fs::write(site.folder().join("codes.csv.partial"), &content).unwrap();
        let before = stub.heads().len();
        ends(draw(&site, &stub.url, 45, "codes.csv", &[]), 0).await;
        assert_eq!(read(&site, "codes.csv"), expected(45), "{content:?}");
        let drawn = stub.heads()[before..].iter().map(|head| chunk_of(head)).min();
        assert_eq!(drawn, Some(first_drawn), "{content:?}");
    }
    // A crash between the last record and the new name.
    let site = half_drawn().await;
    ends(draw(&site, &stub.url, 45, "codes.csv", &[]), 0).await;
    let path = |name: &str| site.folder().join(name);
    std::fs::rename(path("codes.csv"), path("codes.csv.partial")).unwrap();
    let before = stub.heads().len();
    ends(draw(&site, &stub.url, 45, "codes.csv", &[]), 0).await;
    assert_eq!(read(&site, "codes.csv"), expected(45));
    assert_eq!(stub.heads().len(), before, "nothing is drawn again");
}

/// Story: the codes of spring were overwritten by those of summer.
#[tokio::test]
async fn a_file_of_anything_else_is_refused_and_unchanged() {
    let stub = Stub::new(|_| Reply::Lines);
    let refused = async |site: &Site, command: Command, words: &str| {
        let before: Vec<_> = files(site).iter().map(|name| read(site, name)).collect();
        let heads = stub.heads().len();
        let stderr = ends(command, 2).await;
        for part in [words, "--out"] {
            assert!(stderr.contains(part), "{part} is not in {stderr}");
        }
        let after: Vec<_> = files(site).iter().map(|name| read(site, name)).collect();
        assert_eq!(after, before, "{words}");
        assert_eq!(stub.heads().len(), heads, "{words}");
    };
    let with = |site: &Site, more: &[&str]| draw(site, &stub.url, 45, "codes.csv", more);

    let finished = site();
    ends(with(&finished, &[]), 0).await;
    // The finished file of the same draw is complete already.
    let heads = stub.heads().len();
    let stderr = ends(with(&finished, &[]), 0).await;
    assert_eq!(stderr, "codes.csv is complete already: 45 drawn from int\n");
    assert_eq!(stub.heads().len(), heads);

    for site in [&finished, &half_drawn().await] {
        for (flags, words) in [
            (&["--chunk", "9"][..], "chunk was 10, not 9"),
            (&["--format", "ndjson"], "format was \"csv\", not \"ndjson\""),
            (&["--label", "x"], "label was null, not \"x\""),
        ] {
            refused(site, with(site, flags), words).await;
        }
        let other = draw(site, &stub.url, 46, "codes.csv", &[]);
        refused(site, other, "count was 45, not 46").await;
        let other = draw_of(site, &stub.url, ("float", "summer26"), 45, "codes.csv", &[]);
        refused(site, other, "another draw").await;
    }

    let path = |site: &Site, name: &str| site.folder().join(name);
    // A file that was edited, one without a record, and a record that is none.
    let content = read(&finished, "codes.csv");
    std::fs::write(path(&finished, "codes.csv"), content.clone() + "1\n").unwrap();
    refused(&finished, with(&finished, &[]), "is not what this draw has written").await;
    std::fs::write(path(&finished, "codes.csv"), content.replacen('1', "7", 1)).unwrap();
    refused(&finished, with(&finished, &[]), "is not what this draw has written").await;
    std::fs::remove_file(path(&finished, "codes.csv.draw")).unwrap();
    refused(&finished, with(&finished, &[]), "no draw is recorded").await;
    std::fs::write(path(&finished, "codes.csv.draw"), "{}").unwrap();
    refused(&finished, with(&finished, &[]), "is not the record of a draw").await;
    let half = half_drawn().await;
    std::fs::remove_file(path(&half, "codes.csv.draw")).unwrap();
    refused(&half, with(&half, &[]), "codes.csv.partial exists, and no draw is recorded").await;
    // A file that appeared while the draw was interrupted.
    let half = half_drawn().await;
    std::fs::write(path(&half, "codes.csv"), "mine\n").unwrap();
    refused(&half, with(&half, &[]), "is not what this draw has written").await;
    // Once it is moved away, the draw continues.
    std::fs::remove_file(path(&half, "codes.csv")).unwrap();
    ends(with(&half, &[]), 0).await;
    assert_eq!(read(&half, "codes.csv"), expected(45));
}

#[tokio::test]
async fn two_processes_do_not_write_one_file() {
    let (site, stub) = (site(), Stub::new(|_| Reply::Silence));
    let first = Process::spawn(draw(&site, &stub.url, 25, "codes.csv", &[]));
    eventually("a request", async || (!stub.heads().is_empty()).then_some(())).await;
    let stderr = ends(draw(&site, &stub.url, 25, "codes.csv", &[]), 6).await;
    assert!(stderr.contains("another process writes codes.csv.partial"), "{stderr}");
    drop(first);
}

/// Story: between two runs, an operator raised `server.count_limit`, and all keys got 422.
#[tokio::test]
async fn the_chunks_of_a_draw_keep_their_size() {
    let (site, stub) = (site(), Stub::new(|_| Reply::Lines));
    let failing = Stub::new(|asked| match asked.chunk {
        1 => Reply::Lines,
        _ => Reply::Error(410, "exhausted", None),
    });
    ends(draw(&site, &failing.url, 25, "codes.csv", &["--chunk", "4"]), 1).await;
    // The stub would allow 10.
    ends(draw(&site, &stub.url, 25, "codes.csv", &[]), 0).await;
    assert_eq!(stub.chunks(), [2, 3, 4, 5, 6, 7]);
    let counts = stub
        .heads()
        .iter()
        .filter(|head| head.contains("count=4&") || head.contains("count=4 "))
        .count();
    assert_eq!(counts, 5);
    // Also after the file was moved away. The record says nothing about another key.
    for (key, chunks) in [("spring26", 7), ("summer26", 3)] {
        std::fs::remove_file(site.folder().join("codes.csv")).unwrap();
        let before = stub.heads().len();
        ends(draw_of(&site, &stub.url, ("int", key), 25, "codes.csv", &[]), 0).await;
        assert_eq!(stub.heads().len() - before, chunks, "{key}");
    }
    ends(draw(&site, &stub.url, 25, "-", &["--chunk", "30"]), 0).await;
    assert!(stub.heads().last().unwrap().contains("count=25"));
}

#[tokio::test]
async fn flags_are_checked_before_anything_is_drawn() {
    let (site, stub) = (site(), Stub::new(|_| Reply::Lines));
    let long = "k".repeat(254);
    for (count, key, more, words) in [
        ("0", "k", &[][..], "--count"),
        ("1000000001", "k", &[], "--count"),
        ("5", "two words", &[], "--key"),
        ("5", "quo\"te", &[], "--key"),
        ("5", "back\\slash", &[], "--key"),
        ("5", "\u{e9}", &[], "--key"),
        ("5", "", &[], "--key"),
        ("5", &long, &[], "--key is too long"),
        ("5", "k", &["--chunk", "0"], "--chunk"),
        ("5", "k", &["--format", "xml"], "--format"),
    ] {
        let mut command = site.bare(TOMBOLA, &["draw", "--url", &stub.url, "--pool", "int"]);
        command.args(["--count", count, "--key", key, "--out", "codes.csv"]).args(more);
        let stderr = ends(command, 2).await;
        assert!(stderr.contains(words), "{stderr}");
        assert_eq!(files(&site), Vec::<String>::new(), "{words}");
    }
    assert!(stub.heads().is_empty());
}

/// Story: the disk was full at 70 %, and the file looked complete.
#[tokio::test]
async fn a_full_disk_ends_the_draw_and_a_rerun_completes_it() {
    let (site, stub) = (site(), Stub::new(|_| Reply::Lines));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = draw(&site, &stub.url, 25, "-", &[]);
    let output = command.stdout(full).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in ["standard output: No space left", "25 of 25 numbers are missing", "the beginning"]
    {
        assert!(stderr.contains(part), "{stderr}");
    }

    // A file system of 64 kB in memory, which ends with its script. A file takes up nearly all of it in the
    // first run, and is removed before the second.
    const SCRIPT: &str = "mount -t tmpfs -o size=64k tmpfs small || exit 99
        head -c 40960 /dev/zero > small/filler
        \"$@\"; echo exit $?; ls small/*.partial; rm small/filler
        \"$@\"; echo exit $?; ls small; cp small/codes.csv codes.csv";
    std::fs::create_dir(site.folder().join("small")).unwrap();
    let drawing = draw(&site, &stub.url, 5_000, "small/codes.csv", &[]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(drawing.get_program());
    command.args(drawing.get_args()).current_dir(site.folder());
    let Finished { status, stdout, stderr } = run(command).await;
    if !status.success() && !stdout.contains("exit") {
        return skipped(&format!("a small file system can't be mounted here: {stderr}"));
    }
    let lines: Vec<_> = stdout.lines().collect();
    let first = ["exit 1", "small/codes.csv.partial"];
    let second = ["exit 0", "codes.csv", "codes.csv.draw"];
    assert_eq!(lines, [&first[..], &second].concat(), "{stderr}");
    for part in ["No space left", "of 5,000 numbers are missing"] {
        assert!(stderr.contains(part), "{stderr}");
    }
    assert_eq!(read(&site, "codes.csv"), expected(5_000));
}

/// The last number of the real server's pool.
const LAST: i64 = 5_000_000;

/// Returns the settings of a real server, with a pool that has more numbers than a test draws.
fn config() -> Config {
    Config::new().pool("int", 1, LAST, 2, 20_000).set("server.count_limit", 1_000)
}

fn url(server: &Server) -> String {
    format!("http://{}", server.address())
}

/// Fails unless a file has `count` different numbers of the pool, and returns them.
fn numbers(content: &str, count: usize) -> Vec<String> {
    let numbers: Vec<String> = content.lines().map(str::to_owned).collect();
    assert_eq!(numbers.len(), count);
    missing(&numbers, 1..=LAST);
    numbers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draw_needs_a_token_where_the_server_does_and_speaks_tls() {
    let token = Token::new("shop", "draw").await;
    let pair = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let config = with_tokens(config(), &[&token]);
    let config = config.set("server.tls.cert", "'cert.pem'").set("server.tls.key", "'key.pem'");
    let site = Site::new(&config);
    let write = |name: &str, text: &str| std::fs::write(site.folder().join(name), text).unwrap();
    write("cert.pem", &pair.cert.pem());
    write("key.pem", &pair.signing_key.serialize_pem());
    write("token", &token.text);
    let server = site.start().await;
    let url = format!("https://localhost:{}", server.address().rsplit_once(':').unwrap().1);

    let flags = ["--ca", "cert.pem", "--token-file", "token"];
    let stderr = ends(draw(&site, &url, 10_500, "codes.csv", &flags[..2]), 1).await;
    for part in ["401 unauthorized", "--token-file", "scope draw"] {
        assert!(stderr.contains(part), "{stderr}");
    }
    ends(draw(&site, &url, 10_500, "codes.csv", &flags), 0).await;
    numbers(&read(&site, "codes.csv"), 10_500);
    server.stop().await;
}

/// The range ends in the middle of the draw. Chunks that are requested at the same time may get its end in any
/// order.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_range_keeps_what_was_drawn() {
    let site = Site::new(&config().set("pools.int.max", 950).set("pools.int.shard_size", 475));
    site.fill().await;
    let server = site.start().await;
    let stderr = ends(draw(&site, &url(&server), 2_000, "codes.csv", &["--chunk", "50"]), 1).await;
    let partial = read(&site, "codes.csv.partial");
    let count = partial.lines().count();
    assert!((800..=950).contains(&count), "{count}");
    numbers(&partial, count);
    let missing = format!("1,{:03} of 2,000 numbers are missing", 1_000 - count);
    for part in ["410 exhausted", &missing] {
        assert!(stderr.contains(part), "{stderr}");
    }
    server.stop().await;
}

/// Codes are texts: their leading zeros, quotes and commas are in the file.
#[tokio::test(flavor = "multi_thread")]
async fn codes_are_drawn_as_they_are() {
    let config = Config::new().set("pools.code.pattern", "'0,#'").set("pools.code.shards", 1);
    for (name, expected) in [
        ("codes.csv", "\"0,a\"\n\"0,b\"\n\"0,c\"\n"),
        ("codes.ndjson", "\"0,a\"\n\"0,b\"\n\"0,c\"\n"),
        ("codes.json", "[\n\"0,a\",\n\"0,b\",\n\"0,c\"\n]\n"),
    ] {
        let site = Site::new(
            &config.clone().set("pools.code.alphabet", "'abc'").set("pools.code.shard_size", 3),
        );
        let server = site.start().await;
        let drawing = draw_of(&site, &url(&server), ("code", "spring26"), 3, name, &[]);
        ends(drawing, 0).await;
        let mut lines: Vec<_> = expected.lines().collect();
        let content = read(&site, name);
        let mut found: Vec<_> = content.lines().collect();
        // The comma after the last code of an array is missing, whichever code it is.
        for list in [&mut lines, &mut found] {
            list.iter_mut().for_each(|line| *line = line.trim_end_matches(','));
            list.sort_unstable();
        }
        assert_eq!(found, lines);
        server.stop().await;
    }
}

/// A key promises that a second draw gets the same numbers, in any format.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_has_the_same_numbers_and_another_key_others() {
    let site = Site::new(&config());
    let server = site.start().await;
    let url = url(&server);
    ends(draw(&site, &url, 10_500, "codes.csv", &[]), 0).await;
    let codes = numbers(&read(&site, "codes.csv"), 10_500);
    ends(draw_of(&site, &url, ("int", "summer26"), 10_500, "other.csv", &[]), 0).await;
    let others = numbers(&read(&site, "other.csv"), 10_500);
    missing(&[codes.clone(), others].concat(), 1..=LAST);

    for out in ["again.csv", "again.ndjson"] {
        ends(draw(&site, &url, 10_500, out, &[]), 0).await;
        assert_same(&site, "codes.csv", out);
    }
    ends(draw(&site, &url, 10_500, "again.json", &[]), 0).await;
    let array: Vec<u64> = serde_json::from_str(&read(&site, "again.json")).unwrap();
    assert_eq!(array.iter().map(u64::to_string).collect::<Vec<_>>(), codes);
    let piped = run(draw(&site, &url, 10_500, "-", &[])).await;
    assert!(piped.stdout == read(&site, "codes.csv"), "{}", piped.stderr);

    // The chunks of another size have other counts.
    let stderr = ends(draw(&site, &url, 10_500, "small.csv", &["--chunk", "500"]), 2).await;
    assert!(stderr.contains("422 key_reused"), "{stderr}");
    server.stop().await;
}

/// The numbers of a draw that takes long enough to be interrupted.
const LONG: usize = 300_000;

/// Bytes of the partial file after which a long draw is interrupted, again and again: a tenth of all.
const PART_BYTES: usize = 230_000;

/// Returns the settings of a server that has enough numbers in its shards for long draws.
fn stocked() -> Config {
    config().set("pools.int.shard_size", 400_000)
}

/// Story: a server was updated while a draw ran. The draw waited, and went on with the same server.
#[tokio::test(flavor = "multi_thread")]
async fn a_draw_waits_for_a_server_that_restarts() {
    let site = Site::new(&stocked());
    site.fill().await;
    let mut server = site.start().await;
    // The next servers listen on the same port.
    site.configure(&stocked().set("server.listen", format!("'{}'", server.address())));
    let chunk = ["--chunk", "100"];
    let mut process = Process::spawn(draw(&site, &url(&server), LONG, "codes.csv", &chunk));
    for part in 1..=3 {
        has_bytes(&site.folder().join("codes.csv.partial"), part * PART_BYTES).await;
        match part {
            1 => server.stop().await,
            _ => server.kill().await,
        }
        assert!(process.is_running(), "the draw was too fast to be interrupted");
        server = site.start().await;
    }
    let Finished { status, stderr, .. } = process.finish().await;
    assert_eq!(status.code(), Some(0), "{stderr}");
    numbers(&read(&site, "codes.csv"), LONG);
    ends(draw(&site, &url(&server), LONG, "again.csv", &chunk), 0).await;
    assert_same(&site, "codes.csv", "again.csv");
    server.stop().await;
}

/// Story: the power failed during a draw, on one machine or on the other. The codes of the second run were
/// others, and those of the first were printed already.
#[tokio::test(flavor = "multi_thread")]
async fn a_draw_is_the_same_whichever_process_is_killed() {
    let site = Site::new(&stocked());
    site.fill().await;
    let mut server = site.start().await;
    let flags = ["--chunk", "100", "--patience", "0"];
    for part in 1..=6 {
        let mut process = Process::spawn(draw(&site, &url(&server), LONG, "codes.csv", &flags));
        has_bytes(&site.folder().join("codes.csv.partial"), part * PART_BYTES).await;
        match part % 3 {
            0 => process.signal(Signal::SIGINT),
            1 => process.signal(Signal::SIGKILL),
            _ => {
                server.kill().await;
                server = site.start().await;
            }
        }
        let Finished { status, stderr, .. } = process.finish().await;
        assert!(!status.success(), "the draw was too fast to be interrupted: {stderr}");
    }
    ends(draw(&site, &url(&server), LONG, "codes.csv", &flags), 0).await;
    let codes = numbers(&read(&site, "codes.csv"), LONG);
    ends(draw(&site, &url(&server), LONG, "again.csv", &flags), 0).await;
    assert_same(&site, "codes.csv", "again.csv");

    // No other request gets one of them.
    let mut load = server.load("int", 4, &[Some(1_000)]);
    load.reach(100_000).await;
    server.stop().await;
    missing(&[codes, load.join_numbers().await].concat(), 1..=LAST);
}
