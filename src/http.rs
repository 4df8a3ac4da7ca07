//! The routes: HTTP in, numbers out. Here are those of the pool server; those of the rungs below it
//! are in `rung.rs`, and `guard.rs` stands before both. Knows nothing of SQLite, shards' files or
//! refilling.

mod answer;
mod docs;
mod forwarded;
mod guard;
mod health;
mod metrics;
mod openapi;
mod page;
mod query;
mod quota;
mod ready;
mod rung;
mod status;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use std::net::IpAddr;

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderValue, Method, Request, StatusCode};
use axum::response::Response;
use axum::routing::{MethodRouter, get, head};
use axum::{Extension, Router};
use http_body_util::{Either, Full};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use utoipa::ToSchema;

pub(crate) use self::answer::{Answer, BODY_MAX, Refusal};
use self::answer::{json, json_text, typed};
pub(crate) use self::guard::Guard;
use self::openapi::Offer;
use self::query::Wanted;
pub(crate) use self::quota::Account;
use self::rung::rung_router;
pub(crate) use self::rung::{Routes, Step, stopping};
use crate::config::PoolConfig;
use crate::monitor::Monitor;
use crate::pool::{Health, Pool, TakeError};
use crate::rungs::Desk;
use crate::space::Number;

/// Where numbers are.
const RANDOM: &str = "/random";

/// What `/random` answers to.
const RANDOM_METHODS: &str = "GET, HEAD, POST";

/// Where the process says how it is.
const HEALTH: &str = "/health";

/// Whether numbers can be had, for whoever sends requests here.
const READY: &str = "/ready";

/// All that is known of the pools, for pages and consoles.
const STATUS: &str = "/status";

/// The same, for Prometheus.
const METRICS: &str = "/metrics";

/// Where all of this is described, for programs.
const OPENAPI: &str = "/openapi.json";

/// The same, for people; its files are below it.
const DOCS: &str = "/docs";

/// What everything that only tells something answers to.
const TELL_METHODS: &str = "GET, HEAD";

/// What the handlers need.
#[derive(Debug)]
struct App {
    count_limit: NonZeroU32,
    monitor: Arc<Monitor>,
    /// What `/openapi.json` answers.
    description: Bytes,
}

impl App {
    fn wanted(&self, query: Option<&str>) -> Result<(&Pool, Option<NonZeroU32>), Refusal> {
        let pools = self.monitor.pools();
        let names = pools.iter().map(|pool| pool.name());
        let Wanted { pool, count } = query::parse(names, Some(self.count_limit), query)?;
        Ok((&pools[pool], count))
    }

    async fn random(
        &self,
        query: Option<&str>,
        account: Option<&Account>,
    ) -> Result<Answer, Refusal> {
        let (pool, count) = self.wanted(query)?;
        quota::charge(account, count)?;
        match count {
            None => one(pool).await,
            Some(count) => many(pool, count).await,
        }
    }
}

/// An answer on its way to a connection: made here, or by axum.
pub(crate) type Reply = Response<Either<Full<Bytes>, Body>>;

/// All routes of a server, and the guard before them.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    guard: Option<Arc<Guard>>,
    /// What hands out numbers in the mode sharded. Before the router, which would cost as much as all
    /// the rest of an answer.
    app: Option<Arc<App>>,
    router: TowerToHyperService<Router>,
}

impl Front {
    /// Of the pool server, over the pools that are watched.
    pub(crate) fn of_pools(
        monitor: Arc<Monitor>,
        count_limit: NonZeroU32,
        guard: Option<Arc<Guard>>,
    ) -> Self {
        // `Front::answer` has the rest of /random.
        let mut routes = vec![
            (RANDOM, RANDOM_METHODS, head(probe)),
            (HEALTH, TELL_METHODS, get(health)),
            (READY, TELL_METHODS, get(ready)),
            (STATUS, TELL_METHODS, get(status)),
            (METRICS, TELL_METHODS, get(metrics)),
            (OPENAPI, TELL_METHODS, get(description)),
            (DOCS, TELL_METHODS, get(docs::page)),
            (docs::FILE, TELL_METHODS, get(docs::file)),
        ];
        routes.extend(page::routes().map(|(path, part)| (path, TELL_METHODS, part)));
        // Written from the routes themselves, so that none can be forgotten.
        let paths = routes.iter().map(|&(path, methods, _)| (path, methods));
        let offer = Offer { pools: monitor.pools(), count_limit, guard: guard.as_deref() };
        let description = Bytes::from(offer.describe(paths));
        let app = Arc::new(App { count_limit, monitor, description });
        let router = routes
            .into_iter()
            .fold(Router::new(), |router, (path, methods, handler)| {
                router.route(path, only(handler, methods))
            })
            .fallback(async || Refusal::UnknownPath)
            .with_state(Arc::clone(&app));
        Self { guard, app: Some(app), router: TowerToHyperService::new(router) }
    }

