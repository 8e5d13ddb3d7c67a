//! CPU time of threads, to the nanosecond: in the guest, one instruction.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;

/// Whose time is counted.
pub(super) enum Payer {
    /// All threads of a process.
    Process(u32),
    /// One thread of this process.
    Thread(Pid),
}

/// The threads that poll an interface, which must do so in threads of their own (`/sys/class/net/DEV/threaded`, Linux
/// 5.12).
pub(super) fn pollers(interface: &str) -> Result<Vec<Payer>> {
    // "napi/DEV-ID", cut to 15 bytes (`napi_kthread_create` in net/core/dev.c).
    let prefix = format!("napi/{interface}-");
    let mut pollers = Vec::new();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        let Ok(id) = process.file_name().to_string_lossy().parse() else {
            continue;
        };
        // It may have ended just now.
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        if name.starts_with(&prefix) {
            pollers.push(Payer::Process(id));
        }
    }
    ensure!(!pollers.is_empty(), "no thread polls {interface}");
    Ok(pollers)
}

/// CPU time of all of them until now, ns.
pub(super) fn time_of(payers: &[Payer]) -> Result<u64> {
    let mut total = 0;
    for payer in payers {
        let tasks = match payer {
            Payer::Process(id) => fs::read_dir(format!("/proc/{id}/task"))?
                .map(|task| Ok(task?.path()))
                .collect::<Result<Vec<_>>>()?,
            Payer::Thread(task) => vec![PathBuf::from(format!("/proc/self/task/{task}"))],
        };
        for task in tasks {
            let path = task.join("schedstat");
            let text =
                fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let time = text.split(' ').next().and_then(|time| time.parse().ok());
            total += time.unwrap_or(0_u64);
        }
    }
    Ok(total)
}
