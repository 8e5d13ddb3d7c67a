//! What a row can be sorted and filtered by.

use std::fmt;

/// A property of a row, by the name that people type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// Number of the pair.
    Id,
    /// What the datapath does with the stream, or what became of its pair.
    State,
    /// Where the pair came from.
    Feed,
    /// The phone that sends.
    From,
    /// The phone that receives.
    To,
    /// The PBX's name of the leg that the stream comes in on.
    Channel,
    /// The PBX's name of the call.
    Call,
    /// Codec of the last packet.
    Codec,
    /// Why it is not offloaded.
    Why,
    /// Packets relayed in the kernel.
    Packets,
    /// Packets received of the phone.
    Received,
    /// Packets received in the last second; known to `top` alone.
    Rate,
    /// Packets lost before they came here, in percent.
    Loss,
    /// Interarrival jitter, ms.
    Jitter,
    /// Estimated mean opinion score, 1 to 4.5.
    Mos,
    /// Milliseconds since the phone's last packet.
    Silent,
}

impl Column {
    /// All, in the order in which they are told.
    pub const ALL: [Self; 16] = [
        Self::Id,
        Self::State,
        Self::Feed,
        Self::From,
        Self::To,
        Self::Channel,
        Self::Call,
        Self::Codec,
        Self::Why,
        Self::Packets,
        Self::Received,
        Self::Rate,
        Self::Loss,
        Self::Jitter,
        Self::Mos,
        Self::Silent,
    ];

    /// As it is typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::State => "state",
            Self::Feed => "feed",
            Self::From => "from",
            Self::To => "to",
            Self::Channel => "channel",
            Self::Call => "call",
            Self::Codec => "codec",
            Self::Why => "why",
            Self::Packets => "packets",
            Self::Received => "received",
            Self::Rate => "rate",
            Self::Loss => "loss",
            Self::Jitter => "jitter",
            Self::Mos => "mos",
            Self::Silent => "silent",
        }
    }

    /// The one of this name, in whatever case.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|column| column.name().eq_ignore_ascii_case(name))
    }

    /// Whether it is a number, which can be compared.
    #[must_use]
    pub const fn is_number(self) -> bool {
        matches!(
            self,
            Self::Id
                | Self::Packets
                | Self::Received
                | Self::Rate
                | Self::Loss
                | Self::Jitter
                | Self::Mos
                | Self::Silent
        )
    }

    /// Whether its low values are the bad ones.
    #[must_use]
    pub const fn is_worse_when_low(self) -> bool {
        matches!(self, Self::Mos | Self::Rate)
    }

    /// The names of those that are wanted, separated by commas.
    pub(super) fn names(wanted: impl Fn(Self) -> bool) -> String {
        let names: Vec<_> = Self::ALL
            .into_iter()
            .filter(|column| wanted(*column))
            .map(Self::name)
            .collect();
        names.join(", ")
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
