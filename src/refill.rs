//! The refiller of one pool: looks at the levels, builds what is due, waits. The only user of the
//! ledger while the server runs. Knows nothing of requests.

mod build;
mod plan;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{error, info, warn};

pub use self::build::{BuildError, Built, build};
pub use self::plan::{Refill, plan};
use crate::batch::ShardIndex;
use crate::config::RefillConfig;
use crate::events::Kind;
use crate::fleet::Claims;
use crate::folder::PoolPaths;
use crate::ledger::{Ledger, LedgerError};
use crate::pool::{LedgerFigures, Outcome, Pool};
use crate::space::Space;

/// See the [module](self).
#[derive(Debug)]
pub struct Refiller {
    /// `None` after a failure: it is opened again before the next build, so that nothing in memory
    /// is trusted that may not be on the disk.
    ledger: Option<Ledger>,
    space: Space,
    paths: PoolPaths,
    pool: Arc<Pool>,
    config: RefillConfig,
    shard_size: u32,
    /// In a fleet: where it gets strata to draw in.
    claims: Option<Claims>,
    stop: watch::Receiver<bool>,
}

impl Refiller {
    /// A refiller that ends when `stop` becomes true or its sender is gone.
    #[must_use]
    pub fn new(
        ledger: Ledger,
        paths: PoolPaths,
        pool: Arc<Pool>,
        config: RefillConfig,
        shard_size: u32,
        claims: Option<Claims>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let space = *ledger.space();
        pool.open_books(figures(&ledger));
        Self { ledger: Some(ledger), space, paths, pool, config, shard_size, claims, stop }
    }

    /// Refills until it is stopped; a build under way is given up then.
    pub async fn run(mut self) {
        let watch = self.pool.watch_task();
        let mut pause = self.config.retry;
        while !*self.stop.borrow() {
            match self.refill_next().await {
                Ok(true) => {
                    pause = self.config.retry;
                    self.pool.set_refill_trouble(None);
                }
                Ok(false) => {
                    tokio::select! {
                        () = self.pool.refill_wanted() => {}
                        () = stopped(&mut self.stop) => break,
                    }
                }
                Err(error) if error.is_cancelled() => break,
                Err(error) => {
                    self.failed(&error, pause);
                    if tokio::time::timeout(pause, stopped(&mut self.stop)).await.is_ok() {
                        break;
                    }
                    pause = (pause * 2).min(self.config.retry_limit);
                }
            }
        }
        let pool = Arc::clone(&self.pool);
        let close = move |mut ledger: Ledger| {
            let noted = note_burned(&pool, &mut ledger);
            ledger.close().and(noted)
        };
        let closed = tokio::task::spawn_blocking(move || self.ledger.map(close)).await;
        if let Ok(Some(Err(error))) = closed {
            error!(%error, "the ledger could not be closed");
        }
        watch.end();
    }

    /// Does the most urgent filling. Answers whether there was one to do.
    async fn refill_next(&mut self) -> Result<bool, BuildError> {
        // Who was turned away may want more than a shard has above its mark: then all want a standby.
        let low_water = match self.pool.take_starved() {
            true => u64::MAX,
            false => self.config.low_water_rows(self.shard_size),
        };
        let due = plan(&self.pool.levels(), low_water, self.shard_size.into());
        let exhausted = self.ledger.as_ref().is_some_and(Ledger::is_exhausted)
            && self.claims.as_ref().is_none_or(Claims::none_left);
        if self.pool.set_exhausted(exhausted) && exhausted {
            let message = match self.claims {
                None => "Every number of the range is in a shard, or was: none can be filled again",
                Some(_) => {
                    "Every number that this instance may draw is in a shard, or was, and no strata are \
                     left to claim: none can be filled again here. Others of the fleet may go on"
                }
            };
            warn!(pool = %self.pool.name(), "{message}");
            self.pool.tell(Kind::Exhausted, None, message.to_owned());
        }
        let Some(&refill) = due.first() else {
            return Ok(false);
        };
        if exhausted {
            return Ok(false);
        }
        let started = Instant::now();
        self.pool.refill_began(refill.shard, refill.rows);
        let built = self.build_off_the_runtime(refill).await;
        let took = started.elapsed();
        let outcome = match &built {
            Ok((Built::Batch(_) | Built::Adopted, _)) => Some(Outcome::Filled),
            Ok((Built::Exhausted, _)) => None,
            Err(error) if error.is_cancelled() => None,
            Err(_) => Some(Outcome::Failed),
        };
        self.pool.refill_ended(refill.shard, outcome, took);
        let (built, rows) = match built {
            Ok(built) => built,
            Err(error) => {
                self.trouble(refill.shard, &error);
                return Err(error);
            }
        };
        let pool = self.pool.name();
        let seconds = took.as_secs_f64();
        match built {
            Built::Batch(batch) => info!(
                %pool, shard = refill.shard.0, generation = batch.generation.0, rows = batch.count,
                seconds, "the next generation of a shard is ready"
            ),
            Built::Adopted => info!(%pool, shard = refill.shard.0, "a complete build is ready"),
            // The ledger is seen to be exhausted the next time.
            Built::Exhausted => return Ok(true),
        }
        let shard = self.pool.shard_name(refill.shard);
        let message =
            format!("The next generation of {shard} is ready: {rows} numbers in {seconds:.1} s");
        self.pool.tell(Kind::Refilled, Some(refill.shard), message);
        self.pool.standby_ready(refill.shard, rows);
        Ok(true)
    }

