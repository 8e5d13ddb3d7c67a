//! The CPU that calls take, and how many a core has room for.

use anyhow::{Context as _, Result};

use super::{
    COMPARED, Load,
    calls::{Cost, Measured},
    columns,
};
use crate::report::{Axis, Bound, Line, Plot, PlotKind, Row, Spread, Table, Target};

/// How much less CPU it is to be with the relay.
const FACTOR: f64 = 25.0;

/// A figure of all rounds.
fn spread(rounds: &[Measured], figure: impl Fn(&Cost) -> f64) -> Result<Spread> {
    let samples: Vec<_> = rounds
        .iter()
        .map(|measured| figure(&measured.cost))
        .collect();
    Spread::of(&samples).context("no round")
}

pub(super) fn table(loads: &[Load]) -> Result<Table> {
    let rows: Result<Vec<_>> = loads
        .iter()
        .map(|load| {
            let without = spread(&load.without, Cost::relaying)?;
            let with = spread(&load.with, Cost::relaying)?;
            let relay = spread(&load.with, |cost| cost.relay)?;
            let cells = [
                without.median,
                without.lowest,
                without.highest,
                with.median,
                with.lowest,
                with.highest,
                relay.median,
                without.median / with.median,
            ];
            Ok(Row {
                name: load.calls.to_string(),
                cells: cells.map(Some).to_vec(),
            })
        })
        .collect();
    Ok(Table {
        title: "CPU of Asterisk, and of the relay's daemon with it, in percent of one core"
            .to_owned(),
        of: "calls".to_owned(),
        columns: columns(&[
            ("without", 1),
            ("lowest", 1),
            ("highest", 1),
            ("with", 2),
            ("lowest", 2),
            ("highest", 2),
            ("daemon's part", 2),
            ("without ÷ with", 1),
        ]),
        rows: rows?,
    })
}

pub(super) fn others(loads: &[Load]) -> Result<Table> {
    let rows: Result<Vec<_>> = loads
        .iter()
        .map(|load| {
            let mut cells = Vec::new();
            for figure in [|cost: &Cost| cost.phones, |cost: &Cost| cost.machine] {
                for rounds in [&load.without, &load.with, &load.floor] {
                    let has = !rounds.is_empty();
                    cells.push(has.then(|| spread(rounds, figure)).transpose()?);
                }
            }
            Ok(Row {
                name: load.calls.to_string(),
                cells: cells
                    .into_iter()
                    .map(|cell| cell.map(|spread| spread.median))
                    .collect(),
            })
        })
        .collect();
    Ok(Table {
        title: "CPU of the phones' process, and of the whole machine, in percent of one core"
            .to_owned(),
        of: "calls".to_owned(),
        columns: columns(&[
            ("phones, without", 1),
            ("with", 1),
            ("floor", 1),
            ("machine, without", 1),
            ("with", 1),
            ("floor", 1),
        ]),
        rows: rows?,
    })
}

/// A line of least squares: its value at zero, and its slope. None through fewer than two places.
fn line(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let both: f64 = points
        .iter()
        .map(|point| (point.0 - x) * (point.1 - y))
        .sum();
    let square: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    let slope = both / square;
    slope.is_finite().then_some((y - slope * x, slope))
}

pub(super) fn capacity(loads: &[Load]) -> Result<Option<Table>> {
    let mut rows = Vec::new();
    for (name, rounds) in [
        ("Asterisk", (|load| &load.without) as fn(&Load) -> &Vec<_>),
        ("Asterisk and the relay's daemon", |load| &load.with),
    ] {
        let points: Result<Vec<_>> = loads
            .iter()
            .map(|load| {
                let cost = spread(rounds(load), Cost::relaying)?;
                Ok((f64::from(load.calls), cost.median))
            })
            .collect();
        let Some((none, call)) = line(&points?) else {
            return Ok(None);
        };
        let cells = [none, call, (100.0 - none) / call];
        rows.push(Row {
            name: name.to_owned(),
            cells: cells.map(Some).to_vec(),
        });
    }
    Ok(Some(Table {
        title: "Calls a core, extrapolated".to_owned(),
        of: "CPU of".to_owned(),
        columns: columns(&[("% with no call", 2), ("% a call", 4), ("calls a core", 0)]),
        rows,
    }))
}

pub(super) fn plot(loads: &[Load]) -> Result<Plot> {
    let line = |name: &str, rounds: fn(&Load) -> &Vec<Measured>| -> Result<Line> {
        let points: Result<Vec<_>> = loads
            .iter()
            .map(|load| {
                let cost = spread(rounds(load), Cost::relaying)?;
                Ok([f64::from(load.calls), cost.median])
            })
            .collect();
        Ok(Line {
            name: name.to_owned(),
            points: points?,
        })
    };
    let axis = |name: &str| Axis {
        name: name.to_owned(),
        is_logarithmic: false,
    };
    Ok(Plot {
        file: "asterisk-cpu".to_owned(),
        title: "CPU of a real Asterisk".to_owned(),
        kind: PlotKind::Lines {
            x: axis("calls"),
            y: axis("% of one core"),
            lines: vec![
                line("Asterisk", |load| &load.without)?,
                line("Asterisk and the relay's daemon", |load| &load.with)?,
            ],
        },
    })
}

/// None where other numbers of calls were asked for.
pub(super) fn target(loads: &[Load]) -> Result<Option<Target>> {
    let Some(load) = loads.iter().find(|load| load.calls == COMPARED) else {
        return Ok(None);
    };
    let without = spread(&load.without, Cost::relaying)?.median;
    let with = spread(&load.with, Cost::relaying)?.median;
    let measured = without / with;
    let obstacle = if measured < FACTOR {
        let asterisk = spread(&load.with, |cost| cost.asterisk)?.median;
        let relay = spread(&load.with, |cost| cost.relay)?.median;
        let idle = loads.iter().find(|load| load.calls == 0);
        let idle = idle.map(|load| spread(&load.without, |cost| cost.asterisk));
        let idle = idle.transpose()?.map_or_else(String::new, |idle| {
            format!(
                ", which alone and without a call takes {:.2} %",
                idle.median
            )
        });
        Some(format!(
            "what is left is {relay:.2} % of a core for the daemon and {asterisk:.2} % for Asterisk{idle}"
        ))
    } else {
        None
    };
    Ok(Some(Target {
        what: format!("real Asterisk at {COMPARED} calls, CPU without ÷ with us"),
        bound: Bound::AtLeast(FACTOR),
        measured,
        decimals: 1,
        obstacle,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_least_squares_goes_through_its_points() {
        let (none, call) = line(&[(0.0, 1.0), (10.0, 3.0), (20.0, 5.0)]).expect("a line");
        assert!((none - 1.0).abs() < 1e-9 && (call - 0.2).abs() < 1e-9);
        assert_eq!(line(&[(5.0, 1.0)]), None);
        assert_eq!(line(&[]), None);
    }
}
