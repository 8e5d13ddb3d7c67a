//! The decision on a packet that comes in, in the order that docs/datapath.md explains to
//! operators.

use core::ptr;

use crate::{
    capture::{self, side},
    packet::{Packet, Tables},
    parse::{Parsed, parse},
    proof::{note, renumbered, suspend},
    reason::{Reason, Verdict},
    reception::receive,
    rewrite::{Rewrite, rewrite},
    state::{load, store},
    stream::{Address, Event, MARKS, State, Stream, StreamKey, event, mode, ticks},
    wire::{Be16, Rtp, RtpExtension, Udp},
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
    let bytes = packet.length();
    let pass = |reason| {
        tables.count(reason, bytes);
        Decision::by(reason)
    };
    let parsed = match parse(packet) {
        Ok(parsed) => parsed,
        Err(reason) => return pass(reason),
    };
    let Some(stream) = tables.stream(&parsed.key) else {
        return pass(missed(packet, &parsed, tables));
    };
    // A switch floods, a port mirrors, an interface is promiscuous: the stack ignores such frames,
    // and relaying them would hand the phone everything twice.
    if packet.has_ethernet()
        && parsed.destination_mac != stream.next_hop.source_mac.words()
        && stream.next_hop.known != 0
    {
        return pass(Reason::OtherHost);
    }
    let now = tables.now_precise();
    let (pair, leg) = (stream.pair, stream.leg);
    capture::keep(packet, tables, || now, side::RECEIVED, pair, leg);
    let Passed { reason, up } = match decide(packet, &parsed, stream, now, tables) {
        Ok(()) => {
            tables.count(Reason::Relayed, bytes);
            capture::conclude(packet, tables, Some(Reason::Relayed));
            return Decision::by(Reason::Relayed);
        }
        Err(passed) => passed,
    };
    tables.count(reason, bytes);
    capture::conclude(packet, tables, Some(reason));
    let decision = Decision::by(reason);
    if decision.verdict != Verdict::Pass {
        return decision;
    }
    // The note costs the verifier most, which walks through it for all reasons at once only because
    // nothing depends on the reason any more.
    if !up.state.is_null() {
        note(packet, up.state, up.epoch, up.at, up.length, &up.rtp);
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
    up: Up,
}

/// A packet of a stream that is passed up, which the PBX will most probably forward.
///
/// No `Option`: the compiler would leave its other half undefined and still copy it, which the
/// verifier of Linux 6.1 refuses.
struct Up {
    /// Null where there is nothing to note.
    state: *mut State,
    epoch: u32,
    /// Offset of its RTP header, bytes.
    at: usize,
    /// Bytes of RTP.
    length: usize,
    rtp: Rtp,
}

impl From<Reason> for Passed {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        let up = Up {
            state: ptr::null_mut(),
            epoch: 0,
            at: 0,
            length: 0,
            rtp: Rtp::default(),
        };
        Self { reason, up }
    }
}

/// Decides on a packet that has the address and port of a stream, and came at `now`
/// (`CLOCK_MONOTONIC`, ns).
#[inline(always)]
fn decide<P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed,
    stream: &Stream,
    now: u64,
    tables: &impl Tables,
) -> Result<(), Passed> {
    let state = tables.state(stream.slot).ok_or(Reason::NoState)?;
    let (at, length) = payload(parsed);
    let is_own = parsed.source.is(&stream.source) && parsed.source_port == stream.source_port;
    let rtp = if is_own {
        rtp(packet, at, length)
    } else {
        Err(Reason::UnexpectedSource)
    };
    // Also what is none of the datapath's: a stream that comes back from the PBX would seem to have
    // lost all that the PBX relayed.
    if let Ok(rtp) = &rtp {
        receive(state, now, packet.length(), packet.segments(), rtp);
    }
    if now >= tables.lease() {
        return Err(Reason::LeaseOver.into());
    }
    let epoch = load!(state, epoch);
    let mode = mode::of(epoch, load!(state, proven), load!(state, suspended));
    if mode == mode::SUSPENDED {
        return Err(Reason::Suspended.into());
    }
    let now_ticks = nonzero(ticks(now));
    if !is_own {
        let event = Event {
            kind: event::UNEXPECTED_SOURCE,
            slot: stream.slot,
            epoch,
            address: parsed.source,
            port: parsed.source_port,
            ..Event::at(now)
        };
        report_at_times(state, now_ticks, &event, tables);
        return Err(Reason::UnexpectedSource.into());
    }
    let rtp = match rtp {
        Ok(rtp) => rtp,
        Err(reason) => {
            if reason == Reason::Rtcp {
                store!(state, now_ticks, last_rtcp);
            }
            return Err(reason.into());
        }
    };

    let last_seen = load!(state, last_seen);
    store!(state, now_ticks, last_seen);
    mark(state, parsed.traffic_class >> 2);
    let moment = Moment {
        now_ticks,
        last_seen,
        mode,
    };
    let plan = plan(packet, parsed, stream, state, at, &rtp, &moment);
    let reason = match plan.and_then(|plan| rewrite(packet, parsed, stream, &plan, tables)) {
        Ok(()) => {
            account(state, packet.length());
            return Ok(());
        }
        Err(reason) => reason,
    };
    // What the PBX does with it will tell whether it may be trusted with the next ones.
    store!(state, now_ticks, last_passed);
    let mut passed = Passed::from(reason);
    if stream.proof != 0 {
        if mode == mode::OFFLOADED && is_unanswered(state, reason) {
            suspend(state, epoch);
            // Nobody would see the PBX speak to the other phone then.
            if let Some(opposite) = tables.state(stream.opposite_slot) {
                suspend(opposite, load!(opposite, epoch));
            }
            tables.report(&Event {
                kind: event::ECHO_MISSING,
                slot: stream.slot,
                epoch,
                ..Event::at(now)
            });
        }
        passed.up = Up {
            state,
            epoch,
            at,
            length,
            rtp,
        };
    }
    Err(passed)
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
fn missed<P: Packet + ?Sized>(packet: &mut P, parsed: &Parsed, tables: &impl Tables) -> Reason {
    let port = parsed.key.local_port;
    // RTCP has the next higher, odd port (RFC 3550 section 11).
    let key = if port & 1 == 1 {
        StreamKey::new(parsed.key.local_address, port - 1)
    } else {
        StreamKey::new(Address::unspecified(), port)
    };
    let Some(stream) = tables.stream(&key) else {
        return Reason::NoStream;
    };
    let Some(state) = tables.state(stream.slot) else {
        return Reason::NoState;
    };
    if !parsed.source.is(&stream.source) {
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
            address: parsed.key.local_address,
            port,
            ..Event::at(now)
        };
        report_at_times(state, nonzero(ticks(now)), &event, tables);
    }
    Reason::NoStream
}

