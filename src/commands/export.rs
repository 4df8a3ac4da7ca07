//! `tombola export`: writes the numbers of a ledger as text, one a line, in constant memory.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, Error, anyhow};

use crate::batch::{BatchId, ShardIndex};
use crate::config::{Location, PoolName};
use crate::folder::{self, Known, PoolPaths};
use crate::ledger::Ledger;
use crate::shard;
use crate::sqlite::{self, Fault};

/// The size of the output buffer in bytes.
const BUFFER_BYTES: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
    /// The pool
    #[arg(long, value_name = "NAME")]
    pool: String,
    /// Only numbers that can't be handed out any more: handed out, burned or imported
    #[arg(long)]
    issued: bool,
    /// File for the numbers, which must not exist yet [default: standard output]
    #[arg(value_name = "FILE")]
    to: Option<PathBuf>,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let dir = super::existing_folder(flags.location)?;
    let _lock =
        super::lock(&dir, "changes during the export: stop the server, or export a backup")?;
    let pool =
        PoolName::new(&flags.pool).filter(|pool| PoolPaths::new(&dir, pool).ledger().exists());
    let pool = pool
        .with_context(|| format!("there is no ledger of {:?} in {}", flags.pool, dir.display()))?;
    let paths = PoolPaths::new(&dir, &pool);
    let written = match &flags.to {
        None => write(&paths, flags.issued, io::stdout().lock()),
        Some(to) => {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
            let file = file.with_context(|| format!("can't create {}", to.display()))?;
            write(&paths, flags.issued, &file).and_then(|()| Ok(file.sync_all()?))
        }
    };
    super::unless_pipe_is_closed(written)
}

fn write(paths: &PoolPaths, issued: bool, to: impl Write) -> anyhow::Result<()> {
    let ledger = Ledger::open_to_look(&paths.ledger())?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, to);
    let mut line = |value| writeln!(out, "{}", ledger.space().number(value)).map_err(Error::from);
    // The rows of these batches are in a file that still has unused rows, which say what was leased.
    let mut in_files = BTreeSet::new();
    if issued {
        let pools = folder::survey(paths.folder())?.pools;
        for &index in pools.get(paths.pool()).into_iter().flatten() {
            in_files.extend(batches_of(paths, &ledger, index)?);
            // A standby may have numbers that were imported.
            for path in [paths.live(index), paths.standby(index)] {
                if path.exists() {
                    shard::each_used(&sqlite::open_to_look(&path)?, &mut line)?;
                }
            }
        }
    }
    ledger.each(&mut |value, batch| match in_files.contains(&batch) {
        true => Ok(()),
        false => line(value),
    })?;
    Ok(out.flush()?)
}

/// Returns the batches that the files of a shard were built from, and checks that the ledger expects the files.
fn batches_of(
    paths: &PoolPaths,
    ledger: &Ledger,
    index: ShardIndex,
) -> anyhow::Result<Vec<BatchId>> {
    let (live, standby, unfinished) =
        (paths.live(index), paths.standby(index), paths.unfinished(index));
    let live = live.exists().then(|| shard::look(&live)).transpose()?;
    let standby = standby.exists().then(|| shard::read_label(&standby)).transpose()?;
    let unfinished = match unfinished.exists().then(|| shard::read_label(&unfinished)) {
        // A crash may leave a part of a file, whose batch is not in the ledger.
        Some(Err(error)) if error.fault() == Fault::Content => None,
        label => label.transpose()?,
    };
    let labels = [live.as_ref().map(|seen| &seen.label), standby.as_ref(), unfinished.as_ref()];
    let named: Vec<BatchId> = labels.into_iter().flatten().map(|label| label.batch).collect();
    let known =
        Known::of(ledger, paths.pool(), index, &named, live.as_ref().map(|l| l.label.batch))?;
    // The start removes a build that the ledger does not expect.
    let unfinished = unfinished.filter(|label| known.expects(label).is_ok());
    let unexpected = |problem: String| {
        anyhow!("a file of the shard {} can't be exported: {problem}", paths.shard_name(index))
    };
    let mut batches = Vec::new();
    if let Some(seen) = &live {
        known.expects(&seen.label).map_err(unexpected)?;
        let next = standby.as_ref().or(unfinished.as_ref());
        known.is_current(&seen.label, seen.token, seen.in_use, next).map_err(unexpected)?;
        batches.push(seen.label.batch);
    }
    if let Some(label) = &standby {
        known.expects(label).map_err(unexpected)?;
        batches.push(label.batch);
    }
    batches.extend(unfinished.map(|label| label.batch));
    Ok(batches)
}
