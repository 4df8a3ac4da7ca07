//! Slow, silent and misbehaving clients don't affect the others.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use support::{Config, Failure, PATIENCE, Server, Site, assert_each_once, eventually};

/// The time that a client may keep the server waiting in these tests.
const LIMIT: Duration = Duration::from_millis(500);

/// The server counts in whole milliseconds.
const ROUNDING: Duration = Duration::from_millis(2);

/// The pause between two bytes of a client that sends one at a time, far less than `LIMIT`.
const DRIP: Duration = Duration::from_millis(20);

/// A timeout longer than any test.
const NEVER_MS: u128 = 3_600_000;

fn config(mode: &str, client_timeout_ms: u128) -> Config {
    Config::new()
        .pool("int", 1, 3_000, 2, 1_000)
        .set("server.mode", format!("'{mode}'"))
        .set("server.client_timeout_ms", client_timeout_ms)
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads until the server closes the connection, which it has to do.
fn read_to_end(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(length) => text.extend_from_slice(&part[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("not closed after {PATIENCE:?}: {error}"),
        }
    }
    String::from_utf8(text).unwrap()
}

/// Sends `text` and nothing else, and returns the response.
fn sends(address: &str, text: &str) -> String {
    let mut stream = connect(address);
    stream.write_all(text.as_bytes()).unwrap();
    read_to_end(&mut stream)
}

/// Sends `beginning`, and then `byte` again and again until the connection is closed.
fn drips(address: &str, beginning: &str, byte: &[u8]) {
    let mut stream = connect(address);
    stream.write_all(beginning.as_bytes()).unwrap();
    let begun = Instant::now();
    while stream.write_all(byte).is_ok() {
        assert!(
            begun.elapsed() < PATIENCE,
            "sending a byte now and then keeps the connection open"
        );
        thread::sleep(DRIP);
    }
}

/// Sends requests without end, and reads no response.
fn never_reads(address: &str) {
    let mut stream = connect(address);
    let requests = "GET /nothing HTTP/1.1\r\nhost: [::1]\r\n\r\n".repeat(100);
    let error = loop {
        if let Err(error) = stream.write_all(requests.as_bytes()) {
            break error;
        }
    };
    assert_ne!(error.kind(), ErrorKind::WouldBlock, "not closed after {PATIENCE:?}");
}

/// Reads a response head. Returns it and the length of the body.
fn read_head(stream: &mut TcpStream) -> (String, usize) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.split("content-length: ").nth(1).expect("a Content-Length");
    let length = length.lines().next().unwrap().parse().unwrap();
    (head, length)
}

fn read_answer(stream: &mut TcpStream) -> (String, String) {
    let (head, length) = read_head(stream);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (head, String::from_utf8(body).unwrap())
}

/// Returns the number in the body, whatever else is in it.
fn number(body: &str) -> String {
    let digits = body.split_once(':').unwrap().1;
    digits.chars().take_while(char::is_ascii_digit).collect()
}

