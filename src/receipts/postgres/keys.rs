//! The idempotency keys, in a table for each [bucket](super::super::clock::BUCKETS) of time, so that expired keys are
//! removed by dropping a table. Knows nothing of receipts but their sequence numbers.
//!
//! The tables are partitions of one, in which PostgreSQL can't keep a key unique. The lock of the head does: an
//! instance looks for a key in all buckets and inserts it while no other one appends.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tracing::info;

use super::super::clock::{BUCKETS, Clock};
use super::super::record::{KeyDigest, Receipt};
use super::heads::{self, seq_to_sql};
use super::rows;
use super::session::{BEGIN, COMMIT, Failure};

pub(super) const CREATE: &str = "
    CREATE TABLE IF NOT EXISTS tombola_buckets ( -- the keys of bucket 7 are in the table tombola_keys_7
        id       bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        space    text NOT NULL,
        began_at timestamptz NOT NULL,
        ended_at timestamptz               -- when the next one began
    );
    CREATE TABLE IF NOT EXISTS tombola_keys (
        key_digest bytea NOT NULL,
        bucket     bigint NOT NULL,
        seq        bigint NOT NULL,
        PRIMARY KEY (key_digest, bucket)
    ) PARTITION BY LIST (bucket);";

/// Locks the receipts that it finds, so that finding one commits like a write: see [`heads::confirm`].
const FIND: &str = "
    SELECT * FROM tombola_receipts WHERE space = $1 AND seq IN (
        SELECT seq FROM tombola_keys
        WHERE key_digest = ANY ($2)
            AND bucket = ANY (ARRAY (SELECT id FROM tombola_buckets WHERE space = $1))
    ) FOR KEY SHARE";
const INSERT: &str = "
    INSERT INTO tombola_keys (key_digest, bucket, seq)
    SELECT key_digest, (SELECT max(id) FROM tombola_buckets WHERE space = $1), seq
    FROM unnest($2, $3) AS key (key_digest, seq)";
const IS_DUE: &str = "
    SELECT NOT EXISTS (
        SELECT FROM tombola_buckets
        WHERE space = $1 AND ended_at IS NULL AND began_at > clock_timestamp() - make_interval(secs => $2))";
const END_BUCKET: &str = "
    UPDATE tombola_buckets SET ended_at = clock_timestamp() WHERE space = $1 AND ended_at IS NULL";
const INSERT_BUCKET: &str = "
    INSERT INTO tombola_buckets (space, began_at) VALUES ($1, clock_timestamp()) RETURNING id";
const SELECT_CLOCK: &str = "SELECT clock_at, clock_timestamp() FROM tombola_heads WHERE space = $1";
const UPDATE_CLOCK: &str = "UPDATE tombola_heads SET clock_at = clock_timestamp() WHERE space = $1";
const SELECT_EXPIRED: &str = "
    SELECT id, began_at FROM tombola_buckets
    WHERE space = $1 AND ended_at < clock_timestamp() - make_interval(secs => $2) ORDER BY id LIMIT 1";

/// Returns the receipts of those of these keys that were used.
pub(super) async fn find(
    client: &Client,
    space: &str,
    keys: &[KeyDigest],
) -> Result<HashMap<KeyDigest, Receipt>, Failure> {
    let keys: Vec<_> = keys.iter().map(|key| key.0.as_slice()).collect();
    let values = [(&space as _, Type::TEXT), (&keys as _, Type::BYTEA_ARRAY)];
    let found = client.query_typed(FIND, &values).await?;
    let receipts = found.iter().map(rows::read);
    let keyed = receipts.map(|receipt| {
        let receipt = receipt?;
        let key = receipt.key.ok_or(Failure::Damaged("the key of a receipt"))?;
        Ok((key, receipt))
    });
    keyed.collect()
}

