//! Random tables and packets: mostly packets of a stream of the table, or nearly so, for those reach the most code.
//! The same seed gives the same again.

use std::net::{IpAddr, SocketAddr};

use relay_common::{
    stream::{
        Address, DSCP_KEEP, DSCP_MAP, Endpoint, NextHop, PAYLOAD_TYPES, PayloadType, State,
        StreamSpec, VlanTag, opposite, ticks,
    },
    wire::Mac,
};

use crate::{
    draft::{Checksum, Draft, QINQ, UDP, VLAN, socket_address},
    fixture::{SECOND, ago},
    tables::{Entry, NOW},
};

/// A source of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Generator {
    state: u64,
}

impl Generator {
    /// Starts at a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.state;
        number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ number >> 31
    }

    /// A number below another.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    fn word(&mut self) -> u16 {
        // Carries are where checksums go wrong.
        match self.below(8) {
            0 => 0,
            1 => 0xffff,
            _ => self.next() as u16,
        }
    }

    /// True once in so many times.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn fill(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend(self.next().to_ne_bytes());
        }
        bytes.truncate(length);
        bytes
    }

    fn mac(&mut self) -> [u8; 6] {
        let [bytes @ .., _, _] = self.next().to_ne_bytes();
        bytes
    }

    fn address(&mut self, v4: bool) -> Address {
        let words: [u16; 8] = std::array::from_fn(|_| self.word());
        let mut bytes = [0; 16];
        for (pair, word) in bytes.chunks_mut(2).zip(words) {
            pair.copy_from_slice(&word.to_be_bytes());
        }
        if v4 {
            let [.., a, b, c, d] = bytes;
            Address::ipv4([a, b, c, d])
        } else {
            bytes[0] = 0x20;
            Address::ipv6(bytes)
        }
    }

    fn endpoint(&mut self, v4: bool) -> Endpoint {
        let address = self.address(v4);
        let port = self.word().max(1);
        Endpoint { address, port }
    }

    /// Up to four pairs of streams, mostly offloaded, each with a slot of its own among `slots`.
    pub fn table(&mut self, slots: u32) -> Vec<Entry> {
        (0..=self.below(4) as u32)
            .flat_map(|number| {
                let mut pair = self.pair();
                let mut first = (self.below(slots as usize / 8) as u32) * 8 + 2 * number;
                if self.one_in(40) {
                    first = slots + 2 * number;
                }
                let is_old = self.one_in(2);
                for (entry, slot) in pair.iter_mut().zip([first, opposite(first)]) {
                    entry.stream.slot = slot;
                    match self.below(12) {
                        0 => entry.state.proven = 0,
                        1 => entry.state.suspended = entry.state.epoch,
                        2 => entry.state.epoch = 0,
                        _ => {}
                    }
                    if is_old {
                        self.grow_old(entry);
                    }
                }
                pair
            })
            .collect()
    }

    /// Both directions of a call, as [`Self::entry`]. Now and then the PBX sends from elsewhere than it receives.
    fn pair(&mut self) -> [Entry; 2] {
        let [mut one, mut other] = [self.entry(), self.entry()];
        let v4 = one.stream.source.address.is_mapped();
        other.stream = StreamSpec {
            source: one.stream.new_destination,
            local: one.stream.new_source,
            sends_from: one.stream.new_source,
            new_source: one.stream.local,
            new_destination: one.stream.source,
            pair: one.stream.pair,
            is_ami: one.stream.is_ami,
            ..other.stream
        };
        if self.one_in(8) {
            other.stream.local = self.endpoint(v4);
        }
        if self.one_in(8) {
            one.stream.sends_from = self.endpoint(v4);
            other.stream.new_source = one.stream.sends_from;
        }
        [one, other]
    }

    /// Has a stream proven on the wire, with anything that may have happened to it by now. Its times are so far from
    /// what matters that it does not matter when exactly a packet comes.
    fn grow_old(&mut self, entry: &mut Entry) {
        let (stream, state) = (&mut entry.stream, &mut entry.state);
        stream.proof = self.pick(&[1, 2, 8, 255]);
        stream.keepalive = self.pick(&[0, u16::MAX]);
        let mut before = |times: &[u64]| match self.pick(times) {
            0 => 0,
            time => ago(time * SECOND),
        };
        state.last_seen = before(&[0, 0, 5]);
        state.last_passed = before(&[1, 100, 9900]);
        state.last_rtcp = before(&[0, 1, 9900]);
        if self.one_in(8) {
            state.last_seen = ticks(NOW);
        }
        state.noted = self.pick(&[0, 3, 8, u32::MAX, u32::MAX - 6]);
        state.echoed = state.noted;
        if self.one_in(8) {
            state.echoed = self.next() as u32;
        }
        state.answered = self.pick(&[0, state.echoed]);
        state.unanswered = self.pick(&[0, 0, 7, 8, 9]);
        state.watched = self.pick(&[state.epoch, state.epoch, 0]);
        if state.proven == 0 && self.one_in(2) {
            state.payload_types[2..].fill(PayloadType::UNUSED);
        }
    }

    /// Until when streams are relayed, ns: mostly for ever.
    pub fn lease(&mut self) -> u64 {
        if self.one_in(30) { 1 } else { u64::MAX }
    }

    /// What the PBX makes of a packet of one of the table's streams: mostly the same for its other leg.
    pub fn forwarded(&mut self, packet: &Draft, entry: &Entry) -> Vec<u8> {
        let Entry { stream, state } = entry;
        let mut out = Draft {
            destination_mac: stream.next_hop.destination_mac.bytes,
            source_mac: stream.next_hop.source_mac.bytes,
            source: socket_address(stream.new_source),
            destination: socket_address(stream.new_destination),
            hop_limit: 64,
            ..packet.clone()
        };
        let known = state
            .payload_types
            .iter()
            .find(|known| known.from == packet.payload[1] & 0x7f);
        if let Some(known) = known {
            out.payload[1] = packet.payload[1] & 0x80 | known.to;
        }
        match self.below(16) {
            0 => out.payload[1] ^= 0x80,
            1 => out.payload[1] ^= 1,
            2 => {
                let at = self.below(out.payload.len());
                out.payload[at] ^= 0x10;
            }
            3 => out.payload.truncate(13),
            4 => {
                out.payload.truncate(13);
                out.payload[1] = self.pick(&[13, 13 | 0x80, 14]);
                out.payload[0] = 0x80;
            }
            5 => self.disturb(&mut out.destination),
            6 => out.destination.set_port(out.destination.port() ^ 1),
            7 => self.disturb(&mut out.source),
            8 => out.payload[1] = self.pick(&[200, 201, 0]),
            9 => {
                let mut frame = out.bytes();
                self.damage(&mut frame, &out);
                return frame;
            }
            _ => {}
        }
        out.bytes()
    }

    /// An offloaded stream that can relay packets of some size, unproven. Its slot is 0.
    pub fn entry(&mut self) -> Entry {
        let v4 = self.one_in(2);
        let mut payload_types = [PayloadType::UNUSED; PAYLOAD_TYPES];
        // With a marker, 64 to 95 are RTCP's.
        let first = self.pick(&[0, 8, 50, 96, 101]);
        for number in 0..=self.below(PAYLOAD_TYPES) as u8 {
            // At any place in the table, and different from each other.
            let place = self.below(PAYLOAD_TYPES);
            let to = self.byte() % 128;
            let from = first + number;
            payload_types[place] = PayloadType { from, to };
        }
        let vlan_depth = self.pick(&[0, 0, 0, 1, 2]);
        let mut vlans = [VlanTag::default(); 2];
        for vlan in &mut vlans[..vlan_depth] {
            let tpid = self.pick(&[VLAN, QINQ]);
            let id = self.word() & 0xfff;
            *vlan = VlanTag::new(tpid, id);
        }
        let is_known = !self.one_in(20);
        let mtu = self.pick(&[1500, 1500, 1500, 9000, 300]);
        let local = self.endpoint(v4);
        let stream = StreamSpec {
            source: self.endpoint(v4),
            local,
            sends_from: local,
            new_source: self.endpoint(v4),
            new_destination: self.endpoint(v4),
            next_hop: NextHop {
                destination_mac: Mac { bytes: self.mac() },
                source_mac: Mac { bytes: self.mac() },
                vlans,
                mtu: if is_known { mtu } else { 0 },
            },
            dscp: self.pick(&[DSCP_KEEP, DSCP_MAP, 46, 46, 0, 63]),
            slot: 0,
            keepalive: 0,
            pair: self.next() as u32,
            is_ami: self.one_in(2),
            proof: 0,
            priority: 0,
            own_priority: false,
        };
        let state = State {
            epoch: 1,
            proven: 1,
            watched: 1,
            ssrc: self.next() as u32,
            payload_types,
            ..State::default()
        };
        Entry { stream, state }
    }

    /// A packet that the stream relays if it is offloaded, its next hop is known, and the checksum is not
    /// [`Draft::ambiguous`].
    pub fn packet_of(&mut self, entry: &Entry) -> Draft {
        let stream = &entry.stream;
        let depth = match stream.next_hop.vlan_depth() {
            0 => self.below(3),
            depth => depth,
        };
        let mut tags = Vec::new();
        for _ in 0..depth {
            tags.push((self.pick(&[VLAN, QINQ]), self.word()));
        }
        let destination = socket_address(stream.local);
        let mut draft = Draft {
            destination_mac: stream.next_hop.source_mac.bytes,
            source_mac: self.mac(),
            tags,
            source: socket_address(stream.source),
            destination,
            traffic_class: self.byte(),
            hop_limit: self.byte().max(2),
            identification: self.word(),
            fragment: self.pick(&[0, 0x4000]),
            options: vec![],
            protocol: UDP,
            checksum: self.pick(&[Checksum::Finished, Checksum::Finished, Checksum::Unfinished]),
            payload: self.rtp(&entry.state),
            trailer: vec![],
        };
        if destination.is_ipv4() && self.one_in(6) {
            draft.checksum = Checksum::Absent;
        }
        if self.one_in(6) {
            let length = self.below(50);
            draft.trailer = self.fill(length);
        }
        // The last bytes are voice, then: no extension stands there.
        let plain = draft.payload[0] & 0x10 == 0 && draft.payload.len() >= 14;
        if plain && draft.payload.len().is_multiple_of(2) && self.one_in(20) {
            draft.checksum = Checksum::Finished;
            let field = self.word().max(1);
            draft = match self.below(2) {
                0 => draft.made_ambiguous(),
                _ => draft.with_checksum(field),
            };
        }
        draft
    }

    fn rtp(&mut self, state: &State) -> Vec<u8> {
        let sources = if self.one_in(4) { self.below(16) } else { 0 };
        let extension = self.one_in(4).then(|| self.below(8));
        // Fits the smallest MTU of a stream.
        let voice = match self.below(4) {
            0 => self.below(8),
            1 => self.below(80),
            _ => 100,
        };
        let known: Vec<_> = state
            .payload_types
            .iter()
            .filter(|entry| **entry != PayloadType::UNUSED)
            .collect();
        let payload_type = match known.len() {
            0 => self.byte() % 64,
            several => known[self.below(several)].from,
        };
        let head = 12 + sources * 4;
        let length = head + extension.map_or(0, |words| 4 + words * 4) + voice;
        let mut packet = self.fill(length);
        packet[0] = 0x80 | sources as u8;
        packet[1] = packet[1] & 0x80 | payload_type;
        packet[8..12].copy_from_slice(&state.ssrc.to_be_bytes());
        if let Some(words) = extension {
            packet[0] |= 0x10;
            packet[head + 2..head + 4].copy_from_slice(&(words as u16).to_be_bytes());
        }
        packet
    }

    /// A frame that meets the table: a packet of one of its streams, the same with a few fields changed or bytes
    /// damaged, or noise.
    pub fn frame(&mut self, table: &[Entry]) -> Vec<u8> {
        self.exchange(table).swap_remove(0)
    }

    /// The same, and where it is a packet of a stream, mostly what the PBX makes of it.
    pub fn exchange(&mut self, table: &[Entry]) -> Vec<Vec<u8>> {
        if table.is_empty() || self.one_in(50) {
            let length = 14 + self.below(120);
            return vec![self.fill(length)];
        }
        let entry = self.pick(table);
        let mut draft = self.packet_of(&entry);
        if self.one_in(2) {
            let mut frames = vec![draft.bytes()];
            if !self.one_in(8) {
                frames.push(self.forwarded(&draft, &entry));
            }
            return frames;
        }
        for _ in 0..=self.below(2) {
            self.change(&mut draft, table);
        }
        let mut frame = draft.bytes();
        if self.one_in(3) {
            for _ in 0..=self.below(3) {
                self.damage(&mut frame, &draft);
            }
        }
        vec![frame]
    }

    /// Changes a field, lengths and checksums following.
    fn change(&mut self, draft: &mut Draft, table: &[Entry]) {
        match self.below(18) {
            0 => draft.hop_limit = self.byte() % 3,
            1 => draft.payload[1] = self.byte(),
            2 => draft.payload[0] = self.byte(),
            3 => draft.destination_mac[self.below(6)] ^= 1,
            4 => draft.source.set_port(draft.source.port() ^ 1),
            5 => draft.destination.set_port(draft.destination.port() ^ 1),
            6 => self.disturb(&mut draft.source),
            7 => self.disturb(&mut draft.destination),
            8 => draft.protocol = self.pick(&[0, 1, 6, 17, 43, 44, 51, 58, 59, 60, 136]),
            9 => draft.fragment = self.word(),
            10 => {
                let length = 4 * self.below(11);
                draft.options = self.fill(length);
            }
            11 => draft.tags.push((self.pick(&[VLAN, QINQ]), self.word())),
            12 => drop(draft.tags.pop()),
            13 => draft.checksum = Checksum::Off(self.word()),
            14 => {
                let length = match self.below(3) {
                    0 => self.below(30),
                    1 => 1460 + self.below(30),
                    _ => 0x7f0 + self.below(20),
                };
                draft.payload.resize(length.max(2), 0x5a);
            }
            15 => {
                // RTCP.
                draft.payload[1] = 192 + self.byte() % 32;
                if self.one_in(2) {
                    draft.destination.set_port(draft.destination.port() | 1);
                }
            }
            16 if draft.payload.len() >= 12 => draft.payload[8] ^= 1,
            _ => {
                // A packet of two streams: what one checks must not be taken from the other.
                let other = self.pick(table).stream;
                if socket_address(other.source).is_ipv4() == draft.source.is_ipv4() {
                    draft.source = socket_address(other.source);
                }
            }
        }
    }

    /// Another address that differs in one bit.
    fn disturb(&mut self, address: &mut SocketAddr) {
        let bit = self.below(32);
        address.set_ip(match address.ip() {
            IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() ^ 1 << bit).into()),
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() ^ 1 << (bit * 4)).into()),
        });
    }

    /// Changes a byte, mostly in a header, or the length.
    fn damage(&mut self, frame: &mut Vec<u8>, draft: &Draft) {
        let headers = (draft.rtp() + 16).min(frame.len());
        match self.below(8) {
            0 => frame.truncate(14.max(self.below(frame.len() + 1))),
            1 => {
                let more = self.below(40);
                frame.extend(self.fill(more));
            }
            2 => {
                let at = self.below(frame.len());
                frame[at] = self.byte();
            }
            3..6 => {
                let at = self.below(headers);
                frame[at] ^= 1 << self.below(8);
            }
            _ => {
                let at = 12 + self.below(headers - 12);
                frame[at] = self.pick(&[0, 1, 0x45, 0x60, 0x7f, 0x80, 0x81, 0xff]);
            }
        }
    }
}
