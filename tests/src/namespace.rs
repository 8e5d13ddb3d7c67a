//! Simulated machines: a network namespace and a mount namespace without names, held by file descriptors only.
//!
//! A name in `/run/netns` outlives a killed test; a file descriptor does not.

use std::{
    env,
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _, process::CommandExt as _},
    },
    panic,
    path::PathBuf,
    process::{self, Child, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    time::ClockId,
    unistd::Pid,
};

/// One simulated machine. Clones are the same machine; it is gone with the last clone, socket and child in it.
///
/// It has its own interfaces, routes, sysctls and `/sys/class/net`, an empty bpffs at `/sys/fs/bpf` and an empty
/// `/run`. All other files are those of the real machine.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    namespaces: Arc<Namespaces>,
}

#[derive(Debug)]
pub(crate) struct Namespaces {
    net: OwnedFd,
    mount: OwnedFd,
}

impl Namespaces {
    fn of_this_thread() -> Result<Self> {
        let open = |path| {
            File::open(path)
                .map(OwnedFd::from)
                .with_context(|| format!("open {path}"))
        };
        Ok(Self {
            net: open("/proc/thread-self/ns/net")?,
            mount: open("/proc/thread-self/ns/mnt")?,
        })
    }
}

impl Host {
    /// Makes a machine whose only interface is `lo` (up). `name` is for messages only: two machines may share it.
    ///
    /// # Errors
    /// Not root, or the kernel refuses a namespace or one of its mounts.
    pub fn new(name: &str) -> Result<Self> {
        // A thread of its own, because `unshare` cannot be undone and must not move the test's thread.
        let namespaces = thread::scope(|scope| scope.spawn(create).join())
            .map_err(|panic| anyhow!("creating namespaces panicked: {panic:?}"))?
            .with_context(|| {
                format!("cannot create the simulated machine `{name}` (tests need root)")
            })?;
        let host = Self {
            name: name.to_owned(),
            namespaces: Arc::new(namespaces),
        };
        // Addresses are usable at once, and no router discovery disturbs the captures.
        for scope in ["all", "default"] {
            host.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
            host.sysctl(&format!("net/ipv6/conf/{scope}/accept_ra"), "0")?;
            host.sysctl(&format!("net/ipv6/conf/{scope}/router_solicitations"), "0")?;
        }
        host.ip("link set lo up")?;
        Ok(host)
    }

    /// The machine that this thread runs in, for programs that have a whole one to themselves.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn this(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            namespaces: Arc::new(Namespaces::of_this_thread()?),
        })
    }

    /// The name given to [`Host::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` in a thread inside the machine and returns what it returns. Sockets opened by it stay in the
    /// machine, whichever thread uses them later.
    ///
    /// # Panics
    /// When `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the machine for good.
    fn enter(&self) {
        let directory = env::current_dir();
        // `setns` to a mount namespace wants a thread that shares its root and working directory with no other.
        unshare(CloneFlags::CLONE_FS).expect("a thread may stop sharing its working directory");
        setns(&self.namespaces.net, CloneFlags::CLONE_NEWNET)
            .expect("root may enter a network namespace it made");
        setns(&self.namespaces.mount, CloneFlags::CLONE_NEWNS)
            .expect("root may enter a mount namespace it made");
        if let Ok(directory) = directory {
            // Entering put the thread at `/`; a directory that is hidden here leaves it there.
            let _ = env::set_current_dir(directory);
        }
    }

    /// Starts `command` in the machine. It is killed when the returned guard is dropped, and when this process ends
    /// in whatever way.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Process> {
        start(command, Some(Arc::clone(&self.namespaces)))
            .with_context(|| format!("in the simulated machine `{}`", self.name))
    }

    /// Makes a new directory below the machine's `/run`, which only its own processes, and [`Host::run`], can see.
    /// It goes with the machine.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let path = PathBuf::from(format!(
            "/run/{name}-{}",
            NUMBER.fetch_add(1, Ordering::Relaxed)
        ));
        self.run(|| fs::create_dir(&path))
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Writes a file that only its owner can get at, as a secret must be, in a new directory of [`Host::directory`].
    ///
    /// # Errors
    /// It cannot be written.
    pub fn private_file(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.directory("private")?.join(name);
        let write = || {
            let mut options = File::options();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(content.as_bytes())
        };
        self.run(write)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Runs `command` in the machine to its end and returns its output, whatever its exit status. Standard input is
    /// empty.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn run_to_end(&self, mut command: Command) -> Result<Output> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.spawn(command)?.output()
    }

    /// As [`Host::run_to_end`], and takes a failure of the program as an error.
    ///
    /// # Errors
    /// The program cannot be started, or fails: the text holds its standard error.
    pub fn output(&self, command: Command) -> Result<Output> {
        let shown = format!("{command:?}");
        let output = self.run_to_end(command)?;
        if !output.status.success() {
            bail!(
                "{shown} in the simulated machine `{}`: {}: {}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        Ok(output)
    }

    /// Runs iproute2's `ip` in the machine: one command a line, each without the leading word `ip`.
    ///
    /// # Errors
    /// iproute2 is not installed, or refuses a line: the text holds its message.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.lines("ip", lines).map(drop)
    }

    /// Runs iproute2's `tc` in the machine, in the same way, and returns all that it prints.
    ///
    /// # Errors
    /// As [`Host::ip`].
    pub fn tc(&self, lines: &str) -> Result<String> {
        self.lines("tc", lines)
    }

    fn lines(&self, program: &str, lines: &str) -> Result<String> {
        let mut printed = String::new();
        for line in lines.lines() {
            let mut command = Command::new(program);
            command.args(line.split_whitespace());
            let output = self.output(command)?;
            printed += &String::from_utf8_lossy(&output.stdout);
        }
        Ok(printed)
    }

    /// Writes a sysctl of the machine, named as a path below `/proc/sys`.
    ///
    /// # Errors
    /// The kernel has no such sysctl or refuses the value.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(format!("/proc/sys/{path}"), value))
            .with_context(|| format!("cannot set sysctl {path} to {value}"))
    }

    /// The network namespace as a path that other programs (`ip … netns PATH`) can open while this process lives.
    pub(crate) fn net_path(&self) -> String {
        format!(
            "/proc/{}/fd/{}",
            process::id(),
            self.namespaces.net.as_raw_fd()
        )
    }
}

