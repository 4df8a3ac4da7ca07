//! Finds the client's address behind trusted proxies. Pure.

use std::net::{IpAddr, SocketAddr};

use axum::http::header::FORWARDED;
use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Returns the nearest address that is not a trusted proxy's, according to the proxies.
///
/// Each proxy appends the address that it got the request from, in one of two headers. A client can make up
/// everything to the left of what a trusted proxy appended, and the whole header that the proxies don't use.
/// So if both headers are present they have to agree; otherwise the proxy itself counts as the client.
pub(super) fn client(peer: IpAddr, headers: &HeaderMap, proxies: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    let walk = |name: HeaderName, address: fn(&str) -> Option<IpAddr>| {
        headers.contains_key(&name).then(|| {
            let mut nearest = peer;
            let lines: Vec<_> = headers.get_all(&name).iter().collect();
            // From the right, and ignoring quotes: a quote that the client left open would hide what the
            // proxy appended.
            let mut hops =
                lines.iter().rev().flat_map(|line| line.as_bytes().rsplit(|&b| b == b','));
            while is_trusted(nearest, proxies)
                && let Some(hop) = hops.next()
                && let Some(next) = std::str::from_utf8(hop).ok().and_then(address)
            {
                nearest = next;
            }
            nearest
        })
    };
    if !is_trusted(peer, proxies) {
        return peer;
    }
    match (walk(X_FORWARDED_FOR, node), walk(FORWARDED, forwarded_for)) {
        (Some(one), None) | (None, Some(one)) => one,
        (Some(one), Some(other)) if one == other => one,
        _ => peer,
    }
}

fn is_trusted(address: IpAddr, proxies: &[IpNet]) -> bool {
    proxies.iter().any(|network| network.contains(&address))
}

/// Returns the `for` of one element of `Forwarded` (RFC 7239, section 4).
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let mut pairs = element.split(';').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.find(|(name, _)| name.trim().eq_ignore_ascii_case("for"))?;
    node(value.trim().trim_matches('"'))
}

/// Parses an address with or without a port, and an IPv6 address with or without brackets.
fn node(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse::<IpAddr>();
    let address = address.or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_what_trusted_proxies_added_is_believed() {
        let proxies: Vec<IpNet> = ["10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.7/32"]
            .map(|network| network.parse().unwrap())
            .to_vec();
        let check = |peer: &str, headers: &[(&'static str, &'static str)], expected: &str| {
            let mut map = HeaderMap::new();
            for &(name, value) in headers {
                map.append(name, HeaderValue::from_static(value));
            }
            let found = client(peer.parse().unwrap(), &map, &proxies);
            assert_eq!(found, expected.parse::<IpAddr>().unwrap(), "{peer} {headers:?}");
        };
        let x = "x-forwarded-for";
        let f = "forwarded";
        // The headers of an untrusted peer are ignored.
        check("203.0.113.9", &[], "203.0.113.9");
        check("203.0.113.9", &[(x, "198.51.100.1"), (f, "for=198.51.100.1")], "203.0.113.9");
        check("10.0.0.1", &[], "10.0.0.1");
        // One proxy or two; the addresses to the left of what they appended are ignored.
        check("10.0.0.1", &[(x, "198.51.100.1")], "198.51.100.1");
        check("::ffff:10.0.0.1", &[(x, "198.51.100.1")], "198.51.100.1");
        check("10.0.0.1", &[(x, "1.1.1.1, 198.51.100.1,192.0.2.7")], "198.51.100.1");
        check("10.0.0.1", &[(x, "1.1.1.1"), (x, "198.51.100.1, 10.9.9.9")], "198.51.100.1");
        check("10.0.0.1", &[(x, "10.1.1.1, 10.2.2.2")], "10.1.1.1");
        // The formats in use.
        check("10.0.0.1", &[(x, "198.51.100.1:4711")], "198.51.100.1");
        check("10.0.0.1", &[(x, "2001:db8::1")], "2001:db8::1");
        check("10.0.0.1", &[(x, "[2001:db8::1]:4711")], "2001:db8::1");
        check("10.0.0.1", &[(x, "[2001:db8::1]")], "2001:db8::1");
        check("10.0.0.1", &[(f, "for=198.51.100.1;proto=https")], "198.51.100.1");
        check("10.0.0.1", &[(f, "proto=http; For=\"[2001:db8::1]:4711\"")], "2001:db8::1");
        check("2001:db8:ffff::1", &[(f, "for=1.1.1.1, for=198.51.100.1")], "198.51.100.1");
        check("10.0.0.1", &[(f, "for=\"1.1.1.1, for=198.51.100.1")], "198.51.100.1");
        // An invalid entry ends the search: the last valid address counts.
        check("10.0.0.1", &[(x, "unknown")], "10.0.0.1");
        check("10.0.0.1", &[(x, "")], "10.0.0.1");
        check("10.0.0.1", &[(x, "198.51.100.1, nonsense")], "10.0.0.1");
        check("10.0.0.1", &[(x, "198.51.100.1, , 10.0.0.2")], "10.0.0.2");
        check("10.0.0.1", &[(f, "for=_hidden")], "10.0.0.1");
        check("10.0.0.1", &[(f, "by=198.51.100.1")], "10.0.0.1");
        // One header is the proxy's and the other the client's, and it is unknown which.
        check("10.0.0.1", &[(x, "1.1.1.1"), (f, "for=198.51.100.1")], "10.0.0.1");
        check("10.0.0.1", &[(x, "198.51.100.1"), (f, "for=198.51.100.1")], "198.51.100.1");
    }
}
