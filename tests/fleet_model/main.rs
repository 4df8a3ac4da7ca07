//! A model of the fleet's protocol for stateright. It checks all states of a small fleet: all actions of the
//! instances, the network and the operators of the disks, in every order. Only files, networks and engines
//! are simulated; the product's own [rule](tombola::internals::fleet::protocol) decides what a fence proves.
//!
//! Read it as the specification: [`Fleet::act`] and [`Fleet::occur`] have an arm for each action,
//! [`Fleet::properties`] has the promises, and each [`Twist`] is a change of the protocol that looks safe and
//! is not. A process may pause at any time, which is an order in which others act.
//!
//! `FLEET_MODEL=large` checks more states.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod symmetry;

use std::collections::BTreeSet;

use stateright::util::HashableHashSet;
use stateright::{Checker, HasDiscoveries, Model, Property};
use uuid::Uuid;

use tombola::internals::fleet::{Fence, KnownFence, Standing};

/// Machines, each with a folder and a process. They are interchangeable.
const MACHINES: usize = 3;
/// Values, each in a partition of its own: the fewest with which instances can interfere with each other. The
/// space's secret maps values to partitions.
const VALUES: usize = 3;
/// Instances that can join: one per machine, and one in place of a stale folder.
const INSTANCES: usize = 4;

/// An instance's name. In the product it is a UUID.
type Instance = u8;

/// A space that was created, with its identity, which is also its secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Space {
    secret: u8,
    /// The number of values, the same in all spaces of a fleet.
    values: u8,
}

impl Space {
    fn partition(self, value: usize) -> usize {
        (value + usize::from(self.secret)) % usize::from(self.values)
    }

    /// Returns the partitions of these values.
    fn partitions(self, values: Set) -> Set {
        let mut partitions = Set::default();
        (0..VALUES)
            .filter(|value| values.has(*value))
            .for_each(|v| partitions.insert(self.partition(v)));
        partitions
    }
}

/// A set of values or of partitions, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Set(u8);

impl Set {
    fn of(belongs: impl Fn(usize) -> bool) -> Self {
        Self((0..VALUES).filter(|value| belongs(*value)).map(|value| 1 << value).sum())
    }

    fn has(self, value: usize) -> bool {
        self.0 & 1 << value != 0
    }

    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn remove(&mut self, value: usize) {
        self.0 &= !(1 << value);
    }

    fn insert(&mut self, value: usize) {
        self.0 |= 1 << value;
    }

    fn is_within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }
}

/// The content of the store. It is linearizable: each change happens at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Store {
    /// The first instance to join creates it.
    space: Option<Space>,
    claims: [Option<Instance>; VALUES],
    fences: [Option<Fence>; INSTANCES],
}

impl Store {
    fn fence(&self, instance: Instance) -> Option<Fence> {
        self.fences[usize::from(instance)]
    }

    fn claims_of(&self, instance: Instance) -> Set {
        Set::of(|partition| self.claims[partition] == Some(instance))
    }

    /// Puts back what the folder knows, unless others hold partitions that it has drawn from. Returns whether
    /// it did.
    fn reseed(&mut self, folder: &Folder) -> bool {
        let instance = folder.instance;
        if *self.space.get_or_insert(folder.space) != folder.space {
            return false;
        }
        let ours_or_free =
            Set::of(|partition| self.claims[partition].is_none_or(|h| h == instance));
        let standing = folder.known.judge(self.fence(instance));
        if !folder.opened().is_within(ours_or_free) || standing == Standing::Stale {
            return false;
        }
        for partition in (0..VALUES).filter(|partition| folder.opened().has(*partition)) {
            self.claims[partition] = Some(instance);
        }
        if standing == Standing::StoreBehind {
            self.fences[usize::from(instance)] = folder.known.last();
        }
        true
    }
}

/// A compare-and-set on its way to the store, which may take any length of time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct CompareAndSet {
    /// The machine whose process waits for the reply.
    by: usize,
    instance: Instance,
    from: Option<Fence>,
    to: Fence,
}

/// A value in the ledger and the shards of a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Row {
    #[default]
    Undrawn,
    /// In a shard, and not leased.
    Unused,
    /// Leased, for good or until it is given back.
    Used,
}

/// The content of a machine's disk. Each change is one commit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Folder {
    instance: Instance,
    /// The space that was joined.
    space: Space,
    known: KnownFence,
    /// Whether it was found to be an old copy. That never changes back.
    is_stale: bool,
    rows: [Row; VALUES],
}

