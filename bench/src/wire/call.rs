//! Calls, and the streams that the generator sends for them.

use std::{
    fmt,
    net::{IpAddr, SocketAddr, SocketAddrV4},
};

use relay_bench_ebpf::{FIRST_SSRC, Header, Stream, at};
use relay_tests::topology::{Direct, PBX_MAC, PBX_V4, PHONES_MAC};

/// One side of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leg {
    /// Where the relay receives.
    pub(crate) local: SocketAddrV4,
    /// Where the phone does.
    pub(crate) remote: SocketAddrV4,
}

/// Two legs, and so two streams.
pub(crate) type Call = [Leg; 2];

/// So many calls between two phones' addresses, with ports as Asterisk gives them: even, and each once.
///
/// # Panics
/// More than 1,000 do not fit.
pub(crate) fn between_phones(calls: u16) -> Vec<Call> {
    assert!(calls <= 1000, "{calls} calls have no ports");
    let leg = |call: u16, side: u8| Leg {
        local: v4(PBX_V4, 10_000 + 4 * call + 2 * u16::from(side)),
        remote: v4(Direct::phone_v4(side), 30_000 + 2 * call),
    };
    (0..calls)
        .map(|call| [leg(call, 0), leg(call, 1)])
        .collect()
}

fn v4(address: IpAddr, port: u16) -> SocketAddrV4 {
    match SocketAddr::new(address, port) {
        SocketAddr::V4(address) => address,
        SocketAddr::V6(_) => unreachable!("the topology's addresses of version 4"),
    }
}

/// How a packet comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the other leg's local address to its phone.
    Relayed,
    /// As it was sent.
    Mirrored,
}

/// The two streams of each call.
pub(crate) fn streams(calls: &[Call], way: Way) -> Vec<Stream> {
    let sides = calls
        .iter()
        .flat_map(|&[first, second]| [(first, second), (second, first)]);
    sides
        .zip(FIRST_SSRC..)
        .map(|((from, to), ssrc)| {
            let sent = endpoints(from.remote, from.local);
            let arriving = match way {
                Way::Relayed => endpoints(to.local, to.remote),
                Way::Mirrored => sent,
            };
            Stream {
                header: header(sent, ssrc),
                padding: 0,
                sum: sum(sent, ssrc),
                endpoints: words(&arriving),
                arrival_sum: sum(arriving, ssrc),
            }
        })
        .collect()
}

fn endpoints(source: SocketAddrV4, destination: SocketAddrV4) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&source.ip().octets());
    bytes[4..8].copy_from_slice(&destination.ip().octets());
    bytes[8..10].copy_from_slice(&source.port().to_be_bytes());
    bytes[10..].copy_from_slice(&destination.port().to_be_bytes());
    bytes
}

/// Bytes of the IP packet.
const IP_LENGTH: u16 = (relay_bench_ebpf::FRAME - 14) as u16;
/// Bytes of the UDP datagram.
const UDP_LENGTH: u16 = IP_LENGTH - 20;
const UDP: u8 = 17;
/// RTP of version 2, payload type 0.
const RTP: [u8; 2] = [0x80, 0];

fn header(endpoints: [u8; 12], ssrc: u32) -> Header {
    let mut header = [0; size_of::<Header>()];
    header[..6].copy_from_slice(&PBX_MAC);
    header[6..12].copy_from_slice(&PHONES_MAC);
    header[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = &mut header[14..34];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&IP_LENGTH.to_be_bytes());
    // Do not fragment.
    ip[6] = 0x40;
    ip[8] = 64;
    ip[9] = UDP;
    ip[12..].copy_from_slice(&endpoints[..8]);
    let checksum = !fold(sum_of(ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    header[2 * at::ENDPOINTS..][..12].copy_from_slice(&endpoints);
    header[38..40].copy_from_slice(&UDP_LENGTH.to_be_bytes());
    header[2 * at::RTP..][..2].copy_from_slice(&RTP);
    header[2 * at::SSRC..].copy_from_slice(&ssrc.to_be_bytes());
    words(&header)
}

/// Sum of what the UDP checksum covers, pseudo-header included, with sequence number and timestamp 0. The payload is
/// all zeros.
fn sum(endpoints: [u8; 12], ssrc: u32) -> u32 {
    let rest = [u16::from(UDP), UDP_LENGTH, UDP_LENGTH];
    let rest: u32 = rest.iter().map(|&word| u32::from(word)).sum();
    u32::from(fold(
        sum_of(&endpoints) + sum_of(&RTP) + sum_of(&ssrc.to_be_bytes()) + rest,
    ))
}

/// As words in network byte order.
fn words<const BYTES: usize, const WORDS: usize>(bytes: &[u8; BYTES]) -> [u16; WORDS] {
    std::array::from_fn(|word| u16::from_ne_bytes([bytes[2 * word], bytes[2 * word + 1]]))
}

/// Sum of the words as numbers.
fn sum_of(bytes: &[u8]) -> u32 {
    let (pairs, _) = bytes.as_chunks();
    pairs
        .iter()
        .map(|&pair| u32::from(u16::from_be_bytes(pair)))
        .sum()
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// As `relay-user add` takes it.
impl fmt::Display for Leg {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}={}", self.local, self.remote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use relay_bench_ebpf::{FRAME, checksum};
    use relay_tests::draft::Draft;

    #[test]
    fn headers_and_checksums_are_those_of_a_draft() {
        let calls = between_phones(3);
        for (number, stream) in streams(&calls, Way::Relayed).iter().enumerate() {
            let (from, to) = (
                calls[number / 2][number % 2],
                calls[number / 2][1 - number % 2],
            );
            let (sequence, timestamp) = (65_535_u16, 0x1234_5678_u32);
            let mut header = stream.header;
            header[at::SEQUENCE] = sequence.to_be();
            header[at::TIMESTAMP] = 0x1234_u16.to_be();
            header[at::TIMESTAMP + 1] = 0x5678_u16.to_be();
            header[at::CHECKSUM] = checksum(stream.sum, sequence, timestamp).to_be();
            let mut frame = header.map(u16::to_ne_bytes).concat();
            frame.resize(FRAME, 0);
            let payload = frame[42..].to_vec();
            let mut draft = Draft {
                destination_mac: PBX_MAC,
                source_mac: PHONES_MAC,
                tags: vec![],
                source: from.remote.into(),
                destination: from.local.into(),
                traffic_class: 0,
                hop_limit: 64,
                identification: 0,
                fragment: 0x4000,
                options: vec![],
                protocol: UDP,
                checksum: relay_tests::draft::Checksum::Finished,
                payload,
                trailer: vec![],
            };
            assert_eq!(frame, draft.bytes());
            (draft.source, draft.destination) = (to.local.into(), to.remote.into());
            let arriving: Header = words(draft.bytes().first_chunk::<54>().expect("a header"));
            assert_eq!(arriving[at::ENDPOINTS..][..6], stream.endpoints);
            let finished = checksum(stream.arrival_sum, sequence, timestamp);
            assert_eq!(arriving[at::CHECKSUM], finished.to_be());
        }
    }
}
