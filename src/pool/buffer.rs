//! The lease buffer of one shard: the leased rows, the waiting requests, and the worker's next task. Pure: no
//! file, no task, no lock. `Slot` adds these.

use std::collections::{BTreeSet, VecDeque};

use tokio::sync::oneshot;

use crate::batch::Generation;
use crate::shard::Row;
use crate::space::Value;

/// The number of rows above which a lease includes no further waiting requests: 1 MB in memory, a few MB of
/// write-ahead log.
const LEASE_ROWS_MAX: usize = 1 << 16;

/// The blocks whose rows are marked as imported with one commit. A lease writes about ten blocks, and the sync takes
/// most of the time of both.
const IMPORT_BLOCKS_MAX: usize = 64;

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

/// The standby is about to replace the live file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SwapInProgress;

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

/// Rows of the live file that are being marked as imported.
#[derive(Debug)]
struct Import {
    /// The rows that are not marked yet, in ascending order.
    rows: Vec<Row>,
    /// Those among `rows` that were leased and that no request has or gets.
    leased: BTreeSet<Row>,
    /// The values that are marked.
    marked: Vec<Value>,
    reply: oneshot::Sender<Vec<Value>>,
}

impl Import {
    /// Takes the rows of the import out of `leased`. Returns their number.
    fn take_from(&mut self, leased: &mut Vec<Row>) -> usize {
        let before = leased.len();
        leased.retain(|row| {
            let is_imported = self.rows.binary_search(row).is_ok();
            if is_imported {
                self.leased.insert(*row);
            }
            !is_imported
        });
        before - leased.len()
    }
}

/// The worker's next task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Open,
    /// Mark rows as imported.
    Import,
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

/// The live generation at a start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live {
    pub(super) generation: Generation,
    /// The number of its rows, used and unused.
    pub(super) rows: u64,
    pub(super) unused: u64,
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
    /// The number of rows that the generation began with.
    rows: u64,
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
    /// Whether the standby is being changed, so that it can't replace the live file.
    standby_held: bool,
    import: Option<Import>,
    /// Whether the worker's last task was a part of an import, so that a lease comes first if one is due.
    import_was_last: bool,
    /// Rows of this generation that were used when they should have been marked as imported. Those that are on loan
    /// don't come back.
    conflicts: BTreeSet<Row>,
    leasing: Leasing,
    stopping: bool,
    is_given_back: bool,
    /// Whether the worker was woken and has not yet looked at the buffer.
    worker_told: bool,
    /// Whether the refiller was told that this generation runs out.
    refiller_told: bool,
}

impl<R> Buffer<R> {
    /// Creates the buffer of a shard at a start. `standby` is the number of rows in the standby.
    pub(super) fn new(
        lease_rows: usize,
        low_water: u64,
        live: Option<Live>,
        standby: Option<u64>,
    ) -> Self {
        let none = Live { generation: Generation(0), rows: 0, unused: 0 };
        let Live { generation, rows, unused } = live.unwrap_or(none);
        Self {
            lease_rows,
            low_water,
            phase: live.map_or(Phase::Empty, |_| Phase::Opening { swapped: false }),
            generation,
            rows,
            leased: Vec::new(),
            waiters: VecDeque::new(),
            loans: 0,
            on_loan: 0,
            leased_total: 0,
            burned: 0,
            damaged: false,
            unused,
            standby,
            standby_held: false,
            import: None,
            import_was_last: false,
            conflicts: BTreeSet::new(),
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
            || (self.can_swap() && self.left() == 0);
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
            Phase::Empty if self.import.is_some() => return Task::Import,
            Phase::Empty if self.can_swap() => {
                self.phase = Phase::Swapping;
                return Task::Swap;
            }
            Phase::Empty => return Task::Sleep,
        }
        self.serve(deliveries);
        let waiting = self.waiting();
        let lease_is_due = self.unused > 0 && (waiting > 0 || self.is_low());
        // A lease and a part of an import take turns, so that neither waits long for the other.
        if self.import.is_some() && !(lease_is_due && self.import_was_last) {
            self.import_was_last = true;
            return Task::Import;
        }
        self.import_was_last = false;
        if lease_is_due {
            // Group commit: one transaction for all waiting requests.
            return Task::Lease(self.lease_rows.max(waiting));
        }
        if self.unused > 0 {
            return Task::Sleep;
        }
        if self.loans > 0 || !self.leased.is_empty() {
            return Task::Sleep;
        }
        if self.can_swap() {
            self.phase = Phase::Swapping;
            Task::Swap
        } else if self.has_standby() {
            // Changing it takes longer than a lease, so requests go to other shards.
            self.waiters.clear();
            Task::Sleep
        } else {
            self.waiters.clear();
            self.phase = Phase::Empty;
            Task::Retire
        }
    }

    /// Adds the rows of a committed lease.
    pub(super) fn add_lease(&mut self, mut rows: Vec<Row>, unused: u64) {
        if let Some(import) = &mut self.import {
            import.take_from(&mut rows);
        }
        self.leased_total += rows.len() as u64;
        self.leased.append(&mut rows);
        self.unused = unused;
        self.leasing = Leasing::Works;
    }

