//! `POST /pools/NAME/used` and `tombola import --url`: a server that serves never issues what was imported into it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use reqwest::Method;
use serde_json::{Value, json};
use support::{
    Answer, Client, Config, Failure, Server, Site, Token, integers, missing, run, with_tokens,
};

const LAST: i64 = 5_999;
const USED: &str = "/pools/int/used";
const COUNTS: &[Option<u32>] = &[None, Some(3), None, Some(20)];

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 1_500).set("lease.rows", 64)
}

fn lines(numbers: impl IntoIterator<Item = i64>) -> String {
    numbers.into_iter().map(|number| format!("{number}\n")).collect()
}

async fn post(client: &Client, target: &str, body: &str) -> Answer {
    client.send_body(Method::POST, target, &[("content-type", "text/plain")], body).await.unwrap()
}

/// Imports numbers. Returns the report and the conflicts.
async fn import(client: &Client, numbers: impl IntoIterator<Item = i64>) -> (Value, BTreeSet<i64>) {
    let answer = post(client, USED, &lines(numbers)).await;
    answer.assert_status(200);
    let report: Value = answer.parse();
    let conflicts = report["conflicts"].as_array().unwrap().iter();
    let conflicts = conflicts.map(|conflict| conflict["number"].as_i64().unwrap()).collect();
    (report, conflicts)
}

/// Fails unless issued, pooled, burned and free numbers add up to the range.
async fn assert_sums(server: &Server) {
    let status: Value = server.get("/status").await.parse();
    let pool = &status["pools"]["int"];
    let sum: i64 =
        ["issued", "pooled", "burned", "free"].iter().map(|key| pool[*key].as_i64().unwrap()).sum();
    assert_eq!(sum, LAST + 1, "{pool}");
}

