//! Runs the compiled datapath instruction by instruction, to count them. No counter of the kernel tells how many BPF
//! instructions a packet takes, and the processor's are not to be had in most virtual machines.
//!
//! Knows the part of the instruction set (RFC 9669) that the compiler uses here, and refuses the rest.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya_obj::{Object, generated::bpf_insn};
use relay_common::stream::{Control, Counter, StreamKey};
use relay_tests::{fixture::Hook, program::Instruction, tables::Entry};
use relay_user::datapath::{OBJECT, names};
use zerocopy::IntoBytes as _;

/// What running a program on a packet came to.
#[derive(Debug)]
pub(crate) struct Trace {
    /// What it returned.
    pub(crate) verdict: u32,
    /// The frame afterwards. In TC without the UDP checksum's change: that is the kernel's work.
    pub(crate) frame: Vec<u8>,
    /// BPF instructions executed.
    pub(crate) instructions: u64,
    /// Calls of the kernel among them.
    pub(crate) calls: u64,
}

/// Where things lie. The packet must lie below 4 GiB: contexts hold 32-bit addresses.
const PACKET: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const CONTEXT: u64 = 0x30_0000;
/// First of the maps, one after the other in steps of the same size.
const MAPS: u64 = 0x100_0000;

const STACK_SIZE: usize = 512;

/// Kernel functions by their number (include/uapi/linux/bpf.h).
mod helper {
    pub(super) const MAP_LOOKUP_ELEM: i32 = 1;
    pub(super) const KTIME_GET_NS: i32 = 5;
    pub(super) const L4_CSUM_REPLACE: i32 = 11;
    pub(super) const REDIRECT: i32 = 23;
    pub(super) const SKB_PULL_DATA: i32 = 39;
    pub(super) const CSUM_UPDATE: i32 = 40;
    pub(super) const RINGBUF_OUTPUT: i32 = 130;
    pub(super) const KTIME_GET_COARSE_NS: i32 = 160;
}

struct Machine {
    registers: [u64; 11],
    /// Address and content.
    memory: Vec<(u64, Vec<u8>)>,
    maps: HashMap<u64, String>,
    /// The one that its maps know.
    stream: Option<Entry>,
    now: u64,
}

/// Shows a frame to a program that knows one stream, at a time (ns).
pub(crate) fn trace(hook: Hook, stream: Entry, frame: &[u8], now: u64) -> Result<Trace> {
    let mut object = Object::parse(OBJECT)?;
    let sections: HashSet<_> = object
        .functions
        .keys()
        .map(|&(section, _)| section)
        .collect();
    let maps = object.maps.clone();
    let numbered: Vec<_> = (1..).zip(&maps).collect();
    object.relocate_maps(
        numbered
            .iter()
            .map(|&(number, (name, map))| (&name[..], number, map)),
        &sections,
    )?;
    object.relocate_calls(&sections)?;
    let name = if hook == Hook::Tc {
        names::TC
    } else {
        names::XDP
    };
    let program = object
        .programs
        .get(name)
        .with_context(|| format!("no program {name}"))?;
    let program = &object.functions[&program.function_key()].instructions;

    let mut memory = memory(hook, frame);
    let mut handles = HashMap::new();
    let control = Control {
        lease: u64::MAX,
        ..Control::default()
    };
    for (number, (name, map)) in numbered {
        let handle = MAPS * number as u64;
        handles.insert(handle, name.clone());
        let content = match &name[..] {
            names::STREAMS => stream.stream.compile().as_bytes().to_vec(),
            names::STATE => stream.state.as_bytes().to_vec(),
            names::CONTROL => control.as_bytes().to_vec(),
            names::COUNTERS => vec![0; size_of::<Counter>()],
            _ => map.data().to_vec(),
        };
        memory.push((handle, content));
    }
    let machine = Machine {
        registers: [0; 11],
        memory,
        maps: handles,
        stream: Some(stream),
        now,
    };
    machine.trace(program)
}

/// Shows a frame to an XDP program that has no maps.
pub(crate) fn trace_alone(program: &[Instruction], frame: &[u8]) -> Result<Trace> {
    let program: Vec<_> = program.iter().copied().map(decoded).collect();
    let machine = Machine {
        registers: [0; 11],
        memory: memory(Hook::NativeXdp, frame),
        maps: HashMap::new(),
        stream: None,
        now: 0,
    };
    machine.trace(&program)
}

