//! A shard's live file, as its worker uses it from async code, one operation at a time. Knows nothing of
//! requests.

use std::collections::BTreeSet;
use std::path::PathBuf;

use rand::SeedableRng;
use rand::rngs::SysRng;
use rand_chacha::ChaCha20Rng;
use tokio::task::spawn_blocking;

use crate::batch::{Generation, ShardIndex};
use crate::files::FileError;
use crate::folder::PoolPaths;
use crate::shard::{Row, Shard, ShardError};
use crate::sqlite::rusqlite::Connection;
use crate::sqlite::{self, Database, DatabaseError, Fault, Found, Fresh};

/// A failed operation on a shard's file.
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
    /// Returns what the error means for the file.
    pub(super) fn fault(&self) -> Fault {
        match self {
            Self::Shard(error) => error.fault(),
            Self::Database(DatabaseError::Sqlite(error)) => sqlite::fault(error),
            Self::Database(DatabaseError::Aborted(_)) | Self::File(_) => Fault::Io,
        }
    }
}

/// The operations of a worker on its shard's file. The model has a simulated file.
pub(super) trait ShardFile: Sized + Send + Sync {
    /// Takes the live file into use. `opened` is its connection, if it is open.
    fn open(
        paths: &PoolPaths,
        index: ShardIndex,
        opened: Option<Fresh>,
    ) -> impl Future<Output = Result<Self, WorkError>> + Send;

    /// Moves the standby generation into the place of the live file, which must be closed.
    fn install_standby(
        paths: &PoolPaths,
        index: ShardIndex,
    ) -> impl Future<Output = Result<(), WorkError>> + Send;

    /// Reads the live file, which must be closed, to its end.
    fn read_through(
        paths: &PoolPaths,
        index: ShardIndex,
    ) -> impl Future<Output = Result<(), WorkError>> + Send;

    /// Sets the live file aside, since it can't be trusted. Returns its new path.
    fn set_aside(
        paths: &PoolPaths,
        index: ShardIndex,
    ) -> impl Future<Output = Result<PathBuf, WorkError>> + Send;

    fn generation(&self) -> Generation;

    /// Counts leases in the file from now on, so that an older copy of it is recognised.
    fn count_leases(&mut self);

    /// Returns the number of counted leases.
    fn leases(&self) -> u64;

    /// Returns the number of rows that are not leased.
    fn left(&self) -> u64;

    /// Returns the approximate number of pages in the write-ahead log.
    fn log_pages(&self) -> usize;

    /// Marks up to `rows` rows as used. `leased` is the number of rows of earlier leases that are not handed
    /// out, if the file is to record it.
    fn lease(
        &mut self,
        rows: usize,
        leased: Option<usize>,
    ) -> impl Future<Output = Result<Vec<Row>, WorkError>> + Send;

    /// Marks those of the rows as imported that are unused or among `leased`. Returns all that are then marked as
    /// imported.
    fn import(
        &mut self,
        rows: Vec<Row>,
        leased: BTreeSet<Row>,
    ) -> impl Future<Output = Result<Vec<Row>, WorkError>> + Send;

    /// Writes the write-ahead log back into the file.
    fn checkpoint(&mut self) -> impl Future<Output = Result<(), WorkError>> + Send;

    /// Marks rows as unused again, and closes the file.
    fn give_back(self, rows: Vec<Row>) -> impl Future<Output = Result<(), WorkError>> + Send;

    fn close(self) -> impl Future<Output = Result<(), WorkError>> + Send;
}

/// An open SQLite file: the connection, and the state of the shard, which moves to the blocking thread and
/// back with each operation.
pub(super) struct OpenFile {
    database: Database,
    shard: Option<(Shard, ChaCha20Rng)>,
}

impl ShardFile for OpenFile {
    async fn open(
        paths: &PoolPaths,
        index: ShardIndex,
        opened: Option<Fresh>,
    ) -> Result<Self, WorkError> {
        let path = paths.live(index);
        let open = move || {
            let mut connection = match opened {
                Some(opened) => opened,
                None => Found::new(&path).secure()?.open()?,
            };
            let shard = Shard::open(&path, &mut connection)?;
            Ok::<_, ShardError>((connection, shard))
        };
        let (connection, shard) = spawn_blocking(open).await.expect("opening does not panic")?;
        let rng =
            ChaCha20Rng::try_from_rng(&mut SysRng).expect("the operating system has randomness");
        Ok(Self { database: Database::new(connection).await?, shard: Some((shard, rng)) })
    }

    async fn install_standby(paths: &PoolPaths, index: ShardIndex) -> Result<(), WorkError> {
        let paths = paths.clone();
        let installed = spawn_blocking(move || paths.install_standby(index)).await;
        Ok(installed.expect("renaming does not panic")?)
    }

    async fn read_through(paths: &PoolPaths, index: ShardIndex) -> Result<(), WorkError> {
        let path = paths.live(index);
        let read = spawn_blocking(move || sqlite::read_through(&path)).await;
        Ok(read.expect("reading does not panic")?)
    }

    async fn set_aside(paths: &PoolPaths, index: ShardIndex) -> Result<PathBuf, WorkError> {
        let paths = paths.clone();
        let aside = spawn_blocking(move || paths.set_aside(&paths.live(index))).await;
        Ok(aside.expect("renaming does not panic")?)
    }

    fn generation(&self) -> Generation {
        self.shard().label().generation
    }

    fn count_leases(&mut self) {
        let (shard, _) = self.shard.as_mut().expect("the last operation returned it");
        shard.count_leases();
    }

    fn leases(&self) -> u64 {
        self.shard().leases()
    }

    fn left(&self) -> u64 {
        self.shard().left()
    }

    fn log_pages(&self) -> usize {
        self.shard().log_pages()
    }

    async fn lease(&mut self, rows: usize, leased: Option<usize>) -> Result<Vec<Row>, WorkError> {
        self.work(move |shard, connection, rng| shard.lease(connection, rows, leased, rng)).await
    }

    async fn import(
        &mut self,
        rows: Vec<Row>,
        leased: BTreeSet<Row>,
    ) -> Result<Vec<Row>, WorkError> {
        self.work(move |shard, connection, _| shard.import(connection, &rows, &leased)).await
    }

    async fn checkpoint(&mut self) -> Result<(), WorkError> {
        self.work(|shard, connection, _| shard.checkpoint(connection)).await
    }

    async fn give_back(self, rows: Vec<Row>) -> Result<(), WorkError> {
        let (shard, _) = self.shard.expect("the last operation returned it");
        self.database.call(move |connection| shard.give_back(connection, rows)).await??;
        Ok(self.database.close().await?)
    }

    async fn close(self) -> Result<(), WorkError> {
        Ok(self.database.close().await?)
    }
}

impl OpenFile {
    async fn work<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Shard, &mut Connection, &mut ChaCha20Rng) -> Result<R, ShardError>
        + Send
        + 'static,
    ) -> Result<R, WorkError> {
        let (mut shard, mut rng) = self.shard.take().expect("the last operation returned it");
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
        let (shard, _) = self.shard.as_ref().expect("the last operation returned it");
        shard
    }
}
