//! Which queueing discipline waits at an interface's egress, and whether relayed packets must pass it.

use std::io;

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage},
};

use crate::netlink::exchange;

/// Those that only decide what goes first or is lost when the link is full. What goes around them
/// fares no worse. Any other is taken for one that shapes, or has classes that somebody chose.
const INDIFFERENT: [&str; 16] = [
    "bfifo",
    "choke",
    "codel",
    "fq",
    "fq_codel",
    "fq_pie",
    "hhf",
    "mq",
    "noqueue",
    "pfifo",
    "pfifo_fast",
    "pfifo_head_drop",
    "pie",
    "red",
    "sfb",
    "sfq",
];

/// Kind of the root queueing discipline of an interface, such as `htb`; none where it has none.
///
/// # Errors
/// The kernel's answer to `RTM_GETQDISC`.
pub fn root_qdisc(index: u32) -> io::Result<Option<String>> {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::ROOT;
    let request = RouteNetlinkMessage::GetQueueDiscipline(message);
    let mut found = None;
    exchange(request, NLM_F_ACK, |answer| {
        if let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer {
            found = qdisc
                .attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind),
                    _ => None,
                });
        }
    })?;
    Ok(found)
}

/// Whether packets that go around a queueing discipline of this kind spoil what it is for.
#[must_use]
pub fn shapes(kind: &str) -> bool {
    !INDIFFERENT.contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_with_classes_or_a_rate_shape() {
        for kind in [
            "htb", "hfsc", "cbq", "prio", "drr", "ets", "qfq", "tbf", "cake", "mqprio", "taprio",
            "netem", "etf",
        ] {
            assert!(shapes(kind), "{kind}");
        }
        for kind in ["mq", "noqueue", "pfifo_fast", "fq_codel", "fq", "sfq"] {
            assert!(!shapes(kind), "{kind}");
        }
    }
}
