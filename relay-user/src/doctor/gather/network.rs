//! Filtering, routes and neighbours.

use std::{fs, net::IpAddr};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};

use crate::{
    doctor::facts::{Neighbour, NetworkFacts},
    netlink::exchange,
    next_hop::{Interface, Interfaces, neighbour_address},
};

/// Neighbours that are told of at most.
const MOST_NEIGHBOURS: usize = 4096;

pub(super) fn facts(interface: &Interface) -> NetworkFacts {
    let name = &interface.name;
    let mut facts = NetworkFacts {
        addresses: interface.addresses(),
        rp_filter: setting("ipv4", "all", "rp_filter")
            .zip(setting("ipv4", name, "rp_filter"))
            .map(|(all, own)| [all, own]),
        forwarding_ipv4: setting("ipv4", name, "forwarding").map(|value| value != 0),
        forwarding_ipv6: setting("ipv6", name, "forwarding").map(|value| value != 0),
        ..NetworkFacts::default()
    };
    routes(|route| {
        if leaves_through(route) == Some(interface.index)
            && let Some(gateway) = gateway(route)
        {
            facts.gateways.insert(gateway);
        }
    });
    neighbours(|neighbour| {
        if neighbour.header.ifindex == interface.index
            && facts.neighbours.len() < MOST_NEIGHBOURS
            && let Some((address, state)) = read(neighbour)
        {
            facts.neighbours.insert(address, state);
        }
    });
    facts
}

/// The interface that a default route leaves through: IPv4's first.
pub(super) fn default_interface() -> Option<String> {
    let mut found = Vec::new();
    routes(|route| {
        if route.header.destination_prefix_length == 0
            && route.header.kind == RouteType::Unicast
            && let Some(index) = leaves_through(route)
        {
            found.push((route.header.address_family == AddressFamily::Inet6, index));
        }
    });
    let (_, index) = found.into_iter().min()?;
    let interfaces = Interfaces::read().ok()?;
    interfaces.indexed(index).map(|found| found.name.clone())
}

/// Of an interface, which the path names as it is called.
fn setting(family: &str, interface: &str, name: &str) -> Option<u8> {
    let path = format!("/proc/sys/net/{family}/conf/{interface}/{name}");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// What the kernel does not tell of routes and neighbours is not there for the doctor.
fn routes(mut each: impl FnMut(&RouteMessage)) {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let request = RouteNetlinkMessage::GetRoute(message);
        let _ = exchange(request, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                each(&route);
            }
        });
    }
}

fn neighbours(mut each: impl FnMut(&NeighbourMessage)) {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let _ = exchange(request, NLM_F_DUMP, |answer| {
        if let RouteNetlinkMessage::NewNeighbour(neighbour) = answer {
            each(&neighbour);
        }
    });
}

fn leaves_through(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some((*address).into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some((*address).into()),
            _ => None,
        })
}

fn read(message: &NeighbourMessage) -> Option<(IpAddr, Neighbour)> {
    let state = match message.header.state {
        NeighbourState::Reachable
        | NeighbourState::Stale
        | NeighbourState::Delay
        | NeighbourState::Probe
        | NeighbourState::Permanent => Neighbour::Known,
        NeighbourState::Incomplete => Neighbour::Asked,
        NeighbourState::Failed => Neighbour::Failed,
        // Multicast and the like, which are never asked.
        _ => return None,
    };
    Some((neighbour_address(message)?, state))
}
