//! A PBX that answers the tracker's questions, and a clock of its own, for tests.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::{
    conditions::{self, Proving},
    message::Message,
    session::Answer,
    tracker::{CallId, FeedCommand, FeedEvent, Output, Query, Tracker},
};

/// The truth about bridges and channels, told in Asterisk's words.
#[derive(Clone, Debug, Default)]
pub(super) struct Pbx {
    /// Bridge → technology, channels, and channels that are counted but not listed.
    pub(super) bridges: BTreeMap<String, (String, Vec<String>, usize)>,
    /// (channel, item) → value, where it differs from a plain G.711 call's.
    pub(super) items: HashMap<(String, String), String>,
    /// Answers every question with this error.
    pub(super) error: Option<&'static str>,
}

impl Pbx {
    pub(super) fn bridge(&mut self, id: &str, technology: &str, channels: &[&str]) {
        let channels = channels.iter().map(|&channel| channel.to_owned()).collect();
        self.bridges
            .insert(id.to_owned(), (technology.to_owned(), channels, 0));
    }

    pub(super) fn set(&mut self, channel: &str, item: &str, value: &str) {
        self.items
            .insert((channel.to_owned(), item.to_owned()), value.to_owned());
    }

    fn item(&self, channel: &str, item: &str) -> String {
        if let Some(value) = self.items.get(&(channel.to_owned(), item.to_owned())) {
            return value.clone();
        }
        // Stable and different for each channel.
        let number = channel.bytes().fold(7u16, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(byte.into())
        }) % 5000;
        match item {
            "CHANNEL(rtp,src)" => format!("192.0.2.1:{}", 10_000 + 2 * number),
            "CHANNEL(rtp,dest)" => format!("192.0.2.{}:{}", 10 + number % 200, 30_000 + 2 * number),
            "CHANNEL(rtp,direct)" => "(null)".to_owned(),
            "CHANNEL(rtp,secure)" | "CHANNEL(rtp,hold)" => "0".to_owned(),
            "CHANNEL(audioreadformat)" | "CHANNEL(audiowriteformat)" => "ulaw".to_owned(),
            "CHANNEL(audionativeformat)" => "(ulaw)".to_owned(),
            "CHANNEL(videonativeformat)" => "(nothing)".to_owned(),
            "CHANNEL(rtcp,rxcount)" => "50".to_owned(),
            _ => String::new(),
        }
    }

    fn bridge_of(&self, channel: &str) -> Option<&str> {
        let mut bridges = self.bridges.iter();
        bridges
            .find(|(_, (_, channels, _))| channels.iter().any(|known| known == channel))
            .map(|(id, _)| id.as_str())
    }

    pub(super) fn answer(&self, query: &Query) -> Answer {
        if let Some(error) = self.error {
            return failure(error);
        }
        let mut items = Vec::new();
        match query {
            Query::Bridges => {
                for (id, (technology, channels, hidden)) in &self.bridges {
                    items.push(format!(
                        "Event: BridgeListItem\r\nBridgeUniqueid: {id}\r\nBridgeType: basic\r\n\
                         BridgeTechnology: {technology}\r\nBridgeNumChannels: {}\r\n",
                        channels.len() + hidden
                    ));
                }
                items.push("Event: BridgeListComplete\r\nEventList: Complete\r\n".to_owned());
            }
            Query::Bridge { call, .. } => {
                let Some((technology, channels, hidden)) = self.bridges.get(call.as_str()) else {
                    return failure("Specified BridgeUniqueid not found");
                };
                for channel in channels {
                    items.push(format!(
                        "Event: BridgeInfoChannel\r\nChannel: {channel}\r\n"
                    ));
                }
                items.push(format!(
                    "Event: BridgeInfoComplete\r\nEventList: Complete\r\nBridgeUniqueid: {call}\r\n\
                     BridgeTechnology: {technology}\r\nBridgeNumChannels: {}\r\n",
                    channels.len() + hidden
                ));
            }
            Query::Item { channel, item, .. } => {
                if self.bridge_of(channel).is_none() {
                    return failure("No such channel");
                }
                let value = self.item(channel, item);
                let text = format!("Response: Success\r\nVariable: {item}\r\nValue: {value}\r\n");
                return Answer {
                    response: Message::new(text.as_bytes()),
                    items: Vec::new(),
                };
            }
            Query::RtpTimeout { endpoint } => {
                let item = conditions::rtp_timeout_of(endpoint);
                let value = self.item(endpoint, &item);
                let text = format!("Response: Success\r\nVariable: {item}\r\nValue: {value}\r\n");
                return Answer {
                    response: Message::new(text.as_bytes()),
                    items: Vec::new(),
                };
            }
            Query::Channel { channel, .. } => {
                let Some(id) = self.bridge_of(channel) else {
                    return failure("No such channel");
                };
                let action = query.action().expect("plain names");
                let mut status = format!(
                    "Event: Status\r\nPrivilege: Call\r\nChannel: {channel}\r\nType: {}\r\nBridgeID: {id}\r\n\
                     Nativeformats: {}\r\nReadformat: {}\r\nReadtrans: \r\nWriteformat: {}\r\nWritetrans: \r\n",
                    channel.split('/').next().unwrap_or_default(),
                    self.item(channel, "CHANNEL(audionativeformat)"),
                    self.item(channel, "CHANNEL(audioreadformat)"),
                    self.item(channel, "CHANNEL(audiowriteformat)"),
                );
                for item in variables(&action) {
                    status.push_str(&format!(
                        "Variable: {item}={}\r\n",
                        self.item(channel, &item)
                    ));
                }
                items.push(status);
                items.push(
                    "Event: StatusComplete\r\nEventList: Complete\r\nItems: 1\r\n".to_owned(),
                );
            }
        }
        Answer {
            response: Message::new(b"Response: Success\r\nEventList: start\r\n"),
            items: items
                .iter()
                .map(|item| Message::new(item.as_bytes()))
                .collect(),
        }
    }
}

