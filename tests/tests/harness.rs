//! The harness itself: it must see what is wrong before it may say that the relay is right.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    os::unix::process::ExitStatusExt as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use relay_tests::{
    ami::{Client, Message},
    capture::{Capture, Direction, Injector},
    namespace::Host,
    pbx::{self, Counters, Pbx},
    phone::{Bank, PACKET_TIME, Phone, Speech, Talk},
    rtp::{PAYLOAD, Rtp, Stamp},
    topology::{Direct, PBX_MAC, PBX_V4, PBX_V6, PHONES_MAC, Routed},
};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn phones_hear_each_other_over_the_cable() {
    let net = Direct::new(1).expect("network");
    let capture = Capture::start(&net.phones_interface).expect("capture");
    let (here, there) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("phones"),
    );
    for (near, far) in [(Direct::phone_v4(0), PBX_V4), (Direct::phone_v6(0), PBX_V6)] {
        let near = here.phone(SocketAddr::new(near, 30_000)).expect("phone");
        let far = there.phone(SocketAddr::new(far, 10_000)).expect("phone");
        near.set_tos(0xb9).expect("EF and ECT(1)");
        near.set_ttl(9).expect("TTL");
        near.talk(Talk {
            interval: Duration::from_millis(2),
            count: Some(300),
            ..Talk::to(far.local(), 0xabcd)
        });
        far.wait_received(300, PATIENCE).expect("300 packets");
        let report = far.heard(&near);
        assert_eq!((report.sent, report.received, report.lost), (300, 300, 0));
        assert_eq!(
            (report.duplicates, report.reordered, report.foreign),
            (0, 0, 0)
        );
        assert!(report.largest_gap > Duration::ZERO, "{report:?}");
        let arrivals = far.arrivals();
        assert!(arrivals.iter().all(|arrival| arrival.from == near.local()
            && arrival.tos == 0xb9
            && arrival.ttl == 9));
        let rtp = arrivals[100].rtp.expect("RTP");
        assert_eq!(
            rtp.sequence,
            65_500_u16.wrapping_add(100),
            "crosses the wrap"
        );
    }
    let recording = capture
        .stop()
        .expect("a capture without drops")
        .only(Direction::Out);
    let verification = recording.verify();
    assert_eq!(verification.wrong, [""; 0]);
    assert!(verification.right >= 600, "{verification:?}");
    let flows = recording.flows();
    assert_eq!(flows.len(), 2, "{flows:?}");
    for (key, flow) in flows {
        let quality = flow.quality();
        assert_eq!(
            (
                quality.distinct,
                quality.missing,
                quality.duplicates,
                quality.reordered
            ),
            (300, 0, 0, 0)
        );
        assert_eq!(key.ssrc, 0xabcd);
    }
    let (_, datagram) = recording
        .datagrams()
        .find(|(_, it)| it.payload.len() > 100)
        .expect("a packet");
    assert_eq!(
        (datagram.source_mac, datagram.destination_mac),
        (PHONES_MAC, PBX_MAC)
    );
    assert_eq!((datagram.dscp, datagram.ecn, datagram.ttl), (46, 1, 9));
}

#[test]
fn a_phone_reports_loss_duplicates_order_and_strangers() {
    let net = Direct::new(2).expect("network");
    let (here, there) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("phones"),
    );
    let alice = here
        .phone(SocketAddr::new(Direct::phone_v4(0), 30_000))
        .expect("phone");
    let mallory = here
        .phone(SocketAddr::new(Direct::phone_v4(1), 30_000))
        .expect("phone");
    let bob = there.phone(SocketAddr::new(PBX_V4, 10_000)).expect("phone");
    alice.talk(Talk {
        count: Some(5),
        ..Talk::to(bob.local(), 1)
    });
    bob.wait_received(5, PATIENCE).expect("packets");
    let sender = bob.arrivals()[0].stamp.expect("a phone's payload").sender;
    // Numbers 6, 5, 5 of a later stream, one with a damaged byte, and one of another phone.
    let packet = |number, damage: u8| {
        let mut payload = Stamp { sender, number }.write();
        payload[100] ^= damage;
        Rtp {
            marker: false,
            payload_type: 0,
            sequence: 9,
            timestamp: 0,
            ssrc: 2,
        }
        .packet(&payload)
    };
    for datagram in [packet(6, 0), packet(5, 0), packet(5, 0), packet(7, 1)] {
        alice.send(&datagram, bob.local()).expect("send");
    }
    alice.talk(Talk {
        count: Some(4),
        ..Talk::to(SocketAddr::new(PBX_V4, 9), 1)
    });
    mallory.talk(Talk {
        count: Some(1),
        ..Talk::to(bob.local(), 1)
    });
    alice.wait_sent(9, PATIENCE).expect("packets");
    bob.wait_received(10, PATIENCE).expect("packets");
    let report = bob.heard(&alice);
    assert_eq!(
        (report.sent, report.received, report.lost),
        (9, 7, 2),
        "{report:?}"
    );
    assert_eq!(
        (report.duplicates, report.reordered, report.foreign),
        (1, 1, 2),
        "{report:?}"
    );
}

