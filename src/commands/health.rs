//! `tombola health`: whether a running server serves every pool, as an exit code.

use std::io::{self, Write};

use anyhow::anyhow;
use serde_json::Value;

use super::client;
use super::exit::{Ended, Exit};

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    target: client::Target,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let server = flags.target.server()?;
    let answer = super::block_on(server.get("/health", None))?;
    let body: Option<Value> = serde_json::from_slice(&answer.body).ok();
    let Some(status) = body.as_ref().and_then(|body| body["status"].as_str()) else {
        let message = format!("{server}: this is no /health of tombola; name another with --url");
        return Err(Ended::error(Exit::Unreachable, message));
    };
    if answer.status != 200 {
        return Err(anyhow!("{server} is {status:?}: {}", answer.excerpt()));
    }
    let _ = writeln!(io::stdout(), "{}", status.escape_default());
    Ok(())
}
