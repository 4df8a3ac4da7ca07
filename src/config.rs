//! The settings: read once from four layers, validated once, then handed out part by part.
//! Knows nothing of files other than config files, and starts nothing.
//!
//! Lowest to highest: the built-in `config.toml`, the user's file, `TOMBOLA_…` environment
//! variables, flags.

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

/// What `server.listen` may be.
const LISTEN_ALLOWED: &str = "no socket address; allowed are an IP address and a port, such as \
     127.0.0.1:8000 or [::1]:8000; a name is not looked up";

/// The user's file when `--config` names none, if it is there.
const USER_FILE: &str = "config.toml";

/// What the name of an environment variable begins with that is a setting.
const VARIABLE_PREFIX: &str = "TOMBOLA";

/// Holds a token for the commands that ask a server. No setting.
pub const TOKEN_VARIABLE: &str = "TOMBOLA_TOKEN";

/// Rows of a lease: what a crash can burn, and 16 bytes of memory each.
const LEASE_ROWS_MAX: u64 = 1_000_000;

/// Numbers in one answer, about 20 bytes of JSON each.
const COUNT_LIMIT_MAX: u64 = 1_000_000;

/// Connections at once, each a file descriptor: what Linux lets one process open (`fs.nr_open`).
const CONNECTIONS_MAX: u64 = 1_048_576;

/// Waits in milliseconds: up to an hour.
const WAIT_MS_MAX: u64 = 3_600_000;

/// Why the settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A layer can't be read or is not TOML.
    #[error("the configuration can't be read: {0}")]
    Unreadable(String),
    /// A key that is not known, or a value that can't be one of that key.
    #[error("{key}{value}{origin}: {problem}")]
    Refused {
        /// The key, with points between levels.
        key: String,
        /// ` = VALUE`, or nothing where the key has none.
        value: String,
        /// ` (in FILE)`, where it is known.
        origin: String,
        /// What is wrong, and what is allowed.
        problem: String,
    },
}

/// All settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// The HTTP side.
    pub server: ServerConfig,
    /// Folder of all that is kept.
    pub dir: PathBuf,
    /// How shards hand out.
    pub lease: LeaseConfig,
    /// When and how shards are filled again.
    pub refill: RefillConfig,
    /// The pools, by name.
    pub pools: Vec<PoolConfig>,
    /// Who may ask.
    pub auth: AuthConfig,
    /// How much each may ask for, where that is limited.
    pub quota: Option<QuotaConfig>,
    /// With whom numbers are shared out, where they are.
    pub fleet: Option<FleetConfig>,
}

/// What hands the numbers out: the rungs of a ladder, each better than the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(try_from = "String")]
pub enum Mode {
    /// One thread, one JSON file
    Simple,
    /// The same file; requests that come together share a write
    Json,
    /// A table with a UNIQUE constraint; requests that come together share a commit
    Sqlite,
    /// Numbers made ahead of need, in shards
    Sharded,
}

impl Mode {
    /// The mode as the settings have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Simple => "simple",
            Self::Json => "json",
            Self::Sqlite => "sqlite",
            Self::Sharded => "sharded",
        }
    }

    /// The lowest of all layers: where to listen when nobody says.
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
        found.ok_or_else(|| format!("no such mode; allowed are {}", names.join(", ")))
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
    /// What hands the numbers out.
    pub mode: Mode,
    /// Address and port.
    pub listen: SocketAddr,
    /// The largest `count` of one request.
    pub count_limit: NonZeroU32,
    /// The most connections at once.
    pub connections: usize,
    /// How long a client may keep the server waiting.
    pub client_timeout: Duration,
    /// How long a stop waits for answers in flight.
    pub drain: Duration,
    /// With what to serve https.
    pub tls: Option<TlsConfig>,
}

/// With what to serve https.
#[derive(Clone, Debug)]
pub struct TlsConfig {
    /// PEM file: the server's certificate, then those that lead to a root.
    pub cert: PathBuf,
    /// PEM file: the key of the first certificate.
    pub key: PathBuf,
}

/// How shards hand out.
#[derive(Clone, Copy, Debug)]
pub struct LeaseConfig {
    /// Rows leased ahead of need; 0 is strict.
    pub rows: usize,
}

/// When and how shards are filled again.
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
    /// Rows below which the next generation of a shard of this size is built: at least one.
    #[must_use]
    pub fn low_water_rows(&self, shard_size: u32) -> u64 {
        (self.low_water * f64::from(shard_size)).ceil() as u64
    }
}

