//! Builds the response of `/status`: all figures of the monitor, for the page and the console. Counts nothing
//! itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::schema::SchemaType;
use utoipa::openapi::{Object, ObjectBuilder, Type};

use super::response::{JsonResponse, json};

use super::health::{Status as Fitness, fitness};
use crate::config::PoolName;
use crate::events::{Event, Kind};
use crate::fleet::Partitions;
use crate::monitor::{Monitor, Pace, STEP, SettingsInEffect};
use crate::pool::{Figures, LastRefill, Outcome, Pool, ShardFigures, ShardState};
use crate::receipts::ReceiptFigures;
use crate::reload::Reload;
use crate::space::Number;
use crate::traffic::{Route, STATUSES, status_name};

/// Durations are in seconds, times are RFC 3339 in UTC, and missing values are null.
#[derive(Serialize, ToSchema)]
#[schema(as = ServerStatus)]
pub(super) struct Status {
    version: &'static str,
    time: String,
    started_at: String,
    uptime_seconds: f64,
    /// The worst status of the pools.
    status: Fitness,
    connections: u64,
    requests: Requests,
    history: History,
    pools: BTreeMap<String, PoolStatus>,
    receipts: ReceiptsStatus,
    settings: SettingsStatus,
    /// The last 100 events, newest first.
    events: Vec<EventStatus>,
}

/// Requests for numbers. The counts are since the start. The rate, and the times in the server, without the network,
/// are of the last 10 seconds.
#[derive(Serialize, ToSchema)]
struct Requests {
    total: u64,
    per_second: f64,
    p50_seconds: Option<f64>,
    p99_seconds: Option<f64>,
    p999_seconds: Option<f64>,
    by_status: BTreeMap<String, u64>,
}

/// The last five minutes, oldest first.
#[derive(Serialize, ToSchema)]
struct History {
    step_seconds: u64,
    requests_per_second: Vec<f64>,
    numbers_per_second: Vec<f64>,
    p50_seconds: Vec<Option<f64>>,
    p99_seconds: Vec<Option<f64>>,
}

/// Receipts, and requests with an idempotency key. The counts are since the start, except `count`.
#[derive(Serialize, ToSchema)]
struct ReceiptsStatus {
    /// All receipts of the store.
    count: u64,
    /// The digest of the last receipt, which covers all receipts before it.
    head: Option<String>,
    /// A key that was used since then is known, unless it expired. It is the time at which the store was
    /// created, or at which a restored backup was first used.
    keys_known_since: Option<String>,
    bytes: u64,
    /// Receipts with a key.
    keyed: u64,
    /// Receipts without a key.
    unkeyed: u64,
    /// Requests that got the response of an earlier one.
    replayed: u64,
    /// Requests that were refused because of their key, or because the receipt could not be saved.
    refused: u64,
    /// Requests that wait at the moment.
    waiting: u64,
    /// Why receipts can't be saved.
    trouble: Option<String>,
}

/// The settings in effect.
#[derive(Serialize, ToSchema)]
struct SettingsStatus {
    /// The SHA-256 of all settings with their values.
    digest: String,
    /// The last time that the settings were read again. It is null if there was none, and for tokens that are
    /// restricted to some pools.
    reload: Option<ReloadStatus>,
}

#[derive(Serialize, ToSchema)]
struct ReloadStatus {
    at: String,
    /// Whether the new settings are in effect. Otherwise nothing changed.
    applied: bool,
    message: String,
}

#[derive(Serialize, ToSchema)]
struct PoolStatus {
    status: Fitness,
    reason: Option<String>,
    range: Range,
    issued: u64,
    pooled: u64,
    /// Numbers that never entered a shard. In a fleet, those of the partitions that this instance holds or
    /// may claim.
    free: u64,
    burned: u64,
    issued_per_second: f64,
    /// At the current rate; null if no numbers are issued.
    seconds_until_used_up: Option<f64>,
    /// The probability that one guess from the whole range hits a number that this server issued. For a
    /// fleet, add those of its instances.
    guess_chance: f64,
    /// Only in a fleet.
    partitions: Option<PartitionsStatus>,
    shards: Vec<ShardStatus>,
}

