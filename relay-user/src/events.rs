//! What happens to pairs, as it happens: the transitions that `relay-user events` shows.
//!
//! Whoever makes a transition publishes it on the [`EventBus`] and never waits: the bus keeps the
//! latest, and each subscriber reads along at its own pace. One that falls behind by more than is
//! kept is told how many it missed.

use std::{collections::VecDeque, fmt, sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::{clock, control::model::Feed};

/// Transitions kept for those who come late or read slowly.
pub const KEPT: usize = 1024;

/// Subscribers at once.
pub const SUBSCRIBERS: usize = 16;

/// Longest text of a transition in bytes. Causes may come from the network.
pub const LONGEST_TEXT: usize = 300;

/// One thing that happened. Its JSON is part of the control API: fields and kinds are added, never
/// renamed or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// Its number: 1 for the daemon's first, and one more for each that follows.
    pub serial: u64,
    /// When, in UTC as RFC 3339 writes it, with milliseconds.
    pub time: String,
    /// The pair; none where there is no pair, or it is about all of them.
    pub pair: Option<u64>,
    /// The feed that the pair came from, or the feed itself; none for the daemon as a whole.
    pub feed: Option<Feed>,
    /// The PBX's name of the call; none for `api`.
    pub call: Option<String>,
    /// The stream, by the leg it comes in on: 0 is the first, 1 the second. None: the whole pair.
    pub stream: Option<u8>,
    /// What happened.
    pub kind: TransitionKind,
    /// Why, in words.
    pub cause: String,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransitionKind {
    /// The PBX forwards the stream while the datapath collects the proof.
    Watching,
    /// The wire has proven that the PBX forwards the stream unchanged.
    Proven,
    /// The kernel relays the stream.
    Offloaded,
    /// The datapath itself has stopped relaying the stream; its packets go through the PBX.
    Suspended,
    /// The pair is the PBX's again.
    TakenBack,
    /// Taken back, for it had no packet for long.
    Expired,
    /// The pair or call is not taken, and stays with the PBX.
    Refused,
    /// An offloaded leg's phone has sent nothing for a while.
    Silent,
    /// Packets came to a leg from another address than its phone's; they go to the PBX.
    UnexpectedSource,
    /// A silent leg's phone is heard again.
    Resumed,
    /// The pair was found offloaded, left by an earlier daemon, and goes on.
    Adopted,
    /// Logged in to Asterisk's manager interface.
    AmiUp,
    /// The connection to Asterisk's manager interface is lost.
    AmiDown,
    /// The daemon was too late to renew the lease: everything had gone back to the PBX.
    LeaseLost,
}

impl TransitionKind {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::Watching,
        Self::Proven,
        Self::Offloaded,
        Self::Suspended,
        Self::TakenBack,
        Self::Expired,
        Self::Refused,
        Self::Silent,
        Self::UnexpectedSource,
        Self::Resumed,
        Self::Adopted,
        Self::AmiUp,
        Self::AmiDown,
        Self::LeaseLost,
    ];

    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Watching => "watching",
            Self::Proven => "proven",
            Self::Offloaded => "offloaded",
            Self::Suspended => "suspended",
            Self::TakenBack => "taken_back",
            Self::Expired => "expired",
            Self::Refused => "refused",
            Self::Silent => "silent",
            Self::UnexpectedSource => "unexpected_source",
            Self::Resumed => "resumed",
            Self::Adopted => "adopted",
            Self::AmiUp => "ami_up",
            Self::AmiDown => "ami_down",
            Self::LeaseLost => "lease_lost",
        }
    }
}

/// A gap in what a subscriber is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename = "lagged")]
pub struct Lagged {
    /// How many transitions are missing here.
    pub missed: u64,
}

impl Lagged {
    /// Its `kind` in JSON, which is no [`TransitionKind`].
    pub const NAME: &str = "lagged";
}

/// What a subscriber gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Event {
    /// The next thing that happened.
    Transition(Transition),
    /// Something is missing before the next.
    Lagged(Lagged),
}

/// Whom a transition is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// See [`Transition::pair`].
    pub pair: Option<u64>,
    /// See [`Transition::feed`].
    pub feed: Option<Feed>,
    /// See [`Transition::call`].
    pub call: Option<String>,
    /// See [`Transition::stream`].
    pub stream: Option<u8>,
}

