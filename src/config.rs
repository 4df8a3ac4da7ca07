//! The settings: read once from four layers, validated once, and passed on in parts. Knows nothing of files
//! other than config files, and starts nothing.
//!
//! The layers, from the lowest to the highest: the built-in `config.toml`, the user's file, `TOMBOLA_…`
//! environment variables, flags.

mod auth;
mod fleet;
mod origins;
mod pools;
mod quota;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::config::builder::DefaultState;
use ::config::{ConfigBuilder, Environment, File, FileFormat};
use clap::ValueEnum;
use serde::Deserialize;
use serde::de::{self, Deserializer};

use self::auth::{AUTH_ALLOWED, AuthKeys, may_be_secret};
pub use self::auth::{AuthConfig, Scope, TokenConfig, TokenName};
use self::fleet::FleetKeys;
pub use self::fleet::{FleetConfig, SpaceName, StoreAddress, StoreConfig, StoreTls};
pub use self::origins::{Origin, Setting};
use self::pools::PoolKeys;
pub use self::pools::{PoolConfig, PoolName};
pub use self::quota::QuotaConfig;
use self::quota::QuotaKeys;

/// Every default, with comments: the `config.toml` at the top of the repository.
pub const DEFAULTS: &str = include_str!("../config.toml");

/// The error for a wrong `server.listen`.
const LISTEN_ALLOWED: &str = "not a socket address; allowed: an IP address and a port, such as \
     127.0.0.1:8000 or [::1]:8000, but no host name";

/// The user's file if `--config` is not given. It need not exist.
const USER_FILE: &str = "config.toml";

/// The prefix of the environment variables that are settings.
const VARIABLE_PREFIX: &str = "TOMBOLA";

/// The variable with the token for the commands that contact a server. It is not a setting.
pub const TOKEN_VARIABLE: &str = "TOMBOLA_TOKEN";

/// The most rows of a lease. A crash can burn them, and each takes 16 bytes of memory.
const LEASE_ROWS_MAX: u64 = 1_000_000;

/// The most numbers in one response, about 20 bytes of JSON each.
const COUNT_LIMIT_MAX: u64 = 1_000_000;

/// The most connections at once. Each is a file descriptor, and Linux lets one process open this many
/// (`fs.nr_open`).
const CONNECTIONS_MAX: u64 = 1_048_576;

/// The longest wait in milliseconds: an hour.
const WAIT_MS_MAX: u64 = 3_600_000;

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
    /// The pools, by name.
    pub pools: Vec<PoolConfig>,
    /// The authentication.
    pub auth: AuthConfig,
    /// The limit on the numbers that each caller may take, if there is one.
    pub quota: Option<QuotaConfig>,
    /// The fleet, if this server is part of one.
    pub fleet: Option<FleetConfig>,
}

/// How numbers are made and stored. Each mode is faster than the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(try_from = "String")]
pub enum Mode {
    /// One thread, one JSON file
    Simple,
    /// The same file; concurrent requests share a write
    Json,
    /// A table with a UNIQUE constraint; concurrent requests share a commit
    Sqlite,
    /// Numbers made ahead of need, in shards
    Sharded,
}

impl Mode {
    /// Returns the mode's name in the settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Simple => "simple",
            Self::Json => "json",
            Self::Sqlite => "sqlite",
            Self::Sharded => "sharded",
        }
    }

    /// Returns the address to listen on if no layer sets one.
    fn listen_default(self) -> &'static str {
        match self {
            Self::Simple => "127.0.0.1:5000",
            Self::Json | Self::Sqlite | Self::Sharded => "127.0.0.1:8000",
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let allowed = Self::value_variants();
        let names: Vec<_> = allowed.iter().map(|mode| mode.as_str()).collect();
        let found = allowed.iter().find(|mode| mode.as_str() == text).copied();
        found.ok_or_else(|| format!("unknown mode; allowed: {}", names.join(", ")))
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The HTTP side.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// How numbers are made and stored.
    pub mode: Mode,
    /// Address and port.
    pub listen: SocketAddr,
    /// The largest `count` of one request.
    pub count_limit: NonZeroU32,
    /// The host names of this server, besides IP addresses and `localhost`.
    pub hosts: Vec<String>,
    /// The most connections at once.
    pub connections: usize,
    /// How long a client may keep the server waiting.
    pub client_timeout: Duration,
    /// How long a stop waits for requests in flight.
    pub drain: Duration,
    /// The files for https, if it is enabled.
    pub tls: Option<TlsConfig>,
}

