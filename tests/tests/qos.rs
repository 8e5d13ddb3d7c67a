//! Shaping an interface, and putting back what was there. The witness is iproute2's `tc`, which shares nothing with
//! `relay-user`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TcAttachType};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt},
};
use relay_common::classify::QOS_ABI;
use relay_tests::{
    capture::{Capture, Direction, Frame},
    link::{End, connect},
    namespace::Host,
    relay::{Relay, binary},
    topology::{Direct, PBX_MAC, PBX_V4, PHONES_MAC, Routed},
    tun::Tun,
};
use relay_user::{
    netlink::Refusal,
    qos::{
        kernel::{Kernel, Rtnetlink},
        object::{Message, Object},
        policy::Policy,
        shaper::{self, QosError, Request},
    },
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const STATE: &str = "/run/relay-user/qos/eth0.json";

/// Waits for what no event announces.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs `relay-user qos` in a machine, whatever its exit status.
fn qos(host: &Host, words: &str) -> Output {
    let program = binary("relay-user", "RELAY_USER_BIN").expect("relay-user is built");
    let mut command = Command::new(program);
    command.arg("qos").args(words.split_whitespace());
    host.run_to_end(command).expect("started")
}

/// The same; it succeeds. Returns what it prints.
fn done(host: &Host, words: &str) -> String {
    let output = qos(host, words);
    let (out, err) = texts(&output);
    assert!(output.status.success(), "qos {words}: {err}{out}");
    out
}

/// The same; it fails with this status, and says all this.
fn refused(host: &Host, words: &str, status: i32, says: &[&str]) {
    let output = qos(host, words);
    let (out, err) = texts(&output);
    assert_eq!(
        output.status.code(),
        Some(status),
        "qos {words}: {err}{out}"
    );
    for fragment in says {
        assert!(
            err.contains(fragment),
            "qos {words}: no `{fragment}` in: {err}"
        );
    }
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// All that `tc` shows of a device's configuration, in an order of its own: the kernel's is that of a hash table.
fn dump(host: &Host, device: &str) -> BTreeSet<String> {
    // A count of packets among HTB's parameters, which IPv6 raises by itself at any time.
    let configured = |line: &str| match line.split_once("direct_packets_stat ") {
        Some((before, after)) => {
            format!(
                "{before}{}",
                after.trim_start_matches(|it: char| it.is_ascii_digit())
            )
        }
        None => line.to_owned(),
    };
    let mut all = BTreeSet::new();
    for what in ["-d qdisc show", "-d class show", "filter show"] {
        let lines = host.tc(&format!("{what} dev {device}")).expect("tc");
        let lines = lines.lines().map(configured);
        all.extend(lines.map(|line| format!("{what}: {line}")));
    }
    all
}

fn exists(host: &Host, path: &str) -> bool {
    host.run(|| std::path::Path::new(path).exists())
}

/// `qos show --json` of one interface.
fn shown(host: &Host, interface: &str) -> Value {
    let text = done(host, &format!("show {interface} --json"));
    let report: Value = serde_json::from_str(&text).expect("JSON");
    report["interfaces"][0].clone()
}

/// One of the phone, on port 9, and one of the PBX that sends to it.
fn sockets(net: &Direct) -> [UdpSocket; 2] {
    let ends = [(&net.phones, Direct::phone_v4(0), 9), (&net.pbx, PBX_V4, 0)];
    ends.map(|(host, address, port)| {
        let socket = host.run(|| UdpSocket::bind((address, port)));
        let socket = socket.expect("socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        socket
    })
}

/// A class of the uplink, by name.
fn class(report: &Value, name: &str) -> Value {
    let classes = report["uplink"]["classes"].as_array().expect("classes");
    let found = classes.iter().find(|class| class["name"] == name);
    found.expect(name).clone()
}

fn count(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

#[test]
fn the_tree_is_as_the_policy_says() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = dump(host, "eth0");
    let said = done(host, "apply eth0 --uplink 1000kbit");
    assert!(
        said.contains("1mbit up") && said.contains("pfifo in 4 classes"),
        "{said}"
    );
    let qdiscs = host.tc("qdisc show dev eth0").expect("tc");
    assert!(
        qdiscs.contains("qdisc htb 1: root") && qdiscs.contains("default 0x40"),
        "{qdiscs}"
    );
    let classes = host.tc("-d class show dev eth0").expect("tc");
    for (class, words) in [
        // What 2 ms bring, and half a packet: with a whole one more, they would leave in pairs.
        (
            "1:1 root",
            "rate 950Kbit ceil 950Kbit burst 237b cburst 237b",
        ),
        (
            "1:10 parent 1:1 leaf 10:",
            "prio 0 quantum 1518 rate 47496bit ceil 95Kbit burst 770b cburst 1541b",
        ),
        (
            "1:20 parent 1:1 leaf 20:",
            "prio 1 quantum 1518 rate 522496bit ceil 950Kbit burst 889b cburst 1755b",
        ),
        (
            "1:30 parent 1:1 leaf 30:",
            "prio 2 quantum 1518 rate 190Kbit ceil 950Kbit burst 806b cburst 1755b",
        ),
        (
            "1:40 parent 1:1 leaf 40:",
            "prio 3 quantum 1518 rate 190Kbit ceil 950Kbit burst 806b cburst 1755b",
        ),
    ] {
        let mut lines = classes.lines();
        let line = lines.find(|line| line.starts_with(&format!("class htb {class}")));
        let line = line.unwrap_or_else(|| panic!("{class}: {classes}"));
        let line = line
            .replace(" linklayer ethernet", "")
            .replace("/1 mpu 0b", "");
        assert!(line.contains(words), "no {words} in {line}");
    }
    for leaf in [
        "tbf 10: parent 1:10",
        "tbf 20: parent 1:20",
        "tbf 30: parent 1:30",
        "tbf 40: parent 1:40",
        "pfifo 11: parent 10:1 limit 32p",
        "pfifo 21: parent 20:1 limit 32p",
        "pfifo 31: parent 30:1 limit 32p",
        "pfifo 41: parent 40:1 limit 32p",
    ] {
        assert!(qdiscs.contains(&format!("qdisc {leaf}")), "{qdiscs}");
    }
    // More bytes a second than 32 bits hold.
    done(host, "apply eth0 --uplink 100gbit");
    let classes = host.tc("class show dev eth0").expect("tc");
    assert!(classes.contains("rate 95Gbit ceil 95Gbit"), "{classes}");
    assert!(classes.contains("rate 52250Mbit ceil 95Gbit"), "{classes}");
    let qdiscs = host.tc("qdisc show dev eth0").expect("tc");
    assert!(
        qdiscs.contains("pfifo 40: parent 1:40") && !qdiscs.contains("tbf"),
        "{qdiscs}"
    );
    assert_eq!(shown(host, "eth0")["state"], "shaped");
    let said = done(host, "clear eth0");
    assert!(said.contains("the kernel's default again"), "{said}");
    assert_eq!(dump(host, "eth0"), before);
    assert!(!exists(host, STATE));
    let said = done(host, "clear eth0");
    assert!(said.contains("nothing to clear"), "{said}");
}

#[test]
fn what_cannot_be_done_is_refused_with_the_remedy() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = dump(host, "eth0");
    for (words, status, says) in [
        ("", 2, &["Usage: relay-user qos"][..]),
        ("apply", 2, &["IFACE", "--uplink"]),
        ("apply eth0", 2, &["--uplink"]),
        (
            "apply eth0 --uplink fast",
            2,
            &["`fast` is no rate", "1.5mbit"],
        ),
        (
            "apply eth0 --uplink 1kbit",
            2,
            &["`1kbit`", "64kbit to 100gbit"],
        ),
        (
            "apply eth0 --uplink 1mbit --downlink 0",
            2,
            &["`0`", "64kbit"],
        ),
        (
            "apply eth7 --uplink 1mbit",
            1,
            &["no interface `eth7`", "eth0"],
        ),
        (
            "apply a/b --uplink 1mbit",
            2,
            &["cannot be the name of an interface"],
        ),
        (
            "apply eth0 --uplink 1mbit --policy /run/none",
            1,
            &["/run/none", "No such file"],
        ),
        ("show eth7", 1, &["no interface `eth7`"]),
        ("show --watch never", 2, &["no length of time"]),
        ("policy /run/none", 1, &["/run/none", "No such file"]),
        ("aply eth0", 2, &["apply"]),
    ] {
        refused(host, words, status, says);
    }
    assert_eq!(dump(host, "eth0"), before);
    assert!(!exists(host, STATE));
    assert!(done(host, "show").contains("no interface is shaped"));
    assert!(done(host, "show eth0").contains("not shaped"));
}

#[test]
fn the_built_in_policy_is_one_to_start_from() {
    let host = Host::new("alone").expect("machine");
    let text = done(&host, "policy");
    let file = host.private_file("qos.toml", &text).expect("file");
    let file = file.display();
    let table = done(&host, &format!("policy {file} --uplink 1mbit"));
    for words in [
        "realtime",
        "47500bit",
        "95kbit",
        "high",
        "522500bit",
        "default",
    ] {
        assert!(table.contains(words), "no {words} in {table}");
    }
}

#[test]
fn what_a_policy_asks_too_much_of_is_told_with_its_file() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let with = |name: &str, rate: &str| {
        let text = done(host, "policy").replacen("\"11/20\"", rate, 1);
        assert!(text.contains(rate), "{text}");
        let file = host.private_file(name, &text).expect("file");
        file.display().to_string()
    };
    let fractions = with("fractions.toml", "\"17/20\"");
    let says = [&fractions[..], "more than 1/1", "high 17/20"];
    refused(host, &format!("policy {fractions}"), 1, &says);
    let fixed = with("fixed.toml", "\"950001bit\"");
    done(host, &format!("policy {fixed}"));
    let says = [&fixed[..], "more than the 950kbit", "high 950kbit"];
    refused(
        host,
        &format!("apply eth0 --uplink 1mbit --policy {fixed}"),
        1,
        &says,
    );
    // What is marked, for programs; of the built-in rules, three.
    let told = done(host, "mark eth0 --json");
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(
        told,
        serde_json::json!({ "interface": "eth0", "policy": null, "rules": 3 })
    );
    done(host, "clear eth0");
}

#[test]
fn rates_are_changed_without_losing_what_waits() {
    const PACKETS: u16 = 24;
    let net = Direct::new(1).expect("network");
    done(&net.pbx, "apply eth0 --uplink 64kbit");
    let [receiver, sender] = sockets(&net);
    for number in 0..PACKETS {
        let mut packet = [0; 1000];
        packet[..2].copy_from_slice(&number.to_be_bytes());
        let to = SocketAddr::from((Direct::phone_v4(0), 9));
        sender.send_to(&packet, to).expect("sent");
    }
    let waiting = count(&class(&shown(&net.pbx, "eth0"), "bulk")["backlog_packets"]);
    // At 64 kbit/s, what was sent takes three seconds.
    assert!(waiting > 4, "only {waiting} wait");
    done(&net.pbx, "apply eth0 --uplink 10mbit");
    done(&net.pbx, "apply eth0 --uplink 10mbit");
    for number in 0..PACKETS {
        let mut packet = [0; 1000];
        receiver.recv(&mut packet).expect("each arrives");
        assert_eq!(packet[..2], number.to_be_bytes(), "in their order");
    }
    let report = shown(&net.pbx, "eth0");
    assert_eq!(report["state"], "shaped");
    assert_eq!(class(&report, "bulk")["drops"], 0);
}

#[test]
fn the_line_is_not_filled_beyond_its_share() {
    const RATE: f64 = 1_900_000.0;
    let net = Direct::new(1).expect("network");
    done(&net.pbx, "apply eth0 --uplink 2mbit");
    let [receiver, sender] = sockets(&net);
    sender.set_nonblocking(true).expect("not waiting");
    let (mut first, mut bytes) = (None, 0_u32);
    let mut packet = [0; 1400];
    loop {
        // More than the line takes, so that some always wait.
        for _ in 0..4 {
            let _ = sender.send_to(&packet, (Direct::phone_v4(0), 9));
        }
        receiver.recv(&mut packet).expect("packets arrive");
        let first = *first.get_or_insert_with(Instant::now);
        // Ethernet, IP and UDP headers.
        bytes += 1400 + 42;
        if bytes > 400_000 {
            let rate = f64::from(bytes) * 8.0 / first.elapsed().as_secs_f64();
            // Another process may have the CPU, but none can make the line faster.
            assert!((RATE * 0.5..RATE * 1.05).contains(&rate), "{rate} bit/s");
            break;
        }
    }
    let report = shown(&net.pbx, "eth0");
    assert!(count(&class(&report, "bulk")["drops"]) > 0, "{report}");
    assert!(
        count(&class(&report, "bulk")["bits_per_second"]) > 0,
        "{report}"
    );
}

/// Sends some by TCP.
fn stream(from: &Host, to: &Host, address: IpAddr) {
    const BYTES: usize = 400_000;
    let server = to.run(|| TcpListener::bind((address, 9)));
    let server = server.expect("listening");
    let client = from.run(|| TcpStream::connect((address, 9)));
    let mut client = client.expect("connected");
    let (mut server, _) = server.accept().expect("accepted");
    thread::scope(|scope| {
        scope.spawn(move || client.write_all(&vec![0; BYTES]).expect("sent"));
        server.read_exact(&mut vec![0; BYTES]).expect("received");
    });
}

/// Packets that the classes of a device have sent, and how often they sent something: less often where
/// a packet was sent that others below were to cut.
fn sent_by_classes(host: &Host, device: &str) -> (u64, u64) {
    let said = host.tc(&format!("-s class show dev {device}")).expect("tc");
    let after = |word: &str, skip: usize| {
        let words: Vec<_> = said.split_whitespace().collect();
        let numbers = words.iter().enumerate().filter(|(_, it)| **it == word);
        let numbers: Vec<u64> = numbers
            .map(|(at, _)| words[at + skip].parse().expect("a number"))
            .collect();
        numbers
    };
    let (packets, lent, borrowed) = (after("Sent", 3), after("lended:", 1), after("borrowed:", 1));
    // HTB counts here for each that it takes out of a class whether the class was in its own rate, and
    // for the class above, what went by that one.
    let own = said.lines().filter(|line| line.starts_with("class htb"));
    own.enumerate()
        .filter(|(_, line)| line.contains(" leaf "))
        .fold((0, 0), |(all, times), (at, _)| {
            (all + packets[at], times + lent[at] + borrowed[at])
        })
}

#[test]
fn what_tcp_hands_over_as_one_is_cut_on_a_slow_line() {
    let net = Routed::new(1).expect("network");
    let (pbx, router, phones) = (&net.pbx, &net.router, &net.phones);
    // What TCP hands over crosses a veth uncut, as if merged by the receiver's GRO.
    net.pbx_interface
        .leave_checksums_to_device()
        .expect("offloads");
    let ifb = format!("relayifb{}", net.gateway_interface.index);
    let download = || stream(pbx, phones, Routed::phone_v4(0));
    for (what, host, apply, device) in [
        ("of this host", pbx, "eth0 --uplink", "eth0"),
        ("forwarded", router, "eth1 --uplink", "eth1"),
        ("come in", router, "eth0 --uplink 1gbit --downlink", &ifb),
    ] {
        let interface = apply.split(' ').next().expect("a name");
        done(host, &format!("apply {apply} 200mbit"));
        download();
        let (packets, times) = sent_by_classes(host, device);
        assert!(times < packets / 2, "{what}: {packets} in {times}");
        done(host, &format!("clear {interface}"));
        done(host, &format!("apply {apply} 20mbit"));
        let line = if device == interface {
            "uplink"
        } else {
            "downlink"
        };
        assert_eq!(shown(host, interface)[line]["splits"], true);
        download();
        let (packets, times) = sent_by_classes(host, device);
        assert!(packets > 250, "{what}: {packets}");
        assert_eq!(packets, times, "{what}");
        done(host, &format!("clear {interface}"));
    }
}

#[test]
fn no_packet_on_the_line_is_longer_than_a_frame() {
    let net = Direct::new(1).expect("network");
    done(&net.pbx, "apply eth0 --uplink 20mbit");
    let capture = Capture::start(&net.pbx_interface).expect("capture");
    stream(&net.pbx, &net.phones, Direct::phone_v4(0));
    let sent = capture.stop().expect("frames").only(Direction::Out);
    let longest = sent.frames.iter().map(|frame| frame.bytes.len()).max();
    assert_eq!(longest, Some(1514));
    // Nor is one lost that is as long as the interface lets it be.
    net.pbx.ip("link set eth0 mtu 9000").expect("MTU");
    let report = shown(&net.pbx, "eth0");
    assert_eq!(
        report["drift"],
        serde_json::json!([
            "the MTU is 9000 and was 1500: what is longer may be lost until it is shaped again"
        ])
    );
    done(&net.pbx, "apply eth0 --uplink 20mbit");
    assert_eq!(shown(&net.pbx, "eth0")["state"], "shaped");
    net.phones.ip("link set eth0 mtu 9000").expect("MTU");
    stream(&net.pbx, &net.phones, Direct::phone_v4(0));
    let report = shown(&net.pbx, "eth0");
    assert_eq!(class(&report, "bulk")["drops"], 0, "{report}");
}

#[test]
fn packets_that_name_a_class_are_in_it() {
    let net = Direct::new(1).expect("network");
    done(&net.pbx, "apply eth0 --uplink 10mbit");
    let sender = net
        .pbx
        .run(|| UdpSocket::bind((PBX_V4, 0)))
        .expect("socket");
    for (minor, name) in [
        (0x10, "realtime"),
        (0x20, "high"),
        (0x30, "regular"),
        (0x40, "bulk"),
    ] {
        let priority = 1 << 16 | minor;
        setsockopt(&sender, sockopt::Priority, &priority).expect("priority");
        let before = count(&class(&shown(&net.pbx, "eth0"), name)["packets"]);
        for _ in 0..10 {
            sender
                .send_to(&[0; 100], (Direct::phone_v4(0), 9))
                .expect("sent");
        }
        until(name, || {
            count(&class(&shown(&net.pbx, "eth0"), name)["packets"]) >= before + 10
        });
    }
}

#[test]
fn marking_leaves_queues_alone() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let phone = Direct::phone_v4(0);
    let before = dump(host, "eth0");
    let sip = net
        .phones
        .run(|| UdpSocket::bind((phone, 5060)))
        .expect("socket");
    setsockopt(&sip, sockopt::IpRecvTos, &true).expect("IP_RECVTOS");
    sip.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let sender = host.run(|| UdpSocket::bind((PBX_V4, 0))).expect("socket");
    let received_tos = || {
        sender.send_to(b"OPTIONS", (phone, 5060)).expect("sent");
        let mut buffer = [0; 64];
        let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
        let mut control = nix::cmsg_space!(u8);
        let message = recvmsg::<()>(
            sip.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::empty(),
        )
        .expect("received");
        let mut told = message.cmsgs().expect("control messages");
        told.find_map(|it| match it {
            ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
            _ => None,
        })
    };
    let matched = |rule: &str| {
        let report = shown(host, "eth0");
        assert_eq!(report["state"], "marked");
        let rules = report["rules"].as_array().expect("rules").clone();
        let found = rules.iter().find(|it| it["name"] == rule);
        found.map(|it| count(&it["packets"]))
    };
    done(host, "mark eth0");
    assert_eq!(received_tos(), Some(24 << 2));
    assert_eq!(matched("mark-sip"), Some(1));
    assert_eq!(dump(host, "eth0"), before);

    // Classes of somebody else, with the numbers of ours, and his choice among them.
    host.tc("qdisc add dev eth0 root handle 1: htb default 40
class add dev eth0 parent 1: classid 1:10 htb rate 10mbit
class add dev eth0 parent 1: classid 1:20 htb rate 10mbit
class add dev eth0 parent 1: classid 1:40 htb rate 10mbit
filter add dev eth0 parent 1: protocol ip u32 match ip dport 5060 0xffff flowid 1:10")
        .expect("tc");
    let sent = |class: &str| {
        let said = host.tc("-s class show dev eth0").expect("tc");
        let mut lines = said.lines().skip_while(|line| !line.contains(class));
        let line = lines.find(|line| line.contains("Sent ")).expect(class);
        let packets = line.split_whitespace().nth(3).map(str::parse::<u64>);
        packets.expect("packets").expect("a number")
    };
    assert_eq!(received_tos(), Some(24 << 2));
    assert_eq!(sent("htb 1:10"), 1);
    // By the socket.
    setsockopt(&sender, sockopt::Priority, &(1 << 16 | 0x40)).expect("priority");
    let others = sent("htb 1:40");
    assert_eq!(received_tos(), Some(24 << 2));
    assert_eq!(sent("htb 1:10"), 1);
    assert!(sent("htb 1:40") > others);
    host.tc("qdisc delete dev eth0 root").expect("tc");

    // Another policy: of TCP alone.
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policies");
    done(host, &format!("mark eth0 --policy {examples}/ports.toml"));
    assert_eq!(received_tos(), Some(0));
    assert_eq!(matched("mark-sip"), None);

    done(host, "apply eth0 --uplink 1mbit");
    assert_eq!(shown(host, "eth0")["rules"], Value::Null);
    refused(host, "mark eth0", 1, &["is shaped", "qos clear eth0"]);
    assert_eq!(received_tos(), Some(24 << 2));
    done(host, "clear eth0");
    assert_eq!(dump(host, "eth0"), before);
    done(host, "mark eth0");
    let said = done(host, "clear eth0");
    assert!(said.contains("not marked any longer"), "{said}");
    assert_eq!(received_tos(), Some(0));
    assert_eq!(shown(host, "eth0")["state"], "unshaped");
}

#[test]
fn packets_are_in_the_class_of_their_kind() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let phone = Direct::phone_v4(0);
    let web = net.phones.run(|| TcpListener::bind((phone, 80)));
    let web = web.expect("listening");
    done(host, "apply eth0 --uplink 10mbit");
    let packets = |name: &str| count(&class(&shown(host, "eth0"), name)["packets"]);
    let in_class = |name: &str, many: u64, send: &dyn Fn()| {
        let before = packets(name);
        send();
        until(name, || packets(name) >= before + many);
    };
    in_class("realtime", 1, &|| {
        // Nobody listens there, of which the phone is told by ICMP.
        let socket = net
            .phones
            .run(|| UdpSocket::bind((phone, 0)))
            .expect("socket");
        socket.connect((PBX_V4, 9)).expect("connected");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        socket.send(&[0]).expect("sent");
        let told = socket.recv(&mut [0]).expect_err("nobody is there");
        assert_eq!(told.kind(), ErrorKind::ConnectionRefused);
    });
    // What the handshake takes, then what it was for.
    in_class("realtime", 2, &|| {
        in_class("regular", 2, &|| {
            let mut client = host
                .run(|| TcpStream::connect((phone, 80)))
                .expect("connected");
            client.write_all(&[0; 2000]).expect("sent");
            let (mut server, _) = web.accept().expect("accepted");
            server.read_exact(&mut [0; 2000]).expect("received");
        });
    });
    let sender = host.run(|| UdpSocket::bind((PBX_V4, 0))).expect("socket");
    for (tos, name) in [(0xb8, "high"), (0x60, "high"), (0, "bulk"), (0x28, "bulk")] {
        setsockopt(&sender, sockopt::Ipv4Tos, &tos).expect("TOS");
        in_class(name, 10, &|| {
            for _ in 0..10 {
                sender.send_to(&[0; 100], (phone, 9)).expect("sent");
            }
        });
    }
    let report = shown(host, "eth0");
    let rules = report["uplink"]["rules"].as_array().expect("rules");
    let matched = rules.iter().map(|rule| count(&rule["packets"]));
    assert!(matched.sum::<u64>() > 20, "{rules:?}");
    assert!(done(host, "show eth0").contains("RULE"));
    done(host, "clear eth0");
    assert_eq!(programs(host), [0, 0]);
}

