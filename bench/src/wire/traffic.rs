//! The generator and the receiver: programs in the kernel, and what starts and reads them.

use std::{
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::{Program, Xdp, XdpMode},
};
use nix::{
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use relay_bench_ebpf::{FRAME, Received, STREAMS, Seen, Sender, Stream};
use relay_tests::{link::Interface, program};

use super::cpu;

/// Without a packet for so long, none comes any more.
const SILENCE: Duration = Duration::from_millis(50);
/// Runs of the generator in one system call: whole bursts. One run looks at the clock a few dozen times, or sends a packet.
const RUNS: u32 = 20_000;
/// Packets that a veth holds for its receiver (`VETH_RING_SIZE` in drivers/net/veth.c).
const RING: u32 = 256;
/// Packets that leave together at most.
const MOST: u32 = RING / 4;
/// From the decision to send until the first packet.
const LEAD: Duration = Duration::from_millis(2);

type Map<const BYTES: usize> = Array<MapData, [u8; BYTES]>;

/// A generator and a receiver of streams on one interface.
pub(crate) struct Traffic {
    interface: Interface,
    /// Holds the programs, and the receiver attached.
    ebpf: Ebpf,
    sender: Map<{ size_of::<Sender>() }>,
    plan: Map<{ size_of::<Stream>() }>,
    received: Map<{ size_of::<Received>() }>,
    seen: Map<{ size_of::<Seen>() }>,
    streams: u32,
}

/// How packets are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    /// Packets per second, over all streams.
    pub(crate) rate: f64,
    /// Packets at once.
    pub(crate) burst: u64,
}

impl Load {
    /// One packet after the other, at even distances.
    pub(crate) const fn even(rate: f64) -> Self {
        Self { rate, burst: 1 }
    }

    /// Packets that the generator gathers before they leave. At high rates it could not keep up with single ones.
    fn batch(&self) -> u32 {
        const GATHERING: f64 = 20e-6;
        ((self.rate * GATHERING) as u32).clamp(self.burst as u32, MOST)
    }
}

/// What became of a trial.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trial {
    /// Packets.
    pub(crate) sent: u64,
    pub(crate) received: Received,
    /// From the first packet to the last, as they were sent, without the time in which the generator stood still.
    pub(crate) took: Duration,
}

impl Trial {
    /// Packets per second that were really sent.
    pub(crate) fn rate(&self) -> f64 {
        self.sent as f64 / self.took.as_secs_f64()
    }

    /// Whether every packet came as it should, once.
    pub(crate) const fn is_whole(&self) -> bool {
        let Received {
            right,
            twice,
            wrong,
            ..
        } = self.received;
        right == self.sent && twice == 0 && wrong == 0
    }

    /// Whether nothing came while more was sent than a ring holds: whoever relays stood still, which on a virtual machine
    /// may be the processor.
    pub(crate) const fn has_silence(&self) -> bool {
        self.received.silence > RING as u64
    }
}

impl Traffic {
    /// Attaches the receiver. It judges RTP of the generator's, and lets all else pass.
    ///
    /// # Errors
    /// The kernel refuses a program.
    pub(crate) fn new(interface: &Interface) -> Result<Self> {
        let mut ebpf = Ebpf::load(aya::include_bytes_aligned!(concat!(
            env!("OUT_DIR"),
            "/traffic"
        )))?;
        let generator: &mut Xdp = program_of(&mut ebpf, "send")?.try_into()?;
        generator.load()?;
        let receiver: &mut Xdp = program_of(&mut ebpf, "receive")?.try_into()?;
        receiver.load()?;
        let attached = interface
            .host
            .run(|| receiver.attach(&interface.name, XdpMode::Driver));
        attached.with_context(|| format!("receiver on {}", interface.name))?;
        Ok(Self {
            interface: interface.clone(),
            sender: map(&mut ebpf, "SENDER")?,
            plan: map(&mut ebpf, "PLAN")?,
            received: map(&mut ebpf, "RECEIVED")?,
            seen: map(&mut ebpf, "SEEN")?,
            ebpf,
            streams: 0,
        })
    }

