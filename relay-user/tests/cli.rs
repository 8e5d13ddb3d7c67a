//! Drives the real binary: what a user sees, and what the shell gets.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt as _, net::UnixListener, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    thread,
    time::Duration,
};

use nix::unistd::geteuid;
use relay_user::{
    control::{self, model::Feed, server, socket::ControlSocket},
    events::{EventBus, Subject, TransitionKind},
};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};

const BINARY: &str = env!("CARGO_BIN_EXE_relay-user");
const FIRST: &str = "192.0.2.1:10000=192.0.2.11:30000";
const SECOND: &str = "192.0.2.1:10002=192.0.2.12:30002";
/// Longer than any of these commands takes when all is well.
const HANG: Duration = Duration::from_secs(20);
/// A user without rights ("nobody").
const NOBODY: u32 = 65_534;

fn relay(arguments: &[&str]) -> Output {
    command(arguments).output().expect("run relay-user")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .env_remove("RELAY_AMI_SECRET")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fails with this code, tells it on standard error in the right form, and prints nothing.
#[track_caller]
fn refuses(output: &Output, code: i32, fragments: &[&str]) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.starts_with("relay-user: "), "{message}");
    assert_eq!(text(&output.stdout), "", "{message}");
    for fragment in fragments {
        assert!(message.contains(fragment), "no `{fragment}` in: {message}");
    }
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

fn file(folder: &TempDir, name: &str, content: &str, mode: u32) -> String {
    let path = folder.path().join(name);
    fs::write(&path, content).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
    path.to_str().expect("path").to_owned()
}

/// A daemon's socket with the examples of docs/api.md behind it.
struct Daemon {
    socket: PathBuf,
    folder: TempDir,
    events: EventBus,
    thread: Option<thread::JoinHandle<()>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Daemon {
    fn start() -> Self {
        let folder = folder();
        let socket = folder.path().join("eth0.sock");
        let claimed = ControlSocket::claim(&socket).expect("claim");
        let (stop, stopped) = oneshot::channel::<()>();
        let events = EventBus::new();
        let bus = events.clone();
        let thread = thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            runtime.block_on(async {
                let (commands, received) = mpsc::channel(4);
                let (detached, ended) = oneshot::channel::<()>();
                tokio::spawn(controller(received, detached));
                let stop = async {
                    tokio::select! {
                        _ = stopped => {}
                        _ = ended => {}
                    }
                };
                server::serve(claimed, commands, bus, stop)
                    .await
                    .expect("serve");
            });
        });
        Self {
            socket,
            folder,
            events,
            thread: Some(thread),
            stop: Some(stop),
        }
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let mut all = arguments.to_vec();
        let socket = self.socket.to_str().expect("path");
        all.extend(["--socket", socket]);
        relay(&all)
    }

    #[track_caller]
    fn prints(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "");
        text(&output.stdout)
    }
}

/// A running `relay-user events`, ended with the test.
struct Follower {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Daemon {
    /// Something happens to the first stream of a pair of this number.
    fn happens(&self, pair: u64) {
        let subject = Subject {
            pair: Some(pair),
            stream: Some(0),
            ..Subject::feed(Feed::Api)
        };
        let kind = TransitionKind::TakenBack;
        self.events.publish(subject, kind, "told to\nby a test");
    }

    fn follow(&self, arguments: &[&str]) -> Follower {
        let mut child = command(&["events", "--socket"])
            .arg(&self.socket)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("run relay-user");
        let lines = BufReader::new(child.stdout.take().expect("stdout"));
        Follower { child, lines }
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("daemon");
        }
    }
}

