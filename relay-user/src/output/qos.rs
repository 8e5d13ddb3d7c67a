//! What `relay-user qos` prints.

use std::fmt::Write as _;

use comfy_table::{Cell, CellAlignment};

use super::{Facts, Style, clean, drawn, number, text};
use crate::qos::{
    auto::AutoReport,
    object::handle,
    policy::{ClassRate, Policy},
    rate,
    report::{InterfaceReport, LineReport, QosReport, RuleReport, ShapingState},
    shaper::{Applied, Cleared, Marked},
};

/// What `apply` did: a line, and one for each thing to know.
pub fn applied(applied: &Applied) -> String {
    let Applied {
        interface, uplink, ..
    } = applied;
    let mut lines = format!("{interface}: {uplink} up");
    if let Some(downlink) = applied.downlink {
        let _ = write!(lines, ", {downlink} down");
    }
    let _ = writeln!(
        lines,
        ", shaped to 95 %, {} in {} classes; `relay-user qos clear {interface}` puts back {}",
        applied.leaf.kind(),
        applied.classes,
        clean(&applied.before),
    );
    notes(&mut lines, &applied.notes);
    lines
}

/// What `clear` did.
pub fn cleared(interface: &str, cleared: &Cleared) -> String {
    match cleared {
        Cleared::Nothing => {
            format!("{interface} is not shaped by relay-user: nothing to clear\n")
        }
        Cleared::Restored { before, notes: all } => {
            let mut lines = format!("{interface}: {} again\n", clean(before));
            notes(&mut lines, all);
            lines
        }
        Cleared::Left { present } => format!(
            "{interface}: {} is not relay-user's, and stays; nothing of relay-user's is left\n",
            clean(present)
        ),
        Cleared::Unmarked => format!("{interface}: packets are not marked any longer\n"),
        Cleared::Gone => format!("{interface} was removed since it was shaped: nothing is left\n"),
    }
}

fn notes(lines: &mut String, notes: &[String]) {
    for note in notes {
        let _ = writeln!(lines, "note: {}", clean(note));
    }
}

/// The classes of a policy, with their rates where the line's is known.
pub fn policy(policy: &Policy, rates: Option<&[ClassRate]>, style: Style) -> String {
    let mut header = vec!["CLASS", "NAME", "PRIO", "DEFAULT"];
    if rates.is_some() {
        header.extend(["RATE", "CEILING"]);
    }
    let mut table = style.table(&header);
    for (index, class) in policy.classes.iter().enumerate() {
        let default = if index == policy.default {
            "default"
        } else {
            ""
        };
        let mut row = vec![
            Cell::new(handle(Policy::class_id(index))),
            text(&class.name),
            number(class.prio.into()),
            Cell::new(default),
        ];
        if let Some(rates) = rates.and_then(|rates| rates.get(index)) {
            row.extend([bits(rates.rate), bits(rates.ceiling)]);
        }
        table.add_row(row);
    }
    drawn(&table)
}

/// Every interface on a screen of its own.
pub fn report(report: &QosReport, style: Style) -> String {
    if report.interfaces.is_empty() {
        return "no interface is shaped by relay-user\n".to_owned();
    }
    let screens = report.interfaces.iter().map(|it| interface(it, style));
    screens.collect::<Vec<_>>().join("\n")
}

fn interface(report: &InterfaceReport, style: Style) -> String {
    let mut facts = Facts::default();
    match report.ifindex {
        Some(index) => facts.add(
            "interface",
            format_args!("{} (number {index})", report.interface),
        ),
        None => facts.add("interface", &report.interface),
    }
    let drift = report.drift.join(", ");
    let changed = match &drift[..] {
        "" => String::new(),
        drift => format!(": {drift}"),
    };
    let state = match report.state {
        ShapingState::Shaped => "shaped".to_owned(),
        ShapingState::Drifted => format!("drifted: {drift}"),
        ShapingState::Marked => {
            format!("marked, not shaped; it has {}{changed}", report.before)
        }
        ShapingState::Unshaped => format!("not shaped; it has {}{changed}", report.before),
        ShapingState::Gone => format!(
            "not shaped: the interface was removed since; `relay-user qos clear {}` removes what is left",
            report.interface
        ),
    };
    facts.add("state", state);
    if let Some(report) = &report.auto {
        auto(&mut facts, report);
    }
    if report.uplink.is_some() || report.rules.is_some() {
        let built_in = || "built in".to_owned();
        let policy = report.policy.as_ref();
        facts.add(
            "policy",
            policy.map_or_else(built_in, |path| path.display().to_string()),
        );
    }
    if report.uplink.is_some() {
        facts.add("before", &report.before);
    }
    let mut screen = facts.drawn();
    if let Some(drawn) = rules(report.rules.as_deref(), style) {
        let _ = write!(screen, "\n{drawn}");
    }
    for (name, report) in [("uplink", &report.uplink), ("downlink", &report.downlink)] {
        if let Some(report) = report {
            let _ = write!(screen, "\n{}", line(name, report, style));
        }
    }
    screen
}

