//! A shard's live file, as its worker uses it: from async code, in one piece of work after the other.
//! Knows nothing of who waits for what.

use std::path::PathBuf;

use rand::SeedableRng;
use rand::rngs::SysRng;
use rand_chacha::ChaCha20Rng;

use crate::batch::{Generation, ShardIndex};
use crate::files::{self, FileError};
use crate::folder::PoolPaths;
use crate::shard::{Row, Shard, ShardError};
use crate::sqlite::rusqlite::Connection;
use crate::sqlite::{self, Database, DatabaseError};

/// Why a shard's file could not be worked on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkError {
    #[error(transparent)]
    Shard(#[from] ShardError),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl WorkError {
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Shard(error) => error.is_transient(),
            Self::Database(DatabaseError::Sqlite(error)) => sqlite::is_transient(error),
            Self::Database(DatabaseError::Aborted(_)) => false,
            Self::File(_) => true,
        }
    }
}

/// An open file: the connection, and what is left behind it. The rest travels to the blocking
/// thread and back with each piece of work.
pub(super) struct OpenFile {
    database: Database,
    shard: Option<(Shard, ChaCha20Rng)>,
}

impl OpenFile {
    pub(super) async fn open(paths: &PoolPaths, index: ShardIndex) -> Result<Self, WorkError> {
        let database = Database::open(&paths.live(index)).await?;
        let folder = paths.folder().to_owned();
        let open = move |connection: &mut Connection| {
            let shard = Shard::open(connection)?;
            // SQLite syncs the name of a log that it creates, but ignores that this failed.
            files::sync_folder(&folder)?;
            Ok::<_, ShardError>(shard)
        };
        match database.call(open).await? {
            Ok(shard) => {
                let rng = ChaCha20Rng::try_from_rng(&mut SysRng)
                    .expect("the operating system has randomness");
                Ok(Self { database, shard: Some((shard, rng)) })
            }
            Err(error) => {
                // Now: dropped, it would be closed at some time when another file bears its name.
                let _ = database.close().await;
                Err(error.into())
            }
        }
    }

    pub(super) fn generation(&self) -> Generation {
        self.shard().label().generation
    }

    /// From now on leases are counted in the file, so that an older copy of it is known as one.
    pub(super) fn count_leases(&mut self) {
        let (shard, _) = self.shard.as_mut().expect("it came back from the last work");
        shard.count_leases();
    }

    /// How many leases were counted.
    pub(super) fn leases(&self) -> u64 {
        self.shard().leases()
    }

    /// Rows that are not leased.
    pub(super) fn left(&self) -> u64 {
        self.shard().left()
    }

    /// Pages in the write-ahead log.
    pub(super) fn log_pages(&self) -> usize {
        self.shard().log_pages()
    }

    pub(super) async fn lease(
        &mut self,
        rows: usize,
        unserved: Option<usize>,
    ) -> Result<Vec<Row>, WorkError> {
        self.work(move |shard, connection, rng| shard.lease(connection, rows, unserved, rng)).await
    }

    pub(super) async fn checkpoint(&mut self) -> Result<(), WorkError> {
        self.work(|shard, connection, _| shard.checkpoint(connection)).await
    }

    /// Marks rows as unused again, and closes.
    pub(super) async fn give_back(self, rows: Vec<Row>) -> Result<(), WorkError> {
        let (shard, _) = self.shard.expect("it came back from the last work");
        self.database.call(move |connection| shard.give_back(connection, rows)).await??;
        Ok(self.database.close().await?)
    }

    pub(super) async fn close(self) -> Result<(), WorkError> {
        Ok(self.database.close().await?)
    }

    async fn work<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Shard, &mut Connection, &mut ChaCha20Rng) -> Result<R, ShardError>
        + Send
        + 'static,
    ) -> Result<R, WorkError> {
        let (mut shard, mut rng) = self.shard.take().expect("it came back from the last work");
        let (shard, rng, result) = self
            .database
            .call(move |connection| {
                let result = work(&mut shard, connection, &mut rng);
                (shard, rng, result)
            })
            .await?;
        self.shard = Some((shard, rng));
        Ok(result?)
    }

    fn shard(&self) -> &Shard {
        let (shard, _) = self.shard.as_ref().expect("it came back from the last work");
        shard
    }
}

/// Puts the standby generation in the place of the live file, which is closed.
pub(super) async fn install_standby(paths: &PoolPaths, index: ShardIndex) -> Result<(), FileError> {
    let paths = paths.clone();
    let installed = tokio::task::spawn_blocking(move || paths.install_standby(index)).await;
    installed.expect("renaming does not panic")
}

/// Sets the live file aside, as what can't be trusted any more. Answers with its new name.
pub(super) async fn set_aside(paths: &PoolPaths, index: ShardIndex) -> Result<PathBuf, FileError> {
    let paths = paths.clone();
    let aside = tokio::task::spawn_blocking(move || paths.set_aside(&paths.live(index))).await;
    aside.expect("renaming does not panic")
}