    /// Builds. Answers how that ended, and how many rows the shard's next generation has.
    async fn build_off_the_runtime(&mut self, refill: Refill) -> Result<(Built, u64), BuildError> {
        let held = self.claim_ahead(refill.rows).await?;
        let ledger = self.ledger.take();
        let shared = self.claims.is_some();
        let (space, paths) = (self.space, self.paths.clone());
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&cancel);
        let pool = Arc::clone(&self.pool);
        let mut work = tokio::task::spawn_blocking(move || {
            let reopened = ledger.is_none();
            let mut ledger = match ledger {
                Some(ledger) => ledger,
                None => Ledger::open(&paths.ledger(), &space)?,
            };
            if shared && (reopened || !held.is_empty()) {
                ledger.hold(&held)?;
            }
            note_burned(&pool, &mut ledger)?;
            let mut step = |values| {
                pool.refill_advanced(refill.shard, values);
                match cancelled.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let built = build(&mut ledger, &paths, &refill, &mut step);
            // Whatever came of it: a build that was not completed may have committed its draw.
            pool.note_ledger(figures(&ledger), ledger.take_draws());
            let newest = ledger.batches(refill.shard)?.last().map_or(0, |batch| batch.count);
            Ok::<_, LedgerError>((ledger, built.map(|built| (built, newest))))
        });
        let done = tokio::select! {
            done = &mut work => done,
            () = stopped(&mut self.stop) => {
                cancel.store(true, Ordering::Relaxed);
                work.await
            }
        };
        let (ledger, built) = done.expect("building does not panic")?;
        if built.as_ref().is_ok() || built.as_ref().is_err_and(BuildError::is_cancelled) {
            self.ledger = Some(ledger);
        }
        built
    }

    /// Claims strata when a build like the next one will want them. Answers with all that are held then,
    /// or none when nothing changed.
    async fn claim_ahead(&mut self, rows: u64) -> Result<Vec<u16>, BuildError> {
        let (Some(claims), Some(ledger)) = (&mut self.claims, &self.ledger) else {
            return Ok(Vec::new());
        };
        let wanted = ledger.strata_wanted(rows);
        let can_do_without = !ledger.strata().is_empty() && !ledger.is_exhausted();
        if wanted == 0 || claims.none_left() {
            return Ok(Vec::new());
        }
        let claimed = tokio::select! {
            claimed = claims.claim(wanted) => claimed,
            () = stopped(&mut self.stop) => return Err(LedgerError::Cancelled.into()),
        };
        match claimed {
            // Those that are held will do for this build.
            Err(error) if can_do_without => {
                warn!(pool = %self.pool.name(), %error, "no strata could be claimed ahead of need");
                Ok(Vec::new())
            }
            claimed => Ok(claimed?),
        }
    }

    /// Says once what goes wrong, however often it is tried.
    fn trouble(&self, shard: ShardIndex, error: &BuildError) {
        if error.is_cancelled() || !self.pool.set_refill_trouble(Some(error.to_string())) {
            return;
        }
        let message = format!("Filling {} failed: {error}", self.pool.shard_name(shard));
        self.pool.tell(Kind::RefillFailed, Some(shard), message);
    }

    fn failed(&self, error: &BuildError, pause: Duration) {
        warn!(
            pool = %self.pool.name(), retry_in_ms = pause.as_millis(), %error,
            "a refill failed; what is in the shards is still served"
        );
    }
}

/// Lets the ledger know of the numbers that the pool has burned since.
fn note_burned(pool: &Pool, ledger: &mut Ledger) -> Result<(), LedgerError> {
    let burned = pool.burned_to_note();
    if burned > 0 {
        ledger.add_burned(burned)?;
        pool.burned_noted(burned);
    }
    Ok(())
}

fn figures(ledger: &Ledger) -> LedgerFigures {
    let bytes = ledger.size_bytes().unwrap_or_default();
    LedgerFigures { values: ledger.count(), burned: ledger.burned(), bytes }
}

/// Completes when the server stops, or whoever would say so is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|&stop| stop).await;
}
