//! One instance of the fleet, which is stopped and started, and its clients, which stay.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use reqwest::Method;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::seen::Seen;
use crate::store::copy_folder;
use crate::support::{Answer, Client, Clock, Config, Finished, Server, Site, eventually, random};

/// The count of clients of each instance.
pub(crate) const CLIENTS: usize = 64;
/// The counts that clients ask for in turn; `None` is a request without a count.
const COUNTS: [Option<u32>; 5] = [None, Some(3), None, Some(20), Some(40)];
/// The pause between two requests of a client. It is long enough that a tenth of two cores can make the
/// numbers, so requests are only refused if the store is unavailable.
const PAUSE: Duration = Duration::from_millis(500);
/// An instance serves fully again once it has refused no request for this long.
const WHOLE: Duration = Duration::from_millis(500);
/// The exit code for a temporary failure, such as a store that is unavailable.
const MAY_PASS: i32 = 1;
/// The exit code for a folder that is older than another copy in use.
const STALE: i32 = 5;

/// One of this many clients of an instance and a pool sends keys. Clients of the same number use the same keys at all
/// instances.
const KEYED: usize = 4;

/// A pool of the test, and the numbers received from it from all instances.
pub(crate) struct Pool {
    pub(crate) name: &'static str,
    pub(crate) decimals: usize,
    pub(crate) seen: Seen,
    /// The response to each key.
    pub(crate) keyed: Mutex<BTreeMap<String, String>>,
}

/// The outcomes of the requests to one instance.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) served: AtomicU64,
    pub(crate) unavailable: AtomicU64,
    pub(crate) exhausted: AtomicU64,
    /// No response arrived: the process is gone.
    pub(crate) unanswered: AtomicU64,
}

pub(crate) struct Instance {
    pub(crate) name: String,
    pub(crate) tally: Arc<Tally>,
    /// The count of starts that failed because the store was unavailable, and were repeated.
    pub(crate) tried_again: usize,
    config: Config,
    pools: Vec<Arc<Pool>>,
    site: Site,
    server: Option<Server>,
    /// The client for the running server, if any.
    at: watch::Sender<Option<Client>>,
    clients: JoinSet<()>,
    clock: Option<Clock>,
}

