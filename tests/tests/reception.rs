//! How the phones' packets arrive, as the relay tells it, held against Wireshark's count of the same packets.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use relay_tests::{
    capture::{Capture, Direction, Frame},
    pcapng::Captured,
    phone::{Bank, Phone, Talk},
    relay::Relay,
    rtp::{PAYLOAD, Rtp},
    topology::{Direct, PBX_V4, PBX_V6},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(10);
const SSRC: u32 = 0x5eed_0001;

/// One call through the relay, whose first phone sends whatever a test wants.
struct Line {
    net: Direct,
    relay: Relay,
    phones: [Phone; 2],
    pair: u64,
    _bank: Bank,
}

impl Line {
    fn open(mode: &str, version: u8) -> Self {
        let net = Direct::new(2).expect("network");
        let bank = Bank::new(&net.phones).expect("phones");
        let (pbx, address): (_, fn(u8) -> _) = match version {
            4 => (PBX_V4, Direct::phone_v4),
            _ => (PBX_V6, Direct::phone_v6),
        };
        let phones = [0, 1].map(|phone| {
            let local = (address(phone), 30_000).into();
            bank.phone(local).expect("phone")
        });
        let relay = Relay::attach(&net.pbx, "eth0", ["--mode", mode]).expect("attach");
        let legs = [10_000, 10_002].map(|port| SocketAddr::from((pbx, port)));
        let [first, second] = [0, 1].map(|leg| format!("{}={}", legs[leg], phones[leg].local()));
        let pair = relay.offload([&first, &second, "--payload-type", "0,8,111"]);
        let pair = pair.expect("offloaded");
        Self {
            net,
            relay,
            phones,
            pair,
            _bank: bank,
        }
    }

    fn local(&self) -> SocketAddr {
        let shown = self.show();
        let local = shown["legs"][0]["local"].as_str().expect("local");
        local.parse().expect(local)
    }

    fn show(&self) -> Value {
        self.relay
            .json(["show", &self.pair.to_string()])
            .expect("show")
    }

    /// Sends these packets, each at its time, and returns what the relay and what Wireshark say of them: of the same
    /// times, those of the relay's own capture.
    fn play(&self, packets: &[Planned]) -> [Heard; 2] {
        let wire = Capture::start(&self.net.phones_interface).expect("capture");
        let captured = Captured::start(&self.net.pbx, &["--all"]).expect("relay-user capture");
        let to = self.local();
        let begin = Instant::now();
        for planned in packets {
            thread::sleep((begin + planned.at).saturating_duration_since(Instant::now()));
            let packet = planned.rtp.packet(&[0x55; PAYLOAD]);
            self.phones[0].send(&packet, to).expect("send");
        }
        let all = packets.len();
        self.phones[1]
            .wait_received(all, PATIENCE)
            .expect("relayed");
        let captures = captured.interrupt().expect("an end");
        let wire = wire.stop().expect("capture").only(Direction::Out);
        let came = captures.packets.iter().map(|packet| &packet.frame);
        let came = came.filter(|frame| frame.direction == Direction::In);
        keep_time(&times(&wire.frames, to), &times(came, to));
        let folder = tempfile::tempdir().expect("folder");
        let file = folder.path().join("came.pcapng");
        fs::write(&file, &captures.file).expect("a file");
        [
            Heard::by_relay(&self.show()["streams"][0]["reception"]),
            Heard::by_wireshark(&file, to.port()),
        ]
    }
}

/// When each packet to this address was seen, by its sequence number.
fn times<'a>(
    frames: impl IntoIterator<Item = &'a Frame>,
    to: SocketAddr,
) -> BTreeMap<u16, Duration> {
    let sequence = |frame: &Frame| {
        let datagram = frame.datagram().filter(|found| found.destination == to)?;
        let (rtp, _) = Rtp::parse(datagram.payload)?;
        Some(rtp.sequence)
    };
    let frames = frames.into_iter();
    frames
        .filter_map(|frame| Some((sequence(frame)?, frame.at)))
        .collect()
}

