//! What packets are marked with and which share of the uplink they get: read from a TOML file, which
//! `built_in.toml` explains to its authors, and checked whole.

use std::{
    fmt,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use relay_common::{
    classify::{self, CLASSES, NAME, RULES, tcp},
    wire::protocol,
};
use serde::{Deserialize, Serialize};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::rate::{Rate, RateError, display, rounded};
use crate::{
    document::{self, Document, DocumentError, Entry, Position, printable},
    dscp::{self, DscpError},
};

/// The policy without a file, and the file to start one from.
pub const BUILT_IN: &str = include_str!("built_in.toml");

/// What these files are called.
const FILE: &str = "policy";

/// A zero ends it in the kernel.
const LONGEST_NAME: usize = NAME - 1;

/// Classes of HTB are asked in eight priorities (`TC_HTB_NUMPRIO` in include/uapi/linux/pkt_sched.h).
const LOWEST_PRIORITY: u8 = 7;

/// Which packets are marked, and who gets how much of the uplink. Names are unique, classes exist,
/// and at least one rule condition and one action are in each rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// At least one, at most [`CLASSES`].
    pub classes: Vec<Class>,
    /// Number of the class for what no rule gives one.
    pub default: usize,
    /// At most [`RULES`], in the order in which they are asked.
    pub rules: Vec<Rule>,
    /// Where they were read; none for the built-in ones.
    pub file: Option<PolicyFile>,
}

/// A policy as it was read: the file may be another one by now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// Where.
    pub path: PathBuf,
    /// The whole file.
    pub text: String,
}

/// A class of the queueing discipline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// For people.
    pub name: String,
    /// What it always gets.
    pub rate: Share,
    /// What it gets at most.
    pub ceiling: Share,
    /// When it is asked for what others leave over, 0 (first) to 7.
    pub prio: u8,
}

/// How much of the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// So many parts of so many, of what is shaped.
    Fraction(u32, u32),
    /// bit/s
    Rate(u64),
}

/// Rate and ceiling of a class on a certain uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ClassRate {
    /// bit/s
    pub rate: u64,
    /// bit/s
    pub ceiling: u64,
}

/// What is done with which packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For people.
    pub name: String,
    /// Which packets.
    pub conditions: Conditions,
    /// The mark to set, 0–63.
    pub set_dscp: Option<u8>,
    /// Whether that replaces a mark other than 0.
    pub overwrite: bool,
    /// Number of the class, which ends the search.
    pub class: Option<usize>,
}

/// What a rule asks of a packet. All must hold; an empty list asks nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// IP protocols.
    pub protocols: Vec<u8>,
    /// Ports, source or destination.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Source ports.
    pub source_ports: Vec<RangeInclusive<u16>>,
    /// Destination ports.
    pub destination_ports: Vec<RangeInclusive<u16>>,
    /// DSCP, 0–63.
    pub dscps: Vec<u8>,
    /// Bits of [`tcp`], any of which will do; 0 asks nothing.
    pub tcp: usize,
    /// What looks like RTP.
    pub rtp: Option<Rtp>,
    /// Payload types of RTP.
    pub payload_types: Vec<u8>,
    /// ARP.
    pub arp: bool,
}

/// Kinds of RTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rtp {
    /// Voice.
    Audio,
    /// Pictures.
    Video,
    /// Either.
    Any,
}

