//! What a relayed packet asks of the kernel, each alone: no relay that measures jitter and looks its stream up can do
//! with less.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use relay_common::stream::StreamKey;
use relay_tests::program::{EXIT, Instruction, instruction, set};

use crate::peer::swap::XDP_TX;

/// One function of the kernel's.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// `bpf_ktime_get_ns`
    Clock,
    /// `bpf_map_lookup_elem` of a stream.
    Lookup(StreamKey),
}

impl Part {
    /// A program that does this and returns `XDP_TX`, or 0 where there is no such stream in `streams`.
    pub(super) fn program(self, streams: BorrowedFd<'_>) -> Vec<Instruction> {
        const CALL: u8 = 0x85;
        const KTIME_GET_NS: i32 = 5;
        const MAP_LOOKUP_ELEM: i32 = 1;
        const STORE_32: u8 = 0x62;
        const LOAD_MAP: u8 = 0x18;
        /// `BPF_PSEUDO_MAP_FD`
        const BY_DESCRIPTOR: u8 = 1;
        const KEY: i16 = size_of::<StreamKey>() as i16;
        let mut program = Vec::new();
        match self {
            Self::Clock => program.push(instruction(CALL, 0, 0, 0, KTIME_GET_NS)),
            Self::Lookup(key) => {
                let words: [i32; size_of::<StreamKey>() / 4] = zerocopy::transmute!(key);
                for (offset, word) in (-KEY..).step_by(4).zip(words) {
                    program.push(instruction(STORE_32, 10, 0, offset, word));
                }
                program.extend([
                    // r2 = r10 - KEY; r1 = the map
                    instruction(0xbf, 2, 10, 0, 0),
                    instruction(0x07, 2, 0, 0, (-KEY).into()),
                    instruction(LOAD_MAP, 1, BY_DESCRIPTOR, 0, streams.as_raw_fd()),
                    instruction(0, 0, 0, 0, 0),
                    instruction(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
                    // if r0 == 0, skip 1
                    instruction(0x15, 0, 0, 1, 0),
                ]);
            }
        }
        program.extend([set(0, XDP_TX), EXIT]);
        program
    }
}
