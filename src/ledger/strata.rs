//! The strata of a range, and the tally of each. Knows nothing of drawing.
//!
//! A keyed [permutation](super::permutation) gives each value of the range an index. A stratum is an interval
//! of indexes. A partition is a run of 1/4096 of all strata, and the unit that an instance of a fleet claims.

use std::collections::BTreeMap;
use std::ops::Range;

use rusqlite::{Connection, Row, params};
use siphasher::sip::SipHasher13;

use super::permutation::Permutation;
use crate::batch::{BatchId, Tally};
use crate::space::{Space, Value};
use crate::sqlite::{ContentError, rusqlite};

/// The number of partitions in every range. In a range with fewer values, some partitions have none.
pub(crate) const PARTITIONS: usize = 4096;

/// Strata per partition, if each stratum then has at least 256 values. In a smaller range, each partition has
/// one stratum.
const STRATA_PER_PARTITION: u64 = 16;

const SELECT: &str = "SELECT stratum, count, digest FROM strata";
const SELECT_ROWS: &str = "SELECT value, batch FROM used_numbers WHERE stratum = ?1 ORDER BY value";
const UPSERT: &str = "INSERT INTO strata VALUES (?1, ?2, ?3)
    ON CONFLICT (stratum) DO UPDATE SET count = excluded.count, digest = excluded.digest";

/// The secret key of the permutation.
#[derive(Clone, Copy)]
pub struct StratumKey(SipHasher13);

impl StratumKey {
    /// Draws a fresh key from the operating system.
    pub fn random() -> Self {
        Self::from_bytes(rand::random())
    }

    /// Returns the key with these secret bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(SipHasher13::new_with_key(&bytes))
    }

    /// Returns the secret bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.key()
    }

    /// Returns SipHash-1-3 of the value under the key (Aumasson and Bernstein, 2012), for a [`Tally`].
    pub(super) fn hash(self, value: Value) -> u64 {
        self.0.hash(&value.0.to_le_bytes())
    }
}

impl std::fmt::Debug for StratumKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("StratumKey(secret)")
    }
}

/// The strata of a range under a key.
#[derive(Clone, Debug)]
pub(super) struct Strata {
    space: Space,
    key: StratumKey,
    permutation: Permutation,
    per_partition: u64,
}

impl Strata {
    pub(super) fn new(space: Space, key: StratumKey) -> Self {
        let is_large = space.size() >= PARTITIONS as u64 * STRATA_PER_PARTITION * 256;
        let per_partition = if is_large { STRATA_PER_PARTITION } else { 1 };
        let permutation = Permutation::new(space.size(), key.0);
        Self { space, key, permutation, per_partition }
    }

    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    pub(super) fn key(&self) -> StratumKey {
        self.key
    }

    pub(super) fn per_partition(&self) -> u64 {
        self.per_partition
    }

    pub(super) fn count(&self) -> u64 {
        PARTITIONS as u64 * self.per_partition
    }

    /// Returns the strata of a partition.
    pub(super) fn of_partition(&self, partition: u16) -> Range<u64> {
        let first = u64::from(partition) * self.per_partition;
        first..first + self.per_partition
    }

    /// Returns the partition that a stratum is in.
    pub(super) fn partition_of(&self, stratum: u64) -> u16 {
        (stratum / self.per_partition) as u16
    }

    /// Returns the indexes of these strata.
    pub(super) fn indexes(&self, strata: Range<u64>) -> Range<u64> {
        let first = |stratum: u64| {
            let values = u128::from(stratum) * u128::from(self.space.size());
            values.div_ceil(self.count().into()) as u64
        };
        first(strata.start)..first(strata.end)
    }

    /// Returns the stratum of a value, or `None` if the value is not in the range.
    pub(super) fn stratum(&self, value: Value) -> Option<u64> {
        self.index(value).map(|index| self.stratum_of(index))
    }

    /// Returns the stratum of an index.
    pub(super) fn stratum_of(&self, index: u64) -> u64 {
        let strata = u128::from(index) * u128::from(self.count());
        (strata / u128::from(self.space.size())) as u64
    }

    /// Returns the index of a value, or `None` if the value is not in the range.
    pub(super) fn index(&self, value: Value) -> Option<u64> {
        let offset = value.0.abs_diff(self.space.min().0);
        self.space.contains(value).then(|| self.permutation.backward(offset))
    }

    /// Returns the value with this index.
    pub(super) fn value(&self, index: u64) -> Value {
        Value(self.space.min().0.wrapping_add_unsigned(self.permutation.forward(index)))
    }

    /// Calls `each` with the index, value and batch of every row of a stratum, and compares the rows with the
    /// stratum's tally.
    ///
    /// # Errors
    /// Returns SQLite's error and those of `each`, and [`ContentError::Damaged`] if the rows differ from what
    /// was drawn.
    pub(super) fn read(
        &self,
        connection: &Connection,
        stratum: u64,
        tally: Tally,
        mut each: impl FnMut(u64, Value, BatchId) -> Result<(), rusqlite::Error>,
    ) -> Result<(), ContentError> {
        let indexes = self.indexes(stratum..stratum + 1);
        self.compare(connection, stratum, tally, |value, row| {
            let index = self.index(value).filter(|index| indexes.contains(index));
            let index = index.ok_or_else(|| self.misplaced(value))?;
            Ok(each(index, value, batch_of(row)?)?)
        })
    }

