//! The space that an instance has joined: its entries in the store, and which of them the instance relies on.
//! Knows nothing of leases, and nothing of what is drawn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use uuid::Uuid;

use super::FleetError;
use super::keys::SpaceKeys;
use super::protocol::Fence;
use super::protocol::Lost;
use super::store::{FleetStore, FleetStoreError};
use crate::config::PoolName;
use crate::ledger::PARTITIONS;

/// A fence that can't be parsed. Its writer has taken the instance's place.
const FOREIGN_FENCE: Fence = Fence { step: u64::MAX, token: Uuid::nil() };

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
    pub fn share_of(self, numbers: u64) -> u64 {
        let share = u128::from(numbers) * (self.held + self.unclaimed) as u128 / PARTITIONS as u128;
        u64::try_from(share).unwrap_or(numbers)
    }
}

/// The space in the store, and the entries that this instance relies on: the records of the space and its
/// pools, and the partitions that the instance holds and may have drawn in.
///
/// A store that was restored from a copy is detected by a step of the fence that it has forgotten. A store
/// that was restored between a claim and the next step has forgotten no step, so that step ends with a check
/// of the claims. A store that came back empty before the first step has forgotten no step either, and the
/// space may have been created again with another secret, so each claim and each check compares the records
/// too.
#[derive(Debug)]
pub(super) struct JoinedSpace {
    pub(super) store: Arc<dyn FleetStore>,
    pub(super) keys: SpaceKeys,
    entries: Mutex<KnownEntries>,
    /// Steps of the fence that were made.
    steps: AtomicU64,
    /// Wakes the gatekeeper, which decides whether this is still the same store.
    doubt: Notify,
}

#[derive(Debug, Default)]
struct KnownEntries {
    /// The records of the space and of each pool by their keys, as they were when this instance joined.
    records: BTreeMap<String, String>,
    partitions: BTreeMap<PoolName, BTreeSet<u16>>,
    /// For each pool, how many partitions no instance held at the last listing.
    unclaimed: BTreeMap<PoolName, usize>,
    /// Whether partitions were noted since the last step began.
    is_new: bool,
}

/// The entry that the store has, compared with the one that this instance would create.
pub(super) enum Agreed<T> {
    Same,
    /// It is a valid one with this content.
    Other(T),
    /// It is not valid here: another version of this program may have created it.
    Foreign(String),
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

impl JoinedSpace {
    pub(super) fn new(store: Arc<dyn FleetStore>, keys: SpaceKeys) -> Self {
        let (entries, steps, doubt) = Default::default();
        Self { store, keys, entries, steps, doubt }
    }

    /// Creates an entry if there is none and `may_create` is true, and compares the entry that the store then
    /// has with `ours`. `parse` returns the content of a valid entry. Notes an entry that is the same or
    /// valid.
    ///
    /// # Errors
    /// [`Lost::StoreBehind`] if there is no entry then, or [`FleetError::Store`].
    pub(super) async fn agree<E: Serialize + DeserializeOwned + PartialEq, T>(
        &self,
        key: String,
        ours: &E,
        may_create: bool,
        parse: impl FnOnce(&E) -> Option<T>,
    ) -> Result<Agreed<T>, FleetError> {
        let mut found = self.store.get(&key).await?;
        if found.is_none() && may_create {
            let text = serde_json::to_string(ours).expect("it has plain fields");
            let given = self.records([self.keys.space()]);
            self.store.create_where(&given, &[(key.clone(), text)]).await?;
            found = self.store.get(&key).await?;
        }
        let Some(found) = found else {
            return Err(Lost::StoreBehind.into());
        };
        let theirs = serde_json::from_str::<E>(&found).ok();
        let agreed = match theirs {
            Some(theirs) if theirs == *ours => Agreed::Same,
            Some(theirs) => match parse(&theirs) {
                Some(theirs) => Agreed::Other(theirs),
                None => return Ok(Agreed::Foreign(found)),
            },
            None => return Ok(Agreed::Foreign(found)),
        };
        self.entries().records.insert(key, found);
        Ok(agreed)
    }

    /// Returns the error that an entry is [`Agreed::Foreign`].
    pub(super) fn foreign(&self, found: String) -> FleetError {
        FleetError::Foreign { space: self.keys.name().to_owned(), found }
    }

