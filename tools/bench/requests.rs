//! Requests under load: against a constant response, in batches, and for a long time.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::Plan;
use crate::drive::{Load, Outcome, ask, drive};
use crate::nginx;
use crate::report::{Budget, Report, median, short};
use crate::side::{Side, Site};

const ONE: &[&str] = &["/random"];
const FLOAT: &[&str] = &["/random?type=float"];
pub(crate) const MIXED: &[&str] = &["/random", "/random?type=float"];

/// Shards so small that one is always being built.
const ALWAYS_REFILLED: &str =
    "[pools.int]\nshard_size = 200_000\n[pools.float]\nshard_size = 200_000\n";
const STRICT: &str = "[lease]\nrows = 0\n";
/// Shards that last for all runs of a row, so that no shard is built during them.
const NEVER_REFILLED: &str = "[refill]\nlow_water = 0.001\n\
     [pools.int]\nshard_size = 12_000_000\n[pools.float]\nenabled = false\n";

/// One run under load, and its cost for the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) outcome: Outcome,
    /// Server CPU per request, in microseconds.
    pub(crate) cpu: f64,
}

/// Loads a server.
pub(crate) fn run(side: &Side, load: Load<'_>) -> anyhow::Result<Run> {
    let before = side.cpu_seconds()?;
    let outcome = drive(side.address, load)?;
    let cpu = (side.cpu_seconds()? - before) * 1e6 / outcome.requests as f64;
    Ok(Run { outcome, cpu })
}

