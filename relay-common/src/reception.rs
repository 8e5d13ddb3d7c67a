//! How a phone's packets arrive: loss, order and jitter, as RFC 3550 appendix A has them.
//!
//! Every RTP packet of the stream's own source is counted, whether the kernel relays it or the PBX
//! does, so that a call is measured from its first packet on.

use crate::{
    abi::abi,
    relay::RtpFields,
    state::{load, store},
    stream::State,
};

/// Payload types of one stream that are told apart.
pub const TYPES: usize = 4;

/// A sequence number that jumps by less is one after a loss (`MAX_DROPOUT` of RFC 3550 appendix A.1).
const DROPOUT_MAX: u32 = 3000;

/// One that falls back by less is late (RFC 3550 has 100; these are the packets that are remembered).
const MISORDER_MAX: u32 = u64::BITS;

/// Of [`Reception::clock`]: 2^8 ns.
const CLOCK_SHIFT: u32 = 8;

/// Of jitter: 2^6 ns, and in [`Reception::jitter`] a sixteenth of that.
const JITTER_SHIFT: u32 = 6;

/// Of gaps: 2^10 ns.
const GAP_SHIFT: u32 = 10;

/// The longest deviation that counts as jitter, in its unit: 8.6 s. Sixteen of them fit 32 bits.
const DEVIATION_MAX: u64 = 1 << 27;

/// No payload type.
const NONE: u8 = 0xff;

/// Values of DSCP that a stream's packets are counted by: a phone has one or two, for RTP before and
/// after an answer, and a network that changes them makes it twice as many.
pub const MARKS: usize = 4;

abi! {
    /// How the packets of a stream arrived. Every field is the receiver's, but for the controller's
    /// `clock` and `clock_type`.
    ///
    /// The first 64 bytes are what a packet touches that comes in order.
    pub struct Reception(128, align 8) {
        /// When the latest packet came: `CLOCK_MONOTONIC`, ns; 0 before the first.
        pub arrival: u64,
        /// Bytes received, whole frames without their check sequence.
        pub bytes: u64,
        /// Sum of `jitter` after each packet that was measured.
        pub jitter_sum: u64,
        /// The 64 sequence numbers up to `highest`: a bit is set where the packet came, the lowest
        /// one for `highest` itself.
        pub window: u64,
        /// Packets received, duplicates included, and merged ones as what they were.
        pub packets: u32,
        /// Synchronisation source (SSRC).
        pub source: u32,
        /// RTP timestamp of the latest packet.
        pub timestamp: u32,
        /// Highest extended sequence number.
        pub highest: u32,
        /// Interarrival jitter (RFC 3550 appendix A.8), in units of 4 ns.
        pub jitter: u32,
        /// The highest of the measured packets, in the same unit.
        pub jitter_max: u32,
        /// Longest time between two packets within a talkspurt, in units of 1.024 µs.
        pub gap_max: u32,
        /// Payload type of the latest packet; 0xff before the first.
        pub payload_type: u8,
        /// Its DSCP (0–63); 0xff before the first.
        pub dscp: u8,
        /// The payload type that `clock` is of; 0xff for none.
        pub clock_type: u8,
        /// A payload type of events: packets in a row had one timestamp (RFC 4733 section 2.2.1); 0xff for
        /// none.
        pub event_type: u8,
        /// Extended sequence number of the first packet: 2^16 and the number itself, or less where an
        /// earlier one came later.
        pub first: u32,
        /// Packets expected before `first`: of earlier sources, and before restarts.
        pub expected_before: u32,
        /// Packets whose sequence number had come before.
        pub duplicates: u32,
        /// Packets that came after one of a higher number.
        pub late: u32,
        /// Packets that are not in `jitter_sum`: those that begin a talkspurt or a sequence, strays, comfort
        /// noise, those whose clock is not known or another than that of the packet before, and what came
        /// merged behind another.
        pub unmeasured: u32,
        /// Time that one unit of the timestamp takes, for packets of `clock_type`, in units of 2^-8 ns;
        /// 0 while it is not known.
        pub clock: u32,
        /// After a packet far from all others: in the upper half the lower one of `highest` at the time,
        /// in the lower half the number that would follow. 0 for none: that number is not far from
        /// itself.
        pub jump: u32,
        /// Packets with the marker.
        pub markers: u32,
        /// Changes of the synchronisation source.
        pub source_changes: u16,
        /// Restarts of the sequence within one source.
        pub restarts: u16,
        /// Payload types that came, in the order in which they first did; 0xff for none. The last entry
        /// is overwritten once there are more.
        pub types: [u8; TYPES],
        /// Packets by the DSCP that they came with, in the order in which the values were first seen; the
        /// last entry counts all values that found no other. 0 in one that is free. Those in a row up to the
        /// latest, which came with `dscp`, are still missing.
        pub mark_packets: [u32; MARKS],
        /// The DSCP of each; of no meaning in the last.
        pub mark_dscps: [u8; MARKS],
        /// Always 0.
        pub padding: [u8; 4],
    }
}

