//! Proof and talk-back: what goes into the PBX, compared with what comes out.
//!
//! The receiver notes a digest of each packet that it passes up. The observer, at the egress, looks
//! each RTP packet of the PBX's up in those notes. docs/proof.md explains it to operators.

use crate::{
    capture::{self, side},
    digest::digest,
    network::Network,
    packet::{Packet, Tables},
    parse::{Link, Parsed, link, parse},
    reason::Reason,
    relay::{is_report_due, lease, nonzero, payload, rtp, u32_of},
    state::{load, store},
    stream::{
        Address, Control, Event, NOTES, PAYLOAD_TYPES, PayloadType, State, Stream, StreamKey,
        event, flag, leg_of, mode, opposite, ticks,
    },
    wire::{Ipv4, Ipv6, Rtp, ethertype},
};

/// How fresh the last packet of a stream is while the stream flows, ticks.
const FLOWING: i32 = ticks(1_000_000_000) as i32;

/// How long the PBX must not have spoken itself on the one leg before the other is offloaded, ticks:
/// ten packets of 20 ms.
const QUIET: i32 = ticks(200_000_000) as i32;

/// In the second byte of RTP.
const MARKER: u8 = 0x80;

/// Ends an offload on the spot.
#[inline(always)]
pub(crate) fn suspend(state: *mut State, epoch: u32) {
    store!(state, epoch, suspended);
}

/// The number that a payload type has on the other leg.
#[inline(always)]
pub(crate) fn renumbered(state: *mut State, payload_type: u8) -> Option<u8> {
    let mut index = 0;
    while index < PAYLOAD_TYPES {
        let entry = load!(state, payload_types[index]);
        if entry.from == payload_type {
            return Some(entry.to);
        }
        index += 1;
    }
    None
}

/// Keeps in mind a packet that is passed up, for as long as the epoch lasts: what was noted in an
/// earlier one may have come out while nobody looked, and must not be taken for an echo then.
///
/// One too long for a digest, or merged of several, is counted all the same: it will not come out as
/// anything known, and the stream waits for what follows it.
#[inline(always)]
pub(crate) fn note<P: Packet + ?Sized>(
    packet: &mut P,
    state: *mut State,
    epoch: u32,
    at: usize,
    length: usize,
) {
    let Ok(rtp) = packet.header::<Rtp>(at).copied() else {
        return;
    };
    let noted = load!(state, noted);
    let digest = if packet.is_aggregate() {
        None
    } else {
        packet.pull(at + length);
        digest(packet, at, length, epoch)
    };
    let digest = digest.unwrap_or(0);
    let index = noted as usize & (NOTES - 1);
    store!(state, digest | u64::from(rtp.marker_type), notes[index]);
    store!(state, rtp, heard);
    store!(state, length as u16, heard_length);
    store!(state, u32_of(rtp.ssrc), ssrc);
    store!(state, noted.wrapping_add(1), noted);
}

/// Looks at a packet that leaves the host, and draws the conclusions. None: it is no RTP of a
/// stream that is watched or offloaded.
#[inline(always)]
pub fn observe<P: Packet + ?Sized>(packet: &mut P, tables: &impl Tables) -> Option<Reason> {
    let link = link(packet).ok()?;
    match link.kind {
        ethertype::IPV4 => observe_by::<Ipv4, P>(packet, &link, tables),
        ethertype::IPV6 => observe_by::<Ipv6, P>(packet, &link, tables),
        _ => None,
    }
}

/// The same for a packet of one network protocol.
#[inline(always)]
fn observe_by<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    link: &Link,
    tables: &impl Tables,
) -> Option<Reason> {
    let bytes = packet.length();
    let parsed = parse::<N, P>(packet, link).ok()?;
    let key = parsed.source();
    let to = (N::address(parsed.destination), parsed.destination_port);
    let Some(back) = back_of(&key, tables) else {
        sent_from(&key, to, tables);
        return None;
    };
    let control = tables.control()?;
    let now = || tables.now_precise();
    capture::keep(packet, tables, control, now, side::PBX, || {
        (u64::from(back.pair), leg_of(opposite(back.slot)))
    });
    let reason = judge(packet, &parsed, to, back, control, tables);
    if let Some(reason) = reason {
        tables.count(reason, bytes);
    }
    capture::conclude(packet, tables, control, reason);
    reason
}

