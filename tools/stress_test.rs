//! `stress-test`: asks a server for numbers as fast as it answers, and checks that no number comes
//! twice.
//!
//! The tour, in the way of an answer:
//! - [`args`]: the command line, parsed and refused at the edge.
//! - [`client`]: one keep-alive connection.
//! - [`load`]: who asks what, and when; hands every ask on with the body it got.
//! - [`answer`]: what a body says, and whether it is what was asked for.
//! - [`seen`]: the numbers that ever came, as exact text.
//! - [`judge`]: what each ask came to; the only place that counts.
//! - [`journal`]: the console, the progress bar and the log.
//! - [`summary`]: the closing page, in [`tombola::figures`] for people.
//!
//! [`interrupts`] ends it early.
//!
//! Architecture invariant: two threads. One drives all the connections and looks at no body; the
//! other judges, prints and logs. So a slow terminal or disk never lengthens a latency, and on a
//! machine shared with the server the load costs at most two cores, mostly one.

#![forbid(unsafe_code)]

#[path = "stress_test/answer.rs"]
mod answer;
#[path = "stress_test/args.rs"]
mod args;
#[path = "stress_test/client.rs"]
mod client;
#[path = "stress_test/interrupts.rs"]
mod interrupts;
#[path = "stress_test/journal.rs"]
mod journal;
#[path = "stress_test/judge.rs"]
mod judge;
#[path = "stress_test/load.rs"]
mod load;
#[path = "stress_test/seen.rs"]
mod seen;
#[path = "stress_test/summary.rs"]
mod summary;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::sync::mpsc;

use crate::args::Args;
use crate::interrupts::Interrupts;
use crate::journal::Journal;
use crate::judge::{Judge, Tally};
use crate::load::LoadEnd;
use crate::seen::{Seen, SeenFile};

/// A number came twice, or something failed that should not have.
const EXIT_FAILED: u8 = 1;
/// The arguments, or the files they name, cannot be used. What clap exits with as well.
const EXIT_BAD_ARGUMENTS: u8 = 2;

/// Batches on their way to the judge. Each holds up to [`load::BATCH_ASKS`] asks or
/// [`load::BATCH_BODY_BYTES`], so this bounds the memory between the two threads to a few MB. When
/// it is full the load waits: a load that outran its judge would have to drop what it measured.
const BATCHES_ON_THE_WAY: usize = 16;

fn main() -> ExitCode {
    let args = Args::parse();
    let (seen, seen_file, journal) = match open_files(&args) {
        Ok(files) => files,
        Err(error) => {
            eprintln!("stress-test: {error:#}");
            return ExitCode::from(EXIT_BAD_ARGUMENTS);
        }
    };
    match run(&args, seen, seen_file, journal) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_FAILED),
        Err(error) => {
            eprintln!("stress-test: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// Everything on disk is opened before the first ask: a run that cannot be kept is not begun.
fn open_files(args: &Args) -> anyhow::Result<(Seen, Option<SeenFile>, Journal)> {
    let mut seen = Seen::new(args.pools.names());
    let seen_file = match &args.seen {
        Some(path) => Some(
            SeenFile::open(path, &mut seen)
                .with_context(|| format!("cannot use --seen {}", path.display()))?,
        ),
        None => None,
    };
    let journal = Journal::open(args)?;
    Ok((seen, seen_file, journal))
}

/// The whole run; true when nothing failed.
#[tokio::main(flavor = "current_thread")]
async fn run(
    args: &Args,
    seen: Seen,
    seen_file: Option<SeenFile>,
    mut journal: Journal,
) -> anyhow::Result<bool> {
    // Before the first ask, so that Ctrl-C never finds the default handler, which saves nothing.
    let mut interrupts = Interrupts::listen().context("cannot listen for Ctrl-C")?;

    let (address, first) = match client::reach(&args.url, args.timeout).await {
        Ok(reached) => reached,
        Err(error) => {
            let reason = format!(
                "cannot reach {}: {error}; start a server there, or name another with --url",
                args.url
            );
            journal.close_log(&reason).context("the log is not complete")?;
            anyhow::bail!(reason);
        }
    };

    let (batches, on_the_way) = mpsc::channel(BATCHES_ON_THE_WAY);
    let judge = Judge::new(args, seen, journal);
    let judging = tokio::task::spawn_blocking(move || judge.run(on_the_way));
    let end = load::run(args, address, first, batches, &mut interrupts).await;
    let judged = interrupts.meanwhile(judging).await;
    let (tally, journal) = judged.context("the judge died, which is a bug")?;
    let args = args.clone();
    let concluding = move || conclude(&args, &end, &tally, seen_file, journal);
    let concluded = interrupts.meanwhile(tokio::task::spawn_blocking(concluding));
    concluded.await.context("the end died, which is a bug")?
}

/// Saves what is to be remembered, then says what the run came to; true when nothing failed.
fn conclude(
    args: &Args,
    end: &LoadEnd,
    tally: &Tally,
    seen_file: Option<SeenFile>,
    journal: Journal,
) -> anyhow::Result<bool> {
    // The file first: a console that is gone must not cost what the next run has to know.
    let saved = seen_file.map(|file| file.save(&tally.seen)).transpose();
    let remembered_in = args.seen.as_deref().filter(|_| saved.is_ok());
    let summary = if args.json {
        summary::write_json(end, tally)
    } else {
        summary::write(args, end, tally, remembered_in, journal.log_path())
    };
    let logged = journal.close(&summary);
    saved.context("could not save --seen")?;
    logged.context("the log is not complete")?;
    Ok(tally.passed())
}
