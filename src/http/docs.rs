//! The page that shows the API description: Swagger UI, compiled into the program. Knows nothing of the
//! description's content.

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use axum::body::Bytes;
use axum::http::header::{CACHE_CONTROL, CONTENT_ENCODING};
use axum::http::{HeaderValue, Uri};
use axum::response::Response;
use utoipa_swagger_ui::Config;

use super::response::{ApiError, shared, typed};
use super::{DOCS, OPENAPI};

/// The path of its files.
pub(super) const FILE: &str = "/docs/{file}";

/// The files that the page loads. The library has more.
pub(super) const FILES: [&str; 6] = [
    "favicon-32x32.png",
    "index.css",
    "swagger-initializer.js",
    "swagger-ui-bundle.js",
    "swagger-ui-standalone-preset.js",
    "swagger-ui.css",
];

/// The page. Its links are relative, so that it works behind a proxy that adds a path prefix.
const PAGE: &str = include_str!("docs.html");

/// Forbids loading anything from other hosts and sending anything to them. Swagger UI sets inline styles,
/// with `data:` images in them.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
     img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| {
    let config = Config::new([OPENAPI.trim_start_matches('/')])
        .use_base_layout()
        .display_request_duration(true)
        // By default the page would send the description to a validator on the internet.
        .validator_url("none");
    Arc::new(config)
});

/// Handles `/docs`.
pub(super) async fn page() -> Response {
    let body = shared(Bytes::from_static(PAGE.as_bytes()));
    typed(HeaderValue::from_static("text/html; charset=utf-8"), Some(POLICY), body)
}

/// Handles `/docs/{file}`.
pub(super) async fn file(uri: Uri) -> Result<Response, ApiError> {
    let name = uri.path().strip_prefix(DOCS).and_then(|path| path.strip_prefix('/'));
    let name = name.filter(|name| FILES.contains(name)).ok_or(ApiError::UnknownPath)?;
    let file = utoipa_swagger_ui::serve(name, Arc::clone(&CONFIG))
        .expect("the settings of the page can be written as JSON")
        .expect("the library has each of FILES");
    let content_type = HeaderValue::from_str(&file.content_type).expect("media types are ASCII");
    let bytes = match file.bytes {
        Cow::Borrowed(bytes) => Bytes::from_static(bytes),
        Cow::Owned(bytes) => Bytes::from(bytes),
    };
    let mut response = typed(content_type, None, shared(bytes));
    let headers = response.headers_mut();
    // 1.5 MB of script: worth caching, and after an hour an upgraded server's page has the new files.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=3600"));
    if file.gzpipped {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(response)
}
