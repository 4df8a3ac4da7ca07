//! The lease buffer of one shard: what is leased and not handed out, who waits, and what the shard's
//! worker should do next. Pure: no file, no task, no lock; `Slot` adds these.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use crate::batch::Generation;
use crate::shard::Row;

/// Rows of one lease, whoever waits: 1 MB in memory, a few MB of write-ahead log.
const LEASE_ROWS_MAX: usize = 1 << 16;

/// Where a shard is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its file is open, or is about to be.
    Serving,
    /// Its file is used up, the standby takes its place.
    Swapping,
    /// It has nothing, and no standby.
    Depleted,
}

/// What a request gets at once.
#[derive(Debug)]
pub(super) enum Take<R> {
    /// The rows, out on loan.
    Rows(Vec<Row>, Generation),
    /// They come when the worker has leased them; a closed channel stands for [`Take::Short`].
    Wait(oneshot::Receiver<R>),
    /// The shard has fewer than that, and no more will come of this generation.
    Short,
}

/// A waiting request.
#[derive(Debug)]
struct Waiter<R> {
    count: usize,
    partial: bool,
    reply: oneshot::Sender<R>,
}

/// Rows for one who waited.
#[derive(Debug)]
pub(super) struct Delivery<R> {
    pub(super) rows: Vec<Row>,
    pub(super) generation: Generation,
    pub(super) reply: oneshot::Sender<R>,
}

/// What the worker should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Lease this many rows.
    Lease(usize),
    /// The file is used up: put the standby in its place.
    Swap,
    /// The file is used up, and there is no standby.
    Retire,
    /// Nothing to do until woken.
    Sleep,
    /// Give back what is left and close.
    Stop,
}

/// See the [module](self). `R` is what those who wait are sent.
#[derive(Debug)]
pub(super) struct Buffer<R> {
    /// `lease.rows`; 0 is strict.
    lease_rows: usize,
    /// Rows below which the next generation is wanted.
    low_water: u64,
    phase: Phase,
    generation: Generation,
    /// Leased, not handed out.
    ready: Vec<Row>,
    waiters: VecDeque<Waiter<R>>,
    /// Rows given to requests that may still give them back, in how many parts.
    loans: usize,
    /// Rows in all of these parts.
    lent: usize,
    /// Rows leased in the life of the process, but for those that were burned or go back into the file.
    leased: u64,
    /// Rows that are lost for good: leased and not handed out, or in a file that was set aside.
    burned: u64,
    /// Its last file was set aside, and the next one does not serve yet.
    damaged: bool,
    /// Rows in the file that are not leased.
    in_file: u64,
    /// Rows of the next generation, which lies ready.
    standby: Option<u64>,
    /// Leasing fails for now: nobody should wait for it.
    failing: bool,
    stopping: bool,
    /// The worker was woken and has not looked yet.
    worker_told: bool,
    /// The refiller was told that this generation runs out.
    refiller_told: bool,
}

impl<R> Buffer<R> {
    /// A shard without a file.
    pub(super) fn new(lease_rows: usize, low_water: u64, standby: Option<u64>) -> Self {
        Self {
            lease_rows,
            low_water,
            phase: Phase::Depleted,
            generation: Generation(0),
            ready: Vec::new(),
            waiters: VecDeque::new(),
            loans: 0,
            lent: 0,
            leased: 0,
            burned: 0,
            damaged: false,
            in_file: 0,
            standby,
            failing: false,
            stopping: false,
            worker_told: false,
            refiller_told: false,
        }
    }

    /// Takes one row that is there already, if any.
    pub(super) fn pop(&mut self) -> Option<Row> {
        self.ready.pop()
    }

    /// Whether the worker has something to do that it was not told of yet.
    pub(super) fn calls_worker(&mut self) -> bool {
        let used_up = self.phase == Phase::Serving && self.left() == 0;
        let all_back = self.stopping && self.loans == 0;
        let work =
            self.is_low() || used_up || all_back || self.wants_refill() || !self.waiters.is_empty();
        let calls = work && !self.worker_told;
        self.worker_told |= calls;
        calls
    }

    /// Whether the next generation is wanted and the refiller was not told yet.
    pub(super) fn calls_refiller(&mut self) -> bool {
        let calls = self.wants_refill();
        self.refiller_told |= calls;
        calls
    }

