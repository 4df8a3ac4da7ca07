//! A keyed pseudorandom permutation of the numbers below a given size. Pure.
//!
//! It is an alternating Feistel network over the smallest power of two that is at least the size. Each round
//! combines one half of the bits with a keyed hash of the other half, which can be undone for any hash (Luby
//! and Rackoff, "How to Construct Pseudorandom Permutations from Pseudorandom Functions", 1988). A result
//! that is not below the size is permuted again until one is. This takes at most two evaluations on average,
//! and gives a permutation of the numbers below the size (Black and Rogaway, "Ciphers with Arbitrary Finite
//! Domains", 2002).

use siphasher::sip::SipHasher13;

/// Rounds of the network: as many as in FF1 (NIST SP 800-38G), which is the same construction with AES. With
/// random round functions, six rounds resist even an adversary who chooses values and sees where they are
/// moved, as long as they are far fewer than the square root of the domain (Patarin, "Security of Random
/// Feistel Schemes with 5 or More Rounds", 2004). Our adversary sees only which values came in one batch. The
/// other four rounds are a margin for SipHash and for small domains.
const ROUNDS: u8 = 10;

/// See the [module](self).
#[derive(Clone, Debug)]
pub(super) struct Permutation {
    size: u64,
    hasher: SipHasher13,
    /// Bits of the upper half: as many as the lower half has, or one fewer.
    upper_bits: u32,
    lower_bits: u32,
}

impl Permutation {
    /// Creates the permutation of the numbers below `size`, which is at least 1, under the hasher's key.
    pub(super) fn new(size: u64, hasher: SipHasher13) -> Self {
        let bits = u64::BITS - (size - 1).leading_zeros();
        Self { size, hasher, upper_bits: bits / 2, lower_bits: bits.div_ceil(2) }
    }

    /// Returns the image of `index`, which is below the size.
    pub(super) fn forward(&self, index: u64) -> u64 {
        self.walk(index, |upper, lower| {
            for round in (0..ROUNDS).step_by(2) {
                *upper ^= self.round(round, *lower, self.upper_bits);
                *lower ^= self.round(round + 1, *upper, self.lower_bits);
            }
        })
    }

    /// Returns the index whose image is `moved`, which is below the size.
    pub(super) fn backward(&self, moved: u64) -> u64 {
        self.walk(moved, |upper, lower| {
            for round in (0..ROUNDS).step_by(2).rev() {
                *lower ^= self.round(round + 1, *upper, self.lower_bits);
                *upper ^= self.round(round, *lower, self.upper_bits);
            }
        })
    }

    fn walk(&self, from: u64, step: impl Fn(&mut u64, &mut u64)) -> u64 {
        debug_assert!(from < self.size);
        let mut at = from;
        loop {
            let (mut upper, mut lower) = (at >> self.lower_bits, at & mask(self.lower_bits));
            step(&mut upper, &mut lower);
            at = (upper << self.lower_bits) | lower;
            if at < self.size {
                return at;
            }
        }
    }

    /// Returns SipHash-1-3 (Aumasson and Bernstein, 2012) of the round and a half.
    fn round(&self, round: u8, half: u64, bits: u32) -> u64 {
        // Nine bytes, to keep it apart from the hash of a value, which has eight.
        let mut bytes = [0; 9];
        bytes[..8].copy_from_slice(&half.to_le_bytes());
        bytes[8] = round;
        self.hasher.hash(&bytes) & mask(bits)
    }
}

fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn permutation(size: u64, key: u64) -> Permutation {
        Permutation::new(size, SipHasher13::new_with_keys(key, 7))
    }

    fn check_all(size: u64) {
        let permutation = permutation(size, size);
        let mut is_met = vec![false; size as usize];
        for index in 0..size {
            let moved = permutation.forward(index);
            assert!(!std::mem::replace(&mut is_met[moved as usize], true), "{moved} of {size}");
            assert_eq!(permutation.backward(moved), index, "of {size}");
        }
    }

    #[test]
    fn every_number_is_moved_to_a_place_of_its_own() {
        (1..=5000).for_each(check_all);
        [65_536, 65_537, 100_003, 1 << 20, 1_000_000].into_iter().for_each(check_all);
    }

    /// Each key has its own permutation: all permutations of a small domain occur, and equally often.
    #[test]
    fn every_permutation_of_a_small_domain_is_as_frequent() {
        const KEYS: u64 = 24_000;
        let mut counts = std::collections::BTreeMap::new();
        for key in 0..KEYS {
            let permutation = permutation(4, key);
            let order = [0, 1, 2, 3].map(|index| permutation.forward(index));
            *counts.entry(order).or_insert(0_u64) += 1;
        }
        assert_eq!(counts.len(), 24);
        let expected = KEYS as f64 / 24.0;
        let chi_square: f64 =
            counts.values().map(|&count| (count as f64 - expected).powi(2) / expected).sum();
        // 23 degrees of freedom: exceeded once in a million runs, and the keys are fixed.
        assert!(chi_square < 68.0, "{chi_square}");
    }

    proptest! {
        #[test]
        fn both_directions_agree(size in 1..=1_u64 << 63, key: u64, at: u64) {
            let permutation = permutation(size, key);
            let index = at % size;
            let moved = permutation.forward(index);
            prop_assert!(moved < size);
            prop_assert_eq!(permutation.backward(moved), index);
        }
    }
}
