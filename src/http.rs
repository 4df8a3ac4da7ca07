//! The HTTP routes. This file has the routes of the mode sharded; `on_demand.rs` has those of the other modes, and
//! `guard.rs` checks the requests to both. Knows nothing of SQLite, shard files or refilling.

mod docs;
mod forwarded;
mod guard;
mod health;
mod import;
mod keyed;
mod lines;
mod metrics;
mod on_demand;
mod openapi;
mod page;
mod query;
mod quota;
mod reads;
mod ready;
mod receipts;
mod response;
mod routes;
mod status;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderValue, Request, StatusCode};
use axum::response::Response;
use http_body_util::{Either, Full};
use serde::Serialize;
use utoipa::ToSchema;

use self::guard::Admitted;
pub(crate) use self::guard::Guard;
pub(crate) use self::keyed::Keeper;
use self::lines::Format;
pub(crate) use self::lines::push_field as push_csv_field;
use self::openapi::Offer;
pub(crate) use self::query::TYPE_DEFAULT;
use self::query::{Names, Parameters, Wanted};
use self::reads::Reads;
use self::ready::Readiness;
pub(crate) use self::response::{ApiError, IMPORT_MAX, JsonResponse};
use self::response::{json, json_text, shared, typed};
pub(crate) use self::routes::{LiveRoutes, PoolRoutes, Routes};
use crate::config::PoolName;
use crate::monitor::{Monitor, Pools};
use crate::pool::{Pool, PoolHealth, TakeError};
use crate::reload::{Reload, ReloadHandle};
use crate::space::{Number, Space, Value};

/// Hands out numbers.
const RANDOM: &str = "/random";

/// The methods that `/random` allows.
const RANDOM_METHODS: &str = "GET, HEAD, POST";

/// All receipts, in the order of their commits.
const RECEIPTS: &str = "/receipts";

/// The receipt of one number.
const RECEIPT: &str = "/receipts/{pool}/{number}";

/// Marks numbers of a pool that were issued by other means.
const USED: &str = "/pools/{pool}/used";

/// Reports whether the pools can serve.
const HEALTH: &str = "/health";

/// Reports whether to send requests to this server.
const READY: &str = "/ready";

/// Reads the settings again.
const RELOAD: &str = "/reload";

/// The methods that `/reload` allows.
const RELOAD_METHODS: &str = "POST";

/// All figures of the pools as JSON, for the page and the console.
const STATUS: &str = "/status";

/// The same figures for Prometheus.
const METRICS: &str = "/metrics";

/// The OpenAPI description of these routes.
const OPENAPI: &str = "/openapi.json";

/// The page that shows the description. Its files are below this path.
const DOCS: &str = "/docs";

/// The methods that the read-only routes allow.
const TELL_METHODS: &str = "GET, HEAD";

/// The usual bytes of a number and its comma in a response.
const NUMBER_BYTES: usize = 18;

/// The state that the handlers share.
#[derive(Debug)]
struct App {
    count_limit: NonZeroU32,
    guard: Arc<Guard>,
    monitor: Arc<Monitor>,
    keeper: Keeper,
    readiness: Readiness,
    pools: Arc<Pools>,
    /// The names of the pools, in the order of the pools.
    names: Vec<PoolName>,
    /// Whether a reload is about to replace these routes, so that a pool may be stopped. Requests that fail then begin
    /// again at the new routes.
    is_outdated: AtomicBool,
    reloads: ReloadHandle,
    reads: Arc<Reads>,
    /// All paths and their methods.
    paths: Vec<(&'static str, &'static str)>,
    /// The body of `/openapi.json` for callers that may see all pools.
    description: Bytes,
}

impl App {
    fn wanted(
        &self,
        admitted: &Admitted,
        query: Option<&str>,
        body: Parameters,
    ) -> Result<Wanted, ApiError> {
        query::parse(&self.names(admitted), Some(self.count_limit), query, body)
    }

    /// Returns the pools that the caller may name.
    fn names<'a>(&'a self, admitted: &'a Admitted) -> Names<'a> {
        Names { sorted: &self.names, caller: Some((&self.guard, admitted)) }
    }

    /// Makes a response on a blocking thread, so that other requests don't wait while it is made.
    async fn tell(
        self: Arc<Self>,
        tell: impl FnOnce(&Self) -> JsonResponse + Send + 'static,
    ) -> Response {
        let app = Arc::clone(&self);
        let told = self.reads.start(move || tell(&app)).await;
        told.expect("telling figures does not panic").map(Body::from)
    }

