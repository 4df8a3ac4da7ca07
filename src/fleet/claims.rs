//! Claiming strata: each is created in the store by one instance, once, and never given back. Knows
//! nothing of what is drawn from them.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::seq::SliceRandom;
use uuid::Uuid;

use super::keys::Keys;
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
    /// All strata were seen to be claimed by someone.
    none_left: bool,
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
    ) -> Self {
        Self { store, keys, pool, instance, claim, none_left: false }
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
        let before = self.holdings().await?;
        let wanted = wanted.div_ceil(self.claim) * self.claim;
        let mut free: Vec<u16> = (0..STRATA as u16)
            .filter(|stratum| !before.others.contains(stratum) && !before.ours.contains(stratum))
            .collect();
        let (chosen, _) = free.partial_shuffle(&mut rand::rng(), wanted);
        if chosen.is_empty() {
            self.none_left = true;
            return Ok(before.ours);
        }
        self.create(chosen).await?;
        Ok(self.holdings().await?.ours)
    }

    /// Claims just these. Who holds them then, [`holdings`](Self::holdings) tells.
    pub(super) async fn create(&self, strata: &[u16]) -> Result<(), StoreError> {
        let entry =
            |&stratum: &u16| (self.keys.stratum(&self.pool, stratum), self.instance.to_string());
        self.store.create(&strata.iter().map(entry).collect::<Vec<_>>()).await
    }

    /// Who holds what.
    pub(super) async fn holdings(&self) -> Result<Holdings, StoreError> {
        let prefix = self.keys.strata(&self.pool);
        let mut holdings = Holdings { ours: Vec::new(), others: BTreeSet::new() };
        for (key, holder) in self.store.list(&prefix).await? {
            let Some(stratum) = key.strip_prefix(&prefix).and_then(|number| number.parse().ok())
            else {
                continue;
            };
            if holder == self.instance.to_string() {
                holdings.ours.push(stratum);
            } else {
                holdings.others.insert(stratum);
            }
        }
        Ok(holdings)
    }
}
