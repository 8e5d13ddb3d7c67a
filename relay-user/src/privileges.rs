//! What the daemon needs of the kernel and of its own rights, and how it gives the rest away.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::utsname::uname;

/// The oldest long-term kernel that has what the datapath is made of: bounded loops (5.3), mmapable
/// arrays (5.5), CAP_BPF (5.8), BPF links for XDP (5.9), BPF memory outside the memlock limit (5.11).
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// What maps and netlink need as long as the daemon runs, and while a capture begins.
const KEPT: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN];

/// What attaching needs. CAP_PERFMON is for the verifier: without it a program may not subtract packet
/// pointers (`allow_ptr_leaks` in kernel/bpf/verifier.c, from `perfmon_capable()`).
const NEEDED: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    Capability::CAP_NET_ADMIN,
];

/// Why the daemon cannot run here. The text names the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivilegeError {
    /// Not root, nor given the capabilities.
    #[error(
        "attaching needs {missing}: run as root with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (systemd: see CapabilityBoundingSet=)"
    )]
    Capabilities {
        /// Those that are missing.
        missing: String,
    },
    /// Not root, nor given what capturing takes.
    #[error("capturing needs {missing}: run this as root")]
    Capturing {
        /// Those that are missing.
        missing: String,
    },
    /// Too old.
    #[error("this kernel is Linux {found}: the relay needs {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1)]
    Kernel {
        /// Its release.
        found: String,
    },
    /// The kernel would not tell, or would not let go.
    #[error("capabilities cannot be read or changed: {0}")]
    System(String),
}

/// Checks kernel and capabilities before anything is touched.
///
/// # Errors
/// [`PrivilegeError`].
pub fn check() -> Result<(), PrivilegeError> {
    let system = |error: &dyn std::fmt::Display| PrivilegeError::System(error.to_string());
    let kernel = uname().map_err(|errno| system(&errno))?;
    check_kernel(&kernel.release().to_string_lossy())?;
    let effective = caps::read(None, CapSet::Effective).map_err(|error| system(&error))?;
    check_capabilities(&effective)
}

/// The capabilities that attaching needs and this process does not have.
///
/// # Errors
/// [`PrivilegeError::System`].
pub fn missing_capabilities() -> Result<Vec<String>, PrivilegeError> {
    let effective = caps::read(None, CapSet::Effective);
    effective
        .map(|effective| missing(&NEEDED, &effective))
        .map_err(|error| PrivilegeError::System(error.to_string()))
}

/// Checks that the maps can be opened, and that the kernel tells what is attached.
///
/// # Errors
/// [`PrivilegeError::Capturing`], [`PrivilegeError::System`].
pub fn check_for_capturing() -> Result<(), PrivilegeError> {
    let effective = caps::read(None, CapSet::Effective)
        .map_err(|error| PrivilegeError::System(error.to_string()))?;
    let missing = missing(&KEPT, &effective);
    if missing.is_empty() {
        return Ok(());
    }
    Err(PrivilegeError::Capturing {
        missing: missing.join(" and "),
    })
}

pub(crate) fn check_kernel(release: &str) -> Result<(), PrivilegeError> {
    if is_before(release, OLDEST_KERNEL) {
        return Err(PrivilegeError::Kernel {
            found: release.to_owned(),
        });
    }
    Ok(())
}

/// Whether this kernel is older than a version of Linux.
pub(crate) fn is_kernel_before(version: (u32, u32)) -> bool {
    uname().is_ok_and(|kernel| is_before(&kernel.release().to_string_lossy(), version))
}

/// An unreadable release is no proof of anything: the kernel itself will say.
fn is_before(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    matches!(
        (numbers.next(), numbers.next()),
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < version
    )
}

fn missing(needed: &[Capability], effective: &CapsHashSet) -> Vec<String> {
    needed
        .iter()
        .filter(|needed| !effective.contains(needed))
        .map(|needed| needed.to_string())
        .collect()
}

fn check_capabilities(effective: &CapsHashSet) -> Result<(), PrivilegeError> {
    let missing = missing(&NEEDED, effective);
    if missing.is_empty() {
        Ok(())
    } else {
        Err(PrivilegeError::Capabilities {
            missing: missing.join(" and "),
        })
    }
}

/// Gives up, for good, every capability that attaching does not need. To be called before another
/// thread runs: capabilities belong to a thread.
///
/// # Errors
/// [`PrivilegeError::System`].
pub fn keep_for_attaching() -> Result<(), PrivilegeError> {
    // Root would get everything back with the next program it executes.
    nix::sys::prctl::set_no_new_privs()
        .map_err(|errno| PrivilegeError::System(errno.to_string()))?;
    keep(&NEEDED)
}

/// Gives up, for good, everything that a capture under way does not need: it reads one more map. To be
/// called before another thread runs.
///
/// # Errors
/// [`PrivilegeError::System`].
pub fn keep_for_capturing() -> Result<(), PrivilegeError> {
    nix::sys::prctl::set_no_new_privs()
        .map_err(|errno| PrivilegeError::System(errno.to_string()))?;
    keep(&[Capability::CAP_BPF])
}

/// Gives up what only attaching needed.
///
/// # Errors
/// [`PrivilegeError::System`].
pub fn keep_for_serving() -> Result<(), PrivilegeError> {
    keep(&KEPT)
}

fn keep(kept: &[Capability]) -> Result<(), PrivilegeError> {
    let system = |error: caps::errors::CapsError| PrivilegeError::System(error.to_string());
    let kept: CapsHashSet = kept.iter().copied().collect();
    caps::clear(None, CapSet::Ambient).map_err(system)?;
    caps::clear(None, CapSet::Inheritable).map_err(system)?;
    caps::set(None, CapSet::Effective, &kept).map_err(system)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_named() {
        for release in [
            "5.10.0-28-amd64",
            "4.19.0",
            "5.14",
            "3.10.0-1160.el7.x86_64",
        ] {
            let error = check_kernel(release).expect_err(release).to_string();
            assert!(error.contains(release) && error.contains("5.15"), "{error}");
        }
        for release in ["5.15.0-91-generic", "6.1.0-18-amd64", "10.0", "unknown"] {
            assert_eq!(check_kernel(release), Ok(()), "{release}");
        }
    }

    #[test]
    fn missing_capabilities_are_named() {
        let set = |capabilities: &[Capability]| capabilities.iter().copied().collect();
        assert_eq!(check_capabilities(&set(&NEEDED)), Ok(()));
        for (index, missing) in NEEDED.iter().enumerate() {
            let mut rest = NEEDED.to_vec();
            rest.remove(index);
            let error = check_capabilities(&set(&rest)).expect_err("one is missing");
            let error = error.to_string();
            let named = format!("attaching needs {missing}: ");
            assert!(error.starts_with(&named), "{error}");
        }
        let error = check_capabilities(&set(&[])).expect_err("all").to_string();
        let named = "needs CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN";
        assert!(error.contains(named), "{error}");
    }
}
