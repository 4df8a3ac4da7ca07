//! The refiller of one pool: compares the shards' levels with the plan, builds what is due, and waits. The
//! only user of the ledger while the server runs. Knows nothing of requests.

mod build;
mod builders;
mod imports;
mod plan;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

pub(crate) use self::build::BuildError;
pub use self::build::{Built, build};
pub use self::builders::Builders;
use self::builders::Turn;
pub use self::plan::Refill;
pub(crate) use self::plan::plan;
use self::plan::{STARTER_ROWS, is_dry, starter_rows};
use crate::backoff::Backoff;
use crate::batch::ShardIndex;
use crate::config::{PoolConfig, RefillConfig};
use crate::events::Kind;
use crate::fleet::Claims;
use crate::folder::{PoolFiles, PoolPaths};
use crate::ledger::{Ledger, LedgerError};
use crate::pool::{Cause, LedgerFigures, Outcome, Pool, Trouble};
use crate::space::Space;
use crate::sqlite::{self, Fault};

/// See the [module](self).
#[derive(Debug)]
pub struct Refiller {
    /// `None` while no build is due, because an open ledger takes memory and three open files, and after a disk
    /// fault, because the state in memory may not be on the disk. The ledger is opened again before the next
    /// build.
    ledger: Option<Ledger>,
    /// The ledger when it was last open.
    known: Known,
    space: Space,
    paths: PoolPaths,
    pool: Arc<Pool>,
    config: RefillConfig,
    shard_size: u32,
    /// Whether the last operation on the ledger found its content wrong.
    suspects: bool,
    /// Whether the last refill failed and was due because a request was turned away.
    starved: bool,
    /// The source of partitions to draw from, in a fleet.
    claims: Option<Claims>,
    builders: Arc<Builders>,
}

/// The state of a ledger when it was last open.
#[derive(Clone, Copy, Debug)]
struct Known {
    id: Uuid,
    /// The number of its values. After a disk fault it may have more.
    values: u64,
    exhausted: bool,
}

impl Known {
    fn of(ledger: &Ledger) -> Self {
        Self { id: ledger.id(), values: ledger.count(), exhausted: ledger.is_exhausted() }
    }
}

impl Refiller {
    /// Creates a refiller of a pool with these files.
    pub fn new(
        files: PoolFiles,
        pool: Arc<Pool>,
        config: &PoolConfig,
        claims: Option<Claims>,
        builders: Arc<Builders>,
    ) -> Self {
        let PoolFiles { paths, ledger, .. } = files;
        let &PoolConfig { refill: config, shard_size, .. } = config;
        let space = ledger.space().clone();
        pool.open_books(figures(&ledger));
        let (known, ledger) = (Known::of(&ledger), Some(ledger));
        let (suspects, starved) = (false, false);
        Self {
            ledger,
            known,
            space,
            paths,
            pool,
            config,
            shard_size,
            suspects,
            starved,
            claims,
            builders,
        }
    }

    /// Refills until it is stopped, which cancels a running build. Returns itself, to be
    /// [closed](Self::close) after the pool's workers.
    pub async fn run(mut self, stop: CancellationToken) -> Self {
        let watch = self.pool.watch_task();
        let mut backoff = Backoff::new(self.config.retry, self.config.retry_limit);
        while !stop.is_cancelled() {
            self.import_all(&stop).await;
            match self.refill_next(&stop).await {
                Ok(true) => {
                    backoff.reset();
                    self.pool.set_refill_trouble(None);
                }
                Ok(false) => {
                    self.rest().await;
                    stop.run_until_cancelled(self.pool.refill_wanted()).await;
                }
                Err(error) if error.is_cancelled() => break,
                Err(error) => {
                    let pause = backoff.next();
                    self.failed(&error, pause);
                    stop.run_until_cancelled(sleep(pause)).await;
                }
            }
        }
        self.pool.close_imports();
        watch.end();
        self
    }

    /// Closes the ledger, after recording which numbers the workers have burned and which files they closed.
    pub async fn close(self) {
        let Self { ledger, known, space, paths, pool, .. } = self;
        let close = move || {
            let mut ledger = match ledger {
                Some(ledger) => ledger,
                None => open_again(&paths, &space, known)?,
            };
            note_burned(&pool, &mut ledger)?;
            ledger.note_closed(&pool.closed_files())?;
            ledger.close()
        };
        let closed = tokio::task::spawn_blocking(close).await;
        if let Ok(Err(error)) = closed {
            error!(%error, "the ledger could not be closed");
        }
    }

