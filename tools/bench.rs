//! Whole-process comparisons: the real binaries against a control, in turn, in one run.
//!
//! `cargo bench --bench whole -- --help` says what there is. Each row is measured in pairs, product and
//! control one after the other (A B A B …), and reported as the median of the pairs' ratios: on a noisy
//! machine a ratio holds where a figure does not. A row during which a side gave a wrong answer is not
//! reported.
//!
//! `rows` has what is compared, `side` the processes, `drive` the load, `control` what the product is
//! held against, `report` the table.

#![forbid(unsafe_code)]

#[path = "bench/control.rs"]
mod control;
#[path = "bench/drive.rs"]
mod drive;
#[path = "bench/fill.rs"]
mod fill;
#[path = "bench/fleet.rs"]
mod fleet;
#[path = "bench/growth.rs"]
mod growth;
#[path = "bench/peers.rs"]
mod peers;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/requests.rs"]
mod requests;
#[path = "bench/side.rs"]
mod side;
#[path = "bench/start.rs"]
mod start;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use report::Report;

/// Measures tombola against a control, in turn, and prints a table.
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
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured, and how long.
#[derive(Clone, Debug, clap::Args)]
struct Plan {
    /// Only these parts [default: all but growth, peers and fleet]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PARTS")]
    only: Vec<Part>,
    /// Pairs of runs for each row
    #[arg(long, default_value_t = 5, value_name = "N")]
    pairs: usize,
    /// Length of a run under load, in seconds
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    seconds: f64,
    /// Length of the run without a pause, at full load with the default settings, in seconds
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    long: f64,
    /// Values in the ledger at the end of the part growth
    #[arg(long, default_value_t = 200_000_000, value_name = "N")]
    to: u64,
    /// Values of a draw between the sizes that the part growth reports: with more, it is there sooner
    #[arg(long, default_value_t = growth::BATCH, value_name = "N")]
    stride: u64,
    /// Redis behind webdis too, where both are installed: the same as --only peers beside the rest
    #[arg(long)]
    peers: bool,
    /// Folder for data and results; it must have space for what is filled
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    dir: PathBuf,
}

impl Plan {
    fn wants(&self, part: Part) -> bool {
        match part {
            Part::Growth | Part::Fleet => self.only.contains(&part),
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
    /// Requests/s and CPU per request against a constant answer
    Requests,
    /// Numbers/s with ?count=N, shards full and being refilled
    Batches,
    /// A long run with the default settings: what is answered 503
    Dry,
    /// Ten million numbers against plain inserts
    Fill,
    /// Time to the first number
    Start,
    /// Cost of a draw as the ledger grows, with a plot
    Growth,
    /// Redis behind webdis
    Peers,
    /// Instances that share a space in one etcd node
    Fleet,
}

#[derive(Debug, Subcommand)]
enum Child {
    /// A bare axum::serve that returns a constant
    #[command(hide = true)]
    Constant { length: usize },
    /// Plain inserts of as many sorted rows
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
    if plan.wants(Part::Growth) {
        growth::growth(plan, &mut report)?;
    }
    if plan.wants(Part::Peers) {
        peers::peers(plan, &mut report)?;
    }
    if plan.wants(Part::Fleet) {
        fleet::fleet(plan, &mut report)?;
    }
    report.print(&plan.dir.join("bench.json"))
}
