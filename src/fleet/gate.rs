//! The gate that a lease passes before its numbers are handed out. It opens with a step of the instance's
//! fence, and leases that wait share one step. Knows nothing of rows.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::joined::{JoinedSpace, Partitions};
use super::protocol::{Fence, KnownFence, Lost, Standing};
use super::record::{Lease, Record};
use super::store::FleetStoreError;
use crate::backoff::Backoff;
use crate::config::PoolName;
use crate::files::FileError;

/// Leases that can wait for a step. Each shard has at most one that waits.
const WAITING_MAX: usize = 4096;

/// The first and the longest pause before the store or the disk is tried again.
const RETRY: Duration = Duration::from_millis(50);
const RETRY_LIMIT: Duration = Duration::from_secs(1);

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

/// The gate that leases pass.
#[derive(Clone, Debug)]
pub struct Gate {
    passes: mpsc::Sender<Pass>,
    shared: Arc<Shared>,
}

/// The part of the gatekeeper that all clones of the gate can see.
#[derive(Debug)]
struct Shared {
    lost: watch::Sender<Option<Lost>>,
    /// Steps made by this process.
    steps: AtomicU64,
    /// The problem that keeps the gate shut at the moment.
    trouble: Mutex<Option<String>>,
    /// A notice to report for as long as the process runs.
    notice: Option<String>,
    space: Arc<JoinedSpace>,
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
    shared: Arc<Shared>,
    space: Arc<JoinedSpace>,
    folder: PathBuf,
    record: Record,
    /// A write of the record that has begun.
    saving: Option<JoinHandle<Result<(), FileError>>>,
    look_interval: Duration,
    /// When all claims were last listed.
    listed: Instant,
    /// Whether [`run`](Self::run) has begun and has not ended as intended.
    runs: bool,
}

/// A call to the gatekeeper.
enum Call {
    Step(Pass),
    Look,
}

impl Gate {
    pub(super) fn new(
        space: Arc<JoinedSpace>,
        folder: PathBuf,
        record: Record,
        notice: Option<String>,
    ) -> (Self, Gatekeeper) {
        let (passes, receiver) = mpsc::channel(WAITING_MAX);
        let shared = Arc::new(Shared {
            lost: watch::Sender::new(None),
            steps: AtomicU64::new(0),
            trouble: Mutex::default(),
            notice,
            space: Arc::clone(&space),
        });
        let keeper = Gatekeeper {
            passes: receiver,
            shared: Arc::clone(&shared),
            space,
            folder,
            record,
            saving: None,
            look_interval: LOOK_INTERVAL,
            listed: Instant::now(),
            runs: false,
        };
        (Self { passes, shared }, keeper)
    }

    /// Waits until a step of the fence covers this lease, which is committed. Returns whether its rows may be
    /// handed out: they may not if the gatekeeper has ended, because it was stopped or the fence is lost.
    pub async fn pass(&self, lease: Lease) -> bool {
        let (reply, passed) = oneshot::channel();
        self.passes.send(Pass { lease, reply }).await.is_ok() && passed.await.is_ok()
    }

    /// Waits until nothing may be handed out any more, and returns why.
    pub async fn lost(&self) -> Lost {
        let mut lost = self.shared.lost.subscribe();
        let found = lost.wait_for(Option::is_some).await.expect("the gate has the sender");
        found.expect("it was waited for")
    }

    /// Returns the steps made since the start, and whether the next one can be made as far as is known.
    pub fn figures(&self) -> (u64, bool) {
        let is_shut = self.shared.trouble.lock().expect(NO_PANIC).is_some();
        (self.shared.steps.load(Ordering::Relaxed), !is_shut)
    }

    /// Returns the partitions of a pool, as far as this instance knows.
    pub fn partitions(&self, pool: &PoolName) -> Partitions {
        self.shared.space.figures(pool)
    }

