//! What may be offloaded: every condition that signalling can answer for, in one place.
//!
//! An answer that is missing, unknown or odd is a refusal, never a guess: the call then stays with
//! Asterisk.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    message::Message,
    session::{Answer, PRIVILEGES},
    tracker::MAX_NAME,
};
use crate::pair::{Leg, Pair, PairError, PayloadTypes, Proof};

const SRC: &str = "CHANNEL(rtp,src)";
const DEST: &str = "CHANNEL(rtp,dest)";
const DIRECT: &str = "CHANNEL(rtp,direct)";
const SECURE: &str = "CHANNEL(rtp,secure)";
const HOLD: &str = "CHANNEL(rtp,hold)";
const READ: &str = "CHANNEL(audioreadformat)";
const WRITE: &str = "CHANNEL(audiowriteformat)";
const NATIVE: &str = "CHANNEL(audionativeformat)";
const VIDEO: &str = "CHANNEL(videonativeformat)";
const RECEIVED: &str = "CHANNEL(rtcp,rxcount)";

/// What a `Status` must evaluate to judge a leg: only what Asterisk reads from the channel itself.
///
/// Never an item of `rtp` or `rtcp`: `Status` keeps the channel locked while it evaluates
/// (action_status in main/manager.c of Asterisk 22), those two wait for the call's SIP thread
/// (pjsip_acf_channel_read), and that thread may be waiting for the channel, as when the phone hangs
/// up. Then all of Asterisk stands still for good. `Getvar` locks nothing.
pub const STATUS_VARIABLES: &str = "CHANNEL(audioreadformat),CHANNEL(audiowriteformat),CHANNEL(audionativeformat),\
    CHANNEL(videonativeformat)";
/// What must be asked by `Getvar` to judge a leg.
const LEG_ITEMS: [&str; 6] = [SRC, DEST, DIRECT, SECURE, HOLD, RECEIVED];
/// The same with proof. What never comes, or leaves encrypted anew, is never proven: direct media and
/// encryption only explain why. What the phone sends is seen on the wire.
const PROVEN_LEG_ITEMS: [&str; 3] = [SRC, DEST, HOLD];
/// The same where the explanation was asked for before.
const EXPLAINED_LEG_ITEMS: [&str; 5] = [SRC, DEST, DIRECT, SECURE, HOLD];
/// What must be asked by `Getvar` to see that an offered leg is still where it was: the one thing
/// that changes without an event. Another codec, direct media or encryption comes by re-INVITE or
/// with another bridge technology; both raise events.
const POLL_ITEMS: [&str; 1] = [DEST];
/// The first poll of a call that was offered without what only explains: it asks for that too.
const EXPLAINING_POLL_ITEMS: [&str; 3] = [DEST, DIRECT, SECURE];

/// What a round asks of each leg by `Getvar`. `full`: every condition, not only whether an offer
/// still stands. `explained`: with proof, what only explains was asked for before.
pub fn items(full: bool, proven: bool, explained: bool) -> &'static [&'static str] {
    match (full, proven, explained) {
        (true, false, _) => &LEG_ITEMS,
        (true, true, false) => &PROVEN_LEG_ITEMS,
        (true, true, true) => &EXPLAINED_LEG_ITEMS,
        (false, true, false) => &EXPLAINING_POLL_ITEMS,
        (false, ..) => &POLL_ITEMS,
    }
}

/// Whether among these [`items`] is what [`relayed_in_clear`] judges.
pub(super) fn explains(items: &[&str]) -> bool {
    items.contains(&DIRECT) && items.contains(&SECURE)
}

/// Asterisk's names of the codecs with one static payload type, RFC 3551 table 4. Left out are
/// names that stand for several numbers there (adpcm: DVI4 at four rates; slin: L16) and numbers
/// that RFC 3551 took back (2, G726-32).
const STATIC_PAYLOAD_TYPES: [(&str, u8); 7] = [
    ("ulaw", 0),
    ("gsm", 3),
    ("g723", 4),
    ("lpc10", 7),
    ("alaw", 8),
    ("g722", 9),
    ("g729", 18),
];