/// Packets that came with one DSCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// How many.
    pub packets: u32,
    /// Their DSCP, 0–63; none for all values that found no place of their own.
    pub dscp: Option<u8>,
}

impl Default for Reception {
    fn default() -> Self {
        Self {
            types: [NONE; TYPES],
            payload_type: NONE,
            dscp: NONE,
            clock_type: NONE,
            event_type: NONE,
            ..zerocopy::FromZeros::new_zeroed()
        }
    }
}

/// Notes that an RTP packet of the stream's own source has come.
#[inline(always)]
pub(crate) fn receive(state: *mut State, arrival: &Arrival, rtp: &RtpFields) {
    let packets = load!(state, reception.packets);
    let more = arrival.segments;
    store!(state, packets.wrapping_add(more), reception.packets);
    let total = load!(state, reception.bytes).wrapping_add(arrival.bytes as u64);
    store!(state, total, reception.bytes);
    if arrival.dscp != load!(state, reception.dscp) {
        note_dscp(state, arrival.dscp, packets);
    }
    let packet = Arrived {
        now: arrival.now,
        sequence: u32::from(rtp.sequence),
        timestamp: rtp.timestamp,
        marker: rtp.marker_type >> 7 != 0,
        payload_type: rtp.marker_type & 0x7f,
    };
    if packet.marker {
        let markers = load!(state, reception.markers).wrapping_add(1);
        store!(state, markers, reception.markers);
    }
    if packet.payload_type != load!(state, reception.payload_type) {
        note_type(state, packet.payload_type);
    }
    let source = rtp.ssrc;
    let is_measured = if packets == 0 || source != load!(state, reception.source) {
        if packets != 0 {
            close(state);
            let changes = load!(state, reception.source_changes).saturating_add(1);
            store!(state, changes, reception.source_changes);
        }
        store!(state, source, reception.source);
        begin(state, &packet);
        false
    } else {
        place(state, &packet)
    };
    if !is_measured {
        pass_over(state, 1);
    }
    store!(state, packet.payload_type, reception.payload_type);
    if more > 1 {
        follow(state, &packet, more - 1);
        pass_over(state, more - 1);
    }
}

/// How a packet came, apart from what is in it.
pub(crate) struct Arrival {
    /// `CLOCK_MONOTONIC`, ns.
    pub(crate) now: u64,
    /// Bytes of the whole frame.
    pub(crate) bytes: usize,
    /// How many packets were merged into it, itself included.
    pub(crate) segments: u32,
    /// What it is marked with, 0–63.
    pub(crate) dscp: u8,
}

/// Counts packets whose jitter is not measured: they are few, and those that are need no count then.
#[inline(always)]
fn pass_over(state: *mut State, packets: u32) {
    let unmeasured = load!(state, reception.unmeasured).wrapping_add(packets);
    store!(state, unmeasured, reception.unmeasured);
}

