//! The task that owns one shard's file: leases, swaps in the next generation, gives back at the end.
//! The only place where a lease is committed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SysRng;
use rand_chacha::ChaCha20Rng;
use tracing::{debug, error, info, warn};

use super::Pool;
use super::buffer::{Buffer, Task};
use super::slot::Slot;
use crate::config::RefillConfig;
use crate::files::{self, FileError};
use crate::folder::PoolPaths;
use crate::shard::{Row, Shard, ShardError};
use crate::sqlite::rusqlite::Connection;
use crate::sqlite::{Database, DatabaseError, LOG_PAGES_MAX};

/// Why a shard's file could not be worked on.
#[derive(Debug, thiserror::Error)]
enum WorkError {
    #[error(transparent)]
    Shard(#[from] ShardError),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl WorkError {
    fn is_transient(&self) -> bool {
        match self {
            Self::Shard(error) => error.is_transient(),
            Self::Database(DatabaseError::Sqlite(error)) => crate::sqlite::is_transient(error),
            Self::Database(DatabaseError::Aborted(_)) => false,
            Self::File(_) => true,
        }
    }
}

/// An open file: the connection, and what is left behind it. The rest travels to the blocking
/// thread and back with each piece of work.
struct OpenFile {
    database: Database,
    shard: Option<(Shard, ChaCha20Rng)>,
}

/// See the [module](self).
pub(super) struct Worker {
    pool: Arc<Pool>,
    position: usize,
    slot: Arc<Slot>,
    paths: PoolPaths,
    refill: RefillConfig,
    file: Option<OpenFile>,
    /// How long to wait before trying again what failed for a passing cause.
    pause: Duration,
}

impl Worker {
    pub(super) fn new(
        pool: Arc<Pool>,
        position: usize,
        paths: PoolPaths,
        refill: RefillConfig,
    ) -> Self {
        let slot = Arc::clone(&pool.slots[position]);
        Self { pool, position, slot, paths, refill, file: None, pause: refill.retry }
    }

    /// Works until the pool is stopped.
    pub(super) async fn run(mut self) {
        let watch = self.pool.watch_task();
        loop {
            let task = self.slot.next();
            if self.slot.update(Buffer::calls_refiller) {
                self.pool.refill_wanted.notify_one();
            }
            match task {
                Task::Lease(_) if self.log_pages() >= 4 * LOG_PAGES_MAX => self.checkpoint().await,
                Task::Lease(rows) => self.lease(rows).await,
                Task::Swap => self.swap().await,
                Task::Retire => self.retire(),
                Task::Sleep if self.log_pages() >= LOG_PAGES_MAX => self.checkpoint().await,
                Task::Sleep => self.slot.woken().await,
                Task::Stop => break,
            }
        }
        self.give_back().await;
        watch.end();
    }

    /// Opens the live file and enters rotation; a damaged file is set aside.
    pub(super) async fn open(&mut self, standby: bool) {
        self.open_live(standby, false).await;
    }

    /// `swapped`: the file was just put in place, and can be again.
    async fn open_live(&mut self, standby: bool, swapped: bool) {
        match self.open_file(self.paths.live(self.slot.index)).await {
            Ok((file, shard)) => {
                let (generation, left) = (shard.label().generation, shard.left());
                let rng = ChaCha20Rng::try_from_rng(&mut SysRng)
                    .expect("the operating system has randomness");
                self.file = Some(OpenFile { database: file, shard: Some((shard, rng)) });
                self.slot.update(|buffer| buffer.opened(generation, left, standby));
                self.recovered();
                if left > 0 {
                    self.pool.enter_rotation(self.position);
                }
                info!(
                    pool = %self.pool.name, shard = %self.slot.name, generation = generation.0, left,
                    "the shard is open"
                );
            }
            Err(error) if swapped && error.is_transient() => {
                self.pause("the next generation can't be opened", &error).await;
            }
            Err(error) => self.lost(&error, standby).await,
        }
    }

    async fn open_file(&self, path: PathBuf) -> Result<(Database, Shard), WorkError> {
        let database = Database::open(&path).await?;
        let folder = self.paths.folder().to_owned();
        let open = move |connection: &mut Connection| {
            let shard = Shard::open(connection)?;
            // SQLite syncs the name of a log that it creates, but ignores that this failed.
            files::sync_folder(&folder)?;
            Ok::<_, ShardError>(shard)
        };
        match database.call(open).await? {
            Ok(shard) => Ok((database, shard)),
            Err(error) => {
                // Now: dropped, it would be closed at some time when another file bears its name.
                let _ = database.close().await;
                Err(error.into())
            }
        }
    }

    async fn lease(&mut self, rows: usize) {
        let unserved = self.slot.look(Buffer::unserved);
        let leased = self
            .with_file(move |shard, connection, rng| shard.lease(connection, rows, unserved, rng))
            .await;
        match leased {
            Ok((rows, left)) => {
                debug!(shard = %self.slot.name, rows = rows.len(), left, "rows were leased");
                // Invariant: committed before handed out.
                self.slot.update(|buffer| buffer.leased(rows, left));
                self.recovered();
            }
            Err(error) if error.is_transient() => self.pause("leasing fails", &error).await,
            Err(error) => {
                let standby = self.slot.look(Buffer::has_standby);
                self.lost(&error, standby).await;
            }
        }
    }

