//! Programs and filters of others on the interface.

use super::{Finding, interface::INTERFACE, some, word};
use crate::{
    datapath::AttachMode,
    doctor::facts::{InterfaceFacts, Place, Program},
};

const OTHER_XDP: &str = "other_xdp_programs";

pub(super) fn findings(interface: &InterfaceFacts, mode: Option<AttachMode>) -> Vec<Finding> {
    let (tc, xdp): (Vec<_>, Vec<_>) = interface
        .programs
        .iter()
        .filter(|program| !program.ours)
        .partition(|program| matches!(program.place, Place::TcIngress | Place::TcEgress));
    // Names are root's to read, and by its name the relay's own is told.
    let untold = !interface.unread.is_empty() && xdp.iter().any(|other| other.name.is_empty());
    vec![
        if untold {
            INTERFACE.warning(
                OTHER_XDP,
                format!("{}: without root nobody tells whose it is", named(&xdp)),
                format!("sudo relay-user doctor {}", word(&interface.name)),
            )
        } else {
            others_in_xdp(&interface.name, &xdp, mode)
        },
        others_in_tc(&interface.name, &tc),
    ]
}

fn others_in_xdp(interface: &str, others: &[&Program], mode: Option<AttachMode>) -> Finding {
    let id = OTHER_XDP;
    if others.is_empty() {
        return INTERFACE.ok(id, "none");
    }
    let (names, mend) = (named(others), removed(interface, others));
    match mode {
        Some(AttachMode::Tc) => INTERFACE.ok(
            id,
            format!("{names}: the relay in TC mode sees what that passes"),
        ),
        _ => INTERFACE.problem(
            id,
            format!("{names} sits where the relay would; or use `--mode tc`"),
            mend,
        ),
    }
}

fn others_in_tc(interface: &str, others: &[&Program]) -> Finding {
    let id = "other_tc_programs";
    if others.is_empty() {
        return INTERFACE.ok(id, "none");
    }
    INTERFACE.warning(
        id,
        format!(
            "{}: relayed packets go around what comes in there, and by XDP around what leaves",
            named(others)
        ),
        removed(interface, others),
    )
}

fn named(programs: &[&Program]) -> String {
    let names: Vec<_> = programs
        .iter()
        .map(|program| {
            let place = match program.place {
                Place::XdpNative => "native XDP",
                Place::XdpGeneric => "generic XDP",
                Place::XdpHardware => "XDP on the card",
                Place::TcIngress => "TC ingress",
                Place::TcEgress => "TC egress",
            };
            let id = program
                .id
                .map(|id| format!(", id {id}"))
                .unwrap_or_default();
            let name = match program.name.as_str() {
                "" => "a program without a name".to_owned(),
                name => format!("`{name}`"),
            };
            format!("{name} ({place}{id})")
        })
        .collect();
    some(&names.iter().map(String::as_str).collect::<Vec<_>>(), 4)
}

/// The commands that remove them all.
fn removed(interface: &str, programs: &[&Program]) -> String {
    let name = word(interface);
    let commands: Vec<_> = programs
        .iter()
        .map(
            |program| match (program.link, program.preference, program.place) {
                (Some(link), ..) => format!("bpftool link detach id {link}"),
                (None, Some(preference), Place::TcEgress) => {
                    format!("tc filter del dev {name} egress pref {preference}")
                }
                (None, Some(preference), _) => {
                    format!("tc filter del dev {name} ingress pref {preference}")
                }
                (None, None, Place::XdpNative) => format!("ip link set dev {name} xdpdrv off"),
                (None, None, Place::XdpGeneric) => format!("ip link set dev {name} xdpgeneric off"),
                (None, None, Place::XdpHardware) => {
                    format!("ip link set dev {name} xdpoffload off")
                }
                (None, None, Place::TcIngress) => {
                    format!("bpftool net detach tcx_ingress dev {name}")
                }
                (None, None, Place::TcEgress) => {
                    format!("bpftool net detach tcx_egress dev {name}")
                }
            },
        )
        .collect();
    commands.join(" && ")
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            interface::tests::sound,
            tests::{found, judged},
        },
        *,
    };
    use crate::doctor::Level;

    fn program(place: Place) -> Program {
        Program {
            place,
            id: Some(7),
            name: "filter".to_owned(),
            link: None,
            preference: None,
            ours: false,
        }
    }

    fn with(programs: &[Program]) -> InterfaceFacts {
        InterfaceFacts {
            programs: programs.to_vec(),
            ..sound()
        }
    }

    #[test]
    fn another_xdp_program_is_in_the_way_of_xdp() {
        let id = "other_xdp_programs";
        let other = with(&[program(Place::XdpNative)]);
        let mend = Some("ip link set dev eth0 xdpdrv off");
        assert_eq!(judged(&findings(&other, None), id), (Level::Problem, mend));
        let tc = findings(&other, Some(AttachMode::Tc));
        assert_eq!(judged(&tc, id), (Level::Ok, None));
        let held = with(&[Program {
            link: Some(9),
            ..program(Place::XdpGeneric)
        }]);
        let mend = Some("bpftool link detach id 9");
        assert_eq!(judged(&findings(&held, None), id), (Level::Problem, mend));
        let ours = with(&[Program {
            ours: true,
            ..program(Place::XdpNative)
        }]);
        assert_eq!(judged(&findings(&ours, None), id), (Level::Ok, None));
    }

    #[test]
    fn a_program_whose_name_only_root_may_read_is_not_taken_for_a_strangers() {
        let mut unread = with(&[Program {
            name: String::new(),
            ..program(Place::XdpGeneric)
        }]);
        let judge =
            |facts: &InterfaceFacts| found(&findings(facts, None), "other_xdp_programs").clone();
        assert_eq!(judge(&unread).level, Level::Problem, "its name was read");
        unread.unread = vec!["BPF links (Operation not permitted)".to_owned()];
        let untold = judge(&unread);
        let mend = Some("sudo relay-user doctor eth0");
        assert_eq!(
            (untold.level, untold.mend.as_deref()),
            (Level::Warning, mend)
        );
        assert!(untold.what.contains("without a name (generic XDP, id 7)"));
    }

    #[test]
    fn other_programs_in_traffic_control_are_gone_around() {
        let id = "other_tc_programs";
        let others = with(&[
            Program {
                link: Some(9),
                ..program(Place::TcIngress)
            },
            Program {
                preference: Some(49152),
                ..program(Place::TcEgress)
            },
        ]);
        let findings = findings(&others, Some(AttachMode::Tc));
        let mend = "bpftool link detach id 9 && tc filter del dev eth0 egress pref 49152";
        assert_eq!(judged(&findings, id), (Level::Warning, Some(mend)));
        assert!(
            found(&findings, id)
                .what
                .contains("`filter` (TC ingress, id 7)")
        );
    }
}
