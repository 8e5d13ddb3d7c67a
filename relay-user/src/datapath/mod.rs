//! The datapath as the controller sees it: load, attach, adopt, and the maps.

mod attachment;
mod error;
mod events;
pub(crate) mod links;
pub(crate) mod load;
#[cfg(feature = "datapath-log")]
mod log;
pub(crate) mod maps;
mod pinned_maps;
pub(crate) mod pins;
mod qdisc;
mod tap;
pub(crate) mod tc;

use std::{collections::HashSet, io, path::Path};

use aya::{
    Ebpf,
    maps::MapError,
    programs::{Program, ProgramInfo, SchedClassifier},
};
use nix::libc;
use relay_common::{
    reason::Reason,
    stream::{
        Counter, PAYLOAD_TYPES, PayloadType, State, Stream, StreamKey, StreamSpec, opposite, role,
    },
};
use serde::{Deserialize, Serialize};

pub(crate) use self::maps::Pulse;
use self::{
    attachment::RelayAttachment,
    maps::{KEY, Maps, VALUE, removed, total},
    pins::{Directory, Earlier, Pins},
    tc::{Order, TcAttachment, TcHook},
};
pub use self::{
    error::DatapathError,
    events::Events,
    load::{OBJECT, load, load_observer, load_tc, load_xdp},
    pinned_maps::{PinnedMaps, pinned_interfaces},
    pins::{
        attached_mode, check_unserved, ensure_bpffs, has_bpffs, owns, relayed_past_queues,
        remove_leftovers,
    },
    qdisc::{root_qdisc, shapes},
    tap::{Selection, Tap, TapError},
    tc::Direction,
};
use crate::{
    dscp::DscpMap,
    next_hop::{Interface, LinkLayer},
};

/// Names of what the object defines; nothing else in userspace spells them.
pub mod names {
    use super::{Direction, Order, TcHook};

    /// XDP entry point.
    pub const XDP: &str = "relay_xdp";
    /// TC entry point.
    pub const TC: &str = "relay_tc";
    /// Where that sits: before all others, as XDP does.
    pub(super) const RELAY: TcHook = TcHook {
        program: TC,
        direction: Direction::Ingress,
        order: Order::First,
    };
    /// Observer of what leaves, at the TC egress.
    pub const OBSERVE: &str = "relay_observe";
    /// Where the observer sits: before all others, who may change or take what Asterisk sends.
    pub(super) const OBSERVER: TcHook = TcHook {
        program: OBSERVE,
        direction: Direction::Egress,
        order: Order::First,
    };
    /// Streams by the addresses of the PBX.
    pub const STREAMS: &str = "STREAMS";
    /// What happened to each stream.
    pub const STATE: &str = "STATE";
    /// Packets and bytes by reason.
    pub const COUNTERS: &str = "COUNTERS";
    /// What the sender's mark is translated to.
    pub const DSCP_MAP: &str = "DSCP_MAP";
    /// Until when anything is relayed, and what is captured.
    pub const CONTROL: &str = "CONTROL";
    /// Rare facts for the controller.
    pub const EVENTS: &str = "EVENTS";
    /// The packet that is being looked at, where it is captured.
    pub const KEPT: &str = "KEPT";
    /// Captured packets.
    pub const CAPTURED: &str = "CAPTURED";
    /// Load-time constant: 0 where packets have no Ethernet header.
    pub const ETHERNET: &str = "ETHERNET";
    /// Load-time constant: 0 where the kernel cannot copy packets in XDP.
    pub const LOAD_BYTES: &str = "LOAD_BYTES";
    /// Load-time constant: 1 in generic XDP.
    pub const GENERIC: &str = "GENERIC";
    /// All maps that are pinned, by their own names.
    pub const MAPS: [&str; 8] = [
        STREAMS, STATE, COUNTERS, DSCP_MAP, CONTROL, EVENTS, KEPT, CAPTURED,
    ];
    /// Those that have room for as many entries as there may be streams.
    pub const SIZED: [&str; 2] = [STREAMS, STATE];
    /// Pin of the XDP program's link.
    pub const XDP_LINK: &str = "xdp_link";
    /// Pin of the TC program's link.
    pub const TC_LINK: &str = "tc_link";
    /// All pins that a relay's link may have.
    pub(super) const RELAY_LINKS: [&str; 2] = [XDP_LINK, TC_LINK];
    /// Pin of the observer's link.
    pub const OBSERVER_LINK: &str = "observer_link";
    /// How the names of all pinned links end.
    pub const LINK_SUFFIX: &str = "_link";
    /// How the names of all programs begin.
    pub const PROGRAM_PREFIX: &str = "relay_";
}

