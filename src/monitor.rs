//! The server's counts, now and over the last five minutes. Knows nothing of how they are shown.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::MissedTickBehavior;

use crate::events::{Event, Events, Kind};
use crate::histogram::Durations;
use crate::pool::Pool;
use crate::receipts::{Counts, ReceiptFigures};
use crate::reload::Reload;
use crate::traffic::{Route, Traffic};

/// The interval between samples: as often as the status page polls.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Samples per step of the history.
const SAMPLES_PER_STEP: u64 = 5;

/// The length of a step of the history.
pub(crate) const STEP: Duration = Duration::from_secs(SAMPLE_INTERVAL.as_secs() * SAMPLES_PER_STEP);

/// Steps of the history: five minutes.
const STEPS: u64 = 60;

/// The number of samples kept: those at both ends of each step, including the step that is not yet complete.
const SAMPLES_MAX: usize = ((STEPS + 1) * SAMPLES_PER_STEP) as usize;

/// The number of samples that a rate is computed from: 10 s, long enough for a steady figure.
const SAMPLES_PER_RATE: usize = 10;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Monitor {
    started_at: SystemTime,
    started: Instant,
    traffic: Traffic,
    pools: ArcSwap<Pools>,
    receipts: Arc<Counts>,
    events: Arc<Events>,
    samples: Mutex<Samples>,
    settings: Mutex<SettingsInEffect>,
}

/// The settings in effect, for people.
#[derive(Clone, Debug)]
pub(crate) struct SettingsInEffect {
    /// The SHA-256 of all settings, as hexadecimal digits.
    pub(crate) digest: String,
    /// The last reload, if there was one.
    pub(crate) reload: Option<Reload>,
}

/// The pools that serve, in ascending order of their names.
pub(crate) type Pools = Vec<Arc<Pool>>;

/// The last samples, oldest first.
#[derive(Debug, Default)]
struct Samples {
    /// The number of samples taken since the start.
    count: u64,
    kept: VecDeque<Sample>,
}

/// All counts at one time.
#[derive(Clone, Debug)]
struct Sample {
    at: Instant,
    /// Durations of requests for numbers.
    durations: Durations,
    /// The pools at that time.
    pools: Arc<Pools>,
    /// Numbers issued, by pool.
    issued: Vec<u64>,
}

/// The rates over a period of time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// Requests for numbers.
    pub requests_per_second: f64,
    /// The pools at the end of the period.
    pub pools: Arc<Pools>,
    /// Numbers issued, by pool.
    pub numbers_per_second: Vec<f64>,
    /// Durations of requests for numbers.
    pub durations: Durations,
}

impl Monitor {
    /// Watches these counts from now on. [`run`](Self::run) records the history.
    pub(crate) fn new(
        traffic: Traffic,
        pools: Pools,
        receipts: Arc<Counts>,
        events: Arc<Events>,
        settings_digest: String,
    ) -> Self {
        let monitor = Self {
            started_at: SystemTime::now(),
            started: Instant::now(),
            traffic,
            pools: ArcSwap::from_pointee(pools),
            receipts,
            events,
            samples: Mutex::default(),
            settings: Mutex::new(SettingsInEffect { digest: settings_digest, reload: None }),
        };
        monitor.sample();
        monitor
    }

