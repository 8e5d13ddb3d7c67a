//! What the pinned maps tell by themselves: every stream and every counter at one moment, with or
//! without a daemon.

use std::{collections::HashMap, time::Duration};

use relay_common::{
    reason::Reason,
    stream::{
        Address, Counter, State, Stream, StreamKey, StreamSpec, leg_of, mode, opposite, role,
    },
};

use crate::{
    clock::Now,
    control::model::{PairReport, PairState, StreamState},
    datapath::{DatapathError, PinnedMaps},
    dscp::Dscp,
    next_hop::{Macs, NextHop, Resolution, VlanTag},
    priority::Priority,
    registry::{Policy, Registry, Watched},
};

/// Why nothing is relayed that a daemon had offloaded, once it no longer renews its lease.
pub const LEASE_OVER: &str = "the lease is over: every packet goes to the PBX";

/// The maps at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Interface of the instance.
    pub interface: String,
    /// When it was taken.
    pub taken: Now,
    /// Until when anything is relayed: `CLOCK_MONOTONIC`, ns.
    pub lease: u64,
    /// Size of the table of streams.
    pub max_streams: u32,
    /// Every stream, in no order.
    pub streams: Vec<Sample>,
    /// Packets and bytes by reason, all CPUs together.
    pub counters: Vec<(Reason, Counter)>,
}

/// A stream at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// What it is.
    pub spec: StreamSpec,
    /// What happened to it so far.
    pub state: State,
}