/// The functions that an action asks to evaluate.
fn variables(action: &super::message::Action) -> Vec<String> {
    let mut bytes = bytes::BytesMut::new();
    action.encode("", 0, &mut bytes);
    let message = Message::new(&bytes);
    let list = message.get("Variables").expect("a list");
    list.split("),")
        .map(|item| format!("{})", item.trim_end_matches(')')))
        .collect()
}

fn failure(words: &str) -> Answer {
    Answer {
        response: Message::new(format!("Response: Error\r\nMessage: {words}\r\n").as_bytes()),
        items: Vec::new(),
    }
}

/// A tracker, a PBX, and virtual time.
pub(super) struct Simulation {
    pub(super) tracker: Tracker,
    pub(super) pbx: Pbx,
    pub(super) start: Instant,
    pub(super) now: Instant,
    /// From question to answer.
    pub(super) latency: Duration,
    answers: BTreeMap<(Instant, u64), (Query, Answer)>,
    asked: u64,
    pub(super) told: Vec<FeedEvent>,
    pub(super) queries: Vec<Query>,
}

impl Simulation {
    pub(super) fn new(pbx: Pbx) -> Self {
        Self::bounded(pbx, 1000)
    }

    pub(super) fn bounded(pbx: Pbx, max_bridges: usize) -> Self {
        Self::with(pbx, Tracker::new(max_bridges, None))
    }

    /// With proof, on a host with these addresses.
    pub(super) fn proving(pbx: Pbx, own_addresses: &[&str]) -> Self {
        let own_addresses = own_addresses
            .iter()
            .map(|address| address.parse().expect("an address"))
            .collect();
        Self::with(pbx, Tracker::new(1000, Some(Proving { own_addresses })))
    }

