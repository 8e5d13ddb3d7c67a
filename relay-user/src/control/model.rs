//! The control API's JSON, which `--json` prints too. Its shape is stable: fields are added, never
//! renamed or removed, and `docs/api.md` shows each.
//!
//! A field that does not apply is `null`, never absent.

use std::{net::SocketAddr, path::PathBuf};

use relay_common::{reason, stream::mode};
use serde::{Deserialize, Serialize};

use super::address;
use crate::{
    clock,
    datapath::AttachMode,
    dscp::Dscp,
    pair::{Leg, Pair, PairError, PayloadTypes, Proof},
    priority::Priority,
};

/// Body of `POST /v1/pairs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// The first and the second leg.
    pub legs: [LegAddresses; 2],
    /// What is relayed where no proof is asked for; payload type 0 on both legs when absent. With
    /// proof, the wire tells.
    #[serde(default = "pcmu")]
    pub payload_types: Vec<PayloadTypes>,
    /// What the pair is offloaded on; `wire` when absent.
    #[serde(default)]
    pub proof: Proof,
    /// Priority of its packets at the queueing discipline; the daemon's when absent.
    #[serde(default)]
    pub priority: Option<Priority>,
}

/// One leg of an [`AddRequest`], as written by the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LegAddresses {
    /// Where the PBX receives RTP for this leg: `ADDRESS:PORT`, IPv6 in brackets.
    pub local: String,
    /// Where the phone sends from and receives at, written likewise.
    pub remote: String,
}

/// Most pairs in an [`AddAllRequest`].
pub const BATCH: usize = 1000;

/// Body of `POST /v1/pairs/batch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddAllRequest {
    /// At most [`BATCH`] pairs.
    pub pairs: Vec<AddRequest>,
}

/// What became of the pairs of an [`AddAllRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddAllReport {
    /// One for each pair, in the same order.
    pub results: Vec<AddResult>,
}

/// What became of one of several pairs to be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    /// Its number; none where it was refused.
    pub id: Option<u64>,
    /// Why it was refused; none where it was not.
    pub error: Option<ApiError>,
}

impl From<Result<u64, ApiError>> for AddResult {
    fn from(outcome: Result<u64, ApiError>) -> Self {
        match outcome {
            Ok(id) => Self {
                id: Some(id),
                error: None,
            },
            Err(error) => Self {
                id: None,
                error: Some(error),
            },
        }
    }
}

fn pcmu() -> Vec<PayloadTypes> {
    vec![PayloadTypes::same(0)]
}

/// Which feed a pair came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feed {
    /// The control socket.
    Api,
    /// Asterisk's manager interface.
    Ami,
}

impl Feed {
    /// As in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Ami => "ami",
        }
    }
}

/// What became of a pair as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairState {
    /// The kernel relays both streams.
    Offloaded,
    /// At least one stream is not relayed yet; its packets go to the PBX.
    Waiting,
    /// It stays with the PBX.
    Refused,
}

/// What the datapath does with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamState {
    /// Not in the table yet: its next hop is not known.
    Waiting,
    /// The PBX forwards it while the datapath collects the proof.
    Watching,
    /// The kernel relays it.
    Offloaded,
    /// The kernel has stopped relaying it.
    Suspended,
}

impl StreamState {
    /// Of a stream in the maps that is in this [`mode`].
    pub(crate) const fn of_mode(mode: u32) -> Self {
        match mode {
            mode::OFFLOADED => Self::Offloaded,
            mode::SUSPENDED => Self::Suspended,
            _ => Self::Watching,
        }
    }
}

/// How many streams there are of each [`StreamState`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamStates {
    /// In state `waiting`.
    pub waiting: u64,
    /// In state `watching`.
    pub watching: u64,
    /// In state `offloaded`.
    pub offloaded: u64,
    /// In state `suspended`.
    pub suspended: u64,
}

impl StreamStates {
    /// Counts one more.
    pub const fn count(&mut self, state: StreamState) {
        *match state {
            StreamState::Waiting => &mut self.waiting,
            StreamState::Watching => &mut self.watching,
            StreamState::Offloaded => &mut self.offloaded,
            StreamState::Suspended => &mut self.suspended,
        } += 1;
    }
}

