//! What another runner needs to go on with the machine when this one has died ([`collective_model::run_lifeline`]).
//!
//! Until the daemon says that it has it, QEMU dies with this process, and so nobody is left who waits for answers in vain.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use collective_model::run::{MAX_MESSAGE_BYTES, Reply};
use collective_model::run_lifeline::{MAX_PARTS, Part};
use collective_vmm::{GuardLine, Vm};
use collective_volume::Mount;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::OwnedWriteHalf;

use crate::state::Shared;

/// Descriptors, and what they are.
pub(crate) type Parts = Vec<(Part, OwnedFd)>;

/// What a runner takes over with.
pub(crate) struct Lifeline {
    pub disks: OwnedFd,
    pub process: OwnedFd,
    pub guard: GuardLine,
}

/// Of a machine that runs.
pub(crate) fn parts(mount: &Mount, vm: &Vm) -> io::Result<Parts> {
    let collective_vmm::Lifeline { process, guard } = vm.lifeline()?;
    let guard = guard.ok_or_else(|| io::Error::other("it has no network guard"))?;
    Ok(vec![
        (Part::Disks, mount.descriptor()?),
        (Part::Process, process),
        (Part::Guard, guard.listener),
        (Part::GuardReceived, guard.received),
    ])
}

/// Answers a daemon that asks for them.
pub(crate) async fn give(shared: &Shared, writer: &mut OwnedWriteHalf) -> io::Result<()> {
    let duplicates: io::Result<Parts> =
        shared.lifeline().iter().map(|(part, descriptor)| Ok((*part, descriptor.try_clone()?))).collect();
    let reply = match &duplicates {
        Ok(parts) if !parts.is_empty() => Reply::Lifeline { parts: parts.iter().map(|(part, _)| *part).collect() },
        Ok(_) => Reply::Error { message: "there is no machine that could be taken over".into() },
        Err(error) => Reply::Error { message: format!("what keeps it going cannot be given: {error}") },
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    let parts = if let Reply::Lifeline { .. } = reply { duplicates.unwrap_or_default() } else { Vec::new() };
    let descriptors: Vec<BorrowedFd<'_>> = parts.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    let sent = loop {
        writer.writable().await?;
        let stream: &tokio::net::UnixStream = writer.as_ref();
        match stream.try_io(Interest::WRITABLE, || send(stream.as_fd(), &bytes, &descriptors)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => break sent?,
        }
    };
    writer.write_all(&bytes[sent..]).await
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PARTS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// What this runner was started with, the first message on its standard input.
pub(crate) fn take(input: &impl AsFd) -> Result<Lifeline, String> {
    let parts = receive(input).map_err(|e| format!("what keeps the machine going did not come: {e}"))?;
    let (mut disks, mut process, mut listener, mut received) = (None, None, None, None);
    for (part, descriptor) in parts {
        match part {
            Part::Disks => disks = Some(descriptor),
            Part::Process => process = Some(descriptor),
            Part::Guard => listener = Some(descriptor),
            Part::GuardReceived => received = Some(descriptor),
            Part::Unknown => {}
        }
    }
    match (disks, process, listener, received) {
        (Some(disks), Some(process), Some(listener), Some(received)) => {
            Ok(Lifeline { disks, process, guard: GuardLine { listener, received } })
        }
        _ => Err("what keeps the machine going did not come whole".into()),
    }
}

fn receive(input: &impl AsFd) -> io::Result<Parts> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PARTS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    // A byte at a time: what follows is somebody else's.
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        let message =
            rustix::net::recvmsg(input, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if message.bytes == 0 || line.len() == MAX_MESSAGE_BYTES {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend(byte);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
    }
    match serde_json::from_slice(&line)? {
        Reply::Lifeline { parts } if parts.len() == descriptors.len() => {
            Ok(parts.into_iter().zip(descriptors).collect())
        }
        _ => Err(io::Error::other("something else came")),
    }
}
