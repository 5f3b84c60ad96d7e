//! Keeps a guest away from the host's own addresses, without root and without touching the host's firewall.
//!
//! QEMU's user network makes the guest's connections in the host's name, so a guest reaches every service that
//! listens on the host's loopback only. The launcher therefore puts a seccomp filter on QEMU between fork and exec
//! (`filter`); calls that name an address wait until a thread of ours has decided about them (`policy`). An allowed
//! call is not let through, because QEMU could change the address after the decision: the thread makes it itself, on
//! a duplicate of the socket and with its own copy of address and data (`requests`).
//! A caught call takes some 30 µs in place of 3 (a 1500 byte `sendmsg` on a busy machine of two cores). `send` without an
//! address is not caught, so a network plug that must be fast is a connected socket that QEMU uses by `send`.
//! Where this process dies and nobody else has the listener, the kernel answers ENOSYS to all such calls: nothing opens.
//! While somebody has it ([`GuardLine`]), they wait for whoever takes over.
//! Way of working: seccomp_unotify(2).

mod filter;
mod host;
mod kernel;
mod policy;
mod requests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

pub use policy::{Denial, GuardPolicy, HostView, Transport, decide};
use requests::{Supervisor, Work};

/// Calls on blocking sockets wait in threads of their own; more than this many at once are told to try again.
const WAITING_LIMIT: usize = 16;

/// Calls are numbered one after the other. Those that a guard left unanswered when it died are looked for so far before the last
/// one that it noted: others may have come while one was slow,
const LEFT_BEHIND: u64 = 16_384;
/// and so far after it: it may have died before it noted one, and callers before that one may have given up.
const LEFT_AHEAD: u64 = 1024;

/// Why a machine could not be kept away from the host's addresses.
#[derive(Debug, thiserror::Error)]
#[error(
    "could not set up the network guard, while {doing}: {source}; the kernel must be Linux 5.9 or newer with seccomp, and a process must be allowed to look into its children (ptrace_scope below 2)"
)]
pub struct GuardError {
    doing: &'static str,
    source: io::Error,
}

/// The child's end: used between fork and exec.
pub(crate) struct ChildEnd {
    line: UnixStream,
    program: Vec<libc::sock_filter>,
}

/// The parent's end: tells whether the guard stands.
pub(crate) struct Guard {
    outcome: mpsc::Receiver<Result<GuardLine, GuardError>>,
}

/// What another process needs to go on as the guard of a machine when this one has died.
#[derive(Debug)]
pub struct GuardLine {
    /// Where the calls come.
    pub listener: OwnedFd,
    /// A file in memory with the number of the call that was received last.
    pub received: OwnedFd,
}

impl GuardLine {
    /// Another handle of the same.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { listener: self.listener.try_clone()?, received: self.received.try_clone()? })
    }
}

/// Starts the thread that waits for the child's listener and then serves it until the child is gone. Without `huge_pages`
/// the child gets none, see [`filter`].
pub(crate) fn prepare(policy: GuardPolicy, huge_pages: bool) -> Result<(ChildEnd, Guard), GuardError> {
    let fail = |doing| move |source| GuardError { doing, source };
    let (ours, line) = UnixStream::pair().map_err(fail("making a socket pair"))?;
    let received = memfd_create("received", MemfdFlags::CLOEXEC);
    let received = received.map_err(|errno| fail("making a file in memory")(errno.into()))?;
    let (sender, outcome) = mpsc::channel();
    let serve = move || match accept_listener(&ours) {
        Err(error) => drop(sender.send(Err(error))),
        Ok((listener, child, process)) => {
            drop(ours);
            let line = GuardLine { listener, received };
            let other = line.try_clone().map_err(fail("making another handle of the filter's listener"));
            drop(sender.send(other));
            serve(line, Supervisor::new(policy, child, process));
        }
    };
    std::thread::Builder::new().name("vm-guard".into()).spawn(serve).map_err(fail("starting a thread"))?;
    Ok((ChildEnd { line, program: filter::program(huge_pages) }, Guard { outcome }))
}

/// Goes on as the guard of process `child` in place of one that died. Whoever waits for an answer of that one is told to try
/// again: nobody knows whether its call was made.
pub(crate) fn adopt(line: GuardLine, policy: GuardPolicy, child: Pid, process: OwnedFd) -> Result<(), GuardError> {
    let fail = |doing| move |source| GuardError { doing, source };
    let received = File::from(line.received.try_clone().map_err(fail("taking over"))?);
    let mut last = [0; 8];
    if received.read_exact_at(&mut last, 0).is_ok() {
        let last = u64::from_ne_bytes(last);
        for id in last.saturating_sub(LEFT_BEHIND)..last.saturating_add(LEFT_AHEAD) {
            if kernel::is_waiting(line.listener.as_fd(), id) {
                kernel::respond_logged(&line.listener, id, Err(Errno::AGAIN));
            }
        }
    }
    let serve = move || serve(line, Supervisor::new(policy, child, process));
    std::thread::Builder::new().name("vm-guard".into()).spawn(serve).map_err(fail("starting a thread"))?;
    Ok(())
}

