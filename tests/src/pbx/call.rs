//! A call of the fake PBX and what AMI says about it, byte for byte as Asterisk 22 does (see `recordings/`).

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Instant,
};

/// How the two channels of a bridge are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Technology {
    /// RTP goes through Asterisk's core: own SSRC and sequence.
    Simple,
    /// RTP is forwarded as it came.
    Native,
}

impl Technology {
    fn name(self) -> &'static str {
        match self {
            Self::Simple => "simple_bridge",
            Self::Native => "native_rtp",
        }
    }
}

/// One side of a call.
#[derive(Debug)]
pub(super) struct Channel {
    /// `PJSIP/caller-00000008`.
    pub(super) name: String,
    /// `1795216900.8`.
    pub(super) unique_id: String,
    /// SIP Call-ID of the leg.
    pub(super) sip_call_id: String,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) held: AtomicBool,
    /// RTP packets received from the remote.
    pub(super) received: AtomicU64,
    /// Of these, forwarded to the other side.
    pub(super) forwarded: AtomicU64,
}

/// A call: caller, callee, and the bridge between them.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) bridge_id: String,
    pub(super) caller: Channel,
    pub(super) callee: Channel,
    pub(super) native: AtomicBool,
    /// What the caller says reaches the callee in another coding, whatever signalling claims.
    pub(super) transcoded: AtomicBool,
    pub(super) started: Instant,
}

/// Which of the two channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Caller,
    Callee,
}

/// The state letters that events carry.
#[derive(Clone, Copy, Debug)]
enum State {
    Down,
    Ring,
    Up,
}

/// An AMI message: lines of `Key: value`, and an empty line at the end.
#[derive(Clone, Debug)]
pub(super) struct Message {
    text: String,
}

impl Message {
    pub(super) fn response(result: &str, action_id: Option<&str>) -> Self {
        Self {
            text: format!("Response: {result}\r\n"),
        }
        .with_action_id(action_id)
    }

    /// An event that is part of a response.
    pub(super) fn item(name: &str, action_id: Option<&str>) -> Self {
        Self {
            text: format!("Event: {name}\r\n"),
        }
        .with_action_id(action_id)
    }

    pub(super) fn event(name: &str, class: &str) -> Self {
        Self {
            text: format!("Event: {name}\r\n"),
        }
        .with("Privilege", format_args!("{class},all"))
    }

    pub(super) fn with_action_id(self, action_id: Option<&str>) -> Self {
        match action_id {
            Some(action_id) => self.with("ActionID", action_id),
            None => self,
        }
    }

    pub(super) fn with(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.text += &format!("{key}: {value}\r\n");
        self
    }

    /// The bytes on the wire, apart after the first line: Asterisk writes so that a message often arrives in
    /// several segments.
    pub(super) fn segments(&self) -> [Vec<u8>; 2] {
        let (first, rest) = self.text.split_once('\n').unwrap_or((&self.text, ""));
        [
            format!("{first}\n").into_bytes(),
            format!("{rest}\r\n").into_bytes(),
        ]
    }
}

impl Call {
    pub(super) fn technology(&self) -> Technology {
        if self.native.load(Ordering::Relaxed) {
            Technology::Native
        } else {
            Technology::Simple
        }
    }

    pub(super) fn channel(&self, side: Side) -> &Channel {
        match side {
            Side::Caller => &self.caller,
            Side::Callee => &self.callee,
        }
    }

    /// The side whose channel has this name.
    pub(super) fn side(&self, name: &str) -> Option<Side> {
        [Side::Caller, Side::Callee]
            .into_iter()
            .find(|side| self.channel(*side).name == name)
    }

    fn snapshot(&self, message: Message, side: Side, state: State) -> Message {
        let channel = self.channel(side);
        let (number, peer, extension) = match side {
            Side::Caller => ("caller", "2000", "2000"),
            Side::Callee => ("2000", "caller", ""),
        };
        let (code, description) = match state {
            State::Down => (0, "Down"),
            State::Ring => (4, "Ring"),
            State::Up => (6, "Up"),
        };
        // Before the call is up nobody is connected, and an outgoing channel has neither number nor extension.
        let (number, peer, extension) = match (state, side) {
            (State::Up, _) => (number, peer, extension),
            (_, Side::Caller) => (number, "<unknown>", extension),
            (_, Side::Callee) => ("<unknown>", "<unknown>", "s"),
        };
        message
            .with("Channel", &channel.name)
            .with("ChannelState", code)
            .with("ChannelStateDesc", description)
            .with("CallerIDNum", number)
            .with("CallerIDName", "<unknown>")
            .with("ConnectedLineNum", peer)
            .with("ConnectedLineName", "<unknown>")
            .with("Language", "en")
            .with("AccountCode", "")
            .with("Context", "lab")
            .with("Exten", extension)
            .with("Priority", 1)
            .with("Uniqueid", &channel.unique_id)
            .with("Linkedid", &self.caller.unique_id)
    }

