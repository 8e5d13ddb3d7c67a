//! The ABI: what the controller and the datapath share in maps.
//!
//! Numbers are in host byte order unless said otherwise, so that `bpftool map dump` reads well.
//! Padding is explicit (`IntoBytes` refuses any other), sizes are asserted, and every change of a
//! layout raises [`ABI_VERSION`], which is part of the pin path.

use core::{
    hint,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::{
    abi::abi,
    capture::Capture,
    checksum::Sum,
    reception::Reception,
    wire::{Be16, Mac, Rtp, ethertype, protocol},
};

/// Version of every layout here.
pub const ABI_VERSION: u32 = 6;

/// Payload types that a stream can relay.
pub const PAYLOAD_TYPES: usize = 8;

/// Packets on their way through the PBX that can be told apart, a power of two. At 20 ms a packet,
/// the PBX may take 160 ms.
pub const NOTES: usize = 8;

abi! {
    /// An IP address of either family; IPv4 as `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2).
    #[derive(Default, Hash)]
    pub struct Address(16, align 4) {
        /// In network byte order.
        pub bytes: [u8; 16],
    }
}

/// Third word of an IPv4 address, in memory order.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Address {
    /// An IPv4 address in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn ipv4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self {
            bytes: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d],
        }
    }

    /// An IPv6 address in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn ipv6(octets: [u8; 16]) -> Self {
        Self { bytes: octets }
    }

    /// From the words of an IPv4 header.
    ///
    /// Put together in words here and below: from single bytes, the program would load, spill and
    /// store each of them.
    #[inline(always)]
    pub(crate) fn from_ipv4_halves(halves: [Be16; 2]) -> Self {
        Self::from_words([0, 0, MAPPED, zerocopy::transmute!(halves)])
    }

    /// From the words of an IPv6 header.
    #[inline(always)]
    pub(crate) fn from_halves(halves: [Be16; 8]) -> Self {
        Self::from_words(zerocopy::transmute!(halves))
    }

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Self {
        Self {
            bytes: zerocopy::transmute!(words),
        }
    }

    /// No address, as [`Address::default`]. Of zeros that it knows, the compiler would make a call of
    /// `memset`, byte by byte, and it is a key for every packet that is no stream's.
    #[inline(always)]
    pub(crate) fn unspecified() -> Self {
        Self::from_words([hint::black_box(0); 4])
    }

    /// In words of memory order.
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        zerocopy::transmute!(self.bytes)
    }

    /// In the words of an IPv6 header, taken apart one by one: copied whole from a map to a packet,
    /// which may overlap for all the compiler knows, an address would cost a call of `memmove`.
    #[inline(always)]
    pub(crate) fn halves(&self) -> [Be16; 8] {
        let [[a, b], [c, d], [e, f], [g, h]] = self.words().map(halves);
        [a, b, c, d, e, f, g, h]
    }

    /// In the words of an IPv4 header.
    #[inline(always)]
    pub(crate) fn ipv4_halves(&self) -> [Be16; 2] {
        halves(self.words()[3])
    }

    /// Whether both are the same, compared in words.
    #[inline(always)]
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let [one, other] = [self.words(), other.words()];
        one[3] == other[3] && one[2] == other[2] && one[1] == other[1] && one[0] == other[0]
    }

    /// Whether an IPv4 address is the same as the words of an IPv4 header.
    #[inline(always)]
    pub(crate) fn is_ipv4_halves(&self, halves: [Be16; 2]) -> bool {
        let other: u32 = zerocopy::transmute!(halves);
        self.words()[3] == other
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        let [one, two, three, _] = self.words();
        one == 0 && two == 0 && three == MAPPED
    }

    /// The words that a checksum covers: an IPv4 pseudo-header holds 4 bytes, and the constant
    /// prefix of a mapped address must not be added.
    fn sum(&self) -> Sum {
        let bytes = match IpAddr::from(*self) {
            IpAddr::V4(_) => &self.bytes[12..],
            IpAddr::V6(_) => &self.bytes[..],
        };
        bytes
            .as_chunks::<2>()
            .0
            .iter()
            .fold(Sum::ZERO, |sum, &word| sum.word(u16::from_be_bytes(word)))
    }
}

