//! Every pair known, what it waits for, and what has to change in the datapath.
//!
//! A state machine without I/O: events go in, [`Change`]s come out, and the controller carries them
//! out in order.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::SocketAddr,
};

use relay_common::{
    stream::{
        self, Address, DSCP_KEEP, Endpoint, PAYLOAD_TYPES, PayloadType, State, Stream, StreamKey,
        StreamSpec, mode,
    },
    wire::Mac,
};

use crate::{
    ami::CallId,
    config::Dscp,
    control::model::{
        ApiError, ErrorCode, Feed, LegReport, NextHopReport, PairReport, PairState, StreamReport,
        StreamState,
    },
    next_hop::{NextHop, NextHopError, Notice, Path, Resolution},
    pair::{Leg, Pair},
};

/// What the controller has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Put a stream into the map and let the datapath relay it.
    Install {
        /// Its key.
        key: StreamKey,
        /// Its value, which holds its slot.
        stream: Stream,
    },
    /// Replace the value of a stream that is installed.
    Update {
        /// Its key.
        key: StreamKey,
        /// Its new value, with the same slot.
        stream: Stream,
    },
    /// Take a stream back and out of the map.
    Remove {
        /// Its key.
        key: StreamKey,
        /// Its slot, free from now on.
        slot: u32,
    },
    /// End one watch of a path.
    Unwatch(Path),
}

/// Why a pair is not taken. The text names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A local address is taken.
    #[error(
        "{local} is already a local address of pair {id}: remove that pair first (`relay-user remove {id}`), or correct the leg"
    )]
    Duplicate {
        /// The address.
        local: SocketAddr,
        /// The pair that has it.
        id: u64,
    },
    /// Packets would circle.
    #[error(
        "packets that this pair sends to {to} would be relayed by pair {id} and come back: correct the legs, or remove pair {id}"
    )]
    Loop {
        /// Where they go first.
        to: SocketAddr,
        /// The pair that takes them up.
        id: u64,
    },
    /// No two slots are free.
    #[error(
        "the map of streams is full ({max_streams}, two for each pair): remove pairs, or attach with a larger `--max-streams`"
    )]
    Full {
        /// Size of the map.
        max_streams: u32,
    },
    /// A packet cannot leave towards a remote.
    #[error(transparent)]
    NextHop(#[from] NextHopError),
    /// Tags would have to be put on or taken off.
    #[error("{}", VLANS_DIFFER)]
    Vlans,
}

/// The datapath changes VLAN identifiers, not the number of tags.
const VLANS_DIFFER: &str = "the legs are on links with different numbers of VLAN tags, which is not supported yet: the call stays with the PBX";

impl Refusal {
    /// For programs.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Duplicate { .. } => ErrorCode::Duplicate,
            Self::Loop { .. } => ErrorCode::Loop,
            Self::Full { .. } => ErrorCode::MapFull,
            Self::Vlans
            | Self::NextHop(
                NextHopError::OtherInterface { .. }
                | NextHopError::NoLinkLayer(_)
                | NextHopError::RemoteIsLinkLocal(_)
                | NextHopError::TooManyVlanTags { .. }
                | NextHopError::Encapsulated(_),
            ) => ErrorCode::Unsupported,
            Self::NextHop(_) => ErrorCode::Unreachable,
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code(), refusal)
    }
}

/// Where a pair comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The control socket.
    Api,
    /// Asterisk, with the names of the legs' channels.
    Ami {
        /// The bridge.
        call: CallId,
        /// The channels, in the order of the legs.
        channels: Vec<String>,
    },
}

/// Numbers of pairs by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// All of them.
    pub pairs: u64,
    /// Streams in the map.
    pub streams: u64,
    /// Both streams relayed.
    pub offloaded: u64,
    /// Waiting for something that may come.
    pub waiting: u64,
    /// Left with the PBX.
    pub refused: u64,
}

/// All pairs.
pub struct Registry {
    dscp: Dscp,
    max_streams: u32,
    next_id: u64,
    entries: BTreeMap<u64, Entry>,
    locals: HashMap<SocketAddr, (u64, usize)>,
    calls: HashMap<CallId, u64>,
    /// Which streams leave by a path: pair, and index of the leg that they come in on.
    paths: HashMap<Path, BTreeSet<(u64, usize)>>,
    /// Oldest first: a slot just freed may still be in the hands of a packet on another CPU.
    free_slots: VecDeque<u32>,
}

struct Entry {
    origin: Origin,
    body: Body,
}

