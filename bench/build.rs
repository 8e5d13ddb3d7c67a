//! Compiles `relay-bench-ebpf` for BPF and leaves the object in `OUT_DIR`, as `traffic`.

use std::{env, process::ExitCode};

use relay_ebpf::toolchain;

const EBPF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/ebpf");

fn main() -> ExitCode {
    let toolchain = match toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(missing) => {
            println!("cargo::error={missing}");
            return ExitCode::FAILURE;
        }
    };
    // aya-build watches the crate's folder. The profile of the object is in the workspace's manifest.
    println!("cargo::rerun-if-changed={EBPF}/../../Cargo.toml");
    for (name, value) in [
        // Unlocks `-Zbuild-std`, in the child that compiles the object and nowhere else.
        ("RUSTC_BOOTSTRAP", "1"),
        // Whatever that child says becomes a warning of this crate: progress is none. Both, for
        // cargo refuses to be quiet and verbose.
        ("CARGO_TERM_QUIET", "true"),
        ("CARGO_TERM_VERBOSE", "false"),
    ] {
        // SAFETY: this process has one thread.
        unsafe { env::set_var(name, value) };
    }
    let built = aya_build::build_ebpf(
        [aya_build::Package {
            name: "relay-bench-ebpf",
            root_dir: EBPF,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(&toolchain.compiler.name),
    );
    match built {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!(
                "cargo::error=the eBPF object does not build, see the messages of its compiler: {error:#}"
            );
            ExitCode::FAILURE
        }
    }
}
