//! How long proofs take.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::control::model::StreamState;

/// The upper bounds of the buckets, in seconds. The shortest proof, 8 packets of 20 ms, takes 0.16 s.
pub const BOUNDS: [f64; 12] = [
    0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
];

/// Times by bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProofTimes {
    /// How many ended within each of [`BOUNDS`], and not within the one before; the last took longer.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// Of all, in seconds.
    pub sum: f64,
}

impl ProofTimes {
    fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.buckets[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }
}

/// Measures from the beginning of a round of proof, when the datapath begins to watch a stream, to the
/// moment it relays it. A round that ends in another way is not counted.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    rounds: BTreeMap<(u64, usize), Instant>,
    times: ProofTimes,
}

impl Stopwatch {
    /// The stream that comes in on `leg` of `pair` is in this state since `now`.
    pub(super) fn turn(&mut self, pair: u64, leg: usize, state: StreamState, now: Instant) {
        if state == StreamState::Watching {
            self.rounds.insert((pair, leg), now);
        } else if let Some(begun) = self.rounds.remove(&(pair, leg))
            && state == StreamState::Offloaded
        {
            self.times.add(now.saturating_duration_since(begun));
        }
    }

    /// A pair is no longer in the datapath's care.
    pub(super) fn end(&mut self, pair: u64) {
        for leg in 0..2 {
            self.rounds.remove(&(pair, leg));
        }
    }

    /// All times until now.
    pub(super) const fn times(&self) -> ProofTimes {
        self.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_round_that_ends_in_relaying_counts() {
        let mut stopwatch = Stopwatch::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // Not watched before: relayed on the operator's word.
        stopwatch.turn(1, 0, StreamState::Offloaded, at(0));
        assert_eq!(stopwatch.times(), ProofTimes::default());
        stopwatch.turn(1, 0, StreamState::Watching, at(0));
        stopwatch.turn(1, 1, StreamState::Watching, at(100));
        stopwatch.turn(1, 0, StreamState::Offloaded, at(150));
        stopwatch.turn(1, 1, StreamState::Suspended, at(200));
        stopwatch.turn(1, 1, StreamState::Offloaded, at(250));
        // A second round of the same stream, and one whose pair ends.
        stopwatch.turn(1, 0, StreamState::Watching, at(300));
        stopwatch.turn(1, 0, StreamState::Offloaded, at(100_300));
        stopwatch.turn(2, 0, StreamState::Watching, at(300));
        stopwatch.end(2);
        stopwatch.turn(2, 0, StreamState::Offloaded, at(400));
        let times = stopwatch.times();
        assert_eq!(times.buckets, [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert!((times.sum - 100.15).abs() < 1e-9, "{}", times.sum);
        assert!(stopwatch.rounds.is_empty());
    }
}
