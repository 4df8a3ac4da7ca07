//! Responses: their headers, their bodies, and the one table of status codes. A response is JSON unless it is
//! a page, a file of a page, the metrics, or lines of numbers. It is not cached unless it is a file of `/docs`,
//! and a browser must not guess its type.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
    RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use hyper::body::{Frame, SizeHint};
use serde::Serialize;
use utoipa::ToSchema;

use crate::config::Scope;
use crate::receipts::{KEY_BYTES_MAX, LABEL_BYTES_MAX};

/// The largest request body, in bytes, except that of an import. `POST /random` may hold three parameters in it.
pub(super) const BODY_MAX: usize = 16 * 1024;

/// The largest body of an import, in bytes: two million numbers of seven digits.
pub(crate) const IMPORT_MAX: usize = 16 << 20;

/// The most bytes of a body that are copied or written for a connection at a time, unless the body is whole: as
/// many as a connection buffers before it writes.
pub(super) const SLICE_BYTES: usize = 16 * 1024;

/// The seconds in `Retry-After`: a refill that callers wait for takes less than one.
const RETRY_AFTER_SECONDS: &str = "1";

/// A response with its whole body.
pub(crate) type JsonResponse = axum::http::Response<Vec<u8>>;

/// The headers of every response. Responses that are not JSON replace some of the values.
pub(super) const HEADERS: [(HeaderName, &str); 6] = [
    (CONTENT_TYPE, "application/json"),
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (REFERRER_POLICY, "no-referrer"),
    (X_FRAME_OPTIONS, "DENY"),
];

/// [`HEADERS`] as a map: cloning it costs less than inserting each header.
static HEADER_MAP: LazyLock<HeaderMap> = LazyLock::new(|| {
    HEADERS.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value))).collect()
});