/// Absolute path of an example.
fn example(name: &str) -> String {
    format!("{}/../docs/policies/{name}", env!("CARGO_MANIFEST_DIR"))
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What a frame of IPv4 without options says of itself: its protocol, ports and DSCP.
fn marked(frame: &Frame) -> Option<(u8, [u16; 2], u8)> {
    let bytes = &frame.bytes;
    let port = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let is_ipv4 = bytes.get(12..15)? == [8, 0, 0x45];
    let facts = (bytes[23], [port(34)?, port(36)?], bytes[15] >> 2);
    is_ipv4.then_some(facts)
}

#[test]
fn the_old_scripts_ports_are_marked_and_other_packets_not() {
    const CODE_POINT: u8 = 0x22;
    const EF: u8 = 46;
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let phone = Direct::phone_v4(0);
    let text = fs::read_to_string(example("ports.toml")).expect("an example");
    let keeping = text.replace("overwrite = true", "");
    let keeping = host.private_file("keeping.toml", &keeping).expect("file");
    let keeping = keeping.to_str().expect("a path").to_owned();
    for (policy, of_marked) in [(example("ports.toml"), CODE_POINT), (keeping, EF)] {
        done(
            host,
            &format!("apply eth0 --uplink 10mbit --policy {policy}"),
        );
        let capture = Capture::start(&net.pbx_interface).expect("capture");
        // To this port, and from the next one.
        for (server, client, address, port) in [
            (&net.phones, host, phone, 1935),
            (host, &net.phones, PBX_V4, 443),
            (&net.phones, host, phone, 8080),
        ] {
            let listener = server.run(|| TcpListener::bind((address, port)));
            let listener = listener.expect("listening");
            let client = client.run(|| TcpStream::connect((address, port)));
            let mut client = client.expect("connected");
            let (mut server, _) = listener.accept().expect("accepted");
            // What is marked already.
            for socket in [&client, &server] {
                setsockopt(socket, sockopt::Ipv4Tos, &i32::from(EF << 2)).expect("TOS");
            }
            for socket in [&mut client, &mut server] {
                socket.write_all(&[0; 100]).expect("sent");
            }
            for socket in [&mut client, &mut server] {
                socket.read_exact(&mut [0; 100]).expect("received");
            }
        }
        let sender = host.run(|| UdpSocket::bind((PBX_V4, 443))).expect("socket");
        sender.send_to(&[0; 100], (phone, 443)).expect("sent");
        let data = |frame: &Frame| frame.bytes.len() > 120;
        capture
            .wait(PATIENCE, |frames| {
                frames.iter().filter(|frame| data(frame)).count() >= 7
            })
            .expect("all sent");
        let sent = capture.stop().expect("frames").only(Direction::Out);
        let marks = |protocol: u8, port: u16, only: fn(&Frame) -> bool| -> BTreeSet<u8> {
            let frames = sent.frames.iter().filter(|frame| only(frame));
            let facts = frames.filter_map(marked);
            facts
                .filter(|(found, ports, _)| *found == protocol && ports.contains(&port))
                .map(|(_, _, dscp)| dscp)
                .collect()
        };
        // A SYN flag: before the socket had a mark.
        let opens = |frame: &Frame| frame.bytes.get(47).is_some_and(|flags| flags & 2 != 0);
        let carries = |frame: &Frame| frame.bytes.len() > 120;
        for port in [1935, 443] {
            assert_eq!(marks(TCP, port, opens), [CODE_POINT].into(), "{policy}");
            assert_eq!(marks(TCP, port, carries), [of_marked].into(), "{policy}");
        }
        assert_eq!(marks(TCP, 8080, opens), [0].into(), "{policy}");
        assert_eq!(marks(TCP, 8080, carries), [EF].into(), "{policy}");
        assert_eq!(marks(UDP, 443, |_| true), [0].into(), "{policy}");
    }
}

#[test]
fn a_tunnels_packets_keep_the_inner_mark_or_get_the_tunnels() {
    const AF21: u8 = 18;
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let policy = example("openvpn.toml");
    // IPv6 tells of its multicast groups whenever it likes to.
    host.sysctl("net/ipv6/conf/eth0/disable_ipv6", "1")
        .expect("IPv4 only");
    done(
        host,
        &format!("apply eth0 --uplink 10mbit --policy {policy}"),
    );
    let capture = Capture::start(&net.pbx_interface).expect("capture");
    // As OpenVPN sends: with `passtos`, the outer packet has the TOS of the inner one.
    let tunnel = host
        .run(|| UdpSocket::bind((PBX_V4, 1194)))
        .expect("socket");
    let other = host
        .run(|| UdpSocket::bind((PBX_V4, 1195)))
        .expect("socket");
    let packets = |name: &str| count(&class(&shown(host, "eth0"), name)["packets"]);
    let mut marks = Vec::new();
    for (socket, inner, outer, name) in [
        (&tunnel, 46, 46, "calls"),
        (&tunnel, 24, 24, "calls"),
        (&tunnel, 0, AF21, "tunnel"),
        (&other, 0, 0, "bulk"),
    ] {
        setsockopt(socket, sockopt::Ipv4Tos, &(inner << 2)).expect("TOS");
        let before = packets(name);
        socket
            .send_to(&[0x30; 200], (Direct::phone_v4(0), 50_000))
            .expect("sent");
        until(name, || packets(name) > before);
        marks.push(outer);
        let is_sent = |frame: &Frame| {
            let datagram = frame.datagram();
            datagram.is_some_and(|it| it.destination.port() == 50_000)
        };
        capture
            .wait(PATIENCE, |frames| {
                frames.iter().filter(|frame| is_sent(frame)).count() == marks.len()
            })
            .expect("sent");
        let sent = capture.so_far();
        let frames = sent.frames.iter().filter(|frame| is_sent(frame));
        let found: Vec<_> = frames.filter_map(marked).map(|(.., dscp)| dscp).collect();
        assert_eq!(found, marks, "{name}");
    }
}

#[test]
fn a_device_without_ethernet_header_is_shaped_too() {
    let host = Host::new("pbx").expect("machine");
    let tun = Tun::open(&host, "tun0", "10.8.0.1/24").expect("tun");
    refused(
        &host,
        "apply tun0 --uplink 1mbit --downlink 8mbit",
        1,
        &["no Ethernet header", "shape the uplink only"],
    );
    assert_eq!(shown(&host, "tun0")["state"], "unshaped");
    done(&host, "apply tun0 --uplink 1mbit");
    let voice = host
        .run(|| UdpSocket::bind("10.8.0.1:10000"))
        .expect("socket");
    let mut rtp = [0; 172];
    rtp[0] = 0x80;
    voice.send_to(&rtp, "10.8.0.2:30000").expect("sent");
    voice.send_to(&[0; 172], "10.8.0.2:9").expect("sent");
    let mut packet = [0; 2000];
    let mut marks = BTreeMap::new();
    until("both", || {
        while let Ok(length) = tun.receive(&mut packet) {
            if packet[0] == 0x45 && length > 24 {
                let port = u16::from_be_bytes([packet[22], packet[23]]);
                marks.insert(port, packet[1] >> 2);
            }
        }
        marks.len() >= 2
    });
    assert_eq!(marks, [(30_000, 46), (9, 0)].into());
    let report = shown(&host, "tun0");
    assert_eq!(class(&report, "high")["packets"], 1);
    let rules = report["uplink"]["rules"].as_array().expect("rules");
    let voice = rules.iter().find(|rule| rule["name"] == "mark-voice");
    assert_eq!(voice.expect("a rule")["packets"], 1);
    done(&host, "clear tun0");
}

#[test]
fn what_comes_in_is_queued_once() {
    const PACKETS: u16 = 40;
    const RATE: f64 = 1_900_000.0;
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    done(host, "apply eth0 --uplink 100mbit --downlink 2mbit");
    let receiver = host.run(|| UdpSocket::bind((PBX_V4, 9))).expect("socket");
    receiver.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let sender = net.phones.run(|| UdpSocket::bind((Direct::phone_v4(0), 0)));
    let sender = sender.expect("socket");
    setsockopt(&sender, sockopt::Ipv4Tos, &0xb8).expect("TOS");
    let mut packet = [0; 1400];
    let mut first = None;
    for number in 0..PACKETS {
        packet[..2].copy_from_slice(&number.to_be_bytes());
        sender.send_to(&packet, (PBX_V4, 9)).expect("sent");
    }
    for number in 0..PACKETS {
        receiver.recv(&mut packet).expect("each arrives");
        assert_eq!(packet[..2], number.to_be_bytes(), "once, in their order");
        first.get_or_insert_with(Instant::now);
    }
    // The first one is not waited for, and a burst is not either.
    let bits = f64::from(PACKETS - 1) * 1442.0 * 8.0;
    let rate = bits / first.expect("a first").elapsed().as_secs_f64();
    assert!(rate < RATE * 1.1, "{rate} bit/s");
    let report = shown(host, "eth0");
    let classes = report["downlink"]["classes"].as_array().expect("classes");
    let high = classes
        .iter()
        .find(|class| class["name"] == "high")
        .expect("high");
    assert_eq!(high["packets"], PACKETS, "{high}");
    assert_eq!(programs(host), [1, 1]);
    // Without it, what comes in is not sent to a device that is gone.
    done(host, "apply eth0 --uplink 100mbit");
    assert_eq!(programs(host), [0, 1]);
    sender.send_to(&packet, (PBX_V4, 9)).expect("sent");
    receiver.recv(&mut packet).expect("it arrives");
    done(host, "clear eth0");
    assert_eq!(programs(host), [0, 0]);
}

#[test]
fn shaping_needs_no_more_than_three_capabilities() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = dump(host, "eth0");
    let output = limited(host, "", "apply eth0 --uplink 1mbit");
    assert!(texts(&output).1.contains("CAP_NET_ADMIN"), "{output:?}");
    assert_eq!(dump(host, "eth0"), before);
    for words in [
        "apply eth0 --uplink 1mbit --downlink 8mbit",
        "show",
        "clear eth0",
    ] {
        let output = limited(host, ENOUGH, words);
        assert!(output.status.success(), "{words}: {output:?}");
    }
    assert_eq!(dump(host, "eth0"), before);
}

