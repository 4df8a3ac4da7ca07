//! `tombola check-config`: prints the settings that a server would use, and where each comes from. Opens no
//! data folder.

use std::io::{self, Write};

use anyhow::anyhow;

use super::serve;
use crate::config::{AuthConfig, Config, Origin, Setting};
use crate::server;
use crate::telemetry::{self, LogFormat};

/// The column of the comments, unless a value is longer.
const COMMENT_COLUMN: usize = 34;

pub(super) fn run(settings: serve::Settings) -> anyhow::Result<()> {
    telemetry::init(LogFormat::Text);
    let (config, settings) = Config::explain(&settings.overrides())?;
    server::check(&config)?;
    print(&config, &settings).map_err(|error| anyhow!("can't print the settings: {error}"))
}

fn print(config: &Config, settings: &[Setting]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "# The settings of tombola {} here, and where each value comes from.",
        env!("CARGO_PKG_VERSION")
    )?;
    let mut table = "";
    for setting in settings {
        if let Some(entries) = tables(&setting.value) {
            for entry in entries {
                writeln!(out, "\n[[{}.{}]]  # {}", setting.table, setting.key, setting.origin)?;
                write!(out, "{entry}")?;
            }
            continue;
        }
        if setting.table != table {
            table = &setting.table;
            writeln!(out, "\n[{table}]")?;
        }
        let line = format!("{} = {}", setting.key, setting.value);
        let note = note(config, setting);
        writeln!(out, "{line:<COMMENT_COLUMN$}# {}{note}", setting.origin)?;
    }
    if let AuthConfig::Unsaid = config.auth {
        writeln!(out, "\n# No authentication: any process on this machine may send requests.")?;
    }
    if config.quota.is_none() {
        writeln!(out, "# No quota: nothing is limited.")?;
    }
    out.flush()
}

/// Returns an addition to the comment, if the value needs an explanation.
fn note(config: &Config, setting: &Setting) -> String {
    let name = setting.table.strip_prefix("pools.").unwrap_or_default();
    let pool = config.pools.iter().find(|pool| pool.name.as_str() == name);
    match (&*setting.key, setting.value.as_str(), pool) {
        ("shards", Some("auto"), Some(pool)) => format!(", {} on this machine", pool.shards),
        ("listen", ..) if setting.origin == Origin::Default => {
            format!(" of the mode {}", config.server.mode)
        }
        _ => String::new(),
    }
}

/// Returns the entries of a list of tables.
fn tables(value: &toml::Value) -> Option<Vec<&toml::Table>> {
    let entries: Vec<_> = value.as_array()?.iter().map(toml::Value::as_table).collect();
    entries.into_iter().collect::<Option<Vec<_>>>().filter(|entries| !entries.is_empty())
}
