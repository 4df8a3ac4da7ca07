//! `tombola import`: marks numbers that were issued by other means, so that none of them is ever issued.

mod remote;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tracing::warn;

use self::remote::{Remote, parts};
use super::client::{self, Address, Target};
use super::exit::{Ended, Exit};
use super::receipts;
use crate::config::{Config, Location, Mode, Overrides, PoolConfig};
use crate::figures::thousands;
use crate::files::LockError;
use crate::folder::{Folder, FolderError};
use crate::http::push_csv_field;
use crate::import::{self, Column, Layout, Outcome, Report};
use crate::on_demand::{self, JsonStore, OpenError, PoolIndex, TableStore};
use crate::space::Value;
use crate::sqlite;
use crate::telemetry::{self, LogFormat};

/// The bytes that are read from a file at once.
const BUFFER_BYTES: usize = 1 << 20;

/// The number of conflicts that the text lists.
const LISTED_MAX: usize = 10;

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
    /// The pool
    #[arg(long, value_name = "NAME")]
    pool: String,
    /// Read a CSV, and take the numbers from this column: a name in its first line, or a number from 1
    /// [default: each line is a number]
    #[arg(long, value_name = "COLUMN")]
    column: Option<Column>,
    /// Text that may stand in place of a number, such as a header
    #[arg(long, value_name = "TEXT")]
    skip: Option<String>,
    /// CSV file for the numbers that were issued before, each with its receipt; it must not exist yet
    #[arg(long, value_name = "FILE")]
    conflicts: Option<PathBuf>,
    /// Import into this running server, http:// or https:// [default: into the data folder]
    #[arg(long, value_name = "URL", conflicts_with_all = ["file", "dir"])]
    url: Option<Address>,
    /// PEM file of the root that vouches for the server's certificate, for https
    #[arg(long, value_name = "FILE", requires = "url")]
    ca: Option<PathBuf>,
    /// File with a token of the scope admin [default: the token in TOMBOLA_TOKEN]
    #[arg(long, value_name = "FILE", requires = "url")]
    token_file: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// File with the numbers or codes, one a line; - is standard input
    #[arg(value_name = "FILE")]
    from: PathBuf,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let Flags { location, pool, column, skip, conflicts, url, ca, token_file, json, from } = flags;
    let layout = Layout { column, skip, lines_before: 0 };
    let report = match url {
        Some(url) => {
            let server = Target::new(url, ca).server()?;
            let remote = Remote { server, credentials: client::credentials(token_file)?, pool };
            let (parts, wrong) = parts(open(&from)?, &layout)?;
            with_conflicts(conflicts.as_deref(), || super::block_on(remote.import(parts, wrong)))?
        }
        None => {
            sqlite::check_version().map_err(anyhow::Error::msg)?;
            telemetry::init(LogFormat::Text);
            let config = Config::load(&Overrides { location, ..Overrides::default() })?;
            let known = config.pools.iter().find(|known| known.name.as_str() == pool);
            let pool = known.ok_or_else(|| {
                Ended::error(Exit::Settings, format!("the settings have no pool {pool:?}"))
            })?;
            let values = import::read(open(&from)?, &layout, &pool.space)?;
            with_conflicts(conflicts.as_deref(), || import_here(&config, pool, values))?
        }
    };
    super::unless_pipe_is_closed(print(&report, json).map_err(Into::into))
}

/// Imports, and writes the conflicts to a file. The file is created first, because an import can't be taken back.
fn with_conflicts(
    path: Option<&Path>,
    import: impl FnOnce() -> anyhow::Result<Report>,
) -> anyhow::Result<Report> {
    let file = path.map(create).transpose()?;
    let report = import().inspect_err(|_| {
        if let Some(path) = path {
            let _ = std::fs::remove_file(path);
        }
    })?;
    if let Some(file) = file {
        write_conflicts(&report, file)?;
    }
    Ok(report)
}

fn create(path: &Path) -> anyhow::Result<File> {
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    created.with_context(|| format!("can't create {}", path.display()))
}

fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path).with_context(|| format!("can't open {}", path.display()))?;
    Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, file)))
}

