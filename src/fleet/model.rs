//! The fleet's protocol under stateright: whatever instances, the network, the disks and their keepers
//! can do in a small fleet, in every order, to its end. Only files, networks and engines are stand-ins:
//! what a fence proves is decided by the product's own [rule](super::protocol).
//!
//! To be read as the specification: [`Fleet::act`] and [`Fleet::befall`] have an arm for each action,
//! [`Fleet::properties`] has what is promised, and each [`Twist`] is a protocol that looks as good and
//! is not. Anyone may pause at any time: that is an order in which others act.
//!
//! `FLEET_MODEL=large` looks at five times as many states.

mod symmetry;

use std::collections::BTreeSet;

use stateright::util::HashableHashSet;
use stateright::{Checker, HasDiscoveries, Model, Property};
use uuid::Uuid;

use super::protocol::{Fence, Known, Standing};

/// Machines, each with a folder and a process. They are alike.
const MACHINES: usize = 3;
/// Values, each a stratum of its own: the fewest in which instances can get into each other's way.
const VALUES: usize = 3;
/// Instances that can join: one a machine, and one in place of a folder that was found stale.
const INSTANCES: usize = 4;

/// An instance's name; the product's is a uuid.
type Instance = u8;

/// Values, or the strata that they are, one bit each.
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

/// What is in the store. It is linearizable: each change of it is one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Store {
    claims: [Option<Instance>; VALUES],
    fences: [Option<Fence>; INSTANCES],
}

impl Store {
    fn fence(&self, instance: Instance) -> Option<Fence> {
        self.fences[usize::from(instance)]
    }

    fn claims_of(&self, instance: Instance) -> Set {
        Set::of(|stratum| self.claims[stratum] == Some(instance))
    }

    /// Puts back what the folder knows, unless others hold what it has drawn from. Answers whether it did.
    fn reseed(&mut self, folder: &Folder) -> bool {
        let instance = folder.instance;
        let ours_or_free = Set::of(|stratum| self.claims[stratum].is_none_or(|h| h == instance));
        let standing = folder.known.judge(self.fence(instance));
        if !folder.opened().is_within(ours_or_free) || standing == Standing::Stale {
            return false;
        }
        for stratum in (0..VALUES).filter(|stratum| folder.opened().has(*stratum)) {
            self.claims[stratum] = Some(instance);
        }
        if standing == Standing::StoreBehind {
            let last = folder.known.intent.or(folder.known.fence);
            self.fences[usize::from(instance)] = last;
        }
        true
    }
}

/// A compare-and-set on its way to the store, which may take any time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct CompareAndSet {
    instance: Instance,
    from: Option<Fence>,
    to: Fence,
}

/// A value in the ledger and the shards of a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Row {
    #[default]
    Undrawn,
    /// In a shard, to be leased.
    Unused,
    /// Leased, for good or until it is given back.
    Used,
}

/// What is on a machine's disk. Each change of it is one commit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Folder {
    instance: Instance,
    known: Known,
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

    /// The strata that the ledger has opened.
    fn opened(&self) -> Set {
        Set::of(|value| self.rows[value] != Row::Undrawn)
    }
}

/// What a process has in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Process {
    /// The strata that the store said are ours.
    held: Set,
    /// Strata were listed since the last step was begun, or the process has begun none: the next step
    /// ends with a look at the claims.
    unchecked: bool,
    /// Leased, and waiting for a step.
    waiting: Set,
    step: Option<Step>,
    /// Leased and covered by a step that was made: to be handed out.
    covered: Set,
    /// Of all these, what was leased before the store was restored. Only the properties look at it.
    before_restore: Set,
}

impl Process {
    /// All that is leased and not handed out.
    fn leased(&self) -> Set {
        let under_way = self.step.as_ref().map(|step| step.values).unwrap_or_default();
        self.waiting.with(under_way).with(self.covered)
    }
}

/// A step that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Step {
    fence: Fence,
    /// What will be handed out when it is made.
    values: Set,
    /// Before that, the claims are read again. A store that was restored before this step, from a copy
    /// without these claims, does not have them now; one that is restored after it does not have the
    /// step, so that the next one fails. Without this look, one that was restored between a claim and
    /// the step that follows it would go unnoticed: what a fence proves is steps.
    check: bool,
    /// The process knows, or is about to be told, that it was made.
    made: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Life {
    #[default]
    Down,
    Up(Process),
    /// It ended itself, or did not start: another copy of its folder has gone on.
    Stale,
    /// It ended itself, or did not start: the store has forgotten what it knows.
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
    /// What is copied later is there.
    whole: bool,
}

