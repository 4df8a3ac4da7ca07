//! The cost of a draw as the ledger grows, and a plot of it.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use plotters::prelude::*;
use tombola::internals::Ledger;
use tombola::internals::Space;
use tombola::internals::{Generation, ShardIndex};

use crate::Plan;
use crate::report::{Budget, Report, median, short};

/// Values of a draw that is reported.
pub(crate) const BATCH: u64 = 1_000_000;

/// Sizes of the ledger that are reported, up to `--to`.
const SIZES: &[u64] = &[1_000_000, 10_000_000, 50_000_000, 200_000_000, 1_000_000_000];

/// Draws before each size; its figure is their median.
const DRAWS: u64 = 9;

/// The size from which on the kernel's cache is dropped before each draw that is reported.
const COLD_FROM: u64 = 900_000_000;

/// Sizes whose figures are compared: size, smaller size, and the largest ratio.
const BUDGETS: &[(u64, u64, f64)] =
    &[(200_000_000, 10_000_000, 1.3), (1_000_000_000, 200_000_000, 1.2)];

/// Draws until the ledger has `--to` values.
pub(crate) fn growth(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let dir = plan.dir.join("growth");
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    std::fs::create_dir_all(&dir)?;
    let path = dir.join("used_numbers_int.db");
    let space = Space::new("0", "9007199254740991", 0)?;
    let mut ledger = Ledger::create(&path, &space)?;
    let mut draws: Vec<Drawn> = Vec::new();
    let mut generation = 0;
    while ledger.count() < plan.to {
        let count = draw_size(ledger.count(), plan);
        let live = (generation > 0).then_some(Generation(generation));
        if ledger.count() >= COLD_FROM && count == BATCH {
            // Only root can drop it. For other users, the kernel decides what it keeps.
            let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
        }
        let started = Instant::now();
        ledger.draw(ShardIndex(0), live, count, &mut |_| ControlFlow::Continue(()))?.commit()?;
        // Each build of the product ends with it.
        ledger.cut_log()?;
        let seconds = started.elapsed().as_secs_f64();
        generation += 1;
        let values = ledger.count();
        if count == BATCH {
            draws.push(Drawn { values, seconds });
        }
        if generation % 10 == 0 || values >= plan.to {
            eprintln!(
                "{} values: {seconds:.3} s a draw of {}",
                short(values as f64),
                short(count as f64)
            );
        }
    }
    let count = ledger.count() as f64;
    ledger.close()?;
    let bytes = std::fs::metadata(&path)?.len() as f64 / count;
    for &size in SIZES.iter().filter(|&&size| size <= plan.to) {
        let name = format!("drawing 1M numbers into a ledger of {}", short(size as f64));
        let seconds = at(&draws, size);
        match BUDGETS.iter().find(|(of, ..)| *of == size) {
            Some(&(_, other, most)) => {
                let pair = [(seconds, at(&draws, other))];
                let notes = format!("control: of {}", short(other as f64));
                report.compare(name, "s", &pair, Some(Budget::AtMost(most)), notes);
            }
            None => report.figure(name, "s", &[seconds], None, ""),
        }
    }
    report.figure("ledger on disk per issued number", "bytes", &[bytes], None, "");
    plot(&draws, &plan.dir.join("growth.svg"))?;
    Ok(std::fs::remove_dir_all(&dir)?)
}

/// A draw of [`BATCH`] values.
struct Drawn {
    /// Values in the ledger after it.
    values: u64,
    seconds: f64,
}

/// Returns how many values to draw next: `--stride`, or `BATCH` in the draws before each size.
fn draw_size(values: u64, plan: &Plan) -> u64 {
    let sizes = SIZES.iter().copied().chain([plan.to]);
    let next = sizes.filter(|&size| size > values).min().unwrap_or(plan.to);
    let free = next.saturating_sub(values + DRAWS * BATCH);
    if plan.stride <= free { plan.stride } else { BATCH }
}

/// Returns the median of the draws before this size.
fn at(draws: &[Drawn], size: u64) -> f64 {
    let those = draws.iter().filter(|drawn| drawn.values <= size);
    let mut seconds: Vec<f64> =
        those.rev().take(DRAWS as usize).map(|drawn| drawn.seconds).collect();
    median(&mut seconds)
}

/// Plots the seconds of each draw over the size of the ledger.
fn plot(draws: &[Drawn], file: &Path) -> anyhow::Result<()> {
    let root = SVGBackend::new(file, (760, 320)).into_drawing_area();
    root.fill(&WHITE)?;
    let highest = draws.iter().map(|drawn| drawn.seconds).fold(0.0, f64::max);
    let millions = draws.last().map_or(0.0, |drawn| drawn.values as f64 / 1e6);
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..millions, 0.0..highest * 1.1)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("millions of values in the ledger")
        .y_desc("seconds to draw 1 million")
        .draw()?;
    let points = draws.iter().map(|drawn| (drawn.values as f64 / 1e6, drawn.seconds));
    chart
        .draw_series(points.map(|point| Circle::new(point, 2, RGBColor(31, 111, 180).filled())))?;
    Ok(root.present()?)
}