impl Snapshot {
    /// Reads the maps.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn take(maps: &PinnedMaps) -> Result<Self, DatapathError> {
        let taken = Now::read();
        let streams = maps
            .streams()?
            .iter()
            // Those without an address look for where a phone really sends to, and are no one's stream.
            .filter(|(key, _)| {
                key.role == role::RECEIVES && key.local_address != Address::default()
            })
            .filter_map(|(key, stream)| {
                Some(Sample {
                    spec: stream.spec(key),
                    state: maps.state(stream.slot)?,
                })
            })
            .collect();
        Ok(Self {
            interface: maps.interface().to_owned(),
            taken,
            lease: maps.lease(),
            max_streams: maps.max_streams(),
            streams,
            counters: maps.counters()?,
        })
    }

    /// Milliseconds that the lease still runs; 0 when it is over.
    #[must_use]
    pub const fn lease_ms(&self) -> u64 {
        self.lease.saturating_sub(self.taken.monotonic) / 1_000_000
    }

    /// What the datapath does with a stream.
    #[must_use]
    pub fn stream_state(&self, sample: &Sample) -> StreamState {
        match sample.state.mode() {
            _ if !sample.spec.next_hop.is_known() => StreamState::Waiting,
            mode::OFFLOADED if self.lease_ms() == 0 => StreamState::Suspended,
            mode::OFFLOADED => StreamState::Offloaded,
            mode::SUSPENDED => StreamState::Suspended,
            _ => StreamState::Watching,
        }
    }

    /// The pairs that these streams make, as the next daemon would find them. What only a daemon knows
    /// is missing: the PBX's names, calls that were refused, and pairs whose way out is not known.
    #[must_use]
    pub fn pairs(&self) -> Vec<PairReport> {
        let states: HashMap<u32, &State> = self
            .streams
            .iter()
            .map(|sample| (sample.spec.slot, &sample.state))
            .collect();
        let state = |slot| states.get(&slot).copied().copied().unwrap_or_default();
        let table: Vec<(StreamKey, Stream)> = self
            .streams
            .iter()
            .map(|sample| (sample.spec.key(), sample.spec.compile()))
            .collect();
        let mut registry = Registry::new(self.policy());
        let (heirlooms, _) = registry.heirlooms(&table, state);
        let mut ways: HashMap<u64, [Watched; 2]> = HashMap::new();
        for sample in &self.streams {
            let unknown = || self.way(&sample.spec);
            let ways = ways
                .entry(sample.spec.pair.into())
                .or_insert_with(|| [unknown(), unknown()]);
            // What comes in on the first leg leaves on the second.
            ways[usize::from(leg_of(opposite(sample.spec.slot)))] = self.way(&sample.spec);
        }
        for heirloom in heirlooms {
            if let Some(ways) = ways.remove(&heirloom.id) {
                // A pair that no daemon would take is none.
                let _ = registry.adopt(heirloom, ways);
            }
        }
        registry
            .ids()
            .filter_map(|id| registry.report(id, state, self.taken))
            .map(|pair| self.under_lease(pair))
            .collect()
    }

    /// What its streams tell of the daemon's settings.
    fn policy(&self) -> Policy {
        let specs = || self.streams.iter().map(|sample| &sample.spec);
        let own = |spec: &&StreamSpec| !spec.own_priority;
        Policy {
            dscp: Dscp::Keep,
            priority: Some(Priority::new(
                specs().find(own).map_or(0, |spec| spec.priority),
            )),
            max_streams: self.max_streams,
            proof: specs().map(|spec| spec.proof).max().unwrap_or_default(),
            keepalive: Duration::ZERO,
        }
    }

    /// How a stream leaves, as far as its entry says.
    fn way(&self, spec: &StreamSpec) -> Watched {
        let hop = &spec.next_hop;
        let resolution = if !hop.is_known() {
            Resolution::Waiting {
                neighbour: spec.new_destination.address.into(),
                interface: self.interface.clone(),
            }
        } else {
            let macs = Macs {
                source: hop.source_mac.bytes,
                destination: hop.destination_mac.bytes,
            };
            let tags = hop.vlans.iter().take(hop.vlan_depth());
            Resolution::Known(NextHop {
                macs: (macs.destination != [0; 6]).then_some(macs),
                vlan: tags
                    .map(|tag| VlanTag {
                        protocol: tag.tpid(),
                        id: tag.id(),
                    })
                    .collect(),
                mtu: hop.mtu,
            })
        };
        Watched {
            serial: 0,
            resolution,
        }
    }

    /// The same pair, of which nothing is relayed once the lease is over.
    fn under_lease(&self, mut pair: PairReport) -> PairReport {
        if self.lease_ms() != 0 {
            return pair;
        }
        for stream in &mut pair.streams {
            if stream.state == StreamState::Offloaded {
                stream.state = StreamState::Suspended;
                stream.why = Some(LEASE_OVER.to_owned());
            }
        }
        if pair.state == PairState::Offloaded {
            pair.state = PairState::Waiting;
            pair.why = Some(LEASE_OVER.to_owned());
        }
        pair
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use relay_common::{
        stream::{Endpoint, PayloadType},
        wire::Mac,
    };

    use super::*;

    fn endpoint(text: &str) -> Endpoint {
        let address: std::net::SocketAddr = text.parse().expect(text);
        Endpoint {
            address: address.ip().into(),
            port: address.port(),
        }
    }

    /// Both streams of a pair, with the same proof and next hop.
    pub(crate) fn streams(pair: u32, first_slot: u32) -> [Sample; 2] {
        let port = 10_000 + 4 * pair;
        let locals = [0, 2].map(|more| endpoint(&format!("192.0.2.1:{}", port + more)));
        let remotes = [11, 12].map(|host| endpoint(&format!("192.0.2.{host}:{port}")));
        [0, 1].map(|leg: u8| {
            let (into, out) = (usize::from(leg), usize::from(1 - leg));
            let mut state = State {
                epoch: 3,
                proven: 3,
                packets: 100 + u64::from(leg),
                last_seen: 5,
                ..State::default()
            };
            state.payload_types = [PayloadType::UNUSED; 8];
            state.payload_types[0] = PayloadType { from: 8, to: 8 };
            Sample {
                spec: StreamSpec {
                    source: remotes[into],
                    local: locals[into],
                    sends_from: locals[into],
                    new_source: locals[out],
                    new_destination: remotes[out],
                    next_hop: relay_common::stream::NextHop {
                        destination_mac: Mac {
                            bytes: [2, 0, 0, 0, 0, 9],
                        },
                        source_mac: Mac {
                            bytes: [2, 0, 0, 0, 0, 1],
                        },
                        mtu: 1500,
                        ..Default::default()
                    },
                    dscp: 46,
                    slot: first_slot + u32::from(leg),
                    keepalive: 0,
                    pair,
                    is_ami: true,
                    proof: 8,
                    priority: 0,
                    own_priority: false,
                },
                state,
            }
        })
    }

    pub(crate) fn snapshot(streams: Vec<Sample>) -> Snapshot {
        Snapshot {
            interface: "eth0".into(),
            taken: Now {
                monotonic: 10_000_000_000,
                wall: std::time::SystemTime::UNIX_EPOCH,
            },
            lease: 12_000_000_000,
            max_streams: 64,
            streams,
            counters: Vec::new(),
        }
    }

    #[test]
    fn streams_make_the_pairs_that_a_daemon_would_find() {
        let mut all: Vec<_> = [streams(9, 2), streams(7, 0)].concat();
        all[1].state.proven = 0;
        // One whose opposite is gone.
        all.push(streams(20, 30)[0]);
        let pairs = snapshot(all).pairs();
        let ids: Vec<_> = pairs.iter().map(|pair| pair.id).collect();
        assert_eq!(ids, [7, 9]);
        let (seven, nine) = (&pairs[0], &pairs[1]);
        assert_eq!(seven.state, PairState::Offloaded);
        assert_eq!(seven.why, None);
        assert_eq!(seven.legs[0].local.to_string(), "192.0.2.1:10028");
        assert_eq!(seven.legs[1].remote.to_string(), "192.0.2.12:10028");
        assert_eq!(seven.streams[1].packets, 101);
        assert_eq!(seven.payload_types.len(), 1);
        let hop = seven.streams[0].next_hop.as_ref().expect("next hop");
        assert_eq!(hop.destination_mac.as_deref(), Some("02:00:00:00:00:09"));
        assert_eq!(nine.state, PairState::Waiting);
        assert_eq!(nine.streams[0].state, StreamState::Offloaded);
        assert_eq!(nine.streams[1].state, StreamState::Watching);
        assert!(
            nine.why
                .as_deref()
                .is_some_and(|why| why.starts_with("proof 0/8"))
        );
    }

    #[test]
    fn nothing_is_relayed_without_a_lease() {
        let mut late = snapshot(streams(7, 0).to_vec());
        late.lease = late.taken.monotonic;
        let pairs = late.pairs();
        assert_eq!(pairs[0].state, PairState::Waiting);
        assert_eq!(pairs[0].why.as_deref(), Some(LEASE_OVER));
        assert_eq!(pairs[0].streams[0].state, StreamState::Suspended);
        assert_eq!(late.stream_state(&late.streams[0]), StreamState::Suspended);
        assert_eq!(late.lease_ms(), 0);
    }

    #[test]
    fn a_way_that_is_not_known_is_told() {
        let mut all = streams(7, 0);
        all[0].spec.next_hop = Default::default();
        let waiting = snapshot(all.to_vec());
        let why = waiting.pairs()[0].why.clone().expect("why");
        assert_eq!(why, "waiting for neighbour 192.0.2.12 on eth0");
        assert_eq!(waiting.stream_state(&all[0]), StreamState::Waiting);
    }
}
