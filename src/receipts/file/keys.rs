//! The idempotency keys of a file of receipts, in a table for each bucket of time, so that expired keys are
//! removed by dropping a table. Knows nothing of receipts but their keys and sequence numbers.
//!
//! Keys are random, so each of them would change a page of its own. Therefore the keys of the latest receipts
//! are only in memory. They are added to a table in passes in the order of the table, a part at a time, so that
//! neighbours share pages and no request waits for long. A start reads them from their receipts.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant, SystemTime};

use rusqlite::{Connection, OptionalExtension, Transaction};
use tracing::info;

use super::super::clock::{BUCKETS, Clock};
use super::super::record::{KeyDigest, from_millis, to_millis};
use crate::batch::Report;
use crate::sqlite::rusqlite;

pub(super) const CREATE: &str = "
    CREATE TABLE buckets (            -- the keys of bucket 7 are in the table keys_7
        id          INTEGER PRIMARY KEY,
        first_seq   INTEGER NOT NULL,  -- the keys of receipts from this one up to the next bucket's are in it
        began_at    INTEGER NOT NULL,  -- ms since 1970
        ended_at    INTEGER            -- ms since 1970: it has no later keys
    ) STRICT;";

const SELECT_BUCKETS: &str =
    "SELECT id, first_seq, began_at, ended_at FROM buckets ORDER BY id DESC";
const INSERT_BUCKET: &str = "INSERT INTO buckets (id, first_seq, began_at) VALUES (?1, ?2, ?3)";
const END_BUCKET: &str = "UPDATE buckets SET ended_at = ?2 WHERE id = ?1";
const DELETE_BUCKET: &str = "DELETE FROM buckets WHERE id = ?1";
const SELECT_CLOCK: &str = "SELECT clock_at FROM state";
const UPDATE_CLOCK: &str = "UPDATE state SET clock_at = ?1";

const SELECT_KEYED: &str = "SELECT keyed_to FROM state";
const UPDATE_KEYED: &str = "UPDATE state SET keyed_to = ?1";
const SELECT_RECENT: &str =
    "SELECT key_digest, seq FROM receipts WHERE seq > ?1 AND key_digest IS NOT NULL";

/// The keys in memory above which some are added to a table: about 3 MB. In a table of a million keys, which has
/// 7,000 pages, ten of them share a page.
const RECENT_MAX: usize = 1 << 16;

/// The keys that are added at once: more than a group of requests has, and few enough that the next group does not
/// wait for long.
const PART: usize = 1 << 11;

/// A bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    id: i64,
    /// The first receipt whose key it may have.
    pub(super) first_seq: u64,
    began_at: SystemTime,
    ended_at: Option<SystemTime>,
}

/// The buckets, newest first, and the clock that decides when they expire.
#[derive(Debug)]
pub(super) struct Keys {
    keep: Duration,
    buckets: Vec<Bucket>,
    clock: Clock,
    /// The keys of receipts after `keyed_to` that are in no bucket yet, or only since an interrupted pass.
    recent: BTreeMap<KeyDigest, u64>,
    keyed_to: u64,
    /// The pass in progress.
    pass: Option<Pass>,
}

/// A pass over the keys in memory, in ascending order.
#[derive(Clone, Copy, Debug)]
struct Pass {
    /// The last receipt when it began. At its end, the keys of all receipts up to this one are in a bucket.
    last: u64,
    /// The last key that was added.
    at: KeyDigest,
}

