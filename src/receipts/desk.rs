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

/// A request to the desk.
#[derive(Debug)]
pub(super) enum Question {
    Find { key: KeyDigest, reply: oneshot::Sender<Result<Option<Receipt>, Unavailable>> },
    Save(Box<Save>),
}

/// A receipt to save, and the numbers that are handed out with it.
#[derive(Debug)]
pub(super) struct Save {
    pub(super) draft: Draft,
    pub(super) numbers: Reservation,
    /// Ends when the draft is saved or refused, even if its request is gone.
    pub(super) flight: Option<Flight>,
    pub(super) reply: oneshot::Sender<Result<Outcome, Unavailable>>,
}

/// The outcome of a request to save.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The numbers are handed out.
    Given(Given),
    /// Another instance used the key first. The numbers went back.
    Known(Box<Receipt>),
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) store: Box<dyn ReceiptStore>,
    pub(super) questions: Receiver<Question>,
    pub(super) counts: Arc<Counts>,
    pub(super) events: Arc<Events>,
    pub(super) backoff: Backoff,
    /// When to tidy the store.
    pub(super) tidy_at: Instant,
}

/// The requests of a save whose outcome is unknown. No caller gets their numbers until it is known. There may be
/// none, if the store failed in another operation.
type Undecided = Vec<Box<Save>>;

impl Desk {
    /// Handles requests until all senders are gone, then closes the store.
    pub(super) fn run(mut self) {
        self.tell();
        let mut undecided: Option<Undecided> = None;
        // When to try again to find out the outcome of the undecided save.
        let mut retry_at = Instant::now();
        let mut head_at = Instant::now() + HEAD_INTERVAL;
        loop {
            let pause = match undecided {
                Some(_) => retry_at.saturating_duration_since(Instant::now()),
                None => IDLE,
            };
            let group = match self.questions.recv_timeout(pause) {
                Ok(first) => self.group(first),
                Err(RecvTimeoutError::Timeout) => Group::default(),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let recovered = match undecided {
                Some(saves) if Instant::now() < retry_at => Err(saves),
                Some(saves) => self.recover(saves),
                None => Ok(()),
            };
            undecided = match recovered {
                Ok(()) => self.serve(group).err(),
                Err(saves) => {
                    group.refuse();
                    Some(saves)
                }
            };
            if undecided.is_some() && retry_at <= Instant::now() {
                retry_at = Instant::now() + self.backoff.next();
            }
            if head_at <= Instant::now() {
                head_at = Instant::now() + HEAD_INTERVAL;
                self.log_head();
            }
        }
        if let Some(saves) = undecided {
            let _ = self.recover(saves).map_err(burn);
        }
        self.log_head();
        if let Err(error) = self.store.close() {
            error!(%error, "the receipts were not closed cleanly; none is lost");
        }
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

    /// Serves a group. If the outcome of the save is unknown, its requests are returned.
    fn serve(&mut self, group: Group) -> Result<(), Undecided> {
        let Group { finds, saves } = group;
        if !finds.is_empty() {
            let keys: Vec<KeyDigest> = finds.iter().map(|(key, _)| *key).collect();
            match self.store.find(&keys) {
                Ok(found) => {
                    for ((_, reply), found) in finds.into_iter().zip(found) {
                        let _ = reply.send(Ok(found));
                    }
                }
                Err(error) => {
                    Group { finds, saves }.refuse();
                    return self.failed(error, Vec::new());
                }
            }
        }
        if !saves.is_empty() {
            let drafts: Vec<&Draft> = saves.iter().map(|save| &save.draft).collect();
            match self.store.save(&drafts) {
                Ok(saved) => self.finish(saves, saved),
                Err(error) => return self.failed(error, saves),
            }
        }
        self.tidy()
    }

    /// Does what is due besides saving. A failure is no reason to refuse requests, so it is tried again later.
    fn tidy(&mut self) -> Result<(), Undecided> {
        if Instant::now() < self.tidy_at {
            return Ok(());
        }
        match self.store.tidy() {
            Ok(()) => Ok(()),
            Err(error @ StoreError::Unknown(_)) => self.failed(error, Vec::new()),
            Err(StoreError::Passing(error)) => {
                warn!(%error, "the receipts can't be tidied; this is tried again in a minute");
                self.tidy_at = Instant::now() + IDLE;
                Ok(())
            }
        }
    }

    /// Hands out the numbers of saved receipts.
    fn finish(&self, saves: Undecided, saved: Vec<Saved>) {
        self.counts.worked();
        for (save, saved) in saves.into_iter().zip(saved) {
            let Save { numbers, flight, reply, draft } = *save;
            let outcome = match saved {
                Saved::New => {
                    self.counts.saved(&draft);
                    let taken = numbers.settle();
                    Outcome::Given(Given { is_short: draft.is_short, parts: taken.parts })
                }
                Saved::Known(receipt) => Outcome::Known(receipt),
            };
            // The request that waits for the same key finds the receipt.
            drop(flight);
            // If the client has gone, the receipt stays, and a request with the same key gets it.
            let _ = reply.send(Ok(outcome));
        }
        self.tell();
    }

    /// Refuses the requests of a failed save. Their numbers go back if the save surely had no effect.
    /// Otherwise they are returned, and no caller gets their numbers until the store is open again.
    fn failed(&mut self, error: StoreError, saves: Undecided) -> Result<(), Undecided> {
        if self.counts.failed(&error) {
            error!(%error, "receipts can't be saved, so requests that need one are refused");
            let message = format!("Receipts can't be saved: {error}");
            self.events.add(Kind::ReceiptsFailed, None, None, message);
        }
        match error {
            StoreError::Passing(_) => {
                saves.into_iter().for_each(|save| refuse(*save));
                Ok(())
            }
            StoreError::Unknown(_) => Err(saves),
        }
    }

    /// Opens the store again, and finds out the outcome of its last save, which had these requests.
    fn recover(&mut self, saves: Undecided) -> Result<(), Undecided> {
        let drafts: Vec<&Draft> = saves.iter().map(|save| &save.draft).collect();
        let outcomes = match self.store.recover(&drafts) {
            Ok(outcomes) => outcomes,
            Err(error) => {
                self.counts.failed(&error);
                warn!(%error, "the receipts can't be opened again yet");
                return Err(saves);
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
        Ok(())
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
    finds: Vec<(KeyDigest, oneshot::Sender<Result<Option<Receipt>, Unavailable>>)>,
    saves: Vec<Box<Save>>,
}

impl Group {
    fn refuse(self) {
        for (_, reply) in self.finds {
            let _ = reply.send(Err(Unavailable));
        }
        self.saves.into_iter().for_each(|save| refuse(*save));
    }
}

/// Refuses a request. Its numbers go back.
fn refuse(save: Save) {
    let Save { numbers, flight, reply, .. } = save;
    drop((numbers, flight));
    let _ = reply.send(Err(Unavailable));
}

/// Gives up the numbers of requests whose receipts may be saved or not.
fn burn(saves: Undecided) {
    let burned: usize = saves.into_iter().map(|save| save.numbers.settle().len()).sum();
    warn!(burned, "the last receipts may be saved or not, so their numbers are burned");
}
