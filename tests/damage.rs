//! Files that were damaged while no server ran: noticed, or harmless. Never a number twice.
//!
//! `DAMAGE_CASES=N` sets how many random cases are tried, `DAMAGE_SEED=N` the first seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use support::{Config, Server, Site, eventually, integers};

const LAST: i64 = 2_999;

fn config() -> Config {
    Config::new().pool("int", 0, LAST, 2, 700).set("lease.rows", 16)
}

/// A folder whose server was killed in the midst of its work, and the numbers that it handed out.
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
        // One shard has a standby by then, and the logs hold dozens of leases.
        for _ in 0..940 {
            numbers.extend(server.take("int", None).await);
        }
        eventually("a standby generation", async || site.files(".db.next").first().map(drop)).await;
        server.kill().await;
        Self { site, taken: integers(&numbers).into_iter().collect() }
    }

    /// Damages a copy and takes all that a server then hands out. Says what it was caught by.
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

/// Any file that the product wrote. The ledger has a test of its own below.
fn files_to_damage(scene: &Scene) -> Vec<PathBuf> {
    let names = scene.site.files("int").into_iter();
    names
        .filter(|name| !name.ends_with("-shm") && name != "used_numbers_int.db")
        .map(PathBuf::from)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_damaged_no_number_comes_twice() {
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

/// Story: a bit that flipped in a page of the ledger at rest made it forget a number, which came again.
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

/// All numbers that a server on the site hands out, and whether it ended over a damaged ledger: at the
/// start, or when no shard has any and `/health` says why there will be no more.
async fn take_what_comes(site: &Site) -> (Vec<i64>, bool) {
    let Ok(server) = Server::start_or_refusal(site.tombola()).await else {
        return (Vec::new(), true);
    };
    let mut numbers = Vec::new();
    let found = eventually("the end of the range, or of the refills", async || {
        loop {
            let answer = server.get("/random").await;
            match answer.status {
                200 => numbers.extend(answer.numbers()),
                410 => return Some(false),
                _ => {
                    answer.assert_refilling();
                    let health = server.get("/health").await;
                    let damaged = health.body.contains("used_numbers_int.db is damaged");
                    return damaged.then_some(true);
                }
            }
        }
    })
    .await;
    server.stop().await;
    (integers(&numbers), found)
}

/// The last lease of a log is the one whose loss nothing else in the file would show.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_its_end_is_noticed() {
    let scene = Scene::new().await;
    for frames in [1, 2, 7] {
        let outcome = scene.play(|folder| {
            // Behind the last commit lie older frames, whose loss would show nothing. The log's index
            // says at byte 16 how many frames are committed.
            let index = fs::read(folder.join("int_shard_0.db-shm")).unwrap();
            let committed = u32::from_ne_bytes(index[16..20].try_into().unwrap()) as usize;
            edit(&folder.join("int_shard_0.db-wal"), |bytes| {
                bytes.truncate(32 + (committed - frames) * 4120);
            });
        });
        assert_eq!(outcome.await, Ok(Outcome::SetAside), "{frames} frames");
    }
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
    // A log may hold each page that its file ever needs, beside whatever file it lies.
    swap(&[""]).await.unwrap();
    swap(&["-wal"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_set_aside_without_damage() {
    let scene = Scene::new().await;
    assert_eq!(scene.play(|_| {}).await, Ok(Outcome::Harmless));
}