/// What is wrong with one value. The text names it and what it may be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a name.
    #[error("`{0}` cannot be a name: it has 1 to {LONGEST_NAME} letters, digits, `-`, `_` or `.`")]
    Name(String),
    /// Neither fraction nor rate.
    #[error(
        "`{0}` is no share: write a fraction up to 1/1, such as 1/20, or a rate, such as 500kbit"
    )]
    Share(String),
    /// Not a rate.
    #[error(transparent)]
    Rate(#[from] RateError),
    /// Not a priority.
    #[error("`{0}` is no priority: write a number from 0 (first) to {LOWEST_PRIORITY}")]
    Priority(String),
    /// Not a protocol.
    #[error("`{0}` is no protocol: write tcp, udp, icmp, or a number from 0 to 255")]
    Protocol(String),
    /// Neither port nor range.
    #[error("`{0}` is no port: write a number from 1 to 65535, or a range, such as 10000-20000")]
    Port(String),
    /// Not a DSCP value.
    #[error(transparent)]
    Dscp(#[from] DscpError),
    /// Not a kind of segment.
    #[error("`{0}` is no kind of TCP segment: write syn, rst, fin or ack")]
    Tcp(String),
    /// Not a kind of RTP.
    #[error("`{0}` is no kind of RTP: write audio, video or any")]
    Rtp(String),
    /// Not a payload type that is told from RTCP.
    #[error("`{0}` is no payload type that can be recognised: write 0 to 34, or 96 to 127")]
    PayloadType(String),
    /// No class of the policy.
    #[error("there is no class `{name}`: this policy has {}", known.join(", "))]
    Class {
        /// What is written.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Another class or rule has that name.
    #[error("another {0} is called `{1}` too: give each its own name")]
    Duplicate(&'static str, String),
    /// A list of nothing.
    #[error("the list is empty, which no packet fits: write a value, or leave the key out")]
    Empty,
    /// `arp = false`.
    #[error("a rule cannot ask for all but ARP: write true, or leave the key out")]
    Arp,
}

/// Why a policy was refused.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read, or is not of this form.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// A value out of its range.
    #[error("{at}: `{key}`: {source}")]
    Value {
        /// Where the value is.
        at: Position,
        /// The key, with its table.
        key: &'static str,
        /// What is wrong with it.
        source: ValueError,
    },
    /// A key that must be there.
    #[error("{at}: `{key}` is missing here")]
    Missing {
        /// Where it belongs.
        at: Position,
        /// The key, with its table.
        key: &'static str,
    },
    /// More than there is room for.
    #[error("{at}: there is room for {most} {what} only")]
    TooMany {
        /// The first that is too many.
        at: Position,
        /// Of which.
        what: &'static str,
        /// So many fit.
        most: usize,
    },
    /// A rule that cannot do what it seems to.
    #[error("{at}: rule `{rule}` {source}")]
    Rule {
        /// Where it begins.
        at: Position,
        /// Its name.
        rule: String,
        /// What is wrong with it.
        source: RuleError,
    },
    /// The classes of a file do not fit a line, or none at all.
    #[error("{path}: {source}", path = path.display())]
    Rates {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<PolicyError>,
    },
    /// The classes ask for more than any line has.
    #[error(
        "the rates of the classes add up to more than 1/1: {}; lower some",
        .0.join(" + ")
    )]
    Fractions(Vec<String>),
    /// The classes ask for more than there is.
    #[error(
        "the rates of the classes add up to {}, more than the {} that are shaped: {}; lower some, or raise the uplink",
        beside(*.sum, *.whole), beside(*.whole, *.sum), .classes.join(" + ")
    )]
    Sum {
        /// bit/s
        sum: u64,
        /// bit/s
        whole: u64,
        /// Each with its rate.
        classes: Vec<String>,
    },
    /// A rate that its ceiling does not let it have.
    #[error(
        "the rate of class `{class}`, {}, is above its ceiling, {}: lower the rate, or raise the ceiling",
        beside(*.rate, *.ceiling), beside(*.ceiling, *.rate)
    )]
    Ceiling {
        /// Its name.
        class: String,
        /// bit/s
        rate: u64,
        /// bit/s
        ceiling: u64,
    },
    /// Nothing at all.
    #[error("the rate of class `{0}` is 0 on this uplink: raise it, or leave the class out")]
    Zero(String),
}

/// A rate that is compared with another one: rounded, unless they would look the same.
fn beside(rate: u64, other: u64) -> String {
    if rounded(rate) == rounded(other) {
        display(rate)
    } else {
        rounded(rate)
    }
}

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// No condition.
    #[error(
        "has no condition and would fit every IP packet: write one, or use `default` for the rest"
    )]
    NoCondition,
    /// No action.
    #[error("does nothing: write `set-dscp`, `class`, or both")]
    NoAction,
    /// Two conditions that no packet meets both.
    #[error("fits no packet: {0} and {1} exclude each other")]
    Contradiction(&'static str, &'static str),
    /// A mark without a field for it.
    #[error("cannot mark ARP, which has no DSCP: remove `set-dscp`")]
    MarksArp,
    /// `overwrite` of nothing.
    #[error("has `overwrite` but no `set-dscp`: write both or neither")]
    OverwritesNothing,
}

/// Every key there is, with its table.
const KEYS: [&str; 20] = [
    "default",
    "class",
    "class.name",
    "class.rate",
    "class.ceiling",
    "class.prio",
    "rule",
    "rule.name",
    "rule.protocol",
    "rule.port",
    "rule.source-port",
    "rule.destination-port",
    "rule.dscp",
    "rule.tcp",
    "rule.rtp",
    "rule.payload-type",
    "rule.arp",
    "rule.set-dscp",
    "rule.overwrite",
    "rule.class",
];

impl Policy {
    /// Of its classes, in their order.
    pub(super) fn names(&self) -> Vec<String> {
        self.classes
            .iter()
            .map(|class| class.name.clone())
            .collect()
    }

