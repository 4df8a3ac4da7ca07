//! The rungs below the pool server: a number is drawn when it is asked for, and kept in a [`Store`]
//! before it is handed out. Here are the tries that a number gets, and how those who ask at the same
//! time share one commit. Knows nothing of HTTP, and of a store only its trait.
//!
//! [`Numbers`] belongs to one thread. Rung 1 calls it for each request; rungs 2 and 3 let it
//! [`run`](Numbers::run) beside the runtime and ask through a [`Desk`].

mod json_store;
mod table_store;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rand::rngs::SysRng;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tokio::sync::{mpsc, oneshot};
use tracing::error;

pub use self::json_store::JsonStore;
pub use self::table_store::TableStore;
use crate::config::{Config, PoolConfig};
use crate::files::FileError;
use crate::folder::{Folder, FolderError};
use crate::space::{Space, Value};
use crate::sqlite::rusqlite;

/// Tries that one number gets.
pub const TRIES_MAX: u32 = 100;

/// Draws that share one commit, and as many may wait for the next. More wait in their connections.
const GROUP_MAX: usize = 1024;

/// Which pool: its place in the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolIndex(pub usize);

/// A number that may be fresh.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// The pool.
    pub pool: PoolIndex,
    /// The number.
    pub value: Value,
}

/// What the rungs differ in: where the numbers that were handed out are kept.
pub trait Store: Sized + Send + 'static {
    /// How long to wait before those who had no luck try again.
    const RETRY_DELAY: Duration;

    /// Opens what the folder holds, or begins anew where it holds nothing.
    ///
    /// # Errors
    /// [`OpenError`]; what is there is left as it was.
    fn open(folder: &Path, pools: &[PoolConfig]) -> Result<Self, OpenError>;

    /// Keeps those of the candidates that are fresh, durably once this returns, and says of each
    /// whether it was. Of two that are the same, the second is not.
    ///
    /// # Errors
    /// [`StoreError`]; none of them may be handed out then.
    fn insert(&mut self, candidates: &[Candidate]) -> Result<Vec<bool>, StoreError>;

    /// Ends the use of the files.
    ///
    /// # Errors
    /// [`StoreError`]; all that was kept stays kept.
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
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The error.
        source: rusqlite::Error,
    },
    /// The file is not ours, or not whole.
    #[error(
        "{path} can't be used: {problem}. It was left as it is. Without it nobody can tell which \
         numbers were handed out: restore it from a backup, or use another folder with --data-dir"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        problem: String,
    },
    /// The file holds numbers that the configured range does not have.
    #[error(
        "{path} has the pool {pool} for {stored}, the configuration says {configured}: a range can \
         grow, but not shrink or change its decimals; use another pool name or another folder"
    )]
    OtherRange {
        /// The file.
        path: PathBuf,
        /// The pool.
        pool: String,
        /// The range of the file.
        stored: String,
        /// The configured range.
        configured: String,
    },
}

/// Why a store did not keep what it was given.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Someone else has the file just now.
    #[error("it is locked by another process")]
    Locked,
    /// It could not be written.
    #[error("{0}")]
    Failed(String),
}

/// Why there is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrawError {
    /// None of the [`TRIES_MAX`] tries hit a free number while the store was there.
    OutOfTries,
    /// The number could not be kept, so it must not be handed out.
    NotSaved,
}

/// How fit a rung is to serve.
#[derive(Clone, Debug)]
pub struct Health {
    /// Whether someone serves at all.
    pub alive: bool,
    /// Why the last numbers could not be kept.
    pub trouble: Option<String>,
}

/// Why the last insert failed; shared with those who ask.
type Trouble = Arc<Mutex<Option<String>>>;

/// Someone who waits for a number.
#[derive(Debug)]
struct Draw {
    pool: PoolIndex,
    tries: u32,
    answer: oneshot::Sender<Result<Value, DrawError>>,
}

impl Draw {
    fn new(pool: PoolIndex) -> (Self, oneshot::Receiver<Result<Value, DrawError>>) {
        let (answer, answered) = oneshot::channel();
        (Self { pool, tries: 0, answer }, answered)
    }

    fn end(self, outcome: Result<Value, DrawError>) {
        // Nobody is there any more: the number is burned, as one lost on the way would be.
        let _ = self.answer.send(outcome);
    }
}

