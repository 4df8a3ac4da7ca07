//! Operator commands: shows which instances hold which partitions and whether this folder is current, and
//! puts back what a store has forgotten. Servers don't use any of this.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::claims::Claims;
use super::joined::{Agreed, JoinedSpace};
use super::keys::{PoolRecord, SpaceKeys, SpaceRecord};
use super::protocol::{Fence, KnownFence, Standing};
use super::record::Record;
use super::used::UsedNumbers;
use super::{FleetError, Lost, gate, store};
use crate::config::{FleetConfig, PoolConfig, PoolName};
use crate::files;
use crate::folder::{Folder, PoolPaths};
use crate::ledger::{Ledger, PARTITIONS};

/// Tries to read a folder between two steps of its server: a try takes milliseconds, and the steps are
/// seconds apart.
const READINGS_MAX: usize = 10;

/// The content of the store for one space.
#[derive(Debug)]
pub(crate) struct Overview {
    /// The space's UUID, if the store has a space of that name.
    pub space: Option<Uuid>,
    /// The pools that the space has.
    pub pools: Vec<PoolName>,
    /// Each instance that has a fence or a partition.
    pub instances: BTreeMap<Uuid, Holder>,
    /// This folder's instance and its standing, or `None` if the folder has not joined.
    pub folder: Option<(Uuid, Standing)>,
}

/// An instance's entries in the store.
#[derive(Debug, Default)]
pub(crate) struct Holder {
    /// Steps of its fence.
    pub steps: u64,
    /// Partitions that it holds, in the order of the pools.
    pub partitions: Vec<usize>,
}

impl Overview {
    /// Reads the store and a folder, whose server may be running.
    ///
    /// # Errors
    /// [`FleetError`] if either can't be read.
    pub(crate) async fn look(config: &FleetConfig, folder: &Path) -> Result<Self, FleetError> {
        let joined =
            JoinedSpace::new(store::open_to_look(&config.store)?, SpaceKeys::new(&config.space));
        let JoinedSpace { store, keys, .. } = &joined;
        let text = store.get(&keys.space()).await?;
        let space = text.and_then(|text| serde_json::from_str::<SpaceRecord>(&text).ok());
        let space = space.map(|record| record.uuid);
        let pools: Vec<PoolName> = store
            .list(&keys.pools())
            .await?
            .into_keys()
            .filter_map(|key| PoolName::new(key.strip_prefix(&keys.pools())?))
            .collect();
        let mut instances: BTreeMap<Uuid, Holder> = BTreeMap::new();
        for (key, text) in store.list(&keys.fences()).await? {
            let instance = key.strip_prefix(&keys.fences()).and_then(|text| text.parse().ok());
            if let (Some(instance), Ok(fence)) = (instance, serde_json::from_str::<Fence>(&text)) {
                instances.entry(instance).or_default().steps = fence.step;
            }
        }
        for (at, pool) in pools.iter().enumerate() {
            for holder in store.list(&keys.partitions(pool)).await?.into_values() {
                if let Ok(instance) = holder.parse() {
                    let partitions = &mut instances.entry(instance).or_default().partitions;
                    partitions.resize(pools.len(), 0);
                    partitions[at] += 1;
                }
            }
        }
        instances.values_mut().for_each(|holder| holder.partitions.resize(pools.len(), 0));
        let folder = look_at_folder(&joined, config, folder, space).await?;
        Ok(Self { space, pools, instances, folder })
    }

    /// Returns how many partitions of a pool no instance holds. `pool` is its position among the pools.
    pub(crate) fn free(&self, pool: usize) -> usize {
        PARTITIONS - self.instances.values().map(|holder| holder.partitions[pool]).sum::<usize>()
    }
}

async fn look_at_folder(
    joined: &JoinedSpace,
    config: &FleetConfig,
    folder: &Path,
    space: Option<Uuid>,
) -> Result<Option<(Uuid, Standing)>, FleetError> {
    for _ in 0..READINGS_MAX {
        let Some(record) = Record::read(folder, config.space.as_str())? else {
            return Ok(None);
        };
        let found = joined.fence(record.instance).await?;
        if Record::read(folder, config.space.as_str())?.as_ref() == Some(&record) {
            let standing = match space {
                _ if record.is_stale => Standing::Stale,
                Some(space) if space == record.space_uuid => record.known.judge(found),
                _ => Standing::StoreBehind,
            };
            return Ok(Some((record.instance, standing)));
        }
    }
    Err(joined
        .store
        .error("it responds too slowly to compare it with this folder while the server runs")
        .into())
}

