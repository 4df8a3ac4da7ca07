//! The summary of a run, for people. Counts nothing.

use std::path::PathBuf;

use tombola::internals::{thousands, time};

use crate::args::Args;
use crate::judge::Tally;
use crate::load::End;
use crate::seen::Seen;

const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];

/// Returns the whole summary.
pub(crate) fn summary(
    args: &Args,
    end: &End,
    tally: &Tally,
    seen: &Seen,
    log: Option<&PathBuf>,
) -> String {
    let mut text = head(args, end, tally) + &outcomes(end, tally);
    if !tally.latencies.is_empty() {
        text += &(latencies(tally) + &shards(tally));
    }
    text += &duplicates(tally, seen);
    if let Some(log) = log {
        text += &format!("Log: {}\n", log.display());
    }
    text + &match (tally.duplicates, tally.failures) {
        (0, 0) => "PASSED: no duplicates, no failures\n".to_owned(),
        (duplicates, failures) => format!(
            "FAILED: duplicates {}, failures {}\n",
            thousands(duplicates),
            thousands(failures)
        ),
    }
}

fn head(args: &Args, end: &End, tally: &Tally) -> String {
    let seconds = end.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
    format!(
        "\nSummary of {}, type {}{}\n  {} requests in {} from {} clients\n  {} numbers, {} numbers/s\n",
        args.url,
        args.pool,
        if end.is_early { " (ended early)" } else { "" },
        thousands(tally.requests),
        time(end.elapsed),
        thousands(end.clients),
        thousands(tally.numbers),
        thousands((tally.numbers as f64 / seconds) as u64),
    )
}

fn outcomes(end: &End, tally: &Tally) -> String {
    let mut text = "\nOutcomes\n".to_owned();
    for (kind, of_kind) in &tally.kinds {
        let first = of_kind.first_failure.as_ref();
        let first = first.map_or(String::new(), |first| format!("  FAILED, first {first}"));
        text += &row(kind, of_kind.count, &first);
    }
    let unfinished = end.begun - tally.requests;
    for (what, count) in
        [("of these, asked again", tally.retried), ("unfinished at the end", unfinished)]
    {
        if count > 0 {
            text += &row(what, count, "");
        }
    }
    text
}

fn latencies(tally: &Tally) -> String {
    let mut sorted = tally.latencies.clone();
    sorted.sort_unstable();
    let mut text = "\nLatency of responses with numbers\n".to_owned();
    for (name, quantile) in QUANTILES {
        let place = ((sorted.len() - 1) as f64 * quantile).ceil() as usize;
        text += &format!("  {name} {}", time(sorted[place]));
    }
    text + "\n"
}

fn shards(tally: &Tally) -> String {
    let rows = tally.shards.iter().map(|(shard, count)| row(shard, *count, ""));
    "\nNumbers per shard\n".to_owned() + &rows.collect::<String>()
}

fn duplicates(tally: &Tally, seen: &Seen) -> String {
    let earlier = match seen.earlier {
        0 => String::new(),
        count => format!(" and {} of earlier runs", thousands(count)),
    };
    let mut text = format!(
        "\nDuplicates: {} ({} different numbers{earlier})\n",
        thousands(tally.duplicates),
        thousands(seen.new_count())
    );
    for duplicate in &tally.first_duplicates {
        text += &format!("  {duplicate}\n");
    }
    text
}

fn row(name: &str, count: u64, rest: &str) -> String {
    format!("  {name:<22} {:>12}{rest}\n", thousands(count))
}
