//! What differs between IPv4 and IPv6.
//!
//! The decision is compiled once for each of the two, so that neither carries what only the other
//! needs: an IPv4 packet's addresses are two halves then, and not the words of an [`Address`].

use crate::{
    checksum::Sum,
    packet::Header,
    reason::Reason,
    stream::{Address, Stream},
    wire::{Be16, Ipv4, Ipv4Datagram, Ipv6, Ipv6Datagram, Udp, protocol},
};

/// The header of a network protocol that RTP comes by.
pub(crate) trait Network: Header {
    /// Bytes of the header; one that has more is left to the stack.
    const LEN: usize;

    /// Whether a datagram may do without a UDP checksum (RFC 768; RFC 8200 section 8.1).
    const CHECKSUM_OPTIONAL: bool;

    /// An address as it stands in the header.
    type Raw: Copy;

    /// The header with what is rewritten behind it: one look at the packet's end is enough for all.
    type Datagram: Header;

    /// Its parts: this header, that of UDP, and the first bytes of RTP.
    fn split(datagram: &mut Self::Datagram) -> (&mut Self, &mut Udp, &mut [u8; 2]);

    /// Whether it is one of a packet that could belong to a stream.
    ///
    /// # Errors
    /// Why it is the stack's.
    fn check(&self) -> Result<(), Reason>;

    /// Bytes of the packet, this header included.
    fn length(&self) -> usize;

    fn hop_limit(&self) -> u8;

    /// DSCP and ECN.
    fn traffic_class(&self) -> u8;

    fn source(&self) -> Self::Raw;

    fn destination(&self) -> Self::Raw;

    /// In the form of the tables.
    fn address(raw: Self::Raw) -> Address;

    /// Whether both are the same, given that `other` is of this protocol.
    fn is(raw: Self::Raw, other: &Address) -> bool;

    /// Takes on a stream's new addresses and a traffic class, one hop further. Returns what no checksum
    /// of its own makes up for.
    fn rewrite(&mut self, stream: &Stream, traffic_class: u8) -> Option<Sum>;
}

/// More fragments, or a fragment offset (RFC 791 section 3.1).
const FRAGMENT: u16 = 0x3fff;

impl Network for Ipv4 {
    const LEN: usize = Self::LEN;
    const CHECKSUM_OPTIONAL: bool = true;
    type Raw = [Be16; 2];
    type Datagram = Ipv4Datagram;

    #[inline(always)]
    fn split(datagram: &mut Ipv4Datagram) -> (&mut Self, &mut Udp, &mut [u8; 2]) {
        (&mut datagram.ip, &mut datagram.udp, &mut datagram.rtp)
    }

    #[inline(always)]
    fn check(&self) -> Result<(), Reason> {
        match self.version_length {
            0x45 => {}
            0x46..=0x4f => return Err(Reason::IpOptions),
            _ => return Err(Reason::Malformed),
        }
        if self.protocol != protocol::UDP {
            return Err(Reason::NotUdp);
        }
        if self.fragment.get() & FRAGMENT != 0 {
            return Err(Reason::Fragment);
        }
        Ok(())
    }

    #[inline(always)]
    fn length(&self) -> usize {
        usize::from(self.total_length.get())
    }

    #[inline(always)]
    fn hop_limit(&self) -> u8 {
        self.hop_limit
    }

    #[inline(always)]
    fn traffic_class(&self) -> u8 {
        self.traffic_class
    }

    #[inline(always)]
    fn source(&self) -> [Be16; 2] {
        self.source
    }

    #[inline(always)]
    fn destination(&self) -> [Be16; 2] {
        self.destination
    }

    #[inline(always)]
    fn address(raw: [Be16; 2]) -> Address {
        Address::from_ipv4_halves(raw)
    }

    #[inline(always)]
    fn is(raw: [Be16; 2], other: &Address) -> bool {
        other.is_ipv4_halves(raw)
    }

    #[inline(always)]
    fn rewrite(&mut self, stream: &Stream, traffic_class: u8) -> Option<Sum> {
        // Which is above 1, so that one less is always the same change.
        const HOP: u16 = !0x0100;
        let hop_limit = self.hop_limit.wrapping_sub(1);
        let change = Sum::new(stream.address_change)
            .change(u16::from(self.traffic_class), u16::from(traffic_class))
            .word(HOP);
        self.checksum = Be16::new(change.applied_to(self.checksum.get()));
        self.traffic_class = traffic_class;
        self.hop_limit = hop_limit;
        self.source = stream.new_source.ipv4_halves();
        self.destination = stream.new_destination.ipv4_halves();
        None
    }
}

impl Network for Ipv6 {
    const LEN: usize = Self::LEN;
    const CHECKSUM_OPTIONAL: bool = false;
    type Raw = [Be16; 8];
    type Datagram = Ipv6Datagram;

    #[inline(always)]
    fn split(datagram: &mut Ipv6Datagram) -> (&mut Self, &mut Udp, &mut [u8; 2]) {
        (&mut datagram.ip, &mut datagram.udp, &mut datagram.rtp)
    }

    #[inline(always)]
    fn check(&self) -> Result<(), Reason> {
        if self.version_class.get() >> 12 != 6 {
            return Err(Reason::Malformed);
        }
        match self.next_header {
            protocol::UDP => {}
            protocol::FRAGMENT => return Err(Reason::Fragment),
            protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::AUTHENTICATION
            | protocol::DESTINATION => return Err(Reason::IpOptions),
            _ => return Err(Reason::NotUdp),
        }
        // As a key it would find an IPv4 stream, or one whose local address is still unknown.
        // The stack drops such packets.
        let destination = Address::from_halves(self.destination);
        if destination.is_mapped() || destination.is(&Address::default()) {
            return Err(Reason::NoStream);
        }
        Ok(())
    }

    #[inline(always)]
    fn length(&self) -> usize {
        Self::LEN + usize::from(self.payload_length.get())
    }

    #[inline(always)]
    fn hop_limit(&self) -> u8 {
        self.hop_limit
    }

    #[inline(always)]
    fn traffic_class(&self) -> u8 {
        (self.version_class.get() >> 4) as u8
    }

    #[inline(always)]
    fn source(&self) -> [Be16; 8] {
        self.source
    }

    #[inline(always)]
    fn destination(&self) -> [Be16; 8] {
        self.destination
    }

    #[inline(always)]
    fn address(raw: [Be16; 8]) -> Address {
        Address::from_halves(raw)
    }

    #[inline(always)]
    fn is(raw: [Be16; 8], other: &Address) -> bool {
        Address::from_halves(raw).is(other)
    }

    #[inline(always)]
    fn rewrite(&mut self, stream: &Stream, traffic_class: u8) -> Option<Sum> {
        let word = self.version_class.get();
        let new_word = word & 0xf00f | u16::from(traffic_class) << 4;
        let hop_limit = self.hop_limit.wrapping_sub(1);
        let change = Sum::new(stream.address_change)
            .change(word, new_word)
            .change(u16::from(self.hop_limit), u16::from(hop_limit));
        self.version_class = Be16::new(new_word);
        self.hop_limit = hop_limit;
        self.source = stream.new_source.halves();
        self.destination = stream.new_destination.halves();
        Some(change)
    }
}
