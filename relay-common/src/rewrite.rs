//! The rewrite of a packet that was found fit.

use crate::{
    checksum::{Sum, UdpChange},
    network::Network,
    packet::{Packet, Tables},
    parse::Parsed,
    reason::Reason,
    stream::{DSCP_KEEP, DSCP_MAP, NextHop, Stream, VLAN_ID, VlanTag},
    wire::{Be16, Ethernet, Tag, Vlan},
};

/// Rewrites the packet; RTP's second byte, marker and payload type, is to be another. The checksum goes
/// first: it is the only step that can still pass the packet, which is then as it arrived.
#[inline(always)]
pub(crate) fn rewrite<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed<N>,
    stream: &Stream,
    marker_type: u8,
    new_marker_type: u8,
    tables: &impl Tables,
) -> Result<(), Reason> {
    // The second byte of RTP is the low byte of its word.
    let datagram =
        Sum::new(stream.port_change).change(u16::from(marker_type), u16::from(new_marker_type));
    let checksum = if parsed.udp_checksum != 0 {
        packet.change_udp_checksum(&UdpChange {
            old: parsed.udp_checksum,
            udp: parsed.udp(),
            length: parsed.udp_length,
            pseudo_header: Sum::fold_two(stream.pseudo_header, parsed.udp_length),
            addresses: Sum::new(stream.address_change),
            datagram,
        })?
    } else if !N::CHECKSUM_OPTIONAL {
        // The stack drops and counts it.
        return Err(Reason::UdpChecksum);
    } else {
        packet.sum_changed(datagram);
        None
    };

    let class = traffic_class(stream, parsed.traffic_class, tables);
    let (ip, udp, [_, second]) = N::split(packet.header(parsed.ip)?);
    let change = ip.rewrite(stream, class);
    udp.source = Be16::new(stream.new_source_port);
    udp.destination = Be16::new(stream.new_destination_port);
    if let Some(checksum) = checksum {
        udp.checksum = Be16::new(checksum);
    }
    *second = new_marker_type;
    if let Some(change) = change {
        packet.sum_changed(change);
    }

    if packet.has_ethernet() {
        let next_hop = &stream.next_hop;
        let header = packet.header::<Ethernet>(0)?;
        header.destination = next_hop.destination_mac.words();
        header.source = next_hop.source_mac.words();
        match packet.tag_beside() {
            Some(outer) => retag_beside(packet, outer, next_hop)?,
            None => {
                let depth = next_hop.vlan_depth();
                if depth >= 1 {
                    retag(packet, Ethernet::LEN, next_hop.vlans[0])?;
                }
                if depth >= 2 {
                    retag(packet, Ethernet::LEN + Vlan::LEN, next_hop.vlans[1])?;
                }
            }
        }
    }
    if stream.priority != 0 {
        packet.prioritize(stream.priority);
    }
    Ok(())
}

/// The traffic class to send with; the ECN bits are the path's, not ours (RFC 3168).
#[inline(always)]
fn traffic_class(stream: &Stream, old: u8, tables: &impl Tables) -> u8 {
    const ECN: u8 = 0x03;
    let dscp = match stream.dscp {
        DSCP_KEEP => return old,
        DSCP_MAP => tables.translated(old >> 2),
        set => set,
    };
    dscp << 2 | old & ECN
}

/// Another VLAN, the same priority.
#[inline(always)]
const fn control(old: u16, tag: VlanTag) -> u16 {
    old & !VLAN_ID | tag.id()
}

/// The same for all tags of a frame whose outermost one, `outer`, is beside it.
#[inline(always)]
fn retag_beside<P: Packet + ?Sized>(
    packet: &mut P,
    outer: Tag,
    next_hop: &NextHop,
) -> Result<(), Reason> {
    let depth = next_hop.vlan_depth();
    let mut old = [outer, Tag::default()];
    if depth >= 2 {
        let [tpid, control] = packet.header::<[Be16; 2]>(Ethernet::LEN - size_of::<Be16>())?;
        old[1] = Tag {
            tpid: tpid.get(),
            control: control.get(),
        };
    }
    let mut new = old;
    for (new, tag) in new.iter_mut().zip(next_hop.vlans).take(depth) {
        *new = Tag {
            tpid: tag.tpid(),
            control: control(new.control, tag),
        };
    }
    if new == old {
        return Ok(());
    }
    packet.replace_tags(new, depth)
}

/// The same for a tag in the frame. `at` is its control field: its TPID stands before it.
#[inline(always)]
fn retag<P: Packet + ?Sized>(packet: &mut P, at: usize, tag: VlanTag) -> Result<(), Reason> {
    let [tpid, control] = packet.header::<[Be16; 2]>(at - size_of::<Be16>())?;
    let new = self::control(control.get(), tag);
    let mut change = Sum::ZERO.change(control.get(), new);
    // The first TPID stands in the Ethernet header.
    if at > Ethernet::LEN {
        change = change.change(tpid.get(), tag.tpid());
    }
    *tpid = Be16::new(tag.tpid());
    *control = Be16::new(new);
    packet.sum_changed(change);
    Ok(())
}
