//! A call that shares a slow uplink with greedy TCP flows.

use std::thread;

use relay_tests::{
    phone::PACKET_TIME,
    relay::Relay,
    uplink::{Bottleneck, Outcome, Uplink},
};
use relay_user::qos::report::LineReport;

/// Flows beside the call.
const FLOWS: usize = 4;
/// Packets of the call until the flows fill the uplink, and those that are judged: 3 s and 5 s.
const SETTLING: u64 = 150;
const JUDGED: u64 = 250;
/// How late a phone may be, ms: what it then sends at once must fit the queues.
const HELD_UP: f64 = 200.0;
/// How often that is tried on a busy machine.
const ATTEMPTS: usize = 4;

/// Beside bulk data, a call through the relay in this mode.
fn call(site: &Uplink, mode: &str) -> Outcome {
    let relay = Relay::attach(&site.office.pbx, "eth0", ["--mode", mode]).expect("relay");
    site.call(&relay).expect("call");
    let outcome = site.measure(&relay, FLOWS, SETTLING, JUDGED);
    relay.stop().expect("stop");
    outcome.expect("measurement")
}

/// The same on a shaped interface.
fn shaped_call(site: &Uplink, mode: &str) -> (Outcome, LineReport) {
    site.shape().expect("qos apply");
    let outcome = call(site, mode);
    (outcome, site.shaped().expect("qos show"))
}

/// Packets and bytes that a class has sent.
fn sent(report: &LineReport, class: &str) -> (u64, u64) {
    let mut classes = report.classes.iter();
    let found = classes.find(|it| it.name.as_deref() == Some(class));
    let class = found.expect(class);
    (class.packets, class.bytes)
}

/// Sends a call and bulk data over a bottleneck, unshaped and shaped.
fn compare(bottleneck: Bottleneck) {
    let site = || Uplink::new(bottleneck).expect("site");
    let (unshaped, shaped, report) = thread::scope(|scope| {
        let unshaped = scope.spawn(|| call(&site(), "tc"));
        let held_up = |(shaped, _): &(Outcome, _)| {
            [shaped.voice, shaped.down]
                .iter()
                .any(|way| way.pause > HELD_UP)
        };
        let mut calls = (0..ATTEMPTS).map(|_| shaped_call(&site(), "tc"));
        let call = calls.find(|call| !held_up(call));
        let (shaped, report) = call.expect("a machine with time for a phone");
        (unshaped.join().expect("unshaped"), shaped, report)
    });
    let told = format!("{bottleneck:?}\n{unshaped:#?}\n{shaped:#?}\n{report:#?}");
    for way in [shaped.voice, shaped.down] {
        assert_eq!((way.sent, way.lost), (JUDGED, 0), "{told}");
    }
    // Full queues lose some of it too, but not in every few seconds.
    assert!(
        shaped.voice.delay.p99 < unshaped.voice.delay.median,
        "{told}"
    );
    // The PBX sends the voice of both directions at its only interface.
    let (voice, _) = sent(&report, "high");
    assert!(voice >= 2 * (SETTLING + JUDGED), "{told}");
    // Four fifths of the shaped rate are left to bulk data.
    assert!(shaped.bulk > unshaped.bulk / 2.0, "{told}");
    let (_, bulk) = sent(&report, "bulk");
    let time = PACKET_TIME * u32::try_from(JUDGED).expect("few packets");
    assert!(
        bulk as f64 * 8.0 > shaped.bulk * time.as_secs_f64(),
        "{told}"
    );
}

#[test]
fn a_shaped_uplink_keeps_voice_from_waiting_behind_bulk_data() {
    thread::scope(|scope| {
        scope.spawn(|| compare(Bottleneck::Htb));
        compare(Bottleneck::Line);
    });
}

#[test]
fn what_is_relayed_by_xdp_passes_the_queues_by() {
    let site = Uplink::new(Bottleneck::Htb).expect("site");
    let (outcome, report) = shaped_call(&site, "generic");
    let told = format!("{outcome:#?}\n{report:#?}");
    assert_eq!(sent(&report, "high"), (0, 0), "{told}");
    assert!(sent(&report, "bulk").0 > 0, "{told}");
}
