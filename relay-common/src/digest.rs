//! A digest of an RTP packet, by which one that comes out of the PBX is known again.

use core::hint;

use crate::{
    packet::Packet,
    wire::{Be16, Rtp},
};

/// Longest RTP packet that gets a digest, bytes; above a full Ethernet frame.
const LENGTH_MAX: usize = 0x7ff;

/// An odd number without structure: the golden ratio's fraction, in 64 bits.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Digest of everything in an RTP packet but its marker and payload type, with the lowest byte free
/// for those; never 0. Another in every round of proof.
///
/// Two different packets have the same digest by chance once in 2⁵⁵. Nobody who could choose the
/// one can see, let alone choose, the other: it is not a matter for cryptography.
///
/// `at` is the offset of the RTP header, `length` what follows from there. None for a packet
/// beyond 2,047 bytes, or one that ends early.
#[inline(always)]
pub(crate) fn digest<P: Packet + ?Sized>(
    packet: &mut P,
    at: usize,
    length: usize,
    epoch: u32,
) -> Option<u64> {
    if !(Rtp::LEN..=LENGTH_MAX).contains(&length) {
        return None;
    }
    let flags = packet.header::<Rtp>(at).ok()?.version_count;
    let first = u64::from(epoch) << 32 | length as u64;
    let mut digest = mixed(mixed(MULTIPLIER, first), u64::from(flags));
    // The first word is done. In pieces of the length's bits, for the reason told at
    // `checksum::datagram_sum`. The mask changes nothing, but says so to the verifier, and the
    // compiler must not know.
    let at = at + size_of::<Be16>();
    let length = hint::black_box(length - size_of::<Be16>()) & LENGTH_MAX;
    macro_rules! pieces {
        ($($words:literal)*) => {$(
            let bytes = $words * 2;
            if length & bytes != 0 {
                let piece = packet.header::<[Be16; $words]>(at + (length & !(2 * bytes - 1))).ok()?;
                for word in piece {
                    digest = mixed(digest, u64::from(word.get()));
                }
            }
        )*};
    }
    pieces!(512 256 128 64 32 16 8 4 2 1);
    if length & 1 != 0 {
        // With the byte before: a comparison of a single byte's place with the end proves nothing
        // to the verifier (find_good_pkt_pointers() in kernel/bpf/verifier.c).
        let [_, last] = *packet.header::<[u8; 2]>(at + (length & !1) - 1).ok()?;
        digest = mixed(digest, u64::from(last));
    }
    Some(mixed(digest, 0) & !0xff | 0x100)
}

#[inline(always)]
const fn mixed(digest: u64, word: u64) -> u64 {
    let product = (digest ^ word).wrapping_mul(MULTIPLIER);
    product ^ product >> 32
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{collections::HashMap, vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;
    use crate::{checksum::PartialChecksum, packet::Frame};

    fn of(bytes: &[u8]) -> Option<u64> {
        in_round(1, bytes)
    }

    fn in_round(epoch: u32, bytes: &[u8]) -> Option<u64> {
        let mut words = vec![0_u16; bytes.len().div_ceil(2)];
        let buffer = zerocopy::IntoBytes::as_mut_bytes(words.as_mut_slice());
        let buffer = &mut buffer[..bytes.len()];
        buffer.copy_from_slice(bytes);
        digest(
            &mut Frame::new(buffer, PartialChecksum::Kept),
            0,
            bytes.len(),
            epoch,
        )
    }

    proptest! {
        #[test]
        fn every_bit_counts_but_those_of_marker_and_payload_type(
            bytes in prop::collection::vec(any::<u8>(), 12..400),
            index in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let before = of(&bytes).expect("long enough");
            prop_assert!(before & 0xff == 0 && before != 0);
            let index = index.index(bytes.len());
            prop_assert_ne!(in_round(2, &bytes), Some(before));
            let mut changed = bytes;
            changed[index] ^= flip;
            prop_assert_eq!(of(&changed) == Some(before), index == 1);
            changed.push(0);
            prop_assert_ne!(of(&changed), Some(before));
        }
    }

    #[test]
    fn close_packets_do_not_meet() {
        let mut seen = HashMap::new();
        for sequence in 0..1000_u16 {
            for timestamp in 0..100_u32 {
                let mut bytes: Vec<u8> = vec![0x80, 0];
                bytes.extend(sequence.to_be_bytes());
                bytes.extend((timestamp * 160).to_be_bytes());
                bytes.extend([0, 0, 0, 1]);
                bytes.extend([0xff; 160]);
                let digest = of(&bytes).expect("long enough");
                assert_eq!(seen.insert(digest, (sequence, timestamp)), None);
            }
        }
    }

    #[test]
    fn what_is_too_short_or_too_long_has_none() {
        assert_eq!(of(&[0x80; 11]), None);
        assert!(of(&[0x80; 12]).is_some());
        assert!(of(&[0x80; 2047]).is_some());
        assert_eq!(of(&[0x80; 2048]), None);
    }
}
