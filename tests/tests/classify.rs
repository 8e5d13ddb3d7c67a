//! Marks and classes of what leaves: the decision against a plain one that asks rule by rule, on the host and in the
//! kernel, and real packets through interfaces. Needs root.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
    thread,
    time::Duration,
};

use aya::{Ebpf, maps::PerCpuArray, programs::Program};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::{prelude::*, sample::select, strategy::ValueTree as _, test_runner::TestRunner};
use relay_common::{
    capture::SNAP_MAX,
    checksum::PartialChecksum,
    classify::{
        COUNTERS, FlowKey, Metadata, RULES, RuleTable, Tables, VOICE, class_id, classify, tcp,
    },
    packet::{Frame, Header, Packet},
    reason::Reason,
    stream::Counter,
};
use relay_tests::{
    capture::{Capture, Frame as Captured},
    fixture::{Family, received},
    namespace::Host,
    program::{SkBuff, test_run_skb},
    topology::{Direct, PBX_V4, Routed},
};
use relay_user::{
    next_hop::LinkLayer,
    qos::{
        classifier::{self, Classifier, Counted},
        policy::{Class, Conditions, Policy, Rtp, Rule, Share},
        table::{self, Task},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
const EF: u8 = 46;
const COUNTER: usize = size_of::<Counter>();

/// A host frame of a link with Ethernet headers or without.
struct Leaving<'a> {
    frame: Frame<'a>,
    has_ethernet: bool,
}

impl Packet for Leaving<'_> {
    fn length(&self) -> usize {
        self.frame.length()
    }

    fn has_ethernet(&self) -> bool {
        self.has_ethernet
    }

    fn header<H: Header>(&mut self, at: usize) -> Result<&mut H, Reason> {
        self.frame.header(at)
    }

    fn partial_checksum(&self) -> PartialChecksum {
        PartialChecksum::Kept
    }

    fn copy(&self, to: &mut [u8; SNAP_MAX], most: u32) -> u32 {
        self.frame.copy(to, most)
    }
}

/// The maps on the host.
struct Memory {
    flows: RefCell<HashSet<FlowKey>>,
    counters: RefCell<[Counter; COUNTERS]>,
}

impl Memory {
    fn new() -> Self {
        Self {
            flows: RefCell::default(),
            counters: RefCell::new([Counter::default(); COUNTERS]),
        }
    }
}

impl Tables for Memory {
    fn is_video(&self, flow: &FlowKey) -> bool {
        self.flows.borrow().contains(flow)
    }

    fn note_video(&self, flow: &FlowKey) {
        self.flows.borrow_mut().insert(*flow);
    }

    fn count(&self, counter: u32, packets: u64, bytes: u64) {
        let counter = &mut self.counters.borrow_mut()[counter as usize];
        counter.packets += packets;
        counter.bytes += bytes;
    }
}

/// What became of a packet.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    priority: u32,
    frame: Vec<u8>,
}

fn on_host(
    layer: LinkLayer,
    frame: &[u8],
    table: &RuleTable,
    memory: &Memory,
    skb: &SkBuff,
) -> Outcome {
    let mut after = frame.to_vec();
    let mut packet = Leaving {
        frame: Frame::new(&mut after, PartialChecksum::Kept),
        has_ethernet: layer == LinkLayer::Ethernet,
    };
    let metadata = Metadata {
        packets: skb.gso_segs.max(1).into(),
        bytes: frame.len() as u64,
        segment: skb.gso_size,
        priority: skb.priority,
    };
    let priority = classify(&mut packet, table, memory, &metadata);
    Outcome {
        priority,
        frame: after,
    }
}

/// The classifier in the kernel.
struct Kernel(Ebpf);

impl Kernel {
    fn load(layer: LinkLayer, policy: &Policy, task: Task) -> Self {
        Self(classifier::loaded(layer, policy, task).expect("the kernel takes the classifier"))
    }

    fn program(&self) -> BorrowedFd<'_> {
        let program = self.0.program(classifier::CLASSIFY).expect("program");
        program.fd().expect("loaded").as_fd()
    }

    fn verified(&self) -> u32 {
        let Some(Program::SchedClassifier(program)) = self.0.program(classifier::CLASSIFY) else {
            panic!("no program");
        };
        let info = program.info().expect("information");
        info.verified_instruction_count().expect("Linux 5.16")
    }

    /// None where the kernel takes the frame for none.
    fn show(&self, frame: &[u8], mut skb: SkBuff) -> Option<Outcome> {
        let mut after = vec![0; frame.len() + 64];
        let run = match test_run_skb(self.program(), frame, &mut after, 1, &mut skb) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => return None,
            run => run.expect("BPF_PROG_TEST_RUN"),
        };
        assert_eq!(run.verdict, u32::MAX, "TC_ACT_UNSPEC");
        after.truncate(run.length);
        Some(Outcome {
            priority: skb.priority,
            frame: after,
        })
    }

    fn counters(&self) -> [Counter; COUNTERS] {
        let map = self.0.map(classifier::COUNTERS).expect("map");
        let counters: PerCpuArray<_, [u8; COUNTER]> = PerCpuArray::try_from(map).expect("map");
        let mut totals = [Counter::default(); COUNTERS];
        for (element, total) in (0..).zip(&mut totals) {
            for value in counters.get(&element, 0).expect("element").iter() {
                let Counter { packets, bytes } = zerocopy::transmute!(*value);
                total.packets += packets;
                total.bytes += bytes;
            }
        }
        totals
    }
}

