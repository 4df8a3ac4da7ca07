//! How requests take numbers: one from the buffer of a random shard, or several, from one shard or all of
//! them. Knows nothing of files or of how shards are filled.

use std::num::NonZeroU32;
use std::sync::Arc;

use rand::seq::{IndexedRandom, SliceRandom};

use super::buffer::Buffer;
use super::slot::{Loan, Slot};
use super::sync::{self, Ordering};
use super::{Collected, Pool};
use crate::space::Value;

/// The reason that a request got no numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// No shard in rotation has enough numbers, but the refiller will provide them.
    #[error("no shard in rotation has enough numbers")]
    Refilling,
    /// The range does not have enough numbers and never will.
    #[error("{left} numbers are left")]
    Exhausted {
        /// The number of numbers that are left, which is less than the request's count.
        left: u64,
    },
}

/// Numbers for one request. They are durably marked as used, and no other request gets them.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// The values, grouped by the name of the shard that they came from.
    pub parts: Vec<(Arc<str>, Vec<Value>)>,
}

/// Numbers that a request holds but has not handed out. They are durably marked as used. If this is dropped,
/// they go back: to their shards, or to the next request if their shards gave them up.
#[derive(Debug)]
pub(crate) struct Reservation {
    pool: Arc<Pool>,
    /// Numbers that their shards gave up for good, grouped by the name of the shard.
    collected: Vec<(Arc<str>, Vec<Value>)>,
    loans: Vec<Loan>,
}

impl Reservation {
    /// Returns the numbers, grouped by the name of the shard that they came from. [`settle`](Self::settle)
    /// returns the same.
    pub(crate) fn parts(&self) -> Vec<(Arc<str>, Vec<Value>)> {
        let mut parts = self.collected.clone();
        self.loans.iter().for_each(|loan| add(&mut parts, loan.part()));
        parts
    }

    /// Hands out the numbers.
    pub(crate) fn settle(mut self) -> Taken {
        let mut parts = std::mem::take(&mut self.collected);
        if !parts.is_empty() {
            self.pool.collected().held -= count(&parts) as u64;
        }
        for loan in std::mem::take(&mut self.loans) {
            add(&mut parts, loan.settle());
        }
        Taken { parts }
    }

    /// Takes the numbers from their shards for good, so that no shard waits until they are handed out or come
    /// back.
    pub(crate) fn withhold(&mut self) {
        let loans = std::mem::take(&mut self.loans);
        self.collect(loans);
    }

    fn len(&self) -> usize {
        count(&self.collected) + self.loans.iter().map(Loan::len).sum::<usize>()
    }

    fn collect(&mut self, loans: Vec<Loan>) {
        for loan in loans {
            // Invariant: counted as held before the shard stops counting them as on loan.
            self.pool.collected().held += loan.len() as u64;
            add(&mut self.collected, loan.settle());
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.collected.is_empty() {
            return;
        }
        let mut collected = self.pool.collected();
        for (shard, values) in std::mem::take(&mut self.collected) {
            collected.held -= values.len() as u64;
            let orphans = values.into_iter().filter(|value| !collected.withdrawn.contains(value));
            let orphans: Vec<_> = orphans.map(|value| (Arc::clone(&shard), value)).collect();
            collected.orphans.extend(orphans);
        }
        self.pool.note_orphans(&collected);
    }
}

fn count(parts: &[(Arc<str>, Vec<Value>)]) -> usize {
    parts.iter().map(|(_, values)| values.len()).sum()
}

/// Adds the numbers of a shard to those that are grouped by shards.
fn add(parts: &mut Vec<(Arc<str>, Vec<Value>)>, (shard, mut values): (Arc<str>, Vec<Value>)) {
    match parts.iter_mut().find(|(other, _)| *other == shard) {
        Some((_, others)) => others.append(&mut values),
        None => parts.push((shard, values)),
    }
}

impl Taken {
    /// Returns the number of numbers.
    pub(crate) fn len(&self) -> usize {
        count(&self.parts)
    }
}

impl Pool {
    /// Takes one number if a random shard in rotation has one ready. This is the common case, which never
    /// waits.
    pub fn try_take_one(&self) -> Option<(&str, Value)> {
        if self.has_orphans.load(Ordering::Relaxed) {
            return None;
        }
        let slot = self.random_slot()?;
        slot.pop().map(|value| (&*slot.name, value))
    }

    /// Takes `count` numbers from one random shard in rotation, and from others if it does not have enough.
    /// Takes either all or none.
    ///
    /// # Errors
    /// Returns [`TakeError`]. Nothing is taken then, nor if the returned future is dropped.
    pub async fn take(self: &Arc<Self>, count: NonZeroU32) -> Result<Taken, TakeError> {
        self.reserve(count).await.map(Reservation::settle)
    }

    /// Reserves `count` numbers if a random shard in rotation has them ready.
    pub(crate) fn try_reserve(self: &Arc<Self>, count: NonZeroU32) -> Option<Reservation> {
        if self.has_orphans.load(Ordering::Relaxed) {
            return None;
        }
        let loan = self.random_slot()?.try_take(count.get() as usize)?;
        Some(self.reservation(vec![loan]))
    }