/// Why a call is not offloaded, in words for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A conference, or a call with one end.
    #[error("channels in the bridge: {0}; a pair is two")]
    ChannelCount(usize),
    /// Asterisk bridges in another way, because it has to look at the media.
    #[error(
        "bridge technology {0}: Asterisk handles the media itself, as for a recording, a jitter buffer or DTMF features (t, T)"
    )]
    Technology(String),
    /// Another channel driver.
    #[error("{0} is not a PJSIP channel")]
    NotPjsip(String),
    /// The bridge and the channel disagree: something is moving.
    #[error("{0} is not in this bridge any more")]
    Moved(String),
    /// On hold by `Hold` event or by `rtp,hold`.
    #[error("{0} is on hold")]
    OnHold(String),
    /// SRTP or DTLS.
    #[error("{0} has encrypted media (SRTP)")]
    Encrypted(String),
    /// The phones send to each other.
    #[error("{channel} has direct media with {peer}: Asterisk relays nothing")]
    DirectMedia {
        /// The channel.
        channel: String,
        /// Where its phone sends to.
        peer: String,
    },
    /// No remote address yet, or none during hold.
    #[error("{0} has no remote RTP address")]
    NoRemote(String),
    /// RTP bound to the wildcard address.
    #[error(
        "Asterisk names no local address for {channel}, only {local}; set bind_rtp_to_media_address and media_address in pjsip.conf"
    )]
    WildcardLocal {
        /// The channel.
        channel: String,
        /// What it names.
        local: SocketAddr,
    },
    /// A translator between the leg's own formats.
    #[error("transcoding {from}→{to} at {channel}")]
    Transcoding {
        /// The channel.
        channel: String,
        /// What the bridge writes or the phone sends.
        from: String,
        /// What it becomes.
        to: String,
    },
    /// The legs do not speak the same codec.
    #[error("transcoding {0}→{1}")]
    DifferentCodecs(String, String),
    /// Any of several codecs may come at any time.
    #[error("{channel} may use any of {formats}; a pair needs one codec")]
    SeveralCodecs {
        /// The channel.
        channel: String,
        /// As Asterisk lists them.
        formats: String,
    },
    /// Without proof nobody sees on the wire which dynamic payload type it has.
    #[error("codec {0} has no static payload type")]
    NoStaticPayloadType(String),
    /// A video stream is really negotiated.
    #[error("{channel} has video ({formats})")]
    Video {
        /// The channel.
        channel: String,
        /// As Asterisk lists them.
        formats: String,
    },
    /// Nothing came from the phone yet.
    #[error("no RTP from {0} yet")]
    NothingReceived(String),
    /// Asterisk left a value out, or wrote something unknown.
    #[error("{item} of {channel} is {value}, which is not understood")]
    Odd {
        /// The item asked for.
        item: &'static str,
        /// The channel or bridge.
        channel: String,
        /// What came instead.
        value: String,
    },
    /// The legs do not make a pair.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// The user may not ask.
    #[error("the AMI user may not run {0}: give it {PRIVILEGES} in manager.conf")]
    Privileges(&'static str),
    /// The events that say when to take back do not come.
    #[error(
        "Asterisk sends no VarSet events, so a change of the call would go unseen: give the AMI user {PRIVILEGES} and no eventfilter that drops VarSet in manager.conf"
    )]
    NoVarSet,
    /// Asterisk refused to answer for another reason.
    #[error("Asterisk does not answer {action}: {message}")]
    NoAnswer {
        /// The action.
        action: &'static str,
        /// Asterisk's words.
        message: String,
    },
    /// The tracker's bound.
    #[error("more than {0} bridges at a time; this call stays with the PBX")]
    TooManyBridges(usize),
}

