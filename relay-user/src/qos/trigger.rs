//! When shaping goes on and off: by how many voice packets pass, with patience in both directions.

use std::{collections::VecDeque, time::Duration};

/// How often the packets are counted.
pub const SAMPLING: Duration = Duration::from_millis(250);

/// Samples in a second.
const PER_SECOND: usize = 4;

/// Consecutive seconds that must agree before anything changes.
const SECONDS: usize = 3;

/// Voice packets per second at which shaping goes on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    on: u32,
    off: u32,
}

/// Thresholds between which there is no room, or below which there is nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "shaping cannot go on above {on} voice packets per second and off below {off}: the second must be 1 at least, and no more than the first"
)]
pub struct ThresholdError {
    on: u32,
    off: u32,
}

impl Thresholds {
    /// A call in one direction, with 60 ms in a packet, is above it.
    pub const ON: u32 = 10;
    /// Nothing at all is below it: what phones send in pauses is voice too.
    pub const OFF: u32 = 1;

    /// Shaping is to go on above the first and off below the second, each for 3 consecutive seconds.
    ///
    /// # Errors
    /// [`ThresholdError`].
    pub fn new(on: u32, off: u32) -> Result<Self, ThresholdError> {
        if (1..=on).contains(&off) {
            Ok(Self { on, off })
        } else {
            Err(ThresholdError { on, off })
        }
    }

    /// The one above.
    #[must_use]
    pub const fn on(self) -> u32 {
        self.on
    }

    /// The one below.
    #[must_use]
    pub const fn off(self) -> u32 {
        self.off
    }
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            on: Self::ON,
            off: Self::OFF,
        }
    }
}

/// What a change was made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transition {
    /// Whether shaping goes on.
    pub on: bool,
    /// Voice packets per second in the last second.
    pub rate: f64,
}

/// Looks at the counter of voice packets and decides.
#[derive(Debug)]
pub struct Trigger {
    thresholds: Thresholds,
    on: bool,
    /// When, and how many packets there had been by then; the oldest first.
    samples: VecDeque<(Duration, u64)>,
}

impl Trigger {
    /// `on` is whether shaping is on already. Nothing changes before 3 seconds were seen.
    #[must_use]
    pub fn new(thresholds: Thresholds, on: bool) -> Self {
        Self {
            thresholds,
            on,
            samples: VecDeque::with_capacity(SECONDS * PER_SECOND + 1),
        }
    }

    /// Takes in how many voice packets there have been, every [`SAMPLING`]; `now` is the time since
    /// whenever. Says what is to change.
    pub fn sample(&mut self, now: Duration, packets: u64) -> Option<Transition> {
        if self.samples.back().is_some_and(|(_, last)| packets < *last) {
            // The relay was attached anew, and counts from 0.
            self.samples.clear();
        }
        if self.samples.len() > SECONDS * PER_SECOND {
            self.samples.pop_front();
        }
        self.samples.push_back((now, packets));
        if self.samples.len() <= SECONDS * PER_SECOND {
            return None;
        }
        let changes = if self.on {
            // Whole packets, for a second here is a little longer than one.
            let few = |packets: u64| packets < self.thresholds.off.into();
            self.seconds().all(|(_, packets)| few(packets))
        } else {
            let above = |rate: f64| rate > f64::from(self.thresholds.on);
            // Two seconds of voice must not do by standing astride three.
            self.rates().all(above) && self.ends().is_some_and(|ends| ends.into_iter().all(above))
        };
        if !changes {
            return None;
        }
        self.on = !self.on;
        Some(Transition {
            on: self.on,
            rate: self.rate(),
        })
    }

    /// Undoes the last change, which could not be made: it is tried again after 3 seconds more.
    pub fn take_back(&mut self) {
        self.on = !self.on;
        self.samples.clear();
    }

    /// Voice packets per second in the last second, as far as it was seen.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.rates().last().unwrap_or(0.0)
    }

    /// How long each second was, and the packets in it; the oldest first.
    fn seconds(&self) -> impl Iterator<Item = (Duration, u64)> {
        let ends = self.samples.iter().step_by(PER_SECOND);
        ends.clone()
            .zip(ends.skip(1))
            .map(|(from, to)| between(*from, *to))
    }

    /// Packets per second in each second, the oldest first.
    fn rates(&self) -> impl Iterator<Item = f64> {
        self.seconds().map(rate)
    }

    /// Packets per second in the first and the last time from one sample to the next.
    fn ends(&self) -> Option<[f64; 2]> {
        let last = self.samples.len().checked_sub(2)?;
        let at = |index: usize| rate(between(self.samples[index], self.samples[index + 1]));
        Some([at(0), at(last)])
    }
}

/// The time and the packets from one sample to another.
fn between((from, before): (Duration, u64), (to, after): (Duration, u64)) -> (Duration, u64) {
    (to.saturating_sub(from), after - before)
}

