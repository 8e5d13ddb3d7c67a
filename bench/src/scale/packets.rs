//! Cost of a packet, and memory, by the number of streams in the maps.
//!
//! `BPF_PROG_TEST_RUN` hands each run what the one before it left. Here each stream turns a packet into one of another
//! stream, in a ring of all streams in random order: so every run looks another stream up, wherever its entries are.

use std::{
    fs,
    hint::black_box,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use relay_common::stream::StreamSpec;
use relay_tests::{
    crowd::States,
    draft::{Checksum, Draft},
    fixture::{self, Family, Hook},
    kernel::{self, Kernel},
    namespace::Host,
    program,
    tables::Entry,
};

use super::population;
use crate::program::flowing;

/// Runs in one call: a packet of TTL 255 can be relayed that often.
const REPEAT: usize = 240;

/// Packets of a round.
const PACKETS: usize = 50 * REPEAT;

/// For how long after its last packet a stream is taken to flow: after a quarter of a second it is in doubt.
const FRESH: Duration = Duration::from_millis(200);

/// Most attempts at a round: of a thousand streams each shows 960 packets, if nothing comes in between.
const MOST_RENEWALS: usize = 100;

/// Maps with streams that pass a packet on.
pub(super) struct Ring {
    kernel: Kernel,
    /// Whose `lo` the program is attached to.
    _idle: Host,
    states: States,
    streams: u32,
    /// What each stream begins with; its times are set when it is used.
    entry: Entry,
    /// The streams, each followed by the one that it hands its packets to.
    order: Vec<u32>,
    /// Where the next packet enters.
    at: usize,
    /// Bytes of each map, as the kernel accounts for them.
    memory: Vec<(&'static str, u64)>,
    /// By how many bytes what the kernel has allocated has grown.
    grown: u64,
    pub(super) samples: Vec<f64>,
}

impl Ring {
    pub(super) fn new(streams: u32) -> Result<Self> {
        let idle = Host::new("idle")?;
        let before = allocated()?;
        let mut kernel = Kernel::load(Hook::NativeXdp, streams)?;
        idle.run(|| kernel.attach_xdp("lo"))?;
        // The lease, and nothing to capture.
        kernel.set_lease(u64::MAX)?;
        let mut order: Vec<u32> = (0..streams).collect();
        // The same order each time: rounds differ, runs do not.
        fastrand::Rng::with_seed(1).shuffle(&mut order);
        let aside: Vec<_> = order
            .extract_if(.., |stream| is_ambiguous(*stream))
            .collect();
        kernel.add(aside.into_iter().map(|stream| spec(stream, stream)))?;
        let next = |at: usize| order[(at + 1) % order.len()];
        kernel.add((0..order.len()).map(|at| spec(order[at], next(at))))?;
        let states = kernel.states()?;
        let entry = fixture::offloaded(spec(0, 0));
        for slot in 0..streams {
            states.set(slot, entry.state);
        }
        let grown = allocated()?.saturating_sub(before);
        Ok(Self {
            memory: kernel.memory()?,
            grown,
            kernel,
            _idle: idle,
            states,
            streams,
            entry,
            order,
            at: 0,
            samples: Vec::new(),
        })
    }

    pub(super) const fn streams(&self) -> u32 {
        self.streams
    }

    pub(super) fn memory(&self) -> &[(&'static str, u64)] {
        &self.memory
    }

    pub(super) const fn grown(&self) -> u64 {
        self.grown
    }

    /// Shows one round of packets to the program; returns the mean time of a run, ns.
    pub(super) fn measure(&mut self) -> Result<f64> {
        let packets = PACKETS.min(self.order.len() / REPEAT * REPEAT);
        let calls = PACKETS / REPEAT;
        let mut times = Vec::with_capacity(calls);
        for _ in 0..MOST_RENEWALS {
            let begin = Instant::now();
            self.renew(packets)?;
            for _ in 0..packets / REPEAT {
                let run = self.run()?;
                // Not what is to be measured, whatever came out: the machine did something else meanwhile.
                if begin.elapsed() > FRESH {
                    break;
                }
                times.push(run.context("not every packet was relayed")?.as_nanos() as f64);
                if times.len() == calls {
                    return Ok(times.iter().sum::<f64>() / calls as f64);
                }
            }
        }
        bail!("this machine is too busy to show {packets} packets within {FRESH:?}");
    }

    /// Has as many streams flow as packets come next, their last packet just come; then what the others last did
    /// is looked at, so that caches hold what they would if packets came of all.
    fn renew(&self, packets: usize) -> Result<()> {
        let state = flowing(&self.entry, kernel::now()?);
        for stream in self.order.iter().cycle().skip(self.at).take(packets) {
            self.states.set(*stream, state);
        }
        for slot in 0..self.streams {
            black_box(self.states.get(slot));
        }
        Ok(())
    }

    /// One call; returns the mean time of its runs, and none where one of them did not relay its packet.
    fn run(&mut self) -> Result<Option<Duration>> {
        let before = packet(self.order[self.at]);
        self.at = (self.at + REPEAT) % self.order.len();
        let mut expected = packet(self.order[self.at]);
        expected.hop_limit -= REPEAT as u8;
        let mut after = vec![0; before.ip() + before.ip_length()];
        let program = self.kernel.descriptor(Hook::NativeXdp)?;
        let run = program::test_run(program, &before.bytes(), &mut after, REPEAT as u32, 0)
            .context("BPF_PROG_TEST_RUN")?;
        // Each run takes one off the TTL, and only the right ones lead to this stream.
        Ok((after == expected.bytes()).then_some(run.time))
    }
}

/// A stream that turns its packets into those of another.
fn spec(stream: u32, next: u32) -> StreamSpec {
    let (cycle, _) = fixture::cycle(Family::V4);
    let endpoint = |address| fixture::endpoint(SocketAddr::V4(address));
    StreamSpec {
        source: endpoint(population::remote(stream)),
        local: endpoint(population::local(stream)),
        sends_from: endpoint(population::local(stream)),
        new_source: endpoint(population::remote(next)),
        new_destination: endpoint(population::local(next)),
        slot: stream,
        pair: stream / 2 + 1,
        proof: 8,
        ..cycle
    }
}

/// A packet of a stream.
fn packet(stream: u32) -> Draft {
    let (_, packet) = fixture::cycle(Family::V4);
    Draft {
        source: SocketAddr::V4(population::remote(stream)),
        destination: SocketAddr::V4(population::local(stream)),
        ..packet
    }
}

/// Whether a stream's packet passes for one whose checksum is not finished: one in 65,536 does, and the PBX gets it.
fn is_ambiguous(stream: u32) -> bool {
    let finished = packet(stream);
    let unfinished = Draft {
        checksum: Checksum::Unfinished,
        ..finished.clone()
    };
    finished.bytes() == unfinished.bytes()
}

/// What the kernel has allocated for itself in the ways that maps are allocated, bytes.
fn allocated() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("memory")?;
    let kilobytes = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.trim_start_matches(":").split_whitespace().next());
        Ok(number.with_context(|| format!("no {name}"))?.parse()?)
    };
    let mut sum = 0;
    for name in ["Slab", "VmallocUsed", "Percpu"] {
        sum += kilobytes(name)?;
    }
    Ok(sum * 1024)
}
