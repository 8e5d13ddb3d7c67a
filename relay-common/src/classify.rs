//! The decision on a packet that leaves an interface: how it is marked (DSCP), and which class of the
//! queueing discipline it goes to.
//!
//! Rules are not tried one by one. For each thing that a rule may ask of a packet there is a table of
//! bit vectors, one bit a rule, in which a packet's value finds the rules that it satisfies; those that
//! match are what all tables agree on (Lakshman and Stiliadis, "High-Speed Policy-based Packet
//! Forwarding Using Efficient Multi-dimensional Range Matching", SIGCOMM 1998). So 64 rules cost what
//! one does, and no packet makes the verifier walk them.

use core::hint;

use crate::{
    abi::abi,
    checksum::ClassChange,
    packet::Packet,
    relay::u32_of,
    stream::Address,
    wire::{Be16, Ethernet, Ipv4, Ipv6, Rtp, Tcp, Udp, Vlan, ethertype, protocol},
};

/// Version of every layout here, which is part of the pin path.
pub const QOS_ABI: u32 = 1;

/// Rules that a policy may have: one bit each.
pub const RULES: usize = 64;

/// Classes that a policy may have.
pub const CLASSES: usize = 8;

/// Bytes of a name, zeros at its end included.
pub const NAME: usize = 32;

abi! {
    /// The rules that a port satisfies.
    #[derive(Default)]
    pub struct PortRules(24, align 8) {
        /// Those that name it as source or destination, whichever of the two it is.
        pub either: u64,
        /// Those that name it as source, or name no source.
        pub source: u64,
        /// Those that name it as destination, or name no destination.
        pub destination: u64,
    }
}

abi! {
    /// What a rule does.
    pub struct Action(4, align 1) {
        /// The mark it sets, 0–63; [`NONE`] for none.
        pub dscp: u8,
        /// 1 when it replaces a mark that a packet carries.
        pub overwrite: u8,
        /// Number of the class it chooses; [`NONE`] for none.
        pub class: u8,
        /// Always 0.
        pub padding: u8,
    }
}

/// No mark, no class.
pub const NONE: u8 = 0xff;

impl Action {
    /// What no rule does.
    pub const NONE: Self = Self {
        dscp: NONE,
        overwrite: 0,
        class: NONE,
        padding: 0,
    };
}

abi! {
    /// Value of `POLICY`. A bit vector has bit `n` for rule `n`; one that a packet's value does not
    /// matter to has its bit in every element of a table.
    pub struct RuleTable(1_577_888, align 8) {
        /// By IP protocol.
        pub protocols: [u64; 256],
        /// By DSCP.
        pub dscps: [u64; 64],
        /// By the bits of [`tcp`], together; 0 for what is none of them, or not TCP.
        pub tcp: [u64; 16],
        /// By payload type of RTP audio, and 128 above, of RTP video.
        pub rtp: [u64; 256],
        /// For what is not RTP.
        pub no_rtp: u64,
        /// For what has no ports: other protocols, and fragments behind the first.
        pub no_ports: u64,
        /// For ARP.
        pub arp: u64,
        /// Classes in use; 0 where packets are only marked.
        pub class_count: u32,
        /// Number of the class for what no rule gives one.
        pub default_class: u32,
        /// By rule.
        pub actions: [Action; RULES],
        /// By port.
        pub ports: [PortRules; 65_536],
    }
}

abi! {
    /// Value of `NAMES`, for those who read the counters. Zeros follow a name; an empty one is of no
    /// rule or class.
    pub struct Names(2304, align 1) {
        /// By rule.
        pub rules: [[u8; NAME]; RULES],
        /// By class.
        pub classes: [[u8; NAME]; CLASSES],
    }
}

/// Kinds of TCP segments that rules tell apart.
pub mod tcp {
    /// Opens a connection, or answers to that.
    pub const SYN: usize = 1 << 0;
    /// Resets one.
    pub const RST: usize = 1 << 1;
    /// Ends one.
    pub const FIN: usize = 1 << 2;
    /// Only acknowledges: no payload, and none of the above.
    pub const ACK: usize = 1 << 3;
}

