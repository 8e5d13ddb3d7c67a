//! `relay-user capture`: what it writes, what ends it, and that nobody is relayed differently for it.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use relay_tests::{
    capture::{Capture, Direction, Frame},
    link::PassProgram,
    namespace::{Host, Process},
    pair::{Legs, Sockets},
    pbx::Pbx,
    pcapng::{Captured, Captures, command, packets},
    phone::{Bank, Phone, Talk},
    relay::{Relay, binary},
    topology::{Direct, PBX_V4},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// Packets that each phone sends.
const PACKETS: usize = 100;

/// A cable with two pairs at its ends, over IPv4 and over IPv6, both relayed.
struct Wire {
    net: Direct,
    relay: Relay,
    sockets: [Sockets; 2],
    ids: [u64; 2],
    _banks: [Bank; 2],
    /// Lets the phones' end receive what native XDP sends (see the harness's `link`).
    _pass: Option<PassProgram>,
}

impl Wire {
    fn new(mode: &str) -> Self {
        let net = Direct::new(2).expect("network");
        let pass =
            (mode == "native").then(|| net.phones_interface.pass_program().expect("pass program"));
        let relay = Relay::attach(&net.pbx, "eth0", ["--mode", mode]).expect("attached");
        let (phones, pbx) = (
            Bank::new(&net.phones).expect("phones"),
            Bank::new(&net.pbx).expect("sockets"),
        );
        let sockets =
            Legs::direct().map(|legs| Sockets::open(legs, &phones, &pbx).expect("sockets"));
        let ids = sockets
            .each_ref()
            .map(|sockets| sockets.offload(&relay).expect("offloaded"));
        Self {
            net,
            relay,
            sockets,
            ids,
            _banks: [phones, pbx],
            _pass: pass,
        }
    }

    /// All four phones send, until all of it has arrived.
    fn talk(&self) {
        let before = self.arrived();
        for sockets in &self.sockets {
            for leg in [0, 1] {
                sockets.talk(leg, 0, Some(PACKETS as u64));
            }
        }
        for (sockets, before) in self.sockets.iter().zip(before) {
            for (phone, before) in sockets.phones.iter().zip(before) {
                let arrived = phone.wait_received(before + PACKETS, PATIENCE);
                arrived.expect("relayed packets");
            }
        }
    }

    fn arrived(&self) -> [[usize; 2]; 2] {
        let each = |sockets: &Sockets| {
            sockets
                .phones
                .each_ref()
                .map(|phone| phone.arrivals().len())
        };
        self.sockets.each_ref().map(each)
    }

    /// Starts to capture into a file. It is under way when this returns.
    fn capture(&self, arguments: &[&str]) -> Captured {
        Captured::start(&self.net.pbx, arguments).expect("a capture")
    }
}

fn comments(captures: &Captures) -> BTreeMap<&str, usize> {
    let mut comments = BTreeMap::new();
    for packet in &captures.packets {
        *comments.entry(&packet.comment[..]).or_default() += 1;
    }
    comments
}

/// The captured frames with RTP that went one way, in an order of their own.
fn frames(captures: &Captures, direction: Direction) -> Vec<&[u8]> {
    let frames = captures.packets.iter().map(|packet| &packet.frame);
    sorted(frames, direction)
}

/// The frames of voice that went one way, in an order of their own.
fn sorted<'a>(frames: impl IntoIterator<Item = &'a Frame>, direction: Direction) -> Vec<&'a [u8]> {
    let mut frames: Vec<_> = frames
        .into_iter()
        .filter(|frame| frame.direction == direction)
        .filter(|frame| {
            frame
                .datagram()
                .is_some_and(|datagram| datagram.payload.len() > 100)
        })
        .map(|frame| &frame.bytes[..])
        .collect();
    frames.sort_unstable();
    frames
}

