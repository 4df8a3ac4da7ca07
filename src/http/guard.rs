//! Decides whether a request is admitted, by its token, or by its host name and the web page that sent it.
//! Checks the head of every request before it reaches a route, so that no route can skip the check. Charges
//! no quota.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use governor::clock::MonotonicClock;
use ipnet::IpNet;

use super::forwarded;
use super::page;
use super::quota::{Account, Key, Quotas, TokenId};
use super::response::ApiError;
use super::{DOCS, HEALTH, OPENAPI, RANDOM, READY, RECEIPT, RECEIPTS, RELOAD, USED};
use crate::auth::{self, Denied, TokenIndex};
use crate::config::{AuthConfig, Config, PoolName, QuotaConfig, Scope, TokenConfig};
use crate::receipts::Caller;

/// The header in which a browser says where a request comes from. A page can neither set nor omit it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The headers in which a browser says that it may not show the response: the standard's, and two older ones.
const PURPOSE: [HeaderName; 3] = [
    HeaderName::from_static("sec-purpose"),
    HeaderName::from_static("purpose"),
    HeaderName::from_static("x-moz"),
];

/// The beginning of the paths of pools.
const POOLS: &str = "/pools/";

/// The checks that a request has to pass.
#[derive(Debug)]
pub(crate) struct Guard {
    /// The tokens of the settings. If there are none, requests need no token.
    tokens: Vec<TokenConfig>,
    /// The host names of this server, besides IP addresses and `localhost`.
    hosts: Vec<String>,
    /// Whether `Host` has to be one of these.
    checks_host: bool,
    quotas: Option<Arc<Quotas>>,
    /// The quotas of look-ups, if there are look-ups.
    lookups: Option<Arc<Quotas>>,
    proxies: Vec<IpNet>,
    /// The caller behind each token, and last the one without a token.
    callers: Vec<Caller>,
    /// The identifier of each token.
    ids: Vec<TokenId>,
}

/// The right of an admitted request.
#[derive(Clone, Debug)]
pub(crate) struct Admitted {
    /// The account to charge its numbers or look-ups to, if a quota applies.
    pub(super) account: Option<Account>,
    /// The caller's position in [`Guard::caller`].
    caller: usize,
    /// Whether it may see the receipts of all owners.
    pub(super) sees_all: bool,
}

impl Guard {
    /// Creates the guard that the settings describe. Callers keep the quotas that they have used up at the previous
    /// guard, if there is one with the same quotas.
    pub(crate) fn new(config: &Config, previous: Option<&Self>) -> Arc<Self> {
        let tokens = match &config.auth {
            AuthConfig::Unsaid | AuthConfig::Anyone => Vec::new(),
            AuthConfig::Tokens(tokens) => tokens.clone(),
        };
        let quota = config.quota.as_ref();
        let of_previous = |quotas: fn(&Self) -> &Option<Arc<Quotas>>, config: &QuotaConfig| {
            let kept = previous.and_then(|guard| quotas(guard).as_ref());
            kept.filter(|quotas| quotas.are_of(config))
                .map_or_else(|| Arc::new(Quotas::new(config, MonotonicClock)), Arc::clone)
        };
        let quotas = quota.map(|quota| of_previous(|guard| &guard.quotas, quota));
        let proxies = quota.map(|quota| quota.trusted_proxies.clone()).unwrap_or_default();
        let hosts = config.server.hosts.clone();
        let is_loopback = config.server.listen.ip().to_canonical().is_loopback();
        let checks_host = is_loopback || !hosts.is_empty();
        let lookups = config.receipts.lookups.map(|burst| {
            let period = Duration::from_secs(1) / burst.get();
            let quota = QuotaConfig { period, burst, trusted_proxies: Vec::new() };
            of_previous(|guard| &guard.lookups, &quota)
        });
        let caller = |token: &TokenConfig| Caller {
            owner: token.owner.to_string().into(),
            token: token.name.to_string().into(),
        };
        let callers = tokens.iter().map(caller).chain([Caller::default()]).collect();
        let ids = tokens.iter().map(|token| TokenId::new(&token.name)).collect();
        Arc::new(Self { tokens, hosts, checks_host, quotas, lookups, proxies, callers, ids })
    }

