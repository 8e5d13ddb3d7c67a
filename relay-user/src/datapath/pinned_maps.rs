//! The maps of a pinned instance, opened to be read only: for who looks on, whether a daemon runs or
//! not. Takes no lock, so that it neither delays a daemon nor is taken for one.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    ptr,
};

use aya::maps::{Map, MapData};
use aya_obj::generated::bpf_cmd;
use nix::libc;
use relay_common::{
    reason::Reason,
    stream::{Counter, State, Stream, StreamKey},
};

use super::{
    DatapathError,
    links::{bpf, open_read_only},
    maps::{self, Counters, LeaseMap, StateMap, total},
    names,
    pins::{error, own_directory, pin_root},
};

/// Streams that one system call reads: a bucket of the kernel's hash table must fit.
const BATCH: usize = 4096;

/// Maps that are read, in the order of their files below.
const READ: [&str; 4] = [
    names::STREAMS,
    names::STATE,
    names::COUNTERS,
    names::CONTROL,
];

/// The maps of one interface's instance.
pub struct PinnedMaps {
    interface: String,
    max_streams: u32,
    streams: MapData,
    state: StateMap,
    counters: Counters,
    lease: LeaseMap,
    /// Which pins these are, to tell when others have taken their places.
    files: [(u64, u64); READ.len()],
}

/// The interfaces that have pins of this version, in the order of their names.
#[must_use]
pub fn pinned_interfaces() -> Vec<String> {
    let directory = own_directory("");
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut interfaces: Vec<_> = entries
        .filter(|entry| entry.path().join(names::STREAMS).exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .map(|name| name.replace(':', "."))
        .collect();
    interfaces.sort_unstable();
    interfaces
}

impl PinnedMaps {
    /// Opens the maps that are pinned for an interface, of this version only.
    ///
    /// # Errors
    /// [`DatapathError::NotPinned`] where there are none, [`DatapathError::Layout`] where one is not as
    /// this version makes it; [`DatapathError::Pins`], [`DatapathError::Map`] and
    /// [`DatapathError::Mmap`] where the kernel refuses.
    pub fn open(interface: &str) -> Result<Self, DatapathError> {
        let directory = own_directory(interface);
        if !directory.join(names::STREAMS).exists() {
            return Err(DatapathError::NotPinned {
                interface: interface.to_owned(),
                root: pin_root(),
            });
        }
        // Before they are opened: a later change is seen then.
        let files = files(&directory)?;
        let open = |name| -> Result<MapData, DatapathError> {
            let path = directory.join(name);
            // Only what may be written can be mapped, if only to be read: of another file, mmap(2) clears
            // the flag VM_SHARED, which bpf_map_mmap() asks for (do_mmap() in mm/mmap.c).
            if [names::STATE, names::CONTROL].contains(&name) {
                return MapData::from_pin(&path).map_err(failed(name));
            }
            let descriptor = open_read_only(&path).map_err(error(&path))?;
            MapData::from_fd(descriptor).map_err(failed(name))
        };
        let [streams, state, counters, lease] = READ.map(open);
        let (streams, state, counters, lease) = (streams?, state?, counters?, lease?);
        let max_streams = streams
            .info()
            .map_err(failed(names::STREAMS))?
            .max_entries();
        let expected = maps::layouts(max_streams)?;
        for (name, map) in READ.into_iter().zip([&streams, &state, &counters, &lease]) {
            let found = maps::layout(name, &map.info().map_err(failed(name))?);
            if !expected.contains(&found) {
                return Err(DatapathError::Layout {
                    path: directory.join(name),
                });
            }
        }
        Ok(Self {
            interface: interface.to_owned(),
            max_streams,
            state: StateMap::read_only(&state, max_streams)?,
            lease: LeaseMap::read_only(&lease)?,
            counters: Counters::try_from(Map::PerCpuArray(counters))
                .map_err(failed(names::COUNTERS))?,
            streams,
            files,
        })
    }

    /// The interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Folder of the pins.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        own_directory(&self.interface)
    }

    /// Size of the table of streams.
    #[must_use]
    pub const fn max_streams(&self) -> u32 {
        self.max_streams
    }

    /// Whether the pins are still those that were opened: a daemon may have ended, or put a new
    /// instance in their place.
    #[must_use]
    pub fn is_current(&self) -> bool {
        files(&self.directory()).is_ok_and(|files| files == self.files)
    }

    /// Every stream, in no order. One that is added or removed meanwhile may be missing.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn streams(&self) -> Result<Vec<(StreamKey, Stream)>, DatapathError> {
        let mut streams = Vec::new();
        let mut keys = buffer::<StreamKey>()?;
        let mut values = buffer::<Stream>()?;
        // Where the next call goes on; nothing for the first.
        let mut position: Option<u32> = None;
        loop {
            let mut next = 0_u32;
            let mut batch = Batch {
                from: position
                    .as_ref()
                    .map_or(0, |at| ptr::from_ref(at).addr() as u64),
                to: ptr::from_mut(&mut next).addr() as u64,
                keys: keys.as_mut_ptr().addr() as u64,
                values: values.as_mut_ptr().addr() as u64,
                count: BATCH as u32,
                map: self.streams.fd().as_fd().as_raw_fd(),
                element_flags: 0,
                flags: 0,
            };
            let done = match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut batch) {
                Ok(_) => false,
                // The last of them (generic for all maps, Documentation/bpf/map_hash.rst).
                Err(end) if end.raw_os_error() == Some(libc::ENOENT) => true,
                Err(source) => return Err(failed_call(source)),
            };
            let count = (batch.count as usize).min(BATCH);
            streams.extend(
                keys[..count]
                    .iter()
                    .copied()
                    .zip(values[..count].iter().copied()),
            );
            if done {
                return Ok(streams);
            }
            position = Some(next);
        }
    }

    /// What happened to a stream so far; none for a slot that the map does not have.
    #[must_use]
    pub fn state(&self, slot: u32) -> Option<State> {
        (slot < self.max_streams).then(|| self.state.read(slot))
    }

    /// Until when anything is relayed: `CLOCK_MONOTONIC`, ns.
    #[must_use]
    pub fn lease(&self) -> u64 {
        self.lease.deadline()
    }

    /// Packets and bytes by reason, all CPUs together.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn counters(&self) -> Result<Vec<(Reason, Counter)>, DatapathError> {
        Reason::ALL
            .iter()
            .map(|&reason| Ok((reason, total(&self.counters, reason as u32)?)))
            .collect()
    }
}

