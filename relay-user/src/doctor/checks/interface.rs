//! The interface: its link, native XDP, the daemon on it, MTU and queueing discipline.

use super::{About, Finding, Group, programs, receive, some, word};
use crate::{
    control::model::StatusReport,
    datapath::{AttachMode, shapes},
    doctor::facts::{InterfaceFacts, Layer, SelfTest},
};

pub(super) const INTERFACE: About = About(Group::Interface);

/// The reason that counts what is relayed.
const RELAYED: &str = "relayed";

/// No interface was named, and none suggests itself.
pub(super) fn unnamed() -> Finding {
    INTERFACE.warning(
        "link",
        "no interface is named, no daemon runs and there is no default route: only the host was looked at",
        "relay-user doctor IFACE".to_owned(),
    )
}

pub(super) fn findings(interface: &InterfaceFacts, daemon: Option<&StatusReport>) -> Vec<Finding> {
    let link = link(interface);
    if interface.index == 0 || interface.layer == Layer::Other {
        return vec![link];
    }
    let mode = daemon.map(|daemon| daemon.mode);
    let mut findings = vec![
        link,
        served(interface, daemon),
        native_xdp(interface, mode),
        forwards(interface, daemon),
        mtu(interface, mode),
    ];
    findings.extend(receive::findings(interface, mode));
    findings.extend(programs::findings(interface, mode));
    findings.push(qdisc(interface, mode));
    if !interface.unread.is_empty() {
        findings.push(INTERFACE.warning(
            "unread",
            format!(
                "not everything could be read: {}",
                interface.unread.join("; ")
            ),
            None,
        ));
    }
    findings
}

fn link(interface: &InterfaceFacts) -> Finding {
    let name = &interface.name;
    if interface.index == 0 {
        let known: Vec<_> = interface.known.iter().map(String::as_str).collect();
        return INTERFACE.problem(
            "link",
            format!("no interface `{name}`: this host has {}", some(&known, 12)),
            "ip link".to_owned(),
        );
    }
    if interface.layer == Layer::Other {
        return INTERFACE.problem(
            "link",
            format!("{name} is neither Ethernet nor a plain IP link such as tun or PPP: name the interface that the calls' RTP comes in on"),
            "ip link".to_owned(),
        );
    }
    if !interface.up {
        return INTERFACE.problem(
            "link",
            format!("{name} is down"),
            format!("ip link set dev {} up", word(name)),
        );
    }
    if !interface.carrier {
        return INTERFACE.problem(
            "link",
            format!("{name} has no carrier: check its cable, or its other end"),
            None,
        );
    }
    let driver = interface.driver.as_deref().unwrap_or("not told");
    INTERFACE.ok("link", format!("{name} is up, driver {driver}"))
}

fn served(interface: &InterfaceFacts, daemon: Option<&StatusReport>) -> Finding {
    let name = &interface.name;
    match daemon {
        None => INTERFACE.ok("daemon", format!("none runs on {name}")),
        Some(daemon) if daemon.lease_ms == 0 => INTERFACE.problem(
            "daemon",
            format!(
                "process {} has lost its lease: nothing is relayed",
                daemon.pid
            ),
            format!("systemctl restart relay-user@{}", word(name)),
        ),
        Some(daemon) => INTERFACE.ok(
            "daemon",
            format!(
                "process {} in {} mode: {}",
                daemon.pid,
                daemon.mode.name(),
                daemon.mode_reason
            ),
        ),
    }
}

/// Drivers with a limit of their own, and the largest MTU with which they take an XDP program:
/// `i40e_max_xdp_frame_size()`, `ice_max_xdp_frame_size()`, less Ethernet's header, checksum and two tags.
const DRIVER_MTU: [(&str, u32); 2] = [("i40e", 3046), ("ice", 3046)];

/// Largest MTU with which a driver takes an XDP program that knows nothing of fragments: a frame, its
/// headroom (XDP_PACKET_HEADROOM) and `struct skb_shared_info` share a page.
pub(in crate::doctor) fn xdp_mtu(driver: Option<&str>, page: u32) -> u32 {
    const HEADROOM: u32 = 256;
    const SHARED_INFO: u32 = 320;
    const ETHERNET_WITH_TWO_TAGS: u32 = 22;
    let page = page.saturating_sub(HEADROOM + SHARED_INFO + ETHERNET_WITH_TWO_TAGS);
    let limit = DRIVER_MTU.iter().find(|(name, _)| Some(*name) == driver);
    limit.map_or(page, |(_, limit)| page.min(*limit))
}

