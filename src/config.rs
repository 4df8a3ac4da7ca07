//! The settings: read once from four layers, validated once, and passed on in parts. Knows nothing of files
//! other than config files, and starts nothing.
//!
//! The layers, from the lowest to the highest: the built-in `config.toml`, the user's file, `TOMBOLA_…`
//! environment variables, flags.

mod auth;
mod fleet;
mod layers;
mod lease;
mod pools;
mod quota;
mod receipts;
mod refill;
mod server;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::auth::AuthKeys;
pub(crate) use self::auth::{AuthConfig, Scope, TokenConfig, TokenName};
use self::fleet::FleetKeys;
pub(crate) use self::fleet::{FleetConfig, SpaceName};
pub use self::fleet::{StoreAddress, StoreConfig, StoreTls};
use self::layers::Layers;
pub use self::layers::{Location, Overrides};
pub(crate) use self::layers::{Origin, Setting};
pub use self::lease::LeaseConfig;
use self::lease::LeaseKeys;
use self::pools::PoolKeys;
pub use self::pools::{PoolConfig, PoolName};
pub(crate) use self::quota::QuotaConfig;
use self::quota::QuotaKeys;
use self::receipts::ReceiptsKeys;
pub use self::receipts::Recorded;
pub(crate) use self::receipts::{ReceiptStoreConfig, ReceiptsConfig};
pub use self::refill::RefillConfig;
use self::refill::RefillKeys;
pub use self::server::Mode;
use self::server::ServerKeys;
pub(crate) use self::server::{ServerConfig, TlsConfig};
pub(crate) use self::values::parse_time;

/// Every default, with comments: the `config.toml` at the top of the repository.
pub const DEFAULTS: &str = include_str!("../config.toml");

/// The variable with the token for the commands that contact a server. It is not a setting.
pub(crate) const TOKEN_VARIABLE: &str = "TOMBOLA_TOKEN";

/// Why the settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A layer can't be read or is not TOML.
    #[error("the configuration can't be read: {0}")]
    Unreadable(String),
    /// A key is unknown, or its value is not allowed.
    #[error("{key}{value}{origin}: {problem}")]
    Refused {
        /// The key, with points between levels.
        key: String,
        /// ` = VALUE`, or empty if there is no value to show.
        value: String,
        /// ` (in FILE)`, or empty if it is a default.
        origin: String,
        /// The problem, and what is allowed.
        problem: String,
    },
}

/// All settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// The HTTP side.
    pub server: ServerConfig,
    /// The data folder.
    pub dir: PathBuf,
    pub pools: Vec<PoolConfig>,
    /// The authentication.
    pub auth: AuthConfig,
    /// The limit on the numbers that each caller may take, if there is one.
    pub quota: Option<QuotaConfig>,
    /// The fleet, if this server is part of one.
    pub fleet: Option<FleetConfig>,
    /// The receipts and the idempotency keys.
    pub receipts: ReceiptsConfig,
}

impl Config {
    /// Reads all layers and validates the result of merging them.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::explain(overrides).map(|(config, _)| config)
    }

    /// Loads the settings, and returns with them every setting in effect and its origin.
    pub fn explain(overrides: &Overrides) -> Result<(Self, Vec<Setting>), ConfigError> {
        Self::explain_with(overrides, layers::variables()?)
    }

    fn explain_with(
        overrides: &Overrides,
        variables: BTreeMap<String, String>,
    ) -> Result<(Self, Vec<Setting>), ConfigError> {
        let layers = Layers::read(overrides, variables)?;
        let mut keys: Keys = layers.parse()?;
        let only = overrides.pool.as_deref();
        let config = keys.validate(only).map_err(|refusal| layers.refused(&refusal))?;
        Ok((config, layers.explain(&keys)))
    }
}

/// A key that was refused, before its value and origin are added.
struct RefusedKey {
    key: String,
    problem: String,
}

impl RefusedKey {
    fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into() }
    }
}

/// The keys of a settings file. Validation sets those whose defaults depend on other keys, so that the keys
/// are then all settings in effect.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    server: ServerKeys,
    storage: StorageKeys,
    lease: LeaseKeys,
    refill: RefillKeys,
    pools: BTreeMap<String, PoolKeys>,
    #[serde(default)]
    auth: AuthKeys,
    quota: Option<QuotaKeys>,
    receipts: ReceiptsKeys,
    fleet: Option<FleetKeys>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct StorageKeys {
    #[serde(deserialize_with = "values::text")]
    dir: String,
}

impl Keys {
    fn validate(&mut self, only: Option<&str>) -> Result<Config, RefusedKey> {
        let server = self.server.validate()?;
        let refill = self.refill.validate()?;
        let lease = self.lease.validate();
        let mut pools = pools::validate(&mut self.pools, only, (lease, refill))?;
        let auth = self.auth.validate(|name| self.pools.contains_key(name))?;
        let quota = self.quota.as_mut().map(QuotaKeys::validate).transpose()?;
        let fleet = self.fleet.as_mut().map(FleetKeys::validate).transpose()?;
        if fleet.is_some() && server.mode != Mode::Sharded {
            let problem =
                format!("the mode {} does not support fleets; remove [fleet]", server.mode);
            return Err(RefusedKey::new("fleet", problem));
        }
        if fleet.is_none()
            && let Some(pool) = pools.iter().find(|pool| pool.used_file.is_some())
        {
            let problem = "only a fleet reads it; without one, import the file with tombola import";
            return Err(RefusedKey::new(format!("pools.{}.used_file", pool.name), problem));
        }
        let receipts = self.receipts.validate(fleet.is_some())?;
        if server.mode != Mode::Sharded
            && let Some(pool) = pools.iter().find(|pool| pool.receipts == Recorded::All)
        {
            let problem =
                format!("the mode {} keeps no receipts; use the mode sharded", server.mode);
            return Err(RefusedKey::new(format!("pools.{}.receipts", pool.name), problem));
        }
        if server.mode != Mode::Sharded
            && let Some(pool) = pools.iter().find(|pool| pool.space.codes().is_some())
        {
            let problem = format!("the mode {} has no codes; use the mode sharded", server.mode);
            return Err(RefusedKey::new(format!("pools.{}.pattern", pool.name), problem));
        }
        if let Some(fleet) = &mut self.fleet {
            let shards = pools.iter().map(|pool| u64::from(pool.shards)).sum();
            let rows = fleet.lease_rows(self.lease.rows, shards).0 as usize;
            pools.iter_mut().for_each(|pool| pool.lease = LeaseConfig { rows });
        }
        let dir = self.storage.dir.clone().into();
        Ok(Config { server, dir, pools, auth, quota, fleet, receipts })
    }
}
