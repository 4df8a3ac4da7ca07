//! The page on which people read the description and try it: Swagger UI, out of the program itself.
//! Knows nothing of what is described.

use std::sync::{Arc, LazyLock};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_ENCODING};
use axum::http::{HeaderValue, Uri};
use axum::response::Response;
use utoipa_swagger_ui::Config;

use super::answer::{Refusal, typed};
use super::{DOCS, OPENAPI};

/// Where its files are.
pub(super) const FILE: &str = "/docs/{file}";

/// What the page loads; the library brings more.
pub(super) const FILES: [&str; 6] = [
    "favicon-32x32.png",
    "index.css",
    "swagger-initializer.js",
    "swagger-ui-bundle.js",
    "swagger-ui-standalone-preset.js",
    "swagger-ui.css",
];

/// Addresses in it are relative, so that it works below a proxy's prefix.
const PAGE: &str = include_str!("docs.html");

/// Nothing from other hosts, and nothing sent to them. Swagger UI sets styles as it goes, and has
/// images in them.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
     img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| {
    let config = Config::new([OPENAPI.trim_start_matches('/')])
        .use_base_layout()
        .display_request_duration(true)
        // Without it the page would ask a validator on the internet.
        .validator_url("none");
    Arc::new(config)
});

/// `/docs`.
pub(super) async fn page() -> Response {
    typed(HeaderValue::from_static("text/html; charset=utf-8"), Some(POLICY), Body::from(PAGE))
}

/// `/docs/{file}`.
pub(super) async fn file(uri: Uri) -> Result<Response, Refusal> {
    let name = uri.path().strip_prefix(DOCS).and_then(|path| path.strip_prefix('/'));
    let name = name.filter(|name| FILES.contains(name)).ok_or(Refusal::UnknownPath)?;
    let file = utoipa_swagger_ui::serve(name, Arc::clone(&CONFIG))
        .expect("the settings of the page can be written as JSON")
        .expect("the library has each of FILES");
    let content_type = HeaderValue::from_str(&file.content_type).expect("media types are ASCII");
    let mut answer = typed(content_type, None, Body::from(file.bytes));
    let headers = answer.headers_mut();
    // 1.5 MB of script: worth keeping for an hour, and a newer program's page has it soon enough.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=3600"));
    if file.gzpipped {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(answer)
}
