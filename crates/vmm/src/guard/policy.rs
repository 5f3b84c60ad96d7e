//! Where a guest may send to: a pure decision, so that a table of cases can be tested without a network.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

const DNS_PORT: u16 = 53;

/// What differs from the rule "everything but this host and its link".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuardPolicy {
    /// Refused besides the host's own addresses, such as the plane's. Port 0 stands for every port.
    pub deny: Vec<SocketAddr>,
    /// Allowed although the rule refuses it; `deny` is stronger. Port 0 stands for every port.
    pub allow: Vec<SocketAddr>,
    /// Unix sockets that QEMU may connect or send to, such as a switch's. Absolute, without symbolic links. The
    /// connection is made with the rights of this process, so no directory in the path may be writable by QEMU.
    pub unix_peers: Vec<PathBuf>,
}

/// What the decision has to know about the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostView {
    /// Addresses of all interfaces.
    pub addresses: BTreeSet<IpAddr>,
    /// Broadcast addresses of all interfaces.
    pub broadcasts: BTreeSet<IpAddr>,
    /// The name servers to which QEMU forwards the guest's DNS: the first of each family in `/etc/resolv.conf`.
    pub resolvers: Vec<IpAddr>,
}

/// How the guest's data would travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A connection.
    Stream,
    /// Single packets.
    Datagram,
}

/// Why a destination was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// The loopback network.
    Loopback,
    /// No address (which Linux takes for the loopback) or the "this network" block.
    Unspecified,
    /// An address of this host.
    ThisHost,
    /// The link of the host: neighbours, and the metadata services of clouds.
    LinkLocal,
    /// A group of hosts.
    Multicast,
    /// All hosts of a network, this one among them.
    Broadcast,
    /// Listed in the policy.
    Listed,
}

impl fmt::Display for Denial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Denial::Loopback => "it is the host's loopback",
            Denial::Unspecified => "it is no address of a single host",
            Denial::ThisHost => "it is an address of the host itself",
            Denial::LinkLocal => "it is an address of the host's link",
            Denial::Multicast => "it is a multicast address",
            Denial::Broadcast => "it is a broadcast address",
            Denial::Listed => "it is refused by name",
        })
    }
}

impl Denial {
    /// What the one who tries is told. The user network turns it into a reset or an ICMP message for the guest.
    pub(crate) fn errno(self, transport: Transport) -> rustix::io::Errno {
        match transport {
            Transport::Stream => rustix::io::Errno::CONNREFUSED,
            Transport::Datagram => rustix::io::Errno::NETUNREACH,
        }
    }
}

/// May a guest send to `destination`? `is_delivered_here` says that the kernel would deliver it to this host
/// itself, which the list of interfaces alone does not tell (local routes, an address that was just added).
pub fn decide(
    policy: &GuardPolicy,
    host: &HostView,
    destination: SocketAddr,
    is_delivered_here: bool,
) -> Result<(), Denial> {
    let ip = normalise(destination.ip());
    let matches = |listed: &SocketAddr| {
        normalise(listed.ip()) == ip && (listed.port() == 0 || listed.port() == destination.port())
    };
    if policy.deny.iter().any(matches) {
        return Err(Denial::Listed);
    }
    // QEMU's own name server (10.0.2.3) is this forwarding; without it no guest resolves names.
    let is_resolver =
        destination.port() == DNS_PORT && host.resolvers.iter().any(|resolver| normalise(*resolver) == ip);
    if is_resolver || policy.allow.iter().any(matches) {
        return Ok(());
    }
    match by_class(ip) {
        Some(denial) => Err(denial),
        None if host.broadcasts.contains(&ip) => Err(Denial::Broadcast),
        None if is_delivered_here || host.addresses.contains(&ip) => Err(Denial::ThisHost),
        None => Ok(()),
    }
}

fn by_class(ip: IpAddr) -> Option<Denial> {
    let classes = match ip {
        IpAddr::V4(v4) => [
            (v4.is_loopback(), Denial::Loopback),
            (v4.octets()[0] == 0, Denial::Unspecified),
            (v4.is_link_local(), Denial::LinkLocal),
            (v4.is_multicast(), Denial::Multicast),
            (v4.is_broadcast(), Denial::Broadcast),
        ],
        IpAddr::V6(v6) => [
            (v6.is_loopback(), Denial::Loopback),
            // Also the deprecated IPv4-compatible addresses, ::a.b.c.d.
            (v6.segments()[..6] == [0; 6], Denial::Unspecified),
            (v6.is_unicast_link_local(), Denial::LinkLocal),
            (v6.is_multicast(), Denial::Multicast),
            (false, Denial::Broadcast),
        ],
    };
    classes.into_iter().find_map(|(applies, denial)| applies.then_some(denial))
}

