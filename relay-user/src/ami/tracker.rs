//! From events to "offer this pair" and "take it back now": a state machine without I/O.
//!
//! Whoever drives it hands in events, answers and the time, and carries out what it puts out, in
//! order. Two rules keep it safe. An event that touches an offered call takes the call back before
//! anything is asked. And every event that touches a bridge gives it a new generation; an answer
//! to a question of an older generation is dropped, so it can never lead to an offer.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    time::{Duration, Instant},
};

use super::{
    conditions::{self, Bridged, LegAnswers, LegFacts, Proving, Refusal},
    message::{Action, ActionError, Message},
    session::Answer,
};
use crate::pair::Pair;

/// A burst of events is over after this much silence; native_rtp starts about 10 ms after it.
pub const DEBOUNCE: Duration = Duration::from_millis(100);
/// The same with proof, where an offer that comes too early does no harm: the wire does not prove it.
/// A burst takes 2 ms. What is not yet is asked again after as long, then doubled, and is told once
/// [`DEBOUNCE`] is over, or for a bridge technology [`LASTING`].
pub const PROVEN_DEBOUNCE: Duration = Duration::from_millis(25);
/// A bridge technology that lasts this long after a change is no moment of setting up: Asterisk is
/// asked why, and the call is refused.
pub const LASTING: Duration = Duration::from_millis(400);
/// How often a call is asked about that gave no reason to: where its phones are.
pub const POLL: Duration = Duration::from_secs(2);
/// The same for an offered call with proof: there the datapath tells of a phone that moved, on its
/// first packet, and the poll guards against the unknown only.
pub const PROVEN_POLL: Duration = Duration::from_secs(30);
/// Parts of a [`PROVEN_POLL`] that calls take turns in. All those that a daemon finds would be asked about
/// in the same moment otherwise, again and again.
const TURNS: u32 = 16;
/// Every so many polls the technology is asked as well. Its changes raise events, so this guards
/// against the unknown only, and costs Asterisk half as much as the poll.
const BRIDGE_POLLS: u8 = 5;
/// Bridges tracked at a time, at least: half of the default 65,536 streams.
pub const BRIDGES: usize = 32_768;
/// Longest bridge id or channel name taken, in bytes. Asterisk's own are at most 80
/// (AST_CHANNEL_NAME) and 36.
pub const MAX_NAME: usize = 200;
/// Channels remembered of one bridge: one more than a pair, to see that it is none.
const MAX_CHANNELS: usize = 3;
/// Endpoints whose `rtp_timeout` is remembered. Beyond it all are asked anew.
const MAX_ENDPOINTS: usize = 4096;

/// A call of this feed: the unique id of its bridge.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(String);

impl CallId {
    /// Takes a bridge's unique id; `None` if it is empty or longer than [`MAX_NAME`] bytes.
    pub fn new(id: &str) -> Option<Self> {
        (!id.is_empty() && id.len() <= MAX_NAME).then(|| Self(id.to_owned()))
    }

    /// The id as Asterisk writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the feed tells its receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedEvent {
    /// Logged in. Whatever is offered comes anew.
    Up {
        /// The server's greeting, such as `Asterisk Call Manager/11.0.0`.
        asterisk: String,
    },
    /// The connection is lost, and with it every word about the calls of this feed: unless `Up`
    /// comes soon, the receiver takes them back. Sent again, with the newer cause, after each attempt
    /// to connect that failed.
    Down {
        /// In words.
        cause: String,
    },
    /// Something was said about every bridge there was at the last `Up`, or is about to be said
    /// because it changes just now: an earlier call that was not offered since is over. Sent once
    /// after each `Up`.
    Synced,
    /// The call may be relayed. Replaces an earlier offer of the same call; the same offer again is
    /// the answer to [`FeedCommand::Ask`], and says that it still stands.
    Offer {
        /// The call.
        call: CallId,
        /// What to relay. With proof its payload types are left out: the wire tells them.
        pair: Pair,
        /// The channels, in the order of the pair's legs.
        channels: [String; 2],
        /// After how long without RTP and RTCP from a leg's phone Asterisk hangs up. `None`: never
        /// (`rtp_timeout=0`), or unknown.
        rtp_timeout: [Option<Duration>; 2],
    },
    /// The call must not be relayed; also takes back.
    Refused {
        /// The call.
        call: CallId,
        /// Name of the rule (`conditions::Refusal::name`).
        name: &'static str,
        /// The channels, as far as known: of two the first is leg A.
        channels: Vec<String>,
        /// In words.
        cause: String,
    },
    /// Stop relaying the call now; asking goes on.
    TakeBack {
        /// The call.
        call: CallId,
        /// In words.
        cause: String,
    },
    /// The bridge is over. Sent for every call of which something was said before.
    Gone {
        /// The call.
        call: CallId,
    },
}

/// What the receiver of the feed's events asks of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedCommand {
    /// The datapath saw what signalling did not tell: ask for every condition of the call at once.
    /// An offer is not taken back meanwhile. If it still stands it is sent again; else it is
    /// replaced, refused or taken back. A call that is not offered is asked about at once where it
    /// would have been later.
    Ask {
        /// The call.
        call: CallId,
    },
}

/// A question to Asterisk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// All bridges.
    Bridges,
    /// One bridge: its technology and channels.
    Bridge {
        /// The bridge.
        call: CallId,
        /// Its generation when asked.
        generation: u64,
    },
    /// One channel of a bridge: whose it is, and its formats.
    Channel {
        /// The bridge.
        call: CallId,
        /// Its generation when asked.
        generation: u64,
        /// The channel.
        channel: String,
    },
    /// One value of a channel of a bridge.
    Item {
        /// The bridge.
        call: CallId,
        /// Its generation when asked.
        generation: u64,
        /// The channel.
        channel: String,
        /// The function to evaluate.
        item: &'static str,
    },
    /// The `rtp_timeout` of an endpoint.
    RtpTimeout {
        /// The endpoint.
        endpoint: String,
    },
}

impl Query {
    /// Whether more questions may follow from its answer. Those of a call that has been begun come
    /// before the next call is begun, so that the first calls need not wait for the last.
    pub fn begins(&self) -> bool {
        matches!(self, Self::Bridges | Self::Bridge { .. })
    }

    /// The action that asks it.
    ///
    /// # Errors
    /// When Asterisk used a name that it cannot read back itself.
    pub fn action(&self) -> Result<Action, ActionError> {
        match self {
            Self::Bridges => Ok(Action::new("BridgeList")),
            Self::Bridge { call, .. } => {
                Action::new("BridgeInfo").with("BridgeUniqueid", call.as_str())
            }
            Self::Channel { channel, .. } => Action::new("Status")
                .with("Channel", channel)?
                .with("Variables", conditions::STATUS_VARIABLES),
            Self::Item { channel, item, .. } => Action::new("Getvar")
                .with("Channel", channel)?
                .with("Variable", item),
            // Without a channel, so that the end of a call leaves no answer out.
            Self::RtpTimeout { endpoint } => {
                Action::new("Getvar").with("Variable", &conditions::rtp_timeout_of(endpoint))
            }
        }
    }
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask, and hand the answer to [`Tracker::answer`].
    Ask(Query),
    /// Tell the receiver.
    Tell(FeedEvent),
}

/// What was last said about a call.
#[derive(Debug)]
enum Said {
    Nothing,
    TakenBack,
    Refused(Refusal),
    Offered {
        channels: [String; 2],
        legs: Box<[LegFacts; 2]>,
    },
}

/// One series of questions about a bridge: first its technology, then its channels.
#[derive(Debug)]
struct Round {
    generation: u64,
    unanswered: u8,
    channels: Option<[String; 2]>,
    /// Every condition is asked, not only whether an offer still stands.
    full: bool,
    /// What is asked of each channel by `Getvar`.
    items: &'static [&'static str],
    /// The bridge technology of which the answers tell why.
    explaining: Option<String>,
    answers: [LegAnswers; 2],
}

#[derive(Debug)]
struct Bridge {
    /// New with every event that touches the bridge.
    generation: u64,
    /// As Asterisk counts them, internal channels included. `None`: not told yet.
    count: Option<usize>,
    /// Those known by name, at most [`MAX_CHANNELS`].
    channels: Vec<String>,
    /// When to ask.
    due: Option<Instant>,
    /// The wait before asking again about a condition that is not yet true.
    patience: Duration,
    /// Polls until the technology is asked again.
    polls: u8,
    /// The receiver wants to hear whether the offer still stands.
    confirm: bool,
    /// With proof: what only explains a refusal was asked for, since the last offer was taken back.
    explained: bool,
    /// With proof: its polls have their turn.
    has_turn: bool,
    /// When an event touched it last. `None`: it stands as it was found.
    changed: Option<Instant>,
    /// A technology that was asked about since, and what it turned out to mean.
    technology: Option<(String, Refusal)>,
    round: Option<Round>,
    said: Said,
}

impl Bridge {
    /// Whether it is as it is for long enough that it will not become native_rtp in a moment.
    fn lasts(&self, now: Instant) -> bool {
        self.changed.is_none_or(|at| now >= at + LASTING)
    }
}

/// The state machine.
#[derive(Debug)]
pub struct Tracker {
    max_bridges: usize,
    proving: Option<Proving>,
    bridges: HashMap<CallId, Bridge>,
    /// Which bridge a channel is in. A channel is in one at most.
    members: HashMap<String, CallId>,
    /// The channels that a `Hold` event put on hold, wherever they went since. `rtp,hold` may
    /// follow later than the event.
    held: HashSet<String>,
    /// `rtp_timeout` by endpoint, asked once for each. `None`: none, unknown, or not yet answered.
    rtp_timeouts: HashMap<String, Option<Duration>>,
    due: BTreeSet<(Instant, CallId)>,
    list_due: Option<Instant>,
    /// The bridges of the list about which nothing is said yet; `None` before the list and after
    /// [`FeedEvent::Synced`].
    unsynced: Option<HashSet<CallId>>,
    last_generation: u64,
    /// Counts the turns given.
    turn: u32,
    /// Questions without an answer so far.
    unanswered: usize,
    /// When the first bridge of two came up before our eyes, and whether any VarSet ever came:
    /// without VarSet events most changes of a call would go unseen.
    first_pair: Option<Instant>,
    varset_seen: bool,
    /// Bridges refused for want of room exist, whose end has to be told.
    turned_away: bool,
    out: Vec<Output>,
}

impl Tracker {
    /// A tracker of at most this many bridges. It does nothing before [`Tracker::up`]. Without
    /// `proving`, signalling alone has to tell what may be relayed.
    pub fn new(max_bridges: usize, proving: Option<Proving>) -> Self {
        Self {
            max_bridges,
            proving,
            bridges: HashMap::new(),
            members: HashMap::new(),
            held: HashSet::new(),
            rtp_timeouts: HashMap::new(),
            due: BTreeSet::new(),
            list_due: None,
            unsynced: None,
            last_generation: 0,
            turn: 0,
            unanswered: 0,
            first_pair: None,
            varset_seen: false,
            turned_away: false,
            out: Vec::new(),
        }
    }