/// Why a request gets an error response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("No available numbers. Shard is being refilled. Please retry shortly.")]
    Refilling,
    #[error("{}", exhausted(*.asked, *.left, *.shared))]
    Exhausted { asked: u32, left: u64, shared: bool },
    #[error("Unknown type {given:?}. Allowed: {allowed}.")]
    UnknownType { given: String, allowed: String },
    #[error("Bad count {given:?}. Allowed: whole numbers from 1 to {limit}.")]
    BadCount { given: String, limit: u32 },
    #[error("Unknown parameter {given:?}. Allowed: {allowed}.")]
    UnknownParameter { given: String, allowed: &'static str },
    #[error("The parameter {given:?} is given more than once. Allowed: {allowed}, each once.")]
    RepeatedParameter { given: String, allowed: &'static str },
    #[error("No free number was found in {tries} tries. Few or none of this range are left.")]
    OutOfTries { tries: u32 },
    #[error("The number could not be saved, so it is not handed out. Please retry shortly.")]
    NotSaved,
    #[error("A valid token is required.")]
    Unauthorized,
    #[error("The token lacks the scope {}, which this path requires.", .scope.as_str())]
    Forbidden { scope: Scope },
    #[error("The token is not for the pool {given}.")]
    ForbiddenPool { given: String },
    #[error("The token is restricted to some pools, so it is not for the settings.")]
    RestrictedToken,
    #[error("The settings were not reloaded: {message}.")]
    NotReloaded { message: String },
    #[error("The token has expired.")]
    Expired,
    #[error("Web pages of other sites may not use this server.")]
    CrossSite,
    #[error(
        "The host name in the header Host is not one of this server's. Use an IP address or localhost, or \
         add the name to server.hosts."
    )]
    OtherHost,
    #[error("The quota is used up at the moment. Please retry in {seconds} s.")]
    OverQuota { seconds: u64 },
    #[error(
        "A count of {asked} is more than the quota grants at once. Allowed: whole numbers up to {burst}."
    )]
    AboveBurst { asked: u32, burst: u32 },
    #[error("There is nothing at this path. Try /random or /health.")]
    UnknownPath,
    #[error("This path does not support that method. Allowed: {allowed}.")]
    WrongMethod { allowed: &'static str },
    #[error(
        "The body is larger than {limit} bytes. Send less: the parameters need no more than a line."
    )]
    BodyTooLarge { limit: usize },
    #[error("The body is larger than {} bytes. Send the lines in several requests.", IMPORT_MAX)]
    ImportTooLarge,
    #[error("{problem}.")]
    BadLines { problem: String },
    #[error(
        "The body is not text. Send the numbers one a line as text/plain, or in a column as text/csv."
    )]
    NotText,
    #[error(
        "The other instances of this fleet would hand out the numbers, so they can't be imported into it. Set \
         used_file of a new pool, from the first instance on."
    )]
    InFleet,
    #[error(
        "The import is not complete, because the server stops, is busy with other imports, or can't change a file. \
         Please send it again."
    )]
    ImportFailed,
    #[error("The body is not valid: {problem}. Allowed: a JSON object with type, count and label.")]
    BadBody { problem: String },
    #[error(
        "The body is not JSON. Send it with Content-Type: application/json, or without a body."
    )]
    NotJson,
    #[error("A prefetch takes no numbers. Send a request that is not speculative.")]
    Prefetch,
    #[error(
        "The header Idempotency-Key is not valid. Allowed: once, with 1 to {KEY_BYTES_MAX} visible ASCII \
         characters, with or without quotation marks."
    )]
    BadKey,
    #[error(
        "A request with an Idempotency-Key must be a POST, because a GET may be repeated unasked."
    )]
    KeyNeedsPost,
    #[error("{reason}")]
    KeysOff { reason: &'static str },
    #[error("The Idempotency-Key was used for another request: {used_for}. Use a new key.")]
    KeyReused { used_for: String },
    #[error(
        "Bad label. Allowed: 1 to {LABEL_BYTES_MAX} bytes of UTF-8 without control characters."
    )]
    BadLabel,
    #[error("The receipt could not be saved, so no numbers are handed out. Please retry shortly.")]
    ReceiptNotSaved,
    #[error("The receipts can't be read at the moment. Please retry shortly.")]
    ReceiptsAway,
    #[error("There is no receipt of this number for this caller.")]
    NoReceipt,
    #[error("This server keeps no index of numbers, because receipts.lookups is false.")]
    LookupsOff,
    #[error("Bad {name} {given:?}. Allowed: whole numbers.")]
    BadNumber { name: &'static str, given: String },
}

/// A machine-readable word for the error. `out_of_tries` and `not_saved` occur only in the modes below sharded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Code {
    Refilling,
    OutOfTries,
    NotSaved,
    Exhausted,
    UnknownType,
    BadCount,
    UnknownParameter,
    Unauthorized,
    Forbidden,
    CrossSite,
    OverQuota,
    AboveBurst,
    NotFound,
    MethodNotAllowed,
    BodyTooLarge,
    BadBody,
    NotJson,
    Prefetch,
    BadKey,
    KeyNeedsPost,
    KeysOff,
    KeyReused,
    BadLabel,
    ReceiptNotSaved,
    ReceiptsAway,
    NoReceipt,
    LookupsOff,
    BadNumber,
    NotReloaded,
    BadLines,
    NotText,
    InFleet,
    ImportFailed,
}

impl ApiError {
    /// Returns the error for a body of more than `limit` bytes.
    pub(super) fn too_large(limit: usize) -> Self {
        match limit {
            IMPORT_MAX => Self::ImportTooLarge,
            limit => Self::BodyTooLarge { limit },
        }
    }

