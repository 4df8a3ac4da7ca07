//! `tombola`: arguments -> config -> server.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use anyhow::anyhow;
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tombola::config::{Config, Mode, Overrides};
use tombola::server::{Server, blocking};
use tombola::telemetry::{self, LogFormat};

/// Hands out unique random numbers over HTTP, and never the same one twice.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Settings file [default: config.toml in the working directory, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What hands the numbers out [default: sharded]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Folder of all that is kept [default: shards]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address and port to listen on [default: 127.0.0.1:8000, in the mode simple 127.0.0.1:5000]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// How log lines look; RUST_LOG sets which are written
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    telemetry::init(arguments.log_format);
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Each error tells the whole story, its causes included.
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    // Listened to before anything is opened, so that a stop is never missed.
    let signals = Signals::new([SIGTERM, SIGINT])
        .map_err(|error| anyhow!("can't listen to signals: {error}"))?;
    let config = Config::load(&Overrides {
        file: arguments.config,
        dir: arguments.data_dir,
        listen: arguments.listen,
        mode: arguments.mode,
        ..Overrides::default()
    })?;
    match config.server.mode {
        Mode::Simple => {
            let server = blocking::Server::start(&config)?;
            greet(server.address(), "");
            on_shutdown(signals, server.stopper());
            server.run();
            Ok(())
        }
        mode => {
            let runtime =
                Runtime::new().map_err(|error| anyhow!("can't start the runtime: {error}"))?;
            runtime.block_on(async {
                let server = Server::start(&config).await?;
                greet(server.address(), if mode == Mode::Sharded { "&count=5" } else { "" });
                let (stop, stopped) = oneshot::channel();
                on_shutdown(signals, || stop.send(()).unwrap_or(()));
                server.run(async { stopped.await.unwrap_or(()) }).await;
                Ok(())
            })
        }
    }
}

fn greet(address: SocketAddr, count: &str) {
    // Nobody may be reading: that is no reason not to serve.
    let _ = writeln!(
        io::stdout(),
        "Listening on http://{address}\nTry: curl http://{address}/random\n     \
         curl 'http://{address}/random?type=float{count}'\n     curl http://{address}/health"
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
