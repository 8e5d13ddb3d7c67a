//! Suite `qos`: what a saturated uplink does to a call, without shaping and with it.
//!
//! Four greedy TCP flows of the relay's host fill an uplink of 1 Mbit/s, and a call between the office and behind the
//! uplink goes through the relay, offloaded.

use std::{fmt, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use relay_tests::{
    phone::PACKET_TIME,
    relay::Relay,
    transit::Transit,
    uplink::{ACCESS, Bottleneck, Outcome, Uplink},
};
use serde::Serialize;

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long to measure each way, seconds
    #[arg(long, default_value_t = 45, value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
    /// Where to write the figures as JSON
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/report/qos.json"))]
    report: PathBuf,
}

/// TCP flows beside the call.
const FLOWS: usize = 4;
/// Until the flows have found their rate.
const SETTLING: Duration = Duration::from_secs(5);
/// Bytes of a packet of the call on the wire: Ethernet, IPv4, UDP and RTP headers, and 20 ms of G.711.
const FRAME: usize = 14 + 20 + 8 + 12 + 160;
/// What `qos apply` shapes an uplink to, percent.
const SHAPED: f64 = 95.0;

/// What a phone may be late by before its packets, sent at once afterwards, are no call any more, ms.
const HELD_UP: f64 = 100.0;

/// Where it is compared.
const SCENES: [Scene; 3] = [
    Scene {
        title: "HTB with a plain queue of 64 packets",
        bottleneck: Bottleneck::Htb,
        mtu: None,
        setups: &SETUPS,
    },
    Scene {
        title: "A line that sends one packet after the other, behind a queue of 64",
        bottleneck: Bottleneck::Line,
        mtu: None,
        setups: &SETUPS,
    },
    Scene {
        title: "The same line, and the default route has an MTU of 1000 bytes",
        bottleneck: Bottleneck::Line,
        mtu: Some(1000),
        setups: &TC,
    },
];

/// What is compared.
const TC: [Setup; 2] = [
    Setup {
        name: "TC, no shaping",
        mode: "tc",
        shaped: false,
    },
    Setup {
        name: "TC, qos apply",
        mode: "tc",
        shaped: true,
    },
];
const SETUPS: [Setup; 4] = [
    TC[0],
    TC[1],
    Setup {
        name: "XDP, qos apply",
        mode: "generic",
        shaped: true,
    },
    Setup {
        name: "XDP, no shaping",
        mode: "generic",
        shaped: false,
    },
];

struct Scene {
    title: &'static str,
    bottleneck: Bottleneck,
    /// Of the route over the uplink, bytes.
    mtu: Option<u16>,
    setups: &'static [Setup],
}

#[derive(Clone, Copy)]
struct Setup {
    name: &'static str,
    /// `--mode` of the relay.
    mode: &'static str,
    /// Whether `qos apply` has shaped the interface.
    shaped: bool,
}

/// A table of the report.
#[derive(Serialize)]
struct Section {
    bottleneck: &'static str,
    rows: Vec<Row>,
    /// For the shaped interface in TC mode.
    targets: Vec<Target>,
}

/// A row of it.
#[derive(Serialize)]
struct Row {
    setup: &'static str,
    /// Up the line. Times in ms.
    voice: Transit,
    /// Down the line.
    down: Transit,
    /// Payload of the TCP flows, bit/s.
    bulk: f64,
}

/// What shaping is for, and whether it was reached.
#[derive(Debug, PartialEq, Serialize)]
struct Target {
    what: &'static str,
    measured: f64,
    limit: f64,
    met: bool,
}

/// Measures and prints.
pub(crate) fn run(options: &Options) -> Result<()> {
    let length = Duration::from_secs(options.seconds.into());
    let mut sections = Vec::new();
    for scene in &SCENES {
        let section = scene.measure(length).context(scene.title)?;
        println!("{section}");
        sections.push(section);
    }
    write(options, &sections).with_context(|| format!("cannot write {}", options.report.display()))
}

impl Scene {
    fn measure(&self, length: Duration) -> Result<Section> {
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for setup in self.setups {
            eprintln!("{}: {} ...", self.title, setup.name);
            let outcome = self.outcome(setup, length).context(setup.name)?;
            if setup.shaped && setup.mode == "tc" {
                targets.extend(judge(&outcome));
            }
            let Outcome { voice, down, bulk } = outcome;
            rows.push(Row {
                setup: setup.name,
                voice,
                down,
                bulk,
            });
        }
        Ok(Section {
            bottleneck: self.title,
            rows,
            targets,
        })
    }

