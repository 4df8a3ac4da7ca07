//! The simpler modes: a number is drawn when it is requested, and saved in a [`Store`] before it is handed out.
//! Knows nothing of HTTP, and nothing of a store but its trait.
//!
//! A [`Generator`] belongs to one thread. The mode simple calls it for each request, on the only thread that the
//! server has. The modes json and sqlite [run](Generator::run) it on a thread of its own, where concurrent
//! requests share one commit. A [`Handle`] hides the difference.

mod json_store;
mod table_store;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rand::rngs::SysRng;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tokio::sync::{mpsc, oneshot};
use tracing::error;

pub(crate) use self::json_store::JsonStore;
pub use self::table_store::TableStore;
use crate::config::{Config, PoolConfig};
use crate::files::FileError;
use crate::folder::{self, Folder, FolderError};
use crate::import::Outcome;
use crate::space::{Space, Value};
use crate::sqlite::rusqlite;

/// The most tries for one number.
pub(crate) const TRIES_MAX: u32 = 100;

/// The most draws that share one commit. As many can wait for the next one; more wait in their connections.
const GROUP_MAX: usize = 1024;

/// The values of an import that are saved with one commit: 50 MB in memory.
const IMPORTED_AT_ONCE: usize = 1 << 20;

/// A pool's position in the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolIndex(pub usize);

/// A number that may be fresh.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub pool: PoolIndex,
    pub value: Value,
}

/// The store of the numbers that were handed out, in which these modes differ.
pub trait Store: Sized + Send + 'static {
    /// How long to wait before the draws without a fresh number try again.
    const RETRY_DELAY: Duration;

    /// Opens the store in a folder, or creates it if there is none.
    ///
    /// # Errors
    /// [`OpenError`]; existing files are left unchanged.
    fn open(folder: &Path, pools: &[PoolConfig]) -> Result<Self, OpenError>;

    /// Saves the fresh candidates, durably before this returns, and returns whether each was fresh. If two
    /// are the same, the second is not fresh.
    ///
    /// # Errors
    /// [`StoreError`]; none of them may be handed out then.
    fn insert(&mut self, candidates: &[Candidate]) -> Result<Vec<bool>, StoreError>;

    /// Closes the files.
    ///
    /// # Errors
    /// [`StoreError`]; all saved numbers stay saved.
    fn close(self) -> Result<(), StoreError>;
}

/// Why a store did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// SQLite refused.
    #[error("{path}: {source}")]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    /// The file is damaged, or not tombola's.
    #[error(
        "{path} can't be used: {problem}. Only this file says which numbers were handed out, so it was left \
         as it is: restore it from a backup, or use another folder with --data-dir"
    )]
    Damaged { path: PathBuf, problem: String },
    /// The file may contain numbers outside the configured range.
    #[error(
        "{path} has the range {stored} for the pool {pool}, but {configured} is configured: a range can \
         grow, but not shrink or change its decimals. Use another pool name or another folder"
    )]
    OtherRange { path: PathBuf, pool: String, stored: String, configured: String },
}

/// Why a store did not save the candidates.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has locked the file.
    #[error("it is locked by another process")]
    Locked,
    /// It could not be written.
    #[error("{0}")]
    Failed(String),
}

/// Imports values, which must be in the range of the pool, into the store of a folder that no server uses. The store
/// does not tell which of its numbers were imported, so all that it has count as issued.
///
/// # Errors
/// [`ImportError`]; a part of the values may be saved then.
pub(crate) fn import<S: Store>(
    config: &Config,
    pool: PoolIndex,
    mut values: Vec<Value>,
) -> Result<Outcome, ImportError> {
    let given = values.len();
    values.sort_unstable();
    values.dedup();
    let folder = Folder::open(&config.dir, config.server.mode, false, Duration::ZERO)
        .map_err(OpenError::from)?;
    let mut store = S::open(folder.path(), &config.pools)?;
    let repeated = (given - values.len()) as u64;
    let mut outcome = Outcome { repeated, ..Outcome::default() };
    for values in values.chunks(IMPORTED_AT_ONCE) {
        let candidates: Vec<_> = values.iter().map(|&value| Candidate { pool, value }).collect();
        for (&value, fresh) in values.iter().zip(store.insert(&candidates)?) {
            match fresh {
                true => outcome.marked += 1,
                false => outcome.issued.push(value),
            }
        }
    }
    store.close()?;
    Ok(outcome)
}

