//! The daemon: what `status` prints.

use std::{cmp::Reverse, fmt::Write as _};

use comfy_table::Cell;

use super::{Facts, Style, drawn, number, text, verdict};
use crate::{
    control::model::{AmiReport, AmiState, ReasonReport, RefusalReport, StatusReport},
    datapath::AttachMode,
};

/// A screen that everybody has.
const COLUMNS: usize = 80;
const LINES: usize = 24;

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
    if let Some(address) = status.metrics {
        facts.add("metrics", format_args!("http://{address}/metrics"));
    }
    if let Some(address) = status.http {
        facts.add("page", format_args!("http://{address}/"));
    }
    facts.add(
        "pairs",
        format_args!(
            "{}: {} offloaded, {} waiting, {} refused",
            status.pairs, status.offloaded, status.waiting, status.refused
        ),
    );
    let refused = refusals(&status.refusals);
    if !refused.is_empty() {
        facts.add("refused", refused);
    }
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
    let facts = facts.drawn();
    let taken: usize = facts
        .lines()
        .map(|line| line.chars().count().div_ceil(COLUMNS).max(1))
        .sum();
    // Besides, an empty line, the header, what is left out, and the prompt.
    let room = LINES.saturating_sub(taken + 4).max(1);
    format!("{facts}\n{}", reasons(&status.reasons, room, style))
}

/// Pairs and calls that were not taken: the causes that had most, so that a screen has room for the rest.
fn refusals(rows: &[RefusalReport]) -> String {
    const SHOWN: usize = 4;
    let mut rows: Vec<_> = rows.iter().filter(|row| row.count != 0).collect();
    rows.sort_by_key(|row| Reverse(row.count));
    let shown = rows.iter().take(SHOWN);
    let mut causes: Vec<_> = shown
        .map(|row| format!("{} {}", row.cause, row.count))
        .collect();
    if rows.len() > SHOWN {
        causes.push(format!("and {} causes more", rows.len() - SHOWN));
    }
    causes.join(", ")
}

/// What became of packets: the reasons that had most, in their order, so that a screen has room for them.
fn reasons(rows: &[ReasonReport], room: usize, style: Style) -> String {
    let mut most: Vec<_> = rows.iter().filter(|row| row.packets != 0).collect();
    if most.is_empty() {
        return "no packets yet\n".to_owned();
    }
    let all = most.len();
    most.sort_by_key(|row| Reverse(row.packets));
    most.truncate(room);
    // Lines around them would take the room of three.
    let plain = Style {
        lines: false,
        ..style
    };
    let mut table = plain.table(&["REASON", "VERDICT", "PACKETS", "BYTES"]);
    if style.colour {
        table.enforce_styling();
    }
    for row in rows {
        if !most.iter().any(|shown| shown.reason == row.reason) {
            continue;
        }
        let (name, colour) = verdict(row.verdict);
        table.add_row([
            text(&row.reason),
            style.paint(Cell::new(name), colour),
            number(row.packets),
            number(row.bytes),
        ]);
    }
    let mut lines = drawn(&table);
    if all > room {
        // Writing to a string cannot fail.
        let _ = writeln!(lines, "and {} reasons more: `relay-user stats`", all - room);
    }
    lines
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
        control::model::Verdict,
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
        assert!(text.contains("refused    on_hold 4"), "{text}");
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
        assert!(!text.contains("on_hold"), "{text}");
    }

    #[test]
    fn the_status_of_a_busy_relay_fits_80_columns_and_24_lines() {
        let mut report: StatusReport = example("The status");
        report.mode_reason =
            "native XDP on veth loses packets unless the peer runs an XDP program too".into();
        report.priority = Some("1:10".parse().expect("a class"));
        report.reasons = (0..35)
            .map(|number| ReasonReport {
                reason: format!("reason_{number}"),
                verdict: Verdict::Passed,
                packets: 1_000_000_000 + number,
                bytes: u64::MAX >> 8,
            })
            .collect();
        report.refusals = (0..15)
            .map(|number| RefusalReport {
                cause: format!("no_static_payload_type_{number}"),
                count: 100_000 + number,
            })
            .collect();
        let text = status(&report, Style::PLAIN);
        let wrapped = text
            .lines()
            .map(|line| line.chars().count().div_ceil(80).max(1));
        // One is left to the prompt.
        assert!(wrapped.sum::<usize>() < 24, "{text}");
        assert!(
            text.contains("reason_34") && text.contains(" reasons more"),
            "{text}"
        );
        assert!(text.contains("and 11 causes more"), "{text}");
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
