//! `relay-user capture`: what it writes, what ends it, and that nobody is relayed differently for it.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use pcap_file::pcapng::{
    Block, PcapNgReader,
    blocks::{
        enhanced_packet::EnhancedPacketOption, interface_description::InterfaceDescriptionOption,
    },
};
use relay_tests::{
    capture::{Capture, Direction, Frame},
    link::PassProgram,
    namespace::{Host, Process},
    pair::{Legs, Sockets},
    phone::Bank,
    relay::{Relay, binary},
    topology::Direct,
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
        Captured::start(&self.net.pbx, arguments)
    }
}

/// A capture into a file that is under way.
struct Captured {
    host: Host,
    process: Process,
    path: PathBuf,
}

/// What a file holds, and what its capture said at last.
struct Captures {
    packets: Vec<Packet>,
    said: String,
}

/// A captured packet.
#[derive(Clone, Debug)]
struct Packet {
    comment: String,
    flags: u32,
    frame: Frame,
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN").expect("relay-user"));
    command.arg("capture").args(arguments).stdin(Stdio::null());
    command
}

impl Captured {
    fn start(host: &Host, arguments: &[&str]) -> Self {
        let path = host.directory("capture").expect("a folder").join("file");
        let mut command = command(arguments);
        command.arg("-w").arg(&path).stderr(Stdio::piped());
        let process = host.spawn(command).expect("relay-user capture");
        let mut captured = Self {
            host: host.clone(),
            process,
            path,
        };
        // The file begins when everything is ready.
        captured.wait(|bytes| bytes.len() > 80);
        captured
    }

    fn bytes(&self) -> Vec<u8> {
        self.host.run(|| fs::read(&self.path)).unwrap_or_default()
    }

    fn wait(&mut self, condition: impl Fn(&[u8]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(&self.bytes()) {
            assert!(Instant::now() < deadline, "the file does not grow");
            if let Some(status) = self.process.try_wait() {
                panic!("the capture has ended: {status}: {}", self.said());
            }
        }
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        let stderr = self.process.child_mut().stderr.as_mut();
        stderr
            .expect("a pipe")
            .read_to_string(&mut said)
            .expect("text");
        said
    }

    /// Ends it as Ctrl-C does.
    fn interrupt(self) -> Captures {
        self.process.signal(Signal::SIGINT);
        self.end()
    }

    fn end(mut self) -> Captures {
        let said = self.said();
        let status = self.process.wait(PATIENCE).expect("an end");
        assert!(status.success(), "{status}: {said}");
        Captures {
            packets: packets(&self.bytes()),
            said,
        }
    }
}

fn packets(file: &[u8]) -> Vec<Packet> {
    let mut reader = PcapNgReader::new(file).expect("a section");
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        match block.expect("a whole block") {
            Block::InterfaceDescription(described) => {
                let name = InterfaceDescriptionOption::IfName("eth0".into());
                assert!(described.options.contains(&name), "{described:?}");
            }
            Block::EnhancedPacket(packet) => {
                let (mut comment, mut flags) = (String::new(), 0);
                for option in &packet.options {
                    match option {
                        EnhancedPacketOption::Comment(text) => comment = text.to_string(),
                        EnhancedPacketOption::Flags(word) => flags = *word,
                        other => panic!("{other:?}"),
                    }
                }
                packets.push(Packet {
                    comment,
                    flags,
                    frame: Frame {
                        at: packet.timestamp,
                        direction: if flags == 1 {
                            Direction::In
                        } else {
                            Direction::Out
                        },
                        bytes: packet.data.to_vec(),
                        checksum_pending: false,
                    },
                });
            }
            other => panic!("{other:?}"),
        }
    }
    packets
}

impl Captures {
    fn comments(&self) -> BTreeMap<&str, usize> {
        let mut comments = BTreeMap::new();
        for packet in &self.packets {
            *comments.entry(&packet.comment[..]).or_default() += 1;
        }
        comments
    }

    /// The frames with RTP that went one way, in an order of their own.
    fn frames(&self, direction: Direction) -> Vec<&[u8]> {
        let frames = self.packets.iter().map(|packet| &packet.frame);
        sorted(frames, direction)
    }
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
    let captures = capture.interrupt();
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
    let comments = captures.comments();
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
            captures.frames(ours) == sorted(&phones.frames, theirs),
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
