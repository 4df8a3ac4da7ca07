//! The controls: the least work that any implementation has to do.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tombola::internals::sqlite::rusqlite::{Connection, params};

/// Serves a constant of `length` bytes at `/random` with a bare `axum::serve`, until it is killed.
pub(crate) fn constant(length: usize) -> anyhow::Result<()> {
    let body: &'static str = "x".repeat(length).leak();
    tokio::runtime::Runtime::new()?.block_on(async {
        let respond = move || async move { ([(CONTENT_TYPE, "application/json")], body) };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        println!("http://{}", listener.local_addr()?);
        std::io::stdout().flush()?;
        Ok(axum::serve(listener, Router::new().route("/random", get(respond).post(respond)))
            .await?)
    })
}

/// Fills the product's tables with plain rusqlite: for each pool, on a thread of its own, a ledger and
/// `shards` shards of `rows` rows, which are sorted before the clock starts, in one transaction for each
/// shard. Prints the seconds.
pub(crate) fn inserts(dir: &Path, pools: u64, shards: u64, rows: u64) -> anyhow::Result<()> {
    let batches: Vec<Vec<Vec<(i64, i64)>>> = (0..pools)
        .map(|pool| (0..shards).map(|shard| batch(pool * shards + shard, rows)).collect())
        .collect();
    let started = Instant::now();
    std::thread::scope(|scope| {
        let pools: Vec<_> = batches
            .iter()
            .enumerate()
            .map(|(pool, batches)| {
                scope.spawn(move || insert_pool(&dir.join(pool.to_string()), batches))
            })
            .collect();
        pools.into_iter().try_for_each(|pool| pool.join().expect("inserting does not panic"))
    })?;
    println!("{}", started.elapsed().as_secs_f64());
    Ok(())
}

/// Returns random strata and values in the order of a ledger.
fn batch(seed: u64, rows: u64) -> Vec<(i64, i64)> {
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    let mut rows: Vec<_> = (0..rows)
        .map(|_| (random.random_range(0..4096), random.random_range(0..1 << 53)))
        .collect();
    rows.sort_unstable();
    rows
}

fn insert_pool(dir: &Path, batches: &[Vec<(i64, i64)>]) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    let mut ledger = Connection::open(dir.join("ledger.db")).context("can't create a ledger")?;
    ledger.execute_batch(
        "CREATE TABLE used_numbers (
            stratum INTEGER NOT NULL, value INTEGER NOT NULL, batch INTEGER NOT NULL,
            PRIMARY KEY (stratum, value)
        ) STRICT, WITHOUT ROWID;",
    )?;
    for (index, batch) in batches.iter().enumerate() {
        let transaction = ledger.transaction()?;
        {
            let mut insert = transaction.prepare("INSERT INTO used_numbers VALUES (?1, ?2, ?3)")?;
            for (stratum, value) in batch {
                insert.execute(params![stratum, value, index as i64])?;
            }
        }
        transaction.commit()?;
        let mut shard = Connection::open(dir.join(format!("shard_{index}.db")))?;
        shard.execute_batch(
            "CREATE TABLE numbers (
                id INTEGER PRIMARY KEY, value INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0
            ) STRICT;",
        )?;
        let transaction = shard.transaction()?;
        {
            let mut insert = transaction.prepare("INSERT INTO numbers VALUES (?1, ?2, 0)")?;
            for (id, (_, value)) in batch.iter().enumerate() {
                insert.execute(params![id as i64, value])?;
            }
        }
        transaction.commit()?;
    }
    Ok(())
}
