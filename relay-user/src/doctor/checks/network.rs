//! Filtering, routing and neighbours around the interface.

use super::{About, Finding, Group, some, word};
use crate::doctor::facts::{Neighbour, NetworkFacts};

const NETWORK: About = About(Group::Network);

pub(super) fn findings(interface: &str, network: &NetworkFacts) -> Vec<Finding> {
    vec![
        addresses(interface, network),
        rp_filter(interface, network),
        forwarding(network),
        gateways(interface, network),
        neighbours(interface, network),
    ]
}

fn addresses(interface: &str, network: &NetworkFacts) -> Finding {
    let id = "addresses";
    let own: Vec<_> = network.addresses.iter().map(ToString::to_string).collect();
    if own.is_empty() {
        return NETWORK.warning(
            id,
            "none: no phone can send to this interface, unless to a VLAN device or bridge on it",
            format!("ip address add ADDRESS/PREFIX dev {}", word(interface)),
        );
    }
    let own: Vec<_> = own.iter().map(String::as_str).collect();
    NETWORK.ok(id, some(&own, 4))
}

fn rp_filter(interface: &str, network: &NetworkFacts) -> Finding {
    let id = "rp_filter";
    let Some([all, own]) = network.rp_filter else {
        return NETWORK.ok(id, "the kernel does not tell");
    };
    // The larger of both counts (Documentation/networking/ip-sysctl.rst), so that 2 on the interface
    // wins over 1 on all.
    match all.max(own) {
        0 => NETWORK.ok(id, "off"),
        1 => NETWORK.warning(
            id,
            "strict: what a phone sends by another way than the route back is dropped before Asterisk, but not before XDP, so that a call is heard only while it is relayed",
            format!(
                "sysctl -w net.ipv4.conf.{}.rp_filter=2",
                word(&interface.replace('.', "/"))
            ),
        ),
        _ => NETWORK.ok(id, "loose"),
    }
}

fn forwarding(network: &NetworkFacts) -> Finding {
    let word = |on: Option<bool>| match on {
        Some(true) => "on",
        Some(false) => "off",
        None => "not told",
    };
    NETWORK.ok(
        "forwarding",
        format!(
            "IPv4 {}, IPv6 {}: the relay sends by itself and needs none",
            word(network.forwarding_ipv4),
            word(network.forwarding_ipv6)
        ),
    )
}

fn gateways(interface: &str, network: &NetworkFacts) -> Finding {
    let id = "gateways";
    if network.gateways.is_empty() {
        return NETWORK.ok(id, "none: phones are on the same network");
    }
    let silent: Vec<_> = network
        .gateways
        .iter()
        .filter(|gateway| network.neighbours.get(gateway) == Some(&Neighbour::Failed))
        .map(ToString::to_string)
        .collect();
    let silent: Vec<_> = silent.iter().map(String::as_str).collect();
    if !silent.is_empty() {
        let what = format!(
            "{} does not answer: calls beyond it wait for its MAC address, and go through Asterisk",
            some(&silent, 4)
        );
        let mend = format!("ip neighbour flush dev {} nud failed", word(interface));
        // Another may be of the family that the phones use.
        return if silent.len() == network.gateways.len() {
            NETWORK.problem(id, what, mend)
        } else {
            NETWORK.warning(id, what, mend)
        };
    }
    let all: Vec<_> = network.gateways.iter().map(ToString::to_string).collect();
    let all: Vec<_> = all.iter().map(String::as_str).collect();
    NETWORK.ok(id, some(&all, 4))
}