/// The files for https.
#[derive(Clone, Debug)]
pub struct TlsConfig {
    /// PEM file: the server's certificate, then those that lead to a root.
    pub cert: PathBuf,
    /// PEM file: the key of the first certificate.
    pub key: PathBuf,
}

/// How shards lease rows.
#[derive(Clone, Copy, Debug)]
pub struct LeaseConfig {
    /// Rows leased ahead of need; 0 is strict.
    pub rows: usize,
}

/// When and how shards are refilled.
#[derive(Clone, Copy, Debug)]
pub struct RefillConfig {
    /// Share of the shard size below which the next generation is built, 0 to 1.
    pub low_water: f64,
    /// First wait after a failure.
    pub retry: Duration,
    /// Longest wait after failures in a row.
    pub retry_limit: Duration,
}

impl RefillConfig {
    /// Returns the number of rows below which a shard of this size gets its next generation, at least one.
    #[must_use]
    pub fn low_water_rows(&self, shard_size: u32) -> u64 {
        (self.low_water * f64::from(shard_size)).ceil() as u64
    }
}

/// The flags of every command that works on a data folder.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Location {
    /// Settings file [default: config.toml in the working directory, if it exists]
    #[arg(long = "config", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Data folder [default: shards]
    #[arg(long = "data-dir", value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// The settings that flags set. They override all other layers.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config` and `--data-dir`
    pub location: Location,
    /// `--listen`
    pub listen: Option<String>,
    /// `--mode`
    pub mode: Option<Mode>,
    /// `--refuse-if-stale`
    pub refuse_if_stale: bool,
    /// `--pool`: the only pool in use, to which `shards` and `shard_size` then apply.
    pub pool: Option<String>,
    /// `--shards`
    pub shards: Option<u64>,
    /// `--size`
    pub shard_size: Option<u64>,
}

impl Overrides {
    /// Returns the flag that sets this, if it was given.
    fn flag(&self, path: &[String]) -> Option<&'static str> {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let (set, flag) = match *path {
            ["storage", "dir"] => (self.location.dir.is_some(), "--data-dir"),
            ["server", "listen"] => (self.listen.is_some(), "--listen"),
            ["server", "mode"] => (self.mode.is_some(), "--mode"),
            ["fleet", "refuse_if_stale"] => (self.refuse_if_stale, "--refuse-if-stale"),
            ["pools", pool] => (self.pool.as_deref() == Some(pool), "--pool"),
            ["pools", _, "shards"] => (self.shards.is_some(), "--shards"),
            ["pools", _, "shard_size"] => (self.shard_size.is_some(), "--size"),
            _ => return None,
        };
        set.then_some(flag)
    }
}

impl Config {
    /// Reads all layers and validates the result of merging them.
    ///
    /// # Errors
    /// [`ConfigError`] with the key, the value, where it came from, and what is allowed.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::load_with(overrides, variables()?)
    }

    fn load_with(
        overrides: &Overrides,
        variables: BTreeMap<String, String>,
    ) -> Result<Self, ConfigError> {
        Layers::read(overrides, variables)?.parse(overrides.pool.as_deref())
    }

    /// Loads the settings, and returns with them every setting in effect and its origin.
    ///
    /// # Errors
    /// [`ConfigError`], as [`load`](Self::load) gives it.
    pub fn explain(overrides: &Overrides) -> Result<(Self, Vec<Setting>), ConfigError> {
        let layers = Layers::read(overrides, variables()?)?;
        let config = layers.parse(overrides.pool.as_deref())?;
        let settings = origins::settings(&layers, &config);
        Ok((config, settings))
    }
}