    /// Records the counts every second. This never completes.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick is immediate, and `new` has already taken that sample.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            self.sample();
        }
    }

    /// Returns when the server started.
    pub(crate) fn started_at(&self) -> SystemTime {
        self.started_at
    }

    /// Returns how long the server has been running.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Returns the counts of requests.
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Returns the pools that serve.
    pub(crate) fn pools(&self) -> Arc<Pools> {
        self.pools.load_full()
    }

    /// Watches these pools from now on.
    pub(crate) fn set_pools(&self, pools: Pools) {
        self.pools.store(Arc::new(pools));
    }

    /// Returns the settings in effect.
    pub(crate) fn settings(&self) -> SettingsInEffect {
        self.settings.lock().expect("no holder of it panics").clone()
    }

    /// Notes a reload, and the digest of the settings if it was applied.
    pub(crate) fn reloaded(&self, reload: Reload, digest: String) {
        self.events.add(Kind::Reloaded, None, None, reload.sentence());
        let mut settings = self.settings.lock().expect("no holder of it panics");
        if reload.is_applied {
            settings.digest = digest;
        }
        settings.reload = Some(reload);
    }

    /// Returns the counts of receipts.
    pub(crate) fn receipts(&self) -> ReceiptFigures {
        self.receipts.figures()
    }

    /// Returns the recent events, newest first.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.latest()
    }

    /// Returns the rates over the last 10 seconds, or since the start if that is more recent.
    pub(crate) fn pace(&self) -> Pace {
        let now = self.counts();
        let samples = self.samples();
        let place = samples.kept.len().saturating_sub(SAMPLES_PER_RATE);
        samples.kept.get(place).map_or_else(Pace::default, |earlier| pace(earlier, &now))
    }

    /// Returns the rates in each [`STEP`] of the last five minutes, oldest first. There are fewer steps soon
    /// after the start.
    pub(crate) fn history(&self) -> Vec<Pace> {
        let samples = self.samples();
        let first = samples.count - samples.kept.len() as u64;
        let ends: Vec<_> = (first..)
            .zip(&samples.kept)
            .filter(|(number, _)| number % SAMPLES_PER_STEP == 0)
            .map(|(_, sample)| sample)
            .collect();
        ends.windows(2).map(|ends| pace(ends[0], ends[1])).collect()
    }

    fn sample(&self) {
        let sample = self.counts();
        let mut samples = self.samples();
        samples.count += 1;
        samples.kept.push_back(sample);
        if samples.kept.len() > SAMPLES_MAX {
            samples.kept.pop_front();
        }
    }

    fn counts(&self) -> Sample {
        let pools = self.pools();
        Sample {
            at: Instant::now(),
            durations: self.traffic.durations(Route::RANDOM),
            issued: pools.iter().map(|pool| pool.issued()).collect(),
            pools,
        }
    }

    fn samples(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().expect("no holder of it panics")
    }
}

fn pace(earlier: &Sample, later: &Sample) -> Pace {
    // At least a millisecond, so that a tiny interval does not give an absurd rate.
    let seconds = (later.at - earlier.at).as_secs_f64().max(1e-3);
    let durations = later.durations.since(&earlier.durations);
    let issued = later.pools.iter().zip(&later.issued).enumerate();
    let numbers = issued.map(|(position, (pool, issued))| {
        // A pool that is new has no rate yet.
        let before = earlier.issued_by(pool, position).unwrap_or(*issued);
        issued.saturating_sub(before) as f64 / seconds
    });
    Pace {
        requests_per_second: durations.count() as f64 / seconds,
        numbers_per_second: numbers.collect(),
        pools: Arc::clone(&later.pools),
        durations,
    }
}

impl Sample {
    /// Returns the numbers that a pool had issued. The pool is expected at this position, where it is unless
    /// pools came or went.
    fn issued_by(&self, pool: &Pool, position: usize) -> Option<u64> {
        let is_it = |other: &Arc<Pool>| other.name() == pool.name();
        let position = match self.pools.get(position).is_some_and(is_it) {
            true => position,
            false => self.pools.iter().position(is_it)?,
        };
        self.issued.get(position).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor() -> Monitor {
        Monitor::new(Traffic::new(1), Vec::new(), Arc::default(), Arc::default(), String::new())
    }

    fn ask(monitor: &Monitor, requests: usize) {
        for _ in 0..requests {
            let lane = &monitor.traffic.lanes()[0];
            lane.answered(Route::RANDOM, 200, Duration::from_micros(15));
        }
    }

    #[test]
    fn the_history_is_five_minutes_of_whole_steps() {
        let monitor = monitor();
        assert_eq!(monitor.history().len(), 0);
        let mut asked = 0;
        for second in 1..=1_000 {
            ask(&monitor, second);
            asked += second;
            monitor.sample();
            let steps = second / SAMPLES_PER_STEP as usize;
            assert_eq!(monitor.history().len(), steps.min(STEPS as usize), "second {second}");
        }
        // 1,001 samples: each step has its five, and the last 300 seconds are all there.
        let counts: Vec<_> = monitor.history().iter().map(|pace| pace.durations.count()).collect();
        assert_eq!(counts.iter().sum::<u64>(), (701..=1_000).sum::<u64>());
        assert_eq!(counts.last(), Some(&(996..=1_000).sum()));
        assert_eq!(monitor.traffic.durations(Route::RANDOM).count(), asked as u64);
    }

    #[test]
    fn the_pace_is_that_of_the_last_ten_samples() {
        let monitor = monitor();
        ask(&monitor, 1_000);
        for _ in 0..20 {
            monitor.sample();
        }
        assert_eq!(monitor.pace().durations.count(), 0);
        ask(&monitor, 7);
        assert_eq!(monitor.pace().durations.count(), 7);
        assert!(monitor.pace().requests_per_second > 0.0);
    }
}