enum Body {
    /// In the datapath's care, as far as next hops are known.
    Held {
        pair: Pair,
        streams: [StreamEntry; 2],
    },
    /// Known, but the PBX's.
    Aside {
        pair: Option<Pair>,
        state: PairState,
        why: String,
    },
}

/// A stream of a held pair; its index is that of the leg it comes in on.
struct StreamEntry {
    slot: u32,
    way: Watched,
    installed: bool,
}

/// What a watch of a path has told so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Serial of the watch (see [`Notice`]).
    pub serial: u64,
    /// The latest that it told.
    pub resolution: Resolution,
}

impl From<Notice> for Watched {
    fn from(notice: Notice) -> Self {
        Self {
            serial: notice.serial,
            resolution: notice.resolution,
        }
    }
}

impl Registry {
    /// Without pairs, for a map of `max_streams`.
    #[must_use]
    pub fn new(dscp: Dscp, max_streams: u32) -> Self {
        Self {
            dscp,
            max_streams,
            next_id: 1,
            entries: BTreeMap::new(),
            locals: HashMap::new(),
            calls: HashMap::new(),
            paths: HashMap::new(),
            free_slots: (0..max_streams).collect(),
        }
    }

    /// Whether a pair could be taken, as far as other pairs and the room go.
    ///
    /// # Errors
    /// The [`Refusal`] that [`Registry::add`] would give.
    pub fn check(&self, pair: &Pair) -> Result<(), Refusal> {
        for leg in &pair.legs {
            if let Some(&(id, _)) = self.locals.get(&leg.local) {
                return Err(Refusal::Duplicate {
                    local: leg.local,
                    id,
                });
            }
        }
        for leg in &pair.legs {
            self.check_loop(pair, leg)?;
        }
        if self.free_slots.len() < 2 {
            return Err(Refusal::Full {
                max_streams: self.max_streams,
            });
        }
        Ok(())
    }

    /// Follows a packet that leaves by `out` through the pairs that would take it up. Without the
    /// new pair there is no circle, so the walk ends, or arrives at the new pair.
    fn check_loop(&self, new: &Pair, out: &Leg) -> Result<(), Refusal> {
        let mut at = *out;
        let mut first = None;
        while let Some(&(id, index)) = self.locals.get(&at.remote) {
            let Some(Entry {
                body: Body::Held { pair, .. },
                ..
            }) = self.entries.get(&id)
            else {
                return Ok(());
            };
            if pair.legs[index].remote != at.local {
                return Ok(());
            }
            let first = *first.get_or_insert(id);
            at = pair.legs[1 - index];
            if new
                .legs
                .iter()
                .any(|leg| leg.local == at.remote && leg.remote == at.local)
            {
                return Err(Refusal::Loop {
                    to: out.remote,
                    id: first,
                });
            }
        }
        Ok(())
    }

    /// The paths of a pair, one for each leg, to be watched before [`Registry::add`].
    #[must_use]
    pub fn paths_of(pair: &Pair) -> [Path; 2] {
        pair.legs.each_ref().map(path_to)
    }

    /// Takes a pair whose paths are being watched; `watched` belong to its legs.
    ///
    /// # Errors
    /// A [`Refusal`]; nothing has changed then, and the caller ends the watches.
    pub fn add(
        &mut self,
        origin: Origin,
        pair: Pair,
        watched: [Watched; 2],
    ) -> Result<(u64, Vec<Change>), Refusal> {
        self.check(&pair)?;
        for way in &watched {
            // An operator can correct a pair. A call is what it is, and its way may come back.
            if let (Resolution::Unreachable(error), Origin::Api) = (&way.resolution, &origin) {
                return Err(error.clone().into());
            }
        }
        if vlans_differ(watched.each_ref()) && origin == Origin::Api {
            return Err(Refusal::Vlans);
        }
        let (Some(one), Some(other)) = (self.free_slots.pop_front(), self.free_slots.pop_front())
        else {
            return Err(Refusal::Full {
                max_streams: self.max_streams,
            });
        };

        let id = match &origin {
            Origin::Ami { call, .. } => self.id_of(call),
            Origin::Api => self.new_id(),
        };
        for (index, leg) in pair.legs.iter().enumerate() {
            self.locals.insert(leg.local, (id, index));
            self.paths
                .entry(path_to(leg))
                .or_default()
                .insert((id, 1 - index));
        }
        // What comes in on one leg leaves on the other.
        let [to_first, to_second] = watched;
        let stream = |slot, way| StreamEntry {
            slot,
            way,
            installed: false,
        };
        let streams = [stream(one, to_second), stream(other, to_first)];
        self.entries.insert(
            id,
            Entry {
                origin,
                body: Body::Held { pair, streams },
            },
        );
        Ok((
            id,
            [0, 1]
                .into_iter()
                .filter_map(|index| self.settle(id, index))
                .collect(),
        ))
    }

