//! Sharing one number space with other instances: which strata are ours, and what proves that what we
//! lease is. Knows nothing of requests or of how shards are filled; a store agrees, which is asked by no
//! request and, while all is well, a few times for a million numbers.
//!
//! # The protocol
//! - **join**: who comes first creates the space, with the secret that sorts values into strata; all
//!   others must have the same ranges. Each folder is an instance with a UUID of its own.
//! - **claim**: each stratum is created in the store by one instance, once, and never given back; an
//!   instance draws in strata that it holds and in no others.
//! - **fence**: a lease is committed in its folder, then the intent to step the fence, then the fence is
//!   stepped in the store by compare-and-set, then the numbers are handed out. The first step after a
//!   claim, or a start, ends with a look whether the claims are still there.
//!
//! # Invariants
//! 1. What is on a disk never proves that it may be handed out: a step of the fence does.
//! 2. A copy of a folder that knows of a step has all leases that the step covers.
//! 3. A step bears a token that was drawn for it, so that of two copies only one can make it.
//! 4. No clock and no time-out decides who holds what.
//!
//! `fleet/model.rs` is the same as a model whose states are all looked at.

mod claims;
mod gate;
mod keys;
#[cfg(test)]
mod model;
mod operator;
pub mod protocol;
mod record;
pub mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::task::spawn_blocking;
use tracing::{error, info};
use uuid::Uuid;

pub use self::claims::Claims;
use self::claims::Held;
pub use self::gate::{Gate, Gatekeeper, Lost};
use self::keys::{Keys, PoolRecord, SpaceRecord};
pub use self::operator::{Overview, Reseeded, reseed};
use self::protocol::{Known, Standing};
pub use self::record::Lease;
use self::record::Record;
use self::store::{Store, StoreError};
use crate::batch::Generation;
use crate::config::{FleetConfig, PoolConfig};
use crate::files::{self, FileError};
use crate::folder::{FLEET_RECORD, Folder, FolderError, PoolPaths, Share};
use crate::ledger::{Ledger, LedgerError, StratumKey};
use crate::shard;

/// Tries to finish the step that the last process began. Its own may land in between, which is as good;
/// nobody else can make the store refuse one.
const FINISH_TRIES: usize = 3;

/// Why an instance can't take part.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The store does not answer, or refuses.
    #[error("{0}. Nothing can be served without it: what is on a disk alone proves nothing")]
    Store(#[from] StoreError),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A ledger can't be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// `fleet.json` is not whole.
    #[error(
        "{folder}/{FLEET_RECORD} can't be used: {problem}. Restore it from a backup of the same time as \
         all else there, or move all files of the folder away: it begins anew then"
    )]
    Record {
        /// The folder.
        folder: String,
        /// What is wrong.
        problem: String,
    },
    /// The folder belongs to another space.
    #[error(
        "the folder {folder} belongs to the space {theirs:?}, and fleet.space says {ours:?}: set that, or \
         use another folder with --data-dir"
    )]
    OtherSpace {
        /// The folder.
        folder: String,
        /// The folder's space.
        theirs: String,
        /// That of the settings.
        ours: String,
    },
    /// Another version of tombola, or nobody of ours, made the space.
    #[error(
        "the space {space:?} in the store is of another version of tombola, or not of tombola's: {found}"
    )]
    Foreign {
        /// Its name.
        space: String,
        /// What stands there.
        found: String,
    },
    /// The settings differ from what all others have.
    #[error(
        "pools.{pool} is {ours} here, and {theirs} in the space {space:?}: all instances must have the \
         same range and decimals. Change the settings, or give the pool another name"
    )]
    OtherRange {
        /// The pool.
        pool: String,
        /// The range of the settings.
        ours: String,
        /// The space's range.
        theirs: String,
        /// The space.
        space: String,
    },
    /// A ledger that has served alone sorts its values in a way of its own.
    #[error(
        "the ledger of the pool {pool} can't join the space {space:?}: it sorts values into strata by \
         another secret than the one that the space has, so that others could draw what it has drawn. \
         Only the first to join brings a ledger that has served alone; begin with an empty folder, or \
         name another space"
    )]
    OtherKey {
        /// The pool.
        pool: String,
        /// The space.
        space: String,
    },
    /// Another instance holds a stratum that the ledger has drawn from.
    #[error(
        "the ledger of the pool {pool} can't join the space {space:?}: another instance holds stratum \
         {stratum}, which this ledger has drawn from. Is the folder a copy of one that has joined?"
    )]
    Taken {
        /// The pool.
        pool: String,
        /// The space.
        space: String,
        /// The first such stratum.
        stratum: u16,
    },
    /// Without its ledger nobody can tell what an instance has drawn.
    #[error(
        "the ledger of the pool {pool} is gone from {folder}, and this instance holds strata that it drew \
         from. Put it back, or move all files of the folder away, {FLEET_RECORD} too: it begins anew then"
    )]
    LedgerGone {
        /// The pool.
        pool: String,
        /// Where it should be.
        folder: String,
    },
    /// Somebody has begun the space anew in a store that had lost it.
    #[error(
        "the store has another {key} than this folder: somebody began the space anew after it was lost. \
         Nothing can be put back; numbers may come again that this folder has handed out"
    )]
    BegunAnew {
        /// The entry.
        key: String,
    },
    /// There is nothing to put back.
    #[error("{folder} has not joined a fleet: there is no {FLEET_RECORD}")]
    NoInstance {
        /// The folder.
        folder: String,
    },
    /// The folder may not serve, and nobody may begin anew in it.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// An instance that has joined: this folder, in its space.
