//! What `cargo xtask demo` runs: see `relay_tests::demo`.

use std::process::ExitCode;

use clap::Parser as _;
use relay_tests::demo::{Options, run};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
