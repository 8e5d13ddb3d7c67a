//! `relay-user attach --ami`: calls of the fake PBX come and go, are held, recorded and transferred back, and no
//! phone notices.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    ops::Range,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use nix::sys::signal::Signal;
use relay_common::stream::{Stream, StreamKey};
use relay_tests::{
    capture::Injector,
    draft::Draft,
    fixture,
    pbx::{self, Counters, Pbx},
    phone::{Arrival, Bank, Phone, Talk},
    relay::{Relay, ami_arguments},
    rtp::Rtp,
    topology::{Direct, PBX_MAC, PBX_V4, PBX_V6, PHONES_MAC},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// What a phone sets by itself: CS1 and ECT(0), so that neither `ef` nor `keep` can be right by chance.
const PHONE_TOS: u8 = 8 << 2 | 0b10;
/// The same with EF in place of CS1: the ECN bits stay.
const EF_TOS: u8 = 46 << 2 | 0b10;
/// Packets of a phone between two looks, where a rate matters.
const LONG: u64 = 100;
/// Packets that outlast two turns of the relay's poll (2 s each).
const TWO_POLLS: u64 = 220;
/// Arguments of a relay in traffic control. What is told of one mode holds in the other: some tests try the one, some
/// the other, the first both.
const TC: [&str; 2] = ["--mode", "tc"];

/// The PBX's machine with a PBX in it, and the phones' machine.
struct Office {
    net: Direct,
    pbx: Pbx,
    bank: Bank,
}

/// Two phones in a call, both talking.
struct Call {
    line: pbx::Call,
    caller: Phone,
    callee: Phone,
}

/// Packets of all calls until now.
#[derive(Clone, Copy, Debug)]
struct Traffic {
    sent: u64,
    /// Received by the PBX.
    received: u64,
    /// Of these, forwarded by it.
    forwarded: u64,
    relayed: u64,
}

impl Office {
    fn open() -> Self {
        let net = Direct::new(2).expect("network");
        let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
        let bank = Bank::new(&net.phones).expect("phones");
        Self { net, pbx, bank }
    }

    fn attach(&self, more: &[&str]) -> Relay {
        let ami = ami_arguments(self.pbx.ami(), pbx::USER, self.pbx.secret_file());
        let more = ["-vv"].iter().chain(more).map(|arg| (*arg).to_owned());
        let args = ami.into_iter().chain(more);
        Relay::attach(&self.net.pbx, "eth0", args).expect("relay-user attach")
    }

    /// Two phones on these ports, in a call and talking.
    fn call(&self, number: u16) -> Call {
        self.call_between([Direct::phone_v4(0), Direct::phone_v4(1)], number)
    }

    fn call_between(&self, phones: [std::net::IpAddr; 2], number: u16) -> Call {
        let phone = |address| {
            let local = SocketAddr::new(address, 30_000 + 2 * number);
            let phone = self.bank.phone(local).expect("phone");
            phone.set_tos(PHONE_TOS).expect("TOS");
            phone
        };
        let [caller, callee] = phones.map(phone);
        let line = self.pbx.call(caller.local(), callee.local()).expect("call");
        let call = Call {
            line,
            caller,
            callee,
        };
        for (phone, local, ssrc) in call.ends() {
            phone.talk(Talk::to(local, ssrc));
        }
        call
    }

    fn calls(&self, numbers: Range<u16>) -> Vec<Call> {
        numbers.map(|number| self.call(number)).collect()
    }

    fn traffic(&self, relay: &Relay, calls: &[Call]) -> Traffic {
        let counters = self.pbx.counters().expect("counters");
        let legs = || calls.iter().flat_map(|call| counters[&call.line.id]);
        let status = status(relay);
        Traffic {
            sent: calls.iter().flat_map(Call::phones).map(Phone::sent).sum(),
            received: legs().map(|leg: Counters| leg.received).sum(),
            forwarded: legs().map(|leg: Counters| leg.forwarded).sum(),
            relayed: reason(&status, "relayed"),
        }
    }

    /// What passes while every phone sends `packets` more.
    fn watch(&self, relay: &Relay, calls: &[Call], packets: u64) -> Traffic {
        let before = self.traffic(relay, calls);
        talk_on(calls, packets);
        let after = self.traffic(relay, calls);
        Traffic {
            sent: after.sent - before.sent,
            received: after.received - before.received,
            forwarded: after.forwarded - before.forwarded,
            relayed: after.relayed - before.relayed,
        }
    }

    /// The kernel relays every call. The PBX's own counters stand still, but for what it must hear of each phone every
    /// 3 seconds, and what arrives while that is still inside it.
    fn assert_relayed(&self, relay: &Relay, calls: &[Call]) {
        await_offloaded(relay, calls.len());
        // What was on its way to the PBX when the last stream was offloaded.
        talk_on(calls, 5);
        let passed = self.watch(relay, calls, LONG);
        assert!(passed.received * 50 <= passed.sent, "{passed:?}");
        assert!(passed.relayed * 100 > passed.sent * 95, "{passed:?}");
    }

    /// The PBX forwards every call, and the kernel relays nothing.
    fn assert_forwarded(&self, relay: &Relay, calls: &[Call], packets: u64) {
        let passed = self.watch(relay, calls, packets);
        assert_eq!(passed.relayed, 0, "{passed:?}");
        assert!(passed.forwarded * 100 > passed.sent * 90, "{passed:?}");
    }
}

impl Call {
    fn phones(&self) -> [&Phone; 2] {
        [&self.caller, &self.callee]
    }

    fn ends(&self) -> [(&Phone, SocketAddr, u32); 2] {
        [
            (&self.caller, self.line.local[0], 0xca11),
            (&self.callee, self.line.local[1], 0xca12),
        ]
    }

    /// Both phones fall silent, and each has heard the other whole: nothing lost, doubled, swapped or damaged.
    fn assert_perfect(&self) {
        self.phones().into_iter().for_each(Phone::hush);
        for [from, to] in [[&self.caller, &self.callee], [&self.callee, &self.caller]] {
            let all = usize::try_from(from.sent()).expect("a count");
            // What is lost never comes, and the report tells it better.
            let _ = to.wait_received(all, Duration::from_secs(2));
            let report = to.heard(from);
            let faults = (
                report.lost,
                report.duplicates,
                report.reordered,
                report.foreign,
            );
            assert_eq!(
                faults,
                (0, 0, 0, 0),
                "{} from {}: {report:?}",
                to.local(),
                from.local()
            );
        }
    }
}

/// Waits until every phone has sent `packets` more, and the last of them have arrived somewhere.
fn talk_on(calls: &[Call], packets: u64) {
    let phones: Vec<_> = calls.iter().flat_map(Call::phones).collect();
    let goals: Vec<_> = phones.iter().map(|phone| phone.sent() + packets).collect();
    for (phone, goal) in phones.into_iter().zip(goals) {
        phone.wait_sent(goal, PATIENCE).expect("talking");
    }
}

fn assert_perfect(calls: &[Call]) {
    calls.iter().for_each(Call::assert_perfect);
}

fn status(relay: &Relay) -> Value {
    relay.json(["status"]).expect("status")
}

fn reason(status: &Value, name: &str) -> u64 {
    let reasons = status["reasons"].as_array().expect("reasons");
    let row = reasons.iter().find(|row| row["reason"] == name);
    row.expect("every reason is listed")["packets"]
        .as_u64()
        .expect("a count")
}

/// Waits for a state of the daemon, however it comes about.
fn await_status(relay: &Relay, wanted: &str, condition: impl Fn(&Value) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = status(relay);
        if condition(&status) {
            return;
        }
        let late = Instant::now() > deadline;
        assert!(!late, "not {wanted}: {status:#}\n{}", relay.log());
        thread::sleep(Duration::from_millis(10));
    }
}

