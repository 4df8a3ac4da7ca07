//! The task that owns one shard's file: leases, swaps in the next generation, gives back at the end.
//! The only place where a lease is committed.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use super::Pool;
use super::buffer::{Buffer, Task};
use super::file::{self, OpenFile, WorkError};
use super::slot::Slot;
use super::sync::timeout;
use crate::config::RefillConfig;
use crate::events::Kind;
use crate::fleet::{Gate, Lease};
use crate::folder::PoolPaths;
use crate::shard::Row;
use crate::sqlite::LOG_PAGES_MAX;

/// How long those who wait for a lease wait for the gate too: a step of the fence takes milliseconds,
/// unless the store is away.
const GATE_PATIENCE: Duration = Duration::from_millis(500);

/// See the [module](self).
pub(super) struct Worker {
    pool: Arc<Pool>,
    position: usize,
    slot: Arc<Slot>,
    paths: PoolPaths,
    refill: RefillConfig,
    file: Option<OpenFile>,
    /// Rows that were leased and may not be handed out: the end came before the gate opened.
    withheld: Vec<Row>,
    /// How long to wait before trying again what failed for a passing cause.
    pause: Duration,
}

impl Worker {
    pub(super) fn new(
        pool: Arc<Pool>,
        position: usize,
        paths: PoolPaths,
        refill: RefillConfig,
    ) -> Self {
        let slot = Arc::clone(&pool.slots[position]);
        let withheld = Vec::new();
        Self { pool, position, slot, paths, refill, file: None, withheld, pause: refill.retry }
    }

