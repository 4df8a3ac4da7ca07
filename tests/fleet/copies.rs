//! Folders that were restored from a copy, or cloned, are detected before they hand out numbers that another
//! folder handed out or can hand out.
//!
//! `FLEET_COPIES=N` sets how many copies are made at random moments, `FLEET_SEED=N` the seed of these
//! moments.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::store::{Store, copy_folder};
use crate::support::{Config, Finished, Server, Site, column, eventually, run};
use crate::taking::{Came, NOT_OURS, Takers, take_some};

/// The exit code for a folder that can't be used as it is.
const FOLDER: i32 = 3;

const SHARD_SIZE: u32 = 500;
/// More numbers than the shards hold in one generation, so a copy that could repeat a number would.
const ENOUGH: usize = 1_500;

/// Returns a config with two shards and small leases, so that there are many steps of the fence.
fn config(store: &Store, last: u64) -> Config {
    store.config().pool("int", 0, last, 2, SHARD_SIZE).set("fleet.lease_rows", 32)
}

/// Returns a site with a copy of another site's data.
fn copy_of(site: &Site, config: &Config) -> Site {
    let copy = Site::new(config);
    copy_folder(&site.data(), &copy.data());
    copy
}

/// Returns the partitions that a ledger has drawn from. The range has one stratum in each partition.
fn partitions(ledger: &Path) -> Vec<i64> {
    column(ledger, "SELECT stratum FROM strata")
}

