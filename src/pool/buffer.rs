//! The lease buffer of one shard: the leased rows, the waiting requests, and the worker's next task. Pure: no
//! file, no task, no lock. `Slot` adds these.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use crate::batch::Generation;
use crate::shard::Row;

/// The number of rows above which a lease includes no further waiting requests: 1 MB in memory, a few MB of
/// write-ahead log.
const LEASE_ROWS_MAX: usize = 1 << 16;

/// The phase of a shard.
///
/// ```text
/// Empty -> Swapping -> Opening -> Serving -> Swapping, or Empty without a standby
///                         ^----------'  a disk fault
/// ```
/// Damaged content leads from Opening or Serving to Empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The shard has no file, or a used-up one, and no standby.
    Empty,
    /// The file is used up, and the standby is replacing it.
    Swapping,
    /// The file is to be opened: for the first time after a start or a swap, or again after a disk fault.
    Opening {
        /// Whether the file was the standby before.
        swapped: bool,
    },
    /// The file is open.
    Serving,
}

/// Whether leases can be made at the moment. Requests wait for a lease only if they can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leasing {
    /// Leases can be made.
    Works,
    /// The file can't be used.
    FileFails,
    /// A lease is committed, but the store of the fleet does not respond.
    AwaitsFence,
}

/// The immediate result of a request for rows.
#[derive(Debug)]
pub(super) enum Take<R> {
    /// The rows, which are now on loan.
    Rows(Vec<Row>, Generation),
    /// The rows follow when the worker has leased them. A closed channel stands for [`Take::Short`].
    Wait(oneshot::Receiver<R>),
    /// The shard has fewer rows, and this generation will not get more.
    Short,
}

/// A waiting request.
#[derive(Debug)]
struct Waiter<R> {
    count: usize,
    partial: bool,
    reply: oneshot::Sender<R>,
}

/// Rows for a request that waited.
#[derive(Debug)]
pub(super) struct Delivery<R> {
    pub(super) rows: Vec<Row>,
    pub(super) generation: Generation,
    pub(super) reply: oneshot::Sender<R>,
}

/// The worker's next task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Open,
    /// Lease this many rows.
    Lease(usize),
    /// Put the standby in place of the used-up file.
    Swap,
    /// Leave the rotation: the file is used up, and there is no standby.
    Retire,
    /// Wait until woken.
    Sleep,
    /// Return the remaining rows to the file and close it.
    Stop,
}

/// See the [module](self). `R` is the type that waiting requests receive.
#[derive(Debug)]
pub(super) struct Buffer<R> {
    /// `lease.rows`. 0 means strict.
    lease_rows: usize,
    /// The number of rows below which the next generation is wanted.
    low_water: u64,
    phase: Phase,
    generation: Generation,
    /// Leased rows that are not handed out.
    leased: Vec<Row>,
    waiters: VecDeque<Waiter<R>>,
    /// The number of loans: groups of rows given to requests that may still return them.
    loans: usize,
    /// The number of rows in all loans.
    on_loan: usize,
    /// Rows leased since the process started, without those that were burned or went back into the file.
    leased_total: u64,
    /// Rows that are lost: leased but not handed out, or in a file that was set aside.
    burned: u64,
    /// Whether the last file was set aside and the next one is not serving yet.
    damaged: bool,
    /// Rows in the file that are not leased.
    unused: u64,
    /// The number of rows in the next generation, if it is ready.
    standby: Option<u64>,
    leasing: Leasing,
    stopping: bool,
    is_given_back: bool,
    /// Whether the worker was woken and has not yet looked at the buffer.
    worker_told: bool,
    /// Whether the refiller was told that this generation runs out.
    refiller_told: bool,
}

