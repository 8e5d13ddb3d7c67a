//! What a suite has found, in one form for all: tables, plots and targets. It is kept as JSON, and everything that is
//! shown is made from that.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    io::ErrorKind,
    ops::RangeBounds,
    path::Path,
};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, presets::ASCII_MARKDOWN};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};

/// What a suite has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Name of the suite, and of the file.
    pub(crate) suite: String,
    /// What it is about, in a few words.
    pub(crate) title: String,
    /// The command that measures it again.
    pub(crate) command: String,
    pub(crate) machine: Machine,
    /// Paragraphs about what was done, and how to read the figures.
    pub(crate) method: Vec<String>,
    pub(crate) tables: Vec<Table>,
    pub(crate) plots: Vec<Plot>,
    pub(crate) targets: Vec<Target>,
}

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    /// Processors that are online.
    pub(crate) processors: usize,
}

impl Machine {
    /// The one that this runs on.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub(crate) fn here() -> Result<Self> {
        let text = fs::read_to_string("/proc/cpuinfo").context("processors")?;
        let model = text.lines().find_map(|line| {
            line.strip_prefix("model name")
                .and_then(|rest| rest.split_once(':'))
                .map(|(_, name)| name.trim().to_owned())
        });
        Ok(Self {
            kernel: uname()?.release().to_string_lossy().into_owned(),
            processor: model.unwrap_or_else(|| "unknown".to_owned()),
            processors: text
                .lines()
                .filter(|line| line.starts_with("processor"))
                .count(),
        })
    }
}

impl Display for Machine {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            kernel,
            processor,
            processors,
        } = self;
        write!(f, "{processors} × {processor}, Linux {kernel}")
    }
}

/// Rows of figures under the same headings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Table {
    pub(crate) title: String,
    /// Heading of the rows' names.
    pub(crate) of: String,
    pub(crate) columns: Vec<Column>,
    pub(crate) rows: Vec<Row>,
}

/// A column of figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Column {
    /// With its unit, as in `ns a packet`.
    pub(crate) name: String,
    /// Digits behind the point that are shown.
    pub(crate) decimals: usize,
}

impl Column {
    pub(crate) fn new(name: &str, decimals: usize) -> Self {
        Self {
            name: name.to_owned(),
            decimals,
        }
    }
}

/// Figures of one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// By column; none where there is nothing to measure.
    pub(crate) cells: Vec<Option<f64>>,
}

/// Figures as a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plot {
    /// Name of the picture's files, without an ending.
    pub(crate) file: String,
    pub(crate) title: String,
    pub(crate) kind: PlotKind,
}

/// What a picture is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum PlotKind {
    /// One bar for each thing, all from zero.
    Bars {
        /// With its unit.
        axis: String,
        bars: Vec<Bar>,
    },
    /// Lines through points.
    Lines { x: Axis, y: Axis, lines: Vec<Line> },
}

/// An axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Axis {
    /// With its unit.
    pub(crate) name: String,
    pub(crate) is_logarithmic: bool,
}

/// A bar with the range that its figure was found in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

/// A line through points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<[f64; 2]>,
}

/// A figure that is to be reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) what: String,
    pub(crate) bound: Bound,
    pub(crate) measured: f64,
    /// Digits behind the point that are shown.
    pub(crate) decimals: usize,
    /// What stops it, where it is not reached.
    pub(crate) obstacle: Option<String>,
}

/// What a figure is to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    pub(crate) fn is_met(&self) -> bool {
        match self.bound {
            Bound::AtMost(limit) => self.measured <= limit,
            Bound::AtLeast(limit) => self.measured >= limit,
        }
    }
}

/// A measured figure and how far it was spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

impl Spread {
    /// None of no samples.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median: *sorted.get(sorted.len() / 2)?,
            lowest: *sorted.first()?,
            highest: *sorted.last()?,
        })
    }
}

impl Display for Bound {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "≤ {}", shortest(*limit)),
            Self::AtLeast(limit) => write!(f, "≥ {}", shortest(*limit)),
        }
    }
}

impl Table {
    /// As Markdown, which reads well on a terminal too.
    pub(crate) fn markdown(&self) -> String {
        let headings = self.columns.iter().map(|column| &column.name[..]);
        let rows = self.rows.iter().map(|row| {
            let cells = row.cells.iter().zip(&self.columns).map(|(cell, column)| {
                cell.map_or_else(|| "–".to_owned(), |value| grouped(value, column.decimals))
            });
            [row.name.clone()].into_iter().chain(cells).collect()
        });
        markdown([&self.of[..]].into_iter().chain(headings), rows, 1..)
    }