    fn bridge(&self, message: Message, technology: Technology, channels: u8) -> Message {
        message
            .with("BridgeUniqueid", &self.bridge_id)
            .with("BridgeType", "basic")
            .with("BridgeTechnology", technology.name())
            .with("BridgeCreator", "<unknown>")
            .with("BridgeName", "<unknown>")
            .with("BridgeNumChannels", channels)
            .with("BridgeVideoSourceMode", "none")
    }

    fn variable_set(&self, side: Side, name: &str, value: &str) -> Message {
        self.snapshot(Message::event("VarSet", "dialplan"), side, State::Up)
            .with("Variable", name)
            .with("Value", value)
    }

    /// What Asterisk emits at every change of the bridge's technology and every re-INVITE.
    pub(super) fn burst(&self) -> Vec<Message> {
        [(Side::Caller, Side::Callee), (Side::Callee, Side::Caller)]
            .into_iter()
            .flat_map(|(side, peer)| {
                [
                    self.variable_set(side, "BRIDGEPEER", &self.channel(peer).name),
                    self.variable_set(side, "BRIDGEPVTCALLID", &self.channel(peer).sip_call_id),
                ]
            })
            .collect()
    }

    /// From the INVITE to both channels in the bridge, which still is a `simple_bridge` then.
    pub(super) fn start(&self) -> Vec<Message> {
        let create = |side, state| self.snapshot(Message::event("Newchannel", "call"), side, state);
        let enter = |side, channels| {
            let bridge = self.bridge(
                Message::event("BridgeEnter", "call"),
                Technology::Simple,
                channels,
            );
            self.snapshot(bridge, side, State::Up)
        };
        let mut messages = vec![
            create(Side::Caller, State::Ring),
            create(Side::Callee, State::Down),
            self.bridge(
                Message::event("BridgeCreate", "call"),
                Technology::Simple,
                0,
            ),
            enter(Side::Callee, 1),
            enter(Side::Caller, 2),
        ];
        messages.extend(self.burst());
        messages
    }

    /// From the caller's BYE to nothing left.
    pub(super) fn end(&self) -> Vec<Message> {
        let technology = self.technology();
        let on_caller = |name| {
            self.snapshot(Message::event(name, "call"), Side::Caller, State::Up)
                .with("Cause", 16)
        };
        let leave = |side, channels| {
            let bridge = self.bridge(Message::event("BridgeLeave", "call"), technology, channels);
            self.snapshot(bridge, side, State::Up)
        };
        let hangup = |side| {
            self.snapshot(Message::event("Hangup", "call"), side, State::Up)
                .with("Cause", 16)
                .with("Cause-txt", "Normal Clearing")
        };
        let mut messages = vec![on_caller("HangupRequest")];
        for side in [Side::Caller, Side::Callee] {
            messages.extend(
                ["BRIDGEPEER", "BRIDGEPVTCALLID"].map(|name| self.variable_set(side, name, "")),
            );
        }
        messages.extend([
            leave(Side::Caller, 1),
            on_caller("SoftHangupRequest"),
            leave(Side::Callee, 0),
            hangup(Side::Caller),
            self.bridge(Message::event("BridgeDestroy", "call"), technology, 0),
            hangup(Side::Callee),
        ]);
        messages
    }

    /// The caller's re-INVITE with `a=sendonly`: the technology stays.
    pub(super) fn hold(&self) -> Vec<Message> {
        let event = |name, side| self.snapshot(Message::event(name, "call"), side, State::Up);
        let mut messages = vec![event("Hold", Side::Caller).with("MusicClass", "default")];
        messages.extend(self.burst());
        messages.push(event("MusicOnHoldStart", Side::Callee).with("Class", "default"));
        messages
    }

