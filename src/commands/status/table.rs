//! Lays out the status as lines of text for a width. Requests nothing and prints nothing.

use std::time::Duration;

use console::{measure_text_width, pad_str, style, truncate_str};

use super::page::{
    Event, History, LastRefill, Moment, Page, Pool, Receipts, Requests, Shard, Text,
};
use crate::figures::{span, thousands, time};

/// The most events to show, so that there is room for the shards.
const EVENTS_SHOWN: usize = 8;

/// The fewest and the most columns of a shard's level.
const BAR_COLUMNS: std::ops::RangeInclusive<usize> = 6..=30;

/// The gap between two columns of the table.
const GAP: &str = "  ";

/// Returns the lines of the whole status.
pub(super) fn table(page: &Page, server: &str, width: usize) -> Vec<String> {
    let mut lines = vec![
        format!(
            "tombola {} at {server}: {}, up {}, {} connections",
            page.version.as_str(),
            coloured(&page.status),
            span(page.uptime_seconds),
            thousands(page.connections)
        ),
        requests(&page.requests),
    ];
    lines.extend(history(&page.history));
    lines.extend(receipts(&page.receipts));
    for (name, pool) in &page.pools {
        lines.push(String::new());
        lines.extend(head(name, pool));
    }
    lines.push(String::new());
    lines.extend(shards(page, width));
    if !page.events.is_empty() {
        lines.push(String::new());
        lines.extend(page.events.iter().take(EVENTS_SHOWN).map(|e| event(e, page.time)));
    }
    lines.iter().map(|line| truncate_str(line.trim_end(), width, "…").into_owned()).collect()
}

fn requests(requests: &Requests) -> String {
    let latency = |seconds: Option<f64>| match seconds {
        Some(seconds) => duration(seconds),
        None => "-".to_owned(),
    };
    let by_status: Vec<_> = requests
        .by_status
        .iter()
        .map(|(status, count)| format!("{}: {}", status.as_str(), thousands(*count)))
        .collect();
    format!(
        "{} requests/s, p50 {}, p99 {}, p99.9 {}; {} in all ({})",
        rate(requests.per_second),
        latency(requests.p50_seconds),
        latency(requests.p99_seconds),
        latency(requests.p999_seconds),
        thousands(requests.total),
        by_status.join(", ")
    )
}

/// Returns a line with the numbers per second over the last minutes, the oldest first.
fn history(history: &History) -> Option<String> {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let rates: Vec<f64> =
        history.numbers_per_second.iter().map(|rate| rate.unwrap_or(0.0)).collect();
    let highest = rates.iter().copied().fold(0.0, f64::max);
    if highest <= 0.0 {
        return None;
    }
    let level = |rate: &f64| LEVELS[(rate / highest * 7.0).round().clamp(0.0, 7.0) as usize];
    let curve: String = rates.iter().map(level).collect();
    let covered = span(history.step_seconds * rates.len() as f64);
    Some(format!("numbers/s over {covered}, up to {}: {curve}", rate(highest)))
}

/// Returns a line about the receipts, if there are any or they can't be saved.
fn receipts(receipts: &Receipts) -> Option<String> {
    let Receipts { count, replayed, waiting, trouble } = receipts;
    if *count == 0 && trouble.is_none() {
        return None;
    }
    let mut line = format!(
        "receipts: {}, replayed {}, waiting {}",
        thousands(*count),
        thousands(*replayed),
        thousands(*waiting)
    );
    if let Some(trouble) = trouble {
        line += &style(format!("; can't be saved: {}", trouble.as_str())).red().to_string();
    }
    Some(line)
}

fn head(name: &Text, pool: &Pool) -> Vec<String> {
    let mut lines = vec![
        format!(
            "{}: {}, {} to {}",
            style(name.as_str()).bold(),
            coloured(&pool.status),
            pool.range.min,
            pool.range.max
        ),
        format!(
            "  {} issued, {}/s; {} pooled, {} free, {} burned",
            thousands(pool.issued),
            rate(pool.issued_per_second),
            thousands(pool.pooled),
            thousands(pool.free),
            thousands(pool.burned)
        ),
        format!("  {}; {}", used_up(pool), guess(pool.guess_chance)),
    ];
    if let Some(reason) = &pool.reason {
        lines.insert(1, format!("  {}", style(reason.as_str()).red()));
    }
    lines
}

fn used_up(pool: &Pool) -> String {
    // Burned numbers are never handed out, so only those that are left count.
    if pool.pooled == 0 && pool.free == 0 {
        return "used up".to_owned();
    }
    match pool.seconds_until_used_up {
        Some(seconds) => format!("used up in {} at this rate", span(seconds)),
        None => "never used up at this rate".to_owned(),
    }
}

