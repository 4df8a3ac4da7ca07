//! `tombola import`: a number that was issued by other means is never issued, wherever it is when it is imported.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use deadpool_sqlite::rusqlite::Connection;
use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use reqwest::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use support::{Config, Finished, Process, Site, eventually, integers, run};

const LAST: i64 = 2_999;
const LEDGER: &str = "used_numbers_int.db";

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 700).set("lease.rows", 16)
}

/// The report of an import.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    pool: String,
    marked: usize,
    marked_in_shards: usize,
    repeated: usize,
    known: usize,
    issued_before: usize,
    interrupted: bool,
    conflicts: Vec<Conflict>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Conflict {
    number: Box<RawValue>,
    receipt: Option<u64>,
}

impl Report {
    fn conflicts(&self) -> BTreeSet<String> {
        self.conflicts.iter().map(|conflict| conflict.number.get().to_owned()).collect()
    }
}

/// Writes a file of lines for an import.
fn write(site: &Site, text: &str) {
    fs::write(site.folder().join("numbers.txt"), text).unwrap();
}

fn lines(numbers: impl IntoIterator<Item = i64>) -> String {
    numbers.into_iter().map(|number| format!("{number}\n")).collect()
}

/// Imports the file with these flags.
async fn try_import(site: &Site, flags: &[&str]) -> Finished {
    let words = [&["import", "--pool", "int", "--json"], flags, &["numbers.txt"]].concat();
    run(site.console(&words)).await
}

fn report_of(finished: &Finished) -> Report {
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let report: Report = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!((&*report.pool, report.conflicts.len()), ("int", report.issued_before));
    report
}

async fn import(site: &Site, numbers: impl IntoIterator<Item = i64>) -> Report {
    write(site, &lines(numbers));
    report_of(&try_import(site, &[]).await)
}

