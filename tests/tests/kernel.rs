//! The per-packet decision in the kernel, by `BPF_PROG_TEST_RUN`: the fixtures, and random packets whose bytes, verdict,
//! counters and state must be the host's. Needs root.

use std::{
    env,
    fmt::Write as _,
    fs,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use relay_common::{
    capture::{self as taken, Captured, SNAP_MAX},
    checksum::{PartialChecksum, UdpChange, udp_field},
    packet::{Frame, Header, Packet},
    proof::observe,
    reason::{Reason, Verdict},
    relay::relay,
    stream::{Counter, Event},
};
use relay_tests::{
    capture::{self, Capture, Direction, Injector},
    draft::{QINQ, VLAN},
    fixture::{self, Family, Fixture, Hook, SLOTS, offloaded, received, stream},
    generator::Generator,
    kernel::{Kernel, show, show_observer},
    namespace::Host,
    program::CHECKSUM_COMPLETE,
    tables::{Entry, MemoryTables, timeless},
    topology::Direct,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Every packet of a stream is captured, whole.
const EVERYTHING: taken::Capture = taken::Capture {
    until: u64::MAX,
    pair: 0,
    snap: SNAP_MAX as u32,
    sample: u32::MAX,
    process: 0,
    padding: [0; 4],
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
        kernel.set_lease(fixture.lease).expect("a lease");
        let program = kernel.descriptor(hook).expect("a program");
        let Some((verdict, after)) = show(program, hook, &fixture.frame, 0).expect("a run") else {
            // No kernel hands a program less than this (net/bpf/test_run.c).
            assert!(fixture.frame.len() < 14 + 40, "{what}: refused");
            continue;
        };
        shown += 1;
        assert_eq!(
            (verdict, &after[..]),
            (reason.verdict(), expected),
            "{what}"
        );
        let counters = kernel.counters().expect("counters");
        assert_eq!(counters, one(reason, fixture.frame.len()), "{what}");
        let mut relayed = (0, 0);
        for entry in &fixture.streams {
            if let Some(state) = kernel.state(entry.stream.slot).expect("state") {
                assert_eq!(state.mode(), entry.state.mode(), "{what}");
                relayed = (relayed.0 + state.packets, relayed.1 + state.bytes);
            }
        }
        let expected = match reason {
            Reason::Relayed => (1, fixture.frame.len() as u64),
            _ => (0, 0),
        };
        assert_eq!(relayed, expected, "{what}");
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

/// A host frame whose checksum is taken for finished, as TC's is in `BPF_PROG_TEST_RUN`.
struct FinishedFrame<'a>(Frame<'a>);

impl Packet for FinishedFrame<'_> {
    fn length(&self) -> usize {
        self.0.length()
    }

    fn header<H: Header>(&mut self, at: usize) -> Result<&mut H, Reason> {
        self.0.header(at)
    }

    fn partial_checksum(&self) -> PartialChecksum {
        self.0.partial_checksum()
    }

    fn copy(&self, to: &mut [u8; SNAP_MAX], most: u32) -> u32 {
        self.0.copy(to, most)
    }

    fn change_udp_checksum(&mut self, change: &UdpChange) -> Result<Option<u16>, Reason> {
        let sum = change.addresses.plus(change.datagram);
        Ok(Some(udp_field(sum.applied_to(change.old))))
    }
}

/// The decision on the host.
fn decide(hook: Hook, frame: &[u8], tables: &MemoryTables) -> (Verdict, Vec<u8>) {
    let mut after = frame.to_vec();
    let mut packet = Frame::new(&mut after, hook.partial_checksum());
    let decision = match hook {
        Hook::NativeXdp | Hook::GenericXdp => relay(&mut packet, tables),
        Hook::Tc => relay(&mut FinishedFrame(packet), tables),
    };
    (decision.verdict, after)
}

/// What a table meets, in order: packets that come in, each with what leaves after it.
struct Traffic {
    lease: u64,
    exchanges: Vec<Vec<Vec<u8>>>,
}

/// How long the frames of a [`Traffic`] may take, for the host's clock stands still meanwhile: less than between two
/// reports of one stream.
const MOMENT: Duration = Duration::from_millis(80);

/// Shows the same frames to the host and to the kernel. Returns what they added to the counters.
fn compare(
    kernel: &mut Kernel,
    hook: Hook,
    table: &[Entry],
    traffic: &Traffic,
) -> Result<[Counter; Reason::COUNT], String> {
    loop {
        let start = Instant::now();
        let compared = compare_once(kernel, hook, table, traffic);
        if compared.is_ok() || start.elapsed() < MOMENT {
            return compared;
        }
    }
}

fn compare_once(
    kernel: &mut Kernel,
    hook: Hook,
    table: &[Entry],
    traffic: &Traffic,
) -> Result<[Counter; Reason::COUNT], String> {
    kernel.set(table).expect("tables");
    kernel.set_lease(traffic.lease).expect("a lease");
    let tables = MemoryTables::new(table, SLOTS);
    tables.set_lease(traffic.lease);
    kernel.set_capture(EVERYTHING).expect("a capture");
    tables.set_capture(EVERYTHING);
    let program = kernel.descriptor(hook).expect("a program");
    let observer = kernel.observer().expect("an observer");
    for exchange in &traffic.exchanges {
        let Some((frame, leaving)) = exchange.split_first() else {
            continue;
        };
        let Some(kernels) = show(program, hook, frame, 0).expect("a run") else {
            continue;
        };
        let hosts = decide(hook, frame, &tables);
        if hosts != kernels {
            return Err(format!(
                "of frame {frame:02x?}\nthe host makes   {hosts:02x?},\nthe kernel makes {kernels:02x?}"
            ));
        }
        for frame in leaving {
            let Some(kernels) = show_observer(observer, frame).expect("a run") else {
                continue;
            };
            let reason = observe(
                &mut Frame::new(&mut frame.clone(), PartialChecksum::Kept),
                &tables,
            );
            let hosts = reason.map_or(Verdict::Pass, Reason::verdict);
            if hosts != kernels {
                return Err(format!(
                    "of frame {frame:02x?}, which leaves,\nthe host makes {reason:?}, the kernel {kernels:?}"
                ));
            }
        }
    }
    let counters = kernel.counters().expect("counters");
    if counters != tables.counters() {
        let mut text = String::new();
        for (reason, (kernels, hosts)) in Reason::ALL
            .iter()
            .zip(counters.iter().zip(tables.counters()))
        {
            let _ = writeln!(
                text,
                "{}: host {hosts:?}, kernel {kernels:?}",
                reason.name()
            );
        }
        return Err(text);
    }
    for entry in table {
        let slot = entry.stream.slot;
        let states = (
            tables.state_of(slot).map(timeless),
            kernel.state(slot).expect("state").map(timeless),
        );
        if states.0 != states.1 {
            return Err(format!(
                "state {slot}: host {:?}, kernel {:?}",
                states.0, states.1
            ));
        }
    }
    let untimed = |events: Vec<Event>| -> Vec<_> {
        let untimed = events.into_iter().map(|event| Event { time: 0, ..event });
        untimed.collect()
    };
    let hosts = untimed(tables.take_events());
    let kernels = untimed(kernel.take_events().expect("events"));
    if hosts != kernels {
        return Err(format!(
            "the host reports {hosts:#?}, the kernel {kernels:#?}"
        ));
    }
    let untimed = |captured: Vec<(Captured, Vec<u8>)>| -> Vec<_> {
        let untimed = captured
            .into_iter()
            .map(|(header, bytes)| (Captured { time: 0, ..header }, bytes));
        untimed.collect()
    };
    let hosts = untimed(tables.take_captured());
    let kernels = untimed(kernel.take_captured().expect("captured packets"));
    if hosts != kernels {
        return Err(format!(
            "the host captures {hosts:02x?}, the kernel {kernels:02x?}"
        ));
    }
    Ok(counters)
}

/// Where the random packets start: `RELAY_SEED` repeats a run.
fn first_seed() -> u64 {
    match env::var("RELAY_SEED") {
        Ok(seed) => seed.parse().expect("RELAY_SEED is a number"),
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_nanos() as u64),
    }
}

