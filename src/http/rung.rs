//! The routes of the rungs without a pool, and their answers, whichever server sends them. Draws
//! nothing itself, so that a server with a runtime and one without can.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::Response;
use axum::{Extension, Router};
use serde::Serialize;

use super::answer::{Answer, Refusal, json};
use super::health::{self, PoolHealth, Status};
use super::quota::{self, Account};
use super::{RANDOM_METHODS, TELL_METHODS, query, ready};
use crate::config::PoolConfig;
use crate::rungs::{Desk, DrawError, Health, PoolIndex, TRIES_MAX};
use crate::space::{Number, Value};

/// What is offered, and how it looks.
#[derive(Debug)]
pub(crate) struct Routes {
    pools: Vec<PoolConfig>,
}

/// What a request comes to.
#[derive(Debug)]
pub(crate) enum Step {
    /// A number of this pool is to be drawn, and then [answered](Routes::number).
    Draw(PoolIndex),
    /// All is said.
    Done(Answer),
}

/// One number.
#[derive(Serialize)]
struct One {
    number: Number,
}

impl Routes {
    pub(crate) fn new(pools: Vec<PoolConfig>) -> Self {
        Self { pools }
    }

    /// What a request for this path comes to, when the guard let it in.
    pub(crate) fn step(
        &self,
        method: &str,
        path: &str,
        query: Option<&str>,
        account: Option<&Account>,
        health: &Health,
    ) -> Step {
        let step = match (path, method) {
            ("/random", "GET" | "POST") => self.draw(query, account).map(Step::Draw),
            ("/random", "HEAD") => self.probe(query, health).map(Step::Done),
            ("/random", _) => Err(Refusal::WrongMethod { allowed: RANDOM_METHODS }),
            ("/health", "GET" | "HEAD") => Ok(Step::Done(self.health(health))),
            ("/ready", "GET" | "HEAD") => Ok(Step::Done(self.ready(health))),
            ("/health" | "/ready", _) => Err(Refusal::WrongMethod { allowed: TELL_METHODS }),
            _ => Err(Refusal::UnknownPath),
        };
        step.unwrap_or_else(|refusal| Step::Done(refusal.into()))
    }

    /// The answer to a request that a number was drawn for.
    pub(crate) fn number(&self, pool: PoolIndex, drawn: Result<Value, DrawError>) -> Answer {
        match drawn {
            Ok(value) => {
                json(StatusCode::OK, &One { number: self.pools[pool.0].space.number(value) })
            }
            Err(DrawError::OutOfTries) => Refusal::OutOfTries { tries: TRIES_MAX }.into(),
            Err(DrawError::NotSaved) => Refusal::NotSaved.into(),
        }
    }

    fn draw(&self, query: Option<&str>, account: Option<&Account>) -> Result<PoolIndex, Refusal> {
        let pool = self.pool(query)?;
        quota::charge(account, None)?;
        Ok(pool)
    }

    fn pool(&self, query: Option<&str>) -> Result<PoolIndex, Refusal> {
        let names = self.pools.iter().map(|pool| &pool.name);
        Ok(PoolIndex(query::parse(names, None, query)?.pool))
    }

    /// `HEAD /random`: what a `GET` would be answered with, as far as that is known without a try.
    fn probe(&self, query: Option<&str>, health: &Health) -> Result<Answer, Refusal> {
        self.pool(query)?;
        match health {
            Health { alive: true, trouble: None } => Ok(json(StatusCode::OK, &())),
            _ => Err(Refusal::NotSaved),
        }
    }

    fn ready(&self, health: &Health) -> Answer {
        let ready = matches!(health, Health { alive: true, trouble: None });
        ready::answer(self.pools.iter().map(|pool| (&pool.name, ready)))
    }

    fn health(&self, health: &Health) -> Answer {
        let (status, reason) = match health {
            Health { alive: false, .. } => (Status::Down, Some(health::DIED.to_owned())),
            Health { trouble: Some(trouble), .. } => (Status::Down, Some(trouble.clone())),
            Health { .. } => (Status::Ok, None),
        };
        // What a rung has, all its pools share.
        health::answer(self.pools.iter().map(|pool| {
            let reason = reason.clone();
            (&pool.name, PoolHealth { status, shards: None, shards_in_rotation: None, reason })
        }))
    }
}

/// The answer to a request that came too late to be answered.
pub(crate) fn stopping() -> Answer {
    Refusal::Stopping.into()
}

#[derive(Debug)]
struct Rung {
    routes: Routes,
    desk: Desk,
}

/// The routes of a rung behind axum. The desk is gone with the router.
pub(crate) fn rung_router(pools: Vec<PoolConfig>, desk: Desk) -> Router {
    Router::new().fallback(answer).with_state(Arc::new(Rung { routes: Routes::new(pools), desk }))
}

async fn answer(
    State(rung): State<Arc<Rung>>,
    account: Option<Extension<Account>>,
    method: Method,
    uri: Uri,
) -> Response {
    let Rung { routes, desk } = &*rung;
    let (path, query, account) = (uri.path(), uri.query(), account.as_deref());
    let answer = match routes.step(method.as_str(), path, query, account, &desk.health()) {
        Step::Draw(pool) => routes.number(pool, desk.draw(pool).await),
        Step::Done(answer) => answer,
    };
    answer.map(Body::from)
}
