//! The page at `/` and its parts. They are compiled in, load nothing from other hosts and contain no figures:
//! the page gets these from `/status`, with the token that the user enters.

use axum::body::Bytes;
use axum::http::HeaderValue;
use axum::response::Response;
use axum::routing::{MethodRouter, get};

use super::response::{shared, typed};

/// The path, content type and text of each part.
pub(super) const PARTS: [(&str, &str, &str); 7] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page/page.js")),
    ("/charts.js", "text/javascript; charset=utf-8", include_str!("page/charts.js")),
    ("/dom.js", "text/javascript; charset=utf-8", include_str!("page/dom.js")),
    ("/format.js", "text/javascript; charset=utf-8", include_str!("page/format.js")),
    ("/page.svg", "image/svg+xml", include_str!("page/page.svg")),
];

/// Allows the page's own scripts and styles only, because the page handles tokens.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Returns whether this is the path of a part.
pub(super) fn has(path: &str) -> bool {
    PARTS.iter().any(|(part, ..)| *part == path)
}

/// Returns the routes of the parts.
pub(super) fn routes<S: Clone + Send + Sync + 'static>()
-> impl Iterator<Item = (&'static str, MethodRouter<S>)> {
    PARTS
        .into_iter()
        .map(|(path, content_type, text)| (path, get(async move || response(content_type, text))))
}

fn response(content_type: &'static str, text: &'static str) -> Response {
    typed(
        HeaderValue::from_static(content_type),
        Some(POLICY),
        shared(Bytes::from_static(text.as_bytes())),
    )
}
