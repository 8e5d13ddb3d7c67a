//! RTP packets (RFC 3550, section 5.1) as the harness makes and reads them, without any code of the relay.

/// Length of the header without CSRCs and extension.
const HEADER: usize = 12;
/// 20 ms of G.711.
pub const PAYLOAD: usize = 160;
/// Marks a payload as made by [`Stamp::write`].
const MAGIC: [u8; 4] = *b"RTPh";

/// The parts of an RTP header that the harness looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rtp {
    /// Marker bit.
    pub marker: bool,
    /// Payload type (0–127).
    pub payload_type: u8,
    /// Sequence number.
    pub sequence: u16,
    /// Media timestamp.
    pub timestamp: u32,
    /// Synchronization source.
    pub ssrc: u32,
}

impl Rtp {
    /// Reads a packet of version 2 and returns its header and payload (extension and padding left in). `None` for
    /// anything else, RTCP included (RFC 5761, section 4: payload types 72–76 with the marker are RTCP).
    pub fn parse(packet: &[u8]) -> Option<(Self, &[u8])> {
        let (fixed, rest) = packet.split_first_chunk::<HEADER>()?;
        if fixed[0] >> 6 != 2 || (200..=204).contains(&fixed[1]) {
            return None;
        }
        let payload = rest.get(4 * usize::from(fixed[0] & 0x0f)..)?;
        let header = Self {
            marker: fixed[1] & 0x80 != 0,
            payload_type: fixed[1] & 0x7f,
            sequence: u16::from_be_bytes([fixed[2], fixed[3]]),
            timestamp: u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]),
            ssrc: u32::from_be_bytes([fixed[8], fixed[9], fixed[10], fixed[11]]),
        };
        Some((header, payload))
    }

    /// The packet with this header and `payload`.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::with_capacity(HEADER + payload.len());
        packet.extend([0x80, u8::from(self.marker) << 7 | self.payload_type & 0x7f]);
        packet.extend(self.sequence.to_be_bytes());
        packet.extend(self.timestamp.to_be_bytes());
        packet.extend(self.ssrc.to_be_bytes());
        packet.extend(payload);
        packet
    }
}

/// What a phone writes into each payload, so that the receiver knows whose packet it is, whichever header fields
/// were rewritten on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stamp {
    /// The phone that sent it, unique in this process.
    pub sender: u32,
    /// Counts the packets of that phone from 0.
    pub number: u64,
}

impl Stamp {
    /// The stamped payload. Every byte depends on the stamp, so damage anywhere is seen.
    pub fn write(self) -> [u8; PAYLOAD] {
        let mut payload = [0; PAYLOAD];
        payload[..4].copy_from_slice(&MAGIC);
        payload[4..8].copy_from_slice(&self.sender.to_be_bytes());
        payload[8..16].copy_from_slice(&self.number.to_be_bytes());
        let seed = self
            .number
            .wrapping_mul(31)
            .wrapping_add(u64::from(self.sender));
        for (at, byte) in payload.iter_mut().enumerate().skip(16) {
            *byte = seed.wrapping_add(at as u64).to_be_bytes()[7];
        }
        payload
    }

    /// Reads a payload back; `None` if a phone did not write exactly this.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let head = payload.first_chunk::<16>()?;
        let stamp = Self {
            sender: u32::from_be_bytes(*head[4..].first_chunk()?),
            number: u64::from_be_bytes(*head[8..].first_chunk()?),
        };
        (payload == stamp.write()).then_some(stamp)
    }
}

/// The payload of a telephone event (RFC 4733, section 2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    /// 0–9, 10 for `*`, 11 for `#`.
    pub code: u8,
    /// The key is up again.
    pub end: bool,
    /// In units of the timestamp, since the key went down.
    pub duration: u16,
}

impl Event {
    /// Volume of a digit: −10 dBm0.
    const VOLUME: u8 = 10;

    /// The payload.
    pub fn write(self) -> [u8; 4] {
        let [high, low] = self.duration.to_be_bytes();
        let flags = u8::from(self.end) << 7 | Self::VOLUME;
        [self.code, flags, high, low]
    }

    /// Reads a payload; `None` for one of another length.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let &[code, flags, high, low] = payload else {
            return None;
        };
        Some(Self {
            code,
            end: flags & 0x80 != 0,
            duration: u16::from_be_bytes([high, low]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_survives_and_damage_is_seen() {
        let stamp = Stamp {
            sender: 7,
            number: 70_000,
        };
        let mut payload = stamp.write();
        assert_eq!(Stamp::read(&payload), Some(stamp));
        for at in 0..payload.len() {
            payload[at] ^= 1;
            assert_ne!(Stamp::read(&payload), Some(stamp), "byte {at}");
            payload[at] ^= 1;
        }
    }

    #[test]
    fn header_round_trip() {
        let rtp = Rtp {
            marker: true,
            payload_type: 101,
            sequence: 65_535,
            timestamp: 4_000_000_000,
            ssrc: 0xdead_beef,
        };
        assert_eq!(
            Rtp::parse(&rtp.packet(b"voice")),
            Some((rtp, &b"voice"[..]))
        );
        assert_eq!(Rtp::parse(&[0x80; 11]), None, "shorter than a header");
        assert_eq!(Rtp::parse(&[0x40; 12]), None, "version 1");
    }
}
