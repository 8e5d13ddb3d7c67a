//! What may be offloaded: every condition that signalling can answer for, in one place.
//!
//! An answer that is missing, unknown or odd is a refusal, never a guess: the call then stays with
//! Asterisk.

use std::{
    fmt,
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
/// What `Getvar` adds to a `Status` to tell why Asterisk itself handles the media.
pub(super) const TECHNOLOGY_ITEMS: [&str; 1] = [SECURE];

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
    #[error("bridge technology {0}{words}", words = handling(.0))]
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
        /// The leg.
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
        /// The leg.
        channel: String,
        /// What it names.
        local: SocketAddr,
    },
    /// A translator between the leg's own formats.
    #[error("transcoding {from}→{to} at {channel}")]
    Transcoding {
        /// The leg.
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
        /// The leg.
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
        /// The leg.
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

/// What a bridge's technology does with the media, after its name.
fn handling(technology: &str) -> &'static str {
    match technology {
        "simple_bridge" => {
            ": Asterisk itself handles the media, as for recording, a jitter buffer, DTMF features (t, T), \
             VOLUME, TALK_DETECT, or legs that differ in DTMF mode or packet length"
        }
        "softmix" => ": Asterisk mixes the media, as for a conference",
        _ => "; only native_rtp forwards media unchanged",
    }
}

/// One of a call's two channels: which leg it is, and its name.
#[derive(Clone, Copy, Debug)]
pub(super) struct LegName<'a> {
    /// 0 or 1, in the order of the sorted names.
    pub(super) index: usize,
    /// As Asterisk writes it.
    pub(super) channel: &'a str,
}

impl fmt::Display for LegName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = if self.index == 0 { 'A' } else { 'B' };
        write!(f, "leg {letter} ({})", self.channel)
    }
}

/// Both legs of a call, by name.
pub(super) fn legs(channels: &[String; 2]) -> [LegName<'_>; 2] {
    [0, 1].map(|index| LegName {
        index,
        channel: &channels[index],
    })
}

/// A bridge of two PJSIP channels.
#[derive(Debug)]
pub(super) struct Bridged {
    /// Sorted, so that the same call has the same first leg every time.
    pub(super) channels: [String; 2],
    /// How Asterisk bridges them, if it is not by native_rtp.
    pub(super) other_technology: Option<String>,
}

