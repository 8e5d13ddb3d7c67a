//! Suite `program`: the datapath's programs alone, on one packet over and over.
//!
//! `BPF_PROG_TEST_RUN` hands each run what the one before it left. The packets are therefore of streams that turn a
//! packet into itself, and each starts with the highest TTL that there is: enough for [`case::REPEAT`] runs, after which the
//! frame shows that every one of them relayed it.

mod case;
mod loaded;
mod part;

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use relay_tests::fixture::Hook;

pub(crate) use self::case::{SWAP, flowing};
use self::{
    case::{CLOCK, LOOKUP, RETURN, cases},
    loaded::Loaded,
};
use crate::{
    interpreter::Trace,
    report::{Bar, Bound, Column, Machine, Plot, PlotKind, Report, Row, Spread, Table, Target},
};

/// The suite's.
pub(crate) const NAME: &str = "program";
/// The column of what the interpreter counts.
pub(crate) const INSTRUCTIONS: &str = "BPF instructions";
/// The column of the median time.
const TIME: &str = "ns";
/// The row of the ordinary packet.
const RELAYED: &str = "XDP, relayed, IPv4";

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

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut cpus = CpuSet::new();
    cpus.set(options.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)
        .with_context(|| format!("cannot run on CPU {} only", options.cpu))?;
    let cases: Result<Vec<_>> = cases().into_iter().map(Loaded::new).collect();
    let mut cases = cases?;
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
    let figure = |column, row| {
        let figures = times.column(column)?;
        figures.iter().find(|(name, _)| *name == row).map(|it| it.1)
    };
    let time = |row| figure(TIME, row).with_context(|| format!("{row}: not measured"));
    let floor = time(SWAP)?;
    let parts = time(CLOCK)? + time(LOOKUP)? - time(RETURN)?;
    Ok(Report {
        suite: NAME.to_owned(),
        title: "The datapath's programs alone".to_owned(),
        command: "cargo xtask bench program".to_owned(),
        machine: Machine::here()?,
        method: vec![
            "`BPF_PROG_TEST_RUN` shows one packet to a program over and over: no driver, no stack. The packets are of \
             streams that turn a packet into itself, and at the end the frame and the counters must show that every \
             run did what the row says."
                .to_owned(),
            format!(
                "Times are medians of {} rounds that measure every row once, on one processor. Instructions are those \
                 of BPF that a packet executes, the calls of kernel functions among them, whose own work is not \
                 counted.",
                options.rounds
            ),
        ],
        plots: vec![plot(&cases)],
        targets: vec![Target {
            what: "program, relayed IPv4, ours ÷ MAC-swap floor".to_owned(),
            bound: Bound::AtMost(2.5),
            measured: time(RELAYED)? / floor,
            decimals: 2,
            obstacle: Some(format!(
                "the kernel's own functions take that already: an empty program, one reading of the precise clock, \
                 without which there is no jitter, and one lookup of the stream are {parts:.0} ns, {:.1} times the \
                 MAC swap, before an instruction of ours",
                parts / floor
            )),
        }],
        tables: vec![times, programs(&cases)?],
    })
}

/// Instructions of a packet by the names of the rows. Neither root nor a kernel is needed.
pub(crate) fn counts() -> Result<Vec<(String, u64)>> {
    let mut counts = Vec::new();
    for case in cases() {
        if let Some(trace) = case.trace()? {
            counts.push((case.name, trace.instructions));
        }
    }
    Ok(counts)
}

/// Time of each case, and what it executes.
fn times(cases: &mut [Loaded]) -> Result<Table> {
    let floor = cases.iter().find(|case| case.case.name == SWAP);
    let floor = floor.and_then(|case| Spread::of(&case.samples));
    let floor = floor.context("no floor")?.median;
    let mut rows = Vec::new();
    for case in cases {
        let Some(time) = Spread::of(&case.samples) else {
            continue;
        };
        let trace = case.trace()?;
        let counted = |count: fn(&Trace) -> u64| trace.as_ref().map(|it| count(it) as f64);
        rows.push(Row {
            name: case.case.name.clone(),
            cells: vec![
                Some(time.median),
                Some(time.lowest),
                Some(time.highest),
                Some(time.median / floor),
                counted(|trace| trace.instructions),
                counted(|trace| trace.calls),
            ],
        });
    }
    Ok(Table {
        title: "Time of a run".to_owned(),
        of: "program and packet".to_owned(),
        columns: vec![
            Column::new(TIME, 1),
            Column::new("lowest", 1),
            Column::new("highest", 1),
            Column::new("÷ MAC swap", 2),
            Column::new(INSTRUCTIONS, 0),
            Column::new("calls", 0),
        ],
        rows,
    })
}

fn plot(cases: &[Loaded]) -> Plot {
    let bars = cases.iter().filter_map(|case| {
        let time = Spread::of(&case.samples)?;
        Some(Bar {
            name: case.case.name.clone(),
            value: time.median,
            lowest: time.lowest,
            highest: time.highest,
        })
    });
    Plot {
        file: "program-time".to_owned(),
        title: "A packet in the program alone".to_owned(),
        kind: PlotKind::Bars {
            axis: "ns (median, lowest and highest of all rounds)".to_owned(),
            bars: bars.collect(),
        },
    }
}

/// Sizes of the programs.
fn programs(cases: &[Loaded]) -> Result<Table> {
    let mut kernels = cases.iter().filter_map(Loaded::kernel);
    let mut infos = Vec::new();
    for wanted in [Hook::NativeXdp, Hook::Tc] {
        let (kernel, _) = kernels
            .find(|(_, hook)| *hook == wanted)
            .context("no case has this hook")?;
        infos.push(kernel.info(wanted)?);
        if wanted == Hook::Tc {
            infos.push(kernel.observer_info()?);
        }
    }
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
