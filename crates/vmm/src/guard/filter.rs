//! The filter that the kernel runs on QEMU's system calls: which are asked about, which are refused at once.
//!
//! A guest reaches the network only by calls that name an address, so only those wait for the supervisor. The
//! others below are the ways around them. Language: Linux, `Documentation/userspace-api/seccomp_filter.rst`.

use libc::{c_long, c_uint, sock_filter};
use rustix::io::Errno;

const AUDIT_ARCH: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
const X32_BIT: u32 = 0x4000_0000;
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;

const ASK: u32 = libc::SECCOMP_RET_USER_NOTIF;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_BITS: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// The whole program. Without `huge_pages` the advice to use them is answered with success and not followed: where memory
/// arrives page by page, one touch would fetch a megabyte.
pub(super) fn program(huge_pages: bool) -> Vec<sock_filter> {
    let mut program = vec![
        load(OFFSET_ARCH),
        jump(JUMP_EQUAL, AUDIT_ARCH, 1, 0),
        // Other calling conventions have other numbers for the same calls.
        refuse(Errno::NOSYS),
        load(OFFSET_NUMBER),
        jump(JUMP_BITS, X32_BIT, 0, 1),
        refuse(Errno::NOSYS),
    ];
    let mut call = |number: c_long, body: &[sock_filter]| {
        // A skipped block leaves the call's number loaded; an entered one always ends in a return.
        program.push(jump(JUMP_EQUAL, number as u32, 0, body.len() as u8));
        program.extend_from_slice(body);
    };
    call(libc::SYS_connect, &[answer(ASK)]);
    call(libc::SYS_sendmsg, &[answer(ASK)]);
    call(libc::SYS_sendto, &ask_if_set(4));
    // Many messages in one call, and queues that the filter does not see: QEMU does without both.
    call(libc::SYS_sendmmsg, &[refuse(Errno::NOSYS)]);
    call(libc::SYS_io_uring_setup, &[refuse(Errno::NOSYS)]);
    call(libc::SYS_io_uring_enter, &[refuse(Errno::NOSYS)]);
    call(libc::SYS_io_uring_register, &[refuse(Errno::NOSYS)]);
    call(libc::SYS_socket, &sockets());
    call(libc::SYS_setsockopt, &socket_options());
    // Borrowing the sockets or the memory of another process of the same user, such as the supervisor.
    for number in [libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_pidfd_getfd] {
        call(number, &[refuse(Errno::PERM)]);
    }
    if !huge_pages {
        let advice = libc::MADV_HUGEPAGE as u32;
        let body = [load(low_half(2)), jump(JUMP_EQUAL, advice, 0, 1), answer(libc::SECCOMP_RET_ERRNO), answer(ALLOW)];
        call(libc::SYS_madvise, &body);
    }
    program.push(answer(ALLOW));
    program
}

/// Asks if the pointer that is this argument is not null.
fn ask_if_set(argument: u32) -> [sock_filter; 6] {
    let low = low_half(argument);
    [load(low), jump(JUMP_EQUAL, 0, 0, 2), load(low + 4), jump(JUMP_EQUAL, 0, 1, 0), answer(ASK), answer(ALLOW)]
}

/// Unix sockets of any type; of the Internet families only TCP, UDP and ping. Raw sockets choose addresses in the
/// packet, SCTP has further calls that connect, and other families (vsock, netlink) reach the host by themselves.
fn sockets() -> Vec<sock_filter> {
    let protocols = [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6];
    let mut body = vec![
        load(low_half(0)),
        jump(JUMP_EQUAL, libc::AF_UNIX as u32, 0, 1),
        answer(ALLOW),
        jump(JUMP_EQUAL, libc::AF_INET as u32, 2, 0),
        jump(JUMP_EQUAL, libc::AF_INET6 as u32, 1, 0),
        refuse(Errno::AFNOSUPPORT),
        load(low_half(1)),
        sock_filter { code: AND, jt: 0, jf: 0, k: 0xf },
        jump(JUMP_EQUAL, libc::SOCK_STREAM as u32, 2, 0),
        jump(JUMP_EQUAL, libc::SOCK_DGRAM as u32, 1, 0),
        refuse(Errno::ACCESS),
        load(low_half(2)),
    ];
    for protocol in protocols {
        body.extend([jump(JUMP_EQUAL, protocol as u32, 0, 1), answer(ALLOW)]);
    }
    body.push(refuse(Errno::PROTONOSUPPORT));
    body
}

/// Options that send packets to another place than the address says: source routes.
fn socket_options() -> Vec<sock_filter> {
    const IPV6_2292RTHDR: u32 = 5;
    const IPV6_2292PKTOPTIONS: u32 = 6;
    vec![
        load(low_half(1)),
        jump(JUMP_EQUAL, libc::IPPROTO_IP as u32, 0, 3),
        load(low_half(2)),
        jump(JUMP_EQUAL, libc::IP_OPTIONS as u32, 6, 0),
        answer(ALLOW),
        jump(JUMP_EQUAL, libc::IPPROTO_IPV6 as u32, 0, 5),
        load(low_half(2)),
        jump(JUMP_EQUAL, libc::IPV6_RTHDR as u32, 2, 0),
        jump(JUMP_EQUAL, IPV6_2292RTHDR, 1, 0),
        jump(JUMP_EQUAL, IPV6_2292PKTOPTIONS, 0, 1),
        refuse(Errno::PERM),
        answer(ALLOW),
    ]
}