    /// Logged in: forgets everything and asks for all bridges.
    pub fn up(&mut self, now: Instant) {
        *self = Self {
            last_generation: self.last_generation,
            ..Self::new(self.max_bridges, self.proving.take())
        };
        self.list_due = Some(now);
        self.tick(now);
    }

    /// What is to be done, in order. Empties the list.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }

    /// When [`Tracker::tick`] has something to do next.
    pub fn deadline(&self) -> Option<Instant> {
        let due = self.due.first().map(|(at, _)| *at);
        [due, self.list_due].into_iter().flatten().min()
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant) {
        if self.list_due.is_some_and(|at| at <= now) {
            self.list_due = None;
            self.ask(Query::Bridges);
        }
        while let Some((at, call)) = self.due.first().cloned()
            && at <= now
        {
            self.schedule(&call, None);
            // A server that answers slower than we ask must not make the list of questions grow.
            if self.unanswered >= self.max_bridges.saturating_mul(2) {
                self.schedule(&call, Some(now + POLL));
            } else {
                self.start_round(&call);
            }
        }
    }

    /// An event came.
    pub fn event(&mut self, event: &Message, now: Instant) {
        let Some(name) = event.event() else { return };
        let channel = || event.get("Channel").unwrap_or_default();
        match name {
            "VarSet" if event.get("Variable") == Some("BRIDGEPEER") => {
                self.varset_seen = true;
                self.touch_channel(channel(), now, "BRIDGEPEER was set: the bridge changes");
            }
            "BridgeCreate" => {
                if let Some(call) = event.get("BridgeUniqueid").and_then(CallId::new) {
                    self.track(&call);
                }
            }
            "BridgeEnter" => self.entered(event, now),
            "BridgeLeave" => self.left(event, now),
            "BridgeDestroy" => {
                if let Some(call) = event.get("BridgeUniqueid").and_then(CallId::new) {
                    self.destroyed(&call);
                }
            }
            "BridgeMerge" => {
                for key in ["ToBridgeUniqueid", "FromBridgeUniqueid"] {
                    if let Some(call) = event.get(key).and_then(CallId::new) {
                        self.touch(&call, now, || "the bridge merges with another".to_owned());
                    }
                }
            }
            "Hold" => {
                // Beyond the bound `rtp,hold` alone has to tell.
                if channel().len() <= MAX_NAME
                    && self.held.len() < self.max_bridges.saturating_mul(2)
                {
                    self.held.insert(channel().to_owned());
                }
                self.touch_channel(channel(), now, "Hold");
            }
            "Unhold" => {
                self.held.remove(channel());
                self.touch_channel(channel(), now, "Unhold");
            }
            "Hangup" => {
                self.touch_channel(channel(), now, "Hangup");
                self.forget_member(channel());
                self.held.remove(channel());
            }
            // The channel goes on under another name; BridgeInfo will tell it.
            "Rename" => {
                self.touch_channel(channel(), now, "Rename");
                self.forget_member(channel());
                if self.held.remove(channel())
                    && let Some(new) = event.get("Newname").filter(|new| new.len() <= MAX_NAME)
                {
                    self.held.insert(new.to_owned());
                }
            }
            "HangupRequest" | "SoftHangupRequest" | "MixMonitorStart" | "MusicOnHoldStart" => {
                self.touch_channel(channel(), now, name);
            }
            "ChanSpyStart" => {
                for key in ["SpyeeChannel", "SpyerChannel"] {
                    self.touch_channel(event.get(key).unwrap_or_default(), now, name);
                }
            }
            // Nothing else says when these end; asking early costs two requests. A standing offer
            // is none of their business: it was made after the start was seen.
            "MixMonitorStop" | "MusicOnHoldStop" => self.ask_again(channel(), now),
            "ChanSpyStop" => {
                for key in ["SpyeeChannel", "SpyerChannel"] {
                    self.ask_again(event.get(key).unwrap_or_default(), now);
                }
            }
            _ => {}
        }
        self.tick(now);
    }

    /// The receiver of the events wants something.
    pub fn command(&mut self, command: &FeedCommand, now: Instant) {
        let FeedCommand::Ask { call } = command;
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        let idle = bridge.round.is_none();
        let wanted = match bridge.said {
            Said::Offered { .. } => {
                bridge.confirm = true;
                idle
            }
            // Is asked about as soon as the burst of events is over.
            Said::TakenBack => false,
            Said::Nothing | Said::Refused(_) => idle && bridge.due.is_some(),
        };
        if wanted {
            self.schedule(call, Some(now));
        }
        self.tick(now);
    }

    /// A question was answered, or (`None`) could not even be asked.
    pub fn answer(&mut self, query: &Query, answer: Option<Answer>, now: Instant) {
        self.unanswered = self.unanswered.saturating_sub(1);
        match query {
            Query::Bridges => self.listed(answer, now),
            Query::Bridge { call, generation } => {
                self.bridge_answered(call, *generation, answer, now)
            }
            Query::Channel {
                call,
                generation,
                channel,
            } => {
                self.leg_answered(call, *generation, channel, now, |answers| {
                    answers.status = answer;
                });
            }
            Query::Item {
                call,
                generation,
                channel,
                item,
            } => {
                self.leg_answered(call, *generation, channel, now, |answers| {
                    answers.items.extend(answer.map(|answer| (*item, answer)));
                });
            }
            Query::RtpTimeout { endpoint } => {
                if let Some(known) = self.rtp_timeouts.get_mut(endpoint) {
                    *known = conditions::rtp_timeout(answer);
                }
            }
        }
        self.tick(now);
    }

    // Bridges and their channels.

    /// Starts to track a bridge, if there is room.
    fn track(&mut self, call: &CallId) -> Option<&mut Bridge> {
        if !self.bridges.contains_key(call) {
            if self.bridges.len() >= self.max_bridges {
                return None;
            }
            let bridge = Bridge {
                generation: self.next_generation(),
                count: None,
                channels: Vec::new(),
                due: None,
                patience: DEBOUNCE,
                polls: BRIDGE_POLLS,
                confirm: false,
                explained: false,
                has_turn: false,
                changed: None,
                technology: None,
                round: None,
                said: Said::Nothing,
            };
            self.bridges.insert(call.clone(), bridge);
        }
        self.bridges.get_mut(call)
    }

    fn entered(&mut self, event: &Message, now: Instant) {
        let Some(call) = event.get("BridgeUniqueid").and_then(CallId::new) else {
            return;
        };
        let channel = event.get("Channel").unwrap_or_default();
        // The event of leaving the bridge before may be still to come.
        if let Some(before) = self
            .members
            .get(channel)
            .filter(|before| **before != call)
            .cloned()
        {
            self.touch(&before, now, || format!("{channel} went to another bridge"));
            self.forget_member(channel);
        }
        let count = event
            .get("BridgeNumChannels")
            .and_then(|count| count.parse().ok());
        let max_bridges = self.max_bridges;
        let Some(bridge) = self.track(&call) else {
            if count == Some(2) {
                self.turned_away = true;
                let refusal = Refusal::TooManyBridges(max_bridges);
                self.tell(refused(call, Vec::new(), &refusal));
            }
            return;
        };
        bridge.count = count;
        self.learn_member(&call, channel);
        if count == Some(2) {
            self.first_pair.get_or_insert(now);
        }
        self.touch(&call, now, || format!("{channel} entered the bridge"));
    }

    fn left(&mut self, event: &Message, now: Instant) {
        let Some(call) = event.get("BridgeUniqueid").and_then(CallId::new) else {
            return;
        };
        let channel = event.get("Channel").unwrap_or_default();
        if self.members.get(channel) == Some(&call) {
            self.forget_member(channel);
        }
        if let Some(bridge) = self.bridges.get_mut(&call) {
            bridge.count = event
                .get("BridgeNumChannels")
                .and_then(|count| count.parse().ok());
        }
        self.touch(&call, now, || format!("{channel} left the bridge"));
    }

    fn destroyed(&mut self, call: &CallId) {
        self.schedule(call, None);
        match self.bridges.remove(call) {
            Some(bridge) => {
                for channel in &bridge.channels {
                    self.members.remove(channel);
                }
                if !matches!(bridge.said, Said::Nothing) {
                    self.tell(FeedEvent::Gone { call: call.clone() });
                }
            }
            None if self.turned_away => self.tell(FeedEvent::Gone { call: call.clone() }),
            None => {}
        }
        self.settled(call);
    }

    fn learn_member(&mut self, call: &CallId, channel: &str) {
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        if channel.is_empty()
            || channel.len() > MAX_NAME
            || bridge.channels.len() >= MAX_CHANNELS
            || bridge.channels.iter().any(|known| known == channel)
        {
            return;
        }
        bridge.channels.push(channel.to_owned());
        self.members.insert(channel.to_owned(), call.clone());
    }

    fn forget_member(&mut self, channel: &str) {
        let Some(call) = self.members.remove(channel) else {
            return;
        };
        if let Some(bridge) = self.bridges.get_mut(&call) {
            bridge.channels.retain(|known| known != channel);
        }
    }

    // Taking back and asking.

    fn touch_channel(&mut self, channel: &str, now: Instant, cause: &str) {
        if let Some(call) = self.members.get(channel).cloned() {
            self.touch(&call, now, || format!("{cause} ({channel})"));
        }
    }

    /// Something happened to the bridge: takes back first, asks afterwards.
    fn touch(&mut self, call: &CallId, now: Instant, cause: impl FnOnce() -> String) {
        let generation = self.next_generation();
        let debounce = match self.proving {
            Some(_) => PROVEN_DEBOUNCE,
            None => DEBOUNCE,
        };
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        bridge.generation = generation;
        bridge.patience = debounce;
        bridge.confirm = false;
        bridge.changed = Some(now);
        bridge.technology = None;
        if matches!(bridge.said, Said::Offered { .. }) {
            bridge.said = Said::TakenBack;
            bridge.explained = false;
            self.out.push(Output::Tell(FeedEvent::TakeBack {
                call: call.clone(),
                cause: cause(),
            }));
        }
        match bridge.count {
            Some(0 | 1) => self.schedule(call, None),
            // Not worth a question: BridgeInfo of a big conference is long.
            Some(count) if count > 2 => {
                self.schedule(call, None);
                self.refuse(call, Refusal::ChannelCount(count));
            }
            _ => self.schedule(call, Some(now + debounce)),
        }
        // A bridge that changes over and over must not keep the others waiting.
        self.settled(call);
    }

    fn ask_again(&mut self, channel: &str, now: Instant) {
        let Some(call) = self.members.get(channel).cloned() else {
            return;
        };
        let offered = self
            .bridges
            .get(&call)
            .is_some_and(|bridge| matches!(bridge.said, Said::Offered { .. }));
        if !offered {
            self.touch(&call, now, String::new);
        }
    }

    fn schedule(&mut self, call: &CallId, at: Option<Instant>) {
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        if let Some(old) = std::mem::replace(&mut bridge.due, at) {
            self.due.remove(&(old, call.clone()));
        }
        if let Some(at) = at {
            self.due.insert((at, call.clone()));
        }
    }

