//! Imports: a tenth of the ledger's numbers into a stopped folder, against filling as many, and a thousand at a time
//! into a server under load.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::ensure;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tombola::internals::{Generation, Ledger, ShardIndex, Space};

use crate::Plan;
use crate::drive::{Load, drive, send};
use crate::report::{Budget, Report, short};
use crate::requests::wait_until_full;
use crate::side::{Side, Site};

const LAST: i64 = 9_007_199_254_740_991;
const SHARDS: u64 = 4;

/// The values of a draw that fills the ledger.
const DRAW: u64 = 5_000_000;

/// The numbers of each import under load.
const FEW: usize = 1000;

const CONNECTIONS: usize = 64;

pub(crate) fn import(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    stopped(plan, report)?;
    serving(plan, report)
}

/// Measures an import into a stopped folder.
fn stopped(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let count = plan.into / 10;
    let rows = count.div_ceil(SHARDS);
    let settings = format!(
        "[pools.int]\nshards = {SHARDS}\nshard_size = {rows}\n[pools.float]\nenabled = false\n"
    );
    let site = Site::new(&plan.dir, "import", &settings)?;
    fs::create_dir_all(&site.dir)?;
    draw(&site.dir.join("used_numbers_int.db"), plan.into)?;
    let numbers = plan.dir.join("import.txt");
    let (mut pairs, mut peaks) = (Vec::new(), Vec::new());
    for pair in 0..plan.pairs {
        let mut rng = ChaCha8Rng::seed_from_u64(pair as u64);
        let mut file = BufWriter::new(File::create(&numbers)?);
        for _ in 0..count {
            writeln!(file, "{}", rng.random_range(0..=LAST))?;
        }
        file.flush()?;
        let (seconds, peak) = run_import(&site, &numbers)?;
        peaks.push(peak as f64 / 1e6);
        for name in fs::read_dir(&site.dir)? {
            let path = name?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains("_shard_")) {
                fs::remove_file(path)?;
            }
        }
        let (filled, _) = site.fill()?;
        pairs.push((seconds, filled.as_secs_f64()));
    }
    fs::remove_file(&numbers)?;
    let (count, into) = (short(count as f64), short(plan.into as f64));
    let name = format!("importing {count} numbers into a ledger of {into}");
    report.compare(name, "s", &pairs, Some(Budget::AtMost(3.0)), "control: filling as many");
    report.figure("peak memory of that", "MB", &peaks, None, "");
    Ok(())
}

/// Draws until the ledger has this many values.
fn draw(path: &Path, values: u64) -> anyhow::Result<()> {
    let mut ledger = Ledger::create(path, &Space::new("0", &LAST.to_string(), 0)?)?;
    let mut generation = 0;
    while ledger.count() < values {
        let live = (generation > 0).then_some(Generation(generation));
        // Shard 99 is none of those that are filled.
        let shard = ShardIndex(99);
        let count = DRAW.min(values - ledger.count());
        ledger.draw(shard, live, count, &mut |_| ControlFlow::Continue(()))?.commit()?;
        ledger.cut_log()?;
        generation += 1;
    }
    Ok(ledger.close()?)
}

/// Returns the seconds of an import, and its peak memory in bytes.
fn run_import(site: &Site, numbers: &Path) -> anyhow::Result<(f64, u64)> {
    let started = Instant::now();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tombola"));
    command.args(["import", "--pool", "int"]).arg(numbers);
    let mut process = site.flags(&mut command).stderr(Stdio::null()).spawn()?;
    let (status, peak) = crate::side::wait(&mut process)?;
    ensure!(status.success(), "the import failed: {status}");
    Ok((started.elapsed().as_secs_f64(), peak))
}

/// Measures the latency of requests while numbers are imported, in pairs with the same load alone. An import begins as
/// soon as the last one ends, so that nearly all requests of a run overlap one.
fn serving(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let settings = "[pools.float]\nenabled = false\n";
    let site = Site::new(&plan.dir, "import_online", settings)?;
    let side = site.serve()?;
    wait_until_full(&side)?;
    let load =
        Load { paths: &["/random"], connections: CONNECTIONS, length: plan.run(), keyed: false };
    let (mut pairs, mut durations) = (Vec::new(), Vec::new());
    drive(side.address, load)?;
    for pair in 0..plan.pairs {
        let stop = AtomicBool::new(false);
        let beside = thread::scope(|scope| {
            let imports = scope.spawn(|| imports(side.address, pair as u64, &stop));
            let beside = drive(side.address, load);
            stop.store(true, Ordering::Relaxed);
            durations.extend(imports.join().expect("posting does not panic")?);
            beside
        })?;
        let alone = drive(side.address, load)?;
        pairs.push((beside.p99 as f64, alone.p99 as f64));
    }
    let name = format!("p99 of {CONNECTIONS} clients while {FEW} numbers at a time are imported");
    let notes = format!("control: no import; {} imports, one after the other", durations.len());
    report.compare(name, "µs", &pairs, Some(Budget::AtMost(2.0)), notes);
    report.figure("duration of such an import", "ms", &durations, None, "");
    Side::stop(side)
}

/// Imports fresh numbers until `stop` is set. Returns the milliseconds of each import.
fn imports(address: SocketAddr, seed: u64, stop: &AtomicBool) -> anyhow::Result<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut durations = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let numbers: String =
            (0..FEW).map(|_| format!("{}\n", rng.random_range(0..=LAST))).collect();
        let started = Instant::now();
        send(address, "POST /pools/int/used", "Content-Type: text/plain\r\n", &numbers)?;
        durations.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(durations)
}
