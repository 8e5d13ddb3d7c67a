//! `relay-user doctor`: what it finds on real interfaces, that its remedies mend it, and that it changes nothing.

use std::{
    process::{Command, Output},
    sync::Mutex,
    time::{Duration, Instant},
};

use relay_tests::{
    asterisk::{self, CALLER, Lab},
    namespace::Host,
    pbx::{self, Pbx},
    relay::{Relay, ami_arguments, binary},
    topology::{Direct, PBX_V4},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

fn run(host: &Host, args: &[&str]) -> Output {
    let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN").expect("relay-user"));
    command.arg("doctor").args(args);
    host.run_to_end(command).expect("doctor")
}

/// What it finds, whatever that is.
fn doctor(host: &Host, args: &[&str]) -> Value {
    let output = run(host, &[args, &["--json"]].concat());
    let told = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&told).unwrap_or_else(|error| {
        panic!("{error}: {told}{}", String::from_utf8_lossy(&output.stderr))
    });
    let expected = i32::from(report["level"] == "problem");
    assert_eq!(output.status.code(), Some(expected), "{report:#}");
    report
}

fn finding<'a>(report: &'a Value, id: &str) -> &'a Value {
    let findings = report["findings"].as_array().expect("findings");
    findings
        .iter()
        .find(|finding| finding["id"] == id)
        .unwrap_or_else(|| panic!("no {id} in {report:#}"))
}

fn level<'a>(report: &'a Value, id: &str) -> &'a str {
    finding(report, id)["level"].as_str().expect("a level")
}

fn shell(host: &Host, line: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    host.output(command).expect(line);
}

#[test]
fn the_commands_that_it_names_mend_what_it_finds() {
    let net = Direct::new(2).expect("network");
    let host = &net.pbx;
    for (id, spoil, expected) in [
        ("link", "ip link set eth0 down", "problem"),
        ("mtu", "ip link set eth0 mtu 9000", "warning"),
        ("queues", "ethtool -L eth0 rx 1 tx 1", "warning"),
        ("udp_gro", "ethtool -K eth0 rx-gro-list on", "warning"),
        (
            "udp_gro",
            "ethtool -K eth0 rx-udp-gro-forwarding on",
            "warning",
        ),
        (
            "rp_filter",
            "echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter",
            "warning",
        ),
        (
            "rp_filter",
            "cd /proc/sys/net/ipv4/conf && echo 0 > eth0/rp_filter && echo 1 > all/rp_filter",
            "warning",
        ),
        (
            "neighbours",
            "ip neigh add 192.0.2.99 dev eth0 nud failed",
            "warning",
        ),
        (
            "gateways",
            "ip route add default via 192.0.2.99 && ip neigh add 192.0.2.99 dev eth0 nud failed",
            "problem",
        ),
        (
            "other_tc_programs",
            "tc qdisc add dev eth0 clsact && tc filter add dev eth0 ingress bpf bytecode '1,6 0 0 0'",
            "warning",
        ),
        ("bpffs", "umount /sys/fs/bpf", "warning"),
    ] {
        shell(host, spoil);
        let report = doctor(host, &["eth0"]);
        assert_eq!(level(&report, id), expected, "{spoil}: {report:#}");
        let mend = finding(&report, id)["mend"].as_str().expect("a remedy");
        shell(host, mend);
        let deadline = Instant::now() + PATIENCE;
        // A link takes a moment to come back.
        while level(&doctor(host, &["eth0"]), id) != "ok" {
            assert!(Instant::now() < deadline, "{mend} does not mend {spoil}");
        }
    }
}

#[test]
fn another_xdp_program_is_a_problem_that_its_remedy_ends() {
    let net = Direct::new(2).expect("network");
    let other = net.pbx_interface.pass_program().expect("a program");
    let report = doctor(&net.pbx, &["eth0"]);
    assert_eq!(
        level(&report, "other_xdp_programs"),
        "problem",
        "{report:#}"
    );
    let mend = finding(&report, "other_xdp_programs")["mend"].as_str();
    shell(&net.pbx, mend.expect("a remedy"));
    assert_eq!(
        level(&doctor(&net.pbx, &["eth0"]), "other_xdp_programs"),
        "ok"
    );
    drop(other);
}

