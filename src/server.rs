//! Opens the data folder, starts the tasks, serves requests, and stops everything in order. Knows nothing of
//! signals: the caller of [`Server::run`] decides when to stop.

mod accept;
mod connection;
mod lanes;
mod pools;
mod reload;
mod tls;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use self::accept::Acceptor;
use self::lanes::Lanes;
use self::pools::{RunningPool, Shared};
use self::reload::{Reloader, Serving, ServingPools};
use self::tls::Tls;
pub(crate) use self::tls::TlsError;
use crate::auth;
use crate::backoff::Backoff;
use crate::batch::ShardIndex;
use crate::config::{AuthConfig, Config, Mode, Overrides, PoolConfig, RefillConfig};
use crate::events::{Events, Kind};
use crate::fleet::{Fleet, FleetError, Gate, Gatekeeper, Lost, Membership};
use crate::folder::{self, Folder, FolderError, PoolFiles};
use crate::http::{Guard, LiveRoutes};
use crate::monitor::Monitor;
use crate::on_demand::{Generator, Handle, JsonStore, OpenError, Store, TableStore};
use crate::receipts::{self, ReceiptReader, ReceiptStore, Receipts};
use crate::reload::{Loaded, ReloadHandle};
use crate::sqlite;
use crate::traffic::Traffic;

/// The blocking threads of the runtime that starts a server: for the desk, builds and reads, of which there are
/// only a few at once, and for openings.
pub(crate) const BLOCKING_THREADS: usize = 64;

/// File descriptors of a shard: its file, `-wal` and `-shm`.
const FILES_PER_SHARD: usize = 3;

/// File descriptors of a pool at a start: its ledger, `-wal` and `-shm`.
const FILES_PER_POOL: usize = 3;