/// Draws numbers, and hands out those that the store kept.
#[derive(Debug)]
pub struct Numbers<S> {
    store: S,
    spaces: Vec<Space>,
    rng: ChaCha20Rng,
    trouble: Trouble,
}

impl<S: Store> Numbers<S> {
    /// Locks the folder and opens the store in it.
    ///
    /// # Errors
    /// [`OpenError`]; what is there is left as it was.
    pub fn open(config: &Config) -> Result<(Folder, Self), OpenError> {
        let folder = Folder::open(&config.dir, config.server.mode, false)?;
        let numbers = Self {
            store: S::open(folder.path(), &config.pools)?,
            spaces: config.pools.iter().map(|pool| pool.space).collect(),
            rng: ChaCha20Rng::try_from_rng(&mut SysRng)
                .expect("the operating system has randomness"),
            trouble: Trouble::default(),
        };
        Ok((folder, numbers))
    }

    /// Draws one number.
    ///
    /// # Errors
    /// [`DrawError`].
    pub fn draw(&mut self, pool: PoolIndex) -> Result<Value, DrawError> {
        let (draw, mut answered) = Draw::new(pool);
        let mut draws = vec![draw];
        while !draws.is_empty() {
            draws = self.attempt(draws);
        }
        answered.try_recv().expect("a draw that ended was answered")
    }

    /// Draws for all who ask at the desk, until the desk and its clones are gone; then closes.
    pub fn run(mut self, mut queue: Queue) {
        let mut draws = Vec::new();
        loop {
            if draws.is_empty() {
                match queue.0.blocking_recv() {
                    Some(draw) => draws.push(draw),
                    None => return self.close(),
                }
            }
            // Those who came while the last commit was on its way share the next.
            while draws.len() < GROUP_MAX
                && let Ok(draw) = queue.0.try_recv()
            {
                draws.push(draw);
            }
            draws = self.attempt(draws);
        }
    }

    /// Closes the store.
    pub fn close(self) {
        if let Err(error) = self.store.close() {
            error!(%error, "the store did not close; nothing is lost by it");
        }
    }

    /// How fit it is to serve.
    #[must_use]
    pub fn health(&self) -> Health {
        Health { alive: true, trouble: lock(&self.trouble).clone() }
    }

    /// One try for each. Answers those who are done and returns those who are to try again.
    fn attempt(&mut self, draws: Vec<Draw>) -> Vec<Draw> {
        let candidates: Vec<Candidate> =
            draws.iter().map(|draw| self.candidate(draw.pool)).collect();
        // Invariant: kept, durably, before it is handed out.
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
        assert_eq!(fresh.len(), candidates.len(), "a store speaks of each candidate");

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
                error!(error = %problem, "numbers could not be kept, and are not handed out");
                *trouble = Some(problem.clone());
            }
        }
    }
}

/// Where tasks ask for numbers; clones ask the same [`Numbers`].
#[derive(Clone, Debug)]
pub struct Desk {
    draws: mpsc::Sender<Draw>,
    trouble: Trouble,
}

/// The other side of a [`Desk`].
#[derive(Debug)]
pub struct Queue(mpsc::Receiver<Draw>);

impl Desk {
    /// A desk for these numbers, and the queue that they have to [`run`](Numbers::run) with.
    pub fn new<S>(numbers: &Numbers<S>) -> (Self, Queue) {
        let (draws, queue) = mpsc::channel(GROUP_MAX);
        (Self { draws, trouble: Arc::clone(&numbers.trouble) }, Queue(queue))
    }

    /// Draws one number.
    ///
    /// # Errors
    /// [`DrawError`].
    pub async fn draw(&self, pool: PoolIndex) -> Result<Value, DrawError> {
        let (draw, answered) = Draw::new(pool);
        // Either fails only when the thread behind the desk died.
        self.draws.send(draw).await.map_err(|_| DrawError::NotSaved)?;
        answered.await.unwrap_or(Err(DrawError::NotSaved))
    }

    /// How fit the numbers behind it are to serve.
    #[must_use]
    pub fn health(&self) -> Health {
        Health { alive: !self.draws.is_closed(), trouble: lock(&self.trouble).clone() }
    }
}

fn lock(trouble: &Trouble) -> std::sync::MutexGuard<'_, Option<String>> {
    trouble.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses a pool whose range is not what a file's numbers were drawn from, or a larger one.
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
