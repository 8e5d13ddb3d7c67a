//! Suite `guest`: instructions for each packet, counted by a machine that executes one every nanosecond.

mod cost;
mod debian;
mod findings;
pub(crate) mod inside;
mod machine;
mod subject;
mod traffic;

use std::{env, fs, process::Command};

use anyhow::{Context as _, Result};
use clap::ValueEnum as _;
use relay_tests::relay::binary;

use self::{debian::Bookworm, inside::Sample, machine::Machine, subject::Subject};
use crate::report::{self, Report};

/// File that the guest leaves.
const SAMPLES: &str = "samples";

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure; may be repeated [default: all]
    #[arg(long)]
    subject: Vec<Subject>,
    /// Packets per second; may be repeated
    #[arg(long, default_values_t = [5_000, 20_000], value_parser = clap::value_parser!(u32).range(1_000..=50_000))]
    rate: Vec<u32>,
    /// Times that the guest is booted, to see whether it counts the same again
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10))]
    boots: u32,
}

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let debian = Bookworm::installed()?;
    let subjects = match &options.subject[..] {
        [] => Subject::value_variants(),
        some => some,
    };
    let mut boots = Vec::new();
    for boot in 1..=options.boots {
        eprintln!("guest {boot} of {}", options.boots);
        boots.push(samples(&debian, subjects, &options.rate)?);
    }
    let version = Command::new(machine::PROGRAM).arg("--version").output()?;
    let version = String::from_utf8_lossy(&version.stdout);
    let here = report::Machine {
        kernel: debian.kernel()?,
        processor: version.lines().next().unwrap_or_default().to_owned(),
        processors: 1,
    };
    findings::report(&boots, subjects, &options.rate, here)
}

/// What the guest counts in one boot.
fn samples(debian: &Bookworm, subjects: &[Subject], rates: &[u32]) -> Result<Vec<Sample>> {
    let share = tempfile::tempdir()?;
    let relay = fs::canonicalize(binary("relay-user", "RELAY_USER_BIN")?)?;
    let bench = env::current_exe()?;
    let [relay, bench, root] = [&*relay, &bench, debian.root()].map(machine::plain);
    let mut script = format!(
        "ulimit -n 65536; RELAY_USER_BIN='{}' exec '{}' in-guest --debian '{}' --samples {}/{SAMPLES}",
        relay?,
        bench?,
        root?,
        machine::SHARE
    );
    for subject in subjects {
        let name = subject
            .to_possible_value()
            .context("a subject without a name")?;
        script += &format!(" --subject {}", name.get_name());
    }
    for rate in rates {
        script += &format!(" --rate {rate}");
    }
    Machine { debian }.run(&script, share.path())?;
    let samples: Vec<Sample> = serde_json::from_slice(&fs::read(share.path().join(SAMPLES))?)?;
    Ok(samples)
}
