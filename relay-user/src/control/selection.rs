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

/// Orders streams by what needs a look first: suspended ones, then those that wait or are watched, then
/// offloaded ones.
pub fn worst_first(a: &StreamReport, b: &StreamReport) -> Ordering {
    let rank = |stream: &StreamReport| match stream.state {
        StreamState::Suspended => 0,
        StreamState::Waiting => 1,
        StreamState::Watching => 2,
        StreamState::Offloaded => 3,
    };
    rank(a).cmp(&rank(b))
}

fn worst_pair_first(a: &PairReport, b: &PairReport) -> Ordering {
    let worst = |pair: &'_ PairReport| {
        pair.streams
            .iter()
            .min_by(|a, b| worst_first(a, b))
            .cloned()
    };
    match (worst(a), worst(b)) {
        (Some(a), Some(b)) => worst_first(&a, &b),
        // A pair without streams stays with the PBX.
        (a, b) => a.is_some().cmp(&b.is_some()),
    }
}