async fn verify(site: &Site) -> String {
    let finished = run(site.console(&["verify"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}{}", finished.stdout, finished.stderr);
    finished.stdout
}

/// Numbers are imported while clients use the range up, from live shards, leases, standbys and builds.
#[tokio::test(flavor = "multi_thread")]
async fn no_number_comes_after_it_was_imported_under_load() {
    let site = Site::new(&config());
    let server = site.start().await;
    let mut load = server.load("int", 8, COUNTS);
    let client = server.client();
    let (mut imported, mut conflicts) = (BTreeSet::new(), BTreeSet::new());
    let (mut marked, mut in_shards) = (0, 0);
    for part in 0..8 {
        load.reach(200 + 300 * part).await;
        let numbers: Vec<i64> =
            (0..=LAST).filter(|number| number % 24 == part as i64 * 3).collect();
        imported.extend(&numbers);
        let (report, used) = import(&client, numbers).await;
        conflicts.extend(used);
        marked += report["marked"].as_i64().unwrap();
        in_shards += report["marked_in_shards"].as_i64().unwrap();
    }
    let numbers = load.join_numbers().await;
    println!("{marked} marked, {in_shards} of them in shards, {} conflicts", conflicts.len());
    assert!(marked > 0 && in_shards > 0 && !conflicts.is_empty());
    missing(&numbers, 0..=LAST);
    let issued: BTreeSet<i64> = integers(&numbers).into_iter().collect();
    let after: Vec<_> = issued.intersection(&imported).filter(|n| !conflicts.contains(n)).collect();
    assert!(after.is_empty(), "issued although they were imported: {after:?}");
    let lost: Vec<_> = (0..=LAST)
        .filter(|number| !issued.contains(number) && !imported.contains(number))
        .collect();
    assert!(lost.is_empty(), "neither issued nor imported: {lost:?}");
    assert_eq!(marked as usize + conflicts.len(), imported.len());
    assert_sums(&server).await;
    let status: Value = server.get("/status").await.parse();
    let events = status["events"].as_array().unwrap();
    assert!(events.iter().any(|event| event["kind"] == "imported"), "{events:?}");
    server.stop().await;
    let sums = verify(&site).await;
    assert!(sums.contains(&format!("{marked} of the issued were imported")), "{sums}");
}

/// Story: strict shards lease only for requests that wait, so an import had no turn while clients waited.
#[tokio::test(flavor = "multi_thread")]
async fn strict_shards_import_while_clients_wait() {
    let site = Site::new(&config().set("lease.rows", 0));
    site.fill().await;
    let server = site.start().await;
    let mut load = server.load("int", 8, &[None]);
    load.reach(50).await;
    let (report, conflicts) = import(&server.client(), (0..=LAST).step_by(2)).await;
    assert_eq!(report["marked"].as_u64().unwrap() as usize + conflicts.len(), 3_000);
    let numbers = load.join_numbers().await;
    let even = |number: &i64| number % 2 == 0;
    let issued: BTreeSet<i64> = integers(&numbers).into_iter().filter(even).collect();
    assert!(issued.is_subset(&conflicts), "{:?}", issued.difference(&conflicts));
    server.stop().await;
    verify(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_outlasts_a_kill_and_a_restart() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut taken = server.take("int", Some(500)).await;
    let (report, conflicts) = import(&server.client(), 0..3_000).await;
    assert_eq!(report["known"], 0);
    server.kill().await;
    let server = site.start().await;
    let (again, again_conflicts) = import(&server.client(), 0..3_000).await;
    assert_eq!((&again["known"], &again["marked"]), (&report["marked"], &Value::from(0)));
    assert!(again_conflicts.is_superset(&conflicts));
    assert_sums(&server).await;
    taken.extend(server.drain("int", 2, COUNTS).await);
    missing(&taken, 0..=LAST);
    let issued: BTreeSet<i64> = integers(&taken).into_iter().filter(|n| *n < 3_000).collect();
    assert!(issued.is_subset(&conflicts));
    server.stop().await;
    verify(&site).await;
}

/// Kills a server at random moments of an import. `KILLS=N` sets the number, `KILLS_SEED=N` the seed.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_whose_server_is_killed_is_completed_by_sending_it_again() {
    let variable = |name, other| std::env::var(name).map_or(other, |value| value.parse().unwrap());
    let mut random = ChaCha20Rng::seed_from_u64(variable("KILLS_SEED", 1));
    let site = Site::new(&config());
    site.fill().await;
    let (mut numbers, mut conflicts) = (Vec::new(), BTreeSet::new());
    for round in 0..variable("KILLS", 6) as i64 {
        let server = site.start().await;
        let load = server.load("int", 4, COUNTS);
        let client = server.client();
        let part = lines((0..=LAST).filter(|number| number % 12 == round % 6));
        let sent = tokio::spawn(async move {
            let headers = [("content-type", "text/plain")];
            let _ = client.send_body(Method::POST, USED, &headers, &part).await;
        });
        tokio::time::sleep(Duration::from_micros(random.random_range(0..60_000))).await;
        server.kill().await;
        sent.await.unwrap();
        numbers.extend(load.join_numbers().await);
        verify(&site).await;
        let server = site.start().await;
        let numbers_of_part = (0..=LAST).filter(|number| number % 12 == round % 6);
        conflicts.extend(import(&server.client(), numbers_of_part).await.1);
        server.stop().await;
    }
    let server = site.start().await;
    numbers.extend(server.drain("int", 4, COUNTS).await);
    server.stop().await;
    missing(&numbers, 0..=LAST);
    let issued: BTreeSet<i64> = integers(&numbers).into_iter().filter(|n| n % 12 < 6).collect();
    let after: Vec<_> = issued.difference(&conflicts).collect();
    assert!(after.is_empty(), "issued although they were imported: {after:?}");
    verify(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_beside_imports_has_what_its_ledger_knows() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let client = server.client();
    let importing = tokio::spawn(async move {
        for part in 0..40 {
            import(&client, (0..=LAST).filter(|number| number % 40 == part)).await;
        }
    });
    for copy in 0..3 {
        let finished = run(site.console(&["backup", &format!("copy{copy}")])).await;
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    }
    importing.await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_imports_say_what_to_do_and_change_nothing() {
    let (admin, draw) = (Token::new("admin", "admin").await, Token::new("draw", "draw").await);
    let site = Site::new(&with_tokens(config(), &[&admin, &draw]));
    let server = site.start().await;
    let client = server.client();
    let send = async |token: Option<&Token>, target: &str, content_type: &str, body: &str| {
        let header = token.map(Token::header);
        let mut headers = vec![("content-type", content_type)];
        headers.extend(header.as_deref().map(|header| ("authorization", header)));
        client.send_body(Method::POST, target, &headers, body).await.unwrap()
    };
    let check = |answer: &Answer, status: u16, code: &str, words: &str| {
        answer.assert_status(status);
        let failure: Failure = answer.parse();
        assert_eq!(failure.code, code, "{}", failure.error);
        assert!(failure.error.contains(words), "{}", failure.error);
    };
    let text = "text/plain; charset=utf-8";
    check(&send(None, USED, text, "1").await, 401, "unauthorized", "token");
    check(&send(Some(&draw), USED, text, "1").await, 403, "forbidden", "the scope admin");
    let random = send(Some(&admin), "/random", text, "").await;
    check(&random, 403, "forbidden", "the scope draw");
    let token = &admin;
    let admin = Some(token);
    let wrong = send(admin, USED, text, "1\nx\n6000\n").await;
    check(
        &wrong,
        422,
        "bad_lines",
        "line 2: \"x\" is not a decimal number\nline 3: 6000 is not in",
    );
    let wrong = send(admin, &format!("{USED}?line=100"), text, "x").await;
    check(&wrong, 422, "bad_lines", "line 100: ");
    check(&send(admin, USED, "text/csv", "1,2\nx\n").await, 422, "bad_lines", "line 2: ");
    let wrong = send(admin, &format!("{USED}?line=5"), "text/csv", "1,\"a\n2,b\n").await;
    check(&wrong, 422, "bad_lines", "line 5: a quotation mark is not closed");
    let wrong = send(admin, &format!("{USED}?column=0"), text, "1").await;
    check(&wrong, 422, "bad_lines", "from 1");
    let wrong = send(admin, &format!("{USED}?colour=0"), text, "1").await;
    check(&wrong, 400, "unknown_parameter", "check, column, line, skip");
    check(&send(admin, USED, "application/json", "[1]").await, 415, "not_text", "text/plain");
    let wrong = send(admin, "/pools/none/used", text, "1").await;
    check(&wrong, 400, "unknown_type", "Allowed: int");
    let declare = |token: &Token, bytes: usize| {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        write!(
            stream,
            "POST {USED} HTTP/1.1\r\nhost: localhost\r\nauthorization: {}\r\ncontent-length: {bytes}\r\n\r\n",
            token.header()
        )
        .unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    };
    let response = declare(token, (16 << 20) + 1);
    assert!(
        response.starts_with("HTTP/1.1 413") && response.contains("several requests"),
        "{response}"
    );
    // A token of another scope can't make the server hold a large body.
    let response = declare(&draw, (16 << 10) + 1);
    let is_refused = response.starts_with("HTTP/1.1 403") && response.contains("connection: close");
    assert!(is_refused, "{response}");

    let checked = send(admin, &format!("{USED}?check=true"), text, "1\n2\n").await;
    checked.assert_status(200);
    let report: Value = send(admin, USED, text, &"\n".repeat(16 << 20)).await.parse();
    assert_eq!((&report["marked"], &report["known"]), (&Value::from(0), &Value::from(0)));
    let report: Value =
        send(admin, &format!("{USED}?skip=n"), "text/csv", "n,x\n1,\n2,\n").await.parse();
    assert_eq!((&report["marked"], &report["known"]), (&Value::from(2), &Value::from(0)));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_conflict_has_its_receipt() {
    let site = Site::new(&config());
    let server = site.start().await;
    let client = server.client();
    let headers = [("idempotency-key", "a")];
    let without = integers(&server.take("int", None).await)[0];
    let keyed = client.send_with(Method::POST, "/random", &headers).await.unwrap();
    let keyed = integers(&keyed.numbers())[0];
    let report: Value = post(&client, USED, &lines([keyed, without])).await.parse();
    let conflict = |number, receipt| json!({ "number": number, "receipt": receipt });
    let mut expected = [conflict(keyed, Some(1)), conflict(without, None)];
    expected.sort_by_key(|conflict| conflict["number"].as_i64());
    assert_eq!(report["conflicts"], json!(expected));

    // The command reads the same numbers from standard input.
    let url = format!("http://{}", server.address());
    let words = ["import", "--pool", "int", "--url", &url, "--conflicts", "conflicts.csv", "-"];
    let mut command = site.bare(env!("CARGO_BIN_EXE_tombola"), &words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let numbers = lines([without, keyed]);
    child.stdin.take().unwrap().write_all(numbers.as_bytes()).unwrap();
    let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    for (number, receipt) in [(keyed, "receipt 1"), (without, "no receipt")] {
        let line = format!("conflict: {number} was issued before; {receipt}\n");
        assert!(said.contains(&line), "{line:?} of {said}");
    }
    let csv = fs::read_to_string(site.folder().join("conflicts.csv")).unwrap();
    let mut rows = [(keyed, "1"), (without, "")];
    rows.sort_unstable();
    let rows = rows.map(|(number, receipt)| format!("{number},{receipt}\n"));
    assert_eq!(csv, format!("number,receipt\n{}", rows.concat()));
    server.stop().await;
}

/// Story: a cell was sent as it was, so the server took its two lines for two numbers.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_refuses_a_number_with_a_line_break() {
    let site = Site::new(&config());
    let server = site.start().await;
    let url = format!("http://{}", server.address());
    fs::write(site.folder().join("numbers.txt"), "number,note\n\"12\n34\",\n56,x\n").unwrap();
    let words = ["import", "--pool", "int", "--column", "number", "--url", &url, "numbers.txt"];
    let finished = run(site.bare(env!("CARGO_BIN_EXE_tombola"), &words)).await;
    assert_eq!(finished.status.code(), Some(2), "{}", finished.stdout);
    assert!(finished.stderr.contains("line 2: its number has a line break"), "{}", finished.stderr);
    let (report, _) = import(&server.client(), [12, 34, 56]).await;
    assert_eq!(report["known"], 0, "nothing was imported");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_refuses_imports() {
    let site = Site::new(&config());
    let store = format!("'file://{}'", site.folder().join("store.db").display());
    site.configure(
        &config().set("fleet.store", store).set("fleet.space", "'raffle'").set("fleet.claim", 4096),
    );
    let server = site.start().await;
    let answer = post(&server.client(), USED, "1\n").await;
    answer.assert_status(409);
    let failure: Failure = answer.parse();
    assert_eq!(failure.code, "in_fleet");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_sends_a_large_file_in_parts() {
    let admin = Token::new("admin", "admin").await;
    let config = Config::new().pool("int", 0, 9_999_999, 2, 1_000);
    let site = Site::new(&with_tokens(config, &[&admin]));
    let server = site.start().await;
    let url = format!("http://{}", server.address());
    let words = ["import", "--pool", "int", "--json", "--url", &url, "numbers.txt"];
    let import = async |token: &str| {
        let mut command = site.bare(env!("CARGO_BIN_EXE_tombola"), &words);
        command.env("TOMBOLA_TOKEN", token);
        run(command).await
    };
    // 2.4 MB of lines, some of them blank, and a wrong one at the end: nothing is imported.
    let numbers: String =
        (0..300_000).map(|number| format!("{number}\n{}", "\n".repeat(number % 2))).collect();
    let file = site.folder().join("numbers.txt");
    fs::write(&file, format!("{numbers}x\n")).unwrap();
    let finished = import(&admin.text).await;
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("line 450001: \"x\""), "{}", finished.stderr);
    // Wrong lines of all parts: 2 that the server finds in the first one, 1 that is too long, and 9 in the last one.
    let long = "9".repeat(2_000);
    fs::write(&file, format!("x\n1\ny\n{numbers}{long}\n{}", "z\n".repeat(9))).unwrap();
    let finished = import(&admin.text).await;
    assert_eq!(finished.status.code(), Some(2));
    let (_, said) = finished.stderr.split_once("Error: ").unwrap();
    let lines: Vec<_> = said.lines().map(|line| line.split(':').next().unwrap()).collect();
    let first = ["12 lines are wrong, so nothing was imported", "line 1", "line 3", "line 450004"];
    let last = (450_005..450_012).map(|line| format!("line {line}"));
    assert_eq!(lines, first.map(str::to_owned).into_iter().chain(last).collect::<Vec<_>>());
    let finished = import("tombola_wrong").await;
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("scope admin"), "{}", finished.stderr);

    fs::write(&file, &numbers).unwrap();
    let finished = import(&admin.text).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!((&report["marked"], &report["known"]), (&Value::from(300_000), &Value::from(0)));
    server.stop().await;
    let sums = verify(&site).await;
    assert!(sums.contains("300000 of the issued were imported"), "{sums}");
}
