//! Who may ask for what. Looks at a request's head before any route does, so that none can be
//! forgotten; does nothing itself, so that a server with a runtime and one without can use it.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use governor::clock::MonotonicClock;
use ipnet::IpNet;

use super::answer::Refusal;
use super::forwarded;
use super::page;
use super::quota::{Account, Key, Quotas};
use super::{DOCS, HEALTH, OPENAPI, RANDOM, READY};
use crate::auth::{self, Denied};
use crate::config::{AuthConfig, QuotaConfig, Scope, TokenConfig};

/// Stands before the routes where there are tokens or a quota.
#[derive(Debug)]
pub(crate) struct Guard {
    /// Empty where anyone may ask.
    tokens: Vec<TokenConfig>,
    quotas: Option<Arc<Quotas>>,
    proxies: Vec<IpNet>,
}

impl Guard {
    /// Nothing where anyone may ask for any number of numbers.
    pub(crate) fn new(auth: &AuthConfig, quota: Option<&QuotaConfig>) -> Option<Arc<Self>> {
        let tokens = match auth {
            AuthConfig::Unsaid | AuthConfig::Anyone => Vec::new(),
            AuthConfig::Tokens(tokens) => tokens.clone(),
        };
        if tokens.is_empty() && quota.is_none() {
            return None;
        }
        let quotas = quota.map(|quota| Arc::new(Quotas::new(quota, MonotonicClock)));
        let proxies = quota.map(|quota| quota.trusted_proxies.clone()).unwrap_or_default();
        Some(Arc::new(Self { tokens, quotas, proxies }))
    }

    /// Whether it asks for tokens.
    pub(super) fn asks_for_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// The most numbers that it ever lets go at once, where that is limited.
    pub(super) fn burst(&self) -> Option<NonZeroU32> {
        self.quotas.as_ref().map(|quotas| quotas.burst())
    }

    /// Lets a request in, with what its numbers are counted against, if they are.
    pub(crate) fn admit(
        &self,
        path: &str,
        headers: &HeaderMap,
        peer: IpAddr,
    ) -> Result<Option<Account>, Refusal> {
        let Some(scope) = scope(path) else {
            return Ok(None);
        };
        let token = match &*self.tokens {
            [] => None,
            tokens => {
                let token = bearer(headers).ok_or(Refusal::Unauthorized)?;
                Some(auth::recognise(tokens, token, scope).map_err(|denied| match denied {
                    Denied::Unknown => Refusal::Unauthorized,
                    Denied::OtherScope => Refusal::Forbidden,
                })?)
            }
        };
        let quotas = self.quotas.as_ref().filter(|_| scope == Scope::Draw);
        Ok(quotas.map(|quotas| {
            let key = token.map_or_else(
                || Key::of_peer(forwarded::client(peer, headers, &self.proxies)),
                Key::Token,
            );
            Account { quotas: Arc::clone(quotas), key }
        }))
    }
}

/// What a token is to be for at this path, where there are tokens; nothing at a path that is open. In
/// the modes below sharded there is nothing at `/`, `/page.*`, `/docs*` and `/openapi.json`: there these
/// are 404s that are open too, which tells only the mode.
pub(super) fn scope(path: &str) -> Option<Scope> {
    match path {
        RANDOM => Some(Scope::Draw),
        HEALTH | READY | OPENAPI | DOCS => None,
        _ if page::has(path) => None,
        _ if path.strip_prefix(DOCS).is_some_and(|rest| rest.starts_with('/')) => None,
        // A path that is not known is not open: nobody learns without a token what there is.
        _ => Some(Scope::Observe),
    }
}

/// `Authorization: Bearer TOKEN`, once (RFC 6750, section 2.1; the scheme in any case, RFC 9110,
/// section 11.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}
