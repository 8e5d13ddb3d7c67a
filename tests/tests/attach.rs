//! The life of the daemon: what it refuses, what it leaves behind, and what becomes of calls when it ends, stands
//! still, or makes room for the next.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Seek as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TcAttachType};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use relay_tests::{
    link::{End, connect},
    namespace::Host,
    pair::{Legs, Sockets},
    pbx::{self, Pbx},
    phone::{Bank, Phone, Talk},
    relay::{Followed, Relay, binary},
    topology::{Direct, PBX_V4},
};
use relay_user::datapath;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// A good pair of the network [`Direct`].
const FIRST: &str = "192.0.2.1:10000=192.0.2.11:30000";
const SECOND: &str = "192.0.2.1:10002=192.0.2.12:30002";
/// Where the daemon of eth0 pins.
const PINS: &str = "/sys/fs/bpf/relay/v6/eth0";
/// Where refused daemons would put their sockets.
const SOCKET: &str = "/run/refused.sock";
/// CAP_NET_ADMIN (12) and CAP_BPF (39), as `/proc/PID/status` shows them.
const KEPT_CAPABILITIES: u64 = 1 << 12 | 1 << 39;

/// Waits for what no event announces.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn program() -> PathBuf {
    binary("relay-user", "RELAY_USER_BIN").expect("relay-user is built")
}

/// Runs a command line in a machine to its end; returns the exit code and all it wrote.
fn run(host: &Host, words: &[&str]) -> (Option<i32>, String) {
    // A file and not pipes, so that a daemon that starts against all expectation is killed and not waited for.
    let mut written = tempfile::tempfile().expect("temporary file");
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(written.try_clone().expect("descriptor"))
        .stderr(written.try_clone().expect("descriptor"));
    let mut process = host.spawn(command).expect("started");
    let ended = process.wait(PATIENCE);
    drop(process);
    written.rewind().expect("rewound");
    let text = io::read_to_string(written).expect("text");
    match ended {
        Ok(status) => (status.code(), text),
        Err(error) => panic!("{words:?}: {error:#}: {text}"),
    }
}

/// Asserts that a command line fails and says all this.
fn refused(host: &Host, words: &[&str], says: &[&str]) {
    let (code, text) = run(host, words);
    assert!(matches!(code, Some(1 | 2)), "{words:?}: {code:?}: {text}");
    for fragment in says {
        assert!(
            text.contains(fragment),
            "{words:?}: no `{fragment}` in: {text}"
        );
    }
}

/// `ip -details -json link show`.
fn link(host: &Host, interface: &str) -> Value {
    let mut command = Command::new("ip");
    command.args(["-details", "-json", "link", "show", "dev", interface]);
    let output = host.output(command).expect("ip link");
    let links: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    links[0].clone()
}

/// The id of the XDP program on an interface.
fn xdp_program(host: &Host, interface: &str) -> Option<u32> {
    let id = link(host, interface)["xdp"]["prog"]["id"].as_u64()?;
    Some(id.try_into().expect("32 bits"))
}

/// The ids of the programs on one side of an interface's traffic control.
fn traffic_control(host: &Host, interface: &str, side: TcAttachType) -> Vec<u32> {
    host.run(|| {
        let (_, programs) = SchedClassifier::query_tcx(interface, side).expect("TCX");
        programs.iter().map(|program| program.id()).collect()
    })
}

/// The ids of all programs on an interface: of XDP, and on both sides of traffic control.
fn programs(host: &Host, interface: &str) -> Vec<u32> {
    let sides = [TcAttachType::Ingress, TcAttachType::Egress];
    let tc = sides.map(|side| traffic_control(host, interface, side));
    let xdp = xdp_program(host, interface);
    xdp.into_iter().chain(tc.into_iter().flatten()).collect()
}

fn exists(host: &Host, path: impl AsRef<Path> + Send) -> bool {
    host.run(|| fs::symlink_metadata(path).is_ok())
}

/// Asserts that the relay has left nothing on the machine.
fn nothing_left(host: &Host, socket: &Path) {
    assert!(!exists(host, "/sys/fs/bpf/relay"), "pins");
    assert_eq!(programs(host, "eth0"), [0; 0], "programs");
    let lock = socket.with_extension("sock.lock");
    assert!(!exists(host, socket) && !exists(host, lock), "socket");
}

/// What one attached daemon has in the kernel.
struct Kernel {
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
}

impl Kernel {
    fn of(host: &Host) -> Self {
        let maps = host.run(|| {
            let pins = fs::read_dir(PINS).expect("pins");
            let pins = pins.map(|pin| pin.expect("pin").path());
            pins.filter(|pin| !pin.to_string_lossy().ends_with("_link"))
                .map(|pin| aya::maps::MapInfo::from_pin(pin).expect("a map").id())
                .collect()
        });
        Self {
            programs: BTreeSet::from_iter(programs(host, "eth0")),
            maps,
        }
    }

    /// The kernel frees what nobody holds any more a moment later.
    fn is_gone(&self) -> bool {
        let programs = aya::programs::loaded_programs().filter_map(Result::ok);
        let maps = aya::maps::loaded_maps().filter_map(Result::ok);
        programs
            .map(|it| it.id())
            .all(|id| !self.programs.contains(&id))
            && maps.map(|it| it.id()).all(|id| !self.maps.contains(&id))
    }
}

/// A line of `/proc/PID/status`.
fn status_line(pid: u32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.expect(key).trim().to_owned()
}

/// A file for its owner only.
fn file(host: &Host, name: &str, content: &str) -> String {
    let path = host.private_file(name, content).expect("file");
    path.to_str().expect("text").to_owned()
}