#[test]
fn a_phone_that_suppresses_silence_talks_in_spurts() {
    /// Payload type of comfort noise.
    const NOISE: u8 = 13;
    let net = Direct::new(1).expect("network");
    let (here, there) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("phones"),
    );
    let alice = here
        .phone(SocketAddr::new(Direct::phone_v4(0), 30_000))
        .expect("phone");
    let bob = there.phone(SocketAddr::new(PBX_V4, 10_000)).expect("phone");
    // Two turns: three packets of voice each, then noise, silence, noise, silence.
    alice.talk(Talk {
        count: Some(0),
        ..Talk::to(bob.local(), 1)
    });
    alice.suppress_silence(Some(Speech {
        spurt: 3,
        pause: 4,
        noise: 2,
    }));
    alice.talk(Talk {
        interval: Duration::from_millis(2),
        count: Some(10),
        ..Talk::to(bob.local(), 1)
    });
    bob.wait_received(10, PATIENCE).expect("packets");
    let arrivals = bob.arrivals();
    let first = arrivals[0].rtp.expect("RTP");
    let heard: Vec<_> = arrivals
        .iter()
        .map(|arrival| {
            let rtp = arrival.rtp.expect("RTP");
            let time = rtp.timestamp.wrapping_sub(first.timestamp) / PAYLOAD as u32;
            let sequence = rtp.sequence.wrapping_sub(first.sequence);
            (sequence, time, rtp.payload_type, rtp.marker)
        })
        .collect();
    let expected = [
        (0, 0, 0, true),
        (1, 1, 0, false),
        (2, 2, 0, false),
        (3, 3, NOISE, false),
        (4, 5, NOISE, false),
        (5, 7, 0, true),
        (6, 8, 0, false),
        (7, 9, 0, false),
        (8, 10, NOISE, false),
        (9, 12, NOISE, false),
    ];
    assert_eq!(heard, expected);
    assert_eq!(alice.sent(), 6, "packets of voice");
}

#[test]
fn two_hundred_phones_keep_time() {
    let net = Direct::new(2).expect("network");
    let (here, there) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("phones"),
    );
    let pairs: Vec<_> = (0..200)
        .map(|number| {
            let near = here
                .phone(SocketAddr::new(Direct::phone_v4(0), 30_000 + 2 * number))
                .expect("phone");
            let far = there
                .phone(SocketAddr::new(PBX_V4, 10_000 + 2 * number))
                .expect("phone");
            near.talk(Talk {
                count: Some(50),
                ..Talk::to(far.local(), number.into())
            });
            (near, far)
        })
        .collect();
    for (near, far) in &pairs {
        far.wait_received(50, PATIENCE).expect("packets");
        assert_eq!(far.heard(near).lost, 0);
        assert!(near.arrivals().is_empty());
    }
    let arrivals = pairs[0].1.arrivals();
    let lasted = arrivals[49].at - arrivals[0].at;
    assert!(
        lasted >= PACKET_TIME * 48,
        "50 packets at 20 ms took only {lasted:?}"
    );
}

