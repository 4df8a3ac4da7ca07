//! Builds the response of `/metrics`: all figures of the monitor, in the text format of Prometheus, with
//! names and units that follow its conventions. Counts nothing itself.

use std::ops::{RangeBounds, RangeInclusive};
use std::sync::Arc;

use axum::http::HeaderValue;
use prometheus::TextEncoder;
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

use super::response::{JsonResponse, typed};
use crate::config::PoolName;
use crate::fleet::Partitions;
use crate::histogram::Durations;
use crate::monitor::Monitor;
use crate::pool::{Figures, Pool, ShardFigures, ShardState};
use crate::receipts::ReceiptFigures;
use crate::traffic::{Route, STATUSES, Traffic, status_name};

/// The content type of the text format.
const TEXT_FORMAT: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Statuses of `/random` that are reported as 0 before they occur, because Prometheus computes no rate from
/// the first sample of a series.
const AWAITED_STATUSES: [u16; 2] = [200, 503];

/// The bounds of the buckets of leases, in seconds. Each pool has these buckets, so those that are always empty are
/// omitted: a sync takes longer than the least of them.
const LEASE_BOUNDS: RangeInclusive<f64> = 100e-6..=10.0;

/// The bounds of the buckets of refills, in seconds.
const REFILL_BOUNDS: RangeInclusive<f64> = 10e-3..=1000.0;

/// Returns the response to a caller that may see only these pools, or all.
pub(super) fn response(monitor: &Monitor, only_pools: Option<&[PoolName]>) -> JsonResponse {
    let sees = |pool: &PoolName| only_pools.is_none_or(|pools| pools.contains(pool));
    let mut families = Families::default();
    families.gauge(
        "tombola_build_info",
        "The version of the server; always 1.",
        [(labels([("version", env!("CARGO_PKG_VERSION"))]), 1.0)],
    );
    tell_traffic(&mut families, monitor.traffic());
    let pools = monitor.pools();
    tell_pools(&mut families, pools.iter().filter(|pool| sees(pool.name())));
    tell_receipts(&mut families, monitor.receipts());
    tell_fence(&mut families, monitor);
    #[cfg(target_os = "linux")]
    {
        use prometheus::core::Collector;
        families.encode(&prometheus::process_collector::ProcessCollector::for_self().collect());
    }
    in_format(families.text)
}

/// Returns the response with this text.
pub(super) fn in_format(text: String) -> JsonResponse {
    typed(TEXT_FORMAT, None, text.into_bytes())
}

fn tell_traffic(families: &mut Families, traffic: &Traffic) {
    let mut requests = Vec::new();
    let mut durations = Vec::new();
    for (route, name) in Traffic::routes() {
        let is_random = route == Route::RANDOM;
        for (status, count) in STATUSES.iter().zip(traffic.requests(route)) {
            if count > 0 || is_random && AWAITED_STATUSES.contains(status) {
                let status = status_name(*status);
                requests.push((labels([("route", name), ("status", &status)]), count as f64));
            }
        }
        let took = traffic.durations(route);
        if took.count() > 0 || is_random {
            durations.push((labels([("route", name)]), took));
        }
    }
    families.counter("tombola_http_requests_total", "Requests that got a response.", requests);
    families.histogram(
        "tombola_http_request_duration_seconds",
        "Time from the end of a request to its response.",
        ..,
        durations,
    );
    families.gauge(
        "tombola_http_open_connections",
        "Open connections.",
        [(Vec::new(), traffic.connections() as f64)],
    );
}

