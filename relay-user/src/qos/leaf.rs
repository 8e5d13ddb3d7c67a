//! The queueing disciplines inside a class.

use serde::{Deserialize, Serialize};
use zerocopy::{Immutable, IntoBytes};

use super::{object::Attribute, tbf};

/// Which one, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Leaf {
    /// Each flow its own queue, and none longer than some milliseconds (RFC 8290).
    FqCodel,
    /// Each flow its own queue.
    Sfq,
    /// One queue.
    Pfifo,
}

/// What is inside a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Leaves {
    /// What shares out.
    pub(super) fair: Leaf,
    /// Whether, on a slow line, packets are cut first that are sent as one.
    pub(super) split: bool,
}

impl Leaves {
    /// What is wished for.
    pub(super) const BEST: Self = Self {
        fair: Leaf::FqCodel,
        split: true,
    };

    /// The best without a kind that the kernel does not have; none if it is not one of these.
    pub(super) fn without(self, kind: &str) -> Option<Self> {
        if kind == tbf::KIND && self.split {
            return Some(Self {
                split: false,
                ..self
            });
        }
        let fair = match self.fair {
            Leaf::FqCodel => Leaf::Sfq,
            Leaf::Sfq => Leaf::Pfifo,
            Leaf::Pfifo => return None,
        };
        (kind == self.fair.kind()).then_some(Self { fair, ..self })
    }
}

impl Leaf {
    /// The kernel's name of it.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::FqCodel => "fq_codel",
            Self::Sfq => "sfq",
            Self::Pfifo => "pfifo",
        }
    }

    /// The content of `TCA_OPTIONS`, for a class with this ceiling in bit/s and packets of at most
    /// `frame` bytes.
    pub(super) fn options(self, ceiling: u64, frame: u32) -> Vec<u8> {
        let bytes_per_second = (ceiling / 8).max(1);
        match self {
            Self::FqCodel => {
                // TCA_FQ_CODEL_* of include/uapi/linux/pkt_sched.h, in microseconds.
                const TARGET: u16 = 1;
                const INTERVAL: u16 = 3;
                const USUAL_TARGET: u64 = 5_000;
                const USUAL_INTERVAL: u64 = 100_000;
                // A queue is no sign of congestion while it is one packet on the wire and the next
                // one behind it (RFC 8289 section 4.3): below 4 Mbit/s that takes longer than usual.
                let packet = u64::from(frame) * 1_000_000 / bytes_per_second;
                let target = (packet * 3 / 2).max(USUAL_TARGET);
                let interval = USUAL_INTERVAL + (target - USUAL_TARGET);
                let micros = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_ne_bytes();
                Attribute::nest([
                    Attribute::new(TARGET, micros(target)),
                    Attribute::new(INTERVAL, micros(interval)),
                ])
            }
            Self::Sfq => {
                /// `struct tc_sfq_qopt`; what is 0 stays as the kernel has it.
                #[derive(IntoBytes, Immutable)]
                #[repr(C)]
                struct Options {
                    quantum: u32,
                    perturb_period: i32,
                    limit: u32,
                    divisor: u32,
                    flows: u32,
                }
                // Flows that share a queue by chance do so for 10 seconds.
                let options = Options {
                    quantum: 0,
                    perturb_period: 10,
                    limit: 0,
                    divisor: 0,
                    flows: 0,
                };
                options.as_bytes().to_vec()
            }
            Self::Pfifo => {
                // `struct tc_fifo_qopt`. A quarter of a second of full-size packets: longer, and
                // senders take it for loss. A few even on the slowest line, for a burst of small ones.
                const FEWEST: u64 = 32;
                const MOST: u64 = 1_000;
                let packets = bytes_per_second / 4 / u64::from(frame);
                let limit = packets.clamp(FEWEST, MOST) as u32;
                limit.to_ne_bytes().to_vec()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_done_without() {
        let without = |kinds: &[&str]| {
            let left = |leaves: Leaves, kind: &&str| leaves.without(kind);
            kinds.iter().try_fold(Leaves::BEST, left)
        };
        let leaves = |fair, split| Some(Leaves { fair, split });
        assert_eq!(without(&["fq_codel"]), leaves(Leaf::Sfq, true));
        assert_eq!(
            without(&["tbf", "fq_codel", "sfq"]),
            leaves(Leaf::Pfifo, false)
        );
        assert_eq!(without(&["htb"]), None);
        assert_eq!(without(&["tbf", "tbf"]), None);
        assert_eq!(without(&["fq_codel", "sfq", "pfifo"]), None);
    }

    #[test]
    fn queues_are_as_long_as_the_line_is_fast() {
        let packets = |ceiling| {
            let options = Leaf::Pfifo.options(ceiling, 1518);
            u32::from_ne_bytes(options.try_into().expect("a number"))
        };
        assert_eq!(packets(950_000), 32);
        assert_eq!(packets(9_500_000), 195);
        assert_eq!(packets(95_000_000_000), 1_000);
        let target = |ceiling| {
            let attributes = Attribute::all(&Leaf::FqCodel.options(ceiling, 1518));
            u32::from_ne_bytes(attributes[0].value().try_into().expect("a number"))
        };
        // 1518 bytes take 12.8 ms at 950 kbit/s.
        assert_eq!(target(950_000), 19_174);
        assert_eq!(target(95_000_000), 5_000);
    }
}