    /// Begins to mark rows of the live file, in ascending order, as imported. No request gets them any more, unless it
    /// has them already. The receiver gets the values that were marked in the end: all others were issued, or are
    /// lost.
    pub(super) fn begin_import(&mut self, rows: Vec<Row>) -> oneshot::Receiver<Vec<Value>> {
        let (reply, receiver) = oneshot::channel();
        let mut import = Import { rows, leased: BTreeSet::new(), marked: Vec::new(), reply };
        self.leased_total -= import.take_from(&mut self.leased) as u64;
        self.import = Some(import);
        receiver
    }

    /// Returns the next rows to mark as imported, and those among them that were leased. Ends the import if there
    /// are none, or if the result is not wanted any more.
    pub(super) fn import_rows(&mut self) -> Option<(Vec<Row>, BTreeSet<Row>)> {
        let import = self.import.as_ref()?;
        if import.reply.is_closed() || import.rows.is_empty() {
            self.end_import();
            return None;
        }
        // From the end, where rows are removed without moving the others.
        let blocks = import.rows.chunk_by(|row, next| row.block() == next.block()).rev();
        let count: usize = blocks.take(IMPORT_BLOCKS_MAX).map(<[Row]>::len).sum();
        let rows = import.rows[import.rows.len() - count..].to_vec();
        let leased = rows.iter().filter(|row| import.leased.contains(row)).copied().collect();
        Some((rows, leased))
    }

    /// Notes that of the rows from [`import_rows`](Self::import_rows), the ones in `marked` are marked as imported,
    /// and that the file has `unused` unused rows.
    pub(super) fn imported(&mut self, rows: &[Row], marked: &[Row], unused: u64) {
        self.unused = unused;
        let Some(import) = &mut self.import else {
            return;
        };
        import.marked.extend(marked.iter().map(|row| row.value));
        let marked: BTreeSet<&Row> = marked.iter().collect();
        import.rows.truncate(import.rows.len().saturating_sub(rows.len()));
        for row in rows {
            if marked.contains(row) {
                import.leased.remove(row);
            } else if import.leased.contains(row) {
                // It was on loan and has come back since.
                import.rows.push(*row);
            } else {
                self.conflicts.insert(*row);
            }
        }
    }

    /// Gives an import up, because its file is closed for good. The receiver gets nothing.
    pub(super) fn drop_import(&mut self) {
        self.import = None;
    }

    /// Ends an import. Rows that were leased and are not marked can be handed out again.
    fn end_import(&mut self) {
        if let Some(Import { leased, marked, reply, .. }) = self.import.take() {
            self.leased_total += leased.len() as u64;
            self.leased.extend(leased);
            let _ = reply.send(marked);
        }
    }

    /// Keeps the standby from replacing the live file, until [`release_standby`](Self::release_standby), unless it is
    /// about to do so. Returns the number of its rows, if there is a standby.
    pub(super) fn hold_standby(&mut self) -> Result<Option<u64>, SwapInProgress> {
        match self.phase {
            Phase::Swapping | Phase::Opening { swapped: true } => Err(SwapInProgress),
            Phase::Empty | Phase::Opening { swapped: false } | Phase::Serving => {
                self.standby_held = true;
                Ok(self.standby)
            }
        }
    }

    /// Allows a standby of `rows` rows, if there is one, to replace the live file.
    pub(super) fn release_standby(&mut self, rows: Option<u64>) {
        self.standby_held = false;
        self.standby = rows;
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
                self.rows = unused;
                0
            }
            _ => self.unused - unused,
        };
        if generation != self.generation {
            self.conflicts.clear();
        }
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
        if let Some(import) = &mut self.import {
            // The file is not served again, so there is nothing more to mark.
            import.rows.clear();
            import.leased.clear();
        }
        self.leased.clear();
        self.waiters.clear();
        self.unused = 0;
        self.generation = Generation(0);
        self.rows = 0;
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
        // Invariant: a number that was on loan when it was imported is not handed out to another request.
        rows.retain(|row| !self.conflicts.contains(row));
        if let Some(import) = &mut self.import {
            self.leased_total -= import.take_from(rows) as u64;
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
        if let Some(import) = self.import.take() {
            // Its reply is dropped, so that the import counts as interrupted.
            self.leased_total += import.leased.len() as u64;
            self.leased.extend(import.leased);
        }
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

    /// Returns whether the next generation can replace the live file.
    fn can_swap(&self) -> bool {
        self.standby.is_some() && !self.standby_held
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

    /// Returns the number of rows that the live generation began with.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// Returns the number of rows that can still be handed out.
    pub(super) fn left(&self) -> u64 {
        self.unused + self.leased.len() as u64
    }

    /// Returns the number of rows that may still be handed out, including those on loan, which may come back,
    /// and those of the next generation.
    pub(super) fn not_handed_out(&self) -> u64 {
        let withdrawn = self.import.as_ref().map_or(0, |import| import.leased.len());
        self.left() + self.on_loan as u64 + withdrawn as u64 + self.standby.unwrap_or(0)
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