abi! {
    /// Key of `FLOWS`: an RTP source, as far as a packet tells.
    #[derive(Default, Hash)]
    pub struct FlowKey(40, align 4) {
        /// Source address.
        pub source: Address,
        /// Destination address.
        pub destination: Address,
        /// Synchronisation source.
        pub ssrc: u32,
        /// Source port.
        pub source_port: u16,
        /// Destination port.
        pub destination_port: u16,
    }
}

/// Elements of `COUNTERS`: by rule, then by class, then [`VOICE`].
pub const COUNTERS: usize = VOICE as usize + 1;

/// Element of `COUNTERS` of a class.
#[inline(always)]
#[must_use]
pub const fn class_counter(class: u32) -> u32 {
    RULES as u32 + class
}

/// Element of `COUNTERS` of RTP audio, whatever the rules make of it.
pub const VOICE: u32 = (RULES + CLASSES) as u32;

/// `skb->priority` of a class: handle 1:10 of the first, 1:20 of the second (in hexadecimal, as `tc`
/// writes them). HTB takes a packet whose priority is the handle of a leaf class to that class
/// (htb_classify() in net/sched/sch_htb.c).
#[inline(always)]
#[must_use]
pub const fn class_id(class: u32) -> u32 {
    0x0001_0000 | (0x10 * (class + 1))
}

/// The class that a `skb->priority` names; [`CLASSES`] or above for none.
#[inline(always)]
const fn class_of(priority: u32) -> u32 {
    let minor = priority.wrapping_sub(class_id(0));
    if minor & 0xf == 0 {
        minor >> 4
    } else {
        u32::MAX
    }
}

/// What the kernel says of a packet besides its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Metadata {
    /// Packets that it will be on the wire, at least 1.
    pub packets: u64,
    /// Bytes that it will be there, as queueing disciplines count them.
    pub bytes: u64,
    /// Payload of each of these packets (`gso_size`), bytes; 0 where it is one.
    pub segment: u32,
    /// `skb->priority`.
    pub priority: u32,
}

/// The maps that change.
pub trait Tables {
    /// Whether the flow is in `FLOWS`, and so video.
    fn is_video(&self, flow: &FlowKey) -> bool;

    /// Puts a flow into `FLOWS`.
    fn note_video(&self, flow: &FlowKey);

    /// Adds to an element of `COUNTERS`.
    fn count(&self, counter: u32, packets: u64, bytes: u64);
}

/// Marks a packet and returns its `skb->priority`. One that has the priority of a class already, by
/// its socket or by the relay, keeps it; that class and the rule that would have given another are
/// counted. Where there are no classes, every packet keeps what it has.
#[inline(always)]
pub fn classify<P: Packet + ?Sized>(
    packet: &mut P,
    rules: &RuleTable,
    tables: &impl Tables,
    metadata: &Metadata,
) -> u32 {
    let seen = look(packet, rules, tables, metadata);
    let Metadata { packets, bytes, .. } = *metadata;
    let mut candidates = seen.candidates;
    let mut dscp = seen.dscp;
    let mut class = rules.default_class;
    for _ in 0..RULES {
        let matching = candidates & rules.dscps[dscp & 0x3f];
        if matching == 0 {
            break;
        }
        let rule = lowest_bit(matching) & (RULES - 1);
        tables.count(rule as u32, packets, bytes);
        let action = rules.actions[rule];
        if action.dscp != NONE && (dscp == 0 || action.overwrite != 0) {
            dscp = usize::from(action.dscp & 0x3f);
        }
        if action.class != NONE {
            class = u32::from(action.class);
            break;
        }
        candidates &= !1 << rule;
    }
    let mut priority = metadata.priority;
    if rules.class_count != 0 {
        let chosen = class_of(priority);
        if chosen < rules.class_count {
            class = chosen;
        }
        if class < CLASSES as u32 {
            tables.count(class_counter(class), packets, bytes);
        }
        priority = class_id(class);
    }
    if dscp != seen.dscp {
        // Where the header cannot be written, the packet goes as it is.
        let _ = packet.change_traffic_class(&seen.marked(dscp));
    }
    priority
}

