//! The entry points in the kernel. All decisions are `relay-common`'s; here are only the ways to
//! reach a packet, the maps, and what a verdict is called in each hook.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(feature = "log")]
mod log;

use core::{mem::offset_of, slice};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_RB_NO_WAKEUP, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf},
    helpers::{
        bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_redirect,
        bpf_xdp_load_bytes,
    },
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use relay_common::{
    capture::{Captured, Kept, SNAP_MAX},
    checksum::PartialChecksum,
    packet::{Header, Packet, Tables},
    proof::observe,
    reason::{Reason, Verdict},
    relay::relay,
    stream::{Control, Counter, DscpMap, Event, State, Stream, StreamKey},
};
use relay_ebpf::skb::{Skb, header_at, snapped};

/// Entries of `STREAMS` and `STATE` before the controller sets its `--max-streams`.
const MAX_STREAMS: usize = 65_536;

/// Streams by the addresses of the PBX. Written by the controller.
#[btf_map]
static STREAMS: HashMap<StreamKey, Stream, MAX_STREAMS> = HashMap::new();

/// What happened to each stream, by slot. The controller reads it through `mmap`.
#[btf_map]
static STATE: Array<State, MAX_STREAMS, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Packets and bytes by [`Reason`].
#[btf_map]
static COUNTERS: PerCpuArray<Counter, { Reason::COUNT }> = PerCpuArray::new();

/// What the sender's mark is translated to, where streams ask for it. Written by the controller.
#[btf_map]
static DSCP_MAP: Array<DscpMap, 1> = Array::new();

/// Until when anything is relayed, and what is captured. Written through `mmap`, by the controller and by the
/// process that captures.
#[btf_map]
static CONTROL: Array<Control, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Bytes of `EVENTS`, a power of two and of pages: 1,365 events of 48 bytes with their headers.
const EVENT_BYTES: usize = 65_536;

/// Rare facts for the controller.
#[btf_map]
static EVENTS: RingBuf<Event, EVENT_BYTES> = RingBuf::new();

/// The packet that is being looked at, where it is captured. All programs here run with softirqs off, and
/// so one at a time on a CPU.
#[btf_map]
static KEPT: PerCpuArray<Kept, 1> = PerCpuArray::new();

/// Bytes of `CAPTURED`, a power of two and of pages: 4,096 packets of G.711.
const CAPTURED_BYTES: usize = 1 << 20;

/// Captured packets, each behind its header.
#[btf_map]
static CAPTURED: RingBuf<Captured, CAPTURED_BYTES> = RingBuf::new();

/// 0 where the kernel has no bpf_xdp_load_bytes(), which a program must not even name then: Linux 5.18.
/// Nothing is captured in XDP there.
#[unsafe(no_mangle)]
static LOAD_BYTES: Global<u8> = Global::new(1);

/// 1 where XDP runs generic, on a socket buffer that keeps the note of an unfinished checksum.
#[unsafe(no_mangle)]
static GENERIC: Global<u8> = Global::new(0);

struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn stream(&self, key: &StreamKey) -> Option<&Stream> {
        // SAFETY: shared memory of the kernel, valid while the program runs. The kernel reuses an
        // element at once when the controller removes or replaces it, so two changes within the
        // microsecond of one run may show half of one stream and half of another. A receiver's
        // checksum rejects what that yields, unless the sender uses none.
        unsafe { STREAMS.get(key) }
    }

    #[inline(always)]
    fn state(&self, slot: u32) -> Option<*mut State> {
        STATE.get_ptr_mut(slot)
    }

    #[inline(always)]
    fn translated(&self, dscp: u8) -> u8 {
        match DSCP_MAP.get(0) {
            Some(map) => map.to[usize::from(dscp & 0x3f)] & 0x3f,
            None => dscp,
        }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // Behind by one timer tick at most, and without a read of the hardware clock.
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn now_precise(&self) -> u64 {
        // SAFETY: as above.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn report(&self, event: &Event) {
        #[cfg(feature = "log")]
        log::event(event);
        // The controller sees by `STATE` what a full ring buffer does not take.
        let _ = EVENTS.output(event, 0);
    }

    #[inline(always)]
    fn count(&self, reason: Reason, bytes: usize) {
        #[cfg(feature = "log")]
        log::reason(reason);
        if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
            // SAFETY: a per-CPU element; the program is not preempted by itself on one CPU.
            unsafe {
                (*counter).packets += 1;
                (*counter).bytes += bytes as u64;
            }
        }
    }

    #[inline(always)]
    fn control(&self) -> Option<*const Control> {
        CONTROL.get_ptr(0)
    }

    #[inline(always)]
    fn kept(&self) -> Option<*mut Kept> {
        KEPT.get_ptr_mut(0)
    }

    #[inline(always)]
    fn hand_over(&self, kept: &Kept) -> bool {
        let length = kept.length as usize;
        if length > SNAP_MAX {
            return false;
        }
        let from = (&raw const *kept).cast::<u8>();
        let length = size_of::<Captured>() + length;
        // SAFETY: within `kept`, whose bytes follow the header.
        let record = unsafe { slice::from_raw_parts(from.add(offset_of!(Kept, header)), length) };
        // The reader is not woken up, it looks at times.
        let flags = u64::from(BPF_RB_NO_WAKEUP);
        CAPTURED.output_untyped::<[u8]>(record, flags).is_ok()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }
}

