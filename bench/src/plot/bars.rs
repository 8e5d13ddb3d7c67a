//! Bars from left to right, one below the other: their names are long.

use anyhow::{Context as _, Result};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{COLOURS, Canvas, GRID, INK, TEXT, figure, letters, width};
use crate::report::{Bar, shortest};

/// Of a bar with the room around it, and of all else in the picture, pixels.
const BAR: u32 = 30;
const REST: u32 = 140;
/// Half of the line across an end of the range, pixels.
const CAP: i32 = 5;
/// Beside a bar, pixels.
const GAP: i32 = 9;
/// Of a bar, in places.
const THICKNESS: f64 = 0.6;

/// Of the whole picture, pixels.
pub(super) fn height(bars: usize) -> u32 {
    REST + BAR * bars as u32
}

pub(super) fn draw(canvas: &Canvas<'_>, axis: &str, bars: &[Bar]) -> Result<()> {
    let largest = bars.iter().map(|bar| bar.value.max(bar.highest));
    let largest = largest.fold(0.0, f64::max);
    let names: Result<Vec<_>> = bars.iter().map(|bar| width(&bar.name)).collect();
    let names = names?.into_iter().max().context("no bars")?;
    // The figures stand at the right of the bars.
    let end = if largest > 0.0 { largest * 1.16 } else { 1.0 };
    let mut chart = ChartBuilder::on(canvas)
        .x_label_area_size(50)
        .y_label_area_size(names + 14)
        .build_cartesian_2d(0.0..end, 0.0..bars.len() as f64)?;
    let text = TextStyle::from(letters(TEXT)).color(&INK);
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .x_desc(axis)
        .x_labels(8)
        .x_label_formatter(&|value| shortest(*value))
        .label_style(text.clone())
        .axis_desc_style(text.clone())
        .draw()?;
    let aside = |to| text.pos(Pos::new(to, VPos::Center));
    // The first is on top.
    for (place, bar) in bars.iter().rev().enumerate() {
        let middle = place as f64 + 0.5;
        let label = |at, text, distance, to| {
            EmptyElement::at((at, middle)) + Text::new(text, (distance, 0), aside(to))
        };
        let cap =
            |at| EmptyElement::at((at, middle)) + PathElement::new([(0, -CAP), (0, CAP)], INK);
        let body = [
            (0.0, middle - THICKNESS / 2.0),
            (bar.value, middle + THICKNESS / 2.0),
        ];
        chart.draw_series([Rectangle::new(body, COLOURS[0].mix(0.75).filled())])?;
        let range = [(bar.lowest, middle), (bar.highest, middle)];
        chart.draw_series([PathElement::new(range, INK)])?;
        chart.draw_series([cap(bar.lowest), cap(bar.highest)])?;
        let figure = figure(bar.value);
        chart.draw_series([
            label(0.0, bar.name.clone(), -GAP, HPos::Right),
            label(bar.value.max(bar.highest), figure, GAP, HPos::Left),
        ])?;
    }
    chart.draw_series([PathElement::new(
        [(0.0, 0.0), (0.0, bars.len() as f64)],
        INK,
    )])?;
    Ok(())
}