/// A pair: what it joins, and how it fares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairReport {
    /// The pair's number, unique as long as the daemon runs.
    pub id: u64,
    /// Where the pair came from.
    pub feed: Feed,
    /// The PBX's name of the call: the bridge's id under Asterisk, none for `api`.
    pub call: Option<String>,
    /// The PBX's names of the legs, as far as known; empty for `api`. In the order of `legs`, if
    /// those are known.
    pub channels: Vec<String>,
    /// What became of it.
    pub state: PairState,
    /// Why it is not offloaded, in words; none when it is.
    pub why: Option<String>,
    /// Both legs, first and second; empty for a call refused before its addresses were known.
    pub legs: Vec<LegReport>,
    /// What it is offloaded on.
    pub proof: Proof,
    /// Priority that its packets have at the queueing discipline; none where that is left as it is.
    pub priority: Option<Priority>,
    /// What is relayed, as proven so far in either direction, or as given where no proof is asked
    /// for.
    pub payload_types: Vec<PayloadTypes>,
    /// Both streams, in the order of the legs they come in on; empty while the pair is refused or
    /// taken back.
    pub streams: Vec<StreamReport>,
}

/// One side of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegReport {
    /// Where the PBX receives RTP for this leg.
    #[serde(serialize_with = "address::serialize")]
    pub local: SocketAddr,
    /// Where the phone sends from and receives at.
    #[serde(serialize_with = "address::serialize")]
    pub remote: SocketAddr,
    /// Where the PBX sends from; differs from `local` on some hosts with several addresses.
    #[serde(serialize_with = "address::serialize")]
    pub sends_from: SocketAddr,
    /// The PBX's name of the leg, such as `PJSIP/alice-00000001`; none for `api`.
    pub channel: Option<String>,
}

/// One direction of a pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamReport {
    /// The leg it comes in on: 0 for the first, 1 for the second.
    pub leg: u8,
    /// The phone that sends it.
    #[serde(serialize_with = "address::serialize")]
    pub from: SocketAddr,
    /// The phone that gets it.
    #[serde(serialize_with = "address::serialize")]
    pub to: SocketAddr,
    /// What the datapath does with it.
    pub state: StreamState,
    /// Why it is not offloaded, in words; none when it is.
    pub why: Option<String>,
    /// The proof's progress: equal packets in a row, of those that are asked for; none where no proof
    /// is asked for.
    pub proof: Option<ProofReport>,
    /// Milliseconds since the phone's last packet; none before the first, and while it is not
    /// looked at.
    pub silent_ms: Option<u64>,
    /// Packets relayed in the kernel.
    pub packets: u64,
    /// Bytes relayed in the kernel, Ethernet header included.
    pub bytes: u64,
    /// The phone's RTP packets by the DSCP that they came with, the most frequent first.
    pub marks: Vec<MarkReport>,
    /// How the phone's packets arrive.
    pub reception: ReceptionReport,
    /// How it leaves the host; none until that is resolved.
    pub next_hop: Option<NextHopReport>,
}

/// How the RTP packets of a stream arrive from its phone, whether the kernel relays them or the PBX
/// does, since the pair was last offered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReceptionReport {
    /// Packets received, duplicates included.
    pub packets: u64,
    /// Their bytes, Ethernet header included.
    pub bytes: u64,
    /// Packets that did not arrive (RFC 3550 appendix A.3).
    pub lost: u64,
    /// Of the packets expected, percent.
    pub lost_percent: f64,
    /// Packets that had arrived before.
    pub duplicates: u64,
    /// Packets that arrived after a later one.
    pub reordered: u64,
    /// Times that the sequence numbers began anew, without a new SSRC.
    pub restarts: u64,
    /// Interarrival jitter now (RFC 3550 appendix A.8), milliseconds; none where the clock rate is
    /// not known.
    pub jitter_ms: Option<f64>,
    /// Its mean over all packets but those that begin a talkspurt; none before the second.
    pub jitter_mean_ms: Option<f64>,
    /// The highest that it was.
    pub jitter_max_ms: Option<f64>,
    /// Clock rate of the latest packet's codec, Hz; none where it is not known.
    pub clock_rate: Option<u32>,
    /// Longest time between two packets within a talkspurt, milliseconds.
    pub largest_gap_ms: f64,
    /// When the latest packet came (RFC 3339, UTC); none before the first.
    pub last_arrival: Option<String>,
    /// Synchronisation source, as eight hexadecimal digits behind `0x`; none before the first packet.
    pub ssrc: Option<String>,
    /// Times that it changed.
    pub ssrc_changes: u64,
    /// Payload type of the latest packet.
    pub payload_type: Option<u8>,
    /// Those that came, at most four.
    pub payload_types: Vec<u8>,
    /// Name of the codec, where the payload type is a static one (RFC 3551).
    pub codec: Option<String>,
    /// Packets with the marker.
    pub markers: u64,
    /// Mean opinion score, 1 to 4.5, estimated by the E-model (ITU-T G.107) from loss, mean jitter and
    /// codec; none where the codec has no published figures.
    pub mos: Option<f64>,
}

