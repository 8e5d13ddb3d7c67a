//! The table of streams.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Rect},
    style::{Modifier, Style},
    text::{Line, Text},
    widgets::{Cell, Paragraph, Row as TableRow, Table},
};

use super::{Palette, bars};
use crate::{
    listing::{Column, Row},
    output::clean,
    top::{
        board::Board,
        controls::Controls,
        daemon::Daemon,
        layout::{Shown, columns},
    },
};

pub(super) fn draw(
    frame: &mut Frame<'_>,
    area: Rect,
    board: &Board,
    controls: &mut Controls,
    palette: Palette,
) {
    let room = usize::from(area.height.saturating_sub(1));
    controls.rows = room;
    let columns = columns(area.width);
    let header = columns.iter().map(|(shown, _)| title(*shown, board));
    let header =
        TableRow::new(header).style(Style::new().add_modifier(Modifier::BOLD | Modifier::REVERSED));
    let position = board.position().unwrap_or_default();
    // The chosen row is on the screen, with the rest of its page.
    let first = position - position.checked_rem(room).unwrap_or_default();
    let shown = board.shown();
    let rows = shown.iter().enumerate().skip(first).take(room);
    let rows = rows.map(|(index, row)| {
        let cells = columns
            .iter()
            .map(|(shown, width)| cell(*shown, *width, row, board, palette));
        let style = if index == position {
            palette.chosen()
        } else {
            Style::new()
        };
        TableRow::new(cells.collect::<Vec<_>>()).style(style)
    });
    let widths = columns.iter().map(|(_, width)| Constraint::Length(*width));
    let table = Table::new(rows, widths).header(header).column_spacing(1);
    frame.render_widget(table, area);
    if shown.is_empty() && area.height > 2 {
        let message = match (&board.daemon, controls.filter.is_empty()) {
            (_, false) => format!(
                "no stream fits the filter `{}`: Esc ends it",
                clean(&controls.filter)
            ),
            (Daemon::Unasked, true) => "looking".to_owned(),
            (_, true) => "no streams".to_owned(),
        };
        let below = Rect {
            y: area.y + 2,
            height: 1,
            ..area
        };
        frame.render_widget(Paragraph::new(message), below);
    }
}

fn title(shown: Shown, board: &Board) -> Text<'static> {
    let Shown::Value(column) = shown else {
        return Text::raw("COURSE");
    };
    let arrow = match (board.order.column == column, board.order.descending) {
        (false, _) => "",
        (true, false) => "▲",
        (true, true) => "▼",
    };
    let name = match column {
        Column::Rate => "PKT/S",
        Column::Loss => "LOSS%",
        Column::Jitter => "JIT ms",
        column => return aligned(column, format!("{}{arrow}", column.name().to_uppercase())),
    };
    aligned(column, format!("{name}{arrow}"))
}

fn aligned(column: Column, text: String) -> Text<'static> {
    let alignment = if column.is_number() {
        Alignment::Right
    } else {
        Alignment::Left
    };
    Text::from(text).alignment(alignment)
}

fn cell(shown: Shown, width: u16, row: &Row, board: &Board, palette: Palette) -> Cell<'static> {
    let column = match shown {
        Shown::Value(column) => column,
        Shown::Course => {
            let points = board.points(row, width.into());
            let course = bars(points.iter().map(|point| f64::from(point.rate)), 1.0);
            return Cell::new(Line::styled(course, palette.state(row.state)));
        }
    };
    let text = match column {
        // The leg is the first or the second.
        Column::Id => match row.leg {
            Some(leg) => format!("{}/{}", row.pair, leg + 1),
            None => row.pair.to_string(),
        },
        Column::From => clean(&row.sender()).into_owned(),
        Column::Why => clean(row.why.as_deref().unwrap_or_default()).into_owned(),
        column if column.is_number() => row.figure(column),
        column => row
            .text(column)
            .map_or_else(|| "-".to_owned(), |text| clean(&text).into_owned()),
    };
    let style = match column {
        Column::State => palette.state(row.state),
        column => palette.graded(column, row.number(column)),
    };
    Cell::new(aligned(column, text).style(style))
}
