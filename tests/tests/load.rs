//! A thousand calls come and go, fifty a second: each is offloaded in time, and nothing of them stays.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use relay_common::stream::{Stream, StreamKey};
use relay_tests::{
    pbx::{self, Pbx},
    phone::{Bank, PACKET_TIME, Phone, Report, Talk},
    relay::{Followed, Relay, ami_arguments},
    topology::{Direct, PBX_V4},
};
use relay_user::datapath::names;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
const CALLS: usize = 1000;
/// Between the beginnings of two calls.
const SPACING: Duration = Duration::from_millis(20);
/// How long a call lives.
const LIFE: Duration = Duration::from_secs(3);
/// Packets of a stream that may go through the PBX before it is offloaded, in 99 of 100 streams: half a second. The
/// phones may send from the first on, so every packet counts, those too that no controller could have known of.
const PACKETS_MAX: u64 = (500 / PACKET_TIME.as_millis()) as u64;
/// What the kernel marks and neither phones nor PBX do.
const EF_TOS: u8 = 46 << 2;
/// Addresses of phones. Each call has a port of its own at two of them.
const ADDRESSES: u8 = 50;

/// Two phones in a call, both talking.
struct Call {
    line: pbx::Call,
    phones: [Phone; 2],
    since: Instant,
}

/// How a stream fared.
struct Course {
    /// None where the kernel relayed nothing of it.
    relayed: Option<Relayed>,
    report: Report,
}

/// The first packet of a stream that the kernel relayed.
#[derive(Clone, Copy)]
struct Relayed {
    /// Packets of the stream before it.
    before: u64,
    /// How long after the stream's first packet it arrived.
    after: Duration,
}

impl Course {
    fn of(from: &Phone, to: &Phone) -> Self {
        let received = to.received_from(from);
        let relayed = received.iter().find(|(_, arrival)| arrival.tos == EF_TOS);
        Self {
            relayed: relayed.map(|(number, arrival)| Relayed {
                before: *number,
                after: arrival.at.saturating_sub(received[0].1.at),
            }),
            report: to.heard(from),
        }
    }
}

impl Call {
    fn begin(pbx: &Pbx, bank: &Bank, number: usize) -> Self {
        // Two different addresses, and no port twice while a call may have it.
        let port = 30_000 + 2 * (number % 10_000) as u16;
        let first = number as u8 % ADDRESSES;
        let phones = [first, (first + 1) % ADDRESSES].map(|phone| {
            let local = SocketAddr::new(Direct::phone_v4(phone), port);
            bank.phone(local).expect("phone")
        });
        let line = pbx.call(phones[0].local(), phones[1].local());
        let line = line.expect("call");
        for (phone, (local, ssrc)) in phones.iter().zip(line.local.into_iter().zip([1, 2])) {
            phone.talk(Talk::to(local, ssrc));
        }
        Self {
            line,
            phones,
            since: Instant::now(),
        }
    }

    /// Both phones fall silent, and when all has arrived the call ends. How its two streams fared.
    fn end(self, pbx: &Pbx) -> [Course; 2] {
        let [caller, callee] = &self.phones;
        [caller, callee].into_iter().for_each(Phone::hush);
        for [from, to] in [[caller, callee], [callee, caller]] {
            let all = usize::try_from(from.sent()).expect("a count");
            // What is lost never comes, and the report tells it better.
            let _ = to.wait_received(all, Duration::from_secs(2));
        }
        pbx.hang_up(self.line).expect("hang up");
        [Course::of(caller, callee), Course::of(callee, caller)]
    }
}

/// Entries of the kernel's own map of streams.
fn entries(net: &Direct, pins: &Path) -> usize {
    net.pbx.run(|| {
        let map = MapData::from_pin(pins.join(names::STREAMS)).expect("a pinned map");
        let streams: HashMap<_, [u8; size_of::<StreamKey>()], [u8; size_of::<Stream>()]> =
            Map::HashMap(map).try_into().expect("streams");
        streams.keys().count()
    })
}

/// Waits until the relay knows of no call, and returns its status.
fn await_empty(relay: &Relay) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = relay.json(["status"]).expect("status");
        if status["pairs"] == 0 {
            return status;
        }
        let late = Instant::now() > deadline;
        assert!(!late, "not empty: {status:#}\n{}", relay.log());
        thread::sleep(Duration::from_millis(10));
    }
}

/// The middle, the 99th of 100, and the largest.
fn quantiles<T: Copy + Ord>(mut values: Vec<T>) -> [T; 3] {
    values.sort_unstable();
    let last = values.len() - 1;
    [last / 2, last * 99 / 100, last].map(|index| values[index])
}

