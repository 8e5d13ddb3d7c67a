//! The decision on one packet, in the order that docs/datapath.md explains to operators.

use crate::{
    packet::{Packet, Tables},
    parse::{Parsed, parse},
    reason::Reason,
    rewrite::{Rewrite, rewrite},
    stream::{PAYLOAD_TYPES, State, Stream, mode},
    wire::{Rtp, RtpExtension, Udp},
};

/// Decides on a packet, rewrites it when it is to be sent, and accounts for it.
///
/// A packet is either rewritten whole or not touched at all.
#[inline(always)]
pub fn relay<P: Packet + ?Sized>(packet: &mut P, tables: &impl Tables) -> Reason {
    let bytes = packet.length();
    let reason = match decide(packet, tables) {
        Ok(state) => {
            account(state, bytes);
            Reason::Relayed
        }
        Err(reason) => reason,
    };
    tables.count(reason, bytes);
    reason
}

#[inline(always)]
fn decide<P: Packet + ?Sized>(packet: &mut P, tables: &impl Tables) -> Result<*mut State, Reason> {
    let parsed = parse(packet)?;
    let stream = tables.stream(&parsed.key).ok_or(Reason::NoStream)?;
    // A switch floods, a port mirrors, an interface is promiscuous: the stack ignores such frames,
    // and relaying them would hand the phone everything twice.
    if parsed.destination_mac != stream.next_hop.source_mac.words() && stream.next_hop.known != 0 {
        return Err(Reason::OtherHost);
    }
    let state = tables.state(stream.slot).ok_or(Reason::NoState)?;
    // SAFETY: `Tables::state` points into a map that outlives the packet. The controller stores
    // the mode from another CPU, hence volatile; an aligned word cannot tear.
    match unsafe { (&raw const (*state).mode).read_volatile() } {
        mode::OFFLOADED => {}
        mode::SUSPENDED => return Err(Reason::Suspended),
        _ => return Err(Reason::Watching),
    }
    let rewrite_plan = validate(packet, &parsed, stream)?;
    rewrite(packet, &parsed, stream, &rewrite_plan)?;
    Ok(state)
}

/// Everything about the packet that could make it Asterisk's, before a byte of it changes.
#[inline(always)]
fn validate<P: Packet + ?Sized>(
    packet: &mut P,
    parsed: &Parsed,
    stream: &Stream,
) -> Result<Rewrite, Reason> {
    if !parsed.source.is(&stream.source) || parsed.source_port != stream.source_port {
        return Err(Reason::UnexpectedSource);
    }
    let at = parsed.udp + Udp::LEN;
    let length = usize::from(parsed.udp_length) - Udp::LEN;
    // Ethernet pads short frames: what lies past the datagram must not be read as RTP.
    if length < Rtp::LEN {
        return Err(Reason::RtpLength);
    }
    let rtp = *packet.header::<Rtp>(at)?;
    if rtp.version_count >> 6 != 2 {
        return Err(Reason::NotRtp);
    }
    const PADDING: u8 = 0x20;
    // ast_rtp_interpret() in res_rtp_asterisk.c shortens the packet and leaves the bit set.
    if rtp.version_count & PADDING != 0 {
        return Err(Reason::RtpPadding);
    }
    if length < rtp_header_length(packet, at, length, rtp.version_count)? {
        return Err(Reason::RtpLength);
    }
    let payload_type = rtp.marker_type & 0x7f;
    let new_payload_type = renumbered(stream, payload_type).ok_or(Reason::PayloadType)?;
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

/// The number that a payload type has on the other leg.
#[inline(always)]
fn renumbered(stream: &Stream, payload_type: u8) -> Option<u8> {
    let mut index = 0;
    while index < PAYLOAD_TYPES {
        let entry = stream.payload_types[index];
        if entry.from == payload_type {
            return Some(entry.to);
        }
        index += 1;
    }
    None
}

#[inline(always)]
fn account(state: *mut State, bytes: usize) {
    // SAFETY: `Tables::state` points into a map that outlives the packet; each counter is an
    // aligned word of its own. See `State` for why this is not atomic.
    unsafe {
        (*state).packets = (*state).packets.wrapping_add(1);
        (*state).bytes = (*state).bytes.wrapping_add(bytes as u64);
    }
}
