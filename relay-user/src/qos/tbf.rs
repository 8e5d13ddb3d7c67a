//! A token bucket filter that holds nothing back, and cuts what TCP hands over as one: `TCA_TBF_*` of
//! include/uapi/linux/pkt_sched.h, in host byte order.
//!
//! A packet that offloads would cut (GSO) is up to 64 kB long, and HTB sends it as a whole: on a line of
//! 1 Mbit/s, voice waits half a second for it. TCP builds such packets whatever the interface can do,
//! and GRO builds them of what is forwarded. sch_tbf cuts those that are longer than its burst
//! (tbf_segment() in net/sched/sch_tbf.c), which none of the fair queueing disciplines does.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{object::Attribute, ratespec::RateSpec};

/// Name of the queueing discipline.
pub(super) const KIND: &str = "tbf";

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;

/// In byte/s: so high that the kernel computes 0 ns for any packet (psched_l2t_ns()), and none waits.
const RATE: u64 = 1 << 50;

/// What is put before a packet below the interface, and counts already: VLAN tags, MPLS labels.
const SPARE: u32 = 46;

/// Frames in the queue that the kernel puts in, until the fair one is in its place.
const FRAMES: u32 = 64;

/// `struct tc_tbf_qopt`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Options {
    rate: RateSpec,
    peakrate: RateSpec,
    limit: u32,
    buffer: u32,
    mtu: u32,
}

/// The longest packet that passes uncut, in bytes. A longer one that cannot be cut is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Splitter(u32);

impl Splitter {
    /// For an interface with frames of at most this length.
    pub(super) const fn new(frame: u32) -> Self {
        Self(frame.saturating_add(SPARE))
    }

    /// As the content of `TCA_OPTIONS`.
    pub(super) fn encode(self) -> Vec<u8> {
        let options = Options {
            rate: RateSpec::new(RATE),
            peakrate: RateSpec::NONE,
            limit: self.0.saturating_mul(FRAMES),
            buffer: 0,
            mtu: 0,
        };
        Attribute::nest([
            Attribute::new(TCA_TBF_PARMS, options.as_bytes()),
            Attribute::new(TCA_TBF_RATE64, RATE.to_ne_bytes()),
            Attribute::new(TCA_TBF_BURST, self.0.to_ne_bytes()),
        ])
    }

    /// Reads the content of `TCA_OPTIONS`; none for one that does something else. The kernel does not
    /// tell the burst, but the limit that was made of it.
    pub(super) fn decode(options: &[u8]) -> Option<Self> {
        let attributes = Attribute::all(options);
        let find = |kind| attributes.iter().find(|attribute| attribute.kind() == kind);
        let rate = find(TCA_TBF_RATE64)?.value().try_into().ok()?;
        let (fixed, _) = Options::read_from_prefix(find(TCA_TBF_PARMS)?.value()).ok()?;
        (u64::from_ne_bytes(rate) == RATE).then_some(Self(fixed.limit / FRAMES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let splitter = Splitter::new(1518);
        assert_eq!(Splitter::decode(&splitter.encode()), Some(splitter));
        assert_ne!(Splitter::new(9018), splitter);
        assert_eq!(Splitter::decode(&[]), None);
    }
}