/// veth_xdp_flush() in drivers/net/veth.c delivers what XDP_TX sends only to a peer with an XDP program.
fn is_veth(interface: &InterfaceFacts) -> bool {
    interface.kind.as_deref() == Some("veth")
}

/// Whether native XDP is in use, or would be by `attach` without a mode.
fn is_native(interface: &InterfaceFacts, mode: Option<AttachMode>) -> bool {
    match mode {
        Some(mode) => mode == AttachMode::Native,
        None => {
            interface.layer == Layer::Ethernet
                && interface.native_xdp != Some(false)
                && !is_veth(interface)
                && !interface.qdisc.as_deref().is_some_and(shapes)
        }
    }
}

fn native_xdp(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    let driver = interface.driver.as_deref().unwrap_or("this driver");
    let id = "native_xdp";
    match (mode, interface.native_xdp) {
        (Some(AttachMode::Native), _) => INTERFACE.ok(id, format!("{driver} runs the relay in native XDP")),
        (_, _) if interface.layer == Layer::Ip => INTERFACE.ok(
            id,
            "the link has no Ethernet header, which XDP needs: the relay takes TC mode",
        ),
        (_, Some(true)) if is_veth(interface) => INTERFACE.ok(
            id,
            "veth has it, and delivers what it sends only to a peer with an XDP program: the relay takes generic XDP",
        ),
        (_, Some(true)) => INTERFACE.ok(id, format!("{driver} has it")),
        (_, Some(false)) => INTERFACE.warning(
            id,
            format!("{driver} has none: the relay takes generic XDP, which costs more per packet"),
            None,
        ),
        (_, None) => INTERFACE.ok(id, "Linux tells only since 6.3: `attach` tries"),
    }
}

fn forwards(interface: &InterfaceFacts, daemon: Option<&StatusReport>) -> Finding {
    let id = "native_xdp_forwards";
    let name = word(&interface.name);
    let mode = daemon.map(|daemon| daemon.mode);
    match (&interface.self_test, daemon) {
        (Some(SelfTest::Forwards { neighbour }), _) => INTERFACE.ok(
            id,
            format!("tried: {neighbour} answered what native XDP sent"),
        ),
        (Some(SelfTest::Loses { neighbour }), _) if is_veth(interface) => INTERFACE.warning(
            id,
            format!("tried: what native XDP sends never reaches {neighbour}, because the veth's peer has no XDP program; the relay takes generic XDP"),
            None,
        ),
        (Some(SelfTest::Loses { neighbour }), _) => INTERFACE.problem(
            id,
            format!("tried: the driver takes the program, but what it sends never reaches {neighbour}"),
            format!("relay-user attach {name} --mode generic"),
        ),
        (Some(SelfTest::Refused { cause }), _) => INTERFACE.warning(
            id,
            format!("tried: the driver refuses native XDP ({cause}); the relay takes generic XDP"),
            None,
        ),
        (Some(SelfTest::Skipped { cause }), _) => {
            INTERFACE.warning(id, format!("not tried: {cause}"), None)
        }
        (None, Some(daemon)) if mode == Some(AttachMode::Native) => counted(interface, daemon),
        (None, _) if !is_native(interface, mode) => {
            INTERFACE.ok(id, "does not matter: the relay does not take native XDP here")
        }
        (None, _) => INTERFACE.warning(
            id,
            "not tried: some drivers take an XDP program and lose what it sends. The test attaches one for some seconds, for which some drivers reset the link",
            format!("relay-user doctor {name} --self-test"),
        ),
    }
}

/// What a daemon's and the driver's counters tell of native XDP.
fn counted(interface: &InterfaceFacts, daemon: &StatusReport) -> Finding {
    let id = "native_xdp_forwards";
    let relayed: u64 = daemon
        .reasons
        .iter()
        .filter(|row| row.reason == RELAYED)
        .map(|row| row.packets)
        .sum();
    let is_loss = |name: &str| {
        ["err", "drop", "full", "fail"]
            .iter()
            .any(|word| name.contains(word))
    };
    let lost: Vec<_> = interface
        .xdp_statistics
        .iter()
        .filter(|(name, _)| name.contains("tx") && is_loss(name))
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    match (relayed, lost.as_slice()) {
        (0, _) => INTERFACE.ok(
            id,
            "nothing was relayed yet, so there is nothing to judge by",
        ),
        (_, []) => INTERFACE.ok(
            id,
            format!("{relayed} packets relayed, and the driver counts no loss"),
        ),
        (_, lost) => INTERFACE.problem(
            id,
            format!("the driver loses what the relay sends: {}", lost.join(", ")),
            format!(
                "relay-user detach {name} && relay-user attach {name} --mode generic",
                name = word(&interface.name)
            ),
        ),
    }
}

