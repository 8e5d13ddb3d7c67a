//! Which columns a screen has room for.

use crate::listing::Column;

/// A column of the table of streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A value.
    Value(Column),
    /// What `rate` was in the last seconds.
    Course,
}

/// What can be shown, in the order from left to right: the least width, and how dear it is; the
/// dearest, 1, stays to the last.
const COLUMNS: [(Shown, u16, u8); 14] = [
    (Shown::Value(Column::Id), 7, 1),
    (Shown::Value(Column::State), 9, 2),
    (Shown::Value(Column::Feed), 4, 13),
    (Shown::Value(Column::From), 21, 5),
    (Shown::Value(Column::To), 21, 11),
    (Shown::Value(Column::Channel), 22, 10),
    (Shown::Value(Column::Codec), 5, 12),
    (Shown::Value(Column::Rate), 6, 3),
    (Shown::Course, 10, 8),
    (Shown::Value(Column::Loss), 7, 4),
    (Shown::Value(Column::Jitter), 7, 6),
    (Shown::Value(Column::Mos), 5, 7),
    (Shown::Value(Column::Packets), 10, 14),
    (Shown::Value(Column::Why), 24, 9),
];

/// Between two columns.
const GAP: u16 = 1;

/// The columns that fit a width, each with its own. What is left over is the reason's or, where there
/// is none, the course's.
#[must_use]
pub fn columns(width: u16) -> Vec<(Shown, u16)> {
    let mut by_worth = COLUMNS;
    by_worth.sort_by_key(|(_, _, worth)| *worth);
    let mut room = width;
    let mut dearest = 0;
    for (_, least, worth) in by_worth {
        let needed = least + if worth == 1 { 0 } else { GAP };
        let Some(left) = room.checked_sub(needed) else {
            break;
        };
        room = left;
        dearest = worth;
    }
    let mut columns: Vec<_> = COLUMNS
        .into_iter()
        .filter(|(.., worth)| *worth <= dearest)
        .map(|(shown, least, _)| (shown, least))
        .collect();
    for elastic in [Shown::Value(Column::Why), Shown::Course] {
        if let Some((_, width)) = columns.iter_mut().find(|(shown, _)| *shown == elastic) {
            *width += room;
            break;
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(width: u16) -> Vec<Shown> {
        columns(width).into_iter().map(|(shown, _)| shown).collect()
    }

    #[test]
    fn eighty_columns_have_the_figures_and_their_course() {
        use Column::{From, Id, Jitter, Loss, Mos, Rate, State};
        let value = Shown::Value;
        let expected = [
            value(Id),
            value(State),
            value(From),
            value(Rate),
            Shown::Course,
            value(Loss),
            value(Jitter),
            value(Mos),
        ];
        assert_eq!(shown(80), expected);
        assert_eq!(shown(7), [value(Id)]);
        assert_eq!(shown(6), []);
    }

    #[test]
    fn every_width_is_used_and_none_exceeded() {
        for width in 0..300 {
            let columns = columns(width);
            let gaps = (columns.len() as u16).saturating_sub(1) * GAP;
            let used: u16 = columns.iter().map(|(_, width)| width).sum::<u16>() + gaps;
            assert!(used <= width, "{width}: {columns:?}");
            let elastic = columns.iter().any(|(shown, _)| *shown == Shown::Course);
            assert!(!elastic || used == width, "{width}: {columns:?}");
        }
        assert_eq!(shown(299).len(), COLUMNS.len());
    }
}
