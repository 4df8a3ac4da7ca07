//! The limit on the numbers that each caller may take: the keys under `quota`.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::RefusedKey;
use super::server::COUNT_LIMIT_MAX;
use super::values::{Integer, number};

/// The allowed rates in numbers per second. A quota is counted in whole nanoseconds per number, so the
/// fastest is off by less than 0.1 %, and the slowest, one number in a quarter of an hour, is far from an
/// overflow.
const QUOTA_RATES: std::ops::RangeInclusive<f64> = 0.001..=1_000_000.0;

/// The most numbers that a quota grants at once: as many as the largest response has.
const BURST_MAX: u64 = COUNT_LIMIT_MAX;

/// The limit on the numbers that each caller may take.
#[derive(Clone, Debug)]
pub struct QuotaConfig {
    /// The time in which one number is granted.
    pub period: Duration,
    /// Numbers that may be taken at once after a rest.
    pub burst: NonZeroU32,
    /// Proxies that are trusted to say where a request comes from.
    pub trusted_proxies: Vec<IpNet>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct QuotaKeys {
    #[serde(deserialize_with = "number")]
    numbers_per_second: f64,
    burst: Option<Integer<1, BURST_MAX>>,
    trusted_proxies: Option<Vec<String>>,
}

impl QuotaKeys {
    /// Validates the keys, and sets `burst` if it is not set.
    pub(super) fn validate(&mut self) -> Result<QuotaConfig, RefusedKey> {
        let rate = self.numbers_per_second;
        if !QUOTA_RATES.contains(&rate) {
            let (min, max) = (QUOTA_RATES.start(), QUOTA_RATES.end());
            let problem = format!("allowed: {min} to {max}; without [quota] nothing is limited");
            return Err(RefusedKey::new("quota.numbers_per_second", problem));
        }
        // By default, the numbers that one second grants.
        let burst = self.burst.get_or_insert(Integer(rate.ceil() as u64)).0;
        let proxies = self.trusted_proxies.as_deref().unwrap_or_default();
        let proxies = proxies.iter().enumerate().map(|(index, text)| {
            let address = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse::<IpNet>().or_else(|_| address()).map_err(|_| {
                let problem = format!(
                    "{text:?} is not an address or a network, such as \"10.0.0.1\", \"10.0.0.0/8\" or \
                     \"2001:db8::/32\""
                );
                RefusedKey::new(format!("quota.trusted_proxies[{index}]"), problem)
            })
        });
        Ok(QuotaConfig {
            period: Duration::from_secs_f64(1.0 / rate),
            burst: u32::try_from(burst)
                .ok()
                .and_then(NonZeroU32::new)
                .expect("its type allows 1 to BURST_MAX"),
            trusted_proxies: proxies.collect::<Result<_, _>>()?,
        })
    }
}