/// Waits until all pools of the server have all their shards.
pub(crate) fn wait_until_full(side: &Side) -> anyhow::Result<()> {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(120) {
        // The status is 503 as long as a pool has no shard.
        if let Ok(body) = ask(side.address, "/health") {
            let health: serde_json::Value = serde_json::from_slice(&body)?;
            let pools = health["pools"].as_object().context("/health names the pools")?;
            if pools.values().all(|pool| pool["shards"] == pool["shards_in_rotation"]) {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("the shards are not full after two minutes")
}

/// Measures requests/s and CPU per request, in pairs with a constant response of the same length.
pub(crate) fn requests(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let least = Some(Budget::AtLeast(1.0));
    let budget_at = |connections| if connections == 64 { least } else { None };
    let load = |paths, connections| Load { paths, connections, length: plan.run(), keyed: false };
    let site = Site::new(&plan.dir, "requests", "")?;
    site.fill()?;
    let side = site.serve()?;
    for connections in [1, 16, 64, 256] {
        pairs(plan, report, &side, load(ONE, connections), ("int", budget_at(connections)))?;
    }
    against_nginx(plan, report, &side)?;
    pairs(plan, report, &side, load(FLOAT, 64), ("float", least))?;
    pairs(plan, report, &side, load(MIXED, 64), ("int and float in turn", least))?;
    let peak = side.peak_memory()? as f64;
    report.figure(
        "peak memory under load, 10M numbers",
        "MB",
        &[peak / 1e6],
        Some(Budget::AtMost(150.0)),
        "",
    );
    side.stop()?;

    let site = Site::new(&plan.dir, "refilled", ALWAYS_REFILLED)?;
    site.fill()?;
    let side = site.serve()?;
    pairs(plan, report, &side, load(ONE, 64), ("int, shards always being refilled", least))?;
    side.stop()?;

    let site = Site::new(&plan.dir, "strict", STRICT)?;
    site.fill()?;
    let side = site.serve()?;
    for connections in [1, 16, 64, 256] {
        let budget = (connections == 256).then_some(Budget::AtLeast(0.7));
        pairs(plan, report, &side, load(ONE, connections), ("int, strict", budget))?;
    }
    side.stop()
}

pub(crate) fn pairs(
    plan: &Plan,
    report: &mut Report,
    product: &Side,
    load: Load<'_>,
    (what, budget): (&str, Option<Budget>),
) -> anyhow::Result<()> {
    let Load { paths, connections, .. } = load;
    let length = ask(product.address, paths[0])?.len();
    let control = Side::constant(length)?;
    let control_load = Load { paths: &[ONE[0]; 2][..paths.len()], ..load };
    let mut runs = Vec::new();
    for _ in 0..plan.pairs {
        runs.push((run(product, load)?, run(&control, control_load)?));
    }
    let refused: u64 = runs.iter().map(|(product, _)| product.outcome.refused).sum();
    let requests: u64 = runs.iter().map(|(product, _)| product.outcome.requests).sum();
    if runs.iter().any(|(_, control)| control.outcome.refused > 0) || refused * 100 > requests {
        bail!("{what}, {connections} connections: {refused} of {requests} responses were refusals");
    }
    let rate: Vec<_> =
        runs.iter().map(|(p, c)| (p.outcome.per_second(), c.outcome.per_second())).collect();
    let cpu: Vec<_> = runs.iter().map(|(p, c)| (p.cpu, c.cpu)).collect();
    let of = |pick: fn(&Outcome) -> u64| {
        let product =
            median(&mut runs.iter().map(|(p, _)| pick(&p.outcome) as f64).collect::<Vec<_>>());
        let control =
            median(&mut runs.iter().map(|(_, c)| pick(&c.outcome) as f64).collect::<Vec<_>>());
        format!("{product} ({control})")
    };
    let notes = format!(
        "p50 {}, p99 {}, p99.9 {} µs (control); {refused} refused",
        of(|outcome| outcome.p50),
        of(|outcome| outcome.p99),
        of(|outcome| outcome.p999),
    );
    let s = if connections == 1 { "" } else { "s" };
    report.compare(
        format!("{what}, {connections} connection{s}"),
        "requests/s",
        &rate,
        budget,
        notes,
    );
    // Requests that wait for a commit may cost more.
    let commits = ["strict", "keyed", "receipts"].iter().any(|word| what.contains(word));
    let budget = (budget.is_some() && !commits).then_some(Budget::AtMost(1.0));
    report.compare("the same, server CPU per request", "µs", &cpu, budget, "");
    Ok(())
}

/// Measures requests/s and CPU per request, in pairs with nginx, which returns a constant of the same
/// length.
fn against_nginx(plan: &Plan, report: &mut Report, product: &Side) -> anyhow::Result<()> {
    if !nginx::is_installed()? {
        eprintln!("nginx is not installed: the row against it is left out");
        return Ok(());
    }
    let control = nginx::constant(&plan.dir, ask(product.address, ONE[0])?.len())?;
    let load = Load { paths: ONE, connections: 64, length: plan.run(), keyed: false };
    let (mut rate, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..plan.pairs {
        let (product, control) = (run(product, load)?, run(&control, load)?);
        ensure!(product.outcome.refused + control.outcome.refused == 0, "a side refused");
        rate.push((product.outcome.per_second(), control.outcome.per_second()));
        cpu.push((product.cpu, control.cpu));
    }
    let what = "int, 64 connections, against nginx with one worker and no log";
    report.compare(what, "requests/s", &rate, Some(Budget::AtLeast(1.0)), "");
    report.compare("the same, server CPU per request", "µs", &cpu, None, "");
    Ok(())
}

/// Measures numbers/s with `?count=N`.
pub(crate) fn batches(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let sites =
        [("full shards", NEVER_REFILLED, 1.5e6), ("always being refilled", ALWAYS_REFILLED, 1.0e6)];
    for (what, settings, least) in sites {
        let site = Site::new(&plan.dir, "batches", settings)?;
        site.fill()?;
        let side = site.serve()?;
        for count in [100, 1000, 10_000] {
            let path = format!("/random?count={count}");
            let load = Load {
                paths: &[&path],
                connections: 16,
                length: Duration::from_secs(1),
                keyed: false,
            };
            let mut rates = Vec::new();
            let (mut refused, mut requests) = (0, 0);
            for _ in 0..plan.pairs {
                wait_until_full(&side)?;
                let outcome = drive(side.address, load)?;
                refused += outcome.refused;
                requests += outcome.requests;
                let served = (outcome.requests - outcome.refused) * count;
                rates.push(served as f64 / outcome.seconds);
            }
            let budget = (count == 1000).then_some(Budget::AtLeast(least));
            let notes = format!("{refused} of {requests} requests refused");
            report.figure(format!("count={count}, {what}"), "numbers/s", &rates, budget, notes);
        }
        side.stop()?;
    }
    Ok(())
}

/// Measures the share of 503 at full load with the default settings, and the rate while shards are
/// always being built against the rate while none is.
pub(crate) fn dry(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let site = Site::new(&plan.dir, "dry", "")?;
    site.fill()?;
    let side = site.serve()?;
    let load = Load {
        paths: MIXED,
        connections: 64,
        length: Duration::from_secs_f64(plan.long),
        keyed: false,
    };
    let outcome = drive(side.address, load)?;
    let percent = 100.0 * outcome.refused as f64 / outcome.requests as f64;
    let rate = outcome.per_second();
    let notes = format!(
        "{} s at {} requests/s, p99 {} µs, p99.9 {} µs",
        plan.long,
        short(rate),
        outcome.p99,
        outcome.p999
    );
    report.figure(
        "503 at full load, default settings",
        "%",
        &[percent],
        Some(Budget::AtMost(0.01)),
        notes,
    );
    side.stop()?;
    drop(site);

    let rested = Site::new(&plan.dir, "rested", "[refill]\nlow_water = 0.001\n")?;
    let refilled = Site::new(&plan.dir, "refilled", ALWAYS_REFILLED)?;
    rested.fill()?;
    refilled.fill()?;
    let (rested, refilled) = (rested.serve()?, refilled.serve()?);
    let load = Load { length: plan.run(), ..load };
    let mut pairs = Vec::new();
    for _ in 0..plan.pairs {
        let pair = (drive(refilled.address, load)?, drive(rested.address, load)?);
        pairs.push((pair.0.per_second(), pair.1.per_second()));
    }
    let what = "rate while shards are always being refilled, against none being refilled";
    report.compare(what, "requests/s", &pairs, Some(Budget::AtLeast(0.8)), "");
    refilled.stop()?;
    rested.stop()
}
