//! `--watch`: the same answer again and again.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _},
    time::Duration,
};

use anyhow::Context as _;
use crossterm::terminal;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};

use super::{Watch, printed, reader_left};

/// Reads the time between two answers, in seconds.
pub(super) fn period(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse()
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "write a number of seconds from 0.1 to 3600".to_owned())
}

impl Watch {
    /// The answer or, where it is to go on, each of them as it comes, and nothing at last. `answer` is
    /// told whether there will be more.
    pub(super) async fn run(
        self,
        mut answer: impl AsyncFnMut(bool) -> anyhow::Result<String>,
    ) -> anyhow::Result<String> {
        let Some(period) = self.watch else {
            return answer(false).await;
        };
        let stop = || "cannot listen for signals";
        let mut interrupted = signal(SignalKind::interrupt()).with_context(stop)?;
        let mut terminated = signal(SignalKind::terminate()).with_context(stop)?;
        let reader_left = reader_left();
        tokio::pin!(reader_left);
        let in_place = io::stdout().is_terminal();
        let mut first = true;
        loop {
            let next = Instant::now() + period;
            let text = answer(true).await?;
            let frame = if in_place {
                let (_, rows) = terminal::size().unwrap_or((80, 24));
                in_its_place(&text, first, rows.into())
            } else if first || text.starts_with('{') {
                text
            } else {
                // Apart from the one before, unless each is a line.
                format!("\n{text}")
            };
            first = false;
            if !printed(&frame)? {
                return Ok(String::new());
            }
            tokio::select! {
                () = sleep_until(next) => {}
                _ = interrupted.recv() => break,
                _ = terminated.recv() => break,
                () = &mut reader_left => break,
            }
        }
        Ok(String::new())
    }
}

/// What replaces the text before on a terminal of so many rows. The last row is for the cursor.
fn in_its_place(text: &str, first: bool, rows: usize) -> String {
    let room = rows.saturating_sub(1).max(1);
    let lines: Vec<_> = text.lines().collect();
    // ECMA-48: clear the screen once, then go to its corner; a line too long must not push others away.
    let mut frame = if first { "\x1b[2J" } else { "" }.to_owned();
    frame.push_str("\x1b[H\x1b[?7l");
    let shown = if lines.len() > room {
        room - 1
    } else {
        lines.len()
    };
    for line in &lines[..shown] {
        // Writing to a string cannot fail.
        let _ = write!(frame, "{line}\x1b[K\r\n");
    }
    if shown < lines.len() {
        let _ = write!(frame, "… {} lines more\x1b[K\r\n", lines.len() - shown);
    }
    frame.push_str("\x1b[J\x1b[?7h");
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_neither_hasty_nor_endless() {
        assert_eq!(period("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "nan", "inf", "3601", "often", ""] {
            assert!(period(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let frame = in_its_place("a\nb\nc\n", true, 4);
        assert!(frame.starts_with("\x1b[2J\x1b[H"), "{frame:?}");
        assert_eq!(frame.matches("\x1b[K").count(), 3);
        let frame = in_its_place("a\nb\nc\n", false, 3);
        assert!(!frame.contains("\x1b[2J"), "{frame:?}");
        assert!(
            frame.contains("a\x1b") && frame.contains("… 2 lines more"),
            "{frame:?}"
        );
        assert!(!in_its_place("a\nb\n", false, 0).contains("b\x1b"));
    }
}