/// How much more of what is bad may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Budget {
    /// Crashes and stops.
    ends: u8,
    /// Copies of folders.
    copies: u8,
    /// Times that a copy of a folder is put on a machine, in place of what is there.
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
    /// What callers got.
    handed_out: Set,
    /// What they got again. The properties look at this and all below.
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
    /// The number is the machine's, here and below.
    Start(usize),
    /// `kill -9`, a power loss.
    Crash(usize),
    /// A stop gives back what is leased and not handed out.
    Stop(usize),
    /// Creates the claim of a stratum, if absent. The second is the stratum or value, here and below.
    Claim(usize, usize),
    /// Reads whose the strata are.
    List(usize),
    /// Draws a value from a stratum that is held into a shard.
    Draw(usize, usize),
    Lease(usize, usize),
    /// Commits the intent and sends the compare-and-set.
    Begin(usize),
    /// It gets to the store, at last.
    Deliver(CompareAndSet),
    /// The answer is lost, late, or says that the fence was another: reads it.
    Read(usize),
    /// Knows that the step was made: what it covers may be handed out.
    Cover(usize),
    HandOut(usize, usize),
    /// `tombola fleet reseed`.
    Reseed(usize),
    /// The first half of a copy of a folder: what it knows of its fence. A copy of one moment is the
    /// one where nothing happens between the halves.
    CopyFence(usize),
    /// The second half, ledgers and shards. Anything may have happened since the first.
    CopyRows,
    /// A machine that is down is given the copy: the one that was copied, or another.
    Restore(usize),
    CopyStore,
    RestoreStore,
}

/// What is otherwise than in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Twist {
    None,
    /// What is leased is handed out.
    NoFence,
    /// The folder notes a step only once it is known to be made.
    NoIntent,
    /// As above, and a start takes a store that is one step on for its own doing.
    NoIntentButAGuess,
    /// Rows that are leased while a step is under way are covered by it.
    IntentBeforeLease,
    /// Copies of a folder make the same step with the same token.
    TokenOfTheStep,
    /// When no answer comes the step is taken to be made.
    NoReread,
    /// Claims are read before the step that follows them, and not after it.
    ClaimsReadOnce,
    /// A copy of a folder has its ledgers and shards first. The product finds such copies too, by the
    /// leases that a fence says it covers; the model does without.
    FenceCopiedLast,
}

#[derive(Clone, Debug)]
struct Fleet {
    twist: Twist,
    /// How many there are, up to [`VALUES`].
    values: usize,
    budget: Budget,
}

impl State {
    /// The instances that somebody somewhere remembers, and the tokens.
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

    /// What is on its way, in an order that does not depend on how a set is kept.
    fn sent(&self) -> Vec<CompareAndSet> {
        let mut sent: Vec<_> = self.network.iter().cloned().collect();
        let token = |fence: Fence| fence.token;
        sent.sort_by_key(|sent| (sent.instance, token(sent.to), sent.from.map(token)));
        sent
    }

    /// One that nobody remembers: as good as one that never was.
    fn new_instance(&self) -> Option<Instance> {
        let (instances, _) = self.remembered();
        (0..INSTANCES as Instance).find(|instance| !instances.contains(instance))
    }

    /// As [`Self::new_instance`].
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
    /// What the process knows of its fence.
    fn known(&self, folder: &Folder, process: &Process) -> Known {
        match (self.twist, &process.step) {
            (Twist::NoIntent | Twist::NoIntentButAGuess, Some(step)) => {
                Known { fence: folder.known.fence, intent: Some(step.fence) }
            }
            _ => folder.known,
        }
    }

    /// A process looks at what its folder is, before all else.
    fn start(&self, last: &State, at: usize) -> Option<State> {
        let mut state = last.clone();
        let Machine { folder, life } = &mut state.machines[at];
        if matches!(life, Life::Up(_)) {
            return None;
        }
        let Some(folder) = folder else {
            // It joins, or joins anew.
            let instance = last.new_instance()?;
            *folder = Some(Folder { instance, known: Known::default(), rows: Default::default() });
            *life = Life::Up(Process { unchecked: true, ..Process::default() });
            return Some(state);
        };
        let found = state.store.fence(folder.instance);
        if self.twist == Twist::NoIntentButAGuess
            && let Some(next) = found
            && next.step == Fence::after(folder.known.fence, next.token).step
        {
            folder.known = Known::at(found);
        }
        let mut process = Process { unchecked: true, ..Process::default() };
        let is_whole = folder.opened().is_within(state.store.claims_of(folder.instance));
        *life = match folder.known.judge(found) {
            Standing::Current | Standing::Pending if !is_whole => Life::StoreBehind,
            Standing::Current => Life::Up(process),
            Standing::Pending => {
                // What it was begun for was leased by a process that is no more: it covers nothing
                // now. It is made all the same, so that nothing is under way when the next begins.
                let fence = folder.known.intent.expect("something is pending");
                let instance = folder.instance;
                state.network.insert(CompareAndSet { instance, from: found, to: fence });
                let values = Set::default();
                process.step = Some(Step { fence, values, check: false, made: false });
                Life::Up(process)
            }
            Standing::Stale => {
                // Set aside: the next start is that of a new instance.
                state.machines[at] = Machine { folder: None, life: Life::Stale };
                return Some(state);
            }
            Standing::StoreBehind => Life::StoreBehind,
        };
        (state != *last).then_some(state)
    }

