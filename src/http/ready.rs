//! How `/ready` looks. Pure; finds out nothing itself.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde::Serialize;

use super::answer::{Answer, json};
use crate::config::PoolName;

/// Whether numbers can be had.
#[derive(Serialize)]
struct ReadyAnswer<'p> {
    /// Of every pool.
    ready: bool,
    pools: BTreeMap<&'p str, bool>,
}

/// The whole answer: 503 unless every pool is ready.
pub(super) fn answer<'p>(pools: impl Iterator<Item = (&'p PoolName, bool)>) -> Answer {
    let pools: BTreeMap<_, _> = pools.map(|(name, ready)| (name.as_str(), ready)).collect();
    let ready = pools.values().all(|&ready| ready);
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(code, &ReadyAnswer { ready, pools })
}
