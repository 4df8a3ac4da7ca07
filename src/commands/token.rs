//! `tombola token`: creates tokens. Stores none and changes no file.

use std::io::{self, Write};
use std::time::SystemTime;

use anyhow::anyhow;

use crate::auth;
use crate::config::{PoolName, Scope, TokenName, parse_time};

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
        /// Owner of what the token draws [default: the token's name]
        #[arg(long)]
        owner: Option<TokenName>,
        /// Pool that the token may use and see; can be repeated [default: all pools]
        #[arg(long = "pool", value_name = "POOL", value_parser = parse_pool)]
        pools: Vec<PoolName>,
        /// Date or time in UTC at which the token expires, such as 2027-01-31
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        expires: Option<SystemTime>,
    },
}

fn parse_pool(name: &str) -> Result<PoolName, &'static str> {
    PoolName::new(name).ok_or("allowed: the name of a pool")
}

pub(super) fn run(command: &Command) -> anyhow::Result<()> {
    let Command::New { name, scope, owner, pools, expires } = command;
    let token = auth::new_token();
    let sha256 = hex::encode(auth::digest(token.as_bytes()));
    let scope = scope.as_str();
    let mut entry = format!("\n[[auth.tokens]]\nname = \"{name}\"\nscope = \"{scope}\"\n");
    if let Some(owner) = owner {
        entry += &format!("owner = \"{owner}\"\n");
    }
    if !pools.is_empty() {
        let pools: Vec<_> = pools.iter().map(|pool| format!("\"{pool}\"")).collect();
        entry += &format!("pools = [{}]\n", pools.join(", "));
    }
    if let Some(expires) = expires {
        entry += &format!("expires = {}\n", humantime::format_rfc3339_seconds(*expires));
    }
    // On separate streams, so that `>> config.toml` appends the lines but not the token.
    writeln!(io::stderr(), "{token}")
        .and_then(|()| writeln!(io::stdout(), "{entry}sha256 = \"{sha256}\""))
        .map_err(|error| anyhow!("can't print the token: {error}"))
}
