//! What stands on the screen.

mod reasons;
mod stream;
mod streams;

use ratatui::{
    Frame,
    layout::{Constraint, Flex, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Clear, Paragraph, Wrap},
};

use super::{
    board::Board,
    controls::{Controls, Page},
    daemon::Daemon,
};
use crate::{
    control::model::AmiState,
    listing::{Column, Grade, RowState},
    output::clean,
};

/// Colours, or what tells the same without them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Palette {
    /// Whether there are colours.
    pub colour: bool,
}

impl Palette {
    fn fg(self, colour: Color) -> Style {
        if self.colour {
            Style::new().fg(colour)
        } else {
            Style::new()
        }
    }

    fn state(self, state: RowState) -> Style {
        self.fg(match state {
            RowState::Offloaded => Color::Green,
            RowState::Watching | RowState::Waiting => Color::Yellow,
            RowState::Suspended | RowState::Refused => Color::Red,
        })
    }

    fn graded(self, column: Column, value: Option<f64>) -> Style {
        match value.and_then(|value| Grade::of(column, value)) {
            Some(Grade::Good) => self.fg(Color::Green),
            Some(Grade::Fair) => self.fg(Color::Yellow),
            Some(Grade::Bad) => self.fg(Color::Red).add_modifier(Modifier::BOLD),
            None => Style::new(),
        }
    }

    /// Of the row that is chosen.
    fn chosen(self) -> Style {
        let bold = Style::new().add_modifier(Modifier::BOLD);
        if self.colour {
            bold.bg(Color::DarkGray)
        } else {
            bold.add_modifier(Modifier::REVERSED)
        }
    }

    fn quiet(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    fn alarm(self) -> Style {
        self.fg(Color::Red)
            .add_modifier(Modifier::BOLD | Modifier::REVERSED)
    }
}

/// Lines above the page.
const HEAD: u16 = 3;

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, board: &Board, controls: &mut Controls, palette: Palette) {
    let [head, page, foot] = Layout::vertical([
        Constraint::Max(HEAD),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    controls.width = page.width;
    frame.render_widget(Paragraph::new(header(board, palette, head.width)), head);
    match controls.page {
        Page::Streams => streams::draw(frame, page, board, controls, palette),
        Page::Stream => stream::draw(frame, page, board, palette),
        Page::Reasons => reasons::draw(frame, page, board, palette),
    }
    frame.render_widget(Paragraph::new(footer(controls, palette)), foot);
    if controls.help {
        help(frame, palette);
    }
}

/// Interface, daemon and totals.
fn header(board: &Board, palette: Palette, width: u16) -> Vec<Line<'static>> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let interface = board
        .snapshot
        .as_ref()
        .map_or_else(String::new, |snapshot| {
            format!(" {}", clean(&snapshot.interface))
        });
    let mut first = vec![Span::styled(format!("relay-user top{interface}"), bold)];
    let mut add = |text: String, style: Style| {
        first.push(Span::raw("  "));
        first.push(Span::styled(text, style));
    };
    let lease = board.snapshot.as_ref().map(|snapshot| snapshot.lease_ms());
    match lease {
        Some(0) => add("lease over: the PBX relays".to_owned(), palette.alarm()),
        Some(ms) => add(format!("lease {:.1} s", ms as f64 / 1000.0), Style::new()),
        None => {}
    }
    let mut second = Line::default();
    match (&board.blind, &board.daemon) {
        (Some(why), _) => second = Line::styled(clean(why).into_owned(), palette.alarm()),
        (None, Daemon::Away(why)) => {
            add(
                "no daemon: read from the pinned maps".to_owned(),
                palette.alarm(),
            );
            second = Line::styled(clean(why).into_owned(), palette.fg(Color::Red));
        }
        (None, Daemon::Unasked) => {}
        (None, Daemon::Up(answer)) => {
            let status = &answer.status;
            add(status.mode.name().to_owned(), Style::new());
            match &status.ami {
                Some(ami) if ami.state == AmiState::Down => {
                    add("AMI down".to_owned(), palette.alarm());
                    let cause = ami.cause.as_deref().unwrap_or_default();
                    second = Line::styled(clean(cause).into_owned(), palette.fg(Color::Red));
                }
                Some(_) => add("AMI up".to_owned(), palette.fg(Color::Green)),
                None => {}
            }
        }
    }
    if second.width() == 0 {
        second = census(board, palette);
    }
    vec![first.into(), second, traffic(board, palette, width)]
}

fn census(board: &Board, palette: Palette) -> Line<'static> {
    let mut spans = vec![Span::raw("streams ")];
    if let Some(snapshot) = &board.snapshot {
        let used = format!("{} of {}: ", snapshot.streams.len(), snapshot.max_streams);
        spans.push(Span::raw(used));
    }
    for (index, (state, count)) in board.census().into_iter().enumerate() {
        if index != 0 {
            spans.push(Span::raw(", "));
        }
        let style = if count == 0 {
            palette.quiet()
        } else {
            palette.state(state)
        };
        spans.push(Span::styled(format!("{count} {}", state.name()), style));
    }
    spans.into()
}

