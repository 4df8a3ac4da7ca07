use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::store::memory::{Fault, MemoryStore};
use super::*;
use crate::batch::ShardIndex;
use crate::config::{
    LeaseConfig, Mode, PoolName, Recorded, RefillConfig, SpaceName, StoreAddress, StoreConfig,
};
use crate::space::Space;

/// An instance with its data folder, and its store.
struct Instance {
    folder: tempfile::TempDir,
    store: MemoryStore,
}

/// An instance that serves.
struct Serving {
    gate: Gate,
    stop: CancellationToken,
    keeper: JoinHandle<()>,
    _folder: Folder,
}

fn config() -> FleetConfig {
    let address = StoreAddress::File("/nowhere/witness.db".into());
    FleetConfig {
        store: StoreConfig { address, password_file: None, tls: None },
        space: SpaceName::new("test").unwrap(),
        claim: 64,
        refuse_if_stale: true,
    }
}

fn pool(max: &str) -> PoolConfig {
    let space = Space::new("1", max, 0).unwrap();
    PoolConfig {
        name: PoolName::new("int").unwrap(),
        space,
        shards: 1,
        shard_size: 100,
        lease: LeaseConfig { rows: 1000 },
        refill: RefillConfig { low_water: 0.5, retry: Duration::ZERO, retry_limit: Duration::ZERO },
        receipts: Recorded::Keyed,
        used_file: None,
    }
}

impl Instance {
    fn new(store: &MemoryStore) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), store: store.clone() }
    }

    /// Another folder with the same files.
    fn copy(&self) -> Self {
        let copy = Self::new(&self.store);
        copy_files(self.folder.path(), copy.folder.path());
        copy
    }

    async fn join(&self) -> Result<(Fleet, Folder), FleetError> {
        self.join_with(&[]).await
    }

    async fn join_with(&self, pools: &[PoolConfig]) -> Result<(Fleet, Folder), FleetError> {
        let folder = Folder::open(self.folder.path(), Mode::Sharded, true, Duration::ZERO).unwrap();
        let store = Arc::new(self.store.clone());
        let fleet = Fleet::join_at(store, &config(), pools, &folder).await?;
        Ok((fleet, folder))
    }

    fn has_joined(&self) -> bool {
        self.folder.path().join(FLEET_RECORD).exists()
    }

    async fn serve(&self) -> Serving {
        self.serve_looking_every(Duration::from_secs(3600)).await
    }

    async fn serve_looking_every(&self, interval: Duration) -> Serving {
        let (fleet, folder) = self.join().await.unwrap();
        let Fleet { gate, mut gatekeeper, .. } = fleet;
        gatekeeper.look_every(interval);
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(gatekeeper.run(stop.clone()));
        Serving { gate, stop, keeper, _folder: folder }
    }

    /// Steps the fence `times` times, and stops.
    async fn step(&self, times: u64) {
        let serving = self.serve().await;
        for leases in 1..=times {
            assert!(serving.gate.pass(lease(leases)).await);
        }
        serving.stop().await;
    }

    fn fence(&self) -> u64 {
        let entries = self.store.entries();
        let fence = entries.iter().find(|(key, _)| key.contains("/fences/")).unwrap();
        serde_json::from_str::<protocol::Fence>(fence.1).unwrap().step
    }
}

impl Serving {
    async fn stop(self) {
        self.stop.cancel();
        self.keeper.await.unwrap();
    }
}

fn copy_files(from: &Path, to: &Path) {
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

fn lease(leases: u64) -> Lease {
    let pool = PoolName::new("int").unwrap();
    Lease { pool, shard: ShardIndex(0), generation: Generation(1), leases }
}

#[tokio::test]
async fn a_step_is_made_once_whatever_message_is_lost() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let serving = instance.serve().await;
    for faults in [&[Fault::Lost][..], &[Fault::ReplyLost], &[Fault::Lost, Fault::ReplyLost]] {
        for steps in 1..=2 {
            let before = if store.entries().keys().any(|key| key.contains("/fences/")) {
                instance.fence()
            } else {
                0
            };
            store.fail(faults);
            assert!(serving.gate.pass(lease(steps)).await);
            assert_eq!(instance.fence(), before + 1, "{faults:?}");
        }
    }
    serving.stop().await;
}

