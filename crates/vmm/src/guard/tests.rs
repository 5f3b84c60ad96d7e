//! The guard around real processes, started by the same path as QEMU: this test program itself, which tries what
//! its arguments say, and QEMU's user network fed with frames as a guest would send them.

mod frames;

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType};

use super::*;
use crate::spawn::Rights;
use crate::spawn::tests::run;

const MARK: &str = "try=";

/// Not a test of its own: the role of the guarded child. It prints what came of each attempt in its arguments.
#[test]
#[ignore = "started by other tests, with attempts as arguments"]
fn child() {
    for attempt in std::env::args().filter_map(|word| word.strip_prefix(MARK).map(str::to_owned)) {
        let result = attempt_of(&attempt).map_or_else(|error| format!("{:?}", error.kind()), |()| "ok".into());
        println!("\nRESULT {attempt} {result}");
    }
}

fn attempt_of(attempt: &str) -> io::Result<()> {
    let (kind, target) = attempt.split_once('/').unwrap();
    let address = || target.parse::<SocketAddr>().unwrap();
    match kind {
        "tcp" => TcpStream::connect(address()).map(drop),
        "tcp-nonblocking" => connect_without_blocking(address()),
        "udp" => UdpSocket::bind("0.0.0.0:0")?.send_to(b"sendto", address()).map(drop),
        "udp6" => UdpSocket::bind("[::]:0")?.send_to(b"sendto6", address()).map(drop),
        "udp-connect" => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(address())?;
            socket.send(b"send").map(drop)
        }
        "sendmsg" => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            let pieces = [io::IoSlice::new(b"send"), io::IoSlice::new(b""), io::IoSlice::new(b"msg")];
            let mut control = SendAncillaryBuffer::default();
            rustix::net::sendmsg_addr(&socket, &address(), &pieces, &mut control, SendFlags::empty())?;
            Ok(())
        }
        "race" => race(address()),
        "unix" => UnixStream::connect(target).map(drop),
        "unix-datagram" => UnixDatagram::unbound()?.send_to(b"unix", target).map(drop),
        "unix-pair" => {
            let (one, two) = UnixStream::pair()?;
            let sent = rustix::net::sendmsg(
                &one,
                &[io::IoSlice::new(&[7; 3000])],
                &mut SendAncillaryBuffer::default(),
                SendFlags::empty(),
            )?;
            let mut buffer = [0; 3000];
            std::io::Read::read_exact(&mut &two, &mut buffer)?;
            if sent == 3000 && buffer == [7; 3000] { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
        }
        "vsock" => Ok(rustix::net::socket(AddressFamily::VSOCK, SocketType::STREAM, None).map(drop)?),
        other => panic!("unknown attempt {other}"),
    }
}

fn connect_without_blocking(address: SocketAddr) -> io::Result<()> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&Timespec { tv_sec: 10, tv_nsec: 0 }))?;
            rustix::net::sockopt::socket_error(&socket)??;
        }
        Err(errno) => return Err(errno.into()),
    }
    Ok(())
}

/// Connects many times, while another thread exchanges the port in the address for that of a forbidden listener
/// (the next port argument): what is connected to must be what was decided about.
fn race(allowed: SocketAddr) -> io::Result<()> {
    let forbidden: u16 =
        std::env::args().find_map(|word| word.strip_prefix("forbidden=").map(|port| port.parse().unwrap())).unwrap();
    // struct sockaddr_in as 16-bit words: family, port, address, zeros.
    let raw: &[AtomicU16; 8] =
        &[2, allowed.port().to_be(), u16::from_ne_bytes([127, 0]), u16::from_ne_bytes([0, 1]), 0, 0, 0, 0]
            .map(AtomicU16::new);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                raw[1].store(forbidden.to_be(), Ordering::Relaxed);
                raw[1].store(allowed.port().to_be(), Ordering::Relaxed);
            }
        });
        let mut connected = 0;
        for _ in 0..400 {
            let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            use std::os::fd::AsRawFd;
            // SAFETY: `raw` is 16 live bytes, as long as said; the kernel only reads them.
            let result = unsafe { libc::connect(socket.as_raw_fd(), raw.as_ptr().cast(), 16) };
            connected += usize::from(result == 0);
        }
        is_over.store(true, Ordering::Relaxed);
        // Both outcomes must have happened for the race to have been one.
        if connected > 0 && connected < 400 { Ok(()) } else { Err(io::Error::from(ErrorKind::Other)) }
    })
}

/// Starts the child under a policy and returns the result of each attempt.
async fn attempts(policy: GuardPolicy, attempts: &[String], extra: &[String]) -> Vec<String> {
    let this_program = std::env::current_exe().unwrap();
    let marked: Vec<String> = attempts.iter().map(|attempt| format!("{MARK}{attempt}")).collect();
    let mut arguments = vec!["guard::tests::child", "--exact", "--ignored", "--nocapture"];
    arguments.extend(marked.iter().chain(extra).map(String::as_str));
    let rights = Rights { guard: Some(policy), parent_death_kill: true, ..Rights::default() };
    let (_, text) = run(&this_program, &arguments, rights).await;
    attempts
        .iter()
        .map(|attempt| {
            let mark = format!("RESULT {attempt} ");
            text.lines()
                .find_map(|line| line.strip_prefix(&mark))
                .unwrap_or_else(|| panic!("{attempt} is not in {text}"))
                .to_owned()
        })
        .collect()
}

