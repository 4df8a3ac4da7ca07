//! Applies changed settings to a running server: all of them, or none. Knows nothing of signals and connections.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::pools::{RunningPool, Shared};
use super::tls::Tls;
use super::{at_once, check_door, connections_max, warn_of_tokens};
use crate::backoff::Backoff;
use crate::config::{Config, Overrides, PoolConfig, PoolName};
use crate::http::{Guard, Keeper, LiveRoutes, PoolRoutes, Routes};
use crate::monitor::Monitor;
use crate::on_demand::Handle;
use crate::pool::{Cause, Pool, Trouble};
use crate::receipts::Receipts;
use crate::reload::{Loaded, Plan, Reload, ReloadHandle, ReloadRequests, plan};

/// How often a pool that could not be opened again with the settings in effect is tried.
const TRIES: u32 = 5;

/// The time between two warnings of tokens that end.
const DAY: Duration = Duration::from_secs(86_400);

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Reloader {
    pub(super) overrides: Overrides,
    pub(super) loaded: Loaded,
    pub(super) live: Arc<LiveRoutes>,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) connections_max: Arc<AtomicUsize>,
    pub(super) handle: ReloadHandle,
    pub(super) requests: ReloadRequests,
    pub(super) serving: Serving,
}

/// The parts of a mode that a reload replaces.
#[derive(Debug)]
pub(super) enum Serving {
    Pools(Box<ServingPools>),
    /// The mode is below sharded.
    Generator {
        pools: Vec<PoolConfig>,
        numbers: Arc<Handle>,
    },
}

/// The pools of the mode sharded.
#[derive(Debug)]
pub(super) struct ServingPools {
    pub(super) shared: Shared,
    pub(super) monitor: Arc<Monitor>,
    pub(super) receipts: Arc<Receipts>,
    /// In ascending order of their names.
    pub(super) pools: Vec<RunningPool>,
}

impl Reloader {
    /// Reloads at each request until `stop` is cancelled, and warns of tokens that end. Returns the pools, which
    /// serve.
    pub(super) async fn run(mut self, stop: CancellationToken) -> Vec<RunningPool> {
        let mut days = tokio::time::interval(DAY);
        // The first tick is immediate, and the start has warned already.
        days.tick().await;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(reply) = self.requests.recv() => {
                    let outcome = self.reload_and_report().await;
                    let _ = reply.send(outcome);
                }
                _ = days.tick() => warn_of_tokens(&self.loaded.config),
            }
        }
        match self.serving {
            Serving::Pools(serving) => serving.pools,
            Serving::Generator { .. } => Vec::new(),
        }
    }

    async fn reload_and_report(&mut self) -> Reload {
        let outcome = self.reload().await;
        // That of the settings in effect, whether they are new or not.
        let digest = self.loaded.digest();
        match outcome.is_applied {
            true => info!(%digest, "{}", outcome.sentence()),
            false => error!(%digest, "{}", outcome.sentence()),
        }
        if let Serving::Pools(serving) = &self.serving {
            serving.monitor.reloaded(outcome.clone(), digest);
        }
        outcome
    }

    async fn reload(&mut self) -> Reload {
        let overrides = self.overrides.clone();
        let load = move || Loaded::read(&overrides);
        let loaded = tokio::task::spawn_blocking(load).await.expect("reading does not panic");
        let applied = match loaded {
            Ok(loaded) => self.apply(loaded).await,
            Err(error) => Err(error.to_string()),
        };
        let is_applied = applied.is_ok();
        let message = applied.unwrap_or_else(|problem| problem);
        Reload { at: SystemTime::now(), is_applied, message }
    }

    /// Puts the settings into effect. Returns a sentence about what changed.
    async fn apply(&mut self, after: Loaded) -> Result<String, String> {
        let plan = plan(&self.running(), &after)?;
        check_door(&after.config).map_err(|error| error.to_string())?;
        warn_of_tokens(&after.config);
        let certificate = match (&self.tls, &after.config.server.tls) {
            (Some(_), Some(files)) => Some(Tls::read(files).map_err(|error| error.to_string())?),
            _ => None,
        };
        self.set_connections_max(&after.config);
        let previous = self.live.current();
        let changed = match &mut self.serving {
            Serving::Pools(serving) => serving.change(&plan, &previous).await,
            Serving::Generator { .. } => Ok(Vec::new()),
        };
        let ended = match changed {
            Ok(ended) => ended,
            Err(problem) => {
                self.set_connections_max(&self.loaded.config);
                // Pools that were opened again need new routes all the same.
                let guard = Arc::clone(previous.guard());
                self.live.replace(self.routes(&self.loaded.config, guard, &previous));
                return Err(problem);
            }
        };
        let guard = Guard::new(&after.config, Some(previous.guard()));
        self.live.replace(self.routes(&after.config, guard, &previous));
        let mut summary = plan.summary();
        if let (Some(tls), Some(certificate)) = (&self.tls, certificate) {
            tls.install(certificate);
            summary += "; new connections get the certificate that is in its file now";
        }
        // Requests that these turn away find that they are gone.
        end(ended).await;
        self.loaded = after;
        Ok(summary)
    }

    /// Shares the open files that the process may have between the pools of these settings and connections.
    fn set_connections_max(&self, config: &Config) {
        self.connections_max.store(connections_max(config), Ordering::Relaxed);
    }

    /// Returns the settings in effect without the pools that could not be opened again. To the next reload these are
    /// new, so that it opens them.
    fn running(&self) -> Loaded {
        let mut loaded = self.loaded.clone();
        if let Serving::Pools(serving) = &self.serving {
            let running: BTreeSet<_> = serving.pools.iter().map(RunningPool::name).collect();
            loaded.config.pools.retain(|config| running.contains(&config.name));
        }
        loaded
    }

    fn routes(&self, config: &Config, guard: Arc<Guard>, previous: &Routes) -> Routes {
        self.serving.routes(config, guard, self.handle.clone(), Some(previous))
    }
}

