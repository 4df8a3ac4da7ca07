//! The table of receipts. Knows nothing of what is derived from them.

use std::sync::Arc;
use std::time::SystemTime;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::super::chain::Head;
use super::super::record::{
    Caller, Draft, Given, KeyDigest, Label, Labelled, Origin, Receipt, from_millis, to_millis,
};
use super::super::store::Filter;
use super::heads::{seq_of_sql, seq_to_sql};
use super::session::Failure;
use crate::config::PoolName;
use crate::space::{CodeFormat, Space};

/// The most bytes of numbers in a page of receipts, besides those of its last one.
pub(super) const PAGE_BYTES: usize = 1 << 20;

pub(super) const CREATE: &str = "
    CREATE TABLE IF NOT EXISTS tombola_receipts (
        space        text NOT NULL,
        seq          bigint NOT NULL,      -- 1, 2, 3, ... in the order of the commits
        at           timestamptz NOT NULL,
        pool         text NOT NULL,
        decimals     smallint NOT NULL,
        pattern      text,                 -- with alphabet and code_check: null unless values are codes
        alphabet     text,
        code_check   text,
        owner        text NOT NULL,
        token        text NOT NULL,
        label        text,
        label_salt   bytea,
        label_digest bytea,                -- stays when the label is erased
        key_digest   bytea,
        numbers      bytea NOT NULL,
        digest       bytea NOT NULL,       -- of this receipt and all before it
        PRIMARY KEY (space, seq)
    );
    CREATE INDEX IF NOT EXISTS tombola_receipts_by_label
        ON tombola_receipts (space, label, seq) WHERE label IS NOT NULL;";

const INSERT: &str = "
    INSERT INTO tombola_receipts (
        space, seq, at, pool, decimals, pattern, alphabet, code_check, owner, token, label, label_salt,
        label_digest, key_digest, numbers, digest)
    SELECT $1, receipt.*
    FROM unnest($2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) AS receipt";
const EXISTS: &str = "
    SELECT $2 = 0 OR EXISTS (
        SELECT FROM tombola_receipts WHERE space = $1 AND seq = $2 AND digest = $3)";
const SELECT: &str = "SELECT * FROM tombola_receipts WHERE space = $1 AND seq = $2";
const SELECT_OWNER: &str = "SELECT owner FROM tombola_receipts WHERE space = $1 AND seq = $2";
const SELECT_AFTER: &str = "
    SELECT * FROM (
        SELECT *, sum(octet_length(numbers)) OVER (ORDER BY seq) - octet_length(numbers) AS bytes_before
        FROM (
            SELECT * FROM tombola_receipts WHERE space = $1 AND seq > $2 ORDER BY seq LIMIT $3
        ) AS next
    ) AS page
    WHERE bytes_before < $4 ORDER BY seq";
const SELECT_LABELLED: &str = "
    SELECT * FROM (
        SELECT *, sum(octet_length(numbers)) OVER (ORDER BY seq) - octet_length(numbers) AS bytes_before
        FROM (
            SELECT * FROM tombola_receipts WHERE space = $1 AND seq > $2 AND label = $5 ORDER BY seq LIMIT $3
        ) AS next
    ) AS page
    WHERE bytes_before < $4 ORDER BY seq";
const ERASE_LABEL: &str = "
    UPDATE tombola_receipts SET label = NULL, label_salt = NULL WHERE space = $1 AND label = $2";

/// Inserts drafts as receipts, each with the head of the chain that it makes.
pub(super) async fn insert(
    client: &Client,
    space: &str,
    receipts: &[(Head, &Draft)],
) -> Result<(), Failure> {
    fn column<'r, T>(receipts: &'r [(Head, &'r Draft)], value: impl Fn(&'r Draft) -> T) -> Vec<T> {
        receipts.iter().map(|(_, draft)| value(draft)).collect()
    }
    let seq: Vec<_> = receipts.iter().map(|(head, _)| seq_to_sql(head.seq)).collect();
    let digest: Vec<_> = receipts.iter().map(|(head, _)| head.digest.as_slice()).collect();
    let at = column(receipts, |draft| from_millis(to_millis(draft.at)));
    let pool = column(receipts, |draft| draft.origin.pool.as_str());
    let decimals = column(receipts, |draft| i16::from(draft.origin.space.decimals()));
    let codes = |part: for<'f> fn(&'f CodeFormat) -> &'f str| {
        column(receipts, move |draft| draft.origin.space.codes().map(part))
    };
    let pattern = codes(CodeFormat::pattern);
    let alphabet = codes(CodeFormat::alphabet);
    let check = codes(|format| format.check());
    let owner = column(receipts, |draft| &*draft.caller.owner);
    let token = column(receipts, |draft| &*draft.caller.token);
    let label = column(receipts, |draft| Some(draft.label.as_ref()?.label.as_ref()?.0.as_str()));
    let salt = column(receipts, |draft| Some(draft.label.as_ref()?.label.as_ref()?.1.as_slice()));
    let label_digest = column(receipts, |draft| Some(draft.label.as_ref()?.digest.as_slice()));
    let key = column(receipts, |draft| Some(draft.key.as_ref()?.0.as_slice()));
    let numbers = column(receipts, |draft| draft.numbers.as_slice());
    let values: [(&(dyn ToSql + Sync), Type); _] = [
        (&space, Type::TEXT),
        (&seq, Type::INT8_ARRAY),
        (&at, Type::TIMESTAMPTZ_ARRAY),
        (&pool, Type::TEXT_ARRAY),
        (&decimals, Type::INT2_ARRAY),
        (&pattern, Type::TEXT_ARRAY),
        (&alphabet, Type::TEXT_ARRAY),
        (&check, Type::TEXT_ARRAY),
        (&owner, Type::TEXT_ARRAY),
        (&token, Type::TEXT_ARRAY),
        (&label, Type::TEXT_ARRAY),
        (&salt, Type::BYTEA_ARRAY),
        (&label_digest, Type::BYTEA_ARRAY),
        (&key, Type::BYTEA_ARRAY),
        (&numbers, Type::BYTEA_ARRAY),
        (&digest, Type::BYTEA_ARRAY),
    ];
    client.execute_typed(INSERT, &values).await?;
    Ok(())
}

