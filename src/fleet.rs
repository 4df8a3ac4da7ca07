//! Shares one number space with other instances: it claims partitions for this one, and proves that its
//! leases may be handed out. The instances agree through a store, which no request waits for and which is
//! normally used a few times per million numbers. Knows nothing of requests or of how shards are filled.
//!
//! # The protocol
//! - **join**: the first instance creates the space, with the secret that gives values their indexes. All
//!   others must have the same ranges. Each folder is an instance with a UUID of its own.
//! - **claim**: one instance creates a partition's entry in the store, once, and never gives it back. The
//!   same step compares the records of the space and the pool. An instance draws only in partitions that it
//!   holds.
//! - **fence**: a lease is committed in its folder, then the intent to step the fence, then the fence is
//!   stepped in the store by compare-and-set, then the numbers are handed out. The first step after a claim
//!   or a start ends with a check that the claims and the records are still there.
//! - **rest**: an instance that has made no step for 10 s checks its fence and the records.
//!
//! # Invariants
//! 1. The content of a disk never proves that it may be handed out; only a step of the fence does.
//! 2. A copy of a folder that knows of a step has all leases that the step covers.
//! 3. A step has a token that was drawn for it, so that only one of two copies can make it. If a first try is
//!    refused, another copy has made the step, whatever its token.
//! 4. No clock and no time-out decides which instance holds a partition.
//! 5. Partitions of two secrets have values in common, so an instance serves only in the space that it
//!    joined.
//!
//! `tests/fleet_model` is a model of this protocol, which checks all its states.

mod claims;
mod gate;
mod joined;
mod keys;
mod operator;
pub(crate) mod protocol;
mod record;
pub(crate) mod store;
mod used;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::task::spawn_blocking;
use tracing::{error, info, warn};
use uuid::Uuid;

pub(crate) use self::claims::Claims;
pub(crate) use self::gate::{Gate, Gatekeeper};
pub(crate) use self::joined::Partitions;
use self::joined::{Agreed, JoinedSpace};
use self::keys::{PoolRecord, SpaceKeys, SpaceRecord};
pub(crate) use self::operator::{Overview, reseed};
pub(crate) use self::protocol::Lost;
use self::protocol::{KnownFence, Standing};
pub(crate) use self::record::Lease;
use self::record::Record;
use self::store::{FleetStore, FleetStoreError};
use self::used::UsedNumbers;
use crate::batch::Generation;
use crate::config::{FleetConfig, PoolConfig, PoolName};
use crate::files::{self, FileError};
use crate::folder::{FLEET_RECORD, Folder, FolderError, PoolPaths, Share};
use crate::ledger::{Ledger, LedgerError, StratumKey};
use crate::shard;
use crate::space::Value;
use crate::sqlite::Fault;

/// Tries to finish the step that the last process began. A request of that process may arrive in between,
/// which finishes the step too; nothing else can make the store refuse it.
const FINISH_TRIES: usize = 3;