    /// Returns the pools that the caller may use.
    fn pools(&self, admitted: &Admitted) -> impl Iterator<Item = &Arc<Pool>> + Clone {
        self.pools.iter().filter(|pool| self.guard.allows(admitted, pool.name()))
    }

    async fn random(
        &self,
        request: &Request<Bytes>,
        admitted: &Admitted,
    ) -> Result<AnyResponse, ApiError> {
        let key = keyed::key(request.method(), request.headers())?;
        let body = Parameters::of_body(request.method(), request.headers(), request.body())?;
        let wanted = self.wanted(admitted, request.uri().query(), body)?;
        let pool = &self.pools[wanted.pool];
        // Read only with a count, because a request for one number is the common case.
        let format = || Format::accepted(request.headers());
        let format = wanted.count.map_or(Format::Json, |_| format());
        if let Some(asked) = self.keeper.asked(key, &wanted, format)? {
            return asked.respond(pool, self.count_limit, &self.guard, admitted).await;
        }
        query::check_count(wanted.count, self.count_limit)?;
        quota::charge(admitted.account.as_ref(), wanted.count)?;
        match wanted.count {
            None => one(pool).await.map(whole),
            Some(count) => many(pool, count, format).await,
        }
    }
}

/// A response, made either here or by axum.
pub(crate) type AnyResponse = Response<Either<Full<Bytes>, Body>>;

impl From<ApiError> for AnyResponse {
    fn from(error: ApiError) -> Self {
        whole(error.into())
    }
}

fn whole(response: JsonResponse) -> AnyResponse {
    response.map(|body| Either::Left(Full::new(Bytes::from(body))))
}

/// Parses a query string into the pool's position in `pools` and the count, or returns what is wrong with it.
/// The names are in ascending order. For `fuzz/`, which has no other access to the parser.
#[cfg(fuzzing)]
pub fn parse_query(
    pools: &[crate::config::PoolName],
    count_limit: NonZeroU32,
    query: &str,
) -> Result<(usize, Option<NonZeroU32>), String> {
    let names = Names { sorted: pools, caller: None };
    let wanted = query::parse(&names, Some(count_limit), Some(query), Parameters::default());
    wanted
        .and_then(|wanted| query::check_count(wanted.count, count_limit).map(|()| wanted))
        .map(|wanted| (wanted.pool, wanted.count))
        .map_err(|error| error.to_string())
}

/// One number and the shard that it comes from.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used: `one_of` writes the JSON")]
struct One {
    /// Has all its decimals. Compare numbers as texts, not as floating-point values.
    #[schema(value_type = f64)]
    number: Number,
    shard: String,
}

/// `count` numbers, and how many of them come from each shard.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used: `many_of` writes the JSON")]
struct Many {
    count: usize,
    #[schema(value_type = Vec<f64>)]
    numbers: Vec<Number>,
    shards: BTreeMap<String, usize>,
}

/// One code and the shard that it comes from.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used: `one_of` writes the JSON")]
struct OneCode {
    code: String,
    shard: String,
}

/// `count` codes, and how many of them come from each shard.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used: `many_of` writes the JSON")]
struct ManyCodes {
    count: usize,
    codes: Vec<String>,
    shards: BTreeMap<String, usize>,
}

async fn one(pool: &Arc<Pool>) -> Result<JsonResponse, ApiError> {
    if let Some((shard, value)) = pool.try_take_one() {
        return Ok(one_of(&pool.space().number(value), shard));
    }
    let taken = pool.take(NonZeroU32::MIN).await.map_err(|error| api_error(pool, error, 1))?;
    let (shard, values) = &taken.parts[0];
    Ok(one_of(&pool.space().number(values[0]), shard))
}

/// Returns a response with one number. Shard names need no escaping. With a serialiser, a request cost 3 %
/// more CPU time.
fn one_of(number: &Number, shard: &str) -> JsonResponse {
    let mut body = String::with_capacity(shard.len() + 96);
    body.push_str(match number {
        Number::Decimal(_) => "{\"number\":",
        Number::Code(_) => "{\"code\":",
    });
    number.push_json(&mut body);
    body.extend([",\"shard\":\"", shard, "\"}"]);
    json_text(StatusCode::OK, body)
}

async fn many(
    pool: &Arc<Pool>,
    count: NonZeroU32,
    format: Format,
) -> Result<AnyResponse, ApiError> {
    let taken = pool.take(count).await.map_err(|error| api_error(pool, error, count.get()))?;
    Ok(lines::response(format, pool.space(), taken.parts))
}

