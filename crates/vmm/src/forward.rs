//! Ports of the host that lead into the guest: the text commands of QEMU's user network, which has no QMP ones.

use std::net::{Ipv4Addr, SocketAddrV4};

/// One forwarded TCP port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forward {
    pub listen: SocketAddrV4,
    pub guest_port: u16,
}

pub(crate) fn add_command(netdev: &str, listen: SocketAddrV4, guest_port: u16) -> String {
    format!("hostfwd_add {netdev} tcp:{}:{}-:{guest_port}", listen.ip(), listen.port())
}

pub(crate) fn remove_command(netdev: &str, listen: SocketAddrV4) -> String {
    format!("hostfwd_remove {netdev} tcp:{}:{}", listen.ip(), listen.port())
}

/// Reads `info usernet`: a line naming each user network, then a table of its connections.
pub(crate) fn parse(text: &str, netdev: &str) -> Vec<Forward> {
    let heading = format!("({netdev})");
    let mut is_ours = false;
    let mut forwards = Vec::new();
    for line in text.lines() {
        if line.trim_end().ends_with(':') {
            is_ours = line.contains(&heading);
        } else if is_ours {
            forwards.extend(parse_line(line));
        }
    }
    forwards
}

/// `TCP[HOST_FORWARD]  12  127.0.0.1 41234  10.0.2.15  22  0  0`
fn parse_line(line: &str) -> Option<Forward> {
    let mut words = line.split_ascii_whitespace();
    if words.next()? != "TCP[HOST_FORWARD]" {
        return None;
    }
    let _descriptor = words.next()?;
    let address = match words.next()? {
        "*" => Ipv4Addr::UNSPECIFIED,
        address => address.parse().ok()?,
    };
    let port = words.next()?.parse().ok()?;
    let _guest_address = words.next()?;
    let guest_port = words.next()?.parse().ok()?;
    Some(Forward { listen: SocketAddrV4::new(address, port), guest_port })
}

/// The forward that is in `after` but not in `before`.
pub(crate) fn new_one(before: &[Forward], after: &[Forward], guest_port: u16) -> Option<SocketAddrV4> {
    after
        .iter()
        .find(|forward| forward.guest_port == guest_port && !before.contains(forward))
        .map(|forward| forward.listen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]  14       127.0.0.1 39831       10.0.2.15    80     0     0\r
  TCP[ESTABLISHED]   19       127.0.0.1 39831       10.0.2.15    80     0     0\r
  UDP[236 sec]       20       10.0.2.15 40000      10.0.2.3      53     0     0\r
  TCP[HOST_FORWARD]  x        nonsense\r
Hub -1 (net1):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]  15               *  2222       10.0.2.15    22     0     0\r
";

    #[test]
    fn forwards_are_read_per_network() {
        let first = parse(TEXT, "net0");
        assert_eq!(first, [Forward { listen: "127.0.0.1:39831".parse().unwrap(), guest_port: 80 }]);
        assert_eq!(parse(TEXT, "net1"), [Forward { listen: "0.0.0.0:2222".parse().unwrap(), guest_port: 22 }]);
        assert!(parse(TEXT, "net2").is_empty());
        assert_eq!(new_one(&[], &first, 80), Some("127.0.0.1:39831".parse().unwrap()));
        assert_eq!(new_one(&first, &first, 80), None);
        assert_eq!(new_one(&[], &first, 81), None);
    }

    #[test]
    fn commands_name_the_network() {
        let listen = "127.0.0.1:0".parse().unwrap();
        assert_eq!(add_command("net0", listen, 22), "hostfwd_add net0 tcp:127.0.0.1:0-:22");
        assert_eq!(remove_command("net0", listen), "hostfwd_remove net0 tcp:127.0.0.1:0");
    }
}
