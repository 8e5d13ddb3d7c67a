//! The maps of an instance, and what they must look like to be carried on.

use std::{
    os::fd::AsFd as _,
    path::Path,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, RingBuf},
};
use aya_obj::Object;
use memmap2::{MmapOptions, MmapRaw};
use nix::libc;
use relay_common::{
    reception::Reception,
    stream::{
        Control, Counter, DscpMap, PAYLOAD_TYPES, PayloadType, State, Stream, StreamKey, mode,
    },
};

use super::{DatapathError, load::OBJECT, names};

pub(super) const KEY: usize = size_of::<StreamKey>();
pub(super) const VALUE: usize = size_of::<Stream>();
const COUNTER: usize = size_of::<Counter>();

/// Packets and bytes, of each CPU.
pub(crate) type Counters = PerCpuArray<MapData, [u8; COUNTER]>;
const DSCP_MAP: usize = size_of::<DscpMap>();

/// The maps of a loaded object.
pub(super) struct Maps {
    pub(super) max_streams: u32,
    pub(super) streams: HashMap<MapData, [u8; KEY], [u8; VALUE]>,
    pub(super) state: StateMap,
    pub(super) lease: LeaseMap,
    pub(super) counters: Counters,
    pub(super) dscp_map: Array<MapData, [u8; DSCP_MAP]>,
    /// Until its reader takes it.
    pub(super) events: Option<RingBuf<MapData>>,
}

impl Maps {
    /// Takes them out of the object.
    pub(super) fn take(ebpf: &mut Ebpf, max_streams: u32) -> Result<Self, DatapathError> {
        Ok(Self {
            max_streams,
            state: StateMap::new(map(ebpf, names::STATE)?, max_streams)?,
            lease: LeaseMap::new(map(ebpf, names::CONTROL)?)?,
            streams: take(ebpf, names::STREAMS)?,
            counters: take(ebpf, names::COUNTERS)?,
            dscp_map: take(ebpf, names::DSCP_MAP)?,
            events: Some(take(ebpf, names::EVENTS)?),
        })
    }
}

/// What tells one map from another to the programs that use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) name: &'static str,
    kind: Option<u32>,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

/// Of all maps, as this version makes them.
pub(super) fn layouts(max_streams: u32) -> Result<Vec<Layout>, DatapathError> {
    let object = Object::parse(OBJECT).map_err(|error| DatapathError::Object(error.to_string()))?;
    let layout = |name| {
        let map = object.maps.get(name);
        let map = map.ok_or_else(|| DatapathError::Object(format!("no map {name}")))?;
        Ok(Layout {
            name,
            kind: Some(map.map_type()),
            key_size: map.key_size(),
            value_size: map.value_size(),
            entries: if names::SIZED.contains(&name) {
                max_streams
            } else {
                map.max_entries()
            },
            flags: map.map_flags(),
        })
    };
    names::MAPS.into_iter().map(layout).collect()
}

/// Of a map in the kernel.
pub(super) fn layout(name: &'static str, info: &MapInfo) -> Layout {
    Layout {
        name,
        kind: info.map_type().ok().map(|kind| kind as u32),
        key_size: info.key_size(),
        value_size: info.value_size(),
        entries: info.max_entries(),
        flags: info.map_flags(),
    }
}

/// A map of the object.
pub(super) fn map<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a MapData, DatapathError> {
    match ebpf.map(name) {
        Some(
            Map::HashMap(data) | Map::Array(data) | Map::PerCpuArray(data) | Map::RingBuf(data),
        ) => Ok(data),
        _ => Err(DatapathError::Object(format!("no map {name}"))),
    }
}

/// A map of the object, typed; its key and value sizes are checked by aya.
fn take<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, DatapathError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| DatapathError::Object(format!("no map {name}")))?;
    T::try_from(map).map_err(|source| DatapathError::Map {
        map: name,
        source: Box::new(source),
    })
}

/// A map of counters that is pinned.
pub(crate) fn open_counters(pin: &Path) -> Result<Counters, DatapathError> {
    MapData::from_pin(pin)
        .and_then(|map| Counters::try_from(Map::PerCpuArray(map)))
        .map_err(counters_error)
}

/// An element, all CPUs together.
pub(crate) fn total(counters: &Counters, element: u32) -> Result<Counter, DatapathError> {
    let values = counters.get(&element, 0).map_err(counters_error)?;
    Ok(values
        .iter()
        .map(|bytes| -> Counter { zerocopy::transmute!(*bytes) })
        .sum())
}

fn counters_error(source: MapError) -> DatapathError {
    DatapathError::Map {
        map: names::COUNTERS,
        source: Box::new(source),
    }
}

/// What a removal came to: a key that is not there is no error.
pub(super) fn removed(
    map: &'static str,
    outcome: Result<(), MapError>,
) -> Result<(), DatapathError> {
    match outcome {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        Err(source) => Err(DatapathError::Map {
            map,
            source: Box::new(source),
        }),
    }
}

/// The lease in `CONTROL`, mapped into memory.
pub(super) struct LeaseMap(MmapRaw);

impl LeaseMap {
    pub(super) fn new(map: &MapData) -> Result<Self, DatapathError> {
        mapped(names::CONTROL, map, size_of::<Control>(), Access::Write).map(Self)
    }

    /// To be read only.
    pub(super) fn read_only(map: &MapData) -> Result<Self, DatapathError> {
        mapped(names::CONTROL, map, size_of::<Control>(), Access::Read).map(Self)
    }

