//! The desk under shuttle: the real handle, flights, desk and pool, with keyed requests that vanish, and a store
//! that fails at random, in thousands of schedules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::TryRecvError;
use std::sync::{Mutex, MutexGuard};

use shuttle::future::{spawn, yield_now};
use shuttle::rand::{Rng, thread_rng};

use super::super::{Caller, Kept, Origin, ReceiptReader, Receipts, Request};
use super::*;
use crate::config::PoolName;
use crate::pool::TakeError;
use crate::pool::model::{Model, RANGE, schedules};
use crate::receipts::{Filter, Head, Summary};
use crate::space::{Space, Value};

const SCHEDULES: u64 = 3_000;
/// Fewer than requests, so that requests repeat each other.
const KEYS: u8 = 4;
const CLIENTS: usize = 3;
/// The number of requests of each client.
const REQUESTS: usize = 5;

/// A key and its numbers.
type Numbers = (KeyDigest, Vec<Value>);

/// The content of the simulated store.
#[derive(Debug, Default)]
struct Content {
    /// The keys and numbers of all receipts.
    saved: Vec<Numbers>,
    /// The requests of a save whose outcome is unknown, and whether they are saved.
    undecided: Option<(Vec<Numbers>, bool)>,
    /// Whether the store has to be opened again.
    is_closed: bool,
}

impl Content {
    fn numbers(&self, key: KeyDigest) -> Option<&Vec<Value>> {
        self.saved.iter().find(|(other, _)| *other == key).map(|(_, numbers)| numbers)
    }

    /// Fails if one of these numbers is in a receipt, or may be.
    fn assert_free(&self, values: &[Value]) {
        let undecided = self.undecided.iter().flat_map(|(requests, _)| requests);
        for (key, numbers) in self.saved.iter().chain(undecided) {
            let taken = values.iter().find(|value| numbers.contains(value));
            assert_eq!(taken, None, "it belongs to {key:?}");
        }
    }
}

/// A store that fails at random. Its content outlives it.
#[derive(Debug)]
struct FailingStore(Arc<Mutex<Content>>);

