//! Finds the origin of each setting in effect. For people: no decision depends on it.

use std::fmt;

use ::config::{Value, ValueKind};
use toml::Table;
use toml::de::DeTable;

use super::{Config, DEFAULTS, Layers};

/// One setting in effect.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The path of its table, such as `pools.int`.
    pub table: String,
    /// Its key in the table.
    pub key: String,
    /// Its value, as TOML.
    pub value: toml::Value,
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

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => formatter.write_str("default"),
            Self::File { path, line } => write!(formatter, "{path}, line {line}"),
            Self::Variable(name) => write!(formatter, "environment {name}"),
            Self::Flag(flag) => formatter.write_str(flag),
        }
    }
}

/// Returns every setting in effect, table by table.
pub(super) fn settings(layers: &Layers, config: &Config) -> Vec<Setting> {
    let mut leaves = Vec::new();
    flatten(&layers.merged.cache, &mut Vec::new(), &mut leaves);
    let defaults = toml::Value::Table(DEFAULTS.parse().expect("a test loads the defaults"));
    let mut settings: Vec<Setting> = leaves
        .into_iter()
        .map(|(path, value)| {
            let origin = layers.origin(&path);
            let value = match (&origin, value) {
                (Origin::Variable(_), toml::Value::String(text)) => typed(text, &path, &defaults),
                (_, value) => value,
            };
            let (key, table) = path.split_last().expect("a setting has a key");
            Setting { table: table.join("."), key: key.clone(), value, origin }
        })
        .collect();
    add_derived(&mut settings, layers, config);
    settings
        .sort_by_key(|setting| (rank(&setting.table), setting.table.clone(), setting.key.clone()));
    settings
}

/// Returns the position of a table, in the order of the built-in file with the pools last.
fn rank(table: &str) -> usize {
    const TABLES: [&str; 9] = [
        "server",
        "server.tls",
        "storage",
        "lease",
        "refill",
        "auth",
        "quota",
        "fleet",
        "fleet.tls",
    ];
    TABLES.iter().position(|known| *known == table).unwrap_or(TABLES.len())
}

/// Adds the settings that are derived from others because they are not set.
fn add_derived(settings: &mut Vec<Setting>, layers: &Layers, config: &Config) {
    let mut derived: Vec<(String, &str, toml::Value)> = Vec::new();
    if let Some(quota) = &config.quota {
        derived.push(("quota".to_owned(), "burst", i64::from(quota.burst.get()).into()));
    }
    if let Some(fleet) = &config.fleet {
        let table = || "fleet".to_owned();
        derived.push((table(), "claim", (fleet.claim as i64).into()));
        derived.push((table(), "lease_rows", (fleet.lease_rows as i64).into()));
        derived.push((table(), "refuse_if_stale", fleet.refuse_if_stale.into()));
    }
    for pool in layers.merged.get_table("pools").unwrap_or_default().keys() {
        let table = format!("pools.{pool}");
        derived.push((table.clone(), "enabled", true.into()));
        derived.push((table.clone(), "decimals", 0.into()));
        derived.push((table.clone(), "shards", "auto".into()));
        // The shard size of a disabled pool is not known.
        if let Some(pool) = config.pools.iter().find(|known| known.name.as_str() == pool) {
            derived.push((table, "shard_size", i64::from(pool.shard_size).into()));
        }
    }
    for (table, key, value) in derived {
        if !settings.iter().any(|setting| setting.table == table && setting.key == key) {
            let origin = Origin::Default;
            settings.push(Setting { table, key: key.to_owned(), value, origin });
        }
    }
}

/// Converts a variable's text to the type of its default, if that is a number or a boolean.
fn typed(text: String, path: &[String], defaults: &toml::Value) -> toml::Value {
    let default = path.iter().try_fold(defaults, |value, level| value.get(level));
    let parsed = default.filter(|default| !default.is_str()).and_then(|_| text.parse().ok());
    parsed.unwrap_or(toml::Value::String(text))
}

/// Collects the settings below a value, with their paths. A list is one setting.
fn flatten(value: &Value, path: &mut Vec<String>, leaves: &mut Vec<(Vec<String>, toml::Value)>) {
    match &value.kind {
        ValueKind::Table(table) => {
            for (key, value) in table {
                path.push(key.clone());
                flatten(value, path, leaves);
                path.pop();
            }
        }
        _ => leaves.extend(toml_value(value).map(|value| (path.clone(), value))),
    }
}

/// Converts a value to TOML, or returns `None` if TOML can't express it, which no layer contains.
fn toml_value(value: &Value) -> Option<toml::Value> {
    Some(match &value.kind {
        ValueKind::Nil => return None,
        ValueKind::Boolean(value) => (*value).into(),
        ValueKind::I64(value) => (*value).into(),
        ValueKind::I128(value) => i64::try_from(*value).ok()?.into(),
        ValueKind::U64(value) => i64::try_from(*value).ok()?.into(),
        ValueKind::U128(value) => i64::try_from(*value).ok()?.into(),
        ValueKind::Float(value) => (*value).into(),
        ValueKind::String(value) => value.clone().into(),
        ValueKind::Table(table) => {
            let pairs = table.iter().filter_map(|(k, v)| Some((k.clone(), toml_value(v)?)));
            toml::Value::Table(pairs.collect::<Table>())
        }
        ValueKind::Array(values) => {
            toml::Value::Array(values.iter().filter_map(toml_value).collect())
        }
    })
}

/// Returns the line, from 1, on which a file sets this, if it does.
pub(super) fn line(text: &str, path: &[String]) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    let (last, parents) = path.split_last()?;
    for level in parents {
        let (_, value) = table.iter().find(|(key, _)| key.get_ref().as_ref() == level)?;
        table = value.get_ref().as_table()?;
    }
    let (key, value) = table.iter().find(|(key, _)| key.get_ref().as_ref() == last)?;
    // A list of tables has a key for each table; its spans are those of the first.
    let start = key.span().start.min(value.span().start);
    Some(text[..start].matches('\n').count() + 1)
}
