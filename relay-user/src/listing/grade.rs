//! How good a measured value is.

use super::Column;

/// What a listener makes of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// Nobody hears it.
    Good,
    /// Some hear it.
    Fair,
    /// Everybody does.
    Bad,
}

impl Grade {
    /// Of the value of a column that is measured; none for any other.
    ///
    /// Jitter up to 20 ms, one packet time, is what every jitter buffer takes up, and 50 ms what many
    /// do. Of G.711 with concealment, 1 % loss is hardly heard (ITU-T G.113 appendix I), 3 % is. A MOS
    /// of 4.0 satisfies, below 3.6 many are dissatisfied (ITU-T G.107 annex B).
    #[must_use]
    pub fn of(column: Column, value: f64) -> Option<Self> {
        let (fair, bad) = match column {
            Column::Loss => (1.0, 3.0),
            Column::Jitter => (20.0, 50.0),
            // Negated, for here the low values are the bad ones.
            Column::Mos => (-4.0, -3.6),
            _ => return None,
        };
        let value = if column == Column::Mos { -value } else { value };
        Some(if value > bad {
            Self::Bad
        } else if value > fair {
            Self::Fair
        } else {
            Self::Good
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_belong_to_the_better_side() {
        for (column, value, grade) in [
            (Column::Loss, 1.0, Grade::Good),
            (Column::Loss, 1.01, Grade::Fair),
            (Column::Loss, 3.01, Grade::Bad),
            (Column::Jitter, 20.0, Grade::Good),
            (Column::Jitter, 50.1, Grade::Bad),
            (Column::Mos, 4.0, Grade::Good),
            (Column::Mos, 3.9, Grade::Fair),
            (Column::Mos, 3.59, Grade::Bad),
        ] {
            assert_eq!(Grade::of(column, value), Some(grade), "{column} {value}");
        }
        assert_eq!(Grade::of(Column::Packets, 0.0), None);
    }
}
