//! The real daemon on real interfaces: what leaves, what does not, and what the PBX gets instead.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder, SlicedPacket,
    TransportSlice, UdpHeader,
};
use nix::sys::socket::{setsockopt, sockopt};
use relay_tests::{
    capture::{Capture, Direction, Frame, Injector},
    link::{Interface, PassProgram},
    namespace::Host,
    pair::{Legs, Sockets},
    phone::{Bank, Phone},
    relay::Relay,
    rtp::{Rtp, Stamp},
    topology::{Direct, PBX_MAC, PBX_V4, PBX_V6, PHONES_MAC, ROUTER_MAC, Routed},
    tun::Tun,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);
/// Expedited Forwarding.
const EF: u8 = 46;

/// A cable with a phone and a PBX of both families at its ends, and the daemon attached.
struct Wire {
    net: Direct,
    relay: Relay,
    sockets: [Sockets; 2],
    /// Serves the PBX's sockets.
    pbx: Bank,
    /// Serves the phones.
    _phones: Bank,
    /// Lets the phones' end receive what native XDP sends (see the harness's `link`).
    _pass: Option<PassProgram>,
}

impl Wire {
    fn new(mode: &str, arguments: &[&str]) -> Self {
        let net = Direct::new(2).expect("network");
        let pass =
            (mode == "native").then(|| net.phones_interface.pass_program().expect("pass program"));
        let arguments = [&["--mode", mode], arguments].concat();
        let relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
        let (phones, pbx) = (
            Bank::new(&net.phones).expect("phones"),
            Bank::new(&net.pbx).expect("sockets"),
        );
        Self {
            sockets: Legs::direct()
                .map(|legs| Sockets::open(legs, &phones, &pbx).expect("sockets")),
            net,
            relay,
            pbx,
            _phones: phones,
            _pass: pass,
        }
    }

    /// Has both pairs relayed; returns their numbers.
    fn offload(&self) -> [u64; 2] {
        offload(&self.relay, &self.sockets)
    }
}

fn offload(relay: &Relay, sockets: &[Sockets; 2]) -> [u64; 2] {
    sockets
        .each_ref()
        .map(|sockets| sockets.offload(relay).expect("offloaded"))
}

/// Both pairs talk both ways; `class` is what the DSCP in front of `phone`'s ECN bits becomes.
fn relays_both_ways(mode: &str, dscp: &str, class: fn(u8) -> u8) {
    const VOICE: usize = 100;
    const EVENTS: usize = 20;
    let wire = Wire::new(mode, &["--dscp", dscp]);
    let ids = wire.offload();
    let capture = Capture::start(&wire.net.phones_interface).expect("capture");
    // Four streams, the four values of ECN, and as many of DSCP.
    let tos = |pair: usize, leg: usize| ((10 + 13 * pair + 7 * leg) << 2 | (2 * pair + leg)) as u8;
    for (pair, sockets) in wire.sockets.iter().enumerate() {
        for leg in [0, 1] {
            sockets.phones[leg].set_tos(tos(pair, leg)).expect("TOS");
            sockets.talk(leg, 0, Some(VOICE as u64));
        }
    }
    let everyone = || {
        let legs = wire.sockets.iter().enumerate();
        legs.flat_map(|(pair, sockets)| [0, 1].map(|leg| (pair, sockets, leg)))
    };
    for (_, sockets, leg) in everyone() {
        let phone = &sockets.phones[1 - leg];
        phone.wait_received(VOICE, PATIENCE).expect("voice");
        sockets.talk(leg, [101, 96][leg], Some(EVENTS as u64));
    }
    for (pair, sockets, leg) in everyone() {
        let (from, to) = (&sockets.phones[leg], &sockets.phones[1 - leg]);
        to.wait_received(VOICE + EVENTS, PATIENCE).expect("events");
        let report = to.heard(from);
        assert_eq!(report.received, (VOICE + EVENTS) as u64, "{report:?}");
        assert_eq!(
            [
                report.lost,
                report.duplicates,
                report.reordered,
                report.foreign
            ],
            [0; 4]
        );
        for (number, arrival) in to.arrivals().iter().enumerate() {
            let tos = tos(pair, leg);
            assert_eq!(arrival.from, sockets.legs.local[1 - leg]);
            assert_eq!(
                (arrival.ttl, arrival.tos),
                (63, class(tos >> 2) << 2 | tos & 3)
            );
            let rtp = arrival.rtp.expect("RTP");
            let event = [96, 101][leg];
            assert_eq!(rtp.payload_type, if number < VOICE { 0 } else { event });
            assert_eq!(rtp.ssrc, 100 + leg as u32);
            assert_eq!(rtp.marker, number == 0);
        }
        assert_eq!(sockets.at_pbx(), 0, "the PBX's sockets stand still");
    }
    let all = 4 * (VOICE + EVENTS) as u64;
    assert_eq!(wire.relay.reasons().expect("status")["relayed"], all);
    for (index, id) in ids.into_iter().enumerate() {
        let pair = wire.relay.json(["show", &id.to_string()]).expect("show");
        for stream in pair["streams"].as_array().expect("streams") {
            assert_eq!(stream["packets"], all / 4, "{pair:#}");
            let leg = stream["leg"].as_u64().expect("a leg") as usize;
            let mark = json!({ "dscp": tos(index, leg) >> 2, "packets": all / 4 });
            assert_eq!(stream["marks"], json!([mark]), "{pair:#}");
        }
    }
    let recording = capture.stop().expect("no drops");
    assert_eq!(recording.verify().wrong, [""; 0]);
    let arrived = recording.only(Direction::In);
    let macs = arrived
        .datagrams()
        .filter(|(_, datagram)| datagram.payload.len() > 100)
        .map(|(_, datagram)| (datagram.source_mac, datagram.destination_mac));
    let macs: Vec<_> = macs.collect();
    assert_eq!(macs, vec![(PBX_MAC, PHONES_MAC); all as usize]);
}