/// A packet as its author sees it.
#[derive(Clone, Debug)]
struct Plan {
    family: Family,
    tags: usize,
    /// Words of IPv4 options, or IPv6 extension headers.
    options: usize,
    /// In units of 8 bytes.
    fragment_offset: u16,
    protocol: u8,
    traffic_class: u8,
    ports: (u16, u16),
    tcp_flags: u8,
    payload: Vec<u8>,
}

impl Plan {
    /// The frame, without tags or Ethernet header on a link that has none.
    fn bytes(&self, layer: LinkLayer) -> Vec<u8> {
        let mut body = Vec::new();
        if self.fragment_offset == 0 {
            body.extend(self.ports.0.to_be_bytes());
            body.extend(self.ports.1.to_be_bytes());
            match self.protocol {
                6 => {
                    body.extend([
                        1,
                        2,
                        3,
                        4,
                        5,
                        6,
                        7,
                        8,
                        0x50,
                        self.tcp_flags,
                        0,
                        9,
                        0,
                        0,
                        0,
                        0,
                    ]);
                }
                17 => {
                    body.extend((8 + self.payload.len() as u16).to_be_bytes());
                    body.extend([0, 0]);
                }
                _ => {}
            }
        }
        body.extend(&self.payload);
        let is_fragment = self.fragment_offset != 0;
        let mut options = Vec::new();
        let mut first = self.protocol;
        match self.family {
            Family::V4 => options.resize(self.options * 4, 1),
            Family::V6 => {
                let mut kinds = vec![60; self.options];
                kinds.extend(is_fragment.then_some(44));
                for (number, kind) in kinds.iter().enumerate() {
                    let next = kinds.get(number + 1).copied().unwrap_or(self.protocol);
                    let [high, low] = (self.fragment_offset << 3).to_be_bytes();
                    options.extend(match kind {
                        44 => [next, 0, high, low, 0, 0, 0, 1],
                        _ => [next, 0, 1, 4, 0, 0, 0, 0],
                    });
                }
                first = kinds.first().copied().unwrap_or(self.protocol);
            }
        }
        let ip = match self.family {
            Family::V4 => {
                let length = (20 + options.len() + body.len()) as u16;
                let mut ip = vec![0x45 + self.options as u8, self.traffic_class];
                ip.extend(length.to_be_bytes());
                ip.extend([0, 1]);
                ip.extend(self.fragment_offset.to_be_bytes());
                ip.extend([64, first, 0, 0, 192, 0, 2, 1, 192, 0, 2, 11]);
                ip.extend(&options);
                let checksum = checksum(&ip);
                ip[10..12].copy_from_slice(&checksum.to_be_bytes());
                ip
            }
            Family::V6 => {
                let class = u16::from(self.traffic_class) << 4;
                let mut ip = (0x6000 | class).to_be_bytes().to_vec();
                ip.extend([0xab, 0xcd]);
                ip.extend(((options.len() + body.len()) as u16).to_be_bytes());
                ip.extend([first, 64]);
                ip.extend([0x20; 32]);
                ip.extend(&options);
                ip
            }
        };
        let mut frame = Vec::new();
        if layer == LinkLayer::Ethernet {
            frame.extend([2; 12]);
            let tags = [[0x88, 0xa8, 0, 9], [0x81, 0, 0x20, 100]];
            for tag in &tags[2 - self.tags..] {
                frame.extend(tag);
            }
            frame.extend(match self.family {
                Family::V4 => [8, 0],
                Family::V6 => [0x86, 0xdd],
            });
        }
        frame.extend(ip);
        frame.extend(body);
        frame
    }

    /// Ports, where the packet shows them.
    fn shown_ports(&self) -> Option<(u16, u16)> {
        (self.fragment_offset == 0 && matches!(self.protocol, 6 | 17)).then_some(self.ports)
    }

    fn segment(&self) -> usize {
        if self.protocol != 6 || self.fragment_offset != 0 {
            return 0;
        }
        let flags = self.tcp_flags;
        let mut kinds = 0;
        for (flag, kind) in [(1, tcp::FIN), (2, tcp::SYN), (4, tcp::RST)] {
            if flags & flag != 0 {
                kinds |= kind;
            }
        }
        if kinds == 0 && flags & 0x10 != 0 && self.payload.is_empty() {
            tcp::ACK
        } else {
            kinds
        }
    }

    /// Payload type and kind of what looks like RTP.
    fn rtp(&self) -> Option<(u8, Rtp)> {
        let (source, destination) = self.shown_ports()?;
        let server = |port| port < 1024 || matches!(port, 1194 | 4500 | 5060 | 5061);
        let looks = self.protocol == 17
            && !server(source)
            && !server(destination)
            && (source % 2 == 0 || destination % 2 == 0)
            && self.payload.len() >= 12
            && (0x80..0xc0).contains(&self.payload[0])
            && self.payload.len() >= 12 + usize::from(self.payload[0] % 16) * 4;
        let payload_type = *self.payload.get(1)? % 128;
        let kind = match payload_type {
            0..=23 => Rtp::Audio,
            24..=34 => Rtp::Video,
            96..=127 if self.payload.len() > 600 => Rtp::Video,
            96..=127 => Rtp::Audio,
            _ => return None,
        };
        looks.then_some((payload_type, kind))
    }