#[test]
fn a_classifier_that_cannot_be_attached_leaves_all_as_it_was() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    for before in ["show", "apply eth0 --uplink 1mbit --downlink 8mbit"] {
        done(host, before);
        let before = everything(host);
        // In the place of what is being prepared, which would be removed if it were ours.
        let foreign = format!("/sys/fs/bpf/relay-qos/v{QOS_ABI}/eth0/next/foreign");
        host.run(|| fs::create_dir_all(&foreign)).expect("made");
        for after in [
            "apply eth0 --uplink 2mbit",
            "apply eth0 --uplink 2mbit --downlink 9mbit",
        ] {
            refused(host, after, 1, &[&foreign]);
            assert_eq!(everything(host), before, "{after}");
        }
        host.run(|| fs::remove_dir(&foreign)).expect("removed");
        // Whoever may not mount it cannot pin. With it go the pins that hold the classifier.
        host.run(|| umount2("/sys/fs/bpf", MntFlags::MNT_DETACH))
            .expect("unmounted");
        until("detached", || programs(host) == [0, 0]);
        let before = everything(host);
        let output = limited(host, ENOUGH, "apply eth0 --uplink 2mbit");
        assert!(texts(&output).1.contains("mount -t bpf"), "{output:?}");
        assert_eq!(everything(host), before);
        host.run(|| {
            mount(
                Some("bpf"),
                "/sys/fs/bpf",
                Some("bpf"),
                MsFlags::empty(),
                None::<&str>,
            )
        })
        .expect("mounted");
    }
}