#[test]
fn a_pair_is_relayed_and_marked_ef() {
    relays_both_ways("generic", "ef", |_| EF);
}

#[test]
fn a_pair_is_relayed_with_the_dscp_of_its_phone() {
    relays_both_ways("generic", "keep", |dscp| dscp);
}

#[test]
fn a_pair_is_relayed_with_the_dscp_of_its_phone_translated() {
    relays_both_ways("generic", "map:17=ef,23=cs1,30=0", |dscp| match dscp {
        17 => EF,
        23 => 8,
        30 => 0,
        kept => kept,
    });
}

#[test]
fn a_pair_is_relayed_by_the_driver_with_any_dscp() {
    relays_both_ways("native", "34", |_| 34);
}

#[test]
fn a_pair_is_relayed_by_traffic_control() {
    relays_both_ways("tc", "ef", |_| EF);
}

/// A UDP packet to be written out, with its checksums computed from scratch.
#[derive(Clone)]
struct Packet {
    destination_mac: [u8; 6],
    source_mac: [u8; 6],
    /// EtherType and control of each VLAN tag.
    tags: Vec<[u16; 2]>,
    source: SocketAddr,
    destination: SocketAddr,
    /// TOS or traffic class.
    class: u8,
    hop_limit: u8,
    checksum: bool,
    options: bool,
    payload: Vec<u8>,
    /// What Ethernet pads short frames with.
    padding: usize,
}

impl Packet {
    /// From the phone of the first leg to the PBX.
    fn new(legs: &Legs, payload: Vec<u8>) -> Self {
        Self {
            destination_mac: PBX_MAC,
            source_mac: PHONES_MAC,
            tags: Vec::new(),
            source: legs.remote[0],
            destination: legs.local[0],
            class: 10 << 2,
            hop_limit: 64,
            checksum: true,
            options: false,
            payload,
            padding: 0,
        }
    }

    /// What the relay has to make of it.
    fn relayed(&self, legs: &Legs) -> Self {
        let mut payload = self.payload.clone();
        if payload[1] & 0x7f == 101 {
            payload[1] = payload[1] & 0x80 | 96;
        }
        Self {
            destination_mac: PHONES_MAC,
            source_mac: PBX_MAC,
            source: legs.local[1],
            destination: legs.remote[1],
            class: EF << 2 | self.class & 3,
            hop_limit: self.hop_limit - 1,
            payload,
            ..self.clone()
        }
    }

    fn ethernet(&self, ethertype: u16) -> Vec<u8> {
        let mut frame = [self.destination_mac, self.source_mac].concat();
        for [tpid, control] in &self.tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    fn frame(&self) -> Vec<u8> {
        let payload = &self.payload;
        let (source, destination) = (self.source.port(), self.destination.port());
        let mut udp = UdpHeader::without_ipv4_checksum(source, destination, payload.len())
            .expect("a length that fits");
        let mut frame;
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame = self.ethernet(0x0800);
                let length = (UdpHeader::LEN + payload.len()) as u16;
                let (from, to) = (from.octets(), to.octets());
                let mut ip = Ipv4Header::new(length, self.hop_limit, IpNumber::UDP, from, to)
                    .expect("a length that fits");
                ip.dscp = (self.class >> 2).try_into().expect("six bits");
                ip.ecn = (self.class & 3).try_into().expect("two bits");
                ip.identification = 0x1234;
                ip.dont_fragment = true;
                if self.options {
                    ip.options = [1; 4].into();
                    ip.set_payload_len(length.into())
                        .expect("a length that fits");
                }
                ip.header_checksum = ip.calc_header_checksum();
                ip.write(&mut frame).expect("written");
                if self.checksum {
                    udp.checksum = udp
                        .calc_checksum_ipv4_raw(from, to, payload)
                        .expect("a length that fits");
                }
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                frame = self.ethernet(0x86dd);
                let extension = if self.options { 8 } else { 0 };
                let ip = Ipv6Header {
                    traffic_class: self.class,
                    flow_label: Ipv6FlowLabel::try_new(0xa_bcde).expect("20 bits"),
                    payload_length: (extension + UdpHeader::LEN + payload.len()) as u16,
                    next_header: if self.options {
                        IpNumber::IPV6_HEADER_HOP_BY_HOP
                    } else {
                        IpNumber::UDP
                    },
                    hop_limit: self.hop_limit,
                    source: from.octets(),
                    destination: to.octets(),
                };
                ip.write(&mut frame).expect("written");
                if self.options {
                    // Next header, length in 8 bytes beyond the first, PadN of 4 (RFC 8200, section 4.2).
                    frame.extend([17, 0, 1, 4, 0, 0, 0, 0]);
                }
                if self.checksum {
                    udp.checksum = udp
                        .calc_checksum_ipv6_raw(from.octets(), to.octets(), payload)
                        .expect("a length that fits");
                }
            }
            mixed => panic!("{mixed:?}"),
        }
        udp.write(&mut frame).expect("written");
        frame.extend(payload);
        frame.resize(frame.len() + self.padding, 0xaa);
        frame
    }

    /// The frame in two fragments.
    fn fragments(&self) -> [Vec<u8>; 2] {
        const FIRST: usize = 88;
        const IDENTIFICATION: u32 = 0x77;
        let frame = self.frame();
        [false, true].map(|last| {
            let offset = if last { FIRST / 8 } else { 0 } as u16;
            if self.source.is_ipv4() {
                let (mut ip, rest) = Ipv4Header::from_slice(&frame[14..]).expect("IPv4");
                let (head, tail) = rest.split_at(FIRST);
                let part = if last { tail } else { head };
                ip.dont_fragment = false;
                ip.more_fragments = !last;
                ip.fragment_offset = IpFragOffset::try_new(offset).expect("13 bits");
                ip.set_payload_len(part.len()).expect("a length that fits");
                ip.header_checksum = ip.calc_header_checksum();
                let mut fragment = frame[..14].to_vec();
                ip.write(&mut fragment).expect("written");
                fragment.extend(part);
                fragment
            } else {
                let (mut ip, rest) = Ipv6Header::from_slice(&frame[14..]).expect("IPv6");
                let (head, tail) = rest.split_at(FIRST);
                let part = if last { tail } else { head };
                ip.next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
                ip.payload_length = (8 + part.len()) as u16;
                let mut fragment = frame[..14].to_vec();
                ip.write(&mut fragment).expect("written");
                // Next header, reserved, offset in 8 bytes with the flag "more" (RFC 8200, section 4.5).
                fragment.extend([17, 0]);
                fragment.extend((offset << 3 | u16::from(!last)).to_be_bytes());
                fragment.extend(IDENTIFICATION.to_be_bytes());
                fragment.extend(part);
                fragment
            }
        })
    }
}

