//! The table of packets that host tests, kernel tests and the benchmark share: what comes in, what it meets, what is
//! decided, and what goes out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use relay_common::{
    checksum::PartialChecksum,
    reason::Reason,
    stream::{
        self, DSCP_EF, DSCP_KEEP, DSCP_MAP, Endpoint, NextHop, PAYLOAD_TYPES, PayloadType, State,
        StreamSpec, VlanTag,
    },
    wire::Mac,
};

use crate::{
    draft::{Checksum, Draft, QINQ, UDP, VLAN},
    tables::{Entry, NOW, TRANSLATED},
};

/// Slots of the tables that fixtures meet.
pub const SLOTS: u32 = 64;

/// A place where the decision runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP in the driver.
    NativeXdp,
    /// XDP in the stack.
    GenericXdp,
    /// TC ingress, on a packet whose checksum the kernel takes for finished.
    Tc,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::NativeXdp, Self::GenericXdp, Self::Tc];

    /// What becomes of an unfinished checksum there.
    #[must_use]
    pub const fn partial_checksum(self) -> PartialChecksum {
        match self {
            Self::NativeXdp => PartialChecksum::Lost,
            Self::GenericXdp | Self::Tc => PartialChecksum::Kept,
        }
    }
}

/// What a hook makes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Relayed(Vec<u8>),
    Passed(Reason),
}

/// One packet and what is expected of it.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// What is special about it.
    pub description: String,
    /// The frame that comes in.
    pub frame: Vec<u8>,
    /// The streams that it meets.
    pub streams: Vec<Entry>,
    /// Until when they may be relayed, ns.
    pub lease: u64,
    native: Outcome,
    generic: Outcome,
    tc: Option<Outcome>,
}

impl Fixture {
    /// The reason, and the frame afterwards. None where the hook cannot be shown this packet: `BPF_PROG_TEST_RUN`
    /// has no way to tell TC that a checksum is unfinished.
    #[must_use]
    pub fn expected(&self, hook: Hook) -> Option<(Reason, &[u8])> {
        let outcome = match hook {
            Hook::NativeXdp => &self.native,
            Hook::GenericXdp => &self.generic,
            Hook::Tc => self.tc.as_ref()?,
        };
        Some(match outcome {
            Outcome::Relayed(output) => (Reason::Relayed, output),
            Outcome::Passed(reason) => (*reason, &self.frame),
        })
    }
}

/// IP version of a fixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// MAC address of the PBX.
const PBX: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// MAC address of the phone that sends.
const NEAR: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0a];
/// MAC address of the router before the phone that receives.
const FAR: [u8; 6] = [0x06, 0xff, 0xee, 0xdd, 0xcc, 0xbb];

fn near(family: Family) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::new(Ipv4Addr::new(192, 0, 2, 11).into(), 30_000),
        Family::V6 => SocketAddr::new(
            Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0x11).into(),
            30_000,
        ),
    }
}

fn far(family: Family) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::new(Ipv4Addr::new(198, 51, 100, 254).into(), 65_535),
        Family::V6 => SocketAddr::new(
            Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 2, 0x1234, 0xfffe, 0, 0x12).into(),
            65_535,
        ),
    }
}

fn pbx(family: Family, port: u16) -> SocketAddr {
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, 1).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    SocketAddr::new(address, port)
}

/// A packet of 20 ms G.711 as the PBX receives it.
#[must_use]
pub fn received(family: Family) -> Draft {
    Draft {
        destination_mac: PBX,
        source_mac: NEAR,
        tags: vec![],
        source: near(family),
        destination: pbx(family, 10_000),
        traffic_class: 0,
        hop_limit: 64,
        identification: 0x1c46,
        fragment: 0x4000,
        options: vec![],
        protocol: UDP,
        checksum: Checksum::Finished,
        payload: rtp(0, 160),
        trailer: vec![],
    }
}

/// The same as the PBX would send it on.
#[must_use]
pub fn sent(family: Family) -> Draft {
    Draft {
        destination_mac: FAR,
        source_mac: PBX,
        source: pbx(family, 10_002),
        destination: far(family),
        traffic_class: 46 << 2,
        hop_limit: 63,
        ..received(family)
    }
}

/// The stream that relays [`received`] as [`sent`].
#[must_use]
pub fn stream(family: Family) -> StreamSpec {
    StreamSpec {
        source: endpoint(near(family)),
        local: endpoint(pbx(family, 10_000)),
        sends_from: endpoint(pbx(family, 10_000)),
        new_source: endpoint(pbx(family, 10_002)),
        new_destination: endpoint(far(family)),
        next_hop: NextHop {
            destination_mac: Mac { bytes: FAR },
            source_mac: Mac { bytes: PBX },
            vlans: [VlanTag::default(); 2],
            mtu: 1500,
        },
        dscp: DSCP_EF,
        slot: 4,
        keepalive: 0,
        pair: 1,
        is_ami: false,
        proof: 0,
        priority: 0,
        own_priority: false,
    }
}

/// A stream and a packet of it that comes out as it went in, but for TTL: the same packet can be relayed again.
#[must_use]
pub fn cycle(family: Family) -> (StreamSpec, Draft) {
    let mut stream = stream(family);
    stream.new_source = stream.source;
    stream.new_destination = stream.local;
    stream.next_hop.destination_mac = stream.next_hop.source_mac;
    let packet = Draft {
        source_mac: PBX,
        traffic_class: DSCP_EF << 2,
        hop_limit: 255,
        ..received(family)
    };
    (stream, packet)
}

