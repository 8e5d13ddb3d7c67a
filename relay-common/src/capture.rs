//! Copies of packets, for whoever captures: as they were received and as they leave, with what was
//! decided.
//!
//! A copy of what is received is kept until the decision is known, and only then handed over. Whether one
//! is kept is written beside it, and is no variable of the program's: the verifier walks through the
//! whole decision once, and not once with a copy and once without.

use core::hint::cold_path;

use crate::{
    abi::abi,
    packet::{Packet, Tables},
    reason::{Reason, Verdict},
    stream::Control,
    wire::Tag,
};

/// Most bytes of a packet that are captured: more than RTP on Ethernet has.
pub const SNAP_MAX: usize = 2048;

/// Fewest: the headers of IPv4 and UDP, without which nothing is a packet of a stream.
pub const SNAP_MIN: usize = 28;

abi! {
    /// What is captured, in [`Control`]. Written by the process that captures, only read by the datapath.
    #[derive(Default)]
    pub struct Capture(32, align 8) {
        /// Until when: `CLOCK_MONOTONIC`, ns. The process keeps pushing it forward, so that a capture
        /// ends also when the process is killed. 0 while nobody captures.
        pub until: u64,
        /// The pair whose packets are captured; 0 for those of all pairs.
        pub pair: u64,
        /// Most bytes of each packet, [`SNAP_MIN`] to [`SNAP_MAX`].
        pub snap: u32,
        /// A packet is captured when a random number is not above this.
        pub sample: u32,
        /// Id of the process, for one that finds the map in use.
        pub process: u32,
        /// Always 0.
        pub padding: [u8; 4],
    }
}

abi! {
    /// What stands before each packet in the ring buffer `CAPTURED`.
    #[derive(Default)]
    pub struct Captured(32, align 8) {
        /// When it came, the time that the stream's statistics have it at too, or was sent:
        /// `CLOCK_MONOTONIC`, ns.
        pub time: u64,
        /// Number of the pair.
        pub pair: u64,
        /// Bytes of the whole frame, without a tag beside it.
        pub length: u32,
        /// Number of the [`Reason`]; [`UNCOUNTED`] for none.
        pub reason: u32,
        /// The outermost VLAN tag where it is beside the frame; its protocol is 0 for none.
        pub tag_protocol: u16,
        /// Its priority and number.
        pub tag_control: u16,
        /// One of [`side`].
        pub side: u8,
        /// Which leg of the pair the stream comes in on: 0 or 1.
        pub leg: u8,
        /// Always 0.
        pub padding: [u8; 2],
    }
}

/// In [`Captured::reason`]: what the PBX sent, with no reason to count it by.
pub const UNCOUNTED: u32 = u32::MAX;

/// Values of [`Captured::side`].
pub mod side {
    /// It came in.
    pub const RECEIVED: u8 = 0;
    /// The datapath sends it.
    pub const SENT: u8 = 1;
    /// The PBX sends it.
    pub const PBX: u8 = 2;
}

abi! {
    /// Value of `KEPT`, one per CPU: the packet that is being looked at.
    pub struct Kept(2096, align 8) {
        /// Packets that the ring buffer had no room for, since the map was made.
        pub missed: u64,
        /// Bytes in `bytes`; 0 while none is kept.
        pub length: u32,
        /// Always 0.
        pub padding: [u8; 4],
        /// What is handed over begins here.
        pub header: Captured,
        /// The beginning of the frame.
        pub bytes: [u8; SNAP_MAX],
    }
}

/// Keeps a copy of a packet of a pair's leg, if it is to be captured: `control` is what
/// [`Tables::control`] returned, and the packet came at `time` (`CLOCK_MONOTONIC`, ns). Nothing depends
/// on whether it is.
#[inline(always)]
pub(crate) fn keep<P: Packet + ?Sized>(
    packet: &P,
    tables: &impl Tables,
    control: *const Control,
    time: impl FnOnce() -> u64,
    side: u8,
    of: impl Fn() -> (u64, u8),
) {
    // SAFETY: `Tables::control` points into a map that outlives the packet. The process that captures
    // writes it meanwhile, hence volatile; an aligned word cannot tear.
    let capture = unsafe {
        let until = (&raw const (*control).capture.until).read_volatile();
        if until == 0 {
            return;
        }
        cold_path();
        (&raw const (*control).capture).read_volatile()
    };
    let Some(kept) = tables.kept() else {
        return;
    };
    // SAFETY: `Tables::kept` points to this CPU's own, which nothing else uses while this packet is
    // looked at.
    let kept = unsafe { &mut *kept };
    // A capture that ends while a packet is looked at leaves its copy behind.
    kept.length = 0;
    let (pair, leg) = of();
    if tables.now() >= capture.until
        || capture.pair != 0 && capture.pair != pair
        || capture.sample != u32::MAX && tables.random() > capture.sample
    {
        return;
    }
    kept.header.time = time();
    kept.header.pair = pair;
    kept.header.side = side;
    kept.header.leg = leg;
    fill(packet, kept, capture.snap);
}

/// Copies the packet as it is now.
#[inline(always)]
fn fill<P: Packet + ?Sized>(packet: &P, kept: &mut Kept, snap: u32) {
    let Tag { tpid, control } = packet.tag_beside().unwrap_or_default();
    kept.header.tag_protocol = tpid;
    kept.header.tag_control = control;
    kept.header.length = packet.length() as u32;
    kept.length = packet.copy(&mut kept.bytes, snap);
}

/// Hands over what was kept of the packet, with the reason that it was counted by, and, where it was
/// rewritten, a copy of what is sent.
#[inline(always)]
pub(crate) fn conclude<P: Packet + ?Sized>(
    packet: &P,
    tables: &impl Tables,
    control: *const Control,
    reason: Option<Reason>,
) {
    // SAFETY: as in `keep`.
    if unsafe { (&raw const (*control).capture.until).read_volatile() } == 0 {
        return;
    }
    cold_path();
    let Some(kept) = tables.kept() else {
        return;
    };
    // SAFETY: as in `keep`.
    let kept = unsafe { &mut *kept };
    if kept.length == 0 {
        return;
    }
    kept.header.reason = reason.map_or(UNCOUNTED, |reason| reason as u32);
    hand_over(tables, kept);
    if reason.map(Reason::verdict) == Some(Verdict::Send) {
        // SAFETY: as in `keep`.
        let snap = unsafe { (&raw const (*control).capture.snap).read_volatile() };
        kept.header.time = tables.now_precise();
        kept.header.side = side::SENT;
        fill(packet, kept, snap);
        hand_over(tables, kept);
    }
}

#[inline(always)]
fn hand_over(tables: &impl Tables, kept: &mut Kept) {
    if kept.length != 0 && !tables.hand_over(kept) {
        kept.missed += 1;
    }
    kept.length = 0;
}