/// The stream that comes in on the leg that the PBX sends on from an address and port: its opposite
/// leaves there, and awaits proof.
#[inline(always)]
fn back_of<'a>(key: &StreamKey, tables: &'a impl Tables) -> Option<&'a Stream> {
    match tables.stream(key) {
        Some(back) if back.proof != 0 && back.flags & flag::SENDS_ELSEWHERE == 0 => Some(back),
        _ => tables
            .stream(&StreamKey::sends(key.local_address, key.local_port))
            .filter(|back| back.proof != 0),
    }
}

/// Judges a packet that comes from an address and port of the PBX that the opposite of `back` leaves by.
#[inline(always)]
fn judge<N: Network, P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed<N>,
    to: (Address, u16),
    back: &Stream,
    control: *const Control,
    tables: &impl Tables,
) -> Option<Reason> {
    let slot = opposite(back.slot);
    let state = tables.state(slot)?;
    let now = tables.now();
    if now >= lease(control) {
        return None;
    }
    let (at, length) = payload(parsed);
    packet.pull(at + length);
    // RTCP, STUN and DTLS are the PBX's own business.
    let rtp = *rtp(packet, at, length).ok()?;
    let now_ticks = nonzero(ticks(now));
    let epoch = load!(state, epoch);
    if epoch == 0 || load!(state, suspended) == epoch {
        speak_on(state, now_ticks);
        return None;
    }
    if load!(state, watched) != epoch {
        begin(state, epoch);
    }

    let state_back = tables.state(back.slot)?;
    let expected = to.0.is(&back.source) && to.1 == back.source_port;
    if expected
        && let Some(digest) = digest(packet, at, length, epoch)
        && let Some((number, from)) = recall(state, digest)
        && let Some(learned) = learn(state, number, from, rtp.marker_type)
    {
        if let Learned::Equal(payload_type, equal) = learned
            && equal >= u16::from(back.proof)
            && is_quiet(state_back, now_ticks)
            && append(state, payload_type)
        {
            store!(state, epoch, proven);
            tables.report(&Event {
                kind: event::PROVEN,
                slot,
                epoch,
                payload_type,
                ..Event::at(now)
            });
        }
        return Some(Reason::Echo);
    }

    store!(state, 0, equal);
    // Not before the digest, which the verifier walks once for every mode otherwise.
    let mode = mode::of(epoch, load!(state, proven), load!(state, suspended));
    if mode == mode::OFFLOADED && is_keepalive(&rtp, length) {
        // Asterisk sends it because it has not sent for a while. Where the stream flows it has only
        // not seen it flow, and a number out of sequence would confuse the phone. Where the phone
        // at the other end is silent, it would have sent this without us too.
        // The receiver may have seen a packet since the clock was read: below 0, then.
        let age = now_ticks.wrapping_sub(load!(state, last_seen)) as i32;
        return (age < FLOWING).then_some(Reason::ComfortNoise);
    }
    store!(state, rtp, sent);
    store!(state, length as u16, sent_length);
    store!(state, load!(state, unequal).wrapping_add(1), unequal);
    if mode == mode::WATCHING && !is_unprompted(state, &rtp, length, now_ticks) {
        speak_on(state, now_ticks);
        return Some(Reason::Unequal);
    }
    store!(state, now_ticks, spoken);
    suspend(state, epoch);
    // Where the PBX has begun to speak, it may also have begun to listen.
    suspend(state_back, load!(state_back, epoch));
    tables.report(&Event {
        kind: event::TALK_BACK,
        slot,
        epoch,
        address: to.0,
        port: to.1,
        payload_type: PayloadType {
            from: PayloadType::UNUSED.from,
            to: rtp.marker_type & !MARKER,
        },
        ..Event::at(now)
    });
    Some(Reason::TalkBack)
}

/// The PBX may send from another address than assumed.
#[inline(always)]
fn sent_from(key: &StreamKey, to: (Address, u16), tables: &impl Tables) {
    let any = StreamKey::new(Address::unspecified(), key.local_port);
    let Some(back) = tables.stream(&any) else {
        return;
    };
    let slot = opposite(back.slot);
    let Some(state) = tables.state(slot) else {
        return;
    };
    let now = tables.now();
    let now_ticks = nonzero(ticks(now));
    if to.0.is(&back.source)
        && to.1 == back.source_port
        && is_report_due(load!(state, sent_reported), now_ticks)
    {
        store!(state, now_ticks, sent_reported);
        tables.report(&Event {
            kind: event::SENT_FROM,
            slot,
            epoch: load!(state, epoch),
            address: key.local_address,
            port: key.local_port,
            ..Event::at(now)
        });
    }
}

/// A new round of proof: what the last one taught is not proven any more.
#[inline(always)]
fn begin(state: *mut State, epoch: u32) {
    store!(state, [PayloadType::UNUSED; PAYLOAD_TYPES], payload_types);
    store!(state, PayloadType::UNUSED, trial);
    store!(state, 0, equal);
    store!(state, 0, unequal);
    store!(state, epoch, watched);
}

