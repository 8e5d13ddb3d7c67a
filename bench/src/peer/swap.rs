//! The floor: a packet cannot be sent back with less.

use relay_tests::program::{EXIT, Instruction, instruction, set};

/// `XDP_TX` (`enum xdp_action` in include/uapi/linux/bpf.h).
pub(crate) const XDP_TX: i32 = 3;

/// Swaps the MAC addresses, if the frame has a header, and sends the packet back.
pub(crate) fn swap_macs() -> Vec<Instruction> {
    const LOAD_32: u8 = 0x61;
    const LOAD_16: u8 = 0x69;
    const STORE_32: u8 = 0x63;
    const STORE_16: u8 = 0x6b;
    vec![
        // r2 = data, r3 = data_end
        instruction(LOAD_32, 2, 1, 0, 0),
        instruction(LOAD_32, 3, 1, 4, 0),
        // r4 = r2 + 14; if r4 > r3, skip 8
        instruction(0xbf, 4, 2, 0, 0),
        instruction(0x07, 4, 0, 0, 14),
        instruction(0x2d, 4, 3, 8, 0),
        instruction(LOAD_32, 5, 2, 0, 0),
        instruction(LOAD_16, 6, 2, 4, 0),
        instruction(LOAD_32, 7, 2, 6, 0),
        instruction(LOAD_16, 8, 2, 10, 0),
        instruction(STORE_32, 2, 7, 0, 0),
        instruction(STORE_16, 2, 8, 4, 0),
        instruction(STORE_32, 2, 5, 6, 0),
        instruction(STORE_16, 2, 6, 10, 0),
        set(0, XDP_TX),
        EXIT,
    ]
}