/// Random packets × random tables, until the kernel has seen this many.
const PACKETS: u64 = 100_000;

/// Packets that meet the same table.
const BATCH: usize = 128;

fn random_packets_through(hook: Hook) {
    let mut kernel = kernel(hook);
    let mut totals = [0; Reason::COUNT];
    let mut seed = first_seed();
    while totals.iter().sum::<u64>() < PACKETS {
        seed = seed.wrapping_add(1);
        let mut generator = Generator::new(seed);
        let table = generator.table(SLOTS);
        let lease = generator.lease();
        let exchanges = (0..BATCH).map(|_| generator.exchange(&table)).collect();
        let traffic = Traffic { lease, exchanges };
        match compare(&mut kernel, hook, &table, &traffic) {
            Ok(counters) => {
                for (total, counter) in totals.iter_mut().zip(counters) {
                    *total += counter.packets;
                }
            }
            Err(difference) => {
                // Alone, the first packet that makes a difference is seen as such.
                let alone = traffic.exchanges.iter().find_map(|exchange| {
                    let alone = Traffic {
                        lease,
                        exchanges: vec![exchange.clone()],
                    };
                    let difference = compare(&mut kernel, hook, &table, &alone).err()?;
                    Some(format!("{exchange:02x?}: {difference}"))
                });
                panic!(
                    "host and {hook:?} differ; RELAY_SEED={} repeats it\n{table:?}\n{}",
                    seed.wrapping_sub(1),
                    alone.unwrap_or(difference)
                );
            }
        }
    }
    // A generator that reaches nothing proves nothing.
    for (reason, total) in Reason::ALL.iter().zip(totals) {
        let enough = match reason {
            Reason::Relayed => PACKETS / 10,
            // TC asks the kernel about checksums: only IPv6 without one is left.
            Reason::UdpChecksum if hook == Hook::Tc => 0,
            // Frames come here one by one, with their tags in them.
            Reason::Aggregate | Reason::RetagFailed => 0,
            _ => 20,
        };
        assert!(
            total >= enough,
            "{hook:?}: {} only {total} times",
            reason.name()
        );
    }
}

