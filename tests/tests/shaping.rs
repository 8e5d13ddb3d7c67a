//! A call that shares a slow uplink with greedy TCP flows.

use relay_tests::{
    line::Access,
    relay::Relay,
    uplink::{Outcome, Uplink},
};

/// Flows beside the call.
const FLOWS: usize = 4;
/// Packets of the call until the flows fill the uplink, and those that are judged: 3 s and 5 s.
const SETTLING: u64 = 150;
const JUDGED: u64 = 250;

/// A call through the relay in this mode, beside so many flows.
fn call(mode: &str, flows: usize) -> Outcome {
    let site = Uplink::new(Access::DSL).expect("site");
    let relay = Relay::attach(&site.office.pbx, "eth0", ["--mode", mode]).expect("relay");
    site.call(&relay).expect("call");
    let outcome = site.measure(&relay, flows, SETTLING, JUDGED);
    relay.stop().expect("stop");
    outcome.expect("measurement")
}

#[test]
fn without_shaping_voice_waits_behind_bulk_data() {
    let (alone, beside) = (call("generic", 0), call("generic", FLOWS));
    assert_eq!((alone.voice.sent, alone.voice.lost), (JUDGED, 0));
    // Full queues lose some of it too, but not in every few seconds.
    assert!(
        beside.voice.delay.median > alone.voice.delay.p99,
        "{alone:?}\n{beside:?}"
    );
    assert!(beside.bulk > 0.0, "{beside:?}");
}
