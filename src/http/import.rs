//! The route that imports numbers which were issued by other means. Knows nothing of where they are marked.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::Response;
use tracing::warn;

use super::App;
use super::guard::Admitted;
use super::response::{ApiError, IMPORT_MAX, json};
use crate::import::{self, Column, Layout, Outcome, Report};

const ALLOWED: &str = "check, column, line, skip";

/// Handles `POST /pools/{pool}/used`: marks the numbers of the body, so that none of them is handed out from now on.
pub(super) async fn used(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
    path: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (layout, only_check) = parse(query.as_deref().unwrap_or_default(), request.headers())?;
    let name = path.map(|Path(name)| name).unwrap_or_default();
    let pool = &app.pools[app.names(&admitted).find(&name)?];
    if pool.is_shared() {
        return Err(ApiError::InFleet);
    }
    let body = axum::body::to_bytes(request.into_body(), IMPORT_MAX).await;
    let body = body.map_err(|_| ApiError::ImportTooLarge)?;
    let space = pool.space().clone();
    let read = app.reads.start(move || import::read(&body[..], &layout, &space)).await;
    let values =
        read.expect("reading does not panic").map_err(|error| bad_lines(error.to_string()))?;
    let outcome = match only_check {
        true => Outcome::default(),
        false => pool.import(values).await.map_err(|_| ApiError::ImportFailed)?,
    };
    let (pool, reader) = (Arc::clone(pool), app.keeper.receipts().reader());
    let report = app.reads.start(move || {
        Report::new(pool.name(), pool.space(), &outcome, |value| {
            let receipt = reader.of_number(pool.name(), value, None);
            let receipt = receipt.unwrap_or_else(|error| {
                warn!(%error, "the receipt of an imported number can't be read");
                None
            });
            receipt.map(|receipt| receipt.seq)
        })
    });
    let report = report.await.expect("reporting does not panic");
    Ok(json(StatusCode::OK, &report).map(Body::from))
}

/// Returns where the numbers of a body are, and whether they are only checked.
fn parse(query: &str, headers: &HeaderMap) -> Result<(Layout, bool), ApiError> {
    let (mut check, mut column, mut line, mut skip) = (None, None, None, None);
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let parameter = match &*name {
            "check" => &mut check,
            "column" => &mut column,
            "line" => &mut line,
            "skip" => &mut skip,
            _ => {
                return Err(ApiError::UnknownParameter {
                    given: name.into_owned(),
                    allowed: ALLOWED,
                });
            }
        };
        if parameter.replace(value.into_owned()).is_some() {
            return Err(ApiError::RepeatedParameter { given: name.into_owned(), allowed: ALLOWED });
        }
    }
    let content_type = headers.get(CONTENT_TYPE).map(|value| value.to_str().unwrap_or("?"));
    let media_type = content_type.and_then(|text| text.split(';').next()).map(str::trim);
    let default = match media_type {
        None => None,
        Some(text) if text.eq_ignore_ascii_case("text/plain") => None,
        Some(text) if text.eq_ignore_ascii_case("text/csv") => Some(Column::Place(1)),
        Some(_) => return Err(ApiError::NotText),
    };
    let column = column.map(|column| column.parse()).transpose().map_err(bad_lines)?;
    let only_check = match check.as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(bad_lines("check is true or false")),
    };
    let first = line.as_deref().unwrap_or("1").parse::<u64>().ok().filter(|&line| line > 0);
    let lines_before = first.ok_or_else(|| bad_lines("line is the number of the first line"))? - 1;
    Ok((Layout { column: column.or(default), skip, lines_before }, only_check))
}

fn bad_lines(problem: impl Into<String>) -> ApiError {
    ApiError::BadLines { problem: problem.into() }
}