impl ChildEnd {
    /// Filters this process and hands the listener to the parent. Only system calls; nothing is allocated.
    /// The listener's number goes by a plain write, since sending a descriptor would already wait for the guard.
    pub(crate) fn install(&self) -> io::Result<()> {
        let listener = kernel::install(&self.program)?;
        let mut message = [0u8; 8];
        message[..4].copy_from_slice(&getpid().as_raw_nonzero().get().to_ne_bytes());
        message[4..].copy_from_slice(&listener.to_ne_bytes());
        rustix::io::write(&self.line, &message)?;
        // The listener closes on exec, so the parent must have taken it before.
        let mut acknowledgement = [0u8; 1];
        match rustix::io::read(&self.line, &mut acknowledgement)? {
            1 => Ok(()),
            _ => Err(Errno::PERM.into()),
        }
    }
}

impl Guard {
    /// To be asked when the child's start is decided and the child's end closed here. `None`: the child did not
    /// come as far as the guard.
    pub(crate) fn outcome(self) -> Option<Result<GuardLine, GuardError>> {
        self.outcome.recv().ok()
    }
}

fn accept_listener(line: &UnixStream) -> Result<(OwnedFd, Pid, OwnedFd), GuardError> {
    use std::io::{Read, Write};
    let fail = |doing| move |source: io::Error| GuardError { doing, source };
    let mut message = [0u8; 8];
    let mut line = line;
    line.read_exact(&mut message).map_err(fail("waiting for the child's filter"))?;
    let [a, b, c, d, e, f, g, h] = message;
    let listener = i32::from_ne_bytes([e, f, g, h]);
    let child = Pid::from_raw(i32::from_ne_bytes([a, b, c, d]))
        .ok_or_else(|| fail("reading the child's number")(Errno::INVAL.into()))?;
    let process = pidfd_open(child, PidfdFlags::empty()).map_err(|errno| fail("opening the child")(errno.into()))?;
    let listener = pidfd_getfd(&process, listener, PidfdGetfdFlags::empty())
        .map_err(|errno| fail("taking the filter's listener from the child")(errno.into()))?;
    line.write_all(&[1]).map_err(fail("answering the child"))?;
    Ok((listener, child, process))
}

fn serve(GuardLine { listener, received }: GuardLine, mut supervisor: Supervisor) {
    let (listener, received) = (Arc::new(listener), File::from(received));
    let waiting = Arc::new(AtomicUsize::new(0));
    loop {
        let mut polled = [PollFd::new(&*listener, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return tracing::error!(%errno, "the network guard ends; the guest's network is cut"),
        }
        let seen = polled[0].revents();
        if !seen.contains(PollFlags::IN) {
            if seen.is_empty() {
                continue;
            }
            // Hung up: nobody is left under the filter.
            return;
        }
        // The caller may have been killed between the poll and here.
        let Ok(notification) = kernel::receive(listener.as_fd()) else { continue };
        if let Err(error) = received.write_all_at(&notification.id.to_ne_bytes(), 0) {
            tracing::error!(%error, "whoever takes over will not know of a call that waits");
        }
        let result = match supervisor.consider(&notification, || kernel::is_waiting(listener.as_fd(), notification.id))
        {
            Work::Done(result) => Some(result),
            Work::Wait(call) => delegate(&listener, &waiting, notification.id, call),
        };
        if let Some(result) = result {
            kernel::respond_logged(&listener, notification.id, result);
        }
    }
}

/// Makes a call that may take long in a thread of its own, so that the other calls go on.
fn delegate(
    listener: &Arc<OwnedFd>,
    waiting: &Arc<AtomicUsize>,
    id: u64,
    call: Box<dyn FnOnce() -> Result<i64, Errno> + Send>,
) -> Option<Result<i64, Errno>> {
    if waiting.fetch_add(1, Ordering::Relaxed) >= WAITING_LIMIT {
        waiting.fetch_sub(1, Ordering::Relaxed);
        return Some(Err(Errno::AGAIN));
    }
    let (listener, counter) = (listener.clone(), waiting.clone());
    let thread = std::thread::Builder::new().name("vm-guard-wait".into()).spawn(move || {
        kernel::respond_logged(&listener, id, call());
        counter.fetch_sub(1, Ordering::Relaxed);
    });
    match thread {
        Ok(_) => None,
        Err(_) => {
            waiting.fetch_sub(1, Ordering::Relaxed);
            Some(Err(Errno::AGAIN))
        }
    }
}

#[cfg(test)]
mod tests;
