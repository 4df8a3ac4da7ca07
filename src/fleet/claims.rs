//! Claims partitions: one instance creates a partition's entry in the store, once, and never gives it back.
//! Knows nothing of what is drawn from them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rand::seq::SliceRandom;
use tokio::sync::Notify;
use uuid::Uuid;

use super::keys::Keys;
use super::protocol::Fence;
use super::store::{Store, StoreError};
use crate::config::PoolName;
use crate::ledger::PARTITIONS;

/// The partitions of one pool, as one instance claims them.
#[derive(Clone, Debug)]
pub struct Claims {
    store: Arc<Store>,
    keys: Keys,
    pool: PoolName,
    instance: Uuid,
    /// Partitions claimed at a time.
    claim: usize,
    held: Arc<Held>,
    /// Whether instances were found to hold all partitions.
    none_left: bool,
}

/// Partitions of one pool, in figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Partitions {
    /// Partitions that this instance holds.
    pub held: usize,
    /// Partitions that no instance held when the store was last read.
    pub unclaimed: usize,
}

impl Partitions {
    /// Returns how many of `numbers` are in the partitions that this instance holds or may claim, on average.
    #[must_use]
    pub fn share_of(self, numbers: u64) -> u64 {
        let share = u128::from(numbers) * (self.held + self.unclaimed) as u128 / PARTITIONS as u128;
        u64::try_from(share).unwrap_or(numbers)
    }
}

/// An instance's knowledge of the store: the space that it joined, and the partitions that it holds and may
/// have drawn in.
///
/// A store that was restored from a copy is detected by a step of the fence that it has forgotten. A store
/// that was restored between a claim and the next step has forgotten no step, so that step ends with a check
/// of the claims. A store that came back empty before the first step has forgotten no step either, and the
/// space may have been created again with another secret, so each claim and each check compares the records
/// too.
#[derive(Debug, Default)]
pub(super) struct Held {
    told: Mutex<Told>,
    /// Steps of the fence that were made.
    steps: AtomicU64,
    /// Wakes the gatekeeper, which decides whether this is still the same store.
    doubt: Notify,
}

#[derive(Debug, Default)]
struct Told {
    /// The records of the space and of each pool by their keys, as they were when this instance joined.
    records: BTreeMap<String, String>,
    partitions: BTreeMap<PoolName, BTreeSet<u16>>,
    /// For each pool, how many partitions no instance held at the last listing.
    unclaimed: BTreeMap<PoolName, usize>,
    /// Whether partitions were noted since the last step began.
    is_new: bool,
}

impl Held {
    /// Sets how many steps of the fence were made before this process.
    pub(super) fn begin_after(&self, steps: u64) {
        self.steps.store(steps, Ordering::Release);
    }

    /// Counts a step that was made.
    pub(super) fn stepped(&self) {
        self.steps.fetch_add(1, Ordering::AcqRel);
    }

    /// Notes a record of the space that was joined.
    pub(super) fn note_record(&self, key: String, record: String) {
        self.told().records.insert(key, record);
    }

    /// Returns the records that the store must have for a claim of this pool.
    pub(super) fn records(&self, keys: &Keys, pool: &PoolName) -> Vec<(String, String)> {
        let told = self.told();
        let of_pool = [keys.space(), keys.pool(pool)];
        of_pool.into_iter().filter_map(|key| told.records.get_key_value(&key)).map(owned).collect()
    }

    fn note(&self, pool: &PoolName, holdings: &Holdings) {
        let mut told = self.told();
        told.partitions.entry(pool.clone()).or_default().extend(&holdings.ours);
        told.unclaimed.insert(pool.clone(), holdings.unclaimed());
        told.is_new = true;
    }

    /// Returns how many of these partitions are not noted yet.
    fn unnoted(&self, pool: &PoolName, partitions: &[u16]) -> usize {
        let told = self.told();
        let is_noted = |partition: &u16| {
            told.partitions.get(pool).is_some_and(|held| held.contains(partition))
        };
        partitions.iter().filter(|&partition| !is_noted(partition)).count()
    }

    /// Returns whether partitions were noted since the last call.
    pub(super) fn take_new(&self) -> bool {
        std::mem::take(&mut self.told().is_new)
    }

