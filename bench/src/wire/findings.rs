//! What was found, as a report.

use anyhow::{Context as _, Result};

use super::{
    LOADS, Options,
    relays::OURS,
    sample::Cost,
    subject::{Class, Subject},
};
use crate::report::{
    Bar, Bound, Column, Machine, Plot, PlotKind, Report, Row, Spread, Table, Target,
};

/// What was measured of a relay.
pub(super) struct Found {
    name: &'static str,
    class: Class,
    /// By load, of the rounds in which it lost nothing.
    pub(super) costs: [Vec<Cost>; LOADS.len()],
    /// The highest rate without loss of each round. None where it always lost something.
    pub(super) rates: Vec<Option<Cost>>,
    /// Trials that were repeated because somebody stood still.
    pub(super) repeated: u32,
    /// What happened at the lowest rate of a round in which it always lost something.
    pub(super) failed: Option<String>,
}

/// The load of [`LOADS`] at which relays are compared: 20 kpps, 16 at once.
const COMPARED: usize = 2;

/// What is to be reached: loss-free rate, ours by the floor's, and CPU time for a packet, userspace relays' by ours.
const RATE: f64 = 0.95;
const COST: f64 = 4.5;
/// The share of its CPU from which a relay counts as the one that could not do more.
const BUSY: f64 = 0.9;

impl Found {
    pub(super) fn new(subject: &Subject) -> Self {
        Self {
            name: subject.name,
            class: subject.class,
            costs: Default::default(),
            rates: Vec::new(),
            repeated: 0,
            failed: None,
        }
    }

    /// CPU time for a packet at a load, ns.
    fn cost(&self, load: usize) -> Option<Spread> {
        spread(&self.costs[load], |cost| cost.per_packet)
    }

    /// CPU time for a packet at the load at which relays are compared, ns.
    fn compared(&self) -> Option<f64> {
        Some(self.cost(COMPARED)?.median)
    }

    /// Of the highest rates without loss.
    fn best(&self, figure: fn(&Cost) -> f64) -> Option<Spread> {
        spread(self.rates.iter().flatten(), figure)
    }

    /// What happened where no highest rate was found.
    fn failure(&self) -> String {
        let failed = self.failed.as_deref().unwrap_or("nothing failed");
        format!("{}: {failed}", self.name)
    }
}

fn spread<'a>(
    samples: impl IntoIterator<Item = &'a Cost>,
    figure: fn(&Cost) -> f64,
) -> Option<Spread> {
    let figures: Vec<_> = samples.into_iter().map(figure).collect();
    Spread::of(&figures)
}

/// The report.
///
/// # Errors
/// The floor or our relay is missing.
pub(super) fn report(found: &[Found], options: &Options) -> Result<Report> {
    let ours = found
        .iter()
        .find(|found| found.name == OURS)
        .context("our relay was not measured")?;
    let streams = 2 * options.calls;
    Ok(Report {
        suite: "wire".to_owned(),
        title: "Over veth, beside other ways to relay".to_owned(),
        command: "cargo xtask bench wire".to_owned(),
        machine: Machine::here()?,
        method: method(streams),
        tables: vec![costs(found, ours), rates(found)],
        plots: plots(found),
        targets: targets(found, ours)?,
    })
}

