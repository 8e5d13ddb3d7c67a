//! Shaping while calls are up, and only then.

use std::{
    net::SocketAddr,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::sys::signal::Signal;
use relay_tests::{
    namespace::{Host, Process},
    phone::{Bank, Phone, Speech, Talk},
    relay::{Relay, binary},
    topology::{Direct, PBX_V4},
};
use serde_json::Value;

/// What nothing here takes as long as.
const PATIENCE: Duration = Duration::from_secs(30);
/// Within which shaping goes on and off: 3 seconds that must agree, and one in which they end.
const WITHIN: Duration = Duration::from_secs(4);

/// Both parties talk in turn; when one falls silent the other has not begun yet.
const SPEECH: Speech = Speech {
    spurt: 75,
    pause: 125,
    noise: 0,
};

/// Two phones: one in the office, one on the PBX's own machine.
struct Site {
    net: Direct,
    phones: [Phone; 2],
    _banks: [Bank; 2],
}

impl Site {
    fn new() -> Self {
        let net = Direct::new(2).expect("network");
        let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("phones"));
        let phones = [
            banks[0].phone(SocketAddr::new(Direct::phone_v4(0), 30_000)),
            banks[1].phone(SocketAddr::new(PBX_V4, 10_000)),
        ];
        Self {
            net,
            phones: phones.map(|phone| phone.expect("phone")),
            _banks: banks,
        }
    }

    /// A call that no relay knows of.
    fn call(&self) {
        let [there, here] = &self.phones;
        there.talk(Talk::to(here.local(), 1));
        here.talk(Talk::to(there.local(), 2));
    }

    fn hush(&self) {
        self.phones.iter().for_each(Phone::hush);
    }
}

fn command(words: &str) -> Command {
    let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN").expect("built"));
    command.args(words.split_whitespace());
    command
}

fn run(host: &Host, words: &str) -> Output {
    host.run_to_end(command(words)).expect("started")
}

/// What `qos show` tells of eth0.
fn shown(host: &Host) -> Value {
    let output = run(host, "qos show eth0 --json");
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    report["interfaces"][0].clone()
}

/// Starts `qos auto` and waits until it counts.
fn start(host: &Host) -> Process {
    let mut command = command("qos auto eth0 --uplink 1mbit");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let process = host.spawn(command).expect("started");
    wait(host, |it| {
        it["auto"]["process"] == process.id() && it["auto"]["running"] == true
    });
    process
}

fn end(mut process: Process, host: &Host) {
    process.signal(Signal::SIGTERM);
    assert!(process.wait(PATIENCE).expect("an end").success());
    assert_eq!(shown(host)["auto"]["running"], false);
}

