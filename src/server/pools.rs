//! The pools of a running server: opens one, and ends one. Knows nothing of connections.

use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::lanes::Lanes;
use super::{OPENS, join};
use crate::config::{PoolConfig, PoolName};
use crate::events::Events;
use crate::fleet::Membership;
use crate::folder::{Folder, FolderError, PoolFiles};
use crate::pool::Pool;
use crate::refill::{Builders, Refiller};

/// The parts that the pools of a server share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) folder: Arc<Folder>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) events: Arc<Events>,
    pub(super) builders: Arc<Builders>,
    /// Stops all refillers.
    pub(super) stop: CancellationToken,
}

/// A pool that serves, with its tasks.
#[derive(Debug)]
pub(super) struct RunningPool {
    pub(super) config: PoolConfig,
    pub(super) pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    refiller: JoinHandle<Refiller>,
    stop: CancellationToken,
}

impl RunningPool {
    /// Opens the files of a pool and starts its tasks.
    ///
    /// # Errors
    /// [`FolderError`], with what to do about it. No task runs then.
    pub(super) async fn open(shared: &Shared, config: &PoolConfig) -> Result<Self, FolderError> {
        let (folder, opened) = (Arc::clone(&shared.folder), config.clone());
        let open = move || {
            let found = folder.shards()?.remove(&opened.name).unwrap_or_default();
            folder.open_pool(&opened, &found, None, true)
        };
        let files = tokio::task::spawn_blocking(open).await.expect(OPENS)?;
        Ok(Self::start(shared, config, files, None).await)
    }

    /// Starts the tasks of a pool whose files are open.
    pub(super) async fn start(
        shared: &Shared,
        config: &PoolConfig,
        mut files: PoolFiles,
        membership: Option<Membership>,
    ) -> Self {
        let (gate, claims) = membership.map(|pool| (pool.gate, pool.claims)).unzip();
        let events = Arc::clone(&shared.events);
        let (pool, tasks) = Pool::open(config, &files.paths, &mut files.shards, events, gate).await;
        let builders = Arc::clone(&shared.builders);
        let refiller = Refiller::new(files, Arc::clone(&pool), config, claims, builders);
        let stop = shared.stop.child_token();
        Self {
            config: config.clone(),
            pool,
            workers: tasks.into_iter().map(|worker| shared.lanes.spawn(worker)).collect(),
            refiller: tokio::spawn(refiller.run(stop.clone())),
            stop,
        }
    }

    pub(super) fn name(&self) -> &PoolName {
        &self.config.name
    }

    /// Stops the refiller, which cancels a running build. Returns the pool without it.
    pub(super) async fn stop_refilling(self) -> StoppingPool {
        let Self { pool, workers, refiller, stop, .. } = self;
        stop.cancel();
        StoppingPool { pool, workers, refiller: join([refiller]).await.pop() }
    }

    /// Gives the leased rows back and closes all files.
    pub(super) async fn end(self) {
        self.stop_refilling().await.end().await;
    }
}

/// A pool that is no longer refilled.
#[derive(Debug)]
pub(super) struct StoppingPool {
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    /// `None` if its task died.
    refiller: Option<Refiller>,
}

impl StoppingPool {
    /// Gives the leased rows back and closes all files.
    pub(super) async fn end(self) {
        let Self { pool, workers, refiller } = self;
        pool.stop();
        join(workers).await;
        // The ledger last, because it records how the files were closed.
        if let Some(refiller) = refiller {
            refiller.close().await;
        }
    }
}
