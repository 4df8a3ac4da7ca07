//! The task that owns one shard's file: leases rows, installs the next generation, and returns rows at the
//! end. The only place that commits a lease.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use super::buffer::{Buffer, Leasing, Task};
use super::file::{ShardFile, WorkError};
use super::slot::Slot;
use super::sync::timeout;
use super::{Cause, Pool, Trouble};
use crate::backoff::Backoff;
use crate::config::RefillConfig;
use crate::events::Kind;
use crate::fleet::{Gate, Lease};
use crate::folder::PoolPaths;
use crate::shard::Row;
use crate::sqlite::{Fault, Fresh, LOG_PAGES_MAX};

/// How long waiting requests also wait for the gate. A step of the fence takes milliseconds, unless the store
/// is unreachable.
const GATE_PATIENCE: Duration = Duration::from_millis(500);

/// See the [module](self).
pub(super) struct Worker<F> {
    pool: Arc<Pool>,
    position: usize,
    slot: Arc<Slot>,
    paths: PoolPaths,
    file: Option<F>,
    /// The last operation on the file found its content wrong.
    suspects: bool,
    /// Whether `run` has begun. Until then the worker does not pause, so that a failing shard does not delay
    /// the start.
    runs: bool,
    /// Leased rows that may not be handed out, because the pool stopped before the gate opened.
    unfenced: Vec<Row>,
    /// The pauses before a failed operation is tried again.
    backoff: Backoff,
}

impl<F: ShardFile> Worker<F> {
    pub(super) fn new(
        pool: Arc<Pool>,
        position: usize,
        paths: PoolPaths,
        refill: RefillConfig,
    ) -> Self {
        let slot = Arc::clone(&pool.slots[position]);
        let backoff = Backoff::new(refill.retry, refill.retry_limit);
        let (file, suspects, runs, unfenced) = (None, false, false, Vec::new());
        Self { pool, position, slot, paths, file, suspects, runs, unfenced, backoff }
    }

    /// Works until the pool is stopped.
    pub(super) async fn run(mut self) {
        let watch = self.pool.watch_task();
        self.runs = true;
        loop {
            let task = self.slot.next();
            if self.slot.update(Buffer::calls_refiller) {
                self.pool.refill_wanted.notify_one();
            }
            match task {
                Task::Open => self.open(None).await,
                Task::Lease(_) | Task::Import if self.log_pages() >= 4 * LOG_PAGES_MAX => {
                    self.checkpoint().await;
                }
                Task::Import => self.import().await,
                Task::Lease(rows) => self.lease(rows).await,
                Task::Swap => self.swap().await,
                Task::Retire => self.retire(),
                Task::Sleep if self.log_pages() >= LOG_PAGES_MAX => self.checkpoint().await,
                Task::Sleep => self.slot.woken().await,
                Task::Stop => break,
            }
        }
        self.give_back().await;
        watch.end();
    }

    /// Opens the live file, or takes the connection that the start has opened, and enters the rotation.
    pub(super) async fn open(&mut self, opened: Option<Fresh>) {
        let mut file = match F::open(&self.paths, self.slot.index, opened).await {
            Ok(file) => file,
            Err(error) => return self.failed("the shard can't be opened", &error).await,
        };
        let (generation, left) = (file.generation(), file.left());
        if !self.slot.look(|buffer| buffer.remembers(left)) {
            let _ = file.close().await;
            return self.lost(&"it has lost leases that were committed").await;
        }
        if self.pool.gate.is_some() {
            file.count_leases();
        }
        self.file = Some(file);
        let burned = self.slot.update(|buffer| buffer.opened(generation, left));
        self.slot.set_trouble(None);
        if left > 0 {
            self.pool.enter_rotation(self.position);
        }
        info!(
            pool = %self.pool.name, shard = %self.slot.name, generation = generation.0, left, burned,
            "the shard is open"
        );
    }

