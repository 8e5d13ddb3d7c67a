//! Pairs: what `list`, `show`, `add` and `remove` print.

use std::borrow::Cow;

use comfy_table::{Cell, CellAlignment, Color};

use super::{Facts, Style, clean, drawn, number, text};
use crate::{
    control::model::{LegReport, MarkReport, NextHopReport, PairReport, PairState, StreamReport},
    dscp,
    listing::{Column, Grade, Row, RowState},
    pair::Proof,
};

/// Every pair: a line each or, on a terminal, a line for each stream, which fits 80 columns.
pub fn pairs(pairs: &[PairReport], style: Style) -> String {
    if pairs.is_empty() {
        return "no pairs\n".to_owned();
    }
    if style.lines {
        by_stream(pairs, style)
    } else {
        by_pair(pairs, style)
    }
}

fn by_pair(pairs: &[PairReport], style: Style) -> String {
    let mut table = style.table(&[
        "ID",
        "FEED",
        "STATE",
        "FIRST LEG",
        "SECOND LEG",
        "PACKETS",
        "LOSS %",
        "JITTER MS",
        "MOS",
        "WHY",
    ]);
    for pair in pairs {
        let legs = pair.legs.iter().map(leg);
        // A call that was never offered has no addresses to be known by.
        let channels = pair.channels.iter().skip(pair.legs.len());
        let mut legs = legs.chain(channels.map(|channel| clean(channel).into_owned()));
        let rows = Row::of_pair(pair);
        // The phones of both legs.
        let both = |column| {
            let values: Vec<_> = rows.iter().map(|row| row.figure(column)).collect();
            let unknown = values.iter().all(|value| value == "-");
            Cell::new(if unknown {
                "-".to_owned()
            } else {
                values.join("/")
            })
            .set_alignment(CellAlignment::Right)
        };
        table.add_row([
            number(pair.id),
            Cell::new(pair.feed.name()),
            pair_state(pair.state, style),
            Cell::new(legs.next().unwrap_or_else(|| "-".into())),
            Cell::new(legs.next().unwrap_or_else(|| "-".into())),
            number(packets(pair)),
            both(Column::Loss),
            both(Column::Jitter),
            both(Column::Mos),
            text(pair.why.as_deref().unwrap_or_default()),
        ]);
    }
    drawn(&table)
}

/// Columns of a terminal from which on the channels are shown too: 79 for the rest, and their own.
const WITH_CHANNELS: usize = 110;

fn by_stream(pairs: &[PairReport], style: Style) -> String {
    let width = style.width();
    let mut header = vec![
        "ID",
        "STATE",
        "FEED",
        "FROM",
        "PACKETS",
        "LOSS %",
        "JITTER MS",
        "MOS",
    ];
    let with_channels = width >= WITH_CHANNELS;
    if with_channels {
        header.push("CHANNEL");
    }
    let mut table = style.columns(&header);
    // What stands below the rows of each pair.
    let mut notes = Vec::new();
    for pair in pairs {
        let rows = Row::of_pair(pair);
        for (index, row) in rows.iter().enumerate() {
            let first = index == 0;
            let mut cells = vec![
                if first {
                    number(pair.id)
                } else {
                    Cell::new("")
                },
                row_state(row.state, style),
                Cell::new(if first { pair.feed.name() } else { "" }),
                text(&row.sender()),
                number(row.packets),
                measured(row, Column::Loss, style),
                measured(row, Column::Jitter, style),
                measured(row, Column::Mos, style),
            ];
            if with_channels {
                cells.push(text(row.channel.as_deref().unwrap_or_default()));
            }
            table.add_row(cells);
        }
        notes.push((rows.len(), pair.why.as_deref()));
    }
    let lines = drawn(&table);
    let mut lines = lines.lines();
    let mut screen = lines
        .next()
        .map(|header| header.to_owned() + "\n")
        .unwrap_or_default();
    for (rows, why) in notes {
        for line in lines.by_ref().take(rows) {
            screen.push_str(line);
            screen.push('\n');
        }
        for line in why.into_iter().flat_map(|why| wrapped(why, width)) {
            screen.push_str(&line);
            screen.push('\n');
        }
    }
    screen
}

/// A reason below the row that it is about.
fn wrapped(why: &str, width: usize) -> Vec<String> {
    let options = textwrap::Options::new(width.max(20))
        .initial_indent("      ")
        .subsequent_indent("      ");
    textwrap::wrap(&clean(why), options)
        .into_iter()
        .map(Cow::into_owned)
        .collect()
}

fn measured(row: &Row, column: Column, style: Style) -> Cell {
    let cell = Cell::new(row.figure(column)).set_alignment(CellAlignment::Right);
    match row
        .number(column)
        .and_then(|value| Grade::of(column, value))
    {
        Some(Grade::Fair) => style.paint(cell, Color::Yellow),
        Some(Grade::Bad) => style.paint(cell, Color::Red),
        Some(Grade::Good) | None => cell,
    }
}