impl Subject {
    /// The daemon as a whole.
    pub const DAEMON: Self = Self {
        pair: None,
        feed: None,
        call: None,
        stream: None,
    };

    /// A feed itself, or a pair of it that has no number.
    #[must_use]
    pub const fn feed(feed: Feed) -> Self {
        Self {
            feed: Some(feed),
            ..Self::DAEMON
        }
    }
}

/// No further subscriber is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} clients follow the events already: end one of them (`relay-user events`, or a page)")]
pub struct Crowded(pub usize);

/// Where transitions are published, and read. Clones are the same bus.
#[derive(Clone)]
pub struct EventBus {
    log: watch::Sender<Log>,
    places: Arc<Semaphore>,
}

/// A transition, as most are: nobody ever reads it, so that its words are not put together yet.
struct Kept {
    at: SystemTime,
    subject: Subject,
    kind: TransitionKind,
    cause: String,
}

impl Kept {
    fn transition(&self, serial: u64) -> Transition {
        let Subject {
            pair,
            feed,
            call,
            stream,
        } = self.subject.clone();
        Transition {
            serial,
            time: clock::utc(self.at),
            pair,
            feed,
            call,
            stream,
            kind: self.kind,
            cause: self.cause.clone(),
        }
    }
}

/// The latest transitions.
#[derive(Default)]
struct Log {
    /// Serial of the latest; 0 before the first.
    last: u64,
    /// Oldest first, without gaps, up to `last`.
    kept: VecDeque<Kept>,
    /// How many of each kind, kept or not, in the order of [`TransitionKind::ALL`].
    counts: [u64; TransitionKind::ALL.len()],
}

impl Log {
    /// Serial of the oldest kept, or of the next where none is.
    fn oldest(&self) -> u64 {
        self.last - self.kept.len() as u64 + 1
    }

    fn get(&self, serial: u64) -> Option<Transition> {
        let index = serial.checked_sub(self.oldest())?;
        let kept = self.kept.get(usize::try_from(index).ok()?)?;
        Some(kept.transition(serial))
    }
}

impl EventBus {
    /// A bus on which nothing has happened yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            log: watch::Sender::default(),
            places: Arc::new(Semaphore::new(SUBSCRIBERS)),
        }
    }

    /// Tells all subscribers, those to come included, as far as [`KEPT`] goes. Never waits for any.
    pub fn publish(&self, subject: Subject, kind: TransitionKind, cause: impl Into<String>) {
        let kept = Kept {
            at: SystemTime::now(),
            subject: Subject {
                call: subject.call.map(bounded),
                ..subject
            },
            kind,
            cause: bounded(cause.into()),
        };
        self.log.send_modify(move |log| {
            log.last += 1;
            log.counts[kind as usize] += 1;
            if log.kept.len() == KEPT {
                log.kept.pop_front();
            }
            log.kept.push_back(kept);
        });
    }

    /// How many transitions of each kind there were, kept or not.
    pub fn counts(&self) -> impl Iterator<Item = (TransitionKind, u64)> + use<> {
        let counts = self.log.borrow().counts;
        TransitionKind::ALL.into_iter().zip(counts)
    }

    /// Reads along from now on, or from the transition that follows number `since`.
    ///
    /// A number that was not given yet is one of an earlier daemon: then everything kept follows.
    ///
    /// # Errors
    /// [`Crowded`] when [`SUBSCRIBERS`] read along already.
    pub fn subscribe(&self, since: Option<u64>) -> Result<Subscription, Crowded> {
        let place = self
            .places
            .clone()
            .try_acquire_owned()
            .map_err(|_| Crowded(SUBSCRIBERS))?;
        let mut log = self.log.subscribe();
        let next = {
            let log = log.borrow_and_update();
            match since {
                None => log.last + 1,
                Some(since) if since > log.last => log.oldest(),
                Some(since) => since + 1,
            }
        };
        Ok(Subscription {
            log,
            next,
            _place: place,
        })
    }
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for EventBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBus")
            .field("last", &self.log.borrow().last)
            .finish_non_exhaustive()
    }
}

/// One reader of the bus. Dropping it makes room for another.
pub struct Subscription {
    log: watch::Receiver<Log>,
    /// Serial of the transition to be read next.
    next: u64,
    _place: OwnedSemaphorePermit,
}