fn await_offloaded(relay: &Relay, calls: usize) {
    await_status(relay, &format!("{calls} calls offloaded"), |status| {
        status["offloaded"] == calls && status["pairs"] == calls
    });
}

/// Waits until everything is taken back while AMI does what `ami` says: a relay that asks first, of a PBX that does
/// not answer, gives up the connection in the end, and takes back because of that.
fn await_taken_back(relay: &Relay, ami: &str) {
    await_status(relay, "everything taken back", |status| {
        status["offloaded"] == 0 && status["streams"] == 0 && status["ami"]["state"] == ami
    });
}

/// Entries of the kernel's own map.
fn streams_in_kernel(office: &Office, relay: &Relay) -> usize {
    let status = status(relay);
    let path = Path::new(status["pins"].as_str().expect("a folder")).join("STREAMS");
    office.net.pbx.run(|| {
        let map = Map::HashMap(MapData::from_pin(path).expect("a pinned map"));
        let map =
            HashMap::<_, [u8; size_of::<StreamKey>()], [u8; size_of::<Stream>()]>::try_from(map);
        map.expect("the map of streams").keys().count()
    })
}

/// What the phone hears has this TOS. Not every single packet: one in 65,536 has a UDP checksum that could as well be
/// an unfinished one, and goes through the PBX.
fn assert_tos(relay: &Relay, phone: &Phone, expected: u8) {
    let arrivals = phone.arrivals();
    let last = &arrivals[arrivals.len() - 50..];
    let other = last
        .iter()
        .filter(|arrival| arrival.tos != expected)
        .count();
    assert!(
        other <= 1,
        "{last:#?}: {:#}\n{}",
        status(relay),
        relay.log()
    );
}