fn mtu(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    // It is the other end's that counts for veth (veth_xdp_set() in drivers/net/veth.c).
    let limit = interface.xdp_mtu;
    let largest = interface.mtu.max(interface.peer_mtu.unwrap_or_default());
    if mode == Some(AttachMode::Tc) || interface.layer == Layer::Ip || largest <= limit {
        let what = format!("{largest} bytes; native XDP takes up to {limit}");
        return INTERFACE.ok("mtu", what);
    }
    INTERFACE.warning(
        "mtu",
        format!("{largest} bytes, but native XDP takes up to {limit}: drivers refuse it, and the relay takes generic XDP"),
        format!("ip link set dev {} mtu 1500", word(&interface.name)),
    )
}

fn qdisc(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    let id = "qdisc";
    let Some(kind) = interface.qdisc.as_deref() else {
        return INTERFACE.ok(id, "none");
    };
    match mode {
        _ if !shapes(kind) => {
            INTERFACE.ok(id, format!("{kind}, which packets go around at no loss"))
        }
        Some(AttachMode::Native | AttachMode::Generic) => INTERFACE.warning(
            id,
            format!("{kind}: what is relayed by XDP goes around its classes and rates"),
            format!(
                "relay-user detach {name} && relay-user attach {name} --mode tc",
                name = word(&interface.name)
            ),
        ),
        Some(AttachMode::Tc) => INTERFACE.ok(id, format!("{kind}, which relayed packets pass")),
        None => INTERFACE.ok(id, format!("{kind}, for which the relay takes TC mode")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::{
        super::tests::{found, judged},
        *,
    };
    use crate::doctor::{Level, facts::Queues};

    /// A card with everything in order.
    pub(in super::super) fn sound() -> InterfaceFacts {
        InterfaceFacts {
            name: "eth0".to_owned(),
            index: 2,
            driver: Some("ixgbe".to_owned()),
            up: true,
            carrier: true,
            mtu: 1500,
            xdp_mtu: xdp_mtu(Some("ixgbe"), 4096),
            native_xdp: Some(true),
            self_test: Some(SelfTest::Forwards {
                neighbour: [192, 0, 2, 254].into(),
            }),
            queues: Some(Queues {
                now: 4,
                most: 8,
                combined: true,
            }),
            processors: 4,
            hashes_udp4_ports: Some(true),
            hashes_udp6_ports: Some(true),
            features: Some(BTreeSet::from(
                ["rx-checksum", "tx-checksum-ip-generic", "rx-gro"].map(str::to_owned),
            )),
            qdisc: Some("mq".to_owned()),
            ..InterfaceFacts::default()
        }
    }

    /// The status of docs/api.md, of a daemon in this mode.
    pub(in super::super) fn daemon(mode: AttachMode) -> StatusReport {
        let text = include_str!("../../../../docs/api.md");
        let section = text.split("\n## The status").nth(1).expect("section");
        let example = section.split("```json\n").nth(1).expect("example");
        let example = example.split("```").next().expect("its end");
        let mut report: StatusReport = serde_json::from_str(example).expect("a status");
        report.mode = mode;
        report
    }

    #[test]
    fn a_sound_interface_has_no_trouble() {
        for daemon in [
            None,
            Some(daemon(AttachMode::Native)),
            Some(daemon(AttachMode::Tc)),
        ] {
            for finding in findings(&sound(), daemon.as_ref()) {
                assert_eq!(
                    (finding.level, &finding.mend),
                    (Level::Ok, &None),
                    "{finding:?}"
                );
            }
        }
    }

    #[test]
    fn a_link_that_is_not_there_is_all_there_is_to_tell() {
        let gone = InterfaceFacts {
            name: "eth7".to_owned(),
            known: vec!["lo".to_owned(), "eth0".to_owned()],
            ..InterfaceFacts::default()
        };
        let findings = findings(&gone, None);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].level, Level::Problem);
        assert!(findings[0].what.contains("this host has lo, eth0"));
    }

    #[test]
    fn a_link_without_light_is_a_problem() {
        for (up, carrier, mend) in [
            (false, false, Some("ip link set dev eth0 up")),
            (true, false, None),
        ] {
            let facts = InterfaceFacts {
                up,
                carrier,
                ..sound()
            };
            assert_eq!(
                judged(&findings(&facts, None), "link"),
                (Level::Problem, mend)
            );
        }
        let tunnel = InterfaceFacts {
            layer: Layer::Other,
            ..sound()
        };
        let findings = findings(&tunnel, None);
        assert_eq!((findings.len(), findings[0].level), (1, Level::Problem));
    }

    #[test]
    fn what_was_not_tried_is_told_with_the_command_that_tries() {
        let untried = InterfaceFacts {
            self_test: None,
            ..sound()
        };
        let tries = Some("relay-user doctor eth0 --self-test");
        let id = "native_xdp_forwards";
        assert_eq!(
            judged(&findings(&untried, None), id),
            (Level::Warning, tries)
        );
        // Where it would not be taken, it does not matter.
        for other in [
            InterfaceFacts {
                native_xdp: Some(false),
                ..untried.clone()
            },
            InterfaceFacts {
                kind: Some("veth".to_owned()),
                ..untried.clone()
            },
            InterfaceFacts {
                qdisc: Some("htb".to_owned()),
                ..untried.clone()
            },
            InterfaceFacts {
                layer: Layer::Ip,
                ..untried
            },
        ] {
            assert_eq!(judged(&findings(&other, None), id), (Level::Ok, None));
        }
    }

    #[test]
    fn the_self_test_decides() {
        let neighbour = [192, 0, 2, 254].into();
        let id = "native_xdp_forwards";
        let of = |test| InterfaceFacts {
            self_test: Some(test),
            ..sound()
        };
        let loses = of(SelfTest::Loses { neighbour });
        let (level, mend) = (
            Level::Problem,
            Some("relay-user attach eth0 --mode generic"),
        );
        assert_eq!(judged(&findings(&loses, None), id), (level, mend));
        let veth = InterfaceFacts {
            kind: Some("veth".to_owned()),
            ..loses
        };
        assert_eq!(judged(&findings(&veth, None), id).0, Level::Warning);
        let refused = of(SelfTest::Refused {
            cause: "EOPNOTSUPP".to_owned(),
        });
        assert_eq!(judged(&findings(&refused, None), id).0, Level::Warning);
    }

    #[test]
    fn a_native_daemon_is_judged_by_what_its_driver_lost() {
        let id = "native_xdp_forwards";
        let lossy = InterfaceFacts {
            self_test: None,
            xdp_statistics: BTreeMap::from([("rx_queue_0_xdp_tx_errors".to_owned(), 7)]),
            ..sound()
        };
        let found = |daemon: &StatusReport| findings(&lossy, Some(daemon));
        let mend = "relay-user detach eth0 && relay-user attach eth0 --mode generic";
        assert_eq!(
            judged(&found(&daemon(AttachMode::Native)), id),
            (Level::Problem, Some(mend))
        );
        let mut idle = daemon(AttachMode::Native);
        idle.reasons.clear();
        assert_eq!(judged(&found(&idle), id), (Level::Ok, None));
        assert_eq!(
            judged(&found(&daemon(AttachMode::Generic)), id),
            (Level::Ok, None)
        );
    }

    #[test]
    fn a_lost_lease_is_a_problem() {
        let mut frozen = daemon(AttachMode::Generic);
        frozen.lease_ms = 0;
        let mend = Some("systemctl restart relay-user@eth0");
        assert_eq!(
            judged(&findings(&sound(), Some(&frozen)), "daemon"),
            (Level::Problem, mend)
        );
    }

    #[test]
    fn xdp_takes_frames_that_fit_a_page() {
        assert_eq!(xdp_mtu(None, 4096), 3498);
        assert_eq!(xdp_mtu(Some("i40e"), 4096), 3046);
        let jumbo = InterfaceFacts {
            mtu: 9000,
            ..sound()
        };
        let mend = Some("ip link set dev eth0 mtu 1500");
        assert_eq!(
            judged(&findings(&jumbo, None), "mtu"),
            (Level::Warning, mend)
        );
        let peer = InterfaceFacts {
            peer_mtu: Some(9000),
            ..sound()
        };
        assert_eq!(judged(&findings(&peer, None), "mtu").0, Level::Warning);
        let tc = daemon(AttachMode::Tc);
        assert_eq!(
            judged(&findings(&jumbo, Some(&tc)), "mtu"),
            (Level::Ok, None)
        );
    }

    #[test]
    fn xdp_beside_a_shaper_is_a_warning() {
        let shaped = InterfaceFacts {
            qdisc: Some("htb".to_owned()),
            ..sound()
        };
        let by = |mode| findings(&shaped, Some(&daemon(mode)));
        assert_eq!(judged(&by(AttachMode::Native), "qdisc").0, Level::Warning);
        assert_eq!(judged(&by(AttachMode::Tc), "qdisc").0, Level::Ok);
        assert!(
            found(&findings(&shaped, None), "qdisc")
                .what
                .contains("TC mode")
        );
    }
}
