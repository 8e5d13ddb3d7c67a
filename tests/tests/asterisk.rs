//! The relay with a real Asterisk 22: what it takes over, what it leaves alone, and what the phones hear of it.

use std::{
    cell::Cell,
    collections::{BTreeSet, HashMap},
    path::Path,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use relay_tests::{
    ami::{Client, Message},
    asterisk::{CALLER, Lab, Leg, SECRET, Stream, USER, streams},
    capture::{Capture, Direction, Recording},
    link::PassProgram,
    namespace::Host,
    relay::{Relay, ami_arguments, binary},
    rtp::Rtp,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// Packets that both phones of a call send in a second.
const RATE: u64 = 100;

/// One lab at a time: a second Asterisk on a small machine would be heard in the gaps of the first.
static LAB: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    LAB.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A relay beside the Asterisk under test.
struct Attached {
    relay: Relay,
    pbx: Host,
    /// Native `XDP_TX` over veth needs a program at the other end.
    _pass: PassProgram,
}

fn feed(lab: &Lab, user: &str) -> Vec<String> {
    ami_arguments(lab.ami(), user, lab.secret_file()).to_vec()
}

/// Modes of the relay. What is told of one holds in the other: some tests try the one, some the other, the first both.
const NATIVE: &str = "native";
const TC: &str = "tc";

impl Attached {
    fn to(lab: &Lab, mode: &str) -> Self {
        let pass = lab.net.phones_interface.pass_program();
        let pass = pass.expect("a program at the phones' end");
        let mut args = vec!["--mode".to_owned(), mode.to_owned()];
        args.extend(feed(lab, USER));
        let relay = Relay::attach(&lab.net.pbx, &lab.net.pbx_interface.name, args);
        Self {
            relay: relay.expect("relay-user attach"),
            pbx: lab.net.pbx.clone(),
            _pass: pass,
        }
    }

    fn list(&self) -> Vec<Value> {
        let list = self.relay.json(["list"]).expect("list");
        list["pairs"].as_array().expect("pairs").clone()
    }

    fn status(&self) -> Value {
        self.relay.json(["status"]).expect("status")
    }

    /// Packets that the kernel has relayed.
    fn relayed(&self) -> u64 {
        let status = self.status();
        let reasons = status["reasons"].as_array().expect("reasons");
        let relayed = reasons
            .iter()
            .filter(|reason| reason["verdict"] == "relayed");
        relayed
            .map(|reason| reason["packets"].as_u64().expect("a number"))
            .sum()
    }

    /// The local ports in the map of streams, which only the kernel's copy of it can tell.
    fn map(&self) -> BTreeSet<u16> {
        let status = self.status();
        let pins = Path::new(status["pins"].as_str().expect("pins"));
        let mut command = Command::new("bpftool");
        command
            .args(["-j", "map", "dump", "pinned"])
            .arg(pins.join("STREAMS"));
        let output = self.pbx.output(command).expect("bpftool");
        let dump: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let entries = dump.as_array().expect("entries");
        entries
            .iter()
            .map(|entry| {
                let port = &entry["formatted"]["key"]["local_port"];
                let port = port
                    .as_u64()
                    .unwrap_or_else(|| panic!("no port: {entry:#}"));
                u16::try_from(port).expect("a port")
            })
            .collect()
    }

    /// Waits until `list` is as wanted, and returns it.
    fn wait(&self, wanted: &str, is_so: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let list = self.list();
            if is_so(&list) {
                return list;
            }
            assert!(
                Instant::now() < deadline,
                "not within {PATIENCE:?}: {wanted}; list: {list:#?}; log:\n{}",
                self.relay.log()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until exactly these calls are known and offloaded.
    fn wait_offloaded(&self, calls: usize) -> Vec<Value> {
        self.wait(&format!("{calls} calls offloaded"), |list| {
            list.len() == calls && list.iter().all(|pair| pair["state"] == "offloaded")
        })
    }

    /// Waits until the kernel has relayed this many more packets.
    fn wait_relayed(&self, packets: u64) {
        let goal = self.relayed() + packets;
        self.wait(&format!("{packets} more packets relayed"), |_| {
            self.relayed() >= goal
        });
    }

    /// Waits until no call is known, and checks that the kernel knows none either.
    fn wait_empty(&self) {
        self.wait("no call known", <[Value]>::is_empty);
        assert_eq!(self.status()["streams"], 0);
        assert_eq!(self.map(), BTreeSet::new());
    }
}

fn entry<'a>(list: &'a [Value], bridge: &str) -> Option<&'a Value> {
    list.iter().find(|pair| pair["call"] == bridge)
}

fn state<'a>(list: &'a [Value], bridge: &str) -> Option<&'a str> {
    entry(list, bridge)?["state"].as_str()
}