#[test]
fn calls_before_and_after_attach_are_relayed_and_the_pbx_sees_none_of_it() {
    calls_are_relayed(&[]);
}

#[test]
fn calls_before_and_after_attach_are_relayed_by_traffic_control() {
    calls_are_relayed(&TC);
}

fn calls_are_relayed(arguments: &[&str]) {
    let office = Office::open();
    let mut calls = office.calls(0..5);
    talk_on(&calls, 10);
    let marks = calls[0].callee.arrivals();
    assert!(
        marks.iter().all(|arrival| arrival.tos == 0),
        "the PBX's own mark"
    );
    let relay = office.attach(arguments);
    office.assert_relayed(&relay, &calls);
    calls.extend(office.calls(5..10));
    office.assert_relayed(&relay, &calls);
    assert_eq!(streams_in_kernel(&office, &relay), 20);
    for phone in calls.iter().flat_map(Call::phones) {
        assert_tos(&relay, phone, EF_TOS);
    }
    assert_perfect(&calls);
    relay.stop().expect("a clean end");
}

/// A driver may leave all but the headers of what it receives in pages, where programs do not see it.
#[test]
fn packets_in_pages_are_proven_and_relayed_by_traffic_control() {
    let office = Office::open();
    // Without it the stack copies what is lent.
    let phones = &office.net.phones_interface;
    phones.leave_checksums_to_device().expect("offload");
    let keepalive = [&TC[..], &["--keepalive", "1"]].concat();
    let relay = office.attach(&keepalive);
    let calls = office.calls(0..2);
    for phone in calls.iter().flat_map(Call::phones) {
        phone.lend_packets().expect("SO_ZEROCOPY");
    }
    await_offloaded(&relay, calls.len());
    // What the PBX must hear of them proves them again, in place of ending the offload.
    let before = status(&relay);
    talk_on(&calls, LONG);
    let after = status(&relay);
    let grown = |name| reason(&after, name) - reason(&before, name);
    let sent = LONG * calls.len() as u64 * 2;
    assert!(grown("keepalive") >= 4, "{after:#}");
    assert!(grown("relayed") * 100 > sent * 90, "{after:#}");
    assert_perfect(&calls);
    relay.stop().expect("a clean end");
}

#[test]
fn comfort_noise_of_the_pbx_into_a_stream_that_flows_does_not_leave() {
    /// Payload type of comfort noise (RFC 3551), and its level.
    const NOISE: (u8, u8) = (13, 127);
    let office = Office::open();
    let relay = office.attach(&TC);
    let calls = office.calls(0..1);
    office.assert_relayed(&relay, &calls);
    let [Call { line, callee, .. }] = &calls[..] else {
        panic!("one call");
    };
    let (payload_type, level) = NOISE;
    let noise = Rtp {
        marker: true,
        payload_type,
        sequence: 7,
        timestamp: 7,
        ssrc: 7,
    };
    let frame = Draft {
        destination_mac: PHONES_MAC,
        source_mac: PBX_MAC,
        source: line.local[1],
        destination: callee.local(),
        payload: noise.packet(&[level]),
        ..fixture::sent(fixture::Family::V4)
    };
    let injector = Injector::open(&office.net.pbx_interface).expect("injector");
    // Who sends past the stack hears of it.
    let sent = injector.send(&frame.bytes());
    sent.expect_err("dropped before it leaves");
    talk_on(&calls, 5);
    assert_eq!(reason(&status(&relay), "comfort_noise"), 1);
    assert_perfect(&calls);
}

