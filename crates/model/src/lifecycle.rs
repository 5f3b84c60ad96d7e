//! The life of an instance: one enum, and every transition in one pure function.
//!
//! ```text
//!              start            up
//!   stopped ---------> starting ------> running <------> paused
//!      ^                  |  ^            |  |  \
//!      |  down            |  |crash,retry |  |   `-- suspend --> suspending --> suspended --> resuming --> running
//!      +---- stopping <---+--+------------+  |
//!      |                     |               | update        (a suspend that fails goes on running; a resume that
//!      |        updating <---+---------------+                fails is suspended still; updating ends in running,
//!      |        moving, restoring: the same shape               stopped or failed)
//!      |
//!      +-- failed (start again, or delete)            any --> deleting
//! ```
//!
//! The host that owns the instance is the only writer of its state. Whether a host can be reached, and when it
//! last said so, are fields beside the state, not states.

use serde::{Deserialize, Serialize};

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// No machine exists; disks are at rest.
    Stopped,
    /// Disks are being opened, the machine is being created.
    Starting,
    /// The guest's CPUs run.
    Running,
    /// The machine exists, its CPUs do not run.
    Paused,
    /// Memory and devices are being saved.
    Suspending,
    /// Memory, devices and disks are at rest, as one.
    Suspended,
    /// A suspended machine is being brought back.
    Resuming,
    /// An earlier checkpoint is being put in place of the present.
    Restoring,
    /// The guest was asked to shut down.
    Stopping,
    /// The version is being changed, up to the health gate.
    Updating,
    /// Ownership is passing to another host.
    Moving,
    /// Being removed.
    Deleting,
    /// It could not be started, or crashed too often; a person is needed.
    Failed,
}

/// What happens to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// Someone, or the start of the host, wants it to run.
    Start,
    /// The machine runs.
    Up,
    /// Someone wants it stopped.
    Stop,
    /// The machine has ended as wanted, or the guest powered itself off.
    Down,
    /// The machine ended without being asked, and will be tried again.
    Crash,
    /// It cannot be brought up, and will not be tried again by itself.
    GiveUp,
    /// CPUs halted by a person or a full disk.
    Pause,
    /// CPUs go on.
    Continue,
    /// Change the version.
    Update,
    /// Put an earlier state in place of the present.
    Restore,
    /// Save memory.
    Suspend,
    /// Memory is saved.
    Saved,
    /// Bring a suspended machine back.
    Resume,
    /// Hand over to another host.
    Move,
    /// Remove it.
    Delete,
}

impl State {
    /// The state after `trigger`, or `None` where that cannot happen in this state.
    pub fn after(self, trigger: Trigger) -> Option<State> {
        use State::*;
        use Trigger as T;
        Some(match (self, trigger) {
            (Deleting, _) => return None,
            (_, T::Delete) => Deleting,
            (Stopped | Failed | Restoring, T::Start) => Starting,
            (Starting | Resuming | Updating | Restoring | Moving, T::Up) => Running,
            (Starting | Running | Paused | Updating | Suspended | Failed, T::Stop) => Stopping,
            (Starting | Running | Paused | Stopping | Updating | Restoring | Moving, T::Down) => Stopped,
            (Starting | Running | Paused | Suspending, T::Crash) => Starting,
            (Starting | Running | Paused | Stopping | Updating | Restoring | Resuming | Moving, T::GiveUp) => Failed,
            (Running, T::Pause) => Paused,
            (Paused, T::Continue) => Running,
            (Stopped | Running | Paused | Failed, T::Update) => Updating,
            (Stopped | Running | Paused | Failed | Suspended, T::Restore) => Restoring,
            (Running | Paused, T::Suspend) => Suspending,
            (Suspending, T::Saved) => Suspended,
            (Suspending, T::Continue) => Running,
            (Suspended | Restoring, T::Resume) => Resuming,
            (Resuming, T::Crash) => Suspended,
            (Stopped | Running | Paused | Suspended, T::Move) => Moving,
            _ => return None,
        })
    }

    /// Whether a machine exists or is about to.
    pub fn is_live(self) -> bool {
        use State::*;
        matches!(self, Starting | Running | Paused | Suspending | Resuming | Stopping | Updating)
    }

    /// The word used everywhere.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Resuming => "resuming",
            Self::Restoring => "restoring",
            Self::Stopping => "stopping",
            Self::Updating => "updating",
            Self::Moving => "moving",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for State {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        serde_json::from_value(text.into()).map_err(|_| format!("\"{text}\" is not a state"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRIGGERS: [Trigger; 15] = [
        Trigger::Start,
        Trigger::Up,
        Trigger::Stop,
        Trigger::Down,
        Trigger::Crash,
        Trigger::GiveUp,
        Trigger::Pause,
        Trigger::Continue,
        Trigger::Update,
        Trigger::Restore,
        Trigger::Suspend,
        Trigger::Saved,
        Trigger::Resume,
        Trigger::Move,
        Trigger::Delete,
    ];

    proptest! {
        /// Whatever happened before, an instance can be deleted, and a machine that gave up or is stopped can be started.
        #[test]
        fn no_dead_ends(steps in proptest::collection::vec(0usize..TRIGGERS.len(), 0..40)) {
            let mut state = State::Stopped;
            for step in steps {
                if let Some(next) = state.after(TRIGGERS[step]) {
                    prop_assert_ne!(state, State::Deleting);
                    state = next;
                }
            }
            prop_assert!(state == State::Deleting || state.after(Trigger::Delete) == Some(State::Deleting));
            let ways = TRIGGERS.iter().filter(|t| **t != Trigger::Delete && state.after(**t).is_some()).count();
            prop_assert!(state == State::Deleting || ways > 0, "{state} is a dead end");
        }
    }

    #[test]
    fn words_and_back() {
        for state in [State::Stopped, State::Updating, State::Failed] {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
    }
}
