//! The settings: read once from four layers, validated once, then handed out part by part.
//! Knows nothing of files other than config files, and starts nothing.
//!
//! Lowest to highest: the built-in `config.toml`, the user's file, `TOMBOLA_…` environment
//! variables, flags.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::config::builder::DefaultState;
use ::config::{ConfigBuilder, Environment, File, FileFormat};
use clap::ValueEnum;
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::space::{Space, SpaceError};

/// Every default, with comments: the `config.toml` at the top of the repository.
pub const DEFAULTS: &str = include_str!("../config.toml");

/// The user's file when `--config` names none, if it is there.
const USER_FILE: &str = "config.toml";

/// Shards of one pool. Each is an open file and a task.
const SHARDS_MAX: u64 = 1024;

/// Numbers in a shard. A build holds its values in memory, 8 bytes each.
const SHARD_SIZE_MAX: u64 = 100_000_000;

/// Numbers in a shard when a pool of one's own does not say.
const SHARD_SIZE_DEFAULT: u64 = 2_500_000;

/// Rows of a lease: what a crash can burn, and 16 bytes of memory each.
const LEASE_ROWS_MAX: u64 = 1_000_000;

/// Numbers in one answer, about 20 bytes of JSON each.
const COUNT_LIMIT_MAX: u64 = 1_000_000;

/// Connections at once, each a file descriptor: what Linux lets one process open (`fs.nr_open`).
const CONNECTIONS_MAX: u64 = 1_048_576;

/// Waits in milliseconds: up to an hour.
const WAIT_MS_MAX: u64 = 3_600_000;

/// Tokens. Each request is compared with all of them, about 20 ns each.
const TOKENS_MAX: usize = 256;

/// Numbers a second of a quota: it is counted in whole nanoseconds a number, so that the fastest is
/// off by less than 0.1 %, and the slowest, one number in a quarter of an hour, far from overflow.
const QUOTA_RATES: std::ops::RangeInclusive<f64> = 0.001..=1_000_000.0;

/// Numbers that a quota lets go at once: as many as the largest answer has.
const BURST_MAX: u64 = COUNT_LIMIT_MAX;

/// What may stand under `auth`. A complaint about these keys says this and nothing of their values:
/// it may be a token that was put where its SHA-256 belongs.
const AUTH_ALLOWED: &str = "allowed are auth.mode = \"none\", or [[auth.tokens]] with name, scope \
     and sha256, as `tombola token new --name NAME --scope draw` prints them";

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

/// Who may ask.
#[derive(Clone, Debug)]
pub enum AuthConfig {
    /// Nothing is said: anyone, which is well on loopback only.
    Unsaid,
    /// Anyone, in so many words.
    Anyone,
    /// Whoever has one of these tokens, of which there is at least one.
    Tokens(Vec<TokenConfig>),
}

/// What is known of a token: enough to recognise it, not enough to use it.
#[derive(Clone, Debug)]
pub struct TokenConfig {
    /// Whose it is, for people.
    pub name: TokenName,
    /// What it is for.
    pub scope: Scope,
    /// The SHA-256 of its text.
    pub sha256: [u8; 32],
}

/// A token's name, fit for a config file and for a log: 1 to 64 of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenName(String);

impl std::str::FromStr for TokenName {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let fit = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let problem = "allowed are 1 to 64 characters of a-z, A-Z, 0-9, '.', '_' and '-'";
        if fit { Ok(Self(name.to_owned())) } else { Err(problem) }
    }
}

impl std::fmt::Display for TokenName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scope {
    /// Taking numbers
    Draw,
    /// Everything else
    Observe,
}

impl Scope {
    /// The scope as the settings have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draw => "draw",
            Self::Observe => "observe",
        }
    }
}

/// How much each caller may take.
#[derive(Clone, Debug)]
pub struct QuotaConfig {
    /// Time in which one number is granted.
    pub period: Duration,
    /// Numbers that may be taken at once after a rest.
    pub burst: NonZeroU32,
    /// Proxies whose word is taken for where a request comes from.
    pub trusted_proxies: Vec<IpNet>,
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

/// One pool.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// The `type` of a request, and the beginning of the file names.
    pub name: PoolName,
    /// The numbers.
    pub space: Space,
    /// How many shards, 1 to 1024.
    pub shards: u16,
    /// Numbers in one filling of a shard.
    pub shard_size: u32,
}

