//! Suite `wire`: packets per second without loss, and CPU time for each packet, over veth, beside other ways to relay.

pub(crate) mod call;
pub(crate) mod cpu;
mod findings;
mod relays;
mod search;
mod subject;
mod traffic;

use anyhow::Result;

use crate::report::Report;
use findings::Found;
use traffic::Load;

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Calls; each is two streams
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=128))]
    calls: u16,
    /// Rounds; each measures every relay at every load, so that what disturbs the machine disturbs all alike
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// The CPU of the generator and the receiver.
const PHONES_CPU: usize = 0;
/// The CPU of the relay.
const RELAY_CPU: usize = 1;

/// At what CPU time is measured, and how that is called.
const LOADS: [(Load, &str); 4] = [
    (Load::even(5e3), "5 kpps"),
    (Load::even(20e3), "20 kpps"),
    (BURSTS, "20 kpps, 16 at once"),
    (Load::even(50e3), "50 kpps"),
];
/// As many packets at once as a NIC that moderates its interrupts hands over.
const BURSTS: Load = Load {
    rate: 20e3,
    burst: 16,
};

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut subjects = relays::all(options.calls)?;
    let mut found: Vec<_> = subjects.iter().map(Found::new).collect();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        for (subject, found) in subjects.iter_mut().zip(&mut found) {
            for ((load, _), samples) in LOADS.iter().zip(&mut found.costs) {
                if let Some(cost) = subject.cost(*load)? {
                    samples.push(cost.per_packet);
                }
            }
            if let Some(best) = subject.loss_free(found.rates.last().copied())? {
                found.rates.push(best.rate);
                found.shares.push(100.0 * best.share());
            }
        }
    }
    for (subject, found) in subjects.iter().zip(&mut found) {
        found.share_in_kernel = subject.share_in_kernel()?;
    }
    findings::report(&found, options)
}
