//! The thread that owns the store of receipts: looks up keys and saves receipts, for all requests that wait, with
//! one commit. Knows nothing of HTTP, and nothing of the store but its trait.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::flights::Flight;
use super::record::{Draft, Given, KeyDigest, Receipt};
use super::store::{ReceiptStore, Saved, StoreError};
use super::{Counts, Unavailable};
use crate::backoff::Backoff;
use crate::events::{Events, Kind};
use crate::pool::Reservation;

/// The most requests that share one commit.
const GROUP_MAX: usize = 1024;

/// The most numbers that share one commit, besides those of the last request: some MB of log.
const GROUP_NUMBERS: usize = 1 << 17;

/// The pause between two rounds without requests.
const IDLE: Duration = Duration::from_secs(60);

/// The interval at which the head of the chain is logged.
const HEAD_INTERVAL: Duration = Duration::from_secs(3_600);

/// The receipt of a key, if it has one.
type Found = Result<Option<Receipt>, Unavailable>;

/// A request to the desk.
#[derive(Debug)]
pub(super) enum Question {
    Find { key: KeyDigest, reply: oneshot::Sender<Found> },
    Save(Box<Save>),
}

/// A receipt to save, and the numbers that are handed out with it.
#[derive(Debug)]
pub(super) struct Save {
    pub(super) draft: Draft,
    pub(super) numbers: Reservation,
    /// `None` once the request got a response, although the outcome of its save is unknown.
    pub(super) waiter: Option<Waiter>,
    /// Whether the key may have a receipt.
    pub(super) looks_up: bool,
}

/// The request that waits for a save.
#[derive(Debug)]
pub(super) struct Waiter {
    /// Ends with the request, even if its client is gone.
    pub(super) flight: Option<Flight>,
    pub(super) reply: oneshot::Sender<Result<Outcome, Unavailable>>,
}

impl Waiter {
    fn respond(self, outcome: Result<Outcome, Unavailable>) {
        // A repetition that waits for this request may begin.
        drop(self.flight);
        // If the client has gone, the receipt stays, and a request with the same key gets it.
        let _ = self.reply.send(outcome);
    }

    fn refuse(self) {
        self.respond(Err(Unavailable));
    }
}

/// The outcome of a request to save.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The numbers are handed out.
    Given(Given),
    /// The key has this receipt. The numbers went back.
    Known(Box<Receipt>),
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Desk {
    store: Box<dyn ReceiptStore>,
    questions: Receiver<Question>,
    counts: Arc<Counts>,
    events: Arc<Events>,
    backoff: Backoff,
    /// Set while the store is closed, because the outcome of an operation is unknown.
    closed: Option<Closed>,
    /// When to tidy the store.
    tidy_at: Instant,
    /// When to log the head of the chain.
    head_at: Instant,
}

/// A closed store, which the desk opens again.
#[derive(Debug)]
struct Closed {
    /// The requests of the last save, if its outcome is unknown. No caller gets their numbers until it is known.
    undecided: Saves,
    retry_at: Instant,
}

type Saves = Vec<Box<Save>>;

impl Desk {
    pub(super) fn new(
        store: Box<dyn ReceiptStore>,
        questions: Receiver<Question>,
        counts: Arc<Counts>,
        events: Arc<Events>,
        backoff: Backoff,
    ) -> Self {
        let (tidy_at, head_at) = (Instant::now(), Instant::now() + HEAD_INTERVAL);
        Self { store, questions, counts, events, backoff, closed: None, tidy_at, head_at }
    }