/// Packets come with another DSCP than before, of which there were `packets` altogether.
#[inline(always)]
fn note_dscp(state: *mut State, dscp: u8, packets: u32) {
    let before = load!(state, reception.dscp);
    let mut marked = [0; MARKS];
    let mut index = 0;
    while index < MARKS {
        marked[index] = load!(state, reception.mark_packets[index]);
        index += 1;
    }
    let more = unmarked(packets, marked);
    let mut index = 0;
    while index < MARKS && more != 0 {
        let counted = marked[index];
        if counted == 0 {
            store!(state, before, reception.mark_dscps[index]);
        }
        if index == MARKS - 1 || load!(state, reception.mark_dscps[index]) == before {
            store!(
                state,
                counted.wrapping_add(more),
                reception.mark_packets[index]
            );
            break;
        }
        index += 1;
    }
    store!(state, dscp, reception.dscp);
}

/// How many of the packets are not yet counted by their DSCP; 0 where a count was lost or is read
/// while it changes, and there seem to be less than none.
#[inline(always)]
fn unmarked(packets: u32, marked: [u32; MARKS]) -> u32 {
    let [a, b, c, d] = marked;
    let marked = a.wrapping_add(b).wrapping_add(c).wrapping_add(d);
    packets
        .wrapping_sub(marked)
        .cast_signed()
        .max(0)
        .cast_unsigned()
}

/// Places what is merged behind a packet, whose headers are not seen: in order, as a merger joins only
/// what came in a row.
#[inline(always)]
fn follow(state: *mut State, packet: &Arrived, more: u32) {
    let highest = load!(state, reception.highest);
    if highest & 0xffff == packet.sequence {
        let window = if more < MISORDER_MAX {
            load!(state, reception.window) << more | ((1 << more) - 1)
        } else {
            u64::MAX
        };
        store!(state, window, reception.window);
        store!(state, highest.wrapping_add(more), reception.highest);
    } else {
        // Neither lost nor expected.
        let before = load!(state, reception.expected_before).wrapping_add(more);
        store!(state, before, reception.expected_before);
    }
}

/// What matters of a packet.
struct Arrived {
    now: u64,
    sequence: u32,
    timestamp: u32,
    marker: bool,
    payload_type: u8,
}

/// Extended sequence numbers begin here, so that an earlier packet that comes later has one too.
const CYCLE: u32 = 1 << 16;

/// The sequence begins, or begins anew, with this packet.
#[inline(always)]
fn begin(state: *mut State, packet: &Arrived) {
    store!(state, CYCLE | packet.sequence, reception.first);
    store!(state, CYCLE | packet.sequence, reception.highest);
    store!(state, 1, reception.window);
    store!(state, 0, reception.jump);
    store!(state, 0, reception.jitter);
    refer(state, packet);
}

/// The sequence so far has ended.
#[inline(always)]
fn close(state: *mut State) {
    let expected = load!(state, reception.highest)
        .wrapping_sub(load!(state, reception.first))
        .wrapping_add(1);
    let before = load!(state, reception.expected_before).wrapping_add(expected);
    store!(state, before, reception.expected_before);
}

/// Finds the place of a packet in its sequence (RFC 3550 appendix A.1); `true` when its jitter was
/// measured.
#[inline(always)]
fn place(state: *mut State, packet: &Arrived) -> bool {
    let highest = load!(state, reception.highest);
    let ahead = packet.sequence.wrapping_sub(highest) & 0xffff;
    let behind = highest.wrapping_sub(packet.sequence) & 0xffff;
    let window = load!(state, reception.window);
    if (1..DROPOUT_MAX).contains(&ahead) {
        let kept = if ahead < MISORDER_MAX {
            window << ahead
        } else {
            0
        };
        store!(state, kept | 1, reception.window);
        store!(state, highest.wrapping_add(ahead), reception.highest);
        return measure(state, packet, true);
    }
    if behind < MISORDER_MAX {
        let bit = 1 << behind;
        if window & bit != 0 {
            let duplicates = load!(state, reception.duplicates).wrapping_add(1);
            store!(state, duplicates, reception.duplicates);
        } else {
            store!(state, window | bit, reception.window);
            let late = load!(state, reception.late).wrapping_add(1);
            store!(state, late, reception.late);
            let number = highest.wrapping_sub(behind);
            if number < load!(state, reception.first) {
                store!(state, number, reception.first);
            }
        }
        return measure(state, packet, false);
    }
    let last = highest << 16;
    if load!(state, reception.jump) == last | packet.sequence {
        // Two in a row, far from all before: the sender has begun anew.
        close(state);
        let restarts = load!(state, reception.restarts).saturating_add(1);
        store!(state, restarts, reception.restarts);
        begin(state, packet);
    } else {
        // Lost is only what was expected, and this one was not.
        let before = load!(state, reception.expected_before).wrapping_add(1);
        store!(state, before, reception.expected_before);
        let next = packet.sequence.wrapping_add(1) & 0xffff;
        store!(state, last | next, reception.jump);
    }
    false
}

