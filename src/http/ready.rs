//! Builds the response of `/ready`, and decides whether the server is ready. Reads the pools' health from its
//! callers only.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::response::{JsonResponse, json};
use crate::config::PoolName;
use crate::pool::PoolHealth;

/// Whether to send requests to this server.
#[derive(Serialize, ToSchema)]
#[schema(as = Ready)]
pub(super) struct ReadyBody<'p> {
    /// Whether to send requests to this server.
    ready: bool,
    /// Whether each pool has numbers to hand out now.
    pools: BTreeMap<&'p str, bool>,
}

/// Returns the response, which is a 503 unless the server is ready.
pub(super) fn response<'p>(
    ready: bool,
    pools: impl Iterator<Item = (&'p PoolName, bool)>,
) -> JsonResponse {
    let pools = pools.map(|(name, serves)| (name.as_str(), serves)).collect();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(code, &ReadyBody { ready, pools })
}

/// The pools that could serve since the start. It keeps one pool's trouble from making the server not ready
/// for the others.
#[derive(Debug)]
pub(super) struct Readiness {
    /// For each pool, whether it could serve, or was exhausted, at some time since the start.
    started: Vec<AtomicBool>,
}

impl Readiness {
    pub(super) fn new(pools: usize) -> Self {
        Self { started: (0..pools).map(|_| AtomicBool::new(false)).collect() }
    }

    /// Returns the readiness after a reload. If all pools have served once, new ones need not.
    pub(super) fn after_reload(&self, pools: usize) -> Self {
        let all = self.started.iter().all(|started| started.load(Ordering::Relaxed));
        Self { started: (0..pools).map(|_| AtomicBool::new(all)).collect() }
    }

    /// Returns whether the server is ready. It is not ready before each pool could serve once or was
    /// exhausted; from then on it is ready while any pool serves. It is also ready if all pools are
    /// exhausted, because another server would give the same response.
    pub(super) fn look<'h>(&self, pools: impl Iterator<Item = &'h PoolHealth>) -> bool {
        let (mut all_started, mut any_serves, mut all_exhausted) = (true, false, true);
        for (started, health) in self.started.iter().zip(pools) {
            if health.serves || health.exhausted {
                started.store(true, Ordering::Relaxed);
            }
            all_started &= started.load(Ordering::Relaxed);
            any_serves |= health.serves;
            all_exhausted &= health.exhausted;
        }
        all_started && (any_serves || all_exhausted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Story: a load balancer used a server before one of its pools had any numbers, and stopped using
    /// another one for good when one of its two ranges was used up.
    #[test]
    fn each_pool_has_to_serve_once_and_then_one_is_enough() {
        const SERVES: (bool, bool) = (true, false);
        const REFILLS: (bool, bool) = (false, false);
        const EXHAUSTED: (bool, bool) = (false, true);
        let health = |(serves, exhausted)| PoolHealth {
            in_rotation: 1,
            shards: 1,
            serves,
            exhausted,
            shared: false,
            alive: true,
            trouble: None,
        };
        let check = |looks: &[([(bool, bool); 2], bool)]| {
            let readiness = Readiness::new(2);
            for (pools, expected) in looks {
                let pools = pools.map(health);
                assert_eq!(readiness.look(pools.iter()), *expected, "{looks:?}: {pools:?}");
            }
        };
        check(&[
            ([REFILLS, REFILLS], false),
            ([SERVES, REFILLS], false),
            ([SERVES, SERVES], true),
            ([SERVES, REFILLS], true),
            ([REFILLS, REFILLS], false),
            ([REFILLS, SERVES], true),
        ]);
        // The pools need not serve at the same time.
        check(&[([SERVES, REFILLS], false), ([REFILLS, SERVES], true)]);
        check(&[
            ([EXHAUSTED, REFILLS], false),
            ([EXHAUSTED, SERVES], true),
            ([EXHAUSTED, REFILLS], false),
            ([EXHAUSTED, EXHAUSTED], true),
        ]);
        check(&[([EXHAUSTED, EXHAUSTED], true), ([SERVES, EXHAUSTED], true)]);
    }
}
