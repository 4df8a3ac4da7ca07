//! `fleet.json`: what a data folder knows of its place in the fleet. Replaced as a whole at each change,
//! so that any copy of it is of one moment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::protocol::{Fence, Known};
use crate::batch::{Generation, ShardIndex};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::folder::FLEET_RECORD;

/// The version of the content below.
const FORMAT: &str = "tombola fleet 1";

/// How far a shard's file had come when a step of the fence covered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Whose shard.
    pub pool: PoolName,
    /// Which one.
    pub shard: ShardIndex,
    /// Which filling of it.
    pub generation: Generation,
    /// Leases of that filling.
    pub leases: u64,
}

/// What a folder knows of its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) instance: Uuid,
    /// The space's name and UUID.
    pub(super) space: String,
    pub(super) space_uuid: Uuid,
    pub(super) known: Known,
    /// It was found to be an old copy, and is being set aside.
    pub(super) is_stale: bool,
    /// Pools whose strata are claimed: their ledgers draw from nothing else.
    pub(super) pools: Vec<String>,
    /// By the names of pools and the numbers of shards, the last generation and lease that were covered.
    shards: BTreeMap<String, BTreeMap<u16, (i64, u64)>>,
}

/// As it stands in the file.
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
    /// Of an instance that never was before.
    pub(super) fn new(space: &str, space_uuid: Uuid) -> Self {
        Self {
            instance: Uuid::new_v4(),
            space: space.to_owned(),
            space_uuid,
            known: Known::default(),
            is_stale: false,
            pools: Vec::new(),
            shards: BTreeMap::new(),
        }
    }

    /// That of a folder, if it has one; or (inside) what is wrong with it.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) fn read(folder: &Path) -> Result<Option<Result<Self, String>>, FileError> {
        let Some(text) = files::read(&path(folder))? else {
            return Ok(None);
        };
        let read = serde_json::from_slice::<Written>(&text).map_err(|error| error.to_string());
        Ok(Some(read.and_then(|written| {
            let Written {
                format,
                instance,
                space,
                space_uuid,
                fence,
                intent,
                is_stale,
                pools,
                shards,
            } = written;
            if format != FORMAT {
                return Err(format!("its format is {format:?}, this program knows {FORMAT:?}"));
            }
            let known = Known { fence, intent };
            Ok(Self { instance, space, space_uuid, known, is_stale, pools, shards })
        })))
    }

    /// Puts it into a folder, durably.
    ///
    /// # Errors
    /// [`FileError`]; which of the two contents a crash leaves is then not known.
    pub(super) fn save(&self, folder: &Path) -> Result<(), FileError> {
        let Self { instance, space, space_uuid, known, is_stale, pools, shards } = self.clone();
        let Known { fence, intent } = known;
        let format = FORMAT.to_owned();
        let written =
            Written { format, instance, space, space_uuid, fence, intent, is_stale, pools, shards };
        let text = serde_json::to_vec_pretty(&written).expect("keys are text and numbers");
        files::replace(&path(folder), &text)
    }

    /// Notes how far a shard's file has come.
    pub(super) fn cover(&mut self, lease: &Lease) {
        let shards = self.shards.entry(lease.pool.as_str().to_owned()).or_default();
        shards.insert(lease.shard.0, (lease.generation.0, lease.leases));
    }

    /// How far the file of each shard had come at the last step that covered it.
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
