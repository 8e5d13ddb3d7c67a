//! What the samples say.

use anyhow::{Context as _, Result, ensure};

use super::{inside::Sample, subject::Subject};
use crate::report::{
    Bar, Bound, Column, Machine, Plot, PlotKind, Report, Row, Spread, Table, Target, grouped,
};

/// The rate that targets are set at, packets per second.
const TARGET_RATE: u32 = 5_000;

/// Of the packets, how many a kernel must have relayed for its cost to be that of relaying in the kernel.
const IN_KERNEL: f64 = 0.98;

/// Instructions for each packet that a subject was found to take at a rate, in all boots.
struct Finding {
    subject: Subject,
    rate: u32,
    /// Of the thread that receives and of the subject's own.
    total: Spread,
    receiving: Spread,
    beside: Spread,
    releasing: Spread,
    /// Of the packets, how many the subject says that it relayed.
    relayed: Option<f64>,
}

impl Finding {
    fn of(subject: Subject, rate: u32, boots: &[Vec<Sample>]) -> Result<Self> {
        let samples: Vec<_> = boots
            .iter()
            .flatten()
            .filter(|sample| (sample.subject, sample.rate) == (subject, rate))
            .collect();
        let spread = |part: fn(&Sample) -> u64| {
            let each = |sample: &&Sample| part(sample) as f64 / sample.packets as f64;
            Spread::of(&samples.iter().map(each).collect::<Vec<_>>()).context("not measured")
        };
        let relayed = |sample: &&Sample| Some(sample.relayed? as f64 / sample.sent as f64);
        let relayed = samples.iter().filter_map(relayed).min_by(f64::total_cmp);
        ensure!(
            relayed.is_none_or(|share| share >= IN_KERNEL),
            "{}: only {relayed:?} of the packets were relayed in the kernel",
            subject.title()
        );
        Ok(Self {
            subject,
            rate,
            total: spread(|sample| sample.receiving + sample.beside)?,
            receiving: spread(|sample| sample.receiving)?,
            beside: spread(|sample| sample.beside)?,
            releasing: spread(|sample| sample.releasing)?,
            relayed,
        })
    }

    /// How far the boots differ, as a share.
    fn difference(&self) -> f64 {
        self.total.highest / self.total.lowest - 1.0
    }
}

/// The report of what was measured in each boot.
pub(super) fn report(
    boots: &[Vec<Sample>],
    subjects: &[Subject],
    rates: &[u32],
    machine: Machine,
) -> Result<Report> {
    let mut findings = Vec::new();
    for rate in rates {
        for subject in subjects {
            findings.push(Finding::of(*subject, *rate, boots)?);
        }
    }
    let at = |rate| findings.iter().filter(move |finding| finding.rate == rate);
    Ok(Report {
        suite: "guest".to_owned(),
        title: "Instructions for each packet on virtio-net".to_owned(),
        command: "cargo xtask bench guest".to_owned(),
        machine,
        method: method(&findings, boots.len()),
        tables: rates
            .iter()
            .map(|rate| table(*rate, &at(*rate).collect::<Vec<_>>()))
            .collect(),
        plots: plot(&at(TARGET_RATE).collect::<Vec<_>>())
            .into_iter()
            .collect(),
        targets: targets(&at(TARGET_RATE).collect::<Vec<_>>()),
    })
}

fn method(findings: &[Finding], boots: usize) -> Vec<String> {
    let difference = findings.iter().map(Finding::difference).fold(0.0, f64::max);
    vec![
        "A Debian 12 runs in QEMU without KVM, which executes one instruction every nanosecond of the guest's time \
         (`-icount shift=0,sleep=off`). CPU time is then a number of instructions, and the same whatever else the \
         machine does. Two virtio-nets are wired to each other; all phones are behind one of them, and what is \
         measured is at the other. XDP is native."
            .to_owned(),
        "Calls of G.711 in packets of 20 ms, as many as make up the rate, evenly spaced: each packet wakes the thread \
         that receives. Every packet must come back once, whole, with the right addresses and ports. Counted are \
         that thread (threaded NAPI), from the interrupt to the sending, and the subject's own threads. The thread \
         that later releases what was sent is the driver's alone, and is shown apart."
            .to_owned(),
        "Ours is `relay-user attach` with pairs added over its API and offloaded on proof, a PBX behind them that \
         forwards; everything is on: validation, lease, loss and jitter, keepalives, audits. What its daemon and the \
         PBX do meanwhile counts. rtpengine and its kernel module are Debian's, 10.5; of the packets counted, those \
         in the column `by it` were relayed by the kernel, by its own count."
            .to_owned(),
        format!(
            "The guest was booted {boots} times. The counts of one subject at one rate differ by at most {} % \
             between the boots.",
            grouped(100.0 * difference, 2)
        ),
    ]
}

