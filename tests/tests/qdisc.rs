//! The queueing discipline of the interface: when it makes `--mode auto` choose traffic control, and which of its
//! classes relayed packets reach.

use std::time::Duration;

use relay_tests::{
    namespace::Host,
    pair::{Legs, Sockets},
    phone::Bank,
    relay::Relay,
    topology::Direct,
};

const PATIENCE: Duration = Duration::from_secs(30);
/// Expedited Forwarding, with ECN bits 0.
const EF_TOS: u8 = 46 << 2;

/// HTB with three classes, the last of which takes what nobody gave another.
fn htb(host: &Host) {
    let mut lines = "qdisc add dev eth0 root handle 1: htb default 30\n".to_owned();
    for class in ["10", "20", "30"] {
        lines += &format!("class add dev eth0 parent 1: classid 1:{class} htb rate 100mbit\n");
    }
    host.tc(&lines).expect("tc");
}

/// Packets that a class of HTB has sent.
fn sent_by(host: &Host, class: &str) -> u64 {
    let said = host.tc("-s class show dev eth0").expect("tc");
    let found = said.split_once(&format!("class htb {class} "));
    let (_, found) = found.expect("a class");
    let (_, sent) = found.split_once(" Sent ").expect("numbers");
    let packets = sent.split(' ').nth(2).expect("a number");
    packets.parse().expect("a number")
}

#[test]
fn relayed_packets_reach_their_class() {
    const PACKETS: [u64; 2] = [100, 60];
    let net = Direct::new(2).expect("network");
    htb(&net.pbx);
    let relay = Relay::attach(&net.pbx, "eth0", ["--priority", "1:10"]).expect("attached");
    let status = relay.json(["status"]).expect("status");
    assert_eq!(status["mode"], "tc");
    assert_eq!(status["priority"], "1:10");
    let (phones, pbx) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("sockets"),
    );
    let sockets = Legs::direct().map(|legs| Sockets::open(legs, &phones, &pbx).expect("sockets"));
    let [first, second] = &sockets;
    first.offload(&relay).expect("offloaded");
    let own = ["--priority".to_owned(), "1:20".to_owned()];
    let arguments = second.legs.arguments().into_iter().chain(own);
    relay.offload(arguments).expect("offloaded");
    let list = relay.json(["list"]).expect("list");
    let priorities = [0, 1].map(|pair| list["pairs"][pair]["priority"].clone());
    assert_eq!(priorities, ["1:10", "1:20"], "{list:#}");

    for (sockets, packets) in sockets.iter().zip(PACKETS) {
        for leg in [0, 1] {
            sockets.talk(leg, 0, Some(packets));
            sockets.relayed(leg, packets as usize).expect("relayed");
            let fate = sockets.fate(leg).expect("no loss");
            assert_eq!(fate, [(true, packets as usize)]);
            let arrivals = sockets.phones[1 - leg].arrivals();
            assert!(arrivals.iter().all(|arrival| arrival.tos == EF_TOS));
        }
    }
    let sent = ["1:10", "1:20"].map(|class| sent_by(&net.pbx, class));
    assert_eq!(sent, PACKETS.map(|packets| 2 * packets));
}

#[test]
fn relayed_packets_without_a_priority_are_sorted_like_any() {
    const PACKETS: u64 = 100;
    let net = Direct::new(2).expect("network");
    htb(&net.pbx);
    let relay = Relay::attach(&net.pbx, "eth0", [""; 0]).expect("attached");
    let (phones, pbx) = (
        Bank::new(&net.phones).expect("phones"),
        Bank::new(&net.pbx).expect("sockets"),
    );
    let [legs, _] = Legs::direct();
    let sockets = Sockets::open(legs, &phones, &pbx).expect("sockets");
    sockets.offload(&relay).expect("offloaded");
    let before = sent_by(&net.pbx, "1:30");
    sockets.talk(0, 0, Some(PACKETS));
    let phone = &sockets.phones[1];
    phone
        .wait_received(PACKETS as usize, PATIENCE)
        .expect("relayed");
    // The machine itself sends a packet now and then.
    assert!(sent_by(&net.pbx, "1:30") >= before + PACKETS);
    assert_eq!(sent_by(&net.pbx, "1:10"), 0);
}

/// The mode that the daemon takes with these arguments, why, and what it logs.
fn mode(host: &Host, arguments: &[&str]) -> (String, String, String) {
    let relay = Relay::attach(host, "eth0", arguments).expect("attached");
    let status = relay.json(["status"]).expect("status");
    let word = |key: &str| status[key].as_str().expect(key).to_owned();
    let log = relay.log();
    relay.stop().expect("a clean end");
    (word("mode"), word("mode_reason"), log)
}

#[test]
fn auto_takes_traffic_control_where_packets_must_not_go_around_the_queues() {
    const BYPASS: &str = "go around the queueing discipline";
    let net = Direct::new(1).expect("network");
    let host = &net.pbx;
    let (chosen, reason, _) = mode(host, &[]);
    assert_eq!(chosen, "generic", "{reason}");
    let (chosen, reason, _) = mode(host, &["--priority", "6"]);
    assert_eq!(chosen, "tc");
    assert!(reason.contains("priority 6"), "{reason}");
    for (kind, qdisc, shapes) in [
        ("pfifo", "pfifo limit 100", false),
        ("htb", "htb default 1", true),
        ("tbf", "tbf rate 1mbit burst 10kb latency 50ms", true),
    ] {
        host.tc(&format!("qdisc replace dev eth0 root {qdisc}"))
            .expect("tc");
        let (chosen, reason, _) = mode(host, &[]);
        assert_eq!(chosen == "tc", shapes, "{kind}: {chosen}, {reason}");
        assert_eq!(reason.contains(kind), shapes, "{reason}");
        let (chosen, _, log) = mode(host, &["--mode", "generic"]);
        assert_eq!(chosen, "generic");
        assert_eq!(log.contains(BYPASS), shapes, "{kind}: {log}");
        let (chosen, reason, log) = mode(host, &["--mode", "tc"]);
        assert_eq!((chosen.as_str(), reason.as_str()), ("tc", "asked for"));
        assert!(!log.contains(BYPASS), "{log}");
    }
}

#[test]
fn a_pair_with_a_priority_is_refused_where_nothing_sorts_by_it() {
    let net = Direct::new(2).expect("network");
    let relay = Relay::attach(&net.pbx, "eth0", ["--mode", "generic"]).expect("attached");
    let [legs, _] = Legs::direct();
    let own = ["--priority".to_owned(), "1:20".to_owned()];
    let arguments = legs.arguments().into_iter().chain(own);
    let refused = relay.add(arguments).expect_err("refused").to_string();
    assert!(
        refused.contains("priority 1:20") && refused.contains("--mode tc"),
        "{refused}"
    );
    let list = relay.json(["list"]).expect("list");
    assert_eq!(list["pairs"].as_array().map(Vec::len), Some(0), "{list:#}");
}