impl Folder {
    fn are(&self, row: Row) -> Set {
        Set::of(|value| self.rows[value] == row)
    }

    fn give_back(&mut self, leased: Set) {
        for value in (0..VALUES).filter(|value| leased.has(*value)) {
            self.rows[value] = Row::Unused;
        }
    }

    /// Returns the partitions that the ledger has opened.
    fn opened(&self) -> Set {
        self.space.partitions(Set::of(|value| self.rows[value] != Row::Undrawn))
    }
}

/// The memory of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Process {
    /// The partitions that the instance holds, according to the store.
    held: Set,
    /// Whether partitions were listed since the last step began, or the process has begun no step. The next
    /// step then ends with a check of the claims.
    unchecked: bool,
    /// Values that are leased and wait for a step.
    waiting: Set,
    step: Option<Step>,
    /// Values that are leased and covered by a step that was made, and can be handed out.
    covered: Set,
    /// The values of these sets that were leased before the store was restored. Only the properties use it.
    before_restore: Set,
}

impl Process {
    /// Returns all values that are leased and not handed out.
    fn leased(&self) -> Set {
        let under_way = self.step.as_ref().map(|step| step.values).unwrap_or_default();
        self.waiting.with(under_way).with(self.covered)
    }
}

/// A step that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Step {
    fence: Fence,
    /// The values to hand out once it is made.
    values: Set,
    /// Whether the claims are read again before that. A store that was restored before this step, from a copy
    /// without these claims, does not have them now. A store that is restored after the step does not have
    /// the step, so that the next one fails. Without this check, a restore between a claim and the next step
    /// would go unnoticed, because a fence only proves steps.
    check: bool,
    /// Whether there was no earlier try with an unknown outcome.
    untried: bool,
    /// Whether the reply to the first try says that the fence was another.
    refused: bool,
    /// Whether the process knows, or is about to learn, that the step was made.
    made: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Life {
    #[default]
    Down,
    Up(Process),
    /// It ended itself or did not start, because another copy of its folder has made further steps.
    Stale,
    /// It ended itself or did not start, because the store has forgotten steps or claims that it knows of.
    StoreBehind,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Machine {
    folder: Option<Folder>,
    life: Life,
}

/// A copy of a folder: a backup, or the disk of a clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Copy {
    of: usize,
    folder: Folder,
    /// Whether the second half has been copied too.
    whole: bool,
}

/// The faults that may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Budget {
    /// Crashes and stops.
    ends: u8,
    /// Copies of folders.
    copies: u8,
    /// Times that a copy of a folder replaces the folder of a machine.
    restores: u8,
    store_restores: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    machines: [Machine; MACHINES],
    store: Store,
    network: HashableHashSet<CompareAndSet>,
    copy: Option<Copy>,
    store_copy: Option<Store>,
    budget: Budget,
    /// The values that callers got.
    handed_out: Set,
    /// The values that they got again. Only the properties use this and the fields below.
    repeated: Set,
    /// See [`UNIQUE`].
    excused: Set,
    /// See [`NOTICED`].
    unnoticed: bool,
    /// See [`LATE`].
    landed_late: bool,
    /// See [`RESEEDED`].
    reseeded: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// The number is the machine's, here and in the other actions.
    Start(usize),
    /// `kill -9` or a power loss.
    Crash(usize),
    /// A stop, which gives back what is leased and not handed out.
    Stop(usize),
    /// Creates the claim of a partition, if absent. The second number is the partition or value, here and in
    /// the other actions.
    Claim(usize, usize),
    /// Reads the claims.
    List(usize),
    /// Draws a value from a partition that is held into a shard.
    Draw(usize, usize),
    Lease(usize, usize),
    /// Commits the intent and sends the compare-and-set.
    Begin(usize),
    /// The compare-and-set reaches the store.
    Deliver(CompareAndSet),
    /// Reads the fence, because the reply is lost, late, or says that the fence was another.
    Read(usize),
    /// Checks the fence and the space while no step is in progress.
    Look(usize),
    /// Learns that the step was made: the values that it covers may be handed out.
    Cover(usize),
    HandOut(usize, usize),
    /// `tombola fleet reseed`.
    Reseed(usize),
    /// The first half of a copy of a folder: its knowledge of the fence. If nothing happens between the two
    /// halves, the copy is from one moment.
    CopyFence(usize),
    /// The second half, the ledgers and shards. Anything may have happened since the first half.
    CopyRows,
    /// A machine that is down gets the copy, which may be of its own folder or another one.
    Restore(usize),
    CopyStore,
    RestoreStore,
}