    /// The number of a call, kept while the call is known.
    fn id_of(&mut self, call: &CallId) -> u64 {
        if let Some(&id) = self.calls.get(call) {
            return id;
        }
        let id = self.new_id();
        self.calls.insert(call.clone(), id);
        id
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Brings the map in line with what is known of a stream's next hop.
    fn settle(&mut self, id: u64, index: usize) -> Option<Change> {
        let Some(Entry {
            body: Body::Held { pair, streams },
            ..
        }) = self.entries.get_mut(&id)
        else {
            return None;
        };
        let slots = [streams[index].slot, streams[1 - index].slot];
        let differ = vlans_differ(streams.each_ref().map(|stream| &stream.way));
        let entry = &mut streams[index];
        let next_hop = match &entry.way.resolution {
            Resolution::Known(next_hop) if !differ => next_hop_of(next_hop),
            // Installed before: it stays in the map, so that its packets are counted as what they
            // are. Never resolved: not installed.
            _ if entry.installed => stream::NextHop::default(),
            _ => return None,
        };
        let spec = spec(pair, index, slots, next_hop, self.dscp);
        let (key, stream) = (spec.key(), spec.compile());
        Some(if std::mem::replace(&mut entry.installed, true) {
            Change::Update { key, stream }
        } else {
            Change::Install { key, stream }
        })
    }

    /// A path that a pair leaves by has changed.
    pub fn resolved(&mut self, notice: &Notice) -> Vec<Change> {
        let Some(streams) = self.paths.get(&notice.path) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        for (id, index) in streams.clone() {
            let Some(Entry {
                body: Body::Held { streams, .. },
                ..
            }) = self.entries.get_mut(&id)
            else {
                continue;
            };
            let differed = vlans_differ(streams.each_ref().map(|stream| &stream.way));
            let way = &mut streams[index].way;
            if way.serial == notice.serial && way.resolution != notice.resolution {
                way.resolution = notice.resolution.clone();
                let differ = vlans_differ(streams.each_ref().map(|stream| &stream.way));
                changes.extend(self.settle(id, index));
                if differ != differed {
                    changes.extend(self.settle(id, 1 - index));
                }
            }
        }
        changes
    }

    /// Forgets a pair.
    pub fn remove(&mut self, id: u64) -> Vec<Change> {
        let changes = self.release(id);
        if let Some(Entry {
            origin: Origin::Ami { call, .. },
            ..
        }) = self.entries.remove(&id)
        {
            self.calls.remove(&call);
        }
        changes
    }

    /// Leaves a call with the PBX, and remembers why.
    pub fn set_aside(
        &mut self,
        call: &CallId,
        channels: Option<Vec<String>>,
        state: PairState,
        why: String,
    ) -> Vec<Change> {
        let id = self.id_of(call);
        let changes = self.release(id);
        let (known, pair) = match self.entries.remove(&id) {
            Some(Entry {
                origin: Origin::Ami { channels, .. },
                body: Body::Aside { pair, .. },
            }) => (channels, pair),
            _ => (Vec::new(), None),
        };
        let origin = Origin::Ami {
            call: call.clone(),
            // Those of a pair are in the order of its legs.
            channels: match (&pair, channels) {
                (None, Some(channels)) => channels,
                _ => known,
            },
        };
        self.entries.insert(
            id,
            Entry {
                origin,
                body: Body::Aside { pair, state, why },
            },
        );
        changes
    }

    /// Takes a pair out of the datapath; a call stays known, as one left with the PBX.
    fn release(&mut self, id: u64) -> Vec<Change> {
        let Some(entry) = self.entries.get_mut(&id) else {
            return Vec::new();
        };
        // The pair that was held before stays known, for those who look.
        if matches!(entry.body, Body::Aside { .. }) {
            return Vec::new();
        }
        let aside = Body::Aside {
            pair: None,
            state: PairState::Waiting,
            why: String::new(),
        };
        let Body::Held { pair, streams } = std::mem::replace(&mut entry.body, aside) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        for (index, stream) in streams.iter().enumerate() {
            let leg = &pair.legs[index];
            if stream.installed {
                changes.push(Change::Remove {
                    key: key_of(leg),
                    slot: stream.slot,
                });
            }
            self.free_slots.push_back(stream.slot);
            self.locals.remove(&leg.local);
        }
        for (index, leg) in pair.legs.iter().enumerate() {
            let path = path_to(leg);
            if let Some(streams) = self.paths.get_mut(&path) {
                streams.remove(&(id, 1 - index));
                if streams.is_empty() {
                    self.paths.remove(&path);
                }
            }
            changes.push(Change::Unwatch(path));
        }
        if let Body::Aside { pair: last, .. } = &mut entry.body {
            *last = Some(pair);
        }
        changes
    }

    /// The AMI calls that hold a local address of this pair: they must be over, since Asterisk has
    /// given the address to another.
    #[must_use]
    pub fn calls_in_the_way(&self, pair: &Pair) -> Vec<CallId> {
        pair.legs
            .iter()
            .filter_map(|leg| self.locals.get(&leg.local))
            .filter_map(|(id, _)| match &self.entries.get(id)?.origin {
                Origin::Ami { call, .. } => Some(call.clone()),
                Origin::Api => None,
            })
            .collect()
    }

    /// The pair that a call is relayed as, if it is.
    #[must_use]
    pub fn held(&self, call: &CallId) -> Option<&Pair> {
        match &self.entries.get(self.calls.get(call)?)?.body {
            Body::Held { pair, .. } => Some(pair),
            Body::Aside { .. } => None,
        }
    }

    /// Whether a pair is in the datapath's care.
    #[must_use]
    pub fn is_held(&self, id: u64) -> bool {
        self.entries
            .get(&id)
            .is_some_and(|entry| matches!(entry.body, Body::Held { .. }))
    }

    /// The pair that a stream belongs to, and the leg that it comes in on.
    #[must_use]
    pub fn stream_at(&self, key: &StreamKey) -> Option<(u64, u8)> {
        let local = SocketAddr::new(key.local_address.into(), key.local_port);
        self.locals
            .get(&local)
            .map(|&(id, index)| (id, index as u8))
    }

    /// The number of a call that is known.
    #[must_use]
    pub fn id(&self, call: &CallId) -> Option<u64> {
        self.calls.get(call).copied()
    }

    /// The call of a pair that AMI fed.
    #[must_use]
    pub fn call(&self, id: u64) -> Option<&CallId> {
        match &self.entries.get(&id)?.origin {
            Origin::Ami { call, .. } => Some(call),
            Origin::Api => None,
        }
    }

    /// All calls of the AMI feed.
    #[must_use]
    pub fn calls(&self) -> Vec<CallId> {
        self.calls.keys().cloned().collect()
    }

    /// All pairs' numbers, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries.keys().copied()
    }

