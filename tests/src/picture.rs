//! A terminal's screen as a picture (SVG), as it would look in a dark window.

use std::fmt::Write as _;

use vt100::{Cell, Color, Screen};

/// Size of a cell and of the letters in it, pixels.
const WIDTH: f32 = 8.4;
const HEIGHT: f32 = 18.0;
const LETTERS: f32 = 14.0;
/// Around the screen.
const MARGIN: f32 = 14.0;

const BACKGROUND: &str = "#14161b";
const FOREGROUND: &str = "#d8dbe2";

/// The 16 colours that have numbers on every terminal (ECMA-48 and aixterm).
const NUMBERED: [&str; 16] = [
    "#3b4048", "#ef6b73", "#8ccf7e", "#e5c76b", "#67b0e8", "#c47fd5", "#6cbfbf", "#d8dbe2",
    "#5c6370", "#f78f97", "#a6e09a", "#f0d98c", "#8cc8f5", "#d6a0e4", "#8fd6d6", "#ffffff",
];

/// How a cell is drawn.
#[derive(Clone, PartialEq)]
struct Look {
    foreground: String,
    background: String,
    bold: bool,
    dim: bool,
    underline: bool,
}

impl Look {
    fn of(cell: &Cell) -> Self {
        let foreground = colour(cell.fgcolor(), FOREGROUND);
        let background = colour(cell.bgcolor(), BACKGROUND);
        let (foreground, background) = if cell.inverse() {
            (background, foreground)
        } else {
            (foreground, background)
        };
        Self {
            foreground,
            background,
            bold: cell.bold(),
            dim: cell.dim(),
            underline: cell.underline(),
        }
    }
}

fn colour(colour: Color, default: &str) -> String {
    match colour {
        Color::Default => default.to_owned(),
        Color::Idx(index) => NUMBERED
            .get(usize::from(index))
            .map_or_else(|| default.to_owned(), |colour| (*colour).to_owned()),
        Color::Rgb(red, green, blue) => format!("#{red:02x}{green:02x}{blue:02x}"),
    }
}

/// Draws a screen.
#[must_use]
pub fn svg(screen: &Screen) -> String {
    let (rows, columns) = screen.size();
    let (rows, columns) = (rows.get(), columns.get());
    let (width, height) = (
        f32::from(columns) * WIDTH + 2.0 * MARGIN,
        f32::from(rows) * HEIGHT + 2.0 * MARGIN,
    );
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.1} {height:.1}\" \
         font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" \
         font-size=\"{LETTERS}\">\n<rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{BACKGROUND}\"/>\n"
    );
    for row in 0..rows {
        let mut column = 0;
        while column < columns {
            let Some(first) = screen.cell(row, column) else {
                break;
            };
            let look = Look::of(first);
            let mut text = String::new();
            let begin = column;
            while let Some(cell) = screen.cell(row, column)
                && Look::of(cell) == look
            {
                text.push_str(if cell.has_contents() {
                    cell.contents()
                } else {
                    " "
                });
                column += 1;
            }
            run(&mut picture, row, begin, &text, &look);
        }
    }
    picture.push_str("</svg>\n");
    picture
}

/// Cells beside each other that look alike.
fn run(picture: &mut String, row: u16, column: u16, text: &str, look: &Look) {
    let (x, y) = (
        MARGIN + f32::from(column) * WIDTH,
        MARGIN + f32::from(row) * HEIGHT,
    );
    let width = text.chars().count() as f32 * WIDTH;
    let Look {
        foreground,
        background,
        ..
    } = look;
    // Writing to a string cannot fail.
    if background != BACKGROUND {
        let _ = writeln!(
            picture,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{HEIGHT}\" fill=\"{background}\"/>"
        );
    }
    // Bars are drawn, because the fonts' do not meet.
    for (index, letter) in text.chars().enumerate() {
        if let Some(eighths) = ('▁'..='█').position(|bar| bar == letter) {
            let high = HEIGHT * (eighths as f32 + 1.0) / 8.0;
            let _ = writeln!(
                picture,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{high:.1}\" fill=\"{foreground}\"/>",
                x + index as f32 * WIDTH,
                y + HEIGHT - high,
                WIDTH + 0.2,
            );
        }
    }
    let text: String = text
        .chars()
        .map(|letter| {
            if ('▁'..='█').contains(&letter) {
                ' '
            } else {
                letter
            }
        })
        .collect();
    if text.trim().is_empty() {
        return;
    }
    let mut style = String::new();
    if look.bold {
        style.push_str(" font-weight=\"bold\"");
    }
    if look.dim {
        style.push_str(" opacity=\"0.6\"");
    }
    if look.underline {
        style.push_str(" text-decoration=\"underline\"");
    }
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        picture,
        "<text x=\"{x:.1}\" y=\"{:.1}\" textLength=\"{width:.1}\" xml:space=\"preserve\" fill=\"{foreground}\"{style}>{text}</text>",
        y + HEIGHT * 0.75,
    );
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use super::*;

    #[test]
    fn cells_are_drawn_where_they_stand_and_as_they_look() {
        let size = |cells| NonZero::new(cells).expect("cells");
        let mut parser = vt100::Parser::new(size(2), size(10), 0);
        parser.process(b"a<b\x1b[32;1mok\x1b[0m\r\n\x1b[7m \xe2\x96\x84x");
        let picture = svg(parser.screen());
        for part in [
            ">a&lt;b</text>",
            "fill=\"#8ccf7e\" font-weight=\"bold\">ok</text>",
            // The middle bar, half as high as its row.
            "height=\"9.0\" fill=\"#14161b\"",
            "fill=\"#d8dbe2\"/>",
        ] {
            assert!(picture.contains(part), "{part} in {picture}");
        }
        assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
    }
}
