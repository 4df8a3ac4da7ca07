//! `tombola`: arguments -> config -> server.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tombola::config::{Config, Overrides};
use tombola::server::Server;
use tombola::telemetry::{self, LogFormat};

/// Hands out unique random numbers over HTTP, and never the same one twice.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Settings file [default: config.toml in the working directory, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the ledgers and shards [default: shards]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address and port to listen on [default: 127.0.0.1:8000]
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

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    // Listened to before anything is opened, so that a stop is never missed.
    let signals =
        Signals::listen().map_err(|error| anyhow::anyhow!("can't listen to signals: {error}"))?;
    let config = Config::load(&Overrides {
        file: arguments.config,
        dir: arguments.data_dir,
        listen: arguments.listen,
        ..Overrides::default()
    })?;
    let server = Server::start(&config).await?;
    let address = server.address();
    // Nobody may be reading: that is no reason not to serve.
    let _ = writeln!(
        io::stdout(),
        "Listening on http://{address}\nTry: curl http://{address}/random\n     \
         curl 'http://{address}/random?type=float&count=5'\n     curl http://{address}/health"
    );
    server.run(signals.shutdown()).await;
    Ok(())
}

/// SIGTERM and Ctrl-C.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Completes at the first signal; the second ends the process at once, as an abort would.
    async fn shutdown(mut self) {
        self.next().await;
        tokio::spawn(async move {
            self.next().await;
            eprintln!("Ended at once: numbers that were leased and not handed out are burned.");
            std::process::exit(130);
        });
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