    fn log_pages(&self) -> usize {
        let shard = self.file.as_ref().and_then(|file| file.shard.as_ref());
        shard.map_or(0, |(shard, _)| shard.log_pages())
    }

    /// When nobody waits, as far as that can be: it takes as long as some leases.
    async fn checkpoint(&mut self) {
        match self.with_file(|shard, connection, _| shard.checkpoint(connection)).await {
            Ok(_) => {}
            Err(error) if error.is_transient() => self.pause("a checkpoint fails", &error).await,
            Err(error) => {
                let standby = self.slot.look(Buffer::has_standby);
                self.lost(&error, standby).await;
            }
        }
    }

    /// Runs a piece of work on the open file. Answers with what it returned, and what is left.
    async fn with_file<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Shard, &mut Connection, &mut ChaCha20Rng) -> Result<R, ShardError>
        + Send
        + 'static,
    ) -> Result<(R, u64), WorkError> {
        let file = self.file.as_mut().expect("only an open file has rows to lease");
        let (mut shard, mut rng) = file.shard.take().expect("it came back from the last work");
        let (shard, rng, result) = file
            .database
            .call(move |connection| {
                let result = work(&mut shard, connection, &mut rng);
                (shard, rng, result)
            })
            .await?;
        let left = shard.left();
        file.shard = Some((shard, rng));
        Ok((result?, left))
    }

    /// The file is used up and nothing stands by: the refiller's turn.
    fn retire(&mut self) {
        self.pool.leave_rotation(self.position);
        info!(pool = %self.pool.name, shard = %self.slot.name, "the shard is depleted");
        self.pool.refill_wanted.notify_one();
    }

    /// Puts the standby generation in the place of the used-up file.
    async fn swap(&mut self) {
        self.pool.leave_rotation(self.position);
        if let Some(OpenFile { database, .. }) = self.file.take()
            && let Err(error) = database.close().await
        {
            // It is used up: whatever its log holds is not needed any more.
            warn!(shard = %self.slot.name, %error, "a used-up shard could not be closed cleanly");
        }
        let paths = self.paths.clone();
        let index = self.slot.index;
        let installed = tokio::task::spawn_blocking(move || paths.install_standby(index)).await;
        match installed.expect("renaming does not panic") {
            Ok(()) => self.open_live(false, true).await,
            Err(error) => self.pause("the next generation can't be put in place", &error).await,
        }
    }

    /// The file can't be trusted any more. The ledger knows its values, so none comes again.
    async fn lost(&mut self, error: &WorkError, standby: bool) {
        self.pool.leave_rotation(self.position);
        let burned = self.slot.update(|buffer| buffer.lost(standby));
        self.pool.burned.fetch_add(burned, Ordering::Relaxed);
        if let Some(OpenFile { database, .. }) = self.file.take() {
            // Its state does not matter any more, and it may well fail.
            let _ = database.close().await;
        }
        let paths = self.paths.clone();
        let live = paths.live(self.slot.index);
        let aside = tokio::task::spawn_blocking(move || paths.set_aside(&live)).await;
        match aside.expect("renaming does not panic") {
            Ok(aside) => error!(
                pool = %self.pool.name, shard = %self.slot.name, kept_as = %aside.display(), burned,
                %error, "a shard failed and was set aside; a fresh generation will be built"
            ),
            Err(aside) => error!(
                pool = %self.pool.name, shard = %self.slot.name, burned, %error, not_set_aside = %aside,
                "a shard failed; a fresh generation will be built in its place"
            ),
        }
        self.pool.refill_wanted.notify_one();
    }

    async fn pause(&mut self, what: &str, error: &(impl std::error::Error + Sync)) {
        warn!(
            pool = %self.pool.name, shard = %self.slot.name, retry_in_ms = self.pause.as_millis(), %error,
            "{what}"
        );
        self.slot.set_trouble(Some(format!("{}: {what}: {error}", self.slot.name)));
        // Nobody waits for rows meanwhile, so that only a stop or a standby ends the pause early.
        self.slot.update(Buffer::pause);
        let _ = tokio::time::timeout(self.pause, self.slot.woken()).await;
        self.slot.update(Buffer::retry);
        self.pause = (self.pause * 2).min(self.refill.retry_limit);
    }

    fn recovered(&mut self) {
        self.pause = self.refill.retry;
        self.slot.set_trouble(None);
    }

    /// The end: what was leased and not handed out becomes unused again.
    async fn give_back(&mut self) {
        self.pool.leave_rotation(self.position);
        let rows: Vec<Row> = self.slot.update(Buffer::take_unserved);
        let Some(OpenFile { database, shard }) = self.file.take() else {
            return;
        };
        let (shard, _) = shard.expect("it came back from the last work");
        let returned = rows.len();
        let given_back = database.call(move |connection| shard.give_back(connection, rows)).await;
        let result = match given_back {
            Ok(Ok(())) => database.close().await.map_err(WorkError::from),
            Ok(Err(error)) => Err(error.into()),
            Err(error) => Err(error.into()),
        };
        match result {
            Ok(()) => info!(shard = %self.slot.name, returned, "the shard is closed"),
            Err(error) => error!(
                shard = %self.slot.name, burned_at_most = returned, %error,
                "the shard could not take its leased numbers back"
            ),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // However the task ends, nobody waits for it.
        self.slot.update(Buffer::stop);
        self.pool.leave_rotation(self.position);
    }
}
