//! What a draw costs as the ledger grows, and a plot of it.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use plotters::prelude::*;
use tombola::batch::{Generation, ShardIndex};
use tombola::ledger::Ledger;
use tombola::space::Space;

use crate::Plan;
use crate::report::{Budget, Report, median, short};

/// Values of one draw.
const BATCH: u64 = 1_000_000;

/// Sizes of the ledger that are reported, where the run gets that far.
const SIZES: &[u64] = &[1_000_000, 10_000_000, 50_000_000, 200_000_000, 1_000_000_000];

/// Draws that a size's figure is the median of: those that lead up to it.
const DRAWS: usize = 9;

/// The figure that a size is held against, and how many times that it may be.
const BUDGETS: &[(u64, u64, f64)] =
    &[(200_000_000, 10_000_000, 1.5), (1_000_000_000, 200_000_000, 1.3)];

pub(crate) fn growth(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let dir = plan.dir.join("growth");
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    std::fs::create_dir_all(&dir)?;
    let path = dir.join("used_numbers_int.db");
    let space = Space::new("0", "9007199254740991", 0)?;
    let mut ledger = Ledger::create(&path, &space)?;
    // Seconds of each draw, in order.
    let mut draws: Vec<f64> = Vec::new();
    while ledger.count() < plan.to {
        let started = Instant::now();
        let generation = Generation(draws.len() as i64);
        let live = (generation.0 > 0).then_some(generation);
        ledger.draw(ShardIndex(0), live, BATCH, &mut |_| ControlFlow::Continue(()))?.commit()?;
        draws.push(started.elapsed().as_secs_f64());
        if draws.len().is_multiple_of(10) {
            eprintln!(
                "{} values: {:.3} s a draw",
                short(ledger.count() as f64),
                draws[draws.len() - 1]
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

/// The median of the draws that led up to this size.
fn at(draws: &[f64], size: u64) -> f64 {
    let end = ((size / BATCH) as usize).min(draws.len());
    median(&mut draws[end.saturating_sub(DRAWS)..end].to_vec())
}

/// Seconds of a draw over the size of the ledger.
fn plot(draws: &[f64], file: &Path) -> anyhow::Result<()> {
    let root = SVGBackend::new(file, (760, 320)).into_drawing_area();
    root.fill(&WHITE)?;
    let highest = draws.iter().copied().fold(0.0, f64::max);
    let millions = draws.len() as f64 * BATCH as f64 / 1e6;
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
    let points = draws.iter().enumerate();
    let points = points.map(|(draw, &seconds)| ((draw + 1) as f64 * BATCH as f64 / 1e6, seconds));
    chart
        .draw_series(points.map(|point| Circle::new(point, 2, RGBColor(31, 111, 180).filled())))?;
    Ok(root.present()?)
}