type Behaviour = (&'static str, fn(&str));

/// Ways to keep a server waiting. Each starts to wait at once or after one response.
const BEHAVIOURS: [Behaviour; 9] = [
    ("says nothing", |address| assert_eq!(sends(address, ""), "")),
    ("sends half a head", |address| {
        assert_eq!(sends(address, "GET /random HTTP/1.1\r\nhost: "), "");
    }),
    ("sends a head byte by byte", |address| {
        drips(address, "GET /random HTTP/1.1\r\nhost: ", b"x");
    }),
    ("announces a body", |address| {
        let head = "POST /random HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 10\r\n\r\n1234";
        assert_eq!(sends(address, head), "");
    }),
    ("sends a body byte by byte", |address| {
        drips(
            address,
            "POST /random HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 16000\r\n\r\n",
            b"x",
        );
    }),
    ("sends a body in small chunks", |address| {
        let head = "POST /random HTTP/1.1\r\nhost: [::1]\r\ntransfer-encoding: chunked\r\n\r\n";
        drips(address, head, b"1\r\nx\r\n");
    }),
    ("got a response and sends nothing more", |address| {
        let answer = sends(address, "GET /nothing HTTP/1.1\r\nhost: [::1]\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }),
    ("got a response and sends another request byte by byte", |address| {
        drips(address, "GET /nothing HTTP/1.1\r\nhost: [::1]\r\n\r\nGET /", b"x");
    }),
    ("reads no response", never_reads),
];

/// Starts a client for each behaviour. A client fails if its connection is not closed, or closed too early.
fn all_behave(server: &Server, behaviours: &[Behaviour]) -> Vec<JoinHandle<()>> {
    let behave = |&(what, behave): &Behaviour| {
        let address = server.address().to_owned();
        let client = thread::Builder::new().name(what.to_owned());
        let client = client.spawn(move || {
            let begun = Instant::now();
            behave(&address);
            let lasted = begun.elapsed();
            assert!(lasted + ROUNDING >= LIMIT, "cut too early, after {lasted:?}");
        });
        client.unwrap()
    };
    behaviours.iter().map(behave).collect()
}

fn join(clients: Vec<JoinHandle<()>>) {
    let failed: Vec<_> = clients
        .into_iter()
        .filter_map(|client| {
            let what = client.thread().name().unwrap().to_owned();
            client.join().is_err().then_some(what)
        })
        .collect();
    assert!(failed.is_empty(), "a check failed for a client that {failed:?}");
}

/// Story: a handful of clients that sent a byte now and then held all connections.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_cut_and_honest_clients_are_served() {
    for mode in ["sharded", "json", "simple"] {
        let config = config(mode, LIMIT.as_millis()).pool("int", 1, 1_000_000, 2, 10_000);
        let site = Site::new(&config);
        let server = site.start().await;

        let clients = all_behave(&server, &BEHAVIOURS);
        let mut numbers = Vec::new();
        while !clients.iter().all(JoinHandle::is_finished) {
            numbers.extend(server.take("int", None).await);
        }

        join(clients);
        support::missing(&numbers, 1..=1_000_000);
        server.stop().await;
    }
}

/// Story: an endless head or body filled the memory, and a number that was drawn for a request that was then
/// refused was lost.
#[tokio::test(flavor = "multi_thread")]
async fn heads_and_bodies_have_a_limit_and_small_bodies_are_welcome() {
    let site = Site::new(&config("sharded", NEVER_MS));
    site.fill().await;
    let server = site.start().await;
    let address = server.address();
    let begins = |text: &str, expected: &str| {
        let answer = sends(address, text);
        assert!(answer.starts_with(expected), "{answer}");
        answer
    };

    let large = "x".repeat(20_000);
    begins(&format!("GET /random HTTP/1.1\r\nhost: [::1]\r\nx: {large}"), "HTTP/1.1 431");
    begins(&format!("GET /random?{large}"), "HTTP/1.1 431");
    let many = "x: y\r\n".repeat(101);
    begins(&format!("GET /random HTTP/1.1\r\n{many}\r\n"), "HTTP/1.1 431");

    let too_large = |answer: &str| {
        let failure: Failure =
            serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(failure.code, "body_too_large");
        assert!(failure.error.contains("16384 bytes"), "{}", failure.error);
        assert!(answer.to_lowercase().contains("connection: close"), "{answer}");
    };
    let post = "POST /random HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n";
    too_large(&begins(&format!("{post}content-length: 16385\r\n\r\n"), "HTTP/1.1 413"));
    let expecting = format!("{post}content-length: 16385\r\nexpect: 100-continue\r\n\r\n");
    too_large(&begins(&expecting, "HTTP/1.1 413"));
    let chunks = format!("{post}transfer-encoding: chunked\r\n\r\n4001\r\n{}", &large[..16_385]);
    too_large(&begins(&chunks, "HTTP/1.1 413"));

    let mut numbers = Vec::new();
    let mut stream = connect(address);
    for body in ["content-length: 0\r\n\r\n", "content-length: 4\r\n\r\n{  }"] {
        stream.write_all(format!("{post}{body}").as_bytes()).unwrap();
        numbers.push(number(&read_answer(&mut stream).1));
    }
    // The body arrives in a packet of its own, and is larger than the initial size of any buffer.
    stream.write_all(format!("{post}content-length: 16384\r\n\r\n").as_bytes()).unwrap();
    stream.write_all(format!("{{{}}}", " ".repeat(16_382)).as_bytes()).unwrap();
    numbers.push(number(&read_answer(&mut stream).1));

    numbers.extend(server.drain("int", 4, &[Some(100)]).await);
    assert_each_once(&numbers, 1..=3_000);
    server.stop().await;
}

/// Story: an import with a wrong token said that no server had responded. The server closed the connection while the
/// lines were still sent, so the kernel reset it, and the response was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_a_refused_body_to_its_end_gets_the_response() {
    let site = Site::new(&config("sharded", NEVER_MS));
    let server = site.start().await;
    let part = vec![b'x'; 1 << 20];
    let sends = |parts: usize| {
        let mut stream = connect(server.address());
        let length = parts * part.len();
        let head = "POST /random HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n";
        write!(stream, "{head}content-length: {length}\r\n\r\n").unwrap();
        let sent = (0..parts).take_while(|_| stream.write_all(&part).is_ok()).count();
        (sent, stream)
    };
    let (sent, mut stream) = sends(16);
    assert_eq!(sent, 16);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    // There is an end to what the server reads.
    let (sent, _) = sends(1_000);
    assert!((16..100).contains(&sent), "{sent} MiB");
    server.stop().await;
}

/// Story: requests that arrived before the previous response was sent were mixed up or lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_is_answered_in_order() {
    let site = Site::new(&config("sharded", NEVER_MS));
    site.fill().await;
    let server = site.start().await;
    let mut stream = connect(server.address());
    let three = "GET /random HTTP/1.1\r\nhost: [::1]\r\n\r\n\
                 GET /nothing HTTP/1.1\r\nhost: [::1]\r\n\r\n\
                 POST /random HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n\
                 content-length: 4\r\n\r\n{  }";

    stream.write_all(three.repeat(100).as_bytes()).unwrap();
    let mut numbers = Vec::new();
    for _ in 0..100 {
        for expected in ["200", "404", "200"] {
            let (head, body) = read_answer(&mut stream);
            assert!(head.starts_with(&format!("http/1.1 {expected}")), "{head}");
            if expected == "200" {
                numbers.push(number(&body));
            }
        }
    }

    assert_eq!(support::missing(&numbers, 1..=3_000), 2_800);
    server.stop().await;
}

/// Story: numbers taken for a client that had disconnected were returned after they had been sent, or not at
/// all, and later requests waited for them without end.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_early_takes_at_most_its_count() {
    for lease_rows in [0, 64] {
        let config = config("sharded", NEVER_MS).set("lease.rows", lease_rows);
        let site = Site::new(&config);
        site.fill().await;
        let server = site.start().await;

        // A third of the responses is read; their numbers must not be issued again.
        let mut numbers = Vec::new();
        let mut asked = 0;
        for request in 0..150 {
            let mut stream = connect(server.address());
            let head =
                format!("GET /random?count={} HTTP/1.1\r\nhost: [::1]\r\n\r\n", request % 7 + 1);
            stream.write_all(head.as_bytes()).unwrap();
            if request % 3 == 0 {
                let body = read_answer(&mut stream).1;
                let many: support::Many<'_> = serde_json::from_str(&body).unwrap();
                numbers.extend(many.numbers.iter().map(|number| number.get().to_owned()));
            } else {
                asked += request % 7 + 1;
            }
        }
        numbers.extend(server.drain("int", 4, &[None, Some(10)]).await);
        let missing = support::missing(&numbers, 1..=3_000);
        assert!(
            missing <= asked,
            "{missing} numbers are missing, but only {asked} were in unread responses"
        );
        server.stop().await;

        let server = site.start().await;
        server.get("/random").await.assert_exhausted();
        server.stop().await;
    }
}

