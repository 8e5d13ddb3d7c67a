//! By what rows are sorted.

use std::{cmp::Ordering, fmt, str::FromStr};

use super::{Column, Row};

/// A column to sort by, and which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The column.
    pub column: Column,
    /// Largest first.
    pub descending: bool,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            column: Column::Id,
            descending: false,
        }
    }
}

/// Not a column.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no column `{0}`: sort by one of {all}, with `-` before it for the largest first", all = Column::names(|_| true))]
pub struct OrderError(String);

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.descending { "-" } else { "" };
        write!(f, "{sign}{}", self.column)
    }
}

impl FromStr for Order {
    type Err = OrderError;

    fn from_str(text: &str) -> Result<Self, OrderError> {
        let (descending, name) = match text.strip_prefix('-') {
            Some(name) => (true, name),
            None => (false, text),
        };
        let column =
            Column::named(name).ok_or_else(|| OrderError(text.escape_debug().to_string()))?;
        Ok(Self { column, descending })
    }
}

impl Order {
    /// The same column, the other way.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            descending: !self.descending,
            ..self
        }
    }

    /// How two rows stand to each other. One without a value is last, whichever way; equal ones are in
    /// the order of their numbers.
    #[must_use]
    pub fn compare(&self, one: &Row, other: &Row) -> Ordering {
        let directed = |ordering: Ordering| {
            if self.descending {
                ordering.reverse()
            } else {
                ordering
            }
        };
        let known = if self.column.is_number() {
            present(
                one.number(self.column),
                other.number(self.column),
                |a, b| directed(a.total_cmp(b)),
            )
        } else {
            match self.column {
                Column::From => present(one.from, other.from, |a, b| directed(a.cmp(b))),
                Column::To => present(one.to, other.to, |a, b| directed(a.cmp(b))),
                column => present(one.text(column), other.text(column), |a, b| {
                    directed(a.cmp(b))
                }),
            }
        };
        known.then_with(|| (one.pair, one.leg).cmp(&(other.pair, other.leg)))
    }
}

/// Compares two values, of which one that is missing is last.
fn present<T>(
    one: Option<T>,
    other: Option<T>,
    compare: impl FnOnce(&T, &T) -> Ordering,
) -> Ordering {
    match (&one, &other) {
        (Some(one), Some(other)) => compare(one, other),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_named_and_a_minus_turns_it_round() {
        let order: Order = "-Loss".parse().expect("order");
        assert_eq!(order.column, Column::Loss);
        assert!(order.descending && !order.reversed().descending);
        for column in Column::ALL {
            assert_eq!(Column::named(column.name()), Some(column));
        }
        let error = "lost".parse::<Order>().expect_err("no column").to_string();
        assert!(
            error.contains("`lost`") && error.contains("loss, jitter, mos"),
            "{error}"
        );
        assert!("".parse::<Order>().is_err());
        assert!("-".parse::<Order>().is_err());
    }

    #[test]
    fn addresses_are_sorted_as_numbers_and_the_unknown_is_last() {
        let row = |from: Option<&str>| Row {
            from: from.map(|from| from.parse().expect(from)),
            ..Row::default()
        };
        let mut rows = [
            row(Some("192.0.2.100:1")),
            row(None),
            row(Some("192.0.2.9:1")),
        ];
        for (order, expected) in [("from", ["9", "100"]), ("-from", ["100", "9"])] {
            let order: Order = order.parse().expect(order);
            rows.sort_by(|one, other| order.compare(one, other));
            let sorted: Vec<_> = rows.iter().map(|row| row.from).collect();
            for (found, expected) in sorted.iter().zip(expected) {
                let found = found.expect("known first").ip().to_string();
                assert!(found.ends_with(expected), "{sorted:?}");
            }
            assert_eq!(sorted[2], None);
        }
    }
}
