//! What happens to pairs: what `events` prints.

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Table, Width, presets};

use super::{Style, drawn, text};
use crate::events::{Event, Lagged, TransitionKind};

/// What stands above the lines of [`event`].
pub fn events_header() -> String {
    let [time, what, pair, leg, cause] = ["TIME", "WHAT", "PAIR", "LEG", "CAUSE"].map(Cell::new);
    event_line([time, what, pair, leg, cause], Style::PLAIN)
}

/// One event: one line, whatever its length, because those that follow are not known yet.
pub fn event(event: &Event, style: Style) -> String {
    let transition = match event {
        Event::Transition(transition) => transition,
        Event::Lagged(Lagged { missed }) => {
            let what = style.paint(Cell::new("missed"), Color::Red);
            let cause = Cell::new(format_args!("{missed} events: read too slowly"));
            let none = || Cell::new("-");
            return event_line([none(), what, none(), none(), cause], style);
        }
    };
    let (name, colour) = kind(transition.kind);
    let row = [
        text(&transition.time),
        style.paint(Cell::new(name), colour),
        transition.pair.map_or_else(|| Cell::new("-"), Cell::new),
        Cell::new(match transition.stream {
            None => "-",
            Some(0) => "first",
            Some(_) => "second",
        }),
        text(&transition.cause),
    ];
    event_line(row, style)
}

/// A table of one row, as wide as all that may follow.
fn event_line(row: [Cell; 5], style: Style) -> String {
    // Of a time, the longest kind, seven digits, and `second`.
    const WIDTHS: [u16; 4] = [24, 17, 7, 6];
    let mut table = Table::new();
    table.add_row(row);
    table.force_no_tty();
    if style.colour {
        table.enforce_styling();
    }
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
        if let Some(width) = WIDTHS.get(column.index) {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width + 2)));
        }
    }
    drawn(&table)
}

fn kind(kind: TransitionKind) -> (&'static str, Color) {
    match kind {
        TransitionKind::Watching => ("watching", Color::Yellow),
        TransitionKind::Proven => ("proven", Color::Green),
        TransitionKind::Offloaded => ("offloaded", Color::Green),
        TransitionKind::Suspended => ("suspended", Color::Red),
        TransitionKind::TakenBack => ("taken back", Color::Yellow),
        TransitionKind::Expired => ("expired", Color::Yellow),
        TransitionKind::Refused => ("refused", Color::Red),
        TransitionKind::Silent => ("silent", Color::Yellow),
        TransitionKind::UnexpectedSource => ("unexpected source", Color::Red),
        TransitionKind::Resumed => ("resumed", Color::Green),
        TransitionKind::Adopted => ("adopted", Color::Green),
        TransitionKind::AmiUp => ("AMI up", Color::Green),
        TransitionKind::AmiDown => ("AMI down", Color::Red),
        TransitionKind::LeaseLost => ("lease lost", Color::Red),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::examples::rows;

    #[test]
    fn events_are_one_aligned_line_each() {
        let description = include_str!("../../../docs/api.md");
        let section = description.split("\n## Events\n").nth(1).expect("section");
        let block = section.split("```json\n").nth(1).expect("block");
        let lines = block.split("```").next().expect("end").lines();
        let events: Vec<Event> = lines
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        let mut text = events_header();
        text.extend(events.iter().map(|it| event(it, Style::PLAIN)));
        let rows = rows(&text);
        assert_eq!(rows[0], ["TIME", "WHAT", "PAIR", "LEG", "CAUSE"]);
        let cells = [
            "2026-01-31T09:30:00.120Z",
            "offloaded",
            "7",
            "first",
            "proven on the wire",
        ];
        assert_eq!(rows[1], cells);
        assert_eq!(rows[2][1..4], ["taken back", "7", "-"]);
        assert_eq!(rows[3][1..4], ["AMI down", "-", "-"]);
        assert_eq!(rows[4][1], "missed");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), events.len() + 1);
        let cause = lines[0].find("CAUSE").expect("column");
        for (line, row) in lines.iter().zip(&rows) {
            assert_eq!(line.find(row[4]), Some(cause), "{text}");
        }

        for kind in TransitionKind::ALL {
            let Event::Transition(mut told) = events[0].clone() else {
                panic!("no transition")
            };
            (told.kind, told.cause) = (kind, "\u{1b}[2Jx\nTIME".into());
            let told = Event::Transition(told);
            let plain = event(&told, Style::PLAIN);
            assert_eq!(plain.find("7  "), lines[1].find("7  "), "{plain}");
            assert_eq!(plain.lines().count(), 1, "{plain}");
            assert!(!plain.contains('\u{1b}'), "{plain:?}");
            let style = Style {
                lines: true,
                colour: true,
            };
            let colour = event(&told, style);
            assert!(colour.contains('\u{1b}'), "{colour:?}");
            assert_eq!(colour.lines().count(), 1, "{colour}");
            assert!(!colour.contains("[2J") || !colour.contains("\u{1b}[2J"));
        }
    }
}