impl<R> Buffer<R> {
    /// Creates the buffer of a shard at a start: `live` is the live generation and its unused rows, `standby`
    /// the number of rows in the standby.
    pub(super) fn new(
        lease_rows: usize,
        low_water: u64,
        live: Option<(Generation, u64)>,
        standby: Option<u64>,
    ) -> Self {
        let (generation, unused) = live.unwrap_or((Generation(0), 0));
        Self {
            lease_rows,
            low_water,
            phase: live.map_or(Phase::Empty, |_| Phase::Opening { swapped: false }),
            generation,
            leased: Vec::new(),
            waiters: VecDeque::new(),
            loans: 0,
            on_loan: 0,
            leased_total: 0,
            burned: 0,
            damaged: false,
            unused,
            standby,
            leasing: Leasing::Works,
            stopping: false,
            is_given_back: false,
            worker_told: false,
            refiller_told: false,
        }
    }

    /// Takes one leased row, if there is one.
    pub(super) fn pop(&mut self) -> Option<Row> {
        self.leased.pop()
    }

    /// Returns whether the worker has something to do but was not told yet.
    pub(super) fn calls_worker(&mut self) -> bool {
        let used_up = self.phase == Phase::Serving && self.left() == 0;
        let all_back = self.stopping && self.loans == 0;
        let work =
            self.is_low() || used_up || all_back || self.wants_refill() || !self.waiters.is_empty();
        let calls = work && !self.worker_told;
        self.worker_told |= calls;
        calls
    }

    /// Returns whether the next generation is wanted but the refiller was not told yet.
    pub(super) fn calls_refiller(&mut self) -> bool {
        let calls = self.wants_refill();
        self.refiller_told |= calls;
        calls
    }

    /// Takes `count` rows if they are leased.
    pub(super) fn try_take(&mut self, count: usize) -> Option<(Vec<Row>, Generation)> {
        let is_ready = !self.stopping && self.phase != Phase::Empty && self.leased.len() >= count;
        is_ready.then(|| (self.lend(count), self.generation))
    }

    /// Takes `count` rows, or up to that many if `partial` is set, or queues for them.
    pub(super) fn take(&mut self, count: usize, partial: bool) -> Take<R> {
        if let Some((rows, generation)) = self.try_take(count) {
            return Take::Rows(rows, generation);
        }
        if self.stopping || self.phase == Phase::Empty {
            return Take::Short;
        }
        let next_is_due = matches!(self.phase, Phase::Swapping | Phase::Opening { .. })
            || (self.has_standby() && self.left() == 0);
        if self.leasing != Leasing::Works || (!next_is_due && self.is_short_of(count, partial)) {
            return Take::Short;
        }
        let (reply, receiver) = oneshot::channel();
        self.waiters.push_back(Waiter { count, partial, reply });
        Take::Wait(receiver)
    }

    /// Serves waiting requests from the leased rows, turns away those that wait in vain, and returns the
    /// worker's next task.
    pub(super) fn next(&mut self, deliveries: &mut Vec<Delivery<R>>) -> Task {
        self.worker_told = false;
        if self.stopping {
            // No request waits any more, so every loan soon ends.
            return if self.loans == 0 { Task::Stop } else { Task::Sleep };
        }
        match self.phase {
            Phase::Serving => {}
            Phase::Opening { .. } => {
                self.serve(deliveries);
                return Task::Open;
            }
            Phase::Swapping => return Task::Swap,
            Phase::Empty if self.has_standby() => {
                self.phase = Phase::Swapping;
                return Task::Swap;
            }
            Phase::Empty => return Task::Sleep,
        }
        self.serve(deliveries);
        if self.unused > 0 {
            let waiting = self.waiting();
            if waiting > 0 || self.is_low() {
                // Group commit: one transaction for all waiting requests.
                return Task::Lease(self.lease_rows.max(waiting));
            }
            return Task::Sleep;
        }
        if self.loans > 0 || !self.leased.is_empty() {
            return Task::Sleep;
        }
        if self.has_standby() {
            self.phase = Phase::Swapping;
            Task::Swap
        } else {
            self.waiters.clear();
            self.phase = Phase::Empty;
            Task::Retire
        }
    }

