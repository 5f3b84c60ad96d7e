//! A machine that outlives the process that launched it, as far as somebody has what keeps it going ([`Lifeline`]).
//!
//! Until then it is tied to its launcher, and dies with it. Whoever takes it over is not its parent: that it has ended can be
//! seen, and how only as far as it says so itself.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::process::Pid;

use crate::arguments::netdev_name;
use crate::event::EventReceiver;
use crate::forward;
use crate::guard::{self, GuardLine, GuardPolicy};
use crate::machine::Machine;
use crate::memory;
use crate::notice::Notices;
use crate::run_dir::RunDir;
use crate::spawn::Process;
use crate::vm::{LaunchError, RESUME_LIMIT, Unfinished, Vm, VmError, await_guest};

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
    /// Takes over the machine of a process that died; `machine` is what that one launched. It is as it was: it may be paused.
    pub async fn adopt(machine: &Machine, orphan: Orphan) -> Result<(Vm, EventReceiver), LaunchError> {
        let spawn = |error: std::io::Error| LaunchError::Spawn { reason: format!("could not take over QEMU: {error}") };
        let Orphan { process, guard, run_dir, user } = orphan;
        let run_dir = RunDir::adopt(&run_dir)?;
        let handle = process.try_clone().map_err(spawn)?;
        let line = guard.as_ref().map(|(_, line)| line.try_clone()).transpose().map_err(spawn)?;
        let process = Process::adopt(process, line).map_err(spawn)?;
        let mut unfinished = Unfinished(Some(&process));
        // First: its thread may wait for the guard, and would not answer.
        if let (Some((policy, line)), Some(pid)) = (guard, Pid::from_raw(process.pid() as i32)) {
            guard::adopt(line, policy, pid, handle)?;
        }
        let monitor = await_guest(machine, &process, &run_dir, &run_dir.qmp_socket(), (RESUME_LIMIT, false)).await?;
        unfinished.0 = None;
        drop(unfinished);
        Ok(Vm::over(process, monitor, run_dir, Notices::new(machine, None), user))
    }

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
