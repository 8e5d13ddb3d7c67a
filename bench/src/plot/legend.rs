//! Names and colours of a plot's lines, above it.

use anyhow::Result;
use plotters::prelude::*;

use super::{COLOURS, Canvas, INK, TEXT, WIDTH, letters, width};

/// Width of a line's sample, and the room around its name, pixels.
const SAMPLE: i32 = 22;
const GAP: i32 = 8;
const ROW: i32 = 2 * TEXT;

/// Draws it, and leaves the rest of the canvas.
pub(super) fn draw<'a>(canvas: &Canvas<'a>, names: &[&str]) -> Result<Canvas<'a>> {
    let style = TextStyle::from(letters(TEXT)).color(&INK);
    let (mut x, mut y) = (0, 0);
    for (name, colour) in names.iter().zip(COLOURS.iter().cycle()) {
        let needs = SAMPLE + 3 * GAP + width(name)? as i32;
        if x > 0 && x + needs > WIDTH as i32 - ROW {
            (x, y) = (0, y + ROW);
        }
        let sample = [(x, y + TEXT / 2), (x + SAMPLE, y + TEXT / 2)];
        canvas.draw(&PathElement::new(sample, colour.stroke_width(3)))?;
        canvas.draw_text(name, &style, (x + SAMPLE + GAP, y))?;
        x += needs;
    }
    Ok(canvas.split_vertically(y + ROW).1)
}