    /// Adds the rows of a committed lease.
    pub(super) fn add_lease(&mut self, mut rows: Vec<Row>, unused: u64) {
        self.leased_total += rows.len() as u64;
        self.leased.append(&mut rows);
        self.unused = unused;
        self.leasing = Leasing::Works;
    }

    /// Turns waiting requests away, because a lease takes long or fails.
    pub(super) fn pause(&mut self, leasing: Leasing) {
        self.leasing = leasing;
        self.waiters.clear();
    }

    /// Allows requests to wait again.
    pub(super) fn retry(&mut self) {
        self.leasing = Leasing::Works;
    }

    /// Notes that the standby has replaced the used-up file.
    pub(super) fn installed(&mut self) {
        self.phase = Phase::Opening { swapped: true };
    }

    /// Notes that the file was closed after a disk fault. Rows leased from it earlier stay valid.
    pub(super) fn closed(&mut self) {
        if self.phase == Phase::Serving {
            self.phase = Phase::Opening { swapped: false };
        }
    }

    /// Returns whether a file with `unused` unused rows still has all of the committed leases.
    pub(super) fn remembers(&self, unused: u64) -> bool {
        self.phase == Phase::Opening { swapped: true } || unused <= self.unused
    }

    /// Notes that the file is open and has `unused` unused rows. Returns the number of rows that a failed
    /// lease marked as used, which are burned.
    pub(super) fn opened(&mut self, generation: Generation, unused: u64) -> u64 {
        let burned = match self.phase {
            Phase::Opening { swapped: true } => {
                self.standby = None;
                0
            }
            _ => self.unused - unused,
        };
        self.burned += burned;
        self.generation = generation;
        self.unused = unused;
        self.phase = Phase::Serving;
        self.leasing = Leasing::Works;
        self.refiller_told = false;
        self.damaged = false;
        burned
    }

    /// Notes that the content of the file is damaged. Burns the rows that were not handed out, and returns
    /// their number.
    pub(super) fn lost(&mut self) -> u64 {
        let mut burned = self.left();
        if self.phase == (Phase::Opening { swapped: true }) {
            burned += self.standby.take().unwrap_or(0);
        }
        self.burned += burned;
        self.leased_total -= self.leased.len() as u64;
        self.damaged = true;
        self.leased.clear();
        self.waiters.clear();
        self.unused = 0;
        self.generation = Generation(0);
        self.phase = Phase::Empty;
        burned
    }

    /// Notes that a standby generation is ready.
    pub(super) fn standby_ready(&mut self, rows: u64) {
        self.standby = Some(rows);
    }

    /// Notes that the `rows` rows of a loan were handed out.
    pub(super) fn loan_settled(&mut self, rows: usize) {
        self.loans -= 1;
        self.on_loan -= rows;
    }

    /// Takes back the rows of a loan. Returns how many of them are burned because their file is no longer the
    /// live one.
    pub(super) fn loan_returned(&mut self, rows: &mut Vec<Row>, generation: Generation) -> u64 {
        self.loans -= 1;
        self.on_loan -= rows.len();
        // Invariant: a row never outlives its generation.
        if generation != self.generation {
            let burned = rows.len() as u64;
            self.leased_total -= burned;
            self.burned += burned;
            return burned;
        }
        self.leased.append(rows);
        // The rows on loan made the generation look shorter than it is.
        self.refiller_told &= self.left() < self.low_water;
        0
    }