#[test]
fn random_packets_through_native_xdp() {
    random_packets_through(Hook::NativeXdp);
}

#[test]
fn random_packets_through_generic_xdp() {
    random_packets_through(Hook::GenericXdp);
}

#[test]
fn random_packets_through_tc() {
    random_packets_through(Hook::Tc);
}

/// A NIC may hand up a sum over the whole packet; the kernel checks that it still is one after the program. Linux 6.17.
#[test]
fn tc_keeps_a_sum_over_the_whole_packet() {
    let mut kernel = kernel(Hook::Tc);
    // The kernel takes what follows Ethernet's header for the network header, tags as well.
    for fixture in fixture::all() {
        let Some((Reason::Relayed, expected)) = fixture.expected(Hook::Tc) else {
            continue;
        };
        let what = &fixture.description;
        kernel.set(&fixture.streams).expect("tables");
        let program = kernel.descriptor(Hook::Tc).expect("a program");
        let Some((verdict, after)) = show(program, Hook::Tc, &fixture.frame, CHECKSUM_COMPLETE)
            .unwrap_or_else(|error| panic!("{what}: {error:#}"))
        else {
            eprintln!("skipped: this kernel's BPF_PROG_TEST_RUN has no CHECKSUM_COMPLETE");
            return;
        };
        assert_eq!((verdict, &after[..]), (Verdict::Send, expected), "{what}");
    }
}

