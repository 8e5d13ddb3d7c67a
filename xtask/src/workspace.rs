//! The workspace's cargo and what it builds.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// Where the tests, the demo and the benchmark find the controller: an absolute path.
pub(crate) const RELAY_USER_BIN: &str = "RELAY_USER_BIN";

/// How something is built.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    /// For the tests.
    Debug,
    /// For what is measured.
    Release,
}

impl Profile {
    /// The folder that cargo puts the binaries in.
    const fn folder(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }
}

/// The cargo that runs this xtask, in the workspace's folder.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(folder(""));
    cargo
}

/// A folder of the workspace.
pub(crate) fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Builds what `selection`, arguments of `cargo build`, says.
///
/// # Errors
/// When it does not build; cargo has then said why.
pub(crate) fn build(selection: &[&str]) -> Result<()> {
    let status = cargo().args(["build", "--locked"]).args(selection).status();
    let status = status.context("cannot run cargo")?;
    ensure!(status.success(), "the workspace does not build, see above");
    Ok(())
}

/// Where programs are that only this workspace uses.
pub(crate) fn tools() -> Result<PathBuf> {
    let this = env::current_exe().context("cannot tell where this program is")?;
    let folder = this.parent().context("this program is in no folder")?;
    Ok(folder.with_file_name("tools"))
}

/// Where cargo puts the binary `name`: beside this program, wherever cargo's configuration and
/// `CARGO_TARGET_DIR` made that be.
pub(crate) fn binary(profile: Profile, name: &str) -> Result<PathBuf> {
    let this = env::current_exe().context("cannot tell where this program is")?;
    let folder = this.parent().context("this program is in no folder")?;
    Ok(folder.with_file_name(profile.folder()).join(name))
}
