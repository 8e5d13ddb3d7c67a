//! Packets by verdict and reason, and how fast they come: what `stats` tells.

use relay_common::{reason::Reason, stream::Counter};
use serde::{Deserialize, Serialize};

use crate::control::model::{ReasonReport, Verdict};

/// Packets by reason at one moment.
#[derive(Clone, Debug)]
pub struct Totals {
    /// Name of the interface.
    pub interface: String,
    /// When: `CLOCK_MONOTONIC`, ns.
    pub at: u64,
    /// In the order of the reasons' numbers.
    pub reasons: Vec<ReasonReport>,
}

/// What became of the packets of an interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Name of the interface.
    pub interface: String,
    /// Seconds over which the rates are taken; none for the first report, which has none.
    pub seconds: Option<f64>,
    /// By verdict.
    pub verdicts: Vec<VerdictStats>,
}

/// Packets of one verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerdictStats {
    /// What the datapath did with them.
    pub verdict: Verdict,
    /// All of them.
    pub total: Traffic,
    /// By reason, the most packets first; reasons without any are left out.
    pub reasons: Vec<ReasonStats>,
}

/// Packets of one reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReasonStats {
    /// The reason's name.
    pub reason: String,
    /// How many.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// How many packets, and how fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets since attaching.
    pub packets: u64,
    /// Their bytes, Ethernet header included.
    pub bytes: u64,
    /// Packets a second since the report before; none for the first.
    pub packets_per_second: Option<f64>,
    /// Bits a second likewise.
    pub bits_per_second: Option<f64>,
}

/// The rows of the map of counters as the API shows them.
#[must_use]
pub fn reasons(counters: &[(Reason, Counter)]) -> Vec<ReasonReport> {
    let rows = counters.iter().map(|(reason, counter)| ReasonReport {
        reason: reason.name().to_owned(),
        verdict: reason.verdict().into(),
        packets: counter.packets,
        bytes: counter.bytes,
    });
    rows.collect()
}

impl StatsReport {
    /// What the counters say, with rates where they were read once before.
    #[must_use]
    pub fn new(before: Option<&Totals>, now: &Totals) -> Self {
        let seconds = before
            .map(|before| now.at.saturating_sub(before.at) as f64 / 1e9)
            .filter(|seconds| *seconds > 0.0);
        let rows: Vec<(Verdict, ReasonStats)> = now
            .reasons
            .iter()
            .filter(|row| row.packets != 0)
            .map(|row| {
                let earlier = before.and_then(|before| {
                    let mut rows = before.reasons.iter();
                    rows.find(|earlier| earlier.reason == row.reason)
                });
                let per_second = |now: u64, before: fn(&ReasonReport) -> u64| {
                    let before = before(earlier?);
                    // Counters that fell are another instance's.
                    Some(now.checked_sub(before)? as f64 / seconds?)
                };
                let traffic = Traffic {
                    packets: row.packets,
                    bytes: row.bytes,
                    packets_per_second: per_second(row.packets, |row| row.packets),
                    bits_per_second: per_second(row.bytes, |row| row.bytes).map(|rate| rate * 8.0),
                };
                let reason = row.reason.clone();
                (row.verdict, ReasonStats { reason, traffic })
            })
            .collect();
        let verdicts = [Verdict::Relayed, Verdict::Passed, Verdict::Dropped];
        Self {
            interface: now.interface.clone(),
            seconds,
            verdicts: verdicts
                .into_iter()
                .map(|verdict| VerdictStats::new(verdict, &rows, seconds.is_some()))
                .collect(),
        }
    }

    /// Packets of every verdict.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.verdicts.iter().map(|row| row.total.packets).sum()
    }
}

impl VerdictStats {
    fn new(verdict: Verdict, rows: &[(Verdict, ReasonStats)], with_rates: bool) -> Self {
        let mut reasons: Vec<ReasonStats> = rows
            .iter()
            .filter(|(of, _)| *of == verdict)
            .map(|(_, row)| row.clone())
            .collect();
        reasons.sort_by_key(|row| std::cmp::Reverse(row.traffic.packets));
        let sum = |rate: fn(&Traffic) -> Option<f64>| {
            let mut rates = reasons.iter().map(|row| rate(&row.traffic));
            // The standard library's sum of nothing is -0.
            let sum = rates.try_fold(0.0, |sum, rate| Some(sum + rate?));
            sum.filter(|_| with_rates)
        };
        Self {
            verdict,
            total: Traffic {
                packets: reasons.iter().map(|row| row.traffic.packets).sum(),
                bytes: reasons.iter().map(|row| row.traffic.bytes).sum(),
                packets_per_second: sum(|traffic| traffic.packets_per_second),
                bits_per_second: sum(|traffic| traffic.bits_per_second),
            },
            reasons,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(at: u64, packets: [u64; 3]) -> Totals {
        let counted = [Reason::Relayed, Reason::NoStream, Reason::Watching];
        let counters: Vec<_> = counted
            .into_iter()
            .zip(packets)
            .map(|(reason, packets)| {
                let bytes = packets * 200;
                (reason, Counter { packets, bytes })
            })
            .collect();
        Totals {
            interface: "eth0".into(),
            at,
            reasons: reasons(&counters),
        }
    }

    #[test]
    fn reasons_stand_under_their_verdict_the_most_frequent_first() {
        let stats = StatsReport::new(None, &totals(0, [10, 3, 20]));
        assert_eq!(stats.packets(), 33);
        assert_eq!(stats.seconds, None);
        let [relayed, passed, dropped] = &stats.verdicts[..] else {
            panic!("three verdicts")
        };
        assert_eq!(
            (relayed.verdict, relayed.total.packets),
            (Verdict::Relayed, 10)
        );
        assert_eq!((passed.total.packets, passed.total.bytes), (23, 4600));
        let names: Vec<_> = passed
            .reasons
            .iter()
            .map(|row| row.reason.as_str())
            .collect();
        assert_eq!(names, ["watching", "no_stream"]);
        assert_eq!(passed.total.packets_per_second, None);
        assert_eq!(dropped.total, Traffic::default());
        assert!(dropped.reasons.is_empty());
    }

    #[test]
    fn rates_are_those_between_two_reports() {
        let before = totals(1_000_000_000, [10, 3, 20]);
        let stats = StatsReport::new(Some(&before), &totals(3_000_000_000, [110, 3, 30]));
        assert_eq!(stats.seconds, Some(2.0));
        let relayed = &stats.verdicts[0];
        assert_eq!(relayed.total.packets_per_second, Some(50.0));
        assert_eq!(relayed.total.bits_per_second, Some(80_000.0));
        assert_eq!(stats.verdicts[1].total.packets_per_second, Some(5.0));
        let nothing = stats.verdicts[2].total.packets_per_second.expect("a rate");
        assert_eq!(nothing.to_string(), "0");
        assert_eq!(
            stats.verdicts[1].reasons[1].traffic.packets_per_second,
            Some(0.0)
        );
        // Of another instance, whose counters began anew.
        let fell = StatsReport::new(Some(&before), &totals(3_000_000_000, [1, 1, 1]));
        assert_eq!(fell.verdicts[0].total.packets_per_second, None);
        // Read twice at once.
        let same = StatsReport::new(Some(&before), &before);
        assert_eq!(
            (same.seconds, same.verdicts[0].total.bits_per_second),
            (None, None)
        );
    }
}