    /// Reserves `count` numbers as [`take`](Self::take) takes them.
    ///
    /// # Errors
    /// Returns [`TakeError`]. Nothing is reserved then, nor if the returned future is dropped.
    pub(crate) async fn reserve(
        self: &Arc<Self>,
        count: NonZeroU32,
    ) -> Result<Reservation, TakeError> {
        let count = count.get() as usize;
        if self.has_orphans.load(Ordering::Acquire) {
            return self.gather(count, &self.random_order()).await;
        }
        // The common case: one shard has all of them.
        if let Some(slot) = self.random_slot()
            && let Some(loan) = slot.take(count, false).await
        {
            return Ok(self.reservation(vec![loan]));
        }
        let order = self.random_order();
        if count > 1 {
            return self.gather(count, &order).await;
        }
        // A request for one number holds nothing while it waits, so it does not need the lock.
        for slot in order {
            if let Some(loan) = slot.take(1, false).await {
                return Ok(self.reservation(vec![loan]));
            }
        }
        Err(self.turn_away(1))
    }

    /// Collects from all shards in turn. A shard with fewer numbers than any request wants would never be
    /// used up. So if its next generation is ready, its remaining numbers are taken for good, and the shard
    /// is asked again.
    async fn gather(
        self: &Arc<Self>,
        count: usize,
        order: &[&Arc<Slot>],
    ) -> Result<Reservation, TakeError> {
        let _alone = self.gather.lock().await;
        let mut found = self.reservation(Vec::new());
        found.collected = self.take_orphans(count);
        for _pass in 0..2 {
            for slot in order {
                let missing = count - found.len();
                // A shard keeps its generation while rows of it are on loan, so waiting for its next one here
                // would never end.
                let lent = found.loans.iter().any(|loan| loan.is_of(slot));
                if missing > 0
                    && !lent
                    && let Some(loan) = slot.take(missing, true).await
                {
                    found.loans.push(loan);
                }
            }
            if found.len() == count {
                return Ok(found);
            }
            let (ending, lasting) =
                std::mem::take(&mut found.loans).into_iter().partition(Loan::can_end_generation);
            found.collect(ending);
            found.loans = lasting;
        }
        // All or none: the loans go back to their shards, and the collected numbers go to the next request.
        drop(found);
        Err(self.turn_away(count as u64))
    }

    fn reservation(self: &Arc<Self>, loans: Vec<Loan>) -> Reservation {
        Reservation { pool: Arc::clone(self), collected: Vec::new(), loans }
    }

    /// Notes whether there are orphans, so that requests don't lock them to see.
    pub(super) fn note_orphans(&self, collected: &Collected) {
        self.has_orphans.store(!collected.orphans.is_empty(), Ordering::Release);
    }

    /// Takes up to `count` numbers that an earlier request collected but did not hand out.
    fn take_orphans(&self, count: usize) -> Vec<(Arc<str>, Vec<Value>)> {
        if !self.has_orphans.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut collected = self.collected();
        let keep = collected.orphans.len().saturating_sub(count);
        let mut taken = collected.orphans.split_off(keep);
        collected.held += taken.len() as u64;
        self.note_orphans(&collected);
        drop(collected);
        taken.sort_unstable_by(|(shard, _), (other, _)| shard.cmp(other));
        taken
            .chunk_by(|(shard, _), (next, _)| shard == next)
            .map(|part| (Arc::clone(&part[0].0), part.iter().map(|&(_, value)| value).collect()))
            .collect()
    }

    /// Returns a random shard in rotation.
    fn random_slot(&self) -> Option<&Arc<Slot>> {
        let rotation = self.rotation.load();
        let position = rotation.choose(&mut sync::rng())?;
        Some(&self.slots[*position])
    }

    /// Returns the shards in rotation in random order, followed by the others, which may be about to return.
    fn random_order(&self) -> Vec<&Arc<Slot>> {
        let rotation = self.rotation.load();
        let mut order: Vec<_> = rotation.iter().map(|&position| &self.slots[position]).collect();
        order.shuffle(&mut sync::rng());
        let mut is_other = vec![true; self.slots.len()];
        rotation.iter().for_each(|&position| is_other[position] = false);
        order.extend(
            self.slots.iter().zip(is_other).filter_map(|(slot, other)| other.then_some(slot)),
        );
        order
    }

    /// Returns the reason that `count` numbers could not be taken, and asks the refiller for more.
    fn turn_away(&self, count: u64) -> TakeError {
        let why = self.nothing_left(count);
        if why == TakeError::Refilling {
            self.starved.store(true, Ordering::Release);
            self.refill_wanted.notify_one();
        }
        why
    }

    /// Returns the reason that `count` numbers could not be taken.
    pub(super) fn nothing_left(&self, count: u64) -> TakeError {
        // Invariant: read before the shards. The last generation is ready before the range counts as
        // exhausted.
        if !self.exhausted.load(Ordering::Acquire) {
            return TakeError::Refilling;
        }
        // Invariant: rows that requests hold count as left. They come back if their request is dropped or
        // fails. A row that its shard just gave up may be counted twice, but is never missed.
        let in_shards: u64 = self.slots.iter().map(|slot| slot.look(Buffer::not_handed_out)).sum();
        let left = in_shards + self.collected().not_handed_out();
        // If enough numbers are left, they are in a shard that fails at the moment.
        if left < count { TakeError::Exhausted { left } } else { TakeError::Refilling }
    }
}