    /// What a machine does on its own, `None` where it can't.
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
        | Action::Cover(at)
        | Action::HandOut(at, _)
        | Action::Reseed(at)) = *action
        else {
            return self.befall(last.clone(), action);
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
            // One that lands late is one that was made late: nothing tells them apart.
            Action::Claim(_, stratum) => {
                let claim = &mut state.store.claims[*stratum];
                if claim.is_some() {
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
                if !process.held.has(*value) || folder.rows[*value] != Row::Undrawn {
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
                    Twist::TokenOfTheStep => Uuid::nil(),
                    _ => last.new_token(),
                };
                let known = folder.known.begin(token);
                let fence = known.intent.expect("begun");
                if !matches!(self.twist, Twist::NoIntent | Twist::NoIntentButAGuess) {
                    folder.known = known;
                }
                let instance = folder.instance;
                state.network.insert(CompareAndSet { instance, from: known.fence, to: fence });
                let values = std::mem::take(&mut process.waiting);
                let check = std::mem::take(&mut process.unchecked);
                process.step = Some(Step { fence, values, check, made: false });
            }
            Action::Read(_) => {
                let known = self.known(folder, process);
                let step = process.step.as_mut().filter(|step| !step.made)?;
                let found = state.store.fence(folder.instance);
                let standing = match self.twist {
                    Twist::NoReread => Standing::Current,
                    _ => known.judge(found),
                };
                match standing {
                    Standing::Current => step.made = true,
                    Standing::Pending => {
                        let (instance, to) = (folder.instance, step.fence);
                        let again = CompareAndSet { instance, from: found, to };
                        if !state.network.insert(again) {
                            return None;
                        }
                    }
                    // As a stop does.
                    Standing::Stale => {
                        folder.give_back(process.leased());
                        *life = Life::Stale;
                    }
                    Standing::StoreBehind => {
                        folder.give_back(process.leased());
                        *life = Life::StoreBehind;
                    }
                }
            }
            Action::Cover(_) => {
                let step = process.step.take_if(|step| step.made)?;
                let check = step.check && self.twist != Twist::ClaimsReadOnce;
                let ours = state.store.claims_of(folder.instance);
                if check && !process.held.with(folder.opened()).is_within(ours) {
                    folder.give_back(process.leased().with(step.values));
                    *life = Life::StoreBehind;
                    return Some(state);
                }
                if matches!(self.twist, Twist::NoIntent | Twist::NoIntentButAGuess) {
                    folder.known = Known::at(Some(step.fence));
                }
                process.covered = process.covered.with(step.values);
            }
            Action::HandOut(_, value) => {
                let value = *value;
                if !process.covered.has(value) {
                    return None;
                }
                process.covered.remove(value);
                let forgotten = !state.store.claims_of(folder.instance).has(value);
                state.unnoticed |= forgotten && !process.before_restore.has(value);
                let again = state.handed_out.has(value);
                if again { &mut state.repeated } else { &mut state.handed_out }.insert(value);
            }
            _ => unreachable!("each of a machine's own is above"),
        }
        Some(state)
    }

    /// What the network and the keepers of the disks do.
    fn befall(&self, mut state: State, action: &Action) -> Option<State> {
        match action {
            Action::Deliver(sent) => {
                state.network.remove(sent);
                let fence = &mut state.store.fences[usize::from(sent.instance)];
                // Refused. The answer says no more than that the store is to be read.
                if *fence != sent.from {
                    return Some(state);
                }
                *fence = Some(sent.to);
                let mut expected = false;
                for machine in &mut state.machines {
                    // Who made it is told, and may be slow to hear it.
                    if let Life::Up(Process { step: Some(step), .. }) = &mut machine.life
                        && step.fence == sent.to
                    {
                        step.made = true;
                        expected = true;
                    }
                }
                state.landed_late |= !expected;
            }
            Action::CopyFence(of) => {
                state.budget.copies = state.budget.copies.checked_sub(1)?;
                let folder = state.machines[*of].folder.clone()?;
                state.copy = Some(Copy { of: *of, folder, whole: false });
            }
            Action::CopyRows => {
                let copy = state.copy.as_mut().filter(|copy| !copy.whole)?;
                let folder = state.machines[copy.of].folder.as_ref()?;
                // A folder that was set aside meanwhile is another.
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
                let lost = Set::of(|stratum| {
                    store.claims[stratum].is_some_and(|holder| {
                        let step_lost = store.fence(holder) != copy.fence(holder);
                        copy.claims[stratum].is_none() || (step_lost && copies_are_about)
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
        for at in 0..MACHINES {
            actions.extend([
                Action::Start(at),
                Action::Crash(at),
                Action::Stop(at),
                Action::List(at),
                Action::Begin(at),
                Action::Read(at),
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
                let served = (0..VALUES).filter(|value| state.handed_out.has(*value));
                let holders: BTreeSet<_> = served.map(|value| state.store.claims[value]).collect();
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

/// A restore of the store excuses what nobody can know any more. Who joins after it can't tell which
/// strata others had claimed, so that numbers of these strata can come again, from a new holder. And a
/// store and a folder that were both taken back to before a step agree with each other: that excuses the
/// strata of that folder.
const UNIQUE: &str = "no value is handed out twice";

/// What remains after a restore of the store: an instance that claimed a stratum which the store has
/// forgotten hands out of it what it had leased by then, and no more.
const NOTICED: &str = "whoever held what the store forgot goes no further than its leases";

/// Neither crashes nor what is lost or late on the network cost an instance its folder.
const OWN_DOING: &str = "no folder is refused that nobody copied and whose store was not restored";

const ALL_SERVE: &str = "each machine hands out";
const STALE: &str = "a copy is found stale";
const LATE: &str = "a compare-and-set is made when its sender is no more";
const BEHIND: &str = "a store that was restored is found out";
const RESEEDED: &str = "a store that is behind is reseeded";

const NOTHING: Budget = Budget { ends: 0, copies: 0, restores: 0, store_restores: 0 };
const ENDS: Budget = Budget { ends: 1, ..NOTHING };
const COPY: Budget = Budget { copies: 1, restores: 1, ..NOTHING };
const STORE: Budget = Budget { store_restores: 1, ..NOTHING };

/// Whether to look at fleets as well in which more accidents meet.
fn larger() -> bool {
    std::env::var_os("FLEET_MODEL").is_some_and(|wanted| wanted == "large")
}

/// Looks at all states, and finds each promise kept in all, and each of `examples` in some.
fn holds(values: usize, budget: Budget, examples: &[&'static str]) {
    let fleet = Fleet { twist: Twist::None, values, budget };
    let checker = fleet.checker().symmetry_fn(State::representative).spawn_dfs().join();
    println!("{budget:?}, {values} values: {} states", checker.unique_state_count());
    assert!(checker.is_done());
    for promise in [UNIQUE, NOTICED, OWN_DOING] {
        checker.assert_no_discovery(promise);
    }
    for example in examples {
        checker.assert_any_discovery(example);
    }
}

/// The shortest way to break this promise, if there is one.
fn broken(
    twist: Twist,
    values: usize,
    budget: Budget,
    promise: &'static str,
) -> Option<Vec<Action>> {
    let fleet = Fleet { twist, values, budget };
    let first = HasDiscoveries::AnyOf([promise].into());
    let checker = fleet.checker().finish_when(first).spawn_bfs().join();
    checker.discovery(promise).map(|path| path.into_actions())
}

/// The twist breaks what the protocol keeps with the same number of accidents.
fn breaks(twist: Twist, budget: Budget, promise: &'static str) {
    assert_eq!(broken(Twist::None, 1, budget, promise), None);
    let way =
        broken(twist, 1, budget, promise).unwrap_or_else(|| panic!("{twist:?} breaks nothing"));
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

/// Without it nothing is repeated: the store then has a step that the folder does not know, which is
/// what it has for an old copy too. So a crash at that moment costs the folder.
#[test]
fn without_the_intent_a_crash_makes_a_folder_stale() {
    breaks(Twist::NoIntent, ENDS, OWN_DOING);
    assert_eq!(broken(Twist::NoIntent, 1, COPY, UNIQUE), None);
}

/// And what would mend that is not safe.
#[test]
fn without_the_intent_a_step_can_not_be_taken_for_ones_own() {
    breaks(Twist::NoIntentButAGuess, COPY, UNIQUE);
}

#[test]
fn an_intent_before_the_lease_repeats() {
    breaks(Twist::IntentBeforeLease, COPY, UNIQUE);
}

#[test]
fn a_token_that_is_not_drawn_anew_repeats() {
    breaks(Twist::TokenOfTheStep, COPY, UNIQUE);
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
fn claims_that_are_not_read_after_a_step_can_be_gone() {
    breaks(Twist::ClaimsReadOnce, STORE, NOTICED);
}