/// Everything is in the file, byte for byte as the phones sent and received it, with what became of it.
fn captures_everything(mode: &str) {
    let wire = Wire::new(mode);
    let capture = wire.capture(&["--all"]);
    let phones = Capture::start(&wire.net.phones_interface).expect("capture");
    wire.talk();
    let captures = capture.interrupt().expect("an end");
    let mut expected = BTreeMap::new();
    for id in wire.ids {
        for leg in ["first", "second"] {
            for way in ["received", "sent"] {
                expected.insert(
                    format!("eth0 {way}: relayed, pair {id}, {leg} leg"),
                    PACKETS,
                );
            }
        }
    }
    let comments = comments(&captures);
    let comments: BTreeMap<_, _> = comments
        .into_iter()
        .map(|(comment, packets)| (comment.to_owned(), packets))
        .collect();
    assert_eq!(comments, expected);
    assert_eq!(
        captures.said,
        "relay-user: 800 packets captured, 0 missed\n"
    );
    let phones = phones.stop().expect("no drops");
    for (ours, theirs) in [
        (Direction::In, Direction::Out),
        (Direction::Out, Direction::In),
    ] {
        assert!(
            frames(&captures, ours) == sorted(&phones.frames, theirs),
            "{ours:?}"
        );
    }
    assert_eq!(wire.relay.reasons().expect("status")["relayed"], 400);
    for packet in &captures.packets {
        let direction = if packet.comment.contains("received") {
            1
        } else {
            2
        };
        assert_eq!(packet.flags, direction, "{}", packet.comment);
    }
    // On the clock of the phones' capture.
    let times = |frames: &[Frame]| {
        let mut times: Vec<_> = frames.iter().map(|frame| frame.at).collect();
        times.sort_unstable();
        [times[0], times[times.len() - 1]]
    };
    let ours: Vec<_> = captures
        .packets
        .iter()
        .map(|packet| packet.frame.clone())
        .collect();
    for (ours, theirs) in times(&ours).into_iter().zip(times(&phones.frames)) {
        assert!(
            ours.abs_diff(theirs) < Duration::from_secs(1),
            "{ours:?}, {theirs:?}"
        );
    }
}

#[test]
fn everything_is_captured_in_generic_xdp() {
    captures_everything("generic");
}

#[test]
fn everything_is_captured_in_native_xdp() {
    captures_everything("native");
}

#[test]
fn everything_is_captured_in_traffic_control() {
    captures_everything("tc");
}

/// Of one pair alone, the beginning of each packet.
#[test]
fn one_pair_is_captured_in_part() {
    const HEADERS: usize = 54;
    let wire = Wire::new("generic");
    let id = wire.ids[0].to_string();
    let capture = wire.capture(&[&id, "--snap", &HEADERS.to_string()]);
    wire.talk();
    let captures = capture.interrupt().expect("an end");
    assert_eq!(captures.packets.len(), 4 * PACKETS);
    for packet in &captures.packets {
        let of_pair = format!("relayed, pair {id}, ");
        assert!(packet.comment.contains(&of_pair), "{}", packet.comment);
        assert_eq!(packet.frame.bytes.len(), HEADERS);
    }
}

/// Of each packet that is taken, both copies are.
#[test]
fn a_sample_is_captured() {
    let wire = Wire::new("generic");
    let capture = wire.capture(&["--all", "--sample", "4"]);
    for _ in 0..4 {
        wire.talk();
    }
    let captures = capture.interrupt().expect("an end");
    let sequences = |direction| {
        let payloads = captures.packets.iter().map(|packet| &packet.frame);
        let mut payloads: Vec<_> = payloads
            .filter(|frame| frame.direction == direction)
            .map(|frame| frame.datagram().expect("UDP").payload.to_vec())
            .collect();
        payloads.sort_unstable();
        payloads
    };
    let received = sequences(Direction::In);
    assert_eq!(received, sequences(Direction::Out));
    // Of 1600, 400 are expected; six standard deviations are 104.
    assert!((296..504).contains(&received.len()), "{}", received.len());
}

