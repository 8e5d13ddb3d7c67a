//! A generator and a receiver of RTP in the kernel.
//!
//! The generator is run over and over by `BPF_PROG_TEST_RUN` on frames that it may really send
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18).
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::Array,
    helpers::{bpf_ktime_get_ns, bpf_redirect},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use relay_bench_ebpf::{
    FIRST_SSRC, FRAME, Header, Received, SAMPLES, STREAMS, Seen, Sender, Stream, at, checksum, long,
};

/// Written by the benchmark.
#[btf_map]
static PLAN: Array<Stream, STREAMS> = Array::new();

#[btf_map]
static SENDER: Array<Sender, 1> = Array::new();

#[btf_map]
static RECEIVED: Array<Received, 1> = Array::new();

#[btf_map]
static SEEN: Array<Seen, STREAMS> = Array::new();

/// How often a run looks at the clock, before it leaves the waiting to the next.
const LOOKS: u32 = 32;
/// Whoever does not look at the clock for so long stands still, ns: its process waits, or another guest of the same
/// machine has the processor. A million packets a second fill a veth's ring in that time.
const STANDSTILL: u64 = 250_000;

/// The receiver looks at the clock once in so many packets: what keeps the generator from sending is not always a
/// standstill.
const SELDOM: u64 = 16;

#[inline(always)]
fn clock() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// The next packet's header, as soon as it is due, and the interface to send it on.
#[inline(always)]
fn next() -> Option<(Header, u32)> {
    let sender = SENDER.get_ptr_mut(0)?;
    // SAFETY: the benchmark does not write while the generator runs, which is in one thread.
    let sender = unsafe { &mut *sender };
    if sender.sent >= sender.end {
        return None;
    }
    let is_first_of_batch = sender.runs.checked_rem(sender.burst)? == 0;
    sender.runs += 1;
    let mut now = clock();
    let passed = now - sender.looked;
    if sender.looked != 0 && passed > STANDSTILL {
        sender.start += passed;
    }
    sender.looked = now;
    let Sender {
        sent,
        first,
        start,
        interval,
        burst,
        streams,
        interface,
        ..
    } = *sender;
    let number = sent - first;
    let of_burst = number.checked_rem(burst)?;
    if of_burst == 0 && !is_first_of_batch {
        // The rest of it would leave with the next batch only.
        return None;
    }
    let due = start + (((number - of_burst) * interval) >> 10);
    let mut looks = 1;
    while now < due {
        if looks == LOOKS {
            return None;
        }
        looks += 1;
        now = clock();
        sender.looked = now;
    }
    let turn = sent.checked_div(streams.into())?;
    let stream = PLAN.get((sent - turn * u64::from(streams)) as u32)?;
    let (sequence, timestamp) = (turn as u16, (turn as u32).wrapping_mul(SAMPLES));
    let mut header = stream.header;
    header[at::SEQUENCE] = sequence.to_be();
    header[at::TIMESTAMP] = ((timestamp >> 16) as u16).to_be();
    header[at::TIMESTAMP + 1] = (timestamp as u16).to_be();
    header[at::CHECKSUM] = checksum(stream.sum, sequence, timestamp).to_be();
    sender.sent += 1;
    sender.last = now;
    Some((header, interface))
}

/// Sends the frame that it is run on, when the next packet is due.
#[xdp]
fn send(ctx: XdpContext) -> u32 {
    let frame = ctx.data();
    if frame + FRAME > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    let Some((header, interface)) = next() else {
        return xdp_action::XDP_DROP;
    };
    // SAFETY: the bounds were checked above, and frames begin at even addresses.
    unsafe {
        *(frame as *mut Header) = header;
        bpf_redirect(interface, 0) as u32
    }
}

/// Judges what comes back, and lets everything else pass.
#[xdp]
fn receive(ctx: XdpContext) -> u32 {
    if ctx.data() + FRAME > ctx.data_end() {
        return xdp_action::XDP_PASS;
    }
    // SAFETY: the bounds were checked just above, and frames begin at even addresses.
    let header = unsafe { &*(ctx.data() as *const Header) };
    let number = long(header, at::SSRC).wrapping_sub(FIRST_SSRC);
    let (Some(stream), Some(seen), Some(received), Some(sender)) = (
        PLAN.get(number),
        SEEN.get_ptr_mut(number),
        RECEIVED.get_ptr_mut(0),
        SENDER.get_ptr_mut(0),
    ) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: one NAPI at a time receives on the interface, and on the processor of the generator; the benchmark writes in
    // between.
    let (seen, received, sender) = unsafe { (&mut *seen, &mut *received, &mut *sender) };
    if received.sent != 0 {
        received.silence = received.silence.max(sender.sent - received.sent);
    }
    received.sent = sender.sent;
    if is_right(header, stream) {
        let sequence = u16::from_be(header[at::SEQUENCE]);
        let word = &mut seen[usize::from(sequence / 64)];
        let bit = 1 << (sequence % 64);
        if *word & bit == 0 {
            received.right += 1;
            if received.right.is_multiple_of(SELDOM) {
                sender.looked = clock();
            }
        } else {
            received.twice += 1;
        }
        *word |= bit;
    } else {
        received.wrong += 1;
    }
    xdp_action::XDP_DROP
}

/// Whether addresses, ports and checksum are those with which a packet of the stream must arrive. The checksum covers
/// the RTP header; a marker may be set (Asterisk does when it begins to relay).
#[inline(always)]
fn is_right(header: &Header, stream: &Stream) -> bool {
    let sequence = u16::from_be(header[at::SEQUENCE]);
    let marker = u16::from_be(header[at::RTP]) & 0x80;
    let sum = stream.arrival_sum + u32::from(marker);
    let checksum = checksum(sum, sequence, long(header, at::TIMESTAMP));
    let mut difference = header[at::CHECKSUM] ^ checksum.to_be();
    let mut word = 0;
    while word < stream.endpoints.len() {
        difference |= header[at::ENDPOINTS + word] ^ stream.endpoints[word];
        word += 1;
    }
    difference == 0
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// As the relay's own object. No helper in use demands it.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Lets `cargo check`, clippy and rustdoc see this crate; the real build targets BPF.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
