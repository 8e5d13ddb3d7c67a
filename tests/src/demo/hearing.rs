//! What the phones heard, judged packet by packet after the calls.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

/// The parts of the demo, in the order of time. A packet belongs to the part in which it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Without the relay.
    Without,
    /// From the `attach` command until every call is offloaded.
    TurningOn,
    /// Every call offloaded.
    With,
    /// From the `flush` command to its answer.
    TurningOff,
    /// After `flush`.
    After,
    /// Not looked at any more.
    End,
}

/// One direction of a call.
#[derive(Clone, Debug, Default)]
pub(super) struct Stream {
    /// Every packet sent.
    pub(super) sent: Vec<Sent>,
    /// Every packet received, in order.
    pub(super) arrivals: Vec<Arrival>,
}

/// A packet as the phone sent it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    /// A number that no other packet of the stream has.
    pub(super) number: u64,
    /// When, roughly.
    pub(super) part: Part,
    /// When, since the Unix epoch, if that was seen on the wire.
    pub(super) at: Option<Duration>,
}

/// A packet as the phone got it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    /// The number of the packet.
    pub(super) number: u64,
    /// When, since the Unix epoch.
    pub(super) at: Duration,
    /// Its differentiated services code point (0–63).
    pub(super) dscp: u8,
}

/// All streams together, in some parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hearing {
    /// Packets sent.
    pub(super) sent: u64,
    /// Of these, never received.
    pub(super) lost: u64,
    /// Packets received again.
    pub(super) duplicates: u64,
    /// Longest wait of a phone for the next packet.
    pub(super) largest_gap: Duration,
    /// Longest time of a packet from phone to phone, if the sending was seen.
    pub(super) longest_way: Option<Duration>,
    /// DSCP values in the last of the parts, in rising order; not those of less than three packets in a hundred,
    /// which may go through the PBX for a good reason of their own: it must hear of each phone every 3 seconds.
    pub(super) dscp: Vec<u8>,
}

impl Hearing {
    /// Judges the packets sent in `parts`. A gap counts in the part of the packet that ends it.
    pub(super) fn of(streams: &[Stream], parts: &[Part]) -> Self {
        let mut hearing = Self::default();
        let mut dscp = BTreeMap::<_, u64>::new();
        for stream in streams {
            // How often each packet came.
            let mut sent: HashMap<_, _> = stream
                .sent
                .iter()
                .filter(|sent| parts.contains(&sent.part))
                .map(|sent| (sent.number, (sent, 0_u64)))
                .collect();
            let mut last = None;
            for arrival in &stream.arrivals {
                if let Some((sent, times)) = sent.get_mut(&arrival.number) {
                    *times += 1;
                    let gap = arrival.at.saturating_sub(last.unwrap_or(arrival.at));
                    hearing.largest_gap = hearing.largest_gap.max(gap);
                    let way = sent.at.map(|at| arrival.at.saturating_sub(at));
                    hearing.longest_way = hearing.longest_way.max(way);
                    if Some(&sent.part) == parts.last() {
                        *dscp.entry(arrival.dscp).or_default() += 1;
                    }
                }
                last = Some(arrival.at);
            }
            hearing.sent += sent.len() as u64;
            hearing.lost += sent.values().filter(|(_, times)| *times == 0).count() as u64;
            hearing.duplicates += sent
                .values()
                .map(|(_, times)| times.saturating_sub(1))
                .sum::<u64>();
        }
        let all: u64 = dscp.values().sum();
        hearing.dscp = dscp
            .into_iter()
            .filter(|(_, packets)| packets * 100 >= 3 * all)
            .map(|(code, _)| code)
            .collect();
        hearing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_and_duplicates_count_where_the_packet_was_sent() {
        let arrival = |number, at, dscp| Arrival {
            number,
            at: Duration::from_millis(at),
            dscp,
        };
        let parts = [
            Part::Without,
            Part::Without,
            Part::TurningOn,
            Part::With,
            Part::With,
            Part::End,
        ];
        let sent = parts.into_iter().zip(0_u32..).map(|(part, number)| Sent {
            number: number.into(),
            part,
            at: Some(Duration::from_millis(20) * number),
        });
        let stream = Stream {
            sent: sent.collect(),
            // 1 is late, 2 lost, 3 doubled, 5 lost after the end.
            arrivals: vec![
                arrival(0, 0, 0),
                arrival(3, 60, 46),
                arrival(1, 70, 0),
                arrival(3, 80, 46),
                arrival(4, 110, 46),
            ],
        };
        let without = Hearing::of(std::slice::from_ref(&stream), &[Part::Without]);
        let expected = Hearing {
            sent: 2,
            lost: 0,
            duplicates: 0,
            largest_gap: Duration::from_millis(10),
            longest_way: Some(Duration::from_millis(50)),
            dscp: vec![0],
        };
        assert_eq!(without, expected);
        let with = Hearing::of(&[stream.clone(), stream], &[Part::TurningOn, Part::With]);
        let expected = Hearing {
            sent: 6,
            lost: 2,
            duplicates: 2,
            largest_gap: Duration::from_millis(60),
            longest_way: Some(Duration::from_millis(30)),
            dscp: vec![46],
        };
        assert_eq!(with, expected);
    }
}
