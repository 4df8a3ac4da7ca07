//! Claims partitions: one instance creates a partition's entry in the store, once, and never gives it back.
//! Knows nothing of what is drawn from them.

use std::sync::Arc;

use rand::seq::SliceRandom;
use uuid::Uuid;

use super::FleetError;
use super::joined::{Holdings, JoinedSpace};
use super::store::FleetStoreError;
use crate::config::PoolName;
use crate::ledger::PARTITIONS;
use crate::space::Value;

/// The partitions of one pool, as one instance claims them.
#[derive(Clone, Debug)]
pub struct Claims {
    space: Arc<JoinedSpace>,
    pool: PoolName,
    instance: Uuid,
    /// Partitions claimed at a time.
    batch: usize,
    /// Whether instances were found to hold all partitions.
    none_left: bool,
    /// The values that were issued by other means before the space was made.
    used: Arc<[Value]>,
}

impl Claims {
    pub(super) fn new(
        space: Arc<JoinedSpace>,
        pool: PoolName,
        instance: Uuid,
        batch: usize,
    ) -> Self {
        Self { space, pool, instance, batch, none_left: false, used: Arc::default() }
    }

    /// Returns the claims of a pool with these used values.
    pub(super) fn with_used(self, used: Arc<[Value]>) -> Self {
        Self { used, ..self }
    }

    /// Returns the values that were issued by other means before the space was made.
    pub(crate) fn used(&self) -> &[Value] {
        &self.used
    }

    /// Returns whether no partition is left to claim. That never changes back.
    pub fn none_left(&self) -> bool {
        self.none_left
    }

    /// Claims at least `wanted` more partitions, if that many are left. Returns all that this instance then
    /// holds, including those of earlier tries that seemed to fail.
    ///
    /// # Errors
    /// [`FleetStoreError`]; the next try finds what was claimed.
    pub async fn claim(&mut self, wanted: usize) -> Result<Vec<u16>, FleetStoreError> {
        // A restored store may have forgotten claims, and a store that came back empty may have another
        // secret: nothing is claimed in either.
        self.space.check_memory(self.instance).await?;
        let before = self.holdings().await?;
        // Partitions that an earlier try claimed, although its response was lost.
        let unnoted = self.space.unnoted(&self.pool, &before.ours);
        let wanted = wanted.saturating_sub(unnoted).div_ceil(self.batch) * self.batch;
        let mut free: Vec<u16> = (0..PARTITIONS as u16)
            .filter(|partition| {
                !before.others.contains(partition) && !before.ours.contains(partition)
            })
            .collect();
        let (chosen, _) = free.partial_shuffle(&mut rand::rng(), wanted);
        self.none_left = chosen.is_empty() && unnoted == 0;
        self.create(chosen).await?;
        self.listed().await
    }

    /// Claims the partitions that a ledger has drawn from. Returns all that this instance then holds.
    ///
    /// # Errors
    /// [`FleetError::Taken`] if another instance holds one of them.
    pub(super) async fn claim_drawn(&self, partitions: &[u16]) -> Result<Vec<u16>, FleetError> {
        self.create(partitions).await?;
        let held = self.listed().await?;
        match partitions.iter().find(|partition| !held.contains(partition)) {
            Some(&partition) => Err(self.taken(partition)),
            None => Ok(held),
        }
    }

    /// Returns the error that another instance holds a partition.
    pub(super) fn taken(&self, partition: u16) -> FleetError {
        let (pool, space) = (self.pool.to_string(), self.space.keys.name().to_owned());
        FleetError::Taken { pool, space, partition }
    }

    /// Notes and returns all partitions that this instance holds, so that they can be drawn in.
    async fn listed(&self) -> Result<Vec<u16>, FleetStoreError> {
        let holdings = self.holdings().await?;
        self.space.note(&self.pool, &holdings);
        Ok(holdings.ours)
    }

    /// Claims these partitions if the space is still the one that was joined. [`holdings`](Self::holdings)
    /// tells whether this or another instance then holds them.
    pub(super) async fn create(&self, partitions: &[u16]) -> Result<(), FleetStoreError> {
        if partitions.is_empty() {
            return Ok(());
        }
        let keys = &self.space.keys;
        let entry = |&partition| (keys.partition(&self.pool, partition), self.instance.to_string());
        let entries: Vec<_> = partitions.iter().map(entry).collect();
        let records = self.space.records([keys.space(), keys.pool(&self.pool)]);
        self.space.store.create_where(&records, &entries).await.map(drop)
    }

    /// Returns the claimed partitions.
    pub(super) async fn holdings(&self) -> Result<Holdings, FleetStoreError> {
        self.space.holdings(&self.pool, self.instance).await
    }
}
