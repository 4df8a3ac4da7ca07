//! Requests that leave a receipt: against a constant response, beside a file with many receipts, and
//! `tombola draw`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use tombola::internals::sqlite::rusqlite::{Connection, params};

use crate::Plan;
use crate::drive::{Load, drive};
use crate::report::{Budget, Report, short};
use crate::requests::{pairs, wait_until_full};
use crate::side::{Side, Site};

/// Shards that are not built again while a row is measured.
const RESTED: &str =
    "refill.low_water = 0.001\npools.int.shard_size = 12_000_000\npools.float.enabled = false\n";

/// The numbers that `tombola draw` takes.
const DRAWN: u64 = 10_000_000;

/// The bytes of the numbers of a receipt with one number.
const NUMBER: [u8; 5] = [1, 1, 0, 1, 7];

pub(crate) fn receipts(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    against_constant(plan, report)?;
    bulk(plan, report)?;
    beside_many(plan, report)
}

/// Compares keyed requests, and unkeyed ones of a pool that records all, with a bare axum handler.
fn against_constant(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    for (what, recorded, keyed) in
        [("int, keyed", "keyed", true), ("int, receipts = \"all\"", "all", false)]
    {
        let settings = format!("{RESTED}pools.int.receipts = \"{recorded}\"\n");
        let site = Site::new(&plan.dir, "receipts", &settings)?;
        site.fill()?;
        let side = site.serve()?;
        for connections in [1, 64, 256] {
            let budget = (connections == 256).then_some(Budget::AtLeast(0.5));
            let load = Load { paths: &["/random"], connections, length: plan.run(), keyed };
            pairs(plan, report, &side, load, (what, budget))?;
        }
        side.stop()?;
    }
    Ok(())
}

/// Measures `tombola draw` with its server beside it.
fn bulk(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut rates = Vec::new();
    let mut bytes = 0.0;
    for _ in 0..plan.pairs.min(3) {
        let site = Site::new(&plan.dir, "bulk", RESTED)?;
        site.fill()?;
        let side = site.serve()?;
        wait_until_full(&side)?;
        let out = plan.dir.join("drawn.csv");
        for ending in ["", ".draw", ".partial"] {
            let _ = std::fs::remove_file(plan.dir.join(format!("drawn.csv{ending}")));
        }
        let started = Instant::now();
        let status = Command::new(env!("CARGO_BIN_EXE_tombola"))
            .args(["draw", "--pool", "int", "--key", "bench", "--count", &DRAWN.to_string()])
            .args(["--url", &format!("http://{}", side.address), "--out"])
            .arg(&out)
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "tombola draw failed: {status}");
        rates.push(DRAWN as f64 / started.elapsed().as_secs_f64());
        side.stop()?;
        bytes = std::fs::metadata(site.dir.join("receipts.db"))?.len() as f64 / DRAWN as f64;
        std::fs::remove_file(&out)?;
    }
    let what = format!("tombola draw of {}", short(DRAWN as f64));
    report.figure(what, "numbers/s", &rates, Some(Budget::AtLeast(500_000.0)), "");
    report.figure("receipts on disk per number of a draw", "bytes", &[bytes], None, "");
    Ok(())
}

