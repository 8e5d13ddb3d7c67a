//! The per-packet decision on the host: the fixtures, and what holds for every packet.

use proptest::prelude::*;
use relay_common::{
    capture::{Capture, Captured, SNAP_MAX, side},
    packet::Frame,
    reason::Reason,
    relay::relay,
    stream::{Counter, PayloadType, State, VlanTag, event},
};
use relay_tests::{
    draft::{Draft, VLAN},
    fixture::{
        self, Family, Hook, SECOND, SLOTS, ago, proven, received, stream, suspended, taken_back,
        watching,
    },
    generator::Generator,
    tables::{Entry, MemoryTables, NOW, RANDOM},
};

/// Decides on a frame, alone.
fn decide(frame: &[u8], streams: &[Entry], hook: Hook) -> (Reason, Vec<u8>, MemoryTables) {
    decide_by(frame, MemoryTables::new(streams, SLOTS), hook)
}

fn decide_by(frame: &[u8], tables: MemoryTables, hook: Hook) -> (Reason, Vec<u8>, MemoryTables) {
    let mut after = frame.to_vec();
    let decision = relay(
        &mut Frame::new(&mut after, hook.partial_checksum()),
        &tables,
    );
    (decision.reason, after, tables)
}

/// What must have been counted after one frame: its reason, and the stream's state where it was relayed.
fn assert_accounted(frame: &[u8], streams: &[Entry], reason: Reason, tables: &MemoryTables) {
    for (number, counter) in tables.counters().into_iter().enumerate() {
        let expected = if number == reason as usize {
            Counter {
                packets: 1,
                bytes: frame.len() as u64,
            }
        } else {
            Counter::default()
        };
        assert_eq!(counter, expected, "{}", Reason::ALL[number].name());
    }
    let mut relayed = (0, 0);
    for state in streams
        .iter()
        .filter_map(|entry| tables.state_of(entry.stream.slot))
    {
        relayed.0 += state.packets;
        relayed.1 += state.bytes;
    }
    let expected = if reason == Reason::Relayed {
        (1, frame.len() as u64)
    } else {
        (0, 0)
    };
    assert_eq!(relayed, expected);
}

#[test]
fn fixtures() {
    for fixture in fixture::all() {
        // TC's own way with checksums is the kernel's: `kernel.rs` has it.
        for hook in [Hook::NativeXdp, Hook::GenericXdp] {
            let tables = MemoryTables::new(&fixture.streams, SLOTS);
            tables.set_lease(fixture.lease);
            let (reason, after, tables) = decide_by(&fixture.frame, tables, hook);
            let expected = fixture.expected(hook).expect("XDP sees every packet");
            let what = format!("{} ({hook:?})", fixture.description);
            assert_eq!((reason, &after[..]), expected, "{what}");
            assert_accounted(&fixture.frame, &fixture.streams, reason, &tables);
        }
    }
}

/// Everything is captured, whole.
const EVERYTHING: Capture = Capture {
    until: u64::MAX,
    pair: 0,
    snap: SNAP_MAX as u32,
    sample: u32::MAX,
    process: 0,
    padding: [0; 4],
};

/// What is captured of a packet while it is decided on.
fn captured(frame: &[u8], streams: &[Entry], capture: Capture) -> Vec<(Captured, Vec<u8>)> {
    let tables = MemoryTables::new(streams, SLOTS);
    tables.set_capture(capture);
    let (.., tables) = decide_by(frame, tables, Hook::NativeXdp);
    tables.take_captured()
}

