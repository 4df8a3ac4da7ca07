//! What the console does: one module a command.

mod backup;
mod serve;
mod token;
mod verify;

use std::path::PathBuf;

use anyhow::bail;
use clap::{Parser, Subcommand};

use crate::config::{Config, Location, Overrides};
use crate::{files, sqlite};

/// Hands out unique random numbers over HTTP, and never the same one twice.
#[derive(Debug, Parser)]
#[command(name = "tombola", version, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Flags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves numbers, as tombola does without a command
    Serve(serve::Flags),
    /// Makes tokens, with which callers show who they are
    #[command(subcommand)]
    Token(token::Command),
    /// Copies a data folder, also while its server runs
    Backup(backup::Flags),
    /// Checks that a folder is whole and no number can come twice; its server must not run
    Verify(verify::Flags),
}

impl Arguments {
    /// Does what they say.
    ///
    /// # Errors
    /// What happened and what to do about it: each error tells the whole story, its causes included.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command.unwrap_or(Command::Serve(self.serve)) {
            Command::Serve(flags) => serve::run(flags),
            Command::Token(command) => token::run(&command),
            Command::Backup(flags) => backup::run(flags),
            Command::Verify(flags) => verify::run(flags),
        }
    }
}

/// The data folder of a command that works on one that is there.
fn existing_folder(location: Location) -> anyhow::Result<PathBuf> {
    sqlite::check_version().map_err(anyhow::Error::msg)?;
    let dir = Config::load(&Overrides { location, ..Overrides::default() })?.dir;
    if files::length_bytes(&dir)?.is_none() {
        bail!("there is no folder {}: name another with --data-dir", dir.display());
    }
    Ok(dir)
}