/// Some of the 4096 partitions of a pool.
#[derive(Serialize, ToSchema)]
struct PartitionsStatus {
    /// Partitions that this instance holds.
    held: usize,
    /// Partitions that no instance held when the store was last read.
    unclaimed: usize,
}

#[derive(Serialize, ToSchema)]
struct Range {
    /// A number, or the text of a code.
    #[schema(schema_with = number_or_code)]
    min: Number,
    #[schema(schema_with = number_or_code)]
    max: Number,
    decimals: u8,
    size: u64,
}

#[derive(Serialize, ToSchema)]
struct ShardStatus {
    name: String,
    #[schema(schema_with = shard_states)]
    state: &'static str,
    left: u64,
    /// Numbers that the live generation began with. A new shard begins with a small one, so that it can serve soon.
    rows: u64,
    /// Numbers in a full generation.
    size: u64,
    generation: Option<i64>,
    standby: bool,
    progress: Option<f64>,
    last_refill: Option<RefillStatus>,
}

#[derive(Serialize, ToSchema)]
struct RefillStatus {
    at: String,
    seconds: f64,
    #[schema(schema_with = outcomes)]
    outcome: &'static str,
}

#[derive(Serialize, ToSchema)]
struct EventStatus {
    id: u64,
    at: String,
    #[schema(schema_with = event_kinds)]
    kind: &'static str,
    pool: Option<String>,
    shard: Option<String>,
    message: String,
}

/// Returns the response to a caller that may see only these pools, or all. The counts of requests and receipts are
/// those of all pools.
pub(super) fn response(monitor: &Monitor, only_pools: Option<&[PoolName]>) -> JsonResponse {
    let sees = |pool: &PoolName| only_pools.is_none_or(|pools| pools.contains(pool));
    let pace = monitor.pace();
    let pools: BTreeMap<_, _> = rates(&pace)
        .filter(|(pool, _)| sees(pool.name()))
        .map(|(pool, rate)| (pool.name().to_string(), pool_status(pool, rate)))
        .collect();
    let events = monitor.events().into_iter();
    // A reload names pools.
    let is_for_all = |event: &Event| event.kind != Kind::Reloaded || only_pools.is_none();
    let events = events.filter(|event| event.pool.as_ref().map_or(is_for_all(event), sees));
    let status = Status {
        version: env!("CARGO_PKG_VERSION"),
        time: time(SystemTime::now()),
        started_at: time(monitor.started_at()),
        uptime_seconds: monitor.uptime().as_secs_f64(),
        status: pools.values().map(|pool| pool.status).max().unwrap_or(Fitness::Ok),
        connections: monitor.traffic().connections(),
        requests: requests(monitor, &pace),
        history: history(&monitor.history(), sees),
        pools,
        receipts: receipts(monitor.receipts()),
        settings: settings(monitor.settings(), only_pools.is_none()),
        events: events.map(event_status).collect(),
    };
    json(StatusCode::OK, &status)
}

fn requests(monitor: &Monitor, pace: &Pace) -> Requests {
    let counts = monitor.traffic().requests(Route::RANDOM);
    let by_status = STATUSES.iter().zip(counts).filter(|&(_, count)| count > 0);
    Requests {
        total: counts.iter().sum(),
        per_second: pace.requests_per_second,
        p50_seconds: pace.durations.quantile_seconds(0.5),
        p99_seconds: pace.durations.quantile_seconds(0.99),
        p999_seconds: pace.durations.quantile_seconds(0.999),
        by_status: by_status.map(|(&status, count)| (status_name(status), count)).collect(),
    }
}

fn receipts(figures: ReceiptFigures) -> ReceiptsStatus {
    let ReceiptFigures { keyed, unkeyed, replayed, refused, waiting, state } = figures;
    let summary = state.summary;
    ReceiptsStatus {
        count: summary.map_or(0, |summary| summary.head.seq),
        head: summary.map(|summary| hex::encode(summary.head.digest)),
        keys_known_since: summary.map(|summary| time(summary.known_since)),
        bytes: summary.map_or(0, |summary| summary.bytes),
        keyed,
        unkeyed,
        replayed,
        refused,
        waiting,
        trouble: state.trouble,
    }
}