/// What every program sees: the packet first.
fn memory(hook: Hook, frame: &[u8]) -> Vec<(u64, Vec<u8>)> {
    vec![
        (PACKET, frame.to_vec()),
        (STACK, vec![0; STACK_SIZE]),
        (CONTEXT, context(hook, frame.len() as u32)),
    ]
}

fn decoded(instruction: Instruction) -> bpf_insn {
    let [code, registers, a, b, c, d, e, f] = instruction;
    bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(registers & 0x0f, registers >> 4),
        off: i16::from_le_bytes([a, b]),
        imm: i32::from_le_bytes([c, d, e, f]),
    }
}

/// `struct xdp_md` or `struct __sk_buff`.
fn context(hook: Hook, length: u32) -> Vec<u8> {
    let (size, fields) = match hook {
        Hook::NativeXdp | Hook::GenericXdp => {
            (24, vec![(0, PACKET as u32), (4, PACKET as u32 + length)])
        }
        // len, ifindex, data, data_end
        Hook::Tc => (
            192,
            vec![
                (0, length),
                (40, 1),
                (76, PACKET as u32),
                (80, PACKET as u32 + length),
            ],
        ),
    };
    let mut context = vec![0; size];
    for (at, value) in fields {
        context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    context
}

impl Machine {
    /// Runs a program on the packet.
    fn trace(mut self, program: &[bpf_insn]) -> Result<Trace> {
        self.registers[1] = CONTEXT;
        self.registers[10] = STACK + STACK_SIZE as u64;
        let (instructions, calls) = self.run(program)?;
        Ok(Trace {
            verdict: self.registers[0] as u32,
            frame: self.memory.swap_remove(0).1,
            instructions,
            calls,
        })
    }

    /// Runs to the end. Returns how many instructions that took, and how many of them were calls.
    fn run(&mut self, program: &[bpf_insn]) -> Result<(u64, u64)> {
        let (mut at, mut instructions, mut calls) = (0_usize, 0, 0);
        loop {
            let it = program.get(at).context("ran off the program")?;
            let (to, from) = (usize::from(it.dst_reg()), usize::from(it.src_reg()));
            instructions += 1;
            at += 1;
            let immediate = i64::from(it.imm) as u64;
            let operand = if it.code & 0x08 != 0 {
                self.registers[from]
            } else {
                immediate
            };
            let displaced = |base: u64| base.wrapping_add_signed(it.off.into());
            let size = [4, 2, 1, 8][usize::from(it.code >> 3 & 3)];
            match (it.code & 0x07, it.code) {
                (0, 0x18) => {
                    let next = program.get(at).context("half an instruction")?;
                    at += 1;
                    self.registers[to] = match from {
                        0 => u64::from(it.imm as u32) | u64::from(next.imm as u32) << 32,
                        // A map, or an address in one: they are numbered.
                        _ => MAPS * immediate + u64::from(next.imm as u32),
                    };
                }
                (1, code) if code & 0xe0 == 0x60 => {
                    self.registers[to] = self.load(displaced(self.registers[from]), size)?;
                }
                (2, code) if code & 0xe0 == 0x60 => {
                    self.store(displaced(self.registers[to]), size, immediate)?
                }
                (3, code) if code & 0xe0 == 0x60 => {
                    self.store(displaced(self.registers[to]), size, self.registers[from])?;
                }
                (4 | 7, code) if code & 0xf0 == 0xd0 => {
                    self.registers[to] = swapped(code, self.registers[to], it.imm)?;
                }
                // Another offset makes another instruction of the same code, from version 4 on.
                (4 | 7, code) if it.off != 0 => bail!("unknown arithmetic {code:#04x}"),
                (4, code) => {
                    let result = arithmetic(code, self.registers[to] as u32, operand as u32)?;
                    self.registers[to] = result.into();
                }
                (7, code) => self.registers[to] = arithmetic64(code, self.registers[to], operand)?,
                (5, 0x95) => return Ok((instructions, calls)),
                (5, 0x85) if from == 0 => {
                    calls += 1;
                    self.registers[0] = self.call(it.imm)?;
                }
                (5, 0x05) => at = at.wrapping_add_signed(it.off.into()),
                (class @ (5 | 6), code) => {
                    let (mut one, mut other) = (self.registers[to], operand);
                    if class == 6 {
                        // Sign-extended both keep their order, signed or not.
                        (one, other) = (one as i32 as u64, other as i32 as u64);
                    }
                    if holds(code, one, other)? {
                        at = at.wrapping_add_signed(it.off.into());
                    }
                }
                (_, code) => bail!("unknown instruction {code:#04x}"),
            }
        }
    }

    fn call(&mut self, function: i32) -> Result<u64> {
        Ok(match function {
            helper::MAP_LOOKUP_ELEM => return self.look_up(),
            helper::L4_CSUM_REPLACE | helper::SKB_PULL_DATA | helper::CSUM_UPDATE => 0,
            helper::RINGBUF_OUTPUT => 0,
            helper::KTIME_GET_NS | helper::KTIME_GET_COARSE_NS => self.now,
            // TC_ACT_REDIRECT
            helper::REDIRECT => 7,
            other => bail!("unknown kernel function {other}"),
        })
    }

    /// Address of a map's element, 0 when there is none.
    fn look_up(&mut self) -> Result<u64> {
        let [_, map, key, ..] = self.registers;
        let stream = self.stream.context("a program without maps")?.stream;
        let found = match &self.maps.get(&map).context("no map")?[..] {
            names::STREAMS => {
                let known = stream.key();
                self.bytes(key, size_of::<StreamKey>())? == known.as_bytes()
            }
            names::STATE => self.load(key, 4)? == u64::from(stream.slot),
            _ => true,
        };
        Ok(if found { map } else { 0 })
    }

    fn bytes(&mut self, address: u64, size: usize) -> Result<&mut [u8]> {
        self.memory
            .iter_mut()
            .find_map(|(base, content)| {
                let at = usize::try_from(address.checked_sub(*base)?).ok()?;
                content.get_mut(at..at.checked_add(size)?)
            })
            .ok_or_else(|| anyhow!("{size} bytes at {address:#x} are no one's"))
    }

    fn load(&mut self, address: u64, size: usize) -> Result<u64> {
        let mut value = [0; 8];
        value[..size].copy_from_slice(self.bytes(address, size)?);
        Ok(u64::from_le_bytes(value))
    }

    fn store(&mut self, address: u64, size: usize, value: u64) -> Result<()> {
        self.bytes(address, size)?
            .copy_from_slice(&value.to_le_bytes()[..size]);
        Ok(())
    }
}

fn arithmetic64(code: u8, one: u64, other: u64) -> Result<u64> {
    Ok(match code & 0xf0 {
        0x00 => one.wrapping_add(other),
        0x10 => one.wrapping_sub(other),
        0x20 => one.wrapping_mul(other),
        0x40 => one | other,
        0x50 => one & other,
        0x60 => one.wrapping_shl(other as u32),
        0x70 => one.wrapping_shr(other as u32),
        0x80 => one.wrapping_neg(),
        0xa0 => one ^ other,
        0xb0 => other,
        0xc0 => (one as i64).wrapping_shr(other as u32) as u64,
        _ => bail!("unknown arithmetic {code:#04x}"),
    })
}

fn arithmetic(code: u8, one: u32, other: u32) -> Result<u32> {
    Ok(match code & 0xf0 {
        0x60 => one.wrapping_shl(other),
        0x70 => one.wrapping_shr(other),
        0xc0 => (one as i32).wrapping_shr(other) as u32,
        _ => arithmetic64(code, one.into(), other.into())? as u32,
    })
}

/// Byte order conversions of a little-endian machine.
fn swapped(code: u8, value: u64, bits: i32) -> Result<u64> {
    ensure!(
        matches!(code, 0xd4 | 0xdc | 0xd7),
        "unknown byte swap {code:#04x}"
    );
    let kept = code == 0xd4;
    Ok(match bits {
        16 if kept => u64::from(value as u16),
        32 if kept => u64::from(value as u32),
        16 => u64::from((value as u16).swap_bytes()),
        32 => u64::from((value as u32).swap_bytes()),
        64 if kept => value,
        64 => value.swap_bytes(),
        _ => bail!("byte swap of {bits} bits"),
    })
}

fn holds(code: u8, one: u64, other: u64) -> Result<bool> {
    let (signed, other_signed) = (one as i64, other as i64);
    Ok(match code & 0xf0 {
        0x10 => one == other,
        0x20 => one > other,
        0x30 => one >= other,
        0x40 => one & other != 0,
        0x50 => one != other,
        0x60 => signed > other_signed,
        0x70 => signed >= other_signed,
        0xa0 => one < other,
        0xb0 => one <= other,
        0xc0 => signed < other_signed,
        0xd0 => signed <= other_signed,
        _ => bail!("unknown jump {code:#04x}"),
    })
}