/// Packets that came with one DSCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkReport {
    /// 0–63; none for all that came when three others were known already.
    pub dscp: Option<u8>,
    /// How many, relayed or not.
    pub packets: u32,
}

/// How far the proof of a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofReport {
    /// Packets that came out of the PBX equal, in a row, of the payload type being proven.
    pub equal: u16,
    /// How many it takes.
    pub of: u8,
    /// Packets that came out of the PBX unlike any that went in, in this round of proof.
    pub unequal: u32,
}

/// How a relayed packet leaves the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextHopReport {
    /// Source MAC address, such as `02:00:00:00:00:01`; none on a link without Ethernet headers.
    pub source_mac: Option<String>,
    /// Destination MAC address; none likewise.
    pub destination_mac: Option<String>,
    /// VLAN identifiers (0–4095), the outer one first; empty when untagged.
    pub vlan: Vec<u16>,
    /// Largest IP packet that fits, in bytes.
    pub mtu: u32,
}

/// Several pairs: the answer to a list and to a flush.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairList {
    /// In the order of their numbers, or in the one asked for.
    pub pairs: Vec<PairReport>,
    /// How many there are of those asked for; `pairs` has no more than were asked for.
    pub matching: u64,
    /// When the pairs were looked at, in UTC as RFC 3339 writes it, with milliseconds.
    pub time: String,
}

impl From<Vec<PairReport>> for PairList {
    /// Of pairs as they are now.
    fn from(pairs: Vec<PairReport>) -> Self {
        let matching = pairs.len() as u64;
        let time = clock::utc_now();
        Self {
            pairs,
            matching,
            time,
        }
    }
}

/// The daemon, its interface and its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// When this was looked at, in UTC as RFC 3339 writes it, with milliseconds.
    pub time: String,
    /// Version of `relay-user`.
    pub version: String,
    /// Version of the layout shared with the kernel program.
    pub abi: u32,
    /// The daemon's process.
    pub pid: u32,
    /// Name of the interface it is attached to.
    pub interface: String,
    /// Number of that interface.
    pub ifindex: u32,
    /// Where the relay sits.
    pub mode: AttachMode,
    /// Why this mode, in words.
    pub mode_reason: String,
    /// DSCP of relayed packets, as `--dscp` takes it.
    pub dscp: Dscp,
    /// Priority of relayed packets at the queueing discipline: a class such as `1:10`, or a number, as a
    /// string; none where that is left as it is.
    pub priority: Option<Priority>,
    /// Packets in a row that prove a stream; 0 when no proof is asked for.
    pub proof: u8,
    /// Folder of the pinned maps.
    pub pins: PathBuf,
    /// Seconds since the daemon attached.
    pub uptime_seconds: u64,
    /// Size of the stream table; a pair takes two.
    pub max_streams: u32,
    /// Pairs known, of every state.
    pub pairs: u64,
    /// Streams in the table.
    pub streams: u64,
    /// Milliseconds that the lease still runs; 0 when it is over.
    pub lease_ms: u64,
    /// Pairs in state `offloaded`.
    pub offloaded: u64,
    /// Pairs in state `waiting`.
    pub waiting: u64,
    /// Pairs in state `refused`.
    pub refused: u64,
    /// Pairs that the datapath has without proof, of whatever state.
    pub unproven: u64,
    /// Streams by state. Those that wait are known, but not in the table yet.
    pub stream_states: StreamStates,
    /// Where metrics are served; none where they are not.
    pub metrics: Option<SocketAddr>,
    /// Where the page is served; none where it is not.
    pub http: Option<SocketAddr>,
    /// The AMI feed; none when the daemon runs without it.
    pub ami: Option<AmiReport>,
    /// Packets by what the datapath did with them, in the order of the reasons' numbers.
    pub reasons: Vec<ReasonReport>,
    /// Pairs and calls not taken, by cause.
    pub refusals: Vec<RefusalReport>,
}

/// Whether Asterisk can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AmiState {
    /// Logged in.
    Up,
    /// Not connected or not logged in; `cause` says why.
    Down,
}

