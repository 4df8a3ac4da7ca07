//! Limits the numbers that each caller may take. A caller has a bucket that holds up to `burst` numbers and
//! fills at a steady rate, and a request takes its `count` from it. Knows nothing of tokens and addresses
//! except whether they differ.

use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::StateStore;
use governor::state::keyed::{HashMapStateStore, ShrinkableKeyedStateStore};
use governor::{InsufficientCapacity, RateLimiter};
use siphasher::sip::SipHasher13;

use super::response::ApiError;
use crate::config::{QuotaConfig, TokenName};

/// The most callers with a bucket of their own, about 40 bytes each. A bucket is dropped once it is full
/// again.
const KEYS_MAX: usize = 100_000;

/// Requests between two sweeps for full buckets. A sweep visits all buckets, up to [`KEYS_MAX`], while other
/// requests wait: ten buckets for each request.
const SWEEP_EVERY: u64 = 10_000;

/// The owner of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Token(TokenId),
    /// An address or a network, see [`Key::of_peer`].
    Network(IpAddr),
    /// All callers that arrived while [`KEYS_MAX`] others had a bucket of their own.
    Crowd,
}

impl Key {
    /// Returns the key of an IPv4 address, or of the first 64 bits of an IPv6 address, because a single
    /// customer can change the other bits at will.
    pub(super) fn of_peer(peer: IpAddr) -> Self {
        Self::Network(match peer.to_canonical() {
            IpAddr::V6(address) => {
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)))
            }
            v4 @ IpAddr::V4(_) => v4,
        })
    }
}

/// Identifies a token's entry by its name, as long as the process runs, although a reload may move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenId(u64);

impl TokenId {
    pub(super) fn new(name: &TokenName) -> Self {
        Self(SipHasher13::new().hash(name.to_string().as_bytes()))
    }
}

/// The buckets of all callers.
#[derive(Debug)]
pub(super) struct Quotas<C: Clock = MonotonicClock> {
    limiter: RateLimiter<Key, Buckets, C, NoOpMiddleware<C::Instant>>,
    burst: NonZeroU32,
    period: Duration,
    charges: AtomicU64,
}

impl<C: Clock> Quotas<C> {
    pub(super) fn new(config: &QuotaConfig, clock: C) -> Self {
        let quota = governor::Quota::with_period(config.period)
            .expect("a period above zero was checked in QuotaKeys::validate")
            .allow_burst(config.burst);
        let limiter = RateLimiter::new(quota, Buckets::default(), clock);
        let (burst, period) = (config.burst, config.period);
        Self { limiter, burst, period, charges: AtomicU64::new(0) }
    }

    /// Returns whether these are the quotas of the settings.
    pub(super) fn are_of(&self, config: &QuotaConfig) -> bool {
        (self.burst, self.period) == (config.burst, config.period)
    }

    /// Returns how many numbers a full bucket holds.
    pub(super) fn burst(&self) -> NonZeroU32 {
        self.burst
    }

    /// Takes `count` from a bucket, or nothing if it holds less.
    pub(super) fn charge(&self, key: Key, count: NonZeroU32) -> Result<(), ApiError> {
        if self.charges.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY == SWEEP_EVERY - 1 {
            self.limiter.retain_recent();
        }
        match self.limiter.check_key_n(&key, count) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => {
                let wait = until.wait_time_from(self.limiter.clock().now());
                let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                Err(ApiError::OverQuota { seconds })
            }
            Err(InsufficientCapacity(burst)) => {
                Err(ApiError::AboveBurst { asked: count.get(), burst })
            }
        }
    }
}

/// The buckets that are not full, up to [`KEYS_MAX`].
#[derive(Debug, Default)]
struct Buckets(HashMapStateStore<Key>);

impl StateStore for Buckets {
    type Key = Key;

    fn measure_and_replace<T, F, E>(&self, key: &Key, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let known = {
            let buckets = self.0.lock();
            buckets.len() < KEYS_MAX || buckets.contains_key(key)
        };
        self.0.measure_and_replace(if known { key } else { &Key::Crowd }, measure)
    }
}

impl ShrinkableKeyedStateStore<Key> for Buckets {
    fn retain_recent(&self, drop_below: Nanos) {
        self.0.retain_recent(drop_below);
    }

    fn len(&self) -> usize {
        ShrinkableKeyedStateStore::len(&self.0)
    }

    fn is_empty(&self) -> bool {
        ShrinkableKeyedStateStore::is_empty(&self.0)
    }
}

/// The bucket to charge an admitted request to.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(super) quotas: Arc<Quotas>,
    pub(super) key: Key,
}

/// Charges the requested numbers to the account, if there is one. They are not put back if the pool turns out
/// to have no numbers: such a request costs the server the same, and a client that retries in a loop is
/// slowed down.
pub(super) fn charge(account: Option<&Account>, count: Option<NonZeroU32>) -> Result<(), ApiError> {
    account.map_or(Ok(()), |Account { quotas, key }| {
        quotas.charge(*key, count.unwrap_or(NonZeroU32::MIN))
    })
}