    /// Returns the problem or the notice to report in `/health`.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.shared.trouble.lock().expect(NO_PANIC).clone();
        trouble.or_else(|| self.shared.notice.clone())
    }
}

const NO_PANIC: &str = "nothing panics with it";

impl Drop for Gatekeeper {
    fn drop(&mut self) {
        if self.runs {
            // No lease passes any more, so `/health` has to say why.
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

    /// Returns the space and a copy of the record.
    #[cfg(test)]
    pub(super) fn parts(&self) -> (&JoinedSpace, Record) {
        (&self.space, self.record.clone())
    }

    /// Steps the fence for the leases that wait, until it is stopped, no lease can come any more, or the fence
    /// is lost. If it is stopped, the step in progress may be made or not, and the next start finds out.
    pub async fn run(mut self, stop: CancellationToken) {
        self.runs = true;
        if let Some(Err(lost)) = stop.run_until_cancelled(self.serve()).await {
            error!("{lost}");
            self.shared.lost.send_replace(Some(lost));
            if lost == Lost::Stale {
                // The next start may not notice it: a clone's step may have the same token.
                let mut record = self.record.clone();
                record.is_stale = true;
                // Tried at least once, also if it is stopped by now.
                tokio::select! { biased;
                    () = self.save(&record) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
        if let Some(saving) = self.saving.take() {
            // The write is not cancelled: another process could lock the folder before it ends.
            let _ = saving.await;
        }
        self.runs = false;
    }

    async fn serve(&mut self) -> Result<(), Lost> {
        let mut next_look = Instant::now() + self.look_interval;
        while let Some(call) = self.call(next_look).await {
            match call {
                Call::Step(first) => self.open_for(first).await?,
                Call::Look => self.look().await?,
            }
            let is_shut = self.shared.trouble.lock().expect(NO_PANIC).is_some();
            let pause =
                if is_shut { RETRY_LIMIT.min(self.look_interval) } else { self.look_interval };
            next_look = Instant::now() + pause;
        }
        Ok(())
    }

    /// Waits until there is something to do. Returns `None` if no lease can come any more.
    async fn call(&mut self, next_look: Instant) -> Option<Call> {
        tokio::select! {
            pass = self.passes.recv() => pass.map(Call::Step),
            () = self.space.doubted() => Some(Call::Look),
            () = sleep_until(next_look) => Some(Call::Look),
        }
    }

    /// Makes a step for this lease and all others that wait.
    async fn open_for(&mut self, first: Pass) -> Result<(), Lost> {
        let mut waiting = vec![first];
        while let Ok(more) = self.passes.try_recv() {
            waiting.push(more);
        }
        self.step(&waiting).await?;
        // A worker that has ended by now hands nothing out.
        waiting.into_iter().for_each(|pass| pass.reply.send(()).unwrap_or(()));
        Ok(())
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
                    self.troubled(Some(&self.space.store.error(&problem)));
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
    async fn standing(&self, lists: bool) -> Result<Standing, FleetStoreError> {
        let Record { instance, known, .. } = self.record;
        let standing = KnownFence::at(known.last()).judge(self.space.fence(instance).await?);
        let has_entries = match lists {
            true => self.space.has_all(instance).await?,
            false => self.space.has_records().await?,
        };
        Ok(if has_entries { standing } else { Standing::StoreBehind })
    }

    /// Makes one step that covers all of `waiting`.
    async fn step(&mut self, waiting: &[Pass]) -> Result<(), Lost> {
        let lists = self.listed.elapsed() >= LISTING_INTERVAL;
        let check = self.space.take_new() || lists;
        let mut record = self.record.clone();
        // Invariant: the leases are committed, then the intent, then the step is made, then the numbers are
        // handed out. A copy of the folder that knows of this step has the leases too.
        record.known = record.known.begin(Uuid::new_v4());
        for pass in waiting {
            record.cover(&pass.lease);
        }
        self.save(&record).await;
        self.record = record;
        self.make().await?;
        if check {
            self.look_at_claims().await?;
            self.listed = Instant::now();
        }
        self.space.stepped();
        self.shared.steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the step that the record has begun, whatever the outcome of earlier tries.
    async fn make(&self) -> Result<(), Lost> {
        let mut backoff = Backoff::new(RETRY, RETRY_LIMIT);
        let mut untried = true;
        loop {
            match try_to_make(&self.space, &self.record, untried).await {
                Ok(Standing::Current) => {
                    self.troubled(None);
                    return Ok(());
                }
                Ok(Standing::Stale) => return Err(Lost::Stale),
                Ok(Standing::StoreBehind) => return Err(Lost::StoreBehind),
                // The step is not made yet. It is tried again, and can be made only once.
                Ok(Standing::Pending) => {}
                Err(error) => self.troubled(Some(&error)),
            }
            untried = false;
            sleep(backoff.next()).await;
        }
    }

    /// Waits until the store responds, and checks that it still has the entries of the [`JoinedSpace`].
    async fn look_at_claims(&self) -> Result<(), Lost> {
        let mut backoff = Backoff::new(RETRY, RETRY_LIMIT);
        loop {
            match self.space.has_all(self.record.instance).await {
                Ok(true) => {
                    self.troubled(None);
                    return Ok(());
                }
                Ok(false) => return Err(Lost::StoreBehind),
                Err(error) => self.troubled(Some(&error)),
            }
            sleep(backoff.next()).await;
        }
    }

    /// Retries until the record is on the disk. Numbers that are leased already are served all the while.
    async fn save(&mut self, record: &Record) {
        let mut backoff = Backoff::new(RETRY, RETRY_LIMIT);
        loop {
            let (copy, folder) = (record.clone(), self.folder.clone());
            let saving = self.saving.insert(spawn_blocking(move || copy.save(&folder)));
            let saved = saving.await.expect("saving does not panic");
            self.saving = None;
            match saved {
                Ok(()) => return,
                Err(error) => self.set_trouble(Some(error.to_string())),
            }
            sleep(backoff.next()).await;
        }
    }

    fn troubled(&self, error: Option<&FleetStoreError>) {
        self.set_trouble(error.map(|error| {
            format!("{error}; leased numbers are served until the store responds again")
        }));
    }

    fn set_trouble(&self, trouble: Option<String>) {
        let mut current = self.shared.trouble.lock().expect(NO_PANIC);
        match (&*current, &trouble) {
            (None, Some(trouble)) => warn!("the fence can't be stepped: {trouble}"),
            (Some(_), None) => info!("the fence can be stepped again"),
            _ => {}
        }
        *current = trouble;
    }
}

/// Tries once to make the step that a record has begun. `untried` means that this process began it and that
/// this is the first try.
pub(super) async fn try_to_make(
    space: &JoinedSpace,
    record: &Record,
    untried: bool,
) -> Result<Standing, FleetStoreError> {
    let Record { instance, known, .. } = *record;
    let Some(intent) = known.intent else {
        return Ok(known.judge(space.fence(instance).await?));
    };
    let key = space.keys.fence(instance);
    let made = match known.fence {
        Some(fence) => space.store.replace(&key, &text(fence), &text(intent)).await,
        None => space.store.create(&[(key, text(intent))]).await,
    };
    match made {
        Ok(true) => Ok(Standing::Current),
        Ok(false) => Ok(known.judge_refusal(space.fence(instance).await?, untried)),
        // Invariant: after an unknown outcome, the content of the store decides.
        Err(error) => match known.judge(space.fence(instance).await?) {
            // The store can be read but not written: its disk is full, or it is a standby.
            Standing::Pending => Err(error),
            standing => Ok(standing),
        },
    }
}

/// Returns a fence as the store has it.
pub(super) fn text(fence: Fence) -> String {
    serde_json::to_string(&fence).expect("it has two plain fields")
}
