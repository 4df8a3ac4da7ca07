//! Rows of figures, their medians, and how they are printed.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

/// The bound that a ratio or a figure should keep.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Budget {
    AtLeast(f64),
    AtMost(f64),
}

/// One comparison, or one figure without a control.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    what: String,
    unit: &'static str,
    /// Median of the product's runs.
    product: f64,
    /// Median of the control's runs.
    control: Option<f64>,
    /// Median of product / control of each pair.
    ratio: Option<f64>,
    /// The smallest and the largest ratio.
    ratio_range: Option<(f64, f64)>,
    /// The budget of the ratio if there is a control, else of the figure.
    budget: Option<Budget>,
    met: Option<bool>,
    /// More about the product's runs.
    notes: String,
}

/// All rows, and the machine.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    cores: usize,
    processor: String,
    kernel: String,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self {
            cores: num_cpus::get(),
            processor: first_value("/proc/cpuinfo", "model name"),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned()),
            rows: Vec::new(),
        }
    }

    /// Adds a comparison: one figure of each side per pair.
    pub(crate) fn compare(
        &mut self,
        what: impl Into<String>,
        unit: &'static str,
        pairs: &[(f64, f64)],
        budget: Option<Budget>,
        notes: impl Into<String>,
    ) {
        let mut ratios: Vec<f64> =
            pairs.iter().map(|(product, control)| product / control).collect();
        let ratio = median(&mut ratios);
        self.push(Row {
            what: what.into(),
            unit,
            product: median(&mut pairs.iter().map(|pair| pair.0).collect::<Vec<_>>()),
            control: Some(median(&mut pairs.iter().map(|pair| pair.1).collect::<Vec<_>>())),
            ratio: Some(ratio),
            ratio_range: Some((ratios[0], ratios[ratios.len() - 1])),
            budget,
            met: budget.map(|budget| budget.is_met(ratio)),
            notes: notes.into(),
        });
    }

    /// Adds a figure that has no control.
    pub(crate) fn figure(
        &mut self,
        what: impl Into<String>,
        unit: &'static str,
        runs: &[f64],
        budget: Option<Budget>,
        notes: impl Into<String>,
    ) {
        let product = median(&mut runs.to_vec());
        self.push(Row {
            what: what.into(),
            unit,
            product,
            control: None,
            ratio: None,
            ratio_range: None,
            budget,
            met: budget.map(|budget| budget.is_met(product)),
            notes: notes.into(),
        });
    }

    fn push(&mut self, row: Row) {
        eprintln!("{}", row.line());
        self.rows.push(row);
    }

    /// Prints the table, and writes it as JSON into the file.
    pub(crate) fn print(&self, file: &Path) -> anyhow::Result<()> {
        std::fs::write(file, serde_json::to_vec_pretty(self)?)?;
        let mut out = io::stdout().lock();
        writeln!(out, "{} cores, {}, Linux {}\n", self.cores, self.processor, self.kernel)?;
        writeln!(out, "| what | product | control | ratio (lowest to highest) | budget | |")?;
        writeln!(out, "| --- | ---: | ---: | ---: | ---: | --- |")?;
        for row in &self.rows {
            writeln!(out, "{}", row.line())?;
        }
        writeln!(out, "\nThe same as JSON: {}", file.display())?;
        Ok(())
    }
}

impl Row {
    fn line(&self) -> String {
        let Self { what, unit, product, .. } = self;
        let control =
            self.control.map_or("-".to_owned(), |control| format!("{} {unit}", short(control)));
        let ratio =
            self.ratio.zip(self.ratio_range).map_or("-".to_owned(), |(ratio, (low, high))| {
                format!("{ratio:.2} ({low:.2} to {high:.2})")
            });
        let budget = match (self.budget, self.met) {
            (Some(Budget::AtLeast(least)), met) => {
                format!("at least {}{}", short(least), verdict(met))
            }
            (Some(Budget::AtMost(most)), met) => format!("at most {}{}", short(most), verdict(met)),
            (None, _) => "-".to_owned(),
        };
        format!(
            "| {what} | {} {unit} | {control} | {ratio} | {budget} | {} |",
            short(*product),
            self.notes
        )
    }
}

fn verdict(met: Option<bool>) -> &'static str {
    if met == Some(false) { ", **missed**" } else { "" }
}

impl Budget {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(least) => figure >= least,
            Self::AtMost(most) => figure <= most,
        }
    }
}

/// Sorts the figures and returns their median, the lower one of an even count.
pub(crate) fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[(figures.len() - 1) / 2]
}

/// Writes a figure with three significant digits, and a suffix if it is large.
pub(crate) fn short(figure: f64) -> String {
    let (scaled, suffix) = match figure.abs() {
        size if size >= 1e6 => (figure / 1e6, "M"),
        size if size >= 1e3 => (figure / 1e3, "k"),
        _ => (figure, ""),
    };
    let digits = match scaled.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 || size == 0.0 => 2,
        _ => 3,
    };
    format!("{scaled:.digits$}{suffix}")
}

fn first_value(file: &str, key: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key));
    line.and_then(|line| line.split_once(':'))
        .map_or("unknown".to_owned(), |(_, v)| v.trim().to_owned())
}