/// The AMI feed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AmiReport {
    /// Where it connects to, as configured.
    pub address: String,
    /// The user it logs in as.
    pub user: String,
    /// Whether it is logged in.
    pub state: AmiState,
    /// What Asterisk says it is; none before the first login.
    pub asterisk: Option<String>,
    /// Why it is down, in words; none when it is up.
    pub cause: Option<String>,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The kernel sent it to the other phone.
    Relayed,
    /// It went to the kernel's stack, and so to the PBX; or, sent by the PBX, to the phone.
    Passed,
    /// It was taken away.
    Dropped,
}

impl From<reason::Verdict> for Verdict {
    fn from(verdict: reason::Verdict) -> Self {
        match verdict {
            reason::Verdict::Send => Self::Relayed,
            reason::Verdict::Pass => Self::Passed,
            reason::Verdict::Drop => Self::Dropped,
        }
    }
}

/// Packets the datapath saw, by reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonReport {
    /// The reason's name.
    pub reason: String,
    /// What it means for the packet.
    pub verdict: Verdict,
    /// Packets since attaching.
    pub packets: u64,
    /// Their bytes, Ethernet header included.
    pub bytes: u64,
}

/// Pairs and calls that were not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalReport {
    /// The cause: an error code of the API, or the AMI feed's name for it.
    pub cause: String,
    /// How often since attaching.
    pub count: u64,
}

/// How a detach found the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// A daemon ran, and has ended.
    Running,
    /// Its daemon was gone already; what it had left in the kernel is removed.
    LeftBehind,
}

/// What a detach ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// The interface that is free again.
    pub interface: String,
    /// How the relay was found. The daemon itself always answers `running`.
    pub found: Found,
    /// Pairs taken back; 0 when the daemon was gone, because nobody knows.
    pub pairs: u64,
}

/// What kind of thing went wrong. Programs decide by this; the message is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// Not the JSON, the path or the number that this request needs.
    InvalidRequest,
    /// Addresses or payload types that no pair can have.
    InvalidPair,
    /// The client is neither root nor the daemon's own user, or the page of another site.
    Forbidden,
    /// No pair has this number.
    UnknownPair,
    /// No such path.
    UnknownPath,
    /// The path has no such method.
    MethodNotAllowed,
    /// The request did not arrive in time.
    RequestTimeout,
    /// A local address is in another pair already.
    Duplicate,
    /// With pairs already there, packets would go in a circle.
    Loop,
    /// The request's body is too long.
    BodyTooLarge,
    /// The request is for a host that this may not be asked by.
    WrongHost,
    /// No route leads to a remote address.
    Unreachable,
    /// Possible, but not in this version.
    Unsupported,
    /// The daemon itself failed.
    Internal,
    /// The daemon is ending.
    Stopping,
    /// The daemon did not answer in time, or has no place for another who follows events.
    Busy,
    /// No room for two more streams.
    MapFull,
}

impl ErrorCode {
    /// Every code, in the order of their statuses.
    pub const ALL: [Self; 17] = [
        Self::InvalidRequest,
        Self::InvalidPair,
        Self::Forbidden,
        Self::UnknownPair,
        Self::UnknownPath,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::Duplicate,
        Self::Loop,
        Self::BodyTooLarge,
        Self::WrongHost,
        Self::Unreachable,
        Self::Unsupported,
        Self::Internal,
        Self::Stopping,
        Self::Busy,
        Self::MapFull,
    ];

    /// The HTTP status it is sent with.
    pub const fn status(self) -> u16 {
        match self {
            Self::InvalidRequest | Self::InvalidPair => 400,
            Self::Forbidden => 403,
            Self::UnknownPair | Self::UnknownPath => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::Duplicate | Self::Loop => 409,
            Self::BodyTooLarge => 413,
            Self::WrongHost => 421,
            Self::Unreachable | Self::Unsupported => 422,
            Self::Internal => 500,
            Self::Stopping => 503,
            Self::Busy => 504,
            Self::MapFull => 507,
        }
    }
}

/// A refusal as the client gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what is wrong, and what to do about it.
    pub message: String,
}

/// Body of every answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ApiError,
}

impl ApiError {
    /// An error of this code, told in the words of what caused it.
    pub fn new(code: ErrorCode, cause: impl ToString) -> Self {
        Self {
            code,
            message: cause.to_string(),
        }
    }

