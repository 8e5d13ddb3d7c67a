//! The self-test of native XDP: what a neighbour answers to the host is turned, by XDP_TX, into a
//! question of its own. Whoever hears the answer to that knows that the driver sends.
//!
//! The second question is an ARP probe (RFC 5227 section 2.1.1), whose sender has no address: nobody's
//! table changes by it, and its answer is told from the first by its target.

use crate::{
    abi::abi,
    wire::{ArpFrame, Be16},
};

/// EtherType of ARP (RFC 826).
const ARP: Be16 = Be16::new(0x0806);
const REQUEST: Be16 = Be16::new(1);
const REPLY: Be16 = Be16::new(2);
/// No address yet (RFC 5227).
const NOBODY: [Be16; 2] = [Be16::new(0); 2];

abi! {
    /// Whom to ask, and how it went. The addresses are written by the controller, the rest by the
    /// datapath.
    pub struct Probe(24, align 4) {
        /// MAC address of the interface.
        pub mac: [Be16; 3],
        /// IPv4 address of the interface.
        pub own: [Be16; 2],
        /// IPv4 address of the neighbour.
        pub neighbour: [Be16; 2],
        /// Zero.
        pub reserved: [u8; 2],
        /// Questions sent by XDP_TX.
        pub sent: u32,
        /// Answers to them.
        pub answered: u32,
    }
}

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send it: it is a question now.
    Send,
    /// It answers such a question.
    Answered,
    /// None of the test's.
    Pass,
}

impl Probe {
    /// A test that has not begun. All addresses are in the order of the wire.
    #[must_use]
    pub fn new(mac: [u8; 6], own: [u8; 4], neighbour: [u8; 4]) -> Self {
        Self {
            mac: zerocopy::transmute!(mac),
            own: zerocopy::transmute!(own),
            neighbour: zerocopy::transmute!(neighbour),
            reserved: [0; 2],
            sent: 0,
            answered: 0,
        }
    }

    /// The question that the host puts itself; from nobody where `anonymous`.
    #[must_use]
    pub fn question(&self, anonymous: bool) -> ArpFrame {
        ArpFrame {
            destination: [Be16::new(0xffff); 3],
            source: self.mac,
            ethertype: ARP,
            hardware: Be16::new(1),
            protocol: Be16::new(0x0800),
            lengths: Be16::new(0x0604),
            operation: REQUEST,
            sender_mac: self.mac,
            sender: if anonymous { NOBODY } else { self.own },
            target_mac: [Be16::new(0); 3],
            target: self.neighbour,
        }
    }

    /// Looks at a frame that came in, and turns an answer to the host into the next question.
    #[inline(always)]
    pub fn step(&self, frame: &mut ArpFrame) -> Step {
        if frame.ethertype != ARP || frame.operation != REPLY || frame.sender != self.neighbour {
            return Step::Pass;
        }
        if frame.target == NOBODY {
            return Step::Answered;
        }
        if frame.target != self.own {
            return Step::Pass;
        }
        frame.destination = frame.sender_mac;
        frame.source = self.mac;
        frame.operation = REQUEST;
        frame.sender_mac = self.mac;
        frame.sender = NOBODY;
        frame.target_mac = [Be16::new(0); 3];
        frame.target = self.neighbour;
        Step::Send
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THERE: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

    fn probe() -> Probe {
        Probe::new([2, 0, 0, 0, 0, 1], [192, 0, 2, 1], [192, 0, 2, 11])
    }

    /// What the neighbour answers.
    fn answer(question: &ArpFrame) -> ArpFrame {
        ArpFrame {
            destination: question.source,
            source: zerocopy::transmute!(THERE),
            operation: REPLY,
            sender_mac: zerocopy::transmute!(THERE),
            sender: question.target,
            target_mac: question.sender_mac,
            target: question.sender,
            ..*question
        }
    }

    #[test]
    fn an_answer_becomes_a_question_whose_answer_is_known() {
        let probe = probe();
        let mut frame = answer(&probe.question(false));
        assert_eq!(probe.step(&mut frame), Step::Send);
        let asked = ArpFrame {
            destination: zerocopy::transmute!(THERE),
            ..probe.question(true)
        };
        assert_eq!(frame, asked);
        let mut answered = answer(&frame);
        let before = answered;
        assert_eq!(probe.step(&mut answered), Step::Answered);
        assert_eq!(answered, before);
    }

    #[test]
    fn what_others_say_is_left_alone() {
        let probe = probe();
        let stranger = Probe::new([2, 0, 0, 0, 0, 1], [192, 0, 2, 1], [192, 0, 2, 12]);
        let to_another = Probe::new([2, 0, 0, 0, 0, 1], [192, 0, 2, 9], [192, 0, 2, 11]);
        for frame in [
            probe.question(false),
            answer(&stranger.question(false)),
            answer(&to_another.question(false)),
            ArpFrame {
                ethertype: Be16::new(0x0800),
                ..answer(&probe.question(false))
            },
        ] {
            let mut seen = frame;
            assert_eq!(probe.step(&mut seen), Step::Pass);
            assert_eq!(seen, frame);
        }
    }
}
