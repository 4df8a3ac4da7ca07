//! A connection for async code. The only user of deadpool-sqlite.

use deadpool_sqlite::rusqlite::{Connection, Error};
use deadpool_sqlite::{Config, InteractError, Object, PoolConfig, PoolError, Runtime};

use super::Fresh;

/// The file of a connection that stands in for one that is not open: the pool opens its connection by itself, but a
/// file must be opened in steps that it does not know.
const IN_MEMORY: &str = ":memory:";

/// A failed operation on a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DatabaseError {
    /// SQLite's own error.
    #[error(transparent)]
    Sqlite(#[from] Error),
    /// The work panicked (a bug) or was cancelled because the runtime is shutting down.
    #[error("the work on the file was aborted: {0}")]
    Aborted(String),
}

/// The connection to one live file, usable from async code. Work runs on the blocking threads, one piece at a
/// time.
#[derive(Debug)]
pub(crate) struct Database {
    connection: Object,
}

impl Database {
    /// Takes an open connection.
    pub(crate) async fn new(connection: Fresh) -> Result<Self, DatabaseError> {
        let mut config = Config::new(IN_MEMORY);
        config.pool = Some(PoolConfig::new(1));
        let pool = config
            .create_pool(Runtime::Tokio1)
            .map_err(|error| DatabaseError::Aborted(error.to_string()))?;
        let object = pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => DatabaseError::Sqlite(error),
            other => DatabaseError::Aborted(other.to_string()),
        })?;
        let database = Self { connection: object };
        database.call(|placeholder| *placeholder = connection.into_connection()).await?;
        Ok(database)
    }

    /// Runs one piece of work on the connection.
    ///
    /// # Errors
    /// Returns [`DatabaseError::Aborted`] if the work panicked.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> R + Send + 'static,
    ) -> Result<R, DatabaseError> {
        self.connection.interact(work).await.map_err(|error| match error {
            InteractError::Panic(_) => DatabaseError::Aborted("it panicked".to_owned()),
            InteractError::Cancelled => DatabaseError::Aborted("it was cancelled".to_owned()),
        })
    }

    /// Closes the file immediately, and leaves the log to the next opening.
    ///
    /// # Errors
    /// Returns SQLite's error. The connection is closed in any case.
    pub(crate) async fn close(self) -> Result<(), DatabaseError> {
        self.call(|connection| {
            // Dropping the pool's object would close the file at some later time.
            let open = std::mem::replace(connection, Connection::open_in_memory()?);
            open.close().map_err(|(_, error)| error)
        })
        .await?
        .map_err(DatabaseError::Sqlite)
    }
}