impl Follower {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("read");
        line
    }

    /// How it ended by itself: its code, and what it told on standard error.
    fn ended(&mut self) -> (Option<i32>, String) {
        let mut stderr = self.child.stderr.take().expect("stderr");
        let (whole, told) = std::sync::mpsc::channel();
        thread::spawn(move || whole.send(std::io::read_to_string(&mut stderr)));
        let told = told.recv_timeout(HANG).expect("it ends").expect("read");
        (self.child.wait().expect("wait").code(), told)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn example<T: serde::de::DeserializeOwned>(heading: &str) -> T {
    let description = include_str!("../../docs/api.md");
    let section = description
        .split("\n## ")
        .find(|section| section.starts_with(heading))
        .expect("section");
    let block = section.split("```json\n").nth(1).expect("block");
    serde_json::from_str(block.split("```").next().expect("end")).expect("example")
}

async fn controller(mut commands: mpsc::Receiver<control::Command>, detached: oneshot::Sender<()>) {
    use control::{Command, model::ApiError, model::PairReport};
    let pair = || example::<PairReport>("A pair");
    let numbered = |id| {
        if id == 7 {
            Ok(pair())
        } else {
            Err(ApiError::unknown_pair(id))
        }
    };
    while let Some(command) = commands.recv().await {
        let answered = match command {
            Command::Add { reply, .. } => reply.send(Ok(pair())).is_ok(),
            Command::Show { id, reply } | Command::Remove { id, reply } => {
                reply.send(numbered(id)).is_ok()
            }
            Command::List { after, reply, .. } => {
                let pairs = [pair()].into_iter().filter(|pair| pair.id > after);
                reply.send(Ok(pairs.collect())).is_ok()
            }
            Command::Flush { reply } => reply.send(Ok(vec![pair()])).is_ok(),
            Command::Status { reply } => reply.send(Ok(example("The status"))).is_ok(),
            Command::AddAll { .. } | Command::Metrics { .. } => {
                unreachable!("no command of the program asks for it")
            }
            Command::Detach { reply } => {
                let _ = reply.send(Ok(example("Detaching")));
                break;
            }
        };
        assert!(answered, "nobody waited for an answer");
    }
    let _ = detached.send(());
}

#[test]
fn help_teaches() {
    let long = relay(&["--help"]);
    assert_eq!(long.status.code(), Some(0));
    let long = text(&long.stdout);
    for fragment in [
        "LOCAL=REMOTE",
        "EXAMPLES",
        "EXIT STATUS",
        "RELAY_AMI_SECRET",
        "attach",
        "detach",
    ] {
        assert!(long.contains(fragment), "{fragment}");
    }
    let add = text(&relay(&["add", "--help"]).stdout);
    for fragment in [
        "LOCAL=REMOTE",
        "IPv6",
        "101:96",
        "--payload-type",
        "--json",
        "--socket",
        "--interface",
    ] {
        assert!(add.contains(fragment), "{fragment}");
    }
    let attach = text(&relay(&["attach", "--help"]).stdout);
    for flag in [
        "--mode",
        "--ami ",
        "--ami-user",
        "--ami-secret-file",
        "--config",
        "--max-streams",
        "--dscp",
        "--socket",
        "--verbose",
        "--log-format",
    ] {
        assert!(attach.contains(flag), "{flag}");
    }
    let version = text(&relay(&["--version"]).stdout);
    assert_eq!(
        version,
        format!("relay-user {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn wrong_usage_is_code_2() {
    refuses(&relay(&["explode"]), 2, &["explode", "--help"]);
    refuses(
        &relay(&["add", "192.0.2.1:10000", SECOND]),
        2,
        &["write LOCAL=REMOTE"],
    );
    refuses(
        &relay(&["add", FIRST, FIRST]),
        2,
        &["both legs are", "relay-user add"],
    );
    refuses(
        &relay(&["add", "192.0.2.1:0=192.0.2.11:1", SECOND]),
        2,
        &["port 0"],
    );
    refuses(
        &relay(&["add", "192.0.2.1:1=224.0.0.1:1", SECOND]),
        2,
        &["multicast"],
    );
    refuses(
        &relay(&["add", FIRST, "[2001:db8::1]:1=[2001:db8::2]:2"]),
        2,
        &["address families"],
    );
    refuses(&relay(&["attach"]), 2, &["<IFACE>"]);
    refuses(
        &relay(&["attach", "eth0", "--max-streams", "0"]),
        2,
        &["from 2 to 1048576"],
    );
    let nothing = relay(&[]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(
        text(&nothing.stderr).starts_with("Relays the RTP"),
        "{}",
        text(&nothing.stderr)
    );
}

#[test]
fn without_a_daemon_the_remedy_is_named() {
    let folder = folder();
    let path = folder.path().join("eth0.sock");
    let socket = path.to_str().expect("path");
    for arguments in [
        &["list"][..],
        &["show", "7"],
        &["remove", "7"],
        &["flush"],
        &["status"],
        &["events"],
        &["add", FIRST, SECOND],
    ] {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--socket", socket]);
        refuses(
            &relay(&arguments),
            1,
            &[socket, "start one with `relay-user attach IFACE`"],
        );
    }
    refuses(
        &relay(&["status", "--interface", "norelay0"]),
        1,
        &["/run/relay-user/norelay0.sock"],
    );
    drop(UnixListener::bind(&path).expect("socket"));
    refuses(
        &relay(&["status", "--socket", socket]),
        1,
        &["is gone", "relay-user detach"],
    );
}

#[test]
fn what_is_no_relay_daemon_is_told() {
    let folder = folder();
    let path = folder.path().join("eth0.sock");
    let listener = UnixListener::bind(&path).expect("socket");
    let answers = [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        "HTTP/1.1 500 No\r\n\r\n",
        "SSH-2.0\r\n",
        "",
    ];
    let thread = thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).expect("read");
            stream.write_all(answer.as_bytes()).expect("write");
        }
    });
    let socket = path.to_str().expect("path");
    for fragment in [
        "does not answer like a relay daemon",
        "500",
        "broke off",
        "broke off",
    ] {
        refuses(
            &relay(&["status", "--socket", socket]),
            1,
            &[socket, fragment],
        );
    }
    thread.join().expect("thread");
}