    /// Returns the status, the code, and advice for the caller.
    pub(super) fn row(&self) -> (StatusCode, Code, &'static str) {
        const LATER: &str = "Retry after the number of seconds in `Retry-After`.";
        const NAMED: &str = "The message says what is allowed.";
        match self {
            Self::Refilling => (StatusCode::SERVICE_UNAVAILABLE, Code::Refilling, LATER),
            Self::OutOfTries { .. } => (StatusCode::SERVICE_UNAVAILABLE, Code::OutOfTries, LATER),
            Self::NotSaved => (StatusCode::SERVICE_UNAVAILABLE, Code::NotSaved, LATER),
            Self::Exhausted { .. } => (
                StatusCode::GONE,
                Code::Exhausted,
                "The range is used up for good, or fewer numbers are left than were requested; the \
                 message says how many. In a fleet, another instance may have numbers left.",
            ),
            Self::UnknownType { .. } => (StatusCode::BAD_REQUEST, Code::UnknownType, NAMED),
            Self::BadCount { .. } => (StatusCode::BAD_REQUEST, Code::BadCount, NAMED),
            Self::UnknownParameter { .. } | Self::RepeatedParameter { .. } => {
                (StatusCode::BAD_REQUEST, Code::UnknownParameter, NAMED)
            }
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, Code::Unauthorized, "Send a token."),
            Self::Expired => (
                StatusCode::UNAUTHORIZED,
                Code::Unauthorized,
                "Ask the operator for the token that replaces it.",
            ),
            Self::Forbidden { .. } => {
                (StatusCode::FORBIDDEN, Code::Forbidden, "Send a token of the required scope.")
            }
            Self::ForbiddenPool { .. } => {
                (StatusCode::FORBIDDEN, Code::Forbidden, "Use one of the token's pools.")
            }
            Self::RestrictedToken => {
                (StatusCode::FORBIDDEN, Code::Forbidden, "Send a token for all pools.")
            }
            Self::NotReloaded { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                Code::NotReloaded,
                "Nothing changed. Correct what the message names, and reload again.",
            ),
            Self::CrossSite | Self::OtherHost => (
                StatusCode::FORBIDDEN,
                Code::CrossSite,
                "Send the request from a page of this server, or from a program, to a host name that the \
                 server knows.",
            ),
            Self::OverQuota { .. } => (StatusCode::TOO_MANY_REQUESTS, Code::OverQuota, LATER),
            Self::AboveBurst { .. } => (
                StatusCode::BAD_REQUEST,
                Code::AboveBurst,
                "Request fewer numbers at once: the quota never grants this many.",
            ),
            Self::UnknownPath => (StatusCode::NOT_FOUND, Code::NotFound, "Check the path."),
            Self::WrongMethod { .. } => (
                StatusCode::METHOD_NOT_ALLOWED,
                Code::MethodNotAllowed,
                "Use one of the methods that `Allow` lists.",
            ),
            Self::BodyTooLarge { .. } | Self::ImportTooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                Code::BodyTooLarge,
                "Send at most 16 KiB, or 16 MiB to import numbers. The other paths use no body.",
            ),
            Self::BadLines { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                Code::BadLines,
                "Nothing was imported. Correct the lines that the message names, or leave them out.",
            ),
            Self::NotText => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                Code::NotText,
                "Send `text/plain` or `text/csv`.",
            ),
            Self::InFleet => (
                StatusCode::CONFLICT,
                Code::InFleet,
                "Numbers are imported into a pool of a fleet when it is made: see `used_file`.",
            ),
            Self::ImportFailed => (StatusCode::SERVICE_UNAVAILABLE, Code::ImportFailed, LATER),
            Self::BadBody { .. } => (StatusCode::BAD_REQUEST, Code::BadBody, NAMED),
            Self::NotJson => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                Code::NotJson,
                "Send the parameters as JSON, or in the URL.",
            ),
            Self::Prefetch => (
                StatusCode::FORBIDDEN,
                Code::Prefetch,
                "Request numbers when they are needed, not ahead of a click.",
            ),
            Self::BadKey => (StatusCode::BAD_REQUEST, Code::BadKey, NAMED),
            Self::KeyNeedsPost => (StatusCode::BAD_REQUEST, Code::KeyNeedsPost, "Send a POST."),
            Self::KeysOff { .. } => (
                StatusCode::BAD_REQUEST,
                Code::KeysOff,
                "Send the request without a key and a label, or ask the operator to enable receipts.",
            ),
            Self::KeyReused { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                Code::KeyReused,
                "Use a new key for each request, and the same one only for its repetitions.",
            ),
            Self::BadLabel => (StatusCode::BAD_REQUEST, Code::BadLabel, NAMED),
            Self::ReceiptNotSaved => {
                (StatusCode::SERVICE_UNAVAILABLE, Code::ReceiptNotSaved, LATER)
            }
            Self::ReceiptsAway => (StatusCode::SERVICE_UNAVAILABLE, Code::ReceiptsAway, LATER),
            Self::NoReceipt => (
                StatusCode::NOT_FOUND,
                Code::NoReceipt,
                "The number was not given to this caller. Nothing else can be told about it.",
            ),
            Self::LookupsOff => (
                StatusCode::BAD_REQUEST,
                Code::LookupsOff,
                "Ask the operator to set `receipts.lookups`, or read `/receipts`.",
            ),
            Self::BadNumber { .. } => (StatusCode::BAD_REQUEST, Code::BadNumber, NAMED),
        }
    }
}