/// A packet of G.711 as a phone makes it.
fn voice(number: u64) -> Vec<u8> {
    let rtp = Rtp {
        marker: false,
        payload_type: 0,
        sequence: number as u16,
        timestamp: 160 * number as u32,
        ssrc: 0xfeed,
    };
    rtp.packet(&Stamp { sender: 0, number }.write())
}

/// Packets of the first leg's phone that the kernel relays.
fn relayed_packets(legs: &Legs) -> Vec<(String, Packet)> {
    let v4 = legs.local[0].is_ipv4();
    let plain = Packet::new(legs, voice(1));
    let mut packets = vec![
        ("plain".to_owned(), plain.clone()),
        (
            "padded by Ethernet".to_owned(),
            Packet {
                padding: 5,
                ..plain.clone()
            },
        ),
        (
            "802.1Q".to_owned(),
            Packet {
                tags: vec![[0x8100, 0xa00a]],
                ..plain.clone()
            },
        ),
        (
            "QinQ".to_owned(),
            Packet {
                tags: vec![[0x88a8, 0x6064], [0x8100, 0xa00a]],
                ..plain.clone()
            },
        ),
        (
            "last hop but one".to_owned(),
            Packet {
                hop_limit: 2,
                ..plain.clone()
            },
        ),
    ];
    for class in [0, 1, 2, 3, 0xb9, 0xff] {
        packets.push((
            format!("class {class:#x}"),
            Packet {
                class,
                ..plain.clone()
            },
        ));
    }
    if v4 {
        let unsummed = Packet {
            checksum: false,
            ..plain.clone()
        };
        packets.push(("no UDP checksum".to_owned(), unsummed));
    }
    let mut payloads = vec![("event with marker", voice(2)), ("odd length", voice(3))];
    payloads[0].1[1] = 0x80 | 101;
    payloads[1].1.push(7);
    payloads.push(("header alone", voice(4)[..12].to_vec()));
    let mut contributors = voice(5);
    contributors[0] |= 15;
    payloads.push(("15 contributing sources", contributors));
    let mut extension = voice(6);
    extension[0] |= 0x10;
    // Two words of extension (RFC 3550, section 5.3.1).
    extension[12..16].copy_from_slice(&[0xbe, 0xde, 0, 2]);
    payloads.push(("header extension", extension));
    let room = if v4 { MTU_V4 - 28 } else { MTU_V6 - 48 };
    let mut full = voice(7);
    full.resize(room, 0x55);
    payloads.push(("as large as the way out takes", full));
    for (name, payload) in payloads {
        packets.push((name.to_owned(), Packet::new(legs, payload)));
    }
    packets
}

/// MTU of the routes to the second phone, below the interface's.
const MTU_V4: usize = 1000;
/// The least that IPv6 allows.
const MTU_V6: usize = 1280;

/// What a frame is that the kernel leaves to the stack.
struct Passed {
    name: &'static str,
    frames: Vec<Vec<u8>>,
    reason: &'static str,
    /// The port of the PBX's socket that gets one datagram of it; none where the stack itself drops it.
    socket: Option<u16>,
}

