//! The daemon: what `status` prints.

use std::fmt::Write as _;

use comfy_table::Cell;

use super::{Facts, Style, drawn, number, text, verdict};
use crate::{
    control::model::{AmiReport, AmiState, StatusReport},
    datapath::AttachMode,
};

/// The daemon on one screen.
pub fn status(status: &StatusReport, style: Style) -> String {
    let mut facts = Facts::default();
    let mode = match status.mode {
        AttachMode::Native | AttachMode::Generic => format!("{} XDP", status.mode.name()),
        AttachMode::Tc => "TC".to_owned(),
    };
    facts.add(
        "interface",
        format_args!("{} (number {})", status.interface, status.ifindex),
    );
    facts.add("mode", format_args!("{mode}: {}", status.mode_reason));
    facts.add(
        "daemon",
        format_args!(
            "relay-user {}, ABI {}, process {}, up {}",
            status.version,
            status.abi,
            status.pid,
            duration(status.uptime_seconds)
        ),
    );
    facts.add("DSCP", status.dscp);
    if let Some(priority) = status.priority {
        facts.add("priority", priority);
    }
    facts.add("pins", status.pins.display());
    facts.add(
        "AMI",
        status.ami.as_ref().map_or_else(|| "not used".into(), ami),
    );
    facts.add(
        "pairs",
        format_args!(
            "{}: {} offloaded, {} waiting, {} refused",
            status.pairs, status.offloaded, status.waiting, status.refused
        ),
    );
    facts.add(
        "streams",
        format_args!("{} of {}", status.streams, status.max_streams),
    );
    facts.add(
        "proof",
        match (status.proof, status.unproven) {
            (0, _) => "off: what AMI says is relayed unproven".to_owned(),
            (packets, 0) => format!("{packets} equal packets in a row"),
            (packets, unproven) => {
                format!("{packets} equal packets in a row; {unproven} pairs without")
            }
        },
    );
    facts.add(
        "lease",
        format_args!("{:.1} s", status.lease_ms as f64 / 1000.0),
    );
    let mut screen = facts.drawn();

    let mut reasons = style.table(&["REASON", "VERDICT", "PACKETS", "BYTES"]);
    for row in status.reasons.iter().filter(|row| row.packets != 0) {
        let (name, colour) = verdict(row.verdict);
        reasons.add_row([
            text(&row.reason),
            style.paint(Cell::new(name), colour),
            number(row.packets),
            number(row.bytes),
        ]);
    }
    screen.push('\n');
    if reasons.is_empty() {
        screen.push_str("no packets yet\n");
    } else {
        screen.push_str(&drawn(&reasons));
    }

    let mut refusals = style.table(&["REFUSED BECAUSE", "COUNT"]);
    for row in status.refusals.iter().filter(|row| row.count != 0) {
        refusals.add_row([text(&row.cause), number(row.count)]);
    }
    if !refusals.is_empty() {
        screen.push('\n');
        screen.push_str(&drawn(&refusals));
    }
    screen
}

fn ami(ami: &AmiReport) -> String {
    let mut line = match ami.state {
        AmiState::Up => "up".to_owned(),
        AmiState::Down => "down".to_owned(),
    };
    let _ = write!(line, ", {} at {}", ami.user, ami.address);
    for more in [&ami.asterisk, &ami.cause].into_iter().flatten() {
        let _ = write!(line, ", {more}");
    }
    line
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::model::{ReasonReport, Verdict},
        output::examples::{example, rows},
    };

    #[test]
    fn a_status_fits_a_screen_and_shows_no_zeros() {
        let mut report: StatusReport = example("The status");
        let zero = |reason: &str| ReasonReport {
            reason: reason.into(),
            verdict: Verdict::Passed,
            packets: 0,
            bytes: 0,
        };
        report.reasons.push(zero("never_seen"));
        let text = status(&report, Style::PLAIN);
        for fragment in [
            "interface  eth0 (number 2)",
            "mode       native XDP: ",
            "up 3 d 4 h",
            "AMI        up, relay at 127.0.0.1:5038, Asterisk Call Manager/11.0.0",
            "pairs      3: 1 offloaded, 1 waiting, 1 refused",
            "streams    4 of 65536",
        ] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
        assert!(
            rows(&text).contains(&vec!["no_stream", "passed", "51200", "10342400"]),
            "{text}"
        );
        assert!(rows(&text).contains(&vec!["on_hold", "4"]), "{text}");
        assert!(!text.contains("never_seen"));
        assert!(text.lines().count() <= 24, "{text}");

        report.reasons = vec![zero("never_seen")];
        report.refusals.clear();
        report.ami = None;
        let text = status(&report, Style::PLAIN);
        assert!(
            text.contains("no packets yet") && text.contains("AMI        not used"),
            "{text}"
        );
        assert!(!text.contains("REFUSED BECAUSE"), "{text}");
    }

    #[test]
    fn durations_read_well() {
        for (seconds, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (61, "1 min 1 s"),
            (3_600, "1 h 0 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(seconds), expected);
        }
    }
}