#[test]
fn what_cannot_be_attached_is_refused_whole() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    host.ip("link add ifb0 type ifb\nlink set ifb0 up")
        .expect("ifb");
    let typo = file(host, "typo.toml", "mode = \"generic\"\nmax-stream = 8\n");
    let table = file(host, "ami.toml", "[ami]\nsecret = \"hunter2\"\n");
    let open = file(host, "secret", "hunter2");
    host.run(|| fs::set_permissions(&open, fs::Permissions::from_mode(0o644)))
        .expect("mode");
    let closed = file(host, "secret", "hunter2");
    let empty = file(host, "secret", "\n");
    let taken = file(host, "taken.sock", "precious");
    let ami = ["--ami", "127.0.0.1:5038", "--ami-user", "relay"];
    let ami_with = |file| [&ami[..], &["--ami-secret-file", file]].concat();
    let typo_line = format!("{typo}:2:1: unknown key `max-stream`");
    let open_mode = format!("chmod 600 {open}");
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("eth7", &[], &["no interface `eth7`", "eth0", "ifb0"]),
        ("a/b", &[], &["`a/b` cannot be the name of an interface"]),
        (
            "lo",
            &["--mode", "native"],
            &[
                "lo is neither Ethernet nor a plain IP link",
                "attach to the interface",
            ],
        ),
        (
            "ifb0",
            &["--mode", "native"],
            &["ifb0 refuses native XDP", "--mode generic"],
        ),
        (
            "eth0",
            &["--mode", "fast"],
            &["fast", "auto, native, generic, tc"],
        ),
        (
            "eth0",
            &["--mode", "generic", "--priority", "1:10"],
            &["the priority 1:10", "use --mode tc, or auto"],
        ),
        ("eth0", &["--priority", "16"], &["16", "such as 1:10"]),
        ("eth0", &["--dscp", "64"], &["64", "0 to 63"]),
        ("eth0", &["--max-streams", "1"], &["from 2 to 1048576"]),
        (
            "eth0",
            &["--config", "/run/none.toml"],
            &["/run/none.toml", "No such file"],
        ),
        ("eth0", &["--config", &typo], &[&typo_line, "`max-streams`"]),
        (
            "eth0",
            &["--config", &table],
            &["ami.toml:2:1: unknown key `ami.secret`"],
        ),
        ("eth0", &["--ami-secret", "hunter2"], &["--ami-secret-file"]),
        (
            "eth0",
            &ami[..2],
            &["127.0.0.1:5038", "no user", "--ami-user"],
        ),
        ("eth0", &ami[2..], &["no AMI address", "--ami HOST:PORT"]),
        (
            "eth0",
            &ami,
            &["no secret", "--ami-secret-file", "RELAY_AMI_SECRET"],
        ),
        ("eth0", &ami_with(&open), &["mode 0644", &open_mode]),
        ("eth0", &ami_with(&empty), &[&empty, "the secret is empty"]),
        (
            "eth0",
            &ami_with("/run/none"),
            &["/run/none", "No such file"],
        ),
        (
            "eth0",
            &ami_with(&closed),
            &["cannot connect to AMI at 127.0.0.1:5038", "enabled=yes"],
        ),
    ];
    let program = program();
    let program = program.to_str().expect("text");
    for (interface, arguments, says) in cases {
        let words = [
            &[program, "attach", interface, "--socket", SOCKET],
            *arguments,
        ]
        .concat();
        refused(host, &words, says);
        let (_, text) = run(host, &words);
        // An argument is echoed; nothing that was read is.
        assert!(
            !text.contains("hunter2") || arguments.contains(&"hunter2"),
            "{text}"
        );
    }
    let sockets: [(&str, &[&str]); 3] = [
        (&taken, &["no socket", "another --socket"]),
        ("/run/none/s", &["/run/none does not exist", "create it"]),
        (
            &format!("/run/{}", "x".repeat(120)),
            &["too long", "107 bytes"],
        ),
    ];
    for (socket, says) in sockets {
        refused(host, &[program, "attach", "eth0", "--socket", socket], says);
    }
    let precious = host.run(|| fs::read_to_string(&taken)).expect("file");
    assert_eq!(precious, "precious");
    nothing_left(host, Path::new(SOCKET));
    let other = net.pbx_interface.pass_program().expect("another program");
    let id = xdp_program(host, "eth0").expect("attached");
    for mode in ["native", "generic", "auto"] {
        refused(
            host,
            &[
                program, "attach", "eth0", "--socket", SOCKET, "--mode", mode,
            ],
            &[
                "eth0 already has an XDP program",
                &format!("id {id}"),
                "xdp off",
            ],
        );
    }
    assert_eq!(xdp_program(host, "eth0"), Some(id), "left alone");
    drop(other);
    nothing_left(host, Path::new(SOCKET));
}

/// The capabilities that the systemd unit leaves to the daemon.
fn unit_capabilities() -> Vec<String> {
    const UNIT: &str = include_str!("../../docs/relay-user@.service");
    let mut lines = UNIT.lines();
    let set = lines.find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let names = set.expect("a bounding set").split_whitespace();
    names
        .map(|name| name.trim_start_matches("CAP_").to_lowercase())
        .collect()
}

/// A command line that starts what follows with these capabilities only, as systemd does.
fn limited<'a>(capabilities: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let set = capabilities
        .into_iter()
        .map(|name| format!(",+{name}"))
        .collect::<String>();
    vec![
        "setpriv".to_owned(),
        "--no-new-privs".to_owned(),
        "--inh-caps=-all".to_owned(),
        format!("--bounding-set=-all{set}"),
    ]
}