    /// The policy for those who have none of their own.
    ///
    /// # Panics
    /// Never: a test reads it.
    #[must_use]
    pub fn built_in() -> Self {
        let policy = Self::parse(Path::new("built-in policy"), BUILT_IN);
        Self {
            file: None,
            ..policy.expect("the built-in policy is valid")
        }
    }

    /// Reads a policy from a file.
    ///
    /// # Errors
    /// Every [`PolicyError`] but those of [`Policy::rates`].
    pub fn read(path: &Path) -> Result<Self, PolicyError> {
        let mut policy = Self::parse(path, &document::read(path, FILE)?)?;
        // Told later too, from other working directories.
        if let (Some(file), Ok(absolute)) = (&mut policy.file, std::path::absolute(path)) {
            file.path = absolute;
        }
        Ok(policy)
    }

    /// Reads a policy from the text of a file.
    ///
    /// # Errors
    /// As [`Policy::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, PolicyError> {
        let keys = &KEYS;
        Document { path, text, keys }.policy()
    }

    /// Handle of a class, as an integer: 1:10 of the first, 1:20 of the second.
    #[must_use]
    pub const fn class_id(index: usize) -> u32 {
        classify::class_id(index as u32)
    }

    /// What each class gets of an uplink of so many bit/s. A ceiling above the uplink is the uplink.
    ///
    /// # Errors
    /// [`PolicyError::Sum`], [`PolicyError::Ceiling`], [`PolicyError::Zero`]; for a policy of a file, in
    /// [`PolicyError::Rates`].
    pub fn rates(&self, uplink: u64) -> Result<Vec<ClassRate>, PolicyError> {
        self.rates_of(uplink).map_err(|error| self.in_file(error))
    }

    /// Refuses fractions that fit no line, whatever its rate.
    fn check_fractions(&self) -> Result<(), PolicyError> {
        /// So many that rounding does not matter.
        const WHOLE: u64 = 1 << 60;
        let fractions = || {
            let classes = self.classes.iter();
            classes.filter(|class| matches!(class.rate, Share::Fraction(..)))
        };
        let sum: u128 = fractions()
            .map(|class| u128::from(class.rate.of(WHOLE)))
            .sum();
        if sum <= u128::from(WHOLE) {
            return Ok(());
        }
        let named = fractions().map(|class| format!("{} {}", class.name, class.rate));
        Err(self.in_file(PolicyError::Fractions(named.collect())))
    }

    fn in_file(&self, error: PolicyError) -> PolicyError {
        match &self.file {
            Some(file) => PolicyError::Rates {
                path: file.path.clone(),
                source: Box::new(error),
            },
            None => error,
        }
    }

    fn rates_of(&self, uplink: u64) -> Result<Vec<ClassRate>, PolicyError> {
        let rates: Vec<_> = self
            .classes
            .iter()
            .map(|class| ClassRate {
                rate: class.rate.of(uplink),
                ceiling: class.ceiling.of(uplink).min(uplink),
            })
            .collect();
        let named = || self.classes.iter().zip(&rates);
        if let Some((class, _)) = named().find(|(_, rates)| rates.rate == 0) {
            return Err(PolicyError::Zero(class.name.clone()));
        }
        let sum = rates
            .iter()
            .fold(0_u64, |sum, class| sum.saturating_add(class.rate));
        if sum > uplink {
            return Err(PolicyError::Sum {
                sum,
                whole: uplink,
                classes: named()
                    .map(|(class, rates)| format!("{} {}", class.name, rounded(rates.rate)))
                    .collect(),
            });
        }
        match named().find(|(_, rates)| rates.rate > rates.ceiling) {
            Some((class, rates)) => Err(PolicyError::Ceiling {
                class: class.name.clone(),
                rate: rates.rate,
                ceiling: rates.ceiling,
            }),
            None => Ok(rates),
        }
    }
}

impl Share {
    /// bit/s of so many.
    fn of(self, uplink: u64) -> u64 {
        match self {
            Self::Fraction(part, whole) => {
                let bits = u128::from(uplink) * u128::from(part) / u128::from(whole);
                u64::try_from(bits).unwrap_or(u64::MAX)
            }
            Self::Rate(rate) => rate,
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fraction(part, whole) => write!(f, "{part}/{whole}"),
            Self::Rate(rate) => f.write_str(&display(*rate)),
        }
    }
}

impl Conditions {
    /// Whether a packet must have ports.
    pub(crate) fn asks_ports(&self) -> bool {
        let lists = [&self.ports, &self.source_ports, &self.destination_ports];
        lists.iter().any(|ports| !ports.is_empty())
    }

    /// Whether a packet must look like RTP.
    pub(crate) fn asks_rtp(&self) -> bool {
        self.rtp.is_some() || !self.payload_types.is_empty()
    }

