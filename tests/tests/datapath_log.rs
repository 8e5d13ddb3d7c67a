//! The datapath's own log: absent from the object, unless the feature `datapath-log` puts it there.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use relay_tests::{
    pair::{Legs, Sockets},
    phone::Bank,
    relay::Relay,
    rtp::{PAYLOAD, Rtp},
    topology::Direct,
};
use relay_user::datapath::OBJECT;

const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the log.
const LOOK: Duration = Duration::from_millis(20);

#[test]
fn the_object_holds_no_code_that_logs() {
    // The map of messages and the variable of their level, which every message needs.
    let holds = |name: &[u8]| OBJECT.windows(name.len()).any(|bytes| bytes == name);
    assert!(!holds(b"AYA_LOG"));
    // What is looked for would be found.
    assert!(holds(b"STREAMS") && holds(b"relay_xdp"));
}

/// The controller whose object logs, built into a folder of its own: no other test may come upon it.
fn logging_build() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("datapath-log");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--package", "relay-user"])
        .args(["--features", "datapath-log", "--target-dir"])
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    assert!(built.status.success(), "{built:?}");
    target.join("debug/relay-user")
}

#[test]
fn what_the_datapath_says_of_a_stranger_is_in_the_daemons_log() {
    let logging = logging_build();
    // The shell runs it in place of the program that it is told to run.
    let instead = [
        OsStr::new("sh"),
        "-c".as_ref(),
        "shift; exec \"$0\" \"$@\"".as_ref(),
        logging.as_ref(),
    ];
    let net = Direct::new(3).expect("network");
    for mode in ["generic", "tc"] {
        let relay = Relay::attach_through(&net.pbx, instead, "eth0", ["--mode", mode]);
        let relay = relay.expect("attached");
        let (phones, pbx) = (
            Bank::new(&net.phones).expect("phones"),
            Bank::new(&net.pbx).expect("sockets"),
        );
        let [legs, _] = Legs::direct();
        let sockets = Sockets::open(legs, &phones, &pbx).expect("sockets");
        sockets.offload(&relay).expect("offloaded");
        let stranger = phones
            .phone((Direct::phone_v4(2), 40_000).into())
            .expect("a phone");
        let header = Rtp {
            marker: false,
            payload_type: 0,
            sequence: 0,
            timestamp: 0,
            ssrc: 7,
        };
        let packet = header.packet(&[0; PAYLOAD]);
        let deadline = Instant::now() + PATIENCE;
        let told = format!(
            "a packet came from ::ffff:{}, port 40000",
            Direct::phone_v4(2)
        );
        while !relay.log().contains(&told) {
            assert!(Instant::now() < deadline, "{mode}: {}", relay.log());
            stranger.send(&packet, legs.local[0]).expect("sent");
            thread::sleep(LOOK);
        }
        relay.stop().expect("a clean end");
    }
}