/// A pool's name, fit for a file name and for a URL: 1 to 32 of `a-z 0-9 _`, a letter first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolName(String);

impl PoolName {
    /// The name, when it is fit.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let fit = (1..=32).contains(&name.len())
            && name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            // "int_shard_1" would share file names with a shard of "int".
            && !name.contains("_shard_");
        fit.then(|| Self(name.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for PoolName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
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
    /// `--pool`: the only pool that `shards` and `shard_size` are for, and the only one in use.
    pub pool: Option<String>,
    /// `--shards`
    pub shards: Option<u64>,
    /// `--size`
    pub shard_size: Option<u64>,
}

impl Config {
    /// Reads all layers and validates what they give together.
    ///
    /// # Errors
    /// [`ConfigError`] with the key, the value, where it came from, and what is allowed.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::load_with(overrides, Environment::with_prefix("TOMBOLA"))
    }

    fn load_with(overrides: &Overrides, environment: Environment) -> Result<Self, ConfigError> {
        let unreadable = |error: ::config::ConfigError| ConfigError::Unreadable(error.to_string());
        let builder = ::config::Config::builder()
            .add_source(File::from_str(DEFAULTS, FileFormat::Toml))
            .add_source(user_file(overrides.location.file.as_deref())?)
            .add_source(environment.prefix_separator("_").separator("__").try_parsing(true));
        let layers = builder.build_cloned().map_err(unreadable)?;
        let pools = layers.get_table("pools").unwrap_or_default();
        // A mode that is none is refused below, with all other keys.
        let mode = overrides.mode.or_else(|| layers.get("server.mode").ok());
        let listen = mode.unwrap_or(Mode::Sharded).listen_default();
        let layers = builder
            .set_default("server.listen", listen)
            .and_then(|builder| override_by_flags(builder, overrides, pools.keys()))
            .and_then(ConfigBuilder::<DefaultState>::build)
            .map_err(unreadable)?;

        let keys: Keys = serde_path_to_error::deserialize(layers.clone()).map_err(|error| {
            let key = error.path().to_string();
            let problem = match error.inner() {
                _ if may_be_secret(&key) => AUTH_ALLOWED.to_owned(),
                ::config::ConfigError::At { error, .. } => error.to_string(),
                other => other.to_string(),
            };
            refused(&layers, &key, problem)
        })?;
        keys.validate(overrides.pool.as_deref(), |key, problem| refused(&layers, key, problem))
    }
}

/// The user's file, after a look whether it is TOML at all: the parser below names no line.
fn user_file(
    path: Option<&Path>,
) -> Result<File<::config::FileSourceFile, FileFormat>, ConfigError> {
    let (path, required) = path.map_or((Path::new(USER_FILE), false), |path| (path, true));
    let unreadable =
        |problem: &dyn Display| ConfigError::Unreadable(format!("{}: {problem}", path.display()));
    match std::fs::read_to_string(path) {
        Ok(text) => drop(text.parse::<toml::Table>().map_err(|error| unreadable(&error))?),
        Err(error) if !required && error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(unreadable(&error)),
    }
    Ok(File::new(&path.to_string_lossy(), FileFormat::Toml).required(required))
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
        .set_override_option("server.mode", overrides.mode.map(Mode::as_str))?;
    for pool in pools {
        if overrides.pool.as_ref().is_none_or(|only| only == pool) {
            builder = builder
                .set_override_option(format!("pools.{pool}.shards"), overrides.shards)?
                .set_override_option(format!("pools.{pool}.shard_size"), overrides.shard_size)?;
        }
    }
    Ok(builder)
}

/// Whether what stands at a key must not be repeated.
fn may_be_secret(key: &str) -> bool {
    key.starts_with("auth") && key != "auth.mode"
}

fn refused(layers: &::config::Config, key: &str, problem: String) -> ConfigError {
    let secret = may_be_secret(key);
    // The nearest that has no index, and so can be looked up.
    let known = key.split_once('[').map_or(key, |(list, _)| list);
    let found = known
        .split('.')
        .try_fold(layers.cache.clone(), |value, level| value.into_table().ok()?.remove(level));
    let origin = found.as_ref().and_then(::config::Value::origin);
    ConfigError::Refused {
        key: key.to_owned(),
        value: found
            .as_ref()
            .filter(|_| !secret && known == key)
            .map(|value| format!(" = {value}"))
            .unwrap_or_default(),
        origin: origin.map(|origin| format!(" (in {origin})")).unwrap_or_default(),
        problem,
    }
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerKeys {
    mode: Mode,
    listen: SocketAddr,
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

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct AuthKeys {
    mode: Option<String>,
    #[serde(default)]
    tokens: Vec<TokenKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenKeys {
    name: String,
    scope: String,
    sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuotaKeys {
    numbers_per_second: f64,
    burst: Option<u64>,
    #[serde(default)]
    trusted_proxies: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolKeys {
    #[serde(default = "enabled_by_default")]
    enabled: bool,
    min: NumberText,
    max: NumberText,
    #[serde(default)]
    decimals: u8,
    #[serde(default)]
    shards: ShardCount,
    shard_size: Option<u64>,
}

fn enabled_by_default() -> bool {
    true
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
            listen: self.server.listen,
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
        Ok(Config { server, dir: self.storage.dir, lease, refill, pools, auth, quota })
    }
}

impl AuthKeys {
    fn validate(
        self,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<AuthConfig, ConfigError> {
        let refused = |key: &str, problem: &str| Err(refused(key, problem.to_owned()));
        match self.mode.as_deref() {
            Some("none") if self.tokens.is_empty() => return Ok(AuthConfig::Anyone),
            Some("none") => {
                return refused("auth.mode", "there are tokens too: take either of them out");
            }
            Some(_) => {
                return refused("auth.mode", "allowed is \"none\"; leave it out to use tokens");
            }
            None if self.tokens.is_empty() => return Ok(AuthConfig::Unsaid),
            None if self.tokens.len() > TOKENS_MAX => {
                return refused("auth.tokens", &format!("allowed are up to {TOKENS_MAX}"));
            }
            None => {}
        }
        let mut tokens: Vec<TokenConfig> = Vec::with_capacity(self.tokens.len());
        for (index, TokenKeys { name, scope, sha256 }) in self.tokens.into_iter().enumerate() {
            let key = |field: &str| format!("auth.tokens[{index}].{field}");
            let name: TokenName = match name.parse() {
                Ok(name) => name,
                Err(problem) => return refused(&key("name"), problem),
            };
            if tokens.iter().any(|other| other.name == name) {
                let problem = format!("another token is called {name}; each has its own name");
                return refused(&key("name"), &problem);
            }
            let scopes = Scope::value_variants();
            let Some(&scope) = scopes.iter().find(|known| known.as_str() == scope) else {
                return refused(&key("scope"), "allowed are \"draw\" and \"observe\"");
            };
            let mut digest = [0; 32];
            if hex::decode_to_slice(&sha256, &mut digest).is_err() {
                let problem = "allowed are 64 hexadecimal digits, the SHA-256 of the token and not \
                               the token itself, as `tombola token new` prints it";
                return refused(&key("sha256"), problem);
            }
            let same = |other: &&TokenConfig| other.sha256 == digest && other.scope == scope;
            if let Some(other) = tokens.iter().find(same) {
                let problem = format!(
                    "it is the token {} once more; a second entry of the same token is for the \
                     other scope",
                    other.name
                );
                return refused(&key("sha256"), &problem);
            }
            tokens.push(TokenConfig { name, scope, sha256: digest });
        }
        Ok(AuthConfig::Tokens(tokens))
    }
}

impl QuotaKeys {
    fn validate(
        self,
        within: impl Fn(&str, u64, u64, u64) -> Result<u64, ConfigError>,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<QuotaConfig, ConfigError> {
        let rate = self.numbers_per_second;
        if !QUOTA_RATES.contains(&rate) {
            let (min, max) = (QUOTA_RATES.start(), QUOTA_RATES.end());
            let problem = format!("allowed are {min} to {max}; without [quota] nothing is limited");
            return Err(refused("quota.numbers_per_second", problem));
        }
        let burst = match self.burst {
            Some(burst) => within("quota.burst", burst, 1, BURST_MAX)?,
            // What a second grants.
            None => rate.ceil() as u64,
        };
        let proxies = self.trusted_proxies.iter().enumerate().map(|(index, text)| {
            let address = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse::<IpNet>().or_else(|_| address()).map_err(|_| {
                let problem = format!(
                    "{text:?} is none; allowed are addresses and networks, such as \"10.0.0.1\", \
                     \"10.0.0.0/8\" and \"2001:db8::/32\""
                );
                refused(&format!("quota.trusted_proxies[{index}]"), problem)
            })
        });
        Ok(QuotaConfig {
            period: Duration::from_secs_f64(1.0 / rate),
            burst: u32::try_from(burst)
                .ok()
                .and_then(NonZeroU32::new)
                .expect("1 to BURST_MAX was checked above"),
            trusted_proxies: proxies.collect::<Result<_, _>>()?,
        })
    }
}

impl PoolKeys {
    fn validate(
        &self,
        name: &str,
        within: impl Fn(&str, u64, u64, u64) -> Result<u64, ConfigError>,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<PoolConfig, ConfigError> {
        let key = |field: &str| format!("pools.{name}.{field}");
        let pool_name = PoolName::new(name).ok_or_else(|| {
            let problem = "not fit for a file name: allowed are 1 to 32 characters of a-z, 0-9 \
                           and _, beginning with a letter and without \"_shard_\"";
            refused(&format!("pools.{name}"), problem.to_owned())
        })?;
        let space = Space::new(&self.min.0, &self.max.0, self.decimals).map_err(|error| {
            let field = match &error {
                SpaceError::Decimals(_) => "decimals",
                SpaceError::NotANumber(text)
                | SpaceError::TooManyDecimals { text, .. }
                | SpaceError::TooLarge { text, .. }
                    if *text == self.max.0 =>
                {
                    "max"
                }
                _ => "min",
            };
            let problem = format!(
                "{error}; allowed is min up to max, integers up to 2^53-1, or up to 15 significant \
                 digits with 1 to 14 decimals"
            );
            refused(&key(field), problem)
        })?;

        let shards = match self.shards {
            ShardCount::Auto => (num_cpus::get() as u64 / 2).max(2),
            ShardCount::Exactly(shards) if (1..=SHARDS_MAX).contains(&shards) => shards,
            ShardCount::Exactly(_) => {
                let problem = format!("allowed are \"auto\" and 1 to {SHARDS_MAX}");
                return Err(refused(&key("shards"), problem));
            }
        };
        let default_size = space.size().div_ceil(shards).min(SHARD_SIZE_DEFAULT);
        let size_max = space.size().min(SHARD_SIZE_MAX);
        let size = self.shard_size.unwrap_or(default_size);
        if size > space.size() {
            let problem = format!(
                "a shard of {size} is larger than the range of {} numbers; allowed are 1 to {size_max}",
                space.size()
            );
            return Err(refused(&key("shard_size"), problem));
        }
        let size = within(&key("shard_size"), size, 1, size_max)?;
        Ok(PoolConfig {
            name: pool_name,
            space,
            shards: u16::try_from(shards).expect("up to SHARDS_MAX was checked above"),
            shard_size: u32::try_from(size).expect("up to SHARD_SIZE_MAX was checked above"),
        })
    }
}

/// `shards = "auto"` or a number.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(from = "NumberText")]
enum ShardCount {
    #[default]
    Auto,
    Exactly(u64),
}

impl From<NumberText> for ShardCount {
    fn from(text: NumberText) -> Self {
        // Anything that is neither becomes 0, which is refused with what is allowed.
        if text.0 == "auto" { Self::Auto } else { Self::Exactly(text.0.parse().unwrap_or(0)) }
    }
}

/// A number's text, whether a file wrote it as an integer, a float or a string. A TOML float comes
/// as a double, whose shortest text is what was written when that has up to 15 digits.
struct NumberText(String);

impl<'de> Deserialize<'de> for NumberText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyNumber;

        impl Visitor<'_> for AnyNumber {
            type Value = NumberText;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a number")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<NumberText, E> {
                Ok(NumberText(number.to_string()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<NumberText, E> {
                Ok(NumberText(number.to_string()))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<NumberText, E> {
                Ok(NumberText(number.to_string()))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<NumberText, E> {
                Ok(NumberText(text.to_owned()))
            }
        }

        deserializer.deserialize_any(AnyNumber)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loads with this text as the user's file and these environment variables.
    fn load(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mine.toml");
        std::fs::write(&file, text).unwrap();
        let source = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let environment = Environment::with_prefix("TOMBOLA").source(Some(source));
        let location = Location { file: Some(file), dir: None };
        let overrides = Overrides { location, ..Overrides::default() };
        Config::load_with(&overrides, environment).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_hold_ten_million_numbers_on_two_cores() {
        let config = load("", &[]).unwrap();
        assert_eq!(config.server.listen.to_string(), "127.0.0.1:8000");
        assert_eq!(config.server.count_limit.get(), 10_000);
        assert_eq!(config.dir, Path::new("shards"));
        assert_eq!(config.lease.rows, 1024);
        let pools: Vec<_> = config
            .pools
            .iter()
            .map(|pool| (pool.name.as_str(), pool.space, pool.shard_size))
            .collect();
        let int = Space::new("0", "9007199254740991", 0).unwrap();
        let float = Space::new("0", "9999.999999", 6).unwrap();
        assert_eq!(pools, [("float", float, 2_500_000), ("int", int, 2_500_000)]);
        assert!(
            config
                .pools
                .iter()
                .all(|pool| usize::from(pool.shards) == (num_cpus::get() / 2).max(2))
        );
    }

    #[test]
    fn refusals_name_the_key_the_value_and_what_is_allowed() {
        let check = |text: &str, expected: [&str; 3]| {
            let error = load(text, &[]).expect_err(text);
            for part in expected {
                assert!(error.contains(part), "{text}\ngave {error:?}\nwithout {part:?}");
            }
        };
        check("[server]\nlistne = 'x'", ["server.listne", "x", "listen"]);
        check("[sever]\nlisten = 'x'", ["sever", "x", "server"]);
        check("[server]\nlisten = 'x'", ["server.listen", "x", "socket address"]);
        check("[server]\nmode = 'jsn'", ["server.mode", "jsn", "simple"]);
        check("[server]\ncount_limit = 0", ["server.count_limit", "0", "1 to 1000000"]);
        check("[server]\nconnections = 0", ["server.connections", "0", "1 to 1048576"]);
        check("[server]\nclient_timeout_ms = 0", ["server.client_timeout_ms", "0", "1 to 3600000"]);
        check("[server.tls]\ncert = 'c.pem'", ["server.tls.cert", "c.pem", "server.tls.key"]);
        check("[server.tls]\nkey = 'k.pem'", ["server.tls.key", "k.pem", "server.tls.cert"]);
        check("[server.tls]\ncrt = 'c.pem'", ["server.tls.crt", "c.pem", "cert"]);
        check(
            "[server]\nmode = 'simple'\n[server.tls]\ncert = 'c.pem'\nkey = 'k.pem'",
            ["server.tls", "simple", "another mode"],
        );
        check("[lease]\nrows = -1", ["lease.rows", "-1", "unsigned"]);
        check("[lease]\nrows = 'many'", ["lease.rows", "many", "integer"]);
        check("[refill]\nlow_water = 1.5", ["refill.low_water", "1.5", "up to 1"]);
        check("[refill]\nretry_ms = 60000", ["refill.retry_ms", "60000", "retry_limit_ms"]);
        check(
            "[pools.int]\nmin = 6\nmax = 5",
            ["pools.int.min = 6", "above max 5", "min up to max"],
        );
        check("[pools.int]\nshards = 0", ["pools.int.shards", "0", "1 to 1024"]);
        check("[pools.int]\nshards = 'some'", ["pools.int.shards", "some", "1 to 1024"]);
        check("[pools.int]\nmax = 1000", ["pools.int.shard_size", "2500000", "1 to 1001"]);
        check(
            "[pools.int]\nmax = 9007199254740992",
            ["pools.int.max", "9007199254740992", "2^53-1"],
        );
        check(
            "[pools.float]\nmax = 1234567890.0",
            ["pools.float.max", "1234567890", "15 significant"],
        );
        check("[pools.float]\nmax = 0.1234567", ["pools.float.max", "0.1234567", "6 digits"]);
        check("[pools.float]\ndecimals = 15", ["pools.float.decimals", "15", "14"]);
        check("[pools.'../x']\nmin = 1\nmax = 2", ["pools.../x", "file name", "a-z"]);
        check("[pools.Ticket]\nmin = 1\nmax = 2", ["pools.Ticket", "file name", "a-z"]);
        check("[pools.ticket]\nmin = 1", ["pools.ticket", "max", "missing"]);
        check(
            "[pools.int]\nenabled = false\n[pools.float]\nenabled = false",
            ["pools", "no pool", "float, int"],
        );
    }

    #[test]
    fn a_pool_of_ones_own_needs_only_its_range() {
        let config = load("[pools.ticket]\nmin = 1\nmax = 1000\nshards = 3", &[]).unwrap();
        let ticket = config.pools.iter().find(|pool| pool.name.as_str() == "ticket").unwrap();
        assert_eq!((ticket.shards, ticket.shard_size, ticket.space.decimals()), (3, 334, 0));
    }

    /// Story: the mode's port was set after the user's file, and overrode it.
    #[test]
    fn a_mode_listens_on_its_own_port_unless_the_user_says_otherwise() {
        let listens = |text: &str, variables: &[(&str, &str)], expected: &str| {
            let config = load(text, variables).unwrap();
            assert_eq!(config.server.listen.to_string(), expected, "{text} {variables:?}");
        };
        listens("", &[], "127.0.0.1:8000");
        listens("[server]\nmode = 'simple'", &[], "127.0.0.1:5000");
        listens("[server]\nmode = 'json'", &[], "127.0.0.1:8000");
        listens("", &[("TOMBOLA_SERVER__MODE", "simple")], "127.0.0.1:5000");
        listens("[server]\nmode = 'simple'\nlisten = '[::1]:1'", &[], "[::1]:1");
        let address = ("TOMBOLA_SERVER__LISTEN", "127.0.0.1:2");
        listens("[server]\nmode = 'simple'", &[address], "127.0.0.1:2");

        let flag = Overrides { mode: Some(Mode::Simple), ..Overrides::default() };
        let environment = Environment::with_prefix("TOMBOLA").source(Some(Default::default()));
        let config = Config::load_with(&flag, environment).unwrap();
        assert_eq!(config.server.mode, Mode::Simple);
        assert_eq!(config.server.listen.port(), 5000);
    }

    const ENTRY: &str = "[[auth.tokens]]\nname = 'shop'\nscope = 'draw'\nsha256 = ";

    #[test]
    fn an_entry_says_whose_token_it_is_and_what_for() {
        let digits = "0123456789abcdef".repeat(4);
        let auth = load(&format!("{ENTRY}'{digits}'"), &[]).unwrap().auth;
        let AuthConfig::Tokens(tokens) = auth else { panic!("{auth:?}") };
        assert_eq!((tokens[0].name.to_string().as_str(), tokens[0].scope), ("shop", Scope::Draw));
        assert_eq!(hex::encode(tokens[0].sha256), digits);
        assert!(matches!(load("", &[]).unwrap().auth, AuthConfig::Unsaid));
        assert!(matches!(load("auth.mode = 'none'", &[]).unwrap().auth, AuthConfig::Anyone));
        let variable = ("TOMBOLA_AUTH__MODE", "none");
        assert!(matches!(load("", &[variable]).unwrap().auth, AuthConfig::Anyone));
    }

    #[test]
    fn entries_that_can_t_be_used_are_refused() {
        let digits = "0123456789abcdef".repeat(4);
        let entry = format!("{ENTRY}'{digits}'\n");
        let check = |text: &str, parts: &[&str]| {
            let error = load(text, &[]).expect_err(text);
            for part in parts {
                assert!(error.contains(part), "{text}\ngave {error:?}\nwithout {part:?}");
            }
            assert!(!error.contains(&digits[1..]), "{error}");
        };
        check("auth.mode = 'all'", &["auth.mode = all", "mine.toml", "\"none\""]);
        check(&format!("auth.mode = 'none'\n{entry}"), &["auth.mode", "tokens too"]);
        check(&format!("{entry}{entry}"), &["auth.tokens[1].name", "mine.toml", "shop"]);
        let second = entry.replace("shop", "web");
        check(&format!("{entry}{second}"), &["auth.tokens[1].sha256", "the token shop once more"]);
        check(&entry.replace("shop", "the shop"), &["auth.tokens[0].name", "a-z"]);
        check(&entry.replace("draw", "all"), &["auth.tokens[0].scope", "\"draw\"", "\"observe\""]);
        check(&entry.replace("01", ""), &["auth.tokens[0].sha256", "64 hexadecimal"]);
        check(&entry.replace("01", "xy"), &["auth.tokens[0].sha256", "64 hexadecimal"]);
        check(&format!("{entry}{}", "colour = 'red'"), &["auth.tokens[0]", "name, scope"]);
        check("[[auth.tokens]]\nname = 'a'", &["auth.tokens[0]", "name, scope", "sha256"]);
        let many: String =
            (0..=TOKENS_MAX).map(|n| entry.replace("shop", &n.to_string())).collect();
        check(&many, &["auth.tokens", "256"]);
        let variable = ("TOMBOLA_AUTH__TOKENS", "tombola_secret");
        let error = load("", &[variable]).unwrap_err();
        assert!(error.contains("auth.tokens") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn a_quota_is_off_until_it_has_a_rate() {
        let quota = |text: &str| load(&format!("[quota]\n{text}"), &[]).map(|c| c.quota.unwrap());
        assert!(load("", &[]).unwrap().quota.is_none());
        for (text, period, burst) in [
            ("numbers_per_second = 100", Duration::from_millis(10), 100),
            ("numbers_per_second = 2.5", Duration::from_millis(400), 3),
            ("numbers_per_second = 0.001\nburst = 7", Duration::from_secs(1_000), 7),
            ("numbers_per_second = 1_000_000", Duration::from_micros(1), 1_000_000),
        ] {
            let quota = quota(text).unwrap();
            assert_eq!((quota.period, quota.burst.get()), (period, burst), "{text}");
        }
        let proxies = "numbers_per_second = 1\ntrusted_proxies = ['10.0.0.1', '2001:db8::/32']";
        let proxies = quota(proxies).unwrap().trusted_proxies;
        let expected: [IpNet; 2] = ["10.0.0.1/32", "2001:db8::/32"].map(|n| n.parse().unwrap());
        assert_eq!(proxies, expected);

        for (text, parts) in [
            ("burst = 5", ["quota", "numbers_per_second"]),
            ("numbers_per_second = 0", ["quota.numbers_per_second = 0", "0.001 to 1000000"]),
            ("numbers_per_second = -1", ["quota.numbers_per_second = -1", "0.001"]),
            ("numbers_per_second = nan", ["quota.numbers_per_second", "0.001"]),
            ("numbers_per_second = 'fast'", ["quota.numbers_per_second = fast", "float"]),
            ("numbers_per_second = 1\nburst = 0", ["quota.burst = 0", "1 to 1000000"]),
            ("numbers_per_second = 1\nbrust = 5", ["quota.brust", "burst"]),
            (
                "numbers_per_second = 1\ntrusted_proxies = ['10.0.0.1', 'proxy']",
                ["quota.trusted_proxies[1] (in ", "\"proxy\" is none"],
            ),
        ] {
            let error = quota(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{text}\ngave {error:?}\nwithout {part:?}");
            }
        }
    }

    #[test]
    fn variables_override_the_file_and_keep_every_digit() {
        let file = "[pools.float]\nmax = 1.5\nshard_size = 10";
        let config = load(file, &[("TOMBOLA_POOLS__FLOAT__MAX", "99999.999999")]).unwrap();
        let float = &config.pools[0];
        assert_eq!(float.space.number(float.space.max()).as_str(), "99999.999999");
        let error = load("", &[("TOMBOLA_SERVER__PORT", "1")]).unwrap_err();
        assert!(error.contains("server.port") && error.contains("environment"), "{error}");
    }
}