fn why<'a>(list: &'a [Value], bridge: &str) -> Option<&'a str> {
    entry(list, bridge)?["why"].as_str()
}

/// What a phone must hear, whoever carries it.
fn assert_good(stream: &Stream) {
    assert!(stream.received * 100 >= stream.sent * 99, "{stream:#?}");
    assert_eq!((stream.duplicates, stream.reordered), (0, 0), "{stream:#?}");
    assert!(stream.received <= stream.sent, "{stream:#?}");
}

fn assert_checksums(recording: &Recording) {
    assert_eq!(recording.verify().wrong, [""; 0]);
}

#[test]
fn twenty_calls_go_through_the_kernel_and_nobody_hears_it() {
    twenty_calls(NATIVE);
}

#[test]
fn twenty_calls_go_through_traffic_control_and_nobody_hears_it() {
    twenty_calls(TC);
}

fn twenty_calls(mode: &str) {
    let _alone = alone();
    let lab = Lab::up().expect("Asterisk");
    let attached = Attached::to(&lab, mode);
    let capture = Capture::start(&lab.net.phones_interface).expect("capture");
    lab.call(20, 20, "2000", CALLER).expect("calls");
    let pairs = lab.wait_calls(20, PATIENCE).expect("calls up");
    attached.wait_offloaded(20);
    assert_eq!(attached.map().len(), 40);

    // While offloaded: the kernel's share before that of Asterisk, so that a moment between the two looks counts
    // against us.
    let received = lab.received().expect("counters");
    let relayed = attached.relayed();
    attached.wait_relayed(20 * RATE * 12);
    let relayed = attached.relayed() - relayed;
    let received = lab.received().expect("the calls still stand") - received;
    assert_eq!(lab.legs().expect("legs").len(), 40, "the calls still stand");
    assert!(
        received * 100 < relayed,
        "{received} of {relayed} went through Asterisk"
    );

    // The calls' own time limit ends them.
    lab.wait_over(PATIENCE).expect("calls over");
    attached.wait_empty();
    let recording = capture.stop().expect("a capture without drops");
    assert_checksums(&recording);
    let streams = streams(&recording, &pairs);
    assert_eq!(streams.len(), 40);
    for stream in &streams {
        assert_good(stream);
        assert_eq!(stream.missing, 0, "{stream:#?}");
        // 20 s, less what came before the call was offloaded.
        assert!(stream.expedited > 850, "{stream:#?}");
    }
    let expedited: u64 = streams.iter().map(|stream| stream.expedited).sum();
    assert_eq!(expedited, attached.relayed(), "EF and the kernel");
    attached.relay.stop().expect("a clean end");
}

/// Extension, caller, how many calls make the scenario, and words that `list` says of it.
const NEVER: [(&str, &str, u32, &[&str]); 10] = [
    ("2100", CALLER, 1, &["simple_bridge", "DTMF features"]), // Dial tT
    ("2200", CALLER, 1, &["simple_bridge", "recording"]),     // MixMonitor
    ("2300", CALLER, 1, &["transcoding", "ulaw", "alaw"]),
    (
        "2400",
        CALLER,
        1,
        &["leg A (PJSIP/callee-srtp-", "encrypted"],
    ), // SRTP on a leg
    ("2700", CALLER, 2, &["a pair is two"]), // ConfBridge, with its announcer
    ("2800", CALLER, 1, &["simple_bridge", "DTMF mode"]), // RFC 4733, SIP INFO
    ("2900", CALLER, 1, &["simple_bridge", "packet length"]), // 20 ms, 40 ms
    ("3500", CALLER, 1, &["simple_bridge", "jitter buffer"]), // jitter buffer
    ("3600", CALLER, 1, &["simple_bridge", "TALK_DETECT"]), // TALK_DETECT
    ("3700", CALLER, 1, &["simple_bridge", "VOLUME"]), // VOLUME
];