    fn with(pbx: Pbx, tracker: Tracker) -> Self {
        let now = Instant::now();
        let mut simulation = Self {
            tracker,
            pbx,
            start: now,
            now,
            latency: Duration::from_millis(1),
            answers: BTreeMap::new(),
            asked: 0,
            told: Vec::new(),
            queries: Vec::new(),
        };
        simulation.up();
        simulation
    }

    /// A new session, now.
    pub(super) fn up(&mut self) {
        self.answers.clear();
        self.tracker.up(self.now);
        self.carry_out();
    }

    /// An event, now.
    pub(super) fn event(&mut self, text: &str) {
        self.message(&Message::new(text.as_bytes()));
    }

    pub(super) fn message(&mut self, message: &Message) {
        self.tracker.event(message, self.now);
        self.carry_out();
    }

    /// Lets time pass, with every answer and deadline on the way.
    pub(super) fn pass(&mut self, time: Duration) {
        self.run_until(self.now + time, |_, _| {});
    }

    /// Like [`Self::pass`]; `prepare` may change the PBX just before it is asked at a time.
    pub(super) fn run_until(&mut self, end: Instant, mut prepare: impl FnMut(&mut Pbx, Duration)) {
        loop {
            prepare(&mut self.pbx, self.now - self.start);
            let answer = self.answers.keys().next().map(|(at, _)| *at);
            let Some(next) = [answer, self.tracker.deadline()]
                .into_iter()
                .flatten()
                .min()
                .filter(|at| *at <= end)
            else {
                break;
            };
            self.now = next.max(self.now);
            prepare(&mut self.pbx, self.now - self.start);
            if answer == Some(next) {
                let (_, (query, answer)) = self.answers.pop_first().expect("just seen");
                self.tracker.answer(&query, Some(answer), self.now);
            } else {
                self.tracker.tick(self.now);
            }
            self.carry_out();
        }
        self.now = end;
    }

    fn carry_out(&mut self) {
        for output in self.tracker.take_outputs() {
            match output {
                Output::Tell(event) => self.told.push(event),
                Output::Ask(query) => {
                    self.asked += 1;
                    let answer = self.pbx.answer(&query);
                    self.queries.push(query.clone());
                    self.answers
                        .insert((self.now + self.latency, self.asked), (query, answer));
                }
            }
        }
    }

    /// The datapath saw something, now.
    pub(super) fn ask(&mut self, call: &str) {
        let call = CallId::new(call).expect("a bridge id");
        self.tracker.command(&FeedCommand::Ask { call }, self.now);
        self.carry_out();
    }

    /// What was told about calls since the last look, in short: `offer`, `refused CAUSE`,
    /// `back CAUSE`, `gone`.
    pub(super) fn told(&mut self) -> Vec<String> {
        let told = self.told.drain(..);
        told.filter(|event| *event != FeedEvent::Synced)
            .map(|event| in_short(&event))
            .collect()
    }

    /// The same with `synced`.
    pub(super) fn told_all(&mut self) -> Vec<String> {
        self.told.drain(..).map(|event| in_short(&event)).collect()
    }
}

pub(super) fn in_short(event: &FeedEvent) -> String {
    match event {
        FeedEvent::Up { asterisk } => format!("up {asterisk}"),
        FeedEvent::Down { cause } => format!("down {cause}"),
        FeedEvent::Synced => "synced".to_owned(),
        FeedEvent::Offer { pair, .. } => {
            let types: Vec<_> = pair.payload_types.iter().map(ToString::to_string).collect();
            format!(
                "offer {} {} {}",
                pair.legs[0],
                pair.legs[1],
                types.join(",")
            )
        }
        FeedEvent::Refused { cause, .. } => format!("refused {cause}"),
        FeedEvent::TakeBack { cause, .. } => format!("back {cause}"),
        FeedEvent::Gone { .. } => "gone".to_owned(),
    }
}
