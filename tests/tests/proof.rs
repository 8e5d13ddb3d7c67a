//! The proof: what the relay takes over from a PBX, and what it must not.

use std::{
    collections::VecDeque,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use relay_common::{
    reason::Reason,
    stream::{Address, Event, PayloadType, State, event, mode, ticks},
};
use relay_tests::{
    fixture::{SECOND, endpoint},
    proof::{
        FAR, HEADERS, Host, IN, InKernel, OUT, PACKET_TIME, PHONE, Programs as _, SLOTS, frame,
        fuzz::{Outcome, trial},
        streams,
    },
    tables::{Entry, timeless},
};

/// What many trials came to.
#[derive(Debug, Default)]
struct Tally {
    trials: u64,
    taken_over: u64,
    relayed: u64,
    /// Seeds of the trials with a wrong takeover, and what was wrong.
    wrong: Vec<(u64, Vec<String>)>,
    /// Seeds of those where a plain PBX's stream was not taken over.
    missed: Vec<u64>,
}

impl Tally {
    fn add(&mut self, seed: u64, outcome: Outcome) {
        self.trials += 1;
        self.taken_over += u64::from(outcome.taken_over);
        self.relayed += u64::from(outcome.relayed);
        if !outcome.wrong.is_empty() {
            self.wrong.push((seed, outcome.wrong));
        }
        if outcome.missed {
            self.missed.push(seed);
        }
    }

    fn plus(mut self, other: Self) -> Self {
        self.trials += other.trials;
        self.taken_over += other.taken_over;
        self.relayed += other.relayed;
        self.wrong.extend(other.wrong);
        self.missed.extend(other.missed);
        self
    }

    /// Prints it, and sees that nothing is wrong with it.
    fn judge(&self, place: &str) {
        let Self {
            trials,
            taken_over,
            relayed,
            wrong,
            missed,
        } = self;
        println!(
            "fuzzed PBX, {place}: {trials} trials, {taken_over} takeovers, {relayed} packets relayed, {} wrong takeovers",
            wrong.len()
        );
        let first = |count| &wrong[..wrong.len().min(count)];
        assert!(wrong.is_empty(), "by seed: {:#?}", first(5));
        let first = |count| &missed[..missed.len().min(count)];
        assert!(missed.is_empty(), "not taken over: {:?}", first(5));
        // Where nothing is taken over, nothing can be taken over wrongly.
        assert!(*taken_over > trials / 2 && *relayed > trials * 3);
    }
}

#[test]
fn no_fuzzed_pbx_provokes_a_wrong_takeover() {
    const TRIALS: u64 = 100_000;
    const THREADS: u64 = 4;
    let part = |first| {
        move || {
            let mut host = Host::new(&streams(8));
            let mut tally = Tally::default();
            for seed in (first..TRIALS).step_by(THREADS as usize) {
                tally.add(seed, trial(seed, &mut host).expect("memory runs"));
            }
            tally
        }
    };
    let threads: Vec<_> = (0..THREADS)
        .map(|first| thread::spawn(part(first)))
        .collect();
    let parts = threads
        .into_iter()
        .map(|thread| thread.join().expect("a tally"));
    let tally = parts.fold(Tally::default(), Tally::plus);
    assert_eq!(tally.trials, TRIALS);
    tally.judge("host");
}

/// The programs in the kernel come to the same, trial by trial.
#[test]
fn nor_in_the_kernel() {
    const TRIALS: u64 = 2_000;
    let mut kernel = InKernel::load().expect("the kernel takes the datapath (tests need root)");
    let mut host = Host::new(&streams(8));
    let mut tally = Tally::default();
    for seed in 0..TRIALS {
        let hosts = trial(seed, &mut host).expect("memory runs");
        // The kernel's clock is the real one: a machine that stops in the middle makes a pause.
        let mut attempts = 0;
        let kernels = loop {
            let begun = Instant::now();
            let kernels = trial(seed, &mut kernel).expect("the kernel runs");
            attempts += 1;
            if begun.elapsed() < Duration::from_millis(150) {
                break kernels;
            }
            assert!(
                attempts < 20,
                "trial {seed}: the machine has no time for it"
            );
        };
        assert_eq!(
            kernels.states.map(timeless),
            hosts.states.map(timeless),
            "trial {seed}"
        );
        assert_eq!(kernels.relayed, hosts.relayed, "trial {seed}");
        let events = kernel.take_events().expect("events");
        let kinds = |events: Vec<Event>| -> Vec<_> {
            let kinds = events.into_iter();
            kinds
                .map(|event| (event.kind, event.slot, event.epoch, event.payload_type))
                .collect()
        };
        assert_eq!(kinds(events), kinds(host.take_events()), "trial {seed}");
        tally.add(seed, kernels);
    }
    tally.judge("kernel");
}

/// No events.
const NONE: [u32; 0] = [];

/// A call, packet by packet: a phone, and a PBX that does what it is told.
struct Call {
    host: Host,
    ssrc: u32,
    sequence: u16,
    /// What the relay left to the PBX, and has not left it yet.
    inside: VecDeque<Vec<u8>>,
    /// What the relay sent last.
    relayed: Vec<u8>,
}

impl Call {
    fn new(proof: u8) -> Self {
        Self::with(streams(proof))
    }

    fn with(entries: [Entry; 2]) -> Self {
        Self {
            host: Host::new(&entries),
            ssrc: 0xdead_beef,
            sequence: 100,
            inside: VecDeque::new(),
            relayed: Vec::new(),
        }
    }

    /// One whose payload type 0 is proven, and relayed.
    fn offloaded() -> Self {
        let mut call = Self::new(4);
        for _ in 0..4 {
            call.through(0);
        }
        assert_eq!(call.say(0), Reason::Relayed);
        assert_eq!(call.events(), [event::PROVEN]);
        call
    }

    fn rtp(&mut self, marker_type: u8) -> Vec<u8> {
        self.sequence += 1;
        let mut rtp = vec![0x80, marker_type];
        rtp.extend(self.sequence.to_be_bytes());
        rtp.extend((u32::from(self.sequence) * 160).to_be_bytes());
        rtp.extend(self.ssrc.to_be_bytes());
        rtp.extend([0x55; 20]);
        rtp
    }

    /// The phone sends a packet, 20 ms after the last.
    fn say(&mut self, marker_type: u8) -> Reason {
        let rtp = self.rtp(marker_type);
        self.host.wait(PACKET_TIME);
        let relayed = self.host.receive(&frame(PHONE, IN, &rtp)).expect("memory");
        match relayed {
            Some(frame) => self.relayed = frame[HEADERS..].to_vec(),
            None => self.inside.push_back(rtp),
        }
        self.host.reason.expect("a reason")
    }

    /// The PBX sends something on the out-leg.
    fn send(&mut self, to: SocketAddrV4, rtp: &[u8]) -> Option<Reason> {
        self.host.leave(&frame(OUT, to, rtp)).expect("memory");
        self.host.reason
    }

    /// The oldest packet inside the PBX leaves it, changed.
    fn forward_as(&mut self, change: impl FnOnce(&mut Vec<u8>)) -> Option<Reason> {
        let mut rtp = self.inside.pop_front().expect("a packet inside");
        change(&mut rtp);
        self.send(FAR, &rtp)
    }

    /// The oldest packet inside the PBX leaves it, as it came in.
    fn forward(&mut self) -> Option<Reason> {
        self.forward_as(|_| {})
    }

    /// A packet through the PBX and out again.
    fn through(&mut self, marker_type: u8) {
        assert_ne!(self.say(marker_type), Reason::Relayed);
        assert_eq!(self.forward(), Some(Reason::Echo));
    }

    /// The PBX swallows what is inside.
    fn swallow(&mut self) {
        self.inside.clear();
    }

    /// The PBX sends RTP of its own.
    fn speak(&mut self, marker_type: u8) -> Option<Reason> {
        let mut rtp = self.rtp(marker_type);
        rtp[12..].fill(0xd5);
        self.send(FAR, &rtp)
    }

    fn state(&self, slot: usize) -> State {
        self.host.tables.state_of(SLOTS[slot]).expect("a slot")
    }

    /// Kinds of the events since the last call.
    fn events(&self) -> Vec<u32> {
        let events = self.host.take_events();
        events.iter().map(|event| event.kind).collect()
    }

    /// The controller begins another round of proof.
    fn begin(&mut self, epoch: u32) {
        for slot in SLOTS {
            self.host.set_epoch(slot, epoch).expect("a slot");
        }
    }
}

#[test]
fn so_many_equal_packets_in_a_row_prove_a_stream() {
    for proof in [1, 2, 8, 12, 255] {
        let mut call = Call::new(proof);
        for _ in 0..proof {
            assert_eq!(call.events(), NONE);
            call.through(0);
        }
        let [event] = call.host.take_events()[..] else {
            panic!("one event");
        };
        let told = (event.kind, event.slot, event.epoch, event.payload_type);
        let voice = PayloadType { from: 0, to: 0 };
        assert_eq!(told, (event::PROVEN, SLOTS[0], 1, voice));
        assert_eq!(call.say(0), Reason::Relayed);
        // Each direction by itself.
        assert_eq!(call.state(1).mode(), mode::WATCHING);
        assert_eq!((call.state(0).packets, call.state(1).packets), (1, 0));
    }
}

#[test]
fn a_payload_type_is_relayed_with_the_number_that_the_pbx_gave_it() {
    let mut call = Call::new(3);
    for marker in [0x80, 0, 0] {
        call.say(marker | 101);
        let came_out = call.forward_as(|rtp| rtp[1] = marker | 96);
        assert_eq!(came_out, Some(Reason::Echo));
    }
    for marker in [0, 0x80] {
        assert_eq!(call.say(marker | 101), Reason::Relayed);
        assert_eq!(call.relayed[1], marker | 96);
    }
    // It is consistent, or it is nothing.
    let mut call = Call::new(2);
    for to in [96, 97, 96, 97, 96] {
        call.say(101);
        call.forward_as(|rtp| rtp[1] = to);
    }
    assert_eq!(call.state(0).mode(), mode::WATCHING);
}

#[test]
fn a_marker_that_the_pbx_adds_is_no_change_and_no_proof() {
    let mut call = Call::new(3);
    call.say(0);
    assert_eq!(call.forward_as(|rtp| rtp[1] |= 0x80), Some(Reason::Echo));
    call.through(0);
    call.through(0);
    assert_eq!(call.state(0).mode(), mode::WATCHING);
    call.through(0x80);
    assert_eq!(call.say(0x80), Reason::Relayed);
    assert_eq!(call.relayed[1], 0x80);
    // A new payload type, every packet of which it marks, would come out otherwise without us.
    for _ in 0..6 {
        assert_eq!(call.say(8), Reason::PayloadType);
        assert_eq!(call.forward_as(|rtp| rtp[1] |= 0x80), Some(Reason::Echo));
    }
    // One that it takes away is a change.
    let mut call = Call::new(3);
    for _ in 0..6 {
        call.say(0x80);
        let came_out = call.forward_as(|rtp| rtp[1] &= 0x7f);
        assert_eq!(came_out, Some(Reason::Unequal));
    }
}

#[test]
fn whatever_differs_proves_nothing() {
    let changes: [fn(&mut Vec<u8>); 9] = [
        |rtp| rtp[0] ^= 1,
        |rtp| rtp[3] ^= 1,
        |rtp| rtp[7] ^= 1,
        |rtp| rtp[8] ^= 0x80,
        |rtp| rtp[12] ^= 1,
        |rtp| rtp[31] ^= 0x80,
        |rtp| rtp.push(0),
        |rtp| rtp.truncate(31),
        |rtp| rtp.truncate(12),
    ];
    for change in changes {
        let mut call = Call::new(2);
        for _ in 0..4 {
            call.say(0);
            assert_eq!(call.forward_as(change), Some(Reason::Unequal));
            call.through(0);
        }
        assert_eq!(call.state(0).mode(), mode::WATCHING);
        assert_eq!(call.state(0).unequal, 4);
        // Nor does it go on after the takeover.
        call.through(0);
        assert_eq!(call.state(0).mode(), mode::OFFLOADED);
        assert_eq!(call.say(8), Reason::PayloadType);
        assert_eq!(call.forward_as(change), Some(Reason::TalkBack));
        assert_eq!(call.say(0), Reason::Suspended);
    }
}

#[test]
fn a_row_is_broken_by_what_is_missing_repeated_or_late() {
    type Break = fn(&mut Call);
    let breaks: [(&str, Break); 4] = [
        ("swallowed", |call| {
            call.say(0);
            call.swallow();
        }),
        ("twice", |call| {
            call.say(0);
            let rtp = call.inside[0].clone();
            assert_eq!(call.forward(), Some(Reason::Echo));
            assert_eq!(call.send(FAR, &rtp), Some(Reason::Unequal));
        }),
        ("its own", |call| {
            assert_eq!(call.speak(0), Some(Reason::Unequal));
        }),
        ("late", |call| {
            call.say(0);
            call.say(0);
            call.inside.swap(0, 1);
            assert_eq!(call.forward(), Some(Reason::Echo));
            assert_eq!(call.forward(), Some(Reason::Echo));
        }),
    ];
    for (what, breaks) in breaks {
        let mut call = Call::new(4);
        for _ in 0..2 {
            call.through(0);
        }
        breaks(&mut call);
        for _ in 0..3 {
            call.through(0);
            assert_eq!(call.state(0).mode(), mode::WATCHING, "{what}");
        }
        call.through(0);
        assert_eq!(call.say(0), Reason::Relayed, "{what}");
    }
}

/// A packet that is known does not stand for the one that is missing.
#[test]
fn a_row_is_broken_whatever_comes_out_next() {
    let mut call = Call::offloaded();
    for _ in 0..3 {
        call.through(101);
    }
    call.say(101);
    call.swallow();
    assert_eq!(call.say(0), Reason::AwaitingEcho);
    assert_eq!(call.forward(), Some(Reason::Echo));
    for _ in 0..3 {
        call.through(101);
    }
    assert_eq!(call.say(101), Reason::PayloadType);
    assert_eq!(call.forward(), Some(Reason::Echo));
    assert_eq!(call.say(101), Reason::Relayed);
}

#[test]
fn up_to_eight_packets_may_be_inside_the_pbx() {
    for (inside, proven) in [(1, true), (8, true), (9, false)] {
        let mut call = Call::new(8);
        for _ in 1..inside {
            call.say(0);
        }
        for _ in 0..20 {
            if call.say(0) != Reason::Relayed {
                call.forward();
            }
        }
        assert_eq!(call.state(0).mode() == mode::OFFLOADED, proven, "{inside}");
        if !proven {
            continue;
        }
        // It is slow, but not silent.
        assert_eq!(call.events(), [event::PROVEN], "{inside}");
        // None overtakes those that are still inside.
        while inside > 1 && !call.inside.is_empty() {
            assert_eq!(call.state(0).packets, 0);
            call.forward();
        }
        assert_eq!(call.say(0), Reason::Relayed);
    }
}

#[test]
fn a_new_payload_type_is_proven_on_its_way() {
    let mut call = Call::offloaded();
    for _ in 0..4 {
        assert_eq!(call.say(101), Reason::PayloadType);
        assert_eq!(call.forward_as(|rtp| rtp[1] = 96), Some(Reason::Echo));
        // Voice in between is relayed.
        assert_eq!(call.say(0), Reason::Relayed);
    }
    let events = call.host.take_events();
    let types: Vec<_> = events.iter().map(|event| event.payload_type).collect();
    assert_eq!(types, [PayloadType { from: 101, to: 96 }]);
    assert_eq!(call.say(101), Reason::Relayed);
    assert_eq!(call.relayed[1], 96);
}

#[test]
fn eight_payload_types_are_relayed_and_no_more() {
    let mut call = Call::new(2);
    for payload_type in 0..9 {
        for _ in 0..2 {
            call.through(payload_type);
        }
    }
    assert_eq!(call.events(), [event::PROVEN; 8]);
    for payload_type in 0..8 {
        assert_eq!(call.say(payload_type), Reason::Relayed);
    }
    for _ in 0..20 {
        assert_eq!(call.say(8), Reason::PayloadType);
        assert_eq!(call.forward(), Some(Reason::Echo));
    }
    assert_eq!((call.say(0), call.events()), (Reason::Relayed, vec![]));
}

#[test]
fn a_payload_type_that_the_pbx_keeps_to_itself_ends_nothing() {
    let mut call = Call::offloaded();
    for _ in 0..20 {
        assert_eq!(call.say(101), Reason::PayloadType);
        call.swallow();
    }
    for _ in 0..5 {
        assert_eq!(call.say(101), Reason::PayloadType);
        call.swallow();
        assert_eq!(call.say(0), Reason::AwaitingEcho);
        assert_eq!(call.forward(), Some(Reason::Echo));
    }
    assert_eq!((call.say(0), call.events()), (Reason::Relayed, vec![]));
}

#[test]
fn talk_back_suspends_both_streams_on_that_packet() {
    let mut call = Call::offloaded();
    call.host
        .tables
        .change(SLOTS[1], |state| state.proven = state.epoch);
    assert_eq!(call.speak(0x80 | 8), Some(Reason::TalkBack));
    let modes = [0, 1].map(|slot| call.state(slot).mode());
    assert_eq!(modes, [mode::SUSPENDED; 2]);
    let [event] = call.host.take_events()[..] else {
        panic!("one event");
    };
    assert_eq!(
        (event.kind, event.slot, event.epoch, event.payload_type.to),
        (event::TALK_BACK, SLOTS[0], 1, 8)
    );
    assert_eq!(
        (event.address, event.port),
        ((*FAR.ip()).into(), FAR.port())
    );
    // The rest of what it has to say is nobody's business.
    assert_eq!(call.speak(8), None);
    assert_eq!(call.say(0), Reason::Suspended);
    assert_eq!(call.events(), NONE);
    // A new round starts from nothing.
    call.inside.clear();
    call.begin(2);
    for _ in 0..4 {
        assert_eq!(call.state(0).mode(), mode::WATCHING);
        call.through(8);
    }
    assert_eq!(call.say(8), Reason::Relayed);
    assert_eq!(call.say(0), Reason::PayloadType);
}

#[test]
fn what_is_no_rtp_is_no_talk_back() {
    let mut call = Call::offloaded();
    let rtcp = [[0x80, 200, 0, 6].as_slice(), &[0; 24]].concat();
    let stun = [[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42].as_slice(), &[0; 12]].concat();
    let dtls = [22; 40];
    for packet in [&rtcp[..], &stun, &dtls, &[], &[0x80; 11]] {
        assert_eq!(call.send(FAR, packet), None);
    }
    // Nor what leaves from elsewhere.
    let rtp = call.rtp(0);
    call.host.leave(&frame(PHONE, FAR, &rtp)).expect("memory");
    assert_eq!(call.say(0), Reason::Relayed);
}

#[test]
fn comfort_noise_goes_out_only_where_the_stream_is_silent() {
    let mut call = Call::offloaded();
    let mut noise = call.rtp(13);
    noise.truncate(13);
    for marker_type in [13, 0x80 | 13] {
        noise[1] = marker_type;
        assert_eq!(call.send(FAR, &noise), Some(Reason::ComfortNoise));
        assert!(!call.host.leave(&frame(OUT, FAR, &noise)).expect("memory"));
    }
    assert_eq!(call.say(0), Reason::Relayed);
    call.host.wait(2 * SECOND);
    assert!(call.host.leave(&frame(OUT, FAR, &noise)).expect("memory"));
    assert_eq!(call.host.reason, None);
    assert_eq!(call.say(0), Reason::AfterPause);
    assert_eq!(call.forward(), Some(Reason::Echo));
    assert_eq!((call.say(0), call.events()), (Reason::Relayed, vec![]));
    // The phone's own is forwarded like anything else.
    let own = call.rtp(13)[..13].to_vec();
    let passed = call.host.receive(&frame(PHONE, IN, &own)).expect("memory");
    assert_eq!((passed, call.send(FAR, &own)), (None, Some(Reason::Echo)));
    // Voice of that payload type is talk-back.
    noise.push(0);
    assert_eq!(call.send(FAR, &noise), Some(Reason::TalkBack));
}

#[test]
fn echoes_that_do_not_come_suspend_the_stream() {
    let mut call = Call::offloaded();
    call.ssrc += 1;
    assert_eq!(call.say(0), Reason::NewSsrc);
    for _ in 0..7 {
        assert_eq!(call.say(0), Reason::AwaitingEcho);
        assert_eq!(call.state(0).mode(), mode::OFFLOADED);
    }
    assert_eq!(
        (call.say(0), call.events()),
        (Reason::AwaitingEcho, vec![event::ECHO_MISSING])
    );
    assert_eq!((call.say(0), call.events()), (Reason::Suspended, vec![]));
    // The other direction with it: nobody would see the PBX speak to the other phone.
    assert_eq!(call.state(1).mode(), mode::SUSPENDED);
    // Two packets at once are none too many in the next round.
    call.swallow();
    call.begin(2);
    for _ in 0..4 {
        call.through(0);
    }
    call.ssrc += 1;
    call.say(0);
    call.say(0);
    assert_eq!(
        (call.state(0).mode(), call.events()),
        (mode::OFFLOADED, vec![event::PROVEN])
    );
}

#[test]
fn a_new_source_and_a_pause_are_proven_by_one_packet() {
    let mut call = Call::offloaded();
    for _ in 0..3 {
        call.ssrc += 1;
        assert_eq!(call.say(0), Reason::NewSsrc);
        assert_eq!(call.say(0), Reason::AwaitingEcho);
        assert_eq!(call.forward(), Some(Reason::Echo));
        assert_eq!(call.say(0), Reason::AwaitingEcho);
        assert_eq!(call.forward(), Some(Reason::Echo));
        assert_eq!(call.forward(), Some(Reason::Echo));
        assert_eq!(call.say(0), Reason::Relayed);
        call.host.wait(SECOND);
        assert_eq!(call.say(0), Reason::AfterPause);
        assert_eq!(call.forward(), Some(Reason::Echo));
        assert_eq!(call.say(0), Reason::Relayed);
    }
    call.host.wait(SECOND);
    assert_eq!(call.say(0), Reason::AfterPause);
    assert_eq!(call.forward_as(|rtp| rtp[8] ^= 1), Some(Reason::TalkBack));
    assert_eq!(call.say(0), Reason::Suspended);
}

#[test]
fn a_keepalive_is_an_audit() {
    let mut entries = streams(4);
    entries[0].stream.keepalive = ticks(SECOND) as u16;
    let mut call = Call::with(entries);
    for _ in 0..4 {
        call.through(0);
    }
    let mut passed = Vec::new();
    for number in 0..200 {
        if call.say(0) == Reason::Keepalive {
            passed.push(number);
            assert_eq!(call.forward(), Some(Reason::Echo));
        }
    }
    assert_eq!(passed, [49, 99, 149, 199]);
    // A phone with RTCP is heard anyway.
    let report = [0x80, 201, 0, 1, 0, 0, 0, 0];
    let [from, to] = [PHONE, IN].map(|it| SocketAddrV4::new(*it.ip(), it.port() + 1));
    for _ in 0..5 {
        call.host
            .receive(&frame(from, to, &report))
            .expect("memory");
        assert_eq!(call.host.reason, Some(Reason::Rtcp));
        for _ in 0..100 {
            assert_eq!(call.say(0), Reason::Relayed);
        }
    }
    let next = (0..100).find(|_| call.say(0) == Reason::Keepalive);
    assert!((20..30).contains(&next.expect("a keepalive")));
    assert_eq!(call.forward_as(|rtp| rtp[20] ^= 1), Some(Reason::TalkBack));
    assert_eq!(call.say(0), Reason::Suspended);
}

#[test]
fn a_round_that_is_over_proves_nothing() {
    // The controller begins another round while the observer is at work: what that still writes is of the old one.
    let mut call = Call::offloaded();
    call.begin(2);
    assert_eq!(call.state(0).proven, 1);
    assert_eq!(call.say(0), Reason::Watching);
    // Taken back, the PBX may do as it pleases, and nothing comes of it.
    call.begin(0);
    assert_eq!(call.forward(), None);
    for _ in 0..20 {
        assert_eq!(call.say(0), Reason::Suspended);
        assert_eq!(call.forward(), None);
    }
    assert_eq!((call.speak(0), call.state(0).proven), (None, 1));
    // What went in before a round is not evidence in it, even if it comes out again.
    let mut call = Call::offloaded();
    for _ in 0..4 {
        call.say(8);
    }
    let old: Vec<_> = call.inside.drain(..).collect();
    call.speak(0);
    for rtp in &old {
        assert_eq!(call.send(FAR, rtp), None);
    }
    call.begin(2);
    for rtp in &old {
        assert_eq!(call.send(FAR, rtp), Some(Reason::Unequal));
    }
    assert_eq!(call.state(0).mode(), mode::WATCHING);
}

#[test]
fn another_destination_is_no_echo() {
    let elsewhere = [
        SocketAddrV4::new(*FAR.ip(), FAR.port() + 2),
        SocketAddrV4::new(*PHONE.ip(), FAR.port()),
        PHONE,
    ];
    for to in elsewhere {
        let mut call = Call::new(2);
        for _ in 0..6 {
            call.say(0);
            let rtp = call.inside.pop_front().expect("a packet");
            assert_eq!(call.send(to, &rtp), Some(Reason::Unequal));
        }
        call.through(0);
        call.through(0);
        assert_eq!(call.say(8), Reason::PayloadType);
        call.events();
        let rtp = call.inside.pop_front().expect("a packet");
        assert_eq!(call.send(to, &rtp), Some(Reason::TalkBack));
        let [event] = call.host.take_events()[..] else {
            panic!("one event");
        };
        assert_eq!((event.address, event.port), ((*to.ip()).into(), to.port()));
    }
}

#[test]
fn without_a_lease_the_observer_looks_away() {
    let mut call = Call::offloaded();
    call.host.tables.set_lease(1);
    assert_eq!(call.say(0), Reason::LeaseOver);
    assert_eq!((call.forward(), call.speak(0)), (None, None));
    assert_eq!((call.state(0).suspended, call.events()), (0, vec![]));
}

/// A PBX with two addresses may send from one what it receives at the other.
#[test]
fn what_leaves_from_elsewhere_is_proven_there_and_nowhere_else() {
    let mut entries = streams(2);
    let elsewhere = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 99), OUT.port());
    entries[1].stream.local = endpoint(SocketAddr::V4(elsewhere));
    assert_ne!(entries[1].stream.local, entries[1].stream.sends_from);
    let mut call = Call::with(entries);
    for _ in 0..4 {
        call.say(0);
        let rtp = call.inside.pop_front().expect("a packet inside");
        let from_where_it_receives = frame(elsewhere, FAR, &rtp);
        call.host.leave(&from_where_it_receives).expect("memory");
        assert_eq!((call.host.reason, call.events()), (None, vec![]));
    }
    for _ in 0..2 {
        assert_eq!(call.events(), NONE);
        call.through(0);
    }
    assert_eq!(call.events(), [event::PROVEN]);
    assert_eq!(call.say(0), Reason::Relayed);
    // The other phone is heard where the PBX receives.
    let rtp = call.rtp(0);
    for (to, reason) in [(OUT, Reason::NoStream), (elsewhere, Reason::Watching)] {
        call.host.receive(&frame(FAR, to, &rtp)).expect("memory");
        assert_eq!(call.host.reason, Some(reason), "{to}");
    }
}

