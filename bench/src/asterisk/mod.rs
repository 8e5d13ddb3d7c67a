//! Suite `asterisk`: what calls cost a real Asterisk, and how long their packets take, without the relay and with it.

mod calls;
mod cpu;
mod delay;
mod echo;

use std::time::Duration;

use anyhow::{Context as _, Result};
use relay_user::ami::tracker::PROVEN_POLL;

use self::calls::{ATTEMPTS, Calls, Carrier, Measured, OFFLOADED};
use crate::report::{Column, Machine, Report};

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
    let mut tables = vec![cpu::table(&loads)?, cpu::others(&loads)?];
    tables.extend(cpu::capacity(&loads)?);
    let mut plots = vec![cpu::plot(&loads)?];
    if let Some(load) = loads.iter().find(|load| !load.floor.is_empty()) {
        tables.push(delay::table(load)?);
        plots.push(delay::plot(load)?);
    }
    Ok(Report {
        suite: "asterisk".to_owned(),
        title: "Calls through a real Asterisk 22, without the relay and with it".to_owned(),
        command: "cargo xtask bench asterisk".to_owned(),
        machine: Machine::here()?,
        method: method(options),
        tables,
        plots,
        targets: cpu::target(&loads)?.into_iter().collect(),
    })
}

fn method(options: &Options) -> Vec<String> {
    vec![
        format!(
            "Calls of G.711 (20 ms, so 100 packets/s each) between phones of the harness, in `native_rtp` bridges of \
             Asterisk; the relay learns them from AMI, and is attached in native XDP mode in mid-call. The same calls \
             are measured without it and with it in turns, {} rounds of {} s without and twice as long with it; figures \
             are medians of the rounds. The daemon asks Asterisk about every call once in {} s, and about one after the \
             other, so that each measurement has its share of these questions. Every packet is \
             judged by its number: with the relay none may be lost, and {:.0} % must come from the kernel. Where the \
             machine was too busy for that, it is measured again, {ATTEMPTS} times in all.",
            options.rounds,
            options.seconds,
            PROVEN_POLL.as_secs(),
            OFFLOADED * 100.0
        ),
        "CPU is user and system time of the process, in nanoseconds; with the relay that of Asterisk and of \
         `relay-user` together. The kernel's own relaying is not in it: on veth a packet is received in the softirq of \
         its sender, which here is the phones' process, without the relay and with it (second table). What one packet \
         costs there is what suite `wire` measures. Nothing is bound to a processor, for Asterisk and the phones need \
         more than one each. Calls a core are extrapolated by a line of least squares through the medians."
            .to_owned(),
        "Delay is from just before a phone sends to the kernel's stamp at the other's socket (`SO_TIMESTAMPNS`). The \
         floor is an XDP program at the relay's place that swaps MAC addresses, IP addresses and ports, so that each \
         packet comes back to its phone: there is no shorter way through this veth."
            .to_owned(),
    ]
}

fn columns(columns: &[(&str, usize)]) -> Vec<Column> {
    columns
        .iter()
        .map(|(name, decimals)| Column::new(name, *decimals))
        .collect()
}
