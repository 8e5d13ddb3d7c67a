//! Header layouts as they stand on the wire, viewed in place.
//!
//! The alignment is 2, not 1: an Ethernet header has 14 bytes, so that what follows it is 2-aligned
//! in every driver's buffer, and 2-byte loads make the program a third shorter than single bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A 16-bit number in network byte order.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Be16(u16);

impl Be16 {
    /// From host byte order.
    #[inline(always)]
    #[must_use]
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    /// From its two bytes on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    /// In host byte order.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// Declares headers, with their size on the wire as the proof that nothing is padded.
macro_rules! headers {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $name {
            /// Bytes on the wire.
            pub const LEN: usize = $size;
        }

        const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() <= 2);
    )*};
}

headers! {
    /// Ethernet II (IEEE 802.3).
    Ethernet = 14 {
        /// Destination address.
        destination: [Be16; 3],
        /// Source address.
        source: [Be16; 3],
        /// EtherType, or the TPID of a VLAN tag.
        ethertype: Be16,
    }
    /// What follows the TPID of a VLAN tag (IEEE 802.1Q).
    Vlan = 4 {
        /// Priority (3 bits), drop eligible (1), VLAN identifier (12).
        control: Be16,
        /// EtherType, or the TPID of the next tag.
        ethertype: Be16,
    }
    /// ARP for IPv4 on Ethernet (RFC 826), with the Ethernet header.
    ArpFrame = 42 {
        /// Destination address of the frame.
        destination: [Be16; 3],
        /// Source address of the frame.
        source: [Be16; 3],
        /// EtherType.
        ethertype: Be16,
        /// Kind of link: 1 for Ethernet.
        hardware: Be16,
        /// Kind of address: EtherType of IPv4.
        protocol: Be16,
        /// Bytes of a MAC (8 bits) and of an IP address (8).
        lengths: Be16,
        /// 1 for a question, 2 for an answer.
        operation: Be16,
        /// MAC address of the sender.
        sender_mac: [Be16; 3],
        /// IPv4 address of the sender.
        sender: [Be16; 2],
        /// MAC address of whom it is for; zero in a question.
        target_mac: [Be16; 3],
        /// IPv4 address of whom it is for.
        target: [Be16; 2],
    }
    /// IPv4 without options (RFC 791).
    Ipv4 = 20 {
        /// Version and header length in words: 0x45.
        version_length: u8,
        /// DSCP (6 bits) and ECN (2).
        traffic_class: u8,
        /// Header and payload, bytes.
        total_length: Be16,
        /// Identification.
        identification: Be16,
        /// Flags (3 bits) and fragment offset (13).
        fragment: Be16,
        /// Time to live.
        hop_limit: u8,
        /// Protocol above.
        protocol: u8,
        /// Header checksum.
        checksum: Be16,
        /// Source address.
        source: [Be16; 2],
        /// Destination address.
        destination: [Be16; 2],
    }
    /// IPv6 (RFC 8200).
    Ipv6 = 40 {
        /// Version (4 bits), traffic class (8), upper flow label (4).
        version_class: Be16,
        /// Lower flow label.
        flow_label: Be16,
        /// Bytes after this header.
        payload_length: Be16,
        /// Protocol, or the first extension header.
        next_header: u8,
        /// Hop limit.
        hop_limit: u8,
        /// Source address.
        source: [Be16; 8],
        /// Destination address.
        destination: [Be16; 8],
    }
    /// UDP (RFC 768).
    Udp = 8 {
        /// Source port.
        source: Be16,
        /// Destination port.
        destination: Be16,
        /// Header and payload, bytes.
        length: Be16,
        /// Checksum; 0 is none, on IPv4 only.
        checksum: Be16,
    }
    /// IPv4, UDP, and the first two bytes of RTP.
    Ipv4Datagram = 30 {
        /// Without options.
        ip: Ipv4,
        /// Right behind it.
        udp: Udp,
        /// As in [`Rtp`].
        rtp: [u8; 2],
    }
    /// IPv6, UDP, and the first two bytes of RTP.
    Ipv6Datagram = 50 {
        /// Without extension headers.
        ip: Ipv6,
        /// Right behind it.
        udp: Udp,
        /// As in [`Rtp`].
        rtp: [u8; 2],
    }
    /// TCP without options (RFC 9293 section 3.1).
    Tcp = 20 {
        /// Source port.
        source: Be16,
        /// Destination port.
        destination: Be16,
        /// Sequence number.
        sequence: [Be16; 2],
        /// Acknowledgement number.
        acknowledgement: [Be16; 2],
        /// Header length in words (4 bits), reserved (4), control bits (8).
        offset_flags: Be16,
        /// Receive window.
        window: Be16,
        /// Checksum.
        checksum: Be16,
        /// Urgent pointer.
        urgent: Be16,
    }
    /// RTP's fixed header (RFC 3550 section 5.1).
    Rtp = 12 {
        /// Version (2 bits), padding (1), extension (1), CSRC count (4).
        version_count: u8,
        /// Marker (1 bit) and payload type (7).
        marker_type: u8,
        /// Sequence number.
        sequence: Be16,
        /// Timestamp, in units of the codec's clock.
        timestamp: [Be16; 2],
        /// Synchronisation source.
        ssrc: [Be16; 2],
    }
    /// Head of an RTP header extension (RFC 3550 section 5.3.1).
    RtpExtension = 4 {
        /// Defined by the profile.
        profile: Be16,
        /// Length of what follows, in 32-bit words.
        words: Be16,
    }
}

/// An Ethernet address.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(2))]
pub struct Mac {
    /// In the order of transmission.
    pub bytes: [u8; 6],
}

impl Mac {
    /// In the words of a header.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [Be16; 3] {
        let [a, b, c, d, e, f] = self.bytes;
        [
            Be16::from_bytes([a, b]),
            Be16::from_bytes([c, d]),
            Be16::from_bytes([e, f]),
        ]
    }

    /// Whether a header has this address. One branch for all of it.
    #[inline(always)]
    #[must_use]
    pub(crate) fn is(self, other: [Be16; 3]) -> bool {
        let ([a, b, c], [d, e, f]): ([u16; 3], [u16; 3]) =
            (zerocopy::transmute!(self), zerocopy::transmute!(other));
        (a ^ d) | (b ^ e) | (c ^ f) == 0
    }
}

/// A VLAN tag as it stands in a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// Tag protocol identifier.
    pub tpid: u16,
    /// Priority (3 bits), drop eligible (1), VLAN identifier (12).
    pub control: u16,
}

/// EtherTypes and TPIDs (IEEE 802 numbers).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// 802.1Q customer tag.
    pub const VLAN: u16 = 0x8100;
    /// 802.1ad service tag.
    pub const QINQ: u16 = 0x88a8;
}

/// IP protocol numbers (IANA), as far as the relay tells them apart.
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMPv6.
    pub const ICMP_V6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
}