fn table(rate: u32, findings: &[&Finding]) -> Table {
    let floor = findings.iter().find(|it| it.subject == Subject::Floor);
    let row = |finding: &&Finding| Row {
        name: finding.subject.title().to_owned(),
        cells: vec![
            Some(finding.total.median),
            floor.map(|floor| finding.total.median / floor.total.median),
            Some(finding.receiving.median),
            Some(finding.beside.median),
            Some(finding.releasing.median),
            finding.relayed.map(|share| 100.0 * share),
            Some(100.0 * finding.difference()),
        ],
    };
    Table {
        title: format!(
            "Instructions for each packet, at {} packets/s",
            grouped(rate.into(), 0)
        ),
        of: "what".to_owned(),
        columns: vec![
            Column::new("instructions", 0),
            Column::new("÷ floor", 2),
            Column::new("receiving", 0),
            Column::new("own threads", 0),
            Column::new("releasing, apart", 0),
            Column::new("by it, %", 1),
            Column::new("boots differ by, %", 2),
        ],
        rows: findings.iter().map(row).collect(),
    }
}

fn plot(findings: &[&Finding]) -> Option<Plot> {
    let bar = |finding: &&Finding| Bar {
        name: finding.subject.title().to_owned(),
        value: finding.total.median,
        lowest: finding.total.lowest,
        highest: finding.total.highest,
    };
    (!findings.is_empty()).then(|| Plot {
        file: "guest".to_owned(),
        title: format!(
            "Instructions for each packet on virtio-net, at {} packets/s",
            grouped(TARGET_RATE.into(), 0)
        ),
        kind: PlotKind::Bars {
            axis: "instructions for each packet".to_owned(),
            bars: findings.iter().map(bar).collect(),
        },
    })
}

fn targets(findings: &[&Finding]) -> Vec<Target> {
    let total = |subject| {
        let finding = findings.iter().find(|finding| finding.subject == subject)?;
        Some(finding.total.median)
    };
    let Some(ours) = total(Subject::Relay) else {
        return vec![];
    };
    let mut targets = Vec::new();
    if let Some(floor) = total(Subject::Floor) {
        targets.push(target(
            "guest instructions per packet, ours ÷ MAC-swap floor (virtio, native)",
            Bound::AtMost(1.10),
            ours / floor,
            format!(
                "The floor leaves {} instructions for all that the relay does to a packet, and it takes {}.",
                grouped(0.10 * floor, 0),
                grouped(ours - floor, 0)
            ),
        ));
    }
    if let Some(module) = total(Subject::RtpengineKernel) {
        targets.push(target(
            "rtpengine kernel module ÷ ours (same guest, 5,000 packets/s)",
            Bound::AtLeast(2.4),
            module / ours,
            format!(
                "Ours would have to take {} instructions, and takes {}.",
                grouped(module / 2.4, 0),
                grouped(ours, 0)
            ),
        ));
    }
    targets
}

fn target(what: &str, bound: Bound, measured: f64, obstacle: String) -> Target {
    let mut target = Target {
        what: what.to_owned(),
        bound,
        measured,
        decimals: 2,
        obstacle: None,
    };
    if !target.is_met() {
        target.obstacle = Some(obstacle);
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(subject: Subject, receiving: u64, relayed: Option<u64>) -> Sample {
        Sample {
            subject,
            rate: TARGET_RATE,
            packets: 100,
            sent: 105,
            relayed,
            receiving,
            releasing: 0,
            beside: 1_000,
        }
    }

    #[test]
    fn boots_are_taken_together() {
        let boots = [90_000, 100_000].map(|time| vec![sample(Subject::Floor, time, None)]);
        let finding = Finding::of(Subject::Floor, TARGET_RATE, &boots).expect("samples");
        assert_eq!(
            (finding.total.lowest, finding.total.highest),
            (910.0, 1_010.0)
        );
        assert_eq!(finding.beside.median, 10.0);
        assert!(Finding::of(Subject::Relay, TARGET_RATE, &boots).is_err());
    }

    #[test]
    fn what_the_kernel_did_not_relay_is_no_figure_of_its_own() {
        for (relayed, right) in [(104, true), (50, false)] {
            let boots = [vec![sample(Subject::Relay, 1, Some(relayed))]];
            let finding = Finding::of(Subject::Relay, TARGET_RATE, &boots);
            assert_eq!(finding.is_ok(), right, "{relayed}");
        }
    }
}
