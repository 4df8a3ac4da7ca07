//! The idempotency keys of a file of receipts, in a table for each bucket of time, so that expired keys are
//! removed by dropping a table. Knows nothing of receipts but their sequence numbers.

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

/// A bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    id: i64,
    /// The first receipt whose key it may have.
    pub(super) first_seq: u64,
    began_at: SystemTime,
    ended_at: Option<SystemTime>,
}

impl Bucket {
    pub(super) fn insert(
        self,
        transaction: &Transaction<'_>,
        key: KeyDigest,
        seq: u64,
    ) -> Result<(), rusqlite::Error> {
        let sql = format!("INSERT INTO keys_{} (key_digest, seq) VALUES (?1, ?2)", self.id);
        transaction.prepare_cached(&sql)?.execute((key.0, seq)).map(drop)
    }
}

/// The buckets, newest first, and the clock that decides when they expire.
#[derive(Debug)]
pub(super) struct Keys {
    keep: Duration,
    buckets: Vec<Bucket>,
    clock: Clock,
}

impl Keys {
    pub(super) fn read(connection: &Connection, keep: Duration) -> Result<Self, rusqlite::Error> {
        let buckets = buckets(connection)?;
        let trusted = from_millis(connection.query_row(SELECT_CLOCK, [], |row| row.get(0))?);
        let clock = Clock::new(keep / BUCKETS, trusted, SystemTime::now(), Instant::now());
        Ok(Self { keep, buckets, clock })
    }

    /// Returns the sequence number of a key's receipt.
    pub(super) fn find(
        &self,
        connection: &Connection,
        key: KeyDigest,
    ) -> Result<Option<u64>, rusqlite::Error> {
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

    /// Returns the bucket for new keys, and creates it if a new one is due. `next_seq` is the next receipt. Once
    /// the transaction is committed, pass the bucket to [`committed`](Self::committed).
    pub(super) fn current(
        &self,
        transaction: &Transaction<'_>,
        now: SystemTime,
        next_seq: u64,
    ) -> Result<Bucket, rusqlite::Error> {
        let newest = self.buckets.first();
        if let Some(&open) = newest.filter(|bucket| bucket.ended_at.is_none()) {
            if !self.is_due(open, now) {
                return Ok(open);
            }
            transaction.execute(END_BUCKET, [open.id, to_millis(now)])?;
        }
        let id = newest.map_or(1, |newest| newest.id + 1);
        transaction.execute(INSERT_BUCKET, (id, next_seq, to_millis(now)))?;
        transaction.execute_batch(&format!(
            "CREATE TABLE keys_{id} (key_digest BLOB PRIMARY KEY, seq INTEGER NOT NULL)
             STRICT, WITHOUT ROWID"
        ))?;
        let began_at = from_millis(to_millis(now));
        Ok(Bucket { id, first_seq: next_seq, began_at, ended_at: None })
    }

    /// Returns whether later keys belong to another bucket.
    fn is_due(&self, bucket: Bucket, now: SystemTime) -> bool {
        now.duration_since(bucket.began_at).is_ok_and(|age| age >= self.keep / BUCKETS)
    }

    /// Notes the bucket of a transaction that was committed.
    pub(super) fn committed(&mut self, bucket: Bucket) {
        match self.buckets.first_mut() {
            Some(newest) if newest.id == bucket.id => {}
            newest => {
                if let Some(newest) = newest {
                    newest.ended_at.get_or_insert(bucket.began_at);
                }
                self.buckets.insert(0, bucket);
            }
        }
    }

    /// Drops the buckets whose keys have all expired, and ends the newest one when it is due. Looks at the clock
    /// at most a few times in the time of a bucket.
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
        // A key must expire even if no later one follows it.
        if let Some(&newest) = self.buckets.first()
            && newest.ended_at.is_none()
            && self.is_due(newest, now)
        {
            connection.execute(END_BUCKET, [newest.id, to_millis(now)])?;
            self.buckets[0].ended_at = Some(now);
        }
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