impl Refusal {
    /// For programs and counters: says which rule, not who broke it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ChannelCount(_) => "channel_count",
            Self::Technology(_) => "technology",
            Self::NotPjsip(_) => "not_pjsip",
            Self::Moved(_) => "moved",
            Self::OnHold(_) => "on_hold",
            Self::Encrypted(_) => "encrypted",
            Self::DirectMedia { .. } => "direct_media",
            Self::NoRemote(_) => "no_remote",
            Self::WildcardLocal { .. } => "wildcard_local",
            Self::Transcoding { .. } | Self::DifferentCodecs(..) => "transcoding",
            Self::SeveralCodecs { .. } => "several_codecs",
            Self::NoStaticPayloadType(_) => "no_static_payload_type",
            Self::Video { .. } => "video",
            Self::NothingReceived(_) => "nothing_received",
            Self::Odd { .. } => "not_understood",
            Self::Pair(_) => "invalid_pair",
            Self::Privileges(_) | Self::NoVarSet => "privileges",
            Self::NoAnswer { .. } => "no_answer",
            Self::TooManyBridges(_) => "too_many_bridges",
        }
    }

    /// Whether Asterisk cannot bridge natively for this reason.
    pub const fn explains_technology(&self) -> bool {
        matches!(
            self,
            Self::OnHold(_)
                | Self::Encrypted(_)
                | Self::Transcoding { .. }
                | Self::DifferentCodecs(..)
                | Self::Video { .. }
        )
    }

    /// Whether the condition is expected to come true by itself within a moment, so that asking
    /// again soon is worth it.
    pub fn is_not_yet(&self) -> bool {
        matches!(
            self,
            Self::Technology(_) | Self::NothingReceived(_) | Self::Moved(_) | Self::NoAnswer { .. }
        )
    }
}

/// That a proof on the wire follows each offer, and so tells what signalling need not: the payload
/// types, and the address that a wildcard stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proving {
    /// Addresses of the attached interface. The first of a phone's family stands in for the wildcard
    /// until the wire shows the right one.
    pub own_addresses: Vec<IpAddr>,
}

/// A leg that fulfils every condition of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegFacts {
    /// Its addresses.
    pub leg: Leg,
    /// Its one codec, in Asterisk's words.
    pub codec: String,
}

/// Judges the answer to `BridgeInfo`: two PJSIP channels under native_rtp. Returns them sorted, so
/// that the same call has the same first leg every time.
pub(super) fn bridge(call: &str, answer: &Answer) -> Result<[String; 2], Refusal> {
    succeeded("BridgeInfo", answer)?;
    let Some(complete) = answer.items.last() else {
        return Err(Refusal::Odd {
            item: "BridgeInfo",
            channel: call.to_owned(),
            value: "empty".to_owned(),
        });
    };
    let mut channels = channels(answer);
    let count = complete
        .get("BridgeNumChannels")
        .and_then(|count| count.parse().ok());
    // Internal channels (a conference's announcer) are counted but not listed.
    let [first, second] = match count {
        Some(2) if channels.len() == 2 => {
            channels.sort_unstable();
            [channels[0], channels[1]]
        }
        Some(2) | None => return Err(Refusal::ChannelCount(channels.len())),
        Some(count) => return Err(Refusal::ChannelCount(count)),
    };
    for channel in [first, second] {
        if !channel.starts_with("PJSIP/") || channel.len() > MAX_NAME {
            return Err(Refusal::NotPjsip(shown(channel)));
        }
    }
    match complete.get("BridgeTechnology") {
        Some("native_rtp") => Ok([first.to_owned(), second.to_owned()]),
        technology => Err(Refusal::Technology(shown(technology.unwrap_or("unknown")))),
    }
}

/// The channels listed by `BridgeInfo`.
pub(super) fn channels(answer: &Answer) -> Vec<&str> {
    answer
        .items
        .iter()
        .filter(|item| item.event() == Some("BridgeInfoChannel"))
        .filter_map(|item| item.get("Channel"))
        .collect()
}

