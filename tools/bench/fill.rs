//! Ten million numbers into empty shards, against plain inserts of the same number of rows.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use crate::Plan;
use crate::report::{Budget, Report};
use crate::side::Site;

const POOLS: u64 = 2;
const SHARDS: u64 = 2;
const ROWS: u64 = 2_500_000;

/// Measures the first filling with default shards.
pub(crate) fn fill(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let shard = format!("shards = {SHARDS}\nshard_size = {ROWS}\n");
    let settings = format!("[pools.int]\n{shard}[pools.float]\n{shard}");
    let product = Site::new(&plan.dir, "fill", &settings)?;
    let control = Site::new(&plan.dir, "inserts", "")?;
    let (mut pairs, mut peaks) = (Vec::new(), Vec::new());
    for _ in 0..plan.pairs {
        product.clear()?;
        let (time, peak) = product.fill()?;
        peaks.push(peak as f64 / 1e6);
        control.clear()?;
        pairs.push((time.as_secs_f64(), inserts(&control)?));
    }
    let most = Some(Budget::AtMost(1.05));
    report.compare("filling 10M numbers, pools in parallel", "s", &pairs, most, "");
    report.figure("peak memory of that", "MB", &peaks, Some(Budget::AtMost(150.0)), "");
    Ok(())
}

/// Returns the seconds of the plain inserts.
fn inserts(site: &Site) -> anyhow::Result<f64> {
    let output = Command::new(std::env::current_exe()?)
        .arg("inserts")
        .arg(&site.dir)
        .args([POOLS, SHARDS, ROWS].map(|count| count.to_string()))
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the control failed: {}", output.status);
    let seconds = String::from_utf8_lossy(&output.stdout);
    seconds.trim().parse().with_context(|| format!("no seconds in {seconds:?}"))
}