/// What follows is measured from this packet.
#[inline(always)]
fn refer(state: *mut State, packet: &Arrived) {
    store!(state, packet.now, reception.arrival);
    store!(state, packet.timestamp, reception.timestamp);
}

/// Compares a packet with the one that came before it, in order (`is_next`) or not, as RFC 3550
/// section 6.4.1 and appendix A.8 do.
///
/// Mean and maxima leave out what begins a talkspurt, as Wireshark does: a pause is nothing that went
/// wrong. `true` when they have it.
#[inline(always)]
fn measure(state: *mut State, packet: &Arrived, is_next: bool) -> bool {
    let elapsed = packet
        .now
        .wrapping_sub(load!(state, reception.arrival))
        .cast_signed()
        .max(0);
    let before = load!(state, reception.payload_type);
    let is_same = packet.payload_type == before;
    let is_regular = !packet.marker
        && !is_comfort_noise(packet.payload_type)
        && (is_same || !is_comfort_noise(before));
    if is_regular {
        let gap = elapsed.cast_unsigned() >> GAP_SHIFT;
        if gap > u64::from(load!(state, reception.gap_max)) {
            store!(
                state,
                gap.min(u64::from(u32::MAX)) as u32,
                reception.gap_max
            );
        }
    }
    let units = packet
        .timestamp
        .wrapping_sub(load!(state, reception.timestamp))
        .cast_signed();
    if is_next && is_same && units == 0 {
        store!(state, before, reception.event_type);
    }
    refer(state, packet);
    let unit = clock(state, packet.payload_type);
    // All packets of an event have one timestamp (RFC 4733 section 2.2.1), and no clock here.
    if unit == 0 || !is_same && unit != clock(state, before) {
        return false;
    }
    let spacing = (i64::from(units) * i64::from(unit)) >> CLOCK_SHIFT;
    let deviation = (elapsed - spacing).unsigned_abs() >> JITTER_SHIFT;
    // In 64 bits, which take no masking; they fit 32.
    let jitter = u64::from(load!(state, reception.jitter));
    let jitter = jitter
        .wrapping_add(deviation.min(DEVIATION_MAX))
        .wrapping_sub((jitter + 8) >> 4);
    store!(state, jitter as u32, reception.jitter);
    if !is_regular {
        return false;
    }
    if jitter > u64::from(load!(state, reception.jitter_max)) {
        store!(state, jitter as u32, reception.jitter_max);
    }
    let sum = load!(state, reception.jitter_sum).wrapping_add(jitter);
    store!(state, sum, reception.jitter_sum);
    true
}

#[inline(always)]
fn note_type(state: *mut State, payload_type: u8) {
    let mut index = 0;
    while index < TYPES {
        let known = load!(state, reception.types[index]);
        if known == payload_type {
            return;
        }
        if known == NONE || index == TYPES - 1 {
            store!(state, payload_type, reception.types[index]);
            return;
        }
        index += 1;
    }
}

/// RFC 3389, and the number that it had before.
#[inline(always)]
const fn is_comfort_noise(payload_type: u8) -> bool {
    matches!(payload_type, 13 | 19)
}

/// Time that one unit of the timestamp takes, in units of 2^-8 ns; 0 where it is not known.
#[inline(always)]
fn clock(state: *mut State, payload_type: u8) -> u32 {
    let fixed = fixed_clock(payload_type);
    if fixed == 0 && payload_type == load!(state, reception.clock_type) {
        load!(state, reception.clock)
    } else {
        fixed
    }
}

