//! The daemon's end of the runner protocol: starting runners, asking them, recognising dead ones.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_keys::OwnerKey;
use collective_model::Name;
use collective_model::run::{MAX_MESSAGE_BYTES, Reply, Request, RunEnd, RunStatus};
use collective_model::run_lifeline::{MAX_PARTS, Part};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use zeroize::Zeroizing;

/// A runner answers within this time, or is taken for hung; it never waits for the network to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// ESRCH: it ended while its file was being read.
const NO_SUCH_PROCESS: i32 = rustix::io::Errno::SRCH.raw_os_error();

/// Why a runner did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers.
    #[error("the runner does not answer: {0}")]
    Silent(std::io::Error),
    /// It says no.
    #[error("{0}")]
    Refused(String),
}

/// Starts a runner for `dir` that outlives us, its words going to `runner.log`. It is told the key for what is to arrive.
pub async fn spawn(command: &[OsString], dir: &Path, key: Option<OwnerKey>) -> std::io::Result<u32> {
    let (mut runner, log) = runner(command, dir)?;
    if key.is_some() {
        runner.stdin(std::process::Stdio::piped());
    }
    let mut child = runner
        .stdout(log)
        // Out of reach of the terminal's signals.
        .process_group(0)
        .kill_on_drop(false)
        .spawn()?;
    let pid = child.id().unwrap_or_default();
    if let (Some(key), Some(mut input)) = (key, child.stdin.take()) {
        let digits = Zeroizing::new(String::from(key));
        // It fits into the pipe, whether the runner reads or not.
        input.write_all(Zeroizing::new([digits.as_bytes(), b"\n"].concat()).as_slice()).await?;
    }
    tokio::spawn(async move {
        // Only to let the kernel forget it; how it ended is in end.json.
        let _ = child.wait().await;
    });
    Ok(pid)
}

/// Starts a process that writes a disk of the machine in `dir` to its standard output, and is killed with its handle.
pub fn spawn_sender(command: &[OsString], dir: &Path, disk: &Name) -> std::io::Result<tokio::process::Child> {
    let (mut runner, _) = runner(command, dir)?;
    runner.arg(format!("--send-disk={disk}")).stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn()
}

/// Starts a process that does something with the private data of the machine in `dir`: it reads an order from its standard
/// input, tells how it is going on its standard output, and ends with us, and with its handle.
pub fn spawn_private(command: &[OsString], dir: &Path) -> std::io::Result<tokio::process::Child> {
    spawn_with(command, dir, "--private")
}

/// Starts a process that merges layers on which no machine runs; the same holds for it.
pub fn spawn_merger(command: &[OsString], dir: &Path) -> std::io::Result<tokio::process::Child> {
    spawn_with(command, dir, "--merge")
}

fn spawn_with(command: &[OsString], dir: &Path, what: &str) -> std::io::Result<tokio::process::Child> {
    let (mut runner, _) = runner(command, dir)?;
    let pipe = std::process::Stdio::piped;
    runner.arg(what).stdin(pipe()).stdout(pipe()).kill_on_drop(true).spawn()
}

/// Starts a runner for `dir` that ends with us, and with its handle.
pub fn spawn_rehearsal(command: &[OsString], dir: &Path) -> std::io::Result<tokio::process::Child> {
    let (mut runner, log) = runner(command, dir)?;
    runner.stdin(std::process::Stdio::piped()).stdout(log).kill_on_drop(true).spawn()
}

/// A runner's command line, and the log that its words go to.
fn runner(command: &[OsString], dir: &Path) -> std::io::Result<(tokio::process::Command, std::fs::File)> {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("runner.log"))?;
    let (program, arguments) =
        command.split_first().ok_or_else(|| std::io::Error::other("no command for runners was configured"))?;
    let mut runner = tokio::process::Command::new(program);
    runner.args(arguments).arg(dir).stdin(std::process::Stdio::null()).stderr(log.try_clone()?);
    // In one process with a plane, the daemon has the plane's way into its bucket. Runners ask the plane.
    collective_store::depot::VARIABLES.iter().for_each(|name| {
        runner.env_remove(name);
    });
    Ok((runner, log))
}

/// Starts a runner for `dir` that takes its machine over with these parts ([`collective_model::run_lifeline`]), and outlives us.
pub async fn spawn_heir(
    command: &[OsString],
    dir: &Path,
    parts: &Parts,
    key: Option<OwnerKey>,
) -> std::io::Result<u32> {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let (mut runner, log) = runner(command, dir)?;
    runner.stdin(std::process::Stdio::from(OwnedFd::from(theirs))).stdout(log).process_group(0).kill_on_drop(false);
    let mut child = runner.spawn()?;
    let pid = child.id().unwrap_or_default();
    tokio::spawn(async move {
        let _ = child.wait().await;
    });
    let mut line = serde_json::to_vec(&Reply::Lifeline { parts: parts.iter().map(|(part, _)| *part).collect() })?;
    line.push(b'\n');
    let descriptors: Vec<BorrowedFd<'_>> = parts.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PARTS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(std::io::Error::other("too many descriptors"));
    }
    // All of it fits into the socket, whether the runner reads or not.
    let sent = rustix::net::sendmsg(&ours, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
    ours.write_all(&line[sent..])?;
    if let Some(key) = key {
        let digits = Zeroizing::new(String::from(key));
        ours.write_all(Zeroizing::new([digits.as_bytes(), b"\n"].concat()).as_slice())?;
    }
    Ok(pid)
}

