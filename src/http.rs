//! The routes: HTTP in, numbers out. Knows nothing of SQLite, shards' files or refilling.

mod answer;
mod query;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use serde::Serialize;

use self::answer::{Refusal, json};
use self::query::Wanted;
use crate::pool::{Health, Pool, TakeError};
use crate::space::Number;

/// What the handlers need.
#[derive(Debug)]
struct App {
    pools: Vec<Arc<Pool>>,
    count_limit: NonZeroU32,
}

/// The server's routes over these pools.
pub fn router(pools: Vec<Arc<Pool>>, count_limit: NonZeroU32) -> Router {
    Router::new()
        .route("/random", only(get(random).head(probe).post(random), "GET, HEAD, POST"))
        .route("/health", only(get(health), "GET, HEAD"))
        .fallback(async || Refusal::UnknownPath)
        .with_state(Arc::new(App { pools, count_limit }))
}

fn only(methods: MethodRouter<Arc<App>>, allowed: &'static str) -> MethodRouter<Arc<App>> {
    methods.fallback(async move || Refusal::WrongMethod { allowed })
}

/// One number.
#[derive(Serialize)]
struct One<'a> {
    number: Number,
    shard: &'a str,
}

/// `count` numbers, and how many of them each shard gave.
#[derive(Serialize)]
struct Many<'a> {
    count: usize,
    numbers: Vec<Number>,
    shards: BTreeMap<&'a str, usize>,
}

async fn random(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let Wanted { pool, count } = query::parse(&app.pools, app.count_limit, query.as_deref())?;
    match count {
        None => one(pool).await,
        Some(count) => many(pool, count).await,
    }
}

async fn one(pool: &Pool) -> Result<Response, Refusal> {
    if let Some((shard, value)) = pool.try_take_one() {
        return Ok(json(StatusCode::OK, &One { number: pool.space().number(value), shard }));
    }
    let taken = pool.take(NonZeroU32::MIN).await.map_err(|error| refusal(error, 1))?;
    let (shard, values) = &taken.parts[0];
    let number = pool.space().number(values[0]);
    Ok(json(StatusCode::OK, &One { number, shard: pool.shard_name(*shard) }))
}

async fn many(pool: &Pool, count: NonZeroU32) -> Result<Response, Refusal> {
    let taken = pool.take(count).await.map_err(|error| refusal(error, count.get()))?;
    let mut numbers = Vec::with_capacity(count.get() as usize);
    let mut shards = BTreeMap::new();
    for (shard, values) in &taken.parts {
        numbers.extend(values.iter().map(|&value| pool.space().number(value)));
        shards.insert(pool.shard_name(*shard), values.len());
    }
    Ok(json(StatusCode::OK, &Many { count: numbers.len(), numbers, shards }))
}

/// `HEAD /random`: what a `GET` would be answered with, without taking a number.
async fn probe(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let Wanted { pool, .. } = query::parse(&app.pools, app.count_limit, query.as_deref())?;
    match pool.health() {
        Health { in_rotation: 0, exhausted: true, .. } => {
            Err(Refusal::Exhausted { asked: 1, left: 0 })
        }
        Health { in_rotation: 0, .. } => Err(Refusal::Refilling),
        Health { .. } => Ok(json(StatusCode::OK, &())),
    }
}

fn refusal(error: TakeError, asked: u32) -> Refusal {
    match error {
        TakeError::Refilling => Refusal::Refilling,
        TakeError::Exhausted { left } => Refusal::Exhausted { asked, left },
    }
}

/// How fit the process, or a pool, is to serve.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// It serves, and something needs looking after.
    Degraded,
    Down,
}

#[derive(Serialize)]
struct HealthAnswer<'a> {
    status: Status,
    pools: BTreeMap<&'a str, PoolHealth>,
}

#[derive(Serialize)]
struct PoolHealth {
    status: Status,
    shards: usize,
    shards_in_rotation: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let pools: BTreeMap<_, _> =
        app.pools.iter().map(|pool| (pool.name().as_str(), pool_health(pool.health()))).collect();
    let status = pools.values().map(|pool| pool.status).max().unwrap_or(Status::Ok);
    let code =
        if status == Status::Down { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    json(code, &HealthAnswer { status, pools })
}

fn pool_health(health: Health) -> PoolHealth {
    let Health { in_rotation, shards, exhausted, alive, trouble } = health;
    let (status, reason) = match (alive, in_rotation, trouble) {
        (false, ..) => (Status::Down, Some("a background task died; see the log".to_owned())),
        (true, 0, _) if exhausted => (Status::Down, Some("the range is used up".to_owned())),
        (true, 0, Some(trouble)) => (Status::Down, Some(trouble)),
        (true, 0, None) => (Status::Down, Some("all shards are being refilled".to_owned())),
        (true, _, Some(trouble)) => (Status::Degraded, Some(trouble)),
        (true, _, None) => (Status::Ok, None),
    };
    PoolHealth { status, shards, shards_in_rotation: in_rotation, reason }
}
