//! `cargo xtask`: set-up, demo, test and benchmark of the relay.
//!
//! Builds on a machine that has nothing but rustup's stable Rust, so it depends neither on
//! `relay-user` nor on `relay-tests`.

mod apt;
mod setup;
mod test;
mod workspace;

use std::{
    env,
    ffi::OsString,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};

use crate::{setup::Task, workspace::Profile};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, demo, test and benchmark of the relay"
)]
struct Cli {
    #[command(subcommand)]
    command: Xtask,
}

#[derive(Subcommand)]
enum Xtask {
    /// Install what is missing: the eBPF compiler with its library source, bpf-linker, and the
    /// programs that demo and tests run. The other commands do so by themselves
    Setup,
    /// Place calls through a small userspace PBX, first without and then with the relay, and
    /// compare (needs root)
    Demo {
        /// Use a real Asterisk and 100 calls
        #[arg(long)]
        asterisk: bool,
        /// Arguments of the demo itself
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run all tests of the workspace (needs root)
    Test {
        /// Arguments of `cargo test`, such as a part of a test's name
        #[arg(allow_hyphen_values = true)]
        args: Vec<OsString>,
        /// Arguments of the test binaries
        #[arg(last = true)]
        harness: Vec<OsString>,
    },
    /// Take the pictures of the documentation anew (needs root)
    Screenshots,
    /// Run the benchmarks, and write bench/RESULTS.md (needs root)
    Bench {
        /// Count the datapath's instructions, and fail where they are more than in bench/report
        #[arg(long)]
        check: bool,
        /// A suite and its options; all suites without. `help` lists them, `SUITE --help` explains one
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Xtask) -> Result<ExitCode> {
    see_programs()?;
    match command {
        Xtask::Setup => {
            setup::run()?;
            Ok(ExitCode::SUCCESS)
        }
        Xtask::Demo { asterisk, mut args } => {
            need_root("the demo")?;
            setup::ensure(if asterisk {
                Task::AsteriskDemo
            } else {
                Task::Demo
            })?;
            if asterisk {
                args.insert(0, "--asterisk".into());
            }
            workspace::build(&["--release", "--package=relay-user", "--package=relay-tests"])?;
            become_program(Profile::Release, "demo", args)
        }
        Xtask::Test { args, harness } => {
            need_root("the test suite")?;
            setup::ensure(Task::Test)?;
            // What `cargo test` builds, and the controller's binary besides. Alone, that would
            // be built with other features of its dependencies, and so would all of these.
            workspace::build(&["--workspace", "--all-targets"])?;
            test::run(args, harness)
        }
        Xtask::Screenshots => {
            need_root("taking pictures")?;
            setup::ensure(Task::Screenshots)?;
            workspace::build(&["--release", "--package=relay-user", "--package=relay-tests"])?;
            become_program(
                Profile::Release,
                "screenshots",
                vec![workspace::folder("docs/images").into()],
            )
        }
        Xtask::Bench { check: true, .. } => {
            setup::ensure(Task::Build)?;
            // The object is the same in every build (relay-user/build.rs). This is the one that the tests need.
            workspace::build(&["--workspace", "--all-targets"])?;
            become_program(Profile::Debug, "relay-bench", vec!["--check".into()])
        }
        Xtask::Bench { check: false, args } => {
            need_root("the benchmark")?;
            setup::ensure(Task::Bench)?;
            workspace::build(&[
                "--release",
                "--package=relay-user",
                "--package=relay-tests",
                "--package=relay-bench",
            ])?;
            become_program(Profile::Release, "relay-bench", args)
        }
    }
}

/// Runs a binary of the workspace in place of this process, so that signals reach it.
fn become_program(profile: Profile, name: &str, args: Vec<OsString>) -> Result<ExitCode> {
    let program = workspace::binary(profile, name)?;
    let relay_user = workspace::binary(profile, "relay-user")?;
    let failed = Command::new(&program)
        .args(args)
        .env(workspace::RELAY_USER_BIN, relay_user)
        .exec();
    Err(failed).with_context(|| format!("cannot run {}", program.display()))
}

/// Debian's plain `su` keeps a user's `PATH`, which has no `/usr/sbin`: `ip` and `bpftool` would be
/// installed and yet not found. The workspace's own tools are in no `PATH`.
fn see_programs() -> Result<()> {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into);
    let more = sbin.into_iter().chain([workspace::tools()?]);
    let path = env::join_paths(env::split_paths(&path).chain(more))?;
    // SAFETY: this process has one thread.
    unsafe { env::set_var("PATH", path) };
    Ok(())
}

fn need_root(what: &str) -> Result<()> {
    ensure!(
        is_root()?,
        "{what} needs root, for it creates network namespaces and loads eBPF programs: run it \
         from a root shell (`sudo -i`, or `su -`)"
    );
    Ok(())
}

/// The owner of a process's folder in `/proc` is its effective user (proc(5)).
fn is_root() -> Result<bool> {
    let process = std::fs::metadata("/proc/self").context("/proc is not mounted")?;
    Ok(process.uid() == 0)
}