/// Why an instance can't take part in its fleet.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The store does not respond, or refuses.
    #[error(
        "{0}. Nothing can be served without the store, because a data folder alone does not prove which \
         numbers may be handed out"
    )]
    Store(#[from] FleetStoreError),
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A ledger can't be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// `fleet.json` can't be used.
    #[error(
        "{folder}/{FLEET_RECORD} can't be used: {problem}. Restore it from a backup that was made at the \
         same time as the other files, or move all files of the folder away to start as a new instance"
    )]
    Record { folder: String, problem: String },
    /// The folder belongs to another space.
    #[error(
        "the folder {folder} belongs to the space {theirs:?}, but fleet.space is {ours:?}. Change \
         fleet.space, or use another folder with --data-dir"
    )]
    OtherSpace { folder: String, theirs: String, ours: String },
    /// Another version of tombola, or another program, created the space.
    #[error(
        "another version of tombola, or another program, created the space {space:?} in the store: {found}. \
         Start that version, or set fleet.space to another name and start with an empty folder"
    )]
    Foreign { space: String, found: String },
    /// The settings of a pool differ from those in the space.
    #[error(
        "pools.{pool} is {ours} here, but {theirs} in the space {space:?}: all instances must have the \
         same range, decimals and codes. Change the settings, or give the pool another name"
    )]
    OtherRange { pool: String, ours: String, theirs: String, space: String },
    /// The file of numbers that were issued by other means can't be used.
    #[error("pools.{pool}.used_file can't be used: {problem}")]
    UsedFile { pool: String, problem: String },
    /// The file of numbers that were issued by other means differs from that of the space.
    #[error(
        "pools.{pool}.used_file has {ours} here, but {theirs} in the space {space:?}: all instances must have the same \
         numbers, from the first one on. Use the file of the other instances, or give the pool another name"
    )]
    OtherUsed { pool: String, ours: String, theirs: String, space: String },
    /// A ledger that has served alone may have drawn used numbers.
    #[error(
        "the ledger of the pool {pool} can't join a space with pools.{pool}.used_file, because it has drawn numbers \
         before. Start with an empty folder, or remove used_file and import the file with tombola import before the \
         folder joins"
    )]
    UsedTooLate { pool: String },
    /// A ledger that has served alone has a secret of its own.
    #[error(
        "the ledger of the pool {pool} can't join the space {space:?}, because only the first instance \
         can join with a ledger that has served alone: the secrets differ, so other instances could draw \
         the same numbers. Start with an empty folder, or use another space"
    )]
    OtherKey { pool: String, space: String },
    /// Another instance holds a partition that the ledger has drawn from.
    #[error(
        "the ledger of the pool {pool} can't join the space {space:?}: another instance holds partition \
         {partition}, which this ledger has drawn from. Check whether the folder is a copy of one that has \
         joined"
    )]
    Taken { pool: String, space: String, partition: u16 },
    /// The ledger is missing, and with it the record of what the instance has drawn.
    #[error(
        "the ledger of the pool {pool} is missing from {folder}, but this instance holds partitions that it \
         drew from. Put it back, or move all files of the folder away, including {FLEET_RECORD}, to start as \
         a new instance"
    )]
    LedgerGone {
        pool: String,
        /// The folder that should have it.
        folder: String,
    },
    /// The space was created again in a store that had lost it.
    #[error(
        "the store has another {key} than this folder: the space was created again after it was lost. \
         Nothing can be put back, and numbers that this folder has handed out may be handed out again"
    )]
    Recreated { key: String },
    /// There is nothing to put back.
    #[error("{folder} has not joined a fleet: there is no {FLEET_RECORD}")]
    NoInstance { folder: String },
    /// The folder may not serve, and may not be replaced by a new instance.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// An instance that has joined its space with its data folder.
#[derive(Debug)]
pub struct Fleet {
    /// The membership of each pool of the settings, in their order.
    pub memberships: Vec<Membership>,
    /// The gate of all pools.
    pub gate: Gate,
    /// The task that opens the gate. It has to [run](Gatekeeper::run).
    pub gatekeeper: Gatekeeper,
}

/// A pool's membership in the fleet.
#[derive(Debug)]
pub struct Membership {
    /// The part of the pool that this instance may draw from.
    pub share: Share,
    /// The means to claim more partitions.
    pub claims: Claims,
    /// The gate that leases must pass.
    pub gate: Gate,
}

impl Fleet {
    /// Joins the space with these pools, as the folder's instance or as a new one, and checks whether the
    /// folder is current. The files of a stale folder are set aside and a new instance joins, unless the
    /// settings refuse that.
    ///
    /// # Errors
    /// [`FleetError`]; nothing of the folder may be served then.
    pub async fn join(
        config: &FleetConfig,
        pools: &[PoolConfig],
        folder: &Folder,
    ) -> Result<Self, FleetError> {
        if config.store.shows_password() {
            warn!(
                store = %config.store.address,
                "the password for the store crosses the network in plain text: set fleet.tls"
            );
        }
        Self::join_at(store::open(&config.store)?, config, pools, folder).await
    }

    async fn join_at(
        store: Arc<dyn FleetStore>,
        config: &FleetConfig,
        pools: &[PoolConfig],
        folder: &Folder,
    ) -> Result<Self, FleetError> {
        let path = folder.path().to_owned();
        let mut record = Record::read(&path, config.space.as_str())?;
        let space = JoinedSpace::new(store, SpaceKeys::new(&config.space));
        let uuid = join_space(&space, record.as_ref()).await?;
        let mut notice = None;
        if let Some(found) = &mut record
            && is_stale(&space, folder, found).await?
        {
            if config.refuse_if_stale {
                return Err(Lost::Stale.into());
            }
            // Saved first, so that the next start continues after a crash, when the evidence may be gone.
            found.is_stale = true;
            found.save(&path)?;
            notice = Some(start_over(folder)?);
            record = None;
        }
        let is_new = record.is_none();
        let record = record.unwrap_or_else(|| Record::new(config.space.as_str(), uuid));
        space.begin_after(record.known.fence.map_or(0, |fence| fence.step));
        let space = Arc::new(space);
        let mut member = Member { space, claim: config.claim, folder: path, record };

        // Before anything is written, so that a refused folder stays unchanged.
        let mut joining = Vec::new();
        for pool in pools {
            joining.push(member.agree(pool).await?);
        }
        if is_new {
            member.record.save(&member.folder)?;
            info!(
                space = config.space.as_str(), instance = %member.record.instance,
                "a new instance joins the fleet"
            );
        }
        let mut shares = Vec::new();
        for (pool, joining) in pools.iter().zip(joining) {
            shares.push(member.claim_what_is_drawn_from(pool, joining).await?);
        }
        let Member { space, folder, record, .. } = member;
        let (gate, gatekeeper) = Gate::new(space, folder, record, notice);
        let membership = |(share, claims)| Membership { share, claims, gate: gate.clone() };
        let memberships = shares.into_iter().map(membership).collect();
        Ok(Self { memberships, gate, gatekeeper })
    }
}

