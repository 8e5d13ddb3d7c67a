//! Which rows are shown.

use std::str::FromStr;

use super::{Column, Row, RowState};

/// Words and conditions, separated by spaces, all of which must hold.
///
/// - `WORD`: the pair's number is this, or the word is part of an address, of the names of channel and
///   call, of state or codec, or of the reason.
/// - `KEY=TEXT`, `KEY!=TEXT`: a text column has this in it, or not. A state is compared whole, and is the
///   stream's or its pair's.
/// - `KEY=N`, `!=`, `<`, `<=`, `>`, `>=`: a number compares so. What is not known fits no condition.
///
/// Upper and lower case are the same.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter(Vec<Term>);

#[derive(Clone, Debug, PartialEq)]
enum Term {
    /// In lower case.
    Word(String),
    /// In lower case.
    Text(Column, Equality, String),
    Number(Column, Comparison, f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Equality {
    Is,
    IsNot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Less,
    LessOrEqual,
    Equal,
    NotEqual,
    GreaterOrEqual,
    Greater,
}

/// Longer ones first, because `<` begins `<=`.
const OPERATORS: [(&str, Comparison); 6] = [
    ("!=", Comparison::NotEqual),
    ("<=", Comparison::LessOrEqual),
    (">=", Comparison::GreaterOrEqual),
    ("<", Comparison::Less),
    (">", Comparison::Greater),
    ("=", Comparison::Equal),
];

/// States that can be asked for.
const STATES: [RowState; 5] = [
    RowState::Offloaded,
    RowState::Watching,
    RowState::Waiting,
    RowState::Suspended,
    RowState::Refused,
];

/// What is wrong with a filter. The text says what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// No such column.
    #[error("`{0}`: there is no `{1}` to filter by; there are {all}", all = Column::names(|_| true))]
    Key(String, String),
    /// Not a number.
    #[error("`{0}`: `{1}` is not a number; write a condition such as {2}>1")]
    Number(String, String, Column),
    /// A text compared by size.
    #[error("`{0}`: {1} is text, which can only be compared with = and !=; numbers are {numbers}", numbers = Column::names(Column::is_number))]
    Comparison(String, Column),
    /// No such state.
    #[error("`{0}`: there is no state `{1}`; there are {states}", states = STATES.map(RowState::name).join(", "))]
    State(String, String),
    /// Nothing to compare with.
    #[error(
        "`{0}`: nothing follows the comparison; write a condition such as loss>1 or state=waiting"
    )]
    Missing(String),
}

impl Filter {
    /// Whether it lets everything through.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a condition is about this column.
    #[must_use]
    pub fn asks_for(&self, wanted: Column) -> bool {
        self.0.iter().any(|term| match term {
            Term::Word(_) => false,
            Term::Text(column, ..) | Term::Number(column, ..) => *column == wanted,
        })
    }

    /// Whether a row is shown.
    #[must_use]
    pub fn matches(&self, row: &Row) -> bool {
        self.0.iter().all(|term| term.matches(row))
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        text.split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl FromStr for Term {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let told = || text.escape_debug().to_string();
        let word = || Self::Word(text.to_lowercase());
        let Some(at) = text.find(['=', '<', '>', '!']) else {
            return Ok(word());
        };
        let (key, rest) = text.split_at(at);
        let Some((operator, comparison)) = OPERATORS
            .into_iter()
            .find(|(operator, _)| rest.starts_with(operator))
        else {
            return Ok(word());
        };
        // A leg, as it is listed: `192.0.2.1:10000=192.0.2.11:30000`.
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            return Ok(word());
        }
        let column = Column::named(key).ok_or_else(|| FilterError::Key(told(), key.to_owned()))?;
        let value = &rest[operator.len()..];
        if value.is_empty() {
            return Err(FilterError::Missing(told()));
        }
        if column.is_number() {
            return match value.parse::<f64>() {
                Ok(number) if number.is_finite() => Ok(Self::Number(column, comparison, number)),
                _ => Err(FilterError::Number(
                    told(),
                    value.escape_debug().to_string(),
                    column,
                )),
            };
        }
        let equality = match comparison {
            Comparison::Equal => Equality::Is,
            Comparison::NotEqual => Equality::IsNot,
            _ => return Err(FilterError::Comparison(told(), column)),
        };
        let value = value.to_lowercase();
        if column == Column::State && !STATES.iter().any(|state| state.name() == value) {
            return Err(FilterError::State(told(), value.escape_debug().to_string()));
        }
        Ok(Self::Text(column, equality, value))
    }
}

