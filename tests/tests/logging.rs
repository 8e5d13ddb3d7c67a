//! The daemon's log under a flood.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use relay_tests::{
    pbx::{self, Pbx},
    relay::{Relay, ami_arguments},
    topology::{Direct, PBX_V4},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the status.
const LOOK: Duration = Duration::from_millis(20);

#[test]
fn a_flood_of_one_message_is_cut_and_counted() {
    const CALLS: u64 = 100;
    let net = Direct::new(2).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let mut arguments = ami_arguments(pbx.ami(), pbx::USER, pbx.secret_file()).to_vec();
    // Room for one call: each of the others is told of.
    arguments.extend(["--max-streams", "2", "--log-format", "json"].map(str::to_owned));
    let mut relay = Relay::attach(&net.pbx, "eth0", arguments).expect("attached");
    for call in 0..CALLS as u16 {
        let phone = |phone, port| (Direct::phone_v4(phone), port + 2 * call).into();
        pbx.call(phone(0, 30_000), phone(1, 40_000))
            .expect("a call");
    }
    let deadline = Instant::now() + PATIENCE;
    while relay.json(["status"]).expect("status")["refused"] != CALLS - 1 {
        assert!(Instant::now() < deadline, "not refused: {}", relay.log());
        thread::sleep(LOOK);
    }
    relay.signal(Signal::SIGTERM);
    relay.wait(PATIENCE).expect("an end");

    let log = relay.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for line in &lines {
        for field in ["timestamp", "level", "target"] {
            assert!(line[field].is_string(), "{line}");
        }
    }
    let of = |message: &str| {
        let lines = lines.iter().map(|line| &line["fields"]);
        let found = lines.filter(|fields| fields["message"] == message);
        found.collect::<Vec<_>>()
    };
    let (told, more) = (of("left with Asterisk"), of("more messages like this one"));
    assert!((1..40).contains(&told.len()), "{} lines", told.len());
    let suppressed: u64 = more
        .iter()
        .filter(|fields| fields["like"] == "left with Asterisk")
        .map(|fields| fields["suppressed"].as_u64().expect("a number"))
        .sum();
    assert!(
        told.len() as u64 + suppressed >= CALLS - 1,
        "{suppressed} suppressed: {log}"
    );
    assert!(!log.contains(pbx::SECRET));
}