/// Offset and length of what the UDP header announces.
#[inline(always)]
pub(crate) fn payload(parsed: &Parsed) -> (usize, usize) {
    // Ethernet pads short frames: what lies past the datagram must not be read as RTP.
    (
        parsed.udp + Udp::LEN,
        usize::from(parsed.udp_length) - Udp::LEN,
    )
}

/// The RTP header of a datagram that is RTP.
#[inline(always)]
pub(crate) fn rtp<P: Packet + ?Sized>(
    packet: &mut P,
    at: usize,
    length: usize,
) -> Result<Rtp, Reason> {
    /// Shortest RTCP packet: an empty receiver report (RFC 3550 section 6.4.2).
    const RTCP_MIN: usize = 8;
    if length < RTCP_MIN {
        return Err(Reason::RtpLength);
    }
    let [first, second] = *packet.header::<[u8; 2]>(at)?;
    if first >> 6 != 2 {
        return Err(Reason::NotRtp);
    }
    // Where it shares the port (RFC 5761 section 4).
    if matches!(second, 192..=223) {
        return Err(Reason::Rtcp);
    }
    if length < Rtp::LEN {
        return Err(Reason::RtpLength);
    }
    Ok(*packet.header::<Rtp>(at)?)
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
fn plan<P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed,
    stream: &Stream,
    state: *mut State,
    at: usize,
    rtp: &Rtp,
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
        let ssrc = u32_of(rtp.ssrc);
        if ssrc != load!(state, ssrc) {
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
    let due = stream.keepalive;
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
fn validate<P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed,
    stream: &Stream,
    state: *mut State,
    at: usize,
    rtp: &Rtp,
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
    // Before its MTU, which is 0 then.
    if stream.next_hop.known == 0 {
        return Err(Reason::NextHopUnknown);
    }
    if parsed.ip_length > usize::from(stream.next_hop.mtu) {
        return Err(Reason::TooBig);
    }
    let depth = usize::from(stream.next_hop.vlan_depth);
    if depth != 0 && depth != parsed.vlan_depth {
        return Err(Reason::VlanMismatch);
    }
    Ok(Rewrite {
        rtp: at,
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
pub(crate) fn u32_of([high, low]: [Be16; 2]) -> u32 {
    u32::from(high.get()) << 16 | u32::from(low.get())
}

/// Counts a packet by the DSCP that it came with.
#[inline(always)]
fn mark(state: *mut State, dscp: u8) {
    let mut index = 0;
    while index < MARKS {
        let packets = load!(state, marks[index].packets);
        if packets == 0 {
            store!(state, dscp, marks[index].dscp);
        }
        if index == MARKS - 1 || load!(state, marks[index].dscp) == dscp {
            store!(state, packets.saturating_add(1), marks[index].packets);
            return;
        }
        index += 1;
    }
}

#[inline(always)]
fn account(state: *mut State, bytes: usize) {
    store!(state, load!(state, packets).wrapping_add(1), packets);
    store!(state, load!(state, bytes).wrapping_add(bytes as u64), bytes);
}
