//! What `bpftool` shows of a relay at work: docs/inspection.md.

use std::{fs, path::PathBuf, process::Command};

use relay_common::reason::Reason;
use relay_tests::{
    namespace::Host,
    pair::{Legs, Sockets},
    phone::Bank,
    relay::Relay,
    topology::Direct,
};
use relay_user::datapath::names;
use serde_json::Value;

/// Packets of the phone that talks.
const PACKETS: u64 = 100;

/// Runs `bpftool` with JSON.
fn bpftool(host: &Host, line: &str) -> Value {
    let mut command = Command::new("bpftool");
    command.arg("-j").args(line.split_whitespace());
    let output = host.output(command).expect(line);
    serde_json::from_slice(&output.stdout).expect(line)
}

/// The program behind a pinned link.
fn program(host: &Host, link: &str) -> Value {
    let link = bpftool(host, &format!("link show pinned {link}"));
    bpftool(host, &format!("prog show id {}", link["prog_id"]))
}

/// Run-time statistics switched on, and off again in the end as they were.
struct Statistics(String);

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

impl Statistics {
    fn on() -> Self {
        let before = fs::read_to_string(SWITCH).expect(SWITCH);
        fs::write(SWITCH, "1").expect(SWITCH);
        Self(before)
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let restored = fs::write(SWITCH, &self.0);
        if !std::thread::panicking() {
            restored.expect(SWITCH);
        }
    }
}

#[test]
fn bpftool_shows_maps_streams_and_the_time_of_a_run() {
    let net = Direct::new(2).expect("network");
    let host = &net.pbx;
    let relay = Relay::attach(host, "eth0", ["--mode", "generic"]).expect("attached");
    let (phones, pbx) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(host).expect("sockets"),
    );
    let [legs, _] = Legs::direct();
    let sockets = Sockets::open(legs, &phones, &pbx).expect("sockets");
    let id = sockets.offload(&relay).expect("offloaded");
    let status = relay.json(["status"]).expect("status");
    let pins = PathBuf::from(status["pins"].as_str().expect("pins"));
    let pin = |name: &str| pins.join(name).display().to_string();

    // Maps and programs have the names of the description, which has them all.
    let description = include_str!("../../docs/inspection.md");
    for name in names::MAPS {
        let map = bpftool(host, &format!("map show pinned {}", pin(name)));
        assert_eq!(map["name"], name);
        assert!(description.contains(&format!("`{name}`")), "{name}");
    }
    for (link, name) in [
        (names::XDP_LINK, names::XDP),
        (names::OBSERVER_LINK, names::OBSERVE),
    ] {
        assert_eq!(program(host, &pin(link))["name"], name);
        assert!(description.contains(&format!("`{link}`")), "{link}");
    }

    // A stream has the names of its fields, and what `add` was told.
    let streams = bpftool(host, &format!("map dump pinned {}", pin(names::STREAMS)));
    let streams = streams.as_array().expect("entries");
    assert_eq!(streams.len(), 2);
    let stream = streams
        .iter()
        .map(|entry| &entry["formatted"])
        .find(|stream| stream["key"]["local_port"] == 10_000)
        .expect("the stream of the first leg");
    let value = &stream["value"];
    for (field, expected) in [
        ("source_port", 30_000),
        ("new_source_port", 10_002),
        ("new_destination_port", 30_002),
        ("pair", id),
        ("dscp", 46),
    ] {
        assert_eq!(value[field], expected, "{field} of {value:#}");
    }
    let source = &value["source"]["bytes"];
    assert_eq!(
        source.as_array().map(|bytes| &bytes[12..]),
        Some(&[192, 0, 2, 11].map(Value::from)[..])
    );

    // What it did is counted, by stream and by reason, and timed where that is wanted.
    let statistics = Statistics::on();
    sockets.talk(0, 0, Some(PACKETS));
    sockets.relayed(0, PACKETS as usize).expect("relayed");
    let run = program(host, &pin(names::XDP_LINK));
    assert!(run["run_cnt"].as_u64() >= Some(PACKETS), "{run:#}");
    assert!(run["run_time_ns"].as_u64() > Some(0), "{run:#}");
    drop(statistics);
    let lookup = |map: &str, key: u64| {
        let line = format!("map lookup pinned {} key {key} 0 0 0", pin(map));
        bpftool(host, &line)["formatted"].clone()
    };
    let slot = value["slot"].as_u64().expect("a slot");
    assert_eq!(lookup(names::STATE, slot)["value"]["packets"], PACKETS);
    let counters = lookup(names::COUNTERS, Reason::Relayed as u64);
    let counted = counters["values"].as_array().expect("processors").iter();
    let relayed: u64 = counted
        .map(|counter| counter["value"]["packets"].as_u64().expect("a number"))
        .sum();
    assert_eq!(relayed, PACKETS, "{counters:#}");
}
