//! A line for each attempt, on the console and in the log. Counts nothing.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::Context as _;

use crate::args::Args;
use crate::load::Attempt;
use crate::numbers::Numbers;
use crate::seen::Run;

/// Characters of a line on the console: the numbers of a large `--count` would fill it.
const CONSOLE_CHARS: usize = 160;

/// The result of an attempt.
#[derive(Debug)]
pub(crate) struct Verdict<'a> {
    pub(crate) kind: Cow<'static, str>,
    /// False for everything that a healthy server may do; `--help` has the list.
    pub(crate) is_failure: bool,
    /// Empty unless the response is a right one.
    pub(crate) numbers: Numbers<'a>,
    /// Those of the numbers that came before.
    pub(crate) duplicates: Vec<(&'a str, Run)>,
    /// More about an attempt without numbers.
    pub(crate) detail: String,
}

pub(crate) struct Journal {
    is_quiet: bool,
    console: Output,
    log: Output,
    /// Where the log is, unless there is to be none.
    pub(crate) log_path: Option<PathBuf>,
}

impl Journal {
    /// Creates the log. Its name has the time in UTC, unless `--log` names it.
    pub(crate) fn open(args: &Args) -> anyhow::Result<Self> {
        let now = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let log_path = match &args.log {
            _ if args.no_log => None,
            Some(path) => Some(path.clone()),
            None => Some(format!("stress_log_{}.txt", now.replace(':', "-")).into()),
        };
        let mut log = match &log_path {
            Some(path) => Output::new(File::create(path).with_context(|| {
                format!("cannot write the log {}; see --log and --no-log", path.display())
            })?),
            None => Output::new(io::sink()),
        };
        let command: Vec<String> = std::env::args().collect();
        log.write(&format!(
            "# {}\n# started {now}\n\
             # seconds\trequest\tattempt\ttype\tstatus\tlatency_us\tshards\toutcome\tnumbers or detail\n",
            command.join(" ")
        ));
        Ok(Self { is_quiet: args.quiet, console: Output::new(io::stdout()), log, log_path })
    }

    pub(crate) fn write(&mut self, attempt: &Attempt, verdict: &Verdict<'_>) {
        let Attempt { request, number, pool, .. } = attempt;
        let (status, latency) = match &attempt.result {
            Ok(response) => (response.status.to_string(), response.latency.as_micros().to_string()),
            Err(_) => ("-".to_owned(), "-".to_owned()),
        };
        let shards = verdict.numbers.shards.iter().map(|(name, count)| format!("{name}={count}"));
        let shards = shards.collect::<Vec<_>>().join(",");
        let Verdict { kind, numbers, detail, .. } = verdict;
        let numbers = numbers.texts.join(" ");
        let mut line = format!(
            "{request}\t{number}\t{pool}\t{status}\t{latency}\t{shards}\t{kind}\t{numbers}{detail}"
        );
        for (number, first) in &verdict.duplicates {
            line += &format!("\tREPEATED {number}, {first}");
        }
        if !self.is_quiet {
            let shown: String = line.chars().take(CONSOLE_CHARS).collect();
            self.console.write(&format!("#{shown}\n"));
        }
        self.log.write(&format!("{:.6}\t{line}\n", attempt.ended_after.as_secs_f64()));
    }

    /// Writes out all lines so far.
    pub(crate) fn flush(&mut self) {
        self.console.flush();
        self.log.flush();
    }

    /// Prints the summary. If the console was closed, the run has still ended as its exit code says.
    pub(crate) fn print(&mut self, summary: &str) {
        self.console.write(summary);
        self.console.flush();
    }

    /// Ends the log with a text.
    ///
    /// # Errors
    /// A part of the log is missing.
    pub(crate) fn close(mut self, text: &str) -> io::Result<()> {
        for line in text.lines() {
            self.log.write(format!("# {line}").trim_end());
            self.log.write("\n");
        }
        self.log.flush();
        self.log.result
    }
}

/// The console or the log. After an error, nothing more is written, and the run goes on.
struct Output {
    writer: BufWriter<Box<dyn Write + Send>>,
    result: io::Result<()>,
}

impl Output {
    fn new(writer: impl Write + Send + 'static) -> Self {
        Self { writer: BufWriter::new(Box::new(writer)), result: Ok(()) }
    }

    fn write(&mut self, text: &str) {
        if self.result.is_ok() {
            self.result = self.writer.write_all(text.as_bytes());
        }
    }

    fn flush(&mut self) {
        if self.result.is_ok() {
            self.result = self.writer.flush();
        }
    }
}
