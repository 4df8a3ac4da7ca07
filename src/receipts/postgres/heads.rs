//! The head of each space's chain. An instance locks it before it appends receipts, so that all instances append in
//! turn, and the sequence numbers are in the order of the commits.

use std::time::SystemTime;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::super::chain::Head;
use super::session::Failure;

pub(super) const CREATE: &str = "
    CREATE TABLE IF NOT EXISTS tombola_heads (
        space       text PRIMARY KEY,
        seq         bigint NOT NULL,      -- the last receipt, or 0
        digest      bytea NOT NULL,
        known_since timestamptz NOT NULL, -- all keys used since then are known
        clock_at    timestamptz NOT NULL, -- the clock when it was last trusted
        indexed_to  bigint NOT NULL       -- the last receipt whose numbers are in tombola_numbers
    );";

const INSERT: &str = "
    INSERT INTO tombola_heads (space, seq, digest, known_since, clock_at, indexed_to)
    VALUES ($1, 0, $2, now(), now(), 0) ON CONFLICT DO NOTHING";
const LOCK: &str = "SELECT * FROM tombola_heads WHERE space = $1 FOR NO KEY UPDATE";
/// Locks the row against nothing that an instance does, but a transaction with a lock commits like a write, and
/// waits until a synchronous standby has all that it has read. Otherwise a primary could return a receipt, after a
/// crash, that no standby has.
const CONFIRM: &str = "SELECT * FROM tombola_heads WHERE space = $1 FOR KEY SHARE";
const UPDATE: &str = "UPDATE tombola_heads SET seq = $2, digest = $3 WHERE space = $1";
const UPDATE_KNOWN_SINCE: &str =
    "UPDATE tombola_heads SET known_since = clock_timestamp() WHERE space = $1";

/// The state of a space.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpaceState {
    pub(super) head: Head,
    pub(super) known_since: SystemTime,
    pub(super) indexed_to: u64,
}

/// Creates the state of a space, if there is none.
pub(super) async fn create(client: &Client, space: &str) -> Result<(), Failure> {
    let digest = &Head::START.digest.as_slice();
    client.execute_typed(INSERT, &[(&space, Type::TEXT), (digest, Type::BYTEA)]).await?;
    Ok(())
}

/// Waits until no other instance appends to the space, and returns its state. The lock ends with the transaction.
pub(super) async fn lock(client: &Client, space: &str) -> Result<SpaceState, Failure> {
    let row = client.query_typed_one(LOCK, &[(&space, Type::TEXT)]).await?;
    read(&row)
}

/// Returns the state of a space, if there is one. The commit of the transaction waits until a synchronous standby has
/// all that was read.
pub(super) async fn confirm(client: &Client, space: &str) -> Result<Option<SpaceState>, Failure> {
    let row = client.query_typed_opt(CONFIRM, &[(&space, Type::TEXT)]).await?;
    row.as_ref().map(read).transpose()
}

pub(super) async fn update(client: &Client, space: &str, head: Head) -> Result<(), Failure> {
    let (seq, digest) = (seq_to_sql(head.seq), head.digest.as_slice());
    let values = [(&space as _, Type::TEXT), (&seq as _, Type::INT8), (&digest as _, Type::BYTEA)];
    client.execute_typed(UPDATE, &values).await?;
    Ok(())
}

/// Notes that keys used before now may be unknown.
pub(super) async fn forget_earlier_keys(client: &Client, space: &str) -> Result<(), Failure> {
    client.execute_typed(UPDATE_KNOWN_SINCE, &[(&space, Type::TEXT)]).await?;
    Ok(())
}

fn read(row: &Row) -> Result<SpaceState, Failure> {
    let digest: &[u8] = row.try_get("digest")?;
    Ok(SpaceState {
        head: Head {
            seq: seq_of_sql(row.try_get("seq")?)?,
            digest: digest.try_into().map_err(|_| Failure::Damaged("the head of the receipts"))?,
        },
        known_since: row.try_get("known_since")?,
        indexed_to: seq_of_sql(row.try_get("indexed_to")?)?,
    })
}

pub(super) fn seq_to_sql(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

pub(super) fn seq_of_sql(seq: i64) -> Result<u64, Failure> {
    u64::try_from(seq).map_err(|_| Failure::Damaged("a sequence number"))
}