/// All other file descriptors of the process: receipts, builds, the runtime and the log, with a reserve.
const OWN_FILES: usize = 256;

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// The linked SQLite is known to lose data.
    #[error("{0}")]
    Sqlite(String),
    /// Other machines can reach the address, and no authentication is configured.
    #[error(
        "can't listen on {address}: other machines can reach it, and no authentication is configured. \
         Add tokens to the settings, as `tombola token new --name NAME --scope draw` prints them; or \
         allow requests without tokens, with mode = \"none\" under [auth]; or listen on 127.0.0.1"
    )]
    OpenDoor { address: SocketAddr },
    /// The address can't be listened on.
    #[error("can't listen on {address}: {source}; choose another with --listen")]
    Listen { address: SocketAddr, source: io::Error },
    /// The data folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The store of a mode below sharded can't be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The threads that serve connections can't be started.
    #[error("can't start the threads that serve connections: {0}")]
    Threads(io::Error),
    /// The certificate or its key can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The receipts can't be used.
    #[error(transparent)]
    Receipts(#[from] receipts::OpenError),
    /// This instance can't take part in its fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

/// A server that listens, with all its tasks running.
#[derive(Debug)]
pub(crate) struct Server {
    listener: TcpListener,
    address: SocketAddr,
    acceptor: Acceptor,
    lanes: Arc<Lanes>,
    reloader: Reloader,
    tasks: Tasks,
    /// Held until all files are closed.
    folder: Arc<Folder>,
}

/// The tasks beside those of the pools.
#[derive(Debug)]
enum Tasks {
    /// The tasks of the mode sharded.
    Pools {
        watched: Arc<Monitor>,
        monitor: JoinHandle<Option<()>>,
        /// The desk of the receipts, which ends when the routes and the reloader are dropped.
        desk: JoinHandle<()>,
        /// Stops the refillers, the monitor and the gatekeeper when it is dropped.
        stop_guard: DropGuard,
        /// The gate and its gatekeeper, in a fleet.
        gate: Option<(Gate, JoinHandle<()>)>,
    },
    /// The generator of a mode below sharded, which ends when the routes and the reloader are dropped. The mode simple
    /// has none.
    Generator(Option<JoinHandle<()>>),
}

/// The parts of a server that depend on its mode.
struct Opened {
    folder: Arc<Folder>,
    serving: Serving,
    tasks: Tasks,
}

impl Server {
    /// Opens everything and listens. [`run`](Self::run) accepts requests.
    ///
    /// # Errors
    /// [`ServerError`], with what to do about it.
    pub(crate) async fn start(overrides: Overrides, loaded: Loaded) -> Result<Self, ServerError> {
        sqlite::check_version().map_err(ServerError::Sqlite)?;
        let config = &loaded.config;
        check_door(config)?;
        warn_of_tokens(config);
        let guard = Guard::new(config, None);
        let tls = config.server.tls.as_ref().map(Tls::open).transpose()?.map(Arc::new);
        let listen_error = |source| ServerError::Listen { address: config.server.listen, source };
        // Before any file is opened: a shard that can't be opened for lack of descriptors would not serve.
        let connections_max = Arc::new(AtomicUsize::new(connections_max(config)));
        let listener = TcpListener::bind(config.server.listen).await.map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;

        let traffic = Traffic::new(Lanes::count());
        let lanes = match config.server.mode {
            Mode::Simple => Lanes::of_caller(&traffic),
            Mode::Json | Mode::Sqlite | Mode::Sharded => {
                Lanes::start(&traffic).map_err(ServerError::Threads)?
            }
        };
        let lanes = Arc::new(lanes);
        let Opened { folder, serving, tasks } = match config.server.mode {
            Mode::Sharded => open_pools(&loaded, traffic, &lanes).await?,
            Mode::Sqlite => open_generator::<TableStore>(config).await?,
            Mode::Json => open_generator::<JsonStore>(config).await?,
            Mode::Simple => open_simple(config)?,
        };
        let (handle, requests) = ReloadHandle::new();
        let routes = serving.routes(config, guard, handle.clone(), None);
        let live = Arc::new(LiveRoutes::new(routes));
        let acceptor = Acceptor {
            routes: Arc::clone(&live),
            tls: tls.clone(),
            connections_max: Arc::clone(&connections_max),
            client_timeout: config.server.client_timeout,
            drain: config.server.drain,
        };
        let reloader =
            Reloader { overrides, loaded, live, tls, connections_max, handle, requests, serving };
        Ok(Self { listener, address, acceptor, lanes, reloader, tasks, folder })
    }

    /// Returns the address that it listens on.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the handle that makes it read its settings again.
    pub(crate) fn reloads(&self) -> ReloadHandle {
        self.reloader.handle.clone()
    }

    /// Serves until `shutdown` completes. Then it finishes the requests in flight, gives unserved leases back
    /// and closes every file.
    ///
    /// # Errors
    /// [`Lost`] if the instance has lost its fence. It then stops by itself.
    pub(crate) async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), Lost> {
        let Self { listener, acceptor, lanes, reloader, tasks, folder, .. } = self;
        let mut lost = None;
        let ended = async {
            tokio::select! {
                () = shutdown => {}
                found = tasks.lost() => {
                    // Nothing more is leased, and unserved leases are taken back. Requests in flight repeat
                    // no number, because a step has covered each row that they got.
                    tasks.stop_pools();
                    lost = Some(found);
                }
            }
        };
        let stop_reloads = CancellationToken::new();
        let serving = async {
            // Requests in flight may wait for a reload, so reloads end after them.
            acceptor.run(listener, &lanes, ended).await;
            stop_reloads.cancel();
        };
        let ((), pools) = tokio::join!(serving, reloader.run(stop_reloads.clone()));
        tasks.end(pools).await;
        drop(lanes);
        drop(folder);
        info!("stopped");
        lost.map_or(Ok(()), Err)
    }
}

impl Tasks {
    /// Completes when the fence is lost. Without a fence, it never completes.
    async fn lost(&self) -> Lost {
        match self {
            Self::Pools { gate: Some((gate, _)), .. } => gate.lost().await,
            Self::Pools { gate: None, .. } | Self::Generator(_) => std::future::pending().await,
        }
    }

    fn stop_pools(&self) {
        if let Self::Pools { watched, .. } = self {
            watched.pools().iter().for_each(|pool| pool.stop());
        }
    }

    async fn end(self, pools: Vec<RunningPool>) {
        match self {
            Self::Pools { monitor, desk, stop_guard, gate, .. } => {
                // Refillers first, so that a build that is no longer needed does not delay the rest.
                drop(stop_guard);
                let mut stopping = Vec::new();
                for pool in pools {
                    stopping.push(pool.stop_refilling().await);
                }
                join(vec![monitor]).await;
                // Before the pools, to which the numbers of refused requests go back.
                join(vec![desk]).await;
                join(stopping.into_iter().map(|pool| tokio::spawn(pool.end()))).await;
                if let Some((_, gatekeeper)) = gate {
                    join(vec![gatekeeper]).await;
                }
            }
            Self::Generator(generator) => drop(join(Vec::from_iter(generator)).await),
        }
    }
}

