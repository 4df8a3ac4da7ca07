//! `tombola serve`: arguments -> config -> server.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::thread;

use anyhow::anyhow;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::runtime;
use tokio::sync::oneshot;

use super::exit::Exit;
use crate::config::{AuthConfig, Config, Location, Mode, Overrides};
use crate::http::TYPE_DEFAULT;
use crate::reload::{Loaded, ReloadHandle};
use crate::server::{self, Server};
use crate::telemetry::{self, LogFormat};

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    settings: Settings,
    /// Format of the log lines; RUST_LOG sets which are written
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

/// The flags that override settings.
#[derive(Debug, clap::Args)]
pub(super) struct Settings {
    #[command(flatten)]
    location: Location,
    /// How numbers are made and stored [default: sharded]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Address and port to listen on [default: 127.0.0.1:8000, in the mode simple 127.0.0.1:5000]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// In a fleet: refuse a data folder that is an old copy, instead of starting as a new instance
    #[arg(long)]
    refuse_if_stale: bool,
}

impl Settings {
    pub(super) fn overrides(self) -> Overrides {
        let Self { location, mode, listen, refuse_if_stale } = self;
        Overrides { location, mode, listen, refuse_if_stale, ..Overrides::default() }
    }
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    telemetry::init(flags.log_format);
    // Registered before anything is opened, so that no signal is missed.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| anyhow!("can't listen for signals: {error}"))?;
    let overrides = flags.settings.overrides();
    let loaded = Loaded::read(&overrides)?;
    let config = loaded.config.clone();
    let mut runtime = match config.server.mode {
        // One request at a time, from its reading to its saved number.
        Mode::Simple => runtime::Builder::new_current_thread(),
        Mode::Json | Mode::Sqlite | Mode::Sharded => runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime
        .enable_all()
        .max_blocking_threads(server::BLOCKING_THREADS)
        .build()
        .map_err(|error| anyhow!("can't start the runtime: {error}"))?;
    runtime.block_on(async {
        let server = Server::start(overrides, loaded).await?;
        greet(server.address(), &config);
        let (stop, stopped) = oneshot::channel();
        on_signals(signals, server.reloads(), || stop.send(()).unwrap_or(()));
        Ok(server.run(async { stopped.await.unwrap_or(()) }).await?)
    })
}

fn greet(address: SocketAddr, config: &Config) {
    let scheme = if config.server.tls.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{address}");
    let (count, page) = match config.server.mode {
        Mode::Sharded => {
            ("&count=5", format!("\nWatch: {url}/ in a browser, or tombola status --watch"))
        }
        Mode::Simple | Mode::Json | Mode::Sqlite => ("", String::new()),
    };
    let token = match config.auth {
        AuthConfig::Tokens(_) => "-H 'Authorization: Bearer TOKEN' ",
        AuthConfig::Unsaid | AuthConfig::Anyone => "",
    };
    let pools: Vec<_> = config.pools.iter().map(|pool| pool.name.as_str()).collect();
    let other = pools.iter().find(|&&name| name != TYPE_DEFAULT).unwrap_or(&TYPE_DEFAULT);
    let one = match pools.contains(&TYPE_DEFAULT) {
        true => format!("{url}/random"),
        false => format!("'{url}/random?type={other}'"),
    };
    // An error is ignored: standard output may be closed, and the server can serve all the same.
    let _ = writeln!(
        io::stdout(),
        "Listening on {url}\nTry: curl {token}{one}\n     \
         curl {token}'{url}/random?type={other}{count}'\n     curl {url}/health{page}"
    );
}

/// Reloads at each SIGHUP. Stops at the first SIGTERM or Ctrl-C; the second one ends the process at once,
/// with nothing cleaned up.
fn on_signals(mut signals: Signals, reloads: ReloadHandle, stop: impl FnOnce() + Send + 'static) {
    thread::spawn(move || {
        let mut stop = Some(stop);
        for signal in signals.forever() {
            match (signal, stop.take()) {
                (SIGHUP, kept) => {
                    stop = kept;
                    reloads.request();
                }
                (_, Some(stop)) => stop(),
                (_, None) => {
                    eprintln!(
                        "Ended at once: numbers that were leased but not handed out are burned."
                    );
                    std::process::exit(Exit::Aborted as i32);
                }
            }
        }
    });
}