/// Transitions that are shown to a person.
const SHOWN: usize = 4;

fn auto(facts: &mut Facts, report: &AutoReport) {
    let state = if report.on { "on" } else { "off" };
    let state = if report.running {
        format!(
            "{state}, {:.0} voice packets/s (on above {}, off below {}, for 3 s)",
            report.voice_per_second, report.on_threshold, report.off_threshold
        )
    } else {
        format!(
            "not running; its last process, {}, left shaping {state}",
            report.process
        )
    };
    facts.add("auto", state);
    if let Some(failure) = &report.failure {
        facts.add("", format_args!("failed: {}", clean(failure)));
    }
    for switched in report.transitions.iter().rev().take(SHOWN) {
        let state = if switched.on { "on" } else { "off" };
        facts.add(
            "",
            format_args!(
                "{} {state}, {:.0} voice packets/s",
                clean(&switched.time),
                switched.voice_per_second
            ),
        );
    }
}

fn line(name: &str, report: &LineReport, style: Style) -> String {
    // One table of all would be too wide for 80 columns.
    let mut shares = style.table(&["CLASS", "NAME", "PRIO", "RATE", "CEILING"]);
    let mut traffic = style.table(&[
        "CLASS",
        "PACKETS",
        "BYTES",
        "NOW",
        "DROPS",
        "OVERLIMITS",
        "BACKLOG",
    ]);
    for class in &report.classes {
        shares.add_row([
            Cell::new(&class.id),
            text(class.name.as_deref().unwrap_or("-")),
            number(class.prio.into()),
            rounded(class.rate, &BITS),
            rounded(class.ceiling, &BITS),
        ]);
        traffic.add_row([
            class
                .name
                .as_deref()
                .map_or_else(|| Cell::new(&class.id), text),
            number(class.packets),
            rounded(class.bytes, &BYTES),
            class
                .bits_per_second
                .map_or_else(|| Cell::new("-"), |bits| rounded(bits, &BITS)),
            number(class.drops),
            number(class.overlimits),
            number(class.backlog_packets),
        ]);
    }
    let mut lines = format!(
        "{name} on {}: {} of {}, {} in each class\n{}\n{}",
        report.device,
        rate::display(report.shaped),
        rate::display(report.rate),
        report.leaf.kind(),
        drawn(&shares),
        drawn(&traffic)
    );
    if let Some(drawn) = rules(report.rules.as_deref(), style) {
        let _ = write!(lines, "\n{drawn}");
    }
    lines
}

/// What each rule has matched, if there is one.
fn rules(rules: Option<&[RuleReport]>, style: Style) -> Option<String> {
    let rules = rules.filter(|rules| !rules.is_empty())?;
    let mut table = style.table(&["RULE", "PACKETS", "BYTES"]);
    for rule in rules {
        table.add_row([
            text(&rule.name),
            number(rule.packets),
            rounded(rule.bytes, &BYTES),
        ]);
    }
    Some(drawn(&table))
}

/// What `mark` did.
pub fn marked(marked: &Marked) -> String {
    let Marked {
        interface, rules, ..
    } = marked;
    let rules = match rules {
        1 => "1 rule marks".to_owned(),
        rules => format!("{rules} rules mark"),
    };
    format!("{interface}: {rules} what leaves; `relay-user qos clear {interface}` ends it\n")
}

/// Units of [`rounded`], each a thousand times the one before.
const BYTES: [&str; 5] = ["", "k", "M", "G", "T"];
/// As tc(8) reads them.
const BITS: [&str; 5] = ["bit", "kbit", "mbit", "gbit", "tbit"];

/// A number by its first digits, in the unit that suits it.
fn rounded(value: u64, units: &[&str; 5]) -> Cell {
    let (mut scaled, mut unit) = (value as f64, units[0]);
    for next in &units[1..] {
        if scaled < 999.5 {
            break;
        }
        (scaled, unit) = (scaled / 1e3, next);
    }
    let digits = format!("{scaled:.*}", usize::from(scaled < 99.95));
    let digits = digits.strip_suffix(".0").unwrap_or(&digits);
    text(&format!("{digits}{unit}")).set_alignment(CellAlignment::Right)
}

fn bits(bits_per_second: u64) -> Cell {
    text(&rate::rounded(bits_per_second)).set_alignment(CellAlignment::Right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rule_is_one() {
        let said = |rules| {
            marked(&Marked {
                interface: "eth0".to_owned(),
                policy: None,
                rules,
            })
        };
        assert!(said(1).contains("1 rule marks"));
        assert!(said(2).contains("2 rules mark"));
    }

    #[test]
    fn numbers_are_short() {
        for (value, bytes, bits) in [
            (0, "0", "0bit"),
            (999, "999", "999bit"),
            (47_496, "47.5k", "47.5kbit"),
            (522_496, "522k", "522kbit"),
            (999_600, "1M", "1mbit"),
            (95_000_000_000, "95G", "95gbit"),
        ] {
            assert_eq!(rounded(value, &BYTES).content(), bytes);
            assert_eq!(rounded(value, &BITS).content(), bits);
        }
    }
}
