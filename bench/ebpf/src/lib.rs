//! What the generator and the receiver of RTP, which run in the kernel, share with the benchmark that starts them.
#![cfg_attr(target_arch = "bpf", no_std)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Streams at most.
pub const STREAMS: usize = 256;
/// The first bytes of a frame as words in network byte order: Ethernet, IPv4 without options, UDP, RTP without
/// contributing sources.
pub type Header = [u16; (14 + 20 + 8 + 12) / 2];
/// Bytes of a frame: 20 ms of G.711.
pub const FRAME: usize = size_of::<Header>() + 160;
/// SSRC of the first stream; those of the others follow.
pub const FIRST_SSRC: u32 = 0x5eed_0000;
/// Samples of G.711 in a packet.
pub const SAMPLES: u32 = 160;

/// Indices in a [`Header`].
pub mod at {
    /// Source address, destination address, source port, destination port: six words.
    pub const ENDPOINTS: usize = 13;
    /// UDP checksum.
    pub const CHECKSUM: usize = 20;
    /// Version, marker and payload type.
    pub const RTP: usize = 21;
    /// Sequence number.
    pub const SEQUENCE: usize = 22;
    /// Timestamp: two words.
    pub const TIMESTAMP: usize = 23;
    /// SSRC: two words.
    pub const SSRC: usize = 25;
}

/// A stream: how it is sent, and how it must arrive.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Stream {
    /// The first bytes of its frames. Sequence number, timestamp and UDP checksum are 0.
    pub header: Header,
    /// Zero.
    pub padding: u16,
    /// Sum of the 16-bit words that the UDP checksum covers, as it is sent (RFC 1071).
    pub sum: u32,
    /// Addresses and ports with which it must arrive, as at [`at::ENDPOINTS`].
    pub endpoints: [u16; 6],
    /// The sum with which it must arrive.
    pub arrival_sum: u32,
}

/// What the generator is to do. The benchmark writes it while the generator stands still.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Sender {
    /// Packets sent until now, over all trials: streams take turns.
    pub sent: u64,
    /// Where [`Sender::sent`] stood when the trial began.
    pub first: u64,
    /// Where it ends.
    pub end: u64,
    /// When the first packet is due, ns by `CLOCK_MONOTONIC`. Moved on by as much as the generator stands still, which then
    /// does not send at once what it has missed.
    pub start: u64,
    /// Between two packets, 1/1024 ns.
    pub interval: u64,
    /// Packets that are due at the same time, and runs whose packets leave together, where that is more than 1.
    pub burst: u64,
    /// Runs until now.
    pub runs: u64,
    /// Streams.
    pub streams: u32,
    /// Interface that it sends on.
    pub interface: u32,
    /// When it, or the receiver, which has the same processor, last looked at the clock; 0 before the first time.
    pub looked: u64,
    /// When the last packet was sent.
    pub last: u64,
}

/// What the receiver has seen.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct Received {
    /// Packets that are as they should be, each for the first time.
    pub right: u64,
    /// Such that had come before.
    pub twice: u64,
    /// Packets of a stream with another address, port, payload type, timestamp or checksum than they should have.
    pub wrong: u64,
    /// [`Sender::sent`] when the last packet came; 0 before the first.
    pub sent: u64,
    /// The most packets that were sent between one that came and the next.
    pub silence: u64,
}

/// Which sequence numbers of a stream have come, a bit for each.
pub type Seen = [u64; 1024];

/// The UDP checksum of a stream's packet, by the sum of the packet with sequence number and timestamp 0.
#[inline(always)]
#[must_use]
pub fn checksum(sum: u32, sequence: u16, timestamp: u32) -> u16 {
    let sum = sum + u32::from(sequence) + (timestamp >> 16) + (timestamp & 0xffff);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    match !(sum as u16) {
        // 0 would say that there is none (RFC 768).
        0 => 0xffff,
        checksum => checksum,
    }
}

/// Two words of a header as one number in host byte order.
#[inline(always)]
#[must_use]
pub fn long(header: &Header, at: usize) -> u32 {
    u32::from(u16::from_be(header[at])) << 16 | u32::from(u16::from_be(header[at + 1]))
}
