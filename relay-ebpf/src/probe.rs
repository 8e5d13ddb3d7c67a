//! The entry point of the self-test: whether native XDP sends. The decision is `relay_common::arp`'s.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::Array,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use relay_common::arp::{Probe, Step};
use relay_ebpf::skb::header_at;

/// Whom to ask, and how it went.
#[btf_map]
static PROBE: Array<Probe, 1> = Array::new();

/// Answers a neighbour by XDP_TX, and hears whether it answers that.
#[xdp]
fn relay_probe(ctx: XdpContext) -> u32 {
    let (Some(probe), Ok(frame)) = (
        PROBE.get_ptr_mut(0),
        header_at(ctx.data(), ctx.data_end(), 0),
    ) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: an element of an array is valid while the program runs, and other processors only count
    // in it: that one of two counts is lost changes nothing, since more than 0 is all that is asked for.
    let probe = unsafe { &mut *probe };
    match probe.step(frame) {
        Step::Send => {
            probe.sent += 1;
            xdp_action::XDP_TX
        }
        Step::Answered => {
            probe.answered += 1;
            xdp_action::XDP_PASS
        }
        Step::Pass => xdp_action::XDP_PASS,
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// GPL-compatible, as the project's license says of this object. No helper in use demands it.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Lets `cargo check`, clippy and rustdoc see this crate; the real build targets BPF.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