#[derive(Debug)]
pub struct Fleet {
    store: Arc<Store>,
    keys: Keys,
    claim: usize,
    held: Arc<Held>,
    folder: PathBuf,
    record: Record,
    notice: Option<String>,
}

impl Fleet {
    /// Joins the space with these pools, as the instance that the folder is or as a new one, and finds out
    /// whether the folder is current. One that is not begins anew, unless that is to be refused. Answers
    /// with what may be drawn of each pool.
    ///
    /// # Errors
    /// [`FleetError`]; nothing of the folder may be served then.
    pub async fn join(
        config: &FleetConfig,
        pools: &[PoolConfig],
        folder: &Folder,
    ) -> Result<(Self, Vec<Share>), FleetError> {
        Self::join_at(Arc::new(Store::open(&config.store)?), config, pools, folder).await
    }

    async fn join_at(
        store: Arc<Store>,
        config: &FleetConfig,
        pools: &[PoolConfig],
        folder: &Folder,
    ) -> Result<(Self, Vec<Share>), FleetError> {
        let path = folder.path().to_owned();
        let keys = Keys::new(&config.space);
        let space = config.space.as_str();
        let mut record = read_record(&path, space)?;
        let uuid = join_space(&store, &keys, space, record.as_ref()).await?;
        let mut notice = None;
        if let Some(found) = &mut record
            && is_stale(&store, &keys, folder, found).await?
        {
            if config.refuse_if_stale {
                return Err(Lost::Stale.into());
            }
            // Should a crash come in between, the next start goes on with it: what tells may be gone.
            found.is_stale = true;
            found.save(&path)?;
            notice = Some(begin_anew(folder)?);
            record = None;
        }
        let is_new = record.is_none();
        let record = record.unwrap_or_else(|| Record::new(space, uuid));
        let steps = record.known.fence.map_or(0, |fence| fence.step);
        let held = Arc::new(Held::after(steps));
        let mut fleet =
            Self { store, keys, claim: config.claim, held, folder: path, record, notice };

        // Before anything is written: a folder that is refused stays what it was.
        let mut joining = Vec::new();
        for pool in pools {
            joining.push(fleet.agree(pool).await?);
        }
        if is_new {
            fleet.record.save(&fleet.folder)?;
            info!(space, instance = %fleet.record.instance, "a new instance joins the fleet");
        }
        let mut shares = Vec::new();
        for (pool, joining) in pools.iter().zip(joining) {
            shares.push(fleet.claim_what_is_drawn_from(pool, joining).await?);
        }
        Ok((fleet, shares))
    }