/// The entries that were put back.
#[derive(Debug, Default)]
pub(crate) struct Reseeded {
    /// How many partitions of each pool were put back.
    pub partitions: BTreeMap<PoolName, usize>,
    /// The step that the fence was moved to, if it was behind.
    pub step: Option<u64>,
}

/// Puts the entries that the folder knows of back into a store that has forgotten them: the space, its pools,
/// the partitions that its ledgers have drawn from, and its fence. Existing entries are never changed, except
/// a fence that is behind.
///
/// # Errors
/// [`FleetError::Lost`] with [`Lost::Stale`] if the store is ahead of the folder,
/// [`FleetError::Taken`] if another instance holds a partition that this folder has drawn from.
pub(crate) async fn reseed(
    config: &FleetConfig,
    pools: &[PoolConfig],
    folder: &Folder,
) -> Result<Reseeded, FleetError> {
    let store = store::open(&config.store)?;
    let name = config.space.to_string();
    let Some(record) = Record::read(folder.path(), &name)? else {
        return Err(FleetError::NoInstance { folder: folder.path().display().to_string() });
    };
    let space = Arc::new(JoinedSpace::new(store, SpaceKeys::new(&config.space)));
    let found = space.fence(record.instance).await?;
    if record.is_stale || record.known.judge(found) == Standing::Stale {
        return Err(Lost::Stale.into());
    }
    put_record_back(&space, space.keys.space(), &SpaceRecord::of(record.space_uuid)).await?;

    let mut reseeded = Reseeded::default();
    for pool in record.pools.iter().filter_map(|pool| PoolName::new(pool)) {
        let path = PoolPaths::new(folder.path(), &pool).ledger();
        if files::length_bytes(&path)?.is_none() {
            continue;
        }
        let ledger = Ledger::open_to_look(&path)?;
        let (numbers, key, partitions) =
            (ledger.space().clone(), ledger.key(), ledger.partitions());
        drop(ledger);
        let used = match pools.iter().find(|config| config.name == pool) {
            Some(config) => UsedNumbers::read(config).await?.digest,
            None => None,
        };
        let pool_record = PoolRecord::of(&numbers, key, used);
        put_record_back(&space, space.keys.pool(&pool), &pool_record).await?;
        let claims = Claims::new(Arc::clone(&space), pool.clone(), record.instance, 1);
        let before = claims.holdings().await?.ours.len();
        let held = claims.claim_drawn(&partitions).await?;
        reseeded.partitions.insert(pool, held.len() - before);
    }
    reseeded.step = put_fence_back(&space, &record, found).await?;
    Ok(reseeded)
}

/// Creates a record, or checks that an existing one is the same.
async fn put_record_back<R: Serialize + DeserializeOwned + PartialEq>(
    space: &JoinedSpace,
    key: String,
    record: &R,
) -> Result<(), FleetError> {
    match space.agree(key.clone(), record, true, |_| Some(())).await? {
        Agreed::Same => Ok(()),
        Agreed::Other(()) => Err(FleetError::Recreated { key }),
        Agreed::Foreign(found) => Err(space.foreign(found)),
    }
}

/// Moves a fence that is behind to the last step that this folder began, for which nothing is handed out any
/// more. Returns that step.
async fn put_fence_back(
    space: &JoinedSpace,
    record: &Record,
    found: Option<Fence>,
) -> Result<Option<u64>, FleetError> {
    let Some(last) = record.known.last() else {
        return Ok(None);
    };
    if record.known.judge(found) != Standing::StoreBehind {
        return Ok(None);
    }
    let key = space.keys.fence(record.instance);
    match found {
        Some(found) => space.store.replace(&key, &gate::text(found), &gate::text(last)).await?,
        None => space.store.create(&[(key, gate::text(last))]).await?,
    };
    match KnownFence::at(Some(last)).judge(space.fence(record.instance).await?) {
        Standing::Current => Ok(Some(last.step)),
        _ => Err(Lost::Stale.into()),
    }
}
