//! `tombola check-config`: prints the settings that a server would use, and where each comes from. Opens no
//! data folder.

use std::io::{self, Write};

use anyhow::anyhow;

use super::serve;
use crate::config::{AuthConfig, Config, Origin, ReceiptStoreConfig, Recorded, Setting};
use crate::figures::thousands;
use crate::server;
use crate::space::{CodeFormat, Space, Value};
use crate::telemetry::{self, LogFormat};

/// The guesses of an attacker, and the largest probability that one of them may hit an issued code.
const GUESSES: f64 = 1e6;
const HITS_MAX: f64 = 0.01;

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
    for pool in &config.pools {
        if let Some(format) = pool.space.codes() {
            writeln!(out, "\n# {}: {}", pool.name, codes(&pool.space, format))?;
            if hits(pool.space.size(), GUESSES) > HITS_MAX {
                writeln!(
                    out,
                    "# Warning: with {} codes issued, a million guesses hit one with a probability of more than 1 %. \
                     Use more symbols, or limit how often callers can try.",
                    thousands(pool.space.size().min(1_000))
                )?;
            }
        }
    }
    for remark in receipts(config) {
        writeln!(out, "\n# {remark}")?;
    }
    if let AuthConfig::Unsaid = config.auth {
        writeln!(out, "\n# No authentication: any process on this machine may send requests.")?;
    }
    if config.quota.is_none() {
        writeln!(out, "# No quota: nothing is limited.")?;
    }
    out.flush()
}

/// Describes the codes of a pool: an example, their number, and the chance of a guess.
fn codes(space: &Space, format: &CodeFormat) -> String {
    // A fixed value: the example is not drawn.
    let example = space.number(Value((format.count() / 1000 * 618).cast_signed()));
    let mut text = format!("codes such as {example}, {} in all.", thousands(format.count()));
    for issued in [1_000, 1_000_000] {
        if issued < format.count() {
            let one_in = thousands(format.count().div_ceil(issued));
            text += &format!(" With {} issued, a guess hits one in {one_in}.", thousands(issued));
        }
    }
    text
}

/// Returns remarks about receipts and idempotency keys.
fn receipts(config: &Config) -> Vec<String> {
    let mut remarks = Vec::new();
    let all = config.pools.iter().filter(|pool| pool.receipts == Recorded::All);
    let all: Vec<_> = all.map(|pool| pool.name.as_str()).collect();
    if !all.is_empty() {
        remarks.push(format!(
            "Each response of {} is sent only after its receipt is saved. Receipts are never removed.",
            all.join(", ")
        ));
    }
    if config.fleet.is_some() {
        match &config.receipts.store {
            _ if !config.receipts.keys => remarks.push(
                "Requests with an Idempotency-Key are refused: other instances of the fleet would not know it. Set \
                 receipts.store."
                    .to_owned(),
            ),
            ReceiptStoreConfig::Folder => remarks.push(
                "Warning: receipts.store = \"folder\" is right only if the fleet has no other instance, because that \
                 would not know the idempotency keys used here."
                    .to_owned(),
            ),
            ReceiptStoreConfig::Postgres(_) => {}
        }
    }
    remarks
}

/// Returns the probability that at least one of `guesses` guesses hits one of 1,000 issued codes, or of all codes
/// if there are fewer.
fn hits(count: u64, guesses: f64) -> f64 {
    1.0 - (1.0 - (1_000.0 / count as f64).min(1.0)).powf(guesses)
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