    /// Agrees with all others on what a pool's numbers are, and finds out whether its ledger can join.
    async fn agree(&self, config: &PoolConfig) -> Result<Joining, FleetError> {
        let (pool, space) = (config.name.to_string(), self.record.space.clone());
        let ledger = read_ledger(&PoolPaths::new(&self.folder, &config.name)).await?;
        let key = self.agree_on_key(config, ledger.as_ref().map(|ledger| ledger.key)).await?;
        let holdings = self.claims(config).holdings().await?;
        let Some(ledger) = ledger else {
            // Strata are claimed for a ledger that is there: it has drawn from them.
            return match holdings.ours.is_empty() {
                true => Ok(Joining { key, unclaimed: Vec::new() }),
                false => {
                    let folder = self.folder.display().to_string();
                    Err(FleetError::LedgerGone { pool, folder })
                }
            };
        };
        if ledger.key.to_bytes() != key.to_bytes() {
            return Err(FleetError::OtherKey { pool, space });
        }
        let mut unclaimed = ledger.strata;
        unclaimed.retain(|stratum| !holdings.ours.contains(stratum));
        if !unclaimed.is_empty() && self.record.pools.contains(&pool) {
            return Err(Lost::StoreBehind.into());
        }
        match unclaimed.iter().find(|stratum| holdings.others.contains(stratum)) {
            Some(&stratum) => Err(FleetError::Taken { pool, space, stratum }),
            None => Ok(Joining { key, unclaimed }),
        }
    }

    /// Claims the strata that a ledger drew from when it served alone, and answers with all that are held.
    async fn claim_what_is_drawn_from(
        &mut self,
        config: &PoolConfig,
        Joining { key, unclaimed }: Joining,
    ) -> Result<Share, FleetError> {
        let (pool, space) = (config.name.to_string(), self.record.space.clone());
        let claims = self.claims(config);
        if !unclaimed.is_empty() {
            claims.create(&unclaimed).await?;
        }
        let strata = claims.listed().await?;
        if let Some(stratum) = unclaimed.into_iter().find(|stratum| !strata.contains(stratum)) {
            return Err(FleetError::Taken { pool, space, stratum });
        }
        if !self.record.pools.contains(&pool) {
            self.record.pools.push(pool);
            self.record.save(&self.folder)?;
        }
        Ok(Share { key, strata })
    }

    /// What claims more strata of a pool.
    #[must_use]
    pub fn claims(&self, config: &PoolConfig) -> Claims {
        let (store, held) = (Arc::clone(&self.store), Arc::clone(&self.held));
        let (keys, pool) = (self.keys.clone(), config.name.clone());
        Claims::new(store, keys, pool, self.record.instance, self.claim, held)
    }

    /// The gate for leases, and who opens it.
    #[must_use]
    pub fn into_gate(self) -> (Gate, Gatekeeper) {
        let Self { store, keys, held, folder, record, notice, .. } = self;
        Gate::new(store, keys, held, folder, record, notice)
    }

    /// The secret by which all sort the values of a pool: our proposal, if nobody came before.
    async fn agree_on_key(
        &self,
        config: &PoolConfig,
        proposal: Option<StratumKey>,
    ) -> Result<StratumKey, FleetError> {
        let space = self.record.space.clone();
        let key = self.keys.pool(&config.name);
        let proposal = PoolRecord::of(&config.space, proposal.unwrap_or_else(StratumKey::random));
        let text = serde_json::to_string(&proposal).expect("it has plain fields");
        if self.store.get(&key).await?.is_none() {
            if self.record.pools.iter().any(|pool| pool == config.name.as_str()) {
                return Err(Lost::StoreBehind.into());
            }
            self.store.create(&[(key.clone(), text)]).await?;
        }
        let found = self.store.get(&key).await?.unwrap_or_default();
        let agreed: Option<PoolRecord> = serde_json::from_str(&found).ok();
        let Some((agreed, key)) = agreed.and_then(|agreed| Some((agreed.space(), agreed.key()?)))
        else {
            return Err(FleetError::Foreign { space, found });
        };
        if agreed != config.space {
            let (ours, theirs) = (config.space.to_string(), agreed.to_string());
            return Err(FleetError::OtherRange {
                pool: config.name.to_string(),
                ours,
                theirs,
                space,
            });
        }
        Ok(key)
    }
}

fn read_record(folder: &Path, space: &str) -> Result<Option<Record>, FleetError> {
    let shown = folder.display().to_string();
    match Record::read(folder)? {
        None => Ok(None),
        Some(Err(problem)) => Err(FleetError::Record { folder: shown, problem }),
        Some(Ok(record)) if record.space != space => Err(FleetError::OtherSpace {
            folder: shown,
            theirs: record.space,
            ours: space.to_owned(),
        }),
        Some(Ok(record)) => Ok(Some(record)),
    }
}

