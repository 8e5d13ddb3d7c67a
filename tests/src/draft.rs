//! Frames written field by field, every length and checksum computed from scratch when the bytes are made.
//!
//! Shares no code with `relay-common`, so that a test compares two opinions of a packet and not one with itself.

use std::net::{IpAddr, SocketAddr};

use relay_common::stream::{DSCP_KEEP, DSCP_MAP, Endpoint};

use crate::tables::{Entry, TRANSLATED};

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// TPID of a customer's tag (IEEE 802.1Q).
pub const VLAN: u16 = 0x8100;
/// TPID of a service tag (IEEE 802.1ad).
pub const QINQ: u16 = 0x88a8;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// What stands in the UDP checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The checksum of RFC 768, never 0.
    Finished,
    /// 0: none.
    Absent,
    /// The pseudo-header's sum, to be completed by a device (`CHECKSUM_PARTIAL` in include/linux/skbuff.h).
    Unfinished,
    /// A finished checksum and an error added to it in one's complement.
    Off(u16),
}

/// An Ethernet frame with a UDP datagram, or nearly so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Destination MAC address.
    pub destination_mac: [u8; 6],
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// VLAN tags, outermost first: TPID, and priority (3 bits), drop eligible (1), VLAN id (12).
    pub tags: Vec<(u16, u16)>,
    /// Source address and port; of the same family as the destination.
    pub source: SocketAddr,
    /// Destination address and port. Its family is the packet's.
    pub destination: SocketAddr,
    /// DSCP (6 bits) and ECN (2).
    pub traffic_class: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// IPv4 identification, or the lower 16 bits of the IPv6 flow label.
    pub identification: u16,
    /// Flags and offset (IPv4 only).
    pub fragment: u16,
    /// What stands between the fixed IP header and UDP, a multiple of 4 bytes: IPv4 options or IPv6 extension
    /// headers.
    pub options: Vec<u8>,
    /// IPv4 protocol or IPv6 next header of the fixed header.
    pub protocol: u8,
    /// The UDP checksum.
    pub checksum: Checksum,
    /// What UDP carries.
    pub payload: Vec<u8>,
    /// What follows the IP packet in the frame.
    pub trailer: Vec<u8>,
}