/// Compares keyed requests beside a full file of receipts with those beside an empty one.
fn beside_many(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let empty = Site::new(&plan.dir, "empty", RESTED)?;
    let with_index = Site::new(&plan.dir, "full", RESTED)?;
    let lookups = format!("{RESTED}receipts.lookups = false\n");
    let without = Site::new(&plan.dir, "without", &lookups)?;
    for site in [&empty, &with_index, &without] {
        site.fill()?;
        // The server creates the tables.
        let side = site.serve()?;
        let load = Load { paths: &["/random"], connections: 1, length: plan.run(), keyed: true };
        drive(side.address, load)?;
        side.stop()?;
    }
    let mut bytes = 0.0;
    for (site, has_index) in [(&with_index, true), (&without, false)] {
        let file = site.dir.join("receipts.db");
        fill(&file, plan.receipts, has_index)?;
        if has_index {
            bytes = std::fs::metadata(&file)?.len() as f64 / plan.receipts as f64;
        }
    }
    let (empty, with_index, without) = (empty.serve()?, with_index.serve()?, without.serve()?);
    let load = Load { paths: &["/random"], connections: 256, length: plan.run(), keyed: true };
    let (mut against_empty, mut against_index) = (Vec::new(), Vec::new());
    for _ in 0..plan.pairs {
        let micros =
            |side: &Side| Ok::<_, anyhow::Error>(1e6 / drive(side.address, load)?.per_second());
        let full = micros(&with_index)?;
        against_empty.push((full, micros(&empty)?));
        against_index.push((full, micros(&without)?));
    }
    let many = short(plan.receipts as f64);
    let what = format!("keyed request beside {many} receipts, of beside none");
    report.compare(what, "µs", &against_empty, Some(Budget::AtMost(2.0)), "");
    let what = format!("keyed request beside {many} receipts, of the same without an index");
    report.compare(what, "µs", &against_index, None, "");
    report.figure("receipts on disk per receipt of one number", "bytes", &[bytes], None, "");
    for side in [empty, with_index, without] {
        side.stop()?;
    }
    Ok(())
}

/// Adds receipts of one number to a file, with their keys in the newest bucket and their index in long runs.
/// All rows are written in the order of their tables. The chain is not continued.
fn fill(file: &Path, count: u64, has_index: bool) -> anyhow::Result<()> {
    const RUN: u64 = 1 << 20;
    const BLOCK: usize = 330;
    let mut connection = Connection::open(file)?;
    connection.execute_batch(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -262144;",
    )?;
    let first: u64 =
        connection.query_row("SELECT max(seq) + 1 FROM receipts", [], |row| row.get(0))?;
    let keys: String =
        connection.query_row("SELECT 'keys_' || max(id) FROM buckets", [], |row| row.get(0))?;
    let transaction = connection.transaction()?;
    // A multiplication by an odd number is a permutation, so values and keys are all different.
    let value = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
    {
        let mut receipt = transaction.prepare(
            "INSERT INTO receipts (seq, at, pool, caller, key_digest, numbers, digest)
             VALUES (?1, 1800000000000, 1, 1, ?2, ?3, ?4)",
        )?;
        let mut key = transaction.prepare(&format!("INSERT INTO {keys} VALUES (?1, ?2)"))?;
        for index in 0..count {
            // Evenly spread, in order.
            let digest = (u128::MAX / u128::from(count) * u128::from(index)).to_be_bytes();
            let mut numbers = NUMBER.to_vec();
            numbers.extend_from_slice(&value(index).to_be_bytes()[1..]);
            receipt.execute(params![first + index, digest, numbers, [0x5a_u8; 32]])?;
            key.execute(params![digest, first + index])?;
        }
    }
    transaction.execute("UPDATE state SET keyed_to = ?1", [first + count - 1])?;
    if has_index {
        let mut run =
            transaction.prepare("INSERT INTO runs (first_seq, numbers) VALUES (?1, ?2)")?;
        let mut block = transaction
            .prepare("INSERT INTO blocks (run, pool, first, entries) VALUES (?1, 1, ?2, ?3)")?;
        for start in (0..count).step_by(RUN as usize) {
            let end = (start + RUN).min(count);
            let mut entries: Vec<_> =
                (start..end).map(|index| (value(index), index - start)).collect();
            entries.sort_unstable();
            run.execute(params![first + start, entries.len()])?;
            let id = transaction.last_insert_rowid();
            for chunk in entries.chunks(BLOCK) {
                let bytes: Vec<u8> = chunk
                    .iter()
                    .flat_map(|(value, distance)| {
                        let distance = u32::try_from(*distance).expect("a run is short");
                        value.to_be_bytes().into_iter().chain(distance.to_be_bytes())
                    })
                    .collect();
                block.execute(params![id, chunk[0].0, bytes])?;
            }
        }
        drop((run, block));
        transaction.execute("UPDATE state SET indexed_to = ?1", [first + count - 1])?;
    }
    transaction.commit().context("can't fill the file of receipts")
}