/// How the relay is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// XDP in the driver, before a socket buffer exists.
    Native,
    /// XDP in the stack's receive path, on every interface.
    Generic,
    /// Ingress traffic control. What is relayed leaves through the queueing discipline.
    Tc,
}

impl AttachMode {
    /// As in `--mode`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tc => "tc",
        }
    }

    /// Name of the pin of the relay's link.
    const fn link_name(self) -> &'static str {
        match self {
            Self::Native | Self::Generic => names::XDP_LINK,
            Self::Tc => names::TC_LINK,
        }
    }
}

/// A loaded and attached datapath. Dropping it detaches the programs and removes every pin.
pub struct Datapath {
    mode: AttachMode,
    maps: Maps,
    relay: RelayAttachment,
    observer: TcAttachment,
    // Last: its lock says that a daemon runs, so it goes when the programs are detached.
    pins: Pins,
}

/// What an earlier daemon left to this one, and which is carried on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// All streams, in no order.
    pub streams: Vec<(StreamKey, Stream)>,
    /// Until when they are relayed, unless this daemon renews the lease.
    pub lease: u64,
}

/// The programs and maps of one instance, in the kernel but not at work.
struct Loaded {
    ebpf: Ebpf,
    mode: AttachMode,
}

impl Loaded {
    /// On maps of its own or, to carry an instance on, on those pinned.
    fn new(
        mode: AttachMode,
        layer: LinkLayer,
        max_streams: u32,
        pinned: Option<&Path>,
    ) -> Result<Self, DatapathError> {
        let mut ebpf = load::load_onto(mode, layer, max_streams, pinned)?;
        load_observer(&mut ebpf)?;
        load::load_relay(&mut ebpf, mode)?;
        #[cfg(feature = "datapath-log")]
        log::follow(&mut ebpf)?;
        Ok(Self { ebpf, mode })
    }

    fn relay(&mut self) -> Result<&mut Program, DatapathError> {
        load::relay(&mut self.ebpf, self.mode)
    }

    fn observer(&mut self) -> Result<&mut SchedClassifier, DatapathError> {
        load::program(&mut self.ebpf, names::OBSERVE)
    }
}

impl Datapath {
    /// Attaches the datapath to an interface. What an earlier daemon left attached there, and no
    /// daemon serves, is carried on where that can be: same maps, same mode. Otherwise it is replaced,
    /// and nothing is relayed until the lease is renewed.
    ///
    /// # Errors
    /// Every [`DatapathError`] about loading, attaching and pinning. Nothing new is left behind then.
    /// An earlier instance stays, to the end of its lease, unless it was already being replaced.
    pub fn attach(
        interface: &Interface,
        mode: AttachMode,
        max_streams: u32,
    ) -> Result<(Self, Option<Adopted>), DatapathError> {
        let pins = Pins::claim(&interface.name)?;
        let others = pins::others(&interface.name)?;
        let directories = [pins.path()]
            .into_iter()
            .chain(others.iter().map(Directory::path));
        let earlier = pins::attached(directories, &interface.name, interface.index)?;
        let layouts = maps::layouts(max_streams)?;
        let observer = match &earlier {
            Some(earlier) if earlier.mode == mode => {
                pins.adoptable(earlier, &interface.name, interface.index, &layouts)?
            }
            _ => None,
        };
        match (earlier, observer) {
            (Some(earlier), Some(observer)) => {
                Self::adopt(interface, earlier, observer, max_streams, pins, &others)
                    .map(|(datapath, adopted)| (datapath, Some(adopted)))
            }
            (earlier, _) => Self::replace(interface, mode, max_streams, earlier, pins, &others)
                .map(|datapath| (datapath, None)),
        }
    }

    /// Carries an earlier instance on: its maps stay, its programs are replaced in their places.
    fn adopt(
        interface: &Interface,
        earlier: Earlier,
        observer: TcAttachment,
        max_streams: u32,
        mut pins: Pins,
        others: &[Directory],
    ) -> Result<(Self, Adopted), DatapathError> {
        // An error must not take what is at work.
        pins.leave();
        let mut loaded = Loaded::new(
            earlier.mode,
            interface.layer,
            max_streams,
            Some(pins.path()),
        )?;
        let maps = Maps::take(&mut loaded.ebpf, max_streams)?;
        let not_replaced = |source| DatapathError::NotReplaced {
            interface: interface.name.clone(),
            source,
        };
        observer
            .update(loaded.observer()?, &interface.name)
            .map_err(not_replaced)?;
        earlier
            .relay
            .update(loaded.relay()?, &interface.name)
            .map_err(not_replaced)?;
        pins.unstage(earlier.link)?;
        remove_others(others, earlier.link)?;
        let mut datapath = Self {
            mode: earlier.mode,
            maps,
            relay: earlier.relay,
            observer,
            pins,
        };
        let adopted = datapath.adopted()?;
        datapath.pins.hold();
        Ok((datapath, adopted))
    }

