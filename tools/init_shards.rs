//! `init-shards`: fills every missing or empty shard, as many pools at once as there are cores.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::iter;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Parser;
use indicatif::{HumanCount, MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::runtime::Runtime;
use tombola::Exit;
use tombola::internals::Ledger;
use tombola::internals::fleet::{Fleet, Membership};
use tombola::internals::refill::{Built, Refill, build};
use tombola::internals::{Config, Location, Mode, Overrides, PoolConfig, PoolName};
use tombola::internals::{Folder, PoolFiles, PoolPaths, ShardFiles, ShardIndex};
use tombola::internals::{shard, sqlite};

/// Fills every missing or empty shard with numbers that the ledger does not have. Shards that still
/// have numbers are not changed.
#[derive(Debug, Parser)]
#[command(version, after_help = Exit::table())]
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

/// A row of the table at the end.
struct Line {
    shard: String,
    rows: u64,
    ledger_total: u64,
    seconds: Option<f64>,
}

static CANCELLED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => Exit::Done.into(),
        Err(error) => {
            // Each error text includes its causes.
            eprintln!("Error: {error}");
            Exit::of(&error).into()
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    tombola::internals::telemetry::init(tombola::internals::telemetry::LogFormat::Text);
    sqlite::check_version().map_err(anyhow::Error::msg)?;
    let config = Config::load(&Overrides {
        location: arguments.location,
        pool: arguments.pool,
        shards: arguments.shards,
        shard_size: arguments.size,
        ..Overrides::default()
    })?;
    cancel_on_signal().map_err(|error| anyhow!("can't handle signals: {error}"))?;

    let folder = Folder::open(&config.dir, Mode::Sharded, config.fleet.is_some(), Duration::ZERO)?;
    let runtime = Runtime::new().map_err(|error| anyhow!("can't start the runtime: {error}"))?;
    let memberships = match &config.fleet {
        Some(fleet) => runtime.block_on(Fleet::join(fleet, &config.pools, &folder))?.memberships,
        None => Vec::new(),
    };
    let memberships = memberships.into_iter().map(Some).chain(iter::repeat_with(|| None));
    let pools = Mutex::new(config.pools.iter().zip(memberships).enumerate());
    let shards = folder.shards()?;
    let filling = Filling { folder, shards, runtime, bars: MultiProgress::new() };
    let filled = thread::scope(|scope| {
        // A build keeps a core busy.
        let fillers: Vec<_> =
            (0..num_cpus::get()).map(|_| scope.spawn(|| filling.fill_pools(&pools))).collect();
        fillers
            .into_iter()
            .map(|filler| filler.join().expect("filling does not panic"))
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    let mut filled: Vec<_> = filled.into_iter().flatten().collect();
    filled.sort_by_key(|&(position, _)| position);
    Ok(print_table(filled.iter().flat_map(|(_, lines)| lines))?)
}

/// The state that the threads share.
struct Filling {
    folder: Folder,
    /// The shards of each pool that had a file at the start.
    shards: BTreeMap<PoolName, BTreeSet<ShardIndex>>,
    runtime: Runtime,
    bars: MultiProgress,
}

impl Filling {
    /// Fills pools until none is left. Returns the position of each and the rows of its table.
    fn fill_pools<'p>(
        &self,
        pools: &Mutex<impl Iterator<Item = (usize, (&'p PoolConfig, Option<Membership>))>>,
    ) -> anyhow::Result<Vec<(usize, Vec<Line>)>> {
        let mut filled = Vec::new();
        loop {
            let next = pools.lock().expect("the iterator does not panic").next();
            let Some((position, (pool, membership))) = next else {
                return Ok(filled);
            };
            filled.push((position, self.fill_pool(pool, membership)?));
        }
    }

    fn fill_pool(
        &self,
        config: &PoolConfig,
        mut membership: Option<Membership>,
    ) -> anyhow::Result<Vec<Line>> {
        let share = membership.as_ref().map(|membership| &membership.share);
        let shards = self.shards.get(&config.name).cloned().unwrap_or_default();
        let opened = self.folder.open_pool(config, &shards, share, false)?;
        let PoolFiles { paths, mut ledger, shards } = opened;
        let mut lines = Vec::new();
        for files in shards.iter().filter(|files| files.index.0 < config.shards) {
            let wanted = ledger.partitions_wanted(config.shard_size.into());
            if wanted > 0
                && let Some(Membership { claims, .. }) = &mut membership
                && !claims.none_left()
            {
                ledger.hold(&self.runtime.block_on(claims.claim(wanted))?);
            }
            lines.push(fill_shard(&mut ledger, &paths, config, files, &self.bars)?);
        }
        ledger.close()?;
        Ok(lines)
    }
}

/// Cancels the builds at the first signal, and ends the process at the second.
fn cancel_on_signal() -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    thread::spawn(move || {
        for _ in signals.forever() {
            if CANCELLED.swap(true, Ordering::Relaxed) {
                std::process::exit(Exit::Aborted as i32);
            }
        }
    });
    Ok(())
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
            live: files.live.as_ref().map(|live| live.label.generation),
            rows: config.shard_size.into(),
        };
        let progress = Progress::begin(&name, refill.rows, bars);
        let mut step = |values| progress.step(values);
        match build(ledger, paths, &refill, &mut step) {
            Ok(Built::Batch(_) | Built::Adopted) => progress.end(started),
            Ok(Built::Exhausted) => {
                progress.say("the range is used up, so there is nothing to fill it with");
                return Ok(line);
            }
            Err(error) if error.is_cancelled() => {
                anyhow::bail!("stopped at {name}; run init-shards again to continue")
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

/// A progress bar on a terminal, plain lines elsewhere.
struct Progress {
    name: String,
    bar: ProgressBar,
    /// Numbers drawn plus numbers written: each number counts twice.
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

fn print_table<'l>(lines: impl Iterator<Item = &'l Line>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{:<24} {:>12} {:>16} {:>8}", "shard", "rows", "ledger total", "seconds")?;
    for Line { shard, rows, ledger_total, seconds } in lines {
        let seconds = seconds.map_or("-".to_owned(), |seconds| format!("{seconds:.1}"));
        writeln!(out, "{shard:<24} {rows:>12} {ledger_total:>16} {seconds:>8}")?;
    }
    out.flush()
}