#[test]
fn commands_print_for_people_and_programs() {
    let daemon = Daemon::start();
    assert_eq!(
        daemon.prints(&["add", FIRST, SECOND]),
        "pair 7: offloaded\n"
    );
    assert!(daemon.prints(&["list"]).starts_with("ID  FEED  STATE"));
    assert!(
        daemon
            .prints(&["show", "7"])
            .contains("PJSIP/alice-00000001")
    );
    assert!(
        daemon
            .prints(&["remove", "7"])
            .ends_with("1 pair removed\n")
    );
    assert!(daemon.prints(&["flush"]).ends_with("1 pair removed\n"));
    assert!(daemon.prints(&["status"]).starts_with("interface  eth0"));
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&daemon.prints(arguments)).expect("JSON")
    };
    let pair: serde_json::Value = example("A pair");
    assert_eq!(json(&["add", FIRST, SECOND, "--json"]), pair);
    assert_eq!(json(&["show", "7", "--json"]), pair);
    assert_eq!(json(&["remove", "7", "--json"]), pair);
    assert_eq!(json(&["list", "--json"])["pairs"][0], pair);
    assert_eq!(json(&["flush", "--json"])["pairs"][0], pair);
    assert_eq!(
        json(&["status", "--json"]),
        example::<serde_json::Value>("The status")
    );
    refuses(
        &daemon.ask(&["show", "8"]),
        1,
        &["there is no pair 8: `relay-user list`"],
    );
}

#[test]
fn events_are_followed_until_the_daemon_ends() {
    let mut daemon = Daemon::start();
    daemon.happens(7);
    daemon.happens(8);
    let mut all = daemon.follow(&["--since", "0"]);
    let mut programs = daemon.follow(&["--json", "--since", "1"]);
    assert!(all.line().starts_with("TIME  "));
    for pair in 7..=9 {
        let line = all.line();
        let cells: Vec<_> = line.split("  ").map(str::trim).collect();
        let cells: Vec<_> = cells.into_iter().filter(|cell| !cell.is_empty()).collect();
        let number = pair.to_string();
        let cause = "told to\u{fffd}by a test";
        assert_eq!(
            cells[1..],
            ["taken back", &number, "first", cause],
            "{line}"
        );
        // Each line is there as soon as its event has happened.
        if pair == 8 {
            daemon.happens(9);
        }
    }
    for pair in 8..=9 {
        let line = programs.line();
        let event: serde_json::Value = serde_json::from_str(&line).expect(&line);
        assert_eq!(event["serial"], pair - 6);
        assert_eq!(event["pair"], pair);
        assert_eq!(event["kind"], "taken_back");
        assert_eq!(event["cause"], "told to\nby a test");
    }
    let mut now = daemon.follow(&[]);
    assert!(now.line().starts_with("TIME  "));
    daemon.happens(10);
    assert!(now.line().contains("  10  "));
    daemon.end();
    for mut follower in [all, programs, now] {
        let (code, told) = follower.ended();
        assert_eq!(code, Some(0), "{told}");
        assert_eq!(told, "relay-user: the daemon has ended\n");
    }
}

#[test]
fn events_end_quietly_when_their_reader_has_seen_enough() {
    let daemon = Daemon::start();
    daemon.happens(7);
    // Once where nothing more happens, and once where a line cannot be written.
    for more in [false, true] {
        let mut follower = daemon.follow(&["--json", "--since", "0"]);
        assert!(follower.line().contains("\"serial\":1,"));
        let (reader, _) = std::io::pipe().expect("pipe");
        drop(std::mem::replace(
            &mut follower.lines,
            BufReader::new(ChildStdout::from(OwnedFd::from(reader))),
        ));
        if more {
            daemon.happens(8);
        }
        assert_eq!(follower.ended(), (Some(0), String::new()));
    }
}

#[test]
fn events_that_break_off_are_a_failure() {
    let folder = folder();
    let path = folder.path().join("eth0.sock");
    let listener = UnixListener::bind(&path).expect("socket");
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let answers = [
        format!("{head}3\r\n:\n\n\r\n"),
        format!("{head}8\r\ndata: 1\n\r\n0\r\n\r\n"),
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}".to_owned(),
    ];
    let thread = thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).expect("read");
            stream.write_all(answer.as_bytes()).expect("write");
        }
    });
    let socket = path.to_str().expect("path");
    for fragment in ["broke off", "like a relay daemon", "no stream of events"] {
        let arguments = ["events", "--json", "--socket", socket];
        refuses(&relay(&arguments), 1, &[socket, fragment]);
    }
    thread.join().expect("thread");
}

