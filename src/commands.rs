//! The commands of the console, one module each.

mod backup;
mod check_config;
mod client;
mod draw;
mod exit;
mod export;
mod fleet;
mod health;
mod import;
mod receipts;
mod reload;
mod serve;
mod shell;
mod status;
mod token;
mod verify;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::{Parser, Subcommand};

use self::exit::Ended;
pub use self::exit::Exit;
use crate::config::{Config, Location, Overrides};
use crate::files::{Lock, LockError};
use crate::{files, sqlite};

/// Hands out unique random numbers over HTTP, and never the same one twice.
///
/// Without a command it serves, by default on http://127.0.0.1:8000.
/// Settings come from config.toml, environment variables (TOMBOLA_SERVER__LISTEN
/// is server.listen) and flags; later ones override earlier ones.
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
    /// Serves numbers; this is the default command
    Serve(serve::Flags),
    /// Prints the settings in effect as a settings file, and where each comes from
    CheckConfig(serve::Settings),
    /// Draws many numbers or codes of a pool from a running server into a file; a rerun continues
    Draw(draw::Flags),
    /// Shows the pools, shards, rates and events of a running server
    Status(status::Flags),
    /// Makes a running server read its settings again: all changes take effect, or none
    Reload(reload::Flags),
    /// Checks whether a running server is ready for requests, and reports it as an exit code
    Health(health::Flags),
    /// Creates the tokens with which callers authenticate
    #[command(subcommand)]
    Token(token::Command),
    /// Shows the state of a fleet, and puts back what its store has forgotten
    #[command(subcommand)]
    Fleet(fleet::Command),
    /// Copies a data folder, even while its server is running
    Backup(backup::Flags),
    /// Checks that a data folder is whole and can't repeat a number; its server must not be running
    Verify(verify::Flags),
    /// Writes the numbers or codes of a pool, one a line; its server must not be running
    Export(export::Flags),
    /// Marks numbers or codes that were issued by other means, so that none of them is ever issued; the server must not
    /// be running
    Import(import::Flags),
    /// Prints which numbers were given to which caller, even while the server is running
    Receipts(receipts::Flags),
    /// Prints a script that makes a shell complete the commands and flags of tombola
    Completions(shell::CompletionFlags),
    /// Prints the manual page, or writes one for each command
    Man(shell::ManFlags),
}

impl Arguments {
    /// Runs the command.
    ///
    /// # Errors
    /// What happened and what to do about it. The message of each error includes its causes.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command.unwrap_or(Command::Serve(self.serve)) {
            Command::Serve(flags) => serve::run(flags),
            Command::CheckConfig(settings) => check_config::run(settings),
            Command::Draw(flags) => draw::run(flags),
            Command::Status(flags) => status::run(flags),
            Command::Reload(flags) => reload::run(flags),
            Command::Health(flags) => health::run(flags),
            Command::Token(command) => token::run(&command),
            Command::Fleet(command) => fleet::run(command),
            Command::Backup(flags) => backup::run(flags),
            Command::Verify(flags) => verify::run(flags),
            Command::Export(flags) => export::run(flags),
            Command::Import(flags) => import::run(flags),
            Command::Receipts(flags) => receipts::run(flags),
            Command::Completions(flags) => shell::completions(&flags),
            Command::Man(flags) => shell::man(&flags),
        }
    }
}

/// Returns the data folder for a command that needs an existing one.
fn existing_folder(location: Location) -> anyhow::Result<PathBuf> {
    sqlite::check_version().map_err(anyhow::Error::msg)?;
    existing(Config::load(&Overrides { location, ..Overrides::default() })?.dir)
}

/// Returns the folder if it exists.
fn existing(dir: PathBuf) -> anyhow::Result<PathBuf> {
    if files::length_bytes(&dir)?.is_none() {
        bail!("there is no folder {}: name another with --data-dir", dir.display());
    }
    Ok(dir)
}

/// Locks a folder that no other process may use during a command. `advice` continues the sentence that begins
/// with "A folder in use".
fn lock(dir: &Path, advice: &str) -> anyhow::Result<Lock> {
    files::lock(dir, Duration::ZERO).map_err(|error| match error {
        LockError::Held { .. } => {
            Ended::error(Exit::InUse, format!("{error}. A folder in use {advice}"))
        }
        other @ LockError::File(_) => other.into(),
    })
}

/// Returns the result of printing. If the reader has closed the pipe, that is no error.
fn unless_pipe_is_closed(printed: anyhow::Result<()>) -> anyhow::Result<()> {
    match printed {
        Err(error)
            if error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe) =>
        {
            Ok(())
        }
        printed => printed,
    }
}

/// Runs a future to its end on a runtime of one thread.
fn block_on<T>(asking: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| anyhow!("can't start the runtime: {error}"))?.block_on(asking)
}
