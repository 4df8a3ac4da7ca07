//! The gate that a lease passes before its numbers are handed out. It opens with a step of the instance's
//! fence, and leases that wait share one step. Knows nothing of rows.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::claims::{Held, Partitions};
use super::keys::Keys;
use super::protocol::{Fence, Known, Standing};
use super::record::{Lease, Record};
use super::store::{Store, StoreError};
use crate::config::PoolName;

/// Leases that can wait for a step. Each shard has at most one that waits.
const WAITING_MAX: usize = 4096;

/// The first and the longest wait before the store or the disk is tried again.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long the fence may rest before it is checked, so that an unreachable store and a clone are noticed
/// even without requests.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// How long a check may take before the store counts as unreachable.
const LOOK_LIMIT: Duration = Duration::from_secs(4);

/// `/health` reports an unreachable store within this time, as docs/fleet.md says.
const NOTICED_WITHIN: Duration = Duration::from_secs(15);
const _: () = assert!(LOOK_INTERVAL.as_secs() + LOOK_LIMIT.as_secs() < NOTICED_WITHIN.as_secs());

/// How often all claims are listed, to count the unclaimed partitions. A pool has up to 4096 claims of about
/// 100 bytes.
const LISTING_INTERVAL: Duration = Duration::from_secs(300);

/// Why an instance may not hand out anything any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Another copy of the folder has taken this one's place.
    #[error(
        "another copy of this data folder has made further steps and may hand out the same numbers, so \
         this one no longer serves. Find out which of them is a clone or a restored backup; if this one is \
         started without --refuse-if-stale, it sets its files aside and starts as a new instance"
    )]
    Stale,
    /// The store forgot what it had agreed to.
    #[error(
        "the store is behind this data folder: it was restored from a copy, or is another one. Nothing is \
         served, because other instances may get the same numbers. See `tombola fleet status`; if this is \
         the right store, run `tombola fleet reseed` for each folder of the fleet"
    )]
    StoreBehind,
}

/// The gate that leases pass.
#[derive(Clone, Debug)]
pub struct Gate {
    passes: mpsc::Sender<Pass>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    lost: watch::Sender<Option<Lost>>,
    /// Steps made by this process.
    steps: AtomicU64,
    /// The problem that keeps the gate shut at the moment.
    trouble: Mutex<Option<String>>,
    /// A notice to report for as long as the process runs.
    notice: Option<String>,
    held: Arc<Held>,
}

#[derive(Debug)]
struct Pass {
    lease: Lease,
    reply: oneshot::Sender<()>,
}

/// The only task that steps the fence.
#[derive(Debug)]
pub struct Gatekeeper {
    passes: mpsc::Receiver<Pass>,
    state: Arc<State>,
    store: Arc<Store>,
    keys: Keys,
    held: Arc<Held>,
    folder: PathBuf,
    record: Record,
    look_interval: Duration,
    /// When all claims were last listed.
    listed: Instant,
    /// Whether it ended as intended, or with the fence lost, which is reported.
    ended: bool,
}

/// A call to the gatekeeper.
enum Call {
    Step(Pass),
    Look,
}

impl Gate {
    pub(super) fn new(
        store: Arc<Store>,
        keys: Keys,
        held: Arc<Held>,
        folder: PathBuf,
        record: Record,
        notice: Option<String>,
    ) -> (Self, Gatekeeper) {
        let (passes, receiver) = mpsc::channel(WAITING_MAX);
        let lost = watch::Sender::new(None);
        let state = Arc::new(State {
            lost,
            steps: AtomicU64::new(0),
            trouble: Mutex::default(),
            notice,
            held: Arc::clone(&held),
        });
        let keeper = Gatekeeper {
            passes: receiver,
            state: Arc::clone(&state),
            store,
            keys,
            held,
            folder,
            record,
            look_interval: LOOK_INTERVAL,
            listed: Instant::now(),
            ended: false,
        };
        (Self { passes, state }, keeper)
    }

