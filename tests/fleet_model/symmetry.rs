//! Reduces states that differ only in names to one: machines, instances and tokens are interchangeable. Knows
//! nothing of what they do.

use std::hash::{DefaultHasher, Hash, Hasher};

use uuid::Uuid;

use super::{
    Copy, Fence, Folder, INSTANCES, Instance, KnownFence, Life, MACHINES, Machine, State, Store,
};

/// New names, in the order in which the old ones occur.
#[derive(Default)]
struct Names {
    instances: Vec<Instance>,
    tokens: Vec<Uuid>,
}

impl State {
    /// Returns one state for all states that differ only in names. If machines can't be distinguished without
    /// names, there may be several such states.
    pub(super) fn representative(&self) -> Self {
        let nameless = |index: &usize| {
            let mut names = Names::default();
            let mut hasher = DefaultHasher::new();
            names.machine(&self.machines[*index]).hash(&mut hasher);
            self.copy.as_ref().is_some_and(|copy| copy.of == *index).hash(&mut hasher);
            hasher.finish()
        };
        let mut order: [usize; MACHINES] = std::array::from_fn(|index| index);
        order.sort_by_cached_key(nameless);
        let mut names = Names::default();
        let machines = order.map(|index| names.machine(&self.machines[index]));
        let place = |of: usize| order.iter().position(|index| *index == of).expect("one of them");
        let copy = self.copy.as_ref().map(|copy| Copy {
            of: place(copy.of),
            folder: names.folder(&copy.folder),
            whole: copy.whole,
        });
        let store = names.store(&self.store);
        let store_copy = self.store_copy.as_ref().map(|store| names.store(store));
        let mut sent = self.sent();
        for sent in &mut sent {
            sent.by = place(sent.by);
            sent.instance = names.instance(sent.instance);
            sent.from = names.fence(sent.from);
            sent.to = names.fence(Some(sent.to)).expect("as many");
        }
        let network = sent.into_iter().collect();
        Self { machines, store, network, copy, store_copy, ..self.clone() }
    }
}

impl Names {
    fn instance(&mut self, old: Instance) -> Instance {
        let known = self.instances.iter().position(|instance| *instance == old);
        let new = known.unwrap_or_else(|| {
            self.instances.push(old);
            self.instances.len() - 1
        });
        new as Instance
    }

    fn fence(&mut self, old: Option<Fence>) -> Option<Fence> {
        old.map(|fence| Fence { token: self.token(fence.token), ..fence })
    }

    fn token(&mut self, old: Uuid) -> Uuid {
        // The nil token is not drawn, and is the same for all.
        if old.is_nil() {
            return old;
        }
        let known = self.tokens.iter().position(|token| *token == old);
        let new = known.unwrap_or_else(|| {
            self.tokens.push(old);
            self.tokens.len() - 1
        });
        Uuid::from_u128(new as u128 + 1)
    }

    fn machine(&mut self, old: &Machine) -> Machine {
        let mut machine = Machine {
            folder: old.folder.as_ref().map(|folder| self.folder(folder)),
            life: old.life.clone(),
        };
        if let Life::Up(process) = &mut machine.life
            && let Some(step) = &mut process.step
        {
            step.fence.token = self.token(step.fence.token);
        }
        machine
    }

    fn folder(&mut self, old: &Folder) -> Folder {
        let KnownFence { fence, intent } = old.known;
        let known = KnownFence { fence: self.fence(fence), intent: self.fence(intent) };
        Folder { instance: self.instance(old.instance), known, ..old.clone() }
    }

    fn store(&mut self, old: &Store) -> Store {
        let mut fences = [None; INSTANCES];
        let claims = old.claims.map(|claim| claim.map(|instance| self.instance(instance)));
        for (instance, fence) in old.fences.iter().enumerate() {
            if fence.is_some() {
                fences[usize::from(self.instance(instance as Instance))] = self.fence(*fence);
            }
        }
        Store { space: old.space, claims, fences }
    }
}