#[inline(always)]
fn halves(word: u32) -> [Be16; 2] {
    zerocopy::transmute!(word)
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::ipv4(v4.octets()),
            IpAddr::V6(v6) => Self::ipv6(v6.octets()),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.bytes).to_canonical()
    }
}

abi! {
    /// Key of `STREAMS`: an address of the PBX.
    #[derive(Default, Hash)]
    pub struct StreamKey(20, align 4) {
        /// Local address of the leg that the stream comes in on.
        pub local_address: Address,
        /// Its local UDP port.
        pub local_port: u16,
        /// What the PBX does there: one of [`role`].
        pub role: u16,
    }
}

impl StreamKey {
    /// The key of where the PBX receives a stream.
    #[inline(always)]
    #[must_use]
    pub const fn new(local_address: Address, local_port: u16) -> Self {
        Self {
            local_address,
            local_port,
            role: role::RECEIVES,
        }
    }

    /// The key of where it sends from, on the same leg, and does not receive.
    #[inline(always)]
    #[must_use]
    pub const fn sends(local_address: Address, local_port: u16) -> Self {
        Self {
            local_address,
            local_port,
            role: role::SENDS,
        }
    }
}

/// Values of [`StreamKey::role`].
pub mod role {
    /// It receives the stream there. It sends from there, too, but for a stream that
    /// [`SENDS_ELSEWHERE`](super::flag::SENDS_ELSEWHERE).
    pub const RECEIVES: u16 = 0;
    /// It sends from there. The value is the same as where it receives, but for the moment between two writes.
    pub const SENDS: u16 = 1;
}

abi! {
    /// A payload type as it comes in and as it goes out.
    #[derive(Default)]
    pub struct PayloadType(2, align 1) {
        /// On the leg that the stream comes in on; [`PayloadType::UNUSED`] matches none.
        pub from: u8,
        /// On the other leg.
        pub to: u8,
    }
}

impl PayloadType {
    /// An empty place in the table: no 7-bit payload type equals it.
    pub const UNUSED: Self = Self {
        from: 0xff,
        to: 0xff,
    };
}

abi! {
    /// A VLAN tag to send with; 0 for none.
    #[derive(Default)]
    pub struct VlanTag(2, align 2) {
        /// VLAN identifier (12 bits), [`VlanTag::PRESENT`], and for some, [`VlanTag::SERVICE`].
        pub tag: u16,
    }
}

impl VlanTag {
    /// There is a tag: one of VLAN 0 carries a priority (IEEE 802.1Q section 9.6).
    pub const PRESENT: u16 = 1 << 14;

    /// The tag is a service provider's (TPID 0x88a8, IEEE 802.1ad), and not a customer's (0x8100).
    pub const SERVICE: u16 = 1 << 15;

    /// A tag with a tag protocol identifier, 0x8100 or 0x88a8, and a VLAN identifier.
    #[must_use]
    pub const fn new(tpid: u16, id: u16) -> Self {
        let service = if tpid == ethertype::QINQ {
            Self::SERVICE
        } else {
            0
        };
        Self {
            tag: Self::PRESENT | service | id & VLAN_ID,
        }
    }

    /// Tag protocol identifier.
    #[inline(always)]
    #[must_use]
    pub const fn tpid(self) -> u16 {
        if self.tag & Self::SERVICE == 0 {
            ethertype::VLAN
        } else {
            ethertype::QINQ
        }
    }

    /// VLAN identifier.
    #[inline(always)]
    #[must_use]
    pub const fn id(self) -> u16 {
        self.tag & VLAN_ID
    }
}

/// The VLAN identifier in a tag (IEEE 802.1Q).
pub(crate) const VLAN_ID: u16 = 0x0fff;

abi! {
    /// How a packet reaches the remote of the leg it goes out on.
    #[derive(Default)]
    pub struct NextHop(18, align 2) {
        /// Where to: the remote's or the gateway's address.
        pub destination_mac: Mac,
        /// Where from: our own address on that link. Also the only destination that a frame of
        /// this stream may carry when it comes in.
        pub source_mac: Mac,
        /// Tags of the link, outermost first. Without any, the packet keeps those it came with.
        pub vlans: [VlanTag; 2],
        /// Largest IP packet of the link, bytes; 0 while the way is not known, which leaves the stream
        /// with the PBX.
        pub mtu: u16,
    }
}

