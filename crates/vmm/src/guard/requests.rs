//! One caught system call: read what it wants, decide, and make it in the caller's place.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fcntl_getfl, openat2};
use rustix::io::Errno;
use rustix::net::{SendFlags, SocketAddrUnix, SocketType, connect, connect_unspec, send, sendto, sockopt};
use rustix::process::{Pid, PidfdGetfdFlags, pidfd_getfd};

use super::host::{HostCache, is_delivered_here};
use super::kernel::{Notification, read_memory};
use super::policy::{GuardPolicy, Transport, decide};

/// Data copied for one call: more than any packet; of a stream the rest is sent by the caller's next call.
const DATA_LIMIT: usize = 256 << 10;
/// The kernel's own limit of pieces in one message (UIO_MAXIOV).
const PIECES_LIMIT: usize = 1024;
/// Size of the largest socket address (sockaddr_storage).
const ADDRESS_LIMIT: usize = 128;
/// Refused destinations that are reported; a guest that scans must not fill the log.
const REPORT_LIMIT: usize = 64;

/// What becomes of a caught call.
pub(super) enum Work {
    /// It is answered with this.
    Done(Result<i64, Errno>),
    /// It is answered with what this returns, which may take long.
    Wait(Box<dyn FnOnce() -> Result<i64, Errno> + Send>),
}

/// Decides about the calls of one process.
pub(super) struct Supervisor {
    policy: GuardPolicy,
    host: HostCache,
    child: Pid,
    process: OwnedFd,
    reported: HashSet<SocketAddr>,
}

/// A socket address as the caller wrote it.
#[derive(Debug, PartialEq, Eq)]
enum Destination {
    None,
    Unspecified,
    Internet(SocketAddr),
    Unix(Vec<u8>),
}

/// What a message holds: the parts of `sendto` and `sendmsg` that are used.
struct Message {
    destination: Destination,
    pieces: Vec<(u64, usize)>,
    flags: SendFlags,
}

impl Supervisor {
    pub(super) fn new(policy: GuardPolicy, child: Pid, process: OwnedFd) -> Supervisor {
        Supervisor { policy, host: HostCache::new(), child, process, reported: HashSet::new() }
    }

    /// `is_waiting` tells whether the caller still waits; it is asked after the last reading and before anything is
    /// done, because the number of a thread that is dead by then may have been another's.
    pub(super) fn consider(&mut self, call: &Notification, is_waiting: impl Fn() -> bool) -> Work {
        self.try_consider(call, is_waiting).unwrap_or_else(|errno| Work::Done(Err(errno)))
    }

    fn try_consider(&mut self, call: &Notification, is_waiting: impl Fn() -> bool) -> Result<Work, Errno> {
        // Sockets are taken from the process that was launched; should it have children, they get none.
        if !Path::new(&format!("/proc/{}/task/{}", self.child.as_raw_nonzero(), call.thread)).exists() {
            return Err(Errno::PERM);
        }
        let [socket, a, b, c, d, e] = call.arguments;
        let is_connect = call.number == libc::SYS_connect;
        let message = match call.number {
            _ if is_connect => Message {
                destination: read_destination(call.thread, a, b)?,
                pieces: Vec::new(),
                flags: SendFlags::empty(),
            },
            libc::SYS_sendto => {
                let length = usize::try_from(b).map_err(|_| Errno::INVAL)?;
                Message {
                    destination: read_destination(call.thread, d, e)?,
                    pieces: vec![(a, length)],
                    flags: flags(c as u32),
                }
            }
            libc::SYS_sendmsg => read_message(call.thread, a, b as u32)?,
            _ => return Err(Errno::NOSYS),
        };
        let socket =
            pidfd_getfd(&self.process, socket as i32, PidfdGetfdFlags::empty()).map_err(|errno| match errno {
                Errno::BADF => Errno::BADF,
                _ => Errno::PERM,
            })?;
        let is_waiting = || if is_waiting() { Ok(()) } else { Err(Errno::INTR) };
        if is_connect {
            is_waiting()?;
            self.connect(socket, message.destination)
        } else {
            self.send(call.thread, socket, message, is_waiting)
        }
    }

    fn connect(&mut self, socket: OwnedFd, destination: Destination) -> Result<Work, Errno> {
        match destination {
            Destination::None => Err(Errno::INVAL),
            Destination::Unspecified => Ok(Work::Done(connect_unspec(&socket).map(|()| 0))),
            Destination::Internet(address) => {
                let transport = match sockopt::socket_type(&socket)? {
                    SocketType::STREAM => Transport::Stream,
                    _ => Transport::Datagram,
                };
                self.check(address, transport)?;
                Ok(now_or_wait(socket, move |socket| connect(socket, &address).map(|()| 0)))
            }
            Destination::Unix(path) => {
                let peer = self.unix_peer(&path)?;
                Ok(now_or_wait(socket, move |socket| connect(socket, &peer.address()?).map(|()| 0)))
            }
        }
    }