/// Judges the answer to `BridgeInfo`: two PJSIP channels.
pub(super) fn bridge(call: &str, answer: &Answer) -> Result<Bridged, Refusal> {
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
    let technology = complete.get("BridgeTechnology").unwrap_or("unknown");
    Ok(Bridged {
        channels: [first.to_owned(), second.to_owned()],
        other_technology: (technology != "native_rtp").then(|| shown(technology)),
    })
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
pub(crate) fn endpoint(channel: &str) -> Option<&str> {
    let (endpoint, _) = channel.strip_prefix("PJSIP/")?.rsplit_once('-')?;
    is_argument(endpoint).then_some(endpoint)
}

/// Whether a name survives as an argument of a function.
pub(crate) fn is_argument(name: &str) -> bool {
    !name.is_empty() && !name.contains([',', '(', ')', '"', '\\'])
}

/// The function that tells an endpoint's `rtp_timeout`.
pub(crate) fn rtp_timeout_of(endpoint: &str) -> String {
    format!("PJSIP_ENDPOINT({endpoint},rtp_timeout)")
}

/// The function that tells an endpoint's `direct_media`.
pub(crate) fn direct_media_of(endpoint: &str) -> String {
    format!("PJSIP_ENDPOINT({endpoint},direct_media)")
}

/// Judges all answers about one channel, which was asked for these [`items`].
pub(super) fn leg(
    call: &str,
    name: LegName<'_>,
    asked: &[&str],
    answers: &LegAnswers,
    proving: Option<&Proving>,
) -> Result<LegFacts, Refusal> {
    let status = status(call, name, answers.status.as_ref())?;
    let item = |item| value(answers, name, item);

    if flag(name, HOLD, item(HOLD)?)? {
        return Err(Refusal::OnHold(name.to_string()));
    }
    if explains(asked) {
        relayed_in_clear(name, answers)?;
    }
    let codec = codec(name, status)?;
    no_video(name, status)?;
    let remote = remote(name, item(DEST)?)?;
    let mut local = address(name, SRC, item(SRC)?)?;
    if local.ip().is_unspecified() {
        // A socket bound to `::` serves IPv4 phones too: the phone's family is the one that counts.
        let own = proving.and_then(|proving| {
            let mut own = proving.own_addresses.iter();
            own.find(|own| own.is_ipv4() == remote.is_ipv4())
        });
        let own = own.ok_or_else(|| Refusal::WildcardLocal {
            channel: name.to_string(),
            local,
        })?;
        local.set_ip(*own);
    }
    if asked.contains(&RECEIVED) {
        match item(RECEIVED)?.parse::<u64>() {
            Ok(0) => return Err(Refusal::NothingReceived(name.to_string())),
            Ok(_) => {}
            Err(_) => return Err(odd(name, RECEIVED, item(RECEIVED)?)),
        }
    }
    Ok(LegFacts {
        leg: Leg::new(local, remote),
        codec,
    })
}

/// Judges what only explains where a proof follows: encryption and direct media.
pub(super) fn relayed_in_clear(name: LegName<'_>, answers: &LegAnswers) -> Result<(), Refusal> {
    in_clear(name, answers)?;
    match value(answers, name, DIRECT)? {
        "(null)" => Ok(()),
        peer => Err(Refusal::DirectMedia {
            channel: name.to_string(),
            peer: shown(peer),
        }),
    }
}

fn in_clear(name: LegName<'_>, answers: &LegAnswers) -> Result<(), Refusal> {
    if flag(name, SECURE, value(answers, name, SECURE)?)? {
        return Err(Refusal::Encrypted(name.to_string()));
    }
    Ok(())
}

fn no_video(name: LegName<'_>, status: &Message) -> Result<(), Refusal> {
    match present(name, VIDEO, status.variable(VIDEO))? {
        "(nothing)" => Ok(()),
        formats => Err(Refusal::Video {
            channel: name.to_string(),
            formats: shown(formats),
        }),
    }
}

/// Why Asterisk itself handles the media of a call, from the answers to a `Status` and the
/// [`TECHNOLOGY_ITEMS`] of both legs. `None`: they do not tell.
pub(super) fn explanation(
    call: &str,
    channels: &[String; 2],
    answers: &[LegAnswers; 2],
) -> Option<Refusal> {
    let [a, b] = legs(channels);
    let [of_a, of_b] = answers;
    let status_a = status(call, a, of_a.status.as_ref()).ok()?;
    let status_b = status(call, b, of_b.status.as_ref()).ok()?;
    // The codecs of the two phones say more than what either leg is turned into.
    if let (Ok(first), Ok(second)) = (native(a, status_a), native(b, status_b))
        && first != second
    {
        return Some(Refusal::DifferentCodecs(shown(first), shown(second)));
    }
    // Beside what was looked for, an answer may be missing or odd, which explains nothing.
    [
        codec(a, status_a).err(),
        codec(b, status_b).err(),
        in_clear(a, of_a).err(),
        in_clear(b, of_b).err(),
        no_video(a, status_a).err(),
        no_video(b, status_b).err(),
    ]
    .into_iter()
    .flatten()
    .find(|refusal| {
        matches!(
            refusal,
            Refusal::Transcoding { .. } | Refusal::Encrypted(_) | Refusal::Video { .. }
        )
    })
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
    name: LegName<'_>,
    offered: &LegFacts,
    answers: &LegAnswers,
) -> Result<(), Refusal> {
    let remote = remote(name, value(answers, name, DEST)?)?;
    if remote != offered.leg.remote {
        return Err(odd(
            name,
            DEST,
            &format!("{remote} where it was {}", offered.leg.remote),
        ));
    }
    Ok(())
}

fn remote(name: LegName<'_>, text: &str) -> Result<SocketAddr, Refusal> {
    match text {
        "(null)" => Err(Refusal::NoRemote(name.to_string())),
        text => address(name, DEST, text),
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
    name: LegName<'_>,
    answer: Option<&'a Answer>,
) -> Result<&'a Message, Refusal> {
    let answer = answer.ok_or_else(|| unasked("Status"))?;
    succeeded("Status", answer)?;
    let status = answer
        .items
        .iter()
        .find(|item| item.event() == Some("Status") && item.get("Channel") == Some(name.channel))
        .ok_or_else(|| Refusal::Moved(name.to_string()))?;
    if status.get("BridgeID") != Some(call) {
        return Err(Refusal::Moved(name.to_string()));
    }
    if status.get("Type") != Some("PJSIP") {
        return Err(Refusal::NotPjsip(name.channel.to_owned()));
    }
    Ok(status)
}

/// The value that `Getvar` gave.
fn value<'a>(
    answers: &'a LegAnswers,
    name: LegName<'_>,
    item: &'static str,
) -> Result<&'a str, Refusal> {
    let answer = answers.items.iter().find(|(asked, _)| *asked == item);
    let (_, answer) = answer.ok_or_else(|| unasked("Getvar"))?;
    succeeded("Getvar", answer)?;
    present(name, item, answer.response.get("Value"))
}

fn present<'a>(
    name: LegName<'_>,
    item: &'static str,
    value: Option<&'a str>,
) -> Result<&'a str, Refusal> {
    match value {
        Some("") => Err(odd(name, item, "empty")),
        None => Err(odd(name, item, "missing")),
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

fn flag(name: LegName<'_>, item: &'static str, value: &str) -> Result<bool, Refusal> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        other => Err(odd(name, item, other)),
    }
}

fn address(name: LegName<'_>, item: &'static str, text: &str) -> Result<SocketAddr, Refusal> {
    let address: SocketAddr = text.parse().map_err(|_| odd(name, item, text))?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// The one codec that the phone and Asterisk agreed on. `audionativeformat` lists: `(ulaw)`,
/// `(ulaw|alaw)`, `(nothing)`.
fn native<'a>(name: LegName<'_>, status: &'a Message) -> Result<&'a str, Refusal> {
    let native = present(name, NATIVE, status.variable(NATIVE))?;
    let listed = native
        .strip_prefix('(')
        .and_then(|list| list.strip_suffix(')'));
    match listed {
        None | Some("" | "nothing") => Err(odd(name, NATIVE, native)),
        Some(list) if list.contains(['|', ',', ' ']) => Err(Refusal::SeveralCodecs {
            channel: name.to_string(),
            formats: shown(native),
        }),
        Some(one) => Ok(one),
    }
}

/// The one codec that is read, written and native.
fn codec(name: LegName<'_>, status: &Message) -> Result<String, Refusal> {
    let format = |item| present(name, item, status.variable(item));
    let (read, write, one) = (format(READ)?, format(WRITE)?, native(name, status)?);
    let transcoding = |from: &str, to: &str| Refusal::Transcoding {
        channel: name.to_string(),
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

fn odd(name: LegName<'_>, item: &'static str, value: &str) -> Refusal {
    Refusal::Odd {
        item,
        channel: name.to_string(),
        value: shown(value),
    }
}

/// At most 80 characters, so that no cause grows with what a server sends.
fn shown(text: &str) -> String {
    text.chars().take(80).filter(|c| !c.is_control()).collect()
}