#[test]
fn a_capture_detects_wrong_checksums() {
    let net = Direct::new(1).expect("network");
    let capture = Capture::start(&net.pbx_interface).expect("capture");
    let bank = Bank::new(&net.phones).expect("phones");
    for local in [Direct::phone_v4(0), Direct::phone_v6(0)] {
        let to = if local.is_ipv4() { PBX_V4 } else { PBX_V6 };
        let phone = bank.phone(SocketAddr::new(local, 30_000)).expect("phone");
        phone.talk(Talk {
            count: Some(1),
            ..Talk::to(SocketAddr::new(to, 10_000), 1)
        });
        phone.wait_sent(1, PATIENCE).expect("sent");
    }
    let long = |bytes: &[u8]| bytes.len() > 200;
    capture
        .wait(PATIENCE, |frames| {
            frames.iter().filter(|it| long(&it.bytes)).count() >= 2
        })
        .expect("two packets");
    let good = capture.stop().expect("a capture without drops");
    assert_eq!(good.verify().wrong, [""; 0]);

    // The same frames, each with one bit wrong somewhere behind the MAC addresses and EtherType.
    let injector = Injector::open(&net.phones_interface).expect("injector");
    let frames: Vec<_> = good
        .frames
        .iter()
        .filter(|it| it.direction == Direction::In && long(&it.bytes))
        .collect();
    assert_eq!(frames.len(), 2);
    let capture = Capture::start(&net.pbx_interface).expect("capture");
    let mut sent = 0;
    for frame in frames {
        let ipv6 = frame.bytes[12..14] == [0x86, 0xdd];
        // IPv4: TTL, address, UDP port, checksum, payload. IPv6 has no header checksum: address, port, checksum, payload.
        let places: &[usize] = if ipv6 {
            &[30, 54, 60, 150]
        } else {
            &[22, 29, 34, 40, 150]
        };
        for &at in places {
            let mut bytes = frame.bytes.clone();
            bytes[at] ^= 4;
            injector.send(&bytes).expect("inject");
            sent += 1;
        }
        if ipv6 {
            let mut bytes = frame.bytes.clone();
            bytes[60..62].fill(0);
            injector.send(&bytes).expect("inject");
            sent += 1;
        } else {
            let mut bytes = frame.bytes.clone();
            bytes[40..42].fill(0);
            injector.send(&bytes).expect("inject");
        }
    }
    capture
        .wait(PATIENCE, |frames| {
            frames.iter().filter(|it| long(&it.bytes)).count() > sent
        })
        .expect("all frames");
    let verification = capture
        .stop()
        .expect("a capture without drops")
        .only(Direction::In)
        .verify();
    assert_eq!(verification.wrong.len(), sent, "{verification:#?}");
}

#[test]
fn vlan_tags_are_captured_where_they_were() {
    let net = Direct::new(1).expect("network");
    let capture = Capture::start(&net.pbx_interface).expect("capture");
    let mut frame = Vec::new();
    frame.extend(PBX_MAC);
    frame.extend(PHONES_MAC);
    frame.extend([0x88, 0xa8, 0x60, 0x64, 0x81, 0x00, 0x00, 0x0a, 0x08, 0x00]);
    let ip =
        etherparse::PacketBuilder::ipv4([192, 0, 2, 11], [192, 0, 2, 1], 64).udp(30_000, 10_000);
    ip.write(&mut frame, &[7; 40]).expect("a packet");
    Injector::open(&net.phones_interface)
        .expect("injector")
        .send(&frame)
        .expect("inject");
    capture
        .wait(PATIENCE, |frames| frames.iter().any(|it| it.bytes == frame))
        .expect("the very same bytes");
    let recording = capture.stop().expect("a capture without drops");
    let (_, datagram) = recording.datagrams().next().expect("decoded");
    assert_eq!(datagram.vlans, [100, 10]);
    assert_eq!(recording.verify().wrong, [""; 0]);
}