fn tell_receipts(families: &mut Families, figures: ReceiptFigures) {
    let ReceiptFigures { keyed, unkeyed, replayed, refused, waiting, state } = figures;
    let one = |value: u64| [(Vec::new(), value as f64)];
    families.counter(
        "tombola_receipts_saved_total",
        "Receipts saved since the start, with an idempotency key or without.",
        [(labels([("key", "yes")]), keyed as f64), (labels([("key", "no")]), unkeyed as f64)],
    );
    families.counter(
        "tombola_requests_replayed_total",
        "Requests that got the response of an earlier one with the same key.",
        one(replayed),
    );
    families.counter(
        "tombola_keyed_requests_refused_total",
        "Requests refused because of their key, or because the receipt could not be saved.",
        one(refused),
    );
    families.gauge(
        "tombola_keyed_requests_waiting",
        "Requests that wait for their receipt, or for an earlier request with the same key.",
        one(waiting),
    );
    families.gauge(
        "tombola_receipts",
        "Receipts in the store.",
        one(state.summary.map_or(0, |summary| summary.head.seq)),
    );
    families.gauge(
        "tombola_receipts_size_bytes",
        "Size of the receipts on the disk.",
        one(state.summary.map_or(0, |summary| summary.bytes)),
    );
    families.gauge(
        "tombola_receipts_can_be_saved",
        "1, or 0 while receipts can't be saved, so that requests that need one are refused.",
        one(state.trouble.is_none().into()),
    );
}

/// All pools of a server share its fence.
fn tell_fence(families: &mut Families, monitor: &Monitor) {
    let Some((steps, can_step)) = monitor.pools().iter().find_map(|pool| pool.fence()) else {
        return;
    };
    families.counter(
        "tombola_fleet_steps_total",
        "Steps of the fence since the start.",
        [(Vec::new(), steps as f64)],
    );
    families.gauge(
        "tombola_fleet_store_answers",
        "1, or 0 while the fence can't be stepped: leased numbers are served, and then none.",
        [(Vec::new(), f64::from(u8::from(can_step)))],
    );
}

fn tell_pools<'p>(families: &mut Families, pools: impl Iterator<Item = &'p Arc<Pool>>) {
    let pools: Vec<PoolFigures<'_>> = pools
        .map(|pool| PoolFigures {
            name: pool.name().as_str(),
            shard_size: pool.shard_size(),
            figures: pool.figures(),
        })
        .collect();
    families.counter(
        "tombola_numbers_issued_total",
        "Numbers handed out since the start.",
        by_shard(&pools, |_, shard| shard.issued as f64),
    );
    families.gauge(
        "tombola_shard_numbers_left",
        "Numbers of the live generation that have not been handed out.",
        by_shard(&pools, |_, shard| shard.left as f64),
    );
    families.gauge(
        "tombola_shard_size",
        "Numbers in a full generation.",
        by_shard(&pools, |pool, _| pool.shard_size as f64),
    );
    families.gauge(
        "tombola_shard_in_rotation",
        "Whether requests take numbers from the shard: 1 or 0.",
        by_shard(&pools, |_, shard| one_if(shard.state == ShardState::InRotation)),
    );
    families.gauge(
        "tombola_standby_ready",
        "Whether the next generation is ready: 1 or 0.",
        by_shard(&pools, |_, shard| one_if(shard.standby.is_some())),
    );
    families.histogram(
        "tombola_lease_duration_seconds",
        "Time to mark numbers as used and sync them to the disk.",
        LEASE_BOUNDS,
        by_pool(&pools, |pool| {
            let shards = pool.figures.shards.iter();
            shards.fold(Durations::default(), |all, shard| all.with(&shard.leases))
        }),
    );
    let refills = pools.iter().flat_map(|pool| {
        pool.figures.refills.iter().map(|(outcome, took)| {
            (labels([("pool", pool.name), ("outcome", outcome.as_str())]), took.clone())
        })
    });
    families.histogram(
        "tombola_refill_duration_seconds",
        "Time to build the next generation of a shard, or to fail at it.",
        REFILL_BOUNDS,
        refills,
    );
    families.counter(
        "tombola_numbers_burned_total",
        "Numbers ever lost to crashes and damage; they are never handed out.",
        by_pool(&pools, |pool| pool.figures.burned as f64),
    );
    families.gauge(
        "tombola_ledger_values",
        "Values that ever entered a shard.",
        by_pool(&pools, |pool| pool.figures.ledger.values as f64),
    );
    families.gauge(
        "tombola_ledger_size_bytes",
        "Size of the ledger and its log on the disk.",
        by_pool(&pools, |pool| pool.figures.ledger.bytes as f64),
    );
    families.gauge(
        "tombola_range_numbers",
        "Numbers in the range; in a fleet, in the partitions that this instance holds or may claim.",
        by_pool(&pools, |pool| pool.figures.drawable as f64),
    );
    families.gauge(
        "tombola_range_numbers_left",
        "Numbers of tombola_range_numbers that can still be handed out.",
        by_pool(&pools, |pool| (pool.figures.pooled + pool.figures.free) as f64),
    );
    families.gauge(
        "tombola_fleet_partitions_held",
        "Partitions that this instance holds, of 4096.",
        by_partitions(&pools, |partitions| partitions.held),
    );
    families.gauge(
        "tombola_fleet_partitions_unclaimed",
        "Partitions that no instance held when the store was last asked.",
        by_partitions(&pools, |partitions| partitions.unclaimed),
    );
}