    /// Attaches a new instance, then removes what was there before.
    fn replace(
        interface: &Interface,
        mode: AttachMode,
        max_streams: u32,
        earlier: Option<Earlier>,
        mut pins: Pins,
        others: &[Directory],
    ) -> Result<Self, DatapathError> {
        pins.begin(earlier.as_ref().and_then(|earlier| earlier.link))?;
        let mut loaded = Loaded::new(mode, interface.layer, max_streams, None)?;
        pins.stage(&loaded.ebpf)?;
        let maps = Maps::take(&mut loaded.ebpf, max_streams)?;
        // Before the relay: nothing may be relayed unobserved.
        let observer = TcAttachment::attach(
            names::OBSERVER,
            loaded.observer()?,
            &interface.name,
            interface.index,
        )
        .map_err(|source| tc_error(&interface.name, Direction::Egress, source))?;
        let relay = loaded
            .relay()
            .and_then(|program| take_over(program, interface, mode, earlier, &observer, &mut pins));
        let settled = relay.and_then(|relay| {
            let outcome = settle(interface, &relay, &observer, &pins, others);
            kept(relay, outcome)
        });
        match settled {
            Ok(relay) => Ok(Self {
                mode,
                maps,
                relay,
                observer,
                pins,
            }),
            Err(error) => {
                // The relay first, as ever.
                drop(pins);
                told("observer", observer.detach());
                Err(error)
            }
        }
    }

