//! The priority of relayed packets at a queueing discipline, as people write it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What relayed packets carry as `skb->priority`, by which a queueing discipline sorts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Priority(u32);

/// Not a priority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a priority: write a class as `tc class` prints it, such as 1:10 (both numbers hexadecimal and not 0), or a number from 0 to 15"
)]
pub struct PriorityError(String);

impl Priority {
    /// The highest that is no class (`TC_PRIO_MAX` of include/uapi/linux/pkt_sched.h).
    const MAX: u32 = 15;

    /// From the datapath's table.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value)
    }

    /// As the kernel has it: a class in both halves (`TC_H_MAKE`), or 0–15; 0 leaves it as it is.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// The same, or none for one that leaves everything as it is.
    #[must_use]
    pub const fn effective(self) -> Option<Self> {
        if self.0 == 0 { None } else { Some(self) }
    }
}

impl FromStr for Priority {
    type Err = PriorityError;

    fn from_str(text: &str) -> Result<Self, PriorityError> {
        class(text)
            .or_else(|| text.parse().ok().filter(|value| *value <= Self::MAX))
            .map(Self)
            .ok_or_else(|| PriorityError(text.escape_debug().to_string()))
    }
}

/// Both halves of a class, as tc(8) writes them.
fn class(text: &str) -> Option<u32> {
    let half = |text: &str| {
        // The standard library would take a sign too.
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let half = u16::from_str_radix(text, 16).ok()?;
        (digits && half != 0).then_some(u32::from(half))
    };
    let (major, minor) = text.split_once(':')?;
    Some(half(major)? << 16 | half(minor)?)
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 >> 16 {
            0 => write!(f, "{}", self.0),
            major => write!(f, "{major:x}:{:x}", self.0 & 0xffff),
        }
    }
}

impl TryFrom<String> for Priority {
    type Error = PriorityError;

    fn try_from(text: String) -> Result<Self, PriorityError> {
        text.parse()
    }
}

impl From<Priority> for String {
    fn from(priority: Priority) -> Self {
        priority.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_reads_as_it_prints() {
        for (text, value) in [
            ("0", 0),
            ("15", 15),
            ("1:10", 0x1_0010),
            ("ffff:abcd", 0xffff_abcd),
        ] {
            let priority: Priority = text.parse().expect(text);
            assert_eq!(priority.value(), value, "{text}");
            assert_eq!(priority.to_string(), text);
        }
    }

    #[test]
    fn what_is_none_is_named_with_the_remedy() {
        for text in [
            "", "16", "-1", "1:", ":10", "1:0", "0:5", "1:10000", "1:+1", "1:2:3", "voice",
        ] {
            let error = text.parse::<Priority>().expect_err(text).to_string();
            assert!(error.starts_with(&format!("`{text}` is not")), "{error}");
        }
    }
}