    /// Pairs by state. `state` reads a slot.
    pub fn census(&self, state: impl Fn(u32) -> State) -> Census {
        let mut census = Census::default();
        for entry in self.entries.values() {
            census.pairs += 1;
            if let Body::Held { streams, .. } = &entry.body {
                census.streams += streams.iter().filter(|stream| stream.installed).count() as u64;
            }
            match summary(&entry.body, &state).0 {
                PairState::Offloaded => census.offloaded += 1,
                PairState::Waiting => census.waiting += 1,
                PairState::Refused => census.refused += 1,
            }
        }
        census
    }

    /// A pair as the API shows it. `state` reads a slot.
    pub fn report(&self, id: u64, state: impl Fn(u32) -> State) -> Option<PairReport> {
        let entry = self.entries.get(&id)?;
        let (feed, call, channels) = match &entry.origin {
            Origin::Api => (Feed::Api, None, &[][..]),
            Origin::Ami { call, channels } => {
                (Feed::Ami, Some(call.to_string()), channels.as_slice())
            }
        };
        let (pair_state, why) = summary(&entry.body, &state);
        let (pair, streams) = match &entry.body {
            Body::Held { pair, streams } => (Some(pair), Some(streams)),
            Body::Aside { pair, .. } => (pair.as_ref(), None),
        };
        let legs = pair.map_or(&[][..], |pair| &pair.legs);
        let streams = legs
            .iter()
            .zip(streams.into_iter().flatten())
            .enumerate()
            .map(|(index, (leg, stream))| {
                let counted = if stream.installed {
                    state(stream.slot)
                } else {
                    State::default()
                };
                StreamReport {
                    leg: index as u8,
                    from: leg.remote,
                    to: legs[1 - index].remote,
                    state: stream_state(stream, &state),
                    packets: counted.packets,
                    bytes: counted.bytes,
                    next_hop: match &stream.way.resolution {
                        Resolution::Known(next_hop) => Some(next_hop_report(next_hop)),
                        _ => None,
                    },
                }
            })
            .collect();
        Some(PairReport {
            id,
            feed,
            call,
            channels: channels.to_vec(),
            state: pair_state,
            why,
            legs: legs
                .iter()
                .enumerate()
                .map(|(index, leg)| LegReport {
                    local: leg.local,
                    remote: leg.remote,
                    channel: channels.get(index).cloned(),
                })
                .collect(),
            payload_types: pair.map_or_else(Vec::new, |pair| pair.payload_types.clone()),
            streams,
        })
    }
}