/// All calls of [`NEVER`] at once, a direct one and a plain one, as the phones had them.
struct Scenarios {
    /// Each call of [`NEVER`], by its extension.
    never: HashMap<&'static str, [Leg; 2]>,
    plain: [Leg; 2],
    direct: [Leg; 2],
    recording: Recording,
    /// What the phones of the direct call received meanwhile.
    direct_received: Vec<u64>,
}

impl Scenarios {
    /// `look` is called again and again while they run.
    fn run(lab: &Lab, mut look: impl FnMut(&HashMap<&'static str, [Leg; 2]>, &[Leg; 2])) -> Self {
        let mut never = HashMap::new();
        let mut known = Vec::<String>::new();
        // One after the other, so that each is told from the others by being new.
        let mut place = |calls, extension: &str, caller| {
            lab.call(calls, 300, extension, caller).expect("call");
            let deadline = Instant::now() + PATIENCE;
            loop {
                let mut pairs = lab.pairs().expect("pairs");
                pairs.retain(|pair| !known.contains(&pair[0].bridge));
                // Under direct media Asterisk hears nobody.
                let heard = |pair: &[Leg; 2]| pair.iter().all(|leg| leg.received > 0);
                if let Some(pair) = pairs.pop_if(|pair| caller != CALLER || heard(pair)) {
                    known.push(pair[0].bridge.clone());
                    return pair;
                }
                assert!(
                    Instant::now() < deadline,
                    "{extension} is not up: {}",
                    lab.log()
                );
                thread::sleep(Duration::from_millis(20));
            }
        };
        for (extension, caller, calls, _) in NEVER {
            never.insert(extension, place(calls, extension, caller));
        }
        let plain = place(1, "2000", CALLER);
        let direct = place(1, "3900", "caller-dm");
        let direct_phones = || -> Vec<Leg> {
            let mut legs = lab.phone_legs().expect("phones");
            legs.retain(|leg| leg.remote.ip() != lab.ami().ip());
            legs
        };
        let deadline = Instant::now() + PATIENCE;
        while direct_phones().len() < 2 {
            assert!(Instant::now() < deadline, "no direct media: {}", lab.log());
            thread::sleep(Duration::from_millis(20));
        }
        let before = direct_phones();
        let capture = Capture::start(&lab.net.phones_interface).expect("capture");
        // Sent and received, for about 6 s.
        let packets = 6 * 2 * RATE as usize * (NEVER.len() + 1);
        let mut turn = || {
            look(&never, &direct);
            capture.wait(Duration::from_millis(100), |frames| {
                frames
                    .iter()
                    .filter(|frame| frame.bytes.len() > 200)
                    .count()
                    > packets
            })
        };
        let deadline = Instant::now() + PATIENCE;
        while turn().is_err() {
            assert!(Instant::now() < deadline, "the phones are silent");
        }
        let recording = capture.stop().expect("a capture without drops");
        let after = direct_phones();
        let direct_received = before
            .iter()
            .zip(&after)
            .map(|(before, after)| after.received - before.received)
            .collect();
        lab.hang_up_all().expect("hang up");
        Self {
            never,
            plain,
            direct,
            recording,
            direct_received,
        }
    }
}

#[test]
fn what_asterisk_must_see_stays_with_asterisk_and_sounds_as_before() {
    let _alone = alone();
    let lab = Lab::up().expect("Asterisk");
    let without = Scenarios::run(&lab, |_, _| ());
    let attached = Attached::to(&lab, NATIVE);
    let earlier = Cell::new(0);
    let look = |never: &HashMap<_, [Leg; 2]>, direct: &[Leg; 2]| {
        let relayed = attached.relayed();
        let list = attached.wait("every call judged", |list| {
            let direct = |pair: &Value| {
                let said = pair["why"].as_str();
                said.is_some_and(|said| said.contains("direct media"))
            };
            list.len() == NEVER.len() + 2
                && list.iter().any(|pair| pair["state"] == "offloaded")
                && list.iter().any(direct)
        });
        let map = attached.map();
        for (extension, _, _, why) in NEVER {
            let pair = entry(&list, &never[extension][0].bridge).expect("listed");
            assert_eq!(pair["state"], "refused", "{extension}: {pair:#}");
            let said = pair["why"].as_str().expect("words");
            for word in why {
                assert!(said.contains(word), "{extension}: {said}");
            }
        }
        let ports: BTreeSet<u16> = never
            .values()
            .chain([direct])
            .flatten()
            .map(|leg| leg.local.port())
            .collect();
        assert_eq!(map.intersection(&ports).count(), 0, "{map:?} {ports:?}");
        // Whatever the kernel relayed was of the plain call, which goes on meanwhile.
        let plain = list.iter().filter(|pair| pair["state"] == "offloaded");
        let plain = plain.flat_map(|pair| pair["streams"].as_array().expect("streams"));
        let plain: u64 = plain.filter_map(|stream| stream["packets"].as_u64()).sum();
        assert!(
            plain >= relayed - earlier.get(),
            "{plain} of {relayed}: {list:#?}"
        );
    };
    // A gap that the machine makes on its own does not come again.
    let mut attempts = 3;
    loop {
        attempts -= 1;
        earlier.set(attached.relayed());
        let with = Scenarios::run(&lab, look);
        attached.wait_empty();
        let gaps = compare(&without, &with);
        if gaps.is_empty() {
            break;
        }
        assert!(attempts > 0, "{gaps:#?}");
    }
    attached.relay.stop().expect("a clean end");
}

/// Checks that the phones had all they had before, and returns the streams whose longest gap is longer.
fn compare(without: &Scenarios, with: &Scenarios) -> Vec<(&'static str, Stream)> {
    assert_checksums(&with.recording);
    // The plain call between them shows that the relay was at work, and that all its work was on this one.
    let plain = streams(&with.recording, std::slice::from_ref(&with.plain));
    for stream in &plain {
        assert_good(stream);
        assert_eq!(stream.missing, 0, "{stream:#?}");
        assert!(stream.expedited > 250, "{stream:#?}");
    }
    let mut gaps = Vec::new();
    for (extension, ..) in NEVER {
        let measure = |run: &Scenarios| {
            let pair = std::slice::from_ref(&run.never[extension]);
            streams(&run.recording, pair)
        };
        for (before, after) in measure(without).iter().zip(measure(with)) {
            assert_eq!(after.expedited, 0, "{extension} in the kernel: {after:#?}");
            assert!(after.received > 150, "{extension}: {after:#?}");
            assert!(
                after.share() > before.share() - 0.02,
                "{extension}: {before:#?} {after:#?}"
            );
            assert_eq!(
                (after.duplicates, after.missing),
                (before.duplicates, before.missing),
                "{extension}: {before:#?} {after:#?}"
            );
            // Two packets of 40 ms: what a busy machine adds to a gap is no fault of ours.
            let bound = Duration::from_millis(80)
                .max(before.largest_gap)
                .max(after.largest_pause + Duration::from_millis(60));
            if after.largest_gap > bound {
                gaps.push((extension, after));
            }
        }
    }
    assert_eq!(with.direct[0].received, 0);
    for (before, after) in without.direct_received.iter().zip(&with.direct_received) {
        assert!(
            *after as f64 > *before as f64 * 0.8,
            "{before} then {after}"
        );
    }
    gaps
}

/// A call that is up and offloaded, with a capture of it.
struct Offloaded {
    lab: Lab,
    attached: Attached,
    manager: Client,
    capture: Capture,
    pair: [Leg; 2],
    /// Another call, which Asterisk carries all the time: how busy the machine is.
    control: [Leg; 2],
    /// Packets relayed before the last action.
    relayed: u64,
}

impl Offloaded {
    fn up(mode: &str) -> Self {
        let lab = Lab::up().expect("Asterisk");
        let attached = Attached::to(&lab, mode);
        let manager = lab.manager().expect("manager");
        let capture = Capture::start(&lab.net.phones_interface).expect("capture");
        lab.call(1, 120, "2100", CALLER).expect("call");
        let pairs = lab.wait_calls(1, PATIENCE).expect("call up");
        let [control] = pairs.try_into().expect("one call");
        lab.call(1, 120, "2000", CALLER).expect("call");
        let mut pairs = lab.wait_calls(2, PATIENCE).expect("calls up");
        pairs.retain(|pair| pair[0].bridge != control[0].bridge);
        let [pair] = pairs.try_into().expect("one more call");
        attached.wait("the call offloaded", |list| {
            state(list, &pair[0].bridge) == Some("offloaded")
        });
        Self {
            lab,
            attached,
            manager,
            capture,
            pair,
            control,
            relayed: 0,
        }
    }