#[test]
fn a_capture_has_every_packet_of_a_stream_with_the_reason_and_changes_nothing() {
    for fixture in fixture::all() {
        let tables = MemoryTables::new(&fixture.streams, SLOTS);
        tables.set_lease(fixture.lease);
        tables.set_capture(EVERYTHING);
        let (reason, after, tables) = decide_by(&fixture.frame, tables, Hook::NativeXdp);
        let what = &fixture.description;
        let expected = fixture.expected(Hook::NativeXdp);
        assert_eq!(Some((reason, &after[..])), expected, "{what}");
        assert_accounted(&fixture.frame, &fixture.streams, reason, &tables);

        let captured = tables.take_captured();
        for (header, _) in &captured {
            assert_eq!(header.reason, reason as u32, "{what}");
        }
        let captured: Vec<_> = captured
            .iter()
            .map(|(header, bytes)| (header.side, header.length as usize, &bytes[..]))
            .collect();
        let received = (
            side::RECEIVED,
            fixture.frame.len(),
            &fixture.frame[..fixture.frame.len().min(SNAP_MAX)],
        );
        let sent = (side::SENT, after.len(), &after[..after.len().min(SNAP_MAX)]);
        match reason {
            Reason::Relayed => assert_eq!(captured, [received, sent], "{what}"),
            Reason::Truncated if captured.is_empty() => {}
            Reason::NotIp
            | Reason::VlanDepth
            | Reason::Malformed
            | Reason::IpOptions
            | Reason::Fragment
            | Reason::NotUdp
            | Reason::NoStream
            | Reason::OtherHost => assert_eq!(captured, [], "{what}"),
            Reason::Rtcp if captured.is_empty() => {}
            _ => assert_eq!(captured, [received], "{what}"),
        }
    }
}

#[test]
fn what_is_not_asked_for_is_not_captured() {
    let (frame, entry) = (
        received(Family::V4).bytes(),
        fixture::offloaded(stream(Family::V4)),
    );
    let pair = u64::from(entry.stream.pair);
    let copies = |capture| captured(&frame, &[entry], capture).len();
    assert_eq!(copies(Capture { pair, ..EVERYTHING }), 2);
    assert_eq!(
        copies(Capture {
            sample: RANDOM,
            ..EVERYTHING
        }),
        2
    );
    for capture in [
        Capture::default(),
        Capture {
            until: NOW,
            ..EVERYTHING
        },
        Capture {
            pair: pair + 1,
            ..EVERYTHING
        },
        Capture {
            sample: RANDOM - 1,
            ..EVERYTHING
        },
    ] {
        assert_eq!(copies(capture), 0, "{capture:?}");
    }
    let short = captured(
        &frame,
        &[entry],
        Capture {
            snap: 40,
            ..EVERYTHING
        },
    );
    for (header, bytes) in short {
        assert_eq!((header.length as usize, bytes.len()), (frame.len(), 40));
    }
}

/// A packet and what it meets, with a fault more.
type Fault = fn(&mut Draft, &mut Entry, &mut u64);

/// Everything that may be against relaying a packet, in the order in which it is told.
const FAULTS: [(Reason, Fault); 18] = [
    (Reason::OtherHost, |draft, _, _| {
        draft.destination_mac[5] ^= 1;
    }),
    (Reason::LeaseOver, |_, _, lease| *lease = 1),
    (Reason::Suspended, |_, entry, _| {
        entry.state.suspended = entry.state.epoch;
    }),
    (Reason::UnexpectedSource, |draft, _, _| {
        draft.source.set_port(1);
    }),
    (Reason::NotRtp, |draft, _, _| draft.payload[0] &= 0x3f),
    (Reason::Rtcp, |draft, _, _| draft.payload[1] = 200),
    (Reason::Watching, |_, entry, _| entry.state.proven = 0),
    (Reason::RtpPadding, |draft, _, _| draft.payload[0] |= 0x20),
    (Reason::RtpLength, |draft, _, _| {
        draft.payload[0] |= 0x10;
        draft.payload[14] = 0xff;
    }),
    (Reason::PayloadType, |_, entry, _| {
        entry.state.payload_types[0] = PayloadType::UNUSED;
    }),
    (Reason::HopLimit, |draft, _, _| draft.hop_limit = 1),
    (Reason::TooBig, |_, entry, _| {
        entry.stream.next_hop.mtu = 100;
    }),
    (Reason::VlanMismatch, |_, entry, _| {
        entry.stream.next_hop.vlans[0] = VlanTag::new(VLAN, 100);
    }),
    (Reason::Keepalive, |_, entry, _| entry.stream.keepalive = 1),
    (Reason::NewSsrc, |_, entry, _| entry.state.ssrc += 1),
    (Reason::AfterPause, |_, entry, _| entry.state.last_seen = 0),
    (Reason::AwaitingEcho, |_, entry, _| entry.state.noted += 1),
    (Reason::UdpChecksum, |draft, _, _| {
        *draft = draft.clone().made_ambiguous();
    }),
];

