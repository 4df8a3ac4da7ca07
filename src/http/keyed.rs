//! Requests for numbers that leave a receipt: those with an `Idempotency-Key` or a label, and all requests to
//! some pools. A repetition of a request with a key gets the same response.

use std::num::NonZeroU32;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::guard::{Admitted, Guard};
use super::lines::{self, Format};
use super::query::{self, Wanted};
use super::quota;
use super::response::ApiError;
use super::{AnyResponse, api_error, one_of, whole};
use crate::config::{PoolConfig, PoolName, Recorded};
use crate::pool::Pool;
use crate::receipts::{
    Given, KEY_BYTES_MAX, Kept, KeyDigest, Label, Origin, Receipt, Receipts, Request, Unavailable,
};

/// The header with the key, a string of RFC 8941 or the bare characters
/// (draft-ietf-httpapi-idempotency-key-header-07).
const KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The header of a response that repeats an earlier one.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The refusal of keys in the modes below sharded.
pub(super) const OF_MODE: ApiError =
    ApiError::KeysOff { reason: "Only the mode sharded supports Idempotency-Key." };

/// The refusal of keys and labels by pools that keep no receipts.
pub(super) const OF_POOL: ApiError = ApiError::KeysOff {
    reason: "This pool keeps no receipts, so requests to it can't have an Idempotency-Key or a label.",
};

const OF_FLEET: ApiError = ApiError::KeysOff {
    reason: "This server is part of a fleet without receipts.store, so an Idempotency-Key would be unknown \
             to its other instances.",
};

/// Lets requests leave receipts, as the settings of their pools say.
#[derive(Debug)]
pub(crate) struct Keeper {
    receipts: Arc<Receipts>,
    /// Whether requests may have a key.
    keys: bool,
    pools: Vec<(Arc<Origin>, Recorded)>,
}

/// A request that leaves a receipt.
pub(super) struct Asked<'k> {
    keeper: &'k Keeper,
    origin: &'k Arc<Origin>,
    key: Option<String>,
    count: Option<NonZeroU32>,
    label: Option<Label>,
    format: Format,
}

impl Keeper {
    pub(crate) fn new(receipts: Arc<Receipts>, keys: bool, pools: &[PoolConfig]) -> Self {
        let pools = pools.iter().map(|pool| {
            let origin = Origin { pool: pool.name.clone(), space: pool.space.clone() };
            (Arc::new(origin), pool.receipts)
        });
        Self { receipts, keys, pools: pools.collect() }
    }

    pub(super) fn receipts(&self) -> &Receipts {
        &self.receipts
    }

    /// Returns the request as one that leaves a receipt, or `None` if it leaves none.
    pub(super) fn asked(
        &self,
        key: Option<String>,
        wanted: &Wanted,
        format: Format,
    ) -> Result<Option<Asked<'_>>, ApiError> {
        let (origin, recorded) = &self.pools[wanted.pool];
        let is_marked = key.is_some() || wanted.label.is_some();
        let refused = match recorded {
            Recorded::Off if is_marked => Some(OF_POOL),
            _ if key.is_some() && !self.keys => Some(OF_FLEET),
            _ => None,
        };
        if let Some(error) = refused {
            self.receipts.counts().refused();
            return Err(error);
        }
        let leaves = is_marked || *recorded == Recorded::All;
        Ok(leaves.then(|| Asked {
            keeper: self,
            origin,
            key,
            count: wanted.count,
            label: wanted.label.clone(),
            format,
        }))
    }
}

