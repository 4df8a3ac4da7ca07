//! `tombola verify` finds each kind of violation, and does not change the folder.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};

use deadpool_sqlite::rusqlite::Connection;
use support::{Config, Site, column, eventually, integers, missing, refusal, run, skipped};

const LAST: i64 = 2_999;
const LEDGER: &str = "used_numbers_int.db";
const SHARD: &str = "int_shard_0.db";

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 700).set("lease.rows", 16)
}

/// Returns the exit code and the standard output.
async fn verify(site: &Site) -> (i32, String) {
    let finished = run(site.console(&["verify"])).await;
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    (finished.status.code().unwrap(), finished.stdout + &finished.stderr)
}

fn copy(site: &Site) -> Site {
    let copy = Site::new(&config());
    fs::create_dir(copy.data()).unwrap();
    for name in site.files("") {
        fs::copy(site.file(&name), copy.file(&name)).unwrap();
    }
    copy
}

/// Returns the names and contents of all files except the lock.
fn contents(site: &Site) -> Vec<(String, Vec<u8>)> {
    let names = site.files("").into_iter().filter(|name| name != "LOCK");
    names.map(|name| (name.clone(), fs::read(site.file(&name)).unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_whose_server_was_killed_is_whole_and_stays_as_it_was() {
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    for _ in 0..840 {
        numbers.extend(server.take("int", None).await);
    }
    eventually("a standby generation", async || site.files(".db.next").first().map(drop)).await;
    let (code, said) = verify(&site).await;
    assert_eq!(code, 6);
    assert!(said.contains("is in use") && said.contains("verify a backup"), "{said}");
    server.kill().await;

    let before = contents(&site);
    assert!(before.iter().any(|(name, bytes)| name.ends_with("-wal") && !bytes.is_empty()));
    let (code, said) = verify(&site).await;
    assert_eq!(code, 0, "{said}");
    assert!(contents(&site) == before, "verify changed a file");

    // 840 numbers were handed out and at most 64 are leased.
    let sums = said.lines().find(|line| line.starts_with("int: ")).unwrap();
    let figures: Vec<i64> =
        sums.split([' ', ';', ',']).filter_map(|word| word.parse().ok()).collect();
    let [issued, pooled, free, range, ..] = figures[..] else { panic!("{sums}") };
    assert!((840..=904).contains(&issued), "{sums}");
    assert_eq!((issued + pooled + free, range), (3000, 3000), "{sums}");

    let server = site.start().await;
    numbers.extend(server.drain("int", 2, &[Some(40), None]).await);
    server.stop().await;
    assert!(missing(&numbers, 0..=LAST) <= 64);
    assert!(site.files(".damaged-").is_empty());
    let (code, said) = verify(&site).await;
    assert_eq!(code, 0, "{said}");
    let taken = i64::try_from(integers(&numbers).len()).unwrap();
    assert!(taken <= 3000 && said.contains("3000 issued + 0 pooled + 0 free = 3000"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_violation_is_named() {
    let site = Site::new(&config());
    let taken = site.stop_with_standby(700).await;
    assert_eq!(verify(&site).await.0, 0);
    let of_0: i64 = column(&site.file(SHARD), "SELECT value FROM numbers WHERE id = 0")[0];
    let of_1: i64 =
        column(&site.file("int_shard_1.db"), "SELECT value FROM numbers WHERE id = 0")[0];
    let used: i64 = column(&site.file(SHARD), "SELECT id FROM numbers WHERE used = 1")[0];
    let in_ledger = format!("value = {of_0}");

    let check = async |file: &str, sql: &str, expected: &[&str]| {
        let copy = copy(&site);
        Connection::open(copy.file(file)).unwrap().execute_batch(sql).unwrap();
        let (code, said) = verify(&copy).await;
        assert_eq!(code, 1, "{sql}: {said}");
        for part in expected {
            assert!(
                said.lines().any(|line| line.starts_with("violation: ") && line.contains(part)),
                "{sql} was not reported as {part:?}:\n{said}"
            );
        }
    };
    check(
        LEDGER,
        &format!("DELETE FROM used_numbers WHERE {in_ledger}"),
        &[
            &format!("{SHARD}: {of_0} is not in the ledger"),
            "values, but they differ",
            "batch 1 has 699 values",
        ],
    )
    .await;
    check(
        LEDGER,
        &format!("UPDATE used_numbers SET batch = 2 WHERE {in_ledger}"),
        &[&format!("{of_0} is in the ledger for batch 2, not for its own, 1"), "batch 2 has 701"],
    )
    .await;
    check(
        LEDGER,
        &format!("UPDATE used_numbers SET batch = 77 WHERE {in_ledger}"),
        &[&format!("{of_0} is of the unknown batch 77")],
    )
    .await;
    check(
        LEDGER,
        &format!("UPDATE used_numbers SET stratum = (stratum + 1) % 4096 WHERE {in_ledger}"),
        &[&format!("{of_0} is in stratum"), "that were drawn"],
    )
    .await;
    check(LEDGER, "UPDATE strata SET digest = digest + 1", &["values, but they differ"]).await;
    // A stratum of this small range has one value.
    check(LEDGER, "UPDATE strata SET count = count + 1", &["more values than there can be"]).await;
    let one_less = "UPDATE strata SET count = 0 WHERE stratum = (SELECT min(stratum) FROM strata)";
    check(LEDGER, one_less, &["values, but its strata have"]).await;
    check(LEDGER, "UPDATE ledger SET count = count + 1", &["values, but its strata have"]).await;
    check(LEDGER, "UPDATE ledger SET hash_key = zeroblob(16)", &["id, key or range"]).await;
    check(LEDGER, "UPDATE batches SET count = 9 WHERE id = 1", &["batch 1 has 700 values, but 9"])
        .await;
    check(LEDGER, "DELETE FROM batches WHERE id = 1", &["does not have its batch 1"]).await;
    check(
        SHARD,
        &format!("UPDATE numbers SET value = {of_1} WHERE id = 0"),
        &[
            &format!("{of_1} is in the ledger for batch 2, not for its own, 1"),
            "the values of block 0 are not",
            "1 numbers of its batch 1 are in the ledger but not in it",
        ],
    )
    .await;
    check(
        SHARD,
        &format!("UPDATE numbers SET value = {of_0} WHERE id = 1"),
        &[&format!("{of_0} is in it twice")],
    )
    .await;
    check(SHARD, "UPDATE numbers SET value = -5 WHERE id = 0", &["-5 is not in the ledger"]).await;
    check(
        SHARD,
        &format!("UPDATE numbers SET used = 0 WHERE id = {used}"),
        &["unused rows, but its record says"],
    )
    .await;
    check(SHARD, "UPDATE numbers SET used = 7 WHERE id = 3", &["row 3 is marked 7"]).await;
    check(SHARD, "UPDATE blocks SET unused = unused + 1 WHERE block = 1", &["its record says"])
        .await;
    check(SHARD, "UPDATE blocks SET checksum = 1 WHERE block = 1", &["the values of block 1"])
        .await;
    check(
        SHARD,
        "DELETE FROM numbers WHERE id = 699",
        &["it has 699 rows, but was built with 700"],
    )
    .await;
    check(SHARD, "UPDATE shard SET idx = 1", &["the ledger has another batch"]).await;
    check(SHARD, "UPDATE shard SET generation = 7", &["the ledger has another batch"]).await;
    check(SHARD, "PRAGMA application_id = 1", &["it is not a shard file"]).await;
    assert_eq!(taken.len(), 840);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_missing_or_foreign_are_named() {
    let site = Site::new(&config());
    site.stop_with_standby(700).await;

    let other = copy(&site);
    fs::copy(other.file(SHARD), other.file("int_shard_7.db")).unwrap();
    let (code, said) = verify(&other).await;
    assert_eq!(code, 1);
    assert!(said.contains("int_shard_7.db: ") && said.contains("renamed or copied"), "{said}");

    let other = copy(&site);
    fs::remove_file(other.file(LEDGER)).unwrap();
    let (code, said) = verify(&other).await;
    assert_eq!(code, 1);
    assert!(said.contains("violation: used_numbers_int.db"), "{said}");

    let other = copy(&site);
    fs::write(other.file("int_shard_0.db.damaged-1"), "x").unwrap();
    fs::write(other.file("notes.txt"), "x").unwrap();
    fs::write(other.file("int_shard_1.db.tmp"), "x").unwrap();
    fs::remove_file(other.file(SHARD)).unwrap();
    let (code, said) = verify(&other).await;
    assert_eq!(code, 0, "{said}");
    for note in [
        "note: int_shard_0.db.damaged-1 was set aside",
        "note: notes.txt is not a file of tombola",
        "note: int_shard_1.db.tmp is an unfinished build",
    ] {
        assert!(said.contains(note), "{said}");
    }

    let empty = Site::new(&config());
    let (code, said) = verify(&empty).await;
    assert_eq!(code, 1);
    assert!(said.contains("there is no folder"), "{said}");
    assert!(!empty.data().exists());
}

/// Story: `verify`, run as root, created a LOCK owned by root, which the service could not open any more. Imports
/// and `init-shards` did the same with other files, and they wrote through links.
#[tokio::test(flavor = "multi_thread")]
async fn what_root_creates_belongs_to_the_owner_of_the_folder() {
    const OTHER: u32 = 12_345;
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return skipped("only root can give a folder to another user");
    }
    let site = Site::new(&config());
    fs::create_dir(site.data()).unwrap();
    chown(site.data(), Some(OTHER), Some(OTHER + 1)).unwrap();
    let elsewhere = site.folder().join("elsewhere");
    fs::write(&elsewhere, "5\n").unwrap();
    for name in ["LOCK", "used_numbers_int.db.tmp"] {
        symlink(&elsewhere, site.file(name)).unwrap();
        assert!(refusal(site.init_shards()).await.contains(name));
        fs::remove_file(site.file(name)).unwrap();
    }
    site.fill().await;
    let import = ["import", "--pool", "int", elsewhere.to_str().unwrap()];
    for words in [&import[..], &["verify"]] {
        let finished = run(site.console(words)).await;
        assert_eq!(finished.status.code(), Some(0), "{}{}", finished.stdout, finished.stderr);
    }
    assert_eq!(fs::metadata(&elsewhere).unwrap().uid(), 0);
    for name in site.files("") {
        let file = fs::symlink_metadata(site.file(&name)).unwrap();
        assert_eq!((file.uid(), file.gid()), (OTHER, OTHER + 1), "{name}");
    }
}

/// A number changed in a file of a stopped server.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_of_a_number_is_found() {
    let site = Site::new(&config());
    site.stop_with_standby(700).await;
    for file in [LEDGER, SHARD] {
        let table = if file == LEDGER { "used_numbers" } else { "numbers" };
        let sql = format!("SELECT value FROM {table} WHERE value > 300 LIMIT 1");
        let value: i64 = column(&site.file(file), &sql)[0];
        let copy = copy(&site);
        let sql = format!("UPDATE OR REPLACE {table} SET value = value ^ 1 WHERE value = {value}");
        let sql = sql.replace("value ^ 1", &(value ^ 1).to_string());
        Connection::open(copy.file(file)).unwrap().execute_batch(&sql).unwrap();
        let (code, said) = verify(&copy).await;
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("violation: "), "{said}");
    }
}