fn guess(chance: f64) -> String {
    if chance <= 0.0 {
        return "nothing issued that a guess could hit".to_owned();
    }
    format!("one guess in {} hits an issued number", thousands((1.0 / chance).round() as u64))
}

/// Returns one table of all shards, so that the columns of all pools are aligned.
fn shards(page: &Page, width: usize) -> Vec<String> {
    const HEAD: [&str; 5] = ["SHARD", "STATE", "LEFT", "NEXT GENERATION", "LAST REFILL"];
    let all: Vec<&Shard> = page.pools.values().flat_map(|pool| &pool.shards).collect();
    let rows: Vec<[String; 5]> = all.iter().map(|shard| cells(shard, page.time)).collect();
    let columns: [usize; 5] = std::array::from_fn(|index| {
        let widths = rows.iter().map(|row| measure_text_width(&row[index]));
        widths.chain([HEAD[index].len()]).max().unwrap_or_default()
    });
    // Columns that don't fit are dropped from the right; the level takes the remaining width.
    let fits = |shown: usize| {
        let text: usize = columns[..shown].iter().sum();
        text + GAP.len() * shown + BAR_COLUMNS.start() <= width
    };
    let shown = (3..=columns.len()).rev().find(|shown| fits(*shown)).unwrap_or(3);
    let text: usize = columns[..shown].iter().sum::<usize>() + GAP.len() * shown;
    let bar = width.saturating_sub(text).clamp(*BAR_COLUMNS.start(), *BAR_COLUMNS.end());

    let line = |cells: &[String; 5], level: String| {
        let mut parts = Vec::new();
        for (index, cell) in cells[..shown].iter().enumerate() {
            let align =
                if index == 2 { console::Alignment::Right } else { console::Alignment::Left };
            parts.push(pad_str(cell, columns[index], align, None).into_owned());
            if index == 2 {
                parts.push(level.clone());
            }
        }
        parts.join(GAP)
    };
    let mut lines = vec![line(&HEAD.map(str::to_owned), " ".repeat(bar))];
    lines.extend(all.iter().zip(&rows).map(|(shard, cells)| line(cells, level(shard, bar))));
    lines
}

fn cells(shard: &Shard, now: Moment) -> [String; 5] {
    let next = match (shard.progress, shard.standby) {
        (Some(share), _) => format!("{:.0} % built", (share * 100.0).clamp(0.0, 100.0)),
        (None, true) => "ready".to_owned(),
        (None, false) => "-".to_owned(),
    };
    let last = match &shard.last_refill {
        Some(LastRefill { at, seconds, outcome }) => {
            let ago = span(now.seconds_since(*at));
            match outcome.as_str() {
                "failed" => style(format!("failed {ago} ago")).red().to_string(),
                _ => format!("{ago} ago, took {}", duration(*seconds)),
            }
        }
        None => "-".to_owned(),
    };
    [shard.name.as_str().to_owned(), coloured(&shard.state), thousands(shard.left), next, last]
}

fn level(shard: &Shard, columns: usize) -> String {
    let share = shard.left as f64 / shard.size.max(1) as f64;
    // A shard that is not empty has at least one filled column, and one that is not full an empty one.
    let filled = ((share.clamp(0.0, 1.0) * columns as f64).round() as usize)
        .max(usize::from(shard.left > 0))
        .min(columns - usize::from(shard.left < shard.size));
    format!("{}{}", "█".repeat(filled), "░".repeat(columns - filled))
}

fn event(event: &Event, now: Moment) -> String {
    let about = event.shard.as_ref().or(event.pool.as_ref()).map_or("", Text::as_str);
    let ago = format!("{} ago", span(now.seconds_since(event.at)));
    format!("{ago:<12} {}  {about}  {}", coloured(&event.kind), event.message.as_str())
}

/// Returns a state's word in its colour, if there are colours, with spaces instead of underscores.
fn coloured(word: &Text) -> String {
    let text = word.as_str().replace('_', " ");
    match word.as_str() {
        "ok" | "in_rotation" | "refilled" => style(text).green().to_string(),
        "degraded" | "refilling" | "depleted" => style(text).yellow().to_string(),
        "down" | "damaged" | "exhausted" | "refill_failed" | "receipts_failed" => {
            style(text).red().to_string()
        }
        _ => text,
    }
}

fn duration(seconds: f64) -> String {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    if duration < Duration::from_secs(100) { time(duration) } else { span(seconds) }
}

fn rate(per_second: f64) -> String {
    if per_second >= 100.0 {
        thousands(per_second.round() as u64)
    } else {
        format!("{per_second:.1}")
    }
}