impl NextHop {
    /// Whether the way is known.
    #[inline(always)]
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.mtu != 0
    }

    /// How many tags the link has.
    #[inline(always)]
    #[must_use]
    pub const fn vlan_depth(&self) -> usize {
        match self.vlans {
            [VlanTag { tag: 0 }, _] => 0,
            [_, VlanTag { tag: 0 }] => 1,
            _ => 2,
        }
    }
}

abi! {
    /// Value of `STREAMS`: one direction of a pair. The datapath only reads it.
    ///
    /// To the receiver it says what becomes of the packets that come in on a leg; to the observer, what
    /// may leave on the same leg.
    pub struct Stream(96, align 4) {
        /// The only address that may send: remote of the leg the stream comes in on.
        pub source: Address,
        /// Source address to send with: the address that the PBX sends from on the other leg.
        pub new_source: Address,
        /// Destination address to send to: remote of the other leg.
        pub new_destination: Address,
        /// The only port that may send.
        pub source_port: u16,
        /// Source port to send with.
        pub new_source_port: u16,
        /// Destination port to send to.
        pub new_destination_port: u16,
        /// What the new addresses add to a checksum that covers them (folded sum of `~old + new`).
        pub address_change: u16,
        /// What the new ports add to a checksum that covers them.
        pub port_change: u16,
        /// Sum of the incoming pseudo-header without its length.
        pub pseudo_header: u16,
        /// The way out.
        pub next_hop: NextHop,
        /// While the phone sends no RTCP, one packet in this time goes through the PBX, lest it
        /// hang up for want of RTP; ticks (see [`ticks`]), 0 for never.
        pub keepalive: u16,
        /// Index of this stream's [`State`]. See [`opposite`] and [`leg_of`].
        pub slot: u32,
        /// Number of the pair.
        pub pair: u32,
        /// `skb->priority` to leave with in TC mode; 0 leaves it as it is.
        pub priority: u32,
        /// DSCP to send with (0–63), [`DSCP_KEEP`] or [`DSCP_MAP`].
        pub dscp: u8,
        /// Some of [`flag`].
        pub flags: u8,
        /// Packets in a row that prove a payload type; 0 where no PBX is asked.
        pub proof: u8,
        /// Always 0.
        pub padding: u8,
    }
}

/// Slot of the opposite direction: the two streams of a pair have neighbouring ones.
#[inline(always)]
#[must_use]
pub const fn opposite(slot: u32) -> u32 {
    slot ^ 1
}

/// Which leg of its pair the stream of a slot comes in on: 0, which has the even slot, or 1.
#[inline(always)]
#[must_use]
pub const fn leg_of(slot: u32) -> u8 {
    (slot & 1) as u8
}

/// Bits of [`Stream::flags`].
pub mod flag {
    /// The pair is of Asterisk's manager interface, and not of the control socket. Only for a controller
    /// that takes the map over.
    pub const AMI: u8 = 1 << 0;
    /// The pair came with its priority, which is not what holds for every pair. Only for a controller
    /// that takes the map over.
    pub const OWN_PRIORITY: u8 = 1 << 1;
    /// On this leg the PBX sends from another address than the one it receives at: there is another
    /// entry for it (see [`role`](super::role)).
    pub const SENDS_ELSEWHERE: u8 = 1 << 2;
}

impl Stream {
    /// What the stream was made of. `key` is that of its entry where the PBX receives. Where the PBX
    /// sends from, only the opposite stream knows if that is elsewhere: [`StreamSpec::sends_from`]
    /// has no address then.
    #[must_use]
    pub fn spec(&self, key: &StreamKey) -> StreamSpec {
        let endpoint = |address, port| Endpoint { address, port };
        let local = endpoint(key.local_address, key.local_port);
        let has = |flag| self.flags & flag != 0;
        StreamSpec {
            source: endpoint(self.source, self.source_port),
            local,
            sends_from: if has(flag::SENDS_ELSEWHERE) {
                endpoint(Address::default(), 0)
            } else {
                local
            },
            new_source: endpoint(self.new_source, self.new_source_port),
            new_destination: endpoint(self.new_destination, self.new_destination_port),
            next_hop: self.next_hop,
            dscp: self.dscp,
            slot: self.slot,
            keepalive: self.keepalive,
            pair: self.pair,
            is_ami: has(flag::AMI),
            proof: self.proof,
            priority: self.priority,
            own_priority: has(flag::OWN_PRIORITY),
        }
    }
}

