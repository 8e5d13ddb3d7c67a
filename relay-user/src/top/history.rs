//! What a stream's figures were in the last minutes.

use std::collections::VecDeque;

use relay_common::reception::Reception;

/// Points that are kept: two minutes at one a second.
pub const LENGTH: usize = 120;

/// A stream in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// RTP packets received a second.
    pub rate: f32,
    /// Packets lost in the interval, percent of those expected in it.
    pub loss: f32,
    /// Interarrival jitter at its end, ms; 0 where it is not known.
    pub jitter: f32,
}

/// The latest points of a stream, and what the next one is reckoned from.
#[derive(Clone, Debug, Default)]
pub struct History {
    before: Option<Reckoning>,
    points: VecDeque<Point>,
}

#[derive(Clone, Copy, Debug)]
struct Reckoning {
    /// `CLOCK_MONOTONIC`, ns.
    at: u64,
    packets: u32,
    expected: u64,
    lost: u64,
}

impl History {
    /// Takes the figures of a moment (`CLOCK_MONOTONIC`, ns; jitter in ms), and adds a point where they
    /// can be compared with those before. Figures that fell are a new measurement's.
    pub fn observe(&mut self, reception: &Reception, jitter: Option<f64>, at: u64) {
        let now = Reckoning {
            at,
            packets: reception.packets,
            expected: reception.expected(),
            lost: reception.lost(),
        };
        if let Some(point) = self.before.and_then(|before| before.until(&now)) {
            if self.points.len() == LENGTH {
                self.points.pop_front();
            }
            self.points.push_back(Point {
                jitter: jitter.unwrap_or_default() as f32,
                ..point
            });
        }
        self.before = Some(now);
    }

    /// The latest point; none before the second moment.
    #[must_use]
    pub fn latest(&self) -> Option<Point> {
        self.points.back().copied()
    }

    /// The latest points, at most so many, the oldest first.
    pub fn last(&self, count: usize) -> impl Iterator<Item = Point> + '_ {
        let skipped = self.points.len().saturating_sub(count);
        self.points.iter().skip(skipped).copied()
    }
}

impl Reckoning {
    /// What happened from here to a later moment.
    fn until(&self, now: &Self) -> Option<Point> {
        let seconds = now.at.checked_sub(self.at).filter(|time| *time > 0)? as f64 / 1e9;
        let packets = now.packets.checked_sub(self.packets)?;
        let expected = now.expected.checked_sub(self.expected)?;
        // A late packet takes a loss back.
        let lost = now.lost.saturating_sub(self.lost);
        let loss = if expected == 0 {
            0.0
        } else {
            (lost as f64 * 100.0 / expected as f64).min(100.0)
        };
        Some(Point {
            rate: (f64::from(packets) / seconds) as f32,
            loss: loss as f32,
            jitter: 0.0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// So many packets received of so many expected.
    fn heard(packets: u32, expected: u32) -> Reception {
        Reception {
            packets,
            first: 0x1_0000,
            highest: 0x1_0000 + expected - 1,
            ..Reception::default()
        }
    }

    #[test]
    fn a_point_is_what_happened_since_the_moment_before() {
        let mut history = History::default();
        history.observe(&heard(100, 100), Some(1.0), SECOND);
        assert_eq!(history.latest(), None);
        history.observe(&heard(145, 150), Some(2.5), 3 * SECOND);
        let point = Point {
            rate: 22.5,
            loss: 10.0,
            jitter: 2.5,
        };
        assert_eq!(history.latest(), Some(point));
        // Silence.
        history.observe(&heard(145, 150), None, 4 * SECOND);
        assert_eq!(history.latest(), Some(Point::default()));
        // Measured anew.
        history.observe(&heard(3, 3), None, 5 * SECOND);
        assert_eq!(history.last(9).count(), 2);
        history.observe(&heard(53, 53), None, 6 * SECOND);
        assert_eq!(history.latest().map(|point| point.rate), Some(50.0));
        // Read twice at once.
        history.observe(&heard(53, 53), None, 6 * SECOND);
        assert_eq!(history.last(9).count(), 3);
    }

    #[test]
    fn only_the_latest_points_are_kept() {
        let mut history = History::default();
        for second in 0..=LENGTH as u64 + 10 {
            let packets = 1 + (second * second) as u32;
            history.observe(&heard(packets, packets), None, second * SECOND);
        }
        let rates: Vec<_> = history.last(usize::MAX).map(|point| point.rate).collect();
        assert_eq!(rates.len(), LENGTH);
        assert_eq!(rates[0], 2.0 * 10.0 + 1.0);
        let last: Vec<_> = history.last(2).map(|point| point.rate).collect();
        assert_eq!(last, rates[LENGTH - 2..]);
    }
}
