//! How phones' packets arrive, in the units that people and programs read.

use std::time::Duration;

use relay_common::reception::{Reception, clock_of};

use crate::{clock::Now, control::model::ReceptionReport, quality::codec_of};

/// What the figures of a stream say at a time.
#[must_use]
pub fn report(reception: &Reception, now: Now) -> ReceptionReport {
    let heard = reception.packets != 0;
    let payload_type = heard.then_some(reception.payload_type);
    let codec = codec(reception);
    let clock_rate = reception.clock_rate().filter(|_| heard);
    let measured = |nanoseconds: u64| Duration::from_nanos(nanoseconds).as_secs_f64() * 1000.0;
    let mean = reception.jitter_mean();
    let (lost, expected) = (reception.lost(), reception.expected());
    let share = if expected == 0 {
        0.0
    } else {
        lost as f64 / expected as f64
    };
    ReceptionReport {
        packets: reception.packets.into(),
        bytes: reception.bytes,
        lost,
        lost_percent: rounded(share * 100.0),
        duplicates: reception.duplicates.into(),
        reordered: reception.late.into(),
        restarts: reception.restarts.into(),
        jitter_ms: clock_rate.map(|_| rounded(measured(reception.jitter()))),
        jitter_mean_ms: mean.map(|mean| rounded(measured(mean))),
        jitter_max_ms: mean.map(|_| rounded(measured(reception.jitter_max()))),
        clock_rate,
        largest_gap_ms: rounded(measured(reception.gap_max())),
        last_arrival: heard.then(|| {
            let at = now.wall_time_of(reception.arrival);
            humantime::format_rfc3339_millis(at).to_string()
        }),
        ssrc: heard.then(|| format!("{:#010x}", reception.source)),
        ssrc_changes: reception.source_changes.into(),
        payload_type,
        payload_types: types(reception),
        codec: codec.map(|codec| codec.name.to_owned()),
        markers: reception.markers.into(),
        mos: codec.and_then(|codec| {
            let jitter = Duration::from_nanos(mean.unwrap_or_default());
            codec.mean_opinion_score(share, jitter).map(rounded)
        }),
    }
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
    /// None where the rate is known, or nothing has come.
    #[must_use]
    pub const fn of(reception: &Reception) -> Option<Self> {
        if reception.packets == 0 || reception.clock_rate().is_some() {
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
    /// [`clock_of`]. None where it fits no rate: an event's timestamp stands still (RFC 4733 section
    /// 2.2.1), and one of a phone that was silent may too.
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
        let near = |fixed: &u32| (rate / f64::from(*fixed) - 1.0).abs() < 0.1;
        let rate = RATES.into_iter().find(near)?;
        Some((self.payload_type, clock_of(rate)))
    }
}