async fn a_restored_copy_is_found_out_at_its_start(store: Store) {
    let config = config(&store, 99_999);
    let mut site = Site::new(&config);
    let mut came = Came::default();
    let mut server = site.start().await;
    came.note(take_some(&mut server, ENOUGH).await, "the folder");
    server.stop().await;
    let copy = copy_of(&site, &config);
    let mut server = site.start().await;
    came.note(take_some(&mut server, ENOUGH).await, "the folder, since the copy");
    server.stop().await;

    site = copy;
    let mut refusing = site.console(&["serve"]);
    refusing.arg("--refuse-if-stale");
    let Finished { status, stderr, .. } = run(refusing).await;
    assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
    assert!(stderr.contains("Error: ") && stderr.contains("copy"), "{stderr}");
    assert!(site.files(".stale-").is_empty(), "a refusal must not change the folder");

    let before = partitions(&site.file("used_numbers_int.db"));
    let mut server = site.start().await;
    // It serves, and reports the copy.
    eventually("a degraded service", async || {
        let health = server.get("/health").await;
        assert!(health.body.contains("copy"), "{}", health.body);
        (health.status == 200).then(|| assert!(health.body.contains("degraded"), "{}", health.body))
    })
    .await;
    let aside = site.files(".stale-");
    for name in ["fleet.json.", "used_numbers_int.db.", "int_shard_0.db.", "int_shard_1.db."] {
        assert!(aside.iter().any(|file| file.starts_with(name)), "{name} is not among {aside:?}");
    }
    came.note(take_some(&mut server, 4 * ENOUGH).await, "the copy");
    let since = partitions(&site.file("used_numbers_int.db"));
    assert!(!since.is_empty() && since.iter().all(|partition| !before.contains(partition)));
    server.stop().await;
    // Its content is now its own, no longer a copy.
    let mut server = site.start().await;
    came.note(take_some(&mut server, ENOUGH).await, "the copy, started again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_copy_is_found_out_by_a_witness() {
    a_restored_copy_is_found_out_at_its_start(Store::witness()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_copy_is_found_out_by_etcd() {
    if let Some(store) = Store::etcd().await {
        a_restored_copy_is_found_out_at_its_start(store).await;
    }
}

async fn one_of_two_that_start_together_hands_out_nothing(store: Store) {
    let config = config(&store, 99_999);
    let site = Site::new(&config);
    let mut came = Came::default();
    let mut server = site.start().await;
    came.note(take_some(&mut server, ENOUGH).await, "the folder");
    server.stop().await;
    let copy = copy_of(&site, &config);
    let (one, other) =
        tokio::join!(Server::start_or_end(site.tombola()), Server::start_or_end(copy.tombola()),);
    let mut issued = Vec::new();
    let take = async |started: Result<Server, Finished>| match started {
        Ok(mut server) => {
            let numbers = take_some(&mut server, ENOUGH).await;
            (numbers, ended(server).await)
        }
        Err(finished) => (Vec::new(), Some(finished)),
    };
    let both = tokio::join!(take(one), take(other));
    for ((numbers, finished), site) in [both.0, both.1].into_iter().zip([&site, &copy]) {
        let is_stale = !site.files(".stale-").is_empty();
        if let Some(Finished { status, stderr, .. }) = finished {
            assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
            assert!(numbers.is_empty(), "it handed out {} numbers before it ended", numbers.len());
        } else if !is_stale {
            issued.push(site.data());
        }
        came.note(numbers, &site.data().display().to_string());
    }
    assert_eq!(issued.len(), 1, "exactly one must continue the folder: {issued:?}");
}

/// Returns how the server ended, if it ended by itself; otherwise kills it.
async fn ended(mut server: Server) -> Option<Finished> {
    if server.process.is_running() {
        server.kill().await;
        return None;
    }
    Some(server.process.finish().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_copies_one_hands_out_nothing_with_a_witness() {
    one_of_two_that_start_together_hands_out_nothing(Store::witness()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_copies_one_hands_out_nothing_with_etcd() {
    if let Some(store) = Store::etcd().await {
        one_of_two_that_start_together_hands_out_nothing(store).await;
    }
}

/// Story: `cp -r` of a folder in use copied the shards first and `fleet.json` a minute later. The fence was
/// up to date, but the shards still had rows that had been handed out by then.
#[tokio::test(flavor = "multi_thread")]
async fn shards_that_are_older_than_the_fence_beside_them_are_not_served() {
    let store = Store::witness();
    let config = store.config().pool("int", 0, 999_999, 1, 20_000).set("fleet.lease_rows", 32);
    let site = Site::new(&config);
    let mut server = site.start().await;
    take_some(&mut server, 200).await;
    server.process.pause();
    let copy = copy_of(&site, &config);
    server.process.signal(Signal::SIGCONT);
    take_some(&mut server, 400).await;
    server.kill().await;
    fs::copy(site.file("fleet.json"), copy.file("fleet.json")).unwrap();

    let mut refusing = copy.console(&["serve"]);
    refusing.arg("--refuse-if-stale");
    let Finished { status, stderr, .. } = run(refusing).await;
    assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
    // The folder itself is intact.
    site.start().await.stop().await;
}

/// How a folder that is being drained is copied.
#[derive(Clone, Copy, Debug)]
enum Taken {
    Paused,
    Killed,
    /// Copied while it runs, so that its files are of different moments.
    Running,
    /// The same, file by file, slowly and in any order.
    RunningFileByFile,
}

/// The fate of the original after the copy.
#[derive(Clone, Copy, Debug)]
enum Original {
    /// Keeps running while the copy is started.
    Beside,
    /// Keeps running, and is killed before the copy is started in its place.
    Before,
    /// Is killed at once.
    Not,
}

async fn copies_at_random_moments_repeat_nothing(store: Store) {
    let variable = |name, other| std::env::var(name).map_or(other, |value| value.parse().unwrap());
    let (copies, seed) = (variable("FLEET_COPIES", 20), variable("FLEET_SEED", 1));
    println!("FLEET_COPIES={copies} FLEET_SEED={seed}");
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    // One partition at a time, because each stale copy uses up its own.
    let config = config(&store, (1 << 30) - 1).set("fleet.claim", 1);
    let site = Site::new(&config);
    let mut came = Came::default();
    let mut outcomes = BTreeMap::<String, usize>::new();
    for round in 0..copies {
        let taken = [Taken::Paused, Taken::Killed, Taken::Running, Taken::RunningFileByFile];
        let taken = *taken.choose(&mut random).unwrap();
        let original = [Original::Beside, Original::Before, Original::Not];
        let original = *original.choose(&mut random).unwrap();
        let whose =
            |who| format!("{who} of round {round}, copied {taken:?}, original {original:?}");

        let mut server = Some(site.start().await);
        let takers = Takers::start(server.as_ref().unwrap());
        tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
        let copy = Site::new(&config);
        take_copy(taken, &mut server, &site.data(), &copy.data(), &mut random).await;
        if matches!(original, Original::Not)
            && let Some(server) = server.take()
        {
            server.kill().await;
        }
        came.note(takers.stop().await, &whose("the folder"));
        if !matches!(original, Original::Not) && server.is_none() {
            server = Some(site.start().await);
        }
        if matches!(original, Original::Before)
            && let Some(mut server) = server.take()
        {
            came.note(take_some(&mut server, ENOUGH).await, &whose("the folder, going on"));
            server.kill().await;
        }

        let beside = async {
            match &mut server {
                Some(server) => take_some(server, ENOUGH).await,
                None => Vec::new(),
            }
        };
        let (original_numbers, (copy_numbers, outcome)) =
            tokio::join!(beside, outcome_of(&copy, taken));
        came.note(original_numbers, &whose("the folder, beside"));
        came.note(copy_numbers, &whose("the copy"));
        if let Some(server) = server
            && let Some(Finished { status, stderr, .. }) = ended(server).await
        {
            assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
            *outcomes.entry("the original ended: the copy was faster".into()).or_default() += 1;
        }
        *outcomes.entry(outcome).or_default() += 1;
        for name in site.files(".stale-") {
            fs::remove_file(site.file(&name)).unwrap();
        }
    }
    println!("{copies} copies, {} numbers, none twice: {outcomes:?}", came.count());
}

async fn take_copy(
    taken: Taken,
    server: &mut Option<Server>,
    from: &Path,
    to: &Path,
    random: &mut ChaCha20Rng,
) {
    match taken {
        Taken::Paused => {
            let process = &server.as_ref().unwrap().process;
            process.pause();
            copy_folder(from, to);
            process.signal(Signal::SIGCONT);
        }
        Taken::Killed => {
            server.take().unwrap().kill().await;
            copy_folder(from, to);
        }
        // `cp` fails if a file is gone before it is copied, which does not matter here.
        Taken::Running => {
            Command::new("cp").arg("-r").args([from, to]).output().unwrap();
        }
        Taken::RunningFileByFile => {
            fs::create_dir(to).unwrap();
            let mut files: Vec<_> = fs::read_dir(from).unwrap().map(|file| file.unwrap()).collect();
            files.shuffle(random);
            for file in files {
                // The file may be gone.
                let _ = fs::copy(file.path(), to.join(file.file_name()));
                tokio::time::sleep(Duration::from_millis(random.random_range(0..50))).await;
            }
        }
    }
}

/// Starts a copy, takes numbers from it, and describes the outcome.
async fn outcome_of(copy: &Site, taken: Taken) -> (Vec<i64>, String) {
    let mixture = matches!(taken, Taken::Running | Taken::RunningFileByFile);
    let kind = if mixture { "copied while it ran" } else { "copied as of one moment" };
    let started = Server::start_or_end(copy.tombola()).await;
    let (numbers, said) = match started {
        Err(Finished { status, stderr, .. }) => {
            assert!(stderr.contains("Error: ") && !stderr.contains("panicked"), "{stderr}");
            let code = status.code().unwrap();
            assert!(
                code == NOT_OURS || mixture && (1..=FOLDER).contains(&code),
                "{code}: {stderr}"
            );
            (Vec::new(), format!("refused at its start with exit code {code}"))
        }
        Ok(mut server) => {
            let stale = !copy.files(".stale-").is_empty();
            let numbers = take_some(&mut server, ENOUGH).await;
            let said = match ended(server).await {
                Some(Finished { status, stderr, .. }) => {
                    assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
                    assert!(stale || numbers.is_empty(), "it handed out {} numbers", numbers.len());
                    "ended at its first step".to_owned()
                }
                None if stale => "found stale at its start".to_owned(),
                None => "went on in the original's place".to_owned(),
            };
            (numbers, said)
        }
    };
    (numbers, format!("{kind}: {said}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_at_random_moments_repeat_nothing_with_a_witness() {
    copies_at_random_moments_repeat_nothing(Store::witness()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_at_random_moments_repeat_nothing_with_etcd() {
    if let Some(store) = Store::etcd().await {
        copies_at_random_moments_repeat_nothing(store).await;
    }
}