/// One pair, whole.
pub fn pair(pair: &PairReport, style: Style) -> String {
    let mut facts = Facts::default();
    facts.add("pair", pair.id);
    facts.add("state", pair_state_name(pair.state));
    if let Some(why) = &pair.why {
        facts.add("why", why);
    }
    facts.add("feed", pair.feed.name());
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
    facts.add(
        "payload types",
        if types.is_empty() {
            "-".to_owned()
        } else {
            types.join(", ")
        },
    );
    if let Some(priority) = pair.priority {
        facts.add("priority", priority);
    }
    if pair.proof == Proof::None {
        facts.add("proof", "none: relayed on the word of whoever added it");
    }
    for (name, stream) in ["from first", "from second"].into_iter().zip(&pair.streams) {
        if let Some(why) = &stream.why {
            facts.add(name, why);
        } else if let Some(proof) = stream.proof {
            let why = "packets in a row came out of the PBX as they went in";
            facts.add(name, format_args!("{} {why}", proof.of));
        }
    }
    if pair.streams.is_empty() {
        return facts.drawn();
    }
    format!("{}\n{}", facts.drawn(), streams(&pair.streams, style))
}

/// Both streams beside each other, a figure in each line.
fn streams(streams: &[StreamReport], style: Style) -> String {
    let header = ["STREAM", "FROM FIRST", "FROM SECOND"];
    let mut table = style.table(&header[..=streams.len().min(2)]);
    let mut add = |name: &str, value: &dyn Fn(&StreamReport) -> String| {
        let values = streams.iter().map(|stream| text(&value(stream)));
        table.add_row(std::iter::once(Cell::new(name)).chain(values));
    };
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    add("from", &|stream| stream.from.to_string());
    add("to", &|stream| stream.to.to_string());
    add("state", &|stream| {
        RowState::from(stream.state).name().to_owned()
    });
    add("proof", &|stream| {
        or_dash(
            stream
                .proof
                .map(|proof| format!("{}/{}", proof.equal, proof.of)),
        )
    });
    add("packets relayed", &|stream| stream.packets.to_string());
    add("bytes relayed", &|stream| stream.bytes.to_string());
    add("packets received", &|stream| {
        stream.reception.packets.to_string()
    });
    add("bytes received", &|stream| {
        stream.reception.bytes.to_string()
    });
    add("lost", &|stream| {
        let reception = &stream.reception;
        format!("{} ({:.3} %)", reception.lost, reception.lost_percent)
    });
    add("duplicates", &|stream| {
        stream.reception.duplicates.to_string()
    });
    add("reordered", &|stream| {
        stream.reception.reordered.to_string()
    });
    add("restarts", &|stream| stream.reception.restarts.to_string());
    let jitter = |value: Option<f64>| or_dash(value.map(|value| format!("{value:.3} ms")));
    add("jitter", &|stream| jitter(stream.reception.jitter_ms));
    add("jitter, mean", &|stream| {
        jitter(stream.reception.jitter_mean_ms)
    });
    add("jitter, highest", &|stream| {
        jitter(stream.reception.jitter_max_ms)
    });
    add("longest gap", &|stream| {
        format!("{:.1} ms", stream.reception.largest_gap_ms)
    });
    add("MOS, estimated", &|stream| {
        or_dash(stream.reception.mos.map(|mos| format!("{mos:.2}")))
    });
    add("codec", &|stream| or_dash(stream.reception.codec.clone()));
    add("clock rate", &|stream| {
        or_dash(stream.reception.clock_rate.map(|rate| format!("{rate} Hz")))
    });
    add("payload type", &|stream| {
        or_dash(stream.reception.payload_type.map(|now| now.to_string()))
    });
    add("payload types seen", &|stream| {
        let types = &stream.reception.payload_types;
        let types: Vec<_> = types.iter().map(ToString::to_string).collect();
        or_dash((!types.is_empty()).then(|| types.join(", ")))
    });
    add("SSRC", &|stream| or_dash(stream.reception.ssrc.clone()));
    add("SSRC changes", &|stream| {
        stream.reception.ssrc_changes.to_string()
    });
    add("markers", &|stream| stream.reception.markers.to_string());
    add("last packet", &|stream| {
        or_dash(stream.reception.last_arrival.clone())
    });
    add("silent", &|stream| {
        or_dash(stream.silent_ms.map(|silent| format!("{silent} ms")))
    });
    add("came as", &|stream| marks(&stream.marks));
    let hop = |value: fn(&NextHopReport) -> String| {
        move |stream: &StreamReport| {
            stream
                .next_hop
                .as_ref()
                .map_or_else(|| "not known yet".to_owned(), value)
        }
    };
    add(
        "to MAC",
        &hop(|hop| hop.destination_mac.clone().unwrap_or_else(|| "-".into())),
    );
    add(
        "from MAC",
        &hop(|hop| hop.source_mac.clone().unwrap_or_else(|| "-".into())),
    );
    add(
        "VLAN",
        &hop(|hop| {
            let tags: Vec<_> = hop.vlan.iter().map(ToString::to_string).collect();
            if tags.is_empty() {
                "-".to_owned()
            } else {
                tags.join(", ")
            }
        }),
    );
    add("MTU", &hop(|hop| hop.mtu.to_string()));
    drawn(&table)
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

fn pair_state(state: PairState, style: Style) -> Cell {
    row_state(state.into(), style)
}

fn pair_state_name(state: PairState) -> &'static str {
    RowState::from(state).name()
}