fn passed_packets(legs: &Legs) -> Vec<Passed> {
    let v4 = legs.local[0].is_ipv4();
    let rtp = legs.local[0].port();
    let plain = Packet::new(legs, voice(1));
    let with = |payload: Vec<u8>| Packet::new(legs, payload).frame();
    let case = |name, frame, reason, socket| Passed {
        name,
        frames: vec![frame],
        reason,
        socket,
    };
    let changed = |change: &dyn Fn(&mut Packet)| {
        let mut packet = plain.clone();
        change(&mut packet);
        packet.frame()
    };
    let edited = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = plain.frame();
        change(&mut frame);
        frame
    };
    let payload = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut payload = voice(1);
        change(&mut payload);
        with(payload)
    };
    let ip = 14;
    let udp = ip + if v4 { 20 } else { 40 };
    let mtu = if v4 { MTU_V4 - 28 } else { MTU_V6 - 48 };
    let mut cases = vec![
        case(
            "another phone's address",
            changed(&|it| it.source.set_ip(legs.remote[1].ip())),
            "unexpected_source",
            Some(rtp),
        ),
        case(
            "another port of the phone",
            changed(&|it| it.source.set_port(30_001)),
            "unexpected_source",
            Some(rtp),
        ),
        case(
            "RTCP",
            changed(&|it| {
                it.source.set_port(30_001);
                it.destination.set_port(rtp + 1);
                // Sender report (RFC 3550, section 6.4.1).
                it.payload = [&[0x80, 200, 0, 6][..], &[1; 24]].concat();
            }),
            "rtcp",
            Some(rtp + 1),
        ),
        case(
            "RTCP on RTP's port",
            // Receiver report (RFC 3550, section 6.4.2).
            with([&[0x80, 201, 0, 1][..], &[1; 4]].concat()),
            "rtcp",
            Some(rtp),
        ),
        case(
            "something else on RTCP's port",
            changed(&|it| it.destination.set_port(rtp + 1)),
            "no_stream",
            Some(rtp + 1),
        ),
        case(
            "another payload type",
            payload(&|it| it[1] = 8),
            "payload_type",
            Some(rtp),
        ),
        case(
            "the other leg's number of the event",
            payload(&|it| it[1] = 96),
            "payload_type",
            Some(rtp),
        ),
        case(
            "RTP version 1",
            payload(&|it| it[0] = 0x40),
            "not_rtp",
            Some(rtp),
        ),
        case(
            "STUN",
            with([&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[9; 12]].concat()),
            "not_rtp",
            Some(rtp),
        ),
        case(
            "half an RTP header",
            with(voice(1)[..11].to_vec()),
            "rtp_length",
            Some(rtp),
        ),
        case(
            "an empty datagram",
            with(Vec::new()),
            "rtp_length",
            Some(rtp),
        ),
        case(
            "contributing sources that are not there",
            with([&[0x8f][..], &voice(1)[1..40]].concat()),
            "rtp_length",
            Some(rtp),
        ),
        case(
            "an extension that is not there",
            payload(&|it| {
                it[0] = 0x90;
                it[12..16].copy_from_slice(&[0xbe, 0xde, 0xff, 0xff]);
            }),
            "rtp_length",
            Some(rtp),
        ),
        case(
            "RTP with padding",
            payload(&|it| {
                it[0] |= 0x20;
                *it.last_mut().expect("a payload") = 4;
            }),
            "rtp_padding",
            Some(rtp),
        ),
        case(
            "IP options",
            changed(&|it| it.options = true),
            "ip_options",
            Some(rtp),
        ),
        case(
            "the last hop",
            changed(&|it| it.hop_limit = 1),
            "hop_limit",
            Some(rtp),
        ),
        case(
            "a byte too large for the way out",
            payload(&|it| it.resize(mtu + 1, 0x55)),
            "too_big",
            Some(rtp),
        ),
        Passed {
            name: "two fragments",
            frames: plain.fragments().into(),
            reason: "fragment",
            socket: Some(rtp),
        },
        case(
            "a cut frame",
            edited(&|it| it.truncate(100)),
            "truncated",
            None,
        ),
        case(
            "a UDP length that is not IP's",
            edited(&|it| it[udp + 5] ^= 4),
            "malformed",
            None,
        ),
        case(
            "another machine's MAC address",
            changed(&|it| it.destination_mac[5] ^= 0x40),
            "other_host",
            None,
        ),
        case(
            "three VLAN tags",
            changed(&|it| it.tags = vec![[0x88a8, 1], [0x88a8, 2], [0x8100, 3]]),
            "vlan_depth",
            None,
        ),
        case(
            "no IP at all",
            edited(&|it| it[12..14].copy_from_slice(&[0x88, 0xb5])),
            "not_ip",
            None,
        ),
    ];
    if v4 {
        let mut ip_header = plain.frame();
        // A protocol that nobody listens to (253, RFC 3692), with its checksum.
        ip_header[ip + 9] = 253;
        let (header, _) = Ipv4Header::from_slice(&ip_header[ip..]).expect("IPv4");
        ip_header[ip + 10..ip + 12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
        cases.push(case("not UDP", ip_header, "not_udp", None));
    } else {
        cases.push(case(
            "not UDP",
            edited(&|it| it[ip + 6] = 253),
            "not_udp",
            None,
        ));
        cases.push(case(
            "no UDP checksum",
            changed(&|it| it.checksum = false),
            "udp_checksum",
            None,
        ));
    }
    cases
}

/// Every crafted frame: what comes back is exactly what was computed from scratch, and what is passed reaches the
/// PBX's stack as it was sent, counted under its reason.
fn relays_exactly(mode: &str) {
    let wire = Wire::new(mode, &[]);
    let (v4, v6) = (Direct::phone_v4(1), Direct::phone_v6(1));
    let routes = format!(
        "route add {v4}/32 dev eth0 mtu {MTU_V4}\nroute add {v6}/128 dev eth0 mtu {MTU_V6}"
    );
    wire.net.pbx.ip(&routes).expect("routes");
    wire.offload();
    let injector = Injector::open(&wire.net.phones_interface).expect("injector");
    let phones = Capture::start(&wire.net.phones_interface).expect("capture");
    let pbx = Capture::start(&wire.net.pbx_interface).expect("capture");
    // Whatever UDP comes back to the phones, from anywhere.
    let back = |frames: &[Frame]| -> Vec<Vec<u8>> {
        let frames = frames
            .iter()
            .filter(|frame| frame.direction == Direction::In);
        let datagrams = frames.filter(|frame| frame.datagram().is_some());
        datagrams.map(|frame| frame.bytes.clone()).collect()
    };
    let before = wire.relay.reasons().expect("status");
    let mut expected = BTreeMap::new();
    let mut came_back = 0;
    for sockets in &wire.sockets {
        let legs = &sockets.legs;
        for (name, packet) in relayed_packets(legs) {
            injector.send(&packet.frame()).expect("inject");
            came_back += 1;
            *expected.entry("relayed").or_insert(0) += 1;
            phones
                .wait(PATIENCE, |frames| back(frames).len() >= came_back)
                .unwrap_or_else(|error| panic!("{}: {name}: {error:#}", legs.remote[0]));
            let frames = back(&phones.so_far().frames);
            let frame = &frames[came_back - 1];
            let right = packet.relayed(legs).frame();
            assert_eq!(hex(frame), hex(&right), "{}: {name}", legs.remote[0]);
        }
        assert_eq!(sockets.at_pbx(), 0, "the PBX's sockets stand still");

        let rtcp = SocketAddr::new(legs.local[0].ip(), legs.local[0].port() + 1);
        let rtcp = wire.pbx.phone(rtcp).expect("RTCP socket");
        for passed in passed_packets(legs) {
            let context = format!("{}: {}", legs.remote[0], passed.name);
            let socket = match passed.socket {
                Some(port) if port == rtcp.local().port() => &rtcp,
                _ => &sockets.pbx[0],
            };
            let heard = socket.arrivals().len();
            for frame in &passed.frames {
                injector.send(frame).expect("inject");
                *expected.entry(passed.reason).or_insert(0) += 1;
                pbx.wait(PATIENCE, |frames| seen(frames, frame))
                    .unwrap_or_else(|error| panic!("{context}: {error:#}"));
            }
            if passed.socket.is_some() {
                socket
                    .wait_received(heard + 1, PATIENCE)
                    .unwrap_or_else(|error| panic!("{context}: {error:#}"));
            }
        }
    }
    let after = wire.relay.reasons().expect("status");
    for (reason, packets) in after {
        let counted = packets - before[&reason];
        let expected = expected.get(reason.as_str()).copied().unwrap_or(0);
        // The machines themselves send ARP, neighbour discovery, and multicast reports with a router alert.
        if ["not_ip", "not_udp", "ip_options"].contains(&reason.as_str()) {
            assert!(counted >= expected, "{reason}: {counted}, not {expected}");
        } else {
            assert_eq!(counted, expected, "{reason}");
        }
    }
    let phones = phones.stop().expect("no drops").only(Direction::In);
    assert_eq!(
        back(&phones.frames).len(),
        came_back,
        "nothing else came back"
    );
    assert_eq!(phones.verify().wrong, [""; 0]);
}