struct Xdp<'a>(&'a XdpContext);

impl Packet for Xdp<'_> {
    #[inline(always)]
    fn length(&self) -> usize {
        self.0.data_end() - self.0.data()
    }

    #[inline(always)]
    fn header<H: Header>(&mut self, at: usize) -> Result<&mut H, Reason> {
        header_at(self.0.data(), self.0.data_end(), at)
    }

    #[inline(always)]
    fn partial_checksum(&self) -> PartialChecksum {
        if GENERIC.load() == 1 {
            PartialChecksum::Kept
        } else {
            PartialChecksum::Lost
        }
    }

    #[inline(always)]
    fn copy(&self, to: &mut [u8; SNAP_MAX], most: u32) -> u32 {
        if LOAD_BYTES.load() == 0 {
            return 0;
        }
        let Some(length) = snapped(self.length(), most) else {
            return 0;
        };
        // SAFETY: the helper writes `length` bytes, or fails.
        match unsafe { bpf_xdp_load_bytes(self.0.ctx, 0, to.as_mut_ptr().cast(), length) } {
            0 => length,
            _ => 0,
        }
    }
}

/// Relay in the driver's receive path.
#[xdp]
#[inline(always)]
fn relay_xdp(ctx: XdpContext) -> u32 {
    match relay(&mut Xdp(&ctx), &Maps).verdict {
        Verdict::Send => xdp_action::XDP_TX,
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Drop => xdp_action::XDP_DROP,
    }
}

/// Longest run of headers that the relay looks at, bytes: Ethernet, two tags, IPv6, UDP, RTP with
/// 15 contributing sources and the head of an extension.
const HEADERS_MAX: u32 = 14 + 8 + 40 + 8 + 12 + 60 + 4;

/// Relay in the ingress traffic control, leaving through the interface's queueing discipline.
#[classifier]
#[inline(always)]
fn relay_tc(ctx: TcContext) -> i32 {
    // Drivers leave as little as the Ethernet header in the linear part.
    let mut packet = Skb(&ctx);
    packet.pull(ctx.len().min(HEADERS_MAX) as usize);
    match relay(&mut packet, &Maps).verdict {
        // SAFETY: the context is the kernel's, valid while the program runs.
        Verdict::Send => unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 },
        // Lets the programs behind this one have their say (TCX_NEXT has the same value).
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop => TC_ACT_SHOT,
    }
}

/// Observer of what the PBX sends, in the egress traffic control. What the relay sends by XDP does
/// not come here; what it sends by traffic control does, and is none of the PBX's.
#[classifier]
#[inline(always)]
fn relay_observe(ctx: TcContext) -> i32 {
    let mut packet = Skb(&ctx);
    if packet.came_in_here() {
        return TC_ACT_UNSPEC;
    }
    match observe(&mut packet, &Maps).map(Reason::verdict) {
        // Not TC_ACT_STOLEN: to TCX that is no verdict (tcx_action_code() in net/core/dev.c). Asterisk,
        // which does not ask for errors (IP_RECVERR), hears of neither (udp_send_skb() in
        // net/ipv4/udp.c).
        Some(Verdict::Drop) => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
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
