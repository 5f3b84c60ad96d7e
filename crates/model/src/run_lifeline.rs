//! How a machine outlives its runner: somebody else has the descriptors that keep it going, and gives them to another runner.
//!
//! While the daemon has the connection of the disks, what the guest reads and writes waits when the runner dies, and so do the
//! calls that the guard decides about. A runner gives them on its socket, in one message with [`Reply::Lifeline`]
//! (`SCM_RIGHTS`). One that takes over gets them as its standard input: a socket, on which the first message is the same
//! reply in one line, with the descriptors. What else a runner reads there follows.
//!
//! [`Reply::Lifeline`]: crate::run::Reply::Lifeline

use serde::{Deserialize, Serialize};

use crate::run::RunStatus;

/// At most so many descriptors come with a message.
pub const MAX_PARTS: usize = 8;

/// What a descriptor is. One that is not known to whoever gets it is kept, and passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The connection over which the kernel asks for what is in disks and memory.
    Disks,
    /// QEMU, as a process that no other can be mistaken for (pidfd).
    Process,
    /// Where the calls come that the network guard decides about.
    Guard,
    /// Which of them came last.
    GuardReceived,
    /// Something that a newer runner has.
    #[serde(other)]
    Unknown,
}

/// A machine that runs, and whose runner has died. What its disks and memory are is in the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Orphan {
    /// What its runner last said.
    pub status: RunStatus,
    /// It may be elsewhere by now: it stands still until somebody says that it stays.
    pub sent: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Reply, Request};

    #[test]
    fn wire_words() {
        assert_eq!(serde_json::to_string(&Request::Lifeline).unwrap(), r#"{"op":"lifeline"}"#);
        assert_eq!(serde_json::to_string(&Request::Hold).unwrap(), r#"{"op":"hold"}"#);
        let parts = vec![Part::Disks, Part::Process, Part::Guard, Part::GuardReceived];
        let text = serde_json::to_string(&Reply::Lifeline { parts }).unwrap();
        assert_eq!(text, r#"{"reply":"lifeline","parts":["disks","process","guard","guard-received"]}"#);
        let newer: Reply = serde_json::from_str(r#"{"reply":"lifeline","parts":["disks","something"]}"#).unwrap();
        assert_eq!(newer, Reply::Lifeline { parts: vec![Part::Disks, Part::Unknown] });
    }
}
