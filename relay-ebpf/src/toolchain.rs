//! The one place that knows what builds the eBPF object.
//!
//! No toolchain ships a `core` for BPF, so it is compiled along with the program. That takes
//! - a compiler, and the library source of exactly that compiler: a rustup toolchain with the
//!   component `rust-src`, or Debian's packages linked as a rustup toolchain,
//! - [bpf-linker](https://github.com/aya-rs/bpf-linker), whose LLVM reads the bitcode that the
//!   compiler writes. Older LLVM does not read newer bitcode, so it must not be the older one.
//!
//! Here is only looking. `cargo xtask setup` is what installs.

use std::{
    fmt,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The linker's name: what rustc runs for the BPF targets, and the crate that holds it.
pub const LINKER: &str = "bpf-linker";

/// The command that mends everything in [`Missing`] but rustup itself.
const MEND: &str = "cargo xtask setup";

/// The oldest rustc that compiles this workspace.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");

/// A rustup toolchain that can compile the eBPF object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// Its name, as `rustup run` takes it.
    pub name: String,
    /// Version of its rustc.
    pub release: Release,
    /// Major version of the LLVM in its rustc.
    pub llvm: u32,
}

/// A compiler and a linker that go together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// What compiles.
    pub compiler: Compiler,
    /// Major version of the LLVM in bpf-linker: the compiler's or a later one.
    pub linker_llvm: u32,
}

/// A version of rustc, as far as it matters here. Ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// 1
    pub major: u32,
    /// 95 of 1.95.0
    pub minor: u32,
}

/// A rustup toolchain that cannot compile the eBPF object.
#[derive(Debug)]
pub struct Unfit {
    /// Its name.
    pub name: String,
    /// What it lacks.
    pub why: Lack,
}

/// What a rustup toolchain lacks.
#[derive(Debug, thiserror::Error)]
pub enum Lack {
    /// rustc does not run, or its answer makes no sense.
    #[error("its rustc does not tell its version: {0}")]
    Rustc(String),
    /// Older than this workspace's `rust-version`.
    #[error("its rustc {0} is older than {OLDEST}")]
    Old(Release),
    /// No `rust-src`, or Debian's `rust-web-src`.
    #[error("it has no library source, {} does not exist", .0.display())]
    Source(PathBuf),
}

/// Why the eBPF object cannot be built on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// All toolchains are found and run through rustup.
    #[error("rustup does not run ({0}): install it from https://rustup.rs, then run `{MEND}`")]
    Rustup(io::Error),
    /// No toolchain fits.
    #[error(
        "the eBPF object needs rustc {OLDEST} or later with its library source, and no rustup toolchain has both{}: run `{MEND}`",
        list(.0)
    )]
    Compiler(Vec<Unfit>),
    /// bpf-linker is not installed, or does not run.
    #[error("the eBPF object needs {LINKER}, which does not run ({0}): run `{MEND}`")]
    Linker(String),
    /// bpf-linker is there, but too old for every toolchain that fits.
    #[error(
        "{LINKER} has LLVM {linker}, too old for the bitcode of toolchain `{}` with LLVM {}: run `{MEND}`",
        .compiler.name, .compiler.llvm
    )]
    LinkerTooOld {
        /// Major version of the linker's LLVM.
        linker: u32,
        /// The compiler whose LLVM is the nearest.
        compiler: Compiler,
    },
}

/// Finds a compiler and a linker that go together, taking the first that rustup lists: its
/// default toolchain if that fits.
///
/// # Errors
/// [`Missing`]: what is missing and the command that mends it.
pub fn find() -> Result<Toolchain, Missing> {
    let mut unfit = Vec::new();
    let mut too_old: Option<(u32, Compiler)> = None;
    for compiler in compilers()? {
        let compiler = match compiler {
            Ok(compiler) => compiler,
            Err(why) => {
                unfit.push(why);
                continue;
            }
        };
        let linker_llvm = linker_llvm(&compiler)?;
        if linker_llvm >= compiler.llvm {
            return Ok(Toolchain {
                compiler,
                linker_llvm,
            });
        }
        if too_old
            .as_ref()
            .is_none_or(|(_, nearest)| compiler.llvm < nearest.llvm)
        {
            too_old = Some((linker_llvm, compiler));
        }
    }
    Err(match too_old {
        Some((linker, compiler)) => Missing::LinkerTooOld { linker, compiler },
        None => Missing::Compiler(unfit),
    })
}

/// Every rustup toolchain, fit for the eBPF object or not, in rustup's order.
///
/// # Errors
/// [`Missing::Rustup`] when there is no rustup to ask.
pub fn compilers() -> Result<Vec<Result<Compiler, Unfit>>, Missing> {
    let listed = Command::new("rustup").args(["toolchain", "list"]).output();
    let listed = listed.map_err(Missing::Rustup)?;
    // "stable-x86_64-unknown-linux-gnu (active, default)"; without any: "no installed toolchains".
    Ok(String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter(|line| *line != "no installed toolchains")
        .filter_map(|line| line.split_whitespace().next())
        .map(|name| {
            compiler(name).map_err(|why| Unfit {
                name: name.to_owned(),
                why,
            })
        })
        .collect())
}

