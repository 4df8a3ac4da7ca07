//! A store in memory for tests, which loses replies and is away when it is told to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::StoreError;

/// What goes wrong with the changes to come, one after the other; then nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The change is not made.
    Lost,
    /// The change is made, and the caller hears of an error.
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
    /// Plans what goes wrong, the first first.
    pub(crate) fn fail(&self, faults: &[Fault]) {
        self.content().faults = faults.iter().rev().copied().collect();
    }

    /// From now on nobody reaches it, or all do again.
    pub(crate) fn set_away(&self, away: bool) {
        self.content().away = away;
    }

    /// All that is there: to look at, or to keep as a copy.
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

    pub(super) async fn create(&self, entries: &[(String, String)]) -> Result<(), StoreError> {
        self.change(|content| {
            for (key, value) in entries {
                content.entry(key.clone()).or_insert_with(|| value.clone());
            }
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