    fn outcome(&self, setup: &Setup, length: Duration) -> Result<Outcome> {
        let site = Uplink::new(self.bottleneck)?;
        if let Some(mtu) = self.mtu {
            site.limit_packets(mtu)?;
        }
        if setup.shaped {
            site.shape()?;
        }
        let relay = Relay::attach(&site.office.pbx, "eth0", ["--mode", setup.mode])?;
        site.call(&relay)?;
        let outcome = site.measure(&relay, FLOWS, packets(SETTLING), packets(length))?;
        relay.stop()?;
        Ok(outcome)
    }
}

/// Packets of a phone in so long a time.
fn packets(time: Duration) -> u64 {
    time.div_duration_f64(PACKET_TIME) as u64
}

/// Holds what was measured against the targets.
fn judge(outcome: &Outcome) -> [Target; 3] {
    let voice = (FRAME * 8) as f64 / PACKET_TIME.as_secs_f64();
    let left = ACCESS.uplink as f64 * SHAPED / 100.0 - voice;
    let least = (left * 0.8).ceil();
    let (lost, jitter) = (outcome.voice.lost as f64, outcome.voice.jitter.max);
    [
        Target {
            what: "packets of voice lost, at most",
            measured: lost,
            limit: 0.0,
            met: lost <= 0.0,
        },
        Target {
            what: "highest jitter in ms, below",
            measured: jitter,
            limit: 3.0,
            met: jitter < 3.0,
        },
        Target {
            what: "bulk data in bit/s, at least 80 % of what the voice up the line leaves,",
            measured: outcome.bulk,
            limit: least,
            met: outcome.bulk >= least,
        },
    ]
}

impl fmt::Display for Section {
    /// As Markdown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}:\n\n{}\n", self.bottleneck, table(&self.rows))?;
        for target in &self.targets {
            writeln!(f, "- {target}")?;
        }
        for row in &self.rows {
            let pause = row.voice.pause;
            if pause > HELD_UP {
                let setup = row.setup;
                writeln!(
                    f,
                    "- {setup}: not to be relied on, a busy machine held the phone up for {pause:.0} ms"
                )?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            measured,
            limit,
            met,
        } = self;
        let verdict = if *met { "met" } else { "missed" };
        write!(f, "{what} {limit}: {measured:.1}, {verdict}")
    }
}

/// As Markdown.
fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "",
        "lost",
        "jitter, ms",
        "highest",
        "delay, ms",
        "median",
        "99 %",
        "highest",
        "bulk, kbit/s",
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for row in rows {
        let voice = row.voice;
        let loss = voice.lost as f64 / voice.sent as f64 * 100.0;
        let times = [
            voice.jitter.mean,
            voice.jitter.max,
            voice.delay.mean,
            voice.delay.median,
            voice.delay.p99,
            voice.delay.max,
        ];
        let mut cells = vec![row.setup.to_owned(), format!("{loss:.1} %")];
        cells.extend(times.map(|time| format!("{time:.1}")));
        cells.push(format!("{:.0}", row.bulk / 1000.0));
        table.add_row(cells);
    }
    table
}

fn write(options: &Options, sections: &[Section]) -> Result<()> {
    if let Some(directory) = options.report.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(
        &options.report,
        serde_json::to_string_pretty(sections)? + "\n",
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use relay_tests::transit::Jitter;

    use super::*;

    fn outcome(lost: u64, jitter: f64, bulk: f64) -> Outcome {
        let voice = Transit {
            sent: 100,
            lost,
            jitter: Jitter {
                mean: 0.0,
                max: jitter,
            },
            ..Transit::default()
        };
        Outcome {
            voice,
            down: Transit::default(),
            bulk,
        }
    }

    #[test]
    fn targets_are_met_or_missed() {
        // 950 kbit/s, less 50 packets a second of 214 bytes: 864.4 kbit/s, of which 80 % are 691.52.
        let met = |outcome| judge(&outcome).map(|target| target.met);
        assert_eq!(met(outcome(0, 2.9, 691_520.0)), [true, true, true]);
        assert_eq!(met(outcome(1, 3.0, 691_519.0)), [false, false, false]);
    }

    #[test]
    fn a_verdict_says_what_was_asked() {
        let [lost, jitter, _] = judge(&outcome(2, 1.25, 0.0)).map(|target| target.to_string());
        assert_eq!(lost, "packets of voice lost, at most 0: 2.0, missed");
        assert_eq!(jitter, "highest jitter in ms, below 3: 1.2, met");
    }
}
