//! The decision on a packet that comes in, in the order that docs/datapath.md explains to
//! operators.

use crate::{
    capture::{self, side},
    network::Network,
    packet::{Packet, Tables},
    parse::{Link, Parsed, link, parse},
    proof::{note, renumbered, suspend},
    reason::{Reason, Verdict},
    reception::{Arrival, receive},
    rewrite::{Rewrite, rewrite},
    state::{load, store},
    stream::{
        Address, Control, Event, State, Stream, StreamKey, event, leg_of, mode, opposite, ticks,
    },
    wire::{Be16, Ipv4, Ipv6, Rtp, RtpExtension, Udp, ethertype},
};

/// A pause after which a stream's next packet is the PBX's to judge, ticks: a quarter of a second,
/// more than any packet time and less than it takes to end a call and begin another.
const PAUSE: u32 = ticks(250_000_000);

/// Least time between two reports of one stream, ticks.
const REPORT_INTERVAL: u32 = ticks(100_000_000);

/// Packets in a row without an echo that end an offload.
const UNANSWERED_MAX: u32 = 8;

/// Decides on a packet, rewrites it when it is to be sent, and accounts for it.
///
/// A packet is either rewritten whole or not touched at all.
#[inline(always)]
pub fn relay<P: Packet + ?Sized>(packet: &mut P, tables: &impl Tables) -> Decision {
    let reason = match link(packet) {
        Ok(link) => match link.kind {
            ethertype::IPV4 => return relay_by::<Ipv4, P>(packet, &link, tables),
            ethertype::IPV6 => return relay_by::<Ipv6, P>(packet, &link, tables),
            _ => Reason::NotIp,
        },
        Err(reason) => reason,
    };
    tables.count(reason, packet.length());
    Decision::by(reason)
}

/// The same for a packet of one network protocol.
#[inline(always)]
fn relay_by<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    link: &Link,
    tables: &impl Tables,
) -> Decision {
    let bytes = packet.length();
    let pass = |reason| {
        tables.count(reason, bytes);
        Decision::by(reason)
    };
    let parsed = match parse::<N, P>(packet, link) {
        Ok(parsed) => parsed,
        Err(reason) => return pass(reason),
    };
    let Some(stream) = tables.stream(&parsed.destination()) else {
        return pass(missed(packet, &parsed, tables));
    };
    // A switch floods, a port mirrors, an interface is promiscuous: the stack ignores such frames,
    // and relaying them would hand the phone everything twice.
    if packet.has_ethernet()
        && !stream.next_hop.source_mac.is(parsed.destination_mac)
        && stream.next_hop.is_known()
    {
        return pass(Reason::OtherHost);
    }
    let Some(control) = tables.control() else {
        return pass(Reason::NoState);
    };
    let now = tables.now_precise();
    let of = || (u64::from(stream.pair), leg_of(stream.slot));
    capture::keep(packet, tables, control, || now, side::RECEIVED, of);
    let Passed { reason, is_noted } =
        match decide(packet, &parsed, stream, bytes, now, control, tables) {
            Ok(()) => {
                tables.count(Reason::Relayed, bytes);
                capture::conclude(packet, tables, control, Some(Reason::Relayed));
                return Decision::by(Reason::Relayed);
            }
            Err(passed) => passed,
        };
    tables.count(reason, bytes);
    capture::conclude(packet, tables, control, Some(reason));
    let decision = Decision::by(reason);
    if decision.verdict != Verdict::Pass {
        return decision;
    }
    // The note costs the verifier most, which walks through it for all reasons at once only because
    // nothing depends on the reason any more.
    if is_noted && let Some(state) = tables.state(stream.slot) {
        let (at, length) = payload(&parsed);
        note(packet, state, load!(state, epoch), at, length);
    }
    Decision {
        reason,
        verdict: Verdict::Pass,
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What it was counted as.
    pub reason: Reason,
    /// What the hook has to do with it: the reason's [`Reason::verdict`].
    pub verdict: Verdict,
}

impl Decision {
    #[inline(always)]
    const fn by(reason: Reason) -> Self {
        Self {
            reason,
            verdict: reason.verdict(),
        }
    }
}

/// Why a packet is the stack's.
struct Passed {
    reason: Reason,
    /// Whether it is one of those that the PBX will most probably forward.
    is_noted: bool,
}

impl From<Reason> for Passed {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self {
            reason,
            is_noted: false,
        }
    }
}

