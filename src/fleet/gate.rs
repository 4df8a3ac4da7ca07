//! The gate between a lease and those who are handed its numbers: it opens with a step of the
//! instance's fence. Leases that wait share one step. Knows nothing of rows.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::claims::Held;
use super::keys::Keys;
use super::protocol::{Fence, Standing};
use super::record::{Lease, Record};
use super::store::{Store, StoreError};

/// Leases that wait for a step: more than there are shards never do.
const WAITING_MAX: usize = 4096;

/// First and longest wait before the store, or the disk, is tried again.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Why nothing may be handed out any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Another copy of the folder has taken this one's place.
    #[error(
        "another copy of this data folder has gone on from here: what this one holds may be handed out \
         there, so that nothing of it is served any more. Find out which of them is a clone or a restored \
         backup. Started without --refuse-if-stale, this one sets its files aside and begins anew"
    )]
    Stale,
    /// The store forgot what it had agreed to.
    #[error(
        "the store is behind this data folder: it was restored from a copy, or is another one. Nothing \
         is served, as others may be given what was given out already. See `tombola fleet status`; when \
         the store is the right one, `tombola fleet reseed` for each folder of the fleet"
    )]
    StoreBehind,
}

/// Where leases ask to pass.
#[derive(Clone, Debug)]
pub struct Gate {
    passes: mpsc::Sender<Pass>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    lost: watch::Sender<Option<Lost>>,
    /// Steps made in the life of the process.
    steps: AtomicU64,
    /// What keeps the gate shut for now.
    trouble: Mutex<Option<String>>,
    /// What is worth knowing for as long as the process lives.
    notice: Option<String>,
}

#[derive(Debug)]
struct Pass {
    lease: Lease,
    reply: oneshot::Sender<()>,
}

/// Steps the fence. The only one who does.
#[derive(Debug)]
pub struct Gatekeeper {
    passes: mpsc::Receiver<Pass>,
    state: Arc<State>,
    store: Arc<Store>,
    keys: Keys,
    held: Arc<Held>,
    folder: PathBuf,
    record: Record,
    /// As it should, or with the fence lost, which is said.
    ended: bool,
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
        let state =
            Arc::new(State { lost, steps: AtomicU64::new(0), trouble: Mutex::default(), notice });
        let keeper = Gatekeeper {
            passes: receiver,
            state: Arc::clone(&state),
            store,
            keys,
            held,
            folder,
            record,
            ended: false,
        };
        (Self { passes, state }, keeper)
    }

    /// Completes when the fence has moved on with this lease, which is committed: its rows may be handed
    /// out then. Never, when they may not.
    pub async fn pass(&self, lease: Lease) {
        let (reply, passed) = oneshot::channel();
        let asked = self.passes.send(Pass { lease, reply }).await.is_ok();
        if !asked || passed.await.is_err() {
            // The gatekeeper is gone. Whoever waits here is told to stop, and does not wait any more.
            std::future::pending::<()>().await;
        }
    }

    /// Completes when nothing may be handed out any more.
    pub async fn lost(&self) -> Lost {
        let mut lost = self.state.lost.subscribe();
        let found = lost.wait_for(Option::is_some).await.expect("the state has a sender");
        found.expect("it was waited for")
    }

    /// Steps made since the start, and whether the next one can be made as far as anyone knows.
    #[must_use]
    pub fn figures(&self) -> (u64, bool) {
        let is_shut = self.state.trouble.lock().expect(NO_PANIC).is_some();
        (self.state.steps.load(Ordering::Relaxed), !is_shut)
    }

    /// What is wrong, for `/health`.
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
            // Workers wait for ever: `/health` has to say why.
            self.set_trouble(Some("the fence is not stepped any more; see the log".to_owned()));
        }
    }
}

impl Gatekeeper {
    /// Steps the fence for whoever waits, until `stop` is true, nobody can come any more, or the fence
    /// is lost.
    pub async fn run(mut self, stop: watch::Receiver<bool>) {
        self.serve(&stop).await;
        self.ended = true;
    }

    async fn serve(&mut self, stop: &watch::Receiver<bool>) {
        while let Some(Some(first)) = unless(stop, self.passes.recv()).await {
            let mut waiting = vec![first];
            while let Ok(more) = self.passes.try_recv() {
                waiting.push(more);
            }
            match self.step(&waiting, stop).await {
                // Who has gone meanwhile hands nothing out.
                Ok(true) => waiting.into_iter().for_each(|pass| pass.reply.send(()).unwrap_or(())),
                Ok(false) => return,
                Err(lost) => {
                    error!("{lost}");
                    self.state.lost.send_replace(Some(lost));
                    return;
                }
            }
        }
    }

