//! `tombola backup`: copies a folder, whether or not a server uses it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::backup::{self, Summary};
use crate::config::Location;

/// The warning about a restored copy.
const WARNING: &str = "A server on this copy does not know the numbers that are issued from now on, \
    and can hand them out again. Nor does it know the idempotency keys that are used from now on.";

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
    /// Folder for the copy, which must be empty or not exist yet
    #[arg(value_name = "DIR")]
    to: PathBuf,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let dir = super::existing_folder(flags.location)?;
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stopped))
            .map_err(|error| anyhow!("can't listen for signals: {error}"))?;
    }
    let summary = backup::run(&dir, &flags.to, &|| !stopped.load(Ordering::Relaxed))?;
    Ok(print(&summary, &flags.to)?)
}

fn print(summary: &Summary, to: &Path) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for (name, bytes) in &summary.files {
        writeln!(out, "{name:<32} {:>10.2} MB", *bytes as f64 / 1e6)?;
    }
    for sum in &summary.findings.pools {
        writeln!(out, "{sum}")?;
    }
    if let Some(sum) = &summary.findings.receipts {
        writeln!(out, "{sum}")?;
    }
    for note in &summary.findings.notes {
        writeln!(out, "note: {note}")?;
    }
    for name in &summary.left_out {
        writeln!(out, "note: {name} is not in the copy: no server serves from it")?;
    }
    for (pool, burned) in &summary.burned {
        writeln!(
            out,
            "{pool}: at most {burned} of the numbers not yet handed out are never served from this copy"
        )?;
    }
    let bytes: u64 = summary.files.iter().map(|(_, bytes)| bytes).sum();
    writeln!(
        out,
        "{}: whole, files: {}, {:.2} MB, after {:.1} s\n{WARNING}",
        to.display(),
        summary.files.len(),
        bytes as f64 / 1e6,
        summary.took.as_secs_f64()
    )?;
    out.flush()
}
