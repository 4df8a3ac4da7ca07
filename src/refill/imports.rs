//! Imports numbers that were issued by other means, between the builds. [`import`](crate::import) has the order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Refiller, figures, open_again};
use crate::batch::{Batch, BatchId, ShardIndex};
use crate::events::Kind;
use crate::files;
use crate::folder::{FolderError, PoolPaths, adopt};
use crate::import::{ImportError, Outcome};
use crate::ledger::{Entered, Ledger, LedgerError};
use crate::pool::{HeldStandby, ImportRequest, Pool, SwapInProgress};
use crate::shard::{self, Row, ShardError, Sought};
use crate::space::Value;
use crate::sqlite::{self, Fault};

/// How often to look whether a swap has ended. It takes milliseconds.
const SWAP_POLL: Duration = Duration::from_millis(5);

/// How long to wait for a swap to end, and for a worker to mark rows. A worker that takes longer has a disk that
/// fails. A million scattered rows take about half a minute.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the values of a batch are.
enum Place {
    /// They were in the standby, where those that were unused are marked.
    Standby(Sought),
    /// They are in the live file, whose worker has to mark them.
    Live(Sought),
    /// No file that can be served has them.
    Gone,
}

/// The outcome for the values of a batch.
#[derive(Default)]
struct Marked {
    marked: Vec<Value>,
    known: Vec<Value>,
    issued: Vec<Value>,
}

impl Refiller {
    /// Does the imports that wait. A stop ends the one in progress, which then counts as interrupted.
    pub(super) async fn import_all(&mut self, stop: &CancellationToken) {
        while let Some(ImportRequest { values, reply }) = self.pool.next_import() {
            let outcome = self.import(values, stop).await;
            self.tell(&outcome);
            // If the caller is gone, the import is complete all the same.
            let _ = reply.send(outcome);
        }
    }

    fn tell(&self, outcome: &Result<Outcome, ImportError>) {
        let pool = self.pool.name();
        match outcome {
            Ok(Outcome { marked, repeated, known, issued, .. }) => {
                let issued = issued.len();
                info!(%pool, marked, repeated, known, issued_before = issued, "numbers were imported");
                let message = format!(
                    "{marked} numbers were imported; {known} had been imported before, and {issued} had been issued"
                );
                self.pool.tell(Kind::Imported, None, message);
            }
            Err(error) => warn!(%pool, %error, "an import failed"),
        }
    }

    async fn import(
        &mut self,
        values: Vec<Value>,
        stop: &CancellationToken,
    ) -> Result<Outcome, ImportError> {
        let enter = move |ledger: &mut Ledger| {
            let entered = ledger.import(values)?;
            cut_log(ledger)?;
            let batches = served(ledger, &entered.drawn)?;
            Ok((entered, batches, figures(ledger)))
        };
        let (entered, batches, ledger) = self.with_ledger(enter).await?;
        let Entered { added, repeated, known, drawn, interrupted } = entered;
        self.pool.note_ledger(ledger);
        // Invariant: withdrawn before they are looked for, so that none comes back from a request after that.
        self.pool.withdraw(drawn.iter().map(|&(_, value)| value));
        let mut outcome =
            Outcome { marked: added, repeated, known, interrupted, ..Outcome::default() };
        let mut marked = Vec::new();
        for drawn in drawn.chunk_by(|(batch, _), (next, _)| batch == next) {
            let id = drawn[0].0;
            let values: Vec<Value> = drawn.iter().map(|&(_, value)| value).collect();
            let found = match batches.get(&id) {
                Some(&batch) => self.mark(batch, values, stop).await?,
                None => Marked { issued: values, ..Marked::default() },
            };
            outcome.in_shards += found.marked.len() as u64;
            outcome.known += found.known.len() as u64;
            outcome.issued.extend(found.issued);
            marked.extend(found.marked.into_iter().chain(found.known).map(|value| (id, value)));
        }
        outcome.marked += outcome.in_shards;
        outcome.issued.sort_unstable();
        let end = move |ledger: &mut Ledger| {
            // Invariant: the marks are durable before the ledger counts on them.
            ledger.end_import(&marked)?;
            Ok(marked)
        };
        let marked = self.with_ledger(end).await?;
        self.pool.forget_withdrawn(marked.iter().map(|&(_, value)| value));
        self.pool.note_imported(outcome.in_shards);
        Ok(outcome)
    }