    /// Returns whether the store has the records of the space that was joined.
    pub(super) async fn is_same_space(&self, store: &Store) -> Result<bool, StoreError> {
        let records = self.told().records.clone();
        for (key, record) in records {
            if store.get(&key).await? != Some(record) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns whether the store still has the partitions and records that were noted.
    pub(super) async fn is_there(
        &self,
        store: &Store,
        keys: &Keys,
        instance: Uuid,
    ) -> Result<bool, StoreError> {
        let pools = self.told().partitions.clone();
        for (pool, partitions) in pools {
            let found = holdings(store, keys, &pool, instance).await?;
            self.told().unclaimed.insert(pool, found.unclaimed());
            if !partitions.is_subset(&found.ours.into_iter().collect()) {
                return Ok(false);
            }
        }
        self.is_same_space(store).await
    }

    /// Makes the gatekeeper check the store at once.
    fn doubt(&self) {
        self.doubt.notify_one();
    }

    /// Waits until the gatekeeper should check the store.
    pub(super) async fn doubted(&self) {
        self.doubt.notified().await;
    }

    /// Returns the partitions of a pool in figures.
    pub(super) fn figures(&self, pool: &PoolName) -> Partitions {
        let told = self.told();
        Partitions {
            held: told.partitions.get(pool).map_or(0, BTreeSet::len),
            unclaimed: told.unclaimed.get(pool).copied().unwrap_or(0),
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().expect("nothing panics with it")
    }
}

fn owned((key, record): (&String, &String)) -> (String, String) {
    (key.clone(), record.clone())
}

/// The claimed partitions of a pool.
pub(super) struct Holdings {
    pub(super) ours: Vec<u16>,
    pub(super) others: BTreeSet<u16>,
}

impl Holdings {
    fn unclaimed(&self) -> usize {
        PARTITIONS - self.ours.len() - self.others.len()
    }
}

impl Claims {
    pub(super) fn new(
        store: Arc<Store>,
        keys: Keys,
        pool: PoolName,
        instance: Uuid,
        claim: usize,
        held: Arc<Held>,
    ) -> Self {
        Self { store, keys, pool, instance, claim, held, none_left: false }
    }

    /// Returns whether no partition is left to claim. That never changes back.
    #[must_use]
    pub fn none_left(&self) -> bool {
        self.none_left
    }

    /// Claims at least `wanted` more partitions, if that many are left. Returns all that this instance then
    /// holds, including those of earlier tries that seemed to fail.
    ///
    /// # Errors
    /// [`StoreError`]; the next try finds what was claimed.
    pub async fn claim(&mut self, wanted: usize) -> Result<Vec<u16>, StoreError> {
        // A restored store may have forgotten claims, and a store that came back empty may have another
        // secret: nothing is claimed in either.
        let steps = self.held.steps.load(Ordering::Acquire);
        let fence = self.store.get(&self.keys.fence(self.instance)).await?;
        let found = fence.and_then(|fence| serde_json::from_str::<Fence>(&fence).ok());
        let has_forgotten = found.map_or(0, |fence| fence.step) < steps;
        if has_forgotten || !self.held.is_same_space(&self.store).await? {
            self.held.doubt();
            return Err(self
                .store
                .error("it has forgotten steps or records that this instance knows of"));
        }
        let before = self.holdings().await?;
        // Partitions that an earlier try claimed, although its response was lost.
        let unnoted = self.held.unnoted(&self.pool, &before.ours);
        let wanted = wanted.saturating_sub(unnoted).div_ceil(self.claim) * self.claim;
        let mut free: Vec<u16> = (0..PARTITIONS as u16)
            .filter(|partition| {
                !before.others.contains(partition) && !before.ours.contains(partition)
            })
            .collect();
        let (chosen, _) = free.partial_shuffle(&mut rand::rng(), wanted);
        self.none_left = chosen.is_empty() && unnoted == 0;
        if !chosen.is_empty() {
            self.create(chosen).await?;
        }
        self.listed().await
    }

    /// Notes and returns all partitions that this instance holds, so that they can be drawn in.
    pub(super) async fn listed(&self) -> Result<Vec<u16>, StoreError> {
        let holdings = self.holdings().await?;
        self.held.note(&self.pool, &holdings);
        Ok(holdings.ours)
    }

    /// Claims these partitions if the space is still the one that was joined. [`holdings`](Self::holdings)
    /// tells whether this or another instance then holds them.
    pub(super) async fn create(&self, partitions: &[u16]) -> Result<(), StoreError> {
        let entry = |&partition: &u16| {
            (self.keys.partition(&self.pool, partition), self.instance.to_string())
        };
        let entries: Vec<_> = partitions.iter().map(entry).collect();
        let records = self.held.records(&self.keys, &self.pool);
        self.store.create_where(&records, &entries).await.map(drop)
    }

    /// Returns the claimed partitions.
    pub(super) async fn holdings(&self) -> Result<Holdings, StoreError> {
        holdings(&self.store, &self.keys, &self.pool, self.instance).await
    }
}

async fn holdings(
    store: &Store,
    keys: &Keys,
    pool: &PoolName,
    instance: Uuid,
) -> Result<Holdings, StoreError> {
    let prefix = keys.partitions(pool);
    let mut holdings = Holdings { ours: Vec::new(), others: BTreeSet::new() };
    for (key, holder) in store.list(&prefix).await? {
        let Some(partition) = key.strip_prefix(&prefix).and_then(|number| number.parse().ok())
        else {
            continue;
        };
        if holder == instance.to_string() {
            holdings.ours.push(partition);
        } else {
            holdings.others.insert(partition);
        }
    }
    Ok(holdings)
}