    /// The figures of a column by the rows' names; none where there is no such column.
    pub(crate) fn column(&self, name: &str) -> Option<Vec<(&str, f64)>> {
        let column = self.columns.iter().position(|column| column.name == name)?;
        let figures = self.rows.iter().filter_map(|row| {
            let figure = row.cells.get(column).copied().flatten()?;
            Some((&row.name[..], figure))
        });
        Some(figures.collect())
    }
}

/// A Markdown table, with figures in some columns.
pub(crate) fn markdown<'a>(
    headings: impl Iterator<Item = &'a str>,
    rows: impl Iterator<Item = Vec<String>>,
    figures: impl RangeBounds<usize>,
) -> String {
    // Ends a cell, also where it is code.
    let escaped = |text: &str| text.replace('|', "\\|");
    let mut table = comfy_table::Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(headings.map(escaped));
    for row in rows {
        table.add_row(row.iter().map(|cell| escaped(cell)));
    }
    let columns = table.column_iter_mut().enumerate();
    for (_, column) in columns.filter(|(index, _)| figures.contains(index)) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A figure with its thousands set apart.
pub(crate) fn grouped(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (sign, digits) = match text.strip_prefix('-') {
        // Where all that was left of it has been rounded away, so is its sign.
        Some(digits) if digits.contains(|digit: char| matches!(digit, '1'..='9')) => ("-", digits),
        Some(digits) => ("", digits),
        None => ("", &text[..]),
    };
    let (whole, fraction) = digits.split_at(digits.find('.').unwrap_or(digits.len()));
    let mut grouped = String::from(sign);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + fraction
}

/// A figure with as many digits as it needs, up to three behind the point.
pub(crate) fn shortest(value: f64) -> String {
    let decimals = [0, 1, 2].into_iter().find(|&decimals| {
        let steps = value * 10_f64.powi(decimals);
        (steps - steps.round()).abs() < 1e-6
    });
    grouped(value, decimals.unwrap_or(3) as usize)
}

impl Report {
    /// Shows its tables and targets on standard output.
    pub(crate) fn print(&self) {
        println!("{}\n", self.title);
        for table in &self.tables {
            println!("{}:\n\n{}\n", table.title, table.markdown());
        }
        for target in &self.targets {
            let measured = grouped(target.measured, target.decimals);
            let verdict = if target.is_met() { "met" } else { "MISSED" };
            println!(
                "{verdict:>6}  {}: {measured} ({})",
                target.what, target.bound
            );
        }
    }

    /// Writes it into a folder, in place of what the suite found before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(format!("{}.json", self.suite));
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// What a suite has found before; none where it has not been run.
    ///
    /// # Errors
    /// The file holds something else.
    pub(crate) fn read(folder: &Path, suite: &str) -> Result<Option<Self>> {
        let path = folder.join(format!("{suite}.json"));
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let report = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is not of this version: run `cargo xtask bench {suite}`",
                path.display()
            )
        })?;
        Ok(Some(report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        for (value, decimals, text) in [
            (0.0, 0, "0"),
            (999.0, 0, "999"),
            (1000.0, 1, "1,000.0"),
            (-1_234_567.891, 2, "-1,234,567.89"),
            (-0.4, 0, "0"),
        ] {
            assert_eq!(grouped(value, decimals), text);
        }
    }

    #[test]
    fn a_target_is_met_at_its_bound() {
        let target = |bound, measured| Target {
            what: String::new(),
            bound,
            measured,
            decimals: 0,
            obstacle: None,
        };
        assert!(target(Bound::AtMost(2.5), 2.5).is_met());
        assert!(!target(Bound::AtMost(2.5), 2.51).is_met());
        assert!(target(Bound::AtLeast(4.5), 4.5).is_met());
        assert!(!target(Bound::AtLeast(4.5), 4.49).is_met());
    }

    #[test]
    fn the_median_is_the_middle_of_what_was_measured() {
        let spread = Spread::of(&[3.0, 1.0, 2.0]).expect("samples");
        assert_eq!(
            (spread.lowest, spread.median, spread.highest),
            (1.0, 2.0, 3.0)
        );
        assert_eq!(Spread::of(&[]), None);
    }
}