fn seen(frames: &[Frame], wanted: &[u8]) -> bool {
    let mut arrived = frames.iter().filter(|it| it.direction == Direction::In);
    arrived.any(|it| it.bytes == wanted)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn frames_come_back_exactly_or_pass_untouched() {
    relays_exactly("generic");
}

#[test]
fn frames_come_back_exactly_or_pass_untouched_in_the_driver() {
    relays_exactly("native");
}

#[test]
fn frames_come_back_exactly_or_pass_untouched_in_traffic_control() {
    relays_exactly("tc");
}

/// Senders on the same host leave the UDP checksum to a device that never sees the packet.
fn relays_unfinished_checksums(mode: &str) {
    const BEFORE: usize = 50;
    const RELAYED: usize = 300;
    let wire = Wire::new(mode, &[]);
    let interface = &wire.net.phones_interface;
    interface.leave_checksums_to_device().expect("offload");
    let capture = Capture::start(interface).expect("capture");
    for sockets in &wire.sockets {
        for leg in [0, 1] {
            sockets.talk(leg, 0, Some(BEFORE as u64));
            sockets.passed(leg, BEFORE).expect("not relayed yet");
        }
    }
    wire.offload();
    for sockets in &wire.sockets {
        for leg in [0, 1] {
            // The second half renumbered: another change under the checksum.
            sockets.talk(leg, 0, Some(RELAYED as u64 / 2));
            sockets.relayed(leg, RELAYED / 2).expect("relayed");
            sockets.talk(leg, [101, 96][leg], Some(RELAYED as u64 / 2));
            sockets.relayed(leg, RELAYED).expect("relayed");
            let fate = sockets.fate(leg).expect("no loss");
            assert_eq!(fate, [(false, BEFORE), (true, RELAYED)]);
        }
    }
    let recording = capture.stop().expect("no drops");
    let sent = recording.only(Direction::Out);
    let unfinished = sent.frames.iter().filter(|it| it.checksum_pending).count();
    assert_eq!(unfinished, 4 * (BEFORE + RELAYED), "the offload is on");
    // What has a socket buffer keeps the note that the checksum is unfinished; native XDP loses it, so it must be right.
    let arrived = recording.only(Direction::In);
    let wrong = arrived.verify().wrong;
    let pending = |line: &&String| mode != "native" && line.contains("left to the device");
    assert_eq!(wrong.iter().find(|line| !pending(line)), None);
}

#[test]
fn unfinished_checksums_are_relayed() {
    relays_unfinished_checksums("generic");
}

#[test]
fn unfinished_checksums_are_relayed_by_traffic_control() {
    relays_unfinished_checksums("tc");
}

#[test]
fn unfinished_checksums_are_finished_by_the_driver() {
    relays_unfinished_checksums("native");
}

/// A sender may hand several packets to its device at once, and a veth takes them apart as little as a NIC that merges
/// what it receives.
#[test]
fn packets_that_come_merged_are_taken_apart_and_left_to_the_pbx() {
    const EACH: u64 = 4;
    let net = Direct::new(2).expect("network");
    // Without it the stack takes them apart before they leave.
    let phones = &net.phones_interface;
    phones.leave_checksums_to_device().expect("offload");
    let relay = Relay::attach(&net.pbx, "eth0", ["--mode", "tc"]).expect("attached");
    let [phones, pbx] = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
    for (legs, expected) in Legs::direct().iter().zip(1..) {
        let sender = net.phones.run(|| UdpSocket::bind(legs.remote[0]));
        let sender = sender.expect("the sender");
        let listener = phones.phone(legs.remote[1]).expect("the listener");
        let socket = pbx.phone(legs.local[0]).expect("the PBX's socket");
        relay.offload(legs.arguments()).expect("offloaded");
        let packet_length = voice(0).len() as i32;
        setsockopt(&sender, sockopt::UdpGsoSegment, &packet_length).expect("UDP_SEGMENT");
        let mut numbers = 0..;
        let mut send = |count: u64| {
            let packets = numbers.by_ref().take(count as usize).flat_map(voice);
            let packets: Vec<u8> = packets.collect();
            sender.send_to(&packets, legs.local[0]).expect("sent");
        };
        send(1);
        send(EACH);
        send(1);
        listener.wait_received(2, PATIENCE).expect("those alone");
        socket
            .wait_received(EACH as usize, PATIENCE)
            .expect("the merged");
        let heard = |phone: &Phone| -> Vec<u64> {
            let stamps = phone.arrivals().into_iter().map(|it| it.stamp);
            stamps.map(|it| it.expect("undamaged").number).collect()
        };
        assert_eq!(heard(&listener), [0, EACH + 1]);
        assert_eq!(heard(&socket), Vec::from_iter(1..=EACH));
        let reasons = relay.reasons().expect("status");
        assert_eq!(
            (reasons["aggregate"], reasons["relayed"]),
            (expected, 2 * expected)
        );
        let pair = relay.json(["show", &expected.to_string()]).expect("pair");
        let reception = &pair["streams"][0]["reception"];
        assert_eq!(
            (&reception["packets"], &reception["lost"]),
            (&(EACH + 2).into(), &0.into())
        );
    }
}

/// The next packet with UDP for this address that a machine sends to its tun device.
fn sent_to(tun: &Tun, destination: SocketAddr) -> Vec<u8> {
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 2048];
    while Instant::now() < deadline {
        let length = match tun.receive(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                tun.wait(Duration::from_millis(100)).expect("poll");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let packet = &buffer[..length];
        let sliced = SlicedPacket::from_ip(packet).expect("an IP packet");
        let to = sliced.transport.and_then(|transport| match transport {
            TransportSlice::Udp(udp) => Some(udp.destination_port()),
            _ => None,
        });
        if to == Some(destination.port()) {
            return packet.to_vec();
        }
    }
    panic!("nothing for {destination}");
}

/// What a VPN or a PPP link carries: IP packets with nothing before them.
#[test]
fn packets_of_a_link_without_ethernet_come_back_exactly_or_pass_untouched() {
    let host = Host::new("pbx").expect("machine");
    let tun = Tun::open(&host, "tun0", "192.0.2.1/24").expect("tun");
    host.ip("address add 2001:db8::1/64 dev tun0 nodad")
        .expect("address");
    let relay = Relay::attach(&host, "tun0", [""; 0]).expect("attached");
    let status = relay.json(["status"]).expect("status");
    assert_eq!(status["mode"], "tc", "{status:#}");
    let bank = Bank::new(&host).expect("sockets");
    let mut expected = 0;
    for legs in Legs::direct() {
        let socket = bank.phone(legs.local[0]).expect("the PBX's socket");
        let id = relay.offload(legs.arguments()).expect("offloaded");
        let pair = relay.json(["show", &id.to_string()]).expect("show");
        let next_hop = &pair["streams"][0]["next_hop"];
        assert_eq!(
            next_hop["destination_mac"],
            serde_json::Value::Null,
            "{pair:#}"
        );
        let large = if legs.local[0].is_ipv4() {
            MTU_V4
        } else {
            MTU_V6
        };
        let packets = relayed_packets(&legs).into_iter();
        for (name, packet) in packets.filter(|(_, it)| it.tags.is_empty() && it.padding == 0) {
            let ip = |packet: &Packet| packet.frame()[14..].to_vec();
            assert!(ip(&packet).len() <= large, "{name}");
            tun.send(&ip(&packet)).expect("sent");
            expected += 1;
            let back = sent_to(&tun, legs.remote[1]);
            assert_eq!(hex(&back), hex(&ip(&packet.relayed(&legs))), "{name}");
        }
        let stranger = Packet {
            source: legs.remote[1],
            ..Packet::new(&legs, voice(9))
        };
        tun.send(&stranger.frame()[14..]).expect("sent");
        socket.wait_received(1, PATIENCE).expect("passed");
    }
    let reasons = relay.reasons().expect("status");
    assert_eq!(
        (reasons["relayed"], reasons["unexpected_source"]),
        (expected, 2)
    );
    relay.stop().expect("a clean end");
}

#[test]
fn what_is_removed_goes_to_the_pbx_from_the_next_packet_on() {
    let wire = Wire::new("generic", &[]);
    let mut expected = Vec::new();
    for command in ["remove", "flush"] {
        let ids = wire.offload();
        let rounds = expected.len() / 2 + 1;
        for sockets in &wire.sockets {
            sockets.talk(0, 0, Some(10));
            sockets.relayed(0, 10 * rounds).expect("relayed");
        }
        if command == "remove" {
            for id in ids {
                wire.relay
                    .json(["remove", &id.to_string()])
                    .expect("removed");
            }
        } else {
            let flushed = wire.relay.json(["flush"]).expect("flushed");
            assert_eq!(flushed["pairs"].as_array().map(Vec::len), Some(2));
        }
        for sockets in &wire.sockets {
            sockets.talk(0, 0, Some(10));
            sockets.passed(0, 10 * rounds).expect("passed");
        }
        expected.extend([(true, 10), (false, 10)]);
        let list = wire.relay.json(["list"]).expect("list");
        assert_eq!(list["pairs"].as_array().map(Vec::len), Some(0), "{list:#}");
    }
    for sockets in &wire.sockets {
        assert_eq!(sockets.fate(0).expect("no loss"), expected);
    }
}

/// The phones behind a router, both pairs relayed, the first phones talking.
struct Gateway {
    net: Routed,
    relay: Relay,
    ids: [u64; 2],
    sockets: [Sockets; 2],
    _banks: [Bank; 2],
}

impl Gateway {
    fn new() -> Self {
        let net = Routed::new(2).expect("network");
        // Else the router asks for the PBX, and the PBX learns from the question where the router is.
        let pbx = "02:00:00:00:00:01 dev eth0 nud permanent";
        let lines = [PBX_V4, PBX_V6].map(|address| format!("neigh replace {address} lladdr {pbx}"));
        net.router.ip(&lines.join("\n")).expect("neighbours");
        let relay = Relay::attach(&net.pbx, "eth0", ["-v"]).expect("attached");
        let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
        let sockets =
            Legs::routed().map(|legs| Sockets::open(legs, &banks[0], &banks[1]).expect("sockets"));
        let ids = offload(&relay, &sockets);
        for sockets in &sockets {
            sockets.talk(0, 0, None);
            let phone = &sockets.phones[1];
            phone.wait_received(10, PATIENCE).expect("relayed");
        }
        Self {
            net,
            relay,
            ids,
            sockets,
            _banks: banks,
        }
    }
}

/// A gateway's announcements of its MAC address: gratuitous ARP (RFC 5227) and an unsolicited neighbour
/// advertisement with the override flag (RFC 4861, section 4.4).
fn announcements(mac: [u8; 6]) -> [Vec<u8>; 2] {
    let address = Ipv4Addr::new(192, 0, 2, 254).octets();
    let mut arp = [
        &[0xff; 6],
        &mac,
        &[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1][..],
    ]
    .concat();
    arp.extend([&mac[..], &address, &[0; 6], &address].concat());
    let address = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x254).octets();
    let everyone = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets();
    let mut advertisement = Vec::new();
    PacketBuilder::ethernet2(mac, [0x33, 0x33, 0, 0, 0, 1])
        .ipv6(address, everyone, 255)
        .icmpv6_raw(136, 0, [0xa0, 0, 0, 0])
        .write(&mut advertisement, &[&address[..], &[2, 1], &mac].concat())
        .expect("written");
    [arp, advertisement]
}

