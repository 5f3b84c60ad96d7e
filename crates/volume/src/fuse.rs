//! A connection to the kernel's FUSE: made by a mount, served by few threads.
//!
//! It is our own and not a library's because a connection that was made by a process that died is served on by another one
//! ([`Connection::adopt`]): who has files of it open only waits. To wait awake for the next request was tried and is slower, probably because
//! the kernel wakes one of the threads that sleep all the same.

mod backing;
pub(crate) mod wire;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use wire::{Ask, Request};

/// What the mount is called in the system's list of mounts.
const SOURCE: &str = "collective";
/// Mounts for those who are not root.
const HELPER: &str = "fusermount3";

/// What answers requests; called by several threads at once.
pub(crate) trait Serve: Send + Sync + 'static {
    fn serve(&self, node: u64, ask: Ask<'_>, reply: Reply);
    /// Whether the kernel shall be asked to read backing files.
    fn wants_backing(&self) -> bool;
}

/// The answer that a request is owed. Dropped without one, it is an I/O error.
pub(crate) struct Reply {
    device: Arc<OwnedFd>,
    unique: Option<u64>,
}

impl Reply {
    /// Answers with bytes.
    pub fn data(mut self, bytes: &[u8]) {
        if let Some(unique) = self.unique.take() {
            self.send(&wire::answer(unique, bytes.len()), bytes);
        }
    }

    /// It is done.
    pub fn done(self) {
        self.data(&[]);
    }

    /// It is not done.
    pub fn refuse(mut self, errno: Errno) {
        if let Some(unique) = self.unique.take() {
            self.send(&wire::refusal(unique, errno.raw_os_error()), &[]);
        }
    }

    /// It is not done, because of that.
    pub fn failed(self, error: &io::Error) {
        self.refuse(Errno::from_io_error(error).unwrap_or(Errno::IO));
    }

    /// The kernel's number of a file that it shall read in place of asking.
    pub fn open_backing(&self, file: &File) -> io::Result<u32> {
        backing::open(&self.device, file)
    }

    /// Nobody waits for it.
    fn owe_nobody(mut self) {
        self.unique = None;
    }

    fn send(&self, header: &[u8], bytes: &[u8]) {
        match rustix::io::writev(&*self.device, &[IoSlice::new(header), IoSlice::new(bytes)]) {
            // Who asked has been killed meanwhile, or it is unmounted.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::warn!(%error, "the kernel does not take an answer"),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(unique) = self.unique.take() {
            self.send(&wire::refusal(unique, Errno::IO.raw_os_error()), &[]);
        }
    }
}

/// A mount that is served, for as long as this value lives.
pub(crate) struct Connection {
    device: Arc<OwnedFd>,
    path: PathBuf,
    threads: Vec<JoinHandle<()>>,
    is_mounted: bool,
}

impl Connection {
    /// Mounts at the empty folder `path`. `everybody` may open the files as their permissions say; else only our own user.
    pub fn mount(path: &Path, everybody: bool, threads: usize, serve: impl Serve) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let device = match mount_as_root(&path, everybody) {
            Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                mount_by_helper(&path, everybody)?
            }
            done => done?,
        };
        Ok(Self::serve(device, path, threads, serve))
    }

    /// Serves the connection of a process that died, of which somebody had a duplicate. What is not answered is asked for
    /// anew. Linux 6.9.
    pub fn adopt(device: OwnedFd, path: &Path, threads: usize, serve: impl Serve) -> io::Result<Self> {
        rustix::io::write(&device, &wire::resend())?;
        // Nothing is asked of the path: nobody would answer yet.
        Ok(Self::serve(device, path.to_owned(), threads, serve))
    }

    fn serve(device: OwnedFd, path: PathBuf, threads: usize, serve: impl Serve) -> Self {
        let (device, serve) = (Arc::new(device), Arc::new(serve));
        let threads = (0..threads).map(|_| {
            let (device, serve) = (device.clone(), serve.clone());
            std::thread::spawn(move || answer_all(&device, &*serve))
        });
        let threads = threads.collect();
        Self { device, path, threads, is_mounted: true }
    }

    /// A duplicate of the descriptor, with which another process can serve the files when this one has died.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.device.try_clone()
    }

    /// The kernel forgets what it has cached of the file.
    pub fn forget(&self, node: u64) -> io::Result<()> {
        match rustix::io::write(&*self.device, &wire::forget(node)) {
            // Nobody has looked at it yet.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Unmounts, and returns when all requests are answered. Nothing may have a file open any more.
    pub fn unmount(mut self) -> io::Result<()> {
        self.is_mounted = false;
        match unmount(&self.path, UnmountFlags::empty()) {
            Err(Errno::PERM) => unmount_by_helper(&self.path)?,
            done => done?,
        }
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| io::Error::other("a thread that serves it has failed"))?;
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.is_mounted && unmount(&self.path, UnmountFlags::DETACH).is_err() {
            let _ = unmount_by_helper(&self.path);
        }
    }
}

/// Serves until it is unmounted.
fn answer_all(device: &Arc<OwnedFd>, serve: &impl Serve) {
    let mut buffer = vec![0; wire::MAX_REQUEST];
    loop {
        let length = match rustix::io::read(device, &mut *buffer) {
            Ok(length) => length,
            // Who asked has been killed meanwhile.
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            Err(Errno::NODEV) => return,
            Err(error) => {
                tracing::error!(%error, "requests of the kernel cannot be read");
                return;
            }
        };
        let Some(Request { unique, node, ask }) = wire::parse(&buffer[..length]) else {
            tracing::error!(length, "a request of the kernel is cut short");
            continue;
        };
        let reply = Reply { device: device.clone(), unique: Some(unique) };
        match ask {
            Ask::Forget => reply.owe_nobody(),
            Ask::Init { max_readahead, offered } => {
                reply.data(&wire::init(max_readahead, offered, serve.wants_backing()));
            }
            ask => serve.serve(node, ask, reply),
        }
    }
}

/// What is shown can be entered by `everybody` then.
fn options(everybody: bool) -> &'static str {
    if everybody { ",allow_other" } else { "" }
}

fn mount_as_root(path: &Path, everybody: bool) -> io::Result<OwnedFd> {
    let device: OwnedFd = File::options().read(true).write(true).open("/dev/fuse")?.into();
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let what =
        format!("fd={},rootmode=40000,user_id={user},group_id={group}{}", device.as_raw_fd(), options(everybody));
    let what = CString::new(what)?;
    mount(SOURCE, path, "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(&*what))?;
    Ok(device)
}

/// For who is not root: a program that may mount does it, and sends the descriptor (mount.fuse3(8)).
fn mount_by_helper(path: &Path, everybody: bool) -> io::Result<OwnedFd> {
    let (ours, its) = UnixStream::pair()?;
    let mut helper = Command::new(HELPER);
    let options = format!("fsname={SOURCE},nosuid,nodev{}", options(everybody));
    // It looks for its end of the line at the number that is named there; a child's input has a number that is known.
    helper.args(["-o", &options, "--"]).arg(path).env("_FUSE_COMMFD", "0").stdin(OwnedFd::from(its));
    let output = helper.stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    drop(helper);
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    receive(&ours)?.ok_or_else(|| io::Error::other(format!("{HELPER} sent no descriptor")))
}

fn receive(line: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(line, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}

fn unmount_by_helper(path: &Path) -> io::Result<()> {
    let output = Command::new(HELPER).args(["-u", "-q", "-z", "--"]).arg(path).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests;