    /// Takes `count` rows, or with `partial` up to that many, or queues for them.
    pub(super) fn take(&mut self, count: usize, partial: bool) -> Take<R> {
        if self.stopping || self.phase == Phase::Depleted {
            return Take::Short;
        }
        if self.ready.len() >= count {
            return Take::Rows(self.lend(count), self.generation);
        }
        let next_is_due = self.phase == Phase::Swapping || (self.has_standby() && self.left() == 0);
        if self.failing || (!next_is_due && self.is_short_of(count, partial)) {
            return Take::Short;
        }
        let (reply, receiver) = oneshot::channel();
        self.waiters.push_back(Waiter { count, partial, reply });
        Take::Wait(receiver)
    }

    /// Serves those who wait from what is there, turns away those who wait in vain, and says what
    /// the worker should do.
    pub(super) fn next(&mut self, deliveries: &mut Vec<Delivery<R>>) -> Task {
        self.worker_told = false;
        if self.stopping {
            // Nobody waits any more, so that who has a loan soon hands it out or gives it back.
            return if self.loans == 0 { Task::Stop } else { Task::Sleep };
        }
        match self.phase {
            Phase::Serving => {}
            Phase::Swapping => return Task::Swap,
            Phase::Depleted if self.has_standby() => {
                self.phase = Phase::Swapping;
                return Task::Swap;
            }
            Phase::Depleted => return Task::Sleep,
        }
        self.serve(deliveries);
        if self.in_file > 0 {
            let waiting = self.waiting();
            if waiting > 0 || self.is_low() {
                // Group commit: one transaction for all who wait.
                return Task::Lease(self.lease_rows.max(waiting));
            }
            return Task::Sleep;
        }
        if self.loans > 0 || !self.ready.is_empty() {
            return Task::Sleep;
        }
        if self.has_standby() {
            self.phase = Phase::Swapping;
            Task::Swap
        } else {
            self.waiters.clear();
            self.phase = Phase::Depleted;
            Task::Retire
        }
    }

    /// A lease of `rows` is committed.
    pub(super) fn leased(&mut self, mut rows: Vec<Row>, in_file: u64) {
        self.leased += rows.len() as u64;
        self.ready.append(&mut rows);
        self.in_file = in_file;
        self.failing = false;
    }

    /// The file can't be worked on just now: who waits goes elsewhere.
    pub(super) fn pause(&mut self) {
        self.failing = true;
        self.waiters.clear();
    }

    /// Trying again makes sense.
    pub(super) fn retry(&mut self) {
        self.failing = false;
    }

    /// A file is open and has these rows.
    pub(super) fn opened(&mut self, generation: Generation, in_file: u64, standby: Option<u64>) {
        self.generation = generation;
        self.in_file = in_file;
        self.standby = standby;
        self.phase = Phase::Serving;
        self.failing = false;
        self.refiller_told = false;
        self.damaged = false;
    }

    /// The file can't be trusted any more: what was not handed out of it is burned, or all of the
    /// standby that was put in its place and is no standby any more. Says how much.
    pub(super) fn lost(&mut self, standby: Option<u64>) -> u64 {
        let rows = |standby: Option<u64>| standby.unwrap_or(0);
        let burned = self.left() + rows(self.standby).saturating_sub(rows(standby));
        self.burned += burned;
        self.leased -= self.ready.len() as u64;
        self.damaged = true;
        self.standby = standby;
        self.ready.clear();
        self.waiters.clear();
        self.in_file = 0;
        self.generation = Generation(0);
        self.phase = Phase::Depleted;
        burned
    }

    /// A standby generation lies ready.
    pub(super) fn standby_ready(&mut self, rows: u64) {
        self.standby = Some(rows);
    }

    /// The rows of a loan, so many, were handed out.
    pub(super) fn loan_settled(&mut self, rows: usize) {
        self.loans -= 1;
        self.lent -= rows;
    }

