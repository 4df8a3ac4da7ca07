//! How answers look: always JSON, never cached. The one table of status codes.

use axum::body::Body;
use axum::http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// When to ask again, in seconds: a refill that callers wait for takes less.
const RETRY_AFTER_SECONDS: &str = "1";

const APPLICATION_JSON: HeaderValue = HeaderValue::from_static("application/json");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

/// Why a request is not answered with what it asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("No available numbers. Shard is being refilled. Please retry shortly.")]
    Refilling,
    #[error("{}", exhausted(*.asked, *.left))]
    Exhausted { asked: u32, left: u64 },
    #[error("Unknown type {given:?}. Allowed are: {allowed}.")]
    UnknownType { given: String, allowed: String },
    #[error("Bad count {given:?}. Allowed are whole numbers from 1 to {limit}.")]
    BadCount { given: String, limit: u32 },
    #[error("Unknown parameter {given:?}. Allowed are: type, count.")]
    UnknownParameter { given: String },
    #[error(
        "The parameter {given:?} is given more than once. Allowed are: type, count, each once."
    )]
    RepeatedParameter { given: String },
    #[error("There is nothing at this path. Try /random or /health.")]
    UnknownPath,
    #[error("This path does not answer to that method. Allowed are: {allowed}.")]
    WrongMethod { allowed: &'static str },
}

impl Refusal {
    fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Refilling => (StatusCode::SERVICE_UNAVAILABLE, "refilling"),
            Self::Exhausted { .. } => (StatusCode::GONE, "exhausted"),
            Self::UnknownType { .. } => (StatusCode::BAD_REQUEST, "unknown_type"),
            Self::BadCount { .. } => (StatusCode::BAD_REQUEST, "bad_count"),
            Self::UnknownParameter { .. } | Self::RepeatedParameter { .. } => {
                (StatusCode::BAD_REQUEST, "unknown_parameter")
            }
            Self::UnknownPath => (StatusCode::NOT_FOUND, "not_found"),
            Self::WrongMethod { .. } => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
        }
    }
}

fn exhausted(asked: u32, left: u64) -> String {
    match left {
        0 => "All numbers of this range have been handed out.".to_owned(),
        _ => format!("Fewer than {asked} numbers of this range are left: {left}."),
    }
}

/// The body of a refusal.
#[derive(Serialize)]
struct Problem {
    error: String,
    code: &'static str,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, code) = self.status_and_code();
        let mut response = json(status, &Problem { error: self.to_string(), code });
        match self {
            Self::Refilling => {
                let seconds = HeaderValue::from_static(RETRY_AFTER_SECONDS);
                response.headers_mut().insert(RETRY_AFTER, seconds);
            }
            Self::WrongMethod { allowed } => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            }
            _ => {}
        }
        response
    }
}

/// An answer with this body.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let body = serde_json::to_vec(body).expect("the wire types have no maps with odd keys");
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, APPLICATION_JSON);
    headers.insert(CACHE_CONTROL, NO_STORE);
    response
}
