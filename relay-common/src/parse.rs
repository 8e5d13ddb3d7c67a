//! Frame → where its headers are, and the key of its stream.

use crate::{
    packet::Packet,
    reason::Reason,
    stream::{Address, StreamKey},
    wire::{Be16, Ethernet, Ipv4, Ipv6, Udp, Vlan, ethertype, protocol},
};

/// IP version of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// A UDP packet that could belong to a stream. Lengths are checked against each other and against
/// the frame.
pub(crate) struct Parsed {
    pub(crate) family: Family,
    /// VLAN tags, 0–2, the one beside the frame included.
    pub(crate) vlan_depth: usize,
    /// Offset of the IP header, bytes.
    pub(crate) ip: usize,
    /// Offset of the UDP header, bytes.
    pub(crate) udp: usize,
    /// Length of the IP packet, bytes.
    pub(crate) ip_length: usize,
    /// Length of the UDP header and payload, bytes.
    pub(crate) udp_length: u16,
    /// All zero without an Ethernet header.
    pub(crate) destination_mac: [Be16; 3],
    pub(crate) source: Address,
    pub(crate) source_port: u16,
    pub(crate) hop_limit: u8,
    /// DSCP and ECN.
    pub(crate) traffic_class: u8,
    pub(crate) udp_checksum: u16,
    pub(crate) key: StreamKey,
}

/// More fragments, or a fragment offset (RFC 791 section 3.1).
const FRAGMENT: u16 = 0x3fff;

#[inline(always)]
pub(crate) fn parse<P: Packet + ?Sized>(packet: &mut P) -> Result<Parsed, Reason> {
    let Link {
        destination_mac,
        vlan_depth,
        kind,
        ip,
    } = link(packet)?;
    let (family, header_length, ip_length, hop_limit, traffic_class, source, destination) =
        match kind {
            ethertype::IPV4 => {
                let header = *packet.header::<Ipv4>(ip)?;
                match header.version_length {
                    0x45 => {}
                    0x46..=0x4f => return Err(Reason::IpOptions),
                    _ => return Err(Reason::Malformed),
                }
                if header.protocol != protocol::UDP {
                    return Err(Reason::NotUdp);
                }
                if header.fragment.get() & FRAGMENT != 0 {
                    return Err(Reason::Fragment);
                }
                (
                    Family::V4,
                    Ipv4::LEN,
                    usize::from(header.total_length.get()),
                    header.hop_limit,
                    header.traffic_class,
                    Address::from_ipv4_halves(header.source),
                    Address::from_ipv4_halves(header.destination),
                )
            }
            ethertype::IPV6 => {
                let header = *packet.header::<Ipv6>(ip)?;
                if header.version_class.get() >> 12 != 6 {
                    return Err(Reason::Malformed);
                }
                match header.next_header {
                    protocol::UDP => {}
                    protocol::FRAGMENT => return Err(Reason::Fragment),
                    protocol::HOP_BY_HOP
                    | protocol::ROUTING
                    | protocol::AUTHENTICATION
                    | protocol::DESTINATION => return Err(Reason::IpOptions),
                    _ => return Err(Reason::NotUdp),
                }
                let destination = Address::from_halves(header.destination);
                // As a key it would find an IPv4 stream, or one whose local address is still unknown.
                // The stack drops such packets.
                if destination.is_mapped() || destination.is(&Address::default()) {
                    return Err(Reason::NoStream);
                }
                (
                    Family::V6,
                    Ipv6::LEN,
                    Ipv6::LEN + usize::from(header.payload_length.get()),
                    header.hop_limit,
                    (header.version_class.get() >> 4) as u8,
                    Address::from_halves(header.source),
                    destination,
                )
            }
            _ => return Err(Reason::NotIp),
        };

    let udp = ip + header_length;
    let header = *packet.header::<Udp>(udp)?;
    let udp_length = header.length.get();
    // What Ethernet pads at the end belongs to no one; a datagram shorter than its IP packet is
    // legal, but nobody's RTP.
    if usize::from(udp_length) < Udp::LEN || header_length + usize::from(udp_length) != ip_length {
        return Err(Reason::Malformed);
    }
    if ip + ip_length > packet.length() {
        return Err(Reason::Truncated);
    }
    Ok(Parsed {
        family,
        vlan_depth,
        ip,
        udp,
        ip_length,
        udp_length,
        destination_mac,
        source,
        source_port: header.source.get(),
        hop_limit,
        traffic_class,
        udp_checksum: header.checksum.get(),
        key: StreamKey::new(destination, header.destination.get()),
    })
}

/// What is before the IP header.
struct Link {
    destination_mac: [Be16; 3],
    vlan_depth: usize,
    /// EtherType of what follows.
    kind: u16,
    /// Where that begins.
    ip: usize,
}

#[inline(always)]
fn link<P: Packet + ?Sized>(packet: &mut P) -> Result<Link, Reason> {
    if !packet.has_ethernet() {
        let [first, _] = *packet.header::<[u8; 2]>(0)?;
        return Ok(Link {
            destination_mac: [Be16::default(); 3],
            vlan_depth: 0,
            kind: match first >> 4 {
                4 => ethertype::IPV4,
                6 => ethertype::IPV6,
                _ => return Err(Reason::NotIp),
            },
            ip: 0,
        });
    }
    let ethernet = *packet.header::<Ethernet>(0)?;
    let (kind, tags) = skip_vlans(packet, ethernet.ethertype.get())?;
    let vlan_depth = tags + usize::from(packet.tag_beside().is_some());
    if vlan_depth > MAX_TAGS {
        return Err(Reason::VlanDepth);
    }
    Ok(Link {
        destination_mac: ethernet.destination,
        vlan_depth,
        kind,
        ip: Ethernet::LEN + tags * Vlan::LEN,
    })
}

/// VLAN tags that the relay looks behind.
const MAX_TAGS: usize = 2;

/// The EtherType behind up to two tags, and how many there are.
#[inline(always)]
fn skip_vlans<P: Packet + ?Sized>(packet: &mut P, outer: u16) -> Result<(u16, usize), Reason> {
    if !is_tag(outer) {
        return Ok((outer, 0));
    }
    let inner = packet.header::<Vlan>(Ethernet::LEN)?.ethertype.get();
    if !is_tag(inner) {
        return Ok((inner, 1));
    }
    let payload = packet
        .header::<Vlan>(Ethernet::LEN + Vlan::LEN)?
        .ethertype
        .get();
    if is_tag(payload) {
        Err(Reason::VlanDepth)
    } else {
        Ok((payload, 2))
    }
}

#[inline(always)]
const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, ethertype::VLAN | ethertype::QINQ)
}