/// Holds the relay's clock against the kernel's at the phone's end of the cable: no packet comes before it was sent,
/// and most come at once. A busy machine holds up some, and the relay's file may begin a moment late as a whole.
#[track_caller]
fn keep_time(sent: &BTreeMap<u16, Duration>, came: &BTreeMap<u16, Duration>) {
    const AT_ONCE: Duration = Duration::from_micros(500);
    assert!(sent.keys().eq(came.keys()), "{sent:?}, {came:?}");
    let delay = |(sent, came): (&Duration, &Duration)| {
        let delay = came.checked_sub(*sent);
        delay.unwrap_or_else(|| panic!("sent at {sent:?}, and came at {came:?}"))
    };
    let mut delays: Vec<_> = sent.values().zip(came.values()).map(delay).collect();
    delays.sort_unstable();
    let (least, median) = (delays[0], delays[delays.len() / 2]);
    println!("{least:?} to {median:?}");
    assert!(median - least < AT_ONCE, "{delays:?}");
}

/// A packet that is to be sent.
struct Planned {
    at: Duration,
    rtp: Rtp,
}

/// What two observers must agree on.
#[derive(Clone, Copy, Debug)]
struct Heard {
    packets: u64,
    lost: u64,
    jitter_mean: f64,
    jitter_max: f64,
    largest_gap: f64,
}

impl Heard {
    fn by_relay(reception: &Value) -> Self {
        let number = |name: &str| reception[name].as_f64().expect(name);
        Self {
            packets: number("packets") as u64,
            lost: number("lost") as u64,
            jitter_mean: number("jitter_mean_ms"),
            jitter_max: number("jitter_max_ms"),
            largest_gap: number("largest_gap_ms"),
        }
    }

    /// From `tshark -q -z rtp,streams`: times, addresses, SSRC, payload, packets, lost (percent), then lowest, mean and
    /// highest of delta and of jitter, ms.
    fn by_wireshark(file: &Path, port: u16) -> Self {
        let ran = Command::new("tshark")
            .args(["-q", "-z", "rtp,streams", "-d"])
            .arg(format!("udp.port=={port},rtp"))
            .arg("-r")
            .arg(file)
            .output()
            .expect("tshark");
        let text = String::from_utf8_lossy(&ran.stdout).into_owned();
        let row = text
            .lines()
            .map(|line| line.split_whitespace().collect::<VecDeque<_>>())
            .find(|row| row.get(5) == Some(&port.to_string().as_str()))
            .unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&ran.stderr)));
        let behind: Vec<_> = row
            .iter()
            .skip_while(|word| !word.starts_with("0x"))
            .skip_while(|word| word.parse::<u64>().is_err())
            .map(|word| word.trim_matches(['(', ')', '%']))
            .collect();
        let number = |index: usize| behind[index].parse::<f64>().expect("number");
        Self {
            packets: number(0) as u64,
            lost: number(1) as u64,
            largest_gap: number(5),
            jitter_mean: number(7),
            jitter_max: number(8),
        }
    }
}

/// A sequence of numbers that looks random and is the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

const PACKETS: u16 = 400;
const SPACING: Duration = Duration::from_millis(10);

/// Packets 10 ms apart across the wrap of the sequence, disturbed as the three say: loss and reordering in percent, jitter
/// in µs.
fn disturbed(lost: u64, reordered: u64, jitter: u64) -> Vec<Planned> {
    let mut dice = Dice(lost << 32 | reordered << 16 | jitter);
    let mut packets = Vec::new();
    for number in 0..PACKETS {
        // Wireshark takes the first for the beginning and the last for the end.
        let is_inner = number > 0 && number < PACKETS - 2;
        if is_inner && dice.below(100) < lost {
            continue;
        }
        let mut at = SPACING * u32::from(number) + Duration::from_micros(dice.below(jitter + 1));
        if is_inner && dice.below(100) < reordered {
            at += SPACING * 3 / 2 + Duration::from_micros(jitter);
        }
        let rtp = Rtp {
            marker: number == 0,
            payload_type: 0,
            sequence: 65_400_u16.wrapping_add(number),
            timestamp: u32::MAX - 10_000,
            ssrc: SSRC,
        };
        let timestamp = rtp.timestamp.wrapping_add(80 * u32::from(number));
        packets.push(Planned {
            at,
            rtp: Rtp { timestamp, ..rtp },
        });
    }
    packets.sort_by_key(|planned| planned.at);
    packets
}

#[track_caller]
fn agree(what: &str, ours: f64, theirs: f64) {
    assert!(
        // Wireshark prints microseconds.
        (ours - theirs).abs() <= theirs * 0.01 + 0.001,
        "{what}: {ours} ms, and {theirs} ms by tshark"
    );
}