#[test]
fn the_capabilities_of_the_unit_are_enough_and_each_is_needed() {
    let net = Direct::new(2).expect("network");
    let host = &net.pbx;
    let program = program();
    let program = program.to_str().expect("text");
    let unit = unit_capabilities();
    let attach = [program, "attach", "eth0", "--socket", SOCKET];
    for missing in &unit {
        let starter = limited(unit.iter().filter(|name| *name != missing));
        let words: Vec<_> = starter.iter().map(String::as_str).chain(attach).collect();
        let named = format!("needs CAP_{}:", missing.to_uppercase());
        refused(host, &words, &[&named, "run as root"]);
    }
    // A user other than root, whose way to the program may be barred: a door of its own.
    let door = host.directory("bin").expect("directory").join("relay-user");
    host.run(|| {
        fs::write(&door, "")?;
        mount(
            Some(program),
            &door,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        io::Result::Ok(())
    })
    .expect("bind mount");
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let attach = [
        door.to_str().expect("text"),
        "attach",
        "eth0",
        "--socket",
        SOCKET,
    ];
    let named = "needs CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN";
    refused(
        host,
        &[&nobody[..], &attach].concat(),
        &[named, "run as root"],
    );
    nothing_left(host, Path::new(SOCKET));

    for starter in [limited(&unit), vec!["env".to_owned()]] {
        let relay = Relay::attach_through(host, starter, "eth0", ["-v"]).expect("attached");
        relay
            .offload([FIRST, SECOND])
            .expect("next hops and maps still work");
        let capabilities =
            |key| u64::from_str_radix(&status_line(relay.id(), key), 16).expect("hexadecimal");
        assert_eq!(capabilities("CapEff"), KEPT_CAPABILITIES);
        assert_eq!(capabilities("CapPrm"), KEPT_CAPABILITIES);
        assert_eq!((capabilities("CapInh"), capabilities("CapAmb")), (0, 0));
        let socket = relay.socket();
        relay.stop().expect("a clean end");
        nothing_left(host, &socket);
    }
}

#[test]
fn bpffs_is_mounted_where_it_is_missing() {
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    host.run(|| umount2("/sys/fs/bpf", MntFlags::empty()))
        .expect("unmounted");
    let program = program();
    let program = program.to_str().expect("text");
    let starter = limited(&unit_capabilities());
    let attach = [program, "attach", "eth0", "--socket", SOCKET];
    let words: Vec<_> = starter.iter().map(String::as_str).chain(attach).collect();
    refused(
        host,
        &words,
        &["/sys/fs/bpf is no BPF file system", "mount -t bpf"],
    );
    let relay = Relay::attach(host, "eth0", ["-v"]).expect("attached");
    let mounts = host
        .run(|| fs::read_to_string("/proc/thread-self/mounts"))
        .expect("mounts");
    assert!(mounts.contains("bpf /sys/fs/bpf bpf"), "{mounts}");
    assert!(exists(host, format!("{PINS}/STREAMS")));
    relay.stop().expect("a clean end");
}

/// Serves one connection after the other from a thread of its own.
fn server(host: &Host, mut serve: impl FnMut(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = host
        .run(|| TcpListener::bind("127.0.0.1:0"))
        .expect("listener");
    let address = listener.local_addr().expect("address");
    thread::spawn(move || listener.incoming().flatten().for_each(&mut serve));
    address
}

/// Writes 100 MB without a line end, or as much as the other side takes.
fn flood(mut stream: &TcpStream) {
    let chunk = vec![b'x'; 1 << 20];
    for _ in 0..100 {
        if stream.write_all(&chunk).is_err() {
            return;
        }
    }
}

#[test]
fn what_is_no_ami_is_refused_before_anything_is_attached() {
    const BANNER: &[u8] = b"Asterisk Call Manager/11.0.0\r\n";
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let pbx = Pbx::start(host, PBX_V4).expect("PBX");
    let right = pbx.secret_file().to_str().expect("text").to_owned();
    let wrong = file(host, "secret", "hunter2");
    let silent = |stream: TcpStream| drop(io::copy(&mut &stream, &mut io::sink()));
    let cases = [
        (
            pbx.ami(),
            &wrong,
            pbx::USER,
            vec!["refused user relay", "secret", "manager.conf"],
        ),
        (
            pbx.ami(),
            &right,
            "nobody",
            vec!["refused user nobody", "manager.conf"],
        ),
        (
            server(host, drop),
            &right,
            pbx::USER,
            vec!["closed the connection before its banner"],
        ),
        (
            server(host, |mut stream| {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
            }),
            &right,
            pbx::USER,
            vec!["not an AMI server", "HTTP/1.1"],
        ),
        (
            server(host, |stream| flood(&stream)),
            &right,
            pbx::USER,
            vec!["not an AMI server", "xxx"],
        ),
        (
            server(host, |mut stream| {
                let _ = stream.write_all(BANNER);
                flood(&stream);
            }),
            &right,
            pbx::USER,
            vec!["a line is longer than 65536 bytes", "xxx"],
        ),
        (
            server(host, |mut stream| {
                let _ = stream.write_all(BANNER);
                let _ = stream.shutdown(Shutdown::Write);
                let _ = io::copy(&mut &stream, &mut io::sink());
            }),
            &right,
            pbx::USER,
            vec!["closed the connection during login"],
        ),
        (
            server(host, silent),
            &right,
            pbx::USER,
            vec!["sends no AMI banner within 5 s"],
        ),
        (
            server(host, move |mut stream| {
                let _ = stream.write_all(BANNER);
                silent(stream);
            }),
            &right,
            pbx::USER,
            vec!["left Challenge without an answer for 5 s"],
        ),
    ];
    let program = program();
    let program = program.to_str().expect("text");
    thread::scope(|scope| {
        for (number, (address, secret, user, says)) in cases.iter().enumerate() {
            scope.spawn(move || {
                let (socket, address) = (format!("{SOCKET}-{number}"), address.to_string());
                let attach = [program, "attach", "eth0", "-vv", "--socket", &socket];
                let ami = [
                    "--ami",
                    &address,
                    "--ami-user",
                    user,
                    "--ami-secret-file",
                    secret,
                ];
                refused(
                    host,
                    &[&attach[..], &ami].concat(),
                    &[&says[..], &[&address]].concat(),
                );
                assert!(!exists(host, socket), "socket");
            });
        }
    });
    nothing_left(host, Path::new(SOCKET));
}

/// Stands between the daemon and AMI, and can speak in AMI's place.
struct Proxy {
    address: SocketAddr,
    /// The newest connection to the daemon.
    daemon: Arc<Mutex<Option<TcpStream>>>,
}

impl Proxy {
    fn start(host: &Host, ami: SocketAddr) -> Self {
        let newest = Arc::new(Mutex::new(None));
        let (inside, daemon) = (host.clone(), Arc::clone(&newest));
        let address = server(host, move |stream| {
            let other = inside.run(|| TcpStream::connect(ami)).expect("AMI");
            let clone = |stream: &TcpStream| stream.try_clone().expect("descriptor");
            *newest.lock().expect("no holder panics") = Some(clone(&stream));
            for (mut from, mut to) in [(clone(&stream), clone(&other)), (other, stream)] {
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
        });
        Self { address, daemon }
    }
}

fn ami_arguments(address: SocketAddr, pbx: &Pbx) -> Vec<String> {
    let secret = pbx.secret_file().to_str().expect("text");
    let address = address.to_string();
    [
        "--ami",
        &address,
        "--ami-user",
        pbx::USER,
        "--ami-secret-file",
        secret,
    ]
    .map(str::to_owned)
    .into()
}

#[test]
fn an_endless_ami_line_costs_no_memory_and_no_call() {
    let net = Direct::new(2).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let proxy = Proxy::start(&net.pbx, pbx.ami());
    let arguments = ami_arguments(proxy.address, &pbx);
    let relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
    let api = relay.offload([FIRST, SECOND]).expect("offloaded");
    let ami = || relay.json(["status"]).expect("status")["ami"].clone();
    until("AMI is up", || ami()["state"] == "up");
    let peak = || {
        let line = status_line(relay.id(), "VmHWM");
        let kilobytes = line.strip_suffix(" kB").expect("kB");
        kilobytes.parse::<u64>().expect("a number")
    };
    let before = peak();
    let stream = proxy.daemon.lock().expect("no holder panics").take();
    flood(&stream.expect("a connection"));
    let line = "a line is longer than 65536 bytes";
    until("the line is refused", || relay.log().contains(line));
    assert!(
        peak() < before + 8 * 1024,
        "{before} kB became {} kB",
        peak()
    );
    until("AMI is up again", || ami()["state"] == "up");
    relay
        .wait_state(api, "offloaded")
        .expect("an API pair does not depend on AMI");
}

#[test]
fn the_secret_is_never_shown() {
    let net = Direct::new(1).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let flags = ami_arguments(pbx.ami(), &pbx);
    let variable = format!("RELAY_AMI_SECRET={}", pbx::SECRET);
    let config = format!(
        "[ami]\naddress = \"{}\"\nuser = \"{}\"\nsecret-file = \"{}\"\n",
        pbx.ami(),
        pbx::USER,
        pbx.secret_file().display()
    );
    let config = ["--config".to_owned(), file(&net.pbx, "relay.toml", &config)];
    let starts: [(&[&str], &[String]); 3] = [
        (&[], &flags),
        (&["env", &variable], &flags[..4]),
        (&[], &config),
    ];
    for (starter, arguments) in starts {
        let arguments = [arguments, &["-vv".to_owned()]].concat();
        let relay = Relay::attach_through(&net.pbx, starter.iter().copied(), "eth0", arguments)
            .expect("attached");
        until("AMI is up", || {
            relay.json(["status"]).expect("status")["ami"]["state"] == "up"
        });
        let line = fs::read(format!("/proc/{}/cmdline", relay.id())).expect("arguments");
        let status = relay.run(["status"]).expect("status").stdout;
        for text in [relay.log().into_bytes(), line, status] {
            let text = String::from_utf8_lossy(&text);
            assert!(!text.is_empty() && !text.contains(pbx::SECRET), "{text}");
        }
        relay.stop().expect("a clean end");
    }
}

#[test]
fn pairs_that_cannot_be_are_refused_and_change_nothing() {
    let net = Direct::new(2).expect("network");
    let other = Host::new("other").expect("host");
    let [_, _] = connect(
        End {
            host: &net.pbx,
            name: "eth1",
            mac: [2, 0, 0, 0, 2, 1],
            addresses: &["203.0.113.1/24".to_owned()],
        },
        End {
            host: &other,
            name: "eth0",
            mac: [2, 0, 0, 0, 2, 2],
            addresses: &[],
        },
    )
    .expect("another cable");
    net.pbx
        .ip("route add blackhole 198.51.100.0/26\n\
             route add unreachable 198.51.100.64/26\n\
             route add prohibit 198.51.100.128/26")
        .expect("routes");
    let relay = Relay::attach(&net.pbx, "eth0", ["--max-streams", "4"]).expect("attached");
    let good = relay.offload([FIRST, SECOND]).expect("offloaded");
    const NEW: &str = "192.0.2.1:10004=192.0.2.11:30004";
    let from = |rest: &str| format!("192.0.2.1:10006={rest}");
    let cases: &[(&str, &str, &[&str])] = &[
        (NEW, "192.0.2.1:10006", &["write LOCAL=REMOTE"]),
        (NEW, "192.0.2.1:x=192.0.2.12:1", &["`192.0.2.1:x` in leg"]),
        (NEW, "2001:db8::1:1=[2001:db8::11]:1", &["for IPv6"]),
        (NEW, "192.0.2.1:0=192.0.2.12:1", &["192.0.2.1:0 has port 0"]),
        (NEW, &from("192.0.2.12:0"), &["192.0.2.12:0 has port 0"]),
        (
            NEW,
            &from("224.0.0.9:1"),
            &["224.0.0.9:1 is multicast", "unicast"],
        ),
        (
            NEW,
            "[2001:db8::1]:1=[ff0e::9]:1",
            &["[ff0e::9]:1 is multicast"],
        ),
        (NEW, &from("255.255.255.255:1"), &["is broadcast"]),
        (
            NEW,
            &from("192.0.2.255:1"),
            &["192.0.2.255 is broadcast", "unicast"],
        ),
        (NEW, &from("0.0.0.0:1"), &["is unspecified"]),
        (NEW, "0.0.0.0:10006=192.0.2.12:1", &["is unspecified"]),
        (NEW, "[2001:db8::1]:1=[::]:1", &["is unspecified"]),
        (NEW, &from("127.0.0.1:1"), &["loopback"]),
        (NEW, "127.0.0.1:10006=192.0.2.12:1", &["loopback"]),
        (
            NEW,
            "127.0.0.1:10006=127.0.0.1:1",
            &["127.0.0.1 is an address of this host"],
        ),
        (NEW, NEW, &["both legs are 192.0.2.1:10004", "different"]),
        (
            NEW,
            "192.0.2.1:10004=192.0.2.12:1",
            &["both legs have the local address"],
        ),
        (
            NEW,
            &from("192.0.2.1:10004"),
            &["its own input", "LOCAL=REMOTE"],
        ),
        (
            NEW,
            &from("192.0.2.1:5060"),
            &["192.0.2.1 is an address of this host"],
        ),
        (
            NEW,
            "192.0.2.77:10006=192.0.2.12:1",
            &["192.0.2.77 is not an address of this host"],
        ),
        (
            "192.0.2.11:30000=192.0.2.1:10000",
            "192.0.2.12:30002=192.0.2.1:10002",
            &["would be relayed by pair 1 and come back", "remove pair 1"],
        ),
        (
            NEW,
            SECOND,
            &["192.0.2.1:10002 is already", "relay-user remove 1"],
        ),
        (
            NEW,
            "[2001:db8::1]:1=[2001:db8::11]:1",
            &["different address families", "not supported"],
        ),
        (
            NEW,
            "192.0.2.1:1=[2001:db8::11]:1",
            &["different address families"],
        ),
        (
            NEW,
            &from("203.0.113.9:1"),
            &["leave through eth1", "attached to eth0", "not supported"],
        ),
        (
            NEW,
            &from("100.64.0.1:1"),
            &["no route from 192.0.2.1 to 100.64.0.1", "add one"],
        ),
        (
            NEW,
            &from("198.51.100.1:1"),
            &["a blackhole route", "198.51.100.1"],
        ),
        (
            NEW,
            &from("198.51.100.65:1"),
            &["declares 198.51.100.65 unreachable"],
        ),
        (
            NEW,
            &from("198.51.100.129:1"),
            &["prohibits", "198.51.100.129"],
        ),
        (
            NEW,
            "[2001:db8::1]:1=[fe80::9]:1",
            &["different address families"],
        ),
        (
            "[2001:db8::1]:3=[2001:db8::11]:3",
            "[2001:db8::1]:1=[fe80::9]:1",
            &["fe80::9 is link-local"],
        ),
    ];
    for (first, second, says) in cases {
        for legs in [[first, second], [second, first]] {
            let output = relay.run(["add", legs[0], legs[1]]).expect("run");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{legs:?}: {}", output.status);
            for fragment in *says {
                assert!(
                    text.contains(fragment),
                    "{legs:?}: no `{fragment}` in: {text}"
                );
            }
        }
    }
    for (types, says) in [
        ("72", "RFC 5761"),
        ("0,0", "twice"),
        ("1,2,3,4,5,6,7,8,9", "1 to 8"),
    ] {
        let args = ["add", NEW, &from("192.0.2.12:1"), "--payload-type", types];
        let output = relay.run(args).expect("run");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(says),
            "{types}: {text}"
        );
    }
    let status = relay.json(["status"]).expect("status");
    assert_eq!(
        (&status["pairs"], &status["streams"]),
        (&1.into(), &2.into())
    );
    let refusals = status["refusals"].as_array().expect("refusals");
    for cause in ["duplicate", "loop", "unreachable", "unsupported"] {
        assert!(
            refusals.iter().any(|row| row["cause"] == cause),
            "{status:#}"
        );
    }
    relay.wait_state(good, "offloaded").expect("left alone");
    // The refused took no place for good: there are two left of four.
    relay
        .offload([NEW, &from("192.0.2.12:1")])
        .expect("offloaded");
}

#[test]
fn a_full_map_refuses_the_next_pair_and_no_other() {
    let net = Direct::new(2).expect("network");
    let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
    let [v4, v6] = Legs::direct();
    let sockets = Sockets::open(v4, &banks[0], &banks[1]).expect("sockets");
    let relay = Relay::attach(&net.pbx, "eth0", ["--max-streams", "2"]).expect("attached");
    let first = sockets.offload(&relay).expect("offloaded");
    let second = v6.arguments();
    let add = ["add", &second[0], &second[1]];
    let output = relay.run(add).expect("run");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    assert!(
        text.contains("full (2") && text.contains("--max-streams"),
        "{text}"
    );
    sockets.talk(0, 0, Some(50));
    sockets.relayed(0, 50).expect("the first goes on");
    let status = relay.json(["status"]).expect("status");
    assert_eq!(
        status["refusals"],
        serde_json::json!([{"cause": "map_full", "count": 1}])
    );
    relay.json(["remove", &first.to_string()]).expect("removed");
    relay.offload(&add[1..]).expect("there is room now");
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    let net = Direct::new(2).expect("network");
    let host = &net.pbx;
    let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
    let [legs, _] = Legs::direct();
    let sockets = Sockets::open(legs, &banks[0], &banks[1]).expect("sockets");
    let program = program();
    let program = program.to_str().expect("text");
    // Without --socket: the default is tried too.
    let mut command = Command::new(program);
    command
        .args(["attach", "eth0"])
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let mut first = host.spawn(command).expect("started");
    let ask = |words: &[&str]| run(host, &[&[program], words].concat());
    until("the first is up", || ask(&["status"]).0 == Some(0));
    let [one, other, flag, types] = legs.arguments();
    let (code, text) = ask(&["add", "--proof", "none", &one, &other, &flag, &types]);
    assert_eq!(code, Some(0), "{text}");
    until("relayed", || ask(&["list"]).1.contains("offloaded"));
    sockets.talk(0, 0, None);
    let socket = "/run/relay-user/eth0.sock";
    let attach = [program, "attach", "eth0"];
    let elsewhere = [&attach[..], &["--socket", SOCKET]].concat();
    let says = [
        "a relay daemon already serves eth0",
        "relay-user detach eth0",
    ];
    refused(host, &attach, &says);
    refused(host, &elsewhere, &says);
    assert!(!exists(host, SOCKET) && exists(host, socket));
    let there = sockets.phones[1].arrivals().len();
    sockets.relayed(0, there + 50).expect("the first goes on");
    let fate = sockets.fate(0).expect("no loss");
    assert!(matches!(fate[..], [(true, _)]), "{fate:?}");
    refused(
        host,
        &[program, "detach", "eth1"],
        &["no relay daemon runs on eth1"],
    );
    let (code, text) = ask(&["detach", "eth0"]);
    assert_eq!(
        (code, text.trim()),
        (
            Some(0),
            "detached from eth0; pairs given back to the PBX: 1"
        )
    );
    assert!(first.wait(PATIENCE).expect("ended").success());
    nothing_left(host, Path::new(socket));
    refused(
        host,
        &[program, "status"],
        &["no relay daemon runs here", "relay-user attach"],
    );
}

/// Two calls in progress, IPv4 and IPv6, on an attached daemon. Nobody proves them: the PBX only listens.
struct Calls {
    net: Direct,
    relay: Relay,
    sockets: [Sockets; 2],
    kernel: Kernel,
    _banks: [Bank; 2],
}

impl Calls {
    fn start(arguments: &[&str]) -> Self {
        let net = Direct::new(2).expect("network");
        let arguments = [&["-v"], arguments].concat();
        let relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
        let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
        let sockets =
            Legs::direct().map(|legs| Sockets::open(legs, &banks[0], &banks[1]).expect("sockets"));
        for sockets in &sockets {
            sockets.offload(&relay).expect("offloaded");
            for leg in [0, 1] {
                sockets.talk(leg, 0, None);
                sockets.relayed(leg, 25).expect("relayed");
            }
        }
        let kernel = Kernel::of(&net.pbx);
        assert!(!kernel.is_gone() && kernel.maps.len() == datapath::names::MAPS.len());
        assert_eq!(kernel.programs.len(), 2);
        Self {
            net,
            relay,
            sockets,
            kernel,
            _banks: banks,
        }
    }

    /// Both directions of both.
    fn streams(&self) -> impl Iterator<Item = (&Sockets, usize)> {
        let sockets = self.sockets.iter();
        sockets.flat_map(|sockets| [(sockets, 0), (sockets, 1)])
    }

    /// Waits until the kernel has relayed more of every stream.
    fn relayed_on(&self) {
        for (sockets, leg) in self.streams() {
            let heard = sockets.phones[1 - leg].arrivals().len();
            sockets.relayed(leg, heard + 50).expect("relayed");
        }
    }

    /// Waits until more of every stream has come to the PBX.
    fn passed_on(&self) {
        for (sockets, leg) in self.streams() {
            let heard = sockets.pbx[leg].arrivals().len();
            sockets.passed(leg, heard + 25).expect("at the PBX");
        }
    }

    /// Silences everyone; asserts that no packet of any stream was lost, and that each stream was relayed (true) and
    /// left to the PBX (false) in this order. Returns how many packets came to the PBX.
    fn went(&self, turns: &[bool]) -> u64 {
        self.streams()
            .map(|(sockets, leg)| {
                let fate = sockets.fate(leg).expect("no loss");
                let went: Vec<_> = fate.iter().map(|(relayed, _)| *relayed).collect();
                assert_eq!(went, turns, "{fate:?}");
                let passed = fate.iter().filter(|(relayed, _)| !relayed);
                passed.map(|(_, packets)| *packets as u64).sum::<u64>()
            })
            .sum()
    }

    /// Every call goes on at the PBX, and no packet was lost on the way there.
    fn fell_back(&self) {
        self.passed_on();
        self.went(&[true, false]);
    }

    /// Kills the daemon, which leaves all that it has in the kernel.
    fn kill(&mut self) {
        self.relay.signal(Signal::SIGKILL);
        self.relay.wait(PATIENCE).expect("ended");
    }

    /// A new daemon in the place of the one that has ended.
    fn attach_again(&mut self, arguments: &[&str]) {
        let arguments = [&["-v"], arguments].concat();
        self.relay = Relay::attach(&self.net.pbx, "eth0", arguments).expect("attached again");
    }
}

/// The number of a pair and the stream that an event is about.
fn subject(event: &Value) -> (Option<u64>, Option<u64>) {
    (event["pair"].as_u64(), event["stream"].as_u64())
}

/// Waits for one event of this kind for each of the subjects, in any order; returns those before and among them.
fn told_of_each<T: PartialEq>(
    events: &Followed,
    kind: &str,
    subject: impl Fn(&Value) -> Option<T>,
    subjects: &[T],
) -> Vec<Value> {
    let mut told = Vec::new();
    let is_told = |told: &[Value], wanted: &T| {
        let mut told = told.iter().filter(|event| event["kind"] == kind);
        told.any(|event| subject(event).as_ref() == Some(wanted))
    };
    while !subjects.iter().all(|wanted| is_told(&told, wanted)) {
        told.extend(events.until(kind).expect(kind));
    }
    told
}

/// Arguments of a daemon that relays in traffic control.
const TC: [&str; 2] = ["--mode", "tc"];

fn ends_cleanly(arguments: &[&str], end: impl FnOnce(&Relay)) {
    let mut calls = Calls::start(arguments);
    end(&calls.relay);
    let status = calls.relay.wait(PATIENCE).expect("ended");
    assert!(status.success(), "{status}: {}", calls.relay.log());
    calls.fell_back();
    nothing_left(&calls.net.pbx, &calls.relay.socket());
    until("maps and program are freed", || calls.kernel.is_gone());
}

#[test]
fn sigterm_gives_every_call_back_and_leaves_nothing() {
    ends_cleanly(&[], |relay| relay.signal(Signal::SIGTERM));
}

#[test]
fn sigterm_gives_every_call_back_from_traffic_control_and_leaves_nothing() {
    ends_cleanly(&TC, |relay| relay.signal(Signal::SIGTERM));
}

#[test]
fn sigint_gives_every_call_back_and_leaves_nothing() {
    ends_cleanly(&[], |relay| relay.signal(Signal::SIGINT));
}

#[test]
fn detach_gives_every_call_back_and_leaves_nothing() {
    ends_cleanly(&[], |relay| {
        let detached = relay.json(["detach", "eth0"]).expect("detached");
        let expected = serde_json::json!({"interface": "eth0", "found": "running", "pairs": 2});
        assert_eq!(detached, expected);
    });
}

#[test]
fn a_killed_daemons_calls_go_on_until_its_lease_is_over_and_detach_removes_the_rest() {
    outlives_its_daemon(&[]);
}

#[test]
fn a_killed_daemons_calls_go_on_in_traffic_control_and_detach_removes_the_rest() {
    outlives_its_daemon(&TC);
}

fn outlives_its_daemon(arguments: &[&str]) {
    let mut calls = Calls::start(arguments);
    calls.kill();
    let host = calls.net.pbx.clone();
    calls.relayed_on();
    calls.fell_back();
    let socket = calls.relay.socket();
    assert!(
        exists(&host, PINS) && exists(&host, &socket),
        "what it could not remove"
    );
    assert!(!programs(&host, "eth0").is_empty() && !calls.kernel.is_gone());
    let gone = calls.relay.run(["status"]).expect("run");
    assert!(!gone.status.success());
    let gone = calls.relay.run(["list"]).expect("run");
    assert!(gone.status.success(), "the maps still tell");
    let text = String::from_utf8_lossy(&gone.stderr);
    assert!(text.contains("relay-user attach"), "{text}");

    let detached = calls.relay.json(["detach", "eth0"]).expect("detached");
    assert_eq!(detached["found"], "left_behind");
    nothing_left(&host, &socket);
    until("maps and programs are freed", || calls.kernel.is_gone());
    let nothing = calls.relay.run(["detach", "eth0"]).expect("run");
    let text = String::from_utf8_lossy(&nothing.stderr);
    assert!(
        !nothing.status.success() && text.contains("nothing to detach"),
        "{text}"
    );
}

#[test]
fn an_upgrade_in_mid_call_loses_no_packet_and_leaves_none_to_the_pbx() {
    is_upgraded(&[]);
}

#[test]
fn an_upgrade_in_traffic_control_loses_no_packet_and_leaves_none_to_the_pbx() {
    is_upgraded(&TC);
}

fn is_upgraded(arguments: &[&str]) {
    const UPGRADES: usize = 3;
    let mut calls = Calls::start(arguments);
    let host = calls.net.pbx.clone();
    let shown = |calls: &Calls| {
        ["1", "2"].map(|id| {
            let mut pair = calls.relay.json(["show", id]).expect("show");
            assert_eq!(pair["state"], "offloaded", "{pair:#}");
            // What moves on.
            for stream in pair["streams"].as_array_mut().expect("streams") {
                let reception = &stream["reception"];
                let received = reception["packets"].as_u64() >= stream["packets"].as_u64();
                assert!(received && reception["lost"] == 0, "{stream:#}");
                for moving in ["packets", "bytes", "marks", "silent_ms", "reception"] {
                    stream.as_object_mut().expect("a stream").remove(moving);
                }
            }
            pair
        })
    };
    let before = shown(&calls);
    for _ in 0..UPGRADES {
        calls.kill();
        calls.attach_again(arguments);
        let events = calls.relay.follow().expect("events");
        let told = told_of_each(&events, "adopted", |event| event["pair"].as_u64(), &[1, 2]);
        let ends = ["suspended", "taken_back", "lease_lost"];
        let ended = told
            .iter()
            .find(|event| ends.iter().any(|end| event["kind"] == *end));
        assert_eq!(ended, None);
        let kernel = Kernel::of(&host);
        assert_eq!(kernel.maps, calls.kernel.maps, "the maps stay");
        assert!(
            kernel.programs.is_disjoint(&calls.kernel.programs),
            "the programs are new"
        );
        calls.kernel = kernel;
        calls.relayed_on();
        assert_eq!(shown(&calls), before, "the pairs are what they were");
    }
    let reasons = calls.relay.reasons().expect("status");
    assert_eq!(calls.went(&[true]), 0, "packets at the PBX");
    let sent: u64 = calls
        .streams()
        .map(|(sockets, leg)| sockets.phones[leg].sent())
        .sum();
    assert!(
        (1..=sent).contains(&reasons["relayed"]),
        "all daemons' packets: {reasons:?}"
    );

    // They are this daemon's pairs by now: the next one gets the next number, and they can be removed.
    let added = calls
        .relay
        .offload([
            "192.0.2.1:10004=192.0.2.11:30004",
            "192.0.2.1:10006=192.0.2.12:30006",
        ])
        .expect("offloaded");
    assert_eq!(added, 3);
    calls.relay.json(["remove", "1"]).expect("removed");
    let [first, second] = &calls.sockets;
    first.talk(0, 0, Some(25));
    first.passed(0, 25).expect("removed");
    let heard = second.phones[1].arrivals().len();
    second.talk(0, 0, Some(25));
    second.relayed(0, heard + 25).expect("left alone");
    calls.relay.signal(Signal::SIGTERM);
    let status = calls.relay.wait(PATIENCE).expect("ended");
    assert!(status.success(), "{status}: {}", calls.relay.log());
    nothing_left(&host, &calls.relay.socket());
}

#[test]
fn a_daemon_that_comes_after_the_lease_takes_the_calls_up_again() {
    let mut calls = Calls::start(&[]);
    calls.kill();
    calls.passed_on();
    calls.attach_again(&[]);
    let events = calls.relay.follow().expect("events");
    told_of_each(&events, "adopted", |event| event["pair"].as_u64(), &[1, 2]);
    events.until("lease_lost").expect("told");
    let streams = [1, 2].map(|pair| [0, 1].map(|stream| (Some(pair), Some(stream))));
    told_of_each(
        &events,
        "offloaded",
        |event| Some(subject(event)),
        streams.as_flattened(),
    );
    calls.relayed_on();
    calls.went(&[true, false, true]);
}

#[test]
fn a_frozen_daemon_loses_its_lease_and_no_packet() {
    // Nobody expires who talks, although the datapath does not look at what it does not relay.
    let calls = Calls::start(&["--silence", "1", "--expire", "2"]);
    let events = calls.relay.follow().expect("events");
    let streams = [1, 2].map(|pair| [0, 1].map(|stream| (Some(pair), Some(stream))));
    let told = |kind: &str| {
        let subject = |event: &Value| Some(subject(event));
        told_of_each(&events, kind, subject, streams.as_flattened())
    };
    told("offloaded");
    calls.relay.signal(Signal::SIGSTOP);
    // By itself: nobody else is there to take them back. And for longer than 2 s:
    calls.passed_on();
    for (sockets, leg) in calls.streams() {
        sockets.passed(leg, 1250).expect("at the PBX");
    }
    calls.relay.signal(Signal::SIGCONT);
    let mut since = events.until("lease_lost").expect("told");
    let lost = since.pop().expect("the event");
    assert_eq!(subject(&lost), (None, None), "{lost}");
    assert_eq!(since, [] as [Value; 0]);
    for event in told("offloaded") {
        let kind = event["kind"].as_str().expect("a kind");
        assert!(["suspended", "offloaded"].contains(&kind), "{event}");
        let says = event["cause"].as_str().expect("a cause");
        assert!(
            kind == "offloaded" || says == "the lease was over",
            "{event}"
        );
    }
    calls.relayed_on();
    let passed = calls.went(&[true, false, true]);
    // The last few came between the new lease and the new rounds.
    let reasons = calls.relay.reasons().expect("status");
    let (over, suspended) = (reasons["lease_over"], reasons["suspended"]);
    assert_eq!(over + suspended, passed);
    assert!(over >= 100 && suspended < over, "{over}, {suspended}");
    let list = calls.relay.json(["list"]).expect("list");
    let ids: Vec<_> = (0..2).map(|pair| &list["pairs"][pair]["id"]).collect();
    assert_eq!(ids, [1, 2]);
}

#[test]
fn a_daemon_that_persists_leaves_its_calls_to_the_lease() {
    let persist = ["--persist"];
    let mut calls = Calls::start(&persist);
    let host = calls.net.pbx.clone();
    let end = |calls: &mut Calls| {
        calls.relay.signal(Signal::SIGTERM);
        let status = calls.relay.wait(PATIENCE).expect("ended");
        assert!(status.success(), "{status}: {}", calls.relay.log());
        assert!(!exists(&host, calls.relay.socket()), "socket");
        assert!(exists(&host, PINS), "pins");
    };
    // The next one is there in time …
    end(&mut calls);
    calls.relayed_on();
    calls.attach_again(&persist);
    calls.relayed_on();
    // … or too late.
    end(&mut calls);
    calls.relayed_on();
    calls.passed_on();
    calls.attach_again(&persist);
    calls.relayed_on();
    // An operator who detaches means it.
    let detached = calls.relay.json(["detach", "eth0"]).expect("detached");
    assert_eq!(detached["found"], "running");
    calls.passed_on();
    calls.went(&[true, false, true, false]);
    nothing_left(&host, &calls.relay.socket());
    until("maps and programs are freed", || calls.kernel.is_gone());
}

#[test]
fn a_silent_phone_is_told_of_and_a_pair_without_packets_expires() {
    let net = Direct::new(2).expect("network");
    let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
    let [legs, _] = Legs::direct();
    let sockets = Sockets::open(legs, &banks[0], &banks[1]).expect("sockets");
    let arguments = ["--silence", "1", "--expire", "2"];
    let relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
    let events = relay.follow().expect("events");
    let pair = sockets.offload(&relay).expect("offloaded");
    sockets.talk(0, 0, None);
    sockets.talk(1, 0, Some(10));
    let of = |stream: Option<u64>| (Some(pair), stream);
    let last = |kind: &str| {
        let mut told = events.until(kind).expect(kind);
        let event = told.pop().expect("the event");
        (told, subject(&event), event)
    };
    // Looked at once a second, so that it may be more by then.
    let silent_for = |event: &Value, least: u64| {
        let cause = event["cause"].as_str().expect("a cause");
        let seconds = cause.strip_prefix("no packet for ");
        let seconds = seconds.and_then(|rest| rest.strip_suffix(" s")?.parse().ok());
        assert!(
            seconds.is_some_and(|seconds: u64| seconds >= least),
            "{event}"
        );
    };

    let (_, whom, event) = last("silent");
    assert_eq!(whom, of(Some(1)));
    silent_for(&event, 1);
    // While one of the two talks, the pair is in use. More than 3 s:
    let heard = sockets.phones[1].arrivals().len();
    sockets.relayed(0, heard + 1600).expect("relayed");
    // Until the controller has seen it: a few packets may be as old as a silence when it looks.
    sockets.talk(1, 0, None);
    let (between, whom, _) = last("resumed");
    assert_eq!(whom, of(Some(1)));
    assert_eq!(between, [] as [Value; 0]);

    sockets.phones.iter().for_each(Phone::hush);
    let (before, whom, event) = last("expired");
    assert_eq!(whom, of(None));
    silent_for(&event, 2);
    let silent = before.iter().filter(|event| event["kind"] == "silent");
    let silent: BTreeSet<_> = silent.map(subject).collect();
    assert_eq!(silent, BTreeSet::from([of(Some(0)), of(Some(1))]));
    let status = relay.json(["status"]).expect("status");
    assert_eq!(
        (&status["pairs"], &status["streams"]),
        (&0.into(), &0.into())
    );
    for leg in [0, 1] {
        sockets.talk(leg, 0, Some(10));
        sockets.passed(leg, 10).expect("at the PBX");
        let fate = sockets.fate(leg).expect("no loss");
        assert!(matches!(fate[..], [(true, _), (false, 10)]), "{fate:?}");
    }
}

#[test]
fn people_and_programs_can_read_the_state() {
    let calls = Calls::start(&[]);
    let text = |args: &[&str]| {
        let output = calls.relay.run(args).expect("run");
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    let pair = calls.relay.json(["show", "1"]).expect("show");
    let list = calls.relay.json(["list"]).expect("list");
    let status = calls.relay.json(["status"]).expect("status");
    assert_eq!(list["pairs"][0]["legs"], pair["legs"]);
    assert_eq!(
        pair["payload_types"][1],
        serde_json::json!({"first": 101, "second": 96})
    );
    assert_eq!(
        (&status["pairs"], &status["offloaded"], &status["streams"]),
        (&2.into(), &2.into(), &4.into())
    );
    assert_eq!(status["pins"], PINS);
    let lease = status["lease_ms"].as_u64().expect("a time");
    assert!((1..=5000).contains(&lease), "{status:#}");
    assert_eq!(status["pid"], calls.relay.id());
    let shows: [(&[&str], &[&str]); 3] = [
        (
            &["status"],
            &[
                "eth0",
                "generic XDP",
                "ef",
                "2 offloaded",
                "4 of 65536",
                "relayed",
            ],
        ),
        (
            &["list"],
            &[
                "ID",
                "WHY",
                "api",
                "offloaded",
                FIRST,
                SECOND,
                "[2001:db8::1]:10000",
            ],
        ),
        (
            &["show", "1"],
            &[
                FIRST,
                SECOND,
                "0, 101:96",
                "02:00:00:00:00:11",
                "192.0.2.12:30002",
            ],
        ),
    ];
    for (args, says) in shows {
        let shown = text(args);
        for fragment in says {
            assert!(
                shown.contains(fragment),
                "{args:?}: no `{fragment}` in:\n{shown}"
            );
        }
        assert!(
            !shown.contains('\u{1b}'),
            "colour is for terminals: {shown:?}"
        );
    }
    let unknown = calls.relay.run(["show", "9"]).expect("run");
    let unknown = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(unknown.contains("there is no pair 9"), "{unknown}");
    // Debian's bpftool reads the maps by the names of their fields.
    const DUMP: &[&str] = &["dump"];
    const FIRST_ENTRY: &[&str] = &["lookup", "key", "0", "0", "0", "0"];
    let maps: [(&str, &[&str], &[&str]); 3] = [
        (
            "STREAMS",
            DUMP,
            &[
                "\"source_port\": 30000",
                "\"destination_mac\"",
                "\"mtu\": 1500",
            ],
        ),
        ("STATE", FIRST_ENTRY, &["\"payload_types\"", "\"proven\": "]),
        ("CONTROL", FIRST_ENTRY, &["\"lease\": "]),
    ];
    for (map, how, fields) in maps {
        let mut command = Command::new("bpftool");
        command.args(["--json", "--pretty", "map", how[0], "pinned"]);
        command.arg(Path::new(PINS).join(map)).args(&how[1..]);
        let dump = calls.net.pbx.output(command).expect("bpftool").stdout;
        let dump = String::from_utf8(dump).expect("text");
        for field in fields {
            assert!(dump.contains(field), "no `{field}` in {map}");
        }
    }
}

#[test]
fn slow_clients_stall_neither_asterisk_nor_the_call() {
    let net = Direct::new(2).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let bank = Bank::new(&net.phones).expect("phones");
    let [legs, _] = Legs::direct();
    let [caller, callee] = legs.remote.map(|remote| bank.phone(remote).expect("phone"));
    let arguments = ami_arguments(pbx.ami(), &pbx);
    let relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
    let call = pbx.call(caller.local(), callee.local()).expect("call");
    for (phone, local) in [&caller, &callee].into_iter().zip(call.local) {
        phone.talk(Talk::to(local, 1));
    }
    let received = || pbx.counters().expect("counters")[&call.id][0].received;
    until("offloaded", || {
        relay.json(["status"]).expect("status")["offloaded"] == 1
    });
    // As many as are served at once, each in the middle of its request.
    let socket = relay.socket();
    let slow: Vec<_> = (0..64)
        .map(|_| {
            let mut stream = net
                .pbx
                .run(|| UnixStream::connect(&socket))
                .expect("connected");
            stream
                .write_all(b"GET /v1/pairs HTTP/1.1\r\nHost: ")
                .expect("half a request");
            stream
        })
        .collect();
    let relayed = callee.arrivals().len();
    callee
        .wait_received(relayed + 10, PATIENCE)
        .expect("the call goes on");
    let before = received();
    pbx.hold(call).expect("hold");
    until("the call on hold is taken back", || received() > before + 5);
    drop(slow);
    let pairs = relay.json(["list"]).expect("list");
    let why = pairs["pairs"][0]["why"].as_str().expect("a reason");
    assert!(why.to_lowercase().contains("hold"), "{pairs:#}");
}