/// Where the PBX is bound to no address in particular, the wire tells which it uses.
#[test]
fn scouts_report_the_addresses_in_use() {
    let mut entries = streams(4);
    for entry in &mut entries {
        entry.stream.local.address = Address::default();
        entry.stream.sends_from = entry.stream.local;
    }
    let mut call = Call::with(entries);
    for round in 0..2 {
        for _ in 0..3 {
            assert_eq!(call.say(0), Reason::NoStream);
            assert_eq!(call.forward(), None);
        }
        let told: Vec<_> = call.host.take_events();
        let told: Vec<_> = told
            .iter()
            .map(|event| (event.kind, event.slot, event.address, event.port))
            .collect();
        let expected = [
            (event::RECEIVED_AT, SLOTS[0], (*IN.ip()).into(), IN.port()),
            (event::SENT_FROM, SLOTS[0], (*OUT.ip()).into(), OUT.port()),
        ];
        // At times, and not with every packet.
        assert_eq!(told, expected, "{round}");
        call.host.wait(SECOND);
    }
    // Only from and to the phones.
    let rtp = call.rtp(0);
    call.host.receive(&frame(FAR, IN, &rtp)).expect("memory");
    assert_eq!(call.send(PHONE, &rtp), None);
    assert_eq!(call.events(), NONE);
}

proptest! {
    /// Whatever the PBX swallows and however long it takes, as long as it keeps the order.
    #[test]
    fn no_packet_overtakes_one_that_is_inside_the_pbx(
        steps in prop::collection::vec((0..40_usize, 0..5_u8, 0..12_u8), 20..200),
    ) {
        let mut call = Call::new(2);
        for (leave, kind, swallow) in steps {
            for _ in 0..leave.saturating_sub(30) {
                if !call.inside.is_empty() {
                    call.forward();
                }
            }
            if swallow == 0 {
                call.inside.pop_front();
            }
            match kind {
                0 => call.ssrc += 1,
                1 => call.host.wait(SECOND),
                _ => {}
            }
            let waiting = call.inside.len();
            if call.say(0) == Reason::Relayed {
                prop_assert_eq!(waiting, 0);
            }
        }
    }
}
