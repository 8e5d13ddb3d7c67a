//! Suite `program`: the datapath's programs alone, on one packet over and over.
//!
//! `BPF_PROG_TEST_RUN` hands each run what the one before it left. The packets are therefore of streams that turn a
//! packet into itself, and each starts with the highest TTL that there is: enough for [`REPEAT`] runs, after which the
//! frame shows that every one of them relayed it.

use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use relay_common::{
    capture::{Capture, SNAP_MAX},
    reason::Reason,
    reception::Reception,
    stream::{Endpoint, State, StreamSpec, VlanTag, ticks},
};
use relay_tests::{
    draft::{Draft, VLAN},
    fixture::{self, Family, Hook, SLOTS},
    kernel::{self, Kernel},
    program::{self, EXIT, Kind, Run, set},
    tables::Entry,
};

use crate::{
    interpreter::{self, Trace},
    peer::swap::swap_macs,
    report::{Bound, Column, Machine, Report, Row, Spread, Table, Target},
};

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rounds; each measures every program on every packet, so that what disturbs the machine disturbs all alike
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..))]
    rounds: u32,
    /// Calls of BPF_PROG_TEST_RUN for each packet and round
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    calls: u32,
    /// The only CPU to run on
    #[arg(long, default_value_t = 0)]
    cpu: usize,
}

/// Runs in one call. A packet of TTL 255 can be relayed that often.
const REPEAT: u32 = 240;

/// `XDP_TX` (`enum xdp_action` in include/uapi/linux/bpf.h).
const XDP_TX: i32 = 3;

/// The floor that matters: a packet cannot be sent back with less.
const SWAP: &str = "swap MACs, XDP_TX";

/// What is measured: a program on a packet.
struct Case {
    name: String,
    subject: Subject,
    frame: Vec<u8>,
    /// The frame after all runs.
    after: Vec<u8>,
    samples: Vec<f64>,
}

enum Subject {
    /// One that does as little as can be.
    Floor(OwnedFd),
    /// Ours.
    Relay(Box<Relay>),
}

/// The datapath, a stream that it knows, and what it must find the packet to be.
struct Relay {
    kernel: Kernel,
    hook: Hook,
    entry: Entry,
    reason: Reason,
    /// Whether the packet is captured, as received and as sent.
    captured: bool,
}

impl Subject {
    fn descriptor(&self) -> Result<BorrowedFd<'_>> {
        match self {
            Self::Floor(program) => Ok(program.as_fd()),
            Self::Relay(relay) => relay.kernel.descriptor(relay.hook),
        }
    }
}

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut cpus = CpuSet::new();
    cpus.set(options.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)
        .with_context(|| format!("cannot run on CPU {} only", options.cpu))?;
    let mut cases = cases()?;
    for round in 0..=options.rounds {
        for case in &mut cases {
            let time = case.measure(options.calls)?;
            // The first warms caches up.
            if round > 0 {
                case.samples.push(time);
            }
        }
    }
    let times = times(&mut cases)?;
    let time = |name| times.rows.iter().find(|row| row.name == name)?.cells[0];
    let (floor, relayed) = (time(SWAP), time("XDP, relayed, IPv4"));
    let ratio = relayed.context("not measured")? / floor.context("not measured")?;
    Ok(Report {
        suite: "program".to_owned(),
        title: "The datapath's programs alone".to_owned(),
        command: "cargo xtask bench program".to_owned(),
        machine: Machine::here()?,
        method: vec![
            "`BPF_PROG_TEST_RUN` shows one packet to a program over and over: no driver, no stack. The packets are of \
             streams that turn a packet into itself, and at the end the frame and the counters must show that every \
             run did what the row says."
                .to_owned(),
            "Times are medians of rounds that measure every row once, on one processor. Instructions are those of BPF \
             that a packet executes, the calls of kernel functions among them, whose own work is not counted."
                .to_owned(),
        ],
        plots: vec![],
        targets: vec![Target {
            what: "program, relayed IPv4, ours ÷ MAC-swap floor".to_owned(),
            bound: Bound::AtMost(2.5),
            measured: ratio,
            decimals: 2,
            obstacle: None,
        }],
        tables: vec![times, programs(&cases)?],
    })
}

fn cases() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let voice = fixture::cycle(Family::V4).1.bytes();
    for (name, instructions) in [
        ("return XDP_TX", vec![set(0, XDP_TX), EXIT]),
        (SWAP, swap_macs()),
    ] {
        cases.push(Case {
            name: name.to_owned(),
            subject: Subject::Floor(program::load(Kind::Xdp, &instructions)?),
            frame: voice.clone(),
            // An even number of swaps.
            after: voice.clone(),
            samples: vec![],
        });
    }
    for hook in [Hook::NativeXdp, Hook::Tc] {
        for (name, entry, packet, reason) in packets() {
            let mut kernel = Kernel::load(hook, SLOTS)?;
            kernel.set(&[entry])?;
            let mut after = packet.clone();
            if reason == Reason::Relayed {
                after.hop_limit -= REPEAT as u8;
            }
            let hook_name = if hook == Hook::Tc { "TC" } else { "XDP" };
            cases.push(Case {
                name: format!("{hook_name}, {name}"),
                frame: packet.bytes(),
                after: after.bytes(),
                subject: Subject::Relay(Box::new(Relay {
                    kernel,
                    hook,
                    entry,
                    reason,
                    captured: false,
                })),
                samples: vec![],
            });
        }
        cases.push(captured(hook)?);
    }
    Ok(cases)
}