/// Number of the lowest bit that is set, counted as the bits below it: BPF has no instruction for
/// either, but the compiler counts by arithmetic, whereas it finds a bit by a table in a section that
/// no loader knows.
#[inline(always)]
const fn lowest_bit(bits: u64) -> usize {
    let lowest = bits & bits.wrapping_neg();
    lowest.wrapping_sub(1).count_ones() as usize
}

/// What a packet is to the rules.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// Rules whose conditions all hold, but for those about DSCP.
    candidates: u64,
    dscp: usize,
    /// Offset of the IP header, bytes.
    ip: usize,
    is_v4: bool,
    /// First 16 bits of the IP header.
    word: u16,
}

impl Seen {
    /// The same header with another DSCP; the ECN bits are kept.
    #[inline(always)]
    fn marked(&self, dscp: usize) -> ClassChange {
        let (mask, dscp) = if self.is_v4 {
            (0xff03, (dscp as u16) << 2)
        } else {
            (0xf03f, (dscp as u16) << 6)
        };
        ClassChange {
            ip: self.ip,
            has_checksum: self.is_v4,
            old: self.word,
            new: self.word & mask | dscp,
        }
    }
}

/// What an IP header says.
#[derive(Clone, Copy, Default)]
struct Ip {
    /// What follows it, and its extension headers.
    protocol: u8,
    /// Offset of that, bytes.
    transport: usize,
    /// Bytes from there to the end of the IP packet.
    length: usize,
    /// 1 for a fragment behind the first, which has no transport header.
    is_later: bool,
    source: Address,
    destination: Address,
}

#[inline(always)]
fn look<P: Packet + ?Sized>(
    packet: &mut P,
    rules: &RuleTable,
    tables: &impl Tables,
    metadata: &Metadata,
) -> Seen {
    let (kind, at) = network_header(packet);
    let mut seen = Seen {
        ip: at,
        ..Seen::default()
    };
    let ip = match kind {
        ethertype::IPV4 => {
            let Ok(header) = packet.read::<Ipv4>(at) else {
                return seen;
            };
            seen.is_v4 = true;
            seen.word = u16::from(header.version_length) << 8 | u16::from(header.traffic_class);
            ipv4(packet, at, &header)
        }
        ethertype::IPV6 => {
            let Ok(header) = packet.read::<Ipv6>(at) else {
                return seen;
            };
            seen.word = header.version_class.get();
            ipv6(packet, at, &header)
        }
        ethertype::ARP => {
            seen.candidates = rules.arp;
            return seen;
        }
        _ => return seen,
    };
    seen.dscp = usize::from(if seen.is_v4 {
        seen.word >> 2
    } else {
        seen.word >> 6
    }) & 0x3f;
    seen.candidates = rules.protocols[usize::from(ip.protocol)];
    seen.candidates &= transport(packet, rules, tables, metadata, &ip);
    seen
}

/// EtherType and offset of what the link header and up to two tags announce; 0 where the frame ends
/// before.
#[inline(always)]
fn network_header<P: Packet + ?Sized>(packet: &mut P) -> (u16, usize) {
    const IP_VERSION_4: u8 = 4;
    const IP_VERSION_6: u8 = 6;
    if !packet.has_ethernet() {
        let kind = match packet.read::<[u8; 2]>(0).map(|[first, _]| first >> 4) {
            Ok(IP_VERSION_4) => ethertype::IPV4,
            Ok(IP_VERSION_6) => ethertype::IPV6,
            _ => 0,
        };
        return (kind, 0);
    }
    let Ok(ethernet) = packet.read::<Ethernet>(0) else {
        return (0, 0);
    };
    let mut kind = ethernet.ethertype.get();
    let mut at = Ethernet::LEN;
    for _ in 0..2 {
        if !matches!(kind, ethertype::VLAN | ethertype::QINQ) {
            break;
        }
        let Ok(tag) = packet.read::<Vlan>(at) else {
            return (0, 0);
        };
        kind = tag.ethertype.get();
        at += Vlan::LEN;
    }
    (kind, at)
}

