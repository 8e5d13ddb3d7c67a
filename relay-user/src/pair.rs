//! Legs and pairs as an operator or a feed names them, and every rule about them that needs no
//! knowledge of the host or of other pairs.

use std::{fmt, net::SocketAddr, str::FromStr};

use relay_common::stream::PAYLOAD_TYPES;
use serde::{Deserialize, Serialize};

use crate::priority::Priority;

/// One side of a call as the PBX sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leg {
    /// Where the PBX receives RTP for this leg.
    pub local: SocketAddr,
    /// Where the phone sends from and receives at (symmetric RTP, RFC 4961).
    pub remote: SocketAddr,
    /// Where the PBX sends from: another address than `local` on some hosts with several.
    pub sends_from: SocketAddr,
}

/// A payload type number on the first leg, and the number the same payload has on the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadTypes {
    /// On the first leg (0–127).
    pub first: u8,
    /// On the second leg (0–127).
    pub second: u8,
}

/// What a pair is offloaded on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The PBX is seen to forward it unchanged, and with which payload types.
    #[default]
    Wire,
    /// The word of whoever added it: there may be no PBX behind the ports.
    None,
}

/// Two legs bridged to each other: two streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The first and the second leg. They differ in both addresses and share one family.
    pub legs: Box<[Leg; 2]>,
    /// What is relayed where no proof is asked for; every other payload type stays with the PBX. Up
    /// to 8 entries. With proof, the wire tells.
    pub payload_types: Vec<PayloadTypes>,
    /// What it is offloaded on.
    pub proof: Proof,
    /// Priority of its packets at the queueing discipline; none is the daemon's.
    pub priority: Option<Priority>,
}

/// Why a leg or a pair cannot be relayed. The text names the offender and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PairError {
    /// Not `LOCAL=REMOTE`.
    #[error(
        "`{0}` is not a leg: write LOCAL=REMOTE, such as 192.0.2.1:10000=192.0.2.11:30000 or [2001:db8::1]:10000=[2001:db8::11]:30000"
    )]
    Malformed(String),
    /// One half of a leg is no address with a port.
    #[error(
        "`{address}` in leg `{leg}` is not an address with a port: write 192.0.2.1:10000, or [2001:db8::1]:10000 for IPv6"
    )]
    MalformedAddress {
        /// The half that does not parse.
        address: String,
        /// The leg as given.
        leg: String,
    },
    /// Port 0 names no socket.
    #[error("{0} has port 0: give the RTP port that the PBX or the phone really uses")]
    PortZero(SocketAddr),
    /// Media of a call is unicast.
    #[error("{address} is {kind}: a leg needs unicast addresses")]
    NotUnicast {
        /// The offending address.
        address: SocketAddr,
        /// What it is instead: "multicast", "broadcast" or "unspecified".
        kind: &'static str,
    },
    /// One half of the leg is a loopback address and the other is not: no packet can go there.
    #[error(
        "leg {0} joins a loopback address to one that is not: packets cannot pass between them; use two loopback addresses, or none"
    )]
    LoopbackMismatch(Leg),
    /// The halves of a leg, or the legs of a pair, are of different families.
    #[error(
        "{0} and {1} are of different address families: relaying between IPv4 and IPv6 is not supported yet; the call stays with the PBX"
    )]
    MixedFamilies(SocketAddr, SocketAddr),
    /// Both legs are the same.
    #[error("both legs are {0}: a pair joins two different legs")]
    SameLeg(Leg),
    /// Both legs would receive at one local address.
    #[error("both legs have the local address {0}: each leg needs a port of its own")]
    SameLocal(SocketAddr),
    /// What the pair sends arrives at the pair again.
    #[error(
        "what this pair sends to {0} would come back into its own input: the remote of one leg is the local address of the other; check that each leg is LOCAL=REMOTE"
    )]
    OwnInput(SocketAddr),
    /// Above 127, or in the range that RFC 5761 section 4 keeps free for RTCP.
    #[error(
        "payload type {0} is not usable for RTP: take 0–63 or 96–127 (64–95 would be mistaken for RTCP, RFC 5761 section 4)"
    )]
    PayloadType(u8),
    /// The same number twice on one leg: which one it becomes would be a guess.
    #[error("payload type {0} is given twice for the same leg")]
    PayloadTypeTwice(u8),
    /// Not `N` or `N:M`.
    #[error(
        "`{0}` is not a payload type: write N, or N:M where the first leg numbers it N and the second M"
    )]
    MalformedPayloadType(String),
    /// None, or more than the datapath's table holds.
    #[error("{0} payload types given: a pair without proof relays 1 to {PAYLOAD_TYPES}")]
    PayloadTypeCount(usize),
}