    fn fits(&self, asked: &Conditions, dscp: u8) -> bool {
        let ports = self.shown_ports();
        let lists = |of: &dyn Fn((u16, u16)) -> bool| ports.is_some_and(of);
        let has = |list: &[std::ops::RangeInclusive<u16>], port| {
            list.iter().any(|range| range.contains(&port))
        };
        let rtp = self.rtp();
        !asked.arp
            && (asked.protocols.is_empty() || asked.protocols.contains(&self.protocol))
            && (asked.dscps.is_empty() || asked.dscps.contains(&dscp))
            && (asked.ports.is_empty()
                || lists(&|(from, to)| has(&asked.ports, from) || has(&asked.ports, to)))
            && (asked.source_ports.is_empty() || lists(&|(from, _)| has(&asked.source_ports, from)))
            && (asked.destination_ports.is_empty()
                || lists(&|(_, to)| has(&asked.destination_ports, to)))
            && (asked.tcp == 0 || asked.tcp & self.segment() != 0)
            && match asked.rtp {
                None => true,
                Some(Rtp::Any) => rtp.is_some(),
                Some(kind) => rtp.is_some_and(|(_, is)| is == kind),
            }
            && (asked.payload_types.is_empty()
                || rtp.is_some_and(|(number, _)| asked.payload_types.contains(&number)))
    }

    /// Class and mark by a policy, rule by rule.
    fn decide(&self, policy: &Policy) -> (usize, u8) {
        let mut dscp = self.traffic_class >> 2;
        for rule in &policy.rules {
            if !self.fits(&rule.conditions, dscp) {
                continue;
            }
            if let Some(mark) = rule.set_dscp.filter(|_| dscp == 0 || rule.overwrite) {
                dscp = mark;
            }
            if let Some(class) = rule.class {
                return (class, dscp);
            }
        }
        (policy.default, dscp)
    }
}

/// The IPv4 header checksum of RFC 791.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

fn plans() -> impl Strategy<Value = Plan> {
    let ports = || {
        prop_oneof![
            select(vec![22, 53, 443, 1194, 5060, 5061]),
            1020_u16..1030,
            any::<u16>()
        ]
    };
    let head = || {
        prop_oneof![
            any::<[u8; 2]>(),
            (0x80_u8..0x84, select(vec![0, 8, 34, 72, 96, 111, 224])).prop_map(|(a, b)| [a, b])
        ]
    };
    let length = prop_oneof![Just(0_usize), 8_usize..40, 590_usize..610];
    let payload = (head(), length).prop_map(|(head, length)| {
        let mut payload = vec![7; length];
        for (to, from) in payload.iter_mut().zip(head) {
            *to = from;
        }
        payload
    });
    (
        select(vec![Family::V4, Family::V6]),
        0_usize..3,
        0_usize..4,
        prop_oneof![4 => Just(0_u16), 1 => 1_u16..100],
        select(vec![1_u8, 6, 6, 17, 17, 17, 47, 58]),
        prop_oneof![0_u8..4, any::<u8>()],
        (ports(), ports()),
        select(vec![
            0x10_u8, 0x18, 0x02, 0x12, 0x04, 0x14, 0x11, 0x00, 0xff,
        ]),
        payload,
    )
        .prop_map(
            |(
                family,
                tags,
                options,
                fragment_offset,
                protocol,
                traffic_class,
                ports,
                tcp_flags,
                payload,
            )| Plan {
                family,
                tags,
                options,
                fragment_offset,
                protocol,
                traffic_class,
                ports,
                tcp_flags,
                payload,
            },
        )
}

fn policies() -> impl Strategy<Value = Policy> {
    let few = |values: Vec<u8>| prop_oneof![3 => Just(vec![]), 1 => proptest::collection::vec(select(values), 1..3)];
    let ports = || {
        let range = prop_oneof![
            select(vec![22_u16, 443, 1194, 5060]).prop_map(|port| port..=port),
            Just(1024..=65_535),
            Just(1..=1023),
        ];
        prop_oneof![4 => Just(vec![]), 1 => proptest::collection::vec(range, 1..3)]
    };
    let conditions = (
        few(vec![1, 6, 17, 58]),
        [ports(), ports(), ports()],
        few(vec![0, 1, 8, 10, 46]),
        prop_oneof![3 => Just(0_usize), 1 => 1_usize..16],
        select(vec![
            None,
            None,
            None,
            Some(Rtp::Audio),
            Some(Rtp::Video),
            Some(Rtp::Any),
        ]),
        prop_oneof![5 => Just(vec![]), 1 => Just(vec![0_u8, 34, 111])],
        proptest::bool::weighted(0.05),
    )
        .prop_map(|(protocols, ports, dscps, tcp, rtp, payload_types, arp)| {
            let [ports, source_ports, destination_ports] = ports;
            Conditions {
                protocols,
                ports,
                source_ports,
                destination_ports,
                dscps,
                tcp,
                rtp,
                payload_types,
                arp,
            }
        });
    let rule = (
        conditions,
        proptest::option::of(select(vec![0_u8, 1, 8, 46, 63])),
        any::<bool>(),
        proptest::option::weighted(0.3, 0_usize..4),
    )
        .prop_map(|(conditions, set_dscp, overwrite, class)| Rule {
            name: "rule".to_owned(),
            conditions,
            set_dscp,
            overwrite,
            class,
        });
    (proptest::collection::vec(rule, 0..=RULES), 0_usize..4).prop_map(|(rules, default)| {
        let class = Class {
            name: "class".to_owned(),
            rate: Share::Fraction(1, 4),
            ceiling: Share::Fraction(1, 1),
            prio: 0,
        };
        Policy {
            classes: vec![class; 4],
            default,
            rules,
            file: None,
        }
    })
}

