//! `tombola verify`: checks a data folder and prints what is wrong with it.

use std::io::{self, Write};

use anyhow::bail;

use crate::config::Location;
use crate::verify::{self, Findings};

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let dir = super::existing_folder(flags.location)?;
    let advice = "changes during the check: stop the server, or verify a backup (tombola backup DIR, tombola \
                  verify --data-dir DIR)";
    let _lock = super::lock(&dir, advice)?;
    let findings = verify::check(&dir)?;
    print(&findings)?;
    let count = findings.violation_count();
    if count > 0 {
        bail!("{} failed the verification; violations: {count}", dir.display());
    }
    if findings.pools.is_empty() {
        bail!("there is no ledger in {}: nothing was verified", dir.display());
    }
    Ok(())
}

fn print(findings: &Findings) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for sum in &findings.pools {
        writeln!(out, "{sum}")?;
    }
    if let Some(sum) = &findings.receipts {
        writeln!(out, "{sum}")?;
    }
    for note in &findings.notes {
        writeln!(out, "note: {note}")?;
    }
    for line in findings.violation_lines() {
        writeln!(out, "violation: {line}")?;
    }
    out.flush()
}
