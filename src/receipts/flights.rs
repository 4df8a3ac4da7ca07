//! The requests under way, by their keys: a repetition waits for the first request instead of racing it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::oneshot;

use super::record::KeyDigest;

/// The keys of all requests under way, with the repetitions that wait for each.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<KeyDigest, Vec<oneshot::Sender<()>>>>);

/// The first request with a key. Repetitions wait until this is dropped.
#[derive(Debug)]
pub(super) struct Flight {
    flights: Arc<Flights>,
    key: KeyDigest,
}

impl Flights {
    /// Begins a flight, once no other request with the key is under way.
    pub(super) async fn begin(self: &Arc<Self>, key: KeyDigest) -> Flight {
        loop {
            let landed = match self.lock().entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(Vec::new());
                    return Flight { flights: Arc::clone(self), key };
                }
                Entry::Occupied(mut entry) => {
                    let (sender, landed) = oneshot::channel();
                    entry.get_mut().push(sender);
                    landed
                }
            };
            // Nothing is ever sent: the wait ends when the sender is dropped.
            let _ = landed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyDigest, Vec<oneshot::Sender<()>>>> {
        self.0.lock().expect("no holder of it panics")
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let waiting = self.flights.lock().remove(&self.key);
        // Wakes the repetitions, which find the key free.
        drop(waiting);
    }
}
