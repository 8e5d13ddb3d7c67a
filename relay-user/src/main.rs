//! `relay-user`: parses its arguments, runs, and returns an exit code.

use std::process::ExitCode;

use relay_user::cli;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os()) {
        Ok(command) => cli::run(command),
        Err(stop) => stop.report(),
    }
}