/// Whether a frame tells a neighbour this MAC address: ARP, or a neighbour solicitation or advertisement (types 135
/// and 136).
fn tells_address(frame: &[u8], mac: [u8; 6], v4: bool) -> bool {
    let from = frame.get(6..12) == Some(&mac);
    let kind = frame.get(12..14);
    from && if v4 {
        kind == Some(&[0x08, 0x06])
    } else {
        kind == Some(&[0x86, 0xdd]) && matches!(frame.get(54), Some(135 | 136))
    }
}

/// Media frames that arrived at the gateway, of the pair of this family.
fn media<'a>(
    frames: &'a [Frame],
    v4: bool,
) -> impl DoubleEndedIterator<Item = (Duration, [u8; 6])> + 'a {
    frames.iter().filter_map(move |frame| {
        let datagram = frame.datagram()?;
        let relayed = frame.direction == Direction::In && datagram.source.port() == 10_002;
        (relayed && datagram.source.is_ipv4() == v4).then_some((frame.at, datagram.destination_mac))
    })
}

#[test]
fn a_changed_gateway_is_in_the_map_within_its_bound() {
    const BOUND: Duration = Duration::from_millis(100);
    const ROUNDS: u8 = 7;
    let gateway = Gateway::new();
    let interface: &Interface = &gateway.net.gateway_interface;
    let injector = Injector::open(interface).expect("injector");
    let capture = Capture::start(interface).expect("capture");
    // The moments from which a MAC address is no longer the gateway's.
    let mut outdated = Vec::new();
    let mut delays = [Vec::new(), Vec::new()];
    let mut mac = ROUTER_MAC;
    for round in 0..ROUNDS {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970");
        outdated.push((mac, now));
        mac = [0x02, 0, 0, 0, 9, round];
        interface.set_mac(mac).expect("MAC address");
        for announcement in announcements(mac) {
            injector.send(&announcement).expect("inject");
        }
        for (delays, v4) in delays.iter_mut().zip([true, false]) {
            let first = |frames: &[Frame]| media(frames, v4).find(|(_, to)| *to == mac);
            capture
                .wait(PATIENCE, |frames| first(frames).is_some())
                .expect("packets to the new address");
            let frames = capture.so_far().frames;
            // The announcement, or the router's own question for the PBX, which tells as much.
            let told = frames
                .iter()
                .find(|frame| tells_address(&frame.bytes, mac, v4));
            let told = told.expect("an announcement").at;
            let (at, _) = first(&frames).expect("just seen");
            delays.push(at.saturating_sub(told));
        }
    }
    for (sockets, mut delays) in gateway.sockets.iter().zip(delays) {
        delays.sort();
        eprintln!("{}: {delays:?}", sockets.legs.remote[0]);
        assert!(delays[delays.len() / 2] <= BOUND, "{delays:?}");
        sockets.phones[0].hush();
    }
    for sockets in &gateway.sockets {
        let v4 = sockets.legs.local[0].is_ipv4();
        let last = sockets.phones[0].sent() - 1;
        let stamp = |frame: &Frame| {
            let datagram = frame.datagram()?;
            let relayed =
                frame.direction == Direction::In && datagram.source == sockets.legs.local[1];
            let (_, payload) = Rtp::parse(datagram.payload).filter(|_| relayed)?;
            Some(Stamp::read(payload)?.number)
        };
        capture
            .wait(PATIENCE, |frames| {
                frames.iter().filter_map(stamp).next_back() == Some(last)
            })
            .expect("the last packet");
        let frames = capture.so_far().frames;
        let numbers: Vec<_> = frames.iter().filter_map(stamp).collect();
        let whole: Vec<_> = (numbers[0]..=last).collect();
        assert_eq!(numbers, whole, "the relay lost, doubled or moved packets");
        let to_nobody = media(&frames, v4)
            .filter(|(at, to)| outdated.iter().any(|(mac, since)| mac == to && at >= since));
        let to_nobody = to_nobody.count() as u64;
        let rest = sockets.phones[0].sent() - to_nobody;
        sockets
            .relayed(0, rest as usize)
            .expect("all but those to nobody");
        assert_eq!(sockets.at_pbx(), 0, "the PBX's sockets stand still");
    }
}

