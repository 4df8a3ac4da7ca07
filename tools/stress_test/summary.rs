//! The closing page of a run. Writes what was counted; judges and counts nothing.

use std::fmt::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::args::Args;
use crate::judge::Tally;
use crate::load::LoadEnd;
use tombola::figures::{thousands, time};

/// Width of the longest bar of the histogram.
const BAR_CELLS: u64 = 40;
/// Waiting for the judge is told from one part in so many of the run: then it shapes the figures.
const HELD_UP_TOLD: u32 = 10;
/// What the summary quotes of the latencies.
const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];

/// The whole page.
pub(crate) fn write(
    args: &Args,
    end: &LoadEnd,
    tally: &Tally,
    remembered_in: Option<&Path>,
    log: Option<&Path>,
) -> String {
    let mut page = String::new();
    let sections = [
        write_head(&mut page, args, end, tally),
        write_outcomes(&mut page, end, tally),
        write_latencies(&mut page, &tally.latencies),
        write_shards(&mut page, tally),
        write_repeats(&mut page, tally),
        write_end(&mut page, tally, remembered_in, log),
    ];
    debug_assert!(sections.iter().all(Result::is_ok), "writing into a String cannot fail");
    page
}

/// The figures of the page that programs ask for.
#[derive(Serialize)]
struct Figures {
    requests: u64,
    numbers: u64,
    elapsed_s: f64,
    p50_us: f64,
    p99_us: f64,
    failures: u64,
    duplicates: u64,
}

/// The same in one line of JSON.
pub(crate) fn write_json(end: &LoadEnd, tally: &Tally) -> String {
    let micros = |quantile| tally.latencies.value_at_quantile(quantile) as f64 / 1e3;
    let figures = Figures {
        requests: tally.requests,
        numbers: tally.numbers,
        elapsed_s: end.elapsed.as_secs_f64(),
        p50_us: micros(0.5),
        p99_us: micros(0.99),
        failures: tally.failures(),
        duplicates: tally.repeats,
    };
    let line = serde_json::to_string(&figures).expect("plain figures are JSON");
    format!("{line}\n")
}

fn write_head(page: &mut String, args: &Args, end: &LoadEnd, tally: &Tally) -> fmt::Result {
    let seconds = end.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
    let rate = (tally.numbers as f64 / seconds) as u64;
    let early = if end.interrupted { " (ended early)" } else { "" };
    writeln!(page, "\nSummary of {}, type {}{early}", args.url, args.pools)?;
    writeln!(
        page,
        "  {} requests in {} over {} connections",
        thousands(tally.requests),
        time(end.elapsed),
        thousands(end.connections),
    )?;
    writeln!(page, "  {} numbers, {} numbers/s", thousands(tally.numbers), thousands(rate))?;
    if end.held_up > end.elapsed / HELD_UP_TOLD {
        let held_up = time(end.held_up);
        writeln!(page, "  For {held_up} the load waited for this tool: the server can do more.")?;
    }
    Ok(())
}

fn write_outcomes(page: &mut String, end: &LoadEnd, tally: &Tally) -> fmt::Result {
    writeln!(page, "\nOutcomes")?;
    for (kind, of_kind) in &tally.kinds {
        write!(page, "  {kind:<22} {:>12}", thousands(of_kind.count))?;
        match &of_kind.first {
            Some(first) => writeln!(page, "  FAILED, first {first}")?,
            None => writeln!(page)?,
        }
    }
    if tally.asked_again > 0 {
        writeln!(page, "  {:<22} {:>12}", "of these, asked again", thousands(tally.asked_again))?;
    }
    if end.unfinished > 0 {
        writeln!(page, "  {:<22} {:>12}", "unfinished at the end", thousands(end.unfinished))?;
    }
    Ok(())
}