    fn send(
        &mut self,
        thread: i32,
        socket: OwnedFd,
        message: Message,
        is_waiting: impl Fn() -> Result<(), Errno>,
    ) -> Result<Work, Errno> {
        let is_stream = sockopt::socket_type(&socket)? == SocketType::STREAM;
        let total = message.pieces.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.1));
        if total > DATA_LIMIT && !is_stream {
            return Err(Errno::MSGSIZE);
        }
        let data = read_memory(thread, &limited(message.pieces))?;
        is_waiting()?;
        // A stream that is connected ignores addresses, and one that is not must not be connected by a send.
        let destination = if is_stream { Destination::None } else { message.destination };
        let peer = match &destination {
            Destination::None => None,
            Destination::Unspecified => return Err(Errno::AFNOSUPPORT),
            Destination::Internet(address) => {
                self.check(*address, Transport::Datagram)?;
                None
            }
            Destination::Unix(path) => Some(self.unix_peer(path)?),
        };
        let transmit = move |socket: &OwnedFd, flags: SendFlags| {
            let sent = match (&destination, &peer) {
                (Destination::Internet(address), _) => sendto(socket, &data, flags, address),
                (_, Some(peer)) => sendto(socket, &data, flags, &peer.address()?),
                _ => send(socket, &data, flags),
            };
            sent.map(|count| count as i64)
        };
        let is_patient = !message.flags.contains(SendFlags::DONTWAIT) && is_blocking(&socket)?;
        match transmit(&socket, message.flags | SendFlags::DONTWAIT) {
            Err(Errno::AGAIN) if is_patient => Ok(Work::Wait(Box::new(move || transmit(&socket, message.flags)))),
            result => Ok(Work::Done(result)),
        }
    }

    fn check(&mut self, address: SocketAddr, transport: Transport) -> Result<(), Errno> {
        let is_here = is_delivered_here(address);
        decide(&self.policy, self.host.view(), address, is_here).map_err(|denial| {
            if self.reported.len() < REPORT_LIMIT && self.reported.insert(address) {
                tracing::warn!(pid = self.child.as_raw_nonzero().get(), %address, "the guest was kept from an address, because {denial}");
            }
            denial.errno(transport)
        })
    }

    fn unix_peer(&self, path: &[u8]) -> Result<UnixPeer, Errno> {
        let path = Path::new(OsStr::from_bytes(path));
        if !self.policy.unix_peers.iter().any(|peer| peer == path) {
            return Err(Errno::CONNREFUSED);
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map(UnixPeer)
    }
}

/// A unix socket held open, so that its name can not be exchanged for another between check and use.
struct UnixPeer(OwnedFd);