#[test]
fn phones_behind_the_router_hear_the_pbx() {
    let net = Routed::new(1).expect("network");
    let (here, there) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("phones"),
    );
    for (near, far) in [(Routed::phone_v4(0), PBX_V4), (Routed::phone_v6(0), PBX_V6)] {
        let near = here.phone(SocketAddr::new(near, 30_000)).expect("phone");
        let far = there.phone(SocketAddr::new(far, 10_000)).expect("phone");
        far.talk(Talk {
            count: Some(10),
            ..Talk::to(near.local(), 1)
        });
        near.wait_received(10, PATIENCE).expect("packets");
        assert_eq!(near.heard(&far).lost, 0);
        assert!(
            near.arrivals().iter().all(|arrival| arrival.ttl == 63),
            "one hop"
        );
    }
    let mac = [0x02, 0, 0, 0, 9, 9];
    net.gateway_interface.set_mac(mac).expect("new MAC");
    assert_eq!(net.gateway_interface.mac().expect("MAC"), mac);
}

#[test]
fn a_pass_program_lets_everything_through() {
    let net = Direct::new(1).expect("network");
    let program = net.phones_interface.pass_program().expect("XDP program");
    let again = net
        .phones_interface
        .pass_program()
        .expect_err("one program at a time");
    assert!(format!("{again:#}").contains("eth0"), "{again:#}");
    let (here, there) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("phones"),
    );
    let near = here
        .phone(SocketAddr::new(Direct::phone_v4(0), 30_000))
        .expect("phone");
    let far = there.phone(SocketAddr::new(PBX_V4, 10_000)).expect("phone");
    far.talk(Talk {
        count: Some(10),
        ..Talk::to(near.local(), 1)
    });
    near.wait_received(10, PATIENCE)
        .expect("packets through XDP_PASS");
    drop(program);
    net.phones_interface
        .pass_program()
        .expect("the guard has detached the first");
}

#[test]
fn hosts_share_nothing_but_files() {
    let nets = [
        Direct::new(1).expect("network"),
        Direct::new(1).expect("network"),
    ];
    for (number, net) in nets.iter().enumerate() {
        net.pbx
            .run(|| fs::write("/run/mark", number.to_string()))
            .expect("/run is writable");
        net.pbx
            .run(|| fs::create_dir("/sys/fs/bpf/mark"))
            .expect("/sys/fs/bpf is a bpffs");
    }
    for (number, net) in nets.iter().enumerate() {
        assert_eq!(
            net.pbx
                .run(|| fs::read_to_string("/run/mark"))
                .expect("mark"),
            number.to_string()
        );
        assert!(
            net.phones
                .run(|| fs::exists("/run/mark").is_ok_and(|there| !there))
        );
        assert!(
            net.phones
                .run(|| fs::exists("/sys/fs/bpf/mark").is_ok_and(|there| !there))
        );
        let mut command = Command::new("cat");
        command.args(["/run/mark", "/sys/class/net/eth0/address"]);
        let output = net.pbx.output(command).expect("a child is inside too");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{number}02:00:00:00:00:01\n")
        );
    }
    assert!(!fs::exists("/run/mark").expect("stat"));
}

#[test]
fn a_dropped_process_is_gone() {
    let host = Host::new("lone").expect("host");
    let mut command = Command::new("sleep");
    command.arg("1000");
    let process = host.spawn(command).expect("sleep");
    let pid = process.id();
    assert!(fs::exists(format!("/proc/{pid}")).expect("stat"));
    drop(process);
    assert!(!fs::exists(format!("/proc/{pid}")).expect("stat"));
}

/// Tells [`victim`] that it is the child.
const VICTIM: &str = "RELAY_TEST_VICTIM";

/// Run by the next test in a process of its own, which is then killed. Nothing to do without it.
#[test]
fn victim() {
    if env::var_os(VICTIM).is_none() {
        return;
    }
    let net = Direct::new(1).expect("network");
    let mut command = Command::new("sleep");
    command.arg("1000");
    let child = net.pbx.spawn(command).expect("sleep");
    eprintln!("victim's child: {}", child.id());
    std::thread::sleep(Duration::from_secs(1000));
}

