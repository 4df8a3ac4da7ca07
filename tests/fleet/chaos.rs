//! Three instances, three nodes of etcd, 64 clients for each instance, and at random moments all that can
//! happen to any of them: no number comes twice, nobody stops for good, and what was cut off serves what
//! it has leased.
//!
//! `FLEET_SECONDS=N` sets how long, `FLEET_SEED=N` what happens when.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha20Rng;
use tokio::sync::watch;

use crate::etcd::{self, Cluster};
use crate::instance::{CLIENTS, Instance, Pool, serve_again};
use crate::links::Cut;
use crate::seen::{LAST, Seen};
use crate::store::in_fleet;
use crate::support::{Config, skipped};

const INSTANCES: usize = 3;
const NODES: usize = 3;
/// Rows of a lease: those of two shards last some two seconds here, so that steps of the fence are
/// many, and a cut of eight seconds outlasts them.
const LEASE_ROWS: usize = 1_000;
/// A 256th of all, a million numbers: more are claimed while it runs for long.
const CLAIM: usize = 16;
const SHARDS: u16 = 2;
const SHARD_SIZE: u32 = 20_000;
/// How long a fault lasts, and how long it is quiet after it, in milliseconds.
const FAULT_MS: std::ops::Range<u64> = 200..8_000;
const QUIET_MS: std::ops::Range<u64> = 0..1_000;
const HOUR_SECONDS: i64 = 3_600;

/// What can happen, to the instance or node of this number.
#[derive(Clone, Copy, Debug)]
enum Fault {
    InstanceKilled(usize),
    InstanceStopped(usize),
    InstancePaused(usize),
    InstanceCutOff(usize, Cut),
    ClockShifted(usize, i64),
    NodeKilled(usize),
    NodePaused(usize),
    /// A minority of the store.
    NodeCutOff(usize, Cut),
    /// No majority is left.
    NodesApart(Cut),
    /// The store as a whole, all its nodes at once.
    StoreKilled,
}

impl Fault {
    /// As it stands in the table.
    fn kind(self) -> String {
        match self {
            Self::InstanceKilled(_) => "instance killed (-9)".into(),
            Self::InstanceStopped(_) => "instance stopped and started".into(),
            Self::InstancePaused(_) => "instance paused (SIGSTOP)".into(),
            Self::InstanceCutOff(_, cut) => {
                format!("instance cut off from the store, {}", how(cut))
            }
            Self::ClockShifted(..) => "instance's clock shifted by an hour".into(),
            Self::NodeKilled(_) => "etcd node killed (-9)".into(),
            Self::NodePaused(_) => "etcd node paused (SIGSTOP)".into(),
            Self::NodeCutOff(_, cut) => format!("etcd node cut off from the others, {}", how(cut)),
            Self::NodesApart(cut) => format!("all etcd nodes apart, {}", how(cut)),
            Self::StoreKilled => "all etcd nodes killed (-9)".into(),
        }
    }

    /// Whether it keeps the instance from the store, while the instance itself is well.
    fn cuts_off(self, instance: usize) -> bool {
        match self {
            Self::InstanceCutOff(index, _) => index == instance,
            Self::NodesApart(_) | Self::StoreKilled => true,
            _ => false,
        }
    }

    fn is_of_store(self) -> bool {
        matches!(
            self,
            Self::NodeKilled(_)
                | Self::NodePaused(_)
                | Self::NodeCutOff(..)
                | Self::NodesApart(_)
                | Self::StoreKilled
        )
    }