/// State of a pair as a whole, and why it is not offloaded.
fn summary(body: &Body, state: &impl Fn(u32) -> State) -> (PairState, Option<String>) {
    let streams = match body {
        Body::Aside { state, why, .. } => return (*state, Some(why.clone())),
        Body::Held { streams, .. } => streams,
    };
    // What comes in on the first leg waits for the way to the second, and the other way round.
    let obstacle = streams
        .iter()
        .rev()
        .find_map(|stream| match &stream.way.resolution {
            Resolution::Known(_) => None,
            Resolution::Waiting {
                neighbour,
                interface,
            } => Some((
                PairState::Waiting,
                format!("waiting for neighbour {neighbour} on {interface}"),
            )),
            Resolution::Unreachable(error) => Some((PairState::Refused, error.to_string())),
        });
    if let Some((state, why)) = obstacle {
        return (state, Some(why));
    }
    if vlans_differ(streams.each_ref().map(|stream| &stream.way)) {
        return (PairState::Refused, Some(VLANS_DIFFER.to_owned()));
    }
    let stopped = streams
        .iter()
        .map(|stream| stream_state(stream, state))
        .find(|state| *state != StreamState::Offloaded);
    match stopped {
        None => (PairState::Offloaded, None),
        Some(_) => (
            PairState::Waiting,
            Some("not relayed by the datapath".to_owned()),
        ),
    }
}

fn stream_state(stream: &StreamEntry, state: &impl Fn(u32) -> State) -> StreamState {
    if !stream.installed || !matches!(stream.way.resolution, Resolution::Known(_)) {
        return StreamState::Waiting;
    }
    match state(stream.slot).mode {
        mode::OFFLOADED => StreamState::Offloaded,
        mode::SUSPENDED => StreamState::Suspended,
        _ => StreamState::Watching,
    }
}

/// Whether both ways are known, and one has more tags than the other.
fn vlans_differ(ways: [&Watched; 2]) -> bool {
    match ways.map(|way| &way.resolution) {
        [Resolution::Known(one), Resolution::Known(other)] => one.vlan.len() != other.vlan.len(),
        _ => false,
    }
}

fn path_to(leg: &Leg) -> Path {
    Path {
        local: leg.local.ip(),
        remote: leg.remote.ip(),
    }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        address: Address::from(address.ip()),
        port: address.port(),
    }
}

fn key_of(leg: &Leg) -> StreamKey {
    let local = endpoint(leg.local);
    StreamKey::new(local.address, local.port)
}

/// The stream that comes in on leg `index`. `slots` are its own and the opposite direction's.
fn spec(
    pair: &Pair,
    index: usize,
    slots: [u32; 2],
    next_hop: stream::NextHop,
    dscp: Dscp,
) -> StreamSpec {
    let (into, out) = (&pair.legs[index], &pair.legs[1 - index]);
    let mut payload_types = [PayloadType::UNUSED; PAYLOAD_TYPES];
    for (entry, types) in payload_types.iter_mut().zip(&pair.payload_types) {
        *entry = match index {
            0 => PayloadType {
                from: types.first,
                to: types.second,
            },
            _ => PayloadType {
                from: types.second,
                to: types.first,
            },
        };
    }
    StreamSpec {
        source: endpoint(into.remote),
        local: endpoint(into.local),
        new_source: endpoint(out.local),
        new_destination: endpoint(out.remote),
        payload_types,
        next_hop,
        dscp: match dscp {
            Dscp::Keep => DSCP_KEEP,
            Dscp::Set(value) => value,
        },
        slot: slots[0],
        opposite_slot: slots[1],
    }
}

fn next_hop_of(next_hop: &NextHop) -> stream::NextHop {
    let mut vlans = [stream::VlanTag::default(); 2];
    for (entry, tag) in vlans.iter_mut().zip(&next_hop.vlan) {
        *entry = stream::VlanTag {
            tpid: tag.protocol,
            id: tag.id,
        };
    }
    stream::NextHop {
        destination_mac: Mac {
            bytes: next_hop.destination_mac,
        },
        source_mac: Mac {
            bytes: next_hop.source_mac,
        },
        vlans,
        vlan_depth: next_hop.vlan.len() as u8,
        known: 1,
        mtu: next_hop.mtu,
    }
}