fn row_state(state: RowState, style: Style) -> Cell {
    let colour = match state {
        RowState::Offloaded => Color::Green,
        RowState::Waiting | RowState::Watching => Color::Yellow,
        RowState::Suspended | RowState::Refused => Color::Red,
    };
    style.paint(Cell::new(state.name()), colour)
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
                "LOSS %",
                "JITTER MS",
                "MOS",
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
                "3003",
                "0.20/0.00",
                "0.4/0.1",
                "4.40/4.41"
            ]
        );
        assert_eq!(rows[2][2], "waiting");
        assert_eq!(rows[2][9], "no neighbour");
        assert_eq!(
            rows[3],
            [
                "1000",
                "ami",
                "refused",
                "PJSIP/alice-00000001",
                "PJSIP/bob-00000002",
                "0",
                "-",
                "-",
                "-",
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
            "from first     8 packets in a row came out of the PBX as they went in",
        ] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
        let rows = rows(&text);
        for row in [
            ["to", "192.0.2.12:30002", "192.0.2.11:30000"],
            ["state", "offloaded", "offloaded"],
            ["proof", "8/8", "8/8"],
            ["bytes relayed", "321000", "321642"],
            ["packets received", "1512", "1515"],
            ["lost", "3 (0.198 %)", "0 (0.000 %)"],
            ["reordered", "1", "0"],
            ["jitter, highest", "2.117 ms", "0.940 ms"],
            ["longest gap", "61.2 ms", "23.6 ms"],
            ["MOS, estimated", "4.40", "4.41"],
            ["payload types seen", "0, 101", "0, 96"],
            ["SSRC", "0x1f2e3d4c", "0x8a01b2c3"],
            ["came as", "ef 100%", "cs0 99%, ef 0%"],
            ["to MAC", "02:00:00:00:00:0c", "02:00:00:00:00:0b"],
            ["VLAN", "100", "-"],
        ] {
            assert!(rows.contains(&row.to_vec()), "{row:?} in {text}");
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

    const TERMINAL: Style = Style {
        lines: true,
        colour: false,
    };

    #[test]
    fn only_a_terminal_gets_lines_and_only_with_colour_escapes() {
        let report = example::<PairReport>("A pair");
        let drawn = |style| pairs(std::slice::from_ref(&report), style) + &pair(&report, style);
        let plain = drawn(Style::PLAIN);
        assert!(!plain.contains(['\u{1b}', '─']), "{plain}");
        let lines = drawn(TERMINAL);
        assert!(lines.contains('─') && !lines.contains('\u{1b}'), "{lines}");
        let colour = drawn(Style {
            colour: true,
            ..TERMINAL
        });
        assert!(colour.contains('\u{1b}'), "{colour}");
    }

    #[test]
    fn on_a_terminal_each_stream_has_a_line_and_the_reason_its_own() {
        let mut waiting: PairReport = example("A pair");
        waiting.state = PairState::Waiting;
        waiting.why = Some(
            "proof 3/8: nothing came out of the PBX yet, for whatever reason it may have had"
                .into(),
        );
        waiting.streams[1].reception.lost_percent = 12.5;
        let text = pairs(&[waiting, example("A pair")], TERMINAL);
        let table = rows(&text);
        assert_eq!(
            table[1],
            [
                "7",
                "offloaded",
                "ami",
                "192.0.2.11:30000",
                "1500",
                "0.20",
                "0.4",
                "4.40"
            ]
        );
        assert_eq!(
            table[2],
            [
                "offloaded",
                "192.0.2.12:30002",
                "1503",
                "12.50",
                "0.1",
                "4.41"
            ]
        );
        assert_eq!(
            table[3][0],
            "proof 3/8: nothing came out of the PBX yet, for whatever reason it may"
        );
        assert_eq!(table[4], ["have had"]);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let mut refused: PairReport = example("A pair");
        refused.legs.clear();
        refused.streams.clear();
        refused.channels[0] = "PJSIP/a-very-long-name-00000001".into();
        let text = pairs(&[refused], TERMINAL);
        assert_eq!(rows(&text)[1][3], "PJSIP/a-very-long-na…");
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