    /// The caller's re-INVITE with `a=sendrecv`.
    pub(super) fn unhold(&self) -> Vec<Message> {
        let event = |name, side| self.snapshot(Message::event(name, "call"), side, State::Up);
        let mut messages = self.burst();
        messages.push(event("Unhold", Side::Caller));
        messages.push(event("MusicOnHoldStop", Side::Callee));
        messages
    }

    /// The item of `BridgeList`.
    pub(super) fn bridge_item(&self, action_id: Option<&str>) -> Message {
        self.bridge(
            Message::item("BridgeListItem", action_id),
            self.technology(),
            2,
        )
    }

    /// The items of `BridgeInfo`, its end included.
    pub(super) fn bridge_info(&self, action_id: Option<&str>) -> Vec<Message> {
        let item = |side| {
            self.snapshot(
                Message::item("BridgeInfoChannel", action_id),
                side,
                State::Up,
            )
        };
        let end = Message::item("BridgeInfoComplete", action_id)
            .with("EventList", "Complete")
            .with("ListItems", 2);
        vec![
            item(Side::Caller),
            item(Side::Callee),
            self.bridge(end, self.technology(), 2),
        ]
    }

    /// The item of `Status` for one channel.
    pub(super) fn status_item(
        &self,
        side: Side,
        variables: &[&str],
        action_id: Option<&str>,
    ) -> Message {
        let (dnid, peer, application, data) = match side {
            Side::Caller => (
                "2000",
                "2000",
                "Dial",
                "PJSIP/callee/sip:2000@192.0.2.12:5060,30",
            ),
            Side::Callee => ("", "caller", "AppDial", "(Outgoing Line)"),
        };
        let event = Message {
            text: "Event: Status\r\nPrivilege: Call\r\n".to_owned(),
        };
        let mut message = self
            .snapshot(event, side, State::Up)
            .with("Type", "PJSIP")
            .with("DNID", dnid)
            .with("EffectiveConnectedLineNum", peer)
            .with("EffectiveConnectedLineName", "<unknown>")
            .with("TimeToHangup", 0)
            .with("BridgeID", &self.bridge_id)
            .with("Application", application)
            .with("Data", data)
            .with("Nativeformats", "(ulaw)")
            .with("Readformat", "ulaw")
            .with("Readtrans", "")
            .with("Writeformat", "ulaw")
            .with("Writetrans", "")
            .with("Callgroup", 0)
            .with("Pickupgroup", 0)
            .with("Seconds", self.started.elapsed().as_secs());
        for name in variables {
            let value = self.channel(side).variable(name);
            message = message.with("Variable", format_args!("{name}={value}"));
        }
        message.with_action_id(action_id)
    }
}

