//! The layers of settings: merges them, and records the origin of each value. Knows nothing of what the
//! settings mean.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::auth::{AUTH_ALLOWED, may_be_secret};
use super::{ConfigError, DEFAULTS, Mode, RefusedKey, TOKEN_VARIABLE};

/// The user's file if `--config` is not given. It need not exist.
const USER_FILE: &str = "config.toml";

/// The prefix of the environment variables that are settings.
const VARIABLE_PREFIX: &str = "TOMBOLA_";

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

/// One setting in effect.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The path of its table, such as `pools.int`.
    pub table: String,
    /// Its key in the table.
    pub key: String,
    /// Its value, as TOML.
    pub value: Value,
    /// The layer that sets it.
    pub origin: Origin,
}

/// The layer that a setting comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The defaults.
    Default,
    /// The user's file.
    File {
        /// The path, as it was given.
        path: String,
        /// The line of its key, from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(String),
    /// A flag.
    Flag(&'static str),
}

impl Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => formatter.write_str("default"),
            Self::File { path, line } => write!(formatter, "{path}, line {line}"),
            Self::Variable(name) => write!(formatter, "environment {name}"),
            Self::Flag(flag) => formatter.write_str(flag),
        }
    }
}

/// The merged layers, which are not validated yet.
pub(super) struct Layers {
    root: Value,
    /// The origins of all tables, keys and elements of lists that are not defaults, by path.
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    pub(super) fn read(
        overrides: &Overrides,
        variables: BTreeMap<String, String>,
    ) -> Result<Self, ConfigError> {
        let root = Value::Table(DEFAULTS.parse().expect("a test loads the defaults"));
        let mut layers = Self { root, origins: BTreeMap::new() };
        layers.add_file(overrides.location.file.as_deref())?;
        for (name, text) in variables {
            let key = name[VARIABLE_PREFIX.len()..].to_lowercase().replace("__", ".");
            layers.add_text(key, text, Origin::Variable(name));
        }
        layers.add_flags(overrides);
        Ok(layers)
    }

    /// Adds the user's file, if there is one.
    fn add_file(&mut self, path: Option<&Path>) -> Result<(), ConfigError> {
        let (path, required) = path.map_or((Path::new(USER_FILE), false), |path| (path, true));
        let unreadable = |problem: &dyn Display| {
            ConfigError::Unreadable(format!("{}: {problem}", path.display()))
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if !required && error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(unreadable(&error)),
        };
        let not_toml = |error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let number = text[..start].matches('\n').count();
            let line = text.lines().nth(number).unwrap_or_default().trim();
            // The line may contain the address of a store, a token or a password.
            let shown =
                match ["://", "token", "sha256", "password"].iter().any(|word| line.contains(word))
                {
                    true => String::new(),
                    false => format!("{line}: "),
                };
            unreadable(&format!("line {}: {shown}{}", number + 1, error.message()))
        };
        let table = text.parse().map_err(not_toml)?;
        merge(&mut self.root, Value::Table(table));