    /// Works until the pool is stopped.
    pub(super) async fn run(mut self) {
        let watch = self.pool.watch_task();
        loop {
            let task = self.slot.next();
            if self.slot.update(Buffer::calls_refiller) {
                self.pool.refill_wanted.notify_one();
            }
            match task {
                Task::Lease(_) if self.log_pages() >= 4 * LOG_PAGES_MAX => self.checkpoint().await,
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

    /// Opens the live file and enters rotation; a damaged file is set aside.
    pub(super) async fn open(&mut self, standby: Option<u64>) {
        self.open_live(standby, false).await;
    }

    /// `swapped`: the file was just put in place, and can be again.
    async fn open_live(&mut self, standby: Option<u64>, swapped: bool) {
        match OpenFile::open(&self.paths, self.slot.index).await {
            Ok(mut file) => {
                if self.pool.gate.is_some() {
                    file.count_leases();
                }
                let (generation, left) = (file.generation(), file.left());
                self.file = Some(file);
                self.slot.update(|buffer| buffer.opened(generation, left, standby));
                self.recovered();
                if left > 0 {
                    self.pool.enter_rotation(self.position);
                }
                info!(
                    pool = %self.pool.name, shard = %self.slot.name, generation = generation.0, left,
                    "the shard is open"
                );
            }
            Err(error) if swapped && error.is_transient() => {
                self.pause("the next generation can't be opened", &error).await;
            }
            Err(error) => self.lost(&error, standby).await,
        }
    }

    async fn lease(&mut self, rows: usize) {
        let unserved = self.slot.look(Buffer::unserved);
        let file = self.file.as_mut().expect(OPEN);
        let started = Instant::now();
        match file.lease(rows, unserved).await {
            Ok(rows) => {
                self.slot.leases.record(started.elapsed());
                let left = file.left();
                debug!(shard = %self.slot.name, rows = rows.len(), left, "rows were leased");
                if let Some(gate) = self.pool.gate.clone()
                    && !self.pass(&gate).await
                {
                    self.withheld = rows;
                    return;
                }
                // Invariant: committed before handed out; in a fleet, fenced too.
                self.slot.update(|buffer| buffer.leased(rows, left));
                self.recovered();
            }
            Err(error) if error.is_transient() => self.pause("leasing fails", &error).await,
            Err(error) => {
                let standby = self.slot.look(Buffer::standby);
                self.lost(&error, standby).await;
            }
        }
    }

    /// Waits for the gate to open for the lease that was just committed. Who waits for its rows meanwhile
    /// is sent elsewhere when that takes long. Answers whether it opened before the end.
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
        let mut patient = true;
        loop {
            tokio::select! {
                () = &mut passing => return true,
                () = &mut patience, if patient => {
                    patient = false;
                    self.slot.update(Buffer::pause);
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
        self.file.as_ref().map_or(0, OpenFile::log_pages)
    }

    /// When nobody waits, as far as that can be: it takes as long as some leases.
    async fn checkpoint(&mut self) {
        match self.file.as_mut().expect(OPEN).checkpoint().await {
            Ok(()) => {}
            Err(error) if error.is_transient() => self.pause("a checkpoint fails", &error).await,
            Err(error) => {
                let standby = self.slot.look(Buffer::standby);
                self.lost(&error, standby).await;
            }
        }
    }

    /// The file is used up and nothing stands by: the refiller's turn.
    fn retire(&mut self) {
        self.pool.leave_rotation(self.position);
        info!(pool = %self.pool.name, shard = %self.slot.name, "the shard is depleted");
        let message =
            format!("{} is depleted, and its next generation is not ready", self.slot.name);
        self.tell(Kind::Depleted, message);
        self.pool.refill_wanted.notify_one();
    }

    /// Puts the standby generation in the place of the used-up file.
    async fn swap(&mut self) {
        self.pool.leave_rotation(self.position);
        if let Some(file) = self.file.take()
            && let Err(error) = file.close().await
        {
            // It is used up: whatever its log holds is not needed any more.
            warn!(shard = %self.slot.name, %error, "a used-up shard could not be closed cleanly");
        }
        match file::install_standby(&self.paths, self.slot.index).await {
            Ok(()) => self.open_live(None, true).await,
            Err(error) => self.pause("the next generation can't be put in place", &error).await,
        }
    }

    /// The file can't be trusted any more. The ledger knows its values, so none comes again.
    async fn lost(&mut self, error: &WorkError, standby: Option<u64>) {
        self.pool.leave_rotation(self.position);
        let burned = self.slot.update(|buffer| buffer.lost(standby));
        if let Some(file) = self.file.take() {
            // Its state does not matter any more, and it may well fail.
            let _ = file.close().await;
        }
        match file::set_aside(&self.paths, self.slot.index).await {
            Ok(aside) => error!(
                pool = %self.pool.name, shard = %self.slot.name, kept_as = %aside.display(), burned,
                %error, "a shard failed and was set aside; a fresh generation will be built"
            ),
            Err(aside) => error!(
                pool = %self.pool.name, shard = %self.slot.name, burned, %error, not_set_aside = %aside,
                "a shard failed; a fresh generation will be built in its place"
            ),
        }
        let name = &self.slot.name;
        self.tell(
            Kind::Damaged,
            format!("{name} failed and was set aside, {burned} numbers are burned: {error}"),
        );
        self.pool.refill_wanted.notify_one();
    }

    fn tell(&self, kind: Kind, message: String) {
        self.pool.events.add(kind, Some(&self.pool.name), Some(&self.slot.name), message);
    }

    async fn pause(&mut self, what: &str, error: &(impl std::error::Error + Sync)) {
        warn!(
            pool = %self.pool.name, shard = %self.slot.name, retry_in_ms = self.pause.as_millis(), %error,
            "{what}"
        );
        self.slot.set_trouble(Some(format!("{}: {what}: {error}", self.slot.name)));
        // Nobody waits for rows meanwhile, so that only a stop or a standby ends the pause early.
        self.slot.update(Buffer::pause);
        let _ = timeout(self.pause, self.slot.woken()).await;
        self.slot.update(Buffer::retry);
        self.pause = (self.pause * 2).min(self.refill.retry_limit);
    }

    fn recovered(&mut self) {
        self.pause = self.refill.retry;
        self.slot.set_trouble(None);
    }

    /// The end: what was leased and not handed out becomes unused again.
    async fn give_back(&mut self) {
        self.pool.leave_rotation(self.position);
        let mut rows: Vec<Row> = self.slot.update(Buffer::take_unserved);
        rows.append(&mut self.withheld);
        let Some(file) = self.file.take() else {
            return;
        };
        let returned = rows.len();
        match file.give_back(rows).await {
            Ok(()) => info!(shard = %self.slot.name, returned, "the shard is closed"),
            Err(error) => error!(
                shard = %self.slot.name, burned_at_most = returned, %error,
                "the shard could not take its leased numbers back"
            ),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // However the task ends, nobody waits for it.
        self.slot.update(Buffer::stop);
        self.pool.leave_rotation(self.position);
    }
}

const OPEN: &str = "only an open file has rows to lease";