#[test]
fn killed_test_leaves_nothing_behind() {
    let mut victim = Command::new(env::current_exe().expect("own path"))
        .args(["--exact", "victim", "--nocapture"])
        .env(VICTIM, "1")
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("victim");
    let mut lines = BufReader::new(victim.stderr.take().expect("pipe")).lines();
    let line = lines
        .find_map(|line| {
            line.expect("a line")
                .strip_prefix("victim's child: ")
                .map(str::to_owned)
        })
        .expect("the victim has started its child");
    let child: i32 = line.trim().parse().expect("a process id");
    let namespace =
        fs::read_link(format!("/proc/{child}/ns/net")).expect("the child's network namespace");
    kill(Pid::from_raw(victim.id().cast_signed()), Signal::SIGKILL).expect("kill");
    assert_eq!(victim.wait().expect("reap").signal(), Some(9));
    let deadline = Instant::now() + PATIENCE;
    while fs::exists(format!("/proc/{child}/ns")).expect("stat") && state(child) != Some('Z') {
        assert!(
            Instant::now() < deadline,
            "the child of a killed test lives on"
        );
        std::thread::yield_now();
    }
    let holders = fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter(|entry| {
            fs::read_link(entry.path().join("ns/net")).is_ok_and(|held| held == namespace)
        });
    assert_eq!(holders.count(), 0, "nobody lives in {namespace:?} any more");
}

/// The state letter of proc(5), `None` when the process is gone.
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim().chars().next()
}

/// A PBX, two phones in a call through it, and the network they need.
struct Call {
    net: Direct,
    pbx: Pbx,
    call: pbx::Call,
    caller: Phone,
    callee: Phone,
    bank: Bank,
}

fn call(v6: bool) -> Call {
    let net = Direct::new(2).expect("network");
    let (address, phone): (_, fn(u8) -> _) = if v6 {
        (PBX_V6, Direct::phone_v6)
    } else {
        (PBX_V4, Direct::phone_v4)
    };
    let pbx = Pbx::start(&net.pbx, address).expect("PBX");
    let bank = Bank::new(&net.phones).expect("phones");
    let caller = bank
        .phone(SocketAddr::new(phone(0), 30_000))
        .expect("phone");
    let callee = bank
        .phone(SocketAddr::new(phone(1), 30_002))
        .expect("phone");
    let call = pbx.call(caller.local(), callee.local()).expect("call");
    Call {
        net,
        pbx,
        call,
        caller,
        callee,
        bank,
    }
}

fn login(call: &Call) -> Client {
    Client::login(&call.net.pbx, call.pbx.ami(), pbx::USER, pbx::SECRET).expect("login")
}

fn technology(client: &mut Client, bridge: &str) -> String {
    let info = client
        .action("BridgeInfo", &[("BridgeUniqueid", bridge)])
        .expect("BridgeInfo");
    info.last()
        .and_then(|end| end.get("BridgeTechnology"))
        .expect("technology")
        .to_owned()
}

fn is_bridge_peer(event: &Message) -> bool {
    event.is_event("VarSet") && event.get("Variable") == Some("BRIDGEPEER")
}

#[test]
fn the_fake_pbx_forwards_and_counts() {
    for v6 in [false, true] {
        let it = call(v6);
        let mut client = login(&it);
        let bridges = client.action("BridgeList", &[]).expect("BridgeList");
        let bridge = bridges[1].get("BridgeUniqueid").expect("id").to_owned();
        while technology(&mut client, &bridge) != "native_rtp" {
            client
                .wait_event(PATIENCE, is_bridge_peer)
                .expect("the burst that comes with native RTP");
        }
        let stranger = it
            .bank
            .phone(SocketAddr::new(it.caller.local().ip(), 0))
            .expect("phone");
        stranger.talk(Talk {
            count: Some(3),
            ..Talk::to(it.call.local[0], 5)
        });
        stranger.wait_sent(3, PATIENCE).expect("sent");
        it.caller.talk(Talk {
            count: Some(100),
            ..Talk::to(it.call.local[0], 1)
        });
        it.callee.talk(Talk {
            count: Some(50),
            ..Talk::to(it.call.local[1], 2)
        });
        it.callee.wait_received(100, PATIENCE).expect("all packets");
        it.caller.wait_received(50, PATIENCE).expect("all packets");
        let (down, up) = (it.callee.heard(&it.caller), it.caller.heard(&it.callee));
        assert_eq!(
            (down.received, down.lost, down.foreign, down.reordered),
            (100, 0, 0, 0)
        );
        assert_eq!(
            (up.received, up.lost, up.foreign, up.reordered),
            (50, 0, 0, 0)
        );
        let arrivals = it.callee.arrivals();
        assert!(
            arrivals
                .iter()
                .all(|arrival| arrival.from == it.call.local[1])
        );
        assert!(
            arrivals
                .iter()
                .all(|arrival| arrival.rtp.is_some_and(|rtp| rtp.ssrc == 1)),
            "native: same SSRC"
        );
        let counters = it.pbx.counters().expect("counters")[&it.call.id];
        let expected = [
            Counters {
                received: 103,
                forwarded: 100,
            },
            Counters {
                received: 50,
                forwarded: 50,
            },
        ];
        assert_eq!(
            counters, expected,
            "the stranger's three are received, not forwarded"
        );
        let items = client.action(
            "Status",
            &[("Variables", "CHANNEL(rtp,dest),CHANNEL(rtcp,rxcount)")],
        );
        let items = items.expect("Status");
        let callee = items.iter().find(|item| {
            item.get("Channel")
                .is_some_and(|name| name.contains("callee"))
        });
        let callee = callee.expect("the callee's channel");
        assert_eq!(callee.variable("CHANNEL(rtcp,rxcount)"), Some("50"));
        assert_eq!(
            callee.variable("CHANNEL(rtp,dest)"),
            Some(it.callee.local().to_string().as_str())
        );
    }
}

