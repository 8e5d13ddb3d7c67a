//! Streams and pairs as rows, which `list` and `top` sort and filter by the same words.

mod column;
mod filter;
mod grade;
mod order;
mod row;

pub use self::{
    column::Column,
    filter::{Filter, FilterError},
    grade::Grade,
    order::{Order, OrderError},
    row::{Row, RowState},
};

use crate::control::model::PairReport;

/// The pairs that a filter lets through, in an order. A pair is let through when one of its streams is,
/// and sorted by the stream that comes first.
#[must_use]
pub fn arranged(pairs: Vec<PairReport>, filter: &Filter, order: Order) -> Vec<PairReport> {
    let mut kept: Vec<(Row, PairReport)> = pairs
        .into_iter()
        .filter_map(|pair| {
            let rows = Row::of_pair(&pair);
            if !rows.iter().any(|row| filter.matches(row)) {
                return None;
            }
            let first = rows
                .into_iter()
                .min_by(|one, other| order.compare(one, other))?;
            Some((first, pair))
        })
        .collect();
    kept.sort_by(|(one, _), (other, _)| order.compare(one, other));
    kept.into_iter().map(|(_, pair)| pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::model::PairState;

    fn pair(id: u64, packets: [u64; 2]) -> PairReport {
        let description = include_str!("../../../docs/api.md");
        let section = description.split("\n## A pair\n").nth(1).expect("section");
        let block = section.split("```json\n").nth(1).expect("block");
        let mut pair: PairReport =
            serde_json::from_str(block.split("```").next().expect("end")).expect("example");
        pair.id = id;
        for (stream, packets) in pair.streams.iter_mut().zip(packets) {
            stream.packets = packets;
        }
        pair
    }

    fn ids(pairs: Vec<PairReport>, filter: &str, order: &str) -> Vec<u64> {
        let filter = filter.parse().expect(filter);
        let order = order.parse().expect(order);
        let arranged = arranged(pairs, &filter, order);
        arranged.iter().map(|pair| pair.id).collect()
    }

    #[test]
    fn a_pair_stands_where_its_first_stream_stands() {
        let pairs = || vec![pair(1, [5, 50]), pair(2, [9, 10]), pair(3, [1, 60])];
        assert_eq!(ids(pairs(), "", "id"), [1, 2, 3]);
        assert_eq!(ids(pairs(), "", "-id"), [3, 2, 1]);
        assert_eq!(ids(pairs(), "", "packets"), [3, 1, 2]);
        assert_eq!(ids(pairs(), "", "-packets"), [3, 1, 2]);
        assert_eq!(ids(pairs(), "packets>9 packets<11", "id"), [2]);
        assert_eq!(ids(pairs(), "packets>99", "id"), [0_u64; 0]);
    }

    #[test]
    fn a_pair_without_streams_is_a_row_too() {
        let mut refused = pair(4, [0, 0]);
        refused.state = PairState::Refused;
        refused.why = Some("leg A is on hold".into());
        refused.streams.clear();
        let pairs = || vec![pair(1, [5, 50]), refused.clone()];
        assert_eq!(ids(pairs(), "hold", "id"), [4]);
        assert_eq!(ids(pairs(), "state=refused", "id"), [4]);
        assert_eq!(ids(pairs(), "state=offloaded", "id"), [1]);
        // What has no value is last, whichever way.
        assert_eq!(ids(pairs(), "", "silent"), [1, 4]);
        assert_eq!(ids(pairs(), "", "-silent"), [1, 4]);
    }
}
