//! Recorded sessions through codec and tracker: exact server bytes at their times, with the
//! tracker's own questions answered from what the recording shows of the PBX at that time.

use std::{collections::HashMap, time::Duration};

use bytes::BytesMut;
use tokio_util::codec::Decoder;

use super::{
    codec::{Codec, Frame},
    message::Message,
    recording::{Recording, crlf},
    simulation::{Pbx, Simulation},
};

/// Values in the order of their times.
type History = Vec<(Duration, String)>;

/// Everything a recording says about the PBX.
#[derive(Default)]
struct Facts {
    /// When something changed: every change comes with one of these events.
    changes: Vec<Duration>,
    technology: HashMap<String, History>,
    items: HashMap<(String, String), History>,
}

impl Facts {
    /// The value at a time: a look between the same two changes, or else the last look before, or
    /// else the first after.
    fn at<'a>(&self, history: &'a History, now: Duration) -> &'a str {
        let age = |time: Duration| {
            self.changes
                .iter()
                .filter(|change| **change <= time)
                .count()
        };
        let same = |(time, _): &&(Duration, String)| age(*time) == age(now);
        let mut before = history.iter().filter(|(time, _)| *time <= now);
        let look = before
            .clone()
            .rfind(same)
            .or_else(|| history.iter().find(same))
            .or_else(|| before.next_back());
        &look
            .or(history.first())
            .expect("a history is never empty")
            .1
    }
}

/// Replays a recording and returns what the feed said.
fn replay(name: &str) -> Vec<String> {
    let recording = Recording::load(name);
    let actions = recording.actions();
    let mut codec = Codec::default();
    let mut buffer = BytesMut::new();
    let mut messages: Vec<(Duration, Message)> = Vec::new();
    for (time, server, text) in &recording.segments {
        if *server {
            buffer.extend_from_slice(&crlf(text));
            while let Some(frame) = codec.decode(&mut buffer).expect(name) {
                if let Frame::Message(message) = frame {
                    messages.push((*time, message));
                }
            }
        }
    }

    let mut facts = Facts::default();
    for (time, message) in &messages {
        if matches!(message.event(), Some("Hold" | "Unhold"))
            || message.get("Variable") == Some("BRIDGEPEER")
        {
            facts.changes.push(*time);
        }
        if let (Some(bridge), Some(technology), false) = (
            message.get("BridgeUniqueid"),
            message.get("BridgeTechnology"),
            // These say simple_bridge whatever comes.
            matches!(message.event(), Some("BridgeCreate" | "BridgeEnter")),
        ) {
            facts
                .technology
                .entry(bridge.to_owned())
                .or_default()
                .push((*time, technology.to_owned()));
        }
        let asked = message.get("ActionID").and_then(|id| actions.get(id));
        if let (Some(asked), Some(item), Some(value)) =
            (asked, message.get("Variable"), message.get("Value"))
            && let Some(channel) = asked.get("Channel")
        {
            facts
                .items
                .entry((channel.clone(), item.to_owned()))
                .or_default()
                .push((*time, value.to_owned()));
        }
    }

    let mut simulation = Simulation::new(Pbx::default());
    let start = simulation.start;
    let prepare = |pbx: &mut Pbx, now: Duration| {
        for (bridge, (technology, _, _)) in &mut pbx.bridges {
            if let Some(history) = facts.technology.get(bridge) {
                *technology = facts.at(history, now).to_owned();
            }
        }
        for (key, history) in &facts.items {
            pbx.items
                .insert(key.clone(), facts.at(history, now).to_owned());
        }
    };
    for (time, message) in &messages {
        if message.get("ActionID").is_some() {
            continue; // The recorded client's own answers.
        }
        simulation.run_until(start + *time, prepare);
        follow(&mut simulation.pbx, message);
        simulation.message(message);
    }
    simulation.run_until(simulation.now + Duration::from_secs(10), prepare);
    simulation.told()
}

/// Keeps the PBX's bridges as the events say.
fn follow(pbx: &mut Pbx, event: &Message) {
    let (Some(name), Some(bridge)) = (event.event(), event.get("BridgeUniqueid")) else {
        return;
    };
    let channel = event.get("Channel").unwrap_or_default().to_owned();
    let count = event
        .get("BridgeNumChannels")
        .and_then(|count| count.parse().ok())
        .unwrap_or(0usize);
    match name {
        "BridgeCreate" => pbx.bridge(
            bridge,
            event.get("BridgeTechnology").unwrap_or_default(),
            &[],
        ),
        "BridgeDestroy" => {
            pbx.bridges.remove(bridge);
        }
        "BridgeEnter" | "BridgeLeave" => {
            if let Some((_, channels, hidden)) = pbx.bridges.get_mut(bridge) {
                channels.retain(|known| *known != channel);
                if name == "BridgeEnter" {
                    channels.push(channel);
                }
                *hidden = count - channels.len();
            }
        }
        _ => {}
    }
}

/// A replay without addresses, so that a test can say `offer`, and with channel names left out of
/// causes.
fn course(name: &str) -> Vec<String> {
    replay(name)
        .into_iter()
        .map(|told| match told.split_once(' ') {
            Some(("offer", _)) => "offer".to_owned(),
            _ => match told.split_once(" (PJSIP/") {
                Some((before, after)) => {
                    let rest = after.split_once(')').map_or("", |(_, rest)| rest);
                    format!("{before}{rest}")
                }
                None => told,
            },
        })
        .collect()
}