    /// What an earlier daemon left in the maps.
    fn adopted(&mut self) -> Result<Adopted, DatapathError> {
        let failed = |map| {
            move |source| DatapathError::Map {
                map,
                source: Box::new(source),
            }
        };
        let entries: Vec<(StreamKey, Stream)> = self
            .maps
            .streams
            .iter()
            .map(|entry| {
                let (key, stream) = entry.map_err(failed(names::STREAMS))?;
                Ok((zerocopy::transmute!(key), zerocopy::transmute!(stream)))
            })
            .collect::<Result<_, DatapathError>>()?;
        let (streams, second): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|(key, _)| key.role == role::RECEIVES);
        // That daemon may have been killed between the two entries of a stream. What is left would
        // blame the PBX's packets on whichever stream has the slot next.
        let slots: HashSet<u32> = streams.iter().map(|(_, stream)| stream.slot).collect();
        let used: HashSet<(StreamKey, u32)> = streams
            .iter()
            .map(|(_, stream)| {
                (
                    StreamKey::sends(stream.new_source, stream.new_source_port),
                    opposite(stream.slot),
                )
            })
            .filter(|(_, slot)| slots.contains(slot))
            .collect();
        for (key, stream) in second {
            if !used.contains(&(key, stream.slot)) {
                let key = zerocopy::transmute!(key);
                removed(names::STREAMS, self.maps.streams.remove(&key))?;
            }
        }
        Ok(Adopted {
            streams,
            lease: self.lease(),
        })
    }

    /// Ends the control of the datapath and leaves it attached and pinned, to the end of its lease or
    /// to the next [`Self::attach`].
    pub fn leave(mut self) {
        self.pins.leave();
    }

    /// What the datapath reports, from the first event on that nobody has read.
    ///
    /// # Errors
    /// Outside of an event loop, or for want of descriptors.
    ///
    /// # Panics
    /// When called twice: there is one reader.
    pub fn events(&mut self) -> io::Result<Events> {
        let ring = self.maps.events.take();
        Events::new(ring.expect("events have one reader"))
    }

    /// How the program runs.
    #[must_use]
    pub const fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Directory of the pinned maps.
    #[must_use]
    pub fn pins(&self) -> &Path {
        self.pins.path()
    }

    /// Installs a stream, or replaces it while packets flow; a packet sees the old one or the new
    /// one. Whether it is relayed is left as it is.
    ///
    /// # Errors
    /// [`DatapathError::Full`].
    pub fn install(&mut self, spec: &StreamSpec) -> Result<(), DatapathError> {
        for (key, stream) in spec.entries() {
            let (key, stream): ([u8; KEY], [u8; VALUE]) =
                (zerocopy::transmute!(key), zerocopy::transmute!(stream));
            let inserted = self.maps.streams.insert(key, stream, 0);
            inserted.map_err(|source| self.insert_error(source))?;
        }
        Ok(())
    }

    fn insert_error(&self, source: MapError) -> DatapathError {
        match &source {
            MapError::SyscallError(error)
                if error.io_error.raw_os_error() == Some(nix::libc::E2BIG) =>
            {
                DatapathError::Full {
                    max_streams: self.maps.max_streams,
                }
            }
            _ => DatapathError::Map {
                map: names::STREAMS,
                source: Box::new(source),
            },
        }
    }

    /// Takes a stream back on the spot, then removes it. Its opposite is taken back too: without this
    /// entry, nobody would see what the PBX says where that one leaves.
    ///
    /// # Errors
    /// [`DatapathError::Map`]; a stream that is not there is none.
    pub fn remove(&mut self, spec: &StreamSpec) -> Result<(), DatapathError> {
        self.take_back(spec.slot);
        self.take_back(opposite(spec.slot));
        self.withdraw(spec)
    }

    /// Removes a stream's entries; its state is left as it is.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn withdraw(&mut self, spec: &StreamSpec) -> Result<(), DatapathError> {
        for key in [spec.key()].into_iter().chain(spec.sends_key()) {
            let key = zerocopy::transmute!(key);
            removed(names::STREAMS, self.maps.streams.remove(&key))?;
        }
        Ok(())
    }

    /// Forgets what happened to the slot's earlier stream, and leaves the new one to the PBX.
    pub fn reset(&self, slot: u32) {
        self.maps.state.reset(slot);
    }

    /// Sets the clock of a payload type that has no fixed one, in the unit of
    /// [`clock_of`](relay_common::reception::clock_of).
    pub fn set_clock(&self, slot: u32, payload_type: u8, clock: u32) {
        self.maps.state.set_clock(slot, payload_type, clock);
    }

    /// Takes a stream back; effective on the next packet, without a system call.
    pub fn take_back(&self, slot: u32) {
        self.maps.state.set_epoch(slot, 0);
    }

    /// Begins a round of proof, at the end of which the datapath offloads the stream by itself.
    /// `epoch` must be another than in any round of this slot before, and not 0.
    pub fn watch(&self, slot: u32, epoch: u32) {
        self.maps.state.set_epoch(slot, epoch);
    }

    /// Offloads a stream without proof. `epoch` as in [`Self::watch`].
    pub fn offload(&self, slot: u32, epoch: u32, payload_types: [PayloadType; PAYLOAD_TYPES]) {
        self.maps.state.offload(slot, epoch, payload_types);
    }

    /// Sets what the marks of streams with [`DSCP_MAP`](relay_common::stream::DSCP_MAP) are translated
    /// to.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn set_dscp_map(&mut self, map: &DscpMap) -> Result<(), DatapathError> {
        let set = self.maps.dscp_map.set(0, map.table(), 0);
        set.map_err(|source| DatapathError::Map {
            map: names::DSCP_MAP,
            source: Box::new(source),
        })
    }

    /// Until when anything is relayed: `CLOCK_MONOTONIC`, ns.
    #[must_use]
    pub fn lease(&self) -> u64 {
        self.maps.lease.deadline()
    }

    /// Sets until when anything is relayed.
    pub fn renew_lease(&self, deadline: u64) {
        self.maps.lease.renew(deadline);
    }

    /// What happened to a stream so far.
    #[must_use]
    pub fn state(&self, slot: u32) -> State {
        self.maps.state.read(slot)
    }

    /// As much of that as tells whether a stream goes on as before.
    pub(crate) fn pulse(&self, slot: u32) -> Pulse {
        self.maps.state.pulse(slot)
    }

    /// Packets and bytes by reason, all CPUs together.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn counters(&self) -> Result<Vec<(Reason, Counter)>, DatapathError> {
        Reason::ALL
            .iter()
            .map(|&reason| Ok((reason, total(&self.maps.counters, reason as u32)?)))
            .collect()
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        if self.pins.stays() {
            return;
        }
        // The relay first: nothing may be relayed unobserved.
        told("relay", self.relay.detach());
        told("observer", self.observer.detach());
    }
}