    async fn lease(&mut self, rows: usize) {
        let leased = self.slot.look(Buffer::leased_rows);
        let file = self.file.as_mut().expect(OPEN);
        let started = Instant::now();
        match file.lease(rows, leased).await {
            Ok(rows) => {
                self.slot.leases.record(started.elapsed());
                let left = file.left();
                debug!(shard = %self.slot.name, rows = rows.len(), left, "rows were leased");
                if let Some(gate) = self.pool.gate.clone()
                    && !self.pass(&gate).await
                {
                    self.unfenced = rows;
                    return;
                }
                // Invariant: committed before handed out, and in a fleet also fenced.
                self.slot.update(|buffer| buffer.add_lease(rows, left));
                self.suspects = false;
                self.backoff.reset();
                self.slot.set_trouble(None);
            }
            Err(error) => self.failed("leasing fails", &error).await,
        }
    }

    /// Marks some of the rows of an import.
    async fn import(&mut self) {
        let Some((rows, leased)) = self.slot.update(Buffer::import_rows) else {
            return;
        };
        let Some(file) = &mut self.file else {
            return self.slot.update(Buffer::drop_import);
        };
        match file.import(rows.clone(), leased).await {
            Ok(marked) => {
                let unused = file.left();
                // Invariant: marked, durably, before the import counts on it.
                self.slot.update(|buffer| buffer.imported(&rows, &marked, unused));
                self.suspects = false;
                self.backoff.reset();
                self.slot.set_trouble(None);
            }
            Err(error) => self.failed("marking imported numbers fails", &error).await,
        }
    }

    /// Waits until the gate opens for the lease that was just committed. If this takes long, waiting requests
    /// go to another shard. Returns false if the pool stops first, which also ends the wait for a lease that
    /// was refused.
    async fn pass(&self, gate: &Gate) -> bool {
        let file = self.file.as_ref().expect(OPEN);
        let lease = Lease {
            pool: self.pool.name.clone(),
            shard: self.slot.index,
            generation: file.generation(),
            leases: file.leases(),
        };
        let mut passing = pin!(gate.pass(lease));
        let mut patience = pin!(tokio::time::sleep(GATE_PATIENCE));
        let (mut patient, mut refused) = (true, false);
        loop {
            tokio::select! {
                passed = &mut passing, if !refused => {
                    if passed {
                        return true;
                    }
                    refused = true;
                }
                () = &mut patience, if patient => {
                    patient = false;
                    self.slot.update(|buffer| buffer.pause(Leasing::AwaitsFence));
                }
                () = self.slot.woken() => {
                    if self.slot.look(Buffer::is_stopping) {
                        return false;
                    }
                }
            }
        }
    }

    fn log_pages(&self) -> usize {
        self.file.as_ref().map_or(0, F::log_pages)
    }

    /// Writes the log back into the file. This takes as long as several leases, so while the log is short it
    /// waits until the worker is idle.
    async fn checkpoint(&mut self) {
        if let Err(error) = self.file.as_mut().expect(OPEN).checkpoint().await {
            self.failed("a checkpoint fails", &error).await;
        }
    }

    /// Leaves the rotation, because the file is used up and no standby is ready. The refiller builds one.
    fn retire(&mut self) {
        self.pool.leave_rotation(self.position);
        info!(pool = %self.pool.name, shard = %self.slot.name, "the shard is depleted");
        let message =
            format!("{} is depleted, and its next generation is not ready", self.slot.name);
        self.tell(Kind::Depleted, message);
        self.pool.refill_wanted.notify_one();
    }

    /// Installs the standby generation in place of the used-up file.
    async fn swap(&mut self) {
        self.pool.leave_rotation(self.position);
        if let Some(file) = self.file.take()
            && let Err(error) = file.close().await
        {
            // The file is used up, so its log is no longer needed.
            warn!(shard = %self.slot.name, %error, "a used-up shard could not be closed cleanly");
        }
        match F::install_standby(&self.paths, self.slot.index).await {
            Ok(()) => self.slot.update(Buffer::installed),
            Err(error) => self.pause("the next generation can't be put in place", &error).await,
        }
    }