    /// Handles requests until all senders are gone, then closes the store.
    pub(super) fn run(mut self) {
        loop {
            let group = match self.questions.recv_timeout(self.pause()) {
                Ok(first) => self.group(first),
                Err(RecvTimeoutError::Timeout) => Group::default(),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            self.handle(group);
        }
        self.end();
    }

    /// Returns how long to wait for requests.
    fn pause(&self) -> Duration {
        let closed = self.closed.as_ref();
        closed.map_or(IDLE, |closed| closed.retry_at.saturating_duration_since(Instant::now()))
    }

    /// Adds the requests that wait already to the first one.
    fn group(&self, first: Question) -> Group {
        let mut group = Group::default();
        let mut numbers = 0;
        let mut next = Some(first);
        while let Some(question) = next {
            match question {
                Question::Find { key, reply } => group.finds.push((key, reply)),
                Question::Save(save) => {
                    numbers += save.draft.count;
                    group.saves.push(save);
                }
            }
            let full =
                group.finds.len() + group.saves.len() >= GROUP_MAX || numbers >= GROUP_NUMBERS;
            next = if full { None } else { self.questions.try_recv().ok() };
        }
        group
    }

    /// Opens the store again if it is closed, and serves a group.
    fn handle(&mut self, group: Group) {
        if let Some(closed) = self.closed.take_if(|closed| closed.retry_at <= Instant::now()) {
            self.recover(closed.undecided);
        }
        if self.closed.is_some() {
            return group.refuse();
        }
        self.serve(group);
        if self.head_at <= Instant::now() {
            self.head_at = Instant::now() + HEAD_INTERVAL;
            self.log_head();
        }
    }

    fn serve(&mut self, group: Group) {
        let saves = match self.look_up(group) {
            Ok(saves) => saves,
            Err(error) => return self.failed(&error, Vec::new()),
        };
        if !saves.is_empty() {
            match self.store.save(&drafts(&saves)) {
                Ok(saved) => self.finish(saves, saved),
                Err(error) => return self.failed(&error, saves),
            }
        }
        self.tidy();
    }

    /// Looks up the keys of a group. Returns the requests that have to be saved, because their keys have no
    /// receipts.
    fn look_up(&mut self, group: Group) -> Result<Saves, StoreError> {
        let keys: Vec<KeyDigest> = group.keys().collect();
        if keys.is_empty() {
            return Ok(group.saves);
        }
        let found = match self.store.find(&keys) {
            Ok(found) => found,
            Err(error) => {
                group.refuse();
                return Err(error);
            }
        };
        let mut found = found.into_iter();
        for (_, reply) in group.finds {
            let _ = reply.send(Ok(found.next().flatten()));
        }
        let mut new = Vec::with_capacity(group.saves.len());
        for save in group.saves {
            let receipt = if save.looks_up { found.next().flatten() } else { None };
            match receipt {
                Some(receipt) => known(*save, receipt),
                None => new.push(save),
            }
        }
        Ok(new)
    }

    /// Does what is due besides saving. A failure is no reason to refuse requests, so it is tried again later.
    fn tidy(&mut self) {
        if Instant::now() < self.tidy_at {
            return;
        }
        match self.store.tidy() {
            Ok(()) => {}
            Err(error @ StoreError::Unknown(_)) => self.failed(&error, Vec::new()),
            Err(StoreError::Passing(error)) => {
                warn!(%error, "the receipts can't be tidied; this is tried again in a minute");
                self.tidy_at = Instant::now() + IDLE;
            }
        }
    }

    /// Hands out the numbers of saved receipts.
    fn finish(&self, saves: Saves, saved: Vec<Saved>) {
        self.counts.worked();
        for (save, saved) in saves.into_iter().zip(saved) {
            let Save { draft, numbers, waiter, .. } = *save;
            let outcome = match saved {
                Saved::New => {
                    self.counts.saved(&draft);
                    let taken = numbers.settle();
                    Outcome::Given(Given { is_short: draft.is_short, parts: taken.parts })
                }
                Saved::Known(receipt) => Outcome::Known(receipt),
            };
            if let Some(waiter) = waiter {
                waiter.respond(Ok(outcome));
            }
        }
        self.tell();
    }

    /// Refuses the requests of a failed save, if there was one. Their numbers go back if the save surely had no
    /// effect. Otherwise the requests wait until the store is open again.
    fn failed(&mut self, error: &StoreError, saves: Saves) {
        if self.counts.failed(error) {
            error!(%error, "receipts can't be saved, so requests that need one are refused");
            let message = format!("Receipts can't be saved: {error}");
            self.events.add(Kind::ReceiptsFailed, None, None, message);
        }
        match error {
            StoreError::Passing(_) => saves.into_iter().for_each(|save| refuse(*save)),
            StoreError::Unknown(_) => {
                self.closed = Some(Closed { undecided: saves, retry_at: Instant::now() });
            }
        }
    }

    /// Opens the store again, and finds out the outcome of its last save, which had these requests.
    fn recover(&mut self, mut saves: Saves) {
        let outcomes = match self.store.recover(&drafts(&saves)) {
            Ok(outcomes) => outcomes,
            Err(error) => {
                self.counts.failed(&error);
                warn!(%error, "the receipts can't be opened again yet");
                // This may last, and no request must wait for it.
                for save in &mut saves {
                    save.numbers.withhold();
                    if let Some(waiter) = save.waiter.take() {
                        waiter.refuse();
                    }
                }
                let retry_at = Instant::now() + self.backoff.next();
                self.closed = Some(Closed { undecided: saves, retry_at });
                return;
            }
        };
        let saved = outcomes.iter().filter(|outcome| outcome.is_some()).count();
        info!(saved, refused = saves.len() - saved, "the receipts are open again");
        for (save, outcome) in saves.into_iter().zip(outcomes) {
            match outcome {
                Some(saved) => self.finish(vec![save], vec![saved]),
                None => refuse(*save),
            }
        }
        self.counts.worked();
        self.backoff.reset();
        self.tell();
    }

    /// Closes the store.
    fn end(mut self) {
        if let Some(closed) = self.closed.take() {
            self.recover(closed.undecided);
        }
        if let Some(closed) = self.closed.take() {
            burn(closed.undecided);
        }
        self.log_head();
        if let Err(error) = self.store.close() {
            error!(%error, "the receipts were not closed cleanly; none is lost");
        }
    }

    fn tell(&self) {
        self.counts.tell(self.store.summary());
    }

    fn log_head(&self) {
        if let Some(summary) = self.store.summary() {
            let head = summary.head;
            info!(seq = head.seq, digest = hex::encode(head.digest), "the head of the receipts");
        }
    }
}

/// Requests that are served together.
#[derive(Default)]
struct Group {
    finds: Vec<(KeyDigest, oneshot::Sender<Found>)>,
    saves: Saves,
}

impl Group {
    /// Returns the keys to look up: those of `finds`, then those of `saves`.
    fn keys(&self) -> impl Iterator<Item = KeyDigest> {
        let saves = self.saves.iter().filter(|save| save.looks_up);
        let saves = saves.filter_map(|save| save.draft.key);
        self.finds.iter().map(|(key, _)| *key).chain(saves)
    }

    fn refuse(self) {
        for (_, reply) in self.finds {
            let _ = reply.send(Err(Unavailable));
        }
        self.saves.into_iter().for_each(|save| refuse(*save));
    }
}

/// Gives a request the receipt that its key has. Its numbers go back.
fn known(save: Save, receipt: Receipt) {
    drop(save.numbers);
    if let Some(waiter) = save.waiter {
        waiter.respond(Ok(Outcome::Known(Box::new(receipt))));
    }
}

/// Refuses a request. Its numbers go back.
fn refuse(save: Save) {
    drop(save.numbers);
    if let Some(waiter) = save.waiter {
        waiter.refuse();
    }
}

/// Gives up the numbers of requests whose receipts may be saved or not.
fn burn(saves: Saves) {
    let burned: usize = saves.into_iter().map(|save| save.numbers.settle().len()).sum();
    if burned == 0 {
        return;
    }
    warn!(burned, "the last receipts may be saved or not, so their numbers are burned");
}

fn drafts(saves: &[Box<Save>]) -> Vec<&Draft> {
    saves.iter().map(|save| &save.draft).collect()
}

#[cfg(test)]
mod tests;
