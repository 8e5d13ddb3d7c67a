//! Suite `asterisk`: what calls cost a real Asterisk, and how long their packets take, without the relay and with it.

mod calls;
mod echo;

use std::time::Duration;

use anyhow::{Context as _, Result};
use relay_tests::transit::{Delay, Transit};

use self::calls::{Calls, Carrier, Cost, Measured};
use crate::report::{
    Axis, Bar, Bound, Column, Line, Machine, Plot, PlotKind, Report, Row, Spread, Table, Target,
};

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long each measurement lasts without the relay, seconds; with it, twice as long
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Rounds; each measures the same calls without the relay and with it
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// How many calls to measure, up to 500; fewer where 200 are too much for the machine
    #[arg(long, value_delimiter = ',', default_values_t = [0, 25, 50, 100, 200],
        value_parser = clap::value_parser!(u16).range(..=500))]
    calls: Vec<u16>,
}

/// Where the target is, and where delays are compared.
const COMPARED: u16 = 100;
/// How much less CPU it is to be.
const FACTOR: f64 = 25.0;

/// What came of so many calls, round by round.
struct Load {
    calls: u16,
    without: Vec<Measured>,
    with: Vec<Measured>,
    /// The floor of delays, where they are compared.
    floor: Vec<Measured>,
}

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let length = Duration::from_secs(options.seconds.into());
    let mut numbers = options.calls.clone();
    numbers.sort_unstable();
    numbers.dedup();
    let compared = *numbers
        .iter()
        .find(|calls| **calls >= COMPARED)
        .or(numbers.last())
        .context("no calls")?;
    let mut calls = Calls::none()?;
    let mut loads = Vec::new();
    for number in numbers {
        calls.grow(number.into())?;
        let mut load = Load {
            calls: number,
            without: vec![],
            with: vec![],
            floor: vec![],
        };
        for round in 1..=options.rounds {
            eprintln!("{number} calls, round {round} of {} ...", options.rounds);
            load.without.push(calls.measure(Carrier::Asterisk, length)?);
            load.with.push(calls.measure(Carrier::Relay, 2 * length)?);
            if number == compared && number > 0 {
                load.floor.push(calls.measure(Carrier::Echo, length)?);
            }
        }
        loads.push(load);
    }
    let mut tables = vec![cpu(&loads)?, others(&loads)?];
    tables.extend(capacity(&loads)?);
    let mut plots = vec![cpu_plot(&loads)?];
    if let Some(load) = loads.iter().find(|load| !load.floor.is_empty()) {
        tables.push(delays(load)?);
        plots.push(delay_plot(load)?);
    }
    Ok(Report {
        suite: "asterisk".to_owned(),
        title: "Calls through a real Asterisk 22, without the relay and with it".to_owned(),
        command: "cargo xtask bench asterisk".to_owned(),
        machine: Machine::here()?,
        method: method(options),
        tables,
        plots,
        targets: target(&loads)?.into_iter().collect(),
    })
}

fn method(options: &Options) -> Vec<String> {
    vec![
        format!(
            "Calls of G.711 (20 ms, so 100 packets/s each) between phones of the harness, in `native_rtp` bridges of \
             Asterisk; the relay learns them from AMI and attaches in native XDP mode in mid-call. The same calls are \
             measured without it and with it in turns, {} rounds of {} s without and twice as long with it, in which the \
             daemon asks Asterisk about every call once; medians of the rounds. CPU is user and system time of the \
             process, to the nanosecond. With the relay it is Asterisk's and `relay-user`'s together. Every packet is judged by its number: with the relay none may be lost and 95 % must have come \
             from the kernel (Asterisk hears of a phone now and then).",
            options.rounds, options.seconds
        ),
        "Not in it is the kernel's own relaying. On veth a packet is received in the softirq of whoever sends it, here the \
         phones' process, where it counts as theirs, with the relay and without: see the second table. There \
         is what one packet costs the relay as a part of all that the phones do, and suite `wire` has it alone. Nothing is \
         bound to a processor: phones and Asterisk need more than one."
            .to_owned(),
        "Delay is from just before the phone's sending to the kernel's stamp at the receiving socket \
         (`SO_TIMESTAMPNS`). The floor is an XDP program at the same place that swaps MAC addresses, addresses and \
         ports, so that each packet comes back to its phone: there is no quicker way through this veth. Calls a core are \
         extrapolated by a line of least squares through the medians."
            .to_owned(),
    ]
}

