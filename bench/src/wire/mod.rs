//! Suite `wire`: packets per second without loss, and CPU time for each packet, over veth, beside other ways to relay.

pub(crate) mod call;
pub(crate) mod cpu;
mod findings;
mod own;
mod relays;
mod sample;
mod search;
mod subject;
mod traffic;

use std::time::Duration;

use anyhow::Result;

use crate::report::Report;
use findings::Found;
use sample::Sample;
use subject::Subject;
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

/// At what CPU time is measured, for how long, and how that is called.
const LOADS: [(Load, Duration, &str); 4] = [
    (Load::even(5e3), SHORT, "5 kpps"),
    (Load::even(20e3), SHORT, "20 kpps"),
    (BURSTS, WHOLE, "20 kpps, 16 at once"),
    (Load::even(50e3), SHORT, "50 kpps"),
];
const SHORT: Duration = Duration::from_millis(500);
/// A little less than our relay's `--keepalive`: it leaves one packet of each stream to the PBX then, which costs many
/// times what the others do.
const WHOLE: Duration = Duration::from_millis(2900);
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
            for ((load, duration, _), samples) in LOADS.iter().zip(&mut found.costs) {
                match subject.cost(*load, *duration)? {
                    Some(cost) => samples.push(cost),
                    None => complain(subject),
                }
            }
            // The highest: a round that was disturbed is no place to begin the next.
            let known = found.rates.iter().flatten().map(|best| best.rate);
            let best = subject.loss_free(known.reduce(f64::max))?;
            found.rates.push(best);
            found.repeated = subject.repeated;
            if best.is_none() {
                found.failed = subject.failed.as_ref().map(Sample::to_string);
                complain(subject);
            }
        }
    }
    findings::report(&found, options)
}

/// Tells of a load that was lost, while the suite goes on.
fn complain(subject: &Subject) {
    if let Some(failed) = &subject.failed {
        eprintln!("{}: {failed}", subject.name);
    }
}
