//! All about one stream.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Paragraph, Sparkline},
};

use super::{Palette, facts};
use crate::{
    listing::{Column, Grade, Row},
    output::clean,
    reception,
    top::{board::Board, history::Point},
};

/// Lines of the facts, and of a course with its title.
const FACTS: u16 = 11;
const COURSE: u16 = 3;

/// One figure of a point.
type Figure = fn(&Point) -> f32;

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, board: &Board, palette: Palette) {
    let Some(row) = board.selected() else {
        frame.render_widget(Paragraph::new("this stream is gone: Esc goes back"), area);
        return;
    };
    let leg = match row.leg {
        Some(0) => "from the first leg",
        Some(_) => "from the second leg",
        None => "no streams yet",
    };
    let block = Block::new()
        .borders(Borders::TOP)
        .title(format!(" pair {}, {leg} ", row.pair));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [above, rate, loss, jitter] = Layout::vertical([
        Constraint::Max(FACTS),
        Constraint::Min(COURSE),
        Constraint::Min(COURSE),
        Constraint::Min(COURSE),
    ])
    .areas(inner);
    let [left, right] =
        Layout::horizontal([Constraint::Percentage(57), Constraint::Percentage(43)])
            .spacing(1)
            .areas(above);
    frame.render_widget(facts(of_call(row, palette), palette), left);
    frame.render_widget(facts(of_packets(row, board, palette), palette), right);
    let points = board.points(row, inner.width.into());
    let courses: [(_, _, _, Figure); 3] = [
        (rate, "packets/s", Column::Rate, |point| point.rate),
        (loss, "loss, %", Column::Loss, |point| point.loss),
        (jitter, "jitter, ms", Column::Jitter, |point| point.jitter),
    ];
    for (area, name, column, value) in courses {
        let values: Vec<f32> = points.iter().map(value).collect();
        course(frame, area, name, column, &values, palette);
    }
}

/// A figure over time, coloured by its worst.
fn course(
    frame: &mut Frame<'_>,
    area: Rect,
    name: &str,
    column: Column,
    values: &[f32],
    palette: Palette,
) {
    let highest = values.iter().copied().fold(0.0, f32::max);
    let now = values.last().copied().unwrap_or_default();
    let title = format!(
        " {name}: {now:.1} now, {highest:.1} highest of {} s ",
        values.len()
    );
    let colour = match Grade::of(column, f64::from(highest)) {
        Some(Grade::Fair) => Color::Yellow,
        Some(Grade::Bad) => Color::Red,
        Some(Grade::Good) | None => Color::Green,
    };
    // Tenths, because the widget takes whole numbers.
    let data: Vec<u64> = values
        .iter()
        .map(|value| (value * 10.0).round() as u64)
        .collect();
    let sparkline = Sparkline::default()
        .block(Block::new().borders(Borders::TOP).title(title))
        .data(data)
        .max(((highest * 12.5).ceil() as u64).max(10))
        .style(palette.fg(colour));
    frame.render_widget(sparkline, area);
}

fn shown(text: Option<&str>) -> Line<'static> {
    Line::from(text.map_or_else(|| "-".to_owned(), |text| clean(text).into_owned()))
}

fn of_call(row: &Row, palette: Palette) -> Vec<(&'static str, Line<'static>)> {
    let address = |address: Option<std::net::SocketAddr>| {
        shown(address.map(|address| address.to_string()).as_deref())
    };
    let state = Span::styled(row.state.name(), palette.state(row.state));
    let mut rows = vec![("state", Line::from(state))];
    if row.why.is_some() {
        rows.push(("why", shown(row.why.as_deref())));
    }
    rows.extend([
        ("from", address(row.from)),
        ("to", address(row.to)),
        ("received at", address(row.local)),
        ("channel", shown(row.channel.as_deref())),
        ("call", shown(row.call.as_deref())),
        ("codec", shown(row.codec.as_deref())),
    ]);
    rows
}

fn of_packets(row: &Row, board: &Board, palette: Palette) -> Vec<(&'static str, Line<'static>)> {
    let figure = |column: Column, unit: &str| {
        let style: Style = palette.graded(column, row.number(column));
        Line::from(Span::styled(format!("{}{unit}", row.figure(column)), style))
    };
    let mut rows = vec![
        ("relayed", figure(Column::Packets, "")),
        ("received", figure(Column::Received, "")),
        ("loss", figure(Column::Loss, " %")),
        ("jitter", figure(Column::Jitter, " ms")),
        ("MOS, estimated", figure(Column::Mos, "")),
    ];
    if let (Some(sample), Some(snapshot)) = (board.sample(row), &board.snapshot) {
        let report = reception::report(&sample.state.reception, snapshot.taken);
        let plain = |text: String| Line::from(text);
        rows.extend([
            ("duplicates", plain(report.duplicates.to_string())),
            ("reordered", plain(report.reordered.to_string())),
            (
                "longest gap",
                plain(format!("{:.1} ms", report.largest_gap_ms)),
            ),
            ("SSRC", shown(report.ssrc.as_deref())),
            ("SSRC changes", plain(report.ssrc_changes.to_string())),
            ("silent", figure(Column::Silent, " ms")),
        ]);
    }
    rows
}