/// The answers about one channel.
#[derive(Debug, Default)]
pub(super) struct LegAnswers {
    /// To `Status` with [`STATUS_VARIABLES`].
    pub(super) status: Option<Answer>,
    /// To `Getvar`, by item.
    pub(super) items: Vec<(&'static str, Answer)>,
}

/// The endpoint that a PJSIP channel belongs to. `None` where the name would not survive as an
/// argument of a function.
pub(super) fn endpoint(channel: &str) -> Option<&str> {
    let (endpoint, _) = channel.strip_prefix("PJSIP/")?.rsplit_once('-')?;
    (!endpoint.is_empty() && !endpoint.contains([',', '(', ')', '"', '\\'])).then_some(endpoint)
}

/// The function that tells an endpoint's `rtp_timeout`.
pub(super) fn rtp_timeout_of(endpoint: &str) -> String {
    format!("PJSIP_ENDPOINT({endpoint},rtp_timeout)")
}

/// Judges all answers about one channel, which was asked for these [`items`].
pub(super) fn leg(
    call: &str,
    channel: &str,
    asked: &[&str],
    answers: &LegAnswers,
    proving: Option<&Proving>,
) -> Result<LegFacts, Refusal> {
    let status = status(call, channel, answers.status.as_ref())?;
    let item = |item| value(answers, channel, item);
    let format = |item| present(channel, item, status.variable(item));
    let name = || channel.to_owned();

    if flag(channel, HOLD, item(HOLD)?)? {
        return Err(Refusal::OnHold(name()));
    }
    if explains(asked) {
        relayed_in_clear(channel, answers)?;
    }
    let codec = codec(channel, format(READ)?, format(WRITE)?, format(NATIVE)?)?;
    match format(VIDEO)? {
        "(nothing)" => {}
        formats => {
            return Err(Refusal::Video {
                channel: name(),
                formats: shown(formats),
            });
        }
    }
    let remote = remote(channel, item(DEST)?)?;
    let mut local = address(channel, SRC, item(SRC)?)?;
    if local.ip().is_unspecified() {
        // A socket bound to `::` serves IPv4 phones too: the phone's family is the one that counts.
        let own = proving.and_then(|proving| {
            let mut own = proving.own_addresses.iter();
            own.find(|own| own.is_ipv4() == remote.is_ipv4())
        });
        let own = own.ok_or_else(|| Refusal::WildcardLocal {
            channel: name(),
            local,
        })?;
        local.set_ip(*own);
    }
    if asked.contains(&RECEIVED) {
        match item(RECEIVED)?.parse::<u64>() {
            Ok(0) => return Err(Refusal::NothingReceived(name())),
            Ok(_) => {}
            Err(_) => return Err(odd(channel, RECEIVED, item(RECEIVED)?)),
        }
    }
    Ok(LegFacts {
        leg: Leg::new(local, remote),
        codec,
    })
}

/// Judges what only explains where a proof follows: encryption and direct media.
pub(super) fn relayed_in_clear(channel: &str, answers: &LegAnswers) -> Result<(), Refusal> {
    if flag(channel, SECURE, value(answers, channel, SECURE)?)? {
        return Err(Refusal::Encrypted(channel.to_owned()));
    }
    match value(answers, channel, DIRECT)? {
        "(null)" => Ok(()),
        peer => Err(Refusal::DirectMedia {
            channel: channel.to_owned(),
            peer: shown(peer),
        }),
    }
}

/// Never a reason to refuse: a user, a module or an endpoint that cannot be asked leaves it unknown.
pub(super) fn rtp_timeout(answer: Option<Answer>) -> Option<Duration> {
    let answer = answer.filter(Answer::is_success)?;
    let seconds: u32 = answer.response.get("Value")?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

/// Joins two legs that fulfil their own conditions. With a proof to come, the wire tells the payload
/// types, and none are named.
pub(super) fn pair(first: &LegFacts, second: &LegFacts, proven: bool) -> Result<Pair, Refusal> {
    if first.codec != second.codec {
        return Err(Refusal::DifferentCodecs(
            first.codec.clone(),
            second.codec.clone(),
        ));
    }
    let payload_types = if proven {
        Vec::new()
    } else {
        let number = STATIC_PAYLOAD_TYPES
            .iter()
            .find(|(name, _)| *name == first.codec)
            .map(|(_, number)| *number)
            .ok_or_else(|| Refusal::NoStaticPayloadType(shown(&first.codec)))?;
        vec![PayloadTypes::same(number)]
    };
    let proof = if proven { Proof::Wire } else { Proof::None };
    Ok(Pair::new([first.leg, second.leg], payload_types, proof)?)
}

/// Judges the answers to a poll of an offered leg: is it still where it was?
pub(super) fn unmoved(
    channel: &str,
    offered: &LegFacts,
    answers: &LegAnswers,
) -> Result<(), Refusal> {
    let remote = remote(channel, value(answers, channel, DEST)?)?;
    if remote != offered.leg.remote {
        return Err(odd(
            channel,
            DEST,
            &format!("{remote} where it was {}", offered.leg.remote),
        ));
    }
    Ok(())
}

fn remote(channel: &str, text: &str) -> Result<SocketAddr, Refusal> {
    match text {
        "(null)" => Err(Refusal::NoRemote(channel.to_owned())),
        text => address(channel, DEST, text),
    }
}

fn succeeded(action: &'static str, answer: &Answer) -> Result<(), Refusal> {
    if answer.is_permission_denied() {
        Err(Refusal::Privileges(action))
    } else if answer.is_success() {
        Ok(())
    } else {
        Err(Refusal::NoAnswer {
            action,
            message: shown(answer.message()),
        })
    }
}

/// The one `Status` event of a channel that is a PJSIP channel of this bridge.
fn status<'a>(
    call: &str,
    channel: &str,
    answer: Option<&'a Answer>,
) -> Result<&'a Message, Refusal> {
    let answer = answer.ok_or_else(|| unasked("Status"))?;
    succeeded("Status", answer)?;
    let status = answer
        .items
        .iter()
        .find(|item| item.event() == Some("Status") && item.get("Channel") == Some(channel))
        .ok_or_else(|| Refusal::Moved(channel.to_owned()))?;
    if status.get("BridgeID") != Some(call) {
        return Err(Refusal::Moved(channel.to_owned()));
    }
    if status.get("Type") != Some("PJSIP") {
        return Err(Refusal::NotPjsip(channel.to_owned()));
    }
    Ok(status)
}