impl FailingStore {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap()
    }

    /// Fails in one of four cases.
    fn may_fail(&self) -> Result<(), StoreError> {
        let mut content = self.content();
        assert!(!content.is_closed, "the store was used before it was opened again");
        match thread_rng().gen_range(0..8) {
            0 => Err(StoreError::Passing("full".to_owned())),
            1 => {
                content.is_closed = true;
                Err(StoreError::Unknown("failed".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

impl ReceiptStore for FailingStore {
    fn find(&mut self, keys: &[KeyDigest]) -> Result<Vec<Option<Receipt>>, StoreError> {
        self.may_fail()?;
        let content = self.content();
        let receipt = |&key: &KeyDigest| content.numbers(key).map(|numbers| receipt(key, numbers));
        Ok(keys.iter().map(receipt).collect())
    }

    fn save(&mut self, drafts: &[&Draft]) -> Result<Vec<Saved>, StoreError> {
        let failed = self.may_fail().err();
        let mut content = self.content();
        let mut requests: Vec<_> = drafts.iter().map(|draft| request_of(draft)).collect();
        for (key, numbers) in &requests {
            assert_eq!(content.numbers(*key), None, "{key:?} has a receipt");
            content.assert_free(numbers);
        }
        let keys: BTreeSet<_> = requests.iter().map(|(key, _)| key.0).collect();
        assert_eq!(keys.len(), requests.len(), "a key twice in a group");
        match failed {
            None => content.saved.append(&mut requests),
            Some(StoreError::Passing(_)) => {}
            Some(StoreError::Unknown(_)) => {
                content.undecided = Some((requests, thread_rng().r#gen()));
            }
        }
        let saved = drafts.iter().map(|_| Saved::New).collect();
        failed.map_or(Ok(saved), Err)
    }

    fn recover(&mut self, drafts: &[&Draft]) -> Result<Vec<Option<Saved>>, StoreError> {
        let mut content = self.content();
        assert!(content.is_closed, "the store is open");
        if thread_rng().r#gen() {
            return Err(StoreError::Unknown("failed".to_owned()));
        }
        content.is_closed = false;
        let (mut requests, is_saved) = content.undecided.take().unwrap_or_default();
        let asked: Vec<_> = drafts.iter().map(|draft| request_of(draft)).collect();
        assert_eq!(asked, requests, "not the requests of the failed save");
        if is_saved {
            content.saved.append(&mut requests);
        }
        Ok(drafts.iter().map(|_| is_saved.then_some(Saved::New)).collect())
    }

    fn tidy(&mut self) -> Result<(), StoreError> {
        self.may_fail()
    }

    fn summary(&self) -> Option<Summary> {
        None
    }

    fn close(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}

#[derive(Debug)]
struct NoReader;

impl ReceiptReader for NoReader {
    fn page(&self, _: &Filter, _: usize) -> Result<Vec<Receipt>, StoreError> {
        unreachable!()
    }

    fn head(&self) -> Result<Head, StoreError> {
        unreachable!()
    }

    fn of_number(
        &self,
        _: &PoolName,
        _: Value,
        _: Option<&str>,
    ) -> Result<Option<Receipt>, StoreError> {
        unreachable!()
    }
}

fn request_of(draft: &Draft) -> (KeyDigest, Vec<Value>) {
    let numbers = Given::values_in(&draft.numbers).unwrap().collect();
    (draft.key.unwrap(), numbers)
}

fn origin() -> Arc<Origin> {
    let pool = PoolName::new("int").unwrap();
    Arc::new(Origin { pool, space: Space::widest(0).unwrap() })
}

fn receipt(key: KeyDigest, numbers: &[Value]) -> Receipt {
    Receipt {
        seq: 1,
        at: std::time::UNIX_EPOCH,
        origin: origin(),
        caller: Caller::default(),
        label: None,
        key: Some(key),
        given: Given { is_short: false, parts: vec![("int_shard_0.db".into(), numbers.to_vec())] },
        digest: Head::START.digest,
    }
}

/// The parts of a run that its tasks share.
struct Run {
    model: Arc<Model>,
    receipts: Receipts,
    content: Arc<Mutex<Content>>,
    responses: Mutex<BTreeMap<[u8; 16], Vec<Value>>>,
}

impl Run {
    /// Sends requests with random keys, of which some vanish.
    async fn ask(self: Arc<Self>) {
        for _ in 0..REQUESTS {
            let key = KeyDigest([thread_rng().gen_range(0..KEYS); 16]);
            let patience = thread_rng().gen_range(0..20);
            tokio::select! { biased;
                response = self.request(key) => self.check(key, response),
                () = async { for _ in 0..patience { yield_now().await } } => {}
            }
        }
    }

    /// Does the same as `POST /random` with a key, which looks it up before it has numbers or with the save.
    async fn request(&self, key: KeyDigest) -> Option<Given> {
        let mut first = self.receipts.begin(key).await;
        if thread_rng().gen_bool(0.5)
            && let Some(receipt) = self.receipts.find(&mut first).await.ok()?
        {
            return Some(receipt.given);
        }
        let numbers = self.model.reserve(thread_rng().gen_range(1..=2)).await.ok()?;
        let (origin, caller) = (origin(), Caller::default());
        let request = Request { origin, caller, label: None, is_short: false };
        match self.receipts.save(Some(first), numbers, request).await.ok()? {
            Kept::Given(given) => Some(given),
            Kept::Known(receipt) => Some(receipt.given),
        }
    }

    fn check(&self, key: KeyDigest, response: Option<Given>) {
        let Some(numbers) = response.map(|given| given.values().collect::<Vec<_>>()) else {
            return;
        };
        assert_eq!(self.content.lock().unwrap().numbers(key), Some(&numbers), "not its receipt");
        let mut responses = self.responses.lock().unwrap();
        let first = responses.entry(key.0).or_insert_with(|| numbers.clone());
        assert_eq!(*first, numbers, "{key:?} has two responses");
    }
}

/// Takes numbers without a key until there are no more.
async fn take_all(model: Arc<Model>, content: Arc<Mutex<Content>>) {
    loop {
        match model.take(1).await {
            Ok(values) => content.lock().unwrap().assert_free(&values),
            Err(TakeError::Exhausted { .. }) => break,
            Err(TakeError::Refilling) => yield_now().await,
        }
    }
}

/// Works as [`Desk::run`] does, but lets other tasks run instead of blocking its thread.
async fn work(mut desk: Desk) {
    loop {
        match desk.questions.try_recv() {
            Ok(first) => {
                let group = desk.group(first);
                desk.handle(group);
            }
            Err(TryRecvError::Empty) => desk.handle(Group::default()),
            Err(TryRecvError::Disconnected) => break,
        }
        yield_now().await;
    }
    desk.end();
}

#[test]
fn no_key_has_two_responses_and_no_number_is_lost_when_the_store_fails() {
    schedules(SCHEDULES, || {
        let content = Arc::new(Mutex::new(Content::default()));
        let model = Model::run(|model| {
            let content = Arc::clone(&content);
            async move {
                let (sender, questions) = std::sync::mpsc::channel();
                let (counts, events) = Default::default();
                let store = Box::new(FailingStore(Arc::clone(&content)));
                let backoff = Backoff::new(Duration::ZERO, Duration::ZERO);
                let desk = Desk::new(store, questions, Arc::clone(&counts), events, backoff);
                let (flights, reader) = (Arc::default(), Arc::new(NoReader));
                let receipts = Receipts { questions: sender, flights, counts, reader };
                let desk = spawn(work(desk));
                let taker = spawn(take_all(Arc::clone(&model), Arc::clone(&content)));
                let responses = Mutex::default();
                let run = Arc::new(Run { model, receipts, content, responses });
                let clients: Vec<_> = (0..CLIENTS).map(|_| spawn(Arc::clone(&run).ask())).collect();
                for client in clients {
                    client.await.unwrap();
                }
                let counts = run.receipts.counts();
                assert_eq!(counts.figures().waiting, 0);
                drop(run);
                desk.await.unwrap();
                taker.await.unwrap();
            }
        });
        let content = content.lock().unwrap();
        content.saved.iter().for_each(|(_, numbers)| model.hand_out(numbers));
        // The desk gave up the numbers whose outcome it could not find out.
        let undecided = content.undecided.iter().flat_map(|(requests, _)| requests);
        undecided.for_each(|(_, numbers)| model.hand_out(numbers));
        assert_eq!(model.handed_out(), RANGE as usize, "numbers are lost");
    });
}

#[test]
fn the_desk_ends_when_its_handle_is_dropped() {
    let store = Box::new(FailingStore(Arc::default()));
    let backoff = Backoff::new(Duration::ZERO, Duration::ZERO);
    let (receipts, desk) = Receipts::new(store, Arc::new(NoReader), Arc::default(), backoff);
    let desk = std::thread::spawn(desk);
    drop(receipts);
    desk.join().unwrap();
}