/// Why an import is not complete.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// The store did not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The numbers could not be saved.
    #[error("the numbers could not be saved: {0}. Run the import again")]
    Store(#[from] StoreError),
}

/// Why there is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrawError {
    /// Each of the [`TRIES_MAX`] tries hit a used number or a locked file.
    OutOfTries,
    /// The number could not be saved, so it must not be handed out.
    NotSaved,
}

/// The health of a mode below sharded.
#[derive(Clone, Debug)]
pub(crate) struct GeneratorHealth {
    /// Whether the thread that draws is alive.
    pub alive: bool,
    /// Why the last numbers could not be saved.
    pub trouble: Option<String>,
}

/// Why the last insert failed. The desks share it.
type Trouble = Arc<Mutex<Option<String>>>;

/// A request that waits for a number.
#[derive(Debug)]
struct Draw {
    pool: PoolIndex,
    tries: u32,
    result: oneshot::Sender<Result<Value, DrawError>>,
}

impl Draw {
    fn new(pool: PoolIndex) -> (Self, oneshot::Receiver<Result<Value, DrawError>>) {
        let (result, receiver) = oneshot::channel();
        (Self { pool, tries: 0, result }, receiver)
    }

    fn end(self, result: Result<Value, DrawError>) {
        // If the client has gone, the number is burned, as a number in a lost response would be.
        let _ = self.result.send(result);
    }
}

/// Draws numbers, and hands out those that the store has saved.
#[derive(Debug)]
pub(crate) struct Generator<S> {
    store: S,
    spaces: Vec<Space>,
    rng: ChaCha20Rng,
    trouble: Trouble,
}

impl<S: Store> Generator<S> {
    /// Locks the folder and opens the store in it.
    ///
    /// # Errors
    /// [`OpenError`]; existing files are left unchanged.
    pub(crate) fn open(config: &Config) -> Result<(Folder, Self), OpenError> {
        let folder = Folder::open(&config.dir, config.server.mode, false, folder::PATIENCE)?;
        let generator = Self {
            store: S::open(folder.path(), &config.pools)?,
            spaces: config.pools.iter().map(|pool| pool.space.clone()).collect(),
            rng: ChaCha20Rng::try_from_rng(&mut SysRng)
                .expect("the operating system has randomness"),
            trouble: Trouble::default(),
        };
        Ok((folder, generator))
    }

    /// Draws one number.
    fn draw(&mut self, pool: PoolIndex) -> Result<Value, DrawError> {
        let (draw, mut result) = Draw::new(pool);
        let mut draws = vec![draw];
        while !draws.is_empty() {
            draws = self.attempt(draws);
        }
        result.try_recv().expect("a draw that ended has a result")
    }

    /// Draws what is requested through the queue's handle until the handle is dropped, then closes the store.
    pub(crate) fn run(mut self, mut queue: Queue) {
        let mut draws = Vec::new();
        loop {
            if draws.is_empty() {
                match queue.0.blocking_recv() {
                    Some(draw) => draws.push(draw),
                    None => return self.close(),
                }
            }
            // The draws that arrived during the last commit share the next one.
            while draws.len() < GROUP_MAX
                && let Ok(draw) = queue.0.try_recv()
            {
                draws.push(draw);
            }
            draws = self.attempt(draws);
        }
    }

    fn close(self) {
        if let Err(error) = self.store.close() {
            error!(%error, "the store did not close; no number is lost");
        }
    }

