//! The kernel interfaces of the guard that no library wraps safely: seccomp notification, another process's memory,
//! and the list of interfaces. All `unsafe` of the guard is here.

use std::ffi::c_void;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::io::Errno;

/// Room for a notification of a newer kernel; ours has 80 bytes.
const NOTIFICATION_ROOM: usize = 512;

/// A system call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Notification {
    pub id: u64,
    /// The calling thread.
    pub thread: i32,
    pub number: i64,
    pub arguments: [u64; 6],
}

/// Installs the filter on the calling thread and returns the listener's number. It allocates nothing, so it may be
/// called between fork and exec.
pub(super) fn install(program: &[libc::sock_filter]) -> io::Result<RawFd> {
    let header = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // Without the second flag (Linux 5.19) a signal could interrupt and repeat a call that was already answered.
    let flags = [
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
    ];
    let mut result = -1;
    for flags in flags {
        // SAFETY: `header` and the program it points to live through the call; the kernel only reads them.
        result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const header) };
        if result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// Waits for the next call. Poll first: where all callers are gone, older kernels would wait for ever.
pub(super) fn receive(listener: BorrowedFd<'_>) -> io::Result<Notification> {
    let mut room = [0u64; NOTIFICATION_ROOM / 8];
    // SAFETY: the kernel writes its structure, of which `seccomp_notif` is the beginning, into the larger, zeroed and
    // aligned `room`; every bit pattern is a valid `seccomp_notif`.
    let notification = unsafe {
        if libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, room.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        room.as_ptr().cast::<libc::seccomp_notif>().read()
    };
    Ok(Notification {
        id: notification.id,
        thread: notification.pid as i32,
        number: i64::from(notification.data.nr),
        arguments: notification.data.args,
    })
}

/// Ends the waiting call with a value or an error. The caller may be gone already: that is an error to ignore.
pub(super) fn respond(listener: BorrowedFd<'_>, id: u64, result: Result<i64, Errno>) -> io::Result<()> {
    let (val, error) = match result {
        Ok(value) => (value, 0),
        Err(errno) => (0, -errno.raw_os_error()),
    };
    let mut room = [0u64; NOTIFICATION_ROOM / 8];
    let response = libc::seccomp_notif_resp { id, val, error, flags: 0 };
    // SAFETY: `room` is large and aligned enough to hold the response; the kernel only reads it.
    let result = unsafe {
        room.as_mut_ptr().cast::<libc::seccomp_notif_resp>().write(response);
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, room.as_mut_ptr())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the call still waits, so that its thread number still means the same thread.
pub(super) fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the kernel reads eight bytes at the pointer, which is to a live local.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) == 0 }
}

/// Copies pieces of another process's memory (address, length) one after the other; all or nothing.
pub(super) fn read_memory(thread: i32, pieces: &[(u64, usize)]) -> Result<Vec<u8>, Errno> {
    let total = pieces.iter().map(|piece| piece.1).sum();
    let mut buffer = vec![0u8; total];
    if total == 0 {
        return Ok(buffer);
    }
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: total };
    let remote: Vec<libc::iovec> = pieces
        .iter()
        .map(|&(address, length)| libc::iovec { iov_base: address as *mut c_void, iov_len: length })
        .collect();
    // SAFETY: the kernel writes at most `total` bytes, into `buffer`; the remote addresses are checked by it.
    let copied =
        unsafe { libc::process_vm_readv(thread, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    if usize::try_from(copied) == Ok(total) { Ok(buffer) } else { Err(Errno::FAULT) }
}

/// An address of an interface, and its broadcast address where it has one.
pub(super) fn interface_addresses() -> io::Result<Vec<(IpAddr, Option<IpAddr>)>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    let mut found = Vec::new();
    // SAFETY: on success `first` is a list owned by us until freeifaddrs; its nodes and addresses are valid until
    // then, and nothing is kept beyond. `to_ip` reads only as much as the family has.
    unsafe {
        if libc::getifaddrs(&raw mut first) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut node = first;
        while let Some(entry) = node.as_ref() {
            if let Some(ip) = to_ip(entry.ifa_addr) {
                let is_broadcast = entry.ifa_flags & libc::IFF_BROADCAST as u32 != 0;
                found.push((ip, is_broadcast.then(|| to_ip(entry.ifa_ifu)).flatten()));
            }
            node = entry.ifa_next;
        }
        libc::freeifaddrs(first);
    }
    Ok(found)
}

/// # Safety
/// `address` is null or points to a socket address that is as long as its family says.
unsafe fn to_ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: by the contract; the family was looked at before the longer structure is read.
    unsafe {
        match i32::from(address.as_ref()?.sa_family) {
            libc::AF_INET => {
                let v4 = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr))))
            }
            libc::AF_INET6 => {
                let v6 = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)))
            }
            _ => None,
        }
    }
}

/// Keeps a listener usable from helper threads.
pub(super) fn respond_logged(listener: &impl AsFd, id: u64, result: Result<i64, Errno>) {
    if let Err(error) = respond(listener.as_fd(), id, result) {
        // ENOENT: the caller was killed meanwhile.
        tracing::trace!(%error, "an answer came too late");
    }
}