fn compiler(name: &str) -> Result<Compiler, Lack> {
    let version = output(name, "rustc", &["-vV"]).map_err(Lack::Rustc)?;
    let (release, llvm) =
        identity(&version).ok_or_else(|| Lack::Rustc(format!("`rustc -vV` says {version:?}")))?;
    if release < Release::oldest() {
        return Err(Lack::Old(release));
    }
    let sysroot = output(name, "rustc", &["--print", "sysroot"]).map_err(Lack::Rustc)?;
    // The file that cargo's `-Zbuild-std` starts from.
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/Cargo.lock");
    if !source.exists() {
        return Err(Lack::Source(source));
    }
    Ok(Compiler {
        name: name.to_owned(),
        release,
        llvm,
    })
}

/// Major version of the LLVM in the bpf-linker that `compiler` would run.
///
/// # Errors
/// [`Missing::Linker`] when there is none, or it does not run.
pub fn linker_llvm(compiler: &Compiler) -> Result<u32, Missing> {
    // `--version` is the linker's own. The one among LLVM's arguments prints LLVM's and exits
    // before any input is read.
    let told = ["--llvm-args=--version", "--output=/dev/null", "/dev/null"];
    let version = output(&compiler.name, LINKER, &told).map_err(Missing::Linker)?;
    major_after(&version, "LLVM version ")
        .ok_or_else(|| Missing::Linker(format!("it does not tell its LLVM, it says {version:?}")))
}

/// What `program` prints when it is run as in a build with `toolchain`: rustup puts cargo's own
/// folder of programs in front of `PATH`.
fn output(toolchain: &str, program: &str, args: &[&str]) -> Result<String, String> {
    let ran = Command::new("rustup")
        .args(["run", toolchain, program])
        .args(args)
        .output();
    match ran {
        Ok(Output { status, stdout, .. }) if status.success() => {
            Ok(String::from_utf8_lossy(&stdout).into_owned())
        }
        Ok(Output { status, stderr, .. }) => {
            let stderr = String::from_utf8_lossy(&stderr);
            match stderr.lines().next() {
                Some(line) => Err(line.trim_start_matches("error: ").to_owned()),
                None => Err(format!("{program}: {status}")),
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Err("rustup is gone".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Release and LLVM major version in what `rustc -vV` prints.
fn identity(version: &str) -> Option<(Release, u32)> {
    let release = version
        .lines()
        .find_map(|line| line.strip_prefix("release: "))?;
    Some((
        Release::parse(release)?,
        major_after(version, "LLVM version: ")?,
    ))
}

/// The number right after `label`.
fn major_after(text: &str, label: &str) -> Option<u32> {
    let (_, version) = text.split_once(label)?;
    version
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

fn list(unfit: &[Unfit]) -> String {
    if unfit.is_empty() {
        return " (there is none)".to_owned();
    }
    let each: Vec<_> = unfit.iter().map(Unfit::to_string).collect();
    format!(" ({})", each.join("; "))
}

impl Release {
    /// The oldest that compiles this workspace: its `rust-version`.
    pub fn oldest() -> Self {
        Self::parse(OLDEST).expect("Cargo.toml has a rust-version such as 1.95")
    }

    /// Reads "1.95", "1.96.0-nightly", or Debian's "1.96.0+dfsg1-1~deb12u2".
    pub fn parse(version: &str) -> Option<Self> {
        let (major, rest) = version.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.name, self.why)
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            compiler,
            linker_llvm,
        } = self;
        write!(
            f,
            "toolchain `{}` (rustc {}, LLVM {}) with {LINKER} (LLVM {linker_llvm})",
            compiler.name, compiler.release, compiler.llvm
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_tells_its_release_and_its_llvm() {
        let nightly = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\n\
                       release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(
            identity(nightly),
            Some((
                Release {
                    major: 1,
                    minor: 97
                },
                22
            ))
        );
        assert_eq!(
            identity("release: 1.97.0\n"),
            None,
            "built with another backend than LLVM"
        );
    }

    #[test]
    fn a_linker_tells_its_llvm() {
        let debian = "Debian LLVM version 22.1.8\n  Optimized build.\n";
        assert_eq!(major_after(debian, "LLVM version "), Some(22));
        assert_eq!(
            major_after("LLVM version 23.0.0-rust-1.99\n", "LLVM version "),
            Some(23)
        );
        assert_eq!(major_after("bpf-linker 0.13.0\n", "LLVM version "), None);
    }

    #[test]
    fn releases_are_ordered_by_number() {
        let release = |text| Release::parse(text).expect(text);
        assert_eq!(
            release("1.96.0+dfsg1-1~deb12u2"),
            Release {
                major: 1,
                minor: 96
            }
        );
        assert!(release("1.100") > release("1.95.0"));
        assert!(release("2.0") > release("1.95"));
        assert_eq!(Release::parse("(none)"), None);
        assert_eq!(Release::oldest().to_string(), OLDEST);
    }

    #[test]
    fn what_is_missing_is_said_with_the_command_that_mends_it() {
        let unfit = Unfit {
            name: "stable".to_owned(),
            why: Lack::Source("/s/Cargo.lock".into()),
        };
        let text = Missing::Compiler(vec![unfit]).to_string();
        assert!(
            text.contains("`stable`: it has no library source, /s/Cargo.lock"),
            "{text}"
        );
        assert!(text.ends_with("run `cargo xtask setup`"), "{text}");
    }
}
