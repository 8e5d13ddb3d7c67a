//! What the datapath says of rare things, for whoever debugs it: only in objects that are built with the
//! feature `log`. Never called for an ordinary packet.

use aya_log_ebpf::{info, warn};
use relay_common::{
    reason::Reason,
    stream::{Event, event},
};

/// What the daemon's log knows these messages by.
const TARGET: &str = "relay_user::datapath";

/// Tells of an event. A function of its own, so that the programs hold its code once.
#[inline(never)]
pub(crate) fn event(told: &Event) {
    let (slot, port) = (told.slot, told.port);
    let (from, to) = (told.payload_type.from, told.payload_type.to);
    match told.kind {
        event::PROVEN => {
            info!((), target: TARGET, "slot {}: payload type {} is proven, renumbered {}", slot, from, to);
        }
        event::TALK_BACK => {
            warn!((), target: TARGET, "slot {}: suspended, the PBX sent RTP itself, payload type {}", slot, to);
        }
        // The daemon tells of it: the verifier would walk through a message once for each reason that a
        // packet can be passed for, and give up.
        event::ECHO_MISSING => {}
        event::UNEXPECTED_SOURCE => {
            let address = told.address.bytes;
            warn!((), target: TARGET, "slot {}: a packet came from {:i}, port {}", slot, address, port);
        }
        kind => info!((), target: TARGET, "slot {}: event {}", slot, kind),
    }
}

/// Tells of a fault that takes a packet.
#[inline(always)]
pub(crate) fn reason(reason: Reason) {
    if matches!(reason, Reason::RetagFailed | Reason::NoState) {
        fault(reason as u32);
    }
}

#[inline(never)]
fn fault(reason: u32) {
    warn!((), target: TARGET, "a packet met reason {}", reason);
}