    fn do_to(&mut self, leg: usize, action: &str, fields: &[(&str, &str)]) {
        let mut all = vec![("Channel", self.pair[leg].channel.as_str())];
        all.extend(fields);
        self.relayed = self.attached.relayed();
        self.manager.action(action, &all).expect(action);
    }

    /// RTP packets of this call that Asterisk has received itself, on both legs and on the busier one.
    fn received(&self) -> (u64, u64) {
        let mut legs = self.lab.legs().expect("counters");
        legs.retain(|leg| leg.bridge == self.pair[0].bridge);
        let counts = legs.iter().map(|leg| leg.received);
        (counts.clone().sum(), counts.max().unwrap_or(0))
    }

    /// Waits until `list` refuses the call with this word.
    fn wait_refused(&self, word: &str) {
        let bridge = &self.pair[0].bridge;
        self.attached.wait(word, |list| {
            state(list, bridge) == Some("refused")
                && why(list, bridge).is_some_and(|said| said.contains(word))
        });
    }

    /// Waits until the call is Asterisk's with this word, and has been for 2 s; nothing is relayed then.
    fn assert_taken_back(&self, word: &str) {
        self.wait_refused(word);
        assert_eq!(self.attached.map(), BTreeSet::new());
        let relayed = self.attached.relayed();
        // An event did that, at once, and not the next look at all calls.
        let late = relayed - self.relayed;
        assert!(late < RATE, "{late} packets relayed past Asterisk");
        let goal = self.received().0 + 2 * RATE;
        self.attached
            .wait("Asterisk hears the phones", |_| self.received().0 >= goal);
        assert_eq!(self.attached.relayed(), relayed);
    }