/// Decides on a packet that has the address and port of a stream, and came at `now`
/// (`CLOCK_MONOTONIC`, ns).
#[inline(always)]
fn decide<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed<N>,
    stream: &Stream,
    bytes: usize,
    now: u64,
    control: *const Control,
    tables: &impl Tables,
) -> Result<(), Passed> {
    let state = tables.state(stream.slot).ok_or(Reason::NoState)?;
    let (at, length) = payload(parsed);
    let now_ticks = nonzero(ticks(now));
    if !N::is(parsed.source, &stream.source) || parsed.source_port != stream.source_port {
        let (epoch, _) = standing(state, now, control)?;
        let event = Event {
            kind: event::UNEXPECTED_SOURCE,
            slot: stream.slot,
            epoch,
            address: N::address(parsed.source),
            port: parsed.source_port,
            ..Event::at(now)
        };
        report_at_times(state, now_ticks, &event, tables);
        return Err(Reason::UnexpectedSource.into());
    }
    let rtp = match rtp(packet, at, length) {
        Ok(rtp) => RtpFields::from(rtp),
        Err(reason) => {
            standing(state, now, control)?;
            if reason == Reason::Rtcp {
                store!(state, now_ticks, last_rtcp);
            }
            return Err(reason.into());
        }
    };
    // Also what is none of the datapath's: a stream that comes back from the PBX would seem to have
    // lost all that the PBX relayed.
    let arrival = Arrival {
        now,
        bytes,
        segments: packet.segments(),
        dscp: parsed.traffic_class >> 2,
    };
    receive(state, &arrival, &rtp);
    let (epoch, mode) = standing(state, now, control)?;
    let last_seen = load!(state, last_seen);
    store!(state, now_ticks, last_seen);
    let moment = Moment {
        now_ticks,
        last_seen,
        mode,
    };
    let reason = match plan(packet, parsed, stream, state, at, &rtp, &moment) {
        Ok(plan) => match rewrite(packet, parsed, stream, &plan, tables) {
            Ok(()) => {
                account(state, bytes);
                return Ok(());
            }
            Err(reason) => reason,
        },
        Err(reason) => reason,
    };
    // What the PBX does with it will tell whether it may be trusted with the next ones.
    store!(state, now_ticks, last_passed);
    let mut passed = Passed::from(reason);
    if stream.proof != 0 {
        if mode == mode::OFFLOADED && is_unanswered(state, reason) {
            suspend(state, epoch);
            // Nobody would see the PBX speak to the other phone then.
            if let Some(opposite) = tables.state(opposite(stream.slot)) {
                suspend(opposite, load!(opposite, epoch));
            }
            tables.report(&Event {
                kind: event::ECHO_MISSING,
                slot: stream.slot,
                epoch,
                ..Event::at(now)
            });
        }
        passed.is_noted = true;
    }
    Err(passed)
}

/// The round of proof of a stream that the datapath looks after, and its mode.
#[inline(always)]
fn standing(state: *mut State, now: u64, control: *const Control) -> Result<(u32, u32), Reason> {
    if now >= lease(control) {
        return Err(Reason::LeaseOver);
    }
    let epoch = load!(state, epoch);
    match mode::of(epoch, load!(state, proven), load!(state, suspended)) {
        mode::SUSPENDED => Err(Reason::Suspended),
        mode => Ok((epoch, mode)),
    }
}

/// The end of the lease, ns.
#[inline(always)]
pub(crate) fn lease(control: *const Control) -> u64 {
    // SAFETY: `Tables::control` points into a map that outlives the packet. The controller writes it
    // meanwhile, hence volatile; an aligned word cannot tear.
    unsafe { (&raw const (*control).lease).read_volatile() }
}

/// When a packet came, and how the stream stood.
struct Moment {
    now_ticks: u32,
    /// Ticks of the packet before; 0 for none.
    last_seen: u32,
    mode: u32,
}

/// 0 says "never" in a [`State`].
#[inline(always)]
pub(crate) const fn nonzero(ticks: u32) -> u32 {
    if ticks == 0 { 1 } else { ticks }
}