/// Time that one unit of the timestamp takes in a clock of `rate` Hz, in units of 2^-8 ns.
#[inline(always)]
#[must_use]
pub const fn clock_of(rate: u32) -> u32 {
    ((1_000_000_000 << CLOCK_SHIFT) + rate as u64 / 2).div_euclid(rate as u64) as u32
}

/// The clock of a payload type that has a fixed one (RFC 3551 section 6), in the unit of [`clock_of`];
/// 0 for all others.
#[inline(always)]
#[must_use]
pub const fn fixed_clock(payload_type: u8) -> u32 {
    const { assert!(clock_of(8000) == 32_000_000) };
    /// Those with 8 kHz, a bit each: nearly all that come.
    const NARROWBAND: u32 = 0xf_ffff & !(1 << 6 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 16 | 1 << 17);
    if payload_type < 20 && NARROWBAND >> payload_type & 1 != 0 {
        return const { clock_of(8_000) };
    }
    match payload_type {
        6 => const { clock_of(16_000) },
        10 | 11 => const { clock_of(44_100) },
        16 => const { clock_of(11_025) },
        17 => const { clock_of(22_050) },
        14 | 25..=34 => const { clock_of(90_000) },
        _ => 0,
    }
}

impl Reception {
    /// Packets that should have come by now.
    #[must_use]
    pub const fn expected(&self) -> u64 {
        if self.packets == 0 {
            return 0;
        }
        // Read while the datapath begins a new sequence, `first` may be new and `highest` still old.
        let ahead = self.highest.wrapping_sub(self.first).cast_signed();
        if ahead < 0 {
            return self.expected_before as u64;
        }
        self.expected_before as u64 + ahead as u64 + 1
    }

