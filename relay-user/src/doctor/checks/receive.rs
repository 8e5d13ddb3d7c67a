//! How packets come in: queues, their hash, and the offloads that merge or change packets before the
//! relay sees them.

use super::{Finding, interface::INTERFACE, word};
use crate::{
    datapath::AttachMode,
    doctor::facts::{InterfaceFacts, Layer, Queues},
};

/// Drivers whose other end is on the same machine, and may leave checksums to hardware that there is
/// none of.
const PARAVIRTUAL: [&str; 3] = ["veth", "virtio_net", "xen_netfront"];

pub(super) fn findings(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Vec<Finding> {
    let mut findings = vec![queues(interface, mode), rss(interface)];
    if interface.features.is_some() {
        findings.extend([
            lro(interface),
            gro_hw(interface),
            udp_gro(interface, mode),
            checksum(interface, mode),
            vlan(interface, mode),
        ]);
    }
    findings
}

fn has(interface: &InterfaceFacts, feature: &str) -> bool {
    let features = interface.features.as_ref();
    features.is_some_and(|features| features.contains(feature))
}

fn queues(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    let id = "queues";
    let name = word(&interface.name);
    let Some(Queues {
        now,
        most,
        combined,
    }) = interface.queues
    else {
        return INTERFACE.ok(id, "the driver does not tell");
    };
    if now != 1 || interface.processors < 2 {
        let processors = interface.processors;
        let what = format!("{now} receive queues of {most}, {processors} processors");
        return INTERFACE.ok(id, what);
    }
    if most > 1 {
        let wanted = most.min(interface.processors);
        let kind = if combined { "combined" } else { "rx" };
        return INTERFACE.warning(
            id,
            format!("1 receive queue of {most}: one processor does all the relaying"),
            format!("ethtool -L {name} {kind} {wanted}"),
        );
    }
    // RPS comes after native XDP, and before generic XDP and traffic control (netif_receive_skb() and
    // __netif_receive_skb_core() in net/core/dev.c).
    match (mode, interface.rps) {
        (Some(AttachMode::Native), _) => INTERFACE.warning(
            id,
            "the device has 1 receive queue: one processor does all the relaying; a virtual machine may be given more",
            None,
        ),
        (_, Some(true)) => INTERFACE.ok(id, "1 receive queue, whose packets the stack spreads (RPS)"),
        _ => INTERFACE.warning(
            id,
            "the device has 1 receive queue: one processor does all the relaying, unless the stack spreads its packets (RPS)",
            format!(
                "echo {} > /sys/class/net/{name}/queues/rx-0/rps_cpus",
                mask(interface.processors)
            ),
        ),
    }
}

/// The first processors as sysfs takes them: groups of 32 bits in hexadecimal, the highest first.
fn mask(processors: u32) -> String {
    let (whole, rest) = (processors / 32, processors % 32);
    let mut groups = Vec::new();
    if rest != 0 {
        groups.push(format!("{:x}", (1_u64 << rest) - 1));
    }
    groups.extend((0..whole).map(|_| "ffffffff".to_owned()));
    groups.join(",")
}

fn rss(interface: &InterfaceFacts) -> Finding {
    let id = "rss";
    if interface.queues.is_none_or(|queues| queues.now < 2) {
        return INTERFACE.ok(id, "one queue: nothing to spread");
    }
    let unspread: Vec<_> = [
        ("udp4", interface.hashes_udp4_ports),
        ("udp6", interface.hashes_udp6_ports),
    ]
    .into_iter()
    .filter(|(_, hashes)| *hashes == Some(false))
    .map(|(flow, _)| {
        format!(
            "ethtool -N {} rx-flow-hash {flow} sdfn",
            word(&interface.name)
        )
    })
    .collect();
    if unspread.is_empty() {
        return INTERFACE.ok(
            id,
            match (interface.hashes_udp4_ports, interface.hashes_udp6_ports) {
                (None, None) => "the driver does not tell by what it chooses the queue",
                _ => "calls are spread over the queues by their UDP ports",
            },
        );
    }
    INTERFACE.warning(
        id,
        "UDP ports have no say in the choice of the queue: all calls of one trunk or gateway go to one processor",
        unspread.join(" && "),
    )
}

fn lro(interface: &InterfaceFacts) -> Finding {
    let id = "lro";
    if has(interface, "rx-lro") {
        INTERFACE.warning(
            id,
            "on: the card merges packets, and its driver refuses native XDP",
            format!("ethtool -K {} lro off", word(&interface.name)),
        )
    } else {
        INTERFACE.ok(id, "off")
    }
}

fn gro_hw(interface: &InterfaceFacts) -> Finding {
    let id = "gro_hw";
    if has(interface, "rx-gro-hw") {
        INTERFACE.warning(
            id,
            "on: the card, or the host of this virtual machine, merges packets, and the driver may refuse native XDP",
            format!("ethtool -K {} rx-gro-hw off", word(&interface.name)),
        )
    } else {
        INTERFACE.ok(id, "off")
    }
}

fn udp_gro(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    let id = "udp_gro";
    let on: Vec<_> = ["rx-udp-gro-forwarding", "rx-gro-list"]
        .into_iter()
        .filter(|feature| has(interface, feature))
        .collect();
    if on.is_empty() || mode == Some(AttachMode::Native) {
        return INTERFACE.ok(id, "no UDP packets are merged before the relay sees them");
    }
    INTERFACE.warning(
        id,
        format!(
            "{} on: merged RTP packets go through Asterisk, as `aggregate`",
            on.join(" and ")
        ),
        format!(
            "ethtool -K {} {} off",
            word(&interface.name),
            on.join(" off ")
        ),
    )
}

fn checksum(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    let id = "checksum_offload";
    let name = word(&interface.name);
    let rx = has(interface, "rx-checksum");
    let tx = [
        "tx-checksum-ipv4",
        "tx-checksum-ipv6",
        "tx-checksum-ip-generic",
    ]
    .iter()
    .any(|feature| has(interface, feature));
    let word = |on| if on { "on" } else { "off" };
    let both = format!("receiving {}, sending {}", word(rx), word(tx));
    let driver = interface.driver.as_deref().unwrap_or_default();
    if PARAVIRTUAL.contains(&driver) {
        // In the stack, the kernel knows which checksum is unfinished.
        let in_the_driver = match mode {
            Some(mode) => mode == AttachMode::Native,
            None => driver != "veth",
        };
        if rx && in_the_driver {
            return INTERFACE.warning(
                id,
                format!("{both}: guests and containers of the same machine may leave UDP checksums unfinished, which native XDP finishes at the cost of reading the whole packet. Mended where they send"),
                "ethtool -K IFACE tx off".to_owned(),
            );
        }
        return INTERFACE.ok(id, both);
    }
    let off: Vec<_> = [("rx", rx), ("tx", tx)]
        .into_iter()
        .filter(|(_, on)| !on)
        .map(|(side, _)| format!("{side} on"))
        .collect();
    if off.is_empty() {
        return INTERFACE.ok(id, both);
    }
    INTERFACE.warning(
        id,
        format!("{both}: the processor adds up every packet to or from Asterisk"),
        format!("ethtool -K {name} {}", off.join(" ")),
    )
}

fn vlan(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Finding {
    let id = "vlan_offload";
    let name = word(&interface.name);
    let parses = has(interface, "rx-vlan-hw-parse");
    if interface.layer == Layer::Ip || interface.vlans.is_empty() {
        let state = if parses { "on" } else { "off" };
        return INTERFACE.ok(id, format!("{state}; no VLAN device needs the tags"));
    }
    let vlans = interface.vlans.join(", ");
    if parses && mode != Some(AttachMode::Tc) {
        return INTERFACE.warning(
            id,
            format!("on: XDP does not see the tags of {vlans}, whose calls go through Asterisk, as `vlan_mismatch`"),
            format!("ethtool -K {name} rxvlan off"),
        );
    }
    INTERFACE.ok(id, format!("the relay sees the tags of {vlans}"))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{interface::tests::sound, tests::judged},
        *,
    };
    use crate::doctor::Level;

    fn with(features: &[&str]) -> InterfaceFacts {
        let mut facts = sound();
        let known = facts.features.get_or_insert_default();
        known.extend(features.iter().map(|feature| (*feature).to_owned()));
        facts
    }

    fn without(features: &[&str]) -> InterfaceFacts {
        let mut facts = sound();
        let known = facts.features.get_or_insert_default();
        known.retain(|feature| !features.contains(&feature.as_str()));
        facts
    }

    #[test]
    fn one_queue_for_several_processors_is_a_warning() {
        let of = |now, most, combined| InterfaceFacts {
            queues: Some(Queues {
                now,
                most,
                combined,
            }),
            ..sound()
        };
        let found = |facts: &InterfaceFacts, mode| {
            let findings = findings(facts, mode);
            let (level, mend) = judged(&findings, "queues");
            (level, mend.map(str::to_owned))
        };
        let mend = |text: &str| Some(text.to_owned());
        assert_eq!(
            found(&of(1, 8, true), None),
            (Level::Warning, mend("ethtool -L eth0 combined 4"))
        );
        assert_eq!(
            found(&of(1, 2, false), None),
            (Level::Warning, mend("ethtool -L eth0 rx 2"))
        );
        assert_eq!(found(&of(2, 8, true), None), (Level::Ok, None));
        let spread = mend("echo f > /sys/class/net/eth0/queues/rx-0/rps_cpus");
        assert_eq!(found(&of(1, 1, false), None), (Level::Warning, spread));
        assert_eq!(
            found(&of(1, 1, false), Some(AttachMode::Native)),
            (Level::Warning, None)
        );
        let spread = InterfaceFacts {
            rps: Some(true),
            ..of(1, 1, false)
        };
        assert_eq!(found(&spread, None), (Level::Ok, None));
        let small = InterfaceFacts {
            processors: 1,
            ..of(1, 1, false)
        };
        assert_eq!(found(&small, None), (Level::Ok, None));
        assert_eq!(
            (mask(32), mask(34), mask(3)),
            ("ffffffff".into(), "3,ffffffff".into(), "7".into())
        );
    }

    #[test]
    fn a_hash_without_ports_is_a_warning() {
        let facts = InterfaceFacts {
            hashes_udp4_ports: Some(false),
            ..sound()
        };
        let mend = Some("ethtool -N eth0 rx-flow-hash udp4 sdfn");
        assert_eq!(
            judged(&findings(&facts, None), "rss"),
            (Level::Warning, mend)
        );
        let untold = InterfaceFacts {
            hashes_udp4_ports: None,
            hashes_udp6_ports: None,
            ..sound()
        };
        assert_eq!(judged(&findings(&untold, None), "rss"), (Level::Ok, None));
    }

    #[test]
    fn what_merges_packets_is_a_warning() {
        for (feature, id, mend) in [
            ("rx-lro", "lro", "ethtool -K eth0 lro off"),
            ("rx-gro-hw", "gro_hw", "ethtool -K eth0 rx-gro-hw off"),
            ("rx-gro-list", "udp_gro", "ethtool -K eth0 rx-gro-list off"),
            (
                "rx-udp-gro-forwarding",
                "udp_gro",
                "ethtool -K eth0 rx-udp-gro-forwarding off",
            ),
        ] {
            let findings = findings(&with(&[feature]), None);
            assert_eq!(judged(&findings, id), (Level::Warning, Some(mend)));
        }
        let native = findings(&with(&["rx-gro-list"]), Some(AttachMode::Native));
        assert_eq!(judged(&native, "udp_gro"), (Level::Ok, None));
    }

    #[test]
    fn checksums_are_the_cards_work_and_the_senders() {
        let id = "checksum_offload";
        let slow = without(&["rx-checksum", "tx-checksum-ip-generic"]);
        let mend = Some("ethtool -K eth0 rx on tx on");
        assert_eq!(judged(&findings(&slow, None), id), (Level::Warning, mend));
        let guest = |driver: &str, facts: InterfaceFacts| InterfaceFacts {
            driver: Some(driver.to_owned()),
            ..facts
        };
        assert_eq!(
            judged(&findings(&guest("virtio_net", sound()), None), id).0,
            Level::Warning
        );
        assert_eq!(
            judged(&findings(&guest("virtio_net", slow.clone()), None), id),
            (Level::Ok, None)
        );
        let veth = guest("veth", sound());
        assert_eq!(judged(&findings(&veth, None), id), (Level::Ok, None));
        assert_eq!(
            judged(&findings(&veth, Some(AttachMode::Native)), id).0,
            Level::Warning
        );
    }

    #[test]
    fn tags_that_xdp_does_not_see_are_a_warning() {
        let mut facts = with(&["rx-vlan-hw-parse"]);
        assert_eq!(
            judged(&findings(&facts, None), "vlan_offload"),
            (Level::Ok, None)
        );
        facts.vlans.push("eth0.100".to_owned());
        let mend = Some("ethtool -K eth0 rxvlan off");
        assert_eq!(
            judged(&findings(&facts, None), "vlan_offload"),
            (Level::Warning, mend)
        );
        let tc = findings(&facts, Some(AttachMode::Tc));
        assert_eq!(judged(&tc, "vlan_offload"), (Level::Ok, None));
    }
}