/// Finds the note of a packet and strikes it out: its number, counted as in [`State::noted`], and
/// its marker and payload type.
#[inline(always)]
fn recall(state: *mut State, digest: u64) -> Option<(u32, u8)> {
    let noted = load!(state, noted);
    let mut index = 0;
    while index < NOTES {
        let note = load!(state, notes[index]);
        if (note ^ digest) >> 8 == 0 {
            store!(state, 0, notes[index]);
            let last = noted.wrapping_sub(1);
            let age = last.wrapping_sub(index as u32) & (NOTES as u32 - 1);
            return Some((noted.wrapping_sub(age), note as u8));
        }
        index += 1;
    }
    None
}

/// Whether the PBX has not spoken itself for a while on the leg that a stream leaves by: it has from
/// a talk-back on, as long as what follows is no echo.
///
/// Asterisk sends the packets of a digit of its own whenever it hears the phone that listens to it:
/// were that phone's stream offloaded, the digit would come to a halt.
#[inline(always)]
fn is_quiet(state: *mut State, now_ticks: u32) -> bool {
    let spoken = load!(state, spoken);
    spoken == 0 || now_ticks.wrapping_sub(spoken) as i32 >= QUIET
}

/// The PBX, if it was speaking on this leg, still does.
#[inline(always)]
fn speak_on(state: *mut State, now_ticks: u32) {
    if !is_quiet(state, now_ticks) {
        store!(state, now_ticks, spoken);
    }
}

/// Whether the PBX sends RTP on a leg while there is nothing to forward there, as it does with music
/// and digits to a phone whose other end is silent. Its keepalive says nothing.
#[inline(always)]
fn is_unprompted(state: *mut State, rtp: &Rtp, length: usize, now_ticks: u32) -> bool {
    let seen = load!(state, last_seen);
    !is_keepalive(rtp, length) && (seen == 0 || now_ticks.wrapping_sub(seen) as i32 >= QUIET)
}

/// What an echo teaches.
enum Learned {
    /// Nothing new.
    Nothing,
    /// So many packets in a row, up to this one, came out equal with this payload type.
    Equal(PayloadType, u16),
}

/// Draws the conclusions from a packet that came out equal but for its marker and payload type.
/// None: those contradict what is known.
#[inline(always)]
fn learn(state: *mut State, number: u32, from: u8, to: u8) -> Option<Learned> {
    // Asterisk sets a marker on the first packet that it forwards. It takes none away.
    let marked = to & MARKER != from & MARKER;
    if marked && from & MARKER != 0 {
        return None;
    }
    let payload_type = PayloadType {
        from: from & !MARKER,
        to: to & !MARKER,
    };
    let known = renumbered(state, payload_type.from);
    if known.is_some_and(|known| known != payload_type.to) {
        return None;
    }
    let echoed = load!(state, echoed);
    // What is missing ends every row: it may have been of the payload type that is being proven.
    if number != echoed.wrapping_add(1) {
        store!(state, 0, equal);
    }
    // Late, it has been overtaken already.
    if number.wrapping_sub(echoed) as i32 <= 0 {
        return Some(Learned::Nothing);
    }
    store!(state, number, echoed);
    if known.is_some() {
        return Some(Learned::Nothing);
    }
    if marked {
        store!(state, 0, equal);
        return Some(Learned::Nothing);
    }
    let trial = load!(state, trial);
    let mut equal = 1;
    if trial.from == payload_type.from && trial.to == payload_type.to {
        equal = load!(state, equal).saturating_add(1);
    }
    store!(state, payload_type, trial);
    store!(state, equal, equal);
    Some(Learned::Equal(payload_type, equal))
}

/// Adds a payload type to those that are relayed; `false` when there is no room.
#[inline(always)]
fn append(state: *mut State, payload_type: PayloadType) -> bool {
    let mut index = 0;
    while index < PAYLOAD_TYPES {
        if load!(state, payload_types[index]).from == PayloadType::UNUSED.from {
            store!(state, payload_type, payload_types[index]);
            return true;
        }
        index += 1;
    }
    false
}

/// Asterisk's `rtp_keepalive`: comfort noise (RFC 3389) of one byte, its level.
#[inline(always)]
const fn is_keepalive(rtp: &Rtp, length: usize) -> bool {
    const COMFORT_NOISE: u8 = 13;
    rtp.marker_type & !MARKER == COMFORT_NOISE && length == Rtp::LEN + 1
}
