//! `stress-test`, the real binary, against servers that misbehave: each is reported for what it is.

mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use server::{Reply, Request, Server};

/// A tool that has not ended by then never will. Far beyond what any test takes.
const RUN_LIMIT: Duration = Duration::from_secs(90);

/// How one run of the tool ended.
#[derive(Debug)]
struct Run {
    exit_code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    /// How often the summary says that something happened; 0 when it does not say so.
    fn outcomes(&self, kind: &str) -> u64 {
        self.figure("Outcomes", kind)
    }

    fn numbers_of(&self, shard: &str) -> u64 {
        self.figure("Numbers per shard", shard)
    }

    fn figure(&self, section: &str, name: &str) -> u64 {
        let lines = self.section(section);
        let Some(rest) = lines.iter().find_map(|line| line.trim_start().strip_prefix(name)) else {
            return 0;
        };
        let figure = rest.split_whitespace().next().expect("a figure after the name");
        figure.replace(',', "").parse().expect("a number")
    }

    fn section(&self, title: &str) -> Vec<&str> {
        let lines = self.stdout.lines().skip_while(|line| *line != title).skip(1);
        lines.take_while(|line| !line.is_empty()).collect()
    }

    fn duplicates(&self) -> u64 {
        let line = self.stdout.lines().find_map(|line| line.strip_prefix("Duplicates: "));
        let count = line.and_then(|line| line.split(' ').next());
        count.expect("a summary").replace(',', "").parse().expect("a number")
    }

    #[track_caller]
    fn assert_exit(&self, exit_code: i32) {
        assert_eq!(self.exit_code, Some(exit_code), "{self:#?}");
    }

    #[track_caller]
    fn assert_says(&self, words: &str) {
        assert!(self.stdout.contains(words) || self.stderr.contains(words), "{words}: {self:#?}");
    }
}

