//! `tombola export`: writes the numbers of a ledger as text, one a line, in constant memory.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use super::exit::{Ended, Exit};
use crate::batch::BatchId;
use crate::config::{Location, PoolName};
use crate::files::{self, LockError};
use crate::folder::{self, PoolPaths};
use crate::ledger::Ledger;
use crate::shard;
use crate::sqlite;

/// The size of the output buffer in bytes.
const BUFFER_BYTES: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
    /// The pool
    #[arg(long, value_name = "NAME")]
    pool: String,
    /// Only numbers that were leased: handed out, or burned
    #[arg(long)]
    issued: bool,
    /// File for the numbers, which must not exist yet [default: standard output]
    #[arg(value_name = "FILE")]
    to: Option<PathBuf>,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let dir = super::existing_folder(flags.location)?;
    let _lock = files::lock(&dir, Duration::ZERO).map_err(|error| match error {
        LockError::Held { .. } => {
            let message = format!(
                "{error}. A folder in use changes during the export: stop the server, or export a backup"
            );
            Ended::error(Exit::InUse, message)
        }
        other => other.into(),
    })?;
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
    match written {
        // The reader has closed the pipe, which is no error.
        Err(error) if is_closed_pipe(&error) => Ok(()),
        written => written,
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

fn write(paths: &PoolPaths, issued: bool, to: impl Write) -> anyhow::Result<()> {
    let ledger = Ledger::open_to_look(&paths.ledger())?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, to);
    // The rows of these batches are in a file that still has unused rows, which say what was leased.
    let mut in_files = BTreeSet::new();
    if issued {
        for index in folder::survey(paths.folder())?.pools.remove(paths.pool()).unwrap_or_default()
        {
            for file in [paths.live(index), paths.standby(index), paths.unfinished(index)] {
                in_files.extend(batch_of(&file)?);
            }
            let live = paths.live(index);
            if live.exists() {
                let connection = sqlite::open_to_look(&live)?;
                shard::each_used(&connection, &mut |value| {
                    writeln!(out, "{}", ledger.space().number(value)).map_err(anyhow::Error::from)
                })?;
            }
        }
    }
    ledger.each(&mut |value, batch| {
        if in_files.contains(&batch) {
            return Ok(());
        }
        writeln!(out, "{}", ledger.space().number(value)).map_err(anyhow::Error::from)
    })?;
    Ok(out.flush()?)
}

/// Returns the batch that a shard's file was built from, if the file exists.
fn batch_of(file: &Path) -> anyhow::Result<Option<BatchId>> {
    if !file.exists() {
        return Ok(None);
    }
    match shard::read_label(file) {
        Ok(label) => Ok(Some(label.batch)),
        Err(error) => bail!("{} can't be read: {error}; see tombola verify", file.display()),
    }
}