/// A deviation from the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Twist {
    None,
    /// Leased values are handed out at once.
    NoFence,
    /// The folder notes a step only once it is known to be made.
    NoIntent,
    /// As above, and a start takes a step that it does not know of for its own.
    NoIntentButAGuess,
    /// A step covers rows that are leased while it is in progress.
    IntentBeforeLease,
    /// Copies of a folder make the same step with the same token.
    TokenOfTheStep,
    /// As above, and each reply arrives in time: clones of a machine share its random state.
    TokenOfTheStepAndReplies,
    /// As above, and a first try that is refused is judged like one whose outcome is unknown.
    TokenOfTheStepAndRefusalsRead,
    /// If no reply arrives, the step is assumed to be made.
    NoReread,
    /// Claims are read before the step that follows them, and not after it.
    ClaimsReadOnce,
    /// Neither claims nor checks compare the space that the store has.
    SpaceNotCompared,
    /// Claims don't compare the space that the store has, but checks do.
    SpaceNotComparedByClaims,
    /// Checks don't compare the space that the store has, but claims do, at the same moment.
    SpaceNotComparedByLooks,
    /// A copy of a folder starts with its ledgers and shards. The product detects such copies too, by the
    /// leases that a fence covers; the model does not.
    FenceCopiedLast,
}

#[derive(Clone, Debug)]
struct Fleet {
    twist: Twist,
    /// The numbers of machines and values, up to [`MACHINES`] and [`VALUES`].
    machines: usize,
    values: usize,
    budget: Budget,
}

impl State {
    /// Returns all instances and tokens that occur anywhere in the state.
    fn remembered(&self) -> (BTreeSet<Instance>, BTreeSet<Uuid>) {
        let folders = self.machines.iter().filter_map(|machine| machine.folder.as_ref());
        let mut instances = BTreeSet::new();
        let mut fences = Vec::new();
        for folder in folders.chain(self.copy.as_ref().map(|copy| &copy.folder)) {
            instances.insert(folder.instance);
            fences.extend([folder.known.fence, folder.known.intent]);
        }
        for store in [Some(&self.store), self.store_copy.as_ref()].into_iter().flatten() {
            instances.extend(store.claims.iter().flatten());
            let fenced = |instance: &Instance| store.fence(*instance).is_some();
            instances.extend((0..INSTANCES as Instance).filter(fenced));
            fences.extend(store.fences);
        }
        for sent in self.network.iter() {
            instances.insert(sent.instance);
            fences.extend([sent.from, Some(sent.to)]);
        }
        let steps = self.machines.iter().filter_map(|machine| machine.process()?.step.as_ref());
        fences.extend(steps.map(|step| Some(step.fence)));
        (instances, fences.into_iter().flatten().map(|fence| fence.token).collect())
    }

    /// Returns the messages on their way, in an order that does not depend on the set's own.
    fn sent(&self) -> Vec<CompareAndSet> {
        let mut sent: Vec<_> = self.network.iter().cloned().collect();
        let token = |fence: Fence| fence.token;
        sent.sort_by_key(|sent| (sent.instance, token(sent.to), sent.from.map(token), sent.by));
        sent
    }

    /// Returns a space that no folder and no store remembers.
    fn new_space(&self, values: usize) -> Space {
        let folders = self.machines.iter().filter_map(|machine| machine.folder.as_ref());
        let folders = folders.chain(self.copy.as_ref().map(|copy| &copy.folder));
        let stores = [Some(&self.store), self.store_copy.as_ref()].into_iter().flatten();
        let remembered: Vec<Space> = folders
            .map(|folder| folder.space)
            .chain(stores.filter_map(|store| store.space))
            .collect();
        let mut spaces = (0..).map(|secret| Space { secret, values: values as u8 });
        spaces
            .find(|space| !remembered.contains(space))
            .expect("there are more than are remembered")
    }

    /// Returns an instance that does not occur in the state, which is as good as a new one.
    fn new_instance(&self) -> Option<Instance> {
        let (instances, _) = self.remembered();
        (0..INSTANCES as Instance).find(|instance| !instances.contains(instance))
    }

    /// Returns a token that does not occur in the state, like [`Self::new_instance`].
    fn new_token(&self) -> Uuid {
        let (_, tokens) = self.remembered();
        let mut free = (1..).map(Uuid::from_u128).filter(|token| !tokens.contains(token));
        free.next().expect("there are more than are remembered")
    }
}

