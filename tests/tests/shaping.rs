//! A call that shares a slow uplink with greedy TCP flows.

use relay_tests::{line::Access, relay::Relay, uplink::Uplink};

/// Flows beside the call.
const FLOWS: usize = 4;
/// Packets of the call until the flows fill the uplink, and those that are judged: 3 s and 5 s.
const SETTLING: u64 = 150;
const JUDGED: u64 = 250;

#[test]
fn without_shaping_a_full_uplink_loses_voice() {
    let site = Uplink::new(Access::DSL).expect("site");
    let relay = Relay::attach(&site.office.pbx, "eth0", ["--mode", "generic"]).expect("relay");
    site.call(&relay).expect("call");
    let outcome = site.measure(&relay, FLOWS, SETTLING, JUDGED);
    let outcome = outcome.expect("measurement");
    assert_eq!(outcome.voice.sent, JUDGED);
    assert!(outcome.voice.lost > 0, "{outcome:?}");
    // The flows cannot have more than the line.
    assert!(outcome.bulk < Access::DSL.uplink as f64, "{outcome:?}");
    assert!(outcome.bulk > 0.0, "{outcome:?}");
    relay.stop().expect("stop");
}
