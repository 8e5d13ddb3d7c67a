//! Benchmarks of the relay. They need root.

mod guest;
mod interpreter;
mod peer;
mod program;
mod qos;
mod report;
mod watching;
mod wire;

use std::{path::Path, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask bench", about = "Benchmarks of the relay")]
struct Cli {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// What the programs cost for each packet, alone: no driver, no stack (BPF_PROG_TEST_RUN)
    Program(program::Options),
    /// Instructions for each packet, from the interrupt to the sending, counted by an emulated machine
    Guest(guest::Options),
    /// What runs in the guest of suite `guest`
    #[command(hide = true)]
    InGuest(guest::inside::Options),
    /// What a saturated uplink does to a call, without shaping and with it
    Qos(qos::Options),
    /// What looking on costs, with thousands of streams in the table
    Watching(watching::Options),
    /// Packets per second without loss, and CPU time a packet, over veth and beside other relays
    Wire(wire::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().suite {
        Suite::Program(options) => publish(program::run(&options)),
        Suite::Guest(options) => publish(guest::run(&options)),
        Suite::InGuest(options) => guest::inside::run(&options),
        Suite::Qos(options) => qos::run(&options),
        Suite::Watching(options) => watching::run(&options),
        Suite::Wire(options) => publish(wire::run(&options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Shows what a suite has found, and keeps it.
fn publish(report: Result<report::Report>) -> Result<()> {
    let report = report?;
    report.print();
    report.write(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/report")))
}