fn nothing_came(listener: &TcpListener, udp: &UdpSocket) {
    listener.set_nonblocking(true).unwrap();
    udp.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(udp.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// What came within ten seconds.
fn received(udp: &UdpSocket) -> Vec<u8> {
    udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut buffer = [0; 64];
    let length = udp.recv(&mut buffer).unwrap();
    buffer[..length].to_vec()
}

fn listeners() -> (TcpListener, UdpSocket, u16, u16) {
    let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let (tcp_port, udp_port) = (tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port());
    (tcp, udp, tcp_port, udp_port)
}

#[tokio::test]
async fn the_loopback_of_the_host_is_out_of_reach() {
    let (tcp, udp, tcp_port, udp_port) = listeners();
    let tries = [
        format!("tcp/127.0.0.1:{tcp_port}"),
        format!("tcp/0.0.0.0:{tcp_port}"),
        format!("tcp/[::ffff:127.0.0.1]:{tcp_port}"),
        format!("tcp-nonblocking/127.0.0.1:{tcp_port}"),
        format!("udp/127.0.0.1:{udp_port}"),
        format!("udp6/[::ffff:127.0.0.1]:{udp_port}"),
        format!("udp-connect/127.0.0.1:{udp_port}"),
        format!("sendmsg/127.0.0.1:{udp_port}"),
    ];
    let results = attempts(GuardPolicy::default(), &tries, &[]).await;
    let (refused, unreachable) = ("ConnectionRefused", "NetworkUnreachable");
    assert_eq!(results, [refused, refused, refused, refused, unreachable, unreachable, unreachable, unreachable]);
    nothing_came(&tcp, &udp);
}

#[tokio::test]
async fn what_the_policy_allows_works() {
    let (tcp, udp, tcp_port, udp_port) = listeners();
    let allow = vec![([127, 0, 0, 1], tcp_port).into(), ([127, 0, 0, 1], udp_port).into()];
    let tries = [
        format!("tcp/127.0.0.1:{tcp_port}"),
        format!("tcp-nonblocking/127.0.0.1:{tcp_port}"),
        format!("udp/127.0.0.1:{udp_port}"),
        format!("udp-connect/127.0.0.1:{udp_port}"),
        format!("sendmsg/127.0.0.1:{udp_port}"),
        "unix-pair/-".to_owned(),
    ];
    let results = attempts(GuardPolicy { allow, ..GuardPolicy::default() }, &tries, &[]).await;
    assert_eq!(results, ["ok"; 6]);
    for _ in 0..2 {
        tcp.accept().unwrap();
    }
    assert_eq!([received(&udp), received(&udp), received(&udp)], [&b"sendto"[..], b"send", b"sendmsg"]);
}

#[tokio::test]
async fn an_address_exchanged_after_the_decision_is_not_connected_to() {
    let (allowed, _udp, allowed_port, _) = listeners();
    let (forbidden, udp, forbidden_port, _) = listeners();
    // Nobody accepts, so the connections must fit into the queue or fail: accept them meanwhile.
    let accepting =
        std::thread::spawn(move || while allowed.accept().is_ok_and(|(stream, _)| stream.peer_addr().is_ok()) {});
    let policy = GuardPolicy { allow: vec![([127, 0, 0, 1], allowed_port).into()], ..GuardPolicy::default() };
    let results =
        attempts(policy, &[format!("race/127.0.0.1:{allowed_port}")], &[format!("forbidden={forbidden_port}")]).await;
    assert_eq!(results, ["ok"]);
    nothing_came(&forbidden, &udp);
    drop(accepting);
}

#[tokio::test]
async fn unix_sockets_only_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { temp.path().canonicalize().unwrap().join(name) };
    let _open = UnixListener::bind(path("open")).unwrap();
    let _closed = UnixListener::bind(path("closed")).unwrap();
    let datagram = UnixDatagram::bind(path("datagram")).unwrap();
    std::os::unix::fs::symlink(path("closed"), path("link")).unwrap();
    let unix_peers = vec![path("open"), path("datagram"), path("link")];
    let tries = [
        format!("unix/{}", path("open").display()),
        format!("unix/{}", path("closed").display()),
        format!("unix/{}", path("link").display()),
        format!("unix-datagram/{}", path("datagram").display()),
        "vsock/-".to_owned(),
    ];
    let results = attempts(GuardPolicy { unix_peers, ..GuardPolicy::default() }, &tries, &[]).await;
    assert_eq!(results[0], "ok");
    assert_eq!(results[1], "ConnectionRefused");
    assert_ne!(results[2], "ok");
    assert_eq!(results[3], "ok");
    assert_ne!(results[4], "ok");
    let mut buffer = [0; 8];
    let (length, _) = rustix::net::recv(&datagram, &mut buffer[..], RecvFlags::DONTWAIT).unwrap();
    assert_eq!(&buffer[..length], b"unix");
}

#[test]
fn what_a_dead_guard_left_is_tried_again() {
    use std::os::fd::FromRawFd;
    let (sender, receiver) = mpsc::channel();
    let caller = std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        sender.send(kernel::install(&filter::program(true)).unwrap()).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let send = || socket.send_to(b"x", "127.0.0.1:9").map_err(|error| error.raw_os_error().unwrap());
        (send(), send())
    });
    // SAFETY: the filter's listener was just made, and nobody else has it.
    let listener = unsafe { OwnedFd::from_raw_fd(receiver.recv().unwrap()) };
    poll(&mut [PollFd::new(&listener, PollFlags::IN)], None).unwrap();
    // Received, and neither noted nor answered.
    let left = kernel::receive(listener.as_fd()).unwrap();
    let received = memfd_create("received", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&received, &(left.id - 3).to_ne_bytes(), 0).unwrap();
    let process = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    adopt(GuardLine { listener, received }, GuardPolicy::default(), getpid(), process).unwrap();
    let (first, second) = caller.join().unwrap();
    assert_eq!(first, Err(Errno::AGAIN.raw_os_error()));
    assert_eq!(second, Err(Denial::Loopback.errno(Transport::Datagram).raw_os_error()), "the new guard decides");
}