impl UnixPeer {
    fn address(&self) -> Result<SocketAddrUnix, Errno> {
        SocketAddrUnix::new(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

fn is_blocking(socket: &OwnedFd) -> Result<bool, Errno> {
    Ok(!fcntl_getfl(socket)?.contains(OFlags::NONBLOCK))
}

fn now_or_wait(socket: OwnedFd, call: impl FnOnce(&OwnedFd) -> Result<i64, Errno> + Send + 'static) -> Work {
    match is_blocking(&socket) {
        Err(errno) => Work::Done(Err(errno)),
        Ok(false) => Work::Done(call(&socket)),
        Ok(true) => Work::Wait(Box::new(move || call(&socket))),
    }
}

/// Only flags that say how to send; others would connect (FASTOPEN) or need the caller's memory (ZEROCOPY).
/// A broken pipe must not become a signal for us.
fn flags(raw: u32) -> SendFlags {
    let known = SendFlags::DONTWAIT | SendFlags::OOB | SendFlags::MORE | SendFlags::EOR | SendFlags::CONFIRM;
    (SendFlags::from_bits_retain(raw) & known) | SendFlags::NOSIGNAL
}

/// Cuts a list of pieces to what is copied at once.
fn limited(mut pieces: Vec<(u64, usize)>) -> Vec<(u64, usize)> {
    let mut room = DATA_LIMIT;
    for piece in &mut pieces {
        piece.1 = piece.1.min(room);
        room -= piece.1;
    }
    pieces.retain(|piece| piece.1 > 0);
    pieces
}

fn read_destination(thread: i32, address: u64, length: u64) -> Result<Destination, Errno> {
    // The kernel takes the length as a 32-bit number.
    let length = length as u32 as usize;
    if address == 0 || length == 0 {
        return Ok(Destination::None);
    }
    if length > ADDRESS_LIMIT {
        return Err(Errno::INVAL);
    }
    parse_destination(&read_memory(thread, &[(address, length)])?)
}

/// struct sockaddr_in, sockaddr_in6 and sockaddr_un.
fn parse_destination(raw: &[u8]) -> Result<Destination, Errno> {
    let field = |at: usize, length: usize| raw.get(at..at + length).ok_or(Errno::INVAL);
    let word = |at: usize| field(at, 4).map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]]);
    let family = field(0, 2).map(|bytes| i32::from(u16::from_ne_bytes([bytes[0], bytes[1]])))?;
    let port = || field(2, 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    match family {
        libc::AF_UNSPEC => Ok(Destination::Unspecified),
        libc::AF_INET => {
            field(0, 16)?;
            Ok(Destination::Internet(SocketAddrV4::new(Ipv4Addr::from(word(4)?), port()?).into()))
        }
        libc::AF_INET6 => {
            let mut octets = [0u8; 16];
            octets.copy_from_slice(field(8, 16)?);
            let (flow, scope) = (u32::from_ne_bytes(word(4)?), u32::from_ne_bytes(word(24)?));
            Ok(Destination::Internet(SocketAddrV6::new(Ipv6Addr::from(octets), port()?, flow, scope).into()))
        }
        libc::AF_UNIX => {
            let path = raw.get(2..).unwrap_or_default();
            let end = path.iter().position(|&byte| byte == 0).unwrap_or(path.len());
            Ok(Destination::Unix(path[..end].to_vec()))
        }
        _ => Err(Errno::AFNOSUPPORT),
    }
}

/// struct msghdr and its list of struct iovec, as of 64-bit machines.
fn read_message(thread: i32, header: u64, raw_flags: u32) -> Result<Message, Errno> {
    let raw = read_memory(thread, &[(header, 56)])?;
    let word = |at: usize| raw[at..at + 8].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let (name, name_length, list, count, control_length) = (word(0), word(8), word(16), word(24), word(40));
    if control_length != 0 {
        // Descriptors would have to be fetched and sent one by one; QEMU sends none in the ways we start it.
        return Err(Errno::PERM);
    }
    let count = usize::try_from(count).ok().filter(|count| *count <= PIECES_LIMIT).ok_or(Errno::MSGSIZE)?;
    let raw_list = read_memory(thread, &[(list, count * 16)])?;
    let pieces = raw_list
        .chunks_exact(16)
        .map(|piece| {
            let word = |half: &[u8]| half.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            (word(&piece[..8]), word(&piece[8..]) as usize)
        })
        .collect();
    Ok(Message { destination: read_destination(thread, name, name_length)?, pieces, flags: flags(raw_flags) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn socket_addresses_are_read() {
        let v4 = [2, 0, 0, 80, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(parse_destination(&v4), Ok(Destination::Internet("127.0.0.1:80".parse().unwrap())));
        assert_eq!(parse_destination(&v4[..15]), Err(Errno::INVAL));
        let mut v6 = [0u8; 28];
        v6[0] = 10;
        v6[2..4].copy_from_slice(&443u16.to_be_bytes());
        v6[23] = 1;
        v6[24] = 7;
        let expected = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 443, 0, 7);
        assert_eq!(parse_destination(&v6), Ok(Destination::Internet(expected.into())));
        assert_eq!(parse_destination(b"\x01\0/run/x\0rest"), Ok(Destination::Unix(b"/run/x".to_vec())));
        assert_eq!(parse_destination(b"\x01\0\0abstract"), Ok(Destination::Unix(Vec::new())));
        assert_eq!(parse_destination(&[0, 0]), Ok(Destination::Unspecified));
        assert_eq!(parse_destination(&[16, 0, 0, 0]), Err(Errno::AFNOSUPPORT));
        assert_eq!(parse_destination(&[2]), Err(Errno::INVAL));
    }

    #[test]
    fn pieces_are_cut_at_the_limit() {
        let pieces = limited(vec![(1, DATA_LIMIT - 1), (2, 0), (3, usize::MAX), (4, 5)]);
        assert_eq!(pieces, [(1, DATA_LIMIT - 1), (3, 1)]);
    }

    #[test]
    fn dangerous_flags_are_dropped() {
        assert_eq!(flags(0x2000_0000 | 0x0400_0000), SendFlags::NOSIGNAL);
        assert_eq!(flags(0x40), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(raw in proptest::collection::vec(any::<u8>(), 0..ADDRESS_LIMIT)) {
            let _ = parse_destination(&raw);
        }
    }
}