/// The layers, and the result of merging them, which is not validated yet.
struct Layers {
    merged: ::config::Config,
    file: UserFile,
    variables: BTreeMap<String, String>,
    overrides: Overrides,
}

impl Layers {
    fn read(
        overrides: &Overrides,
        variables: BTreeMap<String, String>,
    ) -> Result<Self, ConfigError> {
        let unreadable = |error: ::config::ConfigError| ConfigError::Unreadable(error.to_string());
        let file = UserFile::read(overrides.location.file.as_deref())?;
        let source = variables.iter().map(|(name, text)| (name.clone(), text.clone())).collect();
        let environment = Environment::with_prefix(VARIABLE_PREFIX)
            .prefix_separator("_")
            .separator("__")
            .source(Some(source));
        let builder = ::config::Config::builder()
            .add_source(File::from_str(DEFAULTS, FileFormat::Toml))
            .add_source(file.source())
            .add_source(environment);
        let layers = builder.build_cloned().map_err(unreadable)?;
        let pools = layers.get_table("pools").unwrap_or_default();
        // An invalid mode is refused later, with all other keys.
        let mode = overrides.mode.or_else(|| layers.get("server.mode").ok());
        let listen = mode.unwrap_or(Mode::Sharded).listen_default();
        let merged = builder
            .set_default("server.listen", listen)
            .and_then(|builder| override_by_flags(builder, overrides, pools.keys()))
            .and_then(ConfigBuilder::<DefaultState>::build)
            .map_err(unreadable)?;
        Ok(Self { merged, file, variables, overrides: overrides.clone() })
    }

    fn parse(&self, only: Option<&str>) -> Result<Config, ConfigError> {
        let keys: Keys =
            serde_path_to_error::deserialize(self.merged.clone()).map_err(|error| {
                let key = error.path().to_string();
                let problem = match error.inner() {
                    _ if may_be_secret(&key) => AUTH_ALLOWED.to_owned(),
                    ::config::ConfigError::At { error, .. } => error.to_string(),
                    other => other.to_string(),
                };
                // The error has the key and the origin already.
                let problem = problem.split(" for key `").next().unwrap_or_default().to_owned();
                self.refused(&key, problem)
            })?;
        keys.validate(only, |key, problem| self.refused(key, problem))
    }

    fn refused(&self, key: &str, problem: String) -> ConfigError {
        let secret = may_be_secret(key);
        // The nearest key without an index, which can be looked up.
        let known = key.split_once('[').map_or(key, |(list, _)| list);
        let path: Vec<String> = known.split('.').map(str::to_owned).collect();
        let value = path.iter().try_fold(self.merged.cache.clone(), |value, level| {
            value.into_table().ok()?.remove(level)
        });
        let value = value.filter(|_| !secret && known == key);
        ConfigError::Refused {
            key: key.to_owned(),
            value: value.map(|value| format!(" = {value}")).unwrap_or_default(),
            origin: match self.origin(&path) {
                Origin::Default => String::new(),
                origin => format!(" (in {origin})"),
            },
            problem,
        }
    }

    fn origin(&self, path: &[String]) -> Origin {
        if let Some(flag) = self.overrides.flag(path) {
            return Origin::Flag(flag);
        }
        let wanted = format!("{VARIABLE_PREFIX}_{}", path.join("__"));
        if let Some(name) = self.variables.keys().find(|name| name.eq_ignore_ascii_case(&wanted)) {
            return Origin::Variable(name.clone());
        }
        match origins::line(&self.file.text, path) {
            Some(line) => Origin::File { path: self.file.path.display().to_string(), line },
            None => Origin::Default,
        }
    }
}