impl Instance {
    /// Returns an instance whose clients run and wait until it starts.
    pub(crate) fn new(
        name: String,
        config: &Config,
        pools: &[Arc<Pool>],
        stop: &watch::Receiver<bool>,
        has_keys: bool,
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
            let (at, stop) = (at.subscribe(), stop.clone());
            match has_keys && index % KEYED < pools.len() {
                true => clients.spawn(caller.ask_with_keys(index, at, stop)),
                false => clients.spawn(caller.ask(index, at, stop)),
            };
        }
        let clock = Clock::new(&site);
        Self {
            name,
            tally,
            tried_again: 0,
            config: config.clone(),
            pools: pools.to_vec(),
            site,
            server: None,
            at,
            clients,
            clock,
        }
    }

    pub(crate) fn has_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Sets the offset of its wall clock, even while it runs.
    pub(crate) fn shift_clock(&self, seconds: i64) {
        if let Some(clock) = &self.clock {
            clock.shift(seconds);
        }
    }

    fn command(&self) -> Command {
        let mut command = self.site.tombola();
        if let Some(clock) = &self.clock {
            clock.set(&mut command);
            command.env("FAKETIME_CACHE_DURATION", "1");
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        command
    }

    /// Starts the server. Retries while the store is unavailable, as a service manager would.
    pub(crate) async fn start(&mut self) {
        loop {
            match Server::start_or_end(self.command()).await {
                Ok(server) => return self.serve(server),
                Err(Finished { status, stderr, .. }) => {
                    assert_eq!(status.code(), Some(MAY_PASS), "{}: {stderr}", self.name);
                    self.tried_again += 1;
                }
            }
        }
    }

    fn serve(&mut self, server: Server) {
        self.at.send_replace(Some(server.client()));
        self.server = Some(server);
    }

    /// Starts the server together with a copy of its folder, and takes numbers from both until one has ended
    /// because it is stale. Then the copy ends and this instance runs, with partitions of its own if it was
    /// stale.
    pub(crate) async fn start_beside_a_copy(&mut self) {
        let copy = Site::new(&self.config);
        copy_folder(&self.site.data(), &copy.data());
        let start = async |mut command: Command| {
            command.arg("--refuse-if-stale");
            let started = Server::start_or_end(command).await;
            started.inspect_err(|Finished { status, stderr, .. }| {
                assert!(matches!(status.code(), Some(MAY_PASS | STALE)), "{status}: {stderr}");
            })
        };
        let (own, copied) = tokio::join!(start(self.command()), start(copy.tombola()));
        let Ok(own) = own else {
            drop(copied);
            return self.start().await;
        };
        self.serve(own);
        let Ok(mut copied) = copied else { return };
        let own = self.server.as_mut().unwrap();
        eventually("the end of one of the two servers", async || {
            for pool in &self.pools {
                let answer = copied.client().send(Method::GET, &random(pool.name, None)).await;
                for answer in answer.iter().filter(|answer| answer.status == 200) {
                    pool.seen.note(&answer.numbers()[0], pool.decimals, "a copy");
                }
                pool.seen.assert_no_repeats();
            }
            (!own.process.is_running() || !copied.process.is_running()).then_some(())
        })
        .await;
        drop(copied);
        if !own.process.is_running() {
            self.at.send_replace(None);
            let Finished { status, stderr, .. } = own.process.finish().await;
            assert_eq!(status.code(), Some(STALE), "{}: {stderr}", self.name);
            self.start().await;
        }
    }

    /// Ends the server with SIGKILL or, for a graceful stop, with SIGTERM.
    pub(crate) async fn end(&mut self, signal: Signal) {
        self.at.send_replace(None);
        let server = self.server.take().unwrap();
        if signal == Signal::SIGKILL { server.kill().await } else { server.stop().await }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.server.as_ref().unwrap().process.signal(signal);
    }

    /// Fails if the server has ended by itself.
    pub(crate) async fn assert_running(&mut self) {
        let Some(server) = &mut self.server else { return };
        if !server.process.is_running() {
            let Finished { status, stderr, .. } = server.process.finish().await;
            panic!("{} ended by itself, {status}: {stderr}", self.name);
        }
    }

    /// Returns the receipts that it lists.
    pub(crate) async fn receipts(&self) -> Vec<serde_json::Value> {
        let answer = self.server.as_ref().unwrap().get("/receipts").await;
        answer.assert_status(200);
        answer.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits for the clients, which were told to stop.
    pub(crate) async fn clients_ended(&mut self) {
        while let Some(ended) = self.clients.join_next().await {
            ended.unwrap();
        }
    }

    /// Waits for the clients, and stops the server.
    pub(crate) async fn stop(mut self) {
        self.clients_ended().await;
        self.end(Signal::SIGTERM).await;
    }
}

/// Waits until all instances serve and refuse no request. Returns how long after `moment` each began to.
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

    /// Sends each key until there are numbers, and then the next one. The response is the same that other instances
    /// gave to the key.
    async fn ask_with_keys(
        self,
        index: usize,
        mut at: watch::Receiver<Option<Client>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let target = random(self.pool.name, Some(2));
        let mut number = 0;
        loop {
            let client = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                client = at.wait_for(Option::is_some) => client.unwrap().clone().unwrap(),
            };
            let key = format!("{index}-{number}");
            let header = [("idempotency-key", &*key)];
            if let Ok(answer) = client.send_with(Method::POST, &target, &header).await {
                match answer.status {
                    200 => {
                        self.note_keyed(key, &answer);
                        number += 1;
                    }
                    503 => {}
                    status => panic!("{}: {status} {}", self.whose, answer.body),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn note_keyed(&self, key: String, answer: &Answer) {
        let mut keyed = self.pool.keyed.lock().unwrap();
        match keyed.get(&key) {
            Some(before) => assert_eq!(*before, answer.body, "{key} of {}", self.whose),
            None => {
                for number in answer.numbers() {
                    self.pool.seen.note(&number, self.pool.decimals, &self.whose);
                }
                keyed.insert(key, answer.body.clone());
            }
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