impl Leg {
    /// A leg whose PBX sends from where it receives.
    #[must_use]
    pub const fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            local,
            remote,
            sends_from: local,
        }
    }

    /// Reads both halves of a leg.
    ///
    /// # Errors
    /// As of the text form, which they are quoted in.
    pub fn parse(local: &str, remote: &str) -> Result<Self, PairError> {
        let address = |half: &str| {
            half.parse()
                .map(canonical)
                .map_err(|_| PairError::MalformedAddress {
                    address: half.to_owned(),
                    leg: format!("{local}={remote}"),
                })
        };
        let leg = Self::new(address(local)?, address(remote)?);
        leg.check()?;
        Ok(leg)
    }

    fn check(&self) -> Result<(), PairError> {
        for address in [self.local, self.remote] {
            if address.port() == 0 {
                return Err(PairError::PortZero(address));
            }
            let ip = address.ip();
            let kind = match ip {
                _ if ip.is_multicast() => Some("multicast"),
                _ if ip.is_unspecified() => Some("unspecified"),
                std::net::IpAddr::V4(v4) if v4.is_broadcast() => Some("broadcast"),
                _ => None,
            };
            if let Some(kind) = kind {
                return Err(PairError::NotUnicast { address, kind });
            }
        }
        if self.local.is_ipv4() != self.remote.is_ipv4() {
            return Err(PairError::MixedFamilies(self.local, self.remote));
        }
        if self.local.ip().is_loopback() != self.remote.ip().is_loopback() {
            return Err(PairError::LoopbackMismatch(*self));
        }
        Ok(())
    }
}

impl FromStr for Leg {
    type Err = PairError;

    fn from_str(text: &str) -> Result<Self, PairError> {
        let (local, remote) = text
            .split_once('=')
            .ok_or_else(|| PairError::Malformed(text.to_owned()))?;
        Self::parse(local, remote)
    }
}

impl fmt::Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.local, self.remote)
    }
}

/// `::ffff:192.0.2.1` is 192.0.2.1 on the wire, and must be the same key (RFC 4291 section 2.5.5.2).
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl PayloadTypes {
    /// The same number on both legs, as static payload types have (RFC 3551 section 6).
    pub const fn same(number: u8) -> Self {
        Self {
            first: number,
            second: number,
        }
    }
}

impl FromStr for PayloadTypes {
    type Err = PairError;

    fn from_str(text: &str) -> Result<Self, PairError> {
        let number = |digits: &str| {
            digits
                .parse()
                .map_err(|_| PairError::MalformedPayloadType(text.to_owned()))
        };
        let (first, second) = match text.split_once(':') {
            Some((first, second)) => (number(first)?, number(second)?),
            None => (number(text)?, number(text)?),
        };
        Ok(Self { first, second })
    }
}

impl fmt::Display for PayloadTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.second {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}:{}", self.first, self.second)
        }
    }
}

impl Pair {
    /// Joins two legs.
    ///
    /// # Errors
    /// Every [`PairError`] that can be told from the pair alone.
    pub fn new(
        legs: [Leg; 2],
        payload_types: Vec<PayloadTypes>,
        proof: Proof,
    ) -> Result<Self, PairError> {
        let [first, second] = &legs;
        first.check()?;
        second.check()?;
        if first == second {
            return Err(PairError::SameLeg(*first));
        }
        if first.local.is_ipv4() != second.local.is_ipv4() {
            return Err(PairError::MixedFamilies(first.local, second.local));
        }
        if first.local == second.local {
            return Err(PairError::SameLocal(first.local));
        }
        for (one, other) in [(first, second), (second, first)] {
            if one.remote == other.local || one.remote == one.local {
                return Err(PairError::OwnInput(one.remote));
            }
        }
        if payload_types.is_empty() && proof == Proof::None || payload_types.len() > PAYLOAD_TYPES {
            return Err(PairError::PayloadTypeCount(payload_types.len()));
        }
        for (index, types) in payload_types.iter().enumerate() {
            for number in [types.first, types.second] {
                if !matches!(number, 0..=63 | 96..=127) {
                    return Err(PairError::PayloadType(number));
                }
            }
            for earlier in &payload_types[..index] {
                if earlier.first == types.first {
                    return Err(PairError::PayloadTypeTwice(types.first));
                }
                if earlier.second == types.second {
                    return Err(PairError::PayloadTypeTwice(types.second));
                }
            }
        }
        Ok(Self {
            legs: Box::new(legs),
            payload_types,
            proof,
            priority: None,
        })
    }

