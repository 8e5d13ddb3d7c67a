//! Which of the pairs a client asks for, and in what order.

use std::cmp::{Ordering, Reverse};

use serde::Deserialize;

use super::model::{PairList, PairReport, PairState, StreamReport, StreamState};

/// The query of `GET /v1/pairs`. Without any part, it is all pairs in the order of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// At most so many pairs.
    pub limit: Option<usize>,
    /// In which order; of those that are alike in it, the lowest number comes first.
    #[serde(default)]
    pub sort: Sort,
    /// Only pairs in this state.
    pub state: Option<PairState>,
    /// Only pairs that have every word of this, whatever its case, in their number, state, call, channels,
    /// addresses or reasons.
    pub filter: Option<String>,
}

/// An order of pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// By number, the oldest first.
    #[default]
    Id,
    /// By number, the newest first.
    Newest,
    /// What needs a look first: the worst stream of each pair counts, see [`worst_first`].
    Worst,
    /// Refused pairs first, then waiting ones.
    State,
    /// Most packets relayed first.
    Packets,
}

impl Selection {
    /// Picks from all pairs, in the order of their numbers.
    pub fn of(&self, all: &PairList) -> PairList {
        let words: Vec<_> = self
            .filter
            .iter()
            .flat_map(|filter| filter.split_whitespace())
            .map(str::to_lowercase)
            .collect();
        let mut chosen: Vec<_> = all
            .pairs
            .iter()
            .filter(|pair| self.state.is_none_or(|state| pair.state == state))
            .filter(|pair| has_words(pair, &words))
            .collect();
        match self.sort {
            Sort::Id => {}
            Sort::Newest => chosen.reverse(),
            Sort::Worst => chosen.sort_by(|a, b| worst_pair_first(a, b)),
            Sort::State => chosen.sort_by_key(|pair| match pair.state {
                PairState::Refused => 0,
                PairState::Waiting => 1,
                PairState::Offloaded => 2,
            }),
            Sort::Packets => chosen.sort_by_key(|pair| {
                Reverse(
                    pair.streams
                        .iter()
                        .map(|stream| stream.packets)
                        .sum::<u64>(),
                )
            }),
        }
        let matching = chosen.len() as u64;
        chosen.truncate(self.limit.unwrap_or(usize::MAX));
        PairList {
            pairs: chosen.into_iter().cloned().collect(),
            matching,
            time: all.time.clone(),
        }
    }
}

fn has_words(pair: &PairReport, words: &[String]) -> bool {
    if words.is_empty() {
        return true;
    }
    let mut text = format!("{} {:?}", pair.id, pair.state);
    let mut add = |part: &str| {
        text.push(' ');
        text.push_str(part);
    };
    pair.call.iter().for_each(|call| add(call));
    pair.channels.iter().for_each(|channel| add(channel));
    pair.why.iter().for_each(|why| add(why));
    for leg in &pair.legs {
        add(&leg.local.to_string());
        add(&leg.remote.to_string());
    }
    for stream in &pair.streams {
        stream.why.iter().for_each(|why| add(why));
    }
    let text = text.to_lowercase();
    words.iter().all(|word| text.contains(word))
}

/// Orders streams by what needs a look first: the most lost, in steps of a percent; of those, suspended
/// ones, then those that wait, are watched, are offloaded; of those, the highest jitter.
pub fn worst_first(a: &StreamReport, b: &StreamReport) -> Ordering {
    let state = |stream: &StreamReport| match stream.state {
        StreamState::Suspended => 0,
        StreamState::Waiting => 1,
        StreamState::Watching => 2,
        StreamState::Offloaded => 3,
    };
    let lost = |stream: &StreamReport| stream.reception.lost_percent.floor();
    let jitter = |stream: &StreamReport| stream.reception.jitter_ms.unwrap_or_default();
    lost(b)
        .total_cmp(&lost(a))
        .then_with(|| state(a).cmp(&state(b)))
        .then_with(|| jitter(b).total_cmp(&jitter(a)))
}

fn worst_pair_first(a: &PairReport, b: &PairReport) -> Ordering {
    fn worst(pair: &PairReport) -> Option<&StreamReport> {
        pair.streams.iter().min_by(|a, b| worst_first(a, b))
    }
    match (worst(a), worst(b)) {
        (Some(a), Some(b)) => worst_first(a, b),
        // A pair without streams stays with the PBX.
        (a, b) => a.is_some().cmp(&b.is_some()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pairs of the example in docs/api.md, with these changes.
    fn list(changes: &[fn(&mut PairReport)]) -> PairList {
        let description = include_str!("../../../docs/api.md");
        let section = description.split("\n## A pair\n").nth(1).expect("section");
        let example = section.split("```json\n").nth(1).expect("example");
        let example = example.split("```").next().expect("end of example");
        let mut pairs = Vec::new();
        for (id, change) in (1..).zip(changes) {
            let mut pair: PairReport = serde_json::from_str(example).expect("pair");
            pair.id = id;
            for stream in &mut pair.streams {
                stream.reception.lost_percent = 0.0;
            }
            change(&mut pair);
            pairs.push(pair);
        }
        pairs.into()
    }

    fn refuse(pair: &mut PairReport) {
        pair.state = PairState::Refused;
        pair.why = Some("leg A (PJSIP/Zoë-00000001) is on hold".to_owned());
        pair.streams.clear();
    }

    fn selected(query: &str, all: &PairList) -> (Vec<u64>, u64) {
        let query = format!("http://localhost/v1/pairs?{query}");
        let selection =
            axum::extract::Query::<Selection>::try_from_uri(&query.parse().expect("URI"));
        let list = selection.expect("query").0.of(all);
        (
            list.pairs.iter().map(|pair| pair.id).collect(),
            list.matching,
        )
    }

    #[test]
    fn a_query_selects_and_orders() {
        let all = list(&[
            |_| {},
            |pair| pair.streams[0].reception.lost_percent = 7.5,
            refuse,
            |pair| pair.streams[1].state = StreamState::Suspended,
            |pair| pair.streams[1].reception.lost_percent = 0.9,
        ]);
        assert_eq!(selected("", &all), (vec![1, 2, 3, 4, 5], 5));
        assert_eq!(selected("sort=newest&limit=2", &all), (vec![5, 4], 5));
        assert_eq!(selected("sort=worst", &all), (vec![3, 2, 4, 1, 5], 5));
        assert_eq!(selected("state=refused", &all), (vec![3], 1));
        assert_eq!(selected("filter=ZO%C3%8B++hold", &all), (vec![3], 1));
        assert_eq!(selected("filter=192.0.2.11+refused", &all), (vec![3], 1));
        assert_eq!(selected("filter=nobody&limit=0", &all), (vec![], 0));
    }

    #[test]
    fn what_is_no_query_is_refused() {
        for query in ["limit=-1", "sort=best", "state=gone", "filtr=x"] {
            let uri = format!("http://localhost/v1/pairs?{query}").parse();
            let read = axum::extract::Query::<Selection>::try_from_uri(&uri.expect("URI"));
            assert!(read.is_err(), "{query}");
        }
    }
}
