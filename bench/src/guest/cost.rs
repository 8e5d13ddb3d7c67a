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
pub(super) struct Pollers {
    /// They poll receive queues: all work on a packet that comes in, up to its sending.
    pub(super) receive: Vec<Payer>,
    /// They poll transmit queues: they release what has been sent.
    pub(super) release: Vec<Payer>,
}

impl Pollers {
    pub(super) fn of(interface: &str) -> Result<Self> {
        let mut pollers = Self {
            receive: vec![],
            release: vec![],
        };
        for process in fs::read_dir("/proc")? {
            let process = process?;
            let Ok(id) = process.file_name().to_string_lossy().parse() else {
                continue;
            };
            // It may have ended just now.
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            match queue_of(name.trim(), interface) {
                Some(Queue::Receive) => pollers.receive.push(Payer::Process(id)),
                Some(Queue::Transmit) => pollers.release.push(Payer::Process(id)),
                None => {}
            }
        }
        ensure!(
            !pollers.receive.is_empty(),
            "no thread polls what {interface} receives"
        );
        Ok(pollers)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Queue {
    Receive,
    Transmit,
}

/// What a thread of that name polls of an interface, if anything: it is called `napi/DEV-ID` (`napi_kthread_create` in
/// net/core/dev.c), and the polls of transmit queues have no ID (`netif_napi_add_tx`).
fn queue_of(thread: &str, interface: &str) -> Option<Queue> {
    let id = thread
        .strip_prefix("napi/")?
        .strip_prefix(interface)?
        .strip_prefix('-')?;
    Some(match id {
        "0" => Queue::Transmit,
        _ => Queue::Receive,
    })
}

/// CPU time of each group until now, ns.
pub(super) fn times_of<const N: usize>(groups: [&Vec<Payer>; N]) -> Result<[u64; N]> {
    let mut times = [0; N];
    for (time, payers) in times.iter_mut().zip(groups) {
        *time = time_of(payers)?;
    }
    Ok(times)
}

fn time_of(payers: &[Payer]) -> Result<u64> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_threads_are_told_by_their_names() {
        assert_eq!(queue_of("napi/eth0-8193", "eth0"), Some(Queue::Receive));
        assert_eq!(queue_of("napi/eth0-0", "eth0"), Some(Queue::Transmit));
        assert_eq!(queue_of("napi/eth1-8194", "eth0"), None);
        assert_eq!(queue_of("ksoftirqd/0", "eth0"), None);
    }
}