fn method(streams: u16) -> Vec<String> {
    [
        format!(
            "Each relay has a cable of its own (veth) to a machine with phones, both network namespaces. {streams} \
             streams of G.711 in 20 ms packets take turns; UDP checksums are there, and correct. A BPF program sends \
             each packet when it is due, and an XDP program at the same end judges what comes back: addresses, ports \
             and checksum as they must be, and every sequence number of every stream once. Any other packet fails \
             the trial."
        ),
        "Generator and receiver have one processor, the relay the other. Both ends of the cable receive in a kernel \
         thread (threaded NAPI), which goes before all processes as softirqs do. The phones' end looks for packets \
         every 50 µs, so that no relay pays for waking it. CPU time is that of the relay's kernel thread and of all \
         its threads and processes, from schedstat, divided by the packets sent. What a packet costs falls with the \
         rate, since one wake-up then serves several."
            .to_owned(),
        "The highest rate without loss is searched as RFC 2544 (section 26.1) has it, binary, to 2 %, but with trials of 0.5 s \
         instead of 60 s. A rate fails when two trials lose a packet. On a virtual machine a processor may stand still \
         for longer than the 256 packets of a veth's ring last, and then any rate would fail. Time in which the \
         generator itself stands still, for more than 0.25 ms, therefore does not count, and what was due in it is not \
         sent at once afterwards; and a trial that loses does not count when nothing came back while more was sent than \
         the ring holds, but is repeated, at most 3 times. A search ends after \
         8 s, the first after 20, with the highest rate that has passed. After a trial that loses, calls are first brought back to be relayed \
         as they should. Where the relay's share of its CPU at its highest rate is far from 100 %, it was generator and \
         receiver that could not do more; what a packet takes there tells what it could do."
            .to_owned(),
        "The packets come as XDP frames, as a NIC's driver has them: veth runs native XDP on them as they are, and \
         makes socket buffers of them for all else. A sender's socket buffers would be copied into pages before native \
         XDP, which costs more than floor and relay together. Evenly spaced packets each wake a thread up, which on a \
         virtual machine costs more than most of the relays: they are therefore compared at bursts of 16, as a NIC \
         that moderates its interrupts hands over. That load lasts 2.9 s, in which relay-user leaves one packet of \
         each stream to the PBX; all others last 0.5 s. Ours counts only where its program has relayed 90 % of the packets."
            .to_owned(),
        "relay-user runs beside a userspace relay that stands for the PBX, and offloads what it has proven on the \
         wire; statistics, lease and proof are on. MAC swap: a native XDP program that swaps the MAC addresses and \
         sends back. nftables NAT: forwarding with DNAT, SNAT and connection tracking. A thread per call: poll on two \
         sockets, recvfrom, sendto, as Asterisk's native bridge does. One thread, batches: epoll, recvmmsg, sendmmsg. \
         rtpengine: Debian 12's, without its kernel module. Asterisk: Debian's version 22 with bridges of technology \
         native_rtp; its phones are stopped once the calls are up, and the generator talks for them."
            .to_owned(),
    ]
    .into()
}

fn costs(found: &[Found], ours: &Found) -> Table {
    let mut columns: Vec<_> = LOADS
        .iter()
        .map(|(_, _, name)| Column::new(&format!("ns, {name}"), 0))
        .collect();
    let compared = LOADS[COMPARED].2;
    columns.push(Column::new(&format!("lowest, {compared}"), 0));
    columns.push(Column::new(&format!("highest, {compared}"), 0));
    columns.push(Column::new(&format!("÷ {OURS}, {compared}"), 2));
    columns.push(Column::new("relayed in the kernel then, %", 1));
    let rows = found.iter().map(|found| {
        let medians = (0..LOADS.len()).map(|load| Some(found.cost(load)?.median));
        let mut cells: Vec<_> = medians.collect();
        let spread = found.cost(COMPARED);
        cells.push(spread.map(|spread| spread.lowest));
        cells.push(spread.map(|spread| spread.highest));
        cells.push(
            found
                .compared()
                .zip(ours.compared())
                .map(|(it, ours)| it / ours),
        );
        let in_kernel: Option<Vec<_>> = found.costs[COMPARED]
            .iter()
            .map(|cost| Some(100.0 * cost.in_kernel?))
            .collect();
        cells.push(in_kernel.and_then(|shares| Some(Spread::of(&shares)?.median)));
        Row {
            name: found.name.to_owned(),
            cells,
        }
    });
    Table {
        title: "CPU time for a packet; none where packets were lost".to_owned(),
        of: "relay".to_owned(),
        columns,
        rows: rows.collect(),
    }
}

fn rates(found: &[Found]) -> Table {
    let rows = found.iter().map(|found| {
        let rate = found.best(|best| best.rate);
        let median = |figure| Some(found.best(figure)?.median);
        Row {
            name: found.name.to_owned(),
            cells: vec![
                rate.map(|rate| rate.median),
                rate.map(|rate| rate.lowest),
                rate.map(|rate| rate.highest),
                median(|best| 100.0 * best.share()),
                median(|best| best.per_packet),
                Some(found.repeated.into()),
            ],
        }
    });
    Table {
        title: "Highest rate without loss".to_owned(),
        of: "relay".to_owned(),
        columns: vec![
            Column::new("packets/s", 0),
            Column::new("lowest", 0),
            Column::new("highest", 0),
            Column::new("its CPU there, %", 0),
            Column::new("ns a packet there", 0),
            Column::new("trials repeated, somebody stood still", 0),
        ],
        rows: rows.collect(),
    }
}