/// Imports into the data folder.
fn import_here(config: &Config, pool: &PoolConfig, values: Vec<Value>) -> anyhow::Result<Report> {
    if config.fleet.is_some() {
        let problem = "other instances of the fleet would issue the numbers, so they can't be imported into it. Set \
                       used_file of a new pool, from the first instance on";
        return Err(Ended::error(Exit::Settings, problem));
    }
    let in_use = |error: &FolderError| match error {
        FolderError::Lock(error @ LockError::Held { .. }) => {
            let advice = "Stop the server, or import into it with --url";
            Some(Ended::error(Exit::InUse, format!("{error}. {advice}")))
        }
        _ => None,
    };
    if config.server.mode != Mode::Sharded {
        let outcome = import_below(config, pool, values).map_err(|error| match &error {
            on_demand::ImportError::Open(OpenError::Folder(folder)) => {
                in_use(folder).unwrap_or_else(|| error.into())
            }
            _ => error.into(),
        })?;
        return Ok(Report::new(&pool.name, &pool.space, &outcome, |_| None));
    }
    let folder = Folder::open(&config.dir, Mode::Sharded, false, Duration::ZERO);
    let folder = folder.map_err(|error| in_use(&error).unwrap_or_else(|| error.into()))?;
    // Before the import, because an import can't be taken back.
    let reader = receipts::locked_reader(config)?;
    let outcome = import::import(&folder, pool, values)?;
    let receipt = |value| {
        let receipt = reader.of_number(&pool.name, value, None);
        let receipt = receipt.unwrap_or_else(|error| {
            warn!(%error, "the receipt of an imported number can't be read");
            None
        });
        receipt.map(|receipt| receipt.seq)
    };
    Ok(Report::new(&pool.name, &pool.space, &outcome, receipt))
}

/// Imports into the store of a mode below sharded.
fn import_below(
    config: &Config,
    pool: &PoolConfig,
    values: Vec<Value>,
) -> Result<Outcome, on_demand::ImportError> {
    let position = config.pools.iter().position(|known| known.name == pool.name);
    let index = PoolIndex(position.expect("it is one of these pools"));
    match config.server.mode {
        Mode::Sqlite => on_demand::import::<TableStore>(config, index, values),
        Mode::Simple | Mode::Json | Mode::Sharded => {
            on_demand::import::<JsonStore>(config, index, values)
        }
    }
}

fn write_conflicts(report: &Report, file: File) -> anyhow::Result<()> {
    let mut out = BufWriter::new(file);
    writeln!(out, "number,receipt")?;
    let mut line = String::new();
    for conflict in &report.conflicts {
        line.clear();
        push_csv_field(&conflict.number(), &mut line);
        line.push(',');
        if let Some(seq) = conflict.receipt() {
            line.push_str(&seq.to_string());
        }
        writeln!(out, "{line}")?;
    }
    Ok(out.into_inner()?.sync_all()?)
}

fn print(report: &Report, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, report)?;
        writeln!(out)?;
        return out.flush();
    }
    let lines = [
        ("marked", report.marked, "will never be issued"),
        ("in shards", report.marked_in_shards, "of those were in shards"),
        ("repeated", report.repeated, "were given more than once"),
        ("known", report.known, "were marked by an earlier import"),
        ("issued before", report.issued_before, "had been issued or burned by this server"),
    ];
    writeln!(out, "pool {}", report.pool)?;
    for (name, count, meaning) in lines {
        writeln!(out, "{name:<14}{:>14}  {meaning}", thousands(count))?;
    }
    for conflict in report.conflicts.iter().take(LISTED_MAX) {
        let receipt = conflict.receipt().map(|seq| format!("receipt {seq}"));
        let receipt = receipt.unwrap_or_else(|| "no receipt".to_owned());
        writeln!(out, "conflict: {} was issued before; {receipt}", conflict.number())?;
    }
    if report.conflicts.len() > LISTED_MAX {
        writeln!(out, "conflict: and others, all of which --conflicts FILE writes to a file")?;
    }
    if report.interrupted {
        writeln!(
            out,
            "note: an earlier import was interrupted; if it was of the same numbers, it is complete now, and \
             otherwise run it again"
        )?;
    }
    writeln!(
        out,
        "note: backups from before this import lack it; after restoring one, import the numbers again"
    )?;
    out.flush()
}
