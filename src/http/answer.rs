//! How answers look: JSON, unless it is a page, a page's file or the metrics; never cached, unless a
//! file says so; never taken for what they are not. The one table of status codes.

use std::sync::LazyLock;

use axum::body::Body;
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
    RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// A request's body, in bytes. No route looks at it: room for what a client sends out of habit.
pub(crate) const BODY_MAX: usize = 16 * 1024;

/// When to ask again, in seconds: a refill that callers wait for takes less.
const RETRY_AFTER_SECONDS: &str = "1";

/// An answer, whichever server sends it.
pub(crate) type Answer = axum::http::Response<Vec<u8>>;

/// What every answer says about itself; those that are not JSON have other words for some.
pub(super) const HEADERS: [(HeaderName, &str); 6] = [
    (CONTENT_TYPE, "application/json"),
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (REFERRER_POLICY, "no-referrer"),
    (X_FRAME_OPTIONS, "DENY"),
];

/// [`HEADERS`], made once: a copy of the whole map costs less than as many inserts.
static HEADER_MAP: LazyLock<HeaderMap> = LazyLock::new(|| {
    HEADERS.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value))).collect()
});

/// Why a request is not answered with what it asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("No available numbers. Shard is being refilled. Please retry shortly.")]
    Refilling,
    #[error("{}", exhausted(*.asked, *.left, *.shared))]
    Exhausted { asked: u32, left: u64, shared: bool },
    #[error("Unknown type {given:?}. Allowed are: {allowed}.")]
    UnknownType { given: String, allowed: String },
    #[error("Bad count {given:?}. Allowed are whole numbers from 1 to {limit}.")]
    BadCount { given: String, limit: u32 },
    #[error("Unknown parameter {given:?}. Allowed are: {allowed}.")]
    UnknownParameter { given: String, allowed: &'static str },
    #[error("The parameter {given:?} is given more than once. Allowed are: {allowed}, each once.")]
    RepeatedParameter { given: String, allowed: &'static str },
    #[error("No free number was found in {tries} tries. Few of this range are left, or none.")]
    OutOfTries { tries: u32 },
    #[error("The number could not be saved, so it is not handed out. Please retry shortly.")]
    NotSaved,
    #[error("The server is stopping.")]
    Stopping,
    #[error("A valid token is needed.")]
    Unauthorized,
    #[error("The token is not for this.")]
    Forbidden,
    #[error("The quota is used up for now. Please retry in {seconds} s.")]
    OverQuota { seconds: u64 },
    #[error(
        "A count of {asked} is more than the quota ever grants at once. Allowed are up to {burst}."
    )]
    AboveBurst { asked: u32, burst: u32 },
    #[error("There is nothing at this path. Try /random or /health.")]
    UnknownPath,
    #[error("This path does not answer to that method. Allowed are: {allowed}.")]
    WrongMethod { allowed: &'static str },
    #[error("The body is larger than {limit} bytes. None is needed: parameters go into the URL.")]
    BodyTooLarge { limit: usize },
}

/// What is wrong, in a word for programs. `out_of_tries`, `not_saved` and `stopping` are of the modes
/// below sharded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Code {
    Refilling,
    OutOfTries,
    NotSaved,
    Stopping,
    Exhausted,
    UnknownType,
    BadCount,
    UnknownParameter,
    Unauthorized,
    Forbidden,
    OverQuota,
    AboveBurst,
    NotFound,
    MethodNotAllowed,
    BodyTooLarge,
}

