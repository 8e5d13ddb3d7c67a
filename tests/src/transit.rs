//! What a network did to a stream of packets: loss, delay and jitter.

use std::time::Duration;

/// A stream as it went through a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Transit {
    /// Packets sent.
    pub sent: u64,
    /// Longest time between two sendings, ms. A busy machine holds the sender up, which then sends all at once what
    /// was due, as no phone does: what the network makes of that says nothing of a call.
    pub pause: f64,
    /// Of these, never received.
    pub lost: u64,
    /// How much the delay varied.
    pub jitter: Jitter,
    /// Time of a packet from end to end.
    pub delay: Delay,
}

/// Interarrival jitter J of RFC 3550, section 6.4.1 (appendix A.8), ms. What a packet's RTP timestamp stands for there,
/// the time of its sending, is known here: a sender that is late is not the network's jitter.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Jitter {
    /// Mean of the estimate after each packet.
    pub mean: f64,
    /// Highest estimate.
    pub max: f64,
}

/// One-way delay, ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Delay {
    /// Mean.
    pub mean: f64,
    /// Half of the packets took no longer.
    pub median: f64,
    /// 99 of 100 packets took no longer.
    pub p99: f64,
    /// 999 of 1,000 packets took no longer.
    pub p999: f64,
    /// The slowest packet's.
    pub max: f64,
}

impl Transit {
    /// Judges a stream by when each packet was sent, and by the packets that arrived, in that order: each with its index
    /// among those sent and its time on the same clock. One that comes again, or that nobody sent, is not looked at.
    pub fn of(sent: &[Duration], arrivals: impl IntoIterator<Item = (usize, Duration)>) -> Self {
        let mut seen = vec![false; sent.len()];
        let mut ways = Vec::new();
        for (index, at) in arrivals {
            if let Some(seen @ false) = seen.get_mut(index) {
                *seen = true;
                ways.push(at.saturating_sub(sent[index]).as_secs_f64() * 1000.0);
            }
        }
        Self {
            sent: sent.len() as u64,
            pause: sent
                .windows(2)
                .map(|pair| pair[1].saturating_sub(pair[0]).as_secs_f64() * 1000.0)
                .fold(0.0, f64::max),
            lost: (sent.len() - ways.len()) as u64,
            jitter: Jitter::of(&ways),
            delay: Delay::of(ways),
        }
    }
}

impl Jitter {
    /// Of transit times in the order of arrival.
    fn of(ways: &[f64]) -> Self {
        let mut estimate = 0.0;
        let estimates: Vec<f64> = ways
            .windows(2)
            .map(|pair| {
                estimate += ((pair[1] - pair[0]).abs() - estimate) / 16.0;
                estimate
            })
            .collect();
        Self {
            mean: mean(&estimates),
            max: estimates.into_iter().fold(0.0, f64::max),
        }
    }
}

impl Delay {
    fn of(mut ways: Vec<f64>) -> Self {
        ways.sort_by(f64::total_cmp);
        Self {
            mean: mean(&ways),
            median: quantile(&ways, 500),
            p99: quantile(&ways, 990),
            p999: quantile(&ways, 999),
            max: quantile(&ways, 1000),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The lowest of the sorted values that so many of 1,000 do not exceed (nearest rank); 0 of none.
fn quantile(sorted: &[f64], of_1000: usize) -> f64 {
    let rank = (sorted.len() * of_1000).div_ceil(1000);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    /// A packet each 20 ms.
    fn sendings(count: u64) -> Vec<Duration> {
        (0..count).map(|number| milliseconds(20 * number)).collect()
    }

    fn close(value: f64, expected: f64) -> bool {
        (value - expected).abs() < 1e-6
    }

    #[test]
    fn a_network_that_only_takes_time_has_no_jitter() {
        let sent = sendings(100);
        let arrivals = sent.iter().map(|at| *at + milliseconds(30)).enumerate();
        let Transit { jitter, delay, .. } = Transit::of(&sent, arrivals);
        assert!(close(jitter.max, 0.0), "{jitter:?}");
        for value in [delay.mean, delay.median, delay.p99, delay.p999, delay.max] {
            assert!(close(value, 30.0), "{delay:?}");
        }
    }

    #[test]
    fn jitter_is_that_of_the_rfc() {
        // Delays of 10 and 26 ms in turn: |D| = 16 ms, J = 16 (1 - (15/16)^n).
        let sent = sendings(3);
        let delays = [10, 26, 10].map(milliseconds);
        let arrivals = sent.iter().zip(delays).map(|(at, delay)| *at + delay);
        let jitter = Transit::of(&sent, arrivals.enumerate()).jitter;
        assert!(close(jitter.max, 1.0 + 15.0 / 16.0), "{jitter:?}");
        assert!(close(jitter.mean, 1.0 + 15.0 / 32.0), "{jitter:?}");
    }

    #[test]
    fn loss_counts_each_packet_once() {
        let sent = sendings(4);
        let at = |index: usize| (index, sent[index] + milliseconds(1));
        // 1 is lost, 2 comes before 0 and twice, 7 is nobody's.
        let strange = (7, milliseconds(200));
        let transit = Transit::of(&sent, [at(2), at(0), at(2), strange, at(3)]);
        assert_eq!((transit.sent, transit.lost), (4, 1));
        assert_eq!(Transit::of(&sent, []).lost, 4);
    }

    #[test]
    fn a_sender_that_was_held_up_is_seen() {
        let sent = [0, 20, 160, 160, 160].map(milliseconds);
        assert!(close(Transit::of(&sent, []).pause, 140.0));
        assert!(close(Transit::of(&sent[..1], []).pause, 0.0));
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=2000).map(f64::from).collect();
        assert!(close(quantile(&values, 500), 1000.0));
        assert!(close(quantile(&values, 990), 1980.0));
        assert!(close(quantile(&values, 999), 1998.0));
        assert!(close(quantile(&values, 1000), 2000.0));
        assert!(close(quantile(&values[..1], 500), 1.0));
        assert!(close(quantile(&[], 500), 0.0));
    }
}