#[test]
fn a_capture_ends_after_so_many_packets() {
    let wire = Wire::new("generic");
    let capture = wire.capture(&["--all", "--count", "10"]);
    wire.talk();
    let captures = capture.end().expect("an end");
    assert_eq!(captures.packets.len(), 10);
    assert!(
        captures
            .said
            .starts_with("relay-user: 10 packets captured, ")
    );
}

/// A call through a PBX that forwards: from the first packet on, whoever forwards it.
struct Office {
    net: Direct,
    relay: Relay,
    phones: [Phone; 2],
    local: [SocketAddr; 2],
    id: u64,
    _pbx: Pbx,
    _bank: Bank,
}

impl Office {
    fn new(mode: &str) -> Self {
        let net = Direct::new(2).expect("network");
        let arguments = ["--mode", mode, "--keepalive", "0.2"];
        let relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
        let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
        let bank = Bank::new(&net.phones).expect("phones");
        let phones = [0, 1].map(|number| {
            let local = SocketAddr::new(Direct::phone_v4(number), 30_000);
            bank.phone(local).expect("phone")
        });
        let [caller, callee] = phones.each_ref().map(Phone::local);
        let local = pbx.call(caller, callee).expect("call").local;
        let [first, second] = [(local[0], caller), (local[1], callee)]
            .map(|(local, remote)| format!("{local}={remote}"));
        let pair = relay.json(["add", &first, &second]).expect("a pair");
        Self {
            id: pair["id"].as_u64().expect("a number"),
            net,
            relay,
            phones,
            local,
            _pbx: pbx,
            _bank: bank,
        }
    }

    /// Both phones send so many packets, and hear as many.
    fn talk(&self, packets: u64) {
        for (leg, phone) in self.phones.iter().enumerate() {
            phone.talk(Talk {
                interval: Duration::from_millis(5),
                count: Some(packets),
                ..Talk::to(self.local[leg], 100 + leg as u32)
            });
        }
        for phone in &self.phones {
            let heard = phone.wait_received(packets as usize, PATIENCE);
            heard.expect("the other phone");
        }
    }
}

fn through_the_pbx(mode: &str) {
    const TALK: u64 = 300;
    let office = Office::new(mode);
    let capture = Captured::start(&office.net.pbx, &["--all"]).expect("a capture");
    let phones = Capture::start(&office.net.phones_interface).expect("capture");
    office.talk(TALK);
    let captures = capture.interrupt().expect("an end");
    let phones = phones.stop().expect("no drops");
    for (ours, theirs) in [
        (Direction::In, Direction::Out),
        (Direction::Out, Direction::In),
    ] {
        let frames = frames(&captures, ours);
        assert_eq!(frames.len() as u64, 2 * TALK);
        assert!(frames == sorted(&phones.frames, theirs), "{ours:?}");
    }
    let comments = comments(&captures);
    let reasons = office.relay.reasons().expect("status");
    let id = office.id;
    for (beginning, reason) in [
        ("received: relayed", "relayed"),
        ("sent: relayed", "relayed"),
        ("received: passed up, watching", "watching"),
        ("received: passed up, keepalive", "keepalive"),
        ("sent by the PBX: echo", "echo"),
    ] {
        let packets: usize = ["first", "second"]
            .into_iter()
            .filter_map(|leg| comments.get(&format!("eth0 {beginning}, pair {id}, {leg} leg")[..]))
            .sum();
        assert!(packets > 0, "no {beginning} in {comments:?}");
        assert_eq!(
            packets as u64, reasons[reason],
            "{beginning} in {comments:?}"
        );
    }
}

#[test]
fn what_goes_through_the_pbx_is_captured_too_in_generic_xdp() {
    through_the_pbx("generic");
}

#[test]
fn what_goes_through_the_pbx_is_captured_too_in_traffic_control() {
    through_the_pbx("tc");
}