    fn check(&self) -> Result<(), RuleError> {
        let (asks_ports, asks_rtp) = (self.asks_ports(), self.asks_rtp());
        let is_of = |protocols: &[u8]| {
            self.protocols.is_empty()
                || self
                    .protocols
                    .iter()
                    .any(|protocol| protocols.contains(protocol))
        };
        let asks_ip = !self.protocols.is_empty()
            || asks_ports
            || !self.dscps.is_empty()
            || self.tcp != 0
            || asks_rtp;
        let is_other_kind = |payload_type: &u8| match self.rtp {
            Some(Rtp::Audio) => (24..=34).contains(payload_type),
            Some(Rtp::Video) => *payload_type <= 23,
            Some(Rtp::Any) | None => false,
        };
        let payload_types = &self.payload_types;
        let contradictions = [
            (self.arp && asks_ip, "`arp`", "conditions on IP packets"),
            (
                asks_ports && !is_of(&[protocol::TCP, protocol::UDP]),
                "ports",
                "a `protocol` without any",
            ),
            (
                self.tcp != 0 && !is_of(&[protocol::TCP]),
                "`tcp`",
                "another `protocol`",
            ),
            (
                asks_rtp && !is_of(&[protocol::UDP]),
                "RTP",
                "a `protocol` other than udp",
            ),
            (asks_rtp && self.tcp != 0, "RTP", "`tcp`"),
            (
                !payload_types.is_empty() && payload_types.iter().all(is_other_kind),
                "`rtp`",
                "each `payload-type`",
            ),
        ];
        match contradictions.into_iter().find(|(holds, ..)| *holds) {
            Some((_, one, other)) => Err(RuleError::Contradiction(one, other)),
            None if self.arp || asks_ip => Ok(()),
            None => Err(RuleError::NoCondition),
        }
    }
}

/// The keys of a table that were given.
struct Fields<'d, 'a> {
    document: &'d Document<'a>,
    entries: Vec<Entry<'d>>,
    start: usize,
}

impl<'d> Fields<'d, '_> {
    fn get(&self, key: &str) -> Option<&Entry<'d>> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    fn need(&self, key: &'static str) -> Result<&Entry<'d>, PolicyError> {
        self.get(key).ok_or_else(|| PolicyError::Missing {
            at: self.document.position(self.start),
            key,
        })
    }

    /// The values of a key; none where it is absent.
    fn list<T>(
        &self,
        key: &str,
        wanted: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
    ) -> Result<Vec<T>, PolicyError> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(entry) => self.document.values(entry, wanted, parse),
        }
    }
}

impl<'a> Document<'a> {
    fn policy(&self) -> Result<Policy, PolicyError> {
        let parsed = self.parsed()?;
        let whole = self.fields(parsed.get_ref(), "", 0)?;
        let mut classes: Vec<Class> = Vec::new();
        for fields in self.tables(whole.need("class")?, "class.", "classes", CLASSES)? {
            let class = self.class(&fields)?;
            self.check_unique(&fields, "class.name", "class", &class.name, &classes, |c| {
                &c.name
            })?;
            classes.push(class);
        }
        let mut rules: Vec<Rule> = Vec::new();
        if let Some(entry) = whole.get("rule") {
            for fields in self.tables(entry, "rule.", "rules", RULES)? {
                let rule = self.rule(&fields, &classes)?;
                self.check_unique(&fields, "rule.name", "rule", &rule.name, &rules, |r| {
                    &r.name
                })?;
                rules.push(rule);
            }
        }
        let default = self.class_of(whole.need("default")?, &classes)?;
        let policy = Policy {
            classes,
            default,
            rules,
            file: Some(PolicyFile {
                path: self.path.to_owned(),
                text: self.text.to_owned(),
            }),
        };
        policy.check_fractions()?;
        Ok(policy)
    }

    fn class(&self, fields: &Fields<'_, '_>) -> Result<Class, PolicyError> {
        Ok(Class {
            name: self.one(fields.need("class.name")?, NAME_WANTED, name)?,
            rate: self.one(fields.need("class.rate")?, SHARE_WANTED, share)?,
            ceiling: self.one(fields.need("class.ceiling")?, SHARE_WANTED, share)?,
            prio: self.one(
                fields.need("class.prio")?,
                "a whole number without quotes",
                priority,
            )?,
        })
    }

