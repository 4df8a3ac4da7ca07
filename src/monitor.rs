//! What the server counts, now and in the last five minutes. Knows nothing of how it is shown.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::events::{Event, Events, Kind};
use crate::histogram::Durations;
use crate::pool::Pool;
use crate::traffic::{Route, Traffic};

/// How often counts are noted: as often as a page looks.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Samples in a step of the history.
const SAMPLES_PER_STEP: u64 = 5;

/// A step of the history.
pub const STEP: Duration = Duration::from_secs(SAMPLE_INTERVAL.as_secs() * SAMPLES_PER_STEP);

/// Steps of the history: five minutes.
const STEPS: u64 = 60;

/// Samples that are kept: those at both ends of each step, the one that is not yet full included.
const SAMPLES_MAX: usize = ((STEPS + 1) * SAMPLES_PER_STEP) as usize;

/// Samples that a rate is taken over: 10 s, long enough to be calm.
const SAMPLES_PER_RATE: usize = 10;

/// See the [module](self).
#[derive(Debug)]
pub struct Monitor {
    started_at: SystemTime,
    started: Instant,
    traffic: Traffic,
    pools: Vec<Arc<Pool>>,
    events: Arc<Events>,
    samples: Mutex<Samples>,
}

/// The last samples, oldest first.
#[derive(Debug, Default)]
struct Samples {
    /// How many there ever were.
    count: u64,
    kept: VecDeque<Sample>,
}

/// All counts at one time.
#[derive(Clone, Debug)]
struct Sample {
    at: Instant,
    /// Of requests for numbers.
    durations: Durations,
    /// By pool.
    issued: Vec<u64>,
}

/// How much came in a while.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// Requests for numbers.
    pub requests_per_second: f64,
    /// Numbers, by pool.
    pub numbers_per_second: Vec<f64>,
    /// How long requests for numbers took.
    pub durations: Durations,
}

impl Monitor {
    /// Watches these from now on; the history comes with [`run`](Self::run).
    #[must_use]
    pub fn new(traffic: Traffic, pools: Vec<Arc<Pool>>, events: Arc<Events>) -> Self {
        events.add(Kind::Started, None, None, "The server started".to_owned());
        let monitor = Self {
            started_at: SystemTime::now(),
            started: Instant::now(),
            traffic,
            pools,
            events,
            samples: Mutex::default(),
        };
        monitor.sample();
        monitor
    }

    /// Notes the counts every second until `stop` becomes true or its sender is gone.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first one is now, and was noted.
        ticks.tick().await;
        let mut stopped = std::pin::pin!(stop.wait_for(|&stop| stop));
        loop {
            tokio::select! {
                _ = ticks.tick() => self.sample(),
                _ = &mut stopped => break,
            }
        }
    }

    /// When the server started.
    #[must_use]
    pub fn started_at(&self) -> SystemTime {
        self.started_at
    }

    /// For how long it runs.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The requests.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// The pools.
    #[must_use]
    pub fn pools(&self) -> &[Arc<Pool>] {
        &self.pools
    }

    /// The last events, newest first.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.events.latest()
    }

    /// The pace of the last 10 seconds, or of the time since the start if that is less.
    #[must_use]
    pub fn pace(&self) -> Pace {
        let now = self.counts();
        let samples = self.samples();
        let place = samples.kept.len().saturating_sub(SAMPLES_PER_RATE);
        samples.kept.get(place).map_or_else(Pace::default, |earlier| pace(earlier, &now))
    }

    /// The pace of each [`STEP`] of the last five minutes, oldest first; of fewer soon after the start.
    #[must_use]
    pub fn history(&self) -> Vec<Pace> {
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
        Sample {
            at: Instant::now(),
            durations: self.traffic.durations(Route::RANDOM),
            issued: self.pools.iter().map(|pool| pool.issued()).collect(),
        }
    }

    fn samples(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().expect("nothing panics with it")
    }
}

fn pace(earlier: &Sample, later: &Sample) -> Pace {
    // A millisecond: nothing can be said of less.
    let seconds = (later.at - earlier.at).as_secs_f64().max(1e-3);
    let durations = later.durations.since(&earlier.durations);
    let issued = later.issued.iter().zip(&earlier.issued);
    Pace {
        requests_per_second: durations.count() as f64 / seconds,
        numbers_per_second: issued
            .map(|(later, earlier)| later.saturating_sub(*earlier) as f64 / seconds)
            .collect(),
        durations,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor() -> Monitor {
        Monitor::new(Traffic::new(1), Vec::new(), Arc::default())
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
