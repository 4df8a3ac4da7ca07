//! What a fence proves, without the store that holds it. Pure.
//!
//! An instance hands out what it leased only after a step of its fence, which it alone can make: from
//! the fence that it knows, to a token that it has just drawn. A restored or cloned folder knows a fence
//! that others have moved on, so that its next step fails before anything is handed out.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Where an instance's fence stands: after so many steps, the last of which bears this token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fence {
    /// Steps since the instance joined, from 1.
    pub step: u64,
    /// Drawn anew for each step, so that two copies of a folder can't take the same one.
    pub token: Uuid,
}

/// What a folder knows of its fence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Known {
    /// The last step that is known to have been made; none before the first.
    pub fence: Option<Fence>,
    /// The step that was begun after it: the store may have it or not.
    pub intent: Option<Fence>,
}

/// What the store's fence says of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The folder is the instance's own, and the step that it began was made, if it began one.
    Current,
    /// The folder is the instance's own, and the step that it began was not made, so far.
    Pending,
    /// Another copy of this folder has gone on since: what is in this one may be handed out already.
    Stale,
    /// The store has forgotten a step that was made: it was restored from a copy, or is another one.
    StoreBehind,
}

impl Fence {
    /// The one after `fence`, with this token.
    #[must_use]
    pub fn after(fence: Option<Self>, token: Uuid) -> Self {
        Self { step: fence.map_or(0, |fence| fence.step) + 1, token }
    }
}

impl Known {
    /// Where the fence stands when nothing is under way.
    #[must_use]
    pub fn at(fence: Option<Fence>) -> Self {
        Self { fence, intent: None }
    }

    /// Begins a step. The one that was begun before was made.
    #[must_use]
    pub fn begin(self, token: Uuid) -> Self {
        let fence = self.intent.or(self.fence);
        Self { fence, intent: Some(Fence::after(fence, token)) }
    }

    /// What it says of this folder that the store has this fence.
    #[must_use]
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_a_folder_by_the_fence_in_the_store() {
        let fence = |step, token| Some(Fence { step, token: Uuid::from_u128(token) });
        let check = |known: Known, found, expected| {
            assert_eq!(known.judge(found), expected, "{known:?} and {found:?}");
        };
        let fresh = Known::default();
        check(fresh, None, Standing::Current);
        check(fresh, fence(1, 1), Standing::Stale);
        let begun = fresh.begin(Uuid::from_u128(1));
        check(begun, None, Standing::Pending);
        check(begun, fence(1, 1), Standing::Current);
        check(begun, fence(1, 2), Standing::Stale);
        let again = begun.begin(Uuid::from_u128(2));
        assert_eq!(again, Known { fence: fence(1, 1), intent: fence(2, 2) });
        check(again, fence(1, 1), Standing::Pending);
        check(again, fence(2, 2), Standing::Current);
        check(again, None, Standing::StoreBehind);
        // As many steps, but others: a copy went another way.
        check(again, fence(1, 9), Standing::Stale);
        check(again, fence(2, 9), Standing::Stale);
        check(again, fence(7, 9), Standing::Stale);
        check(Known::at(fence(3, 3)), fence(2, 2), Standing::StoreBehind);
    }
}