/// An instance of the fleet that is about to join.
struct Member {
    space: Arc<JoinedSpace>,
    claim: usize,
    folder: PathBuf,
    record: Record,
}

impl Member {
    /// Agrees with the other instances on a pool's range and secret, and checks whether its ledger can join.
    async fn agree(&self, config: &PoolConfig) -> Result<Joining, FleetError> {
        let (pool, space) = (config.name.to_string(), self.record.space.clone());
        let UsedNumbers { values: used, digest } = UsedNumbers::read(config).await?;
        let ledger = read_ledger(&PoolPaths::new(&self.folder, &config.name)).await?;
        if ledger.is_some() && digest.is_some() && !self.record.pools.contains(&pool) {
            return Err(FleetError::UsedTooLate { pool });
        }
        let proposal = ledger.as_ref().map(|ledger| ledger.key);
        let key = self.agree_on_key(config, proposal, digest).await?;
        let claims = self.claims(config);
        let holdings = claims.holdings().await?;
        let Some(ledger) = ledger else {
            // Partitions are claimed only for a ledger that exists, and it may have drawn from them.
            return match holdings.ours.is_empty() {
                true => Ok(Joining { key, unclaimed: Vec::new(), used }),
                false => {
                    let folder = self.folder.display().to_string();
                    Err(FleetError::LedgerGone { pool, folder })
                }
            };
        };
        if ledger.key.to_bytes() != key.to_bytes() {
            return Err(FleetError::OtherKey { pool, space });
        }
        let mut unclaimed = ledger.partitions;
        unclaimed.retain(|partition| !holdings.ours.contains(partition));
        if !unclaimed.is_empty() && self.record.pools.contains(&pool) {
            return Err(Lost::StoreBehind.into());
        }
        match unclaimed.iter().find(|partition| holdings.others.contains(partition)) {
            Some(&partition) => Err(claims.taken(partition)),
            None => Ok(Joining { key, unclaimed, used }),
        }
    }

    /// Claims the partitions that a ledger drew from when it served alone. Returns all that are held, and the
    /// means to claim more.
    async fn claim_what_is_drawn_from(
        &mut self,
        config: &PoolConfig,
        Joining { key, unclaimed, used }: Joining,
    ) -> Result<(Share, Claims), FleetError> {
        let claims = self.claims(config).with_used(Arc::clone(&used));
        let partitions = claims.claim_drawn(&unclaimed).await?;
        let pool = config.name.to_string();
        if !self.record.pools.contains(&pool) {
            self.record.pools.push(pool);
            self.record.save(&self.folder)?;
        }
        Ok((Share { key, partitions, used }, claims))
    }

    fn claims(&self, config: &PoolConfig) -> Claims {
        let space = Arc::clone(&self.space);
        Claims::new(space, config.name.clone(), self.record.instance, self.claim)
    }

    /// Returns the secret of a pool that all instances share. It is the proposal if no instance has created
    /// one.
    async fn agree_on_key(
        &self,
        config: &PoolConfig,
        proposal: Option<StratumKey>,
        used: Option<String>,
    ) -> Result<StratumKey, FleetError> {
        let proposal = proposal.unwrap_or_else(StratumKey::random);
        let ours = PoolRecord::of(&config.space, proposal, used.clone());
        let key = self.space.keys.pool(&config.name);
        let pool = config.name.to_string();
        let may_create = !self.record.pools.contains(&pool);
        let parse = |theirs: &PoolRecord| {
            let (range, secret) = theirs.range_and_key()?;
            Some((range, secret, theirs.used().map(str::to_owned)))
        };
        match self.space.agree(key, &ours, may_create, parse).await? {
            Agreed::Same => Ok(proposal),
            Agreed::Other((range, secret, theirs)) if range == config.space => {
                if theirs == used {
                    return Ok(secret);
                }
                let shown = |digest: Option<String>| match digest {
                    Some(digest) => format!("numbers of the SHA-256 {digest}"),
                    None => "no numbers".to_owned(),
                };
                let (ours, theirs, space) = (shown(used), shown(theirs), self.record.space.clone());
                Err(FleetError::OtherUsed { pool, ours, theirs, space })
            }
            Agreed::Other((range, ..)) => {
                let (ours, theirs) = (config.space.to_string(), range.to_string());
                let space = self.record.space.clone();
                Err(FleetError::OtherRange { pool, ours, theirs, space })
            }
            Agreed::Foreign(found) => Err(self.space.foreign(found)),
        }
    }
}

