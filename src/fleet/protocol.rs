//! The rules of the fence, apart from the store that holds it. Pure.
//!
//! An instance hands out what it leased only after a step of its fence. Only this instance can make the step,
//! from the fence that it knows to a token that it has just drawn. A restored or cloned folder knows an
//! outdated fence, because another copy has stepped it, so its next step fails before it hands out anything.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The state of an instance's fence: how many steps were made, and the token of the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fence {
    /// Steps since the instance joined, from 1.
    pub step: u64,
    /// Drawn at random for each step, so that two copies of a folder can't make the same step.
    pub token: Uuid,
}

/// A folder's knowledge of its fence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KnownFence {
    /// The last step that is known to have been made, or `None` before the first.
    pub fence: Option<Fence>,
    /// The step that was begun after it. The store may have it or not.
    pub intent: Option<Fence>,
}

/// The standing of a folder, judged by the store's fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The folder is the instance's own, and the step that it began was made, if it began one.
    Current,
    /// The folder is the instance's own, and the step that it began was not made, so far.
    Pending,
    /// Another copy of this folder has made further steps, and may have handed out the content of this one.
    Stale,
    /// The store has forgotten a step that was made: it was restored from a copy, or is another one.
    StoreBehind,
}

impl Fence {
    /// Returns the fence after `fence`, with this token.
    pub fn after(fence: Option<Self>, token: Uuid) -> Self {
        Self { step: fence.map_or(0, |fence| fence.step) + 1, token }
    }
}

impl KnownFence {
    /// Returns the knowledge of a folder that has no step in progress.
    pub fn at(fence: Option<Fence>) -> Self {
        Self { fence, intent: None }
    }

    /// Returns the last step that was begun.
    pub fn last(self) -> Option<Fence> {
        self.intent.or(self.fence)
    }

    /// Begins a step. The step that was begun before it must have been made.
    pub fn begin(self, token: Uuid) -> Self {
        let fence = self.last();
        Self { fence, intent: Some(Fence::after(fence, token)) }
    }

    /// Judges this folder by the fence that the store has.
    pub fn judge(self, found: Option<Fence>) -> Standing {
        let steps = |fence: Option<Fence>| fence.map_or(0, |fence| fence.step);
        match self.intent {
            Some(_) if found == self.intent => Standing::Current,
            Some(_) if found == self.fence => Standing::Pending,
            None if found == self.fence => Standing::Current,
            _ if steps(found) < steps(self.fence) => Standing::StoreBehind,
            _ => Standing::Stale,
        }
    }

    /// Judges this folder after the store refused its step, by the fence that the store had then.
    ///
    /// `untried` means that the step was not tried before. Only another copy of the folder can then have made
    /// it, even with the same token, because clones of a machine may share its random state.
    pub fn judge_refusal(self, found: Option<Fence>, untried: bool) -> Standing {
        match self.judge(found) {
            Standing::Current if untried => Standing::Stale,
            // The store refused because it had another fence, which has gone back since.
            Standing::Pending if untried => Standing::StoreBehind,
            standing => standing,
        }
    }
}

/// Why an instance may not hand out anything any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Another copy of the folder has taken this one's place.
    #[error(
        "another copy of this data folder has made further steps and may hand out the same numbers, so \
         this one no longer serves. Find out which of them is a clone or a restored backup; if this one is \
         started without --refuse-if-stale, it sets its files aside and starts as a new instance"
    )]
    Stale,
    /// The store forgot what it had agreed to.
    #[error(
        "the store is behind this data folder: it was restored from a copy, or is another one. Nothing is \
         served, because other instances may get the same numbers. See `tombola fleet status`; if this is \
         the right store, run `tombola fleet reseed` for each folder of the fleet"
    )]
    StoreBehind,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_a_folder_by_the_fence_in_the_store() {
        let fence = |step, token| Some(Fence { step, token: Uuid::from_u128(token) });
        let check = |known: KnownFence, found, expected| {
            assert_eq!(known.judge(found), expected, "{known:?} and {found:?}");
        };
        let fresh = KnownFence::default();
        check(fresh, None, Standing::Current);
        check(fresh, fence(1, 1), Standing::Stale);
        let begun = fresh.begin(Uuid::from_u128(1));
        check(begun, None, Standing::Pending);
        check(begun, fence(1, 1), Standing::Current);
        check(begun, fence(1, 2), Standing::Stale);
        let again = begun.begin(Uuid::from_u128(2));
        assert_eq!(again, KnownFence { fence: fence(1, 1), intent: fence(2, 2) });
        check(again, fence(1, 1), Standing::Pending);
        check(again, fence(2, 2), Standing::Current);
        check(again, None, Standing::StoreBehind);
        // The same number of steps, but other ones: a copy has made its own.
        check(again, fence(1, 9), Standing::Stale);
        check(again, fence(2, 9), Standing::Stale);
        check(again, fence(7, 9), Standing::Stale);
        check(KnownFence::at(fence(3, 3)), fence(2, 2), Standing::StoreBehind);
    }

    /// Story: clones of a running machine drew the same token from the same random state, and each took the
    /// step for its own.
    #[test]
    fn a_first_try_that_is_refused_was_not_this_copy() {
        let fence = |step, token| Some(Fence { step, token: Uuid::from_u128(token) });
        let begun = KnownFence::at(fence(1, 1)).begin(Uuid::from_u128(2));
        for (found, untried, tried) in [
            (fence(2, 2), Standing::Stale, Standing::Current),
            (fence(1, 1), Standing::StoreBehind, Standing::Pending),
            (fence(2, 9), Standing::Stale, Standing::Stale),
            (None, Standing::StoreBehind, Standing::StoreBehind),
        ] {
            assert_eq!(begun.judge_refusal(found, true), untried, "{found:?}");
            assert_eq!(begun.judge_refusal(found, false), tried, "{found:?}");
        }
    }
}