    /// Waits until the call is the kernel's again, and has been for 1 s.
    fn assert_offloaded_again(&self) {
        self.attached.wait("offloaded again", |list| {
            state(list, &self.pair[0].bridge) == Some("offloaded")
        });
        self.attached.wait_relayed(RATE);
    }

    /// Ends the calls and returns the streams of this one and of the other.
    fn over(self) -> (Vec<Stream>, Vec<Stream>) {
        self.lab.hang_up_all().expect("hang up");
        self.attached.wait_empty();
        let recording = self.capture.stop().expect("a capture without drops");
        assert_checksums(&recording);
        self.attached.relay.stop().expect("a clean end");
        (
            streams(&recording, &[self.pair]),
            streams(&recording, &[self.control]),
        )
    }
}

#[test]
fn a_recording_takes_the_call_back_and_its_end_offloads_it_again() {
    let _alone = alone();
    let mut call = Offloaded::up(TC);
    for turn in 0..3 {
        let path = format!("/lab/spool/monitor/{turn}.wav");
        call.attached.wait_relayed(RATE);
        let (_, before) = call.received();
        call.do_to(turn % 2, "MixMonitor", &[("File", &path)]);
        call.assert_taken_back("simple_bridge");
        call.do_to(turn % 2, "StopMixMonitor", &[]);
        call.assert_offloaded_again();
        let file = call.lab.file(&path).expect("the recording");
        // 16-bit samples at 8 kHz, and as much of them as Asterisk heard of either phone.
        let recorded = file.len() as u64 / 320;
        let heard = call.received().1 - before;
        assert!(
            recorded.abs_diff(heard) <= 15 && recorded > RATE / 2,
            "{recorded} packets recorded, {heard} heard"
        );
    }
    let (streams, control) = call.over();
    let busy = control.iter().map(|stream| stream.largest_gap).max();
    let busy = busy.expect("two streams");
    for stream in streams {
        assert_good(&stream);
        // Asterisk changes the SSRC for as long as it records, so the sequence numbers tell nothing; the end of the
        // call may cut off a packet on its way.
        assert!(stream.sent - stream.received <= 2, "{stream:#?}");
        // What the phones themselves pause, and what holds up Asterisk's other call, is the machine's.
        let machine = busy.max(stream.largest_pause) + Duration::from_millis(20);
        assert!(
            stream.largest_gap <= Duration::from_millis(60).max(machine),
            "{stream:#?} {busy:?}"
        );
    }
}

/// The phones' channel at the other end of this leg.
fn phone(lab: &Lab, leg: &Leg) -> String {
    let legs = lab.phone_legs().expect("phones");
    let phone = legs.iter().find(|phone| phone.remote == leg.local);
    phone
        .unwrap_or_else(|| panic!("nobody at {leg:?}: {legs:#?}"))
        .channel
        .clone()
}

#[test]
fn mute_and_hold_take_the_call_back_and_their_ends_offload_it_again() {
    let _alone = alone();
    let mut call = Offloaded::up(NATIVE);
    call.do_to(0, "MuteAudio", &[("Direction", "in"), ("State", "on")]);
    call.assert_taken_back("simple_bridge");
    call.do_to(0, "MuteAudio", &[("Direction", "in"), ("State", "off")]);
    call.assert_offloaded_again();

    let mut phones = call.lab.phones_manager().expect("phones");
    let leg = call.pair.iter().find(|leg| leg.channel.contains(CALLER));
    let leg = leg.expect("the caller's leg");
    // The callee's name is the first in order.
    let on_hold = format!("leg B ({}) is on hold", leg.channel);
    let caller = phone(&call.lab, leg);
    let mut go = |extension| {
        let fields = [
            ("Channel", caller.as_str()),
            ("Context", "caller"),
            ("Exten", extension),
            ("Priority", "1"),
        ];
        phones.action("Redirect", &fields).expect("redirect");
    };
    go("hold");
    call.wait_refused(&on_hold);
    assert_eq!(call.attached.map(), BTreeSet::new());
    // The phone on hold gets Asterisk's music, which needs Asterisk.
    let relayed = call.attached.relayed();
    let goal = call.received().0 + RATE / 2;
    call.attached
        .wait("Asterisk hears the phones", |_| call.received().0 >= goal);
    assert_eq!(call.attached.relayed(), relayed);
    go("talk");
    call.assert_offloaded_again();
    call.over();
}

#[test]
fn digits_pass_complete_and_in_order_while_the_voice_is_offloaded() {
    let _alone = alone();
    let call = Offloaded::up(TC);
    let mut phones = call.lab.phones_manager().expect("phones");
    let from = call.pair.iter().find(|leg| leg.channel.contains(CALLER));
    let from = from.expect("the caller's leg");
    let to = call.pair.iter().find(|leg| leg.channel != from.channel);
    let to = to.expect("the callee's leg");
    let (sender, receiver) = (phone(&call.lab, from), phone(&call.lab, to));
    let relayed = call.attached.relayed();
    phones
        .action(
            "Redirect",
            &[
                ("Channel", &sender),
                ("Context", "caller"),
                ("Exten", "dtmf"),
                ("Priority", "1"),
            ],
        )
        .expect("redirect");
    let digits: String = (0..4)
        .map(|_| {
            let is_end = |event: &Message| {
                event.is_event("DTMFEnd")
                    && event.get("Channel") == Some(&receiver)
                    && event.get("Direction") == Some("Received")
            };
            let end = phones.wait_event(PATIENCE, is_end).expect("a digit");
            let list = call.attached.list();
            let state = state(&list, &call.pair[0].bridge);
            assert_eq!(state, Some("offloaded"), "{list:#?}");
            end.get("Digit").expect("its name").to_owned()
        })
        .collect();
    assert_eq!(digits, "159#");
    call.attached.wait_relayed(RATE);
    assert!(call.attached.relayed() - relayed > RATE);

    // Every packet of every digit, in order: (event, end, timestamp).
    let (from, to) = (from.clone(), to.clone());
    let voice = 0;
    call.lab.hang_up_all().expect("hang up");
    let recording = call.capture.stop().expect("a capture without drops");
    assert_checksums(&recording);
    let events = |direction, source, destination| -> Vec<(u8, bool, u32, u16)> {
        recording
            .datagrams()
            .filter(|(frame, datagram)| {
                frame.direction == direction
                    && (datagram.source, datagram.destination) == (source, destination)
            })
            .filter_map(|(_, datagram)| {
                let (rtp, payload) = Rtp::parse(datagram.payload)?;
                let event = rtp.payload_type != voice && payload.len() == 4;
                event.then(|| {
                    (
                        payload[0],
                        payload[1] & 0x80 != 0,
                        rtp.timestamp,
                        rtp.sequence,
                    )
                })
            })
            .collect()
    };
    let sent = events(Direction::Out, from.remote, from.local);
    assert!(sent.len() > 4 * 3, "{sent:?}");
    assert_eq!(events(Direction::In, to.local, to.remote), sent);
}

#[test]
fn a_user_who_may_not_ask_or_see_is_refused_with_the_remedy() {
    let _alone = alone();
    let lab = Lab::up().expect("Asterisk");
    for (user, lack, right) in [
        ("watcher", "Permission denied", "write=call"),
        ("asker", "no VarSet event", "read=call,dialplan"),
    ] {
        let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN").expect("relay-user"));
        command
            .args(["attach", &lab.net.pbx_interface.name])
            .args(feed(&lab, user));
        let output = lab.net.pbx.run_to_end(command).expect("relay-user");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{said}");
        for words in [user, lack, right, "manager.conf"] {
            assert!(said.contains(words), "{words}: {said}");
        }
    }
    // Nothing half-done.
    let mut command = Command::new("ip");
    command.args(["-o", "link", "show", "dev", &lab.net.pbx_interface.name]);
    let link = lab.net.pbx.output(command).expect("ip");
    assert!(!String::from_utf8_lossy(&link.stdout).contains("xdp"));
    assert!(lab.net.pbx.run(|| !Path::new("/sys/fs/bpf/relay").exists()));
}

#[test]
fn a_crash_of_asterisk_takes_everything_back_and_its_return_offloads_again() {
    let _alone = alone();
    let mut lab = Lab::up().expect("Asterisk");
    let attached = Attached::to(&lab, TC);
    lab.call(5, 300, "2000", CALLER).expect("calls");
    attached.wait_offloaded(5);
    attached.wait_relayed(5 * RATE);
    lab.crash().expect("killed");
    attached.wait_empty();
    let status = attached.status();
    assert_eq!(status["ami"]["state"], "down", "{status:#}");
    assert!(status["ami"]["cause"].is_string(), "{status:#}");
    // The phones do not know yet, and go on; nobody relays it.
    let relayed = attached.relayed();
    let capture = Capture::start(&lab.net.phones_interface).expect("capture");
    capture
        .wait(PATIENCE, |frames| frames.len() as u64 > 5 * RATE)
        .expect("the phones go on");
    drop(capture);
    assert_eq!(attached.relayed(), relayed);

    lab.restart().expect("Asterisk again");
    lab.call(3, 300, "2000", CALLER).expect("calls");
    attached.wait_offloaded(3);
    attached.wait_relayed(3 * RATE);
    let status = attached.status();
    assert_eq!(status["ami"]["state"], "up", "{status:#}");
    lab.hang_up_all().expect("hang up");
    attached.wait_empty();
    attached.relay.stop().expect("a clean end");
}

#[test]
fn a_plain_call_is_native_and_a_transcoded_one_is_not() {
    let _alone = alone();
    let lab = Lab::up().expect("Asterisk");
    let capture = Capture::start(&lab.net.phones_interface).expect("capture");
    lab.call(2, 8, "2000", CALLER).expect("calls");
    let pairs = lab.wait_calls(2, PATIENCE).expect("calls up");
    lab.wait_technology(2, "native_rtp", PATIENCE)
        .expect("native");
    let before = lab.received().expect("counters");
    // The calls' own time limit ends them.
    lab.wait_over(PATIENCE).expect("calls over");
    assert!(before > 0);
    let recording = capture.stop().expect("a capture without drops");
    assert_eq!(recording.verify().wrong, [""; 0]);
    let native = streams(&recording, &pairs);
    assert_eq!(native.len(), 4);
    for stream in &native {
        assert!(stream.sent > 200, "{stream:#?}");
        assert!(stream.received * 100 >= stream.sent * 95, "{stream:#?}");
        assert_eq!(stream.unchanged, stream.received, "{stream:#?}");
        assert_eq!(stream.missing, 0, "{stream:#?}");
        assert_eq!((stream.duplicates, stream.reordered), (0, 0), "{stream:#?}");
    }

    let capture = Capture::start(&lab.net.phones_interface).expect("capture");
    lab.call(1, 60, "2300", CALLER).expect("call");
    let pairs = lab.wait_calls(1, PATIENCE).expect("call up");
    lab.wait_technology(1, "simple_bridge", PATIENCE)
        .expect("transcoding");
    capture
        .wait(PATIENCE, |frames| {
            frames
                .iter()
                .filter(|frame| frame.bytes.len() > 200)
                .count()
                > 600
        })
        .expect("media");
    lab.hang_up_all().expect("hang up");
    let transcoded = streams(&capture.stop().expect("a capture without drops"), &pairs);
    assert_eq!(transcoded.len(), 2);
    for stream in &transcoded {
        assert!(stream.received * 100 >= stream.sent * 95, "{stream:#?}");
        assert_eq!(stream.unchanged, 0, "another codec: {stream:#?}");
    }
}

#[test]
fn the_least_privileged_user_sees_what_the_relay_needs() {
    let _alone = alone();
    let lab = Lab::up().expect("Asterisk");
    let mut client = Client::login(&lab.net.pbx, lab.ami(), USER, SECRET).expect("login");
    lab.call(1, 60, "2000", CALLER).expect("call");
    client
        .wait_event(PATIENCE, |event| event.is_event("BridgeEnter"))
        .expect("bridge events");
    client
        .wait_event(PATIENCE, |event| event.is_event("VarSet"))
        .expect("variable events");
    let pairs = lab.wait_calls(1, PATIENCE).expect("call up");
    for leg in &pairs[0] {
        let fields = [
            ("Channel", leg.channel.as_str()),
            ("Variable", "CHANNEL(rtp,dest)"),
        ];
        let answer = client.action("Getvar", &fields).expect("Getvar");
        assert_eq!(
            answer[0].get("Value"),
            Some(leg.remote.to_string().as_str())
        );
    }
    // The timeout of an endpoint, which is "0" where none is set.
    let rtp_timeout = |client: &mut Client, endpoint: &str| {
        let variable = format!("PJSIP_ENDPOINT({endpoint},rtp_timeout)");
        let answer = client.action("Getvar", &[("Variable", &variable)]);
        let answer = answer.expect("Getvar");
        answer[0].get("Value").map(str::to_owned)
    };
    assert_eq!(rtp_timeout(&mut client, CALLER).as_deref(), Some("0"));
    assert_eq!(rtp_timeout(&mut client, "caller-to").as_deref(), Some("10"));
    client
        .action("Command", &[("Command", "core show version")])
        .expect_err("no more than that");
    assert!(
        lab.cli("core show version")
            .expect("CLI")
            .contains("Asterisk 22")
    );
    lab.hang_up_all().expect("hang up");
    client
        .wait_event(PATIENCE, |event| event.is_event("Hangup"))
        .expect("the end");
}