/// Returns the environment variables that are settings.
fn variables() -> Result<BTreeMap<String, String>, ConfigError> {
    let named =
        std::env::vars_os().filter_map(|(name, text)| Some((name.into_string().ok()?, text)));
    let ours = |name: &str| {
        let (prefix, rest) = name.split_once('_').unwrap_or_default();
        prefix.eq_ignore_ascii_case(VARIABLE_PREFIX) && !rest.is_empty() && name != TOKEN_VARIABLE
    };
    named
        .filter(|(name, _)| ours(name))
        .map(|(name, text)| match text.into_string() {
            Ok(text) => Ok((name, text)),
            Err(_) => {
                let problem = format!("the environment variable {name} is not UTF-8");
                Err(ConfigError::Unreadable(problem))
            }
        })
        .collect()
}

/// The content of the user's file, or an empty text if there is none.
struct UserFile {
    path: PathBuf,
    text: String,
    required: bool,
}

impl UserFile {
    /// Reads the file and checks that it is TOML, because the errors of the layers' parser name no line.
    fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = path.map_or((Path::new(USER_FILE), false), |path| (path, true));
        let unreadable = |problem: &dyn Display| {
            ConfigError::Unreadable(format!("{}: {problem}", path.display()))
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if !required && error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(unreadable(&error)),
        };
        drop(text.parse::<toml::Table>().map_err(|error| unreadable(&error))?);
        Ok(Self { path: path.to_owned(), text, required })
    }

    fn source(&self) -> File<::config::FileSourceFile, FileFormat> {
        File::new(&self.path.to_string_lossy(), FileFormat::Toml).required(self.required)
    }
}

fn override_by_flags<'a>(
    builder: ConfigBuilder<DefaultState>,
    overrides: &Overrides,
    pools: impl Iterator<Item = &'a String>,
) -> Result<ConfigBuilder<DefaultState>, ::config::ConfigError> {
    let dir = overrides.location.dir.as_ref().map(|dir| dir.to_string_lossy().into_owned());
    let mut builder = builder
        .set_override_option("storage.dir", dir)?
        .set_override_option("server.listen", overrides.listen.clone())?
        .set_override_option("server.mode", overrides.mode.map(Mode::as_str))?
        .set_override_option("fleet.refuse_if_stale", overrides.refuse_if_stale.then_some(true))?;
    for pool in pools {
        if overrides.pool.as_ref().is_none_or(|only| only == pool) {
            builder = builder
                .set_override_option(format!("pools.{pool}.shards"), overrides.shards)?
                .set_override_option(format!("pools.{pool}.shard_size"), overrides.shard_size)?;
        }
    }
    Ok(builder)
}