/// Creates the space if no instance has. Returns its UUID.
async fn join_space(space: &JoinedSpace, record: Option<&Record>) -> Result<Uuid, FleetError> {
    let ours = record.map_or_else(Uuid::new_v4, |record| record.space_uuid);
    let (key, proposal) = (space.keys.space(), SpaceRecord::of(ours));
    match space.agree(key, &proposal, record.is_none(), SpaceRecord::understood_uuid).await? {
        Agreed::Same => Ok(ours),
        Agreed::Other(theirs) if record.is_none() => Ok(theirs),
        Agreed::Other(_) => Err(Lost::StoreBehind.into()),
        Agreed::Foreign(found) => Err(space.foreign(found)),
    }
}

/// Returns whether another copy of this folder has made further steps. If not, it finishes the step that the
/// folder began. No lease is handed out for that step any more, but it must not reach the store later.
async fn is_stale(
    space: &JoinedSpace,
    folder: &Folder,
    record: &mut Record,
) -> Result<bool, FleetError> {
    if record.is_stale {
        return Ok(true);
    }
    let mut standing = record.known.judge(space.fence(record.instance).await?);
    for _ in 0..FINISH_TRIES {
        if standing == Standing::Pending {
            standing = gate::try_to_make(space, record, false).await?;
        }
    }
    match standing {
        // A store that rejects every retry can't be trusted.
        Standing::StoreBehind | Standing::Pending => Err(Lost::StoreBehind.into()),
        Standing::Stale => Ok(true),
        Standing::Current => {
            record.known = KnownFence::at(record.known.last());
            Ok(is_mixed(folder, record)?)
        }
    }
}

/// Returns whether a shard's file or the ledger is older than what was handed out, which means that it was
/// copied while it was in use, and before `fleet.json` was copied.
fn is_mixed(folder: &Folder, record: &Record) -> Result<bool, FleetError> {
    // Each is opened only once, because opening one reads the tallies of all its partitions.
    let mut ledgers: BTreeMap<PoolName, Option<Ledger>> = BTreeMap::new();
    for lease in record.covered() {
        let paths = PoolPaths::new(folder.path(), &lease.pool);
        let live = paths.live(lease.shard);
        if files::length_bytes(&live)?.is_some() {
            match shard::progress(&live) {
                Ok(found) if found < (lease.generation, lease.leases) => return Ok(true),
                Err(source) if source.fault() != Fault::Content => {
                    return Err(FolderError::Shard { shard: live, source }.into());
                }
                // A damaged file is not served.
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
        let ledger = match ledgers.entry(lease.pool) {
            Entry::Occupied(opened) => opened.into_mut(),
            Entry::Vacant(unopened) => {
                unopened.insert(match files::length_bytes(&paths.ledger())? {
                    Some(_) => Some(Ledger::open_to_look(&paths.ledger())?),
                    None => None,
                })
            }
        };
        if let Some(ledger) = ledger
            && ledger.newest(lease.shard)?.unwrap_or(Generation(0)) < lease.generation
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Sets all files of the folder aside, except the receipts. Returns a notice for people.
fn start_over(folder: &Folder) -> Result<String, FleetError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let ending = format!(".stale-{}", now.as_millis());
    folder.set_all_aside(&ending)?;
    let notice = format!(
        "the data folder was an old copy, a restored backup or a clone: its files, except the receipts, are kept \
         with the ending {ending} and not served, and a new instance has started here. Find out where the copy came \
         from"
    );
    error!(folder = %folder.path().display(), "{notice}");
    Ok(notice)
}

/// A pool that can join.
struct Joining {
    key: StratumKey,
    /// Partitions that its ledger has opened and this instance has yet to claim.
    unclaimed: Vec<u16>,
    /// Values that were issued by other means before the space was made.
    used: Arc<[Value]>,
}

/// The parts of a ledger that joining needs.
struct LedgerParts {
    key: StratumKey,
    partitions: Vec<u16>,
}

async fn read_ledger(paths: &PoolPaths) -> Result<Option<LedgerParts>, FleetError> {
    let path = paths.ledger();
    let read = move || {
        if files::length_bytes(&path)?.is_none() {
            return Ok(None);
        }
        let ledger = Ledger::open_to_look(&path)?;
        Ok(Some(LedgerParts { key: ledger.key(), partitions: ledger.partitions() }))
    };
    spawn_blocking(read).await.expect("reading does not panic")
}

#[cfg(test)]
mod tests;