fn plots(found: &[Found]) -> Vec<Plot> {
    let bars = |figure: fn(&Found) -> Option<Spread>| {
        let bars = found.iter().filter_map(|found| {
            let spread = figure(found)?;
            Some(Bar {
                name: found.name.to_owned(),
                value: spread.median,
                lowest: spread.lowest,
                highest: spread.highest,
            })
        });
        bars.collect()
    };
    vec![
        Plot {
            file: "wire-cpu".to_owned(),
            title: format!("CPU time for a packet over veth, {}", LOADS[COMPARED].2),
            kind: PlotKind::Bars {
                axis: "ns a packet".to_owned(),
                bars: bars(|found| found.cost(COMPARED)),
            },
        },
        Plot {
            file: "wire-rate".to_owned(),
            title: "Highest rate without loss over veth".to_owned(),
            kind: PlotKind::Bars {
                axis: "packets/s".to_owned(),
                bars: bars(|found| found.best(|best| best.rate)),
            },
        },
    ]
}

fn targets(found: &[Found], ours: &Found) -> Result<Vec<Target>> {
    let floor = found
        .iter()
        .find(|found| found.class == Class::Floor)
        .context("the floor was not measured")?;
    Ok(vec![
        rate_target(floor, ours),
        cost_target(found, floor, ours),
    ])
}

/// Where either has no highest rate, the figure is 0, and the obstacle tells why.
fn rate_target(floor: &Found, ours: &Found) -> Target {
    // Of one round each: what disturbs the machine meanwhile disturbs both.
    let rounds = ours.rates.iter().zip(&floor.rates);
    let ratios: Vec<_> = rounds
        .filter_map(|(ours, floor)| Some((*ours)?.rate / (*floor)?.rate))
        .collect();
    let ratio = Spread::of(&ratios).map(|ratio| ratio.median);
    let what = "loss-free rate over veth, ours ÷ MAC-swap floor";
    let obstacle = match ratio {
        Some(ratio) if ratio >= RATE => None,
        Some(_) => Some(saturation(floor, ours)),
        None => Some(format!(
            "no round found both rates. {}. {}",
            floor.failure(),
            ours.failure()
        )),
    };
    Target {
        what: format!("{what}{}", shares(floor, ours).unwrap_or_default()),
        bound: Bound::AtLeast(RATE),
        measured: ratio.unwrap_or(0.0),
        decimals: 2,
        obstacle,
    }
}

/// How busy both are at their highest rates: far from 100 %, it is the generator that is compared with itself.
fn shares(floor: &Found, ours: &Found) -> Option<String> {
    let share = |found: &Found| Some(found.best(|best| 100.0 * best.share())?.median);
    Some(format!(
        " (at {:.0} and {:.0} % of the relay's CPU)",
        share(ours)?,
        share(floor)?
    ))
}

/// What both take at their highest rates.
fn saturation(floor: &Found, ours: &Found) -> String {
    let median = |found: &Found, figure| found.best(figure).map_or(0.0, |spread| spread.median);
    let [floor_takes, ours_takes] =
        [floor, ours].map(|found| median(found, |best| best.per_packet));
    let takes = format!(
        "at its highest rate without loss, a packet takes the floor {floor_takes:.0} ns and our relay {ours_takes:.0}"
    );
    let busiest = [floor, ours]
        .map(|found| median(found, Cost::share))
        .into_iter()
        .fold(0.0, f64::max);
    if busiest < BUSY {
        format!(
            "{takes}, and neither has used its CPU up: it was the generator, the receiver or a processor that stood \
             still that lost packets"
        )
    } else {
        format!(
            "{takes}: checks, statistics and changes are {:.0} % of what ours takes",
            100.0 * (ours_takes - floor_takes) / ours_takes
        )
    }
}

/// Where one of them was not measured, the figure is 0, and the obstacle tells which.
fn cost_target(found: &[Found], floor: &Found, ours: &Found) -> Target {
    let load = LOADS[COMPARED].2;
    let others = found.iter().filter(|found| found.class == Class::Userspace);
    let least = others
        .filter_map(|found| Some((found.compared()? / ours.compared()?, found.name)))
        .min_by(|one, other| one.0.total_cmp(&other.0));
    let what = "userspace relays ÷ ours, CPU per packet over veth";
    let (what, measured) = match least {
        Some((ratio, name)) => (format!("{what} (the least: {name}, {load})"), ratio),
        None => (what.to_owned(), 0.0),
    };
    let obstacle = match (ours.compared(), floor.compared()) {
        _ if measured >= COST => None,
        (Some(own), Some(bare)) if least.is_some() => Some(format!(
            "of the {own:.0} ns that our relay takes, {bare:.0} are veth's own, as the floor shows; without these the \
             ratio would be {:.1}",
            (measured * own - bare) / (own - bare)
        )),
        _ => Some(format!(
            "our relay, the floor or every userspace relay always lost packets at {load}"
        )),
    };
    Target {
        what,
        bound: Bound::AtLeast(COST),
        measured,
        decimals: 2,
        obstacle,
    }
}