/// A line of shell that begins with a capture to a pipe.
fn piped(host: &Host, capture: &str, reader: &str) -> Process {
    let program = binary("relay-user", "RELAY_USER_BIN").expect("relay-user");
    let line = format!("{} capture {capture} -w - | {reader}", program.display());
    let mut command = Command::new("sh");
    command
        .args(["-c", &line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    host.spawn(command).expect("a shell")
}

/// What such a line prints: standard output, and standard error.
fn printed(mut process: Process) -> [String; 2] {
    let (mut output, mut errors) = (String::new(), String::new());
    let child = process.child_mut();
    let (stdout, stderr) = (child.stdout.as_mut(), child.stderr.as_mut());
    let read = stdout.expect("a pipe").read_to_string(&mut output);
    read.expect("text");
    let read = stderr.expect("a pipe").read_to_string(&mut errors);
    read.expect("text");
    let status = process.wait(PATIENCE).expect("an end");
    assert!(status.success(), "{status}: {errors}");
    [output, errors]
}

/// What tshark reads from the pipe: the streams as the phones have sent them, with their comments.
#[test]
fn tshark_reads_the_pipe() {
    const TALK: u64 = 200;
    let office = Office::new("generic");
    let copy = office
        .net
        .pbx
        .directory("pipe")
        .expect("a folder")
        .join("copy");
    let captured = format!("--all --count {}", 4 * TALK);
    let reader = format!(
        "tee {} | tshark -r - -d udp.port==1-65535,rtp -z rtp,streams -T fields -e frame.interface_name -e frame.comment",
        copy.display()
    );
    let process = piped(&office.net.pbx, &captured, &reader);
    wait_for_file(&office.net.pbx, &copy);
    office.talk(TALK);
    let [text, said] = printed(process);
    assert!(said.contains("800 packets captured, 0 missed"), "{said}");
    let id = office.id;
    let relayed = format!("eth0\teth0 received: relayed, pair {id}, first leg");
    assert!(text.lines().any(|line| line == relayed), "{text}");
    for (leg, phone) in office.phones.iter().enumerate() {
        let (from, to) = (phone.local(), office.local[leg]);
        let stream = text.lines().find_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let at = words.windows(4).position(|window| {
                window
                    == [
                        from.ip().to_string(),
                        from.port().to_string(),
                        to.ip().to_string(),
                        to.port().to_string(),
                    ]
            })?;
            Some(words[at + 4..].join(" "))
        });
        let stream = stream.unwrap_or_else(|| panic!("no stream of {from} in {text}"));
        // SSRC, payload, packets, lost.
        let expected = format!("0x{:08X} g711U {TALK} 0 (0.0%)", 100 + leg);
        assert!(stream.starts_with(&expected), "{stream}");
    }
}

fn wait_for_file(host: &Host, path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while host.run(|| fs::metadata(path).map_or(0, |file| file.len())) == 0 {
        assert!(Instant::now() < deadline, "nothing is written");
    }
}

#[test]
fn a_capture_ends_when_its_reader_closes() {
    let wire = Wire::new("generic");
    let [_, said] = printed(piped(&wire.net.pbx, "--all", "head -c 10"));
    assert_eq!(said, "relay-user: 0 packets captured, 0 missed\n");
}

#[test]
fn a_capture_ends_when_the_relay_is_detached() {
    let wire = Wire::new("generic");
    let capture = wire.capture(&["--all"]);
    wire.relay.stop().expect("an end");
    let captures = capture.end().expect("an end");
    let expected = "relay-user: the relay was detached from eth0: 0 packets captured, 0 missed\n";
    assert_eq!(captures.said, expected);
}