/// Packets a second by verdict, and how those relayed went.
fn traffic(board: &Board, palette: Palette, width: u16) -> Line<'static> {
    let mut spans = vec![Span::raw("packets/s ")];
    for row in board.stats.iter().flat_map(|stats| &stats.verdicts) {
        let (name, colour) = match row.verdict {
            crate::control::model::Verdict::Relayed => ("relayed", Color::Green),
            crate::control::model::Verdict::Passed => ("passed", Color::Yellow),
            crate::control::model::Verdict::Dropped => ("dropped", Color::Red),
        };
        let rate = row.total.packets_per_second;
        let text = rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"));
        spans.push(Span::styled(format!("{text} {name}  "), palette.fg(colour)));
    }
    let line = Line::from(spans);
    let room = usize::from(width).saturating_sub(line.width()).min(60);
    let skipped = board.relayed.len().saturating_sub(room);
    let course = bars(board.relayed.iter().skip(skipped).copied(), 1.0);
    let mut line = line;
    line.push_span(Span::styled(course, palette.fg(Color::Green)));
    line
}

/// A bar of eighths for each value, six for the highest, so that rows stay apart; fewer where that is
/// below `least`.
fn bars(values: impl Iterator<Item = f64> + Clone, least: f64) -> String {
    const BARS: [char; 7] = [' ', '▁', '▂', '▃', '▄', '▅', '▆'];
    let highest = values.clone().fold(least, f64::max);
    values
        .map(|value| BARS[((value / highest * 6.0).round() as usize).min(6)])
        .collect()
}

/// The keys that matter here, the filter that is being typed, or what is wrong with it.
fn footer(controls: &Controls, palette: Palette) -> Line<'static> {
    if let Some(error) = &controls.error {
        return Line::styled(clean(error).into_owned(), palette.alarm());
    }
    if let Some(typing) = &controls.typing {
        return Line::from(vec![
            Span::styled("filter: ", Style::new().add_modifier(Modifier::BOLD)),
            Span::raw(clean(typing).into_owned()),
            Span::styled(" ", Style::new().add_modifier(Modifier::REVERSED)),
        ]);
    }
    let keys: &[(&str, &str)] = match controls.page {
        Page::Streams => &[
            ("?", "help"),
            ("q", "quit"),
            ("↑↓", "choose"),
            ("Enter", "stream"),
            ("s", "sort"),
            ("r", "reverse"),
            ("/", "filter"),
            ("w", "reasons"),
        ],
        Page::Stream => &[
            ("?", "help"),
            ("q", "quit"),
            ("Esc", "back"),
            ("Tab", "opposite direction"),
            ("↑↓", "next"),
        ],
        Page::Reasons => &[("?", "help"), ("q", "quit"), ("Esc", "back")],
    };
    let mut spans = Vec::new();
    for (key, what) in keys {
        spans.push(Span::styled(
            *key,
            Style::new().add_modifier(Modifier::BOLD),
        ));
        spans.push(Span::raw(format!(" {what}  ")));
    }
    spans.into()
}

const HELP: &str = "\
↑ ↓ j k          choose a row
PgUp PgDn g G    by screens, first, last
Enter →          all about the chosen stream
Tab              there: its opposite direction
Esc ←            back; on the table: no filter
s >   S <        sort by the next, previous column
r                the other way round
/                filter: words and conditions, such as
                 alice loss>1 jitter>20 mos<3.5
                 state=watching rate<40 why=proof
w                reasons: what became of packets
q Ctrl-C         quit

loss and jitter: yellow from 1 % and 20 ms, red from
3 % and 50 ms; MOS: yellow below 4.0, red below 3.6";

fn help(frame: &mut Frame<'_>, palette: Palette) {
    let area = frame.area();
    let [area] = Layout::horizontal([Constraint::Max(56)])
        .flex(Flex::Center)
        .areas(area);
    let [area]: [Rect; 1] = Layout::vertical([Constraint::Max(17)])
        .flex(Flex::Center)
        .areas(area);
    frame.render_widget(Clear, area);
    let block = Block::bordered()
        .title(" keys ")
        .border_style(palette.fg(Color::Cyan));
    frame.render_widget(Paragraph::new(HELP).block(block), area);
}

/// Lines of a name and a value.
fn facts(rows: Vec<(&'static str, Line<'static>)>, palette: Palette) -> Paragraph<'static> {
    let lines: Vec<Line<'static>> = rows
        .into_iter()
        .map(|(name, value)| {
            let mut line = Line::from(Span::styled(format!("{name:15}"), palette.quiet()));
            line.extend(value.spans);
            line
        })
        .collect();
    Paragraph::new(lines).wrap(Wrap { trim: false })
}
