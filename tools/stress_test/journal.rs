//! Writes down each outcome: a line on the console or a progress bar, and a line in the log.
//! Decides nothing and counts nothing.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Args;
use crate::judge::{Verdict, when};
use crate::load::Ask;
use tombola::figures::{thousands, time};

/// Numbers of one answer that the console shows; the log has all.
const NUMBERS_SHOWN: usize = 3;
/// Runs begun in the same second in the same folder that still find a name for their log.
const LOG_NAMES: u32 = 100;

/// How far the run has come, for the progress bar.
#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) requests: u64,
    pub(crate) elapsed: Duration,
    pub(crate) numbers: u64,
    pub(crate) repeats: u64,
    pub(crate) failures: u64,
}

/// Where outcomes are written. Lines gather until [`Journal::flush`].
#[derive(Debug)]
pub(crate) struct Journal {
    console: Console,
    log: Option<Log>,
}

#[derive(Debug)]
enum Console {
    Lines(String),
    Bar {
        bar: ProgressBar,
        duration: Option<Duration>,
    },
    /// Whoever read it has gone: the run goes on, for the log and the exit code.
    Gone,
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    lines: String,
    /// The first one; nothing is written after it.
    error: Option<io::Error>,
}

impl Journal {
    /// Begins the log, unless there is to be none.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(crate) fn open(args: &Args) -> anyhow::Result<Self> {
        let log = match &args.log {
            _ if args.no_log => None,
            Some(path) => {
                let file = File::create(path)
                    .with_context(|| format!("cannot write --log {}", path.display()))?;
                Some(Log::new(path.clone(), file))
            }
            None => Some(Log::under_new_name().context("cannot write a log here; see --no-log")?),
        };
        let console = if args.quiet { bar(args) } else { Console::Lines(String::new()) };
        Ok(Self { console, log })
    }

    pub(crate) fn log_path(&self) -> Option<&Path> {
        self.log.as_ref().map(|log| log.path.as_path())
    }

    /// Notes one outcome.
    pub(crate) fn write(&mut self, ask: &Ask, pool: &str, verdict: &Verdict<'_>) {
        // Writing into a String cannot fail.
        if let Console::Lines(lines) = &mut self.console {
            let _ = write_console_line(lines, ask, pool, verdict);
        }
        if let Some(log) = &mut self.log {
            let _ = write_log_line(&mut log.lines, ask, pool, verdict);
        }
    }

    /// Puts out what has gathered.
    pub(crate) fn flush(&mut self, progress: &Progress) {
        match &mut self.console {
            Console::Lines(lines) => {
                let written = write_out(lines.as_bytes());
                lines.clear();
                if written.is_err() {
                    self.console = Console::Gone;
                }
            }
            Console::Bar { bar, duration } => {
                bar.set_position(match duration {
                    Some(_) => millis(progress.elapsed),
                    None => progress.requests,
                });
                bar.set_message(progress.to_string());
            }
            Console::Gone => {}
        }
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// Ends the log with the summary, which the console gets as well.
    ///
    /// # Errors
    /// The log is not complete.
    pub(crate) fn close(mut self, summary: &str) -> io::Result<()> {
        if let Console::Bar { bar, .. } = &self.console {
            bar.finish_and_clear();
        }
        if !matches!(self.console, Console::Gone) {
            // Nobody is left to be told that nobody reads this; the exit code says what it said.
            let _ = write_out(summary.as_bytes());
        }
        self.close_log(summary)
    }

    /// Ends the log with a reason; the console is the caller's.
    ///
    /// # Errors
    /// The log is not complete.
    pub(crate) fn close_log(&mut self, last_words: &str) -> io::Result<()> {
        let Some(log) = &mut self.log else {
            return Ok(());
        };
        for line in last_words.lines() {
            log.lines.push_str(if line.is_empty() { "#" } else { "# " });
            log.lines.push_str(line);
            log.lines.push('\n');
        }
        log.flush();
        log.error.take().map_or(Ok(()), Err)
    }
}

impl Log {
    fn new(path: PathBuf, file: File) -> Self {
        let command: Vec<String> = std::env::args().collect();
        let started = humantime::format_rfc3339_millis(SystemTime::now());
        let lines = format!(
            "# {}\n# begun {started}\n\
             # seconds\trequest\tattempt\ttype\tstatus\tlatency_us\tshards\toutcome\tnumbers or detail\n",
            command.join(" "),
        );
        Self { path, file, lines, error: None }
    }

