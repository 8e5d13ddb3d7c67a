//! Pairs: what `list`, `show`, `add` and `remove` print.

use std::fmt::Write as _;

use comfy_table::{Cell, Color};

use super::{Facts, Style, clean, drawn, number, text};
use crate::{
    control::model::{
        LegReport, MarkReport, NextHopReport, PairReport, PairState, StreamReport, StreamState,
    },
    dscp,
    pair::Proof,
};

/// Every pair, a line each.
pub fn pairs(pairs: &[PairReport], style: Style) -> String {
    if pairs.is_empty() {
        return "no pairs\n".to_owned();
    }
    let mut table = style.table(&[
        "ID",
        "FEED",
        "STATE",
        "FIRST LEG",
        "SECOND LEG",
        "PACKETS",
        "WHY",
    ]);
    for pair in pairs {
        let legs = pair.legs.iter().map(|report| {
            // Between the addresses, or a narrow terminal would break them in the middle.
            if style.lines {
                leg(report).replace('=', "=\n")
            } else {
                leg(report)
            }
        });
        // A call that was never offered has no addresses to be known by.
        let channels = pair.channels.iter().skip(pair.legs.len());
        let mut legs = legs.chain(channels.map(|channel| clean(channel).into_owned()));
        table.add_row([
            number(pair.id),
            Cell::new(feed(pair.feed)),
            pair_state(pair.state, style),
            Cell::new(legs.next().unwrap_or_else(|| "-".into())),
            Cell::new(legs.next().unwrap_or_else(|| "-".into())),
            number(packets(pair)),
            text(pair.why.as_deref().unwrap_or_default()),
        ]);
    }
    drawn(&table)
}

/// One pair, whole.
pub fn pair(pair: &PairReport, style: Style) -> String {
    let mut facts = Facts::default();
    facts.add("pair", pair.id);
    facts.add("state", pair_state_name(pair.state));
    if let Some(why) = &pair.why {
        facts.add("why", why);
    }
    facts.add("feed", feed(pair.feed));
    if let Some(call) = &pair.call {
        facts.add("call", call);
    }
    for (name, report) in ["first leg", "second leg"].into_iter().zip(&pair.legs) {
        match &report.channel {
            Some(channel) => facts.add(name, format_args!("{} ({channel})", leg(report))),
            None => facts.add(name, leg(report)),
        }
    }
    if pair.legs.is_empty() && !pair.channels.is_empty() {
        facts.add("channels", clean(&pair.channels.join(", ")));
    }
    let types: Vec<_> = pair.payload_types.iter().map(ToString::to_string).collect();
    facts.add("payload types", types.join(", "));
    if let Some(priority) = pair.priority {
        facts.add("priority", priority);
    }
    if pair.proof == Proof::None {
        facts.add("proof", "none: relayed on the word of whoever added it");
    }
    for (name, stream) in ["from first", "from second"].into_iter().zip(&pair.streams) {
        if let Some(why) = &stream.why {
            facts.add(name, why);
        }
    }
    if pair.streams.is_empty() {
        return facts.drawn();
    }
    let mut table = style.table(&[
        "FROM", "TO", "STATE", "PROOF", "PACKETS", "BYTES", "CAME AS", "NEXT HOP",
    ]);
    for stream in &pair.streams {
        table.add_row([
            Cell::new(stream.from),
            Cell::new(stream.to),
            stream_state(stream, style),
            text(&stream.proof.map_or_else(
                || "-".into(),
                |proof| format!("{}/{}", proof.equal, proof.of),
            )),
            number(stream.packets),
            number(stream.bytes),
            text(&marks(&stream.marks)),
            text(
                &stream
                    .next_hop
                    .as_ref()
                    .map_or_else(|| "not known yet".into(), next_hop),
            ),
        ]);
    }
    format!("{}\n{}", facts.drawn(), drawn(&table))
}

/// The shares of the DSCP that a phone's packets came with, in percent.
fn marks(marks: &[MarkReport]) -> String {
    let total: u64 = marks.iter().map(|mark| u64::from(mark.packets)).sum();
    if total == 0 {
        return "-".to_owned();
    }
    let shares: Vec<_> = marks
        .iter()
        .map(|mark| {
            let name = mark.dscp.map_or_else(|| "others".to_owned(), dscp::name);
            format!("{name} {}%", u64::from(mark.packets) * 100 / total)
        })
        .collect();
    shares.join(", ")
}

/// What became of a pair just added: one line.
pub fn added(pair: &PairReport) -> String {
    let state = pair_state_name(pair.state);
    match &pair.why {
        Some(why) => format!("pair {}: {state}: {}\n", pair.id, clean(why)),
        None => format!("pair {}: {state}\n", pair.id),
    }
}

/// The pairs that went, and how many.
pub fn removed(removed: &[PairReport], style: Style) -> String {
    let count = match removed.len() {
        0 => return "there was no pair to remove\n".to_owned(),
        1 => "1 pair".to_owned(),
        count => format!("{count} pairs"),
    };
    format!("{}{count} removed\n", pairs(removed, style))
}

fn packets(pair: &PairReport) -> u64 {
    pair.streams.iter().map(|stream| stream.packets).sum()
}

fn leg(leg: &LegReport) -> String {
    format!("{}={}", leg.local, leg.remote)
}

fn next_hop(hop: &NextHopReport) -> String {
    let mut line = match (&hop.source_mac, &hop.destination_mac) {
        (Some(source), Some(destination)) => format!("{source} > {destination}"),
        _ => "without Ethernet".to_owned(),
    };
    for vlan in &hop.vlan {
        let _ = write!(line, ", VLAN {vlan}");
    }
    let _ = write!(line, ", MTU {}", hop.mtu);
    line
}