fn neighbours(interface: &str, network: &NetworkFacts) -> Finding {
    let id = "neighbours";
    let count = |wanted| {
        network
            .neighbours
            .values()
            .filter(|state| **state == wanted)
            .count()
    };
    let known = count(Neighbour::Known);
    let failed: Vec<_> = network
        .neighbours
        .iter()
        .filter(|(_, state)| **state == Neighbour::Failed)
        .map(|(address, _)| address.to_string())
        .collect();
    if failed.is_empty() {
        let asked = count(Neighbour::Asked);
        return NETWORK.ok(id, format!("{known} known, {asked} being asked"));
    }
    let failed: Vec<_> = failed.iter().map(String::as_str).collect();
    NETWORK.warning(
        id,
        format!(
            "{known} known; no answer from {}: a call there waits, and goes through Asterisk",
            some(&failed, 4)
        ),
        format!("ip neighbour flush dev {} nud failed", word(interface)),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::{
        super::tests::{found, judged},
        *,
    };
    use crate::doctor::Level;

    fn sound() -> NetworkFacts {
        let gateway = [192, 0, 2, 254].into();
        NetworkFacts {
            addresses: vec![[192, 0, 2, 1].into()],
            rp_filter: Some([0, 0]),
            forwarding_ipv4: Some(false),
            forwarding_ipv6: Some(false),
            gateways: BTreeSet::from([gateway]),
            neighbours: BTreeMap::from([(gateway, Neighbour::Known)]),
        }
    }

    #[test]
    fn a_sound_network_has_no_trouble() {
        for finding in findings("eth0", &sound()) {
            assert_eq!(
                (finding.level, &finding.mend),
                (Level::Ok, &None),
                "{finding:?}"
            );
        }
    }

    #[test]
    fn the_larger_filter_counts() {
        for (setting, level) in [
            ([0, 0], Level::Ok),
            ([1, 0], Level::Warning),
            ([0, 1], Level::Warning),
            ([1, 2], Level::Ok),
            ([2, 1], Level::Ok),
        ] {
            let network = NetworkFacts {
                rp_filter: Some(setting),
                ..sound()
            };
            assert_eq!(
                judged(&findings("eth0", &network), "rp_filter").0,
                level,
                "{setting:?}"
            );
        }
        let strict = NetworkFacts {
            rp_filter: Some([1, 1]),
            ..sound()
        };
        // sysctl(8) takes a slash for the dot of a name.
        let mend = Some("sysctl -w net.ipv4.conf.eth0/100.rp_filter=2");
        assert_eq!(
            judged(&findings("eth0.100", &strict), "rp_filter"),
            (Level::Warning, mend)
        );
    }

    #[test]
    fn forwarding_is_told_and_does_not_matter() {
        let router = NetworkFacts {
            forwarding_ipv4: Some(true),
            ..sound()
        };
        let findings = findings("eth0", &router);
        let forwarding = found(&findings, "forwarding");
        assert_eq!(forwarding.level, Level::Ok);
        assert!(
            forwarding.what.starts_with("IPv4 on, IPv6 off"),
            "{}",
            forwarding.what
        );
    }

    #[test]
    fn a_silent_gateway_is_worse_than_a_silent_phone() {
        let mend = Some("ip neighbour flush dev eth0 nud failed");
        let mut network = sound();
        network
            .neighbours
            .insert([192, 0, 2, 11].into(), Neighbour::Failed);
        let found = findings("eth0", &network);
        assert_eq!(judged(&found, "neighbours"), (Level::Warning, mend));
        assert_eq!(judged(&found, "gateways"), (Level::Ok, None));
        network
            .neighbours
            .insert([192, 0, 2, 254].into(), Neighbour::Failed);
        assert_eq!(
            judged(&findings("eth0", &network), "gateways"),
            (Level::Problem, mend)
        );
        network.gateways.insert([192, 0, 2, 253].into());
        assert_eq!(
            judged(&findings("eth0", &network), "gateways"),
            (Level::Warning, mend)
        );
    }

    #[test]
    fn an_interface_without_address_is_a_warning() {
        let network = NetworkFacts {
            addresses: Vec::new(),
            ..sound()
        };
        assert_eq!(
            judged(&findings("eth0", &network), "addresses").0,
            Level::Warning
        );
    }
}
