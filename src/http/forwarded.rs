//! Where a request comes from when proxies stand in between. Pure.

use std::net::{IpAddr, SocketAddr};

use axum::http::header::FORWARDED;
use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The address nearest to us that is not a trusted proxy's, as the proxies before us tell it.
///
/// Each proxy adds on the right where it got the request from, in one of two headers. What stands
/// left of what a trusted proxy added may be the client's own invention, and so may be all of the
/// header that the proxies do not use: where both are there they have to agree, or the proxy itself
/// counts as the client.
pub(super) fn client(peer: IpAddr, headers: &HeaderMap, proxies: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    let walk = |name: HeaderName, address: fn(&str) -> Option<IpAddr>| {
        headers.contains_key(&name).then(|| {
            let mut nearest = peer;
            let lines: Vec<_> = headers.get_all(&name).iter().collect();
            // From the right, and blind to quotes: one that a client left open would swallow what
            // the proxy added.
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

/// The `for` of one element of `Forwarded` (RFC 7239, section 4).
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let mut pairs = element.split(';').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.find(|(name, _)| name.trim().eq_ignore_ascii_case("for"))?;
    node(value.trim().trim_matches('"'))
}

/// An address with or without a port; in brackets, for IPv6, or not.
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
        // Nobody is trusted for what they say themselves.
        check("203.0.113.9", &[], "203.0.113.9");
        check("203.0.113.9", &[(x, "198.51.100.1"), (f, "for=198.51.100.1")], "203.0.113.9");
        check("10.0.0.1", &[], "10.0.0.1");
        // One proxy, two proxies; what is left of them is invented.
        check("10.0.0.1", &[(x, "198.51.100.1")], "198.51.100.1");
        check("::ffff:10.0.0.1", &[(x, "198.51.100.1")], "198.51.100.1");
        check("10.0.0.1", &[(x, "1.1.1.1, 198.51.100.1,192.0.2.7")], "198.51.100.1");
        check("10.0.0.1", &[(x, "1.1.1.1"), (x, "198.51.100.1, 10.9.9.9")], "198.51.100.1");
        check("10.0.0.1", &[(x, "10.1.1.1, 10.2.2.2")], "10.1.1.1");
        // As written here and there.
        check("10.0.0.1", &[(x, "198.51.100.1:4711")], "198.51.100.1");
        check("10.0.0.1", &[(x, "2001:db8::1")], "2001:db8::1");
        check("10.0.0.1", &[(x, "[2001:db8::1]:4711")], "2001:db8::1");
        check("10.0.0.1", &[(x, "[2001:db8::1]")], "2001:db8::1");
        check("10.0.0.1", &[(f, "for=198.51.100.1;proto=https")], "198.51.100.1");
        check("10.0.0.1", &[(f, "proto=http; For=\"[2001:db8::1]:4711\"")], "2001:db8::1");
        check("2001:db8:ffff::1", &[(f, "for=1.1.1.1, for=198.51.100.1")], "198.51.100.1");
        check("10.0.0.1", &[(f, "for=\"1.1.1.1, for=198.51.100.1")], "198.51.100.1");
        // What can't be read ends the way: the last that is known counts.
        check("10.0.0.1", &[(x, "unknown")], "10.0.0.1");
        check("10.0.0.1", &[(x, "")], "10.0.0.1");
        check("10.0.0.1", &[(x, "198.51.100.1, nonsense")], "10.0.0.1");
        check("10.0.0.1", &[(x, "198.51.100.1, , 10.0.0.2")], "10.0.0.2");
        check("10.0.0.1", &[(f, "for=_hidden")], "10.0.0.1");
        check("10.0.0.1", &[(f, "by=198.51.100.1")], "10.0.0.1");
        // One header is the proxy's and the other the client's, and nobody knows which.
        check("10.0.0.1", &[(x, "1.1.1.1"), (f, "for=198.51.100.1")], "10.0.0.1");
        check("10.0.0.1", &[(x, "198.51.100.1"), (f, "for=198.51.100.1")], "198.51.100.1");
    }
}
