//! Route lookups: the question, and what an answer means.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteLwEnCapType, RouteMessage, RouteMetric, RouteType,
        RouteVia,
    },
};
use nix::errno::Errno;

use super::{NextHopError, Path};

/// `IPPROTO_UDP`, for policy rules that look at the protocol.
const UDP: u8 = 17;

/// Where the kernel would send a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Index of the output interface.
    pub(super) interface: u32,
    /// The gateway, or the remote itself. May be IPv6 for an IPv4 remote (RFC 5549).
    pub(super) neighbour: IpAddr,
    /// The route's own MTU in bytes, path MTU discovery included.
    pub(super) mtu: Option<u32>,
}

/// A set of addresses that a changed route covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// The addresses whose first `length` bits are those of `address`.
    pub(super) fn new(address: IpAddr, length: u8) -> Self {
        Self { address, length }
    }

    /// Every address in it.
    pub(super) fn range(self) -> RangeInclusive<IpAddr> {
        match self.address {
            IpAddr::V4(address) => {
                let host = u32::MAX.checked_shr(self.length.into()).unwrap_or(0);
                let first = address.to_bits() & !host;
                let last = first | host;
                Ipv4Addr::from(first).into()..=Ipv4Addr::from(last).into()
            }
            IpAddr::V6(address) => {
                let host = u128::MAX.checked_shr(self.length.into()).unwrap_or(0);
                let first = address.to_bits() & !host;
                let last = first | host;
                Ipv6Addr::from(first).into()..=Ipv6Addr::from(last).into()
            }
        }
    }
}

/// `RTM_GETROUTE` for an address as destination, to learn whether it is one of this host's.
pub(super) fn local_question(local: IpAddr) -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetRoute(message(local))
}

/// `RTM_GETROUTE` for a packet of the host's own on this path, policy rules included.
pub(super) fn question(path: Path) -> RouteNetlinkMessage {
    let mut message = message(path.remote);
    message.header.source_prefix_length = bits(path.local);
    message
        .attributes
        .push(RouteAttribute::Source(path.local.into()));
    message.attributes.push(RouteAttribute::IpProto(UDP));
    RouteNetlinkMessage::GetRoute(message)
}

fn message(destination: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = match destination {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = bits(destination);
    message
        .attributes
        .push(RouteAttribute::Destination(destination.into()));
    message
}

fn bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// What can be said about a path without asking the kernel.
pub(super) fn precheck(path: Path) -> Result<(), NextHopError> {
    if path.local.is_ipv4() != path.remote.is_ipv4() {
        return Err(NextHopError::MixedFamilies(path));
    }
    if let IpAddr::V6(remote) = path.remote
        && remote.is_unicast_link_local()
    {
        return Err(NextHopError::RemoteIsLinkLocal(path.remote));
    }
    Ok(())
}

/// Reads the answer to [`local_question`].
pub(super) fn local_answer(
    path: Path,
    answer: &Result<RouteMessage, Errno>,
) -> Result<(), NextHopError> {
    match answer {
        Ok(route) if route.header.kind == RouteType::Local => Ok(()),
        Ok(_) | Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EINVAL) => {
            Err(NextHopError::LocalNotOurs {
                local: path.local,
                remote: path.remote,
            })
        }
        Err(errno) => Err(NextHopError::Kernel {
            path,
            errno: *errno,
        }),
    }
}