/// Waits until `qos show` tells this.
fn wait(host: &Host, condition: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let told = shown(host);
        if condition(&told) {
            return told;
        }
        assert!(Instant::now() < deadline, "{told:#}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until shaping is on or off; it is so within the time promised since `start`.
fn wait_shaped(host: &Host, on: bool, start: SystemTime) {
    let told = wait(host, |it| it["auto"]["on"] == on);
    let state = if on { "shaped" } else { "marked" };
    assert_eq!(told["state"], state, "{told:#}");
    let transitions = transitions(&told);
    let last = transitions.last().expect("a transition");
    assert_eq!(last["on"], on);
    let time = last["time"].as_str().expect("text");
    let time = humantime::parse_rfc3339(time).expect("a time");
    let took = time.duration_since(start).expect("later");
    assert!(took <= WITHIN, "{took:?}: {told:#}");
}

fn transitions(told: &Value) -> Vec<Value> {
    told["auto"]["transitions"]
        .as_array()
        .expect("a list")
        .clone()
}

/// Waits until a phone has sent so many packets of voice more.
fn talk_on(phone: &Phone, packets: u64) {
    let sent = phone.sent();
    phone.wait_sent(sent + packets, PATIENCE).expect("voice");
}

#[test]
fn shaping_comes_and_goes_with_a_call_and_outlasts_its_pauses() {
    let site = Site::new();
    let host = &site.net.pbx;
    let auto = start(host);
    let told = shown(host);
    assert_eq!(told["state"], "marked");
    assert!(transitions(&told).is_empty(), "{told:#}");
    let begun = SystemTime::now();
    site.call();
    wait_shaped(host, true, begun);
    // Two and a half seconds without a packet, again and again, in both directions at once.
    for phone in &site.phones {
        phone.suppress_silence(Some(SPEECH));
    }
    talk_on(&site.phones[1], 3 * 75);
    assert_eq!(transitions(&shown(host)).len(), 1);
    let ended = SystemTime::now();
    site.hush();
    wait_shaped(host, false, ended);
    assert_eq!(transitions(&shown(host)).len(), 2);
    end(auto, host);
    let cleared = run(host, "qos clear eth0");
    assert!(cleared.status.success(), "{cleared:?}");
    assert_eq!(shown(host)["auto"], Value::Null);
}

#[test]
fn a_restart_in_mid_call_changes_nothing() {
    let site = Site::new();
    let host = &site.net.pbx;
    let auto = start(host);
    let begun = SystemTime::now();
    site.call();
    wait_shaped(host, true, begun);
    let shaped = shown(host);

    // What somebody takes away comes back.
    host.tc("qdisc delete dev eth0 root").expect("deleted");
    wait(host, |it| it["state"] == "shaped");

    // Nobody else decides meanwhile.
    for words in [
        "qos apply eth0 --uplink 2mbit",
        "qos clear eth0",
        "qos auto eth0 --uplink 2mbit",
    ] {
        let output = run(host, words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}");
        let process = format!("(process {})", auto.id());
        assert!(error.contains(&process), "{words}: {error}");
    }

    end(auto, host);
    assert_eq!(shown(host)["state"], "shaped");
    let auto = start(host);
    let again = shown(host);
    assert_eq!(again["state"], "shaped");
    assert_eq!(transitions(&again), transitions(&shaped));

    // Whoever is killed leaves it as it is too, and what ends meanwhile is noticed.
    auto.signal(Signal::SIGKILL);
    wait(host, |it| it["auto"]["running"] == false);
    drop(auto);
    site.hush();
    let begun = SystemTime::now();
    let auto = start(host);
    wait_shaped(host, false, begun + Duration::from_secs(1));
    end(auto, host);
}

#[test]
fn an_interface_that_comes_back_is_minded_again() {
    let site = Site::new();
    let host = &site.net.pbx;
    let auto = start(host);
    let index = shown(host)["ifindex"].clone();
    host.ip("link delete eth0").expect("deleted");
    let told = wait(host, |it| it["auto"]["failure"].is_string());
    let failure = told["auto"]["failure"].as_str().expect("text");
    assert!(failure.contains("eth0"), "{failure}");
    host.ip("link add eth0 type veth peer name peer\nlink set eth0 up\nlink set peer up")
        .expect("added");
    wait(host, |it| {
        it["auto"]["failure"].is_null() && it["ifindex"] != index
    });
    end(auto, host);
}

/// What XDP sends past the queues is counted too.
#[test]
fn the_daemon_shapes_for_the_calls_that_it_relays_past_the_queues() {
    the_daemon_shapes("generic", "generic");
}

/// Left to itself, it takes the mode in which they pass the queues.
#[test]
fn the_daemon_shapes_for_the_calls_that_it_relays_through_the_queues() {
    the_daemon_shapes("auto", "tc");
}

/// For calls that it relays, in the mode asked for, which comes to another one.
fn the_daemon_shapes(mode: &str, attached: &str) {
    let net = Direct::new(2).expect("network");
    let host = &net.pbx;
    let text = format!("mode = \"{mode}\"\npersist = true\n[qos.auto]\nuplink = \"1mbit\"\n");
    let file = host.private_file("eth0.toml", &text).expect("written");
    let config = [String::from("--config"), file.display().to_string()];
    let relay = Relay::attach(host, "eth0", &config).expect("relay");
    assert_eq!(relay.json(["status"]).expect("status")["mode"], attached);
    let bank = Bank::new(&net.phones).expect("phones");
    let remote = |phone: u8| SocketAddr::new(Direct::phone_v4(phone), 30_000);
    let local = |leg: u16| SocketAddr::new(PBX_V4, 10_000 + 2 * leg);
    let phones = [0, 1].map(|phone| bank.phone(remote(phone)).expect("phone"));
    let legs = [0, 1].map(|leg| format!("{}={}", local(leg.into()), remote(leg)));
    let id = relay.offload(&legs).expect("offloaded");
    let begun = SystemTime::now();
    for (phone, leg) in phones.iter().zip(0..) {
        phone.talk(Talk::to(local(leg), leg.into()));
    }
    wait_shaped(host, true, begun);

    relay.stop().expect("an end");
    assert_eq!(shown(host)["state"], "shaped");
    let relay = Relay::attach(host, "eth0", &config).expect("relay");
    talk_on(&phones[0], 50);
    assert_eq!(transitions(&shown(host)).len(), 1);

    phones.iter().for_each(Phone::hush);
    let ended = SystemTime::now();
    relay.run(["remove", &id.to_string()]).expect("removed");
    wait_shaped(host, false, ended);
    relay.stop().expect("an end");
}