/// What shaping needs of root's rights.
const ENOUGH: &str = ",+net_admin,+bpf,+perfmon";

/// Runs `relay-user qos` with no capabilities but these.
fn limited(host: &Host, set: &str, words: &str) -> Output {
    let program = binary("relay-user", "RELAY_USER_BIN").expect("relay-user is built");
    let mut command = Command::new("setpriv");
    command
        .args(["--no-new-privs", "--inh-caps=-all"])
        .arg(format!("--bounding-set=-all{set}"))
        .arg(&program)
        .arg("qos")
        .args(words.split(' '));
    host.run_to_end(command).expect("started")
}

/// How many programs there are at the ingress and at the egress of eth0.
fn programs(host: &Host) -> [usize; 2] {
    host.run(|| {
        [TcAttachType::Ingress, TcAttachType::Egress].map(|hook| {
            let (_, programs) = SchedClassifier::query_tcx("eth0", hook).expect("TCX");
            programs.len()
        })
    })
}

/// Trees that an administrator may have.
const FOREIGN: [&str; 5] = [
    "qdisc add dev eth0 root tbf rate 1mbit burst 10k latency 50ms",
    "qdisc add dev eth0 root pfifo limit 77",
    // With the handles of ours, and changed in its place.
    "qdisc add dev eth0 root handle 1: htb default 40
class add dev eth0 parent 1: classid 1:1 htb rate 10mbit
class add dev eth0 parent 1:1 classid 1:10 htb rate 4mbit ceil 10mbit prio 5
class add dev eth0 parent 1:1 classid 1:40 htb rate 4mbit ceil 10mbit
class add dev eth0 parent 1:1 classid 1:50 htb rate 2mbit ceil 10mbit
qdisc add dev eth0 parent 1:10 handle 100: tbf rate 3mbit burst 10k limit 30k
filter add dev eth0 parent 1: protocol ip prio 3 u32 match ip dport 5060 0xffff flowid 1:10",
    // The same, and a leaf under the handle of another of ours.
    "qdisc add dev eth0 root handle 1: htb default 40
class add dev eth0 parent 1: classid 1:1 htb rate 10mbit
class add dev eth0 parent 1:1 classid 1:10 htb rate 4mbit ceil 10mbit
class add dev eth0 parent 1:1 classid 1:20 htb rate 4mbit ceil 10mbit
class add dev eth0 parent 1:1 classid 1:40 htb rate 2mbit ceil 10mbit
qdisc add dev eth0 parent 1:10 handle 10: pfifo limit 50
qdisc add dev eth0 parent 1:20 handle 20: tbf rate 1mbit burst 10k latency 50ms",
    // One inside another.
    "qdisc add dev eth0 root handle 5: htb default 1
class add dev eth0 parent 5: classid 5:1 htb rate 40gbit
qdisc add dev eth0 parent 5:1 handle 6: htb default 2
class add dev eth0 parent 6: classid 6:2 htb rate 1mbit
qdisc add dev eth0 parent 6:2 handle 7: bfifo limit 9000",
];

