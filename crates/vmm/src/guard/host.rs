//! What the guard knows about this host: its addresses and resolvers, read again every second, and the kernel's own
//! word on where it would deliver a packet.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, getsockname, socket_with};

use super::kernel::interface_addresses;
use super::policy::{HostView, normalise, parse_resolvers};

/// Reading the interfaces takes some 50 µs; a guest can open thousands of connections in a second.
const FRESH: Duration = Duration::from_secs(1);

/// The last view and its age.
pub(super) struct HostCache {
    view: HostView,
    read_at: Option<Instant>,
}

impl HostCache {
    pub(super) fn new() -> HostCache {
        HostCache { view: HostView::default(), read_at: None }
    }

    pub(super) fn view(&mut self) -> &HostView {
        if self.read_at.is_none_or(|at| at.elapsed() > FRESH) {
            match interface_addresses() {
                Ok(found) => {
                    self.view.addresses = found.iter().map(|(ip, _)| normalise(*ip)).collect();
                    self.view.broadcasts = found.into_iter().filter_map(|(_, broadcast)| broadcast).collect();
                }
                // The last list stays, and `is_delivered_here` is asked for every destination anyway.
                Err(error) => tracing::warn!(%error, "the addresses of this host could not be read"),
            }
            self.view.resolvers = parse_resolvers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
            self.read_at = Some(Instant::now());
        }
        &self.view
    }
}

/// Whether the kernel would deliver packets for `destination` to this host: then it takes the destination itself or
/// a loopback address as the source. Connecting a UDP socket sends nothing.
pub(super) fn is_delivered_here(destination: SocketAddr) -> bool {
    let ip: IpAddr = normalise(destination.ip());
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let target = match (ip, destination) {
        (IpAddr::V6(_), SocketAddr::V6(v6)) => SocketAddr::V6(v6),
        _ => SocketAddr::new(ip, destination.port().max(1)),
    };
    let source = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None).and_then(|probe| {
        connect(&probe, &target)?;
        getsockname(&probe)
    });
    // Without a route nothing can be delivered anywhere.
    source
        .ok()
        .and_then(|source| SocketAddr::try_from(source).ok())
        .map(|source| normalise(source.ip()))
        .is_some_and(|source| source == ip || source.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_what_is_here() {
        assert!(is_delivered_here("127.0.0.1:80".parse().unwrap()));
        assert!(is_delivered_here("127.9.9.9:0".parse().unwrap()));
        assert!(is_delivered_here("[::ffff:127.0.0.1]:80".parse().unwrap()));
        assert!(!is_delivered_here("203.0.113.9:80".parse().unwrap()));
    }

    #[test]
    fn every_address_of_an_interface_is_in_the_view_and_delivered_here() {
        let mut cache = HostCache::new();
        let view = cache.view().clone();
        assert!(view.addresses.contains(&"127.0.0.1".parse().unwrap()), "{view:?}");
        for ip in view.addresses.iter().filter(|ip| ip.is_ipv4()) {
            assert!(is_delivered_here((*ip, 9).into()), "{ip}");
        }
    }
}