const BURST: &str = "back BRIDGEPEER was set: the bridge changes";
const SIMPLE: &str = "refused bridge technology simple_bridge: Asterisk itself handles the media, as for recording, a \
     jitter buffer, DTMF features (t, T), VOLUME, TALK_DETECT, or legs that differ in DTMF mode or packet length";

#[test]
fn a_native_call_is_offered_once_with_its_addresses_and_taken_back_on_hangup() {
    assert_eq!(
        replay("02-2000-caller"),
        [
            "offer 192.0.2.1:18758=192.0.2.12:38346 192.0.2.1:13644=192.0.2.11:31912 0",
            "back HangupRequest (PJSIP/caller-00000008)",
            "gone"
        ]
    );
}

#[test]
fn hold_takes_back_and_unhold_offers_again() {
    assert_eq!(
        replay("01-native-call-dtmf-hold"),
        [
            "offer 192.0.2.1:17722=192.0.2.12:39180 192.0.2.1:12730=192.0.2.11:32462 0",
            "back Hold (PJSIP/caller-00000002)",
            "refused leg B (PJSIP/caller-00000002) is on hold",
            "offer 192.0.2.1:17722=192.0.2.12:39180 192.0.2.1:12730=192.0.2.11:32462 0",
            "back HangupRequest (PJSIP/caller-00000002)",
            "gone"
        ]
    );
}

#[test]
fn what_asterisk_must_look_at_is_never_offered() {
    for name in [
        "02-2000-caller-info", // RFC 4733 on one leg, SIP INFO on the other
        "02-2100-caller",      // Dial tT
        "02-2200-caller",      // MixMonitor
        "02-2900-caller",      // 20 ms, 40 ms
        "02-3500-caller",      // jitter buffer
        "02-3600-caller",      // TALK_DETECT
        "02-3700-caller",      // VOLUME
    ] {
        assert_eq!(course(name), [SIMPLE, "gone"], "{name}");
    }
    for (name, why) in [
        ("02-2300-caller", "refused transcoding alaw→ulaw"),
        ("02-2400-caller", "refused leg A has encrypted media (SRTP)"),
        // On both legs.
        (
            "02-2400-caller-srtp",
            "refused leg A has encrypted media (SRTP)",
        ),
    ] {
        assert_eq!(course(name), [why, "gone"], "{name}");
    }
    assert_eq!(
        course("02-3300-caller-opus"),
        ["refused codec opus has no static payload type", "gone"],
    );
}

#[test]
fn a_conference_is_never_offered() {
    assert_eq!(
        course("02-2700-caller"),
        ["refused channels in the bridge: 1; a pair is two", "gone"],
    );
}

#[test]
fn what_stays_native_is_offered() {
    for name in [
        "02-2000-caller-ka",
        "02-2000-caller-mux",
        "02-2000-caller-sym",
        "02-2800-caller-info",
        "02-2950-caller",
        "02-3400-caller-video", // video declined
        "03-mid-sendtext",
        "03-mid-playdtmf",
        "07-user-2-loginEventscalldialplan",
    ] {
        let course = course(name);
        assert_eq!(course.len(), 3, "{name}: {course:?}");
        assert_eq!(
            (course[0].as_str(), course[2].as_str()),
            ("offer", "gone"),
            "{name}"
        );
        assert!(course[1].starts_with("back "), "{name}: {course:?}");
    }
}

#[test]
fn what_begins_in_the_middle_takes_back_and_its_end_offers_again() {
    for (name, first) in [
        ("03-mid-mixmonitor", "back MixMonitorStart"),
        ("03-mid-muteaudio", BURST),
        ("03-mid-setvar-talkdetect", BURST),
        ("03-mid-setvar-jitterbuffer", BURST),
    ] {
        assert_eq!(
            course(name),
            ["offer", first, SIMPLE, "offer", BURST, "gone"],
            "{name}"
        );
    }
    // VOLUME is never taken off again.
    assert_eq!(
        course("03-mid-setvar-volume"),
        ["offer", BURST, SIMPLE, "gone"]
    );
}

#[test]
fn a_redirect_into_a_conference_takes_back_at_once() {
    assert_eq!(
        course("03-mid-redirect-both-confbridge")[..3],
        ["offer".to_owned(), BURST.to_owned(), "gone".to_owned()],
    );
    assert_eq!(
        course("03-mid-redirect-both-confbridge")
            .iter()
            .filter(|told| *told == "offer")
            .count(),
        1
    );
}

#[test]
fn an_rtp_timeout_takes_back_with_the_hangup() {
    assert_eq!(
        course("04-timeout-rtp-and-rtcp-dropped"),
        ["offer", "back SoftHangupRequest", "gone"]
    );
}

#[test]
fn a_user_without_dialplan_events_gets_no_offer_and_is_told_why() {
    let course = course("07-user-1-minreadcallreporting");
    assert_eq!(course.len(), 2, "{course:?}");
    assert!(
        course[0].contains("no VarSet events") && course[0].contains("read=call,dialplan"),
        "{course:?}"
    );
    assert_eq!(course[1], "gone");
}
