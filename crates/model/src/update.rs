//! When should an instance move to another version by itself? A pure decision; the plane acts on it.

use crate::{Digest, State, Timestamp};

/// All that the decision depends on.
#[derive(Clone, Debug)]
pub struct UpdateFacts {
    /// The version that the instance has.
    pub current: Digest,
    /// The head of the channel it follows; none: it follows nothing, or the channel is empty.
    pub head: Option<Digest>,
    /// Not before this instant.
    pub hold_until: Option<Timestamp>,
    /// Versions that already failed on this instance: never tried again by themselves.
    pub failed: Vec<Digest>,
    /// What the instance is doing.
    pub state: State,
    /// An operation on it is under way.
    pub busy: bool,
    /// The wall clock.
    pub now: Timestamp,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpdateDecision {
    /// Nothing, for this reason.
    Stay(&'static str),
    /// Update to this version now.
    Update(Digest),
}

/// Decides. A stopped instance is updated when it is next started or asked to, not behind its owner's back.
pub fn decide_update(facts: &UpdateFacts) -> UpdateDecision {
    use UpdateDecision::Stay;
    let Some(head) = facts.head else {
        return Stay("it follows no channel");
    };
    if head == facts.current {
        return Stay("it has the newest version");
    }
    if facts.hold_until.is_some_and(|until| facts.now < until) {
        return Stay("it is held");
    }
    if facts.failed.contains(&head) {
        return Stay("that version failed here before");
    }
    if facts.busy {
        return Stay("an operation is under way");
    }
    if facts.state != State::Running {
        return Stay("it is not running");
    }
    UpdateDecision::Update(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> UpdateFacts {
        UpdateFacts {
            current: Digest::of(b"1"),
            head: Some(Digest::of(b"2")),
            hold_until: None,
            failed: vec![],
            state: State::Running,
            busy: false,
            now: Timestamp(1000),
        }
    }

    #[test]
    fn updates_only_when_it_may() {
        assert_eq!(decide_update(&facts()), UpdateDecision::Update(Digest::of(b"2")));
        let stays: [fn(&mut UpdateFacts); 6] = [
            |f| f.head = None,
            |f| f.head = Some(f.current),
            |f| f.hold_until = Some(Timestamp(1001)),
            |f| f.failed = vec![Digest::of(b"2")],
            |f| f.busy = true,
            |f| f.state = State::Stopped,
        ];
        for change in stays {
            let mut facts = facts();
            change(&mut facts);
            assert!(matches!(decide_update(&facts), UpdateDecision::Stay(_)));
        }
        let over = UpdateFacts { hold_until: Some(Timestamp(1000)), ..facts() };
        assert!(matches!(decide_update(&over), UpdateDecision::Update(_)), "a hold ends at its instant");
    }
}
