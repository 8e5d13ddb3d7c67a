//! What the user sees, on a screen that is no terminal.

use std::collections::HashMap;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::{Terminal, backend::TestBackend, buffer::Buffer, style::Color};
use relay_common::reception::Reception;

use super::{
    board::Board,
    controls::Controls,
    daemon::{Answer, Daemon},
    screen::{Palette, draw},
};
use crate::{
    control::model::{PairReport, PairState},
    listing::{Filter, Order, Row},
    output::examples::example,
    snapshot::{
        Snapshot,
        tests::{snapshot, streams},
    },
};

const SECOND: u64 = 1_000_000_000;

/// Two pairs after so many seconds: 50 packets a second each, of which the first stream of pair 9 loses
/// every fifth.
fn after(seconds: u64) -> Snapshot {
    let mut taken = snapshot([streams(7, 0), streams(9, 2)].concat());
    taken.taken.monotonic += seconds * SECOND;
    taken.lease += seconds * SECOND;
    let at = taken.taken.monotonic;
    for (index, sample) in taken.streams.iter_mut().enumerate() {
        let expected = 100 + 50 * seconds as u32;
        let came = if index == 2 {
            expected / 5 * 4
        } else {
            expected
        };
        sample.state.reception = Reception {
            arrival: at,
            packets: came,
            unmeasured: came,
            first: 0x1_0000,
            highest: 0x1_0000 + expected - 1,
            payload_type: 0,
            types: [0, 0xff, 0xff, 0xff],
            clock_type: 0,
            ..Reception::default()
        };
    }
    taken
}

/// `top` without its terminal.
struct Top {
    board: Board,
    controls: Controls,
}

impl Top {
    fn new() -> Self {
        let mut board = Board::new(Order::default(), Filter::default());
        for seconds in 0..4 {
            board.observe(after(seconds));
        }
        Self {
            board,
            controls: Controls::default(),
        }
    }

    /// Draws, so that the keys know the size, and presses them.
    fn press(&mut self, keys: impl IntoIterator<Item = KeyCode>) -> bool {
        self.drawn(80, 24);
        let mut end = false;
        for key in keys {
            end = self.controls.key(key.into(), &mut self.board);
        }
        end
    }

    fn types(&mut self, text: &str) {
        self.press(text.chars().map(KeyCode::Char));
    }

    fn drawn(&mut self, width: u16, height: u16) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("terminal");
        let palette = Palette { colour: true };
        terminal
            .draw(|frame| draw(frame, &self.board, &mut self.controls, palette))
            .expect("drawn");
        terminal.backend().buffer().clone()
    }

    fn lines(&mut self, width: u16, height: u16) -> Vec<String> {
        lines(&self.drawn(width, height))
    }

    /// First words of the rows of the table.
    fn ids(&mut self) -> Vec<String> {
        let lines = self.lines(80, 24);
        let rows = lines[4..23].iter();
        rows.filter_map(|line| Some(line.split_whitespace().next()?.to_owned()))
            .collect()
    }
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let width = usize::from(buffer.area.width);
    let rows = buffer.content.chunks(width.max(1));
    rows.map(|row| {
        let line: String = row.iter().map(|cell| cell.symbol()).collect();
        line.trim_end().to_owned()
    })
    .collect()
}

/// The colour in which a text is on the screen.
fn colour(buffer: &Buffer, text: &str) -> Option<Color> {
    let lines = lines(buffer);
    let row = lines.iter().position(|line| line.contains(text))?;
    let at = lines[row].find(text)?;
    let column = lines[row][..at].chars().count();
    Some(buffer[(column as u16, row as u16)].fg)
}

fn contains(lines: &[String], text: &str) -> bool {
    lines.iter().any(|line| line.contains(text))
}

