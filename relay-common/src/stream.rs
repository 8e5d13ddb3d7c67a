//! The ABI: what the controller and the datapath share in maps.
//!
//! Numbers are in host byte order unless said otherwise, so that `bpftool map dump` reads well.
//! Padding is explicit (`IntoBytes` refuses any other), sizes are asserted, and every change of a
//! layout raises [`ABI_VERSION`], which is part of the pin path.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    checksum::Sum,
    wire::{Be16, Mac, protocol},
};

/// Version of every layout here.
pub const ABI_VERSION: u32 = 1;

/// Payload types that a stream can relay.
pub const PAYLOAD_TYPES: usize = 8;

/// Derives what every ABI type needs.
macro_rules! abi {
    ($(#[$doc:meta])* pub struct $name:ident($size:literal, align $align:literal) { $($(#[$field_doc:meta])* $visibility:vis $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C, align($align))]
        pub struct $name { $($(#[$field_doc])* $visibility $field: $type,)* }

        const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() == $align);
    };
}

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
    /// Key of `STREAMS`: where the PBX receives.
    #[derive(Default, Hash)]
    pub struct StreamKey(20, align 4) {
        /// Local address of the leg that the stream comes in on.
        pub local_address: Address,
        /// Its local UDP port.
        pub local_port: u16,
        /// Always 0.
        pub padding: [u8; 2],
    }
}

impl StreamKey {
    /// The key of a local address.
    #[inline(always)]
    #[must_use]
    pub const fn new(local_address: Address, local_port: u16) -> Self {
        Self {
            local_address,
            local_port,
            padding: [0; 2],
        }
    }
}

abi! {
    /// A payload type as it comes in and as it goes out.
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
    /// A VLAN tag to send with.
    #[derive(Default)]
    pub struct VlanTag(4, align 2) {
        /// Tag protocol identifier (0x8100 or 0x88a8).
        pub tpid: u16,
        /// VLAN identifier (12 bits).
        pub id: u16,
    }
}

abi! {
    /// How a packet reaches the remote of the leg it goes out on.
    #[derive(Default)]
    pub struct NextHop(24, align 2) {
        /// Where to: the remote's or the gateway's address.
        pub destination_mac: Mac,
        /// Where from: our own address on that link. Also the only destination that a frame of
        /// this stream may carry when it comes in.
        pub source_mac: Mac,
        /// Tags of the link, outermost first.
        pub vlans: [VlanTag; 2],
        /// How many of them count. 0: the packet keeps the tags it came with.
        pub vlan_depth: u8,
        /// 1 when the addresses are known; 0 leaves the stream with the PBX.
        pub known: u8,
        /// Largest IP packet of the link, bytes.
        pub mtu: u16,
    }
}

abi! {
    /// Value of `STREAMS`: one direction of a pair. The datapath only reads it.
    pub struct Stream(112, align 4) {
        /// The only address that may send: remote of the leg the stream comes in on.
        pub source: Address,
        /// Source address to send with: local address of the other leg.
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
        /// Relayed payload types; all others stay with the PBX.
        pub payload_types: [PayloadType; PAYLOAD_TYPES],
        /// The way out.
        pub next_hop: NextHop,
        /// Index of this stream's [`State`].
        pub slot: u32,
        /// Index of the opposite direction's [`State`].
        pub opposite_slot: u32,
        /// DSCP to send with (0–63), or [`DSCP_KEEP`].
        pub dscp: u8,
        /// Always 0.
        pub padding: [u8; 3],
    }
}

/// In [`Stream::dscp`]: keep the sender's mark.
pub const DSCP_KEEP: u8 = 0xff;

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
#[derive(Clone, Copy, Debug)]
pub struct StreamSpec {
    /// Remote of the leg that the stream comes in on.
    pub source: Endpoint,
    /// Local address of that leg: the key.
    pub local: Endpoint,
    /// Local address of the other leg.
    pub new_source: Endpoint,
    /// Remote of the other leg.
    pub new_destination: Endpoint,
    /// Unused places are [`PayloadType::UNUSED`].
    pub payload_types: [PayloadType; PAYLOAD_TYPES],
    /// The way out.
    pub next_hop: NextHop,
    /// DSCP to send with (0–63), or [`DSCP_KEEP`].
    pub dscp: u8,
    /// Index of this stream's state.
    pub slot: u32,
    /// Index of the opposite direction's state.
    pub opposite_slot: u32,
}

impl StreamSpec {
    /// Key of the stream in `STREAMS`.
    #[must_use]
    pub fn key(&self) -> StreamKey {
        StreamKey::new(self.local.address, self.local.port)
    }

    /// Value of the stream in `STREAMS`.
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
            payload_types: self.payload_types,
            next_hop: self.next_hop,
            slot: self.slot,
            opposite_slot: self.opposite_slot,
            dscp: self.dscp,
            padding: [0; 3],
        }
    }
}

abi! {
    /// Value of `STATE`: what the datapath writes of one stream, read through `mmap`.
    ///
    /// Apart from [`Stream`], because a map update replaces a value whole: counters in there would
    /// be lost whenever a MAC changes. One CPU writes at a time as long as a flow stays on its
    /// receive queue; while it moves a count can be lost, never a packet.
    #[derive(Default)]
    pub struct State(24, align 8) {
        /// One of [`mode`], set by the controller.
        pub mode: u32,
        /// Always 0.
        pub padding: u32,
        /// Packets relayed.
        pub packets: u64,
        /// Bytes relayed, whole frames without their check sequence.
        pub bytes: u64,
    }
}

/// Values of [`State::mode`].
pub mod mode {
    /// The PBX relays, the datapath passes. Zero, the content of a fresh map.
    pub const WATCHING: u32 = 0;
    /// The datapath relays.
    pub const OFFLOADED: u32 = 1;
    /// Taken back: the PBX relays.
    pub const SUSPENDED: u32 = 2;
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

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::ipv4(address.octets())
    }
}
