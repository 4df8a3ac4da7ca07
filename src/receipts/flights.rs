//! The requests under way, by their keys: a repetition waits for the first request instead of racing it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;

use super::record::KeyDigest;

/// The keys of all requests under way.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<KeyDigest, watch::Receiver<()>>>);

/// The first request with a key. Repetitions wait until this is dropped.
#[derive(Debug)]
pub(super) struct Flight {
    flights: Arc<Flights>,
    key: KeyDigest,
    /// Wakes the repetitions when it is dropped.
    _landed: watch::Sender<()>,
}

impl Flights {
    /// Begins a flight, once no other request with the key is under way.
    pub(super) async fn begin(self: &Arc<Self>, key: KeyDigest) -> Flight {
        loop {
            let mut other = match self.lock().entry(key) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.get().clone(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    let (landed, waiting) = watch::channel(());
                    entry.insert(waiting);
                    return Flight { flights: Arc::clone(self), key, _landed: landed };
                }
            };
            // Nothing is ever sent: the wait ends when the sender is dropped.
            let _ = other.changed().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyDigest, watch::Receiver<()>>> {
        self.0.lock().expect("no holder of it panics")
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Before the sender is dropped, so that the repetitions that it wakes find the key free.
        self.flights.lock().remove(&self.key);
    }
}