        let spans = DeTable::parse(&text).map_err(not_toml)?;
        let spans = DeValue::Table(spans.into_inner());
        let mut found = children("", &spans);
        while let Some((key, start, value)) = found.pop() {
            found.extend(children(&key, value));
            let line = text[..start].matches('\n').count() + 1;
            self.origins.insert(key, Origin::File { path: path.display().to_string(), line });
        }
        Ok(())
    }

    fn add_flags(&mut self, flags: &Overrides) {
        let pools = self.root.get("pools").and_then(Value::as_table);
        let mut pools: Vec<String> = pools.into_iter().flat_map(Table::keys).cloned().collect();
        if let Some(only) = &flags.pool {
            self.origins.insert(format!("pools.{only}"), Origin::Flag("--pool"));
            pools.retain(|pool| pool == only);
        }
        let mut add = |key: &str, text: Option<String>, flag| {
            if let Some(text) = text {
                self.add_text(key.to_owned(), text, Origin::Flag(flag));
            }
        };
        let dir = flags.location.dir.as_ref().map(|dir| dir.to_string_lossy().into_owned());
        add("storage.dir", dir, "--data-dir");
        add("server.listen", flags.listen.clone(), "--listen");
        add("server.mode", flags.mode.map(|mode| mode.to_string()), "--mode");
        let refuse = flags.refuse_if_stale.then(|| "true".to_owned());
        add("fleet.refuse_if_stale", refuse, "--refuse-if-stale");
        for pool in pools {
            let text = |number: Option<u64>| number.map(|number| number.to_string());
            add(&format!("pools.{pool}.shards"), text(flags.shards), "--shards");
            add(&format!("pools.{pool}.shard_size"), text(flags.shard_size), "--size");
        }
    }

    /// Sets a key, and creates the tables that lead to it.
    fn add_text(&mut self, key: String, text: String, origin: Origin) {
        let nested = key.rsplit('.').fold(Value::String(text), |value, level| {
            Value::Table(Table::from_iter([(level.to_owned(), value)]))
        });
        merge(&mut self.root, nested);
        for (end, _) in key.match_indices('.') {
            self.origins.entry(key[..end].to_owned()).or_insert_with(|| origin.clone());
        }
        self.origins.insert(key, origin);
    }

    /// Deserializes the keys.
    pub(super) fn parse<K: DeserializeOwned>(&self) -> Result<K, ConfigError> {
        serde_path_to_error::deserialize(self.root.clone()).map_err(|error| {
            let key = error.path().to_string();
            let problem = match may_be_secret(&key) {
                true => AUTH_ALLOWED,
                false => error.inner().message(),
            };
            self.refused(&RefusedKey::new(&*key, problem))
        })
    }

    /// Adds the value and the origin of the key to a refusal.
    pub(super) fn refused(&self, RefusedKey { key, problem }: &RefusedKey) -> ConfigError {
        let value = key.split('.').try_fold(&self.root, |value, level| value.get(level));
        let value = match value {
            None | Some(Value::Table(_)) => String::new(),
            Some(_) if is_private(key) => String::new(),
            Some(Value::String(text)) => format!(" = {text}"),
            Some(value) => format!(" = {value}"),
        };
        let origin = match self.origin(key) {
            Origin::Default => String::new(),
            origin => format!(" (in {origin})"),
        };
        ConfigError::Refused { key: key.clone(), value, origin, problem: problem.clone() }
    }

    fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Returns every setting of the keys with its origin, table by table. A list is one setting.
    pub(super) fn explain(&self, keys: &impl Serialize) -> Vec<Setting> {
        let root = Table::try_from(keys).expect("keys that came from TOML can be written as TOML");
        let (mut settings, mut tables) = (Vec::new(), vec![(String::new(), root)]);
        while let Some((table, keys)) = tables.pop() {
            for (key, value) in keys {
                let path = join(&table, &key);
                match value {
                    Value::Table(inner) => tables.push((path, inner)),
                    value => {
                        let origin = self.origin(&path);
                        settings.push(Setting { table: table.clone(), key, value, origin });
                    }
                }
            }
        }
        settings.sort_by_key(|setting| {
            (rank(&setting.table), setting.table.clone(), setting.key.clone())
        });
        settings
    }
}

/// Merges a value into another: tables key by key, while any other value replaces the one before.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Table(into), Value::Table(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Table(Table::new())), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// Returns the path, the position in the file, and the value of each key of a table or element of a list.
fn children<'v>(path: &str, value: &'v DeValue<'_>) -> Vec<(String, usize, &'v DeValue<'v>)> {
    match value {
        DeValue::Table(table) => table
            .iter()
            .map(|(key, value)| {
                // A list of tables has a key for each table; its spans are those of the first.
                let start = key.span().start.min(value.span().start);
                (join(path, key.get_ref()), start, value.get_ref())
            })
            .collect(),
        DeValue::Array(elements) => elements
            .iter()
            .enumerate()
            .map(|(index, value)| (format!("{path}[{index}]"), value.span().start, value.get_ref()))
            .collect(),
        _ => Vec::new(),
    }
}

fn join(table: &str, key: &str) -> String {
    if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
}

/// Returns the position of a table, in the order of the built-in file with the pools last.
fn rank(table: &str) -> usize {
    const TABLES: [&str; 11] = [
        "server",
        "server.tls",
        "storage",
        "lease",
        "refill",
        "auth",
        "quota",
        "receipts",
        "receipts.tls",
        "fleet",
        "fleet.tls",
    ];
    TABLES.iter().position(|known| *known == table).unwrap_or(TABLES.len())
}

/// Returns whether the value of a key, known or not, may contain a password or a token.
fn is_private(key: &str) -> bool {
    let name = key.rsplit('.').next().unwrap_or(key).to_lowercase();
    // The address of a store may contain a password.
    may_be_secret(key)
        || matches!(key, "fleet.store" | "receipts.store")
        || (name != "password_file"
            && ["password", "token", "secret"].iter().any(|word| name.contains(word)))
}

/// Returns the environment variables that are settings.
pub(super) fn variables() -> Result<BTreeMap<String, String>, ConfigError> {
    let ours = |name: &str| {
        let prefix = name.get(..VARIABLE_PREFIX.len()).unwrap_or_default();
        prefix.eq_ignore_ascii_case(VARIABLE_PREFIX)
            && name.len() > VARIABLE_PREFIX.len()
            && !name.eq_ignore_ascii_case(TOKEN_VARIABLE)
    };
    std::env::vars_os()
        .filter_map(|(name, text)| Some((name.into_string().ok()?, text)))
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