    /// Of a rung below it. The desk is gone with the front.
    pub(crate) fn of_rung(pools: Vec<PoolConfig>, desk: Desk, guard: Option<Arc<Guard>>) -> Self {
        let router = TowerToHyperService::new(rung_router(pools, desk));
        Self { guard, app: None, router }
    }

    /// Answers a request from this address.
    pub(crate) async fn answer(&self, mut request: Request<Body>, peer: IpAddr) -> Reply {
        let mut account = None;
        if let Some(guard) = &self.guard {
            match guard.admit(request.uri().path(), request.headers(), peer) {
                Ok(admitted) => account = admitted,
                Err(refusal) => return refusal.into(),
            }
        }
        if let Some(app) = &self.app
            && request.uri().path() == RANDOM
            && matches!(*request.method(), Method::GET | Method::POST)
        {
            let answer = app.random(request.uri().query(), account.as_ref()).await;
            return answer.map_or_else(Reply::from, reply);
        }
        if let Some(account) = account {
            request.extensions_mut().insert(account);
        }
        match self.router.call(request).await {
            Ok(answer) => answer.map(Either::Right),
            Err(never) => match never {},
        }
    }
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        reply(refusal.into())
    }
}

fn reply(answer: Answer) -> Reply {
    answer.map(|body| Either::Left(Full::new(Bytes::from(body))))
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

/// One number, and the shard that it is from: what [`one_of`] writes.
#[derive(ToSchema)]
#[expect(dead_code, reason = "described, and written by hand")]
struct One {
    /// Always with all its decimals: compare texts, not floating-point values.
    #[schema(value_type = f64)]
    number: Number,
    shard: String,
}

/// `count` numbers, and how many of them each shard gave.
#[derive(Serialize, ToSchema)]
struct Many<'a> {
    count: usize,
    #[schema(value_type = Vec<f64>)]
    numbers: Vec<Number>,
    shards: BTreeMap<&'a str, usize>,
}

async fn one(pool: &Pool) -> Result<Answer, Refusal> {
    if let Some((shard, value)) = pool.try_take_one() {
        return Ok(one_of(pool.space().number(value), shard));
    }
    let taken = pool.take(NonZeroU32::MIN).await.map_err(|error| refusal(pool, error, 1))?;
    let (shard, values) = &taken.parts[0];
    let number = pool.space().number(values[0]);
    Ok(one_of(number, pool.shard_name(*shard)))
}

/// One number. The names of shards need no escaping. With a serialiser an answer cost 3 % more CPU time.
fn one_of(number: Number, shard: &str) -> Answer {
    json_text(
        StatusCode::OK,
        ["{\"number\":", number.as_str(), ",\"shard\":\"", shard, "\"}"].concat(),
    )
}

async fn many(pool: &Pool, count: NonZeroU32) -> Result<Answer, Refusal> {
    let taken = pool.take(count).await.map_err(|error| refusal(pool, error, count.get()))?;
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
    account: Option<Extension<Account>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let (pool, count) = app.wanted(query.as_deref())?;
    quota::probe(account.as_deref(), count)?;
    match pool.health() {
        Health { serves: false, exhausted: true, shared, .. } => {
            Err(Refusal::Exhausted { asked: 1, left: 0, shared })
        }
        Health { serves: false, .. } => Err(Refusal::Refilling),
        Health { .. } => Ok(json(StatusCode::OK, &()).map(Body::from)),
    }
}

fn refusal(pool: &Pool, error: TakeError, asked: u32) -> Refusal {
    match error {
        TakeError::Refilling => Refusal::Refilling,
        TakeError::Exhausted { left } => {
            Refusal::Exhausted { asked, left, shared: pool.is_shared() }
        }
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let pools = app.monitor.pools().iter();
    let pools = pools.map(|pool| (pool.name(), health::of_pool(pool.health())));
    health::answer(pools).map(Body::from)
}

async fn description(State(app): State<Arc<App>>) -> Response {
    let json = HeaderValue::from_static("application/json");
    typed(json, None, Body::from(app.description.clone()))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    let pools = app.monitor.pools().iter().map(|pool| (pool.name(), pool.serves()));
    ready::answer(pools).map(Body::from)
}

async fn status(State(app): State<Arc<App>>) -> Response {
    off_the_lane(move || status::answer(&app.monitor)).await
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    off_the_lane(move || metrics::answer(&app.monitor)).await
}

/// An answer that is long in the making: those of others must not wait for it.
async fn off_the_lane(tell: impl FnOnce() -> Answer + Send + 'static) -> Response {
    let answer = tokio::task::spawn_blocking(tell).await;
    answer.expect("telling figures does not panic").map(Body::from)
}
