//! The page on which people read the description and try it: Swagger UI, out of the program itself.
//! Knows nothing of what is described.

use std::sync::{Arc, LazyLock};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode, Uri};
use axum::response::Response;
use utoipa_swagger_ui::Config;

use super::answer::{Answer, Refusal, json_text};
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
    let mut page = json_text(StatusCode::OK, PAGE.to_owned());
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    page.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    page.map(Body::from)
}

/// `/docs/{file}`.
pub(super) async fn file(uri: Uri) -> Result<Response, Refusal> {
    let name = uri.path().strip_prefix(DOCS).and_then(|path| path.strip_prefix('/'));
    let name = name.filter(|name| FILES.contains(name)).ok_or(Refusal::UnknownPath)?;
    let file = utoipa_swagger_ui::serve(name, Arc::clone(&CONFIG))
        .expect("the settings of the page can be written as JSON")
        .expect("the library has each of FILES");
    let content_type = HeaderValue::from_str(&file.content_type).expect("media types are ASCII");
    let mut answer: Answer = json_text(StatusCode::OK, String::new());
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, content_type);
    // 1.5 MB of script: worth keeping for an hour, and a newer program's page has it soon enough.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=3600"));
    if file.gzpipped {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(answer.map(|_| Body::from(file.bytes)))
}
