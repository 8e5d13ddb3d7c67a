//! The time that a packet takes from phone to phone.

use anyhow::{Context as _, Result};
use relay_tests::transit::{Delay, Transit};

use super::{Load, calls::Measured, columns};
use crate::report::{Axis, Line, Plot, PlotKind, Row, Spread, Table};

/// One of the figures of a delay.
type Figure = fn(&Delay) -> f64;

/// Those that are compared with the floor's.
const FIGURES: [(&str, Figure); 3] = [
    ("p50", |delay| delay.median),
    ("p99", |delay| delay.p99),
    ("p99.9", |delay| delay.p999),
];

/// Names and measurements of those that a packet may go through.
fn ways(load: &Load) -> [(&'static str, &[Measured]); 3] {
    [
        ("floor: XDP, back to the phone", &load.floor),
        ("the relay", &load.with),
        ("Asterisk", &load.without),
    ]
}

/// A delay in µs, of all rounds.
fn delay(rounds: &[Measured], figure: Figure) -> Result<Spread> {
    let samples: Vec<_> = rounds
        .iter()
        .map(|measured| figure(&measured.transit.delay) * 1000.0)
        .collect();
    Spread::of(&samples).context("no round")
}

pub(super) fn table(load: &Load) -> Result<Table> {
    let rows: Result<Vec<_>> = ways(load)
        .into_iter()
        .map(|(name, rounds)| {
            let mut cells = Vec::new();
            for (_, figure) in FIGURES {
                cells.push(Some(delay(rounds, figure)?.median));
            }
            cells.push(Some(delay(rounds, |delay| delay.max)?.highest));
            for (_, figure) in FIGURES {
                let added = delay(rounds, figure)?.median - delay(&load.floor, figure)?.median;
                cells.push(Some(added));
            }
            let count = |figure: fn(&Transit) -> u64| -> f64 {
                rounds.iter().map(|it| figure(&it.transit) as f64).sum()
            };
            cells.push(Some(count(|transit| transit.sent)));
            cells.push(Some(count(|transit| transit.lost)));
            Ok(Row {
                name: name.to_owned(),
                cells,
            })
        })
        .collect();
    Ok(Table {
        title: format!(
            "Delay of a packet from phone to phone with {} calls, µs, and what is added to the floor's",
            load.calls
        ),
        of: "through".to_owned(),
        columns: columns(&[
            ("p50", 1),
            ("p99", 0),
            ("p99.9", 0),
            ("highest", 0),
            ("added p50", 1),
            ("p99", 0),
            ("p99.9", 0),
            ("packets", 0),
            ("lost", 0),
        ]),
        rows: rows?,
    })
}

pub(super) fn plot(load: &Load) -> Result<Plot> {
    /// One packet in so many takes longer.
    const RARITIES: [f64; 3] = [2.0, 100.0, 1000.0];
    let mut lines = Vec::new();
    for (name, rounds) in ways(load) {
        let mut points = Vec::new();
        for (rarity, (_, figure)) in RARITIES.into_iter().zip(FIGURES) {
            points.push([rarity, delay(rounds, figure)?.median]);
        }
        lines.push(Line {
            name: name.to_owned(),
            points,
        });
    }
    let axis = |name: &str| Axis {
        name: name.to_owned(),
        is_logarithmic: true,
    };
    Ok(Plot {
        file: "asterisk-delay".to_owned(),
        title: format!(
            "Delay of a packet from phone to phone, with {} calls",
            load.calls
        ),
        kind: PlotKind::Lines {
            x: axis("one packet in so many takes longer (2: p50, 100: p99, 1,000: p99.9)"),
            y: axis("µs"),
            lines,
        },
    })
}