    /// Closes the ledger until the next build. In a fleet it stays open, because claims depend on it.
    async fn rest(&mut self) {
        if self.claims.is_none()
            && let Some(ledger) = self.ledger.take()
        {
            self.known = Known::of(&ledger);
            let rested = tokio::task::spawn_blocking(move || ledger.rest()).await;
            self.ledger = rested.expect("closing does not panic");
        }
    }

    /// Does the most urgent refill. Returns whether one was due.
    async fn refill_next(&mut self, stop: &CancellationToken) -> Result<bool, BuildError> {
        // A request that was turned away may want more than any shard has above its low-water mark, so all
        // shards get a standby.
        let is_starved = self.pool.take_starved() | std::mem::take(&mut self.starved);
        let low_water = match is_starved {
            true => u64::MAX,
            false => self.config.low_water_rows(self.shard_size),
        };
        if self.due(low_water).is_none() {
            return Ok(false);
        }
        let Some(turn) = self.turn(stop).await else {
            return Ok(true);
        };
        // Planned again, because the levels may have changed.
        let Some(refill) = self.due(low_water) else {
            return Ok(true);
        };
        debug!(
            pool = %self.pool.name(), shard = refill.shard.0, rows = refill.rows,
            "the next generation of a shard is begun"
        );
        let started = Instant::now();
        self.pool.refill_began(refill.shard, refill.rows);
        let built = self.build_off_the_runtime(refill, turn, stop).await;
        let built = self.prove(built).await;
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
                self.starved = is_starved;
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
            // The next call finds the ledger exhausted.
            Built::Exhausted => return Ok(true),
        }
        let shard = self.pool.shard_name(refill.shard);
        let message =
            format!("The next generation of {shard} is ready: {rows} numbers in {seconds:.1} s");
        self.pool.tell(Kind::Refilled, Some(refill.shard), message);
        self.pool.standby_ready(refill.shard, rows);
        Ok(true)
    }

    /// Returns the most urgent refill, unless none is due or the ledger has no values left. Reports when the latter
    /// begins.
    fn due(&self, low_water: u64) -> Option<Refill> {
        let starter = starter_rows(self.builders.dry());
        let due = plan(&self.pool.levels(), low_water, self.shard_size.into(), starter);
        let exhausted = self.ledger.as_ref().map_or(self.known.exhausted, Ledger::is_exhausted)
            && self.claims.as_ref().is_none_or(Claims::none_left);
        if self.pool.set_exhausted(exhausted) && exhausted {
            let message = match self.claims {
                None => "Every number of the range has entered a shard: no shard can be refilled",
                Some(_) => {
                    "Every number that this instance may draw has entered a shard, and no partitions are \
                     left to claim: no shard can be refilled here. Other instances may have numbers left"
                }
            };
            warn!(pool = %self.pool.name(), "{message}");
            self.pool.tell(Kind::Exhausted, None, message.to_owned());
        }
        due.first().copied().filter(|_| !exhausted)
    }

    /// Waits until this pool may build. Returns `None` if it is stopped first.
    async fn turn(&mut self, stop: &CancellationToken) -> Option<Turn> {
        if is_dry(&self.pool.levels()) {
            return stop.run_until_cancelled(self.builders.urgent()).await;
        }
        if let Some(turn) = self.builders.free() {
            return Some(turn);
        }
        // It may be long until its turn.
        self.rest().await;
        stop.run_until_cancelled(ahead_of_need(&self.pool, &self.builders)).await
    }

    /// Builds a generation on a blocking thread. Returns the result and the number of rows in the shard's
    /// next generation.
    async fn build_off_the_runtime(
        &mut self,
        refill: Refill,
        turn: Turn,
        stop: &CancellationToken,
    ) -> Result<(Built, u64), BuildError> {
        let held = self.claim_ahead(refill.rows, stop).await?;
        let (ledger, known) = (self.ledger.take(), self.known);
        let used = self.claims.clone();
        let shared = used.is_some();
        let (space, paths) = (self.space.clone(), self.paths.clone());
        let (pool, stop) = (Arc::clone(&self.pool), stop.clone());
        let work = tokio::task::spawn_blocking(move || {
            let reopened = ledger.is_none();
            let mut ledger = match ledger {
                Some(ledger) => ledger,
                None => open_again(&paths, &space, known)?,
            };
            if shared && (reopened || !held.is_empty()) {
                ledger.hold(&held);
            }
            if let Some(claims) = used.filter(|_| reopened) {
                ledger.set_used(claims.used())?;
            }
            note_burned(&pool, &mut ledger)?;
            let (mut turn, mut missing) = (Some(turn), 2 * refill.rows);
            let mut progress = |values| {
                pool.refill_advanced(refill.shard, values);
                missing = missing.saturating_sub(values);
                if missing == 0 && refill.rows <= STARTER_ROWS && turn.is_some() {
                    debug!(pool = %pool.name(), shard = refill.shard.0, "the next generation of a shard is written");
                    // The rest of the work is waiting for the disk, with little in memory.
                    turn = None;
                }
                match stop.is_cancelled() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let built = build(&mut ledger, &paths, &refill, &mut progress);
            // Also after an error, since a build that was not completed may have committed its draw.
            pool.note_ledger(figures(&ledger));
            let newest = ledger.batches(refill.shard)?.last().map_or(0, |batch| batch.count);
            Ok::<_, LedgerError>((ledger, built.map(|built| (built, newest))))
        });
        let (ledger, built) = work.await.expect("building does not panic")?;
        if built.as_ref().err().is_none_or(BuildError::spares_ledger) {
            self.ledger = Some(ledger);
        }
        built
    }

    /// Returns an error about the ledger's content as damage if it occurred twice in a row, with a new
    /// connection, and all of the ledger can be read.
    async fn prove<T>(&mut self, built: Result<T, BuildError>) -> Result<T, BuildError> {
        let error = match built {
            Err(BuildError::Ledger(error)) if error.fault() == Fault::Content => error,
            other => {
                self.suspects = false;
                return other;
            }
        };
        if std::mem::replace(&mut self.suspects, true) {
            let path = self.paths.ledger();
            let read = tokio::task::spawn_blocking(move || sqlite::read_through(&path)).await;
            read.expect("reading does not panic")?;
            return Err(error.proven().into());
        }
        Err(error.into())
    }

    /// Claims partitions if a build after the next one will need them. Returns all partitions that are then
    /// held, or an empty list if nothing changed.
    async fn claim_ahead(
        &mut self,
        rows: u64,
        stop: &CancellationToken,
    ) -> Result<Vec<u16>, BuildError> {
        let (Some(claims), Some(ledger)) = (&mut self.claims, &self.ledger) else {
            return Ok(Vec::new());
        };
        let wanted = ledger.partitions_wanted(rows);
        let can_do_without = !ledger.is_exhausted();
        if wanted == 0 || claims.none_left() {
            return Ok(Vec::new());
        }
        let claimed = stop.run_until_cancelled(claims.claim(wanted)).await;
        match claimed.ok_or(LedgerError::Cancelled)? {
            // The partitions already held are enough for this build.
            Err(error) if can_do_without => {
                warn!(pool = %self.pool.name(), %error, "no partitions could be claimed ahead of need");
                Ok(Vec::new())
            }
            claimed => Ok(claimed?),
        }
    }

    /// Reports a problem once, however often it recurs.
    fn trouble(&self, shard: ShardIndex, error: &BuildError) {
        let trouble = Trouble::new(Cause::Refill, error.to_string(), error);
        if error.is_cancelled() || !self.pool.set_refill_trouble(Some(trouble)) {
            return;
        }
        let message = format!("Filling {} failed: {error}", self.pool.shard_name(shard));
        self.pool.tell(Kind::RefillFailed, Some(shard), message);
    }

    fn failed(&self, error: &BuildError, pause: Duration) {
        warn!(
            pool = %self.pool.name(), retry_in_ms = pause.as_millis(), %error,
            "a refill failed; the shards still serve the numbers that they have"
        );
    }
}

/// Waits for a turn to build ahead of need. If the pool runs dry before that, it goes before all others that do so.
async fn ahead_of_need(pool: &Pool, builders: &Builders) -> Turn {
    let runs_dry = async {
        while !is_dry(&pool.levels()) {
            pool.refill_wanted().await;
        }
    };
    builders.ahead_of_need(runs_dry).await
}

/// Opens a ledger that this process has closed.
///
/// # Errors
/// Returns [`LedgerError::Damaged`] if the file is another ledger now, or has lost values: these could be drawn
/// again.
fn open_again(paths: &PoolPaths, space: &Space, known: Known) -> Result<Ledger, LedgerError> {
    let ledger = Ledger::open(&paths.ledger(), space)?;
    ledger.check_continues(known.id, known.values)?;
    Ok(ledger)
}

/// Records in the ledger the numbers that the pool has burned since the last call.
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
    LedgerFigures {
        values: ledger.count(),
        burned: ledger.burned(),
        imported: ledger.imported_count(),
        bytes,
    }
}
