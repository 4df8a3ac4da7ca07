//! `tombola status`: shows a running server in a terminal.

mod page;
mod table;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use console::Term;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

use self::page::Page;
use self::table::table;
use super::client::{self, Client, HttpResponse};
use super::exit::{Ended, Exit};
use crate::config::TOKEN_VARIABLE;

/// The time between two requests of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// The width in columns if there is no terminal and `COLUMNS` is not set.
const WIDTH_DEFAULT: usize = 100;

/// The fewest columns that the table is laid out for. On a narrower terminal it is cut off.
const WIDTH_MIN: usize = 20;

const ALTERNATE_SCREEN: &str = "\x1b[?1049h\x1b[?25l";
const NORMAL_SCREEN: &str = "\x1b[?25h\x1b[?1049l";

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    target: client::Target,
    /// File with a token of the scope observe [default: the token in TOMBOLA_TOKEN]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Refresh every second, until Ctrl-C
    #[arg(short, long)]
    watch: bool,
    /// Print the JSON of the response unchanged
    #[arg(long)]
    json: bool,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let credentials = client::credentials(flags.token_file)?;
    let server = flags.target.server()?;
    let look = || async {
        let response = server.get("/status", credentials.as_ref()).await?;
        frame(&server, &response, flags.json)
    };
    super::block_on(async {
        let shown = match flags.watch {
            false => print(&look().await?),
            true => watch(look).await?,
        };
        match shown {
            // The reader has closed the pipe, which is no error.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            shown => shown.map_err(|error| anyhow::anyhow!("can't print the status: {error}")),
        }
    })
}

/// Returns the lines that show a response.
fn frame(server: &Client, response: &HttpResponse, json: bool) -> anyhow::Result<Vec<String>> {
    let failed = |exit, problem: String| Err(Ended::error(exit, format!("{server}: {problem}")));
    match response.status {
        200 => {}
        401 => {
            let problem = format!(
                "it requires a token of the scope observe: give one with --token-file or in \
                 {TOKEN_VARIABLE}"
            );
            return failed(Exit::Failed, problem);
        }
        403 => {
            let problem = "the token lacks the scope observe: use one that has it";
            return failed(Exit::Failed, problem.to_owned());
        }
        404 => {
            let problem = "there is no /status: only servers of the mode sharded have one";
            return failed(Exit::Unreachable, problem.to_owned());
        }
        status => {
            return failed(
                Exit::Failed,
                format!("it responded with {status}: {}", response.excerpt()),
            );
        }
    }
    let page: Page = match serde_json::from_slice(&response.body) {
        Ok(page) => page,
        Err(error) => {
            let problem = format!(
                "this is not a /status that tombola {} understands: {error}. Use the console of the \
                 server's own version, or name another server with --url",
                env!("CARGO_PKG_VERSION")
            );
            return failed(Exit::Unreachable, problem);
        }
    };
    if json {
        return Ok(vec![String::from_utf8_lossy(&response.body).trim_end().to_owned()]);
    }
    Ok(table(&page, &server.to_string(), width()))
}

fn width() -> usize {
    let terminal = Term::stdout();
    let columns = || std::env::var("COLUMNS").ok()?.parse().ok();
    let width = match terminal.size_checked() {
        Some((_, columns)) if terminal.is_term() => usize::from(columns),
        _ => columns().unwrap_or(WIDTH_DEFAULT),
    };
    width.max(WIDTH_MIN)
}

fn print(lines: &[String]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in lines {
        writeln!(out, "{line}")?;
    }
    out.flush()
}

/// Shows the status every second, until Ctrl-C or SIGTERM. Fails only if the first request fails; later it
/// waits until the server responds again.
async fn watch(
    look: impl AsyncFn() -> anyhow::Result<Vec<String>>,
) -> anyhow::Result<io::Result<()>> {
    let deaf = |error| anyhow::anyhow!("can't listen for signals: {error}");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(deaf)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(deaf)?;
    let show = async {
        let mut lines = look().await?;
        let screen = Screen::open(io::stdout().is_terminal())?;
        let mut ticks = tokio::time::interval(WATCH_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            if let Err(error) = screen.show(&lines) {
                return Ok(Err(error));
            }
            ticks.tick().await;
            lines = look().await.unwrap_or_else(|error| {
                vec![error.to_string(), "Trying again every second; Ctrl-C ends it.".to_owned()]
            });
        }
    };
    tokio::select! {
        ended = show => ended,
        _ = interrupt.recv() => Ok(Ok(())),
        _ = terminate.recv() => Ok(Ok(())),
    }
}

/// The output of `--watch`: the alternate screen on a terminal, or one block after another elsewhere.
struct Screen {
    on_terminal: bool,
}

impl Screen {
    fn open(on_terminal: bool) -> io::Result<Self> {
        if on_terminal {
            let mut out = io::stdout().lock();
            out.write_all(ALTERNATE_SCREEN.as_bytes())?;
            out.flush()?;
        }
        Ok(Self { on_terminal })
    }

    fn show(&self, lines: &[String]) -> io::Result<()> {
        if !self.on_terminal {
            print(lines)?;
            return print(&[String::new()]);
        }
        let (rows, columns) = Term::stdout().size();
        // The last row stays free, because a newline there would scroll the first row away.
        let rows = usize::from(rows).saturating_sub(1).max(1);
        let mut frame = "\x1b[H".to_owned();
        for line in lines.iter().take(rows) {
            frame += &console::truncate_str(line, usize::from(columns), "…");
            frame += "\x1b[K\r\n";
        }
        frame += "\x1b[J";
        let mut out = io::stdout().lock();
        out.write_all(frame.as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.on_terminal {
            // Errors are ignored, because a terminal that is gone needs no cleanup.
            let _ = io::stdout().write_all(NORMAL_SCREEN.as_bytes());
            let _ = io::stdout().flush();
        }
    }
}
