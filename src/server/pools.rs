//! The pools of a running server: opens them, and ends one. Knows nothing of connections.

use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::lanes::Lanes;
use super::{OPENS, at_once, join, open_files};
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
    /// Opens the files of pools, several at once, and starts their tasks. Returns the pools that could be opened.
    ///
    /// # Errors
    /// The first [`FolderError`] comes with the pools that could be opened.
    pub(super) async fn open_all(
        shared: &Shared,
        configs: &[PoolConfig],
    ) -> (Vec<Self>, Result<(), FolderError>) {
        // Most reloads open none, so the folder does not have to be listed.
        if configs.is_empty() {
            return (Vec::new(), Ok(()));
        }
        let folder = Arc::clone(&shared.folder);
        let found = match tokio::task::spawn_blocking(move || folder.shards()).await.expect(OPENS) {
            Ok(found) => found,
            Err(error) => return (Vec::new(), Err(error.into())),
        };
        let openings = configs.iter().cloned().map(|config| {
            let found = found.get(&config.name).cloned().unwrap_or_default();
            let shared = shared.clone();
            async move {
                let folder = Arc::clone(&shared.folder);
                let (files, _) = open_files(folder, config.clone(), found, None).await?;
                Ok(Self::start(&shared, &config, files, None).await)
            }
        });
        let (mut opened, mut result) = (Vec::new(), Ok(()));
        for opening in at_once(openings).await {
            match opening {
                Ok(pool) => opened.push(pool),
                Err(error) => result = result.and(Err(error)),
            }
        }
        (opened, result)
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
