//! One instance of the fleet, which comes and goes, and its clients, which stay.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use reqwest::Method;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::seen::Seen;
use crate::support::{Answer, Client, Config, Finished, Server, Site, eventually, random};

/// Of each instance.
pub(crate) const CLIENTS: usize = 64;
/// What clients ask for in turn; none is without a count.
const COUNTS: [Option<u32>; 5] = [None, Some(3), None, Some(20), Some(40)];
/// Between two requests of a client, so that a tenth of two cores is enough to make the numbers: what is
/// turned away was turned away for want of the store.
const PAUSE: Duration = Duration::from_millis(500);
/// A service is whole again when for so long nobody was turned away.
const WHOLE: Duration = Duration::from_millis(500);
/// Exit code of what may pass: a store that is away, for one.
const MAY_PASS: i32 = 1;

/// A pool of the test, and what came of it from all instances.
pub(crate) struct Pool {
    pub(crate) name: &'static str,
    pub(crate) decimals: usize,
    pub(crate) seen: Seen,
}

/// How the requests to one instance went.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) served: AtomicU64,
    pub(crate) unavailable: AtomicU64,
    pub(crate) exhausted: AtomicU64,
    /// No answer came: the process is gone.
    pub(crate) unanswered: AtomicU64,
}

pub(crate) struct Instance {
    pub(crate) name: String,
    pub(crate) tally: Arc<Tally>,
    /// Starts that found the store away, and were tried again.
    pub(crate) tried_again: usize,
    site: Site,
    server: Option<Server>,
    /// Whom to ask now; nobody while it is down.
    at: watch::Sender<Option<Client>>,
    clients: JoinSet<()>,
    clock: Option<Clock>,
}

/// A clock of its own, by libfaketime: the wall's is shifted as the file says, the monotonic one is not.
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

/// Where Debian puts it, under the folder of the machine's architecture.
fn faketime() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1"));
    paths.find(|path| path.exists())
}

impl Instance {
    /// One with its clients at work, which wait until it starts.
    pub(crate) fn new(
        name: String,
        config: &Config,
        pools: &[Arc<Pool>],
        stop: &watch::Receiver<bool>,
    ) -> Self {
        let site = Site::new(config);
        let at = watch::Sender::new(None);
        let tally = Arc::new(Tally::default());
        let mut clients = JoinSet::new();
        for index in 0..CLIENTS {
            let caller = Caller {
                pool: Arc::clone(&pools[index % pools.len()]),
                whose: name.clone(),
                tally: Arc::clone(&tally),
            };
            clients.spawn(caller.ask(index, at.subscribe(), stop.clone()));
        }
        let file = site.folder().join("clock");
        let clock = faketime().map(|library| Clock { library, file });
        let instance = Self { name, tally, tried_again: 0, site, server: None, at, clients, clock };
        instance.shift_clock(0);
        instance
    }

    pub(crate) fn has_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Sets its wall clock so many seconds off, also while it runs.
    pub(crate) fn shift_clock(&self, seconds: i64) {
        if let Some(clock) = &self.clock {
            // As a whole: half a file would be another time.
            let next = clock.file.with_extension("next");
            std::fs::write(&next, format!("{seconds:+}\n")).unwrap();
            std::fs::rename(next, &clock.file).unwrap();
        }
    }

    /// Starts it, again and again while the store is away, as a service manager would.
    pub(crate) async fn start(&mut self) {
        loop {
            let mut command = self.site.tombola();
            if let Some(clock) = &self.clock {
                command.env("LD_PRELOAD", &clock.library);
                command.env("FAKETIME_TIMESTAMP_FILE", &clock.file);
                command.env("FAKETIME_CACHE_DURATION", "1");
                command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            }
            match Server::start_or_end(command).await {
                Ok(server) => {
                    self.at.send_replace(Some(server.client()));
                    self.server = Some(server);
                    return;
                }
                Err(Finished { status, stderr, .. }) => {
                    assert_eq!(status.code(), Some(MAY_PASS), "{}: {stderr}", self.name);
                    self.tried_again += 1;
                }
            }
        }
    }

    /// Ends it with SIGKILL or, as it should end, with SIGTERM.
    pub(crate) async fn end(&mut self, signal: Signal) {
        self.at.send_replace(None);
        let server = self.server.take().unwrap();
        if signal == Signal::SIGKILL { server.kill().await } else { server.stop().await }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.server.as_ref().unwrap().process.signal(signal);
    }

    /// Fails when it has ended by itself.
    pub(crate) async fn assert_running(&mut self) {
        let Some(server) = &mut self.server else { return };
        if !server.process.is_running() {
            let Finished { status, stderr, .. } = server.process.finish().await;
            panic!("{} ended by itself, {status}: {stderr}", self.name);
        }
    }

    /// Waits for its clients, and stops it.
    pub(crate) async fn stop(mut self) {
        while let Some(ended) = self.clients.join_next().await {
            ended.unwrap();
        }
        self.end(Signal::SIGTERM).await;
    }
}

/// Waits until all serve and turn nobody away, and returns how long after the moment each began to.
pub(crate) async fn serve_again(instances: &mut [Instance], moment: Instant) -> Vec<Duration> {
    let counts = |instance: &Instance| {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        (count(&instance.tally.served), count(&instance.tally.unavailable))
    };
    let mut before: Vec<_> = instances.iter().map(counts).collect();
    let mut since: Vec<Option<Instant>> = vec![None; instances.len()];
    eventually("full service again", async || {
        for (index, instance) in instances.iter_mut().enumerate() {
            instance.assert_running().await;
            let now = counts(instance);
            if now.1 > before[index].1 {
                since[index] = None;
            } else if now.0 > before[index].0 && since[index].is_none() {
                since[index] = Some(Instant::now());
            }
            before[index] = now;
        }
        let whole = |since: &Option<Instant>| since.is_some_and(|since| since.elapsed() >= WHOLE);
        since
            .iter()
            .all(whole)
            .then(|| since.iter().flatten().map(|&since| since - moment).collect())
    })
    .await
}

/// One client of an instance.
struct Caller {
    pool: Arc<Pool>,
    whose: String,
    tally: Arc<Tally>,
}

impl Caller {
    async fn ask(
        self,
        index: usize,
        mut at: watch::Receiver<Option<Client>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut counts = COUNTS.iter().cycle().skip(index);
        loop {
            let client = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                client = at.wait_for(Option::is_some) => client.unwrap().clone().unwrap(),
            };
            let count = counts.next().unwrap();
            let target = random(self.pool.name, *count);
            match client.send(Method::GET, &target).await {
                Ok(answer) => self.note(&answer, *count),
                Err(_) => drop(self.tally.unanswered.fetch_add(1, Ordering::SeqCst)),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn note(&self, answer: &Answer, count: Option<u32>) {
        let counter = match answer.status {
            200 => &self.tally.served,
            503 => &self.tally.unavailable,
            410 => &self.tally.exhausted,
            status => panic!("{}: {status} {}", self.whose, answer.body),
        };
        if answer.status == 200 {
            let numbers = answer.numbers();
            assert_eq!(numbers.len(), count.unwrap_or(1) as usize);
            for number in &numbers {
                self.pool.seen.note(number, self.pool.decimals, &self.whose);
            }
        }
        counter.fetch_add(1, Ordering::SeqCst);
    }
}