impl Keys {
    pub(super) fn read(connection: &Connection, keep: Duration) -> Result<Self, rusqlite::Error> {
        let buckets = buckets(connection)?;
        let trusted = from_millis(connection.query_row(SELECT_CLOCK, [], |row| row.get(0))?);
        let clock = Clock::new(keep / BUCKETS, trusted, SystemTime::now(), Instant::now());
        let keyed_to = keyed_to(connection)?;
        let mut select = connection.prepare(SELECT_RECENT)?;
        let recent = select
            .query_map([keyed_to], |row| Ok((KeyDigest(row.get(0)?), row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        Ok(Self { keep, buckets, clock, recent, keyed_to, pass: None })
    }

    /// Returns the sequence number of a key's receipt.
    pub(super) fn find(
        &self,
        connection: &Connection,
        key: KeyDigest,
    ) -> Result<Option<u64>, rusqlite::Error> {
        if let Some(&seq) = self.recent.get(&key) {
            return Ok(Some(seq));
        }
        for bucket in &self.buckets {
            let sql = format!("SELECT seq FROM keys_{} WHERE key_digest = ?1", bucket.id);
            let mut select = connection.prepare_cached(&sql)?;
            let found = select.query_row([key.0], |row| row.get(0)).optional()?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Notes the key of a receipt that was saved.
    pub(super) fn add(&mut self, key: KeyDigest, seq: u64) {
        self.recent.insert(key, seq);
    }

    /// Adds some of the keys in memory to the newest bucket if there are many, or all if it is due. `last` is the
    /// last receipt.
    pub(super) fn extend(
        &mut self,
        connection: &mut Connection,
        now: SystemTime,
        last: u64,
    ) -> Result<(), rusqlite::Error> {
        match self.newest() {
            Some(newest) if self.is_due(newest, now) => self.flush(connection, now, last),
            Some(newest) if self.recent.len() >= RECENT_MAX => {
                self.add_part(connection, newest, last)
            }
            // A bucket begins with its first key.
            None if !self.recent.is_empty() => self.flush(connection, now, last),
            _ => Ok(()),
        }
    }

    /// Adds the next part of the keys in memory to a bucket.
    fn add_part(
        &mut self,
        connection: &mut Connection,
        bucket: Bucket,
        last: u64,
    ) -> Result<(), rusqlite::Error> {
        let after = self.pass.map_or(Bound::Unbounded, |pass| Bound::Excluded(pass.at));
        let part = self.recent.range((after, Bound::Unbounded)).take(PART);
        let part: Vec<_> = part.map(|(&key, &seq)| (key, seq)).collect();
        let pass_last = self.pass.map_or(last, |pass| pass.last);
        let transaction = connection.transaction()?;
        insert(&transaction, bucket, part.iter().copied())?;
        let next = match part.last() {
            Some(&(at, _)) if part.len() == PART => Some(Pass { last: pass_last, at }),
            _ => {
                transaction.execute(UPDATE_KEYED, [pass_last])?;
                None
            }
        };
        transaction.commit()?;
        for (key, _) in &part {
            self.recent.remove(key);
        }
        if next.is_none() {
            self.keyed_to = pass_last;
        }
        self.pass = next;
        Ok(())
    }

    /// Adds all keys in memory to the newest bucket, and ends it if it is due.
    pub(super) fn flush(
        &mut self,
        connection: &mut Connection,
        now: SystemTime,
        last: u64,
    ) -> Result<(), rusqlite::Error> {
        let newest = self.newest();
        let is_due = newest.is_some_and(|newest| self.is_due(newest, now));
        if self.recent.is_empty() && !is_due {
            return Ok(());
        }
        let transaction = connection.transaction()?;
        let mut bucket = match newest {
            Some(newest) => newest,
            None => self.begin(&transaction, now)?,
        };
        insert(&transaction, bucket, self.recent.iter().map(|(&key, &seq)| (key, seq)))?;
        transaction.execute(UPDATE_KEYED, [last])?;
        if is_due {
            transaction.execute(END_BUCKET, [bucket.id, to_millis(now)])?;
            bucket.ended_at = Some(now);
        }
        transaction.commit()?;
        match newest {
            Some(_) => self.buckets[0] = bucket,
            None => self.buckets.insert(0, bucket),
        }
        self.recent.clear();
        self.keyed_to = last;
        self.pass = None;
        Ok(())
    }

    /// Returns the bucket for new keys, unless it has ended.
    fn newest(&self) -> Option<Bucket> {
        self.buckets.first().copied().filter(|bucket| bucket.ended_at.is_none())
    }

    /// Creates a bucket for the keys that are in none.
    fn begin(
        &self,
        transaction: &Transaction<'_>,
        now: SystemTime,
    ) -> Result<Bucket, rusqlite::Error> {
        let (id, first_seq) =
            (self.buckets.first().map_or(1, |newest| newest.id + 1), self.keyed_to + 1);
        transaction.execute(INSERT_BUCKET, (id, first_seq, to_millis(now)))?;
        transaction.execute_batch(&format!(
            "CREATE TABLE keys_{id} (key_digest BLOB PRIMARY KEY, seq INTEGER NOT NULL)
             STRICT, WITHOUT ROWID"
        ))?;
        Ok(Bucket { id, first_seq, began_at: from_millis(to_millis(now)), ended_at: None })
    }

    /// Returns whether later keys belong to another bucket.
    fn is_due(&self, bucket: Bucket, now: SystemTime) -> bool {
        now.duration_since(bucket.began_at).is_ok_and(|age| age >= self.keep / BUCKETS)
    }

    /// Drops the buckets whose keys have all expired, after the newest one was [extended](Self::extend) and ended if
    /// it is due. Looks at the clock at most a few times in the time of a bucket.
    pub(super) fn expire(
        &mut self,
        connection: &mut Connection,
        now: SystemTime,
    ) -> Result<(), rusqlite::Error> {
        if !self.clock.is_due(Instant::now()) {
            return Ok(());
        }
        if !self.clock.look(now, Instant::now()) {
            return Ok(());
        }
        connection.execute(UPDATE_CLOCK, [to_millis(now)])?;
        let expired = |bucket: &Bucket| {
            let age = bucket.ended_at.and_then(|ended_at| now.duration_since(ended_at).ok());
            age.is_some_and(|age| age > self.keep)
        };
        while let Some(bucket) = self.buckets.last().copied().filter(expired) {
            let transaction = connection.transaction()?;
            transaction.execute_batch(&format!("DROP TABLE keys_{}", bucket.id))?;
            transaction.execute(DELETE_BUCKET, [bucket.id])?;
            transaction.commit()?;
            // Cached statements refer to the table.
            connection.flush_prepared_statement_cache();
            self.buckets.pop();
            info!(
                since = %humantime::format_rfc3339_seconds(bucket.began_at),
                "idempotency keys expired: a request with one of them gets new numbers"
            );
        }
        Ok(())
    }
}

/// Adds keys to a bucket, in which some may be since an interrupted pass.
fn insert(
    transaction: &Transaction<'_>,
    bucket: Bucket,
    keys: impl Iterator<Item = (KeyDigest, u64)>,
) -> Result<(), rusqlite::Error> {
    let sql = format!("INSERT OR IGNORE INTO keys_{} (key_digest, seq) VALUES (?1, ?2)", bucket.id);
    let mut insert = transaction.prepare_cached(&sql)?;
    for (key, seq) in keys {
        insert.execute((key.0, seq))?;
    }
    Ok(())
}

/// Returns the receipt up to which all keys are in a bucket. Some keys of later ones may be.
pub(super) fn keyed_to(connection: &Connection) -> Result<u64, rusqlite::Error> {
    connection.query_row(SELECT_KEYED, [], |row| row.get(0))
}

/// Returns the buckets, newest first.
pub(super) fn buckets(connection: &Connection) -> Result<Vec<Bucket>, rusqlite::Error> {
    let mut select = connection.prepare(SELECT_BUCKETS)?;
    let buckets = select.query_map([], |row| {
        Ok(Bucket {
            id: row.get(0)?,
            first_seq: row.get(1)?,
            began_at: from_millis(row.get(2)?),
            ended_at: row.get::<_, Option<i64>>(3)?.map(from_millis),
        })
    })?;
    buckets.collect()
}

/// Calls `each` with all keys in ascending order, each with the place of its bucket in the list and the sequence
/// number of its receipt.
pub(super) fn each(
    connection: &Connection,
    buckets: &[Bucket],
    each: &mut dyn FnMut(usize, KeyDigest, u64),
) -> Result<(), rusqlite::Error> {
    if buckets.is_empty() {
        return Ok(());
    }
    // SQLite merges the tables, which are sorted by their keys.
    let select = |(at, bucket): (usize, &Bucket)| {
        format!("SELECT {at}, key_digest, seq FROM keys_{}", bucket.id)
    };
    let selects: Vec<_> = buckets.iter().enumerate().map(select).collect();
    let sql = format!("{} ORDER BY 2", selects.join(" UNION ALL "));
    let mut select = connection.prepare(&sql)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        each(row.get(0)?, KeyDigest(row.get(1)?), row.get(2)?);
    }
    Ok(())
}

/// Looks up the receipt of each key of a bucket, and the key of each receipt from the bucket's first one up to
/// `end`, and reports those that differ.
pub(super) fn look_up_each(
    connection: &Connection,
    bucket: Bucket,
    end: u64,
    report: Report<'_>,
) -> Result<(), rusqlite::Error> {
    let Bucket { id, first_seq, .. } = bucket;
    let mut select = connection.prepare(&format!(
        "SELECT k.key_digest, k.seq, r.seq IS NULL FROM keys_{id} k
         LEFT JOIN receipts r ON r.seq = k.seq WHERE r.key_digest IS NOT k.key_digest"
    ))?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (key, seq, is_missing): (_, u64, bool) =
            (KeyDigest(row.get(0)?), row.get(1)?, row.get(2)?);
        let fault = if is_missing { "does not exist" } else { "has another key or none" };
        report(
            "a key of another receipt",
            format!("the key {key:?} belongs to receipt {seq}, which {fault}"),
        );
    }
    let mut select = connection.prepare(&format!(
        "SELECT r.seq FROM receipts r LEFT JOIN keys_{id} k ON k.key_digest = r.key_digest
         WHERE r.seq >= ?1 AND r.seq < ?2 AND r.key_digest IS NOT NULL AND k.seq IS NOT r.seq"
    ))?;
    let mut rows = select.query((first_seq, end))?;
    while let Some(row) = rows.next()? {
        let seq: u64 = row.get(0)?;
        let what = format!(
            "the key of receipt {seq} is missing from the keys: a repetition would get new numbers"
        );
        report("a receipt without its key", what);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The receipts that are saved before the keys are extended.
    const GROUP: u64 = 1_000;

    fn digest(seq: u64) -> KeyDigest {
        let random = u128::from(seq).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        KeyDigest(random.to_be_bytes())
    }

    fn read(connection: &Connection) -> Keys {
        Keys::read(connection, Duration::from_secs(86_400)).unwrap()
    }

    /// Saves receipts with keys up to `end`.
    fn save(connection: &mut Connection, keys: &mut Keys, saved: &mut u64, end: u64) {
        while *saved < end {
            for seq in *saved + 1..=*saved + GROUP {
                connection
                    .execute("INSERT INTO receipts VALUES (?1, ?2)", (seq, digest(seq).0))
                    .unwrap();
                keys.add(digest(seq), seq);
            }
            *saved += GROUP;
            keys.extend(connection, SystemTime::now(), *saved).unwrap();
        }
    }

    /// Story: a start read the keys of the receipts after the last one whose key was in a table. A pass had added
    /// some of them already.
    #[test]
    fn every_key_is_found_whenever_a_pass_is_interrupted() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection
            .execute_batch(&format!(
                "CREATE TABLE receipts (seq INTEGER PRIMARY KEY, key_digest BLOB);
                 CREATE TABLE state (clock_at INTEGER NOT NULL, keyed_to INTEGER NOT NULL);
                 INSERT INTO state VALUES (0, 0); {CREATE}"
            ))
            .unwrap();
        let mut saved = 0;
        let mut keys = read(&connection);
        let mut interrupted = 0;
        for parts in [1, 3, 50, 2, 40] {
            let end = saved + RECENT_MAX as u64 / 4 + parts * PART as u64;
            save(&mut connection, &mut keys, &mut saved, end);
            interrupted += u64::from(keys.pass.is_some());
            // At most those of interrupted passes, and those that came during them.
            assert!(keys.recent.len() < 3 * RECENT_MAX, "{}", keys.recent.len());
            keys = read(&connection);
            for seq in 1..=saved {
                assert_eq!(keys.find(&connection, digest(seq)).unwrap(), Some(seq));
            }
            assert_eq!(keys.find(&connection, digest(saved + 1)).unwrap(), None);
        }
        assert!(interrupted > 1 && keys.keyed_to > 1, "{interrupted} passes were interrupted");
        keys.flush(&mut connection, SystemTime::now(), saved).unwrap();
        let select = "SELECT count(*), sum(seq) FROM keys_1";
        let sums = connection.query_row(select, [], |row| Ok((row.get(0)?, row.get(1)?)));
        assert_eq!(sums.unwrap(), (saved, saved * (saved + 1) / 2));
    }
}