    /// Turns waiting requests away for good, because the server stops or the worker is gone.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        self.waiters.clear();
    }

    /// Takes the rows that were not handed out, at the end.
    pub(super) fn take_leased(&mut self) -> Vec<Row> {
        self.leased_total -= self.leased.len() as u64;
        std::mem::take(&mut self.leased)
    }

    /// Notes that the file was closed gracefully.
    pub(super) fn given_back(&mut self) {
        self.is_given_back = true;
    }

    /// Returns the generation whose file was closed gracefully, if it was.
    pub(super) fn closed_generation(&self) -> Option<Generation> {
        self.generation().filter(|_| self.is_given_back)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping
    }

    pub(super) fn has_standby(&self) -> bool {
        self.standby.is_some()
    }

    /// Returns the number of rows in the next generation, if it is ready.
    pub(super) fn standby(&self) -> Option<u64> {
        self.standby
    }

    /// Returns the number of rows handed out since the process started.
    pub(super) fn handed_out(&self) -> u64 {
        self.leased_total - self.leased.len() as u64 - self.on_loan as u64
    }

    /// Returns whether a new request can be served, at once or after a wait.
    pub(super) fn can_serve(&self) -> bool {
        self.leasing == Leasing::Works || !self.leased.is_empty()
    }

    /// Returns the number of rows burned since the process started.
    pub(super) fn burned(&self) -> u64 {
        self.burned
    }

    /// Returns whether the last file was set aside and the next one is not serving yet.
    pub(super) fn is_damaged(&self) -> bool {
        self.damaged
    }

    /// Notes that the start found the file damaged.
    pub(super) fn found_damaged(&mut self) {
        self.damaged = true;
    }

    pub(super) fn generation(&self) -> Option<Generation> {
        (self.generation != Generation(0)).then_some(self.generation)
    }

    /// Returns the number of rows that can still be handed out.
    pub(super) fn left(&self) -> u64 {
        self.unused + self.leased.len() as u64
    }

    /// Returns the number of rows that may still be handed out, including those on loan, which may come back,
    /// and those of the next generation.
    pub(super) fn not_handed_out(&self) -> u64 {
        self.left() + self.on_loan as u64 + self.standby.unwrap_or(0)
    }

    /// Returns the number of leased rows that are not handed out, which the next lease records in the file.
    pub(super) fn leased_rows(&self) -> Option<usize> {
        (self.lease_rows > 0).then_some(self.leased.len())
    }

    /// Returns whether at most half a lease is left, so that the worker should lease ahead of need.
    fn is_low(&self) -> bool {
        self.lease_rows > 0
            && self.unused > 0
            && self.leasing == Leasing::Works
            && self.leased.len() <= self.lease_rows / 2
    }

    fn wants_refill(&self) -> bool {
        !self.refiller_told && !self.has_standby() && self.left() < self.low_water
    }

    /// Returns whether this generation can't give `count` more rows, even if loans come back.
    fn is_short_of(&self, count: usize, partial: bool) -> bool {
        let enough = if partial { 1 } else { count as u64 };
        self.loans == 0 && self.left() < enough
    }

    fn serve(&mut self, deliveries: &mut Vec<Delivery<R>>) {
        while let Some(waiter) = self.waiters.front() {
            // Rows on loan may come back, so requests that need them wait until the loans end.
            let no_more = self.unused == 0 && self.loans == 0;
            let partial = waiter.partial && no_more;
            let count = if partial { waiter.count.min(self.leased.len()) } else { waiter.count };
            let vanished = waiter.reply.is_closed();
            let enough = count > 0 && self.leased.len() >= count;
            // If no rows are left at all, all requests may wait for the standby.
            let in_vain = no_more && !self.leased.is_empty();
            if !vanished && !enough && !in_vain {
                break;
            }
            let waiter = self.waiters.pop_front().expect("it was at the front");
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

    /// Returns the number of rows that waiting requests still need, limited to about [`LEASE_ROWS_MAX`].
    fn waiting(&self) -> usize {
        let mut needed = 0;
        for waiter in &self.waiters {
            needed += waiter.count;
            if needed > LEASE_ROWS_MAX {
                break;
            }
        }
        needed.saturating_sub(self.leased.len())
    }

    fn lend(&mut self, count: usize) -> Vec<Row> {
        self.loans += 1;
        self.on_loan += count;
        self.leased.split_off(self.leased.len() - count)
    }
}

#[cfg(test)]
mod tests;