/// A packet of a proven stream with some faults.
fn with(faults: &[(Reason, Fault)]) -> (Reason, State) {
    let mut draft = received(Family::V4);
    let mut entry = proven(stream(Family::V4));
    let mut lease = u64::MAX;
    for (_, fault) in faults {
        fault(&mut draft, &mut entry, &mut lease);
    }
    let tables = MemoryTables::new(&[entry], SLOTS);
    tables.set_lease(lease);
    let (reason, _, tables) = decide_by(&draft.bytes(), tables, Hook::NativeXdp);
    (reason, tables.state_of(entry.stream.slot).expect("a state"))
}

#[test]
fn the_first_reason_is_told() {
    for (index, (reason, _)) in FAULTS.iter().enumerate() {
        assert_eq!(with(&FAULTS[index..=index]).0, *reason, "alone");
        assert_eq!(with(&FAULTS[index..]).0, *reason, "with all behind it");
    }
    assert_eq!(with(&[]).0, Reason::Relayed);
}

/// What the phone sends counts as seen; what the PBX gets of it as passed, and noted.
#[test]
fn a_state_tells_when_the_phone_was_seen_and_by_whom() {
    let before = proven(stream(Family::V4)).state;
    let now = ago(0);
    for (reason, fault) in FAULTS {
        let (_, state) = with(&[(reason, fault)]);
        let is_phones = !matches!(
            reason,
            Reason::OtherHost
                | Reason::LeaseOver
                | Reason::Suspended
                | Reason::UnexpectedSource
                | Reason::NotRtp
                | Reason::Rtcp
        );
        let what = reason.name();
        assert_eq!(state.last_seen == now, is_phones, "{what}");
        assert_eq!(state.last_passed == now, is_phones, "{what}");
        // Also what is none of the datapath's, or a stream that comes back from the PBX would seem to have
        // lost it.
        let is_received = is_phones || matches!(reason, Reason::LeaseOver | Reason::Suspended);
        assert_eq!(state.reception.packets, u32::from(is_received), "{what}");
        let noted = before.noted + u32::from(reason == Reason::AwaitingEcho);
        assert_eq!(state.noted, noted + u32::from(is_phones), "{what}");
        assert_eq!(state.last_rtcp == now, reason == Reason::Rtcp, "{what}");
        assert_eq!(state.packets, 0, "{what}");
    }
    let (_, relayed) = with(&[]);
    let fields = (relayed.last_seen, relayed.last_passed, relayed.noted);
    assert_eq!(fields, (now, before.last_passed, before.noted));
    assert_eq!((relayed.packets, relayed.last_rtcp), (1, 0));
    assert_eq!(relayed.reception.packets, 1);
}

/// Each packet of the phone counts by its mark: three values apart, all others together.
#[test]
fn packets_are_counted_by_the_mark_they_came_with() {
    let entry = proven(stream(Family::V4));
    let tables = MemoryTables::new(&[entry], SLOTS);
    for class in [0xb8, 0xbb, 0, 0xb8, 0x20, 0x28, 0x30, 0] {
        let mut draft = received(Family::V4);
        draft.traffic_class = class;
        relay(
            &mut Frame::new(&mut draft.bytes(), Hook::NativeXdp.partial_checksum()),
            &tables,
        );
    }
    let state = tables.state_of(entry.stream.slot).expect("a state");
    let marks = state.reception.marks();
    let counted: Vec<_> = marks.map(|mark| (mark.dscp, mark.packets)).collect();
    assert_eq!(
        counted,
        [(Some(46), 3), (Some(0), 2), (Some(8), 1), (None, 2)]
    );
}

