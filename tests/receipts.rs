//! The console's side of receipts, and the life of their file: `tombola receipts`, `verify`, `backup`, folders that
//! are old copies, damaged files, and keys that expire. The promises to callers are in other files.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use deadpool_sqlite::rusqlite::Connection;
use reqwest::Method;
use serde_json::Value;
use support::{
    Answer, Client, Clock, Config, Finished, Server, Site, Token, column, eventually, run, skipped,
    with_tokens,
};
use tokio::task::JoinSet;

const RECEIPTS: &str = "receipts.db";

/// The exit codes for a failure that may pass, for a folder that can't be used as it is, and for one in use.
const FAILED: i32 = 1;
const FOLDER: i32 = 3;
const IN_USE: i32 = 6;

const HOUR: i64 = 3_600;
const MINUTE: i64 = 60;

/// The numbers that make the server write a run of the index.
const RUN_NUMBERS: usize = 1 << 14;

fn config() -> Config {
    Config::new().pool("int", 0, 199_999, 2, 40_000).set("lease.rows", 64)
}

/// Sends a request with a key.
async fn keyed(client: &Client, key: &str, rest: &str) -> Answer {
    let target = format!("/random?type=int{rest}");
    client.send_with(Method::POST, &target, &[("idempotency-key", key)]).await.unwrap()
}

async fn take(server: &Server, key: &str, rest: &str) -> Vec<String> {
    let answer = keyed(&server.client(), key, rest).await;
    answer.assert_status(200);
    answer.numbers()
}

fn is_replayed(answer: &Answer) -> bool {
    answer.assert_status(200);
    answer.header("idempotent-replayed") == Some("true")
}

/// Runs a command that has to succeed, and returns its standard output.
async fn console(site: &Site, words: &[&str]) -> String {
    let Finished { status, stdout, stderr } = run(site.console(words)).await;
    assert_eq!(status.code(), Some(0), "{words:?}: {stdout}{stderr}");
    stdout
}

/// Runs `tombola receipts` with these flags.
async fn receipts(site: &Site, flags: &[&str]) -> String {
    console(site, &[&["receipts"], flags].concat()).await
}