/// Runs a capture that fails, and returns what it says.
fn refused(host: &Host, arguments: &[&str]) -> String {
    let output = host
        .run_to_end(command(arguments).expect("relay-user"))
        .expect("relay-user");
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn without_a_relay_nothing_is_captured() {
    let host = Host::new("pbx").expect("a machine");
    let said = refused(&host, &["--all", "-w", "-"]);
    assert!(
        said.contains("the relay is attached to no interface"),
        "{said}"
    );
}

#[test]
fn the_file_is_new_and_private() {
    let wire = Wire::new("generic");
    let host = &wire.net.pbx;
    let capture = wire.capture(&["--all"]);
    let path = capture.path.clone();
    let mode = host
        .run(|| fs::metadata(&path))
        .expect("a file")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    capture.interrupt().expect("an end");
    let said = refused(host, &["--all", "-w", path.to_str().expect("text")]);
    assert!(said.contains("is there already"), "{said}");
}

#[test]
fn one_captures_at_a_time_and_a_killed_one_ends_by_itself() {
    let wire = Wire::new("generic");
    let host = &wire.net.pbx;
    let first = wire.capture(&["--all"]);
    let path = host.directory("second").expect("a folder").join("file");
    let second = [
        "--all",
        "--seconds",
        "0.1",
        "-w",
        path.to_str().expect("text"),
    ];
    let said = refused(host, &second);
    let expected = format!("process {} captures on eth0 already", first.process.id());
    assert!(said.contains(&expected), "{said}");
    first.process.signal(Signal::SIGKILL);
    let deadline = Instant::now() + PATIENCE;
    while !host
        .run_to_end(command(&second).expect("relay-user"))
        .expect("relay-user")
        .status
        .success()
    {
        assert!(Instant::now() < deadline, "the first still captures");
    }
}

/// One whose reader stood still until another began takes none of that one's copies.
#[test]
fn a_capture_that_stood_still_leaves_the_copies_to_the_next() {
    let wire = Wire::new("generic");
    let host = &wire.net.pbx;
    let mut first = command(&["--all", "--seconds", "1", "-w", "-"]).expect("relay-user");
    first.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut first = host.spawn(first).expect("relay-user capture");
    let mut file = vec![0; 1];
    let mut read = first.child_mut().stdout.take().expect("a pipe");
    read.read_exact(&mut file).expect("a capture");
    // More than a pipe holds.
    wire.talk();
    let path = host.directory("next").expect("a folder").join("file");
    let path = path.to_str().expect("text");
    let deadline = Instant::now() + PATIENCE;
    let next = ["--all", "--seconds", "0.1", "-w", path];
    while !host
        .run_to_end(command(&next).expect("relay-user"))
        .expect("relay-user")
        .status
        .success()
    {
        assert!(Instant::now() < deadline, "the first still captures");
    }
    let second = wire.capture(&["--all"]);
    second.process.signal(Signal::SIGSTOP);
    wire.talk();
    read.read_to_end(&mut file).expect("what was copied");
    let status = first.wait(PATIENCE).expect("an end");
    second.process.signal(Signal::SIGCONT);
    let second = second.interrupt().expect("an end");
    assert_eq!(second.packets.len(), 8 * PACKETS);
    assert!(packets(&file).expect("a capture").len() <= 8 * PACKETS);
    assert_eq!(status.code(), Some(1), "another has taken its place");
}

/// A reader that stands still loses copies, which are counted, and nobody loses packets.
#[test]
fn a_full_ring_buffer_disturbs_nobody() {
    let wire = Wire::new("generic");
    let capture = wire.capture(&["--all"]);
    capture.process.signal(Signal::SIGSTOP);
    // Each is received and sent: of 256 bytes at least, in 1 MiB.
    for _ in 0..7 {
        wire.talk();
    }
    capture.process.signal(Signal::SIGCONT);
    let captures = capture.interrupt().expect("an end");
    let words: Vec<_> = captures.said.split_whitespace().collect();
    let [
        "relay-user:",
        captured,
        "packets",
        "captured,",
        missed,
        "missed",
    ] = words[..]
    else {
        panic!("{}", captures.said);
    };
    let [captured, missed] =
        [captured, missed].map(|number| number.parse::<usize>().expect("a number"));
    assert_eq!(captured, captures.packets.len());
    assert!(
        missed > 0 && captured + missed <= 7 * 8 * PACKETS,
        "{}",
        captures.said
    );
    assert_eq!(wire.relay.reasons().expect("status")["relayed"], 2800);
}
