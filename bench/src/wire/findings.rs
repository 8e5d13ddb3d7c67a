//! What was found, as a report.

use anyhow::{Context as _, Result};

use super::{
    LOADS, Options,
    relays::OURS,
    subject::{Class, Subject},
};
use crate::report::{
    Bar, Bound, Column, Machine, Plot, PlotKind, Report, Row, Spread, Table, Target,
};

/// What was measured of a relay, a sample for each round.
pub(super) struct Found {
    name: &'static str,
    class: Class,
    /// CPU time for a packet by load, ns. None where it lost packets.
    pub(super) costs: [Vec<f64>; LOADS.len()],
    /// Highest rates without loss, packets per second.
    pub(super) rates: Vec<f64>,
    /// CPU that it took there, percent of one.
    pub(super) shares: Vec<f64>,
    /// Of what came in, overload included, the share that our relay's program has relayed. None of other relays.
    pub(super) share_in_kernel: Option<f64>,
}

/// The load of [`LOADS`] at which relays are compared: 20 kpps, 16 at once.
const COMPARED: usize = 2;

/// What is to be reached: loss-free rate, ours by the floor's, and CPU time for a packet, userspace relays' by ours.
const RATE: f64 = 0.95;
const COST: f64 = 4.5;

impl Found {
    pub(super) fn new(subject: &Subject) -> Self {
        Self {
            name: subject.name,
            class: subject.class,
            costs: Default::default(),
            rates: Vec::new(),
            shares: Vec::new(),
            share_in_kernel: None,
        }
    }

    /// CPU time at the load at which relays are compared, ns.
    fn compared(&self) -> Option<f64> {
        Some(Spread::of(&self.costs[COMPARED])?.median)
    }
}

/// The report.
///
/// # Errors
/// The floor or our relay could not be measured.
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
        "The highest rate without loss is searched as RFC 2544 (section 26.1) has it, binary, to 1 %, but with trials of 0.5 s \
         instead of 60 s, and a trial that loses is repeated once, since on a virtual machine a processor may stand \
         still for longer than the 256 packets of a veth's ring last. Where the relay's share of its CPU at that rate \
         is far from 100 %, it was the generator that could not do more."
            .to_owned(),
        "The packets come as XDP frames, as a NIC's driver has them: veth runs native XDP on them as they are, and \
         makes socket buffers of them for all else. A sender's socket buffers would be copied into pages before native \
         XDP, which costs more than floor and relay together. Evenly spaced packets each wake a thread up, which on a \
         virtual machine costs more than most of the relays: they are therefore compared at bursts of 16, as a NIC \
         that moderates its interrupts hands over."
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
        .map(|(_, name)| Column::new(&format!("ns, {name}"), 0))
        .collect();
    let compared = LOADS[COMPARED].1;
    columns.push(Column::new(&format!("lowest, {compared}"), 0));
    columns.push(Column::new(&format!("highest, {compared}"), 0));
    columns.push(Column::new(&format!("÷ {OURS}, {compared}"), 2));
    let rows = found.iter().map(|found| {
        let spreads = found.costs.each_ref().map(|samples| Spread::of(samples));
        let mut cells: Vec<_> = spreads.map(|spread| Some(spread?.median)).into();
        cells.push(spreads[COMPARED].map(|spread| spread.lowest));
        cells.push(spreads[COMPARED].map(|spread| spread.highest));
        cells.push(
            found
                .compared()
                .zip(ours.compared())
                .map(|(it, ours)| it / ours),
        );
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
        let (rate, share) = (Spread::of(&found.rates), Spread::of(&found.shares));
        Row {
            name: found.name.to_owned(),
            cells: vec![
                rate.map(|rate| rate.median),
                rate.map(|rate| rate.lowest),
                rate.map(|rate| rate.highest),
                share.map(|share| share.median),
                found.share_in_kernel.map(|share| 100.0 * share),
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
            Column::new("relayed in the kernel, whole run, %", 1),
        ],
        rows: rows.collect(),
    }
}

fn plots(found: &[Found]) -> Vec<Plot> {
    let bars = |samples: fn(&Found) -> &[f64]| {
        let bars = found.iter().filter_map(|found| {
            let spread = Spread::of(samples(found))?;
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
            title: format!("CPU time for a packet over veth, {}", LOADS[COMPARED].1),
            kind: PlotKind::Bars {
                axis: "ns a packet".to_owned(),
                bars: bars(|found| &found.costs[COMPARED]),
            },
        },
        Plot {
            file: "wire-rate".to_owned(),
            title: "Highest rate without loss over veth".to_owned(),
            kind: PlotKind::Bars {
                axis: "packets/s".to_owned(),
                bars: bars(|found| &found.rates),
            },
        },
    ]
}

fn targets(found: &[Found], ours: &Found) -> Result<Vec<Target>> {
    let floor = found
        .iter()
        .find(|found| found.class == Class::Floor)
        .context("the floor was not measured")?;
    // Of one round each: what disturbs the machine meanwhile disturbs both.
    let ratios: Vec<_> = ours
        .rates
        .iter()
        .zip(&floor.rates)
        .map(|(ours, floor)| ours / floor)
        .collect();
    let rate = Spread::of(&ratios).context(
        "the floor or our relay loses packets at every rate: something else keeps the machine busy",
    )?;
    let own = ours
        .compared()
        .context("our relay loses packets at the rate at which relays are compared")?;
    let others = found.iter().filter(|found| found.class == Class::Userspace);
    let (least, name) = others
        .filter_map(|found| Some((found.compared()? / own, found.name)))
        .min_by(|one, other| one.0.total_cmp(&other.0))
        .context("no userspace relay was measured")?;
    let share = |found: &Found| Spread::of(&found.shares).map_or(0.0, |share| share.median);
    let saturation = format!(
        "at its highest rate without loss, the floor takes {:.0} % of its CPU, and our relay {:.0} %",
        share(floor),
        share(ours)
    );
    let bare = floor
        .compared()
        .context("the floor loses packets at the rate at which relays are compared")?;
    let composition = format!(
        "of the {own:.0} ns that our relay takes, {bare:.0} are veth's own, as the floor shows; without these the ratio \
         would be {:.1}",
        (least * own - bare) / (own - bare)
    );
    Ok(vec![
        Target {
            what: "loss-free rate over veth, ours ÷ MAC-swap floor".to_owned(),
            bound: Bound::AtLeast(RATE),
            measured: rate.median,
            decimals: 2,
            obstacle: (rate.median < RATE).then_some(saturation),
        },
        Target {
            what: format!(
                "userspace relays ÷ ours, CPU per packet over veth (the least: {name}, {})",
                LOADS[COMPARED].1
            ),
            bound: Bound::AtLeast(COST),
            measured: least,
            decimals: 2,
            obstacle: (least < COST).then_some(composition),
        },
    ])
}