    fn start_round(&mut self, call: &CallId) {
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        if let Some(round) = &mut bridge.round {
            // One series of questions at a time: its last answer starts this one.
            debug_assert_ne!(round.generation, bridge.generation);
            return;
        }
        let generation = bridge.generation;
        let offered = match &bridge.said {
            Said::Offered { channels, .. } if !bridge.confirm => Some(channels.clone()),
            _ => None,
        };
        bridge.round = Some(Round {
            generation,
            unanswered: 1,
            channels: None,
            full: offered.is_none(),
            items: &[],
            explaining: None,
            answers: Default::default(),
        });
        if let Some(channels) = offered {
            bridge.polls -= 1;
            if bridge.polls > 0 {
                return self.ask_channels(call, channels, false);
            }
        }
        bridge.polls = BRIDGE_POLLS;
        self.ask(Query::Bridge {
            call: call.clone(),
            generation,
        });
    }

    /// Books one answer to a round. `None`: the answer is of no use; the next round is started if
    /// the last answer of the old one was waited for.
    fn book(&mut self, call: &CallId, generation: u64, now: Instant) -> Option<&mut Bridge> {
        let bridge = self.bridges.get_mut(call)?;
        let round = bridge
            .round
            .as_mut()
            .filter(|round| round.generation == generation)?;
        round.unanswered -= 1;
        if generation != bridge.generation {
            if round.unanswered == 0 {
                bridge.round = None;
                let wanted = !matches!(bridge.count, Some(count) if count != 2);
                if bridge.due.is_none() && wanted {
                    self.schedule(call, Some(now));
                }
            }
            return None;
        }
        self.bridges.get_mut(call)
    }

    // Answers.

    fn listed(&mut self, answer: Option<Answer>, now: Instant) {
        let Some(answer) = answer.filter(Answer::is_success) else {
            self.list_due = Some(now + POLL);
            return;
        };
        let mut unsynced = HashSet::new();
        for item in answer
            .items
            .iter()
            .filter(|item| item.event() == Some("BridgeListItem"))
        {
            let Some(call) = item.get("BridgeUniqueid").and_then(CallId::new) else {
                continue;
            };
            if self.bridges.contains_key(&call) {
                continue; // Its events are as new as this list.
            }
            let count = item
                .get("BridgeNumChannels")
                .and_then(|count| count.parse().ok());
            let Some(bridge) = self.track(&call) else {
                self.turned_away = true;
                let refusal = Refusal::TooManyBridges(self.max_bridges);
                self.tell(refused(call, Vec::new(), &refusal));
                continue;
            };
            bridge.count = count;
            match count {
                Some(0 | 1) => {}
                Some(count) if count > 2 => self.refuse(&call, Refusal::ChannelCount(count)),
                _ => {
                    self.schedule(&call, Some(now));
                    unsynced.insert(call);
                }
            }
        }
        if unsynced.is_empty() {
            self.tell(FeedEvent::Synced);
        } else {
            self.unsynced = Some(unsynced);
        }
    }

    /// Something was said about the bridge, or will be because it changes, or it is over.
    fn settled(&mut self, call: &CallId) {
        if let Some(unsynced) = &mut self.unsynced
            && unsynced.remove(call)
            && unsynced.is_empty()
        {
            self.unsynced = None;
            self.tell(FeedEvent::Synced);
        }
    }

    fn bridge_answered(
        &mut self,
        call: &CallId,
        generation: u64,
        answer: Option<Answer>,
        now: Instant,
    ) {
        let Some(bridge) = self.book(call, generation, now) else {
            return;
        };
        let full = bridge.round.as_ref().is_none_or(|round| round.full);
        let offered = match &bridge.said {
            Said::Offered { channels, .. } => Some(channels.clone()),
            _ => None,
        };
        let Some(answer) = answer else {
            return self.decide(call, now, full, Err(conditions::unasked("BridgeInfo")));
        };
        if !answer.is_success() && answer.message().contains("not found") {
            return self.destroyed(call);
        }
        if answer.is_success() {
            self.learn_members(call, &answer, now);
        }
        let channels = match conditions::bridge(call.as_str(), &answer) {
            Ok(Bridged {
                channels,
                other_technology: Some(technology),
            }) => return self.technology_answered(call, channels, technology, now),
            Ok(bridged) => bridged.channels,
            Err(refusal) => return self.decide(call, now, full, Err(refusal)),
        };
        let legs = conditions::legs(&channels);
        if let Some(held) = legs.iter().find(|leg| self.held.contains(leg.channel)) {
            let refusal = Refusal::OnHold(held.to_string());
            return self.decide(call, now, full, Err(refusal));
        }
        // A poll asks only whether the offer still stands; of other channels it knows nothing.
        let full = full || offered.is_none_or(|offered| offered != channels);
        self.ask_channels(call, channels, full);
    }

    /// Asterisk bridges in another way than by native_rtp. Where that may have a reason that can be
    /// told, asks for it, once.
    fn technology_answered(
        &mut self,
        call: &CallId,
        channels: [String; 2],
        technology: String,
        now: Instant,
    ) {
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        let known = bridge.technology.as_ref();
        let known = known.filter(|(explained, _)| *explained == technology);
        let refusal = match known {
            Some((_, refusal)) => refusal.clone(),
            None => {
                // A standing offer is taken back before anything is asked. The other technologies'
                // names say enough.
                let offered = matches!(bridge.said, Said::Offered { .. });
                if technology == "simple_bridge" && bridge.lasts(now) && !offered {
                    if let Some(round) = &mut bridge.round {
                        round.explaining = Some(technology);
                    }
                    return self.ask_legs(call, channels, true, &conditions::TECHNOLOGY_ITEMS);
                }
                Refusal::Technology(technology)
            }
        };
        self.decide(call, now, true, Err(refusal));
    }

    /// The second half of a round.
    fn ask_channels(&mut self, call: &CallId, channels: [String; 2], full: bool) {
        if full {
            // Before all else: Asterisk answers in order, so an offer need not wait for it.
            for endpoint in channels
                .iter()
                .filter_map(|channel| conditions::endpoint(channel))
            {
                self.ask_rtp_timeout(endpoint);
            }
        }
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        if let Some(round) = &mut bridge.round {
            round.full = full;
        }
        let items = conditions::items(full, self.proving.is_some(), bridge.explained);
        self.ask_legs(call, channels, full, items);
    }

    /// Asks the same of both channels.
    fn ask_legs(
        &mut self,
        call: &CallId,
        channels: [String; 2],
        status: bool,
        items: &'static [&'static str],
    ) {
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        let generation = bridge.generation;
        let mut queries = Vec::new();
        for channel in &channels {
            if status {
                queries.push(Query::Channel {
                    call: call.clone(),
                    generation,
                    channel: channel.clone(),
                });
            }
            queries.extend(items.iter().map(|&item| Query::Item {
                call: call.clone(),
                generation,
                channel: channel.clone(),
                item,
            }));
        }
        if let Some(round) = &mut bridge.round {
            round.unanswered = u8::try_from(queries.len()).unwrap_or(u8::MAX);
            round.channels = Some(channels);
            round.items = items;
        }
        for query in queries {
            self.ask(query);
        }
    }

    /// Once for each endpoint.
    fn ask_rtp_timeout(&mut self, endpoint: &str) {
        if self.rtp_timeouts.contains_key(endpoint) {
            return;
        }
        if self.rtp_timeouts.len() >= MAX_ENDPOINTS {
            self.rtp_timeouts.clear();
        }
        let endpoint = endpoint.to_owned();
        self.rtp_timeouts.insert(endpoint.clone(), None);
        self.ask(Query::RtpTimeout { endpoint });
    }

    fn rtp_timeout(&self, channel: &str) -> Option<Duration> {
        *self.rtp_timeouts.get(conditions::endpoint(channel)?)?
    }

    /// BridgeInfo's list is the truth about who is in the bridge.
    fn learn_members(&mut self, call: &CallId, answer: &Answer, now: Instant) {
        let listed = conditions::channels(answer);
        let known = self
            .bridges
            .get(call)
            .map(|bridge| bridge.channels.clone())
            .unwrap_or_default();
        for channel in known
            .iter()
            .filter(|channel| !listed.contains(&channel.as_str()))
        {
            self.forget_member(channel);
        }
        for channel in listed {
            if let Some(before) = self
                .members
                .get(channel)
                .filter(|before| *before != call)
                .cloned()
            {
                self.touch(&before, now, || format!("{channel} went to another bridge"));
                self.forget_member(channel);
            }
            self.learn_member(call, channel);
        }
    }

    fn leg_answered(
        &mut self,
        call: &CallId,
        generation: u64,
        channel: &str,
        now: Instant,
        keep: impl FnOnce(&mut LegAnswers),
    ) {
        let Some(round) = self
            .book(call, generation, now)
            .and_then(|bridge| bridge.round.as_mut())
        else {
            return;
        };
        let index = round
            .channels
            .as_ref()
            .and_then(|channels| channels.iter().position(|known| known == channel));
        if let Some(index) = index {
            keep(&mut round.answers[index]);
        }
        if round.unanswered > 0 {
            return;
        }
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        let Some(Round {
            channels: Some(channels),
            full,
            items,
            explaining,
            answers,
            ..
        }) = bridge.round.take()
        else {
            return;
        };
        if let Some(technology) = explaining {
            let refusal = conditions::explanation(call.as_str(), &channels, &answers)
                .unwrap_or_else(|| Refusal::Technology(technology.clone()));
            bridge.technology = Some((technology, refusal.clone()));
            return self.decide(call, now, full, Err(refusal));
        }
        let names = conditions::legs(&channels);
        let explains = conditions::explains(items);
        bridge.explained |= explains;
        let verdict = match &bridge.said {
            Said::Offered { legs, .. } if !full => {
                let stands = (0..2)
                    .try_for_each(|leg| conditions::unmoved(names[leg], &legs[leg], &answers[leg]));
                if let Err(refusal) = stands {
                    // What it is now takes every condition again, and at once.
                    self.touch(call, now, || refusal.to_string());
                    return self.schedule(call, Some(now));
                }
                let judged = if explains { 0..2 } else { 0..0 };
                let mut judged =
                    judged.map(|leg| conditions::relayed_in_clear(names[leg], &answers[leg]));
                judged
                    .try_for_each(|verdict| verdict)
                    .map(|()| (channels, *legs.clone()))
            }
            _ => {
                let leg = |leg: usize| {
                    conditions::leg(
                        call.as_str(),
                        names[leg],
                        items,
                        &answers[leg],
                        self.proving.as_ref(),
                    )
                };
                leg(0)
                    .and_then(|first| Ok([first, leg(1)?]))
                    .map(|legs| (channels, legs))
            }
        };
        self.decide(call, now, full, verdict);
    }

    /// Ends a round: offers or refuses, and sets the time of the next one. `full`: the round asked
    /// for every condition.
    fn decide(
        &mut self,
        call: &CallId,
        now: Instant,
        full: bool,
        verdict: Result<([String; 2], [LegFacts; 2]), Refusal>,
    ) {
        let blind =
            !self.varset_seen && self.first_pair.is_some_and(|first| now >= first + DEBOUNCE);
        let verdict = match verdict {
            Ok(_) if blind => Err(Refusal::NoVarSet),
            Ok((channels, legs)) => conditions::pair(&legs[0], &legs[1], self.proving.is_some())
                .map(|pair| (channels, legs, pair)),
            Err(refusal) => Err(refusal),
        };
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        bridge.round = None;
        let confirm = std::mem::take(&mut bridge.confirm);
        let poll = match self.proving {
            Some(_) if bridge.explained && bridge.has_turn => PROVEN_POLL,
            Some(_) if bridge.explained => {
                bridge.has_turn = true;
                self.turn = self.turn % TURNS + 1;
                PROVEN_POLL * self.turn / TURNS
            }
            _ => POLL,
        };
        let wait = match verdict {
            Ok((channels, legs, pair)) => {
                let same = matches!(&bridge.said, Said::Offered { channels: c, legs: l } if *c == channels && **l == legs);
                if same && confirm && !full {
                    // The question came in the middle of a poll, which answers a smaller one.
                    bridge.confirm = true;
                    Some(Duration::ZERO)
                } else {
                    if !same || confirm {
                        bridge.said = Said::Offered {
                            channels: channels.clone(),
                            legs: Box::new(legs),
                        };
                        bridge.technology = None;
                        let rtp_timeout = [0, 1].map(|leg: usize| self.rtp_timeout(&channels[leg]));
                        self.tell(FeedEvent::Offer {
                            call: call.clone(),
                            pair,
                            channels,
                            rtp_timeout,
                        });
                    }
                    Some(poll)
                }
            }
            // Its channels change only with an event.
            Err(refusal @ (Refusal::ChannelCount(_) | Refusal::NotPjsip(_))) => {
                self.refuse(call, refusal);
                None
            }
            Err(refusal) => {
                let wait = if refusal.is_not_yet() {
                    bridge.patience.min(POLL)
                } else {
                    POLL
                };
                // So soon after a change this is no news.
                let soon = match refusal {
                    Refusal::Technology(_) => !bridge.lasts(now),
                    _ => refusal.is_not_yet() && bridge.patience < DEBOUNCE,
                };
                let untold = soon && !matches!(bridge.said, Said::Offered { .. });
                bridge.patience = wait * 2;
                if !untold {
                    self.refuse(call, refusal);
                }
                Some(wait)
            }
        };
        self.schedule(call, wait.map(|wait| now + wait));
        self.settled(call);
    }

    /// Says that a call is refused, once for each cause.
    fn refuse(&mut self, call: &CallId, refusal: Refusal) {
        let Some(bridge) = self.bridges.get_mut(call) else {
            return;
        };
        if matches!(&bridge.said, Said::Refused(said) if *said == refusal) {
            return;
        }
        let event = refused(call.clone(), bridge.channels.clone(), &refusal);
        bridge.said = Said::Refused(refusal);
        self.tell(event);
    }

    fn next_generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    fn ask(&mut self, query: Query) {
        self.unanswered += 1;
        self.out.push(Output::Ask(query));
    }

    fn tell(&mut self, event: FeedEvent) {
        self.out.push(Output::Tell(event));
    }
}

