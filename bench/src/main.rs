//! Benchmarks of the relay. They need root.

mod asterisk;
mod check;
mod guest;
mod interpreter;
mod peer;
mod plot;
mod program;
mod qos;
mod report;
mod results;
mod scale;
mod watching;
mod wire;

use std::{env, fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};

use report::Report;

/// What the suites have found, with its pictures.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/report");

#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    about = "Benchmarks of the relay",
    long_about = "Benchmarks of the relay: all suites, or one of them. What a suite finds is shown, and kept in \
                  bench/report; the pictures there and bench/RESULTS.md are made of that",
    args_conflicts_with_subcommands = true
)]
struct Cli {
    /// Count the datapath's instructions, and fail where they are more than in bench/report; measures nothing
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Suite(Suite),
    /// What runs in the guest of suite `guest`
    #[command(hide = true)]
    InGuest(guest::inside::Options),
    /// Draw the pictures and write RESULTS.md, and the figures in README.md, anew from what was found
    /// before; measures nothing
    Report,
}

/// In the order in which they are run and reported.
#[derive(Subcommand)]
enum Suite {
    /// What the programs cost for each packet, alone: no driver, no stack (BPF_PROG_TEST_RUN)
    Program(program::Options),
    /// Packets per second without loss, and CPU time a packet, over veth and beside other relays
    Wire(wire::Options),
    /// Instructions for each packet, from the interrupt to the sending, counted by an emulated machine
    Guest(guest::Options),
    /// What calls cost a real Asterisk, and how long their packets take, without the relay and with it
    Asterisk(asterisk::Options),
    /// What a thousand streams cost, and what a million
    Scale(scale::Options),
    /// What a saturated uplink does to a call, without shaping and with it
    Qos(qos::Options),
    /// What looking on costs, with thousands of streams in the table
    Watching(watching::Options),
}

impl Suite {
    fn run(&self) -> Result<Report> {
        match self {
            Self::Program(options) => program::run(options),
            Self::Wire(options) => wire::run(options),
            Self::Guest(options) => guest::run(options),
            Self::Asterisk(options) => asterisk::run(options),
            Self::Scale(options) => scale::run(options),
            Self::Qos(options) => qos::run(options),
            Self::Watching(options) => watching::run(options),
        }
    }

    fn names() -> Vec<String> {
        Self::augment_subcommands(clap::Command::new(""))
            .get_subcommands()
            .filter(|suite| !suite.is_hide_set())
            .map(|suite| suite.get_name().to_owned())
            .collect()
    }
}

fn main() -> ExitCode {
    let Cli { check, command } = Cli::parse();
    let folder = Path::new(FOLDER);
    let result = match command {
        _ if check => check::run(folder),
        Some(Command::Suite(suite)) => suite.run().and_then(|report| publish(&report, folder)),
        Some(Command::InGuest(options)) => guest::inside::run(&options),
        Some(Command::Report) => redraw(folder),
        None => run_all(),
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
fn publish(report: &Report, folder: &Path) -> Result<()> {
    report.print();
    report.write(folder)?;
    for plot in &report.plots {
        plot::draw(plot, folder)?;
    }
    write_results(folder)
}

/// Runs every suite, also after one that fails.
fn run_all() -> Result<()> {
    let this = env::current_exe().context("cannot tell where this program is")?;
    let mut failed = Vec::new();
    for suite in Suite::names() {
        eprintln!("==> {suite}");
        // In a process of its own: suites bind theirs to a processor, and move it into namespaces.
        let status = std::process::Command::new(&this)
            .arg(&suite)
            .status()
            .with_context(|| format!("cannot run {}", this.display()))?;
        if !status.success() {
            failed.push(suite);
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Makes everything that is made from what was found.
fn redraw(folder: &Path) -> Result<()> {
    for report in reports(folder)? {
        for plot in &report.plots {
            plot::draw(plot, folder)?;
        }
    }
    write_results(folder)
}

fn write_results(folder: &Path) -> Result<()> {
    let tried = folder.with_file_name("tried.md");
    let tried = fs::read_to_string(&tried).with_context(|| format!("read {}", tried.display()))?;
    let reports = reports(folder)?;
    let write = |path: &Path, text| {
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    };
    write(
        &folder.with_file_name("RESULTS.md"),
        results::document(&reports, &tried),
    )?;
    let readme = folder.join("../../README.md");
    let text = fs::read_to_string(&readme).with_context(|| format!("read {}", readme.display()))?;
    write(&readme, results::quote(&text, &reports)?)
}

/// What the suites have found, in their order.
fn reports(folder: &Path) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for suite in Suite::names() {
        reports.extend(Report::read(folder, &suite)?);
    }
    if reports.is_empty() {
        bail!("{} holds no report", folder.display());
    }
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_suite_runs_by_its_name_alone() {
        Cli::command().debug_assert();
        let names = Suite::names();
        assert_eq!(names.first().map(String::as_str), Some(program::NAME));
        for name in names {
            let cli = Cli::try_parse_from(["bench", &name]).expect("a name is enough");
            assert!(matches!(cli.command, Some(Command::Suite(_))), "{name}");
        }
        assert!(Cli::try_parse_from(["bench"]).is_ok_and(|cli| cli.command.is_none()));
        assert!(Cli::try_parse_from(["bench", "--check", "program"]).is_err());
    }
}