    /// Waits until a step of the fence covers this lease, which is committed. Its rows may then be handed
    /// out. If the fence is lost, this never completes.
    pub async fn pass(&self, lease: Lease) {
        let (reply, passed) = oneshot::channel();
        let asked = self.passes.send(Pass { lease, reply }).await.is_ok();
        if !asked || passed.await.is_err() {
            // The gatekeeper has ended. The worker that waits here is told to stop, and drops this future.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until nothing may be handed out any more, and returns why.
    pub async fn lost(&self) -> Lost {
        let mut lost = self.state.lost.subscribe();
        let found = lost.wait_for(Option::is_some).await.expect("the state has a sender");
        found.expect("it was waited for")
    }

    /// Returns the steps made since the start, and whether the next one can be made as far as is known.
    #[must_use]
    pub fn figures(&self) -> (u64, bool) {
        let is_shut = self.state.trouble.lock().expect(NO_PANIC).is_some();
        (self.state.steps.load(Ordering::Relaxed), !is_shut)
    }

    /// Returns the partitions of a pool, as far as this instance knows.
    #[must_use]
    pub fn partitions(&self, pool: &PoolName) -> Partitions {
        self.state.held.figures(pool)
    }

    /// Returns the problem or the notice to report in `/health`.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.state.trouble.lock().expect(NO_PANIC).clone();
        trouble.or_else(|| self.state.notice.clone())
    }
}

const NO_PANIC: &str = "nothing panics with it";

impl Drop for Gatekeeper {
    fn drop(&mut self) {
        if !self.ended {
            // Workers then wait without end, so `/health` has to say why.
            self.set_trouble(Some("the fence is no longer stepped; see the log".to_owned()));
        }
    }
}

impl Gatekeeper {
    /// Sets how often the store is checked.
    #[cfg(test)]
    pub(super) fn look_every(&mut self, interval: Duration) {
        self.look_interval = interval;
    }

    /// Steps the fence for the leases that wait, until `stop` is true, no lease can come any more, or the
    /// fence is lost.
    pub async fn run(mut self, stop: watch::Receiver<bool>) {
        self.serve(&stop).await;
        self.ended = true;
    }

    async fn serve(&mut self, stop: &watch::Receiver<bool>) {
        let mut next_look = Instant::now() + self.look_interval;
        while let Some(Some(call)) = unless(stop, self.call(next_look)).await {
            let served = match call {
                Call::Step(first) => self.open_for(first, stop).await,
                Call::Look => unless(stop, self.look())
                    .await
                    .map_or(Ok(false), |looked| looked.map(|()| true)),
            };
            match served {
                Ok(true) => {}
                Ok(false) => return,
                Err(lost) => {
                    error!("{lost}");
                    self.state.lost.send_replace(Some(lost));
                    if lost == Lost::Stale {
                        // The next start may not notice it: a clone's step may have the same token.
                        let mut record = self.record.clone();
                        record.is_stale = true;
                        self.save(&record, stop).await;
                    }
                    return;
                }
            }
            let is_shut = self.state.trouble.lock().expect(NO_PANIC).is_some();
            let pause =
                if is_shut { PAUSE_MAX.min(self.look_interval) } else { self.look_interval };
            next_look = Instant::now() + pause;
        }
    }

    /// Waits until there is something to do. Returns `None` if no lease can come any more.
    async fn call(&mut self, next_look: Instant) -> Option<Call> {
        tokio::select! {
            pass = self.passes.recv() => pass.map(Call::Step),
            () = self.held.doubted() => Some(Call::Look),
            () = sleep_until(next_look) => Some(Call::Look),
        }
    }