struct PoolFigures<'p> {
    name: &'p str,
    shard_size: u64,
    figures: Figures,
}

fn by_pool<'p, T>(
    pools: &'p [PoolFigures<'p>],
    value: impl Fn(&PoolFigures<'p>) -> T + 'p,
) -> impl Iterator<Item = (Vec<LabelPair>, T)> {
    pools.iter().map(move |pool| (labels([("pool", pool.name)]), value(pool)))
}

/// Yields a value for each pool of a fleet, and none without a fleet.
fn by_partitions<'p>(
    pools: &'p [PoolFigures<'p>],
    count: impl Fn(Partitions) -> usize + 'p,
) -> impl Iterator<Item = (Vec<LabelPair>, f64)> {
    pools.iter().filter_map(move |pool| {
        let partitions = pool.figures.partitions?;
        Some((labels([("pool", pool.name)]), count(partitions) as f64))
    })
}

fn by_shard<'p>(
    pools: &'p [PoolFigures<'p>],
    value: impl Fn(&PoolFigures<'p>, &ShardFigures) -> f64,
) -> Vec<(Vec<LabelPair>, f64)> {
    let mut values = Vec::new();
    for pool in pools {
        for shard in &pool.figures.shards {
            let labels = labels([("pool", pool.name), ("shard", &shard.name)]);
            values.push((labels, value(pool, shard)));
        }
    }
    values
}

fn one_if(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

fn labels<const N: usize>(pairs: [(&str, &str); N]) -> Vec<LabelPair> {
    let pair = |(name, value): (&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value.to_owned());
        pair
    };
    pairs.into_iter().map(pair).collect()
}

/// The encoded metrics. The library's own counters can't be set to a value that was counted elsewhere, so this builds
/// the messages that the library encodes: one family at a time, because those of a thousand pools take megabytes.
#[derive(Default)]
struct Families {
    text: String,
}

impl Families {
    fn counter(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Vec<LabelPair>, f64)>,
    ) {
        self.add(name, help, MetricType::COUNTER, values, |metric, value| {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        });
    }

    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Vec<LabelPair>, f64)>,
    ) {
        self.add(name, help, MetricType::GAUGE, values, |metric, value| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        });
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        bounds: impl RangeBounds<f64>,
        values: impl IntoIterator<Item = (Vec<LabelPair>, Durations)>,
    ) {
        self.add(name, help, MetricType::HISTOGRAM, values, |metric, durations| {
            let bucket = |(bound, count)| {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(bound);
                bucket.set_cumulative_count(count);
                bucket
            };
            let mut histogram = Histogram::default();
            let buckets = durations.cumulative().filter(|(bound, _)| bounds.contains(bound));
            histogram.set_bucket(buckets.map(bucket).collect());
            histogram.set_sample_count(durations.count());
            histogram.set_sample_sum(durations.sum_seconds());
            metric.set_histogram(histogram);
        });
    }

    /// Adds a metric, unless it has no values, as on a server without pools.
    fn add<T>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        values: impl IntoIterator<Item = (Vec<LabelPair>, T)>,
        set: impl Fn(&mut Metric, T),
    ) {
        let metric = |(labels, value)| {
            let mut metric = Metric::from_label(labels);
            set(&mut metric, value);
            metric
        };
        let metrics: Vec<_> = values.into_iter().map(metric).collect();
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.encode(&[family]);
    }

    fn encode(&mut self, families: &[MetricFamily]) {
        let encoded = TextEncoder::new().encode_utf8(families, &mut self.text);
        encoded.expect("each family has a name and a metric");
    }
}
