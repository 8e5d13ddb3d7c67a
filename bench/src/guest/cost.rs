//! Whose work on packets is counted: threads, by their CPU time, which is to the nanosecond, and so in the guest to the
//! instruction.

use std::fs;

use anyhow::{Result, ensure};
use nix::unistd::Pid;

use crate::wire::cpu;

/// Threads that work for a subject besides those that poll the interface.
#[derive(Default)]
pub(super) struct Workers {
    /// All threads of these processes.
    pub(super) processes: Vec<u32>,
    pub(super) threads: Vec<Pid>,
}

impl Workers {
    /// Their CPU time until now, ns.
    pub(super) fn time(&self) -> Result<u64> {
        let mut sum = time_of(&self.threads)?;
        for process in &self.processes {
            sum += cpu::time_of_process(*process)?.as_nanos() as u64;
        }
        Ok(sum)
    }
}

/// CPU time of kernel threads or of this process's until now, ns.
pub(super) fn time_of(threads: &[Pid]) -> Result<u64> {
    let mut sum = 0;
    for thread in threads {
        sum += cpu::time_of(*thread)?.as_nanos() as u64;
    }
    Ok(sum)
}

/// The threads that poll an interface, which must do so in threads of their own (`/sys/class/net/DEV/threaded`, Linux
/// 5.12).
pub(super) struct Pollers {
    /// They poll receive queues: all work on a packet that comes in, up to its sending.
    pub(super) receive: Vec<Pid>,
    /// They poll transmit queues: they release what has been sent.
    pub(super) release: Vec<Pid>,
}

impl Pollers {
    pub(super) fn of(interface: &str) -> Result<Self> {
        let mut pollers = Self {
            receive: vec![],
            release: vec![],
        };
        for process in fs::read_dir("/proc")? {
            let process = process?;
            let Ok(id) = process
                .file_name()
                .to_string_lossy()
                .parse()
                .map(Pid::from_raw)
            else {
                continue;
            };
            // It may have ended just now.
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            match queue_of(name.trim(), interface) {
                Some(Queue::Receive) => pollers.receive.push(id),
                Some(Queue::Transmit) => pollers.release.push(id),
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