    /// Makes a step for this lease and all others that wait. Returns whether it was made. If it was stopped,
    /// the step may be made or not, and the next start finds out.
    async fn open_for(&mut self, first: Pass, stop: &watch::Receiver<bool>) -> Result<bool, Lost> {
        let mut waiting = vec![first];
        while let Ok(more) = self.passes.try_recv() {
            waiting.push(more);
        }
        let made = self.step(&waiting, stop).await?;
        if made {
            // A worker that has ended by now hands nothing out.
            waiting.into_iter().for_each(|pass| pass.reply.send(()).unwrap_or(()));
        }
        Ok(made)
    }

    /// Checks the store while no step is in progress.
    async fn look(&mut self) -> Result<(), Lost> {
        let lists = self.listed.elapsed() >= LISTING_INTERVAL;
        let found = {
            let mut finding = pin!(self.standing(lists));
            match timeout(LOOK_LIMIT, &mut finding).await {
                Ok(found) => found,
                // Keeps waiting, because on a volume that hangs each try would block a thread.
                Err(_) => {
                    let problem = format!("no answer within {} s", LOOK_LIMIT.as_secs());
                    self.troubled(Some(&self.store.error(&problem)));
                    finding.await
                }
            }
        };
        match found {
            Ok(standing) => {
                self.troubled(None);
                if lists {
                    self.listed = Instant::now();
                }
                match standing {
                    Standing::Current => Ok(()),
                    Standing::Stale => Err(Lost::Stale),
                    Standing::Pending | Standing::StoreBehind => Err(Lost::StoreBehind),
                }
            }
            Err(error) => {
                self.troubled(Some(&error));
                Ok(())
            }
        }
    }

    /// Returns the standing of this instance, whose last step was made.
    async fn standing(&self, lists: bool) -> Result<Standing, StoreError> {
        let (store, keys, record) = (&self.store, &self.keys, &self.record);
        let standing = Known::at(record.known.last()).judge(read(store, keys, record).await?);
        let is_there = match lists {
            true => self.held.is_there(store, keys, record.instance).await?,
            false => self.held.is_same_space(store).await?,
        };
        Ok(if is_there { standing } else { Standing::StoreBehind })
    }