/// A daemon with the pair of docs/api.md, and one that it has refused.
fn daemon() -> Daemon {
    let mut refused: PairReport = example("A pair");
    refused.id = 12;
    refused.state = PairState::Refused;
    refused.why = Some("leg A is on hold\u{1b}[2J".into());
    refused.streams.clear();
    let pairs = [example::<PairReport>("A pair"), refused];
    let pairs: HashMap<_, _> = pairs
        .iter()
        .map(|pair| (pair.id, Row::of_pair(pair)))
        .collect();
    Daemon::Up(Box::new(Answer {
        status: example("The status"),
        pairs,
    }))
}

#[test]
fn eighty_columns_show_every_stream_and_how_it_fares() {
    let mut top = Top::new();
    let buffer = top.drawn(80, 24);
    let screen = lines(&buffer);
    assert!(screen[0].starts_with("relay-user top eth0"), "{screen:#?}");
    assert!(
        screen[1].contains("streams 4 of 64: 4 offloaded, 0 watching"),
        "{screen:#?}"
    );
    for (row, words) in [
        (4, ["7/1", "offloaded", "192.0.2.11:10028", "50"]),
        (6, ["9/1", "offloaded", "192.0.2.11:10036", "40"]),
    ] {
        let found: Vec<_> = screen[row].split_whitespace().take(4).collect();
        assert_eq!(found, words, "{screen:#?}");
    }
    assert!(screen[6].contains("20.00"), "{screen:#?}");
    assert_eq!(colour(&buffer, "20.00"), Some(Color::Red));
    assert_eq!(colour(&buffer, "offloaded"), Some(Color::Green));
    assert!(screen[23].contains("q quit"), "{screen:#?}");
}

#[test]
fn without_colours_there_are_none() {
    let mut top = Top::new();
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).expect("terminal");
    let palette = Palette { colour: false };
    terminal
        .draw(|frame| draw(frame, &top.board, &mut top.controls, palette))
        .expect("drawn");
    let buffer = terminal.backend().buffer();
    assert!(
        buffer
            .content
            .iter()
            .all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset)
    );
}

#[test]
fn keys_sort_and_the_chosen_stream_stays_chosen() {
    let mut top = Top::new();
    top.press([KeyCode::End]);
    assert_eq!(top.board.selected().map(|row| row.pair), Some(9));
    assert_eq!(top.ids(), ["7/1", "7/2", "9/1", "9/2"]);
    // To the left of the first is the last that is not on the screen; to the right, all that are.
    for _ in 0..4 {
        top.types("s");
    }
    assert_eq!(top.board.order.to_string(), "-loss");
    assert_eq!(top.ids(), ["9/1", "7/1", "7/2", "9/2"]);
    assert!(contains(&top.lines(80, 24), "LOSS%▼"));
    top.types("r");
    assert_eq!(top.ids(), ["7/1", "7/2", "9/2", "9/1"]);
    assert_eq!(top.board.position(), Some(2));
    top.types("gS");
    assert_eq!(top.board.order.to_string(), "rate");
    assert_eq!(
        top.board.selected().map(|row| (row.pair, row.leg)),
        Some((7, Some(0)))
    );
}

#[test]
fn a_filter_is_typed_and_what_is_wrong_with_it_is_told() {
    let mut top = Top::new();
    top.types("/loss>1");
    assert_eq!(top.lines(80, 24)[23], "filter: loss>1");
    assert_eq!(top.ids().len(), 4);
    top.press([KeyCode::Enter]);
    assert_eq!(top.ids(), ["9/1"]);
    top.types("/x>1");
    top.press([KeyCode::Enter]);
    assert!(contains(
        &top.lines(80, 24),
        "`loss>1x>1`: `1x>1` is not a number"
    ));
    assert_eq!(top.ids(), ["9/1"]);
    top.press([KeyCode::Backspace; 4]);
    top.press([KeyCode::Char('9'), KeyCode::Char('9'), KeyCode::Enter]);
    assert!(contains(
        &top.lines(80, 24),
        "no stream fits the filter `loss>99`"
    ));
    top.press([KeyCode::Esc]);
    assert_eq!(top.ids().len(), 4);
}