fn pair_state_name(state: PairState) -> &'static str {
    match state {
        PairState::Offloaded => "offloaded",
        PairState::Waiting => "waiting",
        PairState::Refused => "refused",
    }
}

fn pair_state(state: PairState, style: Style) -> Cell {
    let colour = match state {
        PairState::Offloaded => Color::Green,
        PairState::Waiting => Color::Yellow,
        PairState::Refused => Color::Red,
    };
    style.paint(Cell::new(pair_state_name(state)), colour)
}

fn stream_state(stream: &StreamReport, style: Style) -> Cell {
    let (name, colour) = match stream.state {
        StreamState::Waiting => ("waiting", Color::Yellow),
        StreamState::Watching => ("watching", Color::Yellow),
        StreamState::Offloaded => ("offloaded", Color::Green),
        StreamState::Suspended => ("suspended", Color::Red),
    };
    style.paint(Cell::new(name), colour)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::examples::{example, rows};

    #[test]
    fn a_list_is_one_aligned_line_per_pair() {
        let mut waiting: PairReport = example("A pair");
        waiting.state = PairState::Waiting;
        waiting.why = Some("no neighbour".into());
        let mut refused = waiting.clone();
        refused.id = 1000;
        refused.state = PairState::Refused;
        refused.legs.clear();
        refused.streams.clear();
        let text = pairs(&[example("A pair"), waiting, refused], Style::PLAIN);
        let rows = rows(&text);
        assert_eq!(
            rows[0],
            [
                "ID",
                "FEED",
                "STATE",
                "FIRST LEG",
                "SECOND LEG",
                "PACKETS",
                "WHY"
            ]
        );
        assert_eq!(
            rows[1],
            [
                "7",
                "ami",
                "offloaded",
                "192.0.2.1:10000=192.0.2.11:30000",
                "192.0.2.1:10002=192.0.2.12:30002",
                "3003"
            ]
        );
        assert_eq!(rows[2][2], "waiting");
        assert_eq!(rows[2][6], "no neighbour");
        assert_eq!(
            rows[3],
            [
                "1000",
                "ami",
                "refused",
                "PJSIP/alice-00000001",
                "PJSIP/bob-00000002",
                "0",
                "no neighbour"
            ]
        );
        let column = |line: &str, what: &str| line.find(what).expect("column");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(column(lines[0], "STATE"), column(lines[1], "offloaded"));
        assert_eq!(column(lines[0], "STATE"), column(lines[3], "refused"));
        assert!(
            lines.iter().all(|line| line.trim_end() == *line),
            "{text:?}"
        );
        assert_eq!(pairs(&[], Style::PLAIN), "no pairs\n");
    }

    #[test]
    fn a_pair_shows_all_it_has() {
        let text = pair(&example("A pair"), Style::PLAIN);
        for fragment in [
            "state          offloaded",
            "call           0e0f7c4e-6d5e-4b6e-9d3b-0b8f6d0a7c11",
            "first leg      192.0.2.1:10000=192.0.2.11:30000 (PJSIP/alice-00000001)",
            "payload types  0, 101:96",
            "02:00:00:00:00:01 > 02:00:00:00:00:0c, VLAN 100, MTU 1500",
            "321000",
            "8/8",
        ] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
        let mut waiting: PairReport = example("A pair");
        waiting.proof = Proof::None;
        waiting.streams[1].why = Some("proof 3/8".into());
        let text = pair(&waiting, Style::PLAIN);
        for fragment in ["proof          none", "from second    proof 3/8"] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
    }

    #[test]
    fn a_new_pair_tells_why_it_waits() {
        let mut report: PairReport = example("A pair");
        assert_eq!(added(&report), "pair 7: offloaded\n");
        report.state = PairState::Waiting;
        report.why = Some("192.0.2.12 does not answer ARP".into());
        assert_eq!(
            added(&report),
            "pair 7: waiting: 192.0.2.12 does not answer ARP\n"
        );
    }

    #[test]
    fn what_went_is_counted() {
        let report: PairReport = example("A pair");
        assert!(
            removed(std::slice::from_ref(&report), Style::PLAIN).ends_with("\n1 pair removed\n")
        );
        assert!(removed(&[report.clone(), report], Style::PLAIN).ends_with("\n2 pairs removed\n"));
        assert_eq!(removed(&[], Style::PLAIN), "there was no pair to remove\n");
    }

    #[test]
    fn only_a_terminal_gets_lines_and_only_with_colour_escapes() {
        let report = [example::<PairReport>("A pair")];
        let plain = pairs(&report, Style::PLAIN);
        assert!(!plain.contains(['\u{1b}', '─']), "{plain}");
        let lines = pairs(
            &report,
            Style {
                lines: true,
                colour: false,
            },
        );
        assert!(lines.contains('─') && !lines.contains('\u{1b}'), "{lines}");
        let colour = pairs(
            &report,
            Style {
                lines: true,
                colour: true,
            },
        );
        assert!(colour.contains('\u{1b}'), "{colour}");
    }

    #[test]
    fn text_from_the_network_cannot_drive_the_terminal() {
        let mut report: PairReport = example("A pair");
        let hostile = "\u{1b}[2Jx\nID  FEED\u{202e}";
        report.why = Some(hostile.into());
        report.call = Some(hostile.into());
        report.legs[0].channel = Some(hostile.into());
        for text in [
            pair(&report, Style::PLAIN),
            pairs(std::slice::from_ref(&report), Style::PLAIN),
            added(&report),
        ] {
            assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text:?}");
            assert!(!text.contains("\nID  FEED"), "{text:?}");
        }
    }

}
