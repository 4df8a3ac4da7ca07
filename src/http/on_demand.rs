//! The routes of the simpler modes, which draw a number when it is asked for.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde::Serialize;

use super::guard::{Admitted, Guard};
use super::health::{self, PoolHealthBody, Status};
use super::keyed;
use super::query::{Names, Parameters};
use super::quota;
use super::response::{ApiError, json, only};
use super::{
    HEALTH, RANDOM, RANDOM_METHODS, READY, RELOAD, RELOAD_METHODS, TELL_METHODS, query,
    ready as readiness, reloaded,
};
use crate::config::{PoolConfig, PoolName};
use crate::on_demand::{DrawError, GeneratorHealth, Handle, PoolIndex, TRIES_MAX};
use crate::reload::ReloadHandle;
use crate::space::Number;

/// The state that the handlers share.
#[derive(Debug)]
struct App {
    pools: Vec<PoolConfig>,
    /// The names of the pools, in the order of the pools.
    names: Vec<PoolName>,
    numbers: Arc<Handle>,
    guard: Arc<Guard>,
    reloads: ReloadHandle,
}

/// The body of one number.
#[derive(Serialize)]
struct One {
    number: Number,
}

/// Returns the routes.
pub(super) fn router(
    pools: Vec<PoolConfig>,
    numbers: Arc<Handle>,
    guard: Arc<Guard>,
    reloads: ReloadHandle,
) -> Router {
    let names = pools.iter().map(|pool| pool.name.clone()).collect();
    Router::new()
        .route(RANDOM, only(get(random).post(random).head(probe), RANDOM_METHODS))
        .route(HEALTH, only(get(health), TELL_METHODS))
        .route(READY, only(get(ready), TELL_METHODS))
        .route(RELOAD, only(post(reload), RELOAD_METHODS))
        .fallback(async || ApiError::UnknownPath)
        .with_state(Arc::new(App { pools, names, numbers, guard, reloads }))
}

impl App {
    fn pool(
        &self,
        admitted: &Admitted,
        query: Option<&str>,
        body: Parameters,
    ) -> Result<PoolIndex, ApiError> {
        let names = Names { sorted: &self.names, caller: Some((&self.guard, admitted)) };
        Ok(PoolIndex(query::parse(&names, None, query, body)?.pool))
    }

    fn can_serve(&self) -> bool {
        matches!(self.numbers.health(), GeneratorHealth { alive: true, trouble: None })
    }
}

async fn random(
    State(app): State<Arc<App>>,
    admitted: Extension<Admitted>,
    RawQuery(query): RawQuery,
    method: Method,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    if keyed::key(&method, &headers)?.is_some() {
        return Err(keyed::OF_MODE);
    }
    let body = Parameters::of_body(&method, &headers, &body)?;
    let pool = app.pool(&admitted, query.as_deref(), body)?;
    quota::charge(admitted.account.as_ref(), None)?;
    let value = app.numbers.draw(pool).await.map_err(|error| match error {
        DrawError::OutOfTries => ApiError::OutOfTries { tries: TRIES_MAX },
        DrawError::NotSaved => ApiError::NotSaved,
    })?;
    let number = app.pools[pool.0].space.number(value);
    Ok(json(StatusCode::OK, &One { number }).map(Body::from))
}

/// `HEAD /random`: the status that a `GET` would have, as far as it is known without a try.
async fn probe(
    State(app): State<Arc<App>>,
    admitted: Extension<Admitted>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    app.pool(&admitted, query.as_deref(), Parameters::default())?;
    match app.can_serve() {
        true => Ok(json(StatusCode::OK, &()).map(Body::from)),
        false => Err(ApiError::NotSaved),
    }
}

async fn reload(
    State(app): State<Arc<App>>,
    admitted: Extension<Admitted>,
) -> Result<Response, ApiError> {
    reloaded(&app.reloads, app.guard.only_pools(&admitted)).await
}

async fn ready(State(app): State<Arc<App>>, admitted: Extension<Admitted>) -> Response {
    let ready = app.can_serve();
    let pools = app.names.iter().filter(|name| app.guard.allows(&admitted, name));
    readiness::response(ready, pools.map(|name| (name, ready))).map(Body::from)
}

async fn health(State(app): State<Arc<App>>, admitted: Extension<Admitted>) -> Response {
    let (status, reason) = match app.numbers.health() {
        GeneratorHealth { alive: false, .. } => (Status::Down, Some(health::DIED.to_owned())),
        GeneratorHealth { trouble: Some(_), .. } => {
            (Status::Down, Some(health::NOT_SAVED.to_owned()))
        }
        GeneratorHealth { .. } => (Status::Ok, None),
    };
    // All pools share one store.
    let pools = app.names.iter().map(|name| {
        let reason = reason.clone();
        (name, PoolHealthBody { status, shards: None, shards_in_rotation: None, reason })
    });
    health::response(pools, |name| app.guard.allows(&admitted, name)).map(Body::from)
}