/// The kernel takes the outermost tag off a frame before traffic control sees it, but not off those of
/// `BPF_PROG_TEST_RUN`.
#[test]
fn tags_are_replaced_beside_the_frame() {
    let net = Direct::new(1).expect("network");
    let mut kernel = kernel(Hook::Tc);
    net.pbx
        .run(|| kernel.attach_tc("eth0"))
        .expect("attached to traffic control");
    let injector = Injector::open(&net.phones_interface).expect("injector");
    let capture = Capture::start(&net.phones_interface).expect("capture");
    let tagged = |fixture: &Fixture| {
        let tag = fixture.frame.get(12..14);
        [VLAN, QINQ]
            .iter()
            .any(|tpid| tag == Some(&tpid.to_be_bytes()))
    };
    let mut shown = [0, 0];
    for fixture in fixture::all().iter().filter(|fixture| tagged(fixture)) {
        let Some((reason, expected)) = fixture.expected(Hook::Tc) else {
            continue;
        };
        // Whoever announces a tag and has none does not get as far (skb_vlan_untag() in net/core/skbuff.c).
        if reason == Reason::Truncated {
            continue;
        }
        let what = &fixture.description;
        kernel.set(&fixture.streams).expect("tables");
        kernel.set_lease(fixture.lease).expect("a lease");
        kernel.set_capture(EVERYTHING).expect("a capture");
        injector.send(&fixture.frame).expect("injected");
        let deadline = Instant::now() + PATIENCE;
        while kernel.counters().expect("counters")[reason as usize].packets == 0 {
            assert!(Instant::now() < deadline, "{what}: no {}", reason.name());
        }
        let came_back = |frames: &[capture::Frame]| {
            let mut back = frames.iter().filter(|it| it.direction == Direction::In);
            back.any(|frame| frame.bytes == expected)
        };
        if reason == Reason::Relayed {
            let waited = capture.wait(PATIENCE, came_back);
            waited.unwrap_or_else(|error| panic!("{what}: {error:#}: {expected:02x?}"));
            let captured = kernel.take_captured().expect("captured packets");
            let whole = captured.iter().map(|(header, bytes)| {
                let tag = [header.tag_protocol, header.tag_control].map(u16::to_be_bytes);
                [&bytes[..12], &tag[0], &tag[1], &bytes[12..]].concat()
            });
            let whole: Vec<_> = whole.collect();
            assert_eq!(whole, [&fixture.frame[..], expected], "{what}");
        }
        shown[usize::from(reason == Reason::Relayed)] += 1;
    }
    let [passed, relayed] = shown;
    assert!(passed >= 5 && relayed >= 10, "{shown:?}");
    let recording = capture.stop().expect("no drops").only(Direction::In);
    assert_eq!(
        recording.datagrams().count(),
        relayed,
        "nothing else came back"
    );
}

/// Debian's bpftool shows the maps with the names of their fields.
#[test]
fn bpftool_shows_names() {
    let host = Host::new("pbx").expect("a machine");
    let mut kernel = kernel(Hook::NativeXdp);
    let stream = stream(Family::V4);
    let frame = received(Family::V4).bytes();
    kernel.set(&[offloaded(stream)]).expect("tables");
    let program = kernel.descriptor(Hook::NativeXdp).expect("a program");
    show(program, Hook::NativeXdp, &frame, 0).expect("a run");
    let directory = "/sys/fs/bpf/relay-test";
    host.run(|| {
        fs::create_dir(directory).expect("bpffs");
        kernel.pin(directory.as_ref()).expect("pins");
    });
    let dump = |map: &str| {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["map", "dump", "pinned", &format!("{directory}/{map}")]);
        let output = host.output(bpftool).expect("bpftool");
        String::from_utf8(output.stdout).expect("text")
    };
    let holds = |map, fields: &[(&str, u64)]| {
        let dump = dump(map);
        for (name, value) in fields {
            let field = format!("\"{name}\": {value}");
            let found = dump
                .lines()
                .any(|line| line.trim().trim_end_matches(',') == field);
            assert!(found, "no {field} in {map}:\n{dump}");
        }
    };
    holds(
        "STREAMS",
        &[
            ("local_port", 10_000),
            ("source_port", 30_000),
            ("new_source_port", 10_002),
            ("new_destination_port", 65_535),
            ("mtu", 1500),
            ("slot", 4),
            ("dscp", 46),
        ],
    );
    let counted = [("packets", 1), ("bytes", frame.len() as u64)];
    holds("STATE", &[("proven", 1), counted[0], counted[1]]);
    holds("COUNTERS", &counted);
}
