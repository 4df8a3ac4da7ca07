//! The wiring: opens the folder, starts the tasks, serves, and ends all of it in order. Knows nothing
//! of signals: whoever runs it says when to stop.

pub mod blocking;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, info, warn};

use crate::config::{AuthConfig, Config, Mode, PoolConfig};
use crate::folder::{Folder, FolderError, PoolFiles};
use crate::http::{self, Guard};
use crate::pool::Pool;
use crate::refill::Refiller;
use crate::rungs::{Desk, JsonStore, Numbers, OpenError, Store, TableStore};
use crate::sqlite;

/// How long a client may take to send a request's head, and an idle connection may stay.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait when the process has no more file descriptors for connections.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The linked SQLite is known to lose data.
    #[error("{0}")]
    Sqlite(String),
    /// Anyone could ask, and nobody said that anyone may.
    #[error(
        "can't listen on {address}: it can be reached from other machines, and nothing is said of who \
         may ask. Put tokens into the settings, as `tombola token new --name NAME --scope draw` \
         prints them; or say that anyone may, with mode = \"none\" under [auth]; or listen on \
         127.0.0.1"
    )]
    OpenDoor {
        /// The address.
        address: SocketAddr,
    },
    /// The address can't be listened on.
    #[error("can't listen on {address}: {source}; choose another with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// The data folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The store of a rung can't be used.
    #[error(transparent)]
    Store(#[from] OpenError),
}

/// A server that listens, with all its tasks running.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    guard: Option<Arc<Guard>>,
    drain: Duration,
    tasks: Tasks,
    /// Held until all files are closed.
    folder: Folder,
}

/// Who works behind the routes.
#[derive(Debug)]
enum Tasks {
    /// Of the pool server.
    Pools {
        pools: Vec<Arc<Pool>>,
        workers: Vec<JoinHandle<()>>,
        refillers: Vec<JoinHandle<()>>,
        stop_refillers: watch::Sender<bool>,
    },
    /// Of a rung below it; ends with the routes.
    Numbers(JoinHandle<()>),
}

impl Server {
    /// Opens everything and listens. Requests are accepted by [`run`](Self::run). The mode simple is
    /// [`blocking`]'s.
    ///
    /// # Errors
    /// [`ServerError`], with what to do about it.
    pub async fn start(config: &Config) -> Result<Self, ServerError> {
        sqlite::check_version().map_err(ServerError::Sqlite)?;
        check_door(config, false)?;
        let guard = Guard::new(&config.auth, config.quota.as_ref());
        let listen_error = |source| ServerError::Listen { address: config.server.listen, source };
        let listener = TcpListener::bind(config.server.listen).await.map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;

        let (folder, router, tasks) = match config.server.mode {
            Mode::Sharded => open_pools(config).await?,
            Mode::Sqlite => open_rung::<TableStore>(config).await?,
            Mode::Json | Mode::Simple => open_rung::<JsonStore>(config).await?,
        };
        let drain = config.server.drain;
        Ok(Self { listener, address, router, guard, drain, tasks, folder })
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes; then answers what is in flight, gives unserved leases back
    /// and closes every file.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { listener, router, guard, drain, tasks, folder, .. } = self;
        serve(listener, router, guard, drain, shutdown).await;
        tasks.end().await;
        drop(folder);
        info!("stopped");
    }
}

impl Tasks {
    async fn end(self) {
        match self {
            Self::Pools { pools, workers, refillers, stop_refillers } => {
                // Refillers first: a build that nobody needs any more should not hold up the rest.
                stop_refillers.send_replace(true);
                join(refillers).await;
                for pool in &pools {
                    pool.stop();
                }
                join(workers).await;
            }
            Self::Numbers(numbers) => join(vec![numbers]).await,
        }
    }
}

/// Refuses to listen where other machines can ask, unless it is said who may.
fn check_door(config: &Config, encrypted: bool) -> Result<(), ServerError> {
    let address = config.server.listen;
    if address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    match config.auth {
        AuthConfig::Unsaid => return Err(ServerError::OpenDoor { address }),
        AuthConfig::Tokens(_) if !encrypted => warn!(
            %address,
            "tokens and numbers cross the network in plain text, for anyone on the way to read: \
             put a proxy that speaks TLS in front, and listen on 127.0.0.1"
        ),
        AuthConfig::Tokens(_) | AuthConfig::Anyone => {}
    }
    Ok(())
}

async fn open_pools(config: &Config) -> Result<(Folder, Router, Tasks), ServerError> {
    let (folder, found) = open_folder(config).await?;
    let (stop_refillers, stop) = watch::channel(false);
    let (mut pools, mut workers, mut refillers) = (Vec::new(), Vec::new(), Vec::new());
    for (pool_config, files) in config.pools.iter().zip(found) {
        let PoolFiles { paths, ledger, shards } = files;
        let (pool, tasks) =
            Pool::open(pool_config, config.lease, config.refill, &paths, &shards).await;
        let refiller = Refiller::new(
            ledger,
            paths,
            Arc::clone(&pool),
            config.refill,
            pool_config.shard_size,
            stop.clone(),
        );
        refillers.push(tokio::spawn(refiller.run()));
        workers.extend(tasks);
        pools.push(pool);
    }
    let router = http::router(pools.clone(), config.server.count_limit);
    Ok((folder, router, Tasks::Pools { pools, workers, refillers, stop_refillers }))
}

async fn open_rung<S: Store>(config: &Config) -> Result<(Folder, Router, Tasks), ServerError> {
    let opening = config.clone();
    let (folder, numbers) = tokio::task::spawn_blocking(move || Numbers::<S>::open(&opening))
        .await
        .expect("opening does not panic")?;
    let (desk, queue) = Desk::new(&numbers);
    let router = http::rung_router(config.pools.clone(), desk);
    let tasks = Tasks::Numbers(tokio::task::spawn_blocking(move || numbers.run(queue)));
    Ok((folder, router, tasks))
}

async fn open_folder(config: &Config) -> Result<(Folder, Vec<PoolFiles>), FolderError> {
    let (dir, pools) = (config.dir.clone(), config.pools.clone());
    let open = move || {
        let folder = Folder::open(&dir, Mode::Sharded)?;
        let found = pools
            .iter()
            .map(|pool: &PoolConfig| folder.open_pool(pool))
            .collect::<Result<_, _>>()?;
        Ok((folder, found))
    };
    tokio::task::spawn_blocking(open).await.expect("opening does not panic")
}

/// Accepts and answers until `shutdown` completes, then waits for the answers in flight.
async fn serve(
    listener: TcpListener,
    router: Router,
    guard: Option<Arc<Guard>>,
    drain: Duration,
    shutdown: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let (router, guard) = (router.clone(), guard.clone());
                    let connection = connection(stream, peer.ip(), router, guard);
                    connections.spawn(graceful.watch(connection));
                }
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    let started = Instant::now();
    info!(connections = connections.len(), "stopping: what is in flight is answered first");
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        warn!(
            after_ms = started.elapsed().as_millis(),
            connections = connections.len(),
            "some connections are cut: they did not end in time"
        );
    }
    connections.shutdown().await;
}

fn connection(
    stream: TcpStream,
    peer: IpAddr,
    router: Router,
    guard: Option<Arc<Guard>>,
) -> impl GracefulConnection<Error = hyper::Error> + Send + 'static {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "TCP_NODELAY could not be set");
    }
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), http::guarded(router, guard, peer))
}

async fn join(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a background task failed");
        }
    }
}
