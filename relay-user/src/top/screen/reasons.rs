//! What became of all packets, and of calls that were not taken.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Rect},
    style::{Color, Modifier, Style},
    text::Text,
    widgets::{Row as TableRow, Table},
};

use super::Palette;
use crate::{
    control::model::Verdict,
    output::clean,
    stats::Traffic,
    top::{board::Board, daemon::Daemon},
};

const WIDTHS: [Constraint; 5] = [
    Constraint::Length(8),
    Constraint::Length(20),
    Constraint::Length(14),
    Constraint::Length(10),
    Constraint::Length(16),
];

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, board: &Board, palette: Palette) {
    let right = |text: String| Text::from(text).alignment(Alignment::Right);
    let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"));
    let row = |verdict: &'static str, reason: String, traffic: &Traffic, style: Style| {
        TableRow::new([
            Text::from(verdict),
            Text::from(reason),
            right(traffic.packets.to_string()),
            right(rate(traffic.packets_per_second)),
            right(rate(traffic.bits_per_second)),
        ])
        .style(style)
    };
    let mut rows = Vec::new();
    for verdict in board.stats.iter().flat_map(|stats| &stats.verdicts) {
        let (name, colour) = match verdict.verdict {
            Verdict::Relayed => ("relayed", Color::Green),
            Verdict::Passed => ("passed", Color::Yellow),
            Verdict::Dropped => ("dropped", Color::Red),
        };
        let style = palette.fg(colour).add_modifier(Modifier::BOLD);
        rows.push(row(name, "all".to_owned(), &verdict.total, style));
        for reason in &verdict.reasons {
            let name = clean(&reason.reason).into_owned();
            rows.push(row("", name, &reason.traffic, Style::new()));
        }
    }
    if let Daemon::Up(answer) = &board.daemon {
        for (index, refusal) in answer.status.refusals.iter().enumerate() {
            let verdict = if index == 0 { "refused" } else { "" };
            let cause = clean(&refusal.cause).into_owned();
            let cells = [
                Text::styled(verdict, palette.fg(Color::Red).add_modifier(Modifier::BOLD)),
                Text::from(cause),
                right(refusal.count.to_string()),
            ];
            rows.push(TableRow::new(cells));
        }
    }
    let header = ["VERDICT", "REASON", "PACKETS", "PACKETS/S", "BIT/S"];
    let header = header.into_iter().enumerate().map(|(index, name)| {
        if index < 2 {
            Text::from(name)
        } else {
            right(name.to_owned())
        }
    });
    let header =
        TableRow::new(header).style(Style::new().add_modifier(Modifier::BOLD | Modifier::REVERSED));
    let table = Table::new(rows, WIDTHS).header(header).column_spacing(1);
    frame.render_widget(table, area);
}
