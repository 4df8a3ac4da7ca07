//! Operator commands: shows which instances hold which partitions and whether this folder is current, and
//! puts back what a store has forgotten. Servers don't use any of this.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use uuid::Uuid;

use super::claims::{Claims, Held, Holdings};
use super::keys::{Keys, PoolRecord, SpaceRecord};
use super::protocol::{Fence, Known, Standing};
use super::record::Record;
use super::store::Store;
use super::{FleetError, gate, read_record};
use crate::config::{FleetConfig, PoolName};
use crate::files;
use crate::folder::{Folder, PoolPaths};
use crate::ledger::{Ledger, PARTITIONS};

/// Tries to read a folder between two steps of its server: a try takes milliseconds, and the steps are
/// seconds apart.
const READINGS_MAX: usize = 10;

/// The content of the store for one space.
#[derive(Debug)]
pub struct Overview {
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
pub struct Holder {
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
    pub async fn look(config: &FleetConfig, folder: &Path) -> Result<Self, FleetError> {
        let store = Store::open_to_look(&config.store)?;
        let keys = Keys::new(&config.space);
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
        let folder = look_at_folder(&store, &keys, config, folder, space).await?;
        Ok(Self { space, pools, instances, folder })
    }

    /// Returns how many partitions of a pool no instance holds. `pool` is its position among the pools.
    #[must_use]
    pub fn free(&self, pool: usize) -> usize {
        PARTITIONS - self.instances.values().map(|holder| holder.partitions[pool]).sum::<usize>()
    }
}

async fn look_at_folder(
    store: &Store,
    keys: &Keys,
    config: &FleetConfig,
    folder: &Path,
    space: Option<Uuid>,
) -> Result<Option<(Uuid, Standing)>, FleetError> {
    for _ in 0..READINGS_MAX {
        let Some(record) = read_record(folder, config.space.as_str())? else {
            return Ok(None);
        };
        let found = gate::read(store, keys, &record).await?;
        if read_record(folder, config.space.as_str())?.as_ref() == Some(&record) {
            let standing = match space {
                _ if record.is_stale => Standing::Stale,
                Some(space) if space == record.space_uuid => record.known.judge(found),
                _ => Standing::StoreBehind,
            };
            return Ok(Some((record.instance, standing)));
        }
    }
    Err(store
        .error("it responds too slowly to compare it with this folder while the server runs")
        .into())
}

/// The entries that were put back.
#[derive(Debug, Default)]
pub struct Reseeded {
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
/// [`FleetError::Lost`] with [`Lost::Stale`](super::Lost::Stale) if the store is ahead of the folder,
/// [`FleetError::Taken`] if another instance holds a partition that this folder has drawn from.
pub async fn reseed(config: &FleetConfig, folder: &Folder) -> Result<Reseeded, FleetError> {
    let store = std::sync::Arc::new(Store::open(&config.store)?);
    let keys = Keys::new(&config.space);
    let space = config.space.to_string();
    let Some(record) = read_record(folder.path(), &space)? else {
        return Err(FleetError::NoInstance { folder: folder.path().display().to_string() });
    };
    let found = gate::read(&store, &keys, &record).await?;
    if record.is_stale || record.known.judge(found) == Standing::Stale {
        return Err(super::Lost::Stale.into());
    }
    let held = std::sync::Arc::new(Held::default());
    let text = agree(&store, keys.space(), &SpaceRecord::of(record.space_uuid), &space).await?;
    held.note_record(keys.space(), text);

    let mut reseeded = Reseeded::default();
    for pool in record.pools.iter().filter_map(|pool| PoolName::new(pool)) {
        let path = PoolPaths::new(folder.path(), &pool).ledger();
        if files::length_bytes(&path)?.is_none() {
            continue;
        }
        let ledger = Ledger::open_to_look(&path)?;
        let (numbers, key, partitions) = (*ledger.space(), ledger.key(), ledger.partitions());
        drop(ledger);
        let text = agree(&store, keys.pool(&pool), &PoolRecord::of(&numbers, key), &space).await?;
        held.note_record(keys.pool(&pool), text);
        let claims = Claims::new(
            store.clone(),
            keys.clone(),
            pool.clone(),
            record.instance,
            1,
            held.clone(),
        );
        let before = claims.holdings().await?.ours.len();
        claims.create(&partitions).await?;
        let Holdings { ours, .. } = claims.holdings().await?;
        let held: BTreeSet<u16> = ours.iter().copied().collect();
        if let Some(partition) = partitions.into_iter().find(|partition| !held.contains(partition))
        {
            return Err(FleetError::Taken { pool: pool.to_string(), space, partition });
        }
        reseeded.partitions.insert(pool, ours.len() - before);
    }
    reseeded.step = put_fence_back(&store, &keys, &record, found).await?;
    Ok(reseeded)
}

/// Moves a fence that is behind to the last step that this folder began, for which nothing is handed out any
/// more. Returns that step.
async fn put_fence_back(
    store: &Store,
    keys: &Keys,
    record: &Record,
    found: Option<Fence>,
) -> Result<Option<u64>, FleetError> {
    let Some(last) = record.known.last() else {
        return Ok(None);
    };
    if record.known.judge(found) != Standing::StoreBehind {
        return Ok(None);
    }
    let key = keys.fence(record.instance);
    match found {
        Some(found) => store.replace(&key, &gate::text(found), &gate::text(last)).await?,
        None => store.create(&[(key, gate::text(last))]).await?,
    };
    match Known::at(Some(last)).judge(gate::read(store, keys, record).await?) {
        Standing::Current => Ok(Some(last.step)),
        _ => Err(super::Lost::Stale.into()),
    }
}

/// Creates an entry, or checks that an existing one is the same. Returns the entry in the store.
async fn agree<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq>(
    store: &Store,
    key: String,
    ours: &T,
    space: &str,
) -> Result<String, FleetError> {
    let text = serde_json::to_string(ours).expect("it has plain fields");
    store.create(&[(key.clone(), text)]).await?;
    let found = store.get(&key).await?.unwrap_or_default();
    match serde_json::from_str::<T>(&found) {
        Ok(theirs) if theirs == *ours => Ok(found),
        Ok(_) => Err(FleetError::BegunAnew { key }),
        Err(_) => Err(FleetError::Foreign { space: space.to_owned(), found }),
    }
}
