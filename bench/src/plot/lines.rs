//! Lines through points.

use std::ops::Range;

use anyhow::{Result, ensure};
use plotters::{
    coord::ranged1d::{AsRangedCoord, ValueFormatter},
    prelude::*,
};

use super::{COLOURS, Canvas, GRID, INK, TEXT, legend, letters};
use crate::report::{Axis, Line, shortest};

/// Of the whole picture, pixels.
pub(super) const HEIGHT: u32 = 480;
/// Radius of a point, pixels.
const POINT: i32 = 4;

pub(super) fn draw(canvas: &Canvas<'_>, x: &Axis, y: &Axis, lines: &[Line]) -> Result<()> {
    let names: Vec<_> = lines.iter().map(|line| &line.name[..]).collect();
    let canvas = legend::draw(canvas, &names)?;
    let [across, up] = [(0, x), (1, y)].map(|(which, axis)| {
        let points = lines.iter().flat_map(|line| &line.points);
        range(points.map(|point| point[which]), axis.is_logarithmic)
    });
    let (across, up) = (across?, up?);
    match (x.is_logarithmic, y.is_logarithmic) {
        (false, false) => chart(&canvas, [x, y], across, up, lines),
        (true, false) => chart(&canvas, [x, y], across.log_scale(), up, lines),
        (false, true) => chart(&canvas, [x, y], across, up.log_scale(), lines),
        (true, true) => chart(&canvas, [x, y], across.log_scale(), up.log_scale(), lines),
    }
}

fn chart<X, Y>(canvas: &Canvas<'_>, names: [&Axis; 2], x: X, y: Y, lines: &[Line]) -> Result<()>
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let mut chart = ChartBuilder::on(canvas)
        .margin_right(30)
        .x_label_area_size(50)
        .y_label_area_size(90)
        .build_cartesian_2d(x, y)?;
    let text = TextStyle::from(letters(TEXT)).color(&INK);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .x_desc(&names[0].name)
        .y_desc(&names[1].name)
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|value| shortest(*value))
        .y_label_formatter(&|value| shortest(*value))
        .label_style(text.clone())
        .axis_desc_style(text)
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points = || line.points.iter().map(|&[x, y]| (x, y));
        chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
        chart.draw_series(points().map(|at| Circle::new(at, POINT, colour.filled())))?;
    }
    Ok(())
}

/// What an axis spans. A logarithmic one has no zero; any other begins there.
fn range(values: impl Iterator<Item = f64>, is_logarithmic: bool) -> Result<Range<f64>> {
    let values: Vec<_> = values.filter(|value| value.is_finite()).collect();
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    ensure!(!values.is_empty(), "no points");
    if is_logarithmic {
        ensure!(lowest > 0.0, "a logarithmic axis has no place for {lowest}");
        return Ok(lowest / 1.5..highest * 1.5);
    }
    let end = if highest > 0.0 { highest * 1.05 } else { 1.0 };
    Ok(lowest.min(0.0)..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_spans_its_points() {
        let linear = range([20.0, 100.0].into_iter(), false).expect("points");
        assert_eq!(linear, 0.0..105.0);
        let logarithmic = range([3.0, 30.0].into_iter(), true).expect("points");
        assert_eq!(logarithmic, 2.0..45.0);
        assert!(range([0.0].into_iter(), true).is_err());
        assert!(range([].into_iter(), false).is_err());
    }
}