/// Checks the IP header's checksum, and returns the frame without what a mark may change.
fn unmarked(frame: &[u8], plan: &Plan, layer: LinkLayer) -> (u8, Vec<u8>) {
    let ip = if layer == LinkLayer::Ethernet {
        14 + 4 * plan.tags
    } else {
        0
    };
    let mut frame = frame.to_vec();
    let class = match plan.family {
        Family::V4 => {
            let header = &mut frame[ip..ip + 20 + 4 * plan.options];
            assert_eq!(checksum(header), 0, "the header's checksum");
            header[10..12].fill(0);
            std::mem::take(&mut header[1])
        }
        Family::V6 => {
            let class = frame[ip] << 4 | frame[ip + 1] >> 4;
            frame[ip] &= 0xf0;
            frame[ip + 1] &= 0x0f;
            class
        }
    };
    (class, frame)
}

/// A value of a kind.
fn any_of<T: std::fmt::Debug>(runner: &mut TestRunner, kind: &impl Strategy<Value = T>) -> T {
    kind.new_tree(runner).expect("a value").current()
}

/// A machine's layer and random policy, as the host and the kernel have them.
fn decisions(task: Task, mut check: impl FnMut(&mut TestRunner, LinkLayer, &Policy, &RuleTable)) {
    let mut runner = TestRunner::default();
    let policies = policies();
    for layer in [LinkLayer::Ethernet, LinkLayer::Ip].repeat(5) {
        let policy = any_of(&mut runner, &policies);
        let table = table::compile(&policy, task);
        check(&mut runner, layer, &policy, &table);
    }
}

#[test]
fn bit_vectors_decide_as_rule_after_rule_does() {
    decisions(Task::Classify, |runner, layer, policy, table| {
        let plans = plans();
        for _ in 0..400 {
            let plan = any_of(runner, &plans);
            let frame = plan.bytes(layer);
            let (class, dscp) = plan.decide(policy);
            // No flow is known for video yet.
            let memory = Memory::new();
            let outcome = on_host(layer, &frame, table, &memory, &SkBuff::default());
            assert_eq!(
                outcome.priority,
                class_id(class as u32),
                "{plan:?} {policy:?}"
            );
            let (is, rest) = unmarked(&outcome.frame, &plan, layer);
            assert_eq!(
                is,
                (plan.traffic_class % 4) | (dscp << 2),
                "{plan:?} {policy:?}"
            );
            assert_eq!(rest, unmarked(&frame, &plan, layer).1, "{plan:?}");
        }
    });
}

#[test]
fn the_kernel_decides_as_the_host_does() {
    as_the_host_does(Task::Classify);
}

#[test]
fn the_kernel_marks_as_the_host_does_and_chooses_no_class() {
    as_the_host_does(Task::Mark);
}

fn as_the_host_does(task: Task) {
    decisions(task, |runner, layer, policy, table| {
        let kernel = Kernel::load(layer, policy, task);
        let memory = Memory::new();
        let mut shown = 0;
        let plans = plans();
        for _ in 0..400 {
            let plan = any_of(runner, &plans);
            let mut frame = plan.bytes(layer);
            let length = frame.len();
            let (at, byte, damage) = any_of(runner, &(any::<u16>(), any::<u8>(), 0..4));
            match damage {
                0 => frame.truncate(usize::from(at) % length),
                1 => frame[usize::from(at) % length] = byte,
                _ => {}
            }
            let mut skb = SkBuff::default();
            skb.priority = [0, 0, class_id(1), class_id(7), 0x0001_0011, 6][usize::from(byte % 6)];
            let Some(outcome) = kernel.show(&frame, skb) else {
                continue;
            };
            shown += 1;
            let expected = on_host(layer, &frame, table, &memory, &skb);
            assert_eq!(outcome, expected, "{plan:?}");
            if task == Task::Mark {
                assert_eq!(outcome.priority, skb.priority, "{plan:?}");
            }
        }
        assert!(shown > 200, "only {shown} packets were shown");
        assert_eq!(kernel.counters(), *memory.counters.borrow());
    });
}

/// A UDP frame.
fn datagram(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let mut draft = received(Family::V4);
    draft.source.set_port(source);
    draft.destination.set_port(destination);
    draft.payload = payload.to_vec();
    draft.bytes()
}

/// The first bytes of RTP, and zeros.
fn rtp(payload_type: u8, length: usize) -> Vec<u8> {
    let mut packet = vec![0; length];
    packet[..2].copy_from_slice(&[0x80, payload_type]);
    packet
}

/// Elements of `COUNTERS` that count, but for classes.
fn rules_met(frames: &[Vec<u8>]) -> Vec<Option<String>> {
    let policy = Policy::built_in();
    let table = table::compile(&policy, Task::Classify);
    let memory = Memory::new();
    let mut met = Vec::new();
    for frame in frames {
        *memory.counters.borrow_mut() = [Counter::default(); COUNTERS];
        on_host(
            LinkLayer::Ethernet,
            frame,
            &table,
            &memory,
            &SkBuff::default(),
        );
        let counters = memory.counters.borrow();
        let first = policy
            .rules
            .iter()
            .zip(&*counters)
            .find(|(_, counter)| counter.packets != 0);
        let is_voice = counters[VOICE as usize].packets != 0;
        let rule = first.map(|(rule, _)| rule.name.clone());
        assert_eq!(is_voice, rule.as_deref() == Some("mark-voice"));
        met.push(rule);
    }
    met
}

