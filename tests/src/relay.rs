//! The real `relay-user` as a child process in a simulated machine.

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    os::{
        fd::AsFd as _,
        unix::{fs::FileExt as _, net::UnixDatagram},
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::namespace::{Host, Process, readable};
use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

/// How long the daemon may take to say that it is ready, and to end when told to.
const PATIENCE: Duration = Duration::from_secs(20);

/// The path of a program of this workspace: the file named by the environment variable `variable`, else `name`
/// beside the running test or xtask, in `target/debug` or `target/release`.
///
/// # Errors
/// There is no such file: the text says how to build it.
pub fn binary(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let own = env::current_exe().context("cannot tell the path of this program")?;
    // Tests run from target/PROFILE/deps, xtask from target/PROFILE.
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("`{name}` is not built beside {}: run `cargo build --workspace`, or set {variable} to its path", own.display())
    })
}

/// The arguments that give `relay-user attach` an AMI to learn its calls from.
#[must_use]
pub fn ami_arguments(server: SocketAddr, user: &str, secret_file: &Path) -> [String; 6] {
    [
        "--ami".to_owned(),
        server.to_string(),
        "--ami-user".to_owned(),
        user.to_owned(),
        "--ami-secret-file".to_owned(),
        secret_file.display().to_string(),
    ]
}

/// A running `relay-user attach`. Dropping it kills it, as `kill -9` does.
#[derive(Debug)]
pub struct Relay {
    host: Host,
    program: PathBuf,
    process: Process,
    socket: PathBuf,
    /// `--socket PATH`, or nothing where it is in its default place.
    socket_args: Vec<OsString>,
    log: File,
}

/// A running `relay-user events`. Dropping it ends it.
#[derive(Debug)]
pub struct Followed {
    events: mpsc::Receiver<String>,
    _process: Process,
}

impl Followed {
    /// The next event, as soon as it has happened; none when the daemon has ended.
    ///
    /// # Errors
    /// Nothing happens, or what is printed is no JSON.
    pub fn next(&self) -> Result<Option<serde_json::Value>> {
        match self.events.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("no JSON: {line}")),
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(None),
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("nothing happens for {PATIENCE:?}"),
        }
    }

    /// The next event of this kind, and those before it.
    ///
    /// # Errors
    /// It does not come: the text holds what came.
    pub fn until(&self, kind: &str) -> Result<Vec<serde_json::Value>> {
        let mut events = Vec::new();
        loop {
            let event = self.next();
            let event = event.with_context(|| format!("no `{kind}` after {events:#?}"))?;
            let event = event.with_context(|| format!("the end, without `{kind}`: {events:#?}"))?;
            let found = event["kind"] == kind;
            events.push(event);
            if found {
                return Ok(events);
            }
        }
    }
}

impl Relay {
    /// Starts `relay-user attach IFACE ARGS… --socket …` in the machine and waits until it says that it is ready.
    ///
    /// # Errors
    /// It ends, or does not become ready in time: the text holds its standard error.
    pub fn attach<S: AsRef<OsStr>>(
        host: &Host,
        interface: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        Self::attach_through::<&str, S>(host, [], interface, args)
    }

    /// The same, started by a program with its arguments that replaces itself with the daemon (`setpriv …`, `env …`).
    ///
    /// # Errors
    /// It ends, or does not become ready in time: the text holds its standard error.
    pub fn attach_through<W: AsRef<OsStr>, S: AsRef<OsStr>>(
        host: &Host,
        starter: impl IntoIterator<Item = W>,
        interface: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let directory = host.directory("relay")?;
        let socket = directory.join("socket");
        let socket_args = vec!["--socket".into(), socket.clone().into()];
        Self::start(
            host,
            starter,
            interface,
            args,
            &directory,
            socket,
            socket_args,
        )
    }

    /// The same with the control socket where it is by default. One to a machine.
    ///
    /// # Errors
    /// As [`Relay::attach`].
    pub fn attach_plainly<S: AsRef<OsStr>>(
        host: &Host,
        interface: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let directory = host.directory("relay")?;
        let socket = Path::new("/run/relay-user").join(format!("{interface}.sock"));
        Self::start::<&str, S>(host, [], interface, args, &directory, socket, Vec::new())
    }