impl Machine {
    fn process(&self) -> Option<&Process> {
        match &self.life {
            Life::Up(process) => Some(process),
            _ => None,
        }
    }
}

impl Fleet {
    /// Returns the process's knowledge of its fence.
    fn known(&self, folder: &Folder, process: &Process) -> KnownFence {
        match (self.twist, &process.step) {
            (Twist::NoIntent | Twist::NoIntentButAGuess, Some(step)) => {
                KnownFence { fence: folder.known.fence, intent: Some(step.fence) }
            }
            _ => folder.known,
        }
    }

    /// Starts a process, which first checks its folder.
    fn start(&self, last: &State, at: usize) -> Option<State> {
        let mut state = last.clone();
        let Machine { folder, life } = &mut state.machines[at];
        if matches!(life, Life::Up(_)) {
            return None;
        }
        let Some(folder) = folder else {
            // It joins as a new instance.
            let instance = last.new_instance()?;
            let space = *state.store.space.get_or_insert_with(|| last.new_space(self.values));
            let (known, rows) = (KnownFence::default(), Default::default());
            *folder = Some(Folder { instance, space, known, is_stale: false, rows });
            *life = Life::Up(Process { unchecked: true, ..Process::default() });
            return Some(state);
        };
        let found = state.store.fence(folder.instance);
        if self.twist == Twist::NoIntentButAGuess
            && let Some(next) = found
            && next.step == Fence::after(folder.known.fence, next.token).step
        {
            folder.known = KnownFence::at(found);
        }
        let mut process = Process { unchecked: true, ..Process::default() };
        let is_whole = state.store.space == Some(folder.space)
            && folder.opened().is_within(state.store.claims_of(folder.instance));
        let standing = match folder.is_stale {
            true => Standing::Stale,
            false => folder.known.judge(found),
        };
        *life = match standing {
            Standing::Current | Standing::Pending if !is_whole => Life::StoreBehind,
            Standing::Current => Life::Up(process),
            Standing::Pending => {
                // The step was begun by an earlier process, so it covers no lease now. It is made all the
                // same, so that no step is in progress when the next one begins.
                let fence = folder.known.intent.expect("something is pending");
                let instance = folder.instance;
                state.network.insert(CompareAndSet { by: at, instance, from: found, to: fence });
                process.step = Some(Step {
                    fence,
                    values: Set::default(),
                    check: false,
                    // The last process may have tried it.
                    untried: false,
                    refused: false,
                    made: false,
                });
                Life::Up(process)
            }
            Standing::Stale => {
                // The files are set aside, and the next start joins as a new instance.
                state.machines[at] = Machine { folder: None, life: Life::Stale };
                return Some(state);
            }
            Standing::StoreBehind => Life::StoreBehind,
        };
        (state != *last).then_some(state)
    }

