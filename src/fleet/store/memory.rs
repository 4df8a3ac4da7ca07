//! A store in memory for tests, which can lose replies and be unreachable.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::StoreError;

/// The fate of one change to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The change succeeds.
    None,
    /// The change is not made.
    Lost,
    /// The change is made, but the caller gets an error.
    ReplyLost,
}

#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    entries: BTreeMap<String, String>,
    faults: Vec<Fault>,
    away: bool,
}

impl MemoryStore {
    /// Sets the faults of the next changes, in their order. Later changes have none.
    pub(crate) fn fail(&self, faults: &[Fault]) {
        self.content().faults = faults.iter().rev().copied().collect();
    }

    /// Makes the store unreachable, or reachable again.
    pub(crate) fn set_away(&self, away: bool) {
        self.content().away = away;
    }

    /// Returns a copy of all entries.
    pub(crate) fn entries(&self) -> BTreeMap<String, String> {
        self.content().entries.clone()
    }

    /// Restores it from a copy.
    pub(crate) fn restore(&self, entries: BTreeMap<String, String>) {
        self.content().entries = entries;
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<String>, StoreError> {
        self.reach()?;
        Ok(self.content().entries.get(key).cloned())
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<BTreeMap<String, String>, StoreError> {
        self.reach()?;
        let mut entries = self.entries();
        entries.retain(|key, _| key.starts_with(prefix));
        Ok(entries)
    }

    pub(super) async fn create(
        &self,
        given: &[(String, String)],
        entries: &[(String, String)],
    ) -> Result<bool, StoreError> {
        self.change(|content| {
            if given.iter().any(|(key, value)| content.get(key) != Some(value)) {
                return false;
            }
            let before = content.len();
            for (key, value) in entries {
                content.entry(key.clone()).or_insert_with(|| value.clone());
            }
            content.len() == before + entries.len()
        })
    }

    pub(super) async fn replace(
        &self,
        key: &str,
        from: &str,
        to: &str,
    ) -> Result<bool, StoreError> {
        self.change(|content| match content.get_mut(key) {
            Some(value) if value == from => {
                to.clone_into(value);
                true
            }
            _ => false,
        })
    }

    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, String>) -> T,
    ) -> Result<T, StoreError> {
        self.reach()?;
        let mut content = self.content();
        let fault = content.faults.pop().unwrap_or(Fault::None);
        if fault == Fault::Lost {
            return Err(error());
        }
        let done = change(&mut content.entries);
        if fault == Fault::ReplyLost { Err(error()) } else { Ok(done) }
    }

    fn reach(&self) -> Result<(), StoreError> {
        if self.content().away { Err(error()) } else { Ok(()) }
    }

    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.0.lock().expect("nothing panics with it")
    }
}

fn error() -> StoreError {
    StoreError { address: "memory".to_owned(), problem: "it was told to fail".to_owned() }
}