/// What no stream expects: RTCP of one, or a stream whose local address was assumed wrongly.
#[inline(always)]
fn missed<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed<N>,
    tables: &impl Tables,
) -> Reason {
    let port = parsed.destination_port;
    // RTCP has the next higher, odd port (RFC 3550 section 11).
    let key = if port & 1 == 1 {
        StreamKey::new(N::address(parsed.destination), port - 1)
    } else {
        StreamKey::new(Address::unspecified(), port)
    };
    let Some(stream) = tables.stream(&key) else {
        return Reason::NoStream;
    };
    let Some(state) = tables.state(stream.slot) else {
        return Reason::NoState;
    };
    // The entry without an address may be one of the other protocol.
    if !N::address(parsed.source).is(&stream.source) {
        return Reason::NoStream;
    }
    let now = tables.now();
    if port & 1 == 1 {
        let (at, length) = payload(parsed);
        return match rtp(packet, at, length) {
            Err(Reason::Rtcp) => {
                store!(state, nonzero(ticks(now)), last_rtcp);
                Reason::Rtcp
            }
            _ => Reason::NoStream,
        };
    }
    if parsed.source_port == stream.source_port {
        let event = Event {
            kind: event::RECEIVED_AT,
            slot: stream.slot,
            epoch: load!(state, epoch),
            address: N::address(parsed.destination),
            port,
            ..Event::at(now)
        };
        report_at_times(state, nonzero(ticks(now)), &event, tables);
    }
    Reason::NoStream
}

/// The fixed part of an RTP header, numbers in host byte order.
///
/// Taken apart where it is read: of a header that is copied whole the compiler makes words, and takes
/// those apart.
#[derive(Clone, Copy)]
pub(crate) struct RtpFields {
    pub(crate) version_count: u8,
    pub(crate) marker_type: u8,
    pub(crate) sequence: u16,
    pub(crate) timestamp: u32,
    pub(crate) ssrc: u32,
}

impl From<&Rtp> for RtpFields {
    #[inline(always)]
    fn from(rtp: &Rtp) -> Self {
        Self {
            version_count: rtp.version_count,
            marker_type: rtp.marker_type,
            sequence: rtp.sequence.get(),
            timestamp: u32_of(rtp.timestamp),
            ssrc: u32_of(rtp.ssrc),
        }
    }
}

/// Offset and length of what the UDP header announces.
#[inline(always)]
pub(crate) fn payload<N: Network>(parsed: &Parsed<N>) -> (usize, usize) {
    // Ethernet pads short frames: what lies past the datagram must not be read as RTP.
    (
        parsed.udp() + Udp::LEN,
        usize::from(parsed.udp_length) - Udp::LEN,
    )
}

/// The RTP header of a datagram that is RTP.
#[inline(always)]
pub(crate) fn rtp<P: Packet + ?Sized>(
    packet: &mut P,
    at: usize,
    length: usize,
) -> Result<&Rtp, Reason> {
    /// Shortest RTCP packet: an empty receiver report (RFC 3550 section 6.4.2).
    const RTCP_MIN: usize = 8;
    if length < Rtp::LEN {
        if length < RTCP_MIN {
            return Err(Reason::RtpLength);
        }
        let [first, second] = *packet.header::<[u8; 2]>(at)?;
        return Err(not_rtp(first, second).unwrap_or(Reason::RtpLength));
    }
    let rtp = packet.header::<Rtp>(at)?;
    match not_rtp(rtp.version_count, rtp.marker_type) {
        Some(reason) => Err(reason),
        None => Ok(rtp),
    }
}

/// What else a datagram is that begins with these bytes.
#[inline(always)]
const fn not_rtp(first: u8, second: u8) -> Option<Reason> {
    if first >> 6 != 2 {
        return Some(Reason::NotRtp);
    }
    // Where it shares the port (RFC 5761 section 4).
    if matches!(second, 192..=223) {
        return Some(Reason::Rtcp);
    }
    None
}

/// Tells the controller of a thing that may come with every packet, at times.
#[inline(always)]
fn report_at_times(state: *mut State, now_ticks: u32, event: &Event, tables: &impl Tables) {
    if is_report_due(load!(state, reported), now_ticks) {
        store!(state, now_ticks, reported);
        tables.report(event);
    }
}

/// Whether the last report, 0 for none, is long enough ago for another.
#[inline(always)]
pub(crate) const fn is_report_due(reported: u32, now_ticks: u32) -> bool {
    reported == 0 || now_ticks.wrapping_sub(reported) >= REPORT_INTERVAL
}

/// How to rewrite the packet, or why it is Asterisk's.
#[inline(always)]
fn plan<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed<N>,
    stream: &Stream,
    state: *mut State,
    at: usize,
    rtp: &RtpFields,
    moment: &Moment,
) -> Result<Rewrite, Reason> {
    // The stack takes it apart again. Its echoes will be none of what is noted of it.
    if packet.is_aggregate() {
        return Err(Reason::Aggregate);
    }
    if moment.mode == mode::WATCHING {
        return Err(Reason::Watching);
    }
    let plan = validate(packet, parsed, stream, state, at, rtp)?;
    if is_keepalive_due(stream, state, moment) {
        return Err(Reason::Keepalive);
    }
    if stream.proof != 0 {
        if rtp.ssrc != load!(state, ssrc) {
            return Err(Reason::NewSsrc);
        }
        if moment.now_ticks.wrapping_sub(moment.last_seen) > PAUSE {
            return Err(Reason::AfterPause);
        }
        // A packet must not overtake the one before, which may also turn out to be no echo.
        if load!(state, noted) != load!(state, echoed) {
            return Err(Reason::AwaitingEcho);
        }
    }
    Ok(plan)
}

