//! Decides what changed settings mean for a running server. Starts nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, ConfigError, Mode, Overrides, PoolConfig, PoolName, Setting};

/// Keys outside `pools` that can change while a server runs, each with the keys below it.
const CHANGEABLE: [&str; 7] = [
    "auth",
    "quota",
    "lease",
    "refill",
    "server.count_limit",
    "server.hosts",
    "receipts.lookups_per_second",
];

/// Keys of a pool that can change while the pool serves.
const CHANGEABLE_OF_POOLS: [&str; 4] = ["enabled", "shards", "shard_size", "receipts"];

/// Settings that were read, with each key that is in effect.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) config: Config,
    pub(crate) settings: Vec<Setting>,
}

impl Loaded {
    /// Reads the settings.
    pub(crate) fn read(overrides: &Overrides) -> Result<Self, ConfigError> {
        let (config, settings) = Config::explain(overrides)?;
        Ok(Self { config, settings })
    }

    /// Returns the SHA-256 of all settings in effect, as hexadecimal digits.
    pub(crate) fn digest(&self) -> String {
        let mut text = String::new();
        for Setting { table, key, value, .. } in &self.settings {
            writeln!(text, "{table}.{key} = {value}").expect("a text takes any text");
        }
        hex::encode(Sha256::digest(text))
    }
}

/// The steps of a reload besides replacing the access control and the limits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// Pools that begin to serve.
    pub(crate) opened: Vec<PoolConfig>,
    /// Pools that are closed and opened again, because their shards, leases or refills change.
    pub(crate) reopened: Vec<PoolConfig>,
    /// Pools that end.
    pub(crate) ended: Vec<PoolName>,
    /// All keys that changed.
    changed: BTreeSet<String>,
}

impl Plan {
    /// Returns whether pools come, go or are opened again.
    fn touches_pools(&self) -> bool {
        !(self.opened.is_empty() && self.reopened.is_empty() && self.ended.is_empty())
    }

    /// Returns a sentence about what the reload did.
    pub(crate) fn summary(&self) -> String {
        if self.changed.is_empty() && !self.touches_pools() {
            return "The settings were reloaded; none changed".to_owned();
        }
        let names = |pools: &[PoolConfig]| pools.iter().map(|pool| pool.name.clone()).collect();
        let parts: [(&str, Vec<PoolName>); 3] = [
            ("new pools", names(&self.opened)),
            ("pools opened again", names(&self.reopened)),
            ("pools ended", self.ended.clone()),
        ];
        let changed: Vec<_> = self.changed.iter().map(String::as_str).collect();
        let mut text = "The settings were reloaded".to_owned();
        if !changed.is_empty() {
            text += &format!("; changed: {}", changed.join(", "));
        }
        for (what, pools) in parts.iter().filter(|(_, pools)| !pools.is_empty()) {
            let pools: Vec<_> = pools.iter().map(PoolName::as_str).collect();
            text += &format!("; {what}: {}", pools.join(", "));
        }
        text
    }
}

/// Returns what to do so that the settings `after` are in effect.
///
/// # Errors
/// A sentence that names what can't change while the server runs.
pub(crate) fn plan(before: &Loaded, after: &Loaded) -> Result<Plan, String> {
    let changed = changed_keys(before, after);
    let fixed: Vec<_> =
        changed.iter().filter(|key| !can_change(key, before, after)).map(String::as_str).collect();
    if !fixed.is_empty() {
        return Err(format!(
            "{} can't change while the server runs: restart it, or undo the change",
            fixed.join(", ")
        ));
    }
    let (old, new) = (&before.config.pools, &after.config.pools);
    let of = |pools: &[PoolConfig], name: &PoolName| {
        pools.iter().find(|pool| pool.name == *name).cloned()
    };
    let mut plan = Plan { changed, ..Plan::default() };
    for pool in new {
        match of(old, &pool.name) {
            None => plan.opened.push(pool.clone()),
            Some(old) if !has_same_shards(&old, pool) => plan.reopened.push(pool.clone()),
            Some(_) => {}
        }
    }
    plan.ended = old
        .iter()
        .filter(|pool| of(new, &pool.name).is_none())
        .map(|pool| pool.name.clone())
        .collect();
    let (mode, in_fleet) = (before.config.server.mode, before.config.fleet.is_some());
    match plan.touches_pools() {
        true if in_fleet => {
            Err("pools of a fleet can't change while an instance runs: restart its \
                                 instances one after the other"
                .to_owned())
        }
        true if mode != Mode::Sharded => {
            Err(format!("the mode {mode} reads its pools when it starts: restart the server"))
        }
        _ => Ok(plan),
    }
}

