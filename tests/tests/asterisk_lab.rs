//! The real Asterisk without the relay: what a call must look like before anything is offloaded.

use std::time::Duration;

use relay_tests::{
    ami::Client,
    asterisk::{CALLER, Lab, SECRET, USER, streams},
    capture::Capture,
};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_plain_call_is_native_and_a_transcoded_one_is_not() {
    let lab = Lab::up().expect("Asterisk");
    let capture = Capture::start(&lab.net.phones_interface).expect("capture");
    lab.call(2, 8, "2000", CALLER).expect("calls");
    let pairs = lab.wait_calls(2, PATIENCE).expect("calls up");
    lab.wait_technology(2, "native_rtp", PATIENCE)
        .expect("native");
    let before = lab.received().expect("counters");
    // The calls' own time limit ends them.
    lab.wait_over(PATIENCE).expect("calls over");
    assert!(before > 0);
    let recording = capture.stop().expect("a capture without drops");
    assert_eq!(recording.verify().wrong, [""; 0]);
    let native = streams(&recording, &pairs);
    assert_eq!(native.len(), 4);
    for stream in &native {
        assert!(stream.sent > 200, "{stream:#?}");
        assert!(stream.received * 100 >= stream.sent * 99, "{stream:#?}");
        assert!(stream.unchanged * 100 >= stream.sent * 99, "{stream:#?}");
        assert_eq!((stream.duplicates, stream.reordered), (0, 0), "{stream:#?}");
    }

    let capture = Capture::start(&lab.net.phones_interface).expect("capture");
    lab.call(1, 60, "2300", CALLER).expect("call");
    let pairs = lab.wait_calls(1, PATIENCE).expect("call up");
    lab.wait_technology(1, "simple_bridge", PATIENCE)
        .expect("transcoding");
    capture
        .wait(PATIENCE, |frames| {
            frames
                .iter()
                .filter(|frame| frame.bytes.len() > 200)
                .count()
                > 600
        })
        .expect("media");
    lab.hang_up_all().expect("hang up");
    let transcoded = streams(&capture.stop().expect("a capture without drops"), &pairs);
    assert_eq!(transcoded.len(), 2);
    for stream in &transcoded {
        assert!(stream.received * 100 >= stream.sent * 95, "{stream:#?}");
        assert_eq!(stream.unchanged, 0, "another codec: {stream:#?}");
    }
}

#[test]
fn the_least_privileged_user_sees_what_the_relay_needs() {
    let lab = Lab::up().expect("Asterisk");
    let mut client = Client::login(&lab.net.pbx, lab.ami(), USER, SECRET).expect("login");
    lab.call(1, 60, "2000", CALLER).expect("call");
    client
        .wait_event(PATIENCE, |event| event.is_event("BridgeEnter"))
        .expect("bridge events");
    client
        .wait_event(PATIENCE, |event| event.is_event("VarSet"))
        .expect("variable events");
    let pairs = lab.wait_calls(1, PATIENCE).expect("call up");
    let status = client
        .action("Status", &[("Variables", "CHANNEL(rtp,dest)")])
        .expect("Status");
    let remotes: Vec<_> = status
        .iter()
        .filter_map(|item| item.variable("CHANNEL(rtp,dest)"))
        .collect();
    assert_eq!(remotes.len(), 2);
    for leg in &pairs[0] {
        assert!(remotes.contains(&leg.remote.to_string().as_str()));
    }
    client
        .action("Command", &[("Command", "core show version")])
        .expect_err("no more than that");
    assert!(
        lab.cli("core show version")
            .expect("CLI")
            .contains("Asterisk 22")
    );
    lab.hang_up_all().expect("hang up");
    client
        .wait_event(PATIENCE, |event| event.is_event("Hangup"))
        .expect("the end");
}
