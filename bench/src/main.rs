//! Benchmarks of the relay. They need root.

mod interpreter;
mod program;

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
}

fn main() -> ExitCode {
    let Cli {
        suite: Suite::Program(options),
    } = Cli::parse();
    match program::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