/// Returns the keys that are set in one of the settings only, or to another value.
fn changed_keys(before: &Loaded, after: &Loaded) -> BTreeSet<String> {
    let values = |loaded: &Loaded| -> BTreeMap<String, String> {
        let key = |setting: &Setting| {
            (format!("{}.{}", setting.table, setting.key), setting.value.to_string())
        };
        loaded.settings.iter().map(key).collect()
    };
    let (before, after) = (values(before), values(after));
    let keys = before.keys().chain(after.keys());
    keys.filter(|key| before.get(*key) != after.get(*key)).cloned().collect()
}

fn can_change(key: &str, before: &Loaded, after: &Loaded) -> bool {
    if let Some((pool, field)) = key.strip_prefix("pools.").and_then(|key| key.split_once('.')) {
        let serves =
            |loaded: &Loaded| loaded.config.pools.iter().any(|config| config.name.as_str() == pool);
        return CHANGEABLE_OF_POOLS.contains(&field) || !(serves(before) && serves(after));
    }
    // Connections can't be moved between http and https.
    let has_tls = |loaded: &Loaded| loaded.config.server.tls.is_some();
    let is_certificate = key.starts_with("server.tls.") && has_tls(before) && has_tls(after);
    let below = |allowed: &str| {
        key.strip_prefix(allowed).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    is_certificate || CHANGEABLE.iter().any(|allowed| below(allowed))
}

fn has_same_shards(one: &PoolConfig, other: &PoolConfig) -> bool {
    (one.shards, one.shard_size, one.lease, one.refill)
        == (other.shards, other.shard_size, other.lease, other.refill)
}

/// The outcome of a reload.
#[derive(Clone, Debug)]
pub(crate) struct Reload {
    pub(crate) at: SystemTime,
    /// Whether the new settings are in effect. Otherwise nothing changed.
    pub(crate) is_applied: bool,
    /// A sentence about what changed, or about why nothing did.
    pub(crate) message: String,
}

impl Reload {
    /// Returns a sentence that tells the outcome.
    pub(crate) fn sentence(&self) -> String {
        match self.is_applied {
            true => self.message.clone(),
            false => format!("The settings were not reloaded: {}", self.message),
        }
    }
}

/// Requests reloads.
#[derive(Clone, Debug)]
pub(crate) struct ReloadHandle(mpsc::Sender<oneshot::Sender<Reload>>);

/// The requests for reloads.
pub(crate) type ReloadRequests = mpsc::Receiver<oneshot::Sender<Reload>>;

impl ReloadHandle {
    /// Returns a handle, and the requests that are sent through it.
    pub(crate) fn new() -> (Self, ReloadRequests) {
        let (sender, requests) = mpsc::channel(16);
        (Self(sender), requests)
    }

    /// Requests a reload without waiting for it.
    pub(crate) fn request(&self) {
        // If many are requested already, these read the same settings.
        let _ = self.0.try_send(oneshot::channel().0);
    }

    /// Reloads the settings. Returns `None` if the server stops first.
    pub(crate) async fn reload(&self) -> Option<Reload> {
        let (reply, outcome) = oneshot::channel();
        self.0.send(reply).await.ok()?;
        outcome.await.ok()
    }
}
