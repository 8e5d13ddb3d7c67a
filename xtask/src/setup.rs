//! `cargo xtask setup`: finds or installs what the build, the demo, the tests and the benchmark
//! need beyond rustup's stable Rust.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use relay_ebpf::toolchain::{self, Compiler, LINKER, Missing, Release};

use crate::{apt::Apt, workspace};

/// What a machine is set up for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    Build,
    Demo,
    AsteriskDemo,
    Test,
    Bench,
    Screenshots,
}

/// A program that is run at run time.
struct Tool {
    program: &'static str,
    /// The package that has it, in Debian.
    package: &'static str,
    purpose: &'static str,
    tasks: &'static [Task],
}

const TOOLS: &[Tool] = &[
    Tool {
        program: "ip",
        package: "iproute2",
        purpose: "makes the network namespaces",
        tasks: &[
            Task::Demo,
            Task::AsteriskDemo,
            Task::Test,
            Task::Bench,
            Task::Screenshots,
        ],
    },
    Tool {
        program: "bpftool",
        package: "bpftool",
        purpose: "shows the relay's maps",
        tasks: &[Task::Test],
    },
    Tool {
        program: "ethtool",
        package: "ethtool",
        purpose: "switches the offloads that `relay-user doctor` looks at",
        tasks: &[Task::Test],
    },
    Tool {
        program: "tshark",
        package: "tshark",
        purpose: "counts what the relay counts, and reads what it captures",
        tasks: &[Task::Test],
    },
    Tool {
        program: "debootstrap",
        package: "debootstrap",
        purpose: "installs the real Asterisk, and rtpengine, each into a folder of its own",
        tasks: &[Task::AsteriskDemo, Task::Test, Task::Bench],
    },
    Tool {
        program: "nft",
        package: "nftables",
        purpose: "has the kernel change addresses, which the relay is compared with",
        tasks: &[Task::Bench],
    },
    Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
        purpose: "counts instructions",
        tasks: &[Task::Bench],
    },
    Tool {
        program: "chromium",
        package: "chromium",
        purpose: "shows the relay's page",
        tasks: &[Task::Test, Task::Screenshots],
    },
    Tool {
        program: "promtool",
        package: "prometheus",
        purpose: "checks the relay's metrics",
        tasks: &[Task::Test],
    },
];

/// Programs that are taken out of their packages, because these would start a service.
const UNPACKED: [&str; 1] = ["promtool"];

/// Debian's compiler, its cargo and its library source. In bookworm they are kept as new as
/// Firefox needs them, by the security suite.
const DEBIAN_COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// What rustup calls the compiler in `/usr`.
const DEBIAN_TOOLCHAIN: &str = "relay-debian";
const SECURITY_SUITE: &str = "echo 'deb http://security.debian.org/debian-security bookworm-security main' > /etc/apt/sources.list.d/bookworm-security.list";

const NIGHTLY: &[&str] = &[
    "toolchain",
    "install",
    "nightly",
    "--profile",
    "minimal",
    "--component",
    "rust-src",
];

const LINKER_VERSION: &str = "0.13.0";
/// The major versions of LLVM that this bpf-linker builds against.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Reports on everything, and installs what is missing.
///
/// # Errors
/// Says what is missing and the command that mends it, when it cannot be installed from here.
pub(crate) fn run() -> Result<()> {
    // What only benchmarks run is large, and installed by them.
    let tools = TOOLS.iter().filter(|tool| tool.tasks != [Task::Bench]);
    install(&tools.collect::<Vec<_>>())?;
    say(
        "done",
        "`cargo xtask demo` and `cargo xtask test` have all they need",
    );
    Ok(())
}

/// Does the same where something is missing for `task`, and nothing where not.
///
/// # Errors
/// As [`run`].
pub(crate) fn ensure(task: Task) -> Result<()> {
    let tools: Vec<_> = TOOLS
        .iter()
        .filter(|tool| tool.tasks.contains(&task))
        .collect();
    if tools.iter().all(|tool| on_path(tool.program)) && toolchain::find().is_ok() {
        return Ok(());
    }
    say(
        "set-up",
        "something is missing, as `cargo xtask setup` would find",
    );
    install(&tools)
}

fn install(tools: &[&Tool]) -> Result<()> {
    let mut apt = Apt::find();
    install_toolchain(&mut apt)?;
    install_tools(&mut apt, tools)
}

/// Prints one step.
pub(crate) fn say(step: &str, what: &str) {
    println!("{step:>12} {what}");
}

