//! Files that are damaged while no server runs: the damage is noticed or harmless, no number is repeated, and
//! no command panics.
//!
//! `DAMAGE_CASES=N` sets how many random cases are tried, `DAMAGE_SEED=N` the first seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use deadpool_sqlite::rusqlite::Connection;
use nix::sys::signal::Signal;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use support::{Config, Finished, Server, Site, column, eventually, integers, run};

const LAST: i64 = 2_999;

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 700).set("lease.rows", 16)
}

/// A folder whose server was killed while it worked, and the numbers that it handed out.
struct Scene {
    site: Site,
    taken: BTreeSet<i64>,
}

impl Scene {
    async fn new() -> Self {
        let site = Site::new(&config());
        site.fill().await;
        let server = site.start().await;
        let mut numbers = Vec::new();
        // After this, one shard has a standby, and the logs hold dozens of leases.
        for _ in 0..940 {
            numbers.extend(server.take("int", None).await);
        }
        eventually("a standby generation", async || site.files(".db.next").first().map(drop)).await;
        server.kill().await;
        Self { site, taken: integers(&numbers).into_iter().collect() }
    }

    /// Damages a copy and takes all numbers that a server hands out from it. Returns how the damage was
    /// noticed, if it was.
    async fn play(&self, damage: impl FnOnce(&Path)) -> Result<Outcome, String> {
        let copy = Site::new(&config());
        fs::create_dir(copy.data()).unwrap();
        for name in self.site.files("") {
            fs::copy(self.site.file(&name), copy.file(&name)).unwrap();
        }
        damage(&copy.data());
        let Ok(server) = Server::start_or_refusal(copy.tombola()).await else {
            return Ok(Outcome::Refused);
        };
        let numbers = server.drain("int", 2, &[Some(40), None]).await;
        server.stop().await;
        let mut seen = self.taken.clone();
        let again: Vec<i64> = integers(&numbers).into_iter().filter(|n| !seen.insert(*n)).collect();
        if !again.is_empty() {
            return Err(format!("handed out again: {again:?}"));
        }
        let aside = !copy.files(".damaged-").is_empty();
        Ok(if aside { Outcome::SetAside } else { Outcome::Harmless })
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Refused,
    SetAside,
    Harmless,
}

fn variable(name: &str, other: u64) -> u64 {
    std::env::var(name).map_or(other, |value| value.parse().unwrap())
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Returns the live files of the shards. Logs are left out, because a flipped bit in one is not noticed, as
/// the documents say. The ledger has a test of its own below.
fn files_to_damage(scene: &Scene) -> Vec<PathBuf> {
    let names = scene.site.files("int").into_iter();
    names
        .filter(|name| name.ends_with(".db") && name != "used_numbers_int.db")
        .map(PathBuf::from)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_repeats_whatever_file_is_damaged() {
    let scene = Scene::new().await;
    let files = files_to_damage(&scene);
    let first = variable("DAMAGE_SEED", 1);
    let mut outcomes: Vec<Outcome> = Vec::new();
    for seed in first..first + variable("DAMAGE_CASES", 40) {
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let file = files.choose(&mut random).unwrap();
        let kind = random.random_range(0..4);
        let damage = |folder: &Path| {
            edit(&folder.join(file), |bytes| {
                if bytes.is_empty() {
                    return;
                }
                let at = random.random_range(..bytes.len());
                match kind {
                    0 => bytes.truncate(at),
                    1 => bytes[at / 4096 * 4096..].iter_mut().take(4096).for_each(|byte| *byte = 0),
                    _ => bytes[at] ^= 1 << random.random_range(0..8),
                }
            });
        };
        let outcome = scene.play(damage).await;
        let outcome = outcome.unwrap_or_else(|why| {
            panic!("DAMAGE_SEED={seed}, {}, kind {kind}: {why}", file.display())
        });
        outcomes.push(outcome);
    }
    outcomes.sort();
    for part in outcomes.chunk_by(|a, b| a == b) {
        println!("{:?}: {}", part[0], part.len());
    }
}

/// Story: a bit flipped at rest in a page of the ledger, which then lacked a number, and the number was
/// issued again.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_changed_at_rest_is_not_drawn_from() {
    let site = Site::new(&config());
    let taken: BTreeSet<i64> = integers(&site.stop_with_standby(700).await).into_iter().collect();
    let (mut noticed, mut harmless) = (0, 0);
    let first = variable("DAMAGE_SEED", 1);
    for seed in first..first + variable("DAMAGE_CASES", 40) / 4 {
        let copy = Site::new(&config());
        fs::create_dir(copy.data()).unwrap();
        for name in site.files("") {
            fs::copy(site.file(&name), copy.file(&name)).unwrap();
        }
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        edit(&copy.file("used_numbers_int.db"), |bytes| {
            let at = random.random_range(..bytes.len());
            bytes[at] ^= 1 << random.random_range(0..8);
        });
        let (numbers, found) = take_what_comes(&copy).await;
        let mut seen = taken.clone();
        let again: Vec<i64> = numbers.into_iter().filter(|n| !seen.insert(*n)).collect();
        assert!(again.is_empty(), "DAMAGE_SEED={seed}: handed out again: {again:?}");
        if found { noticed += 1 } else { harmless += 1 }
    }
    println!("noticed: {noticed}, harmless: {harmless}");
}

/// Returns all numbers that a server on the site hands out, and whether a damaged ledger stopped it: either
/// it refuses to start, or its shards run dry and `/status` reports the damage.
async fn take_what_comes(site: &Site) -> (Vec<i64>, bool) {
    let Ok(server) = Server::start_or_refusal(site.tombola()).await else {
        return (Vec::new(), true);
    };
    let mut numbers = Vec::new();
    let found = eventually("the end of the range or of the refills", async || {
        loop {
            let answer = server.get("/random").await;
            match answer.status {
                200 => numbers.extend(answer.numbers()),
                410 => return Some(false),
                _ => {
                    answer.assert_refilling();
                    let status = server.get("/status").await;
                    let damaged = status.body.contains("used_numbers_int.db is damaged");
                    return damaged.then_some(true);
                }
            }
        }
    })
    .await;
    server.stop().await;
    (integers(&numbers), found)
}

/// Returns a config with the default range of `int`, whose numbers take all eight bytes of an SQLite integer.
fn default_range() -> Config {
    Config::new().pool("int", 0, 9_007_199_254_740_991_i64, 2, 700).set("lease.rows", 16)
}

fn copy_of(site: &Site) -> Site {
    let copy = Site::new(&default_range());
    fs::create_dir(copy.data()).unwrap();
    for name in site.files("") {
        fs::copy(site.file(&name), copy.file(&name)).unwrap();
    }
    copy
}

/// Returns a value that the query finds, and its only place in the file. Values whose bytes are found twice
/// are skipped: SQLite leaves copies in the unused part of a page that it has split.
fn place_of_one(path: &Path, query: &str) -> (i64, usize) {
    let bytes = fs::read(path).unwrap();
    let place = |value: i64| {
        let wanted = value.to_be_bytes();
        let mut places = (0..bytes.len() - 7).filter(|&at| bytes[at..at + 8] == wanted);
        let place = places.next()?;
        places.next().is_none().then_some((value, place))
    };
    column(path, query).into_iter().find_map(place).unwrap()
}

/// Runs `backup` and `verify` on a damaged folder. They may fail but must not panic. Returns the exit code of
/// `verify` and its output.
async fn look_at(site: &Site, shown: &str) -> (i32, String) {
    let to = site.folder().join("copy");
    for words in [&["backup", to.to_str().unwrap()][..], &["verify"]] {
        let Finished { status, stdout, stderr } = run(site.console(words)).await;
        assert!(!stderr.contains("panicked"), "{shown}: {words:?}: {stderr}");
        let code = status.code().unwrap_or_else(|| panic!("{shown}: {words:?}: {status}"));
        assert!(code <= 1, "{shown}: {words:?}: {code}: {stderr}");
        if words == ["verify"] {
            return (code, stdout + &stderr);
        }
    }
    unreachable!("verify is the last command")
}

/// Story: the sign of one number flipped. Its text was longer than that of any number in the range, and
/// `verify`, `backup` and the refiller panicked.
#[tokio::test(flavor = "multi_thread")]
async fn a_sign_that_flips_is_reported_and_ends_no_task() {
    let site = Site::new(&default_range());
    site.stop_with_standby(700).await;
    let used = place_of_one(
        &site.file("used_numbers_int.db"),
        "SELECT value FROM used_numbers WHERE value > 281474976710656",
    );
    let unused = place_of_one(
        &site.file("int_shard_0.db"),
        "SELECT value FROM numbers WHERE NOT used AND value > 281474976710656",
    );
    for (file, (value, place)) in [("used_numbers_int.db", used), ("int_shard_0.db", unused)] {
        let copy = copy_of(&site);
        edit(&copy.file(file), |bytes| bytes[place] ^= 0x80);
        let flipped = (value ^ i64::MIN).to_string();
        let (code, said) = look_at(&copy, file).await;
        assert_eq!(code, 1, "{file}: {said}");
        assert!(said.contains(&flipped), "{file}: {flipped} is not in\n{said}");
    }

    // Each refill reads a part of the ledger, until one reads the damaged part.
    let copy = copy_of(&site);
    edit(&copy.file("used_numbers_int.db"), |bytes| bytes[used.1] ^= 0x80);
    let server = copy.start().await;
    let use_up = async {
        loop {
            server.get("/random?count=100").await;
        }
    };
    tokio::select! {
        () = server.process.says("used_numbers_int.db is damaged") => {}
        () = use_up => {}
    }
    let health = server.get("/health").await;
    assert!(!health.body.contains("died"), "{}", health.body);
    server.stop().await;
}

/// A damaged file can hold counts whose sum overflows.
#[tokio::test(flavor = "multi_thread")]
async fn counts_of_any_size_are_reported_and_end_no_command() {
    let site = Site::new(&default_range());
    site.stop_with_standby(700).await;
    let max = i64::MAX;
    for (file, sql) in [
        ("used_numbers_int.db", format!("UPDATE batches SET count = {max}")),
        ("used_numbers_int.db", format!("UPDATE strata SET count = {max}")),
        ("used_numbers_int.db", format!("UPDATE ledger SET burned = {max}")),
        ("used_numbers_int.db", "UPDATE ledger SET min = -9223372036854775808".to_owned()),
        ("used_numbers_int.db", "UPDATE ledger SET decimals = 255".to_owned()),
        ("int_shard_0.db", "UPDATE shard SET block_rows = 4294967295".to_owned()),
        ("int_shard_0.db", format!("UPDATE shard SET open_rows = {max}, leases = {max}")),
        ("int_shard_0.db", format!("UPDATE shard SET rows = {max}, generation = {max}")),
        ("int_shard_0.db", "UPDATE blocks SET block = 4294967295 WHERE block = 1".to_owned()),
        ("int_shard_0.db", "UPDATE blocks SET unused = 4294967295".to_owned()),
    ] {
        let copy = copy_of(&site);
        Connection::open(copy.file(file)).unwrap().execute_batch(&sql).unwrap();
        look_at(&copy, &sql).await;
        let Ok(mut server) = Server::start_or_refusal(copy.tombola()).await else { continue };
        for _ in 0..14 {
            server.get("/random?count=100").await;
        }
        let health = server.get("/health").await;
        assert!(!health.body.contains("died"), "{sql}: {}", health.body);
        server.process.signal(Signal::SIGTERM);
        let Finished { status, stderr, .. } = server.process.finish().await;
        assert!(status.success() && !stderr.contains("panicked"), "{sql}: {status}: {stderr}");
    }
}

/// Flips a random bit in a random file, with the default range. No command panics, and a server that starts
/// repeats no number.
#[tokio::test(flavor = "multi_thread")]
async fn no_bit_that_flips_makes_a_command_panic() {
    let site = Site::new(&default_range());
    let taken: BTreeSet<i64> = integers(&site.stop_with_standby(700).await).into_iter().collect();
    let files: Vec<String> = site.files("int").into_iter().collect();
    let (mut noticed, mut harmless) = (0, 0);
    let first = variable("DAMAGE_SEED", 1);
    for seed in first..first + variable("DAMAGE_CASES", 40) {
        let copy = copy_of(&site);
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let file = files.choose(&mut random).unwrap();
        edit(&copy.file(file), |bytes| {
            let at = random.random_range(..bytes.len());
            bytes[at] ^= 1 << random.random_range(0..8);
        });
        let shown = format!("DAMAGE_SEED={seed}, {file}");
        let (code, _) = look_at(&copy, &shown).await;
        if code == 0 {
            harmless += 1
        } else {
            noticed += 1
        }
        let Ok(server) = Server::start_or_refusal(copy.tombola()).await else { continue };
        let mut seen = taken.clone();
        for _ in 0..20 {
            let answer = server.get("/random?count=50").await;
            if answer.status == 200 {
                let numbers = integers(&answer.numbers()).into_iter();
                let again: Vec<i64> = numbers.filter(|n| !seen.insert(*n)).collect();
                assert!(again.is_empty(), "{shown}: handed out again: {again:?}");
            }
        }
        server.stop().await;
    }
    println!("noticed: {noticed}, harmless: {harmless}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_gone_is_noticed() {
    let scene = Scene::new().await;
    for (file, expected) in
        [("int_shard_0.db-wal", Outcome::SetAside), ("int_shard_1.db-wal", Outcome::SetAside)]
    {
        let outcome = scene.play(|folder| fs::remove_file(folder.join(file)).unwrap()).await;
        assert_eq!(outcome, Ok(expected), "{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_changed_places_are_refused() {
    let scene = Scene::new().await;
    let swap = |suffixes: &'static [&str]| {
        scene.play(move |folder| {
            for suffix in suffixes {
                let [a, b] = [0, 1].map(|i| folder.join(format!("int_shard_{i}.db{suffix}")));
                let other = folder.join("other");
                fs::rename(&a, &other).unwrap();
                fs::rename(&b, &a).unwrap();
                fs::rename(&other, &b).unwrap();
            }
        })
    };
    assert_eq!(swap(&["", "-wal"]).await, Ok(Outcome::Refused));
    assert_eq!(swap(&["", "-wal", "-shm"]).await, Ok(Outcome::Refused));
    // A log may hold every page that is needed, whichever file it lies beside, so any outcome without a
    // repeat is right.
    swap(&[""]).await.unwrap();
    swap(&["-wal"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_set_aside_without_damage() {
    let scene = Scene::new().await;
    assert_eq!(scene.play(|_| {}).await, Ok(Outcome::Harmless));
}
