//! How phones' packets arrive, in the units that people and programs read.

use std::time::Duration;

use relay_common::reception::{Reception, clock_of};

use crate::{
    clock::{self, Now},
    control::model::ReceptionReport,
    quality::codec_of,
};

/// What the figures of a stream say at a time.
#[must_use]
pub fn report(reception: &Reception, now: Now) -> ReceptionReport {
    let heard = reception.packets != 0;
    let payload_type = heard.then_some(reception.payload_type);
    let figures = Figures::of(reception);
    let mean = reception.jitter_mean();
    ReceptionReport {
        packets: reception.packets.into(),
        bytes: reception.bytes,
        lost: reception.lost(),
        lost_percent: figures.lost_percent,
        duplicates: reception.duplicates.into(),
        reordered: reception.late.into(),
        restarts: reception.restarts.into(),
        jitter_ms: figures.jitter_ms,
        jitter_mean_ms: mean.map(milliseconds),
        jitter_max_ms: mean.map(|_| milliseconds(reception.jitter_max())),
        clock_rate: reception.clock_rate().filter(|_| heard),
        largest_gap_ms: milliseconds(reception.gap_max()),
        last_arrival: heard.then(|| clock::utc(now.wall_time_of(reception.arrival))),
        ssrc: heard.then(|| format!("{:#010x}", reception.source)),
        ssrc_changes: reception.source_changes.into(),
        payload_type,
        payload_types: types(reception),
        codec: figures.codec.map(str::to_owned),
        markers: reception.markers.into(),
        mos: figures.mos,
    }
}

/// The figures that tell a good stream from a bad one, cheap enough for thousands of streams a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Packets that did not arrive, of those expected, percent.
    pub lost_percent: f64,
    /// Interarrival jitter now, milliseconds; none where the clock rate is not known.
    pub jitter_ms: Option<f64>,
    /// Estimated mean opinion score, as in [`ReceptionReport::mos`].
    pub mos: Option<f64>,
    /// Name of the codec, as in [`ReceptionReport::codec`].
    pub codec: Option<&'static str>,
}

impl Figures {
    /// What they are at this time.
    #[must_use]
    pub fn of(reception: &Reception) -> Self {
        let heard = reception.packets != 0;
        let (lost, expected) = (reception.lost(), reception.expected());
        let share = if expected == 0 {
            0.0
        } else {
            lost as f64 / expected as f64
        };
        let codec = codec(reception);
        Self {
            lost_percent: rounded(share * 100.0),
            jitter_ms: reception
                .clock_rate()
                .filter(|_| heard)
                .map(|_| milliseconds(reception.jitter())),
            mos: codec.and_then(|codec| {
                let jitter = Duration::from_nanos(reception.jitter_mean().unwrap_or_default());
                codec.mean_opinion_score(share, jitter).map(rounded)
            }),
            codec: codec.map(|codec| codec.name),
        }
    }
}

/// Of a time in nanoseconds.
fn milliseconds(nanoseconds: u64) -> f64 {
    rounded(Duration::from_nanos(nanoseconds).as_secs_f64() * 1000.0)
}

/// What the stream is spoken in: the codec of the latest packet or, when that is an event or comfort
/// noise, of one before.
fn codec(reception: &Reception) -> Option<crate::quality::Codec> {
    let latest = [reception.payload_type];
    let mut types = latest.iter().chain(&reception.types);
    types.find_map(|payload_type| codec_of(*payload_type))
}

fn types(reception: &Reception) -> Vec<u8> {
    let mut types: Vec<u8> = reception
        .types
        .into_iter()
        .filter(|payload_type| *payload_type < 128)
        .collect();
    types.sort_unstable();
    types
}

/// To thousandths: more digits than the measurement has would only be longer to read.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A moment of a stream whose clock rate is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    source: u32,
    payload_type: u8,
    timestamp: u32,
    arrival: u64,
}

/// Clock rates that audio has (RFC 3551, RFC 7587 and others), Hz.
const RATES: [u32; 8] = [
    8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000,
];

impl Sample {
    /// None where the rate is known, where nothing has come, and of events: their timestamps tell when
    /// keys were pressed, which a dialler does at a rhythm of its own.
    #[must_use]
    pub const fn of(reception: &Reception) -> Option<Self> {
        if reception.packets == 0
            || reception.clock_rate().is_some()
            || reception.payload_type == reception.event_type
        {
            return None;
        }
        Some(Self {
            source: reception.source,
            payload_type: reception.payload_type,
            timestamp: reception.timestamp,
            arrival: reception.arrival,
        })
    }

