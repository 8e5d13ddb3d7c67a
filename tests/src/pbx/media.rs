//! RTP between the two legs of a call, in a thread of its own, as Asterisk does it: one wake-up for each packet.

use std::{
    net::UdpSocket,
    os::fd::AsFd as _,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};

use super::call::{Call, Side, Technology};

/// Time from the bridge to native RTP.
const NATIVE_AFTER: Duration = Duration::from_millis(10);

/// Length of an RTP header without CSRCs and extension: phones send no others.
const HEADER: usize = 12;

/// SSRC and sequence that the PBX gives a stream while the bridge is not native.
#[derive(Clone, Copy, Debug)]
struct Own {
    ssrc: u32,
    sequence: u16,
}

/// Forwards until `stop` is readable; calls `native` once, when the bridge shall turn native.
pub(super) fn forward(
    call: &Call,
    sockets: &[UdpSocket; 2],
    stop: &EventFd,
    native: impl FnOnce(),
) -> Result<()> {
    let sides = [(Side::Caller, Side::Callee), (Side::Callee, Side::Caller)];
    let mut own = [
        Own {
            ssrc: 0x7062_7800,
            sequence: 1,
        },
        Own {
            ssrc: 0x7062_7801,
            sequence: 1,
        },
    ];
    let deadline = Instant::now() + NATIVE_AFTER;
    let mut native = Some(native);
    let mut buffer = [0; 2048];
    loop {
        let timeout = match native {
            // Rounded up: poll counts in whole milliseconds.
            Some(_) => PollTimeout::from(
                (deadline
                    .saturating_duration_since(Instant::now())
                    .as_millis()
                    + 1) as u16,
            ),
            None => PollTimeout::NONE,
        };
        let mut set = [sockets[0].as_fd(), sockets[1].as_fd(), stop.as_fd()]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut set, timeout).context("poll")?;
        let ready = set.map(|fd| fd.any().unwrap_or(true));
        if ready[2] {
            return Ok(());
        }
        if Instant::now() >= deadline
            && let Some(native) = native.take()
        {
            native();
        }
        for (number, (side, peer)) in sides
            .into_iter()
            .enumerate()
            .filter(|(number, _)| ready[*number])
        {
            let (channel, peer) = (call.channel(side), call.channel(peer));
            let (len, source) = sockets[number]
                .recv_from(&mut buffer)
                .context("receive RTP")?;
            channel.received.fetch_add(1, Ordering::Relaxed);
            // As `strictrtp=yes`: media of strangers goes nowhere.
            if source.ip() != channel.remote.ip()
                || source.port() != channel.remote.port()
                || len < HEADER
            {
                continue;
            }
            let packet = &mut buffer[..len];
            if call.technology() == Technology::Simple {
                let own = &mut own[number];
                packet[2..4].copy_from_slice(&own.sequence.to_be_bytes());
                packet[8..12].copy_from_slice(&own.ssrc.to_be_bytes());
                own.sequence = own.sequence.wrapping_add(1);
            }
            if side == Side::Caller && call.transcoded.load(Ordering::Relaxed) {
                // What A-law does to the idle pattern; any reversible change will do.
                packet[HEADER..].iter_mut().for_each(|byte| *byte ^= 0x55);
            }
            // A phone that is gone does not end the call; SIP does.
            if sockets[1 - number].send_to(packet, peer.remote).is_ok() {
                channel.forwarded.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