#[tokio::test]
async fn leases_that_wait_share_a_step() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let serving = instance.serve().await;
    store.set_away(true);
    let passes: Vec<_> = (1..=10)
        .map(|leases| {
            let gate = serving.gate.clone();
            tokio::spawn(async move { gate.pass(lease(leases)).await })
        })
        .collect();
    while serving.gate.trouble().is_none() {
        tokio::task::yield_now().await;
    }
    assert!(passes.iter().all(|pass| !pass.is_finished()), "nothing passes without the store");
    store.set_away(false);
    for pass in passes {
        assert!(pass.await.unwrap());
    }
    assert!(instance.fence() <= 2, "{} steps", instance.fence());
    assert_eq!(serving.gate.trouble(), None);
    serving.stop().await;
}

#[tokio::test]
async fn of_two_copies_one_goes_on() {
    let store = MemoryStore::default();
    let original = Instance::new(&store);
    original.step(2).await;
    let copy = original.copy();
    let (first, second) = (original.serve().await, copy.serve().await);
    assert!(first.gate.pass(lease(3)).await);
    assert!(!second.gate.pass(lease(3)).await, "both copies have made the third step");
    assert_eq!(second.gate.lost().await, Lost::Stale);
    assert!(first.gate.pass(lease(4)).await);
    first.stop().await;
    second.stop().await;
    assert!(matches!(copy.join().await, Err(FleetError::Lost(Lost::Stale))));
    original.step(1).await;
}

/// Short, so that a test need not wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