/// The keys of a settings file.
#[derive(Deserialize)]
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
    fleet: Option<FleetKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerKeys {
    mode: Mode,
    listen: String,
    hosts: Vec<String>,
    count_limit: u64,
    connections: u64,
    client_timeout_ms: u64,
    drain_ms: u64,
    tls: Option<TlsKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsKeys {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StorageKeys {
    #[serde(deserialize_with = "text")]
    dir: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LeaseKeys {
    rows: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefillKeys {
    low_water: f64,
    retry_ms: u64,
    retry_limit_ms: u64,
}

/// Deserializes a text. A number is refused, because `2.10` would become the text `2.1`.
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => Ok(text),
        other => Err(de::Error::custom(format!(
            "a {} instead of a text; allowed: a text in quotes",
            other.type_str()
        ))),
    }
}

impl Keys {
    fn validate(
        self,
        only: Option<&str>,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<Config, ConfigError> {
        let within = |key: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                Ok(value)
            } else {
                Err(refused(key, format!("allowed: {min} to {max}")))
            }
        };
        let wait = |key, value| within(key, value, 1, WAIT_MS_MAX).map(Duration::from_millis);

        let count_limit =
            within("server.count_limit", self.server.count_limit, 1, COUNT_LIMIT_MAX)?;
        let server = ServerConfig {
            mode: self.server.mode,
            listen: self
                .server
                .listen
                .parse()
                .map_err(|_| refused("server.listen", LISTEN_ALLOWED.to_owned()))?,
            hosts: hosts(self.server.hosts, &refused)?,
            count_limit: u32::try_from(count_limit)
                .ok()
                .and_then(NonZeroU32::new)
                .expect("1 to COUNT_LIMIT_MAX was checked above"),
            connections: within("server.connections", self.server.connections, 1, CONNECTIONS_MAX)?
                as usize,
            client_timeout: wait("server.client_timeout_ms", self.server.client_timeout_ms)?,
            drain: wait("server.drain_ms", self.server.drain_ms)?,
            tls: match self.server.tls {
                None | Some(TlsKeys { cert: None, key: None }) => None,
                Some(TlsKeys { cert: Some(cert), key: Some(key) }) => Some(TlsConfig { cert, key }),
                Some(TlsKeys { key: None, .. }) => {
                    let problem = "TLS also needs the certificate's key; set server.tls.key";
                    return Err(refused("server.tls.cert", problem.to_owned()));
                }
                Some(TlsKeys { cert: None, .. }) => {
                    let problem = "TLS also needs the key's certificate; set server.tls.cert";
                    return Err(refused("server.tls.key", problem.to_owned()));
                }
            },
        };
        let rows = within("lease.rows", self.lease.rows, 0, LEASE_ROWS_MAX)?;
        let lease = LeaseConfig { rows: rows as usize };
        if !(self.refill.low_water > 0.0 && self.refill.low_water <= 1.0) {
            return Err(refused("refill.low_water", "allowed: above 0 and up to 1".to_owned()));
        }
        let refill = RefillConfig {
            low_water: self.refill.low_water,
            retry: wait("refill.retry_ms", self.refill.retry_ms)?,
            retry_limit: wait("refill.retry_limit_ms", self.refill.retry_limit_ms)?,
        };
        if refill.retry > refill.retry_limit {
            let limit = self.refill.retry_limit_ms;
            let problem = format!("allowed: up to refill.retry_limit_ms ({limit})");
            return Err(refused("refill.retry_ms", problem));
        }

        let mut pools = Vec::new();
        for (name, keys) in &self.pools {
            let pool = keys.validate(name, (lease, refill), within, &refused)?;
            if keys.enabled && only.is_none_or(|only| only == name) {
                pools.push(pool);
            }
        }
        if pools.is_empty() {
            let names: Vec<_> = self.pools.keys().map(String::as_str).collect();
            let problem =
                format!("no pool is left to serve; the known pools are {}", names.join(", "));
            return Err(refused(&only.map_or("pools".into(), |o| format!("pools.{o}")), problem));
        }
        let auth = self.auth.validate(&refused)?;
        let quota = self.quota.map(|keys| keys.validate(within, &refused)).transpose()?;
        let shards = pools.iter().map(|pool| u64::from(pool.shards)).sum();
        let fleet = self.fleet.map(|keys| keys.validate(lease, shards, within, &refused));
        let fleet = fleet.transpose()?;
        if let Some(fleet) = &fleet {
            pools.iter_mut().for_each(|pool| pool.lease.rows = fleet.lease_rows);
        }
        if fleet.is_some() && server.mode != Mode::Sharded {
            let problem =
                format!("the mode {} does not support fleets; remove [fleet]", server.mode);
            return Err(refused("fleet", problem));
        }
        let dir = self.storage.dir.into();
        Ok(Config { server, dir, pools, auth, quota, fleet })
    }
}

/// Checks the names in `server.hosts`.
fn hosts(
    names: Vec<String>,
    refused: impl Fn(&str, String) -> ConfigError,
) -> Result<Vec<String>, ConfigError> {
    let fits = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
    };
    match names.iter().position(|name| !fits(name)) {
        None => Ok(names),
        Some(index) => {
            let problem =
                format!("{:?} is not a host name; allowed: names without a port", names[index]);
            Err(refused(&format!("server.hosts[{index}]"), problem))
        }
    }
}