/// Reads the answer to [`question`], whose `local` is known to be an address of this host.
pub(super) fn answer(
    path: Path,
    answer: Result<RouteMessage, Errno>,
) -> Result<Route, NextHopError> {
    // For routes that send nothing the kernel gives their error in place of an answer
    // (fib_props in net/ipv4/fib_semantics.c, ip6_rt_init_dst_reject in net/ipv6/route.c).
    let route = answer.map_err(|errno| match errno {
        Errno::ENETUNREACH => NextHopError::NoRoute(path),
        Errno::EINVAL => NextHopError::Blackhole(path),
        Errno::EHOSTUNREACH => NextHopError::RouteUnreachable(path),
        Errno::EACCES => NextHopError::Prohibited(path),
        errno => NextHopError::Kernel { path, errno },
    })?;
    let remote = path.remote;
    match route.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err(NextHopError::RemoteIsLocal(remote)),
        RouteType::Broadcast => {
            return Err(NextHopError::NotUnicast {
                remote,
                kind: "broadcast",
            });
        }
        RouteType::Multicast => {
            return Err(NextHopError::NotUnicast {
                remote,
                kind: "multicast",
            });
        }
        RouteType::Anycast => {
            return Err(NextHopError::NotUnicast {
                remote,
                kind: "anycast",
            });
        }
        RouteType::BlackHole => return Err(NextHopError::Blackhole(path)),
        RouteType::Unreachable => return Err(NextHopError::RouteUnreachable(path)),
        RouteType::Prohibit => return Err(NextHopError::Prohibited(path)),
        _ => return Err(NextHopError::NoRoute(path)),
    }
    let mut interface = None;
    let mut neighbour = remote;
    let mut mtu = None;
    for attribute in route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(index),
            RouteAttribute::Gateway(RouteAddress::Inet(gateway))
            | RouteAttribute::Via(RouteVia::Inet(gateway)) => neighbour = gateway.into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway))
            | RouteAttribute::Via(RouteVia::Inet6(gateway)) => neighbour = gateway.into(),
            RouteAttribute::EncapType(kind) if kind != RouteLwEnCapType::None => {
                return Err(NextHopError::Encapsulated(remote));
            }
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(bytes) if *bytes > 0 => Some(*bytes),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // Without RTM_F_FIB_MATCH the answer is the one way chosen, also from a multipath route.
    let interface = interface.ok_or(NextHopError::Kernel {
        path,
        errno: Errno::EBADMSG,
    })?;
    Ok(Route {
        interface,
        neighbour,
        mtu,
    })
}

