//! How `/health` looks. Pure; finds out nothing itself.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::answer::{Answer, json};
use crate::config::PoolName;
use crate::pool::Health;

/// The reason when a task that serves is gone.
pub(super) const DIED: &str = "a background task died; see the log";

/// How fit the process, or a pool, is to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Ok,
    /// It serves, and something needs looking after.
    Degraded,
    Down,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PoolHealth {
    pub(super) status: Status,
    /// Of a pool that has shards.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) shards: Option<usize>,
    /// Those that requests may draw from.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) shards_in_rotation: Option<usize>,
    /// Why it is not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) reason: Option<String>,
}

/// How fit the server is: as fit as the least fit of its pools.
#[derive(Serialize, ToSchema)]
#[schema(as = Health)]
pub(super) struct HealthAnswer<'p> {
    status: Status,
    pools: BTreeMap<&'p str, PoolHealth>,
}

/// The whole answer: as fit as the least fit pool.
pub(super) fn answer<'p>(pools: impl Iterator<Item = (&'p PoolName, PoolHealth)>) -> Answer {
    let pools: BTreeMap<_, _> = pools.map(|(name, health)| (name.as_str(), health)).collect();
    let status = pools.values().map(|pool| pool.status).max().unwrap_or(Status::Ok);
    let code =
        if status == Status::Down { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    json(code, &HealthAnswer { status, pools })
}

/// A pool's part of the answer.
pub(super) fn of_pool(health: Health) -> PoolHealth {
    let Health { in_rotation, shards, .. } = health;
    let (status, reason) = fitness(health);
    PoolHealth { status, shards: Some(shards), shards_in_rotation: Some(in_rotation), reason }
}

/// How fit a pool is, and why it is not fitter.
pub(super) fn fitness(health: Health) -> (Status, Option<String>) {
    let Health { serves, exhausted, shared, alive, trouble, .. } = health;
    match (alive, serves, trouble) {
        (false, ..) => (Status::Down, Some(DIED.to_owned())),
        (true, false, _) if exhausted && shared => (
            Status::Down,
            Some(
                "what this instance may draw is used up, and no strata are left to claim"
                    .to_owned(),
            ),
        ),
        (true, false, _) if exhausted => (Status::Down, Some("the range is used up".to_owned())),
        (true, false, Some(trouble)) => (Status::Down, Some(trouble)),
        (true, false, None) => (Status::Down, Some("all shards are being refilled".to_owned())),
        (true, true, Some(trouble)) => (Status::Degraded, Some(trouble)),
        (true, true, None) => (Status::Ok, None),
    }
}