fn settings(settings: SettingsInEffect, sees_all: bool) -> SettingsStatus {
    let SettingsInEffect { digest, reload } = settings;
    let reload = reload.filter(|_| sees_all).map(|Reload { at, is_applied, message }| {
        ReloadStatus { at: time(at), applied: is_applied, message }
    });
    SettingsStatus { digest, reload }
}

/// Returns the pools with their rates.
fn rates(pace: &Pace) -> impl Iterator<Item = (&Arc<Pool>, f64)> {
    pace.pools.iter().zip(pace.numbers_per_second.iter().copied())
}

/// Returns the history, with the numbers of the pools that the caller may see.
fn history(steps: &[Pace], sees: impl Fn(&PoolName) -> bool) -> History {
    let numbers =
        |step: &Pace| rates(step).filter(|(pool, _)| sees(pool.name())).map(|(_, rate)| rate).sum();
    let quantiles = |share| {
        let quantile = |step: &Pace| step.durations.quantile_seconds(share);
        steps.iter().map(quantile).collect()
    };
    History {
        step_seconds: STEP.as_secs(),
        requests_per_second: steps.iter().map(|step| step.requests_per_second).collect(),
        numbers_per_second: steps.iter().map(numbers).collect(),
        p50_seconds: quantiles(0.5),
        p99_seconds: quantiles(0.99),
    }
}

fn pool_status(pool: &Pool, issued_per_second: f64) -> PoolStatus {
    let health = pool.health();
    let details = health.trouble.as_ref().map(|trouble| trouble.details.clone());
    let (status, reason) = fitness(&health, details);
    let Figures { issued, pooled, burned, free, partitions, shards, .. } = pool.figures();
    let space = pool.space();
    let size = space.size();
    let left = (pooled + free) as f64;
    PoolStatus {
        status,
        reason,
        range: Range {
            min: space.number(space.min()),
            max: space.number(space.max()),
            decimals: space.decimals(),
            size,
        },
        issued,
        pooled,
        free,
        burned,
        issued_per_second,
        seconds_until_used_up: (issued_per_second > 0.0).then(|| left / issued_per_second),
        guess_chance: issued as f64 / size as f64,
        partitions: partitions
            .map(|Partitions { held, unclaimed }| PartitionsStatus { held, unclaimed }),
        shards: shards.into_iter().map(|shard| shard_status(shard, pool.shard_size())).collect(),
    }
}

fn shard_status(shard: ShardFigures, size: u64) -> ShardStatus {
    ShardStatus {
        name: shard.name,
        state: shard.state.as_str(),
        left: shard.left,
        rows: shard.rows,
        size,
        generation: shard.generation.map(|generation| generation.0),
        standby: shard.standby.is_some(),
        progress: shard.progress,
        last_refill: shard.last_refill.map(|LastRefill { at, took, outcome }| RefillStatus {
            at: time(at),
            seconds: took.as_secs_f64(),
            outcome: outcome.as_str(),
        }),
    }
}

fn event_status(event: Event) -> EventStatus {
    let Event { id, at, kind, pool, shard, message } = event;
    let pool = pool.map(|pool| pool.to_string());
    EventStatus { id, at: time(at), kind: kind.as_str(), pool, shard, message }
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

fn number_or_code() -> Object {
    let types = SchemaType::from_iter([Type::Number, Type::String]);
    ObjectBuilder::new().schema_type(types).build()
}

fn shard_states() -> Object {
    word_of(ShardState::ALL.map(ShardState::as_str))
}

fn outcomes() -> Object {
    word_of(Outcome::ALL.map(Outcome::as_str))
}

fn event_kinds() -> Object {
    word_of(Kind::ALL.map(Kind::as_str))
}

/// Returns the schema of a field that has one of these values.
fn word_of<const N: usize>(words: [&'static str; N]) -> Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words)).build()
}
