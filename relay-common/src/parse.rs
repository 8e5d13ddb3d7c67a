//! Frame → where its headers are, and the key of its stream.

use crate::{
    network::Network,
    packet::Packet,
    reason::Reason,
    stream::StreamKey,
    wire::{Be16, Ethernet, Udp, Vlan, ethertype},
};

/// A UDP packet that could belong to a stream. Lengths are checked against each other and against
/// the frame.
pub(crate) struct Parsed<N: Network> {
    /// VLAN tags, 0–2, the one beside the frame included.
    pub(crate) vlan_depth: usize,
    /// Offset of the IP header, bytes.
    pub(crate) ip: usize,
    /// Length of the UDP header and payload, bytes.
    pub(crate) udp_length: u16,
    /// All zero without an Ethernet header.
    pub(crate) destination_mac: [Be16; 3],
    pub(crate) source: N::Raw,
    pub(crate) source_port: u16,
    pub(crate) destination: N::Raw,
    pub(crate) destination_port: u16,
    pub(crate) hop_limit: u8,
    /// DSCP and ECN.
    pub(crate) traffic_class: u8,
    pub(crate) udp_checksum: u16,
}

impl<N: Network> Parsed<N> {
    /// Offset of the UDP header, bytes.
    #[inline(always)]
    pub(crate) const fn udp(&self) -> usize {
        self.ip + N::LEN
    }

    /// Where it goes, as a key of the tables.
    #[inline(always)]
    pub(crate) fn destination(&self) -> StreamKey {
        StreamKey::new(N::address(self.destination), self.destination_port)
    }

    /// Where it comes from, as a key of the tables.
    #[inline(always)]
    pub(crate) fn source(&self) -> StreamKey {
        StreamKey::new(N::address(self.source), self.source_port)
    }
}

/// Parses what is behind a [`Link`] header.
#[inline(always)]
pub(crate) fn parse<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    link: &Link,
) -> Result<Parsed<N>, Reason> {
    let ip = link.ip;
    let header = *packet.header::<N>(ip)?;
    header.check()?;
    let udp = ip + N::LEN;
    let ip_length = header.length();
    let datagram = *packet.header::<Udp>(udp)?;
    let udp_length = datagram.length.get();
    // What Ethernet pads at the end belongs to no one; a datagram shorter than its IP packet is
    // legal, but nobody's RTP.
    if usize::from(udp_length) < Udp::LEN || N::LEN + usize::from(udp_length) != ip_length {
        return Err(Reason::Malformed);
    }
    if ip + ip_length > packet.length() {
        return Err(Reason::Truncated);
    }
    Ok(Parsed {
        vlan_depth: link.vlan_depth,
        ip,
        udp_length,
        destination_mac: link.destination_mac,
        source: header.source(),
        source_port: datagram.source.get(),
        destination: header.destination(),
        destination_port: datagram.destination.get(),
        hop_limit: header.hop_limit(),
        traffic_class: header.traffic_class(),
        udp_checksum: datagram.checksum.get(),
    })
}

/// What is before the IP header.
pub(crate) struct Link {
    destination_mac: [Be16; 3],
    vlan_depth: usize,
    /// EtherType of what follows.
    pub(crate) kind: u16,
    /// Where that begins.
    ip: usize,
}

#[inline(always)]
pub(crate) fn link<P: Packet + ?Sized>(packet: &mut P) -> Result<Link, Reason> {
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