impl Draft {
    /// Offset of the IP header in the frame, bytes.
    #[must_use]
    pub fn ip(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    /// Offset of the UDP header in the frame, bytes.
    #[must_use]
    pub fn udp(&self) -> usize {
        let fixed = if self.destination.is_ipv4() { 20 } else { 40 };
        self.ip() + fixed + self.options.len()
    }

    /// Offset of what UDP carries, bytes.
    #[must_use]
    pub fn rtp(&self) -> usize {
        self.udp() + 8
    }

    /// Length of the IP packet, bytes.
    #[must_use]
    pub fn ip_length(&self) -> usize {
        self.rtp() - self.ip() + self.payload.len()
    }

    /// The frame.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = [self.destination_mac, self.source_mac].concat();
        for (tpid, control) in &self.tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend(IPV4.to_be_bytes());
                let words = 5 + self.options.len() as u8 / 4;
                let mut header = vec![0x40 | words, self.traffic_class];
                header.extend((self.ip_length() as u16).to_be_bytes());
                header.extend(self.identification.to_be_bytes());
                header.extend(self.fragment.to_be_bytes());
                header.extend([self.hop_limit, self.protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(&self.options);
                let checksum = !sum(&header);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                frame.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend(IPV6.to_be_bytes());
                let [high, low] = self.identification.to_be_bytes();
                frame.extend([
                    0x60 | self.traffic_class >> 4,
                    self.traffic_class << 4,
                    high,
                    low,
                ]);
                frame.extend((self.ip_length() as u16 - 40).to_be_bytes());
                frame.extend([self.protocol, self.hop_limit]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                frame.extend(&self.options);
            }
            mixed => panic!("one packet, two families: {mixed:?}"),
        }
        frame.extend(self.datagram(self.checksum_field()));
        frame.extend(&self.trailer);
        frame
    }

    /// UDP header and payload.
    fn datagram(&self, checksum: u16) -> Vec<u8> {
        let length = 8 + self.payload.len() as u16;
        let mut datagram = Vec::new();
        for word in [
            self.source.port(),
            self.destination.port(),
            length,
            checksum,
        ] {
            datagram.extend(word.to_be_bytes());
        }
        datagram.extend(&self.payload);
        datagram
    }

    /// The pseudo-header of RFC 768 or RFC 8200 section 8.1, in a form of the same sum.
    fn pseudo_header(&self) -> Vec<u8> {
        let mut header = Vec::new();
        for address in [self.source.ip(), self.destination.ip()] {
            match address {
                IpAddr::V4(address) => header.extend(address.octets()),
                IpAddr::V6(address) => header.extend(address.octets()),
            }
        }
        header.extend([0, UDP]);
        header.extend((8 + self.payload.len() as u16).to_be_bytes());
        header
    }

    fn finished(&self) -> u16 {
        let covered = [self.pseudo_header(), self.datagram(0)].concat();
        match !sum(&covered) {
            0 => 0xffff,
            checksum => checksum,
        }
    }

    fn checksum_field(&self) -> u16 {
        match self.checksum {
            Checksum::Finished => self.finished(),
            Checksum::Absent => 0,
            Checksum::Unfinished => sum(&self.pseudo_header()),
            Checksum::Off(error) => {
                sum(&[self.finished().to_be_bytes(), error.to_be_bytes()].concat())
            }
        }
    }

    /// Whether the field holds a finished checksum that looks like an unfinished one.
    #[must_use]
    pub fn ambiguous(&self) -> bool {
        self.checksum == Checksum::Finished && self.finished() == sum(&self.pseudo_header())
    }

    /// The same with the payload's last two bytes (at an even offset) chosen so that the finished checksum is
    /// `field`, which is not 0.
    ///
    /// # Panics
    /// The payload has no such bytes.
    #[must_use]
    pub fn with_checksum(mut self, field: u16) -> Self {
        assert!(self.payload.len().is_multiple_of(2));
        let at = self.payload.len() - 2;
        self.payload[at..].fill(0);
        let covered = [self.pseudo_header(), self.datagram(0)].concat();
        // The whole must add up to `!field`.
        let rest = [(!sum(&covered)).to_be_bytes(), (!field).to_be_bytes()].concat();
        self.payload[at..].copy_from_slice(&sum(&rest).to_be_bytes());
        assert_eq!(self.finished(), field);
        self
    }

    /// The same with the payload's last two bytes (at an even offset) chosen so that the finished checksum equals the
    /// pseudo-header's sum.
    ///
    /// # Panics
    /// As [`Draft::with_checksum`].
    #[must_use]
    pub fn made_ambiguous(self) -> Self {
        let field = sum(&self.pseudo_header());
        self.with_checksum(field)
    }

    /// The same with an unfinished checksum finished.
    #[must_use]
    pub fn completed(mut self) -> Self {
        if self.checksum == Checksum::Unfinished {
            self.checksum = Checksum::Finished;
        }
        self
    }

    /// What a packet of the stream is on its other leg.
    #[must_use]
    pub fn relayed(&self, entry: &Entry) -> Self {
        let stream = &entry.stream;
        let mut out = self.clone();
        let next_hop = &stream.next_hop;
        out.destination_mac = next_hop.destination_mac.bytes;
        out.source_mac = next_hop.source_mac.bytes;
        for (tag, vlan) in out
            .tags
            .iter_mut()
            .zip(&next_hop.vlans[..next_hop.vlan_depth()])
        {
            *tag = (vlan.tpid(), tag.1 & 0xf000 | vlan.id());
        }
        out.source = socket_address(stream.new_source);
        out.destination = socket_address(stream.new_destination);
        let dscp = match stream.dscp {
            DSCP_KEEP => self.traffic_class / 4,
            DSCP_MAP => TRANSLATED[usize::from(self.traffic_class / 4)],
            set => set,
        };
        out.traffic_class = dscp * 4 + self.traffic_class % 4;
        out.hop_limit -= 1;
        let payload_type = self.payload[1] % 128;
        let renumbered = entry
            .state
            .payload_types
            .iter()
            .find(|entry| entry.from == payload_type)
            .expect("a payload type of the stream");
        out.payload[1] = self.payload[1] - payload_type + renumbered.to;
        out
    }
}

/// The address of an end of a stream.
#[must_use]
pub fn socket_address(endpoint: Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address.into(), endpoint.port)
}

/// The one's complement sum of RFC 1071; never 0 unless all bytes are.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) * 256 + pair.get(1).map_or(0, |&low| u64::from(low));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use etherparse::{SlicedPacket, TransportSlice};

    use super::*;
    use crate::fixture::{Family, received};

    #[test]
    fn another_implementation_finds_the_checksums_right() {
        for family in [Family::V4, Family::V6] {
            for tags in [vec![], vec![(VLAN, 100)], vec![(QINQ, 9), (VLAN, 100)]] {
                let frame = Draft {
                    tags,
                    ..received(family)
                }
                .bytes();
                let packet = SlicedPacket::from_ethernet(&frame).expect("a frame");
                let net = packet.net.expect("IP");
                let Some(TransportSlice::Udp(udp)) = packet.transport else {
                    panic!("no UDP");
                };
                let header = udp.to_header();
                let expected = if let Some(ip) = net.ipv4_ref() {
                    let header_checksum = ip.header().to_header().calc_header_checksum();
                    assert_eq!(ip.header().header_checksum(), header_checksum);
                    header.calc_checksum_ipv4(&ip.header().to_header(), udp.payload())
                } else {
                    let ip = net.ipv6_ref().expect("IPv6");
                    header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload())
                };
                assert_eq!(Ok(header.checksum), expected);
            }
        }
    }

    #[test]
    fn the_checksum_can_be_chosen() {
        for field in [1, 0x8000, 0xfffe, 0xffff] {
            let frame = received(Family::V6).with_checksum(field).bytes();
            let at = received(Family::V6).udp() + 6;
            assert_eq!(frame[at..at + 2], field.to_be_bytes());
        }
        assert!(received(Family::V4).made_ambiguous().ambiguous());
        assert!(!received(Family::V4).ambiguous());
    }
}
