//! Benchmarks of the relay. They need root.

mod interpreter;
mod program;
mod qos;
mod watching;

use std::process::ExitCode;

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
    /// What a saturated uplink does to a call, without shaping and with it
    Qos(qos::Options),
    /// What looking on costs, with thousands of streams in the table
    Watching(watching::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().suite {
        Suite::Program(options) => program::run(&options),
        Suite::Qos(options) => qos::run(&options),
        Suite::Watching(options) => watching::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
