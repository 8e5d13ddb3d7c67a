//! Internet checksums (RFC 1071) and their change by a rewrite (RFC 1624).
//!
//! All arithmetic is on 16-bit words in host byte order.

use crate::{packet::Packet, reason::Reason, wire::Be16};

/// A one's complement sum that is not folded yet.
///
/// Holds 2¹⁶ words before it can overflow; the longest sum here is 512 of them, folded afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u32);

impl Sum {
    /// The sum that adds nothing.
    pub const ZERO: Self = Self(0);

    /// A sum of one word, or one that was folded before.
    #[inline(always)]
    #[must_use]
    pub const fn new(word: u16) -> Self {
        Self(word as u32)
    }

    /// Adds a word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u16) -> Self {
        Self(self.0.wrapping_add(word as u32))
    }

    /// Adds another sum, which must have been folded if it was long.
    #[inline(always)]
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// Adds the change of a word: `~old + new` (RFC 1624, equation 3).
    #[inline(always)]
    #[must_use]
    pub const fn change(self, old: u16, new: u16) -> Self {
        self.word(!old).word(new)
    }

    /// The 16-bit one's complement sum.
    #[inline(always)]
    #[must_use]
    pub const fn fold(self) -> u16 {
        let once = (self.0 & 0xffff) + (self.0 >> 16);
        let twice = (once & 0xffff) + (once >> 16);
        twice as u16
    }

    /// The same of two words, which carry once at most.
    #[inline(always)]
    #[must_use]
    pub const fn fold_two(one: u16, other: u16) -> u16 {
        let sum = one as u32 + other as u32;
        (sum + (sum >> 16)) as u16
    }

    /// The checksum field of data that adds up to this.
    #[inline(always)]
    #[must_use]
    pub const fn checksum(self) -> u16 {
        !self.fold()
    }

    /// The checksum that replaces `old` when the data changes by this sum (RFC 1624, equation 3:
    /// `HC' = ~(~HC + ~m + m')`).
    #[inline(always)]
    #[must_use]
    pub const fn applied_to(self, old: u16) -> u16 {
        self.word(!old).checksum()
    }
}

/// A UDP checksum that computes to zero is sent as all ones: zero means "none" (RFC 768).
#[inline(always)]
#[must_use]
pub const fn udp_field(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// What becomes of a packet's note "checksum still to be completed" (`CHECKSUM_PARTIAL` in
/// include/linux/skbuff.h) after this hook. Such packets come from senders on the same machine:
/// containers over veth, guests over virtio-net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartialChecksum {
    /// It travels on with the packet, as in generic XDP: the field must hold the new
    /// pseudo-header's sum.
    Kept,
    /// It is lost, as in native XDP: the field must hold the finished checksum.
    Lost,
}

/// How a rewrite changes what the UDP checksum covers.
#[derive(Clone, Copy, Debug)]
pub struct UdpChange {
    /// The field as it is, not 0.
    pub old: u16,
    /// Offset of the UDP header in the frame, bytes.
    pub udp: usize,
    /// The header's length field, bytes; the whole datagram lies within the frame.
    pub length: u16,
    /// Sum of the old pseudo-header, its length included.
    pub pseudo_header: u16,
    /// Change of the pseudo-header: the addresses.
    pub addresses: Sum,
    /// Change of the datagram: ports and payload type.
    pub datagram: Sum,
}

/// How a new traffic class changes an IP header.
#[derive(Clone, Copy, Debug)]
pub struct ClassChange {
    /// Offset of the IP header, bytes.
    pub ip: usize,
    /// Whether the header has a checksum: IPv4.
    pub has_checksum: bool,
    /// The header's first 16 bits, which hold the traffic class.
    pub old: u16,
    /// What replaces them.
    pub new: u16,
}