    /// Returns the state after an action of a machine, or `None` if it can't act so.
    fn act(&self, last: &State, action: &Action) -> Option<State> {
        let (Action::Start(at)
        | Action::Crash(at)
        | Action::Stop(at)
        | Action::Claim(at, _)
        | Action::List(at)
        | Action::Draw(at, _)
        | Action::Lease(at, _)
        | Action::Begin(at)
        | Action::Read(at)
        | Action::Look(at)
        | Action::Cover(at)
        | Action::HandOut(at, _)
        | Action::Reseed(at)) = *action
        else {
            return self.occur(last.clone(), action);
        };
        if matches!(action, Action::Start(_)) {
            return self.start(last, at);
        }
        let mut state = last.clone();
        let Machine { folder, life } = &mut state.machines[at];
        if matches!(action, Action::Reseed(_)) {
            let is_behind = *life == Life::StoreBehind;
            let folder = folder.as_ref().filter(|_| is_behind)?;
            *life = Life::Down;
            state.reseeded = true;
            return state.store.reseed(folder).then_some(state);
        }
        let (Some(folder), Life::Up(process)) = (folder, &mut *life) else { return None };
        match action {
            Action::Crash(_) => {
                state.budget.ends = state.budget.ends.checked_sub(1)?;
                *life = Life::Down;
            }
            Action::Stop(_) => {
                state.budget.ends = state.budget.ends.checked_sub(1)?;
                folder.give_back(process.leased());
                *life = Life::Down;
            }
            // A claim that arrives late is the same as one that was made late.
            Action::Claim(_, partition) => {
                let compares = !matches!(
                    self.twist,
                    Twist::SpaceNotCompared | Twist::SpaceNotComparedByClaims
                );
                let claim = &mut state.store.claims[*partition];
                if claim.is_some() || compares && state.store.space != Some(folder.space) {
                    return None;
                }
                *claim = Some(folder.instance);
            }
            Action::List(_) => {
                let ours = state.store.claims_of(folder.instance);
                if ours.is_within(process.held) {
                    return None;
                }
                process.held = process.held.with(ours);
                process.unchecked = true;
            }
            Action::Draw(_, value) => {
                if !process.held.has(folder.space.partition(*value))
                    || folder.rows[*value] != Row::Undrawn
                {
                    return None;
                }
                folder.rows[*value] = Row::Unused;
            }
            Action::Lease(_, value) => {
                if folder.rows[*value] != Row::Unused {
                    return None;
                }
                folder.rows[*value] = Row::Used;
                match &mut process.step {
                    Some(step) if self.twist == Twist::IntentBeforeLease => {
                        step.values.insert(*value)
                    }
                    _ if self.twist == Twist::NoFence => process.covered.insert(*value),
                    _ => process.waiting.insert(*value),
                }
            }
            Action::Begin(_) => {
                let reason = match self.twist {
                    Twist::IntentBeforeLease => folder.are(Row::Unused),
                    _ => process.waiting,
                };
                if process.step.is_some() || reason == Set::default() {
                    return None;
                }
                let token = match self.twist {
                    Twist::TokenOfTheStep
                    | Twist::TokenOfTheStepAndReplies
                    | Twist::TokenOfTheStepAndRefusalsRead => Uuid::nil(),
                    _ => last.new_token(),
                };
                let known = folder.known.begin(token);
                let fence = known.intent.expect("begun");
                if !matches!(self.twist, Twist::NoIntent | Twist::NoIntentButAGuess) {
                    folder.known = known;
                }
                let (instance, from) = (folder.instance, known.fence);
                state.network.insert(CompareAndSet { by: at, instance, from, to: fence });
                process.step = Some(Step {
                    fence,
                    values: std::mem::take(&mut process.waiting),
                    check: std::mem::take(&mut process.unchecked),
                    untried: true,
                    refused: false,
                    made: false,
                });
            }
            Action::Read(_) => {
                let known = self.known(folder, process);
                let waits = matches!(
                    self.twist,
                    Twist::TokenOfTheStepAndReplies | Twist::TokenOfTheStepAndRefusalsRead
                );
                let step = process.step.as_mut().filter(|step| !step.made)?;
                if waits && step.untried && !step.refused {
                    return None;
                }
                let found = state.store.fence(folder.instance);
                let standing = match self.twist {
                    Twist::NoReread => Standing::Current,
                    Twist::TokenOfTheStepAndRefusalsRead => known.judge(found),
                    _ if step.refused => known.judge_refusal(found, true),
                    _ => known.judge(found),
                };
                let was_untried = std::mem::take(&mut step.untried);
                step.refused = false;
                match standing {
                    Standing::Current => step.made = true,
                    Standing::Pending => {
                        let (instance, to) = (folder.instance, step.fence);
                        let again = CompareAndSet { by: at, instance, from: found, to };
                        if !state.network.insert(again) && !was_untried {
                            return None;
                        }
                    }
                    // The leases are given back, as by a stop.
                    Standing::Stale => {
                        folder.is_stale = true;
                        folder.give_back(process.leased());
                        *life = Life::Stale;
                    }
                    Standing::StoreBehind => {
                        folder.give_back(process.leased());
                        *life = Life::StoreBehind;
                    }
                }
            }
            Action::Look(_) => {
                let known = KnownFence::at(folder.known.last());
                let standing = match known.judge(state.store.fence(folder.instance)) {
                    _ if process.step.is_some() => return None,
                    Standing::Current if state.store.space == Some(folder.space) => return None,
                    standing => standing,
                };
                folder.is_stale = standing == Standing::Stale;
                folder.give_back(process.leased());
                *life = if folder.is_stale { Life::Stale } else { Life::StoreBehind };
            }
            Action::Cover(_) => {
                let step = process.step.take_if(|step| step.made)?;
                let check = step.check && self.twist != Twist::ClaimsReadOnce;
                let compares =
                    !matches!(self.twist, Twist::SpaceNotCompared | Twist::SpaceNotComparedByLooks);
                let ours = state.store.claims_of(folder.instance);
                let is_there = process.held.with(folder.opened()).is_within(ours)
                    && (!compares || state.store.space == Some(folder.space));
                if check && !is_there {
                    folder.give_back(process.leased().with(step.values));
                    *life = Life::StoreBehind;
                    return Some(state);
                }
                if matches!(self.twist, Twist::NoIntent | Twist::NoIntentButAGuess) {
                    folder.known = KnownFence::at(Some(step.fence));
                }
                process.covered = process.covered.with(step.values);
            }
            Action::HandOut(_, value) => {
                let value = *value;
                if !process.covered.has(value) {
                    return None;
                }
                process.covered.remove(value);
                let partition = folder.space.partition(value);
                let forgotten = !state.store.claims_of(folder.instance).has(partition);
                state.unnoticed |= forgotten && !process.before_restore.has(value);
                let again = state.handed_out.has(value);
                if again { &mut state.repeated } else { &mut state.handed_out }.insert(value);
            }
            _ => unreachable!("each of a machine's own is above"),
        }
        Some(state)
    }

