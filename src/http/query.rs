//! `?type=…&count=…`: parsed at the edge, so that what follows has a pool and a count. Pure.

use std::num::NonZeroU32;
use std::sync::Arc;

use super::answer::Refusal;
use crate::pool::Pool;

/// The pool of a request that names none.
const TYPE_DEFAULT: &str = "int";

/// What a request asks for.
#[derive(Debug)]
pub(super) struct Wanted<'p> {
    pub(super) pool: &'p Arc<Pool>,
    /// `None` for a single number in the short form.
    pub(super) count: Option<NonZeroU32>,
}

/// Reads a query string.
///
/// # Errors
/// A [`Refusal`] that names what is allowed.
pub(super) fn parse<'p>(
    pools: &'p [Arc<Pool>],
    count_limit: NonZeroU32,
    query: Option<&str>,
) -> Result<Wanted<'p>, Refusal> {
    let (mut type_, mut count) = (None, None);
    for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        let parameter = match &*name {
            "type" => &mut type_,
            "count" => &mut count,
            _ => return Err(Refusal::UnknownParameter { given: name.into_owned() }),
        };
        if parameter.replace(value).is_some() {
            return Err(Refusal::RepeatedParameter { given: name.into_owned() });
        }
    }
    let type_ = type_.as_deref().unwrap_or(TYPE_DEFAULT);
    let pool = pools.iter().find(|pool| pool.name().as_str() == type_).ok_or_else(|| {
        let names: Vec<_> = pools.iter().map(|pool| pool.name().as_str()).collect();
        Refusal::UnknownType { given: type_.to_owned(), allowed: names.join(", ") }
    })?;
    let count = count.map(|text| parse_count(&text, count_limit)).transpose()?;
    Ok(Wanted { pool, count })
}

fn parse_count(text: &str, limit: NonZeroU32) -> Result<NonZeroU32, Refusal> {
    // `parse` alone would let "+5" through.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let count = text.parse().ok().filter(|&count| digits && count <= limit);
    count.ok_or_else(|| Refusal::BadCount { given: text.to_owned(), limit: limit.get() })
}