#[tokio::test]
async fn a_store_that_is_away_is_noticed_without_a_lease() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let serving = instance.serve_looking_every(LOOK_INTERVAL).await;
    assert!(serving.gate.pass(lease(1)).await);
    for away in [true, false, true] {
        store.set_away(away);
        while serving.gate.trouble().is_some() != away {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
    serving.stop().await;
}

#[tokio::test]
async fn a_clone_is_found_without_a_lease() {
    let store = MemoryStore::default();
    let original = Instance::new(&store);
    original.step(1).await;
    let copy = original.copy();
    let (first, idle) = (original.serve().await, copy.serve_looking_every(LOOK_INTERVAL).await);
    assert!(first.gate.pass(lease(2)).await);
    assert_eq!(idle.gate.lost().await, Lost::Stale);
    // The instance's own steps don't end it.
    assert!(first.gate.pass(lease(3)).await);
    first.stop().await;
    idle.stop().await;
    let record = Record::read(copy.folder.path(), "test").unwrap().unwrap();
    assert!(record.is_stale, "the next start knows, whatever the store says then");
}

#[tokio::test]
async fn nothing_is_claimed_in_a_space_that_was_begun_again() {
    let store = MemoryStore::default();
    let (joined, other) = (Instance::new(&store), Instance::new(&store));
    let pools = [pool("9007199254740991")];
    let (fleet, _folder) = joined.join_with(&pools).await.unwrap();
    let Fleet { mut memberships, gate, gatekeeper } = fleet;
    let claims = &mut memberships[0].claims;
    tokio::spawn(gatekeeper.run(CancellationToken::new()));
    store.restore(Default::default());
    other.join_with(&pools).await.unwrap();
    let begun_again = store.entries();
    claims.claim(1).await.unwrap_err();
    assert_eq!(gate.lost().await, Lost::StoreBehind);
    assert_eq!(store.entries(), begun_again);
    // If the store changes at the moment of the claim, nothing is created in it either.
    claims.create(&[7]).await.unwrap();
    assert_eq!(store.entries(), begun_again);
}

/// As above, but the claim exists already: the check after the step notices it.
#[tokio::test]
async fn a_lease_does_not_pass_in_a_space_that_was_begun_again() {
    let store = MemoryStore::default();
    let (joined, other) = (Instance::new(&store), Instance::new(&store));
    let pools = [pool("9007199254740991")];
    let (fleet, _folder) = joined.join_with(&pools).await.unwrap();
    let Fleet { mut memberships, gate, gatekeeper } = fleet;
    let claims = &mut memberships[0].claims;
    claims.claim(1).await.unwrap();
    tokio::spawn(gatekeeper.run(CancellationToken::new()));
    let mut entries = store.entries();
    store.restore(Default::default());
    other.join_with(&pools).await.unwrap();
    entries.extend(store.entries());
    store.restore(entries);
    assert!(!gate.pass(lease(1)).await, "handed out by a secret that is not the space's");
    assert_eq!(gate.lost().await, Lost::StoreBehind);
}

/// Story: clones of a running machine drew the same token from the same random state, the one that was
/// refused read its own token, and both handed out the same leases.
#[tokio::test]
async fn of_clones_that_draw_one_token_the_refused_one_ends() {
    for steps in [0, 2] {
        let store = MemoryStore::default();
        let instance = Instance::new(&store);
        instance.step(steps).await;
        let (fleet, _folder) = instance.join().await.unwrap();
        let (space, mut record) = fleet.gatekeeper.parts();
        record.known = record.known.begin(Uuid::new_v4());
        let make = async |untried| gate::try_to_make(space, &record, untried).await.unwrap();
        assert_eq!(make(true).await, Standing::Current);
        assert_eq!(make(true).await, Standing::Stale, "the clone, after {steps} steps");
        // If the reply to an earlier try may have been lost, the step counts as made.
        assert_eq!(make(false).await, Standing::Current);
    }
}

#[tokio::test]
async fn a_step_that_a_crash_left_open_is_finished_by_the_next_start() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    instance.step(1).await;
    let serving = instance.serve().await;
    store.set_away(true);
    let gate = serving.gate.clone();
    let pass = tokio::spawn(async move { gate.pass(lease(2)).await });
    while serving.gate.trouble().is_none() {
        tokio::task::yield_now().await;
    }
    pass.abort();
    serving.stop().await;
    assert_eq!(instance.fence(), 1);
    store.set_away(false);
    // A copy from this moment goes on, and the original is the stale one.
    let copy = instance.copy();
    copy.step(1).await;
    assert_eq!(instance.fence(), 3);
    assert!(matches!(instance.join().await, Err(FleetError::Lost(Lost::Stale))));
}

#[tokio::test]
async fn a_store_that_forgot_is_found_out_and_reseeded() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    instance.step(1).await;
    let old = store.entries();
    instance.step(1).await;
    let serving = instance.serve().await;
    store.restore(old.clone());
    assert!(!serving.gate.pass(lease(3)).await, "stepped in a store that forgot a step");
    assert_eq!(serving.gate.lost().await, Lost::StoreBehind);
    serving.stop().await;
    for entries in [old, Default::default()] {
        store.restore(entries);
        assert!(matches!(instance.join().await, Err(FleetError::Lost(Lost::StoreBehind))));
    }
}

/// In the earlier format, a value's stratum was a hash of the value: instances of both formats would draw the
/// same values.
#[tokio::test]
async fn a_space_of_the_format_before_is_refused() {
    let store = MemoryStore::default();
    Instance::new(&store).join().await.unwrap();
    let (key, record) =
        store.entries().into_iter().find(|(key, _)| key.ends_with("/space")).unwrap();
    let before = record.replace("\"format\":3", "\"format\":2");
    assert_ne!(before, record);
    store.restore([(key, before)].into());
    let refused = Instance::new(&store).join().await.map(drop).unwrap_err();
    assert!(matches!(refused, FleetError::Foreign { .. }), "{refused}");
    assert!(refused.to_string().contains("set fleet.space to another name"), "{refused}");
}