#[test]
fn dscp_keep_leaves_the_phones_mark() {
    let office = Office::open();
    let relay = office.attach(&["--dscp", "keep"]);
    let calls = office.calls(0..1);
    office.assert_relayed(&relay, &calls);
    for phone in calls[0].phones() {
        assert_tos(&relay, phone, PHONE_TOS);
    }
    assert_perfect(&calls);
}

#[test]
fn ipv6_calls_are_relayed() {
    let net = Direct::new(2).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V6).expect("PBX");
    let bank = Bank::new(&net.phones).expect("phones");
    let office = Office { net, pbx, bank };
    let relay = office.attach(&TC);
    let phones = [Direct::phone_v6(0), Direct::phone_v6(1)];
    let calls = [
        office.call_between(phones, 0),
        office.call_between(phones, 1),
    ];
    office.assert_relayed(&relay, &calls);
    assert_tos(&relay, &calls[0].callee, EF_TOS);
    assert_perfect(&calls);
}

#[test]
fn a_held_call_is_taken_back_at_once_and_offloaded_when_resumed() {
    let office = Office::open();
    let relay = office.attach(&[]);
    let calls = office.calls(0..2);
    office.assert_relayed(&relay, &calls);

    // A PBX too busy to answer: who asks before taking back would relay a held call all the while.
    office.pbx.stall_ami().expect("stall");
    for call in &calls {
        office.pbx.hold(call.line).expect("hold");
    }
    await_taken_back(&relay, "up");
    office.assert_forwarded(&relay, &calls, 20);
    office.pbx.unstall_ami().expect("unstall");
    // Asked now, and asked again: it stays on hold, and with the PBX.
    await_status(&relay, "refused", |status| status["refused"] == 2);
    office.assert_forwarded(&relay, &calls, TWO_POLLS);
    let list = relay.json(["list"]).expect("list");
    let why = list["pairs"][0]["why"].as_str().expect("a reason");
    assert!(why.contains("on hold"), "{why}");

    for call in &calls {
        office.pbx.unhold(call.line).expect("unhold");
    }
    office.assert_relayed(&relay, &calls);
    assert_perfect(&calls);
}

#[test]
fn a_bridge_that_leaves_native_rtp_is_taken_back_at_once() {
    let office = Office::open();
    let relay = office.attach(&TC);
    let calls = office.calls(0..2);
    office.assert_relayed(&relay, &calls);

    office.pbx.stall_ami().expect("stall");
    for call in &calls {
        office.pbx.simple(call.line).expect("simple");
    }
    await_taken_back(&relay, "up");
    office.assert_forwarded(&relay, &calls, 20);
    office.pbx.unstall_ami().expect("unstall");
    await_status(&relay, "refused", |status| status["refused"] == 2);
    office.assert_forwarded(&relay, &calls, TWO_POLLS);

    for call in &calls {
        office.pbx.native(call.line).expect("native");
    }
    office.assert_relayed(&relay, &calls);
    let ssrc = |arrival: &Arrival| arrival.rtp.expect("RTP").ssrc;
    let sources: Vec<_> = calls[0].callee.arrivals().iter().map(ssrc).collect();
    assert!(
        sources.iter().any(|ssrc| *ssrc != 0xca11),
        "the PBX's own while it was not native"
    );
    assert!(sources.ends_with(&[0xca11; 20]), "the phone's own again");
    assert_perfect(&calls);
}

#[test]
fn hang_up_empties_the_map_and_the_ports_serve_the_next_call() {
    let office = Office::open();
    let relay = office.attach(&[]);
    let mut calls = office.calls(0..3);
    office.assert_relayed(&relay, &calls);
    assert_eq!(streams_in_kernel(&office, &relay), 6);
    for generation in 0..3 {
        let locals: Vec<_> = calls.iter().map(|call| call.line.local).collect();
        assert_perfect(&calls);
        for call in calls.drain(..) {
            office.pbx.hang_up(call.line).expect("hang up");
        }
        await_status(&relay, "empty", |status| status["pairs"] == 0);
        assert_eq!(streams_in_kernel(&office, &relay), 0);
        // The callee of before calls the caller: a stale entry would send its media the wrong way.
        let phones = [
            Direct::phone_v4(1 - generation % 2),
            Direct::phone_v4(generation % 2),
        ];
        calls = (0..3)
            .map(|number| office.call_between(phones, number))
            .collect();
        assert!(
            calls.iter().all(|call| locals.contains(&call.line.local)),
            "the same ports"
        );
        office.assert_relayed(&relay, &calls);
    }
    assert_perfect(&calls);
}