/// The form of an address in the tables.
#[must_use]
pub fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        address: address.ip().into(),
        port: address.port(),
    }
}

/// A stream that is offloaded: payload type 0, 101 as 96, and 127.
#[must_use]
pub fn offloaded(stream: StreamSpec) -> Entry {
    let mut state = State {
        epoch: 1,
        proven: 1,
        watched: 1,
        ssrc: SSRC,
        payload_types: [PayloadType::UNUSED; PAYLOAD_TYPES],
        ..State::default()
    };
    state.payload_types[0] = PayloadType { from: 0, to: 0 };
    state.payload_types[1] = PayloadType { from: 101, to: 96 };
    state.payload_types[PAYLOAD_TYPES - 1] = PayloadType { from: 127, to: 127 };
    Entry { stream, state }
}

/// A stream that is watched.
#[must_use]
pub fn watching(stream: StreamSpec) -> Entry {
    let mut entry = offloaded(stream);
    entry.state.proven = 0;
    entry
}

/// A stream that the datapath has suspended.
#[must_use]
pub fn suspended(stream: StreamSpec) -> Entry {
    let mut entry = offloaded(stream);
    entry.state.suspended = entry.state.epoch;
    entry
}

/// A stream that the controller has taken back.
#[must_use]
pub fn taken_back(stream: StreamSpec) -> Entry {
    let mut entry = offloaded(stream);
    entry.state.epoch = 0;
    entry
}

/// Synchronisation source of [`rtp`].
pub const SSRC: u32 = 0xdead_beef;

/// Sequence number of [`rtp`].
pub const SEQUENCE: u16 = 0x1234;

/// Timestamp of [`rtp`].
pub const TIMESTAMP: u32 = 160;

/// An RTP packet with `length` bytes of voice.
#[must_use]
pub fn rtp(payload_type: u8, length: usize) -> Vec<u8> {
    let mut packet = vec![0x80, payload_type];
    packet.extend(SEQUENCE.to_be_bytes());
    packet.extend(TIMESTAMP.to_be_bytes());
    packet.extend(SSRC.to_be_bytes());
    packet.extend((0..length).map(|at| (at * 7) as u8));
    packet
}

/// RTP with contributing sources, and an extension that says it has `words` words and has 2.
fn rtp_with(sources: u8, extension: Option<u16>) -> Vec<u8> {
    let mut packet = rtp(0, 0);
    packet[0] |= sources;
    packet.extend((0..sources * 4).map(|at| at ^ 0x55));
    if let Some(words) = extension {
        packet[0] |= 0x10;
        packet.extend([0xbe, 0xde]);
        packet.extend(words.to_be_bytes());
        packet.extend([0xa5; 8]);
    }
    packet
}

fn relayed(
    description: impl Into<String>,
    input: &Draft,
    stream: StreamSpec,
    output: &Draft,
) -> Fixture {
    let outcome = Outcome::Relayed(output.bytes());
    Fixture {
        description: description.into(),
        frame: input.bytes(),
        streams: vec![offloaded(stream)],
        lease: u64::MAX,
        native: outcome.clone(),
        generic: outcome.clone(),
        tc: Some(outcome),
    }
}

fn passed(
    description: impl Into<String>,
    frame: Vec<u8>,
    streams: Vec<Entry>,
    reason: Reason,
) -> Fixture {
    let outcome = Outcome::Passed(reason);
    Fixture {
        description: description.into(),
        frame,
        streams,
        lease: u64::MAX,
        native: outcome.clone(),
        generic: outcome.clone(),
        tc: Some(outcome),
    }
}

