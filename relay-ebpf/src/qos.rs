//! The entry points that mark and classify what leaves an interface. The decision is
//! `relay_common::classify`'s.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::{
    Global,
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::{Array, LruHashMap, PerCpuArray},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use relay_common::{
    classify::{self, FlowKey, Metadata, Names, RuleTable, Tables, classify},
    stream::Counter,
};
use relay_ebpf::skb::Skb;

/// Flows that are known for video at most: those of thousands of calls.
const MAX_FLOWS: usize = 4096;

/// The rules. Written by the controller, before the program is attached.
#[btf_map]
static POLICY: Array<RuleTable, 1> = Array::new();

/// What its rules and classes are called. Written by the controller, for those who read `COUNTERS`.
#[btf_map]
static NAMES: Array<Names, 1> = Array::new();

/// Packets and bytes by rule and by class.
#[btf_map]
static COUNTERS: PerCpuArray<Counter, { classify::COUNTERS }> = PerCpuArray::new();

/// RTP flows of dynamic payload types that are video.
#[btf_map]
static FLOWS: LruHashMap<FlowKey, u32, MAX_FLOWS> = LruHashMap::new();

/// Interface index of the IFB device that queues what comes in.
#[unsafe(no_mangle)]
static IFB: Global<u32> = Global::new(0);

struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn is_video(&self, flow: &FlowKey) -> bool {
        FLOWS.get_ptr(flow).is_some()
    }

    #[inline(always)]
    fn note_video(&self, flow: &FlowKey) {
        // It evicts the flow that was unused longest.
        let _ = FLOWS.insert(flow, 1, 0);
    }

    #[inline(always)]
    fn count(&self, counter: u32, packets: u64, bytes: u64) {
        if let Some(counter) = COUNTERS.get_ptr_mut(counter) {
            // SAFETY: a per-CPU element; the program is not preempted by itself on one CPU.
            unsafe {
                (*counter).packets += packets;
                (*counter).bytes += bytes;
            }
        }
    }
}

/// Marks and classifies, before the queueing discipline.
#[classifier]
fn relay_classify(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the kernel's, valid while the program runs.
    let metadata = unsafe {
        Metadata {
            // 0 where nothing is to be cut.
            packets: u64::from((*skb).gso_segs.max(1)),
            bytes: u64::from((*skb).wire_len),
            segment: (*skb).gso_size,
            priority: (*skb).priority,
        }
    };
    if let Some(rules) = POLICY.get(0) {
        let priority = classify(&mut Skb(&ctx), rules, &Maps, &metadata);
        // SAFETY: as above; the kernel lets this field be written.
        unsafe { (*skb).priority = priority };
    }
    // Lets the programs behind this one have their say (TCX_NEXT has the same value).
    TC_ACT_UNSPEC
}

/// Sends what comes in through an IFB device, whose queueing discipline shapes it, and which hands it
/// to the stack as if it came in only then, past this hook.
#[classifier]
fn relay_downlink(ctx: TcContext) -> i32 {
    // Not bpf_redirect(), which drops the packet when the device is gone: this says so.
    match ctx.clone_redirect(IFB.load(), 0) {
        Err(error) if error < 0 => TC_ACT_UNSPEC,
        // Queued, or dropped by the queue, which is its right. Not TC_ACT_STOLEN: to TCX that is no
        // verdict (tcx_action_code() in net/core/dev.c), and the stack would get the packet twice.
        _ => TC_ACT_SHOT,
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