    /// `stress_log_<time>.txt`, in UTC, and without the colons that some file systems refuse.
    fn under_new_name() -> io::Result<Self> {
        let now =
            humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace(':', "-");
        for attempt in 1..LOG_NAMES {
            let suffix = if attempt == 1 { String::new() } else { format!("_{attempt}") };
            let path = PathBuf::from(format!("stress_log_{now}{suffix}.txt"));
            match File::create_new(&path) {
                Ok(file) => return Ok(Self::new(path, file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::from(io::ErrorKind::AlreadyExists))
    }

    fn flush(&mut self) {
        if self.error.is_none() {
            self.error = self.file.write_all(self.lines.as_bytes()).err();
        }
        self.lines.clear();
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} numbers", thousands(self.numbers))?;
        if self.repeats > 0 {
            write!(f, ", {} REPEATED", thousands(self.repeats))?;
        }
        if self.failures > 0 {
            write!(f, ", {} failures", thousands(self.failures))?;
        }
        Ok(())
    }
}

fn bar(args: &Args) -> Console {
    let (length, template) = match args.duration {
        Some(duration) => (millis(duration), "{wide_bar} {elapsed} of {prefix}  {msg}"),
        None => (args.requests, "{wide_bar} {human_pos} of {human_len} requests  {msg}"),
    };
    let bar = ProgressBar::new(length)
        .with_style(ProgressStyle::with_template(template).expect("checked by the tests' --quiet"))
        .with_prefix(args.duration.map(time).unwrap_or_default());
    Console::Bar { bar, duration: args.duration }
}

fn write_out(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

fn write_console_line(
    line: &mut String,
    ask: &Ask,
    pool: &str,
    verdict: &Verdict<'_>,
) -> std::fmt::Result {
    write!(line, "#{:<7} {pool:<6} ", ask.request)?;
    match (&ask.outcome, &verdict.answer) {
        (Ok(reply), Some(answer)) => {
            write!(line, "{}  ", reply.status)?;
            write_shards(line, answer.shards())?;
            let numbers = answer.numbers();
            let count = numbers.len();
            for number in numbers.take(NUMBERS_SHOWN) {
                write!(line, "  {number}")?;
            }
            if count > NUMBERS_SHOWN {
                write!(line, "  … {count} numbers")?;
            }
            write!(line, "  ({})", time(reply.latency))?;
        }
        (Ok(reply), None) => {
            write!(line, "{}  ", reply.status)?;
            write_failure(line, verdict)?;
        }
        (Err(_), _) => {
            line.push_str("-    ");
            write_failure(line, verdict)?;
        }
    }
    for (number, sighting) in &verdict.repeats {
        write!(line, "  REPEATED {number}, {}", when(*sighting))?;
    }
    line.push('\n');
    Ok(())
}

fn write_log_line(
    line: &mut String,
    ask: &Ask,
    pool: &str,
    verdict: &Verdict<'_>,
) -> std::fmt::Result {
    let seconds = ask.ended_after.as_secs_f64();
    write!(line, "{seconds:.6}\t{}\t{}\t{pool}\t", ask.request, ask.attempt)?;
    match &ask.outcome {
        Ok(reply) => write!(line, "{}\t{}\t", reply.status, reply.latency.as_micros())?,
        Err(_) => line.push_str("-\t-\t"),
    }
    match &verdict.answer {
        Some(answer) => {
            write_shards(line, answer.shards())?;
            write!(line, "\t{}\t", verdict.kind)?;
            for (place, number) in answer.numbers().enumerate() {
                line.push_str(if place == 0 { "" } else { " " });
                line.push_str(number);
            }
        }
        None => write!(line, "-\t{}\t{}", verdict.kind, verdict.detail)?,
    }
    for (number, sighting) in &verdict.repeats {
        write!(line, "\tREPEATED {number}, {}", when(*sighting))?;
    }
    line.push('\n');
    Ok(())
}

/// What came instead of numbers. When it was to be expected, its status says what it is.
fn write_failure(line: &mut String, verdict: &Verdict<'_>) -> std::fmt::Result {
    if !verdict.kind.is_expected() {
        write!(line, "FAILED, {}: ", verdict.kind)?;
    }
    line.write_str(&verdict.detail)
}

/// One shard by its name, several with their share of the numbers.
fn write_shards<'a>(
    line: &mut String,
    shards: impl Iterator<Item = (&'a str, u64)>,
) -> std::fmt::Result {
    let mut shards = shards.peekable();
    let Some((first, count)) = shards.next() else {
        line.push('-');
        return Ok(());
    };
    line.push_str(first);
    if shards.peek().is_some() {
        write!(line, "={count}")?;
    }
    shards.try_for_each(|(shard, count)| write!(line, ",{shard}={count}"))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