#[test]
fn other_protocols_do_not_look_like_rtp() {
    let sip = b"OPTIONS sip:a@example.com SIP/2.0\r\n";
    let long = |head: &[u8]| [head, &[0x5a; 80]].concat();
    for (what, source, destination, payload) in [
        (
            "QUIC, long header (RFC 9000)",
            50_000,
            8443,
            long(&[0xc3, 0, 0, 0, 1]),
        ),
        ("QUIC, short header", 50_000, 8443, long(&[0x4b])),
        (
            "QUIC, no fixed bit (RFC 9287)",
            50_000,
            443,
            long(&[0x80, 0, 0, 0, 1]),
        ),
        ("DNS query", 50_000, 53, long(&[0x80, 0, 1, 0])),
        ("DNS answer", 53, 50_000, long(&[0x80, 0, 0x81, 0x80])),
        (
            "STUN (RFC 8489)",
            10_000,
            3478,
            long(&[0, 1, 0, 72, 0x21, 0x12, 0xa4, 0x42]),
        ),
        (
            "TURN channel data (RFC 8656)",
            10_000,
            3478,
            long(&[0x40, 0, 0, 80]),
        ),
        (
            "DTLS (RFC 9147)",
            10_000,
            30_000,
            long(&[22, 0xfe, 0xfd, 0, 0]),
        ),
        ("ZRTP (RFC 6189)", 10_000, 30_000, long(&[0x10, 0, 0, 1])),
        ("WireGuard handshake", 51_820, 51_820, long(&[1, 0, 0, 0])),
        ("WireGuard data", 51_820, 51_820, long(&[4, 0, 0, 0])),
        ("OpenVPN client reset", 50_000, 1194, long(&[0x38])),
        ("OpenVPN data", 1194, 50_000, long(&[0x48])),
        ("OpenVPN with a static key", 1194, 50_000, long(&[0x80, 0])),
        ("NTP", 50_000, 123, long(&[0x23, 0, 6])),
        ("NTP, alarm", 123, 50_000, long(&[0xa4, 0])),
        ("IPsec through NAT (RFC 3948)", 4500, 4500, long(&[0x80, 0])),
        (
            "RTCP sender report (RFC 3550)",
            10_000,
            30_000,
            long(&[0x80, 200]),
        ),
        (
            "RTCP feedback (RFC 4585)",
            10_000,
            30_000,
            long(&[0x81, 205]),
        ),
        ("RTCP's ports", 10_001, 30_001, rtp(0, 172)),
        ("an unassigned payload type", 10_000, 30_000, rtp(50, 172)),
        ("RTP cut short", 10_000, 30_000, rtp(0, 11)),
        (
            "fewer sources than announced",
            10_000,
            30_000,
            long(&[0x8f, 0])[..60].to_vec(),
        ),
    ] {
        let met = rules_met(&[datagram(source, destination, &payload)]);
        let met = met[0].as_deref().unwrap_or_default();
        assert!(!met.starts_with("mark-"), "{what}: {met}");
    }
    let met = rules_met(&[datagram(5060, 5060, sip), datagram(5060, 50_000, sip)]);
    assert_eq!(
        met,
        [Some("mark-sip".to_owned()), Some("mark-sip".to_owned())]
    );
}

#[test]
fn rtp_is_told_by_its_payload_type_and_a_flow_keeps_its_kind() {
    let packet = |payload_type, length| datagram(10_000, 30_000, &rtp(payload_type, length));
    let voice = || Some("mark-voice".to_owned());
    let video = || Some("mark-video".to_owned());
    // G.711, marked, one port odd behind a NAT; comfort noise; H.263; Opus, which sends short packets.
    let natted = datagram(10_000, 30_001, &rtp(0x80, 172));
    let met = rules_met(&[
        packet(0, 172),
        natted,
        packet(13, 13),
        packet(34, 500),
        packet(111, 90),
    ]);
    assert_eq!(met, [voice(), voice(), voice(), video(), voice()]);
    // Once a packet is too long for audio, the flow is video; another source is another flow.
    let mut other = rtp(99, 90);
    other[11] = 1;
    let other = datagram(10_000, 30_000, &other);
    let met = rules_met(&[packet(99, 90), packet(99, 1200), packet(99, 90), other]);
    assert_eq!(met, [voice(), video(), video(), voice()]);
}

#[test]
fn arp_and_others_have_classes() {
    let policy = Policy::built_in();
    let table = table::compile(&policy, Task::Classify);
    for (kind, class) in [(0x0806_u16, 0), (0x88cc, 3), (0x8863, 3)] {
        let mut frame = vec![2; 60];
        frame[12..14].copy_from_slice(&kind.to_be_bytes());
        let skb = SkBuff::default();
        let outcome = on_host(LinkLayer::Ethernet, &frame, &table, &Memory::new(), &skb);
        assert_eq!((outcome.priority, outcome.frame), (class_id(class), frame));
    }
}

#[test]
fn merged_packets_count_as_many_as_they_will_be() {
    let policy = Policy::built_in();
    let kernel = Kernel::load(LinkLayer::Ethernet, &policy, Task::Classify);
    let plan = Plan {
        family: Family::V4,
        tags: 0,
        options: 0,
        fragment_offset: 0,
        protocol: 17,
        traffic_class: 0,
        ports: (10_000, 30_000),
        tcp_flags: 0,
        // Four packets of Opus: too long for audio, were it one.
        payload: [rtp(111, 172), vec![0; 3 * 172]].concat(),
    };
    let frame = plan.bytes(LinkLayer::Ethernet);
    let mut skb = SkBuff::default();
    (skb.gso_segs, skb.gso_size) = (4, 172);
    skb.wire_len = frame.len() as u32 + 3 * 42;
    kernel.show(&frame, skb).expect("a frame");
    let voice = kernel.counters()[VOICE as usize];
    assert_eq!((voice.packets, voice.bytes), (4, u64::from(skb.wire_len)));
}