    /// Returns the state after an action of the network or of the disks' operators, or `None` if it can't
    /// happen.
    fn occur(&self, mut state: State, action: &Action) -> Option<State> {
        match action {
            Action::Deliver(sent) => {
                state.network.remove(sent);
                let fence = &mut state.store.fences[usize::from(sent.instance)];
                let made = *fence == sent.from;
                if made {
                    *fence = Some(sent.to);
                }
                // If the sender still waits for the reply, it learns the outcome, possibly late.
                if let Life::Up(Process { step: Some(step), .. }) =
                    &mut state.machines[sent.by].life
                    && step.fence == sent.to
                {
                    step.made |= made;
                    step.refused |= !made && step.untried;
                } else {
                    state.landed_late |= made;
                }
            }
            Action::CopyFence(of) => {
                state.budget.copies = state.budget.copies.checked_sub(1)?;
                let folder = state.machines[*of].folder.clone()?;
                state.copy = Some(Copy { of: *of, folder, whole: false });
            }
            Action::CopyRows => {
                let copy = state.copy.as_mut().filter(|copy| !copy.whole)?;
                let folder = state.machines[copy.of].folder.as_ref()?;
                // If the folder was set aside in between, there is another one now.
                if folder.instance != copy.folder.instance {
                    return None;
                }
                match self.twist {
                    Twist::FenceCopiedLast => copy.folder.known = folder.known,
                    _ => copy.folder.rows = folder.rows,
                }
                copy.whole = true;
            }
            Action::Restore(to) => {
                state.budget.restores = state.budget.restores.checked_sub(1)?;
                let copy = state.copy.as_ref().filter(|copy| copy.whole)?;
                let machine = &mut state.machines[*to];
                if machine.process().is_some() {
                    return None;
                }
                *machine = Machine { folder: Some(copy.folder.clone()), life: Life::Down };
            }
            Action::CopyStore => {
                if state.budget.store_restores == 0 || state.store_copy.is_some() {
                    return None;
                }
                state.store_copy = Some(state.store.clone());
            }
            Action::RestoreStore => {
                let copy = state.store_copy.take()?;
                state.budget.store_restores = state.budget.store_restores.checked_sub(1)?;
                let copies_are_about = state.budget.copies < self.budget.copies;
                let store = &state.store;
                let lost = Set::of(|value| {
                    let partition = store.space.map(|space| space.partition(value));
                    partition.is_some_and(|partition| {
                        store.claims[partition].is_some_and(|holder| {
                            let step_lost = store.fence(holder) != copy.fence(holder);
                            copy.claims[partition].is_none() || (step_lost && copies_are_about)
                        })
                    })
                });
                state.excused = state.excused.with(lost);
                state.store = copy;
                for machine in &mut state.machines {
                    if let Life::Up(process) = &mut machine.life {
                        process.before_restore = process.leased();
                    }
                }
            }
            _ => unreachable!("those of a machine are elsewhere"),
        }
        Some(state)
    }
}