/// Returns whether the receipt that made this head exists. The head of an empty chain always does.
pub(super) async fn exists(client: &Client, space: &str, head: Head) -> Result<bool, Failure> {
    let (seq, digest) = (seq_to_sql(head.seq), head.digest.as_slice());
    let values = [(&space as _, Type::TEXT), (&seq as _, Type::INT8), (&digest as _, Type::BYTEA)];
    Ok(client.query_typed_one(EXISTS, &values).await?.try_get(0)?)
}

/// Returns the owner of a receipt.
pub(super) async fn owner(
    client: &Client,
    space: &str,
    seq: u64,
) -> Result<Option<String>, Failure> {
    let values = [(&space as _, Type::TEXT), (&seq_to_sql(seq) as _, Type::INT8)];
    let row = client.query_typed_opt(SELECT_OWNER, &values).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

/// Returns a receipt.
pub(super) async fn receipt(
    client: &Client,
    space: &str,
    seq: u64,
) -> Result<Option<Receipt>, Failure> {
    let values = [(&space as _, Type::TEXT), (&seq_to_sql(seq) as _, Type::INT8)];
    client.query_typed_opt(SELECT, &values).await?.as_ref().map(read).transpose()
}

/// Returns the next receipts: up to `limit`, or fewer if their numbers have more than `bytes`. There are no more only if
/// the list is empty.
pub(super) async fn after(
    client: &Client,
    space: &str,
    filter: &Filter,
    limit: usize,
    bytes: usize,
) -> Result<Vec<Receipt>, Failure> {
    let as_sql = |limit| i64::try_from(limit).unwrap_or(i64::MAX);
    let (after, limit, bytes) = (seq_to_sql(filter.after), as_sql(limit), as_sql(bytes));
    let mut values: Vec<(&(dyn ToSql + Sync), Type)> = vec![
        (&space, Type::TEXT),
        (&after, Type::INT8),
        (&limit, Type::INT8),
        (&bytes, Type::INT8),
    ];
    let sql = match &filter.label {
        None => SELECT_AFTER,
        Some(label) => {
            values.push((label, Type::TEXT));
            SELECT_LABELLED
        }
    };
    client.query_typed(sql, &values).await?.iter().map(read).collect()
}

/// Removes a label from all of its receipts, and returns the number of these. Its text stays in the database's files
/// until they are vacuumed.
pub(super) async fn erase_label(client: &Client, space: &str, label: &str) -> Result<u64, Failure> {
    Ok(client.execute_typed(ERASE_LABEL, &[(&space, Type::TEXT), (&label, Type::TEXT)]).await?)
}

pub(super) fn read(row: &Row) -> Result<Receipt, Failure> {
    let origin = origin(row)?;
    let given = Given::from_bytes(&origin.pool, row.try_get("numbers")?);
    let text = |name| row.try_get::<_, &str>(name).map(Arc::from);
    let labelled = |digest| -> Result<_, Failure> {
        let label: Option<String> = row.try_get("label")?;
        let salt = bytes(row, "label_salt")?;
        Ok(Labelled { label: label.and_then(Label::new).zip(salt), digest })
    };
    Ok(Receipt {
        seq: seq_of_sql(row.try_get("seq")?)?,
        at: row.try_get::<_, SystemTime>("at")?,
        origin: Arc::new(origin),
        caller: Caller { owner: text("owner")?, token: text("token")? },
        label: bytes(row, "label_digest")?.map(labelled).transpose()?,
        key: bytes(row, "key_digest")?.map(KeyDigest),
        given: given.ok_or(Failure::Damaged("the numbers of a receipt"))?,
        digest: bytes(row, "digest")?.ok_or(Failure::Damaged("the digest of a receipt"))?,
    })
}

fn origin(row: &Row) -> Result<Origin, Failure> {
    let decimals = u8::try_from(row.try_get::<_, i16>("decimals")?).ok();
    let space = match row.try_get::<_, Option<&str>>("pattern")? {
        None => decimals.and_then(Space::widest),
        Some(pattern) => {
            let (alphabet, check) = (row.try_get("alphabet")?, row.try_get("code_check")?);
            CodeFormat::new(pattern, alphabet, check).ok().map(Space::of_codes)
        }
    };
    let origin = PoolName::new(row.try_get("pool")?).zip(space);
    let origin = origin.map(|(pool, space)| Origin { pool, space });
    origin.ok_or(Failure::Damaged("the pool of a receipt"))
}

fn bytes<const N: usize>(row: &Row, name: &str) -> Result<Option<[u8; N]>, Failure> {
    let bytes: Option<&[u8]> = row.try_get(name)?;
    let bytes = bytes.map(<[u8; N]>::try_from).transpose();
    bytes.map_err(|_| Failure::Damaged("a digest or a salt"))
}
