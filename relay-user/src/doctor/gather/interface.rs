//! The interface, its driver and its queues.

use std::{fs, io};

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};

use super::{host, programs};
use crate::{
    datapath,
    doctor::{
        checks::xdp_mtu,
        ethtool,
        facts::{InterfaceFacts, Layer, Queues},
        netdev,
    },
    netlink::exchange,
    next_hop::{Interface, Interfaces, LinkLayer},
};

/// An interface that is not there.
pub(super) fn absent(name: String, interfaces: Option<&Interfaces>) -> InterfaceFacts {
    InterfaceFacts {
        name,
        known: names(interfaces),
        ..InterfaceFacts::default()
    }
}

fn names(interfaces: Option<&Interfaces>) -> Vec<String> {
    interfaces.map(Interfaces::names).unwrap_or_default()
}

pub(super) fn facts(interface: &Interface, interfaces: &Interfaces) -> InterfaceFacts {
    let (name, index) = (&interface.name, interface.index);
    let mut unread = Vec::new();
    let beside = told("the link", beside(index), &mut unread);
    let driver = ethtool::driver(name).ok();
    InterfaceFacts {
        name: name.clone(),
        index,
        known: names(Some(interfaces)),
        layer: match interface.layer {
            LinkLayer::Ethernet => Layer::Ethernet,
            LinkLayer::Ip => Layer::Ip,
            LinkLayer::Other => Layer::Other,
        },
        kind: interface.kind.clone(),
        up: interface.up,
        carrier: interface.carrier,
        mtu: interface.mtu,
        peer_mtu: beside
            .as_ref()
            .and_then(|beside| beside.peer)
            .filter(|_| interface.kind.as_deref() == Some("veth"))
            .and_then(|peer| interfaces.indexed(peer))
            .map(|peer| peer.mtu),
        xdp_mtu: xdp_mtu(driver.as_deref(), host::page_size()),
        native_xdp: told("XDP features", netdev::native_xdp(index), &mut unread).flatten(),
        self_test: None,
        processors: host::processors(),
        queues: queues(name, beside.and_then(|beside| beside.queues)),
        rps: rps(name, index),
        hashes_udp4_ports: ethtool::hashes_ports(name, ethtool::UDP_V4_FLOW).ok(),
        hashes_udp6_ports: ethtool::hashes_ports(name, ethtool::UDP_V6_FLOW).ok(),
        features: told("features", ethtool::features(name), &mut unread),
        vlans: interfaces
            .vlans_on(index)
            .map(|vlan| vlan.name.clone())
            .collect(),
        qdisc: told(
            "the queueing discipline",
            datapath::root_qdisc(index),
            &mut unread,
        )
        .flatten(),
        programs: programs::all(interface, &mut unread),
        xdp_statistics: ethtool::statistics(name)
            .unwrap_or_default()
            .into_iter()
            .filter(|(name, count)| name.contains("xdp") && *count != 0)
            .collect(),
        driver,
        unread,
    }
}

/// What was asked for, or a note that it could not be had.
pub(super) fn told<T>(what: &str, answer: io::Result<T>, unread: &mut Vec<String>) -> Option<T> {
    let trouble = |error: &io::Error| {
        let trouble = format!("{what} ({error})");
        // Both directions of a hook are asked, and refused alike.
        if !unread.contains(&trouble) {
            unread.push(trouble);
        }
    };
    answer.inspect_err(trouble).ok()
}

/// What else the kernel says of a link.
struct Beside {
    /// Index of a veth's other end, where that is in this network namespace.
    peer: Option<u32>,
    /// Receive queues that were made.
    queues: Option<u32>,
}

fn beside(index: u32) -> io::Result<Beside> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let (mut peer, mut elsewhere, mut queues) = (None, false, None);
    let request = RouteNetlinkMessage::GetLink(message);
    exchange(request, NLM_F_ACK, |answer| {
        if let RouteNetlinkMessage::NewLink(link) = answer {
            for attribute in &link.attributes {
                match attribute {
                    LinkAttribute::Link(index) => peer = Some(*index),
                    LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                    LinkAttribute::NumRxQueues(count) => queues = Some(*count),
                    _ => {}
                }
            }
        }
    })?;
    Ok(Beside {
        peer: peer.filter(|_| !elsewhere),
        queues,
    })
}

/// As the driver tells, or else as many as were made.
fn queues(interface: &str, made: Option<u32>) -> Option<Queues> {
    match ethtool::channels(interface) {
        Ok(channels) if channels.combined + channels.rx > 0 => Some(Queues {
            now: channels.combined + channels.rx,
            most: channels.most_combined.max(channels.most_rx),
            combined: channels.most_combined > 0,
        }),
        _ => made.map(|count| Queues {
            now: count,
            most: count,
            combined: false,
        }),
    }
}

/// Whether any processor is set in the mask of the first queue. `/sys` may show another network namespace.
fn rps(interface: &str, index: u32) -> Option<bool> {
    let folder = format!("/sys/class/net/{interface}");
    let shown = fs::read_to_string(format!("{folder}/ifindex")).ok()?;
    if shown.trim().parse() != Ok(index) {
        return None;
    }
    let mask = fs::read_to_string(format!("{folder}/queues/rx-0/rps_cpus")).ok()?;
    Some(
        mask.chars()
            .any(|digit| matches!(digit, '1'..='9' | 'a'..='f')),
    )
}