/// Whether a program of that name can be run.
pub(crate) fn on_path(program: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

fn install_tools(apt: &mut Option<Apt>, tools: &[&Tool]) -> Result<()> {
    let mut missing = Vec::new();
    for tool in tools {
        if on_path(tool.program) {
            say(
                "found",
                &format!("{}, which {}", tool.program, tool.purpose),
            );
        } else {
            say(
                "missing",
                &format!("{}, which {}", tool.program, tool.purpose),
            );
            missing.push(*tool);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    let Some(apt) = apt else {
        bail!(
            "this is no Debian: install {} with its package manager (Debian's packages are {})",
            missing
                .iter()
                .map(|tool| tool.program)
                .collect::<Vec<_>>()
                .join(", "),
            packages.join(", ")
        );
    };
    let (unpacked, installed): (Vec<_>, Vec<_>) = missing
        .into_iter()
        .partition(|tool| UNPACKED.contains(&tool.program));
    let mut installed: Vec<_> = installed.iter().map(|tool| tool.package).collect();
    installed.dedup();
    if !installed.is_empty() {
        apt.install(&installed)?;
    }
    for tool in unpacked {
        apt.unpack(tool.package, tool.program, &workspace::tools()?)?;
    }
    say("installed", &packages.join(", "));
    Ok(())
}

fn install_toolchain(apt: &mut Option<Apt>) -> Result<()> {
    match toolchain::find() {
        Ok(toolchain) => {
            say("found", &format!("eBPF {toolchain}"));
            return Ok(());
        }
        Err(rustup @ Missing::Rustup(_)) => return Err(rustup.into()),
        Err(_) => {}
    }
    let mut compilers = fit()?;
    for compiler in &compilers {
        say("found", &described(compiler));
    }
    let mut plan = linker_plan(apt, &compilers)?;
    if plan.is_none() {
        say("missing", &missing_compiler(&compilers));
        install_compiler(apt)?;
        compilers = fit()?;
        plan = linker_plan(apt, &compilers)?;
    }
    match plan {
        Some(Plan::Ready) => {}
        Some(Plan::Build(llvm)) => install_linker(apt, &llvm)?,
        None => bail!("{}", no_llvm(&compilers)),
    }
    say("installed", &format!("eBPF {}", toolchain::find()?));
    Ok(())
}

/// How to come by a linker for one of the compilers.
enum Plan {
    /// It is there.
    Ready,
    /// bpf-linker is to be built with this LLVM.
    Build(Llvm),
}

/// LLVM's development files.
struct Llvm {
    major: u32,
    prefix: PathBuf,
    /// The package to install first.
    package: Option<String>,
}

fn fit() -> Result<Vec<Compiler>> {
    Ok(toolchain::compilers()?
        .into_iter()
        .filter_map(Result::ok)
        .collect())
}

fn described(compiler: &Compiler) -> String {
    let Compiler {
        name,
        release,
        llvm,
    } = compiler;
    format!(
        "eBPF compiler: toolchain `{name}` (rustc {release}, LLVM {llvm}) with its library source"
    )
}

fn missing_compiler(compilers: &[Compiler]) -> String {
    if compilers.is_empty() {
        let oldest = Release::oldest();
        return format!("an eBPF compiler: rustc {oldest} or later with its library source");
    }
    "an eBPF compiler whose LLVM is old enough for a bpf-linker that can be built here".to_owned()
}

fn linker_plan(apt: &mut Option<Apt>, compilers: &[Compiler]) -> Result<Option<Plan>> {
    for compiler in compilers {
        if toolchain::linker_llvm(compiler).is_ok_and(|llvm| llvm >= compiler.llvm) {
            return Ok(Some(Plan::Ready));
        }
    }
    for compiler in compilers {
        for major in LINKER_LLVM.filter(|major| *major >= compiler.llvm) {
            if let Some(llvm) = llvm(apt, major)? {
                return Ok(Some(Plan::Build(llvm)));
            }
        }
    }
    Ok(None)
}

fn install_compiler(apt: &mut Option<Apt>) -> Result<()> {
    let [rustc, ..] = DEBIAN_COMPILER;
    if let Some(apt) = apt
        && let Some(release) = apt.candidate(rustc)?.as_deref().and_then(Release::parse)
    {
        let oldest = Release::oldest();
        ensure!(
            release >= oldest,
            "the package {rustc} is {release} here, and {oldest} is needed: bookworm's security \
             suite has it, so run `{SECURITY_SUITE}` and set up again"
        );
        return install_debian_compiler(apt);
    }
    let command = format!("rustup {}", NIGHTLY.join(" "));
    say("installing", &format!("eBPF compiler: {command}"));
    let status = Command::new("rustup")
        .args(NIGHTLY)
        .status()
        .context("cannot run rustup")?;
    ensure!(
        status.success(),
        "`{command}` failed, see above: get it to work, then set up again"
    );
    Ok(())
}

fn install_debian_compiler(apt: &mut Apt) -> Result<()> {
    let before = fit()?.len();
    apt.install(&DEBIAN_COMPILER)?;
    // Where `/usr` has been linked under whatever name, the packages were all that it lacked.
    if fit()?.len() == before {
        say(
            "linking",
            &format!("/usr as rustup's toolchain `{DEBIAN_TOOLCHAIN}`"),
        );
        let link = Command::new("rustup")
            .args(["toolchain", "link", DEBIAN_TOOLCHAIN, "/usr"])
            .status()
            .context("cannot run rustup")?;
        ensure!(
            link.success(),
            "`rustup toolchain link {DEBIAN_TOOLCHAIN} /usr` failed, see above"
        );
    }
    Ok(())
}

/// LLVM's development files of one major version: as installed, or else as a package.
fn llvm(apt: &mut Option<Apt>, major: u32) -> Result<Option<Llvm>> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{major}"));
    let configs = [
        debian.join("bin/llvm-config"),
        format!("llvm-config-{major}").into(),
        "llvm-config".into(),
    ];
    for config in configs {
        let answer = Command::new(config)
            .args(["--version", "--prefix", "--libdir"])
            .output();
        let Ok(answer) = answer else { continue };
        let answer = String::from_utf8_lossy(&answer.stdout);
        if let Some(prefix) = prefix_in(&answer, major) {
            return Ok(Some(Llvm {
                major,
                prefix,
                package: None,
            }));
        }
    }
    let package = format!("llvm-{major}-dev");
    if let Some(apt) = apt
        && apt.candidate(&package)?.is_some()
    {
        return Ok(Some(Llvm {
            major,
            prefix: debian,
            package: Some(package),
        }));
    }
    Ok(None)
}

/// The prefix in an answer of llvm-config, if it is of that version and there is a libLLVM to link.
fn prefix_in(answer: &str, major: u32) -> Option<PathBuf> {
    let mut lines = answer.lines();
    let (version, prefix, libdir) = (lines.next()?, lines.next()?, lines.next()?);
    let right = version.split('.').next()? == major.to_string()
        && PathBuf::from(libdir).join("libLLVM.so").exists();
    right.then(|| prefix.into())
}

fn install_linker(apt: &mut Option<Apt>, llvm: &Llvm) -> Result<()> {
    let Llvm {
        major,
        prefix,
        package,
    } = llvm;
    match (package, apt) {
        (Some(package), Some(apt)) => apt.install(&[package])?,
        _ => say("found", &format!("LLVM {major} in {}", prefix.display())),
    }
    say(
        "installing",
        &format!("{LINKER} {LINKER_VERSION} with LLVM {major}"),
    );
    let feature = format!("llvm-{major}");
    let status = workspace::cargo()
        .args([
            "install",
            LINKER,
            "--version",
            LINKER_VERSION,
            "--locked",
            "--force",
        ])
        .args(["--no-default-features", "--features", &feature])
        // One is read by bpf-linker's build and the other by llvm-sys'. Without them each takes
        // whatever llvm-config is first on PATH.
        .env("LLVM_PREFIX", prefix)
        .env(format!("LLVM_SYS_{major}1_PREFIX"), prefix)
        .status()
        .context("cannot run cargo")?;
    ensure!(
        status.success(),
        "`cargo install {LINKER}` failed, see above"
    );
    Ok(())
}

fn no_llvm(compilers: &[Compiler]) -> String {
    let Some(llvm) = compilers.iter().map(|compiler| compiler.llvm).min() else {
        return "an eBPF compiler was installed, and yet rustup lists none that fits".to_owned();
    };
    let arch = env::consts::ARCH;
    let ready_made = format!("bpf-linker-{arch}-unknown-linux-musl.tar.zst");
    format!(
        "{LINKER} is missing, and so is what it is built with, the development files of LLVM \
         {llvm}: install these (`apt-get install llvm-{llvm}-dev`, `dnf install llvm-devel`, \
         `pacman -S llvm`, whichever has {llvm}) and set up again, or take the ready-made linker: \
         `curl -fL https://github.com/aya-rs/bpf-linker/releases/latest/download/{ready_made} \
         | tar --zstd -x -C ~/.cargo/bin`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_counts_with_the_right_version_and_a_library_to_link() {
        let folder = env!("CARGO_MANIFEST_DIR");
        let answer = format!("22.1.8\n/usr/lib/llvm-22\n{folder}\n");
        assert_eq!(prefix_in(&answer, 22), None, "no libLLVM.so there");
        assert_eq!(prefix_in("", 22), None);
    }
}