#[test]
fn what_the_administrator_made_is_asked_for_and_put_back() {
    for foreign in FOREIGN {
        let net = Direct::new(1).expect("network");
        let host = &net.pbx;
        host.tc(foreign).expect("tc");
        let before = dump(host, "eth0");
        let says = [
            "not relay-user's",
            "--replace",
            "`relay-user qos clear eth0` puts it back",
        ];
        refused(host, "apply eth0 --uplink 1mbit", 1, &says);
        assert_eq!(dump(host, "eth0"), before);
        done(host, "apply eth0 --uplink 1mbit --replace");
        assert_eq!(shown(host, "eth0")["state"], "shaped", "{foreign}");
        assert_eq!(
            shown(host, "eth0")["drift"],
            serde_json::json!([]),
            "{foreign}"
        );
        // Ours needs no flag, and what was there before stays known.
        done(host, "apply eth0 --uplink 2mbit");
        host.tc("qdisc delete dev eth0 root").expect("tc");
        done(host, "apply eth0 --uplink 2mbit");
        done(host, "clear eth0");
        assert_eq!(dump(host, "eth0"), before, "{foreign}");
    }
}

#[test]
fn what_cannot_be_put_back_whole_is_told_before() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    // A hash table of its own, which no filter brings with it.
    host.tc("qdisc add dev eth0 root handle 1: htb
class add dev eth0 parent 1: classid 1:1 htb rate 10mbit
filter add dev eth0 parent 1: prio 5 handle 2: protocol ip u32 divisor 256
filter add dev eth0 parent 1: prio 5 protocol ip u32 ht 2:1: match ip dport 9 0xffff flowid 1:1")
        .expect("tc");
    refused(
        host,
        "apply eth0 --uplink 1mbit",
        1,
        &["cannot put it back wholly"],
    );
    let said = done(host, "apply eth0 --uplink 1mbit --replace");
    assert!(
        said.contains("note: ") && said.contains("cannot put it back wholly"),
        "{said}"
    );
    let said = done(host, "clear eth0");
    assert!(
        said.contains("note: not put back: a filter of 1:"),
        "{said}"
    );
    assert!(
        host.tc("class show dev eth0")
            .expect("tc")
            .contains("class htb 1:1 root prio 0 rate 10Mbit")
    );
    assert!(!exists(host, STATE));
}

