//! `tombola health`: checks whether to send requests to a running server, and reports it as an exit code.

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
    let response = super::block_on(server.get("/health", None))?;
    let body: Option<Value> = serde_json::from_slice(&response.body).ok();
    let Some(status) = body.as_ref().and_then(|body| body["status"].as_str()) else {
        let message =
            format!("{server}: this is not the /health of tombola; name another server with --url");
        return Err(Ended::error(Exit::Unreachable, message));
    };
    // If every pool serves, the server is ready. Otherwise /ready decides, so that one pool's trouble does
    // not keep requests from the others.
    let ready =
        response.status == 200 || super::block_on(server.get("/ready", None))?.status == 200;
    if !ready {
        return Err(anyhow!("{server} is {status:?}: {}", response.excerpt()));
    }
    match response.status {
        200 => writeln!(io::stdout(), "{}", status.escape_default()),
        _ => writeln!(io::stdout(), "ready, but {:?}: {}", status, response.excerpt()),
    }
    .unwrap_or(());
    Ok(())
}