/// Checks whether a server could start with these settings, without opening the data folder.
///
/// # Errors
/// [`ServerError::OpenDoor`] and [`ServerError::Tls`].
pub(crate) fn check(config: &Config) -> Result<(), ServerError> {
    check_door(config)?;
    warn_of_tokens(config);
    config.server.tls.as_ref().map(Tls::open).transpose()?;
    Ok(())
}

/// Refuses to listen on an address that other machines can reach, unless authentication is configured.
fn check_door(config: &Config) -> Result<(), ServerError> {
    let address = config.server.listen;
    if address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    match config.auth {
        AuthConfig::Unsaid => return Err(ServerError::OpenDoor { address }),
        AuthConfig::Tokens(_) if config.server.tls.is_none() => warn!(
            %address,
            "tokens and numbers cross the network in plain text: set server.tls, or listen on \
             127.0.0.1 behind a proxy that speaks TLS"
        ),
        AuthConfig::Tokens(_) | AuthConfig::Anyone => {}
    }
    Ok(())
}

/// Logs a warning about each token that has expired, or will within a week.
fn warn_of_tokens(config: &Config) {
    if let AuthConfig::Tokens(tokens) = &config.auth {
        for notice in auth::notices(tokens, SystemTime::now()) {
            warn!("{notice}; replace it, or give it another end");
        }
    }
}

async fn open_pools(
    loaded: &Loaded,
    traffic: Traffic,
    lanes: &Arc<Lanes>,
) -> Result<Opened, ServerError> {
    let config = &loaded.config;
    let FoundFolder { folder, pools: found, gate } = open_folder(config).await?;
    // Before the pools lease rows, which would be lost if the receipts can't be opened.
    let (store, reader) = open_receipts(config).await?;
    let stop = CancellationToken::new();
    let stop_guard = stop.clone().drop_guard();
    let gate = gate.map(|(gate, keeper)| (gate, tokio::spawn(keeper.run(stop.clone()))));
    let events = Arc::new(Events::default());
    // Before the tasks begin, so that it is the first event.
    events.add(Kind::Started, None, None, "The server started".to_owned());
    let shared = Shared {
        folder: Arc::clone(&folder),
        lanes: Arc::clone(lanes),
        events: Arc::clone(&events),
        builders: Arc::default(),
        stop: stop.clone(),
    };
    let openings = config.pools.iter().cloned().zip(found).map(|(config, (files, membership))| {
        let shared = shared.clone();
        async move { RunningPool::start(&shared, &config, files, membership).await }
    });
    let pools = at_once(openings).await;
    let RefillConfig { retry, retry_limit, .. } = config.pools[0].refill;
    let backoff = Backoff::new(retry, retry_limit);
    let (receipts, desk) = Receipts::new(store, reader, Arc::clone(&events), backoff);
    let (receipts, desk) = (Arc::new(receipts), tokio::task::spawn_blocking(desk));
    let watched = pools.iter().map(|pool| Arc::clone(&pool.pool)).collect();
    let monitor = Monitor::new(traffic, watched, receipts.counts(), events, loaded.digest());
    let watched = Arc::new(monitor);
    let serving = ServingPools { shared, monitor: Arc::clone(&watched), receipts, pools };
    let monitor = tokio::spawn(stop.run_until_cancelled_owned(Arc::clone(&watched).run()));
    let tasks = Tasks::Pools { watched, monitor, desk, stop_guard, gate };
    Ok(Opened { folder, serving: Serving::Pools(Box::new(serving)), tasks })
}

async fn open_receipts(
    config: &Config,
) -> Result<(Box<dyn ReceiptStore>, Arc<dyn ReceiptReader>), ServerError> {
    let (settings, dir) = (config.receipts.clone(), config.dir.clone());
    let space = config.fleet.as_ref().map(|fleet| fleet.space.clone());
    let open = move || receipts::open(&settings, &dir, space.as_ref());
    Ok(tokio::task::spawn_blocking(open).await.expect(OPENS)?)
}