/// Offset of the low half of an argument; 32-bit arguments are only that (the machine is little-endian).
const fn low_half(argument: u32) -> u32 {
    16 + 8 * argument
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn jump(code: u16, k: c_uint, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn answer(k: u32) -> sock_filter {
    sock_filter { code: RETURN, jt: 0, jf: 0, k }
}

fn refuse(errno: Errno) -> sock_filter {
    answer(libc::SECCOMP_RET_ERRNO | errno.raw_os_error() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's interpreter, for the instructions used here.
    fn run(arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        arguments.iter().for_each(|argument| data.extend(argument.to_le_bytes()));
        let program = program(false);
        let (mut at, mut value) = (0, 0u32);
        loop {
            let instruction = program[at];
            at += 1;
            let mut branch = |taken: bool| at += usize::from(if taken { instruction.jt } else { instruction.jf });
            match instruction.code {
                LOAD => {
                    let offset = instruction.k as usize;
                    value = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                AND => value &= instruction.k,
                JUMP_EQUAL => branch(value == instruction.k),
                JUMP_BITS => branch(value & instruction.k != 0),
                RETURN => return instruction.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn call(number: c_long, arguments: [u64; 6]) -> u32 {
        run(AUDIT_ARCH, number as u32, arguments)
    }

    fn errno(errno: Errno) -> u32 {
        libc::SECCOMP_RET_ERRNO | errno.raw_os_error() as u32
    }

    #[test]
    fn calls_with_addresses_are_asked_about() {
        assert_eq!(call(libc::SYS_connect, [3, 0, 0, 0, 0, 0]), ASK);
        assert_eq!(call(libc::SYS_sendmsg, [3, 0, 0, 0, 0, 0]), ASK);
        assert_eq!(call(libc::SYS_sendto, [3, 1, 1, 0, 0, 0]), ALLOW);
        assert_eq!(call(libc::SYS_sendto, [3, 1, 1, 0, 0x1000, 16]), ASK);
        assert_eq!(call(libc::SYS_sendto, [3, 1, 1, 0, 0x7f00_0000_0000, 16]), ASK);
        assert_eq!(call(libc::SYS_read, [0; 6]), ALLOW);
    }

    #[test]
    fn huge_pages_are_not_taken_where_pages_still_arrive() {
        let advise = |advice: i32| call(libc::SYS_madvise, [0, 4096, advice as u64, 0, 0, 0]);
        assert_eq!(advise(libc::MADV_HUGEPAGE), libc::SECCOMP_RET_ERRNO, "success, without doing it");
        assert_eq!(advise(libc::MADV_DONTNEED), ALLOW);
        assert!(program(true).len() < program(false).len());
    }

    #[test]
    fn ways_around_are_closed() {
        assert_eq!(call(libc::SYS_sendmmsg, [0; 6]), errno(Errno::NOSYS));
        assert_eq!(call(libc::SYS_io_uring_setup, [0; 6]), errno(Errno::NOSYS));
        assert_eq!(call(libc::SYS_ptrace, [0; 6]), errno(Errno::PERM));
        assert_eq!(run(0x4000_0003, 102, [0; 6]), errno(Errno::NOSYS));
        assert_eq!(call(libc::SYS_connect | c_long::from(X32_BIT), [0; 6]), errno(Errno::NOSYS));
    }

    #[test]
    fn only_ordinary_sockets_are_made() {
        let socket = |domain: i32, kind: i32, protocol: i32| {
            call(libc::SYS_socket, [domain as u64, kind as u64, protocol as u64, 0, 0, 0])
        };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        assert_eq!(socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0), ALLOW);
        assert_eq!(socket(libc::AF_INET, libc::SOCK_STREAM | flags, 0), ALLOW);
        assert_eq!(socket(libc::AF_INET6, libc::SOCK_DGRAM | flags, libc::IPPROTO_ICMPV6), ALLOW);
        assert_eq!(socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP), errno(Errno::ACCESS));
        assert_eq!(socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP), errno(Errno::PROTONOSUPPORT));
        assert_eq!(socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0), errno(Errno::AFNOSUPPORT));
        assert_eq!(socket(libc::AF_NETLINK, libc::SOCK_RAW, 0), errno(Errno::AFNOSUPPORT));
    }

    #[test]
    fn source_routes_are_refused() {
        let option = |level: i32, name: i32| call(libc::SYS_setsockopt, [3, level as u64, name as u64, 0, 0, 0]);
        assert_eq!(option(libc::IPPROTO_IP, libc::IP_OPTIONS), errno(Errno::PERM));
        assert_eq!(option(libc::IPPROTO_IP, libc::IP_TOS), ALLOW);
        assert_eq!(option(libc::IPPROTO_IPV6, libc::IPV6_RTHDR), errno(Errno::PERM));
        assert_eq!(option(libc::IPPROTO_IPV6, 5), errno(Errno::PERM));
        assert_eq!(option(libc::IPPROTO_IPV6, 6), errno(Errno::PERM));
        assert_eq!(option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY), ALLOW);
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_REUSEADDR), ALLOW);
    }
}
