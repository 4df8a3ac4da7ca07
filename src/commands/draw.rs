//! `tombola draw`: draws many numbers or codes of a pool into a file. Each chunk of the draw is a request with a
//! key of its own, so a draw that was interrupted is continued by the same command, and has the same numbers.

mod chunks;
mod output;

use std::fmt;
use std::io::{self, IsTerminal};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::{ValueEnum, value_parser};
use indicatif::{HumanCount, ProgressBar, ProgressState, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use self::chunks::{Chunks, Requests};
use self::output::{Output, Paths};
use super::client;
use super::exit::{Ended, Exit};
use crate::figures::thousands;
use crate::receipts::KEY_BYTES_MAX;

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    target: client::Target,
    /// The pool
    #[arg(long, value_name = "NAME")]
    pool: String,
    /// How many numbers or codes to draw, up to 1,000,000,000
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000_000))]
    count: u32,
    /// The name of this draw. Each key gets its own numbers, and the same key gets the same ones again
    #[arg(long)]
    key: Key,
    /// File for the numbers; - is standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Format of the file [default: by the extension of FILE, else csv]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Text that the server notes with the draw
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Numbers in one request [default: as many as the server allows]
    #[arg(long, value_name = "N")]
    chunk: Option<NonZeroU32>,
    /// How long to keep trying if the server does not respond or has no numbers
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u32,
    /// File with a token of the scope draw [default: the token in TOMBOLA_TOKEN]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The key of a draw: visible ASCII characters that need no escaping in a header.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
struct Key(String);

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\\');
        match text.chars().find(|&c| !fits(c)) {
            Some(c) => Err(format!(r#"{c:?} is not visible ASCII, or it is '"' or '\'"#)),
            None if text.is_empty() => Err("a key has at least one character".to_owned()),
            None => Ok(Self(text.to_owned())),
        }
    }
}

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Format {
    /// One number or code a line
    Csv,
    /// One JSON number or string a line
    Ndjson,
    /// One JSON array
    Json,
}

impl Format {
    /// Returns the format that the file's name implies.
    fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Self::Json,
            Some("ndjson" | "jsonl") => Self::Ndjson,
            _ => Self::Csv,
        }
    }

    /// Returns the media type of the responses that the file is made of.
    fn media_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv",
            Self::Ndjson | Self::Json => "application/x-ndjson",
        }
    }
}

/// A draw. The same draw has the same file, byte for byte.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
struct Draw {
    pool: String,
    count: u32,
    key: Key,
    label: Option<String>,
    format: Format,
    /// The numbers in each chunk except the last one. It can't change within a draw, because the server refuses
    /// a key that was used with another count.
    chunk: NonZeroU32,
}

impl Draw {
    /// Returns the number of chunks, which are counted from 1.
    fn chunks(&self) -> u32 {
        self.count.div_ceil(self.chunk.get())
    }

    /// Returns how many numbers a chunk has.
    fn count_of(&self, chunk: u32) -> u32 {
        self.chunk.get().min(self.count - self.count_before(chunk))
    }

    /// Returns how many numbers the chunks before this one have.
    fn count_before(&self, chunk: u32) -> u32 {
        (chunk - 1).saturating_mul(self.chunk.get()).min(self.count)
    }

    fn key_of(&self, chunk: u32) -> String {
        format!("{}/{chunk}", self.key.0)
    }

    /// Returns the part of the file that a chunk becomes. Each of its lines ends with a line break.
    fn part(&self, chunk: u32, lines: Vec<u8>) -> Vec<u8> {
        if self.format != Format::Json {
            return lines;
        }
        let mut part = Vec::with_capacity(lines.len() * 9 / 8 + 8);
        part.extend_from_slice(if chunk == 1 { b"[\n" } else { b",\n" });
        for &byte in lines.strip_suffix(b"\n").unwrap_or(&lines) {
            if byte == b'\n' {
                part.push(b',');
            }
            part.push(byte);
        }
        if chunk == self.chunks() {
            part.extend_from_slice(b"\n]\n");
        }
        part
    }
}

impl fmt::Display for Draw {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} drawn from {}", thousands(self.count.into()), self.pool)
    }
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    let credentials = client::credentials(flags.token_file)?;
    let server = flags.target.server()?;
    let paths = (flags.out != Path::new("-")).then(|| Paths::new(&flags.out));
    let record = paths.as_ref().map(|paths| paths.record(&flags.key)).transpose()?.flatten();
    let patience = Duration::from_secs(flags.patience.into());
    super::block_on(async {
        let requests = Requests::new(server, credentials, patience);
        let chunk = match flags.chunk.or(record.as_ref().map(|record| record.draw.chunk)) {
            Some(chunk) => chunk,
            None => requests.count_limit().await?,
        };
        let draw = Draw {
            pool: flags.pool,
            count: flags.count,
            key: flags.key,
            label: flags.label,
            format: flags.format.unwrap_or_else(|| Format::of(&flags.out)),
            chunk,
        };
        if draw.key_of(draw.chunks()).len() > KEY_BYTES_MAX {
            let problem = format!(
                "--key is too long: the key of the last chunk, KEY/{}, may have {KEY_BYTES_MAX} characters",
                draw.chunks()
            );
            return Err(Ended::error(Exit::Settings, problem));
        }
        let mut output = match paths {
            None => Output::stdout(draw.clone()),
            Some(paths) => match paths.open(&draw, record)? {
                Some(output) => output,
                None => {
                    eprintln!("{} is complete already: {draw}", flags.out.display());
                    return Ok(());
                }
            },
        };
        let drawn = until_signal(fill(requests, &draw, &mut output)).await;
        drawn.map_err(|error| stopped(&error, &draw, &mut output))
    })
}