#[test]
fn what_the_kernel_says_is_told() {
    let net = Direct::new(2).expect("network");
    let host = &net.pbx;
    shell(host, "ethtool -K eth0 rx on tx off rxvlan off");
    for (setting, word) in [("0", "IPv4 off"), ("1", "IPv4 on")] {
        host.sysctl("net/ipv4/conf/eth0/forwarding", setting)
            .expect("sysctl");
        let report = doctor(host, &["eth0"]);
        let what = finding(&report, "forwarding")["what"]
            .as_str()
            .expect("words");
        assert!(what.starts_with(word), "{what}");
    }
    let report = doctor(host, &["eth0"]);
    let facts = &report["facts"]["interface"];
    assert_eq!(
        (&facts["driver"], &facts["kind"]),
        (&"veth".into(), &"veth".into())
    );
    assert_eq!(facts["native_xdp"], true);
    let features = facts["features"].as_array().expect("features");
    assert!(features.contains(&"rx-checksum".into()));
    assert!(!features.contains(&"tx-checksum-ip-generic".into()));
    assert!(!features.contains(&"rx-vlan-hw-parse".into()));
    assert_eq!(
        finding(&report, "checksum_offload")["what"],
        "receiving on, sending off"
    );
    assert_eq!(
        report["facts"]["host"]["refused"],
        Value::Null,
        "{report:#}"
    );
}

#[test]
fn the_self_test_tells_a_driver_that_sends_from_one_that_loses() {
    let net = Direct::new(2).expect("network");
    // The phones' machine is the witness.
    net.pbx
        .ip(&format!("route add default via {}", Direct::phone_v4(0)))
        .expect("a route");
    let tried = |host: &Host| {
        let report = doctor(host, &["eth0", "--self-test"]);
        let left = &report["facts"]["interface"]["programs"];
        assert_eq!(left.as_array().map(Vec::len), Some(0), "{left}");
        report["facts"]["interface"]["self_test"].clone()
    };
    // veth delivers what native XDP sends only to a peer with a program.
    assert_eq!(tried(&net.pbx)["outcome"], "loses");
    let pass = net.phones_interface.pass_program().expect("a program");
    let forwards = tried(&net.pbx);
    assert_eq!(forwards["outcome"], "forwards", "{forwards}");
    assert_eq!(forwards["neighbour"], Direct::phone_v4(0).to_string());
    let report = doctor(&net.pbx, &["eth0"]);
    assert_eq!(
        report["facts"]["interface"]["programs"],
        Value::Array(vec![])
    );
    drop(pass);

    let _other = net.pbx_interface.pass_program().expect("a program");
    let report = doctor(&net.pbx, &["eth0", "--self-test"]);
    let outcome = &report["facts"]["interface"]["self_test"]["outcome"];
    assert_eq!(outcome, "skipped", "{report:#}");
}

#[test]
fn a_daemon_is_asked_and_not_disturbed() {
    let net = Direct::new(4).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let feed = ami_arguments(pbx.ami(), pbx::USER, pbx.secret_file());
    let relay = Relay::attach(&net.pbx, "eth0", feed).expect("attached");
    let phone = |phone: u8| (Direct::phone_v4(phone), 30_000).into();
    pbx.call(phone(0), phone(1)).expect("a call");
    let held = pbx.call(phone(2), phone(3)).expect("a call");
    pbx.hold(held).expect("hold");
    let deadline = Instant::now() + PATIENCE;
    while relay.json(["status"]).expect("status")["refused"] != 1 {
        assert!(Instant::now() < deadline, "the held call is not refused");
    }
    let socket = relay.socket().display().to_string();
    let report = doctor(&net.pbx, &["eth0", "--socket", &socket, "--self-test"]);
    assert_eq!(level(&report, "daemon"), "ok", "{report:#}");
    assert_eq!(level(&report, "ami_feed"), "ok");
    assert_eq!(level(&report, "other_xdp_programs"), "ok");
    assert_eq!(level(&report, "other_tc_programs"), "ok");
    let calls = &report["facts"]["calls"];
    assert_eq!(
        (&calls["told_by"], &calls["total"]),
        (&"daemon".into(), &2.into())
    );
    assert_eq!(calls["kept"]["a leg is on hold"], 1, "{calls}");
    let what = finding(&report, "offloadable")["what"]
        .as_str()
        .expect("words");
    assert!(
        what.contains("50 % cannot be: 1 × a leg is on hold"),
        "{what}"
    );
    let outcome = &report["facts"]["interface"]["self_test"]["outcome"];
    assert_eq!(outcome, "skipped");
    // Without a name, it is the daemon's interface that is examined.
    let named = doctor(&net.pbx, &["--socket", &socket]);
    assert_eq!(named["interface"], "eth0");
    assert_eq!(relay.json(["status"]).expect("status")["pairs"], 2);

    pbx.disconnect_ami().expect("no AMI");
    drop(pbx);
    let deadline = Instant::now() + PATIENCE;
    while level(&doctor(&net.pbx, &["--socket", &socket]), "ami_feed") != "problem" {
        assert!(Instant::now() < deadline, "the feed is not missed");
    }
}