    fn start<W: AsRef<OsStr>, S: AsRef<OsStr>>(
        host: &Host,
        starter: impl IntoIterator<Item = W>,
        interface: &str,
        args: impl IntoIterator<Item = S>,
        directory: &Path,
        socket: PathBuf,
        socket_args: Vec<OsString>,
    ) -> Result<Self> {
        let program = binary("relay-user", "RELAY_USER_BIN")?;
        let (notify, log) = (directory.join("notify"), directory.join("log"));
        let ready = host
            .run(|| UnixDatagram::bind(&notify))
            .with_context(|| format!("cannot bind {}", notify.display()))?;
        let log = host.run(|| {
            File::options()
                .create_new(true)
                .read(true)
                .append(true)
                .open(log)
        })?;
        let mut words: Vec<_> = starter
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        words.push(program.clone().into_os_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["attach", interface])
            .args(args)
            .args(&socket_args)
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?);
        let process = host.spawn(command)?;
        let mut relay = Self {
            host: host.clone(),
            program,
            process,
            socket,
            socket_args,
            log,
        };
        relay.await_ready(&ready)?;
        Ok(relay)
    }

    fn await_ready(&mut self, ready: &UnixDatagram) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut message = [0; 4096];
        loop {
            // Short turns, so that an early end is seen: its socket never becomes readable.
            if readable(ready.as_fd(), Duration::from_millis(20))? {
                let len = ready.recv(&mut message)?;
                if String::from_utf8_lossy(&message[..len])
                    .lines()
                    .any(|line| line == "READY=1")
                {
                    return Ok(());
                }
            }
            if let Some(status) = self.process.try_wait() {
                bail!(
                    "relay-user attach ended before it was ready ({status}):\n{}",
                    self.log()
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "relay-user attach is not ready after {PATIENCE:?}:\n{}",
                    self.log()
                );
            }
        }
    }

    /// The daemon's control socket, which is visible inside the machine only ([`Host::run`]).
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// What the daemon has written to standard output and standard error until now.
    pub fn log(&self) -> String {
        let mut bytes = vec![
            0;
            self.log
                .metadata()
                .map_or(0, |metadata| metadata.len() as usize)
        ];
        match self.log.read_exact_at(&mut bytes, 0) {
            Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => format!("(no log: {error})"),
        }
    }

    /// The daemon's process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// CPU time that the daemon has used until now.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.process.cpu_time()
    }

    /// Another subcommand against this daemon, not yet started.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).args(&self.socket_args);
        command
    }

    /// Runs another subcommand against this daemon, whatever its exit status.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Output> {
        self.host.run_to_end(self.command(args))
    }

    /// Runs a subcommand with `--json` and returns what it prints.
    ///
    /// # Errors
    /// It fails, or prints no JSON: the text holds what it printed and the daemon's log.
    pub fn json<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<serde_json::Value> {
        let args: Vec<_> = args
            .into_iter()
            .map(|arg| arg.as_ref().to_owned())
            .chain([OsStr::new("--json").to_owned()])
            .collect();
        let output = self.run(&args)?;
        let (stdout, stderr) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        if !output.status.success() {
            bail!(
                "relay-user {args:?}: {}: {stderr}{stdout}\ndaemon:\n{}",
                output.status,
                self.log()
            );
        }
        serde_json::from_str(&stdout)
            .with_context(|| format!("relay-user {args:?} printed no JSON: {stdout}"))
    }

    /// Packets by reason since the daemon attached; every reason is there.
    ///
    /// # Errors
    /// `status` fails.
    pub fn reasons(&self) -> Result<BTreeMap<String, u64>> {
        let status = self.json(["status"])?;
        let reasons = status["reasons"].as_array().into_iter().flatten();
        reasons
            .map(|row| {
                let name = row["reason"].as_str().context("a reason without a name")?;
                let packets = row["packets"]
                    .as_u64()
                    .context("a reason without packets")?;
                Ok((name.to_owned(), packets))
            })
            .collect()
    }

    /// Runs `add` with these arguments, and returns the pair. Without proof: the ports have no PBX behind them.
    ///
    /// # Errors
    /// The pair is refused: the text holds what the daemon says of it.
    pub fn add<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<serde_json::Value> {
        let words = ["add", "--proof", "none"].map(OsString::from);
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        self.json(words.into_iter().chain(args))
    }

    /// The same, and waits until the kernel relays the pair. Returns its number.
    ///
    /// # Errors
    /// The pair is refused, or still waits after a while: the text holds what the daemon says of it.
    pub fn offload<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<u64> {
        let added = self.add(args)?;
        let id = added["id"].as_u64().context("a pair without number")?;
        self.wait_state(id, "offloaded")?;
        Ok(id)
    }

    /// Waits until `show` tells this state of a pair, and returns the pair.
    ///
    /// # Errors
    /// It does not in time: the text holds what it told last.
    pub fn wait_state(&self, id: u64, state: &str) -> Result<serde_json::Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let pair = self.json(["show", &id.to_string()])?;
            if pair["state"] == state {
                return Ok(pair);
            }
            if Instant::now() > deadline {
                bail!(
                    "pair {id} is not {state} after {PATIENCE:?}: {pair:#}\ndaemon:\n{}",
                    self.log()
                );
            }
        }
    }

    /// Starts `relay-user events`, which tells all since the daemon attached.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn follow(&self) -> Result<Followed> {
        let mut command = self.command(["events", "--json", "--since", "0"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = self.host.spawn(command)?;
        let stdout = process.child_mut().stdout.take();
        let lines = BufReader::new(stdout.context("no standard output")?).lines();
        let (told, events) = mpsc::channel();
        // Ends with the program, or when nobody listens any longer.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if told.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Followed {
            events,
            _process: process,
        })
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Sends SIGSTOP, and waits until every thread of the daemon stands still.
    ///
    /// # Errors
    /// It runs on, or has ended.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP);
        let deadline = Instant::now() + PATIENCE;
        let tasks = format!("/proc/{}/task", self.id());
        while !all_stopped(&tasks).with_context(|| tasks.clone())? {
            if Instant::now() > deadline {
                bail!("relay-user runs on {PATIENCE:?} after SIGSTOP");
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for the daemon's end.
    ///
    /// # Errors
    /// It still runs after `timeout`: the text holds its log.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let ended = self.process.wait(timeout);
        ended.with_context(|| format!("relay-user's log:\n{}", self.log()))
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// It does not end in time, or not with success: the text holds its log.
    pub fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM);
        let status = self.wait(PATIENCE)?;
        if !status.success() {
            bail!("relay-user ended with {status}:\n{}", self.log());
        }
        Ok(())
    }
}

/// Whether the state of every thread (field 3 of its `stat`, after the name in brackets; proc(5)) is "stopped".
fn all_stopped(tasks: &str) -> Result<bool> {
    for task in fs::read_dir(tasks)? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        if !stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" T "))
        {
            return Ok(false);
        }
    }
    Ok(true)
}