impl Channel {
    /// A channel variable or dialplan function; empty when unknown, as in Asterisk.
    pub(super) fn variable(&self, name: &str) -> String {
        match name {
            "CHANNEL(rtp,src)" => self.local.to_string(),
            "CHANNEL(rtp,dest)" => self.remote.to_string(),
            "CHANNEL(rtp,direct)" => "(null)".to_owned(),
            "CHANNEL(rtp,secure)" => "0".to_owned(),
            "CHANNEL(rtp,hold)" => u8::from(self.held.load(Ordering::Relaxed)).to_string(),
            "CHANNEL(audioreadformat)" | "CHANNEL(audiowriteformat)" => "ulaw".to_owned(),
            "CHANNEL(audionativeformat)" => "(ulaw)".to_owned(),
            "CHANNEL(videonativeformat)" => "(nothing)".to_owned(),
            "CHANNEL(rtcp,rxcount)" => self.received.load(Ordering::Relaxed).to_string(),
            "CHANNEL(channeltype)" => "PJSIP".to_owned(),
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(
        name: &str,
        unique_id: &str,
        sip_call_id: &str,
        local: &str,
        remote: &str,
    ) -> Channel {
        Channel {
            name: name.to_owned(),
            unique_id: unique_id.to_owned(),
            sip_call_id: sip_call_id.to_owned(),
            local: local.parse().expect("address"),
            remote: remote.parse().expect("address"),
            held: AtomicBool::default(),
            received: AtomicU64::default(),
            forwarded: AtomicU64::default(),
        }
    }

    /// The call of `recordings/call.raw`.
    fn call() -> Call {
        let caller = (
            "PJSIP/caller-00000008",
            "1795216900.8",
            "51c20df6-f999-4865-94b9-b294974c9670",
        );
        let callee = (
            "PJSIP/callee-00000009",
            "1795216900.9",
            "c87bc916-f99e-4df0-8e65-f71150730702",
        );
        Call {
            bridge_id: "81b8987e-539d-4d3a-9db8-ba9120bd17c9".to_owned(),
            caller: channel(
                caller.0,
                caller.1,
                caller.2,
                "192.0.2.1:13644",
                "192.0.2.11:31912",
            ),
            callee: channel(
                callee.0,
                callee.1,
                callee.2,
                "192.0.2.1:18758",
                "192.0.2.12:38346",
            ),
            native: AtomicBool::new(true),
            transcoded: AtomicBool::new(false),
            started: Instant::now(),
        }
    }

    /// The call of `recordings/hold.raw`.
    fn held_call() -> Call {
        let caller = (
            "PJSIP/caller-00000002",
            "1795216691.2",
            "dd35310b-1c42-4884-a568-f0de9b6e4d7a",
        );
        let callee = (
            "PJSIP/callee-00000003",
            "1795216691.3",
            "f7c87a9f-6575-4acb-818c-c2c76b9c9404",
        );
        Call {
            bridge_id: "ec93475a-e1c6-4cd8-85e8-3caa3f985442".to_owned(),
            caller: channel(
                caller.0,
                caller.1,
                caller.2,
                "192.0.2.1:12730",
                "192.0.2.11:32462",
            ),
            callee: channel(
                callee.0,
                callee.1,
                callee.2,
                "192.0.2.1:17722",
                "192.0.2.12:39180",
            ),
            ..call()
        }
    }

    /// Every message is in the recording, after the one before it.
    fn assert_recorded(recording: &[u8], messages: &[Message]) {
        let recording = std::str::from_utf8(recording).expect("ASCII");
        let mut at = 0;
        for message in messages {
            let text = String::from_utf8(message.segments().concat()).expect("ASCII");
            // A message begins after the end of another.
            let found = recording[at..].find(&format!("\r\n\r\n{text}"));
            at +=
                found.unwrap_or_else(|| panic!("not recorded, or not here:\n{text}")) + text.len();
        }
    }

    const CALL: &[u8] = include_bytes!("../../recordings/call.raw");
    const HOLD: &[u8] = include_bytes!("../../recordings/hold.raw");

    #[test]
    fn a_call_reads_as_recorded() {
        let mut messages = call().start();
        messages.extend(call().burst());
        assert_recorded(CALL, &messages);
        assert_recorded(CALL, &call().end());
        assert_recorded(HOLD, &held_call().hold());
        assert_recorded(HOLD, &held_call().unhold());
    }

    #[test]
    fn queries_read_as_recorded() {
        assert_recorded(CALL, &[call().bridge_item(Some("a2"))]);
        assert_recorded(HOLD, &held_call().bridge_info(Some("a105")));
        let status = |call: Call, side, variables: &[&str], id| {
            let message = call.status_item(side, variables, Some(id));
            let seconds = if id == "a3" {
                "Seconds: 3"
            } else {
                "Seconds: 2"
            };
            Message {
                text: message.text.replace("Seconds: 0", seconds),
            }
        };
        let callee = status(call(), Side::Callee, &[], "a3");
        let caller = status(call(), Side::Caller, &[], "a3");
        assert_recorded(CALL, &[callee, caller]);
        let variables = ["CHANNEL(rtp,src)", "CHANNEL(rtp,dest)"];
        assert_recorded(
            HOLD,
            &[status(held_call(), Side::Callee, &variables, "a108")],
        );
    }

    #[test]
    fn variables_read_as_recorded() {
        let recording = std::str::from_utf8(CALL).expect("ASCII");
        for name in [
            "CHANNEL(rtp,src)",
            "CHANNEL(rtp,dest)",
            "CHANNEL(rtp,secure)",
            "CHANNEL(rtp,hold)",
            "CHANNEL(audioreadformat)",
            "CHANNEL(audiowriteformat)",
            "CHANNEL(audionativeformat)",
            "CHANNEL(videonativeformat)",
            "CHANNEL(channeltype)",
        ] {
            let value = call().callee.variable(name);
            assert!(
                recording.contains(&format!("Variable: {name}\r\nValue: {value}\r\n\r\n")),
                "{name}={value}"
            );
        }
    }
}