#[test]
fn without_a_daemon_it_logs_in_by_itself() {
    let net = Direct::new(4).expect("network");
    let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
    let phone = |phone: u8| (Direct::phone_v4(phone), 30_000).into();
    let call = pbx.call(phone(0), phone(1)).expect("a call");
    let held = pbx.call(phone(2), phone(3)).expect("a call");
    pbx.hold(held).expect("hold");
    pbx.native(call).expect("native");
    let feed = ami_arguments(pbx.ami(), pbx::USER, pbx.secret_file());
    let args: Vec<_> = feed.iter().map(String::as_str).collect();
    let with = |at: usize, other: &str| {
        let mut args = [&["eth0"], &args[..]].concat();
        args[at] = other;
        doctor(&net.pbx, &args)
    };
    let report = with(0, "eth0");
    for id in [
        "ami_reachable",
        "ami_login",
        "ami_write",
        "ami_read",
        "ami_excess",
    ] {
        assert_eq!(level(&report, id), "ok", "{report:#}");
    }
    let calls = &report["facts"]["calls"];
    assert_eq!(
        (&calls["told_by"], &calls["total"], &calls["relayed"]),
        (&"ami".into(), &2.into(), &1.into()),
        "{calls}"
    );

    let wrong = net
        .pbx
        .private_file("wrong", "not the secret")
        .expect("a file");
    let wrong = wrong.display().to_string();
    let report = with(6, &wrong);
    assert_eq!(level(&report, "ami_login"), "problem", "{report:#}");
    assert!(!report.to_string().contains("not the secret"));
    let report = with(2, "192.0.2.1:1");
    assert_eq!(level(&report, "ami_reachable"), "problem");
    let report = with(6, "/nowhere");
    assert_eq!(level(&report, "ami_settings"), "problem");
}

/// One lab at a time.
static LAB: Mutex<()> = Mutex::new(());

#[test]
fn asterisk_itself_tells_privileges_endpoints_and_calls() {
    let _alone = LAB.lock();
    let lab = Lab::up().expect("lab");
    let as_user = |user: &str| {
        let feed = ami_arguments(lab.ami(), user, lab.secret_file());
        let args: Vec<_> = feed.iter().map(String::as_str).collect();
        doctor(&lab.net.pbx, &[&["eth0"], &args[..]].concat())
    };
    lab.call(1, 120, "2000", CALLER).expect("a call");
    lab.call(1, 120, "2300", CALLER).expect("a transcoded call");
    lab.wait_calls(2, PATIENCE).expect("two calls");

    let report = as_user(asterisk::USER);
    for id in [
        "ami_login",
        "ami_write",
        "ami_read",
        "ami_excess",
        "rtp_timeout",
    ] {
        assert_eq!(level(&report, id), "ok", "{report:#}");
    }
    let endpoints = report["facts"]["asterisk"]["endpoints"]
        .as_array()
        .expect("endpoints");
    let named = |name: &str| endpoints.iter().find(|endpoint| endpoint["name"] == name);
    let callee = named("callee").unwrap_or_else(|| panic!("no callee: {report:#}"));
    assert_eq!(callee["direct_media"], false, "{callee}");
    assert_eq!(callee["rtp_timeout"], 0, "{callee}");
    let calls = &report["facts"]["calls"];
    assert_eq!(
        (&calls["total"], &calls["relayed"]),
        (&2.into(), &1.into()),
        "{calls}"
    );
    let what = finding(&report, "offloadable")["what"]
        .as_str()
        .expect("words");
    assert!(what.contains("50 % cannot be: 1 × transcoding"), "{what}");

    let report = as_user(asterisk::FULL_USER);
    assert_eq!(level(&report, "ami_excess"), "warning", "{report:#}");
    assert_eq!(level(&report, "direct_media"), "warning");
    let what = finding(&report, "direct_media")["what"]
        .as_str()
        .expect("words");
    assert!(
        what.contains("callee-dm") && !what.contains("callee-to"),
        "{what}"
    );

    assert_eq!(level(&as_user("watcher"), "ami_write"), "problem");
    assert_eq!(level(&as_user("asker"), "ami_read"), "problem");
}

#[test]
fn exit_codes_and_text_are_as_told() {
    let host = Host::new("bare").expect("a machine");
    let output = run(&host, &["eth0"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("no interface `eth0`: this host has lo"),
        "{text}"
    );
    assert!(text.contains("1 problem"), "{text}");
    // Nothing suggests an interface here, which is no problem.
    let output = run(&host, &[]);
    assert_eq!(output.status.code(), Some(0));
    for wrong in [
        &["eth0", "eth1"][..],
        &["a/b"],
        &["--self"],
        &["eth0", "--ami", "pbx"],
    ] {
        assert_eq!(run(&host, wrong).status.code(), Some(2), "{wrong:?}");
    }
}
