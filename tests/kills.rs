//! Sends SIGKILL to the real binaries at random moments: while a server starts, fills its first shards,
//! leases, builds, swaps and stops, and while `init-shards` fills.
//!
//! `KILLS=N` sets the number of kills, `KILLS_SEED=N` the seed of their moments.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use support::keyed::{self, Keyed};
use support::{Config, Process, Site, missing};
use tokio::sync::watch;

const SHARDS: u16 = 2;
const LEASE_ROWS: usize = 16;
const CLIENTS: usize = 8;
const COUNTS: &[Option<u32>] = &[None, None, Some(20), None, Some(3)];
const COUNT_MAX: usize = 20;
/// Clients with idempotency keys.
const KEYED_CLIENTS: usize = 4;
/// Far more numbers than all runs hand out.
const LAST: i64 = 1_000_000_000;
/// How many numbers are taken after the last kill, from existing shards and from new fillings.
const AFTER: usize = 5_000;

/// How many numbers one kill may burn: two leases of each shard, and what was on the way to clients or waited for a
/// receipt.
const BURNED_PER_KILL: usize =
    SHARDS as usize * 2 * LEASE_ROWS + CLIENTS * COUNT_MAX + KEYED_CLIENTS * keyed::COUNT as usize;

fn variable(name: &str, other: u64) -> u64 {
    std::env::var(name).map_or(other, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_comes_twice_whenever_the_process_is_killed() {
    let (kills, seed) = (variable("KILLS", 50), variable("KILLS_SEED", 1));
    let config = Config::new().pool("int", 0, LAST, SHARDS, 600).set("lease.rows", LEASE_ROWS);
    let site = Site::new(&config);
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    let mut numbers = Vec::new();
    let mut first_answers = Vec::new();
    let keyed = Keyed::new("int");
    let (_work, working) = watch::channel(true);
    for kill in 0..kills {
        let moment = Duration::from_micros(random.random_range(0..80_000));
        match kill % 5 {
            // The process is killed while it starts or fills.
            phase @ (0 | 1) => {
                let command = if phase == 0 { site.init_shards() } else { site.tombola() };
                let mut process = Process::spawn(command);
                tokio::time::sleep(moment / 2).await;
                if process.is_running() {
                    process.signal(Signal::SIGKILL);
                }
                process.finish().await;
            }
            phase => {
                let started = Instant::now();
                let server = site.start().await;
                numbers.extend(server.take("int", None).await);
                first_answers.push(started.elapsed());
                let load = server.load("int", CLIENTS, COUNTS);
                let keyed_load = keyed.load(&server, KEYED_CLIENTS, &working);
                tokio::time::sleep(moment).await;
                if phase == 4 {
                    server.process.signal(Signal::SIGTERM);
                    tokio::time::sleep(moment / 10).await;
                }
                server.kill().await;
                numbers.extend(load.join_numbers().await);
                keyed_load.join().await;
            }
        }
    }
    let server = site.start().await;
    let mut load = server.load("int", CLIENTS, COUNTS);
    load.reach(AFTER).await;
    keyed.finish(&server).await;
    server.stop().await;
    numbers.extend(load.join_numbers().await);
    let keyed = keyed.numbers();
    println!("{} numbers of {} keys", keyed.len(), keyed.len() / keyed::COUNT as usize);
    numbers.extend(keyed);
    missing(&numbers, 0..=LAST);
    let burned = no_longer_unused(&site) - numbers.len();
    first_answers.sort_unstable();
    println!(
        "{kills} kills, {} numbers, none twice; burned {burned}, {:.1} a kill; from a start to its first \
         response: median {:?}, longest {:?}",
        numbers.len(),
        burned as f64 / kills as f64,
        first_answers[first_answers.len() / 2],
        first_answers[first_answers.len() - 1],
    );
    assert!(burned <= usize::try_from(kills).unwrap() * BURNED_PER_KILL, "{burned} burned");
    assert!(site.files(".damaged-").is_empty(), "a kill must not damage a shard");
}

/// Returns how many numbers the ledger has that no shard can hand out any more: they were issued or burned.
fn no_longer_unused(site: &Site) -> usize {
    let count = |file: &str, sql| support::column::<i64>(&site.file(file), sql)[0];
    let drawn = count("used_numbers_int.db", "SELECT count(*) FROM used_numbers");
    let shards = site.files("int_shard_");
    let shards = shards.iter().filter(|name| name.ends_with(".db") || name.ends_with(".next"));
    let unused: i64 =
        shards.map(|name| count(name, "SELECT count(*) FROM numbers WHERE used = 0")).sum();
    usize::try_from(drawn - unused).unwrap()
}