/// In [`Stream::dscp`]: keep the sender's mark.
pub const DSCP_KEEP: u8 = 0xff;

/// In [`Stream::dscp`]: translate the sender's mark by the [`DscpMap`].
pub const DSCP_MAP: u8 = 0xfe;

/// DSCP of voice, Expedited Forwarding (RFC 3246; RFC 4594 section 4.1).
pub const DSCP_EF: u8 = 46;

/// An address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address of either family.
    pub address: Address,
    /// UDP port.
    pub port: u16,
}

/// What a stream is made of before it is compiled into the table's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// Remote of the leg that the stream comes in on.
    pub source: Endpoint,
    /// Local address of that leg: the key.
    pub local: Endpoint,
    /// Where the PBX sends from on that leg.
    pub sends_from: Endpoint,
    /// Where the PBX sends from on the other leg.
    pub new_source: Endpoint,
    /// Remote of the other leg.
    pub new_destination: Endpoint,
    /// The way out.
    pub next_hop: NextHop,
    /// DSCP to send with (0–63), [`DSCP_KEEP`] or [`DSCP_MAP`].
    pub dscp: u8,
    /// Index of this stream's state. See [`opposite`] and [`leg_of`].
    pub slot: u32,
    /// Ticks; 0 for never.
    pub keepalive: u16,
    /// Number of the pair.
    pub pair: u32,
    /// Whether the pair is of Asterisk's manager interface, and not of the control socket.
    pub is_ami: bool,
    /// Packets in a row that prove a payload type; 0 where no PBX is asked.
    pub proof: u8,
    /// `skb->priority` to leave with in TC mode; 0 leaves it as it is.
    pub priority: u32,
    /// Whether the pair came with it.
    pub own_priority: bool,
}

impl StreamSpec {
    /// Key of the stream in `STREAMS`, where the PBX receives it.
    #[must_use]
    pub fn key(&self) -> StreamKey {
        StreamKey::new(self.local.address, self.local.port)
    }

    /// Key of its second entry, if it has one: where the PBX sends from on the leg that it comes in on.
    #[must_use]
    pub fn sends_key(&self) -> Option<StreamKey> {
        (self.sends_from != self.local)
            .then(|| StreamKey::sends(self.sends_from.address, self.sends_from.port))
    }

    /// All its entries in `STREAMS`, the one where the PBX receives last: it says whether there is another.
    pub fn entries(&self) -> impl Iterator<Item = (StreamKey, Stream)> + use<> {
        let stream = self.compile();
        let keys = self.sends_key().into_iter().chain([self.key()]);
        keys.map(move |key| (key, stream))
    }

    /// Value of its entries.
    ///
    /// A relayed packet's old addresses and ports are those of the stream, every one of them
    /// checked. What their change adds to the checksums is therefore a constant, computed here
    /// once and not for each packet.
    #[must_use]
    pub fn compile(&self) -> Stream {
        let inverse = |sum: Sum| Sum::new(!sum.fold());
        let old = self.source.address.sum().plus(self.local.address.sum());
        let new = self
            .new_source
            .address
            .sum()
            .plus(self.new_destination.address.sum());
        let ports = Sum::ZERO
            .change(self.source.port, self.new_source.port)
            .change(self.local.port, self.new_destination.port);
        let flags = [
            (flag::AMI, self.is_ami),
            (flag::OWN_PRIORITY, self.own_priority),
            (flag::SENDS_ELSEWHERE, self.sends_key().is_some()),
        ];
        let set = flags.iter().filter(|(_, is_set)| *is_set);
        Stream {
            source: self.source.address,
            new_source: self.new_source.address,
            new_destination: self.new_destination.address,
            source_port: self.source.port,
            new_source_port: self.new_source.port,
            new_destination_port: self.new_destination.port,
            address_change: inverse(old).plus(new).fold(),
            port_change: ports.fold(),
            pseudo_header: old.word(u16::from(protocol::UDP)).fold(),
            next_hop: self.next_hop,
            slot: self.slot,
            keepalive: self.keepalive,
            pair: self.pair,
            dscp: self.dscp,
            flags: set.fold(0, |flags, (flag, _)| flags | flag),
            proof: self.proof,
            padding: 0,
            priority: self.priority,
        }
    }
}

