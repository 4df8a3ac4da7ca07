//! The wiring: opens the folder, starts the tasks, serves, and ends all of it in order. Knows nothing
//! of signals: whoever runs it says when to stop.

mod accept;
pub mod blocking;
mod connection;
mod lanes;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use self::accept::Terms;
use self::lanes::Lanes;
use self::tls::Tls;
pub use self::tls::TlsError;
use crate::config::{AuthConfig, Config, LeaseConfig, Mode, PoolConfig};
use crate::events::Events;
use crate::fleet::{Claims, Fleet, FleetError, Gate, Lost};
use crate::folder::{Folder, FolderError, PoolFiles};
use crate::http::{Front, Guard};
use crate::monitor::Monitor;
use crate::pool::Pool;
use crate::refill::Refiller;
use crate::rungs::{Desk, JsonStore, Numbers, OpenError, Store, TableStore};
use crate::sqlite;
use crate::traffic::Traffic;

/// File descriptors of a shard: its file, `-wal` and `-shm`, and its next generation with a journal.
const FILES_PER_SHARD: usize = 5;

/// All other file descriptors of the process: ledgers, the runtime, the log; with room to spare.
const OWN_FILES: usize = 128;

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
    /// The threads that answer can't be started.
    #[error("can't start the threads that answer: {0}")]
    Threads(io::Error),
    /// The certificate or its key can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// This instance can't take part in its fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

/// A server that listens, with all its tasks running.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    terms: Terms,
    lanes: Lanes,
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
        monitor: JoinHandle<()>,
        /// For the refillers and the monitor.
        stop: watch::Sender<bool>,
        /// In a fleet.
        gate: Option<(Gate, JoinHandle<()>)>,
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
        check_door(config)?;
        let guard = Guard::new(&config.auth, config.quota.as_ref());
        let tls = config.server.tls.clone().map(Tls::open).transpose()?.map(Arc::new);
        let listen_error = |source| ServerError::Listen { address: config.server.listen, source };
        let listener = TcpListener::bind(config.server.listen).await.map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;

        let traffic = Traffic::new(Lanes::count());
        let lanes = Lanes::start(&traffic).map_err(ServerError::Threads)?;
        let (folder, front, tasks) = match config.server.mode {
            Mode::Sharded => open_pools(config, guard, traffic).await?,
            Mode::Sqlite => open_rung::<TableStore>(config, guard).await?,
            Mode::Json | Mode::Simple => open_rung::<JsonStore>(config, guard).await?,
        };
        let terms = Terms {
            front,
            tls,
            connections: connections(config),
            client_timeout: config.server.client_timeout,
            drain: config.server.drain,
        };
        Ok(Self { listener, address, terms, lanes, tasks, folder })
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What reads the certificate and its key anew, from any thread.
    pub fn reloader(&self) -> impl Fn() + Send + 'static {
        let tls = self.terms.tls.clone();
        move || match tls.as_ref().map(|tls| tls.reload()) {
            Some(Ok(())) => info!("new connections get the certificate that was read just now"),
            Some(Err(error)) => {
                error!(%error, "the certificate stays as it was: its files can't be used");
            }
            None => info!("there is nothing to reload: this server has no certificate"),
        }
    }

    /// Serves until `shutdown` completes; then answers what is in flight, gives unserved leases back
    /// and closes every file.
    ///
    /// # Errors
    /// [`Lost`] when the fleet's fence has moved on without this instance: it stops by itself then.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), Lost> {
        let Self { listener, terms, lanes, tasks, folder, .. } = self;
        let mut lost = None;
        let ended = async {
            tokio::select! {
                () = shutdown => {}
                found = tasks.lost() => {
                    // Nothing is leased any more, and what was is taken back: each of these rows was covered
                    // by a step, so that what is in flight repeats nothing.
                    tasks.stop_pools();
                    lost = Some(found);
                }
            }
        };
        accept::serve(listener, terms, lanes, ended).await;
        tasks.end().await;
        drop(folder);
        info!("stopped");
        lost.map_or(Ok(()), Err)
    }
}

impl Tasks {
    /// Completes when the fence is lost, if there is one.
    async fn lost(&self) -> Lost {
        match self {
            Self::Pools { gate: Some((gate, _)), .. } => gate.lost().await,
            Self::Pools { gate: None, .. } | Self::Numbers(_) => std::future::pending().await,
        }
    }

    fn stop_pools(&self) {
        if let Self::Pools { pools, .. } = self {
            pools.iter().for_each(|pool| pool.stop());
        }
    }

    async fn end(self) {
        match self {
            Self::Pools { pools, workers, refillers, monitor, stop, gate } => {
                // Refillers first: a build that nobody needs any more should not hold up the rest.
                stop.send_replace(true);
                join(refillers).await;
                join(vec![monitor]).await;
                for pool in &pools {
                    pool.stop();
                }
                join(workers).await;
                if let Some((_, gatekeeper)) = gate {
                    join(vec![gatekeeper]).await;
                }
            }
            Self::Numbers(numbers) => join(vec![numbers]).await,
        }
    }
}

