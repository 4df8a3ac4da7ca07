//! `init-shards`: fills every missing or empty shard, the pools side by side.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::anyhow;
use clap::Parser;
use indicatif::{HumanCount, MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tombola::config::{Config, Location, Mode, Overrides, PoolConfig};
use tombola::folder::{Folder, PoolFiles, PoolPaths, ShardFiles};
use tombola::ledger::Ledger;
use tombola::refill::{Built, Refill, build};
use tombola::{shard, sqlite};

/// Fills every missing or empty shard with numbers that the ledger does not have. Run again, it
/// changes nothing that is not empty.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    location: Location,
    /// Only this pool
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,
    /// Shards of each pool, instead of pools.NAME.shards
    #[arg(long, value_name = "N")]
    shards: Option<u64>,
    /// Numbers in a shard, instead of pools.NAME.shard_size
    #[arg(long, value_name = "M")]
    size: Option<u64>,
}

/// A line of the table at the end.
struct Line {
    shard: String,
    rows: u64,
    ledger_total: u64,
    seconds: Option<f64>,
}

static CANCELLED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Each error tells the whole story, its causes included.
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    tombola::telemetry::init(tombola::telemetry::LogFormat::Text);
    sqlite::check_version().map_err(anyhow::Error::msg)?;
    let config = Config::load(&Overrides {
        location: arguments.location,
        pool: arguments.pool,
        shards: arguments.shards,
        shard_size: arguments.size,
        ..Overrides::default()
    })?;
    cancel_on_signal().map_err(|error| anyhow!("can't listen to signals: {error}"))?;

    let folder = Folder::open(&config.dir, Mode::Sharded)?;
    let bars = MultiProgress::new();
    let lines: Vec<Line> = thread::scope(|scope| {
        let (folder, bars) = (&folder, &bars);
        let fillers: Vec<_> = config
            .pools
            .iter()
            .map(|pool| scope.spawn(move || fill_pool(folder, pool, bars)))
            .collect();
        fillers
            .into_iter()
            .map(|filler| filler.join().expect("filling does not panic"))
            .collect::<anyhow::Result<Vec<_>>>()
    })?
    .into_iter()
    .flatten()
    .collect();
    Ok(print_table(&lines)?)
}

/// The first signal ends the builds, the second the process.
fn cancel_on_signal() -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    thread::spawn(move || {
        for _ in signals.forever() {
            if CANCELLED.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
    Ok(())
}

fn fill_pool(
    folder: &Folder,
    config: &PoolConfig,
    bars: &MultiProgress,
) -> anyhow::Result<Vec<Line>> {
    let PoolFiles { paths, mut ledger, shards } = folder.open_pool(config)?;
    let mut lines = Vec::new();
    for files in shards.iter().filter(|files| files.index.0 < config.shards) {
        lines.push(fill_shard(&mut ledger, &paths, config, files, bars)?);
    }
    ledger.close()?;
    Ok(lines)
}

fn fill_shard(
    ledger: &mut Ledger,
    paths: &PoolPaths,
    config: &PoolConfig,
    files: &ShardFiles,
    bars: &MultiProgress,
) -> anyhow::Result<Line> {
    let started = Instant::now();
    let name = paths.shard_name(files.index);
    let left = match &files.live {
        Some(_) => unused_rows(paths, files)?,
        None => 0,
    };
    let mut line =
        Line { shard: name.clone(), rows: left, ledger_total: ledger.count(), seconds: None };
    if left > 0 {
        return Ok(line);
    }
    if files.standby.is_none() {
        let refill = Refill {
            shard: files.index,
            live: files.live.as_ref().map(|label| label.generation),
            rows: config.shard_size.into(),
        };
        let progress = Progress::begin(&name, refill.rows, bars);
        let mut step = |values| progress.step(values);
        match build(ledger, paths, &refill, &mut step) {
            Ok(Built::Batch(_) | Built::Adopted) => progress.end(started),
            Ok(Built::Exhausted) => {
                progress.say("the range is used up: nothing to fill it with");
                return Ok(line);
            }
            Err(error) if error.is_cancelled() => {
                anyhow::bail!("stopped at {name}; run init-shards again to go on")
            }
            Err(error) => anyhow::bail!("can't fill {name}: {error}"),
        }
    }
    paths.install_standby(files.index)?;
    line.rows = unused_rows(paths, files)?;
    line.ledger_total = ledger.count();
    line.seconds = Some(started.elapsed().as_secs_f64());
    Ok(line)
}

fn unused_rows(paths: &PoolPaths, files: &ShardFiles) -> anyhow::Result<u64> {
    let name = paths.shard_name(files.index);
    shard::unused_rows(&paths.live(files.index))
        .map_err(|error| anyhow!("can't read {name}: {error}"))
}

/// A bar on a terminal, plain lines elsewhere.
struct Progress {
    name: String,
    bar: ProgressBar,
    /// Each number is a step twice: when it is drawn and when it is written.
    steps: Cell<u64>,
    on_terminal: bool,
}

impl Progress {
    fn begin(name: &str, rows: u64, bars: &MultiProgress) -> Self {
        let rate = |state: &ProgressState, out: &mut dyn fmt::Write| {
            let per_second = HumanCount(state.per_sec() as u64);
            // Writing to the bar's own buffer does not fail.
            let _ = write!(out, "{per_second} a second");
        };
        let style = ProgressStyle::with_template(
            "{msg:20} {wide_bar} {human_pos} of {human_len}, {rate}, {eta} left",
        )
        .expect("the template is valid")
        .with_key("rate", rate);
        let bar = bars.add(ProgressBar::new(rows).with_style(style)).with_message(name.to_owned());
        let progress = Self {
            name: name.to_owned(),
            bar,
            steps: Cell::new(0),
            on_terminal: io::stderr().is_terminal(),
        };
        progress.say(&format!("filling with {rows} numbers"));
        progress
    }

    fn step(&self, values: u64) -> ControlFlow<()> {
        self.steps.set(self.steps.get() + values);
        self.bar.set_position(self.steps.get() / 2);
        match CANCELLED.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn end(&self, started: Instant) {
        self.bar.finish();
        self.say(&format!("full after {:.1} s", started.elapsed().as_secs_f64()));
    }

    fn say(&self, what: &str) {
        if !self.on_terminal {
            eprintln!("{}: {what}", self.name);
        }
    }
}

fn print_table(lines: &[Line]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{:<24} {:>12} {:>16} {:>8}", "shard", "rows", "ledger total", "seconds")?;
    for Line { shard, rows, ledger_total, seconds } in lines {
        let seconds = seconds.map_or("-".to_owned(), |seconds| format!("{seconds:.1}"));
        writeln!(out, "{shard:<24} {rows:>12} {ledger_total:>16} {seconds:>8}")?;
    }
    out.flush()
}