#[test]
fn another_gateway_takes_over_without_loss() {
    const MAC: [u8; 6] = [0x02, 0, 0, 0, 7, 7];
    let gateway = Gateway::new();
    let capture = Capture::start(&gateway.net.gateway_interface).expect("capture");
    // Only the interface that has an address answers for it.
    let router = &gateway.net.router;
    router
        .sysctl("net/ipv4/conf/all/arp_ignore", "1")
        .expect("sysctl");
    router
        .ip(
            "link add link eth0 name other address 02:00:00:00:07:07 type macvlan mode bridge\n\
             address add 192.0.2.253/24 dev other\n\
             address add 2001:db8::253/64 dev other nodad\n\
             link set other up",
        )
        .expect("second gateway");
    gateway
        .net
        .pbx
        .ip("route replace default via 192.0.2.253\nroute replace default via 2001:db8::253")
        .expect("routes");
    for (sockets, id) in gateway.sockets.iter().zip(gateway.ids) {
        let v4 = sockets.legs.local[0].is_ipv4();
        capture
            .wait(PATIENCE, |frames| {
                media(frames, v4).filter(|(_, to)| *to == MAC).count() > 50
            })
            .expect("packets through the other gateway");
        let pair = gateway.relay.json(["show", &id.to_string()]).expect("show");
        let hop = &pair["streams"][0]["next_hop"]["destination_mac"];
        assert_eq!(hop, "02:00:00:00:07:07", "{pair:#}");
        // While the new gateway's address is asked for, the PBX has the call; nothing is lost or doubled.
        let fate = sockets.fate(0).expect("no loss");
        assert!(
            matches!(fate[..], [(true, _)] | [(true, _), (false, _), (true, _)]),
            "{fate:?}"
        );
        let frames = capture.so_far().frames;
        let mut macs: Vec<_> = media(&frames, v4).map(|(_, to)| to).collect();
        macs.dedup();
        assert_eq!(macs, [ROUTER_MAC, MAC]);
    }
}

