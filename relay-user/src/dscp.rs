//! Differentiated services code points (RFC 2474): their names, and what a relayed packet leaves
//! with.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::document::printable;

/// How many there are: six bits.
const CODES: usize = 64;

/// Expedited Forwarding (RFC 3246): the class for voice.
pub const EF: u8 = 46;

/// The names that the IANA registry "Differentiated Services Field Codepoints" gives.
const NAMES: [(&str, u8); 23] = [
    ("cs0", 0),
    ("le", 1),
    ("cs1", 8),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("cs2", 16),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("cs3", 24),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("cs4", 32),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("cs5", 40),
    ("voice-admit", 44),
    ("ef", EF),
    ("cs6", 48),
    ("cs7", 56),
];

/// What relayed packets carry in the DSCP field. The ECN bits are kept in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Dscp {
    /// What the phone set.
    Keep,
    /// This value, 0–63.
    Set(u8),
    /// What the phone set, translated.
    Map(DscpMap),
}

/// What each code point is translated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DscpMap([u8; CODES]);

/// What is wrong with the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DscpError {
    /// Nothing that `--dscp` knows.
    #[error(
        "`{0}` is not a DSCP value: write keep, a name such as ef, cs3 or af41, a number from 0 to 63, or a table such as map:0=ef,cs5=ef"
    )]
    Value(String),
    /// No code point.
    #[error("`{0}` is not a code point: write a name such as ef, cs3 or af41, or 0 to 63")]
    Code(String),
    /// No translation.
    #[error("`{0}` does not translate a code point: write FROM=TO, such as 0=ef")]
    Translation(String),
    /// Translated twice.
    #[error("`{0}` is translated twice")]
    Twice(String),
    /// The word `map` alone.
    #[error(
        "a map needs a table: write map:FROM=TO,..., such as map:0=ef,cs5=ef; what is not in it is kept"
    )]
    NoTable,
}

/// Reads a code point: a name, or a number in decimal or, after `0x`, hexadecimal.
///
/// # Errors
/// [`DscpError::Code`].
pub fn code(text: &str) -> Result<u8, DscpError> {
    // RFC 4594 section 3.1 calls the default forwarding class both.
    let number = match text {
        "be" | "df" => Some(0),
        _ => NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, code)| *code),
    };
    let number = number.or_else(|| match text.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    });
    number
        .filter(|code| usize::from(*code) < CODES)
        .ok_or_else(|| DscpError::Code(printable(text)))
}

/// A code point in words, or as a number where it has no name.
#[must_use]
pub fn name(code: u8) -> String {
    match NAMES.iter().find(|(_, named)| *named == code) {
        Some((name, _)) => (*name).to_owned(),
        None => code.to_string(),
    }
}

impl DscpMap {
    /// Keeps every code point.
    pub const IDENTITY: Self = {
        let mut map = [0; CODES];
        let mut code = 0;
        while code < CODES {
            map[code] = code as u8;
            code += 1;
        }
        Self(map)
    };

    /// Reads translations; what is not translated is kept.
    ///
    /// # Errors
    /// Every [`DscpError`] about one of them, and [`DscpError::NoTable`] without any.
    pub fn new<'a>(
        translations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, DscpError> {
        let mut map = Self::IDENTITY;
        let mut seen = [false; CODES];
        for (from, to) in translations {
            let from_code = usize::from(code(from)?);
            map.0[from_code] = code(to)?;
            if std::mem::replace(&mut seen[from_code], true) {
                return Err(DscpError::Twice(printable(from)));
            }
        }
        if seen.contains(&true) {
            Ok(map)
        } else {
            Err(DscpError::NoTable)
        }
    }

    /// By the code point that a packet came with.
    #[must_use]
    pub const fn table(&self) -> &[u8; CODES] {
        &self.0
    }
}

impl FromStr for Dscp {
    type Err = DscpError;

    fn from_str(text: &str) -> Result<Self, DscpError> {
        match text {
            "keep" => return Ok(Self::Keep),
            "map" | "map:" => return Err(DscpError::NoTable),
            _ => {}
        }
        let Some(table) = text.strip_prefix("map:") else {
            return code(text)
                .map(Self::Set)
                .map_err(|_| DscpError::Value(printable(text)));
        };
        let translations: Vec<_> = table
            .split(',')
            .map(|entry| {
                let entry = entry.trim();
                let (from, to) = entry
                    .split_once('=')
                    .ok_or_else(|| DscpError::Translation(printable(entry)))?;
                Ok((from.trim(), to.trim()))
            })
            .collect::<Result<_, _>>()?;
        DscpMap::new(translations).map(Self::Map)
    }
}

impl fmt::Display for Dscp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::Set(code) => f.write_str(&name(*code)),
            Self::Map(map) => write!(f, "map:{map}"),
        }
    }
}

impl fmt::Display for DscpMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let translated = |(from, to): &(usize, &u8)| *from != usize::from(**to);
        let mut entries: Vec<_> = self.0.iter().enumerate().filter(translated).collect();
        if entries.is_empty() {
            // Something must stand there for it to be read again.
            entries.push((0, &self.0[0]));
        }
        for (index, (from, to)) in entries.into_iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}={}", name(from as u8), name(*to))?;
        }
        Ok(())
    }
}

impl TryFrom<String> for Dscp {
    type Error = DscpError;

    fn try_from(text: String) -> Result<Self, DscpError> {
        text.parse()
    }
}

impl From<Dscp> for String {
    fn from(dscp: Dscp) -> Self {
        dscp.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "ef",
            "keep",
            "cs0",
            "63",
            "af41",
            "map:cs0=ef",
            "map:cs0=cs0",
            "map:cs0=ef,9=cs7,ef=10",
        ] {
            let dscp: Dscp = text.parse().expect(text);
            assert_eq!(dscp.to_string().parse(), Ok(dscp), "{text}");
        }
        for (text, same) in [
            ("46", "ef"),
            ("0x2e", "ef"),
            ("EF", "ef"),
            ("0", "cs0"),
            ("be", "cs0"),
            ("map: 46 = 0 , 9=0x38", "map:9=cs7,ef=cs0"),
        ] {
            assert_eq!(text.parse::<Dscp>().expect(text).to_string(), same);
        }
    }

    #[test]
    fn a_map_translates_what_it_names_and_keeps_the_rest() {
        let Ok(Dscp::Map(map)) = "map:0=ef,cs5=ef,ef=0".parse() else {
            panic!("a map");
        };
        for (from, to) in map.table().iter().enumerate() {
            let expected = match from {
                0 | 40 => 46,
                46 => 0,
                kept => kept,
            };
            assert_eq!(usize::from(*to), expected);
        }
    }

    #[test]
    fn mistakes_are_told_with_what_to_write() {
        for (text, expected) in [
            ("", "is not a DSCP value"),
            ("64", "a number from 0 to 63"),
            ("-1", "is not a DSCP value"),
            ("EF46", "is not a DSCP value"),
            ("map", "a map needs a table"),
            ("map:", "a map needs a table"),
            (
                "map:0",
                "`0` does not translate a code point: write FROM=TO",
            ),
            ("map:0=ef,", "`` does not translate"),
            ("map:0=64", "`64` is not a code point"),
            ("map:x=0", "`x` is not a code point"),
            ("map:0=ef,be=cs1", "`be` is translated twice"),
        ] {
            let error = text.parse::<Dscp>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn names_and_numbers_go_together() {
        for number in 0..64 {
            assert_eq!(code(&name(number)), Ok(number));
        }
    }
}