abi! {
    /// Value of `STATE`: how a stream fares, read by the controller through `mmap`.
    ///
    /// Apart from [`Stream`], because a map update replaces a value whole: counters in there would
    /// be lost whenever a MAC changes. Every field has one writer, so that none needs an atomic
    /// operation: the controller, the *receiver* (the program that relays) or the *observer* (the
    /// program that watches what the PBX sends). Of the exceptions, `suspended` only ever becomes
    /// `epoch`, and the observer strikes out a note whose packet has come. One CPU receives as long
    /// as a flow stays on its queue; while it moves a count can be lost, never a packet.
    ///
    /// Five cache lines, of which a relayed packet touches the first, with what the decision takes, and the
    /// second, with which the [`Reception`] begins.
    #[derive(Default)]
    pub struct State(320, align 8) {
        /// Controller: the round of proof that counts; 0 when the stream is taken back.
        pub epoch: u32,
        /// Observer, or the controller where no proof is asked for: `epoch` once it is proven.
        pub proven: u32,
        /// Receiver and observer: `epoch` once the PBX was seen to do something else.
        pub suspended: u32,
        /// Receiver: packets passed up whose echo is awaited, since ever.
        pub noted: u32,
        /// Observer: the number among those of the latest that came out of the PBX.
        pub echoed: u32,
        /// Receiver: synchronisation source of the last packet.
        pub ssrc: u32,
        /// Receiver: packets relayed.
        pub packets: u64,
        /// Receiver: bytes relayed, whole frames without their check sequence.
        pub bytes: u64,
        /// Receiver: ticks of the last packet that the phone sent; 0 before the first.
        pub last_seen: u32,
        /// Receiver: ticks of the last packet passed up.
        pub last_passed: u32,
        /// Observer, or the controller where no proof is asked for: what is relayed; unused places
        /// are [`PayloadType::UNUSED`].
        pub payload_types: [PayloadType; PAYLOAD_TYPES],
        /// Receiver: how the phone's packets arrive.
        pub reception: Reception,
        /// Receiver: ticks of the last RTCP that the phone sent; 0 before the first.
        pub last_rtcp: u32,
        /// Receiver: packets in a row, of proven payload types, that still await an echo.
        pub unanswered: u32,
        /// Receiver: ticks of the last report of an unexpected source or address.
        pub reported: u32,
        /// Observer: the epoch that the fields below and `payload_types` belong to.
        pub watched: u32,
        /// Observer: the payload type being proven.
        pub trial: PayloadType,
        /// Observer: packets of it that came out equal, in a row.
        pub equal: u16,
        /// Observer: packets that came out of the PBX unlike any that went in.
        pub unequal: u32,
        /// Receiver: a digest of each packet on its way through the PBX, and in the lowest byte its
        /// marker and payload type; 0 for none, as after the observer has seen it come out.
        pub notes: [u64; NOTES],
        /// Receiver: RTP header of the last packet passed up, for those who ask why nothing is
        /// proven.
        pub heard: Rtp,
        /// Observer: RTP header of the last packet of the PBX's that equals none.
        pub sent: Rtp,
        /// Receiver: bytes of RTP of the last packet passed up.
        pub heard_length: u16,
        /// Observer: bytes of RTP of the last packet of the PBX's that equals none.
        pub sent_length: u16,
        /// Observer: ticks of the last packet of a talk-back; 0 before the first.
        pub spoken: u32,
        /// Receiver: what `echoed` was when `unanswered` began.
        pub answered: u32,
        /// Observer: ticks of the last report of another address that the PBX sends from.
        pub sent_reported: u32,
    }
}

impl State {
    /// What the datapath does with the stream, while the lease holds: one of [`mode`].
    #[must_use]
    pub const fn mode(&self) -> u32 {
        mode::of(self.epoch, self.proven, self.suspended)
    }
}