/// Packets per second.
fn rate((time, packets): (Duration, u64)) -> f64 {
    // In no time, no packets.
    if time.is_zero() {
        0.0
    } else {
        packets as f64 / time.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLDS: Thresholds = Thresholds { on: 20, off: 2 };

    /// When shaping went on and off, ms, while so many packets per second passed from each of these
    /// times (ms) on, up to `end`.
    fn transitions(trigger: &mut Trigger, rates: &[(u64, f64)], end: u64) -> Vec<(u64, bool)> {
        sampled(trigger, 250, rates, end)
    }

    /// The same, with so many ms from one sample to the next.
    fn sampled(
        trigger: &mut Trigger,
        pause: u64,
        rates: &[(u64, f64)],
        end: u64,
    ) -> Vec<(u64, bool)> {
        let mut packets = 0.0;
        let mut made = Vec::new();
        for now in 0..end {
            let rate = rates.iter().rev().find(|(from, _)| *from <= now);
            packets += rate.map_or(0.0, |(_, rate)| rate / 1000.0);
            if now % pause == 0
                && let Some(transition) = trigger.sample(Duration::from_millis(now), packets as u64)
            {
                made.push((now, transition.on));
            }
        }
        made
    }

    fn off() -> Trigger {
        Trigger::new(THRESHOLDS, false)
    }

    #[test]
    fn a_call_switches_on_and_its_end_off_within_four_seconds() {
        for start in [5000, 5001, 5100, 5249] {
            let end = start + 20_000;
            let made = transitions(&mut off(), &[(start, 50.0), (end, 0.0)], 40_000);
            let [(on, true), (off, false)] = made[..] else {
                panic!("{start}: {made:?}");
            };
            assert!((2900..4000).contains(&(on - start)), "{start}: {on}");
            assert!((2900..4000).contains(&(off - end)), "{off}");
        }
    }

    /// One party talks, then both are silent but for comfort noise, again and again.
    #[test]
    fn silence_suppression_does_not_switch() {
        let mut rates = vec![(0, 50.0)];
        for turn in 1..30 {
            rates.push((turn * 7000, 5.0));
            rates.push((turn * 7000 + 5000, 50.0));
        }
        assert_eq!(transitions(&mut off(), &rates, 200_000), [(3000, true)]);
    }

    /// A packet a second is not below one a second, however late the samples are.
    #[test]
    fn rare_comfort_noise_is_voice() {
        for pause in [250, 251, 253, 260] {
            let mut trigger = Trigger::new(Thresholds::default(), true);
            let rates = [(0, 50.0), (6000, 1.0), (60_000, 0.0)];
            let made = sampled(&mut trigger, pause, &rates, 70_000);
            assert!(matches!(made[..], [(60_000.., false)]), "{pause}: {made:?}");
        }
    }

    #[test]
    fn less_than_three_seconds_switch_nothing() {
        let mut rates = vec![(0, 0.0)];
        for turn in 1..20 {
            rates.push((turn * 5000, 50.0));
            rates.push((turn * 5000 + 2500, 0.0));
        }
        assert_eq!(transitions(&mut off(), &rates, 100_000), []);
        let mut on = Trigger::new(THRESHOLDS, true);
        let rates: Vec<_> = rates
            .iter()
            .map(|(from, rate)| (*from, 50.0 - rate))
            .collect();
        assert_eq!(transitions(&mut on, &rates, 100_000), []);
    }

    /// What is between the thresholds changes nothing, in either state.
    #[test]
    fn there_is_room_between_the_thresholds() {
        for on in [false, true] {
            let mut trigger = Trigger::new(THRESHOLDS, on);
            assert_eq!(transitions(&mut trigger, &[(0, 10.0)], 60_000), []);
        }
    }

    #[test]
    fn a_controller_that_returns_in_mid_call_goes_on() {
        let mut trigger = Trigger::new(THRESHOLDS, true);
        let made = transitions(&mut trigger, &[(0, 50.0), (10_000, 0.0)], 20_000);
        assert!(matches!(made[..], [(13_000..14_000, false)]), "{made:?}");
    }

    #[test]
    fn a_counter_that_begins_anew_is_no_end_of_a_call() {
        let mut trigger = off();
        let sample = |trigger: &mut Trigger, second: u64, packets| {
            (0..4).find_map(|quarter| {
                let now = Duration::from_millis(second * 1000 + quarter * 250);
                trigger.sample(now, packets + quarter * 13)
            })
        };
        let on = (0..10).find_map(|second| sample(&mut trigger, second, 1000 + second * 52));
        assert!(on.is_some_and(|transition| transition.on));
        for second in 10..20 {
            assert_eq!(sample(&mut trigger, second, (second - 10) * 52), None);
        }
    }

    #[test]
    fn a_change_that_failed_is_tried_again() {
        let mut trigger = off();
        let first = transitions(&mut trigger, &[(0, 50.0)], 4000);
        assert_eq!(first, [(3000, true)]);
        trigger.take_back();
        let again = transitions(&mut trigger, &[(0, 50.0)], 4000);
        assert_eq!(again, [(3000, true)]);
    }
}