/// A packet that is relayed, while everything is captured whole.
fn captured(hook: Hook) -> Result<Case> {
    let (stream, packet) = fixture::cycle(Family::V4);
    let entry = fixture::offloaded(StreamSpec { proof: 8, ..stream });
    let mut kernel = Kernel::load(hook, SLOTS)?;
    kernel.set(&[entry])?;
    kernel.set_capture(Capture {
        until: u64::MAX,
        snap: SNAP_MAX as u32,
        sample: u32::MAX,
        ..Capture::default()
    })?;
    let mut after = packet.clone();
    after.hop_limit -= REPEAT as u8;
    let hook_name = if hook == Hook::Tc { "TC" } else { "XDP" };
    Ok(Case {
        name: format!("{hook_name}, relayed, IPv4, captured"),
        frame: packet.bytes(),
        after: after.bytes(),
        subject: Subject::Relay(Box::new(Relay {
            kernel,
            hook,
            entry,
            reason: Reason::Relayed,
            captured: true,
        })),
        samples: vec![],
    })
}

/// Streams, a packet for each, and what becomes of it.
fn packets() -> Vec<(&'static str, Entry, Draft, Reason)> {
    let (stream, packet) = fixture::cycle(Family::V4);
    let entry = fixture::offloaded(stream);
    let (stream_v6, packet_v6) = fixture::cycle(Family::V6);
    let mut stream_vlan = stream;
    stream_vlan.next_hop.vlan_depth = 1;
    stream_vlan.next_hop.vlans[0] = VlanTag {
        tpid: VLAN,
        id: 100,
    };
    let tags = vec![(VLAN, 0xa000 | 100)];
    let mut elsewhere = stream;
    elsewhere.local.port += 2;
    let mut stranger = stream;
    stranger.source = Endpoint {
        port: stream.source.port + 1,
        ..stream.source
    };
    let proven = |stream| fixture::offloaded(StreamSpec { proof: 8, ..stream });
    vec![
        (
            "relayed, IPv4",
            proven(stream),
            packet.clone(),
            Reason::Relayed,
        ),
        (
            "relayed without proof, IPv4",
            entry,
            packet.clone(),
            Reason::Relayed,
        ),
        (
            "relayed, IPv6",
            proven(stream_v6),
            packet_v6,
            Reason::Relayed,
        ),
        (
            "relayed, IPv4 in a VLAN",
            proven(stream_vlan),
            Draft {
                tags,
                ..packet.clone()
            },
            Reason::Relayed,
        ),
        (
            "no stream",
            fixture::offloaded(elsewhere),
            packet.clone(),
            Reason::NoStream,
        ),
        (
            "not UDP",
            entry,
            Draft {
                protocol: 6,
                ..packet.clone()
            },
            Reason::NotUdp,
        ),
        (
            "wrong source",
            fixture::offloaded(stranger),
            packet.clone(),
            Reason::UnexpectedSource,
        ),
        (
            "watching",
            fixture::watching(proven(stream).stream),
            packet.clone(),
            Reason::Watching,
        ),
        (
            "suspended",
            fixture::suspended(proven(stream).stream),
            packet,
            Reason::Suspended,
        ),
    ]
}

/// The state of a stream of which packets come one after the other, 20 ms of voice each, the last one just now (ns).
fn flowing(entry: &Entry, now: u64) -> State {
    const SPACING: u64 = 20_000_000;
    let reception = Reception {
        arrival: now - SPACING,
        packets: 100,
        source: fixture::SSRC,
        timestamp: fixture::TIMESTAMP - 160,
        first: 1 << 16,
        highest: 1 << 16 | u32::from(fixture::SEQUENCE - 1),
        window: u64::MAX,
        types: [0, 0xff, 0xff, 0xff],
        payload_type: 0,
        ..Reception::default()
    };
    State {
        last_seen: ticks(now),
        last_passed: ticks(now),
        reception,
        ..entry.state
    }
}

