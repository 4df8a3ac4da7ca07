//! `tombola token`: creates tokens. Stores none and changes no file.

use std::io::{self, Write};

use anyhow::anyhow;

use crate::auth;
use crate::config::{Scope, TokenName};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Creates a token: prints the lines for the settings file, and, only this once, the token on standard
    /// error
    New {
        /// Name of the token: a-z, A-Z, 0-9, '.', '_' and '-'
        #[arg(long)]
        name: TokenName,
        /// Scope of the token
        #[arg(long, value_enum)]
        scope: Scope,
    },
}

pub(super) fn run(command: &Command) -> anyhow::Result<()> {
    let Command::New { name, scope } = command;
    let token = auth::new_token();
    let sha256 = hex::encode(auth::digest(token.as_bytes()));
    let scope = scope.as_str();
    // On separate streams, so that `>> config.toml` appends the lines but not the token.
    writeln!(io::stderr(), "{token}")
        .and_then(|()| {
            writeln!(
                io::stdout(),
                "\n[[auth.tokens]]\nname = \"{name}\"\nscope = \"{scope}\"\nsha256 = \"{sha256}\""
            )
        })
        .map_err(|error| anyhow!("can't print the token: {error}"))
}
