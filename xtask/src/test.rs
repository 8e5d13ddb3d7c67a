//! `cargo xtask test`: runs the tests of the whole workspace and adds up their results.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader, Write as _},
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result};

use crate::workspace::{self, Profile, RELAY_USER_BIN};

/// Runs `cargo test --workspace`, passes its output on, and ends with a line such as
/// `123 passed, 0 failed`. Succeeds when something ran and nothing failed.
pub(crate) fn run(args: Vec<OsString>, harness: Vec<OsString>) -> Result<ExitCode> {
    let mut cargo = workspace::cargo();
    cargo
        .args(["test", "--locked", "--workspace", "--no-fail-fast"])
        .args(args);
    if !harness.is_empty() {
        cargo.arg("--").args(harness);
    }
    let mut cargo = cargo
        .env(
            RELAY_USER_BIN,
            workspace::binary(Profile::Debug, "relay-user")?,
        )
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut output = BufReader::new(cargo.stdout.take().context("cargo has no output")?);
    let mut tally = Tally::default();
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line)? > 0 {
        std::io::stdout().write_all(&line)?;
        tally.read(&String::from_utf8_lossy(&line));
        line.clear();
    }
    tally.end(cargo.wait()?.success());
    if tally == Tally::default() {
        println!("\nNo test ran: none has a name like that.");
    }
    println!("\n{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 && tally.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The results of many test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u32,
    failed: u32,
    /// A binary has started and not yet told its result.
    running: bool,
}

impl Tally {
    fn read(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.running = false;
            self.passed += number_before(result, " passed");
            self.failed += number_before(result, " failed");
        } else if is_start(line) {
            self.aborted();
            self.running = true;
        }
    }

    /// A binary that died tells no result, and neither does one that did not compile: without
    /// this it would count for nothing.
    fn end(&mut self, success: bool) {
        self.aborted();
        if !success && self.failed == 0 {
            self.failed = 1;
        }
    }

    fn aborted(&mut self) {
        self.failed += u32::from(self.running);
        self.running = false;
    }
}

/// `running 12 tests`, which libtest prints before the first.
fn is_start(line: &str) -> bool {
    let count = line.trim_end().strip_prefix("running ").and_then(|rest| {
        rest.strip_suffix(" tests")
            .or_else(|| rest.strip_suffix(" test"))
    });
    count.is_some_and(|count| count.parse::<u32>().is_ok())
}

fn number_before(text: &str, label: &str) -> u32 {
    let Some((before, _)) = text.split_once(label) else {
        return 0;
    };
    before
        .rsplit(' ')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(output: &str, success: bool) -> (u32, u32) {
        let mut tally = Tally::default();
        output.lines().for_each(|line| tally.read(line));
        tally.end(success);
        (tally.passed, tally.failed)
    }

    const OK: &str = "running 2 tests\ntest a ... ok\ntest b ... ok\n\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 0.00s\n";
    const FAILED: &str = "running 13 tests\ntest result: FAILED. 10 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n";
    const DIED: &str = "running 1 test\n";

    #[test]
    fn results_add_up() {
        assert_eq!(tally(&[OK, FAILED, OK].concat(), false), (14, 3));
    }

    #[test]
    fn a_binary_that_dies_is_a_failure() {
        assert_eq!(tally(&[DIED, OK].concat(), false), (2, 1));
        assert_eq!(tally(&[FAILED, DIED].concat(), false), (10, 4));
    }

    #[test]
    fn what_does_not_compile_is_a_failure() {
        assert_eq!(tally("", false), (0, 1));
        assert_eq!(tally(OK, false), (2, 1));
        assert_eq!(tally("", true), (0, 0));
    }
}
