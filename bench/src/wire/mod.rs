//! Suite `wire`: packets per second without loss, and CPU time for each packet, over veth, beside other ways to relay.

pub(crate) mod call;
pub(crate) mod cpu;
mod search;
mod subject;
mod traffic;

use std::time::Duration;

use anyhow::Result;

use crate::report::{Machine, Report};

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Calls; each is two streams
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=128))]
    calls: u16,
    /// Rounds; each measures every relay at every rate
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// The CPU of the generator and the receiver.
const PHONES_CPU: usize = 0;
/// The CPU of the relay.
const RELAY_CPU: usize = 1;

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut subjects = subject::all(options.calls)?;
    for subject in &mut subjects {
        for rate in [
            5e3, 20e3, 50e3, 100e3, 200e3, 400e3, 600e3, 800e3, 1000e3, 1500e3,
        ] {
            let before = subject.cpu_time()?;
            let trial = subject
                .traffic
                .run(rate, Duration::from_millis(500), PHONES_CPU)?;
            let used = subject.cpu_time()? - before;
            println!(
                "{:30} {:>9.0} {:>9.0} {:>9.0} ns  lost {:>8} {:?}",
                subject.name,
                rate,
                trial.rate(),
                used.as_nanos() as f64 / trial.sent as f64,
                trial.sent as i64 - trial.received.right as i64,
                trial.received,
            );
            if trial.rate() < 0.9 * rate {
                break;
            }
        }
    }
    Ok(Report {
        suite: "wire".to_owned(),
        title: String::new(),
        command: String::new(),
        machine: Machine::here()?,
        method: vec![],
        tables: vec![],
        plots: vec![],
        targets: vec![],
    })
}