    /// The payload type whose clock the time between two samples tells, and that clock, in units of
    /// [`clock_of`]. None where it fits no rate: the timestamp of a phone that was silent may have stood
    /// still.
    #[must_use]
    pub fn clock_since(&self, earlier: &Self) -> Option<(u8, u32)> {
        if (self.source, self.payload_type) != (earlier.source, earlier.payload_type) {
            return None;
        }
        let units = self.timestamp.wrapping_sub(earlier.timestamp);
        let nanoseconds = self.arrival.checked_sub(earlier.arrival)?;
        // Jitter must be small beside it.
        if nanoseconds < 500_000_000 {
            return None;
        }
        let rate = f64::from(units) * 1e9 / nanoseconds as f64;
        // 44.1 and 48 kHz are 9 % apart.
        let near = |fixed: &u32| (rate / f64::from(*fixed) - 1.0).abs() < 0.02;
        let rate = RATES.into_iter().find(near)?;
        Some((self.payload_type, clock_of(rate)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn now() -> Now {
        Now {
            monotonic: 5_000_000_000,
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000),
        }
    }

    /// 100 packets expected, of which 96 came, and one of them twice.
    fn heard() -> Reception {
        Reception {
            arrival: 4_990_000_000,
            bytes: 97 * 214,
            packets: 97,
            source: 0x1f2e_3d4c,
            first: 0x1_0001,
            highest: 0x1_0064,
            duplicates: 1,
            jitter: 250_000,
            jitter_sum: 96 * 200_000,
            jitter_max: 500_000,
            unmeasured: 1,
            types: [101, 0, 0xff, 0xff],
            payload_type: 0,
            ..Reception::default()
        }
    }

    #[test]
    fn figures_are_told_in_common_units() {
        let report = report(&heard(), now());
        assert_eq!((report.lost, report.lost_percent), (4, 4.0));
        assert_eq!(report.jitter_ms, Some(1.0));
        assert_eq!(report.jitter_mean_ms, Some(0.8));
        assert_eq!(report.jitter_max_ms, Some(2.0));
        assert_eq!(
            report.last_arrival.as_deref(),
            Some("1970-01-01T00:16:39.990Z")
        );
        assert_eq!(report.ssrc.as_deref(), Some("0x1f2e3d4c"));
        assert_eq!(report.payload_types, [0, 101]);
        assert_eq!(report.codec.as_deref(), Some("PCMU"));
        assert_eq!(report.mos, Some(4.028));
    }

    #[test]
    fn an_event_does_not_hide_the_codec() {
        let mut reception = heard();
        reception.payload_type = 101;
        let report = report(&reception, now());
        assert_eq!(report.codec.as_deref(), Some("PCMU"));
        assert_eq!(report.clock_rate, None, "that of the event is not known");
    }

    #[test]
    fn nothing_is_told_of_a_stream_that_was_never_heard() {
        let report = report(&Reception::default(), now());
        let silent = ReceptionReport::default();
        assert_eq!(report, silent);
    }

    fn sample(timestamp: u32, arrival_ms: u64) -> Sample {
        Sample {
            source: 1,
            payload_type: 111,
            timestamp,
            arrival: arrival_ms * 1_000_000,
        }
    }

    #[test]
    fn the_clock_shows_in_the_time_between_two_looks() {
        for (rate, units) in [(48_000, 47_520), (16_000, 16_240), (8_000, 8_000)] {
            let later = sample(5_u32.wrapping_add(units), 2_000);
            let told = later.clock_since(&sample(5, 1_000));
            assert_eq!(told, Some((111, clock_of(rate))), "{rate}");
        }
        let wrapped = sample(u32::MAX.wrapping_add(24_001), 1_500);
        assert_eq!(
            wrapped.clock_since(&sample(u32::MAX, 1_000)),
            Some((111, clock_of(48_000)))
        );
    }

    #[test]
    fn what_fits_no_rate_tells_nothing() {
        let earlier = sample(5, 1_000);
        for later in [
            sample(5, 2_000),
            sample(8_005, 1_400),
            sample(13_005, 2_000),
            sample(5_u32.wrapping_sub(8_000), 2_000),
            sample(8_005, 0),
            Sample {
                source: 2,
                ..sample(8_005, 2_000)
            },
            Sample {
                payload_type: 96,
                ..sample(8_005, 2_000)
            },
        ] {
            assert_eq!(later.clock_since(&earlier), None, "{later:?}");
        }
        assert_eq!(Sample::of(&heard()), None, "its clock is fixed");
        assert_eq!(Sample::of(&Reception::default()), None);
        let mut dynamic = Reception {
            payload_type: 101,
            ..heard()
        };
        assert!(Sample::of(&dynamic).is_some());
        dynamic.event_type = 101;
        assert_eq!(Sample::of(&dynamic), None, "events have no rate");
    }
}
