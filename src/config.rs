//! The settings: read once from four layers, validated once, then handed out part by part.
//! Knows nothing of files other than config files, and starts nothing.
//!
//! Lowest to highest: the built-in `config.toml`, the user's file, `TOMBOLA_…` environment
//! variables, flags.

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
            let problem = match error.inner() {
                ::config::ConfigError::At { error, .. } => error.to_string(),
                other => other.to_string(),
            };
            refused(&layers, &error.path().to_string(), problem)
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

fn refused(layers: &::config::Config, key: &str, problem: String) -> ConfigError {
    let found = key
        .split('.')
        .try_fold(layers.cache.clone(), |value, level| value.into_table().ok()?.remove(level));
    let origin = found.as_ref().and_then(::config::Value::origin);
    ConfigError::Refused {
        key: key.to_owned(),
        value: found.as_ref().map(|value| format!(" = {value}")).unwrap_or_default(),
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
        Ok(Config { server, dir: self.storage.dir, lease, refill, pools })
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
