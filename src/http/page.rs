//! The page at `/` and its parts. They are compiled in, load nothing from other hosts and hold no
//! figures: those the page asks `/status` for, with the token that it is given.

use axum::body::Body;
use axum::http::HeaderValue;
use axum::response::Response;
use axum::routing::{MethodRouter, get};

use super::answer::typed;

/// Path, type and text.
pub(super) const PARTS: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page/page.js")),
    ("/page.svg", "image/svg+xml", include_str!("page/page.svg")),
];

/// No script, style or form but the page's own: it knows tokens.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Whether this is one of the parts.
pub(super) fn has(path: &str) -> bool {
    PARTS.iter().any(|(part, ..)| *part == path)
}

/// The routes of the parts.
pub(super) fn routes<S: Clone + Send + Sync + 'static>()
-> impl Iterator<Item = (&'static str, MethodRouter<S>)> {
    PARTS
        .into_iter()
        .map(|(path, content_type, text)| (path, get(async move || answer(content_type, text))))
}

fn answer(content_type: &'static str, text: &'static str) -> Response {
    typed(HeaderValue::from_static(content_type), Some(POLICY), Body::from(text))
}