    fn random(random: &mut ChaCha20Rng, clocks: bool) -> Self {
        let (instance, node) = (random.random_range(0..INSTANCES), random.random_range(0..NODES));
        let cut = *[Cut::Refused, Cut::Silent, Cut::Mute].choose(random).unwrap();
        let hour = *[-HOUR_SECONDS, HOUR_SECONDS].choose(random).unwrap();
        match random.random_range(0..if clocks { 12 } else { 11 }) {
            0 => Self::InstanceKilled(instance),
            1 => Self::InstanceStopped(instance),
            2 => Self::InstancePaused(instance),
            // Where there is most to find.
            3..6 => Self::InstanceCutOff(instance, cut),
            6 => Self::NodeKilled(node),
            7 => Self::NodePaused(node),
            8 => Self::NodeCutOff(node, cut),
            9 => Self::NodesApart(cut),
            10 => Self::StoreKilled,
            _ => Self::ClockShifted(instance, hour),
        }
    }
}

fn how(cut: Cut) -> &'static str {
    match cut {
        Cut::Refused => "refused",
        Cut::Silent => "silent",
        Cut::Mute => "answers lost",
    }
}

/// What came of all faults of a kind.
#[derive(Default)]
struct Outcomes {
    count: usize,
    /// Cut off, instances served for so long until they turned somebody away.
    served: Vec<Duration>,
    /// Those that served until the end of it.
    served_all_along: usize,
    /// From the end of it until full service of those that were concerned.
    whole_again: Vec<Duration>,
}

struct Fleet {
    cluster: Cluster,
    instances: Vec<Instance>,
}

impl Fleet {
    async fn begin(&mut self, fault: Fault) {
        match fault {
            Fault::InstanceKilled(index) => self.instances[index].end(Signal::SIGKILL).await,
            Fault::InstanceStopped(index) => self.instances[index].end(Signal::SIGTERM).await,
            Fault::InstancePaused(index) => self.instances[index].signal(Signal::SIGSTOP),
            Fault::InstanceCutOff(index, cut) => {
                for node in &self.cluster.nodes {
                    self.cluster.links.cut(&self.instances[index].name, &node.name, cut);
                }
            }
            Fault::ClockShifted(index, seconds) => self.instances[index].shift_clock(seconds),
            Fault::NodeKilled(index) => self.cluster.kill(index).await,
            Fault::NodePaused(index) => self.cluster.signal(index, Signal::SIGSTOP),
            Fault::NodeCutOff(index, cut) => self.cluster.part(Some(index), cut),
            Fault::NodesApart(cut) => self.cluster.part(None, cut),
            Fault::StoreKilled => {
                for index in 0..NODES {
                    self.cluster.kill(index).await;
                }
            }
        }
    }

    async fn end(&mut self, fault: Fault) {
        match fault {
            Fault::InstanceKilled(index) | Fault::InstanceStopped(index) => {
                self.instances[index].start().await;
            }
            Fault::InstancePaused(index) => self.instances[index].signal(Signal::SIGCONT),
            Fault::InstanceCutOff(index, _) => {
                for node in &self.cluster.nodes {
                    self.cluster.links.heal(&self.instances[index].name, &node.name);
                }
            }
            Fault::ClockShifted(index, _) => self.instances[index].shift_clock(0),
            Fault::NodeKilled(index) => self.cluster.begin(index),
            Fault::NodePaused(index) => self.cluster.signal(index, Signal::SIGCONT),
            Fault::NodeCutOff(index, _) => self.cluster.join(Some(index)),
            Fault::NodesApart(_) => self.cluster.join(None),
            Fault::StoreKilled => {
                for index in 0..NODES {
                    self.cluster.begin(index);
                }
            }
        }
    }