#[test]
fn the_fake_pbx_tells_what_happens_to_a_call() {
    let it = call(false);
    let mut client = login(&it);
    let bridges = client.action("BridgeList", &[]).expect("BridgeList");
    let bridge = bridges[1].get("BridgeUniqueid").expect("id").to_owned();
    while technology(&mut client, &bridge) != "native_rtp" {
        client
            .wait_event(PATIENCE, is_bridge_peer)
            .expect("the burst that comes with native RTP");
    }
    it.pbx.simple(it.call).expect("simple");
    client.wait_event(PATIENCE, is_bridge_peer).expect("burst");
    assert_eq!(technology(&mut client, &bridge), "simple_bridge");
    it.caller.talk(Talk {
        count: Some(3),
        ..Talk::to(it.call.local[0], 1)
    });
    it.callee.wait_received(3, PATIENCE).expect("packets");
    let own = it
        .callee
        .arrivals()
        .iter()
        .all(|arrival| arrival.rtp.is_some_and(|rtp| rtp.ssrc != 1));
    assert!(own, "not native: the PBX's own SSRC");

    it.pbx.hold(it.call).expect("hold");
    let hold = client
        .wait_event(PATIENCE, |event| event.is_event("Hold"))
        .expect("Hold");
    let channel = hold.get("Channel").expect("channel").to_owned();
    let held = [
        ("Channel", channel.as_str()),
        ("Variable", "CHANNEL(rtp,hold)"),
    ];
    assert_eq!(
        client.action("Getvar", &held).expect("Getvar")[0].get("Value"),
        Some("1")
    );
    it.pbx.unhold(it.call).expect("unhold");
    client
        .wait_event(PATIENCE, |event| event.is_event("Unhold"))
        .expect("Unhold");
    assert_eq!(
        client.action("Getvar", &held).expect("Getvar")[0].get("Value"),
        Some("0")
    );

    it.pbx.hang_up(it.call).expect("hang up");
    client
        .wait_event(PATIENCE, |event| event.is_event("BridgeLeave"))
        .expect("BridgeLeave");
    client
        .wait_event(PATIENCE, |event| event.is_event("BridgeDestroy"))
        .expect("BridgeDestroy");
    client
        .wait_event(PATIENCE, |event| event.is_event("Hangup"))
        .expect("Hangup");
    assert!(
        client
            .action("Getvar", &held)
            .is_err_and(|error| error.to_string().contains("No such channel"))
    );
    assert!(it.pbx.counters().expect("counters").is_empty());
    assert!(it.pbx.hang_up(it.call).is_err(), "only once");

    client.action("Logoff", &[]).expect("Logoff");
    Client::login(&it.net.pbx, it.pbx.ami(), pbx::USER, "wrong").expect_err("the secret matters");
    let mut client = login(&it);
    it.pbx.disconnect_ami().expect("disconnect");
    client.action("Ping", &[]).expect_err("cut off");
    login(&it).action("Ping", &[]).expect("and welcome again");
}