#[test]
fn ports_change_hands_before_the_relay_has_heard() {
    let office = Office::open();
    let relay = office.attach(&TC);
    let mut calls = office.calls(0..4);
    for generation in 1..6_u16 {
        talk_on(&calls, 10);
        assert_perfect(&calls);
        for call in calls.drain(..) {
            office.pbx.hang_up(call.line).expect("hang up");
        }
        calls = office.calls(4 * generation..4 * generation + 4);
    }
    office.assert_relayed(&relay, &calls);
    assert_eq!(streams_in_kernel(&office, &relay), 8);
    assert_perfect(&calls);
}

#[test]
fn fifty_quick_calls_leave_nothing_behind() {
    let office = Office::open();
    let relay = office.attach(&[]);
    let standing = office.calls(0..2);
    office.assert_relayed(&relay, &standing);
    for wave in 0..5 {
        let calls = office.calls(10..20);
        // Some are over before anything is asked, some in the middle of it, some while they are relayed.
        talk_on(&calls, 8 * wave);
        for call in &calls {
            office.pbx.hang_up(call.line).expect("hang up");
        }
    }
    await_status(&relay, "two calls left", |status| status["pairs"] == 2);
    assert_eq!(streams_in_kernel(&office, &relay), 4);
    let relayed = reason(&status(&relay), "relayed");
    assert!(relayed > 0);
    office.assert_relayed(&relay, &standing);
    assert_perfect(&standing);
}

#[test]
fn without_ami_everything_is_taken_back_and_a_resync_offloads_it_again() {
    let office = Office::open();
    let relay = office.attach(&TC);
    let mut calls = office.calls(0..3);
    office.assert_relayed(&relay, &calls);

    // Stalled, so that the relay is not back before this test has looked.
    office.pbx.stall_ami().expect("stall");
    office.pbx.disconnect_ami().expect("disconnect");
    await_taken_back(&relay, "down");
    office.assert_forwarded(&relay, &calls, 50);
    // What ends and begins meanwhile, the relay hears no event of.
    let gone = calls.remove(0);
    gone.assert_perfect();
    office.pbx.hang_up(gone.line).expect("hang up");
    calls.extend(office.calls(10..12));
    office.pbx.unstall_ami().expect("unstall");
    office.assert_relayed(&relay, &calls);
    assert_eq!(streams_in_kernel(&office, &relay), 8);
    assert_perfect(&calls);
}

#[test]
fn what_becomes_of_a_call_is_told_with_its_cause() {
    let office = Office::open();
    let mut relay = office.attach(&[]);
    let events = relay.follow().expect("events");
    let last = |kind: &str| {
        let mut events = events.until(kind).expect(kind);
        events.pop().expect("an event")
    };
    let says = |event: &Value, words: &str| {
        let cause = event["cause"].as_str().expect("a cause");
        assert!(cause.contains(words), "{event}");
    };
    let offloaded = || {
        let mut streams = [last("offloaded"), last("offloaded")].map(|it| it["stream"].as_u64());
        // In the order in which the phones' neighbours were resolved.
        streams.sort_unstable();
        assert_eq!(streams, [Some(0), Some(1)]);
    };
    let up = last("ami_up");
    assert_eq!((&up["serial"], &up["pair"]), (&1.into(), &Value::Null));

    let call = office.call(0);
    offloaded();
    let pair = relay.json(["show", "1"]).expect("show");
    office.pbx.hold(call.line).expect("hold");
    let back = last("taken_back");
    assert_eq!(back["pair"], pair["id"]);
    assert_eq!(back["call"], pair["call"]);
    assert_eq!(back["feed"], "ami");
    assert_eq!(back["stream"], Value::Null);
    says(&last("refused"), "on hold");
    office.pbx.unhold(call.line).expect("unhold");
    offloaded();

    office.pbx.stall_ami().expect("stall");
    office.pbx.disconnect_ami().expect("disconnect");
    let down = last("ami_down");
    assert_eq!(down["pair"], Value::Null);
    // Once the grace is over.
    let back = last("taken_back");
    says(&back, "AMI is down: ");
    says(&back, down["cause"].as_str().expect("a cause"));
    office.pbx.unstall_ami().expect("unstall");
    last("ami_up");
    offloaded();

    office.pbx.hang_up(call.line).expect("hang up");
    last("taken_back");
    let other = office.call(1);
    offloaded();
    relay.json(["flush"]).expect("flush");
    says(&last("taken_back"), "by the operator");
    says(&last("refused"), "by the operator");
    office.pbx.simple(other.line).expect("simple");
    office.pbx.native(other.line).expect("native");
    offloaded();

    relay.signal(Signal::SIGTERM);
    says(&last("taken_back"), "SIGTERM");
    assert_eq!(events.next().expect("the end"), None);
    assert!(relay.wait(PATIENCE).expect("the end").success());
}

