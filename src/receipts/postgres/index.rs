//! The index of numbers, which finds the receipt of a number without a scan. It is extended after receipts are saved,
//! so that saving does not wait for it.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::super::record::Receipt;
use super::super::store::Filter;
use super::heads::{SpaceState, seq_of_sql, seq_to_sql};
use super::rows;
use super::session::Failure;
use crate::config::PoolName;
use crate::space::Value;

/// The most receipts that are read at once, and the most bytes of their numbers: a tenth of a second of work, unless
/// one receipt has more.
const STEP_RECEIPTS: usize = 1_000;
const STEP_BYTES: usize = 1 << 16;

/// The numbers that are inserted at once.
pub(super) const INSERT_NUMBERS: usize = 8_192;

pub(super) const CREATE: &str = "
    CREATE TABLE IF NOT EXISTS tombola_numbers (
        space text NOT NULL,
        pool  text NOT NULL,
        value bigint NOT NULL,
        seq   bigint NOT NULL,
        PRIMARY KEY (space, pool, value, seq)
    );";

/// Another instance may insert the same numbers.
const INSERT: &str = "
    INSERT INTO tombola_numbers (space, pool, value, seq)
    SELECT $1, pool, value, seq FROM unnest($2, $3, $4) AS number (pool, value, seq)
    ON CONFLICT DO NOTHING";
const UPDATE_INDEXED: &str = "
    UPDATE tombola_heads SET indexed_to = greatest(indexed_to, $2) WHERE space = $1 AND seq >= $2";
const SELECT_INDEXED: &str = "SELECT indexed_to FROM tombola_heads WHERE space = $1";
const SELECT: &str = "
    SELECT max(seq) FROM tombola_numbers WHERE space = $1 AND pool = $2 AND value = $3";

/// Some receipts that are not in the index.
#[derive(Debug)]
pub(super) struct Batch {
    /// Their numbers, each with its pool and the sequence number of its receipt.
    pub(super) numbers: Vec<(PoolName, Value, u64)>,
    /// The last of these receipts.
    last: u64,
}

/// Returns the next receipts that are not in the index, if there are any.
pub(super) async fn next(client: &Client, space: &str) -> Result<Option<Batch>, Failure> {
    let row = client.query_typed_one(SELECT_INDEXED, &[(&space, Type::TEXT)]).await?;
    let filter = Filter { after: seq_of_sql(row.try_get(0)?)?, label: None };
    let receipts = rows::after(client, space, &filter, STEP_RECEIPTS, STEP_BYTES).await?;
    let numbers = receipts.iter().flat_map(|receipt| {
        let pool = &receipt.origin.pool;
        receipt.given.values().map(move |value| (pool.clone(), value, receipt.seq))
    });
    let numbers = numbers.collect();
    Ok(receipts.last().map(|receipt| Batch { numbers, last: receipt.seq }))
}

/// Adds numbers of a batch to the index.
pub(super) async fn insert(
    client: &Client,
    space: &str,
    numbers: &[(PoolName, Value, u64)],
) -> Result<(), Failure> {
    let pools: Vec<_> = numbers.iter().map(|(pool, _, _)| pool.as_str()).collect();
    let values: Vec<_> = numbers.iter().map(|(_, value, _)| value.0).collect();
    let seqs: Vec<_> = numbers.iter().map(|(_, _, seq)| seq_to_sql(*seq)).collect();
    let columns = [
        (&space as _, Type::TEXT),
        (&pools as _, Type::TEXT_ARRAY),
        (&values as _, Type::INT8_ARRAY),
        (&seqs as _, Type::INT8_ARRAY),
    ];
    client.execute_typed(INSERT, &columns).await?;
    Ok(())
}

/// Notes that all numbers of a batch are in the index.
pub(super) async fn finish(client: &Client, space: &str, batch: &Batch) -> Result<(), Failure> {
    let values = [(&space as _, Type::TEXT), (&seq_to_sql(batch.last) as _, Type::INT8)];
    client.execute_typed(UPDATE_INDEXED, &values).await?;
    Ok(())
}

/// Returns the latest receipt with a number, if it is this owner's or if no owner is given. Searches the index and all
/// receipts that are not in it, whether one is found or not.
pub(super) async fn find(
    client: &Client,
    space: &str,
    state: SpaceState,
    (pool, value): (&PoolName, Value),
    owner: Option<&str>,
) -> Result<Option<Receipt>, Failure> {
    let mut found = None;
    let mut filter = Filter { after: state.indexed_to, label: None };
    loop {
        let receipts = rows::after(client, space, &filter, STEP_RECEIPTS, rows::PAGE_BYTES).await?;
        let Some(last) = receipts.last() else { break };
        filter.after = last.seq;
        let has_it = |receipt: &&Receipt| {
            receipt.origin.pool == *pool && receipt.given.values().any(|other| other == value)
        };
        found = receipts.iter().rfind(has_it).map(|receipt| receipt.seq).or(found);
    }
    let number =
        [(&space as _, Type::TEXT), (&pool.as_str() as _, Type::TEXT), (&value.0 as _, Type::INT8)];
    let indexed: Option<i64> = client.query_typed_one(SELECT, &number).await?.try_get(0)?;
    let found = found.max(indexed.map(seq_of_sql).transpose()?);
    // If there is no receipt, another one's owner is read, so that this takes as long.
    let owner_of = rows::owner(client, space, found.unwrap_or(state.head.seq)).await?;
    let is_allowed = owner.is_none_or(|owner| owner_of.as_deref() == Some(owner));
    match found.filter(|_| is_allowed) {
        Some(seq) => rows::receipt(client, space, seq).await,
        None => Ok(None),
    }
}