    /// Calls `each` with the value of every row of a stratum and the row, and compares the rows with the stratum's
    /// tally. This takes half the time of [`read`](Self::read).
    ///
    /// # Errors
    /// Returns SQLite's error and those of `each`, and [`ContentError::Damaged`] if the rows differ from what
    /// was drawn.
    pub(super) fn compare(
        &self,
        connection: &Connection,
        stratum: u64,
        tally: Tally,
        mut each: impl FnMut(Value, &Row<'_>) -> Result<(), ContentError>,
    ) -> Result<(), ContentError> {
        let mut last = None;
        let mut found = Tally::default();
        let mut select = connection.prepare_cached(SELECT_ROWS)?;
        let mut rows = select.query([stratum])?;
        while let Some(row) = rows.next()? {
            let value = Value(row.get(0)?);
            if last >= Some(value) {
                return Err(self.misplaced(value));
            }
            last = Some(value);
            found.add(self.key.hash(value));
            each(value, row)?;
        }
        if found != tally {
            return Err(ContentError::Damaged(format!(
                "{} values were drawn from stratum {stratum}, but its {} rows are not all of them",
                tally.count, found.count
            )));
        }
        Ok(())
    }

    fn misplaced(&self, value: Value) -> ContentError {
        let number = self.space.number(value);
        ContentError::Damaged(format!("{number} is not where it belongs"))
    }
}

/// Returns the batch of a row that [`Strata::compare`] read.
pub(super) fn batch_of(row: &Row<'_>) -> Result<BatchId, rusqlite::Error> {
    row.get(1).map(BatchId)
}

/// The tallies of all strata that have values.
#[derive(Clone, Debug, Default)]
pub(super) struct Tallies(BTreeMap<u64, Tally>);

impl Tallies {
    /// Reads the tallies from the file.
    ///
    /// # Errors
    /// Returns SQLite's error, and [`ContentError::Damaged`] if a row is impossible.
    pub(super) fn read(connection: &Connection, strata: &Strata) -> Result<Self, ContentError> {
        let damaged = |problem| Err(ContentError::Damaged(problem));
        let mut tallies = Self::default();
        let mut select = connection.prepare(SELECT)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let stratum: u64 = row.get(0)?;
            if stratum >= strata.count() {
                return damaged(format!("it has a stratum {stratum} of {}", strata.count()));
            }
            let tally = Tally { count: row.get(1)?, digest: row.get::<_, i64>(2)?.cast_unsigned() };
            let indexes = strata.indexes(stratum..stratum + 1);
            if tally.count > indexes.end - indexes.start {
                return damaged(format!("stratum {stratum} has more values than there can be"));
            }
            tallies.0.insert(stratum, tally);
        }
        Ok(tallies)
    }

    /// Returns a stratum's tally, or `None` if it has no values.
    pub(super) fn get(&self, stratum: u64) -> Option<Tally> {
        self.0.get(&stratum).copied()
    }

    /// Sets a stratum's tally.
    pub(super) fn set(&mut self, stratum: u64, tally: Tally) {
        self.0.insert(stratum, tally);
    }

    /// Adds a value with this hash to a stratum's tally.
    pub(super) fn add(&mut self, stratum: u64, hash: u64) {
        self.0.entry(stratum).or_default().add(hash);
    }

    /// Sets the tallies of all strata in `changed`.
    pub(super) fn update(&mut self, changed: Self) {
        self.0.extend(changed.0);
    }

    /// Returns the number of values in all strata.
    pub(super) fn count(&self) -> u64 {
        // This can't overflow: `read` checks that no stratum exceeds its size.
        self.0.values().map(|tally| tally.count).sum()
    }

    /// Yields the strata that have values and their tallies, in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, Tally)> {
        self.0.iter().map(|(&stratum, &tally)| (stratum, tally))
    }

    /// Writes the tallies. They are durable when the caller's transaction commits.
    pub(super) fn save(&self, connection: &Connection) -> Result<(), rusqlite::Error> {
        let mut upsert = connection.prepare_cached(UPSERT)?;
        for (stratum, tally) in &self.0 {
            upsert.execute(params![stratum, tally.count, tally.digest.cast_signed()])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every index is in exactly one stratum, and the strata of a partition form one interval.
    #[test]
    fn strata_share_out_every_range() {
        for size in [1_u64, 2, 4095, 4096, 4097, 1_000_000, 1 << 24, (1 << 53) - 1, 1 << 53] {
            let space = Space::new("0", &(size - 1).to_string(), 0).unwrap();
            let strata = Strata::new(space, StratumKey::from_bytes([7; 16]));
            let mut end = 0;
            for partition in 0..PARTITIONS as u16 {
                let indexes = strata.indexes(strata.of_partition(partition));
                assert_eq!(indexes.start, end, "partition {partition} of {size}");
                for stratum in strata.of_partition(partition) {
                    let indexes = strata.indexes(stratum..stratum + 1);
                    assert_eq!((indexes.start, strata.partition_of(stratum)), (end, partition));
                    end = indexes.end;
                    for index in [indexes.start, indexes.end - 1] {
                        if indexes.contains(&index) {
                            assert_eq!(strata.stratum(strata.value(index)), Some(stratum));
                        }
                    }
                }
            }
            assert_eq!(end, size);
            assert_eq!(strata.stratum(Value(-1)), None);
        }
    }
}
