//! The four modes, each on an empty folder: some get slower with every number issued, or their files
//! larger.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::ensure;

use crate::Plan;
use crate::drive::Load;
use crate::report::{Report, short};
use crate::requests::{MIXED, run, wait_until_full};
use crate::side::Site;

const MODES: [&str; 4] = ["simple", "json", "sqlite", "sharded"];

/// Numbers issued before the runs that are reported. A fast mode passes more than one in a run.
const LEVELS: [u64; 3] = [0, 10_000, 100_000];

/// Runs after which a slow mode may be below the last level.
const RUNS: usize = 15;

pub(crate) fn modes(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    for mode in MODES {
        let site = Site::new(&plan.dir, mode, &format!("[server]\nmode = \"{mode}\"\n"))?;
        climb(mode, &site, plan, report)?;
    }
    Ok(())
}

/// Runs one mode up to the last level, and reports the first run at each level.
fn climb(mode: &str, site: &Site, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let side = site.serve()?;
    wait_until_full(&side)?;
    let load = Load { paths: MIXED, connections: 64, length: plan.run(), keyed: false };
    let (mut issued, mut reported) = (0, None);
    for _ in 0..RUNS {
        let measured = run(&side, load)?;
        let outcome = measured.outcome;
        ensure!(outcome.refused == 0, "{mode} refused {} requests", outcome.refused);
        let before = issued;
        issued += outcome.requests;
        let level = LEVELS.into_iter().rfind(|level| *level <= before);
        if level == reported {
            continue;
        }
        reported = level;
        let bytes = disk_bytes(&site.dir)?;
        let notes = format!(
            "p50 {} µs, p99 {} µs; {} µs of CPU a number; {} bytes on disk, {} for each number issued",
            outcome.p50,
            outcome.p99,
            short(measured.cpu),
            short(bytes as f64),
            bytes / issued
        );
        let what = format!("{mode}, {} issued before", short(before as f64));
        report.figure(what, "numbers/s", &[outcome.per_second()], None, notes);
        if level == LEVELS.last().copied() {
            return side.stop();
        }
    }
    eprintln!("{mode} issued {issued} numbers in {RUNS} runs: the levels above are left out");
    side.stop()
}

/// Returns the bytes of the blocks that a folder's files take.
fn disk_bytes(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        // A file that was renamed since has no metadata here.
        bytes += entry?.metadata().map_or(0, |metadata| metadata.blocks() * 512);
    }
    Ok(bytes)
}