    /// The same with a priority of its own, if any.
    #[must_use]
    pub fn with_priority(self, priority: Option<Priority>) -> Self {
        Self { priority, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(text: &str) -> Leg {
        text.parse().expect(text)
    }

    fn pair(first: &str, second: &str) -> Result<Pair, PairError> {
        Pair::new(
            [leg(first), leg(second)],
            vec![PayloadTypes::same(0)],
            Proof::None,
        )
    }

    #[test]
    fn a_leg_reads_as_it_prints() {
        for text in [
            "192.0.2.1:10000=192.0.2.11:30000",
            "[2001:db8::1]:10000=[2001:db8::11]:30000",
        ] {
            assert_eq!(leg(text).to_string(), text);
        }
        assert_eq!(
            leg("[::ffff:192.0.2.1]:1=192.0.2.2:2"),
            leg("192.0.2.1:1=192.0.2.2:2")
        );
    }

    #[test]
    fn bad_legs_are_named_with_their_remedy() {
        for (text, fragment) in [
            ("", "write LOCAL=REMOTE"),
            ("192.0.2.1:10000", "write LOCAL=REMOTE"),
            ("192.0.2.1=192.0.2.2:1", "`192.0.2.1` in leg"),
            ("192.0.2.1:99999=192.0.2.2:1", "`192.0.2.1:99999` in leg"),
            ("2001:db8::1:10000=[2001:db8::2]:1", "for IPv6"),
            ("192.0.2.1:0=192.0.2.2:1", "port 0"),
            ("192.0.2.1:1=192.0.2.2:0", "port 0"),
            ("192.0.2.1:1=224.0.0.9:2", "multicast"),
            ("[2001:db8::1]:1=[ff02::1]:2", "multicast"),
            ("192.0.2.1:1=255.255.255.255:2", "broadcast"),
            ("0.0.0.0:1=192.0.2.2:2", "unspecified"),
            ("[::]:1=[2001:db8::2]:2", "unspecified"),
            ("127.0.0.1:1=192.0.2.2:2", "loopback"),
            ("192.0.2.1:1=[2001:db8::2]:2", "different address families"),
        ] {
            let error = text.parse::<Leg>().expect_err(text).to_string();
            assert!(error.contains(fragment), "{text}: {error}");
        }
    }

    #[test]
    fn bad_pairs_are_named_with_their_remedy() {
        let a = "192.0.2.1:10000=192.0.2.11:30000";
        for (first, second, fragment) in [
            (a, a, "both legs are"),
            (
                a,
                "192.0.2.1:10000=192.0.2.12:30000",
                "both legs have the local address",
            ),
            (a, "192.0.2.11:30000=192.0.2.1:10000", "its own input"),
            (
                a,
                "[2001:db8::1]:1=[2001:db8::2]:2",
                "different address families",
            ),
            (
                "192.0.2.1:1=192.0.2.1:1",
                "192.0.2.1:2=192.0.2.9:3",
                "its own input",
            ),
        ] {
            let error = pair(first, second).expect_err(second).to_string();
            assert!(error.contains(fragment), "{first} {second}: {error}");
        }
        assert!(pair(a, "192.0.2.1:10002=192.0.2.12:30000").is_ok());
    }

    #[test]
    fn payload_types_are_checked() {
        let legs = [
            leg("192.0.2.1:1=192.0.2.2:2"),
            leg("192.0.2.1:3=192.0.2.4:4"),
        ];
        let with = |texts: &[&str]| {
            let types = texts
                .iter()
                .map(|text| text.parse())
                .collect::<Result<_, _>>()?;
            Pair::new(legs, types, Proof::None)
        };
        assert!(with(&["0", "101:96"]).is_ok());
        assert_eq!(with(&[]), Err(PairError::PayloadTypeCount(0)));
        assert!(Pair::new(legs, Vec::new(), Proof::Wire).is_ok());
        assert_eq!(with(&["72"]), Err(PairError::PayloadType(72)));
        assert_eq!(with(&["128"]), Err(PairError::PayloadType(128)));
        assert_eq!(with(&["0", "0:8"]), Err(PairError::PayloadTypeTwice(0)));
        assert_eq!(with(&["8:0", "0"]), Err(PairError::PayloadTypeTwice(0)));
        assert!(matches!(
            with(&["ulaw"]),
            Err(PairError::MalformedPayloadType(_))
        ));
    }
}