impl Refusal {
    /// The status, the code, and what a caller does about it.
    pub(super) fn row(&self) -> (StatusCode, Code, &'static str) {
        const LATER: &str = "Ask again after the seconds in `Retry-After`.";
        const NAMED: &str = "The message names what is allowed.";
        match self {
            Self::Refilling => (StatusCode::SERVICE_UNAVAILABLE, Code::Refilling, LATER),
            Self::OutOfTries { .. } => (StatusCode::SERVICE_UNAVAILABLE, Code::OutOfTries, LATER),
            Self::NotSaved => (StatusCode::SERVICE_UNAVAILABLE, Code::NotSaved, LATER),
            Self::Stopping => (StatusCode::SERVICE_UNAVAILABLE, Code::Stopping, LATER),
            Self::Exhausted { .. } => (
                StatusCode::GONE,
                Code::Exhausted,
                "The range is used up, for good; the message says how many are left if more were \
                 asked for. In a fleet, what this instance may draw of it: ask another.",
            ),
            Self::UnknownType { .. } => (StatusCode::BAD_REQUEST, Code::UnknownType, NAMED),
            Self::BadCount { .. } => (StatusCode::BAD_REQUEST, Code::BadCount, NAMED),
            Self::UnknownParameter { .. } | Self::RepeatedParameter { .. } => {
                (StatusCode::BAD_REQUEST, Code::UnknownParameter, NAMED)
            }
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, Code::Unauthorized, "Send a token."),
            Self::Forbidden => {
                (StatusCode::FORBIDDEN, Code::Forbidden, "Send a token that is for this.")
            }
            Self::OverQuota { .. } => (StatusCode::TOO_MANY_REQUESTS, Code::OverQuota, LATER),
            Self::AboveBurst { .. } => (
                StatusCode::BAD_REQUEST,
                Code::AboveBurst,
                "Ask for less at once: this much is never granted.",
            ),
            Self::UnknownPath => (StatusCode::NOT_FOUND, Code::NotFound, "Look at the path."),
            Self::WrongMethod { .. } => (
                StatusCode::METHOD_NOT_ALLOWED,
                Code::MethodNotAllowed,
                "Of other methods at this path; `Allow` names those that it answers to.",
            ),
            Self::BodyTooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, Code::BodyTooLarge, "Send no body: none is needed.")
            }
        }
    }
}

fn exhausted(asked: u32, left: u64, shared: bool) -> String {
    match left {
        _ if shared => format!(
            "This instance has {left} numbers of this range left and can draw no more. Others of its \
             fleet may."
        ),
        0 => "All numbers of this range have been handed out.".to_owned(),
        _ => format!("Fewer than {asked} numbers of this range are left: {left}."),
    }
}

/// The body of a refusal.
#[derive(Serialize, ToSchema)]
pub(super) struct Problem {
    /// What is wrong, in a sentence for people.
    error: String,
    code: Code,
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let (status, code, _) = refusal.row();
        let mut answer = json(status, &Problem { error: refusal.to_string(), code });
        match refusal {
            Refusal::Refilling
            | Refusal::OutOfTries { .. }
            | Refusal::NotSaved
            | Refusal::Stopping => {
                let seconds = HeaderValue::from_static(RETRY_AFTER_SECONDS);
                answer.headers_mut().insert(RETRY_AFTER, seconds);
            }
            Refusal::OverQuota { seconds } => {
                answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            Refusal::Unauthorized => {
                answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // The rest of the body would be taken for the next request.
            Refusal::BodyTooLarge { .. } => {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Refusal::WrongMethod { allowed } => {
                answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            }
            _ => {}
        }
        answer
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        Answer::from(self).map(Body::from)
    }
}

/// An answer with this body.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let body = serde_json::to_string(body).expect("the wire types have no maps with odd keys");
    json_text(status, body)
}

/// An answer with a body that is not JSON, and with a policy of its own if it is a page.
pub(super) fn typed<B>(
    content_type: HeaderValue,
    policy: Option<&'static str>,
    body: B,
) -> Response<B> {
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.clone_from(&HEADER_MAP);
    headers.insert(CONTENT_TYPE, content_type);
    if let Some(policy) = policy {
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    }
    answer
}

/// An answer with this body, which is JSON.
pub(super) fn json_text(status: StatusCode, body: String) -> Answer {
    let mut answer = Answer::new(body.into_bytes());
    *answer.status_mut() = status;
    answer.headers_mut().clone_from(&HEADER_MAP);
    answer
}