/// The flags of every command that works on a data folder.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Location {
    /// Settings file [default: config.toml in the working directory, if it is there]
    #[arg(long = "config", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Folder of all that is kept [default: shards]
    #[arg(long = "data-dir", value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// What flags set; they override all else.
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
    /// `--pool`: the only pool that `shards` and `shard_size` are for, and the only one in use.
    pub pool: Option<String>,
    /// `--shards`
    pub shards: Option<u64>,
    /// `--size`
    pub shard_size: Option<u64>,
}

impl Overrides {
    /// The flag that sets this, if it was given.
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
    /// Reads all layers and validates what they give together.
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

    /// The same, with every setting in effect and where it comes from.
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

/// What all layers give together, not yet validated, and what they were.
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
            .try_parsing(true)
            .source(Some(source));
        let builder = ::config::Config::builder()
            .add_source(File::from_str(DEFAULTS, FileFormat::Toml))
            .add_source(file.source())
            .add_source(environment);
        let layers = builder.build_cloned().map_err(unreadable)?;
        let pools = layers.get_table("pools").unwrap_or_default();
        // A mode that is none is refused later, with all other keys.
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
                // Key and origin are said already.
                let problem = problem.split(" for key `").next().unwrap_or_default().to_owned();
                self.refused(&key, problem)
            })?;
        keys.validate(only, |key, problem| self.refused(key, problem))
    }

    fn refused(&self, key: &str, problem: String) -> ConfigError {
        let secret = may_be_secret(key);
        // The nearest that has no index, and so can be looked up.
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

/// The environment variables that are settings.
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

/// The user's file as it was read, or empty where there is none.
struct UserFile {
    path: PathBuf,
    text: String,
    required: bool,
}

impl UserFile {
    /// Reads it, with a look whether it is TOML at all: the parser of the layers names no line.
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

/// The keys as they stand in a file.
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
    dir: PathBuf,
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
                Err(refused(key, format!("allowed are {min} to {max}")))
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
                Some(TlsKeys { cert: Some(cert), key: Some(key) }) => {
                    if self.server.mode == Mode::Simple {
                        let problem =
                            "the mode simple has no TLS; choose another mode, or leave it out";
                        return Err(refused("server.tls", problem.to_owned()));
                    }
                    Some(TlsConfig { cert, key })
                }
                Some(TlsKeys { key: None, .. }) => {
                    let problem = "TLS needs the certificate's key too, as server.tls.key";
                    return Err(refused("server.tls.cert", problem.to_owned()));
                }
                Some(TlsKeys { cert: None, .. }) => {
                    let problem = "TLS needs the key's certificate too, as server.tls.cert";
                    return Err(refused("server.tls.key", problem.to_owned()));
                }
            },
        };
        let rows = within("lease.rows", self.lease.rows, 0, LEASE_ROWS_MAX)?;
        let lease = LeaseConfig { rows: rows as usize };
        if !(self.refill.low_water > 0.0 && self.refill.low_water <= 1.0) {
            return Err(refused("refill.low_water", "allowed are above 0 and up to 1".to_owned()));
        }
        let refill = RefillConfig {
            low_water: self.refill.low_water,
            retry: wait("refill.retry_ms", self.refill.retry_ms)?,
            retry_limit: wait("refill.retry_limit_ms", self.refill.retry_limit_ms)?,
        };
        if refill.retry > refill.retry_limit {
            let limit = self.refill.retry_limit_ms;
            let problem = format!("allowed is up to refill.retry_limit_ms ({limit})");
            return Err(refused("refill.retry_ms", problem));
        }

        let mut pools = Vec::new();
        for (name, keys) in &self.pools {
            let pool = keys.validate(name, within, &refused)?;
            if keys.enabled && only.is_none_or(|only| only == name) {
                pools.push(pool);
            }
        }
        if pools.is_empty() {
            let names: Vec<_> = self.pools.keys().map(String::as_str).collect();
            let problem = format!("no pool is left to serve; known are {}", names.join(", "));
            return Err(refused(&only.map_or("pools".into(), |o| format!("pools.{o}")), problem));
        }
        let auth = self.auth.validate(&refused)?;
        let quota = self.quota.map(|keys| keys.validate(within, &refused)).transpose()?;
        let fleet = self.fleet.map(|keys| keys.validate(lease, within, &refused)).transpose()?;
        if fleet.is_some() && server.mode != Mode::Sharded {
            let problem = format!("the mode {} serves alone; leave [fleet] out", server.mode);
            return Err(refused("fleet", problem));
        }
        Ok(Config { server, dir: self.storage.dir, lease, refill, pools, auth, quota, fleet })
    }
}
