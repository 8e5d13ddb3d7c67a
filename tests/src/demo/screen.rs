//! What the demo prints.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
};

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::Column;

/// Standard output: plain lines, and on a terminal also colour and a line that changes while something lasts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    live: bool,
    colour: bool,
}

impl Screen {
    pub(super) fn of_stdout() -> Self {
        let live = io::stdout().is_terminal();
        // https://no-color.org
        let refused = env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
        Self {
            live,
            colour: live && !refused,
        }
    }

    /// Whether [`Screen::progress`] is seen by anyone.
    pub(super) fn is_live(self) -> bool {
        self.live
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn line(self, text: &str) {
        // Takes away the line of progress, if there is one.
        let clear = if self.live { "\r\x1b[2K" } else { "" };
        println!("{clear}{text}");
    }

    /// The first line.
    pub(super) fn title(self, text: &str) {
        self.line(&self.paint("1;4", text));
    }

    /// A new phase, and in one sentence what it does.
    pub(super) fn phase(self, name: &str, sentence: &str) {
        self.line("");
        self.line(&self.paint("1", name));
        self.say(sentence);
    }

    /// A sentence.
    pub(super) fn say(self, text: &str) {
        self.wrapped("  ", text);
    }

    /// A command that is run, or that the reader may run.
    pub(super) fn command(self, command: &str) {
        for (number, line) in command.lines().enumerate() {
            let prompt = if number == 0 { "$ " } else { "  " };
            self.line(&format!(
                "  {}",
                self.paint("36", &format!("{prompt}{line}"))
            ));
        }
    }

    /// What a command printed.
    pub(super) fn output(self, text: &str) {
        for line in text.lines() {
            self.wrapped("    ", line);
        }
    }

    /// What a phase found.
    pub(super) fn result(self, text: &str) {
        self.wrapped("  → ", text);
    }

    /// What is going on; the next line replaces it.
    pub(super) fn progress(self, text: &str) {
        if self.live {
            let room = width().unwrap_or(80).saturating_sub(5);
            let text: String = text.chars().take(room).collect();
            print!("\r\x1b[2K  … {text}");
            // A terminal that is gone need not see it.
            let _ = io::stdout().flush();
        }
    }

    /// The last line.
    pub(super) fn verdict(self, text: &str) {
        self.line("");
        let text = wrap("", text, width());
        self.line(&self.paint("1;32", &text.join("\n")));
    }

    /// The comparison.
    pub(super) fn table(self, columns: &[Column; 3]) {
        let mut table = Table::new();
        table.set_header(["", "without relay", "with relay", "after flush"]);
        if self.live {
            table.load_style(presets::UTF8_FULL_CONDENSED);
            table.set_content_arrangement(ContentArrangement::Dynamic);
        } else {
            table.force_no_tty();
            table.load_style(presets::ASCII_MARKDOWN);
        }
        let mut row = |name: &str, show: &dyn Fn(&Column) -> String| {
            let values = columns
                .iter()
                .map(|column| Cell::new(show(column)).set_alignment(CellAlignment::Right));
            table.add_row([Cell::new(name)].into_iter().chain(values));
        };
        row("packets/s through the PBX", &|it| grouped(it.load.pbx));
        row("packets/s through the kernel", &|it| {
            grouped(it.load.kernel)
        });
        row("CPU of the PBX", &|it| format!("{:.1}%", it.load.pbx_cpu));
        row("CPU of relay-user", &|it| {
            it.load
                .relay_cpu
                .map_or_else(|| "-".to_owned(), |cpu| format!("{cpu:.1}%"))
        });
        row("packets lost", &|it| grouped(it.hearing.lost as f64));
        row("packets doubled", &|it| {
            grouped(it.hearing.duplicates as f64)
        });
        row("largest gap at a phone", &|it| {
            format!("{} ms", it.hearing.largest_gap.as_millis())
        });
        if columns.iter().all(|it| it.hearing.longest_way.is_some()) {
            row("longest way of a packet", &|it| {
                let way = it.hearing.longest_way.unwrap_or_default();
                format!("{:.1} ms", way.as_secs_f64() * 1000.0)
            });
        }
        row("DSCP at the phones", &|it| {
            let names: Vec<_> = it.hearing.dscp.iter().map(|code| dscp(*code)).collect();
            names.join(", ")
        });
        self.line("");
        self.line(&table.trim_fmt());
    }

    fn wrapped(self, indent: &str, text: &str) {
        for line in wrap(indent, text, width()) {
            self.line(&line);
        }
    }
}

/// Columns of the terminal.
fn width() -> Option<usize> {
    Table::new().width().map(usize::from)
}

/// Breaks a line between words where it is longer than `width`; the lines after the first are indented as deep.
fn wrap(indent: &str, text: &str, width: Option<usize>) -> Vec<String> {
    let depth = indent.chars().count();
    let room = width.map_or(usize::MAX, |width| width.saturating_sub(depth).max(20));
    let mut lines = vec![String::new()];
    for piece in text.split_inclusive(' ') {
        let line = lines.last_mut().expect("one line at least");
        if !line.is_empty() && line.chars().count() + piece.trim_end().chars().count() > room {
            lines.push(piece.to_owned());
        } else {
            line.push_str(piece);
        }
    }
    let lines = lines.iter().enumerate().map(|(number, line)| {
        let indent = if number == 0 {
            indent
        } else {
            &" ".repeat(depth)
        };
        format!("{indent}{line}").trim_end().to_owned()
    });
    lines.collect()
}

fn dscp(code: u8) -> String {
    match code {
        46 => "46 (EF)".to_owned(),
        code => code.to_string(),
    }
}

/// A whole number with a comma for every thousand.
pub(super) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(0.0), "0");
        assert_eq!(grouped(999.6), "1,000");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
    }

    #[test]
    fn long_lines_break_between_words() {
        let text = "mode  generic XDP: because of this";
        assert_eq!(
            wrap("  ", text, None),
            ["  mode  generic XDP: because of this"]
        );
        assert_eq!(
            wrap("→ ", text, Some(22)),
            ["→ mode  generic XDP:", "  because of this"]
        );
        assert_eq!(wrap(" ", "", Some(40)), [""], "no blanks at the end");
    }
}
