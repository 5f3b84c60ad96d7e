//! What happens to a machine, in our words: QEMU's events, run states and ways to end.

use serde_json::Value;
use tokio::sync::mpsc;

use crate::qmp::RawEvent;

/// Something that happened to the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The machine was switched off; QEMU ends next.
    GuestShutdown {
        /// The guest did it, and not a command or a signal from outside.
        by_guest: bool,
        /// QEMU's reason, such as `guest-shutdown` or `host-qmp-quit`.
        reason: String,
    },
    /// The machine was reset and starts again.
    Reset {
        /// The guest did it.
        by_guest: bool,
    },
    /// The processors stand still.
    Stopped,
    /// The processors run again.
    Resumed,
    /// The guest's kernel reported a panic through the pvpanic device. The machine goes on as the guest decides.
    Panicked,
    /// A disk request failed. The machine is paused with the request kept; continuing repeats it.
    BlockError {
        /// The drive's name.
        device: String,
        /// The host's disk is full.
        nospace: bool,
        /// The request was a write.
        write: bool,
        /// The system's own words.
        reason: String,
    },
    /// The power button was pressed from outside; the guest may take its time.
    PowerButton,
    /// Something else; QEMU's name of the event.
    Other(String),
}

/// Events of one machine, in their order. It ends when QEMU has ended.
pub type EventReceiver = mpsc::Receiver<Event>;

/// Whether a machine's processors run, in QEMU's words where they are not plain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Paused on request.
    Paused,
    /// Paused because of a failed disk request.
    IoError,
    /// Switched off, QEMU is about to end.
    Shutdown,
    /// Any other state of QEMU, by its name.
    Other(String),
}

/// How QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, when it ended by itself. Of a machine that was taken over neither this nor the signal is known.
    pub code: Option<i32>,
    /// Signal, when one ended it.
    pub signal: Option<i32>,
    /// What that means for the machine.
    pub reason: ExitReason,
}

/// Why a machine is no longer there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off.
    GuestShutdown,
    /// The machine was told to end from outside, by [`Vm::kill`](crate::Vm::kill) or a polite signal.
    Killed,
    /// QEMU ended without having been told to: a power cut to the guest.
    Crashed {
        /// The end of what QEMU wrote to its log.
        stderr_tail: String,
    },
}

/// What of the events says how the machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Ending {
    #[default]
    NotSaid,
    ByGuest,
    ByHost,
}

impl Ending {
    /// The last word counts: a guest may be switching itself off while it is told to.
    pub(crate) fn after(self, event: &Event) -> Ending {
        match event {
            Event::GuestShutdown { by_guest: true, .. } => Ending::ByGuest,
            Event::GuestShutdown { by_guest: false, .. } => Ending::ByHost,
            _ => self,
        }
    }
}

impl Exit {
    pub(crate) fn new(
        code: Option<i32>,
        signal: Option<i32>,
        ending: Ending,
        killed: bool,
        tail: impl FnOnce() -> String,
    ) -> Exit {
        let reason = match ending {
            Ending::ByGuest => ExitReason::GuestShutdown,
            Ending::ByHost => ExitReason::Killed,
            Ending::NotSaid if killed => ExitReason::Killed,
            Ending::NotSaid => ExitReason::Crashed { stderr_tail: tail() },
        };
        Exit { code, signal, reason }
    }
}

impl RunState {
    pub(crate) fn from_qemu(name: &str) -> RunState {
        match name {
            "running" => RunState::Running,
            "paused" => RunState::Paused,
            "io-error" => RunState::IoError,
            "shutdown" => RunState::Shutdown,
            other => RunState::Other(other.to_owned()),
        }
    }
}

impl From<RawEvent> for Event {
    fn from(RawEvent { name, data }: RawEvent) -> Event {
        let flag = |key: &str| data.get(key).and_then(Value::as_bool).unwrap_or(false);
        let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        match name.as_str() {
            "SHUTDOWN" => Event::GuestShutdown { by_guest: flag("guest"), reason: text("reason") },
            "RESET" => Event::Reset { by_guest: flag("guest") },
            "STOP" => Event::Stopped,
            "RESUME" => Event::Resumed,
            "POWERDOWN" => Event::PowerButton,
            "GUEST_PANICKED" => Event::Panicked,
            "BLOCK_IO_ERROR" => Event::BlockError {
                device: text("node-name"),
                nospace: flag("nospace"),
                write: text("operation") == "write",
                reason: text("reason"),
            },
            _ => Event::Other(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(name: &str, data: Value) -> Event {
        RawEvent { name: name.into(), data }.into()
    }

    #[test]
    fn events_are_translated_and_tolerate_missing_or_strange_data() {
        let shutdown = event("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}));
        assert_eq!(shutdown, Event::GuestShutdown { by_guest: true, reason: "guest-shutdown".into() });
        assert_eq!(event("SHUTDOWN", json!([1])), Event::GuestShutdown { by_guest: false, reason: String::new() });
        assert_eq!(event("RESET", json!({"guest": "yes"})), Event::Reset { by_guest: false });
        let full = json!({"device": "", "node-name": "data", "nospace": true, "operation": "write", "reason": "No space left on device"});
        assert_eq!(
            event("BLOCK_IO_ERROR", full),
            Event::BlockError {
                device: "data".into(),
                nospace: true,
                write: true,
                reason: "No space left on device".into()
            }
        );
        assert_eq!(event("RTC_CHANGE", json!({})), Event::Other("RTC_CHANGE".into()));
    }

    #[test]
    fn an_exit_is_explained_by_the_last_word() {
        let reason = |ending, killed| Exit::new(Some(0), None, ending, killed, || "tail".into()).reason;
        let by_guest = Ending::default().after(&event("SHUTDOWN", json!({"guest": true}))).after(&Event::Stopped);
        assert_eq!(reason(by_guest, true), ExitReason::GuestShutdown);
        assert_eq!(reason(Ending::ByHost, false), ExitReason::Killed);
        assert_eq!(reason(Ending::NotSaid, true), ExitReason::Killed);
        assert_eq!(reason(Ending::NotSaid, false), ExitReason::Crashed { stderr_tail: "tail".into() });
    }
}