#[test]
fn the_verifier_has_little_to_do() {
    let kernel = Kernel::load(LinkLayer::Ethernet, &Policy::built_in(), Task::Classify);
    let verified = kernel.verified();
    // A fifth of what it would do at most (BPF_COMPLEXITY_LIMIT_INSNS in include/linux/bpf.h); Linux 6.1
    // does more than later versions.
    assert!(verified < 200_000, "{verified} instructions");
}

/// Attaches a policy to what leaves an interface.
fn attach(host: &Host, interface: &str, policy: &Policy) {
    host.run(|| {
        let index = nix::net::if_::if_nametoindex(interface).expect("an interface");
        Classifier::attach(interface, index, policy, Task::Classify).expect("attached");
    });
}

fn counted(host: &Host, interface: &str) -> Counted {
    let counted = host.run(|| Classifier::read(interface)).expect("counters");
    counted.expect("a classifier")
}

/// Packets by class, those of none left out.
fn by_class(host: &Host, interface: &str) -> BTreeMap<String, u64> {
    counted(host, interface)
        .classes
        .into_iter()
        .filter(|class| class.packets != 0)
        .map(|class| (class.name, class.packets))
        .collect()
}

fn example(name: &str) -> Policy {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policies");
    Policy::read(&folder.join(name)).expect(name)
}

/// DSCP of a frame, and its TCP ports. The header checksum is checked.
fn tcp_facts(frame: &Captured) -> Option<(u8, u16, u16)> {
    let packet = SlicedPacket::from_ethernet(&frame.bytes).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        return None;
    };
    let dscp = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(
                header.header_checksum(),
                header.to_header().calc_header_checksum()
            );
            header.dcp().value()
        }
        NetSlice::Ipv6(ip) => ip.header().traffic_class() >> 2,
        NetSlice::Arp(_) => return None,
    };
    Some((dscp, tcp.source_port(), tcp.destination_port()))
}

/// A counter of `/proc/net/snmp`.
fn snmp(host: &Host, protocol: &str, name: &str) -> u64 {
    let text = host
        .run(|| std::fs::read_to_string("/proc/net/snmp"))
        .expect("counters");
    let mut lines = text.lines().filter(|line| line.starts_with(protocol));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let column = names
        .split(' ')
        .position(|column| column == name)
        .expect("a column");
    values
        .split(' ')
        .nth(column)
        .expect("a value")
        .parse()
        .expect("a number")
}

#[test]
fn every_segment_of_tcp_is_marked_and_arrives_whole() {
    const BYTES: usize = 3_000_000;
    for (address, offloaded) in [
        (Direct::phone_v4(0), false),
        (Direct::phone_v4(0), true),
        (Direct::phone_v6(0), true),
    ] {
        let net = Direct::new(1).expect("network");
        // The capture takes frames of 16 KiB.
        net.pbx
            .ip("link set eth0 gso_max_size 12000")
            .expect("ip link");
        if offloaded {
            net.pbx_interface
                .leave_checksums_to_device()
                .expect("offload");
        }
        attach(&net.pbx, "eth0", &example("ports.toml"));
        let capture = Capture::start(&net.phones_interface).expect("capture");
        let to = SocketAddr::new(address, 1935);
        let listener = net.phones.run(|| TcpListener::bind(to)).expect("listener");
        let sender = net.pbx.clone();
        let sent = thread::spawn(move || {
            let mut stream = sender.run(|| TcpStream::connect(to)).expect("connection");
            stream.write_all(&vec![0x5a; BYTES]).expect("sent");
        });
        let mut got = Vec::new();
        let (mut stream, _) = listener.accept().expect("connection");
        stream.read_to_end(&mut got).expect("received");
        sent.join().expect("sent");
        assert!(got.len() == BYTES && got.iter().all(|byte| *byte == 0x5a));
        let seen = capture.stop().expect("capture");
        let marks: Vec<_> = seen.frames.iter().filter_map(tcp_facts).collect();
        let from_pbx = |mark: &&(u8, u16, u16)| mark.2 == 1935;
        assert!(marks.iter().filter(from_pbx).count() > 200);
        assert!(
            marks.iter().filter(from_pbx).all(|mark| mark.0 == 0x22),
            "{address}"
        );
        assert!(
            marks
                .iter()
                .filter(|mark| mark.2 != 1935)
                .all(|mark| mark.0 == 0)
        );
        assert_eq!(snmp(&net.phones, "Ip:", "InHdrErrors"), 0);
        assert_eq!(snmp(&net.phones, "Tcp:", "InCsumErrors"), 0);
    }
}

/// A socket of a machine.
fn socket(host: &Host, address: IpAddr, port: u16) -> UdpSocket {
    let socket = host
        .run(|| UdpSocket::bind((address, port)))
        .expect("socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    socket
}

/// The next datagram.
fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).expect("a datagram");
    buffer[..length].to_vec()
}

#[test]
fn forwarded_packets_are_marked() {
    let net = Routed::new(1).expect("network");
    attach(&net.router, "eth1", &Policy::built_in());
    let capture = Capture::start(&net.phones_interface).expect("capture");
    for (local, phone) in [
        (PBX_V4, Routed::phone_v4(0)),
        (relay_tests::topology::PBX_V6, Routed::phone_v6(0)),
    ] {
        let phone = socket(&net.phones, phone, 30_000);
        let pbx = socket(&net.pbx, local, 10_000);
        let sent = rtp(8, 172);
        pbx.send_to(&sent, phone.local_addr().expect("address"))
            .expect("sent");
        assert_eq!(receive(&phone), sent);
    }
    let seen = capture.stop().expect("capture");
    let verification = seen.verify();
    assert!(verification.wrong.is_empty(), "{verification:?}");
    assert_eq!(seen.datagrams().count(), 2);
    assert!(seen.datagrams().all(|(_, datagram)| datagram.dscp == EF));
    assert_eq!(by_class(&net.router, "eth1")["high"], 2);
    assert_eq!(counted(&net.router, "eth1").voice.packets, 2);
}

