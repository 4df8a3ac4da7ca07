//! Keeps all numbers in one JSON file, which is read at the start and replaced before a response is sent.
//! Knows nothing of requests. A number is stored as the text that callers got, so `grep` finds it.
//!
//! Each write contains all numbers, so its cost grows with them, which is what this mode demonstrates.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{Candidate, OpenError, Store, StoreError, check_range};
use crate::config::{PoolConfig, PoolName};
use crate::files;
use crate::folder::JSON_STORE;
use crate::space::{Number, Space, Value};

/// The file's format, which is its first entry.
const FORMAT: &str = "tombola used numbers, version 1";

/// The file and its content.
#[derive(Debug)]
pub(crate) struct JsonStore {
    path: PathBuf,
    /// The pools of the settings, in their order; then those that only the file has.
    pools: Vec<Pool>,
}

#[derive(Debug)]
struct Pool {
    name: PoolName,
    space: Space,
    used: BTreeSet<Value>,
}

impl Store for JsonStore {
    // No other process changes the file, so waiting would not help.
    const RETRY_DELAY: Duration = Duration::ZERO;

    fn open(folder: &Path, pools: &[PoolConfig]) -> Result<Self, OpenError> {
        let path = folder.join(JSON_STORE);
        let mut stored = match files::read(&path)? {
            Some(text) => {
                read(&text).map_err(|problem| OpenError::Damaged { path: path.clone(), problem })?
            }
            None => Vec::new(),
        };
        let mut store = Self { path, pools: Vec::new() };
        for PoolConfig { name, space, .. } in pools {
            let used = match stored.iter().position(|pool| pool.name == *name) {
                Some(at) => {
                    let pool = stored.remove(at);
                    check_range(&store.path, name.as_str(), &pool.space, space)?;
                    pool.used
                }
                None => BTreeSet::new(),
            };
            store.pools.push(Pool { name: name.clone(), space: space.clone(), used });
        }
        store.pools.append(&mut stored);
        files::remove(&files::unfinished(&store.path))?;
        store.save()?;
        Ok(store)
    }

    fn insert(&mut self, candidates: &[Candidate]) -> Result<Vec<bool>, StoreError> {
        let fresh: Vec<bool> = candidates
            .iter()
            .map(|candidate| self.pools[candidate.pool.0].used.insert(candidate.value))
            .collect();
        if !fresh.contains(&true) {
            return Ok(fresh);
        }
        self.save().map_err(|error| {
            // The numbers are not handed out, so they are free, whichever content a crash leaves.
            for (candidate, _) in candidates.iter().zip(&fresh).filter(|(_, fresh)| **fresh) {
                self.pools[candidate.pool.0].used.remove(&candidate.value);
            }
            StoreError::Failed(error.to_string())
        })?;
        Ok(fresh)
    }

    fn close(self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl JsonStore {
    fn save(&self) -> Result<(), files::FileError> {
        let written = Written { format: FORMAT, pools: &self.pools };
        let text =
            serde_json::to_vec(&written).expect("the types below have no maps with odd keys");
        files::replace(&self.path, &text)
    }
}

/// The file as it is written.
#[derive(Serialize)]
struct Written<'a> {
    format: &'a str,
    #[serde(serialize_with = "write_pools")]
    pools: &'a [Pool],
}

#[derive(Serialize)]
struct WrittenPool<'a> {
    min: Number,
    max: Number,
    decimals: u8,
    #[serde(serialize_with = "write_numbers")]
    numbers: &'a Pool,
}

fn write_pools<S: Serializer>(pools: &&[Pool], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(pools.len()))?;
    for pool in *pools {
        let space = &pool.space;
        let (min, max) = (space.number(space.min()), space.number(space.max()));
        let written = WrittenPool { min, max, decimals: space.decimals(), numbers: pool };
        map.serialize_entry(pool.name.as_str(), &written)?;
    }
    map.end()
}

fn write_numbers<S: Serializer>(pool: &&Pool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(pool.used.iter().map(|&value| pool.space.number(value)))
}

/// The file as it is read: numbers stay texts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    format: String,
    #[serde(borrow)]
    pools: BTreeMap<String, DocumentPool<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DocumentPool<'a> {
    #[serde(borrow)]
    min: &'a RawValue,
    #[serde(borrow)]
    max: &'a RawValue,
    decimals: u8,
    #[serde(borrow)]
    numbers: Vec<&'a RawValue>,
}

/// Parses the content of the file.
///
/// # Errors
/// The problem in words, if the content is damaged or not tombola's.
fn read(text: &[u8]) -> Result<Vec<Pool>, String> {
    let document: Document<'_> = serde_json::from_slice(text)
        .map_err(|error| format!("it is not a whole file of tombola's ({error})"))?;
    if document.format != FORMAT {
        return Err(format!(
            "its format is {:?}, but this program knows {FORMAT:?}",
            document.format
        ));
    }
    document.pools.iter().map(|(name, pool)| read_pool(name, pool)).collect()
}

fn read_pool(name: &str, pool: &DocumentPool<'_>) -> Result<Pool, String> {
    let DocumentPool { min, max, decimals, numbers } = pool;
    let refuse = |problem: String| format!("in the pool {name}, {problem}");
    let space =
        Space::new(min.get(), max.get(), *decimals).map_err(|error| refuse(error.to_string()))?;
    let mut used = BTreeSet::new();
    for number in numbers {
        let text = number.get();
        let value = space.parse(text).map_err(|error| refuse(error.to_string()))?;
        if !space.contains(value) || space.number(value).as_str() != text {
            return Err(refuse(format!("{text} is not a number of {space}")));
        }
        if !used.insert(value) {
            return Err(refuse(format!("{text} occurs twice")));
        }
    }
    let name = PoolName::new(name).ok_or_else(|| format!("{name:?} is not a pool's name"))?;
    Ok(Pool { name, space, used })
}