/// `struct { … } batch` of `union bpf_attr` (Linux 5.6).
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: i32,
    element_flags: u64,
    flags: u64,
}

/// Room for one batch.
fn buffer<T: zerocopy::FromZeros>() -> Result<Vec<T>, DatapathError> {
    T::new_vec_zeroed(BATCH).map_err(|_| failed_call(io::ErrorKind::OutOfMemory.into()))
}

/// What the kernel said to reading `STREAMS`.
fn failed_call(io_error: io::Error) -> DatapathError {
    failed(names::STREAMS)(aya::maps::MapError::SyscallError(aya::sys::SyscallError {
        call: "BPF_MAP_LOOKUP_BATCH",
        io_error,
    }))
}

fn failed(map: &'static str) -> impl FnOnce(aya::maps::MapError) -> DatapathError {
    move |source| DatapathError::Map {
        map,
        source: Box::new(source),
    }
}

/// Device and inode of each pin.
fn files(directory: &Path) -> Result<[(u64, u64); READ.len()], DatapathError> {
    let mut files = [(0, 0); READ.len()];
    for (file, name) in files.iter_mut().zip(READ) {
        let path = directory.join(name);
        let metadata = fs::metadata(&path).map_err(error(&path))?;
        *file = (metadata.dev(), metadata.ino());
    }
    Ok(files)
}