    fn word(&self) -> &AtomicU64 {
        let control: *mut Control = self.0.as_mut_ptr().cast();
        // SAFETY: an aligned word inside the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(&raw mut (*control).lease) }
    }

    pub(super) fn deadline(&self) -> u64 {
        self.word().load(Ordering::Relaxed)
    }

    pub(super) fn renew(&self, deadline: u64) {
        self.word().store(deadline, Ordering::Release);
    }
}

/// What the memory of a mapped map is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Whoever writes there is killed by the kernel.
    Read,
    /// Both.
    Write,
}

/// Maps a map's elements into memory.
pub(super) fn mapped(
    name: &'static str,
    map: &MapData,
    length: usize,
    access: Access,
) -> Result<MmapRaw, DatapathError> {
    let (mut options, map) = (MmapOptions::new(), map.fd().as_fd());
    options.len(length);
    let memory = match access {
        Access::Read => options.map_raw_read_only(&map),
        Access::Write => options.map_raw(&map),
    };
    memory.map_err(|source| DatapathError::Mmap { map: name, source })
}

/// As much of a [`State`] as a look at a stream that simply goes on takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pulse {
    /// [`State::mode`].
    pub(crate) mode: u32,
    /// [`State::last_seen`].
    pub(crate) last_seen: u32,
    /// Whether something came out of the PBX, if anything went in.
    pub(crate) is_answered: bool,
    /// [`State::reception`].
    pub(crate) reception: Reception,
}

impl Pulse {
    /// Of a state that was read whole.
    pub(crate) const fn of(state: &State) -> Self {
        Self {
            mode: state.mode(),
            last_seen: state.last_seen,
            is_answered: state.noted == 0 || state.echoed != 0 || state.unequal != 0,
            reception: state.reception,
        }
    }
}

/// `STATE`, mapped into memory: reading 100,000 streams costs no system call.
pub(super) struct StateMap {
    memory: MmapRaw,
    entries: u32,
}

impl StateMap {
    pub(super) fn new(map: &MapData, entries: u32) -> Result<Self, DatapathError> {
        let length = entries as usize * size_of::<State>();
        let memory = mapped(names::STATE, map, length, Access::Write)?;
        Ok(Self { memory, entries })
    }

    /// To be read only.
    pub(super) fn read_only(map: &MapData, entries: u32) -> Result<Self, DatapathError> {
        let length = entries as usize * size_of::<State>();
        let memory = mapped(names::STATE, map, length, Access::Read)?;
        Ok(Self { memory, entries })
    }

    fn slot(&self, slot: u32) -> *mut State {
        assert!(slot < self.entries, "slot {slot} of {}", self.entries);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.memory.as_mut_ptr().cast::<State>().add(slot as usize) }
    }

    fn epoch(&self, slot: u32) -> &AtomicU32 {
        let state = self.slot(slot);
        // SAFETY: an aligned word inside the mapping, which lives as long as `self`. The datapath
        // reads it on other CPUs.
        unsafe { AtomicU32::from_ptr(&raw mut (*state).epoch) }
    }

    pub(super) fn set_epoch(&self, slot: u32, epoch: u32) {
        self.epoch(slot).store(epoch, Ordering::Release);
    }

    pub(super) fn offload(
        &self,
        slot: u32,
        epoch: u32,
        payload_types: [PayloadType; PAYLOAD_TYPES],
    ) {
        let state = self.slot(slot);
        // SAFETY: inside the mapping. Without proof these fields are the controller's alone, and
        // nothing reads them before the epoch is set.
        unsafe {
            (&raw mut (*state).payload_types).write_volatile(payload_types);
            (&raw mut (*state).proven).write_volatile(epoch);
        }
        self.set_epoch(slot, epoch);
    }

    pub(super) fn set_clock(&self, slot: u32, payload_type: u8, clock: u32) {
        let state = self.slot(slot);
        // SAFETY: inside the mapping. These fields are the controller's alone; the datapath takes the
        // clock for that of another payload type until the second is written.
        unsafe {
            (&raw mut (*state).reception.clock).write_volatile(clock);
            (&raw mut (*state).reception.clock_type).write_volatile(payload_type);
        }
    }

    pub(super) fn reset(&self, slot: u32) {
        self.set_epoch(slot, 0);
        // SAFETY: inside the mapping. No stream of the maps has the slot yet, and an observer that
        // comes to it by the opposite one finds epoch 0, and leaves it alone.
        unsafe { self.slot(slot).write_volatile(State::default()) };
    }

    pub(super) fn pulse(&self, slot: u32) -> Pulse {
        let state: *const State = self.slot(slot);
        // SAFETY: inside the mapping, and as in `read`.
        unsafe {
            let epoch = (&raw const (*state).epoch).read_volatile();
            let proven = (&raw const (*state).proven).read_volatile();
            let suspended = (&raw const (*state).suspended).read_volatile();
            Pulse {
                mode: mode::of(epoch, proven, suspended),
                last_seen: (&raw const (*state).last_seen).read_volatile(),
                is_answered: (&raw const (*state).noted).read_volatile() == 0
                    || (&raw const (*state).echoed).read_volatile() != 0
                    || (&raw const (*state).unequal).read_volatile() != 0,
                reception: (&raw const (*state).reception).read_volatile(),
            }
        }
    }

    pub(super) fn read(&self, slot: u32) -> State {
        // SAFETY: inside the mapping. The datapath writes meanwhile: each word is what it was at
        // some time, which is all that is claimed, and any bits are valid.
        unsafe { self.slot(slot).read_volatile() }
    }
}