impl Model for Fleet {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            machines: Default::default(),
            store: Store::default(),
            network: HashableHashSet::default(),
            copy: None,
            store_copy: None,
            budget: self.budget,
            handed_out: Set::default(),
            repeated: Set::default(),
            excused: Set::default(),
            unnoticed: false,
            landed_late: false,
            reseeded: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for at in 0..self.machines {
            actions.extend([
                Action::Start(at),
                Action::Crash(at),
                Action::Stop(at),
                Action::List(at),
                Action::Begin(at),
                Action::Read(at),
                Action::Look(at),
                Action::Cover(at),
                Action::CopyFence(at),
                Action::Restore(at),
                Action::Reseed(at),
            ]);
            for value in 0..self.values {
                actions.extend([
                    Action::Claim(at, value),
                    Action::Draw(at, value),
                    Action::Lease(at, value),
                    Action::HandOut(at, value),
                ]);
            }
        }
        actions.extend(state.sent().into_iter().map(Action::Deliver));
        actions.extend([Action::CopyRows, Action::CopyStore, Action::RestoreStore]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        self.act(last, &action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(UNIQUE, |_, state| state.repeated.is_within(state.excused)),
            Property::<Self>::always(NOTICED, |_, state| !state.unnoticed),
            Property::<Self>::always(OWN_DOING, |model, state| {
                let alone = state.budget.copies == model.budget.copies
                    && state.budget.store_restores == model.budget.store_restores;
                let refused = [Life::Stale, Life::StoreBehind];
                !alone || !state.machines.iter().any(|machine| refused.contains(&machine.life))
            }),
            Property::<Self>::sometimes(ALL_SERVE, |_, state| {
                let Some(space) = state.store.space else { return false };
                let served = (0..VALUES).filter(|value| state.handed_out.has(*value));
                let partitions = served.map(|value| space.partition(value));
                let holders: BTreeSet<_> = partitions.map(|s| state.store.claims[s]).collect();
                holders.len() == MACHINES
            }),
            Property::<Self>::sometimes(STALE, |_, state| {
                state.machines.iter().any(|machine| machine.life == Life::Stale)
            }),
            Property::<Self>::sometimes(LATE, |_, state| state.landed_late),
            Property::<Self>::sometimes(RESEEDED, |_, state| state.reseeded),
            Property::<Self>::sometimes(BEHIND, |_, state| {
                state.machines.iter().any(|machine| machine.life == Life::StoreBehind)
            }),
        ]
    }
}

/// A restore of the store excuses repetitions that no instance can detect. An instance that joins afterwards
/// can't know which partitions others had claimed, so numbers of these can be handed out again by a new
/// holder. If a store and a folder were both restored to a state before a step, they agree with each other,
/// which excuses the partitions of that folder.
const UNIQUE: &str = "no value is handed out twice";

/// The promise that remains after a restore of the store: from a claimed partition that the store has
/// forgotten, an instance hands out what it had leased by then, and no more.
const NOTICED: &str = "the holder of a forgotten claim goes no further than its leases";

/// Neither crashes nor lost or late messages cost an instance its folder.
const OWN_DOING: &str = "no folder is refused unless it was copied or its store was restored";

const ALL_SERVE: &str = "each machine hands out values";
const STALE: &str = "a copy is found stale";
const LATE: &str = "a compare-and-set is made after its sender has ended";
const BEHIND: &str = "a store that was restored is detected";
const RESEEDED: &str = "a store that is behind is reseeded";

const NOTHING: Budget = Budget { ends: 0, copies: 0, restores: 0, store_restores: 0 };
const ENDS: Budget = Budget { ends: 1, ..NOTHING };
const COPY: Budget = Budget { copies: 1, restores: 1, ..NOTHING };
const STORE: Budget = Budget { store_restores: 1, ..NOTHING };

/// Returns whether to check fleets in which more faults combine.
fn larger() -> bool {
    std::env::var_os("FLEET_MODEL").is_some_and(|wanted| wanted == "large")
}

