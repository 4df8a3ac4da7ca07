//! The time from the start of the process to the first number.

use std::time::Instant;

use crate::Plan;
use crate::drive::ask;
use crate::report::{Budget, Report};
use crate::side::Site;

/// Measures the start with full shards and on an empty folder.
pub(crate) fn start(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let site = Site::new(&plan.dir, "start", "")?;
    let mut empty = Vec::new();
    for _ in 0..plan.pairs {
        site.clear()?;
        empty.push(first_number(&site)?);
    }
    site.clear()?;
    site.fill()?;
    let mut full = Vec::new();
    for _ in 0..plan.pairs {
        full.push(first_number(&site)?);
    }
    let most = |seconds| Some(Budget::AtMost(seconds));
    report.figure("start with full shards to the first number", "s", &full, most(0.2), "");
    report.figure("start on an empty folder to the first number", "s", &empty, most(2.0), "");
    Ok(())
}

/// Returns the seconds from the start of the process to its first number.
fn first_number(site: &Site) -> anyhow::Result<f64> {
    let started = Instant::now();
    let side = site.serve()?;
    while ask(side.address, "/random").is_err() {
        std::thread::yield_now();
    }
    let seconds = started.elapsed().as_secs_f64();
    side.stop()?;
    Ok(seconds)
}