impl Asked<'_> {
    /// Returns the numbers of the request's receipt, if its key has one already, or new numbers.
    pub(super) async fn respond(
        self,
        pool: &Arc<Pool>,
        count_limit: NonZeroU32,
        guard: &Guard,
        admitted: &Admitted,
    ) -> Result<AnyResponse, ApiError> {
        let receipts = &self.keeper.receipts;
        let responded = self.try_respond(pool, count_limit, guard, admitted).await;
        if let Err(ApiError::KeyReused { .. } | ApiError::ReceiptNotSaved) = responded {
            receipts.counts().refused();
        }
        responded
    }

    async fn try_respond(
        &self,
        pool: &Arc<Pool>,
        count_limit: NonZeroU32,
        guard: &Guard,
        admitted: &Admitted,
    ) -> Result<AnyResponse, ApiError> {
        let receipts = &self.keeper.receipts;
        let (caller, account) = (guard.caller(admitted), admitted.account.as_ref());
        // The keys are the owner's, and the owner may have a token for other pools.
        let may_see = |pool: &PoolName| guard.allows(admitted, pool);
        let mut first = match &self.key {
            Some(key) => Some(receipts.begin(KeyDigest::new(&caller.owner, key)).await),
            None => None,
        };
        let count = self.count.unwrap_or(NonZeroU32::MIN);
        let allowed = query::check_count(self.count, count_limit);
        // If there is no quota, and nothing to wait for, the key is looked up when the receipt is saved.
        let is_free = account.is_none() && allowed.is_ok();
        let ready = if is_free { pool.try_reserve(count) } else { None };
        let numbers = match ready {
            Some(numbers) => numbers,
            None => {
                // A replay costs no quota and needs no numbers, and the limit may have been higher before.
                if let Some(first) = &mut first
                    && let Some(receipt) = receipts.find(first).await?
                {
                    let replayed = self.replay(pool, receipt, may_see);
                    // A client that splits a draw has to learn the limit, whatever it used the key for.
                    return replayed.or_else(|reused| allowed.and(Err(reused)));
                }
                allowed?;
                quota::charge(account, self.count)?;
                let numbers = pool.reserve(count).await;
                numbers.map_err(|error| api_error(pool, error, count.get()))?
            }
        };
        let request = Request {
            origin: Arc::clone(self.origin),
            caller: caller.clone(),
            label: self.label.clone(),
            is_short: self.count.is_none(),
        };
        match receipts.save(first, numbers, request).await? {
            Kept::Given(given) => Ok(self.response(pool, given)),
            Kept::Known(receipt) => self.replay(pool, *receipt, may_see),
        }
    }

    /// Returns the response of a receipt, if it is that of an equal request.
    fn replay(
        &self,
        pool: &Pool,
        receipt: Receipt,
        may_see: impl Fn(&PoolName) -> bool,
    ) -> Result<AnyResponse, ApiError> {
        let count = self.count.map(|count| count.get() as usize);
        let is_same = receipt.origin.pool == self.origin.pool
            && receipt.given.count() == count
            && receipt.has_label(self.label.as_ref());
        if !is_same {
            let used_for = match may_see(&receipt.origin.pool) {
                true => used_for(&receipt),
                false => "one to another pool".to_owned(),
            };
            return Err(ApiError::KeyReused { used_for });
        }
        self.keeper.receipts.counts().replayed();
        let mut response = self.response(pool, receipt.given);
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        Ok(response)
    }

    fn response(&self, pool: &Pool, given: Given) -> AnyResponse {
        let single = given.values().next().filter(|_| given.is_short);
        match single {
            Some(value) => whole(one_of(&pool.space().number(value), &given.parts[0].0)),
            None => lines::response(self.format, pool.space(), given.parts),
        }
    }
}

impl From<Unavailable> for ApiError {
    fn from(Unavailable: Unavailable) -> Self {
        Self::ReceiptNotSaved
    }
}

/// Returns the parameters of a receipt's request.
fn used_for(receipt: &Receipt) -> String {
    let mut used_for = format!("type={}", receipt.origin.pool);
    if let Some(count) = receipt.given.count() {
        used_for += &format!(", count={count}");
    }
    if let Some(label) = receipt.label() {
        used_for += &format!(", label={label:?}");
    }
    used_for
}

/// Returns the key of a request. Both forms, with and without quotation marks, are the same key.
pub(super) fn key(method: &Method, headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if method != Method::POST {
        return Err(ApiError::KeyNeedsPost);
    }
    let key = parse_key(value.as_bytes()).filter(|_| values.next().is_none());
    key.map(Some).ok_or(ApiError::BadKey)
}

fn parse_key(value: &[u8]) -> Option<String> {
    let bare = match value.strip_prefix(b"\"") {
        None => value.to_vec(),
        Some(quoted) => unescape(quoted.strip_suffix(b"\"")?)?,
    };
    let fits = (1..=KEY_BYTES_MAX).contains(&bare.len())
        && bare.iter().all(u8::is_ascii_graphic)
        // Without quotation marks, these would be ambiguous.
        && (value.starts_with(b"\"") || !bare.contains(&b'"'));
    fits.then(|| String::from_utf8(bare).expect("it is ASCII"))
}

/// Returns the content of a quoted string, in which `\"` and `\\` stand for `"` and `\` (RFC 8941, 3.3.3).
fn unescape(quoted: &[u8]) -> Option<Vec<u8>> {
    let mut bare = Vec::with_capacity(quoted.len());
    let mut bytes = quoted.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'"' => return None,
            b'\\' => bare.push(*bytes.next().filter(|byte| b"\"\\".contains(byte))?),
            _ => bare.push(byte),
        }
    }
    Some(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_same_quoted_and_bare() {
        let check = |value: &str, expected: Option<&str>| {
            assert_eq!(parse_key(value.as_bytes()).as_deref(), expected, "{value}");
        };
        check("order-17", Some("order-17"));
        check("\"order-17\"", Some("order-17"));
        check("\"a\\\"b\\\\c\"", Some("a\"b\\c"));
        check(&"x".repeat(255), Some(&"x".repeat(255)));
        check(&"x".repeat(256), None);
        for wrong in [
            "", "\"\"", "\"", "\"a", "a\"", "a b", "\"a b\"", "\"a\"b\"", "\"a\\\"", "\"\\a\"",
            "ä", "a\tb",
        ] {
            check(wrong, None);
        }
    }
}