/// Checks that each promise is kept in all states, and that each of `examples` occurs in some.
fn holds(values: usize, budget: Budget, examples: &[&'static str]) {
    let fleet = Fleet { twist: Twist::None, machines: MACHINES, values, budget };
    holds_in(fleet, examples);
}

fn holds_in(fleet: Fleet, examples: &[&'static str]) {
    let shown = format!("{fleet:?}");
    let checker = fleet.checker().symmetry_fn(State::representative).spawn_dfs().join();
    println!("{shown}: {} states", checker.unique_state_count());
    assert!(checker.is_done());
    for promise in [UNIQUE, NOTICED, OWN_DOING] {
        checker.assert_no_discovery(promise);
    }
    for example in examples {
        checker.assert_any_discovery(example);
    }
}

/// Returns the shortest way to break this promise, if there is one.
fn broken(
    twist: Twist,
    machines: usize,
    values: usize,
    budget: Budget,
    promise: &'static str,
) -> Option<Vec<Action>> {
    let fleet = Fleet { twist, machines, values, budget };
    let first = HasDiscoveries::AnyOf([promise].into());
    let checker = fleet.checker().finish_when(first).spawn_bfs().join();
    checker.discovery(promise).map(|path| path.into_actions())
}

/// Checks that the twist breaks a promise that the protocol keeps with the same faults.
fn breaks(twist: Twist, budget: Budget, promise: &'static str) {
    assert_eq!(broken(Twist::None, MACHINES, 1, budget, promise), None);
    is_broken(twist, MACHINES, 1, budget, promise);
}

fn is_broken(twist: Twist, machines: usize, values: usize, budget: Budget, promise: &'static str) {
    let way = broken(twist, machines, values, budget, promise)
        .unwrap_or_else(|| panic!("{twist:?} breaks nothing"));
    println!("{twist:?} breaks {promise:?}:");
    way.iter().for_each(|action| println!("    {action:?}"));
}

#[test]
fn crashes_and_lost_replies_repeat_nothing_and_cost_no_folder() {
    holds(3, ENDS, &[ALL_SERVE, LATE]);
}

#[test]
fn of_copies_one_goes_on() {
    holds(2, COPY, &[STALE]);
    holds(1, Budget { ends: 1, restores: 2, ..COPY }, &[STALE, LATE]);
    if larger() {
        holds(2, Budget { ends: 1, ..COPY }, &[STALE, LATE]);
    }
}

#[test]
fn a_store_that_was_restored_is_found_out() {
    holds(2, STORE, &[BEHIND, RESEEDED]);
    holds(1, Budget { ends: 1, ..STORE }, &[BEHIND, LATE]);
    holds(1, Budget { store_restores: 1, ..COPY }, &[BEHIND, STALE]);
    if larger() {
        holds(1, Budget { ends: 1, store_restores: 1, ..COPY }, &[BEHIND, STALE, LATE]);
    }
}

#[test]
fn without_the_fence_a_copy_repeats() {
    breaks(Twist::NoFence, COPY, UNIQUE);
}

/// Without the intent nothing is repeated, but after a crash the store may have a step that the folder does
/// not know of. That is also the case for an old copy, so the crash costs the folder.
#[test]
fn without_the_intent_a_crash_makes_a_folder_stale() {
    breaks(Twist::NoIntent, ENDS, OWN_DOING);
    assert_eq!(broken(Twist::NoIntent, MACHINES, 1, COPY, UNIQUE), None);
}

/// The obvious remedy for that is not safe.
#[test]
fn without_the_intent_a_step_can_not_be_taken_for_ones_own() {
    breaks(Twist::NoIntentButAGuess, COPY, UNIQUE);
}

#[test]
fn an_intent_before_the_lease_repeats() {
    breaks(Twist::IntentBeforeLease, COPY, UNIQUE);
}

#[test]
fn a_reused_token_repeats_numbers() {
    breaks(Twist::TokenOfTheStep, COPY, UNIQUE);
}

/// As long as replies arrive, one of two clones learns that it did not make the step, whatever its token.
#[test]
fn of_clones_that_draw_one_token_the_refused_one_ends() {
    breaks(Twist::TokenOfTheStepAndRefusalsRead, COPY, UNIQUE);
    let replies = Twist::TokenOfTheStepAndReplies;
    assert_eq!(broken(replies, MACHINES, 1, COPY, UNIQUE), None);
}

#[test]
fn without_reading_again_a_copy_repeats() {
    breaks(Twist::NoReread, COPY, UNIQUE);
}

#[test]
fn a_copy_whose_fence_is_newer_than_its_shards_repeats() {
    breaks(Twist::FenceCopiedLast, COPY, UNIQUE);
}

#[test]
fn claims_that_are_not_checked_after_a_step_can_be_lost() {
    breaks(Twist::ClaimsReadOnce, STORE, NOTICED);
}

/// Story: the store came back empty before an instance's first claim, and another instance created the space
/// again with another secret. [`holds`] shows that the protocol keeps its promise with the same faults.
#[test]
fn a_space_that_was_begun_again_repeats_unless_it_is_compared() {
    is_broken(Twist::SpaceNotCompared, 2, 2, STORE, UNIQUE);
}

/// Each comparison is enough without the other: a claim compares at the moment that creates it, and a check
/// comes after the step.
#[test]
fn either_comparison_of_the_space_is_enough() {
    for twist in [Twist::SpaceNotComparedByClaims, Twist::SpaceNotComparedByLooks] {
        holds_in(Fleet { twist, machines: 2, values: 2, budget: STORE }, &[BEHIND]);
    }
}