    /// The rows of a loan were not handed out. Says how many of them are burned, because their file
    /// was replaced meanwhile.
    pub(super) fn loan_returned(&mut self, rows: &mut Vec<Row>, generation: Generation) -> u64 {
        self.loans -= 1;
        self.lent -= rows.len();
        // Invariant: a row never outlives its generation.
        if generation != self.generation {
            let burned = rows.len() as u64;
            self.leased -= burned;
            self.burned += burned;
            return burned;
        }
        self.ready.append(rows);
        // What was on loan made the generation look shorter than it is.
        self.refiller_told &= self.left() < self.low_water;
        0
    }

    /// The server stops, or the worker is gone: nobody should wait any more.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        self.waiters.clear();
    }

    /// What was not handed out, for the end.
    pub(super) fn take_unserved(&mut self) -> Vec<Row> {
        self.leased -= self.ready.len() as u64;
        std::mem::take(&mut self.ready)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping
    }

    pub(super) fn has_standby(&self) -> bool {
        self.standby.is_some()
    }

    /// Rows of the next generation, where it lies ready.
    pub(super) fn standby(&self) -> Option<u64> {
        self.standby
    }

    /// Rows handed out in the life of the process.
    pub(super) fn issued(&self) -> u64 {
        self.leased - self.ready.len() as u64 - self.lent as u64
    }

    /// Whether who asks now gets numbers, or waits for some that come.
    pub(super) fn can_serve(&self) -> bool {
        !self.failing || !self.ready.is_empty()
    }

    /// Rows burned in the life of the process.
    pub(super) fn burned(&self) -> u64 {
        self.burned
    }

    /// Whether its last file was set aside, and the next one does not serve yet.
    pub(super) fn is_damaged(&self) -> bool {
        self.damaged
    }

    /// A start found that its file can't be trusted.
    pub(super) fn found_damaged(&mut self) {
        self.damaged = true;
    }

    pub(super) fn generation(&self) -> Option<Generation> {
        (self.generation != Generation(0)).then_some(self.generation)
    }

    /// Rows that can still be handed out.
    pub(super) fn left(&self) -> u64 {
        self.in_file + self.ready.len() as u64
    }

    /// Rows leased and not handed out, for the next lease to note.
    pub(super) fn unserved(&self) -> Option<usize> {
        (self.lease_rows > 0).then_some(self.ready.len())
    }

    /// Below half a lease the next one is taken ahead of need.
    fn is_low(&self) -> bool {
        self.lease_rows > 0
            && self.in_file > 0
            && !self.failing
            && self.ready.len() <= self.lease_rows / 2
    }

    fn wants_refill(&self) -> bool {
        !self.refiller_told && !self.has_standby() && self.left() < self.low_water
    }

    /// Whether this generation can't give `count` any more, whatever comes back.
    fn is_short_of(&self, count: usize, partial: bool) -> bool {
        let enough = if partial { 1 } else { count as u64 };
        self.loans == 0 && self.left() < enough
    }

    fn serve(&mut self, deliveries: &mut Vec<Delivery<R>>) {
        while let Some(waiter) = self.waiters.front() {
            // A loan may come back: those who wait for what it holds wait for its end.
            let no_more = self.in_file == 0 && self.loans == 0;
            let partial = waiter.partial && no_more;
            let count = if partial { waiter.count.min(self.ready.len()) } else { waiter.count };
            let vanished = waiter.reply.is_closed();
            let enough = count > 0 && self.ready.len() >= count;
            // With nothing left at all, all may wait for the standby.
            let in_vain = no_more && !self.ready.is_empty();
            if !vanished && !enough && !in_vain {
                break;
            }
            let waiter = self.waiters.pop_front().expect("it was looked at above");
            if !vanished && enough {
                let rows = self.lend(count);
                deliveries.push(Delivery {
                    rows,
                    generation: self.generation,
                    reply: waiter.reply,
                });
            }
        }
    }

    /// Rows that those who wait still need, as many as fit a lease.
    fn waiting(&self) -> usize {
        let mut needed = 0;
        for waiter in &self.waiters {
            needed += waiter.count;
            if needed > LEASE_ROWS_MAX {
                break;
            }
        }
        needed.saturating_sub(self.ready.len())
    }

    fn lend(&mut self, count: usize) -> Vec<Row> {
        self.loans += 1;
        self.lent += count;
        self.ready.split_off(self.ready.len() - count)
    }
}

#[cfg(test)]
mod tests;
