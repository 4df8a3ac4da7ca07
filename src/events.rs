//! The recent events of the shards and the server, for display. Knows nothing of how they are shown.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use crate::config::PoolName;

/// The number of events kept: the size of the page's list, and some hours of a busy server.
const EVENTS_MAX: usize = 100;

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The server began to serve.
    Started,
    /// A shard has no numbers left, and its next generation is not ready.
    Depleted,
    /// The next generation of a shard is ready.
    Refilled,
    /// A shard could not be filled. The refiller tries again.
    RefillFailed,
    /// A shard's file could not be trusted and was set aside.
    Damaged,
    /// A range has no numbers left to fill shards with.
    Exhausted,
    /// Receipts can't be saved.
    ReceiptsFailed,
    /// The settings were read again, whether they could be applied or not.
    Reloaded,
    /// Numbers that were issued by other means were imported.
    Imported,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Started,
        Self::Depleted,
        Self::Refilled,
        Self::RefillFailed,
        Self::Damaged,
        Self::Exhausted,
        Self::ReceiptsFailed,
        Self::Reloaded,
        Self::Imported,
    ];

    /// Returns the kind's name for programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Depleted => "depleted",
            Self::Refilled => "refilled",
            Self::RefillFailed => "refill_failed",
            Self::Damaged => "damaged",
            Self::Exhausted => "exhausted",
            Self::ReceiptsFailed => "receipts_failed",
            Self::Reloaded => "reloaded",
            Self::Imported => "imported",
        }
    }
}

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Counts up from 1 since the process started.
    pub id: u64,
    pub at: SystemTime,
    pub kind: Kind,
    /// The pool, if the event is about one.
    pub pool: Option<PoolName>,
    /// The name of the shard's live file, if the event is about one.
    pub shard: Option<String>,
    /// A sentence for people.
    pub message: String,
}

/// The last [events](Event).
#[derive(Debug, Default)]
pub struct Events {
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    last_id: u64,
    events: VecDeque<Event>,
}

impl Events {
    /// Adds an event that happens now, and drops the oldest if there are too many.
    pub fn add(&self, kind: Kind, pool: Option<&PoolName>, shard: Option<&str>, message: String) {
        let mut log = self.log();
        log.last_id += 1;
        let event = Event {
            id: log.last_id,
            at: SystemTime::now(),
            kind,
            pool: pool.cloned(),
            shard: shard.map(str::to_owned),
            message,
        };
        log.events.push_front(event);
        log.events.truncate(EVENTS_MAX);
    }

    /// Returns the kept events, newest first.
    pub fn latest(&self) -> Vec<Event> {
        self.log().events.iter().cloned().collect()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("no holder of it panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_hundred_are_kept_newest_first() {
        let events = Events::default();
        for number in 1..=250 {
            events.add(Kind::Started, None, None, format!("event {number}"));
        }
        let ids: Vec<_> = events.latest().iter().map(|event| event.id).collect();
        assert_eq!(ids, (151..=250).rev().collect::<Vec<_>>());
        assert_eq!(events.latest()[0].message, "event 250");
    }
}