#[inline(always)]
fn ipv4<P: Packet + ?Sized>(packet: &P, at: usize, header: &Ipv4) -> Ip {
    /// Fragment offset (RFC 791 section 3.1).
    const OFFSET: u16 = 0x1fff;
    let words = usize::from(header.version_length & 0xf);
    let ip_length = whole(packet, at, usize::from(header.total_length.get()));
    Ip {
        protocol: header.protocol,
        transport: at + words * 4,
        length: ip_length.saturating_sub(words * 4),
        is_later: header.fragment.get() & OFFSET != 0,
        source: Address::from_ipv4_halves(header.source),
        destination: Address::from_ipv4_halves(header.destination),
    }
}

/// Extension headers that are looked behind.
const EXTENSIONS: usize = 4;

#[inline(always)]
fn ipv6<P: Packet + ?Sized>(packet: &mut P, at: usize, header: &Ipv6) -> Ip {
    let mut ip = Ip {
        protocol: header.next_header,
        transport: at + Ipv6::LEN,
        length: 0,
        is_later: false,
        source: Address::from_halves(header.source),
        destination: Address::from_halves(header.destination),
    };
    for _ in 0..EXTENSIONS {
        if !is_extension(ip.protocol) || ip.is_later {
            break;
        }
        // Next header, length, and for a fragment, its offset (RFC 8200 section 4.5).
        let Ok([head, offset]) = packet.read::<[Be16; 2]>(ip.transport) else {
            break;
        };
        let [next, length] = head.get().to_be_bytes();
        ip.transport += match ip.protocol {
            protocol::FRAGMENT => {
                ip.is_later = offset.get() >> 3 != 0;
                8
            }
            // In words, less two (RFC 4302 section 2.2).
            protocol::AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        ip.protocol = next;
    }
    let payload = match usize::from(header.payload_length.get()) {
        0 => 0,
        length => Ipv6::LEN + length,
    };
    ip.length = whole(packet, at, payload).saturating_sub(ip.transport - at);
    ip
}

#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION
    )
}

/// Bytes of the IP packet at `at` that announces so many: 0 stands for more than its field can hold
/// (BIG TCP), which is the whole frame then.
#[inline(always)]
fn whole<P: Packet + ?Sized>(packet: &P, at: usize, announced: usize) -> usize {
    if announced == 0 {
        packet.length().saturating_sub(at)
    } else {
        announced
    }
}

/// The rules that agree with what the transport header says.
#[inline(always)]
fn transport<P: Packet + ?Sized>(
    packet: &mut P,
    rules: &RuleTable,
    tables: &impl Tables,
    metadata: &Metadata,
    ip: &Ip,
) -> u64 {
    let without = rules.no_ports & rules.tcp[0] & rules.no_rtp;
    if ip.is_later {
        return without;
    }
    match ip.protocol {
        protocol::TCP => {
            let Ok(header) = packet.read::<Tcp>(ip.transport) else {
                return without;
            };
            let kind = segment_kind(&header, ip.length);
            port_rules(rules, header.source, header.destination)
                & rules.tcp[bounded(kind, rules.tcp.len())]
                & rules.no_rtp
        }
        protocol::UDP => {
            let Ok(header) = packet.read::<Udp>(ip.transport) else {
                return without;
            };
            let ports = port_rules(rules, header.source, header.destination) & rules.tcp[0];
            match rtp(packet, tables, metadata, ip, &header) {
                NO_RTP => ports & rules.no_rtp,
                found => {
                    if found & VIDEO == 0 {
                        tables.count(VOICE, metadata.packets, metadata.bytes);
                    }
                    ports & rules.rtp[bounded(found, rules.rtp.len())]
                }
            }
        }
        _ => without,
    }
}

