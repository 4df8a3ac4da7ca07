//! Three instances, a store of several nodes, 64 clients for each instance, and random faults at random
//! moments. No number is repeated, every instance recovers, and an instance that is cut off serves the rows
//! that it has leased. Knows nothing of the engines: each brings the faults of its nodes.
//!
//! `FLEET_SECONDS=N` sets the duration, `FLEET_SEED=N` the seed of the faults.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha20Rng;
use tokio::sync::watch;

use crate::etcd::{self, Cluster};
use crate::instance::{CLIENTS, Instance, Pool, serve_again};
use crate::links::Cut;
use crate::postgres::Pair;
use crate::seen::{LAST, Seen};
use crate::store::in_fleet;
use crate::support::{Config, skipped};

const INSTANCES: usize = 3;
/// The rows of a lease. The leases of two shards last about two seconds here, so that there are many steps of
/// the fence, and a cut of eight seconds outlasts them.
const LEASE_ROWS: usize = 1_000;
/// A 64th of all partitions: on average, two instances that claim at the same moment compete for one
/// partition. An instance that was found stale claims more.
const CLAIM: usize = 64;
const SHARDS: u16 = 2;
const SHARD_SIZE: u32 = 20_000;
/// How long a fault lasts, and the pause after it, in milliseconds.
const FAULT_MS: std::ops::Range<u64> = 200..8_000;
const QUIET_MS: std::ops::Range<u64> = 0..1_000;
const HOUR_SECONDS: i64 = 3_600;

/// A store, with a link for each client in front of each of its nodes, and the faults of these nodes.
pub(crate) trait Engine {
    type Fault: Copy + Debug + 'static;

    /// The nodes, for the report.
    const NODES: &str;
    /// The count of nodes.
    const COUNT: usize;
    /// Whether it can also keep the receipts.
    const HAS_RECEIPTS: bool;
    /// All faults, each created from a node and a cut. A fault that is listed twice is twice as frequent.
    const FAULTS: &[fn(usize, Cut) -> Self::Fault];

    /// Returns the name of the fault in the table.
    fn kind(fault: Self::Fault) -> String;

    /// Returns whether no client can write during the fault.
    fn stops_writes(fault: Self::Fault) -> bool;

    async fn begin_fault(&mut self, fault: Self::Fault);

    async fn end_fault(&mut self, fault: Self::Fault);

    /// Returns the store's address for the client of this name, which has links of its own.
    async fn address_for(&mut self, client: &str) -> String;

    /// Cuts all links of a client.
    fn cut_off(&self, client: &str, cut: Cut);

    fn heal(&self, client: &str);
}

/// The faults of the instance of this number, or of the store.
#[derive(Clone, Copy, Debug)]
enum Fault<S> {
    InstanceKilled(usize),
    InstanceStopped(usize),
    InstancePaused(usize),
    InstanceCopied(usize),
    InstanceCutOff(usize, Cut),
    ClockShifted(usize, i64),
    Store(S),
}

impl<S: Copy> Fault<S> {
    /// Returns the name of the fault in the table.
    fn kind<E: Engine<Fault = S>>(self) -> String {
        match self {
            Self::InstanceKilled(_) => "instance killed (-9)".into(),
            Self::InstanceStopped(_) => "instance stopped and started".into(),
            Self::InstancePaused(_) => "instance paused (SIGSTOP)".into(),
            Self::InstanceCopied(_) => "instance stopped, and started beside a copy".into(),
            Self::InstanceCutOff(_, cut) => {
                format!("instance cut off from the store, {}", how(cut))
            }
            Self::ClockShifted(..) => "instance's clock shifted by an hour".into(),
            Self::Store(fault) => E::kind(fault),
        }
    }

    /// Returns whether the fault only keeps the instance from the store.
    fn cuts_off<E: Engine<Fault = S>>(self, instance: usize) -> bool {
        match self {
            Self::InstanceCutOff(index, _) => index == instance,
            Self::Store(fault) => E::stops_writes(fault),
            _ => false,
        }
    }