async fn open_generator<S: Store>(config: &Config) -> Result<Opened, ServerError> {
    let opening = config.clone();
    let (folder, generator) =
        tokio::task::spawn_blocking(move || Generator::<S>::open(&opening)).await.expect(OPENS)?;
    let (handle, queue) = Handle::queued(&generator);
    let serving = Serving::Generator { pools: config.pools.clone(), numbers: Arc::new(handle) };
    let running = tokio::task::spawn_blocking(move || generator.run(queue));
    Ok(Opened { folder: Arc::new(folder), serving, tasks: Tasks::Generator(Some(running)) })
}

/// Everything blocks the one thread, the opening too.
fn open_simple(config: &Config) -> Result<Opened, ServerError> {
    let (folder, generator) = Generator::open(config)?;
    let handle = Arc::new(Handle::direct(generator));
    let serving = Serving::Generator { pools: config.pools.clone(), numbers: handle };
    Ok(Opened { folder: Arc::new(folder), serving, tasks: Tasks::Generator(None) })
}

/// An opened data folder that may be served.
struct FoundFolder {
    folder: Arc<Folder>,
    /// The files of each pool, and in a fleet its membership.
    pools: Vec<(PoolFiles, Option<Membership>)>,
    gate: Option<(Gate, Gatekeeper)>,
}

async fn open_folder(config: &Config) -> Result<FoundFolder, ServerError> {
    let (dir, in_fleet) = (config.dir.clone(), config.fleet.is_some());
    let open = move || Folder::open(&dir, Mode::Sharded, in_fleet, folder::PATIENCE);
    let folder = tokio::task::spawn_blocking(open).await.expect(OPENS)?;
    let (memberships, gate) = match &config.fleet {
        Some(settings) => {
            let fleet = Fleet::join(settings, &config.pools, &folder).await?;
            (fleet.memberships, Some((fleet.gate, fleet.gatekeeper)))
        }
        None => (Vec::new(), None),
    };
    let folder = Arc::new(folder);
    let listed = Arc::clone(&folder);
    let found = tokio::task::spawn_blocking(move || listed.shards()).await.expect(OPENS);
    let found = found.map_err(FolderError::from)?;
    let memberships = memberships.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    let openings = config.pools.iter().cloned().zip(memberships).map(|(config, membership)| {
        let found = found.get(&config.name).cloned().unwrap_or_default();
        open_files(Arc::clone(&folder), config, found, membership)
    });
    let pools = at_once(openings).await.into_iter().collect::<Result<_, FolderError>>()?;
    Ok(FoundFolder { folder, pools, gate })
}

/// Opens a pool's files, of which the folder has the shards `found`.
async fn open_files(
    folder: Arc<Folder>,
    config: PoolConfig,
    found: BTreeSet<ShardIndex>,
    membership: Option<Membership>,
) -> Result<(PoolFiles, Option<Membership>), FolderError> {
    let open = move || {
        let share = membership.as_ref().map(|membership| &membership.share);
        Ok((folder.open_pool(&config, &found, share, true)?, membership))
    };
    tokio::task::spawn_blocking(open).await.expect(OPENS)
}

/// Opens or ends several pools at once, since each mostly waits for the disk. Returns the results in order.
async fn at_once<T: Send + 'static>(
    works: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = works.map(tokio::spawn).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect(OPENS));
    }
    results
}

const OPENS: &str = "opening and ending do not panic";

/// Raises the limit of open files to what the settings need. Returns the most connections at once: as configured, or
/// fewer if the process may not open as many files.
fn connections_max(config: &Config) -> usize {
    let wanted = config.server.connections;
    let shards: usize = config.pools.iter().map(|pool| usize::from(pool.shards)).sum();
    let own = OWN_FILES + FILES_PER_POOL * config.pools.len() + FILES_PER_SHARD * shards;
    let files = (wanted + own) as u64;
    let allowed = rlimit::increase_nofile_limit(files).unwrap_or(files);
    let possible = usize::try_from(allowed).unwrap_or(usize::MAX).saturating_sub(own).max(1);
    if possible < wanted {
        warn!(
            wanted,
            possible,
            "fewer connections than configured: the process may open no more files (ulimit -n)"
        );
    }
    wanted.min(possible)
}

async fn join<T>(tasks: impl IntoIterator<Item = JoinHandle<T>>) -> Vec<T> {
    let mut ended = Vec::new();
    for task in tasks {
        match task.await {
            Ok(result) => ended.push(result),
            Err(error) => tracing::error!(%error, "a background task failed"),
        }
    }
    ended
}