    /// Returns whether an admitted request may use and see a pool. A request without a token may do so unless
    /// some tokens are restricted to their pools.
    pub(super) fn allows(&self, admitted: &Admitted, pool: &PoolName) -> bool {
        match self.tokens.get(admitted.caller) {
            Some(token) => token.has_pool(pool),
            None => !self.hides_pools(),
        }
    }

    /// Returns the only pools that the token of an admitted request may use, or `None` for all.
    pub(super) fn only_pools(&self, admitted: &Admitted) -> Option<&[PoolName]> {
        self.tokens.get(admitted.caller)?.pools.as_deref()
    }

    /// Returns whether some tokens are restricted to their pools.
    pub(super) fn hides_pools(&self) -> bool {
        self.tokens.iter().any(|token| token.pools.is_some())
    }

    /// Returns the caller of an admitted request.
    pub(super) fn caller(&self, admitted: &Admitted) -> &Caller {
        &self.callers[admitted.caller]
    }

    /// Returns whether receipts can be looked up by their numbers.
    pub(super) fn has_lookups(&self) -> bool {
        self.lookups.is_some()
    }

    /// Returns whether requests to other host names are refused.
    pub(super) fn checks_host(&self) -> bool {
        self.checks_host && self.tokens.is_empty()
    }

    /// Returns whether requests need a token.
    pub(super) fn asks_for_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Returns the most numbers that the quota grants at once, if there is a quota.
    pub(super) fn burst(&self) -> Option<NonZeroU32> {
        self.quotas.as_ref().map(|quotas| quotas.burst())
    }

    /// Admits a request.
    pub(crate) fn admit(
        &self,
        path: &str,
        headers: &HeaderMap,
        peer: IpAddr,
    ) -> Result<Admitted, ApiError> {
        let nobody = self.callers.len() - 1;
        let Some(scope) = scope(path) else {
            let caller = self.caller_of_open_path(headers).unwrap_or(nobody);
            return Ok(Admitted { account: None, caller, sees_all: false });
        };
        if scope == Scope::Draw && is_speculative(headers) {
            return Err(ApiError::Prefetch);
        }
        let (token, sees_all) = match &*self.tokens {
            [] => {
                self.check_origin(headers)?;
                (None, true)
            }
            tokens => {
                let token = bearer(headers).ok_or(ApiError::Unauthorized)?;
                let recognised = |scope| auth::recognise(tokens, token, scope);
                let audit = match scope {
                    Scope::Lookup => recognised(Scope::Audit).ok(),
                    _ => None,
                };
                let known = audit.map_or_else(|| recognised(scope), Ok);
                let known = known.map_err(|denied| match denied {
                    Denied::Unknown => ApiError::Unauthorized,
                    Denied::OtherScope => ApiError::Forbidden { scope },
                    Denied::Expired => ApiError::Expired,
                })?;
                (Some(known), audit.is_some() || scope == Scope::Audit)
            }
        };
        let quotas = match scope {
            Scope::Draw => self.quotas.as_ref(),
            Scope::Lookup => self.lookups.as_ref(),
            Scope::Audit | Scope::Admin | Scope::Observe => None,
        };
        let account = quotas.map(|quotas| {
            let key = token.map_or_else(
                || Key::of_peer(forwarded::client(peer, headers, &self.proxies)),
                |TokenIndex(token)| Key::Token(self.ids[usize::from(token)]),
            );
            Account { quotas: Arc::clone(quotas), key }
        });
        let caller = token.map_or(nobody, |TokenIndex(token)| token.into());
        Ok(Admitted { account, caller, sees_all })
    }
}

impl Guard {
    /// Returns the caller of a request that needs no token, if it has one and it matters.
    fn caller_of_open_path(&self, headers: &HeaderMap) -> Option<usize> {
        let token = bearer(headers).filter(|_| self.hides_pools())?;
        let scopes = [Scope::Observe, Scope::Audit, Scope::Admin, Scope::Draw, Scope::Lookup];
        let mut known =
            scopes.iter().filter_map(|&scope| auth::recognise(&self.tokens, token, scope).ok());
        known.next().map(|TokenIndex(token)| token.into())
    }

