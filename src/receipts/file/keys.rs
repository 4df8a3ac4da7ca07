//! The idempotency keys of a file of receipts, in a table for each bucket of time, so that expired keys are
//! removed by dropping a table. Knows nothing of receipts but their sequence numbers.

use std::time::{Duration, Instant, SystemTime};

use rusqlite::{Connection, OptionalExtension, Transaction};
use tracing::info;

use super::super::clock::{BUCKETS, Clock};
use super::super::record::{KeyDigest, from_millis, to_millis};
use crate::sqlite::rusqlite;

pub(super) const CREATE: &str = "
    CREATE TABLE buckets (            -- the keys of bucket 7 are in the table keys_7
        id          INTEGER PRIMARY KEY,
        began_at    INTEGER NOT NULL,  -- ms since 1970
        ended_at    INTEGER            -- ms since 1970: when the next one began
    ) STRICT;";

const SELECT_BUCKETS: &str = "SELECT id, began_at, ended_at FROM buckets ORDER BY id DESC";
const INSERT_BUCKET: &str = "INSERT INTO buckets (id, began_at) VALUES (?1, ?2)";
const END_BUCKET: &str = "UPDATE buckets SET ended_at = ?2 WHERE id = ?1";
const DELETE_BUCKET: &str = "DELETE FROM buckets WHERE id = ?1";
const SELECT_CLOCK: &str = "SELECT clock_at FROM state";
const UPDATE_CLOCK: &str = "UPDATE state SET clock_at = ?1";

/// A bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    id: i64,
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
        let mut buckets = connection.prepare(SELECT_BUCKETS)?;
        let buckets = buckets.query_map([], |row| {
            Ok(Bucket {
                id: row.get(0)?,
                began_at: from_millis(row.get(1)?),
                ended_at: row.get::<_, Option<i64>>(2)?.map(from_millis),
            })
        })?;
        let buckets = buckets.collect::<Result<_, _>>()?;
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

    /// Returns the bucket for new keys, and creates it if a new one is due. Once the transaction is committed,
    /// pass it to [`committed`](Self::committed).
    pub(super) fn current(
        &self,
        transaction: &Transaction<'_>,
        now: SystemTime,
    ) -> Result<Bucket, rusqlite::Error> {
        let newest = self.buckets.first();
        let is_due = |bucket: &&Bucket| {
            now.duration_since(bucket.began_at).is_ok_and(|age| age >= self.keep / BUCKETS)
        };
        if let Some(&bucket) = newest.filter(|bucket| !is_due(bucket)) {
            return Ok(bucket);
        }
        if let Some(newest) = newest {
            transaction.execute(END_BUCKET, [newest.id, to_millis(now)])?;
        }
        let id = newest.map_or(1, |newest| newest.id + 1);
        transaction.execute(INSERT_BUCKET, [id, to_millis(now)])?;
        transaction.execute_batch(&format!(
            "CREATE TABLE keys_{id} (key_digest BLOB PRIMARY KEY, seq INTEGER NOT NULL)
             STRICT, WITHOUT ROWID"
        ))?;
        Ok(Bucket { id, began_at: from_millis(to_millis(now)), ended_at: None })
    }

    /// Notes the bucket of a transaction that was committed.
    pub(super) fn committed(&mut self, bucket: Bucket) {
        match self.buckets.first_mut() {
            Some(newest) if newest.id == bucket.id => {}
            newest => {
                if let Some(newest) = newest {
                    newest.ended_at = Some(bucket.began_at);
                }
                self.buckets.insert(0, bucket);
            }
        }
    }

    /// Drops the oldest bucket if all of its keys have expired. Looks at the clock at most a few times in the
    /// time of a bucket.
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