#[test]
fn changes_by_hand_are_seen() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    done(host, "apply eth0 --uplink 1mbit");
    host.tc(
        "class change dev eth0 parent 1:1 classid 1:20 htb rate 1mbit
qdisc replace dev eth0 parent 30:1 handle 31: pfifo limit 5
qdisc delete dev eth0 parent 1:40
qdisc add dev eth0 parent 1:40 handle 40: bfifo limit 3000
filter add dev eth0 parent 1: protocol ip u32 match u32 0 0 flowid 1:10",
    )
    .expect("tc");
    let report = shown(host, "eth0");
    assert_eq!(report["state"], "drifted");
    let told: Vec<_> = report["drift"].as_array().expect("drift").iter().collect();
    assert_eq!(
        told,
        [
            "class 1:20 was changed",
            "pfifo of 30:1 was changed",
            "tbf of 1:40 was replaced by bfifo",
            "pfifo of 40:1 is gone",
            "filters were added: 1"
        ]
    );
    assert!(done(host, "show").contains("drifted: class 1:20 was changed"));
    done(host, "apply eth0 --uplink 1mbit");
    assert_eq!(shown(host, "eth0")["state"], "shaped");
    assert_eq!(host.tc("filter show dev eth0").expect("tc"), "");
    // Another tree in the place of ours is its maker's.
    host.tc("qdisc replace dev eth0 root pfifo limit 9")
        .expect("tc");
    let before = dump(host, "eth0");
    assert_eq!(shown(host, "eth0")["state"], "unshaped");
    assert_eq!(
        shown(host, "eth0")["drift"],
        serde_json::json!(["our queueing discipline was replaced"])
    );
    refused(host, "apply eth0 --uplink 1mbit", 1, &["--replace"]);
    let said = done(host, "clear eth0");
    assert!(said.contains("pfifo") && said.contains("stays"), "{said}");
    assert!(!said.contains("again"), "{said}");
    assert_eq!(dump(host, "eth0"), before);
}

#[test]
fn what_was_removed_by_hand_is_told() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = everything(host);
    done(host, "apply eth0 --uplink 1mbit --downlink 8mbit");
    let ifb = format!("relayifb{}", net.pbx_interface.index);
    host.ip(&format!("link set {ifb} down")).expect("down");
    let drift = |what: &str| {
        let report = shown(host, "eth0");
        assert_ne!(report["state"], "shaped");
        let drift = report["drift"].as_array().expect("drift").clone();
        assert!(drift.iter().any(|it| it == what), "no {what} in {drift:?}");
        assert!(done(host, "show eth0").contains(what));
    };
    drift(&format!("{ifb} is down: what comes in is lost"));
    let link = format!("/sys/fs/bpf/relay-qos/v{QOS_ABI}/eth0/relay_downlink_link");
    host.run(|| fs::remove_file(link)).expect("removed");
    until("detached", || programs(host) == [0, 1]);
    drift(&format!("what comes in is not sent to {ifb}"));
    done(host, "apply eth0 --uplink 1mbit");
    let pins = format!("/sys/fs/bpf/relay-qos/v{QOS_ABI}/eth0");
    host.run(|| fs::remove_dir_all(pins)).expect("removed");
    until("detached", || programs(host) == [0, 0]);
    drift("the classifier is missing");
    host.tc("qdisc delete dev eth0 root").expect("tc");
    drift("our queueing discipline was removed");
    assert!(done(host, "clear eth0").contains("the kernel's default again"));
    assert_eq!(everything(host), before);
    refused(host, "clear eth7", 1, &["no interface `eth7`", "`ip link`"]);
    assert!(!exists(host, "/run/relay-user/qos/eth7.lock"));
}

#[test]
fn a_renamed_interface_is_found() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = dump(host, "eth0");
    for (cleared, apply) in [
        ("eth0", "apply eth0 --uplink 1mbit --downlink 8mbit"),
        ("wan0", "apply eth0 --uplink 1mbit"),
        ("eth0", "mark eth0"),
    ] {
        done(host, apply);
        host.ip("link set eth0 down\nlink set eth0 name wan0\nlink set wan0 up")
            .expect("renamed");
        for name in ["eth0", "wan0"] {
            let report = shown(host, name);
            assert_eq!(report["interface"], "wan0");
            let drift = report["drift"].to_string();
            assert!(drift.contains("it was eth0"), "{drift}");
        }
        refused(
            host,
            "apply wan0 --uplink 2mbit",
            1,
            &["eth0 was shaped, and is wan0 now", "qos clear wan0"],
        );
        done(host, &format!("clear {cleared}"));
        assert!(!exists(host, STATE));
        assert!(!exists(host, "/sys/fs/bpf/relay-qos"));
        host.ip("link set wan0 down\nlink set wan0 name eth0\nlink set eth0 up")
            .expect("renamed");
        assert_eq!(dump(host, "eth0"), before);
        assert_eq!(programs(host), [0, 0]);
    }
}

