//! A stream as one line of a table.

use std::{borrow::Cow, net::SocketAddr, sync::Arc};

use crate::control::model::{Feed, PairReport, PairState, StreamReport, StreamState};

use super::Column;

/// What became of a stream, or of a pair without streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowState {
    /// The kernel relays it.
    Offloaded,
    /// The PBX forwards it while the datapath collects the proof.
    Watching,
    /// Its way out is not known yet.
    #[default]
    Waiting,
    /// The kernel has stopped relaying it.
    Suspended,
    /// The whole pair stays with the PBX.
    Refused,
}

impl RowState {
    /// As it is shown and typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Offloaded => "offloaded",
            Self::Watching => "watching",
            Self::Waiting => "waiting",
            Self::Suspended => "suspended",
            Self::Refused => "refused",
        }
    }
}

impl From<StreamState> for RowState {
    fn from(state: StreamState) -> Self {
        match state {
            StreamState::Waiting => Self::Waiting,
            StreamState::Watching => Self::Watching,
            StreamState::Offloaded => Self::Offloaded,
            StreamState::Suspended => Self::Suspended,
        }
    }
}

impl From<PairState> for RowState {
    fn from(state: PairState) -> Self {
        match state {
            PairState::Offloaded => Self::Offloaded,
            PairState::Waiting => Self::Waiting,
            PairState::Refused => Self::Refused,
        }
    }
}

/// A stream, or a pair that has none. What is not known is `None`.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Number of the pair.
    pub pair: u64,
    /// The leg that it comes in on: 0 for the first; none for a whole pair.
    pub leg: Option<u8>,
    /// What became of it.
    pub state: RowState,
    /// What became of its pair, which is `waiting` while one of its streams is not offloaded; the same as
    /// `state` where streams are looked at one by one.
    pub pair_state: RowState,
    /// Where the pair came from.
    pub feed: Option<Feed>,
    /// The phone that sends.
    pub from: Option<SocketAddr>,
    /// The phone that receives.
    pub to: Option<SocketAddr>,
    /// Where the PBX receives it.
    pub local: Option<SocketAddr>,
    /// The PBX's name of the leg that it comes in on; of a whole pair, of all legs.
    pub channel: Option<Arc<str>>,
    /// The PBX's name of the call.
    pub call: Option<Arc<str>>,
    /// Codec of the last packet.
    pub codec: Option<Cow<'static, str>>,
    /// Why it is not offloaded, in words.
    pub why: Option<Arc<str>>,
    /// Packets relayed in the kernel.
    pub packets: u64,
    /// RTP packets received of the phone, relayed or not.
    pub received: u64,
    /// RTP packets received a second.
    pub rate: Option<f64>,
    /// Packets lost before they came here, in percent.
    pub loss: Option<f64>,
    /// Interarrival jitter, ms.
    pub jitter: Option<f64>,
    /// Estimated mean opinion score.
    pub mos: Option<f64>,
    /// Milliseconds since the phone's last packet.
    pub silent_ms: Option<u64>,
}

impl Row {
    /// The streams of a pair or, where it has none, the pair itself.
    #[must_use]
    pub fn of_pair(pair: &PairReport) -> Vec<Self> {
        let whole = Self {
            pair: pair.id,
            state: pair.state.into(),
            pair_state: pair.state.into(),
            feed: Some(pair.feed),
            call: pair.call.as_deref().map(Into::into),
            why: pair.why.as_deref().map(Into::into),
            ..Self::default()
        };
        if pair.streams.is_empty() {
            let channels = pair.channels.join(", ");
            return vec![Self {
                from: pair.legs.first().map(|leg| leg.remote),
                to: pair.legs.get(1).map(|leg| leg.remote),
                local: pair.legs.first().map(|leg| leg.local),
                channel: (!channels.is_empty()).then(|| channels.into()),
                ..whole
            }];
        }
        let streams = pair.streams.iter();
        streams.map(|stream| whole.stream(pair, stream)).collect()
    }

    /// One stream of the pair that this row is.
    fn stream(&self, pair: &PairReport, stream: &StreamReport) -> Self {
        let leg = usize::from(stream.leg);
        let channel = pair.channels.get(leg);
        let reception = &stream.reception;
        Self {
            leg: Some(stream.leg),
            state: stream.state.into(),
            from: Some(stream.from),
            to: Some(stream.to),
            local: pair.legs.get(leg).map(|leg| leg.local),
            channel: channel.map(|channel| channel.as_str().into()),
            why: stream.why.as_deref().map(Into::into),
            packets: stream.packets,
            received: reception.packets,
            // Of nothing that came, nothing is known.
            loss: (reception.packets != 0).then_some(reception.lost_percent),
            jitter: reception.jitter_ms,
            mos: reception.mos,
            codec: reception.codec.clone().map(Cow::Owned),
            silent_ms: stream.silent_ms,
            ..self.clone()
        }
    }

    /// The phone that sends or, where only that is known, its channel, as far as it fits beside addresses;
    /// else `-`.
    #[must_use]
    pub fn sender(&self) -> String {
        /// As long as the longest IPv4 address with its port.
        const LONGEST: usize = 21;
        if let Some(from) = self.from {
            return from.to_string();
        }
        let channels = self.channel.as_deref().unwrap_or("-");
        let first = channels.split(", ").next().unwrap_or(channels);
        if first.chars().count() <= LONGEST {
            return first.to_owned();
        }
        let cut: String = first.chars().take(LONGEST - 1).collect();
        cut + "…"
    }

    /// The value of a column that is a number.
    #[must_use]
    pub fn number(&self, column: Column) -> Option<f64> {
        match column {
            Column::Id => Some(self.pair as f64),
            Column::Packets => Some(self.packets as f64),
            Column::Received => Some(self.received as f64),
            Column::Rate => self.rate,
            Column::Loss => self.loss,
            Column::Jitter => self.jitter,
            Column::Mos => self.mos,
            Column::Silent => self.silent_ms.map(|silent| silent as f64),
            _ => None,
        }
    }

    /// The same with as many digits as matter, or `-`.
    #[must_use]
    pub fn figure(&self, column: Column) -> String {
        let digits = match column {
            Column::Loss | Column::Mos => 2,
            Column::Jitter => 1,
            _ => 0,
        };
        self.number(column)
            .map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    }

    /// The value of a column that is text.
    #[must_use]
    pub fn text(&self, column: Column) -> Option<Cow<'_, str>> {
        let owned = |address: Option<SocketAddr>| address.map(|it| Cow::Owned(it.to_string()));
        match column {
            Column::State => Some(Cow::Borrowed(self.state.name())),
            Column::Feed => self.feed.map(|feed| Cow::Borrowed(feed.name())),
            Column::From => owned(self.from),
            Column::To => owned(self.to),
            Column::Channel => self.channel.as_deref().map(Cow::Borrowed),
            Column::Call => self.call.as_deref().map(Cow::Borrowed),
            Column::Codec => self.codec.as_deref().map(Cow::Borrowed),
            Column::Why => self.why.as_deref().map(Cow::Borrowed),
            _ => None,
        }
    }
}