    fn is_of_store(self) -> bool {
        matches!(self, Self::Store(_))
    }

    fn random<E: Engine<Fault = S>>(random: &mut ChaCha20Rng, clocks: bool) -> Self {
        let (instance, node) =
            (random.random_range(0..INSTANCES), random.random_range(0..E::COUNT));
        let cut = *[Cut::Refused, Cut::Silent, Cut::Mute].choose(random).unwrap();
        let hour = *[-HOUR_SECONDS, HOUR_SECONDS].choose(random).unwrap();
        match random.random_range(0..7 + E::FAULTS.len() + usize::from(clocks)) {
            0 => Self::InstanceKilled(instance),
            1 => Self::InstanceStopped(instance),
            2 => Self::InstancePaused(instance),
            // The most revealing fault, so it is more frequent.
            3..6 => Self::InstanceCutOff(instance, cut),
            6 => Self::InstanceCopied(instance),
            other => match E::FAULTS.get(other - 7) {
                Some(fault) => Self::Store(fault(node, cut)),
                None => Self::ClockShifted(instance, hour),
            },
        }
    }
}

pub(crate) fn how(cut: Cut) -> &'static str {
    match cut {
        Cut::Refused => "refused",
        Cut::Silent => "silent",
        Cut::Mute => "responses lost",
    }
}

/// The outcomes of all faults of a kind.
#[derive(Default)]
struct Outcomes {
    count: usize,
    /// How long instances that were cut off served before they first refused a request.
    served: Vec<Duration>,
    /// The count of instances that served until the fault ended.
    served_all_along: usize,
    /// The time from the end of the fault until all instances served fully again.
    whole_again: Vec<Duration>,
}

struct Fleet<E> {
    store: E,
    instances: Vec<Instance>,
}

impl<E: Engine> Fleet<E> {
    async fn begin(&mut self, fault: Fault<E::Fault>) {
        match fault {
            Fault::InstanceKilled(index) => self.instances[index].end(Signal::SIGKILL).await,
            Fault::InstanceStopped(index) | Fault::InstanceCopied(index) => {
                self.instances[index].end(Signal::SIGTERM).await;
            }
            Fault::InstancePaused(index) => self.instances[index].signal(Signal::SIGSTOP),
            Fault::InstanceCutOff(index, cut) => {
                self.store.cut_off(&self.instances[index].name, cut);
            }
            Fault::ClockShifted(index, seconds) => self.instances[index].shift_clock(seconds),
            Fault::Store(fault) => self.store.begin_fault(fault).await,
        }
    }

    async fn end(&mut self, fault: Fault<E::Fault>) {
        match fault {
            Fault::InstanceKilled(index) | Fault::InstanceStopped(index) => {
                self.instances[index].start().await;
            }
            Fault::InstanceCopied(index) => self.instances[index].start_beside_a_copy().await,
            Fault::InstancePaused(index) => self.instances[index].signal(Signal::SIGCONT),
            Fault::InstanceCutOff(index, _) => self.store.heal(&self.instances[index].name),
            Fault::ClockShifted(index, _) => self.instances[index].shift_clock(0),
            Fault::Store(fault) => self.store.end_fault(fault).await,
        }
    }

