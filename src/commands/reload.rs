//! `tombola reload`: makes a running server read its settings again, and prints what changed.

use std::io::{self, Write};
use std::path::PathBuf;

use axum::http::Method;
use hyper::body::Bytes;
use serde_json::Value;

use super::client;
use super::exit::{Ended, Exit};
use crate::config::TOKEN_VARIABLE;

/// The most bytes of a response: a list of all pools.
const BODY_LIMIT_BYTES: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    target: client::Target,
    /// File with a token of the scope admin [default: the token in TOMBOLA_TOKEN]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let credentials = client::credentials(flags.token_file)?;
    let server = flags.target.server()?;
    let exchange = async {
        let request = server.request(Method::POST, "/reload", credentials.as_ref());
        let request = request.body(Bytes::new().into()).map_err(|error| error.to_string())?;
        server.connect().await?.send(request, BODY_LIMIT_BYTES).await
    };
    let response = super::block_on(async { Ok(exchange.await) })?;
    let response = response.map_err(|problem| server.unreachable(&problem))?;
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let text = |name: &str| body[name].as_str().map(str::to_owned);
    let (exit, problem) = match response.status {
        200 => {
            let message = text("message").unwrap_or_else(|| response.excerpt());
            // An error is ignored: the settings are in effect whether it is printed or not.
            let _ = writeln!(io::stdout(), "{message}");
            return Ok(());
        }
        401 | 403 => {
            let problem = format!(
                "it requires a token of the scope admin for all pools: give one with --token-file or in \
                 {TOKEN_VARIABLE}"
            );
            (Exit::Settings, problem)
        }
        422 => (Exit::Settings, text("error").unwrap_or_else(|| response.excerpt())),
        _ => (Exit::Failed, format!("this is not the /reload of tombola: {}", response.excerpt())),
    };
    Err(Ended::error(exit, format!("{server}: {problem}")))
}
