//! What the decision asks of its environment: typed access to a packet, and the tables.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    capture::{Kept, SNAP_MAX},
    checksum::{self, ClassChange, PartialChecksum, Sum, UdpChange},
    reason::Reason,
    stream::{Control, Event, State, Stream, StreamKey},
    wire::{Be16, Ipv4, Tag},
};

/// A header that can be viewed in place: any bytes are valid, none is padding.
pub trait Header: Copy + FromBytes + IntoBytes + Immutable + KnownLayout {}

impl<T: Copy + FromBytes + IntoBytes + Immutable + KnownLayout> Header for T {}

/// A frame, from its Ethernet header to its last byte; on a link without Ethernet headers, from its
/// IP header on.
pub trait Packet {
    /// Bytes of the frame.
    fn length(&self) -> usize;

    /// Whether it begins with an Ethernet header.
    #[inline(always)]
    fn has_ethernet(&self) -> bool {
        true
    }

    /// The outermost VLAN tag, where it is not in the frame but noted beside it. Those in the frame
    /// are further in then.
    #[inline(always)]
    fn tag_beside(&self) -> Option<Tag> {
        None
    }

    /// Whether it stands for several packets on the wire, merged into one.
    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        false
    }

    /// How many packets it stands for, at least 1.
    #[inline(always)]
    fn segments(&self) -> u32 {
        1
    }

    /// The header at `at` bytes from the start of the frame.
    ///
    /// # Errors
    /// [`Reason::Truncated`] when the frame ends before the header does.
    fn header<H: Header>(&mut self, at: usize) -> Result<&mut H, Reason>;

    /// A copy of the header at `at` bytes, also where [`Packet::header`] cannot view it in place.
    ///
    /// # Errors
    /// As [`Packet::header`].
    #[inline(always)]
    fn read<H: Header>(&mut self, at: usize) -> Result<H, Reason> {
        self.header(at).copied()
    }

    /// Replaces the traffic class of an IP header, and the header's checksum with it.
    ///
    /// # Errors
    /// A [`Reason`] why the packet is as it was.
    #[inline(always)]
    fn change_traffic_class(&mut self, change: &ClassChange) -> Result<(), Reason> {
        if change.has_checksum {
            let header = self.header::<Ipv4>(change.ip)?;
            let sum = Sum::ZERO.change(change.old, change.new);
            header.checksum = Be16::new(sum.applied_to(header.checksum.get()));
        }
        *self.header::<Be16>(change.ip)? = Be16::new(change.new);
        Ok(())
    }

    /// What becomes of an unfinished checksum after this hook.
    fn partial_checksum(&self) -> PartialChecksum;

    /// The UDP checksum, which is not 0, that the packet is to be sent with; none where it has that
    /// already. It comes before any other change to the packet: on an error the packet must still be
    /// as it arrived.
    ///
    /// # Errors
    /// A [`Reason`] to pass the packet.
    #[inline(always)]
    fn change_udp_checksum(&mut self, change: &UdpChange) -> Result<Option<u16>, Reason> {
        checksum::changed_udp_field(self, change).map(Some)
    }

    /// Makes the first `length` bytes reachable through [`Packet::header`], as far as that is
    /// possible. What is not stays [`Reason::Truncated`].
    #[inline(always)]
    fn pull(&mut self, _length: usize) {}

    /// Replaces all VLAN tags, one or two, of a frame whose outermost one is beside it. `tags` has the
    /// outermost first, and as many count as the frame has.
    ///
    /// # Errors
    /// [`Reason::RetagFailed`]: the tags are lost.
    #[inline(always)]
    fn replace_tags(&mut self, _tags: [Tag; 2], _depth: usize) -> Result<(), Reason> {
        Err(Reason::RetagFailed)
    }

    /// Copies its first bytes, `most` and [`SNAP_MAX`] at most; returns how many.
    fn copy(&self, to: &mut [u8; SNAP_MAX], most: u32) -> u32;

    /// Sets the priority that it has at a queueing discipline, where there is one on its way out.
    #[inline(always)]
    fn prioritize(&mut self, _priority: u32) {}

    /// Hears of a change behind the Ethernet header that no checksum in the packet makes up for.
    /// It matters where someone keeps a sum over the whole packet.
    #[inline(always)]
    fn sum_changed(&mut self, _change: Sum) {}
}

/// The maps and the clock.
pub trait Tables {
    /// `STREAMS`.
    fn stream(&self, key: &StreamKey) -> Option<&Stream>;

    /// `STATE`, shared with other CPUs and with the controller.
    fn state(&self, slot: u32) -> Option<*mut State>;

    /// The DSCP that `DSCP_MAP` translates one (0–63) to.
    fn translated(&self, dscp: u8) -> u8;

    /// `CLOCK_MONOTONIC_COARSE`, ns: up to a timer tick behind, and next to free.
    fn now(&self) -> u64;

    /// `CLOCK_MONOTONIC`, ns. It reads the hardware's clock.
    fn now_precise(&self) -> u64;

    /// Tells the controller, if the ring buffer has room.
    fn report(&self, event: &Event);

    /// Adds a packet of `bytes` to `COUNTERS`.
    fn count(&self, reason: Reason, bytes: usize);

    /// `CONTROL`, shared with the controller and with the process that captures.
    fn control(&self) -> Option<*const Control>;

    /// This CPU's `KEPT`.
    fn kept(&self) -> Option<*mut Kept>;

    /// Puts header and bytes of what is kept into `CAPTURED`; `false` where that is full.
    fn hand_over(&self, kept: &Kept) -> bool;

    /// Any number.
    fn random(&self) -> u32;
}

/// A frame in memory, for the host: tests, fuzzing, benchmarks.
///
/// The bytes must be 2-aligned, as every driver's buffer is.
pub struct Frame<'a> {
    bytes: &'a mut [u8],
    partial_checksum: PartialChecksum,
}

impl<'a> Frame<'a> {
    /// Wraps a frame. `partial_checksum` says which hook it stands for.
    #[must_use]
    pub fn new(bytes: &'a mut [u8], partial_checksum: PartialChecksum) -> Self {
        Self {
            bytes,
            partial_checksum,
        }
    }
}

impl Packet for Frame<'_> {
    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn header<H: Header>(&mut self, at: usize) -> Result<&mut H, Reason> {
        let rest = self.bytes.get_mut(at..).ok_or(Reason::Truncated)?;
        // A misaligned buffer reads as truncated too: a test that gets this wrong must not pass.
        H::mut_from_prefix(rest)
            .map(|(header, _)| header)
            .map_err(|_| Reason::Truncated)
    }

    fn partial_checksum(&self) -> PartialChecksum {
        self.partial_checksum
    }

    fn copy(&self, to: &mut [u8; SNAP_MAX], most: u32) -> u32 {
        let length = self.bytes.len().min(most as usize).min(SNAP_MAX);
        to[..length].copy_from_slice(&self.bytes[..length]);
        length as u32
    }
}
