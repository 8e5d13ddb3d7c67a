//! BPF programs without a library: loaded from instructions, and run on a packet by `BPF_PROG_TEST_RUN`.

use std::{
    io::{self, Error},
    mem,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::libc;

/// Program types (`enum bpf_prog_type` in include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `BPF_PROG_TYPE_SCHED_CLS`
    Tc = 3,
    /// `BPF_PROG_TYPE_XDP`
    Xdp = 6,
}

/// One BPF instruction: opcode, registers (source in the upper half), offset (16 bits), immediate (32 bits).
pub type Instruction = [u8; 8];

/// An instruction on registers `to` and `from`.
#[must_use]
pub const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    let [a, b] = offset.to_ne_bytes();
    let [c, d, e, f] = immediate.to_ne_bytes();
    [code, to | from << 4, a, b, c, d, e, f]
}

/// `rREGISTER = value`
#[must_use]
pub const fn set(register: u8, value: i32) -> Instruction {
    instruction(0xb7, register, 0, 0, value)
}

/// `exit`
pub const EXIT: Instruction = [0x95, 0, 0, 0, 0, 0, 0, 0];

/// Loads a program.
///
/// # Errors
/// The kernel's verifier refuses it.
pub fn load(kind: Kind, instructions: &[Instruction]) -> Result<OwnedFd> {
    /// The leading fields of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest as zero.
    #[repr(C)]
    struct Load {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
    }
    const BPF_PROG_LOAD: libc::c_long = 5;
    let mut load = Load {
        program_type: kind as u32,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"GPL".as_ptr().addr() as u64,
    };
    bpf_descriptor(BPF_PROG_LOAD, &mut load).context("cannot load a BPF program")
}

/// What a program made of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// What it returned.
    pub verdict: u32,
    /// Bytes of the frame afterwards.
    pub length: usize,
    /// Mean time of a run.
    pub time: Duration,
}

/// For [`test_run`]: the packet of a TC program comes with a sum over all of it (`CHECKSUM_COMPLETE` in
/// include/linux/skbuff.h), and must leave with a right one. Linux 6.17.
pub const CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Runs a program `repeat` times on a frame, every run on what the one before it left.
///
/// # Errors
/// The kernel takes the frame for none (`EINVAL`: shorter than Ethernet's header, or for TC, than the IP header that it
/// announces), or `after` has no room. `EBADMSG`: see [`CHECKSUM_COMPLETE`].
pub fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    after: &mut [u8],
    repeat: u32,
    flags: u32,
) -> io::Result<Run> {
    run(program, frame, after, repeat, flags, 0, &mut [])
}

/// Runs an XDP program `repeat` times on frames that it may send (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18). They leave
/// when it has run on `batch` of them.
///
/// # Errors
/// As [`test_run`], or a signal came.
pub fn run_live(program: BorrowedFd<'_>, frame: &[u8], repeat: u32, batch: u32) -> io::Result<()> {
    const LIVE_FRAMES: u32 = 1 << 1;
    run(program, frame, &mut [], repeat, LIVE_FRAMES, batch, &mut []).map(drop)
}

/// What a TC program is told of a packet besides its bytes, and may change (`struct __sk_buff` in
/// include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SkBuff {
    before: [u32; 8],
    /// `skb->priority`
    pub priority: u32,
    between: [u32; 31],
    /// Bytes on the wire; 0 for those of the frame.
    pub wire_len: u32,
    /// Packets that it stands for.
    pub gso_segs: u32,
    socket: u64,
    /// Payload of each of them, bytes.
    pub gso_size: u32,
    /// The kernel refuses a structure that is shorter than its own.
    after: [u32; 19],
}

/// As [`test_run`], for a TC program and what is known of the packet besides its bytes.
///
/// # Errors
/// As [`test_run`].
pub fn test_run_skb(
    program: BorrowedFd<'_>,
    frame: &[u8],
    after: &mut [u8],
    repeat: u32,
    skb: &mut SkBuff,
) -> io::Result<Run> {
    run(
        program,
        frame,
        after,
        repeat,
        0,
        0,
        std::slice::from_mut(skb),
    )
}

fn run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    after: &mut [u8],
    repeat: u32,
    flags: u32,
    batch: u32,
    context: &mut [SkBuff],
) -> io::Result<Run> {
    /// `struct { … } test` of `union bpf_attr`.
    #[repr(C)]
    struct TestRun {
        program: u32,
        verdict: u32,
        input_size: u32,
        output_size: u32,
        input: u64,
        output: u64,
        repeat: u32,
        duration: u32,
        context_input_size: u32,
        context_output_size: u32,
        context_input: u64,
        context_output: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        padding: u32,
    }
    const BPF_PROG_TEST_RUN: libc::c_long = 10;
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut run: TestRun = unsafe { mem::zeroed() };
    run.program = program.as_raw_fd().cast_unsigned();
    run.input_size = frame.len() as u32;
    run.output_size = after.len() as u32;
    run.input = frame.as_ptr().addr() as u64;
    // Without a size, the kernel takes any address for one of a buffer that is large enough.
    if !after.is_empty() {
        run.output = after.as_mut_ptr().addr() as u64;
    }
    run.repeat = repeat;
    if !context.is_empty() {
        run.context_input_size = mem::size_of_val(context) as u32;
        run.context_output_size = run.context_input_size;
        run.context_input = context.as_ptr().addr() as u64;
        run.context_output = context.as_mut_ptr().addr() as u64;
    }
    run.flags = flags;
    run.batch_size = batch;
    bpf(BPF_PROG_TEST_RUN, &mut run)?;
    Ok(Run {
        verdict: run.verdict,
        length: run.output_size as usize,
        time: Duration::from_nanos(run.duration.into()),
    })
}

/// A `bpf` command that returns a descriptor.
pub(crate) fn bpf_descriptor<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(bpf(command, attributes)?).map_err(Error::other)?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes `size_of::<T>()` bytes of `attributes`, whose pointers describe live buffers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            ptr::from_mut(attributes),
            mem::size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(Error::last_os_error());
    }
    Ok(result)
}