/// An index into a table of `size` elements, a power of two, in a way that the verifier understands:
/// that of Linux 6.1 knows no bounds of a number whose bytes were swapped, and the compiler would drop
/// a mask that changes nothing.
#[inline(always)]
fn bounded(index: usize, size: usize) -> usize {
    hint::black_box(index) & (size - 1)
}

#[inline(always)]
fn port_rules(rules: &RuleTable, source: Be16, destination: Be16) -> u64 {
    let of = |port: Be16| &rules.ports[bounded(usize::from(port.get()), rules.ports.len())];
    let (source, destination) = (of(source), of(destination));
    (source.either | destination.either) & source.source & destination.destination
}

/// The bits of [`tcp`] of a segment of `length` bytes, header included.
#[inline(always)]
fn segment_kind(header: &Tcp, length: usize) -> usize {
    const FIN: u16 = 0x01;
    const SYN: u16 = 0x02;
    const RST: u16 = 0x04;
    const ACK: u16 = 0x10;
    let flags = header.offset_flags.get();
    let is = |flag: u16, kind: usize| if flags & flag != 0 { kind } else { 0 };
    let opens_or_ends = is(SYN, tcp::SYN) | is(RST, tcp::RST) | is(FIN, tcp::FIN);
    let has_payload = length > usize::from(flags >> 12) * 4;
    if opens_or_ends == 0 && !has_payload {
        is(ACK, tcp::ACK)
    } else {
        opens_or_ends
    }
}

/// Set in [`rtp`]'s result for video.
const VIDEO: usize = 128;
/// [`rtp`]'s result for what is not RTP.
const NO_RTP: usize = 256;

/// Ports of protocols whose packets are encrypted from their first byte, and SIP's.
const NEVER_RTP: [u16; 4] = [1194, 4500, 5060, 5061];
/// Ports below are for servers (RFC 6335 section 6).
const FIRST_USER_PORT: u16 = 1024;
/// The longest payload of audio, bytes: 60 ms of G.711 and the header; a frame of video is longer.
const LONGEST_AUDIO: usize = 600;

/// Payload type of a datagram that looks like RTP, and [`VIDEO`] where it is; otherwise [`NO_RTP`].
///
/// By pattern, for streams that nobody has registered. Protocols that share ports with RTP differ from
/// it in their first two bits (RFC 7983 section 7), RTCP in its type (RFC 5761 section 4).
#[inline(always)]
fn rtp<P: Packet + ?Sized>(
    packet: &mut P,
    tables: &impl Tables,
    metadata: &Metadata,
    ip: &Ip,
    udp: &Udp,
) -> usize {
    let (source, destination) = (udp.source.get(), udp.destination.get());
    let never = |port: u16| port < FIRST_USER_PORT || NEVER_RTP.contains(&port);
    // RTP has the even port and RTCP the next (RFC 3550 section 11), on one side at least: a NAT may
    // have changed the other.
    if never(source) || never(destination) || source & destination & 1 != 0 {
        return NO_RTP;
    }
    let length = match metadata.segment as usize {
        0 => usize::from(udp.length.get()).saturating_sub(Udp::LEN),
        segment => segment,
    };
    let Ok(header) = packet.read::<Rtp>(ip.transport + Udp::LEN) else {
        return NO_RTP;
    };
    let sources = usize::from(header.version_count & 0xf);
    if header.version_count >> 6 != 2 || length < Rtp::LEN + sources * 4 {
        return NO_RTP;
    }
    let payload_type = usize::from(header.marker_type & 0x7f);
    // RFC 3551 section 6.
    match payload_type {
        0..=23 => payload_type,
        24..=34 => VIDEO | payload_type,
        96..=127 => {
            let flow = FlowKey {
                source: ip.source,
                destination: ip.destination,
                ssrc: u32_of(header.ssrc),
                source_port: source,
                destination_port: destination,
            };
            if tables.is_video(&flow) {
                VIDEO | payload_type
            } else if length > LONGEST_AUDIO {
                tables.note_video(&flow);
                VIDEO | payload_type
            } else {
                payload_type
            }
        }
        _ => NO_RTP,
    }
}
