//! `stress-test`: requests numbers from a server as fast as they come, and checks that none comes twice.
//!
//! In the order in which a request meets them:
//! - [`args`]: the command line.
//! - [`load`]: the clients, their requests and retries.
//! - [`client`]: one client's connection.
//! - [`mod@judge`]: the verdict on each attempt, and the counts.
//! - [`numbers`]: the numbers in a body.
//! - [`seen`]: the numbers so far, in memory and in the file of `--seen`.
//! - [`journal`]: the lines on the console and in the log.
//! - [`mod@summary`]: the end of both.
//!
//! Architecture invariant: there are two threads. One drives all connections and reads no body, the
//! other judges, prints and logs. A slow terminal or disk therefore makes no latency longer.

#![forbid(unsafe_code)]

mod args;
mod client;
mod journal;
mod judge;
mod load;
mod numbers;
mod seen;
mod summary;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use clap::Parser as _;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::sync::{Notify, mpsc};

use crate::args::Args;
use crate::client::Client;
use crate::journal::Journal;
use crate::judge::{Tally, judge};
use crate::load::End;
use crate::seen::Seen;
use crate::summary::summary;

/// A number came twice, or something failed.
const EXIT_FAILED: u8 = 1;
/// The arguments, or the files that they name, can't be used. clap has the same code.
const EXIT_BAD_ARGUMENTS: u8 = 2;
/// The usual code of a program that Ctrl-C ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Attempts on their way to the judge, beside one of each client. When the channel is full, the load
/// waits, so that memory is bounded.
const QUEUE: usize = 1024;

fn main() -> ExitCode {
    // Clients, judge and summary share them until the process ends.
    let args: &'static Args = Box::leak(Box::new(Args::parse()));
    // Everything on the disk is opened before the first request: a run that can't be kept does not start.
    let (seen, journal) = match open_files(args) {
        Ok(files) => files,
        Err(error) => {
            eprintln!("stress-test: {error:#}");
            return ExitCode::from(EXIT_BAD_ARGUMENTS);
        }
    };
    match run(args, seen, journal) {
        Ok(tally) if tally.duplicates == 0 && tally.failures == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(EXIT_FAILED),
        Err(error) => {
            eprintln!("stress-test: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn open_files(args: &Args) -> anyhow::Result<(Seen, Journal)> {
    let seen = match &args.seen {
        Some(path) => {
            Seen::open(path).with_context(|| format!("cannot use --seen {}", path.display()))?
        }
        None => Seen::default(),
    };
    Ok((seen, Journal::open(args)?))
}

fn run(args: &'static Args, mut seen: Seen, mut journal: Journal) -> anyhow::Result<Tally> {
    let (sender, attempts) = mpsc::channel(QUEUE + args.concurrency as usize);
    let (end, tally) = std::thread::scope(|scope| {
        let judging = scope.spawn(|| judge(args, attempts, &mut seen, &mut journal));
        let end = run_load(args, sender);
        (end, judging.join().expect("judging does not panic"))
    });
    let end = match end {
        Ok(end) => end,
        Err(error) => {
            journal.close(&format!("{error:#}")).context("the log is not complete")?;
            return Err(error);
        }
    };
    // The file before the console: the next run needs it, even if the console is closed.
    let saved = seen.save().context("could not save --seen");
    let summary = summary(args, &end, &tally, &seen, journal.log_path.as_ref());
    journal.print(&summary);
    let logged = journal.close(&summary).context("the log is not complete");
    saved.and(logged).map(|()| tally)
}

#[tokio::main(flavor = "current_thread")]
async fn run_load(
    args: &'static Args,
    attempts: mpsc::Sender<load::Attempt>,
) -> anyhow::Result<End> {
    let interrupt = listen_for_interrupts().context("cannot listen for Ctrl-C")?;
    let mut first = Client::new(args);
    first.connect().await.map_err(|error| {
        let url = &args.url;
        anyhow!("cannot reach {url}: {error}. Start a server there, or name another with --url.")
    })?;
    Ok(load::run(args, first, attempts, &interrupt).await)
}

/// Listens for Ctrl-C and SIGTERM. The first is notified, the second ends the process at once.
fn listen_for_interrupts() -> std::io::Result<Arc<Notify>> {
    let interrupt = Arc::new(Notify::new());
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let first = Arc::clone(&interrupt);
    std::thread::spawn(move || {
        let mut signals = signals.forever();
        signals.next();
        first.notify_one();
        signals.next();
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(interrupt)
}
