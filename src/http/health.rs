//! Builds the response of `/health` from the health of the pools. Pure.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::response::{JsonResponse, json};
use crate::config::PoolName;
use crate::pool::{Cause, PoolHealth};

/// The reason if a mode below sharded can't save numbers.
pub(super) const NOT_SAVED: &str = "numbers can't be saved; see the log";

/// The reason if a task of the server has died.
pub(super) const DIED: &str = "a background task died; see the log";

/// Whether the server, or a pool, can hand out numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Ok,
    /// It serves, but needs attention.
    Degraded,
    Down,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PoolHealthBody {
    pub(super) status: Status,
    /// Only in the mode sharded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) shards: Option<usize>,
    /// The shards that requests can take numbers from. Only in the mode sharded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) shards_in_rotation: Option<usize>,
    /// Why it is not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) reason: Option<String>,
}

/// The health of the server. Its status is the worst status of its pools.
#[derive(Serialize, ToSchema)]
#[schema(as = Health)]
pub(super) struct HealthBody<'p> {
    status: Status,
    pools: BTreeMap<&'p str, PoolHealthBody>,
}

/// Returns the response. Its status is the worst status of all pools, of which it names those that the caller
/// may see.
pub(super) fn response<'p>(
    pools: impl Iterator<Item = (&'p PoolName, PoolHealthBody)>,
    sees: impl Fn(&PoolName) -> bool,
) -> JsonResponse {
    let pools: Vec<_> = pools.collect();
    let status = pools.iter().map(|(_, pool)| pool.status).max().unwrap_or(Status::Ok);
    let pools = pools.into_iter().filter(|(name, _)| sees(name));
    let pools = pools.map(|(name, health)| (name.as_str(), health)).collect();
    let code =
        if status == Status::Down { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    json(code, &HealthBody { status, pools })
}

/// Returns a pool's part of the response. The path needs no token, so the reason has no details.
pub(super) fn of_pool(health: &PoolHealth) -> PoolHealthBody {
    let reason = health.trouble.as_ref().map(|trouble| words(trouble.cause).to_owned());
    let (status, reason) = fitness(health, reason);
    let (shards, in_rotation) = (Some(health.shards), Some(health.in_rotation));
    PoolHealthBody { status, shards, shards_in_rotation: in_rotation, reason }
}

fn words(cause: Cause) -> &'static str {
    match cause {
        Cause::DiskFull => "the disk is full",
        Cause::Shard => "a shard can't be used",
        Cause::Refill => "a shard can't be refilled",
        Cause::Fence => {
            "the fleet's fence can't be stepped: its store does not respond, or the disk fails"
        }
        Cause::Copy => {
            "the data folder was an old copy; this instance began again with new partitions"
        }
    }
}

/// Returns a pool's status, and the reason if it is not `ok`. `trouble` describes the pool's trouble.
pub(super) fn fitness(health: &PoolHealth, trouble: Option<String>) -> (Status, Option<String>) {
    let &PoolHealth { serves, exhausted, shared, alive, .. } = health;
    match (alive, serves, trouble) {
        (false, ..) => (Status::Down, Some(DIED.to_owned())),
        (true, false, _) if exhausted && shared => (
            Status::Down,
            Some(
                "what this instance may draw is used up, and no partitions are left to claim"
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