    /// Makes one step that covers all of `waiting`. Returns whether it was made. If it was stopped, the step
    /// may be made or not.
    async fn step(&mut self, waiting: &[Pass], stop: &watch::Receiver<bool>) -> Result<bool, Lost> {
        let lists = self.listed.elapsed() >= LISTING_INTERVAL;
        let check = self.held.take_new() || lists;
        let mut record = self.record.clone();
        // Invariant: the leases are committed, then the intent, then the step is made, then the numbers are
        // handed out. A copy of the folder that knows of this step has the leases too.
        record.known = record.known.begin(Uuid::new_v4());
        for pass in waiting {
            record.cover(&pass.lease);
        }
        if !self.save(&record, stop).await {
            return Ok(false);
        }
        self.record = record;
        let made = async {
            make(&self.store, &self.keys, &self.record, |error| self.troubled(error)).await?;
            if check { self.look_at_claims().await } else { Ok(()) }
        };
        match unless(stop, made).await {
            Some(made) => {
                made?;
                if check {
                    self.listed = Instant::now();
                }
                self.held.stepped();
                self.state.steps.fetch_add(1, Ordering::Relaxed);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Waits until the store responds, and checks that it still has what this instance noted: see [`Held`].
    async fn look_at_claims(&self) -> Result<(), Lost> {
        let mut pause = PAUSE;
        loop {
            match self.held.is_there(&self.store, &self.keys, self.record.instance).await {
                Ok(true) => {
                    self.troubled(None);
                    return Ok(());
                }
                Ok(false) => return Err(Lost::StoreBehind),
                Err(error) => self.troubled(Some(&error)),
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Retries until the record is on the disk; numbers that are leased already are served all the while.
    /// Returns false if it was stopped before.
    async fn save(&self, record: &Record, stop: &watch::Receiver<bool>) -> bool {
        let mut pause = PAUSE;
        loop {
            let (saving, folder) = (record.clone(), self.folder.clone());
            // The write is not cancelled: another process could lock the folder before it ends.
            let saved = tokio::task::spawn_blocking(move || saving.save(&folder)).await;
            match saved.expect("saving does not panic") {
                Ok(()) => return true,
                Err(error) => self.set_trouble(Some(error.to_string())),
            }
            if unless(stop, sleep(pause)).await.is_none() {
                return false;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn troubled(&self, error: Option<&StoreError>) {
        self.set_trouble(error.map(|error| {
            format!("{error}; leased numbers are served until the store responds again")
        }));
    }

    fn set_trouble(&self, trouble: Option<String>) {
        let mut current = self.state.trouble.lock().expect(NO_PANIC);
        match (&*current, &trouble) {
            (None, Some(trouble)) => warn!("the fence can't be stepped: {trouble}"),
            (Some(_), None) => info!("the fence can be stepped again"),
            _ => {}
        }
        *current = trouble;
    }
}

/// Returns the result of `work`, or `None` if `stop` is true first.
async fn unless<T>(stop: &watch::Receiver<bool>, work: impl Future<Output = T>) -> Option<T> {
    let mut stop = stop.clone();
    tokio::select! {
        done = work => Some(done),
        _ = stop.wait_for(|&stop| stop) => None,
    }
}

/// Makes the step that a record has begun, whatever the outcome of earlier tries. Calls `tell` with each
/// error, and with `None` once the step is made.
async fn make(
    store: &Store,
    keys: &Keys,
    record: &Record,
    tell: impl Fn(Option<&StoreError>),
) -> Result<(), Lost> {
    let mut pause = PAUSE;
    let mut untried = true;
    loop {
        let error = match try_to_make(store, keys, record, untried).await {
            Ok(Standing::Current) => {
                tell(None);
                return Ok(());
            }
            Ok(Standing::Stale) => return Err(Lost::Stale),
            Ok(Standing::StoreBehind) => return Err(Lost::StoreBehind),
            // The step is not made yet. It is tried again, and can be made only once.
            Ok(Standing::Pending) => None,
            Err(error) => Some(error),
        };
        untried = false;
        if error.is_some() {
            tell(error.as_ref());
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Tries once to make the step that a record has begun. `untried` means that this process began it and that
/// this is the first try.
pub(super) async fn try_to_make(
    store: &Store,
    keys: &Keys,
    record: &Record,
    untried: bool,
) -> Result<Standing, StoreError> {
    let key = keys.fence(record.instance);
    let known = record.known;
    let Some(intent) = known.intent else {
        return Ok(known.judge(read(store, keys, record).await?));
    };
    let made = match known.fence {
        Some(fence) => store.replace(&key, &text(fence), &text(intent)).await,
        None => store.create(&[(key, text(intent))]).await,
    };
    match made {
        Ok(true) => Ok(Standing::Current),
        Ok(false) => Ok(known.judge_refusal(read(store, keys, record).await?, untried)),
        // Invariant: after an unknown outcome, the content of the store decides.
        Err(error) => match known.judge(read(store, keys, record).await?) {
            // The store can be read but not written: its disk is full, or it is a standby.
            Standing::Pending => Err(error),
            standing => Ok(standing),
        },
    }
}

/// Reads the fence of a record's instance from the store.
pub(super) async fn read(
    store: &Store,
    keys: &Keys,
    record: &Record,
) -> Result<Option<Fence>, StoreError> {
    let found = store.get(&keys.fence(record.instance)).await?;
    // A fence that can't be parsed is not ours: its writer has taken our place.
    let foreign = Fence { step: u64::MAX, token: Uuid::nil() };
    Ok(found.map(|found| serde_json::from_str(&found).unwrap_or(foreign)))
}

/// Returns a fence as the store has it.
pub(super) fn text(fence: Fence) -> String {
    serde_json::to_string(&fence).expect("it has two plain fields")
}
