//! Parses the parameters of a request, `?type=…&count=…` or the same as JSON in the body of a POST, into a pool
//! and a count. Pure.

use std::borrow::Cow;
use std::num::NonZeroU32;

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method};
use serde::{Deserialize, Deserializer, de};

use super::guard::{Admitted, Guard};
use super::response::ApiError;
use crate::config::PoolName;
use crate::receipts::Label;

/// The pool of a request without `type`.
pub(crate) const TYPE_DEFAULT: &str = "int";

/// The pools that a request may name.
pub(super) struct Names<'p> {
    /// The names of all pools, in ascending order.
    pub(super) sorted: &'p [PoolName],
    /// The caller, and the guard that knows which of the pools it may use. Without both, all may be named.
    pub(super) caller: Option<(&'p Guard, &'p Admitted)>,
}

impl Names<'_> {
    fn allows(&self, pool: &PoolName) -> bool {
        self.caller.is_none_or(|(guard, admitted)| guard.allows(admitted, pool))
    }

    /// Returns the pool's position.
    pub(super) fn find(&self, given: &str) -> Result<usize, ApiError> {
        match self.sorted.binary_search_by(|name| name.as_str().cmp(given)) {
            Ok(position) if self.allows(&self.sorted[position]) => Ok(position),
            Ok(_) => Err(ApiError::ForbiddenPool { given: given.to_owned() }),
            Err(_) => {
                let allowed = self.sorted.iter().filter(|name| self.allows(name));
                let allowed: Vec<_> = allowed.map(PoolName::as_str).collect();
                let (given, allowed) = (given.to_owned(), allowed.join(", "));
                Err(ApiError::UnknownType { given, allowed })
            }
        }
    }
}

/// The parameters of a request.
#[derive(Debug)]
pub(super) struct Wanted {
    /// The pool's position among the names.
    pub(super) pool: usize,
    /// `None` for a single number in the short form.
    pub(super) count: Option<NonZeroU32>,
    pub(super) label: Option<Label>,
}

/// The parameters in a body.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub(super) struct Parameters {
    #[serde(rename = "type", default, deserialize_with = "not_null")]
    type_: Option<String>,
    #[serde(default, deserialize_with = "whole")]
    count: Option<u64>,
    #[serde(default, deserialize_with = "not_null")]
    label: Option<String>,
}

/// Deserializes a parameter that is given, and refuses `null`.
fn not_null<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Deserializes a whole number. In JSON, `26.0` is one too.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = serde_json::Number::deserialize(deserializer)?;
    let from_float = || {
        let float = number.as_f64().filter(|float| float.fract() == 0.0);
        float.filter(|float| (0.0..1e15).contains(float)).map(|float| float as u64)
    };
    let count = number.as_u64().or_else(from_float);
    count
        .map(Some)
        .ok_or_else(|| de::Error::custom(format!("count is {number}, not a whole number")))
}

impl Parameters {
    /// Reads the body of a POST. Other methods have no parameters in their body.
    pub(super) fn of_body(
        method: &Method,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<Self, ApiError> {
        if body.is_empty() || method != Method::POST {
            return Ok(Self::default());
        }
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
        if !media_type.trim().eq_ignore_ascii_case("application/json") {
            return Err(ApiError::NotJson);
        }
        let bad = |problem| ApiError::BadBody { problem };
        // serde would read a list as the fields in their order.
        if !body.trim_ascii_start().starts_with(b"{") {
            return Err(bad("it is not an object".to_owned()));
        }
        serde_json::from_slice(body).map_err(|error| bad(error.to_string()))
    }
}

/// Parses a query string and the parameters of the body. Without a `count_limit`, the parameters `count` and
/// `label` are not allowed. The count may be above the limit: see [`check_count`].
///
/// # Errors
/// An [`ApiError`] that says what is allowed.
pub(super) fn parse(
    names: &Names<'_>,
    count_limit: Option<NonZeroU32>,
    query: Option<&str>,
    body: Parameters,
) -> Result<Wanted, ApiError> {
    let (mut type_, mut count, mut label) = (None, None, None);
    let allowed = if count_limit.is_some() { "type, count, label" } else { "type" };
    let in_body: [Option<(Cow<'_, str>, Cow<'_, str>)>; 3] = [
        body.type_.map(|type_| ("type".into(), type_.into())),
        body.count.map(|count| ("count".into(), count.to_string().into())),
        body.label.map(|label| ("label".into(), label.into())),
    ];
    let in_query = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    for (name, value) in in_body.into_iter().flatten().chain(in_query) {
        let parameter = match &*name {
            "type" => &mut type_,
            "count" if count_limit.is_some() => &mut count,
            "label" if count_limit.is_some() => &mut label,
            _ => return Err(ApiError::UnknownParameter { given: name.into_owned(), allowed }),
        };
        if parameter.replace(value).is_some() {
            return Err(ApiError::RepeatedParameter { given: name.into_owned(), allowed });
        }
    }
    let type_ = type_.as_deref().unwrap_or(TYPE_DEFAULT);
    let pool = names.find(type_)?;
    let count =
        count.zip(count_limit).map(|(text, limit)| parse_count(&text, limit)).transpose()?;
    let label = label.map(|text| Label::new(text.into_owned()).ok_or(ApiError::BadLabel));
    Ok(Wanted { pool, count, label: label.transpose()? })
}

fn parse_count(text: &str, limit: NonZeroU32) -> Result<NonZeroU32, ApiError> {
    // `parse` alone would let "+5" through.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let count = text.parse().ok().filter(|_| digits);
    count.ok_or_else(|| ApiError::BadCount { given: text.to_owned(), limit: limit.get() })
}

/// Refuses a count above the limit.
pub(super) fn check_count(count: Option<NonZeroU32>, limit: NonZeroU32) -> Result<(), ApiError> {
    match count.filter(|&count| count > limit) {
        Some(count) => Err(ApiError::BadCount { given: count.to_string(), limit: limit.get() }),
        None => Ok(()),
    }
}