impl Case {
    /// Mean time of a run, ns.
    fn measure(&mut self, calls: u32) -> Result<f64> {
        let counted = self.counted()?;
        let mut after = vec![0; self.frame.len()];
        let mut time = Duration::ZERO;
        for _ in 0..calls {
            if let Subject::Relay(relay) = &mut self.subject {
                let Entry { stream, .. } = relay.entry;
                let state = flowing(&relay.entry, kernel::now()?);
                relay.kernel.set_state(stream.slot, state)?;
            }
            let program = self.subject.descriptor()?;
            let Run {
                time: one, length, ..
            } = program::test_run(program, &self.frame, &mut after, REPEAT, 0)
                .context("BPF_PROG_TEST_RUN")?;
            time += one;
            if let Subject::Relay(relay) = &mut self.subject
                && relay.captured
            {
                // A full ring buffer would cost less.
                let captured = relay.kernel.take_captured()?.len();
                ensure!(
                    captured == 2 * REPEAT as usize,
                    "{captured} packets captured"
                );
            }
            let right = length == after.len() && after == self.after;
            ensure!(
                right,
                "{}: {after:02x?} and not {:02x?}",
                self.name,
                self.after
            );
        }
        let counted = self.counted()? - counted;
        let expected = match self.subject {
            Subject::Floor(_) => 0,
            Subject::Relay(_) => u64::from(calls) * u64::from(REPEAT),
        };
        ensure!(
            counted == expected,
            "{}: {counted} of {expected} packets counted",
            self.name
        );
        Ok(time.as_nanos() as f64 / f64::from(calls))
    }

    /// Packets that were found to have the case's reason so far.
    fn counted(&self) -> Result<u64> {
        Ok(match &self.subject {
            Subject::Floor(_) => 0,
            Subject::Relay(relay) => relay.kernel.counters()?[relay.reason as usize].packets,
        })
    }

    /// Counts instructions, and sees that they do to the frame what the kernel's do.
    fn trace(&mut self) -> Result<Option<Trace>> {
        let Subject::Relay(relay) = &mut self.subject else {
            return Ok(None);
        };
        let Relay {
            kernel,
            hook,
            entry,
            reason,
            captured: false,
        } = &mut **relay
        else {
            return Ok(None);
        };
        let now = kernel::now()?;
        let state = flowing(entry, now);
        let flowing = Entry { state, ..*entry };
        let trace = interpreter::trace(*hook, flowing, &self.frame, now)?;
        let relayed = *reason == Reason::Relayed;
        let verdict = match (*hook, relayed) {
            (Hook::NativeXdp | Hook::GenericXdp, true) => 3,
            (Hook::NativeXdp | Hook::GenericXdp, false) => 2,
            (Hook::Tc, true) => 7,
            (Hook::Tc, false) => u32::MAX,
        };
        ensure!(
            trace.verdict == verdict,
            "{}: traced to {}",
            self.name,
            trace.verdict
        );
        if *hook != Hook::Tc {
            kernel.set_state(entry.stream.slot, state)?;
            let mut after = vec![0; self.frame.len()];
            program::test_run(kernel.descriptor(*hook)?, &self.frame, &mut after, 1, 0)?;
            ensure!(
                trace.frame == after,
                "{}: traced to {:02x?}",
                self.name,
                trace.frame
            );
        }
        Ok(Some(trace))
    }
}

/// Time of each case, and what it executes.
fn times(cases: &mut [Case]) -> Result<Table> {
    let mut rows = Vec::new();
    for case in cases {
        let Some(time) = Spread::of(&case.samples) else {
            continue;
        };
        let trace = case.trace()?;
        let counted = |count: fn(&Trace) -> u64| trace.as_ref().map(|it| count(it) as f64);
        rows.push(Row {
            name: case.name.clone(),
            cells: vec![
                Some(time.median),
                Some(time.lowest),
                Some(time.highest),
                counted(|trace| trace.instructions),
                counted(|trace| trace.calls),
            ],
        });
    }
    Ok(Table {
        title: "Time of a run".to_owned(),
        of: "program and packet".to_owned(),
        columns: vec![
            Column::new("ns", 1),
            Column::new("lowest", 1),
            Column::new("highest", 1),
            Column::new("BPF instructions", 0),
            Column::new("calls", 0),
        ],
        rows,
    })
}

/// Sizes of the programs.
fn programs(cases: &[Case]) -> Result<Table> {
    let relays = cases.iter().filter_map(|case| match &case.subject {
        Subject::Relay(relay) => Some(relay),
        Subject::Floor(_) => None,
    });
    let mut infos = Vec::new();
    for hook in [Hook::NativeXdp, Hook::Tc] {
        let relay = relays.clone().find(|relay| relay.hook == hook);
        let relay = relay.context("no case has this hook")?;
        infos.push(relay.kernel.info(hook)?);
    }
    let relay = relays.clone().next().context("no case has a kernel")?;
    infos.push(relay.kernel.observer_info()?);
    let rows = infos.into_iter().map(|info| Row {
        name: info.name_as_str().unwrap_or("?").to_owned(),
        cells: vec![
            info.size_translated().map(|bytes| f64::from(bytes / 8)),
            Some(f64::from(info.size_jitted())),
            info.verified_instruction_count().map(f64::from),
        ],
    });
    Ok(Table {
        title: "The programs".to_owned(),
        of: "program".to_owned(),
        columns: vec![
            Column::new("instructions", 0),
            Column::new("JITed bytes", 0),
            Column::new("instructions verified", 0),
        ],
        rows: rows.collect(),
    })
}
