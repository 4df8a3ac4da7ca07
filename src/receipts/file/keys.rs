//! The idempotency keys of a file of receipts, in a table for each bucket of time, so that expired keys are
//! removed by dropping a table. Knows nothing of receipts but their sequence numbers.

use std::time::{Duration, Instant, SystemTime};

use rusqlite::{Connection, OptionalExtension, Transaction};
use tracing::{info, warn};

use super::super::record::{KeyDigest, from_millis, to_millis};
use crate::sqlite::rusqlite;

/// Buckets in the time for which keys are kept.
const BUCKETS: u32 = 4;

/// The longest pause between two looks at the clock.
const LOOK_MAX: Duration = Duration::from_secs(3_600);

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

/// Decides whether the system's clock can be trusted: a clock that jumped ahead would make all keys expire at
/// once. Pure.
#[derive(Debug)]
struct Clock {
    /// The length of a bucket. A longer jump is not trusted, until the clock has run for as long after it.
    bucket: Duration,
    /// The system's clock and the steady one at the last look.
    last: (SystemTime, Instant),
    /// Until when the system's clock is not trusted.
    distrusted: Option<Instant>,
}

impl Clock {
    /// `trusted` is the last time that was trusted, of an earlier process.
    fn new(bucket: Duration, trusted: SystemTime, now: SystemTime, steady: Instant) -> Self {
        let mut clock = Self { bucket, last: (trusted, steady), distrusted: None };
        clock.look(now, steady);
        clock
    }

    /// Returns whether it is time for another look.
    fn is_due(&self, steady: Instant) -> bool {
        steady - self.last.1 >= (self.bucket / 4).min(LOOK_MAX)
    }

    /// Looks at the clock. Returns whether it can be trusted.
    fn look(&mut self, now: SystemTime, steady: Instant) -> bool {
        let (last, last_steady) = self.last;
        let ahead = now.duration_since(last).unwrap_or_default();
        let jump = ahead.saturating_sub(steady - last_steady);
        if jump > self.bucket {
            warn!(
                jump = %humantime::format_duration(Duration::from_secs(jump.as_secs())),
                postponed = %humantime::format_duration(self.bucket),
                "the clock is far ahead of when the server last saw it, so the expiry of idempotency keys is \
                 postponed; correct the clock if it is wrong"
            );
            self.distrusted = Some(steady + self.bucket);
        } else if now < last {
            // It was corrected.
            self.distrusted = None;
        }
        self.last = (now, steady);
        if self.distrusted.is_some_and(|until| steady >= until) {
            self.distrusted = None;
        }
        self.distrusted.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_clock_that_jumps_ahead_by_more_than_a_bucket_is_trusted_after_a_bucket() {
        let (start, steady) = (from_millis(1_000_000_000_000), Instant::now());
        let mut clock = Clock::new(HOUR, start, start, steady);
        assert!(clock.look(start + HOUR, steady + HOUR));
        // A jump of a day.
        let ahead = |hours: u32| start + HOUR * (24 + hours);
        assert!(!clock.look(ahead(2), steady + 2 * HOUR));
        assert!(!clock.look(ahead(2) + HOUR / 2, steady + 2 * HOUR + HOUR / 2));
        assert!(clock.look(ahead(3), steady + 3 * HOUR));
    }

    #[test]
    fn a_corrected_clock_is_trusted_at_once() {
        let (start, steady) = (from_millis(1_000_000_000_000), Instant::now());
        let mut clock = Clock::new(HOUR, start, start + 24 * HOUR, steady);
        assert!(!clock.look(start + 24 * HOUR, steady));
        assert!(clock.look(start, steady));
    }

    #[test]
    fn a_small_jump_and_a_jump_back_are_trusted() {
        let (start, steady) = (from_millis(1_000_000_000_000), Instant::now());
        let mut clock = Clock::new(HOUR, start, start + HOUR, steady);
        assert!(clock.look(start + HOUR, steady));
        assert!(clock.look(start - 10 * HOUR, steady + HOUR));
    }
}