/// An IPv4 address written as IPv6 (`::ffff:a.b.c.d`) is that IPv4 address: the kernel sends to it by IPv4.
pub(crate) fn normalise(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// The first name server of each family, as libslirp reads them (`get_dns_addr`, `get_dns6_addr`).
pub(crate) fn parse_resolvers(text: &str) -> Vec<IpAddr> {
    let servers: Vec<IpAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            address.split('%').next()?.parse().ok()
        })
        .collect();
    let first_v4 = servers.iter().find(|ip| ip.is_ipv4()).copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let first_v6 = servers.iter().find(|ip| ip.is_ipv6()).copied().unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    [first_v4, first_v6].into_iter().filter(|ip| !ip.is_unspecified()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host() -> HostView {
        HostView {
            addresses: ["192.168.7.2", "2001:db8::2"].map(|ip| ip.parse().unwrap()).into(),
            broadcasts: ["192.168.7.255".parse().unwrap()].into(),
            resolvers: vec!["127.0.0.53".parse().unwrap()],
        }
    }

    fn policy() -> GuardPolicy {
        GuardPolicy {
            deny: vec!["203.0.113.5:8443".parse().unwrap(), "203.0.113.6:0".parse().unwrap()],
            allow: vec!["192.168.7.2:9000".parse().unwrap(), "203.0.113.6:80".parse().unwrap()],
            unix_peers: Vec::new(),
        }
    }

    #[track_caller]
    fn check(destination: &str, expected: Result<(), Denial>) {
        let verdict = decide(&policy(), &host(), destination.parse().unwrap(), false);
        assert_eq!(verdict, expected, "{destination}");
    }

    #[test]
    fn table_of_destinations() {
        for (destination, denial) in [
            ("127.0.0.1:22", Denial::Loopback),
            ("127.255.1.9:80", Denial::Loopback),
            ("[::1]:80", Denial::Loopback),
            ("[::ffff:127.0.0.1]:80", Denial::Loopback),
            ("0.0.0.0:80", Denial::Unspecified),
            ("0.1.2.3:80", Denial::Unspecified),
            ("[::]:80", Denial::Unspecified),
            ("[::127.0.0.1]:80", Denial::Unspecified),
            ("192.168.7.2:22", Denial::ThisHost),
            ("[::ffff:192.168.7.2]:22", Denial::ThisHost),
            ("[2001:db8::2]:22", Denial::ThisHost),
            ("169.254.169.254:80", Denial::LinkLocal),
            ("[fe80::1]:80", Denial::LinkLocal),
            ("[febf::1]:80", Denial::LinkLocal),
            ("224.0.0.251:5353", Denial::Multicast),
            ("[ff02::fb]:5353", Denial::Multicast),
            ("255.255.255.255:67", Denial::Broadcast),
            ("192.168.7.255:137", Denial::Broadcast),
            ("203.0.113.5:8443", Denial::Listed),
            ("[::ffff:203.0.113.5]:8443", Denial::Listed),
            ("203.0.113.6:80", Denial::Listed),
            ("127.0.0.53:80", Denial::Loopback),
        ] {
            check(destination, Err(denial));
        }
        for destination in [
            "127.0.0.53:53",
            "192.168.7.2:9000",
            "[::ffff:192.168.7.2]:9000",
            "192.168.7.3:22",
            "203.0.113.5:80",
            "10.0.0.1:80",
            "1.1.1.1:443",
            "[2001:db8::3]:443",
            "[fec0::1]:80",
        ] {
            check(destination, Ok(()));
        }
    }

    #[test]
    fn what_the_kernel_delivers_here_is_this_host() {
        let destination = "10.9.9.9:80".parse().unwrap();
        assert_eq!(decide(&policy(), &host(), destination, true), Err(Denial::ThisHost));
        let listed = "192.168.7.2:9000".parse().unwrap();
        assert_eq!(decide(&policy(), &host(), listed, true), Ok(()));
    }

    #[test]
    fn resolvers_are_the_first_of_each_family() {
        let text = "# nameserver 9.9.9.9\nsearch x\nnameserver 127.0.0.53\nnameserver 1.1.1.1\nnameserver fe80::1%eth0\nnameserver\nnameserver bad\n";
        assert_eq!(parse_resolvers(text), ["127.0.0.53", "fe80::1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert!(parse_resolvers("").is_empty());
    }

    proptest! {
        #[test]
        fn a_mapped_address_is_judged_like_the_address(octets: [u8; 4], port: u16, here: bool) {
            let v4 = Ipv4Addr::from(octets);
            let plain = decide(&policy(), &host(), (v4, port).into(), here);
            let mapped = decide(&policy(), &host(), (v4.to_ipv6_mapped(), port).into(), here);
            prop_assert_eq!(plain, mapped);
        }

        #[test]
        fn nothing_local_passes_without_an_exception(a: u8, b: u8, c: u8, port: u16) {
            let empty = GuardPolicy::default();
            let nowhere = HostView::default();
            for ip in [Ipv4Addr::new(127, a, b, c), Ipv4Addr::new(0, a, b, c), Ipv4Addr::new(169, 254, b, c), Ipv4Addr::new(224 | (a & 15), b, c, a)] {
                prop_assert!(decide(&empty, &nowhere, (ip, port).into(), false).is_err());
            }
        }
    }
}