fn next_hop_report(next_hop: &NextHop) -> NextHopReport {
    let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
    NextHopReport {
        source_mac: mac(next_hop.source_mac),
        destination_mac: mac(next_hop.destination_mac),
        vlan: next_hop.vlan.iter().map(|tag| tag.id).collect(),
        mtu: u32::from(next_hop.mtu),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pair::PayloadTypes;

    fn registry(max_streams: u32) -> Registry {
        Registry::new(Dscp::Set(46), max_streams)
    }

    fn pair(first: &str, second: &str) -> Pair {
        let leg = |text: &str| text.parse().expect(text);
        let types = vec![
            PayloadTypes::same(0),
            PayloadTypes {
                first: 101,
                second: 96,
            },
        ];
        Pair::new([leg(first), leg(second)], types).expect("pair")
    }

    /// A pair of ports `2n` and `2n + 1` above 10,000.
    fn numbered(n: u16) -> Pair {
        let (a, b) = (10_000 + 2 * n, 10_001 + 2 * n);
        pair(
            &format!("192.0.2.1:{a}=192.0.2.11:{a}"),
            &format!("192.0.2.1:{b}=192.0.2.12:{b}"),
        )
    }

    fn call(n: u16) -> CallId {
        CallId::new(&format!("bridge-{n}")).expect("call")
    }

    fn from_ami(n: u16) -> Origin {
        Origin::Ami {
            call: call(n),
            channels: vec!["PJSIP/a".to_owned(), "PJSIP/b".to_owned()],
        }
    }

    /// Serial of every watch in these tests.
    const SERIAL: u64 = 7;

    fn way(resolution: Resolution) -> Watched {
        Watched {
            serial: SERIAL,
            resolution,
        }
    }

    fn known(last_byte: u8) -> Watched {
        way(Resolution::Known(NextHop {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, last_byte],
            vlan: Vec::new(),
            mtu: 1500,
        }))
    }

    fn waiting() -> Watched {
        way(Resolution::Waiting {
            neighbour: "192.0.2.12".parse().expect("address"),
            interface: "eth0".to_owned(),
        })
    }

    fn notice(path: Path, way: Watched) -> Notice {
        Notice {
            path,
            serial: way.serial,
            resolution: way.resolution,
        }
    }

    fn offloaded(_: u32) -> State {
        State {
            mode: mode::OFFLOADED,
            packets: 7,
            bytes: 70,
            ..State::default()
        }
    }

    #[test]
    fn each_stream_goes_out_where_the_other_leg_is() {
        let mut registry = registry(2);
        let pair = pair(
            "192.0.2.1:10000=192.0.2.11:30000",
            "192.0.2.1:10002=192.0.2.12:30002",
        );
        let (id, changes) = registry
            .add(Origin::Api, pair, [known(11), known(12)])
            .expect("room");
        let [
            Change::Install { key, stream },
            Change::Install {
                key: back,
                stream: opposite,
            },
        ] = changes.as_slice()
        else {
            panic!("{changes:?}");
        };
        assert_eq!((key.local_port, back.local_port), (10_000, 10_002));
        assert_eq!((stream.source_port, opposite.source_port), (30_000, 30_002));
        assert_eq!(
            (stream.new_source_port, stream.new_destination_port),
            (10_002, 30_002)
        );
        assert_eq!(
            stream.next_hop.destination_mac.bytes[5], 12,
            "towards the second leg"
        );
        assert_eq!(opposite.next_hop.destination_mac.bytes[5], 11);
        assert_eq!(
            (stream.slot, stream.opposite_slot),
            (opposite.opposite_slot, opposite.slot)
        );
        let renumbered =
            |stream: &Stream| (stream.payload_types[1].from, stream.payload_types[1].to);
        assert_eq!(
            (renumbered(stream), renumbered(opposite)),
            ((101, 96), (96, 101))
        );
        assert_eq!(stream.dscp, 46);

        let report = registry.report(id, offloaded).expect("report");
        assert_eq!((report.state, report.why), (PairState::Offloaded, None));
        assert_eq!(report.streams[0].packets, 7);
    }

    #[test]
    fn an_unresolved_stream_is_not_installed_and_says_what_it_waits_for() {
        let mut registry = registry(2);
        let pair = numbered(0);
        let [_, to_second] = Registry::paths_of(&pair);
        let (id, changes) = registry
            .add(Origin::Api, pair, [known(11), waiting()])
            .expect("room");
        assert!(
            matches!(changes.as_slice(), [Change::Install { key, .. }] if key.local_port == 10_001),
            "only the stream towards the known leg: {changes:?}"
        );
        let report = registry.report(id, offloaded).expect("report");
        assert_eq!(report.state, PairState::Waiting);
        assert!(report.why.expect("why").contains("192.0.2.12"));

        let changes = registry.resolved(&notice(to_second, known(12)));
        assert!(
            matches!(changes.as_slice(), [Change::Install { key, .. }] if key.local_port == 10_000)
        );
        assert!(
            registry.resolved(&notice(to_second, known(12))).is_empty(),
            "nothing new"
        );

        let changes = registry.resolved(&notice(to_second, known(99)));
        assert!(
            matches!(changes.as_slice(), [Change::Update { stream, .. }] if stream.next_hop.destination_mac.bytes[5] == 99)
        );
        let stale = Watched {
            serial: SERIAL - 1,
            ..waiting()
        };
        assert!(
            registry.resolved(&notice(to_second, stale)).is_empty(),
            "told by an earlier watch"
        );
        let changes = registry.resolved(&notice(to_second, waiting()));
        assert!(
            matches!(changes.as_slice(), [Change::Update { stream, .. }] if stream.next_hop.known == 0),
            "the datapath must stop using the lost neighbour: {changes:?}"
        );
    }

    #[test]
    fn taken_addresses_circles_and_a_full_map_are_refused() {
        let mut registry = registry(4);
        let hop = || [known(1), known(2)];
        let (id, _) = registry
            .add(
                Origin::Api,
                pair("192.0.2.1:1=198.51.100.1:1", "192.0.2.1:3=198.51.100.3:3"),
                hop(),
            )
            .expect("room");
        let same = pair("192.0.2.1:5=198.51.100.5:5", "192.0.2.1:3=198.51.100.9:9");
        assert!(matches!(
            registry.add(Origin::Api, same, hop()),
            Err(Refusal::Duplicate { id: other, .. }) if other == id
        ));
        // Two hosts' pairs seen from one registry: each sends into the other.
        let circle = pair("198.51.100.1:1=192.0.2.1:1", "198.51.100.3:3=192.0.2.1:3");
        let error = registry
            .add(Origin::Api, circle, hop())
            .expect_err("circle");
        assert!(
            matches!(error, Refusal::Loop { id: other, .. } if other == id),
            "{error}"
        );
        // A chain is no circle.
        let chain = pair("198.51.100.1:1=192.0.2.1:1", "198.51.100.9:9=192.0.2.99:9");
        registry.add(Origin::Api, chain, hop()).expect("no circle");

        let error = registry
            .add(Origin::Api, numbered(0), hop())
            .expect_err("full");
        assert_eq!(error, Refusal::Full { max_streams: 4 });
        assert_eq!(error.code(), ErrorCode::MapFull);
        registry.remove(id);
        registry
            .add(Origin::Api, numbered(0), hop())
            .expect("room again");
    }

    #[test]
    fn a_refused_next_hop_changes_nothing() {
        let mut registry = registry(2);
        let no_route = NextHopError::LinkDown("eth0".to_owned());
        let ways = [known(1), way(Resolution::Unreachable(no_route.clone()))];
        assert_eq!(
            registry.add(Origin::Api, numbered(0), ways),
            Err(Refusal::NextHop(no_route))
        );
        assert_eq!(registry.ids().count(), 0);
        registry
            .add(Origin::Api, numbered(0), [known(1), known(2)])
            .expect("slots are still free");
    }

    #[test]
    fn a_call_set_aside_keeps_its_number_and_frees_its_streams() {
        let mut registry = registry(2);
        let hop = || [known(1), known(2)];
        let (id, _) = registry.add(from_ami(1), numbered(0), hop()).expect("room");
        let changes = registry.set_aside(
            &call(1),
            None,
            PairState::Waiting,
            "leg A on hold".to_owned(),
        );
        let removed = changes
            .iter()
            .filter(|change| matches!(change, Change::Remove { .. }));
        assert_eq!(removed.count(), 2);
        let unwatched = changes
            .iter()
            .filter(|change| matches!(change, Change::Unwatch(_)));
        assert_eq!(unwatched.count(), 2, "every watch is ended");
        let report = registry.report(id, offloaded).expect("still known");
        assert_eq!(report.why.as_deref(), Some("leg A on hold"));
        assert_eq!(report.legs[1].channel.as_deref(), Some("PJSIP/b"));
        assert!(report.streams.is_empty());

        let again = registry
            .add(from_ami(1), numbered(0), hop())
            .expect("offered again");
        assert_eq!(again.0, id);
        assert_eq!(registry.id(&call(1)), Some(id));
        let keys: Vec<_> = numbered(0).legs.iter().map(key_of).collect();
        assert_eq!(registry.stream_at(&keys[1]), Some((id, 1)));
        assert!(registry.is_held(id));
        assert_eq!(registry.remove(id).len(), 4);
        assert_eq!(registry.id(&call(1)), None);
        assert_eq!(registry.stream_at(&keys[1]), None);
        assert!(!registry.is_held(id));
        assert_eq!(registry.census(offloaded), Census::default());
    }

    #[derive(Clone, Debug)]
    enum Event {
        Add(u16),
        Offer(u16),
        Aside(u16),
        Gone(u16),
        Remove(u64),
        Resolved(bool, u8),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let n = 0..6_u16;
        prop::collection::vec(
            prop_oneof![
                n.clone().prop_map(Event::Add),
                n.clone().prop_map(Event::Offer),
                n.clone().prop_map(Event::Aside),
                n.prop_map(Event::Gone),
                (0..20_u64).prop_map(Event::Remove),
                (any::<bool>(), 0..3_u8).prop_map(|(second, hop)| Event::Resolved(second, hop)),
            ],
            0..60,
        )
    }

    proptest! {
        /// Whatever happens, the map holds what the registry says, no slot serves two streams, and
        /// every watch is ended exactly once.
        #[test]
        fn the_map_follows(events in events()) {
            let mut registry = registry(8);
            let mut map: HashMap<StreamKey, u32> = HashMap::new();
            let mut watches: HashMap<Path, i64> = HashMap::new();
            for event in events {
                let hop = || [known(1), waiting()];
                let mut watched = Vec::new();
                let changes = match event {
                    Event::Add(n) | Event::Offer(n) => {
                        let origin =
                            if matches!(event, Event::Add(_)) { Origin::Api } else { from_ami(n) };
                        let pair = numbered(n);
                        // As the controller does: an earlier offer of the call goes first.
                        if let Origin::Ami { call, .. } = &origin {
                            let changes = registry.set_aside(call, None, PairState::Waiting, String::new());
                            apply(changes, &mut map, &mut watches)?;
                        }
                        let paths = Registry::paths_of(&pair);
                        match registry.add(origin, pair, hop()) {
                            Ok((_, changes)) => {
                                watched.extend(paths);
                                changes
                            }
                            Err(_) => Vec::new(),
                        }
                    }
                    Event::Aside(n) => registry.set_aside(&call(n), None, PairState::Refused, String::new()),
                    Event::Gone(n) => match registry.id(&call(n)) {
                        Some(id) => registry.remove(id),
                        None => Vec::new(),
                    },
                    Event::Remove(id) => registry.remove(id),
                    Event::Resolved(second, hop) => {
                        let path = Registry::paths_of(&numbered(0))[usize::from(second)];
                        let resolution = if hop == 0 { waiting() } else { known(hop) };
                        registry.resolved(&notice(path, resolution))
                    }
                };
                for path in watched {
                    *watches.entry(path).or_default() += 1;
                }
                apply(changes, &mut map, &mut watches)?;
                let mut slots: Vec<_> = map.values().collect();
                slots.sort_unstable();
                slots.dedup();
                prop_assert_eq!(slots.len(), map.len());
                prop_assert_eq!(registry.census(offloaded).streams, map.len() as u64);
            }
            for id in registry.ids().collect::<Vec<_>>() {
                apply(registry.remove(id), &mut map, &mut watches)?;
            }
            prop_assert!(map.is_empty());
            prop_assert!(watches.values().all(|&count| count == 0), "{:?}", watches);
            prop_assert_eq!(registry.free_slots.len(), 8);
        }
    }

    fn apply(
        changes: Vec<Change>,
        map: &mut HashMap<StreamKey, u32>,
        watches: &mut HashMap<Path, i64>,
    ) -> Result<(), TestCaseError> {
        for change in changes {
            match change {
                Change::Install { key, stream } => {
                    prop_assert_eq!(map.insert(key, stream.slot), None);
                }
                Change::Update { key, stream } => {
                    prop_assert_eq!(map.get(&key), Some(&stream.slot));
                }
                Change::Remove { key, slot } => {
                    prop_assert_eq!(map.remove(&key), Some(slot));
                }
                Change::Unwatch(path) => *watches.entry(path).or_default() -= 1,
            }
        }
        Ok(())
    }
}
