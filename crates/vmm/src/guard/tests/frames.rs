//! QEMU's real user network under the guard, fed with Ethernet frames as a guest would send them.

use std::io::{Read, Write};
use std::path::Path;

use super::*;
use crate::spawn::{Process, spawn};

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const GUEST_IP: [u8; 4] = [10, 0, 2, 15];
const HOST_IP: [u8; 4] = [10, 0, 2, 2];
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const TCP_RESET: u8 = 4;
const TCP_SYN: u8 = 2;
const TCP_SYN_ACK: u8 = 0x12;

/// A QEMU without a machine: only a user network, and a plug for us.
struct UserNetwork {
    process: Process,
    plug: UnixStream,
    _temp: tempfile::TempDir,
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        self.process.kill();
    }
}

impl UserNetwork {
    async fn start(mut policy: GuardPolicy) -> UserNetwork {
        let temp = tempfile::tempdir().unwrap();
        let socket = temp.path().canonicalize().unwrap().join("plug");
        let listener = UnixListener::bind(&socket).unwrap();
        policy.unix_peers.push(socket.clone());
        let network = format!("stream,id=plug,server=off,addr.type=unix,addr.path={}", socket.display());
        let words = "-no-user-config -nodefaults -display none -machine none \
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
            -netdev user,id=user -netdev hubport,id=a,hubid=0,netdev=user -netdev hubport,id=b,hubid=0,netdev=plug -netdev";
        let mut arguments: Vec<String> = words.split_ascii_whitespace().map(str::to_owned).collect();
        arguments.push(network);
        let user = crate::spawn::tests::is_root().then_some((60001, 60001));
        let rights = Rights { user, parent_death_kill: true, guard: Some(policy), ..Rights::default() };
        let qemu = crate::find_qemu().await.unwrap();
        let log = tempfile::tempfile().unwrap();
        let process = spawn(Path::new(&qemu.path), arguments, log.try_clone().unwrap(), rights).await.unwrap();
        let exited = process.exited();
        let accepted = tokio::task::spawn_blocking(move || listener.accept());
        let plug = tokio::select! {
            accepted = accepted => accepted.unwrap().unwrap().0,
            exit = exited => {
                let mut text = String::new();
                std::io::Seek::rewind(&mut &log).and_then(|()| (&log).read_to_string(&mut text)).unwrap();
                panic!("QEMU ended ({exit:?}) and said {text}")
            }
        };
        plug.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut network = UserNetwork { process, plug, _temp: temp };
        network.announce();
        network
    }

    /// A gratuitous ARP request, from which the network learns our address.
    fn announce(&mut self) {
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
        arp.extend(GUEST_MAC);
        arp.extend(GUEST_IP);
        arp.extend([0; 6]);
        arp.extend(GUEST_IP);
        self.send_frame(0x0806, &arp);
    }

    fn send_frame(&mut self, kind: u16, body: &[u8]) {
        let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
        frame.extend(GUEST_MAC);
        frame.extend(kind.to_be_bytes());
        frame.extend(body);
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.plug.write_all(&[&length[..], &frame].concat()).unwrap();
    }

    fn send_packet(&mut self, protocol: u8, destination: [u8; 4], body: &[u8]) {
        let total = u16::try_from(20 + body.len()).unwrap().to_be_bytes();
        let mut header = vec![0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, protocol, 0, 0];
        header.extend(GUEST_IP);
        header.extend(destination);
        let sum = checksum(&header).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        self.send_frame(0x0800, &[header, body.to_vec()].concat());
    }

    fn send_udp(&mut self, destination: [u8; 4], port: u16, data: &[u8]) {
        let length = u16::try_from(8 + data.len()).unwrap();
        let mut body: Vec<u8> = [40000u16, port, length, 0].into_iter().flat_map(u16::to_be_bytes).collect();
        body.extend(data);
        self.send_packet(PROTOCOL_UDP, destination, &body);
    }

    fn send_syn(&mut self, destination: [u8; 4], port: u16) {
        let mut body: Vec<u8> = [40001u16, port].into_iter().flat_map(u16::to_be_bytes).collect();
        body.extend([0, 0, 0, 9, 0, 0, 0, 0, 0x50, TCP_SYN, 0xff, 0xff, 0, 0, 0, 0]);
        let pseudo = [&GUEST_IP[..], &destination, &[0, PROTOCOL_TCP, 0, 20], &body].concat();
        let sum = checksum(&pseudo).to_be_bytes();
        body[16..18].copy_from_slice(&sum);
        self.send_packet(PROTOCOL_TCP, destination, &body);
    }

    /// The body of the next packet of a protocol; others are passed over.
    fn receive(&mut self, protocol: u8) -> Vec<u8> {
        loop {
            let mut length = [0; 4];
            self.plug.read_exact(&mut length).unwrap();
            let mut frame = vec![0; u32::from_be_bytes(length) as usize];
            self.plug.read_exact(&mut frame).unwrap();
            if frame[12..14] == [8, 0] && frame[14 + 9] == protocol {
                return frame[34..].to_vec();
            }
        }
    }

    fn tcp_answer(&mut self) -> u8 {
        self.receive(PROTOCOL_TCP)[13]
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[tokio::test]
async fn a_guest_does_not_reach_the_loopback_by_the_user_network() {
    let (tcp, udp, tcp_port, udp_port) = listeners();
    let mut network = UserNetwork::start(GuardPolicy::default()).await;
    network.send_udp(HOST_IP, udp_port, b"from the guest");
    // Type 3: destination unreachable.
    assert_eq!(network.receive(PROTOCOL_ICMP)[0], 3);
    for destination in [HOST_IP, [127, 0, 0, 1]] {
        network.send_syn(destination, tcp_port);
        assert_eq!(network.tcp_answer() & TCP_RESET, TCP_RESET, "{destination:?}");
    }
    nothing_came(&tcp, &udp);
}

#[tokio::test]
async fn a_guest_reaches_what_the_policy_allows_by_the_user_network() {
    let (tcp, udp, tcp_port, udp_port) = listeners();
    let allow = vec![([127, 0, 0, 1], tcp_port).into(), ([127, 0, 0, 1], udp_port).into()];
    let mut network = UserNetwork::start(GuardPolicy { allow, ..GuardPolicy::default() }).await;
    network.send_udp(HOST_IP, udp_port, b"from the guest");
    assert_eq!(received(&udp), b"from the guest");
    network.send_syn(HOST_IP, tcp_port);
    assert_eq!(network.tcp_answer(), TCP_SYN_ACK);
    tcp.accept().unwrap();
}