/// Starts a child that dies with this process, in a machine or, with `None`, in the real one.
///
/// # Errors
/// The program cannot be started.
pub(crate) fn start(mut command: Command, machine: Option<Arc<Namespaces>>) -> Result<Process> {
    let name = command.get_program().to_string_lossy().into_owned();
    let directory = match command.get_current_dir() {
        Some(directory) => directory.to_owned(),
        None => env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
    };
    let directory =
        CString::new(directory.as_os_str().as_bytes()).context("working directory holds a NUL")?;
    let parent = process::id();
    // SAFETY: the closure runs between fork and exec, and makes system calls only: no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            if let Some(namespaces) = &machine {
                setns(&namespaces.net, CloneFlags::CLONE_NEWNET)?;
                setns(&namespaces.mount, CloneFlags::CLONE_NEWNS)?;
                // Entering put the child at `/`; a directory that is hidden there leaves it so.
                libc::chdir(directory.as_ptr());
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above: then no signal comes any more.
            if libc::getppid().cast_unsigned() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    let child =
        in_nursery(move || command.spawn()).with_context(|| format!("cannot start `{name}`"))?;
    Process::new(name, child)
}

/// Runs in a thread that ends afterwards: the namespaces are then held by the returned descriptors only.
fn create() -> Result<Namespaces> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("unshare")?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("make mounts private")?;
    // /sys/class/net shows the network namespace of whoever mounted it.
    umount2("/sys", MntFlags::MNT_DETACH).context("unmount /sys")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE).context("mount /sys")?;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        NONE,
    )
    .context("mount /sys/fs/bpf")?;
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .context("mount /run")?;
    Namespaces::of_this_thread()
}

type Birth = Box<dyn FnOnce() + Send>;

/// Runs `work` in the one thread that starts all children and never ends: `PR_SET_PDEATHSIG` fires when the
/// *thread* that forked is gone, and a test's thread may end before its process does.
fn in_nursery<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    static NURSERY: OnceLock<Sender<Birth>> = OnceLock::new();
    let nursery = NURSERY.get_or_init(|| {
        let (sender, births) = mpsc::channel::<Birth>();
        thread::Builder::new()
            .name("nursery".to_owned())
            .spawn(move || births.into_iter().for_each(|birth| birth()))
            .expect("a thread can be started");
        sender
    });
    let (sender, result) = mpsc::channel();
    let birth = Box::new(move || {
        let _ = sender.send(work());
    });
    nursery.send(birth).expect("the nursery never ends");
    result.recv().expect("starting a child does not panic")
}

/// A child in a [`Host`]. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
}

impl Process {
    fn new(name: String, child: Child) -> Result<Self> {
        // SAFETY: a plain system call without pointers; the process is ours and not yet reaped.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        if pidfd < 0 {
            return Err(io::Error::last_os_error()).context("pidfd_open (Linux 5.3)");
        }
        let pidfd = i32::try_from(pidfd).context("pidfd_open returned no descriptor")?;
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Ok(Self { name, child, pidfd })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The pipes asked for in the command given to [`Host::spawn`].
    pub fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal. A process that has already ended is no error.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// It still runs after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        if !readable(self.pidfd.as_fd(), timeout)? {
            bail!(
                "`{}` (pid {}) still runs after {timeout:?}",
                self.name,
                self.child.id()
            );
        }
        Ok(self.child.wait()?)
    }

    /// The exit status, if the process has ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Reads both pipes to their end and waits.
    pub(crate) fn output(&mut self) -> Result<Output> {
        let mut stderr = self.child.stderr.take();
        let mut stdout = self.child.stdout.take();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        thread::scope(|scope| {
            let errors = scope.spawn(|| {
                stderr
                    .as_mut()
                    .map_or(Ok(0), |pipe| pipe.read_to_end(&mut err))
            });
            stdout
                .as_mut()
                .map_or(Ok(0), |pipe| pipe.read_to_end(&mut out))?;
            errors.join().expect("reading a pipe does not panic")
        })
        .with_context(|| format!("cannot read the output of `{}`", self.name))?;
        Ok(Output {
            status: self.child.wait()?,
            stdout: out,
            stderr: err,
        })
    }

    /// CPU time used so far by all threads, user and system.
    ///
    /// # Errors
    /// The process has been reaped.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time used so far by all threads of a process, user and system, also of those that have ended.
///
/// # Errors
/// No such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    // In nanoseconds, where /proc/PID/stat counts ticks of 10 ms.
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(pid)?));
    let time = clock.and_then(ClockId::now);
    let time = time.with_context(|| format!("CPU time of process {pid}"))?;
    Ok(time.into())
}

/// Waits until `descriptor` is readable; false after `timeout`.
pub(crate) fn readable(descriptor: BorrowedFd<'_>, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut set = [PollFd::new(descriptor, PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut set, timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
}
