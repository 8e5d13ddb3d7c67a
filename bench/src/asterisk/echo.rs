//! The floor for what a relay may take: a program that sends every packet back to the phone that it came from.

use relay_tests::program::{EXIT, Instruction, set};

/// Where Asterisk's RTP ports begin in the lab; SIP is below.
const FIRST_PORT: i32 = 10_000;

const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;

/// Swaps MAC addresses, IPv4 addresses and ports of RTP (UDP to an even port), and passes the rest. Checksums stay right:
/// the same words are summed up.
pub(super) fn echo() -> Vec<Instruction> {
    const LOAD_32: u8 = 0x61;
    const LOAD_16: u8 = 0x69;
    const LOAD_8: u8 = 0x71;
    const STORE_32: u8 = 0x63;
    const STORE_16: u8 = 0x6b;
    const MOVE: u8 = 0xbf;
    const ADD_VALUE: u8 = 0x07;
    const TO_BIG_ENDIAN: u8 = 0xdc;
    const IF_GREATER: u8 = 0x2d;
    const IF_NOT_VALUE: u8 = 0x55;
    const IF_BELOW_VALUE: u8 = 0xa5;
    const IF_BITS: u8 = 0x45;
    /// Offsets in the frame.
    const ETHER_TYPE: i16 = 12;
    const VERSION: i16 = 14;
    const PROTOCOL: i16 = 23;
    const SOURCE: i16 = 26;
    const DESTINATION: i16 = 30;
    const SOURCE_PORT: i16 = 34;
    const PORT: i16 = 36;
    const END: i32 = 42;
    let swap = |load, store, one, other| {
        [
            instruction(load, 4, 2, one, 0),
            instruction(load, 5, 2, other, 0),
            instruction(store, 2, 5, one, 0),
            instruction(store, 2, 4, other, 0),
        ]
    };
    let swaps = [
        swap(LOAD_32, STORE_32, 0, 6),
        swap(LOAD_16, STORE_16, 4, 10),
        swap(LOAD_32, STORE_32, SOURCE, DESTINATION),
        swap(LOAD_16, STORE_16, SOURCE_PORT, PORT),
    ]
    .concat();
    // A frame that is something else passes: each check jumps beyond the swaps, `r0 = XDP_TX` and `exit`.
    let checks = [
        instruction(IF_GREATER, 4, 3, 0, 0),
        instruction(LOAD_16, 4, 2, ETHER_TYPE, 0),
        // 0x0800 as loaded on a little-endian machine.
        instruction(IF_NOT_VALUE, 4, 0, 0, 8),
        instruction(LOAD_8, 4, 2, VERSION, 0),
        // IPv4 without options.
        instruction(IF_NOT_VALUE, 4, 0, 0, 0x45),
        instruction(LOAD_8, 4, 2, PROTOCOL, 0),
        // UDP.
        instruction(IF_NOT_VALUE, 4, 0, 0, 17),
        instruction(LOAD_16, 4, 2, PORT, 0),
        instruction(TO_BIG_ENDIAN, 4, 0, 0, 16),
        instruction(IF_BELOW_VALUE, 4, 0, 0, FIRST_PORT),
        instruction(IF_BITS, 4, 0, 0, 1),
    ];
    let count = checks.len();
    let checks = checks.into_iter().enumerate().map(|(at, mut check)| {
        if [IF_GREATER, IF_NOT_VALUE, IF_BELOW_VALUE, IF_BITS].contains(&check[0]) {
            let distance = (count - at - 1 + swaps.len() + 2) as i16;
            check[2..4].copy_from_slice(&distance.to_le_bytes());
        }
        check
    });
    let checks: Vec<_> = checks.collect();
    // r2 = data, r3 = data_end, r4 = the end of the headers
    let begin = [
        instruction(LOAD_32, 2, 1, 0, 0),
        instruction(LOAD_32, 3, 1, 4, 0),
        instruction(MOVE, 4, 2, 0, 0),
        instruction(ADD_VALUE, 4, 0, 0, END),
    ];
    let end = [set(0, XDP_TX), EXIT, set(0, XDP_PASS), EXIT];
    [&begin, &checks[..], &swaps, &end].concat()
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    let [a, b] = offset.to_le_bytes();
    let [c, d, e, f] = immediate.to_le_bytes();
    [code, to | from << 4, a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use relay_tests::fixture::{self, Family};

    use super::*;
    use crate::interpreter::trace_alone;

    #[test]
    fn rtp_comes_back_and_the_rest_passes() {
        let mut packet = fixture::cycle(Family::V4).1;
        packet.destination.set_port(10_002);
        let frame = packet.bytes();
        let trace = trace_alone(&echo(), &frame).expect("known instructions");
        assert_eq!(trace.verdict, XDP_TX as u32);
        let parts = |frame: &[u8]| {
            [0..6, 6..12, 26..30, 30..34, 34..36, 36..38].map(|part| frame[part].to_vec())
        };
        let [a, b, c, d, e, f] = parts(&frame);
        assert_eq!(parts(&trace.frame), [b, a, d, c, f, e]);
        assert_eq!(trace.frame[38..], frame[38..]);
        for port in [5060, 10_003] {
            packet.destination.set_port(port);
            let trace = trace_alone(&echo(), &packet.bytes()).expect("known instructions");
            assert_eq!(trace.verdict, XDP_PASS as u32, "{port}");
            assert_eq!(trace.frame, packet.bytes());
        }
    }
}
