//! Claiming strata: each is created in the store by one instance, once, and never given back. Knows
//! nothing of what is drawn from them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rand::seq::SliceRandom;
use uuid::Uuid;

use super::keys::Keys;
use super::protocol::Fence;
use super::store::{Store, StoreError};
use crate::config::PoolName;
use crate::ledger::STRATA;

/// The strata of one pool, as one instance claims them.
#[derive(Clone, Debug)]
pub struct Claims {
    store: Arc<Store>,
    keys: Keys,
    pool: PoolName,
    instance: Uuid,
    /// How many at a time.
    claim: usize,
    held: Arc<Held>,
    /// All strata were seen to be claimed by someone.
    none_left: bool,
}

/// What an instance was told that it holds, and may have drawn in.
///
/// A store that is restored from a copy is found out by a step of the fence that it has forgotten. One that
/// is restored between a claim and the step that follows it has forgotten no step: so that step ends with a
/// look at the claims.
#[derive(Debug, Default)]
pub(super) struct Held {
    strata: Mutex<Strata>,
    /// Steps of the fence that were made.
    steps: AtomicU64,
}

#[derive(Debug, Default)]
struct Strata {
    pools: BTreeMap<PoolName, BTreeSet<u16>>,
    /// Since the last step was begun.
    is_new: bool,
}

impl Held {
    /// Nothing yet, after so many steps.
    pub(super) fn after(steps: u64) -> Self {
        Self { strata: Mutex::default(), steps: AtomicU64::new(steps) }
    }

    /// A step was made.
    pub(super) fn stepped(&self) {
        self.steps.fetch_add(1, Ordering::AcqRel);
    }

    fn note(&self, pool: &PoolName, strata: &[u16]) {
        let mut held = self.strata();
        held.pools.entry(pool.clone()).or_default().extend(strata);
        held.is_new = true;
    }

    /// How many of these were not told yet.
    fn unnoted(&self, pool: &PoolName, strata: &[u16]) -> usize {
        let held = self.strata();
        let is_noted =
            |stratum: &u16| held.pools.get(pool).is_some_and(|held| held.contains(stratum));
        strata.iter().filter(|&stratum| !is_noted(stratum)).count()
    }

    /// Whether anything was told since this was last asked.
    pub(super) fn take_new(&self) -> bool {
        std::mem::take(&mut self.strata().is_new)
    }

    /// Whether the store still says so.
    pub(super) async fn is_there(
        &self,
        store: &Store,
        keys: &Keys,
        instance: Uuid,
    ) -> Result<bool, StoreError> {
        let pools = self.strata().pools.clone();
        for (pool, strata) in pools {
            let found = holdings(store, keys, &pool, instance).await?;
            if !strata.is_subset(&found.ours.into_iter().collect()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn strata(&self) -> MutexGuard<'_, Strata> {
        self.strata.lock().expect("nothing panics with it")
    }
}

/// Who holds what of a pool.
pub(super) struct Holdings {
    pub(super) ours: Vec<u16>,
    pub(super) others: BTreeSet<u16>,
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

    /// Whether nobody can claim any more. That stays so.
    #[must_use]
    pub fn none_left(&self) -> bool {
        self.none_left
    }

    /// Claims at least as many strata more, if there are as many. Answers with all that this instance
    /// holds then: whatever became of earlier tries.
    ///
    /// # Errors
    /// [`StoreError`]; what was claimed is found by the next try.
    pub async fn claim(&mut self, wanted: usize) -> Result<Vec<u16>, StoreError> {
        // A store that was restored may have forgotten who holds what: nothing is claimed there. The next
        // step of the fence says so to all.
        let steps = self.held.steps.load(Ordering::Acquire);
        let fence = self.store.get(&self.keys.fence(self.instance)).await?;
        let found = fence.and_then(|fence| serde_json::from_str::<Fence>(&fence).ok());
        if found.map_or(0, |fence| fence.step) < steps {
            return Err(self.store.error("it has forgotten steps of this instance's fence"));
        }
        let before = self.holdings().await?;
        // What an earlier try got, whose answer was lost.
        let unnoted = self.held.unnoted(&self.pool, &before.ours);
        let wanted = wanted.saturating_sub(unnoted).div_ceil(self.claim) * self.claim;
        let mut free: Vec<u16> = (0..STRATA as u16)
            .filter(|stratum| !before.others.contains(stratum) && !before.ours.contains(stratum))
            .collect();
        let (chosen, _) = free.partial_shuffle(&mut rand::rng(), wanted);
        self.none_left = chosen.is_empty() && unnoted == 0;
        if !chosen.is_empty() {
            self.create(chosen).await?;
        }
        self.listed().await
    }

    /// All that this instance holds, to be drawn in.
    pub(super) async fn listed(&self) -> Result<Vec<u16>, StoreError> {
        let ours = self.holdings().await?.ours;
        self.held.note(&self.pool, &ours);
        Ok(ours)
    }

    /// Claims just these. Who holds them then, [`holdings`](Self::holdings) tells.
    pub(super) async fn create(&self, strata: &[u16]) -> Result<(), StoreError> {
        let entry =
            |&stratum: &u16| (self.keys.stratum(&self.pool, stratum), self.instance.to_string());
        self.store.create(&strata.iter().map(entry).collect::<Vec<_>>()).await
    }

    /// Who holds what.
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
    let prefix = keys.strata(pool);
    let mut holdings = Holdings { ours: Vec::new(), others: BTreeSet::new() };
    for (key, holder) in store.list(&prefix).await? {
        let Some(stratum) = key.strip_prefix(&prefix).and_then(|number| number.parse().ok()) else {
            continue;
        };
        if holder == instance.to_string() {
            holdings.ours.push(stratum);
        } else {
            holdings.others.insert(stratum);
        }
    }
    Ok(holdings)
}
