//! The machine and its kernel.

use std::{fs, path::Path};

use nix::{
    sys::{
        resource::{RLIM_INFINITY, Resource, getrlimit},
        utsname::uname,
    },
    unistd::{SysconfVar, sysconf},
};

use crate::{
    datapath::{self, AttachMode, DatapathError, Direction, links::Link},
    doctor::facts::HostFacts,
    next_hop::LinkLayer,
    privileges,
};

/// Index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

pub(super) fn facts() -> HostFacts {
    let loaded = load();
    HostFacts {
        kernel: uname().map_or_else(
            |_| "unknown".to_owned(),
            |kernel| kernel.release().to_string_lossy().into_owned(),
        ),
        jit: loaded.as_ref().ok().copied(),
        refused: loaded.err().map(|error| error.to_string()),
        tcx: Link::tcx_programs(LOOPBACK, Direction::Ingress)
            .ok()
            .map(|programs| programs.is_some()),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        lockdown: read("/sys/kernel/security/lockdown").and_then(|modes| chosen(&modes)),
        missing_capabilities: privileges::missing_capabilities().unwrap_or_default(),
        memlock: getrlimit(Resource::RLIMIT_MEMLOCK)
            .ok()
            .map(|(soft, _)| soft)
            .filter(|soft| *soft != RLIM_INFINITY),
        bpffs: datapath::has_bpffs(),
        bpf_statistics: read("/proc/sys/kernel/bpf_stats_enabled").map(|on| on.trim() != "0"),
    }
}

/// Processors that are online.
pub(super) fn processors() -> u32 {
    let online = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
    online.and_then(|count| count.try_into().ok()).unwrap_or(1)
}

/// Bytes of a page.
pub(super) fn page_size() -> u32 {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| size.try_into().ok()).unwrap_or(4096)
}

/// Loads every program, attaches none, and tells whether the kernel compiled them.
fn load() -> Result<bool, DatapathError> {
    /// One pair's.
    const STREAMS: u32 = 2;
    let mut ebpf = datapath::load(AttachMode::Native, LinkLayer::Ethernet, STREAMS)?;
    datapath::load_tc(&mut ebpf)?;
    datapath::load_observer(&mut ebpf)?;
    let program = datapath::load_xdp(&mut ebpf)?;
    let info = program.info();
    Ok(info.is_ok_and(|info| info.size_jitted() > 0))
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// Of `none [integrity] confidentiality`, the word in brackets.
fn chosen(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    rest.split_once(']').map(|(mode, _)| mode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::chosen;

    #[test]
    fn the_mode_in_brackets_is_in_force() {
        assert_eq!(
            chosen("none [integrity] confidentiality\n").as_deref(),
            Some("integrity")
        );
        assert_eq!(chosen("none"), None);
    }
}