/// Story: idle connections took every file descriptor, and other clients were not served.
#[tokio::test(flavor = "multi_thread")]
async fn at_the_limit_the_idle_make_room() {
    const CONNECTIONS: usize = 40;
    let config = config("sharded", NEVER_MS).set("server.connections", CONNECTIONS);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;

    let mut idle: Vec<_> = (0..3 * CONNECTIONS).map(|_| connect(server.address())).collect();
    let mut numbers = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut honest = connect(server.address());
        honest.write_all(b"GET /random HTTP/1.1\r\nhost: [::1]\r\n\r\n").unwrap();
        numbers.push(number(&read_answer(&mut honest).1));
    }

    assert_eq!(support::missing(&numbers, 1..=3_000), 3_000 - CONNECTIONS);
    for stream in &idle {
        stream.set_nonblocking(true).unwrap();
    }
    eventually("the end of all connections above the limit", async || {
        idle.retain_mut(|stream| {
            let read = stream.read(&mut [0]);
            read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        });
        (idle.len() <= CONNECTIONS).then_some(())
    })
    .await;
    server.stop().await;
}

/// Story: a thousand clients, or ten thousand (`IDLE_CONNECTIONS=10000`), send nothing, and all others have
/// to wait.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_leave_honest_clients_alone() {
    let count = std::env::var("IDLE_CONNECTIONS").map_or(1_000, |count| count.parse().unwrap());
    let allowed = rlimit::increase_nofile_limit(count as u64 + 200).unwrap();
    assert!(allowed >= count as u64 + 200, "ulimit -n allows {allowed} files");
    let site = Site::new(&config("sharded", NEVER_MS));
    site.fill().await;
    let server = site.start().await;

    let idle: Vec<_> = (0..count).map(|_| connect(server.address())).collect();
    let numbers = server.drain("int", 4, &[None, Some(3)]).await;

    assert_each_once(&numbers, 1..=3_000);
    for stream in &idle {
        stream.set_nonblocking(true).unwrap();
        let error = (&*stream).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "an idle connection was closed too early");
    }
    server.stop().await;
}

