//! Draws what a suite has found: an SVG of each plot, and the same as a PNG.
//!
//! The letters are those of a font that comes with the program, so that a picture is the same wherever it is drawn.

mod bars;
mod legend;
mod lines;

use std::{fs, path::Path};

use anyhow::{Context as _, Result, anyhow};
use plotters::{
    prelude::*,
    style::{FontDesc, FontStyle, register_font},
};
use resvg::{tiny_skia, usvg};

use crate::report::{Plot, PlotKind, grouped};

/// What is drawn on.
type Canvas<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Width of a picture, pixels.
const WIDTH: u32 = 860;
/// Around everything, pixels.
const MARGIN: u32 = 16;
/// Pixels of the PNG for one of the SVG.
const SCALE: f32 = 2.0;

/// Height of letters, pixels.
const TITLE: i32 = 19;
const TEXT: i32 = 14;

/// The widest of the usual ones, so that the text has room in any.
const FONT: &str = "DejaVu Sans, Verdana, sans-serif";

/// Painted, for a page may be dark.
const BACKGROUND: RGBColor = RGBColor(0xfc, 0xfc, 0xfd);
const INK: RGBColor = RGBColor(0x1f, 0x24, 0x2c);
const GRID: RGBColor = RGBColor(0xdd, 0xe1, 0xe7);
/// Told apart by colour-blind people too (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x4d, 0x4d, 0x4d),
];

/// Draws a plot into a folder, as SVG and PNG.
///
/// # Errors
/// The plot holds nothing to draw, or a file cannot be written.
pub(crate) fn draw(plot: &Plot, folder: &Path) -> Result<()> {
    let svg = svg(plot).with_context(|| format!("draw {}", plot.file))?;
    let path = folder.join(&plot.file);
    let write = |ending, content: &[u8]| {
        let path = path.with_extension(ending);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))
    };
    write("svg", svg.as_bytes())?;
    write("png", &png(&svg)?)
}

fn svg(plot: &Plot) -> Result<String> {
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| anyhow!("the font is none"))?;
    let height = match &plot.kind {
        PlotKind::Bars { bars, .. } => bars::height(bars.len()),
        PlotKind::Lines { .. } => lines::HEIGHT,
    };
    let mut svg = String::new();
    {
        let canvas = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        canvas.fill(&BACKGROUND)?;
        let canvas = canvas.margin(MARGIN, MARGIN, MARGIN, MARGIN);
        let title = TextStyle::from(letters(TITLE)).color(&INK);
        canvas.draw_text(&plot.title, &title, (0, 0))?;
        let (_, canvas) = canvas.split_vertically(2 * TITLE);
        match &plot.kind {
            PlotKind::Bars { axis, bars } => bars::draw(&canvas, axis, bars)?,
            PlotKind::Lines { x, y, lines } => lines::draw(&canvas, x, y, lines)?,
        }
        canvas.present()?;
    }
    Ok(svg)
}

fn png(svg: &str) -> Result<Vec<u8>> {
    let mut options = usvg::Options::default();
    options
        .fontdb_mut()
        .load_font_data(dejavu::sans::regular().to_vec());
    let tree = usvg::Tree::from_str(svg, &options)?;
    let size = tree.size().to_int_size().scale_by(SCALE);
    let size = size.context("the picture has no size")?;
    let mut picture = tiny_skia::Pixmap::new(size.width(), size.height()).context("no memory")?;
    let scaled = tiny_skia::Transform::from_scale(SCALE, SCALE);
    resvg::render(&tree, scaled, &mut picture.as_mut());
    Ok(picture.encode_png()?)
}

fn letters(height: i32) -> FontDesc<'static> {
    (FONT, height).into_font()
}

/// Width of a text in the usual size, pixels.
fn width(text: &str) -> Result<u32> {
    let (width, _) = letters(TEXT).box_size(text)?;
    Ok(width)
}

/// A figure in three digits or more.
fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        0.0 => 0,
        1.0.. => 2,
        _ => 3,
    };
    grouped(value, decimals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Axis, Bar, Line};

    fn axis(name: &str, is_logarithmic: bool) -> Axis {
        Axis {
            name: name.to_owned(),
            is_logarithmic,
        }
    }

    fn lines(logarithmic: [bool; 2]) -> Plot {
        let line = |name: &str, factor: f64| Line {
            name: name.to_owned(),
            points: [1_000.0, 10_000.0, 100_000.0, 1_000_000.0]
                .map(|x| [x, x * factor])
                .to_vec(),
        };
        Plot {
            file: "lines".to_owned(),
            title: "Cost over streams".to_owned(),
            kind: PlotKind::Lines {
                x: axis("streams", logarithmic[0]),
                y: axis("ns a packet", logarithmic[1]),
                lines: vec![line("ours", 0.1), line("a relay in userspace", 0.3)],
            },
        }
    }

    #[test]
    fn every_kind_of_plot_can_be_drawn_and_always_alike() {
        let bars = Plot {
            file: "bars".to_owned(),
            title: "Packets".to_owned(),
            kind: PlotKind::Bars {
                axis: "ns".to_owned(),
                bars: vec![Bar {
                    name: "ours < floor & more".to_owned(),
                    value: 3.0,
                    lowest: 2.0,
                    highest: 4.0,
                }],
            },
        };
        let axes = [[false, false], [false, true], [true, false], [true, true]];
        for plot in axes.map(lines).iter().chain([&bars]) {
            let svg = svg(plot).expect("drawn");
            assert_eq!(super::svg(plot).expect("drawn"), svg);
            let picture = png(&svg).expect("drawn");
            assert!(picture.starts_with(b"\x89PNG"), "{}", plot.title);
        }
    }

    #[test]
    fn nothing_is_not_drawn() {
        let mut plot = lines([true, true]);
        plot.kind = PlotKind::Bars {
            axis: String::new(),
            bars: vec![],
        };
        assert!(svg(&plot).is_err());
    }

    #[test]
    fn figures_have_the_digits_that_tell() {
        let figures = [1234.5, 99.96, 2.349, 0.0125, 0.0].map(figure);
        assert_eq!(figures, ["1,234", "100.0", "2.35", "0.013", "0"]);
    }
}
