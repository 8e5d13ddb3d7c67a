//! What a listener would say of a stream: the E-model (ITU-T G.107), from loss, jitter and codec.
//!
//! Its other inputs (echo, noise, the delay of the whole way) do not show on the wire here, and have
//! their default values. It is an estimate to compare streams by.

use std::time::Duration;

/// How a codec bears loss.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Impairment {
    /// Equipment impairment factor without loss, Ie.
    equipment: f64,
    /// Packet-loss robustness factor, Bpl.
    robustness: f64,
}

/// A codec of a static payload type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Codec {
    payload_type: u8,
    /// Its name (RFC 3551 section 6).
    pub name: &'static str,
    /// None where ITU-T G.113 appendix I has no figures for the narrow-band model.
    impairment: Option<Impairment>,
}

/// Audio of RFC 3551 section 6 that telephones speak. Ie and Bpl: ITU-T G.113 appendix I, G.711 with
/// packet-loss concealment, which every receiver has today, G.729 and G.723.1 with silence suppression.
const CODECS: [Codec; 8] = [
    codec(0, "PCMU", Some((0.0, 25.1))),
    codec(3, "GSM", None),
    codec(4, "G723", Some((15.0, 16.1))),
    codec(7, "LPC", None),
    codec(8, "PCMA", Some((0.0, 25.1))),
    codec(9, "G722", None),
    codec(15, "G728", None),
    codec(18, "G729", Some((11.0, 19.0))),
];

const fn codec(payload_type: u8, name: &'static str, figures: Option<(f64, f64)>) -> Codec {
    let impairment = match figures {
        Some((equipment, robustness)) => Some(Impairment {
            equipment,
            robustness,
        }),
        None => None,
    };
    Codec {
        payload_type,
        name,
        impairment,
    }
}

/// The codec of a static payload type; none for dynamic ones, and for what is no voice.
#[must_use]
pub fn codec_of(payload_type: u8) -> Option<Codec> {
    let mut codecs = CODECS.into_iter();
    codecs.find(|codec| codec.payload_type == payload_type)
}

impl Codec {
    /// Mean opinion score, 1 to 4.5, of what a listener gets with this share of packets lost (0 to 1)
    /// and this jitter. None for codecs without published figures.
    #[must_use]
    pub fn mean_opinion_score(&self, lost: f64, jitter: Duration) -> Option<f64> {
        let Impairment {
            equipment,
            robustness,
        } = self.impairment?;
        // G.107 section 7.5 with losses at random (BurstR = 1).
        let percent = 100.0 * lost.clamp(0.0, 1.0);
        let effective = equipment + (95.0 - equipment) * percent / (percent + robustness);
        Some(score(DEFAULT_RATING - delay(jitter) - effective))
    }
}

/// R with every input at its default (G.107 table 2).
const DEFAULT_RATING: f64 = 93.2;

/// Delay impairment Id of the buffer that takes jitter out, twice as long as that; its linear fit by
/// R. G. Cole and J. H. Rosenbluth, "Voice over IP performance monitoring" (2001), section 3.1.
fn delay(jitter: Duration) -> f64 {
    const KNEE_MS: f64 = 177.3;
    let ms = 2.0 * jitter.as_secs_f64() * 1000.0;
    0.024 * ms + 0.11 * (ms - KNEE_MS).max(0.0)
}

/// Mean opinion score of a rating R (G.107 annex B).
fn score(rating: f64) -> f64 {
    let rating = rating.clamp(0.0, 100.0);
    // Just above 0 the polynomial is below the scale.
    (1.0 + 0.035 * rating + rating * (rating - 60.0) * (100.0 - rating) * 7e-6).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mos(payload_type: u8, percent: f64, jitter_ms: u64) -> f64 {
        let codec = codec_of(payload_type).expect("codec");
        let jitter = Duration::from_millis(jitter_ms);
        codec
            .mean_opinion_score(percent / 100.0, jitter)
            .expect("figures")
    }

    #[track_caller]
    fn is(score: f64, expected: f64) {
        assert!((score - expected).abs() < 0.005, "{score} for {expected}");
    }

    #[test]
    fn ratings_become_the_scores_of_annex_b() {
        for (rating, expected) in [
            (-5.0, 1.0),
            (0.0, 1.0),
            (50.0, 2.58),
            (60.0, 3.10),
            (70.0, 3.60),
            (80.0, 4.02),
            (90.0, 4.34),
            (93.2, 4.41),
            (100.0, 4.5),
            (120.0, 4.5),
        ] {
            is(score(rating), expected);
        }
    }

    #[test]
    fn loss_jitter_and_codec_each_cost_something() {
        is(mos(0, 0.0, 0), 4.41);
        is(mos(8, 1.0, 0), 4.33);
        is(mos(0, 5.0, 0), 3.92);
        is(mos(18, 0.0, 0), 4.10);
        is(mos(4, 0.0, 0), 3.95);
        assert!(mos(0, 0.0, 30) < mos(0, 0.0, 1));
        assert!(mos(18, 3.0, 10) < mos(0, 3.0, 10));
        is(mos(0, 100.0, 0), 1.18);
    }

    #[test]
    fn nothing_is_made_up_for_codecs_without_figures() {
        let g722 = codec_of(9).expect("codec");
        assert_eq!(g722.name, "G722");
        assert_eq!(g722.mean_opinion_score(0.0, Duration::ZERO), None);
        assert_eq!(codec_of(101), None);
        assert_eq!(codec_of(13), None, "comfort noise is no codec");
    }

    #[test]
    fn every_codec_here_has_a_fixed_clock() {
        for codec in CODECS {
            assert_ne!(
                relay_common::reception::fixed_clock(codec.payload_type),
                0,
                "{}",
                codec.name
            );
        }
    }
}
