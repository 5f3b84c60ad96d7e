//! Starts QEMU with the rights it shall have, and learns how it ends.
//!
//! One thread per machine starts the process and then waits for it. That thread has to live as long as the machine:
//! the kernel's parent-death signal means the death of the *thread* that forked, so a thread of a pool that comes
//! and goes would take machines with it (prctl(2), PR_SET_PDEATHSIG).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use rustix::thread::{Gid, Uid, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::sync::{oneshot, watch};

use crate::guard::{self, ChildEnd, GuardError, GuardLine, GuardPolicy};

/// What the process may do and when it ends with us.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rights {
    /// User and group to become; needs root.
    pub user: Option<(u32, u32)>,
    /// One group besides, such as that of /dev/kvm.
    pub extra_group: Option<u32>,
    /// Killed when this process dies.
    pub parent_death_kill: bool,
    /// Kept from the host's addresses.
    pub guard: Option<GuardPolicy>,
    /// Whether its memory may be of huge pages; only a guard can refuse that.
    pub huge_pages: bool,
}

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error("could not start {program}{user}: {source}", program = program.display())]
    Start { program: PathBuf, user: String, source: io::Error },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawExit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
}

/// A running child, or one of a process that died. Dropping it does not end the process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    handle: Arc<OwnedFd>,
    exit: watch::Receiver<Option<RawExit>>,
    guard: Option<GuardLine>,
}

/// Starts `program`. When the future is given up, the process is killed.
pub(crate) async fn spawn(
    program: &Path,
    arguments: Vec<String>,
    log: File,
    rights: Rights,
) -> Result<Process, SpawnError> {
    let (sender, started) = oneshot::channel();
    let error_of = {
        let (program, user) =
            (program.to_owned(), rights.user.map(|(uid, gid)| format!(" as user {uid}, group {gid}")));
        move |source| SpawnError::Start { program, user: user.unwrap_or_default(), source }
    };
    let program = program.to_owned();
    let keep = move || match start(&program, arguments, log, rights) {
        Err(error) => drop(sender.send(Err(error))),
        Ok(started) => keep(started, sender),
    };
    std::thread::Builder::new().name("vm-keeper".into()).spawn(keep).map_err(error_of.clone())?;
    started.await.unwrap_or_else(|_| Err(error_of(io::Error::other("the thread that starts it ended"))))
}

struct Started {
    child: Child,
    handle: OwnedFd,
    guard: Option<GuardLine>,
}

fn keep(started: Started, sender: oneshot::Sender<Result<Process, SpawnError>>) {
    let Started { mut child, handle, guard } = started;
    let (handle, started) = (Arc::new(handle), sender);
    let (sender, exit) = watch::channel(None);
    let process = Process { pid: child.id(), handle: handle.clone(), exit, guard };
    if started.send(Ok(process)).is_err() {
        let _ = pidfd_send_signal(&*handle, Signal::KILL);
    }
    // A wait for the child would also take its stops away from whoever traces it (see `memory::inject`).
    await_end(&handle);
    let exit = match child.wait() {
        Ok(status) => RawExit { code: status.code(), signal: status.signal() },
        Err(error) => {
            tracing::error!(%error, "the end of a machine's process could not be learnt");
            RawExit { code: None, signal: None }
        }
    };
    sender.send_replace(Some(exit));
}

fn await_end(process: &OwnedFd) {
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    while poll(&mut ended, None).is_err() {}
}

fn start(program: &Path, arguments: Vec<String>, log: File, mut rights: Rights) -> Result<Started, SpawnError> {
    let user = rights.user.map(|(uid, gid)| format!(" as user {uid}, group {gid}")).unwrap_or_default();
    let fail = |source: io::Error| SpawnError::Start { program: program.to_owned(), user: user.clone(), source };
    let (child_end, guard) =
        match rights.guard.take().map(|policy| guard::prepare(policy, rights.huge_pages)).transpose()? {
            Some((child_end, guard)) => (Some(child_end), Some(guard)),
            None => (None, None),
        };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().map_err(fail)?).stderr(log);
    // The environment may hold secrets of ours, and a group of its own keeps the terminal's Ctrl-C from the guest.
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .process_group(0);
    limit(&mut command, rights, child_end);
    let spawned = command.spawn();
    // Closes our copy of the child's end, so that the guard does not wait for a child that never came so far.
    drop(command);
    match (spawned, guard.and_then(guard::Guard::outcome)) {
        (Err(_), Some(Err(error))) => Err(error.into()),
        (Err(error), _) => Err(fail(error)),
        (Ok(mut child), Some(Err(error))) => {
            let _ = child.kill().and_then(|()| child.wait());
            Err(error.into())
        }
        (Ok(child), guard) => {
            let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
            let handle = handle.map_err(|errno| fail(errno.into()))?;
            Ok(Started { child, handle, guard: guard.and_then(Result::ok) })
        }
    }
}

/// Lowers the rights of the child before it becomes QEMU.
fn limit(command: &mut Command, rights: Rights, guard: Option<ChildEnd>) {
    let parent = getpid();
    let groups: Vec<Gid> = rights.extra_group.into_iter().map(Gid::from_raw).collect();
    let steps = move || -> io::Result<()> {
        if let Some((uid, gid)) = rights.user {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        // After the change of user, which would clear it.
        if rights.parent_death_kill {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(parent) {
                // We died in between: the signal will not come any more.
                return Err(rustix::io::Errno::SRCH.into());
            }
        }
        set_no_new_privs(true)?;
        match &guard {
            Some(guard) => guard.install(),
            None => Ok(()),
        }
    };
    // SAFETY: between fork and exec only system calls are made: rustix' functions called here are bare system calls,
    // and `install` documents the same. Nothing is allocated or locked; errors made here hold a number only.
    unsafe {
        command.pre_exec(steps);
    }
}

impl Process {
    /// A process whose parent died. How it ends nobody can see, only that it does.
    pub(crate) fn adopt(handle: OwnedFd, guard: Option<GuardLine>) -> io::Result<Self> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", handle.as_raw_fd()))?;
        let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        let pid = pid.ok_or_else(|| io::Error::other("it has ended"))?;
        let (handle, (sender, exit)) = (Arc::new(handle), watch::channel(None));
        let process = handle.clone();
        let keep = move || {
            await_end(&process);
            sender.send_replace(Some(RawExit { code: None, signal: None }));
        };
        std::thread::Builder::new().name("vm-keeper".into()).spawn(keep)?;
        Ok(Self { pid, handle, exit, guard })
    }

    pub(crate) fn handle(&self) -> &OwnedFd {
        &self.handle
    }

    pub(crate) fn guard(&self) -> Option<&GuardLine> {
        self.guard.as_ref()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// SIGKILL; by a handle, so it can not hit another process.
    pub(crate) fn kill(&self) {
        // It may have ended already.
        let _ = pidfd_send_signal(&*self.handle, Signal::KILL);
    }

    /// Returns when the process has ended.
    pub(crate) async fn exited(&self) -> RawExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(RawExit { code: None, signal: None }),
            Err(_) => RawExit { code: None, signal: None },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