#[test]
fn statistics_agree_with_wireshark() {
    for (mode, version, lost, reordered, jitter) in [
        ("generic", 4, 0, 0, 4_000),
        ("generic", 6, 5, 0, 5_000),
        ("tc", 4, 3, 4, 6_000),
    ] {
        let line = Line::open(mode, version);
        let packets = disturbed(lost, reordered, jitter);
        let [ours, theirs] = line.play(&packets);
        println!("{mode} {lost} {reordered} {jitter}: {ours:?} {theirs:?}");
        assert_eq!(ours.packets, packets.len() as u64);
        assert_eq!(
            (ours.packets, ours.lost),
            (theirs.packets, theirs.lost),
            "{mode}: {ours:?} {theirs:?}"
        );
        agree("mean jitter", ours.jitter_mean, theirs.jitter_mean);
        agree("highest jitter", ours.jitter_max, theirs.jitter_max);
        agree("longest gap", ours.largest_gap, theirs.largest_gap);
        let reception = &line.show()["streams"][0]["reception"];
        let late = reception["reordered"].as_u64().expect("reordered");
        assert_eq!(late > 0, reordered > 0, "{reception}");
    }
}

#[test]
fn both_directions_are_told_and_a_new_source_is_seen() {
    let line = Line::open("generic", 4);
    let shown = line.show();
    let to = [0, 1].map(|leg: usize| -> SocketAddr {
        let local = shown["legs"][leg]["local"].as_str().expect("local");
        local.parse().expect(local)
    });
    line.phones[0].talk(Talk {
        count: Some(50),
        ..Talk::to(to[0], 0xaaaa)
    });
    line.phones[1].talk(Talk {
        count: Some(20),
        ..Talk::to(to[1], 0xbbbb)
    });
    line.phones[1].wait_received(50, PATIENCE).expect("heard");
    line.phones[1].talk(Talk {
        count: Some(30),
        payload_type: 8,
        ..Talk::to(to[1], 0xcccc)
    });
    line.phones[1].wait_sent(50, PATIENCE).expect("sent");
    let deadline = Instant::now() + PATIENCE;
    let streams = loop {
        let streams = line.show()["streams"].take();
        if streams[1]["reception"]["packets"] == 50 {
            break streams;
        }
        assert!(Instant::now() < deadline, "{streams}");
    };
    let [first, second] = [0, 1].map(|leg| &streams[leg]["reception"]);
    assert_eq!(first["packets"], 50);
    assert_eq!(
        (&first["ssrc"], &first["ssrc_changes"]),
        (&"0x0000aaaa".into(), &0.into())
    );
    assert_eq!(first["markers"], 1);
    assert_eq!(first["codec"], "PCMU");
    assert_eq!(first["payload_types"], serde_json::json!([0]));
    assert_eq!(second["packets"], 50);
    assert_eq!(
        (&second["ssrc"], &second["ssrc_changes"]),
        (&"0x0000cccc".into(), &1.into())
    );
    assert_eq!(second["codec"], "PCMA");
    assert_eq!(second["payload_types"], serde_json::json!([0, 8]));
    assert_eq!(second["lost"], 0);
    for reception in [first, second] {
        let mos = reception["mos"].as_f64().expect("MOS");
        assert!((4.0..=4.5).contains(&mos), "{reception}");
        let at = reception["last_arrival"].as_str().expect("arrival");
        humantime::parse_rfc3339(at).expect(at);
    }
}

#[test]
fn the_clock_of_a_dynamic_payload_type_is_found_out() {
    let line = Line::open("generic", 4);
    let to = line.local();
    let begin = Instant::now();
    for number in 0..200_u16 {
        let at = begin + Duration::from_millis(20) * u32::from(number);
        thread::sleep(at.saturating_duration_since(Instant::now()));
        let rtp = Rtp {
            marker: number == 0,
            payload_type: 111,
            sequence: number,
            timestamp: 960 * u32::from(number),
            ssrc: SSRC,
        };
        let packet = rtp.packet(&[0x55; PAYLOAD]);
        line.phones[0].send(&packet, to).expect("send");
        if number % 25 != 0 {
            continue;
        }
        let reception = &line.show()["streams"][0]["reception"];
        if reception["clock_rate"] == 48_000 && !reception["jitter_mean_ms"].is_null() {
            return;
        }
    }
    panic!("{}", line.show());
}
