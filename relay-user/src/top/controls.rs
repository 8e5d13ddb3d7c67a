//! What the keys do.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::{
    board::Board,
    layout::{Shown, columns},
};
use crate::listing::{Column, Filter, Order};

/// What fills the screen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Page {
    /// The table of streams.
    #[default]
    Streams,
    /// All about the chosen stream.
    Stream,
    /// Packets by verdict and reason, and refused calls by cause.
    Reasons,
}

/// Longest filter that can be typed, characters.
const LONGEST: usize = 200;

/// Where the user is.
#[derive(Clone, Debug, Default)]
pub struct Controls {
    /// What fills the screen.
    pub page: Page,
    /// Whether the keys are explained on top of it.
    pub help: bool,
    /// The filter as far as it is typed; none when it is not being typed.
    pub typing: Option<String>,
    /// What is wrong with it.
    pub error: Option<String>,
    /// The filter that holds, as it was typed.
    pub filter: String,
    /// Columns of the screen.
    pub width: u16,
    /// Rows of the table that fit the screen.
    pub rows: usize,
}

impl Controls {
    /// Does what a key stands for. Returns whether to end.
    pub fn key(&mut self, key: KeyEvent, board: &mut Board) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return matches!(key.code, KeyCode::Char('c'));
        }
        if self.typing.is_some() {
            self.edit(key.code, board);
            return false;
        }
        if self.help {
            self.help = false;
            return key.code == KeyCode::Char('q');
        }
        let page = self.rows.max(1).cast_signed();
        match key.code {
            KeyCode::Char('q') => return true,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.help = true,
            KeyCode::Char('w') => {
                self.page = match self.page {
                    Page::Reasons => Page::Streams,
                    Page::Streams | Page::Stream => Page::Reasons,
                }
            }
            KeyCode::Esc | KeyCode::Backspace | KeyCode::Left if self.page != Page::Streams => {
                self.page = Page::Streams;
            }
            KeyCode::Enter | KeyCode::Right
                if self.page == Page::Streams && board.selected().is_some() =>
            {
                self.page = Page::Stream;
            }
            KeyCode::Tab if self.page == Page::Stream => board.turn(),
            KeyCode::Esc => self.apply(String::new(), board),
            KeyCode::Char('/') => {
                self.page = Page::Streams;
                self.typing = Some(self.filter.clone());
            }
            KeyCode::Char('s' | '>') => self.sort_beside(board, 1),
            KeyCode::Char('S' | '<') => self.sort_beside(board, -1),
            KeyCode::Char('r') => board.sort(board.order.reversed()),
            KeyCode::Up | KeyCode::Char('k') => board.step(-1),
            KeyCode::Down | KeyCode::Char('j') => board.step(1),
            KeyCode::PageUp => board.step(-page),
            KeyCode::PageDown => board.step(page),
            KeyCode::Home | KeyCode::Char('g') => board.choose(0),
            KeyCode::End | KeyCode::Char('G') => board.step(isize::MAX / 2),
            _ => {}
        }
        false
    }

    fn edit(&mut self, key: KeyCode, board: &mut Board) {
        let mut text = self.typing.take().unwrap_or_default();
        match key {
            KeyCode::Enter => {
                self.apply(text.clone(), board);
                self.typing = self.error.is_some().then_some(text);
                return;
            }
            KeyCode::Esc => {
                self.error = None;
                return;
            }
            KeyCode::Backspace => {
                text.pop();
            }
            KeyCode::Char(typed) if text.chars().count() < LONGEST => text.push(typed),
            _ => {}
        }
        self.error = None;
        self.typing = Some(text);
    }

    fn apply(&mut self, text: String, board: &mut Board) {
        match text.parse::<Filter>() {
            Ok(filter) => {
                board.filter(filter);
                self.filter = text;
                self.error = None;
            }
            Err(error) => self.error = Some(error.to_string()),
        }
    }

    /// Sorts by the column beside that of now: first through those on the screen, then through the others.
    fn sort_beside(&self, board: &mut Board, step: isize) {
        let seen = columns(self.width)
            .into_iter()
            .filter_map(|(shown, _)| match shown {
                Shown::Value(column) => Some(column),
                Shown::Course => None,
            });
        let mut all: Vec<Column> = seen.collect();
        for column in Column::ALL {
            if !all.contains(&column) {
                all.push(column);
            }
        }
        let at = all.iter().position(|column| *column == board.order.column);
        let at = at.unwrap_or_default().cast_signed() + step;
        let column = all[at.rem_euclid(all.len().cast_signed()).cast_unsigned()];
        board.sort(Order {
            column,
            // Of a figure, what is bad comes first.
            descending: column.is_number() && column != Column::Id && !column.is_worse_when_low(),
        });
    }
}