/// HTB with the classes of the built-in policy.
fn htb(host: &Host, interface: &str) {
    let mut lines = format!("qdisc add dev {interface} root handle 1: htb default 40\n");
    for class in ["10", "20", "30", "40"] {
        lines +=
            &format!("class add dev {interface} parent 1: classid 1:{class} htb rate 100mbit\n");
    }
    host.tc(&lines).expect("tc");
}

/// Packets that a class of HTB has sent.
fn sent_by(host: &Host, interface: &str, class: &str) -> u64 {
    let said = host
        .tc(&format!("-s class show dev {interface}"))
        .expect("tc");
    let (_, found) = said
        .split_once(&format!("class htb {class} "))
        .expect("a class");
    let (_, sent) = found.split_once(" Sent ").expect("numbers");
    let packets = sent.split(' ').nth(2).expect("a number");
    packets.parse().expect("a number")
}

#[test]
fn htb_takes_packets_to_the_classes_they_are_given() {
    let net = Direct::new(1).expect("network");
    // IPv6 tells of its multicast groups whenever it likes to.
    net.pbx
        .sysctl("net/ipv6/conf/eth0/disable_ipv6", "1")
        .expect("IPv4 only");
    htb(&net.pbx, "eth0");
    attach(&net.pbx, "eth0", &Policy::built_in());
    let phone = socket(&net.phones, Direct::phone_v4(0), 30_000);
    let to = phone.local_addr().expect("address");
    let voice = socket(&net.pbx, PBX_V4, 10_000);
    let other = socket(&net.pbx, PBX_V4, 10_002);
    let chosen = socket(&net.pbx, PBX_V4, 10_004);
    nix::sys::socket::setsockopt(
        &chosen,
        nix::sys::socket::sockopt::Priority,
        &(class_id(2) as i32),
    )
    .expect("SO_PRIORITY");
    for (socket, packet, times) in [
        (&voice, rtp(0, 172), 5),
        (&other, b"neither voice nor web".to_vec(), 7),
        (&chosen, rtp(0, 172), 9),
    ] {
        for _ in 0..times {
            socket.send_to(&packet, to).expect("sent");
            assert_eq!(receive(&phone), packet);
        }
    }
    for (class, packets) in [("1:20", 5), ("1:40", 7), ("1:30", 9)] {
        assert_eq!(sent_by(&net.pbx, "eth0", class), packets, "{class}");
    }
    assert!(sent_by(&net.pbx, "eth0", "1:10") > 0, "ARP");
    let classes = by_class(&net.pbx, "eth0");
    assert_eq!(
        (classes["high"], classes["bulk"], classes["regular"]),
        (5, 7, 9)
    );
}

#[test]
fn what_comes_in_is_queued_once_and_arrives_once() {
    let net = Direct::new(1).expect("network");
    net.pbx
        .ip("link add ifb0 type ifb\nlink set ifb0 up")
        .expect("an IFB device");
    htb(&net.pbx, "ifb0");
    attach(&net.pbx, "ifb0", &Policy::built_in());
    let index = |name: &'static str| {
        net.pbx
            .run(|| nix::net::if_::if_nametoindex(name))
            .expect("an interface")
    };
    let (eth0, ifb0) = (index("eth0"), index("ifb0"));
    let downlink = || {
        net.pbx
            .run(|| Classifier::attach_downlink("eth0", eth0, ifb0))
    };
    downlink().expect("attached");
    // Again: in its place, not beside it.
    downlink().expect("attached");
    let pbx = socket(&net.pbx, PBX_V4, 10_000);
    let to = pbx.local_addr().expect("address");
    let phone = socket(&net.phones, Direct::phone_v4(0), 30_000);
    let exchange = |number: u8| {
        let mut packet = rtp(0, 172);
        packet[3] = number;
        phone.send_to(&packet, to).expect("sent");
        assert_eq!(receive(&pbx), packet, "one of each, in order");
    };
    (0..20).for_each(exchange);
    assert_eq!(by_class(&net.pbx, "ifb0")["high"], 20);
    assert_eq!(sent_by(&net.pbx, "ifb0", "1:20"), 20);
    // Without the device, what comes in is not lost.
    net.pbx.ip("link delete ifb0").expect("ip link");
    (20..40).for_each(exchange);
    assert!(
        net.pbx
            .run(|| Classifier::detach("ifb0"))
            .expect("detached")
    );
    assert!(
        net.pbx
            .run(|| Classifier::detach("eth0"))
            .expect("detached")
    );
    (40..60).for_each(exchange);
    pbx.set_nonblocking(true).expect("socket");
    assert!(pbx.recv(&mut [0; 1]).is_err(), "nothing came twice");
}