/// A figure of all rounds.
fn spread(rounds: &[Measured], figure: impl Fn(&Cost) -> f64) -> Result<Spread> {
    let samples: Vec<_> = rounds
        .iter()
        .map(|measured| figure(&measured.cost))
        .collect();
    Spread::of(&samples).context("no round")
}

fn columns(columns: &[(&str, usize)]) -> Vec<Column> {
    columns
        .iter()
        .map(|(name, decimals)| Column::new(name, *decimals))
        .collect()
}

fn cpu(loads: &[Load]) -> Result<Table> {
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

fn others(loads: &[Load]) -> Result<Table> {
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

fn capacity(loads: &[Load]) -> Result<Option<Table>> {
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

/// Names and measurements of those that a packet may go through.
fn ways(load: &Load) -> [(&'static str, &[Measured]); 3] {
    [
        ("floor: XDP, back to the phone", &load.floor),
        ("the relay", &load.with),
        ("Asterisk", &load.without),
    ]
}

/// A delay in µs, of all rounds.
fn delay(rounds: &[Measured], figure: fn(&Delay) -> f64) -> Result<Spread> {
    let samples: Vec<_> = rounds
        .iter()
        .map(|measured| figure(&measured.transit.delay) * 1000.0)
        .collect();
    Spread::of(&samples).context("no round")
}

fn delays(load: &Load) -> Result<Table> {
    let figures: [fn(&Delay) -> f64; 4] = [
        |delay| delay.median,
        |delay| delay.p99,
        |delay| delay.p999,
        |delay| delay.max,
    ];
    let floor = figures.map(|figure| delay(&load.floor, figure).map(|spread| spread.median));
    let rows: Result<Vec<_>> = ways(load)
        .into_iter()
        .map(|(name, rounds)| {
            let mut cells = Vec::new();
            for figure in figures {
                cells.push(Some(delay(rounds, figure)?.median));
            }
            for (figure, floor) in figures.iter().zip(&floor).take(3) {
                let floor = floor.as_ref().ok();
                cells.push(Some(
                    delay(rounds, *figure)?.median - floor.context("no floor")?,
                ));
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
            ("p50", 0),
            ("p99", 0),
            ("p99.9", 0),
            ("highest", 0),
            ("added p50", 0),
            ("p99", 0),
            ("p99.9", 0),
            ("packets", 0),
            ("lost", 0),
        ]),
        rows: rows?,
    })
}

fn cpu_plot(loads: &[Load]) -> Result<Plot> {
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

fn delay_plot(load: &Load) -> Result<Plot> {
    let mut bars = Vec::new();
    for (name, rounds) in ways(load) {
        let figures: [(_, fn(&Delay) -> f64); 3] = [
            ("p50", |delay| delay.median),
            ("p99", |delay| delay.p99),
            ("p99.9", |delay| delay.p999),
        ];
        for (which, figure) in figures {
            let spread = delay(rounds, figure)?;
            bars.push(Bar {
                name: format!("{name}, {which}"),
                value: spread.median,
                lowest: spread.lowest,
                highest: spread.highest,
            });
        }
    }
    Ok(Plot {
        file: "asterisk-delay".to_owned(),
        title: format!("A packet from phone to phone, with {} calls", load.calls),
        kind: PlotKind::Bars {
            axis: "µs (median, lowest and highest round)".to_owned(),
            bars,
        },
    })
}

/// None where other numbers of calls were asked for.
fn target(loads: &[Load]) -> Result<Option<Target>> {
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
