//! `tombola fleet`: shows the state of a fleet, and puts back what its store has forgotten.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use super::exit::{Ended, Exit};
use crate::config::{Config, FleetConfig, Location, Mode, Overrides, PoolConfig};
use crate::fleet::protocol::Standing;
use crate::fleet::{Lost, Overview, reseed};
use crate::folder::Folder;
use crate::sqlite;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Shows how many partitions each instance holds, and whether this data folder is current; its server may
    /// be running
    Status(Location),
    /// Puts what this data folder knows back into a store that has forgotten it; its server must not be
    /// running
    Reseed(Location),
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    sqlite::check_version().map_err(anyhow::Error::msg)?;
    match command {
        Command::Status(location) => {
            let (config, fleet) = settings(location)?;
            super::block_on(async { status(&config.dir, &fleet).await })
        }
        Command::Reseed(location) => {
            let (config, fleet) = settings(location)?;
            let folder = Folder::open(&config.dir, Mode::Sharded, true, Duration::ZERO)?;
            super::block_on(async { put_back(&folder, &fleet, &config.pools).await })
        }
    }
}

fn settings(location: Location) -> anyhow::Result<(Config, FleetConfig)> {
    let config = Config::load(&Overrides { location, ..Overrides::default() })?;
    match config.fleet.clone() {
        Some(fleet) => Ok((config, fleet)),
        None => Err(Ended::error(
            Exit::Settings,
            "no fleet is configured: add [fleet] with store and space to the settings",
        )),
    }
}

async fn status(dir: &Path, fleet: &FleetConfig) -> anyhow::Result<()> {
    let overview = Overview::look(fleet, dir).await?;
    print(&overview, dir, fleet)?;
    match overview.folder {
        Some((_, Standing::Stale)) => Err(Lost::Stale.into()),
        Some((_, Standing::StoreBehind)) => Err(Lost::StoreBehind.into()),
        Some((_, Standing::Current | Standing::Pending)) | None => Ok(()),
    }
}

fn print(overview: &Overview, dir: &Path, fleet: &FleetConfig) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "store   {}", fleet.store.address)?;
    match overview.space {
        Some(uuid) => writeln!(out, "space   {}, {uuid}", fleet.space)?,
        None => writeln!(out, "space   {}, which the store does not have", fleet.space)?,
    }
    let standing = match overview.folder {
        None => "has not joined".to_owned(),
        Some((instance, standing)) => {
            let standing = match standing {
                Standing::Current => "is current",
                Standing::Pending => "is current; a step of its fence is under way",
                Standing::Stale => "is an old copy",
                Standing::StoreBehind => "is ahead of the store",
            };
            format!("{standing}: instance {instance}")
        }
    };
    writeln!(out, "folder  {} {standing}\n", dir.display())?;

    write!(out, "{:<36}  {:>10}", "instance", "steps")?;
    for pool in &overview.pools {
        write!(out, "  {:>12}", format!("{pool} partitions"))?;
    }
    writeln!(out)?;
    for (instance, holder) in &overview.instances {
        write!(out, "{instance}  {:>10}", holder.steps)?;
        for count in &holder.partitions {
            write!(out, "  {count:>12}")?;
        }
        writeln!(out)?;
    }
    write!(out, "{:<36}  {:>10}", "unclaimed", "")?;
    for at in 0..overview.pools.len() {
        write!(out, "  {:>12}", overview.free(at))?;
    }
    writeln!(out)?;
    out.flush()
}

async fn put_back(
    folder: &Folder,
    fleet: &FleetConfig,
    pools: &[PoolConfig],
) -> anyhow::Result<()> {
    let reseeded = reseed(fleet, pools, folder).await?;
    let mut out = io::stdout().lock();
    for (pool, partitions) in &reseeded.partitions {
        writeln!(out, "{pool}: {partitions} partitions put back")?;
    }
    match reseeded.step {
        Some(step) => writeln!(out, "fence: put back to step {step}")?,
        None => writeln!(out, "fence: not behind this folder, nothing to put back")?,
    }
    Ok(out.flush()?)
}