    /// One step, which covers all of these. Answers whether it was made: stopped, it may be or not, and
    /// the next start finds out.
    async fn step(&mut self, waiting: &[Pass], stop: &watch::Receiver<bool>) -> Result<bool, Lost> {
        let check = self.held.take_new();
        let mut record = self.record.clone();
        // Invariant: the leases are committed, then the intent, then the step is made, then they are
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
                self.held.stepped();
                self.state.steps.fetch_add(1, Ordering::Relaxed);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Whether the store still has what this instance was told that it holds: see [`Held`].
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

    /// Tries until it is on the disk: what is leased already is served meanwhile. Answers whether it is.
    async fn save(&self, record: &Record, stop: &watch::Receiver<bool>) -> bool {
        let mut pause = PAUSE;
        loop {
            let (saving, folder) = (record.clone(), self.folder.clone());
            // Not given up half way: the folder would be another process's before it ends.
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
            format!("{error}; what is leased is served until the store answers again")
        }));
    }

    fn set_trouble(&self, trouble: Option<String>) {
        let mut current = self.state.trouble.lock().expect(NO_PANIC);
        match (&*current, &trouble) {
            (None, Some(trouble)) => warn!("no step of the fence: {trouble}"),
            (Some(_), None) => info!("the fence can be stepped again"),
            _ => {}
        }
        *current = trouble;
    }
}

/// What this comes to, unless `stop` is true before.
async fn unless<T>(stop: &watch::Receiver<bool>, work: impl Future<Output = T>) -> Option<T> {
    let mut stop = stop.clone();
    tokio::select! {
        done = work => Some(done),
        _ = stop.wait_for(|&stop| stop) => None,
    }
}

/// Makes the step that a record has begun, whatever became of earlier tries. `tell` hears what goes wrong
/// for now, and that nothing does any more.
async fn make(
    store: &Store,
    keys: &Keys,
    record: &Record,
    tell: impl Fn(Option<&StoreError>),
) -> Result<(), Lost> {
    let mut pause = PAUSE;
    loop {
        let error = match try_to_make(store, keys, record).await {
            Ok(Standing::Current) => {
                tell(None);
                return Ok(());
            }
            Ok(Standing::Stale) => return Err(Lost::Stale),
            Ok(Standing::StoreBehind) => return Err(Lost::StoreBehind),
            // Not made, or not yet: the same step again, which can be made only once.
            Ok(Standing::Pending) => None,
            Err(error) => Some(error),
        };
        if error.is_some() {
            tell(error.as_ref());
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// One try. What it comes to is what stands in the store after it.
pub(super) async fn try_to_make(
    store: &Store,
    keys: &Keys,
    record: &Record,
) -> Result<Standing, StoreError> {
    let key = keys.fence(record.instance);
    let mut failed = None;
    if let Some(intent) = record.known.intent {
        let to = text(intent);
        let made = match record.known.fence {
            Some(fence) => store.replace(&key, &text(fence), &to).await,
            None => store.create(&[(key.clone(), to)]).await.map(|()| false),
        };
        match made {
            Ok(true) => return Ok(Standing::Current),
            Ok(false) => {}
            Err(error) => failed = Some(error),
        }
    }
    // Invariant: after an unknown outcome, what stands in the store decides.
    match (record.known.judge(read(store, keys, record).await?), failed) {
        // It can be read and not written: its disk is full, or it is a standby.
        (Standing::Pending, Some(error)) => Err(error),
        (standing, _) => Ok(standing),
    }
}

/// The fence of a record's instance as the store has it.
pub(super) async fn read(
    store: &Store,
    keys: &Keys,
    record: &Record,
) -> Result<Option<Fence>, StoreError> {
    let found = store.get(&keys.fence(record.instance)).await?;
    // One that can't be read is none of ours: whoever wrote it has taken our place.
    let foreign = Fence { step: u64::MAX, token: Uuid::nil() };
    Ok(found.map(|found| serde_json::from_str(&found).unwrap_or(foreign)))
}

/// A fence as it stands in the store.
pub(super) fn text(fence: Fence) -> String {
    serde_json::to_string(&fence).expect("it has two plain fields")
}