    /// The answer to a number that no pair has.
    pub fn unknown_pair(id: u64) -> Self {
        Self::new(
            ErrorCode::UnknownPair,
            format_args!("there is no pair {id}: `relay-user list` shows those there are"),
        )
    }
}

impl From<PairError> for ApiError {
    fn from(error: PairError) -> Self {
        Self::new(ErrorCode::InvalidPair, error)
    }
}

impl From<&Leg> for LegAddresses {
    fn from(leg: &Leg) -> Self {
        Self {
            local: leg.local.to_string(),
            remote: leg.remote.to_string(),
        }
    }
}

impl From<&Pair> for AddRequest {
    fn from(pair: &Pair) -> Self {
        Self {
            legs: pair.legs.each_ref().map(LegAddresses::from),
            payload_types: pair.payload_types.clone(),
            proof: pair.proof,
            priority: pair.priority,
        }
    }
}

impl TryFrom<AddRequest> for Pair {
    type Error = PairError;

    fn try_from(request: AddRequest) -> Result<Self, PairError> {
        let [first, second] = &request.legs;
        Self::new(
            [
                Leg::parse(&first.local, &first.remote)?,
                Leg::parse(&second.local, &second.remote)?,
            ],
            request.payload_types,
            request.proof,
        )
        .map(|pair| pair.with_priority(request.priority))
    }
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::Value;

    use super::*;

    const DESCRIPTION: &str = include_str!("../../../docs/api.md");

    /// The JSON blocks of the description that follow the heading of a type.
    fn examples(heading: &str) -> Vec<Value> {
        let section = DESCRIPTION
            .split("\n## ")
            .find(|section| section.starts_with(heading))
            .unwrap_or_else(|| panic!("docs/api.md has no section {heading}"));
        section
            .split("```json\n")
            .skip(1)
            .map(|block| {
                let block = block.split("```").next().expect("end of block");
                serde_json::from_str(block).expect(block)
            })
            .collect()
    }

    /// Reading and writing a documented example must neither lose nor add a field.
    fn documented<T: Serialize + DeserializeOwned>(heading: &str) {
        let examples = examples(heading);
        assert!(!examples.is_empty(), "no example under {heading}");
        for example in examples {
            let read: T = serde_json::from_value(example.clone()).expect(heading);
            assert_eq!(
                serde_json::to_value(read).expect(heading),
                example,
                "{heading}"
            );
        }
    }

    #[test]
    fn the_description_shows_what_is_sent() {
        documented::<AddRequest>("Adding a pair");
        documented::<PairReport>("A pair");
        documented::<PairList>("Several pairs");
        documented::<StatusReport>("The status");
        documented::<crate::stats::StatsReport>("Statistics");
        documented::<Detached>("Detaching");
        documented::<crate::doctor::Report>("The doctor");
        documented::<ErrorBody>("Errors");
    }

    #[test]
    fn the_description_shows_several_pairs_and_their_results() {
        let [request, report] = examples("Adding several pairs")
            .try_into()
            .expect("two examples");
        let read: AddAllRequest = serde_json::from_value(request.clone()).expect("request");
        assert_eq!(serde_json::to_value(read).expect("request"), request);
        let read: AddAllReport = serde_json::from_value(report.clone()).expect("report");
        assert_eq!(serde_json::to_value(read).expect("report"), report);
    }

    #[test]
    fn the_description_lists_every_error_code() {
        for code in ErrorCode::ALL {
            let name = serde_json::to_value(code).expect("code");
            let row = format!("| {} | `{}` |", code.status(), name.as_str().expect("name"));
            assert!(DESCRIPTION.contains(&row), "docs/api.md misses {row}");
        }
        let rows = DESCRIPTION.lines().filter(|line| {
            line.strip_prefix("| ")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        assert_eq!(rows.count(), ErrorCode::ALL.len());
    }

    #[test]
    fn a_request_becomes_the_pair_it_was_made_of() {
        let leg = |text: &str| text.parse::<Leg>().expect(text);
        let pair = Pair::new(
            [
                leg("[2001:db8::1]:1=[2001:db8::2]:2"),
                leg("[2001:db8::1]:3=[2001:db8::4]:4"),
            ],
            vec![PayloadTypes {
                first: 101,
                second: 96,
            }],
            Proof::None,
        )
        .expect("pair")
        .with_priority(Some(Priority::new(0x1_0010)));
        assert_eq!(Pair::try_from(AddRequest::from(&pair)), Ok(pair));
    }
}