#[test]
fn a_call_that_falls_silent_is_told_of_and_must_be_proven_again() {
    let office = Office::open();
    let relay = office.attach(&["--silence", "1", "--expire", "2"]);
    let events = relay.follow().expect("events");
    let calls = [office.call(0)];
    office.assert_relayed(&relay, &calls);
    calls[0].phones().into_iter().for_each(Phone::hush);
    let mut told = Vec::new();
    let streams = |told: &[Value], kind: &str| -> BTreeSet<Option<u64>> {
        let told = told.iter().filter(|event| event["kind"] == kind);
        told.map(|event| event["stream"].as_u64()).collect()
    };
    let both = BTreeSet::from([Some(0), Some(1)]);
    while streams(&told, "expired") != both {
        told.extend(events.until("expired").expect("told"));
    }
    assert_eq!(streams(&told, "silent"), both);
    await_status(&relay, "watching", |status| {
        status["pairs"] == 1 && status["offloaded"] == 0
    });
    let pair = &relay.json(["list"]).expect("list")["pairs"][0];
    let why = pair["why"].as_str().expect("a reason");
    assert!(why.starts_with("proof 0/8"), "{why}");
    for (phone, local, ssrc) in calls[0].ends() {
        phone.talk(Talk::to(local, ssrc));
    }
    office.assert_relayed(&relay, &calls);
    assert_perfect(&calls);
}

#[test]
fn an_upgrade_in_mid_call_leaves_no_packet_to_the_pbx() {
    let office = Office::open();
    let mut relay = office.attach(&[]);
    let calls = office.calls(0..3);
    office.assert_relayed(&relay, &calls);
    for _ in 0..2 {
        relay.signal(Signal::SIGKILL);
        relay.wait(PATIENCE).expect("the end");
        relay = office.attach(&[]);
        let events = relay.follow().expect("events");
        // Longer than Asterisk may take to confirm them.
        let before = reason(&status(&relay), "echo");
        let passed = office.watch(&relay, &calls, LONG);
        assert!(passed.received * 50 <= passed.sent, "{passed:?}");
        // What came to the PBX is what it must hear of each phone, and no proof.
        let echoes = reason(&status(&relay), "echo") - before;
        assert!(echoes * 50 <= passed.sent, "{echoes}");
        let list = relay.json(["list"]).expect("list");
        let pairs = list["pairs"].as_array().expect("pairs");
        let known: Vec<_> = pairs.iter().map(|pair| pair["id"].as_u64()).collect();
        assert_eq!(known, [Some(1), Some(2), Some(3)]);
        for pair in pairs {
            assert_eq!(pair["state"], "offloaded", "{pair:#}");
            assert!(pair["call"].is_string(), "confirmed: {pair:#}");
        }
        relay.json(["flush"]).expect("flush");
        let told = events.until("taken_back").expect("flushed");
        let others = ["adopted", "offloaded", "ami_up", "taken_back"];
        let other = told
            .iter()
            .find(|event| !others.iter().any(|kind| event["kind"] == *kind));
        assert_eq!(other, None);
        for call in &calls {
            office.pbx.simple(call.line).expect("simple");
            office.pbx.native(call.line).expect("native");
        }
        office.assert_relayed(&relay, &calls);
    }
    assert_perfect(&calls);
}