#[test]
fn the_page_of_a_stream_has_its_history() {
    let mut top = Top::new();
    top.board.tell(daemon());
    top.press([KeyCode::Enter]);
    let screen = top.lines(80, 24);
    for text in [
        "pair 7, from the first leg",
        "PJSIP/alice-00000001",
        "packets/s: 50.0 now, 50.0 highest of 3 s",
        "loss, %: 0.0 now",
        "jitter, ms: 0.0 now",
        "MOS, estimated 4.4",
    ] {
        assert!(contains(&screen, text), "{text} in {screen:#?}");
    }
    assert!(
        contains(&screen, "███") || contains(&screen, "▆▆▆"),
        "{screen:#?}"
    );
    top.press([KeyCode::Tab]);
    assert!(contains(&top.lines(80, 24), "from the second leg"));
    // It goes while it is looked at.
    top.board.lose_sight("gone".into());
    top.press([]);
    assert!(contains(&top.lines(80, 24), "gone"));
}

#[test]
fn what_only_the_daemon_knows_is_shown_beside_the_figures() {
    let mut top = Top::new();
    top.board.tell(daemon());
    let screen = top.lines(160, 24);
    assert!(
        screen[0].contains("native") && screen[0].contains("AMI up"),
        "{screen:#?}"
    );
    assert_eq!(top.ids(), ["7/1", "7/2", "9/1", "9/2", "12"]);
    assert!(contains(&screen, "PJSIP/alice-00000001"), "{screen:#?}");
    let refused = screen
        .iter()
        .find(|line| line.contains("refused  "))
        .expect("row");
    assert!(refused.contains("leg A is on hold\u{fffd}[2J"), "{refused}");
    top.types("w");
    let screen = top.lines(80, 24);
    assert!(contains(&screen, "relayed  all"), "{screen:#?}");
    assert!(contains(&screen, "refused  on_hold"), "{screen:#?}");
}

#[test]
fn without_a_daemon_the_figures_go_on_to_the_end_of_the_lease() {
    let mut top = Top::new();
    top.board
        .tell(Daemon::Away("the relay daemon of eth0 is gone".into()));
    let screen = top.lines(80, 24);
    assert!(
        screen[0].contains("no daemon: read from the pinned maps"),
        "{screen:#?}"
    );
    assert!(screen[1].contains("is gone"), "{screen:#?}");
    let mut late = after(9);
    late.lease = late.taken.monotonic;
    top.board.observe(late);
    let screen = top.lines(160, 24);
    assert!(
        screen[0].contains("lease over: the PBX relays"),
        "{screen:#?}"
    );
    assert!(
        screen[4].contains("suspended") && screen[4].contains("the lease is over"),
        "{screen:#?}"
    );

    top.press([KeyCode::End]);
    top.board.lose_sight("no maps".into());
    assert!(top.lines(80, 24)[1].contains("no maps"));
    assert_eq!(top.board.len(), 0);
    // Back, with fewer streams than there were.
    let mut one = after(10);
    one.streams.truncate(1);
    top.board.observe(one);
    assert_eq!(top.board.position(), Some(0));
}

#[test]
fn every_page_is_drawn_on_every_screen() {
    let mut top = Top::new();
    top.board.tell(daemon());
    for keys in ["", "?", "x\r", "?", "xw", "?", "x/x>1\r"] {
        let keys = keys.chars().map(|key| match key {
            '\r' => KeyCode::Enter,
            key => KeyCode::Char(key),
        });
        top.press(keys);
        for (width, height) in [(20, 5), (1, 1), (80, 1), (1, 24), (7, 3), (300, 100)] {
            top.drawn(width, height);
        }
    }
}

#[test]
fn q_and_ctrl_c_end_it() {
    let mut top = Top::new();
    assert!(top.press([KeyCode::Char('q')]));
    assert!(!top.press([KeyCode::Char('/'), KeyCode::Char('q')]));
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert!(top.controls.key(interrupt, &mut top.board));
}
