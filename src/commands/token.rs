//! `tombola token`: makes tokens. Keeps none and changes no file.

use std::io::{self, Write};

use anyhow::anyhow;

use crate::auth;
use crate::config::{Scope, TokenName};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Prints the lines for the config file, and the new token, this once, on standard error
    New {
        /// Whose it is: a-z, A-Z, 0-9, '.', '_' and '-'
        #[arg(long)]
        name: TokenName,
        /// What it is for
        #[arg(long, value_enum)]
        scope: Scope,
    },
}

pub(super) fn run(command: &Command) -> anyhow::Result<()> {
    let Command::New { name, scope } = command;
    let token = auth::new_token();
    let sha256 = hex::encode(auth::digest(token.as_bytes()));
    let scope = scope.as_str();
    // Apart, so that `>> config.toml` puts the lines where they belong and the token nowhere.
    writeln!(io::stderr(), "{token}")
        .and_then(|()| {
            writeln!(
                io::stdout(),
                "\n[[auth.tokens]]\nname = \"{name}\"\nscope = \"{scope}\"\nsha256 = \"{sha256}\""
            )
        })
        .map_err(|error| anyhow!("can't print the token: {error}"))
}