/// Refuses a count that the quota never grants, and takes nothing.
pub(super) fn probe(account: Option<&Account>, count: Option<NonZeroU32>) -> Result<(), ApiError> {
    match (account.map(|account| account.quotas.burst()), count) {
        (Some(burst), Some(count)) if count > burst => {
            Err(ApiError::AboveBurst { asked: count.get(), burst: burst.get() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Returns quotas of one number in `period_ms` milliseconds, and their clock.
    fn quotas(period_ms: u32, burst: u32) -> (Quotas<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        let config = QuotaConfig {
            period: MS * period_ms,
            burst: NonZeroU32::new(burst).unwrap(),
            trusted_proxies: Vec::new(),
        };
        (Quotas::new(&config, clock.clone()), clock)
    }

    fn peer(address: &str) -> Key {
        Key::of_peer(address.parse().unwrap())
    }

    fn charge(quotas: &Quotas<FakeRelativeClock>, key: Key, count: u32) -> Result<(), ApiError> {
        quotas.charge(key, NonZeroU32::new(count).unwrap())
    }

    /// Returns the wait that a refusal asks for.
    fn wait(outcome: Result<(), ApiError>) -> Duration {
        match outcome {
            Err(ApiError::OverQuota { seconds }) => Duration::from_secs(seconds),
            other => panic!("not a refusal to wait for: {other:?}"),
        }
    }

    #[test]
    fn a_count_is_charged_by_its_size_and_a_refusal_is_free() {
        let (quotas, clock) = quotas(100, 10);
        let caller = peer("192.0.2.1");
        charge(&quotas, caller, 7).unwrap();
        for _ in 0..5 {
            wait(charge(&quotas, caller, 4));
        }
        charge(&quotas, caller, 3).unwrap();
        wait(charge(&quotas, caller, 1));
        charge(&quotas, peer("192.0.2.2"), 10).unwrap();
        clock.advance(100 * MS);
        charge(&quotas, caller, 1).unwrap();
        wait(charge(&quotas, caller, 1));
    }

    /// A caller that waits as long as the refusal says gets its numbers, and waiting a second less is not
    /// enough.
    #[test]
    fn the_wait_is_true_to_the_second() {
        for (period_ms, burst, counts) in
            [(100, 30, [30, 25]), (7, 1_000, [900, 777]), (1_000, 3, [3, 3]), (3_700, 2, [1, 2])]
        {
            let (quotas, clock) = quotas(period_ms, burst);
            let caller = peer("192.0.2.1");
            charge(&quotas, caller, counts[0]).unwrap();
            let wait_for = wait(charge(&quotas, caller, counts[1]));
            assert!(wait_for >= Duration::from_secs(1), "{period_ms}");
            clock.advance(wait_for - Duration::from_secs(1));
            wait(charge(&quotas, caller, counts[1]));
            clock.advance(Duration::from_secs(1));
            charge(&quotas, caller, counts[1]).unwrap();
        }
    }

    #[test]
    fn what_is_above_the_burst_is_told_from_what_comes_with_time() {
        let (quotas, clock) = quotas(1, 10);
        for _ in 0..2 {
            let outcome = charge(&quotas, peer("192.0.2.1"), 11);
            assert!(matches!(outcome, Err(ApiError::AboveBurst { asked: 11, burst: 10 })));
            clock.advance(Duration::from_secs(3_600));
        }
        charge(&quotas, peer("192.0.2.1"), 10).unwrap();
    }

    /// Story: each of the 2^64 addresses of a home network was a caller of its own.
    #[test]
    fn an_ipv6_network_is_one_caller() {
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
        assert_ne!(peer("::ffff:192.0.2.1"), peer("::ffff:192.0.2.2"));
    }

    /// Story: a client with many addresses filled the memory, with a bucket for each.
    #[test]
    fn full_buckets_are_forgotten_and_newcomers_share_one_when_there_are_too_many() {
        let (quotas, clock) = quotas(1_000, 2);
        let visit = |range: std::ops::Range<u32>| {
            range
                .filter(|&n| {
                    charge(&quotas, peer(&Ipv6Addr::from(u128::from(n) << 64).to_string()), 1)
                        .is_ok()
                })
                .count()
        };
        let many = u32::try_from(KEYS_MAX).unwrap();
        assert_eq!(visit(0..many), KEYS_MAX);
        assert_eq!(visit(many..many + 100), 2, "the numbers that one bucket holds");
        assert_eq!(visit(0..100), 100, "known callers keep their buckets");
        assert!(quotas.limiter.len() <= KEYS_MAX + 1);

        clock.advance(Duration::from_secs(3));
        let sweep = u32::try_from(SWEEP_EVERY).unwrap();
        visit(0..sweep);
        assert!(quotas.limiter.len() <= sweep as usize, "{}", quotas.limiter.len());
        assert_eq!(visit(many..many + 100), 100);
    }
}