/// Returns the error of a draw that has ended early, with the advice to continue it. A command that the server
/// refuses has to be corrected instead.
fn stopped(error: &anyhow::Error, draw: &Draw, output: &mut Output) -> anyhow::Error {
    // If this fails too, a rerun continues from the record before.
    let _ = output.record();
    let exit = Exit::of(error);
    let mut message = error.to_string();
    if exit != Exit::Settings {
        let (missing, count) = (thousands(output.missing().into()), thousands(draw.count.into()));
        let rerun = output.rerun();
        message.truncate(message.trim_end_matches('.').len());
        message += &format!(". {missing} of {count} numbers are missing: {rerun}");
    }
    Ended::error(exit, message)
}

/// Draws the chunks that the output does not have yet, and finishes it.
async fn fill(requests: Requests, draw: &Draw, output: &mut Output) -> anyhow::Result<()> {
    let (started, missing) = (Instant::now(), output.missing());
    let bar = progress_bar(draw, output);
    let mut chunks = Chunks::new(requests, draw.clone(), output.next_chunk());
    while let Some(lines) = chunks.next().await? {
        output.append(lines)?;
        bar.set_position((draw.count - output.missing()).into());
    }
    output.finish()?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let rate = thousands((f64::from(missing) / seconds) as u64);
    eprintln!("{output} is complete: {draw} in {seconds:.1} s, {rate} a second");
    Ok(())
}

/// Returns a bar that is visible if standard error is a terminal to which the numbers are not written.
fn progress_bar(draw: &Draw, output: &Output) -> ProgressBar {
    if output.is_stdout() && io::stdout().is_terminal() {
        return ProgressBar::hidden();
    }
    let rate = |state: &ProgressState, out: &mut dyn fmt::Write| {
        // Writing to the bar's own buffer does not fail.
        let _ = write!(out, "{} a second", HumanCount(state.per_sec() as u64));
    };
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar} {human_pos} of {human_len}, {rate}, {eta} left",
    )
    .expect("the template is valid")
    .with_key("rate", rate);
    let bar = ProgressBar::new(draw.count.into()).with_style(style).with_message(draw.pool.clone());
    bar.set_position((draw.count - output.missing()).into());
    bar.reset_eta();
    bar
}

/// Waits for the draw, but not beyond the first Ctrl-C or SIGTERM.
async fn until_signal(drawing: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let deaf = |error| anyhow::anyhow!("can't listen for signals: {error}");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(deaf)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(deaf)?;
    tokio::select! {
        drawn = drawing => return drawn,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Err(Ended::error(Exit::Aborted, "stopped by a signal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(count: u32, chunk: u32) -> Draw {
        Draw {
            pool: "int".to_owned(),
            count,
            key: "spring26".parse().unwrap(),
            label: None,
            format: Format::Json,
            chunk: NonZeroU32::new(chunk).unwrap(),
        }
    }

    #[test]
    fn the_chunks_of_a_draw_add_up_to_its_count() {
        for (count, chunk, chunks) in [
            (1, 1, 1),
            (1, 10_000, 1),
            (10_000, 10_000, 1),
            (10_001, 10_000, 2),
            (1_000_000_000, 1, 1_000_000_000),
            (1_000_000_000, u32::MAX, 1),
        ] {
            let draw = draw(count, chunk);
            assert_eq!(draw.chunks(), chunks);
            assert_eq!(draw.count_before(1), 0);
            assert_eq!(draw.count_before(chunks) + draw.count_of(chunks), count);
            assert_eq!(draw.count_before(chunks + 1), count);
        }
        assert_eq!(draw(10_001, 10_000).key_of(2), "spring26/2");
    }

    #[test]
    fn the_parts_of_an_array_are_json() {
        let draw = draw(5, 2);
        let parts = [(1, "1\n2.50\n"), (2, "\"a,b\"\n4\n"), (3, "5\n")];
        let file: Vec<u8> = parts
            .into_iter()
            .flat_map(|(chunk, lines)| draw.part(chunk, lines.as_bytes().to_vec()))
            .collect();
        assert_eq!(String::from_utf8(file).unwrap(), "[\n1,\n2.50,\n\"a,b\",\n4,\n5\n]\n");
    }

    #[test]
    fn a_key_needs_no_escaping() {
        for key in ["a", "spring26", "2026-03/lot:7", "!#[]~"] {
            assert_eq!(key.parse::<Key>().unwrap().0, key);
        }
        for key in ["", "a b", "a\"", "a\\", "\u{e9}", "a\n"] {
            assert!(key.parse::<Key>().is_err(), "{key:?}");
        }
    }
}
