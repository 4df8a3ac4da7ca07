//! The idempotency keys of a file of receipts, in a table for each bucket of time, so that expired keys are
//! removed by dropping a table. Knows nothing of receipts but their keys and sequence numbers.
//!
//! Keys are random, so each of them would change a page of its own. Therefore the keys of the latest receipts
//! are only in memory, and are added to a table together, in the order of the table. A start reads them from
//! their receipts.

use std::collections::HashMap;
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

/// The keys in memory after which they are added to a table. With more, this would take longer than requests
/// should wait: 4096 pages of a large table are read and written.
const RECENT_MAX: usize = 4096;

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
    /// The keys of the receipts after `keyed_to`, which are in no bucket yet.
    recent: HashMap<KeyDigest, u64>,
    keyed_to: u64,
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
        Ok(Self { keep, buckets, clock, recent, keyed_to })
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

    /// Adds the keys in memory to a bucket if there are many or the newest bucket is due. `last` is the last
    /// receipt.
    pub(super) fn extend(
        &mut self,
        connection: &mut Connection,
        now: SystemTime,
        last: u64,
    ) -> Result<(), rusqlite::Error> {
        // A bucket begins with its first key.
        let is_due = match self.newest() {
            Some(newest) => self.is_due(newest, now),
            None => !self.recent.is_empty(),
        };
        if self.recent.len() >= RECENT_MAX || is_due {
            self.flush(connection, now, last)?;
        }
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
        let mut keys: Vec<_> = self.recent.iter().map(|(key, seq)| (key.0, *seq)).collect();
        keys.sort_unstable();
        let sql = format!("INSERT INTO keys_{} (key_digest, seq) VALUES (?1, ?2)", bucket.id);
        {
            let mut insert = transaction.prepare_cached(&sql)?;
            for key in keys {
                insert.execute(key)?;
            }
        }
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

/// Returns the last receipt whose key is in a bucket, if it has one.
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
