//! Rates as tc(8) writes them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A rate in bit/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(u64);

/// What is wrong with a rate. The text says what it may be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// No number with a unit.
    #[error(
        "`{0}` is no rate: write a number with a unit, such as 1000kbit, 1.5mbit or 1gbit; kbps means 1000 bytes per second, as with tc(8)"
    )]
    Form(String),
    /// Too low or too high.
    #[error("a rate of `{0}` cannot be shaped: write 64kbit to 100gbit; a number alone is bit/s")]
    Range(String),
}

impl Rate {
    /// Less carries no call.
    const LOWEST: u64 = 64_000;
    /// 100 Gbit/s.
    const HIGHEST: u64 = 100_000_000_000;

    /// In bit/s.
    #[must_use]
    pub const fn bits_per_second(self) -> u64 {
        self.0
    }

    /// What is shaped to: 95 %, so that the queue is here, where it is ordered, and not in the modem.
    /// The rest is also for what the line adds to a packet and no queueing discipline counts.
    #[must_use]
    pub const fn shaped(self) -> u64 {
        self.0 / 100 * 95
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let form = || RateError::Form(text.to_owned());
        let range = || RateError::Range(text.to_owned());
        let digits = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let scale = scale(&unit.to_ascii_lowercase()).ok_or_else(form)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        // One digit at least, and one dot at most.
        let written = format!("{whole}{fraction}");
        if written.is_empty() || written.contains('.') {
            return Err(form());
        }
        let bits = || -> Option<u64> {
            let written: u128 = written.parse().ok()?;
            let divisor = 10_u128.checked_pow(fraction.len().try_into().ok()?)?;
            (written.checked_mul(scale.into())? / divisor)
                .try_into()
                .ok()
        };
        bits()
            .filter(|bits| (Self::LOWEST..=Self::HIGHEST).contains(bits))
            .map(Self)
            .ok_or_else(range)
    }
}

/// Bit/s of a unit of tc(8).
fn scale(unit: &str) -> Option<u64> {
    let (prefix, unit) = match unit {
        "" => return Some(1),
        _ => match unit.strip_suffix("bit") {
            Some(prefix) => (prefix, 1),
            None => (unit.strip_suffix("bps")?, 8),
        },
    };
    let factor = match prefix {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        "t" => 1_000_000_000_000,
        "ki" => 1 << 10,
        "mi" => 1 << 20,
        "gi" => 1 << 30,
        "ti" => 1 << 40,
        _ => return None,
    };
    Some(factor * unit)
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        display(self.0).fmt(f)
    }
}

/// The same, rounded to four digits.
pub(crate) fn rounded(bits_per_second: u64) -> String {
    let excess = (bits_per_second.max(1).ilog10() + 1).saturating_sub(4);
    let unit = 10_u64.pow(excess);
    display(bits_per_second.saturating_add(unit / 2) / unit * unit)
}

/// A number of bit/s, with the largest unit that leaves it whole.
pub(crate) fn display(bits_per_second: u64) -> String {
    let units = [
        (1_000_000_000, "gbit"),
        (1_000_000, "mbit"),
        (1_000, "kbit"),
    ];
    units
        .into_iter()
        .find(|(factor, _)| bits_per_second != 0 && bits_per_second.is_multiple_of(*factor))
        .map_or_else(
            || format!("{bits_per_second}bit"),
            |(factor, unit)| format!("{}{unit}", bits_per_second / factor),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_digits_say_enough() {
        for (bits, said) in [
            (0, "0bit"),
            (999, "999bit"),
            (47_496, "47500bit"),
            (950_000, "950kbit"),
            (1_266_666, "1267kbit"),
            (9_999_999_999, "10gbit"),
        ] {
            assert_eq!(rounded(bits), said);
        }
    }

    #[test]
    fn rates_are_read_as_tc_reads_them() {
        for (text, bits) in [
            ("64000", 64_000),
            ("1000kbit", 1_000_000),
            ("1.5mbit", 1_500_000),
            ("1.5Mbit", 1_500_000),
            (".5gbit", 500_000_000),
            ("125kbps", 1_000_000),
            ("1mibit", 1_048_576),
            ("100gbit", 100_000_000_000),
            ("0.1tbit", 100_000_000_000),
            ("1000000bit", 1_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Rate(bits)), "{text}");
        }
    }

    #[test]
    fn other_rates_are_refused_with_the_remedy() {
        for text in [
            "",
            "fast",
            "mbit",
            ".",
            "1.2.3mbit",
            "1 mbit",
            "-1mbit",
            "125kbyte",
            "1mb",
            "1e6",
            "1mbit/s",
        ] {
            let error = text.parse::<Rate>().expect_err(text);
            assert_eq!(error, RateError::Form(text.to_owned()));
            assert!(error.to_string().contains("1.5mbit"), "{error}");
        }
        for text in [
            "0",
            "63.999kbit",
            "1000",
            "100.1gbit",
            "99999999999999999999999999tbit",
        ] {
            let error = text.parse::<Rate>().expect_err(text);
            assert_eq!(error, RateError::Range(text.to_owned()));
        }
        let long = format!("0.{}1mbit", "0".repeat(60));
        assert_eq!(long.parse::<Rate>(), Err(RateError::Range(long)));
    }

    #[test]
    fn rates_are_written_as_they_are_read() {
        for text in ["1mbit", "1500kbit", "64001bit", "100gbit"] {
            let rate: Rate = text.parse().expect(text);
            assert_eq!(rate.to_string(), text);
        }
        let rate: Rate = "1mbit".parse().expect("rate");
        assert_eq!(rate.shaped(), 950_000);
    }
}