    fn rule(&self, fields: &Fields<'_, '_>, classes: &[Class]) -> Result<Rule, PolicyError> {
        let name = self.one(fields.need("rule.name")?, NAME_WANTED, name)?;
        let of = |key| fields.list(key, "a port, a range in quotes, or a list of these", ports);
        let conditions = Conditions {
            protocols: fields
                .list(
                    "rule.protocol",
                    "a name in quotes, a number, or a list",
                    protocols,
                )?
                .concat(),
            ports: of("rule.port")?,
            source_ports: of("rule.source-port")?,
            destination_ports: of("rule.destination-port")?,
            dscps: fields.list("rule.dscp", DSCP_WANTED, dscp_value)?,
            tcp: fields
                .list("rule.tcp", "a string in quotes, or a list", segment)?
                .iter()
                .fold(0, |bits, bit| bits | bit),
            rtp: match fields.get("rule.rtp") {
                None => None,
                Some(entry) => Some(self.one(entry, "a string in quotes", rtp)?),
            },
            payload_types: fields.list(
                "rule.payload-type",
                "a number, or a list of numbers",
                payload_type,
            )?,
            arp: match fields.get("rule.arp") {
                None => false,
                Some(entry) if self.flag(entry)? => true,
                Some(entry) => return Err(self.wrong(entry, ValueError::Arp)),
            },
        };
        let set_dscp = match fields.get("rule.set-dscp") {
            None => None,
            Some(entry) => Some(self.one(entry, DSCP_WANTED, dscp_value)?),
        };
        let overwrite = fields.get("rule.overwrite");
        let class = match fields.get("rule.class") {
            None => None,
            Some(entry) => Some(self.class_of(entry, classes)?),
        };
        let checked = conditions.check().and_then(|()| {
            if set_dscp.is_none() && overwrite.is_some() {
                Err(RuleError::OverwritesNothing)
            } else if set_dscp.is_none() && class.is_none() {
                Err(RuleError::NoAction)
            } else if set_dscp.is_some() && conditions.arp {
                Err(RuleError::MarksArp)
            } else {
                Ok(())
            }
        });
        if let Err(source) = checked {
            return Err(PolicyError::Rule {
                at: self.position(fields.start),
                rule: name,
                source,
            });
        }
        Ok(Rule {
            name,
            conditions,
            set_dscp,
            overwrite: overwrite.map_or(Ok(false), |entry| self.flag(entry))?,
            class,
        })
    }

    fn fields<'d>(
        &'d self,
        table: &'d DeTable<'d>,
        prefix: &str,
        start: usize,
    ) -> Result<Fields<'d, 'a>, PolicyError> {
        Ok(Fields {
            document: self,
            entries: self.entries(table, prefix)?,
            start,
        })
    }

    /// The tables of an array.
    fn tables<'d>(
        &'d self,
        entry: &Entry<'d>,
        prefix: &str,
        what: &'static str,
        most: usize,
    ) -> Result<Vec<Fields<'d, 'a>>, PolicyError> {
        let wanted = "tables, each below a line [[class]] or [[rule]]";
        let DeValue::Array(array) = entry.value else {
            return Err(self.wrong_type(entry, wanted).into());
        };
        if let Some(excess) = array.get(most) {
            return Err(PolicyError::TooMany {
                at: self.position(excess.span().start),
                what,
                most,
            });
        }
        let mut tables = Vec::new();
        for value in array.iter() {
            let start = value.span().start;
            let DeValue::Table(table) = value.get_ref() else {
                return Err(self.wrong_type(&element(entry, value), wanted).into());
            };
            tables.push(self.fields(table, prefix, start)?);
        }
        if tables.is_empty() {
            return Err(self.wrong(entry, ValueError::Empty));
        }
        Ok(tables)
    }

    fn class_of(&self, entry: &Entry<'_>, classes: &[Class]) -> Result<usize, PolicyError> {
        let name = self.text(entry)?;
        let found = classes.iter().position(|class| class.name == name);
        found.ok_or_else(|| {
            let source = ValueError::Class {
                name: printable(name),
                known: classes.iter().map(|class| class.name.clone()).collect(),
            };
            self.wrong(entry, source)
        })
    }

    fn check_unique<T>(
        &self,
        fields: &Fields<'_, '_>,
        key: &'static str,
        what: &'static str,
        name: &str,
        others: &[T],
        name_of: fn(&T) -> &String,
    ) -> Result<(), PolicyError> {
        if others.iter().any(|other| name_of(other) == name) {
            let source = ValueError::Duplicate(what, name.to_owned());
            return Err(self.wrong(fields.need(key)?, source));
        }
        Ok(())
    }

    /// One value or a list of some.
    fn values<T>(
        &self,
        entry: &Entry<'_>,
        wanted: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
    ) -> Result<Vec<T>, PolicyError> {
        let DeValue::Array(array) = entry.value else {
            return Ok(vec![self.one(entry, wanted, parse)?]);
        };
        if array.is_empty() {
            return Err(self.wrong(entry, ValueError::Empty));
        }
        array
            .iter()
            .map(|value| self.one(&element(entry, value), wanted, parse))
            .collect()
    }

    /// One value, in quotes or a number.
    fn one<T>(
        &self,
        entry: &Entry<'_>,
        wanted: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
    ) -> Result<T, PolicyError> {
        let parsed = match entry.value {
            DeValue::String(text) => parse(text),
            // In whatever base it is written.
            DeValue::Integer(number) => {
                let decimal = u64::from_str_radix(number.as_str(), number.radix())
                    .map_or_else(|_| number.to_string(), |number| number.to_string());
                parse(&decimal)
            }
            _ => return Err(self.wrong_type(entry, wanted).into()),
        };
        parsed.map_err(|source| self.wrong(entry, source))
    }

    fn wrong(&self, entry: &Entry<'_>, source: ValueError) -> PolicyError {
        PolicyError::Value {
            at: self.position(entry.start),
            key: entry.key,
            source,
        }
    }
}