/// Whether a server would start with these settings, as far as they alone can tell.
///
/// # Errors
/// [`ServerError::OpenDoor`] and [`ServerError::Tls`].
pub fn check(config: &Config) -> Result<(), ServerError> {
    check_door(config)?;
    config.server.tls.clone().map(Tls::open).transpose()?;
    Ok(())
}

/// Refuses to listen where other machines can ask, unless it is said who may.
fn check_door(config: &Config) -> Result<(), ServerError> {
    let address = config.server.listen;
    if address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    match config.auth {
        AuthConfig::Unsaid => return Err(ServerError::OpenDoor { address }),
        AuthConfig::Tokens(_) if config.server.tls.is_none() => warn!(
            %address,
            "tokens and numbers cross the network in plain text, for anyone on the way to read: \
             set server.tls, or put a proxy that speaks TLS in front and listen on 127.0.0.1"
        ),
        AuthConfig::Tokens(_) | AuthConfig::Anyone => {}
    }
    Ok(())
}

async fn open_pools(
    config: &Config,
    guard: Option<Arc<Guard>>,
    traffic: Traffic,
) -> Result<(Folder, Front, Tasks), ServerError> {
    let Opened { folder, pools: found, mut fleet } = open_folder(config).await?;
    let (stop, stopped) = watch::channel(false);
    let claims: Vec<Option<Claims>> =
        config.pools.iter().map(|pool| fleet.as_ref().map(|fleet| fleet.claims(pool))).collect();
    let gate = fleet.take().map(|fleet| {
        let (gate, keeper) = fleet.into_gate();
        (gate, tokio::spawn(keeper.run(stopped.clone())))
    });
    let lease =
        config.fleet.as_ref().map_or(config.lease, |fleet| LeaseConfig { rows: fleet.lease_rows });
    let events = Arc::new(Events::default());
    let (mut pools, mut workers, mut refillers) = (Vec::new(), Vec::new(), Vec::new());
    for ((pool_config, files), claims) in config.pools.iter().zip(found).zip(claims) {
        let PoolFiles { paths, ledger, shards } = files;
        let events = Arc::clone(&events);
        let gate = gate.as_ref().map(|(gate, _)| gate.clone());
        let refill = config.refill;
        let (pool, tasks) =
            Pool::open(pool_config, lease, refill, &paths, &shards, events, gate).await;
        let refiller = Refiller::new(
            ledger,
            paths,
            Arc::clone(&pool),
            config.refill,
            pool_config.shard_size,
            claims,
            stopped.clone(),
        );
        refillers.push(tokio::spawn(refiller.run()));
        workers.extend(tasks);
        pools.push(pool);
    }
    let monitor = Arc::new(Monitor::new(traffic, pools.clone(), events));
    let front = Front::of_pools(Arc::clone(&monitor), config.server.count_limit, guard);
    let monitor = tokio::spawn(monitor.run(stopped));
    Ok((folder, front, Tasks::Pools { pools, workers, refillers, monitor, stop, gate }))
}

async fn open_rung<S: Store>(
    config: &Config,
    guard: Option<Arc<Guard>>,
) -> Result<(Folder, Front, Tasks), ServerError> {
    let opening = config.clone();
    let (folder, numbers) = tokio::task::spawn_blocking(move || Numbers::<S>::open(&opening))
        .await
        .expect("opening does not panic")?;
    let (desk, queue) = Desk::new(&numbers);
    let front = Front::of_rung(config.pools.clone(), desk, guard);
    let tasks = Tasks::Numbers(tokio::task::spawn_blocking(move || numbers.run(queue)));
    Ok((folder, front, tasks))
}

/// A folder that may be served.
struct Opened {
    folder: Folder,
    pools: Vec<PoolFiles>,
    fleet: Option<Fleet>,
}

async fn open_folder(config: &Config) -> Result<Opened, ServerError> {
    let (dir, in_fleet) = (config.dir.clone(), config.fleet.is_some());
    let open = move || Folder::open(&dir, Mode::Sharded, in_fleet);
    let folder = tokio::task::spawn_blocking(open).await.expect(OPENS)?;
    let mut fleet = None;
    let mut shares = Vec::new();
    if let Some(settings) = &config.fleet {
        let (joined, found) = Fleet::join(settings, &config.pools, &folder).await?;
        fleet = Some(joined);
        shares = found;
    }
    let pools = config.pools.clone();
    let open = move || {
        let mut shares = shares.iter();
        let open = |pool: &PoolConfig| folder.open_pool(pool, shares.next());
        let found = pools.iter().map(open).collect::<Result<_, _>>()?;
        Ok::<_, FolderError>((folder, found))
    };
    let (folder, pools) = tokio::task::spawn_blocking(open).await.expect(OPENS)?;
    Ok(Opened { folder, pools, fleet })
}

const OPENS: &str = "opening does not panic";

/// How many connections there can be: as configured, or as many as the process may have open files
/// for, beside its own.
fn connections(config: &Config) -> usize {
    let wanted = config.server.connections;
    let shards: usize = config.pools.iter().map(|pool| usize::from(pool.shards)).sum();
    let own = OWN_FILES + FILES_PER_SHARD * shards;
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

async fn join(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a background task failed");
        }
    }
}