    /// Lets it last, and returns after how long each instance first turned somebody away.
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
async fn no_number_comes_twice_whatever_happens_to_a_fleet() {
    if !etcd::is_there() {
        return;
    }
    let (seconds, seed) = (variable("FLEET_SECONDS", 60), variable("FLEET_SEED", 1));
    println!("FLEET_SECONDS={seconds} FLEET_SEED={seed}");
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    let pools = [("int", 0), ("float", 6)];
    let pools = pools.map(|(name, decimals)| Arc::new(Pool { name, decimals, seen: Seen::new() }));
    let (stop, stopped) = watch::channel(false);

    let mut fleet = Fleet { cluster: Cluster::start(NODES).await, instances: Vec::new() };
    for index in 0..INSTANCES {
        let name = format!("instance-{index}");
        let address = fleet.cluster.address_for(&name).await;
        let config = in_fleet(Config::new(), &address)
            .pool("int", 0, LAST, SHARDS, SHARD_SIZE)
            .pool(
                "float",
                "0.0",
                format!("{}.{:06}", LAST / 1_000_000, LAST % 1_000_000),
                SHARDS,
                SHARD_SIZE,
            )
            .set("pools.float.decimals", 6)
            .set("fleet.claim", CLAIM)
            .set("fleet.lease_rows", LEASE_ROWS);
        fleet.instances.push(Instance::new(name, &config, &pools, &stopped));
    }
    for instance in &mut fleet.instances {
        instance.start().await;
    }
    let clocks = fleet.instances[0].has_clock();
    if !clocks {
        skipped("libfaketime is not installed: no clock is shifted");
    }

    serve_again(&mut fleet.instances, Instant::now()).await;
    let began = Instant::now();
    let mut outcomes = BTreeMap::<String, Outcomes>::new();
    while began.elapsed() < Duration::from_secs(seconds) {
        let mut faults = vec![Fault::random(&mut random, clocks)];
        // Now and then one of the store beside one of an instance.
        let second = Fault::random(&mut random, clocks);
        if second.is_of_store() != faults[0].is_of_store() && random.random_bool(0.5) {
            faults.push(second);
        }
        let time = Duration::from_millis(random.random_range(FAULT_MS));
        for &fault in &faults {
            fleet.begin(fault).await;
        }
        let first = fleet.last(time).await;
        let ended = Instant::now();
        // The store's first: what starts needs it.
        faults.sort_by_key(|fault| !fault.is_of_store());
        for &fault in &faults {
            fleet.end(fault).await;
        }
        let whole_again = serve_again(&mut fleet.instances, ended).await;
        for pool in &pools {
            pool.seen.assert_no_repeats();
        }
        println!(
            "{:>4} s: {faults:?} for {time:?}, whole again after {whole_again:?}",
            began.elapsed().as_secs()
        );
        let kind = faults.iter().map(|fault| fault.kind()).collect::<Vec<_>>().join(" + ");
        let outcome = outcomes.entry(kind).or_default();
        outcome.count += 1;
        outcome.whole_again.push(*whole_again.iter().max().unwrap());
        for (index, first) in first.into_iter().enumerate() {
            if faults.iter().all(|fault| fault.cuts_off(index)) {
                outcome.served.extend(first);
                outcome.served_all_along += usize::from(first.is_none());
            }
        }
        let quiet = Duration::from_millis(random.random_range(QUIET_MS));
        fleet.last(quiet).await;
    }

    stop.send_replace(true);
    report(&fleet, &pools, &outcomes, began.elapsed());
    for instance in fleet.instances {
        instance.stop().await;
    }
    for pool in &pools {
        pool.seen.assert_no_repeats();
        assert!(pool.seen.count() > 0, "nothing came of {}", pool.name);
    }
}

/// The table of docs/fleet.md.
fn report(
    fleet: &Fleet,
    pools: &[Arc<Pool>],
    outcomes: &BTreeMap<String, Outcomes>,
    time: Duration,
) {
    let sum = |counter: fn(&Instance) -> &AtomicU64| -> u64 {
        fleet.instances.iter().map(|instance| counter(instance).load(Ordering::SeqCst)).sum()
    };
    let count = |pool: &Arc<Pool>| format!("{} {}", pool.seen.count(), pool.name);
    println!(
        "\n{INSTANCES} instances, {CLIENTS} clients each, {NODES} nodes of etcd, {} s: {} numbers, none twice; \
         answers: {} with numbers, {} 503, {} 410, {} none; starts tried again {}\n",
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