fn refused(call: CallId, mut channels: Vec<String>, refusal: &Refusal) -> FeedEvent {
    // The order of the legs.
    channels.sort_unstable();
    FeedEvent::Refused {
        call,
        channels,
        name: refusal.name(),
        cause: refusal.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ami::simulation::{Pbx, Simulation};

    const A: &str = "PJSIP/a-1";
    const B: &str = "PJSIP/b-2";
    const SECOND: Duration = Duration::from_secs(1);
    /// The bridge; each channel and its items.
    const FULL_ROUND: usize = 1 + 2 * (1 + 6);
    /// The same with proof: without what the wire shows, or only explains.
    const PROVEN_ROUND: usize = 1 + 2 * (1 + 3);

    fn bridge_event(name: &str, bridge: &str, count: usize, channel: &str) -> String {
        format!(
            "Event: {name}\r\nBridgeUniqueid: {bridge}\r\nBridgeTechnology: simple_bridge\r\n\
             BridgeNumChannels: {count}\r\nChannel: {channel}\r\n"
        )
    }

    fn channel_event(name: &str, channel: &str) -> String {
        format!("Event: {name}\r\nChannel: {channel}\r\n")
    }

    fn varset(channel: &str) -> String {
        format!("Event: VarSet\r\nChannel: {channel}\r\nVariable: BRIDGEPEER\r\nValue: x\r\n")
    }

    /// A PBX with one native call, and what the feed said until it was offered.
    fn offered() -> Simulation {
        let mut simulation = standing(|_| {});
        let told = simulation.told();
        assert!(told.len() == 1 && told[0].starts_with("offer "), "{told:?}");
        simulation
    }

    /// A call that was there before us.
    fn standing(change: impl FnOnce(&mut Pbx)) -> Simulation {
        let mut pbx = Pbx::default();
        pbx.bridge("one", "native_rtp", &[A, B]);
        change(&mut pbx);
        let mut simulation = Simulation::new(pbx);
        simulation.pass(SECOND / 10);
        simulation
    }

    #[test]
    fn a_resync_offers_the_calls_that_stand() {
        offered();
    }

    #[test]
    fn a_call_that_fails_a_condition_is_refused_in_words() {
        type Change = fn(&mut Pbx);
        let cases: [(Change, &str); 19] = [
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,direct)", "192.0.2.9:4000"),
                "direct media with 192.0.2.9:4000",
            ),
            (
                |pbx| pbx.set(B, "CHANNEL(rtp,hold)", "1"),
                "leg B (PJSIP/b-2) is on hold",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,secure)", "1"),
                "leg A (PJSIP/a-1) has encrypted media",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,dest)", "(null)"),
                "leg A (PJSIP/a-1) has no remote RTP address",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,dest)", ""),
                "CHANNEL(rtp,dest) of leg A (PJSIP/a-1) is empty",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,dest)", "phone"),
                "is phone, which is not understood",
            ),
            (
                |pbx| pbx.set(B, "CHANNEL(rtp,src)", "0.0.0.0:4000"),
                "only 0.0.0.0:4000; set bind_rtp_to_media_address",
            ),
            (
                |pbx| pbx.set(B, "CHANNEL(rtp,src)", "[::]:4000"),
                "only [::]:4000",
            ),
            (
                |pbx| pbx.set(B, "CHANNEL(rtp,src)", "[2001:db8::1]:4000"),
                "different address families",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,hold)", "maybe"),
                "is maybe, which is not understood",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(audiowriteformat)", "alaw"),
                "transcoding alaw→ulaw at leg A (PJSIP/a-1)",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(audionativeformat)", "(ulaw|alaw)"),
                "any of (ulaw|alaw)",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(audionativeformat)", "(nothing)"),
                "is (nothing)",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(videonativeformat)", "(h264)"),
                "has video ((h264))",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtcp,rxcount)", "0"),
                "no RTP from leg A (PJSIP/a-1) yet",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtcp,rxcount)", ""),
                "rxcount) of leg A (PJSIP/a-1) is empty",
            ),
            (
                |pbx| pbx.bridge("one", "softmix", &[A, B]),
                "bridge technology softmix",
            ),
            (
                |pbx| pbx.bridge("one", "native_rtp", &[A, "Local/x@y-1;2"]),
                "Local/x@y-1;2 is not a PJSIP channel",
            ),
            (
                |pbx| pbx.bridge("one", "native_rtp", &[A, B, "PJSIP/c-3"]),
                "channels in the bridge: 3",
            ),
        ];
        for (change, words) in cases {
            let told = standing(change).told();
            assert!(
                told.len() == 1 && told[0].starts_with("refused ") && told[0].contains(words),
                "{words}: {told:?}"
            );
        }
    }

    #[test]
    fn a_channel_that_is_counted_but_not_listed_is_refused() {
        let told = standing(|pbx| {
            pbx.bridge("one", "native_rtp", &[A]);
            pbx.bridges.get_mut("one").expect("just made").2 = 1;
        })
        .told();
        assert_eq!(told, ["refused channels in the bridge: 1; a pair is two"]);
    }

    #[test]
    fn missing_privileges_are_named() {
        let mut simulation = standing(|_| {});
        simulation.pbx.error = Some("Permission denied");
        simulation.pass(2 * SECOND);
        let told = simulation.told();
        for (told, action) in told[1..].iter().zip(["Getvar", "BridgeInfo"]) {
            assert!(
                told.contains(&format!("may not run {action}"))
                    && told.contains("read=call,dialplan and write=call"),
                "{told}"
            );
        }
        assert_eq!(told.len(), 3, "{told:?}");
    }

    #[test]
    fn every_static_codec_has_its_number_and_others_none() {
        for (codec, number) in [
            ("ulaw", "0"),
            ("gsm", "3"),
            ("g723", "4"),
            ("alaw", "8"),
            ("g722", "9"),
            ("g729", "18"),
        ] {
            let told = standing(|pbx| speak(pbx, codec)).told();
            assert!(
                told[0].starts_with("offer ") && told[0].ends_with(&format!(" {number}")),
                "{codec}: {told:?}"
            );
        }
        for codec in ["opus", "slin", "g726", "adpcm", "ULAW"] {
            let told = standing(|pbx| speak(pbx, codec)).told();
            assert_eq!(
                told,
                [format!("refused codec {codec} has no static payload type")]
            );
        }
        let told = standing(|pbx| {
            speak(pbx, "alaw");
            pbx.set(B, "CHANNEL(audioreadformat)", "ulaw");
            pbx.set(B, "CHANNEL(audiowriteformat)", "ulaw");
            pbx.set(B, "CHANNEL(audionativeformat)", "(ulaw)");
        })
        .told();
        assert_eq!(told, ["refused transcoding alaw→ulaw"]);
    }

    fn speak(pbx: &mut Pbx, codec: &str) {
        for channel in [A, B] {
            pbx.set(channel, "CHANNEL(audioreadformat)", codec);
            pbx.set(channel, "CHANNEL(audiowriteformat)", codec);
            pbx.set(channel, "CHANNEL(audionativeformat)", &format!("({codec})"));
        }
    }

    /// A call that was there before us, on a host with these addresses whose relay proves.
    fn proving(own_addresses: &[&str], change: impl FnOnce(&mut Pbx)) -> Simulation {
        let mut pbx = Pbx::default();
        pbx.bridge("one", "native_rtp", &[A, B]);
        change(&mut pbx);
        let mut simulation = Simulation::proving(pbx, own_addresses);
        simulation.pass(SECOND / 10);
        simulation
    }

    #[test]
    fn with_proof_any_codec_will_do_and_the_wire_tells_the_payload_types() {
        for codec in ["ulaw", "opus", "g726", "slin"] {
            let mut simulation = proving(&[], |pbx| speak(pbx, codec));
            let offers: Vec<_> = simulation
                .told
                .drain(..)
                .filter_map(|event| match event {
                    FeedEvent::Offer { pair, .. } => Some(pair.payload_types),
                    _ => None,
                })
                .collect();
            assert_eq!(offers, [vec![]], "{codec}");
        }
        let told = proving(&[], |pbx| {
            speak(pbx, "opus");
            pbx.set(B, "CHANNEL(audioreadformat)", "slin");
        })
        .told();
        assert_eq!(told, ["refused transcoding opus→slin at leg B (PJSIP/b-2)"]);
        let told = proving(&[], |pbx| {
            for item in ["audioreadformat", "audiowriteformat"] {
                pbx.set(B, &format!("CHANNEL({item})"), "opus");
            }
            pbx.set(B, "CHANNEL(audionativeformat)", "(opus)");
        })
        .told();
        assert_eq!(told, ["refused transcoding ulaw→opus"]);
    }

    #[test]
    fn with_proof_a_wildcard_stands_for_an_address_of_the_phones_family() {
        let wildcard = |pbx: &mut Pbx, wildcard: &str| {
            pbx.set(A, "CHANNEL(rtp,src)", wildcard);
            pbx.set(A, "CHANNEL(rtp,dest)", "192.0.2.11:30000");
        };
        let own = ["2001:db8::1", "192.0.2.7", "192.0.2.8"];
        for address in ["0.0.0.0:4000", "[::]:4000"] {
            let told = proving(&own, |pbx| wildcard(pbx, address)).told();
            assert!(
                told[0].starts_with("offer 192.0.2.7:4000=192.0.2.11:30000 "),
                "{told:?}"
            );
            let told = proving(&own[..1], |pbx| wildcard(pbx, address)).told();
            assert!(
                told[0]
                    .starts_with("refused Asterisk names no local address for leg A (PJSIP/a-1)"),
                "{told:?}"
            );
        }
        let told = proving(&own, |pbx| {
            for (channel, remote) in [(A, "[2001:db8::11]:4"), (B, "[2001:db8::12]:4")] {
                let local = format!("[::]:{}", channel.len() * 1000 + remote.len());
                pbx.set(channel, "CHANNEL(rtp,src)", &local);
                pbx.set(channel, "CHANNEL(rtp,dest)", remote);
            }
            pbx.set(B, "CHANNEL(rtp,src)", "[::]:4002");
        })
        .told();
        assert!(
            told[0].starts_with("offer [2001:db8::1]:") && told[0].contains("[2001:db8::1]:4002="),
            "{told:?}"
        );
    }

    fn timeouts(simulation: &Simulation) -> Vec<[Option<u64>; 2]> {
        let told = simulation.told.iter();
        told.filter_map(|event| match event {
            FeedEvent::Offer { rtp_timeout, .. } => {
                Some(rtp_timeout.map(|timeout| timeout.map(|timeout| timeout.as_secs())))
            }
            _ => None,
        })
        .collect()
    }

    #[test]
    fn each_legs_rtp_timeout_is_told_and_is_never_a_reason_to_refuse() {
        let of = |endpoint: &str| format!("PJSIP_ENDPOINT({endpoint},rtp_timeout)");
        for (value, timeout) in [
            ("10", Some(10)),
            ("0", None),
            ("", None),
            ("-1", None),
            ("ten", None),
            ("99999999999", None),
        ] {
            let simulation = standing(|pbx| pbx.set("b", &of("b"), value));
            assert_eq!(timeouts(&simulation), [[None, timeout]], "{value}");
        }
        // The name of the endpoint ends at the last hyphen.
        let simulation = standing(|pbx| {
            pbx.bridge("one", "native_rtp", &["PJSIP/a-b-1", "PJSIP/x,y-2"]);
            pbx.set("a-b", &of("a-b"), "20");
        });
        assert_eq!(timeouts(&simulation), [[Some(20), None]]);
        let questions = simulation.queries.iter().filter_map(|query| match query {
            Query::RtpTimeout { endpoint, .. } => Some(endpoint.as_str()),
            _ => None,
        });
        assert_eq!(questions.collect::<Vec<_>>(), ["a-b"]);
    }

    #[test]
    fn what_stands_is_confirmed_when_asked_for_and_not_taken_back_meanwhile() {
        let mut simulation = standing(|_| {});
        let first = simulation.told();
        let asked = simulation.queries.len();
        for _ in 0..3 {
            simulation.ask("one");
        }
        assert!(matches!(simulation.queries[asked], Query::Bridge { .. }));
        simulation.ask("one");
        simulation.pass(SECOND / 100);
        simulation.ask("unknown");
        assert_eq!(simulation.told(), first);
        assert_eq!(simulation.queries.len() - asked, FULL_ROUND);
        // Each question has its answer; without one there is nothing to say.
        simulation.ask("one");
        simulation.pass(4 * SECOND);
        assert_eq!(simulation.told(), first);
    }

    #[test]
    fn what_does_not_stand_is_refused_or_replaced_when_asked_for() {
        let mut simulation = offered();
        simulation.pbx.set(A, "CHANNEL(rtp,hold)", "1");
        simulation.ask("one");
        simulation.pass(SECOND / 100);
        assert_eq!(simulation.told(), ["refused leg A (PJSIP/a-1) is on hold"]);

        let mut simulation = offered();
        simulation
            .pbx
            .set(A, "CHANNEL(rtp,dest)", "192.0.2.99:5000");
        simulation.ask("one");
        simulation.pass(SECOND / 100);
        let told = simulation.told();
        assert!(
            told.len() == 1 && told[0].starts_with("offer ") && told[0].contains("192.0.2.99:5000"),
            "{told:?}"
        );

        let mut simulation = offered();
        simulation.pbx.bridges.clear();
        simulation.ask("one");
        simulation.pass(SECOND / 100);
        assert_eq!(simulation.told(), ["gone"]);
    }

    #[test]
    fn what_is_asked_for_in_the_middle_of_a_poll_gets_a_full_round_after_it() {
        let mut simulation = standing(|_| {});
        let first = simulation.told();
        let offered_at = simulation.now;
        simulation.latency = SECOND / 20;
        // A poll is open.
        simulation.pass(POLL - SECOND / 20);
        let polled = simulation.queries.len();
        while simulation.queries.len() == polled {
            assert!(simulation.now < offered_at + 2 * POLL);
            simulation.pass(SECOND / 100);
        }
        let asked = simulation.queries.len();
        simulation.ask("one");
        simulation.ask("one");
        assert_eq!(simulation.queries.len(), asked);
        // The hold begins after the poll, which would not see it.
        simulation.pass(SECOND / 4);
        assert_eq!(simulation.told(), first);
        assert_eq!(simulation.queries.len() - asked, FULL_ROUND);
    }

    #[test]
    fn a_change_wins_over_what_is_asked_for() {
        let mut simulation = offered();
        simulation.latency = SECOND / 20;
        simulation.ask("one");
        simulation.event(&channel_event("Hold", B));
        simulation.ask("one");
        simulation.pass(SECOND);
        assert_eq!(
            simulation.told(),
            [
                "back Hold (PJSIP/b-2)",
                "refused leg B (PJSIP/b-2) is on hold"
            ]
        );
    }

    #[test]
    fn what_is_refused_is_asked_about_at_once_when_asked_for() {
        let mut simulation = standing(|pbx| pbx.set(A, "CHANNEL(rtp,hold)", "1"));
        simulation.told.clear();
        simulation.pbx.set(A, "CHANNEL(rtp,hold)", "0");
        simulation.ask("one");
        simulation.pass(SECOND / 100);
        assert!(simulation.told()[0].starts_with("offer "));
        // Nothing is to be asked of a conference.
        let mut simulation = standing(|pbx| pbx.bridge("one", "softmix", &[A, B, "PJSIP/c-3"]));
        let asked = simulation.queries.len();
        simulation.ask("one");
        simulation.pass(SECOND);
        assert_eq!(simulation.queries.len(), asked);
    }

    #[test]
    fn the_end_of_the_resync_is_told_once_and_after_every_first_word() {
        assert_eq!(Simulation::new(Pbx::default()).told_all(), [""; 0]);
        let mut simulation = Simulation::new(Pbx::default());
        simulation.pass(SECOND);
        assert_eq!(simulation.told_all(), ["synced"]);

        let mut pbx = Pbx::default();
        pbx.bridge("1", "native_rtp", &[A, B]);
        pbx.bridge("2", "simple_bridge", &["PJSIP/c-3", "PJSIP/d-4"]);
        pbx.bridge("3", "softmix", &["PJSIP/e-5", "PJSIP/f-6", "PJSIP/g-7"]);
        pbx.bridge("4", "simple_bridge", &["PJSIP/h-8"]);
        let mut simulation = Simulation::new(pbx);
        simulation.pass(10 * SECOND);
        let told = simulation.told_all();
        let kinds: Vec<_> = told.iter().map(|told| told.split(' ').next()).collect();
        assert_eq!(
            kinds,
            ["refused", "offer", "refused", "synced"].map(Some),
            "{told:?}"
        );
        // Once after each Up.
        simulation.pbx.bridges.clear();
        simulation.up();
        simulation.pass(SECOND);
        assert_eq!(simulation.told_all(), ["synced"]);
    }

    #[test]
    fn the_end_of_the_resync_does_not_wait_for_a_bridge_that_keeps_changing() {
        let mut pbx = Pbx::default();
        pbx.bridge("one", "native_rtp", &[A, B]);
        pbx.bridge("two", "native_rtp", &["PJSIP/c-3", "PJSIP/d-4"]);
        pbx.bridge("three", "native_rtp", &["PJSIP/e-5", "PJSIP/f-6"]);
        let mut simulation = Simulation::new(pbx);
        simulation.latency = SECOND / 20;
        simulation.pass(SECOND / 50);
        simulation.pbx.bridges.remove("three");
        simulation.event(&bridge_event("BridgeDestroy", "three", 0, ""));
        for _ in 0..20 {
            simulation.event(&bridge_event("BridgeLeave", "one", 1, A));
            simulation.event(&bridge_event("BridgeEnter", "one", 2, A));
            simulation.pass(SECOND / 50);
        }
        let told = simulation.told_all();
        assert!(
            told.len() == 2 && told[0].starts_with("offer ") && told[1] == "synced",
            "{told:?}"
        );
    }

    #[test]
    fn what_is_not_yet_is_asked_again_soon() {
        let mut simulation = standing(|pbx| pbx.set(A, "CHANNEL(rtcp,rxcount)", "0"));
        simulation.told.clear();
        simulation.pbx.set(A, "CHANNEL(rtcp,rxcount)", "1");
        simulation.pass(SECOND / 5);
        assert!(simulation.told()[0].starts_with("offer "));
    }

    #[test]
    fn each_of_these_takes_back_before_anything_is_asked() {
        let left = bridge_event("BridgeLeave", "one", 1, A);
        let third = bridge_event("BridgeEnter", "one", 3, "PJSIP/c-3");
        let mut events = vec![
            left,
            third,
            bridge_event("BridgeEnter", "two", 1, B),
            varset(A),
            format!("Event: ChanSpyStart\r\nSpyerChannel: PJSIP/c-3\r\nSpyeeChannel: {B}\r\n"),
            "Event: BridgeMerge\r\nToBridgeUniqueid: one\r\nFromBridgeUniqueid: two\r\n".to_owned(),
        ];
        for name in [
            "Hold",
            "Hangup",
            "HangupRequest",
            "SoftHangupRequest",
            "MixMonitorStart",
            "MusicOnHoldStart",
            "Rename",
        ] {
            events.push(channel_event(name, B));
        }
        for event in events {
            let mut simulation = offered();
            let asked = simulation.queries.len();
            simulation.event(&event);
            let told = simulation.told();
            assert!(told[0].starts_with("back "), "{event}: {told:?}");
            assert_eq!(simulation.queries.len(), asked, "{event}");
        }
        let mut simulation = offered();
        simulation.event(&bridge_event("BridgeDestroy", "one", 0, ""));
        assert_eq!(simulation.told(), ["gone"]);
    }

    #[test]
    fn what_concerns_others_takes_nothing_back() {
        let mut simulation = offered();
        for event in [
            varset("PJSIP/c-3"),
            channel_event("Hold", "PJSIP/c-3"),
            channel_event("Newexten", A),
            format!("Event: VarSet\r\nChannel: {A}\r\nVariable: X\r\nValue: BRIDGEPEER\r\n"),
            bridge_event("BridgeDestroy", "two", 0, ""),
            "Response: Success\r\nEvent: Hangup\r\nChannel: PJSIP/a-1\r\n".to_owned(),
        ] {
            simulation.event(&event);
        }
        simulation.pass(5 * SECOND);
        assert_eq!(simulation.told(), Vec::<String>::new());
    }

    #[test]
    fn an_address_that_changes_silently_is_taken_back_and_offered_anew() {
        let mut simulation = offered();
        simulation
            .pbx
            .set(A, "CHANNEL(rtp,dest)", "192.0.2.99:5000");
        simulation.pass(2 * SECOND);
        let told = simulation.told();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].starts_with(
                "back CHANNEL(rtp,dest) of leg A (PJSIP/a-1) is 192.0.2.99:5000 where it was"
            ),
            "{told:?}"
        );
        assert!(
            told[1].starts_with("offer ") && told[1].contains("192.0.2.99:5000"),
            "{told:?}"
        );
    }

    #[test]
    fn a_silent_end_is_found_by_the_poll() {
        let mut simulation = offered();
        simulation.pbx.bridge("one", "simple_bridge", &[A, B]);
        simulation.pass(POLL * u32::from(BRIDGE_POLLS));
        assert!(simulation.told()[0].starts_with("refused bridge technology simple_bridge"));
        simulation.pbx.bridges.clear();
        simulation.pass(2 * SECOND);
        assert_eq!(simulation.told(), ["gone"]);
    }

    /// A standing call of which Asterisk handles the media.
    fn handled(change: impl FnOnce(&mut Pbx)) -> Simulation {
        standing(|pbx| {
            pbx.bridge("one", "simple_bridge", &[A, B]);
            change(pbx);
        })
    }

    fn speak_alaw(pbx: &mut Pbx) {
        // What either phone says is turned into the other's codec.
        pbx.set(B, "CHANNEL(audioreadformat)", "alaw");
        pbx.set(B, "CHANNEL(audionativeformat)", "(alaw)");
        pbx.set(A, "CHANNEL(audiowriteformat)", "alaw");
    }

    #[test]
    fn why_asterisk_handles_the_media_is_told_where_that_can_be_known() {
        type Change = fn(&mut Pbx);
        let cases: [(Change, &str, &str); 8] = [
            (speak_alaw, "transcoding", "refused transcoding ulaw→alaw"),
            (
                |pbx| pbx.set(B, "CHANNEL(audiowriteformat)", "slin"),
                "transcoding",
                "refused transcoding slin→ulaw at leg B (PJSIP/b-2)",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,secure)", "1"),
                "encrypted",
                "refused leg A (PJSIP/a-1) has encrypted media (SRTP)",
            ),
            (
                |pbx| pbx.set(B, "CHANNEL(videonativeformat)", "(h264)"),
                "video",
                "refused leg B (PJSIP/b-2) has video ((h264))",
            ),
            // What tells nothing.
            (
                |_| {},
                "technology",
                "refused bridge technology simple_bridge: Asterisk itself",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(rtp,secure)", ""),
                "technology",
                "refused bridge technology simple_bridge: Asterisk itself",
            ),
            (
                |pbx| pbx.set(A, "CHANNEL(audionativeformat)", "(ulaw|alaw)"),
                "technology",
                "refused bridge technology simple_bridge: Asterisk itself",
            ),
            (
                |pbx| {
                    pbx.bridge("one", "softmix", &[A, B]);
                    speak_alaw(pbx);
                },
                "technology",
                "refused bridge technology softmix: Asterisk mixes the media",
            ),
        ];
        for (change, rule, words) in cases {
            let mut simulation = handled(change);
            let names = simulation.told.iter().filter_map(|event| match event {
                FeedEvent::Refused { name, .. } => Some(*name),
                _ => None,
            });
            assert_eq!(names.collect::<Vec<_>>(), [rule], "{words}");
            let told = simulation.told();
            assert!(
                told.len() == 1 && told[0].starts_with(words),
                "{words}: {told:?}"
            );
        }
    }

    #[test]
    fn why_asterisk_handles_the_media_is_asked_once_a_change_and_its_words_stand() {
        let mut simulation = handled(speak_alaw);
        assert_eq!(simulation.told(), ["refused transcoding ulaw→alaw"]);
        let questions = |simulation: &Simulation| {
            let (bridges, others): (Vec<_>, Vec<_>) = simulation
                .queries
                .iter()
                .partition(|query| matches!(query, Query::Bridge { .. }));
            // Not the list.
            (bridges.len(), others.len() - 1)
        };
        // `Status` and whether it is encrypted, of either leg.
        assert_eq!(questions(&simulation), (1, 4));
        simulation.pass(10 * POLL);
        let (bridges, others) = questions(&simulation);
        assert!((10..=11).contains(&bridges), "{bridges}");
        assert_eq!(others, 4);
        for turn in 2..5 {
            simulation.event(&varset(A));
            simulation.pass(LASTING / 2);
            simulation.event(&varset(B));
            simulation.pass(2 * LASTING);
            assert_eq!(questions(&simulation).1, 4 * turn);
        }
        assert_eq!(simulation.told(), Vec::<String>::new());
        // The other codec is gone, and something else takes its place.
        simulation.pbx.items.clear();
        simulation.event(&varset(A));
        simulation.pass(2 * LASTING);
        let told = simulation.told();
        assert!(
            told.len() == 1 && told[0].starts_with("refused bridge technology simple_bridge"),
            "{told:?}"
        );
        simulation.pbx.bridge("one", "native_rtp", &[A, B]);
        simulation.pass(POLL);
        assert!(simulation.told()[0].starts_with("offer "));
    }

    #[test]
    fn an_offer_is_taken_back_before_anyone_asks_why() {
        let mut simulation = offered();
        simulation.pbx.bridge("one", "simple_bridge", &[A, B]);
        speak_alaw(&mut simulation.pbx);
        let asked = simulation.queries.len();
        simulation.ask("one");
        simulation.pass(Duration::from_millis(5));
        let told = simulation.told();
        assert!(told[0].starts_with("refused bridge technology simple_bridge"));
        assert_eq!(simulation.queries.len() - asked, 1);
        simulation.pass(SECOND);
        assert_eq!(simulation.told(), ["refused transcoding ulaw→alaw"]);
    }

    #[test]
    fn a_hold_that_the_channel_does_not_show_yet_is_believed() {
        let mut simulation = offered();
        simulation.event(&channel_event("Hold", A));
        simulation.pass(5 * SECOND);
        assert_eq!(
            simulation.told(),
            [
                "back Hold (PJSIP/a-1)",
                "refused leg A (PJSIP/a-1) is on hold"
            ]
        );
        simulation.event(&channel_event("Unhold", A));
        simulation.pass(SECOND);
        assert!(simulation.told()[0].starts_with("offer "));
    }

    #[test]
    fn a_burst_is_asked_about_once() {
        let mut simulation = offered();
        let asked = simulation.queries.len();
        for _ in 0..50 {
            simulation.event(&varset(A));
            simulation.event(&varset(B));
            simulation.pass(Duration::from_millis(2));
        }
        simulation.pass(SECOND / 2);
        assert_eq!(simulation.queries.len() - asked, FULL_ROUND);
    }

    #[test]
    fn an_offer_that_stands_costs_one_question_for_each_phone_a_poll() {
        let mut simulation = offered();
        let asked = simulation.queries.len();
        simulation.pass(POLL * u32::from(BRIDGE_POLLS) * 10);
        let (bridges, items): (Vec<_>, Vec<_>) = simulation.queries[asked..]
            .iter()
            .partition(|query| matches!(query, Query::Bridge { .. }));
        // A poll or so fewer than that: the answers take their time.
        let polls = usize::from(BRIDGE_POLLS) * 10;
        assert!(
            (polls * 2 - 2..=polls * 2).contains(&items.len()),
            "{}",
            items.len()
        );
        assert!((9..=10).contains(&bridges.len()), "{}", bridges.len());
        assert!(items.iter().all(|query| matches!(
            query,
            Query::Item {
                item: "CHANNEL(rtp,dest)",
                ..
            }
        )));
        assert_eq!(simulation.told(), Vec::<String>::new());
    }

    #[test]
    fn with_proof_the_poll_is_five_times_cheaper() {
        let mut simulation = proving(&[], |_| {});
        simulation.told.clear();
        let asked = simulation.queries.len();
        simulation.pass(PROVEN_POLL * u32::from(BRIDGE_POLLS) * 10);
        let polls = 10 * usize::from(BRIDGE_POLLS);
        let questions = simulation.queries.len() - asked;
        // Both phones at each poll, and the bridge at every fifth; or a poll fewer. Once, what only
        // explains.
        assert!(
            (polls * 2 + 9 - 2..=polls * 2 + 10 + 6).contains(&questions),
            "{questions}"
        );
        assert_eq!(simulation.told(), Vec::<String>::new());
        // What is refused is asked about as often as without.
        let mut simulation = proving(&[], |pbx| pbx.set(A, "CHANNEL(rtp,hold)", "1"));
        simulation.told.clear();
        simulation.pbx.set(A, "CHANNEL(rtp,hold)", "0");
        simulation.pass(POLL);
        assert!(simulation.told()[0].starts_with("offer "));
    }

    fn asked<'a>(queries: &'a [Query], wanted: &str) -> Vec<&'a Query> {
        let of = |query: &&Query| matches!(query, Query::Item { item, .. } if *item == wanted);
        queries.iter().filter(of).collect()
    }

    #[test]
    fn with_proof_an_offer_waits_for_nothing_that_the_wire_shows() {
        // The list; the two endpoints.
        const ONCE: usize = 1 + 2;
        let mut simulation = proving(&[], |pbx| pbx.set(A, "CHANNEL(rtcp,rxcount)", "0"));
        assert_eq!(simulation.queries.len(), ONCE + PROVEN_ROUND);
        assert!(simulation.told()[0].starts_with("offer "));
        simulation.pass(30 * SECOND);
        simulation.event(&varset(A));
        simulation.pass(30 * SECOND);
        assert!(asked(&simulation.queries, "CHANNEL(rtcp,rxcount)").is_empty());
        // Once for each leg and offer.
        for item in ["CHANNEL(rtp,direct)", "CHANNEL(rtp,secure)"] {
            assert_eq!(asked(&simulation.queries, item).len(), 4, "{item}");
        }
    }

    #[test]
    fn with_proof_calls_that_are_found_together_take_turns_to_be_asked_about() {
        let mut simulation = proving(&[], |pbx| {
            for number in 1..TURNS {
                let channels = ["a", "b"].map(|leg| format!("PJSIP/{leg}{number}-1"));
                let channels = channels.each_ref().map(String::as_str);
                pbx.bridge(&format!("call {number}"), "native_rtp", &channels);
            }
        });
        assert_eq!(simulation.told().len(), TURNS as usize);
        simulation.pass(PROVEN_POLL);
        let polled =
            |simulation: &Simulation| asked(&simulation.queries, "CHANNEL(rtp,dest)").len();
        let legs_of_a_quarter = 2 * TURNS as usize / 4;
        for _ in 0..8 {
            let before = polled(&simulation);
            simulation.pass(PROVEN_POLL / 4);
            let asked = polled(&simulation) - before;
            assert!(
                (legs_of_a_quarter - 2..=legs_of_a_quarter + 2).contains(&asked),
                "{asked}"
            );
        }
    }

    #[test]
    fn with_proof_what_will_never_be_proven_is_explained_soon_and_for_good() {
        for (item, value, words) in [
            (
                "CHANNEL(rtp,direct)",
                "192.0.2.9:4000",
                "refused leg B (PJSIP/b-2) has direct media with 192.0.2.9:4000",
            ),
            (
                "CHANNEL(rtp,secure)",
                "1",
                "refused leg B (PJSIP/b-2) has encrypted media",
            ),
            (
                "CHANNEL(rtp,secure)",
                "",
                "refused CHANNEL(rtp,secure) of leg B (PJSIP/b-2) is empty",
            ),
        ] {
            let mut simulation = proving(&[], |pbx| pbx.set(B, item, value));
            simulation.pass(POLL);
            let told = simulation.told();
            assert!(
                told.len() == 2 && told[0].starts_with("offer ") && told[1].starts_with(words),
                "{told:?}"
            );
            // Neither time nor events bring an offer that would be refused again.
            simulation.pass(10 * POLL);
            simulation.event(&varset(A));
            simulation.pass(10 * POLL);
            assert_eq!(simulation.told(), Vec::<String>::new());
            simulation.pbx.items.clear();
            simulation.pass(POLL);
            let told = simulation.told();
            assert!(told.len() == 1 && told[0].starts_with("offer "), "{told:?}");
        }
    }

    /// A call that comes up before our eyes, native this long after its last event.
    fn comes_up(native: Duration) -> (Duration, Vec<String>) {
        let mut simulation = Simulation::proving(Pbx::default(), &[]);
        simulation.pass(SECOND);
        simulation.told.clear();
        simulation.pbx.bridge("one", "simple_bridge", &[A, B]);
        for (count, channel) in [(1, A), (2, B)] {
            simulation.event(&bridge_event("BridgeEnter", "one", count, channel));
            simulation.event(&varset(channel));
        }
        let up = simulation.now - simulation.start;
        let end = simulation.now + SECOND;
        simulation.run_until(end, |pbx, time| {
            if time >= up + native {
                pbx.bridge("one", "native_rtp", &[A, B]);
            }
        });
        let bridges = simulation.queries.iter();
        let bridges = bridges.filter(|query| matches!(query, Query::Bridge { .. }));
        (PROVEN_DEBOUNCE * bridges.count() as u32, simulation.told())
    }

    #[test]
    fn with_proof_a_call_is_asked_about_early_and_what_is_not_yet_is_no_news() {
        let ms = Duration::from_millis;
        for (native, questions) in [(10, 1), (40, 2), (60, 3)] {
            let (asked, told) = comes_up(ms(native));
            assert!(
                told.len() == 1 && told[0].starts_with("offer "),
                "{native}: {told:?}"
            );
            assert_eq!(asked, PROVEN_DEBOUNCE * questions);
        }
        let (_, told) = comes_up(LASTING - ms(50));
        assert!(told.len() == 1 && told[0].starts_with("offer "), "{told:?}");
        let (_, told) = comes_up(LASTING + ms(50));
        assert!(
            told.len() == 2
                && told[0].starts_with("refused bridge technology simple_bridge: Asterisk itself")
                && told[1].starts_with("offer "),
            "{told:?}"
        );
        // But an offer that does not stand is taken back at once.
        let mut simulation = Simulation::proving(Pbx::default(), &[]);
        simulation.pbx.bridge("one", "native_rtp", &[A, B]);
        for (count, channel) in [(1, A), (2, B)] {
            simulation.event(&bridge_event("BridgeEnter", "one", count, channel));
            simulation.event(&varset(channel));
        }
        simulation.pass(SECOND);
        simulation.told.clear();
        simulation.pbx.bridge("one", "simple_bridge", &[A, B]);
        simulation.ask("one");
        simulation.pass(ms(5));
        assert!(simulation.told()[0].starts_with("refused bridge technology"));
    }

    #[test]
    fn an_endpoint_is_asked_for_its_timeout_once_a_session_and_few_are_remembered() {
        let mut pbx = Pbx::default();
        for call in 0..20 {
            let names = ["caller", "callee"].map(|name| format!("PJSIP/{name}-{call}"));
            pbx.bridge(&call.to_string(), "native_rtp", &[&names[0], &names[1]]);
        }
        pbx.set("callee", "PJSIP_ENDPOINT(callee,rtp_timeout)", "30");
        let mut simulation = Simulation::new(pbx);
        simulation.pass(SECOND);
        simulation.event(&varset("PJSIP/caller-3"));
        simulation.pass(SECOND);
        let endpoints = |simulation: &Simulation| {
            let queries = simulation.queries.iter();
            queries
                .filter(|query| matches!(query, Query::RtpTimeout { .. }))
                .count()
        };
        assert_eq!(endpoints(&simulation), 2);
        assert_eq!(timeouts(&simulation), [[Some(30), None]; 21]);
        simulation.up();
        simulation.pass(SECOND);
        assert_eq!(endpoints(&simulation), 4);

        let mut pbx = Pbx::default();
        for call in 0..MAX_ENDPOINTS {
            let names = ["a", "b"].map(|name| format!("PJSIP/{name}{call}-1"));
            pbx.bridge(&call.to_string(), "native_rtp", &[&names[0], &names[1]]);
        }
        let mut simulation = Simulation::bounded(pbx, 2 * MAX_ENDPOINTS);
        simulation.pass(SECOND);
        assert_eq!(endpoints(&simulation), 2 * MAX_ENDPOINTS);
        assert!(simulation.tracker.rtp_timeouts.len() <= MAX_ENDPOINTS);
    }

    #[test]
    fn status_never_evaluates_what_could_freeze_asterisk() {
        for query in offered().queries {
            let mut text = bytes::BytesMut::new();
            query
                .action()
                .expect("plain names")
                .encode("", 0, &mut text);
            let text = String::from_utf8_lossy(&text);
            assert!(
                !text.contains("Action: Status") || !text.contains("CHANNEL(rt"),
                "{text}"
            );
        }
    }

    #[test]
    fn an_answer_from_before_a_change_is_dropped() {
        let mut simulation = standing(|_| {});
        simulation.latency = SECOND;
        simulation.event(&varset(A));
        simulation.pass(SECOND / 2); // Asked, not answered.
        simulation.told.clear();
        simulation.pbx.bridge("one", "simple_bridge", &[A, B]);
        simulation.event(&varset(A));
        simulation.pass(5 * SECOND);
        let told = simulation.told();
        assert!(
            told.len() == 1 && told[0].starts_with("refused bridge technology simple"),
            "{told:?}"
        );
    }

    #[test]
    fn without_varset_events_a_new_call_is_refused() {
        let mut simulation = Simulation::new(Pbx::default());
        simulation.pbx.bridge("one", "native_rtp", &[A, B]);
        simulation.event(&bridge_event("BridgeEnter", "one", 1, A));
        simulation.event(&bridge_event("BridgeEnter", "one", 2, B));
        simulation.pass(SECOND);
        let told = simulation.told();
        assert!(
            told.len() == 1 && told[0].contains("no VarSet events"),
            "{told:?}"
        );
        simulation.event(&varset(A));
        simulation.pass(SECOND);
        assert!(simulation.told()[0].starts_with("offer "));
    }

    #[test]
    fn a_channel_leaves_its_old_bridge_with_the_event_of_the_new_one() {
        let mut simulation = offered();
        simulation.event(&bridge_event("BridgeCreate", "two", 0, ""));
        simulation.event(&bridge_event("BridgeEnter", "two", 1, A));
        assert_eq!(simulation.told(), ["back PJSIP/a-1 went to another bridge"]);
        simulation.pbx.bridge("one", "native_rtp", &[B]);
        simulation.pbx.bridge("two", "native_rtp", &[A]);
        simulation.event(&bridge_event("BridgeLeave", "one", 1, A));
        simulation.event(&varset(A));
        simulation.event(&bridge_event("BridgeLeave", "one", 0, B));
        simulation.pbx.bridges.remove("one");
        simulation.pbx.bridge("two", "native_rtp", &[A, B]);
        simulation.event(&bridge_event("BridgeEnter", "two", 2, B));
        simulation.event(&bridge_event("BridgeDestroy", "one", 0, ""));
        simulation.pass(SECOND);
        let told = simulation.told();
        assert!(
            told.len() == 2 && told[0] == "gone" && told[1].starts_with("offer "),
            "{told:?}"
        );
    }

    #[test]
    fn beyond_its_bound_calls_are_refused_and_nothing_grows() {
        let mut simulation = Simulation::bounded(Pbx::default(), 2);
        for bridge in 0..100 {
            let (first, second) = (format!("PJSIP/a-{bridge}"), format!("PJSIP/b-{bridge}"));
            simulation
                .pbx
                .bridge(&bridge.to_string(), "native_rtp", &[&first, &second]);
            simulation.event(&bridge_event("BridgeEnter", &bridge.to_string(), 1, &first));
            simulation.event(&bridge_event(
                "BridgeEnter",
                &bridge.to_string(),
                2,
                &second,
            ));
            simulation.event(&varset(&first));
        }
        simulation.pass(SECOND);
        let told = simulation.told();
        assert_eq!(
            told.iter().filter(|told| told.starts_with("offer")).count(),
            2
        );
        assert_eq!(
            told.iter()
                .filter(|told| told.starts_with("refused more than 2 bridges"))
                .count(),
            98
        );
        assert_eq!(
            (
                simulation.tracker.bridges.len(),
                simulation.tracker.members.len()
            ),
            (2, 4)
        );
        for bridge in 0..100 {
            simulation.event(&bridge_event("BridgeDestroy", &bridge.to_string(), 0, ""));
        }
        assert_eq!(
            simulation
                .told()
                .iter()
                .filter(|told| *told == "gone")
                .count(),
            100
        );
        assert!(simulation.tracker.bridges.is_empty() && simulation.tracker.members.is_empty());
        assert!(simulation.tracker.due.is_empty());
    }

    #[test]
    fn a_thousand_calls_come_and_go() {
        let mut simulation = Simulation::new(Pbx::default());
        for call in 0..1020 {
            if call < 1000 {
                let (id, first, second) = (
                    call.to_string(),
                    format!("PJSIP/a-{call}"),
                    format!("PJSIP/b-{call}"),
                );
                simulation.pbx.bridge(&id, "native_rtp", &[&first, &second]);
                simulation.event(&bridge_event("BridgeEnter", &id, 1, &first));
                simulation.event(&bridge_event("BridgeEnter", &id, 2, &second));
                simulation.event(&varset(&first));
            }
            if call >= 20 {
                let (id, first, second) = (
                    (call - 20).to_string(),
                    format!("PJSIP/a-{}", call - 20),
                    format!("PJSIP/b-{}", call - 20),
                );
                simulation.pbx.bridges.remove(&id);
                simulation.event(&bridge_event("BridgeLeave", &id, 1, &first));
                simulation.event(&bridge_event("BridgeLeave", &id, 0, &second));
                simulation.event(&bridge_event("BridgeDestroy", &id, 0, ""));
            }
            simulation.pass(SECOND / 50);
        }
        let told = simulation.told();
        for (kind, count) in [
            ("offer", 1000),
            ("back", 1000),
            ("gone", 1000),
            ("refused", 0),
        ] {
            assert_eq!(
                told.iter().filter(|told| told.starts_with(kind)).count(),
                count,
                "{kind}"
            );
        }
        assert!(simulation.tracker.bridges.is_empty() && simulation.tracker.members.is_empty());
        assert_eq!(simulation.tracker.unanswered, 0);
    }

    #[test]
    fn a_growing_conference_is_refused_without_a_question() {
        let mut simulation = offered();
        let asked = simulation.queries.len();
        for count in 3..50 {
            simulation.event(&bridge_event(
                "BridgeEnter",
                "one",
                count,
                &format!("PJSIP/c-{count}"),
            ));
            simulation.pass(SECOND);
        }
        assert_eq!(simulation.queries.len(), asked);
        assert!(simulation.told()[1].starts_with("refused channels in the bridge: 3"));
    }

    /// Something that happens to one of three bridges and one of five channels.
    #[derive(Clone, Debug)]
    enum Step {
        Create(usize),
        Destroy(usize),
        Enter(usize, usize),
        /// The event of leaving the old bridge comes after that of entering the new one.
        Move(usize, usize),
        HangUp(usize),
        Hold(usize, bool),
        Burst(usize),
        /// The datapath saw something in the bridge.
        Ask(usize),
        Pass(u64),
        Latency(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3usize).prop_map(Step::Create),
            (0..3usize).prop_map(Step::Destroy),
            (0..3usize, 0..5usize).prop_map(|(bridge, channel)| Step::Enter(bridge, channel)),
            (0..3usize, 0..5usize).prop_map(|(bridge, channel)| Step::Enter(bridge, channel)),
            (0..3usize, 0..5usize).prop_map(|(bridge, channel)| Step::Move(bridge, channel)),
            (0..5usize).prop_map(Step::HangUp),
            (0..5usize, any::<bool>()).prop_map(|(channel, held)| Step::Hold(channel, held)),
            (0..5usize).prop_map(Step::Burst),
            (0..3usize).prop_map(Step::Ask),
            (0..250u64).prop_map(Step::Pass),
            (0..250u64).prop_map(Step::Pass),
            (1..400u64).prop_map(Step::Latency),
        ]
    }

    /// What the events delivered so far say, kept independently of the tracker.
    #[derive(Default)]
    struct World {
        /// (bridge, incarnation) → channels.
        bridges: HashMap<String, Vec<String>>,
        held: Vec<String>,
        incarnation: [usize; 3],
        synced: usize,
        standing: HashMap<String, [String; 2]>,
    }

    impl World {
        fn id(&self, bridge: usize) -> String {
            format!("bridge-{bridge}-{}", self.incarnation[bridge])
        }

        fn leave(&mut self, channel: &str) -> Option<(String, usize)> {
            let (id, channels) = self
                .bridges
                .iter_mut()
                .find(|(_, channels)| channels.iter().any(|known| known == channel))?;
            channels.retain(|known| known != channel);
            Some((id.clone(), channels.len()))
        }

        fn apply(&mut self, step: &Step, simulation: &mut Simulation) {
            let mut events = Vec::new();
            let name = |channel: &usize| format!("PJSIP/c-{channel}");
            match step {
                Step::Create(bridge) => {
                    let id = self.id(*bridge);
                    if !self.bridges.contains_key(&id) {
                        self.bridges.insert(id.clone(), Vec::new());
                        events.push(bridge_event("BridgeCreate", &id, 0, ""));
                    }
                }
                Step::Destroy(bridge) => {
                    let id = self.id(*bridge);
                    if self.bridges.remove(&id).is_some() {
                        self.incarnation[*bridge] += 1;
                        events.push(bridge_event("BridgeDestroy", &id, 0, ""));
                    }
                }
                Step::Enter(bridge, channel) | Step::Move(bridge, channel) => {
                    let (id, channel) = (self.id(*bridge), name(channel));
                    if self
                        .bridges
                        .get(&id)
                        .is_some_and(|channels| !channels.contains(&channel))
                    {
                        let left = self.leave(&channel);
                        let leave = left
                            .map(|(old, count)| bridge_event("BridgeLeave", &old, count, &channel));
                        let channels = self.bridges.get_mut(&id).expect("looked at above");
                        channels.push(channel.clone());
                        let enter = bridge_event("BridgeEnter", &id, channels.len(), &channel);
                        events.extend(leave);
                        events.push(enter);
                        if matches!(step, Step::Move(..)) {
                            events.reverse();
                        }
                        events.push(varset(&channel));
                    }
                }
                Step::HangUp(channel) => {
                    let channel = name(channel);
                    self.held.retain(|held| *held != channel);
                    if let Some((id, count)) = self.leave(&channel) {
                        events.push(varset(&channel));
                        events.push(bridge_event("BridgeLeave", &id, count, &channel));
                    }
                    events.push(channel_event("Hangup", &channel));
                }
                Step::Hold(channel, held) => {
                    let channel = name(channel);
                    if self
                        .bridges
                        .values()
                        .flatten()
                        .any(|known| *known == channel)
                    {
                        self.held.retain(|known| *known != channel);
                        if *held {
                            self.held.push(channel.clone());
                        }
                        events.push(channel_event(
                            if *held { "Hold" } else { "Unhold" },
                            &channel,
                        ));
                    }
                }
                Step::Burst(channel) => events.push(varset(&name(channel))),
                Step::Ask(_) | Step::Pass(_) | Step::Latency(_) => {}
            }
            simulation.pbx = self.pbx();
            for event in events {
                simulation.event(&event);
            }
            match step {
                Step::Ask(bridge) => simulation.ask(&self.id(*bridge)),
                Step::Pass(millis) => simulation.pass(Duration::from_millis(*millis)),
                Step::Latency(millis) => simulation.latency = Duration::from_millis(*millis),
                _ => {}
            }
            self.listen(simulation);
        }

        /// Native whenever two are in it; hold is seen by its event, and late by the channel.
        fn pbx(&self) -> Pbx {
            let mut pbx = Pbx::default();
            for (id, channels) in &self.bridges {
                let names: Vec<&str> = channels.iter().map(String::as_str).collect();
                pbx.bridge(id, "native_rtp", &names);
            }
            pbx
        }

        fn listen(&mut self, simulation: &mut Simulation) {
            for event in simulation.told.drain(..) {
                match event {
                    FeedEvent::Offer { call, channels, .. } => {
                        self.standing.insert(call.as_str().to_owned(), channels);
                    }
                    FeedEvent::Refused { call, .. }
                    | FeedEvent::TakeBack { call, .. }
                    | FeedEvent::Gone { call } => {
                        self.standing.remove(call.as_str());
                    }
                    FeedEvent::Synced => self.synced += 1,
                    FeedEvent::Up { .. } | FeedEvent::Down { .. } => {}
                }
            }
        }

        fn pairs(&self) -> HashMap<String, [String; 2]> {
            self.bridges
                .iter()
                .filter(|(_, channels)| {
                    channels.len() == 2
                        && !channels.iter().any(|channel| self.held.contains(channel))
                })
                .map(|(id, channels)| {
                    let mut channels = [channels[0].clone(), channels[1].clone()];
                    channels.sort_unstable();
                    (id.clone(), channels)
                })
                .collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// After every event: an offer stands only for two channels that are alone together and
        /// not held. And once it is quiet, every such pair is offered, and is confirmed when asked for.
        #[test]
        fn no_offer_outlives_its_bridge(
            steps in proptest::collection::vec(step(), 1..80),
            proof in any::<bool>(),
        ) {
            let mut world = World::default();
            let mut simulation = if proof {
                Simulation::proving(Pbx::default(), &[])
            } else {
                Simulation::new(Pbx::default())
            };
            for step in &steps {
                world.apply(step, &mut simulation);
                let pairs = world.pairs();
                for (call, channels) in &world.standing {
                    prop_assert_eq!(pairs.get(call), Some(channels), "{} after {:?}", call, step);
                }
            }
            simulation.pass(10 * SECOND);
            world.listen(&mut simulation);
            prop_assert_eq!(&world.standing, &world.pairs());
            prop_assert_eq!(world.synced, 1);

            // Whatever stands is confirmed.
            simulation.told.clear();
            for call in world.standing.keys() {
                simulation.ask(call);
            }
            simulation.pass(2 * SECOND);
            prop_assert_eq!(simulation.told().len(), world.standing.len());
        }

        /// Whatever the server says, the tracker neither panics nor forgets to be bounded.
        #[test]
        fn odd_events_and_answers_do_no_harm(
            texts in proptest::collection::vec(
                "(Event|Response): (VarSet|BridgeEnter|BridgeLeave|Status|BridgeInfoComplete|Rename|Hangup)\r\n\
                 (BridgeUniqueid: [ab]?\r\n)?(Channel: (PJSIP/)?[ab]?\r\n)?(Variable: BRIDGEPEER\r\n)?\
                 (BridgeNumChannels: (-1|0|1|2|3|99999999999999999999)\r\n)?",
                1..40,
            )
        ) {
            let now = Instant::now();
            let mut tracker = Tracker::new(1, None);
            tracker.up(now);
            for (index, text) in texts.iter().enumerate() {
                let now = now + Duration::from_millis(60 * index as u64);
                let message = Message::new(text.as_bytes());
                tracker.event(&message, now);
                for output in tracker.take_outputs() {
                    if let Output::Ask(query) = output {
                        let answer = Answer { response: message.clone(), items: vec![message.clone()] };
                        tracker.answer(&query, (index % 3 > 0).then_some(answer), now);
                    }
                }
                prop_assert!(tracker.bridges.len() <= 1 && tracker.members.len() <= MAX_CHANNELS);
            }
        }
    }
}