#[test]
fn what_comes_in_is_not_lost_for_its_length_or_number() {
    const PACKETS: u8 = 100;
    let policy = Policy::built_in();
    let host = Host::new("pbx").expect("machine");
    let tap = Tun::with_ethernet(&host, "tap0", "10.8.0.1/24").expect("tap");
    host.ip("link set tap0 mtu 1000").expect("MTU");
    let receiver = host.run(|| UdpSocket::bind("10.8.0.1:9")).expect("socket");
    receiver.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let index = host.run(|| nix::net::if_::if_nametoindex("tap0"));
    let ifb = format!("relayifb{}", index.expect("an interface"));
    let mac = host.run(|| fs::read_to_string("/sys/class/net/tap0/address"));
    let mac = mac.expect("an address");
    let mac: Vec<_> = mac.trim().split(':').collect();
    let mac: Vec<_> = mac
        .into_iter()
        .map(|byte| u8::from_str_radix(byte, 16).expect("a byte"))
        .collect();
    // From 10.8.0.2, without a UDP checksum.
    let frame = |number: u8, length: u16| {
        let ip = length - 14;
        let mut frame = [&mac[..], &[2, 0, 0, 0, 0, 2, 8, 0]].concat();
        frame.extend([0x45, 0]);
        frame.extend(ip.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, UDP, 0, 0, 10, 8, 0, 2, 10, 8, 0, 1]);
        let words = frame[14..34].chunks(2);
        let sum: u32 = words
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame.extend([0x30, 0, 0, 9]);
        frame.extend((ip - 20).to_be_bytes());
        frame.extend([0, 0, number]);
        frame.resize(length.into(), 0);
        frame
    };
    let mut packet = [0; 2000];
    let mut arrives = |number| {
        receiver.recv(&mut packet).expect("it arrives");
        assert_eq!(packet[0], number);
    };
    let request = Request {
        interface: "tap0",
        ..request(&policy, "10mbit", Some("10mbit"))
    };
    host.run(|| shaper::apply(&mut Rtnetlink, &request))
        .expect("shaped");
    tap.send(&frame(1, 1514)).expect("sent");
    arrives(1);
    // As `qos auto` leaves it without a call.
    host.run(|| shaper::unshape(&mut Rtnetlink, "tap0"))
        .expect("unshaped");
    let queue = host.run(|| fs::read_to_string(format!("/sys/class/net/{ifb}/tx_queue_len")));
    assert_eq!(queue.expect("a queue").trim(), "1000");
    for number in 0..PACKETS {
        tap.send(&frame(number, 200)).expect("sent");
    }
    for number in 0..PACKETS {
        arrives(number);
    }
    done(&host, "clear tap0");
}

#[test]
fn an_interface_that_comes_back_is_another_one() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    done(host, "apply eth0 --uplink 1mbit --downlink 8mbit");
    let ifb = format!("relayifb{}", net.pbx_interface.index);
    host.ip("link delete eth0").expect("deleted");
    assert_eq!(shown(host, "eth0")["state"], "gone");
    refused(
        host,
        "apply eth0 --uplink 1mbit",
        1,
        &["no interface `eth0`"],
    );
    let [again, _] = connect(
        End {
            host,
            name: "eth0",
            mac: PBX_MAC,
            addresses: &[],
        },
        End {
            host: &net.phones,
            name: "eth1",
            mac: PHONES_MAC,
            addresses: &[],
        },
    )
    .expect("cable");
    assert_ne!(again.index, net.pbx_interface.index);
    assert_eq!(shown(host, "eth0")["state"], "gone");
    assert!(done(host, "show").contains("was removed"));
    done(host, "apply eth0 --uplink 1mbit");
    assert!(
        !exists(host, &format!("/sys/class/net/{ifb}")),
        "what it was redirected to"
    );
    assert_eq!(shown(host, "eth0")["state"], "shaped");
    host.ip("link delete eth0").expect("deleted");
    let said = done(host, "clear eth0");
    assert!(said.contains("was removed"), "{said}");
    assert!(!exists(host, STATE));
}

#[test]
fn two_at_once_are_one_after_the_other() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    thread::scope(|scope| {
        for rate in ["1mbit", "2mbit", "3mbit", "4mbit"] {
            scope.spawn(move || done(host, &format!("apply eth0 --uplink {rate}")));
        }
    });
    let report = shown(host, "eth0");
    assert_eq!(
        (&report["state"], &report["before"]),
        (&"shaped".into(), &"the kernel's default".into())
    );
}

/// The kernel, which refuses the request of one number.
struct Faulty {
    kernel: Rtnetlink,
    left: u32,
    errno: Errno,
}

impl Faulty {
    fn at(number: u32, errno: Errno) -> Self {
        Self {
            kernel: Rtnetlink,
            left: number,
            errno,
        }
    }

    fn count(&mut self) -> Result<(), Refusal> {
        if self.left == 0 {
            // Once: undoing is let through.
            self.left = u32::MAX;
            return Err(self.errno.into());
        }
        self.left -= 1;
        Ok(())
    }

    /// Whether it has refused something.
    fn has_failed(&self) -> bool {
        self.left > u32::MAX / 2
    }
}

impl Kernel for Faulty {
    fn change(&mut self, message: &Message, flags: u16) -> Result<(), Refusal> {
        self.count()?;
        self.kernel.change(message, flags)
    }

    fn dump(&mut self, question: Message) -> Result<Vec<Object>, Refusal> {
        self.kernel.dump(question)
    }

    fn create_ifb(&mut self, name: &str) -> Result<(), Refusal> {
        self.count()?;
        self.kernel.create_ifb(name)
    }

    fn delete_link(&mut self, index: u32) -> Result<(), Refusal> {
        self.count()?;
        self.kernel.delete_link(index)
    }
}

fn request<'a>(policy: &'a Policy, uplink: &str, downlink: Option<&str>) -> Request<'a> {
    Request {
        interface: "eth0",
        uplink: uplink.parse().expect("rate"),
        downlink: downlink.map(|rate| rate.parse().expect("rate")),
        policy,
        replace: true,
    }
}

/// All that there is to change on the machine: devices, trees, programs, state.
fn everything(host: &Host) -> (String, BTreeSet<String>, [usize; 2], Option<String>) {
    let mut command = Command::new("ip");
    command.args(["-o", "link"]);
    let links = host.output(command).expect("links").stdout;
    let links = String::from_utf8(links).expect("text");
    let mut trees = dump(host, "eth0");
    for line in links.lines() {
        if let Some(ifb) = line
            .split([' ', ':'])
            .find(|word| word.starts_with("relayifb"))
        {
            trees.extend(
                dump(host, ifb)
                    .into_iter()
                    .map(|line| format!("ifb {line}")),
            );
        }
    }
    let names = links
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    (
        names,
        trees,
        programs(host),
        host.run(|| fs::read_to_string(STATE).ok()),
    )
}

#[test]
fn whatever_step_fails_leaves_all_as_it_was() {
    let policy = Policy::built_in();
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let shape = |number, uplink, downlink| {
        host.run(|| {
            let mut kernel = Faulty::at(number, Errno::ENOBUFS);
            let outcome = shaper::apply(&mut kernel, &request(&policy, uplink, downlink));
            (outcome.map(drop), kernel.has_failed())
        })
    };
    let clear = |number| {
        host.run(|| {
            let mut kernel = Faulty::at(number, Errno::ENOBUFS);
            let outcome = shaper::clear(&mut kernel, "eth0");
            (outcome.map(drop), kernel.has_failed())
        })
    };
    let fails_at_each = |what: &str, work: &dyn Fn(u32) -> (Result<(), QosError>, bool)| {
        let before = everything(host);
        for number in 0.. {
            let (outcome, failed) = work(number);
            if !failed {
                outcome.expect(what);
                assert!(number > 0, "{what}: nothing was done");
                break;
            }
            let error = outcome.expect_err(what);
            assert!(
                !matches!(error, QosError::NotUndone { .. }),
                "{what}, step {number}: {error}"
            );
            assert_eq!(everything(host), before, "{what}, step {number}");
        }
    };
    fails_at_each("on the kernel's default", &|number| {
        shape(number, "1mbit", Some("8mbit"))
    });
    fails_at_each("on ours", &|number| shape(number, "2mbit", Some("9mbit")));
    fails_at_each("without downlink", &|number| shape(number, "2mbit", None));
    fails_at_each("cleared", &clear);
    for foreign in FOREIGN {
        host.tc(foreign).expect("tc");
        fails_at_each(foreign, &|number| shape(number, "1mbit", None));
        fails_at_each(foreign, &clear);
        host.tc("qdisc delete dev eth0 root").expect("tc");
    }
}

/// A killed process changes nothing any more.
struct Killed(Faulty);

impl Killed {
    fn or_dies(outcome: Result<(), Refusal>) -> Result<(), Refusal> {
        if outcome.is_err() {
            // Past the panic hook: it would tell.
            resume_unwind(Box::new(()));
        }
        outcome
    }
}

impl Kernel for Killed {
    fn change(&mut self, message: &Message, flags: u16) -> Result<(), Refusal> {
        Self::or_dies(self.0.change(message, flags))
    }

