//! The routes: HTTP in, numbers out. Here are those of the pool server; those of the rungs below it
//! are in `rung.rs`, and `guard.rs` stands before both. Knows nothing of SQLite, shards' files or
//! refilling.

mod answer;
mod forwarded;
mod guard;
mod health;
mod query;
mod quota;
mod rung;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use axum::{Extension, Router};
use serde::Serialize;

use self::answer::json;
pub(crate) use self::answer::{Answer, Refusal};
pub(crate) use self::guard::{Guard, Guarded};
use self::health::{PoolHealth, Status};
use self::query::Wanted;
pub(crate) use self::quota::Account;
pub(crate) use self::rung::{Routes, Step, rung_router, stopping};
use crate::pool::{Health, Pool, TakeError};
use crate::space::Number;

/// What `/random` answers to.
const RANDOM_METHODS: &str = "GET, HEAD, POST";

/// What `/health` answers to.
const HEALTH_METHODS: &str = "GET, HEAD";

/// What the handlers need.
#[derive(Debug)]
struct App {
    pools: Vec<Arc<Pool>>,
    count_limit: NonZeroU32,
}

impl App {
    fn wanted(&self, query: Option<&str>) -> Result<(&Pool, Option<NonZeroU32>), Refusal> {
        let names = self.pools.iter().map(|pool| pool.name());
        let Wanted { pool, count } = query::parse(names, Some(self.count_limit), query)?;
        Ok((&self.pools[pool], count))
    }
}

/// The pool server's routes over these pools.
pub fn router(pools: Vec<Arc<Pool>>, count_limit: NonZeroU32) -> Router {
    Router::new()
        .route("/random", only(get(random).head(probe).post(random), RANDOM_METHODS))
        .route("/health", only(get(health), HEALTH_METHODS))
        .fallback(async || Refusal::UnknownPath)
        .with_state(Arc::new(App { pools, count_limit }))
}

/// What a query asks for, as the pool's place among `pools` and the count; or the reason why not. For
/// `fuzz/`, which knows no other way to the parser alone.
#[cfg(fuzzing)]
pub fn parse_query(
    pools: &[crate::config::PoolName],
    count_limit: NonZeroU32,
    query: &str,
) -> Result<(usize, Option<NonZeroU32>), String> {
    query::parse(pools.iter(), Some(count_limit), Some(query))
        .map(|wanted| (wanted.pool, wanted.count))
        .map_err(|refusal| refusal.to_string())
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
    account: Option<Extension<Account>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let (pool, count) = app.wanted(query.as_deref())?;
    quota::charge(account.as_deref(), count)?;
    let answer = match count {
        None => one(pool).await,
        Some(count) => many(pool, count).await,
    };
    answer.map(|answer| answer.map(Body::from))
}

async fn one(pool: &Pool) -> Result<Answer, Refusal> {
    if let Some((shard, value)) = pool.try_take_one() {
        return Ok(json(StatusCode::OK, &One { number: pool.space().number(value), shard }));
    }
    let taken = pool.take(NonZeroU32::MIN).await.map_err(|error| refusal(error, 1))?;
    let (shard, values) = &taken.parts[0];
    let number = pool.space().number(values[0]);
    Ok(json(StatusCode::OK, &One { number, shard: pool.shard_name(*shard) }))
}

async fn many(pool: &Pool, count: NonZeroU32) -> Result<Answer, Refusal> {
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
    let (pool, _) = app.wanted(query.as_deref())?;
    match pool.health() {
        Health { in_rotation: 0, exhausted: true, .. } => {
            Err(Refusal::Exhausted { asked: 1, left: 0 })
        }
        Health { in_rotation: 0, .. } => Err(Refusal::Refilling),
        Health { .. } => Ok(json(StatusCode::OK, &()).map(Body::from)),
    }
}

fn refusal(error: TakeError, asked: u32) -> Refusal {
    match error {
        TakeError::Refilling => Refusal::Refilling,
        TakeError::Exhausted { left } => Refusal::Exhausted { asked, left },
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let pools = app.pools.iter().map(|pool| (pool.name(), pool_health(pool.health())));
    health::answer(pools).map(Body::from)
}

fn pool_health(health: Health) -> PoolHealth {
    let Health { in_rotation, shards, exhausted, alive, trouble } = health;
    let (status, reason) = match (alive, in_rotation, trouble) {
        (false, ..) => (Status::Down, Some(health::DIED.to_owned())),
        (true, 0, _) if exhausted => (Status::Down, Some("the range is used up".to_owned())),
        (true, 0, Some(trouble)) => (Status::Down, Some(trouble)),
        (true, 0, None) => (Status::Down, Some("all shards are being refilled".to_owned())),
        (true, _, Some(trouble)) => (Status::Degraded, Some(trouble)),
        (true, _, None) => (Status::Ok, None),
    };
    PoolHealth { status, shards: Some(shards), shards_in_rotation: Some(in_rotation), reason }
}
