//! Which CPU threads run on, which of them goes first there, and what they take of it.

use std::{fs, io, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    libc,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Has a thread run on one CPU only. 0 is the calling one.
///
/// # Errors
/// There is no such CPU, or no such thread.
pub(crate) fn pin(thread: Pid, cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(thread, &cpus).with_context(|| format!("cannot run on CPU {cpu} only"))
}

/// Does so with the calling thread.
///
/// # Errors
/// There is no such CPU.
pub(crate) fn pin_here(cpu: usize) -> Result<()> {
    pin(Pid::from_raw(0), cpu)
}

/// The threads that a process has now. Those that they start inherit CPU and priority.
///
/// # Errors
/// There is no such process.
pub(crate) fn threads_of(process: u32) -> Result<Vec<Pid>> {
    let threads = fs::read_dir(format!("/proc/{process}/task"))?;
    let ids = threads.map(|thread| {
        let name = thread?.file_name();
        Ok(Pid::from_raw(
            name.to_str().context("a thread's id")?.parse()?,
        ))
    });
    ids.collect()
}

/// Puts a thread before all that are scheduled as usual (`SCHED_FIFO`), where softirqs are too.
///
/// # Errors
/// There is no such thread.
pub(crate) fn put_first(thread: Pid) -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads the parameters, which live across the call.
    let set = unsafe {
        libc::sched_setscheduler(thread.as_raw(), libc::SCHED_FIFO, &raw const parameters)
    };
    ensure!(set == 0, "SCHED_FIFO: {}", io::Error::last_os_error());
    Ok(())
}

/// Gives a thread nearly all that is left of its CPU. 0 is the calling one.
///
/// # Errors
/// There is no such thread, or not root.
pub(crate) fn take_most(thread: Pid) -> Result<()> {
    const HIGHEST: i32 = -20;
    let id = thread.as_raw().cast_unsigned();
    // SAFETY: a system call without pointers. To Linux, this is about the thread.
    let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, id, HIGHEST) };
    ensure!(set == 0, "setpriority: {}", io::Error::last_os_error());
    Ok(())
}

/// CPU time of a thread until now, of the kernel's or any process, to the nanosecond.
///
/// # Errors
/// There is no such thread.
pub(crate) fn time_of(thread: Pid) -> Result<Duration> {
    time(Path::new(&format!("/proc/{thread}/task/{thread}")))
}

/// CPU time until now of those threads of a process that are there now.
///
/// # Errors
/// There is no such process.
pub(crate) fn time_of_process(process: u32) -> Result<Duration> {
    let path = format!("/proc/{process}/task");
    let mut sum = Duration::ZERO;
    for thread in fs::read_dir(&path).with_context(|| path.clone())? {
        // It may have ended.
        sum += time(&thread?.path()).unwrap_or_default();
    }
    Ok(sum)
}

/// The first field of `schedstat` (Documentation/scheduler/sched-stats.rst).
fn time(thread: &Path) -> Result<Duration> {
    let path = thread.join("schedstat");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let first = text.split_whitespace().next();
    Ok(Duration::from_nanos(
        first.context("an empty schedstat")?.parse()?,
    ))
}
