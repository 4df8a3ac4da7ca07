//! `fleet.json`: a data folder's knowledge of its place in the fleet. Each change replaces the whole file, so
//! that any copy of it is from one moment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FleetError;
use super::protocol::{Fence, KnownFence};
use crate::batch::{Generation, ShardIndex};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::folder::FLEET_RECORD;

/// The version of the content below.
const FORMAT: &str = "tombola fleet 1";

/// The progress of a shard's file when a step of the fence covered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub pool: PoolName,
    pub shard: ShardIndex,
    /// The shard's generation.
    pub generation: Generation,
    /// Leases of that generation.
    pub leases: u64,
}

/// A folder's knowledge of its place in the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) instance: Uuid,
    /// The space's name and UUID.
    pub(super) space: String,
    pub(super) space_uuid: Uuid,
    pub(super) known: KnownFence,
    /// Whether the folder was found to be an old copy, and is being set aside.
    pub(super) is_stale: bool,
    /// Pools whose ledgers draw only from claimed partitions.
    pub(super) pools: Vec<String>,
    /// The last generation and lease that a step covered, by the pool's name and the shard's number.
    shards: BTreeMap<String, BTreeMap<u16, (i64, u64)>>,
}

/// The content of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: String,
    instance: Uuid,
    space: String,
    space_uuid: Uuid,
    fence: Option<Fence>,
    intent: Option<Fence>,
    is_stale: bool,
    pools: Vec<String>,
    shards: BTreeMap<String, BTreeMap<u16, (i64, u64)>>,
}

impl Record {
    /// Creates the record of a new instance.
    pub(super) fn new(space: &str, space_uuid: Uuid) -> Self {
        Self {
            instance: Uuid::new_v4(),
            space: space.to_owned(),
            space_uuid,
            known: KnownFence::default(),
            is_stale: false,
            pools: Vec::new(),
            shards: BTreeMap::new(),
        }
    }

    /// Reads the record of a folder of this space, if it has one.
    pub(super) fn read(folder: &Path, ours: &str) -> Result<Option<Self>, FleetError> {
        let Some(text) = files::read(&path(folder))? else {
            return Ok(None);
        };
        let shown = folder.display().to_string();
        let unusable = |problem| FleetError::Record { folder: shown.clone(), problem };
        let Written { format, instance, space, space_uuid, fence, intent, is_stale, pools, shards } =
            serde_json::from_slice(&text).map_err(|error| unusable(error.to_string()))?;
        if format != FORMAT {
            let problem = format!("its format is {format:?}, but this program knows {FORMAT:?}");
            return Err(unusable(problem));
        }
        if space != ours {
            let (folder, ours) = (shown, ours.to_owned());
            return Err(FleetError::OtherSpace { folder, theirs: space, ours });
        }
        let known = KnownFence { fence, intent };
        Ok(Some(Self { instance, space, space_uuid, known, is_stale, pools, shards }))
    }

    /// Saves it in a folder, durably.
    ///
    /// # Errors
    /// [`FileError`]; a crash may then leave either the old or the new content.
    pub(super) fn save(&self, folder: &Path) -> Result<(), FileError> {
        let Self { instance, space, space_uuid, known, is_stale, pools, shards } = self.clone();
        let KnownFence { fence, intent } = known;
        let format = FORMAT.to_owned();
        let written =
            Written { format, instance, space, space_uuid, fence, intent, is_stale, pools, shards };
        let text = serde_json::to_vec_pretty(&written).expect("keys are text and numbers");
        files::replace(&path(folder), &text)
    }

    /// Notes the progress of a shard's file.
    pub(super) fn cover(&mut self, lease: &Lease) {
        let shards = self.shards.entry(lease.pool.as_str().to_owned()).or_default();
        shards.insert(lease.shard.0, (lease.generation.0, lease.leases));
    }

    /// Returns the progress of each shard's file at the last step that covered it.
    pub(super) fn covered(&self) -> impl Iterator<Item = Lease> {
        self.shards
            .iter()
            .filter_map(|(pool, shards)| Some((PoolName::new(pool)?, shards)))
            .flat_map(|(pool, shards)| {
                shards.iter().map(move |(&shard, &(generation, leases))| Lease {
                    pool: pool.clone(),
                    shard: ShardIndex(shard),
                    generation: Generation(generation),
                    leases,
                })
            })
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join(FLEET_RECORD)
}
