//! What the commands print for people. Programs take `--json`.

pub mod doctor;
mod events;
mod pairs;
pub mod qos;
mod stats;
mod status;

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, IsTerminal as _},
};

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};

pub use self::{
    events::{event, events_header},
    pairs::{added, pair, pairs, removed},
    stats::stats,
    status::status,
};
use crate::control::model::{Detached, Found, Verdict};

/// How the output looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Tables with lines, fitted to the width of the terminal; else plain aligned columns.
    pub lines: bool,
    /// States in colour.
    pub colour: bool,
}

impl Style {
    /// Aligned text, fit for a file or a pipe.
    pub const PLAIN: Self = Self {
        lines: false,
        colour: false,
    };

    /// What suits standard output: lines and colour on a terminal, and no colour where `NO_COLOR` is
    /// set and not empty (<https://no-color.org>).
    pub fn of_stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        let refused = std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
        Self {
            lines: terminal,
            colour: terminal && !refused,
        }
    }

    fn table(self, header: &[&str]) -> Table {
        let mut table = Table::new();
        table.set_header(header);
        if self.lines {
            table.load_style(presets::UTF8_FULL_CONDENSED);
            table.set_content_arrangement(ContentArrangement::Dynamic);
            if self.colour {
                table.enforce_styling();
            }
        } else {
            table.force_no_tty();
            table.load_style(presets::NOTHING);
            table.set_content_arrangement(ContentArrangement::Disabled);
            for column in table.column_iter_mut() {
                column.set_padding((0, 2));
            }
        }
        table
    }

    /// The same without lines, however wide.
    fn columns(self, header: &[&str]) -> Table {
        let mut table = Self::PLAIN.table(header);
        if self.colour {
            table.enforce_styling();
        }
        table
    }

    /// Columns of the terminal; 80 where there is none.
    fn width(self) -> usize {
        let terminal = self.lines.then(|| crossterm::terminal::size().ok());
        terminal
            .flatten()
            .map_or(80, |(width, _)| usize::from(width))
    }

    fn paint(self, cell: Cell, colour: Color) -> Cell {
        if self.colour { cell.fg(colour) } else { cell }
    }
}

/// What a detach ended: one line.
pub fn detached(detached: &Detached) -> String {
    let interface = clean(&detached.interface);
    match detached.found {
        Found::Running => {
            format!(
                "detached from {interface}; pairs given back to the PBX: {}\n",
                detached.pairs
            )
        }
        Found::LeftBehind => {
            format!("no relay daemon ran on {interface}; removed what it had left in the kernel\n")
        }
    }
}

/// Names and values in two columns.
#[derive(Default)]
struct Facts(Vec<(&'static str, String)>);

impl Facts {
    fn add(&mut self, name: &'static str, value: impl ToString) {
        self.0.push((name, clean(&value.to_string()).into_owned()));
    }

    fn drawn(&self) -> String {
        let width = self
            .0
            .iter()
            .map(|(name, _)| name.len())
            .max()
            .unwrap_or_default();
        let mut lines = String::new();
        for (name, value) in &self.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(lines, "{name:width$}  {value}");
        }
        lines
    }
}

/// What a verdict is called, and its colour.
const fn verdict(verdict: Verdict) -> (&'static str, Color) {
    match verdict {
        Verdict::Relayed => ("relayed", Color::Green),
        Verdict::Passed => ("passed", Color::Yellow),
        Verdict::Dropped => ("dropped", Color::Red),
    }
}

fn drawn(table: &Table) -> String {
    table.trim_fmt() + "\n"
}

fn number(number: u64) -> Cell {
    Cell::new(number).set_alignment(CellAlignment::Right)
}

fn text(text: &str) -> Cell {
    Cell::new(clean(text))
}

/// Without control characters. Channel names and causes come from the network, and must neither
/// break a line nor drive the reader's terminal.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    // U+202A–U+202E and U+2066–U+2069 reorder what stands around them.
    let unfit =
        |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if text.contains(unfit) {
        Cow::Owned(text.replace(unfit, "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
pub(crate) mod examples {
    //! What docs/api.md shows, and tables taken apart.

    /// The examples of docs/api.md, so that the two descriptions of one thing agree.
    pub(crate) fn example<T: serde::de::DeserializeOwned>(heading: &str) -> T {
        let description = include_str!("../../docs/api.md");
        let section = description
            .split("\n## ")
            .find(|section| section.starts_with(heading))
            .expect("section");
        let block = section.split("```json\n").nth(1).expect("block");
        serde_json::from_str(block.split("```").next().expect("end")).expect("example")
    }

    pub(crate) fn rows(text: &str) -> Vec<Vec<&str>> {
        text.lines()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect()
    }
}