/// Returns a response with the numbers of these shards. Each number's text is written where it belongs, since
/// a list of all texts would cost as much memory again.
fn many_of(space: &Space, parts: &[(Arc<str>, Vec<Value>)]) -> JsonResponse {
    let count: usize = parts.iter().map(|(_, values)| values.len()).sum();
    let name = if space.codes().is_some() { "codes" } else { "numbers" };
    let mut body = format!("{{\"count\":{count},\"{name}\":[");
    body.reserve(NUMBER_BYTES * count);
    for (index, &value) in parts.iter().flat_map(|(_, values)| values).enumerate() {
        if index > 0 {
            body.push(',');
        }
        space.number(value).push_json(&mut body);
    }
    let shards: BTreeMap<_, _> = parts.iter().map(|(name, values)| (name, values.len())).collect();
    let shards = serde_json::to_string(&shards).expect("names and counts");
    body.extend(["],\"shards\":", &shards, "}"]);
    json_text(StatusCode::OK, body)
}

/// Handles `HEAD /random`: returns the status that `GET` would have, without taking a number.
async fn probe(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let Wanted { pool, count, .. } =
        app.wanted(&admitted, query.as_deref(), Parameters::default())?;
    query::check_count(count, app.count_limit)?;
    quota::probe(admitted.account.as_ref(), count)?;
    match app.pools[pool].health() {
        PoolHealth { serves: false, exhausted: true, shared, .. } => {
            Err(ApiError::Exhausted { asked: 1, left: 0, shared })
        }
        PoolHealth { serves: false, .. } => Err(ApiError::Refilling),
        PoolHealth { .. } => Ok(json(StatusCode::OK, &()).map(Body::from)),
    }
}

fn api_error(pool: &Pool, error: TakeError, asked: u32) -> ApiError {
    match error {
        TakeError::Refilling => ApiError::Refilling,
        TakeError::Exhausted { left } => {
            ApiError::Exhausted { asked, left, shared: pool.is_shared() }
        }
    }
}

async fn health(State(app): State<Arc<App>>, Extension(admitted): Extension<Admitted>) -> Response {
    let health: Vec<_> = app.pools.iter().map(|pool| pool.health()).collect();
    let pools = app.names.iter().zip(&health).map(|(name, health)| (name, health::of_pool(health)));
    health::response(pools, |name| app.guard.allows(&admitted, name)).map(Body::from)
}

async fn description(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
) -> Response {
    let json = HeaderValue::from_static("application/json");
    if !app.guard.hides_pools() {
        return typed(json, None, shared(app.description.clone()));
    }
    app.tell(move |app| {
        let offer = Offer::new(app.pools(&admitted), app.count_limit, &app.guard);
        typed(json, None, offer.describe(&app.paths).into_bytes())
    })
    .await
}

async fn ready(State(app): State<Arc<App>>, Extension(admitted): Extension<Admitted>) -> Response {
    let health: Vec<_> = app.pools.iter().map(|pool| pool.health()).collect();
    let ready = app.readiness.look(health.iter());
    let pools = app.names.iter().zip(&health).map(|(name, health)| (name, health.serves));
    let pools = pools.filter(|(name, _)| app.guard.allows(&admitted, name));
    ready::response(ready, pools).map(Body::from)
}

async fn status(State(app): State<Arc<App>>, Extension(admitted): Extension<Admitted>) -> Response {
    let told = move |app: &App| status::response(&app.monitor, app.guard.only_pools(&admitted));
    app.tell(told).await
}

async fn metrics(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
) -> Response {
    let told = move |app: &App| metrics::response(&app.monitor, app.guard.only_pools(&admitted));
    app.tell(told).await
}

/// The outcome of a reload that was applied.
#[derive(Serialize, ToSchema)]
struct Reloaded {
    /// A sentence about what changed.
    message: String,
}

async fn reload(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
) -> Result<Response, ApiError> {
    reloaded(&app.reloads, app.guard.only_pools(&admitted)).await
}

/// Reloads the settings for a caller that may use all pools.
async fn reloaded(
    reloads: &ReloadHandle,
    only_pools: Option<&[PoolName]>,
) -> Result<Response, ApiError> {
    if only_pools.is_some() {
        return Err(ApiError::RestrictedToken);
    }
    match reloads.reload().await {
        Some(Reload { is_applied: true, message, .. }) => {
            Ok(json(StatusCode::OK, &Reloaded { message }).map(Body::from))
        }
        Some(Reload { message, .. }) => Err(ApiError::NotReloaded { message }),
        None => Err(ApiError::NotReloaded { message: "The server is stopping".to_owned() }),
    }
}