/// What keeps a machine going, as descriptors that are closed on exec.
pub(crate) type Parts = Vec<(Part, OwnedFd)>;

/// Asks the runner in `dir` for what keeps its machine going. The connection ends with the runner.
pub(crate) async fn lifeline(dir: &Path) -> Result<(Parts, UnixStream), LinkError> {
    let exchange = async {
        let mut stream = UnixStream::connect(dir.join("runner.sock")).await?;
        let mut bytes = serde_json::to_vec(&Request::Lifeline)?;
        bytes.push(b'\n');
        stream.write_all(&bytes).await?;
        let (mut line, mut descriptors) = (Vec::new(), Vec::new());
        while !line.ends_with(b"\n") && line.len() < MAX_MESSAGE_BYTES {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || receive(&stream, &mut line, &mut descriptors)) {
                Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        Ok((serde_json::from_slice::<Reply>(&line)?, descriptors, stream))
    };
    let limit = tokio::time::timeout(ANSWER_LIMIT, exchange).await;
    let limit = limit.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut)));
    match limit.map_err(LinkError::Silent)? {
        (Reply::Lifeline { parts }, descriptors, stream) if parts.len() == descriptors.len() => {
            Ok((parts.into_iter().zip(descriptors).collect(), stream))
        }
        (Reply::Error { message }, ..) => Err(LinkError::Refused(message)),
        _ => Err(LinkError::Refused("something else came than was asked for".into())),
    }
}

fn receive(stream: &UnixStream, line: &mut Vec<u8>, descriptors: &mut Vec<OwnedFd>) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PARTS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 4096];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    line.extend(&bytes[..message.bytes]);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(message.bytes)
}

/// Asks the runner in `dir`.
pub async fn ask(dir: &Path, request: &Request) -> Result<RunStatus, LinkError> {
    let exchange = async {
        let mut stream = UnixStream::connect(dir.join("runner.sock")).await?;
        let mut bytes = serde_json::to_vec(request)?;
        bytes.push(b'\n');
        stream.write_all(&bytes).await?;
        let mut line = Vec::new();
        BufReader::new(stream).take(MAX_MESSAGE_BYTES as u64).read_until(b'\n', &mut line).await?;
        serde_json::from_slice::<Reply>(&line).map_err(std::io::Error::from)
    };
    let limit = tokio::time::timeout(ANSWER_LIMIT, exchange).await;
    let limit = limit.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut)));
    match limit.map_err(LinkError::Silent)? {
        Reply::Status(status) => Ok(*status),
        Reply::Error { message } => Err(LinkError::Refused(message)),
        Reply::Lifeline { .. } => Err(LinkError::Refused("something else came than was asked for".into())),
    }
}

/// Asks the runner in `dir` for something that takes the whole connection.
pub async fn hand_over(dir: &Path, request: &Request) -> Result<(BufReader<OwnedReadHalf>, OwnedWriteHalf), LinkError> {
    let exchange = async {
        let (reader, mut writer) = UnixStream::connect(dir.join("runner.sock")).await?.into_split();
        let mut bytes = serde_json::to_vec(request)?;
        bytes.push(b'\n');
        writer.write_all(&bytes).await?;
        let (mut reader, mut line) = (BufReader::with_capacity(1 << 20, reader), Vec::new());
        (&mut reader).take(MAX_MESSAGE_BYTES as u64).read_until(b'\n', &mut line).await?;
        Ok((serde_json::from_slice::<Reply>(&line).map_err(std::io::Error::from)?, reader, writer))
    };
    let limit = tokio::time::timeout(ANSWER_LIMIT, exchange).await;
    let limit = limit.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut)));
    match limit.map_err(LinkError::Silent)? {
        (Reply::Status(_), reader, writer) => Ok((reader, writer)),
        (Reply::Error { message }, ..) => Err(LinkError::Refused(message)),
        (Reply::Lifeline { .. }, ..) => Err(LinkError::Refused("something else came than was asked for".into())),
    }
}

/// How the run in `dir` ended, if its runner could say.
pub fn end(dir: &Path) -> Option<RunEnd> {
    serde_json::from_slice(&std::fs::read(dir.join("end.json")).ok()?).ok()
}

/// Whether the process `pid` is still one with `mark` in its arguments.
pub fn is_alive(pid: u32, mark: &str) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    match std::fs::read(process.join("cmdline")) {
        // One that is just being started has none yet; but a program, which what has ended and the kernel's own have not.
        Ok(arguments) if arguments.is_empty() => std::fs::read_link(process.join("exe")).is_ok(),
        Ok(arguments) => String::from_utf8_lossy(&arguments).contains(mark),
        // That it cannot be read for want of something says nothing of it.
        Err(error) => error.kind() != std::io::ErrorKind::NotFound && error.raw_os_error() != Some(NO_SUCH_PROCESS),
    }
}

/// Kills the process `pid`, if it is one with `mark` in its arguments, and waits until it is gone.
pub async fn kill(pid: u32, mark: &str) {
    let Some(process) = rustix::process::Pid::from_raw(pid as i32) else { return };
    while is_alive(pid, mark) {
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Takes away a mount whose server has died; no mount is fine too.
pub async fn clear_mount(path: &Path) {
    // Asking about it fails with "not connected" if its server is dead.
    if rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).is_err() {
        let _ = tokio::process::Command::new("fusermount3")
            .args(["-u", "-z", "-q"])
            .arg(path)
            .stderr(std::process::Stdio::null())
            .status()
            .await;
    }
}
