//! The per-packet decision on the host: the fixtures, and what holds for every packet.

use proptest::prelude::*;
use relay_common::{packet::Frame, reason::Reason, relay::relay, stream::Counter};
use relay_tests::{
    fixture::{self, Hook, SLOTS, suspended, watching},
    generator::Generator,
    tables::{Entry, MemoryTables},
};

/// Decides on a frame, alone.
fn decide(frame: &[u8], streams: &[Entry], hook: Hook) -> (Reason, Vec<u8>, MemoryTables) {
    decide_by(frame, MemoryTables::new(streams, SLOTS), hook)
}

fn decide_by(frame: &[u8], tables: MemoryTables, hook: Hook) -> (Reason, Vec<u8>, MemoryTables) {
    let mut after = frame.to_vec();
    let reason = relay(
        &mut Frame::new(&mut after, hook.partial_checksum()),
        &tables,
    );
    (reason, after, tables)
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
        entry.stream.next_hop.known = 1;
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