    /// Refuses requests from web pages of other origins, which could otherwise take numbers through the
    /// browser of a user who has access. With tokens this check is not needed, because such a page can't add
    /// a token to a request.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let text = |name| headers.get(name).map(HeaderValue::to_str);
        // HTTP/1.0 may omit it, but no browser speaks HTTP/1.0.
        let host = match text(HOST) {
            None => None,
            Some(Ok(host)) => Some(host),
            Some(Err(_)) => return Err(ApiError::OtherHost),
        };
        // DNS rebinding: if the owner of a name points it at this server, their page has the same origin.
        if self.checks_host
            && let Some(host) = host
            && !self.is_known(name_of(host))
        {
            return Err(ApiError::OtherHost);
        }
        // The browser knows the origin better than this server, which may be behind a proxy. "same-site"
        // includes other ports of this machine: a page there can load an image without an Origin.
        let is_own = match (text(SEC_FETCH_SITE), text(ORIGIN)) {
            (Some(site), _) => matches!(site, Ok("same-origin" | "none")),
            (None, Some(origin)) => origin.is_ok_and(|origin| self.is_own(origin, host)),
            (None, None) => true,
        };
        if is_own { Ok(()) } else { Err(ApiError::CrossSite) }
    }

    /// Returns whether a name is an IP address, `localhost`, or one of the settings. Only these are safe from
    /// DNS rebinding.
    fn is_known(&self, name: &str) -> bool {
        let v6 = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        v6.map_or(name.parse::<Ipv4Addr>().is_ok(), |v6| v6.parse::<Ipv6Addr>().is_ok())
            || name.eq_ignore_ascii_case("localhost")
            || self.is_of_settings(name)
    }

    fn is_of_settings(&self, name: &str) -> bool {
        self.hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
    }

    /// Returns whether an origin is the host that the request was sent to, or a host of the settings. Schemes
    /// are not compared, because a proxy may speak TLS with the browser.
    fn is_own(&self, origin: &str, host: Option<&str>) -> bool {
        let Some((_, authority)) = origin.split_once("://") else {
            return false;
        };
        host.is_some_and(|host| host.eq_ignore_ascii_case(authority))
            || self.is_of_settings(name_of(authority))
    }
}

/// Returns whether a browser sent the request ahead of need, in which case the numbers may be lost.
fn is_speculative(headers: &HeaderMap) -> bool {
    PURPOSE.iter().any(|name| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.is_some_and(|value| value.to_ascii_lowercase().contains("prefetch"))
    })
}

/// Returns `HOST` or `HOST:PORT` without the port.
fn name_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => authority,
    }
}

/// Returns the scope that a token needs at this path, or `None` if the path needs no token. In the modes
/// below sharded `/`, `/page.*`, `/docs*` and `/openapi.json` are 404s that need no token either, which
/// reveals only the mode.
pub(super) fn scope(path: &str) -> Option<Scope> {
    match path {
        RANDOM => Some(Scope::Draw),
        RECEIPTS => Some(Scope::Audit),
        RECEIPT => Some(Scope::Lookup),
        _ if path.strip_prefix(RECEIPTS).is_some_and(|rest| rest.starts_with('/')) => {
            Some(Scope::Lookup)
        }
        RELOAD | USED => Some(Scope::Admin),
        _ if path.strip_prefix(POOLS).is_some_and(|rest| rest.ends_with("/used")) => {
            Some(Scope::Admin)
        }
        HEALTH | READY | OPENAPI | DOCS => None,
        _ if page::has(path) => None,
        _ if path.strip_prefix(DOCS).is_some_and(|rest| rest.starts_with('/')) => None,
        // Unknown paths need a token too, so that a caller without one can't find out which paths exist.
        _ => Some(Scope::Observe),
    }
}

/// Returns the token of `Authorization: Bearer TOKEN`, if the header occurs once (RFC 6750, section 2.1). The
/// case of the scheme is ignored (RFC 9110, section 11.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}