/// Logs what was not detached.
fn told(what: &str, outcome: io::Result<()>) {
    if let Err(error) = outcome {
        tracing::error!(what, %error, "not detached");
    }
}

/// Has the new program run instead of the earlier one.
fn take_over(
    program: &mut Program,
    interface: &Interface,
    mode: AttachMode,
    earlier: Option<Earlier>,
    observer: &TcAttachment,
    pins: &mut Pins,
) -> Result<RelayAttachment, DatapathError> {
    if let TcAttachment::Link(link) = observer {
        pins.stage_link(names::OBSERVER_LINK, link)?;
    }
    let not_replaced = |source| DatapathError::NotReplaced {
        interface: interface.name.clone(),
        source,
    };
    match earlier {
        Some(earlier) if earlier.mode == mode => {
            let relay = earlier.relay;
            let outcome = pins.replace_relay(mode, relay.link()).and_then(|()| {
                let updated = relay.update(program, &interface.name);
                updated.map_err(not_replaced)
            });
            kept(relay, outcome)
        }
        earlier => {
            if let Some(earlier) = earlier {
                // No interface has native and generic XDP at once (dev_xdp_attach() in
                // net/core/dev.c), so the earlier one must go first; meanwhile the PBX relays.
                pins.hold();
                earlier.relay.detach().map_err(not_replaced)?;
            }
            let relay = RelayAttachment::attach(mode, program, &interface.name, interface.index)
                .map_err(|source| attach_error(&interface.name, mode, source))?;
            let outcome = pins.replace_relay(mode, relay.link());
            kept(relay, outcome)
        }
    }
}

/// The relay as attached or, where what followed failed, detached.
fn kept(
    relay: RelayAttachment,
    outcome: Result<(), DatapathError>,
) -> Result<RelayAttachment, DatapathError> {
    if outcome.is_err() {
        told("relay", relay.detach());
    }
    outcome.map(|()| relay)
}

/// Has the new instance stand alone.
fn settle(
    interface: &Interface,
    relay: &RelayAttachment,
    observer: &TcAttachment,
    pins: &Pins,
    others: &[Directory],
) -> Result<(), DatapathError> {
    let link = relay.link().map(links::Link::info).transpose();
    let link = link.map_err(|source| DatapathError::NotReplaced {
        interface: interface.name.clone(),
        source,
    })?;
    let id = link.map(|link| link.id);
    pins.settle(id)?;
    for (hook, spared) in [
        (names::RELAY, relay.filter()),
        (names::OBSERVER, observer.filter()),
    ] {
        pins::delete_filters(hook, &interface.name, interface.index, spared)?;
    }
    remove_others(others, id)
}

/// Removes what other versions left, but not the relay's link, which is this version's by now.
fn remove_others(others: &[Directory], relay: Option<u32>) -> Result<(), DatapathError> {
    for other in others {
        other.remove(relay)?;
        tracing::warn!(pins = %other.path().display(), "removed what another version left");
    }
    Ok(())
}

/// Why a mode cannot be had.
fn attach_error(interface: &str, mode: AttachMode, source: io::Error) -> DatapathError {
    let interface = interface.to_owned();
    match (source.raw_os_error(), mode) {
        (_, AttachMode::Tc) => tc_error(&interface, Direction::Ingress, source),
        (Some(libc::ENODEV), _) => DatapathError::InterfaceGone(interface),
        // EEXIST: there is one in the other mode.
        (Some(libc::EBUSY | libc::EEXIST), _) => {
            let program = "id unknown".to_owned();
            DatapathError::OtherProgram { interface, program }
        }
        (_, AttachMode::Native) => DatapathError::NativeRefused { interface, source },
        (_, AttachMode::Generic) => DatapathError::XdpRefused { interface, source },
    }
}

/// Why a program cannot be had in traffic control.
fn tc_error(interface: &str, direction: Direction, source: io::Error) -> DatapathError {
    let interface = interface.to_owned();
    match source.raw_os_error() {
        Some(libc::ENODEV) => DatapathError::InterfaceGone(interface),
        _ => DatapathError::TcRefused {
            interface,
            direction,
            source,
        },
    }
}

/// Name and id of a loaded program, for a message.
#[must_use]
pub fn describe_program(id: u32) -> String {
    let name = aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|program: &ProgramInfo| program.id() == id)
        .and_then(|program| program.name_as_str().map(str::to_owned));
    match name {
        Some(name) => format!("`{name}`, id {id}"),
        None => format!("id {id}"),
    }
}