    /// Decides what to do with a file after a failed operation. A disk fault costs as much as a crash would:
    /// at most the rows of the failed lease. A file is lost only if its content is found wrong twice in a
    /// row, with a new connection, and all of it can be read.
    async fn failed(&mut self, what: &str, error: &WorkError) {
        let fault = error.fault();
        if fault != Fault::Passing
            && let Some(file) = self.file.take()
        {
            // This may well fail too. The log stays for the next opening.
            let _ = file.close().await;
            self.slot.update(Buffer::closed);
        }
        let suspected = std::mem::replace(&mut self.suspects, fault == Fault::Content);
        if !self.suspects {
            return self.pause(what, error).await;
        }
        if suspected {
            match F::read_through(&self.paths, self.slot.index).await {
                Ok(()) => self.lost(error).await,
                Err(error) => self.pause(what, &error).await,
            }
        }
    }

    /// Sets the file aside. The ledger has its values, so none of them is drawn again.
    async fn lost(&mut self, error: &impl std::fmt::Display) {
        self.pool.leave_rotation(self.position);
        let burned = self.slot.update(Buffer::lost);
        if let Some(file) = self.file.take() {
            // This may well fail, but the file is not used again.
            let _ = file.close().await;
        }
        match F::set_aside(&self.paths, self.slot.index).await {
            Ok(aside) => error!(
                pool = %self.pool.name, shard = %self.slot.name, kept_as = %aside.display(), burned,
                %error, "a shard is damaged and was set aside; a new generation will be built"
            ),
            Err(aside) => error!(
                pool = %self.pool.name, shard = %self.slot.name, burned, %error, not_set_aside = %aside,
                "a shard is damaged but could not be set aside; a new generation will replace it"
            ),
        }
        let name = &self.slot.name;
        self.tell(
            Kind::Damaged,
            format!("{name} is damaged and was set aside; {burned} numbers are burned: {error}"),
        );
        self.pool.refill_wanted.notify_one();
    }

    fn tell(&self, kind: Kind, message: String) {
        self.pool.events.add(kind, Some(&self.pool.name), Some(&self.slot.name), message);
    }

    /// Waits before the next attempt.
    async fn pause(&mut self, what: &str, error: &(impl std::error::Error + Sync + 'static)) {
        let pause = self.backoff.next();
        warn!(
            pool = %self.pool.name, shard = %self.slot.name, retry_in_ms = pause.as_millis(), %error,
            "{what}"
        );
        let details = format!("{}: {what}: {error}", self.slot.name);
        self.slot.set_trouble(Some(Trouble::new(Cause::Shard, details, error)));
        // No request waits for rows during a pause, so only a stop or a standby ends it early.
        self.slot.update(|buffer| buffer.pause(Leasing::FileFails));
        if self.runs {
            let _ = timeout(pause, self.slot.woken()).await;
        }
        self.slot.update(Buffer::retry);
    }

    /// Returns the leased rows that were not handed out, and closes the file.
    async fn give_back(&mut self) {
        self.pool.leave_rotation(self.position);
        let mut rows: Vec<Row> = self.slot.update(Buffer::take_leased);
        rows.append(&mut self.unfenced);
        let Some(file) = self.file.take() else {
            return;
        };
        let returned = rows.len();
        match file.give_back(rows).await {
            Ok(()) => {
                self.slot.update(Buffer::given_back);
                info!(shard = %self.slot.name, returned, "the shard is closed");
            }
            Err(error) => error!(
                shard = %self.slot.name, burned_at_most = returned, %error,
                "the leased numbers could not be returned to the shard"
            ),
        }
    }
}

impl<F> Drop for Worker<F> {
    fn drop(&mut self) {
        // However the task ends, no request may wait for it.
        self.slot.update(Buffer::stop);
        self.pool.leave_rotation(self.position);
    }
}

const OPEN: &str = "only an open file has rows to lease";
