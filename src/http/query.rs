//! Parses `?type=…&count=…` into a pool and a count. Pure.

use std::num::NonZeroU32;

use super::response::ApiError;
use crate::config::PoolName;

/// The pool of a request without `type`.
pub(super) const TYPE_DEFAULT: &str = "int";

/// The parameters of a request.
#[derive(Debug)]
pub(super) struct Wanted {
    /// The pool's position among the names.
    pub(super) pool: usize,
    /// `None` for a single number in the short form.
    pub(super) count: Option<NonZeroU32>,
}

/// Parses a query string. Without a `count_limit`, the parameter `count` is not allowed.
///
/// # Errors
/// A [`ApiError`] that says what is allowed.
pub(super) fn parse<'p>(
    pools: impl Iterator<Item = &'p PoolName> + Clone,
    count_limit: Option<NonZeroU32>,
    query: Option<&str>,
) -> Result<Wanted, ApiError> {
    let (mut type_, mut count) = (None, None);
    let allowed = if count_limit.is_some() { "type, count" } else { "type" };
    for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        let parameter = match &*name {
            "type" => &mut type_,
            "count" if count_limit.is_some() => &mut count,
            _ => return Err(ApiError::UnknownParameter { given: name.into_owned(), allowed }),
        };
        if parameter.replace(value).is_some() {
            return Err(ApiError::RepeatedParameter { given: name.into_owned(), allowed });
        }
    }
    let type_ = type_.as_deref().unwrap_or(TYPE_DEFAULT);
    let pool = pools.clone().position(|name| name.as_str() == type_).ok_or_else(|| {
        let names: Vec<_> = pools.map(PoolName::as_str).collect();
        ApiError::UnknownType { given: type_.to_owned(), allowed: names.join(", ") }
    })?;
    let count =
        count.zip(count_limit).map(|(text, limit)| parse_count(&text, limit)).transpose()?;
    Ok(Wanted { pool, count })
}

fn parse_count(text: &str, limit: NonZeroU32) -> Result<NonZeroU32, ApiError> {
    // `parse` alone would let "+5" through.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let count = text.parse().ok().filter(|&count| digits && count <= limit);
    count.ok_or_else(|| ApiError::BadCount { given: text.to_owned(), limit: limit.get() })
}
