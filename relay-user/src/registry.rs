//! Every pair known, what it waits for, and what has to change in the datapath.
//!
//! A state machine without I/O: events go in, [`Change`]s come out, and the controller carries them
//! out in order.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    net::SocketAddr,
    ops::Bound,
    time::Duration,
};

use hashbrown::HashMap;
use relay_common::{
    stream::{
        self, Address, DSCP_KEEP, DSCP_MAP, Endpoint, PAYLOAD_TYPES, PayloadType, State, Stream,
        StreamKey, StreamSpec, mode, opposite, ticks,
    },
    wire::Mac,
};

use crate::{
    ami::CallId,
    clock::Now,
    control::model::{
        ApiError, ErrorCode, Feed, LegReport, MarkReport, NextHopReport, PairReport, PairState,
        ProofReport, StreamReport, StreamState, StreamStates,
    },
    dscp::Dscp,
    next_hop::{Macs, NextHop, NextHopError, Notice, Path, Resolution},
    pair::{Leg, Pair, PayloadTypes, Proof},
    priority::Priority,
    reception,
};

/// What the controller has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Put a stream into the maps; it is the PBX's until it is started.
    Install(StreamSpec),
    /// Replace a stream that is installed.
    Update(StreamSpec),
    /// Begin a round of proof; the datapath offloads the stream at its end.
    Watch {
        /// The stream's slot.
        slot: u32,
        /// The number of the round.
        epoch: u32,
    },
    /// Offload a stream without proof.
    Offload {
        /// The stream's slot.
        slot: u32,
        /// The number of the round.
        epoch: u32,
        /// What is relayed.
        payload_types: [PayloadType; PAYLOAD_TYPES],
    },
    /// Take a stream back; it stays in the maps.
    TakeBack {
        /// The stream's slot.
        slot: u32,
    },
    /// Take a stream back and out of the maps. Its slot is free from now on.
    Remove(StreamSpec),
    /// End one watch of a path.
    Unwatch(Path),
}

/// A stream that changed by itself, or was told to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The pair.
    pub pair: u64,
    /// The leg that the stream comes in on.
    pub leg: usize,
    /// What it is now.
    pub now: StreamState,
}

/// How a pair in the datapath's care stands, by the leg that each stream comes in on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Where the state of each stream is.
    pub slots: [u32; 2],
    /// What each was when last looked at.
    pub states: [StreamState; 2],
    /// Whether it is a call's of Asterisk's, which has to prove it.
    pub provable: [bool; 2],
}

/// What holds for every pair of this daemon.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// DSCP of relayed packets.
    pub dscp: Dscp,
    /// Priority of relayed packets at the queueing discipline; none where they go around it.
    pub priority: Option<Priority>,
    /// Size of the map.
    pub max_streams: u32,
    /// Packets in a row that prove a stream; 0 asks for no proof.
    pub proof: u8,
    /// How often a phone without RTCP is heard of by the PBX, where its timeout is not known; 0 is
    /// never.
    pub keepalive: Duration,
}

impl Policy {
    /// Packets in a row that prove a stream of this pair.
    fn proof_of(&self, pair: &Pair) -> u8 {
        match pair.proof {
            Proof::Wire => self.proof,
            Proof::None => 0,
        }
    }

    /// Priority of a pair's packets; none where that is left as it is.
    fn priority_of(&self, pair: &Pair) -> Option<Priority> {
        let priority = pair.priority.or(self.priority);
        priority.and_then(Priority::effective)
    }
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
    /// A priority where no queueing discipline is on the way.
    #[error(
        "the pair has the priority {0}, but XDP goes around every queueing discipline: leave it out, or attach with `--mode tc`"
    )]
    Priority(Priority),
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
            | Self::Priority(_)
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
    /// Asterisk, but which call it is was known to an earlier daemon only.
    Adopted,
}

/// A pair that an earlier daemon left in the maps.
#[derive(Clone, Debug)]
pub struct Heirloom {
    /// Its number.
    pub id: u64,
    /// What it joins.
    pub pair: Pair,
    origin: Origin,
    specs: [StreamSpec; 2],
    /// Of all rounds that their states remember.
    last_epoch: u32,
}

impl Heirloom {
    /// What removes it, if it is not adopted.
    #[must_use]
    pub fn removal(&self) -> [Change; 2] {
        self.specs.map(Change::Remove)
    }
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
    /// In the datapath's care without proof.
    pub unproven: u64,
    /// Streams of pairs in the datapath's care, by state.
    pub stream_states: StreamStates,
}

/// All pairs.
pub struct Registry {
    policy: Policy,
    /// 32 bits in the maps.
    next_id: u32,
    /// Of the latest round of proof.
    last_epoch: u32,
    entries: BTreeMap<u64, Entry>,
    locals: HashMap<SocketAddr, (u64, usize)>,
    calls: HashMap<CallId, u64>,
    /// Which streams leave by a path: pair, and index of the leg that they come in on.
    paths: HashMap<Path, BTreeSet<(u64, usize)>>,
    /// Whose state a slot holds: pair, and index of the leg that the stream comes in on.
    slots: HashMap<u32, (u64, usize)>,
    /// Entries that the streams of all held pairs take in the map, or will.
    map_entries: usize,
    /// Of each two neighbours, the even one. Oldest first: a slot just freed may still be in the hands of a
    /// packet on another CPU.
    free_slots: VecDeque<u32>,
}

struct Entry {
    origin: Origin,
    body: Body,
}

enum Body {
    /// In the datapath's care, as far as next hops are known.
    Held {
        /// As it is relayed.
        pair: Pair,
        claim: Claim,
        streams: Box<[StreamEntry; 2]>,
    },
    /// Known, but the PBX's.
    Aside {
        pair: Option<Pair>,
        state: PairState,
        why: String,
    },
}

/// A pair as its feed describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What it joins. The wire may have corrected its local addresses since.
    pub pair: Pair,
    /// How long the PBX bears with a silent phone, by leg; none where that is not known.
    pub rtp_timeout: [Option<Duration>; 2],
}

/// A stream of a held pair; its index is that of the leg it comes in on.
struct StreamEntry {
    slot: u32,
    way: Watched,
    /// How often the PBX must hear of the phone, ticks; 0 for never.
    keepalive: u16,
    /// As it stands in the maps; none before a next hop of its pair is known.
    installed: Option<StreamSpec>,
    /// Why it was taken back or suspended.
    why: Option<String>,
    /// What it was when last looked at.
    last: StreamState,
}

impl Entry {
    /// A stream of a held pair, as it is to stand in the maps.
    fn spec(&self, policy: &Policy, id: u64, index: usize) -> Option<StreamSpec> {
        let Body::Held { pair, streams, .. } = &self.body else {
            return None;
        };
        let stream = &streams[index];
        let next_hop = match &stream.way.resolution {
            Resolution::Known(next_hop)
                if !vlans_differ(streams.each_ref().map(|stream| &stream.way)) =>
            {
                next_hop_of(next_hop)
            }
            // Its packets are counted as what they are.
            _ => stream::NextHop::default(),
        };
        let (into, out) = (&pair.legs[index], &pair.legs[1 - index]);
        Some(StreamSpec {
            source: endpoint(into.remote),
            local: endpoint(into.local),
            sends_from: endpoint(into.sends_from),
            new_source: endpoint(out.sends_from),
            new_destination: endpoint(out.remote),
            next_hop,
            dscp: match policy.dscp {
                Dscp::Keep => DSCP_KEEP,
                Dscp::Set(value) => value,
                Dscp::Map(_) => DSCP_MAP,
            },
            slot: stream.slot,
            keepalive: stream.keepalive,
            pair: u32::try_from(id).ok()?,
            is_ami: match self.origin {
                Origin::Api => false,
                Origin::Ami { .. } | Origin::Adopted => true,
            },
            proof: policy.proof_of(pair),
            priority: policy.priority_of(pair).map_or(0, Priority::value),
            own_priority: pair.priority.is_some(),
        })
    }
}

