//! Suite `qos`: what a saturated uplink does to a call, without shaping and with it.
//!
//! The line is [`Access::DSL`]: 1 Mbit/s that sends one packet after the other. Four greedy TCP flows of the relay's host
//! fill it, and a call between the office and behind the line goes through the relay, offloaded.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use relay_tests::{
    line::Access,
    phone::PACKET_TIME,
    relay::{self, Relay},
    transit::Transit,
    uplink::{Outcome, Uplink},
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

/// What is compared.
const SETUPS: [Setup; 4] = [
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

struct Setup {
    name: &'static str,
    /// `--mode` of the relay.
    mode: &'static str,
    /// Whether `qos apply` has shaped the interface.
    shaped: bool,
}

/// A row of the report.
#[derive(Serialize)]
struct Row {
    setup: &'static str,
    /// Times in ms.
    voice: Transit,
    /// Payload of the TCP flows, bit/s.
    bulk: f64,
}

/// Measures and prints.
pub(crate) fn run(options: &Options) -> Result<()> {
    let length = Duration::from_secs(options.seconds.into());
    let rows = SETUPS
        .iter()
        .map(|setup| {
            eprintln!("{} ...", setup.name);
            setup.measure(length).with_context(|| setup.name)
        })
        .collect::<Result<Vec<_>>>()?;
    println!("{}", table(&rows));
    write(options, &rows).with_context(|| format!("cannot write {}", options.report.display()))
}

impl Setup {
    fn measure(&self, length: Duration) -> Result<Row> {
        let site = Uplink::new(Access::DSL)?;
        let pbx = &site.office.pbx;
        if self.shaped {
            let mut command = Command::new(relay::binary("relay-user", "RELAY_USER_BIN")?);
            let uplink = format!("{}bit", Access::DSL.uplink);
            command.args(["qos", "apply", "eth0", "--uplink", &uplink]);
            pbx.output(command)?;
        }
        let relay = Relay::attach(pbx, "eth0", ["--mode", self.mode])?;
        site.call(&relay)?;
        let Outcome { voice, bulk } =
            site.measure(&relay, FLOWS, packets(SETTLING), packets(length))?;
        relay.stop()?;
        Ok(Row {
            setup: self.name,
            voice,
            bulk,
        })
    }
}

/// Packets of a phone in so long a time.
fn packets(time: Duration) -> u64 {
    time.div_duration_f64(PACKET_TIME) as u64
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
    for Row { setup, voice, bulk } in rows {
        let loss = voice.lost as f64 / voice.sent as f64 * 100.0;
        let times = [
            voice.jitter.mean,
            voice.jitter.max,
            voice.delay.mean,
            voice.delay.median,
            voice.delay.p99,
            voice.delay.max,
        ];
        let mut cells = vec![(*setup).to_owned(), format!("{loss:.1} %")];
        cells.extend(times.map(|time| format!("{time:.1}")));
        cells.push(format!("{:.0}", bulk / 1000.0));
        table.add_row(cells);
    }
    table
}

fn write(options: &Options, rows: &[Row]) -> Result<()> {
    if let Some(directory) = options.report.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&options.report, serde_json::to_string_pretty(rows)? + "\n")?;
    Ok(())
}