    /// Returns the fence of an instance, as the store has it.
    pub(super) async fn fence(&self, instance: Uuid) -> Result<Option<Fence>, FleetStoreError> {
        let found = self.store.get(&self.keys.fence(instance)).await?;
        Ok(found.map(|found| serde_json::from_str(&found).unwrap_or(FOREIGN_FENCE)))
    }

    /// Returns the claimed partitions of a pool.
    pub(super) async fn holdings(
        &self,
        pool: &PoolName,
        instance: Uuid,
    ) -> Result<Holdings, FleetStoreError> {
        let prefix = self.keys.partitions(pool);
        let mut holdings = Holdings { ours: Vec::new(), others: BTreeSet::new() };
        for (key, holder) in self.store.list(&prefix).await? {
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

    /// Sets how many steps of the fence were made before this process.
    pub(super) fn begin_after(&self, steps: u64) {
        self.steps.store(steps, Ordering::Release);
    }

    /// Counts a step that was made.
    pub(super) fn stepped(&self) {
        self.steps.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the noted records that have one of these keys.
    pub(super) fn records<const N: usize>(&self, keys: [String; N]) -> Vec<(String, String)> {
        let entries = self.entries();
        let record = |key: String| entries.records.get(&key).cloned().map(|record| (key, record));
        keys.into_iter().filter_map(record).collect()
    }

    pub(super) fn note(&self, pool: &PoolName, holdings: &Holdings) {
        let mut entries = self.entries();
        entries.partitions.entry(pool.clone()).or_default().extend(&holdings.ours);
        entries.unclaimed.insert(pool.clone(), holdings.unclaimed());
        entries.is_new = true;
    }

    /// Returns how many of these partitions are not noted yet.
    pub(super) fn unnoted(&self, pool: &PoolName, partitions: &[u16]) -> usize {
        let entries = self.entries();
        let noted = entries.partitions.get(pool);
        let is_noted = |partition| noted.is_some_and(|noted| noted.contains(partition));
        partitions.iter().filter(|&partition| !is_noted(partition)).count()
    }

    /// Returns whether partitions were noted since the last call.
    pub(super) fn take_new(&self) -> bool {
        std::mem::take(&mut self.entries().is_new)
    }

    /// Returns whether the store has the noted records.
    pub(super) async fn has_records(&self) -> Result<bool, FleetStoreError> {
        let records = self.entries().records.clone();
        for (key, record) in records {
            if self.store.get(&key).await? != Some(record) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns whether the store has the noted partitions and records.
    pub(super) async fn has_all(&self, instance: Uuid) -> Result<bool, FleetStoreError> {
        let pools = self.entries().partitions.clone();
        for (pool, partitions) in pools {
            let found = self.holdings(&pool, instance).await?;
            self.entries().unclaimed.insert(pool, found.unclaimed());
            if !partitions.is_subset(&found.ours.into_iter().collect()) {
                return Ok(false);
            }
        }
        self.has_records().await
    }

    /// Returns an error, and makes the gatekeeper check the store at once, if the store has forgotten steps or
    /// records.
    pub(super) async fn check_memory(&self, instance: Uuid) -> Result<(), FleetStoreError> {
        // Read first, because a step may be made at any time.
        let steps = self.steps.load(Ordering::Acquire);
        let fence = self.fence(instance).await?.filter(|&fence| fence != FOREIGN_FENCE);
        if fence.map_or(0, |fence| fence.step) < steps || !self.has_records().await? {
            self.doubt.notify_one();
            let problem = "it has forgotten steps or records that this instance knows of";
            return Err(self.store.error(problem));
        }
        Ok(())
    }

    /// Waits until the gatekeeper should check the store.
    pub(super) async fn doubted(&self) {
        self.doubt.notified().await;
    }

    /// Returns the partitions of a pool in figures.
    pub(super) fn figures(&self, pool: &PoolName) -> Partitions {
        let entries = self.entries();
        Partitions {
            held: entries.partitions.get(pool).map_or(0, BTreeSet::len),
            unclaimed: entries.unclaimed.get(pool).copied().unwrap_or(0),
        }
    }

    fn entries(&self) -> MutexGuard<'_, KnownEntries> {
        self.entries.lock().expect("nothing panics with it")
    }
}
