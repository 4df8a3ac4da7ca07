//! The 4096 classes of values, and the sets of them that a ledger draws from.

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rusqlite::Connection;
use siphasher::sip::SipHasher13;

use crate::space::Value;
use crate::sqlite::rusqlite;

/// How many strata there are. A power of two, so that a stratum is some bits of a hash.
pub(super) const STRATA: usize = 4096;

const SELECT: &str = "SELECT stratum FROM strata";
const INSERT: &str = "INSERT INTO strata VALUES (?1, strftime('%FT%TZ', 'now'))";

/// The secret that sorts values into strata.
#[derive(Clone, Copy)]
pub(super) struct StratumKey(SipHasher13);

impl StratumKey {
    /// A fresh key from the operating system.
    pub(super) fn random() -> Self {
        Self::from_bytes(rand::random())
    }

    pub(super) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(SipHasher13::new_with_key(&bytes))
    }

    pub(super) fn to_bytes(self) -> [u8; 16] {
        self.0.key()
    }

    /// SipHash-1-3 of the value under the key (Aumasson and Bernstein, 2012), modulo 4096.
    pub(super) fn stratum(self, value: Value) -> u16 {
        (self.0.hash(&value.0.to_le_bytes()) % STRATA as u64) as u16
    }
}

impl std::fmt::Debug for StratumKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("StratumKey(secret)")
    }
}

/// A set of strata.
#[derive(Clone, Debug)]
pub(super) struct Strata {
    members: Vec<u16>,
    contains: Box<[bool; STRATA]>,
}

impl Strata {
    pub(super) fn new(members: Vec<u16>) -> Self {
        let mut contains = Box::new([false; STRATA]);
        for &stratum in &members {
            contains[usize::from(stratum)] = true;
        }
        Self { members, contains }
    }

    /// The strata that the ledger has opened.
    pub(super) fn read(connection: &Connection) -> Result<Self, rusqlite::Error> {
        let mut select = connection.prepare(SELECT)?;
        let members = select.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        Ok(Self::new(members))
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn contains(&self, stratum: u16) -> bool {
        self.contains[usize::from(stratum)]
    }

    pub(super) fn members(&self) -> &[u16] {
        &self.members
    }

    /// Some of them, at random; in ascending order.
    pub(super) fn part(&self, count: usize, rng: &mut impl Rng) -> Self {
        let mut members = self.members.clone();
        let (part, _) = members.partial_shuffle(rng, count);
        part.sort_unstable();
        Self::new(part.to_vec())
    }

    /// Opens more strata, at random, up to `target` in all. The one place where a ledger's share of
    /// the space grows; durable when the caller's transaction commits.
    pub(super) fn open_up_to(
        &mut self,
        target: usize,
        connection: &Connection,
        rng: &mut impl RngExt,
    ) -> Result<(), rusqlite::Error> {
        let mut closed: Vec<u16> =
            (0..STRATA as u16).filter(|&stratum| !self.contains(stratum)).collect();
        let more = target.saturating_sub(self.len());
        let (opened, _) = closed.partial_shuffle(rng, more);
        let mut insert = connection.prepare_cached(INSERT)?;
        for &mut stratum in opened {
            insert.execute([stratum])?;
            self.members.push(stratum);
            self.contains[usize::from(stratum)] = true;
        }
        Ok(())
    }
}