/// The new UDP checksum field for a hook that sees the bytes only.
///
/// A field that equals the pseudo-header's sum is most probably an unfinished checksum, which no
/// delta can repair; adding up the datagram tells. One finished checksum in 65,536 has that same
/// value by chance.
///
/// # Errors
/// [`Reason::UdpChecksum`] when the two cannot be told apart: the stack knows, the bytes do not.
#[inline(always)]
pub fn changed_udp_field<P: Packet + ?Sized>(
    packet: &mut P,
    change: &UdpChange,
) -> Result<u16, Reason> {
    let old = change.old;
    if old != change.pseudo_header {
        return Ok(udp_field(
            change.addresses.plus(change.datagram).applied_to(old),
        ));
    }
    // The field itself is part of the datagram: take it out again.
    let datagram = Sum::new(datagram_sum(packet, change.udp, change.length)?).word(!old);
    let pseudo_header = Sum::new(change.pseudo_header);
    if udp_field(pseudo_header.plus(datagram).checksum()) == old {
        return Err(Reason::UdpChecksum);
    }
    let pseudo_header = Sum::new(pseudo_header.plus(change.addresses).fold());
    Ok(match packet.partial_checksum() {
        PartialChecksum::Kept => pseudo_header.fold(),
        PartialChecksum::Lost => {
            let datagram = Sum::new(datagram.plus(change.datagram).fold());
            udp_field(pseudo_header.plus(datagram).checksum())
        }
    })
}

/// Longest datagram that can be added up, bytes; above a full Ethernet frame.
const DATAGRAM_MAX: u16 = 0x7ff;

/// Sum of a whole datagram, read in pieces of 1024, 512, 256 … bytes, one for each bit of its
/// length.
///
/// Not a loop over its words: the position would be another constant in each round, and the
/// verifier would walk the rest of the program once for every length (more than a million
/// instructions). Positions masked out of the length are one unknown number to it.
#[inline(always)]
fn datagram_sum<P: Packet + ?Sized>(packet: &mut P, at: usize, length: u16) -> Result<u16, Reason> {
    if length > DATAGRAM_MAX {
        return Err(Reason::UdpChecksum);
    }
    let length = usize::from(length);
    let mut sum = 0;
    macro_rules! pieces {
        ($($words:literal)*) => {$(
            let bytes = $words * 2;
            if length & bytes != 0 {
                let position = at + (length & !(2 * bytes - 1));
                let piece = packet.header::<[Be16; $words]>(position)?;
                sum = piece.iter().fold(Sum::new(sum), |sum, word| sum.word(word.get())).fold();
            }
        )*};
    }
    pieces!(512 256 128 64 32 16 8 4 2 1);
    if length & 1 != 0 {
        // The last odd byte counts as if a zero byte followed (RFC 1071 section 4.1). It is read with
        // the one before it: the verifier draws nothing from a comparison with the end of the packet
        // itself, which is what that of a single byte becomes.
        let [_, last] = *packet.header::<[u8; 2]>(at + (length & !1) - 1)?;
        sum = Sum::new(sum).word(u16::from(last) << 8).fold();
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn full(words: &[u16]) -> u16 {
        words
            .iter()
            .fold(Sum::ZERO, |sum, &word| Sum::new(sum.word(word).fold()))
            .checksum()
    }

    #[test]
    fn rfc_1624_section_4_example() {
        // HC = 0xDD2F, m = 0x5555, m' = 0x3285: the case that RFC 1141 got wrong.
        assert_eq!(Sum::ZERO.change(0x5555, 0x3285).applied_to(0xdd2f), 0x0000);
    }

    #[test]
    fn zero_is_sent_as_all_ones() {
        assert_eq!(udp_field(0), 0xffff);
        assert_eq!(udp_field(1), 1);
    }

    proptest! {
        #[test]
        fn incremental_equals_full(
            mut words in prop::collection::vec(any::<u16>(), 1..100),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u16>()), 0..8),
        ) {
            // A version nibble makes real headers non-zero; an all-zero sum has two spellings.
            words.push(0x4500);
            let before = full(&words);
            let mut sum = Sum::ZERO;
            for (index, new) in changes {
                let index = index.index(words.len() - 1);
                sum = sum.change(words[index], new);
                words[index] = new;
            }
            prop_assert_eq!(sum.applied_to(before), full(&words));
        }

        #[test]
        fn folding_on_the_way_changes_nothing(words in prop::collection::vec(any::<u16>(), 0..300)) {
            let (left, right) = words.split_at(words.len() / 2);
            let sum = |words: &[u16]| words.iter().fold(Sum::ZERO, |sum, &word| sum.word(word));
            let whole: Vec<u16> = words.clone();
            let parts = Sum::new(sum(left).fold()).plus(Sum::new(sum(right).fold()));
            prop_assert_eq!(parts.fold(), sum(&whole).fold());
        }
    }
}