/// Story: a stop waited for clients that sent nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_the_silent() {
    let config = config("sharded", NEVER_MS).set("server.drain_ms", NEVER_MS);
    let site = Site::new(&config);
    let server = site.start().await;
    let mut silent = connect(server.address());
    let mut idle = connect(server.address());
    idle.write_all(b"GET /nothing HTTP/1.1\r\nhost: [::1]\r\n\r\n").unwrap();
    read_answer(&mut idle);
    server.get("/health").await;

    server.stop().await;

    assert_eq!(read_to_end(&mut silent), "");
    assert_eq!(read_to_end(&mut idle), "");
}

/// Returns the peak memory of a process in MB.
fn peak_memory_mb(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() / 1_000
}

/// Story: each client that requested the largest file and did not read it cost a copy in the server's memory,
/// 400 kB each, and needed no token.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_read_costs_no_memory() {
    const CLIENTS: u64 = 2_000;
    const ALLOWED_MB: u64 = 100;
    let allowed = rlimit::increase_nofile_limit(CLIENTS + 200).unwrap();
    assert!(allowed >= CLIENTS + 200, "ulimit -n allows {allowed} files");
    for path in ["/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/page.js", "/openapi.json"]
    {
        let site = Site::new(&config("sharded", NEVER_MS));
        site.fill().await;
        let server = site.start().await;
        let address = server.address().parse().unwrap();
        let mut unread = Vec::new();
        for _ in 0..CLIENTS {
            let socket = TcpSocket::new_v4().unwrap();
            // The smallest possible buffer, so that the body has to wait in the server.
            socket.set_recv_buffer_size(1).unwrap();
            let mut stream = socket.connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            unread.push(stream);
        }
        // After this, the server has written as much as it can.
        for stream in &mut unread {
            let mut status = [0; 12];
            stream.read_exact(&mut status).await.unwrap();
            assert_eq!(&status, b"HTTP/1.1 200");
        }
        let peak = peak_memory_mb(server.process.id());
        println!("{path}: {peak} MB");
        assert!(peak < ALLOWED_MB, "{CLIENTS} clients that do not read {path}: {peak} MB");

        // A client that reads late gets the whole file.
        let mut late = Vec::new();
        let mut part = [0; 65_536];
        let (head, length) = loop {
            let read = unread[0].read(&mut part).await.unwrap();
            assert_ne!(read, 0);
            late.extend_from_slice(&part[..read]);
            let Some(end) = late.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
                continue;
            };
            let head = String::from_utf8(late[..end].to_vec()).unwrap().to_lowercase();
            let length = head.split("content-length: ").nth(1).unwrap().lines().next().unwrap();
            let length: usize = length.parse().unwrap();
            if late.len() >= end + 4 + length {
                break (head, late.len() - end - 4 - length);
            }
        };
        assert_eq!(length, 0, "{head}");
        drop(unread);
        server.stop().await;
    }
}

/// Returns how many connections and listeners a process has.
fn sockets(process: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

/// Story: at the limit of connections, with each one waiting for its response, the server ignored SIGTERM
/// until one of them ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_heard_when_every_connection_is_busy_and_another_waits() {
    // The file of 1,000 pools does not fit into the buffer of a pipe.
    let config = (0..1_000).fold(config("json", NEVER_MS), |config, index| {
        config.pool(&format!("a_pool_with_a_long_name_{index}"), 1, 9, 1, 9)
    });
    let config = config.set("server.connections", 1).set("server.drain_ms", NEVER_MS);
    let site = Site::new(&config);
    let mut server = site.start().await;
    let process = server.process.id();
    // The next write of the numbers goes to a pipe that is not read, and blocks.
    let pipe = site.file("used_numbers.json.tmp");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut busy = connect(server.address());
    busy.write_all(b"GET /random HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut pipe = File::open(pipe).unwrap();
        let opened = Instant::now();
        // The server may open the file and close it again before it writes.
        while pipe.read(&mut [0]).unwrap() == 0 {
            assert!(opened.elapsed() < PATIENCE, "nothing was written to the pipe");
            thread::yield_now();
        }
        pipe
    });
    let mut reading = reading.await.unwrap();
    let before = sockets(process);
    let _newcomer = connect(server.address());
    eventually("the new connection", async || (sockets(process) > before).then_some(())).await;

    server.process.signal(Signal::SIGTERM);
    server.process.says("stopping").await;

    let reads = thread::spawn(move || reading.read_to_end(&mut Vec::new()).unwrap());
    let answer = read_to_end(&mut busy);
    assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    let finished = server.process.finish().await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    reads.join().unwrap();
}
