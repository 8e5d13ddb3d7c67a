//! What one trial has shown of a relay.

use std::{collections::BTreeMap, fmt};

use super::traffic::{Load, Trial};

/// The share of a rate that the generator must reach.
const REACHED: f64 = 0.99;
/// The share of packets that our relay's program must relay: else it was the PBX behind it that was measured.
const IN_KERNEL: f64 = 0.9;

/// What a relay takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Packets per second.
    pub(super) rate: f64,
    /// CPU time for a packet, ns.
    pub(super) per_packet: f64,
    /// The share of what came in that our relay's program has relayed: the PBX behind it gets one packet of each stream
    /// now and then. None of other relays.
    pub(super) in_kernel: Option<f64>,
}

impl Cost {
    /// The share of its CPU.
    pub(super) fn share(&self) -> f64 {
        self.rate * self.per_packet / 1e9
    }
}

/// A trial, and what the relay did meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) load: Load,
    pub(super) trial: Trial,
    pub(super) cost: Cost,
    /// What our relay's program did with packets, by reason. Empty of other relays.
    pub(super) reasons: BTreeMap<String, u64>,
}

impl Sample {
    /// Whether the load was offered whole, and relayed whole, and by whom it should.
    pub(super) fn passes(&self) -> bool {
        self.trial.is_whole()
            && self.trial.rate() >= REACHED * self.load.rate
            && self.cost.in_kernel.is_none_or(|share| share >= IN_KERNEL)
    }
}

/// What is to be known where it has failed.
impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Trial { sent, received, .. } = self.trial;
        write!(
            f,
            "of {sent} packets at {:.0}/s, {} came as they should, {} twice and {} wrong, and at most {} were sent \
             while none came",
            self.trial.rate(),
            received.right,
            received.twice,
            received.wrong,
            received.silence
        )?;
        for (number, (reason, packets)) in self.reasons.iter().enumerate() {
            let before = if number == 0 { "; by reason: " } else { ", " };
            write!(f, "{before}{reason} {packets}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use relay_bench_ebpf::Received;

    use super::*;

    fn sample(right: u64, rate: f64, in_kernel: Option<f64>) -> Sample {
        Sample {
            load: Load::even(1000.0),
            trial: Trial {
                sent: 1000,
                received: Received {
                    right,
                    silence: 7,
                    ..Received::default()
                },
                took: Duration::from_secs_f64(1000.0 / rate),
            },
            cost: Cost {
                rate,
                per_packet: 1.0,
                in_kernel,
            },
            reasons: [("relayed".to_owned(), right)].into(),
        }
    }

    #[test]
    fn what_is_not_whole_or_not_the_load_or_not_the_kernel_s_fails() {
        assert!(sample(1000, 1000.0, None).passes());
        assert!(sample(1000, 1000.0, Some(0.99)).passes());
        assert!(!sample(999, 1000.0, None).passes());
        assert!(!sample(1000, 900.0, None).passes());
        assert!(!sample(1000, 1000.0, Some(0.5)).passes());
    }

    #[test]
    fn a_failure_tells_what_came_and_why() {
        assert_eq!(
            sample(999, 1000.0, None).to_string(),
            "of 1000 packets at 1000/s, 999 came as they should, 0 twice and 0 wrong, and at most 7 were sent while \
             none came; by reason: relayed 999"
        );
    }
}