    /// Sets what is sent, and what is to come.
    ///
    /// # Errors
    /// More streams than [`STREAMS`].
    pub(crate) fn plan(&mut self, streams: &[Stream]) -> Result<()> {
        for (number, stream) in (0..).zip(streams) {
            let stream: [u8; size_of::<Stream>()] = zerocopy::transmute!(*stream);
            let set = self.plan.set(number, stream, 0);
            set.with_context(|| format!("more than {STREAMS} streams"))?;
        }
        self.streams = streams.len() as u32;
        Ok(())
    }

    /// Streams that are sent.
    pub(crate) const fn streams(&self) -> u32 {
        self.streams
    }

    /// Sends a load for so long, on a CPU, and waits until no packet comes any more. It gives up where it takes half as long
    /// again.
    ///
    /// # Errors
    /// The kernel does not run the generator.
    pub(crate) fn run(&mut self, load: Load, duration: Duration, on: usize) -> Result<Trial> {
        self.received.set(0, [0; _], 0)?;
        for stream in 0..self.streams {
            self.seen.set(stream, [0; _], 0)?;
        }
        let first = self.sender()?.sent;
        let start = now()? + LEAD;
        let sender = Sender {
            sent: first,
            first,
            end: first + (load.rate * duration.as_secs_f64()) as u64,
            start: start.as_nanos() as u64,
            interval: (1e9 * 1024.0 / load.rate) as u64,
            burst: load.burst,
            runs: 0,
            streams: self.streams,
            interface: self.interface.index,
            looked: 0,
            last: 0,
        };
        let sender: [u8; size_of::<Sender>()] = zerocopy::transmute!(sender);
        self.sender.set(0, sender, 0)?;
        let host = self.interface.host.clone();
        host.run(|| -> Result<()> {
            cpu::pin_here(on)?;
            cpu::take_most(Pid::from_raw(0))?;
            self.send(load, start + 3 * duration / 2)
        })?;
        let Sender {
            sent, start, last, ..
        } = self.sender()?;
        let sent = sent - first;
        Ok(Trial {
            sent,
            received: self.settled(sent)?,
            took: Duration::from_nanos(last.saturating_sub(start)),
        })
    }

    /// Runs the generator until it has sent all, or is given up.
    fn send(&mut self, load: Load, deadline: Duration) -> Result<()> {
        let generator: &Xdp = self
            .ebpf
            .program("send")
            .context("no generator")?
            .try_into()?;
        loop {
            program::run_live(generator.fd()?.as_fd(), &[0; FRAME], RUNS, load.batch())
                .context("run the generator")?;
            let Sender { sent, end, .. } = self.sender()?;
            if sent == end || now()? > deadline {
                return Ok(());
            }
        }
    }

    fn sender(&self) -> Result<Sender> {
        Ok(zerocopy::transmute!(self.sender.get(&0, 0)?))
    }

    fn received(&self) -> Result<Received> {
        Ok(zerocopy::transmute!(self.received.get(&0, 0)?))
    }

    /// What has been received when nothing comes any more.
    fn settled(&self, sent: u64) -> Result<Received> {
        let mut last = self.received()?;
        let mut since = Instant::now();
        while last.right < sent && since.elapsed() < SILENCE {
            thread::sleep(Duration::from_millis(2));
            let received = self.received()?;
            if received != last {
                (last, since) = (received, Instant::now());
            }
        }
        Ok(last)
    }
}

/// The time by the clock that the generator reads.
fn now() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

fn program_of<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    ebpf.program_mut(name)
        .with_context(|| format!("no program {name}"))
}

fn map<const BYTES: usize>(ebpf: &mut Ebpf, name: &str) -> Result<Map<BYTES>> {
    let map = ebpf
        .take_map(name)
        .with_context(|| format!("no map {name}"))?;
    Ok(Array::try_from(map)?)
}