/// What the datapath does with a stream.
pub mod mode {
    /// The PBX relays, the datapath collects the proof.
    pub const WATCHING: u32 = 0;
    /// The datapath relays.
    pub const OFFLOADED: u32 = 1;
    /// The PBX relays: the controller has taken the stream back, or the datapath has.
    pub const SUSPENDED: u32 = 2;

    /// By the fields of [`super::State`].
    #[inline(always)]
    #[must_use]
    pub const fn of(epoch: u32, proven: u32, suspended: u32) -> u32 {
        if epoch == 0 || suspended == epoch {
            SUSPENDED
        } else if proven == epoch {
            OFFLOADED
        } else {
            WATCHING
        }
    }
}

/// Time in ticks of 2^20 ns, about 1.05 ms, from `CLOCK_MONOTONIC_COARSE` in nanoseconds. It wraps
/// after 52 days: only differences have a meaning. A shift, where milliseconds would take a division.
#[inline(always)]
#[must_use]
pub const fn ticks(nanoseconds: u64) -> u32 {
    (nanoseconds >> 20) as u32
}

abi! {
    /// Value of `CONTROL`, one entry: what holds for all streams. The datapath only reads it.
    #[derive(Default)]
    pub struct Control(40, align 8) {
        /// Controller: the end of the lease, until when streams may be relayed: `CLOCK_MONOTONIC`, ns. It
        /// keeps pushing it forward.
        pub lease: u64,
        /// The process that captures: what.
        pub capture: Capture,
    }
}

abi! {
    /// What the ring buffer `EVENTS` carries: rare facts. The controller finds out by [`State`] what
    /// a full ring buffer did not take.
    pub struct Event(40, align 8) {
        /// `CLOCK_MONOTONIC`, ns, or up to a timer tick before.
        pub time: u64,
        /// One of [`event`].
        pub kind: u32,
        /// Index of the stream's [`State`].
        pub slot: u32,
        /// The round of proof that it belongs to.
        pub epoch: u32,
        /// As the kind says.
        pub address: Address,
        /// As the kind says.
        pub port: u16,
        /// As the kind says.
        pub payload_type: PayloadType,
    }
}

impl Event {
    /// An event at a time (ns), its other fields to be filled in.
    #[inline(always)]
    #[must_use]
    pub const fn at(time: u64) -> Self {
        Self {
            time,
            kind: 0,
            slot: 0,
            epoch: 0,
            address: Address { bytes: [0; 16] },
            port: 0,
            payload_type: PayloadType::UNUSED,
        }
    }
}

/// Values of [`Event::kind`].
pub mod event {
    /// The PBX forwards packets of `payload_type` unchanged; the stream is offloaded.
    pub const PROVEN: u32 = 0;
    /// The PBX sent RTP itself, with the payload type `payload_type.to`, to `address` and `port`.
    pub const TALK_BACK: u32 = 1;
    /// Packets passed up did not come out of the PBX.
    pub const ECHO_MISSING: u32 = 2;
    /// A packet came from `address` and `port` instead of the stream's source.
    pub const UNEXPECTED_SOURCE: u32 = 3;
    /// The phone sends to `address`, which is another than the pair's local address.
    pub const RECEIVED_AT: u32 = 4;
    /// The PBX sends to the stream's destination from `address`, which is another than assumed.
    pub const SENT_FROM: u32 = 5;
}

abi! {
    /// Value of `DSCP_MAP`, one entry: what each DSCP is translated to.
    pub struct DscpMap(64, align 1) {
        /// By the DSCP that a packet came with.
        pub to: [u8; 64],
    }
}

abi! {
    /// Value of `COUNTERS`, one per reason and CPU.
    #[derive(Default)]
    pub struct Counter(16, align 8) {
        /// Packets.
        pub packets: u64,
        /// Bytes, whole frames without their check sequence.
        pub bytes: u64,
    }
}

/// All CPUs together.
impl core::iter::Sum for Counter {
    fn sum<I: Iterator<Item = Self>>(counters: I) -> Self {
        counters.fold(Self::default(), |total, one| Self {
            packets: total.packets.wrapping_add(one.packets),
            bytes: total.bytes.wrapping_add(one.bytes),
        })
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::ipv4(address.octets())
    }
}