    /// Marks the values of a batch in its file.
    async fn mark(
        &mut self,
        batch: Batch,
        values: Vec<Value>,
        stop: &CancellationToken,
    ) -> Result<Marked, ImportError> {
        let Batch { shard, generation, .. } = batch;
        // The live file is not replaced until the values are marked: only this task provides standbys.
        let pool = Arc::clone(&self.pool);
        let mut held = hold_standby(&pool, shard, stop).await?;
        let paths = self.paths.clone();
        let find = move |ledger: &mut Ledger| {
            // The last build may be complete except for its name.
            adopt(&paths, ledger, shard)?;
            Ok((find(&paths, &batch, &values)?, values))
        };
        let (place, values) = self.with_ledger(find).await?;
        let sought = match place {
            Place::Gone => return Ok(Marked { issued: values, ..Marked::default() }),
            Place::Standby(sought) => {
                if let Some(held) = &mut held {
                    held.marked(sought.unused.len() as u64);
                }
                return Ok(Marked {
                    marked: values_of(&sought.unused),
                    known: values_of(&sought.imported),
                    issued: values_of(&sought.used),
                });
            }
            Place::Live(sought) => sought,
        };
        let known = values_of(&sought.imported);
        let rows = [sought.unused, sought.used].concat();
        let mut issued = values_of(&rows);
        let marking = pool.import_rows(shard, generation, rows);
        let mut marked = in_time(&pool, shard, marking, stop).await??;
        marked.sort_unstable();
        issued.retain(|value| marked.binary_search(value).is_err());
        Ok(Marked { marked, known, issued })
    }

    /// Works with the ledger on a blocking thread. Opens it first if an error closed it.
    async fn with_ledger<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Ledger) -> Result<R, ImportError> + Send + 'static,
    ) -> Result<R, ImportError> {
        let (ledger, known) = (self.ledger.take(), self.known);
        let (space, paths) = (self.space.clone(), self.paths.clone());
        let work = spawn_blocking(move || {
            let mut ledger = match ledger {
                Some(ledger) => ledger,
                None => open_again(&paths, &space, known)?,
            };
            let result = work(&mut ledger);
            Ok::<_, LedgerError>((ledger, result))
        });
        let (ledger, result) = work.await.expect("importing does not panic")?;
        if result.as_ref().err().is_none_or(spares_ledger) {
            self.ledger = Some(ledger);
        }
        result
    }
}

/// Waits until no swap of the shard is in progress, and takes its standby.
async fn hold_standby(
    pool: &Pool,
    shard: ShardIndex,
    stop: &CancellationToken,
) -> Result<Option<HeldStandby>, ImportError> {
    let hold = async {
        loop {
            match pool.hold_standby(shard) {
                Ok(held) => return held,
                Err(SwapInProgress) => sleep(SWAP_POLL).await,
            }
        }
    };
    in_time(pool, shard, hold, stop).await
}

/// Waits for a step of a shard's worker.
async fn in_time<T>(
    pool: &Pool,
    shard: ShardIndex,
    step: impl Future<Output = T>,
    stop: &CancellationToken,
) -> Result<T, ImportError> {
    let step = stop.run_until_cancelled(timeout(PATIENCE, step)).await;
    let away = || ImportError::Away { shard: pool.shard_name(shard).to_owned() };
    step.ok_or(ImportError::Stopped)?.map_err(|_| away())
}

/// Returns whether the ledger can still be used after an error.
fn spares_ledger(error: &ImportError) -> bool {
    match error {
        ImportError::Ledger(error) | ImportError::Folder(FolderError::Ledger(error)) => {
            error.fault() == Fault::Passing
        }
        _ => true,
    }
}

/// Cuts the ledger's log. If another process reads it, it stays as it is.
fn cut_log(ledger: &mut Ledger) -> Result<(), LedgerError> {
    match ledger.cut_log() {
        Err(error) if error.fault() != Fault::Passing => Err(error),
        _ => Ok(()),
    }
}

/// Returns those of the batches whose files may be served.
fn served(
    ledger: &Ledger,
    drawn: &[(BatchId, Value)],
) -> Result<BTreeMap<BatchId, Batch>, LedgerError> {
    let mut served = BTreeMap::new();
    for drawn in drawn.chunk_by(|(batch, _), (next, _)| batch == next) {
        if let Some(batch) = ledger.batch(drawn[0].0)?
            && ledger.batches(batch.shard)?.contains(&batch)
        {
            served.insert(batch.id, batch);
        }
    }
    Ok(served)
}

/// Finds the values of a batch in the files of its shard, and marks them if they are in the standby.
fn find(paths: &PoolPaths, batch: &Batch, values: &[Value]) -> Result<Place, ImportError> {
    let (standby, live) = (paths.standby(batch.shard), paths.live(batch.shard));
    let has_batch = |path: &Path| {
        let is_there = files::length_bytes(path)?.is_some();
        Ok::<_, ShardError>(is_there && shard::read_label(path)?.batch == batch.id)
    };
    let seek = || shard::seek(&sqlite::open_beside(&live)?, values);
    let failed = |path: &PathBuf| {
        let shard = path.clone();
        |source| ImportError::Shard { shard, source }
    };
    if has_batch(&standby).map_err(failed(&standby))? {
        let sought = shard::import_standby(&standby, values).map_err(failed(&standby))?;
        return Ok(Place::Standby(sought));
    }
    match has_batch(&live).map_err(failed(&live))? {
        true => Ok(Place::Live(seek().map_err(failed(&live))?)),
        false => Ok(Place::Gone),
    }
}

fn values_of(rows: &[Row]) -> Vec<Value> {
    rows.iter().map(|row| row.value).collect()
}