/// The bytes with some of them overwritten.
fn patched(draft: &Draft, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = draft.bytes();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

/// Every fixture.
#[must_use]
pub fn all() -> Vec<Fixture> {
    let mut fixtures = Vec::new();
    for family in [Family::V4, Family::V6] {
        let first = fixtures.len();
        rewritten(&mut fixtures, family);
        checksums(&mut fixtures, family);
        tagged(&mut fixtures, family);
        not_the_streams(&mut fixtures, family);
        not_now(&mut fixtures, family);
        rtcp(&mut fixtures, family);
        damaged(&mut fixtures, family);
        for fixture in &mut fixtures[first..] {
            fixture.description.insert_str(
                0,
                match family {
                    Family::V4 => "IPv4, ",
                    Family::V6 => "IPv6, ",
                },
            );
        }
    }
    ipv4_only(&mut fixtures);
    ipv6_only(&mut fixtures);
    not_ip(&mut fixtures);
    fixtures
}

/// Addresses, TTL, DSCP, ECN, payload types, RTP headers and sizes.
fn rewritten(fixtures: &mut Vec<Fixture>, family: Family) {
    let stream = stream(family);
    let mut add = |description: &str, stream, change: &dyn Fn(&mut Draft, &mut Draft)| {
        let (mut input, mut output) = (received(family), sent(family));
        change(&mut input, &mut output);
        fixtures.push(relayed(description, &input, stream, &output));
    };
    add("20 ms of G.711", stream, &|_, _| {});
    for ecn in 0..4 {
        add(&format!("ECN bits {ecn}"), stream, &|input, output| {
            input.traffic_class = 0x28 | ecn;
            output.traffic_class = 0xb8 | ecn;
        });
        let keep = StreamSpec {
            dscp: DSCP_KEEP,
            ..stream
        };
        add(
            &format!("DSCP kept, ECN bits {ecn}"),
            keep,
            &|input, output| {
                input.traffic_class = 0x68 | ecn;
                output.traffic_class = 0x68 | ecn;
            },
        );
        let map = StreamSpec {
            dscp: DSCP_MAP,
            ..stream
        };
        add(
            &format!("DSCP translated, ECN bits {ecn}"),
            map,
            &|input, output| {
                input.traffic_class = 0x68 | ecn;
                output.traffic_class = TRANSLATED[0x1a] << 2 | ecn;
            },
        );
        for (dscp, marked) in [(0, 0), (34, 0x88), (63, 0xfc)] {
            let description = format!("DSCP {dscp}, ECN bits {ecn}");
            add(
                &description,
                StreamSpec { dscp, ..stream },
                &|input, output| {
                    input.traffic_class = 0xfc | ecn;
                    output.traffic_class = marked | ecn;
                },
            );
        }
    }
    for (hop_limit, less) in [(2, 1), (255, 254)] {
        add(&format!("TTL {hop_limit}"), stream, &|input, output| {
            input.hop_limit = hop_limit;
            output.hop_limit = less;
        });
    }
    for (from, to) in [
        (0, 0),
        (0x80, 0x80),
        (101, 96),
        (0x80 | 101, 0x80 | 96),
        (127, 127),
    ] {
        add(
            &format!("marker and payload type {from:#x}"),
            stream,
            &|input, output| {
                input.payload[1] = from;
                output.payload[1] = to;
            },
        );
    }
    let payloads = [
        ("RTP without a payload", rtp(0, 0)),
        ("odd length", rtp(0, 33)),
        ("1 contributing source", rtp_with(1, None)),
        ("15 contributing sources", rtp_with(15, None)),
        ("an extension of 2 words", rtp_with(0, Some(2))),
        ("an extension of 0 words", rtp_with(0, Some(0))),
        (
            "15 contributing sources and an extension",
            rtp_with(15, Some(2)),
        ),
    ];
    for (description, payload) in payloads {
        add(description, stream, &|input, output| {
            input.payload = payload.clone();
            output.payload = payload.clone();
        });
    }
    let full = 1500 - received(family).ip_length() + received(family).payload.len() - 12;
    add("as large as the MTU", stream, &|input, output| {
        input.payload = rtp(0, full);
        output.payload = rtp(0, full);
    });
    for trailer in [vec![0; 18], vec![0xff; 7]] {
        let description = format!("{} bytes after a short datagram", trailer.len());
        add(&description, stream, &|input, output| {
            for draft in [input, output] {
                draft.payload = rtp(0, 2);
                draft.trailer = trailer.clone();
            }
        });
    }
}

fn checksums(fixtures: &mut Vec<Fixture>, family: Family) {
    let stream = stream(family);
    let mut add = |description: &str, input: &Draft, output: &Draft| {
        fixtures.push(relayed(description, input, stream, output));
    };
    // Most voice is even, and the last byte of an odd datagram is a word of its own.
    for length in [160, 33] {
        let pair = |checksum| {
            let payload = rtp(101, length);
            let mut out_payload = payload.clone();
            out_payload[1] = 96;
            (
                Draft {
                    checksum,
                    payload,
                    ..received(family)
                },
                Draft {
                    checksum,
                    payload: out_payload,
                    ..sent(family)
                },
            )
        };
        for error in [1, 0x8000] {
            let (input, output) = pair(Checksum::Off(error));
            add(
                &format!("a checksum wrong by {error} stays so"),
                &input,
                &output,
            );
        }
        if family == Family::V4 {
            let (input, output) = pair(Checksum::Absent);
            add("no checksum", &input, &output);
        }
    }
    for field in [1, 0xfffe, 0xffff] {
        let input = received(family).with_checksum(field);
        let output = Draft {
            payload: input.payload.clone(),
            ..sent(family)
        };
        add(&format!("checksum {field:#06x} before"), &input, &output);
        let output = sent(family).with_checksum(field);
        let input = Draft {
            payload: output.payload.clone(),
            ..received(family)
        };
        add(&format!("checksum {field:#06x} after"), &input, &output);
    }
    let input = received(family).made_ambiguous();
    let output = Draft {
        payload: input.payload.clone(),
        ..sent(family)
    };
    fixtures.push(Fixture {
        // TC asks the kernel, which knows.
        tc: Some(Outcome::Relayed(output.bytes())),
        ..passed(
            "a finished checksum that looks unfinished",
            input.bytes(),
            vec![offloaded(stream)],
            Reason::UdpChecksum,
        )
    });
    let longest = 1472 - if family == Family::V6 { 20 } else { 0 } - 12;
    for length in (0..70).chain([159, 160, longest - 1, longest]) {
        let mut input = Draft {
            checksum: Checksum::Unfinished,
            payload: rtp(101, length),
            ..received(family)
        };
        for trailer in [vec![], vec![0x5a; 5]] {
            input.trailer.clone_from(&trailer);
            let output = |checksum| {
                let mut output = Draft {
                    checksum,
                    payload: input.payload.clone(),
                    trailer: trailer.clone(),
                    ..sent(family)
                };
                output.payload[1] = 96;
                Outcome::Relayed(output.bytes())
            };
            fixtures.push(Fixture {
                description: format!(
                    "unfinished checksum over {length} bytes of voice, {} bytes after them",
                    trailer.len()
                ),
                frame: input.bytes(),
                streams: vec![offloaded(stream)],
                lease: u64::MAX,
                native: output(Checksum::Finished),
                generic: output(Checksum::Unfinished),
                tc: None,
            });
        }
    }
    let mut jumbo = stream;
    jumbo.next_hop.mtu = 9000;
    let input = Draft {
        checksum: Checksum::Unfinished,
        payload: rtp(0, 0x800),
        ..received(family)
    };
    fixtures.push(Fixture {
        tc: None,
        ..passed(
            "unfinished checksum over a datagram too long to add up",
            input.bytes(),
            vec![offloaded(jumbo)],
            Reason::UdpChecksum,
        )
    });
    let long = |draft: Draft| Draft {
        payload: rtp(0, 0x800),
        ..draft
    };
    fixtures.push(relayed(
        "a jumbo frame",
        &long(received(family)),
        jumbo,
        &long(sent(family)),
    ));
}

fn tagged(fixtures: &mut Vec<Fixture>, family: Family) {
    let one = vec![(VLAN, 0xa000 | 100)];
    let service = vec![(QINQ, 0x3000 | 4094)];
    let two = vec![(QINQ, 0x1001), (VLAN, 0xe000 | 200)];
    let nested = vec![(VLAN, 0x0fff), (VLAN, 0xf000)];
    let with = |draft: Draft, tags: &[(u16, u16)]| Draft {
        tags: tags.to_vec(),
        ..draft
    };
    let to = |vlans: &[(u16, u16)]| {
        let mut stream = stream(family);
        for (place, &(tpid, id)) in stream.next_hop.vlans.iter_mut().zip(vlans) {
            *place = VlanTag::new(tpid, id);
        }
        stream
    };
    for tags in [&one, &service, &two, &nested] {
        fixtures.push(relayed(
            format!("tags {tags:x?} kept"),
            &with(received(family), tags),
            to(&[]),
            &with(sent(family), tags),
        ));
    }
    for (tags, vlans, changed) in [
        (&one, vec![(VLAN, 100)], vec![(VLAN, 0xa000 | 100)]),
        (&one, vec![(VLAN, 0x555)], vec![(VLAN, 0xa000 | 0x555)]),
        (&one, vec![(QINQ, 7)], vec![(QINQ, 0xa000 | 7)]),
        (&one, vec![(VLAN, 0)], vec![(VLAN, 0xa000)]),
        (&service, vec![(QINQ, 1)], vec![(QINQ, 0x3001)]),
        (
            &two,
            vec![(QINQ, 0xfff), (VLAN, 3)],
            vec![(QINQ, 0x1fff), (VLAN, 0xe003)],
        ),
        (
            &two,
            vec![(VLAN, 5), (VLAN, 6)],
            vec![(VLAN, 0x1005), (VLAN, 0xe006)],
        ),
        (
            &nested,
            vec![(VLAN, 2), (VLAN, 4094)],
            vec![(VLAN, 2), (VLAN, 0xf000 | 4094)],
        ),
    ] {
        fixtures.push(relayed(
            format!("tags {tags:x?} to VLAN {vlans:x?}"),
            &with(received(family), tags),
            to(&vlans),
            &with(sent(family), &changed),
        ));
    }
    let none = vec![];
    for (tags, vlans) in [
        (&none, vec![(VLAN, 1)]),
        (&none, vec![(QINQ, 1), (VLAN, 1)]),
        (&one, vec![(QINQ, 1), (VLAN, 1)]),
        (&two, vec![(VLAN, 1)]),
    ] {
        fixtures.push(passed(
            format!("tags {tags:x?} where the way out has {}", vlans.len()),
            with(received(family), tags).bytes(),
            vec![offloaded(to(&vlans))],
            Reason::VlanMismatch,
        ));
    }
    let three = [&two[..], &one].concat();
    fixtures.push(passed(
        "three tags",
        with(received(family), &three).bytes(),
        vec![offloaded(to(&[]))],
        Reason::VlanDepth,
    ));
}

/// Whole packets that the stream does not relay.
fn not_the_streams(fixtures: &mut Vec<Fixture>, family: Family) {
    let stream = stream(family);
    let mut add = |description: &str, stream, reason, change: &dyn Fn(&mut Draft)| {
        let mut input = received(family);
        change(&mut input);
        let streams = vec![offloaded(stream)];
        fixtures.push(passed(description, input.bytes(), streams, reason));
    };
    add("another port", stream, Reason::NoStream, &|input| {
        input.destination.set_port(10_001);
    });
    add(
        "another local address",
        stream,
        Reason::NoStream,
        &|input| {
            input.destination.set_ip(far(family).ip());
        },
    );
    for (description, mac) in [
        ("another machine's MAC", NEAR),
        (
            "another machine's MAC, first byte",
            [0x03, 0, 0, 0, 0, 0x01],
        ),
        ("another machine's MAC, last byte", [0x02, 0, 0, 0, 0, 0x00]),
        ("broadcast", [0xff; 6]),
        ("multicast", [0x01, 0, 0x5e, 0, 0, 1]),
    ] {
        add(description, stream, Reason::OtherHost, &|input| {
            input.destination_mac = mac;
        });
    }
    add(
        "another source port",
        stream,
        Reason::UnexpectedSource,
        &|input| {
            input.source.set_port(30_001);
        },
    );
    add(
        "another source address",
        stream,
        Reason::UnexpectedSource,
        &|input| {
            input.source.set_ip(far(family).ip());
        },
    );
    for version in [0x00, 0x40, 0xc0] {
        add("another version of RTP", stream, Reason::NotRtp, &|input| {
            input.payload[0] = version;
        });
    }
    add("a STUN request", stream, Reason::NotRtp, &|input| {
        input.payload = vec![
            0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
    });
    add("RTP with padding", stream, Reason::RtpPadding, &|input| {
        input.payload[0] |= 0x20;
    });
    add(
        "a datagram without a payload",
        stream,
        Reason::RtpLength,
        &|input| {
            input.payload.clear();
        },
    );
    add("11 bytes", stream, Reason::RtpLength, &|input| {
        input.payload.truncate(11);
    });
    add(
        "11 bytes and padding",
        stream,
        Reason::RtpLength,
        &|input| {
            input.payload.truncate(11);
            input.trailer = vec![0; 7];
        },
    );
    let payloads = [
        ("15 contributing sources announced, none there", {
            let mut packet = rtp(0, 59);
            packet[0] |= 15;
            packet
        }),
        ("no room for an extension's head", {
            let mut packet = rtp(0, 3);
            packet[0] |= 0x10;
            packet
        }),
        ("an extension one word too long", rtp_with(0, Some(3))),
        ("an extension of 65,535 words", rtp_with(15, Some(65_535))),
    ];
    for (description, payload) in payloads {
        add(description, stream, Reason::RtpLength, &|input| {
            input.payload = payload.clone();
            // Past the datagram there is room.
            input.trailer = vec![0; 64];
        });
    }
    for payload_type in [1, 100, 102, 96, 126, 128 + 63, 128 + 96] {
        let description = format!("marker and payload type {payload_type}");
        add(&description, stream, Reason::PayloadType, &|input| {
            input.payload[1] = payload_type;
        });
    }
    for hop_limit in [0, 1] {
        add(
            &format!("TTL {hop_limit}"),
            stream,
            Reason::HopLimit,
            &|input| {
                input.hop_limit = hop_limit;
            },
        );
    }
    let ip_length = received(family).ip_length() as u16;
    let narrow = |mtu| {
        let mut narrow = stream;
        narrow.next_hop.mtu = mtu;
        narrow
    };
    add(
        "a byte larger than the MTU",
        narrow(ip_length - 1),
        Reason::TooBig,
        &|_| {},
    );
    let mut unknown = stream;
    unknown.next_hop = NextHop::default();
    add("no next hop yet", unknown, Reason::NextHopUnknown, &|_| {});
    let stray = StreamSpec {
        slot: u32::MAX,
        ..stream
    };
    add("a stream without state", stray, Reason::NoState, &|_| {});
    fixtures.push(relayed(
        "exactly the MTU, and bytes after the packet",
        &Draft {
            trailer: vec![0; 20],
            ..received(family)
        },
        narrow(ip_length),
        &Draft {
            trailer: vec![0; 20],
            ..sent(family)
        },
    ));

    let frame = received(family).bytes();
    for (description, entry, reason) in [
        ("watching", watching(stream), Reason::Watching),
        ("suspended", suspended(stream), Reason::Suspended),
        ("taken back", taken_back(stream), Reason::Suspended),
    ] {
        fixtures.push(passed(description, frame.clone(), vec![entry], reason));
    }
    fixtures.push(passed("no streams at all", frame, vec![], Reason::NoStream));
    // Another family's stream with the same last 4 bytes of its address is another stream.
    let other = match family {
        Family::V4 => Family::V6,
        Family::V6 => Family::V4,
    };
    let mut streams = vec![offloaded(self::stream(other)), offloaded(stream)];
    streams[0].stream.slot = 8;
    fixtures.push(Fixture {
        streams,
        ..relayed(
            "streams of both families",
            &received(family),
            stream,
            &sent(family),
        )
    });
}

/// Ticks of a time before now, ns.
#[must_use]
pub const fn ago(time: u64) -> u32 {
    stream::ticks(NOW - time)
}

/// One second, ns.
pub const SECOND: u64 = 1_000_000_000;

/// A stream that is proven by 8 packets, and flows: its last packet came 20 ms ago, and none is on its way through
/// the PBX.
#[must_use]
pub fn proven(stream: StreamSpec) -> Entry {
    let mut entry = offloaded(StreamSpec { proof: 8, ..stream });
    entry.state.last_seen = ago(SECOND / 50);
    entry.state.last_passed = ago(60 * SECOND);
    entry.state.noted = 8;
    entry.state.echoed = 8;
    entry
}

/// Packets of a stream that is offloaded, but not these, or not now.
fn not_now(fixtures: &mut Vec<Fixture>, family: Family) {
    let stream = stream(family);
    let (input, output) = (received(family), sent(family));
    let mut add = |description: &str, entry: Entry, reason| {
        let fixture = match reason {
            Reason::Relayed => relayed(description, &input, entry.stream, &output),
            _ => passed(description, input.bytes(), vec![], reason),
        };
        let streams = vec![entry];
        fixtures.push(Fixture { streams, ..fixture });
    };
    let changed = |change: &dyn Fn(&mut Entry)| {
        let mut entry = proven(stream);
        change(&mut entry);
        entry
    };
    add("proven on the wire", proven(stream), Reason::Relayed);
    for ssrc in [SSRC - 1, SSRC ^ 0x8000_0000, 0] {
        let entry = changed(&|entry| entry.state.ssrc = ssrc);
        add("another synchronisation source", entry, Reason::NewSsrc);
    }
    for (pause, reason) in [
        (SECOND / 10, Reason::Relayed),
        (SECOND / 2, Reason::AfterPause),
        (600 * SECOND, Reason::AfterPause),
    ] {
        let entry = changed(&|entry| entry.state.last_seen = ago(pause));
        add(&format!("after {pause} ns"), entry, reason);
    }
    let entry = changed(&|entry| entry.state.last_seen = 0);
    add("the first packet", entry, Reason::AfterPause);
    for (noted, echoed) in [(9, 8), (16, 8), (0, u32::MAX)] {
        let entry = changed(&|entry| {
            entry.state.noted = noted;
            entry.state.echoed = echoed;
        });
        let description = format!("{noted} noted, {echoed} came out");
        add(&description, entry, Reason::AwaitingEcho);
    }

    let keepalive = |passed, rtcp: Option<u64>| {
        changed(&|entry| {
            entry.stream.keepalive = stream::ticks(10 * SECOND) as u16;
            entry.state.last_passed = ago(passed);
            entry.state.last_rtcp = rtcp.map_or(0, ago);
        })
    };
    for (passed, rtcp, reason) in [
        (9, None, Reason::Relayed),
        (11, None, Reason::Keepalive),
        (900, None, Reason::Keepalive),
        (11, Some(1), Reason::Relayed),
        (11, Some(24), Reason::Relayed),
        (900, Some(24), Reason::Relayed),
        (11, Some(26), Reason::Keepalive),
        (9, Some(26), Reason::Relayed),
    ] {
        let description =
            format!("keepalive after 10 s; last passed {passed}, RTCP {rtcp:?} s ago");
        let entry = keepalive(passed * SECOND, rtcp.map(|rtcp| rtcp * SECOND));
        add(&description, entry, reason);
        let mut unproven = entry;
        unproven.stream.proof = 0;
        add(&format!("{description}, no proof"), unproven, reason);
    }
    // What else there is against it comes first, and the PBX hears of the phone by that too.
    let mut entry = keepalive(900 * SECOND, None);
    entry.state.payload_types[0] = PayloadType::UNUSED;
    add(
        "keepalive of another payload type",
        entry,
        Reason::PayloadType,
    );
    // Without a proof, none of it matters.
    let careless = changed(&|entry| {
        entry.stream.proof = 0;
        entry.state.ssrc = 1;
        entry.state.last_seen = 0;
        entry.state.noted = 9;
    });
    add("no proof asked for", careless, Reason::Relayed);

    for entry in [
        proven(stream),
        watching(stream),
        suspended(stream),
        taken_back(stream),
    ] {
        for lease in [0, 1] {
            fixtures.push(Fixture {
                lease,
                ..passed("lease over", input.bytes(), vec![entry], Reason::LeaseOver)
            });
        }
    }
    let mut stranger = received(family);
    stranger.source.set_port(1);
    for (entry, reason) in [
        (watching(proven(stream).stream), Reason::UnexpectedSource),
        (suspended(proven(stream).stream), Reason::Suspended),
    ] {
        let streams = vec![entry];
        fixtures.push(passed(
            "another source, not offloaded",
            stranger.bytes(),
            streams,
            reason,
        ));
    }
}

/// An RTCP packet: an empty receiver report, or another by its packet type.
fn report(packet_type: u8) -> Vec<u8> {
    let mut packet = vec![0x80, packet_type, 0, 1];
    packet.extend(SSRC.to_be_bytes());
    packet
}

fn rtcp(fixtures: &mut Vec<Fixture>, family: Family) {
    for entry in [
        offloaded(stream(family)),
        proven(stream(family)),
        taken_back(stream(family)),
    ] {
        let mut add = |description: String, reason, change: &dyn Fn(&mut Draft)| {
            let mut input = received(family);
            input.payload = report(201);
            change(&mut input);
            fixtures.push(passed(description, input.bytes(), vec![entry], reason));
        };
        // Beside the stream's port, whatever the mode.
        for packet_type in [192, 200, 201, 202, 203, 204, 205, 206, 207, 223] {
            add(format!("RTCP {packet_type}"), Reason::Rtcp, &|input| {
                input.destination.set_port(10_001);
                input.source.set_port(5);
                input.payload[1] = packet_type;
            });
        }
        let elsewhere = [
            ("RTCP from elsewhere", Reason::NoStream, 201, 8, far(family)),
            ("too short", Reason::NoStream, 201, 7, near(family)),
            ("RTP", Reason::NoStream, 191, 8, near(family)),
            ("RTP", Reason::NoStream, 224, 8, near(family)),
        ];
        for (description, reason, packet_type, length, source) in elsewhere {
            add(format!("{description} on RTCP's port"), reason, &|input| {
                input.destination.set_port(10_001);
                input.source = source;
                input.payload[1] = packet_type;
                input.payload.truncate(length);
            });
        }
        // On the port itself.
        if entry.state.epoch == 0 {
            continue;
        }
        for packet_type in [192, 200, 201, 223] {
            add(
                format!("RTCP {packet_type} among RTP"),
                Reason::Rtcp,
                &|input| {
                    input.payload[1] = packet_type;
                },
            );
        }
        add(
            "a long report among RTP".to_owned(),
            Reason::Rtcp,
            &|input| {
                input.payload = rtp(201, 500);
            },
        );
        add(
            "7 bytes of RTCP among RTP".to_owned(),
            Reason::RtpLength,
            &|input| {
                input.payload.truncate(7);
            },
        );
    }
}

/// Frames whose headers say what is not so.
fn damaged(fixtures: &mut Vec<Fixture>, family: Family) {
    let streams = vec![offloaded(stream(family))];
    let mut add = |description: String, frame, reason| {
        fixtures.push(passed(description, frame, streams.clone(), reason));
    };
    for tags in [vec![], vec![(VLAN, 100)], vec![(QINQ, 9), (VLAN, 100)]] {
        let draft = Draft {
            tags,
            ..received(family)
        };
        let whole = draft.bytes();
        // Each header's first byte, the last but one, and the whole but for a byte.
        for end in [
            draft.ip(),
            draft.udp(),
            draft.rtp(),
            draft.rtp() + 12,
            whole.len(),
        ] {
            add(
                format!("cut to {} bytes", end - 1),
                whole[..end - 1].to_vec(),
                Reason::Truncated,
            );
            if end < whole.len() {
                add(
                    format!("cut to {end} bytes"),
                    whole[..end].to_vec(),
                    Reason::Truncated,
                );
            }
        }
        for at in (14..draft.ip()).chain([draft.ip() + 1]) {
            add(
                format!("cut to {at} bytes"),
                whole[..at].to_vec(),
                Reason::Truncated,
            );
        }
    }
    let draft = received(family);
    let ip_version = match family {
        Family::V4 => [0x00, 0x35, 0x44, 0x65],
        Family::V6 => [0x00, 0x45, 0x50, 0x70],
    };
    for version in ip_version {
        let frame = patched(&draft, draft.ip(), &[version]);
        add(
            format!("IP version byte {version:#x}"),
            frame,
            Reason::Malformed,
        );
    }
    let length = draft.payload.len() as u16 + 8;
    for (udp_length, reason) in [
        (0, Reason::Malformed),
        (7, Reason::Malformed),
        (length - 1, Reason::Malformed),
        (length + 1, Reason::Malformed),
        (0xffff, Reason::Malformed),
    ] {
        let frame = patched(&draft, draft.udp() + 4, &udp_length.to_be_bytes());
        add(format!("UDP length {udp_length}"), frame, reason);
    }
    let (at, ip_length) = match family {
        Family::V4 => (draft.ip() + 2, length + 20),
        Family::V6 => (draft.ip() + 4, length),
    };
    for wrong in [0, 7, ip_length - 1, ip_length + 1, 0xffff] {
        let frame = patched(&draft, at, &wrong.to_be_bytes());
        add(format!("IP length {wrong}"), frame, Reason::Malformed);
    }
    let mut frame = patched(&draft, at, &(ip_length + 4).to_be_bytes());
    frame[draft.udp() + 4..draft.udp() + 6].copy_from_slice(&(length + 4).to_be_bytes());
    add(
        "both lengths beyond the frame".to_owned(),
        frame,
        Reason::Truncated,
    );
    for protocol in [1, 6, 58, 136] {
        let frame = Draft {
            protocol,
            ..draft.clone()
        };
        add(
            format!("protocol {protocol}"),
            frame.bytes(),
            Reason::NotUdp,
        );
    }
}

fn ipv4_only(fixtures: &mut Vec<Fixture>) {
    let family = Family::V4;
    let streams = vec![offloaded(stream(family))];
    for words in [1, 10] {
        let draft = Draft {
            options: vec![1; words * 4],
            ..received(family)
        };
        let description = format!("IPv4, {words} words of options");
        fixtures.push(passed(
            description,
            draft.bytes(),
            streams.clone(),
            Reason::IpOptions,
        ));
    }
    for fragment in [0x2000, 0x2001, 0x0001, 0x1fff, 0x6000] {
        let draft = Draft {
            fragment,
            ..received(family)
        };
        let description = format!("IPv4, flags and offset {fragment:#06x}");
        fixtures.push(passed(
            description,
            draft.bytes(),
            streams.clone(),
            Reason::Fragment,
        ));
    }
    // The reserved bit means nothing to the kernel's fragment check.
    for fragment in [0, 0x8000] {
        fixtures.push(relayed(
            format!("IPv4, flags and offset {fragment:#06x}"),
            &Draft {
                fragment,
                ..received(family)
            },
            stream(family),
            &Draft {
                fragment,
                ..sent(family)
            },
        ));
    }
    // The header checksum ends up at either end of its range.
    for (identification, name) in [(0_u16, "first"), (0xffff, "last")] {
        fixtures.push(relayed(
            format!("IPv4, {name} identification"),
            &Draft {
                identification,
                ..received(family)
            },
            stream(family),
            &Draft {
                identification,
                ..sent(family)
            },
        ));
    }
    let header_checksum = |draft: &Draft| {
        let frame = draft.bytes();
        u16::from_be_bytes([frame[draft.ip() + 10], frame[draft.ip() + 11]])
    };
    for wanted in [0, 0xfffe] {
        for choose in [received, sent] {
            let identification = (0..=0xffff)
                .find(|&identification| {
                    header_checksum(&Draft {
                        identification,
                        ..choose(family)
                    }) == wanted
                })
                .expect("one identification of 65,536 gives it");
            let [input, output] = [received, sent].map(|draft| Draft {
                identification,
                ..draft(family)
            });
            fixtures.push(relayed(
                format!("IPv4, a header checksum is {wanted:#06x}"),
                &input,
                stream(family),
                &output,
            ));
        }
    }
    // Corruption on the way must not be healed.
    let [input, output] = [received(family), sent(family)].map(|draft| {
        let wrong = header_checksum(&draft) + 1;
        patched(&draft, draft.ip() + 10, &wrong.to_be_bytes())
    });
    let outcome = Outcome::Relayed(output);
    fixtures.push(Fixture {
        description: "IPv4, a wrong header checksum stays so".to_owned(),
        frame: input,
        streams,
        lease: u64::MAX,
        native: outcome.clone(),
        generic: outcome.clone(),
        tc: Some(outcome),
    });
}

fn ipv6_only(fixtures: &mut Vec<Fixture>) {
    let family = Family::V6;
    let streams = vec![offloaded(stream(family))];
    for (protocol, reason) in [
        (0, Reason::IpOptions),
        (43, Reason::IpOptions),
        (51, Reason::IpOptions),
        (60, Reason::IpOptions),
        (44, Reason::Fragment),
        (59, Reason::NotUdp),
    ] {
        let draft = Draft {
            protocol,
            options: vec![UDP, 0, 1, 4, 0, 0, 0, 0],
            ..received(family)
        };
        let description = format!("IPv6, next header {protocol}");
        fixtures.push(passed(description, draft.bytes(), streams.clone(), reason));
    }
    let draft = Draft {
        checksum: Checksum::Absent,
        ..received(family)
    };
    fixtures.push(passed(
        "IPv6, no checksum",
        draft.bytes(),
        streams.clone(),
        Reason::UdpChecksum,
    ));
    // Its form in the tables is an IPv4 stream's, and Linux takes no such packet (ipv6_rcv() in net/ipv6/ip6_input.c).
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    let v4 = received(Family::V4);
    let draft = Draft {
        source: mapped(v4.source),
        destination: mapped(v4.destination),
        ..v4
    };
    fixtures.push(passed(
        "IPv6, the addresses of an IPv4 stream",
        draft.bytes(),
        vec![offloaded(stream(Family::V4))],
        Reason::NoStream,
    ));
    // The upper four bits of the flow label share their word with the traffic class.
    let [input, output] = [received(family), sent(family)].map(|draft| {
        let class = draft.traffic_class << 4 | 0x0f;
        patched(&draft, draft.ip() + 1, &[class])
    });
    let outcome = Outcome::Relayed(output);
    fixtures.push(Fixture {
        description: "IPv6, a flow label of 20 bits".to_owned(),
        frame: input,
        streams,
        lease: u64::MAX,
        native: outcome.clone(),
        generic: outcome.clone(),
        tc: Some(outcome),
    });
}

fn not_ip(fixtures: &mut Vec<Fixture>) {
    let streams = vec![offloaded(stream(Family::V4))];
    let draft = received(Family::V4);
    for (ethertype, name) in [
        (0x0806_u16, "ARP"),
        (0x8847, "MPLS"),
        (0x88cc, "LLDP"),
        (160, "a length"),
    ] {
        fixtures.push(passed(
            name,
            patched(&draft, 12, &ethertype.to_be_bytes()),
            streams.clone(),
            Reason::NotIp,
        ));
    }
    let tagged = Draft {
        tags: vec![(VLAN, 100)],
        ..draft
    };
    let frame = patched(&tagged, 16, &0x0806_u16.to_be_bytes());
    fixtures.push(passed("ARP in a VLAN", frame, streams, Reason::NotIp));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_fixture() {
        let fixtures = all();
        // These are of packets that leave, and of what traffic control has beside the frame.
        let others = [
            Reason::Echo,
            Reason::Unequal,
            Reason::TalkBack,
            Reason::ComfortNoise,
            Reason::Aggregate,
            Reason::RetagFailed,
        ];
        for &reason in Reason::ALL {
            let found = fixtures.iter().any(|fixture| {
                fixture
                    .expected(Hook::NativeXdp)
                    .is_some_and(|(is, _)| is == reason)
            });
            assert_eq!(found, !others.contains(&reason), "{}", reason.name());
        }
    }

    #[test]
    fn the_streams_and_the_hand_written_packets_agree() {
        for family in [Family::V4, Family::V6] {
            let entry = offloaded(stream(family));
            assert_eq!(received(family).relayed(&entry), sent(family));
            let (stream, packet) = cycle(family);
            let once = packet.relayed(&offloaded(stream));
            assert_eq!(
                Draft {
                    hop_limit: 255,
                    ..once
                },
                packet
            );
        }
    }
}
