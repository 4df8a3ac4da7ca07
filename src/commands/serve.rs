//! `tombola serve`: arguments -> config -> server.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::thread;

use anyhow::anyhow;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::config::{AuthConfig, Config, Location, Mode, Overrides};
use crate::server::{Server, blocking};
use crate::telemetry::{self, LogFormat};

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
    /// What hands the numbers out [default: sharded]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Address and port to listen on [default: 127.0.0.1:8000, in the mode simple 127.0.0.1:5000]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// How log lines look; RUST_LOG sets which are written
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    telemetry::init(flags.log_format);
    // Listened to before anything is opened, so that a stop is never missed.
    let signals = Signals::new([SIGTERM, SIGINT])
        .map_err(|error| anyhow!("can't listen to signals: {error}"))?;
    let config = Config::load(&Overrides {
        location: flags.location,
        listen: flags.listen,
        mode: flags.mode,
        ..Overrides::default()
    })?;
    match config.server.mode {
        Mode::Simple => {
            let server = blocking::Server::start(&config)?;
            greet(server.address(), &config);
            on_shutdown(signals, server.stopper());
            server.run();
            Ok(())
        }
        Mode::Json | Mode::Sqlite | Mode::Sharded => {
            let runtime =
                Runtime::new().map_err(|error| anyhow!("can't start the runtime: {error}"))?;
            runtime.block_on(async {
                let server = Server::start(&config).await?;
                greet(server.address(), &config);
                let (stop, stopped) = oneshot::channel();
                on_shutdown(signals, || stop.send(()).unwrap_or(()));
                server.run(async { stopped.await.unwrap_or(()) }).await;
                Ok(())
            })
        }
    }
}

fn greet(address: SocketAddr, config: &Config) {
    let count = if config.server.mode == Mode::Sharded { "&count=5" } else { "" };
    let token = match config.auth {
        AuthConfig::Tokens(_) => "-H 'Authorization: Bearer TOKEN' ",
        AuthConfig::Unsaid | AuthConfig::Anyone => "",
    };
    // Nobody may be reading: that is no reason not to serve.
    let _ = writeln!(
        io::stdout(),
        "Listening on http://{address}\nTry: curl {token}http://{address}/random\n     \
         curl {token}'http://{address}/random?type=float{count}'\n     curl http://{address}/health"
    );
}

/// Stops at the first SIGTERM or Ctrl-C; the second ends the process at once, as an abort would.
fn on_shutdown(mut signals: Signals, stop: impl FnOnce() + Send + 'static) {
    thread::spawn(move || {
        let mut signals = signals.forever();
        signals.next();
        stop();
        signals.next();
        eprintln!("Ended at once: numbers that were leased and not handed out are burned.");
        std::process::exit(130);
    });
}