#[test]
fn what_leaves_is_marked_until_the_classifier_is_detached() {
    let net = Direct::new(1).expect("network");
    attach(&net.pbx, "eth0", &Policy::built_in());
    let capture = Capture::start(&net.phones_interface).expect("capture");
    let pbx = socket(&net.pbx, PBX_V4, 10_000);
    let phone = socket(&net.phones, Direct::phone_v4(0), 30_000);
    let packet = rtp(0, 172);
    let send = || {
        pbx.send_to(&packet, phone.local_addr().expect("address"))
            .expect("sent");
        assert_eq!(receive(&phone), packet);
    };
    (0..3).for_each(|_| send());
    let voice = counted(&net.pbx, "eth0").voice;
    assert_eq!((voice.packets, voice.bytes), (3, 3 * 214));
    // Another policy in its place.
    let other = "default = \"all\"\n[[class]]\nname = \"all\"\nrate = \"1/1\"\nceiling = \"1/1\"\nprio = 0\n\
                 [[rule]]\nname = \"cs1\"\nrtp = \"any\"\nset-dscp = \"cs1\"\n";
    attach(
        &net.pbx,
        "eth0",
        &Policy::parse(Path::new("test"), other).expect("policy"),
    );
    send();
    let rules = counted(&net.pbx, "eth0").rules;
    assert_eq!(
        (rules.len(), rules[0].name.as_str(), rules[0].packets),
        (1, "cs1", 1)
    );
    let detach = || net.pbx.run(|| Classifier::detach("eth0"));
    assert!(detach().expect("detached"));
    assert!(!detach().expect("nothing"));
    assert_eq!(
        net.pbx.run(|| Classifier::read("eth0")).expect("nothing"),
        None
    );
    assert!(!net.pbx.run(|| Path::new("/sys/fs/bpf/relay-qos").exists()));
    send();
    let seen = capture.stop().expect("capture");
    let marks: Vec<u8> = seen
        .datagrams()
        .map(|(_, datagram)| datagram.dscp)
        .collect();
    assert_eq!(marks, [EF, EF, EF, 8, 0]);
}

#[test]
fn a_policy_is_replaced_without_a_packet_between() {
    let net = Direct::new(1).expect("network");
    attach(&net.pbx, "eth0", &Policy::built_in());
    let capture = Capture::start(&net.phones_interface).expect("capture");
    let pbx = socket(&net.pbx, PBX_V4, 10_000);
    let phone = socket(&net.phones, Direct::phone_v4(0), 30_000);
    let to = phone.local_addr().expect("address");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                pbx.send_to(&rtp(0, 172), to).expect("sent");
                receive(&phone);
                sent += 1;
            }
            sent
        });
        for _ in 0..5 {
            attach(&net.pbx, "eth0", &Policy::built_in());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        sender.join().expect("a sender")
    });
    let seen = capture.stop().expect("capture");
    assert_eq!(seen.datagrams().count(), sent);
    assert!(
        seen.datagrams().all(|(_, datagram)| datagram.dscp == EF),
        "of {sent}"
    );
}

#[test]
fn an_interface_made_anew_is_not_taken_for_the_one_before() {
    let host = Host::new("pbx").expect("a machine");
    let make = || {
        host.ip("link add eth0 type veth peer name eth1")
            .expect("ip link");
        host.run(|| nix::net::if_::if_nametoindex("eth0"))
            .expect("an interface")
    };
    let is_attached = |index| {
        host.run(|| Classifier::is_attached("eth0", index))
            .expect("an answer")
    };
    let first = make();
    attach(&host, "eth0", &Policy::built_in());
    assert!(is_attached(first));
    host.ip("link delete eth0").expect("ip link");
    let second = make();
    assert!(!is_attached(second));
    attach(&host, "eth0", &Policy::built_in());
    assert!(is_attached(second));
    host.ip("link delete eth0").expect("ip link");
    assert!(host.run(|| Classifier::detach("eth0")).expect("detached"));
    assert!(!host.run(|| Path::new("/sys/fs/bpf/relay-qos").exists()));
}

#[test]
fn other_links_are_refused_by_name() {
    let host = Host::new("pbx").expect("a machine");
    host.ip("tuntap add tun0 mode tun\nlink set tun0 up")
        .expect("ip link");
    let index = |name: &'static str| {
        host.run(|| nix::net::if_::if_nametoindex(name))
            .expect("an interface")
    };
    let lo = host.run(|| Classifier::attach("lo", 1, &Policy::built_in(), Task::Classify));
    assert!(
        lo.expect_err("refused")
            .to_string()
            .contains("lo has neither")
    );
    let tun = index("tun0");
    let downlink = host.run(|| Classifier::attach_downlink("tun0", tun, 1));
    assert!(
        downlink
            .expect_err("refused")
            .to_string()
            .contains("shape the uplink only")
    );
    let gone = host.run(|| Classifier::attach("eth9", 99, &Policy::built_in(), Task::Classify));
    assert!(
        gone.expect_err("refused")
            .to_string()
            .contains("eth9 is gone")
    );
}

#[test]
fn every_example_is_a_policy() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policies");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("examples")
        .map(|file| {
            file.expect("a file")
                .file_name()
                .into_string()
                .expect("a name")
        })
        .collect();
    files.sort();
    assert_eq!(files, ["openvpn.toml", "ports.toml"]);
    for file in &files {
        example(file).rates(950_000).expect(file);
    }
    let tunnel = example("openvpn.toml");
    let table = table::compile(&tunnel, Task::Classify);
    for (class, expected) in [(0, (1, 18)), (46, (0, 46))] {
        let mut draft = received(Family::V4);
        draft.source.set_port(50_000);
        draft.destination.set_port(1194);
        draft.traffic_class = class << 2;
        let frame = draft.bytes();
        let outcome = on_host(
            LinkLayer::Ethernet,
            &frame,
            &table,
            &Memory::new(),
            &SkBuff::default(),
        );
        assert_eq!(
            (outcome.priority, outcome.frame[15] >> 2),
            (class_id(expected.0), expected.1)
        );
    }
}
