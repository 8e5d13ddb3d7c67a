//! What suite `program` measures: programs, and a packet for each.

use anyhow::{Result, ensure};
use relay_common::{
    reason::Reason,
    reception::Reception,
    stream::{DSCP_EF, Endpoint, State, StreamSpec, VlanTag, ticks},
};
use relay_tests::{
    draft::{Draft, VLAN},
    fixture::{self, Family, Hook},
    program::{EXIT, Instruction, set},
    tables::Entry,
};

use crate::{
    interpreter::{self, Trace},
    peer::swap::{XDP_TX, swap_macs},
    program::part::Part,
};

/// Runs in one call. A packet of TTL 255 can be relayed that often.
pub(super) const REPEAT: u32 = 240;

/// The floor of all.
pub(super) const RETURN: &str = "return XDP_TX";

/// The floor and what a precise clock costs.
pub(super) const CLOCK: &str = "read the precise clock";

/// The floor and what it costs to find a stream.
pub(super) const LOOKUP: &str = "look a stream up";

/// The floor that matters: a packet cannot be sent back with less.
pub(crate) const SWAP: &str = "swap MACs, XDP_TX";

/// What is measured: a program on a packet.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) subject: Subject,
    pub(super) frame: Vec<u8>,
    /// The frame after all runs.
    pub(super) after: Vec<u8>,
}

pub(super) enum Subject {
    /// One that does as little as can be.
    Floor(Vec<Instruction>),
    /// A part of ours.
    Part(Part),
    /// Ours.
    Relay(Box<Relay>),
}

/// The datapath, a stream that it knows, and what it must find the packet to be.
#[derive(Clone)]
pub(super) struct Relay {
    pub(super) hook: Hook,
    pub(super) entry: Entry,
    pub(super) reason: Reason,
    /// Whether the packet is captured, as received and as sent.
    pub(super) is_captured: bool,
}

/// All, the floors first.
pub(super) fn cases() -> Vec<Case> {
    let voice = fixture::cycle(Family::V4).1.bytes();
    let floors = [
        (RETURN, Subject::Floor(vec![set(0, XDP_TX), EXIT])),
        (SWAP, Subject::Floor(swap_macs())),
        (CLOCK, Subject::Part(Part::Clock)),
        (
            LOOKUP,
            Subject::Part(Part::Lookup(fixture::cycle(Family::V4).0.key())),
        ),
    ];
    let mut cases: Vec<_> = floors
        .into_iter()
        .map(|(name, subject)| Case {
            name: name.to_owned(),
            subject,
            frame: voice.clone(),
            // An even number of swaps.
            after: voice.clone(),
        })
        .collect();
    for hook in [Hook::NativeXdp, Hook::Tc] {
        let all = packets().into_iter().map(|it| (it, false));
        let captured = packets().into_iter().take(1).map(|it| (it, true));
        for ((name, entry, packet, reason), is_captured) in all.chain(captured) {
            let hook_name = if hook == Hook::Tc { "TC" } else { "XDP" };
            let captured = if is_captured { ", captured" } else { "" };
            let mut after = packet.clone();
            if reason == Reason::Relayed {
                after.hop_limit -= REPEAT as u8;
            }
            cases.push(Case {
                name: format!("{hook_name}, {name}{captured}"),
                subject: Subject::Relay(Box::new(Relay {
                    hook,
                    entry,
                    reason,
                    is_captured,
                })),
                frame: packet.bytes(),
                after: after.bytes(),
            });
        }
    }
    cases
}

