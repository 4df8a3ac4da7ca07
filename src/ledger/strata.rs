//! The 4096 classes of values, the sets of them that a ledger draws from, and what each holds.

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rusqlite::{Connection, params};
use siphasher::sip::SipHasher13;

use crate::batch::Tally;
use crate::space::Value;
use crate::sqlite::rusqlite;

/// How many strata there are. A power of two, so that a stratum is some bits of a hash.
pub const STRATA: usize = 4096;

const SELECT: &str = "SELECT stratum, count, digest FROM strata";
const INSERT: &str = "INSERT INTO strata VALUES (?1, strftime('%FT%TZ', 'now'), 0, 0)";
const UPDATE: &str = "UPDATE strata SET count = ?2, digest = ?3 WHERE stratum = ?1";

/// The secret that sorts values into strata.
#[derive(Clone, Copy)]
pub struct StratumKey(SipHasher13);

impl StratumKey {
    /// A fresh key from the operating system.
    #[must_use]
    pub fn random() -> Self {
        Self::from_bytes(rand::random())
    }

    /// The key of these secret bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(SipHasher13::new_with_key(&bytes))
    }

    /// Its secret bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.key()
    }

    /// SipHash-1-3 of the value under the key (Aumasson and Bernstein, 2012).
    pub(super) fn hash(self, value: Value) -> u64 {
        self.0.hash(&value.0.to_le_bytes())
    }

    /// The value's hash modulo 4096.
    pub(super) fn stratum(self, value: Value) -> u16 {
        stratum_of(self.hash(value))
    }
}

/// The stratum of the value with this hash.
pub(super) fn stratum_of(hash: u64) -> u16 {
    (hash % STRATA as u64) as u16
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
    /// Of each stratum its place among the members, or [`NOT_A_MEMBER`].
    places: Box<[u16; STRATA]>,
}

const NOT_A_MEMBER: u16 = u16::MAX;

impl Strata {
    pub(super) fn new(members: Vec<u16>) -> Self {
        let mut places = Box::new([NOT_A_MEMBER; STRATA]);
        for (&stratum, place) in members.iter().zip(0..) {
            places[usize::from(stratum)] = place;
        }
        Self { members, places }
    }

    pub(super) fn contains(&self, stratum: u16) -> bool {
        self.place(stratum).is_some()
    }

    /// Where it is among the members.
    pub(super) fn place(&self, stratum: u16) -> Option<usize> {
        let place = self.places[usize::from(stratum)];
        (place != NOT_A_MEMBER).then_some(place.into())
    }

    pub(super) fn members(&self) -> &[u16] {
        &self.members
    }

    pub(super) fn into_members(self) -> Vec<u16> {
        self.members
    }

    fn insert(&mut self, stratum: u16) {
        self.places[usize::from(stratum)] = self.members.len() as u16;
        self.members.push(stratum);
    }
}

/// The strata that a ledger has opened, what each should hold, and which were seen to hold just that.
#[derive(Clone, Debug)]
pub(super) struct OpenStrata {
    strata: Strata,
    tallies: Box<[Tally; STRATA]>,
    checked: Box<[bool; STRATA]>,
}

impl OpenStrata {
    /// Those of the file.
    ///
    /// # Errors
    /// SQLite's, or (inside) a row that can't be one.
    pub(super) fn read(connection: &Connection) -> Result<Result<Self, String>, rusqlite::Error> {
        let mut tallies = Box::new([Tally::default(); STRATA]);
        let mut members: Vec<u16> = Vec::new();
        let mut select = connection.prepare(SELECT)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let stratum: u16 = row.get(0)?;
            let Some(tally) = tallies.get_mut(usize::from(stratum)) else {
                return Ok(Err(format!("it has a stratum {stratum} of {STRATA}")));
            };
            *tally = Tally { count: row.get(1)?, digest: row.get::<_, i64>(2)?.cast_unsigned() };
            members.push(stratum);
        }
        let checked = Box::new([false; STRATA]);
        Ok(Ok(Self { strata: Strata::new(members), tallies, checked }))
    }

    pub(super) fn len(&self) -> usize {
        self.strata.members.len()
    }

    pub(super) fn contains(&self, stratum: u16) -> bool {
        self.strata.contains(stratum)
    }

    /// What the stratum should hold.
    pub(super) fn tally(&self, stratum: u16) -> Tally {
        self.tallies[usize::from(stratum)]
    }

    /// How many values all of them should hold.
    pub(super) fn count(&self) -> u64 {
        self.tallies.iter().map(|tally| tally.count).sum()
    }

    /// Counts a value of this hash that entered the ledger.
    pub(super) fn add(&mut self, hash: u64) {
        self.tallies[usize::from(stratum_of(hash))].add(hash);
    }

    pub(super) fn is_checked(&self, stratum: u16) -> bool {
        self.checked[usize::from(stratum)]
    }

    pub(super) fn set_checked(&mut self, stratum: u16) {
        self.checked[usize::from(stratum)] = true;
    }

    /// Some of them, at random, those not yet checked first; in ascending order.
    pub(super) fn part(&self, count: usize, rng: &mut impl Rng) -> Strata {
        let mut members = self.strata.members.clone();
        members.shuffle(rng);
        members.sort_by_key(|&stratum| self.is_checked(stratum));
        members.truncate(count);
        members.sort_unstable();
        Strata::new(members)
    }

    /// Opens more strata, at random, up to `target` in all; durable when the caller's transaction
    /// commits.
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
        self.open_these(opened, connection)
    }

    /// Opens these strata, as far as they are not open; durable when the caller's transaction commits.
    pub(super) fn open_these(
        &mut self,
        strata: &[u16],
        connection: &Connection,
    ) -> Result<(), rusqlite::Error> {
        let mut insert = connection.prepare_cached(INSERT)?;
        for &stratum in strata {
            if !self.contains(stratum) {
                insert.execute([stratum])?;
                self.strata.insert(stratum);
            }
        }
        Ok(())
    }

    pub(super) fn members(&self) -> &[u16] {
        self.strata.members()
    }

    /// Writes the tallies that are not as they were `before`.
    pub(super) fn save(
        &self,
        before: &Self,
        connection: &Connection,
    ) -> Result<(), rusqlite::Error> {
        let mut update = connection.prepare_cached(UPDATE)?;
        for &stratum in self.strata.members() {
            let tally = self.tally(stratum);
            if tally != before.tally(stratum) {
                update.execute(params![stratum, tally.count, tally.digest.cast_signed()])?;
            }
        }
        Ok(())
    }
}