impl Term {
    fn matches(&self, row: &Row) -> bool {
        match self {
            Self::Word(word) => {
                let columns = [
                    Column::From,
                    Column::To,
                    Column::Channel,
                    Column::Call,
                    Column::Codec,
                    Column::State,
                    Column::Why,
                ];
                row.pair.to_string() == *word
                    || columns
                        .into_iter()
                        .any(|column| contains(row, column, word))
                    || row
                        .local
                        .is_some_and(|local| local.to_string().contains(word))
                    || is_leg(row, word)
                    || row.pair_state.name().contains(word)
            }
            Self::Text(column, equality, value) => {
                let is = match column {
                    Column::State => is_in_state(row, value),
                    column => contains(row, *column, value),
                };
                is == (*equality == Equality::Is)
            }
            Self::Number(column, comparison, value) => {
                row.number(*column).is_some_and(|number| match comparison {
                    Comparison::Less => number < *value,
                    Comparison::LessOrEqual => number <= *value,
                    Comparison::Equal => number == *value,
                    Comparison::NotEqual => number != *value,
                    Comparison::GreaterOrEqual => number >= *value,
                    Comparison::Greater => number > *value,
                })
            }
        }
    }
}

/// Whether a row is in a state, its own or its pair's. One stream that is offloaded does not make its pair
/// so, and a pair has fewer states than a stream.
fn is_in_state(row: &Row, state: &str) -> bool {
    let own = matches!(row.state, RowState::Watching | RowState::Suspended);
    row.pair_state.name() == state || own && row.state.name() == state
}

/// Whether a word is the leg that a row comes in on, as `list` writes it.
fn is_leg(row: &Row, word: &str) -> bool {
    match (row.local, row.from) {
        (Some(local), Some(from)) if word.contains('=') => format!("{local}={from}").contains(word),
        _ => false,
    }
}

/// Whether a column's text has a text in it that is in lower case.
fn contains(row: &Row, column: Column, text: &str) -> bool {
    row.text(column).is_some_and(|value| {
        // Most of what is searched is ASCII, and 10,000 rows are searched every second.
        if value.is_ascii() && text.is_ascii() {
            text.is_empty()
                || value
                    .as_bytes()
                    .windows(text.len())
                    .any(|window| window.eq_ignore_ascii_case(text.as_bytes()))
        } else {
            value.to_lowercase().contains(text)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::model::Feed;

    fn row() -> Row {
        Row {
            pair: 7,
            leg: Some(0),
            state: RowState::Watching,
            pair_state: RowState::Waiting,
            feed: Some(Feed::Ami),
            from: Some("192.0.2.11:30000".parse().expect("address")),
            to: Some("[2001:db8::12]:30002".parse().expect("address")),
            local: Some("192.0.2.1:10000".parse().expect("address")),
            channel: Some("PJSIP/Älice-00000001".into()),
            why: Some("proof 3/8".into()),
            packets: 1500,
            loss: Some(1.5),
            jitter: Some(0.0),
            ..Row::default()
        }
    }

    #[test]
    fn words_are_found_where_people_look() {
        for word in [
            "",
            "7",
            "192.0.2.11",
            ":30002",
            "2001:DB8",
            "10000",
            "192.0.2.1:10000=192.0.2.11:30000",
            "pjsip/ä",
            "PROOF",
            "watching",
            "waiting",
            "proof  älice\t192",
        ] {
            let filter: Filter = word.parse().expect(word);
            assert!(filter.matches(&row()), "{word}");
        }
        for word in [
            "70",
            "192.0.2.111",
            "bob",
            "proof bob",
            "offloaded",
            "10000=192.0.2.12",
        ] {
            let filter: Filter = word.parse().expect(word);
            assert!(!filter.matches(&row()), "{word}");
        }
    }

    #[test]
    fn conditions_compare() {
        for (text, expected) in [
            ("loss>1", true),
            ("loss>1.5", false),
            ("loss>=1.5", true),
            ("loss<1.5", false),
            ("LOSS<=1.5 packets=1500", true),
            ("packets!=1500", false),
            ("id=7", true),
            ("id=70", false),
            ("jitter<20", true),
            // Not known: no condition holds.
            ("mos<3.5", false),
            ("mos>=0", false),
            ("state=waiting", true),
            ("state=watching", true),
            ("state=offloaded", false),
            ("state!=offloaded", true),
            ("state!=waiting", false),
            ("feed=ami", true),
            ("channel=PJSIP", true),
            ("channel!=pjsip", false),
            ("call=x", false),
            ("call!=x", true),
            ("from=192.0.2.11 why=3/8", true),
        ] {
            let filter: Filter = text.parse().expect(text);
            assert_eq!(filter.matches(&row()), expected, "{text}");
        }
        let half = Row {
            state: RowState::Offloaded,
            ..row()
        };
        let offloaded: Filter = "state=offloaded".parse().expect("filter");
        assert!(!offloaded.matches(&half), "its pair waits");
        assert!(
            "rate>1"
                .parse::<Filter>()
                .expect("filter")
                .asks_for(Column::Rate)
        );
    }

    #[test]
    fn what_cannot_be_asked_is_told_with_what_can() {
        for (text, fragment) in [
            ("lost>1", "id, state, feed"),
            ("loss>many", "`many` is not a number"),
            ("loss>nan", "not a number"),
            ("loss>", "nothing follows"),
            ("state>waiting", "only be compared with = and !="),
            (
                "state=wating",
                "offloaded, watching, waiting, suspended, refused",
            ),
            ("a state=x\u{1b}", "\\u{1b}"),
        ] {
            let error = text.parse::<Filter>().expect_err(text).to_string();
            assert!(error.contains(fragment), "{text}: {error}");
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
    }
}