    /// Waits while the fault lasts, and returns after how long each instance first refused a request.
    async fn last(&mut self, time: Duration) -> Vec<Option<Duration>> {
        let turned_away = |instance: &Instance| instance.tally.unavailable.load(Ordering::SeqCst);
        let before: Vec<_> = self.instances.iter().map(turned_away).collect();
        let mut first = vec![None; INSTANCES];
        let began = Instant::now();
        while began.elapsed() < time {
            for (index, instance) in self.instances.iter_mut().enumerate() {
                instance.assert_running().await;
                if first[index].is_none() && turned_away(instance) > before[index] {
                    first[index] = Some(began.elapsed());
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        first
    }
}

fn variable(name: &str, other: u64) -> u64 {
    std::env::var(name).map_or(other, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_comes_twice_whatever_happens_to_a_fleet_on_etcd() {
    if etcd::is_there() {
        no_number_comes_twice(Cluster::start(Cluster::COUNT).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_comes_twice_whatever_happens_to_a_fleet_on_postgres() {
    if let Some(pair) = Pair::start(&[]).await {
        no_number_comes_twice(pair).await;
    }
}

async fn no_number_comes_twice<E: Engine>(store: E) {
    let (seconds, seed) = (variable("FLEET_SECONDS", 60), variable("FLEET_SEED", 1));
    println!("FLEET_SECONDS={seconds} FLEET_SEED={seed}");
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    let pools = [("int", 0), ("float", 6)];
    let pools = pools.map(|(name, decimals)| {
        Arc::new(Pool { name, decimals, seen: Seen::new(), keyed: Mutex::default() })
    });
    let (stop, stopped) = watch::channel(false);

    let mut fleet = Fleet { store, instances: Vec::new() };
    for index in 0..INSTANCES {
        let name = format!("instance-{index}");
        let address = fleet.store.address_for(&name).await;
        let mut config = in_fleet(Config::new(), &address)
            .int_and_float(LAST, SHARDS, SHARD_SIZE)
            .set("fleet.claim", CLAIM)
            .set("fleet.lease_rows", LEASE_ROWS);
        if E::HAS_RECEIPTS {
            config = config.set("receipts.store", format!("'{address}'"));
        }
        fleet.instances.push(Instance::new(name, &config, &pools, &stopped, E::HAS_RECEIPTS));
    }
    // The instances start at the same time, so they create the space together and compete for partitions.
    let [one, two, three] = fleet.instances.as_mut_slice() else { unreachable!() };
    tokio::join!(one.start(), two.start(), three.start());
    let clocks = fleet.instances[0].has_clock();
    if !clocks {
        skipped("libfaketime is not installed: no clock is shifted");
    }

    serve_again(&mut fleet.instances, Instant::now()).await;
    let began = Instant::now();
    let mut outcomes = BTreeMap::<String, Outcomes>::new();
    while began.elapsed() < Duration::from_secs(seconds) {
        let mut faults = vec![Fault::random::<E>(&mut random, clocks)];
        // Sometimes a fault of the store coincides with one of an instance.
        let second = Fault::random::<E>(&mut random, clocks);
        if second.is_of_store() != faults[0].is_of_store() && random.random_bool(0.5) {
            faults.push(second);
        }
        let time = Duration::from_millis(random.random_range(FAULT_MS));
        for &fault in &faults {
            fleet.begin(fault).await;
        }
        let first = fleet.last(time).await;
        let ended = Instant::now();
        // The store's faults end first, because instances need it to start.
        faults.sort_by_key(|fault| !fault.is_of_store());
        for &fault in &faults {
            fleet.end(fault).await;
        }
        let whole_again = serve_again(&mut fleet.instances, ended).await;
        for pool in &pools {
            pool.seen.assert_no_repeats();
        }
        println!(
            "{}, {:>3} s: {faults:?} for {time:?}, whole again after {whole_again:?}",
            E::NODES,
            began.elapsed().as_secs()
        );
        let kind = faults.iter().map(|fault| fault.kind::<E>()).collect::<Vec<_>>().join(" + ");
        let outcome = outcomes.entry(kind).or_default();
        outcome.count += 1;
        outcome.whole_again.push(*whole_again.iter().max().unwrap());
        for (index, first) in first.into_iter().enumerate() {
            if faults.iter().all(|fault| fault.cuts_off::<E>(index)) {
                outcome.served.extend(first);
                outcome.served_all_along += usize::from(first.is_none());
            }
        }
        let quiet = Duration::from_millis(random.random_range(QUIET_MS));
        fleet.last(quiet).await;
    }

    stop.send_replace(true);
    // A response that comes while the receipts are read may be in none of them.
    for instance in &mut fleet.instances {
        instance.clients_ended().await;
    }
    if E::HAS_RECEIPTS {
        check_receipts(&fleet.instances[0].receipts().await, &pools);
    }
    report(&fleet, &pools, &outcomes, began.elapsed());
    for instance in fleet.instances {
        instance.stop().await;
    }
    for pool in &pools {
        pool.seen.assert_no_repeats();
        assert!(pool.seen.count() > 0, "no number was received from {}", pool.name);
    }
}

/// Checks that all numbers of responses to keys are in receipts, and that no number is in two.
fn check_receipts(receipts: &[serde_json::Value], pools: &[Arc<Pool>]) {
    let mut numbers = BTreeSet::new();
    for receipt in receipts {
        for number in receipt["numbers"].as_array().unwrap() {
            let is_new = numbers.insert((receipt["pool"].to_string(), number.to_string()));
            assert!(is_new, "{number} of {} is in two receipts", receipt["pool"]);
        }
    }
    let mut keys = 0;
    for pool in pools {
        for response in pool.keyed.lock().unwrap().values() {
            let response: serde_json::Value = serde_json::from_str(response).unwrap();
            let one = response.get("number").into_iter();
            for number in response["numbers"].as_array().into_iter().flatten().chain(one) {
                let number = (serde_json::json!(pool.name).to_string(), number.to_string());
                assert!(numbers.contains(&number), "{number:?} is in no receipt");
            }
            keys += 1;
        }
    }
    println!("{} receipts, {keys} keys with a response", receipts.len());
    assert!(keys > 0, "no key had a response");
}

/// Prints the table from which docs/fleet.md takes its figures.
fn report<E: Engine>(
    fleet: &Fleet<E>,
    pools: &[Arc<Pool>],
    outcomes: &BTreeMap<String, Outcomes>,
    time: Duration,
) {
    let sum = |counter: fn(&Instance) -> &AtomicU64| -> u64 {
        fleet.instances.iter().map(|instance| counter(instance).load(Ordering::SeqCst)).sum()
    };
    let count = |pool: &Arc<Pool>| format!("{} {}", pool.seen.count(), pool.name);
    println!(
        "\n{INSTANCES} instances, {CLIENTS} clients each, {}, {} rounds, {} s: {} numbers, no repeats; \
         responses: {} with numbers, {} 503, {} 410, {} missing; starts repeated {}\n",
        E::NODES,
        outcomes.values().map(|outcome| outcome.count).sum::<usize>(),
        time.as_secs(),
        pools.iter().map(count).collect::<Vec<_>>().join(" and "),
        sum(|instance| &instance.tally.served),
        sum(|instance| &instance.tally.unavailable),
        sum(|instance| &instance.tally.exhausted),
        sum(|instance| &instance.tally.unanswered),
        fleet.instances.iter().map(|instance| instance.tried_again).sum::<usize>(),
    );
    println!(
        "| fault | times | cut off, served for (median, longest) | until the end | whole again after (median, longest) |"
    );
    println!("| --- | ---: | ---: | ---: | ---: |");
    for (kind, outcome) in outcomes {
        println!(
            "| {kind} | {} | {} | {} | {} |",
            outcome.count,
            median_and_longest(&outcome.served),
            outcome.served_all_along,
            median_and_longest(&outcome.whole_again),
        );
    }
}

fn median_and_longest(times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort_unstable();
    let seconds = |time: &Duration| format!("{:.2} s", time.as_secs_f64());
    match times.last() {
        Some(longest) => format!("{}, {}", seconds(&times[times.len() / 2]), seconds(longest)),
        None => String::new(),
    }
}