impl StreamEntry {
    /// Begins a new round, if it is installed. `index` is its leg's.
    fn start(&mut self, pair: &Pair, index: usize, last_epoch: &mut u32) -> Option<Change> {
        let spec = self.installed?;
        // 0 says "taken back".
        *last_epoch = last_epoch.checked_add(1).unwrap_or(1);
        let epoch = *last_epoch;
        self.why = None;
        Some(if spec.proof == 0 {
            Change::Offload {
                slot: spec.slot,
                epoch,
                payload_types: payload_types(pair, index),
            }
        } else {
            Change::Watch {
                slot: spec.slot,
                epoch,
            }
        })
    }
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
    /// Without pairs.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        // To grow when there are many would keep everything else waiting.
        let most = policy.max_streams as usize;
        Self {
            policy,
            next_id: 1,
            last_epoch: 0,
            entries: BTreeMap::new(),
            locals: HashMap::with_capacity(most),
            calls: HashMap::new(),
            paths: HashMap::with_capacity(most),
            slots: HashMap::with_capacity(most),
            map_entries: 0,
            free_slots: (0..policy.max_streams / 2)
                .map(|couple| 2 * couple)
                .collect(),
        }
    }

    /// Whether a pair could be taken, as far as other pairs and the room go.
    ///
    /// # Errors
    /// The [`Refusal`] that [`Registry::add`] would give.
    pub fn check(&self, pair: &Pair) -> Result<(), Refusal> {
        if let (Some(priority), None) = (
            pair.priority.and_then(Priority::effective),
            self.policy.priority,
        ) {
            return Err(Refusal::Priority(priority));
        }
        for leg in pair.legs.iter() {
            if let Some(&(id, _)) = self.locals.get(&leg.local) {
                return Err(Refusal::Duplicate {
                    local: leg.local,
                    id,
                });
            }
        }
        for leg in pair.legs.iter() {
            self.check_loop(pair, leg)?;
        }
        if self.map_entries + entries_of(pair) > self.policy.max_streams as usize {
            return Err(Refusal::Full {
                max_streams: self.policy.max_streams,
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

    /// Takes a pair whose paths are being watched. `watched` and `rtp_timeout` belong to its legs; the
    /// latter is none where the PBX's patience with a silent leg is not known.
    ///
    /// # Errors
    /// A [`Refusal`]; nothing has changed then, and the caller ends the watches.
    pub fn add(
        &mut self,
        origin: Origin,
        pair: Pair,
        watched: [Watched; 2],
        rtp_timeout: [Option<Duration>; 2],
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
        let Some(slot) = self.free_slots.pop_front() else {
            return Err(Refusal::Full {
                max_streams: self.policy.max_streams,
            });
        };

        let id = match &origin {
            Origin::Ami { call, .. } => self.id_of(call),
            Origin::Api | Origin::Adopted => self.new_id(),
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
        let keepalives = self.keepalives(&origin, &pair, rtp_timeout);
        let stream = |slot, way, keepalive| StreamEntry {
            slot,
            way,
            keepalive,
            installed: None,
            why: None,
            last: StreamState::Waiting,
        };
        let streams = Box::new([
            stream(slot, to_second, keepalives[0]),
            stream(opposite(slot), to_first, keepalives[1]),
        ]);
        self.slots.insert(slot, (id, 0));
        self.slots.insert(opposite(slot), (id, 1));
        self.map_entries += entries_of(&pair);
        self.entries.insert(
            id,
            Entry {
                origin,
                body: Body::Held {
                    claim: Claim {
                        pair: pair.clone(),
                        rtp_timeout,
                    },
                    pair,
                    streams,
                },
            },
        );
        Ok((id, self.settle(id)))
    }

    /// Sorts what an earlier daemon left in the maps: pairs that can be taken over, and streams that
    /// make none. `state` reads a slot.
    #[must_use]
    pub fn heirlooms(
        &self,
        streams: &[(StreamKey, Stream)],
        state: impl Fn(u32) -> State,
    ) -> (Vec<Heirloom>, Vec<StreamSpec>) {
        let mut pairs: BTreeMap<u64, Vec<StreamSpec>> = BTreeMap::new();
        for (key, stream) in streams {
            let spec = stream.spec(key);
            pairs.entry(spec.pair.into()).or_default().push(spec);
        }
        let (mut heirlooms, mut orphans) = (Vec::new(), Vec::new());
        for (id, mut specs) in pairs {
            specs.sort_unstable_by_key(|spec| spec.slot);
            match <[StreamSpec; 2]>::try_from(specs) {
                Ok(mut specs) => {
                    let [one, other] = &mut specs;
                    one.sends_from = other.new_source;
                    other.sends_from = one.new_source;
                    match heirloom(id, &specs, self.policy, &state) {
                        Some(heirloom) => heirlooms.push(heirloom),
                        None => orphans.extend(specs),
                    }
                }
                Err(specs) => orphans.extend(specs),
            }
        }
        (heirlooms, orphans)
    }

    /// Takes a pair over, in which its streams go on as they are. `watched` belong to its legs.
    ///
    /// # Errors
    /// A [`Refusal`]; nothing has changed then, and the caller ends the watches.
    pub fn adopt(
        &mut self,
        heirloom: Heirloom,
        watched: [Watched; 2],
    ) -> Result<Vec<Change>, Refusal> {
        let Heirloom {
            id,
            pair,
            origin,
            specs,
            last_epoch,
        } = heirloom;
        self.check(&pair)?;
        let slots = specs.map(|spec| spec.slot);
        if slots.iter().any(|slot| self.slots.contains_key(slot)) {
            return Err(Refusal::Full {
                max_streams: self.policy.max_streams,
            });
        }
        self.next_id = self.next_id.max(specs[0].pair.saturating_add(1));
        self.last_epoch = self.last_epoch.max(last_epoch);
        self.map_entries += entries_of(&pair);
        for (index, leg) in pair.legs.iter().enumerate() {
            self.locals.insert(leg.local, (id, index));
            self.slots.insert(slots[index], (id, index));
            self.paths
                .entry(path_to(leg))
                .or_default()
                .insert((id, 1 - index));
        }
        let [to_first, to_second] = watched;
        let stream = |index: usize, way| StreamEntry {
            slot: slots[index],
            way,
            keepalive: specs[index].keepalive,
            installed: Some(specs[index]),
            why: None,
            last: StreamState::Waiting,
        };
        let streams = Box::new([stream(0, to_second), stream(1, to_first)]);
        let body = Body::Held {
            claim: Claim {
                pair: pair.clone(),
                rtp_timeout: [None; 2],
            },
            pair,
            streams,
        };
        self.entries.insert(id, Entry { origin, body });
        Ok(self.settle(id))
    }

    /// To be called after the last [`Registry::adopt`]: the slots of what was adopted are not free.
    pub fn adopted(&mut self) {
        self.free_slots
            .retain(|slot| !self.slots.contains_key(slot));
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

    /// A number that no pair has. None comes again before all have had their turn.
    fn new_id(&mut self) -> u64 {
        loop {
            let id = u64::from(self.next_id);
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
            if !self.entries.contains_key(&id) {
                return id;
            }
        }
    }

    /// A third of each leg's timeout, in ticks: two attempts may fail. A pair without proof may have
    /// no PBX behind it that would miss the phone.
    fn keepalives(
        &self,
        origin: &Origin,
        pair: &Pair,
        rtp_timeout: [Option<Duration>; 2],
    ) -> [u16; 2] {
        if *origin == Origin::Api && self.policy.proof_of(pair) == 0 {
            return [0; 2];
        }
        rtp_timeout.map(|timeout| {
            let interval = timeout.map_or(self.policy.keepalive, |timeout| timeout / 3);
            // At most 68 s, sooner than it would have to be.
            u16::try_from(ticks(interval.as_nanos() as u64)).unwrap_or(u16::MAX)
        })
    }

    /// Brings the maps in line with what is known of the next hops of a pair.
    ///
    /// Its streams come into the maps together, as soon as one of them can be relayed: each says where
    /// the other's echoes leave.
    fn settle(&mut self, id: u64) -> Vec<Change> {
        let Some(entry) = self.entries.get_mut(&id) else {
            return Vec::new();
        };
        let specs = [0, 1].map(|index| entry.spec(&self.policy, id, index));
        let Body::Held { pair, streams, .. } = &mut entry.body else {
            return Vec::new();
        };
        if let [Some(one), Some(other)] = specs
            && !one.next_hop.is_known()
            && !other.next_hop.is_known()
            && streams[0].installed.is_none()
        {
            return Vec::new();
        }
        let mut changes = Vec::with_capacity(4);
        let mut begun = Vec::with_capacity(2);
        for (index, spec) in specs.into_iter().enumerate() {
            let Some(spec) = spec else {
                continue;
            };
            match streams[index].installed.replace(spec) {
                // What is in the maps already need not be written again.
                Some(before) if before == spec => {}
                Some(_) => changes.push(Change::Update(spec)),
                None => {
                    changes.push(Change::Install(spec));
                    begun.push(index);
                }
            }
        }
        let last_epoch = &mut self.last_epoch;
        let begin = |index: usize| streams[index].start(pair, index, last_epoch);
        changes.extend(begun.into_iter().filter_map(begin));
        changes
    }

    fn stream_mut(&mut self, id: u64, index: usize) -> Option<&mut StreamEntry> {
        match &mut self.entries.get_mut(&id)?.body {
            Body::Held { streams, .. } => Some(&mut streams[index]),
            Body::Aside { .. } => None,
        }
    }

    /// Begins a new round with a stream that is installed.
    fn start(&mut self, id: u64, index: usize) -> Option<Change> {
        let Some(Entry {
            body: Body::Held { pair, streams, .. },
            ..
        }) = self.entries.get_mut(&id)
        else {
            return None;
        };
        streams[index].start(pair, index, &mut self.last_epoch)
    }

    /// Begins a new round with the streams of a pair that are taken back or suspended. `state` reads
    /// a slot.
    pub fn restart(&mut self, id: u64, state: impl Fn(u32) -> State) -> Vec<Change> {
        (0..2)
            .filter_map(|index| {
                let stopped = self
                    .stream_mut(id, index)
                    .is_some_and(|stream| stream_state(stream, &state) == StreamState::Suspended);
                stopped.then(|| self.start(id, index)).flatten()
            })
            .collect()
    }

    /// Takes a pair's streams back; they stay in the maps.
    pub fn stop(&mut self, id: u64, why: &str) -> Vec<Change> {
        (0..2)
            .filter_map(|index| {
                let stream = self.stream_mut(id, index)?;
                stream.why = Some(why.to_owned());
                stream
                    .installed
                    .map(|spec| Change::TakeBack { slot: spec.slot })
            })
            .collect()
    }

    /// Remembers why the datapath suspended the streams of a pair.
    pub fn explain(&mut self, id: u64, why: &str) {
        for index in 0..2 {
            if let Some(stream) = self.stream_mut(id, index) {
                stream.why = Some(why.to_owned());
            }
        }
    }

    /// Begins a new round with one stream that is offloaded, as after a long silence.
    pub fn doubt(&mut self, id: u64, leg: usize) -> Option<Change> {
        self.start(id, leg)
    }

    /// The pair and the leg of a slot.
    #[must_use]
    pub fn owner(&self, slot: u32) -> Option<(u64, usize)> {
        self.slots.get(&slot).copied()
    }

    /// The streams of a pair that are another thing than when last looked at. `mode` reads a slot.
    pub fn turns(&mut self, id: u64, mode: impl Fn(u32) -> u32) -> Vec<Turn> {
        let Some(Entry {
            body: Body::Held { streams, .. },
            ..
        }) = self.entries.get_mut(&id)
        else {
            return Vec::new();
        };
        let turns = streams.iter_mut().enumerate().filter_map(|(leg, stream)| {
            let now = stream_state_by(stream, &mode);
            let before = mem::replace(&mut stream.last, now);
            (before != now).then_some(Turn { pair: id, leg, now })
        });
        turns.collect()
    }

    /// How a pair stood when last looked at; none unless both of its streams are in the maps and know their
    /// way.
    #[must_use]
    pub fn standing(&self, id: u64) -> Option<Standing> {
        let entry = self.entries.get(&id)?;
        let Body::Held { streams, .. } = &entry.body else {
            return None;
        };
        let is_known = |stream: &StreamEntry| matches!(stream.way.resolution, Resolution::Known(_));
        if !streams.iter().all(is_known) {
            return None;
        }
        let proofs = [streams[0].installed?.proof, streams[1].installed?.proof];
        Some(Standing {
            slots: [streams[0].slot, streams[1].slot],
            states: [streams[0].last, streams[1].last],
            provable: proofs.map(|proof| proof != 0 && entry.origin != Origin::Api),
        })
    }

    /// A stream as it stands in the maps.
    #[must_use]
    pub fn installed(&self, id: u64, leg: usize) -> Option<StreamSpec> {
        match &self.entries.get(&id)?.body {
            Body::Held { streams, .. } => streams[leg].installed,
            Body::Aside { .. } => None,
        }
    }

    /// A path that a pair leaves by has changed.
    pub fn resolved(&mut self, notice: &Notice) -> Vec<Change> {
        let Some(streams) = self.paths.get(&notice.path) else {
            return Vec::new();
        };
        let mut touched = Vec::new();
        for (id, index) in streams.clone() {
            let Some(StreamEntry { way, .. }) = self.stream_mut(id, index) else {
                continue;
            };
            if way.serial == notice.serial && way.resolution != notice.resolution {
                way.resolution = notice.resolution.clone();
                touched.push(id);
            }
        }
        // Both streams of a pair may leave by the path.
        touched.dedup();
        touched.into_iter().flat_map(|id| self.settle(id)).collect()
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
        let Body::Held { pair, streams, .. } = mem::replace(&mut entry.body, aside) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        for (index, stream) in streams.iter().enumerate() {
            let leg = &pair.legs[index];
            if let Some(spec) = stream.installed {
                changes.push(Change::Remove(spec));
            }
            self.slots.remove(&stream.slot);
            self.locals.remove(&leg.local);
        }
        self.free_slots.push_back(streams[0].slot);
        self.map_entries -= entries_of(&pair);
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

    /// The pairs of the AMI feed that hold a local address of this pair: they must be over, since
    /// Asterisk has given the address to another.
    #[must_use]
    pub fn in_the_way(&self, pair: &Pair) -> BTreeSet<u64> {
        pair.legs
            .iter()
            .filter_map(|leg| self.locals.get(&leg.local))
            .filter(|(id, _)| self.is_ami(*id))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The number of a call that is relayed as Asterisk describes it here.
    #[must_use]
    pub fn held_as(&self, call: &CallId, pair: &Pair) -> Option<u64> {
        let id = *self.calls.get(call)?;
        match &self.entries.get(&id)?.body {
            Body::Held { claim, .. } => (claim.pair == *pair).then_some(id),
            Body::Aside { .. } => None,
        }
    }

    /// Gives an adopted pair its call, if Asterisk describes one just so.
    pub fn recognise(
        &mut self,
        call: &CallId,
        offered: &Claim,
        channels: &[String],
    ) -> Option<u64> {
        if self.calls.contains_key(call) {
            return None;
        }
        let &(id, _) = self.locals.get(&offered.pair.legs[0].local)?;
        let entry = self.entries.get_mut(&id)?;
        let Body::Held {
            pair: held, claim, ..
        } = &mut entry.body
        else {
            return None;
        };
        if entry.origin != Origin::Adopted || held.legs != offered.pair.legs {
            return None;
        }
        *claim = offered.clone();
        entry.origin = Origin::Ami {
            call: call.clone(),
            channels: channels.to_vec(),
        };
        self.calls.insert(call.clone(), id);
        Some(id)
    }

    /// Where a pair comes from.
    #[must_use]
    pub fn origin(&self, id: u64) -> Option<&Origin> {
        Some(&self.entries.get(&id)?.origin)
    }

    /// The call of a pair that AMI fed.
    #[must_use]
    pub fn call(&self, id: u64) -> Option<&CallId> {
        match &self.entries.get(&id)?.origin {
            Origin::Ami { call, .. } => Some(call),
            Origin::Api | Origin::Adopted => None,
        }
    }

    /// What a pair is relayed as, and what its feed said, while it is in the datapath's care.
    #[must_use]
    pub fn held(&self, id: u64) -> Option<(&Pair, &Claim)> {
        match &self.entries.get(&id)?.body {
            Body::Held { pair, claim, .. } => Some((pair, claim)),
            Body::Aside { .. } => None,
        }
    }

    /// Keeps in mind what the feed said of a pair that is relayed otherwise.
    pub fn claim(&mut self, id: u64, claimed: Claim) {
        if let Some(Entry {
            body: Body::Held { claim, .. },
            ..
        }) = self.entries.get_mut(&id)
        {
            *claim = claimed;
        }
    }

    /// The channels of a pair's legs.
    #[must_use]
    pub fn channels(&self, id: u64) -> Vec<String> {
        match self.entries.get(&id).map(|entry| &entry.origin) {
            Some(Origin::Ami { channels, .. }) => channels.clone(),
            _ => Vec::new(),
        }
    }

    /// The number of a call.
    #[must_use]
    pub fn id(&self, call: &CallId) -> Option<u64> {
        self.calls.get(call).copied()
    }

    /// Whether Asterisk fed a pair.
    #[must_use]
    pub fn is_ami(&self, id: u64) -> bool {
        self.entries
            .get(&id)
            .is_some_and(|entry| entry.origin != Origin::Api)
    }

    /// Whether a pair is in the datapath's care.
    #[must_use]
    pub fn is_held(&self, id: u64) -> bool {
        self.held(id).is_some()
    }

    /// All pairs of the AMI feed, those set aside included.
    #[must_use]
    pub fn ami_ids(&self) -> BTreeSet<u64> {
        self.ids().filter(|id| self.is_ami(*id)).collect()
    }

    /// All pairs' numbers, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries.keys().copied()
    }

    /// Those that follow on a number.
    pub fn ids_after(&self, id: u64) -> impl Iterator<Item = u64> + '_ {
        let after = (Bound::Excluded(id), Bound::Unbounded);
        self.entries.range(after).map(|(id, _)| *id)
    }

    /// Why a stream is not offloaded, in words; none where it is, or where its pair is the PBX's. `state`
    /// reads a slot.
    pub fn why_stopped(&self, id: u64, leg: usize, state: impl Fn(u32) -> State) -> Option<String> {
        let Body::Held { streams, .. } = &self.entries.get(&id)?.body else {
            return None;
        };
        let stream = &streams[leg];
        let state = state(stream.slot);
        why_not(stream, stream_state(stream, &|_| state), &state)
    }

    /// Pairs by state. `state` reads a slot.
    pub fn census(&self, state: impl Fn(u32) -> State) -> Census {
        let mut census = Census::default();
        for entry in self.entries.values() {
            census.pairs += 1;
            if let Body::Held { pair, streams, .. } = &entry.body {
                census.unproven += u64::from(self.policy.proof_of(pair) == 0);
                for stream in streams.iter() {
                    census.stream_states.count(stream_state(stream, &state));
                }
                census.streams += streams
                    .iter()
                    .filter(|stream| stream.installed.is_some())
                    .count() as u64;
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
    pub fn report(&self, id: u64, state: impl Fn(u32) -> State, now: Now) -> Option<PairReport> {
        let entry = self.entries.get(&id)?;
        let (feed, call, channels) = match &entry.origin {
            Origin::Api => (Feed::Api, None, &[][..]),
            Origin::Adopted => (Feed::Ami, None, &[][..]),
            Origin::Ami { call, channels } => {
                (Feed::Ami, Some(call.to_string()), channels.as_slice())
            }
        };
        let read = match &entry.body {
            Body::Held { streams, .. } => streams
                .each_ref()
                .map(|stream| (stream.slot, state(stream.slot))),
            Body::Aside { .. } => Default::default(),
        };
        // Once for all that is asked of them below, which is then of one moment, too.
        let state = |slot| {
            let read = read.iter().find(|(of, _)| *of == slot);
            read.map_or_else(State::default, |(_, state)| *state)
        };
        let (pair_state, why) = summary(&entry.body, &state);
        let (pair, streams) = match &entry.body {
            Body::Held { pair, streams, .. } => (Some(pair), Some(streams)),
            Body::Aside { pair, .. } => (pair.as_ref(), None),
        };
        let legs = pair.map_or(&[][..], |pair| pair.legs.as_slice());
        let streams = legs
            .iter()
            .zip(streams.into_iter().flat_map(|streams| streams.iter()))
            .enumerate()
            .map(|(index, (leg, stream))| {
                let counted = match stream.installed {
                    Some(spec) => state(spec.slot),
                    None => State::default(),
                };
                let stream_state = stream_state(stream, &state);
                StreamReport {
                    leg: index as u8,
                    from: leg.remote,
                    to: legs[1 - index].remote,
                    state: stream_state,
                    why: why_not(stream, stream_state, &counted),
                    proof: stream
                        .installed
                        .filter(|spec| spec.proof != 0)
                        .map(|spec| progress(&counted, spec.proof)),
                    silent_ms: (counted.last_seen != 0 && stream_state != StreamState::Suspended)
                        .then(|| {
                            // The datapath's clock may be a tick ahead.
                            let ticks = ticks(now.monotonic).wrapping_sub(counted.last_seen) as i32;
                            ticks_to_ms(ticks.max(0).cast_unsigned())
                        }),
                    packets: counted.packets,
                    bytes: counted.bytes,
                    marks: marks(&counted),
                    reception: reception::report(&counted.reception, now),
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
                    sends_from: leg.sends_from,
                    channel: channels.get(index).cloned(),
                })
                .collect(),
            proof: pair.map_or_else(Proof::default, |pair| pair.proof),
            priority: pair.and_then(|pair| self.policy.priority_of(pair)),
            payload_types: self.payload_types_of(&entry.body, &state),
            streams,
        })
    }

    /// What is relayed of a pair: as proven so far, or as given.
    fn payload_types_of(&self, body: &Body, state: &impl Fn(u32) -> State) -> Vec<PayloadTypes> {
        let (pair, streams) = match body {
            Body::Held { pair, streams, .. } => (pair, streams),
            Body::Aside { pair, .. } => {
                return pair
                    .as_ref()
                    .map_or_else(Vec::new, |pair| pair.payload_types.clone());
            }
        };
        if self.policy.proof_of(pair) == 0 {
            return pair.payload_types.clone();
        }
        let mut all = Vec::new();
        for (index, stream) in streams.iter().enumerate() {
            let proven = stream.installed.map(|spec| state(spec.slot));
            let proven = proven.filter(|state| state.mode() == mode::OFFLOADED);
            for types in proven.into_iter().flat_map(|state| state.payload_types) {
                let [first, second] = match index {
                    0 => [types.from, types.to],
                    _ => [types.to, types.from],
                };
                let types_of_pair = PayloadTypes { first, second };
                if types != PayloadType::UNUSED && !all.contains(&types_of_pair) {
                    all.push(types_of_pair);
                }
            }
        }
        all
    }
}

/// Entries that the streams of a pair take in the map: where the PBX does not send from where it receives, a
/// stream has two.
fn entries_of(pair: &Pair) -> usize {
    let elsewhere = pair.legs.iter().filter(|leg| leg.sends_from != leg.local);
    2 + elsewhere.count()
}

/// Two streams as the pair that they make, if they do.
fn heirloom(
    id: u64,
    specs: &[StreamSpec; 2],
    policy: Policy,
    state: impl Fn(u32) -> State,
) -> Option<Heirloom> {
    let address = |endpoint: Endpoint| SocketAddr::new(endpoint.address.into(), endpoint.port);
    let [one, other] = specs;
    let fits = |into: &StreamSpec, back: &StreamSpec| {
        into.new_destination == back.source
            && into.slot == opposite(back.slot)
            && into.is_ami == back.is_ami
            && into.proof == back.proof
            // Without a proof it has nothing to relay by, and with one it need not go unproven.
            && (into.proof == 0 || policy.proof != 0)
            && (!into.is_ami || (into.proof == 0) == (policy.proof == 0))
            && into.slot < policy.max_streams
    };
    if !fits(one, other) || !fits(other, one) {
        return None;
    }
    let leg = |into: &StreamSpec, back: &StreamSpec| Leg {
        local: address(into.local),
        remote: address(into.source),
        sends_from: address(back.new_source),
    };
    let states = [state(one.slot), state(other.slot)];
    let (proof, types) = match one.proof {
        0 => (Proof::None, states[0].payload_types),
        _ => (Proof::Wire, [PayloadType::UNUSED; PAYLOAD_TYPES]),
    };
    let types = types
        .iter()
        .filter(|types| **types != PayloadType::UNUSED)
        .map(|types| PayloadTypes {
            first: types.from,
            second: types.to,
        });
    let own = one.own_priority.then(|| Priority::new(one.priority));
    let pair = Pair::new([leg(one, other), leg(other, one)], types.collect(), proof).ok()?;
    Some(Heirloom {
        id,
        pair: pair.with_priority(own),
        origin: if one.is_ami {
            Origin::Adopted
        } else {
            Origin::Api
        },
        specs: *specs,
        // A stream that was taken back has epoch 0, but still counts as proven in its last round.
        last_epoch: states
            .iter()
            .flat_map(|state| [state.epoch, state.proven, state.suspended, state.watched])
            .max()
            .unwrap_or_default(),
    })
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
    let stopped = streams.iter().find_map(|stream| {
        let stream_state = stream_state(stream, state);
        (stream_state != StreamState::Offloaded)
            .then(|| why_not(stream, stream_state, &state(stream.slot)))
    });
    match stopped {
        None => (PairState::Offloaded, None),
        Some(why) => (PairState::Waiting, why),
    }
}

fn stream_state(stream: &StreamEntry, state: &impl Fn(u32) -> State) -> StreamState {
    stream_state_by(stream, &|slot| state(slot).mode())
}

/// The same where `mode` reads no more of a slot.
fn stream_state_by(stream: &StreamEntry, mode: &impl Fn(u32) -> u32) -> StreamState {
    match (&stream.installed, &stream.way.resolution) {
        (Some(spec), Resolution::Known(_)) => StreamState::of_mode(mode(spec.slot)),
        _ => StreamState::Waiting,
    }
}

/// Why a stream is not offloaded, in words.
fn why_not(stream: &StreamEntry, stream_state: StreamState, state: &State) -> Option<String> {
    let of = stream.installed.map_or(0, |spec| spec.proof);
    match stream_state {
        StreamState::Offloaded => None,
        StreamState::Waiting => Some(match &stream.way.resolution {
            Resolution::Waiting {
                neighbour,
                interface,
            } => format!("waiting for neighbour {neighbour} on {interface}"),
            Resolution::Unreachable(error) => error.to_string(),
            Resolution::Known(_) => VLANS_DIFFER.to_owned(),
        }),
        StreamState::Suspended => Some(
            stream
                .why
                .clone()
                .unwrap_or_else(|| "taken back".to_owned()),
        ),
        StreamState::Watching => Some(why_unproven(state, of)),
    }
}

/// Why a stream that is watched is not offloaded yet, in words; `of` packets in a row prove it.
#[must_use]
pub fn why_unproven(state: &State, of: u8) -> String {
    if state.last_seen == 0 {
        return format!("proof 0/{of}: no packet from the phone yet");
    }
    let progress = progress(state, of);
    let mut why = format!("proof {}/{of}", progress.equal);
    if progress.equal == 0 && progress.unequal > 0 {
        why.push_str(": ");
        why.push_str(difference(state));
    } else if progress.equal == 0 {
        why.push_str(": nothing came out of the PBX yet");
    } else if progress.equal >= u16::from(of) {
        why.push_str(", but the PBX itself speaks to this phone");
    }
    why
}

fn progress(state: &State, of: u8) -> ProofReport {
    let (equal, unequal) = match state.mode() {
        mode::OFFLOADED => (u16::from(of), 0),
        _ if state.watched == state.epoch => (state.equal.min(u16::from(of)), state.unequal),
        _ => (0, 0),
    };
    ProofReport { equal, of, unequal }
}

/// In what the PBX's packets differ from the phone's, as far as the last of each tell.
fn difference(state: &State) -> &'static str {
    let (heard, sent) = (&state.heard, &state.sent);
    let number = |halves: [relay_common::wire::Be16; 2]| {
        u32::from(halves[0].get()) << 16 | u32::from(halves[1].get())
    };
    // One of the two may be a few packets behind.
    const NEAR: u32 = 16;
    let near = |one: u32, other: u32, unit: u32| {
        one.wrapping_sub(other).min(other.wrapping_sub(one)) <= NEAR * unit
    };
    let sequence = |rtp: &relay_common::wire::Rtp| u32::from(rtp.sequence.get());
    if number(heard.ssrc) != number(sent.ssrc) {
        "the PBX sends it with another SSRC"
    } else if !near(sequence(heard), sequence(sent), 1) {
        "the PBX sends it with other sequence numbers"
    } else if !near(number(heard.timestamp), number(sent.timestamp), 6000) {
        "the PBX sends it with other timestamps"
    } else if state.heard_length != state.sent_length {
        "the PBX sends packets of another length"
    } else {
        "the PBX changes the payload, or sends to another address"
    }
}

/// Milliseconds of a number of ticks.
fn ticks_to_ms(ticks: u32) -> u64 {
    (u64::from(ticks) << 20) / 1_000_000
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

/// What DSCP a stream's packets came with, the most frequent first.
fn marks(state: &State) -> Vec<MarkReport> {
    let mut marks: Vec<_> = state
        .reception
        .marks()
        .map(|mark| MarkReport {
            dscp: mark.dscp,
            packets: mark.packets,
        })
        .collect();
    marks.sort_by_key(|mark| Reverse(mark.packets));
    marks
}

/// What is relayed of the stream that comes in on leg `index`, as given.
fn payload_types(pair: &Pair, index: usize) -> [PayloadType; PAYLOAD_TYPES] {
    let mut payload_types = [PayloadType::UNUSED; PAYLOAD_TYPES];
    for (entry, types) in payload_types.iter_mut().zip(&pair.payload_types) {
        let (from, to) = match index {
            0 => (types.first, types.second),
            _ => (types.second, types.first),
        };
        *entry = PayloadType { from, to };
    }
    payload_types
}

fn next_hop_of(next_hop: &NextHop) -> stream::NextHop {
    let mac = |which: fn(Macs) -> [u8; 6]| Mac {
        bytes: next_hop.macs.map(which).unwrap_or_default(),
    };
    let mut vlans = [stream::VlanTag::default(); 2];
    for (entry, tag) in vlans.iter_mut().zip(&next_hop.vlan) {
        *entry = stream::VlanTag::new(tag.protocol, tag.id);
    }
    stream::NextHop {
        destination_mac: mac(|macs| macs.destination),
        source_mac: mac(|macs| macs.source),
        vlans,
        mtu: next_hop.mtu,
    }
}

/// Without the formatting machinery: a long list has four for each pair.
fn mac_text(bytes: [u8; 6]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value & 0xf)]);
    let mut text = String::with_capacity("00:00:00:00:00:00".len());
    for byte in bytes {
        if !text.is_empty() {
            text.push(':');
        }
        text.push(digit(byte >> 4));
        text.push(digit(byte));
    }
    text
}

fn next_hop_report(next_hop: &NextHop) -> NextHopReport {
    let mac = |which: fn(Macs) -> [u8; 6]| next_hop.macs.map(|macs| mac_text(which(macs)));
    NextHopReport {
        source_mac: mac(|macs| macs.source),
        destination_mac: mac(|macs| macs.destination),
        vlan: next_hop.vlan.iter().map(|tag| tag.id).collect(),
        mtu: u32::from(next_hop.mtu),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pair::PayloadTypes;

    /// A moment of the datapath's clock, in ticks.
    fn at(ticks: u64) -> Now {
        Now {
            monotonic: ticks << 20,
            wall: std::time::SystemTime::UNIX_EPOCH,
        }
    }

    fn registry(max_streams: u32) -> Registry {
        with_priority(max_streams, None)
    }

    fn with_priority(max_streams: u32, priority: Option<u32>) -> Registry {
        Registry::new(Policy {
            dscp: Dscp::Set(46),
            priority: priority.map(Priority::new),
            max_streams,
            proof: 8,
            keepalive: Duration::from_secs(3),
        })
    }

    /// Nothing is known of the PBX's patience.
    const UNKNOWN: [Option<Duration>; 2] = [None; 2];

    fn pair(first: &str, second: &str) -> Pair {
        let leg = |text: &str| text.parse().expect(text);
        let types = vec![
            PayloadTypes::same(0),
            PayloadTypes {
                first: 101,
                second: 96,
            },
        ];
        Pair::new([leg(first), leg(second)], types, Proof::None).expect("pair")
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
            macs: Some(Macs {
                source: [2, 0, 0, 0, 0, 1],
                destination: [2, 0, 0, 0, 0, last_byte],
            }),
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
            epoch: 1,
            proven: 1,
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
            .add(Origin::Api, pair, [known(11), known(12)], UNKNOWN)
            .expect("room");
        let [
            Change::Install(one),
            Change::Install(other),
            Change::Offload {
                payload_types: there,
                slot,
                epoch,
            },
            Change::Offload {
                payload_types: back,
                ..
            },
        ] = changes.as_slice()
        else {
            panic!("{changes:?}");
        };
        assert_eq!((*slot, *epoch), (one.slot, 1));
        assert_eq!((one.local.port, other.local.port), (10_000, 10_002));
        assert_eq!((one.source.port, other.source.port), (30_000, 30_002));
        assert_eq!(
            (one.new_source.port, one.new_destination.port),
            (10_002, 30_002)
        );
        assert_eq!(
            one.next_hop.destination_mac.bytes[5], 12,
            "towards the second leg"
        );
        assert_eq!(other.next_hop.destination_mac.bytes[5], 11);
        assert_eq!(
            (one.slot, other.slot),
            (opposite(other.slot), opposite(one.slot))
        );
        assert_eq!([one.slot, other.slot].map(stream::leg_of), [0, 1]);
        let renumbered = |types: &[PayloadType]| (types[1].from, types[1].to);
        assert_eq!(
            (renumbered(there), renumbered(back)),
            ((101, 96), (96, 101))
        );
        assert_eq!((one.dscp, one.keepalive), (46, 0));

        let report = registry.report(id, offloaded, at(0)).expect("report");
        assert_eq!((report.state, report.why), (PairState::Offloaded, None));
        assert_eq!(report.streams[0].packets, 7);
    }

    #[test]
    fn an_unresolved_stream_is_not_relayed_and_says_what_it_waits_for() {
        let mut registry = registry(2);
        let pair = numbered(0);
        let [to_first, to_second] = Registry::paths_of(&pair);
        let (id, changes) = registry
            .add(Origin::Api, pair, [waiting(), waiting()], UNKNOWN)
            .expect("room");
        assert!(changes.is_empty(), "nothing to relay: {changes:?}");

        // Both, for each says where the other's echoes leave.
        let changes = registry.resolved(&notice(to_first, known(11)));
        assert!(
            matches!(
                changes.as_slice(),
                [
                    Change::Install(one),
                    Change::Install(other),
                    Change::Offload { .. },
                    Change::Offload { .. },
                ] if !one.next_hop.is_known() && other.next_hop.is_known() && other.local.port == 10_001
            ),
            "{changes:?}"
        );
        let report = registry.report(id, offloaded, at(0)).expect("report");
        assert_eq!(report.state, PairState::Waiting);
        assert!(report.why.expect("why").contains("192.0.2.12"));
        let states: Vec<_> = report.streams.iter().map(|stream| stream.state).collect();
        assert_eq!(states, [StreamState::Waiting, StreamState::Offloaded]);

        let changes = registry.resolved(&notice(to_second, known(12)));
        assert!(matches!(changes.as_slice(), [Change::Update(spec)] if spec.local.port == 10_000));
        assert!(
            registry.resolved(&notice(to_second, known(12))).is_empty(),
            "nothing new"
        );

        let changes = registry.resolved(&notice(to_second, known(99)));
        assert!(
            matches!(changes.as_slice(), [Change::Update(spec)] if spec.next_hop.destination_mac.bytes[5] == 99)
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
            matches!(changes.as_slice(), [Change::Update(spec)] if !spec.next_hop.is_known()),
            "the datapath must stop using the lost neighbour: {changes:?}"
        );
    }

    #[test]
    fn a_leg_that_is_sent_on_from_elsewhere_takes_room_for_two() {
        let mut registry = registry(6);
        let hop = || [known(1), known(2)];
        let elsewhere = |number| {
            let mut pair = numbered(number);
            pair.legs[0].sends_from.set_port(9);
            pair
        };
        let add = |registry: &mut Registry, pair| {
            let added = registry.add(Origin::Api, pair, hop(), UNKNOWN);
            added.map(|(id, _)| id)
        };
        let first = add(&mut registry, elsewhere(0)).expect("room for six");
        add(&mut registry, elsewhere(1)).expect("room for three");
        let full = Refusal::Full { max_streams: 6 };
        assert_eq!(add(&mut registry, numbered(2)), Err(full));
        registry.remove(first);
        add(&mut registry, numbered(2)).expect("room again");
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
                UNKNOWN,
            )
            .expect("room");
        let same = pair("192.0.2.1:5=198.51.100.5:5", "192.0.2.1:3=198.51.100.9:9");
        assert!(matches!(
            registry.add(Origin::Api, same, hop(), UNKNOWN),
            Err(Refusal::Duplicate { id: other, .. }) if other == id
        ));
        // Two hosts' pairs seen from one registry: each sends into the other.
        let circle = pair("198.51.100.1:1=192.0.2.1:1", "198.51.100.3:3=192.0.2.1:3");
        let error = registry
            .add(Origin::Api, circle, hop(), UNKNOWN)
            .expect_err("circle");
        assert!(
            matches!(error, Refusal::Loop { id: other, .. } if other == id),
            "{error}"
        );
        // A chain is no circle.
        let chain = pair("198.51.100.1:1=192.0.2.1:1", "198.51.100.9:9=192.0.2.99:9");
        registry
            .add(Origin::Api, chain, hop(), UNKNOWN)
            .expect("no circle");

        let error = registry
            .add(Origin::Api, numbered(0), hop(), UNKNOWN)
            .expect_err("full");
        assert_eq!(error, Refusal::Full { max_streams: 4 });
        assert_eq!(error.code(), ErrorCode::MapFull);
        registry.remove(id);
        registry
            .add(Origin::Api, numbered(0), hop(), UNKNOWN)
            .expect("room again");
    }

    #[test]
    fn a_refused_next_hop_changes_nothing() {
        let mut registry = registry(2);
        let no_route = NextHopError::LinkDown("eth0".to_owned());
        let ways = [known(1), way(Resolution::Unreachable(no_route.clone()))];
        assert_eq!(
            registry.add(Origin::Api, numbered(0), ways, UNKNOWN),
            Err(Refusal::NextHop(no_route))
        );
        assert_eq!(registry.ids().count(), 0);
        registry
            .add(Origin::Api, numbered(0), [known(1), known(2)], UNKNOWN)
            .expect("slots are still free");
    }

    #[test]
    fn a_call_set_aside_keeps_its_number_and_frees_its_streams() {
        let mut registry = registry(2);
        let hop = || [known(1), known(2)];
        let (id, _) = registry
            .add(from_ami(1), numbered(0), hop(), UNKNOWN)
            .expect("room");
        let changes = registry.set_aside(
            &call(1),
            None,
            PairState::Waiting,
            "leg A on hold".to_owned(),
        );
        let removed = changes
            .iter()
            .filter(|change| matches!(change, Change::Remove(_)));
        assert_eq!(removed.count(), 2);
        let unwatched = changes
            .iter()
            .filter(|change| matches!(change, Change::Unwatch(_)));
        assert_eq!(unwatched.count(), 2, "every watch is ended");
        let report = registry.report(id, offloaded, at(0)).expect("still known");
        assert_eq!(report.why.as_deref(), Some("leg A on hold"));
        assert_eq!(report.legs[1].channel.as_deref(), Some("PJSIP/b"));
        assert!(report.streams.is_empty());

        let again = registry
            .add(from_ami(1), numbered(0), hop(), UNKNOWN)
            .expect("offered again");
        assert_eq!(again.0, id);
        assert_eq!(registry.id(&call(1)), Some(id));
        assert_eq!(registry.remove(id).len(), 4);
        assert_eq!(registry.id(&call(1)), None);
        assert_eq!(registry.census(offloaded), Census::default());
    }

    fn proven_pair() -> Pair {
        Pair {
            proof: Proof::Wire,
            payload_types: Vec::new(),
            ..numbered(0)
        }
    }

    #[test]
    fn a_pair_with_proof_is_watched_and_says_how_far_it_is() {
        let mut registry = registry(2);
        let timeouts = [Some(Duration::from_secs(30)), None];
        let (id, changes) = registry
            .add(from_ami(1), proven_pair(), [known(11), known(12)], timeouts)
            .expect("room");
        let [
            Change::Install(one),
            Change::Install(other),
            Change::Watch { slot, epoch },
            Change::Watch { epoch: second, .. },
        ] = changes.as_slice()
        else {
            panic!("{changes:?}");
        };
        assert_eq!((*slot, one.proof, one.is_ami), (one.slot, 8, true));
        assert_ne!(epoch, second, "each round has its own number");
        // A third of 30 s and of the default's 3 s, in ticks.
        assert_eq!((one.keepalive, other.keepalive), (9536, 2861));

        let watching = State {
            epoch: *epoch,
            watched: *epoch,
            last_seen: 1000,
            ..State::default()
        };
        let words = |state: State| {
            let report = registry.report(id, |_| state, at(2000)).expect("report");
            assert_eq!(report.state, PairState::Waiting);
            assert_eq!(
                report.streams[0].silent_ms,
                (state.last_seen != 0).then_some(1048)
            );
            report.why.expect("why")
        };
        assert_eq!(
            words(State {
                last_seen: 0,
                ..watching
            }),
            "proof 0/8: no packet from the phone yet"
        );
        assert_eq!(
            words(State {
                equal: 3,
                ..watching
            }),
            "proof 3/8"
        );
        assert_eq!(
            words(State {
                equal: 300,
                ..watching
            }),
            "proof 8/8, but the PBX itself speaks to this phone"
        );
        let mut transcoded = watching;
        transcoded.unequal = 1;
        transcoded.sent.ssrc = [7, 7].map(relay_common::wire::Be16::new);
        assert_eq!(
            words(transcoded),
            "proof 0/8: the PBX sends it with another SSRC"
        );
        assert!(
            words(State {
                unequal: 1,
                ..watching
            })
            .contains("changes the payload")
        );
    }

    #[test]
    fn a_stream_that_was_suspended_begins_a_new_round_and_the_other_goes_on() {
        let mut registry = registry(2);
        let (id, changes) = registry
            .add(from_ami(1), proven_pair(), [known(11), known(12)], UNKNOWN)
            .expect("room");
        let rounds: Vec<_> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Watch { slot, epoch } => Some((*slot, *epoch)),
                _ => None,
            })
            .collect();
        let [(one, first), (_, second)] = rounds[..] else {
            panic!("{changes:?}");
        };
        let state = |slot| State {
            epoch: if slot == one { first } else { second },
            proven: if slot == one { first } else { second },
            suspended: if slot == one { first } else { 0 },
            ..State::default()
        };
        let turns = registry.turns(id, |slot| state(slot).mode());
        assert_eq!(
            turns.iter().map(|turn| turn.now).collect::<Vec<_>>(),
            [StreamState::Suspended, StreamState::Offloaded]
        );
        assert!(
            registry.turns(id, |slot| state(slot).mode()).is_empty(),
            "told once"
        );
        registry.explain(id, "talk-back");
        let report = registry.report(id, state, at(0)).expect("report");
        assert_eq!(report.why.as_deref(), Some("talk-back"));
        assert_eq!(report.streams[1].why, None);

        let changes = registry.restart(id, state);
        assert!(
            matches!(changes[..], [Change::Watch { slot, epoch }] if slot == one && epoch > second),
            "{changes:?}"
        );
        let changes = registry.stop(id, "the lease was over");
        assert!(matches!(
            changes[..],
            [Change::TakeBack { .. }, Change::TakeBack { .. }]
        ));
    }

    #[test]
    fn an_offer_that_still_stands_is_known_by_what_was_offered() {
        let mut registry = registry(2);
        let (id, _) = registry
            .add(from_ami(1), proven_pair(), [known(11), known(12)], UNKNOWN)
            .expect("room");
        assert_eq!(registry.held_as(&call(1), &proven_pair()), Some(id));
        // The wire corrected the address: the same offer is still the same.
        let offered = Claim {
            pair: numbered(3),
            rtp_timeout: UNKNOWN,
        };
        registry.claim(id, offered);
        assert_eq!(registry.held_as(&call(1), &numbered(3)), Some(id));
        assert_eq!(registry.held_as(&call(1), &proven_pair()), None);
    }

    #[test]
    fn what_an_earlier_daemon_left_is_taken_over_as_it_stands() {
        let mut before = registry(8);
        let mut map = Vec::new();
        let take = |changes: Vec<Change>, map: &mut Vec<(StreamKey, Stream)>| {
            for change in changes {
                if let Change::Install(spec) = change {
                    map.push((spec.key(), spec.compile()));
                }
            }
        };
        let hop = || [known(11), known(12)];
        let (api, changes) = before
            .add(Origin::Api, numbered(1), hop(), UNKNOWN)
            .expect("room");
        take(changes, &mut map);
        let (ami, changes) = before
            .add(from_ami(1), proven_pair(), hop(), UNKNOWN)
            .expect("room");
        take(changes, &mut map);
        // A daemon that died in the middle of a change.
        let (_, changes) = before
            .add(Origin::Api, numbered(2), hop(), UNKNOWN)
            .expect("room");
        take(changes, &mut map);
        map.pop();

        let mut after = registry(8);
        let mut payload_types = [PayloadType::UNUSED; PAYLOAD_TYPES];
        payload_types[3] = PayloadType { from: 0, to: 8 };
        let state = |slot: u32| State {
            epoch: 40 + slot,
            proven: 40 + slot,
            payload_types,
            ..State::default()
        };
        let (heirlooms, orphans) = after.heirlooms(&map, state);
        assert_eq!(heirlooms.len(), 2);
        assert_eq!(orphans.len(), 1);
        for heirloom in heirlooms {
            let changes = after.adopt(heirloom, hop()).expect("room");
            assert_eq!(changes, [], "it goes on as it is");
        }
        assert!(!after.is_ami(api) && after.is_ami(ami));
        let report = after.report(ami, state, at(0)).expect("adopted");
        assert_eq!((report.state, report.call), (PairState::Offloaded, None));
        after.adopted();
        let offer = |pair| Claim {
            pair,
            rtp_timeout: UNKNOWN,
        };
        assert_eq!(after.recognise(&call(1), &offer(numbered(3)), &[]), None);
        let channels = ["PJSIP/a".to_owned(), "PJSIP/b".to_owned()];
        assert_eq!(
            after.recognise(&call(1), &offer(proven_pair()), &channels),
            Some(ami)
        );
        assert_eq!(after.held_as(&call(1), &proven_pair()), Some(ami));

        let (new, changes) = after
            .add(Origin::Api, numbered(3), hop(), UNKNOWN)
            .expect("room for two more pairs");
        assert!(new > ami);
        let used: Vec<_> = map[..4].iter().map(|(_, stream)| stream.slot).collect();
        for change in &changes {
            match change {
                Change::Install(spec) => assert!(!used.contains(&spec.slot)),
                Change::Offload { epoch, .. } => assert!(*epoch > 43, "no epoch twice"),
                _ => {}
            }
        }
        after.remove(ami);
        after
            .add(Origin::Api, numbered(4), hop(), UNKNOWN)
            .expect("its slots are free");
        assert!(after.add(Origin::Api, numbered(5), hop(), UNKNOWN).is_ok());
        assert!(after.add(Origin::Api, numbered(6), hop(), UNKNOWN).is_err());
    }

    #[test]
    fn an_adopted_pair_has_the_priority_of_its_own_or_of_this_daemon() {
        const BEFORE: u32 = 0x1_0010;
        const AFTER: u32 = 0x1_0020;
        let mut before = with_priority(8, Some(BEFORE));
        let hop = || [known(11), known(12)];
        let mut map = Vec::new();
        let owns = [None, Some(BEFORE), Some(AFTER), Some(0)];
        for (own, number) in owns.into_iter().zip(1..) {
            let pair = numbered(number).with_priority(own.map(Priority::new));
            let added = before.add(Origin::Api, pair, hop(), UNKNOWN);
            let (_, changes) = added.expect("room");
            map.extend(changes.iter().filter_map(|change| match change {
                Change::Install(spec) => Some((spec.key(), spec.compile())),
                _ => None,
            }));
        }

        let mut after = with_priority(8, Some(AFTER));
        let state = |_| State {
            payload_types: payload_types(&numbered(1), 0),
            ..State::default()
        };
        let (heirlooms, orphans) = after.heirlooms(&map, state);
        assert_eq!((heirlooms.len(), orphans.len()), (owns.len(), 0));
        for (heirloom, own) in heirlooms.into_iter().zip(owns) {
            let id = heirloom.id;
            let changes = after.adopt(heirloom, hop()).expect("room");
            let written = changes.iter().map(|change| match change {
                Change::Update(spec) => spec.priority,
                other => panic!("no change of the priority: {other:?}"),
            });
            let expected: &[u32] = if own.is_none() { &[AFTER; 2] } else { &[] };
            assert_eq!(Vec::from_iter(written), expected, "{own:?}");
            let report = after.report(id, state, at(0)).expect("adopted");
            let shown = own.unwrap_or(AFTER);
            assert_eq!(report.priority.map_or(0, Priority::value), shown);
        }
    }

    #[test]
    fn what_an_earlier_daemon_had_taken_back_is_never_proven_by_an_old_round() {
        let (_, installs) = registry(2)
            .add(from_ami(1), proven_pair(), [known(11), known(12)], UNKNOWN)
            .expect("room");
        let map: Vec<_> = installs
            .iter()
            .filter_map(|change| match change {
                Change::Install(spec) => Some((spec.key(), spec.compile())),
                _ => None,
            })
            .collect();
        let state = |slot: u32| State {
            proven: 40 + slot,
            ..State::default()
        };
        let mut after = registry(2);
        let (mut heirlooms, _) = after.heirlooms(&map, state);
        let heirloom = heirlooms.pop().expect("a pair");
        let id = heirloom.id;
        let hop = [known(11), known(12)];
        assert_eq!(after.adopt(heirloom, hop).expect("room"), []);
        for _ in 0..2 {
            for change in after.restart(id, state) {
                let Change::Watch { epoch, .. } = change else {
                    panic!("not to be proven: {change:?}");
                };
                assert!(epoch > 41, "{epoch} was proven once");
            }
        }
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
                        match registry.add(origin, pair, hop(), UNKNOWN) {
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
            prop_assert!(registry.slots.is_empty());
        }
    }

    fn apply(
        changes: Vec<Change>,
        map: &mut HashMap<StreamKey, u32>,
        watches: &mut HashMap<Path, i64>,
    ) -> Result<(), TestCaseError> {
        for change in changes {
            match change {
                Change::Install(spec) => {
                    prop_assert_eq!(map.insert(spec.key(), spec.slot), None);
                }
                Change::Update(spec) => {
                    prop_assert_eq!(map.get(&spec.key()), Some(&spec.slot));
                }
                Change::Remove(spec) => {
                    prop_assert_eq!(map.remove(&spec.key()), Some(spec.slot));
                }
                Change::Watch { slot, epoch } | Change::Offload { slot, epoch, .. } => {
                    prop_assert!(epoch != 0 && map.values().any(|known| *known == slot));
                }
                Change::TakeBack { slot } => {
                    prop_assert!(map.values().any(|known| *known == slot));
                }
                Change::Unwatch(path) => *watches.entry(path).or_default() -= 1,
            }
        }
        Ok(())
    }
}
