//! Suite `qos`: what a saturated uplink does to a call, without shaping and with it.
//!
//! Four greedy TCP flows of the relay's host fill an uplink of 1 Mbit/s, and a call between the office and behind the
//! uplink goes through the relay, offloaded.

use std::time::Duration;

use anyhow::{Context as _, Result};
use relay_tests::{
    phone::PACKET_TIME,
    relay::Relay,
    transit::Transit,
    uplink::{ACCESS, Bottleneck, Outcome, Uplink},
};

use crate::report::{
    Bar, Bound, Column, Machine, Plot, PlotKind, Report, Row, Table, Target, grouped,
};

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long to measure each way, seconds
    #[arg(long, default_value_t = 45, value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
}

/// TCP flows beside the call.
const FLOWS: usize = 4;
/// Until the flows have found their rate.
const SETTLING: Duration = Duration::from_secs(5);
/// Bytes of a packet of the call on the wire: Ethernet, IPv4, UDP and RTP headers, and 20 ms of G.711.
const FRAME: usize = 14 + 20 + 8 + 12 + 160;
/// What `qos apply` shapes an uplink to, percent.
const SHAPED: f64 = 95.0;

/// Bytes of the longest packet without an MTU of the route.
const LONGEST: u16 = 1500;

/// Where it is compared.
const SCENES: [Scene; 3] = [
    Scene {
        name: "HTB",
        title: "HTB with a plain queue of 64 packets",
        bottleneck: Bottleneck::Htb,
        mtu: None,
        setups: &SETUPS,
    },
    Scene {
        name: "line",
        title: "A line that sends one packet after the other, behind a queue of 64",
        bottleneck: Bottleneck::Line,
        mtu: None,
        setups: &SETUPS,
    },
    Scene {
        name: "line, MTU 1000",
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
    /// In a few letters.
    name: &'static str,
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

/// What a setup did in a scene.
struct Measured {
    scene: &'static Scene,
    setup: &'static Setup,
    outcome: Outcome,
}

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let length = Duration::from_secs(options.seconds.into());
    let mut all = Vec::new();
    for scene in &SCENES {
        for setup in scene.setups {
            eprintln!("{}: {} ...", scene.title, setup.name);
            let outcome = scene.outcome(setup, length);
            let outcome = outcome.with_context(|| format!("{}: {}", scene.title, setup.name))?;
            all.push(Measured {
                scene,
                setup,
                outcome,
            });
        }
    }
    let mut tables: Vec<_> = SCENES.iter().map(|scene| scene.table(&all)).collect();
    tables.push(down(&all));
    Ok(Report {
        suite: "qos".to_owned(),
        title: "A call on a saturated uplink, without shaping and with it".to_owned(),
        command: "cargo xtask bench qos".to_owned(),
        machine: Machine::here()?,
        method: method(options.seconds),
        tables,
        plots: vec![plot(&all)],
        targets: all.iter().flat_map(Measured::targets).collect(),
    })
}

fn method(seconds: u16) -> Vec<String> {
    vec![
        format!(
            "An uplink of {} kbit/s is filled by {FLOWS} greedy TCP flows of the relay's host. A call of {seconds} s \
             between a phone in the office and one behind the uplink goes through the relay, offloaded. `qos apply` \
             shapes the uplink to {SHAPED} % of what it carries. The tables are of the voice up the line, where the \
             flows go too.",
            ACCESS.uplink / 1000,
        ),
        "Jitter is RFC 3550's estimate (section 6.4.1), its mean and its highest value; delay is one way. A busy \
         machine holds the phone up, which then sends at once what was due, as no phone does: a row in which it was \
         held up for more than 100 ms is not to be relied on."
            .to_owned(),
    ]
}

impl Scene {
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

    fn table(&self, all: &[Measured]) -> Table {
        let own = all
            .iter()
            .filter(|measured| measured.scene.name == self.name);
        Table {
            title: self.title.to_owned(),
            of: "relay".to_owned(),
            columns: columns([Column::new("bulk, kbit/s", 0)]),
            rows: own
                .map(|Measured { setup, outcome, .. }| Row {
                    name: setup.name.to_owned(),
                    cells: cells(&outcome.voice, [outcome.bulk / 1000.0]),
                })
                .collect(),
        }
    }

    /// Why a packet of voice waits although it goes first.
    fn obstacle(&self) -> Option<String> {
        let longest = self.mtu.unwrap_or(LONGEST);
        let time = f64::from(longest) * 8000.0 / ACCESS.uplink as f64;
        (self.bottleneck == Bottleneck::Line).then(|| {
            format!(
                "a packet that is on the line already is not taken back, and {} bytes take it {time:.0} ms",
                grouped(longest.into(), 0)
            )
        })
    }
}

/// Packets of a phone in so long a time.
fn packets(time: Duration) -> u64 {
    time.div_duration_f64(PACKET_TIME) as u64
}

/// Of a table about voice, and more.
fn columns<const MORE: usize>(more: [Column; MORE]) -> Vec<Column> {
    let columns = [
        ("lost, %", 1),
        ("jitter, ms", 1),
        ("highest", 1),
        ("delay, ms", 1),
        ("median", 1),
        ("99 %", 1),
        ("highest", 1),
        ("phone held up, ms", 0),
    ];
    columns
        .into_iter()
        .map(|(name, decimals)| Column::new(name, decimals))
        .chain(more)
        .collect()
}

fn cells<const MORE: usize>(voice: &Transit, more: [f64; MORE]) -> Vec<Option<f64>> {
    [
        voice.lost as f64 / voice.sent as f64 * 100.0,
        voice.jitter.mean,
        voice.jitter.max,
        voice.delay.mean,
        voice.delay.median,
        voice.delay.p99,
        voice.delay.max,
        voice.pause,
    ]
    .into_iter()
    .chain(more)
    .map(Some)
    .collect()
}

/// The other direction, whose way is free.
fn down(all: &[Measured]) -> Table {
    Table {
        title: "Down the line, where only the call goes and the flows' acknowledgements".to_owned(),
        of: "relay".to_owned(),
        columns: columns([]),
        rows: all
            .iter()
            .map(|measured| Row {
                name: measured.name(),
                cells: cells(&measured.outcome.down, []),
            })
            .collect(),
    }
}

fn plot(all: &[Measured]) -> Plot {
    let bars = all.iter().map(|measured| {
        let delay = measured.outcome.voice.delay;
        Bar {
            name: measured.name(),
            value: delay.p99,
            lowest: delay.median,
            highest: delay.max,
        }
    });
    Plot {
        file: "qos-delay".to_owned(),
        title: "Voice up a saturated line: median, 99th percentile (bar) and highest delay"
            .to_owned(),
        kind: PlotKind::Bars {
            axis: "ms from phone to phone".to_owned(),
            bars: bars.collect(),
        },
    }
}

impl Measured {
    fn name(&self) -> String {
        format!("{}: {}", self.scene.name, self.setup.name)
    }

    /// What shaping is for.
    fn targets(&self) -> Vec<Target> {
        if !self.setup.shaped || self.setup.mode != "tc" {
            return vec![];
        }
        let voice = (FRAME * 8) as f64 / PACKET_TIME.as_secs_f64();
        let left = ACCESS.uplink as f64 * SHAPED / 100.0 - voice;
        let Outcome {
            voice, ref bulk, ..
        } = self.outcome;
        let target = |what, bound, measured, decimals, obstacle| Target {
            what: format!("{}: {what}", self.name()),
            bound,
            measured,
            decimals,
            obstacle,
        };
        vec![
            target(
                "packets of voice lost",
                Bound::AtMost(0.0),
                voice.lost as f64,
                0,
                None,
            ),
            target(
                "highest jitter, ms",
                Bound::AtMost(3.0),
                voice.jitter.max,
                1,
                self.scene.obstacle(),
            ),
            target(
                "bulk data, % of what the voice up the line leaves",
                Bound::AtLeast(80.0),
                bulk / left * 100.0,
                1,
                None,
            ),
        ]
    }
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
        let met = |lost, jitter, bulk| {
            let measured = Measured {
                scene: &SCENES[1],
                setup: &SETUPS[1],
                outcome: outcome(lost, jitter, bulk),
            };
            let targets = measured.targets();
            targets.iter().map(Target::is_met).collect::<Vec<_>>()
        };
        // 950 kbit/s, less 50 packets a second of 214 bytes: 864.4 kbit/s, of which 80 % are 691.52.
        assert_eq!(met(0, 3.0, 691_521.0), [true, true, true]);
        assert_eq!(met(1, 3.1, 691_519.0), [false, false, false]);
    }

    #[test]
    fn only_a_line_holds_on_to_its_packet() {
        let times = SCENES.each_ref().map(|scene| {
            let text = scene.obstacle()?;
            text.split_once("take it ").map(|(_, time)| time.to_owned())
        });
        assert_eq!(
            times.map(|time| time.unwrap_or_default()),
            ["", "12 ms", "8 ms"]
        );
    }
}