#[test]
fn detach_ends_the_daemon_of_that_interface_only() {
    let daemon = Daemon::start();
    refuses(
        &daemon.ask(&["detach", "eth1"]),
        1,
        &["attached to eth0, not to eth1"],
    );
    assert!(daemon.socket.exists());
    let json: serde_json::Value =
        serde_json::from_str(&daemon.prints(&["detach", "eth0", "--json"])).expect("JSON");
    assert_eq!(json, example::<serde_json::Value>("Detaching"));
    assert!(!daemon.socket.exists());
}

#[test]
fn a_reader_that_stops_is_no_failure() {
    let daemon = Daemon::start();
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let status = command(&["list", "--socket", daemon.socket.to_str().expect("path")])
        .stdout(writer)
        .status()
        .expect("run relay-user");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn another_user_is_kept_out() {
    if !geteuid().is_root() {
        eprintln!("SKIP: changing to another user takes root");
        return;
    }
    let daemon = Daemon::start();
    let open = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    };
    // A copy, because the folder of the real binary may be closed to that user.
    let binary = daemon.folder.path().join("relay-user");
    // By another process: a file that this one has open for writing, if only in a child that a
    // parallel test has just forked, cannot be run (ETXTBSY, execve(2)).
    let copied = Command::new("cp")
        .arg(BINARY)
        .arg(&binary)
        .status()
        .expect("run cp");
    assert!(copied.success());
    open(&binary, 0o755);
    open(daemon.folder.path(), 0o755);
    let as_nobody = || {
        Command::new(&binary)
            .args(["status", "--socket", daemon.socket.to_str().expect("path")])
            .current_dir("/")
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .expect("run relay-user")
    };
    refuses(&as_nobody(), 1, &["not allowed to connect", "as root"]);
    open(&daemon.socket, 0o666);
    refuses(&as_nobody(), 1, &["only root and the daemon's own user"]);
}

#[test]
fn configuration_errors_name_the_line() {
    let folder = folder();
    let attach = |config: &str, more: &[&str]| {
        let mut arguments = vec!["attach", "norelay0", "--config", config];
        arguments.extend(more);
        relay(&arguments)
    };
    let config = file(
        &folder,
        "relay.toml",
        "mode = \"auto\"\nmax_streams = 8\n",
        0o644,
    );
    let place = format!("{config}:2:1: unknown key `max_streams`: did you mean `max-streams`?");
    refuses(&attach(&config, &[]), 1, &[&place]);
    let config = file(&folder, "relay.toml", "\nmode = fast\n", 0o644);
    refuses(&attach(&config, &[]), 1, &[&format!("{config}:2:8: ")]);
    let config = file(
        &folder,
        "relay.toml",
        "[ami]\naddress = \"127.0.0.1:5038\"\n",
        0o644,
    );
    refuses(&attach(&config, &[]), 1, &["no user: add --ami-user"]);
    refuses(
        &attach(&config, &["--ami-user", "relay"]),
        1,
        &["no secret: add --ami-secret-file"],
    );
    let secret = file(&folder, "secret", "hunter2\n", 0o644);
    let output = attach(
        &config,
        &["--ami-user", "relay", "--ami-secret-file", &secret],
    );
    refuses(&output, 1, &["chmod 600", &secret]);
    assert!(!text(&output.stderr).contains("hunter2"));
    refuses(
        &attach("/nonexistent/relay.toml", &[]),
        1,
        &["/nonexistent/relay.toml", "No such file"],
    );
}

#[test]
fn the_documented_configuration_is_valid() {
    let folder = folder();
    let text_of = include_str!("../../docs/configuration.md");
    let example = text_of
        .split("```toml\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next());
    let config = file(&folder, "relay.toml", example.expect("example"), 0o644);
    // The one thing it lacks here is the secret, which is read last.
    let output = relay(&["attach", "norelay0", "--config", &config]);
    refuses(&output, 1, &["cannot read the secret file", "ami.secret"]);
}

#[test]
fn a_secret_in_the_environment_is_never_shown() {
    let attach = |secret: &std::ffi::OsStr| {
        command(&[
            "attach",
            "norelay0",
            "-vv",
            "--ami",
            "127.0.0.1:1",
            "--ami-user",
            "relay",
        ])
        .env("RELAY_AMI_SECRET", secret)
        .output()
        .expect("run relay-user")
    };
    use std::os::unix::ffi::OsStrExt as _;
    for secret in [&b"hunter2"[..], b"hunter2\nmore", b"hunter2\xff"] {
        let output = attach(std::ffi::OsStr::from_bytes(secret));
        assert_eq!(output.status.code(), Some(1));
        assert!(
            !text(&output.stderr).contains("hunter2"),
            "{}",
            text(&output.stderr)
        );
    }
}