/// The prefix that a route notification is about; `None` when it is not about unicast IP.
pub(super) fn prefix(message: &RouteMessage) -> Option<Prefix> {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    // A default route has no destination attribute.
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some((*address).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some((*address).into()),
            _ => None,
        })
        .unwrap_or(any);
    Some(Prefix::new(
        address,
        message.header.destination_prefix_length,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(local: &str, remote: &str) -> Path {
        Path {
            local: local.parse().expect(local),
            remote: remote.parse().expect(remote),
        }
    }

    fn reply(kind: RouteType, attributes: Vec<RouteAttribute>) -> Result<RouteMessage, Errno> {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.attributes = attributes;
        Ok(message)
    }

    #[test]
    fn the_neighbour_is_the_gateway_or_the_remote() {
        let path = path("192.0.2.1", "203.0.113.9");
        let gateway = Ipv4Addr::new(192, 0, 2, 254);
        let gateway6 = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        for (attributes, neighbour) in [
            (vec![], path.remote),
            (
                vec![RouteAttribute::Gateway(gateway.into_address())],
                gateway.into(),
            ),
            (
                vec![RouteAttribute::Via(gateway6.into())],
                IpAddr::from(gateway6),
            ),
        ] {
            let mut attributes = attributes;
            attributes.push(RouteAttribute::Oif(4));
            attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]));
            assert_eq!(
                answer(path, reply(RouteType::Unicast, attributes)),
                Ok(Route {
                    interface: 4,
                    neighbour,
                    mtu: Some(1400)
                })
            );
        }
    }

    trait IntoAddress {
        fn into_address(self) -> RouteAddress;
    }

    impl IntoAddress for Ipv4Addr {
        fn into_address(self) -> RouteAddress {
            IpAddr::from(self).into()
        }
    }

    #[test]
    fn every_way_not_to_get_there_has_its_own_error() {
        let path = path("192.0.2.1", "203.0.113.9");
        let remote = path.remote;
        let oif = || vec![RouteAttribute::Oif(4)];
        for (reply, error) in [
            (Err(Errno::ENETUNREACH), NextHopError::NoRoute(path)),
            (Err(Errno::EINVAL), NextHopError::Blackhole(path)),
            (
                Err(Errno::EHOSTUNREACH),
                NextHopError::RouteUnreachable(path),
            ),
            (Err(Errno::EACCES), NextHopError::Prohibited(path)),
            (
                Err(Errno::ENOBUFS),
                NextHopError::Kernel {
                    path,
                    errno: Errno::ENOBUFS,
                },
            ),
            (
                reply(RouteType::Local, oif()),
                NextHopError::RemoteIsLocal(remote),
            ),
            (
                reply(RouteType::Broadcast, oif()),
                NextHopError::NotUnicast {
                    remote,
                    kind: "broadcast",
                },
            ),
            (
                reply(RouteType::Multicast, oif()),
                NextHopError::NotUnicast {
                    remote,
                    kind: "multicast",
                },
            ),
            (
                reply(RouteType::Anycast, oif()),
                NextHopError::NotUnicast {
                    remote,
                    kind: "anycast",
                },
            ),
            (
                reply(RouteType::BlackHole, oif()),
                NextHopError::Blackhole(path),
            ),
            (
                reply(RouteType::Unreachable, oif()),
                NextHopError::RouteUnreachable(path),
            ),
            (
                reply(RouteType::Prohibit, oif()),
                NextHopError::Prohibited(path),
            ),
            (
                reply(
                    RouteType::Unicast,
                    vec![
                        RouteAttribute::EncapType(RouteLwEnCapType::Mpls),
                        RouteAttribute::Oif(4),
                    ],
                ),
                NextHopError::Encapsulated(remote),
            ),
            (
                reply(RouteType::Unicast, vec![]),
                NextHopError::Kernel {
                    path,
                    errno: Errno::EBADMSG,
                },
            ),
        ] {
            assert_eq!(answer(path, reply), Err(error));
        }
    }

    #[test]
    fn a_local_address_is_one_that_the_kernel_calls_local() {
        let path = path("192.0.2.1", "203.0.113.9");
        let not_ours = NextHopError::LocalNotOurs {
            local: path.local,
            remote: path.remote,
        };
        assert_eq!(local_answer(path, &reply(RouteType::Local, vec![])), Ok(()));
        for answer in [
            reply(RouteType::Unicast, vec![]),
            reply(RouteType::Broadcast, vec![]),
            Err(Errno::ENETUNREACH),
        ] {
            assert_eq!(local_answer(path, &answer), Err(not_ours.clone()));
        }
        assert!(not_ours.to_string().contains("did you swap LOCAL=REMOTE?"));
        assert!(matches!(
            local_answer(path, &Err(Errno::ENOBUFS)),
            Err(NextHopError::Kernel { .. })
        ));
    }

    #[test]
    fn a_path_of_two_families_or_without_its_link_is_refused() {
        assert!(matches!(
            precheck(path("192.0.2.1", "2001:db8::1")),
            Err(NextHopError::MixedFamilies(_))
        ));
        assert!(matches!(
            precheck(path("fe80::1", "fe80::2")),
            Err(NextHopError::RemoteIsLinkLocal(_))
        ));
        assert_eq!(precheck(path("2001:db8::1", "2001:db8::2")), Ok(()));
    }

    #[test]
    fn a_prefix_covers_its_addresses_and_no_others() {
        for (address, length, first, last) in [
            ("192.0.2.77", 24, "192.0.2.0", "192.0.2.255"),
            ("192.0.2.77", 32, "192.0.2.77", "192.0.2.77"),
            ("0.0.0.0", 0, "0.0.0.0", "255.255.255.255"),
            (
                "2001:db8::7",
                64,
                "2001:db8::",
                "2001:db8::ffff:ffff:ffff:ffff",
            ),
            ("2001:db8::7", 128, "2001:db8::7", "2001:db8::7"),
        ] {
            let prefix = Prefix::new(address.parse().expect(address), length);
            let first: IpAddr = first.parse().expect(first);
            let last: IpAddr = last.parse().expect(last);
            assert_eq!(prefix.range(), first..=last);
        }
    }
}