    /// Makes one try for each draw. Ends the draws that are done, and returns those that have to try again.
    fn attempt(&mut self, draws: Vec<Draw>) -> Vec<Draw> {
        let candidates: Vec<Candidate> =
            draws.iter().map(|draw| self.candidate(draw.pool)).collect();
        // Invariant: saved, durably, before it is handed out.
        let inserted = self.store.insert(&candidates);
        self.note(&inserted);
        let fresh = match inserted {
            Ok(fresh) => fresh,
            Err(StoreError::Locked) => vec![false; candidates.len()],
            Err(StoreError::Failed(_)) => {
                draws.into_iter().for_each(|draw| draw.end(Err(DrawError::NotSaved)));
                return Vec::new();
            }
        };
        assert_eq!(fresh.len(), candidates.len(), "a store reports on each candidate");

        let mut again = Vec::new();
        for ((mut draw, candidate), fresh) in draws.into_iter().zip(candidates).zip(fresh) {
            draw.tries += 1;
            match fresh {
                true => draw.end(Ok(candidate.value)),
                false if draw.tries >= TRIES_MAX => draw.end(Err(DrawError::OutOfTries)),
                false => again.push(draw),
            }
        }
        if !again.is_empty() {
            thread::sleep(S::RETRY_DELAY);
        }
        again
    }

    fn candidate(&mut self, pool: PoolIndex) -> Candidate {
        let space = &self.spaces[pool.0];
        let value = Value(self.rng.random_range(space.min().0..=space.max().0));
        debug_assert!(space.contains(value));
        Candidate { pool, value }
    }

    fn note(&self, inserted: &Result<Vec<bool>, StoreError>) {
        let mut trouble = lock(&self.trouble);
        match inserted {
            Ok(_) => *trouble = None,
            Err(StoreError::Locked) => {}
            Err(StoreError::Failed(problem)) => {
                error!(error = %problem, "numbers could not be saved, and are not handed out");
                *trouble = Some(problem.clone());
            }
        }
    }
}

/// How requests reach a [`Generator`].
#[derive(Debug)]
pub(crate) struct Handle {
    draws: Draws,
    trouble: Trouble,
}

#[derive(Debug)]
enum Draws {
    /// Each request draws by itself, and blocks the thread until its number is saved.
    Direct(Box<Mutex<Generator<JsonStore>>>),
    Queued(mpsc::Sender<Draw>),
}

/// The draws that wait for [`Generator::run`].
#[derive(Debug)]
pub(crate) struct Queue(mpsc::Receiver<Draw>);

impl Handle {
    /// Returns a handle that runs the generator on the thread of the caller, one draw at a time.
    pub(crate) fn direct(generator: Generator<JsonStore>) -> Self {
        let trouble = Arc::clone(&generator.trouble);
        Self { draws: Draws::Direct(Box::new(Mutex::new(generator))), trouble }
    }

    /// Returns a handle, and the queue that the generator has to [run](Generator::run) with.
    pub(crate) fn queued<S>(generator: &Generator<S>) -> (Self, Queue) {
        let (draws, queue) = mpsc::channel(GROUP_MAX);
        (
            Self { draws: Draws::Queued(draws), trouble: Arc::clone(&generator.trouble) },
            Queue(queue),
        )
    }

    /// Draws one number.
    pub(crate) async fn draw(&self, pool: PoolIndex) -> Result<Value, DrawError> {
        let draws = match &self.draws {
            Draws::Direct(generator) => return lock(generator).draw(pool),
            Draws::Queued(draws) => draws,
        };
        let (draw, result) = Draw::new(pool);
        // Either fails only if the thread of the generator died.
        draws.send(draw).await.map_err(|_| DrawError::NotSaved)?;
        result.await.unwrap_or(Err(DrawError::NotSaved))
    }

    /// Returns whether numbers can be drawn.
    pub(crate) fn health(&self) -> GeneratorHealth {
        let alive = match &self.draws {
            Draws::Direct(generator) => !generator.is_poisoned(),
            Draws::Queued(draws) => !draws.is_closed(),
        };
        GeneratorHealth { alive, trouble: lock(&self.trouble).clone() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses a pool whose range does not cover the range of the file.
fn check_range(
    path: &Path,
    pool: &str,
    stored: &Space,
    configured: &Space,
) -> Result<(), OpenError> {
    if configured.covers(stored) {
        return Ok(());
    }
    Err(OpenError::OtherRange {
        path: path.to_owned(),
        pool: pool.to_owned(),
        stored: stored.to_string(),
        configured: configured.to_string(),
    })
}