#[tokio::test]
async fn no_partition_is_held_twice() {
    let store = MemoryStore::default();
    let instances = [Instance::new(&store), Instance::new(&store), Instance::new(&store)];
    let pools = [pool("9007199254740991")];
    let mut held: Vec<Vec<u16>> = Vec::new();
    let mut keys = Vec::new();
    let mut all_claims = Vec::new();
    for instance in &instances {
        let (mut fleet, _folder) = instance.join_with(&pools).await.unwrap();
        let Membership { share, claims, .. } = fleet.memberships.remove(0);
        keys.push(share.key.to_bytes());
        all_claims.push(claims);
        held.push(share.partitions);
    }
    assert!(keys.iter().all(|key| *key == keys[0]), "all sort alike");
    // Claims until no partition is left, while replies are lost.
    while !all_claims.iter().all(Claims::none_left) {
        for (claims, held) in all_claims.iter_mut().zip(&mut held) {
            store.fail(&[Fault::ReplyLost]);
            if let Ok(partitions) = claims.claim(200).await {
                *held = partitions;
            }
            store.fail(&[]);
        }
    }
    let mut partitions: Vec<u16> = held.concat();
    partitions.sort_unstable();
    assert_eq!(partitions, (0..4096).collect::<Vec<u16>>());
}

#[tokio::test]
async fn all_must_have_the_same_ranges() {
    let store = MemoryStore::default();
    let (first, second) = (Instance::new(&store), Instance::new(&store));
    first.join_with(&[pool("1000")]).await.unwrap();
    let refused = second.join_with(&[pool("1001")]).await.unwrap_err();
    assert!(matches!(refused, FleetError::OtherRange { .. }), "{refused}");
    second.join_with(&[pool("1000")]).await.unwrap();
}

/// A ledger that has served alone brings its key and its partitions; a copy of it finds them taken.
#[tokio::test]
async fn a_ledger_that_has_served_alone_joins_once() {
    let store = MemoryStore::default();
    let (original, other) = (Instance::new(&store), Instance::new(&store));
    let pool = pool("9007199254740991");
    for alone in [&original, &other] {
        let path = PoolPaths::new(alone.folder.path(), &pool.name).ledger();
        let mut ledger = Ledger::create(&path, &pool.space).unwrap();
        let step = &mut |_| std::ops::ControlFlow::Continue(());
        ledger.draw(ShardIndex(0), None, 1000, step).unwrap().commit().unwrap();
        ledger.close().unwrap();
    }
    let copy = original.copy();
    let pools = [pool];
    let (fleet, _folder) = original.join_with(&pools).await.unwrap();
    assert_eq!(fleet.memberships[0].share.partitions.len(), 1);
    let refused = copy.join_with(&pools).await.unwrap_err();
    assert!(matches!(refused, FleetError::Taken { .. }), "{refused}");
    let refused = other.join_with(&pools).await.unwrap_err();
    assert!(matches!(refused, FleetError::OtherKey { .. }), "{refused}");
    // A refused folder has not joined, and can serve alone.
    assert!(original.has_joined() && !copy.has_joined() && !other.has_joined());
}

/// A store that was restored between a claim and the next step has forgotten no step.
#[tokio::test]
async fn a_store_that_forgot_a_claim_only_is_found_out() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let (fleet, _folder) = instance.join_with(&[pool("9007199254740991")]).await.unwrap();
    let Fleet { mut memberships, gate, gatekeeper } = fleet;
    let claims = &mut memberships[0].claims;
    let keeper = tokio::spawn(gatekeeper.run(CancellationToken::new()));
    assert!(gate.pass(lease(1)).await);
    let old = store.entries();
    claims.claim(1).await.unwrap();
    store.restore(old);
    assert!(!gate.pass(lease(2)).await, "handed out from partitions that are anyone's now");
    assert_eq!(gate.lost().await, Lost::StoreBehind);
    keeper.await.unwrap();
}