    fn dump(&mut self, question: Message) -> Result<Vec<Object>, Refusal> {
        self.0.dump(question)
    }

    fn create_ifb(&mut self, name: &str) -> Result<(), Refusal> {
        // After it, and before anything else.
        let is_last = self.0.count();
        self.0.kernel.create_ifb(name)?;
        Self::or_dies(is_last)
    }

    fn delete_link(&mut self, index: u32) -> Result<(), Refusal> {
        Self::or_dies(self.0.delete_link(index))
    }
}

#[test]
fn whenever_apply_is_killed_clear_puts_all_back() {
    let policy = Policy::built_in();
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    // Whether it was killed.
    let killed = |number, uplink, downlink| {
        host.run(|| {
            let mut kernel = Killed(Faulty::at(number, Errno::EINTR));
            let request = request(&policy, uplink, downlink);
            let work = AssertUnwindSafe(|| shaper::apply(&mut kernel, &request).map(drop));
            catch_unwind(work)
                .map(|outcome| outcome.expect("applied"))
                .is_err()
        })
    };
    let none = |_: &Host| {};
    let tree = |host: &Host| drop(host.tc(FOREIGN[2]).expect("tc"));
    for (foreign, earlier, uplink, downlink) in [
        (&none as &dyn Fn(&Host), None, "1mbit", Some("8mbit")),
        (&none, Some(Some("8mbit")), "2mbit", None),
        (&none, Some(None), "300mbit", Some("9mbit")),
        (&tree, None, "1mbit", None),
    ] {
        foreign(host);
        let before = everything(host);
        for number in 0.. {
            if let Some(downlink) = earlier {
                host.run(|| shaper::apply(&mut Rtnetlink, &request(&policy, "1mbit", downlink)))
                    .expect("applied");
            }
            let was_killed = killed(number, uplink, downlink);
            done(host, "show");
            done(host, "clear eth0");
            assert_eq!(everything(host), before, "{uplink}, step {number}");
            if !was_killed {
                assert!(number > 5, "{uplink}: {number} steps");
                break;
            }
        }
    }
    assert!(!exists(host, "/sys/fs/bpf/relay-qos"));
}

#[test]
fn a_killed_apply_leaves_no_program_behind_clear() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = everything(host);
    let program = binary("relay-user", "RELAY_USER_BIN").expect("relay-user is built");
    // Some before the classifier is attached, some while it is, some after.
    for milliseconds in (0..100).step_by(7) {
        let mut command = Command::new(&program);
        command.args(["qos", "apply", "eth0", "--uplink", "1mbit"]);
        command.args(["--downlink", "8mbit"]);
        let mut apply = host.spawn(command).expect("started");
        thread::sleep(Duration::from_millis(milliseconds));
        apply.child_mut().kill().expect("killed");
        apply.child_mut().wait().expect("ended");
        done(host, "show eth0");
        done(host, "clear eth0");
        assert_eq!(everything(host), before, "after {milliseconds} ms");
        assert!(!exists(host, "/sys/fs/bpf/relay-qos"));
    }
}

#[test]
fn a_killed_preparation_of_pins_is_cleared() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = everything(host);
    done(host, "apply eth0 --uplink 1mbit");
    let pins = format!("/sys/fs/bpf/relay-qos/v{QOS_ABI}/eth0");
    host.run(|| {
        fs::remove_dir_all(&pins).expect("removed");
        fs::create_dir_all(format!("{pins}/next")).expect("made");
    });
    until("detached", || programs(host) == [0, 0]);
    done(host, "clear eth0");
    assert_eq!(everything(host), before);
    assert!(!exists(host, &pins));
}

#[test]
fn a_kernel_without_a_part_is_told_of() {
    let policy = Policy::built_in();
    let net = Direct::new(1).expect("network");
    let apply = |number, errno| {
        net.pbx.run(|| {
            let request = request(&policy, "1mbit", Some("8mbit"));
            shaper::apply(&mut Faulty::at(number, errno), &request).expect_err("a part is missing")
        })
    };
    let ifb = apply(0, Errno::EOPNOTSUPP).to_string();
    assert!(ifb.contains("modprobe ifb"), "{ifb}");
    let htb = apply(1, Errno::ENOENT).to_string();
    assert!(htb.contains("modprobe sch_htb"), "{htb}");
    let root = apply(1, Errno::EPERM).to_string();
    assert!(root.contains("CAP_NET_ADMIN"), "{root}");
}

#[test]
fn trees_come_and_go_beside_the_classifier() {
    let policy = Policy::built_in();
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let before = dump(host, "eth0");
    let request = request(&policy, "1mbit", None);
    host.run(|| {
        shaper::shape(&mut Rtnetlink, &request).expect("shaped");
        shaper::shape(&mut Rtnetlink, &request).expect("shaped again");
    });
    assert_eq!(shown(host, "eth0")["state"], "shaped");
    host.run(|| shaper::unshape(&mut Rtnetlink, "eth0"))
        .expect("unshaped");
    assert_eq!(dump(host, "eth0"), before);
    assert_eq!(shown(host, "eth0")["state"], "unshaped");
    host.run(|| shaper::shape(&mut Rtnetlink, &request))
        .expect("shaped");
    done(host, "clear eth0");
    assert_eq!(dump(host, "eth0"), before);
}

#[test]
fn a_relay_in_xdp_is_warned_of() {
    let net = Direct::new(1).expect("network");
    let relay = Relay::attach(&net.pbx, "eth0", ["--mode", "generic"]).expect("relay");
    let said = done(&net.pbx, "apply eth0 --uplink 1mbit");
    assert!(
        said.contains("bypass these queues") && said.contains("--mode tc"),
        "{said}"
    );
    refused(
        &net.pbx,
        "apply eth0 --uplink 1mbit --downlink 8mbit",
        1,
        &["generic XDP", "--mode tc"],
    );
    done(&net.pbx, "clear eth0");
    relay.stop().expect("stopped");
}

#[test]
fn a_relay_is_not_put_where_it_would_see_everything_twice() {
    let net = Direct::new(1).expect("network");
    let policy = Policy::built_in();
    net.pbx.run(|| {
        let request = request(&policy, "1mbit", Some("8mbit"));
        shaper::apply(&mut Rtnetlink, &request).expect("shaped");
        shaper::unshape(&mut Rtnetlink, "eth0").expect("unshaped");
    });
    let relay = Relay::attach(&net.pbx, "eth0", [""; 0]).expect("relay");
    assert_eq!(relay.json(["status"]).expect("status")["mode"], "tc");
    relay.stop().expect("stopped");
    done(&net.pbx, "clear eth0");
}

#[test]
fn the_report_is_of_one_shape() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let keys = |value: &Value| -> Vec<String> {
        let object = value.as_object().expect("an object");
        object.keys().cloned().collect()
    };
    let interface = [
        "auto",
        "before",
        "downlink",
        "drift",
        "ifindex",
        "interface",
        "policy",
        "rules",
        "state",
        "uplink",
    ];
    assert_eq!(keys(&shown(host, "eth0")), interface);
    done(host, "apply eth0 --uplink 1mbit --downlink 8mbit");
    let report = shown(host, "eth0");
    assert_eq!(keys(&report), interface);
    for line in ["uplink", "downlink"] {
        let line = &report[line];
        assert_eq!(
            keys(line),
            [
                "classes", "device", "leaf", "rate", "rules", "shaped", "splits"
            ]
        );
        assert_eq!(
            keys(&line["classes"][1]),
            [
                "backlog_bytes",
                "backlog_packets",
                "bits_per_second",
                "bytes",
                "ceiling",
                "drops",
                "id",
                "name",
                "overlimits",
                "packets",
                "prio",
                "rate"
            ]
        );
    }
    assert_eq!(report["downlink"]["shaped"], 7_600_000);
    assert_eq!(
        report["downlink"]["device"],
        format!("relayifb{}", net.pbx_interface.index)
    );
}
