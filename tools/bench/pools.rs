//! A server with many small pools: how soon the last one serves, and what each costs.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::Plan;
use crate::drive::ask;
use crate::report::{Budget, Report};
use crate::side::{Side, Site, open_files, resident_memory, threads};

/// Numbers in a shard, as many as a small campaign needs.
const SHARD_SIZE: u64 = 5_000;

/// Shards of each pool.
const SHARDS: [u64; 2] = [2, 1];

/// The pause between two looks at a process: no shorter than a look takes with thousands of open files.
const LOOK: Duration = Duration::from_millis(20);

/// Measures starts, stops and everything that a pool occupies, with two shards and with one.
pub(crate) fn pools(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    for shards in SHARDS {
        let settings = settings(plan.pools, shards);
        let title = format!("{} pools of {shards} shards of {SHARD_SIZE}", plan.pools);
        let (mut sites, mut empty, mut full) = (Vec::new(), Vec::new(), Vec::new());
        // Each run has a folder of its own, which stays until the end: ext4 creates files slowly for minutes after
        // thousands were removed.
        for pair in 0..=plan.pairs {
            sites.push(Site::new(&plan.dir, &format!("pools_{shards}_{pair}"), &settings)?);
        }
        let last = sites.pop().context("there is at least one")?;
        for site in &sites {
            empty.push(run(site, plan.pools, shards, true)?);
            full.push(run(site, plan.pools, shards, false)?);
        }
        let site = &sites[0];
        let mut row = |what: &str, unit, runs: &[Run], most: Option<f64>, of: fn(&Run) -> f64| {
            let figures: Vec<f64> = runs.iter().map(of).collect();
            let what = format!("{title}: {what}");
            report.figure(what, unit, &figures, most.map(Budget::AtMost), "");
        };
        for (folder, runs) in [("an empty folder", &empty), ("a full folder", &full)] {
            let what = format!("start on {folder} to the first number of the last pool");
            row(&what, "s", runs, Some(5.0), |run| run.first_number);
            let what = format!("memory of each after a start on {folder}");
            row(&what, "MB", runs, Some(0.5), |run| run.memory);
            row("most threads of that", "", runs, None, |run| run.threads);
            row("most open files of that", "", runs, None, |run| run.files);
        }
        row("until all are full", "s", &empty, None, |run| run.all_full);
        row("stop", "s", &full, None, |run| run.stop);
        row("disk for each", "MB", &full, None, |run| run.disk);
        let figures = |path| timed_size(site, path);
        let (status, metrics) = (figures("/status")?, figures("/metrics")?);
        for (path, (seconds, bytes)) in [("/status", status), ("/metrics", metrics)] {
            report.figure(format!("{title}: {path}"), "s", &[seconds], None, "");
            report.figure(format!("{title}: size of {path}"), "MB", &[bytes / 1e6], None, "");
        }
        let copy = plan.dir.join("pools.copy");
        for command in ["verify", "backup"] {
            let _ = fs::remove_dir_all(&copy);
            let started = Instant::now();
            let mut process = Command::new(env!("CARGO_BIN_EXE_tombola"));
            site.flags(process.arg(command));
            if command == "backup" {
                process.arg(&copy);
            }
            let output = process.output()?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{command} failed: {errors}");
            let seconds = started.elapsed().as_secs_f64();
            report.figure(format!("{title}: tombola {command}"), "s", &[seconds], None, "");
        }
        fs::remove_dir_all(&copy)?;
        let seconds = last.fill()?.0.as_secs_f64();
        report.figure(format!("{title}: init-shards"), "s", &[seconds], None, "");
    }
    Ok(())
}

/// The figures of one run: seconds, megabytes of each pool, and counts.
struct Run {
    first_number: f64,
    all_full: f64,
    memory: f64,
    threads: f64,
    files: f64,
    stop: f64,
    disk: f64,
}

fn run(site: &Site, pools: u64, shards: u64, is_empty: bool) -> anyhow::Result<Run> {
    let started = Instant::now();
    let side = site.serve()?;
    let (mut most_threads, mut most_files) = (0, 0);
    let last = format!("/random?type={}", name(pools - 1));
    let mut first_number = None;
    // On an empty folder, a pool is full once each shard has numbers and, if they are few, a standby.
    let all_full = loop {
        if first_number.is_none() && ask(side.address, &last).is_ok() {
            first_number = Some(started.elapsed().as_secs_f64());
        }
        most_threads = most_threads.max(threads(side.id())?);
        most_files = most_files.max(open_files(side.id())?);
        if first_number.is_some() && (!is_empty || is_full(&side, pools * shards)?) {
            break started.elapsed().as_secs_f64();
        }
        std::thread::sleep(LOOK);
    };
    // Every pool has been used.
    for pool in 0..pools {
        ask(side.address, &format!("/random?type={}", name(pool)))?;
    }
    let memory = resident_memory(side.id())? as f64 / 1e6 / pools as f64;
    let stopping = Instant::now();
    side.stop()?;
    let stop = stopping.elapsed().as_secs_f64();
    let mut bytes = 0;
    for entry in fs::read_dir(&site.dir)? {
        bytes += entry?.metadata()?.len();
    }
    Ok(Run {
        first_number: first_number.unwrap_or_default(),
        all_full,
        memory,
        threads: most_threads as f64,
        files: most_files as f64,
        stop,
        disk: bytes as f64 / 1e6 / pools as f64,
    })
}

/// Returns whether no shard needs a refill.
fn is_full(side: &Side, shards: u64) -> anyhow::Result<bool> {
    let metrics = ask(side.address, "/metrics")?;
    let metrics = String::from_utf8_lossy(&metrics);
    let count = |name: &str, holds: fn(f64) -> bool| {
        let values = metrics.lines().filter(|line| line.starts_with(name));
        let values = values.filter_map(|line| line.rsplit_once(' ')?.1.parse().ok());
        values.filter(|&value| holds(value)).count() as u64
    };
    let full = count("tombola_shard_numbers_left{", |left| left >= SHARD_SIZE as f64 / 2.0);
    let standbys = count("tombola_standby_ready{", |ready| ready == 1.0);
    Ok(full + standbys >= shards)
}

/// Returns the seconds that a response takes, and its size in bytes.
fn timed_size(site: &Site, path: &str) -> anyhow::Result<(f64, f64)> {
    let side = site.serve()?;
    let started = Instant::now();
    let bytes = ask(side.address, path)?.len();
    let seconds = started.elapsed().as_secs_f64();
    side.stop()?;
    Ok((seconds, bytes as f64))
}

fn name(pool: u64) -> String {
    format!("campaign_{pool:04}")
}

fn settings(pools: u64, shards: u64) -> String {
    let mut text = "[pools.int]\nenabled = false\n[pools.float]\nenabled = false\n".to_owned();
    for pool in 0..pools {
        let name = name(pool);
        text += &format!(
            "[pools.{name}]\nmin = 0\nmax = 999_999_999_999\nshards = {shards}\nshard_size = {SHARD_SIZE}\n"
        );
    }
    text
}