/// Returns the objects of NDJSON.
fn objects(ndjson: &str) -> Vec<Value> {
    ndjson.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn numbers(receipt: &Value) -> Vec<String> {
    receipt["numbers"].as_array().unwrap().iter().map(Value::to_string).collect()
}

/// Returns the fields of CSV (RFC 4180).
fn records(csv: &str) -> Vec<Vec<String>> {
    let record = |line: &str| {
        let (mut fields, mut quoted) = (vec![String::new()], false);
        let mut rest = line.chars().peekable();
        while let Some(c) = rest.next() {
            match c {
                '"' if quoted && rest.next_if_eq(&'"').is_some() => {
                    fields.last_mut().unwrap().push('"')
                }
                '"' => quoted = !quoted,
                ',' if !quoted => fields.push(String::new()),
                c => fields.last_mut().unwrap().push(c),
            }
        }
        fields
    };
    csv.lines().map(record).collect()
}

async fn status(server: &Server) -> Value {
    server.get("/status").await.parse::<Value>()["receipts"].clone()
}

fn known_since(status: &Value) -> SystemTime {
    humantime::parse_rfc3339(status["keys_known_since"].as_str().unwrap()).unwrap()
}

fn change(file: &Path, sql: &str) {
    Connection::open(file)
        .unwrap()
        .execute_batch(sql)
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

fn copy(site: &Site) -> Site {
    let copy = Site::new(&config());
    fs::create_dir(copy.data()).unwrap();
    for name in site.files("") {
        fs::copy(site.file(&name), copy.file(&name)).unwrap();
    }
    copy
}

fn restored(backup: &Path, config: &Config) -> Site {
    let site = Site::new(config);
    fs::rename(backup, site.data()).unwrap();
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_prints_the_same_receipts_while_a_server_runs_and_after() {
    const LABEL: &str = "a \"b\", c";
    let token = Token::new("shop", "draw").await;
    let site = Site::new(&with_tokens(config(), &[&token]));
    site.fill().await;
    let server = site.start().await;
    let (client, authorization) = (server.client(), token.header());
    let send = async |key: Option<&str>, rest: &str| {
        let target = format!("/random?type=int{rest}");
        let mut headers = vec![("authorization", authorization.as_str())];
        headers.extend(key.map(|key| ("idempotency-key", key)));
        let answer = client.send_with(Method::POST, &target, &headers).await.unwrap();
        answer.assert_status(200);
        answer.numbers()
    };
    let given = [
        send(Some("k1"), "&count=5&label=a%20%22b%22,%20c").await,
        send(None, "&label=only").await,
        send(Some("k3"), "").await,
        // Without a key and a label, nothing is recorded.
        send(None, "").await,
    ];

    let ndjson = receipts(&site, &[]).await;
    let found = objects(&ndjson);
    assert_eq!(found.iter().map(numbers).collect::<Vec<_>>(), given[..3]);
    let field = |name: &str| found.iter().map(|receipt| receipt[name].clone()).collect::<Vec<_>>();
    assert_eq!(field("seq"), [1, 2, 3]);
    assert_eq!(field("label"), [LABEL.into(), "only".into(), Value::Null]);
    assert_eq!(field("owner"), ["shop"; 3]);
    assert_eq!(field("count"), [5, 1, 1]);

    let csv = receipts(&site, &["--format", "csv"]).await;
    let rows = records(&csv);
    assert_eq!(rows[0].join(","), "seq,at,pool,owner,token,label,key_digest,number");
    assert_eq!(rows.len(), 1 + 7, "{csv}");
    let of_rows = rows[1..].iter().map(|row| row[7].clone()).collect::<Vec<_>>();
    assert_eq!(of_rows, given[..3].concat());
    for row in &rows[1..6] {
        let expected =
            ["seq", "at", "pool", "owner", "token", "label", "key_digest"].map(|field| {
                let value = &found[0][field];
                value.as_str().map_or_else(|| value.to_string(), str::to_owned)
            });
        assert_eq!(row[..7], expected);
    }
    assert_eq!(
        (&*rows[7][5], &*rows[6][6]),
        ("", ""),
        "the last has no label, the one before no key"
    );

    let table = receipts(&site, &["--format", "table"]).await;
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    assert!(lines[0].starts_with("SEQ  TIME") && lines[0].ends_with("COUNT  NUMBERS"), "{table}");
    let shortened = format!("      5  {}, …", given[0][..3].join(", "));
    assert!(lines[1].contains(LABEL) && lines[1].ends_with(&shortened), "{table}");
    let place = |line: &str, text: &str| line.find(text).unwrap();
    assert_eq!(place(lines[0], "LABEL"), place(lines[1], LABEL), "{table}");

    assert_eq!(
        receipts(&site, &["--after", "1", "--limit", "1"]).await,
        ndjson.split_inclusive('\n').nth(1).unwrap()
    );
    assert_eq!(objects(&receipts(&site, &["--label", LABEL]).await), found[..1]);
    assert_eq!(receipts(&site, &["--label", "nope"]).await, "");
    let of = async |number: &str| receipts(&site, &["--pool", "int", "--number", number]).await;
    assert_eq!(objects(&of(&given[0][3]).await), found[..1]);
    assert_eq!(objects(&of(&given[2][0]).await), found[2..]);
    let unrecorded = site.console(&["receipts", "--pool", "int", "--number", &given[3][0]]);
    let Finished { status, stderr, .. } = run(unrecorded).await;
    assert_eq!(status.code(), Some(FAILED));
    assert!(stderr.contains("no receipt has"), "{stderr}");

    let head = receipts(&site, &["--head"]).await;
    assert_eq!(head, format!("3 {}\n", found[2]["digest"].as_str().unwrap()));
    let before = [&*ndjson, &csv, &table, &head];
    server.stop().await;
    let after = [
        receipts(&site, &[]).await,
        receipts(&site, &["--format", "csv"]).await,
        receipts(&site, &["--format", "table"]).await,
        receipts(&site, &["--head"]).await,
    ];
    assert_eq!(before, after.each_ref().map(String::as_str));
    assert_eq!(objects(&of(&given[0][3]).await), found[..1]);
    assert_eq!(site.files("receipts"), [RECEIPTS], "reading leaves nothing behind");
}

/// More receipts than are read at once, which a reader stops reading after the first one.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_output_is_complete_and_a_closed_pipe_is_no_error() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut clients = JoinSet::new();
    for index in 0..32 {
        let client = server.client();
        clients.spawn(async move {
            let mut taken = BTreeMap::new();
            for round in 0..35 {
                let key = format!("k-{index}-{round}");
                taken.insert(keyed(&client, &key, "").await.numbers()[0].clone(), key);
            }
            // More bytes of numbers than a page has.
            let many = keyed(&client, &format!("many-{index}"), "&count=1000").await.numbers();
            taken.extend(many.into_iter().map(|number| (number, String::new())));
            taken
        });
    }
    let taken: BTreeMap<_, _> = clients.join_all().await.into_iter().flatten().collect();
    assert_eq!(taken.len(), 32 * 1_035);
    let found = objects(&receipts(&site, &[]).await);
    let seqs: Vec<u64> = found.iter().map(|receipt| receipt["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=32 * 36).collect::<Vec<_>>());
    let recorded: BTreeSet<_> = found.iter().flat_map(numbers).collect();
    assert_eq!(recorded, taken.into_keys().collect());
    let rows = receipts(&site, &["--format", "csv"]).await.lines().count();
    assert_eq!(rows, 1 + 32 * 1_035);
    server.stop().await;

    for format in ["ndjson", "csv", "table"] {
        let mut head = Command::new("bash");
        head.current_dir(site.folder()).args(["-c", "set -o pipefail; \"$0\" \"$@\" | head -n 1"]);
        head.arg(env!("CARGO_BIN_EXE_tombola"));
        head.args(["receipts", "--config", "config.toml", "--format", format]);
        let Finished { status, stdout, stderr } = run(head).await;
        assert_eq!((status.code(), stdout.lines().count()), (Some(0), 1), "{format}: {stderr}");
    }
}

/// Returns a stopped site with labelled receipts, whose numbers are in two runs of the index and after them.
async fn site_with_receipts() -> Site {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    for index in 0..40 {
        take(&server, &format!("k-{index}"), &format!("&count=1000&label=order-{index}")).await;
    }
    for index in 40..50 {
        take(&server, &format!("k-{index}"), "").await;
    }
    server.stop().await;
    let indexed: i64 = column(&site.file(RECEIPTS), "SELECT count(*) FROM runs")[0];
    assert!(indexed >= 2 && 40_000 > 2 * RUN_NUMBERS, "there are {indexed} runs");
    site
}

/// Returns the exit code and the output of `tombola verify`.
async fn verify(site: &Site) -> (Option<i32>, String) {
    let finished = run(site.console(&["verify"])).await;
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    (finished.status.code(), finished.stdout + &finished.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_names_each_violation_of_the_receipts() {
    let site = site_with_receipts().await;
    let head = receipts(&site, &["--head"]).await;
    let (code, said) = verify(&site).await;
    assert_eq!(code, Some(0), "{said}");
    let line = format!("receipts: 50 receipts, 40010 numbers, head {head}");
    assert!(said.contains(&line), "{said}");

    let check = async |file: &str, sql: &str, expected: &[&str]| {
        let copy = copy(&site);
        change(&copy.file(file), sql);
        let (code, said) = verify(&copy).await;
        assert_eq!(code, Some(if expected.is_empty() { 0 } else { 1 }), "{sql}: {said}");
        for part in expected {
            assert!(
                said.lines().any(|line| line.starts_with("violation: ") && line.contains(part)),
                "{sql} was not reported as {part:?}:\n{said}"
            );
        }
        said
    };
    let of_receipts = async |sql: &str, expected: &[&str]| check(RECEIPTS, sql, expected).await;

    // The chain.
    let changed =
        &["receipt 5 does not continue the chain after receipt 4: one of them was changed"];
    for column in
        ["at = at + 1", "pool = 2", "caller = 2", "label = 'other'", "label_digest = zeroblob(16)"]
    {
        let others =
            "INSERT INTO pools SELECT 2, name, 3, pattern, alphabet, code_check FROM pools;
                      INSERT INTO callers VALUES (2, 'other', 'other');";
        of_receipts(&format!("{others} UPDATE receipts SET {column} WHERE seq = 5"), changed).await;
    }
    of_receipts("UPDATE receipts SET digest = zeroblob(32) WHERE seq = 5", changed).await;
    of_receipts("UPDATE receipts SET label = NULL, label_salt = NULL WHERE seq = 5", &[]).await;
    of_receipts(
        "DELETE FROM receipts WHERE seq = 7",
        &["receipt 7 is missing", "receipt 7, which does not exist"],
    )
    .await;
    of_receipts(
        "DELETE FROM receipts WHERE seq IN (7, 8, 9)",
        &["the receipts 7 to 9 are missing"],
    )
    .await;
    of_receipts(
        "DELETE FROM receipts WHERE seq > 20",
        &["receipt 50, which does not exist", "but the last one is 20"],
    )
    .await;
    of_receipts(
        "UPDATE receipts SET seq = -1 WHERE seq = 3; UPDATE receipts SET seq = 3 WHERE seq = 4;
         UPDATE receipts SET seq = 4 WHERE seq = -1",
        &[
            "receipt 3 does not continue",
            "receipt 4 does not continue",
            "belongs to receipt 3, which has another key",
            "the index has 34000 numbers, but they differ",
        ],
    )
    .await;
    of_receipts("UPDATE receipts SET numbers = x'00' WHERE seq = 5", &["receipt 5 can't be read"])
        .await;

    // The keys.
    for seq in [1, 20, 50] {
        of_receipts(
            &format!("DELETE FROM keys_1 WHERE seq = {seq}"),
            &[
                "49 keys are kept for the receipts 1 to 50",
                &format!("the key of receipt {seq} is missing"),
            ],
        )
        .await;
    }
    of_receipts(
        "UPDATE keys_1 SET seq = 3 WHERE seq = 2",
        &["belongs to receipt 3, which has another key"],
    )
    .await;
    of_receipts(
        "UPDATE keys_1 SET seq = 99 WHERE seq = 2",
        &["belongs to receipt 99, which does not exist"],
    )
    .await;
    of_receipts(
        "INSERT INTO buckets SELECT 2, 51, began_at, NULL FROM buckets;
         CREATE TABLE keys_2 (key_digest BLOB PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
         INSERT INTO keys_2 SELECT * FROM keys_1 WHERE seq = 9",
        &["belongs to the receipts 9 and 9"],
    )
    .await;
    // After a crash, the latest keys are in no bucket.
    let crash = "DELETE FROM keys_1 WHERE seq > 40; UPDATE state SET keyed_to = 40;";
    of_receipts(crash, &[]).await;
    // Some may be in a bucket already.
    let pass = "DELETE FROM keys_1 WHERE seq > 40 AND seq % 2; UPDATE state SET keyed_to = 40;";
    of_receipts(pass, &[]).await;
    let wrong = format!("{pass} UPDATE keys_1 SET seq = 47 WHERE seq = 44");
    of_receipts(&wrong, &["belongs to the receipts 47 and 44"]).await;
    let unknown = format!("{pass} UPDATE keys_1 SET key_digest = zeroblob(16) WHERE seq = 44");
    of_receipts(&unknown, &["belongs to receipt 44, which has another or none"]).await;
    for other in [9, 44] {
        let again = "UPDATE receipts SET key_digest = (SELECT key_digest FROM receipts WHERE seq =";
        of_receipts(
            &format!("{crash} {again} {other}) WHERE seq = 45"),
            &[&format!("belongs to the receipts {other} and 45")],
        )
        .await;
    }

    // The numbers.
    for (seq, place) in [(1, "in the index"), (45, "after it")] {
        let said = of_receipts(
            &format!(
                "INSERT INTO receipts SELECT 51, at, pool, caller, NULL, NULL, NULL, NULL, numbers, digest
                 FROM receipts WHERE seq = {seq}"
            ),
            &[&format!("of the pool int is in the receipts {seq} and 51")],
        )
        .await;
        let lines = said.matches(" is in the receipts ").count();
        assert_eq!(lines, if seq == 1 { 10 } else { 1 }, "{place}: {said}");
        assert_eq!(said.contains("a number twice: 1000 in all"), seq == 1, "{said}");
    }
    of_receipts(
        "DELETE FROM blocks WHERE rowid = (SELECT min(rowid) FROM blocks)",
        &["numbers, but they differ from the 34000 of the receipts up to 34"],
    )
    .await;
    of_receipts(
        "UPDATE blocks SET first = first + 1 WHERE rowid = 1",
        &["1 blocks of the index are out of order"],
    )
    .await;
    of_receipts(
        "UPDATE state SET indexed_to = 17",
        &["differ from the 17000 of the receipts up to 17"],
    )
    .await;

    // A number that could be handed out again, in the index and after it.
    for seq in [1, 45] {
        let receipt =
            &objects(&receipts(&site, &["--after", &(seq - 1).to_string(), "--limit", "1"]).await)
                [0];
        let number = &numbers(receipt)[0];
        let in_file = |file: &str| {
            let sql = format!("SELECT count(*) FROM numbers WHERE value = {number}");
            column::<i64>(&site.file(file), &sql) == [1]
        };
        let file =
            ["int_shard_0.db", "int_shard_1.db"].into_iter().find(|file| in_file(file)).unwrap();
        let expected =
            format!("{number} of the pool int is in receipt {seq}, but unused in {file}");
        check(file, &format!("UPDATE numbers SET used = 0 WHERE value = {number}"), &[&expected])
            .await;
    }

    // The file.
    of_receipts("PRAGMA application_id = 1", &["it is not a file of receipts"]).await;
    of_receipts("PRAGMA user_version = 9", &["it has format 9"]).await;
    let copy = copy(&site);
    let bytes = fs::read(copy.file(RECEIPTS)).unwrap();
    let label = b"order-17";
    let places: Vec<_> = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(label)).collect();
    let mut found = Vec::new();
    for place in places {
        let mut damaged = bytes.clone();
        damaged[place] ^= 1;
        fs::write(copy.file(RECEIPTS), damaged).unwrap();
        found.push(verify(&copy).await);
    }
    assert!(found.iter().any(|(_, said)| said.contains("row 18 missing from index")), "{found:?}");
    assert!(
        found.iter().any(|(_, said)| said.contains("receipt 18 does not continue")),
        "{found:?}"
    );
}

/// Story: the label was gone from its row, but a page of the index had been split, and its free space still had it.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_label_is_nowhere_in_the_files_and_all_else_stays() {
    let label = |index: usize| format!("customer {index:04} of a shop with a long name");
    let has = |site: &Site, text: &str| {
        let files = site.files(RECEIPTS);
        let mut contents = files.iter().map(|name| fs::read(site.file(name)).unwrap());
        contents.any(|bytes| bytes.windows(text.len()).any(|part| part == text.as_bytes()))
    };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut given = Vec::new();
    for index in 0..300 {
        // Two receipts have each label.
        let rest = format!("&label={}", label(index / 2));
        given.push(take(&server, &format!("k-{index}"), &rest).await);
    }
    let before = receipts(&site, &[]).await;
    let head = receipts(&site, &["--head"]).await;
    let in_use = run(site.console(&["receipts", "--erase-label", &label(0)])).await;
    assert_eq!(in_use.status.code(), Some(IN_USE));
    assert!(in_use.stderr.contains("stop the server"), "{}", in_use.stderr);
    // Without a graceful stop, the log has the labels too.
    server.kill().await;
    assert!(site.files(RECEIPTS).len() > 1);
    assert_eq!(receipts(&site, &[]).await, before);

    for erased in [0, 1, 77, 149] {
        assert!(has(&site, &label(erased)));
        let said = receipts(&site, &["--erase-label", &label(erased)]).await;
        assert!(said.contains("had the label: 2\n") && said.contains("Backups"), "{said}");
        assert!(!has(&site, &label(erased)), "label {erased} is still in a file");
    }
    let said = receipts(&site, &["--erase-label", "nope"]).await;
    assert!(said.contains("had the label: 0\n"), "{said}");
    assert_eq!(site.files(RECEIPTS), [RECEIPTS]);

    let (code, said) = verify(&site).await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(receipts(&site, &["--head"]).await, head);
    let is_erased = |index: usize| [0, 1, 77, 149].contains(&(index / 2));
    let mut expected = objects(&before);
    for (index, receipt) in expected.iter_mut().enumerate().filter(|(index, _)| is_erased(*index)) {
        receipt["label"] = Value::Null;
        assert_eq!(numbers(receipt), given[index]);
    }
    assert_eq!(objects(&receipts(&site, &[]).await), expected);

    // A repetition still gets its numbers, whether its label was erased or not.
    let server = site.start().await;
    for index in [0, 3, 200, 299] {
        let answer =
            keyed(&server.client(), &format!("k-{index}"), &format!("&label={}", label(index / 2)))
                .await;
        assert!(is_replayed(&answer), "{index}");
        assert_eq!(answer.numbers(), given[index]);
    }
    server.stop().await;
}

/// A copy of the receipts has the keys used before it was made, and the copied shards have their numbers used.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_replays_the_keys_used_before_it() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let over = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for index in 0..32 {
        let (client, over, done) = (server.client(), Arc::clone(&over), Arc::clone(&done));
        clients.spawn(async move {
            let mut taken = Vec::new();
            for round in 0.. {
                let stage = over.load(Ordering::SeqCst);
                if stage == 2 {
                    break;
                }
                let key = format!("{index}-{round}");
                let answer = keyed(&client, &key, "&count=3").await;
                answer.assert_status(200);
                let came = over.load(Ordering::SeqCst);
                taken.push((key, stage, came, answer.numbers()));
                done.fetch_add(1, Ordering::SeqCst);
            }
            taken
        });
    }
    let reach = async |more: usize| {
        let enough = done.load(Ordering::SeqCst) + more;
        eventually("keyed requests", async || {
            (done.load(Ordering::SeqCst) >= enough).then_some(())
        })
        .await;
    };
    reach(400).await;
    // Responses that came before the backup began are in it, and requests that began after it are not.
    let begun = done.load(Ordering::SeqCst);
    let to = site.folder().join("copy");
    over.store(1, Ordering::SeqCst);
    let said = console(&site, &["backup", to.to_str().unwrap()]).await;
    assert!(said.contains("idempotency keys that are used from now on"), "{said}");
    let copied: usize = said
        .lines()
        .find_map(|line| line.strip_prefix("receipts: ")?.split(' ').next()?.parse().ok())
        .unwrap();
    assert!(copied >= begun, "{said}");
    let last = done.load(Ordering::SeqCst);
    reach(400).await;
    over.store(2, Ordering::SeqCst);
    let taken: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    server.stop().await;
    assert!(copied < taken.len() && last < taken.len());

    let copy = restored(&to, &config());
    let (code, said) = verify(&copy).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains(&format!("receipts: {copied} receipts, {} numbers", 3 * copied)),
        "{said}"
    );
    let before = SystemTime::now();
    let server = copy.start().await;
    assert!(known_since(&status(&server).await) >= before);
    let in_copy: BTreeSet<String> =
        objects(&receipts(&copy, &[]).await).iter().flat_map(numbers).collect();
    let (mut replayed, mut fresh) = (0, BTreeSet::new());
    for (key, _, came, numbers) in &taken {
        let answer = keyed(&server.client(), key, "&count=3").await;
        if is_replayed(&answer) {
            assert_eq!(answer.numbers(), *numbers, "{key}");
            replayed += 1;
        } else {
            assert!(*came > 0, "{key} was used before the backup");
            fresh.extend(answer.numbers());
        }
    }
    assert_eq!((replayed, fresh.len()), (copied, 3 * (taken.len() - copied)));
    assert!(fresh.is_disjoint(&in_copy), "numbers of copied receipts were handed out again");
    let since = known_since(&status(&server).await);
    server.stop().await;
    let server = copy.start().await;
    assert_eq!(known_since(&status(&server).await), since, "only the first start is a restore");
    server.stop().await;
}

/// In a fleet, a restored folder begins again with other numbers, but the keys that it knows stay valid.
#[tokio::test(flavor = "multi_thread")]
async fn the_receipts_of_an_old_copy_are_carried_over_to_the_new_instance() {
    let store = tempfile::tempdir().unwrap();
    let config = Config::new()
        .pool("int", 0, 99_999, 2, 500)
        .set("fleet.lease_rows", 32)
        .set("fleet.store", format!("'file://{}'", store.path().join("witness.db").display()))
        .set("fleet.space", "'raffle'")
        .set("receipts.store", "'folder'");
    let site = Site::new(&config);
    let server = site.start().await;
    // The first request waits for the first refill.
    server.take("int", None).await;
    let first = take(&server, "first", "&count=5").await;
    server.stop().await;
    let copy = Site::new(&config);
    let copied = Command::new("cp").arg("-r").args([site.data(), copy.data()]).status().unwrap();
    assert!(copied.success());
    let server = site.start().await;
    let second = take(&server, "second", "&count=5").await;
    server.stop().await;

    let before = SystemTime::now();
    let server = copy.start().await;
    server.take("int", None).await;
    assert!(!copy.files("fleet.json.stale-").is_empty(), "it was not found to be a copy");
    assert_eq!(copy.files("receipts"), [RECEIPTS, "receipts.db-shm", "receipts.db-wal"]);
    let since = known_since(&status(&server).await);
    assert!(since >= before, "keys since the copy are not known");
    let answer = keyed(&server.client(), "first", "&count=5").await;
    assert!(is_replayed(&answer));
    assert_eq!(answer.numbers(), first);
    let answer = keyed(&server.client(), "second", "&count=5").await;
    assert!(!is_replayed(&answer));
    assert!(
        answer.numbers().iter().all(|number| !first.contains(number) && !second.contains(number))
    );
    server.stop().await;
    let (code, said) = verify(&copy).await;
    assert_eq!(code, Some(0), "{said}");

    // A crash after the files were set aside, and before the receipts were opened.
    fs::write(copy.file("receipts.db.copied"), "").unwrap();
    let (_, said) = verify(&copy).await;
    assert!(!said.contains("receipts.db.copied"), "{said}");
    let server = copy.start().await;
    assert!(known_since(&status(&server).await) > since);
    assert_eq!(copy.files(".copied"), [""; 0]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_refuses_receipts_that_it_cannot_trust_and_leases_nothing() {
    let site = site_with_receipts().await;
    let intact = fs::read(site.file(RECEIPTS)).unwrap();
    let used = |site: &Site| {
        let files = ["int_shard_0.db", "int_shard_1.db"].map(|name| site.file(name));
        let sql = "SELECT count(*) FROM numbers WHERE used = 1";
        files.iter().map(|file| column::<i64>(file, sql)[0]).sum::<i64>()
    };
    let issued = used(&site);
    let refused = async |what: &str, code: i32, parts: &[&str]| {
        let Err(Finished { status, stderr, .. }) = Server::start_or_end(site.tombola()).await
        else {
            panic!("it serves with {what}");
        };
        assert_eq!(status.code(), Some(code), "{what}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{what}: {part:?} is not in {stderr}");
        }
    };
    let advice = "restore it from a backup";
    for (what, content) in [
        ("an empty file", &b""[..]),
        ("another file", &[b'x'; 8_192]),
        ("half of the file", &intact[..intact.len() / 2]),
    ] {
        fs::write(site.file(RECEIPTS), content).unwrap();
        refused(what, FOLDER, &["receipts.db can't be used: ", advice]).await;
    }
    fs::write(site.file(RECEIPTS), &intact).unwrap();
    change(&site.file(RECEIPTS), "PRAGMA foreign_keys = OFF; DROP TABLE callers");
    refused("a missing table", FOLDER, &["receipts.db can't be used: ", advice]).await;
    fs::write(site.file(RECEIPTS), &intact).unwrap();
    change(&site.file(RECEIPTS), "PRAGMA user_version = 9");
    refused("another version", FOLDER, &["it has format 9", "only that version can use it"]).await;
    let erased = run(site.console(&["receipts", "--erase-label", "order-1"])).await;
    assert_eq!(erased.status.code(), Some(FOLDER), "{}", erased.stderr);
    // A problem that may pass.
    fs::remove_file(site.file(RECEIPTS)).unwrap();
    fs::create_dir(site.file(RECEIPTS)).unwrap();
    refused("a folder of this name", FAILED, &["receipts.db: "]).await;

    fs::remove_dir(site.file(RECEIPTS)).unwrap();
    fs::write(site.file(RECEIPTS), &intact).unwrap();
    let server = site.start().await;
    let answer = keyed(&server.client(), "k-3", "&count=1000&label=order-3").await;
    assert!(is_replayed(&answer));
    server.stop().await;
    assert_eq!(used(&site), issued, "a refused start leased numbers");

    for mode in ["simple", "json", "sqlite"] {
        let other = Site::new(&config().set("server.mode", format!("'{mode}'")));
        fs::create_dir(other.data()).unwrap();
        fs::write(other.file(RECEIPTS), &intact).unwrap();
        let Err(Finished { status, stderr, .. }) = Server::start_or_end(other.tombola()).await
        else {
            panic!("the mode {mode} serves beside receipts");
        };
        assert_eq!(status.code(), Some(FOLDER));
        assert!(stderr.contains("contains receipts.db of the mode sharded"), "{stderr}");
    }
}

#[tokio::test]
async fn check_config_explains_receipts() {
    let remarks = async |config: Config| {
        let shown = console(&Site::new(&config), &["check-config"]).await;
        [
            "sent only after its receipt is saved",
            "an Idempotency-Key are refused",
            "is right only if",
        ]
        .map(|remark| shown.contains(remark))
    };
    let fleet = || {
        config().set("fleet.store", "'file:///elsewhere/witness.db'").set("fleet.space", "'raffle'")
    };
    assert_eq!(remarks(config()).await, [false, false, false]);
    assert_eq!(remarks(config().set("pools.int.receipts", "'all'")).await, [true, false, false]);
    assert_eq!(remarks(fleet()).await, [false, true, false]);
    assert_eq!(remarks(fleet().set("receipts.store", "'folder'")).await, [false, false, true]);
}

/// A server whose clocks the test shifts. Each request has a connection of its own, because the server closes an
/// idle one when its clock jumps.
struct Shifted {
    server: Server,
    clock: Clock,
}

impl Shifted {
    async fn start(site: &Site, clock: Clock) -> Self {
        let mut command = site.tombola();
        clock.set(&mut command);
        // The library reads the offset once in a second. If each look at a clock read it, two threads could read it at
        // the same time, and libfaketime has one buffer for both: one of them would see no offset.
        command.env("FAKETIME_CACHE_DURATION", "1");
        Self { server: Server::start(command).await, clock }
    }

    /// Sends a request with a key when the server's clocks have this offset. After the response, the server may look
    /// at the clock. It has done so once it looked for another key, of a request that gets no numbers.
    async fn at(&self, seconds: i64, key: &str) -> Answer {
        self.clock.shift(seconds);
        let expected = SystemTime::now() + Duration::from_secs(seconds.cast_unsigned());
        eventually("the shifted clock", async || {
            let client = self.server.client().at("127.0.0.1");
            let status = client.send_with(Method::GET, "/status", &[]).await.ok()?;
            let status: Value = status.parse();
            let now = humantime::parse_rfc3339(status["time"].as_str().unwrap()).unwrap();
            let apart = now.duration_since(expected).unwrap_or_else(|error| error.duration());
            (apart < Duration::from_secs(60)).then_some(())
        })
        .await;
        let client = self.server.client().at("127.0.0.1");
        let answer = keyed(&client, key, "").await;
        let header = [("idempotency-key", "other")];
        let target = "/random?type=tiny&count=2";
        let none = client.send_with(Method::POST, target, &header).await.unwrap();
        assert!([410, 503].contains(&none.status), "{}", none.body);
        answer
    }

    async fn is_replayed_at(&self, seconds: i64, key: &str) -> bool {
        is_replayed(&self.at(seconds, key).await)
    }
}

fn config_of_an_hour() -> Config {
    config().set("receipts.keep", "'1h'").pool("tiny", 0, 0, 1, 1)
}

/// A key is honoured for `keep` at least, and for a quarter and two looks more at most.
#[tokio::test(flavor = "multi_thread")]
async fn keys_expire_with_the_bucket_in_which_they_are() {
    let site = Site::new(&config_of_an_hour());
    site.fill().await;
    let Some(clock) = Clock::new(&site) else { return skipped("libfaketime is not installed") };
    let shifted = Shifted::start(&site, clock).await;
    assert!(!shifted.is_replayed_at(0, "a").await);
    assert!(!shifted.is_replayed_at(10 * MINUTE, "b").await);
    // The server looks at the clock after this, and ends the bucket.
    assert!(shifted.is_replayed_at(20 * MINUTE, "b").await);
    assert!(!shifted.is_replayed_at(20 * MINUTE, "c").await);
    // Both keys of the first bucket are honoured for an hour after the last of them.
    for minute in [30, 45, 59, 69] {
        for key in ["a", "b", "c"] {
            assert!(
                shifted.is_replayed_at(minute * MINUTE, key).await,
                "{key} after {minute} minutes"
            );
        }
    }
    // The first request after the hour makes the server look at the clock; the next one finds the result.
    shifted.at(85 * MINUTE, "d").await;
    assert!(!shifted.is_replayed_at(85 * MINUTE, "a").await);
    assert!(!shifted.is_replayed_at(85 * MINUTE, "b").await);
    assert!(shifted.is_replayed_at(85 * MINUTE, "c").await);
    shifted.server.stop().await;
    let (code, said) = verify(&site).await;
    assert_eq!(code, Some(0), "{said}");
}

/// Story: a bucket ended only when a later key needed another one, so a key without followers never expired.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_expires_even_if_no_key_follows_it() {
    let site = Site::new(&config_of_an_hour());
    site.fill().await;
    let Some(clock) = Clock::new(&site) else { return skipped("libfaketime is not installed") };
    let shifted = Shifted::start(&site, clock).await;
    assert!(!shifted.is_replayed_at(0, "a").await);
    for minutes in [16, 40, 75] {
        assert!(shifted.is_replayed_at(minutes * MINUTE, "a").await, "after {minutes} minutes");
    }
    // The bucket ended at the look after 16 minutes. The request after 80 minutes makes the server look again.
    shifted.at(80 * MINUTE, "a").await;
    assert!(!shifted.is_replayed_at(80 * MINUTE, "a").await);
    shifted.server.stop().await;
}

/// A clock that is wrong for a while must not make keys expire.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumped_ahead_postpones_the_expiry() {
    const DAY: i64 = 24 * HOUR;
    let site = Site::new(&config_of_an_hour());
    site.fill().await;
    let Some(clock) = Clock::new(&site) else { return skipped("libfaketime is not installed") };
    let shifted = Shifted::start(&site, clock).await;
    assert!(!shifted.is_replayed_at(0, "a").await);
    assert!(!shifted.is_replayed_at(20 * MINUTE, "b").await);
    let Shifted { server, clock } = shifted;
    server.stop().await;

    // For this process, the clock was a day ahead when it started, and then runs on.
    clock.shift(DAY);
    let shifted = Shifted::start(&site, clock).await;
    shifted.server.process.says("the clock is far ahead of when the server last saw it").await;
    for minutes in [0, 5, 10] {
        for key in ["a", "b"] {
            assert!(
                shifted.is_replayed_at(DAY + minutes * MINUTE, key).await,
                "{key} after {minutes} minutes"
            );
        }
    }
    // It has run on for a quarter of an hour, so it is trusted.
    shifted.at(DAY + 20 * MINUTE, "c").await;
    assert!(!shifted.is_replayed_at(DAY + 20 * MINUTE, "a").await);
    shifted.server.stop().await;
}