/// Creates the space if nobody has, and answers with its UUID.
async fn join_space(
    store: &Store,
    keys: &Keys,
    space: &str,
    record: Option<&Record>,
) -> Result<Uuid, FleetError> {
    let key = keys.space();
    if store.get(&key).await?.is_none() {
        if record.is_some() {
            return Err(Lost::StoreBehind.into());
        }
        let proposal = SpaceRecord::of(Uuid::new_v4());
        let text = serde_json::to_string(&proposal).expect("it has plain fields");
        store.create(&[(key.clone(), text)]).await?;
    }
    let found = store.get(&key).await?.unwrap_or_default();
    match serde_json::from_str::<SpaceRecord>(&found) {
        Ok(agreed) if agreed.is_understood() => match record {
            Some(record) if record.space_uuid != agreed.uuid => Err(Lost::StoreBehind.into()),
            _ => Ok(agreed.uuid),
        },
        _ => Err(FleetError::Foreign { space: space.to_owned(), found }),
    }
}

/// Whether others have gone on from the place where this folder stands. If not, the step that it began
/// is made: no lease is handed out for it any more, and the store must not change when nobody expects it.
async fn is_stale(
    store: &Store,
    keys: &Keys,
    folder: &Folder,
    record: &mut Record,
) -> Result<bool, FleetError> {
    if record.is_stale {
        return Ok(true);
    }
    let mut standing = record.known.judge(gate::read(store, keys, record).await?);
    for _ in 0..FINISH_TRIES {
        if standing == Standing::Pending {
            standing = gate::try_to_make(store, keys, record).await?;
        }
    }
    match standing {
        // A store that never makes a step that it could make is none.
        Standing::StoreBehind | Standing::Pending => Err(Lost::StoreBehind.into()),
        Standing::Stale => Ok(true),
        Standing::Current => {
            record.known = Known::at(record.known.intent.or(record.known.fence));
            Ok(is_mixed(folder, record)?)
        }
    }
}

/// Whether a shard's file, or the ledger, is older than what was handed out: copied while it was in use,
/// and before `fleet.json` was.
fn is_mixed(folder: &Folder, record: &Record) -> Result<bool, FleetError> {
    for lease in record.covered() {
        let paths = PoolPaths::new(folder.path(), &lease.pool);
        let live = paths.live(lease.shard);
        if files::length_bytes(&live)?.is_some() {
            match shard::progress(&live) {
                Ok(found) if found < (lease.generation, lease.leases) => return Ok(true),
                Err(source) if source.is_transient() => {
                    return Err(FolderError::Shard { shard: live, source }.into());
                }
                // One that is damaged is not served.
                Ok(_) | Err(_) => {}
            }
        }
        for next in [paths.standby(lease.shard), paths.unfinished(lease.shard)] {
            if files::length_bytes(&next)?.is_some()
                && shard::read_label(&next).is_ok_and(|next| next.generation <= lease.generation)
            {
                return Ok(true);
            }
        }
        if files::length_bytes(&paths.ledger())?.is_some() {
            let newest = Ledger::open_to_look(&paths.ledger())?.newest(lease.shard)?;
            if newest.unwrap_or(Generation(0)) < lease.generation {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Sets all of the folder aside. Answers with what people should know.
fn begin_anew(folder: &Folder) -> Result<String, FleetError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let ending = format!(".stale-{}", now.as_millis());
    folder.set_all_aside(&ending)?;
    let notice = format!(
        "the data folder was an old copy, a restored backup or a clone: nothing of it is served, its \
         files are kept with the ending {ending}, and this instance began anew. Find out where the copy \
         came from"
    );
    error!(folder = %folder.path().display(), "{notice}");
    Ok(notice)
}

/// A pool that can join.
struct Joining {
    key: StratumKey,
    /// Strata that its ledger has opened and nobody holds.
    unclaimed: Vec<u16>,
}

/// What joining needs of a ledger.
struct Found {
    key: StratumKey,
    strata: Vec<u16>,
}

async fn read_ledger(paths: &PoolPaths) -> Result<Option<Found>, FleetError> {
    let path = paths.ledger();
    let read = move || {
        if files::length_bytes(&path)?.is_none() {
            return Ok(None);
        }
        let ledger = Ledger::open_to_look(&path)?;
        Ok(Some(Found { key: ledger.key(), strata: ledger.strata().to_vec() }))
    };
    spawn_blocking(read).await.expect("reading does not panic")
}

#[cfg(test)]
mod tests;