/// Returns what `tombola verify` prints, and fails if it finds a violation.
async fn verify(site: &Site) -> String {
    let finished = run(site.console(&["verify"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}{}", finished.stdout, finished.stderr);
    finished.stdout
}

fn set(numbers: &[String]) -> BTreeSet<i64> {
    let set: BTreeSet<i64> = integers(numbers).into_iter().collect();
    assert_eq!(set.len(), numbers.len(), "a number came twice");
    set
}

/// Drains the pool. Returns the numbers that are handed out from now on.
async fn drain(site: &Site) -> BTreeSet<i64> {
    let server = site.start().await;
    let numbers = server.drain("int", 2, &[Some(40), None]).await;
    server.stop().await;
    set(&numbers)
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_imported_into_an_empty_folder_are_never_issued() {
    let site = Site::new(&config());
    let report = import(&site, (0..1000).chain([5, 5, 999])).await;
    assert_eq!((report.marked, report.marked_in_shards, report.repeated), (1000, 0, 3));
    assert_eq!((report.known, report.issued_before, report.interrupted), (0, 0, false));
    let sums = verify(&site).await;
    let expected = "1000 issued + 0 pooled + 2000 free = 3000, the range 0 to 2999; 1000 of the issued were \
        imported";
    assert!(sums.contains(expected), "{sums}");

    let again = import(&site, 900..1100).await;
    assert_eq!((again.marked, again.known, again.issued_before), (100, 100, 0));
    assert_eq!(drain(&site).await, (1100..=LAST).collect());
    let sums = verify(&site).await;
    assert!(sums.contains("3000 issued + 0 pooled + 0 free"), "{sums}");
    // No shard has the values any more, but the ledger knows them.
    let again = import(&site, 0..=LAST).await;
    assert_eq!((again.known, again.issued_before, again.marked), (1100, 1900, 0));
}

/// Story: the range was so small that it lay wholly in shards, so an entry in the ledger alone stopped nothing.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_lie_in_shards_are_marked_there() {
    let site = Site::new(&Config::new().pool("int", 0, 999, 2, 500));
    site.fill().await;
    let server = site.start().await;
    let taken = set(&server.take("int", Some(100)).await);
    server.stop().await;

    let report = import(&site, 0..500).await;
    let conflicts: BTreeSet<i64> = taken.iter().copied().filter(|&number| number < 500).collect();
    let marked = 500 - conflicts.len();
    assert_eq!((report.marked, report.marked_in_shards, report.known), (marked, marked, 0));
    assert_eq!(report.conflicts(), conflicts.iter().map(i64::to_string).collect());
    verify(&site).await;

    let again = import(&site, 0..500).await;
    assert_eq!((again.marked, again.known, again.conflicts()), (0, marked, report.conflicts()));
    let rest = drain(&site).await;
    assert_eq!(rest, (500..1000).filter(|number| !taken.contains(number)).collect());
    let again = import(&site, 0..500).await;
    assert_eq!((again.known, again.conflicts()), (marked, report.conflicts()));
}

/// Every number of the range, wherever it is: issued, in a live shard, in a standby, or free.
#[tokio::test(flavor = "multi_thread")]
async fn a_whole_range_is_imported_from_everywhere() {
    let site = Site::new(&config());
    let taken = set(&site.stop_with_standby(700).await);
    let report = import(&site, 0..=LAST).await;
    assert_eq!(report.conflicts(), taken.iter().map(i64::to_string).collect());
    assert_eq!(report.marked, 3000 - taken.len());
    assert!(report.marked_in_shards >= 1260, "{report:?}");
    verify(&site).await;
    let server = site.start().await;
    let answer = server.get("/random").await;
    answer.assert_exhausted();
    server.stop().await;
    verify(&site).await;
}

/// A build that is complete when its process is killed becomes a standby at the next start, or import.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_a_build_that_a_start_would_adopt_are_marked() {
    let site = Site::new(&config());
    let taken = set(&site.stop_with_standby(700).await);
    let standby = site.files(".db.next")[0].clone();
    let unfinished = standby.replace(".next", ".tmp");
    fs::rename(site.file(&standby), site.file(&unfinished)).unwrap();
    // An interrupted import may leave a copy, which a start removes.
    let stray = site.file(&format!("{standby}.tmp"));
    fs::write(&stray, "part of a copy").unwrap();
    let imported: BTreeSet<i64> = (0..=LAST).step_by(2).collect();
    let report = import(&site, imported.iter().copied()).await;
    assert_eq!(report.marked + report.issued_before, imported.len());
    assert!(!stray.exists());
    verify(&site).await;
    let rest = drain(&site).await;
    let expected = (1..=LAST).step_by(2).filter(|number| !taken.contains(number)).collect();
    assert_eq!(rest, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_server_had_leased_counts_as_issued() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut taken = BTreeSet::new();
    for _ in 0..30 {
        taken.extend(set(&server.take("int", None).await));
    }
    server.kill().await;
    let report = import(&site, 0..=LAST).await;
    let conflicts = report.conflicts();
    assert!(taken.iter().all(|number| conflicts.contains(&number.to_string())));
    let burned = report.issued_before - taken.len();
    assert!(burned <= 64, "{report:?}");
    let sums = verify(&site).await;
    assert!(sums.contains(" 0 pooled + 0 free"), "{sums}");
    let server = site.start().await;
    server.get("/random").await.assert_exhausted();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_lines_are_named_and_nothing_is_imported() {
    let site = Site::new(&config());
    let numbers: String = (0..20).map(|number| format!("{number}\nx{number}\n")).collect();
    write(&site, &format!("{numbers}3000\n"));
    let finished = try_import(&site, &[]).await;
    assert_eq!(finished.status.code(), Some(2));
    let said = finished.stderr;
    assert!(
        said.contains("Error: 21 lines are wrong, so nothing was imported\nline 2: \"x0\""),
        "{said}"
    );
    assert!(said.contains("line 20: ") && !said.contains("line 22: "), "{said}");
    assert!(finished.stdout.is_empty() && site.files("").is_empty(), "something was imported");

    write(&site, "7\n3000\n");
    let said = try_import(&site, &[]).await.stderr;
    assert!(said.contains("line 2: 3000 is not in the range 0 to 2999"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_of_a_csv_is_imported() {
    let site = Site::new(&config());
    write(&site, "order,number\n1,10\n\n2,\"11\"\n3,12\n");
    let report = report_of(&try_import(&site, &["--column", "number"]).await);
    assert_eq!((report.marked, report.known), (3, 0));
    let report = report_of(&try_import(&site, &["--column", "2", "--skip", "number"]).await);
    assert_eq!((report.marked, report.known), (0, 3));
    write(&site, "number\n12\n13\n");
    let report = report_of(&try_import(&site, &["--skip", "number"]).await);
    assert_eq!((report.marked, report.known), (1, 1));
    let finished = try_import(&site, &["--column", "code"]).await;
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("no column \"code\"; it has number"), "{}", finished.stderr);
}

/// Story: a quotation mark was not closed, so all later lines were in one cell. The import succeeded without their
/// numbers, and the server issued them.
#[tokio::test(flavor = "multi_thread")]
async fn a_csv_that_can_hide_lines_is_refused() {
    let site = Site::new(&config());
    let column = ["--column", "number"];
    for (text, said) in [
        ("order,number,note\n1,10,\"5 pcs\n2,11,x\n3,12,y\n", "line 2: a quotation mark is not"),
        ("order,number,note\n1,10,\"5 pcs\n2,11,\"x\"\n3,12,y\n", "line 2: text follows a closing"),
        ("number,note\r10,x\r11,y\r", "line 1: a carriage return is not at the end of a line"),
        ("note,number\nx,10\ny,\"11\n12\"\n", "line 3: its number has a line break"),
    ] {
        write(&site, text);
        let finished = try_import(&site, &column).await;
        assert_eq!(finished.status.code(), Some(2), "{text:?}: {}", finished.stdout);
        let expected = format!("Error: 1 line is wrong, so nothing was imported\n{said}");
        assert!(finished.stderr.contains(&expected), "{text:?}: {}", finished.stderr);
        assert!(site.files("").is_empty(), "something was imported");
    }
    write(&site, "number,note\r\n10,\"5 \"\"pcs\"\",\nor 6\"\r\n\"11\",\n");
    let report = report_of(&try_import(&site, &column).await);
    assert_eq!((report.marked, report.known), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_input_is_imported_and_people_get_text() {
    let site = Site::new(&config());
    let mut command = site.console(&["import", "--pool", "int", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"1\n2\n2\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for line in
        ["marked                     2  ", "repeated                   1  ", "note: backups "]
    {
        assert!(said.lines().any(|printed| printed.starts_with(line)), "{line:?} of {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_imported_as_people_write_them() {
    let config = Config::new()
        .set("pools.code.pattern", "'A-###?'")
        .set("pools.code.check", "'damm'")
        .set("pools.code.shards", 2)
        .set("pools.code.shard_size", 400);
    let site = Site::new(&config);
    let server = site.start().await;
    let answer = eventually("codes instead of 503", async || {
        let answer = server.get("/random?type=code&count=10").await;
        (answer.status != 503).then_some(answer)
    })
    .await;
    server.stop().await;
    let taken: serde_json::Value = answer.parse();
    let code = taken["codes"][0].as_str().unwrap();
    let other = code.replace("A-", "a ");
    write(&site, &format!("{code}\n{other}\n"));
    let words = ["import", "--pool", "code", "--json", "numbers.txt"];
    let finished = run(site.console(&words)).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let report: Report = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!((report.repeated, report.issued_before, report.marked), (1, 1, 0));
    assert_eq!(report.conflicts(), BTreeSet::from([format!("\"{code}\"")]));

    let last = code.chars().last().unwrap();
    let wrong = format!("{}{}", &code[..5], if last == '0' { '1' } else { '0' });
    write(&site, &wrong);
    let finished = run(site.console(&words)).await;
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("line 1: the check character"), "{}", finished.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_conflict_has_its_receipt() {
    let site = Site::new(&config());
    let server = site.start().await;
    let keyed = server.client();
    let with_receipt = async |key| {
        let answer = keyed.send_with(Method::POST, "/random", &[("idempotency-key", key)]).await;
        integers(&answer.unwrap().numbers())[0]
    };
    server.take("int", None).await;
    let first = with_receipt("a").await;
    let second = with_receipt("b").await;
    let without = integers(&server.take("int", None).await)[0];
    server.stop().await;
    write(&site, &lines([first, second, without]));
    let report = report_of(&try_import(&site, &["--conflicts", "conflicts.csv"]).await);
    let receipts: BTreeSet<_> = report
        .conflicts
        .iter()
        .map(|conflict| (conflict.number.get().parse::<i64>().unwrap(), conflict.receipt))
        .collect();
    let expected = BTreeSet::from([(first, Some(1)), (second, Some(2)), (without, None)]);
    assert_eq!(receipts, expected);
    let csv = fs::read_to_string(site.folder().join("conflicts.csv")).unwrap();
    let row = |(number, receipt): &(i64, Option<u64>)| {
        format!("{number},{}\n", receipt.map(|seq| seq.to_string()).unwrap_or_default())
    };
    let rows: String = expected.iter().map(row).collect();
    assert_eq!(csv, format!("number,receipt\n{rows}"));

    // The file of an earlier import is not replaced, and nothing is imported then.
    let finished = try_import(&site, &["--conflicts", "conflicts.csv"]).await;
    assert_eq!(finished.status.code(), Some(1));
    assert!(finished.stderr.contains("can't create conflicts.csv"), "{}", finished.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_in_use_or_of_a_fleet_is_refused() {
    let site = Site::new(&config());
    let server = site.start().await;
    write(&site, "1\n");
    let finished = try_import(&site, &[]).await;
    assert_eq!(finished.status.code(), Some(6));
    assert!(finished.stderr.contains("Stop the server"), "{}", finished.stderr);
    server.stop().await;
    let store = format!("'file://{}'", site.folder().join("store.db").display());
    site.configure(&config().set("fleet.store", store).set("fleet.space", "'raffle'"));
    let finished = try_import(&site, &[]).await;
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("other instances of the fleet"), "{}", finished.stderr);
    let finished = run(site.console(&["import", "--pool", "other", "numbers.txt"])).await;
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("no pool \"other\""), "{}", finished.stderr);
}

/// The modes below sharded have no shards, and do not tell imported numbers from issued ones.
#[tokio::test(flavor = "multi_thread")]
async fn the_simpler_modes_never_issue_an_imported_number() {
    for mode in ["simple", "json", "sqlite"] {
        let site = Site::new(
            &Config::new().pool("int", 0, 99, 2, 50).set("server.mode", format!("'{mode}'")),
        );
        let report = import(&site, (0..50).chain([7])).await;
        assert_eq!((report.marked, report.repeated, report.issued_before), (50, 1, 0), "{mode}");
        let server = site.start().await;
        let finished = try_import(&site, &[]).await;
        assert_eq!(finished.status.code(), Some(6), "{mode}: {}", finished.stderr);
        let mut numbers = Vec::new();
        for _ in 0..10 {
            numbers.extend(server.take("int", None).await);
        }
        let numbers = set(&numbers);
        assert!(numbers.iter().all(|number| *number >= 50), "{mode}: {numbers:?}");
        server.stop().await;
        let report = import(&site, 0..100).await;
        assert_eq!((report.marked, report.issued_before), (40, 60), "{mode}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_import_is_named_until_it_is_run_again() {
    let site = Site::new(&config());
    import(&site, 0..10).await;
    let ledger = Connection::open(site.file(LEDGER)).unwrap();
    let open = "UPDATE batches SET closed = 0 WHERE shard = -1";
    assert_eq!(ledger.execute(open, []).unwrap(), 1);
    drop(ledger);
    let said = verify(&site).await;
    assert!(said.contains("an import was interrupted"), "{said}");
    let report = import(&site, 0..10).await;
    assert!(report.interrupted && report.known == 10, "{report:?}");
    let said = verify(&site).await;
    assert!(!said.contains("interrupted"), "{said}");
    assert!(!import(&site, 0..10).await.interrupted);
}

/// Story: the process ended after the ledger had its part, so the numbers in shards were not marked. Kills at random
/// moments rarely hit this one.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_without_its_marks_is_completed_by_running_it_again() {
    let site = Site::new(&config());
    site.fill().await;
    let report = import(&site, (0..=LAST).step_by(2)).await;
    let in_shards = report.marked_in_shards;
    assert!(in_shards > 100, "{report:?}");
    let change = |file: &str, sql: &str| {
        Connection::open(site.file(file)).unwrap().execute_batch(sql).unwrap();
    };
    for shard in ["int_shard_0.db", "int_shard_1.db"] {
        change(
            shard,
            "UPDATE blocks SET unused = unused + (SELECT count(*) FROM numbers, shard
                 WHERE used = 2 AND numbers.id / block_rows = block);
             UPDATE numbers SET used = 0 WHERE used = 2",
        );
    }
    change(LEDGER, "UPDATE batches SET closed = 0 WHERE shard = -1; DELETE FROM imported");

    let again = import(&site, (0..=LAST).step_by(2)).await;
    assert!(again.interrupted, "{again:?}");
    assert_eq!((again.marked, again.marked_in_shards), (in_shards, in_shards), "{again:?}");
    verify(&site).await;
    assert_eq!(drain(&site).await, (1..=LAST).step_by(2).collect());
}

/// The marks are in files that were used up and replaced before the import was run again.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_completed_late_reports_its_marks_as_issued() {
    let site = Site::new(&config());
    site.fill().await;
    let first = import(&site, (0..=LAST).step_by(2)).await;
    Connection::open(site.file(LEDGER))
        .unwrap()
        .execute_batch("UPDATE batches SET closed = 0 WHERE shard = -1; DELETE FROM imported")
        .unwrap();
    assert_eq!(drain(&site).await, (1..=LAST).step_by(2).collect());
    let again = import(&site, (0..=LAST).step_by(2)).await;
    assert!(again.interrupted && first.marked_in_shards > 100, "{first:?} {again:?}");
    assert_eq!((again.marked, again.issued_before), (0, first.marked_in_shards));
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_an_imported_number_that_is_unused() {
    let site = Site::new(&config());
    site.fill().await;
    import(&site, 0..=LAST).await;
    let shard = Connection::open(site.file("int_shard_0.db")).unwrap();
    let value: i64 =
        shard.query_row("SELECT value FROM numbers WHERE id = 0", [], |row| row.get(0)).unwrap();
    shard
        .execute_batch(
            "UPDATE numbers SET used = 0 WHERE id = 0; UPDATE blocks SET unused = unused + 1 WHERE block = 0",
        )
        .unwrap();
    drop(shard);
    let finished = run(site.console(&["verify"])).await;
    assert_eq!(finished.status.code(), Some(1));
    let expected = format!("violation: int_shard_0.db: {value} was imported but is unused");
    assert!(finished.stdout.contains(&expected), "{}", finished.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_and_a_larger_range_keep_what_was_imported() {
    let site = Site::new(&config());
    let taken = set(&site.stop_with_standby(700).await);
    import(&site, (0..=LAST).step_by(3)).await;
    let finished = run(site.console(&["backup", "copy"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    fs::rename(site.data(), site.folder().join("old")).unwrap();
    fs::rename(site.folder().join("copy"), site.data()).unwrap();
    site.configure(&config().pool("int", -100, LAST + 100, 2, 700));
    let rest = drain(&site).await;
    assert!(rest.iter().all(|number| !(0..=LAST).contains(number) || number % 3 != 0));
    assert_eq!(rest.intersection(&taken).count(), 0);
    let again = import(&site, (0..=LAST).step_by(3)).await;
    assert_eq!((again.marked, again.known + again.issued_before), (0, 1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_from_before_an_import_needs_it_again() {
    let site = Site::new(&config());
    let taken = set(&site.stop_with_standby(700).await);
    let finished = run(site.console(&["backup", "copy"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let numbers = || (0..=LAST).step_by(3);
    let first = import(&site, numbers()).await;
    assert!(first.marked > first.marked_in_shards && first.marked_in_shards > 0, "{first:?}");

    fs::rename(site.data(), site.folder().join("old")).unwrap();
    fs::rename(site.folder().join("copy"), site.data()).unwrap();
    let again = import(&site, numbers()).await;
    assert_eq!((again.marked, again.known), (first.marked, 0), "the copy lacked the import");
    assert_eq!(again.conflicts(), first.conflicts());
    verify(&site).await;
    let expected = (0..=LAST).filter(|number| number % 3 != 0 && !taken.contains(number)).collect();
    assert_eq!(drain(&site).await, expected);
}

/// Story: everything was marked, and then the report was lost, because the settings of the receipts were wrong.
#[cfg(feature = "postgres")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_imported_if_the_receipts_can_not_be_read() {
    let site = Site::new(&config());
    let server = site.start().await;
    let taken = integers(&server.take("int", None).await)[0];
    server.stop().await;
    write(&site, &lines(0..=LAST));
    let away = config().set("receipts.store", "'postgres://tombola@127.0.0.1:1/receipts'");
    site.configure(&away.clone().set("receipts.password_file", "'missing'"));
    let finished = try_import(&site, &["--conflicts", "conflicts.csv"]).await;
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    assert!(finished.stderr.contains("missing"), "{}", finished.stderr);
    assert!(!site.folder().join("conflicts.csv").exists());

    // A database that is away costs only the receipts in the report.
    site.configure(&away);
    let report = report_of(&try_import(&site, &[]).await);
    assert_eq!((report.known, report.marked), (0, 2_999), "nothing was imported before");
    assert_eq!(report.conflicts(), BTreeSet::from([taken.to_string()]));
    assert_eq!(report.conflicts[0].receipt, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn exported_numbers_can_be_imported_elsewhere() {
    let (site, other) = (Site::new(&config()), Site::new(&config()));
    let mut taken = set(&site.stop_with_standby(700).await);
    import(&site, 0..100).await;
    let finished = run(site.console(&["export", "--pool", "int", "--issued"])).await;
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let exported: Vec<String> = finished.stdout.lines().map(str::to_owned).collect();
    taken.extend(0..100);
    assert_eq!(set(&exported), taken);
    write(&other, &finished.stdout);
    assert_eq!(report_of(&try_import(&other, &[]).await).marked, taken.len());
    assert_eq!(drain(&other).await.intersection(&taken).count(), 0);
}

/// Kills imports at random moments. `KILLS=N` sets their number, `KILLS_SEED=N` the seed of the moments.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_killed_is_completed_by_running_it_again() {
    let variable = |name, other| std::env::var(name).map_or(other, |value| value.parse().unwrap());
    let mut random = ChaCha20Rng::seed_from_u64(variable("KILLS_SEED", 1));
    let site = Site::new(&config());
    let taken = set(&site.stop_with_standby(700).await);
    let imported: BTreeSet<i64> = (0..=LAST).filter(|number| number % 3 != 0).collect();
    write(&site, &lines(imported.iter().copied()));
    let words = ["import", "--pool", "int", "numbers.txt"];
    let mut interrupted = 0;
    for _ in 0..variable("KILLS", 12) {
        let mut process = Process::spawn(site.console(&words));
        tokio::time::sleep(Duration::from_micros(random.random_range(0..60_000))).await;
        if process.is_running() {
            process.signal(Signal::SIGKILL);
            interrupted += 1;
        }
        process.finish().await;
        verify(&site).await;
    }
    println!("{interrupted} imports were interrupted");
    let report = report_of(&try_import(&site, &[]).await);
    assert_eq!(report.issued_before, taken.intersection(&imported).count());
    assert_eq!(report.marked + report.known + report.issued_before, imported.len());
    verify(&site).await;
    let expected = (0..=LAST).step_by(3).filter(|number| !taken.contains(number)).collect();
    assert_eq!(drain(&site).await, expected);
}