fn command(folder: &TempDir, url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stress-test"));
    command.current_dir(folder).args(["--url", url]).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the tool to its end, without a log, which most tests do not look at.
fn stress(server: &Server, args: &[&str]) -> Run {
    let folder = folder();
    stress_in(&folder, server, &[args, &["--no-log"]].concat())
}

fn stress_in(folder: &TempDir, server: &Server, args: &[&str]) -> Run {
    finish(command(folder, &server.url(), args).spawn().expect("the tool starts"))
}

fn finish(child: Child) -> Run {
    let id = pid(&child);
    let (done, ended) = mpsc::channel();
    let watchdog = std::thread::spawn(move || {
        if ended.recv_timeout(RUN_LIMIT).is_err() {
            let _ = kill(id, Signal::SIGKILL);
        }
    });
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the tool ends");
    done.send(()).expect("the watchdog waits");
    watchdog.join().expect("the watchdog ends");
    Run {
        exit_code: status.code(),
        stdout: String::from_utf8(stdout).expect("UTF-8"),
        stderr: String::from_utf8(stderr).expect("UTF-8"),
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a process id"))
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("a readable file")
}

fn number(text: impl std::fmt::Display) -> Reply {
    Reply::Json(format!(r#"{{"number": {text}, "shard": "int_shard_0.db"}}"#))
}

/// Responds with the number of the request, from 0.
fn healthy(request: &Request) -> Reply {
    number(request.place)
}

/// Answers with these texts in turn, then with other numbers.
fn in_turn(texts: &'static [&'static str]) -> impl Fn(&Request) -> Reply + Send + Sync {
    move |request| match texts.get(usize::try_from(request.place).expect("a small place")) {
        Some(text) => number(text),
        None => number(1_000_000_000 + request.place),
    }
}

// ---- Servers that keep their promises ----

#[test]
fn a_healthy_server_passes_with_the_plain_defaults() {
    let server = Server::start(healthy);
    let run = stress(&server, &[]);
    run.assert_exit(0);
    assert_eq!(server.requests(), 1600);
    assert_eq!(run.outcomes("200 with numbers"), 1600);
    assert_eq!(run.numbers_of("int_shard_0.db"), 1600);
    assert_eq!(run.duplicates(), 0);
    for words in
        ["1,600 numbers, ", "numbers/s", "p50 ", "p90 ", "p99 ", "p99.9 ", "max ", "PASSED"]
    {
        run.assert_says(words);
    }
}

#[test]
fn every_connection_asks_at_the_same_time_and_is_kept() {
    // Answers only when eight have asked, so with fewer at once it would hang.
    let together = Barrier::new(8);
    let server = Server::start(move |request| {
        together.wait();
        healthy(request)
    });
    let run = stress(&server, &["-n", "80", "-c", "8"]);
    run.assert_exit(0);
    assert_eq!(server.connections(), 8);
}

#[test]
fn a_mix_asks_both_types_and_compares_each_with_its_own() {
    // The same text for either type, so that only a tool that mixes them up sees a repeat.
    let next = [AtomicU64::new(0), AtomicU64::new(0)];
    let server = Server::start(move |request| {
        let pool = usize::from(request.pool() == "float");
        assert!(pool == 1 || request.pool() == "int", "{}", request.path);
        let text = next[pool].fetch_add(1, Ordering::SeqCst);
        Reply::Json(format!(r#"{{"number": {text}, "shard": "shard_{pool}.db"}}"#))
    });
    let run = stress(&server, &["--requests", "100", "--concurrency", "8", "--type", "mix"]);
    run.assert_exit(0);
    assert_eq!(run.outcomes("200 with numbers"), 100);
    // One of 100 fair draws is missing once in 2^99 runs.
    assert!(run.numbers_of("shard_0.db") > 0 && run.numbers_of("shard_1.db") > 0, "{run:#?}");
    assert_eq!(run.numbers_of("shard_0.db") + run.numbers_of("shard_1.db"), 100);
}

#[test]
fn an_answer_without_a_shard_is_as_good() {
    let server = Server::start(|request| Reply::Json(format!(r#"{{"number":{}}}"#, request.place)));
    let run = stress(&server, &["-n", "5"]);
    run.assert_exit(0);
    assert_eq!(run.numbers_of("(no shard named)"), 5);
}

#[test]
fn every_number_of_a_count_answer_is_counted() {
    let server = Server::start(|request| {
        assert_eq!(request.path, "/random?type=a_pool&count=3");
        let first = request.place * 3;
        let numbers = format!("[{first}, {}, {}]", first + 1, first + 2);
        let shards = r#"{"s0.db": 2, "s1.db": 1}"#;
        Reply::Json(format!(r#"{{"count": 3, "numbers": {numbers}, "shards": {shards}}}"#))
    });
    let run = stress(&server, &["-n", "10", "--count", "3", "--type", "a_pool"]);
    run.assert_exit(0);
    run.assert_says("30 numbers, ");
    assert_eq!((run.numbers_of("s0.db"), run.numbers_of("s1.db")), (20, 10));
}

#[test]
fn a_connection_that_ends_between_two_answers_fails_nothing() {
    let server = Server::start(|request| Reply::Last(format!(r#"{{"number":{}}}"#, request.place)));
    let run = stress(&server, &["-n", "20"]);
    run.assert_exit(0);
    assert_eq!(run.outcomes("200 with numbers"), 20);
}

#[test]
fn a_duration_bounds_the_run_instead_of_a_count() {
    let server = Server::start(healthy);
    let began = Instant::now();
    let run = stress(&server, &["--duration", "300ms", "-q"]);
    run.assert_exit(0);
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(run.outcomes("200 with numbers"), server.requests());
}

// ---- Repeats ----

#[test]
fn a_number_that_comes_again_fails_the_run_and_is_named() {
    let server = Server::start(in_turn(&["41", "77", "42", "77"]));
    let run = stress(&server, &["-n", "10", "-c", "1"]);
    run.assert_exit(1);
    assert_eq!(run.duplicates(), 1);
    run.assert_says("int 77  request 4, already in this run");
    run.assert_says("FAILED: duplicates 1, failures 0");
}

#[test]
fn every_repeat_is_counted() {
    let server = Server::start(|_| number(7));
    let run = stress(&server, &["-n", "500", "-c", "8", "-q"]);
    run.assert_exit(1);
    assert_eq!(run.duplicates(), 499);
    assert_eq!(run.outcomes("200 with numbers"), 500);
}

#[test]
fn a_repeat_within_one_answer_is_found() {
    let server = Server::start(|_| Reply::Json(r#"{"count":3,"numbers":[5,6,5]}"#.to_owned()));
    let run = stress(&server, &["-n", "1", "--count", "3"]);
    run.assert_exit(1);
    assert_eq!(run.duplicates(), 1);
    run.assert_says("int 5  request 1");
}

#[test]
fn numbers_are_the_same_only_when_their_text_is() {
    let different = &[
        "1",
        "1.0",
        "1.00",
        "10e-1",
        "9007199254740992",
        "9007199254740993",
        "0",
        "-0",
        "123456789012345678901234567890",
        "123456789012345678901234567891",
    ];
    let server = Server::start(in_turn(different));
    let run = stress(&server, &["-n", "10", "-c", "1"]);
    run.assert_exit(0);
    assert_eq!(run.duplicates(), 0);

    let long = &["123456789012345678901234567890", "123456789012345678901234567890"];
    let server = Server::start(in_turn(long));
    let run = stress(&server, &["-n", "2", "-c", "1"]);
    run.assert_exit(1);
    assert_eq!(run.duplicates(), 1);
}

// ---- Failures, each by its name ----

#[test]
fn a_server_that_hangs_is_timed_out_and_the_run_goes_on() {
    let half = "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{\"number\": ";
    for hangs_with in ["", "HTTP/1.1 200 OK\r\n", half] {
        let server = Server::start(move |request| match request.place {
            0 => Reply::Hang(hangs_with),
            _ => healthy(request),
        });
        // Long for the other 19 answers on any machine, short for the one that never comes.
        let run = stress(&server, &["-n", "20", "-c", "2", "--timeout", "2s"]);
        run.assert_exit(1);
        assert_eq!(run.outcomes("timed out"), 1, "{run:#?}");
        assert_eq!(run.outcomes("200 with numbers"), 19, "{run:#?}");
        run.assert_says("FAILED: duplicates 0, failures 1");
    }
}

#[test]
fn a_connection_cut_in_mid_answer_is_reported_and_replaced() {
    let mid_body = "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{\"number\": 12";
    for cut_after in ["", "HTTP/1.1 200 OK\r\nContent-Le", mid_body] {
        let server = Server::start(move |request| match request.place {
            3 | 5 => Reply::Cut(cut_after),
            _ => healthy(request),
        });
        let run = stress(&server, &["-n", "20", "-c", "2"]);
        run.assert_exit(1);
        assert_eq!(run.outcomes("broken connection"), 2, "{run:#?}");
        assert_eq!(run.outcomes("200 with numbers"), 18, "{run:#?}");
        assert_eq!(server.requests(), 20, "what may have reached the server is not repeated");
    }
}

#[test]
fn garbage_is_a_wrong_answer() {
    let mut replies = vec![
        Reply::Cut("SSH-2.0-OpenSSH_9.6\r\n\r\n"),
        Reply::Json(format!(r#"{{"number": 1, "more": "{}"}}"#, "x".repeat(1 << 20))),
    ];
    for body in [
        "",
        "<html>It works!</html>",
        r#"{"number": 12"#,
        r#"{"number": "12"}"#,
        r#"{"number": null}"#,
        r#"{"error": "none today"}"#,
        r#"{"number": 1, "shard": 7}"#,
        r#"{"count": 2, "numbers": [1, 2]}"#,
        "[1]",
    ] {
        replies.push(Reply::Json(body.to_owned()));
    }
    for garbage in replies {
        let shown = format!("{garbage:.100?}");
        let garbage = Mutex::new(Some(garbage));
        let server = Server::start(move |request| {
            garbage.lock().expect("no panic in it").take().unwrap_or_else(|| healthy(request))
        });
        let run = stress(&server, &["-n", "5", "-c", "1"]);
        assert_eq!(run.exit_code, Some(1), "{shown}: {run:#?}");
        assert_eq!(run.outcomes("wrong answer"), 1, "{shown}: {run:#?}");
        assert_eq!(run.outcomes("200 with numbers"), 4, "{shown}: {run:#?}");
    }
}

#[test]
fn fewer_numbers_than_asked_for_are_a_wrong_answer() {
    let server = Server::start(|_| Reply::Json(r#"{"count":2,"numbers":[5,6]}"#.to_owned()));
    let run = stress(&server, &["-n", "1", "--count", "3"]);
    run.assert_exit(1);
    assert_eq!(run.outcomes("wrong answer"), 1);
    run.assert_says("2 numbers for --count 3");
}

#[test]
fn only_what_the_help_calls_expected_is_no_failure() {
    let exhausted = r#"{"error": "All numbers are used up.", "code": "exhausted"}"#;
    for (status, headers, body, kind, exit_code) in [
        (503, "Retry-After: 1\r\n", "{}", "503 with Retry-After", 0),
        (429, "Retry-After: 1\r\n", "{}", "429 with Retry-After", 0),
        (410, "", exhausted, "410 exhausted", 0),
        (410, "", "gone", "status 410", 1),
        (503, "", exhausted, "status 503", 1),
        (503, "Retry-After: later\r\n", "{}", "status 503", 1),
        (429, "", "{}", "status 429", 1),
        (400, "Retry-After: 1\r\n", "{}", "status 400", 1),
        (404, "", "{}", "status 404", 1),
        (500, "", r#"{"number": 1}"#, "status 500", 1),
        (302, "Location: /\r\n", "", "status 302", 1),
    ] {
        let server = Server::start(move |_| Reply::Status(status, headers, body));
        let run = stress(&server, &["-n", "6"]);
        assert_eq!(run.outcomes(kind), 6, "{status} {headers}: {run:#?}");
        run.assert_exit(exit_code);
        assert_eq!(server.requests(), 6, "nothing is repeated without --retry");
    }
}

#[test]
fn a_server_that_is_not_there_is_said_to_be_so() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("a bound address"));
    drop(listener);
    let folder = folder();
    let run = finish(command(&folder, &url, &["--no-log"]).spawn().expect("the tool starts"));
    run.assert_exit(1);
    run.assert_says(&format!("cannot reach {url}/random"));
}

// ---- Retry-After ----

#[test]
fn a_refilling_server_is_asked_again_after_the_time_it_names() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let server = Server::start({
        let asked = Arc::clone(&asked);
        move |request| {
            asked.lock().expect("no panic in it").push(Instant::now());
            match request.place {
                0 => Reply::Status(503, "Retry-After: 1\r\n", r#"{"code": "refilling"}"#),
                _ => healthy(request),
            }
        }
    });
    let run = stress(&server, &["-n", "1", "--retry", "1"]);
    run.assert_exit(0);
    assert_eq!(run.outcomes("503 with Retry-After"), 1);
    assert_eq!(run.outcomes("of these, asked again"), 1);
    assert_eq!(run.outcomes("200 with numbers"), 1);
    let asked = asked.lock().expect("no panic in it");
    assert!(asked[1] - asked[0] >= Duration::from_secs(1), "it said a second");
}

#[test]
fn a_request_is_repeated_at_most_as_often_as_allowed() {
    let server = Server::start(|_| Reply::Status(429, "Retry-After: 0\r\n", "{}"));
    let run = stress(&server, &["-n", "2", "--retry", "3"]);
    run.assert_exit(0);
    assert_eq!(server.requests(), 2 * (1 + 3));
    assert_eq!(run.outcomes("429 with Retry-After"), 8);
    assert_eq!(run.outcomes("of these, asked again"), 6);
}

#[test]
fn a_wait_that_outlasts_the_run_is_not_begun() {
    for (wait, args) in [
        ("Retry-After: 50\r\n", &["-d", "200ms", "-c", "1", "-q", "--retry", "1"]),
        ("Retry-After: 99999\r\n", &["-n", "1", "-c", "1", "-q", "--retry", "1"]),
    ] {
        let server = Server::start(move |_| Reply::Status(503, wait, "{}"));
        let run = stress(&server, args);
        run.assert_exit(0);
        assert_eq!(run.outcomes("of these, asked again"), 0);
    }
}

// ---- The files of a run ----

#[test]
fn the_log_is_complete_and_the_console_as_well_unless_quiet() {
    for quiet in [false, true] {
        let folder = folder();
        let server = Server::start(|request| match request.place {
            40 => Reply::Status(500, "", "line one\nline two"),
            _ => healthy(request),
        });
        let args = ["-n", "300", "--log", "log.txt", if quiet { "--quiet" } else { "--retry=1" }];
        let run = stress_in(&folder, &server, &args);
        run.assert_exit(1);
        let log = read(&folder.path().join("log.txt"));
        let lines: Vec<Vec<&str>> = log
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split('\t').collect())
            .collect();
        let ids: BTreeSet<u64> = lines.iter().map(|line| line[1].parse().expect("an id")).collect();
        assert_eq!((lines.len(), ids), (300, (1..=300).collect()), "one line each");
        let numbers: BTreeSet<u64> = lines
            .iter()
            .filter(|line| line[4] == "200")
            .map(|line| line[8].parse().expect("a number"))
            .collect();
        assert_eq!(numbers, (0..300).filter(|place| *place != 40).collect());
        let failed: Vec<_> = lines.iter().filter(|line| line[4] == "500").collect();
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0][7..], ["status 500", r"line one\nline two"]);
        assert!(log.contains("# FAILED: duplicates 0, failures 1"), "ends with the summary");

        let printed = run.stdout.lines().filter(|line| line.starts_with('#'));
        assert_eq!(printed.count(), if quiet { 0 } else { 300 });
    }
}

#[test]
fn the_log_has_every_number_of_a_long_answer() {
    let folder = folder();
    let server = Server::start(|_| {
        let numbers: Vec<String> = (0..5_000).map(|number| number.to_string()).collect();
        Reply::Json(format!(r#"{{"count": 5000, "numbers": [{}]}}"#, numbers.join(", ")))
    });
    let args = ["-n", "1", "--count", "5000", "--log", "log.txt"];
    stress_in(&folder, &server, &args).assert_exit(0);
    let log = read(&folder.path().join("log.txt"));
    let line = log.lines().find(|line| !line.starts_with('#')).expect("a line");
    let numbers: Vec<&str> = line.split('\t').nth(8).expect("numbers").split(' ').collect();
    assert_eq!(numbers, (0..5_000).map(|number: u32| number.to_string()).collect::<Vec<_>>());
}

#[test]
fn a_log_is_named_after_its_time_unless_there_is_to_be_none() {
    let folder = folder();
    let server = Server::start(healthy);
    let logs = || -> Vec<String> {
        let entries = std::fs::read_dir(&folder).expect("a folder");
        entries
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect()
    };
    stress_in(&folder, &server, &["-n", "1", "--no-log"]).assert_exit(0);
    assert_eq!(logs(), [""; 0]);
    // Two runs in one second must not share a log.
    let run = stress_in(&folder, &server, &["-n", "1"]);
    stress_in(&folder, &server, &["-n", "1"]).assert_exit(0);
    assert_eq!(logs().len(), 2);
    for log in logs() {
        assert!(log.starts_with("stress_log_2") && log.ends_with(".txt"), "{log}");
    }
    assert!(logs().iter().any(|log| run.stdout.contains(log.as_str())), "the summary names it");
}

#[test]
fn a_console_that_is_closed_costs_nothing_but_the_console() {
    let folder = folder();
    let server = Server::start(healthy);
    let args = ["-n", "3000", "--log", "log.txt", "--seen", "seen.txt"];
    let mut child = command(&folder, &server.url(), &args).spawn().expect("the tool starts");
    drop(child.stdout.take());
    finish(child).assert_exit(0);
    assert!(
        read(&folder.path().join("log.txt")).ends_with("# PASSED: no duplicates, no failures\n")
    );
    assert_eq!(read(&folder.path().join("seen.txt")).lines().count(), 3000);
}

#[test]
fn a_repeat_of_an_earlier_run_is_found_and_remembered_once() {
    let folder = folder();
    let seen = ["-n", "20", "--no-log", "--seen", "seen.txt"];
    let first = stress_in(&folder, &Server::start(healthy), &seen);
    first.assert_exit(0);
    assert_eq!(first.duplicates(), 0);
    // 19 to 38: one of them came before.
    let second = stress_in(&folder, &Server::start(|request| number(19 + request.place)), &seen);
    second.assert_exit(1);
    assert_eq!(second.duplicates(), 1);
    second.assert_says("int 19  request ");
    second.assert_says("already in an earlier run");
    let file = read(&folder.path().join("seen.txt"));
    let lines: BTreeSet<&str> = file.lines().collect();
    let all: Vec<String> = (0..=38).map(|number| format!("int {number}")).collect();
    assert_eq!(lines, all.iter().map(String::as_str).collect());
    assert_eq!(file.lines().count(), 39, "a line each");
}

#[test]
fn remembered_numbers_are_exact_text_of_one_type() {
    let folder = folder();
    std::fs::write(
        folder.path().join("seen.txt"),
        "int 1.0\nfloat 1\nother -12345678901234567890\n",
    )
    .expect("a written file");
    let seen = ["-n", "1", "--no-log", "--seen", "seen.txt"];
    let run = stress_in(&folder, &Server::start(in_turn(&["1"])), &seen);
    run.assert_exit(0);
    let other = [&seen[..], &["--type", "other"]].concat();
    stress_in(&folder, &Server::start(in_turn(&["-12345678901234567890"])), &other).assert_exit(1);
    let file = read(&folder.path().join("seen.txt"));
    assert_eq!(file, "int 1.0\nfloat 1\nother -12345678901234567890\nint 1\n");
}

#[test]
fn a_broken_line_of_remembered_numbers_is_refused_by_its_place() {
    for (content, place) in [
        ("int 1\nint two\n", "line 2"),
        ("int 1\n\nint 3\n", "line 2"),
        ("int 1\nint 2\nint 3", "line 3"),
        ("int 1\nint 2\nint 1\n", "line 3"),
        ("4837201\n", "line 1"),
        ("Int 1\n", "line 1"),
    ] {
        let folder = folder();
        let path = folder.path().join("seen.txt");
        std::fs::write(&path, content).expect("a written file");
        let server = Server::start(healthy);
        let run = stress_in(&folder, &server, &["--no-log", "--seen", "seen.txt"]);
        run.assert_exit(2);
        run.assert_says(place);
        assert_eq!(server.requests(), 0, "nothing is asked that could not be remembered");
        assert_eq!(read(&path), content, "left as it was");
    }
}

#[test]
fn two_runs_cannot_remember_in_one_file_at_once() {
    let folder = folder();
    let (arrived, wait) = mpsc::channel();
    let hanging = Server::start(move |_| {
        let _ = arrived.send(());
        Reply::Hang("")
    });
    let seen = ["-n", "1", "--no-log", "--seen", "seen.txt"];
    let first = command(&folder, &hanging.url(), &seen).spawn().expect("the tool starts");
    wait.recv_timeout(RUN_LIMIT).expect("a request");
    let second = stress_in(&folder, &Server::start(healthy), &seen);
    kill(pid(&first), Signal::SIGKILL).expect("a running process");
    finish(first);
    second.assert_exit(2);
    second.assert_says("another run is using it");
}

// ---- The command line ----

#[test]
fn an_interrupt_ends_the_run_with_its_summary_and_remembers() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let folder = folder();
        let (sixth, wait) = mpsc::channel();
        let server = Server::start(move |request| match request.place {
            0..5 => healthy(request),
            _ => {
                let _ = sixth.send(());
                Reply::Hang("")
            }
        });
        let args =
            ["-n", "100", "-c", "1", "--timeout", "1h", "--log", "log.txt", "--seen", "seen.txt"];
        let child = command(&folder, &server.url(), &args).spawn().expect("the tool starts");
        wait.recv_timeout(RUN_LIMIT).expect("a sixth request");
        kill(pid(&child), signal).expect("a running process");
        let run = finish(child);
        run.assert_exit(0);
        run.assert_says("(ended early)");
        assert_eq!(run.outcomes("200 with numbers"), 5);
        assert_eq!(run.outcomes("unfinished at the end"), 1);
        assert_eq!(read(&folder.path().join("seen.txt")).lines().count(), 5);
        assert!(read(&folder.path().join("log.txt")).contains("# PASSED"));
    }
}

#[test]
fn a_second_interrupt_quits_at_once() {
    let folder = folder();
    let (arrived, wait) = mpsc::channel();
    let server = Server::start(move |_| {
        let _ = arrived.send(());
        Reply::Hang("")
    });
    let args = ["-n", "1", "--timeout", "1h", "--no-log"];
    let child = command(&folder, &server.url(), &args).spawn().expect("the tool starts");
    wait.recv_timeout(RUN_LIMIT).expect("a request");
    // Two kinds, since two signals of one kind may be delivered as one.
    kill(pid(&child), Signal::SIGINT).expect("a running process");
    kill(pid(&child), Signal::SIGTERM).expect("a running process");
    finish(child).assert_exit(130);
}

#[test]
fn a_token_goes_with_every_request_and_nowhere_else() {
    let server = Server::start(|request| match request.authorization.as_deref() {
        Some("Bearer tombola_0123") => healthy(request),
        _ => Reply::Status(401, "", "{}"),
    });
    let folder = folder();
    std::fs::write(folder.path().join("token"), "tombola_0123\n").expect("a file");
    let args = ["-n", "20", "--token-file", "token", "--log", "log.txt"];
    let run = stress_in(&folder, &server, &args);
    run.assert_exit(0);
    let log = read(&folder.path().join("log.txt"));
    for said in [&log, &run.stdout, &run.stderr] {
        assert!(!said.contains("tombola_0123"), "{said}");
    }
    stress(&server, &["-n", "20"]).assert_exit(1);
}

#[test]
fn bad_arguments_are_refused_before_anything_is_asked() {
    let server = Server::start(healthy);
    for (args, words) in [
        (&["--url", "https://127.0.0.1:1"][..], "https:// is not spoken here, only http://"),
        (&["--url", "unix://run/x"], "unix:// is not spoken here"),
        (&["--url", "127.0.0.1:8000"], "begins with http://"),
        (&["--url", "http://127.0.0.1/random?type=int"], "no query here"),
        (&["--url", "http://me:pw@127.0.0.1/"], "no user or password"),
        (&["--requests", "0"], "--requests"),
        (&["--requests", "5", "--duration", "5s"], "--duration"),
        (&["--concurrency", "0"], "--concurrency"),
        (&["--type", "in t"], "a pool is named by"),
        (&["--type", ""], "a pool is named by"),
        (&["--count", "0"], "--count"),
        (&["--token-file", "no/such/file"], "can't be read"),
        (&["--token-file", "/dev/null"], "holds no token"),
        (&["--duration", "soon"], "--duration"),
        (&["--timeout", "0"], "--timeout"),
        (&["--retry=-1"], "--retry"),
        (&["--log", "a.txt", "--no-log"], "--no-log"),
        (&["--log", "no/such/folder.txt"], "no/such/folder.txt"),
        (&["--no-log", "--seen", "no/such/folder.txt"], "no/such/folder.txt"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let folder = folder();
        let mut command = Command::new(env!("CARGO_BIN_EXE_stress-test"));
        if !args.contains(&"--url") {
            command.args(["--url", &server.url()]);
        }
        command.current_dir(&folder).args(args).stdin(Stdio::null());
        let run = finish(
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the tool starts"),
        );
        assert_eq!(run.exit_code, Some(2), "{args:?}: {run:#?}");
        assert!(run.stderr.contains(words), "{args:?}: {run:#?}");
    }
    assert_eq!(server.requests(), 0);
}

#[test]
fn the_help_says_what_counts_as_a_failure() {
    let folder = folder();
    let run = finish(command(&folder, "http://localhost", &["--help"]).spawn().expect("it starts"));
    run.assert_exit(0);
    for words in ["What counts as a failure", "Retry-After", "exhausted", "Exit codes: 0"] {
        run.assert_says(words);
    }
}
