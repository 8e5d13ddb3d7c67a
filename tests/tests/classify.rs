//! Marks and classes of what leaves: the decision against a plain one that asks rule by rule, on the host and in the
//! kernel, and real packets through interfaces. Needs root.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use aya::{Ebpf, maps::PerCpuArray, programs::Program};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::{prelude::*, sample::select, strategy::ValueTree as _, test_runner::TestRunner};
use relay_common::{
    checksum::PartialChecksum,
    classify::{
        CLASSES, COUNTERS, FlowKey, Metadata, NONE, RULES, RuleTable, Tables, VOICE, class_counter,
        class_id, classify, tcp,
    },
    packet::{Frame, Header, Packet},
    reason::Reason,
    stream::Counter,
};
use relay_tests::{
    capture::{Capture, Frame as Captured},
    draft::{Draft, QINQ, VLAN},
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
        table,
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
    fn load(layer: LinkLayer, policy: &Policy) -> Self {
        Self(classifier::loaded(layer, policy).expect("the kernel takes the classifier"))
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
                    body.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, self.tcp_flags, 0, 9, 0, 0, 0, 0]);
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
        let has = |list: &[std::ops::RangeInclusive<u16>], port| list.iter().any(|range| range.contains(&port));
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
    let ports = || prop_oneof![select(vec![22, 53, 443, 1194, 5060, 5061]), 1020_u16..1030, any::<u16>()];
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
        select(vec![0x10_u8, 0x18, 0x02, 0x12, 0x04, 0x14, 0x11, 0x00, 0xff]),
        payload,
    )
        .prop_map(
            |(family, tags, options, fragment_offset, protocol, traffic_class, ports, tcp_flags, payload)| Plan {
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
    let few = |values: Vec<u8>| {
        prop_oneof![3 => Just(vec![]), 1 => proptest::collection::vec(select(values), 1..3)]
    };
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
        select(vec![None, None, None, Some(Rtp::Audio), Some(Rtp::Video), Some(Rtp::Any)]),
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
        }
    })
}

/// Checks the IP header's checksum, and returns the frame without what a mark may change.
fn unmarked(frame: &[u8], plan: &Plan, layer: LinkLayer) -> (u8, Vec<u8>) {
    let ip = if layer == LinkLayer::Ethernet { 14 + 4 * plan.tags } else { 0 };
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
fn decisions(mut check: impl FnMut(&mut TestRunner, LinkLayer, &Policy, &RuleTable)) {
    let mut runner = TestRunner::default();
    let policies = policies();
    for layer in [LinkLayer::Ethernet, LinkLayer::Ip].repeat(5) {
        let policy = any_of(&mut runner, &policies);
        let table = table::compile(&policy);
        check(&mut runner, layer, &policy, &table);
    }
}

#[test]
fn bit_vectors_decide_as_rule_after_rule_does() {
    decisions(|runner, layer, policy, table| {
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
                plan.traffic_class % 4 | dscp << 2,
                "{plan:?} {policy:?}"
            );
            assert_eq!(rest, unmarked(&frame, &plan, layer).1, "{plan:?}");
        }
    });
}

#[test]
fn the_kernel_decides_as_the_host_does() {
    decisions(|runner, layer, policy, table| {
        let kernel = Kernel::load(layer, policy);
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
        }
        assert!(shown > 200, "only {shown} packets were shown");
        assert_eq!(kernel.counters(), *memory.counters.borrow());
    });
}