/// Inserts keys that were not used, with the sequence numbers of their receipts. The head has to be locked.
pub(super) async fn insert(
    client: &Client,
    space: &str,
    keys: &[(KeyDigest, u64)],
) -> Result<(), Failure> {
    let digests: Vec<_> = keys.iter().map(|(key, _)| key.0.as_slice()).collect();
    let seqs: Vec<_> = keys.iter().map(|(_, seq)| seq_to_sql(*seq)).collect();
    let values = [
        (&space as _, Type::TEXT),
        (&digests as _, Type::BYTEA_ARRAY),
        (&seqs as _, Type::INT8_ARRAY),
    ];
    client.execute_typed(INSERT, &values).await?;
    Ok(())
}

/// Begins a new bucket, if the newest one is old enough or if there is none.
pub(super) async fn begin_bucket(
    client: &Client,
    space: &str,
    keep: Duration,
) -> Result<(), Failure> {
    if !is_due(client, space, keep).await? {
        return Ok(());
    }
    client.batch_execute(BEGIN).await?;
    heads::lock(client, space).await?;
    // Another instance may have begun one.
    if is_due(client, space, keep).await? {
        client.execute_typed(END_BUCKET, &[(&space, Type::TEXT)]).await?;
        let bucket = client.query_typed_one(INSERT_BUCKET, &[(&space, Type::TEXT)]).await?;
        let id: i64 = bucket.try_get(0)?;
        // A table that is created as a partition would lock out all requests, also while a backup reads them.
        let create = format!(
            "CREATE TABLE tombola_keys_{id} (LIKE tombola_keys INCLUDING ALL);
             ALTER TABLE tombola_keys ATTACH PARTITION tombola_keys_{id} FOR VALUES IN ({id})"
        );
        client.batch_execute(&create).await?;
    }
    client.batch_execute(COMMIT).await?;
    Ok(())
}

async fn is_due(client: &Client, space: &str, keep: Duration) -> Result<bool, Failure> {
    let age = (keep / BUCKETS).as_secs_f64();
    let due = client.query_typed_one(IS_DUE, &[(&space, Type::TEXT), (&age, Type::FLOAT8)]).await?;
    Ok(due.try_get(0)?)
}

/// Drops the oldest bucket if all of its keys have expired, by the clock of the database. `clock` is `None` before
/// the first call.
pub(super) async fn expire(
    client: &Client,
    space: &str,
    keep: Duration,
    clock: &mut Option<Clock>,
) -> Result<(), Failure> {
    let row = client.query_typed_one(SELECT_CLOCK, &[(&space, Type::TEXT)]).await?;
    let (trusted, now): (SystemTime, SystemTime) = (row.try_get(0)?, row.try_get(1)?);
    let steady = Instant::now();
    let clock = clock.get_or_insert_with(|| Clock::new(keep / BUCKETS, trusted, now, steady));
    if !clock.look(now, steady) {
        return Ok(());
    }
    client.execute_typed(UPDATE_CLOCK, &[(&space, Type::TEXT)]).await?;
    let values = [(&space as _, Type::TEXT), (&keep.as_secs_f64() as _, Type::FLOAT8)];
    let Some(bucket) = client.query_typed_opt(SELECT_EXPIRED, &values).await? else {
        return Ok(());
    };
    let (id, began_at): (i64, SystemTime) = (bucket.try_get(0)?, bucket.try_get(1)?);
    // Requests wait for the lock that a drop waits for, and a backup holds it for as long as it reads. So the drop
    // gives up soon, and is tried again the next time.
    let drop = format!(
        "{BEGIN};
         SET LOCAL lock_timeout = '100ms';
         DROP TABLE IF EXISTS tombola_keys_{id};
         DELETE FROM tombola_buckets WHERE id = {id};
         COMMIT"
    );
    match client.batch_execute(&drop).await {
        Ok(()) => info!(
            since = %humantime::format_rfc3339_seconds(began_at),
            "idempotency keys expired: a request with one of them gets new numbers"
        ),
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            client.batch_execute("ROLLBACK").await?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
