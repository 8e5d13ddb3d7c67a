//! `RESULTS.md`, made of what all suites have found.

use anyhow::{Context as _, Result};

use crate::report::{Report, Target, grouped, markdown};

/// What comes first.
const ABOUT: &str = "\
# Results

What `cargo xtask bench` has found. It is written by that command, from the figures in [`report`](report) and from
[`tried.md`](tried.md): do not edit it.

| command | does |
|---|---|
| `cargo xtask bench` | measures everything, suite after suite, each in some five minutes at most |
| `cargo xtask bench SUITE` | measures one of them; `--help` has its options |
| `cargo xtask bench report` | draws and writes all of this anew from the figures, and measures nothing |
| `cargo xtask bench --check` | counts the datapath's instructions again, and fails where they are more |

It needs root, installs what it needs, and works in network namespaces of its own. Run it on a machine that does nothing
else. Times differ from machine to machine; what is compared has therefore been measured in the same run, in turns, and
the targets are ratios wherever that makes sense. Lowest and highest are those of all rounds.
";

/// Writes it. `tried` is its last section, as written by hand.
///
/// The same reports make the same text.
pub(crate) fn document(reports: &[Report], tried: &str) -> String {
    let mut text = ABOUT.to_owned();
    text += "\n## Targets\n\n";
    let targets = reports
        .iter()
        .flat_map(|report| report.targets.iter().map(|target| (&report.suite, target)));
    text += &markdown(
        ["what", "suite", "target", "measured", ""].into_iter(),
        targets.map(|(suite, target)| row(suite, target)),
        2..4,
    );
    text += "\n";
    for report in reports {
        section(&mut text, report);
    }
    text + "\n" + tried
}

/// The lines of `README.md` that its figures stand between.
const QUOTED: [&str; 2] = [
    "<!-- cargo xtask bench writes from here -->\n",
    "<!-- to here -->\n",
];

/// `README.md` with the figures of the targets that speed has.
///
/// # Errors
/// It has no place for them.
pub(crate) fn quote(readme: &str, reports: &[Report]) -> Result<String> {
    let [begin, end] = QUOTED;
    let parts = readme
        .split_once(begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let (before, after) = parts.context("README.md has no place for figures")?;
    // What becomes of voice in a queue is docs/qos.md's.
    let of_speed = reports.iter().filter(|report| report.suite != "qos");
    let targets = of_speed.flat_map(|report| &report.targets);
    let rows = targets.map(|target| {
        vec![
            target.what.clone(),
            target.bound.to_string(),
            grouped(target.measured, target.decimals),
        ]
    });
    let table = markdown(["what", "target", "measured"].into_iter(), rows, 1..3);
    Ok(format!("{before}{begin}\n{table}\n\n{end}{after}"))
}

fn row(suite: &str, target: &Target) -> Vec<String> {
    let verdict = match (&target.obstacle, target.is_met()) {
        (_, true) => "met".to_owned(),
        (Some(obstacle), false) => format!("missed: {obstacle}"),
        (None, false) => "missed".to_owned(),
    };
    vec![
        target.what.clone(),
        format!("[{suite}](#{suite})"),
        target.bound.to_string(),
        grouped(target.measured, target.decimals),
        verdict,
    ]
}

fn section(text: &mut String, report: &Report) {
    let Report {
        suite,
        title,
        command,
        machine,
        method,
        tables,
        plots,
        ..
    } = report;
    *text += &format!("\n## {suite}\n\n{title}.\n\n`{command}` on {machine}.\n");
    for paragraph in method {
        *text += &format!("\n{paragraph}\n");
    }
    for table in tables {
        *text += &format!("\n**{}**\n\n{}\n", table.title, table.markdown());
    }
    for plot in plots {
        let file = format!("report/{}", plot.file);
        *text += &format!("\n[![{}]({file}.png)]({file}.svg)\n", plot.title);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Bound, Column, Machine, Plot, PlotKind, Row, Table};

    fn target(measured: f64, obstacle: Option<&str>) -> Target {
        Target {
            what: "ours ÷ floor".to_owned(),
            bound: Bound::AtMost(2.5),
            measured,
            decimals: 2,
            obstacle: obstacle.map(str::to_owned),
        }
    }

    #[test]
    fn a_target_is_met_or_says_what_stops_it() {
        let verdict = |target| row("wire", &target).pop().expect("a verdict");
        assert_eq!(verdict(target(2.5, Some("the clock"))), "met");
        assert_eq!(verdict(target(2.6, Some("the clock"))), "missed: the clock");
        assert_eq!(verdict(target(2.6, None)), "missed");
    }

    #[test]
    fn the_readme_quotes_what_was_found() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/report");
        let reports = crate::reports(folder.as_ref()).expect("reports");
        let readme = include_str!("../../README.md");
        assert_eq!(quote(readme, &reports).expect("a place"), readme);
        assert!(quote("", &reports).is_err());
    }

    #[test]
    fn all_that_was_found_is_in_it() {
        let report = Report {
            suite: "wire".to_owned(),
            title: "Over a cable".to_owned(),
            command: "cargo xtask bench wire".to_owned(),
            machine: Machine {
                kernel: "6.18".to_owned(),
                processor: "a processor".to_owned(),
                processors: 2,
            },
            method: vec!["By counting.".to_owned()],
            tables: vec![Table {
                title: "Packets".to_owned(),
                of: "relay".to_owned(),
                columns: vec![Column::new("ns|packet", 1)],
                rows: vec![Row {
                    name: "ours".to_owned(),
                    cells: vec![Some(1234.56)],
                }],
            }],
            plots: vec![Plot {
                file: "wire-rate".to_owned(),
                title: "Rate".to_owned(),
                kind: PlotKind::Bars {
                    axis: "packets/s".to_owned(),
                    bars: vec![],
                },
            }],
            targets: vec![target(2.0, None)],
        };
        let text = document(&[report], "## What was tried\n");
        for part in [
            "| ours ÷ floor | [wire](#wire) |  ≤ 2.5 |     2.00 | met |",
            "## wire\n\nOver a cable.\n\n`cargo xtask bench wire` on 2 × a processor, Linux 6.18.\n\nBy counting.\n",
            "**Packets**\n\n| relay | ns\\|packet |\n",
            "| ours  |    1,234.6 |\n",
            "[![Rate](report/wire-rate.png)](report/wire-rate.svg)\n\n## What was tried\n",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
    }
}
