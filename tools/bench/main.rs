//! Whole-process benchmarks: the real binaries against a control, in turn, in one run.
//!
//! `cargo bench --bench whole -- --help` lists the parts. Most rows are measured in pairs, product and
//! control one after the other (A B A B …), and reported as the median of the pairs' ratios: on a noisy
//! machine, a ratio is more stable than a figure. A row is not reported if a side gave a wrong response.
//!
//! The parts are `requests`, `fill`, `start`, `receipts`, `import`, `reload`, `growth`, `pools`, `modes`, `peers` and
//! `fleet`. `side` has the processes, `drive` the load, `control` and `nginx` the servers to compare with, `report` the
//! table.

#![forbid(unsafe_code)]

mod control;
mod drive;
mod fill;
mod fleet;
mod growth;
mod import;
mod modes;
mod nginx;
mod peers;
mod pools;
mod receipts;
mod reload;
mod report;
mod requests;
mod side;
mod start;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use report::Report;

/// Measures tombola against a control, in turn, and prints a table
#[derive(Debug, Parser)]
#[command(
    name = "whole",
    bin_name = "cargo bench --bench whole --",
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    child: Option<Child>,
    #[command(flatten)]
    plan: Plan,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// The parts to measure, and how long each takes.
#[derive(Clone, Debug, clap::Args)]
struct Plan {
    /// Only these parts [default: all except receipts, import, reload, growth, pools, modes, peers and fleet]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PARTS")]
    only: Vec<Part>,
    /// Pairs of runs for each row
    #[arg(long, default_value_t = 5, value_name = "N")]
    pairs: usize,
    /// Length of a run under load, in seconds
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    seconds: f64,
    /// Length of the run of the part dry, in seconds
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    long: f64,
    /// Values in the ledger at the end of the part growth
    #[arg(long, default_value_t = 200_000_000, value_name = "N")]
    to: u64,
    /// Values in the ledger of the part import, which imports a tenth of as many
    #[arg(long, default_value_t = 100_000_000, value_name = "N")]
    into: u64,
    /// Receipts in the full file of the part receipts
    #[arg(long, default_value_t = 100_000_000, value_name = "N")]
    receipts: u64,
    /// Values of a draw between the sizes that the part growth reports: larger draws reach them sooner
    #[arg(long, default_value_t = growth::BATCH, value_name = "N")]
    stride: u64,
    /// Pools of the part pools
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pools: u64,
    /// Measure the part peers in addition to the default ones
    #[arg(long)]
    peers: bool,
    /// Folder for data and results, with space for the filled shards
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    dir: PathBuf,
}

impl Plan {
    fn wants(&self, part: Part) -> bool {
        match part {
            Part::Growth
            | Part::Pools
            | Part::Modes
            | Part::Fleet
            | Part::Receipts
            | Part::Import
            | Part::Reload => self.only.contains(&part),
            Part::Peers => self.peers || self.only.contains(&part),
            _ => self.only.is_empty() || self.only.contains(&part),
        }
    }

    fn run(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Requests/s and CPU per request against a constant response, of axum and of nginx
    Requests,
    /// Numbers/s with ?count=N, shards full and being refilled
    Batches,
    /// A long run at full load with the default settings: the share of 503
    Dry,
    /// Ten million numbers against plain inserts
    Fill,
    /// Time to the first number
    Start,
    /// Requests that leave a receipt, with an empty and a full file of receipts, and `tombola draw`
    Receipts,
    /// An import into a stopped folder against filling as many numbers, and imports into a server under load
    Import,
    /// Reloads of a token, a new pool, and pools that are opened again, beside 2 and 200 pools
    Reload,
    /// Cost of a draw as the ledger grows, with a plot
    Growth,
    /// Many small pools: how soon the last one serves, and the memory, files, threads and disk of each
    Pools,
    /// The four modes, each on an empty folder: speed, CPU and disk as numbers are issued
    Modes,
    /// SPOP of a Redis behind webdis, where both are installed
    Peers,
    /// Instances that share a space in one etcd node, where etcd is installed
    Fleet,
}

/// The parts that put servers under load.
const LOADED: [Part; 8] = [
    Part::Requests,
    Part::Batches,
    Part::Dry,
    Part::Receipts,
    Part::Import,
    Part::Modes,
    Part::Peers,
    Part::Fleet,
];

#[derive(Debug, Subcommand)]
enum Child {
    /// A bare axum::serve that returns a constant
    #[command(hide = true)]
    Constant { length: usize },
    /// Plain inserts of sorted rows
    #[command(hide = true)]
    Inserts { dir: PathBuf, pools: u64, shards: u64, rows: u64 },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.child {
        Some(Child::Constant { length }) => control::constant(length),
        Some(Child::Inserts { dir, pools, shards, rows }) => {
            control::inserts(&dir, pools, shards, rows)
        }
        None => measure(&arguments.plan),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(plan: &Plan) -> anyhow::Result<()> {
    if LOADED.iter().any(|part| plan.wants(*part)) {
        drive::require_wrk()?;
    }
    std::fs::create_dir_all(&plan.dir)?;
    let mut report = Report::new();
    if plan.wants(Part::Requests) {
        requests::requests(plan, &mut report)?;
    }
    if plan.wants(Part::Batches) {
        requests::batches(plan, &mut report)?;
    }
    if plan.wants(Part::Dry) {
        requests::dry(plan, &mut report)?;
    }
    if plan.wants(Part::Fill) {
        fill::fill(plan, &mut report)?;
    }
    if plan.wants(Part::Start) {
        start::start(plan, &mut report)?;
    }
    if plan.wants(Part::Receipts) {
        receipts::receipts(plan, &mut report)?;
    }
    if plan.wants(Part::Import) {
        import::import(plan, &mut report)?;
    }
    if plan.wants(Part::Reload) {
        reload::reload(plan, &mut report)?;
    }
    if plan.wants(Part::Growth) {
        growth::growth(plan, &mut report)?;
    }
    if plan.wants(Part::Pools) {
        pools::pools(plan, &mut report)?;
    }
    if plan.wants(Part::Modes) {
        modes::modes(plan, &mut report)?;
    }
    if plan.wants(Part::Peers) {
        peers::peers(plan, &mut report)?;
    }
    if plan.wants(Part::Fleet) {
        fleet::fleet(plan, &mut report)?;
    }
    report.print(&plan.dir.join("bench.json"))
}