impl Subscription {
    /// The next event, if it has happened already.
    pub fn ready(&mut self) -> Option<Event> {
        let log = self.log.borrow_and_update();
        let oldest = log.oldest();
        if self.next < oldest {
            let missed = oldest - self.next;
            self.next = oldest;
            return Some(Event::Lagged(Lagged { missed }));
        }
        let transition = log.get(self.next)?;
        self.next += 1;
        Some(Event::Transition(transition))
    }

    /// The next event; none when the bus is gone and everything read. Nothing is lost when this is
    /// dropped before it completes.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready() {
                return Some(event);
            }
            self.log.changed().await.ok()?;
        }
    }
}

/// Cuts a text that is too long, and shows that.
fn bounded(mut text: String) -> String {
    const CUT: char = '…';
    if text.len() > LONGEST_TEXT {
        text.truncate(text.floor_char_boundary(LONGEST_TEXT - CUT.len_utf8()));
        text.push(CUT);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const DESCRIPTION: &str = include_str!("../../docs/api.md");

    fn publish(bus: &EventBus, pair: u64) {
        let subject = Subject {
            pair: Some(pair),
            ..Subject::feed(Feed::Api)
        };
        bus.publish(subject, TransitionKind::Offloaded, "told to");
    }

    /// What is ready, in short: serials, and what is missing as `Err`.
    fn read(subscription: &mut Subscription) -> Vec<Result<u64, u64>> {
        std::iter::from_fn(|| subscription.ready())
            .map(|event| match event {
                Event::Transition(transition) => Ok(transition.serial),
                Event::Lagged(Lagged { missed }) => Err(missed),
            })
            .collect()
    }

    fn serials(range: std::ops::RangeInclusive<u64>) -> Vec<Result<u64, u64>> {
        range.map(Ok).collect()
    }

    #[test]
    fn every_kind_is_counted_though_not_kept() {
        let bus = EventBus::new();
        for kind in TransitionKind::ALL {
            bus.publish(Subject::DAEMON, kind, "");
        }
        (0..2 * KEPT).for_each(|_| bus.publish(Subject::DAEMON, TransitionKind::Silent, ""));
        for (kind, count) in bus.counts() {
            let more = if kind == TransitionKind::Silent {
                2 * KEPT
            } else {
                0
            };
            assert_eq!(count, 1 + more as u64, "{kind:?}");
        }
    }

    #[tokio::test]
    async fn subscribers_are_told_what_happens_after_they_came() {
        let bus = EventBus::new();
        publish(&bus, 7);
        let mut first = bus.subscribe(None).expect("room");
        publish(&bus, 8);
        let mut second = bus.subscribe(None).expect("room");
        assert_eq!(read(&mut first), serials(2..=2));
        assert_eq!(read(&mut second), []);
        let waiting = tokio::spawn(async move { second.next().await });
        tokio::task::yield_now().await;
        publish(&bus, 9);
        let Ok(Some(Event::Transition(told))) = waiting.await else {
            panic!("not told")
        };
        assert_eq!((told.serial, told.pair), (3, Some(9)));
        assert_eq!(read(&mut first), serials(3..=3));
    }

    #[test]
    fn what_was_missed_meanwhile_is_told_again() {
        let bus = EventBus::new();
        assert_eq!(read(&mut bus.subscribe(Some(0)).expect("room")), []);
        (1..=5).for_each(|pair| publish(&bus, pair));
        for (since, told) in [
            (0, serials(1..=5)),
            (3, serials(4..=5)),
            (5, Vec::new()),
            // Of an earlier daemon.
            (6, serials(1..=5)),
            (u64::MAX, serials(1..=5)),
        ] {
            let mut subscription = bus.subscribe(Some(since)).expect("room");
            assert_eq!(read(&mut subscription), told, "{since}");
        }
    }

    #[test]
    fn who_falls_behind_learns_how_much_is_missing() {
        let bus = EventBus::new();
        let kept = KEPT as u64;
        let mut slow = bus.subscribe(None).expect("room");
        (1..=kept).for_each(|pair| publish(&bus, pair));
        let mut in_time = bus.subscribe(Some(0)).expect("room");
        assert_eq!(read(&mut in_time), serials(1..=kept));
        (1..=3).for_each(|pair| publish(&bus, pair));
        for mut late in [slow, bus.subscribe(Some(0)).expect("room")] {
            let mut told = vec![Err(3)];
            told.extend(serials(4..=kept + 3));
            assert_eq!(read(&mut late), told);
        }
        slow = bus.subscribe(Some(2)).expect("room");
        assert_eq!(slow.ready(), Some(Event::Lagged(Lagged { missed: 1 })));
        assert_eq!(read(&mut in_time), serials(kept + 1..=kept + 3));
    }

    #[test]
    fn subscribers_are_bounded_and_make_room_when_they_leave() {
        let bus = EventBus::new();
        let mut all: Vec<_> = (0..SUBSCRIBERS)
            .map(|_| bus.subscribe(None).expect("room"))
            .collect();
        assert_eq!(
            bus.clone().subscribe(None).err(),
            Some(Crowded(SUBSCRIBERS))
        );
        all.pop();
        assert!(bus.subscribe(None).is_ok());
    }

    #[tokio::test]
    async fn the_end_of_the_bus_comes_after_its_last_transition() {
        let bus = EventBus::new();
        let mut subscription = bus.subscribe(None).expect("room");
        publish(&bus, 7);
        drop(bus);
        let patience = Duration::from_secs(20);
        for told in [true, false] {
            let next = timeout(patience, subscription.next()).await.expect("ended");
            assert_eq!(next.is_some(), told);
        }
    }

    #[test]
    fn texts_are_bounded() {
        let bus = EventBus::new();
        let mut subscription = bus.subscribe(None).expect("room");
        for (text, length) in [
            ("x".repeat(LONGEST_TEXT), LONGEST_TEXT),
            ("x".repeat(LONGEST_TEXT + 1), LONGEST_TEXT),
            // Of three bytes each, so that the cut would fall into one.
            (format!("x{}", "€".repeat(1 << 20)), LONGEST_TEXT - 2),
        ] {
            let subject = Subject {
                call: Some(text.clone()),
                ..Subject::feed(Feed::Ami)
            };
            bus.publish(subject, TransitionKind::Refused, text.clone());
            let Some(Event::Transition(told)) = subscription.ready() else {
                panic!("not told")
            };
            for told in [&told.cause, told.call.as_ref().expect("call")] {
                assert_eq!(told.len(), length);
                assert_eq!(told.ends_with('…'), text.len() > LONGEST_TEXT, "{told}");
                assert!(text.starts_with(told.trim_end_matches('…')));
            }
        }
    }

    #[test]
    fn kinds_are_called_what_their_json_says() {
        for kind in TransitionKind::ALL {
            assert_eq!(serde_json::to_value(kind).expect("kind"), kind.name());
        }
        let lagged = serde_json::to_value(Lagged { missed: 1 }).expect("lagged");
        assert_eq!(lagged["kind"], Lagged::NAME);
    }

    #[test]
    fn the_time_is_utc_with_milliseconds() {
        let bus = EventBus::new();
        publish(&bus, 7);
        let mut subscription = bus.subscribe(Some(0)).expect("room");
        let Some(Event::Transition(told)) = subscription.ready() else {
            panic!("not told")
        };
        humantime::parse_rfc3339(&told.time).expect(&told.time);
        assert_eq!(told.time.len(), "2026-01-31T12:00:00.000Z".len());
    }

    fn section() -> &'static str {
        DESCRIPTION
            .split("\n## ")
            .find(|section| section.starts_with("Events\n"))
            .expect("docs/api.md has a section Events")
    }

    #[test]
    fn the_description_lists_every_kind() {
        let names = TransitionKind::ALL.map(TransitionKind::name);
        let documented: Vec<_> = section()
            .split("\n| kind ")
            .nth(1)
            .expect("a table of kinds")
            .lines()
            .filter_map(|row| row.strip_prefix("| `")?.split('`').next())
            .take_while(|name| *name != Lagged::NAME)
            .collect();
        assert_eq!(documented, names);
    }

    #[test]
    fn the_description_shows_what_is_sent() {
        let examples: Vec<serde_json::Value> = section()
            .split("```json\n")
            .skip(1)
            .flat_map(|block| block.split("```").next().expect("end of block").lines())
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        assert!(
            examples
                .iter()
                .any(|example| example["kind"] == Lagged::NAME)
        );
        for example in examples {
            let event: Event = serde_json::from_value(example.clone()).expect("event");
            assert_eq!(
                matches!(event, Event::Lagged(_)),
                example["kind"] == Lagged::NAME
            );
            assert_eq!(serde_json::to_value(event).expect("event"), example);
        }
    }
}