/// RTCP beside the stream's port is seen in any mode, and is not RTP.
#[test]
fn rtcp_is_seen_whatever_the_mode() {
    for entry in [
        proven(stream(Family::V6)),
        watching(stream(Family::V6)),
        suspended(stream(Family::V6)),
        taken_back(stream(Family::V6)),
    ] {
        let mut report = received(Family::V6);
        report.destination.set_port(report.destination.port() + 1);
        report.payload = vec![0x80, 201, 0, 1, 0, 0, 0, 0];
        let (reason, _, tables) = decide(&report.bytes(), &[entry], Hook::NativeXdp);
        let state = tables.state_of(entry.stream.slot).expect("a state");
        assert_eq!((reason, state.last_rtcp), (Reason::Rtcp, ago(0)));
        let rtcp = State {
            last_rtcp: ago(0),
            ..entry.state
        };
        assert_eq!(state, rtcp);
    }
}

/// One report, not one for each packet, in any mode but suspended.
#[test]
fn an_unexpected_source_is_reported_at_times() {
    let mut stranger = received(Family::V4);
    stranger.source.set_port(5);
    for entry in [proven(stream(Family::V4)), watching(stream(Family::V4))] {
        let mut tables = MemoryTables::new(&[entry], SLOTS);
        let mut reported = Vec::new();
        for packet in 0..100_u64 {
            tables.set_now(NOW + packet * SECOND / 50);
            let (reason, _, same) = decide_by(&stranger.bytes(), tables, Hook::NativeXdp);
            assert_eq!(reason, Reason::UnexpectedSource);
            tables = same;
            for event in tables.take_events() {
                let told = (event.kind, event.slot, event.epoch, event.port);
                let expected = (event::UNEXPECTED_SOURCE, entry.stream.slot, 1, 5);
                let address = entry.stream.source.address;
                assert_eq!((told, event.address), (expected, address));
                reported.push(packet);
            }
        }
        assert_eq!(reported[0], 0);
        let gaps: Vec<_> = reported.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| (5..=6).contains(gap)), "{gaps:?}");
        assert!(reported.len() >= 16, "{reported:?}");
    }
    let entry = suspended(proven(stream(Family::V4)).stream);
    let (_, _, tables) = decide(&stranger.bytes(), &[entry], Hook::NativeXdp);
    assert!(tables.take_events().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn noise_never_panics_and_never_changes(
        frame in prop::collection::vec(any::<u8>(), 0..200),
        seed: u64,
    ) {
        let streams = Generator::new(seed).table(SLOTS);
        for hook in [Hook::NativeXdp, Hook::GenericXdp] {
            let (reason, after, tables) = decide(&frame, &streams, hook);
            prop_assert_ne!(reason, Reason::Relayed);
            prop_assert_eq!(&after, &frame);
            assert_accounted(&frame, &streams, reason, &tables);
        }
    }

    #[test]
    fn what_is_passed_is_as_it_came(seed: u64) {
        let mut generator = Generator::new(seed);
        let streams = generator.table(SLOTS);
        for _ in 0..16 {
            let frame = generator.frame(&streams);
            for hook in [Hook::NativeXdp, Hook::GenericXdp] {
                let (reason, after, tables) = decide(&frame, &streams, hook);
                if reason != Reason::Relayed {
                    prop_assert_eq!(&after, &frame, "{}", reason.name());
                }
                assert_accounted(&frame, &streams, reason, &tables);
            }
        }
    }

    #[test]
    fn what_is_relayed_equals_the_packet_written_anew(seed: u64) {
        let mut generator = Generator::new(seed);
        let mut entry = generator.entry();
        if !entry.stream.next_hop.is_known() {
            entry.stream.next_hop.mtu = 1500;
        }
        let packet = generator.packet_of(&entry);
        let frame = packet.bytes();
        for hook in [Hook::NativeXdp, Hook::GenericXdp] {
            let (reason, after, _) = decide(&frame, &[entry], hook);
            if packet.ambiguous() {
                prop_assert_eq!((reason, &after), (Reason::UdpChecksum, &frame));
                continue;
            }
            let mut expected = packet.relayed(&entry);
            if hook == Hook::NativeXdp {
                expected = expected.completed();
            }
            prop_assert_eq!((reason, after), (Reason::Relayed, expected.bytes()));
        }
        for entry in [watching(entry.stream), suspended(entry.stream)] {
            let (reason, after, _) = decide(&frame, &[entry], Hook::NativeXdp);
            prop_assert!(reason != Reason::Relayed && after == frame);
        }
    }
}