impl Serving {
    /// Returns the routes to the pools.
    pub(super) fn routes(
        &self,
        config: &Config,
        guard: Arc<Guard>,
        reloads: ReloadHandle,
        previous: Option<&Routes>,
    ) -> Routes {
        let serving = match self {
            Self::Pools(serving) => serving,
            Self::Generator { pools, numbers } => {
                return Routes::on_demand(pools.clone(), Arc::clone(numbers), guard, reloads);
            }
        };
        let receipts = Arc::clone(&serving.receipts);
        let parts = PoolRoutes {
            monitor: Arc::clone(&serving.monitor),
            count_limit: config.server.count_limit,
            guard,
            keeper: Keeper::new(receipts, config.receipts.keys, &config.pools),
            reloads,
        };
        Routes::of_pools(parts, previous)
    }
}

impl ServingPools {
    /// Opens the new pools, and opens again those that change. Returns those that are to be ended.
    ///
    /// # Errors
    /// The first problem. All pools are then as they were before, except those that can't be opened with the settings
    /// that they had either: they stay stopped, and are shown as down.
    async fn change(&mut self, plan: &Plan, routes: &Routes) -> Result<Vec<RunningPool>, String> {
        let (mut opened, result) = RunningPool::open_all(&self.shared, &plan.opened).await;
        if let Err(error) = result {
            end(opened).await;
            return Err(error.to_string());
        }
        // From here on, requests that are turned away wait for the next routes.
        routes.set_outdated();
        let taken = plan.reopened.iter().filter_map(|config| self.take(&config.name));
        let taken: Vec<_> = taken.collect();
        let before: Vec<_> = taken.iter().map(|pool| pool.config.clone()).collect();
        end(taken).await;
        let (reopened, result) = RunningPool::open_all(&self.shared, &plan.reopened).await;
        self.pools.extend(reopened);
        if let Err(error) = result {
            end(opened).await;
            let shown = self.monitor.pools();
            let mut problem = error.to_string();
            for name in self.restore(before, &shown).await {
                problem += &format!("; the pool {name} is down until a reload opens it");
            }
            self.watch(&shown);
            return Err(problem);
        }
        self.pools.append(&mut opened);
        let ended = plan.ended.iter().filter_map(|name| self.take(name)).collect();
        self.watch(&[]);
        Ok(ended)
    }

    /// Opens pools with the settings that they had. Returns those that can't be opened, whose stopped pools are `shown`.
    async fn restore(&mut self, before: Vec<PoolConfig>, shown: &[Arc<Pool>]) -> Vec<PoolName> {
        let mut lost = Vec::new();
        for config in before {
            end(self.take(&config.name)).await;
            let stopped = shown.iter().find(|pool| *pool.name() == config.name);
            match self.open_again(&config, stopped).await {
                Some(pool) => self.pools.push(pool),
                None => lost.push(config.name),
            }
        }
        lost
    }

    /// Opens a pool, in several tries if necessary. Notes at the stopped pool why they fail.
    async fn open_again(
        &self,
        config: &PoolConfig,
        stopped: Option<&Arc<Pool>>,
    ) -> Option<RunningPool> {
        let mut backoff = Backoff::new(config.refill.retry, config.refill.retry_limit);
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(backoff.next()).await;
            }
            let configs = std::slice::from_ref(config);
            let (mut opened, result) = RunningPool::open_all(&self.shared, configs).await;
            let Err(error) = result else { return opened.pop() };
            error!(pool = %config.name, %error, "the pool can't be opened again");
            if let Some(stopped) = stopped {
                let details = format!("the pool can't be opened again: {error}");
                stopped.set_refill_trouble(Some(Trouble::new(Cause::Shard, details, &error)));
            }
        }
        None
    }

    fn take(&mut self, name: &PoolName) -> Option<RunningPool> {
        let position = self.pools.iter().position(|pool| pool.name() == name)?;
        Some(self.pools.remove(position))
    }

    /// Shows the pools that run, and those of `before` that don't.
    fn watch(&mut self, before: &[Arc<Pool>]) {
        self.pools.sort_by(|one, other| one.name().cmp(other.name()));
        let mut shown: Vec<_> = self.pools.iter().map(|pool| Arc::clone(&pool.pool)).collect();
        for pool in before {
            if let Err(place) = shown.binary_search_by(|other| other.name().cmp(pool.name())) {
                shown.insert(place, Arc::clone(pool));
            }
        }
        self.monitor.set_pools(shown);
    }
}

/// Ends pools, several at once.
async fn end(pools: impl IntoIterator<Item = RunningPool>) {
    at_once(pools.into_iter().map(RunningPool::end)).await;
}