#[test]
fn a_flushed_call_stays_with_the_pbx_until_its_bridge_changes() {
    let office = Office::open();
    let relay = office.attach(&TC);
    let calls = office.calls(0..3);
    office.assert_relayed(&relay, &calls);
    let flushed = relay.json(["flush"]).expect("flush");
    assert_eq!(flushed["pairs"].as_array().map(Vec::len), Some(3));
    assert_eq!(streams_in_kernel(&office, &relay), 0);
    office.assert_forwarded(&relay, &calls, TWO_POLLS);
    assert_eq!(streams_in_kernel(&office, &relay), 0);

    // A new call is nobody's business, and a bridge that changes is offered anew.
    let later = [office.call(7)];
    await_status(&relay, "the new call relayed", |status| {
        status["offloaded"] == 1
    });
    later[0].assert_perfect();
    office.pbx.hang_up(later[0].line).expect("hang up");
    for call in &calls {
        office.pbx.simple(call.line).expect("simple");
        office.pbx.native(call.line).expect("native");
    }
    office.assert_relayed(&relay, &calls);

    let list = relay.json(["list"]).expect("list");
    let id = list["pairs"][0]["id"]
        .as_u64()
        .expect("a number")
        .to_string();
    relay.json(["remove", &id]).expect("remove");
    talk_on(&calls, TWO_POLLS);
    assert_eq!(
        status(&relay)["offloaded"],
        2,
        "one removed, two left alone"
    );
    assert_perfect(&calls);
}

#[test]
fn a_stream_that_the_pbx_transcodes_is_never_proven_whatever_signalling_says() {
    let office = Office::open();
    let calls = office.calls(0..2);
    office.pbx.transcode(calls[0].line).expect("transcode");
    talk_on(&calls, 5);
    calls[0].callee.forget();
    let relay = office.attach(&TC);
    let states = || -> Vec<[String; 2]> {
        let list = relay.json(["list"]).expect("list");
        let pair = |call: &Call| {
            let pairs = list["pairs"].as_array().expect("pairs");
            let from = |phone: &Phone| {
                let mut streams = pairs
                    .iter()
                    .flat_map(|pair| pair["streams"].as_array())
                    .flatten();
                let of_phone = |stream: &&Value| stream["from"] == phone.local().to_string();
                let stream = streams.find(of_phone);
                stream.map_or(String::new(), |stream| stream["state"].to_string())
            };
            call.phones().map(from)
        };
        calls.iter().map(pair).collect()
    };
    // The other way is proven by itself, and the other call in both.
    let (watching, offloaded) = ("\"watching\"".to_owned(), "\"offloaded\"".to_owned());
    let expected = [
        [watching.clone(), offloaded.clone()],
        [offloaded.clone(), offloaded],
    ];
    await_status(&relay, "everything proven that can be", |_| {
        states() == expected
    });
    // Outlasts every poll, and 8 packets many times over.
    talk_on(&calls, 2 * TWO_POLLS);
    assert_eq!(states(), expected, "{}", relay.log());
    let damaged = calls[0].callee.heard(&calls[0].caller);
    assert_eq!(
        damaged.received, 0,
        "all of it went through the PBX: {damaged:?}"
    );
    let list = relay.json(["list"]).expect("list").to_string();
    assert!(list.contains("proof 0/8: the PBX "), "{list}");
    calls[1].assert_perfect();
}

#[test]
fn sigterm_in_mid_call_loses_no_packet_and_leaves_nothing() {
    let office = Office::open();
    let mut relay = office.attach(&[]);
    let calls = office.calls(0..10);
    office.assert_relayed(&relay, &calls);
    let pins = status(&relay)["pins"]
        .as_str()
        .expect("a folder")
        .to_owned();
    let before = office.pbx.counters().expect("counters");
    relay.signal(Signal::SIGTERM);
    let ended = relay.wait(PATIENCE).expect("the end");
    assert!(ended.success(), "{ended}: {}", relay.log());
    assert!(
        !office.net.pbx.run(|| Path::new(&pins).exists()),
        "no pin is left"
    );
    talk_on(&calls, 25);
    let after = office.pbx.counters().expect("counters");
    for call in &calls {
        let forwarded = |counters: &std::collections::BTreeMap<u64, [Counters; 2]>| {
            counters[&call.line.id].map(|leg| leg.forwarded)
        };
        let (before, after) = (forwarded(&before), forwarded(&after));
        assert!(
            after[0] >= before[0] + 20 && after[1] >= before[1] + 20,
            "the PBX goes on"
        );
    }

    // And a new daemon takes the same calls up again.
    let relay = office.attach(&[]);
    office.assert_relayed(&relay, &calls);
    assert_perfect(&calls);
}