/// An instance that knows of a step which the store has forgotten claims no partitions there: others may hold
/// them.
#[tokio::test]
async fn nothing_is_claimed_in_a_store_that_forgot_a_step() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let (fleet, _folder) = instance.join_with(&[pool("9007199254740991")]).await.unwrap();
    let Fleet { mut memberships, gate, gatekeeper } = fleet;
    let claims = &mut memberships[0].claims;
    tokio::spawn(gatekeeper.run(CancellationToken::new()));
    assert!(gate.pass(lease(1)).await);
    let old = store.entries();
    assert!(gate.pass(lease(2)).await);
    store.restore(old.clone());
    claims.claim(1).await.unwrap_err();
    assert_eq!(store.entries(), old);
}

#[tokio::test]
async fn a_lease_is_refused_when_the_gatekeeper_has_ended() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let serving = instance.serve().await;
    store.set_away(true);
    let gate = serving.gate.clone();
    let waiting = tokio::spawn(async move { gate.pass(lease(1)).await });
    while serving.gate.trouble().is_none() {
        tokio::task::yield_now().await;
    }
    let gate = serving.gate.clone();
    serving.stop().await;
    assert!(!waiting.await.unwrap(), "it waited for a step that was not made");
    assert!(!gate.pass(lease(1)).await);
}

/// The store can be read, but its disk is full. It has not forgotten anything.
#[tokio::test]
async fn a_store_that_takes_nothing_is_waited_for() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let serving = instance.serve().await;
    store.fail(&[Fault::Lost; 10_000]);
    let gate = serving.gate.clone();
    let pass = tokio::spawn(async move { gate.pass(lease(1)).await });
    while serving.gate.trouble().is_none() {
        tokio::task::yield_now().await;
    }
    serving.stop().await;
    pass.abort();
    // The folder's step does not count as forgotten either.
    assert!(matches!(instance.join().await, Err(FleetError::Store(_))));
    store.fail(&[]);
    instance.step(1).await;
    assert_eq!(instance.fence(), 2);
}

/// Story: everything except `fleet.json` was deleted, and a new ledger drew the values of the old one again.
#[tokio::test]
async fn partitions_without_their_ledger_are_not_drawn_from() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let pools = [pool("9007199254740991")];
    let (mut fleet, folder) = instance.join_with(&pools).await.unwrap();
    fleet.memberships[0].claims.claim(1).await.unwrap();
    drop((fleet, folder));
    let refused = instance.join_with(&pools).await.unwrap_err();
    assert!(matches!(refused, FleetError::LedgerGone { .. }), "{refused}");
}

/// Story: a copy that was taken file by file had a generation twice, as the standby before the swap and as
/// the live file after it. Its numbers would have been handed out twice.
#[tokio::test]
async fn a_standby_that_was_leased_from_is_an_old_copy() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    let pools = [pool("9007199254740991")];
    let (_fleet, folder) = instance.join_with(&pools).await.unwrap();
    drop(folder);
    let paths = PoolPaths::new(instance.folder.path(), &pools[0].name);
    let mut ledger = Ledger::create(&paths.ledger(), &pools[0].space).unwrap();
    let step = &mut |_| std::ops::ControlFlow::Continue(());
    let refill = crate::refill::Refill { shard: ShardIndex(0), live: None, rows: 10 };
    crate::refill::build(&mut ledger, &paths, &refill, step).unwrap();
    ledger.close().unwrap();
    assert!(paths.standby(ShardIndex(0)).exists());
    instance.join().await.unwrap();
    // A step that covers a lease of that generation.
    instance.step(1).await;
    assert!(matches!(instance.join().await, Err(FleetError::Lost(Lost::Stale))));
}

/// A crash while the files of an old copy are set aside.
#[tokio::test]
async fn what_was_found_stale_stays_so() {
    let store = MemoryStore::default();
    let instance = Instance::new(&store);
    instance.step(1).await;
    let mut record = Record::read(instance.folder.path(), "test").unwrap().unwrap();
    record.is_stale = true;
    record.save(instance.folder.path()).unwrap();
    assert!(matches!(instance.join().await, Err(FleetError::Lost(Lost::Stale))));
}