/// Whether the PBX has heard nothing of the phone for too long. A phone that sends RTCP is heard:
/// at most 2½ times as long may pass without any, which is still less than the PBX's patience.
#[inline(always)]
fn is_keepalive_due(stream: &Stream, state: *mut State, moment: &Moment) -> bool {
    let due = u32::from(stream.keepalive);
    if due == 0 || moment.now_ticks.wrapping_sub(load!(state, last_passed)) < due {
        return false;
    }
    let rtcp = load!(state, last_rtcp);
    rtcp == 0 || 2 * u64::from(moment.now_ticks.wrapping_sub(rtcp)) >= 5 * u64::from(due)
}

/// Whether the PBX forwards no longer: packets that it was seen to forward before do not come out.
/// Those of payload types that it may well keep to itself do not count.
#[inline(always)]
fn is_unanswered(state: *mut State, reason: Reason) -> bool {
    let echoed = load!(state, echoed);
    let mut unanswered = load!(state, unanswered);
    // A PBX that takes longer than from one packet to the next always owes one, but answers.
    if echoed != load!(state, answered) || echoed == load!(state, noted) {
        store!(state, echoed, answered);
        unanswered = 0;
    }
    if reason != Reason::PayloadType {
        unanswered += 1;
    }
    store!(state, unanswered, unanswered);
    unanswered > UNANSWERED_MAX
}

/// Everything about the packet that could make it Asterisk's, before a byte of it changes.
#[inline(always)]
fn validate<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed<N>,
    stream: &Stream,
    state: *mut State,
    at: usize,
    rtp: &RtpFields,
) -> Result<Rewrite, Reason> {
    const PADDING: u8 = 0x20;
    // ast_rtp_interpret() in res_rtp_asterisk.c shortens the packet and leaves the bit set.
    if rtp.version_count & PADDING != 0 {
        return Err(Reason::RtpPadding);
    }
    let (_, length) = payload(parsed);
    if length < rtp_header_length(packet, at, length, rtp.version_count)? {
        return Err(Reason::RtpLength);
    }
    let new_payload_type = renumbered(state, rtp.marker_type & 0x7f).ok_or(Reason::PayloadType)?;
    if parsed.hop_limit <= 1 {
        return Err(Reason::HopLimit);
    }
    let next_hop = &stream.next_hop;
    if N::LEN + usize::from(parsed.udp_length) > usize::from(next_hop.mtu) {
        return Err(if next_hop.is_known() {
            Reason::TooBig
        } else {
            Reason::NextHopUnknown
        });
    }
    let depth = next_hop.vlan_depth();
    if depth != 0 && depth != parsed.vlan_depth {
        return Err(Reason::VlanMismatch);
    }
    Ok(Rewrite {
        marker_type: rtp.marker_type,
        new_marker_type: rtp.marker_type & 0x80 | new_payload_type,
    })
}

/// Bytes of the whole RTP header: contributing sources and extension included (RFC 3550 section 5).
#[inline(always)]
fn rtp_header_length<P: Packet + ?Sized>(
    packet: &mut P,
    at: usize,
    length: usize,
    version_count: u8,
) -> Result<usize, Reason> {
    const EXTENSION: u8 = 0x10;
    let fixed = Rtp::LEN + usize::from(version_count & 0x0f) * 4;
    if version_count & EXTENSION == 0 {
        return Ok(fixed);
    }
    if length < fixed + RtpExtension::LEN {
        return Err(Reason::RtpLength);
    }
    let words = packet.header::<RtpExtension>(at + fixed)?.words.get();
    Ok(fixed + RtpExtension::LEN + usize::from(words) * 4)
}

/// A 32-bit field of RTP's, in host byte order.
#[inline(always)]
pub(crate) fn u32_of(halves: [Be16; 2]) -> u32 {
    u32::from_be(zerocopy::transmute!(halves))
}

#[inline(always)]
fn account(state: *mut State, bytes: usize) {
    store!(state, load!(state, packets).wrapping_add(1), packets);
    store!(state, load!(state, bytes).wrapping_add(bytes as u64), bytes);
}
