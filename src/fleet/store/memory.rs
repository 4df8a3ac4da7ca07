//! A store in memory for tests, which can lose replies and be unreachable.

use std::collections::BTreeMap;
use std::future::ready;
use std::sync::{Arc, Mutex};

use super::{FleetStore, FleetStoreError, Reply};

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
pub(crate) struct MemoryStore(Arc<Mutex<Content>>);

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

    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, String>) -> T,
    ) -> Result<T, FleetStoreError> {
        self.reach()?;
        let mut content = self.content();
        let fault = content.faults.pop().unwrap_or(Fault::None);
        if fault == Fault::Lost {
            return Err(error());
        }
        let done = change(&mut content.entries);
        if fault == Fault::ReplyLost { Err(error()) } else { Ok(done) }
    }

    fn reach(&self) -> Result<(), FleetStoreError> {
        if self.content().away { Err(error()) } else { Ok(()) }
    }

    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.0.lock().expect("nothing panics with it")
    }
}

impl FleetStore for MemoryStore {
    fn address(&self) -> String {
        "memory".to_owned()
    }

    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<String>> {
        Box::pin(async move { self.reach().map(|()| self.content().entries.get(key).cloned()) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, BTreeMap<String, String>> {
        Box::pin(async move {
            self.reach()?;
            let mut entries = self.entries();
            entries.retain(|key, _| key.starts_with(prefix));
            Ok(entries)
        })
    }

    fn create_where<'a>(
        &'a self,
        given: &'a [(String, String)],
        entries: &'a [(String, String)],
    ) -> Reply<'a, bool> {
        Box::pin(ready(self.change(|content| {
            if given.iter().any(|(key, value)| content.get(key) != Some(value)) {
                return false;
            }
            let before = content.len();
            for (key, value) in entries {
                content.entry(key.clone()).or_insert_with(|| value.clone());
            }
            content.len() == before + entries.len()
        })))
    }

    fn replace<'a>(&'a self, key: &'a str, from: &'a str, to: &'a str) -> Reply<'a, bool> {
        Box::pin(ready(self.change(|content| match content.get_mut(key) {
            Some(value) if value == from => {
                to.clone_into(value);
                true
            }
            _ => false,
        })))
    }
}

fn error() -> FleetStoreError {
    FleetStoreError { address: "memory".to_owned(), problem: "it was told to fail".to_owned() }
}
