//! What the console does: one module a command.

mod backup;
mod check_config;
mod client;
mod exit;
mod fleet;
mod health;
mod serve;
mod shell;
mod status;
mod token;
mod verify;

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::{Parser, Subcommand};

pub use self::exit::Exit;
use crate::config::{Config, Location, Overrides};
use crate::{files, sqlite};

/// Hands out unique random numbers over HTTP, and never the same one twice.
///
/// Without a command it serves, on http://127.0.0.1:8000 unless told otherwise.
/// Settings come from config.toml, environment variables (TOMBOLA_SERVER__LISTEN
/// is server.listen) and flags, the later over the earlier.
#[derive(Debug, Parser)]
#[command(
    name = "tombola",
    version,
    verbatim_doc_comment,
    args_conflicts_with_subcommands = true,
    after_help = Exit::table()
)]
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
    /// Prints the settings in effect, as a settings file, and where each comes from
    CheckConfig(serve::Settings),
    /// Shows what a running server does: pools, shards, rates and events
    Status(status::Flags),
    /// Asks a running server whether it serves every pool; the exit code tells
    Health(health::Flags),
    /// Makes tokens, with which callers show who they are
    #[command(subcommand)]
    Token(token::Command),
    /// What the store of a fleet has, and how to put back what it has forgotten
    #[command(subcommand)]
    Fleet(fleet::Command),
    /// Copies a data folder, also while its server runs
    Backup(backup::Flags),
    /// Checks that a folder is whole and no number can come twice; its server must not run
    Verify(verify::Flags),
    /// Prints what makes a shell complete the commands and flags of tombola
    Completions(shell::CompletionFlags),
    /// Prints the manual page, or writes one for each command
    Man(shell::ManFlags),
}

impl Arguments {
    /// Does what they say.
    ///
    /// # Errors
    /// What happened and what to do about it: each error tells the whole story, its causes included.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command.unwrap_or(Command::Serve(self.serve)) {
            Command::Serve(flags) => serve::run(flags),
            Command::CheckConfig(settings) => check_config::run(settings),
            Command::Status(flags) => status::run(flags),
            Command::Health(flags) => health::run(flags),
            Command::Token(command) => token::run(&command),
            Command::Fleet(command) => fleet::run(command),
            Command::Backup(flags) => backup::run(flags),
            Command::Verify(flags) => verify::run(flags),
            Command::Completions(flags) => shell::completions(&flags),
            Command::Man(flags) => shell::man(&flags),
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

/// Runs what asks a server: one thread is enough.
fn block_on<T>(asking: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| anyhow!("can't start the runtime: {error}"))?.block_on(asking)
}