fn write_latencies(page: &mut String, latencies: &Histogram<u64>) -> fmt::Result {
    if latencies.is_empty() {
        return Ok(());
    }
    writeln!(page, "\nLatency of answers with numbers")?;
    for (name, quantile) in QUANTILES {
        let nanos = latencies.value_at_quantile(quantile);
        write!(page, "  {name} {}", time(Duration::from_nanos(nanos)))?;
    }
    writeln!(page)?;
    let rows = histogram(latencies);
    let highest = rows.iter().map(|row| row.count).max().unwrap_or(1);
    for row in &rows {
        // At least a sliver: a row of one answer among a million is the one to look at.
        let cells = (row.count * BAR_CELLS).div_ceil(highest) as usize;
        let bar = "█".repeat(cells);
        let bounds = format!("{:>7} – {:<7}", time(row.from), time(row.to));
        let line = format!("  {bounds} {:>12} {bar}", thousands(row.count));
        writeln!(page, "{}", line.trim_end())?;
    }
    Ok(())
}

fn write_shards(page: &mut String, tally: &Tally) -> fmt::Result {
    if tally.shards.is_empty() {
        return Ok(());
    }
    writeln!(page, "\nNumbers per shard")?;
    let mut shards: Vec<_> = tally.shards.iter().collect();
    shards.sort_unstable();
    for (shard, count) in shards {
        writeln!(page, "  {shard:<22} {:>12}", thousands(*count))?;
    }
    Ok(())
}

fn write_repeats(page: &mut String, tally: &Tally) -> fmt::Result {
    let earlier = match tally.seen.earlier_count() {
        0 => String::new(),
        count => format!(" and {} of earlier runs", thousands(count)),
    };
    let repeats = thousands(tally.repeats);
    let different = thousands(tally.seen.new_count());
    writeln!(page, "\nDuplicates: {repeats} ({different} different numbers{earlier})")?;
    for repeat in &tally.first_repeats {
        writeln!(page, "  {repeat}")?;
    }
    match tally.repeats - tally.first_repeats.len() as u64 {
        0 => Ok(()),
        more => writeln!(page, "  … and {} more", thousands(more)),
    }
}

fn write_end(
    page: &mut String,
    tally: &Tally,
    remembered_in: Option<&Path>,
    log: Option<&Path>,
) -> fmt::Result {
    if let Some(file) = remembered_in {
        let added = thousands(tally.seen.new_count());
        writeln!(page, "Remembered: {added} new numbers, in {}", file.display())?;
    }
    if let Some(path) = log {
        writeln!(page, "Log: {}", path.display())?;
    }
    match (tally.repeats, tally.failures()) {
        (0, 0) => writeln!(page, "PASSED: no duplicates, no failures"),
        (repeats, failures) => writeln!(
            page,
            "FAILED: duplicates {}, failures {}",
            thousands(repeats),
            thousands(failures)
        ),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Row {
    from: Duration,
    to: Duration,
    count: u64,
}

/// Rows from the fastest answer to the slowest, each bounded by the next of 1, 2, 5, 10, 20, …: from
/// a microsecond to an hour they are under 30.
fn histogram(latencies: &Histogram<u64>) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let (mut from, mut to) = (0, 1_000);
    for value in latencies.iter_recorded() {
        while value.value_iterated_to() > to {
            (from, to) = (to, next_bound(to));
            if !rows.is_empty() {
                rows.push(row(from, to));
            }
        }
        if rows.is_empty() {
            rows.push(row(from, to));
        }
        if let Some(last) = rows.last_mut() {
            last.count += value.count_since_last_iteration();
        }
    }
    rows
}

fn row(from: u64, to: u64) -> Row {
    Row { from: Duration::from_nanos(from), to: Duration::from_nanos(to), count: 0 }
}

/// The next of 1, 2 and 5 times a power of ten.
fn next_bound(bound: u64) -> u64 {
    match bound.to_string().as_bytes()[0] {
        b'2' => bound / 2 * 5,
        _ => bound * 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_rows_join_up_and_hold_every_answer() {
        let mut latencies = Histogram::new(3).expect("three digits");
        for nanos in [40_000, 60_000, 70_000, 900_000] {
            latencies += nanos;
        }
        let micros = |from, to, count| Row {
            from: Duration::from_micros(from),
            to: Duration::from_micros(to),
            count,
        };
        assert_eq!(
            histogram(&latencies),
            [
                micros(20, 50, 1),
                micros(50, 100, 2),
                micros(100, 200, 0),
                micros(200, 500, 0),
                micros(500, 1_000, 1),
            ]
        );
    }
}