fn exhausted(asked: u32, left: u64, shared: bool) -> String {
    match left {
        _ if shared => format!(
            "This instance has {left} numbers of this range left and can't draw more. Other instances \
             of its fleet may have some."
        ),
        0 => "All numbers of this range have been handed out.".to_owned(),
        _ => format!("Fewer than {asked} numbers of this range are left: {left}."),
    }
}

/// The body of an error response.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// A human-readable message.
    error: String,
    code: Code,
}

impl From<ApiError> for JsonResponse {
    fn from(error: ApiError) -> Self {
        let (status, code, _) = error.row();
        let mut response = json(status, &ErrorBody { error: error.to_string(), code });
        match error {
            ApiError::Refilling
            | ApiError::OutOfTries { .. }
            | ApiError::NotSaved
            | ApiError::ReceiptNotSaved
            | ApiError::ReceiptsAway
            | ApiError::ImportFailed => {
                let seconds = HeaderValue::from_static(RETRY_AFTER_SECONDS);
                response.headers_mut().insert(RETRY_AFTER, seconds);
            }
            ApiError::OverQuota { seconds } => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            ApiError::Unauthorized | ApiError::Expired => {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // The rest of the body would be read as the next request.
            ApiError::BodyTooLarge { .. } | ApiError::ImportTooLarge => {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            ApiError::WrongMethod { allowed } => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            }
            _ => {}
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        JsonResponse::from(self).map(Body::from)
    }
}

/// Returns a response with this body as JSON.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> JsonResponse {
    let body = serde_json::to_string(body).expect("the wire types have no maps with odd keys");
    json_text(status, body)
}

/// Returns a response of this content type. A page has a content security policy of its own.
pub(super) fn typed<B>(
    content_type: HeaderValue,
    policy: Option<&'static str>,
    body: B,
) -> Response<B> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.clone_from(&HEADER_MAP);
    headers.insert(CONTENT_TYPE, content_type);
    if let Some(policy) = policy {
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    }
    response
}

/// Returns a response with this body, which is JSON already.
pub(super) fn json_text(status: StatusCode, body: String) -> JsonResponse {
    let mut response = JsonResponse::new(body.into_bytes());
    *response.status_mut() = status;
    response.headers_mut().clone_from(&HEADER_MAP);
    response
}

/// Allows only these methods: all others get 405.
pub(super) fn only<S>(methods: MethodRouter<S>, allowed: &'static str) -> MethodRouter<S>
where
    S: Clone + Send + Sync + 'static,
{
    methods.fallback(async move || ApiError::WrongMethod { allowed })
}

/// Returns a body that all connections share. Each connection copies one slice at a time, so that a client
/// that does not read costs no more memory than a slice.
pub(super) fn shared(bytes: Bytes) -> Body {
    Body::new(Slices(bytes))
}

/// The rest of a shared body.
struct Slices(Bytes);

impl HttpBody for Slices {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.0.len().min(SLICE_BYTES);
        let slice = self.0.split_to(length);
        Poll::Ready((length > 0).then_some(Ok(Frame::data(slice))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}