/// Milliseconds of the day of an event.
fn milliseconds(event: &Value) -> u64 {
    let time = event["time"].as_str().expect("a time");
    // 2026-01-31T23:59:59.999Z
    let number = |at: usize, length| time[at..at + length].parse::<u64>().expect("a number");
    ((number(11, 2) * 60 + number(14, 2)) * 60 + number(17, 2)) * 1000 + number(20, 3)
}

/// All events until the daemon ends: how many of each kind, and milliseconds from `watching` to `offloaded`.
fn tally(events: &Followed) -> (BTreeMap<String, usize>, Vec<u64>) {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    let (mut kinds, mut watching, mut times) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    while let Some(event) = events.next().expect("an event") {
        let kind = event["kind"].as_str().expect("a kind").to_owned();
        let stream = (event["pair"].as_u64(), event["stream"].as_u64());
        match kind.as_str() {
            "watching" => drop(watching.insert(stream, milliseconds(&event))),
            "offloaded" => {
                let since = watching.remove(&stream);
                times.extend(since.map(|since| (milliseconds(&event) + DAY - since) % DAY));
            }
            _ => {}
        }
        *kinds.entry(kind).or_default() += 1;
    }
    (kinds, times)
}

/// Resident memory of a process, as the kernel tells it.
fn memory(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.expect("a size").to_owned()
}

#[test]
fn a_thousand_calls_at_fifty_a_second_are_offloaded_in_time_and_leave_nothing() {
    let net = Direct::new(ADDRESSES).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let bank = Bank::new(&net.phones).expect("phones");
    let args = ami_arguments(pbx.ami(), pbx::USER, pbx.secret_file());
    let relay = Relay::attach(&net.pbx, "eth0", args).expect("relay-user attach");
    let events = relay.follow().expect("events");
    let tallying = thread::spawn(move || tally(&events));
    let memory_before = memory(relay.id());

    let start = Instant::now();
    let mut calls = VecDeque::new();
    let mut courses = Vec::new();
    let mut most = 0;
    for number in 0..CALLS {
        // By the clock, so that a call that begins late does not delay the next ones.
        let due = start + SPACING * number as u32;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        calls.push_back(Call::begin(&pbx, &bank, number));
        most = most.max(calls.len());
        while calls
            .front()
            .is_some_and(|call| call.since.elapsed() >= LIFE)
        {
            let call = calls.pop_front().expect("one in front");
            courses.extend(call.end(&pbx));
        }
    }
    let took = start.elapsed();
    for call in calls {
        thread::sleep((call.since + LIFE).saturating_duration_since(Instant::now()));
        courses.extend(call.end(&pbx));
    }

    let status = await_empty(&relay);
    let list = relay.json(["list"]).expect("list");
    assert_eq!(list["pairs"].as_array().map(Vec::len), Some(0), "{list:#}");
    let pins = Path::new(status["pins"].as_str().expect("a folder"));
    assert_eq!(entries(&net, pins), 0);
    println!(
        "{CALLS} calls begun in {took:?}, up to {most} at a time; daemon: {} (before: {memory_before}), {:?} of CPU; PBX: {:?} of CPU",
        memory(relay.id()),
        relay.cpu_time().expect("a daemon"),
        pbx.cpu_time().expect("a PBX"),
    );
    assert_eq!(status["refusals"], Value::Array(Vec::new()));
    relay.stop().expect("a clean end");

    let (kinds, times) = tallying.join().expect("events");
    println!(
        "watching to offloaded, ms: p50, p99, max {:?}",
        quantiles(times)
    );
    println!("events: {kinds:?}");
    let streams = 2 * CALLS;
    // On a busy machine a stream may be suspended and proven again.
    let told = |kind| kinds.get(kind).copied().unwrap_or_default();
    assert!(told("offloaded") >= streams, "{kinds:?}");
    assert_eq!(told("taken_back"), CALLS, "{kinds:?}");
    assert_eq!(told("refused") + told("lagged"), 0, "{kinds:?}");

    assert_eq!(courses.len(), streams);
    for Course { report, .. } in &courses {
        let faults = [report.lost, report.duplicates, report.foreign];
        assert_eq!(faults, [0; 3], "{report:?}");
    }
    let disorder: u64 = courses.iter().map(|course| course.report.reordered).sum();
    println!("{disorder} packets out of order");
    let relayed = |course: &Course| course.relayed;
    let relayed: Vec<_> = courses.iter().filter_map(relayed).collect();
    assert_eq!(relayed.len(), streams, "some never went through the kernel");
    let times = relayed.iter().map(|relayed| relayed.after).collect();
    println!(
        "first packet to first relayed: p50, p99, max {:?}",
        quantiles(times)
    );
    let packets = quantiles(relayed.iter().map(|relayed| relayed.before).collect());
    println!("packets through the PBX before that: p50, p99, max {packets:?}");
    assert!(packets[1] <= PACKETS_MAX, "p50, p99, max: {packets:?}");
}