/// Streams, a packet for each, and what becomes of it. The first is the ordinary one.
fn packets() -> Vec<(&'static str, Entry, Draft, Reason)> {
    let (stream, packet) = fixture::cycle(Family::V4);
    let entry = fixture::offloaded(stream);
    let (stream_v6, packet_v6) = fixture::cycle(Family::V6);
    let mut stream_vlan = stream;
    stream_vlan.next_hop.vlans[0] = VlanTag::new(VLAN, 100);
    let tags = vec![(VLAN, 0xa000 | 100)];
    let mut elsewhere = stream;
    elsewhere.local.port += 2;
    let mut stranger = stream;
    stranger.source = Endpoint {
        port: stream.source.port + 1,
        ..stream.source
    };
    let proven = |stream| fixture::offloaded(StreamSpec { proof: 8, ..stream });
    vec![
        (
            "relayed, IPv4",
            proven(stream),
            packet.clone(),
            Reason::Relayed,
        ),
        (
            "relayed without proof, IPv4",
            entry,
            packet.clone(),
            Reason::Relayed,
        ),
        (
            "relayed, IPv6",
            proven(stream_v6),
            packet_v6,
            Reason::Relayed,
        ),
        (
            "relayed, IPv4 in a VLAN",
            proven(stream_vlan),
            Draft {
                tags,
                ..packet.clone()
            },
            Reason::Relayed,
        ),
        (
            "no stream",
            fixture::offloaded(elsewhere),
            packet.clone(),
            Reason::NoStream,
        ),
        (
            "not UDP",
            entry,
            Draft {
                protocol: 6,
                ..packet.clone()
            },
            Reason::NotUdp,
        ),
        (
            "wrong source",
            fixture::offloaded(stranger),
            packet.clone(),
            Reason::UnexpectedSource,
        ),
        (
            "watching",
            fixture::watching(proven(stream).stream),
            packet.clone(),
            Reason::Watching,
        ),
        (
            "suspended",
            fixture::suspended(proven(stream).stream),
            packet,
            Reason::Suspended,
        ),
    ]
}

/// The state of a stream of which packets come one after the other, 20 ms of voice each, the last one just now (ns).
pub(crate) fn flowing(entry: &Entry, now: u64) -> State {
    const SPACING: u64 = 20_000_000;
    let reception = Reception {
        arrival: now - SPACING,
        packets: 100,
        source: fixture::SSRC,
        timestamp: fixture::TIMESTAMP - 160,
        first: 1 << 16,
        highest: 1 << 16 | u32::from(fixture::SEQUENCE - 1),
        window: u64::MAX,
        types: [0, 0xff, 0xff, 0xff],
        payload_type: 0,
        dscp: DSCP_EF,
        ..Reception::default()
    };
    State {
        last_seen: ticks(now),
        last_passed: ticks(now),
        reception,
        ..entry.state
    }
}

impl Case {
    /// Runs it once in the interpreter. None where what matters is the kernel's: its functions alone, and the ring
    /// buffer of what is captured.
    ///
    /// # Errors
    /// The verdict is another one than the case is about.
    pub(super) fn trace(&self) -> Result<Option<Trace>> {
        /// Any time will do, ns.
        const NOW: u64 = 3_600_000_000_000;
        let (trace, verdict) = match &self.subject {
            Subject::Floor(program) => (
                interpreter::trace_alone(program, &self.frame)?,
                XDP_TX as u32,
            ),
            Subject::Part(_) => return Ok(None),
            Subject::Relay(relay) if relay.is_captured => return Ok(None),
            Subject::Relay(relay) => {
                let Relay {
                    hook,
                    entry,
                    reason,
                    ..
                } = &**relay;
                let state = flowing(entry, NOW);
                let entry = Entry { state, ..*entry };
                let trace = interpreter::trace(*hook, entry, &self.frame, NOW)?;
                let verdict = match (hook, *reason == Reason::Relayed) {
                    (Hook::NativeXdp | Hook::GenericXdp, true) => 3,
                    (Hook::NativeXdp | Hook::GenericXdp, false) => 2,
                    (Hook::Tc, true) => 7,
                    (Hook::Tc, false) => u32::MAX,
                };
                (trace, verdict)
            }
        };
        ensure!(
            trace.verdict == verdict,
            "{}: traced to {}",
            self.name,
            trace.verdict
        );
        Ok(Some(trace))
    }
}
