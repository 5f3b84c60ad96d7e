//! A machine that outlives the process that launched it, as far as somebody has what keeps it going ([`Lifeline`]).
//!
//! Until then it is tied to its launcher, and dies with it. Whoever takes it over is not its parent: that it has ended can be
//! seen, and how only as far as it says so itself.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::arguments::netdev_name;
use crate::forward;
use crate::guard::{GuardLine, GuardPolicy};
use crate::memory;
use crate::vm::{Vm, VmError};

/// What another process needs to take a machine over; all of it is closed on exec.
#[derive(Debug)]
pub struct Lifeline {
    /// QEMU, as a process that no other can be mistaken for (pidfd).
    pub process: OwnedFd,
    /// For its guard, if it has one.
    pub guard: Option<GuardLine>,
}

/// A machine whose launcher died.
#[derive(Debug)]
pub struct Orphan {
    /// QEMU.
    pub process: OwnedFd,
    /// Its guard, if it has one, and what it goes by.
    pub guard: Option<(GuardPolicy, GuardLine)>,
    /// As in [`LaunchOptions`](crate::LaunchOptions).
    pub run_dir: PathBuf,
    /// As in [`LaunchOptions`](crate::LaunchOptions).
    pub user: Option<(u32, u32)>,
}

impl Vm {
    /// What keeps the machine going without us.
    pub fn lifeline(&self) -> std::io::Result<Lifeline> {
        let guard = self.process().guard().map(GuardLine::try_clone).transpose()?;
        Ok(Lifeline { process: self.process().handle().try_clone()?, guard })
    }

    /// Somebody has the lifeline: from here on the machine does not die with us. Dropping the handle ends it all the same.
    pub async fn untie(&self) -> Result<(), VmError> {
        let failed = |reason: String| VmError::Memory { doing: "let the machine outlive this process", reason };
        let process = self.pid();
        // It waits for the process to stop for a moment.
        let done = tokio::task::spawn_blocking(move || memory::untie(process)).await;
        done.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
    }

    /// Where ports of the guest behind card `nic` can be reached, by guest port.
    pub async fn forwards(&self, nic: usize) -> Result<Vec<(u16, SocketAddr)>, VmError> {
        let found = forward::parse(&self.monitor("info usernet").await?, &netdev_name(nic));
        Ok(found.into_iter().map(|forward| (forward.guest_port, SocketAddr::V4(forward.listen))).collect())
    }
}