const NAME_WANTED: &str = "a string in quotes";
const SHARE_WANTED: &str = "a fraction or a rate, in quotes";
const DSCP_WANTED: &str = "a name in quotes, a number, or a list";

/// A value of a list, for messages.
fn element<'d>(entry: &Entry<'d>, value: &'d Spanned<DeValue<'d>>) -> Entry<'d> {
    Entry {
        key: entry.key,
        value: value.get_ref(),
        start: value.span().start,
    }
}

fn name(text: &str) -> Result<String, ValueError> {
    let valid = (1..=LONGEST_NAME).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(ValueError::Name(printable(text)))
    }
}

fn share(text: &str) -> Result<Share, ValueError> {
    let wrong = || ValueError::Share(printable(text));
    match text.split_once('/') {
        Some((part, whole)) => {
            let part = part.trim().parse().map_err(|_| wrong())?;
            let whole = whole.trim().parse().map_err(|_| wrong())?;
            if part == 0 || part > whole {
                return Err(wrong());
            }
            Ok(Share::Fraction(part, whole))
        }
        // As to tc(8) it would be bit/s, which nobody means by "1".
        None if text.parse::<f64>().is_ok() => Err(wrong()),
        None => Ok(Share::Rate(text.parse::<Rate>()?.bits_per_second())),
    }
}

fn priority(text: &str) -> Result<u8, ValueError> {
    text.parse()
        .ok()
        .filter(|priority| *priority <= LOWEST_PRIORITY)
        .ok_or_else(|| ValueError::Priority(printable(text)))
}

fn protocols(text: &str) -> Result<Vec<u8>, ValueError> {
    match text {
        "tcp" => Ok(vec![protocol::TCP]),
        "udp" => Ok(vec![protocol::UDP]),
        "icmp" => Ok(vec![protocol::ICMP, protocol::ICMP_V6]),
        _ => match text.parse() {
            Ok(number) => Ok(vec![number]),
            Err(_) => Err(ValueError::Protocol(printable(text))),
        },
    }
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, ValueError> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.trim().parse().ok().filter(|port| *port != 0);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(ValueError::Port(printable(text))),
    }
}

fn dscp_value(text: &str) -> Result<u8, ValueError> {
    Ok(dscp::code(text)?)
}

fn segment(text: &str) -> Result<usize, ValueError> {
    match text {
        "syn" => Ok(tcp::SYN),
        "rst" => Ok(tcp::RST),
        "fin" => Ok(tcp::FIN),
        "ack" => Ok(tcp::ACK),
        _ => Err(ValueError::Tcp(printable(text))),
    }
}

fn rtp(text: &str) -> Result<Rtp, ValueError> {
    match text {
        "audio" => Ok(Rtp::Audio),
        "video" => Ok(Rtp::Video),
        "any" => Ok(Rtp::Any),
        _ => Err(ValueError::Rtp(printable(text))),
    }
}