/// The value that `Getvar` gave.
fn value<'a>(
    answers: &'a LegAnswers,
    channel: &str,
    item: &'static str,
) -> Result<&'a str, Refusal> {
    let answer = answers.items.iter().find(|(asked, _)| *asked == item);
    let (_, answer) = answer.ok_or_else(|| unasked("Getvar"))?;
    succeeded("Getvar", answer)?;
    present(channel, item, answer.response.get("Value"))
}

fn present<'a>(
    channel: &str,
    item: &'static str,
    value: Option<&'a str>,
) -> Result<&'a str, Refusal> {
    match value {
        Some("") => Err(odd(channel, item, "empty")),
        None => Err(odd(channel, item, "missing")),
        Some(value) => Ok(value),
    }
}

/// The question could not be put into words that AMI carries.
pub(super) fn unasked(action: &'static str) -> Refusal {
    Refusal::NoAnswer {
        action,
        message: "it could not be asked".to_owned(),
    }
}

fn flag(channel: &str, item: &'static str, value: &str) -> Result<bool, Refusal> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        other => Err(odd(channel, item, other)),
    }
}

fn address(channel: &str, item: &'static str, text: &str) -> Result<SocketAddr, Refusal> {
    let address: SocketAddr = text.parse().map_err(|_| odd(channel, item, text))?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// The one codec that is read, written and native. `audionativeformat` lists: `(ulaw)`,
/// `(ulaw|alaw)`, `(nothing)`.
fn codec(channel: &str, read: &str, write: &str, native: &str) -> Result<String, Refusal> {
    let listed = native
        .strip_prefix('(')
        .and_then(|list| list.strip_suffix(')'));
    let one = match listed {
        None | Some("" | "nothing") => return Err(odd(channel, NATIVE, native)),
        Some(list) if list.contains(['|', ',', ' ']) => {
            return Err(Refusal::SeveralCodecs {
                channel: channel.to_owned(),
                formats: shown(native),
            });
        }
        Some(one) => one,
    };
    let transcoding = |from: &str, to: &str| Refusal::Transcoding {
        channel: channel.to_owned(),
        from: shown(from),
        to: shown(to),
    };
    if read != one {
        return Err(transcoding(one, read));
    }
    if write != one {
        return Err(transcoding(write, one));
    }
    Ok(one.to_owned())
}

fn odd(channel: &str, item: &'static str, value: &str) -> Refusal {
    Refusal::Odd {
        item,
        channel: channel.to_owned(),
        value: shown(value),
    }
}

/// At most 80 characters, so that no cause grows with what a server sends.
fn shown(text: &str) -> String {
    text.chars().take(80).filter(|c| !c.is_control()).collect()
}