#[test]
fn a_silent_gateway_gives_its_calls_to_the_pbx_until_it_answers() {
    let gateway = Gateway::new();
    let ([sockets, other], id) = (&gateway.sockets, gateway.ids[0]);
    let before = gateway.relay.reasons().expect("status")["next_hop_unknown"];
    assert_eq!(before, 0);
    let arp_ignore = "net/ipv4/conf/all/arp_ignore";
    // 8: no answer for any address.
    gateway.net.router.sysctl(arp_ignore, "8").expect("sysctl");
    gateway
        .net
        .pbx
        .ip("neigh del 192.0.2.254 dev eth0")
        .expect("forgotten");
    let pair = gateway.relay.wait_state(id, "waiting").expect("waiting");
    assert_eq!(pair["why"], "waiting for neighbour 192.0.2.254 on eth0");
    assert_eq!(pair["streams"][0]["state"], "waiting");
    assert_eq!(pair["streams"][0]["next_hop"], serde_json::Value::Null);
    let pbx = &sockets.pbx[0];
    pbx.wait_received(50, PATIENCE).expect("packets at the PBX");
    // The pair of the other family is relayed all the while.
    let heard = other.phones[1].arrivals().len();
    other.relayed(0, heard + 50).expect("relayed");
    gateway.net.router.sysctl(arp_ignore, "0").expect("sysctl");
    gateway
        .relay
        .wait_state(id, "offloaded")
        .expect("offloaded");
    let heard = sockets.phones[1].arrivals().len();
    let phone = &sockets.phones[1];
    phone
        .wait_received(heard + 50, PATIENCE)
        .expect("relayed again");
    let fate = sockets.fate(0).expect("no loss");
    let [(true, _), (false, passed), (true, _)] = fate[..] else {
        panic!("not relayed, passed, relayed: {fate:?}");
    };
    // A busy kernel may forget the other family's neighbour too (its table is one for all machines).
    let others = other.fate(0).expect("no loss");
    let others = others.iter().filter(|(relayed, _)| !relayed);
    let passed = passed + others.map(|(_, length)| length).sum::<usize>();
    let counted = gateway.relay.reasons().expect("status")["next_hop_unknown"];
    assert_eq!(counted, passed as u64);
}

#[test]
fn an_unresolved_phone_waits_with_the_pbx_and_is_relayed_by_itself() {
    // The second phone has its addresses, but on another interface: it is silent on the cable.
    let net = Direct::new(1).expect("network");
    let legs = Legs::direct();
    let [v4, v6] = legs.map(|legs| legs.remote[1].ip());
    let arp_ignore = "net/ipv4/conf/all/arp_ignore";
    net.phones.sysctl(arp_ignore, "1").expect("sysctl");
    let addresses = format!("address add {v4}/32 dev lo\naddress add {v6}/128 dev lo nodad");
    net.phones.ip(&addresses).expect("the second phone");
    let relay = Relay::attach(&net.pbx, "eth0", ["--mode", "generic"]).expect("attached");
    let phones = Bank::new(&net.phones).expect("phones");
    let pbx = Bank::new(&net.pbx).expect("sockets");
    let sockets = legs.map(|legs| Sockets::open(legs, &phones, &pbx).expect("sockets"));
    let ids = legs.map(|legs| {
        let added = relay.add(legs.arguments()).expect("taken");
        assert_eq!(added["state"], "waiting", "{added:#}");
        added["id"].as_u64().expect("a number")
    });
    for (sockets, id) in sockets.iter().zip(ids) {
        sockets.talk(0, 0, None);
        let pbx = &sockets.pbx[0];
        pbx.wait_received(20, PATIENCE).expect("packets at the PBX");
        let callee = sockets.legs.remote[1].ip();
        let why = format!("waiting for neighbour {callee} on eth0");
        let pair = relay.wait_state(id, "waiting").expect("waiting");
        assert_eq!(pair["why"], why.as_str());
        let shown = relay.run(["show", &id.to_string()]).expect("show");
        let list = relay.run(["list"]).expect("list");
        for output in [shown, list] {
            let text = String::from_utf8(output.stdout).expect("text");
            assert!(text.contains("waiting") && text.contains(&why), "{text}");
        }
    }
    assert!(relay.reasons().expect("status")["next_hop_unknown"] >= 40);

    let appears = format!("address add {v6}/64 dev eth0 nodad");
    net.phones.ip(&appears).expect("the phone appears");
    net.phones.sysctl(arp_ignore, "0").expect("sysctl");
    for (sockets, id) in sockets.iter().zip(ids) {
        relay.wait_state(id, "offloaded").expect("offloaded");
        sockets.relayed(0, 50).expect("relayed");
        let fate = sockets.fate(0).expect("no loss");
        assert!(matches!(fate[..], [(false, _), (true, _)]), "{fate:?}");
    }
}