fn payload_type(text: &str) -> Result<u8, ValueError> {
    text.parse()
        .ok()
        .filter(|number| matches!(number, 0..=34 | 96..=127))
        .ok_or_else(|| ValueError::PayloadType(printable(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASSES: &str = "default = \"b\"\n\
        [[class]]\nname = \"a\"\nrate = \"1/4\"\nceiling = \"1/2\"\nprio = 0\n\
        [[class]]\nname = \"b\"\nrate = \"300kbit\"\nceiling = \"1/1\"\nprio = 1\n";
    /// Lines above the first rule's.
    const ABOVE: usize = 11;

    fn parsed(text: &str) -> Result<Policy, PolicyError> {
        Policy::parse(Path::new("/etc/policy.toml"), text)
    }

    #[test]
    fn the_built_in_policy_shares_any_uplink() {
        let policy = Policy::built_in();
        let names: Vec<_> = policy.classes.iter().map(|class| &class.name[..]).collect();
        assert_eq!(names, ["realtime", "high", "regular", "bulk"]);
        assert_eq!(policy.default, 3);
        assert_eq!([0, 3].map(Policy::class_id), [0x10010, 0x10040]);
        let rates = policy.rates(950_000).expect("rates");
        let rates: Vec<_> = rates
            .iter()
            .map(|class| (class.rate, class.ceiling))
            .collect();
        assert_eq!(
            rates,
            [
                (47_500, 95_000),
                (522_500, 950_000),
                (190_000, 950_000),
                (190_000, 950_000)
            ]
        );
        policy.rates(95_000_000_000).expect("rates");
    }

    #[test]
    fn every_condition_is_read() {
        let text = format!(
            "{CLASSES}[[rule]]\nname = \"all\"\nprotocol = [\"udp\", \"icmp\", 132]\n\
             port = [53, \"100-200\"]\nsource-port = 1\ndestination-port = \"2 - 3\"\n\
             dscp = [\"ef\", \"cs3\", \"af41\", \"le\", \"be\", 0x22, \"0x2e\", 63]\nrtp = \"any\"\n\
             payload-type = [0, 111]\nset-dscp = \"af13\"\noverwrite = true\nclass = \"a\"\n\
             [[rule]]\nname = \"arp\"\narp = true\nclass = \"b\"\n\
             [[rule]]\nname = \"tcp\"\ntcp = [\"syn\", \"ack\"]\nclass = \"b\"\n"
        );
        let policy = parsed(&text).expect("valid");
        let rule = &policy.rules[0];
        assert_eq!(
            rule.conditions,
            Conditions {
                protocols: vec![17, 1, 58, 132],
                ports: vec![53..=53, 100..=200],
                source_ports: vec![1..=1],
                destination_ports: vec![2..=3],
                dscps: vec![46, 24, 34, 1, 0, 34, 46, 63],
                tcp: 0,
                rtp: Some(Rtp::Any),
                payload_types: vec![0, 111],
                arp: false,
            }
        );
        assert_eq!(
            (rule.set_dscp, rule.overwrite, rule.class),
            (Some(14), true, Some(0))
        );
        assert!(policy.rules[1].conditions.arp);
        assert_eq!(policy.rules[2].conditions.tcp, tcp::SYN | tcp::ACK);
    }

    #[test]
    fn wrong_rules_are_refused_with_place_and_remedy() {
        for (rule, line, column, says) in [
            (
                "prot = 1",
                3,
                1,
                "unknown key `rule.prot`: did you mean `rule.port`?",
            ),
            (
                "tcp = \"syn\"\nclas = \"a\"",
                4,
                1,
                "did you mean `rule.class`?",
            ),
            ("port = 0", 3, 8, "`0` is no port"),
            ("port = [80, 70000]", 3, 13, "`70000` is no port"),
            ("port = \"9-8\"", 3, 8, "`9-8` is no port: write a number"),
            ("port = []", 3, 8, "the list is empty"),
            (
                "port = true",
                3,
                8,
                "`rule.port` is true or false: write a port",
            ),
            ("protocol = \"sctpp\"", 3, 12, "`sctpp` is no protocol"),
            ("dscp = \"af44\"", 3, 8, "`af44` is not a code point"),
            ("dscp = \"cs8\"", 3, 8, "`cs8` is not a code point"),
            ("dscp = 64", 3, 8, "`64` is not a code point"),
            ("tcp = \"psh\"", 3, 7, "`psh` is no kind of TCP segment"),
            ("rtp = \"text\"", 3, 7, "`text` is no kind of RTP"),
            ("payload-type = 72", 3, 16, "`72` is no payload type"),
            ("arp = false", 3, 7, "all but ARP"),
            (
                "port = 1\nclass = \"c\"",
                4,
                9,
                "no class `c`: this policy has a, b",
            ),
            ("class = \"a\"", 1, 1, "`r` has no condition"),
            ("port = 1", 1, 1, "`r` does nothing"),
            (
                "port = 1\noverwrite = true\nclass = \"a\"",
                1,
                1,
                "`overwrite` but no `set-dscp`",
            ),
            ("arp = true\nset-dscp = 1", 1, 1, "cannot mark ARP"),
            (
                "protocol = \"icmp\"\nport = 1\nclass = \"a\"",
                1,
                1,
                "fits no packet: ports and",
            ),
            (
                "protocol = \"udp\"\ntcp = \"syn\"\nclass = \"a\"",
                1,
                1,
                "fits no packet: `tcp`",
            ),
            (
                "protocol = \"tcp\"\nrtp = \"any\"\nclass = \"a\"",
                1,
                1,
                "fits no packet: RTP",
            ),
            (
                "tcp = \"syn\"\nrtp = \"any\"\nclass = \"a\"",
                1,
                1,
                "fits no packet: RTP",
            ),
            (
                "arp = true\nport = 1\nclass = \"a\"",
                1,
                1,
                "fits no packet: `arp`",
            ),
            (
                "rtp = \"audio\"\npayload-type = 34\nclass = \"a\"",
                1,
                1,
                "fits no packet: `rtp` and each `payload-type`",
            ),
        ] {
            let text = format!("{CLASSES}[[rule]]\nname = \"r\"\n{rule}\n");
            let error = parsed(&text).expect_err(rule).to_string();
            let place = format!("/etc/policy.toml:{}:{column}: ", ABOVE + line);
            assert!(error.starts_with(&place), "{rule}: {error}");
            assert!(error.contains(says), "{rule}: {error}");
        }
        let twice = format!(
            "{CLASSES}{0}{0}",
            "[[rule]]\nname = \"r\"\nport = 1\nclass = \"a\"\n"
        );
        let error = parsed(&twice).expect_err("twice").to_string();
        assert!(error.contains("another rule is called `r` too"), "{error}");
        let rules = |count: usize| {
            let rule =
                |number| format!("[[rule]]\nname = \"r{number}\"\nport = 1\nclass = \"a\"\n");
            parsed(&format!(
                "{CLASSES}{}",
                (0..count).map(rule).collect::<String>()
            ))
        };
        assert_eq!(rules(RULES).expect("as many as fit").rules.len(), RULES);
        let error = rules(RULES + 1).expect_err("too many").to_string();
        assert!(error.contains("room for 64 rules only"), "{error}");
    }

    #[test]
    fn wrong_classes_are_refused_with_place_and_remedy() {
        for (from, to, says) in [
            ("default = \"b\"\n", "", "`default` is missing"),
            (
                "default = \"b\"",
                "default = \"z\"",
                ":1:11: `default`: there is no class `z`",
            ),
            ("prio = 0", "", "`class.prio` is missing"),
            ("prio = 0", "prio = 8", "`8` is no priority"),
            (
                "name = \"b\"",
                "name = \"a\"",
                ":8:8: `class.name`: another class is called `a`",
            ),
            ("name = \"a\"", "name = \"a b\"", "`a b` cannot be a name"),
            ("\"1/4\"", "\"5/4\"", "`5/4` is no share"),
            ("\"1/4\"", "\"1/0\"", "`1/0` is no share"),
            ("\"1/4\"", "\"1\"", "`1` is no share: write a fraction"),
            ("\"300kbit\"", "\"300 apples\"", "`300 apples` is no rate"),
            ("[[class]]", "[[classes]]", "did you mean `class`?"),
        ] {
            let error = parsed(&CLASSES.replacen(from, to, 1))
                .expect_err(to)
                .to_string();
            assert!(error.starts_with("/etc/policy.toml:"), "{error}");
            assert!(error.contains(says), "{to}: {error}");
        }
    }

    #[test]
    fn fractions_that_fit_no_line_are_refused() {
        let whole = CLASSES.replacen("\"300kbit\"", "\"3/4\"", 1);
        parsed(&whole).expect("they fit");
        let more = CLASSES.replacen("\"300kbit\"", "\"4/5\"", 1);
        let error = parsed(&more).expect_err("more than all").to_string();
        assert!(
            error.starts_with("/etc/policy.toml: ") && error.contains("1/1: a 1/4 + b 4/5"),
            "{error}"
        );
    }

    #[test]
    fn rates_that_cannot_be_are_refused() {
        let policy = parsed(CLASSES).expect("valid");
        assert!(policy.rates(1_000_000).is_ok());
        let third = CLASSES.replacen("\"1/4\"", "\"1/3\"", 1);
        let error = parsed(&third).expect("valid").rates(400_000);
        let error = error.expect_err("refused").to_string();
        assert!(
            error.starts_with("/etc/policy.toml: the rates") && error.contains("a 133300bit"),
            "{error}"
        );
        for (uplink, says) in [
            (
                350_000,
                "add up to 387500bit, more than the 350kbit that are shaped: a 87500bit + b 300kbit",
            ),
            (3, "the rate of class `a` is 0"),
        ] {
            let error = policy.rates(uplink).expect_err("refused").to_string();
            assert!(error.contains(says), "{error}");
        }
        let low = CLASSES.replacen("\"1/2\"", "\"100kbit\"", 1);
        let error = parsed(&low)
            .expect("valid")
            .rates(1_000_000)
            .expect_err("refused");
        let error = error.to_string();
        assert!(
            error.contains("class `a`, 250kbit, is above its ceiling, 100kbit"),
            "{error}"
        );
    }
}