    /// Packets that have not come.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        let came = self.packets.saturating_sub(self.duplicates) as u64;
        self.expected().saturating_sub(came)
    }

    /// Clock of the latest packet's payload type, Hz; none where it is not known.
    #[must_use]
    pub const fn clock_rate(&self) -> Option<u32> {
        let fixed = fixed_clock(self.payload_type);
        let clock = if fixed != 0 {
            fixed
        } else if self.payload_type == self.clock_type {
            self.clock
        } else {
            0
        };
        if clock == 0 {
            return None;
        }
        // The unit of `clock_of` is its own inverse.
        Some(clock_of(clock))
    }

    /// Interarrival jitter, ns.
    #[must_use]
    pub const fn jitter(&self) -> u64 {
        (self.jitter as u64) << (JITTER_SHIFT - 4)
    }

    /// The highest jitter, ns.
    #[must_use]
    pub const fn jitter_max(&self) -> u64 {
        (self.jitter_max as u64) << (JITTER_SHIFT - 4)
    }

    /// The mean of the jitter after each packet, ns; none before the second packet.
    #[must_use]
    pub const fn jitter_mean(&self) -> Option<u64> {
        match self.jitter_sum.checked_div(self.measured() as u64) {
            Some(mean) => Some(mean << (JITTER_SHIFT - 4)),
            None => None,
        }
    }

    /// Packets whose jitter was measured.
    #[must_use]
    pub const fn measured(&self) -> u32 {
        self.packets.saturating_sub(self.unmeasured)
    }

    /// Packets by the DSCP that they came with, in the order in which the values were first seen.
    pub fn marks(&self) -> impl Iterator<Item = Mark> {
        let mut packets = self.mark_packets;
        let mut dscps = self.mark_dscps;
        let place = (0..MARKS - 1)
            .find(|&index| packets[index] == 0 || dscps[index] == self.dscp)
            .unwrap_or(MARKS - 1);
        dscps[place] = self.dscp;
        packets[place] = packets[place].wrapping_add(unmarked(self.packets, self.mark_packets));
        (0..MARKS)
            .map(move |index| Mark {
                packets: packets[index],
                dscp: (index < MARKS - 1).then_some(dscps[index]),
            })
            .filter(|mark| mark.packets != 0)
    }

    /// The longest time between two packets within a talkspurt, ns.
    #[must_use]
    pub const fn gap_max(&self) -> u64 {
        (self.gap_max as u64) << GAP_SHIFT
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;

    const MS: u64 = 1_000_000;

    /// A stream of PCMU, 20 ms a packet.
    struct Phone {
        state: State,
        now: u64,
        source: u32,
        payload_type: u8,
        /// Packets that come as one.
        segments: u32,
        dscp: u8,
    }

    impl Phone {
        fn new() -> Self {
            Self {
                state: State::default(),
                now: 1_000 * MS,
                source: 0xfeed_f00d,
                payload_type: 0,
                segments: 1,
                dscp: 46,
            }
        }

        fn reception(&self) -> &Reception {
            &self.state.reception
        }

        /// A packet that comes `after` ms after the one before.
        fn send(&mut self, after: u64, sequence: u16, timestamp: u32, marker: bool) -> &mut Self {
            let rtp = RtpFields {
                version_count: 0x80,
                marker_type: u8::from(marker) << 7 | self.payload_type,
                sequence,
                timestamp,
                ssrc: self.source,
            };
            self.now += after * MS;
            let arrival = Arrival {
                now: self.now,
                bytes: 214,
                segments: self.segments,
                dscp: self.dscp,
            };
            receive(&raw mut self.state, &arrival, &rtp);
            self
        }

        /// The packet of this number, in time.
        fn number(&mut self, number: u32) -> &mut Self {
            self.send(20, number as u16, number * 160, false)
        }

        fn numbers(&mut self, numbers: impl IntoIterator<Item = u32>) -> &mut Self {
            for number in numbers {
                self.number(number);
            }
            self
        }
    }

    fn counts(reception: &Reception) -> [u64; 5] {
        [
            reception.packets.into(),
            reception.expected(),
            reception.lost(),
            reception.late.into(),
            reception.duplicates.into(),
        ]
    }

    #[test]
    fn what_does_not_come_is_lost_across_the_wrap() {
        let mut phone = Phone::new();
        let kept = (65_500..65_600).filter(|number| !matches!(number, 65_510..=65_512 | 65_536));
        phone.numbers(kept);
        assert_eq!(counts(phone.reception()), [96, 100, 4, 0, 0]);
        assert_eq!(phone.reception().bytes, 96 * 214);
        assert_eq!(phone.reception().gap_max(), 20 * MS / 1024 * 1024);
    }

    #[test]
    fn the_first_wrap_and_many_more_are_counted() {
        let mut phone = Phone::new();
        phone.numbers(0..200_000);
        assert_eq!(counts(phone.reception()), [200_000, 200_000, 0, 0, 0]);
    }

    #[test]
    fn late_packets_and_duplicates_are_no_loss() {
        let mut phone = Phone::new();
        phone.numbers([10, 12, 11, 13, 13, 11, 14]);
        assert_eq!(counts(phone.reception()), [7, 5, 0, 1, 2]);
        assert_eq!(phone.reception().event_type, NONE);
    }

    #[test]
    fn what_was_sent_before_the_first_packet_that_came_counts_too() {
        let mut phone = Phone::new();
        // Across the wrap at that.
        phone.numbers([65_537, 65_535, 65_536, 65_538]);
        assert_eq!(counts(phone.reception()), [4, 4, 0, 2, 0]);
    }

    #[test]
    fn a_packet_is_remembered_for_64_numbers() {
        let mut phone = Phone::new();
        phone.numbers(0..100).number(99 - 63);
        assert_eq!(counts(phone.reception()), [101, 100, 0, 0, 1]);
        // Too old to be told from another sequence: neither lost nor expected.
        phone.number(99 - 64);
        assert_eq!(counts(phone.reception()), [102, 101, 0, 0, 1]);
    }

    #[test]
    fn two_packets_far_from_the_others_are_a_restart() {
        let mut phone = Phone::new();
        phone.numbers(0..10).numbers(30_000..30_010);
        let reception = phone.reception();
        assert_eq!(counts(reception), [20, 20, 0, 0, 0]);
        assert_eq!((reception.restarts, reception.source_changes), (1, 0));
    }

    #[test]
    fn one_packet_far_from_the_others_is_a_stray() {
        let mut phone = Phone::new();
        phone.numbers(0..10).number(30_000).numbers(10..20);
        let reception = phone.reception();
        assert_eq!(counts(reception), [21, 21, 0, 0, 0]);
        assert_eq!(reception.restarts, 0);
    }

    #[test]
    fn a_jump_just_short_of_a_restart_is_loss() {
        let mut phone = Phone::new();
        phone.number(0).number(2999);
        assert_eq!(counts(phone.reception()), [2, 3000, 2998, 0, 0]);
    }

    #[test]
    fn a_new_source_begins_anew_and_loses_nothing_of_the_old() {
        let mut phone = Phone::new();
        phone.numbers([0, 1, 3]);
        phone.source = 7;
        phone.numbers(500..510);
        let reception = phone.reception();
        assert_eq!(counts(reception), [13, 14, 1, 0, 0]);
        assert_eq!((reception.source, reception.source_changes), (7, 1));
    }

    #[test]
    fn strays_that_voice_parts_are_no_restart() {
        let mut phone = Phone::new();
        phone
            .numbers(0..10)
            .number(30_000)
            .number(10)
            .number(30_001);
        assert_eq!(phone.reception().restarts, 0);
        phone.number(30_002);
        assert_eq!(phone.reception().restarts, 1);
    }

    #[test]
    fn a_stray_of_one_source_is_none_of_the_next() {
        let mut phone = Phone::new();
        phone.numbers(0..10).number(30_000);
        phone.source = 7;
        phone.number(9).number(30_001);
        assert_eq!(phone.reception().restarts, 0);
    }

    #[test]
    fn marks_that_are_read_while_they_change_are_off_by_little() {
        let mut phone = Phone::new();
        phone.numbers(0..100);
        let mut read = *phone.reception();
        phone.dscp = 0;
        phone.numbers(100..101);
        read.mark_packets = phone.reception().mark_packets;
        read.packets = 99;
        let marks: Vec<_> = read.marks().map(|mark| mark.packets).collect();
        assert_eq!(marks, [100]);
    }

    #[test]
    fn packets_are_counted_by_their_dscp() {
        let mut phone = Phone::new();
        assert_eq!(phone.reception().marks().count(), 0);
        let mut number = 0;
        for (dscp, packets) in [(46, 3), (0, 1), (46, 2), (10, 4), (20, 5), (30, 6), (0, 7)] {
            phone.dscp = dscp;
            phone.numbers(number..number + packets);
            number += packets;
        }
        let marks: Vec<_> = phone.reception().marks().collect();
        let mark = |dscp, packets| Mark { packets, dscp };
        assert_eq!(
            marks,
            [
                mark(Some(46), 5),
                mark(Some(0), 8),
                mark(Some(10), 4),
                mark(None, 11)
            ]
        );
    }

    #[test]
    fn packets_that_come_merged_are_not_lost() {
        let mut phone = Phone::new();
        phone.numbers(65_530..65_534);
        phone.segments = 4;
        phone.number(65_534).number(65_538);
        assert_eq!(phone.reception().measured(), 5);
        phone.segments = 1;
        phone.numbers([65_542, 65_540, 65_543]);
        assert_eq!(counts(phone.reception()), [15, 14, 0, 0, 1]);
        // Behind a late one.
        phone.segments = 100;
        phone.number(65_541);
        assert_eq!(phone.reception().lost(), 0);
        phone.number(65_544);
        assert_eq!(counts(phone.reception())[1..], [213, 0, 0, 2]);
    }

    #[test]
    fn a_sequence_that_is_half_begun_has_lost_nothing() {
        let mut phone = Phone::new();
        phone.numbers(10..20);
        let mut reception = phone.state.reception;
        reception.first = CYCLE | 40_000;
        assert_eq!((reception.expected(), reception.lost()), (0, 0));
    }

    /// RFC 3550 appendix A.8 in floating point: |D| of each packet, ms, and J after the last.
    fn jitter_of(deviations: &[f64]) -> f64 {
        deviations.iter().fold(0.0, |jitter, deviation| {
            jitter + (deviation - jitter) / 16.0
        })
    }

    #[track_caller]
    fn is_near(nanoseconds: u64, milliseconds: f64) {
        let measured = nanoseconds as f64 / 1e6;
        assert!(
            (measured - milliseconds).abs() < 0.0001 + milliseconds * 0.001,
            "{measured} for {milliseconds}"
        );
    }

    #[test]
    fn jitter_follows_the_appendix() {
        let mut phone = Phone::new();
        phone.number(0);
        let mut deviations = Vec::new();
        let mut all = Vec::new();
        for (number, after) in [20, 25, 15, 20, 3, 37, 20].into_iter().enumerate() {
            let number = number as u32 + 1;
            phone.send(after, number as u16, number * 160, false);
            deviations.push((after as f64 - 20.0).abs());
            all.push(jitter_of(&deviations));
        }
        let reception = phone.reception();
        is_near(reception.jitter(), jitter_of(&deviations));
        is_near(
            reception.jitter_mean().expect("measured"),
            all.iter().sum::<f64>() / 7.0,
        );
        is_near(
            reception.jitter_max(),
            all.iter().copied().fold(0.0, f64::max),
        );
        assert_eq!(reception.clock_rate(), Some(8000));
    }

    #[test]
    fn what_is_lost_is_no_jitter() {
        let mut phone = Phone::new();
        phone.number(0).send(60, 3, 480, false);
        assert_eq!(phone.reception().jitter(), 0);
        is_near(phone.reception().gap_max(), 60.0);
    }

    #[test]
    fn late_packets_and_duplicates_are_compared_in_order_of_arrival() {
        let mut phone = Phone::new();
        phone.number(0).number(1);
        phone.send(40, 3, 480, false).send(1, 2, 320, false);
        phone.send(19, 4, 640, false).send(3, 4, 640, false);
        let deviations = [0.0, 0.0, 21.0, 21.0, 3.0];
        is_near(phone.reception().jitter(), jitter_of(&deviations));
        assert_eq!(phone.reception().measured(), 5);
    }

    #[test]
    fn a_pause_before_a_talkspurt_is_no_gap() {
        let mut phone = Phone::new();
        phone.numbers(0..5).send(3000, 5, 24_640, true).number(6);
        let reception = phone.reception();
        is_near(reception.gap_max(), 20.0);
        assert_eq!(reception.markers, 1);
    }

    #[test]
    fn events_do_not_disturb_the_jitter_of_the_voice() {
        let mut phone = Phone::new();
        phone.numbers(0..5);
        phone.payload_type = 101;
        for sequence in 5..9 {
            phone.send(20, sequence, 800, false);
        }
        phone.payload_type = 0;
        phone.numbers(9..12);
        let reception = phone.reception();
        assert_eq!(reception.jitter(), 0);
        assert_eq!(reception.types, [0, 101, NONE, NONE]);
        assert_eq!(reception.event_type, 101);
        assert_eq!(counts(reception), [12, 12, 0, 0, 0]);
    }

    #[test]
    fn a_dynamic_payload_type_is_measured_once_its_clock_is_known() {
        let mut phone = Phone::new();
        phone.payload_type = 111;
        phone.send(20, 0, 0, false).send(25, 1, 960, false);
        assert_eq!(phone.reception().jitter_mean(), None);
        assert_eq!(phone.reception().clock_rate(), None);
        phone.state.reception.clock = clock_of(48_000);
        phone.state.reception.clock_type = 111;
        phone.send(20, 2, 1920, false).send(25, 3, 2880, false);
        is_near(phone.reception().jitter(), jitter_of(&[0.0, 5.0]));
        assert_eq!(phone.reception().clock_rate(), Some(48_000));
    }

    #[test]
    fn the_longest_deviation_does_not_overflow() {
        let mut phone = Phone::new();
        phone.number(0);
        for number in 1..200_u32 {
            phone.send(600_000, number as u16, number * 160, false);
        }
        assert!(phone.reception().jitter() > 8_000 * MS);
        is_near(phone.reception().gap_max(), 600_000.0);
    }

    #[test]
    fn rates_come_back_from_their_clocks() {
        for rate in [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 90_000] {
            assert_eq!(clock_of(clock_of(rate)), rate);
        }
        assert_eq!(fixed_clock(9), clock_of(8_000), "G722, by RFC 3551 4.5.2");
        assert_eq!(fixed_clock(96), 0);
    }
}
